"""What the demo's page shows: a picture's scores for labels, and where the model looks for one of them.

Errors are for the person at the page, and say what to do.
"""

import functools
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from transformers import AutoModel, AutoProcessor

from .image_processing_pil_diffclip import to_rgb
from .visualization import check_model, image_relevance, overlay, shown_images
from .zero_shot import ZeroShotClassifier


MAX_MEGAPIXELS = 50
# The image processor enlarges the whole picture before it cuts the middle out.
MAX_ASPECT = 20
MAX_LABELS = 100
MAX_LABEL_CHARACTERS, MAX_TEMPLATE_CHARACTERS = 10_000, 200
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
    """

    model: str
    scores: dict[str, float]
    template: str
    pixel_values: torch.Tensor
    picture: np.ndarray
    cut: tuple[str, ...]


@functools.cache
def load_model(name: str, device: str) -> tuple[Any, Any]:
    """Return a model, float32, under `eager`, and its processor; each is loaded once.

    Raises:
        OSError: There's no such model, or it can't be read.
        ValueError: It isn't a DiffCLIP or CLIP.
    """
    model = AutoModel.from_pretrained(name, dtype=torch.float32, attn_implementation="eager").eval().to(device)
    check_model(model)
    return model, AutoProcessor.from_pretrained(name)


def read_picture(path: str | None) -> Image.Image:
    """Read a file: upright, 8-bit RGB, with what is transparent over white, as `to_rgb` does.

    Raises:
        ValueError: There's no file, it isn't a picture or a damaged one, or it has too many pixels.
    """
    if path is None:
        raise ValueError("There is no picture yet: drop one on the field, or choose an example.")
    too_large = f"pictures may have up to {MAX_MEGAPIXELS} megapixels. Make it smaller first."
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > MAX_MEGAPIXELS * 1_000_000:
                raise ValueError(f"it is {width}×{height}; {too_large}")
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise ValueError(f"it is {width}×{height}; a side may be up to {MAX_ASPECT} times the other.")
            return to_rgb(image)
    except UnidentifiedImageError as error:
        raise ValueError("The file is not a picture of a kind that can be read, such as PNG, JPEG or WebP.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"The picture can't be used: {too_large}") from error
    except ValueError as error:
        raise ValueError(f"The picture can't be used: {error}") from error
    # Of a damaged file Pillow and its plug-ins raise nearly anything.
    except Exception as error:
        raise ValueError(f"The picture is damaged and can't be read to its end: {error}.") from error


def parse_labels(text: str) -> list[str]:
    """Split labels at commas and lines; spaces around them, empty ones and repetitions are dropped.

    Raises:
        ValueError: There's none, or there are too many.
    """
    if len(text) > MAX_LABEL_CHARACTERS:
        raise ValueError(f"The labels have {len(text):,} characters; there may be up to {MAX_LABEL_CHARACTERS:,}.")
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
    if "{}" not in template or re.search("[{}]", template.replace("{}", "")):
        raise ValueError(
            f"The template is {template!r:.200}; it must have {{}} where the label belongs, and no braces else."
        )
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise ValueError(f"The template may have up to {MAX_TEMPLATE_CHARACTERS} characters.")
    return template


def enlarged_view(image: Image.Image, image_processor: Any) -> np.ndarray:
    """Return the part of an image that the model sees, larger by a whole number, uint8, (height, width, 3)."""
    sizes = {"size": dict(image_processor.size)}
    if getattr(image_processor, "do_center_crop", False):
        sizes["crop_size"] = dict(image_processor.crop_size)
    factor = max(1, round(OVERLAY_WIDTH / min(min(size.values()) for size in sizes.values())))
    scaled = {name: {side: factor * length for side, length in size.items()} for name, size in sizes.items()}
    return shown_images(image_processor([image], return_tensors="pt", **scaled)["pixel_values"], image_processor)[0]


def classify(path: str | None, labels: str, template: str | None, name: str, device: str = "cpu") -> Classified:
    """Score labels for a picture, as `ZeroShotClassifier` does.

    Args:
        path: The picture's file.
        labels: Separated by commas or lines.
        template: With `{}` where the label belongs.
        name: A folder or an id on the Hub.
        device: Where the model runs.

    Raises:
        ValueError: An input can't be used; the message is for the person who gave it.
        OSError: As `load_model` raises.
    """
    image, found, template = read_picture(path), parse_labels(labels), check_template(template)
    model, processor = load_model(name, device)
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


def draw_overlay(classified: Classified, label: str, device: str = "cpu") -> np.ndarray:
    """Return the picture with what speaks for a label coloured, uint8, (height, width, 3); see `image_relevance`."""
    model, processor = load_model(classified.model, device)
    tokens = processor.tokenizer([classified.template.format(label)], truncation=True, return_tensors="pt")
    relevance = image_relevance(model, classified.pixel_values, tokens["input_ids"], tokens["attention_mask"])
    return overlay(classified.picture, relevance[0, 0])


__all__ = ["Classified", "check_template", "classify", "draw_overlay", "load_model", "parse_labels", "read_picture"]
