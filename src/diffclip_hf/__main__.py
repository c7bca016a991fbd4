"""`python -m diffclip_hf`: the package's commands, a line each, and the versions that are installed."""

import importlib.metadata
import platform
import sys
from collections.abc import Sequence

from .common.commands import CommandParser


# Module → what it does.
COMMANDS = {
    "train": "train a model, or fine-tune one, on pictures with captions or classes",
    "evaluate": "measure models: zero-shot, retrieval, linear probes, few-shot, MMVP",
    "search": "search a folder of pictures by text, or by a picture",
    "embed": "embed tar shards, folders or data sets on many processes, as clip-retrieval does",
    "interpolate": "mix the weights of two models, or measure what lies between them",
    "demo": "try models on a page in the browser, or write that page as a Hugging Face Space",
    "export_onnx": "export a model's two towers to ONNX, in float32 and int8",
    "conversion.convert_original_checkpoint": "convert a checkpoint of the original code for Transformers",
    "conversion.convert_clip_checkpoint": "turn a CLIPModel of Transformers into a DiffCLIPModel, or back",
    "conversion.convert_to_original": "write a converted model's weights in the original's format",
    "conversion.push_to_hub": "upload a model to the Hugging Face Hub, with a model card",
}
PACKAGES = (
    *("diffclip-hf", "torch", "transformers", "huggingface_hub", "safetensors", "numpy", "pillow"),
    *("torchvision", "accelerate", "datasets", "peft", "scikit-learn", "matplotlib", "gradio", "onnx", "onnxruntime"),
)


def version_of(package: str) -> str:
    """Return an installed package's version, or that it isn't installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def overview() -> str:
    """Return the list of commands and versions."""
    versions = {"python": platform.python_version(), **{package: version_of(package) for package in PACKAGES}}
    return "\n".join(
        [
            "DiffCLIP for Hugging Face Transformers.",
            "",
            "Start a command with `python -m diffclip_hf.COMMAND`; `--help` shows its options.",
            "",
            *(f"  {name:38}  {what}" for name, what in COMMANDS.items()),
            "",
            "Installed versions:",
            "",
            *(f"  {name:15}  {version}" for name, version in versions.items()),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the commands and versions; return 0."""
    parser = CommandParser(
        prog="python -m diffclip_hf", description="List the package's commands and the installed versions."
    )
    parser.parse_args(argv)
    sys.stdout.write(f"{overview()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
