"""Pictures' embeddings, as they come."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any, TypeVar

import numpy as np
import torch
from transformers.utils import logging

from ..common.reading_batches import read_batches
from ..evaluation.encoder import Encoder, check_finite
from ..model.image_reading_diffclip import read_image
from ..zero_shot import is_single


Item = TypeVar("Item")
Said = TypeVar("Said")


def pixel_values(image_processor: Any, source: Any) -> torch.Tensor:
    """Return a picture's pixel values, float32, (1, channels, height, width).

    Args:
        image_processor: The model's.
        source: An array as the image processor takes it, or what `read_image` reads.

    Raises:
        ValueError: It isn't a picture, or can't be read.
    """
    if source is None or not (is_single(source) or isinstance(source, (str, os.PathLike))):
        raise ValueError(f"it is of type {type(source).__name__}, which isn't a picture's, a path's or a URL's.")
    image = source if isinstance(source, (np.ndarray, torch.Tensor)) else read_image(source)
    return image_processor(images=[image], return_tensors="pt")["pixel_values"]


def embed_pictures(
    encoder: Encoder,
    items: Sequence[Item],
    read: Callable[[Item], tuple[Said, torch.Tensor | None]],
    *,
    sendable: bool,
) -> Iterator[tuple[int, Said, torch.Tensor | None]]:
    """Yield each item's index, what `read` says of it, and its picture's embedding, L2-normalised, float32, (width,).

    Args:
        encoder: Embeds them, on as many workers as it has where they're sendable, else in this thread.
        items: What stands for pictures.
        read: Called in the workers. Returns something beside the pixel values, None where there's nothing to embed.
        sendable: Whether items can be sent to another process.

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
            embeds = iter(check_finite(encoder.embed_pixels(pixels), "image") if len(pixels) else ())
            for said, is_read in rest:
                yield next(indices), said, next(embeds) if is_read else None
            bar.update(len(rest))


__all__ = ["embed_pictures", "pixel_values"]
