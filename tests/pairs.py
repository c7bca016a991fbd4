"""Image-text pairs and training arguments for the trainer's tests."""

from pathlib import Path
from typing import Any

import torch
from tiny import tiny_inputs
from torch.utils.data import Dataset

from diffclip_hf.trainer import DiffCLIPTrainingArguments


class Pairs(Dataset):
    """The first `count` of 24 random pairs, whose texts have different lengths."""

    def __init__(self, count: int = 24):
        self.inputs = tiny_inputs(24, 24, length=30)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index >= self.count:
            raise IndexError(index)
        return {name: value[index] for name, value in self.inputs.items()}


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    return {**{name: torch.stack([row[name] for row in rows]) for name in rows[0]}, "return_loss": True}


def arguments(folder: Path, cls: type = DiffCLIPTrainingArguments, **kwargs: Any) -> Any:
    """Two steps of plain gradient descent, whose weights show a gradient's error without magnifying it."""
    return cls(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "remove_unused_columns": False,
            "optim": "sgd",
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "max_steps": 2,
            "logging_steps": 1,
            "save_strategy": "no",
        }
        | kwargs
    )
