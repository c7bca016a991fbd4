"""Differential attention with its norm as fused Triton kernels, forward and backward.

The plain form, which every number here is held to, is `eager_differential_attention_forward` with `DiffCLIPRMSNorm`.
Both softmaxes are computed online, so that no map is ever stored (FlashAttention-2, Dao 2023, for one map; paper arXiv
2503.06626, section 3, for the difference of two).
"""

# Annotations stay text, so that the kernels can be defined, though not run, where Triton is missing.
from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


MAX_HEAD_DIM = 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The name of this module is part of the operators': a copy that travels with a checkpoint may be loaded beside the
# package, and two definitions of one operator clash.
_NAMESPACE = re.sub(r"\W", "_", __name__)


def _jit(function: Callable) -> Any:
    return function if triton is None else triton.jit(function)


@_jit
def _dot(a, b, widen: tl.constexpr):
    """a · b with sums in float32; "ieee" keeps float32 operands from being cut to TF32."""
    if widen:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@_jit
def _load_rows(start, rows, columns, row_stride, column_stride, num_rows, num_columns):
    """A tile with zeros beyond the tensor's end."""
    return tl.load(
        start + rows[:, None] * row_stride + columns[None, :] * column_stride,
        mask=(rows < num_rows)[:, None] & (columns < num_columns)[None, :],
        other=0.0,
    )


@_jit
def _store_rows(start, tile, rows, columns, row_stride, column_stride, num_rows, num_columns):
    tl.store(
        start + rows[:, None] * row_stride + columns[None, :] * column_stride,
        tile.to(start.dtype.element_ty),
        mask=(rows < num_rows)[:, None] & (columns < num_columns)[None, :],
    )


@_jit
def _may_attend(mask, mask_strides, batch, queries, keys, tokens, has_mask: tl.constexpr, is_causal: tl.constexpr):
    """Which of a tile's queries may see which of its keys; mask is None without has_mask."""
    allowed = (queries >= 0)[:, None] & (keys < tokens)[None, :]
    if is_causal:
        allowed = allowed & (queries[:, None] >= keys[None, :])
    if has_mask:
        offsets = queries[:, None] * mask_strides[2] + keys[None, :] * mask_strides[3]
        inside = (queries < tokens)[:, None] & (keys < tokens)[None, :]
        allowed = allowed & (tl.load(mask + batch * mask_strides[0] + offsets, mask=inside, other=0) != 0)
    return allowed


@_jit
def _online_softmax(scores, maximum, total, accumulated, value, widen: tl.constexpr):
    """Add a tile of keys to a head's running maximum, sum of exponentials and weighted sum of values."""
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    # A row that has seen no key yet has -inf, from which nothing may be subtracted.
    shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(maximum - shift)
    total = total * decay + tl.sum(weights, 1)
    accumulated = accumulated * decay[:, None] + _dot(weights.to(value.dtype), value, widen)
    return new_maximum, total, accumulated


@_jit
def _forward_kernel(
    query,
    key,
    value,
    mask,
    lambda_value,
    norm_weight,
    output,
    difference,
    second_output,
    logsumexp,
    query_strides,
    key_strides,
    value_strides,
    mask_strides,
    tokens,
    pairs,
    scaling,
    norm_eps,
    output_scale,
    head_dim: tl.constexpr,
    block_dim: tl.constexpr,
    block_queries: tl.constexpr,
    block_keys: tl.constexpr,
    has_mask: tl.constexpr,
    is_causal: tl.constexpr,
    save: tl.constexpr,
    widen: tl.constexpr,
):
    """One program per block of queries of one pair: both softmaxes, the subtraction and the norm."""
    blocks = tl.cdiv(tokens, block_queries)
    pair = tl.program_id(0) // blocks % pairs
    batch = (tl.program_id(0) // blocks // pairs).to(tl.int64)
    first_query = tl.program_id(0) % blocks * block_queries
    queries = first_query + tl.arange(0, block_queries)
    dims = tl.arange(0, block_dim)
    value_dims = tl.arange(0, 2 * block_dim)

    query += batch * query_strides[0] + 2 * pair * query_strides[1]
    key += batch * key_strides[0] + 2 * pair * key_strides[1]
    value += batch * value_strides[0] + pair * value_strides[1]
    query1 = _load_rows(query, queries, dims, query_strides[2], query_strides[3], tokens, head_dim)
    query2 = _load_rows(query + query_strides[1], queries, dims, query_strides[2], query_strides[3], tokens, head_dim)

    maximum1 = tl.full((block_queries,), float("-inf"), tl.float32)
    maximum2 = tl.full((block_queries,), float("-inf"), tl.float32)
    total1 = tl.zeros((block_queries,), tl.float32)
    total2 = tl.zeros((block_queries,), tl.float32)
    output1 = tl.zeros((block_queries, 2 * block_dim), tl.float32)
    output2 = tl.zeros((block_queries, 2 * block_dim), tl.float32)

    last_key = tl.minimum(tokens, first_query + block_queries) if is_causal else tokens
    for first_key in range(0, last_key, block_keys):
        keys = first_key + tl.arange(0, block_keys)
        allowed = _may_attend(mask, mask_strides, batch, queries, keys, tokens, has_mask, is_causal)
        # Loaded once for both maps.
        values = _load_rows(value, keys, value_dims, value_strides[2], value_strides[3], tokens, 2 * head_dim)

        keys1 = _load_rows(key, keys, dims, key_strides[2], key_strides[3], tokens, head_dim)
        scores = tl.where(allowed, _dot(query1, tl.trans(keys1), widen) * scaling, float("-inf"))
        maximum1, total1, output1 = _online_softmax(scores, maximum1, total1, output1, values, widen)

        keys2 = _load_rows(key + key_strides[1], keys, dims, key_strides[2], key_strides[3], tokens, head_dim)
        scores = tl.where(allowed, _dot(query2, tl.trans(keys2), widen) * scaling, float("-inf"))
        maximum2, total2, output2 = _online_softmax(scores, maximum2, total2, output2, values, widen)

    # A row that sees no key has a sum of zero and the output zero.
    total1 = tl.where(total1 == 0.0, 1.0, total1)
    total2 = tl.where(total2 == 0.0, 1.0, total2)
    output2 = output2 / total2[:, None]
    combined = output1 / total1[:, None] - tl.load(lambda_value) * output2

    weight = tl.load(norm_weight + value_dims, mask=value_dims < 2 * head_dim, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(combined * combined, 1) / (2 * head_dim) + norm_eps) * output_scale
    start = (batch * tokens * pairs + pair) * 2 * head_dim
    stride = pairs * 2 * head_dim
    normed = combined * scale[:, None] * weight[None, :]
    _store_rows(output + start, normed, queries, value_dims, stride, 1, tokens, 2 * head_dim)
    if save:
        _store_rows(difference + start, combined, queries, value_dims, stride, 1, tokens, 2 * head_dim)
        _store_rows(second_output + start, output2, queries, value_dims, stride, 1, tokens, 2 * head_dim)
        logsumexp += (batch * pairs + pair) * 2 * tokens
        maximum1 = tl.where(maximum1 == float("-inf"), 0.0, maximum1)
        maximum2 = tl.where(maximum2 == float("-inf"), 0.0, maximum2)
        tl.store(logsumexp + queries, maximum1 + tl.log2(total1), mask=queries < tokens)
        tl.store(logsumexp + tokens + queries, maximum2 + tl.log2(total2), mask=queries < tokens)


@_jit
def _backward_query_kernel(
    query,
    key,
    value,
    mask,
    lambda_value,
    norm_weight,
    difference,
    second_output,
    logsumexp,
    grad_output,
    grad_query,
    grad_difference,
    delta,
    grad_weight_parts,
    query_strides,
    key_strides,
    value_strides,
    mask_strides,
    grad_query_strides,
    tokens,
    pairs,
    scaling,
    score_scaling,
    norm_eps,
    output_scale,
    head_dim: tl.constexpr,
    block_dim: tl.constexpr,
    block_queries: tl.constexpr,
    block_keys: tl.constexpr,
    has_mask: tl.constexpr,
    is_causal: tl.constexpr,
    widen: tl.constexpr,
):
    """One program per block of queries of one pair: back through the norm, then the queries' gradient.

    It leaves the difference's gradient and the rows' sums of gradient times output for the kernel of the keys.
    """
    blocks = tl.cdiv(tokens, block_queries)
    pair = tl.program_id(0) // blocks % pairs
    batch = (tl.program_id(0) // blocks // pairs).to(tl.int64)
    first_query = tl.program_id(0) % blocks * block_queries
    queries = first_query + tl.arange(0, block_queries)
    dims = tl.arange(0, block_dim)
    value_dims = tl.arange(0, 2 * block_dim)
    lam = tl.load(lambda_value)

    start = (batch * tokens * pairs + pair) * 2 * head_dim
    stride = pairs * 2 * head_dim
    combined = _load_rows(difference + start, queries, value_dims, stride, 1, tokens, 2 * head_dim).to(tl.float32)
    output2 = _load_rows(second_output + start, queries, value_dims, stride, 1, tokens, 2 * head_dim).to(tl.float32)
    grad = _load_rows(grad_output + start, queries, value_dims, stride, 1, tokens, 2 * head_dim).to(tl.float32)
    weight = tl.load(norm_weight + value_dims, mask=value_dims < 2 * head_dim, other=0.0).to(tl.float32)

    inverse_rms = tl.rsqrt(tl.sum(combined * combined, 1) / (2 * head_dim) + norm_eps)
    normed = combined * inverse_rms[:, None]
    grad = grad * output_scale
    # One row per program, summed afterwards: atomics would make the sum depend on the order of the programs.
    tl.store(
        grad_weight_parts + tl.program_id(0).to(tl.int64) * 2 * head_dim + value_dims,
        tl.sum(grad * normed, 0),
        mask=value_dims < 2 * head_dim,
    )
    grad = grad * weight[None, :]
    along = tl.sum(grad * normed, 1) / (2 * head_dim)
    grad = ((grad - normed * along[:, None]) * inverse_rms[:, None]).to(value.dtype.element_ty)
    _store_rows(grad_difference + start, grad, queries, value_dims, stride, 1, tokens, 2 * head_dim)
    # From the rounded gradient, the one that the dots below see, so that a row's score gradients still sum to zero.
    wide = grad.to(tl.float32)
    delta2 = tl.sum(wide * output2, 1)
    delta1 = tl.sum(wide * combined, 1) + lam * delta2
    heads = (batch * pairs + pair) * 2 * tokens
    tl.store(delta + heads + queries, delta1, mask=queries < tokens)
    tl.store(delta + heads + tokens + queries, delta2, mask=queries < tokens)

    query += batch * query_strides[0] + 2 * pair * query_strides[1]
    key += batch * key_strides[0] + 2 * pair * key_strides[1]
    value += batch * value_strides[0] + pair * value_strides[1]
    query1 = _load_rows(query, queries, dims, query_strides[2], query_strides[3], tokens, head_dim)
    query2 = _load_rows(query + query_strides[1], queries, dims, query_strides[2], query_strides[3], tokens, head_dim)
    logsumexp1 = tl.load(logsumexp + heads + queries, mask=queries < tokens, other=0.0)
    logsumexp2 = tl.load(logsumexp + heads + tokens + queries, mask=queries < tokens, other=0.0)
    grad_query1 = tl.zeros((block_queries, block_dim), tl.float32)
    grad_query2 = tl.zeros((block_queries, block_dim), tl.float32)

    last_key = tl.minimum(tokens, first_query + block_queries) if is_causal else tokens
    for first_key in range(0, last_key, block_keys):
        keys = first_key + tl.arange(0, block_keys)
        allowed = _may_attend(mask, mask_strides, batch, queries, keys, tokens, has_mask, is_causal)
        values = _load_rows(value, keys, value_dims, value_strides[2], value_strides[3], tokens, 2 * head_dim)
        grad_map = _dot(grad, tl.trans(values), widen)

        keys1 = _load_rows(key, keys, dims, key_strides[2], key_strides[3], tokens, head_dim)
        scores = tl.where(allowed, _dot(query1, tl.trans(keys1), widen) * score_scaling, float("-inf"))
        grad_scores = tl.exp2(scores - logsumexp1[:, None]) * (grad_map - delta1[:, None])
        grad_query1 += _dot(grad_scores.to(keys1.dtype), keys1, widen)

        keys2 = _load_rows(key + key_strides[1], keys, dims, key_strides[2], key_strides[3], tokens, head_dim)
        scores = tl.where(allowed, _dot(query2, tl.trans(keys2), widen) * score_scaling, float("-inf"))
        grad_scores = tl.exp2(scores - logsumexp2[:, None]) * (grad_map - delta2[:, None])
        grad_query2 += _dot(grad_scores.to(keys2.dtype), keys2, widen)

    grad_query += batch * grad_query_strides[0] + 2 * pair * grad_query_strides[1]
    row, column = grad_query_strides[2], grad_query_strides[3]
    _store_rows(grad_query, grad_query1 * scaling, queries, dims, row, column, tokens, head_dim)
    grad_query += grad_query_strides[1]
    _store_rows(grad_query, grad_query2 * (-lam * scaling), queries, dims, row, column, tokens, head_dim)


@_jit
def _backward_key_kernel(
    query,
    key,
    value,
    mask,
    lambda_value,
    logsumexp,
    grad_difference,
    delta,
    grad_key,
    grad_value,
    query_strides,
    key_strides,
    value_strides,
    mask_strides,
    grad_key_strides,
    grad_value_strides,
    tokens,
    pairs,
    scaling,
    score_scaling,
    head_dim: tl.constexpr,
    block_dim: tl.constexpr,
    block_queries: tl.constexpr,
    block_keys: tl.constexpr,
    has_mask: tl.constexpr,
    is_causal: tl.constexpr,
    widen: tl.constexpr,
):
    """One program per block of keys of one pair: the keys' and the values' gradients."""
    blocks = tl.cdiv(tokens, block_keys)
    pair = tl.program_id(0) // blocks % pairs
    batch = (tl.program_id(0) // blocks // pairs).to(tl.int64)
    first_key = tl.program_id(0) % blocks * block_keys
    keys = first_key + tl.arange(0, block_keys)
    dims = tl.arange(0, block_dim)
    value_dims = tl.arange(0, 2 * block_dim)
    lam = tl.load(lambda_value)

    query += batch * query_strides[0] + 2 * pair * query_strides[1]
    key += batch * key_strides[0] + 2 * pair * key_strides[1]
    value += batch * value_strides[0] + pair * value_strides[1]
    grad_difference += (batch * tokens * pairs + pair) * 2 * head_dim
    logsumexp += (batch * pairs + pair) * 2 * tokens
    delta += (batch * pairs + pair) * 2 * tokens
    keys1 = _load_rows(key, keys, dims, key_strides[2], key_strides[3], tokens, head_dim)
    keys2 = _load_rows(key + key_strides[1], keys, dims, key_strides[2], key_strides[3], tokens, head_dim)
    values = _load_rows(value, keys, value_dims, value_strides[2], value_strides[3], tokens, 2 * head_dim)
    grad_key1 = tl.zeros((block_keys, block_dim), tl.float32)
    grad_key2 = tl.zeros((block_keys, block_dim), tl.float32)
    grad_values = tl.zeros((block_keys, 2 * block_dim), tl.float32)

    start = first_key // block_queries * block_queries if is_causal else 0
    for first_query in range(start, tokens, block_queries):
        queries = first_query + tl.arange(0, block_queries)
        inside = queries < tokens
        allowed = _may_attend(mask, mask_strides, batch, queries, keys, tokens, has_mask, is_causal)
        # Rows beyond the end have a gradient of zero, and so add nothing below.
        grad = _load_rows(grad_difference, queries, value_dims, pairs * 2 * head_dim, 1, tokens, 2 * head_dim)
        grad_map = _dot(grad, tl.trans(values), widen)

        queries1 = _load_rows(query, queries, dims, query_strides[2], query_strides[3], tokens, head_dim)
        scores = tl.where(allowed, _dot(queries1, tl.trans(keys1), widen) * score_scaling, float("-inf"))
        map1 = tl.exp2(scores - tl.load(logsumexp + queries, mask=inside, other=0.0)[:, None])
        grad_scores = map1 * (grad_map - tl.load(delta + queries, mask=inside, other=0.0)[:, None])
        grad_key1 += _dot(tl.trans(grad_scores.to(queries1.dtype)), queries1, widen)

        queries2 = _load_rows(
            query + query_strides[1], queries, dims, query_strides[2], query_strides[3], tokens, head_dim
        )
        scores = tl.where(allowed, _dot(queries2, tl.trans(keys2), widen) * score_scaling, float("-inf"))
        map2 = tl.exp2(scores - tl.load(logsumexp + tokens + queries, mask=inside, other=0.0)[:, None])
        grad_scores = map2 * (grad_map - tl.load(delta + tokens + queries, mask=inside, other=0.0)[:, None])
        grad_key2 += _dot(tl.trans(grad_scores.to(queries2.dtype)), queries2, widen)

        grad_values += _dot(tl.trans((map1 - lam * map2).to(grad.dtype)), grad, widen)

    grad_key += batch * grad_key_strides[0] + 2 * pair * grad_key_strides[1]
    row, column = grad_key_strides[2], grad_key_strides[3]
    _store_rows(grad_key, grad_key1 * scaling, keys, dims, row, column, tokens, head_dim)
    grad_key += grad_key_strides[1]
    _store_rows(grad_key, grad_key2 * (-lam * scaling), keys, dims, row, column, tokens, head_dim)
    grad_value += batch * grad_value_strides[0] + pair * grad_value_strides[1]
    row, column = grad_value_strides[2], grad_value_strides[3]
    _store_rows(grad_value, grad_values, keys, value_dims, row, column, tokens, 2 * head_dim)


# How the kernels above were made, which Triton decides when they are: by TRITON_INTERPRET.
_INTERPRETED = triton is not None and not isinstance(_forward_kernel, triton.JITFunction)


def _launch_options(query: torch.Tensor, attention_mask: torch.Tensor | None, is_causal: bool) -> dict[str, Any]:
    """Return the kernels' compile-time arguments.

    Block sizes are a fixed table by the bytes of a row of values, chosen by what the compiler reports for sm_80, sm_90
    and sm_120: at most 66 KiB of shared memory, within a consumer card's 99, and few or no registers spilled. Their
    speed is untested on a card.
    """
    head_dim = query.shape[-1]
    block_dim = max(16, triton.next_power_of_2(head_dim))
    row_bytes = 2 * block_dim * query.element_size()
    if row_bytes <= 256 and query.dtype != torch.float32:
        block_queries, block_keys, num_warps, num_stages = 64, 32, 4, 2
    elif row_bytes <= 512:
        block_queries, block_keys, num_warps, num_stages = 32, 32, 8, 1
    else:
        block_queries, block_keys, num_warps, num_stages = 16, 16, 8, 1
    return {
        "head_dim": head_dim,
        "block_dim": block_dim,
        "block_queries": block_queries,
        "block_keys": block_keys,
        "has_mask": attention_mask is not None,
        "is_causal": is_causal and attention_mask is None,
        # The interpreter holds bfloat16 as integers, which it would multiply as such.
        "widen": _INTERPRETED and query.dtype == torch.bfloat16,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


def _mask_and_strides(
    attention_mask: torch.Tensor | None, batch: int, tokens: int
) -> tuple[torch.Tensor | None, tuple[int, ...]]:
    """Return the mask as bytes, and its strides once broadcast, which are 0 where it repeats."""
    if attention_mask is None:
        return None, (0, 0, 0, 0)
    return attention_mask.view(torch.uint8), attention_mask.expand(batch, 1, tokens, tokens).stride()


@torch.library.custom_op(f"{_NAMESPACE}::forward", mutates_args=())
def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    lambda_value: torch.Tensor,
    norm_weight: torch.Tensor,
    scaling: float,
    is_causal: bool,
    norm_eps: float,
    output_scale: float,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the output and, with `save`, what backward needs: the difference, the second map's output, logsumexps.

    Backward needs (A1 − λ·A2)·v for the norm, and A1·v and A2·v for the sums over a row of gradient times output. Any
    two of the three give the third; the difference is one of those saved since it may be far smaller than the other
    two, and their rounding would swamp it.
    """
    output, difference, second_output, logsumexp = _forward_outputs(query, value, save)
    batch, num_heads, tokens, _ = query.shape
    options = _launch_options(query, attention_mask, is_causal)
    mask, mask_strides = _mask_and_strides(attention_mask, batch, tokens)
    blocks = triton.cdiv(tokens, options["block_queries"])
    with torch.cuda.device_of(query):
        _forward_kernel[(blocks * batch * num_heads // 2,)](
            query,
            key,
            value,
            mask,
            lambda_value,
            norm_weight,
            output,
            difference,
            second_output,
            logsumexp,
            query.stride(),
            key.stride(),
            value.stride(),
            mask_strides,
            tokens,
            num_heads // 2,
            scaling * math.log2(math.e),
            norm_eps,
            output_scale,
            save=save,
            **options,
        )
    return output, difference, second_output, logsumexp


def _forward_outputs(
    query: torch.Tensor, value: torch.Tensor, save: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the tensors that the forward kernel fills; those for backward are empty without `save`."""
    batch, pairs, tokens, width = value.shape
    shape = (batch, tokens, pairs, width)
    saved = shape if save else (0,)
    return (
        query.new_empty(shape),
        query.new_empty(saved),
        query.new_empty(saved),
        query.new_empty(query.shape[:3] if save else (0,), dtype=torch.float32),
    )


@_forward.register_fake
def _(query, key, value, attention_mask, lambda_value, norm_weight, scaling, is_causal, norm_eps, output_scale, save):
    return _forward_outputs(query, value, save)


@torch.library.custom_op(f"{_NAMESPACE}::backward", mutates_args=())
def _backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    lambda_value: torch.Tensor,
    norm_weight: torch.Tensor,
    difference: torch.Tensor,
    second_output: torch.Tensor,
    logsumexp: torch.Tensor,
    scaling: float,
    is_causal: bool,
    norm_eps: float,
    output_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key, value, λ and the norm's weight."""
    grad_output = grad_output.contiguous()
    grad_query, grad_key, grad_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    grad_difference, delta = torch.empty_like(difference), torch.empty_like(logsumexp)
    batch, num_heads, tokens, head_dim = query.shape
    pairs = num_heads // 2
    options = _launch_options(query, attention_mask, is_causal)
    mask, mask_strides = _mask_and_strides(attention_mask, batch, tokens)
    query_programs = triton.cdiv(tokens, options["block_queries"]) * batch * pairs
    key_programs = triton.cdiv(tokens, options["block_keys"]) * batch * pairs
    grad_weight_parts = query.new_empty((query_programs, 2 * head_dim), dtype=torch.float32)
    with torch.cuda.device_of(query):
        _backward_query_kernel[(query_programs,)](
            query,
            key,
            value,
            mask,
            lambda_value,
            norm_weight,
            difference,
            second_output,
            logsumexp,
            grad_output,
            grad_query,
            grad_difference,
            delta,
            grad_weight_parts,
            query.stride(),
            key.stride(),
            value.stride(),
            mask_strides,
            grad_query.stride(),
            tokens,
            pairs,
            scaling,
            scaling * math.log2(math.e),
            norm_eps,
            output_scale,
            **options,
        )
        _backward_key_kernel[(key_programs,)](
            query,
            key,
            value,
            mask,
            lambda_value,
            logsumexp,
            grad_difference,
            delta,
            grad_key,
            grad_value,
            query.stride(),
            key.stride(),
            value.stride(),
            mask_strides,
            grad_key.stride(),
            grad_value.stride(),
            tokens,
            pairs,
            scaling,
            scaling * math.log2(math.e),
            **options,
        )
    # λ multiplies −A2·v, and delta holds the sum over channels of that times the gradient.
    grad_lambda = -delta[:, 1::2].sum()
    return grad_query, grad_key, grad_value, grad_lambda, grad_weight_parts.sum(0).to(norm_weight.dtype)


@_backward.register_fake
def _(grad_output, query, key, value, attention_mask, lambda_value, norm_weight, *rest):
    return tuple(torch.empty_like(tensor) for tensor in (query, key, value, lambda_value, norm_weight))


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, scaling, is_causal, norm_eps, output_scale, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.constants = (scaling, is_causal, norm_eps, output_scale)


def _autograd_backward(ctx: Any, grad_output: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    grads = _backward(grad_output, *ctx.saved_tensors, *ctx.constants)
    return *grads[:3], None, *grads[3:], None, None, None, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    lambda_value: torch.Tensor,
    norm_weight: torch.Tensor,
) -> None:
    """Raise ValueError where the kernels don't cover the arguments."""
    if query.ndim != 4 or query.shape[1] % 2 != 0:
        raise ValueError(
            f"query has shape {tuple(query.shape)}; it must be (batch, num_heads, tokens, head_dim) with an even "
            "num_heads."
        )
    batch, num_heads, tokens, head_dim = query.shape
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim is {head_dim}; it must be from 1 to {MAX_HEAD_DIM}.")
    if query.dtype not in DTYPES:
        raise ValueError(f"query has dtype {query.dtype}; it must be one of {DTYPES}.")
    if query.device.type != "cuda" and not _INTERPRETED:
        raise ValueError(
            f"query is on {query.device}; it must be on a cuda device (or TRITON_INTERPRET=1 be set before Triton is "
            "imported)."
        )
    shapes = {
        "key": (key, (batch, num_heads, tokens, head_dim)),
        "value": (value, (batch, num_heads // 2, tokens, 2 * head_dim)),
        "lambda_value": (lambda_value, ()),
        "norm_weight": (norm_weight, (2 * head_dim,)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {shape}.")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}; it must be on {query.device}, as query is.")
    dtypes = {"key": (key, (query.dtype,)), "value": (value, (query.dtype,))} | {
        "lambda_value": (lambda_value, (torch.float32,)),
        "norm_weight": (norm_weight, DTYPES),
    }
    for name, (tensor, allowed) in dtypes.items():
        if tensor.dtype not in allowed:
            raise ValueError(f"{name} has dtype {tensor.dtype}; it must be one of {allowed}.")
    if attention_mask is not None:
        full = (batch, 1, tokens, tokens)
        shape = (1,) * (4 - attention_mask.ndim) + tuple(attention_mask.shape)
        if len(shape) != 4 or any(size not in (1, limit) for size, limit in zip(shape, full, strict=True)):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; it must be broadcastable to {full}."
            )
        if attention_mask.dtype != torch.bool:
            raise ValueError(f"attention_mask has dtype {attention_mask.dtype}; it must be {torch.bool}.")
        if attention_mask.device != query.device:
            raise ValueError(f"attention_mask is on {attention_mask.device}; it must be on {query.device}.")


def fused_differential_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    lambda_value: torch.Tensor,
    norm_weight: torch.Tensor,
    *,
    scaling: float,
    is_causal: bool,
    norm_eps: float,
    output_scale: float,
) -> torch.Tensor:
    """Return RMSNorm((softmax(q1·k1ᵀ·scaling) − λ·softmax(q2·k2ᵀ·scaling))·v) · output_scale for every pair of heads.

    No map is stored. Differentiable once, in query, key, value, λ and the norm's weight, and deterministic.

    Args:
        query, key: (batch, num_heads, tokens, head_dim), with any strides; heads 2i and 2i+1 make pair i. float32,
            bfloat16 or float16; head_dim from 1 to 128.
        value: (batch, num_heads / 2, tokens, 2 · head_dim), with any strides, of the query's dtype.
        attention_mask: Bool, True where a query may see a key, broadcastable to (batch, 1, tokens, tokens), or None.
            A query that may see no key has the output 0, as in PyTorch's SDPA, and no gradient.
        lambda_value: λ, without dimensions, float32.
        norm_weight: Weight of the RMSNorm over a pair's 2 · head_dim channels, (2 · head_dim,).
        scaling: Factor on the scores, head_dim^-0.5.
        is_causal: Let query i see keys 0 to i alone, where there is no mask; a mask is taken to be complete.
        norm_eps: Added to the mean square.
        output_scale: Factor on the norm's output, 1 − λ_init.

    Returns:
        (batch, tokens, num_heads / 2, 2 · head_dim), contiguous, in the query's dtype. Sums, softmax and norm are
        float32; in float32 the products are too, never TF32.

    Raises:
        ImportError: Triton is missing.
        ValueError: A shape, dtype or device isn't as above; the device must be CUDA's, or Triton in its interpreter.

    Source: paper arXiv 2503.06626, section 3; FlashAttention-2 (Dao 2023) for the online softmax and its gradient.
    """
    if triton is None:
        raise ImportError("The fused attention needs Triton: pip install triton.")
    _check(query, key, value, attention_mask, lambda_value, norm_weight)
    # What only backward needs is neither kept nor written where there is no backward.
    save = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (query, key, value, lambda_value, norm_weight)
    )
    return _forward(
        query,
        key,
        value,
        attention_mask,
        lambda_value,
        norm_weight,
        scaling,
        is_causal,
        norm_eps,
        output_scale,
        save,
    )[0]


__all__ = ["fused_differential_attention"]
