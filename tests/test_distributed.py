"""Loss, gradients, training and evaluation in several processes (gloo) against one process with the whole batch."""

import contextlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import launch
from tiny import tiny_inputs, tiny_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from diffclip_hf.gradient_cache import backward_in_chunks


PAIRS = 8
SPLITS = {2: [[4, 4], [5, 3], [8, 0]], 4: [[2, 2, 2, 2], [3, 0, 4, 1]]}
TOLERANCE = 1e-6  # 2.3e-7, for what is float32 in a float64 model: the norms and λ


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = TOLERANCE):
    """Compare relative to each tensor's largest magnitude; one that is all but zero, to the largest of all."""
    largest = max(tensor.abs().max() for tensor in expected.values())
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (actual[name] - tensor).abs().max() / max(tensor.abs().max(), 1e-3 * largest)
        assert error <= tolerance, f"{name}: {error:.1e}"


def rows_of(inputs: dict[str, torch.Tensor], split: list[int]) -> dict[str, torch.Tensor]:
    start = sum(split[: dist.get_rank()])
    return {name: value[start : start + split[dist.get_rank()]] for name, value in inputs.items()}


def plain(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    loss = model(**inputs, return_loss=True).loss
    loss.backward()
    return loss.detach()


def chunked(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """In chunks of 2, so that processes with different numbers of rows need different numbers of them."""
    core = getattr(model, "module", model)
    no_sync = getattr(model, "no_sync", contextlib.nullcontext)
    return backward_in_chunks(model, lambda: core.logit_scale, inputs, 2, torch.Tensor.backward, no_sync)


def checkpointed(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    getattr(model, "module", model).gradient_checkpointing_enable()
    return plain(model, inputs)


def checkpointed_in_chunks(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    getattr(model, "module", model).gradient_checkpointing_enable()
    return chunked(model, inputs)


WAYS = (plain, chunked, checkpointed, checkpointed_in_chunks)


def whole_batch() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return tiny_model().double().train(), tiny_inputs(PAIRS, PAIRS, length=12)


def losses_and_gradients(folder: Path) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """Each split and way's local loss and averaged gradients; two steps, the second after reducers are rebuilt."""
    results = []
    for split in SPLITS[dist.get_world_size()]:
        for way in WAYS:
            model, inputs = whole_batch()
            # As Trainer wraps it, and as it does by default with stock arguments.
            wrapped = DistributedDataParallel(model, find_unused_parameters=way is plain)
            for _ in range(2):
                model.zero_grad()
                loss = way(wrapped, rows_of(inputs, split))
            results.append((loss.item(), gradients(model)))
    return results


@pytest.mark.parametrize("world_size", [2, 4])
def test_loss_and_every_gradient_are_those_of_the_whole_batch(world_size, tmp_path):
    model, inputs = whole_batch()
    expected = plain(model, inputs).item()
    processes = launch(losses_and_gradients, world_size, tmp_path / "run")
    for case in zip(*processes, strict=True):
        assert sum(loss for loss, _ in case) / world_size == pytest.approx(expected, rel=TOLERANCE)
        for _, grads in case:
            assert_same(grads, gradients(model))
