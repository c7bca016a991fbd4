"""How many candidates are before each query's own, by similarity: in blocks, and the same whatever their size.

Matrix products round a score by the shape of the matrices, so that embeddings that are alike may differ in the last
bit. They only decide what is further from a query's own score than they can be wrong; what is nearer is computed anew
by `row_products`, which depends on nothing but the two embeddings.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


# Rows of embeddings, or pairs of them, that are in memory at once in float64.
CHUNK = 4096
CPU_BLOCK, DEVICE_BLOCK = 2048, 8192
EVERYTHING = torch.iinfo(torch.int64).max


def choose_device(device: torch.device | None, embeds: torch.Tensor) -> torch.device:
    """Return where products are computed: on a device, or where the embeddings are; on the CPU where that's MPS."""
    device = embeds.device if device is None else torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device  # It has no float64.


def default_block(device: torch.device) -> int:
    """Return how many rows and columns of scores are computed at once on a device: 16 MiB on a CPU, else 256."""
    return CPU_BLOCK if device.type == "cpu" else DEVICE_BLOCK


def row_products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the products of rows, (rows,), float64; each depends on its two rows alone, to the last bit.

    Those of two float32 numbers are exact in float64, and their sum is taken in one order.

    Args:
        left, right: (rows, width).
    """
    products = left.double() * right.double()
    while (width := products.shape[1]) > 1:
        half = width // 2
        rest = products[:, 2 * half :]
        products = products[:, :half] + products[:, half : 2 * half]
        if width % 2:
            products = torch.cat([products, rest], dim=1)
    return products[:, 0]


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute products of float32 in float32, whatever else is allowed: neither TF32 nor bfloat16."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def rounding(block: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return by how much each row's products with the other rows may be wrong, float64, (rows,), at the most.

    Those that aren't finite are as wrong as they look.
    """
    norms, most = (
        torch.where(found.isfinite(), found, 0)
        for found in (torch.linalg.vector_norm(rows.double(), dim=1) for rows in (block, others))
    )
    # n products and their sum, in any order, are off by n half units at most; some more is for bounds in float32.
    limits = torch.finfo(block.dtype)
    return norms * most.max() * limits.eps * (block.shape[1] / 2 + 16) + limits.tiny * block.shape[1]


class Counts:
    """Counts of the candidates that are before each query's own.

    A candidate is before where its score is higher or NaN, or equal and its index below the query's `ties_below`.

    Args:
        own: Each query's score with its own, float64, (queries,). Before one that isn't finite nothing is counted.
        most: Where counting may end.
        ties_below: (queries,), int64; None where all equal ones are before.
    """

    def __init__(self, own: torch.Tensor, most: int = EVERYTHING, ties_below: torch.Tensor | None = None):
        self.own = torch.where(own.isfinite(), own, torch.inf)
        self.most, self.ties_below = most, ties_below
        self.numbers = torch.zeros(len(own), dtype=torch.int64, device=own.device)

    def add(
        self, scores: torch.Tensor, queries: torch.Tensor, candidates: torch.Tensor, query: int, candidate: int
    ) -> None:
        """Count a block of scores.

        Args:
            scores: (queries, candidates), −∞ where a query meets its own.
            queries: Their embeddings, (queries, width).
            candidates: Likewise.
            query, candidate: The first one's index.
        """
        rows = slice(query, query + len(queries))
        own, margin = self.own[rows], rounding(queries, candidates)
        low, high = (bound.to(scores.dtype)[:, None] for bound in (own - margin, own + margin))
        # Of most queries nothing in a block comes near.
        open_rows = ((self.numbers[rows] < self.most) & ~(scores.amax(1) < low[:, 0])).nonzero().flatten()
        if not len(open_rows):
            return
        found = scores[open_rows]
        before = ~(found < high[open_rows])
        near = ~before & ~(found < low[open_rows])
        self.numbers[rows][open_rows] += before.sum(1)
        # By columns, so that a query of which many are near has enough of them early.
        column, row = near.t().nonzero(as_tuple=True)
        for some, which in zip(column.split(CHUNK), open_rows[row].split(CHUNK), strict=True):
            self._add_near(some, which, queries, candidates, query, candidate)

    def _add_near(
        self,
        column: torch.Tensor,
        row: torch.Tensor,
        queries: torch.Tensor,
        candidates: torch.Tensor,
        query: int,
        candidate: int,
    ) -> None:
        """Count pairs whose scores are too near to the query's own to tell by a block's."""
        still = self.numbers[row + query] < self.most
        column, row = column[still], row[still]
        scores, own = row_products(queries[row], candidates[column]), self.own[row + query]
        after = scores < own
        if self.ties_below is not None:
            after |= (scores == own) & (column + candidate >= self.ties_below[row + query])
        self.numbers.index_add_(0, row + query, (~after).long())


def own_products(
    queries: torch.Tensor, candidates: torch.Tensor, own: torch.Tensor, device: torch.device
) -> torch.Tensor:
    """Return each query's product with the candidate of the index `own`, float64, (queries,), on a device."""
    found = [
        row_products(some.to(device), candidates[which.to(candidates.device)].to(device))
        for some, which in zip(queries.split(CHUNK), own.split(CHUNK), strict=True)
    ]
    return torch.cat(found)


def block_scores(queries: torch.Tensor, candidates: torch.Tensor, own: torch.Tensor, candidate: int) -> torch.Tensor:
    """Return the scores of a block, (queries, candidates), −∞ where a query meets its own.

    Args:
        queries, candidates: Their embeddings, (rows, width).
        own: The index of each query's own among all candidates.
        candidate: The first candidate's index.
    """
    scores = queries @ candidates.t()
    column = own - candidate
    row = ((column >= 0) & (column < len(candidates))).nonzero().flatten()
    scores[row, column[row]] = -torch.inf
    return scores


def label_ranks(
    image_embeds: torch.Tensor,
    label_embeds: torch.Tensor,
    labels: torch.Tensor,
    block_size: int | None = None,
    most: int = EVERYTHING,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Return how many labels are before each image's own, by similarity, 0 where its own is first.

    Of labels that are equally similar the first counts as more so, as in a stable sort. NaN is before everything, and
    an image whose own label's score isn't finite has the largest int64 there is.

    Args:
        image_embeds: (images, width), float32.
        label_embeds: (labels, width), float32.
        labels: Each image's label, (images,), int64.
        block_size: Images, and labels, that are compared at once, which bounds the memory; see `default_block`.
        most: From where on ranks needn't be right, but as large as this.
        device: Where the products are computed, by default where the images are.

    Returns:
        (images,), int64, on the CPU.
    """
    device = choose_device(device, image_embeds)
    size = block_size or default_block(device)
    labels = labels.to(device)
    own = own_products(image_embeds, label_embeds, labels, device)
    counts = Counts(own, most, labels)
    with full_precision(device):
        for first in range(0, len(image_embeds), size):
            images = image_embeds[first : first + size].to(device)
            for start in range(0, len(label_embeds), size):
                candidates = label_embeds[start : start + size].to(device)
                scores = block_scores(images, candidates, labels[first : first + size], start)
                counts.add(scores, images, candidates, first, start)
    # Beyond any K, even one that is more than there are labels.
    return counts.numbers.masked_fill(~own.isfinite(), EVERYTHING).cpu()


__all__ = [
    "Counts",
    "block_scores",
    "choose_device",
    "default_block",
    "full_precision",
    "label_ranks",
    "own_products",
    "rounding",
    "row_products",
]
