"""Every tolerance of the tests, with the largest error measured when it was set (CPU, torch 2.14.1)."""

import torch


# All are relative to the largest magnitude of the tensor compared.
PARITY_WITH_ORIGINAL = 1e-5  # 3.0e-6, ViT-B/16's logits
EAGER_AGAINST_SDPA = 1e-5
CLOSED_FORM = 1e-5
PADDING = 1e-5
# The fused kernels against eager attention in float64. In half precision twice eager's own error is allowed too, up to
# 1.9e-3 in float16 and 1.1e-2 in bfloat16. Theirs is below, but for bfloat16 in Triton's interpreter, which cuts off
# where a card rounds; rounded, it is 6.2e-3.
FUSED_KERNELS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1.6e-2}  # 7.8e-7, 7.0e-4, 1.5e-2
# λ's gradient, one sum over every token and channel that may nearly cancel, is relative to the largest gradient.
FUSED_KERNELS_LAMBDA = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3.2e-2}  # 2.4e-6, 2.0e-3, 2.4e-2
ONNX_AGAINST_PYTORCH = 1e-5  # 1.3e-6, the tiny image tower
HALF_PRECISION = {torch.float16: 5e-3, torch.bfloat16: 4e-2}


def relative_error(actual, expected) -> float:
    """Return the largest absolute difference over the largest magnitude expected."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}; expected {tuple(expected.shape)}")
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def assert_gradients_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Compare the gradients (or outputs) of two attention implementations, name by name."""
    largest = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        # A sum that nearly cancels has no magnitude of its own (k's bias has no gradient at all, by the softmax; λ's
        # is one sum over every token and channel), so its error is set against the largest gradient's.
        scale = max(value.abs().max(), (0.1 if "lambda" in name else 0.01) * largest)
        error = (actual[name] - value).abs().max() / scale
        assert error <= EAGER_AGAINST_SDPA, f"{name}: {error:.1e}"
