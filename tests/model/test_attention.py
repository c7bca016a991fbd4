"""Differential attention against hand-worked numbers and a loop over the formula."""

import math

import pytest
import torch
from tiny import tiny_config
from tolerances import HALF_PRECISION, PARITY_WITH_ORIGINAL, assert_gradients_close, relative_error

from diffclip_hf import differential_attention_map
from diffclip_hf.model.attention_diffclip import compute_lambda
from diffclip_hf.model.layers_diffclip import DiffCLIPAttention, DiffCLIPDifferentialAttention, DiffCLIPRMSNorm


def attention(attention_type: str, causal: bool, layer_idx: int = 2, **fields) -> DiffCLIPAttention:
    """One attention module with random weights, λ's and norm among them."""
    config = tiny_config(
        text={"attention_type": attention_type, **fields}, vision={"attention_type": attention_type, **fields}
    )
    config = config.text_config if causal else config.vision_config
    torch.manual_seed(0)
    if attention_type == "differential":
        module = DiffCLIPDifferentialAttention(config, layer_idx)
        for vector in (module.lambda_q1, module.lambda_k1, module.lambda_q2, module.lambda_k2):
            torch.nn.init.normal_(vector, std=0.3)
        torch.nn.init.normal_(module.diff_norm.weight, mean=1, std=0.1)
    else:
        module = DiffCLIPAttention(config)
    return module.eval()


def causal_mask(length: int) -> torch.Tensor:
    return torch.full((length, length), -torch.inf).triu(1)[None, None]


def loop_over_the_formula(module: DiffCLIPDifferentialAttention, x: torch.Tensor, causal: bool) -> torch.Tensor:
    """The steps of the original, one head pair and one text at a time, in float64."""
    double = {name: value.double() for name, value in module.named_parameters()}
    d, pairs = module.head_dim, module.num_heads // 2
    lam = (
        math.exp(sum(a * b for a, b in zip(double["lambda_q1"].tolist(), double["lambda_k1"].tolist(), strict=True)))
        - math.exp(sum(a * b for a, b in zip(double["lambda_q2"].tolist(), double["lambda_k2"].tolist(), strict=True)))
        + module.lambda_init
    )
    results = []
    for row in x.double():
        q = row @ double["q_proj.weight"].T + double["q_proj.bias"]
        k = row @ double["k_proj.weight"].T + double["k_proj.bias"]
        v = row @ double["v_proj.weight"].T + double["v_proj.bias"]
        outputs = []
        for pair in range(pairs):
            maps = []
            for head in (2 * pair, 2 * pair + 1):
                columns = slice(head * d, (head + 1) * d)
                scores = q[:, columns] @ k[:, columns].T / math.sqrt(d)
                if causal:
                    scores = scores + causal_mask(len(row))[0, 0].double()
                maps.append(torch.exp(scores) / torch.exp(scores).sum(-1, keepdim=True))
            o = (maps[0] - lam * maps[1]) @ v[:, pair * 2 * d : (pair + 1) * 2 * d]
            o = o / torch.sqrt((o**2).mean(-1, keepdim=True) + 1e-5) * double["diff_norm.weight"]
            outputs.append(o * (1 - module.lambda_init))
        results.append(torch.cat(outputs, -1) @ double["out_proj.weight"].T + double["out_proj.bias"])
    return torch.stack(results)


def test_lambda_by_hand():
    value = compute_lambda(
        torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.1]), torch.tensor([0.2, 0.0]), torch.tensor([3.0, 9.0]), 0.8
    )
    assert value.item() == pytest.approx(math.exp(0.7) - math.exp(0.6) + 0.8, rel=1e-6)


def test_lambda_is_float32_in_half_precision():
    vectors = [torch.full((64,), 0.1, dtype=torch.bfloat16) for _ in range(4)]
    assert compute_lambda(*vectors, 0.8).dtype == torch.float32
    assert attention("differential", causal=False).bfloat16().get_lambda().dtype == torch.float32


def test_differential_map_by_hand():
    maps = torch.tensor([[[0.25, 0.75]], [[0.5, 0.5]], [[1.0, 0.0]], [[0.1, 0.9]]])[None]
    expected = torch.tensor([[[0.0, 0.5]], [[0.95, -0.45]]])[None]
    torch.testing.assert_close(differential_attention_map(maps, 0.5), expected)
    torch.testing.assert_close(differential_attention_map(maps, torch.tensor(0.5)), expected)


@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (4, 2, 2)])
def test_differential_map_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="even num_heads"):
        differential_attention_map(torch.zeros(shape), 0.5)


def test_rms_norm_by_hand():
    norm = DiffCLIPRMSNorm(2, eps=0.5)
    norm.weight.data = torch.tensor([1.0, 3.0])
    # mean square 12.5, with eps 13
    expected = torch.tensor([3 / math.sqrt(13), 12 / math.sqrt(13)])
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0])), expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("batch", "length"), [(2, 5), (1, 77), (1, 197)])
def test_differential_attention_is_the_formula(batch, length, causal, implementation):
    module = attention("differential", causal, lambda_init="depth")
    module.config._attn_implementation = implementation
    x = torch.randn(batch, length, 32)
    mask = causal_mask(length) if causal and implementation == "eager" else None
    with torch.no_grad():
        output, maps = module(x, mask)
    assert relative_error(output.double(), loop_over_the_formula(module, x, causal)) <= PARITY_WITH_ORIGINAL
    assert (maps is None) == (implementation == "sdpa")


@pytest.mark.parametrize("attention_type", ["differential", "standard"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 77, 197])
def test_sdpa_equals_eager_in_outputs_and_gradients(attention_type, causal, length):
    module = attention(attention_type, causal)
    x = torch.randn(2, length, 32)
    target = torch.randn(2, length, 32)
    found = {}
    for implementation in ("eager", "sdpa"):
        module.config._attn_implementation = implementation
        module.zero_grad()
        states = x.clone().requires_grad_()
        output, _ = module(states, causal_mask(length) if causal and implementation == "eager" else None)
        (output * target).sum().backward()
        gradients = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
        found[implementation] = {"output": output.detach(), "input": states.grad, **gradients}
    assert_gradients_close(found["sdpa"], found["eager"])


def test_gradients_are_the_formulas():
    """λ's and the norm's gradients too, against automatic differentiation of nothing but the formula's loop."""
    module = attention("differential", causal=False)
    x = torch.randn(1, 7, 32)
    target = torch.randn(1, 7, 32)

    def loss_at(name: str, index: int, step: float) -> float:
        parameter = dict(module.named_parameters())[name]
        kept = parameter.data.clone()
        parameter.data.view(-1)[index] += step
        value = (loop_over_the_formula(module, x, causal=False) * target.double()).sum().item()
        parameter.data = kept
        return value

    (module(x)[0] * target).sum().backward()
    for name, parameter in module.named_parameters():
        if not parameter.numel() or "bias" in name:
            continue
        for index in (0, parameter.numel() - 1):
            step = 1e-3
            numeric = (loss_at(name, index, step) - loss_at(name, index, -step)) / (2 * step)
            assert parameter.grad.view(-1)[index].item() == pytest.approx(numeric, rel=2e-3, abs=2e-4), name


def test_dropout_falls_on_each_map_before_the_subtraction():
    module = attention("differential", causal=False, attention_dropout=0.5).train()
    x = torch.randn(1, 6, 32)
    torch.manual_seed(3)
    output, maps = module(x)
    torch.testing.assert_close(maps.sum(-1), torch.ones(1, 4, 6))  # what is returned is before dropout
    torch.manual_seed(3)
    dropped = torch.nn.functional.dropout(maps, 0.5)
    difference = dropped[:, 0::2] - module.get_lambda() * dropped[:, 1::2]
    value = module.v_proj(x).view(1, 6, 2, 16).transpose(1, 2)
    pairs = module.diff_norm((difference @ value).transpose(1, 2)) * (1 - module.lambda_init)
    torch.testing.assert_close(output, module.out_proj(pairs.reshape(1, 6, 32)))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near_float32_and_finite_on_large_scores(dtype, implementation):
    module = attention("differential", causal=False)
    module.config._attn_implementation = implementation
    x = torch.randn(2, 33, 32)
    with torch.no_grad():
        expected, _ = module(x)
        output, _ = module.to(dtype)(x.to(dtype))
        extreme, _ = module(100 * x.to(dtype))
    assert relative_error(output.float(), expected) <= HALF_PRECISION[dtype]
    assert extreme.isfinite().all()
