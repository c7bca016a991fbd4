"""Pictures of relevance, attention maps and λ."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ..common.commands import require_extra
from ..model.inputs_diffclip import check_pixel_values
from .towers import TOWERS, as_array


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of matplotlib; the signed one is white in the middle. Strong colours are dark, so pictures under them are faded.
POSITIVE_COLOURS, SIGNED_COLOURS = "YlOrRd", "RdBu_r"
FADING = 0.4
# How much of the picture the strongest colour of an overlay covers.
OPACITY = 0.85
# In inches and points: what a telephone still shows large enough to read.
WIDEST, FONT_SIZE = 5.2, 12
# Of λ's lines, as in `docs/comparison`.
LINE_COLOURS = ("#c0392b", "#0072b2", "#e69f00", "#777777")


def shown_images(pixel_values: torch.Tensor, image_processor: Any) -> np.ndarray:
    """Return what the model sees as pictures, by undoing the image processor's normalisation.

    Args:
        pixel_values: (images, 3, height, width).
        image_processor: The model's, as `processor.image_processor`, with `image_mean` and `image_std`.

    Returns:
        (images, height, width, 3), uint8.

    Raises:
        TypeError, ValueError: `pixel_values` isn't such a tensor, or `image_processor` none with these.
    """
    check_pixel_values(pixel_values, 3)
    if not hasattr(image_processor, "image_mean") or not hasattr(image_processor, "image_std"):
        raise ValueError(
            f"image_processor is a {type(image_processor).__name__}, which has no image_mean and image_std; give the "
            "model's image processor, processor.image_processor."
        )
    mean = torch.tensor(image_processor.image_mean)[:, None, None]
    std = torch.tensor(image_processor.image_std)[:, None, None]
    pictures = (pixel_values.detach().cpu().float() * std + mean).clamp(0, 1) * 255
    return pictures.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def overlay(image: np.ndarray, values: np.ndarray, *, signed: bool = False) -> np.ndarray:
    """Lay a map of patches as colours, the stronger the larger, over a picture, in grey and faded.

    Args:
        image: (height, width, 3), uint8.
        values: (rows, columns), any range; enlarged bilinearly to the image. The largest magnitude has the strongest
            colour.
        signed: Whether 0 stays clear and negative values are blue and positive ones red; otherwise negative values
            stay clear.

    Returns:
        (height, width, 3), uint8.

    Raises:
        ValueError: An argument has another shape, or a value isn't finite.
        ImportError: matplotlib, of the extra `plotting`, is missing.
    """
    require_extra("plotting", "matplotlib")
    import matplotlib

    image, values = as_array(image), as_array(values)
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image is {image.dtype} of shape {image.shape}; it must be uint8, (height, width, 3).")
    if values.ndim != 2 or not np.isfinite(values).all():
        raise ValueError(f"values is of shape {values.shape}; it must be (rows, columns), all finite.")
    size = (image.shape[1], image.shape[0])
    large = np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    limit = np.abs(values).max() if signed else values.max()
    scaled = np.clip(large / limit, -1 if signed else 0, 1) if limit > 0 else np.zeros_like(large)
    colours = matplotlib.colormaps[SIGNED_COLOURS if signed else POSITIVE_COLOURS]
    heat = colours(0.5 + scaled / 2 if signed else scaled)[..., :3]
    opacity = OPACITY * np.abs(scaled)[..., None]
    grey = np.asarray(Image.fromarray(image).convert("L"), dtype=np.float32)[..., None] / 255
    faded = FADING + (1 - FADING) * grey
    return np.round(255 * (opacity * heat + (1 - opacity) * faded)).astype(np.uint8)


def draw_grid(
    images: Sequence[np.ndarray],
    values: np.ndarray,
    queries: Sequence[str],
    models: Sequence[str],
    *,
    signed: bool = False,
) -> "Figure":
    """Draw queries × models: each row an image and where each model looks in it for the row's text.

    Args:
        images: Each row's picture, (height, width, 3), uint8.
        values: (rows, models, grid rows, grid columns); each map has colours of its own scale, as in `overlay`.
        queries: Each row's text, written below its image.
        models: Each column's title.
        signed: As in `overlay`.

    Raises:
        ValueError: The numbers of images, queries and models aren't those of `values`; and as `overlay` raises.

    Source: the layout of paper arXiv 2503.06626, figure 2.
    """
    images, values = [as_array(image) for image in images], as_array(values)
    if (
        not images
        or values.ndim != 4
        or values.shape[:2] != (len(queries), len(models))
        or len(images) != len(queries)
    ):
        raise ValueError(
            f"values is of shape {values.shape}, with {len(images)} images, {len(queries)} queries and {len(models)} "
            "models; it must be (queries, models, rows, columns), with an image for each query."
        )
    aspect = images[0].shape[1] / images[0].shape[0]
    width = min(2.3 * aspect, WIDEST / (len(models) + 1))
    figure = _figure((width * (len(models) + 1), 0.4 + (width / aspect + 0.3) * len(queries)))
    axes = figure.subplots(len(queries), len(models) + 1, squeeze=False)
    for title, axis in zip(("image", *models), axes[0], strict=True):
        axis.set_title(title, fontsize=FONT_SIZE)
    for image, row, query, line in zip(images, values, queries, axes, strict=True):
        line[0].set_xlabel(query, fontsize=FONT_SIZE)
        line[0].imshow(image)
        for axis, relevance in zip(line[1:], row, strict=True):
            axis.imshow(overlay(image, relevance, signed=signed))
        for axis in line:
            _without_ticks(axis)
    return figure


def draw_maps(maps: Sequence[np.ndarray], titles: Sequence[str]) -> "Figure":
    """Draw maps side by side in signed colours, all on one scale centred on zero.

    Args:
        maps: Each (rows, columns): a map of all tokens, or the class token's over the patches.
        titles: Each map's.

    Raises:
        ValueError: There's no map, one has another shape, or there isn't a title for each.
    """
    maps = [as_array(one) for one in maps]
    if not maps or len(maps) != len(titles):
        raise ValueError(f"maps has {len(maps)} and titles {len(titles)}; both must have one for each map.")
    if wrong := [one.shape for one in maps if one.ndim != 2 or not one.size]:
        raise ValueError(f"maps has one of shape {wrong[0]}; each must be (rows, columns).")
    # With every value 0, any scale shows it.
    limit = max(float(np.abs(one).max()) for one in maps) or 1.0
    tallest = max(len(one) / one.shape[1] for one in maps)
    width = min(2.7, (WIDEST - 0.6) / len(maps))
    figure = _figure((0.9 + width * len(maps), 0.5 + width * tallest))
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    for axis, one, title in zip(axes, maps, titles, strict=True):
        drawn = axis.imshow(one, cmap=SIGNED_COLOURS, vmin=-limit, vmax=limit)
        axis.set_title(title, fontsize=FONT_SIZE)
        _without_ticks(axis)
    figure.colorbar(drawn, ax=list(axes), shrink=0.85)
    return figure


def draw_words(texts: Sequence[Sequence[tuple[str, float]]], titles: Sequence[str]) -> "Figure":
    """Draw texts with each token on a colour as strong as its share of the text's largest value.

    Args:
        texts: Each text's tokens and values, as `word_relevance` gives them; values aren't negative.
        titles: Each text's, written before it.

    Raises:
        ValueError: There's no text, one has no token, or there isn't a title for each.
    """
    if not texts or len(texts) != len(titles) or not all(texts):
        raise ValueError(
            f"texts has {len(texts)} texts of {[len(text) for text in texts]} tokens and titles {len(titles)}; each "
            "text must have tokens and a title."
        )
    from matplotlib.patches import Rectangle

    # In a monospaced font, so that a token's width is known; all is in its characters.
    margin = max(len(title) for title in titles) + 2
    width = margin + max(sum(len(token) + 2 for token, _ in text) for text in texts)
    figure = _figure((0.098 * width + 0.2, 0.36 * len(texts) + 0.2))
    axis = figure.subplots()
    axis.set(xlim=(0, width), ylim=(len(texts), 0))
    axis.axis("off")
    font: dict[str, Any] = {"family": "monospace", "fontsize": 11, "va": "center"}
    for line, (text, title) in enumerate(zip(texts, titles, strict=True)):
        axis.text(0, line + 0.5, title, color="0.35", **font)
        largest = max(value for _, value in text) or 1.0
        left = margin
        for token, value in text:
            colour = (0.84, 0.15, 0.16, OPACITY * value / largest)
            axis.add_patch(Rectangle((left, line + 0.12), len(token) + 1.6, 0.76, facecolor=colour, edgecolor="none"))
            axis.text(left + 0.8 + len(token) / 2, line + 0.5, token, ha="center", **font)
            left += len(token) + 2
    return figure


def draw_lambdas(models: Mapping[str, Mapping[str, np.ndarray]]) -> "Figure":
    """Draw λ over depth, a line for each model and a plot for each tower.

    Args:
        models: Name → what `lambda_values` gives of it.

    Raises:
        ValueError: No model has a differential tower.
    """
    towers = [tower for tower in TOWERS if any(tower in values for values in models.values())]
    if not towers:
        raise ValueError(f"models has {list(models)}, none with a differential tower; at least one must have one.")
    figure = _figure((WIDEST, 3))
    axes = figure.subplots(1, len(towers), squeeze=False, sharey=True)[0]
    for axis, tower in zip(axes, towers, strict=True):
        for number, (name, values) in enumerate(models.items()):
            if tower in values:
                depth = range(1, len(values[tower]) + 1)
                axis.plot(depth, values[tower], "o-", color=LINE_COLOURS[number % 4], label=name, markersize=5)
        axis.set_xlabel("layer", fontsize=FONT_SIZE)
        axis.set_title(f"{tower} tower", fontsize=FONT_SIZE)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    axes[0].set_ylabel("λ", fontsize=FONT_SIZE)
    return figure


def _figure(size: tuple[float, float]) -> "Figure":
    """Return a figure that belongs to no global state, as pyplot's do."""
    require_extra("plotting", "matplotlib")
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _without_ticks(axis: "Axes") -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)


__all__ = [
    "draw_grid",
    "draw_lambdas",
    "draw_maps",
    "draw_words",
    "overlay",
    "shown_images",
]
