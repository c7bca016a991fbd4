"""Judging a whole pass over data by what was dropped in all processes."""

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from transformers.utils import logging


logger = logging.get_logger(__name__)


class DataPass:
    """Judges what the data set and the collator of one pass over data drop, in all processes together.

    It begins when it's made. Only parts with `counts` and `check` are judged.
    """

    def __init__(self, dataset: Any, collator: Any):
        self._parts = [part for part in (dataset, collator) if hasattr(part, "counts") and hasattr(part, "check")]
        self._before = [dict(part.counts) for part in self._parts]

    def end(self, name: str) -> None:
        """Log what this process counted in the pass, called by its name.

        Raises:
            ValueError: More was dropped than allowed, however little there was; in every process alike.
        """
        for part, before in zip(self._parts, self._before, strict=True):
            counts = {kind: number - before[kind] for kind, number in part.counts.items()}
            logger.info(f"{type(part).__name__} after {name}: {counts}")
            own = torch.tensor([list(counts.values())], device=PartialState().device)
            part.check(dict(zip(counts, gather(own).sum(0).tolist(), strict=True)))


__all__ = ["DataPass"]
