"""The embeddings of a folder's pictures, kept so that only new and changed ones are embedded.

They're kept in parts, each a file that is there whole or not at all, so that what is embedded once stays so however
the work ends. A picture is known by its file's path, size, inode and times where the file system tells of every
change (`common/known_files.py`), and else by the SHA-256 of its file: one that was moved, or only touched, is read but
not embedded again.
"""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.utils import logging

from ..common.keys import UnknownContentError, describe, embedding_key, fingerprint, model_fingerprint
from ..common.known_files import all_tell_changes, find_out, signature_of
from ..evaluation.encoder import Encoder
from ..zero_shot import image_files, pixel_values_of
from .files import read_rows, write_rows
from .pictures import embed_pictures


logger = logging.get_logger(__name__)
# After so many seconds, or pictures, what is embedded is kept as a part.
KEPT_EVERY, LARGEST_PART = 20.0, 65536
# Parts and rows that aren't needed any more are cleared when there are so many of them.
MOST_PARTS, MOST_DEAD = 8, 0.1
MOST_NAMED = 10
# What `write_whole` calls a part until it's whole, and how many seconds after its last change it's nobody's any more:
# a part takes seconds to write, and another process, of another machine too, may be writing one.
UNFINISHED, ABANDONED_AFTER = ".part-*.safetensors-*", 24 * 3600.0


def preprocessing_of(encoder: Encoder) -> list[Any]:
    """Return what a picture's pixel values depend on, for a key."""
    return [encoder.processor.image_processor.to_dict(), encoder.processor.image_processor]


def identity_of(encoder: Encoder) -> dict[str, str]:
    """Return what tells a model with its preprocessing from others, whatever it runs on.

    Raises:
        UnknownContentError: It can't be known by its content, as where weights are offloaded.
    """
    return {
        "weights": model_fingerprint(encoder.model),
        "preprocessing": fingerprint(describe(preprocessing_of(encoder))),
    }


class Row(NamedTuple):
    """What a kept embedding is of.

    Args:
        path: Of the picture, from the folder on.
        signature: Of its file, as `signature_of` returns it; None where it doesn't tell.
        digest: The SHA-256 of its file.
    """

    path: str
    signature: tuple[int, ...] | None
    digest: str


@dataclass
class Kept:
    """Embeddings and what they're of.

    Args:
        folder: Where parts are written, None to keep nothing.
        key: What the embeddings depend on.
    """

    folder: Path | None
    key: Mapping[str, Any]
    embeds: list[torch.Tensor] = field(default_factory=list)
    rows: dict[Row, int] = field(default_factory=dict)
    by_digest: dict[str, int] = field(default_factory=dict)
    parts: list[Path] = field(default_factory=list)
    damaged: bool = False
    saved: int = 0
    total: int = 0

    def add(self, row: Row, embed: torch.Tensor) -> int:
        """Take an embedding, (width,), and return where it is."""
        place = self.by_digest.setdefault(row.digest, len(self.embeds))
        if place == len(self.embeds):
            self.embeds.append(embed)
        self.rows[row] = place
        return place

    def read(self) -> None:
        """Read the parts that are there; those that are damaged are left out, and a warning says so."""
        for path in sorted(self.folder.glob("part-*.safetensors")) if self.folder else ():
            try:
                key, rows, embeds, _ = read_rows(path)
                if key != self.key or len(rows) != len(embeds):
                    raise ValueError(f"{path} isn't of this folder and model.")
                found = [Row(one, None if tells is None else tuple(tells), digest) for one, tells, digest in rows]
            # Another process may just have put several into one.
            except FileNotFoundError:
                continue
            except (ValueError, OSError, TypeError) as error:
                logger.warning("Its pictures are embedded again: %s", error)
                self.damaged = True
            else:
                for row, embed in zip(found, embeds.unbind(), strict=True):
                    self.add(row, embed)
                self.total += len(found)
            self.parts.append(path)
        self.saved = len(self.rows)

    def remove_abandoned(self) -> None:
        """Remove what processes that were killed have left of parts."""
        for path in self.folder.glob(UNFINISHED) if self.folder else ():
            # It may be gone by now, or belong to another user of a shared folder.
            with suppress(FileNotFoundError, PermissionError):
                if time.time() - path.stat().st_mtime > ABANDONED_AFTER:
                    path.unlink()

    def write(self, rows: Sequence[Row]) -> list[Path]:
        """Write rows as parts; a warning says where they can't be written."""
        written: list[Path] = []
        if self.folder is None:
            return written
        for start in range(0, len(rows), LARGEST_PART):
            some = rows[start : start + LARGEST_PART]
            path = self.folder / f"part-{uuid.uuid4().hex[:16]}.safetensors"
            said = [[row.path, row.signature, row.digest] for row in some]
            try:
                write_rows(path, self.key, said, torch.stack([self.embeds[self.rows[row]] for row in some]))
            except OSError as error:
                logger.warning_once(f"Embeddings can't be kept in {self.folder}: {error}")
                break
            written.append(path)
        return written

    def write_new(self) -> None:
        """Write what has been added since the last time."""
        new = list(self.rows)[self.saved :]
        self.parts += self.write(new)
        self.saved, self.total = len(self.rows), self.total + len(new)

    def clear(self, needed: Sequence[Row]) -> None:
        """Write what is needed into few parts and remove the others, if they are many or much of them isn't needed."""
        few = len(self.parts) <= MOST_PARTS + len(needed) // LARGEST_PART
        if few and not self.damaged and self.total - len(needed) <= MOST_DEAD * len(needed):
            return
        written = self.write(needed)
        if len(written) == -(-len(needed) // LARGEST_PART):
            for path in self.parts:
                path.unlink(missing_ok=True)
            self.parts, self.total = written, len(needed)


def _find_kept(folder: Path, encoder: Encoder, cache_dir: Path | None) -> Kept:
    """Return what is kept of a folder's pictures for a model, its preprocessing and the versions of the code."""
    if cache_dir is None:
        return Kept(None, {})
    try:
        key = embedding_key(encoder.model, kind="projected", preprocessing=preprocessing_of(encoder))
    except UnknownContentError as error:
        logger.warning("Embeddings aren't kept, for it can't be known what they depend on: %s.", error)
        return Kept(None, {})
    key["folder"] = os.fsencode(os.path.realpath(folder)).hex()
    # As it comes back from a file.
    kept = Kept(cache_dir / f"folder-{fingerprint(key)}", json.loads(json.dumps(key)))
    kept.remove_abandoned()
    kept.read()
    return kept


def _signatures(paths: Sequence[str], tell: bool) -> list[tuple[int, ...] | None]:
    found: list[tuple[int, ...] | None] = []
    for path in paths:
        try:
            found.append(tuple(signature_of(path)) if tell else None)
        # What reads it says why.
        except OSError:
            found.append(None)
    return found


def _warn_of(left_out: Mapping[str, str], count: int) -> None:
    for reason in list(left_out.values())[:MOST_NAMED]:
        logger.warning("Left out: %s", reason)
    if left_out:
        logger.warning("%d of %d pictures can't be read and are left out.", len(left_out), count)


def _embedded(
    encoder: Encoder, kept: Kept, paths: Sequence[str]
) -> Iterator[tuple[int, tuple[str, Any], torch.Tensor | None]]:
    """Return, one by one, each picture's index, what is known of its file, and its embedding.

    That is the file's digest and signature; of one that can't be read "" and why. There's no embedding where one of
    that digest is kept, or came before.
    """
    # What is embedded in this run isn't in the workers' copy, so they read its pixels again, in vain.
    known, embedded = frozenset(kept.by_digest), set[str]()

    def digest_and_pixels(path: str) -> tuple[str, torch.Tensor | None]:
        content = Path(path).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        return digest, None if digest in known else pixel_values_of(encoder.processor.image_processor, content)

    def read(path: str) -> tuple[tuple[str, Any], torch.Tensor | None]:
        try:
            (digest, pixels), signature = find_out(path, digest_and_pixels)
        except (ValueError, OSError) as error:
            # The bytes are the file's.
            reason = str(getattr(error, "strerror", None) or error).replace("What is given as bytes", "The file")
            return ("", f"{path}: {reason}"), None
        return (digest, signature), pixels

    def is_embedded(said: tuple[str, Any]) -> bool:
        before = said[0] in embedded
        embedded.add(said[0])
        return before

    return embed_pictures(encoder, paths, read, sendable=True, passed_over=is_embedded)


def embed_folder(
    folder: str | os.PathLike, encoder: Encoder, cache_dir: Path | None
) -> tuple[list[str], torch.Tensor, dict[str, str]]:
    """Return a folder's pictures, by `image_files`: their paths, embeddings, and why some are left out.

    Args:
        folder: With sub-folders.
        encoder: Embeds them.
        cache_dir: Where embeddings are kept, None to keep none.

    Raises:
        ValueError: There are no pictures, or none can be read.
    """
    paths = [str(path) for path in image_files(folder)]
    # Path leaves out a leading ./
    prefix = os.path.join("" if str(Path(folder)) == "." else Path(folder), "")
    parts = [path.removeprefix(prefix) for path in paths]
    kept = _find_kept(Path(folder), encoder, cache_dir)
    tell = all_tell_changes(paths)
    signed: dict[tuple[str, Any], Row] = {
        (row.path, row.signature): row for row in kept.rows if row.signature is not None
    }
    found = {
        index: signed[part, signature]
        for index, (part, signature) in enumerate(zip(parts, _signatures(paths, tell), strict=True))
        if (part, signature) in signed
    }
    unknown = [index for index in range(len(paths)) if index not in found]
    left_out: dict[str, str] = {}
    last = time.monotonic()
    try:
        for place, (digest, said), embed in _embedded(encoder, kept, [paths[index] for index in unknown]):
            index = unknown[place]
            if not digest:
                left_out[paths[index]] = said
                continue
            row = Row(parts[index], tuple(said) if said and tell else None, digest)
            kept.add(row, kept.embeds[kept.by_digest[digest]] if embed is None else embed)
            found[index] = row
            if time.monotonic() - last > KEPT_EVERY:
                kept.write_new()
                last = time.monotonic()
    finally:
        kept.write_new()
    _warn_of(left_out, len(paths))
    if not found:
        raise ValueError(f"None of the {len(paths)} pictures in {os.fspath(folder)!r} can be read.")
    order = sorted(found)
    kept.clear([found[index] for index in order])
    embeds = torch.stack([kept.embeds[kept.rows[found[index]]] for index in order])
    return [paths[index] for index in order], embeds, left_out


__all__ = ["embed_folder", "identity_of"]
