"""Embeddings of any of Transformers' CLIP-like models, DiffCLIP's among them, in one way for all."""

import importlib.metadata
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModel, AutoProcessor, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from .evaluation_cache import EmbeddingCache, fingerprint, model_fingerprint
from .image_processing_pil_diffclip import to_rgb
from .zero_shot import BATCH_SIZE, CPU_BATCH_SIZE


if TYPE_CHECKING:
    import datasets

logger = logging.get_logger(__name__)
TEXT_BATCH_SIZE = 128
# Trained on texts of full length without a mask, so that their padding counts.
FULL_LENGTH_MODELS = ("siglip", "siglip2", "siglip_text_model", "siglip2_text_model")


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


def _tokenizer_rules(tokenizer: Any) -> dict[str, Any]:
    """Return the vocabulary, and of a fast tokenizer the rules too."""
    if not tokenizer.is_fast:
        return tokenizer.get_vocab()
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    # Left there by the last call.
    return {name: value for name, value in rules.items() if name not in ("padding", "truncation")}


class _Images(Dataset):
    """A data set's images, decoded, and made of one size in batches."""

    def __init__(self, dataset: "datasets.Dataset", image_processor: Any):
        self.dataset, self.image_processor = dataset, image_processor

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Image.Image:
        encoded = self.dataset[index]["image"]
        # A damaged file makes Pillow and its plug-ins raise nearly anything.
        try:
            if encoded["bytes"] is None:
                encoded = {**encoded, "bytes": Path(encoded["path"]).read_bytes()}
            with Image.open(io.BytesIO(encoded["bytes"])) as image:
                return to_rgb(image)
        except Exception as error:
            path = f" ({encoded['path']})" if encoded["path"] else ""
            raise ValueError(f"Image {index}{path} can't be read: {error}") from error

    def collate(self, images: list[Image.Image]) -> torch.Tensor:
        return self.image_processor(images=images, return_tensors="pt")["pixel_values"]


class Encoder:
    """A model with its processor, which embeds images and texts, each once, and keeps the embeddings.

    Args:
        model: Any of Transformers' with `get_image_features` and `get_text_features`, whose outputs have a
            `pooler_output`: `DiffCLIPModel`, `CLIPModel`, `SiglipModel`. It's put into evaluation mode.
        processor: With an `image_processor` and a `tokenizer`.
        cache: Where embeddings are kept.
        batch_size: Images at once; by default 8 on a CPU, else 64.
        num_workers: Processes that read images, 0 to read them in this one.

    Raises:
        ValueError: The model or the processor lacks a part, or a number is too small.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        *,
        cache: EmbeddingCache | None = None,
        batch_size: int | None = None,
        num_workers: int = 0,
    ):
        check_clip_like(model)
        if missing := [name for name in ("image_processor", "tokenizer") if not hasattr(processor, name)]:
            raise ValueError(
                f"The processor is a {type(processor).__name__}, which has no {' and no '.join(missing)}."
            )
        if batch_size is None:
            batch_size = CPU_BATCH_SIZE if model.device.type == "cpu" else BATCH_SIZE
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}.")
        # Transformers' types know nothing of what a model class has of its own.
        self.model: Any = model.eval()
        self.processor: Any = processor
        self.cache = EmbeddingCache(None) if cache is None else cache
        self.batch_size, self.num_workers = batch_size, num_workers
        self.weights = model_fingerprint(model)

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
        """
        options: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        model = AutoModel.from_pretrained(name, revision=revision, dtype=dtype, **options)
        return cls(model.to(device), AutoProcessor.from_pretrained(name, revision=revision), **kwargs)

    def _key(self, **parts: Any) -> dict[str, Any]:
        """Return what embeddings depend on: the model, how it runs, and `parts`."""
        return {
            "weights": self.weights,
            "dtype": str(self.model.dtype),
            "device": self.model.device.type,
            "attn_implementation": self.model.config._attn_implementation,
            "versions": {name: importlib.metadata.version(name) for name in ("diffclip-hf", "transformers", "torch")},
            **parts,
        }

    def image_embeds(self, dataset: "datasets.Dataset", split: str, pooled: bool = False) -> torch.Tensor:
        """Return a data set's image embeddings, float32, (rows, width), on the CPU.

        Args:
            dataset: With a column `image`, not decoded, as `load_image_label_dataset` returns it.
            split: What the part is called.
            pooled: Whether to return the image tower's pooled output, before the projection and as it is, rather than
                the projection, L2-normalised.

        Raises:
            ValueError: An image can't be read, or there is no image tower of its own.
        """
        if pooled and not hasattr(self.model, "vision_model"):
            raise ValueError(f"The model is a {type(self.model).__name__}, which has no vision_model.")
        image_processor = self.processor.image_processor
        key = self._key(
            kind="pooled" if pooled else "projected",
            preprocessing=[type(image_processor).__name__, image_processor.to_dict()],
            dataset=dataset._fingerprint,
            rows=len(dataset),
            split=split,
        )
        return self.cache.get("images", key, lambda: self._encode_images(dataset, pooled))

    def text_embeds(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the texts' embeddings, L2-normalised, float32, (texts, width), on the CPU."""
        tokenizer = self.processor.tokenizer
        options = text_options(self.model, tokenizer)
        key = self._key(
            tokenizer=[
                type(tokenizer).__name__,
                tokenizer.padding_side,
                {name: value for name, value in options.items() if name != "return_tensors"},
                fingerprint(_tokenizer_rules(tokenizer)),
            ],
            texts=fingerprint({"texts": list(texts)}),
            count=len(texts),
        )
        return self.cache.get("texts", key, lambda: self._encode_texts(texts, options))

    def _encode_images(self, dataset: "datasets.Dataset", pooled: bool) -> torch.Tensor:
        images = _Images(dataset, self.processor.image_processor)
        loader = DataLoader(images, self.batch_size, num_workers=self.num_workers, collate_fn=images.collate)
        embeds = []
        with logging.tqdm(total=len(dataset), desc="Images", unit="image") as bar, torch.inference_mode():
            for pixel_values in loader:
                inputs = {"pixel_values": pixel_values.to(self.model.device, self.model.dtype)}
                tower = self.model.vision_model if pooled else self.model.get_image_features
                found = tower(**inputs, return_dict=True).pooler_output.float()
                embeds.append((found if pooled else normalize(found, dim=-1)).cpu())
                bar.update(len(pixel_values))
        return torch.cat(embeds)

    def _encode_texts(self, texts: Sequence[str], options: Mapping[str, Any]) -> torch.Tensor:
        tokenizer = self.processor.tokenizer
        lengths = [len(ids) for ids in tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]]
        if cut := sum(length > options["max_length"] for length in lengths):
            logger.warning("%d of %d texts are cut to %d tokens.", cut, len(texts), options["max_length"])
        embeds = []
        with logging.tqdm(total=len(texts), desc="Texts", unit="text") as bar, torch.inference_mode():
            for start in range(0, len(texts), TEXT_BATCH_SIZE):
                batch = list(texts[start : start + TEXT_BATCH_SIZE])
                tokens = tokenizer(batch, **options).to(self.model.device)
                found = self.model.get_text_features(**tokens, return_dict=True).pooler_output.float()
                embeds.append(normalize(found, dim=-1).cpu())
                bar.update(len(batch))
        return torch.cat(embeds)


__all__ = ["Encoder", "check_clip_like", "text_options"]
