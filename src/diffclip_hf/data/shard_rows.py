"""The rows that tar shards are read as: what is passed over is counted, and broken shards are judged."""

import functools
import math
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from ..common.known_files import known_values
from .counts import CAPTION_KINDS, SkipCounts, require_share
from .shard_division import Part
from .shard_files import is_url
from .shard_samples import BrokenShardError, caption_of, image_of, read_shard
from .shard_sizes import THREADS, stated_sizes


logger = logging.get_logger(__name__)


def _none(number: int) -> bool:
    return False


def _count_samples(path: str) -> tuple[int, str | None]:
    """Return how many samples a shard has, by reading it through, and what is wrong with it if it breaks off there."""
    try:
        return sum(1 for _ in read_shard(path, _none)), None
    except BrokenShardError as error:
        return error.samples_read, error.reason


def _count(shards: Sequence[str]) -> list[tuple[int, str | None]]:
    """Return what `_count_samples` does of each shard; what was found of files that are here is kept."""
    here = [path for path in shards if not is_url(path)]
    absolute = [os.path.abspath(path) for path in here]
    found = dict(zip(here, known_values("samples", absolute, _count_samples, "Counting"), strict=True))
    far = [path for path in shards if is_url(path)]
    with ThreadPoolExecutor(THREADS) as pool:
        found |= zip(far, pool.map(_count_samples, far), strict=True)
    return [found[path] for path in shards]


class BrokenShards:
    """Which shards can't be read to their end; DataLoader workers add to it and the main process reads it.

    Args:
        shards: Their paths or URLs.
        max_share: The largest share of them that may be broken.
    """

    def __init__(self, shards: Sequence[str], max_share: float):
        require_share("max_broken_share", max_share)
        self.shards, self.max_share = shards, max_share
        self._broken = torch.zeros(len(shards), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return int(self._broken.sum())

    def names(self) -> str:
        return ", ".join(self.shards[number] for number in self._broken.nonzero().flatten().tolist())

    def __contains__(self, number: int) -> bool:
        return bool(self._broken[number])

    def mark(self, number: int) -> None:
        """Count a shard as broken that is known to be so."""
        self._broken[number] = True

    def report(self, number: int, error: BrokenShardError) -> None:
        """Log, the first time, that a shard is broken."""
        if number not in self:
            logger.error(
                f"The shard {self.shards[number]} is broken after {error.samples_read} samples: {error.reason}"
            )
        self.mark(number)

    def check(self, numbers: Sequence[int]) -> None:
        """Raise a ValueError if more than the allowed share of these shards is broken."""
        broken = sum(self._broken[list(numbers)].tolist())
        if broken > self.max_share * len(numbers):
            raise ValueError(
                f"{broken} of {len(numbers)} shards are broken, more than max_broken_share={self.max_share:g} "
                f"allows: {self.names()}."
            )


class ShardRows:
    """Reads rows, `{"image": {"bytes": ..., "path": None}, "caption": ..., "key": "SHARD/KEY"}`, from shards.

    Args:
        shards: Their paths or URLs. How many samples one has is read from the files beside it; otherwise it's read
            through once.
        max_skipped_share: See `SkipCounts`.
        max_broken_share: See `BrokenShards`.
        count: Whether a shard is read through where no file says how many samples it has. Else 0 are expected of it.
        skipped: What counts, by default a `SkipCounts` of its own.

    Raises:
        ValueError: A file beside a shard isn't what it should be, or too many shards are broken.
    """

    def __init__(
        self,
        shards: Sequence[str],
        max_skipped_share: float,
        max_broken_share: float,
        *,
        count: bool = True,
        skipped: SkipCounts | None = None,
    ):
        self.shards = shards
        self.broken = BrokenShards(shards, max_broken_share)
        self.skipped = skipped or SkipCounts(CAPTION_KINDS, max_skipped_share)
        sizes = stated_sizes(self.shards)
        if count:
            self._count_unknown(sizes)
        self.sizes = np.array([size or 0 for size in sizes], dtype=np.int64)

    def _count_unknown(self, sizes: list[int | None]) -> None:
        """Enter how many samples the shards have of which it isn't known, by reading them through."""
        unknown = [number for number, size in enumerate(sizes) if size is None]
        if unknown:
            logger.warning(
                f"{len(unknown)} of {len(self.shards)} shards have neither a _stats.json nor a line in a sizes.json "
                f"beside them; reading them through to count their samples, {self.shards[unknown[0]]} first."
            )
        for number, (size, reason) in zip(unknown, _count([self.shards[number] for number in unknown]), strict=True):
            sizes[number] = size
            if reason is not None:
                self.broken.report(number, BrokenShardError(reason, size))
        self.broken.check(range(len(self.shards)))

    def samples(
        self, number: int, wanted: Callable[[int], bool], judged: Sequence[int], stop: float = math.inf
    ) -> Iterator[dict[str, Any]]:
        """Yield a shard's first `stop` samples as `read_shard` does; one that breaks off ends there.

        Raises:
            ValueError: It's broken, and with it too many of the shards `judged`.
        """
        read = 0
        try:
            for sample in read_shard(self.shards[number], wanted, stop):
                read += 1
                yield sample
            if read < min(stop, self.sizes[number]):
                raise BrokenShardError(f"it should have {self.sizes[number]} samples", read)
        except BrokenShardError as error:
            self.broken.report(number, error)
            self.broken.check(judged)

    def row(self, number: int, sample: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return a shard's sample as a row, None if it has no caption; it is counted.

        Raises:
            ValueError: Too many samples had to be passed over.
        """
        self.skipped.see()
        key = self.key(number, sample)
        said = self.skipped.captions(key, lambda: caption_of(sample))
        if not said:
            self.skipped.check()
            return None
        caption = said if len(said) > 1 else said[0]
        return {"image": {"bytes": image_of(sample), "path": None}, "caption": caption, "key": key}

    def key(self, number: int, sample: Mapping[str, Any]) -> str:
        """Return the name of a shard's sample."""
        return f"{self.shards[number]}/{sample['key']}"

    def of_parts(self, parts: Sequence[Part], judged: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Yield the rows of parts of shards; the broken ones are judged against all of `judged`."""
        for part in parts:
            wanted = functools.partial(operator.le, part.start)
            for index, sample in enumerate(self.samples(part.shard, wanted, judged, part.stop)):
                row = self.row(part.shard, sample) if wanted(index) else None
                if row is not None:
                    yield row


__all__ = ["BrokenShards", "ShardRows"]
