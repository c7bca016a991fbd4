"""Embeddings kept on disk, under a key of all that they depend on."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import logging

from .whole_files import write_whole


logger = logging.get_logger(__name__)
# What a configuration says of where it comes from rather than of what is computed; weights have a dtype of their own.
PROVENANCE = frozenset({"_name_or_path", "architectures", "dtype", "transformers_version"})
DEFAULT_FOLDER = Path(constants.HF_HOME) / "diffclip_hf" / "embeddings"


def fingerprint(content: Mapping[str, Any]) -> str:
    """Return the SHA-256, in hexadecimal, of what JSON can hold; the order of keys doesn't matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _without_provenance(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {key: _without_provenance(value) for key, value in config.items() if key not in PROVENANCE}


def model_fingerprint(model: PreTrainedModel) -> str:
    """Return the SHA-256, in hexadecimal, of a model's configuration and of every weight's name, dtype and value."""
    digest = hashlib.sha256(fingerprint(_without_provenance(model.config.to_dict())).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # numpy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class EmbeddingCache:
    """A folder of embeddings.

    Args:
        folder: Where they are, None to keep none.
    """

    def __init__(self, folder: str | os.PathLike | None):
        self.folder = None if folder is None else Path(folder)

    def get(self, kind: str, key: Mapping[str, Any], compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the embeddings of that key, computed and kept if they aren't there.

        Args:
            kind: The beginning of the file's name.
            key: All that they depend on.
            compute: Returns them, on the CPU.

        Raises:
            ValueError: The file is there but can't be read, or is of another key.
        """
        if self.folder is None:
            return compute()
        path = self.folder / f"{kind}-{fingerprint(key)}.safetensors"
        text = json.dumps(key, sort_keys=True, default=str)
        if path.is_file():
            logger.info("Embeddings from %s", path)
            return self._read(path, text)
        embeds = compute().contiguous()
        write_whole(path, lambda beside: save_file({"embeds": embeds}, beside, {"key": text}))
        return embeds

    def _read(self, path: Path, key: str) -> torch.Tensor:
        try:
            with safe_open(path, "pt") as file:
                found, embeds = (file.metadata() or {}).get("key"), file.get_tensor("embeds")
        except SafetensorError as error:
            raise ValueError(f"{path} can't be read; remove it, and it's computed again: {error}") from error
        if found != key:
            raise ValueError(f"{path} is of the key {found}, not {key}; remove it, and it's computed again.")
        return embeds


__all__ = ["DEFAULT_FOLDER", "EmbeddingCache", "fingerprint", "model_fingerprint"]
