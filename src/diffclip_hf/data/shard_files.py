"""Which tar shards a source names, and opening one, on disk or at a URL."""

import functools
import glob
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO


SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")


def expand_braces(pattern: str) -> list[str]:
    """Write out `{000..332}` and `{a,b}` as a shell does; the numbers keep their leading zeros."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if found is None:
        return [pattern]
    first, last, choices = found.groups()
    if choices is None:
        parts = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        parts = choices.split(",")
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [path for part in parts for path in expand_braces(before + part + after)]


def is_url(path: str) -> bool:
    return "://" in path


def _shards_of_folder(folder: str) -> list[str]:
    return sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(SHARD_SUFFIXES))


def files_of_folder(folder: str) -> set[str]:
    """Return the names of a local folder's files, by one request rather than one each; none if it isn't there."""
    try:
        with os.scandir(folder or ".") as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def names_shards(source: str) -> bool:
    """Say whether a source is made of tar shards rather than something that `datasets` reads."""
    return source.endswith(SHARD_SUFFIXES) or (os.path.isdir(source) and bool(_shards_of_folder(source)))


def find_shards(source: str | Sequence[str]) -> list[str]:
    """List the tar shards that a source names.

    Args:
        source: A file, a folder of `.tar`, `.tar.gz` or `.tgz` files, a pattern with `*`, `?`, `[...]`, `{000..331}`
            or `{a,b}`, a URL that fsspec opens (of these only braces are expanded), or several of them.

    Raises:
        FileNotFoundError: A local file isn't there.
        ValueError: A pattern or folder has no shards.
    """
    shards = []
    for pattern in [source] if isinstance(source, str) else source:
        for path in expand_braces(os.fspath(pattern)):
            if os.path.isdir(path):
                found = _shards_of_folder(path)
            elif not is_url(path) and not os.path.exists(path) and glob.has_magic(path):
                found = sorted(glob.glob(path, recursive=True))
            else:
                found = [path]
            if not found:
                raise ValueError(f"{path!r} has no tar shards; their names must end in {', '.join(SHARD_SUFFIXES)}.")
            shards += found
    names = functools.cache(files_of_folder)
    for path in shards:
        if not is_url(path) and os.path.basename(path) not in names(os.path.dirname(path)):
            raise FileNotFoundError(f"The shard {path!r} isn't there.")
    if not shards:
        raise ValueError("source names no shards; it must name at least one.")
    return shards


@contextmanager
def open_shard(path: str) -> Iterator[IO[bytes]]:
    """Open a file at a path, or at a URL that fsspec opens."""
    if not is_url(path):
        with open(path, "rb") as file:
            yield file
        return
    import fsspec

    with fsspec.open(path, "rb") as file:
        yield file


__all__ = ["SHARD_SUFFIXES", "expand_braces", "files_of_folder", "find_shards", "is_url", "names_shards", "open_shard"]
