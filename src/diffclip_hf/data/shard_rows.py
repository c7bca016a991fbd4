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
from .counts import SkipCounts, non_empty_captions, require_share
from .shard_division import Part
from .shard_files import is_url
from .shard_samples import IMAGE_EXTENSIONS, BrokenShardError, caption_of, read_shard
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

    def report(self, number: int, error: BrokenShardError) -> None:
        """Log, the first time, that a shard is broken."""
        if not self._broken[number]:
            logger.error(
                f"The shard {self.shards[number]} is broken after {error.samples_read} samples: {error.reason}"
            )
        self._broken[number] = True

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

    Raises:
        ValueError: A file beside a shard isn't what it should be, or too many shards are broken.
    """

    def __init__(self, shards: Sequence[str], max_skipped_share: float, max_broken_share: float):
        self.shards = shards
        self.broken = BrokenShards(shards, max_broken_share)
        self.skipped = SkipCounts(("empty_captions", "undecodable_captions"), max_skipped_share)
        self.sizes = np.array(self._find_sizes(), dtype=np.int64)

    def _find_sizes(self) -> list[int]:
        """Return how many samples each shard has, by reading those through of which it isn't known."""
        sizes = stated_sizes(self.shards)
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
        return [size or 0 for size in sizes]

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
        key = f"{self.shards[number]}/{sample['key']}"
        try:
            caption = caption_of(sample)
            said = non_empty_captions(caption)
        except ValueError as error:
            self.skipped.skip("undecodable_captions", key, str(error))
            self.skipped.check()
            return None
        if not said:
            self.skipped.skip("empty_captions", key, "it has no caption")
            self.skipped.check()
            return None
        image = next(sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample)
        return {"image": {"bytes": image, "path": None}, "caption": caption, "key": key}

    def of_parts(self, parts: Sequence[Part], judged: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Yield the rows of parts of shards; the broken ones are judged against all of `judged`."""
        for part in parts:
            wanted = functools.partial(operator.le, part.start)
            for index, sample in enumerate(self.samples(part.shard, wanted, judged, part.stop)):
                row = self.row(part.shard, sample) if wanted(index) else None
                if row is not None:
                    yield row


__all__ = ["BrokenShards", "ShardRows"]
