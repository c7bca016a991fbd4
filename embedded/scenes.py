"""What the model trains on: pictures of one to three drawings on plain, coloured and textured grounds, captioned."""

import json
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from captions import CaptionWriter
from drawing_collator import DrawingCollator
from emoji_data import Emoji, fetch_package
from small_model import IMAGE_SIZE
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample, interpolate
from transformers import PreTrainedTokenizerBase


# Keywords that more emoji have say too little: "animal", "food".
COMMON = 12
# Kind of picture → its share. Most are one large drawing, as the pictures that people ask about.
KINDS = {"large": 0.5, "single": 0.15, "same": 0.05, "two": 0.2, "three": 0.1}
GROUNDS = {
    "white": 0.45,
    "plain": 0.27,
    "gradient": 0.08,
    "clouds": 0.08,
    "stripes": 0.04,
    "checks": 0.04,
    "noise": 0.04,
}
COLOURS = {
    "red": (0.86, 0.15, 0.18),
    "orange": (0.96, 0.56, 0.12),
    "yellow": (1.0, 0.82, 0.25),
    "green": (0.3, 0.65, 0.25),
    "blue": (0.2, 0.5, 0.85),
    "light blue": (0.55, 0.8, 0.98),
    "purple": (0.55, 0.3, 0.7),
    "pink": (0.97, 0.6, 0.75),
    "brown": (0.5, 0.32, 0.2),
    "black": (0.12, 0.12, 0.14),
    "grey": (0.55, 0.57, 0.6),
    "white": (0.97, 0.97, 0.97),
}
# Of which one says "two rockets"; not of faces, people, symbols and flags.
COUNTED = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")
# A drawing has a colour where that many of its opaque pixels are nearest to it.
DOMINANT = 0.6


def load_keywords(items: list[Emoji], cache_dir: Path) -> list[tuple[str, ...]]:
    """Return for each emoji the English keywords of Unicode's CLDR that at most `COMMON` emoji share."""
    path = fetch_package("cldr-annotations-full", cache_dir) / "package" / "annotations" / "en" / "annotations.json"
    entries = json.loads(path.read_text(encoding="utf-8"))["annotations"]["annotations"]
    found = [entries.get(item.characters.replace("\ufe0f", ""), {}).get("default", []) for item in items]
    counts = Counter(word for words in found for word in words)
    return [
        tuple(word for word in words if word.isascii() and 3 <= len(word) <= 20 and counts[word] <= COMMON)
        for words in found
    ]


def main_colours(drawings: np.ndarray) -> list[str]:
    """Return the name of the colour that most of each drawing has, empty where there is none.

    Args:
        drawings: (n, side, side, 4), uint8 RGBA.
    """
    palette = np.array(list(COLOURS.values()), dtype=np.float32)
    names = list(COLOURS)
    found = []
    for drawing in drawings[:, ::2, ::2]:
        pixels = drawing.reshape(-1, 4)
        opaque = pixels[pixels[:, 3] > 200, :3].astype(np.float32) / 255
        if len(opaque) < 40:
            found.append("")
            continue
        nearest = ((opaque[:, None] - palette) ** 2).sum(-1).argmin(1)
        counts = np.bincount(nearest, minlength=len(names))
        best = int(counts.argmax())
        found.append(names[best] if counts[best] >= DOMINANT * len(opaque) else "")
    return found


@dataclass
class Picture:
    """One picture before it is drawn.

    Args:
        indices: The emoji, of which the first is what the picture stands for.
        vendors: Whose drawing of each.
        places: Each drawing's centre, x to the right and y downwards, in -1..1.
        sizes: Each drawing's side as a share of the picture's.
        ground: A key of `GROUNDS`.
        colour: Of a plain ground, a key of `COLOURS`, or empty for any colour.
    """

    indices: list[int]
    vendors: list[int]
    places: list[tuple[float, float]] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)
    ground: str = "white"
    colour: str = ""
    caption: str = ""


class SceneCollator(DrawingCollator):
    """Make a batch: for each emoji a picture in which it is, with a caption.

    The other drawings of a picture are of emoji that aren't in the batch, whose captions would fit the picture too.
    """

    mixing, grey = 0.12, 0.07

    def __init__(
        self,
        items: list[Emoji],
        vendors: tuple[str, ...],
        cache_dir: Path,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
    ):
        super().__init__(items, vendors, cache_dir, tokenizer, seed)
        self.colours = [main_colours(one.permute(0, 2, 3, 1).numpy()) for one in self.images]
        self.writer = CaptionWriter(items, load_keywords(items, cache_dir), self.random)

    def _vendor(self, index: int) -> int:
        choices = self.vendors_of[index]
        return int(choices[self.random.integers(len(choices))])

    def _places(self, count: int) -> tuple[list[tuple[float, float]], list[float]]:
        """Return centres and sizes of two or three drawings, which overlap little or not at all."""
        uniform = self.random.uniform
        if count == 2:
            angle = self.random.choice([0.0, 0.5, uniform(0, 1)], p=[0.5, 0.2, 0.3]) * np.pi
            x, y = 0.5 * np.cos(angle), 0.5 * np.sin(angle)
            centres = [(-x, -y), (x, y)]
            sizes = uniform(0.38, 0.58, 2).tolist()
        elif self.random.random() < 0.3:
            centres = [(-0.66, 0.0), (0.0, 0.0), (0.66, 0.0)]
            sizes = uniform(0.28, 0.4, 3).tolist()
        else:
            corners = [(-0.48, -0.48), (0.48, -0.48), (-0.48, 0.48), (0.48, 0.48)]
            centres = [corners[i] for i in self.random.permutation(4)[:3]]
            sizes = uniform(0.34, 0.52, 3).tolist()
        order = self.random.permutation(count)
        jitter = uniform(-0.1, 0.1, (count, 2))
        return [(centres[i][0] + jitter[i, 0], centres[i][1] + jitter[i, 1]) for i in order], sizes

    def plan(self, index: int, others: np.ndarray) -> Picture:
        """Choose what is in an emoji's picture, where, and what is said of it.

        Args:
            index: The emoji.
            others: Those that may be beside it.
        """
        kind = str(self.random.choice(list(KINDS), p=list(KINDS.values())))
        if kind == "same" and self.items[index].category not in COUNTED:
            kind = "large"
        picture = Picture([index], [self._vendor(index)])
        picture.ground = str(self.random.choice(list(GROUNDS), p=list(GROUNDS.values())))
        if picture.ground == "plain" and self.random.random() < 0.5:
            picture.colour = str(self.random.choice(list(COLOURS)))
        ground = f"a {picture.colour or 'white'} background" if picture.colour or picture.ground == "white" else ""
        if kind == "large":
            picture.sizes = [1 / self.random.uniform(0.8, 1.35)]
            picture.places = [tuple(self.random.uniform(-0.2, 0.2, 2))]
        elif kind == "single":
            size = self.random.uniform(0.3, 0.75)
            picture.sizes, picture.places = [size], [tuple(self.random.uniform(size - 1, 1 - size, 2))]
        else:
            count = 2 if kind == "two" or (kind == "same" and self.random.random() < 0.6) else 3
            if kind == "same":
                picture.indices, picture.vendors = picture.indices * count, picture.vendors * count
            else:
                more = [int(one) for one in self.random.choice(others, count - 1, replace=False)]
                picture.indices += more
                picture.vendors += [self._vendor(one) for one in more]
            picture.places, picture.sizes = self._places(count)
        colours = [
            self.colours[vendor][one] if self.random.random() < 0.3 else ""
            for one, vendor in zip(picture.indices, picture.vendors, strict=True)
        ]
        if kind == "same":
            phrase = self.writer.several(index, len(picture.indices))
            is_named = self.random.random() < 0.2
            picture.caption = self.writer.name(index) if is_named else self.writer.whole(phrase, ground)
        elif len(picture.indices) > 1:
            picture.caption = self.writer.scene(picture.indices, picture.places, colours, ground)
        else:
            picture.caption = self.writer.single(index, colours[0], ground)
        return picture

    def grounds(self, pictures: list[Picture]) -> torch.Tensor:
        """Return what lies behind each picture's drawings, (n, 3, 48, 48) in 0..1: two colours in some pattern."""
        count = len(pictures)
        first, second = torch.rand(2, count, 3, 1, 1, generator=self.generator)
        # Half of the second colours are near the first.
        near = (torch.rand(count, 1, 1, 1, generator=self.generator) < 0.5).float()
        second = near * (first + 0.3 * (second - first)) + (1 - near) * second
        steps = (torch.arange(IMAGE_SIZE) + 0.5) / IMAGE_SIZE
        rows, columns = torch.meshgrid(steps, steps, indexing="ij")
        angle = self._uniform(count, 0, torch.pi).view(-1, 1, 1)
        along = columns * angle.cos() + rows * angle.sin()
        across = rows * angle.cos() - columns * angle.sin()
        waves = self._uniform(count, 2, 8).view(-1, 1, 1)
        patterns = {
            "gradient": (along - along.amin((1, 2), keepdim=True))
            / (along.amax((1, 2), keepdim=True) - along.amin((1, 2), keepdim=True)),
            "clouds": interpolate(
                torch.rand(count, 1, 5, 5, generator=self.generator), IMAGE_SIZE, mode="bilinear", align_corners=True
            )[:, 0],
            "stripes": ((along * waves) % 1 < 0.5).float(),
            "checks": (((along * waves) % 1 < 0.5) ^ ((across * waves) % 1 < 0.5)).float(),
            "noise": torch.rand(count, IMAGE_SIZE, IMAGE_SIZE, generator=self.generator),
        }
        result = torch.ones(count, 3, IMAGE_SIZE, IMAGE_SIZE)
        for i, picture in enumerate(pictures):
            if picture.colour:
                result[i] = torch.tensor(COLOURS[picture.colour]).view(3, 1, 1)
            elif picture.ground == "plain":
                result[i] = first[i]
            elif picture.ground != "white":
                result[i] = first[i] + patterns[picture.ground][i] * (second[i] - first[i])
        return result

    def draw(self, pictures: list[Picture]) -> torch.Tensor:
        """Return the pictures, (n, 3, 48, 48) in 0..1: drawings, turned and stretched a little, over grounds."""
        owners = torch.tensor([i for i, picture in enumerate(pictures) for _ in picture.indices])
        slots = torch.tensor([slot for picture in pictures for slot in range(len(picture.indices))])
        vendors = [vendor for picture in pictures for vendor in picture.vendors]
        indices = [index for picture in pictures for index in picture.indices]
        places = torch.tensor([place for picture in pictures for place in picture.places], dtype=torch.float32)
        scale = 1 / torch.tensor([size for picture in pictures for size in picture.sizes])
        count = len(owners)
        layers = self._layers(vendors, indices)
        angle = self._uniform(count, -0.25, 0.25)
        stretch = self._uniform(count, 0.9, 1.1)
        cos, sin = angle.cos() * scale, angle.sin() * scale
        turn = torch.stack([torch.stack([cos * stretch, -sin], 1), torch.stack([sin, cos / stretch], 1)], 1)
        theta = torch.cat([turn, -turn @ places[:, :, None]], 2)
        grid = affine_grid(theta, [count, 4, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
        small = scale > 1.6
        placed = torch.empty(count, 4, IMAGE_SIZE, IMAGE_SIZE)
        sample = partial(grid_sample, mode="bilinear", padding_mode="zeros", align_corners=False)
        placed[~small] = sample(layers[~small], grid[~small])
        # Halved first, for bilinear sampling leaves pixels out of what it makes much smaller.
        placed[small] = sample(avg_pool2d(layers[small], 2), grid[small])
        result = self.grounds(pictures)
        for slot in range(int(slots.max()) + 1):
            chosen = slots == slot
            layer, into = placed[chosen], owners[chosen]
            result[into] = layer[:, :3] + (1 - layer[:, 3:]) * result[into]
        return result

    def __call__(self, indices: list[int]) -> dict:
        others = np.setdiff1d(np.arange(len(self.vendors_of)), indices)
        pictures = [self.plan(index, others) for index in indices]
        return self._batch(self.recolour(self.draw(pictures)), [picture.caption for picture in pictures])
