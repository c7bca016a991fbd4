"""What each patch itself has of a text: its own values in the last layers, in one forward.

Attention mixes values of other patches into a patch's state, so that by the last layer a state no longer says what
lies in its place. Here every patch attends to itself alone: with the identity for A, or for M = A1 − λ·A2, a layer's
attention gives the patch's own values, through the pair's RMSNorm in differential attention, and through the output
projection. What the last layers give so is added up, without the states that they are added to in the model, and
embedded and compared as the class token is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from .towers import check_towers, encode, grid, image_inputs, layer_index, text_inputs


def value_similarity(
    model: Any,
    pixel_values: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    first_layer: int = -2,
    interpolate_pos_encoding: bool = False,
) -> np.ndarray:
    """Return how much more than the image's other patches each patch's own values are like a text.

    It needs one forward of an image, without gradients: a way between occlusion and relevance, for a large model on a
    CPU. It shows what of the text is in a place, not whether the score depends on it.

    Args:
        model, pixel_values, input_ids, attention_mask, interpolate_pos_encoding: As in `image_relevance`, of which any
            attention implementation will do.
        first_layer: The first layer whose values count; by default the last two layers' do.

    Returns:
        (images, texts, height / patch_size, width / patch_size), float32: the patch's cosine similarity less the mean
        of all patches.

    Raises:
        ValueError: The model is in training mode, on the meta device or lacks a tower, or there's no such layer; and
            as the model raises.

    Source: Zhou et al. 2022 (MaskCLIP), arXiv 2112.01071, section 3.2, for one layer of standard attention; the sum
    over layers as Li et al. 2023 (CLIP Surgery), arXiv 2304.05653, section 3.2.
    """
    check_towers(model)
    with torch.inference_mode():
        inputs = image_inputs(model, pixel_values, interpolate_pos_encoding)
        texts = encode(model, "text", text_inputs(model, input_ids, attention_mask), maps=False)[0]
        attentions = [module for module in model.vision_model.modules() if hasattr(module, "v_proj")]
        attentions = attentions[layer_index(first_layer, "first_layer", len(attentions)) :]
        with _kept_values(attentions) as values:
            encode(model, "image", inputs, maps=False)
        total = sum(_alone(attention, value) for attention, value in zip(attentions, values, strict=True))
        embeds = normalize(model.visual_projection(model.vision_model.post_layernorm(total)).float(), dim=-1)
        cosines = embeds[:, 1:] @ texts.t()
        maps = (cosines - cosines.mean(1, keepdim=True)).transpose(1, 2)
    return maps.unflatten(-1, grid(model, pixel_values)).cpu().numpy()


@contextmanager
def _kept_values(attentions: list[Any]) -> Iterator[list[torch.Tensor]]:
    """Keep what attentions' value projections give, (batch, tokens, hidden_size) each, in a forward in the context."""
    values: list[torch.Tensor] = []
    hooks = [one.v_proj.register_forward_hook(lambda *call: values.append(call[-1])) for one in attentions]
    try:
        yield values
    finally:
        for hook in hooks:
            hook.remove()


def _alone(attention: Any, values: torch.Tensor) -> torch.Tensor:
    """Return an attention's output where each token attends to itself alone, (batch, tokens, hidden_size)."""
    if hasattr(attention, "diff_norm"):
        pairs = values.unflatten(-1, (-1, 2 * attention.head_dim))
        values = attention.diff_norm(pairs, scale=1 - attention.lambda_init).flatten(-2)
    return attention.out_proj(values)


__all__ = ["value_similarity"]
