"""Zero-shot classification that encodes its labels once, for any number of images."""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from itertools import chain, count, islice
from numbers import Integral
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from .common.embedding_cache import EmbeddingCache
from .common.keys import UnknownContentError, embedding_key
from .common.reading_ahead import check_num_workers
from .common.reading_batches import read_batches
from .model.image_reading_diffclip import read_image
from .model.offloading_diffclip import check_has_weights, execution_device, logit_scale_factor
from .model.processing_diffclip import check_text


# What a folder's pictures are called, in lower case.
IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
DEFAULT_IMAGE_COLUMN = "image"
# A thread of an AMD EPYC takes 0.42 s for an image at ViT-B/16 in batches of 8, and 0.49 s in batches of 32.
CPU_BATCH_SIZE = 8
BATCH_SIZE = 64
logger = logging.get_logger(__name__)


def image_files(folder: str | os.PathLike) -> list[Path]:
    """List a folder's pictures, those of its sub-folders among them, sorted by path; what is hidden is left out.

    Links to folders aren't followed, and a warning says so; another names a sub-folder that can't be read.

    Raises:
        ValueError: It isn't a folder, or has no file whose name ends like a picture's (`IMAGE_SUFFIXES`).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} isn't a folder.")
    found, links = [], []
    for place, inside, files in os.walk(folder, onerror=_warn_of_unreadable):
        inside[:] = [name for name in inside if not name.startswith(".")]
        links += [path for name in inside if os.path.islink(path := os.path.join(place, name))]
        named = [name for name in files if not name.startswith(".")]
        named = [name for name in named if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
        found += [path for name in named if os.path.isfile(path := os.path.join(place, name))]
    if links:
        more = f" and {len(links) - 1} more" if len(links) > 1 else ""
        logger.warning("Links to folders aren't followed: %s%s.", min(links), more)
    if not found:
        raise ValueError(
            f"The folder {str(folder)!r} has no pictures; their names must end in one of "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}."
        )
    # As paths are compared, by their parts, and sooner.
    return [Path(path) for path in sorted(found, key=lambda path: path.split(os.sep))]


def _warn_of_unreadable(error: OSError) -> None:
    logger.warning("The folder %s can't be read: %s.", error.filename, error.strerror)


def _is_folder(images: Any) -> bool:
    return isinstance(images, (str, os.PathLike)) and os.path.isdir(images)


def _is_encoded(images: Any) -> bool:
    """Say whether something is what `datasets` holds of an image that isn't decoded."""
    return isinstance(images, Mapping) and len(images) > 0 and images.keys() <= {"bytes", "path"}


def is_single(images: Any) -> bool:
    """Say whether something is one image rather than several."""
    if isinstance(images, (np.ndarray, torch.Tensor)):
        return images.ndim < 4
    if isinstance(images, (str, os.PathLike)):
        return not _is_folder(images)
    return (
        isinstance(images, (bytes, bytearray, memoryview, Image.Image))
        or _is_encoded(images)
        or hasattr(images, "read")
    )


def _with_folders_listed(images: Iterable[Any]) -> Iterator[Any]:
    """Put the files of each folder in the folder's place."""
    for image in images:
        if _is_folder(image):
            yield from image_files(image)
        else:
            yield image


def pixel_values_of(image_processor: Any, source: Any) -> torch.Tensor:
    """Return one image's pixel values, float32, (1, channels, height, width).

    Args:
        image_processor: The model's.
        source: An array as the image processor takes it, or what `read_image` reads.

    Raises:
        ValueError: It isn't an image, or can't be read.
    """
    if not (source is None or is_single(source) or isinstance(source, (str, os.PathLike))):
        raise ValueError(f"it is of type {type(source).__name__}, which isn't an image's, a path's or a URL's.")
    image = source if isinstance(source, (np.ndarray, torch.Tensor)) else read_image(source)
    return image_processor(images=[image], return_tensors="pt")["pixel_values"]


def image_sources(images: Any) -> tuple[Iterable[Any], int | None]:
    """Return what yields the single images, unread, and how many there are, or None where that isn't known."""
    if is_single(images):
        return [images], 1
    if isinstance(images, Mapping):
        raise ValueError(f"images is a mapping of {', '.join(map(repr, images))}; pass one of its values.")
    if _is_folder(images):
        images = image_files(images)
    elif isinstance(images, (list, tuple)):
        images = list(_with_folders_listed(images))
    elif not isinstance(images, Iterable) and not hasattr(images, "__getitem__"):
        raise ValueError(
            f"images is of type {type(images).__name__}; it must be an image, a path, a URL, a folder, or an iterable "
            "of these or of a dataset's rows."
        )
    return images, len(images) if hasattr(images, "__len__") else None


def _image_column(images: Any) -> str:
    """Return the column of a dataset that holds the images, by its features, or "image" where it has none.

    Raises:
        ValueError: The features have no image, or more than one.
    """
    features = getattr(images, "features", None)
    if not isinstance(features, Mapping):
        return DEFAULT_IMAGE_COLUMN
    # By the feature's name: `datasets` may not be installed.
    columns = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    if len(columns) != 1:
        raise ValueError(
            f"The dataset's columns are {list(features)}, of which {columns} hold images; pass image_column."
        )
    return columns[0]


def _undecoded(images: Any, image_column: str | None) -> Any:
    """Return a dataset, or a column of it, with its images as their files have them, for `read_image` to decode.

    A transform or a mode that was chosen for the dataset is kept, and its images are then decoded by `datasets`.
    """
    if hasattr(images, "source") and hasattr(images, "column_name"):
        source = _undecoded(images.source, images.column_name)
        return images if source is images.source else source[images.column_name]
    features = getattr(images, "features", None)
    if not isinstance(features, Mapping) or not hasattr(images, "cast_column"):
        return images
    found = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    column = image_column or (found[0] if len(found) == 1 else None)
    if column not in found or features[column].mode is not None or not features[column].decode:
        return images
    if (getattr(images, "format", None) or {}).get("type") == "custom":
        return images
    return images.with_format(None).cast_column(column, type(features[column])(decode=False))


def label_texts(labels: Any, templates: Any) -> tuple[list[str], list[str], list[int]]:
    """Check and combine labels and templates.

    Returns:
        The labels; every text; and the index of each text's label.

    Raises:
        ValueError: As `ZeroShotClassifier` raises.
    """
    if isinstance(labels, (str, bytes)) or not isinstance(labels, Iterable):
        raise ValueError(f"labels is {labels!r}; it must be a sequence of strings, or a mapping of label to names.")
    pairs = labels.items() if isinstance(labels, Mapping) else ((label, label) for label in labels)
    entries = [(label, names if isinstance(names, (list, tuple)) else [names]) for label, names in pairs]
    if not entries:
        raise ValueError("labels is empty; it must have at least one label.")
    for label, names in entries:
        if not names or not all(isinstance(name, str) for name in (label, *names)):
            raise ValueError(f"labels has {label!r} with the names {names!r}; each must be a string, with a name.")
        for name in (label, *names):
            check_text(name)
    if isinstance(templates, bytes) or not isinstance(templates, Iterable):
        raise ValueError(f"templates is {templates!r}; it must be a string or strings, with {{}} for the label.")
    templates = [templates] if isinstance(templates, str) else list(templates)
    if not templates:
        raise ValueError("templates is empty; it must have at least one template.")
    for template in templates:
        try:
            fits = "\0" in template.format("\0")
        except (AttributeError, IndexError, KeyError, ValueError):
            fits = False
        if not fits:
            raise ValueError(f"templates has {template!r}; each must be a string with {{}} where the label belongs.")
        check_text(template)
    rows = [
        (template.format(name), index)
        for index, (_, names) in enumerate(entries)
        for name in names
        for template in templates
    ]
    return [label for label, _ in entries], [text for text, _ in rows], [index for _, index in rows]


def mean_label_embeds(text_embeds: torch.Tensor, indices: Sequence[int], labels: int) -> torch.Tensor:
    """Return the normalised mean of each label's texts, (labels, projection_dim); `indices` has each text's label."""
    sums = text_embeds.new_zeros(labels, text_embeds.shape[-1])
    # A mean and a sum have the same direction.
    return normalize(sums.index_add_(0, torch.tensor(indices, device=text_embeds.device), text_embeds), dim=-1)


def _stays(source: Any) -> bool:
    """Say whether what an iterator gives stays as it is when the iterator goes on, as a frame of a video may not."""
    return isinstance(source, (str, os.PathLike, bytes)) or _is_encoded(source)


def _unreadable(index: int, source: Any, error: Exception) -> ValueError:
    """Return the error that says which image can't be read, and why."""
    name = f" ({os.fspath(source)!r:.200})" if isinstance(source, (str, os.PathLike)) else ""
    # The reader names what it read.
    name = "" if name[2:-1] in str(error) else name
    return ValueError(f"Image {index}{name} can't be read: {error}")


@contextmanager
def _inference(model: torch.nn.Module) -> Iterator[None]:
    """Run the model in evaluation mode and without gradients, and leave each module's mode as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


class ZeroShotClassifier:
    """Compares images with labels, whose texts are encoded once, here, rather than for every image.

    For each label every template is filled with it, each text's embedding is L2-normalised, and their mean is
    normalised again. The scores are the softmax over labels of exp(logit_scale) · cosine similarity, so for one
    template they are those of Transformers' zero-shot image classification pipeline.

    Images are given as Pillow images, paths, URLs and what else `read_image` reads, arrays as the image processor
    takes them, folders (`image_files`), a `datasets` dataset, or any iterable of these or of a dataset's rows. As in
    `to_rgb`, what is transparent is laid over white. They're read by several workers, at most a batch and 16 images
    a worker ahead, and of each only its pixel values are kept. From 16 images on these are processes for paths, URLs,
    bytes and a dataset's rows, on Linux and in the main thread (`read_batches`), and otherwise threads. An iterator
    whose length isn't known is asked for a batch at a time, since it may wait for answers; what it gives that it may
    change again, such as arrays, is read at once.

    Args:
        model: A `DiffCLIPModel`, or another of Transformers' that has `get_text_features`, `get_image_features` and
            `logit_scale`, as `CLIPModel` has; on any device, of any floating dtype. It's run in evaluation mode, and
            left in the mode in which it was.
        processor: Its processor, with a `tokenizer` and an `image_processor`.
        labels: A label is one string; or a mapping gives the string or strings that a label goes by in texts.
        templates: A template, or several to average, with `{}` where the label belongs; `IMAGENET_TEMPLATES`.
        batch_size: Images that go through the model at once; by default 8 on a CPU, which more make slower, else 64.
        text_batch_size: Texts that go through the model at once.
        num_workers: Processes or threads that read images; by default as many as there are cores, up to 32. With 0 or
            1 they're read one after the other in the thread that asks for them.
        cache_dir: A folder where the labels' embeddings are kept, and taken from where nothing has changed that they
            depend on: weights, configuration, dtype, device, texts, tokenizer and the versions of the code.
        progress_bar: Whether to show bars, which `transformers.logging.disable_progress_bar()` turns off too.

    Attributes:
        labels: The labels, in the order given.
        label_embeds: Their embeddings, L2-normalised, float32, (labels, projection_dim), on the model's device. They
            stay as they are where the model is trained further.

    Raises:
        ValueError: There's no label or template, one isn't a string or has half a character (`check_text`), or a
            template lacks `{}`; a batch size is below 1, or `num_workers` below 0; the model's scores aren't a
            softmax, as SigLIP's aren't, or the model or the processor lacks a part.
        OSError: Nothing can be written in `cache_dir`.

    Source: Radford et al. 2021 (CLIP), section 3.1.4; SLIP's `eval_zeroshot.py` for the order of mean and norm.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        labels: Iterable[str] | Mapping[str, str | Sequence[str]],
        templates: str | Sequence[str] = "This is a photo of {}.",
        *,
        batch_size: int | None = None,
        text_batch_size: int = 128,
        num_workers: int | None = None,
        cache_dir: str | os.PathLike | None = None,
        progress_bar: bool = True,
    ):
        for name, part, needed in (
            ("model", model, ("get_text_features", "get_image_features", "logit_scale")),
            ("processor", processor, ("tokenizer", "image_processor")),
        ):
            if missing := [attribute for attribute in needed if not hasattr(part, attribute)]:
                raise ValueError(f"{name} is a {type(part).__name__}, which has no {' and no '.join(missing)}.")
        if hasattr(model, "logit_bias"):
            raise ValueError(
                f"model is a {type(model).__name__}, which has a logit_bias: its scores are sigmoids, not a softmax "
                "over labels. Use Transformers' zero-shot-image-classification pipeline."
            )
        check_has_weights(model)
        if batch_size is None:
            batch_size = CPU_BATCH_SIZE if execution_device(model).type == "cpu" else BATCH_SIZE
        for name, value in (("batch_size", batch_size), ("text_batch_size", text_batch_size)):
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1.")
        # Transformers' types know nothing of what a model class has of its own.
        self.model: Any = model
        self.processor = processor
        self.batch_size = batch_size
        self.num_workers = check_num_workers(num_workers)
        self.progress_bar = progress_bar
        self.labels, texts, indices = label_texts(labels, templates)
        cache = EmbeddingCache(cache_dir)
        cache.check()
        self.label_embeds = self._embed_labels(*self._tokenize(texts, indices, text_batch_size), cache)

    def __call__(self, images: Any, top_k: int | None = None, image_column: str | None = None) -> list[Any]:
        """Classify images; return what `stream` yields as a list, or its only element for a single image."""
        results = list(self.stream(images, top_k, image_column))
        return results[0] if is_single(images) else results

    def stream(
        self, images: Any, top_k: int | None = None, image_column: str | None = None
    ) -> Iterator[list[dict[str, Any]]]:
        """Yield each image's labels, as soon as its batch is through.

        Args:
            images: One or several, as the class describes.
            top_k: How many labels to give of each image; all by default.
            image_column: Where rows of a dataset are given, the column that holds the images; by default the only one
                that does by the dataset's features, or "image" where there are no features.

        Returns:
            An iterator over lists of {"score": float in 0..1, "label": str}, the best first.

        Raises:
            ValueError: `top_k` is below 1; or, with its index or path, an image can't be read.
        """
        if top_k is not None and (not isinstance(top_k, Integral) or isinstance(top_k, bool) or top_k < 1):
            raise ValueError(f"top_k is {top_k!r}; it must be a whole number of at least 1, or None for all labels.")
        return self._stream(images, top_k, image_column)

    def logits(self, images: Any, image_column: str | None = None) -> torch.Tensor:
        """Return exp(logit_scale) · cosine similarity, float32, (images, labels), on the CPU.

        The softmax over the last dimension gives the scores. The arguments and errors are those of `stream`.
        """
        batches = list(self._batches(images, image_column))
        return torch.cat(batches) if batches else torch.empty(0, len(self.labels))

    def _stream(self, images: Any, top_k: int | None, image_column: str | None) -> Iterator[list[dict[str, Any]]]:
        for logits in self._batches(images, image_column):
            # Stable, so that equal scores keep the labels' order, as in the pipeline.
            scores, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
            for row, indices in zip(scores[:, :top_k].tolist(), order[:, :top_k].tolist(), strict=True):
                yield [
                    {"score": score, "label": self.labels[index]} for score, index in zip(row, indices, strict=True)
                ]

    def _batches(self, images: Any, image_column: str | None) -> Iterator[torch.Tensor]:
        """Yield each batch's logits, (at most batch_size, labels)."""
        sources, total = image_sources(_undecoded(images, image_column))
        # Whatever else has no length may wait for answers.
        topped_up = total is not None or hasattr(sources, "features")
        rows = self._rows(sources, image_column, whole=topped_up)
        # The first says of what kind they are.
        first = list(islice(rows, 1 if topped_up else 0))
        sendable = bool(first) and _stays(first[0][1])
        rows = chain(first, rows)
        batches = read_batches(
            self._sendable(rows) if sendable else rows,
            self._read,
            self.batch_size,
            self.num_workers,
            total,
            topped_up=topped_up,
            sendable=sendable,
            gives_way=execution_device(self.model).type == "cpu",
        )
        disable = not self.progress_bar or total == 1
        with (
            closing(batches),
            logging.tqdm(total=total, desc="Images", unit="image", disable=disable) as bar,
        ):
            for pixel_values, _ in batches:
                yield self._image_logits(pixel_values)
                bar.update(len(pixel_values))

    def _rows(self, sources: Iterable[Any], image_column: str | None, whole: bool) -> Iterator[Any]:
        """Yield each image's index, the image unread, and a lock for it; or its pixel values, where it has to be read.

        There's no lock for what stays as it is.

        Args:
            sources: As `image_sources` returns them.
            image_column: As in `stream`.
            whole: Whether the sources are there as a whole, rather than made one after the other.
        """
        remaining = iter(sources)
        # Of images that may be there twice, and whose file moves on as they're decoded.
        locks = [Lock() for _ in range(61)]
        for index in count():
            try:
                # A dataset reads the image here.
                source = next(remaining)
            except StopIteration:
                return
            except Exception as error:
                raise _unreadable(index, None, error) from error
            if isinstance(source, Mapping) and not _is_encoded(source):
                image_column = image_column or _image_column(sources)
                if image_column not in source:
                    raise ValueError(f"Row {index} has the columns {list(source)}, and no {image_column!r}.")
                source = source[image_column]
            stays = _stays(source)
            row = (index, source, None if stays else locks[id(source) // 16 % len(locks)])
            yield row if whole or stays else self._read(row)

    def _sendable(self, rows: Iterable[Any]) -> Iterator[Any]:
        """Yield rows of `_rows`, read where they can't be sent to another process."""
        return (row if row[2] is None else self._read(row) for row in rows)

    def _read(self, row: Any) -> tuple[torch.Tensor, None]:
        """Return an image's pixel values, float32, (1, channels, height, width)."""
        if isinstance(row[0], torch.Tensor):
            return row
        index, source, lock = row
        try:
            with lock or nullcontext():
                return pixel_values_of(self.processor.image_processor, source), None
        except Exception as error:
            raise _unreadable(index, source, error) from error

    def _image_logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return a batch's logits, float32, (batch, labels), on the CPU."""
        with _inference(self.model):
            outputs = self.model.get_image_features(
                pixel_values=pixel_values.to(execution_device(self.model), self.model.dtype), return_dict=True
            )
        image_embeds = normalize(outputs.pooler_output.float(), dim=-1).to(self.label_embeds.device)
        scale = logit_scale_factor(self.model).to(self.label_embeds.device)
        return (scale * image_embeds @ self.label_embeds.t()).cpu()

    def _tokenize(self, texts: list[str], indices: list[int], batch_size: int) -> tuple[list[Any], list[int]]:
        """Return the texts' tokens in batches, and which label each text is of, both in the order of encoding.

        Args:
            texts: Any number.
            indices: Each text's label.
            batch_size: Texts in a batch.
        """
        tokenizer = self.processor.tokenizer
        lengths = [len(ids) for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"]]
        if max(lengths) > tokenizer.model_max_length:
            longest = texts[lengths.index(max(lengths))]
            warnings.warn(
                f"{sum(length > tokenizer.model_max_length for length in lengths)} of {len(texts)} texts are cut to "
                f"{tokenizer.model_max_length} tokens, the longest of which is {longest!r:.200}.",
                stacklevel=3,
            )
        # Texts of a length together, so that there's little padding; the longest first, which need the most memory.
        order = sorted(range(len(texts)), key=lambda row: -lengths[row])
        chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        batches = [
            tokenizer([texts[row] for row in chunk], padding=True, truncation=True, return_tensors="pt")
            for chunk in chunks
        ]
        return batches, [indices[row] for row in order]

    def _embed_labels(self, batches: list[Any], indices: list[int], cache: EmbeddingCache) -> torch.Tensor:
        """Return the labels' embeddings, kept or computed; the arguments are what `_tokenize` returns."""
        count = len(self.labels)

        def compute() -> torch.Tensor:
            return mean_label_embeds(self._encode_texts(batches), indices, count)

        if cache.folder is None:
            return compute()
        try:
            with _inference(self.model):
                tokens = [dict(batch) for batch in batches]
                key = embedding_key(self.model, kind="labels", tokens=tokens, labels=[count, *indices])
        except UnknownContentError as error:
            logger.warning("The labels' embeddings aren't kept, for it can't be known what they depend on: %s.", error)
            return compute()
        found = cache.get("labels", key, count, lambda: compute().cpu())
        return found.to(execution_device(self.model))

    def _encode_texts(self, batches: list[Any]) -> torch.Tensor:
        """Return the embeddings of tokenized texts, L2-normalised, float32, (texts, projection_dim)."""
        device, chunks = execution_device(self.model), []
        total = sum(len(tokens["input_ids"]) for tokens in batches)
        disable = not self.progress_bar or len(batches) == 1
        with logging.tqdm(total=total, desc="Texts", unit="text", disable=disable) as bar:
            for tokens in batches:
                with _inference(self.model):
                    outputs = self.model.get_text_features(**tokens.to(device), return_dict=True)
                chunks.append(normalize(outputs.pooler_output.float(), dim=-1))
                bar.update(len(tokens["input_ids"]))
        return torch.cat(chunks)


__all__ = [
    "IMAGE_SUFFIXES",
    "ZeroShotClassifier",
    "image_files",
    "image_sources",
    "is_single",
    "label_texts",
    "mean_label_embeds",
    "pixel_values_of",
]
