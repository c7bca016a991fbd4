"""A tiny model of pictures and of texts of bytes."""

from tiny import randomised, tiny_config
from tokenizer_helper import BYTES

from diffclip_hf import DiffCLIPModel


def make_model(seed: int = 0) -> DiffCLIPModel:
    """A model that takes what `tiny_processor` makes; each seed has its own weights."""
    return randomised(DiffCLIPModel(tiny_config(text=BYTES)), seed)
