"""What the trainer measures on the embeddings of a whole evaluation set."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch.utils.data import Dataset

from ..data.ranks import choose_device, label_ranks
from ..data.retrieval_metrics import counts_before, recall_of_counts
from ..model.loss_diffclip import symmetric_cross_entropy
from ..zero_shot import mean_label_embeds


RECALL_KS = (1, 5, 10)
# Texts whose logits are in memory at once: with 32,768 pairs 256 MiB.
LOSS_BLOCK = 2048


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


def loss_in_blocks(
    text_embeds: torch.Tensor, image_embeds: torch.Tensor, scale: torch.Tensor, block_size: int = LOSS_BLOCK
) -> torch.Tensor:
    """Return `symmetric_cross_entropy` of pairs, without a gradient, from so many texts' logits at once.

    Args:
        text_embeds, image_embeds: Normalised, float32, (pairs, projection_dim); there must be some.
        scale: What similarities are multiplied by.
        block_size: It bounds the memory.
    """
    if len(text_embeds) <= block_size:
        return symmetric_cross_entropy(scale * text_embeds @ image_embeds.t())
    columns = image_embeds.new_full((len(image_embeds),), -torch.inf)
    total = image_embeds.new_zeros(())
    for first in range(0, len(text_embeds), block_size):
        logits = scale * text_embeds[first : first + block_size] @ image_embeds.t()
        total += (logits.logsumexp(1) - 2 * logits.diagonal(first)).sum()
        columns = torch.logaddexp(columns, logits.logsumexp(0))
    return (total + columns.sum()) / 2 / len(text_embeds)


def pair_metrics(
    text_embeds: torch.Tensor,
    image_embeds: torch.Tensor,
    scale: torch.Tensor,
    global_batch_size: int,
    device: torch.device | None = None,
) -> dict[str, float]:
    """Return the loss and the recall of pairs; every process has to call this, and computes its part of the ranks.

    Args:
        text_embeds, image_embeds: Normalised, float32, (pairs, projection_dim), the same in every process.
        scale: What similarities are multiplied by, exp(logit_scale).
        global_batch_size: Each pair's negatives are those of so many pairs in turn, as in training.
        device: Where it's computed, by default where the embeddings are.
    """
    device = choose_device(device, text_embeds)
    scale = scale.to(device)
    losses = [
        loss_in_blocks(texts.to(device), images.to(device), scale) * len(texts)
        for texts, images in zip(
            text_embeds.split(global_batch_size), image_embeds.split(global_batch_size), strict=True
        )
    ]
    loss = (torch.stack(losses).sum() / len(text_embeds)).item()
    state = PartialState()
    counts = counts_before(
        text_embeds,
        image_embeds,
        torch.arange(len(text_embeds)),
        max(RECALL_KS),
        device=device,
        part=(state.process_index, state.num_processes),
    )
    everywhere = {name: reduce(number, "sum") for name, number in counts.items()}
    return {"loss": loss, **recall_of_counts(everywhere, RECALL_KS)}


def zero_shot_accuracy(
    image_embeds: torch.Tensor,
    labels: torch.Tensor,
    text_embeds: torch.Tensor,
    indices: Any,
    count: int,
    device: torch.device | None = None,
) -> float:
    """Return the share of images that are nearest to their own label, the first of labels that are alike.

    Args:
        image_embeds: Normalised, float32, (images, projection_dim).
        labels: Each image's label, int64, (images,).
        text_embeds: The labels' texts, likewise normalised.
        indices: Which texts are whose, as `label_texts` gives them.
        count: How many labels there are.
        device: Where it's computed, by default where the embeddings are.

    Raises:
        ValueError: An image has a label beyond them.
    """
    check_labels(labels, count)
    label_embeds = mean_label_embeds(text_embeds, indices, count)
    # A row without a label, -100, isn't right.
    ranks = label_ranks(image_embeds, label_embeds, labels.clamp(min=0), most=1, device=device)
    return ((ranks < 1) & (labels.cpu() >= 0)).double().mean().item()


__all__ = ["ZeroShotTask", "check_labels", "pair_metrics", "zero_shot_accuracy"]
