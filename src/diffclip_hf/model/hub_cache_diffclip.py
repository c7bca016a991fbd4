"""The check that the Hub's client leaves out over plain HTTP: whether a file has the hash that was announced."""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def check_cached_file(path: Path) -> None:
    """Remove a large file from the Hub's cache where its content isn't what the Hub announced.

    Args:
        path: A file of the cache. Large files are stored there under the SHA-256 that the Hub announced; others, and
            files that are no part of such a cache, are passed over.

    Raises:
        OSError: The content has another SHA-256; the file is removed before.
    """
    blob = path.resolve()
    if not re.fullmatch("[0-9a-f]{64}", blob.name):
        return
    found = sha256_of(blob)
    if found != blob.name:
        blob.unlink()
        raise OSError(
            f"{path} came with SHA-256 {found}, but the Hub announced {blob.name}. The damaged file was removed; "
            "try again."
        )


@contextmanager
def checked_downloads(repo_id: str, cache_dir: str | os.PathLike | None = None) -> Iterator[None]:
    """Check every large file that comes into a repository's cache while the block runs; once, not at later loads.

    Args:
        repo_id: A Hub id; a local folder is passed over.
        cache_dir: The Hub's cache; None for the client's own.

    Raises:
        OSError: As `check_cached_file` does; it comes before what the block itself raised.
    """
    folder = Path(cache_dir or constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}" / "blobs"
    known = set(folder.glob("*"))
    try:
        yield
    finally:
        for blob in sorted(set(folder.glob("*")) - known):
            check_cached_file(blob)
