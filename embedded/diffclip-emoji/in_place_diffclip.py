"""What is written over its input in calls without gradients: new memory costs a CPU as much as a sum or an activation.

Only where nobody can notice: what is written over has just been made by a module of known code that no hook watches.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules import module as modules
from transformers.activations import GELUActivation, QuickGELUActivation


def may_overwrite() -> bool:
    """Say whether this call may write over what it has made: without gradients and outside of graphs."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing())


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Say whether a module is of one of these classes itself, with its own forward, and no hook sees what it is given
    or returns."""
    return type(module) in kinds and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or modules._global_forward_hooks
        or modules._global_forward_pre_hooks
        or "forward" in vars(module)
    )


def _gelu(hidden_states: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.gelu_(hidden_states)


def _quick_gelu(hidden_states: torch.Tensor) -> torch.Tensor:
    return hidden_states.mul_((hidden_states * 1.702).sigmoid_())


_IN_PLACE = {GELUActivation: _gelu, QuickGELUActivation: _quick_gelu}


def activation_in_place(activation: nn.Module, before: nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return a function that computes an activation over its input, or None where that could be noticed.

    Args:
        activation: The activation's module, one of Transformers'.
        before: What makes its input. It has to be a `torch.nn.Linear` itself, whose output is nobody else's.
    """
    if may_overwrite() and is_plain(before, nn.Linear) and is_plain(activation, *_IN_PLACE):
        return _IN_PLACE[type(activation)]
    return None


def added(
    states: torch.Tensor, made: torch.Tensor, maker: nn.Module, kinds: tuple[type[nn.Module], ...], last: str
) -> torch.Tensor:
    """Return states + made, over `made` where that can't be noticed.

    Args:
        states, made: Of the same shape.
        maker: The module that returned `made`; it has to be of one of these classes itself.
        last: The name of its `torch.nn.Linear` that made `made`.
    """
    alone = may_overwrite() and is_plain(maker, *kinds) and is_plain(getattr(maker, last), nn.Linear)
    return made.add_(states) if alone and made.dtype == states.dtype else states + made


__all__ = ["activation_in_place", "added", "is_plain", "may_overwrite"]
