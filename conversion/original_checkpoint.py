"""Read a checkpoint of the original code: safely, and no more of it than the weights."""

import argparse
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch


# numpy has no public name for the function that its scalars are pickled by.
NUMPY_SCALAR = np.float64(0).__reduce__()[0]
# What SLIP's trainer pickles beside tensors: its arguments, and numpy scalars among the metrics. The second form of a
# pair is the name under which older numpy wrote the same function.
ALLOWED_GLOBALS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    np.dtypes.Float32DType,
    np.dtypes.Float64DType,
    np.dtypes.Int64DType,
    (NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    (NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
]
ZIP_START = b"PK\x03\x04"
PICKLE_START = b"\x80"


class ConversionError(Exception):
    """The checkpoint or an option doesn't fit; the message says which key or option, and what is expected."""


def check_file(path: Path) -> bool:
    """Raise for a file that can't be a checkpoint, saying what it is instead.

    Returns:
        Whether it is an archive of `torch.save` since PyTorch 1.6, of which a part can be read.

    Raises:
        ConversionError: The file is missing, empty, cut off, an HTML page, a Git LFS pointer or anything else.
    """
    if not path.is_file():
        raise ConversionError(f"--checkpoint {path} is not a file.")
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise ConversionError(f"--checkpoint {path} is empty (0 bytes); fetch it anew.")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ConversionError(
            f"--checkpoint {path} is an HTML page, such as a server's error or log-in page, saved under that name; "
            "fetch the file anew, or let --repo-id fetch it."
        )
    if start.startswith(b"version https://git-lfs"):
        raise ConversionError(
            f"--checkpoint {path} is a Git LFS pointer, not the file that it stands for; run `git lfs pull`, or let "
            "--repo-id fetch it."
        )
    if start.startswith(ZIP_START):
        # The table of an archive's members stands at its end.
        if not zipfile.is_zipfile(path):
            raise ConversionError(
                f"--checkpoint {path} is cut off after {path.stat().st_size} bytes (an archive without its end); "
                "fetch it anew."
            )
        with zipfile.ZipFile(path) as archive:
            if not any(name.endswith("/data.pkl") for name in archive.namelist()):
                raise ConversionError(
                    f"--checkpoint {path} is a zip archive, but not one of torch.save, which has a data.pkl."
                )
        return True
    if not start.startswith(PICKLE_START):
        raise ConversionError(
            f"--checkpoint {path} is not a file of torch.save: it starts with {start[:16]!r}. Expected is a .pt file "
            "that the original's trainer wrote."
        )
    return False


def load_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Read a checkpoint's weights, never unpickling anything outside the allow-list.

    Args:
        path: A file that SLIP's trainer wrote, or a bare state dict saved by `torch.save`.

    Returns:
        Original key, without `module.`, → tensor, mapped from the file: the operating system reads a tensor when it is
        first used, so optimizer state stays on disk. Files of PyTorch before 1.6 can't be mapped, and are read whole.

    Raises:
        ConversionError: The file is missing, isn't a checkpoint, or holds objects outside the allow-list.
    """
    is_archive = check_file(path)
    try:
        with torch.serialization.safe_globals(ALLOWED_GLOBALS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"--checkpoint {path} can't be read as a checkpoint of tensors: it holds objects other than tensors, "
            "plain values and SLIP's arguments, or is damaged. It is refused, since reading such objects can run any "
            f"code, and none was run. PyTorch says: {_without_advice(error)}"
        ) from error
    except Exception as error:
        # torch.load raises errors of many types for a damaged file; each is the file's fault, and is reported as such.
        raise ConversionError(
            f"--checkpoint {path} can't be read as a checkpoint of tensors: it is cut off or damaged. PyTorch says: "
            f"{error}"
        ) from error
    state_dict = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else checkpoint
    if not isinstance(state_dict, Mapping) or not state_dict:
        raise ConversionError(f"--checkpoint {path} holds no state dict, but a {type(checkpoint).__name__}.")
    for key, value in state_dict.items():
        if not isinstance(value, torch.Tensor):
            raise ConversionError(f"Key {key!r} is a {type(value).__name__}; it must be a tensor.")
    return {key.removeprefix("module."): value for key, value in state_dict.items()}


def _without_advice(error: Exception) -> str:
    """Return the line of PyTorch's message that names the object, without its advice to turn the check off."""
    lines = [line.strip() for line in str(error).splitlines() if "WeightsUnpickler error" in line]
    return lines[0] if lines else str(error).splitlines()[0]
