"""Image–caption pairs streamed from tar shards, divided among processes and workers, from any position."""

import functools
import glob
import itertools
import json
import math
import operator
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from transformers.utils import logging

from .counts import SharedCounts, SkipCounts, non_empty_captions, require_share


logger = logging.get_logger(__name__)

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


def expand_braces(pattern: str) -> list[str]:
    """Write out `{000..332}` and `{a,b}` as a shell does; the numbers keep their leading zeros."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if found is None:
        return [pattern]
    first, last, choices = found.groups()
    if choices is None:
        parts = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        parts = choices.split(",")
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [path for part in parts for path in expand_braces(before + part + after)]


def _is_url(path: str) -> bool:
    return "://" in path


def _shards_of_folder(folder: str) -> list[str]:
    return sorted(str(path) for path in Path(folder).iterdir() if path.name.endswith(SHARD_SUFFIXES))


def names_shards(source: str) -> bool:
    """Say whether a source is made of tar shards rather than something that `datasets` reads."""
    return source.endswith(SHARD_SUFFIXES) or (os.path.isdir(source) and bool(_shards_of_folder(source)))


def find_shards(source: str | Sequence[str]) -> list[str]:
    """List the tar shards that a source names.

    Args:
        source: A file, a folder of `.tar`, `.tar.gz` or `.tgz` files, a pattern with `*`, `?`, `[...]`, `{000..331}`
            or `{a,b}`, a URL that fsspec opens (of these only braces are expanded), or several of them.

    Raises:
        FileNotFoundError: A local file isn't there.
        ValueError: A pattern or folder has no shards.
    """
    shards = []
    for pattern in [source] if isinstance(source, str) else source:
        for path in expand_braces(os.fspath(pattern)):
            if os.path.isdir(path):
                found = _shards_of_folder(path)
            elif not _is_url(path) and not os.path.exists(path) and glob.has_magic(path):
                found = sorted(glob.glob(path, recursive=True))
            else:
                found = [path]
            if not found:
                raise ValueError(f"{path!r} has no tar shards; their names must end in {', '.join(SHARD_SUFFIXES)}.")
            shards += found
    for path in shards:
        if not _is_url(path) and not os.path.isfile(path):
            raise FileNotFoundError(f"The shard {path!r} isn't there.")
    if not shards:
        raise ValueError("source names no shards; it must name at least one.")
    return shards


@contextmanager
def _open(path: str) -> Iterator[IO[bytes]]:
    if not _is_url(path):
        with open(path, "rb") as file:
            yield file
        return
    import fsspec

    with fsspec.open(path, "rb") as file:
        yield file


class _WholeTarInfo(tarfile.TarInfo):
    """A header that must be whole: tarfile itself takes a damaged one for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive):
        try:
            return super().fromtarfile(archive)
        except (tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"{error} at byte {archive.offset}") from error


def _members(path: str) -> Iterator[tuple[str, str, tarfile.TarInfo, tarfile.TarFile]]:
    """Yield a shard's files in order, by the name up to its first dot and the extension after it, in lower case."""
    # A local file is passed over by seeking; of a stream every byte is read.
    mode = "r|*" if _is_url(path) else "r:*"
    with _open(path) as file, tarfile.open(fileobj=file, mode=mode, tarinfo=_WholeTarInfo) as archive:  # type: ignore[call-overload]
        while (member := archive.next()) is not None:
            # They are kept otherwise, which for a shard of many files takes much memory.
            archive.members.clear()
            folder, _, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            if member.isfile() and stem:
                yield f"{folder}/{stem}" if folder else stem, extension.lower(), member, archive


def _samples(path: str, wanted: Callable[[int], bool], stop: float = math.inf) -> Iterator[dict[str, Any]]:
    """Yield a shard's first `stop` samples: the key, and the bytes of each extension, empty of those not `wanted`.

    A sample is a run of files with the same key and an image among them; the same name again begins another.
    """
    number = 0
    sample: dict[str, Any] = {}
    for key, extension, member, archive in _members(path):
        if key != sample.get("key") or extension in sample:
            if not sample.keys().isdisjoint(IMAGE_EXTENSIONS):
                yield sample
                number += 1
                if number >= stop:
                    return
            sample = {"key": key}
        if extension in (*IMAGE_EXTENSIONS, "txt", "json"):
            file = archive.extractfile(member) if wanted(number) else None
            sample[extension] = file.read() if file else b""
    if not sample.keys().isdisjoint(IMAGE_EXTENSIONS):
        yield sample


class BrokenShardError(Exception):
    """A shard that can't be read to its end.

    Args:
        reason: What is wrong with it.
        samples_read: How many whole samples come before the damage.
    """

    def __init__(self, reason: str, samples_read: int):
        super().__init__(reason, samples_read)
        self.reason = reason
        self.samples_read = samples_read


def _read_shard(path: str, wanted: Callable[[int], bool], stop: float = math.inf) -> Iterator[dict[str, Any]]:
    """Yield the samples of a shard as `_samples` does; raise a BrokenShardError where it can't be read."""
    samples = _samples(path, wanted, stop)
    for number in itertools.count():
        try:
            sample = next(samples)
        except StopIteration:
            return
        # A damaged file makes tarfile raise nearly anything, and a file system of the network has errors of its own.
        except Exception as error:
            raise BrokenShardError(f"{type(error).__name__}: {' '.join(str(error).split())}", number) from error
        yield sample


def _caption_of(sample: Mapping[str, Any]) -> Any:
    """Return a sample's caption: its `txt`, or the `caption` of its `json` where it has none; None if it has neither.

    Raises:
        ValueError: It isn't UTF-8, or the JSON isn't an object.
    """
    if "txt" in sample:
        return sample["txt"].decode("utf-8")
    try:
        fields = json.loads(sample.get("json") or b"{}")
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error
    if not isinstance(fields, dict):
        raise ValueError(f"the JSON is of type {type(fields).__name__} rather than an object")
    return fields.get("caption")


def _read_sizes(path: str) -> dict[str, Any]:
    """Return what a JSON file of sizes says, nothing if it isn't there.

    Raises:
        ValueError: It isn't JSON, or not an object.
    """
    try:
        with _open(path) as file:
            sizes = json.load(file)
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path!r} must be JSON: {error}") from error
    if not isinstance(sizes, dict):
        raise ValueError(f"{path!r} has a {type(sizes).__name__}; it must have an object.")
    return sizes


def _stated_size(path: str, sizes: Mapping[str, Any], field: str) -> int | None:
    """Return how many samples a field of a JSON file, already read, states, None if it isn't there.

    Raises:
        ValueError: It isn't a number of samples.
    """
    size = sizes.get(field)
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 0):
        raise ValueError(f"{path!r} states {size!r:.50} as {field}; it must be a whole number, at least 0.")
    return size


def _processes(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return this process's number and how many there are.

    Raises:
        ValueError: Only one of the two is given, they don't fit, or the process group isn't there yet.
    """
    if (rank is None) != (world_size is None):
        raise ValueError(f"rank is {rank} and world_size is {world_size}; give both or neither.")
    if rank is not None and world_size is not None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; with world_size={world_size} it must be in 0..{world_size - 1}.")
        return rank, world_size
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but torch.distributed isn't initialised, so the shards can't "
            "be divided among the processes; make the TrainingArguments or the Accelerator first, or pass rank and "
            "world_size."
        )
    return 0, 1


def _none(number: int) -> bool:
    return False


def _shuffled(samples: Iterator[dict], size: int, generator: np.random.Generator) -> Iterator[dict]:
    """Yield the samples in a random order, of which `size` at a time are kept to draw from; as they come for 0."""
    if not size:
        yield from samples
        return
    kept: list[dict] = []
    for sample in samples:
        if len(kept) < size:
            kept.append(sample)
            continue
        place = int(generator.integers(size))
        yield kept[place]
        kept[place] = sample
    for place in generator.permutation(len(kept)):
        yield kept[place]


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
        source: See `find_shards`. How many samples a shard has is read from `successes` in `NAME_stats.json`
            (img2dataset) or from `sizes.json` (WebDataset) beside it; otherwise the shard is read through once. More
            samples than stated aren't read.
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
        require_share("max_broken_share", max_broken_share)
        self.batch_size, self.seed, self.shuffle_buffer = batch_size, seed, shuffle_buffer
        self.max_broken_share = max_broken_share
        self.rank, self.world_size = _processes(rank, world_size)
        self.shards = find_shards(source)
        self._skipped = SkipCounts(("empty_captions", "undecodable_captions"), max_skipped_share)
        self._repeated = SharedCounts("repeated")
        self._broken = torch.zeros(len(self.shards), dtype=torch.bool).share_memory_()
        # The epoch, and of which epoch how many batches are to be passed over.
        self._position = torch.zeros(3, dtype=torch.int64).share_memory_()
        self._sizes = np.array(self._find_sizes(), dtype=np.int64)
        self.num_samples = int(self._sizes.sum())
        self.batches_per_epoch = self.num_samples // self.world_size // batch_size
        if not self.num_samples:
            self._require(1)

    def _require(self, samples: int) -> None:
        """Raise a ValueError if there are fewer samples."""
        if self.num_samples < samples:
            broken = f" ({self._broken_names()} can't be read)" if self._broken.any() else ""
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
        broken = int(self._broken.sum())
        return self._skipped.counts | self._repeated.totals() | {"broken_shards": broken}

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
        self._skipped.check(counts, least_seen=1)

    def _stated_sizes(self) -> list[int | None]:
        """Return how many samples each shard has by the files beside it, None where they don't say."""
        read_sizes = functools.cache(_read_sizes)
        sizes: list[int | None] = []
        for path in self.shards:
            folder, slash, name = path.rpartition("/")
            stem = next((name.removesuffix(suffix) for suffix in SHARD_SUFFIXES if name.endswith(suffix)), name)
            beside, common = f"{folder}{slash}{stem}_stats.json", f"{folder}{slash}sizes.json"
            stated = _stated_size(beside, read_sizes(beside), "successes")
            sizes.append(_stated_size(common, read_sizes(common), name) if stated is None else stated)
        return sizes

    def _find_sizes(self) -> list[int]:
        """Return how many samples each shard has, by reading those through of which it isn't known."""
        sizes = self._stated_sizes()
        unknown = [number for number, size in enumerate(sizes) if size is None]
        if unknown:
            logger.warning(
                f"{len(unknown)} of {len(self.shards)} shards have neither a _stats.json nor a line in a sizes.json "
                f"beside them; reading them through to count their samples, {self.shards[unknown[0]]} first."
            )
        for number in logging.tqdm(unknown, desc="Counting", unit="shard", disable=len(unknown) < 2):
            sizes[number] = 0
            try:
                for counted, _ in enumerate(_read_shard(self.shards[number], _none), 1):
                    sizes[number] = counted
            except BrokenShardError as error:
                self._report_broken(number, error)
        self._check_broken(range(len(self.shards)))
        return [size or 0 for size in sizes]

    def _broken_names(self) -> str:
        return ", ".join(self.shards[number] for number in self._broken.nonzero().flatten().tolist())

    def _report_broken(self, number: int, error: BrokenShardError) -> None:
        if not self._broken[number]:
            logger.error(
                f"The shard {self.shards[number]} is broken after {error.samples_read} samples: {error.reason}"
            )
        self._broken[number] = True

    def _check_broken(self, shards: Sequence[int]) -> None:
        """Raise a ValueError if more than the allowed share of these shards is broken."""
        broken = sum(self._broken[list(shards)].tolist())
        if broken > self.max_broken_share * len(shards):
            raise ValueError(
                f"{broken} of {len(shards)} shards are broken, more than max_broken_share={self.max_broken_share:g} "
                f"allows: {self._broken_names()}."
            )

    def _batches_before(self, worker: int, workers: int) -> int:
        """Return how many of the epoch's batches the workers before this one yield, which take turns."""
        each, more = divmod(self.batches_per_epoch, workers)
        return worker * each + min(worker, more)

    def _segments(self, epoch: int, first_batch: int, last_batch: int) -> list[tuple[int, int, int]]:
        """List the parts of shards, as number, start and stop, that this process's range of batches is made of."""
        order = np.arange(len(self.shards))
        if self.shuffle_buffer:
            order = np.random.default_rng((self.seed, epoch)).permutation(order)
        ends = np.cumsum(self._sizes[order])
        low, high = (self.num_samples * rank // self.world_size for rank in (self.rank, self.rank + 1))
        # What doesn't make a whole batch is divided too, for it stands in for samples that are passed over.
        start, stop = (low + (high - low) * batch // self.batches_per_epoch for batch in (first_batch, last_batch))
        segments = []
        for number, end in zip(order.tolist(), ends.tolist(), strict=True):
            begin = end - int(self._sizes[number])
            if max(start, begin) < min(stop, end):
                segments.append((number, max(start, begin) - begin, min(stop, end) - begin))
        return segments

    def _row(self, number: int, sample: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return a sample as a row, None if it has no caption."""
        self._skipped.see()
        key = f"{self.shards[number]}/{sample['key']}"
        try:
            caption = _caption_of(sample)
            said = non_empty_captions(caption)
        except ValueError as error:
            self._skipped.skip("undecodable_captions", key, str(error))
            self._skipped.check()
            return None
        if not said:
            self._skipped.skip("empty_captions", key, "it has no caption")
            self._skipped.check()
            return None
        image = next(sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample)
        return {"image": {"bytes": image, "path": None}, "caption": caption, "key": key}

    def _rows(self, segments: Sequence[tuple[int, int, int]], shards: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Yield the rows of parts of shards once; the broken ones are judged against all of `shards`."""
        for number, start, stop in segments:
            read = 0
            try:
                wanted = functools.partial(operator.le, start)
                for read, sample in enumerate(_read_shard(self.shards[number], wanted, stop), 1):
                    row = self._row(number, sample) if read > start else None
                    if row is not None:
                        yield row
                if read < stop:
                    raise BrokenShardError(f"it should have {self._sizes[number]} samples", read)
            except BrokenShardError as error:
                self._report_broken(number, error)
                self._check_broken(shards)

    def _lists_once(self, batch_size: int, worker: int, workers: int) -> Iterator[list[dict[str, Any]]]:
        """Yield a worker's lists of this process: of every global batch in turn its share, which may be empty."""
        size = batch_size * self.world_size
        first = 0  # The number of the present shard's first sample.
        batch = worker
        rows: list[dict[str, Any]] = []

        def is_own(number: int) -> bool:
            place, rest = divmod(first + number, size)
            return place % workers == worker and rest // batch_size == self.rank

        for number, path in enumerate(self.shards):
            read = 0
            try:
                for read, sample in enumerate(_read_shard(path, is_own), 1):
                    if first + read > (batch + 1) * size:
                        yield rows
                        batch, rows = batch + workers, []
                    row = self._row(number, sample) if is_own(read - 1) else None
                    if row is not None:
                        rows.append(row)
                if read < self._sizes[number]:
                    raise BrokenShardError(f"it should have {self._sizes[number]} samples", read)
            except BrokenShardError as error:
                self._report_broken(number, error)
                self._check_broken(range(len(self.shards)))
            first += read
        if first > batch * size:
            yield rows

    def _endless_rows(self, epoch: int, first_batch: int, last_batch: int, worker: int) -> Iterator[dict[str, Any]]:
        """Yield the rows of a range of batches, and from the start again where they are too few."""
        segments = self._segments(epoch, first_batch, last_batch)
        shards = [number for number, _, _ in self._segments(epoch, 0, self.batches_per_epoch)]
        generator = np.random.default_rng((self.seed, epoch, self.rank, worker))
        for round_number in itertools.count():
            empty = True
            for row in _shuffled(self._rows(segments, shards), self.shuffle_buffer, generator):
                empty = False
                if round_number:
                    self._repeated.add("repeated")
                yield row
            if empty:
                names = ", ".join(self.shards[number] for number, _, _ in segments)
                raise ValueError(f"Not one sample of the shards {names} can be used: {self.counts}; see the log.")

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        epoch, passed_epoch, batches_done = self._position.tolist()
        self._require(self.batch_size * self.world_size)
        # Workers take turns, batch by batch.
        first, last = (self._batches_before(number, workers) for number in (worker, worker + 1))
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
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        return self.shards._lists_once(self.batch_size, worker, workers)


__all__ = [
    "BrokenShardError",
    "ImageTextShards",
    "ImageTextShardsOnce",
    "expand_braces",
    "find_shards",
    "names_shards",
]
