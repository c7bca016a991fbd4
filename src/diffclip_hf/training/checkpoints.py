"""Which of a training run's checkpoints is the newest that was written to its end."""

import json
import logging
import os
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME


logger = logging.getLogger(__name__)
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def _is_json(path: Path) -> bool:
    """Say whether a file is there and is JSON to its end."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _is_safetensors(path: Path) -> bool:
    """Say whether a file's header is whole and announces as many bytes as there are."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def is_complete(checkpoint: str | os.PathLike) -> bool:
    """Say whether a checkpoint's folder was written to its end.

    The trainer's state, which is written last, has to be there and to parse, and there have to be weights. Every
    safetensors file, every PyTorch file and every shard that an index names has to be whole by its own header.
    """
    folder = Path(checkpoint)
    if not _is_json(folder / TRAINER_STATE_NAME):
        return False
    weights = list(folder.glob("*.safetensors"))
    # FSDP has a file or a folder of its own.
    if not weights and not any(folder.glob("pytorch_model*")):
        return False
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.exists():
        if not _is_json(index):
            return False
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        weights += [folder / name for name in names]
    others = [path for pattern in ("*.pt", "*.pth", "*.bin") for path in folder.glob(pattern)]
    return all(map(_is_safetensors, weights)) and all(map(zipfile.is_zipfile, others))


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """Return the newest complete `checkpoint-N` of a training run's folder, or None where there is none.

    A process that was killed while it wrote, or a disk that was full, leaves an incomplete one behind, which is passed
    over with a logged warning.

    Args:
        output_dir: `TrainingArguments.output_dir`; it needn't exist.
    """
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        return None
    steps = {
        int(match[1]): path for path in output_dir.iterdir() if path.is_dir() and (match := _NAME.fullmatch(path.name))
    }
    for step in sorted(steps, reverse=True):
        if is_complete(steps[step]):
            return str(steps[step])
        logger.warning("%s is incomplete, and is passed over.", steps[step])
    return None


__all__ = ["is_complete", "last_checkpoint"]
