"""The comparison's data: one large drawing a picture, with one of its names in a template."""

from pathlib import Path

import numpy as np
import torch
from emoji_data import Emoji, load_drawings
from emoji_tokenizer import train_tokenizer
from small_model import CONTEXT_LENGTH, IMAGE_SIZE, MEAN, STD
from torch.nn.functional import affine_grid, grid_sample
from transformers import PreTrainedTokenizerBase


MERGES = 1210
TEMPLATES = (
    "{}",
    "a picture of a {}",
    "an emoji of a {}",
    "a drawing of {}",
    "a photo of a {}.",
    "this is a photo of {}.",
)


class EmojiCollator:
    """Make a batch: for each emoji a random vendor's drawing, augmented, and one of its names in a template.

    Drawings aren't mirrored: arrows, hands and letters would be other emoji.
    """

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
        self.images = torch.from_numpy(np.stack([images for images, _ in drawings])).permute(0, 1, 4, 2, 3)
        present = np.stack([has for _, has in drawings])
        self.vendors_of = [np.flatnonzero(present[:, index]) for index in range(len(items))]
        self.tokenizer = tokenizer
        self.random = np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def _uniform(self, count: int, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, generator=self.generator)

    def _caption(self, item: Emoji) -> str:
        # Mostly the name by which it will be asked for.
        name = item.name
        if item.others and self.random.random() < 0.4:
            name = str(self.random.choice(item.others))
        template = TEMPLATES[self.random.integers(len(TEMPLATES))] if self.random.random() < 0.6 else "{}"
        return template.format(name)

    def augment(self, images: torch.Tensor) -> torch.Tensor:
        """Place drawings, (n, 4, 64, 64) uint8, on a background, move and recolour them: (n, 3, 48, 48) in 0..1."""
        count = len(images)
        rgba = images.float() / 255
        alpha = rgba[:, 3:]
        # Premultiplied, so that resampling doesn't mix in the colour of what is transparent.
        layers = torch.cat([rgba[:, :3] * alpha, alpha], 1)
        angle = self._uniform(count, -0.25, 0.25)
        scale = self._uniform(count, 0.8, 1.35)
        stretch = self._uniform(count, 0.9, 1.1)
        cos, sin = angle.cos(), angle.sin()
        theta = torch.stack(
            [
                torch.stack([cos * scale * stretch, -sin * scale, self._uniform(count, -0.2, 0.2)], 1),
                torch.stack([sin * scale, cos * scale / stretch, self._uniform(count, -0.2, 0.2)], 1),
            ],
            1,
        )
        grid = affine_grid(theta, [count, 4, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
        layers = grid_sample(layers, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        white = torch.ones(count, 3, 1, 1)
        coloured = torch.rand(count, 3, 1, 1, generator=self.generator)
        keep_white = (torch.rand(count, 1, 1, 1, generator=self.generator) < 0.6).float()
        background = keep_white * white + (1 - keep_white) * coloured
        result = layers[:, :3] + (1 - layers[:, 3:]) * background

        # Colours: a random mixing of the channels near the identity, contrast and brightness.
        mixing = torch.eye(3) + 0.15 * torch.randn(count, 3, 3, generator=self.generator)
        grey = (torch.rand(count, generator=self.generator) < 0.1).float().view(count, 1, 1)
        mixing = (1 - grey) * mixing / mixing.sum(-1, keepdim=True) + grey / 3
        result = torch.einsum("nij,njhw->nihw", mixing, result)
        contrast = self._uniform(count, 0.7, 1.3).view(count, 1, 1, 1)
        brightness = self._uniform(count, -0.1, 0.1).view(count, 1, 1, 1)
        return ((result - 0.5) * contrast + 0.5 + brightness).clamp(0, 1)

    def __call__(self, indices: list[int]) -> dict:
        vendors = [int(self.random.choice(self.vendors_of[index])) for index in indices]
        pixel_values = (self.augment(self.images[vendors, indices]) - MEAN) / STD
        texts = self.tokenizer(
            [self._caption(self.items[index]) for index in indices],
            padding=True,
            truncation=True,
            return_tensors="pt",
        )
        return {**texts, "pixel_values": pixel_values, "return_loss": True}


def make_tokenizer(items: list[Emoji]) -> PreTrainedTokenizerBase:
    """Return a tokenizer learned from every name in every template."""
    captions = [
        template.format(name) for template in TEMPLATES for item in items for name in (item.name, *item.others)
    ]
    return train_tokenizer(captions, MERGES, CONTEXT_LENGTH)
