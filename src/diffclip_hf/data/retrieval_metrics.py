"""Recall@K of retrieval between texts and images, from their embeddings."""

from collections.abc import Mapping, Sequence

import torch

from .ranks import Counts, block_scores, choose_device, default_block, full_precision, own_products


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


def counts_before(
    text_embeds: torch.Tensor,
    image_embeds: torch.Tensor,
    image_of_text: torch.Tensor,
    most: int,
    block_size: int | None = None,
    device: torch.device | None = None,
    part: tuple[int, int] = (0, 1),
) -> dict[str, torch.Tensor]:
    """Return how many are before each query's match, in both directions from one pass over the products.

    Args:
        text_embeds, image_embeds, image_of_text, block_size, device: As in `recall_at_k`.
        most: From where on a count needn't be right, but as large as this.
        part: A number and a count: of so many parts the one that is computed here, from 0. The sums of all parts'
            counts are those of the whole.

    Returns:
        {"image_to_text": (images,), "text_to_image": (texts,)}, int64, on the device.
    """
    device = choose_device(device, text_embeds)
    size = block_size or default_block(device)
    image_of_text = image_of_text.to(device)
    own = own_products(text_embeds, image_embeds, image_of_text, device)
    # NaN is the most there is.
    best = own.new_full((len(image_embeds),), -torch.inf).scatter_reduce(0, image_of_text, own, "amax")
    texts, images = Counts(own, most), Counts(best, most)
    with full_precision(device):
        for text in range(part[0] * size, len(text_embeds), part[1] * size):
            some_texts = text_embeds[text : text + size].to(device)
            for image in range(0, len(image_embeds), size):
                some_images = image_embeds[image : image + size].to(device)
                scores = block_scores(some_texts, some_images, image_of_text[text : text + size], image)
                texts.add(scores, some_texts, some_images, text, image)
                images.add(scores.t(), some_images, some_texts, image, text)
    # All others are before what is broken; the first part says so.
    first = part[0] == 0
    others = len(text_embeds) - torch.bincount(image_of_text, minlength=len(image_embeds))
    return {
        "image_to_text": torch.where(best.isfinite(), images.numbers, others * first),
        "text_to_image": torch.where(own.isfinite(), texts.numbers, (len(image_embeds) - 1) * first),
    }


def recall_of_counts(counts: Mapping[str, torch.Tensor], ks: Sequence[int]) -> dict[str, float]:
    """Return the recall from what `counts_before` returns, as `recall_at_k` does."""
    return {f"{name}_recall@{k}": (number < k).double().mean().item() for name, number in counts.items() for k in ks}


def recall_at_k(
    text_embeds: torch.Tensor,
    image_embeds: torch.Tensor,
    image_of_text: torch.Tensor | None = None,
    ks: Sequence[int] = (1, 5, 10),
    block_size: int | None = None,
    device: torch.device | None = None,
) -> dict[str, float]:
    """Return the share of queries whose match is among the K most similar, in both directions.

    A text's match is its image; an image's is any of its texts, so the best of them counts. Ties count against the
    match, and so does NaN: embeddings that are all alike have a recall of 0 rather than of 1.

    Every text is compared with every image once, for both directions, in blocks; no matrix of all is ever there, and
    the embeddings may lie in memory-mapped files. The result is that of scores in float64, whatever the blocks.

    Args:
        text_embeds: L2-normalised, (texts, width), float32 or float64.
        image_embeds: L2-normalised, (images, width), of the same dtype.
        image_of_text: For each text the index of its image, (texts,), int64, which names each image at least once; by
            default text i belongs to image i.
        ks: The values of K, each at least 1.
        block_size: Texts, and images, that are compared at once, which bounds the memory: by default 2,048 on a CPU
            and 8,192 on a GPU, for which some 0.1 and 1 GiB are needed besides the embeddings.
        device: Where the products are computed, by default where the texts are. Blocks are brought there one by one.

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
    return recall_of_counts(counts_before(text_embeds, image_embeds, image_of_text, max(ks), block_size, device), ks)


__all__ = ["counts_before", "recall_at_k", "recall_of_counts"]
