"""The report that a conversion leaves in its folder: what was assumed, measured and written, and by which versions."""

import logging
import platform
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import safetensors
import torch
import transformers

import diffclip_hf

from ..common.json_files import json_text
from ..model.hub_cache_diffclip import sha256_of


logger = logging.getLogger("convert_original_checkpoint")
REPORT_FILE = "conversion_report.json"


def assume(assumptions: list[str], message: str) -> None:
    """Log and note what the checkpoint doesn't tell."""
    logger.warning("%s", message)
    assumptions.append(message)


def describe_file(path: Path) -> dict[str, Any]:
    """Return a file's size in bytes and SHA-256."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write a conversion's report into its folder, with the hashes of the files there and the packages' versions."""
    versions = {module.__name__: module.__version__ for module in (torch, transformers, safetensors, np)}
    versions |= {"diffclip_hf": diffclip_hf.__version__, "huggingface_hub": huggingface_hub.__version__}
    report = {
        **report,
        "files": {file.name: describe_file(file) for file in sorted(folder.iterdir())},
        "versions": {**versions, "python": platform.python_version()},
    }
    (folder / REPORT_FILE).write_text(json_text(report), encoding="utf-8")


__all__ = ["REPORT_FILE", "assume", "describe_file", "write_report"]
