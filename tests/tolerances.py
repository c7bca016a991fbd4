"""Every tolerance of the tests, with the largest error measured when it was set (CPU, torch 2.14.1)."""

# Relative to the largest magnitude of the tensor compared.
PARITY_WITH_ORIGINAL = 1e-5  # project's bar; measured: see test_parity.py's -s output
EAGER_AGAINST_SDPA = 1e-5


def relative_error(actual, expected) -> float:
    """Return the largest absolute difference over the largest magnitude expected."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}; expected {tuple(expected.shape)}")
    return ((actual - expected).abs().max() / expected.abs().max()).item()
