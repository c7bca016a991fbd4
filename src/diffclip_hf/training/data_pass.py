"""Judging a whole pass over data by what was dropped in all processes."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from transformers.utils import logging


logger = logging.get_logger(__name__)


def log_samples(name: str, part: Any, counts: Mapping[str, int]) -> None:
    """Log what a data set or a collator counted in `name`."""
    said = ", ".join(f"{number} {kind.replace('_', ' ')}" for kind, number in counts.items())
    logger.info(f"Samples in {name}: {said} ({type(part).__name__})")


class DataPass:
    """Judges what the data set and the collator of passes over data drop, in all processes together.

    The first pass begins when it's made. Passes are judged together, for one that's cut short, as training's last may
    be, says too little of the data. Only parts with `counts` and `check` are judged.

    Args:
        dataset, collator: What the passes are made by.
        seen_before: How many rows of all processes were judged before, as by the run that this one resumes.
    """

    def __init__(self, dataset: Any, collator: Any, seen_before: int = 0):
        self._parts = [part for part in (dataset, collator) if hasattr(part, "counts") and hasattr(part, "check")]
        self._totals = [{"seen": seen_before} for _ in self._parts]
        self.begin()

    def begin(self) -> None:
        """Begin another pass."""
        self._before = [dict(part.counts) for part in self._parts]

    def end(self, name: str) -> None:
        """Log what this process counted in the pass, called by its name.

        Raises:
            ValueError: More was dropped than allowed, however little there was; in every process alike.
        """
        for part, before, total in zip(self._parts, self._before, self._totals, strict=True):
            counts = {kind: number - before[kind] for kind, number in part.counts.items()}
            log_samples(name, part, counts)
            own = torch.tensor([list(counts.values())], device=PartialState().device)
            for kind, number in zip(counts, gather(own).sum(0).tolist(), strict=True):
                total[kind] = total.get(kind, 0) + number
            part.check(total)


__all__ = ["DataPass", "log_samples"]
