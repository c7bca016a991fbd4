"""Exact differential attention on the CPU that holds the maps of one block at a time, small enough for its caches."""

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import nn

from .precision_diffclip import at_least_float32


# Entries of both maps of a block, for each thread: 1 MiB in float32, measured by benchmarks/speed.py. Smaller
# blocks cost more calls, larger ones leave the caches between the products, which is what makes the formula slow.
BLOCK_ENTRIES_PER_THREAD = 2**18
# Entries of all maps up to which autograd has the formula, 12 MiB in float32; measured by benchmarks/speed.py.
# Our own steps save passes over the maps, but copy queries, keys, values and their gradients.
SMALL_MAPS_ENTRIES = 3 * 2**20
# Query rows of a block where tokens are many: the products with fewer are slow, and each adds to every key's gradient.
LEAST_ROWS = 256
# Keys below which PyTorch's softmax over the last dimension is slow, since a vector register holds no more, and rows
# from which it pays to pad them.
LEAST_KEYS = 16
PADDED_ROWS = 256

# Operators are global, and this file may be loaded twice: from the package and as a copy beside a checkpoint.
_NAMESPACE = __name__.replace(".", "_").replace("-", "_")


def has_small_maps(query: torch.Tensor) -> bool:
    """Say whether all maps of queries (batch, num_heads, tokens, head_dim) are small."""
    batch_size, num_heads, length, _ = query.shape
    return batch_size * num_heads * length**2 <= SMALL_MAPS_ENTRIES


def keeps_maps(query: torch.Tensor) -> bool:
    """Say whether both maps are kept for the backward pass: where they are at most as large as what a block keeps.

    A transformer's block keeps about 16 hidden states a token, and the maps are num_heads · tokens numbers a token.
    """
    return query.shape[2] <= 16 * query.shape[3]


def _block_sizes(query: torch.Tensor, whole_rows: bool = False) -> tuple[int, int, int]:
    """Return how many batch rows, pairs and query rows a block has at most: whole batch rows, else pairs of one.

    Args:
        query: (batch, num_heads, tokens, head_dim).
        whole_rows: Whether a block has all query rows.
    """
    batch_size, num_heads, length, _ = query.shape
    num_threads = torch.get_num_threads()
    entries = BLOCK_ENTRIES_PER_THREAD * num_threads
    # More where whole batch rows are put together. It takes copies of queries, keys and values, but single rows, which
    # take none, are slower beside busy processes: each product waits for all threads.
    batch = min(batch_size, 4 * entries // (num_heads * length * length))
    if batch > 1:
        return batch, num_heads // 2, length
    # A batched product runs one matrix a thread.
    pairs = min(num_heads // 2, max(num_threads, entries // (2 * length * length)))
    rows = length if whole_rows else max(LEAST_ROWS, entries // (2 * pairs * length))
    # As many in each block.
    return 1, pairs, -(-length // -(-length // rows))


def _blocks(
    query: torch.Tensor, attention_mask: torch.Tensor | None, is_causal: bool, whole_rows: bool = False
) -> Iterator[tuple[slice, slice, slice, slice, slice, torch.Tensor | None]]:
    """Cut attention into blocks of batch rows, pairs and query rows.

    Yields each block's batch rows, pairs, their heads, query rows, the keys that its queries can see, and its
    `score_bias`.
    """
    batch_size, num_heads, length, _ = query.shape
    batch, pairs, row_count = _block_sizes(query, whole_rows)
    # Where every block has all query rows, what is causal is the same in each.
    is_shared = attention_mask is None and row_count == length
    shared = whole_bias(query, None, is_causal) if is_shared else None
    for batch_start in range(0, batch_size, batch):
        batch_rows = slice(batch_start, min(batch_size, batch_start + batch))
        for pair_start in range(0, num_heads // 2, pairs):
            block_pairs = slice(pair_start, min(num_heads // 2, pair_start + pairs))
            heads = slice(2 * block_pairs.start, 2 * block_pairs.stop)
            for row_start in range(0, length, row_count):
                rows = slice(row_start, min(length, row_start + row_count))
                keys = slice(0, rows.stop if is_causal and attention_mask is None else length)
                bias = shared
                if not is_shared:
                    bias = score_bias(attention_mask, is_causal, batch_rows, rows, query.dtype)
                yield batch_rows, block_pairs, heads, rows, keys, bias


def _part(tensor: torch.Tensor, *parts: slice) -> torch.Tensor:
    """Return a block's part of a tensor, by its first dimensions; cut where it has to be, since each cut is a call."""
    for dim, part in enumerate(parts):
        count = part.stop - part.start
        if count < tensor.shape[dim]:
            tensor = tensor.narrow(dim, part.start, count)
    return tensor


def score_bias(
    attention_mask: torch.Tensor | None, is_causal: bool, batch: slice, rows: slice, dtype: torch.dtype
) -> torch.Tensor | None:
    """Return what is added to a block's scores, or None.

    Args:
        attention_mask: Bool, true where a query attends to a key, or added to the scores, broadcastable to (batch, 1,
            tokens, tokens); or None.
        is_causal: Whether queries see earlier tokens alone, where there is no mask.
        batch, rows: The block.
        dtype: Of the scores.

    Returns:
        A tensor broadcastable to (batch, pairs, rows, keys).
    """
    lowest = torch.finfo(dtype).min  # Not -inf, so that a row without a key isn't NaN; as Transformers' eager masks.
    if attention_mask is not None:
        mask = attention_mask[batch if len(attention_mask) > 1 else slice(None)]
        mask = mask[:, :, rows if mask.shape[2] > 1 else slice(None)]
        if mask.dtype == torch.bool:
            return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, lowest)
        return mask.to(dtype)
    if is_causal:
        return torch.full((rows.stop - rows.start, rows.stop), lowest, dtype=dtype).triu_(rows.start + 1)
    return None


def whole_bias(query: torch.Tensor, attention_mask: torch.Tensor | None, is_causal: bool) -> torch.Tensor | None:
    """Return the `score_bias` of a whole batch."""
    if attention_mask is None:
        return _causal_bias(query.shape[2], query.dtype) if is_causal else None
    return score_bias(attention_mask, is_causal, slice(None), slice(None), query.dtype)


@lru_cache(maxsize=8)
def _causal_bias(length: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the `score_bias` of short causal texts whole, which every layer of every call adds and none changes."""
    with torch.inference_mode(False):
        return torch.full((length, length), torch.finfo(dtype).min, dtype=dtype, device="cpu").triu_(1)


def _softmax(scores: torch.Tensor) -> torch.Tensor:
    """Return the softmax over the last dimension, in float32 or better; over the scores where it can."""
    if scores.dtype != at_least_float32(scores.dtype):
        return torch.softmax(scores, dim=-1, dtype=at_least_float32(scores.dtype)).to(scores.dtype)
    keys = scores.shape[-1]
    if keys >= LEAST_KEYS or scores.numel() < PADDED_ROWS * keys:
        return torch.softmax(scores, dim=-1, out=scores)
    padded = nn.functional.pad(scores, (0, LEAST_KEYS - keys), value=-torch.inf)
    return torch.softmax(padded, dim=-1, out=padded)[..., :keys]


def _maps(
    query: torch.Tensor,
    key: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    room: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return softmax(query · keyᵀ · scaling + bias), with the softmax in float32 or better.

    Args:
        query, key: A block's, (batch, heads, tokens, head_dim).
        bias: Broadcastable to (batch, heads, tokens, tokens), or None.
        scaling: Factor on the scores.
        room: Memory that is written over, (batch, heads, tokens, tokens) of the largest block; None for new memory,
            which for each block would cost a CPU as much as the product.

    Returns:
        (batch · heads, tokens, tokens), in the room where it can.
    """
    queries, keys = query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)
    # The factor and the bias within the product: on a CPU each would be a pass over the scores.
    if room is None and bias is not None and bias.ndim == 2:
        return _softmax(torch.baddbmm(bias, queries, keys, alpha=scaling))
    shape = (*query.shape[:3], key.shape[2])
    if room is None:
        scores = query.new_empty(shape)
    else:
        scores = room if room.shape == shape else room.flatten()[: math.prod(shape)].view(shape)
    if bias is not None:
        scores.copy_(bias)
    scores = scores.flatten(0, 1).baddbmm_(queries, keys, beta=0 if bias is None else 1, alpha=scaling)
    return _softmax(scores)


def _attend(difference: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return differential maps, (batch · pairs, rows, tokens), times a block's values, (batch, rows, pairs, width)."""
    output = torch.bmm(difference, value.flatten(0, 1))
    return output.view(*value.shape[:2], *output.shape[1:]).transpose(1, 2)


def blocked_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    lambda_value: torch.Tensor,
    scaling: float,
    is_causal: bool,
) -> torch.Tensor:
    """Differential attention, (A1 − λ·A2)·v, block by block; equal to the eager formula.

    Args:
        query, key: (batch, num_heads, tokens, head_dim); heads 2i and 2i+1 make the two maps of pair i.
        value: (batch, num_heads / 2, tokens, 2 · head_dim).
        attention_mask: As in `score_bias`.
        lambda_value: λ, without dimensions.
        scaling: Factor on the scores.
        is_causal: Whether a query attends to earlier tokens and itself alone, where there is no mask.

    Returns:
        (batch, tokens, num_heads / 2, 2 · head_dim), in the query's dtype; without gradients, which
        `blocked_differential_attention` has.

    Source: paper arXiv 2503.06626, section 3.
    """
    weight = lambda_value.item()
    batch_size, num_heads, length, _ = query.shape
    sizes = _block_sizes(query)
    if sizes == (batch_size, num_heads // 2, length):
        maps = _maps(query, key, whole_bias(query, attention_mask, is_causal), scaling)
        return _attend(maps[0::2].sub_(maps[1::2], alpha=weight), value).contiguous()
    room = query.new_empty(sizes[0], 2 * sizes[1], sizes[2], length)
    output = value.new_empty(value.transpose(1, 2).shape)
    for batch, pairs, heads, rows, keys, bias in _blocks(query, attention_mask, is_causal):
        maps = _maps(_part(query, batch, heads, rows), _part(key, batch, heads, keys), bias, scaling, room)
        difference = maps[0::2].sub_(maps[1::2], alpha=weight)
        _part(output, batch, rows, pairs).copy_(_attend(difference, _part(value, batch, pairs, keys)))
    return output


# `blocked_forward` with gradients, by blocks too: the maps are computed again in the backward pass, so that memory
# doesn't grow with tokens² beyond one block. An operator of PyTorch's, which `torch.compile` calls as it is, whatever
# the sizes.
blocked_differential_attention = torch.library.custom_op(
    f"{_NAMESPACE}::differential_attention", blocked_forward, mutates_args=(), device_types="cpu"
)


@blocked_differential_attention.register_fake
def _(query, key, value, attention_mask, lambda_value, scaling, is_causal):
    return value.new_empty(value.transpose(1, 2).shape)


@torch.library.custom_op(f"{_NAMESPACE}::differential_attention_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    lambda_value: torch.Tensor,
    scaling: float,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key, value and λ, block by block, whose maps are computed again."""
    weight = lambda_value.item()
    batch_rows, pair_count, row_count = _block_sizes(query)
    room = query.new_empty(batch_rows, 2 * pair_count, row_count, key.shape[2])
    grad_query, grad_key, grad_value = _backward_buffers(query, key, value)
    grad_key.zero_(), grad_value.zero_()
    grad_lambda = torch.zeros((), dtype=torch.float64)
    for batch, pairs, heads, rows, keys, bias in _blocks(query, attention_mask, is_causal):
        block = _part(query, batch, heads, rows), _part(key, batch, heads, keys), _part(value, batch, pairs, keys)
        maps = _maps(*block[:2], bias, scaling, room)
        grads = _block_backward(_part(grad_output, batch, rows, pairs), *block, maps, weight, scaling)
        _part(grad_query, batch, heads, rows).copy_(grads[0])
        _part(grad_key, batch, heads, keys).add_(grads[1])
        _part(grad_value, batch, pairs, keys).add_(grads[2])
        grad_lambda += grads[3]
    return grad_query, grad_key, grad_value, grad_lambda.to(lambda_value.dtype)


def _block_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    maps: torch.Tensor,
    weight: float,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a block's gradients of query, key, value and λ, from its output's and the maps that `_maps` returned.

    With M = A1 − λ·A2 and G the output's gradient: dM = G·vᵀ, dv = Mᵀ·G, dA1 = dM, dA2 = −λ·dM, dλ = −Σ A2·dM.
    """
    shape = (len(query), -1)
    # Batch and heads, or pairs, are one dimension, as in the maps.
    grad = grad.transpose(1, 2).flatten(0, 1)
    query, key, value = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
    grad_difference = torch.bmm(grad, value.transpose(1, 2))
    second = maps[1::2]
    # Rows in their own precision, which PyTorch sums fast, and their many sums in float64.
    grad_lambda = -(second * grad_difference).sum(-1).sum(dtype=torch.float64)
    # Back through both softmaxes at once, as if dA2 were dM too; −λ follows on the queries and keys, which are small.
    grad_maps = torch.stack([grad_difference, grad_difference], dim=1).flatten(0, 1)
    grad_scores = torch.ops.aten._softmax_backward_data.out(grad_maps, maps, -1, maps.dtype, grad_input=grad_maps)
    factors = query.new_tensor([scaling, -weight * scaling])[:, None, None]
    grad_query = torch.bmm(grad_scores, (key.unflatten(0, (-1, 2)) * factors).flatten(0, 1))
    grad_key = torch.bmm(grad_scores.transpose(1, 2), (query.unflatten(0, (-1, 2)) * factors).flatten(0, 1))
    difference = torch.sub(maps[0::2], second, alpha=weight, out=grad_difference)
    grad_value = torch.bmm(difference.transpose(1, 2), grad)
    return grad_query.unflatten(0, shape), grad_key.unflatten(0, shape), grad_value.unflatten(0, shape), grad_lambda


def _backward_buffers(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return room for the gradients, (batch, tokens, heads, width) in memory, as the projections' outputs are."""
    query, key, value = (
        tensor.new_empty(tensor.transpose(1, 2).shape).transpose(1, 2) for tensor in (query, key, value)
    )
    return query, key, value


@_backward.register_fake
def _(grad_output, query, key, value, attention_mask, lambda_value, scaling, is_causal):
    return *_backward_buffers(query, key, value), torch.empty_like(lambda_value)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scaling, ctx.is_causal = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, grad_output):
    grad_query, grad_key, grad_value, grad_lambda = _backward(
        grad_output, *ctx.saved_tensors, ctx.scaling, ctx.is_causal
    )
    return grad_query, grad_key, grad_value, None, grad_lambda, None, None


blocked_differential_attention.register_autograd(_autograd, setup_context=_setup_context)


class _Kept(torch.autograd.Function):
    """`blocked_forward` that keeps its maps for the backward pass, whose blocks have all query rows."""

    @staticmethod
    def forward(query, key, value, attention_mask, lambda_value, scaling, is_causal):
        weight = lambda_value.item()
        all_maps = query.new_empty(*query.shape[:3], key.shape[2])
        output = value.new_empty(value.transpose(1, 2).shape)
        for batch, pairs, heads, rows, _, bias in _blocks(query, attention_mask, is_causal, whole_rows=True):
            room = _part(all_maps, batch, heads)
            maps = _maps(_part(query, batch, heads), _part(key, batch, heads), bias, scaling, room)
            kept = room.flatten(0, 1)
            if maps.data_ptr() != kept.data_ptr():
                kept.copy_(maps)
            difference = torch.sub(kept[0::2], kept[1::2], alpha=weight)
            _part(output, batch, rows, pairs).copy_(_attend(difference, _part(value, batch, pairs)))
        return output, all_maps

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, value, _, lambda_value, ctx.scaling, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(query, key, value, lambda_value, output[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output, _):
        query, key, value, lambda_value, all_maps = ctx.saved_tensors
        weight = lambda_value.item()
        buffers = _backward_buffers(query, key, value)
        grad_lambda = torch.zeros((), dtype=torch.float64)
        for batch, pairs, heads, rows, *_ in _blocks(query, None, is_causal=False, whole_rows=True):
            block = _part(query, batch, heads), _part(key, batch, heads), _part(value, batch, pairs)
            block_grad, maps = _part(grad_output, batch, rows, pairs), _part(all_maps, batch, heads).flatten(0, 1)
            *grads, block_lambda = _block_backward(block_grad, *block, maps, weight, ctx.scaling)
            for buffer, grad, part in zip(buffers, grads, (heads, heads, pairs), strict=True):
                _part(buffer, batch, part).copy_(grad)
            grad_lambda += block_lambda
        return *buffers, None, grad_lambda.to(lambda_value.dtype), None, None


def kept_differential_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    lambda_value: torch.Tensor,
    scaling: float,
    is_causal: bool,
) -> torch.Tensor:
    """Return what `blocked_forward` does, with gradients, for which the maps are kept: fewer products, more memory."""
    return _Kept.apply(query, key, value, attention_mask, lambda_value, scaling, is_causal)[0]
