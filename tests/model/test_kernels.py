"""The fused Triton kernels against the eager form in float64; without CUDA in Triton's interpreter (conftest.py)."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_inputs, tiny_model
from tolerances import FUSED_KERNELS, FUSED_KERNELS_LAMBDA, assert_gradients_close


triton = pytest.importorskip("triton")

from transformers.dynamic_module_utils import get_imports  # noqa: E402

from diffclip_hf.model import kernels_diffclip  # noqa: E402
from diffclip_hf.model.attention_diffclip import eager_differential_attention_forward  # noqa: E402
from diffclip_hf.model.kernels_diffclip import fused_differential_attention  # noqa: E402


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("query", "key", "value", "lambda_value", "norm_weight")
NORM_EPS, OUTPUT_SCALE = 1e-5, 0.2


def inputs(batch: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> dict:
    """Leaves as the model has them before their heads are split, λ, and a norm's weight."""
    generator = torch.Generator().manual_seed(tokens + head_dim)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    leaves = {name: random(batch, tokens, heads * head_dim).to(dtype) for name in ("query", "key", "value")}
    leaves["lambda_value"] = torch.tensor(0.7)
    leaves["norm_weight"] = (1 + 0.1 * random(2 * head_dim)).to(dtype)
    return {name: leaf.to(DEVICE).requires_grad_() for name, leaf in leaves.items()}


def split(leaves: dict, head_dim: int) -> dict:
    """Split the heads by the views that the model makes."""
    widths = {"query": head_dim, "key": head_dim, "value": 2 * head_dim}
    heads = {name: leaves[name].unflatten(-1, (-1, width)).transpose(1, 2) for name, width in widths.items()}
    return {**leaves, **heads}


def eager(query, key, value, attention_mask, lambda_value, norm_weight, *, scaling, is_causal, norm_eps, output_scale):
    """The reference: the eager function and the norm's formula; zero in rows that may see no key."""
    tokens = query.shape[2]
    if attention_mask is None and is_causal:
        attention_mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()[None, None]
    bias, sees = None, torch.ones((), dtype=torch.bool, device=query.device)
    if attention_mask is not None:
        bias = torch.zeros(attention_mask.shape, dtype=query.dtype, device=query.device)
        bias = bias.masked_fill(~attention_mask, torch.finfo(query.dtype).min)
        sees = attention_mask.any(-1).transpose(1, 2)[..., None]
    output, _ = eager_differential_attention_forward(
        torch.nn.Module(), query, key, value, bias, lambda_value.to(query.dtype), scaling
    )
    wide = output if output.dtype == torch.float64 else output.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm_eps)
    return torch.where(sees, norm_weight * wide.to(output.dtype) * output_scale, 0.0)


def options(head_dim: int, is_causal: bool = False) -> dict:
    return {
        "scaling": head_dim**-0.5,
        "is_causal": is_causal,
        "norm_eps": NORM_EPS,
        "output_scale": OUTPUT_SCALE,
    }


def outputs_and_gradients(function, leaves: dict, head_dim: int, mask, is_causal: bool) -> dict[str, torch.Tensor]:
    """Run a form forward and backward on copies of the leaves."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    output = function(attention_mask=mask, **split(leaves, head_dim), **options(head_dim, is_causal))
    generator = torch.Generator().manual_seed(0)
    output.backward(torch.randn(output.shape, generator=generator).to(output))
    return {"output": output.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def errors(actual: dict, expected: dict) -> dict[str, float]:
    """The largest error of each tensor over its largest magnitude, or over that of all where its own vanishes."""
    largest = max(tensor.abs().max().item() for tensor in expected.values())
    found = {}
    for name, tensor in expected.items():
        assert actual[name].isfinite().all(), name
        scale = tensor.abs().max().item()
        # With one token the softmax has no gradient at all; for λ see tolerances.py.
        if scale < 1e-12 * largest or name == "lambda_value":
            scale = largest
        found[name] = (actual[name] - tensor).abs().max().item() / scale
    return found


def check(leaves: dict, head_dim: int, mask=None, is_causal: bool = False) -> None:
    """Compare the kernels with eager in float64, and in half precision with the error of eager itself."""
    dtype = leaves["query"].dtype
    doubles = {name: leaf.double() for name, leaf in leaves.items()}
    expected = outputs_and_gradients(eager, doubles, head_dim, mask, is_causal)
    actual = outputs_and_gradients(fused_differential_attention, leaves, head_dim, mask, is_causal)
    assert actual["output"].is_contiguous()
    assert actual["output"].dtype == dtype
    allowed = dict.fromkeys(expected, FUSED_KERNELS[dtype]) | {"lambda_value": FUSED_KERNELS_LAMBDA[dtype]}
    if dtype != torch.float32:
        of_eager = errors(outputs_and_gradients(eager, leaves, head_dim, mask, is_causal), expected)
        allowed = {name: max(tolerance, 2 * of_eager[name]) for name, tolerance in allowed.items()}
    found = errors(actual, expected)
    assert {name: f"{error:.1e}" for name, error in found.items() if error > allowed[name]} == {}


def padding_mask(batch: int, tokens: int, side: str) -> torch.Tensor:
    """Row b of the batch misses 5·b tokens on one side, (batch, 1, 1, tokens)."""
    positions = torch.arange(tokens)
    missing = 5 * torch.arange(batch)[:, None]
    kept = positions >= missing if side == "left" else positions < tokens - missing
    return kept[:, None, None].to(DEVICE)


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "head_dim", "is_causal"),
    [
        (1, 1, 2, 64, False),
        (3, 1, 4, 32, True),
        (1, 16, 4, 48, True),
        (3, 16, 2, 8, False),
        (3, 33, 4, 32, False),
        (1, 33, 2, 128, True),
        (1, 33, 2, 80, False),
        (3, 77, 4, 64, True),
        (1, 77, 2, 128, False),
        (1, 197, 2, 64, False),
        (1, 197, 2, 48, True),
    ],
)
def test_float32(batch, tokens, heads, head_dim, is_causal):
    check(inputs(batch, tokens, heads, head_dim), head_dim, is_causal=is_causal)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "head_dim", "is_causal"),
    [
        (1, 16, 2, 32, True),
        (1, 33, 4, 48, False),
        (3, 77, 2, 64, True),
        (1, 33, 2, 128, False),
        (1, 197, 2, 64, False),
    ],
)
def test_half_precision(batch, tokens, heads, head_dim, is_causal, dtype):
    check(inputs(batch, tokens, heads, head_dim, dtype), head_dim, is_causal=is_causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side, dtype):
    check(inputs(3, 33, 2, 64, dtype), 64, padding_mask(3, 33, side))


def test_a_mask_is_complete_whatever_is_causal_says():
    leaves = inputs(1, 16, 2, 32)
    mask = padding_mask(1, 16, "right")
    with torch.no_grad():
        with_flag, without_flag = (
            fused_differential_attention(attention_mask=mask, **split(leaves, 32), **options(32, flag))
            for flag in (True, False)
        )
    assert torch.equal(with_flag, without_flag)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_left_padding_with_causality_leaves_rows_without_keys(dtype):
    """The mask of a causal tower with left padding: a padded query sees nothing, has 0 and gives no gradient."""
    causal = torch.ones(33, 33, dtype=torch.bool, device=DEVICE).tril()
    mask = padding_mask(3, 33, "left") & causal
    assert not mask.any(-1).all()
    leaves = inputs(3, 33, 2, 64, dtype)
    check(leaves, 64, mask)
    found = outputs_and_gradients(fused_differential_attention, leaves, 64, mask, False)
    without = ~mask.any(-1).squeeze(1)
    assert (found["output"][without] == 0).all()
    assert (found["query"][without] == 0).all()


def test_mask_of_two_dimensions():
    mask = (torch.arange(16)[:, None] + torch.arange(16) * 3) % 4 != 0
    leaves = inputs(3, 16, 2, 32)
    found = outputs_and_gradients(fused_differential_attention, leaves, 32, mask.to(DEVICE), False)
    expected = outputs_and_gradients(fused_differential_attention, leaves, 32, mask[None, None].to(DEVICE), False)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    check(leaves, 32, mask[None, None].to(DEVICE))


def test_any_strides():
    """Slices of one fused projection, channels that aren't adjacent, and a gradient that is one number expanded."""
    head_dim = 32
    joint = torch.randn(2, 16, 3 * 4 * head_dim, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    query, key, value = joint.chunk(3, dim=-1)
    tensors = split({"query": query, "key": key, "value": value}, head_dim)
    tensors["value"] = tensors["value"].transpose(2, 3).contiguous().transpose(2, 3)
    rest = inputs(2, 16, 4, head_dim)
    others = {name: rest[name].detach() for name in ("lambda_value", "norm_weight")}
    found = {}
    for function, dtype in ((fused_differential_attention, torch.float32), (eager, torch.float64)):
        used = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in {**tensors, **others}.items()}
        assert used["value"].stride(-1) != 1
        function(attention_mask=None, **used, **options(head_dim)).sum().backward()
        found[dtype] = {name: tensor.grad for name, tensor in used.items()}
    assert max(errors(found[torch.float32], found[torch.float64]).values()) <= FUSED_KERNELS[torch.float32]


def test_scores_that_overflow_exp_stay_finite():
    leaves = inputs(1, 33, 2, 64, torch.bfloat16)
    leaves["query"] = 100 * leaves["query"].detach()
    found = outputs_and_gradients(fused_differential_attention, leaves, 64, None, False)
    assert all(tensor.isfinite().all() for tensor in found.values())


def test_weight_of_the_norm_in_float32_beside_bfloat16():
    """What autocast makes of a float32 model."""
    leaves = inputs(1, 16, 2, 32, torch.bfloat16)
    leaves["norm_weight"] = leaves["norm_weight"].detach().float()
    found = outputs_and_gradients(fused_differential_attention, leaves, 32, None, False)
    assert found["output"].dtype == torch.bfloat16
    assert found["norm_weight"].dtype == found["lambda_value"].dtype == torch.float32


def test_without_gradients_the_output_is_the_same():
    leaves = inputs(1, 33, 2, 64)
    arguments = {"attention_mask": None, **split(leaves, 64), **options(64)}
    with torch.no_grad():
        output = fused_differential_attention(**arguments)
    assert torch.equal(output, fused_differential_attention(**arguments))


def test_compiles_into_one_graph_with_dynamic_shapes():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(leaves: dict) -> torch.Tensor:
        return fused_differential_attention(attention_mask=None, **split(leaves, 32), **options(32, True))

    for batch, tokens in ((2, 16), (3, 33)):
        leaves = inputs(batch, tokens, 4, 32)
        with torch.compiler.set_stance("default" if tokens == 16 else "fail_on_recompile"):
            output = compiled(leaves)
        generator = torch.Generator().manual_seed(0)
        output.backward(torch.randn(output.shape, generator=generator).to(output))
        expected = outputs_and_gradients(fused_differential_attention, leaves, 32, None, True)
        assert torch.equal(output, expected["output"])
        assert all(torch.equal(leaf.grad, expected[name]) for name, leaf in leaves.items())


# opcheck itself looks at the gradients of its clones.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("masked", [False, True])
def test_operators_keep_their_promises(masked):
    leaves = inputs(2, 5, 2, 16)
    mask = padding_mask(2, 5, "right") if masked else None
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in split(leaves, 16).items()}
    arguments = [tensors["query"], tensors["key"], tensors["value"], mask, leaves["lambda_value"]]
    arguments += [leaves["norm_weight"], 0.25, not masked, NORM_EPS, OUTPUT_SCALE, True]
    torch.library.opcheck(kernels_diffclip._forward, arguments)
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    output, *saved = kernels_diffclip._forward(*detached)
    torch.library.opcheck(
        kernels_diffclip._backward, [torch.ones_like(output), *detached[:6], *saved, *detached[6:10]]
    )


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("query", lambda x: x[:, :3], r"query has shape \(2, 3, 5, 16\).*even num_heads"),
        ("query", lambda x: x[0], r"query has shape \(4, 5, 16\)"),
        ("query", lambda x: x.double(), "query has dtype torch.float64.*float32"),
        ("query", lambda x: x.repeat(1, 1, 1, 9), "head_dim is 144; it must be from 1 to 128"),
        ("key", lambda x: x[:, :, :4], r"key has shape \(2, 4, 4, 16\); it must be \(2, 4, 5, 16\)"),
        ("key", lambda x: x.half(), "key has dtype torch.float16.*float32"),
        ("key", lambda x: x.to("meta"), "key is on meta; it must be on"),
        ("value", lambda x: x[..., :16], r"value has shape .* it must be \(2, 2, 5, 32\)"),
        ("lambda_value", lambda x: x[None], r"lambda_value has shape \(1,\); it must be \(\)"),
        ("lambda_value", lambda x: x.half(), "lambda_value has dtype torch.float16"),
        ("norm_weight", lambda x: x[1:], r"norm_weight has shape \(31,\); it must be \(32,\)"),
        ("attention_mask", lambda x: x.float(), "attention_mask has dtype torch.float32; it must be torch.bool"),
        ("attention_mask", lambda x: x[..., :4], r"attention_mask has shape .*broadcastable to \(2, 1, 5, 5\)"),
        ("attention_mask", lambda x: x.expand(2, 4, 5, 5), r"attention_mask has shape \(2, 4, 5, 5\)"),
        ("attention_mask", lambda x: x[None], r"attention_mask has shape \(1, 2, 1, 1, 5\)"),
        ("attention_mask", lambda x: x.to("meta"), "attention_mask is on meta"),
    ],
)
def test_refuses(name, change, message):
    arguments = {"attention_mask": padding_mask(2, 5, "right"), **split(inputs(2, 5, 4, 16), 16)}
    with pytest.raises(ValueError, match=message):
        fused_differential_attention(**{**arguments, name: change(arguments[name])}, **options(16))


def test_refuses_the_cpu_outside_the_interpreter(monkeypatch):
    monkeypatch.setattr(kernels_diffclip, "_INTERPRETED", False)
    arguments = {name: tensor.cpu() for name, tensor in split(inputs(1, 1, 2, 16), 16).items()}
    with pytest.raises(ValueError, match="query is on cpu; it must be on a cuda device"):
        fused_differential_attention(attention_mask=None, **arguments, **options(16))


def second_copy(name: str):
    """Load the file once more under another name, as Transformers does with a copy beside a checkpoint."""
    spec = importlib.util.spec_from_file_location(name, kernels_diffclip.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_copy_beside_a_checkpoint_has_its_own_operators():
    copy = second_copy("transformers_modules.some-owner.v1_0.kernels_diffclip")
    assert copy._forward._qualname != kernels_diffclip._forward._qualname
    leaves = inputs(1, 5, 2, 16)
    found = outputs_and_gradients(copy.fused_differential_attention, leaves, 16, None, True)
    expected = outputs_and_gradients(fused_differential_attention, leaves, 16, None, True)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_without_triton_the_file_loads_and_the_call_says_what_is_missing(monkeypatch):
    assert "triton" not in get_imports(kernels_diffclip.__file__)
    monkeypatch.setitem(sys.modules, "triton", None)
    copy = second_copy("kernels_without_triton")
    with pytest.raises(ImportError, match="pip install triton"):
        copy.fused_differential_attention(attention_mask=None, **split(inputs(1, 1, 2, 16), 16), **options(16))


# Each card with every width and a dtype of its own; the other pairs of card and dtype take six minutes more.
PAIRED = {80: "float16", 90: "bfloat16", 120: "float32"}


@pytest.mark.parametrize(
    ("architecture", "head_dims", "dtypes"),
    [
        (90, "64", "bfloat16"),
        *(
            pytest.param(
                architecture,
                "8,32,48,64,80,128",
                dtype,
                marks=[pytest.mark.slow] + [pytest.mark.exhaustive] * (PAIRED[architecture] != dtype),
            )
            for architecture in PAIRED
            for dtype in ("float32", "bfloat16", "float16")
        ),
    ],
)
def test_compiles_for_a_card_that_is_not_there(architecture, head_dims, dtypes, tmp_path):
    """Triton's compiler takes the kernels, and their shared memory fits a consumer card; how fast they are is open."""
    script = Path(__file__).parents[1].joinpath("compile_kernels.py")
    source = str(Path(kernels_diffclip.__file__).parents[2])
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, str(script), str(architecture), head_dims, dtypes],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", FUSED_KERNELS)
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "head_dim", "is_causal"),
    [(64, 197, 12, 64, False), (64, 77, 8, 64, True), (8, 577, 8, 128, False), (8, 257, 16, 80, False)],
)
def test_on_a_card(batch, tokens, heads, head_dim, is_causal, dtype):
    leaves = inputs(batch, tokens, heads, head_dim, dtype)
    check(leaves, head_dim, is_causal=is_causal)
    first, second = (
        outputs_and_gradients(fused_differential_attention, leaves, head_dim, None, is_causal) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_model_under_the_fused_kernels_is_the_eager_one(side):
    """By `attn_implementation`, with padding, in both towers; one of them standard."""
    model = tiny_model(text={"attention_type": "differential"}, vision={"attention_type": "standard"}).to(DEVICE)
    inputs = {name: tensor.to(DEVICE) for name, tensor in tiny_inputs(length=9).items()}
    if side == "left":
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        shifts = (ids.shape[1] - mask.sum(-1)).tolist()
        for name, tensor in (("input_ids", ids), ("attention_mask", mask)):
            inputs[name] = torch.stack([row.roll(shift) for row, shift in zip(tensor, shifts, strict=True)])
    found = {}
    for implementation in ("eager", "differential_triton"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        output = model(**inputs, return_loss=True)
        output.loss.backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        found[implementation] = {"logits": output.logits_per_image.detach(), **gradients}
    assert_gradients_close(found["differential_triton"], found["eager"])


def test_dropout_is_refused():
    model = tiny_model(text={"attention_dropout": 0.1}, attn_implementation="differential_triton").to(DEVICE).train()
    inputs = tiny_inputs(length=9)
    with pytest.raises(
        ValueError, match=r"attention_dropout is 0\.1; under attn_implementation='differential_triton'"
    ):
        model.get_text_features(inputs["input_ids"].to(DEVICE))
