"""Pictures in parts, each of which one process reads from its beginning to its end: tar shards, or rows of a table."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.keys import fingerprint
from ..common.known_files import known_value, known_values
from ..model.hub_cache_diffclip import sha256_of
from .counts import SkipCounts
from .shard_files import find_shards, is_url
from .shard_rows import ShardRows
from .shard_samples import BrokenShardError, caption_of, fields_of, image_of, read_shard
from .sources import load_pictures


if TYPE_CHECKING:
    import datasets


def _stamp(path: str) -> list[Any]:
    """Return what tells a shard from what it was before, as JSON: of a URL nothing but that, else its SHA-256.

    Its size and times wouldn't do, for `rsync -t`, `cp -p` and archives set them. Nor may inodes or ctimes stand in
    what is written: one process writes a part and another judges it, perhaps on another machine with a copy of its
    own, and what they write is to be the same, byte for byte. What a file holds is the same everywhere. It's read
    for that where `signature_of` says that it may have changed since it was last, and each time where the file
    system doesn't tell. Every shard has an entry of its own, so that no process waits for another's.
    """
    if is_url(path):
        return [path]
    absolute = os.path.abspath(path)
    return [path, known_value("shard", absolute, [absolute], lambda: sha256_of(Path(absolute)))]


class _Parts:
    """What both kinds have. Rows are `{"image": {"bytes", "path"}, "caption": ..., "image_path": ..., "url": ...}`.

    Attributes:
        captions: Whether rows have a caption, a string.
        columns: What else a row has beside its image, strings or None.
        skipped: Counts the rows, and those that are passed over since they have no caption.
    """

    captions: bool
    columns: tuple[str, ...] = ("image_path",)
    skipped: SkipCounts

    def __len__(self) -> int:
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Return what the division into parts depends on, as JSON."""
        raise NotImplementedError

    def stamp(self, number: int) -> list[Any]:
        """Return what tells a part from what it was before, as JSON."""
        raise NotImplementedError

    def count_rows(self, numbers: Iterable[int]) -> int | None:
        """Return how many rows parts have, None where that isn't known."""
        raise NotImplementedError

    def rows(self, number: int) -> Iterator[dict[str, Any]]:
        """Yield a part's rows in order, without those that lack a caption where there are captions.

        Raises:
            ValueError: More rows or shards than allowed are broken.
        """
        raise NotImplementedError

    def is_broken(self, number: int) -> bool:
        """Say whether a part's end couldn't be read."""
        return False

    def check_broken(self, numbers: Sequence[int]) -> list[str]:
        """Return the names of broken parts; raise a ValueError if they're more than allowed."""
        return []


class ShardParts(_Parts):
    """Tar shards, of which each is a part; see `find_shards`.

    Args:
        source: As in `find_shards`.
        captions: Whether captions are wanted. Where the first sample has none, there are none.
        skipped: See `ShardRows`.
        max_broken_share: Likewise.

    Raises:
        FileNotFoundError, ValueError: As `find_shards` and `ShardRows` raise, or there is no sample.
    """

    def __init__(self, source: str, captions: bool, skipped: SkipCounts, max_broken_share: float):
        self.shards, self.skipped = find_shards(source), skipped
        self.reader = ShardRows(self.shards, skipped.max_share, max_broken_share, count=False, skipped=skipped)
        first = self._first_sample()
        self.captions = captions and self._has_caption(first)
        # Which clip-retrieval shows the pictures by.
        if self._url(first) is not None:
            self.columns = ("image_path", "url")

    def _first_sample(self) -> dict[str, Any]:
        for path in self.shards:
            try:
                return next(read_shard(path, lambda number: number == 0, 1))
            except (BrokenShardError, StopIteration):
                continue
        raise ValueError(f"Not one picture can be read from {', '.join(self.shards[:3])}.")

    @staticmethod
    def _has_caption(sample: dict[str, Any]) -> bool:
        try:
            return caption_of(sample) is not None
        except ValueError:
            return True

    @staticmethod
    def _url(sample: dict[str, Any]) -> str | None:
        try:
            url = fields_of(sample).get("url")
        except ValueError:
            return None
        return url if isinstance(url, str) else None

    def __len__(self) -> int:
        return len(self.shards)

    def describe(self) -> dict[str, Any]:
        return {"shards": len(self.shards), "source_files": fingerprint(self.shards)}

    def stamp(self, number: int) -> list[Any]:
        return _stamp(self.shards[number])

    def count_rows(self, numbers: Iterable[int]) -> int | None:
        sizes = [int(self.reader.sizes[number]) for number in numbers]
        return sum(sizes) if all(sizes) else None

    def rows(self, number: int) -> Iterator[dict[str, Any]]:
        for sample in self.reader.samples(number, lambda index: True, range(len(self.shards))):
            key = self.reader.key(number, sample)
            row: dict[str, Any] | None = {"image": {"bytes": image_of(sample), "path": None}}
            if self.captions:
                row = self.reader.row(number, sample)
            else:
                self.skipped.see()
            if row is not None:
                first = row.get("caption")
                yield row | {
                    "caption": first[0] if isinstance(first, list) else first,
                    "image_path": key,
                    "url": self._url(sample),
                }

    def is_broken(self, number: int) -> bool:
        return number in self.reader.broken

    def check_broken(self, numbers: Sequence[int]) -> list[str]:
        for number in numbers:
            self.reader.broken.mark(number)
        self.reader.broken.check(range(len(self.shards)))
        return [self.shards[number] for number in numbers]


class TableParts(_Parts):
    """So many rows at a time of a folder of pictures or a data set of `datasets`.

    Args:
        dataset: As `load_pictures` returns it.
        files: Likewise.
        size: Rows of a part, at least 1.
        skipped: Counts the rows.

    Raises:
        ValueError: There are no rows.
    """

    def __init__(self, dataset: "datasets.Dataset", files: Sequence[Path], size: int, skipped: SkipCounts):
        if not len(dataset):
            raise ValueError("The data set has no rows.")
        self.dataset, self.files, self.size, self.skipped = dataset, files, size, skipped
        self.captions = "caption" in dataset.column_names

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.size)

    def describe(self) -> dict[str, Any]:
        import datasets

        kept = Path(datasets.config.HF_DATASETS_CACHE)
        # A name there holds the commit of what came from the Hub; when it was fetched says nothing.
        names = [str(path.relative_to(kept)) for path in self.files if path.is_relative_to(kept)]
        # Others are known by what they hold, for the reasons that `_stamp` gives.
        others = [os.path.abspath(path) for path in self.files if not path.is_relative_to(kept)]
        held = known_values("sha256", others, lambda path: sha256_of(Path(path)), "Reading")
        stamps = [names, list(zip(others, held, strict=True))]
        return {"rows": len(self.dataset), "part_rows": self.size, "source_files": fingerprint(stamps)}

    def _range(self, number: int) -> range:
        return range(number * self.size, min((number + 1) * self.size, len(self.dataset)))

    def stamp(self, number: int) -> list[Any]:
        rows = self._range(number)
        return [rows.start, rows.stop]

    def count_rows(self, numbers: Iterable[int]) -> int | None:
        return sum(len(self._range(number)) for number in numbers)

    def rows(self, number: int) -> Iterator[dict[str, Any]]:
        indices = self._range(number)
        for index, row in zip(indices, self.dataset.select(indices), strict=True):
            self.skipped.see()
            path = (row["image"] or {}).get("path") or str(index)
            if self.captions:
                said = self.skipped.captions(path, lambda row=row: row["caption"])  # type: ignore[misc]
                if not said:
                    self.skipped.check()
                    continue
                row["caption"] = said[0]
            yield row | {"image_path": path}


def find_parts(
    source: str,
    *,
    shards: bool,
    skipped: SkipCounts,
    max_broken_share: float,
    part_rows: int,
    captions: bool,
    **options: Any,
) -> ShardParts | TableParts:
    """Divide a source of pictures into parts.

    Args:
        source: Tar shards, a folder of pictures, Parquet files, a folder of `save_to_disk`, or an id on the Hub.
        shards: Whether it names tar shards; see `names_shards`.
        skipped: Counts the rows.
        max_broken_share: See `ShardParts`.
        part_rows: See `TableParts`.
        captions: Whether captions are wanted.
        options: See `load_pictures`; not for tar shards.

    Raises:
        FileNotFoundError, ValueError: As `ShardParts`, `load_pictures` and `TableParts` raise.
    """
    if shards:
        return ShardParts(source, captions, skipped, max_broken_share)
    return TableParts(*load_pictures(source, captions=captions, **options), part_rows, skipped)


__all__ = ["ShardParts", "TableParts", "find_parts"]
