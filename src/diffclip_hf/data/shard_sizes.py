"""How many samples tar shards have, by the files that img2dataset and WebDataset write beside them."""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from .shard_files import SHARD_SUFFIXES, open_shard


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


def stated_sizes(shards: Sequence[str]) -> list[int | None]:
    """Return how many samples each shard has by the files beside it, None where they don't say.

    Raises:
        ValueError: Such a file isn't JSON, or states no number of samples.
    """
    read_sizes = functools.cache(_read_sizes)
    sizes: list[int | None] = []
    for path in shards:
        folder, slash, name = path.rpartition("/")
        stem = next((name.removesuffix(suffix) for suffix in SHARD_SUFFIXES if name.endswith(suffix)), name)
        beside, common = f"{folder}{slash}{stem}_stats.json", f"{folder}{slash}sizes.json"
        stated = _stated_size(beside, read_sizes(beside), "successes")
        sizes.append(_stated_size(common, read_sizes(common), name) if stated is None else stated)
    return sizes


__all__ = ["stated_sizes"]
