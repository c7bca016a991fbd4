"""Measure whether each kind of map falls on the object that is asked for.

    python embedded/localization.py --models embedded/diffclip-emoji --cache-dir .cache/embedded \
        --report embedded/localization.json --picture docs/localization.png

Two drawings of the vendor that training never saw stand side by side, and both names are asked of each picture. The
share of a map on the half of the asked object is measured, so a map that doesn't depend on the text has a mean share
of exactly one half, whatever it looks at. Every emoji is in one picture at most, so pictures are independent.

One drawing stands on a plain ground, at a random place, and its own transparency says which patches it lies on: does
the map's largest value lie there, and how well does the map rank all patches?

With --settings, the settings of the maps are measured instead, on a vendor whose drawings were trained on, from which
the defaults were chosen.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
COVERED = 0.5
MEASURES = {
    "share": "mean share on the asked object's half",
    "hit": "more than half of it there",
    "moved": "more there than when the other is asked for",
}
SETTINGS_VENDOR = "twitter"
SINGLE_MEASURES = {"points": "largest value on the drawing", "precision": "average precision of the patches"}
# What is measured with --settings.
FILLS, WINDOWS = ("border", "mean", "blur"), (2, 3, 4)
WINDOW_SETS = ((2,), (3,), (4,), (2, 3), (3, 4), (2, 3, 4))
FIRST_LAYERS = (-1, -2, -3, 0)
# Method → its colour in the picture, by what it begins with.
COLOURS = {"occlusion": "#b2182b", "values": "#e08214", "relevance": "#2166ac", "attention": "#777777"}

# A model and a picture's inputs to each method's maps, (1, texts, rows, columns).
MapsOf = Callable[[DiffCLIPModel, dict[str, torch.Tensor]], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Estimate:
    """A mean over pictures with the ends of its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of independent values with the normal approximation's interval."""
    array = np.asarray(values)
    margin = 1.96 * array.std(ddof=1) / math.sqrt(len(array))
    return Estimate(
        *(round(float(value), 4) for value in (array.mean(), array.mean() - margin, array.mean() + margin))
    )


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
    options = {**inputs, "interpolate_pos_encoding": True}
    occlusion, values = image_occlusion(model, **options), value_similarity(model, **options)
    attention = class_attention(model, inputs["pixel_values"], interpolate_pos_encoding=True)
    return {
        "occlusion": occlusion,
        "occlusion, against the other name": against_others(occlusion),
        "values of the last two layers": values,
        "values, against the other name": against_others(values),
        "relevance": image_relevance(model, **options),
        "relevance of the last layer": image_relevance(model, **options, first_layer=-1),
        "attention of the class token, last layer": np.repeat(attention[:, None], len(inputs["input_ids"]), axis=1),
    }


def settings_of(model: DiffCLIPModel, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Return the maps of one picture by every setting from which the defaults were chosen."""
    options = {**inputs, "interpolate_pos_encoding": True}
    found = {}
    for fill in FILLS:
        # Sizes count equally, so a set's map is the mean of its sizes' maps.
        by_size = {side: image_occlusion(model, **options, fill=fill, windows=[side]) for side in WINDOWS}
        for sides in WINDOW_SETS:
            maps = np.mean([by_size[side] for side in sides], axis=0)
            name = f"occlusion, {fill}, {' and '.join(map(str, sides))} patches"
            found |= {name: maps, f"{name}, against the other": against_others(maps)}
    for first in FIRST_LAYERS:
        maps = value_similarity(model, **options, first_layer=first)
        found |= {f"values from layer {first}": maps, f"values from layer {first}, against": against_others(maps)}
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


def inputs_of(processor: DiffCLIPProcessor, picture: Image.Image, texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return a model's inputs of a picture as it is and of texts."""
    inputs = processor.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    options = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
    return {**inputs, "pixel_values": processor.image_processor(images=[picture], **options)["pixel_values"]}


@dataclass(frozen=True)
class Drawings:
    """A vendor's drawings, (emoji, height, width, 4), and each emoji's name."""

    images: np.ndarray
    names: Sequence[str]


def measure_pairs(
    model: DiffCLIPModel,
    processor: DiffCLIPProcessor,
    drawings: Drawings,
    pairs: Sequence[tuple[int, int]],
    maps_of: MapsOf,
    bar: tqdm,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return layout → method → measure → its estimate over pictures of two drawings."""
    height = model.config.vision_config.image_size
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for layout, scale in LAYOUTS.items():
        rows: dict[str, list[dict[str, float]]] = defaultdict(list)
        for left, right in pairs:
            picture = compose(drawings.images[left], drawings.images[right], int(scale * height), height)
            inputs = inputs_of(processor, picture, [drawings.names[left], drawings.names[right]])
            for name, maps in maps_of(model, inputs).items():
                rows[name].append(measures(shares(maps[0].clip(min=0))))
            bar.update()
        found[layout] = estimates(rows)
    return found


def measure_singles(
    model: DiffCLIPModel,
    processor: DiffCLIPProcessor,
    drawings: Drawings,
    chosen: Sequence[int],
    maps_of: MapsOf,
    bar: tqdm,
) -> dict[str, dict[str, Any]]:
    """Return method → measure → its estimate over pictures of one drawing; the method "chance" ranks at random.

    Another drawing's name is asked of each too, for the maps against it.
    """
    vision = model.config.vision_config
    rows: dict[str, list[dict[str, float]]] = defaultdict(list)
    for index, other in zip(chosen, [chosen[-1], *chosen], strict=False):
        single = place(drawings.images[index], vision.image_size, vision.patch_size, index)
        wanted = single.covered >= COVERED
        inputs = inputs_of(processor, single.picture, [drawings.names[index], drawings.names[other]])
        bar.update()
        if not wanted.any():
            continue
        rows["chance"].append({name: wanted.mean() for name in SINGLE_MEASURES})
        for name, maps in maps_of(model, inputs).items():
            values = maps[0, 0]
            rows[name].append({"points": pointed(values, wanted), "precision": average_precision(values, wanted)})
    return estimates(rows)


def estimates(rows: Mapping[str, list[dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return method → measure → its estimate, of each method's rows."""
    return {
        method: {name: vars(estimate([row[name] for row in group])) for name in group[0]}
        for method, group in rows.items()
    }


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]], measures: Mapping[str, str], first: str) -> str:
    """Return every figure as Markdown, in percent with its interval.

    Args:
        found: Group → method → measure → its estimate.
        measures: What each measure is.
        first: What the groups are.
    """
    lines = [f"| {first} | map | {' | '.join(measures.values())} |", "|---|---|" + "---|" * len(measures)]
    for group, methods in found.items():
        for method, figures in methods.items():
            ends = [[100 * figures[one][end] for end in ("mean", "low", "high")] for one in measures]
            cells = [f"{mean:.1f} ({low:.1f}–{high:.1f})" for mean, low, high in ends]
            lines.append(f"| {group} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(report: Mapping[str, Any], model: str) -> Figure:
    """Draw one model's figures: a bar for each method, with its interval, and chance as a line."""
    pairs, singles = report["models"][model], report["singles"][model]
    panels = [
        ("two drawings: share on the asked one", [pairs["small"], pairs["wide"]], "share"),
        ("two drawings: most of it on the asked one", [pairs["small"], pairs["wide"]], "hit"),
        ("one drawing: the largest value is on it", [singles], "points"),
    ]
    methods = [method for method in singles if method != "chance"]
    figure = Figure(figsize=(6.4, 9.6), layout="constrained")
    for axis, (title, layouts, name) in zip(figure.subplots(3, 1, sharex=True), panels, strict=True):
        height = 0.8 / len(layouts)
        for number, layout in enumerate(layouts):
            for row, method in enumerate(methods):
                one = {end: 100 * value for end, value in layout[method][name].items()}
                colour = COLOURS[method.split()[0].rstrip(",")]
                place = row + (number - (len(layouts) - 1) / 2) * height
                ends = [[one["mean"] - one["low"]], [one["high"] - one["mean"]]]
                axis.barh(place, one["mean"], height * 0.9, color=colour, alpha=1 - 0.35 * number, xerr=ends)
                axis.text(one["mean"] + 2.5, place, f"{one['mean']:.0f}", va="center", fontsize=11)
        chance = singles["chance"]["points"]["mean"] if layouts == [singles] else report["chance"]
        axis.axvline(100 * chance, color="black", linestyle=":", linewidth=1.5)
        axis.set_yticks(range(len(methods)), methods, fontsize=11)
        axis.invert_yaxis()
        axis.set_xlim(0, 112)
        axis.set_title(title, fontsize=13, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("percent; dotted: chance; paler: the wide pictures", fontsize=11)
    return figure


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=Path, required=True, help="folders, each with a name of its own")
    parser.add_argument("--cache-dir", type=Path, required=True, help="for the drawings, fetched on the first run")
    parser.add_argument("--settings", action="store_true", help=f"compare settings, on {SETTINGS_VENDOR}'s drawings")
    parser.add_argument("--pairs", type=int, help="how many pictures; all emoji by default")
    parser.add_argument("--seed", type=int, default=0, help="of the pairs")
    parser.add_argument("--report", type=Path, help="also write the figures into this JSON file")
    parser.add_argument("--picture", type=Path, help="also draw the first model's figures into this PNG file")
    args = parser.parse_args()
    if len({folder.name for folder in args.models}) < len(args.models):
        parser.error(f"--models has {[folder.name for folder in args.models]}; the names must differ")
    vendor, methods = (SETTINGS_VENDOR, settings_of) if args.settings else (HELD_OUT, maps_of)
    items = load_emoji(args.cache_dir)
    images, present = load_drawings(vendor, items, args.cache_dir)
    drawings = Drawings(images, [item.name for item in items])
    pairs = choose_pairs(items, np.flatnonzero(present).tolist(), args.seed, args.pairs)
    report: dict[str, Any] = {
        "vendor": vendor,
        "seed": args.seed,
        "pictures": len(pairs),
        "chance": 0.5,
        "measures": {**MEASURES, **SINGLE_MEASURES},
        "models": {},
        "singles": {},
    }
    with tqdm(total=len(args.models) * (len(LAYOUTS) + 1) * len(pairs), unit="picture") as bar:
        for folder in args.models:
            model = load_model(folder, DiffCLIPModel, dtype=torch.float32, attn_implementation="eager")
            processor = load_processor(folder, model.config, DiffCLIPProcessor)
            found = measure_pairs(model, processor, drawings, pairs, methods, bar)
            report["models"][folder.name] = found
            single = measure_singles(model, processor, drawings, [left for left, _ in pairs], methods, bar)
            report["singles"][folder.name] = single
    for name, layouts in report["models"].items():
        sys.stdout.write(f"{name}\n\n{table(layouts, MEASURES, 'two drawings')}\n\n")
    sys.stdout.write(table(report["singles"], SINGLE_MEASURES, "one drawing") + "\n")
    if args.report:
        write_text_whole(args.report, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    if args.picture:
        figure = draw(report, args.models[0].name)
        write_whole(args.picture, lambda beside: figure.savefig(beside, format="png", dpi=130))


if __name__ == "__main__":
    main()
