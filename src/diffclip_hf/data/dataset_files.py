"""The files of a data set that is here, and what has to be looked at before `datasets` reads them."""

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.known_files import known_values
from ..model.hub_cache_diffclip import sha256_of
from ..model.image_reading_diffclip import RASTER_FORMATS
from .shard_files import expand_braces


# PyArrow itself takes some 60 levels of columns.
MOST_NESTED = 500
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
# Strings have no line breaks.
_STRING, _BRACKET = re.compile(rb'"(?:[^"\\]++|\\.)*+"'), re.compile(rb"[\[\]{}]")
_PICTURES = {f".{name.lower()}" for name in RASTER_FORMATS} | {".jpg", ".tif", ".heic", ".jp2"}


def local_files(source: str) -> list[Path]:
    """Return the files of a folder, or those that a file's name or pattern stands for; none of what isn't here."""
    if os.path.isdir(source):
        return [path for path in Path(source).rglob("*") if path.is_file()]
    paths = (Path(path) for pattern in expand_braces(source) for path in sorted(glob.glob(pattern, recursive=True)))
    return [path for path in paths if path.is_file()]


def _content_digest(paths: Sequence[Path]) -> str:
    """Return the SHA-256 of files' paths, and of what they hold where they aren't pictures.

    Pictures are known to a data set by their paths, and read anew each time. What the others hold is read where they
    have changed since it was last; see `known_values`.
    """
    read = [str(path) for path in paths if path.suffix.lower() not in _PICTURES]
    held = dict(zip(read, known_values("sha256", read, lambda path: sha256_of(Path(path)), "Reading"), strict=True))
    digest = hashlib.sha256()
    for path in map(str, paths):
        digest.update(f"{path}\n{held.get(path, '')}".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _texts(nested: Any) -> list[str]:
    """Return the texts in a nest of lists and mappings."""
    if isinstance(nested, Mapping):
        nested = list(nested.values())
    if isinstance(nested, (list, tuple)):
        return [text for part in nested for text in _texts(part)]
    return [] if nested is None else [os.fspath(nested)]


def named_files(source: str, load_options: Mapping[str, Any]) -> list[Path]:
    """Return the files that `datasets.load_dataset` is to read, as far as they are here.

    Args:
        source: A folder, a file, or a pattern with `*` and braces.
        load_options: Its further arguments, of which `data_dir` and `data_files` may name files too.
    """
    places = [source, *_texts(load_options.get("data_dir")), *_texts(load_options.get("data_files"))]
    return sorted({file.absolute() for place in places for file in local_files(place)})


def content_cache(files: Sequence[Path], load_options: Mapping[str, Any]) -> dict[str, str]:
    """Return the option `cache_dir` with which `datasets` reads local files anew where they hold something else.

    By itself it knows them by their paths, sizes and times, and what a zip file holds by the zip file's path, so that
    it may give what was there before. The folder is named after what they hold, for which one process reads through
    those that have changed; pictures that lie in a folder aren't read, since `datasets` keeps none of them.

    Args:
        files: As `named_files` gives them; without any nothing is returned.
        load_options: The further arguments of `datasets.load_dataset`.
    """
    import datasets

    if not files or load_options.get("streaming"):
        return {}
    folder = load_options.get("cache_dir") or datasets.config.HF_DATASETS_CACHE
    return {"cache_dir": os.path.join(folder, "diffclip_hf", _content_digest(files)[:32])}


def _depths(line: bytes, depth: int) -> tuple[int, int]:
    """Return how deep in JSON a line goes at most and where it ends, if it begins at a depth."""
    marks = _STRING.sub(b"", line)
    opened, closed = (marks.count(one) + marks.count(other) for one, other in ((b"[", b"{"), (b"]", b"}")))
    # Most lines have too few brackets to be looked at one by one.
    if depth + opened <= MOST_NESTED:
        return depth, max(depth + opened - closed, 0)
    deepest = depth
    for mark in _BRACKET.findall(marks):
        depth = depth + 1 if mark in (b"[", b"{") else max(depth - 1, 0)
        deepest = max(deepest, depth)
    return deepest, depth


def _too_deep(path: str) -> str | None:
    """Return what is wrong with JSON that is nested too deeply, None where it isn't."""
    depth = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            deepest, depth = _depths(line, depth)
            if deepest > MOST_NESTED:
                return f"Line {number} of {path} is nested {deepest} deep; it may be {MOST_NESTED} deep."
    return None


def check_depth(files: Iterable[Path]) -> None:
    """Raise a ValueError where JSON is so deep that PyArrow's parser ends the whole process.

    It reads one value over several lines too. Files are read where they have changed since they were last.
    """
    paths = [str(path) for path in files if path.suffix.lower() in JSON_SUFFIXES]
    for reason in known_values("depth", paths, _too_deep, "Reading"):
        if reason is not None:
            raise ValueError(reason)


def check_numbering(files: Iterable[Path], column: str) -> None:
    """Raise a ValueError where Parquet files have the names of a column in different orders.

    Their labels are indices, and `datasets` takes the names of the first file for all.
    """
    import pyarrow.parquet  # type: ignore[import-untyped]

    tables = [path for path in files if path.suffix == ".parquet"]
    first: tuple[Path, Any] | None = None
    for path in tables if len(tables) > 1 else []:
        metadata = pyarrow.parquet.read_schema(path).metadata or {}
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features") or {}
        names = features.get(column, {}).get("names")
        first = first or (path, names)
        if names != first[1]:
            raise ValueError(
                f"{path} numbers the labels of the column {column} otherwise than {first[0]}; write both with the "
                "same names in the same order, or strings."
            )


__all__ = ["check_depth", "check_numbering", "content_cache", "local_files", "named_files"]
