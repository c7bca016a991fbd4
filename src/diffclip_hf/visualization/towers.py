"""A model's towers as relevance and attention maps need them: what they take, give and are."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from ..model.inputs_diffclip import check_input_ids, check_pixel_values, check_text_companion
from ..model.modeling_diffclip import DiffCLIPPreTrainedModel
from ..model.offloading_diffclip import check_has_weights, execution_device


# Tower → the names of its module and of its projection, in DiffCLIPModel and in CLIPModel.
TOWERS = {"image": ("vision_model", "visual_projection"), "text": ("text_model", "text_projection")}


def _check_runs(model: Any, needed: Sequence[str]) -> None:
    """Raise a ValueError where a model lacks a part, is in training mode or has no weights."""
    if missing := [name for name in needed if not hasattr(model, name)]:
        raise ValueError(f"model is a {type(model).__name__}, which has no {' and no '.join(missing)}.")
    if model.training:
        raise ValueError("model is in training mode; it must be in evaluation mode: call model.eval().")
    check_has_weights(model)


def check_encodes(model: PreTrainedModel) -> None:
    """Raise the ValueError of `image_occlusion` where a model can't be looked at from outside."""
    _check_runs(model, ("get_image_features", "get_text_features"))


def check_towers(model: PreTrainedModel) -> None:
    """Raise the ValueError of `value_similarity` where a model isn't built as CLIP is."""
    _check_runs(model, [*(name for names in TOWERS.values() for name in names), "logit_scale"])


def check_model(model: PreTrainedModel) -> None:
    """Raise the ValueError of `image_relevance` where a model can't be looked into as it is."""
    check_towers(model)
    if isinstance(model, DiffCLIPPreTrainedModel):
        return
    for module, _ in TOWERS.values():
        implementation = getattr(model, module).config._attn_implementation
        if implementation != "eager":
            raise ValueError(
                f"attn_implementation of {module} is {implementation!r}, which computes no maps; it must be 'eager': "
                "load with attn_implementation='eager', or call model.set_attn_implementation('eager')."
            )


def _check_batch(name: str, given: torch.Tensor, what: str) -> None:
    if not len(given):
        raise ValueError(f"{name} has shape {tuple(given.shape)}; there must be at least one {what}.")


def image_inputs(model: Any, pixel_values: torch.Tensor, interpolate_pos_encoding: bool) -> dict[str, Any]:
    check_pixel_values(pixel_values, model.config.vision_config.num_channels)
    _check_batch("pixel_values", pixel_values, "image")
    # A copy, since a tensor that was made in inference mode can't be in a graph.
    copy = pixel_values.detach().to(execution_device(model), model.dtype, copy=True)
    return {"pixel_values": copy, "interpolate_pos_encoding": interpolate_pos_encoding}


def text_inputs(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> dict[str, Any]:
    check_input_ids(input_ids, model.config.text_config.max_position_embeddings)
    if input_ids.ndim != 2:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}; it must be (texts, tokens): give one as input_ids[None]."
        )
    check_text_companion("attention_mask", attention_mask, input_ids)
    _check_batch("input_ids", input_ids, "text")
    mask = None if attention_mask is None else attention_mask.to(execution_device(model), copy=True)
    return {"input_ids": input_ids.to(execution_device(model), copy=True), "attention_mask": mask}


def encode(model: Any, tower: str, inputs: Mapping[str, Any], maps: bool = True) -> tuple[torch.Tensor, Any]:
    """Return a tower's normalised embeddings, float32, (batch, projection_dim), and its output, with maps or not."""
    module, projection = (getattr(model, name) for name in TOWERS[tower])
    outputs = module(**inputs, output_attentions=maps, return_dict=True)
    return normalize(projection(outputs.pooler_output).float(), dim=-1), outputs


def features(encoded: Any) -> torch.Tensor:
    """Return what `get_image_features` or `get_text_features` gave, L2-normalised, float32, (batch, width)."""
    return normalize(getattr(encoded, "pooler_output", encoded).float(), dim=-1)


def is_differential(model: Any, tower: str) -> bool:
    return getattr(getattr(model, TOWERS[tower][0]).config, "attention_type", "standard") == "differential"


def lambdas(model: Any, tower: str) -> list[torch.Tensor]:
    """Return λ of each layer, the first first; none in a standard tower."""
    modules: Iterable[Any] = getattr(model, TOWERS[tower][0]).modules()
    return [module.get_lambda().detach() for module in modules if hasattr(module, "get_lambda")]


def layer_index(layer: int, name: str, layers: int) -> int:
    if not isinstance(layer, int) or isinstance(layer, bool) or not -layers <= layer < layers:
        raise ValueError(f"{name} is {layer!r}; it must be from {-layers} to {layers - 1}.")
    return layer % layers


def grid(model: Any, pixel_values: torch.Tensor) -> tuple[int, int]:
    """Return how many patches an image has down and across."""
    patch_size = model.config.vision_config.patch_size
    return pixel_values.shape[-2] // patch_size, pixel_values.shape[-1] // patch_size


def as_array(given: Any) -> np.ndarray:
    """Return what a picture, a tensor or nested lists hold."""
    return given.detach().cpu().numpy() if isinstance(given, torch.Tensor) else np.asarray(given)


__all__ = [
    "TOWERS",
    "as_array",
    "check_encodes",
    "check_model",
    "check_towers",
    "encode",
    "features",
    "grid",
    "image_inputs",
    "is_differential",
    "lambdas",
    "layer_index",
    "text_inputs",
]
