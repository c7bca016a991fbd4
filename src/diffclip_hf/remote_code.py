"""Put the model's code beside its weights, so that a folder loads where this package isn't installed."""

import json
import os
import shutil
from pathlib import Path

from .whole_files import write_text_whole


_PACKAGE = Path(__file__).parent
# Every file that travels: flat, importing only its siblings.
CODE_FILES = (
    "configuration_diffclip.py",
    "hub_cache_diffclip.py",
    "blocked_attention_diffclip.py",
    "kernels_diffclip.py",
    "attention_diffclip.py",
    "loss_diffclip.py",
    "modeling_diffclip.py",
    "image_processing_pil_diffclip.py",
    "image_processing_diffclip.py",
    "processing_diffclip.py",
)
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
        "pil": "image_processing_pil_diffclip.DiffCLIPImageProcessorPil",
    }
}
# A pair of a slow tokenizer, of which there is none, and a fast one.
_TOKENIZER_AUTO_MAP = {"AutoTokenizer": [None, "processing_diffclip.DiffCLIPTokenizer"]}


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, content: dict) -> None:
    write_text_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def add_remote_code(folder: str | os.PathLike) -> None:
    """Add this package's modeling code to a saved folder, for `from_pretrained(folder, trust_remote_code=True)`.

    Args:
        folder: A folder that `save_pretrained` of a model, and perhaps of a processor, has written.

    Raises:
        FileNotFoundError: The folder has no `config.json`.
        ValueError: Its `model_type` isn't one of DiffCLIP's.
    """
    folder = Path(folder)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{folder} has no config.json; save a model there first.")
    config = _read_json(config_file)
    model_type = config.get("model_type")
    if model_type not in _MODEL_AUTO_MAPS:
        raise ValueError(f"model_type in {config_file} is {model_type!r}; it must be one of {list(_MODEL_AUTO_MAPS)}.")
    for name in CODE_FILES:
        shutil.copyfile(_PACKAGE / name, folder / name)
    _write_json(config_file, {**config, "auto_map": _MODEL_AUTO_MAPS[model_type]})

    # Of the processor's files, those that are there and are of this package's classes.
    processor_file = folder / "processor_config.json"
    if processor_file.is_file():
        content = _read_json(processor_file)
        content["auto_map"] = _PROCESSOR_AUTO_MAP
        content["image_processor"]["auto_map"] = _IMAGE_PROCESSOR_AUTO_MAP
        _write_json(processor_file, content)
    image_processor_file = folder / "preprocessor_config.json"
    if image_processor_file.is_file():
        _write_json(image_processor_file, {**_read_json(image_processor_file), "auto_map": _IMAGE_PROCESSOR_AUTO_MAP})
    tokenizer_file = folder / "tokenizer_config.json"
    if tokenizer_file.is_file():
        content = _read_json(tokenizer_file)
        if content.get("tokenizer_class") == "DiffCLIPTokenizer":
            _write_json(tokenizer_file, {**content, "auto_map": _TOKENIZER_AUTO_MAP})


__all__ = ["add_remote_code"]
