"""Embeddings kept on disk, under a key of all that they depend on."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import logging

from .keys import fingerprint, tensor_digest
from .whole_files import check_output_file, write_whole


logger = logging.get_logger(__name__)
DEFAULT_FOLDER = Path(constants.HF_HOME) / "diffclip_hf" / "embeddings"


class EmbeddingCache:
    """A folder of embeddings.

    Args:
        folder: Where they are, None to keep none.
    """

    def __init__(self, folder: str | os.PathLike | None):
        self.folder = None if folder is None else Path(folder)

    def check(self, mend: str = "") -> None:
        """Raise an OSError if nothing can be written there.

        Args:
            mend: The last sentence of the error, which says what else can be done.
        """
        if self.folder is not None:
            try:
                check_output_file(self.folder / "trial.safetensors")
            except OSError as error:
                raise OSError(f"Embeddings can't be kept: {error} {mend}".rstrip()) from error

    def get(self, kind: str, key: Mapping[str, Any], rows: int, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the embeddings of that key, computed and kept if they aren't there, or are damaged.

        Where they can't be written in the end, a warning says so.

        Args:
            kind: The beginning of the file's name.
            key: All that they depend on, as JSON.
            rows: How many there are.
            compute: Returns them, float32, (rows, width), on the CPU.
        """
        if self.folder is None:
            return compute()
        text = json.dumps(key, sort_keys=True)
        path = self.folder / f"{kind}-{fingerprint(key)}.safetensors"
        embeds = self._read(path, text, rows)
        if embeds is not None:
            logger.info("Embeddings from %s", path)
            return embeds
        embeds = compute().contiguous()
        metadata = {"key": text, "digest": tensor_digest(embeds)}
        try:
            write_whole(path, lambda beside: save_file({"embeds": embeds}, beside, metadata))
        except (OSError, SafetensorError) as error:
            logger.warning("The embeddings can't be kept in %s: %s", path, error)
        return embeds

    def _read(self, path: Path, key: str, rows: int) -> torch.Tensor | None:
        """Return what is there, None where nothing is or it's damaged."""
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata, embeds = file.metadata() or {}, file.get_tensor("embeds")
        except (OSError, SafetensorError) as error:
            logger.warning("%s can't be read, and is computed again: %s", path, error)
            return None
        whole = embeds.dtype == torch.float32 and embeds.ndim == 2 and len(embeds) == rows
        if not whole or metadata.get("key") != key or metadata.get("digest") != tensor_digest(embeds):
            logger.warning("%s is damaged, and is computed again.", path)
            return None
        return embeds


__all__ = ["DEFAULT_FOLDER", "EmbeddingCache"]
