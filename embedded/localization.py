"""Measure whether each kind of map falls on the object that is asked for.

    python embedded/localization.py --cache-dir .cache/embedded --output-dir docs/localization

This writes the figures, a picture of them and a page. With `--settings --pairs 60` the settings of the maps are
measured instead, on a vendor whose drawings were trained on; from these the defaults were chosen.

Two drawings of the vendor that training never saw stand side by side, and both names are asked of each picture. The
share of a map on the half of the asked object is measured, so a map that doesn't depend on the text has a mean share
of exactly one half, whatever it looks at. Every emoji is in one picture at most, so pictures are independent.

One drawing stands on a plain ground, at a random place, and its own transparency says which patches it lies on: does
the map's largest value lie there, and how well does the map rank all patches?
"""

import argparse
import json
import math
import os
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emoji_data import HELD_OUT, Emoji, load_drawings, load_emoji
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from diffclip_hf import DiffCLIPModel, DiffCLIPProcessor
from diffclip_hf.common.loading import load_model, load_processor
from diffclip_hf.common.whole_files import write_text_whole, write_whole
from diffclip_hf.visualization import (
    against_others,
    class_attention,
    image_occlusion,
    image_relevance,
    value_similarity,
)


# Layout → each drawing's side as a share of the model's image size. On "small" pictures, of the model's own size,
# drawings are half as large as in training; "wide" ones are twice as wide, with positions interpolated.
LAYOUTS = {"small": 0.5, "wide": 1.0}
# A drawing alone has a side between these shares of the picture's, and lies on a patch of which it covers so much.
SIDES = (0.5, 1.0)
COVERED = 0.25
MEASURES = {
    "share": "mean share on the asked object's half",
    "hit": "more than half of it there",
    "moved": "more there than when the other is asked for",
}
SETTINGS_VENDOR, SINGLE, CHANCE = "twitter", "one drawing", 0.5
EMBEDDED = Path(__file__).parent / "diffclip-emoji"
SINGLE_MEASURES = {"points": "largest value on the drawing", "precision": "average precision of the patches"}
# What is measured with --settings.
FILLS, WINDOWS = ("border", "mean", "blur"), (2, 3, 4)
WINDOW_SETS = ((2,), (3,), (4,), (2, 3), (3, 4), (2, 3, 4))
WEIGHTS = {"": 0.0, ", half against": 0.5, ", against": 1.0}
FIRST_LAYERS = (-1, -2, -3, 0)
# Method → its colour in the picture, by what it begins with.
COLOURS = {"occlusion": "#b2182b", "values": "#e08214", "relevance": "#2166ac", "attention": "#777777"}


@dataclass(frozen=True)
class Estimate:
    """A mean over pictures with the ends of its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of independent shares with the normal approximation's interval, as far as that is a share."""
    array = np.asarray(values)
    margin = 1.96 * array.std(ddof=1) / math.sqrt(len(array))
    mean = float(array.mean())
    return Estimate(*(round(float(value), 4) for value in (mean, max(0, mean - margin), min(1, mean + margin))))


def choose_pairs(
    items: Sequence[Emoji], indices: Sequence[int], seed: int, count: int | None
) -> list[tuple[int, int]]:
    """Pair emoji at random, each in one pair at most and with names that share no word.

    Args:
        items: All emoji.
        indices: Those to pair.
        count: How many pairs to keep; None for all.
    """
    order = np.random.default_rng(seed).permutation(np.asarray(indices)).tolist()
    pairs = zip(order[0::2], order[1::2], strict=False)
    words = {index: set(items[index].name.lower().split()) for index in order}
    return [pair for pair in pairs if not words[pair[0]] & words[pair[1]]][:count]


def compose(left: np.ndarray, right: np.ndarray, size: int, height: int) -> Image.Image:
    """Put two drawings, RGBA, side by side on white, each `size` pixels large and centred in the height."""
    canvas = Image.new("RGBA", (2 * size, height), "white")
    for number, drawing in enumerate((left, right)):
        scaled = Image.fromarray(drawing).resize((size, size), Image.Resampling.BICUBIC)
        canvas.alpha_composite(scaled, (number * size, (height - size) // 2))
    return canvas.convert("RGB")


def inputs_of(processor: DiffCLIPProcessor, names: list[str], picture: Image.Image) -> dict[str, Any]:
    """Return a model's inputs of a picture as it is, of any size, and of names."""
    return processor(
        text=names, images=picture, do_resize=False, do_center_crop=False, padding=True, return_tensors="pt"
    )


def shares(maps: np.ndarray) -> np.ndarray:
    """Return how much of each map is on the half of its own text's object.

    Args:
        maps: (2, rows, columns), for the left object's name and the right one's, not negative.

    Returns:
        (2,), shares of 1; one half where the map is 0 everywhere.
    """
    columns = maps.sum(1)
    middle = columns.shape[-1] // 2
    own = np.array([columns[0, :middle].sum(), columns[1, middle:].sum()])
    total = columns.sum(-1)
    return np.divide(own, total, out=np.full(2, 0.5), where=total > 0)


def measures(own: np.ndarray) -> dict[str, float]:
    """Return one picture's figures of its two shares; a tie, which tells nothing, counts one half.

    The map of one name has 1 − share on the other's half, so it has moved towards the asked object where the shares
    of both names together are more than 1.
    """
    hits = 0.5 + 0.5 * np.sign(np.round(own - 0.5, 6))
    return {
        "share": float(own.mean()),
        "hit": float(hits.mean()),
        "moved": float(0.5 + 0.5 * np.sign(np.round(own.sum() - 1, 6))),
    }


def maps_of(model: DiffCLIPModel, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Return every method's maps of one picture for two texts or more."""
    options: dict[str, Any] = {**inputs, "interpolate_pos_encoding": True}
    occlusion, values = image_occlusion(model, **options), value_similarity(model, **options)
    attention = class_attention(model, inputs["pixel_values"], interpolate_pos_encoding=True)
    return {
        "occlusion": occlusion,
        "occlusion, half against the other": against_others(occlusion),
        "values of the last two layers": values,
        "values, half against the other": against_others(values),
        "relevance": image_relevance(model, **options),
        "relevance of the last layer": image_relevance(model, **options, first_layer=-1),
        "attention of the class token, last layer": np.repeat(attention[:, None], len(inputs["input_ids"]), axis=1),
    }


def settings_of(model: DiffCLIPModel, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Return the maps of one picture by every setting from which the defaults were chosen."""
    options: dict[str, Any] = {**inputs, "interpolate_pos_encoding": True}
    found: dict[str, np.ndarray] = {}
    for fill in FILLS:
        # Sizes count equally, so a set's map is the mean of its sizes' maps.
        by_size = {side: image_occlusion(model, **options, fill=fill, windows=[side]) for side in WINDOWS}
        for sides in WINDOW_SETS:
            maps = np.mean([by_size[side] for side in sides], axis=0)
            name = f"occlusion, {fill}, {' and '.join(map(str, sides))} patches"
            found |= {f"{name}{label}": against_others(maps, weight) for label, weight in WEIGHTS.items()}
    for first in FIRST_LAYERS:
        maps = value_similarity(model, **options, first_layer=first)
        name = f"values from layer {first}"
        found |= {f"{name}{label}": against_others(maps, weight) for label, weight in WEIGHTS.items()}
    return found


@dataclass(frozen=True)
class Single:
    """A drawing alone: the picture, and how much of each patch the drawing covers, (rows, columns), shares of 1."""

    picture: Image.Image
    covered: np.ndarray


def place(drawing: np.ndarray, size: int, patch_size: int, seed: int) -> Single:
    """Put a drawing, RGBA, at a random place on a plain ground of a random colour.

    Args:
        size: The picture's side, in pixels.
        seed: Of the colour, the side and the place.
    """
    random = np.random.default_rng(seed)
    side = round(size * random.uniform(*SIDES))
    left, top = random.integers(0, size - side + 1, 2).tolist()
    canvas = Image.new("RGBA", (size, size), (*random.integers(0, 256, 3).tolist(), 255))
    scaled = Image.fromarray(drawing).resize((side, side), Image.Resampling.BICUBIC)
    canvas.alpha_composite(scaled, (left, top))
    mask = np.zeros((size, size))
    mask[top : top + side, left : left + side] = np.asarray(scaled)[..., 3] > 127
    patches = mask.reshape(size // patch_size, patch_size, size // patch_size, patch_size)
    return Single(canvas.convert("RGB"), patches.mean((1, 3)))


def average_precision(values: np.ndarray, wanted: np.ndarray) -> float:
    """Return the mean, over the wanted ones, of the share of wanted ones among those of no smaller value.

    Args:
        values: Of patches, any shape.
        wanted: Which of them are, bool, of the same shape; one or more.
    """
    values, wanted = values.ravel(), wanted.ravel()
    no_smaller = values[None] >= values[wanted][:, None]
    return float(((no_smaller & wanted).sum(1) / no_smaller.sum(1)).mean())


def pointed(values: np.ndarray, wanted: np.ndarray) -> float:
    """Return the share of wanted ones among the patches of the largest value: 1 or 0, but for ties."""
    return float(wanted[values >= values.max() - 1e-6 * abs(values.max())].mean())


class Measurement:
    """A model and a vendor's drawings, whose pictures it measures by their pair's number.

    Args:
        folder: The model's.
        cache_dir: For the drawings.
        settings: Whether settings are measured rather than methods.
        seed, count: Of the pairs, as `choose_pairs` takes them.
    """

    def __init__(self, folder: Path, cache_dir: Path, settings: bool, seed: int, count: int | None):
        self.vendor, self.maps_of = (SETTINGS_VENDOR, settings_of) if settings else (HELD_OUT, maps_of)
        items = load_emoji(cache_dir)
        self.drawings, present = load_drawings(self.vendor, items, cache_dir)
        self.names = [item.name for item in items]
        self.pairs = choose_pairs(items, np.flatnonzero(present).tolist(), seed, count)
        self.model = load_model(folder, DiffCLIPModel, dtype=torch.float32, attn_implementation="eager")
        self.processor = load_processor(folder, self.model.config, DiffCLIPProcessor)

    def _maps(self, picture: Image.Image, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Return each method's maps of a picture for two emoji's names, (2, rows, columns)."""
        names = [self.names[index] for index in indices]
        found = self.maps_of(self.model, inputs_of(self.processor, names, picture))
        return {name: maps[0] for name, maps in found.items()}

    def __call__(self, number: int) -> dict[tuple[str, str], dict[str, float]]:
        """Return (layout, method) → the figures of one pair's pictures."""
        left, right = self.pairs[number]
        vision = self.model.config.vision_config
        size, rows = vision.image_size, {}
        for layout, scale in LAYOUTS.items():
            picture = compose(self.drawings[left], self.drawings[right], int(scale * size), size)
            for method, maps in self._maps(picture, (left, right)).items():
                rows[layout, method] = measures(shares(maps.clip(min=0)))
        single = place(self.drawings[left], size, vision.patch_size, seed=left)
        wanted = single.covered >= COVERED
        if wanted.any():
            rows[SINGLE, "chance"] = dict.fromkeys(SINGLE_MEASURES, float(wanted.mean()))
            # The other name, which isn't there, is for the maps against it.
            for method, maps in self._maps(single.picture, (left, right)).items():
                points, precision = pointed(maps[0], wanted), average_precision(maps[0], wanted)
                rows[SINGLE, method] = {"points": points, "precision": precision}
        return rows


_measurement: Measurement


def _start(*given: Any) -> None:
    global _measurement
    torch.set_num_threads(1)
    _measurement = Measurement(*given)


def _measure(number: int) -> dict[tuple[str, str], dict[str, float]]:
    return _measurement(number)


def measure(workers: int, pictures: int, *given: Any) -> dict[str, dict[str, dict[str, Any]]]:
    """Return layout → method → measure → its estimate over pictures.

    Args:
        workers: How many processes measure side by side.
        pictures: How many pairs there are.
        given: What `Measurement` takes.
    """
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    with ProcessPoolExecutor(workers, get_context("spawn"), _start, given) as pool:
        for rows in tqdm(pool.map(_measure, range(pictures)), total=pictures, unit="picture"):
            for (layout, method), row in rows.items():
                for name, value in row.items():
                    found.setdefault(layout, {}).setdefault(method, {}).setdefault(name, []).append(value)
    return {
        layout: {
            method: {name: vars(estimate(values)) for name, values in figures.items()}
            for method, figures in methods.items()
        }
        for layout, methods in found.items()
    }


# The report ---------------------------------------------------------------------------------------------------------


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return layout → method → measure → estimate as Markdown, in percent with its interval, a row for each method."""
    columns = [(layout, name) for layout in found for name in (SINGLE_MEASURES if layout == SINGLE else MEASURES)]
    titles = [f"{layout}: {MEASURES.get(name) or SINGLE_MEASURES[name]}" for layout, name in columns]
    lines = [f"| map | {' | '.join(titles)} |", "|---|" + "---|" * len(columns)]
    for method in [*next(iter(found.values())), "chance"]:
        cells = []
        for layout, name in columns:
            one = found[layout].get(method, {}).get(name) or dict.fromkeys(("mean", "low", "high"), CHANCE)
            mean, low, high = (100 * one[end] for end in ("mean", "low", "high"))
            cells.append(f"{mean:.1f} ({low:.1f}–{high:.1f})" if method != "chance" else f"{mean:.1f}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Figure:
    """Draw a panel for each of three measures: a bar for each method, with its interval, and chance as a line."""
    methods = list(found["small"])
    panels = [
        ("two drawings: share on the asked one", ["small", "wide"], "share", CHANCE),
        ("two drawings: most of it on the asked one", ["small", "wide"], "hit", CHANCE),
        ("one drawing: the largest value is on it", [SINGLE], "points", found[SINGLE]["chance"]["points"]["mean"]),
    ]
    figure = Figure(figsize=(5.2, 9.2), layout="constrained")
    for axis, (title, layouts, name, chance) in zip(figure.subplots(3, 1, sharex=True), panels, strict=True):
        height = 0.84 / len(layouts)
        for number, layout in enumerate(layouts):
            for row, method in enumerate(methods):
                mean, low, high = (100 * found[layout][method][name][end] for end in ("mean", "low", "high"))
                place = row + (number - (len(layouts) - 1) / 2) * height
                colour, paler = COLOURS[re.split("[ ,]", method)[0]], 1 - 0.45 * number
                axis.barh(place, mean, height * 0.92, color=colour, alpha=paler, xerr=[[mean - low], [high - mean]])
                axis.text(high + 1.5, place, f"{mean:.0f}", va="center", fontsize=10)
        axis.axvline(100 * chance, color="black", linestyle=":", linewidth=1.5)
        axis.set_yticks(range(len(methods)), [textwrap.fill(method, 22) for method in methods], fontsize=10)
        axis.invert_yaxis()
        axis.set_xlim(0, 114)
        axis.set_title(title, fontsize=11.5, loc="right")
        axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("percent; dotted: chance; paler: wide pictures", fontsize=10.5)
    return figure


PAGE = """# How well each map points

Which kind of map falls on the thing that is asked for, of the embedded model, on drawings by a vendor that it never
saw ({vendor}). Everything on this page is made by

```bash
python embedded/localization.py --cache-dir .cache/embedded --output-dir docs/localization{pairs}
```

**Two drawings** stand side by side on white, in 48 × 48 pixels (small) or 96 × 48 (wide), and both names are asked of
each of {pictures} pictures. We measure which share of a map's positive values lies on the asked drawing's half. Chance
is 50 %: a map that doesn't depend on the text has exactly that.

**One drawing** stands at a random place on a plain ground of a random colour, with a side of {least:.0f} to
{most:.0f} % of the picture's. It lies on a patch where it covers at least a quarter of it, by its own transparency.
Does the map's largest value lie on it, and how well do the values rank the patches (average precision)?

![The figures of the table as bars: {alt}](figures.png)

In percent, with the 95 % interval:

{table}

“Half against the other” takes half of the other name's map away (`against_others`). In pictures of one drawing the
other name is of something that isn't there.
{settings}"""
SETTINGS = """
## How the defaults were chosen

On drawings that the model was trained on ({vendor}), {pictures} pictures, by

```bash
python embedded/localization.py --cache-dir .cache/embedded --output-dir docs/localization --settings{pairs}
```

{table}
"""


def _pairs_option(report: Mapping[str, Any]) -> str:
    """Return the option with which a report of fewer pictures than there are was made, else nothing."""
    return "" if report.get("pairs") is None else f" --pairs {report['pairs']}"


def write_page(folder: Path) -> None:
    """Make the page and its picture of the figures in a folder."""
    report = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    best = next(iter(report["models"].values()))
    figure = draw(best)
    write_whole(folder / "figures.png", lambda beside: figure.savefig(beside, format="png", dpi=150))
    settings, path = "", folder / "settings.json"
    if path.is_file():
        chosen = json.loads(path.read_text(encoding="utf-8"))
        found = table(next(iter(chosen["models"].values())))
        settings = SETTINGS.format(
            vendor=chosen["vendor"], pictures=chosen["pictures"], pairs=_pairs_option(chosen), table=found
        )
    shares_of = [f"{name} {100 * best['small'][name]['share']['mean']:.0f} %" for name in best["small"]]
    page = PAGE.format(
        vendor=report["vendor"],
        pictures=report["pictures"],
        pairs=_pairs_option(report),
        least=100 * SIDES[0],
        most=100 * SIDES[1],
        alt=f"share on the asked one of two drawings, small pictures: {'; '.join(shares_of)}",
        table="\n\n".join(
            f"{name}:\n\n{table(found)}" if len(report["models"]) > 1 else table(found)
            for name, found in report["models"].items()
        ),
        settings=settings,
    )
    write_text_whole(folder / "README.md", page)


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=Path, default=[EMBEDDED], help="folders of different names")
    parser.add_argument("--cache-dir", type=Path, required=True, help="for the drawings, fetched on the first run")
    parser.add_argument("--output-dir", type=Path, required=True, help="for the figures, the picture and the page")
    parser.add_argument("--settings", action="store_true", help=f"compare settings, on {SETTINGS_VENDOR}'s drawings")
    parser.add_argument("--pairs", type=int, help="how many pictures; all emoji by default")
    parser.add_argument("--seed", type=int, default=0, help="of the pairs")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (%(default)s)")
    args = parser.parse_args()
    if len({folder.name for folder in args.models}) < len(args.models):
        parser.error(f"--models has {[folder.name for folder in args.models]}; the names must differ")
    report: dict[str, Any] = {
        "seed": args.seed,
        "pairs": args.pairs,
        "chance": CHANCE,
        "measures": {**MEASURES, **SINGLE_MEASURES},
    }
    report["models"] = {}
    for folder in args.models:
        given = (folder, args.cache_dir, args.settings, args.seed, args.pairs)
        # Once here, so that what is missing is fetched by one process.
        measurement = Measurement(*given)
        report |= {"vendor": measurement.vendor, "pictures": len(measurement.pairs)}
        report["models"][folder.name] = measure(args.workers, len(measurement.pairs), *given)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / ("settings.json" if args.settings else "figures.json")
    write_text_whole(path, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    if (args.output_dir / "figures.json").is_file():
        write_page(args.output_dir)
        sys.stdout.write((args.output_dir / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
