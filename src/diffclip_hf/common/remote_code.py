"""Put the model's code beside its weights, so that a folder loads where this package isn't installed.

And what of a model's folder may leave the machine at all.
"""

import logging
import os
import re
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from .json_files import json_text, read_json_object
from .whole_files import write_text_whole, write_whole


logger = logging.getLogger(__name__)
# Of a model's folder nothing but these leaves the machine: a folder that was trained in holds the optimizer's state,
# and in `training_args.bin` perhaps a token.
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
SHARED_FILES = (
    "config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "LICENSE",
)
_ROOM = Path(__file__).parents[1] / "model"
# Every file that travels: the room is flat, and its files import only their siblings.
CODE_FILES = tuple(sorted(path.name for path in _ROOM.glob("*_diffclip.py")))
_MODEL_AUTO_MAPS = {
    "diffclip": {
        "AutoConfig": "configuration_diffclip.DiffCLIPConfig",
        "AutoModel": "modeling_diffclip.DiffCLIPModel",
        "AutoModelForZeroShotImageClassification": "modeling_diffclip.DiffCLIPModel",
        "AutoModelForImageClassification": "modeling_diffclip.DiffCLIPForImageClassification",
    },
    "diffclip_text_model": {
        "AutoConfig": "configuration_diffclip.DiffCLIPTextConfig",
        "AutoModel": "modeling_diffclip.DiffCLIPTextModel",
    },
    "diffclip_vision_model": {
        "AutoConfig": "configuration_diffclip.DiffCLIPVisionConfig",
        "AutoModel": "modeling_diffclip.DiffCLIPVisionModel",
    },
}
_PROCESSOR_AUTO_MAP = {"AutoProcessor": "processing_diffclip.DiffCLIPProcessor"}
_IMAGE_PROCESSOR_AUTO_MAP = {
    "AutoImageProcessor": {
        "torchvision": "image_processing_diffclip.DiffCLIPImageProcessor",
        "pil": "image_processing_diffclip.DiffCLIPImageProcessorPil",
    }
}
# A pair of a slow tokenizer, of which there is none, and a fast one.
_TOKENIZER_AUTO_MAP = {"AutoTokenizer": [None, "processing_diffclip.DiffCLIPTokenizer"]}


def files_to_share(folder: str | os.PathLike, also: Iterable[str] = ()) -> list[Path]:
    """Return what of a model's folder may leave the machine: weights first, then what `SHARED_FILES` names.

    The log says what is left out.

    Args:
        folder: What `save_pretrained` has written.
        also: Further names that may leave.

    Raises:
        ValueError: It isn't a folder, it has no weights as safetensors, or a file to share is a link, which may lead
            anywhere.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder.")
    names = sorted(path.name for path in folder.iterdir())
    weights = [name for name in names if WEIGHTS.fullmatch(name)]
    found = [*weights, *(name for name in (*SHARED_FILES, *also) if name in names)]
    if links := [name for name in found if (folder / name).is_symlink()]:
        raise ValueError(
            f"{folder} has links: {', '.join(links)}; only files are shared, so copy the folder first: "
            f"cp -rL {folder} NEW."
        )
    if not any(name.endswith(".safetensors") for name in weights):
        raise ValueError(f"{folder} has no model.safetensors, and no other weights are shared; save the model again.")
    if left_out := [name for name in names if name not in {*found, *CODE_FILES, "README.md"}]:
        logger.warning("Left out, as no part of a model's repository: %s.", ", ".join(left_out))
    return [folder / name for name in found if (folder / name).is_file()]


def add_remote_code(folder: str | os.PathLike) -> None:
    """Add this package's modeling code to a saved folder, for `from_pretrained(folder, trust_remote_code=True)`.

    Args:
        folder: A folder that `save_pretrained` of a model, and perhaps of a processor, has written. Each file is
            written whole, the configuration last. A file that is a link, as those of the Hub's cache are, is replaced
            by a file; what the link leads to stays as it is.

    Raises:
        FileNotFoundError: The folder has no `config.json`.
        ValueError: Its `model_type` isn't one of DiffCLIP's, or a file isn't JSON; nothing is written then.
    """
    folder = Path(folder).expanduser()
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{folder} has no config.json; save a model there first.")
    config = read_json_object(config_file)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _MODEL_AUTO_MAPS:
        raise ValueError(f"model_type in {config_file} is {model_type!r}; it must be one of {list(_MODEL_AUTO_MAPS)}.")
    # All is read before anything is written.
    contents = {**_processor_files(folder), config_file: {**config, "auto_map": _MODEL_AUTO_MAPS[model_type]}}
    for name in CODE_FILES:
        write_whole(folder / name, partial(shutil.copyfile, _ROOM / name))
    for path, content in contents.items():
        write_text_whole(path, json_text(content))


def _with_image_processor(content: dict[str, Any]) -> dict[str, Any]:
    """Return an image processor's fields, with an `auto_map` unless it is one of Transformers' own."""
    known = content.get("image_processor_type", "DiffCLIP")
    if not str(known).startswith("DiffCLIP"):
        return content
    return {**content, "auto_map": _IMAGE_PROCESSOR_AUTO_MAP}


def _processor_files(folder: Path) -> dict[Path, dict[str, Any]]:
    """Return the processor's files that are there and are of this package's classes, with their `auto_map`."""
    found = {}
    processor_file = folder / "processor_config.json"
    if processor_file.is_file():
        content = {**read_json_object(processor_file), "auto_map": _PROCESSOR_AUTO_MAP}
        if "image_processor" in content:
            if not isinstance(content["image_processor"], dict):
                raise ValueError(f"image_processor in {processor_file} must be an object.")
            content["image_processor"] = _with_image_processor(content["image_processor"])
        found[processor_file] = content
    image_processor_file = folder / "preprocessor_config.json"
    if image_processor_file.is_file():
        found[image_processor_file] = _with_image_processor(read_json_object(image_processor_file))
    tokenizer_file = folder / "tokenizer_config.json"
    if tokenizer_file.is_file():
        content = read_json_object(tokenizer_file)
        if content.get("tokenizer_class") == "DiffCLIPTokenizer":
            found[tokenizer_file] = {**content, "auto_map": _TOKENIZER_AUTO_MAP}
    return found


__all__ = ["add_remote_code", "files_to_share"]
