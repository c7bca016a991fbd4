"""Image–caption data for training: sources of encoded images, and the collator that decodes them.

A source yields rows `{"image": {"bytes": ..., "path": ...}, "caption": ...}` whose image is still as it is stored, so
that passing over what a resumed run has already seen decodes nothing. `ImageTextCollator` does the rest, in the
DataLoader's workers.
"""

import math
import operator
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from transformers import ProcessorMixin

from ..common.commands import require_extra
from ..common.loading import find_source
from ..model.image_reading_diffclip import open_image, orientation, read_encoded, to_rgb
from .counts import SkipCounts, non_empty_captions
from .dataset_files import check_depth, check_numbering
from .label_names import name_labels, own_labels, renumbered, wrong_labels
from .shards import ImageTextShards, expand_braces, names_shards


if TYPE_CHECKING:
    import datasets

# What the columns are called in the data sets of the Hub, and in tar shards that `datasets` has read.
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")
CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "sentence", "sentences", "description", "alt_text")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")
# Torchvision's, and so SLIP's.
CROP_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
SIDEWAYS = (5, 6, 7, 8)


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
        raise ValueError(f"The column {column} is {feature}; images must be encoded, or paths.")
    return dataset.cast_column(column, datasets.Image(decode=False))


def _load(source: str, split: str, load_options: dict[str, Any]) -> "datasets.Dataset":
    """Read a map-style data set of the `datasets` library, whichever way it is stored."""
    require_extra("training", "datasets")
    import datasets
    import pyarrow  # type: ignore[import-untyped]

    if not source.endswith(".parquet"):
        source = find_source(source, repo_type="dataset")
        if os.path.isfile(source):
            raise ValueError(f"{source} is a file, and no Parquet file or tar shard; name a folder or a data set.")
    if any(os.path.isfile(os.path.join(source, name)) for name in ("state.json", "dataset_dict.json")):
        if load_options:
            raise ValueError(f"{', '.join(load_options)} can't be used with {source!r}, a folder of save_to_disk.")
        loaded = datasets.load_from_disk(source)
        if isinstance(loaded, datasets.Dataset):
            return loaded
        if split not in loaded:
            raise ValueError(f"split is {split!r}; {source!r} has {', '.join(loaded)}.")
        return loaded[split]
    check_depth(source)
    # Of files that it can't read the library raises these, its own with what says more behind it.
    try:
        if source.endswith(".parquet"):
            files = {split: expand_braces(source)}
            return datasets.load_dataset("parquet", data_files=files, split=split, **load_options)
        return datasets.load_dataset(source, split=split, **load_options)
    except (
        datasets.exceptions.DatasetsError,
        *(pyarrow.lib.ArrowException, LookupError, TypeError, AttributeError),
    ) as error:
        reason = error.__cause__ or error
        raise ValueError(f"{source} can't be read: {type(reason).__name__}: {reason}") from error


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

    dataset = _load(source, split, load_options)
    if dataset.column_names is None:  # Of a stream, before its first rows are read.
        dataset = dataset._resolve_features()
    chosen = {
        "image": _choose_column(dataset.column_names, IMAGE_COLUMNS, image_column, "image_column"),
        "caption": _choose_column(dataset.column_names, CAPTION_COLUMNS, caption_column, "caption_column"),
    }
    # First, for a stream would decode its images, and encode them anew, to rename their column.
    dataset = _as_images(dataset, chosen["image"]).select_columns(list(chosen.values()))
    dataset = dataset.rename_columns({old: new for new, old in chosen.items() if old != new})
    feature = dataset.features["caption"]
    text = getattr(feature, "feature", feature)
    if getattr(text, "dtype", None) not in ("string", "large_string"):
        raise ValueError(f"The column {chosen['caption']} is {feature}; captions must be strings or lists of strings.")
    return dataset


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
    dataset = _load(source, split, load_options)
    chosen = {
        "image": _choose_column(dataset.column_names, IMAGE_COLUMNS, image_column, "image_column"),
        "label": _choose_column(dataset.column_names, LABEL_COLUMNS, label_column, "label_column"),
    }
    # First, before the labels are numbered, which goes through every row.
    dataset = _as_images(dataset, chosen["image"]).select_columns(list(chosen.values()))
    dataset = dataset.rename_columns({old: new for new, old in chosen.items() if old != new})
    check_numbering(source, chosen["label"])
    return *own_labels(dataset, chosen["label"]), chosen["label"]


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


def random_crop_box(
    width: int, height: int, scale: tuple[float, float], generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw a box as torchvision's RandomResizedCrop does: left, top, width and height in pixels.

    Its area is a uniform share of the image's, and the logarithm of its width over its height is uniform between
    those of 3/4 and 4/3. After ten boxes that don't fit, it's the largest in the middle whose shape is allowed.
    Torchvision's own draws from the generator that all of torch shares, which would make a sample's crop depend on
    what was drawn before it.

    Args:
        width: At least 1 pixel.
        height: Likewise.
        scale: The smallest and the largest share.
        generator: Where the numbers come from.
    """
    shortest, longest = np.log(CROP_RATIO)
    for _ in range(CROP_ATTEMPTS):
        area = width * height * generator.uniform(*scale)
        ratio = np.exp(generator.uniform(shortest, longest))
        box_width, box_height = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(generator.integers(width - box_width + 1))
            return left, int(generator.integers(height - box_height + 1)), box_width, box_height
    box_width = min(width, max(round(height * CROP_RATIO[1]), 1))
    box_height = min(height, max(round(width / CROP_RATIO[0]), 1))
    return (width - box_width) // 2, (height - box_height) // 2, box_width, box_height


def decode_crop(
    image: Image.Image,
    size: tuple[int, int],
    scale: tuple[float, float],
    resample: Image.Resampling,
    generator: np.random.Generator,
) -> Image.Image:
    """Decode a random crop of an image that Pillow has opened and resize it to a width and height.

    A JPEG is decoded at half, a quarter or an eighth of its size where the crop still has no fewer pixels than wanted.
    Any mode and orientation is allowed, as in `to_rgb`.

    Args:
        image: As `open_image` gives it.
        size: The result's width and height in pixels.
        scale: See `random_crop_box`.
        resample: Pillow's filter for resizing.
        generator: Where the box comes from.
    """
    width, height = image.size
    if orientation(image) in SIDEWAYS:
        width, height = height, width
    left, top, box_width, box_height = random_crop_box(width, height, scale, generator)
    shrinkage = min(box_width / size[0], box_height / size[1])
    # Of other formats than JPEG this changes nothing.
    image.draft(image.mode, (math.ceil(image.width / shrinkage), math.ceil(image.height / shrinkage)))
    rgb = to_rgb(image)
    across, down = rgb.width / width, rgb.height / height
    box = (left * across, top * down, (left + box_width) * across, (top + box_height) * down)
    return rgb.crop(tuple(round(side) for side in box)).resize(size, resample)  # type: ignore[arg-type]


class _ImageCollator:
    """What the collators share: images decoded, cut and normalised, and rows without use dropped and counted."""

    # What rows without use are counted as, the image apart: those without a target first.
    kinds: tuple[str, ...]
    missing_reason: str
    # The argument that names the column of what the image is trained towards.
    target_column: str

    def __init__(
        self,
        processor: ProcessorMixin,
        *,
        train: bool | None = None,
        crop_scale: Sequence[float] = (0.5, 1.0),
        seed: int = 0,
        max_skipped_share: float = 0.01,
        image_column: str = "image",
    ):
        if train is None:
            raise TypeError("train is missing; pass True to cut images at random, as in training, or else False.")
        if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
            raise TypeError(f"processor is of type {type(processor).__name__}; it must be a DiffCLIPProcessor.")
        smallest, largest = crop_scale
        if not 0 < smallest <= largest <= 1:
            raise ValueError(f"crop_scale is {crop_scale}; it must be two numbers in ascending order, in 0..1, not 0.")
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must be at least 0.")
        self.processor: Any = processor
        self.train, self.crop_scale, self.seed = train, (smallest, largest), seed
        self.image_column = image_column
        self._skipped = SkipCounts(("corrupt_images", *self.kinds), max_skipped_share)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def counts(self) -> dict[str, int]:
        """How many rows have been `seen`, in workers too, and how many of each kind were dropped."""
        return self._skipped.counts

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, on which the random crops depend; reaches workers that are already running."""
        self._epoch.fill_(epoch)

    def check(self, counts: Mapping[str, int] | None = None) -> None:
        """Raise a ValueError if more rows were dropped than allowed, however few were seen.

        Args:
            counts: What is judged, such as one pass of all processes; by default all that this process counted.
        """
        self._skipped.check(counts, least_seen=1)

    def _targets(self, cell: Any) -> list[Any]:
        """Return what a row's image may be trained towards, of its column for that.

        Raises:
            ValueError: It can't be used.
        """
        raise NotImplementedError

    def _batch_of(self, targets: list[Any]) -> dict[str, Any]:
        """Return the part of the batch that isn't images."""
        raise NotImplementedError

    def __call__(self, rows: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
        present = [row for row in rows if row is not None]
        if rows and not present:
            return {}
        if len(present) < len(rows):
            raise ValueError(
                f"{len(rows) - len(present)} of a batch's {len(rows)} rows are None; ImageTextShards must have the "
                "DataLoader's batch_size."
            )
        images, targets = [], []
        for row in present:
            pair = self._decode_row(row)
            if pair is not None:
                images.append(pair[0])
                targets.append(pair[1])
        self._skipped.check()
        return {**self._pixels(images), **self._batch_of(targets)}

    def _cell(self, row: Mapping[str, Any], argument: str) -> Any:
        """Return what a row has in the column that an argument names."""
        column = getattr(self, argument)
        if not isinstance(row, Mapping):
            raise TypeError(f"A row is of type {type(row).__name__}; it must have columns by name.")
        if column not in row:
            raise ValueError(
                f"A row has {', '.join(map(str, row)) or 'no columns'}; {argument} is {column!r}, which isn't there."
            )
        return row[column]

    def _decode_row(self, row: Mapping[str, Any]) -> tuple[Image.Image, Any] | None:
        """Return a row's image and target, None if one of them is of no use."""
        self._skipped.see()
        image, cell = self._cell(row, "image_column"), self._cell(row, self.target_column)
        if image is not None and not isinstance(image, (bytes, str, os.PathLike, Mapping)):
            raise TypeError(
                f"The column {self.image_column} has a {type(image).__name__}; it must have encoded images, as after "
                f'`dataset.cast_column("{self.image_column}", datasets.Image(decode=False))`.'
            )
        if image is None or isinstance(image, bytes):
            image = {"bytes": image}
        elif not isinstance(image, Mapping):
            image = {"path": image}
        which = row.get("key") or image.get("path")
        try:
            targets = self._targets(cell)
        except ValueError as error:
            self._skipped.skip(self.kinds[-1], which or "a row", str(error))
            return None
        if not targets:
            self._skipped.skip(self.kinds[0], which or "a row", self.missing_reason)
            return None
        which = which or f"the image of {targets[0]!r}"
        # A damaged file makes Pillow and its plug-ins raise nearly anything.
        try:
            encoded = read_encoded(image)
            generator = np.random.default_rng((self.seed, int(self._epoch), zlib.crc32(encoded)))
            return self._decode(encoded, generator), targets[generator.integers(len(targets)) if self.train else 0]
        except Exception as error:
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            self._skipped.skip("corrupt_images", which, reason)
            return None

    def _decode(self, encoded: bytes, generator: np.random.Generator) -> Image.Image:
        with open_image(encoded) as image:
            if not self.train:
                return to_rgb(image)
            image_processor = self.processor.image_processor
            return decode_crop(image, self._size(), self.crop_scale, image_processor.resample, generator)

    def _size(self) -> tuple[int, int]:
        """Return the width and height of the model's images in pixels."""
        size = self.processor.image_processor.crop_size
        return size["width"], size["height"]

    def _pixels(self, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        if not images:
            width, height = self._size()
            return {"pixel_values": torch.zeros(0, 3, height, width)}
        done = {"do_resize": False, "do_center_crop": False} if self.train else {}
        return {"pixel_values": self.processor.image_processor(images, return_tensors="pt", **done)["pixel_values"]}


class ImageTextCollator(_ImageCollator):
    """Makes a batch of image–caption rows: decodes the images, cuts and normalises them, and tokenizes the captions.

    In training each image is cut at random and resized to the image processor's `crop_size` with its `resample`
    (RandomResizedCrop, the paper's augmentation), and one of several captions is drawn; otherwise the image processor
    does what it always does, and the first caption is taken. What is drawn depends on the seed, the epoch and the
    image's bytes alone, so it is the same whatever the workers, and after resuming.

    A row is dropped from the batch and counted where its image is missing, can't be read by `open_image` or is larger
    or longer than that allows; where all its captions are empty; and where one isn't text or has half a character.

    Called with a list of rows `{image_column: {"bytes": ..., "path": ...}, caption_column: ...}` (the image may be
    plain bytes or a path too), returns `pixel_values`, float32, (batch, 3, height, width), `input_ids` and
    `attention_mask`, int64, (batch, length), and `return_loss`, True. If every row is dropped, the batch has 0 rows,
    which the model takes. A list of None, from `ImageTextShards.set_position`, gives `{}`.

    Args:
        processor: A DiffCLIPProcessor.
        train: Whether to cut and draw at random.
        crop_scale: The smallest and largest share of the image's area that a random crop has.
        seed: At least 0.
        max_skipped_share: The largest share of rows dropped, of at least 1,000 that have been seen, and of a whole
            pass, however few, where `DiffCLIPTrainer` trains or evaluates.
        pad_to_max_length: Whether every text is padded to the tokenizer's `model_max_length`, for compiled models,
            rather than to the longest of the batch.
        image_column: What the image is called in a row.
        caption_column: What the caption or list of captions is called.

    Raises:
        ValueError: An argument isn't allowed; more rows than allowed had to be dropped; a row lacks a column; or only
            some of a batch's rows are None.
        TypeError: An image is already decoded, a label isn't an index, `train` is missing, or `processor` is none.
    """

    kinds = ("empty_captions", "undecodable_captions")
    target_column = "caption_column"
    missing_reason = "it has no caption"

    def __init__(
        self,
        processor: ProcessorMixin,
        *,
        pad_to_max_length: bool = False,
        caption_column: str = "caption",
        **options: Any,
    ):
        super().__init__(processor, **options)
        self.pad_to_max_length = pad_to_max_length
        self.caption_column = caption_column

    def _targets(self, cell: Any) -> list[str]:
        return non_empty_captions(cell)

    def _batch_of(self, targets: list[str]) -> dict[str, Any]:
        tokenizer = self.processor.tokenizer
        padding = "max_length" if self.pad_to_max_length else True
        # Without a text the tokenizer makes no tensors, so one is tokenized and cut off again.
        texts = targets or [""]
        tokens = tokenizer(texts, padding=padding, truncation=True, return_tensors="pt")
        return {name: tokens[name][: len(targets)] for name in ("input_ids", "attention_mask")} | {"return_loss": True}


class ImageLabelCollator(_ImageCollator):
    """Makes a batch of labelled images, as `ImageTextCollator` does of images with captions.

    Called with a list of rows `{image_column: {"bytes": ..., "path": ...}, label_column: ...}`, returns
    `pixel_values`, float32, (batch, 3, height, width), and `labels`, int64, (batch,). A row without a label is dropped
    and counted.

    Args:
        processor: A DiffCLIPProcessor.
        train: Whether to cut the images at random.
        crop_scale, seed, max_skipped_share, image_column: As in `ImageTextCollator`.
        label_column: What the label's index is called.

    Raises:
        ValueError, TypeError: As `ImageTextCollator` raises.
    """

    kinds = ("missing_labels",)
    target_column = "label_column"
    missing_reason = "it has no label"

    def __init__(self, processor: ProcessorMixin, *, label_column: str = "label", **options: Any):
        super().__init__(processor, **options)
        self.label_column = label_column

    def _targets(self, cell: Any) -> list[int]:
        if cell is None:
            return []
        try:
            index = operator.index(cell)
        except TypeError:
            raise TypeError(
                f"The column {self.label_column} has {cell!r:.80}, a {type(cell).__name__}; it must have indices."
            ) from None
        # What data sets on the Hub have where a label is held back.
        return [] if index < 0 else [index]

    def _batch_of(self, targets: list[int]) -> dict[str, Any]:
        return {"labels": torch.tensor(targets, dtype=torch.int64)}


__all__ = [
    "ImageLabelCollator",
    "ImageTextCollator",
    "ImageTextShards",
    "decode_crop",
    "load_image_label_dataset",
    "load_image_text_dataset",
    "load_own_labels",
    "random_crop_box",
]
