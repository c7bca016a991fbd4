"""Where pictures with captions or labels come from: tar shards, files, folders and the Hub.

A source yields rows `{"image": {"bytes": ..., "path": ...}, "caption": ...}` whose image is still as it is stored, so
that a resumed run passes over what it has seen without decoding anything. The collators do the rest.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.commands import require_extra
from ..common.loading import find_source
from .dataset_files import check_depth, check_numbering, content_cache, local_files, named_files
from .label_names import check_texts, name_labels, own_labels, renumbered, wrong_labels
from .shard_files import expand_braces, names_shards
from .shards import ImageTextShards


if TYPE_CHECKING:
    import datasets

# What the columns are called in the data sets of the Hub, and in tar shards that `datasets` has read.
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")
CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "sentence", "sentences", "description", "alt_text")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")


def _choose_column(columns: Sequence[str], usual: Sequence[str], told: str | None, argument: str) -> str:
    found = [told] if told is not None else [name for name in columns if name in usual]
    if len(found) == 1 and found[0] in columns:
        return found[0]
    told_of = (
        f"{argument} is {told!r}, which isn't among them"
        if told is not None
        else (f"{', '.join(found) or 'none of them'} could be it; pass {argument}")
    )
    raise ValueError(f"The data set has the columns {', '.join(columns)}; {told_of}.")


def _as_images(dataset: "datasets.Dataset", column: str) -> "datasets.Dataset":
    """Return the data set with its column of images undecoded."""
    import datasets

    feature = dataset.features[column]
    kind = getattr(feature, "dtype", None)
    if isinstance(feature, datasets.Value) and kind not in (
        *("string", "large_string", "binary", "large_binary"),
        "null",
    ):
        raise ValueError(
            f"The column {column} is {feature}; images must be encoded, as bytes or base64 text, or paths."
        )
    return dataset.cast_column(column, datasets.Image(decode=False))


def _two_columns(
    dataset: "datasets.Dataset", image_column: str | None, target: str, usual: Sequence[str], told: str | None
) -> "tuple[datasets.Dataset, str]":
    """Return the columns `image`, undecoded, and `caption` or `label` alone, and what the latter is called there."""
    if dataset.column_names is None:  # Of a stream, before its first rows are read.
        dataset = dataset._resolve_features()
    chosen = {
        "image": _choose_column(dataset.column_names, IMAGE_COLUMNS, image_column, "image_column"),
        target: _choose_column(dataset.column_names, usual, told, f"{target}_column"),
    }
    return _with_columns(dataset, chosen), chosen[target]


def _with_columns(dataset: "datasets.Dataset", chosen: Mapping[str, str]) -> "datasets.Dataset":
    """Return the columns `chosen` alone, new name → old, of which `image` is undecoded."""
    # First, for a stream would decode its images, and encode them anew, to rename their column.
    dataset = _as_images(dataset, chosen["image"]).select_columns(list(chosen.values()))
    return dataset.rename_columns({old: new for new, old in chosen.items() if old != new})


def _no_such_split(source: str, split: str, splits: Iterable[str]) -> ValueError:
    return ValueError(f"split is {split!r}; {source!r} has {', '.join(splits)}, so name one of these.")


def _load(source: str, split: str, load_options: dict[str, Any]) -> "tuple[datasets.Dataset, list[Path]]":
    """Read a map-style data set of the `datasets` library, whichever way it is stored; return its files too.

    Of a folder of `save_to_disk`, and of what isn't here, none are returned.
    """
    require_extra("training", "datasets")
    import datasets
    import pyarrow  # type: ignore[import-untyped]

    if not source.endswith(".parquet"):
        source = find_source(source, repo_type="dataset")
        if os.path.isfile(source):
            raise ValueError(f"{source} is a file, and no Parquet file or tar shard; name a folder or a data set.")
    elif "://" not in source and not local_files(source):
        raise ValueError(f"There is no file {source}.")
    if any(os.path.isfile(os.path.join(source, name)) for name in ("state.json", "dataset_dict.json")):
        if load_options:
            raise ValueError(f"{', '.join(load_options)} can't be used with {source!r}, a folder of save_to_disk.")
        loaded = datasets.load_from_disk(source)
        if isinstance(loaded, datasets.Dataset):
            return loaded, []
        if split not in loaded:
            raise _no_such_split(source, split, loaded)
        return loaded[split], []
    found = named_files(source, load_options)
    check_depth(found)
    load_options = load_options | content_cache(found, load_options)
    # Of files that it can't read the library raises these, its own with what says more behind it.
    try:
        if source.endswith(".parquet"):
            files = {split: expand_braces(source)}
            return datasets.load_dataset("parquet", data_files=files, split=split, **load_options), found
        return datasets.load_dataset(source, split=split, **load_options), found
    except (
        datasets.exceptions.DatasetsError,
        *(pyarrow.lib.ArrowException, LookupError, TypeError, AttributeError),
    ) as error:
        reason = error.__cause__ or error
        # What it says of a Parquet file whose one group of rows is empty; of one without a group it says the other.
        if "BatchSize must be greater than 0" in str(reason):
            raise ValueError(f"{source} has no rows.") from error
        raise ValueError(f"{source} can't be read: {type(reason).__name__}: {reason}") from error
    except ValueError as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"{source} has no rows.") from error
        if (others := re.search(r"Unknown split .* one of \[(.*)\]", str(error))) is None:
            raise
        raise _no_such_split(source, split, re.findall(r"'([^']+)'", others[1])) from error


def _check_captions(dataset: Any, column: str, read: bool) -> None:
    """Raise a ValueError if captions, whose source calls them `column`, aren't texts; `read` looks at each."""
    feature = dataset.features["caption"]
    text = getattr(feature, "feature", feature)
    if getattr(text, "dtype", None) not in ("string", "large_string"):
        raise ValueError(f"The column {column} is {feature}; captions must be strings or lists of strings.")
    if read:
        check_texts(dataset, "caption")


def load_image_text_dataset(
    source: str,
    *,
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    shuffle_buffer: int = 1000,
    max_skipped_share: float = 0.01,
    max_broken_share: float = 0.1,
    **load_options: Any,
) -> "datasets.Dataset | ImageTextShards":
    """Open image–caption data wherever it is, for `ImageTextCollator`.

    Returns a map-style data set with the columns `image`, undecoded, and `caption`, a string or a list of strings; or
    `ImageTextShards` where `source` names tar shards.

    Args:
        source: Tar shards (see `find_shards`); Parquet files, `*` and braces allowed; a folder of
            `Dataset.save_to_disk`; a folder with pictures and `metadata.csv` or `metadata.jsonl`; or a data set's name
            on the Hub.
        split: Which part of the data set. Tar shards, Parquet files and a saved `Dataset` are one part, whatever it's
            called.
        image_column: What the images' column is called, if not by one of the usual names (`IMAGE_COLUMNS`).
        caption_column: Likewise the captions' (`CAPTION_COLUMNS`).
        batch_size: For tar shards, which need it.
        seed: For tar shards; the order of a map-style data set is the Trainer's affair.
        shuffle_buffer: For tar shards.
        max_skipped_share: For tar shards; `ImageTextCollator` has one of its own.
        max_broken_share: For tar shards.
        load_options: For `datasets.load_dataset`, such as `name`, `revision` or `cache_dir`.

    Raises:
        ValueError: A column isn't found or isn't the only one of its kind, the captions aren't strings, the split
            isn't there, or `batch_size` is missing.
    """
    if names_shards(source):
        if batch_size is None:
            raise ValueError(f"batch_size is None; {source!r} names tar shards, which need it.")
        if load_options:
            raise ValueError(f"{', '.join(load_options)} can't be used with {source!r}, which names tar shards.")
        return ImageTextShards(
            source,
            batch_size,
            seed=seed,
            shuffle_buffer=shuffle_buffer,
            max_skipped_share=max_skipped_share,
            max_broken_share=max_broken_share,
        )
    require_extra("training", "datasets")

    dataset, _ = _load(source, split, load_options)
    dataset, column = _two_columns(dataset, image_column, "caption", CAPTION_COLUMNS, caption_column)
    _check_captions(dataset, column, read=not load_options.get("streaming"))
    return dataset


def load_pictures(
    source: str,
    *,
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    captions: bool = True,
) -> "tuple[datasets.Dataset, list[Path]]":
    """Open pictures, with their captions where they have any, that aren't in tar shards.

    Returns a map-style data set with the column `image`, undecoded, and perhaps `caption`; and its files here.
    Nothing was asked of single rows.

    Args:
        source, split, image_column, caption_column: As in `load_image_text_dataset`, but that no column of captions
            has to be there where none is named.
        captions: Whether they are wanted.

    Raises:
        ValueError: As `load_image_text_dataset` raises.
    """
    require_extra("training", "datasets")

    dataset, files = _load(source, split, {})
    columns = dataset.column_names
    chosen = {"image": _choose_column(columns, IMAGE_COLUMNS, image_column, "image_column")}
    if captions and (caption_column is not None or any(name in CAPTION_COLUMNS for name in columns)):
        chosen["caption"] = _choose_column(columns, CAPTION_COLUMNS, caption_column, "caption_column")
    dataset = _with_columns(dataset, chosen)
    if "caption" in chosen:
        _check_captions(dataset, chosen["caption"], read=False)
    return dataset, files or [Path(part["filename"]) for part in dataset.cache_files]


def load_own_labels(
    source: str,
    *,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    **load_options: Any,
) -> "tuple[datasets.Dataset, list[str], str]":
    """Open labelled images as `load_image_label_dataset` does, with what the labels and their column are called there.

    Plain indices are called by their numbers, up to the largest that there is. The arguments are those of
    `load_image_label_dataset`.

    Raises:
        ValueError: A column isn't found or isn't the only one of its kind, labels are of another type, or the split
            isn't there.
    """
    require_extra("training", "datasets")

    if names_shards(source):
        raise ValueError(f"{source!r} names tar shards, which have captions rather than labels.")
    if load_options.get("streaming"):
        raise ValueError("streaming is True; labels are numbered over the whole data set, so leave it out.")
    dataset, files = _load(source, split, load_options)
    # Before the labels are numbered, which goes through every row.
    dataset, column = _two_columns(dataset, image_column, "label", LABEL_COLUMNS, label_column)
    check_numbering(files, column)
    return *own_labels(dataset, column), column


def load_image_label_dataset(
    source: str,
    *,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    label_names: Sequence[str] | Mapping[str, str] | None = None,
    **load_options: Any,
) -> "tuple[datasets.Dataset, list[str]]":
    """Open labelled images wherever they are, for `ImageLabelCollator`.

    Returns a map-style data set with the columns `image`, undecoded, and `label`, an index; and the labels' names.

    Args:
        source: As in `load_image_text_dataset`, but for tar shards; or a folder with one folder of images a label.
        split: Which part of the data set.
        image_column: As in `load_image_text_dataset`.
        label_column: What the labels' column is called, if not by one of the usual names (`LABEL_COLUMNS`). It has
            names with its indices (`ClassLabel`), or strings, which are numbered in alphabetical order.
        label_names: The labels' names, instead of the column's own; a column of plain indices needs them. A mapping
            from label to name, or a list: see `name_labels` for which is whose.
        load_options: For `datasets.load_dataset`.

    Raises:
        ValueError: A column isn't found or isn't the only one of its kind, the labels have no names, it isn't sure
            which of `label_names` are theirs, or the split isn't there.
    """
    require_extra("training", "datasets")
    import datasets

    dataset, own, column = load_own_labels(
        source, split=split, image_column=image_column, label_column=label_column, **load_options
    )
    feature = dataset.features["label"]
    if label_names is None and not isinstance(feature, datasets.ClassLabel):
        raise wrong_labels(column, feature)
    indices, names = name_labels(own, label_names, column)
    return renumbered(dataset, indices), names


__all__ = ["load_image_label_dataset", "load_image_text_dataset", "load_own_labels", "load_pictures"]
