"""Differential attention block by block against the formula in float64, and against FlashAttention's conditions."""

import pytest
import torch
from test_attention import attention, causal_mask
from tolerances import EAGER_AGAINST_SDPA, HALF_PRECISION, assert_gradients_close, relative_error
from transformers import AttentionInterface

from diffclip_hf.model import attention_diffclip, blocked_attention_diffclip
from diffclip_hf.model.blocked_attention_diffclip import blocked_differential_attention, kept_differential_attention


SCALING = 0.3
LAMBDA = 0.7


def draw(batch: int, length: int, heads: int, width: int, dtype=torch.float64) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values laid out as the model's projections are, and λ."""
    torch.manual_seed(0)
    states = [torch.randn(batch, length, heads * width, dtype=torch.float64) for _ in range(3)]
    query, key, value = (
        state.to(dtype).unflatten(-1, (-1, size)).transpose(1, 2)
        for state, size in zip(states, (width, width, 2 * width), strict=True)
    )
    return query, key, value, torch.tensor(LAMBDA, dtype=dtype)


def formula(query, key, value, lambda_value, bias) -> torch.Tensor:
    maps = torch.softmax(query @ key.transpose(-1, -2) * SCALING + bias, dim=-1)
    return ((maps[:, 0::2] - lambda_value * maps[:, 1::2]) @ value).transpose(1, 2)


def with_gradients(function, tensors) -> dict[str, torch.Tensor]:
    inputs = [tensor.detach().requires_grad_() for tensor in tensors]
    output = function(*inputs)
    torch.manual_seed(1)
    target = torch.randn(output.shape, dtype=torch.float64).to(output.dtype)
    gradients = torch.autograd.grad(output, inputs, target)
    names = ("query", "key", "value", "lambda")
    return {"output": output.detach(), **dict(zip(names, gradients, strict=True))}


def bool_mask(kind: str, batch: int, length: int) -> torch.Tensor | None:
    """A mask that differs between the batch's rows, none, or one that hides all keys from a query."""
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None].repeat(batch, 1, 1, 1)
    if kind == "left padding":
        for row in range(batch):
            causal[row, :, :, :row] = False  # The first queries of row 1 on then see no key.
        return causal
    return None


@pytest.fixture
def threads(request):
    """PyTorch's threads, on whose number the blocks depend; the tests have one otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# Entries a thread: everything in one block; some batch rows; one; some pairs; some query rows; a single one.
@pytest.mark.parametrize("entries", [10**9, 2 * 19 * 19, 19 * 19 + 1, 19 * 19, 2 * 19 * 5, 1])
@pytest.mark.parametrize("mask", ["none", "causal", "left padding"])
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def test_every_cut_is_the_formula(entries, mask, threads, monkeypatch):
    batch, length, heads = 5, 19, 4
    cut_by(monkeypatch, entries // threads)
    assert_is_the_formula(blocked_differential_attention, mask, batch, length, heads)


@pytest.mark.parametrize("entries", [10**9, 2 * 19 * 19, 19 * 19])
@pytest.mark.parametrize("mask", ["none", "causal", "left padding"])
def test_kept_maps_are_the_formula(entries, mask, monkeypatch):
    cut_by(monkeypatch, entries)
    assert_is_the_formula(kept_differential_attention, mask, 5, 19, 4)


@pytest.mark.parametrize("form", [blocked_differential_attention, kept_differential_attention])
@pytest.mark.parametrize("mask", ["none", "causal", "left padding"])
@pytest.mark.parametrize("batch", [3, 30])
def test_few_keys_are_the_formula(form, mask, batch):
    """In few rows and in many, of which the latter are padded."""
    assert_is_the_formula(form, mask, batch, 5, 4)


@pytest.mark.parametrize("mask", ["none", "causal", "left padding"])
@pytest.mark.parametrize(
    ("small", "length", "expected"), [(4 * 4 * 81, 9, "formula"), (4 * 4 * 81 - 1, 9, "kept"), (0, 65, "blocked")]
)
def test_the_form_in_training_is_chosen_by_size(small, length, expected, mask, monkeypatch):
    """Four rows of four heads, four wide, so that maps of more than 64 tokens are never kept."""
    monkeypatch.setattr(blocked_attention_diffclip, "SMALL_MAPS_ENTRIES", small)
    forms = {
        "formula": "eager_differential_attention_forward",
        "kept": "kept_differential_attention",
        "blocked": "blocked_differential_attention",
    }
    taken = []
    for name, form in forms.items():
        its = getattr(attention_diffclip, form)
        noted = lambda *args, name=name, its=its: taken.append(name) or its(*args)  # noqa: E731
        monkeypatch.setattr(attention_diffclip, form, noted)
    module = attention("differential", causal=mask == "causal")

    def forward(query, key, value, attention_mask, lambda_value, scaling, is_causal):
        return attention_diffclip.differential_attention_forward(
            module, query, key, value, attention_mask, lambda_value, scaling, attn_implementation="sdpa"
        )[0]

    assert_is_the_formula(forward, mask, 4, length, 4, width=4)
    assert taken == [expected]


def cut_by(monkeypatch, entries: int) -> None:
    monkeypatch.setattr(blocked_attention_diffclip, "BLOCK_ENTRIES_PER_THREAD", entries)
    monkeypatch.setattr(blocked_attention_diffclip, "LEAST_ROWS", 1)


def assert_is_the_formula(attention, mask: str, batch: int, length: int, heads: int, width: int = 8) -> None:
    """With an attention function of the blocked one's signature, the output and the gradients are the formula's."""
    tensors = draw(batch, length, heads, width)
    attention_mask = bool_mask(mask, batch, length)
    bias = torch.zeros(1, dtype=torch.float64)
    if mask == "causal":
        bias = causal_mask(length).double()
    elif attention_mask is not None:
        bias = torch.zeros(attention_mask.shape).double().masked_fill(~attention_mask, torch.finfo(torch.float64).min)
    found = with_gradients(
        lambda query, key, value, lam: attention(query, key, value, attention_mask, lam, SCALING, mask == "causal"),
        tensors,
    )
    for name, value in with_gradients(lambda *inputs: formula(*inputs, bias), tensors).items():
        assert relative_error(found[name], value) <= 1e-12, name


def test_a_mask_that_is_added_to_the_scores():
    bias = torch.randn(3, 1, 7, 7, dtype=torch.float64)
    tensors = draw(3, 7, 2, 4)
    found = with_gradients(
        lambda query, key, value, lam: blocked_differential_attention(query, key, value, bias, lam, SCALING, False),
        tensors,
    )
    for name, value in with_gradients(lambda *inputs: formula(*inputs, bias), tensors).items():
        assert relative_error(found[name], value) <= 1e-12, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("batch", "length", "causal"), [(1, 197, False), (3, 77, True), (1, 1025, False)])
def test_other_dtypes_are_near_the_formula(dtype, batch, length, causal):
    bias = causal_mask(length).double() if causal else torch.zeros(1, dtype=torch.float64)
    expected = with_gradients(lambda *inputs: formula(*inputs, bias), draw(batch, length, 4, 16))
    *tensors, lambda_value = draw(batch, length, 4, 16, dtype)
    found = with_gradients(
        lambda query, key, value, lam: blocked_differential_attention(query, key, value, None, lam, SCALING, causal),
        (*tensors, lambda_value.float()),
    )
    tolerance = HALF_PRECISION.get(dtype, EAGER_AGAINST_SDPA)
    for name, value in expected.items():
        assert found[name].dtype == (torch.float32 if name == "lambda" else dtype)
        # λ's gradient is one sum over everything, which nearly cancels: 1 % of the sum of its terms' sizes.
        scale = expected["value"].abs().sum() / 100 if name == "lambda" else value.abs().max()
        assert (found[name].double() - value).abs().max() / scale <= tolerance, name


# PyTorch's check looks at gradients of tensors that aren't leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("causal", [False, True])
def test_the_operator_is_one_of_pytorchs(causal):
    """Its schema, its sizes without data, its gradients and its tracing with changing sizes are consistent."""
    query, key, value, lambda_value = (tensor.requires_grad_() for tensor in draw(2, 5, 4, 4, torch.float32))
    torch.library.opcheck(blocked_differential_attention, (query, key, value, None, lambda_value, SCALING, causal))


def test_nothing_as_large_as_the_maps_is_kept_for_the_backward_pass():
    module = attention("differential", causal=False)
    module.config._attn_implementation = "sdpa"
    length = 1025
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()) or tensor, lambda x: x):
        module(torch.randn(1, length, 32, requires_grad=True))
    assert sizes
    assert max(sizes) < length * length


@pytest.mark.parametrize("attention_type", ["differential", "standard"])
@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention_gets_what_it_takes(attention_type, causal, monkeypatch):
    """A stand-in with FlashAttention's conditions: half precision, keys as wide as values, as many of each."""

    def flash(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        assert query.shape == key.shape == value.shape
        assert query.dtype == torch.bfloat16
        assert attention_mask is None
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=module.is_causal, scale=scaling
        )
        return output.transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", flash)
    module = attention(attention_type, causal).bfloat16()
    states = torch.randn(2, 33, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        module.config._attn_implementation = "flash_attention_2"
        found, maps = module(states)
        module.config._attn_implementation = "eager"
        expected, _ = module(states, causal_mask(33).bfloat16() if causal else None)
    assert maps is None
    assert relative_error(found.float(), expected.float()) <= HALF_PRECISION[torch.bfloat16]


@pytest.mark.parametrize("attention_type", ["differential", "standard"])
def test_flash_attention_is_refused_in_float32(attention_type):
    module = attention(attention_type, causal=False)
    module.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"flash_attention_2.*torch\.float32.*must be torch\.float16 or"):
        module(torch.randn(1, 5, 32))


def test_flash_attention_is_refused_for_wide_heads():
    with pytest.raises(ValueError, match="320 wide"):
        attention_diffclip.check_flash_attention(torch.zeros(1, 2, 5, 320, dtype=torch.bfloat16), "flash_attention_3")


def test_a_mask_for_each_head_is_taken_too():
    module = attention("differential", causal=False)
    states = torch.randn(2, 9, 32)
    mask = torch.randn(2, module.num_heads, 9, 9)
    found = {}
    for implementation in ("eager", "sdpa"):
        module.config._attn_implementation = implementation
        found[implementation] = {"output": module(states, mask)[0].detach()}
    assert_gradients_close(found["sdpa"], found["eager"])
