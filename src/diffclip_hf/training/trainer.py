"""Transformers' Trainer for contrastive training: whole batches, retrieval metrics and faults that lose no weights."""

import logging
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, has_length
from transformers.utils import CONFIG_NAME

from ..common.remote_code import add_remote_code
from ..model.image_fetching_diffclip import one_line
from ..model.loss_diffclip import image_text_contrastive_loss
from ..zero_shot import label_texts
from .arguments import DiffCLIPTrainingArguments, check_arguments
from .checkpoints import last_checkpoint
from .distillation import Loss, Teacher, without_teachers
from .faults import Guard
from .fine_tuning import decay_by_depth, hold_still, lock_tower
from .gradient_cache import backward_in_chunks
from .loaders import Loaders
from .metrics import ZeroShotTask, check_labels, pair_metrics, zero_shot_accuracy
from .moments import TrainingMoments
from .shared_batches import EvenLoader, concatenate, gather_rows, is_split, next_batches
from .weights import (
    contrastive_model,
    give_logit_scale_a_dimension,
    layer_lambdas,
    logit_scale_value,
    take_logit_scales_dimension,
    to_float32,
    whole,
)


logger = logging.getLogger(__name__)
NO_ROWS = "The training data has no rows, so that nothing was trained."


class DiffCLIPTrainer(Trainer):
    """Transformers' Trainer for `DiffCLIPModel`, and for `DiffCLIPForImageClassification`.

    - The contrastive batch is that of all processes, and `contrastive_chunk_size` trains it in chunks (GradCache).
    - With `lock` one tower isn't trained, with `layer_decay` lower layers learn more slowly, and with a `teacher` the
      similarities are kept near to its own; see `distillation_loss`.
    - Weight decay falls on parameters of two or more dimensions alone, the logit scale stays within 0 and ln 100, and
      half-precision weights are trained in float32.
    - Each log has λ of every layer and exp(logit_scale) besides the loss, the learning rate and the gradient's norm.
    - Evaluation is on the embeddings of the whole evaluation set: `eval_loss` over global batches, Recall@1, 5 and 10
      in both directions, and with `zero_shot` the accuracy `eval_zero_shot_accuracy`. `predict` returns the normalised
      embeddings of texts and images, or of those alone that the data has. Every row that can be used counts once,
      whatever the numbers of rows and processes, and rows stay in order; `ImageTextShards` gives its `once` to this.
    - Collators may drop rows. A batch of which nothing is left in any process changes no weight, and what a pass over
      data dropped in all processes is logged and judged at its end, in training and evaluation.
    - A dataset with `splits_itself = True`, as `ImageTextShards`, shares its rows out among processes and workers on
      its own, as one of `split_dataset_by_node` does. Of other streams every process reads all rows and takes its
      share. Datasets and collators with `set_epoch` are told the epoch, datasets with `set_position` how many batches
      of it a resumed run skips, and those with `counts` and `check(counts)` are judged.
    - A loss or gradient that isn't finite stops the run before it reaches the weights, which are saved; a checkpoint
      that can't be written is removed; and `resume_from_checkpoint=True` takes the last complete one.

    Args:
        model, args: As in `Trainer`, with `DiffCLIPTrainingArguments`.
        eval_data_collator: Makes the batches of evaluation and prediction, if not `data_collator`: training's cuts
            images at random.
        zero_shot: Labelled images to classify in each evaluation, alone where there is no `eval_dataset`; it needs a
            tokenizer in `processing_class`.
        teacher: A frozen model to learn from, with `get_image_features`, `get_text_features` and `logit_scale`; see
            `Teacher`. It's given the inputs of a batch whose names begin with `teacher_`, as `TeacherCollator` makes
            them, or else the model's own. Each process has all of it, and checkpoints have nothing of it.
        **kwargs: What else `Trainer` takes.

    Raises:
        TypeError: `args` are other training arguments.
        ValueError: The arguments ask of a contrastive model what it can't do, of another what only it can, or what
            has no effect; and from `train`, `evaluate` and `predict`, where more rows than allowed had to be dropped.
        FloatingPointError: From `train`, where a loss or gradient isn't finite.
        OSError: From `train`, where a checkpoint can't be written.
    """

    args: DiffCLIPTrainingArguments
    model: Any

    def __init__(
        self,
        model: nn.Module | None = None,
        args: DiffCLIPTrainingArguments | None = None,
        *,
        eval_data_collator: Callable[[list[Any]], Any] | None = None,
        zero_shot: ZeroShotTask | None = None,
        teacher: nn.Module | None = None,
        **kwargs: Any,
    ):
        if not isinstance(args, DiffCLIPTrainingArguments):
            raise TypeError(f"args is of type {type(args).__name__}; it must be DiffCLIPTrainingArguments.")
        only_zero_shot = zero_shot is not None and kwargs.get("eval_dataset") is None
        if only_zero_shot:
            # Trainer takes an evaluation strategy only with a dataset.
            kwargs["eval_dataset"] = []
        super().__init__(model, args, **kwargs)
        if only_zero_shot:
            self.eval_dataset = None
        if model is not None:
            self._prepare_weights(model)
        self.eval_data_collator = eval_data_collator or self.data_collator
        self.zero_shot = zero_shot
        self.is_contrastive = contrastive_model(self.model) is not None
        self.teacher: Any = teacher
        check_arguments(self)
        if teacher is not None:
            self.teacher = Teacher(
                teacher.to(args.device),
                self.model,
                args.distill_weight,
                args.distill_feature_weight,
                rows=args.contrastive_chunk_size or args.per_device_train_batch_size,
            )
        self.loaders = Loaders(args, self._get_collator_with_removed_columns)
        self.guard = Guard(self)
        self._moments = TrainingMoments(self.data_collator)
        self.add_callback(self._moments)
        # Of the batches that are fetched, the rows in each process.
        self._rows: list[list[int]] = []
        # What a classifier's loss of this process counts for.
        self._weight = 1.0
        # Of the present batch of evaluation.
        self._rows_evaluated, self._losses_follow = 0, False

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of `processing_class`, or None without one."""
        part = getattr(self.processing_class, "tokenizer", self.processing_class)
        return part if isinstance(part, PreTrainedTokenizerBase) else None

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Build the model with `model_init`."""
        model = super().call_model_init(trial)
        self._prepare_weights(model)
        return model

    def _prepare_weights(self, model: nn.Module) -> None:
        """Make the weights what training needs."""
        to_float32(model)
        if self.is_fsdp_enabled:
            give_logit_scale_a_dimension(model)
        self._lock(model)

    def _lock(self, model: nn.Module) -> None:
        """Lock the tower that isn't to be trained, if any; check_arguments refuses a classifier's."""
        if self.args.lock is not None and contrastive_model(model) is not None:
            lock_tower(model, self.args.lock)

    # ---- Data -----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Return the training data, of which every row is in one process; see `Loaders.training`."""
        dataset: Any = self.train_dataset
        if dataset is None:
            raise ValueError("train_dataset is None; training needs one.")
        if has_length(dataset) and not len(dataset):
            raise ValueError(NO_ROWS)
        if self.args.world_size == 1 and not is_split(dataset) and not isinstance(dataset, IterableDataset):
            return super().get_train_dataloader()
        return self.loaders.training(dataset, self.data_collator, self._train_batch_size, self._get_train_sampler)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> Any:
        """Return the evaluation data: every row exactly once, in order, and no batch left out."""
        sets: Any = self.eval_dataset
        dataset: Any = sets if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("eval_dataset is None; evaluation needs one.")
        return self.get_test_dataloader(sets[dataset] if isinstance(dataset, str) else dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> Any:
        """Return a dataset's batches as evaluation has them."""
        return self.loaders.once(test_dataset, self.eval_data_collator)

    # ---- Training -------------------------------------------------------------------------------------------------

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters of two or more dimensions, on which weight decay falls.

        Not so on biases, norms, the λ vectors, the class embedding and the logit scale.

        Source: paper arXiv 2503.06626, section 4.1; SLIP's `main.py`.
        """
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer, unless there is one, with lower learning rates further down if `layer_decay` says."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.args.layer_decay is not None:
            named = self.model if model is None else model
            decay_by_depth(optimizer, named, self.args.layer_decay, log=self.is_world_process_zero())
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as `Trainer.train` does; `resume_from_checkpoint=True` takes the last complete checkpoint.

        Raises:
            ValueError: There's no complete checkpoint to resume from, or the data has no rows.
            FloatingPointError: A loss or gradient isn't finite; the weights weren't touched by it.
            OSError: A checkpoint can't be written.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self._get_output_dir(None))
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint is True, but {self.args.output_dir!r} has no complete checkpoint."
                )
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if output.global_step == 0:
            # A stream's end is known only when it's there.
            raise ValueError(NO_ROWS)
        return output

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """Return the batches of the next step, as many in every process, and the number of their labels if it counts.

        A process whose data has run out gets batches without rows.
        """
        batches, self._rows = next_batches(epoch_iterator, num_batches)
        return batches, self._get_num_items_in_batch(batches, device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the model's loss, which a contrastive model is asked for; 0, with gradients of 0, of no rows.

        Where there's a teacher, add how far the model is from it.
        """
        labels = inputs.get("labels")
        teaching = None
        if self.is_contrastive:
            self._hold_still(model)
            teaching = self._teaching(inputs)
            inputs = {**without_teachers(inputs), "return_loss": True}
        elif isinstance(labels, torch.Tensor) and labels.ndim == 1 and not labels.is_floating_point():
            # On a GPU the loss would end the process.
            check_labels(labels, self.model.config.num_labels)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if teaching is not None:
            loss = loss + teaching(outputs.text_embeds, outputs.image_embeds, contrastive_model(model).logit_scale)
        if find_batch_size(outputs) == 0:
            # A mean over nothing is NaN, though its gradients are 0.
            loss = torch.nan_to_num(loss)
        loss = loss * self._weight
        return (loss, outputs) if return_outputs else loss

    def _hold_still(self, model: nn.Module) -> None:
        """Keep dropout out of a locked tower, which `model.train()` lets in at each step."""
        if self.args.lock is not None:
            hold_still(model, self.args.lock)

    def _teaching(self, inputs: dict[str, Any]) -> Loss | None:
        """Return the distillation loss of a batch as a function of its embeddings, None without a teacher."""
        if self.teacher is None:
            return None
        with self.accelerator.autocast():
            return self.teacher.loss_of(inputs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run one forward and backward pass, in chunks if asked for; return the local loss, detached."""
        rows = self._rows.pop(0) if self._rows else self._count_rows(inputs)
        self._moments.rows_of_step += sum(rows)
        chunk_size = self.args.contrastive_chunk_size
        if chunk_size is not None:
            loss = self._training_step_in_chunks(model, inputs, chunk_size)
        else:
            if not self.is_contrastive and self.compute_loss_func is None:
                # The mean over processes, which DDP and FSDP take, is so the mean over rows, however these are shared.
                self._weight = rows[self.args.process_index] * len(rows) / max(1, sum(rows))
            try:
                loss = super().training_step(model, inputs, *args, **kwargs)
            finally:
                self._weight = 1.0
        if not self.guard.in_every_process(torch.isfinite(loss)):
            self.guard.stop("loss")
        return loss

    def _count_rows(self, inputs: dict[str, Any]) -> list[int]:
        """Return how many rows every process has in its batch."""
        return gather_rows(torch.tensor([find_batch_size(inputs) or 0], device=self.args.device)).tolist()

    def _training_step_in_chunks(self, model: Any, inputs: dict[str, Any], chunk_size: int) -> torch.Tensor:
        model.train()
        if hasattr(self.optimizer, "train"):  # As schedule-free optimizers need, and Trainer's own step does.
            self.optimizer.train()
        self._hold_still(model)
        core = contrastive_model(model)
        inputs = self._prepare_inputs(inputs)
        teaching = self._teaching(inputs)

        def loss_of(*embeds: torch.Tensor) -> torch.Tensor:
            loss = image_text_contrastive_loss(*embeds)
            return loss if teaching is None else loss + teaching(*embeds)

        return backward_in_chunks(
            model,
            lambda: core.logit_scale,
            without_teachers(inputs),
            chunk_size,
            self.accelerator.backward,
            partial(self.accelerator.no_sync, model),
            synchronise=self.accelerator.sync_gradients,
            divisor=self.current_gradient_accumulation_steps,
            loss_of=loss_of,
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and with a training step's loss λ of every layer and exp(logit_scale)."""
        if "loss" in logs:
            logs |= layer_lambdas(self.model)
            if self.is_contrastive:
                logs["logit_scale"] = logit_scale_value(self.model).exp().item()
        super().log(logs, start_time)

    # ---- Evaluation -----------------------------------------------------------------------------------------------

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, torch.Tensor | None]:
        """Return a batch's embeddings, texts before images, and its labels if it has any; no loss.

        Of a model that isn't contrastive, return what `Trainer` does.
        """
        if not self.is_contrastive:
            self._rows_evaluated = find_batch_size(inputs) or 0
            found = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            self._losses_follow = found[0] is not None
            return found
        inputs = {**without_teachers(self._prepare_inputs(inputs)), "return_loss": False, "return_dict": True}
        labels = inputs.pop("labels", None)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        embeds = tuple(part.float() for part in (outputs.text_embeds, outputs.image_embeds) if part is not None)
        return None, embeds[0] if len(embeds) == 1 else embeds, labels

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate as `Trainer` does; where there are labelled images alone, on those."""
        if eval_dataset is not None or self.eval_dataset is not None or self.zero_shot is None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        metrics = {f"{metric_key_prefix}_zero_shot_accuracy": self._zero_shot_accuracy(self.zero_shot)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Run the model on a dataset; of a contrastive model compute the metrics from all its embeddings.

        Raises:
            ValueError: More rows than allowed had to be dropped, or all; or a contrastive model is to be evaluated on
                images or texts alone, of which only predictions can be made.
        """
        if not self.is_contrastive:
            return self._run_once(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        output = self._run_once(dataloader, description, False, ignore_keys, metric_key_prefix)
        metrics: dict[str, float] = {}
        if isinstance(output.predictions, tuple):
            text_embeds, image_embeds = map(torch.from_numpy, output.predictions)
            scale, batch = logit_scale_value(self.model).exp(), self.args.eval_batch_size * self.args.world_size
            metrics = pair_metrics(text_embeds, image_embeds, scale, batch, self.args.device)
        elif description == "Evaluation":
            raise ValueError("The evaluation data has images or texts alone; a contrastive model needs pairs of both.")
        if self.zero_shot is not None and description == "Evaluation":
            metrics["zero_shot_accuracy"] = self._zero_shot_accuracy(self.zero_shot)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return output._replace(metrics=(output.metrics or {}) | metrics)

    def _run_once(self, dataloader: Any, description: str, *args: Any) -> EvalLoopOutput:
        """Run Transformers' loop, with each row that can be used once."""
        if not isinstance(dataloader, EvenLoader):
            dataloader = EvenLoader(dataloader, dataloader.dataset, dataloader.collate_fn)
        dataloader.name = description.lower()
        # It puts the attribute back. What accelerate has instead takes all processes to have as many rows.
        self.gather_function = self._gather_rows
        if not self.is_contrastive or self.compute_metrics is not None or not self.args.eval_do_concat_batches:
            output = super().evaluation_loop(dataloader, description, *args)
            return output._replace(num_samples=dataloader.rows)
        # It would copy all embeddings for each batch that it puts beside them.
        self.args.eval_do_concat_batches = False
        try:
            output = super().evaluation_loop(dataloader, description, *args)
        finally:
            self.args.eval_do_concat_batches = True
        return output._replace(
            num_samples=dataloader.rows,
            predictions=concatenate(output.predictions),
            label_ids=concatenate(output.label_ids),
        )

    def _gather_rows(self, parts: Any) -> Any:
        """Stack what every process has of a batch."""
        if self._losses_follow:
            # Transformers repeats a batch's loss; as often as there are rows, the mean is right.
            self._losses_follow, parts = False, parts[:1].expand(self._rows_evaluated)
        rows = gather_rows(parts)
        # All embeddings needn't be on a GPU.
        return send_to_device(rows, "cpu") if self.is_contrastive else rows

    def _zero_shot_accuracy(self, task: ZeroShotTask) -> float:
        """Return the share of a task's images that are nearest to their own label."""
        labels, texts, indices = label_texts(task.labels, task.templates)
        tokenize = partial(self.tokenizer, padding=True, truncation=True, return_tensors="pt")
        text_embeds = self._embed(texts, tokenize, "Labels").predictions
        images = self._embed(task.dataset, task.collator, "Zero-shot")
        found = [torch.from_numpy(part) for part in (images.predictions, images.label_ids, text_embeds)]
        return zero_shot_accuracy(found[0], found[1], found[2], indices, len(labels), self.args.device)

    def _embed(self, rows: Any, collator: Callable[[list[Any]], Any], description: str) -> EvalLoopOutput:
        """Return the embeddings of rows that are shared out among the processes, and their labels."""
        return self._run_once(self.loaders.once(rows, collator), description, False)

    # ---- Saving ---------------------------------------------------------------------------------------------------

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | float | None = None) -> Any:
        """Return the gradient's norm; stop where it isn't finite, as after a loss that is."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        # float16's scaler passes over such a step by itself, and tries a smaller scale.
        if self.accelerator.scaler is None and not math.isfinite(whole(torch.as_tensor(grad_norm))):
            self.guard.stop("gradient")
        return grad_norm

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load a checkpoint's weights, which have to be the model's."""
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            # Of an adapter PEFT makes all weights trainable again.
            self._lock(self.model)
        except RuntimeError as error:
            raise ValueError(
                f"The weights of {resume_from_checkpoint} aren't this model's: {one_line(error, 300)}"
            ) from error

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raise a ValueError where weights are missing or have no place, of which Transformers only warns."""
        for names, what in ((load_result.missing_keys, "lacks"), (load_result.unexpected_keys, "has more than")):
            if names:
                raise ValueError(
                    f"The checkpoint {what} this model's weights: {', '.join(sorted(names)[:3])}"
                    f"{', …' if len(names) > 3 else ''}. Resume with the model that it was saved from."
                )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the optimizer's state, which has to be this run's; warn where a checkpoint has none."""
        wrong = f"The optimizer's state in {checkpoint} is another run's"
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{wrong}: {one_line(error)}.") from error
        if checkpoint is None:
            return
        if not any(Path(checkpoint).glob("*optim*")) and not any(Path(checkpoint).glob("global_step*")):
            logger.warning("%s has no optimizer's state, which starts anew.", checkpoint)
        # Its settings are the saved ones, among which another optimizer's aren't.
        if missing := set(self.optimizer.defaults) - set(self.optimizer.param_groups[0]):
            raise ValueError(f"{wrong}: it has no {', '.join(sorted(missing))}; resume with the same optim.")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint whole or not at all, and none of weights that aren't finite; see `Guard.save`."""
        self.guard.save(partial(super()._save_checkpoint, model, trial), trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """Write the state of the random generators, and wait for all processes, since what follows is written last."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Save the model so that it loads without this package, and with the logit scale as it is without FSDP2."""
        if state_dict is not None:
            state_dict = take_logit_scales_dimension(state_dict)
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir or "")
        # Adapters have no configuration; their base model has its own code.
        is_ours = self.model.config.model_type.startswith("diffclip")
        if self.args.should_save and is_ours and (folder / CONFIG_NAME).is_file():
            add_remote_code(folder)


__all__ = ["DiffCLIPTrainer"]
