"""Measure the embedded model on the vendor that its training never saw.

python embedded/evaluate.py --model embedded/diffclip-emoji --cache-dir .cache/embedded
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from emoji_data import HELD_OUT, TRAINING_VENDORS, Emoji, load_drawings, load_emoji
from localization import choose_pairs, compose
from PIL import Image

from diffclip_hf import DiffCLIPModel, DiffCLIPProcessor, ZeroShotClassifier
from diffclip_hf.common.loading import load_model, load_processor
from diffclip_hf.common.whole_files import write_text_whole


LABEL_SETS = (20, 100)
REPETITIONS = 20
PHRASES = Path(__file__).parent / "phrases.json"
# How many names of what isn't in a picture of two drawings both names are compared with.
OTHERS = 8


def zero_shot(similarity: torch.Tensor, labels: int, seed: int) -> float:
    """Return the top-1 accuracy where each image has its own name and `labels` - 1 random others to choose from.

    Args:
        similarity: (n, n), where row i is an image's and column i its own name's; a tie counts as wrong.
        labels: How many labels there are to choose from, at most n.
        seed: Of the random others, which are drawn `REPETITIONS` times for each image.
    """
    count = len(similarity)
    generator = torch.Generator().manual_seed(seed)
    correct = []
    for _ in range(REPETITIONS):
        # Distinct others for each image: the shuffled indices of all but itself.
        noise = torch.rand(count, count, generator=generator).fill_diagonal_(2)
        others = noise.topk(labels - 1, largest=False).indices
        correct.append(similarity.diagonal()[:, None] > similarity.gather(1, others))
    return torch.stack(correct).all(-1).float().mean().item()


def recall(similarity: torch.Tensor, k: int) -> float:
    """Return the share of rows whose own column is among the `k` most similar; a tie counts as less similar."""
    rank = (similarity >= similarity.diagonal()[:, None]).sum(1) - 1
    return (rank < k).float().mean().item()


def figures_of(similarity: torch.Tensor) -> dict[str, tuple[float, float]]:
    """Return every figure of the report beside chance, as shares of 1.

    Args:
        similarity: (n, n), where row i is an image's and column i its own name's; any increasing function of the
            cosine, which is all that the figures need.
    """
    count = len(similarity)
    figures = {f"zero-shot top-1 among {n}": (zero_shot(similarity, n, seed=0), 1 / n) for n in LABEL_SETS}
    for direction, matrix in (("image to text", similarity), ("text to image", similarity.t())):
        for k in (1, 5):
            figures[f"{direction} Recall@{k} among {count}"] = (recall(matrix, k), k / count)
    return figures


def phrases_right(scores: torch.Tensor, own: torch.Tensor) -> float:
    """Return the share of phrases that fit their picture better than every phrase of the other pictures does.

    Args:
        scores: (phrases, phrases), of the picture of phrase i and the text of phrase j.
        own: (phrases, phrases), bool, whether phrases i and j are of the same picture.
    """
    others = scores.masked_fill(own, -torch.inf).amax(1)
    return (scores.diagonal() > others).float().mean().item()


def both_above(scores: torch.Tensor, pairs: torch.Tensor, seed: int) -> float:
    """Return the share of pictures of two drawings whose names are both above `OTHERS` others, drawn at random.

    Args:
        scores: (pictures, names).
        pairs: (pictures, 2), the indices of each picture's own names.
        seed: Of the others.
    """
    noise = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)).scatter(1, pairs, 2.0)
    others = noise.topk(OTHERS, largest=False).indices
    return (scores.gather(1, pairs).amin(1) > scores.gather(1, others).amax(1)).float().mean().item()


def measure_phrases(
    model: DiffCLIPModel, processor: DiffCLIPProcessor, items: list[Emoji], images: np.ndarray
) -> dict[str, tuple[float, float]]:
    """Return how many of the everyday phrases of `PHRASES` are right, in both directions, beside chance."""
    rows = json.loads(PHRASES.read_text(encoding="utf-8"))["phrases"]
    index_of = {item.name: index for index, item in enumerate(items)}
    names = [name for name, _ in rows]
    scores = ZeroShotClassifier(model, processor, [phrase for _, phrase in rows], "{}").logits(
        Image.fromarray(images[index_of[name]]) for name in names
    )
    own = torch.tensor([[one == other for other in names] for one in names])
    chance = statistics.mean(1 / (len(rows) - names.count(name) + 1) for name in names)
    pictures = len(set(names))
    return {
        f"everyday phrases, picture to phrase among {len(rows)}": (phrases_right(scores, own), chance),
        f"everyday phrases, phrase to picture among {pictures}": (phrases_right(scores.t(), own), 1 / pictures),
    }


def measure_two(
    classifier: ZeroShotClassifier, items: list[Emoji], images: np.ndarray, indices: np.ndarray
) -> dict[str, tuple[float, float]]:
    """Return for how many pictures of two drawings both names are above others, beside chance.

    Args:
        classifier: With the names of `indices`, as they are.
        items, images: All of them.
        indices: Those with a drawing.
    """
    pairs = choose_pairs(items, indices.tolist(), 0, None)
    size = classifier.model.config.vision_config.image_size
    places = {index: place for place, index in enumerate(indices.tolist())}
    scores = classifier.logits(compose(images[left], images[right], size // 2, size) for left, right in pairs)
    own = torch.tensor([[places[left], places[right]] for left, right in pairs])
    value = both_above(scores, own, seed=0)
    return {f"two drawings, both names above {OTHERS} others": (value, 1 / math.comb(OTHERS + 2, 2))}


def measure(
    model: DiffCLIPModel, processor: DiffCLIPProcessor, vendor: str, cache_dir: Path
) -> dict[str, dict[str, float]]:
    """Return every figure of the report, each beside chance: name → {"measured", "chance"}, as shares of 1."""
    items = load_emoji(cache_dir)
    images, present = load_drawings(vendor, items, cache_dir)
    indices = np.flatnonzero(present)
    # Each name as it is.
    classifier = ZeroShotClassifier(model, processor, [items[i].name for i in indices], "{}")
    figures = figures_of(classifier.logits(Image.fromarray(images[i]) for i in indices))
    figures |= measure_phrases(model, processor, items, images)
    figures |= measure_two(classifier, items, images, indices)
    return {
        name: {"measured": round(value, 4), "chance": round(chance, 4)} for name, (value, chance) in figures.items()
    }


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--cache-dir", type=Path, required=True)
    parser.add_argument("--vendor", default=HELD_OUT, choices=[HELD_OUT, *TRAINING_VENDORS])
    parser.add_argument("--report", type=Path, help="also write the figures into this JSON file")
    args = parser.parse_args()
    model = load_model(args.model, DiffCLIPModel, dtype=torch.float32)
    processor = load_processor(args.model, model.config, DiffCLIPProcessor)
    report = measure(model, processor, args.vendor, args.cache_dir)
    lines = ["| measure | value | chance |", "|---|---|---|"]
    lines += [f"| {name} | {row['measured']:.3f} | {row['chance']:.4f} |" for name, row in report.items()]
    sys.stdout.write("\n".join(lines) + "\n")
    if args.report:
        content = {"vendor": args.vendor, "parameters": model.num_parameters(), "figures": report}
        write_text_whole(args.report, json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
