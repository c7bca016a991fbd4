"""Recall@K of retrieval between texts and images, from their embeddings."""

from collections.abc import Sequence

import torch


def _check(text_embeds: torch.Tensor, image_embeds: torch.Tensor, image_of_text: torch.Tensor) -> None:
    """Raise the errors of `recall_at_k` that concern the tensors."""
    if text_embeds.ndim != 2 or image_embeds.ndim != 2 or text_embeds.shape[1] != image_embeds.shape[1]:
        raise ValueError(
            f"text_embeds is {tuple(text_embeds.shape)} and image_embeds {tuple(image_embeds.shape)}; they must be "
            "(texts, width) and (images, width)."
        )
    if image_of_text.shape != text_embeds.shape[:1]:
        raise ValueError(
            f"image_of_text is {tuple(image_of_text.shape)}; it must have one index for each of {len(text_embeds)} "
            "texts."
        )
    if not torch.equal(image_of_text.unique().cpu(), torch.arange(len(image_embeds))):
        raise ValueError(
            f"image_of_text must name each of the {len(image_embeds)} images, by 0 to {len(image_embeds) - 1}, at "
            "least once; where it's left out, there must be one text for each image."
        )


def _text_to_image_ranks(
    text_embeds: torch.Tensor, image_embeds: torch.Tensor, image_of_text: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Return the rank of each text's image among the images, from 1, (texts,)."""
    ranks = []
    for texts, own in zip(text_embeds.split(block_size), image_of_text.split(block_size), strict=True):
        scores = texts @ image_embeds.t()
        # What isn't below counts against it: ties, NaN, and itself, which makes ranks start at 1.
        ranks.append((~(scores < scores.gather(1, own[:, None]))).sum(1))
    return torch.cat(ranks)


def _image_to_text_ranks(
    text_embeds: torch.Tensor, image_embeds: torch.Tensor, image_of_text: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Return the rank of each image's best text among the texts of other images, from 1, (images,)."""
    ranks = []
    indices = torch.arange(len(image_embeds), device=image_embeds.device)
    for images, index in zip(image_embeds.split(block_size), indices.split(block_size), strict=True):
        scores = images @ text_embeds.t()
        own = image_of_text == index[:, None]
        best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        ranks.append(1 + (~(scores < best) & ~own).sum(1))
    return torch.cat(ranks)


def recall_at_k(
    text_embeds: torch.Tensor,
    image_embeds: torch.Tensor,
    image_of_text: torch.Tensor | None = None,
    ks: Sequence[int] = (1, 5, 10),
    block_size: int = 1024,
) -> dict[str, float]:
    """Return the share of queries whose match is among the K most similar, in both directions.

    A text's match is its image; an image's is any of its texts, so the best of them counts. Ties count against the
    match, and so does NaN: embeddings that are all alike have a recall of 0 rather than of 1.

    Args:
        text_embeds: L2-normalised, (texts, width), float32 or float64.
        image_embeds: L2-normalised, (images, width), of the same dtype and on the same device.
        image_of_text: For each text the index of its image, (texts,), int64, which names each image at least once; by
            default text i belongs to image i.
        ks: The values of K, each at least 1.
        block_size: Queries that are compared at once, which bounds the memory.

    Returns:
        {"image_to_text_recall@K": …, "text_to_image_recall@K": …} for each K, in 0..1.

    Raises:
        ValueError: A shape or a value isn't as above, or there are no embeddings.

    Source: Karpathy and Fei-Fei 2015, section 4.2; CLIP's appendix E for zero-shot retrieval.
    """
    if not len(text_embeds) or not len(image_embeds):
        raise ValueError(f"There are {len(text_embeds)} texts and {len(image_embeds)} images; there must be some.")
    if min(ks, default=0) < 1:
        raise ValueError(f"ks is {tuple(ks)}; it must hold whole numbers of at least 1.")
    if image_of_text is None:
        image_of_text = torch.arange(len(text_embeds), device=text_embeds.device)
    _check(text_embeds, image_embeds, image_of_text)
    image_of_text = image_of_text.to(text_embeds.device)
    ranks = {
        "image_to_text": _image_to_text_ranks(text_embeds, image_embeds, image_of_text, block_size),
        "text_to_image": _text_to_image_ranks(text_embeds, image_embeds, image_of_text, block_size),
    }
    return {f"{name}_recall@{k}": (rank <= k).double().mean().item() for name, rank in ranks.items() for k in ks}


__all__ = ["recall_at_k"]
