"""Image-text pairs and training arguments for the trainer's tests."""

from pathlib import Path
from typing import Any

import torch
from tiny import EOS, randomised, tiny_config, tiny_inputs
from tokenizer_helper import BYTES
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from training_samples import tiny_processor

from diffclip_hf import DiffCLIPForImageClassification, DiffCLIPModel
from diffclip_hf.training import DiffCLIPTrainingArguments, ZeroShotTask


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


class Stream(IterableDataset):
    """Pairs that a process and a worker take their share of, in an order that the epoch decides."""

    splits_itself = True

    def __init__(self, count: int = 24, processes: int = 1, rank: int = 0):
        self.pairs, self.processes, self.rank = Pairs(count), processes, rank
        self.epoch = self.position = 0
        self.calls = []

    def __len__(self) -> int:
        return len(self.pairs) // self.processes

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.calls.append(("epoch", epoch))

    def set_position(self, epoch: int, batches: int) -> None:
        self.position = batches
        self.calls.append(("position", epoch, batches))

    def order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(epoch)
        return torch.randperm(len(self.pairs), generator=generator).tolist()[self.rank :: self.processes]

    def __iter__(self):
        worker = get_worker_info()
        share = self.order(self.epoch)
        share = share if worker is None else share[worker.id :: worker.num_workers]
        for index in share:
            yield {"index": torch.tensor(index), **self.pairs[index]}


def stream_collate(rows: list[dict]) -> dict[str, Any]:
    return collate([{name: value for name, value in row.items() if name != "index"} for row in rows])


class LabelledImages(Dataset):
    def __init__(self, count: int = 12):
        self.images = tiny_inputs(2, count)["pixel_values"]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": self.images[index], "labels": index % 3}


def collate_labels(rows: list[dict]) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def classifier() -> DiffCLIPForImageClassification:
    return randomised(DiffCLIPForImageClassification(tiny_config(num_labels=3)))


# The tiny tokenizer's, and the end-of-text token of tiny_inputs.
TEXT = {**BYTES, "eos_token_id": [EOS, BYTES["eos_token_id"]]}
LABELS = {"cat": ["cat", "kitten"], "dog": "dog", "house": "a very old house"}
TEMPLATES = ["a {}.", "this is a picture of a {}."]


def zero_shot_parts() -> dict:
    return {
        "model": randomised(DiffCLIPModel(tiny_config(text=TEXT))),
        "processing_class": tiny_processor(),
        "zero_shot": ZeroShotTask(LabelledImages(10), collate_labels, LABELS, TEMPLATES),
    }


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
