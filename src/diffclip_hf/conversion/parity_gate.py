"""Measure a converted folder, loaded as a user would load it, against the original's forward pass."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from diffclip_hf import DiffCLIPConfig, DiffCLIPImageProcessorPil, DiffCLIPModel, DiffCLIPProcessor

from .original_checkpoint import ConversionError
from .original_forward import original_forward


logger = logging.getLogger("convert_original_checkpoint")

# Of the largest magnitude of each output. A correct port departs by some 1e-6, one with a fault by 1e-2 and more.
MAX_ERROR = 1e-4
IMPLEMENTATIONS = ("eager", "sdpa")
PICTURES = Path(__file__).parents[3] / "embedded" / "pictures"
TEXTS = ["a photo of a dog", "a drawing of a slice of pizza", "A rocket, flying to the Moon!"]
Inputs = dict[str, torch.Tensor]


def random_inputs(config: DiffCLIPConfig) -> Inputs:
    """Return two images of noise and three texts of random tokens, the longest filling the context, padded with 0."""
    generator = torch.Generator().manual_seed(0)
    vision, text = config.vision_config, config.text_config
    pixel_values = torch.randn(2, vision.num_channels, vision.image_size, vision.image_size, generator=generator)
    length, start = text.max_position_embeddings, text.bos_token_id
    end: Any = text.eos_token_id
    # Below the end's id first: where texts are pooled at the largest id, there is no larger one.
    words = [token for token in range(1, end) if token != start] or [
        token for token in range(text.vocab_size) if token not in (start, end)
    ]
    input_ids = torch.tensor(words)[torch.randint(len(words), (3, length), generator=generator)]
    if start is not None:
        input_ids[:, 0] = start
    for row, place in enumerate((length - 1, length // 2, min(2, length - 1))):
        input_ids[row, place] = end
        input_ids[row, place + 1 :] = 0
    return {"pixel_values": pixel_values, "input_ids": input_ids}


def pictures() -> list[Image.Image]:
    """Return two pictures of the embedded model's, or, where only this folder is at hand, a drawn one."""
    paths = sorted(PICTURES.glob("*.png"))[:2]
    if paths:
        return [Image.open(path).convert("RGB") for path in paths]
    picture = Image.linear_gradient("L").resize((320, 240)).convert("RGB")
    ImageDraw.Draw(picture).ellipse((60, 40, 200, 180), fill=(200, 60, 30))
    return [picture]


def real_inputs(folder: Path, config: DiffCLIPConfig) -> Inputs | None:
    """Return what the folder's own processor makes of pictures and texts, or None where the folder has none.

    Without a tokenizer the token ids are those of `random_inputs`.
    """
    if (folder / "processor_config.json").is_file():
        processor = DiffCLIPProcessor.from_pretrained(folder)
        inputs = processor(text=TEXTS, images=pictures(), return_tensors="pt")
        return {key: inputs[key] for key in ("pixel_values", "input_ids", "attention_mask")}
    if (folder / "preprocessor_config.json").is_file():
        image_processor = DiffCLIPImageProcessorPil.from_pretrained(folder)
        pixel_values = image_processor(images=pictures(), return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixel_values, "input_ids": random_inputs(config)["input_ids"]}
    return None


def reference_outputs(state_dict: Mapping[str, torch.Tensor], config: DiffCLIPConfig, inputs: Inputs) -> Inputs:
    """Return what the original computes; of the configuration, only what its keys don't tell is used.

    Args:
        state_dict: Original key → tensor.
        config: Of the converted model, for λ_init and the heads of standard towers.
        inputs: `pixel_values` and `input_ids`.
    """
    lambda_init = config.vision_config.lambda_init
    if not isinstance(lambda_init, str | float) or config.text_config.lambda_init != lambda_init:
        raise ValueError(f"lambda_init is {lambda_init} in vision; it must be one number or a name, in both towers.")
    return original_forward(
        state_dict,
        inputs["pixel_values"],
        inputs["input_ids"],
        lambda_init,
        config.vision_config.num_attention_heads,
        config.text_config.num_attention_heads,
    )


@torch.inference_mode()
def converted_outputs(model: Any, inputs: Mapping[str, Any]) -> Inputs:
    """Return what the converted model computes, under the reference's names."""
    out = model(**inputs, output_hidden_states=True)
    return {
        "image_embed": out.vision_model_output.pooler_output,
        "text_embed": out.text_model_output.pooler_output,
        "logits_per_image": out.logits_per_image,
        "vision_hidden": torch.stack(out.vision_model_output.hidden_states[1:]),
        "text_hidden": torch.stack(out.text_model_output.hidden_states[1:]),
    }


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest absolute difference over the largest magnitude expected; NaN where either holds NaN."""
    if found.shape != expected.shape:
        raise ConversionError(f"An output has shape {tuple(found.shape)}; the original's is {tuple(expected.shape)}.")
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)).item()


def output_errors(found: Inputs, expected: Inputs, inputs: Inputs) -> dict[str, float]:
    """Return each output's error; that of the hidden states is the worst block's, over the tokens of a text alone."""
    errors = {}
    for name, reference in expected.items():
        if not name.endswith("_hidden"):
            errors[name] = relative_error(found[name], reference)
            continue
        kept = torch.ones(reference.shape[1:3], dtype=torch.bool)
        if name == "text_hidden" and "attention_mask" in inputs:
            # The original has no padding mask, so what stands at padding differs, and is used by neither.
            kept = inputs["attention_mask"].bool()
        blocks = zip(found[name], reference, strict=True)
        # Not max(), which passes over NaN.
        errors[name] = torch.tensor([relative_error(ours[kept], theirs[kept]) for ours, theirs in blocks]).max().item()
    return errors


def measure(
    model: Any, all_inputs: Mapping[str, Inputs], expected: Mapping[str, Inputs], limit: float = MAX_ERROR
) -> dict[str, Any]:
    """Compare a model with the reference, under every attention implementation.

    Args:
        model: A `DiffCLIPModel`, or a `CLIPModel`.
        all_inputs: Name of a set of inputs → inputs.
        expected: The same names → the reference's outputs.
        limit: The largest error that is allowed, of an output's largest magnitude.

    Returns:
        For the report: the limit, the largest error and every error.

    Raises:
        ConversionError: An error is beyond the limit, or an output holds NaN.
    """
    errors: dict[str, dict[str, dict[str, float]]] = {}
    for name, inputs in all_inputs.items():
        errors[name] = {}
        for implementation in IMPLEMENTATIONS:
            model.set_attn_implementation(implementation)
            errors[name][implementation] = output_errors(converted_outputs(model, inputs), expected[name], inputs)
    flat = {
        f"{output} ({name} inputs, {implementation})": error
        for name, by_implementation in errors.items()
        for implementation, by_output in by_implementation.items()
        for output, error in by_output.items()
    }
    # NaN is not below the limit.
    over = [f"{name} by {error:.1e}" for name, error in flat.items() if not error <= limit]
    if over:
        raise ConversionError(
            f"The converted model departs from the original by more than {limit:g} of the largest magnitude, so "
            f"nothing is written: {'; '.join(over)}."
        )
    largest = max(flat, key=lambda name: flat[name])
    logger.info("The largest error against the original is %.1e, of %s.", flat[largest], largest)
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "limit": limit,
        "largest_error": flat[largest],
        "errors": errors,
        "error_is": "largest absolute difference / largest magnitude of the original's output",
    }


def count_parameters(model: Any) -> dict[str, int]:
    """Return how many parameters a whole model and its towers have."""
    towers = {"total": model, "vision": model.vision_model, "text": model.text_model}
    return {name: tower.num_parameters() for name, tower in towers.items()}


def run_gate(folder: Path, all_inputs: Mapping[str, Inputs], expected: Mapping[str, Inputs]) -> dict[str, Any]:
    """Load the folder and compare it with the reference, as `measure` does, in float32.

    Args:
        folder: What the conversion wrote.
        all_inputs, expected: As in `measure`.

    Returns:
        For the report: what `measure` returns, and the λ of each layer of a differential tower.

    Raises:
        ConversionError: As `measure` raises it.
    """
    model = DiffCLIPModel.from_pretrained(folder, dtype=torch.float32)
    return {
        "gate": measure(model, all_inputs, expected),
        "lambda": {"vision": _lambdas(model.vision_model), "text": _lambdas(model.text_model)},
        "parameters": count_parameters(model),
    }


@torch.inference_mode()
def _lambdas(tower: torch.nn.Module) -> list[dict[str, float]] | None:
    """Return λ_init and λ of each layer of a differential tower, None for a standard one."""
    attentions = [layer.self_attn for layer in tower.encoder.layers]
    if tower.config.attention_type == "standard":
        return None
    return [
        {"lambda_init": attention.lambda_init, "lambda": attention.get_lambda().item()} for attention in attentions
    ]
