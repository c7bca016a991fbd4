"""The tasks of an evaluation: each runs a model on a data set and returns its measures.

A result holds what `base_result` says, `metrics`, all of them shares in 0..1, and `main`, the name of the one that
stands for it in a mean.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import logging

from ..common.commands import require_extra
from ..data.ranks import label_ranks
from ..data.retrieval_metrics import recall_at_k
from ..zero_shot import label_texts, mean_label_embeds
from .datasets import Labelled, load_captioned, load_labelled, load_pairs, with_names
from .encoder import Encoder
from .metrics import (
    classification_metrics,
    few_shot_accuracies,
    few_shot_rows,
    linear_probe,
    mean_by_group,
    pair_matches,
)
from .specs import DatasetSpec


logger = logging.get_logger(__name__)
# What El Banani et al. 2023 hold out where there is no validation split.
HELD_OUT_SHARE = 0.2
EPISODE_OPTIONS = ("ways", "shots", "queries", "episodes", "seed")


@dataclass(frozen=True)
class TaskOptions:
    """What a task needs besides a model and a data set.

    Args:
        pooled: Whether probes and few-shot classification learn from the image tower's pooled output, before the
            projection, or from the projection, L2-normalised.
        ways, shots, queries, episodes: As in `few_shot_accuracies`.
        seed: Of the episodes, and of the images held out.
    """

    pooled: bool = True
    ways: int | None = 5
    shots: int = 5
    queries: int | None = 6
    episodes: int = 5000
    seed: int = 0


def base_result(spec: DatasetSpec, split: str, images: int) -> dict[str, Any]:
    """Return what every result says: the data set, where it's from, its split and the number of images measured."""
    return {"dataset": spec.name, "source": spec.source, "split": split, "n": images}


def zero_shot(encoder: Encoder, spec: DatasetSpec, options: TaskOptions) -> dict[str, Any]:
    """Measure top-1 and top-5 accuracy and the mean of every class's accuracy, without training.

    Each label's texts are embedded and normalised, and their mean is normalised again. Underscores in a label's name
    are spaces in its texts.

    Source: SLIP's `eval_zeroshot.py`; the paper, section 4.
    """
    part = load_labelled(spec, spec.split)
    # Names may be alike, as two of ImageNet's are, so the index is what labels go by.
    names = {str(index): name.replace("_", " ") for index, name in enumerate(part.names)}
    if alike := len(names) - len(set(names.values())):
        logger.warning("%s: %d labels have a name that another has too.", spec.name, alike)
    _, texts, indices = label_texts(names, spec.templates)
    label_embeds = mean_label_embeds(encoder.text_embeds(texts), indices, len(names))
    image_embeds = encoder.image_embeds(part.dataset, part.split)
    ranks = label_ranks(image_embeds, label_embeds, part.labels, most=5, device=encoder.device)
    return {
        **base_result(spec, part.split, len(ranks)),
        "classes": len(names),
        "templates": list(spec.templates),
        "main": spec.metric,
        "metrics": {
            **classification_metrics(ranks < 1, part.labels),
            "top5_accuracy": (ranks < 5).double().mean().item(),
        },
    }


def retrieval(encoder: Encoder, spec: DatasetSpec, options: TaskOptions) -> dict[str, Any]:
    """Measure Recall@1, 5 and 10 in both directions, with any number of captions an image; see `recall_at_k`."""
    part = load_captioned(spec, spec.split, encoder.num_workers)
    metrics = recall_at_k(
        encoder.text_embeds(part.captions),
        encoder.image_embeds(part.dataset, part.split, rows=part.rows),
        part.image_of_caption,
        device=encoder.device,
    )
    return {
        **base_result(spec, part.split, len(part.dataset)),
        "captions": len(part.captions),
        "main": "text_to_image_recall@5",
        "metrics": metrics,
    }


def _hold_out(labels: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows to train on and those to validate on, `HELD_OUT_SHARE` of each class."""
    from sklearn.model_selection import train_test_split

    rows = torch.arange(len(labels)).numpy()
    counts = torch.bincount(labels)
    if ((counts > 0) & (counts < 2)).any() or len(labels) * HELD_OUT_SHARE < (counts > 0).sum():
        raise ValueError(
            f"The training split has {len(labels)} images of {int((counts > 0).sum())} classes, too few to hold "
            f"{HELD_OUT_SHARE:.0%} out of each; name a validation split."
        )
    train, validation = train_test_split(rows, test_size=HELD_OUT_SHARE, stratify=labels.numpy(), random_state=seed)
    return torch.from_numpy(train), torch.from_numpy(validation)


def _features(encoder: Encoder, part: Labelled, options: TaskOptions) -> tuple[torch.Tensor, torch.Tensor]:
    return encoder.image_embeds(part.dataset, part.split, pooled=options.pooled), part.labels


def _train_and_test(spec: DatasetSpec) -> tuple[Labelled, Labelled]:
    train = load_labelled(spec, spec.train_split, own_names=True)
    if len(classes := train.labels.unique()) < 2:
        raise ValueError(f"{spec.name}: the split {train.split} has {len(classes)} class; there must be at least 2.")
    return train, with_names(load_labelled(spec, spec.split, own_names=True), train)


def probe(encoder: Encoder, spec: DatasetSpec, options: TaskOptions) -> dict[str, Any]:
    """Measure logistic regression on the image features; see `linear_probe`.

    Raises:
        ValueError: There is no validation split, and too few training images to hold some out.
    """
    require_extra("evaluation", "sklearn")
    train_part, test_part = _train_and_test(spec)
    # Before the work, for both may refuse.
    if spec.validation_split is None:
        rows, held_out = _hold_out(train_part.labels, options.seed)
        train = _features(encoder, train_part, options)
        validation = (train[0][held_out], train[1][held_out])
        train = (train[0][rows], train[1][rows])
    else:
        part = with_names(load_labelled(spec, spec.validation_split, own_names=True), train_part)
        train, validation = (_features(encoder, one, options) for one in (train_part, part))
    test_features, labels = _features(encoder, test_part, options)
    found = linear_probe(train, validation, test_features, spec.metric)
    return {
        **base_result(spec, test_part.split, len(labels)),
        "train_split": spec.train_split,
        "validation_split": spec.validation_split or f"{HELD_OUT_SHARE:.0%} of {spec.train_split}",
        "train_images": len(train[1]),
        "validation_images": len(validation[1]),
        "classes": len(train_part.names),
        "features": "pooled" if options.pooled else "projected",
        "cost": found.cost,
        "validation": {f"{cost:.3g}": value for cost, value in found.validation.items()},
        "converged": found.converged,
        "main": spec.metric,
        "metrics": classification_metrics(found.predictions == labels, labels),
    }


def few_shot(encoder: Encoder, spec: DatasetSpec, options: TaskOptions) -> dict[str, Any]:
    """Measure the accuracy of the nearest prototype over episodes; see `few_shot_accuracies`."""
    train_part, test_part = _train_and_test(spec)
    numbers: dict[str, Any] = {name: getattr(options, name) for name in EPISODE_OPTIONS}
    # Before the work, for it may refuse.
    few_shot_rows(train_part.labels, test_part.labels, **numbers)
    accuracies = few_shot_accuracies(
        _features(encoder, train_part, options), _features(encoder, test_part, options), **numbers
    )
    deviation = accuracies.std().item() if len(accuracies) > 1 else None
    return {
        **base_result(spec, test_part.split, len(test_part.labels)),
        "train_split": spec.train_split,
        "train_images": len(train_part.labels),
        "classes": len(train_part.names),
        "features": "pooled" if options.pooled else "projected",
        **numbers,
        # Of single episodes; the mean's own error is smaller by the root of their number.
        "deviation": deviation,
        "standard_error": None if deviation is None else deviation / len(accuracies) ** 0.5,
        "main": "accuracy",
        "metrics": {"accuracy": accuracies.mean().item()},
    }


def mmvp(encoder: Encoder, spec: DatasetSpec, options: TaskOptions) -> dict[str, Any]:
    """Measure the share of pairs that are told apart, for each visual pattern, and the patterns' mean.

    See `pair_matches`; `pair_accuracy` is that of `text_to_image`, by which the authors of MMVP measure.
    """
    part, patterns = load_pairs(spec, spec.split)
    # Statements may be alike, so the index is what labels go by.
    statements = {str(index): statement for index, statement in enumerate(part.captions)}
    _, texts, indices = label_texts(statements, spec.templates)
    text_embeds = mean_label_embeds(encoder.text_embeds(texts), indices, len(statements))
    matches = pair_matches(encoder.image_embeds(part.dataset, part.split), text_embeds)
    by_pattern = {direction: mean_by_group(correct, patterns) for direction, correct in matches.items()}
    means = {direction: sum(shares.values()) / len(shares) for direction, shares in by_pattern.items()}
    return {
        **base_result(spec, part.split, len(part.dataset)),
        "pairs": len(patterns),
        "templates": list(spec.templates),
        "patterns": by_pattern["text_to_image"],
        "main": "pair_accuracy",
        "metrics": {
            "pair_accuracy": means["text_to_image"],
            "pair_accuracy_image_to_text": means["image_to_text"],
        },
    }


RUN_TASK = {
    "zero-shot": zero_shot,
    "retrieval": retrieval,
    "linear-probe": probe,
    "few-shot": few_shot,
    "mmvp": mmvp,
}

__all__ = ["EPISODE_OPTIONS", "RUN_TASK", "TaskOptions"]
