"""What the demo's page shows: a picture's scores for labels, and where the model looks for one of them.

Errors are for the person at the page, and say what to do.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..common.loading import load_model, load_processor
from ..model.image_reading_diffclip import read_image
from ..visualization import (
    against_others,
    check_model,
    image_occlusion,
    image_relevance,
    overlay,
    shown_images,
    value_similarity,
)
from ..zero_shot import ZeroShotClassifier


MAX_LABELS = 100
MAX_LABEL_CHARACTERS, MAX_TEMPLATE_CHARACTERS = 10_000, 200
# Map → what the page calls it.
MAPS = {
    "occlusion": "What the score depends on",
    "values": "How much each place is like the label",
    "relevance": "Where attention goes",
}
# Those of all labels at once, each against the others; of the rest, a label's map is its own.
TOGETHER = ("occlusion", "values")
FUNCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "occlusion": image_occlusion,
    "values": value_similarity,
    "relevance": image_relevance,
}
# With more parameters than this, a CPU takes long for what runs 100 times.
MANY_PARAMETERS = 30_000_000
# An overlay is about this wide, in pixels.
OVERLAY_WIDTH = 480


@dataclass(frozen=True)
class Classified:
    """A picture's scores, and what an overlay needs.

    Attributes:
        model: The model's name.
        scores: Label → score in 0..1, the best first.
        template: What was filled with the labels.
        pixel_values: What the model saw, (1, 3, height, width).
        picture: The same part of the picture, larger, uint8, (height, width, 3).
        cut: The labels whose texts were longer than the model takes, and were cut.
        maps: What `draw_overlay` has computed of it, by map and label: (rows, columns).
    """

    model: str
    scores: dict[str, float]
    template: str
    pixel_values: torch.Tensor
    picture: np.ndarray
    cut: tuple[str, ...]
    maps: dict[tuple[str, str], np.ndarray] = field(default_factory=dict, compare=False, repr=False)


@functools.cache
def load_pair(name: str, device: str | torch.device) -> tuple[Any, Any]:
    """Return a model, float32, under `eager`, and its processor; each is loaded once.

    Raises:
        ValueError: There's no such model, it isn't a DiffCLIP or CLIP, or a part is missing or another model's.
    """
    model = load_model(name, dtype=torch.float32, attn_implementation="eager").to(device)
    check_model(model)
    return model, load_processor(name, model.config)


def read_picture(path: str | None) -> Image.Image:
    """Read a file as `read_image` does: upright, 8-bit RGB, with what is transparent over white.

    Raises:
        ValueError: There's no file, it isn't a picture or a damaged one, or its size isn't allowed.
        OSError: The file can't be read.
    """
    if path is None:
        raise ValueError("There is no picture yet: drop one on the field, or choose an example.")
    try:
        # As bytes, so that an error doesn't say where they lie.
        return read_image(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(str(error).replace("What is given as bytes", "The picture")) from error


def check_text(text: str, what: str, most: int) -> None:
    """Raise a ValueError for a text that is too long or holds half a character."""
    if len(text) > most:
        raise ValueError(f"The {what} has {len(text):,} characters; there may be up to {most:,}.")
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"The {what} has half a character, such as of an emoji that was cut in two; write it anew.")


def parse_labels(text: str) -> list[str]:
    """Split labels at commas and lines; spaces around them, empty ones and repetitions are dropped.

    Raises:
        ValueError: There's none, there are too many, or `check_text` refuses them.
    """
    check_text(text, "list of labels", MAX_LABEL_CHARACTERS)
    labels = list(dict.fromkeys(label for part in re.split(r"[,\n]", text) if (label := " ".join(part.split()))))
    if not labels:
        raise ValueError("There are no labels yet: write some, separated by commas or lines.")
    if len(labels) > MAX_LABELS:
        raise ValueError(f"There are {len(labels)} labels; there may be up to {MAX_LABELS}.")
    return labels


def check_template(template: str | None) -> str:
    """Return a template, `{}` where there's none.

    Raises:
        ValueError: It has no `{}` or other braces, which could fill any amount of memory, or is too long.
    """
    template = (template or "").strip() or "{}"
    check_text(template, "template", MAX_TEMPLATE_CHARACTERS)
    if "{}" not in template or re.search("[{}]", template.replace("{}", "")):
        raise ValueError(
            f"The template is {template!r:.200}; it must have {{}} where the label belongs, and no other braces."
        )
    return template


def enlarged_view(image: Image.Image, image_processor: Any, width: int = OVERLAY_WIDTH) -> np.ndarray:
    """Return the part of an image that the model sees, about `width` pixels wide, uint8, (height, width, 3)."""
    sizes = {"size": dict(image_processor.size)}
    if getattr(image_processor, "do_center_crop", False):
        sizes["crop_size"] = dict(image_processor.crop_size)
    factor = max(1, round(width / min(min(size.values()) for size in sizes.values())))
    scaled = {name: {side: factor * length for side, length in size.items()} for name, size in sizes.items()}
    return shown_images(image_processor([image], return_tensors="pt", **scaled)["pixel_values"], image_processor)[0]


def classify(
    path: str | None, labels: str, template: str | None, name: str, device: str | torch.device = "cpu"
) -> Classified:
    """Score labels for a picture, as `ZeroShotClassifier` does.

    Args:
        path: The picture's file.
        labels: Separated by commas or lines.
        template: With `{}` where the label belongs.
        name: A folder or an id on the Hub.
        device: Where the model runs.

    Raises:
        ValueError: An input can't be used; the message is for the person who gave it.
        OSError: The file can't be read.
    """
    image, found, template = read_picture(path), parse_labels(labels), check_template(template)
    model, processor = load_pair(name, device)
    tokenizer = processor.tokenizer
    lengths = [len(tokenizer(template.format(label), verbose=False)["input_ids"]) for label in found]
    cut = tuple(label for label, length in zip(found, lengths, strict=True) if length > tokenizer.model_max_length)
    result = ZeroShotClassifier(model, processor, found, template, progress_bar=False)(image)
    return Classified(
        model=name,
        scores={entry["label"]: entry["score"] for entry in result},
        template=template,
        pixel_values=processor.image_processor([image], return_tensors="pt")["pixel_values"],
        picture=enlarged_view(image, processor.image_processor),
        cut=cut,
    )


def default_map(name: str, device: str | torch.device = "cpu") -> str:
    """Return the map of a model that answers best in good time: occlusion, but for a large model on a CPU."""
    model, _ = load_pair(name, device)
    large = model.num_parameters() > MANY_PARAMETERS
    return "values" if large and torch.device(device).type == "cpu" else "occlusion"


def draw_overlay(
    classified: Classified, label: str, device: str | torch.device = "cpu", kind: str = "occlusion"
) -> np.ndarray:
    """Return the picture with what speaks for a label coloured, uint8, (height, width, 3).

    Args:
        classified: What `classify` gave.
        label: One of its labels.
        device: Where the model runs.
        kind: One of `MAPS`; those of `TOGETHER` are against the other labels, if there are any.
    """
    model, processor = load_pair(classified.model, device)
    if (kind, label) not in classified.maps:
        asked = list(classified.scores) if kind in TOGETHER else [label]
        texts = [classified.template.format(one) for one in asked]
        tokens = processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        maps = FUNCTIONS[kind](model, classified.pixel_values, tokens["input_ids"], tokens["attention_mask"])
        maps = against_others(maps) if len(asked) > 1 else maps
        classified.maps.update({(kind, one): maps[0, row] for row, one in enumerate(asked)})
    return overlay(classified.picture, classified.maps[kind, label])


__all__ = [
    "MAPS",
    "Classified",
    "check_template",
    "classify",
    "default_map",
    "draw_overlay",
    "enlarged_view",
    "load_pair",
    "parse_labels",
    "read_picture",
]
