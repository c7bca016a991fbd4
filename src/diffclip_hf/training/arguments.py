"""The trainer's arguments, and which of them a model can't be trained with."""

import logging
import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from .fine_tuning import TOWERS


logger = logging.getLogger(__name__)
# An argument's name, whether it's given, and why it can't be.
Refusal = tuple[str, Any, str]


@dataclass
class DiffCLIPTrainingArguments(TrainingArguments):
    """Transformers' `TrainingArguments`, with what contrastive training needs besides.

    Three defaults differ: columns that the model doesn't take are kept, for a collator to read; DDP isn't told to look
    for unused parameters, of which DiffCLIP has none; and losses that aren't finite aren't filtered out of the logs,
    since training stops at them.

    Args:
        contrastive_chunk_size: The most pairs that go through the model at once; by default all of a process's batch,
            `per_device_train_batch_size`. The gradient is that of the whole batch either way.
        lock: The tower that isn't trained, `"image"` or `"text"`, with its projection; the logit scale still is.
        layer_decay: What the learning rate is multiplied by for each layer further down, in 0..1, not 0; see
            `decay_by_depth`.
        distill_weight, distill_feature_weight: As `weight` and `feature_weight` of `distillation_loss`, which is added
            to the contrastive loss where `DiffCLIPTrainer` has a `teacher`.

    Raises:
        ValueError: One of these isn't what is allowed; or as `TrainingArguments` raises.
    """

    contrastive_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "How many pairs go through the model at once. The gradient is still that of the whole batch of "
            "per_device_train_batch_size pairs; only a chunk has to fit in memory, and the model runs forward twice."
        },
    )
    lock: str | None = field(
        default=None,
        metadata={
            "help": "Leave a tower and its projection as they are (LiT): image or text.",
            "choices": list(TOWERS),
        },
    )
    layer_decay: float | None = field(
        default=None,
        metadata={
            "help": "Multiply the learning rate by this for each layer further down: 0.75 gives the last layers 0.75 "
            "of learning_rate, those below 0.5625, and the embeddings the least.",
            "metavar": "FACTOR",
        },
    )
    distill_weight: float = field(
        default=1.0, metadata={"help": "The weight of the teacher's softmaxes beside the contrastive loss."}
    )
    distill_feature_weight: float | None = field(
        default=None,
        metadata={
            "help": "The weight of the cosine to the teacher's embeddings; by default 1, or 0 where these have "
            "another width."
        },
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Whether to remove the columns that the model's forward doesn't take."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Whether DDP looks for parameters without a gradient in each step."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "A checkpoint's folder, or last for the newest complete one in output_dir."},
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
        if self.lock not in (None, *TOWERS):
            raise ValueError(f"lock is {self.lock!r}; it must be {' or '.join(TOWERS)}.")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay is {self.layer_decay}; it must be in 0..1, not 0.")
        for name in ("distill_weight", "distill_feature_weight"):
            weight = getattr(self, name)
            if weight is not None and not 0 <= weight < math.inf:
                raise ValueError(f"{name} is {weight}; it must be at least 0.")


def check_arguments(trainer: Any) -> None:
    """Raise a ValueError where a `DiffCLIPTrainer`'s arguments don't fit its model; warn of plain accumulation."""
    args = trainer.args
    refused = _without_effect(trainer)
    refused += _unlike_contrastive(trainer) if trainer.is_contrastive else _contrastive_alone(trainer)
    for name, given, reason in refused:
        if given:
            raise ValueError(f"{name} is given, but {reason}; leave it out.")
    if not trainer.is_contrastive:
        return
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, where each would see only its own negatives; start "
            "one process for each with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES."
        )
    if trainer.zero_shot is not None and trainer.tokenizer is None:
        raise ValueError("zero_shot is given, but processing_class has no tokenizer; pass the model's processor.")
    if args.gradient_accumulation_steps > 1:
        logger.warning(
            "gradient_accumulation_steps is %d, which doesn't enlarge the contrastive batch: the negatives are "
            "those of one step's %d pairs on each process. For more, raise per_device_train_batch_size and set "
            "contrastive_chunk_size to what fits in memory.",
            args.gradient_accumulation_steps,
            args.per_device_train_batch_size,
        )


def _without_effect(trainer: Any) -> list[Refusal]:
    """List what would have no effect on any model."""
    args, sharing = trainer.args, trainer.args.accelerator_config
    several = args.world_size > 1
    return [
        (
            "use_liger_kernel",
            args.use_liger_kernel or args.liger_kernel_config,
            "Liger has no kernels for DiffCLIP",
        ),
        (
            f"label_names={args.label_names}",
            args.label_names not in (None, ["labels"]),
            "DiffCLIP has labels of one name, `labels`",
        ),
        (
            "dataloader_persistent_workers",
            args.dataloader_persistent_workers and not args.dataloader_num_workers,
            "dataloader_num_workers is 0",
        ),
        ("use_cache", args.use_cache, "DiffCLIP generates nothing"),
        ("layer_decay", args.layer_decay and trainer.optimizer, "the optimizer is ready made, with its own rates"),
        ("eval_use_gather_object", args.eval_use_gather_object, "what is gathered are tensors"),
        ("split_batches", sharing.split_batches, "per_device_train_batch_size is each process's own"),
        ("use_seedable_sampler=False", several and not sharing.use_seedable_sampler, "all processes draw one order"),
        ("non_blocking", several and sharing.non_blocking, "each process reads its own share of the data"),
        ("dispatch_batches", sharing.dispatch_batches, "each process reads its own share of the data"),
    ]


def _contrastive_alone(trainer: Any) -> list[Refusal]:
    """List what has no effect on an image classifier."""
    args, name = trainer.args, type(trainer.model).__name__
    return [
        ("contrastive_chunk_size", args.contrastive_chunk_size is not None, f"{name} has no contrastive loss"),
        ("zero_shot", trainer.zero_shot is not None, f"{name} has no contrastive loss"),
        ("teacher", trainer.teacher is not None, f"{name} has no contrastive loss"),
        ("lock", args.lock is not None, f"{name} has one tower"),
        ("neftune_noise_alpha", args.neftune_noise_alpha, f"{name} has no token embeddings"),
        ("include_num_input_tokens_seen", args.include_num_input_tokens_seen != "no", f"{name} takes no tokens"),
    ]


def _unlike_contrastive(trainer: Any) -> list[Refusal]:
    """List what has no effect on a contrastive model, or goes against its loss."""
    args = trainer.args
    chunks = args.contrastive_chunk_size is not None
    idle_weights = trainer.teacher is None and (args.distill_weight, args.distill_feature_weight) != (1, None)
    optimizer = str(getattr(args.optim, "value", args.optim))
    own_loss = "a contrastive model has its own loss"
    own_metrics = "a contrastive model is evaluated on all its embeddings"
    return [
        ("distill_weight or distill_feature_weight", idle_weights, "there's no teacher"),
        ("label_smoothing_factor", args.label_smoothing_factor, own_loss),
        ("compute_loss_func", trainer.compute_loss_func is not None, own_loss),
        ("compute_metrics", trainer.compute_metrics is not None, own_metrics),
        ("preprocess_logits_for_metrics", trainer.preprocess_logits_for_metrics is not None, own_metrics),
        ("batch_eval_metrics", args.batch_eval_metrics, own_metrics),
        ("eval_do_concat_batches=False", not args.eval_do_concat_batches, own_metrics),
        ("include_for_metrics", args.include_for_metrics, own_metrics),
        ("prediction_loss_only", args.prediction_loss_only, own_metrics),
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


__all__ = ["DiffCLIPTrainingArguments", "check_arguments"]
