"""Contrastive training: the trainer, and the parts that it is made of."""

from .trainer import DiffCLIPTrainer, DiffCLIPTrainingArguments, ZeroShotTask


__all__ = ["DiffCLIPTrainer", "DiffCLIPTrainingArguments", "ZeroShotTask"]
