"""Weights that aren't there as they are: offloaded by accelerate, on the meta device, or quantised."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def _hooks(module: nn.Module) -> list[Any]:
    """Return accelerate's hooks on a module, which it keeps as one or as one that holds several."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def execution_device(model: nn.Module) -> torch.device:
    """Return the device on which a model computes: that of its first weight, or of the hook that brings it.

    A model of any class will do. On a model on the meta device, which nothing brings weights to, it is meta.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if device.type != "meta":
        return device
    for module in model.modules():
        for hook in _hooks(module):
            if getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device)
    return device


def check_has_weights(model: nn.Module) -> None:
    """Raise a ValueError where a model is on the meta device, which holds shapes and no numbers."""
    if execution_device(model).type == "meta":
        raise ValueError(
            "The model is on the meta device, which holds shapes and no weights; load it with from_pretrained, or "
            "give it inputs on the meta device to see its outputs' shapes."
        )


def _four_bit_on_cpu(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the names and layers whose 4-bit weights bitsandbytes packs for some CPUs, losing their gradients."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if getattr(module, "support_avx512bf16_for_cpu", False) and weight is not None and weight.device.type == "cpu":
            yield name, module


def check_passes_gradients(model: nn.Module) -> None:
    """Raise a ValueError where a quantised model is known to fail as gradients are asked of it."""
    for name, _ in _four_bit_on_cpu(model):
        raise ValueError(
            f"{name} has 4-bit weights, which pass no gradient on in bitsandbytes on this CPU, and relevance needs "
            "them: load with load_in_8bit=True, or without quantisation."
        )


def check_four_bit_widths(model: nn.Module) -> None:
    """Raise a ValueError where bitsandbytes would fail on a 4-bit layer, at its first call without gradients.

    It packs by blocks of 32 rows and of as many columns as share a scale.
    """
    for name, module in _four_bit_on_cpu(model):
        columns = getattr(getattr(module.weight, "quant_state", None), "blocksize", 64)
        if module.in_features % columns or module.out_features % 32:
            raise ValueError(
                f"{name} has weights of {module.out_features}x{module.in_features}; bitsandbytes takes 4-bit weights "
                f"on this CPU in multiples of 32x{columns} alone: load with load_in_8bit=True, or name it in "
                "llm_int8_skip_modules."
            )


@contextmanager
def weights_in_place(module: nn.Module) -> Iterator[None]:
    """Bring a module's own offloaded weights, not those of its parts, for what is computed outside its forward."""
    if not any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        yield
        return
    hooks = _hooks(module)
    for hook in hooks:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for hook in hooks:
            hook.post_forward(module, None)


def logit_scale_factor(model: Any) -> torch.Tensor:
    """Return exp(logit_scale) of a model as `CLIPModel` is, float32, without dimensions or gradient."""
    with weights_in_place(model):
        return model.logit_scale.detach().float().exp()


__all__ = [
    "check_four_bit_widths",
    "check_has_weights",
    "check_passes_gradients",
    "execution_device",
    "logit_scale_factor",
    "weights_in_place",
]
