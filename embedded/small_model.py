"""The small models of the embedded folder: their sizes, and how they are trained and saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback

from diffclip_hf import (
    DiffCLIPConfig,
    DiffCLIPImageProcessorPil,
    DiffCLIPModel,
    DiffCLIPProcessor,
    add_remote_code,
)
from diffclip_hf.common.machine import cpu_has_bf16
from diffclip_hf.training import DiffCLIPTrainer, DiffCLIPTrainingArguments


IMAGE_SIZE = 48
CONTEXT_LENGTH = 32
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
# The paper's four models: what each changes in the configuration of DiffCLIP.
VARIANTS: dict[str, dict[str, dict[str, str]]] = {
    "clip": {
        "vision_config": {"attention_type": "standard"},
        "text_config": {"attention_type": "standard"},
    },
    "diffclip": {},
    "diffclip-star": {"vision_config": {"lambda_init": "depth"}, "text_config": {"lambda_init": "depth"}},
    "diffclip-dagger": {"text_config": {"attention_type": "standard"}},
}


def build_model(
    vocab_size: int, variant: str = "diffclip", sizes: dict[str, dict[str, int]] | None = None
) -> DiffCLIPModel:
    """Return an untrained model, a key of `VARIANTS`, small enough for the repository in float16.

    Args:
        vocab_size: Of its tokenizer.
        variant: One of the paper's four.
        sizes: Fields of both towers' configurations that are to differ.
    """
    changes: dict[str, dict[str, Any]] = {
        tower: {**VARIANTS[variant].get(tower, {}), **(sizes or {}).get(tower, {})}
        for tower in ("vision_config", "text_config")
    }
    model = DiffCLIPModel(
        DiffCLIPConfig(
            projection_dim=128,
            vision_config={
                "hidden_size": 160,
                "intermediate_size": 640,
                "num_hidden_layers": 5,
                "num_attention_heads": 8,
                "image_size": IMAGE_SIZE,
                "patch_size": 8,
                **changes["vision_config"],
            },
            text_config={
                "hidden_size": 96,
                "intermediate_size": 384,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "vocab_size": vocab_size,
                "max_position_embeddings": CONTEXT_LENGTH,
                "bos_token_id": vocab_size - 2,
                "eos_token_id": vocab_size - 1,
                "pad_token_id": vocab_size - 1,
                **changes["text_config"],
            },
        )
    )
    # On a CPU, at 37 tokens, the fastest.
    model.set_attn_implementation("eager")
    return model


class EmojiIndices(Dataset):
    """The emoji's indices; the collator picks drawing and caption.

    An epoch goes through each emoji once, so that a batch never holds one twice, whose pairs would count as wrong.
    """

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


def make_trainer(
    model: DiffCLIPModel,
    count: int,
    collator: Callable[[list[int]], dict],
    output_dir: Path,
    callbacks: list[TrainerCallback] | None = None,
    teacher: DiffCLIPModel | None = None,
    **changes: Any,
) -> DiffCLIPTrainer:
    """Return a trainer with the settings of the small models, but for `changes` of its arguments.

    Args:
        model: What to train.
        count: How many emoji there are.
        collator: Makes a batch of their indices.
        output_dir: For checkpoints.
        callbacks: Further ones.
        teacher: A frozen model to learn from, too.
        changes: Of `DiffCLIPTrainingArguments`.
    """
    settings = {
        "num_train_epochs": 500,
        "per_device_train_batch_size": 256,
        "learning_rate": 1e-3,
        "weight_decay": 0.2,
        "adam_beta2": 0.98,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 100,
        "max_grad_norm": 1.0,
        "logging_steps": 50,
        "save_strategy": "steps",
        "save_steps": 100,
        "save_total_limit": 1,
        "dataloader_drop_last": True,
        "report_to": "none",
        "use_cpu": True,
        # Autocast; the weights stay float32. Without the instructions it is 25 times as slow as float32.
        "bf16": cpu_has_bf16(),
    }
    return DiffCLIPTrainer(
        model=model,
        args=DiffCLIPTrainingArguments(output_dir=str(output_dir), **{**settings, **changes}),
        train_dataset=EmojiIndices(count),
        data_collator=collator,
        callbacks=callbacks,
        teacher=teacher,
    )


def make_processor(tokenizer: PreTrainedTokenizerBase) -> DiffCLIPProcessor:
    """Return what makes the model's inputs."""
    image_processor = DiffCLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    return DiffCLIPProcessor(image_processor, tokenizer)


def save(model: DiffCLIPModel, processor: DiffCLIPProcessor, folder: Path) -> None:
    """Write the model with its processor and its code: stored in float16, to be loaded as float32."""
    model.half().save_pretrained(folder)
    for config in (model.config, model.config.text_config, model.config.vision_config):
        config.dtype = torch.float32
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    add_remote_code(folder)
