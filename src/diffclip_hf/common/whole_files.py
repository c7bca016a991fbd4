"""Files and folders that appear whole or not at all."""

import errno
import os
import shutil
import tempfile
import uuid
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
    path = path.expanduser()
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


@contextmanager
def _made_for_trial(path: Path) -> Iterator[None]:
    """Make a folder that isn't there, and its parents, and remove them again."""
    made: list[Path] = []
    try:
        for part in reversed((path, *path.parents)):
            if not part.exists():
                part.mkdir()
                made.append(part)
        yield
    finally:
        for part in reversed(made):
            # Another process may have begun to use it.
            with suppress(OSError):
                part.rmdir()


def _check_links(path: Path) -> None:
    """Raise a FileNotFoundError where a path is, or goes through, a link to nothing."""
    for part in (path, *path.parents):
        if part.is_symlink() and not part.exists():
            raise FileNotFoundError(
                f"{part} is a link to {os.readlink(part)}, which isn't there; make that folder, or name another."
            )


def check_output_folder(folder: str | os.PathLike) -> Path:
    """Find out before the work whether `written_whole` can write a folder in the end, by trying; nothing is left.

    Args:
        folder: New or empty. A link to an empty folder stands for that folder.

    Returns:
        The folder, absolute and without links.

    Raises:
        FileExistsError: It's a file, or a folder with something in it.
        FileNotFoundError: It is, or is below, a link to nothing.
        OSError: It's a mount point or the working folder, which can't be replaced, or can't be made or written.
    """
    # A shell leaves the ~ of --output-dir=~/new as it is.
    folder = Path(folder).expanduser()
    try:
        _check_links(folder)
        real = folder.resolve()
        if real.exists() and (not real.is_dir() or any(real.iterdir())):
            raise FileExistsError(f"{folder} exists and is not an empty folder; name a new one.")
        if real.exists() and os.path.samefile(real, os.curdir):
            raise OSError(f"{folder} is the working folder, which can't be replaced; name a new one in it.")
        if os.path.ismount(real):
            raise OSError(errno.EBUSY, "it is a mount point", str(real))
        with _made_for_trial(real):
            # A mount of the same file system, as a container's, shows only so.
            aside = real.with_name(f".{uuid.uuid4().hex}")
            real.rename(aside)
            aside.rename(real)
    except OSError as error:
        if error.errno is None:
            raise
        if error.errno == errno.EBUSY:
            raise OSError(f"{folder} is a mount point, which can't be replaced; name a new folder in it.") from error
        raise OSError(f"{folder} can't be written ({error.strerror}: {error.filename}); name another.") from error
    return real


def check_output_file(path: str | os.PathLike) -> None:
    """Find out before the work whether `write_whole` can write a file in the end, by trying; nothing is left.

    Args:
        path: New, or a file that may be replaced; a link is replaced, not followed.

    Raises:
        FileExistsError: It's a folder, a device or the like.
        FileNotFoundError: It is below a link to nothing.
        OSError: Its folder can't be made or written, or it's a mount point.
    """
    path = Path(path).expanduser()
    try:
        _check_links(path.parent)
        if path.exists() and not path.is_file():
            raise FileExistsError(f"{path} exists and is not a file, which could be replaced; name another.")
        if os.path.ismount(path):
            raise OSError(f"{path} is a mount point, which can't be replaced; name another.")
        with _made_for_trial(path.parent.absolute()):
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
            os.close(handle)
            os.unlink(name)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(f"{path} can't be written ({error.strerror}: {error.filename}); name another.") from error


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Give an empty folder beside `folder`, renamed to it at the end; an error removes it.

    Args:
        folder: As `check_output_folder` takes it. Its files become readable by everyone.

    Raises:
        OSError: As `check_output_folder` raises it, or from the writing.
    """
    folder = check_output_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".unfinished-"))
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
