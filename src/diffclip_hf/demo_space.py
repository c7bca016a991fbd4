"""Writing the demo as a Hugging Face Space."""

import importlib.metadata
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import gradio as gr
import yaml
from huggingface_hub.utils import validate_repo_id
from packaging.requirements import Requirement

from .whole_files import written_whole


EXAMPLES = "examples"
TEXT = """
A page to try models on: a picture, labels, their scores, and where the model looks for each. Written by
`python -m diffclip_hf.demo --write-space`; `models`, above, lists the models.
"""


def space_requirements() -> list[str]:
    """Return what the installed package says that the demo needs, gradio among it."""
    found = [Requirement(text) for text in importlib.metadata.requires("diffclip-hf") or ()]
    return [
        f"{one.name}{one.specifier}"
        for one in found
        if one.name != "diffclip-hf"
        and (one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in ("demo", "plotting")))
    ]


def write_space(folder: Path, app: Path, models: Mapping[str, str], examples: Sequence[Path] = ()) -> None:
    """Write a Hugging Face Space, whole or not at all.

    Args:
        folder: New or empty.
        app: The file that a Space starts.
        models: What each is called → its folder, which is copied, or its id on the Hub.
        examples: Pictures, which are copied.

    Raises:
        ValueError: A folder's name can't be one of a model on the Hub.
        OSError: `folder` isn't empty, or a file can't be read or written.
        ImportError: The package was not installed, so that it isn't known what it needs.
    """
    for shown in models:
        validate_repo_id(shown)
    front_matter = {
        "title": "DiffCLIP",
        "sdk": "gradio",
        "sdk_version": gr.__version__,
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "app_file": "app.py",
        "models": list(models),
    }
    with written_whole(folder) as beside:
        shutil.copyfile(app, beside / "app.py")
        shutil.copytree(Path(__file__).parent, beside / "diffclip_hf", ignore=shutil.ignore_patterns("__pycache__"))
        text = f"---\n{yaml.safe_dump(front_matter, sort_keys=False)}---\n{TEXT}"
        (beside / "README.md").write_text(text, encoding="utf-8")
        (beside / "requirements.txt").write_text("\n".join(space_requirements()) + "\n", encoding="utf-8")
        for shown, name in models.items():
            if Path(name).is_dir():
                (beside / shown).mkdir()
                for path in Path(name).iterdir():
                    # Without checkpoints and other folders.
                    if path.is_file():
                        shutil.copyfile(path, beside / shown / path.name)
        for number, path in enumerate(examples):
            (beside / EXAMPLES).mkdir(exist_ok=True)
            shutil.copyfile(path, beside / EXAMPLES / f"{number:02}-{path.name}")


__all__ = ["EXAMPLES", "write_space"]
