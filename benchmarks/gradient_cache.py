"""Measure the memory and the time of a contrastive step in chunks (GradCache) at ViT-B/16.

python benchmarks/gradient_cache.py [--batches 8 16 32] [--chunk 4] [--output benchmarks/gradient_cache.json]

Each batch is trained whole and in chunks, forward, loss and backward without an optimizer, in a process of its own;
the memory is that of the process at its highest, less what it was with the model and the batch in memory. The weights
and the inputs are random, in float32.
"""

import contextlib
import statistics
import sys
import time

import torch
from measuring import (
    MIB,
    child_arguments,
    make_parser,
    measured_on,
    memory,
    random_inputs,
    run_child,
    tell_parent,
    write_report,
)
from tqdm import tqdm

from diffclip_hf import DiffCLIPConfig, DiffCLIPModel
from diffclip_hf.training.gradient_cache import backward_in_chunks


RUNS = 3


def step(batch: int, chunk: int) -> None:
    """Run steps in this process, and tell its memory and time; a chunk of 0 is the whole batch."""
    torch.manual_seed(0)
    model = DiffCLIPModel(DiffCLIPConfig()).train()
    inputs = random_inputs(batch)
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
    tell_parent({"bytes": memory()["VmHWM"] - before, "seconds": round(statistics.median(times), 2)})


def main() -> None:
    """Run the measurement."""
    if (given := child_arguments()) is not None:
        step(*map(int, given))
        return
    parser = make_parser(__doc__, __file__)
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 16, 32])
    parser.add_argument("--chunk", type=int, default=4)
    args = parser.parse_args()
    results = []
    for batch in tqdm(args.batches, unit="batch"):
        for chunk in (0, args.chunk):
            results.append({"batch": batch, "chunk": chunk or None, **run_child(__file__, batch, chunk)})
    write_report(args.output, {**measured_on(), "results": results})
    for result in results:
        how = f"in chunks of {result['chunk']}" if result["chunk"] else "whole"
        sys.stdout.write(f"batch {result['batch']} {how}: {result['bytes'] / MIB:.0f} MiB, {result['seconds']} s\n")


if __name__ == "__main__":
    main()
