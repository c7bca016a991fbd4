"""Time zero-shot classification: Transformers' pipeline against `ZeroShotClassifier`, at ViT-B/16.

python benchmarks/zero_shot.py [--images 64] [--labels 1000] [--output benchmarks/zero_shot.json]

The weights are random, the tokenizer is CLIP's own, and the labels are ImageNet's as torchvision has them. The
classifier's time is that of encoding the labels and classifying all the images. The pipeline's would take long: since
it encodes all the labels for each image, at the same cost, it is timed on a few images, and its time for all of them
is extrapolated. The two take turns, and the medians are compared; so are their scores.
"""

import statistics
import sys
import time
from typing import Any

import numpy as np
import torch
import transformers
from measuring import clip_processor, make_parser, measured_on, write_report
from PIL import Image

from diffclip_hf import DiffCLIPConfig, DiffCLIPModel, DiffCLIPProcessor, ZeroShotClassifier


GOAL = 30
LARGEST_DIFFERENCE = 1e-4


def make_images(count: int) -> list[Image.Image]:
    """Return random images of 256×256 pixels."""
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (256, 256, 3), dtype=np.uint8)) for _ in range(count)]


def time_in_turn(
    pipe: Any, images: list[Image.Image], labels: list[str], piped: int, processor: DiffCLIPProcessor, runs: int
) -> tuple[dict[str, list[float]], float]:
    """Time both, one after the other.

    Args:
        pipe: Transformers' pipeline.
        images: All that the classifier gets.
        labels: Of both.
        piped: How many images the pipeline gets.
        processor: The model's.
        runs: How many are timed.

    Returns:
        The seconds of every run, of the pipeline and of the classifier's two parts; and the largest relative
        difference of their scores.
    """
    # Both once beforehand, on little, so that neither pays for what only the first call does.
    ZeroShotClassifier(pipe.model, processor, labels[:8])(images[0])
    pipe(images[0], candidate_labels=labels[:8])
    times: dict[str, list[float]] = {"pipeline": [], "labels": [], "images": []}
    difference = 0.0
    for _ in range(runs):
        start = time.perf_counter()
        stock = pipe(images[:piped], candidate_labels=labels)
        times["pipeline"].append(time.perf_counter() - start)
        start = time.perf_counter()
        classifier = ZeroShotClassifier(pipe.model, processor, labels)
        times["labels"].append(time.perf_counter() - start)
        start = time.perf_counter()
        found = classifier(images)
        times["images"].append(time.perf_counter() - start)
        for stock_row, row in zip(stock, found, strict=False):
            scores = {entry["label"]: entry["score"] for entry in row}
            relative = (abs(scores[entry["label"]] / entry["score"] - 1) for entry in stock_row)
            difference = max(difference, *relative)
    return times, difference


def measure(image_count: int, label_count: int, pipeline_images: int, runs: int) -> dict[str, Any]:
    """Return the measurement, with the machine that it was taken on."""
    from torchvision.models import ResNet18_Weights

    torch.manual_seed(0)
    model, processor = DiffCLIPModel(DiffCLIPConfig()).eval(), clip_processor()
    labels, images = ResNet18_Weights.DEFAULT.meta["categories"][:label_count], make_images(image_count)
    lengths = [len(ids) for ids in processor.tokenizer([f"This is a photo of {label}." for label in labels]).input_ids]
    pipe = transformers.pipeline(
        "zero-shot-image-classification",
        model=model,
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        device="cpu",
    )
    times, difference = time_in_turn(pipe, images, labels, pipeline_images, processor, runs)
    per_image = statistics.median(times["pipeline"]) / pipeline_images
    ours = statistics.median(map(sum, zip(times["labels"], times["images"], strict=True)))
    return {
        "images": image_count,
        "labels": len(labels),
        "tokens_of_a_text": {"mean": round(statistics.mean(lengths), 2), "largest": max(lengths)},
        "runs": runs,
        "pipeline_seconds_per_image": round(per_image, 3),
        "pipeline_seconds": round(per_image * image_count, 2),
        "pipeline_seconds_extrapolated_from_images": pipeline_images,
        "classifier_seconds": round(ours, 2),
        "classifier_seconds_for_labels": round(statistics.median(times["labels"]), 2),
        "classifier_seconds_for_images": round(statistics.median(times["images"]), 2),
        "times_faster": round(per_image * image_count / ours, 1),
        "goal": GOAL,
        "largest_relative_difference_of_scores": difference,
        "every_run": {
            name: [round(seconds, 2) for seconds in times[part]]
            for name, part in (
                ("pipeline_seconds", "pipeline"),
                ("classifier_seconds_for_labels", "labels"),
                ("classifier_seconds_for_images", "images"),
            )
        },
        "attention": model.config._attn_implementation,
        **measured_on(),
    }


def main() -> int:
    """Run the measurement; return 1 where it is below the goal or the scores differ."""
    parser = make_parser(__doc__, __file__)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--labels", type=int, default=1000, help="how many of ImageNet's 1,000")
    parser.add_argument("--pipeline-images", type=int, default=2, help="how many it is timed on")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    result = measure(args.images, args.labels, min(args.pipeline_images, args.images), args.runs)
    write_report(args.output, result)
    sys.stdout.write(
        f"{result['images']} images and {result['labels']} labels: pipeline {result['pipeline_seconds']} s "
        f"(extrapolated from {result['pipeline_seconds_extrapolated_from_images']} images), ZeroShotClassifier "
        f"{result['classifier_seconds']} s ({result['classifier_seconds_for_labels']} s of it for the labels), "
        f"{result['times_faster']} times faster; scores differ by at most "
        f"{result['largest_relative_difference_of_scores']:.1e} of themselves\n"
    )
    return int(result["times_faster"] < GOAL or result["largest_relative_difference_of_scores"] > LARGEST_DIFFERENCE)


if __name__ == "__main__":
    sys.exit(main())
