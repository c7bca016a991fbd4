"""Batches over all processes: every row on one of them, and as many batches on each."""

from collections.abc import Callable, Iterator, Sized
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.data_loader import DataLoaderStateMixin
from accelerate.state import GradientState
from accelerate.utils import gather, gather_object
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers.trainer_pt_utils import find_batch_size

from ..model.image_fetching_diffclip import one_line
from .data_pass import DataPass


# What stands in place of a number of rows.
NO_BATCH, FAULT = -1, -2


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


class OrderedBatchSampler(Sampler[list[int]]):
    """Yields one process's share of the rows in order, for evaluation: of each global batch the rows that follow those
    of the process before it.

    The last processes may have fewer batches, or none; see `EvenLoader`.

    Args:
        rows: How many there are.
        batch_size: The most rows of one process in a batch.
        rank, world_size: This process's number, and how many there are.
    """

    def __init__(self, rows: int, batch_size: int, rank: int, world_size: int):
        self.batch_size = batch_size
        self.starts = range(rank * batch_size, rows, batch_size * world_size)
        self.rows = rows

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[int]]:
        for start in self.starts:
            yield list(range(start, min(start + self.batch_size, self.rows)))


class SharedStream(IterableDataset):
    """A stream that all processes read alike, of which each yields its share of every global batch, as a list.

    It's for a DataLoader with `batch_size=None`. Of a last batch that isn't whole, the last processes have fewer rows
    or none.

    Args:
        stream: Yields the same rows in every process, in the same order. DataLoader workers share it out as it does.
        batch_size: The most rows in a list.
        rank, world_size: This process's number, and how many there are.
        drop_last: Whether a last batch that isn't whole is left out.
    """

    def __init__(self, stream: Any, batch_size: int, rank: int, world_size: int, drop_last: bool = False):
        super().__init__()
        self.stream, self.batch_size, self.rank, self.world_size = stream, batch_size, rank, world_size
        self.drop_last = drop_last

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, on which the stream's order may depend."""
        if hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[Any]]:
        size = self.batch_size * self.world_size
        own: list[Any] = []
        number = 0
        for number, row in enumerate(self.stream, 1):
            if (number - 1) % size // self.batch_size == self.rank:
                own.append(row)
            if number % size == 0:
                yield own
                own = []
        if number % size and not self.drop_last:
            yield own


def collate_some(collator: Callable[[list[Any]], Any], rows: list[Any]) -> Any:
    """Make a batch of rows, and `{}` of none, for which most collators aren't made."""
    return collator(rows) if rows else {}


def is_split(dataset: Any) -> bool:
    """Say whether a data set yields one process's rows alone, as `splits_itself` or `split_dataset_by_node` says."""
    return getattr(dataset, "splits_itself", False) or getattr(dataset, "_distributed", None) is not None


def nothing_of(batch: Any) -> dict[str, Any]:
    """Return a batch's tensors without their rows, on the CPU, and what else it has."""
    return {
        name: part[:0].cpu() if isinstance(part, torch.Tensor) and part.ndim else part for name, part in batch.items()
    }


def next_batches(batches: Iterator[Any], count: int) -> tuple[list[Any], list[list[int]]]:
    """Take every process's next batches, as many in each as in the one with the most; those added have no rows.

    Every process has to call this.

    Args:
        batches: This process's; `{}` counts as one without rows.
        count: How many are taken at the most, the same in every process.

    Returns:
        The batches, and the rows of each in every process, by batch and process.

    Raises:
        ValueError: Another process's batches can't be made; that process raises its own error.
    """
    if PartialState().num_processes == 1:
        taken = list(islice(batches, count))
        return taken, [[find_batch_size(batch) or 0] for batch in taken]
    taken = []
    fault: Exception | None = None
    try:
        taken.extend(islice(batches, count))
    except Exception as error:
        # The others would wait for this process, so they have to hear of it.
        fault = error
    rows = [find_batch_size(batch) or 0 for batch in taken] + [NO_BATCH] * (count - len(taken))
    own = [FAULT] * count if fault is not None else rows
    everywhere = gather(torch.tensor([own], device=PartialState().device)).tolist()
    _raise_faults(fault, everywhere)
    needed = max(sum(number >= 0 for number in one) for one in everywhere)
    if any(one[index] <= 0 for one in everywhere for index in range(needed)):
        # What a batch is made of is known only where there is one.
        examples = [nothing_of(batch) for batch in taken if find_batch_size(batch) is not None][:1]
        nothing = (gather_object(examples) or [{}])[0]
        taken = [batch if find_batch_size(batch) is not None else dict(nothing) for batch in taken]
        taken += [dict(nothing) for _ in range(needed - len(taken))]
    return taken, [[max(one[index], 0) for one in everywhere] for index in range(needed)]


def _raise_faults(fault: Exception | None, everywhere: list[list[int]]) -> None:
    """Raise this process's fault, or a ValueError of the first process that has one."""
    faulty = [rank for rank, rows in enumerate(everywhere) if FAULT in rows]
    if not faulty:
        return
    messages = gather_object([] if fault is None else [f"{type(fault).__name__}: {one_line(fault)}"])
    if fault is not None:
        raise fault
    raise ValueError(f"Process {faulty[0]} of {len(everywhere)} can't make its next batch: {messages[0]}")


class EvenLoader(DataLoaderStateMixin):
    """Iterates a DataLoader of each process equally often, for evaluation; see `next_batches`.

    Args:
        loader: Yields this process's batches.
        dataset, collator: What the batches are made of.

    Raises:
        ValueError: After the last batch, more rows than allowed had to be dropped, or all.
    """

    # What the pass is called.
    name = "evaluation"

    def __init__(self, loader: DataLoader, dataset: Any, collator: Any):
        self.loader, self.dataset, self.collator = loader, dataset, collator
        self.batch_size = loader.batch_size
        self.gradient_state = GradientState()
        self.rows = 0  # Of all processes, in the present pass.

    def __len__(self) -> int:
        return len(self.loader)

    def _batches(self) -> Iterator[Any]:
        own = iter(self.loader)
        while True:
            batches, rows = next_batches(own, 1)
            if not batches:
                return
            if any(rows[0]):
                self.rows += sum(rows[0])
                yield batches[0]

    def __iter__(self) -> Iterator[Any]:
        self.rows = 0
        judged = DataPass(self.dataset, self.collator)
        self.begin()
        try:
            batches = self._batches()
            following = next(batches, None)
            while following is not None:
                batch, following = following, next(batches, None)
                # What `batch_eval_metrics` asks for.
                self.end_of_dataloader = following is None
                yield batch
        finally:
            self.end()
        judged.end(self.name)
        if not self.rows:
            raise ValueError(f"Nothing is left of the data for {self.name}: no row of it can be used.")


def concatenate(batches: Any) -> Any:
    """Put together arrays of batches, or tuples of arrays, each copied once; None stays None.

    Args:
        batches: A list of arrays of the same width, or of tuples of these.
    """
    if not isinstance(batches, list):
        return batches
    if isinstance(batches[0], tuple):
        return tuple(np.concatenate([batch[index] for batch in batches]) for index in range(len(batches[0])))
    return np.concatenate(batches)


def gather_rows(parts: Any) -> Any:
    """Stack every process's rows of tensors, of which each may have another number, in a nest of tuples and lists.

    Every process has to call this, with the same nest; but for the first, the dimensions must be the same.
    """
    if isinstance(parts, (tuple, list)):
        return type(parts)(gather_rows(part) for part in parts)
    if isinstance(parts, dict):
        return {name: gather_rows(part) for name, part in parts.items()}
    if PartialState().num_processes == 1:
        return parts
    rows = parts.reshape(-1) if parts.ndim == 0 else parts
    counts = gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    if max(counts) == 0:
        return rows
    gathered = gather(padded).split(max(counts))
    return torch.cat([one[:count] for one, count in zip(gathered, counts, strict=True)])


__all__ = [
    "EvenLoader",
    "OrderedBatchSampler",
    "SharedBatchSampler",
    "SharedStream",
    "collate_some",
    "concatenate",
    "gather_rows",
    "is_split",
    "next_batches",
]
