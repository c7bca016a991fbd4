"""Embeddings of any of Transformers' CLIP-like models, DiffCLIP's among them, in one way for all."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from ..common.embedding_cache import EmbeddingCache
from ..common.keys import UnknownContentError, embedding_key, image_digest, model_fingerprint
from ..common.loading import FULL_LENGTH_MODELS, check_device, commit_of, load_model, load_processor
from ..common.reading_ahead import check_num_workers, read_ahead
from ..common.reading_batches import read_batches
from ..model.image_reading_diffclip import read_encoded, read_image
from ..model.offloading_diffclip import check_has_weights, execution_device
from ..model.processing_diffclip import check_text
from ..zero_shot import BATCH_SIZE, CPU_BATCH_SIZE
from .picture_files import known_of_pictures


if TYPE_CHECKING:
    import datasets

logger = logging.get_logger(__name__)
TEXT_BATCH_SIZE = 128
ROWS_CHECKED = 65536


def check_clip_like(model: PreTrainedModel) -> None:
    """Raise a ValueError unless the model gives embeddings of images and of texts."""
    if missing := [name for name in ("get_image_features", "get_text_features") if not hasattr(model, name)]:
        raise ValueError(f"The model is a {type(model).__name__}, which has no {' and no '.join(missing)}.")


def text_options(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return how a model's texts are tokenized: cut to the model's length, and padded as it was trained."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    padding = "max_length" if model.config.model_type in FULL_LENGTH_MODELS else "longest"
    return {
        "padding": padding,
        "truncation": True,
        "max_length": min(length for length in (tokenizer.model_max_length, longest) if length is not None),
        "return_tensors": "pt",
    }


def check_finite(embeds: torch.Tensor, kind: str) -> torch.Tensor:
    """Return embeddings, (rows, width); raise a ValueError where one isn't finite, of which every figure is wrong."""
    if bad := sum(int((~some.isfinite()).any(dim=1).sum()) for some in embeds.split(ROWS_CHECKED)):
        raise ValueError(
            f"{bad} of {len(embeds)} {kind} embeddings aren't finite: the model's weights or its image processor's "
            "mean and std are broken, or the dtype is too small for it."
        )
    return embeds


def check_batches(batch_size: int | None, num_workers: int | None) -> None:
    """Raise a ValueError where a number is too small; None is a default."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
    check_num_workers(num_workers)


def _named(
    read: Callable[[Any], Any], split: str, row_of: Callable[[int], int]
) -> Callable[[tuple[int, Mapping[str, Any] | None]], Any]:
    """Return a function that reads a row's image, as `datasets` holds it undecoded, and names it in errors."""

    def read_row(row: tuple[int, Mapping[str, Any] | None]) -> Any:
        index, image = row
        try:
            return read(image)
        except ValueError as error:
            path = f" ({image['path']:.200})" if image and image["path"] else ""
            raise ValueError(f"Image {row_of(index)} of the split {split}{path} can't be read: {error}") from error

    return read_row


class Encoder:
    """A model with its processor, which embeds images and texts, each once, and keeps the embeddings.

    Args:
        model: Any of Transformers' with `get_image_features` and `get_text_features`, whose outputs have a
            `pooler_output`: `DiffCLIPModel`, `CLIPModel`, `SiglipModel`. It's put into evaluation mode.
        processor: With an `image_processor` and a `tokenizer`.
        cache: Where embeddings are kept.
        batch_size: Images at once; by default 8 on a CPU, else 64.
        num_workers: Processes that read images, threads where there are few; by default as many as there are cores, up
            to 32. With 0 or 1 they're read one after the other in the caller's thread.

    Raises:
        ValueError: The model or the processor lacks a part or weights, or a number is too small.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        *,
        cache: EmbeddingCache | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
    ):
        check_clip_like(model)
        check_has_weights(model)
        if missing := [name for name in ("image_processor", "tokenizer") if not hasattr(processor, name)]:
            raise ValueError(
                f"The processor is a {type(processor).__name__}, which has no {' and no '.join(missing)}."
            )
        check_batches(batch_size, num_workers)
        if batch_size is None:
            batch_size = CPU_BATCH_SIZE if execution_device(model).type == "cpu" else BATCH_SIZE
        # Transformers' types know nothing of what a model class has of its own.
        self.model: Any = model.eval()
        self.processor: Any = processor
        self.cache = EmbeddingCache(None) if cache is None else cache
        self.batch_size, self.num_workers = batch_size, check_num_workers(num_workers)
        # On the Hub, where it was loaded from there.
        self.commit: str | None = None

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        attn_implementation: str | None = None,
        **kwargs: Any,
    ) -> "Encoder":
        """Load a model and its processor.

        Args:
            name: A folder or an id on the Hub.
            revision: Of the Hub.
            device: Where it runs.
            dtype: As in `from_pretrained`.
            attn_implementation: Likewise.
            kwargs: As in the class.

        Raises:
            ValueError: As `load_model`, `load_processor` and `check_device` raise, or the class.
        """
        found = check_device(device)
        options: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        commit = commit_of(name, revision=revision)
        # All of it is of one commit.
        revision = commit or revision
        model = load_model(name, revision=revision, dtype=dtype, **options)
        encoder = cls(model.to(found), load_processor(name, model.config, revision=revision), **kwargs)
        encoder.commit = commit
        return encoder

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return execution_device(self.model)

    def weights(self) -> str | None:
        """Return the SHA-256 of the weights and the configuration, None where they can't be read as plain values."""
        try:
            return model_fingerprint(self.model)
        except UnknownContentError:
            return None

    def _key(self, **parts: Any) -> dict[str, Any] | None:
        """Return what embeddings depend on: the model as it is now, how it runs, and `parts`.

        None where nothing is kept, or a part can't be known by its content.
        """
        if self.cache.folder is None:
            return None
        try:
            return embedding_key(self.model, **parts)
        except UnknownContentError as error:
            logger.warning_once(f"Embeddings aren't kept, for it can't be known what they depend on: {error}.")
            return None

    def image_embeds(
        self, dataset: "datasets.Dataset", split: str, pooled: bool = False, rows: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Return a data set's image embeddings, float32, (rows, width), on the CPU.

        Args:
            dataset: With a column `image`, not decoded, as `load_image_label_dataset` returns it.
            split: What the part is called.
            pooled: Whether to return the image tower's pooled output, before the projection and as it is, rather than
                the projection, L2-normalised.
            rows: What each row's number is in errors, if not its index.

        Raises:
            ValueError: An image can't be read, there is no image tower of its own, or an embedding isn't finite.
        """
        if pooled and not hasattr(self.model, "vision_model"):
            raise ValueError(f"The model is a {type(self.model).__name__}, which has no vision_model.")
        self.model.eval()
        image_processor = self.processor.image_processor
        key = self._key(
            kind="pooled" if pooled else "projected",
            preprocessing=[image_processor.to_dict(), image_processor],
        )

        def row_of(index: int) -> int:
            return index if rows is None else rows[index]

        if key is None:
            return self._encode_images(dataset, split, pooled, row_of)[0]
        images = known_of_pictures("pictures", dataset, lambda: self._images_digest(dataset, split, row_of))

        def compute() -> torch.Tensor:
            embeds, read = self._encode_images(dataset, split, pooled, row_of)
            if read != images:
                raise ValueError(f"Pictures of the split {split} changed while they were read; measure again.")
            return embeds

        return self.cache.get("images", {**key, "images": images}, len(dataset), compute)

    def text_embeds(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the texts' embeddings, L2-normalised, float32, (texts, width), on the CPU.

        Raises:
            ValueError: A text has half of a character, or an embedding isn't finite.
        """
        for text in texts:
            check_text(text)
        self.model.eval()
        batches, cut = self.tokenize(texts)
        if cut:
            longest = text_options(self.model, self.processor.tokenizer)["max_length"]
            logger.warning("%d of %d texts are cut to %d tokens.", cut, len(texts), longest)
        # Whatever the tokenizer is, its tokens are what the model sees.
        key = self._key(tokens=[dict(batch) for batch in batches])
        if key is None:
            return self._encode_texts(batches, len(texts))
        return self.cache.get("texts", key, len(texts), lambda: self._encode_texts(batches, len(texts)))

    def _images_digest(self, dataset: "datasets.Dataset", split: str, row_of: Callable[[int], int]) -> str:
        """Return the SHA-256 of every image's file, in the order of the rows."""
        digest, read = hashlib.sha256(), _named(image_digest, split, row_of)
        ahead = min(len(dataset), 4 * self.num_workers)
        with (
            closing(read_ahead(enumerate(dataset["image"]), read, self.num_workers, ahead)) as digests,
            logging.tqdm(total=len(dataset), desc="Files", unit="file") as bar,
        ):
            for one in digests:
                digest.update(one)
                bar.update()
        return digest.hexdigest()

    def pixel_values(self, image: Mapping[str, Any] | None) -> tuple[torch.Tensor, bytes]:
        """Return an image's pixel values, float32, (1, channels, height, width), and its file's SHA-256.

        Raises:
            ValueError: There's none, or it can't be read.
        """
        content = read_encoded(image)
        pixels = self.processor.image_processor(images=[read_image(content)], return_tensors="pt")["pixel_values"]
        return pixels, hashlib.sha256(content).digest()

    def _encode_images(
        self, dataset: "datasets.Dataset", split: str, pooled: bool, row_of: Callable[[int], int]
    ) -> tuple[torch.Tensor, str]:
        """Return the embeddings, and what `_images_digest` returns of the files that were decoded."""
        embeds, digest = [], hashlib.sha256()
        batches = read_batches(
            enumerate(dataset["image"]),
            _named(self.pixel_values, split, row_of),
            self.batch_size,
            self.num_workers,
            len(dataset),
            sendable=True,
            gives_way=self.device.type == "cpu",
        )
        with (
            closing(batches),
            logging.tqdm(total=len(dataset), desc="Images", unit="image") as bar,
        ):
            for pixel_values, digests in batches:
                digest.update(b"".join(digests))
                embeds.append(self.embed_pixels(pixel_values, pooled))
                bar.update(len(digests))
        return check_finite(torch.cat(embeds), "image"), digest.hexdigest()

    @torch.inference_mode()
    def embed_pixels(self, pixel_values: torch.Tensor, pooled: bool = False) -> torch.Tensor:
        """Return the embeddings of a batch's pixel values, (images, channels, height, width); see `image_embeds`."""
        inputs = {"pixel_values": pixel_values.to(self.device, self.model.dtype)}
        tower = self.model.vision_model if pooled else self.model.get_image_features
        found = tower(**inputs, return_dict=True).pooler_output.float()
        return (found if pooled else normalize(found, dim=-1)).cpu()

    @torch.inference_mode()
    def embed_tokens(self, tokens: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the embeddings of a batch that `tokenize` gives; see `text_embeds`."""
        inputs = {name: value.to(self.device) for name, value in tokens.items()}
        return normalize(self.model.get_text_features(**inputs, return_dict=True).pooler_output.float(), dim=-1).cpu()

    def tokenize(self, texts: Sequence[str]) -> tuple[list[Any], int]:
        """Return the texts' tokens, `TEXT_BATCH_SIZE` at once, and how many texts are cut."""
        tokenizer = self.processor.tokenizer
        options = text_options(self.model, tokenizer)
        lengths = [len(ids) for ids in tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]]
        cut = sum(length > options["max_length"] for length in lengths)
        starts = range(0, len(texts), TEXT_BATCH_SIZE)
        return [tokenizer(list(texts[start : start + TEXT_BATCH_SIZE]), **options) for start in starts], cut

    def _encode_texts(self, batches: Sequence[Any], count: int) -> torch.Tensor:
        embeds = []
        with logging.tqdm(total=count, desc="Texts", unit="text", disable=len(batches) < 2) as bar:
            for tokens in batches:
                embeds.append(self.embed_tokens(tokens))
                bar.update(len(embeds[-1]))
        return check_finite(torch.cat(embeds), "text")


__all__ = ["Encoder", "check_batches", "check_clip_like", "check_finite", "text_options"]
