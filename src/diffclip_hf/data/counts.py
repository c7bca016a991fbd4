"""Counting what training has to pass over, in whichever process it is met."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info
from transformers.utils import logging

from ..model.processing_diffclip import check_text


logger = logging.get_logger(__name__)

# What a sample without a caption of use is counted as.
CAPTION_KINDS = ("empty_captions", "undecodable_captions")
# Fewer than this many samples say too little of the share that is skipped.
LEAST_SEEN = 1000
# A worker counts in a row of its own, since adding to a number that another process adds to may lose one of the two.
COUNTING_ROWS = 1024


def require_share(name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"{name} is {share}; it must be in 0..1.")


class SharedCounts:
    """Numbers that the workers of a DataLoader add to and the main process reads."""

    def __init__(self, *kinds: str):
        self.kinds = kinds
        self._table = torch.zeros(COUNTING_ROWS, len(kinds), dtype=torch.int64).share_memory_()

    def add(self, kind: str) -> None:
        worker = get_worker_info()
        row = 0 if worker is None else 1 + worker.id % (COUNTING_ROWS - 1)
        self._table[row, self.kinds.index(kind)] += 1

    def totals(self) -> dict[str, int]:
        return dict(zip(self.kinds, self._table.sum(0).tolist(), strict=True))


class SkipCounts:
    """Counts what is passed over, logs the first of each kind, and refuses more than a share of all."""

    def __init__(self, kinds: Sequence[str], max_share: float):
        require_share("max_skipped_share", max_share)
        self.max_share = max_share
        self._counts = SharedCounts("seen", *kinds)
        self._example = "the log names the first of each kind"

    @property
    def counts(self) -> dict[str, int]:
        return self._counts.totals()

    def see(self) -> None:
        self._counts.add("seen")

    def skip(self, kind: str, which: str, reason: str) -> None:
        """Count one more, and say which it was if it's the first of its kind."""
        self._counts.add(kind)
        # A picture may be named by a path, or be base64 text in its place.
        which, reason = f"{which:.200}", " ".join(reason.split()).rstrip(".")
        self._example = f"one of them is {which}: {reason}"
        if self.counts[kind] == 1:
            logger.warning(
                f"Skipped {which}: {reason}. It is the first of the {kind.replace('_', ' ')}; further ones are only "
                "counted."
            )

    def captions(self, which: str, read: Callable[[], Any]) -> list[str]:
        """Return those of a sample's captions that say something; where there are none, count it as skipped.

        Args:
            which: The sample's name.
            read: Returns its captions, as `non_empty_captions` takes them, or raises a ValueError.
        """
        try:
            said = non_empty_captions(read())
        except ValueError as error:
            self.skip("undecodable_captions", which, str(error))
            return []
        if not said:
            self.skip("empty_captions", which, "it has no caption")
        return said

    def check(self, counts: Mapping[str, int] | None = None, least_seen: int = LEAST_SEEN) -> None:
        """Raise a ValueError if too many of at least `least_seen` samples were skipped.

        Args:
            counts: What is judged, such as one pass of all processes; by default all that this process counted.
            least_seen: Fewer say too little.
        """
        kinds = {kind: number for kind, number in (counts or self.counts).items() if kind in self._counts.kinds}
        seen = kinds.pop("seen")
        skipped = sum(kinds.values())
        if seen >= least_seen and skipped > self.max_share * seen:
            listed = ", ".join(f"{kind.replace('_', ' ')}: {number}" for kind, number in kinds.items())
            raise ValueError(
                f"{skipped} of {seen} samples had to be skipped ({listed}), more than max_skipped_share="
                f"{self.max_share:g} allows; {self._example}."
            )


def non_empty_captions(captions: Any) -> list[str]:
    """List those of a sample's captions that say something.

    Args:
        captions: A string, a sequence of strings, or None.

    Raises:
        ValueError: One is neither a string nor None, or has half a character (a lone surrogate), which no tokenizer
            takes.
    """
    if captions is None:
        return []
    listed = captions if isinstance(captions, (list, tuple, np.ndarray)) else [captions]
    said = []
    for caption in listed:
        if caption is not None and not isinstance(caption, str):
            raise ValueError(f"A caption is {caption!r:.80}; it must be text.")
        if caption and caption.strip():
            check_text(caption)
            said.append(caption)
    return said


__all__ = ["CAPTION_KINDS", "SharedCounts", "SkipCounts", "non_empty_captions", "require_share"]
