"""The precision of what half precision would round too much."""

import torch


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return float32, or the given floating dtype where it is wider."""
    return dtype if dtype == torch.float64 else torch.float32


__all__ = ["at_least_float32"]
