"""A folder of embeddings written part by part, each whole or not at all, in the layout that clip-retrieval reads.

    img_emb/img_emb_00.npy         float16 or float32, (rows, width), L2-normalised
    text_emb/text_emb_00.npy       the same of the captions, where there are any
    metadata/metadata_00.parquet   a row for each: image_path, caption, url

Row n of all three is of one picture. Names are in the order of the parts, which is also that of an alphabet. A
Parquet file comes last, and says in its metadata what was counted: a part is there when it is.
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from transformers.utils import logging

from .json_files import read_json_object
from .whole_files import check_output_file, write_text_whole


try:
    import fcntl
except ImportError:  # Windows has none.
    fcntl = None  # type: ignore[assignment]


logger = logging.get_logger(__name__)
SETTINGS, REPORT = "embed_settings.json", "embed_report.json"
# What is being written; a process that was killed leaves it.
UNFINISHED = ".part-"
# Is there while a process writes to the folder; one that was killed leaves the file, but not its lock.
LOCK = ".lock"
IMAGES, TEXTS, METADATA = "img_emb", "text_emb", "metadata"
NOTE = b"diffclip_hf"
# Settings that are known by a digest, which says nothing to a reader.
DIGESTS = ("source_files", "weights", "processor")
# Rows that a Parquet file takes at once.
ROW_GROUP = 4096


class _NumpyFile:
    """An .npy file that rows are added to; its first line, which has their number, is written anew at the end."""

    def __init__(self, file: IO[bytes], dtype: str):
        self.file, self.dtype = file, np.dtype(dtype).newbyteorder("<")
        self.rows, self.width = 0, 0

    def add(self, rows: np.ndarray) -> None:
        if not self.rows:
            self.width = rows.shape[1]
            self._write_header()
        self.file.write(rows.astype(self.dtype).tobytes())
        self.rows += len(rows)

    def finish(self) -> None:
        self.file.seek(0)
        self._write_header()

    def _write_header(self) -> None:
        # numpy leaves room in it for any number of rows.
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.rows, self.width)}
        np.lib.format.write_array_header_1_0(self.file, header)


def _text(value: str | None) -> str | None:
    """Return a text as Parquet takes it: of a file's name that isn't UTF-8 the odd bytes are written out."""
    return None if value is None else value.encode("utf-8", "backslashreplace").decode()


class PartWriter:
    """Writes one part's files into a folder of its own.

    Args:
        folder: Empty.
        kinds: Of embeddings.
        dtype: Theirs.
        columns: Of the metadata.
    """

    def __init__(self, folder: Path, kinds: Sequence[str], dtype: str, columns: Sequence[str]):
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]

        self.files = ExitStack()
        self.embeds = {
            kind: _NumpyFile(self.files.enter_context((folder / kind).open("w+b")), dtype) for kind in kinds
        }
        self.schema = pa.schema([(name, pa.string()) for name in columns])
        self.table = self.files.enter_context(pq.ParquetWriter(folder / METADATA, self.schema))
        self.waiting: list[Mapping[str, Any]] = []
        self.rows = 0

    def add(self, embeds: Mapping[str, np.ndarray], rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows: the embeddings of each kind, (rows, width), and what is said of each."""
        for kind, file in self.embeds.items():
            file.add(embeds[kind])
        self.rows += len(rows)
        self.waiting += [{name: _text(row[name]) for name in self.schema.names} for row in rows]
        if len(self.waiting) >= ROW_GROUP:
            self._write_rows()

    def _write_rows(self) -> None:
        import pyarrow as pa

        self.table.write_table(pa.Table.from_pylist(self.waiting, self.schema))
        self.waiting = []

    def finish(self, note: Mapping[str, Any]) -> None:
        """Complete the files; `note` goes into the metadata."""
        for file in self.embeds.values():
            if file.rows:
                file.finish()
        if self.waiting:
            self._write_rows()
        self.table.add_key_value_metadata({NOTE: json.dumps({"rows": self.rows, **note}, sort_keys=True)})

    def close(self) -> None:
        self.files.close()


class EmbeddingParts:
    """A folder of embeddings in parts.

    Args:
        folder: New, empty, or begun with the same settings.
        parts: How many there are.
        captions: Whether captions are embedded too.
        dtype: float16 or float32.
        columns: Of the metadata, strings.
    """

    def __init__(self, folder: Path, parts: int, captions: bool, dtype: str, columns: Sequence[str]):
        self.folder, self.digits, self.dtype = folder, len(str(parts)), dtype
        self.kinds = (IMAGES, TEXTS) if captions else (IMAGES,)
        self.columns = columns

    def path(self, kind: str, number: int) -> Path:
        """Return where a part's file of a kind is, or will be."""
        suffix = "parquet" if kind == METADATA else "npy"
        return self.folder / kind / f"{kind}_{number:0{self.digits}}.{suffix}"

    def note(self, number: int) -> dict[str, Any] | None:
        """Return what is said of a part that is there and whole, None of others."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            metadata = pq.read_metadata(self.path(METADATA, number))
            note = json.loads((metadata.metadata or {})[NOTE])
            rows = note["rows"]
            whole = metadata.num_rows == rows and all(self._rows(kind, number) == rows for kind in self.kinds if rows)
        except (OSError, ValueError, LookupError, TypeError, pa.ArrowException):
            return None
        return note if whole else None

    def _rows(self, kind: str, number: int) -> int:
        return len(np.load(self.path(kind, number), mmap_mode="r"))

    @contextmanager
    def writing(self, number: int) -> Iterator[PartWriter]:
        """Give what writes a part; its files are put in their places at the end, and an error leaves none of them."""
        beside = Path(tempfile.mkdtemp(dir=self.folder, prefix=UNFINISHED))
        try:
            writer = PartWriter(beside, self.kinds, self.dtype, self.columns)
            try:
                yield writer
            finally:
                writer.close()
            # An earlier one's would stand for what isn't whole yet.
            for kind in (METADATA, *self.kinds):
                self.path(kind, number).parent.mkdir(exist_ok=True)
                self.path(kind, number).unlink(missing_ok=True)
            for kind in (*self.kinds, METADATA):
                # Where every row was passed over, there is no file of embeddings, as clip-retrieval has none.
                if writer.rows or kind == METADATA:
                    (beside / kind).rename(self.path(kind, number))
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def check_place(folder: Path) -> None:
    """Find out before the work whether embeddings can be written to a folder: new, empty, or begun before.

    Raises:
        FileExistsError: It has something else in it.
        OSError: It can't be made or written.
    """
    check_output_file(folder / SETTINGS)
    if (folder / SETTINGS).exists() or not folder.exists():
        return
    if any(not path.name.startswith((UNFINISHED, f".{SETTINGS}", LOCK)) for path in folder.iterdir()):
        raise FileExistsError(f"{folder} isn't empty, and no embeddings were begun there; name a new folder.")


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(path: Path) -> IO[bytes]:
    """Return a file with its lock, which the system takes back when this process closes it or ends, however it does.

    Raises:
        BlockingIOError: Another process has it.
        OSError: It can't be opened, or locked on this file system.
    """
    while True:
        file = path.open("ab")
        try:
            # Processes that are forked from this one, as those that read pictures, don't hold it too, as flock's.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The process that had it before may have removed it since it was opened.
            if _is_at(file, path):
                return file
        except OSError as error:
            file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise BlockingIOError(
                    f"Another process is writing to {path.parent}; wait for its end, or name another folder."
                ) from None
            raise
        file.close()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to a folder, which is made; a warning says where that can't be done.

    Raises:
        BlockingIOError: Another process is writing to it.
        OSError: It can't be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, file, reason = folder / LOCK, None, "this system has no locks"
    if fcntl is not None:
        try:
            file = _lock(path)
        except OSError as error:
            # As on Lustre that is mounted without locks.
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
                raise
            reason = error.strerror or reason
    if file is None:
        logger.warning(
            "%s can't be locked (%s): see to it that only one command at a time writes there.", folder, reason
        )
    try:
        yield
    finally:
        # Before the lock ends, for then it may be another's.
        if file is not None:
            path.unlink(missing_ok=True)
            file.close()


def begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Keep what embeddings in a folder depend on, and remove what a process that was killed has left.

    What another process is writing would be removed too, so that the folder has to be `locked`.

    Raises:
        ValueError: They were begun with other settings.
    """
    if (folder / SETTINGS).exists():
        before = read_json_object(folder / SETTINGS)
        for name in sorted({*before, *settings}):
            was, now = before.get(name), settings.get(name)
            if was != now:
                said = f"other {name}" if name in DIGESTS else f"{name} {was!r:.80}, and it is {now!r:.80} now"
                raise ValueError(
                    f"The embeddings in {folder} were begun with {said}; give what was given before, or name a new "
                    "folder."
                )
    else:
        write_text_whole(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")
    for path in (*folder.glob(f"{UNFINISHED}*"), *folder.glob(".embed_*")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


__all__ = [
    "IMAGES",
    "METADATA",
    "REPORT",
    "SETTINGS",
    "TEXTS",
    "EmbeddingParts",
    "PartWriter",
    "begin",
    "check_place",
    "locked",
]
