"""Faults that lose no weights: what isn't finite stops the run, and a checkpoint is written whole or not at all."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .checkpoints import is_complete, last_checkpoint
from .weights import all_finite


class Guard:
    """Watches over a trainer's weights and checkpoints.

    Args:
        trainer: The `DiffCLIPTrainer`.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.last_saved_step: int | None = None

    @property
    def step(self) -> int:
        """How many updates the weights have had."""
        return self.trainer.state.global_step

    def in_every_process(self, holds: torch.Tensor) -> bool:
        """Say whether something, bool without dimensions, holds in all processes, so that all of them do the same."""
        holds = holds.to(self.trainer.args.device, torch.float32).reshape(1)
        return bool(self.trainer.accelerator.gather(holds).min() > 0)

    def stop(self, what: str) -> NoReturn:
        """Save the weights as they were before this step, and raise a FloatingPointError."""
        raise FloatingPointError(
            f"The {what} isn't finite in step {self.step + 1}, at a learning rate of "
            f"{self.trainer.lr_scheduler.get_last_lr()[0]:.3g}. "
            f"{self._save_last_good_state()} Try a lower learning rate, a longer warm-up or a smaller max_grad_norm; "
            "bf16=True rather than fp16=True; and look for broken values in this step's batch."
        )

    def _save_last_good_state(self) -> str:
        """Write a checkpoint of the present step if there's something to save; say where training can go on."""
        if self.step == 0:
            return "Nothing was trained before."
        if not self.in_every_process(all_finite(self.trainer.model)):
            return f"The weights weren't finite before it either; {self._last_checkpoint()}."
        if self.last_saved_step != self.step:
            self.trainer._save_checkpoint(self.trainer.model_wrapped, trial=None)
        return f"The weights before it are in {self._folder()}, from which training can be resumed."

    def _last_checkpoint(self) -> str:
        return f"the last complete checkpoint is {last_checkpoint(self.trainer._get_output_dir(None))}"

    def _folder(self, trial: Any = None) -> Path:
        return Path(self.trainer._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.step}")

    def save(self, write: Callable[[], None], trial: Any) -> None:
        """Write a checkpoint whole or not at all, and none of weights that aren't finite.

        Args:
            write: Writes it.
            trial: As in `Trainer._save_checkpoint`.

        Raises:
            FloatingPointError: A weight isn't finite.
            OSError: It can't be written; what there was of it is removed.
        """
        if not self.in_every_process(all_finite(self.trainer.model)):
            raise FloatingPointError(
                f"A weight isn't finite after step {self.step}, which isn't saved; {self._last_checkpoint()}."
            )
        folder = self._folder(trial)
        if self.trainer.args.should_save:
            # An earlier run's would make a half-written checkpoint look complete.
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        try:
            write()
        except Exception as error:
            if is_complete(folder):
                raise  # By what follows the writing, such as pushing it to the Hub.
            # What can't be removed is incomplete, so that resuming passes it over.
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"The checkpoint {folder} can't be written: {error}. It was removed; {self._last_checkpoint()}."
            ) from error
        self.last_saved_step = self.step


__all__ = ["Guard"]
