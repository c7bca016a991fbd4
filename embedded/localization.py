"""Measure whether relevance falls on the object that is asked for, in pictures of two known objects.

    python embedded/localization.py --models embedded/diffclip-emoji --cache-dir .cache/embedded \
        --report embedded/localization.json

Two drawings of the vendor that training never saw stand side by side, and both names are asked of each picture. The
share of a map on the half of the asked object is measured, so a map that doesn't depend on the text has a mean share
of exactly one half, whatever it looks at. Every emoji is in one picture at most, so pictures are independent.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emoji_data import HELD_OUT, TRAINING_VENDORS, Emoji, load_drawings, load_emoji
from PIL import Image
from tqdm import tqdm

from diffclip_hf import DiffCLIPModel, DiffCLIPProcessor
from diffclip_hf.common.loading import load_model, load_processor
from diffclip_hf.common.whole_files import write_text_whole
from diffclip_hf.visualization import class_attention, image_relevance


# Layout → each drawing's side as a share of the model's image size. On "small" pictures, of the model's own size,
# drawings are half as large as in training; "wide" ones are twice as wide, with positions interpolated.
LAYOUTS = {"small": 0.5, "wide": 1.0}
METHODS = ("relevance", "relevance of the last layer", "attention of the class token, last layer")
MEASURES = {
    "share": "mean share on the asked object's half",
    "hit": "more than half of it there",
    "moved": "more there than when the other is asked for",
}


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


def maps_of(model: DiffCLIPModel, inputs: dict[str, torch.Tensor]) -> Iterator[np.ndarray]:
    """Yield each method's maps of one picture for two texts, (2, rows, columns), in the order of `METHODS`."""
    for first_layer in (0, -1):
        yield image_relevance(model, **inputs, first_layer=first_layer, interpolate_pos_encoding=True)[0]
    attention = class_attention(model, inputs["pixel_values"], interpolate_pos_encoding=True)
    yield np.repeat(attention.clip(min=0), 2, axis=0)


def measure(
    model: DiffCLIPModel,
    processor: DiffCLIPProcessor,
    drawings: np.ndarray,
    names: Sequence[str],
    pairs: Sequence[tuple[int, int]],
    bar: tqdm,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return layout → method → measure → its estimate over pictures."""
    height = model.config.vision_config.image_size
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for layout, scale in LAYOUTS.items():
        rows: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
        for left, right in pairs:
            picture = compose(drawings[left], drawings[right], int(scale * height), height)
            inputs = processor.tokenizer(
                [names[left], names[right]], padding=True, truncation=True, return_tensors="pt"
            )
            inputs["pixel_values"] = processor.image_processor(
                images=[picture], do_resize=False, do_center_crop=False, return_tensors="pt"
            )["pixel_values"]
            for method, maps in zip(METHODS, maps_of(model, inputs), strict=True):
                rows[method].append(measures(shares(maps)))
            bar.update()
        found[layout] = {
            method: {name: vars(estimate([row[name] for row in group])) for name in MEASURES}
            for method, group in rows.items()
        }
    return found


def table(models: dict[str, dict]) -> str:
    """Return every figure as Markdown, in percent with its interval."""
    lines = [f"| model | pictures | map | {' | '.join(MEASURES.values())} |", "|---|---|---|---|---|---|"]
    for name, layouts in models.items():
        for layout, methods in layouts.items():
            for method, figures in methods.items():
                ends = [[100 * figures[one][end] for end in ("mean", "low", "high")] for one in MEASURES]
                cells = [f"{mean:.1f} ({low:.1f}–{high:.1f})" for mean, low, high in ends]
                lines.append(f"| {name} | {layout} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=Path, required=True, help="folders, each with a name of its own")
    parser.add_argument("--cache-dir", type=Path, required=True, help="for the drawings, fetched on the first run")
    parser.add_argument("--vendor", default=HELD_OUT, choices=[HELD_OUT, *TRAINING_VENDORS])
    parser.add_argument("--pairs", type=int, help="how many pictures; all emoji by default")
    parser.add_argument("--seed", type=int, default=0, help="of the pairs")
    parser.add_argument("--report", type=Path, help="also write the figures into this JSON file")
    args = parser.parse_args()
    if len({folder.name for folder in args.models}) < len(args.models):
        parser.error(f"--models has {[folder.name for folder in args.models]}; the names must differ")
    items = load_emoji(args.cache_dir)
    drawings, present = load_drawings(args.vendor, items, args.cache_dir)
    pairs = choose_pairs(items, np.flatnonzero(present).tolist(), args.seed, args.pairs)
    names = [item.name for item in items]
    found = {}
    with tqdm(total=len(args.models) * len(LAYOUTS) * len(pairs), unit="picture") as bar:
        for folder in args.models:
            model = load_model(folder, DiffCLIPModel, dtype=torch.float32, attn_implementation="eager")
            processor = load_processor(folder, model.config, DiffCLIPProcessor)
            found[folder.name] = measure(model, processor, drawings, names, pairs, bar)
    sys.stdout.write(table(found) + "\n")
    if args.report:
        content = {
            "vendor": args.vendor,
            "seed": args.seed,
            "pictures": len(pairs),
            "chance": 0.5,
            "measures": MEASURES,
            "models": found,
        }
        write_text_whole(args.report, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
