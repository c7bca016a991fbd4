"""The reference pass that conversions are measured against, itself measured against the original's golden values."""

import ast
from pathlib import Path

import pytest
import torch
from parity_models import FIXTURES, SIZES, VARIANTS, formula_state_dict, golden
from tolerances import PARITY_WITH_ORIGINAL, relative_error

from diffclip_hf.conversion import original_forward as reference
from diffclip_hf.conversion.convert_original_checkpoint import convert_state_dict, infer_config, load_state_dict
from diffclip_hf.conversion.convert_to_original import original_state_dict


def arguments(variant: str, config: dict) -> dict:
    """Return what the reference can't read off the keys."""
    lambda_init = "depth" if variant == "diffclip-star" else 0.8
    return {"lambda_init": lambda_init, "vision_heads": config["vh"], "text_heads": config["th"]}


def weights_of(variant: str, size: str) -> dict[str, torch.Tensor]:
    return load_state_dict(FIXTURES / f"{variant}-tiny.pt") if size == "tiny" else formula_state_dict(variant)


@pytest.fixture(scope="module", params=[(v, s) for s in SIZES for v in VARIANTS], ids=lambda p: f"{p[0]}-{p[1]}")
def case(request):
    return request.param, weights_of(*request.param)


def test_the_reference_gives_the_originals_numbers(case):
    (variant, size), weights = case
    expected, config = golden(variant, size)
    inputs = (expected["pixel_values"], expected["input_ids"])
    found = reference.original_forward(weights, *inputs, **arguments(variant, config))
    vision, text = found.pop("vision_hidden"), found.pop("text_hidden")
    found |= {"vision_hidden_cls": vision[:, :, 0, :8], "vision_hidden_last_token": vision[:, :, -1, :8]}
    found |= {"text_hidden_bos": text[:, :, 0, :8], "text_hidden_second": text[:, :, 1, :8]}
    errors = {name: relative_error(value, expected[name]) for name, value in found.items()}
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) <= PARITY_WITH_ORIGINAL, errors


def test_weights_come_back_bit_for_bit(case):
    """Through this port's keys and back, at both sizes; the files are tested by `test_convert_to_original`."""
    (variant, size), weights = case
    _, config = golden(variant, size)
    model = convert_state_dict(weights, infer_config(weights, variant, config["th"], config["vh"]))
    found = original_state_dict(model.state_dict(), model.config)
    assert found.keys() == weights.keys()
    for key, value in weights.items():
        assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape)
        # Bits, since equality of numbers takes −0 for 0.
        assert torch.equal(found[key].view(torch.int32), value.view(torch.int32)), key


@pytest.mark.parametrize("variant", ["diffclip-star", "clip"])
def test_what_the_keys_do_not_tell_matters(variant):
    expected, config = golden(variant, "tiny")
    inputs = (expected["pixel_values"], expected["input_ids"])
    wrong = {**arguments(variant, config), "lambda_init": 0.8, "vision_heads": 2}
    found = reference.original_forward(weights_of(variant, "tiny"), *inputs, **wrong)
    assert relative_error(found["image_embed"], expected["image_embed"]) > 100 * PARITY_WITH_ORIGINAL


def test_a_standard_tower_asks_for_its_heads():
    expected, _ = golden("clip", "tiny")
    inputs = (expected["pixel_values"], expected["input_ids"])
    with pytest.raises(ValueError, match="vision_heads is None"):
        reference.original_forward(weights_of("clip", "tiny"), *inputs)
    with pytest.raises(ValueError, match="text_heads is None"):
        reference.original_forward(weights_of("clip", "tiny"), *inputs, vision_heads=4)


def test_the_reference_shares_no_code_with_what_it_checks():
    tree = ast.parse(Path(reference.__file__).read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    found = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes}
    assert found == {"math", "collections.abc", "torch", "torch.nn"}
