"""Contrastive training: the trainer, and the parts that it is made of."""

from .arguments import DiffCLIPTrainingArguments
from .metrics import ZeroShotTask
from .trainer import DiffCLIPTrainer


__all__ = ["DiffCLIPTrainer", "DiffCLIPTrainingArguments", "ZeroShotTask"]
