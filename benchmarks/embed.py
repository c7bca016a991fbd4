"""Time `python -m diffclip_hf.embed` on one process and on two, beside the plain loop in one process.

python benchmarks/embed.py [--rounds 3] [--model embedded/diffclip-emoji] [--output benchmarks/embed.json]

What is embedded are JPEGs of 500×375 in tar shards. The plain loop opens a batch's pictures with Pillow, gives them to
the processor, and these to the model. Processes are started as `accelerate launch` starts them, with their share of
the cores; what is timed is the embedding and the writing, from the first process's beginning to the last one's end,
without imports and the loading of the model. A round runs each once; medians are compared.
"""

import io
import os
import socket
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import child_arguments, make_parser, measured_on, run_children, tell_parent, write_report
from PIL import Image
from reading import EMBEDDED, make_pictures
from transformers import AutoModel, AutoProcessor

from diffclip_hf import embed
from diffclip_hf.common.reading_ahead import usable_cores


SHARDS, BATCH = 4, 8


def write_shards(folder: Path, count: int) -> None:
    """Write so many pictures, of 64 different ones, to shards of equal size."""
    files = [Path(path).read_bytes() for path in make_pictures(folder, 500, 375, 64)]
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for number in range(shard * count // SHARDS, (shard + 1) * count // SHARDS):
                info = tarfile.TarInfo(f"{number:06}.jpg")
                info.size = len(files[number % 64])
                archive.addfile(info, io.BytesIO(files[number % 64]))


def clocks() -> tuple[float, float]:
    """Return the time, and the processors' time of this process and of those that it has waited for, in seconds."""
    return time.time(), sum(os.times()[:4])


def plain_loop(model_name: str, source: str) -> list[tuple[float, float]]:
    """Embed shards as one would by hand; return the clocks when it began and ended."""
    model, processor = AutoModel.from_pretrained(model_name).eval(), AutoProcessor.from_pretrained(model_name)
    start, found = clocks(), []
    for path in sorted(Path(source).glob("*.tar")):
        with tarfile.open(path) as archive:
            members = archive.getmembers()
            for first in range(0, len(members), BATCH):
                files = [archive.extractfile(member) for member in members[first : first + BATCH]]
                images = [Image.open(io.BytesIO(file.read())).convert("RGB") for file in files if file]
                with torch.no_grad():
                    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
                    embeds = model.get_image_features(pixels).pooler_output
                found.append(torch.nn.functional.normalize(embeds).half().numpy())
    np.save(Path(source) / "plain.npy", np.concatenate(found))
    return [start, clocks()]


def command(model_name: str, source: str, output: str) -> list[tuple[float, float]]:
    """Run the command; return the clocks when this process began and ended its parts."""
    times: list[tuple[float, float]] = []
    usual = embed._embed_own

    def timed(*args: Any) -> None:
        times.append(clocks())
        usual(*args)
        times.append(clocks())

    embed._embed_own = timed
    embed.run(embed.build_parser().parse_args([source, output, "--model", model_name, "--device", "cpu"]))
    return times


def child(rank: str, processes: str, port: str, threads: str, *arguments: str) -> list[tuple[float, float]]:
    """Be one of the processes; as launchers have it, each has its share of the cores."""
    torch.set_num_threads(max(1, int(threads) // int(processes)))
    if int(processes) > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ |= places | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return plain_loop(*arguments) if len(arguments) == 2 else command(*arguments)


def seconds(processes: int, *arguments: object) -> tuple[float, float]:
    """Return how long so many processes take together, and their processors' time."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    times = run_children(__file__, [(rank, processes, port, *arguments) for rank in range(processes)])
    wall = max(end[0] for _, end in times) - min(start[0] for start, _ in times)
    return wall, sum(end[1] - start[1] for start, end in times)


def measure(model: str, count: int, rounds: int, threads: int) -> dict[str, Any]:
    """Return pictures a second of each way, with so many threads of torch for all processes."""
    times: dict[str, list[tuple[float, float]]] = {"plain_loop": [], "one_process": [], "two_processes": []}
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), count)
        for number in range(rounds):
            with tempfile.TemporaryDirectory() as output:
                times["plain_loop"].append(seconds(1, threads, model, folder))
                times["one_process"].append(seconds(1, threads, model, folder, f"{output}/1"))
                times["two_processes"].append(seconds(2, threads, model, folder, f"{output}/2"))
                found, plain = (
                    np.concatenate([np.load(path) for path in sorted(paths)])
                    for paths in (Path(output, "2", "img_emb").glob("*.npy"), [Path(folder, "plain.npy")])
                )
            # The two read a JPEG by the same code; float16 rounds the rest away.
            difference = float(np.abs(found.astype("float32") - plain.astype("float32")).max())
            sys.stderr.write(f"round {number + 1}: {[kept[-1] for kept in times.values()]} s\n")
    walls, cores = ({name: [round(one[which], 2) for one in kept] for name, kept in times.items()} for which in (0, 1))
    rates, of_cores = (
        {name: round(count / statistics.median(kept), 1) for name, kept in taken.items()} for taken in (walls, cores)
    )
    return {
        "model": model,
        "pictures": count,
        "shards": SHARDS,
        "batch_size": BATCH,
        "rounds": rounds,
        "usable_cores": usable_cores(),
        "threads": threads,
        "pictures_per_second": rates,
        "times_plain_loop": {name: round(rates[name] / rates["plain_loop"], 2) for name in rates},
        # Of which other work on the machine takes nothing.
        "pictures_per_second_of_a_core": of_cores,
        "seconds": walls,
        "seconds_of_cores": cores,
        "largest_difference": difference,
        **measured_on(packages=("pillow", "numpy", "torchvision", "accelerate")),
    }


def main() -> int:
    """Run the measurement and write it."""
    parser = make_parser(__doc__, __file__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of torch, which processes share")
    parser.add_argument("--model", default=str(EMBEDDED))
    args = parser.parse_args()
    result = measure(args.model, args.pictures, args.rounds, args.threads)
    write_report(args.output, result)
    sys.stdout.write(f"pictures a second: {result['pictures_per_second']}\n")
    return 0


if __name__ == "__main__":
    arguments = child_arguments()
    if arguments is None:
        sys.exit(main())
    tell_parent(child(*arguments))
