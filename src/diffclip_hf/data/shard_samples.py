"""The samples of one tar shard, in order, as far as it can be read."""

import itertools
import json
import math
import tarfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..model.image_fetching_diffclip import one_line
from .shard_files import is_url, open_shard


IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


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
    mode = "r|*" if is_url(path) else "r:*"
    with open_shard(path) as file, tarfile.open(fileobj=file, mode=mode, tarinfo=_WholeTarInfo) as archive:  # type: ignore[call-overload]
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


def read_shard(path: str, wanted: Callable[[int], bool], stop: float = math.inf) -> Iterator[dict[str, Any]]:
    """Yield the samples of a shard as `_samples` does; raise a BrokenShardError where it can't be read."""
    samples = _samples(path, wanted, stop)
    for number in itertools.count():
        try:
            sample = next(samples)
        except StopIteration:
            return
        # A damaged file makes tarfile raise nearly anything, and a file system of the network has errors of its own.
        except Exception as error:
            raise BrokenShardError(f"{type(error).__name__}: {one_line(error)}", number) from error
        yield sample


def caption_of(sample: Mapping[str, Any]) -> Any:
    """Return a sample's caption: its `txt`, or the `caption` of its `json` where it has none; None if it has neither.

    Raises:
        ValueError: It isn't UTF-8, or the JSON isn't an object.
    """
    if "txt" in sample:
        return sample["txt"].decode("utf-8")
    return fields_of(sample).get("caption")


def image_of(sample: Mapping[str, Any]) -> bytes:
    """Return the bytes of a sample's picture."""
    return next(sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample)


def fields_of(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a sample's `json` holds, nothing where it has none; raise a ValueError if it isn't an object."""
    try:
        fields = json.loads(sample.get("json") or b"{}")
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error
    if not isinstance(fields, dict):
        raise ValueError(f"the JSON is of type {type(fields).__name__} rather than an object")
    return fields


__all__ = ["IMAGE_EXTENSIONS", "BrokenShardError", "caption_of", "fields_of", "image_of", "read_shard"]
