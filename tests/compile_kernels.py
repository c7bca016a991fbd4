"""Compile the fused kernels for a card that isn't there: `python compile_kernels.py ARCH HEAD_DIMS DTYPES`.

The interpreter takes code that the compiler refuses. A driver that only names its card lets Triton's own launcher
compile each kernel for the arguments that the operators pass, and leave out the launch.
"""

import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from diffclip_hf.model import kernels_diffclip


# Of a GeForce card of compute capability 8.6, 8.9 or 12.0, the smallest among those with bfloat16.
SHARED_MEMORY = 99 * 1024


class Driver:
    """What Triton asks of a driver before a launch."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """A kernel that compiles where it would be launched."""

    def __init__(self, kernel: Any):
        self.kernel = kernel

    def __getitem__(self, grid: tuple) -> Any:
        def compile_only(*args: Any, **kwargs: Any) -> None:
            compiled = self.kernel.warmup(*args, grid=grid, **kwargs)
            assert compiled.metadata.shared <= SHARED_MEMORY, f"{self.kernel.__name__}: {compiled.metadata.shared}"

        return compile_only


def compile_all(head_dim: int, dtype: torch.dtype) -> None:
    """Compile the three kernels as they are without a mask, causal for a single token, and with a mask."""
    for tokens, mask, is_causal in (
        (197, None, False),
        (1, None, True),
        (16, torch.ones(1, 1, 1, 16, dtype=torch.bool), False),
    ):
        output = kernels_diffclip.fused_differential_attention(
            *inputs(tokens, head_dim, dtype, mask), scaling=0.1, is_causal=is_causal, norm_eps=1e-5, output_scale=0.2
        )
        output.sum().backward()


def inputs(tokens: int, head_dim: int, dtype: torch.dtype, mask: torch.Tensor | None) -> tuple:
    states = torch.zeros(1, tokens, 4 * head_dim, dtype=dtype, requires_grad=True)
    heads = states.unflatten(-1, (4, head_dim)).transpose(1, 2)
    value = states.unflatten(-1, (2, 2 * head_dim)).transpose(1, 2)
    return heads, heads, value, mask, torch.tensor(0.8), torch.ones(2 * head_dim, dtype=dtype)


def main(architecture: int, head_dims: list[int], dtypes: list[torch.dtype]) -> None:
    triton.runtime.driver.set_active(Driver(architecture))
    for name in ("_forward_kernel", "_backward_query_kernel", "_backward_key_kernel"):
        setattr(kernels_diffclip, name, Compiled(getattr(kernels_diffclip, name)))
    # The tensors are on the CPU, which is refused.
    kernels_diffclip._check = lambda *args: None
    for head_dim in head_dims:
        for dtype in dtypes:
            compile_all(head_dim, dtype)


if __name__ == "__main__":
    _, given, widths, types = sys.argv
    main(int(given), [int(width) for width in widths.split(",")], [getattr(torch, name) for name in types.split(",")])
