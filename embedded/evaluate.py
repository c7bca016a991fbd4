"""Measure the embedded model on the vendor that its training never saw.

python embedded/evaluate.py --model embedded/diffclip-emoji --cache-dir .cache/embedded
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from emoji_data import HELD_OUT, TRAINING_VENDORS, load_drawings, load_emoji
from PIL import Image

from diffclip_hf import DiffCLIPModel, DiffCLIPProcessor, ZeroShotClassifier
from diffclip_hf.common.loading import load_model, load_processor
from diffclip_hf.common.whole_files import write_text_whole


LABEL_SETS = (20, 100)
REPETITIONS = 20


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


def measure(
    model: DiffCLIPModel, processor: DiffCLIPProcessor, vendor: str, cache_dir: Path
) -> dict[str, dict[str, float]]:
    """Return every figure of the report, each beside chance: name → {"measured", "chance"}, as shares of 1."""
    items = load_emoji(cache_dir)
    images, present = load_drawings(vendor, items, cache_dir)
    indices = np.flatnonzero(present)
    # Each name as it is.
    classifier = ZeroShotClassifier(model, processor, [items[i].name for i in indices], "{}")
    similarity = classifier.logits(Image.fromarray(images[i]) for i in indices)
    return {
        name: {"measured": round(value, 4), "chance": round(chance, 4)}
        for name, (value, chance) in figures_of(similarity).items()
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
