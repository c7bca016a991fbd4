"""The original's measured values, and the weights that belong to them."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from diffclip_hf import DiffCLIPModel
from diffclip_hf.conversion.convert_original_checkpoint import convert_state_dict, infer_config, load_state_dict


FIXTURES = Path(__file__).parent / "fixtures"
VARIANTS = ("diffclip", "diffclip-star", "diffclip-dagger", "clip")
TENTHS = ("token_embedding.weight", "positional_embedding", "visual.pos_embed", "visual.cls_token")
SIZES = ("tiny", "vitb16")


def golden(variant: str, size: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Return the stored tensors, with the inputs, and the stored configuration."""
    with safe_open(FIXTURES / f"{variant}-{size}.golden.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open isn't iterable)
        config = json.loads(file.metadata()["config"])
    if "pixel_values" not in tensors:
        side = config["image_size"]
        tensors["pixel_values"] = torch.from_numpy(formula("pixel_values", (2, 3, side, side)).astype(np.float32))
    return tensors, config


def formula(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the standard normal float64 numbers that belong to a key."""
    return np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)


def formula_state_dict(variant: str) -> dict[str, torch.Tensor]:
    """Return the full-size weights, which are a formula of their original keys."""
    shapes = json.loads((FIXTURES / f"{variant}-vitb16.keys.json").read_text())
    return {key: torch.from_numpy(formula_weight(key, tuple(shape))) for key, shape in shapes.items()}


def formula_weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return one full-size weight in float32; the first rule that fits counts."""
    if key == "logit_scale":
        return np.array(np.log(1 / 0.07), dtype=np.float32)
    x = formula(key, shape)
    if key.endswith("diff_norm.weight") or (key.endswith(".weight") and len(shape) == 1):
        value = 1 + 0.1 * x
    elif key.endswith("bias"):
        value = 0.05 * x
    elif "lambda_" in key or key in TENTHS:
        value = 0.1 * x
    elif key in ("image_projection", "text_projection"):
        value = x * shape[0] ** -0.5
    else:
        value = x * np.prod(shape[1:]) ** -0.5
    return value.astype(np.float32)


def parity_model(variant: str, size: str) -> DiffCLIPModel:
    """Convert the weights that belong to a golden file."""
    _, config = golden(variant, size)
    state_dict = load_state_dict(FIXTURES / f"{variant}-tiny.pt") if size == "tiny" else formula_state_dict(variant)
    # Heads of a standard tower are in no checkpoint.
    text_heads = config["th"] if variant in ("diffclip-dagger", "clip") else None
    vision_heads = config["vh"] if variant == "clip" else None
    return convert_state_dict(
        state_dict, infer_config(state_dict, variant, text_heads=text_heads, vision_heads=vision_heads)
    )
