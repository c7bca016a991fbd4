"""What was found out about files by reading them, kept for as long as they are the same.

A file is the same where its size, its inode and the times of its last change are. Programs set a file's mtime as they
like (`cp -p`, `rsync --times`, archives), but its ctime is set by the file system, at every change of the content or
of the mtime. So what is kept may be trusted where the file system does so; elsewhere nothing is kept.
"""

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock
from transformers.utils import logging

from .whole_files import write_text_whole


logger = logging.get_logger(__name__)
FOLDER = Path(constants.HF_HOME) / "diffclip_hf" / "files"
MOUNTS = Path("/proc/self/mounts")
# What the kernel writes there in octal: a space, tab, line break, backslash and #. Other bytes of a name stay as they
# are, of whatever encoding.
ESCAPED = re.compile(rb"\\(040|011|012|134|043)")
# Two changes may have one time where a file system's clock ticks slowly, or a server's isn't this machine's. So
# nothing is kept of files that changed less than so many nanoseconds ago.
SETTLED = 2 * 10**9
# Linux's file systems that set ctime by themselves. Those in user space and Windows' shares may make it up.
TELLING = {"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "gpfs", "jfs", "lustre", "nfs", "nfs4", "overlay"}
TELLING |= {"ramfs", "reiserfs", "tmpfs", "xfs", "zfs"}
THREADS = 16


def _mounts() -> dict[str, str]:
    """Return the file system of each place where one is mounted, nothing where that isn't known."""
    try:
        lines = MOUNTS.read_bytes().split(b"\n")
    except OSError:
        return {}
    mounts = {}
    for line in filter(None, lines):
        _, place, kind, *_ = line.split(b" ")
        plain = ESCAPED.sub(lambda escaped: bytes([int(escaped[1], 8)]), place)
        # As Python gives paths: a name needn't be UTF-8.
        mounts[os.fsdecode(plain)] = os.fsdecode(kind)
    return mounts


def tells_changes(folder: str, mounts: dict[str, str]) -> bool:
    """Say whether the file system of a folder sets a file's ctime at each change.

    Args:
        folder: Its path.
        mounts: The file system of each place where one is mounted, as Linux says.
    """
    if sys.platform == "darwin":
        return True
    place = Path(os.path.realpath(folder))
    return next((mounts[str(at)] for at in (place, *place.parents) if str(at) in mounts), None) in TELLING


def all_tell_changes(paths: Sequence[str]) -> bool:
    """Say whether the file systems of all these files set their ctime at each change.

    A link's file may be on another than the link.
    """
    mounts = _mounts()
    files = (os.path.realpath(path) if os.path.islink(path) else path for path in paths)
    return all(tells_changes(folder, mounts) for folder in {os.path.dirname(file) for file in files})


def _place(kind: str, key: str) -> Path:
    return FOLDER / f"{kind}-{hashlib.sha256(key.encode(errors='surrogateescape')).hexdigest()[:32]}.json"


def signature_of(path: str) -> list[int]:
    """Return what tells a file from what it was before, as JSON.

    Raises:
        OSError: It can't be opened.
    """
    # NFS asks its server only when a file is opened.
    with open(path, "rb") as file:
        found = os.fstat(file.fileno())
    return [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def _read_index(path: Path) -> dict[str, Any]:
    """Return what is kept, path → signature and value; nothing where it's damaged."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return index if isinstance(index, dict) else {}


def find_out(path: str, compute: Callable[[str], Any]) -> tuple[Any, list[int] | None]:
    """Return a file's value, and the signature under which it may be kept, if it may."""
    started, before = time.time_ns(), signature_of(path)
    value = compute(path)
    settled = before == signature_of(path) and started - max(before[2:]) > SETTLED
    return value, before if settled else None


def known_values(
    kind: str, paths: Sequence[str], compute: Callable[[str], Any], description: str = "Files"
) -> list[Any]:
    """Return what `compute` returns of files, computed only for those that have changed since it was kept.

    What isn't kept yet is computed by several threads, in one process of those that ask at the same time; the others
    wait for it and take what it kept.

    Args:
        kind: What is found out, as part of a file's name.
        paths: Absolute paths of files that are there.
        compute: Takes a path; returns what JSON can hold.
        description: Of the progress bar.

    Raises:
        OSError: A file can't be read.
    """
    if not paths:
        return []
    if not all_tell_changes(paths):
        return [value for value, _ in _find_all(paths, compute, description)]
    place = _place(kind, os.path.commonpath(list({os.path.dirname(path) for path in paths})))
    known = _known(_read_index(place), paths)
    if None not in known:
        return [value for _, value in known]
    with ExitStack() as stack:
        try:
            FOLDER.mkdir(parents=True, exist_ok=True)
            stack.enter_context(WeakFileLock(place.with_suffix(".lock")))
        except OSError as error:
            logger.warning_once(f"What is found out about files can't be kept in {FOLDER}: {error}")
        return _complete(place, paths, compute, description)


def known_value(kind: str, key: str, paths: Sequence[str], compute: Callable[[], Any]) -> Any:
    """Return what `compute` returns of files together, computed only if one has changed since it was kept.

    Args:
        kind: What is found out, as part of a file's name.
        key: What else it depends on.
        paths: The files that it depends on.
        compute: Returns what JSON can hold.

    Raises:
        OSError: A file isn't there.
    """
    if not all_tell_changes(paths):
        return compute()
    place = _place(kind, key)

    def signatures() -> tuple[str, int]:
        found = [(path, signature_of(path)) for path in paths]
        changed = max((time_ns for _, (_, _, *times) in found for time_ns in times), default=0)
        return hashlib.sha256(json.dumps(found).encode()).hexdigest(), changed

    started = time.time_ns()
    before, changed = signatures()
    index = _read_index(place)
    if index.get("signature") == before and "value" in index:
        return index["value"]
    value = compute()
    if started - changed > SETTLED and signatures()[0] == before:
        _keep(place, {"signature": before, "value": value})
    return value


def _keep(place: Path, index: dict[str, Any]) -> None:
    try:
        write_text_whole(place, json.dumps(index))
    except OSError as error:
        logger.warning_once(f"What is found out about files can't be kept in {FOLDER}: {error}")


def _known(index: dict[str, Any], paths: Sequence[str]) -> list[Any]:
    """Return the entry of each file, None where there is none or it has changed."""
    entries = [index.get(path) for path in paths]
    return [
        entry if isinstance(entry, list) and entry[0] == signature_of(path) else None
        for entry, path in zip(entries, paths, strict=True)
    ]


def _find_all(
    paths: Sequence[str], compute: Callable[[str], Any], description: str
) -> list[tuple[Any, list[int] | None]]:
    """Return each file's value and signature; a bar shows how far it is where there are several."""
    threads = min(THREADS, len(paths))
    with (
        ThreadPoolExecutor(threads) as pool,
        logging.tqdm(total=len(paths), desc=description, unit="file", disable=threads < 2) as bar,
    ):
        found = []
        for one in pool.map(lambda path: find_out(path, compute), paths):
            found.append(one)
            bar.update()
    return found


def _complete(place: Path, paths: Sequence[str], compute: Callable[[str], Any], description: str) -> list[Any]:
    """Return each file's value, after what wasn't known has been found out and kept, under the index's lock."""
    # Another process may just have done it.
    index = _read_index(place)
    known = _known(index, paths)
    missing = [path for path, entry in zip(paths, known, strict=True) if entry is None]
    found = dict(zip(missing, _find_all(missing, compute, description), strict=True)) if missing else {}
    kept = {path: [signature, value] for path, (value, signature) in found.items() if signature is not None}
    if kept:
        _keep(place, index | kept)
    return [found[path][0] if entry is None else entry[1] for path, entry in zip(paths, known, strict=True)]


__all__ = ["all_tell_changes", "find_out", "known_value", "known_values", "signature_of", "tells_changes"]
