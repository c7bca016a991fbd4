"""The data sets of an evaluation: images with labels, with captions, and in pairs."""

import csv
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download

from ..common.commands import require_extra
from ..common.keys import image_digest
from ..common.reading_ahead import check_num_workers, read_ahead
from ..data.counts import non_empty_captions
from ..data.label_names import check_seen, match_labels, name_labels, read_label_names, read_texts, wrong_labels
from ..data.shard_files import names_shards
from ..data.sources import load_image_text_dataset, load_own_labels
from ..model.image_reading_diffclip import is_at_hand
from .picture_files import known_of_pictures
from .specs import DatasetSpec


if TYPE_CHECKING:
    import datasets

# MMVP-VLM's layout.
QUESTIONS, QUESTION_IMAGES = "Questions.csv", "MLLM_VLM Images"


@dataclass
class Labelled:
    """Images with labels.

    Args:
        dataset: Its column `image` isn't decoded.
        labels: Indices into the names, int64, (images,).
        names: The labels' names.
        split: The part that it is.
    """

    dataset: "datasets.Dataset"
    labels: torch.Tensor
    names: list[str]
    split: str


@dataclass
class Captioned:
    """Images with captions.

    Args:
        dataset: Its column `image` isn't decoded.
        captions: Every caption.
        image_of_caption: Each one's image, by its index in `dataset`, int64, (captions,).
        split: The part that it is.
        rows: Each image's row in the whole part, the first of those that share it.
    """

    dataset: "datasets.Dataset"
    captions: list[str]
    image_of_caption: torch.Tensor
    split: str
    rows: list[int]


def _class_names(spec: DatasetSpec) -> tuple[str, ...] | Mapping[str, str] | None:
    """Return the names that a description gives, if any."""
    if spec.class_names is not None or spec.class_names_file is None:
        return spec.class_names
    if os.path.isdir(spec.source):
        return read_label_names(Path(spec.source) / spec.class_names_file)
    return read_label_names(Path(hf_hub_download(spec.source, spec.class_names_file, repo_type="dataset")))


def _refusal(spec: DatasetSpec, split: str, row: int, reason: str, count: int, rows: int) -> ValueError:
    """Return the error of a row that can't be measured, the first of so many."""
    others = f"; {count} of {rows} rows are like it" if count > 1 else ""
    return ValueError(f"{spec.name}: row {row} of the split {split} has {reason}{others}.")


def _check_images(spec: DatasetSpec, dataset: "datasets.Dataset", split: str) -> None:
    """Raise a ValueError where a row has no image, or the path of a file that isn't there; nothing is read."""
    missing: list[tuple[int, str]] = []
    row = 0
    for batch in dataset.select_columns("image").with_format("arrow").iter(1000):
        column = batch["image"].combine_chunks()
        contents, paths = column.field("bytes").is_null().to_pylist(), column.field("path").to_pylist()
        for empty, nothing, path in zip(column.is_null().to_pylist(), contents, paths, strict=True):
            if empty or (nothing and not path):
                missing.append((row, "no image"))
            elif nothing and not is_at_hand(path):
                missing.append((row, f"the image {path:.200}, which isn't there"))
            row += 1
    if not row:
        raise ValueError(f"{spec.name}: the split {split} has no images.")
    if missing:
        raise _refusal(spec, split, *missing[0], len(missing), row)


def _check_source(spec: DatasetSpec) -> None:
    require_extra("evaluation", "datasets")
    if names_shards(spec.source):
        raise ValueError(f"{spec.name} is made of tar shards, which are for training; use a data set of `datasets`.")


def _load_own(spec: DatasetSpec, split: str, label_column: str | None) -> "tuple[datasets.Dataset, list[str], str]":
    """Open images with labels, of which each has an image, as `load_own_labels` does."""
    _check_source(spec)
    dataset, own, column = load_own_labels(
        spec.source, split=split, image_column=spec.image_column, label_column=label_column
    )
    _check_images(spec, dataset, split)
    return dataset, own, column


def _row_labels(spec: DatasetSpec, dataset: "datasets.Dataset", split: str, what: str) -> torch.Tensor:
    """Return each row's index, int64, (rows,)."""
    labels = torch.tensor([-1 if label is None else label for label in dataset["label"]], dtype=torch.int64)
    if unlabelled := (labels < 0).nonzero().flatten().tolist():
        raise _refusal(spec, split, unlabelled[0], f"no {what}", len(unlabelled), len(labels))
    return labels


def load_labelled(spec: DatasetSpec, split: str, own_names: bool = False) -> Labelled:
    """Open one part of a data set of images with labels.

    Args:
        spec: The data set.
        split: The part.
        own_names: Whether its labels go by what they are called there, whatever names the description gives.

    Raises:
        ValueError: As `load_image_label_dataset` raises; or a row has no image or no label.
    """
    dataset, own, column = _load_own(spec, split, spec.label_column)
    labels = _row_labels(spec, dataset, split, "label")
    if own_names:
        return Labelled(dataset, labels, own, split)
    names = _class_names(spec)
    feature = dataset.features["label"]
    if names is None and not hasattr(feature, "names"):
        raise wrong_labels(column, feature)
    indices, found = name_labels(own, names, column)
    return Labelled(dataset, torch.tensor(indices)[labels], found, split)


def with_names(part: Labelled, learned: Labelled) -> Labelled:
    """Return a part whose labels are numbered as another's, which is learned from.

    Raises:
        ValueError: The other part has no such label, or no images of it.
    """
    which, other = f"The split {part.split}", f"the training split {learned.split}"
    indices = match_labels(part.names, learned.names, which, other)
    labels = torch.tensor(indices)[part.labels]
    check_seen(labels.tolist(), learned.labels.tolist(), learned.names, which, other)
    return Labelled(part.dataset, labels, learned.names, part.split)


def _captions(spec: DatasetSpec, dataset: "datasets.Dataset", split: str) -> list[list[str]]:
    """Return each row's captions, those that are one text apart."""
    captions = []
    for row, found in enumerate(read_texts(dataset, "caption")):
        if isinstance(found, str) and spec.caption_separator is not None:
            found = found.split(spec.caption_separator)
        try:
            captions.append(non_empty_captions(found))
        except ValueError as error:
            raise ValueError(f"{spec.name}: row {row} of the split {split}: {error}.") from error
    return captions


def _load_rows(spec: DatasetSpec, split: str) -> "datasets.Dataset":
    """Open images with captions, of which each has an image, as `load_image_text_dataset` does."""
    _check_source(spec)
    dataset = load_image_text_dataset(
        spec.source, split=split, image_column=spec.image_column, caption_column=spec.caption_column
    )
    _check_images(spec, dataset, split)
    return dataset


def _row_digests(spec: DatasetSpec, dataset: "datasets.Dataset", split: str, num_workers: int | None) -> list[str]:
    """Return the SHA-256 of each row's picture, in hexadecimal."""

    def digest_of(row_and_image: tuple[int, Mapping[str, Any] | None]) -> str:
        row, image = row_and_image
        try:
            return image_digest(image).hex()
        except ValueError as error:
            raise ValueError(f"{spec.name}: row {row} of the split {split} can't be read: {error}") from error

    workers = check_num_workers(num_workers)
    return list(read_ahead(enumerate(dataset["image"]), digest_of, workers, min(len(dataset), 4 * workers)))


def load_captioned(spec: DatasetSpec, split: str, num_workers: int | None = None) -> Captioned:
    """Open one part of a data set of images with captions; rows with the same file are one image.

    Args:
        spec: The data set.
        split: The part.
        num_workers: How many workers read the files, by default as many as there are cores.

    Raises:
        ValueError: As `load_image_text_dataset` raises; it names tar shards; or a row has no image or no caption.
    """
    dataset = _load_rows(spec, split)
    captions_of_row = _captions(spec, dataset, split)
    if empty := [row for row, captions in enumerate(captions_of_row) if not captions]:
        raise _refusal(spec, split, empty[0], "no caption", len(empty), len(captions_of_row))
    captions: list[str] = []
    image_of_caption: list[int] = []
    rows: list[int] = []
    image_of_digest: dict[str, int] = {}
    digests = known_of_pictures("rows", dataset, lambda: _row_digests(spec, dataset, split, num_workers))
    for row, (digest, texts) in enumerate(zip(digests, captions_of_row, strict=True)):
        if digest not in image_of_digest:
            image_of_digest[digest] = len(rows)
            rows.append(row)
        captions += texts
        image_of_caption += [image_of_digest[digest]] * len(texts)
    if len(rows) < len(dataset):
        dataset = dataset.select(rows)
    return Captioned(dataset, captions, torch.tensor(image_of_caption), split, rows)


def _mmvp_folder(source: str) -> Path | None:
    """Return the folder of a data set in MMVP-VLM's layout, None where it's in another."""
    if os.path.isdir(source):
        return Path(source) if (Path(source) / QUESTIONS).is_file() else None
    if os.path.exists(source):
        return None
    folder = Path(snapshot_download(source, repo_type="dataset"))
    return folder if (folder / QUESTIONS).is_file() else None


def _read_questions(folder: Path) -> dict[str, list[str]]:
    """Return the columns of MMVP-VLM: images, statements and visual patterns."""
    try:
        with (folder / QUESTIONS).open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row][1:]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / QUESTIONS} can't be read: {error}") from error
    if bad := [row for row in rows if len(row) != 3 or not all(part.strip() for part in row)]:
        raise ValueError(f"{folder / QUESTIONS} has the row {bad[0]}; each must be a number, a pattern, a statement.")
    numbers, patterns, statements = ([row[column].strip() for row in rows] for column in range(3))
    images = [
        str(folder.absolute() / QUESTION_IMAGES / kind / f"{n}.jpg") for n, kind in zip(numbers, patterns, strict=True)
    ]
    return {"image": images, "caption": statements, "pattern": patterns}


def load_pairs(spec: DatasetSpec, split: str) -> tuple[Captioned, list[str]]:
    """Open pairs of images, each with a statement: MMVP-VLM, or a data set of which every two rows are a pair.

    Returns the images with one statement each, and each pair's visual pattern.

    Raises:
        ValueError: As `load_image_text_dataset` raises; there is an odd number of rows; a row has no image or not one
            statement; or two of a pair have different patterns.
    """
    require_extra("evaluation", "datasets")
    import datasets

    folder = _mmvp_folder(spec.source)
    if folder is not None:
        columns = _read_questions(folder)
        patterns = columns["pattern"]
        dataset = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))
        if len(dataset):
            _check_images(spec, dataset, split)
        statements = columns["caption"]
    else:
        dataset, statements, patterns = _load_pair_rows(spec, split)
    if not len(dataset) or len(dataset) % 2:
        raise ValueError(f"{spec.name} has {len(dataset)} rows; there must be an even number, two for each pair.")
    for pair, (first, second) in enumerate(zip(patterns[::2], patterns[1::2], strict=True)):
        if first != second:
            raise ValueError(f"{spec.name}: the two rows of pair {pair} have the patterns {first!r} and {second!r}.")
    rows = list(range(len(dataset)))
    return Captioned(dataset, statements, torch.arange(len(dataset)), split, rows), patterns[::2]


def _load_pair_rows(spec: DatasetSpec, split: str) -> "tuple[datasets.Dataset, list[str], list[str]]":
    """Return the images, each row's statement, and its pattern, `all` where there is no column for it."""
    dataset = _load_rows(spec, split)
    statements = []
    for row, texts in enumerate(_captions(spec, dataset, split)):
        if len(texts) != 1:
            raise ValueError(f"{spec.name}: row {row} of the split {split} has {len(texts)} statements, not one.")
        statements += texts
    if spec.pattern_column is None:
        return dataset, statements, ["all"] * len(dataset)
    whole, names, _ = _load_own(spec, split, spec.pattern_column)
    patterns = _row_labels(spec, whole, split, f"pattern in the column {spec.pattern_column}")
    return dataset, statements, [names[index] for index in patterns.tolist()]


__all__ = ["Captioned", "Labelled", "load_captioned", "load_labelled", "load_pairs", "with_names"]
