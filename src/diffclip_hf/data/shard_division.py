"""Dividing an epoch of tar shards among processes and DataLoader workers, and its random order."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Part:
    """Samples `start` up to `stop` of the shard of a number."""

    shard: int
    start: int
    stop: int


def process_place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return this process's number and how many there are.

    Raises:
        ValueError: Only one of the two is given, they don't fit, or the process group isn't there yet.
    """
    if (rank is None) != (world_size is None):
        raise ValueError(f"rank is {rank} and world_size is {world_size}; give both or neither.")
    if rank is not None and world_size is not None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; with world_size={world_size} it must be in 0..{world_size - 1}.")
        return rank, world_size
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but torch.distributed isn't initialised, so the shards can't "
            "be divided among the processes; make the TrainingArguments or the Accelerator first, or pass rank and "
            "world_size."
        )
    return 0, 1


def worker_batches(batches: int, worker: int, workers: int) -> tuple[int, int]:
    """Return the first batch of a DataLoader worker, which take turns, and the one after its last."""
    each, more = divmod(batches, workers)
    first, last = (number * each + min(number, more) for number in (worker, worker + 1))
    return first, last


def process_range(samples: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the first of a process's samples of an epoch, and the one after its last."""
    return samples * rank // world_size, samples * (rank + 1) // world_size


def parts_of_range(sizes: np.ndarray, order: np.ndarray, start: int, stop: int) -> list[Part]:
    """List the parts of shards that samples `start` up to `stop` are, the shards being in an order."""
    parts = []
    for number, end in zip(order.tolist(), np.cumsum(sizes[order]).tolist(), strict=True):
        begin = end - int(sizes[number])
        if max(start, begin) < min(stop, end):
            parts.append(Part(number, max(start, begin) - begin, min(stop, end) - begin))
    return parts


def shuffled(samples: Iterator[dict], size: int, generator: np.random.Generator) -> Iterator[dict]:
    """Yield the samples in a random order, of which `size` at a time are kept to draw from; as they come for 0."""
    if not size:
        yield from samples
        return
    kept: list[dict] = []
    for sample in samples:
        if len(kept) < size:
            kept.append(sample)
            continue
        place = int(generator.integers(size))
        yield kept[place]
        kept[place] = sample
    for place in generator.permutation(len(kept)):
        yield kept[place]


__all__ = ["Part", "parts_of_range", "process_place", "process_range", "shuffled", "worker_batches"]
