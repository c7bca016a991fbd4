"""Run a function in several processes, joined by gloo on this machine."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from measuring import measured
from torch import nn


TOLERANCE = 1e-6  # 9.6e-14, in float64
TIMEOUT = 3600  # seconds, after which processes that wait for each other for ever are ended
# Imported once, for all processes that are forked from there.
multiprocessing.set_forkserver_preload(["torch", "transformers", "accelerate", "diffclip_hf.training.trainer"])


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], floor: float = 1e-3) -> None:
    """Compare relative to each tensor's largest magnitude, or to `floor` of the largest of all where that is more."""
    largest = max(tensor.abs().max() for tensor in expected.values())
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (actual[name] - tensor).abs().max() / max(tensor.abs().max(), floor * largest)
        assert error <= TOLERANCE, f"{name}: {error:.1e}"


def _process(rank: int, function: Callable, world_size: int, folder: Path, arguments: tuple) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        # What a launcher sets, but for a port: a file is where they meet.
        size = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
        os.environ |= size | {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    with measured():
        result = function(folder, *arguments)
    torch.save(result, folder / f"result-{rank}.pt")
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


def launch(function: Callable, world_size: int, folder: Path, *arguments: Any) -> list[Any]:
    """Return what `function(folder, *arguments)`, of a module, returns in each process, by rank."""
    folder.mkdir(parents=True)
    processes = torch.multiprocessing.start_processes(
        _process, (function, world_size, folder, arguments), world_size, join=False, start_method="forkserver"
    )
    if not processes.join(timeout=TIMEOUT):
        # One has ended, or none has in time; wait for the others.
        for _ in range(world_size):
            if processes.join(timeout=TIMEOUT):
                break
        else:
            for process in processes.processes:
                process.kill()
            raise TimeoutError(f"The processes didn't end in {TIMEOUT} s.")
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(world_size)]
