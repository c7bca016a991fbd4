"""Train or fine-tune DiffCLIP from the command line.

    python -m diffclip_hf.train --model_name_or_path MODEL --train_data DATA --output_dir FOLDER [OPTION ...]
    accelerate launch -m diffclip_hf.train --config FILE --train_data DATA --output_dir FOLDER [OPTION ...]
    python -m diffclip_hf.train --help

FILE is a YAML or JSON file of options, or a recipe with the paper's settings, such as `diffclip-vitb16`. Options on
the command line override it. They are those of `ModelArguments` and `DataArguments`, `contrastive_chunk_size`, and
those of Transformers' `TrainingArguments`.
"""

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .common.commands import run_command, stop_without_extra
from .common.loading import check_path, check_tokenizer, load_config, load_model, load_processor, load_tokenizer
from .common.whole_files import check_output_file
from .data import ImageLabelCollator, ImageTextCollator, load_image_label_dataset, load_image_text_dataset
from .data.label_names import check_seen, match_labels, renumbered
from .model.configuration_diffclip import DiffCLIPConfig
from .model.image_processing_diffclip import DiffCLIPImageProcessorPil
from .model.modeling_diffclip import DiffCLIPForImageClassification, DiffCLIPModel
from .model.processing_diffclip import DiffCLIPProcessor, DiffCLIPTokenizer
from .zero_shot import label_texts


try:
    # Transformers' Trainer needs it, and says so in many lines.
    import accelerate  # noqa: F401
    from transformers import set_seed
    from transformers.trainer import TRAINER_STATE_NAME

    from .training import DiffCLIPTrainer, DiffCLIPTrainingArguments, ZeroShotTask
    from .training.checkpoints import last_checkpoint
    from .training.model_configs import build_config
    from .training.options import CONTRASTIVE, DataArguments, ModelArguments, zero_shot_templates
    from .training.parsing import parse_arguments
except ModuleNotFoundError as error:
    stop_without_extra(error, "training", __name__)


logger = logging.getLogger(__name__)
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
# What is written when the training is done.
OUTPUT_FILES = ("training_args.bin", "config.json", "model.safetensors", "trainer_state.json", "all_results.json")
# What a fine-tune adds to a model that was trained on captions.
NEW_WEIGHTS = ("classifier.",)


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


# Models -------------------------------------------------------------------------------------------------------------


def build_processor(config: DiffCLIPConfig, tokenizer: str) -> DiffCLIPProcessor:
    """Return the processor of a model that starts from random weights, and note the tokenizer's ids in `config`.

    Raises:
        ValueError: There is no such tokenizer, it's empty, or it has more tokens than the configuration.
    """
    text_config, side = config.text_config, config.vision_config.image_size
    loaded = load_tokenizer(tokenizer, DiffCLIPTokenizer)
    if len(loaded) > text_config.vocab_size:
        raise ValueError(
            f"The tokenizer {tokenizer!r} has {len(loaded)} tokens; vocab_size, {text_config.vocab_size}, must be at "
            "least as many."
        )
    loaded.model_max_length = text_config.max_position_embeddings
    text_config.bos_token_id, text_config.eos_token_id = loaded.bos_token_id, loaded.eos_token_id
    text_config.pad_token_id = loaded.pad_token_id
    check_tokenizer(loaded, config, tokenizer)
    image_processor = DiffCLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    return DiffCLIPProcessor(image_processor, loaded)


def classifier_labels(name: str) -> list[str] | None:
    """Return the labels that a saved classifier tells apart, in its order; None of other models."""
    config: Any = load_config(name, DiffCLIPConfig)
    if DiffCLIPForImageClassification.__name__ not in (config.architectures or []):
        return None
    names: Any = config.id2label
    return [names[index] for index in range(len(names))]


def build_model(args: ModelArguments, labels: Sequence[str] | None) -> tuple[nn.Module, DiffCLIPProcessor]:
    """Return the model in float32, a classifier of `labels` if they are given, and its processor."""
    cls: Any = DiffCLIPModel if labels is None else DiffCLIPForImageClassification
    options: dict[str, Any] = {}
    if args.attn_implementation is not None:
        options["attn_implementation"] = args.attn_implementation
    names = {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}} if labels else {}
    if args.model_name_or_path is not None:
        name = args.model_name_or_path
        processor = load_processor(name, load_config(name, DiffCLIPConfig), DiffCLIPProcessor)
        new = () if labels is None else NEW_WEIGHTS
        # Float32 whatever the folder has: small updates are lost in half precision.
        model = load_model(name, cls, new=new, dtype=torch.float32, **names, **options)
        if labels is not None and (known := classifier_labels(name)) not in (None, list(labels)):
            logger.info("The classifier of %s is of other labels (%s, …) and starts anew.", name, known[0])
            for parameter in model.classifier.parameters():
                # Transformers leaves alone what was loaded.
                parameter._is_hf_initialized = False
            model._init_weights(model.classifier)
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
        templates = zero_shot_templates(data_args)
        # Labels that make no texts would stop the first evaluation, which may be hours away.
        label_texts(labels, templates)
        parts.zero_shot = ZeroShotTask(
            dataset,
            ImageLabelCollator(processor, train=False, max_skipped_share=data_args.max_skipped_share),
            labels,
            templates,
        )
    return parts


def accuracy(prediction: Any) -> dict[str, float]:
    """Return the share of images whose most likely label is theirs."""
    return {"accuracy": float(np.mean(np.argmax(prediction.predictions, axis=-1) == prediction.label_ids))}


def classification_parts(
    model_args: ModelArguments, data_args: DataArguments, training_args: DiffCLIPTrainingArguments
) -> Parts:
    """Return what trains a `DiffCLIPForImageClassification` on images with labels.

    Raises:
        ValueError: train_data has fewer than two labels, or eval_data one that train_data has no rows of.
    """
    columns = {"image_column": data_args.image_column, "label_column": data_args.label_column}
    assert data_args.train_data is not None
    train_dataset, labels = load_image_label_dataset(data_args.train_data, split=data_args.train_split, **columns)
    if len(labels) < 2:
        raise ValueError(f"train_data has {len(labels)} label; there must be at least 2 to tell apart.")
    known = None if model_args.model_name_or_path is None else classifier_labels(model_args.model_name_or_path)
    if known is not None and set(known) == set(labels):
        # Each label keeps what the classifier has learned of it.
        train_dataset = renumbered(train_dataset, match_labels(labels, known, "train_data", "the model"))
        labels = known
    eval_dataset = None
    if data_args.eval_data is not None:
        eval_dataset, eval_labels = load_image_label_dataset(
            data_args.eval_data, split=data_args.eval_split, **columns
        )
        eval_dataset = renumbered(eval_dataset, match_labels(eval_labels, labels, "eval_data", "train_data"))
        check_seen(eval_dataset["label"], train_dataset["label"], labels, "eval_data", "train_data")
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
        ValueError: The output folder has a checkpoint that isn't asked for, or none that is, or what is asked for is
            none.
    """
    asked, folder = training_args.resume_from_checkpoint, training_args.output_dir
    found = last_checkpoint(folder or "")
    if asked is None or asked.lower() in ("false", "no", "none"):
        if found is not None:
            raise ValueError(
                f"output_dir {folder} has {Path(found).name}; resume with --resume_from_checkpoint last, or name a "
                "new folder."
            )
        return None
    if asked.lower() not in ("last", "true", "yes"):
        path = check_path(asked, "resume_from_checkpoint")
        if not (path / TRAINER_STATE_NAME).is_file():
            raise ValueError(f"resume_from_checkpoint is {asked!r}, which has no {TRAINER_STATE_NAME}: no checkpoint.")
        return str(path)
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
    output = Path(training_args.output_dir or "")
    if output.exists() and not output.is_dir():
        raise ValueError(f"output_dir is {str(output)!r}, which is a file; name a folder.")
    if training_args.should_save:
        for name in OUTPUT_FILES:
            check_output_file(output / name)
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
    if parts.eval_dataset is not None or parts.zero_shot is not None:
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
    return run_command(lambda: run(*parse_arguments(sys.argv[1:] if argv is None else argv)), logger)


if __name__ == "__main__":
    sys.exit(main())
