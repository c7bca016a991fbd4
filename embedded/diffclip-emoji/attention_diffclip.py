"""Differential and standard attention as plain functions of tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from .blocked_attention_diffclip import (
    blocked_differential_attention,
    blocked_forward,
    has_small_maps,
    keeps_maps,
    kept_differential_attention,
    whole_bias,
)
from .precision_diffclip import at_least_float32


# The name of the Triton kernels, `kernels_diffclip`, which differential attention modules call themselves. What is
# registered serves the standard ones: under this name they and the masks are as under "sdpa".
FUSED_ATTENTION = "differential_triton"
AttentionInterface.register(FUSED_ATTENTION, ALL_ATTENTION_FUNCTIONS["sdpa"])
AttentionMaskInterface.register(FUSED_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def compute_lambda(
    lambda_q1: torch.Tensor,
    lambda_k1: torch.Tensor,
    lambda_q2: torch.Tensor,
    lambda_k2: torch.Tensor,
    lambda_init: float,
) -> torch.Tensor:
    """Return λ = exp(λ_q1 · λ_k1) − exp(λ_q2 · λ_k2) + λ_init, the weight of the second map.

    Args:
        lambda_q1, lambda_k1, lambda_q2, lambda_k2: Learned vectors, (head_dim,), any floating dtype.
        lambda_init: The layer's constant.

    Returns:
        A tensor without dimensions, in float32 or the vectors' dtype if that is wider, since exp magnifies rounding.

    Source: paper arXiv 2503.06626, section 3; one λ a layer, shared by its head pairs.
    """
    wide = at_least_float32(lambda_q1.dtype)
    first = torch.exp(torch.dot(lambda_q1.to(wide), lambda_k1.to(wide)))
    second = torch.exp(torch.dot(lambda_q2.to(wide), lambda_k2.to(wide)))
    return first - second + lambda_init


def differential_attention_map(attentions: torch.Tensor, lambda_value: torch.Tensor | float) -> torch.Tensor:
    """Combine the softmax maps of a layer into its differential maps, A1 − λ·A2.

    Args:
        attentions: Softmax maps as a model returns them, (batch, num_heads, query tokens, key tokens); maps 2i and
            2i+1 are the first and second of pair i.
        lambda_value: The layer's λ, for instance `attention_module.get_lambda()`.

    Returns:
        (batch, num_heads / 2, query tokens, key tokens), in the maps' dtype. Values may be negative; a row sums to
        1 − λ.

    Raises:
        ValueError: The number of heads is odd, or `attentions` hasn't four dimensions.

    Source: paper arXiv 2503.06626, section 3.
    """
    if attentions.ndim != 4 or attentions.shape[1] % 2 != 0:
        raise ValueError(
            f"attentions has shape {tuple(attentions.shape)}; it must be (batch, num_heads, tokens, tokens) with an "
            "even num_heads."
        )
    if isinstance(lambda_value, torch.Tensor):
        lambda_value = lambda_value.to(device=attentions.device, dtype=attentions.dtype)
    return attentions[:, 0::2] - lambda_value * attentions[:, 1::2]


def attention_maps(
    query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Return softmax(query · keyᵀ · scaling + mask), with the softmax in float32 or better.

    Args:
        query, key: (batch, num_heads, tokens, head_dim).
        attention_mask: Bool, true where a query attends to a key, or added to the scores, broadcastable to (batch,
            num_heads, tokens, tokens); or None.
        scaling: Factor on the scores, head_dim^-0.5.

    Returns:
        (batch, num_heads, tokens, tokens), in the query's dtype; every row sums to 1.
    """
    scores = torch.matmul(query * scaling, key.transpose(-1, -2))
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    return nn.functional.softmax(scores, dim=-1, dtype=at_least_float32(scores.dtype)).to(query.dtype)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Standard attention, softmax(q·kᵀ·scaling)·v, with the signature of Transformers' attention interface.

    Args:
        module: The attention module; dropout acts while it is in training.
        query, key, value: (batch, num_heads, tokens, head_dim).
        attention_mask: As in `attention_maps`.
        scaling: Factor on the scores.
        dropout: Probability with which an entry of the maps is dropped.

    Returns:
        The output, (batch, tokens, num_heads, head_dim), and the maps before dropout, (batch, num_heads, tokens,
        tokens).
    """
    maps = attention_maps(query, key, attention_mask, scaling)
    dropped = nn.functional.dropout(maps, p=dropout, training=module.training)
    return torch.matmul(dropped, value).transpose(1, 2).contiguous(), maps


def eager_differential_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    lambda_value: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Differential attention as the formula has it, (A1 − λ·A2)·v; the reference for every faster form.

    Args:
        module: The attention module; dropout acts while it is in training.
        query, key: (batch, num_heads, tokens, head_dim); heads 2i and 2i+1 make the two maps of pair i.
        value: (batch, num_heads / 2, tokens, 2 · head_dim).
        attention_mask: As in `attention_maps`.
        lambda_value: λ, without dimensions.
        scaling: Factor on the scores.
        dropout: Probability with which an entry of each map is dropped, before the subtraction.

    Returns:
        The output, (batch, tokens, num_heads / 2, 2 · head_dim), and the softmax maps before dropout,
        (batch, num_heads, tokens, tokens).

    Source: paper arXiv 2503.06626, section 3; the interleaved pairs are those of the released code.
    """
    maps = attention_maps(query, key, attention_mask, scaling)
    dropped = nn.functional.dropout(maps, p=dropout, training=module.training)
    output = torch.matmul(differential_attention_map(dropped, lambda_value), value)
    return output.transpose(1, 2).contiguous(), maps


def check_flash_attention(query: torch.Tensor, attn_implementation: str) -> None:
    """Raise a ValueError where FlashAttention can't compute attention, which it would say less clearly itself.

    Args:
        query: (batch, num_heads, tokens, head_dim).
        attn_implementation: The implementation's name; one that isn't FlashAttention passes.
    """
    if not is_flash_attention_requested(requested_attention_implementation=attn_implementation):
        return
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"attn_implementation is {attn_implementation!r} and the queries are {query.dtype}; it must be "
            "torch.float16 or torch.bfloat16: load with dtype=torch.bfloat16, use autocast, or take "
            "attn_implementation='sdpa'."
        )
    if query.shape[-1] > 256:
        raise ValueError(
            f"attn_implementation is {attn_implementation!r} and heads are {query.shape[-1]} wide; they must be at "
            "most 256 wide: take attn_implementation='sdpa'."
        )


def differential_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    lambda_value: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    attn_implementation: str = "eager",
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Differential attention under any implementation of Transformers' attention interface.

    `"sdpa"` is the fastest exact form: on the CPU block by block, in training the formula or kept maps where they are
    small enough (`has_small_maps`, `keeps_maps`); elsewhere, with dropout and in an exported graph, PyTorch's SDPA.

    The arguments and the output are those of `eager_differential_attention_forward`, but that a mask is what the
    implementation expects, and that `is_causal` says whether a query sees earlier tokens alone where no mask is given
    (None for the module's own); the maps are None for every implementation but `"eager"`.
    """
    is_causal = bool(module.is_causal if is_causal is None else is_causal)
    if attn_implementation == "eager":
        return eager_differential_attention_forward(
            module, query, key, value, attention_mask, lambda_value, scaling, dropout
        )
    # A graph that leaves PyTorch can't hold an operator of ours.
    leaves_pytorch = torch.compiler.is_exporting() or torch.jit.is_tracing()
    one_mask = attention_mask is None or attention_mask.shape[1] == 1
    on_cpu = query.device.type == "cpu" and not dropout and not leaves_pytorch and one_mask
    if attn_implementation == "sdpa" and on_cpu:
        return _on_cpu(module, query, key, value, attention_mask, lambda_value, scaling, is_causal), None
    return _from_attention_interface(
        module,
        query,
        key,
        value,
        attention_mask,
        lambda_value,
        scaling,
        dropout,
        attn_implementation,
        is_causal=is_causal,
        **kwargs,
    ), None


def _on_cpu(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    lambda_value: torch.Tensor,
    scaling: float,
    is_causal: bool,
) -> torch.Tensor:
    """Return differential attention in the fastest of the exact forms, all of which are the formula's steps.

    Without gradients it goes block by block, whose maps stay in the caches. With gradients small maps are left to
    autograd; larger ones are kept, too, where they are no larger than what else a transformer's block keeps, and else
    computed again, block by block.
    """
    arguments = (query, key, value, attention_mask, lambda_value, scaling, is_causal)
    # While compiling always the operator, since a choice by size would compile anew at the crossover.
    if torch.compiler.is_compiling():
        return blocked_differential_attention(*arguments)
    if not torch.is_grad_enabled():
        return blocked_forward(*arguments)
    if has_small_maps(query):
        bias = whole_bias(query, attention_mask, is_causal)
        return eager_differential_attention_forward(module, query, key, value, bias, lambda_value, scaling)[0]
    form = kept_differential_attention if keeps_maps(query) else blocked_differential_attention
    return form(*arguments)


def _from_attention_interface(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    lambda_value: torch.Tensor,
    scaling: float,
    dropout: float,
    attn_implementation: str,
    **kwargs: Any,
) -> torch.Tensor:
    """Return differential attention from an implementation that never sees the maps, A1·v − λ·(A2·v).

    Both heads of a pair have the pair's v. It is wider than their keys, which flash kernels don't take, so each half
    of v has its own call; flex_attention takes it whole.
    """
    check_flash_attention(query, attn_implementation)
    attention_interface: Callable = ALL_ATTENTION_FUNCTIONS[attn_implementation]
    width = value.shape[-1] if attn_implementation == "flex_attention" else query.shape[-1]
    heads = torch.cat(
        [
            attention_interface(
                module,
                query,
                key,
                part.repeat_interleave(2, dim=1),
                attention_mask,
                scaling=scaling,
                dropout=dropout,
                **kwargs,
            )[0]
            for part in value.split(width, dim=-1)
        ],
        dim=-1,
    )
    return heads[:, :, 0::2] - lambda_value.to(heads.dtype) * heads[:, :, 1::2]
