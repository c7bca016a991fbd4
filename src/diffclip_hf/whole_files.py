"""Files and folders that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside `path` and rename it, so that `path` is the old or the new, whatever happens.

    Args:
        path: Its folder is made. It becomes readable by everyone.
        write: Writes the file it's given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(handle)
    beside = Path(name)
    try:
        write(beside)
        # mkstemp writes for its owner alone.
        beside.chmod(0o644)
        os.replace(beside, path)
    except BaseException:
        with suppress(FileNotFoundError):
            beside.unlink()
        raise


def write_text_whole(path: Path, text: str) -> None:
    """Write a text as UTF-8, as `write_whole` does."""
    write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def check_new(folder: Path) -> None:
    """Raise a FileExistsError unless there is no such folder, or an empty one."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder; name a new one.")


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Give an empty folder beside `folder`, renamed to it at the end; an error removes it.

    Args:
        folder: New or empty. Its files become readable by everyone.

    Raises:
        FileExistsError: `folder` exists and is not an empty folder.
    """
    check_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        yield beside
        # mkdtemp and safetensors write for their owner alone.
        beside.chmod(0o755)
        for path in beside.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        if folder.is_dir():
            folder.rmdir()
        beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
