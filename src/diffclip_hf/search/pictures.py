"""Pictures' embeddings, as they come."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import TypeVar

import torch
from transformers.utils import logging

from ..common.reading_batches import read_batches
from ..evaluation.encoder import Encoder, check_finite


Item = TypeVar("Item")
Said = TypeVar("Said")


def embed_pictures(
    encoder: Encoder,
    items: Sequence[Item],
    read: Callable[[Item], tuple[Said, torch.Tensor | None]],
    *,
    sendable: bool,
    passed_over: Callable[[Said], bool] = lambda said: False,
) -> Iterator[tuple[int, Said, torch.Tensor | None]]:
    """Yield each item's index, what `read` says of it, and its picture's embedding, L2-normalised, float32, (width,).

    Args:
        encoder: Embeds them, on as many workers as it has where they're sendable, else in this thread.
        items: What stands for pictures.
        read: Called in the workers. Returns something beside the pixel values, None where there's nothing to embed.
        sendable: Whether items can be sent to another process.
        passed_over: Says, by what `read` says of a picture, in order and in this thread, that it needn't be embedded.

    Raises:
        ValueError: An embedding isn't finite.
    """

    def read_pixels(item: Item) -> tuple[torch.Tensor | None, tuple[Said, bool]]:
        said, pixels = read(item)
        return pixels, (said, pixels is not None)

    batches = read_batches(
        items,
        read_pixels,
        encoder.batch_size,
        encoder.num_workers if sendable else 1,
        len(items),
        sendable=sendable,
        gives_way=encoder.device.type == "cpu",
    )
    indices, disable = iter(range(len(items))), len(items) < 2
    with closing(batches), logging.tqdm(total=len(items), desc="Images", unit="image", disable=disable) as bar:
        for pixels, rest in batches:
            needed = [is_read and not passed_over(said) for said, is_read in rest]
            among_read = [one for one, (_, is_read) in zip(needed, rest, strict=True) if is_read]
            if not all(among_read):
                pixels = pixels[among_read]
            embeds = iter(check_finite(encoder.embed_pixels(pixels), "image") if len(pixels) else ())
            for (said, _), is_needed in zip(rest, needed, strict=True):
                yield next(indices), said, next(embeds) if is_needed else None
            bar.update(len(rest))


__all__ = ["embed_pictures"]
