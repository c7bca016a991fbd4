"""How many samples tar shards have, by the files that WebDataset and img2dataset write beside them."""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .shard_files import SHARD_SUFFIXES, files_of_folder, is_url, open_shard


THREADS = 16


def _read_sizes(path: str) -> dict[str, Any]:
    """Return what a JSON file of sizes says, nothing if it isn't there.

    Raises:
        ValueError: It isn't JSON, or not an object.
    """
    try:
        with open_shard(path) as file:
            sizes = json.load(file)
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path!r} must be JSON: {error}") from error
    if not isinstance(sizes, dict):
        raise ValueError(f"{path!r} has a {type(sizes).__name__}; it must have an object.")
    return sizes


def _stated_size(path: str, sizes: Mapping[str, Any], field: str) -> int | None:
    """Return how many samples a field of a JSON file, already read, states, None if it isn't there.

    Raises:
        ValueError: It isn't a number of samples.
    """
    size = sizes.get(field)
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 0):
        raise ValueError(f"{path!r} states {size!r:.50} as {field}; it must be a whole number, at least 0.")
    return size


def _read_all(paths: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return what JSON files of sizes say, several read at once, since each may be a request to a server."""
    if not paths:
        return {}
    with ThreadPoolExecutor(min(THREADS, len(paths))) as pool:
        return dict(zip(paths, pool.map(_read_sizes, paths), strict=True))


def _stem(name: str) -> str:
    return next((name.removesuffix(suffix) for suffix in SHARD_SUFFIXES if name.endswith(suffix)), name)


def stated_sizes(shards: Sequence[str]) -> list[int | None]:
    """Return how many samples each shard has by the files beside it, None where they don't say.

    The files for each shard are opened where the one for all of a folder doesn't say it.

    Raises:
        ValueError: Such a file isn't JSON, or states no number of samples.
    """
    names = functools.cache(files_of_folder)

    def may_be_there(path: str) -> bool:
        return is_url(path) or os.path.basename(path) in names(os.path.dirname(path))

    places = [path.rpartition("/") for path in shards]
    commons = [f"{folder}{slash}sizes.json" for folder, slash, _ in places]
    said = _read_all([path for path in dict.fromkeys(commons) if may_be_there(path)])
    sizes = [
        _stated_size(common, said.get(common, {}), name) for common, (_, _, name) in zip(commons, places, strict=True)
    ]
    beside = [f"{folder}{slash}{_stem(name)}_stats.json" for folder, slash, name in places]
    said = _read_all([path for path, size in zip(beside, sizes, strict=True) if size is None and may_be_there(path)])
    return [
        _stated_size(path, said.get(path, {}), "successes") if size is None else size
        for path, size in zip(beside, sizes, strict=True)
    ]


__all__ = ["stated_sizes"]
