"""Time zero-shot classification: Transformers' pipeline against `ZeroShotClassifier`, at ViT-B/16.

python benchmarks/zero_shot.py [--images 64] [--labels 1000] [--output benchmarks/zero_shot.json]

The weights are random, the tokenizer is CLIP's own, and the labels are ImageNet's as torchvision has them. The
classifier's time is that of encoding the labels and classifying all the images. The pipeline's would take long: since
it encodes all the labels for each image, at the same cost, it is timed on a few images, and its time for all of them
is extrapolated. The two take turns, and the medians are compared; so are their scores.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

from diffclip_hf.common.machine import describe_machine, describe_versions


ROOT = Path(__file__).parent.parent
GOAL = 30
LARGEST_DIFFERENCE = 1e-4


def make_images(count: int) -> list[Image.Image]:
    """Return random images of 256×256 pixels."""
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (256, 256, 3), dtype=np.uint8)) for _ in range(count)]


def measure(image_count: int, label_count: int, pipeline_images: int, runs: int) -> dict:
    """Return the measurement, with the machine that it was taken on."""
    from torchvision.models import ResNet18_Weights

    from diffclip_hf import (
        DiffCLIPConfig,
        DiffCLIPImageProcessorPil,
        DiffCLIPModel,
        DiffCLIPProcessor,
        ZeroShotClassifier,
    )
    from diffclip_hf.conversion.clip_vocabulary import clip_tokenizer, find_merges_file

    torch.manual_seed(0)
    model = DiffCLIPModel(DiffCLIPConfig()).eval()
    processor = DiffCLIPProcessor(DiffCLIPImageProcessorPil(), clip_tokenizer(find_merges_file()))
    labels, images = ResNet18_Weights.DEFAULT.meta["categories"][:label_count], make_images(image_count)
    texts = processor.tokenizer([f"This is a photo of {label}." for label in labels])["input_ids"]
    pipe = transformers.pipeline(
        "zero-shot-image-classification",
        model=model,
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        device="cpu",
    )

    # Both once beforehand, on little, so that neither pays for what only the first call does.
    ZeroShotClassifier(model, processor, labels[:8])(images[0])
    pipe(images[0], candidate_labels=labels[:8])
    stock_times, label_times, image_times = [], [], []
    difference = 0.0
    for _ in range(runs):
        start = time.perf_counter()
        stock = pipe(images[:pipeline_images], candidate_labels=labels)
        stock_times.append(time.perf_counter() - start)
        start = time.perf_counter()
        classifier = ZeroShotClassifier(model, processor, labels)
        label_times.append(time.perf_counter() - start)
        start = time.perf_counter()
        found = classifier(images)
        image_times.append(time.perf_counter() - start)
        for stock_row, row in zip(stock, found, strict=False):
            scores = {entry["label"]: entry["score"] for entry in row}
            relative = (abs(scores[entry["label"]] / entry["score"] - 1) for entry in stock_row)
            difference = max(difference, *relative)

    per_image = statistics.median(stock_times) / pipeline_images
    ours = statistics.median(map(sum, zip(label_times, image_times, strict=True)))
    return {
        "images": image_count,
        "labels": len(labels),
        "tokens_of_a_text": {"mean": round(statistics.mean(map(len, texts)), 2), "largest": max(map(len, texts))},
        "runs": runs,
        "pipeline_seconds_per_image": round(per_image, 3),
        "pipeline_seconds": round(per_image * image_count, 2),
        "pipeline_seconds_extrapolated_from_images": pipeline_images,
        "classifier_seconds": round(ours, 2),
        "classifier_seconds_for_labels": round(statistics.median(label_times), 2),
        "classifier_seconds_for_images": round(statistics.median(image_times), 2),
        "times_faster": round(per_image * image_count / ours, 1),
        "goal": GOAL,
        "largest_relative_difference_of_scores": difference,
        "every_run": {
            "pipeline_seconds": [round(seconds, 2) for seconds in stock_times],
            "classifier_seconds_for_labels": [round(seconds, 2) for seconds in label_times],
            "classifier_seconds_for_images": [round(seconds, 2) for seconds in image_times],
        },
        "attention": model.config._attn_implementation,
        "dtype": "float32",
        "machine": describe_machine(),
        "versions": describe_versions(),
    }


def main() -> int:
    """Run the measurement; return 1 where it is below the goal or the scores differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--labels", type=int, default=1000, help="how many of ImageNet's 1,000")
    parser.add_argument("--pipeline-images", type=int, default=2, help="how many it is timed on")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", default=str(Path(__file__).with_suffix(".json")), metavar="FILE.json")
    args = parser.parse_args()
    result = measure(args.images, args.labels, min(args.pipeline_images, args.images), args.runs)
    Path(args.output).write_text(json.dumps(result, indent=2) + "\n")
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
