"""Measuring a model by the paper's protocols; `python -m diffclip_hf.evaluate` is its command."""

from ..common.embedding_cache import EmbeddingCache
from .clip_benchmark import load_for_clip_benchmark, register
from .encoder import Encoder
from .report import markdown_table, mean_metrics
from .specs import DatasetSpec, find_dataset, preset_names, read_preset
from .tasks import RUN_TASK, TaskOptions


__all__ = [
    "RUN_TASK",
    "DatasetSpec",
    "EmbeddingCache",
    "Encoder",
    "TaskOptions",
    "find_dataset",
    "load_for_clip_benchmark",
    "markdown_table",
    "mean_metrics",
    "preset_names",
    "read_preset",
    "register",
]
