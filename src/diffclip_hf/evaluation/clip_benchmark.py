"""DiffCLIP, and Transformers' other CLIP-like models, for LAION's clip_benchmark.

    from clip_benchmark import cli
    from diffclip_hf.evaluation.clip_benchmark import register

    register()
    cli.main()  # with --model_type diffclip --model FOLDER_OR_ID --pretrained main

clip_benchmark asks a loader for three things: a model with `encode_image` and `encode_text`, which take tensors; a
transform of a Pillow image; and a tokenizer of texts.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedModel

from ..common.loading import check_device, load_model, load_processor
from ..model.image_reading_diffclip import to_rgb
from .encoder import check_clip_like, text_options


MODEL_TYPE = "diffclip"


class BenchmarkModel(nn.Module):
    """A model as clip_benchmark calls it.

    Args:
        model: Any of Transformers' with `get_image_features` and `get_text_features`.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        check_clip_like(model)
        # Transformers' types know nothing of what a model class has of its own.
        self.model: Any = model

    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return embeddings, (batch, width), not normalised, of `BenchmarkTransform`'s tensors stacked."""
        outputs = self.model.get_image_features(pixel_values=pixel_values.to(self.model.dtype), return_dict=True)
        return outputs.pooler_output

    def encode_text(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return embeddings, (batch, width), not normalised, of `BenchmarkTokenizer`'s ids.

        There is no mask, for the ids come alone: in a causal tower what is on the right of the end-of-text token,
        which is pooled, changes nothing.
        """
        return self.model.get_text_features(input_ids=input_ids, return_dict=True).pooler_output


class BenchmarkTransform:
    """Turns a Pillow image of any mode into float32 of (channels, height, width), by the model's image processor."""

    def __init__(self, image_processor: Any):
        self.image_processor = image_processor

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.image_processor(images=[to_rgb(image)], return_tensors="pt")["pixel_values"][0]


class BenchmarkTokenizer:
    """Turns texts into ids, int64, (texts, length), padded on the right to the model's full length."""

    def __init__(self, tokenizer: Any, options: dict[str, Any]):
        self.tokenizer, self.options = tokenizer, {**options, "padding": "max_length", "padding_side": "right"}

    def __call__(self, texts: str | Sequence[str]) -> torch.Tensor:
        return self.tokenizer([texts] if isinstance(texts, str) else list(texts), **self.options)["input_ids"]


def load_for_clip_benchmark(
    model_name: str,
    pretrained: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    device: str | torch.device = "cpu",
) -> tuple[BenchmarkModel, BenchmarkTransform, BenchmarkTokenizer]:
    """Return a model, its transform and its tokenizer, as clip_benchmark's `load_clip` does.

    Args:
        model_name: A folder or an id on the Hub.
        pretrained: The Hub's revision; of a folder `"main"`, for it has none.
        cache_dir: The Hub's cache, by default the client's own.
        device: Where the model goes, in float32.

    Raises:
        ValueError: There's no such device, model or revision, it gives no embeddings of images or texts, or weights or
            a part of the processor are missing or another model's.
    """
    # clip_benchmark's command always names one.
    options: dict[str, Any] = {"revision": None if pretrained == "main" else pretrained, "cache_dir": cache_dir}
    device = check_device(device)
    model = load_model(model_name, dtype=torch.float32, **options)
    processor = load_processor(model_name, model.config, **options)
    return (
        BenchmarkModel(model).to(device).eval(),
        BenchmarkTransform(processor.image_processor),
        BenchmarkTokenizer(processor.tokenizer, text_options(model, processor.tokenizer)),
    )


def register() -> None:
    """Make `load_for_clip_benchmark` one of clip_benchmark's loaders, under the model type `diffclip`.

    Raises:
        ImportError: clip_benchmark isn't installed.
    """
    try:
        from clip_benchmark import models
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} can't be imported; pip install clip-benchmark.") from error

    models.TYPE2FUNC[MODEL_TYPE] = load_for_clip_benchmark
    # The command line's choices.
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL_TYPE)


__all__ = [
    "BenchmarkModel",
    "BenchmarkTokenizer",
    "BenchmarkTransform",
    "load_for_clip_benchmark",
    "register",
]
