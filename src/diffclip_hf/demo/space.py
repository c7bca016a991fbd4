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
from PIL import Image

from ..common.remote_code import files_to_share
from ..common.whole_files import written_whole
from ..model.image_reading_diffclip import read_image


EXAMPLES = "examples"
MAX_SIDE = 1024
PACKAGE_SUFFIXES = {".py", ".txt", ".typed", ".yaml"}
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


def prepare_examples(pictures: Sequence[Path], folder: Path) -> list[Path]:
    """Write pictures anew for a page to offer, as upright RGB without metadata, and return their paths.

    A side longer than 1,024 pixels is reduced to so many. What a camera noted, such as the place, is for nobody else.

    Args:
        pictures: Their files.
        folder: It's made.

    Raises:
        ValueError: One is a link, or `read_image` can't read it.
    """
    found = []
    for number, path in enumerate(pictures):
        if path.is_symlink():
            raise ValueError(f"The example {path} is a link; only files are shown, so copy the picture there.")
        picture = read_image(path)
        picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        folder.mkdir(exist_ok=True)
        found.append(folder / f"{number:02}-{path.stem}.png")
        picture.save(found[-1])
    return found


def copy_package(folder: Path) -> None:
    """Copy the package's code and data files into a folder, and nothing else that may lie beside them.

    Raises:
        ValueError: One is a link.
    """
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*")):
        place = path.relative_to(package)
        if path.suffix not in PACKAGE_SUFFIXES or any(part.startswith(".") for part in place.parts):
            continue
        if path.is_symlink():
            raise ValueError(f"{path} is a link; install the package with files of its own.")
        if path.is_file():
            (folder / place.parent).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / place)


def write_space(folder: Path, app: Path, models: Mapping[str, str], examples: Sequence[Path] = ()) -> None:
    """Write a Hugging Face Space, whole or not at all.

    Args:
        folder: New or empty.
        app: The file that a Space starts.
        models: What each is called → its folder, of which `files_to_share` are copied, or its id on the Hub.
        examples: Pictures; see `prepare_examples`.

    Raises:
        ValueError: A folder's name can't be one of a model on the Hub, or a file to copy is a link.
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
        copy_package(beside / "diffclip_hf")
        text = f"---\n{yaml.safe_dump(front_matter, sort_keys=False)}---\n{TEXT}"
        (beside / "README.md").write_text(text, encoding="utf-8")
        (beside / "requirements.txt").write_text("\n".join(space_requirements()) + "\n", encoding="utf-8")
        for shown, name in models.items():
            if Path(name).is_dir():
                (beside / shown).mkdir()
                for path in files_to_share(name, ["README.md"]):
                    shutil.copyfile(path, beside / shown / path.name)
        prepare_examples(examples, beside / EXAMPLES)


__all__ = ["EXAMPLES", "prepare_examples", "write_space"]
