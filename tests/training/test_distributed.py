"""Loss, gradients, training and evaluation in several processes (gloo) against one process with the whole batch."""

import contextlib
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import TOLERANCE, assert_same, gradients, launch
from pairs import Pairs, Stream, arguments, collate, stream_collate, zero_shot_parts
from safetensors.torch import load_file
from tiny import tiny_inputs, tiny_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from diffclip_hf.training import DiffCLIPTrainer, DiffCLIPTrainingArguments
from diffclip_hf.training.gradient_cache import backward_in_chunks


PAIRS = 8
SPLITS = {2: [[4, 4], [5, 3], [8, 0]], 4: [[2, 2, 2, 2], [3, 0, 4, 1]]}


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


# --- The Trainers ---------------------------------------------------------------------------------------------------


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def run_trainer(folder: Path, cls: type = DiffCLIPTrainer, resume: bool | None = None, **kwargs) -> dict:
    """Train for two steps of 8 pairs altogether and evaluate; return what can be compared."""
    names = {"train_dataset", "eval_dataset", "data_collator", "zero_shot", "processing_class", "teacher"}
    parts = {"train_dataset": Pairs(), "eval_dataset": Pairs(11), "data_collator": collate}
    model = kwargs.pop("model", None) or tiny_model()
    parts |= {key: kwargs.pop(key) for key in names & kwargs.keys()}
    sizes = {f"per_device_{kind}_batch_size": 8 // world_size() for kind in ("train", "eval")}
    kind = DiffCLIPTrainingArguments if cls is DiffCLIPTrainer else TrainingArguments
    args = arguments(folder, kind, **sizes | kwargs)
    run = cls(model, args, **parts)
    run.train(resume_from_checkpoint=resume)
    metrics = {} if cls is Trainer else run.evaluate()
    run.save_model()
    run.accelerator.wait_for_everyone()
    return {
        "logs": [log for log in run.state.log_history if "loss" in log],
        "metrics": {key: value for key, value in metrics.items() if "recall" in key or "zero" in key or "loss" in key},
        "weights": load_file(folder / "model.safetensors"),
        "steps": run.state.global_step,
    }


def collate_in_the_first(rows: list[dict]) -> dict[str, torch.Tensor]:
    if dist.is_initialized() and dist.get_rank() == 1:
        raise KeyError("pixel_values")
    return collate(rows)


def faults(folder: Path) -> list[str]:
    """What training and evaluation raise where only the second process can't make its batches."""
    found = []
    for name in ("train", "evaluate"):
        parts = {"train_dataset": Pairs(), "eval_dataset": Pairs(11), "data_collator": collate_in_the_first}
        run = DiffCLIPTrainer(tiny_model(), arguments(folder / name), **parts)
        try:
            getattr(run, name)()
        except (ValueError, KeyError) as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def trained(folder: Path) -> dict[str, dict]:
    parts = zero_shot_parts()
    rank = dist.get_rank() if dist.is_initialized() else 0
    stream = {"data_collator": stream_collate, "train_dataset": Stream(24, world_size(), rank)}
    return {
        "stock": run_trainer(folder / "stock", Trainer),
        "ours": run_trainer(folder / "ours"),
        "chunks": run_trainer(folder / "chunks", contrastive_chunk_size=3, gradient_accumulation_steps=2),
        "checkpointing": run_trainer(folder / "checkpointing", gradient_checkpointing=True, contrastive_chunk_size=2),
        "zero-shot": run_trainer(folder / "zero-shot", max_steps=1, **parts),
        "stream": run_trainer(folder / "stream", max_steps=-1, num_train_epochs=2, **stream),
        # Batches of 8 and 3, the last in chunks of different numbers of rows.
        "uneven": run_trainer(
            folder / "uneven",
            train_dataset=Pairs(11),
            max_steps=-1,
            num_train_epochs=2,
            contrastive_chunk_size=1,
        ),
        "locked": run_trainer(folder / "locked", lock="text", layer_decay=0.5),
        "locked in chunks": run_trainer(folder / "locked-chunks", lock="image", contrastive_chunk_size=3),
        "taught": run_trainer(folder / "taught", teacher=tiny_model(seed=1)),
        # Batches of 8 and of 3 rows, for a teacher with embeddings of another width.
        "taught in chunks": run_trainer(
            folder / "taught-chunks",
            train_dataset=Pairs(11),
            teacher=tiny_model(seed=1, projection_dim=16),
            contrastive_chunk_size=1,
        ),
        "faults": faults(folder / "faults") if world_size() > 1 else [],
    }


# FSDP has an activation checkpointing of its own.
CHECKPOINTED = {"activation_checkpointing": True}
SHARDED = {
    "default": {},
    "chunks": {"contrastive_chunk_size": 3},
    "checkpointing": {"contrastive_chunk_size": 2},
    "locked": {"lock": "image", "layer_decay": 0.5, "optim": "adamw_torch", "adam_epsilon": 0.1},
    "taught": {"teacher": 1},
}


def sharded(folder: Path) -> dict[str, dict]:
    """In one process without FSDP2, which needs several."""
    results = {}
    for name, kwargs in SHARDED.items():
        kwargs = {key: tiny_model(value) if key == "teacher" else value for key, value in kwargs.items()}
        if world_size() > 1:
            config = {"transformer_layer_cls_to_wrap": ["DiffCLIPEncoderLayer"]}
            kwargs = kwargs | {"fsdp": True, "fsdp_config": config | (CHECKPOINTED if name == "checkpointing" else {})}
        results[name] = run_trainer(folder / name, **kwargs, save_strategy="steps", save_steps=1)
        if dist.is_initialized():
            # The second step again, from the checkpoint after the first.
            if dist.get_rank() == 0:
                shutil.rmtree(folder / name / "checkpoint-2")
            dist.barrier()
            results[f"{name}, resumed"] = run_trainer(folder / name, resume=True, **kwargs)
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[dict, list[dict]]:
    """What one process has of the whole batch, and each of two of half of it."""
    folder = tmp_path_factory.mktemp("trainers")
    return launch(trained, 1, folder / "one")[0], launch(trained, 2, folder / "two")


@pytest.fixture(scope="module")
def sharded_runs(tmp_path_factory) -> tuple[dict, list[dict]]:
    folder = tmp_path_factory.mktemp("sharded")
    return launch(sharded, 1, folder / "one")[0], launch(sharded, 2, folder / "two")


def test_a_fault_of_one_process_is_raised_in_all(runs):
    first, second = (process["faults"] for process in runs[1])
    assert second == ["KeyError: 'pixel_values'"] * 2
    assert first == ["ValueError: Process 1 of 2 can't make its next batch: KeyError: 'pixel_values'"] * 2


def assert_same_run(actual: dict, expected: dict) -> None:
    assert actual["steps"] == expected["steps"]
    for log, other in zip(actual["logs"], expected["logs"], strict=True):
        assert log == pytest.approx(other, rel=TOLERANCE)
    assert actual["metrics"] == pytest.approx(expected["metrics"], rel=TOLERANCE)
    assert {name: tensor.shape for name, tensor in actual["weights"].items()} == {
        name: tensor.shape for name, tensor in expected["weights"].items()
    }
    assert_same(actual["weights"], expected["weights"])


RUNS = ("stock", "ours", "chunks", "checkpointing", "zero-shot", "stream", "uneven")
RUNS += ("locked", "locked in chunks", "taught", "taught in chunks")


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_and_evaluate_as_one_does(name, runs):
    one = runs[0][name]
    assert one["steps"] == {"zero-shot": 1, "stream": 6, "uneven": 4}.get(name, 2)
    assert one["metrics"].keys() >= (set() if name == "stock" else {"eval_loss", "eval_text_to_image_recall@5"})
    assert ("eval_zero_shot_accuracy" in one["metrics"]) == (name == "zero-shot")
    for process in runs[1]:
        assert_same_run(process[name], one)


@pytest.mark.parametrize("name", SHARDED)
def test_fsdp2_trains_evaluates_and_resumes_as_one_process_does(name, sharded_runs):
    for process in sharded_runs[1]:
        assert_same_run(process[name], sharded_runs[0][name])
        assert_same_run(process[f"{name}, resumed"], sharded_runs[0][name])
