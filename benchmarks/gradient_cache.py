"""Measure the memory and the time of a contrastive step in chunks (GradCache) at ViT-B/16.

python benchmarks/gradient_cache.py [--batches 8 16 32] [--chunk 4] [--output benchmarks/gradient_cache.json]

Each batch is trained whole and in chunks, forward, loss and backward without an optimizer, in a process of its own;
the memory is that of the process at its highest, less what it was with the model and the batch in memory. The weights
and the inputs are random, in float32.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from memory import memory
from tqdm import tqdm

from diffclip_hf import DiffCLIPConfig, DiffCLIPModel
from diffclip_hf.common.machine import describe_machine, describe_versions
from diffclip_hf.training.gradient_cache import backward_in_chunks


MIB = 2**20
RUNS = 3


def run_child(batch: int, chunk: int) -> None:
    """Run steps in this process, and write its memory and times to stdout; a chunk of 0 is the whole batch."""
    torch.manual_seed(0)
    model = DiffCLIPModel(DiffCLIPConfig()).train()
    input_ids = torch.randint(1, 49000, (batch, 77))
    input_ids[:, 0], input_ids[:, -1] = 49406, 49407
    inputs = {"input_ids": input_ids, "pixel_values": torch.randn(batch, 3, 224, 224)}
    # Gradients are as large as the weights either way.
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = memory()["VmRSS"]
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        if chunk:
            no_sync = contextlib.nullcontext
            backward_in_chunks(model, lambda: model.logit_scale, inputs, chunk, torch.Tensor.backward, no_sync)
        else:
            model(**inputs, return_loss=True).loss.backward()
        times.append(time.perf_counter() - start)
    found = {"bytes": memory()["VmHWM"] - before, "seconds": round(statistics.median(times), 2)}
    sys.stdout.write(json.dumps(found) + "\n")


def main() -> None:
    """Run the measurement."""
    if sys.argv[1:2] == ["--child"]:
        run_child(*map(int, sys.argv[2:]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 16, 32])
    parser.add_argument("--chunk", type=int, default=4)
    parser.add_argument("--output", default=str(Path(__file__).with_suffix(".json")), metavar="FILE.json")
    args = parser.parse_args()
    results = []
    for batch in tqdm(args.batches, unit="batch"):
        for chunk in (0, args.chunk):
            command = [sys.executable, __file__, "--child", str(batch), str(chunk)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results.append({"batch": batch, "chunk": chunk or None, **json.loads(done.stdout.splitlines()[-1])})
    described = {"machine": describe_machine(), "versions": describe_versions(), "dtype": "float32"}
    Path(args.output).write_text(json.dumps({**described, "results": results}, indent=2) + "\n")
    for result in results:
        how = f"in chunks of {result['chunk']}" if result["chunk"] else "whole"
        sys.stdout.write(f"batch {result['batch']} {how}: {result['bytes'] / MIB:.0f} MiB, {result['seconds']} s\n")


if __name__ == "__main__":
    main()
