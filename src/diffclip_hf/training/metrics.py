"""What the trainer measures on the embeddings of a whole evaluation set."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from ..data.retrieval_metrics import recall_at_k
from ..model.loss_diffclip import symmetric_cross_entropy
from ..zero_shot import mean_label_embeds


@dataclass
class ZeroShotTask:
    """Labelled images that `DiffCLIPTrainer` classifies in each evaluation.

    Args:
        dataset: Images with the index of their label; map-style, the same in every process.
        collator: Makes of its rows `pixel_values`, (n, channels, height, width), and `labels`, (n,), int64.
        labels: The labels' names, in the order of the indices, as `ZeroShotClassifier` takes them.
        templates: As `ZeroShotClassifier` takes them.
    """

    dataset: Dataset
    collator: Callable[[list[Any]], Mapping[str, torch.Tensor]]
    labels: Sequence[str] | Mapping[str, str | Sequence[str]]
    templates: str | Sequence[str] = "This is a photo of {}."


def check_labels(labels: Any, count: int) -> None:
    """Raise a ValueError where one of a batch's labels, a tensor or array, isn't among so many, or -100."""
    wrong = labels[((labels < 0) | (labels >= count)) & (labels != -100)]
    if len(wrong):
        raise ValueError(f"A label is {int(wrong[0])}; there are {count} labels, so it must be in 0..{count - 1}.")


def pair_metrics(
    text_embeds: torch.Tensor, image_embeds: torch.Tensor, scale: torch.Tensor, global_batch_size: int
) -> dict[str, float]:
    """Return the loss and the recall of pairs.

    Args:
        text_embeds, image_embeds: Normalised, float32, (pairs, projection_dim).
        scale: What similarities are multiplied by, exp(logit_scale).
        global_batch_size: Each pair's negatives are those of so many pairs in turn, as in training.
    """
    losses = [
        symmetric_cross_entropy(scale * texts @ images.t()) * len(texts)
        for texts, images in zip(
            text_embeds.split(global_batch_size), image_embeds.split(global_batch_size), strict=True
        )
    ]
    loss = (torch.stack(losses).sum() / len(text_embeds)).item()
    return {"loss": loss, **recall_at_k(text_embeds, image_embeds)}


def zero_shot_accuracy(
    image_embeds: torch.Tensor, labels: torch.Tensor, text_embeds: torch.Tensor, indices: Any, count: int
) -> float:
    """Return the share of images that are nearest to their own label.

    Args:
        image_embeds: Normalised, float32, (images, projection_dim).
        labels: Each image's label, int64, (images,).
        text_embeds: The labels' texts, likewise normalised.
        indices: Which texts are whose, as `label_texts` gives them.
        count: How many labels there are.

    Raises:
        ValueError: An image has a label beyond them.
    """
    check_labels(labels, count)
    predicted = (image_embeds @ mean_label_embeds(text_embeds, indices, count).t()).argmax(1)
    return (predicted == labels).double().mean().item()


__all__ = ["ZeroShotTask", "check_labels", "pair_metrics", "zero_shot_accuracy"]
