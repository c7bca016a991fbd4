"""Batches over all processes of which the last is shared out whole, whatever is left for it."""

from collections.abc import Iterator, Sized
from itertools import islice
from typing import Any

from torch.utils.data import Sampler


class SharedBatchSampler(Sampler[list[int]]):
    """Yields one process's share of each global batch: as equal as can be, and every row of an epoch exactly once.

    The last batch may be smaller, and then its shares differ by at most one row. Where fewer rows than processes would
    be left for it, so that a process had none, they join the batch before. All processes yield equally often, so none
    waits for another; and unlike accelerate's sharding, no row is repeated to fill up.

    Args:
        sampler: Yields the epoch's indices, the same in every process.
        batch_size: Rows of one process in a whole batch.
        rank, world_size: This process's number, and how many there are.
        drop_last: Whether a last batch that isn't whole is left out.

    Raises:
        ValueError: There are fewer rows than processes, or with `drop_last` than a global batch has.
    """

    def __init__(self, sampler: Any, batch_size: int, rank: int, world_size: int, drop_last: bool = False):
        self.sampler: Any = sampler
        self.global_size, self.rank, self.world_size = batch_size * world_size, rank, world_size
        self.drop_last = drop_last
        least = self.global_size if drop_last else world_size
        if not isinstance(sampler, Sized) or len(sampler) < least:
            rows = len(sampler) if isinstance(sampler, Sized) else "an unknown number of"
            raise ValueError(f"The dataset has {rows} rows; {world_size} processes need at least {least}.")

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, on which the order depends."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        whole, rest = divmod(len(self.sampler), self.global_size)
        return whole if self.drop_last else max(1, whole + (rest >= self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        indices = iter(self.sampler)
        for number in range(len(self)):
            is_last = number == len(self) - 1 and not self.drop_last
            rows = list(indices if is_last else islice(indices, self.global_size))
            start, stop = (len(rows) * rank // self.world_size for rank in (self.rank, self.rank + 1))
            yield rows[start:stop]


__all__ = ["SharedBatchSampler"]
