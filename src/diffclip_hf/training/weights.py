"""What training asks of a model's weights: the dtype, the logit scale and λ, whatever wraps the model."""

import logging
import math
import re
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor


logger = logging.getLogger(__name__)
MAX_LOGIT_SCALE = math.log(100)
_LAYER = re.compile(r"(text_model|vision_model)\.encoder\.layers\.(\d+)\.")


def contrastive_model(model: nn.Module) -> Any | None:
    """Return the `DiffCLIPModel` inside what DDP, FSDP2, PEFT or torch.compile made of it, or None without one.

    It's known by its parameter: code that travels with a checkpoint has classes of its own.
    """
    for module in model.modules():
        if "logit_scale" in dict(module.named_parameters(recurse=False)):
            return module
    return None


def logit_scale_value(model: nn.Module) -> torch.Tensor:
    """Return a contrastive model's logit scale, detached, float32 without dimensions; under FSDP2 in every process."""
    scale = whole(contrastive_model(model).logit_scale.detach())
    return scale.float().reshape(())


def clamp_logit_scale(model: nn.Module) -> None:
    """Keep a contrastive model's logit scale within 0 and ln 100, in place, if it's trained at all.

    Source: Radford et al. 2021 (CLIP), section 2.5; SLIP's `main.py` for the lower bound.
    """
    parameter = contrastive_model(model).logit_scale
    if parameter.requires_grad:
        with torch.no_grad():
            parameter.clamp_(0, MAX_LOGIT_SCALE)


def layer_lambdas(model: nn.Module) -> dict[str, float]:
    """Return the present λ of each differential layer, as {"lambda/text_model.0": …}; under FSDP2 in every process."""
    lambdas = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if hasattr(module, "get_lambda") and (match := _LAYER.search(name)):
                lambdas[f"lambda/{match[1]}.{match[2]}"] = whole(module.get_lambda())
    # One copy from the device rather than one a layer.
    values = torch.stack(list(lambdas.values())).tolist() if lambdas else []
    return dict(zip(lambdas, values, strict=True))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that FSDP2 may have shared out among processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def to_float32(model: nn.Module) -> None:
    """Make a model's weights float32 if they are in half precision, in which small updates are lost."""
    half = {parameter.dtype for parameter in model.parameters()} & {torch.float16, torch.bfloat16}
    if half:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in half))
        logger.warning(
            "The model's weights are %s; they're trained in float32. For half precision's speed pass bf16=True, which "
            "computes in bfloat16 and keeps the weights in float32.",
            names,
        )
        model.float()


def give_logit_scale_a_dimension(model: nn.Module) -> None:
    """Make a contrastive model's logit scale of shape (1,), since FSDP2 shards no parameter without dimensions."""
    if (core := contrastive_model(model)) is not None:
        parameter = core.logit_scale
        core.logit_scale = nn.Parameter(parameter.detach().reshape(1), requires_grad=parameter.requires_grad)


def take_logit_scales_dimension(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state with the logit scale as it is without FSDP2, of shape ()."""
    return {
        name: tensor.reshape(()) if name.split(".")[-1] == "logit_scale" else tensor
        for name, tensor in state_dict.items()
    }


def all_finite(model: nn.Module) -> torch.Tensor:
    """Say whether every weight of this process is finite: bool, without dimensions."""
    parameters = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return torch.stack([torch.isfinite(parameter.detach()).all() for parameter in parameters]).all()


__all__ = [
    "MAX_LOGIT_SCALE",
    "all_finite",
    "clamp_logit_scale",
    "contrastive_model",
    "give_logit_scale_a_dimension",
    "layer_lambdas",
    "logit_scale_value",
    "take_logit_scales_dimension",
    "to_float32",
    "whole",
]
