"""Time the loading of training data from tar shards against a training step at ViT-B/16.

python benchmarks/data_loading.py [--images 512] [--steps 5] [--output benchmarks/data_loading.json]

The shards hold random pictures as JPEGs with a shorter edge of 512, whose size in bytes is that of photographs, and
captions of 15 words. For each number of workers two things are measured: how many images a second come out of
the collator when nothing else is running; and, in a training loop of forward, loss, backward and AdamW in float32, how
much of a step is spent waiting for its batch. The first batch, for which workers start and the shuffle buffer is
filled, isn't counted.
"""

import io
import json
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from measuring import clip_processor, make_parser, measured_on, write_report
from PIL import Image
from torch.utils.data import DataLoader

from diffclip_hf import DiffCLIPConfig, DiffCLIPModel, DiffCLIPProcessor
from diffclip_hf.data import ImageTextCollator, ImageTextShards


GOAL = 0.1
SIZE = (683, 512)
IMAGES_PER_SHARD = 256
SHUFFLE_BUFFER = 64
CAPTION = "a small red dog on the street of an old town in winter"


def make_jpeg(generator: np.random.Generator) -> bytes:
    """Return a picture of soft shapes and a little noise, so that it takes as many bytes as a photograph."""
    shapes = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        SIZE, Image.Resampling.BICUBIC
    )
    noise = generator.normal(0, 8, (SIZE[1], SIZE[0], 1))
    picture = Image.fromarray((np.asarray(shapes) + noise).clip(0, 255).astype(np.uint8))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return file.getvalue()


def make_shards(folder: Path, images: int) -> float:
    """Write the shards and return how many bytes an image has on average."""
    generator = np.random.default_rng(0)
    total = 0
    for first in range(0, images, IMAGES_PER_SHARD):
        keys = range(first, min(first + IMAGES_PER_SHARD, images))
        name = f"{first // IMAGES_PER_SHARD:05d}"
        (folder / f"{name}_stats.json").write_text(json.dumps({"successes": len(keys)}))
        with tarfile.open(folder / f"{name}.tar", "w") as archive:
            for key in keys:
                caption = f"{CAPTION}, picture {key}".encode()
                for extension, content in (("jpg", make_jpeg(generator)), ("txt", caption)):
                    member = tarfile.TarInfo(f"{key:09d}.{extension}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
                    total += len(content)
    return total / images


def batches(folder: str, processor: DiffCLIPProcessor, batch_size: int, workers: int) -> Iterator[dict]:
    """Yield batches without end."""
    shards = ImageTextShards(folder, batch_size, shuffle_buffer=SHUFFLE_BUFFER)
    collator = ImageTextCollator(processor, train=True)
    loader = DataLoader(shards, batch_size, num_workers=workers, collate_fn=collator, persistent_workers=workers > 0)
    while True:
        yield from loader


def images_per_second(source: Iterator[dict], batch_size: int, count: int) -> float:
    """Return how many images a second the collator gives to someone who does nothing with them."""
    next(source)
    start = time.perf_counter()
    for _ in range(count):
        next(source)
    return count * batch_size / (time.perf_counter() - start)


def training_steps(source: Iterator[dict], model: DiffCLIPModel, count: int) -> dict:
    """Return the seconds that steps wait for their batch, and the seconds that they take in all."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    waits, steps = [], []
    for _ in range(1 + count):
        start = time.perf_counter()
        batch = next(source)
        waits.append(time.perf_counter() - start)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append(time.perf_counter() - start)
    return {
        "data_share_of_step": round(sum(waits[1:]) / sum(steps[1:]), 4),
        "wait_seconds": round(statistics.median(waits[1:]), 4),
        "step_seconds": round(statistics.median(steps[1:]), 3),
        "every_wait_seconds": [round(seconds, 4) for seconds in waits[1:]],
        "every_step_seconds": [round(seconds, 3) for seconds in steps[1:]],
    }


def measure(images: int, batch_size: int, steps: int, workers: list[int]) -> dict:
    """Return the measurement, with the machine that it was taken on."""
    torch.manual_seed(0)
    model = DiffCLIPModel(DiffCLIPConfig()).train()
    processor = clip_processor()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        mean_bytes = make_shards(Path(folder), images)
        for number in workers:
            loading = images_per_second(
                batches(folder, processor, batch_size, number), batch_size, images // batch_size
            )
            stepping = training_steps(batches(folder, processor, batch_size, number), model, steps)
            found[str(number)] = {"images_per_second_alone": round(loading, 1)} | stepping
    return {
        "batch_size": batch_size,
        "images": images,
        "image_size": list(SIZE),
        "bytes_per_sample": round(mean_bytes),
        "steps": steps,
        "workers": found,
        "goal_data_share_of_step": GOAL,
        "attention": model.config._attn_implementation,
        **measured_on(),
    }


def main() -> int:
    """Run the measurement; return 1 where every number of workers takes too much of the step."""
    parser = make_parser(__doc__, __file__)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5, help="how many are timed for each number of workers")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    result = measure(args.images, args.batch_size, args.steps, args.workers)
    write_report(args.output, result)
    for workers, row in result["workers"].items():
        sys.stdout.write(
            f"{workers} workers: {row['images_per_second_alone']} images/s alone; a step of {row['step_seconds']} s "
            f"waits {row['wait_seconds']} s for its batch; {row['data_share_of_step']:.1%} of all steps' time\n"
        )
    return int(min(row["data_share_of_step"] for row in result["workers"].values()) >= GOAL)


if __name__ == "__main__":
    sys.exit(main())
