"""The files that a data set's pictures lie in, by which it's known whether they have changed without reading them."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..common.known_files import known_value


if TYPE_CHECKING:
    import datasets


def picture_files(dataset: "datasets.Dataset") -> list[str] | None:
    """Return the files that hold a data set's pictures: its tables, and in order those that are files of their own.

    None where a picture is in memory alone, in an archive, at a URL or nowhere.

    Args:
        dataset: With a column `image`, not decoded.
    """
    import pyarrow.compute as pc  # type: ignore[import-untyped]

    tables = [os.path.abspath(part["filename"]) for part in dataset.cache_files]
    column = dataset.data.column("image")
    # By itself a data set would read the rows' bytes too, to put them in order.
    outside, paths = pc.struct_field(column, "bytes").is_null(), pc.struct_field(column, "path")
    if dataset._indices is not None:
        outside, paths = (part.take(dataset._indices.column(0)) for part in (outside, paths))
    files = paths.filter(outside).to_pylist()
    if not tables and len(files) < len(dataset):
        return None
    if not all(path and os.path.isabs(path) and os.path.isfile(path) for path in files):
        return None
    return tables + files


def known_of_pictures(kind: str, dataset: "datasets.Dataset", compute: Callable[[], Any]) -> Any:
    """Return what `compute` returns of a data set's pictures, computed only if they have changed since it was kept.

    Args:
        kind: What it is.
        dataset: With a column `image`, not decoded.
        compute: Returns what JSON can hold.
    """
    files = picture_files(dataset)
    # The fingerprint stands for which rows and columns of the tables it has.
    return compute() if files is None else known_value(kind, dataset._fingerprint, files, compute)


__all__ = ["known_of_pictures", "picture_files"]
