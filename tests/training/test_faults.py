"""Losses that aren't finite, full disks and killed processes lose no training."""

import contextlib
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import assert_same, launch
from pairs import Pairs, arguments, collate
from tiny import tiny_model
from torch.multiprocessing import ProcessExitedException
from transformers import TrainerCallback

from diffclip_hf.training import DiffCLIPTrainer
from diffclip_hf.training.checkpoints import is_complete, last_checkpoint


TOLERANCE = 1e-6
# Two epochs of six batches, with what a resumed run has to bring back: moments, a schedule, an order and dropout.
STEPS = 12
RECIPE = {
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 3,
    "per_device_train_batch_size": 4,
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": 4,
}


def trainer(folder: Path, model: torch.nn.Module | None = None, **kwargs) -> DiffCLIPTrainer:
    parts = {"train_dataset": kwargs.pop("train_dataset", Pairs()), "callbacks": kwargs.pop("callbacks", [])}
    if model is None:
        # In float64: sums in float32 depend on the number of threads, of which a killed process had one, and AdamW,
        # which divides a gradient by its own size, makes large what should be 0.
        model = tiny_model(vision={"attention_dropout": 0.2}, text={"attention_dropout": 0.2}).double()
    return DiffCLIPTrainer(model, arguments(folder, **RECIPE | kwargs), data_collator=collate, **parts)


def losses(run: DiffCLIPTrainer) -> list[float]:
    return [log["loss"] for log in run.state.log_history if "loss" in log]


def weights(run: DiffCLIPTrainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in run.model.named_parameters()}


def checkpoints(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith("checkpoint")}


class At(TrainerCallback):
    """Calls a function with the model at the beginning of a step, counted from 1."""

    def __init__(self, step: int, function):
        self.step, self.function = step, function

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            self.function(model)


class StopAfter(TrainerCallback):
    """Ends training after a step, as if it were the last."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


# --- What isn't finite ----------------------------------------------------------------------------------------------


def spoil_input(model: torch.nn.Module) -> None:
    """Make the next images NaN, as a broken file would."""

    def hook(module, args, kwargs):
        handle.remove()
        return args, kwargs | {"pixel_values": kwargs["pixel_values"] * torch.nan}

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)


def spoil_gradient(model: torch.nn.Module) -> None:
    model.text_projection.weight.register_hook(lambda gradient: gradient * torch.inf)


@pytest.mark.parametrize(("spoil", "what"), [(spoil_input, "loss"), (spoil_gradient, "gradient")])
def test_what_is_not_finite_stops_before_the_weights(spoil, what, tmp_path):
    run = trainer(tmp_path, callbacks=[At(7, spoil)])
    with pytest.raises(FloatingPointError) as raised:
        run.train()
    message = str(raised.value)
    assert f"The {what} isn't finite in step 7, at a learning rate of" in message
    assert "Try a lower learning rate" in message
    assert str(tmp_path / "checkpoint-6") in message
    assert checkpoints(tmp_path) == {"checkpoint-4", "checkpoint-6"}

    short = trainer(tmp_path / "short", save_strategy="no", callbacks=[StopAfter(6)])
    short.train()
    assert_same(weights(run), weights(short))

    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS
    assert losses(resumed)[:6] == pytest.approx(losses(short), rel=TOLERANCE)


def test_at_the_first_step_there_is_nothing_to_save(tmp_path):
    with pytest.raises(FloatingPointError, match=r"step 1.*Nothing was trained before"):
        trainer(tmp_path, callbacks=[At(1, spoil_input)]).train()
    assert checkpoints(tmp_path) == set()


def break_weights(model: torch.nn.Module) -> None:
    with torch.no_grad():
        model.text_projection.weight.mul_(torch.nan)


def test_weights_that_broke_before_are_not_saved(tmp_path):
    with pytest.raises(FloatingPointError, match=r"weren't finite before it either; .* is .*checkpoint-4"):
        trainer(tmp_path, callbacks=[At(7, break_weights)]).train()
    assert checkpoints(tmp_path) == {"checkpoint-4"}


class BreakWeights(TrainerCallback):
    """Makes weights NaN in the optimizer's eighth step."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == 8:
            break_weights(model)


def test_no_checkpoint_holds_weights_that_are_not_finite(tmp_path):
    with pytest.raises(FloatingPointError, match=r"A weight isn't finite after step 8, .* is .*checkpoint-4"):
        trainer(tmp_path, callbacks=[BreakWeights()]).train()
    assert checkpoints(tmp_path) == {"checkpoint-4"}


def spoil_one_process(folder: Path) -> str:
    callbacks = [At(3, spoil_input)] if dist.get_rank() == 1 else []
    run = trainer(folder / "run", callbacks=callbacks, per_device_train_batch_size=2)
    try:
        run.train()
    except FloatingPointError as error:
        return str(error)
    return "no error"


def test_every_process_stops_where_one_has_a_loss_that_is_not_finite(tmp_path):
    messages = launch(spoil_one_process, 2, tmp_path / "two")
    assert all("The loss isn't finite in step 3" in message for message in messages)
    assert last_checkpoint(tmp_path / "two" / "run") == str(tmp_path / "two" / "run" / "checkpoint-2")


# --- Disks ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def files_of_at_most(size: int):
    """Make every larger file fail to be written, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("fails", ["weights", "optimizer"])
def test_a_full_disk_leaves_the_previous_checkpoint(fails, tmp_path):
    unbroken = trainer(tmp_path / "unbroken", save_strategy="no")
    unbroken.train()
    # AdamW's two moments are twice the size of the weights.
    size = {"weights": 0.5, "optimizer": 1.5}[fails] * sum(tensor.nbytes for tensor in weights(unbroken).values())
    run = trainer(tmp_path / "run", save_total_limit=1)
    run.add_callback(At(5, lambda _: limits.enter_context(files_of_at_most(int(size)))))
    with contextlib.ExitStack() as limits, pytest.raises(OSError, match=r"can't be written") as raised:
        run.train()
    assert str(tmp_path / "run" / "checkpoint-8") in str(raised.value)
    assert f"the last complete checkpoint is {tmp_path / 'run' / 'checkpoint-4'}" in str(raised.value)
    assert checkpoints(tmp_path / "run") == {"checkpoint-4"}

    resumed = trainer(tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == pytest.approx(losses(unbroken), rel=TOLERANCE)


def test_an_error_after_the_writing_keeps_the_checkpoint(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no network")

    monkeypatch.setattr("transformers.trainer.rotate_checkpoints", fail)
    with pytest.raises(RuntimeError, match="no network"):
        trainer(tmp_path).train()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


# --- Killed processes -----------------------------------------------------------------------------------------------


def kill(*args) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_run(folder: Path, output: Path, when: str) -> None:
    run = trainer(output)
    if when == "in a step":
        run.add_callback(At(10, kill))
    else:
        run.add_callback(At(5, lambda _: setattr(run, "_save_optimizer_and_scheduler", kill)))
    run.train()


@pytest.mark.parametrize(("when", "last"), [("in a step", "checkpoint-8"), ("in a checkpoint", "checkpoint-4")])
def test_a_killed_run_resumes_as_if_unbroken(when, last, tmp_path):
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        launch(killed_run, 1, tmp_path / "killed", tmp_path / "run", when)
    assert checkpoints(tmp_path / "run") == {"checkpoint-4", "checkpoint-8"}
    assert last_checkpoint(tmp_path / "run") == str(tmp_path / "run" / last)

    unbroken, resumed = trainer(tmp_path / "unbroken"), trainer(tmp_path / "run")
    unbroken.train()
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == pytest.approx(losses(unbroken), rel=TOLERANCE)
    assert_same(weights(resumed), weights(unbroken))


# --- Which checkpoint is complete -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    trainer(folder, max_steps=4).train()
    return folder / "checkpoint-4"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_the_newest_by_number_is_taken(written, tmp_path):
    for step in (9, 10):
        shutil.copytree(written, tmp_path / f"checkpoint-{step}")
    shutil.copytree(written, tmp_path / "checkpoint-11-old")
    (tmp_path / "checkpoint-12").write_text("not a folder")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert last_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize("name", ["trainer_state.json", "model.safetensors", "optimizer.pt", "rng_state.pth"])
def test_a_half_written_file_makes_it_incomplete(name, written, tmp_path, caplog):
    shutil.copytree(written, tmp_path / "checkpoint-4")
    shutil.copytree(written, tmp_path / "checkpoint-8")
    assert is_complete(tmp_path / "checkpoint-8")
    cut(tmp_path / "checkpoint-8" / name)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert f"{tmp_path / 'checkpoint-8'} is incomplete" in caplog.text


@pytest.mark.parametrize("name", ["trainer_state.json", "model.safetensors"])
def test_a_missing_file_makes_it_incomplete(name, written, tmp_path):
    shutil.copytree(written, tmp_path / "checkpoint-8")
    (tmp_path / "checkpoint-8" / name).unlink()
    assert last_checkpoint(tmp_path) is None


def test_every_shard_has_to_be_there(written, tmp_path):
    folder = tmp_path / "checkpoint-8"
    shutil.copytree(written, folder)
    (folder / "model.safetensors").unlink()
    tiny_model().save_pretrained(folder, max_shard_size="60KB")
    assert is_complete(folder)
    next(folder.glob("model-*.safetensors")).unlink()
    assert not is_complete(folder)


def test_another_runs_checkpoint_isnt_resumed(tmp_path, caplog):
    """Of another model, another optimizer, or without the optimizer's state, of which a warning tells."""
    trainer(tmp_path, max_steps=1, save_steps=1).train()
    saved = tmp_path / "checkpoint-1"
    again = {"max_steps": 2, "save_strategy": "no"}
    for changes, words in (
        ({"model": tiny_model(text={"num_hidden_layers": 4})}, r"lacks this model's weights: text_model\.encoder"),
        ({"model": tiny_model(text={"intermediate_size": 64})}, "aren't this model's: .*size mismatch"),
        ({"optim": "sgd"}, "it has no dampening, momentum; resume with the same optim"),
    ):
        with pytest.raises(ValueError, match=words):
            trainer(tmp_path / "other", **changes, **again).train(resume_from_checkpoint=str(saved))
    frozen = tiny_model()
    frozen.logit_scale.requires_grad_(False)
    with pytest.raises(ValueError, match=r"is another run's: .*parameter group"):
        trainer(tmp_path / "other", model=frozen, **again).train(resume_from_checkpoint=str(saved))
    (saved / "optimizer.pt").unlink()
    trainer(tmp_path / "other", **again).train(resume_from_checkpoint=str(saved))
    assert "has no optimizer's state, which starts anew" in caplog.text
