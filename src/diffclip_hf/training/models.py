"""The models that the command trains: saved ones, new ones, classifiers, and those with LoRA adapters."""

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..common.loading import check_tokenizer, load_config, load_model, load_processor, load_tokenizer
from ..model.configuration_diffclip import DiffCLIPConfig
from ..model.image_processing_diffclip import DiffCLIPImageProcessorPil
from ..model.modeling_diffclip import DiffCLIPForImageClassification, DiffCLIPModel
from ..model.processing_diffclip import DiffCLIPProcessor, DiffCLIPTokenizer
from .model_configs import build_config
from .options import ModelArguments


logger = logging.getLogger(__name__)
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
# What a fine-tune adds to a model that was trained on captions.
NEW_WEIGHTS = ("classifier.",)


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


def _with_lora(model: PreTrainedModel, args: ModelArguments, modules_to_save: list[str] | None) -> nn.Module:
    """Return the model with LoRA adapters on the attention's projections, which alone are trained."""
    from peft import LoraConfig, get_peft_model

    # The adapters' folder names its base: a folder by a path that holds from everywhere.
    base = args.model_name_or_path
    if base is not None and os.path.isdir(base):
        model.name_or_path = os.path.abspath(base)
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


def build_teacher(name: str) -> tuple[Any, Any]:
    """Return a model to learn from, in float32, and its processor."""
    teacher = load_model(name, dtype=torch.float32)
    return teacher, load_processor(name, teacher.config)


__all__ = ["build_model", "build_processor", "build_teacher", "classifier_labels"]
