"""Name pictures from free text, with the embedded model through Transformers' stock pipeline.

    python embedded/demo.py
    python embedded/demo.py --image path.jpg --labels "a cat,a dog"

Prints a table of scores, and writes a picture of the best labels and of what speaks for each (occlusion).
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, UnidentifiedImageError
from transformers import pipeline
from transformers.utils.logging import disable_progress_bar

from diffclip_hf.common.whole_files import write_whole
from diffclip_hf.demo.scores import enlarged_view

# Importing from the package also registers the model with the pipeline.
from diffclip_hf.model.image_reading_diffclip import to_rgb
from diffclip_hf.visualization import against_others, image_occlusion, overlay


logger = logging.getLogger("demo")

HERE = Path(__file__).parent
MODEL = HERE / "diffclip-emoji"
# File name → label. Everyday things chosen before the model was trained, drawn by the vendor that it never saw; none
# was left out or exchanged for what the model makes of it.
PICTURES = {
    "dog-face.png": "dog face",
    "pizza.png": "pizza",
    "rocket.png": "rocket",
    "guitar.png": "guitar",
    "sunflower.png": "sunflower",
    "bicycle.png": "bicycle",
    "snowman.png": "snowman",
    "house.png": "house",
}
OTHER_LABELS = (
    "cat face",
    "hamburger",
    "airplane",
    "violin",
    "rose",
    "motorcycle",
    "umbrella",
    "castle",
    "fish",
    "banana",
    "sailboat",
    "alarm clock",
)
SHOWN = 4
RIGHT, WRONG, OTHER = "#1b7f46", "#b3263a", "#333333"
# What the model sees is drawn at about this many pixels.
SHARP = 240


class DemoError(Exception):
    """Something about the options is wrong; the message says what is expected."""


def read_picture(path: Path) -> Image.Image:
    """Read an image file: upright, 8-bit RGB, with what is transparent over white.

    The pipeline would make RGB of it too, but with what is transparent mostly over black.

    Raises:
        DemoError: There is no such file, or it isn't an image that Pillow can read.
    """
    try:
        with Image.open(path) as opened:
            return to_rgb(opened)
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        raise DemoError(f"IMAGE is {str(path)!r}; it must be a picture's file: {error}.") from error


def read_labels(text: str) -> list[str]:
    """Split labels at commas.

    Raises:
        DemoError: There are fewer than two different ones, or one is empty.
    """
    labels = [label.strip() for label in text.split(",")]
    if len(labels) < 2 or not all(labels) or len(set(labels)) < len(labels):
        raise DemoError(
            f'LABELS is {text!r}; it must hold at least two different labels, separated by commas: "a cat,a dog".'
        )
    return labels


def table(names: list[str], answers: list[str | None], results: list[list[dict]]) -> str:
    """Return the best labels of each picture with their scores, as aligned text.

    Args:
        names: Each picture's file name.
        answers: The right label of each picture, or None where it isn't known.
        results: For each picture its labels and scores as the pipeline gives them, the best first.
    """
    rows = [["picture", *(f"{rank}. label (score)" for rank in range(1, SHOWN + 1))]]
    for name, answer, result in zip(names, answers, results, strict=True):
        marked = [("✓ " if entry["label"] == answer else "  ") + entry["label"] for entry in result[:SHOWN]]
        scored = [f"{label} ({entry['score']:.2f})" for label, entry in zip(marked, result, strict=False)]
        rows.append([name, *scored])
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) for row in rows]
    known = [result[0]["label"] == answer for answer, result in zip(answers, results, strict=True) if answer]
    if known:
        chance = len(known) / len(results[0])
        lines.append(f"{sum(known)} of {len(known)} right (✓ marks the right label); by chance {chance:.1f}.")
    return "\n".join(line.rstrip() for line in lines)


def evidence(classifier: Any, picture: Image.Image, labels: list[str], label: str) -> tuple[np.ndarray, np.ndarray]:
    """Return what the model sees of a picture, and what of it speaks for a label: (rows, columns), by occlusion.

    Args:
        classifier: The pipeline.
        picture: As `read_picture` gives it.
        labels: All that the model chooses from; half of what speaks for the others is taken away.
        label: One of them.
    """
    pixel_values = classifier.image_processor([picture], return_tensors="pt")["pixel_values"]
    tokens = classifier.tokenizer(labels, padding=True, truncation=True, return_tensors="pt")
    maps = image_occlusion(classifier.model, pixel_values, tokens["input_ids"], tokens["attention_mask"])
    return enlarged_view(picture, classifier.image_processor, SHARP), against_others(maps)[0, labels.index(label)]


def draw(
    pictures: list[np.ndarray],
    maps: list[np.ndarray],
    answers: list[str | None],
    results: list[list[dict]],
    labels: int,
) -> Figure:
    """Draw each picture, what of it speaks for its best label beside it, and the label above: green if it is right.

    Args:
        pictures: What the model sees, (height, width, 3), uint8.
        maps: Of the best labels, (rows, columns).
        answers, results: As in `table`.
        labels: How many there were to choose from.
    """
    columns = min(2, len(pictures))
    rows = -(-len(pictures) // columns)
    # As wide as a telephone shows without making it smaller.
    figure = Figure(figsize=(2.6 * columns, 1.62 * rows + 0.55), layout="constrained")
    figure.suptitle(f"Named among {labels} labels, and what speaks for it", fontsize=11)
    for part, picture, values, answer, result in zip(
        figure.subfigures(rows, columns, squeeze=False).flat, pictures, maps, answers, results, strict=False
    ):
        best = result[0]
        colour = OTHER if answer is None else RIGHT if best["label"] == answer else WRONG
        part.suptitle(f"{best['label']}  {best['score']:.2f}", fontsize=12, fontweight="bold", color=colour)
        left, right = part.subplots(1, 2)
        left.imshow(picture)
        right.imshow(overlay(picture, values))
        for axis in (left, right):
            axis.axis("off")
    return figure


def main(argv: list[str] | None = None) -> int:
    """Run the demo; return 1, with the reason on the log, where an option is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", metavar="PATH", help="a picture of your own")
    parser.add_argument("--labels", metavar="A,B", help="the labels to choose from, separated by commas")
    parser.add_argument("--output", type=Path, default=Path("demo.png"))
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    disable_progress_bar()
    try:
        labels = [*PICTURES.values(), *OTHER_LABELS] if args.labels is None else read_labels(args.labels)
        paths = [HERE / "pictures" / name for name in PICTURES] if args.image is None else [Path(args.image)]
        pictures = [read_picture(path) for path in paths]
    except DemoError as error:
        logger.error("%s", error)
        return 1
    names = [path.name for path in paths]
    known = PICTURES if args.image is None else {}
    answers = [answer if (answer := known.get(name)) in labels else None for name in names]
    classifier = pipeline("zero-shot-image-classification", model=str(MODEL), device="cpu")
    results = classifier(pictures, candidate_labels=labels)
    sys.stdout.write(table(names, answers, results) + "\n")
    found = [
        evidence(classifier, picture, labels, result[0]["label"])
        for picture, result in zip(pictures, results, strict=True)
    ]
    figure = draw([seen for seen, _ in found], [values for _, values in found], answers, results, len(labels))
    write_whole(args.output, lambda beside: figure.savefig(beside, format="png", dpi=200))
    sys.stdout.write(f"Picture: {args.output}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
