"""Activations that write over their input, for calls without gradients: new memory costs a CPU as much as they do."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules import module as modules
from transformers.activations import GELUActivation, QuickGELUActivation


def _gelu(hidden_states: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.gelu_(hidden_states)


def _quick_gelu(hidden_states: torch.Tensor) -> torch.Tensor:
    return hidden_states.mul_((hidden_states * 1.702).sigmoid_())


_IN_PLACE = {GELUActivation: _gelu, QuickGELUActivation: _quick_gelu}


def activation_in_place(activation: nn.Module, before: nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return a function that computes an activation over its input, or None where that could be noticed.

    Args:
        activation: The activation's module, one of Transformers'.
        before: What makes its input. It has to be a `torch.nn.Linear` itself, whose output is nobody else's, and
            neither may have hooks, which may keep what passes by.
    """
    if type(before) is not nn.Linear or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    hooks = (
        before._forward_hooks,
        activation._forward_hooks,
        activation._forward_pre_hooks,
        modules._global_forward_hooks,
        modules._global_forward_pre_hooks,
    )
    return None if any(hooks) else _IN_PLACE.get(type(activation))


__all__ = ["activation_in_place"]
