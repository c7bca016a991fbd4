"""Name pictures from free text, with the embedded model through Transformers' stock pipeline.

    python embedded/demo.py
    python embedded/demo.py --image path.jpg --labels "a cat,a dog"

Prints a table of scores and writes one picture of them.
"""

import argparse
import logging
import sys
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image, UnidentifiedImageError
from transformers import pipeline
from transformers.utils.logging import disable_progress_bar

from diffclip_hf.common.whole_files import write_whole

# Importing from the package also registers the model with the pipeline.
from diffclip_hf.model.image_reading_diffclip import to_rgb


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
RIGHT, WRONG, OTHER = "#2a9d5c", "#d1495b", "#8aa0b5"


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


def draw(
    pictures: list[Image.Image], names: list[str], answers: list[str | None], results: list[list[dict]], title: str
) -> Figure:
    """Draw the pictures with bars of their best labels: the right label green, a wrong first one red."""
    columns = min(4, len(pictures))
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(3.1 * columns + 0.4, 3.9 * rows + 0.7), layout="constrained")
    figure.suptitle(title, fontsize=13)
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=[1.5, 1] * rows)
    for index, (picture, name, answer, result) in enumerate(zip(pictures, names, answers, results, strict=True)):
        row, column = divmod(index, columns)
        axes = figure.add_subplot(grid[2 * row, column])
        axes.imshow(picture, interpolation="bicubic")
        axes.set_title(answer or name, fontsize=12, fontweight="bold")
        axes.axis("off")

        best = result[:SHOWN]
        labels, scores = [entry["label"] for entry in best], [entry["score"] for entry in best]
        colours = [RIGHT if label == answer else OTHER for label in labels]
        if answer and labels[0] != answer:
            colours[0] = WRONG
        axes = figure.add_subplot(grid[2 * row + 1, column])
        axes.barh(range(len(best)), scores, color=colours)
        for position, score in enumerate(scores):
            axes.text(score + 0.02, position, f"{score:.2f}", va="center", fontsize=9)
        axes.set_yticks(range(len(best)), labels, fontsize=10)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.15)
        axes.set_xticks([])
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
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
    results = classifier(pictures, candidate_labels=labels, hypothesis_template="{}")
    sys.stdout.write(table(names, answers, results) + "\n")
    whose = "Noto's drawings, unseen in training" if args.image is None else "The embedded model"
    figure = draw(pictures, names, answers, results, f"{whose}: zero-shot among {len(labels)} labels")
    write_whole(args.output, lambda beside: figure.savefig(beside, format="png", dpi=120))
    sys.stdout.write(f"Picture: {args.output}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
