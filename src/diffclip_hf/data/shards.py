"""Image–caption pairs streamed from tar shards, divided among processes and workers, from any position."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from .counts import SharedCounts
from .shard_division import Part, parts_of_range, process_place, process_range, shuffled, worker_batches
from .shard_files import find_shards
from .shard_rows import ShardRows


def _this_worker() -> tuple[int, int]:
    """Return the number of the DataLoader worker that asks, and how many there are."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


class ImageTextShards(IterableDataset):
    """Image–caption pairs streamed from tar shards, as WebDataset and img2dataset write them.

    A sample is a run of files in the tar whose names agree up to the first dot: an image (`.jpg`, `.jpeg`, `.png` or
    `.webp`) and its caption in `.txt`, or in the field `caption` of `.json` where there's no `.txt`. A sample without
    a caption, or with one that can't be read, is passed over and counted.

    An epoch's samples, the shards in a random order, are divided evenly into one range a process, and each of these
    into one a DataLoader worker; a shard on the border of two ranges is read by both. `len` is the number that each
    process yields an epoch, the same for all and whole batches, so that no process waits for another. One that runs
    short, since samples were passed over or a shard broke off, repeats some of its own.

    The order depends on the seed, the epoch and the numbers of processes and workers, and on nothing else. `set_epoch`
    and `set_position` reach workers that are already running. That is training's; `DiffCLIPTrainer` evaluates on
    `once`, which repeats and leaves out nothing.

    Yields `{"image": {"bytes": ..., "path": None}, "caption": ..., "key": "SHARD/KEY"}`, or None for a sample that
    `set_position` passes over, of which `ImageTextCollator` makes an empty batch.

    Args:
        source: See `find_shards`. How many samples a shard has is read from `sizes.json` (WebDataset) or from
            `successes` in `NAME_stats.json` (img2dataset) beside it; otherwise the shard is read through, and what
            was counted is kept for the next time. More samples than stated aren't read.
        batch_size: Samples a batch of one process, the DataLoader's `batch_size`.
        seed: At least 0.
        shuffle_buffer: How many encoded samples a worker keeps to draw from; with 0 neither samples nor shards are
            shuffled.
        rank: This process's number, by default torch.distributed's.
        world_size: How many processes there are, likewise.
        max_skipped_share: The largest share of samples passed over, of at least 1,000 that this process has seen.
        max_broken_share: The largest share of this process's shards of an epoch that may be broken. Each is logged as
            an error with its path.

    Raises:
        FileNotFoundError: A local shard isn't there.
        ValueError: There are no samples, or an argument isn't allowed; when its length is asked for or it's iterated,
            there are fewer samples than a batch of every process; and when iterating, more samples or shards than
            allowed are broken, or all of a worker's are.
    """

    # `DiffCLIPTrainer` leaves the dividing among processes to it.
    splits_itself = True

    def __init__(
        self,
        source: str | Sequence[str],
        batch_size: int,
        *,
        seed: int = 0,
        shuffle_buffer: int = 1000,
        rank: int | None = None,
        world_size: int | None = None,
        max_skipped_share: float = 0.01,
        max_broken_share: float = 0.1,
    ):
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("shuffle_buffer", shuffle_buffer, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}.")
        self.batch_size, self.seed, self.shuffle_buffer = batch_size, seed, shuffle_buffer
        self.rank, self.world_size = process_place(rank, world_size)
        self.shards = find_shards(source)
        self.rows = ShardRows(self.shards, max_skipped_share, max_broken_share)
        self._repeated = SharedCounts("repeated")
        # The epoch, and of which epoch how many batches are to be passed over.
        self._position = torch.zeros(3, dtype=torch.int64).share_memory_()
        self.num_samples = int(self.rows.sizes.sum())
        self.batches_per_epoch = self.num_samples // self.world_size // batch_size
        if not self.num_samples:
            self._require(1)

    def _require(self, samples: int) -> None:
        """Raise a ValueError if there are fewer samples."""
        if self.num_samples < samples:
            broken = f" ({self.rows.broken.names()} can't be read)" if len(self.rows.broken) else ""
            raise ValueError(
                f"The shards have {self.num_samples} samples{broken}; batch_size={self.batch_size} on "
                f"{self.world_size} processes needs at least {samples}."
            )

    def __len__(self) -> int:
        # Evaluation needs no whole batch, so it's the first use in training that does.
        self._require(self.batch_size * self.world_size)
        return self.batches_per_epoch * self.batch_size

    def once(self, batch_size: int) -> "ImageTextShardsOnce":
        """Return the same pairs for evaluation, each exactly once and in order, in lists for a batch.

        See `ImageTextShardsOnce`.
        """
        return ImageTextShardsOnce(self, batch_size)

    @property
    def counts(self) -> dict[str, int]:
        """What this process's workers have counted so far.

        `seen` samples, of them `empty_captions` and `undecodable_captions` passed over; `repeated` samples, and
        `broken_shards`.
        """
        return self.rows.skipped.counts | self._repeated.totals() | {"broken_shards": len(self.rows.broken)}

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, that the next iteration yields."""
        self._position[0] = epoch

    def set_position(self, epoch: int, batches_done: int) -> None:
        """Choose the epoch, and have None yielded for the samples of this process's first batches in it.

        Every other epoch is yielded whole.

        Raises:
            ValueError: There aren't as many batches.
        """
        if not 0 <= batches_done <= self.batches_per_epoch:
            raise ValueError(f"batches_done is {batches_done}; it must be in 0..{self.batches_per_epoch}.")
        self._position.copy_(torch.tensor([epoch, epoch, batches_done]))

    def check(self, counts: Mapping[str, int] | None = None) -> None:
        """Raise a ValueError if more samples were passed over than allowed, however few were seen.

        Args:
            counts: What is judged, such as one pass of all processes; by default all that this process counted.
        """
        self.rows.skipped.check(counts, least_seen=1)

    def _parts(self, epoch: int, first_batch: int, last_batch: int) -> list[Part]:
        """List the parts of shards that this process's range of batches is made of."""
        order = np.arange(len(self.shards))
        if self.shuffle_buffer:
            order = np.random.default_rng((self.seed, epoch)).permutation(order)
        low, high = process_range(self.num_samples, self.rank, self.world_size)
        # What doesn't make a whole batch is divided too, for it stands in for samples that are passed over.
        start, stop = (low + (high - low) * batch // self.batches_per_epoch for batch in (first_batch, last_batch))
        return parts_of_range(self.rows.sizes, order, start, stop)

    def _endless_rows(self, epoch: int, first_batch: int, last_batch: int, worker: int) -> Iterator[dict[str, Any]]:
        """Yield the rows of a range of batches, and from the start again where they are too few."""
        parts = self._parts(epoch, first_batch, last_batch)
        judged = [part.shard for part in self._parts(epoch, 0, self.batches_per_epoch)]
        generator = np.random.default_rng((self.seed, epoch, self.rank, worker))
        for round_number in itertools.count():
            empty = True
            for row in shuffled(self.rows.of_parts(parts, judged), self.shuffle_buffer, generator):
                empty = False
                if round_number:
                    self._repeated.add("repeated")
                yield row
            if empty:
                names = ", ".join(self.shards[part.shard] for part in parts)
                raise ValueError(f"Not one sample of the shards {names} can be used: {self.counts}; see the log.")

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        worker, workers = _this_worker()
        epoch, passed_epoch, batches_done = self._position.tolist()
        self._require(self.batch_size * self.world_size)
        first, last = worker_batches(self.batches_per_epoch, worker, workers)
        # Workers take turns, batch by batch.
        done = batches_done // workers + (worker < batches_done % workers) if epoch == passed_epoch else 0
        rows = self._endless_rows(epoch, first, last, worker)
        for number, row in enumerate(itertools.islice(rows, (last - first) * self.batch_size)):
            yield None if number < done * self.batch_size else row


class ImageTextShardsOnce(IterableDataset):
    """The pairs of `ImageTextShards` for evaluation: every one that can be read exactly once, in the shards' order.

    Yields lists of the rows that `ImageTextShards` yields: this process's share of each batch of all processes, fewer
    or none where samples had to be passed over. It's for a DataLoader with `batch_size=None`. Every process and worker
    yields its lists in turn, so that the order is the same for any number of them; to that end each passes over all
    shards, of which it reads its own samples (and streams those at a URL whole). Shards that are larger than stated
    are read to their end, and what is counted is counted in the `ImageTextShards`.

    Args:
        shards: Where the pairs are.
        batch_size: The most rows in a list.

    Raises:
        ValueError: When iterating, more samples or shards than allowed are broken.
    """

    splits_itself = True

    def __init__(self, shards: ImageTextShards, batch_size: int):
        super().__init__()
        self.shards, self.batch_size = shards, batch_size

    @property
    def counts(self) -> dict[str, int]:
        """As `ImageTextShards.counts`."""
        return self.shards.counts

    def check(self, counts: Mapping[str, int] | None = None) -> None:
        """Raise a ValueError as `ImageTextShards.check` does."""
        self.shards.check(counts)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """Yield a worker's lists: of every batch of all processes in turn this process's share, which may be empty."""
        worker, workers = _this_worker()
        reader, rank = self.shards.rows, self.shards.rank
        size = self.batch_size * self.shards.world_size
        first = 0  # The number of the present shard's first sample.
        batch = worker
        rows: list[dict[str, Any]] = []

        def is_own(number: int) -> bool:
            place, rest = divmod(first + number, size)
            return place % workers == worker and rest // self.batch_size == rank

        everything = range(len(reader.shards))
        for shard in everything:
            read = 0
            for read, sample in enumerate(reader.samples(shard, is_own, everything), 1):
                if first + read > (batch + 1) * size:
                    yield rows
                    batch, rows = batch + workers, []
                row = reader.row(shard, sample) if is_own(read - 1) else None
                if row is not None:
                    rows.append(row)
            first += read
        if first > batch * size:
            yield rows


__all__ = ["ImageTextShards", "ImageTextShardsOnce"]
