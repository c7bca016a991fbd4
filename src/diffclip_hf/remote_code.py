"""Put the model's code beside its weights, so that a folder loads where this package isn't installed."""

import json
import os
import shutil
from pathlib import Path


_PACKAGE = Path(__file__).parent
# Every file that travels: flat, importing only its siblings.
CODE_FILES = (
    "configuration_diffclip.py",
    "attention_diffclip.py",
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


def _edit_json(path: Path, auto_map: dict) -> None:
    """Write `auto_map` into a JSON file, beside it first."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content["auto_map"] = auto_map
    beside = path.with_suffix(".json.new")
    beside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, path)


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
    model_type = json.loads(config_file.read_text(encoding="utf-8")).get("model_type")
    if model_type not in _MODEL_AUTO_MAPS:
        raise ValueError(f"model_type in {config_file} is {model_type!r}; it must be one of {list(_MODEL_AUTO_MAPS)}.")
    for name in CODE_FILES:
        shutil.copyfile(_PACKAGE / name, folder / name)
    _edit_json(config_file, _MODEL_AUTO_MAPS[model_type])


__all__ = ["add_remote_code"]
