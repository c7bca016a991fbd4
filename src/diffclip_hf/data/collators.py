"""Collators: they decode a batch's pictures, cut and normalise them, and add the captions or labels.

They take rows whose image is still as it is stored, `{"image": {"bytes": ..., "path": ...}, "caption": ...}`, and run
in the DataLoader's workers.
"""

import operator
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import ProcessorMixin

from ..model.image_reading_diffclip import open_image, read_encoded, to_rgb
from .counts import CAPTION_KINDS, SkipCounts, non_empty_captions
from .crops import decode_crop


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
        image_processor = self.processor.image_processor
        # Another model's, of a teacher, may cut nothing.
        size = getattr(image_processor, "crop_size", None) or image_processor.size
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

    kinds = CAPTION_KINDS
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
        names = [name for name in ("input_ids", "attention_mask") if name in tokens]
        return {name: tokens[name][: len(targets)] for name in names} | {"return_loss": True}


class TeacherCollator:
    """Makes a batch with a teacher's own inputs, `teacher_pixel_values` and so on, beside the model's.

    Both are made of the same rows, crops and captions, since what is drawn depends on the seed, the epoch and the
    image alone. It's for a teacher with another tokenizer, image size, mean or standard deviation than the model's.

    Args:
        collator: An `ImageTextCollator` of the model's processor.
        teacher_collator: Another of the teacher's processor, with the same options. It pads to the full length where
            the teacher was trained so, as SigLIP was.

    Raises:
        ValueError: The two draw or read differently.
    """

    def __init__(self, collator: ImageTextCollator, teacher_collator: ImageTextCollator):
        for name in ("train", "crop_scale", "seed", "image_column", "caption_column"):
            own, theirs = getattr(collator, name), getattr(teacher_collator, name)
            if own != theirs:
                raise ValueError(
                    f"{name} is {own!r} in the model's collator and {theirs!r} in the teacher's; it must be one."
                )
        self.collator, self.teacher_collator = collator, teacher_collator

    @property
    def counts(self) -> dict[str, int]:
        """As `ImageTextCollator.counts`."""
        return self.collator.counts

    def set_epoch(self, epoch: int) -> None:
        """As `ImageTextCollator.set_epoch`."""
        self.collator.set_epoch(epoch)
        self.teacher_collator.set_epoch(epoch)

    def check(self, counts: Mapping[str, int] | None = None) -> None:
        """As `ImageTextCollator.check`."""
        self.collator.check(counts)

    def __call__(self, rows: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
        batch = self.collator(rows)
        theirs = self.teacher_collator(rows) if batch else {}
        return batch | {f"teacher_{name}": value for name, value in theirs.items() if name != "return_loss"}


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


__all__ = ["ImageLabelCollator", "ImageTextCollator", "TeacherCollator"]
