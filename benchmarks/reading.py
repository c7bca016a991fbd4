"""Time the reading of pictures for zero-shot classification: one process, one a core, and torch's `DataLoader`.

python benchmarks/reading.py [--only "500x375 Pillow" ...] [--rounds 7] [--workers 2] [--output FILE.json]

What is read are JPEGs of 500×375 and of 12 megapixels (4000×3000), mosaics of the two photographs that
scikit-learn brings, each turned and cut at random, so that they have the texture of photographs. They go through
`ZeroShotClassifier` with a model that costs nothing; and through a `DataLoader` with as many worker processes, whose
collator calls the same functions. What the machine can do is the rate of as many processes that each read a part on
their own, one picture after the other, with nothing between them. A round times each once, and starts the next with
another; the medians of the rounds' ratios are compared. Each time has the start of its processes, and of the
`DataLoader` it's also given from the first batch on. The processor's seconds are this process's and its children's.

The whole classifier, with the embedded model, is timed on the small pictures. `--only` measures some parts, and
keeps what the report has of the others.
"""

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from measuring import make_parser, measured_on, write_report
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoProcessor

from diffclip_hf import DiffCLIPImageProcessor, DiffCLIPImageProcessorPil, ZeroShotClassifier
from diffclip_hf.common.reading_ahead import usable_cores
from diffclip_hf.model.image_reading_diffclip import read_image


GOAL = 0.9
EMBEDDED = Path(__file__).parents[1] / "embedded" / "diffclip-emoji"
# Width, height, how many, and how often each is read in a round.
SIZES = {"500x375": (500, 375, 64, 16), "12 megapixels": (4000, 3000, 8, 2)}
BACKENDS = {"torchvision": DiffCLIPImageProcessor, "Pillow": DiffCLIPImageProcessorPil}
WHOLE = "classifier"
PARTS = [*(f"{size} {backend}" for size in SIZES for backend in BACKENDS), WHOLE]
BATCH = 8


def make_pictures(folder: Path, width: int, height: int, count: int) -> list[str]:
    """Write JPEGs of quality 90, and return their paths."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(array) for array in load_sample_images().images]
    generator = np.random.default_rng(0)
    paths = []
    for number in range(count):
        picture = Image.new("RGB", (width, height))
        for top in range(0, height, 400):
            for left in range(0, width, 600):
                part = photographs[generator.integers(2)].rotate(generator.uniform(-4, 4), Image.Resampling.BICUBIC)
                picture.paste(part.crop((20, 14, 620, 414)), (left, top))
        paths.append(str(folder / f"{width}-{number:03}.jpg"))
        picture.save(paths[-1], quality=90)
    return paths


class NoModel(nn.Module):
    """Stands in for a model, and costs nothing."""

    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.device = torch.device("cpu")

    def get_text_features(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(pooler_output=torch.ones(len(input_ids), 4))

    def get_image_features(self, pixel_values: torch.Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(pooler_output=torch.ones(len(pixel_values), 4))


class Collator:
    """Reads a batch of paths in a `DataLoader`'s worker, as the classifier reads them."""

    def __init__(self, image_processor: Any):
        self.image_processor = image_processor

    def __call__(self, paths: list[str]) -> torch.Tensor:
        rows = [self.image_processor(images=[read_image(path)], return_tensors="pt") for path in paths]
        return torch.cat([row["pixel_values"] for row in rows])


def seconds(work: Callable[[], Any]) -> tuple[float, float]:
    """Return how long something takes, and the processor's seconds of this process and of its children that ended."""
    start, used = time.perf_counter(), processor_seconds()
    work()
    return time.perf_counter() - start, processor_seconds() - used


def processor_seconds() -> float:
    """Return the processor's seconds up to now, of this process and its children that ended."""
    return sum(os.times()[:4])


def loader_seconds(paths: list[str], image_processor: Any, workers: int) -> tuple[float, float]:
    """Return how long a `DataLoader` takes, in all and for an equal number of pictures after its first batch."""
    start = time.perf_counter()
    batches = iter(DataLoader(paths, BATCH, num_workers=workers, collate_fn=Collator(image_processor)))  # type: ignore
    first = len(next(batches))
    started = time.perf_counter()
    rest = sum(len(batch) for batch in batches)
    end = time.perf_counter()
    return end - start, (end - started) * (first + rest) / rest


def read_apart(classifier: ZeroShotClassifier, paths: list[str], workers: int) -> None:
    """Read a part in each of several processes, which have nothing to do with each other."""
    context = multiprocessing.get_context("fork")
    parts = [paths[number::workers] for number in range(workers)]
    processes = [context.Process(target=classifier.logits, args=(part,)) for part in parts]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def rate(count: int, times: list[float]) -> float:
    """Return pictures a second, by the median."""
    return round(count / statistics.median(times), 1)


def measure_reading(paths: list[str], image_processor: Any, tokenizer: Any, workers: int, rounds: int) -> dict:
    """Return pictures a second of one process, of several, and of a `DataLoader`, in rounds that begin with each."""
    processor: Any = SimpleNamespace(image_processor=image_processor, tokenizer=tokenizer)
    alone, several = (
        ZeroShotClassifier(NoModel(), processor, ["a"], batch_size=BATCH, num_workers=n, progress_bar=False)  # type: ignore
        for n in (1, workers)
    )
    ways: dict[str, Callable[[], Any]] = {
        "one": lambda: alone.logits(paths),
        "several": lambda: several.logits(paths),
        "data_loader": lambda: started.append(loader_seconds(paths, image_processor, workers)[1]),
        "apart": lambda: read_apart(alone, paths, workers),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    used: dict[str, list[float]] = {way: [] for way in ways}
    started: list[float] = []
    alone.logits(paths[:8])
    for number in range(rounds):
        order = list(ways)
        for way in order[number % 4 :] + order[: number % 4]:
            wall, processor_time = seconds(ways[way])
            times[way].append(wall)
            used[way].append(processor_time)
    ratios = sorted(one / many for one, many in zip(times["one"], times["several"], strict=True))
    apart = [one / many for one, many in zip(times["one"], times["apart"], strict=True)]
    ratio = statistics.median(ratios)
    return {
        "rounds": rounds,
        "pictures": len(paths),
        **{way: rate(len(paths), times[way]) for way in ways},
        # Of few batches the rest are read when the first one is there.
        "data_loader_once_started": rate(len(paths), started) if len(paths) >= 20 * BATCH else None,
        "processor_ms": {way: round(1000 * statistics.median(used[way]) / len(paths), 2) for way in ways},
        "times_one": round(ratio, 2),
        "times_one_of_all_rounds": [round(one, 2) for one in ratios],
        "apart_times_one": round(statistics.median(apart), 2),
        "share_of_workers": round(ratio / workers, 2),
    }


def measure_classifier(paths: list[str], workers: int, rounds: int) -> dict:
    """Return pictures a second of the whole classifier with the embedded model, of one process and of several."""
    model, processor = AutoModel.from_pretrained(EMBEDDED), AutoProcessor.from_pretrained(EMBEDDED)
    labels = ["pizza", "rocket", "dog face"]
    classifiers = [
        ZeroShotClassifier(model, processor, labels, num_workers=n, progress_bar=False) for n in (1, workers)
    ]
    times: list[list[float]] = [[], []]
    classifiers[0].logits(paths[:8])
    for number in range(rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            times[which].append(seconds(lambda which=which: classifiers[which].logits(paths))[0])  # type: ignore
    ratios = sorted(one / many for one, many in zip(*times, strict=True))
    return {
        "rounds": rounds,
        "one": rate(len(paths), times[0]),
        "several": rate(len(paths), times[1]),
        "times_one": round(statistics.median(ratios), 2),
        "times_one_of_all_rounds": [round(one, 2) for one in ratios],
    }


def measure(parts: list[str], workers: int, rounds: int, share: float, before: dict[str, Any]) -> dict[str, Any]:
    """Return the report, with the machine that it was taken on; `share` of the pictures are read.

    Args:
        parts: Which of `PARTS` are measured.
        workers: How many processes.
        rounds: How many rounds.
        share: Of the pictures.
        before: A report whose other parts are kept.
    """
    tokenizer = AutoProcessor.from_pretrained(EMBEDDED).tokenizer
    reading: dict[str, Any] = before.get("pictures_per_second", {})
    whole = before.get("whole_classifier_500x375")
    with tempfile.TemporaryDirectory() as folder:
        for size, (width, height, count, times) in SIZES.items():
            here = [backend for backend in BACKENDS if f"{size} {backend}" in parts]
            if not here and (size != "500x375" or WHOLE not in parts):
                continue
            files = make_pictures(Path(folder), width, height, count)
            paths = (files * times)[: max(2 * BATCH, round(len(files) * times * share))]
            for backend in here:
                found = measure_reading(paths, BACKENDS[backend](), tokenizer, workers, rounds)
                reading.setdefault(size, {})[backend] = found
            if size == "500x375" and WHOLE in parts:
                whole = measure_classifier(paths, workers, rounds)
    return {
        "workers": workers,
        "usable_cores": usable_cores(),
        "batch_size": BATCH,
        "pictures_per_second": reading,
        "whole_classifier_500x375": whole,
        "goal_share_of_workers": GOAL,
        **measured_on(packages=("pillow", "numpy", "torchvision")),
    }


def main() -> int:
    """Run the measurement; return 1 where several processes reach less of the workers than the goal."""
    parser = make_parser(__doc__, __file__)
    parser.add_argument("--only", nargs="+", choices=PARTS, help="measure these, and keep the others of the report")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes, and the DataLoader's")
    parser.add_argument("--share", type=float, default=1.0, help="of the pictures, for a quick look")
    args = parser.parse_args()
    before = json.loads(args.output.read_text(encoding="utf-8")) if args.only and args.output.exists() else {}
    result = measure(args.only or PARTS, args.workers, args.rounds, args.share, before)
    write_report(args.output, result)
    shares = []
    for size, backends in result["pictures_per_second"].items():
        for name, row in backends.items():
            shares.append(row["share_of_workers"])
            sys.stdout.write(
                f"{size}, {name}: {row['one']} pictures/s by one, {row['several']} by {args.workers} "
                f"({row['times_one']} times), {row['apart']} by {args.workers} apart ({row['apart_times_one']}); "
                f"DataLoader {row['data_loader']}, once started {row['data_loader_once_started']}; "
                f"processor's ms a picture {row['processor_ms']}\n"
            )
    if whole := result["whole_classifier_500x375"]:
        sys.stdout.write(
            f"the whole classifier: {whole['one']} by one, {whole['several']} by {args.workers} "
            f"({whole['times_one']} times)\n"
        )
    return int(min(shares, default=GOAL) < GOAL)


if __name__ == "__main__":
    sys.exit(main())
