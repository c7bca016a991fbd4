"""What the options of `python -m diffclip_hf.train` may be, and which go together; it's said before the work."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import IntervalStrategy, SchedulerType

from ..common.commands import require_extra
from ..data.shard_files import names_shards
from ..model.image_fetching_diffclip import one_line
from ..zero_shot import label_texts
from .arguments import DiffCLIPTrainingArguments
from .metrics import RECALL_KS
from .model_configs import build_config
from .options import CLASSIFICATION, CONTRASTIVE, DataArguments, ModelArguments, zero_shot_templates


@dataclass
class _Effect:
    """When options have an effect.

    Args:
        options: Their names.
        holds: Says from all options whether they have.
        otherwise: What is the matter where they haven't, after `"… has no effect"`.
    """

    options: tuple[str, ...]
    holds: Callable[[ModelArguments, DataArguments, DiffCLIPTrainingArguments], bool]
    otherwise: str


def _any_shards(data_args: DataArguments) -> bool:
    return any(source is not None and names_shards(source) for source in (data_args.train_data, data_args.eval_data))


def _any_tables(data_args: DataArguments) -> bool:
    sources = (data_args.train_data, data_args.eval_data, data_args.zero_shot_data)
    return any(source is not None and not names_shards(source) for source in sources)


EFFECTS = (
    _Effect(("tokenizer",), lambda model, data, args: model.model_config is not None, "without model_config"),
    _Effect(("lora_alpha", "lora_dropout"), lambda model, data, args: model.lora_rank > 0, "without lora_rank"),
    _Effect(
        ("distill_weight", "distill_feature_weight"),
        lambda model, data, args: model.teacher is not None,
        "without teacher",
    ),
    _Effect(
        ("linear_probe",), lambda model, data, args: model.task == CLASSIFICATION, f"without task={CLASSIFICATION!r}"
    ),
    _Effect(
        ("caption_column", "pad_to_max_length", "contrastive_chunk_size", "zero_shot_data", "lock", "teacher"),
        lambda model, data, args: model.task == CONTRASTIVE,
        f"without task={CONTRASTIVE!r}",
    ),
    _Effect(
        ("zero_shot_split", "zero_shot_templates"),
        lambda model, data, args: data.zero_shot_data is not None,
        "without zero_shot_data",
    ),
    _Effect(("eval_split",), lambda model, data, args: data.eval_data is not None, "without eval_data"),
    _Effect(
        ("data_seed",),
        lambda model, data, args: not names_shards(data.train_data or ""),
        "on tar shards, whose order goes by seed",
    ),
    _Effect(
        ("train_split",),
        lambda model, data, args: not names_shards(data.train_data or ""),
        "on tar shards, of one part",
    ),
    _Effect(
        ("label_column",),
        lambda model, data, args: model.task == CLASSIFICATION or data.zero_shot_data is not None,
        f"without task={CLASSIFICATION!r} or zero_shot_data",
    ),
    _Effect(
        ("image_column", "caption_column"),
        lambda model, data, args: _any_tables(data),
        "on tar shards, without columns",
    ),
    _Effect(("shuffle_buffer", "max_broken_share"), lambda model, data, args: _any_shards(data), "without tar shards"),
    _Effect(
        ("per_device_train_batch_size",),
        lambda model, data, args: data.global_batch_size is None,
        "beside global_batch_size, of which it is a part",
    ),
    _Effect(
        ("logging_steps",),
        lambda model, data, args: args.logging_strategy == "steps",
        "without logging_strategy='steps'",
    ),
    _Effect(("save_steps",), lambda model, data, args: args.save_strategy == "steps", "without save_strategy='steps'"),
    _Effect(("eval_steps",), lambda model, data, args: args.eval_strategy == "steps", "without eval_strategy='steps'"),
    _Effect(
        ("hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy", "hub_always_push"),
        lambda model, data, args: args.push_to_hub,
        "without push_to_hub",
    ),
    _Effect(("fsdp_config",), lambda model, data, args: bool(args.fsdp), "without fsdp"),
    _Effect(
        ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
        lambda model, data, args: bool(args.gradient_checkpointing),
        "without gradient_checkpointing",
    ),
    _Effect(
        ("do_train", "do_eval", "do_predict"),
        lambda model, data, args: False,
        "here: train_data is trained on, and eval_data evaluated",
    ),
)


def _check_effects(
    model_args: ModelArguments, data_args: DataArguments, training_args: DiffCLIPTrainingArguments, given: set[str]
) -> None:
    """Raise a ValueError for an option that was given and would have no effect; false and null ask for none."""
    values: dict[str, Any] = {**vars(model_args), **vars(data_args), **vars(training_args)}
    for effect in EFFECTS:
        useless = [name for name in effect.options if name in given and values[name] not in (None, False)]
        if useless and not effect.holds(model_args, data_args, training_args):
            raise ValueError(f"{useless[0]} is given, but has no effect {effect.otherwise}.")


def _check_numbers(model_args: ModelArguments, data_args: DataArguments, args: DiffCLIPTrainingArguments) -> None:
    """Raise a ValueError for a number outside of what is allowed."""
    for owner, name, least in (
        (model_args, "lora_rank", 0),
        (data_args, "global_batch_size", 1),
        (args, "per_device_train_batch_size", 1),
        (args, "per_device_eval_batch_size", 1),
        (args, "gradient_accumulation_steps", 1),
        (args, "dataloader_num_workers", 0),
        (args, "warmup_steps", 0),
        (args, "learning_rate", 0),
        (args, "weight_decay", 0),
        (args, "max_grad_norm", 0),
        (args, "save_steps", 0),
        (args, "eval_steps", 0),
        (args, "save_total_limit", 1),
        (args, "dataloader_prefetch_factor", 1),
        (args, "adam_epsilon", 0),
    ):
        value = getattr(owner, name)
        # Not `<`, which NaN passes.
        if value is not None and not (value >= least and math.isfinite(value)):
            raise ValueError(f"{name} is {value}; it must be at least {least}.")
    for owner, name, is_allowed, allowed in (
        (args, "save_steps", args.save_steps > 0, "more than 0; save_strategy='no' saves no checkpoints"),
        (model_args, "lora_alpha", (alpha := model_args.lora_alpha) is None or 0 < alpha < math.inf, "more than 0"),
        (model_args, "lora_dropout", 0 <= model_args.lora_dropout < 1, "in 0..1, not 1"),
        (args, "adam_beta1", 0 <= args.adam_beta1 < 1, "in 0..1, not 1"),
        (args, "adam_beta2", 0 <= args.adam_beta2 < 1, "in 0..1, not 1"),
    ):
        if not is_allowed:
            raise ValueError(f"{name} is {getattr(owner, name)}; it must be {allowed}.")
    if args.max_steps != -1 and args.max_steps < 1:
        raise ValueError(f"max_steps is {args.max_steps}; it must be at least 1, or -1 to go by num_train_epochs.")
    if not (args.num_train_epochs > 0 and math.isfinite(args.num_train_epochs)):
        raise ValueError(f"num_train_epochs is {args.num_train_epochs}; it must be more than 0.")
    if any("=" not in part for part in (args.optim_args or "=").split(",")):
        raise ValueError(f"optim_args is {args.optim_args!r}; it must be like 'name=value,name=value'.")
    if len(data_args.crop_scale) != 2:
        raise ValueError(f"crop_scale is {data_args.crop_scale}; it must be two numbers, the least and the largest.")


def _check_scheduler(args: DiffCLIPTrainingArguments) -> None:
    """Raise a ValueError where the schedule of the learning rate can't be built."""
    for name in ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        value = getattr(args, name, None)
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{name} is {value!r}; it must hold fields by name, as in {{...}}.")
    kwargs: Any = copy.copy(args.lr_scheduler_kwargs)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 10, kwargs)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_type is {SchedulerType(args.lr_scheduler_type).value!r} with lr_scheduler_kwargs="
            f"{args.lr_scheduler_kwargs}: {one_line(error)}."
        ) from error


def _check_best_metric(model_args: ModelArguments, data_args: DataArguments, args: DiffCLIPTrainingArguments) -> None:
    """Raise a ValueError where the best model goes by a metric that evaluation doesn't give."""
    if args.metric_for_best_model is None:
        return
    known = {"loss"} if data_args.eval_data is not None else set()
    if model_args.task == CLASSIFICATION:
        known |= {"accuracy"} if data_args.eval_data is not None else set()
    else:
        ways = ("image_to_text", "text_to_image") if data_args.eval_data is not None else ()
        known |= {f"{way}_recall@{k}" for way in ways for k in RECALL_KS}
        known |= {"zero_shot_accuracy"} if data_args.zero_shot_data is not None else set()
    name = args.metric_for_best_model.removeprefix("eval_")
    if name not in known:
        raise ValueError(
            f"metric_for_best_model is {args.metric_for_best_model!r}; what is evaluated gives "
            f"{', '.join(sorted(known)) or 'nothing, without eval_data or zero_shot_data'}."
        )


def _check_reports(args: DiffCLIPTrainingArguments) -> None:
    """Raise a ValueError where training would be reported to what isn't installed."""
    reports = [args.report_to] if isinstance(args.report_to, str) else list(args.report_to or [])
    for name in reports:
        if name not in ("none", "all") and name not in get_available_reporting_integrations():
            raise ValueError(f"report_to is {name!r}, which isn't installed or doesn't exist; see --help.")


def check_options(
    model_args: ModelArguments, data_args: DataArguments, training_args: DiffCLIPTrainingArguments, given: set[str]
) -> None:
    """Raise a ValueError where options are missing or contradict each other; spread the global batch."""
    if (model_args.model_name_or_path is None) == (model_args.model_config is None):
        raise ValueError("Give either model_name_or_path, to go on from a model, or model_config, to start a new one.")
    if data_args.train_data is None:
        raise ValueError("train_data is missing; it must name the training data.")
    _check_numbers(model_args, data_args, training_args)
    if data_args.zero_shot_data is not None:
        label_texts(["a label"], zero_shot_templates(data_args))
    _check_effects(model_args, data_args, training_args, given)
    if model_args.linear_probe and model_args.lora_rank:
        raise ValueError(f"linear_probe is True and lora_rank is {model_args.lora_rank}; give one of them.")
    require_extra("training", *(["peft"] * bool(model_args.lora_rank)), *(["datasets"] * _any_tables(data_args)))
    evaluated = data_args.eval_data is not None or data_args.zero_shot_data is not None
    if training_args.eval_strategy != "no" and not evaluated:
        strategy = IntervalStrategy(training_args.eval_strategy).value
        raise ValueError(f"eval_strategy is {strategy!r}; it needs eval_data or zero_shot_data.")
    if training_args.fp16 and training_args.device.type == "cpu":
        raise ValueError("fp16 is True, which needs a GPU; bf16 works on a CPU too.")
    _check_scheduler(training_args)
    _check_best_metric(model_args, data_args, training_args)
    _check_reports(training_args)
    if model_args.model_config is not None:
        build_config(model_args.model_config)
    processes = training_args.world_size * training_args.gradient_accumulation_steps
    if data_args.global_batch_size is not None:
        if data_args.global_batch_size % processes:
            raise ValueError(
                f"global_batch_size is {data_args.global_batch_size}; it must be a multiple of {processes}, the "
                "processes times gradient_accumulation_steps."
            )
        training_args.per_device_train_batch_size = data_args.global_batch_size // processes


__all__ = ["check_options"]
