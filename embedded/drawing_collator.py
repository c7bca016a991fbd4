"""What every collator of drawings has: the vendors' drawings, its chances, changed colours, and the batch's form."""

from pathlib import Path

import numpy as np
import torch
from emoji_data import Emoji, load_drawings
from small_model import MEAN, STD
from transformers import PreTrainedTokenizerBase


class DrawingCollator:
    """The base of collators that make a picture and a caption for each emoji of a batch.

    Drawings aren't mirrored: arrows, hands and letters would be other emoji.

    Args:
        items: All emoji.
        vendors: Whose drawings there are.
        cache_dir: Where the drawings are, or are put.
        tokenizer: Of the captions.
        seed: Of every choice.
    """

    # How far colours are mixed, and the share of pictures that lose them.
    mixing: float
    grey: float

    def __init__(
        self,
        items: list[Emoji],
        vendors: tuple[str, ...],
        cache_dir: Path,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
    ):
        drawings = [load_drawings(vendor, items, cache_dir) for vendor in vendors]
        self.items = items
        # (vendors, emoji, 4, 64, 64), uint8.
        self.images = torch.from_numpy(np.stack([images for images, _ in drawings])).permute(0, 1, 4, 2, 3)
        present = np.stack([has for _, has in drawings])
        self.vendors_of = [np.flatnonzero(present[:, index]) for index in range(len(items))]
        self.tokenizer = tokenizer
        self.random = np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def _uniform(self, count: int, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, generator=self.generator)

    def _layers(self, vendors: list[int], indices: list[int]) -> torch.Tensor:
        """Return drawings, (n, 4, 64, 64) in 0..1, premultiplied by their opacity.

        So resampling doesn't mix in the colour of what is transparent.
        """
        rgba = self.images[vendors, indices].float() / 255
        alpha = rgba[:, 3:]
        return torch.cat([rgba[:, :3] * alpha, alpha], 1)

    def recolour(self, images: torch.Tensor) -> torch.Tensor:
        """Change colours by a random mixing of the channels near the identity, contrast and brightness."""
        count = len(images)
        mixing = torch.eye(3) + self.mixing * torch.randn(count, 3, 3, generator=self.generator)
        grey = (torch.rand(count, generator=self.generator) < self.grey).float().view(count, 1, 1)
        mixing = (1 - grey) * mixing / mixing.sum(-1, keepdim=True) + grey / 3
        result = torch.einsum("nij,njhw->nihw", mixing, images)
        contrast = self._uniform(count, 0.7, 1.3).view(count, 1, 1, 1)
        brightness = self._uniform(count, -0.1, 0.1).view(count, 1, 1, 1)
        return ((result - 0.5) * contrast + 0.5 + brightness).clamp(0, 1)

    def _batch(self, images: torch.Tensor, captions: list[str]) -> dict:
        """Return a model's inputs from pictures, (n, 3, 48, 48) in 0..1, and their captions."""
        texts = self.tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
        return {**texts, "pixel_values": (images - MEAN) / STD, "return_loss": True}
