"""The page in the browser, and the same as a Hugging Face Space; `python -m diffclip_hf.demo`."""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    # Here, since the room's other modules serve without Gradio.
    from .page import main as run

    return run(argv)


__all__ = ["main"]
