"""The comparison's data: one large drawing a picture, with one of its names in a template."""

import torch
from drawing_collator import DrawingCollator
from emoji_data import Emoji
from emoji_tokenizer import train_tokenizer
from small_model import CONTEXT_LENGTH, IMAGE_SIZE
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


class EmojiCollator(DrawingCollator):
    """Make a batch: for each emoji a random vendor's drawing, augmented, and one of its names in a template."""

    mixing, grey = 0.15, 0.1

    def _caption(self, item: Emoji) -> str:
        # Mostly the name by which it will be asked for.
        name = item.name
        if item.others and self.random.random() < 0.4:
            name = str(self.random.choice(item.others))
        template = TEMPLATES[self.random.integers(len(TEMPLATES))] if self.random.random() < 0.6 else "{}"
        return template.format(name)

    def augment(self, layers: torch.Tensor) -> torch.Tensor:
        """Move and turn what `_layers` returns, put it on a background and recolour it: (n, 3, 48, 48) in 0..1."""
        count = len(layers)
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
        return self.recolour(layers[:, :3] + (1 - layers[:, 3:]) * background)

    def __call__(self, indices: list[int]) -> dict:
        vendors = [int(self.random.choice(self.vendors_of[index])) for index in indices]
        images = self.augment(self._layers(vendors, indices))
        return self._batch(images, [self._caption(self.items[index]) for index in indices])


def make_tokenizer(items: list[Emoji]) -> PreTrainedTokenizerBase:
    """Return a tokenizer learned from every name in every template."""
    captions = [
        template.format(name) for template in TEMPLATES for item in items for name in (item.name, *item.others)
    ]
    return train_tokenizer(captions, MERGES, CONTEXT_LENGTH)
