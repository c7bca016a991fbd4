"""What the trainer does where only callbacks are called: as epochs begin and end, and around each update."""

import logging
import math
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from .data_pass import DataPass
from .weights import clamp_logit_scale, contrastive_model


logger = logging.getLogger(__name__)


class TrainingMoments(TrainerCallback):
    """Tells data the epoch, judges what it drops, passes over steps without rows, and bounds the logit scale."""

    def __init__(self, collator: Any):
        self.collator = collator
        self.streams_begun = 0
        self.training_pass: DataPass | None = None
        self.rows_of_step = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.streams_begun = 0
        self.training_pass = None

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if has_length(train_dataloader):
            updates_per_epoch = max(1, math.ceil(len(train_dataloader) / args.gradient_accumulation_steps))
            epoch, updates = divmod(state.global_step, updates_per_epoch)
        else:  # Of a stream of unknown length Transformers counts one endless epoch.
            epoch, updates = self.streams_begun, state.global_step if self.streams_begun == 0 else 0
            self.streams_begun += 1
        for part in (train_dataloader.dataset, train_dataloader.batch_sampler, self.collator):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        if hasattr(train_dataloader.dataset, "set_position"):
            skipped = 0 if args.ignore_data_skip else updates * args.gradient_accumulation_steps
            train_dataloader.dataset.set_position(epoch, skipped)
        if self.training_pass is None:
            rows = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
            self.training_pass = DataPass(train_dataloader.dataset, self.collator, state.global_step * rows)
        else:
            self.training_pass.begin()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.training_pass.end(f"epoch {state.epoch:g}")

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self.rows_of_step == 0:
            logger.warning("Nothing is left of the batch of step %d, which changes no weights.", state.global_step + 1)
            if getattr(optimizer, "scaler", None) is not None and not args.max_grad_norm:
                # Else it has been done for the norm; the scaler wants it before each step.
                optimizer.scaler.unscale_(optimizer.optimizer)
            # Zeros would let momentum and weight decay change them.
            for parameter in model.parameters():
                parameter.grad = None
        self.rows_of_step = 0

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if contrastive_model(model) is not None:
            clamp_logit_scale(model)


__all__ = ["TrainingMoments"]
