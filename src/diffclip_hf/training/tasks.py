"""The two tasks of the command, and what each gives the trainer: a model, data and collators."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from ..common.fitting import processor_differences
from ..common.loading import FULL_LENGTH_MODELS
from ..data import (
    ImageLabelCollator,
    ImageTextCollator,
    TeacherCollator,
    load_image_label_dataset,
    load_image_text_dataset,
)
from ..data.label_names import check_seen, match_labels, renumbered
from ..model.processing_diffclip import DiffCLIPProcessor
from ..zero_shot import label_texts
from .arguments import DiffCLIPTrainingArguments
from .metrics import ZeroShotTask
from .models import build_model, build_teacher, classifier_labels
from .options import DataArguments, ModelArguments, zero_shot_templates


logger = logging.getLogger(__name__)


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
    teacher: Any = None


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

    def collator(
        train: bool, processor: Any = processor, pad_to_max_length: bool = data_args.pad_to_max_length
    ) -> ImageTextCollator:
        return ImageTextCollator(
            processor,
            train=train,
            crop_scale=data_args.crop_scale,
            seed=training_args.seed,
            max_skipped_share=data_args.max_skipped_share,
            pad_to_max_length=pad_to_max_length,
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
        parts.zero_shot = _zero_shot_task(data_args.zero_shot_data, data_args, processor)
    if model_args.teacher is not None:
        parts.teacher, teacher_processor = build_teacher(model_args.teacher)
        differences = processor_differences(processor, teacher_processor)
        logger.info("The teacher has %s.", f"its own inputs: {differences[0]}" if differences else "the same inputs")
        if differences:
            is_full = parts.teacher.config.model_type in FULL_LENGTH_MODELS
            theirs = collator(True, teacher_processor, pad_to_max_length=is_full or data_args.pad_to_max_length)
            parts.train_collator = TeacherCollator(parts.train_collator, theirs)
    return parts


def _zero_shot_task(source: str, data_args: DataArguments, processor: DiffCLIPProcessor) -> ZeroShotTask:
    """Return the labelled images of which each evaluation measures the accuracy."""
    dataset, labels = load_image_label_dataset(
        source,
        split=data_args.zero_shot_split,
        image_column=data_args.image_column,
        label_column=data_args.label_column,
    )
    templates = zero_shot_templates(data_args)
    # Labels that make no texts would stop the first evaluation, which may be hours away.
    label_texts(labels, templates)
    collator = ImageLabelCollator(processor, train=False, max_skipped_share=data_args.max_skipped_share)
    return ZeroShotTask(dataset, collator, labels, templates)


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


__all__ = ["Parts", "accuracy", "classification_parts", "contrastive_parts"]
