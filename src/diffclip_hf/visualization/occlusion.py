"""What a score depends on: how much of it is lost where a part of the picture is hidden.

Square windows slide over the grid of patches, and over its edges too, so that a patch at the edge is hidden as often
as another. What a patch counts is the mean, over the windows of a size that hide it, of what they cost the score, and
then the mean over the sizes. Nothing of the model is looked into, so any model that embeds images and texts will do;
in return the model runs once for each window.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import conv2d, interpolate, pad

from .towers import as_array, check_encodes, features, grid, image_inputs, text_inputs


FILLS = ("border", "mean", "blur")
# By default, the windows' sides as shares of the picture's shorter side.
WINDOW_SHARES = (1 / 2, 2 / 3)
# A window moves by as many patches as leave at most so many steps on its own length.
STEPS = 3


def image_occlusion(
    model: Any,
    pixel_values: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    windows: Sequence[int] | None = None,
    fill: str = "border",
    batch_size: int = 32,
    interpolate_pos_encoding: bool = False,
) -> np.ndarray:
    """Return how much of an image's score with each text is lost where a patch is hidden: what the score depends on.

    It needs a forward of the image tower for each window, 90 for 6 × 6 patches, 114 for 14 × 14. It doesn't show how
    the model comes to its score, and little of what the picture has twice.

    Args:
        model: One with `get_image_features` and `get_text_features`, as `DiffCLIPModel`, `CLIPModel` and `SiglipModel`
            have, in evaluation mode, under any attention implementation.
        pixel_values: (images, channels, height, width).
        input_ids, attention_mask: (texts, tokens).
        windows: The windows' sides, in patches; by default a half and two thirds of the image's shorter side.
        fill: What a window shows: "border", the median colour of the image's outermost pixels; "mean", the image's
            mean colour; "blur", the image, blurred until it shows no patch.
        batch_size: Images with a window that go through the model at once, on which memory depends.
        interpolate_pos_encoding: As in the model.

    Returns:
        (images, texts, height / patch_size, width / patch_size), float32: the cosine similarity lost. Above 0, what is
        there speaks for the text; below 0, against it, since hiding it raises the score.

    Raises:
        ValueError: The model is in training mode, on the meta device or lacks a part, or a window, `fill` or
            `batch_size` isn't one; and as the model raises.

    Source: Zeiler and Fergus 2014, arXiv 1311.2901, section 4.2, which hides behind grey.
    """
    check_encodes(model)
    if fill not in FILLS:
        raise ValueError(f"fill is {fill!r}; it must be one of {', '.join(map(repr, FILLS))}.")
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}; it must be a whole number of at least 1.")
    options = {"interpolate_pos_encoding": True} if interpolate_pos_encoding else {}
    with torch.inference_mode():
        images = image_inputs(model, pixel_values, interpolate_pos_encoding)["pixel_values"]
        masks = window_masks(*grid(model, images), windows)
        texts = features(model.get_text_features(**text_inputs(model, input_ids, attention_mask)))

        def score(batch: torch.Tensor) -> torch.Tensor:
            embeds = features(model.get_image_features(pixel_values=batch, **options))
            return embeds @ texts.to(embeds.device).t()

        maps = [score_lost(score, image, masks, fill, batch_size) for image in images]
        return torch.stack(maps).cpu().numpy()


def against_others(maps: np.ndarray, weight: float = 0.5) -> np.ndarray:
    """Return what speaks for each text rather than for the others: its map less a part of the others' mean map.

    The maps are linear in the score, so these are the maps of a score less the weighted mean of the other texts'.

    Args:
        maps: Of `image_occlusion` or `value_similarity`, (images, texts, rows, columns), of two texts or more.
        weight: How much of the others' mean is taken away. 1 points best where the other things are in the image too,
            and 0 where they aren't; one half loses little of either.

    Raises:
        ValueError: They're of another shape, or of one text.
    """
    maps = as_array(maps)
    if maps.ndim != 4 or maps.shape[1] < 2:
        raise ValueError(
            f"maps is of shape {maps.shape}; it must be (images, texts, rows, columns), of at least two texts."
        )
    others = (maps.sum(1, keepdims=True) - maps) / (maps.shape[1] - 1)
    return maps - weight * others


def score_lost(
    score: Callable[[torch.Tensor], torch.Tensor],
    image: torch.Tensor,
    masks: Sequence[torch.Tensor],
    fill: str,
    batch_size: int,
) -> torch.Tensor:
    """Return what an image's scores lose where each patch is hidden, (texts, rows, columns), float32.

    Args:
        score: Images, (batch, channels, height, width), to their scores, (batch, texts).
        image: (channels, height, width).
        masks: As `window_masks` gives them.
        fill: One of `FILLS`.
        batch_size: How many windows at once.
    """
    ground = fill_of(image, fill, image.shape[-1] // masks[0].shape[-1])
    seen = score(image[None])
    sizes: list[Any] = []
    for of_a_size in masks:
        lost: Any = 0
        for some in of_a_size.to(image.device).split(batch_size):
            hidden = interpolate(some[:, None].float(), image.shape[-2:]).bool()
            costs = seen - score(torch.where(hidden, ground, image))
            lost = lost + torch.einsum("wt,wrc->trc", costs, some.to(costs))
        sizes.append(lost / of_a_size.sum(0).to(lost))
    return torch.stack(sizes).mean(0)


def window_masks(rows: int, columns: int, windows: Sequence[int] | None) -> list[torch.Tensor]:
    """Return for each size what each window hides, (windows, rows, columns), bool; every patch is hidden by some.

    Raises:
        ValueError: There's no window, or one isn't a whole number from 1 to the longer side.
    """
    if windows is None:
        windows = sorted({max(1, round(share * min(rows, columns))) for share in WINDOW_SHARES})
    most = max(rows, columns)
    if not isinstance(windows, Sequence) or not windows or any(side not in range(1, most + 1) for side in windows):
        raise ValueError(f"windows is {windows!r}; it must hold sides in patches, from 1 to {most}.")
    sizes = []
    for side in windows:
        step = -(-side // STEPS)
        masks = []
        for top in range(1 - side, rows, step):
            for left in range(1 - side, columns, step):
                mask = torch.zeros(rows, columns, dtype=torch.bool)
                mask[max(top, 0) : top + side, max(left, 0) : left + side] = True
                masks.append(mask)
        sizes.append(torch.stack(masks))
    return sizes


def fill_of(image: torch.Tensor, fill: str, patch_size: int) -> torch.Tensor:
    """Return what windows show instead of an image, (channels, height, width) or (channels, 1, 1); see `FILLS`."""
    if fill == "mean":
        return image.mean((1, 2), keepdim=True)
    if fill == "border":
        outermost = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], dim=1)
        return outermost.median(1).values[:, None, None]
    # Gaussian, with a patch as its standard deviation.
    reach = torch.arange(-3 * patch_size, 3 * patch_size + 1, device=image.device)
    weights = torch.exp(-((reach / patch_size) ** 2) / 2)
    weights = (weights / weights.sum()).to(image.dtype)
    wide = pad(image[:, None], [3 * patch_size] * 4, mode="replicate")
    return conv2d(conv2d(wide, weights[None, None, :, None]), weights[None, None, None])[:, 0]


__all__ = ["against_others", "image_occlusion"]
