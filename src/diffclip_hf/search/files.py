"""Embeddings in one file, with what is said of each row: safetensors and JSON, and nothing that runs code."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..common.keys import fingerprint, tensor_digest
from ..common.whole_files import write_whole


EMBEDS, ROWS, EXTRA = "embeds", "rows", "extra"


def _digest(key: str, tensors: Mapping[str, torch.Tensor]) -> str:
    return fingerprint([key, {name: tensor_digest(tensor) for name, tensor in tensors.items()}])


def write_rows(
    path: Path, key: Mapping[str, Any], rows: list[Any], embeds: torch.Tensor, extra: bytes | None = None
) -> None:
    """Write embeddings whole or not at all.

    Args:
        path: The file.
        key: What they depend on, as JSON.
        rows: What is said of each, as JSON.
        embeds: float32, (rows, width), on the CPU.
        extra: What else the file holds, if anything.

    Raises:
        OSError: It can't be written.
    """
    # As a tensor, for the header of a safetensors file may have 100 MB; in ASCII, which keeps any file's name.
    tensors = {EMBEDS: embeds.contiguous(), ROWS: _as_tensor(json.dumps(rows).encode("ascii"))}
    if extra is not None:
        tensors[EXTRA] = _as_tensor(extra)
    text = json.dumps(key, sort_keys=True)
    try:
        write_whole(path, lambda beside: save_file(tensors, beside, {"key": text, "digest": _digest(text, tensors)}))
    except SafetensorError as error:
        raise OSError(f"{path} can't be written: {error}") from error


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def read_rows(path: Path) -> tuple[dict[str, Any], list[Any], torch.Tensor, bytes | None]:
    """Return what `write_rows` wrote: the key, the rows, the embeddings and the rest.

    Raises:
        ValueError: It's another kind of file, or damaged.
        OSError: It can't be read.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} isn't a safetensors file, or it is damaged: {error}") from error
    except FileNotFoundError:
        raise
    # safetensors' own error doesn't say which file.
    except OSError as error:
        raise OSError(f"{path} can't be read: {error}") from error
    if not {EMBEDS, ROWS} <= tensors.keys() or not {"key", "digest"} <= metadata.keys():
        raise ValueError(f"{path} holds other tensors than an index of pictures does.")
    if metadata["digest"] != _digest(metadata["key"], tensors):
        raise ValueError(f"{path} is damaged: its content isn't what was written.")
    rows = json.loads(tensors[ROWS].numpy().tobytes())
    extra = tensors[EXTRA].numpy().tobytes() if EXTRA in tensors else None
    return json.loads(metadata["key"]), rows, tensors[EMBEDS], extra


__all__ = ["read_rows", "write_rows"]
