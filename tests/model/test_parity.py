"""The converted models give the original's numbers: golden files measured with the authors' code."""

import pytest
import torch
from parity_models import SIZES, VARIANTS, golden, parity_model
from tolerances import PARITY_WITH_ORIGINAL, relative_error

from diffclip_hf import DiffCLIPModel


@pytest.fixture(scope="module", params=[(v, s) for s in SIZES for v in VARIANTS], ids=lambda p: f"{p[0]}-{p[1]}")
def case(request):
    expected, _ = golden(*request.param)
    return parity_model(*request.param), expected


def outputs(model: DiffCLIPModel, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run the model on the golden inputs and return what the golden file has, under its names."""
    with torch.inference_mode():
        out = model(input_ids=expected["input_ids"], pixel_values=expected["pixel_values"], output_hidden_states=True)
    vision = torch.stack(out.vision_model_output.hidden_states[1:])
    text = torch.stack(out.text_model_output.hidden_states[1:])
    return {
        "image_embed": out.vision_model_output.pooler_output,
        "text_embed": out.text_model_output.pooler_output,
        "logits_per_image": out.logits_per_image,
        "vision_hidden_cls": vision[:, :, 0, :8],
        "vision_hidden_last_token": vision[:, :, -1, :8],
        "text_hidden_bos": text[:, :, 0, :8],
        "text_hidden_second": text[:, :, 1, :8],
    }


def errors(model: DiffCLIPModel, expected: dict[str, torch.Tensor]) -> dict[str, float]:
    return {key: relative_error(value, expected[key]) for key, value in outputs(model, expected).items()}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_output_is_the_originals(case, implementation):
    model, expected = case
    model.set_attn_implementation(implementation)
    found = errors(model, expected)
    print({key: f"{error:.1e}" for key, error in found.items()})
    assert max(found.values()) <= PARITY_WITH_ORIGINAL, found


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", ["diffclip", "diffclip-star", "diffclip-dagger"])
def test_pairing_first_half_with_second_half_is_caught(variant, implementation):
    """DiffLlama pairs head i with head i + H/2; a port that does so must not pass."""
    expected, _ = golden(variant, "tiny")
    model = parity_model(variant, "tiny")
    model.set_attn_implementation(implementation)
    for module in model.modules():
        if not hasattr(module, "lambda_q1"):
            continue
        # Let pair i = (2i, 2i+1) be made of what the checkpoint has as heads i and i + H/2.
        halves = torch.arange(module.num_heads).view(2, -1).t().flatten()
        for projection in (module.q_proj, module.k_proj):
            for parameter in (projection.weight, projection.bias):
                heads = parameter.data.unflatten(0, (module.num_heads, module.head_dim))
                parameter.data = heads[halves].flatten(0, 1)
    found = errors(model, expected)
    assert found["image_embed"] > 100 * PARITY_WITH_ORIGINAL, found
