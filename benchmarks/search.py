"""Time the search among 100,000 embeddings of 512 numbers, and what a full sort of all scores takes.

python benchmarks/search.py [--pictures 100000] [--queries 200] [--output benchmarks/search.json]

The embeddings are random, which makes no difference to the exact search: it compares a query with all of them. What
is timed is `ImageIndex.search` for a query's embedding; encoding a text comes besides, and depends on the model.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measuring import make_parser, measured_on, write_report
from transformers import AutoModel, AutoProcessor

from diffclip_hf import ImageIndex
from diffclip_hf.common.reading_ahead import usable_cores


WIDTH, TOP, AT_ONCE = 512, 10, 32
GOAL_MS = 50.0
EMBEDDED = Path(__file__).parents[1] / "embedded" / "diffclip-emoji"


def milliseconds(work: Callable[[], Any]) -> float:
    """Return how long something takes."""
    start = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - start)


def summary(times: list[float]) -> dict[str, float]:
    """Return the median and what 95 in 100 stay below, in milliseconds."""
    return {"median_ms": round(statistics.median(times), 2), "p95_ms": round(float(np.quantile(times, 0.95)), 2)}


def measure(pictures: int, queries: int) -> dict[str, Any]:
    """Return the measurement, with the machine that it was taken on."""
    generator = np.random.default_rng(0)
    embeds = generator.standard_normal((pictures, WIDTH), dtype=np.float32)
    vectors = generator.standard_normal((queries, WIDTH), dtype=np.float32)
    names = [f"pictures/{number:06}.jpg" for number in range(pictures)]
    model, processor = AutoModel.from_pretrained(EMBEDDED), AutoProcessor.from_pretrained(EMBEDDED)
    index = ImageIndex(model, processor)
    index.add(embeds, names)
    first = milliseconds(lambda: index.search(vectors[0], TOP))
    single, sorted_whole = [], []
    for vector in vectors:
        single.append(milliseconds(lambda vector=vector: index.search(vector, TOP)))
        sorted_whole.append(milliseconds(lambda vector=vector: (index.embeds.numpy() @ vector).argsort()[-TOP:]))
    several = [
        milliseconds(lambda start=start: index.search(vectors[start : start + AT_ONCE], TOP)) / AT_ONCE
        for start in range(0, queries - AT_ONCE + 1, AT_ONCE)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "index.safetensors")
        saving = milliseconds(lambda: index.save(path))
        loading = milliseconds(lambda: ImageIndex.load(path, model, processor))
        size = path.stat().st_size
    return {
        "pictures": pictures,
        "width": WIDTH,
        "top": TOP,
        "queries": queries,
        "usable_cores": usable_cores(),
        "one_query": summary(single),
        "first_query_ms": round(first, 2),
        f"each_of_{AT_ONCE}_queries_at_once": summary(several),
        "product_and_full_sort": summary(sorted_whole),
        "save_ms": round(saving, 1),
        "load_ms": round(loading, 1),
        "file_mb": round(size / 1e6, 1),
        "goal_ms": GOAL_MS,
        **measured_on(packages=("numpy",)),
    }


def main() -> int:
    """Run the measurement; return 1 where a query takes longer than the goal."""
    parser = make_parser(__doc__, __file__)
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=200)
    args = parser.parse_args()
    result = measure(args.pictures, args.queries)
    write_report(args.output, result)
    for name in ("one_query", f"each_of_{AT_ONCE}_queries_at_once", "product_and_full_sort"):
        sys.stdout.write(f"{name}: {result[name]}\n")
    return int(result["one_query"]["p95_ms"] > GOAL_MS)


if __name__ == "__main__":
    sys.exit(main())
