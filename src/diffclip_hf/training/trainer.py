"""Transformers' Trainer for contrastive training: whole batches, retrieval metrics and faults that lose no weights."""

import logging
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput, has_length, seed_worker
from transformers.utils import CONFIG_NAME

from ..common.remote_code import add_remote_code
from ..data.retrieval_metrics import recall_at_k
from ..model.loss_diffclip import symmetric_cross_entropy
from ..zero_shot import label_texts, mean_label_embeds
from .checkpoints import is_complete, last_checkpoint
from .data_pass import DataPass
from .gradient_cache import backward_in_chunks
from .shared_batches import (
    EvenLoader,
    OrderedBatchSampler,
    SharedBatchSampler,
    SharedStream,
    collate_some,
    even_batches,
    gather_rows,
    is_split,
)


logger = logging.getLogger(__name__)
MAX_LOGIT_SCALE = math.log(100)
_LAYER = re.compile(r"(text_model|vision_model)\.encoder\.layers\.(\d+)\.")


@dataclass
class DiffCLIPTrainingArguments(TrainingArguments):
    """Transformers' `TrainingArguments`, with what contrastive training needs besides.

    Three defaults differ: columns that the model doesn't take are kept, for a collator to read; DDP isn't told to look
    for unused parameters, of which DiffCLIP has none; and losses that aren't finite aren't filtered out of the logs,
    since training stops at them.

    Args:
        contrastive_chunk_size: The most pairs that go through the model at once; by default all of a process's batch,
            `per_device_train_batch_size`. The gradient is that of the whole batch either way.

    Raises:
        ValueError: `contrastive_chunk_size` is below 1; or as `TrainingArguments` raises.
    """

    contrastive_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "The most pairs that go through the model at once. The gradient is that of the whole batch of "
            "per_device_train_batch_size pairs, the memory that of a chunk, and the model runs forward twice."
        },
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Whether to remove the columns that the model's forward doesn't take."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Whether DDP looks for parameters without a gradient in each step."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Whether to leave losses that aren't finite out of the logs."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.contrastive_chunk_size is not None and self.contrastive_chunk_size < 1:
            raise ValueError(
                f"contrastive_chunk_size is {self.contrastive_chunk_size}; it must be at least 1, or None for the "
                "whole batch."
            )


@dataclass
class ZeroShotTask:
    """Labelled images that `DiffCLIPTrainer` classifies in each evaluation.

    Args:
        dataset: Images with the index of their label; map-style, the same in every process.
        collator: Makes of its rows `pixel_values`, (n, channels, height, width), and `labels`, (n,), int64.
        labels: The labels' names, in the order of the indices, as `ZeroShotClassifier` takes them.
        templates: As `ZeroShotClassifier` takes them.
    """

    dataset: Dataset
    collator: Callable[[list[Any]], Mapping[str, torch.Tensor]]
    labels: Sequence[str] | Mapping[str, str | Sequence[str]]
    templates: str | Sequence[str] = "This is a photo of {}."


def contrastive_model(model: nn.Module) -> Any | None:
    """Return the `DiffCLIPModel` inside what DDP, FSDP2, PEFT or torch.compile made of it, or None without one.

    It's known by its parameter: code that travels with a checkpoint has classes of its own.
    """
    for module in model.modules():
        if "logit_scale" in dict(module.named_parameters(recurse=False)):
            return module
    return None


def logit_scale_value(model: nn.Module) -> torch.Tensor:
    """Return a contrastive model's logit scale, detached, float32 without dimensions; under FSDP2 in every process."""
    scale = _whole(contrastive_model(model).logit_scale.detach())
    return scale.float().reshape(())


def clamp_logit_scale(model: nn.Module) -> None:
    """Keep a contrastive model's logit scale within 0 and ln 100, in place, if it's trained at all.

    Source: Radford et al. 2021 (CLIP), section 2.5; SLIP's `main.py` for the lower bound.
    """
    parameter = contrastive_model(model).logit_scale
    if parameter.requires_grad:
        with torch.no_grad():
            parameter.clamp_(0, MAX_LOGIT_SCALE)


def layer_lambdas(model: nn.Module) -> dict[str, float]:
    """Return the present λ of each differential layer, as {"lambda/text_model.0": …}; under FSDP2 in every process."""
    lambdas = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if hasattr(module, "get_lambda") and (match := _LAYER.search(name)):
                lambdas[f"lambda/{match[1]}.{match[2]}"] = _whole(module.get_lambda())
    # One copy from the device rather than one a layer.
    values = torch.stack(list(lambdas.values())).tolist() if lambdas else []
    return dict(zip(lambdas, values, strict=True))


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that FSDP2 may have shared out among processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _to_float32(model: nn.Module) -> None:
    """Make a model's weights float32 if they are in half precision, in which small updates are lost."""
    half = {parameter.dtype for parameter in model.parameters()} & {torch.float16, torch.bfloat16}
    if half:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in half))
        logger.warning(
            "The model's weights are %s; they're trained in float32. For half precision's speed pass bf16=True, which "
            "computes in bfloat16 and keeps the weights in float32.",
            names,
        )
        model.float()


def _check_labels(labels: Any, count: int) -> None:
    """Raise a ValueError where one of a batch's labels, a tensor or array, isn't among so many."""
    if len(labels) and (largest := int(labels.max())) >= count:
        raise ValueError(f"A label is {largest}; there are {count} labels, so it must be in 0..{count - 1}.")


class _Callback(TrainerCallback):
    """What `DiffCLIPTrainer` does at moments that only callbacks have."""

    def __init__(self, collator: Any):
        self.collator = collator
        self.streams_begun = 0
        self.training_pass: DataPass | None = None
        self.rows_of_step = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.streams_begun = 0

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
        self.training_pass = DataPass(train_dataloader.dataset, self.collator)

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


class DiffCLIPTrainer(Trainer):
    """Transformers' Trainer for `DiffCLIPModel`, and for `DiffCLIPForImageClassification`.

    - The contrastive batch is that of all processes, and `contrastive_chunk_size` trains it in chunks (GradCache).
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
        self._check_arguments()
        self._last_saved_step: int | None = None
        self._callback = _Callback(self.data_collator)
        self.add_callback(self._callback)
        # Of the batches that are fetched, the rows in each process.
        self._rows: list[list[int]] = []
        # What a classifier's loss of this process counts for.
        self._weight = 1.0
        # Of the present batch of evaluation.
        self._rows_evaluated, self._losses_follow = 0, False

    def _check_arguments(self) -> None:
        """Raise a ValueError where the arguments don't fit the model, and warn of plain gradient accumulation."""
        args = self.args
        refused = self._without_effect()
        refused += self._unlike_contrastive() if self.is_contrastive else self._contrastive_alone()
        for name, given, reason in refused:
            if given:
                raise ValueError(f"{name} is given, but {reason}; leave it out.")
        if not self.is_contrastive:
            return
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process, where each would see only its own negatives; start "
                "one process for each with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES."
            )
        if self.zero_shot is not None and self.tokenizer is None:
            raise ValueError("zero_shot is given, but processing_class has no tokenizer; pass the model's processor.")
        if args.gradient_accumulation_steps > 1:
            logger.warning(
                "gradient_accumulation_steps is %d, which doesn't enlarge the contrastive batch: the negatives are "
                "those of one step's %d pairs on each process. For more, raise per_device_train_batch_size and set "
                "contrastive_chunk_size to what fits in memory.",
                args.gradient_accumulation_steps,
                args.per_device_train_batch_size,
            )

    def _without_effect(self) -> list[tuple[str, Any, str]]:
        """List arguments that would have no effect on any model: the name, whether it's given, and why."""
        args = self.args
        sharing = args.accelerator_config
        return [
            (
                "use_liger_kernel",
                args.use_liger_kernel or args.liger_kernel_config,
                "Liger has no kernels for DiffCLIP",
            ),
            ("use_cache", args.use_cache, "DiffCLIP generates nothing"),
            ("eval_use_gather_object", args.eval_use_gather_object, "what is gathered are tensors"),
            ("split_batches", sharing.split_batches, "per_device_train_batch_size is each process's own"),
            ("dispatch_batches", sharing.dispatch_batches, "each process reads its own share of the data"),
        ]

    def _contrastive_alone(self) -> list[tuple[str, Any, str]]:
        """List arguments as `_without_effect` does, without effect on an image classifier."""
        args, name = self.args, type(self.model).__name__
        return [
            ("contrastive_chunk_size", args.contrastive_chunk_size is not None, f"{name} has no contrastive loss"),
            ("zero_shot", self.zero_shot is not None, f"{name} has no contrastive loss"),
            ("neftune_noise_alpha", args.neftune_noise_alpha, f"{name} has no token embeddings"),
            ("include_num_input_tokens_seen", args.include_num_input_tokens_seen != "no", f"{name} takes no tokens"),
        ]

    def _unlike_contrastive(self) -> list[tuple[str, Any, str]]:
        """List arguments as `_without_effect` does, without effect on a contrastive model or against its loss."""
        args = self.args
        chunks = args.contrastive_chunk_size is not None
        optimizer = str(getattr(args.optim, "value", args.optim))
        own_loss = "a contrastive model has its own loss"
        own_metrics = "a contrastive model is evaluated on all its embeddings"
        return [
            ("label_smoothing_factor", args.label_smoothing_factor, own_loss),
            ("compute_loss_func", self.compute_loss_func is not None, own_loss),
            ("compute_metrics", self.compute_metrics is not None, own_metrics),
            ("preprocess_logits_for_metrics", self.preprocess_logits_for_metrics is not None, own_metrics),
            ("batch_eval_metrics", args.batch_eval_metrics, own_metrics),
            ("eval_do_concat_batches=False", not args.eval_do_concat_batches, own_metrics),
            ("include_for_metrics", args.include_for_metrics, own_metrics),
            ("prediction_loss_only", args.prediction_loss_only, own_metrics),
            ("label_names", args.label_names not in (None, ["labels"]), "a contrastive model needs no labels"),
            (
                f"train_sampling_strategy={args.train_sampling_strategy!r}",
                args.train_sampling_strategy not in ("random", "sequential"),
                "the rows of a batch are each other's negatives, which are drawn at random",
            ),
            (
                "auto_find_batch_size",
                args.auto_find_batch_size,
                "a smaller batch has fewer negatives; contrastive_chunk_size saves memory without that",
            ),
            (
                "torch_empty_cache_steps",
                chunks and args.torch_empty_cache_steps is not None,
                "contrastive_chunk_size has steps of its own",
            ),
            (
                f"optim={optimizer!r}",
                chunks and optimizer in ("lomo", "adalomo"),
                "it updates weights in the backward pass, which contrastive_chunk_size runs several times",
            ),
        ]

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
        _to_float32(model)
        core = contrastive_model(model)
        if core is not None and self.is_fsdp_enabled:
            # FSDP2 shards no parameter without dimensions; `_save` gives the shape back.
            parameter = core.logit_scale
            core.logit_scale = nn.Parameter(parameter.detach().reshape(1), requires_grad=parameter.requires_grad)

    # ---- Data -----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Return the training data, of which every row is in one process.

        Data that is split before, as `splits_itself` or `split_dataset_by_node` says, isn't split again. The last
        batch of several processes is shared out rather than filled up, as accelerate does, with rows that were seen
        before.
        """
        dataset: Any = self.train_dataset
        size, drop_last = self._train_batch_size, self.args.dataloader_drop_last
        if is_split(dataset):
            own_size = getattr(dataset, "batch_size", size)
            if own_size != size:
                raise ValueError(
                    f"{type(dataset).__name__} has batch_size {own_size}, and per_device_train_batch_size is {size}; "
                    "they must be the same."
                )
            # One that knows its length has as many whole batches in every process.
            drop_last = drop_last or has_length(dataset)
            return self._dataloader(dataset, self.data_collator, "Training", batch_size=size, drop_last=drop_last)
        if self.args.world_size == 1 and not isinstance(dataset, IterableDataset):
            return super().get_train_dataloader()
        place = (size, self.args.process_index, self.args.world_size, drop_last)
        if isinstance(dataset, IterableDataset):
            stream = SharedStream(dataset, *place)
            return self._dataloader(stream, self.data_collator, "Training", batch_size=None)
        sampler: Any = self._get_train_sampler(dataset)
        if isinstance(sampler, RandomSampler):
            # As accelerate does, so that every process draws the same order.
            sampler = SeedableRandomSampler(sampler.data_source, data_seed=self.args.data_seed)
        batches = SharedBatchSampler(sampler, *place)
        return self._dataloader(dataset, self.data_collator, "Training", batch_sampler=batches)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> Any:
        """Return the evaluation data: every row exactly once, in order, and no batch left out."""
        sets: Any = self.eval_dataset
        dataset: Any = sets if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("eval_dataset is None; evaluation needs one.")
        return self._loader_once(sets[dataset] if isinstance(dataset, str) else dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> Any:
        """Return a dataset's batches as evaluation has them."""
        return self._loader_once(test_dataset)

    def _loader_once(self, dataset: Any, collator: Callable[[list[Any]], Any] | None = None) -> EvenLoader:
        """Return every row of a dataset exactly once, shared out among the processes."""
        collator = collator or self.eval_data_collator
        size, rank, processes = self.args.eval_batch_size, self.args.process_index, self.args.world_size
        batching: dict[str, Any] = {"batch_size": None}
        source: Any = dataset
        if hasattr(dataset, "once"):
            dataset = source = dataset.once(size)
        elif is_split(dataset):
            batching = {"batch_size": size}
        elif isinstance(dataset, IterableDataset):
            source = SharedStream(dataset, size, rank, processes)
        else:
            batching = {"batch_sampler": OrderedBatchSampler(len(dataset), size, rank, processes)}
        loader = self._dataloader(source, collator, "Evaluation", **batching)
        return EvenLoader(loader, dataset, collator)

    def _dataloader(
        self, dataset: Any, collator: Callable[[list[Any]], Any], description: str, **batching: Any
    ) -> DataLoader:
        """Return a loader that accelerate doesn't divide among processes, since `batching` or the dataset does."""
        args = self.args
        workers = args.dataloader_num_workers
        return DataLoader(
            dataset,
            collate_fn=partial(collate_some, self._get_collator_with_removed_columns(collator, description)),
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
            prefetch_factor=args.dataloader_prefetch_factor,
            # Else those of a new epoch get the dataset as set_epoch and set_position left it.
            persistent_workers=bool(workers and args.dataloader_persistent_workers and description == "Training"),
            multiprocessing_context=args.dataloader_multiprocessing_context if workers else None,
            in_order=args.dataloader_in_order,
            worker_init_fn=partial(seed_worker, num_workers=workers, rank=args.process_index),
            **batching,
        )

    # ---- Training -------------------------------------------------------------------------------------------------

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters of two or more dimensions, on which weight decay falls.

        Not so on biases, norms, the λ vectors, the class embedding and the logit scale.

        Source: paper arXiv 2503.06626, section 4.1; SLIP's `main.py`.
        """
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as `Trainer.train` does; `resume_from_checkpoint=True` takes the last complete checkpoint.

        Raises:
            ValueError: There's no complete checkpoint to resume from.
            FloatingPointError: A loss or gradient isn't finite; the weights weren't touched by it.
            OSError: A checkpoint can't be written.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self._get_output_dir(None))
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint is True, but {self.args.output_dir!r} has no complete checkpoint."
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """Return the batches of the next step, as many in every process, and the number of their labels if it counts.

        A process whose data has run out gets batches without rows.
        """
        batches, self._rows = even_batches(list(islice(epoch_iterator, num_batches)), num_batches)
        return batches, self._get_num_items_in_batch(batches, device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the model's loss, which a contrastive model is asked for; 0, with gradients of 0, of no rows."""
        labels = inputs.get("labels")
        if self.is_contrastive:
            inputs = {**inputs, "return_loss": True}
        elif isinstance(labels, torch.Tensor) and labels.ndim == 1 and not labels.is_floating_point():
            # On a GPU the loss would end the process.
            _check_labels(labels, self.model.config.num_labels)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if find_batch_size(outputs) == 0:
            # A mean over nothing is NaN, though its gradients are 0.
            loss = torch.nan_to_num(loss)
        loss = loss * self._weight
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run one forward and backward pass, in chunks if asked for; return the local loss, detached."""
        rows = self._rows.pop(0) if self._rows else self._count_rows(inputs)
        self._callback.rows_of_step += sum(rows)
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
        if not self._in_every_process(torch.isfinite(loss)):
            self._stop("loss")
        return loss

    def _count_rows(self, inputs: dict[str, Any]) -> list[int]:
        """Return how many rows every process has in its batch."""
        return gather_rows(torch.tensor([find_batch_size(inputs) or 0], device=self.args.device)).tolist()

    def _training_step_in_chunks(self, model: Any, inputs: dict[str, Any], chunk_size: int) -> torch.Tensor:
        model.train()
        if hasattr(self.optimizer, "train"):  # As schedule-free optimizers need, and Trainer's own step does.
            self.optimizer.train()
        core = contrastive_model(model)
        return backward_in_chunks(
            model,
            lambda: core.logit_scale,
            self._prepare_inputs(inputs),
            chunk_size,
            self.accelerator.backward,
            partial(self.accelerator.no_sync, model),
            synchronise=self.accelerator.sync_gradients,
            divisor=self.current_gradient_accumulation_steps,
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
        inputs = {**self._prepare_inputs(inputs), "return_loss": False, "return_dict": True}
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
            text_embeds, image_embeds = map(self._on_device, output.predictions)
            metrics["loss"] = self._evaluation_loss(text_embeds, image_embeds)
            metrics |= recall_at_k(text_embeds, image_embeds)
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
        output = super().evaluation_loop(dataloader, description, *args)
        return output._replace(num_samples=dataloader.rows)

    def _gather_rows(self, parts: Any) -> Any:
        """Stack what every process has of a batch."""
        if self._losses_follow:
            # Transformers repeats a batch's loss; as often as there are rows, the mean is right.
            self._losses_follow, parts = False, parts[:1].expand(self._rows_evaluated)
        return gather_rows(parts)

    def _on_device(self, array: Any) -> torch.Tensor:
        return torch.from_numpy(array).to(self.args.device)

    def _evaluation_loss(self, text_embeds: torch.Tensor, image_embeds: torch.Tensor) -> float:
        """Return the mean loss of the pairs, (n, projection_dim), each against those of its global batch."""
        scale = logit_scale_value(self.model).exp()
        size = self.args.eval_batch_size * self.args.world_size
        losses = [
            symmetric_cross_entropy(scale * texts @ images.t()) * len(texts)
            for texts, images in zip(text_embeds.split(size), image_embeds.split(size), strict=True)
        ]
        return (torch.stack(losses).sum() / len(text_embeds)).item()

    def _zero_shot_accuracy(self, task: ZeroShotTask) -> float:
        """Return the share of a task's images that are nearest to their own label."""
        labels, texts, indices = label_texts(task.labels, task.templates)
        tokenize = partial(self.tokenizer, padding=True, truncation=True, return_tensors="pt")
        text_embeds = self._embed(texts, tokenize, "Labels").predictions
        images = self._embed(task.dataset, task.collator, "Zero-shot")
        _check_labels(images.label_ids, len(labels))
        label_embeds = mean_label_embeds(self._on_device(text_embeds), indices, len(labels))
        predicted = (self._on_device(images.predictions) @ label_embeds.t()).argmax(1)
        return (predicted == self._on_device(images.label_ids)).double().mean().item()

    def _embed(self, rows: Any, collator: Callable[[list[Any]], Any], description: str) -> EvalLoopOutput:
        """Return the embeddings of rows that are shared out among the processes, and their labels."""
        return self._run_once(self._loader_once(rows, collator), description, False)

    # ---- Faults ---------------------------------------------------------------------------------------------------

    def _in_every_process(self, holds: torch.Tensor) -> bool:
        """Say whether something holds in all processes, so that all of them do the same."""
        holds = holds.to(self.args.device, torch.float32).reshape(1)
        return bool(self.accelerator.gather(holds).min() > 0)

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | float | None = None) -> Any:
        """Return the gradient's norm; stop where it isn't finite, as after a loss that is."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        # float16's scaler passes over such a step by itself, and tries a smaller scale.
        if self.accelerator.scaler is None and not math.isfinite(_whole(torch.as_tensor(grad_norm))):
            self._stop("gradient")
        return grad_norm

    def _stop(self, what: str) -> None:
        """Save the weights as they were before this step, and raise a FloatingPointError."""
        raise FloatingPointError(
            f"The {what} isn't finite in step {self.state.global_step + 1}, at a learning rate of "
            f"{self.lr_scheduler.get_last_lr()[0]:.3g}. "
            f"{self._save_last_good_state()} Try a lower learning rate, a longer warm-up or a smaller max_grad_norm; "
            "bf16=True rather than fp16=True; and look for broken values in this step's batch."
        )

    def _save_last_good_state(self) -> str:
        """Write a checkpoint of the present step if there's something to save; say where training can go on."""
        if self.state.global_step == 0:
            return "Nothing was trained before."
        if not self._weights_are_finite():
            return f"The weights weren't finite before it either; {self._last_checkpoint()}."
        if self._last_saved_step != self.state.global_step:
            self._save_checkpoint(self.model_wrapped, trial=None)
        return f"The weights before it are in {self._checkpoint_folder()}, from which training can be resumed."

    def _weights_are_finite(self) -> bool:
        """Say whether every weight is finite in every process."""
        parameters = (p.to_local() if isinstance(p, DTensor) else p for p in self.model.parameters())
        finite = torch.stack([torch.isfinite(parameter.detach()).all() for parameter in parameters])
        return self._in_every_process(finite.all())

    def _last_checkpoint(self) -> str:
        return f"the last complete checkpoint is {last_checkpoint(self._get_output_dir(None))}"

    def _checkpoint_folder(self, trial: Any = None) -> Path:
        return Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint whole or not at all, and none of weights that aren't finite.

        Raises:
            FloatingPointError: A weight isn't finite.
            OSError: It can't be written; what there was of it is removed.
        """
        if not self._weights_are_finite():
            raise FloatingPointError(
                f"A weight isn't finite after step {self.state.global_step}, which isn't saved; "
                f"{self._last_checkpoint()}."
            )
        folder = self._checkpoint_folder(trial)
        if self.args.should_save:
            # An earlier run's would make a half-written checkpoint look complete.
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            if is_complete(folder):
                raise  # By what follows the writing, such as pushing it to the Hub.
            # What can't be removed is incomplete, so that resuming passes it over.
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"The checkpoint {folder} can't be written: {error}. It was removed; {self._last_checkpoint()}."
            ) from error
        self._last_saved_step = self.state.global_step

    def _save_rng_state(self, output_dir: str) -> None:
        """Write the state of the random generators, and wait for all processes, since what follows is written last."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Save the model so that it loads without this package, and with the logit scale as it is without FSDP2."""
        if state_dict is not None:
            state_dict = {
                name: tensor.reshape(()) if name.split(".")[-1] == "logit_scale" else tensor
                for name, tensor in state_dict.items()
            }
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir or "")
        # Adapters have no configuration; their base model has its own code.
        is_ours = self.model.config.model_type.startswith("diffclip")
        if self.args.should_save and is_ours and (folder / CONFIG_NAME).is_file():
            add_remote_code(folder)


__all__ = ["DiffCLIPTrainer", "DiffCLIPTrainingArguments", "ZeroShotTask"]
