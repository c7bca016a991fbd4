"""The embeddings that are nearest to a query: all of them compared, or some of them by FAISS or hnswlib."""

import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np
import torch

from ..common.commands import require_extra
from ..model.image_fetching_diffclip import one_line


# How far a float32 product of two vectors of length 1 may be from their cosine similarity.
ROUNDING = 1e-5
# Of the approximate ones: how many neighbours they look at, at least; more find more of the nearest and take longer.
LEAST_LOOKED_AT = 128
ROWS_AT_ONCE = 65536
# Scores that are held at once, 128 MB.
MOST_SCORES = 1 << 25


class Nearest(Protocol):
    """What finds rows that are near to queries, for several threads at once.

    Each call gives the rows, float32, (rows, width). From call to call there may be more, after the same first ones,
    and a thread whose search began earlier gives fewer again.
    """

    def candidates(self, embeds: torch.Tensor, queries: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
        """Yield for each query the indices of the nearest rows, at least `count`, in any order.

        Args:
            embeds: The rows.
            queries: float32, (queries, width).
            count: How many are needed, no more than there are.
        """

    def to_bytes(self, embeds: torch.Tensor) -> bytes | None:
        """Return what `from_bytes` makes the same of, None where the rows are enough."""

    def from_bytes(self, data: bytes, embeds: torch.Tensor) -> None:
        """Become what `to_bytes` returned of these rows."""


class Exact:
    """Compares a query with every row, by a matrix product."""

    def candidates(self, embeds: torch.Tensor, queries: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
        for some in queries.split(max(1, MOST_SCORES // len(embeds))):
            # By numpy, for torch's products may be in bfloat16, as autocast or the precision that was set asks; and
            # its threads would wait for each other in each of the small steps after it.
            for scores in some.numpy() @ embeds.numpy().T:
                least = np.partition(scores, len(scores) - count)[len(scores) - count]
                # All that may be as near as the last, for what is equally near is ordered by names.
                yield torch.from_numpy(np.flatnonzero(scores >= least - 2 * ROUNDING))

    def to_bytes(self, embeds: torch.Tensor) -> None:
        return None

    def from_bytes(self, data: bytes, embeds: torch.Tensor) -> None:
        pass


class Approximate:
    """What a library's own index finds, which one thread uses at a time and which grows with the rows."""

    def __init__(self) -> None:
        self.index: Any = None
        self._lock = Lock()

    def candidates(self, embeds: torch.Tensor, queries: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
        with self._lock:
            self._extend(embeds)
            # Those that another thread has added since may be among the nearest, and are none of these rows.
            found = self._find(queries, count + self._count() - len(embeds))
        for rows in found:
            # Where FAISS finds fewer, it fills up with -1.
            yield rows[(rows >= 0) & (rows < len(embeds))]

    def to_bytes(self, embeds: torch.Tensor) -> bytes | None:
        with self._lock:
            self._extend(embeds)
            return self._to_bytes() if self._count() == len(embeds) else None

    def from_bytes(self, data: bytes, embeds: torch.Tensor) -> None:
        with self._lock:
            self._from_bytes(data, embeds)
            self._extend(embeds)

    def _count(self) -> int:
        """Return how many rows it has."""
        raise NotImplementedError

    def _extend(self, embeds: torch.Tensor) -> None:
        """Take the rows that it hasn't yet."""
        raise NotImplementedError

    def _find(self, queries: torch.Tensor, count: int) -> torch.Tensor:
        """Return the indices of rows near to each query, int64, (queries, count)."""
        raise NotImplementedError

    def _to_bytes(self) -> bytes:
        raise NotImplementedError

    def _from_bytes(self, data: bytes, embeds: torch.Tensor) -> None:
        raise NotImplementedError


class Faiss(Approximate):
    """Lets FAISS find them.

    Args:
        factory: What kind of index, as `faiss.index_factory` takes it.
    """

    def __init__(self, factory: str):
        require_extra("faiss", "faiss")
        super().__init__()
        self.factory = factory

    def _use(self, index: Any) -> None:
        self.index = index
        if hasattr(index, "hnsw"):
            index.hnsw.efSearch = LEAST_LOOKED_AT

    def _count(self) -> int:
        return self.index.ntotal

    def _extend(self, embeds: torch.Tensor) -> None:
        import faiss

        if self.index is None:
            try:
                made = faiss.index_factory(embeds.shape[1], self.factory, faiss.METRIC_INNER_PRODUCT)
                made.train(embeds.numpy())
            # Of a name that it doesn't know, or of more clusters than there are rows.
            except RuntimeError as error:
                reason = str(error).split("Error: ")[-1]
                raise ValueError(f"FAISS can't make an index {self.factory!r}: {reason}") from error
            self._use(made)
        if len(embeds) > self.index.ntotal:
            self.index.add(embeds[self.index.ntotal :].numpy())

    def _find(self, queries: torch.Tensor, count: int) -> torch.Tensor:
        if hasattr(self.index, "hnsw"):
            self.index.hnsw.efSearch = max(LEAST_LOOKED_AT, 2 * count)
        return torch.from_numpy(self.index.search(queries.numpy(), count)[1])

    def _to_bytes(self) -> bytes:
        import faiss

        return faiss.serialize_index(self.index).tobytes()

    def _from_bytes(self, data: bytes, embeds: torch.Tensor) -> None:
        import faiss

        try:
            self._use(faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8)))
        except RuntimeError as error:
            raise ValueError(f"FAISS can't read its part of the index: {one_line(error, 300)}") from error


class Hnswlib(Approximate):
    """Lets hnswlib find them."""

    def __init__(self) -> None:
        require_extra("hnswlib", "hnswlib")
        super().__init__()

    def _count(self) -> int:
        return self.index.get_current_count()

    def _extend(self, embeds: torch.Tensor) -> None:
        import hnswlib

        if self.index is None:
            self.index = hnswlib.Index(space="ip", dim=embeds.shape[1])
            self.index.init_index(max_elements=len(embeds), ef_construction=200, M=16)
        count = self._count()
        if len(embeds) > count:
            if len(embeds) > self.index.get_max_elements():
                self.index.resize_index(math.ceil(1.5 * len(embeds)))
            self.index.add_items(embeds[count:].numpy(), np.arange(count, len(embeds)))

    def _find(self, queries: torch.Tensor, count: int) -> torch.Tensor:
        self.index.set_ef(max(LEAST_LOOKED_AT, 2 * count))
        return torch.from_numpy(self.index.knn_query(queries.numpy(), k=count)[0].astype(np.int64))

    def _to_bytes(self) -> bytes:
        # It writes to files alone.
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "index")
            self.index.save_index(str(path))
            return path.read_bytes()

    def _from_bytes(self, data: bytes, embeds: torch.Tensor) -> None:
        import hnswlib

        self.index = hnswlib.Index(space="ip", dim=embeds.shape[1])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "index")
            path.write_bytes(data)
            self.index.load_index(str(path), max_elements=len(embeds))


def make_nearest(backend: str) -> Nearest:
    """Return what a backend's name stands for: `exact`, `hnswlib`, `faiss`, or `faiss:` and a factory's string.

    Raises:
        ValueError: There's no such backend.
        ImportError: Its package isn't installed.
    """
    name, _, factory = backend.partition(":") if isinstance(backend, str) else (None, "", "")
    if name == "faiss":
        return Faiss(factory or "HNSW32")
    if factory or name not in ("exact", "hnswlib"):
        raise ValueError(
            f"backend is {backend!r}; it must be 'exact', 'faiss', 'hnswlib', or 'faiss:' and what "
            "faiss.index_factory takes."
        )
    return Exact() if name == "exact" else Hnswlib()


def ranked(
    embeds: torch.Tensor, names: Sequence[str], query: torch.Tensor, rows: torch.Tensor, count: int
) -> list[tuple[float, str]]:
    """Return the best of some rows, with their scores: in float64, and equal ones by their names.

    Args:
        embeds: float32, (rows, width).
        names: Each row's.
        query: float32, (width,).
        rows: Which rows.
        count: How many to return.
    """
    vector, table = query.double().numpy(), embeds.numpy()
    scores: list[float] = []
    for some in rows.split(ROWS_AT_ONCE):
        # Row by row in the same way, so that equal embeddings have equal scores, as they needn't in a product.
        scores += (table[some.numpy()] * vector).sum(axis=1).tolist()
    pairs = sorted(zip(scores, (names[row] for row in rows.tolist()), strict=True), key=lambda one: (-one[0], one[1]))
    return pairs[:count]


__all__ = ["ROWS_AT_ONCE", "Nearest", "make_nearest", "ranked"]
