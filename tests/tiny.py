"""Tiny configurations and inputs for the tests."""

import torch

from diffclip_hf import DiffCLIPConfig, DiffCLIPModel


BOS, EOS, VOCABULARY, CONTEXT = 97, 98, 99, 77
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def tiny_config(vision: dict | None = None, text: dict | None = None, **kwargs) -> DiffCLIPConfig:
    """A differential model with 17 image tokens and up to 77 text tokens; `vision` and `text` override fields."""
    text_config = {
        **TOWER,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        **(text or {}),
    }
    vision_config = {**TOWER, "image_size": 32, "patch_size": 8, **(vision or {})}
    return DiffCLIPConfig(
        text_config=text_config,
        vision_config=vision_config,
        **{"projection_dim": 24, "attn_implementation": "eager"} | kwargs,
    )


def both(attention_type: str, **fields) -> dict:
    """Keyword arguments of `tiny_config` that set fields in both towers."""
    return {tower: {"attention_type": attention_type, **fields} for tower in ("vision", "text")}


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fill every parameter with numbers that differ from the defaults, λ vectors and norms too, in place."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.data = 1 + 0.1 * noise
        elif parameter.ndim < 2:
            parameter.data = (2.0 if name.endswith("logit_scale") else 0.0) + 0.2 * noise
        else:
            parameter.data = noise * parameter[0].numel() ** -0.5
    return model.eval()


def tiny_model(seed: int = 0, **kwargs) -> DiffCLIPModel:
    """A model with random weights, λ's among them."""
    return randomised(DiffCLIPModel(tiny_config(**kwargs)), seed)


def tiny_inputs(texts: int = 3, images: int = 3, length: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random images and right-padded texts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(1, BOS, (texts, length), generator=generator)
    input_ids[:, 0] = BOS
    attention_mask = torch.ones_like(input_ids)
    for row in range(texts):
        end = length - 1 - row
        input_ids[row, end] = EOS
        input_ids[row, end + 1 :] = 0
        attention_mask[row, end + 1 :] = 0
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "pixel_values": torch.randn(images, 3, 32, 32, generator=generator),
    }
