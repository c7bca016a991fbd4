"""Time what grows with the data: retrieval's ranks, and training's way to its first batch of many tar shards.

    python benchmarks/growth.py [--rows 100000] [--shards 10 1000 5000] [--part retrieval | shards]

Retrieval is Recall@1, 5 and 10 in both directions between as many texts as images, of 512 numbers each, whose own
cosine is about 0.2, as a trained model's is. Beside it stands the time of the products alone, in the same
blocks. Each runs in a process of its own, whose memory at its highest is told with and without the
embeddings. Shards have two small pictures each. A start is from making the data set to the first batch, of 8 from
shards in a random order, in one process and in each of two that run at once; the imports before it aren't part of it.
"""

import io
import json
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measuring import (
    MIB,
    child_arguments,
    make_parser,
    measured_on,
    memory,
    run_child,
    run_children,
    tell_parent,
    write_report,
)
from PIL import Image
from torch.nn.functional import normalize

from diffclip_hf.data import ImageTextShards
from diffclip_hf.data.ranks import CPU_BLOCK
from diffclip_hf.data.retrieval_metrics import recall_at_k


WIDTH = 512
# Of both sides' noise to the pair's common part, for a cosine of about 0.2.
NOISE = 2.0
CHUNK = 8192
STATED = {
    "stats.json": "a file for each shard",
    "sizes.json": "one file for all",
    "none": "nothing, and counted before",
}


def make_embeds(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return texts and images, made a few at a time."""
    generator = torch.Generator().manual_seed(0)
    texts, images = torch.empty(rows, WIDTH), torch.empty(rows, WIDTH)
    for start in range(0, rows, CHUNK):
        common = torch.randn(min(CHUNK, rows - start), WIDTH, generator=generator)
        for embeds in (texts, images):
            noise = NOISE * torch.randn(common.shape, generator=generator)
            embeds[start : start + CHUNK] = normalize(common + noise, dim=-1)
    return texts, images


def measure_retrieval(rows: int, threads: int, products_alone: bool) -> dict[str, Any]:
    """Return the seconds and the memory in MiB of one run, in this process."""
    torch.set_num_threads(threads)
    texts, images = make_embeds(rows)
    before, start = memory(), time.perf_counter()
    if products_alone:
        scores = torch.empty(CPU_BLOCK, CPU_BLOCK)
        for some_texts in texts.split(CPU_BLOCK):
            for some_images in images.split(CPU_BLOCK):
                torch.mm(some_texts, some_images.t(), out=scores.resize_(len(some_texts), len(some_images)))
        return {"products_alone_seconds": round(time.perf_counter() - start, 1)}
    recall = recall_at_k(texts, images)
    seconds = time.perf_counter() - start
    return {
        "rows": rows,
        "threads": threads,
        "seconds": round(seconds, 1),
        "peak_mib": round(memory()["VmHWM"] / MIB),
        "peak_beyond_the_embeddings_mib": round((memory()["VmHWM"] - before["VmRSS"]) / MIB),
        "embeddings_mib": round(2 * rows * WIDTH * 4 / MIB),
        "whole_matrix_mib": round(rows * rows * 4 / MIB),
        "recall": {name: round(value, 4) for name, value in recall.items()},
    }


def make_shards(folder: Path, count: int, stated: str) -> None:
    """Write shards of two pairs."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(file, "JPEG")
    for number in range(count):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as archive:
            for key in range(2):
                for extension, content in (("jpg", file.getvalue()), ("txt", b"a red square")):
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        if stated == "stats.json":
            (folder / f"{number:05d}_stats.json").write_text('{"successes": 2}')
    if stated == "sizes.json":
        (folder / stated).write_text(json.dumps({f"{number:05d}.tar": 2 for number in range(count)}))


def start_shards(folder: str, rank: int, world_size: int) -> dict[str, float]:
    """Return the seconds until the data set is made and until its first batch, in this process."""
    start = time.perf_counter()
    shards = ImageTextShards(folder, 8, shuffle_buffer=8, rank=rank, world_size=world_size)
    made = time.perf_counter() - start
    rows = iter(shards)
    for _ in range(8):
        next(rows)
    return {"made_seconds": round(made, 3), "first_batch_seconds": round(time.perf_counter() - start, 3)}


def start_together(folder: str, world_size: int) -> dict[str, float]:
    """Start processes at once; return the slowest's seconds."""
    found = run_children(__file__, [("start", folder, rank, world_size) for rank in range(world_size)])
    return {name: max(one[name] for one in found) for name in found[0]}


def measure_shards(counts: list[int]) -> list[dict[str, Any]]:
    """Return the seconds of each start."""
    rows = []
    for stated in STATED:
        for count in counts:
            with tempfile.TemporaryDirectory() as folder:
                make_shards(Path(folder), count, stated)
                if stated == "none":
                    time.sleep(3)  # What changed just now isn't kept.
                    found = {"counting_seconds": start_together(folder, 1)["made_seconds"]}
                else:
                    found = {}
                for world_size in (1, 2):
                    found[f"of_{world_size}"] = start_together(folder, world_size)
                rows.append({"shards": count, "sizes_stated_by": STATED[stated], **found})
    return rows


def main() -> None:
    """Measure, print and write the report; what isn't measured is kept from the last."""
    given = child_arguments()
    if given is not None:
        kind, *rest = given
        if kind == "start":
            tell_parent(start_shards(rest[0], int(rest[1]), int(rest[2])))
        else:
            tell_parent(measure_retrieval(int(rest[0]), int(rest[1]), kind == "products"))
        return
    parser = make_parser(__doc__, __file__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shards", type=int, nargs="+", default=[10, 1000, 5000])
    parser.add_argument("--part", choices=("retrieval", "shards"))
    args = parser.parse_args()
    report = json.loads(args.output.read_text()) if args.part and args.output.is_file() else {}
    report |= measured_on()
    if args.part != "shards":
        alone = run_child(__file__, "products", args.rows, args.threads)
        report["retrieval"] = run_child(__file__, "retrieval", args.rows, args.threads) | alone
    if args.part != "retrieval":
        report["shards"] = measure_shards(args.shards)
    write_report(args.output, report)
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
