"""The files of a data set that is here, and what has to be looked at before `datasets` reads them."""

import glob
import json
import os
import re
from pathlib import Path
from typing import Any

from .shards import expand_braces


# PyArrow itself takes some 60 levels of columns.
MOST_NESTED = 500
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
# Strings have no line breaks.
_STRING, _BRACKET = re.compile(rb'"(?:[^"\\]++|\\.)*+"'), re.compile(rb"[\[\]{}]")


def local_files(source: str) -> list[Path]:
    """Return the files of a folder, or those that a file's name or pattern stands for; none of what isn't here."""
    if os.path.isdir(source):
        return [path for path in Path(source).rglob("*") if path.is_file()]
    return [Path(path) for pattern in expand_braces(source) for path in sorted(glob.glob(pattern))]


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


def check_depth(source: str) -> None:
    """Raise a ValueError where a folder's JSON is so deep that PyArrow's parser ends the whole process.

    It reads one value over several lines too.
    """
    for path in sorted(local_files(source)):
        if path.suffix.lower() not in JSON_SUFFIXES:
            continue
        depth = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                deepest, depth = _depths(line, depth)
                if deepest > MOST_NESTED:
                    raise ValueError(
                        f"Line {number} of {path} is nested {deepest} deep; it may be {MOST_NESTED} deep."
                    )


def check_numbering(source: str, column: str) -> None:
    """Raise a ValueError where Parquet files have the names of a column in different orders.

    Their labels are indices, and `datasets` takes the names of the first file for all.
    """
    import pyarrow.parquet  # type: ignore[import-untyped]

    files = sorted(path for path in local_files(source) if path.suffix == ".parquet")
    first: tuple[Path, Any] | None = None
    for path in files if len(files) > 1 else []:
        metadata = pyarrow.parquet.read_schema(path).metadata or {}
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features") or {}
        names = features.get(column, {}).get("names")
        first = first or (path, names)
        if names != first[1]:
            raise ValueError(
                f"{path} numbers the labels of the column {column} otherwise than {first[0]}; write both with the "
                "same names in the same order, or strings."
            )


__all__ = ["check_depth", "check_numbering", "local_files"]
