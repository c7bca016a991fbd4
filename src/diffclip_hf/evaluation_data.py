"""The data sets of an evaluation: images with labels, with captions, and in pairs."""

import csv
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download

from .evaluation_presets import DatasetSpec
from .label_names import read_label_names
from .training_counts import non_empty_captions
from .training_data import load_image_label_dataset, load_image_text_dataset


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
        image_of_caption: Each one's image, by its row, int64, (captions,).
        split: The part that it is.
    """

    dataset: "datasets.Dataset"
    captions: list[str]
    image_of_caption: torch.Tensor
    split: str


def _class_names(spec: DatasetSpec) -> tuple[str, ...] | Mapping[str, str] | None:
    """Return the names that a description gives, if any."""
    if spec.class_names is not None or spec.class_names_file is None:
        return spec.class_names
    if os.path.isdir(spec.source):
        return read_label_names(Path(spec.source) / spec.class_names_file)
    return read_label_names(Path(hf_hub_download(spec.source, spec.class_names_file, repo_type="dataset")))


def load_labelled(spec: DatasetSpec, split: str) -> Labelled:
    """Open one part of a data set of images with labels.

    Raises:
        ValueError: As `load_image_label_dataset` raises; the names aren't as many as the labels; or an image has none.
    """
    dataset, names = load_image_label_dataset(
        spec.source,
        split=split,
        image_column=spec.image_column,
        label_column=spec.label_column,
        label_names=_class_names(spec),
    )
    labels = torch.tensor([-1 if label is None else label for label in dataset["label"]], dtype=torch.int64)
    if not len(labels):
        raise ValueError(f"{spec.name}: the split {split} has no images.")
    if unlabelled := int((labels < 0).sum()):
        raise ValueError(f"{spec.name}: {unlabelled} of {len(labels)} images of the split {split} have no label.")
    return Labelled(dataset, labels, names, split)


def with_names(part: Labelled, names: Sequence[str]) -> Labelled:
    """Return a part whose labels are indices into `names`, where two parts number the same labels differently.

    Raises:
        ValueError: A label of the part isn't among the names.
    """
    if part.names == list(names):
        return part
    index_of_name = {name: index for index, name in enumerate(names)}
    if unknown := [name for name in part.names if name not in index_of_name]:
        raise ValueError(f"The split {part.split} has labels that the training split lacks: {', '.join(unknown)}.")
    indices = torch.tensor([index_of_name[name] for name in part.names])
    return Labelled(part.dataset, indices[part.labels], list(names), part.split)


def _digest(image: dict[str, Any]) -> bytes:
    """Return what tells one encoded image from another."""
    content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
    return hashlib.sha256(content).digest()


def load_captioned(spec: DatasetSpec, split: str) -> Captioned:
    """Open one part of a data set of images with captions; rows with the same file are one image.

    Raises:
        ValueError: As `load_image_text_dataset` raises; it names tar shards; or an image has no caption.
    """
    dataset = load_image_text_dataset(
        spec.source, split=split, image_column=spec.image_column, caption_column=spec.caption_column
    )
    if not hasattr(dataset, "column_names"):
        raise ValueError(f"{spec.name} is made of tar shards, which are for training; use a data set of `datasets`.")
    captions: list[str] = []
    image_of_caption: list[int] = []
    rows: list[int] = []
    image_of_digest: dict[bytes, int] = {}
    for row, found in enumerate(dataset):
        texts = found["caption"]
        if isinstance(texts, str) and spec.caption_separator is not None:
            texts = texts.split(spec.caption_separator)
        texts = non_empty_captions(texts)
        if not texts:
            raise ValueError(f"{spec.name}: row {row} of the split {split} has no caption.")
        digest = _digest(found["image"])
        if digest not in image_of_digest:
            image_of_digest[digest] = len(rows)
            rows.append(row)
        captions += texts
        image_of_caption += [image_of_digest[digest]] * len(texts)
    if not captions:
        raise ValueError(f"{spec.name}: the split {split} has no images.")
    if len(rows) < len(dataset):
        dataset = dataset.select(rows)
    return Captioned(dataset, captions, torch.tensor(image_of_caption), split)


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
    with (folder / QUESTIONS).open(newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file) if row][1:]
    if bad := [row for row in rows if len(row) != 3]:
        raise ValueError(f"{folder / QUESTIONS} has the row {bad[0]}; each must be a number, a pattern, a statement.")
    numbers, patterns, statements = ([row[column].strip() for row in rows] for column in range(3))
    images = [str(folder / QUESTION_IMAGES / kind / f"{n}.jpg") for n, kind in zip(numbers, patterns, strict=True)]
    return {"image": images, "caption": statements, "pattern": patterns}


def load_pairs(spec: DatasetSpec, split: str) -> tuple[Captioned, list[str]]:
    """Open pairs of images, each with a statement: MMVP-VLM, or a data set of which every two rows are a pair.

    Returns the images with one statement each, and each pair's visual pattern.

    Raises:
        ValueError: As `load_image_text_dataset` raises; there is an odd number of rows; or two of a pair have
            different patterns.
    """
    import datasets

    folder = _mmvp_folder(spec.source)
    if folder is not None:
        columns = _read_questions(folder)
        patterns = columns["pattern"]
        dataset = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))
    else:
        dataset, patterns = _load_pair_rows(spec, split)
    if not len(dataset) or len(dataset) % 2:
        raise ValueError(f"{spec.name} has {len(dataset)} rows; there must be an even number, two for each pair.")
    for pair, (first, second) in enumerate(zip(patterns[::2], patterns[1::2], strict=True)):
        if first != second:
            raise ValueError(f"{spec.name}: the two rows of pair {pair} have the patterns {first!r} and {second!r}.")
    return Captioned(dataset, list(dataset["caption"]), torch.arange(len(dataset)), split), patterns[::2]


def _load_pair_rows(spec: DatasetSpec, split: str) -> "tuple[datasets.Dataset, list[str]]":
    """Return the images with statements, and each row's pattern, `all` where there is no column for it."""
    dataset = load_image_text_dataset(
        spec.source, split=split, image_column=spec.image_column, caption_column=spec.caption_column
    )
    if spec.pattern_column is None:
        return dataset, ["all"] * len(dataset)
    whole, names = load_image_label_dataset(
        spec.source, split=split, image_column=spec.image_column, label_column=spec.pattern_column
    )
    return dataset, [names[index] for index in whole["label"]]


__all__ = ["Captioned", "Labelled", "load_captioned", "load_labelled", "load_pairs", "with_names"]
