"""Relevance of patches and tokens for a score.

How the signed map of differential attention enters relevance. The method of Chefer et al. takes from a layer the
matrix A by which values are mixed, A·v, and its gradient. In differential attention that matrix is M = A1 − λ·A2 of
each pair: the layer's output is M·v, and what comes after, the pair's RMSNorm among it, is part of the function whose
gradient is taken, as the output projection is for A. So a layer's relevance is the mean over pairs of (∂S/∂M)⁺ ⊙ M⁺,
with ∂S/∂M = ∂S/∂A1, since A1 enters M as it is. A is never negative, so for A this is the method's (∂S/∂A ⊙ A)⁺; of M
it counts the places that the layer looks at, M > 0, where looking raises the score. An entry below 0 is a place whose
content is taken away. That can raise a score too, where its gradient is negative, but for being the opposite of what
is asked for: it's the other object of a picture that is subtracted. Taking the two softmax maps as heads of their own
would count what both share, the noise that the subtraction removes. Where both maps are equal, and λ < 1, the
relevance is what the method gives for that one map.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn.functional import one_hot
from transformers import PreTrainedModel

from ..model.attention_diffclip import differential_attention_map
from ..model.offloading_diffclip import check_passes_gradients, logit_scale_factor
from .towers import (
    TOWERS,
    as_array,
    check_model,
    encode,
    grid,
    image_inputs,
    is_differential,
    lambdas,
    layer_index,
    text_inputs,
)


def image_relevance(
    model: PreTrainedModel,
    pixel_values: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    first_layer: int = 0,
    interpolate_pos_encoding: bool = False,
) -> np.ndarray:
    """Return how much each patch of an image adds to its score with a text: the class token's relevance.

    For every image and text, S = exp(logit_scale) · cosine similarity; from R = 1, each layer of the image tower adds
    Ā·R to R, with Ā the mean over heads of (∂S/∂A)⁺ ⊙ A, or over pairs of (∂S/∂M)⁺ ⊙ M⁺ with M = A1 − λ·A2 (see
    the module). The result is the class token's row of R, without its own column.

    Args:
        model: A `DiffCLIPModel`, or Transformers' `CLIPModel` with `attn_implementation="eager"`, in evaluation mode.
            Its parameters and their gradients stay as they are.
        pixel_values: (images, channels, height, width).
        input_ids, attention_mask: (texts, tokens).
        first_layer: The first layer that counts; -1 takes the last alone, as the authors' CLIP notebook does.
        interpolate_pos_encoding: As in the model.

    Returns:
        (images, texts, height / patch_size, width / patch_size), float32, not negative. Its scale depends on the
        model, so compare places in one map rather than two models' values.

    Raises:
        ValueError: The model is in training mode, under an implementation without maps, on the meta device or lacks a
            tower, or there's no such layer; and as the model raises.

    Source: Chefer et al. 2021, arXiv 2103.15679, equations 5 and 6; the authors' CLIP notebook.
    """
    images, texts = (pixel_values, interpolate_pos_encoding), (input_ids, attention_mask)
    rows = _pooled_relevance(model, "image", images, texts, first_layer)
    return rows[:, :, 1:].unflatten(-1, grid(model, pixel_values)).cpu().numpy()


def text_relevance(
    model: PreTrainedModel,
    pixel_values: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    first_layer: int = 0,
    interpolate_pos_encoding: bool = False,
) -> np.ndarray:
    """Return how much each token of a text adds to its score with an image: the end-of-text token's relevance.

    The method, arguments and errors are those of `image_relevance`, with the layers of the text tower.

    Returns:
        (images, texts, tokens), float32, not negative; 0 at the end-of-text token itself, whose own relevance isn't
        asked, as the class token's isn't, and after it, where it doesn't look. The start token, on which attention
        rests that goes nowhere else, often has much; `word_relevance` leaves it out.
    """
    images, texts = (pixel_values, interpolate_pos_encoding), (input_ids, attention_mask)
    return _pooled_relevance(model, "text", images, texts, first_layer).transpose(0, 1).cpu().numpy()


def word_relevance(tokenizer: Any, input_ids: torch.Tensor, relevance: np.ndarray) -> list[tuple[str, float]]:
    """Return a text's tokens as written, each with its relevance, without special tokens.

    Args:
        tokenizer: The model's, as `processor.tokenizer`.
        input_ids: Of one text, (tokens,).
        relevance: Its row of `text_relevance`, (tokens,).

    Raises:
        ValueError: They aren't of one text, or there isn't one value for each token.
    """
    input_ids, relevance = torch.as_tensor(input_ids), as_array(relevance)
    if input_ids.ndim != 1 or relevance.ndim != 1:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)} and relevance {relevance.shape}; both must be of one text, "
            "(tokens,)."
        )
    if len(input_ids) != len(relevance):
        raise ValueError(f"relevance has {len(relevance)} values for {len(input_ids)} tokens; it must have as many.")
    special = set(tokenizer.all_special_ids)
    return [
        (tokenizer.decode([token]).strip(), float(value))
        for token, value in zip(input_ids.tolist(), relevance, strict=True)
        if token not in special
    ]


@contextmanager
def _with_maps_in_graph(model: Any, tower: str) -> Iterator[None]:
    """Ask for the gradient of what a tower embeds, so that its maps are in a graph where its parameters are frozen."""
    embedding = getattr(model, TOWERS[tower][0]).get_input_embeddings()
    hook = embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
    try:
        with torch.enable_grad():
            yield
    finally:
        hook.remove()


def _pooled_relevance(
    model: Any,
    tower: str,
    images: tuple[torch.Tensor, bool],
    texts: tuple[torch.Tensor, torch.Tensor | None],
    first_layer: int,
) -> torch.Tensor:
    """Return the relevance of one tower's tokens for the token that it pools, 0 at that token itself.

    Args:
        model: Any that `check_model` takes.
        tower: Whose tokens.
        images: As `image_inputs` takes them.
        texts: As `text_inputs` takes them.
        first_layer: The first layer that counts.

    Returns:
        (batch of this tower, batch of the other, tokens), float32.
    """
    check_model(model)
    check_passes_gradients(model)
    with torch.inference_mode(False):
        inputs = {"image": image_inputs(model, *images), "text": text_inputs(model, *texts)}
        other = "text" if tower == "image" else "image"
        with torch.no_grad():
            others, _ = encode(model, other, inputs[other])
        with _with_maps_in_graph(model, tower):
            embeds, outputs = encode(model, tower, inputs[tower])
        if tower == "image":
            pooled = torch.zeros(len(embeds), dtype=torch.long, device=embeds.device)
        else:
            # By its state, so that the rule for which token is pooled stays the model's.
            is_end = (outputs.last_hidden_state == outputs.pooler_output[:, None]).all(-1)
            pooled = is_end.int().argmax(-1)
        rows = _roll_out(model, tower, embeds, others, outputs.attentions, pooled, first_layer)
        return rows.masked_fill(one_hot(pooled, rows.shape[-1]).bool()[:, None], 0)


def _roll_out(
    model: Any,
    tower: str,
    embeds: torch.Tensor,
    others: torch.Tensor,
    maps: Sequence[torch.Tensor],
    tokens: torch.Tensor,
    first_layer: int,
) -> torch.Tensor:
    """Return the rows of R that belong to one token of each example, (batch, others, tokens), float32.

    Args:
        embeds: The examples' embeddings, (batch, projection_dim), with the maps in their graph.
        others: The other tower's, (others, projection_dim).
        maps: Each layer's, (batch, num_heads, tokens, tokens).
        tokens: Which token of each example, (batch,).
    """
    first = layer_index(first_layer, "first_layer", len(maps))
    chosen = tuple(maps[first:])
    differential = is_differential(model, tower)
    weights = list(chosen)
    if differential:
        values = lambdas(model, tower)[first:]
        weights = [differential_attention_map(both, value) for both, value in zip(chosen, values, strict=True)]
    scale = logit_scale_factor(model).to(embeds.device)
    found = []
    for other in others.to(embeds.device):
        # A score depends on its own example's maps alone, so the sum's gradient is every score's.
        score = (scale * embeds @ other).sum()
        gradients: Any = [None]
        if score.requires_grad:
            gradients = torch.autograd.grad(score, chosen, retain_graph=True, allow_unused=True)
        if any(gradient is None for gradient in gradients):
            raise ValueError(
                "The model's layers pass no gradient on, as those with quantised activations don't; relevance needs a "
                "model that isn't quantised, or whose weights alone are."
            )
        # Only some rows of the product (1 + Ā_last)···(1 + Ā_first) are asked, so it is taken from its left end.
        row = one_hot(tokens, maps[0].shape[-1]).float()
        for weight, gradient in zip(reversed(weights), reversed(gradients), strict=True):
            if differential:
                # ∂S/∂M is ∂S/∂A1, of each pair's first head.
                gradient = gradient[:, 0::2]
            mean = (gradient.float().clamp(min=0) * weight.detach().float().clamp(min=0)).mean(1).to(row.device)
            row = row + torch.matmul(row[:, None], mean)[:, 0]
        found.append(row)
    return torch.stack(found, dim=1)


__all__ = [
    "image_relevance",
    "text_relevance",
    "word_relevance",
]
