"""The contrastive loss, with negatives from every process."""

from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy, pad

from .precision_diffclip import at_least_float32


class _GatherRows(torch.autograd.Function):
    """Stack every process's rows, (processes, *rows.shape); all must have the same shape.

    Backwards, the local rows get the sum of the gradients that every process's loss has for them.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        gathered = rows.new_empty(dist.get_world_size(), *rows.shape)
        dist.all_gather(list(gathered), rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        # At least in float32, in which half precision's gradients are summed without rounding each sum.
        summed = gradient.to(at_least_float32(gradient.dtype), copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed[dist.get_rank()].to(gradient.dtype)


def gather_pairs(
    text_embeds: torch.Tensor, image_embeds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return every process's texts and images, differentiably, and which of them are the local ones."""
    gathered = torch.empty(dist.get_world_size(), 1, dtype=torch.int64, device=text_embeds.device)
    dist.all_gather(list(gathered), gathered.new_tensor([len(text_embeds)]))
    counts = gathered.flatten().tolist()
    # Texts and images in one call, padded to the most rows that a process has.
    pairs = torch.stack([text_embeds, image_embeds], dim=1)
    pairs = _GatherRows.apply(pad(pairs, (0, 0, 0, 0, 0, max(counts) - len(pairs))))
    pairs = torch.cat([pair[:count] for pair, count in zip(pairs, counts, strict=True)])
    targets = torch.arange(len(text_embeds), device=text_embeds.device) + sum(counts[: dist.get_rank()])
    return pairs[:, 0], pairs[:, 1], targets


def symmetric_cross_entropy(logits_per_text: torch.Tensor) -> torch.Tensor:
    """Return the mean of the text-to-image and image-to-text cross-entropies, where row i belongs to column i.

    Args:
        logits_per_text: Scaled similarities, (n, n), any floating dtype.

    Returns:
        A tensor without dimensions, in nats; 0 of no rows.

    Source: Radford et al. 2021 (CLIP), figure 3; paper arXiv 2503.06626, section 3.
    """
    if not len(logits_per_text):
        return logits_per_text.sum()  # A mean over nothing would be NaN.
    targets = torch.arange(len(logits_per_text), device=logits_per_text.device)
    return (cross_entropy(logits_per_text, targets) + cross_entropy(logits_per_text.t(), targets)) / 2


def image_text_contrastive_loss(
    text_embeds: torch.Tensor, image_embeds: torch.Tensor, logit_scale: torch.Tensor
) -> torch.Tensor:
    """Return the contrastive loss of pairs, whose negatives are the other pairs of every process.

    With logits exp(logit_scale) · cosine similarity, each local text is told apart from the images of all P processes,
    and each local image from their texts. Process p returns

        loss_p = P / N · Σ_i (CE(text i, all images) + CE(image i, all texts)) / 2, over its own pairs i,

    where N counts the pairs of all processes, so that the mean over processes is the loss of the whole batch. Since
    distributed training averages gradients over processes, each averaged gradient, `logit_scale`'s too, is that of one
    process with the whole batch, however the pairs are shared out; a process may have none. Gradients reach the other
    processes' embeddings through the gather. In one process the loss is the mean of both cross-entropies.

    Every process has to call this, in evaluation too: one that calls it alone waits for the others forever. Where only
    one process runs the model, it's called with `return_loss=False`.

    Args:
        text_embeds: L2-normalised, (local pairs, projection_dim), any floating dtype.
        image_embeds: Likewise; image i belongs to text i. May be on another device, where a model is spread over
            several.
        logit_scale: The logarithm of the scale, one number.

    Returns:
        A tensor without dimensions, in nats.

    Raises:
        ValueError: The numbers of texts and images differ.

    Source: Radford et al. 2021 (CLIP), figure 3; paper arXiv 2503.06626, section 3.
    """
    if text_embeds.shape != image_embeds.shape:
        raise ValueError(
            f"text_embeds is {tuple(text_embeds.shape)} and image_embeds {tuple(image_embeds.shape)}; the loss needs "
            "one image for each text."
        )
    image_embeds = image_embeds.to(text_embeds.device)
    scale = logit_scale.exp().to(text_embeds.device)
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return symmetric_cross_entropy(scale * text_embeds @ image_embeds.t())
    all_text_embeds, all_image_embeds, targets = gather_pairs(text_embeds, image_embeds)
    text_loss = cross_entropy(scale * text_embeds @ all_image_embeds.t(), targets, reduction="sum")
    image_loss = cross_entropy(scale * image_embeds @ all_text_embeds.t(), targets, reduction="sum")
    return (text_loss + image_loss) / 2 * dist.get_world_size() / max(1, len(all_text_embeds))
