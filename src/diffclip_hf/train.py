"""Train or fine-tune DiffCLIP from the command line.

    accelerate launch -m diffclip_hf.train --config FILE [--option value ...]
    python -m diffclip_hf.train --help

FILE is a YAML or JSON file of options, or the name of one of the package's recipes, such as `diffclip-vitb16` (the
paper's settings); options on the command line override it. The options are those of Transformers' TrainingArguments,
`contrastive_chunk_size`, and those of `ModelArguments` and `DataArguments` below.
"""

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn
from transformers import EvalPrediction, HfArgumentParser, set_seed
from transformers.utils import is_peft_available

from .checkpoints import last_checkpoint
from .configuration_diffclip import DiffCLIPConfig
from .image_processing_pil_diffclip import DiffCLIPImageProcessorPil
from .label_names import match_labels, renumbered
from .modeling_diffclip import DiffCLIPForImageClassification, DiffCLIPModel
from .processing_diffclip import DiffCLIPProcessor, DiffCLIPTokenizer
from .trainer import DiffCLIPTrainer, DiffCLIPTrainingArguments, ZeroShotTask
from .training_data import (
    ImageLabelCollator,
    ImageTextCollator,
    load_image_label_dataset,
    load_image_text_dataset,
)
from .zero_shot_templates import IMAGENET_TEMPLATES


logger = logging.getLogger(__name__)
CONTRASTIVE, CLASSIFICATION = "contrastive", "image-classification"
RECIPES = resources.files(__package__) / "recipes"
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


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


@dataclass
class Parts:
    """What a task gives the trainer."""

    model: nn.Module
    processor: DiffCLIPProcessor
    train_dataset: Any
    eval_dataset: Any
    train_collator: Any
    eval_collator: Any
    zero_shot: ZeroShotTask | None = None
    compute_metrics: Any = None


# Options ------------------------------------------------------------------------------------------------------------


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
    text = (path if path.is_file() else recipe).read_text(encoding="utf-8")
    try:
        # JSON is YAML too.
        options = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--config {name} isn't YAML or JSON: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"--config {name} holds a {type(options).__name__}; it must hold options by name.")
    return options


def parse_arguments(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, DiffCLIPTrainingArguments]:
    """Return the options of a command line, over those of its `--config`.

    Raises:
        ValueError: The configuration can't be read or has an option that doesn't exist, or options contradict.
    """
    classes = (ModelArguments, DataArguments, DiffCLIPTrainingArguments)
    parser = HfArgumentParser(
        classes,  # type: ignore[arg-type]
        prog="python -m diffclip_hf.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="a file of options, or a recipe's name")
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config")
    name = first.parse_known_args(argv)[0].config
    if name is not None:
        options = read_config(name)
        known = {one.name for cls in classes for one in dataclasses.fields(cls) if one.init}
        if unknown := sorted(set(options) - known):
            raise ValueError(f"--config {name} has {', '.join(unknown)}, which aren't options; see --help.")
        if isinstance(options.get("model_config"), dict):
            options["model_config"] = json.dumps(options["model_config"])
        parser.set_defaults(**options)
    model_args, data_args, training_args, _ = parser.parse_args_into_dataclasses(list(argv))
    _check(model_args, data_args, training_args)
    return model_args, data_args, training_args


def _check(model_args: ModelArguments, data_args: DataArguments, training_args: DiffCLIPTrainingArguments) -> None:
    """Raise a ValueError where options are missing or contradict each other; spread the global batch."""
    if (model_args.model_name_or_path is None) == (model_args.model_config is None):
        raise ValueError("Give either model_name_or_path, to go on from a model, or model_config, to start a new one.")
    if data_args.train_data is None:
        raise ValueError("train_data is missing; it must name the training data.")
    if model_args.linear_probe and model_args.task != CLASSIFICATION:
        raise ValueError(f"linear_probe is True with task={model_args.task!r}; it needs task={CLASSIFICATION!r}.")
    if model_args.linear_probe and model_args.lora_rank:
        raise ValueError(f"linear_probe is True and lora_rank is {model_args.lora_rank}; give one of them.")
    if model_args.lora_rank < 0:
        raise ValueError(f"lora_rank is {model_args.lora_rank}; it must be at least 0.")
    if model_args.lora_rank and not is_peft_available():
        raise ValueError(f"lora_rank is {model_args.lora_rank}, which needs peft; pip install peft.")
    if data_args.zero_shot_data is not None and model_args.task != CONTRASTIVE:
        raise ValueError(f"zero_shot_data is given with task={model_args.task!r}; it needs task={CONTRASTIVE!r}.")
    processes = training_args.world_size * training_args.gradient_accumulation_steps
    if data_args.global_batch_size is not None:
        if data_args.global_batch_size % processes:
            raise ValueError(
                f"global_batch_size is {data_args.global_batch_size}; it must be a multiple of {processes}, the "
                "processes times gradient_accumulation_steps."
            )
        training_args.per_device_train_batch_size = data_args.global_batch_size // processes


# Models -------------------------------------------------------------------------------------------------------------


def build_config(model_config: str) -> DiffCLIPConfig:
    """Return a configuration from its fields as JSON, or from a folder or the Hub.

    Raises:
        ValueError: The fields aren't JSON.
    """
    if not model_config.lstrip().startswith("{"):
        return DiffCLIPConfig.from_pretrained(model_config)
    try:
        return DiffCLIPConfig(**json.loads(model_config))
    except json.JSONDecodeError as error:
        raise ValueError(f"model_config is {model_config!r}, which isn't JSON: {error}") from error


def build_processor(config: DiffCLIPConfig, tokenizer: str) -> DiffCLIPProcessor:
    """Return the processor of a model that starts from random weights, and note the tokenizer's ids in `config`.

    Raises:
        ValueError: The tokenizer has more tokens than the configuration.
    """
    text_config, side = config.text_config, config.vision_config.image_size
    loaded = DiffCLIPTokenizer.from_pretrained(tokenizer)
    if len(loaded) > text_config.vocab_size:
        raise ValueError(
            f"The tokenizer {tokenizer!r} has {len(loaded)} tokens; vocab_size, {text_config.vocab_size}, must be at "
            "least as many."
        )
    loaded.model_max_length = text_config.max_position_embeddings
    text_config.bos_token_id, text_config.eos_token_id = loaded.bos_token_id, loaded.eos_token_id
    text_config.pad_token_id = loaded.pad_token_id
    image_processor = DiffCLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    return DiffCLIPProcessor(image_processor, loaded)


def build_model(args: ModelArguments, labels: Sequence[str] | None) -> tuple[nn.Module, DiffCLIPProcessor]:
    """Return the model in float32, a classifier of `labels` if they are given, and its processor."""
    cls: Any = DiffCLIPModel if labels is None else DiffCLIPForImageClassification
    options: dict[str, Any] = {}
    if args.attn_implementation is not None:
        options["attn_implementation"] = args.attn_implementation
    names = {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}} if labels else {}
    if args.model_name_or_path is not None:
        processor = DiffCLIPProcessor.from_pretrained(args.model_name_or_path)
        # Float32 whatever the folder has: small updates are lost in half precision.
        model = cls.from_pretrained(args.model_name_or_path, dtype=torch.float32, **names, **options)
    else:
        config = build_config(args.model_config or "")
        processor = build_processor(config, args.tokenizer)
        for name, value in names.items():
            setattr(config, name, value)
        model = cls._from_config(config, dtype=torch.float32, **options)
    if args.linear_probe:
        model.vision_model.requires_grad_(False)
    if args.lora_rank:
        model = _with_lora(model, args, modules_to_save=None if labels is None else ["classifier"])
    return model, processor


def _with_lora(model: nn.Module, args: ModelArguments, modules_to_save: list[str] | None) -> nn.Module:
    """Return the model with LoRA adapters on the attention's projections, which alone are trained."""
    from peft import LoraConfig, get_peft_model

    alpha = 2 * args.lora_rank if args.lora_alpha is None else args.lora_alpha
    return get_peft_model(
        model,
        LoraConfig(
            r=args.lora_rank,
            lora_alpha=alpha,  # type: ignore[arg-type]
            lora_dropout=args.lora_dropout,
            target_modules=LORA_TARGETS,
            modules_to_save=modules_to_save,
        ),
    )


# Tasks --------------------------------------------------------------------------------------------------------------


def contrastive_parts(
    model_args: ModelArguments, data_args: DataArguments, training_args: DiffCLIPTrainingArguments
) -> Parts:
    """Return what trains a `DiffCLIPModel` on images with captions."""
    model, processor = build_model(model_args, None)

    def load(source: str, split: str, batch_size: int, shuffle_buffer: int) -> Any:
        return load_image_text_dataset(
            source,
            split=split,
            image_column=data_args.image_column,
            caption_column=data_args.caption_column,
            batch_size=batch_size,
            seed=training_args.seed,
            shuffle_buffer=shuffle_buffer,
            max_broken_share=data_args.max_broken_share,
            max_skipped_share=data_args.max_skipped_share,
        )

    def collator(train: bool) -> ImageTextCollator:
        return ImageTextCollator(
            processor,
            train=train,
            crop_scale=data_args.crop_scale,
            seed=training_args.seed,
            max_skipped_share=data_args.max_skipped_share,
            pad_to_max_length=data_args.pad_to_max_length,
        )

    assert data_args.train_data is not None
    parts = Parts(
        model,
        processor,
        load(
            data_args.train_data,
            data_args.train_split,
            training_args.per_device_train_batch_size,
            data_args.shuffle_buffer,
        ),
        None,
        collator(train=True),
        collator(train=False),
    )
    if data_args.eval_data is not None:
        size = training_args.per_device_eval_batch_size
        parts.eval_dataset = load(data_args.eval_data, data_args.eval_split, size, 0)
    if data_args.zero_shot_data is not None:
        dataset, labels = load_image_label_dataset(
            data_args.zero_shot_data,
            split=data_args.zero_shot_split,
            image_column=data_args.image_column,
            label_column=data_args.label_column,
        )
        templates = data_args.zero_shot_templates
        parts.zero_shot = ZeroShotTask(
            dataset,
            ImageLabelCollator(processor, train=False, max_skipped_share=data_args.max_skipped_share),
            labels,
            IMAGENET_TEMPLATES if templates == ["imagenet"] else templates,
        )
    return parts


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of images whose most likely label is theirs."""
    return {"accuracy": float(np.mean(np.argmax(prediction.predictions, axis=-1) == prediction.label_ids))}


def classification_parts(
    model_args: ModelArguments, data_args: DataArguments, training_args: DiffCLIPTrainingArguments
) -> Parts:
    """Return what trains a `DiffCLIPForImageClassification` on images with labels.

    Raises:
        ValueError: eval_data has a label that train_data lacks.
    """
    columns = {"image_column": data_args.image_column, "label_column": data_args.label_column}
    assert data_args.train_data is not None
    train_dataset, labels = load_image_label_dataset(data_args.train_data, split=data_args.train_split, **columns)
    eval_dataset = None
    if data_args.eval_data is not None:
        eval_dataset, eval_labels = load_image_label_dataset(
            data_args.eval_data, split=data_args.eval_split, **columns
        )
        eval_dataset = renumbered(eval_dataset, match_labels(eval_labels, labels, "eval_data", "train_data"))
    model, processor = build_model(model_args, labels)
    train_collator, eval_collator = (
        ImageLabelCollator(
            processor,
            train=train,
            crop_scale=data_args.crop_scale,
            seed=training_args.seed,
            max_skipped_share=data_args.max_skipped_share,
        )
        for train in (True, False)
    )
    return Parts(
        model, processor, train_dataset, eval_dataset, train_collator, eval_collator, compute_metrics=accuracy
    )


# The run ------------------------------------------------------------------------------------------------------------


def resume_point(training_args: DiffCLIPTrainingArguments) -> str | None:
    """Return the checkpoint to resume from, None to start.

    Raises:
        ValueError: The output folder has a checkpoint that isn't asked for, or none that is.
    """
    asked, folder = training_args.resume_from_checkpoint, training_args.output_dir
    found = last_checkpoint(folder or "")
    if asked is None:
        if found is not None:
            raise ValueError(
                f"output_dir {folder} has {Path(found).name}; resume with --resume_from_checkpoint last, or name a "
                "new folder."
            )
        return None
    if asked.lower() not in ("last", "true"):
        return asked
    if found is None:
        raise ValueError(f"resume_from_checkpoint is {asked!r}, but output_dir {folder} has no complete checkpoint.")
    return found


def run(
    model_args: ModelArguments, data_args: DataArguments, training_args: DiffCLIPTrainingArguments
) -> dict[str, float]:
    """Train, evaluate and save as the options say; return the metrics.

    Raises:
        ValueError: An option doesn't fit the others, the data or the model.
        FloatingPointError, OSError: As `DiffCLIPTrainer.train` raises.
    """
    if "ACCELERATE_USE_CPU" in os.environ and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        # What `accelerate launch --num_processes 2` leaves where it finds no GPU, without a word.
        logger.warning(
            "accelerate started one process, though it was asked for several: without GPUs it starts them with "
            "--multi_gpu, or use torchrun; and pass --use_cpu."
        )
    checkpoint = resume_point(training_args)
    set_seed(training_args.seed)
    make_parts = contrastive_parts if model_args.task == CONTRASTIVE else classification_parts
    parts = make_parts(model_args, data_args, training_args)
    trainer = DiffCLIPTrainer(
        model=parts.model,
        args=training_args,
        train_dataset=parts.train_dataset,
        eval_dataset=parts.eval_dataset,
        data_collator=parts.train_collator,
        eval_data_collator=parts.eval_collator,
        processing_class=parts.processor,
        compute_metrics=parts.compute_metrics,
        zero_shot=parts.zero_shot,
    )
    trained = sum(parameter.numel() for parameter in parts.model.parameters() if parameter.requires_grad)
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in parts.model.parameters()}
    logger.info(
        "Training %d of %d parameters in %s on %d processes, %d samples a step.",
        trained,
        sum(parameter.numel() for parameter in parts.model.parameters()),
        " and ".join(sorted(dtypes)),
        training_args.world_size,
        training_args.per_device_train_batch_size * training_args.world_size,
    )
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    trainer.save_model()
    trainer.save_state()
    if parts.eval_dataset is not None:
        metrics |= trainer.evaluate()
    trainer.save_metrics("all", metrics, combined=False)
    if training_args.should_save:
        for name, collator in (("training", parts.train_collator), ("evaluation", parts.eval_collator)):
            logger.info("Samples in %s: %s", name, collator.counts)
    if training_args.push_to_hub:
        trainer.push_to_hub()
    # A process that leaves its group open at its exit may take the others' connections down with it.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return metrics


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 1, with the reason on the log, where an option or the data doesn't fit."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        run(*parse_arguments(sys.argv[1:] if argv is None else argv))
    except (ValueError, FileNotFoundError) as error:
        logger.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
