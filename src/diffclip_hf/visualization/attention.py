"""Attention maps, and λ, of a model's layers."""

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..model.attention_diffclip import differential_attention_map
from ..model.offloading_diffclip import check_has_weights
from .towers import TOWERS, check_model, encode, grid, image_inputs, is_differential, lambdas, layer_index, text_inputs


KINDS = ("first", "second", "difference")


def attention_maps(
    model: PreTrainedModel,
    *,
    pixel_values: torch.Tensor | None = None,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    layer: int = -1,
    kind: str = "difference",
    pair: int | None = None,
    interpolate_pos_encoding: bool = False,
) -> np.ndarray:
    """Return a layer's attention maps of images or of texts.

    Args:
        model, interpolate_pos_encoding: As in `image_relevance`.
        pixel_values: Images, (batch, channels, height, width); either these or texts.
        input_ids, attention_mask: Texts, (batch, tokens).
        layer: Which layer; negative counts from the last.
        kind: "first" for A1, "second" for A2, "difference" for A1 − λ·A2. In standard attention a pair is one head,
            and "first" and "difference" are its map.
        pair: Which pair of heads, or None for the mean over all.

    Returns:
        (batch, query tokens, key tokens), float32. Rows of A1 and A2 sum to 1, those of the difference to 1 − λ.

    Raises:
        ValueError: Both images and texts are given or neither; there's no such layer, kind or pair; "second" is asked
            of a standard tower; and as `image_relevance` raises.
    """
    check_model(model)
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(map(repr, KINDS))}.")
    if pixel_values is not None and input_ids is None:
        tower, inputs = "image", image_inputs(model, pixel_values, interpolate_pos_encoding)
    elif input_ids is not None and pixel_values is None:
        tower, inputs = "text", text_inputs(model, input_ids, attention_mask)
    else:
        raise ValueError("Either pixel_values or input_ids must be given, and not both.")
    differential = is_differential(model, tower)
    if kind == "second" and not differential:
        raise ValueError(f"kind is 'second', but attention of the {tower} tower is standard; it must be 'first'.")
    with torch.no_grad():
        _, outputs = encode(model, tower, inputs)
    maps = outputs.attentions[layer_index(layer, "layer", len(outputs.attentions))].float()
    if differential and kind == "difference":
        maps = differential_attention_map(maps, lambdas(model, tower)[layer])
    elif differential:
        maps = maps[:, KINDS.index(kind) :: 2]
    if pair is None:
        return maps.mean(1).cpu().numpy()
    if not isinstance(pair, int) or not 0 <= pair < maps.shape[1]:
        raise ValueError(f"pair is {pair!r}; it must be from 0 to {maps.shape[1] - 1}, or None for the mean.")
    return maps[:, pair].cpu().numpy()


def class_attention(model: PreTrainedModel, pixel_values: torch.Tensor, **options: Any) -> np.ndarray:
    """Return how much the class token attends to each patch, whatever the text.

    Args:
        model, pixel_values: As in `image_relevance`.
        options: `layer`, `kind`, `pair` and `interpolate_pos_encoding` of `attention_maps`, whose errors these are.

    Returns:
        (images, height / patch_size, width / patch_size), float32; a difference may be negative.
    """
    maps = attention_maps(model, pixel_values=pixel_values, **options)
    return maps[:, 0, 1:].reshape(-1, *grid(model, pixel_values))


def lambda_values(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """Return λ of each layer of each differential tower, {"image": (layers,), "text": (layers,)}, float32.

    Args:
        model: One with both towers or one of them as `vision_model` and `text_model`; a standard tower has no λ.

    Raises:
        ValueError: It has neither, or is on the meta device.
    """
    towers = [tower for tower, (module, _) in TOWERS.items() if hasattr(model, module)]
    if not towers:
        raise ValueError(f"model is a {type(model).__name__}, which has no vision_model and no text_model.")
    check_has_weights(model)
    found = {tower: lambdas(model, tower) for tower in towers}
    return {tower: torch.stack(values).cpu().numpy() for tower, values in found.items() if values}


__all__ = [
    "attention_maps",
    "class_attention",
    "lambda_values",
]
