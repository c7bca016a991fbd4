"""The options of `python -m diffclip_hf.train`: what they are, what they may be, and which go together."""

import argparse
import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import IntervalStrategy, SchedulerType

from ..common.commands import one_line, require_extra
from ..common.json_files import parse_json_object
from ..common.loading import load_config
from ..common.options import OptionParser, check_names, read_options
from ..data.shards import names_shards
from ..model.configuration_diffclip import DiffCLIPConfig
from ..zero_shot import label_texts
from ..zero_shot_templates import IMAGENET_TEMPLATES
from .arguments import DiffCLIPTrainingArguments


CONTRASTIVE, CLASSIFICATION = "contrastive", "image-classification"
RECIPES = resources.files(__package__) / "recipes"
DESCRIPTION = """Train or fine-tune DiffCLIP from the command line.

    accelerate launch -m diffclip_hf.train --config FILE [--option value ...]
    python -m diffclip_hf.train --help

FILE is a YAML or JSON file of options, or the name of one of the package's recipes, such as `diffclip-vitb16` (the
paper's settings); options on the command line override it. The options are those of Transformers' TrainingArguments,
`contrastive_chunk_size`, and those of `ModelArguments` and `DataArguments`.
"""
# Of a configuration's JSON, what isn't among its fields.
CONFIG_EXTRAS = ("auto_map", "num_labels", "output_attentions", "torch_dtype", "_name_or_path")
# What YAML's booleans and null stand for in options that take words.
BOOLEAN_WORDS: dict[str, dict[bool | None, Any]] = {
    "resume_from_checkpoint": {True: "last", False: None},
    "report_to": {False: "none", None: "none"},
    "fsdp": {True: True, False: None},
    "trackio_static_space_id": {False: False},
}


@dataclass
class ModelArguments:
    """What is trained.

    Args:
        model_name_or_path: A DiffCLIP to go on from, a folder or an id on the Hub.
        model_config: Of a model that starts from random weights: `DiffCLIPConfig`'s fields, or a folder or an id.
        tokenizer: A CLIP tokenizer, a folder or an id, for a model that starts from random weights.
        task: `"contrastive"`, on images with captions, or `"image-classification"`, on images with labels.
        linear_probe: Whether a classifier's image tower stays as it is.
        lora_rank: The rank of LoRA adapters on the attention's projections, which alone are trained; 0 for none.
        lora_alpha: Their scale, over the rank; by default twice the rank.
        lora_dropout: The dropout before them.
        attn_implementation: As in `from_pretrained`.
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A DiffCLIP to go on from: a folder or an id on the Hub."}
    )
    model_config: str | None = field(
        default=None,
        metadata={
            "help": "Of a model that starts from random weights: DiffCLIPConfig's fields as JSON, {} for ViT-B/16, or "
            "a folder or an id on the Hub."
        },
    )
    tokenizer: str = field(
        default="openai/clip-vit-base-patch16",
        metadata={"help": "A CLIP tokenizer for a model that starts from random weights: a folder or an id."},
    )
    task: str = field(
        default=CONTRASTIVE, metadata={"help": "What to train for.", "choices": [CONTRASTIVE, CLASSIFICATION]}
    )
    linear_probe: bool = field(default=False, metadata={"help": "Whether a classifier's image tower stays as it is."})
    lora_rank: int = field(
        default=0, metadata={"help": "Train LoRA adapters of this rank on q, k, v and out alone; 0 for none."}
    )
    lora_alpha: float | None = field(default=None, metadata={"help": "LoRA's scale; by default twice the rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA's dropout."})
    attn_implementation: str | None = field(default=None, metadata={"help": "As in from_pretrained."})


@dataclass
class DataArguments:
    """What it is trained and evaluated on.

    Args:
        train_data: Images with captions, as `load_image_text_dataset` takes them, or with labels, as
            `load_image_label_dataset` does.
        train_split: Which part of it.
        eval_data, eval_split: Likewise, to evaluate on; recall and loss, or accuracy.
        zero_shot_data, zero_shot_split: Images with labels, for a contrastive model's zero-shot accuracy.
        zero_shot_templates: Prompts with `{}` for the label, or `imagenet` for the 80 that ImageNet is measured with.
        image_column, caption_column, label_column: Where they aren't called as usual.
        crop_scale: The least and the largest share of an image's area that a training crop has.
        global_batch_size: Pairs in a step over all processes, instead of `per_device_train_batch_size`.
        shuffle_buffer, max_skipped_share, max_broken_share: As in `load_image_text_dataset`.
        pad_to_max_length: As in `ImageTextCollator`.
    """

    train_data: str | None = field(
        default=None,
        metadata={"help": "Tar shards, Parquet files, a folder or a data set on the Hub, with captions or labels."},
    )
    train_split: str = field(default="train", metadata={"help": "Which part of train_data."})
    eval_data: str | None = field(default=None, metadata={"help": "Likewise, to evaluate on."})
    eval_split: str = field(default="validation", metadata={"help": "Which part of eval_data."})
    zero_shot_data: str | None = field(
        default=None, metadata={"help": "Images with labels, for a contrastive model's zero-shot accuracy."}
    )
    zero_shot_split: str = field(default="validation", metadata={"help": "Which part of zero_shot_data."})
    zero_shot_templates: list[str] = field(
        default_factory=lambda: ["This is a photo of {}."],
        metadata={"help": "Prompts with {} for the label, or imagenet for the 80 of ImageNet."},
    )
    image_column: str | None = field(default=None, metadata={"help": "The images' column, if not called as usual."})
    caption_column: str | None = field(default=None, metadata={"help": "The captions' column, likewise."})
    label_column: str | None = field(default=None, metadata={"help": "The labels' column, likewise."})
    crop_scale: list[float] = field(
        default_factory=lambda: [0.5, 1.0],
        metadata={"help": "The least and the largest share of an image that a training crop has."},
    )
    global_batch_size: int | None = field(
        default=None, metadata={"help": "Pairs in a step over all processes, for per_device_train_batch_size."}
    )
    shuffle_buffer: int = field(default=1000, metadata={"help": "Samples of tar shards that a worker draws from."})
    max_skipped_share: float = field(default=0.01, metadata={"help": "The largest share of samples without use."})
    max_broken_share: float = field(default=0.1, metadata={"help": "The largest share of broken tar shards."})
    pad_to_max_length: bool = field(default=False, metadata={"help": "Whether texts are padded to full length."})


def zero_shot_templates(data_args: DataArguments) -> list[str]:
    """Return the templates, ImageNet's written out."""
    templates = data_args.zero_shot_templates
    return list(IMAGENET_TEMPLATES) if templates == ["imagenet"] else templates


# Reading ------------------------------------------------------------------------------------------------------------


def read_config(name: str) -> dict[str, Any]:
    """Return the options in a YAML or JSON file, or in the package's recipe of that name.

    Raises:
        ValueError: There is no such file or recipe, or it doesn't hold options.
    """
    recipe = RECIPES / f"{name}.yaml"
    path = Path(name)
    if not path.is_file() and not recipe.is_file():
        names = sorted(entry.name.removesuffix(".yaml") for entry in RECIPES.iterdir() if entry.name.endswith(".yaml"))
        raise ValueError(f"--config is {name!r}; it must be a file or one of the recipes {', '.join(names)}.")
    options = read_options(path if path.is_file() else Path(str(recipe)), f"--config {name}")
    if isinstance(options.get("model_config"), dict):
        options["model_config"] = json.dumps(options["model_config"], default=str)
    return options


def parse_arguments(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, DiffCLIPTrainingArguments]:
    """Return the options of a command line, over those of its `--config`.

    Raises:
        ValueError: The configuration can't be read, an option doesn't exist, its value isn't of its type, it would
            have no effect, or options contradict.
    """
    parser = OptionParser(
        (ModelArguments, DataArguments, DiffCLIPTrainingArguments),
        BOOLEAN_WORDS,
        prog="python -m diffclip_hf.train",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="a file of options, or a recipe's name")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", nargs="?", action="append")
    names = [name for name in first.parse_known_args(argv)[0].config or [] if name is not None]
    if len(names) > 1:
        raise ValueError(f"--config is given {len(names)} times; put the options into one file.")
    options = read_config(names[0]) if names else {}
    what = f"--config {names[0]}" if names else "the command line"
    model_args, data_args, training_args = parser.parse(argv, options, what)
    _check(model_args, data_args, training_args, given=parser.given(argv) | options.keys())
    return model_args, data_args, training_args


def config_from_fields(fields: dict[str, Any], what: str = "model_config") -> DiffCLIPConfig:
    """Return a configuration from its fields, each of which has to be one.

    Raises:
        ValueError: A field isn't one of a configuration or of its towers, or hasn't the right kind.
    """
    default = DiffCLIPConfig()
    towers = {name: getattr(default, name) for name in default.sub_configs}
    for config, given, where in (
        (default, fields, what),
        *((towers[name], fields.get(name), f"{name} of {what}") for name in towers),
    ):
        if given is None:
            continue
        if not isinstance(given, dict):
            raise ValueError(f"{where} is {given!r}; it must hold fields by name, as in {{...}}.")
        check_names(given, {*config.to_dict(), *CONFIG_EXTRAS}, where, "a field")
        model_type = given.get("model_type", config.model_type)
        if model_type != config.model_type:
            raise ValueError(f"model_type in {where} is {model_type!r}; it must be {config.model_type!r}.")
    try:
        return DiffCLIPConfig(**fields)
    # What Transformers' own fields raise for a value of another kind.
    except (AttributeError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"{what} has a field of the wrong kind: {one_line(error)}.") from error


def build_config(model_config: str) -> DiffCLIPConfig:
    """Return a configuration from its fields as JSON, or from a folder, a file or the Hub.

    Raises:
        ValueError: The fields aren't JSON or aren't a configuration's, or there is no such configuration.
    """
    if model_config.lstrip().startswith("{"):
        return config_from_fields(parse_json_object(model_config, f"model_config {model_config}"))
    path = Path(model_config).expanduser()
    if path.is_file():
        return config_from_fields(read_options(path, f"model_config {model_config}"), f"model_config {model_config}")
    return load_config(model_config, DiffCLIPConfig)  # type: ignore[return-value]


# Checks -------------------------------------------------------------------------------------------------------------


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
        ("linear_probe",), lambda model, data, args: model.task == CLASSIFICATION, f"without task={CLASSIFICATION!r}"
    ),
    _Effect(
        ("caption_column", "pad_to_max_length", "contrastive_chunk_size", "zero_shot_data"),
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
        known |= {f"{way}_recall@{k}" for way in ways for k in (1, 5, 10)}
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


def _check(
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


__all__ = [
    "CLASSIFICATION",
    "CONTRASTIVE",
    "DataArguments",
    "ModelArguments",
    "build_config",
    "config_from_fields",
    "parse_arguments",
    "read_config",
    "zero_shot_templates",
]
