"""Show where the time goes, operator by operator: DiffCLIPModel (`sdpa`) beside CLIPModel, in the cases of speed.py.

python benchmarks/speed_profile.py [--only CASE …] [--rounds 9] [--output benchmarks/speed_profile.json]

Writes the times (JSON) and a table for each case (Markdown) beside each other. Both models run in turn in one process
under PyTorch's profiler. The operators of a call always come in one order, so each one's time is the median of its
times in all rounds; a table adds them up by operator, without the operators that it calls itself. The profiler makes
every operator slower by a microsecond or two, the small ones by the largest part: the tables say what differs, and
speed.md how much.
"""

import argparse
import logging
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import make_parser, measured_on, write_report
from speed import CLIP, build, busy_processes, inputs_of, tower_run, training_run
from torch.profiler import ProfilerActivity, profile


logger = logging.getLogger("speed_profile")
OURS = "DiffCLIPModel"
BUSY = "beside one busy process"
# What a case is called, and how it runs: which tower or the training, batch, pixels or tokens.
CASES = {
    "image tower, batch 1": ("image", 1, 224),
    "image tower, batch 8": ("image", 8, 224),
    f"image tower, batch 8, {BUSY}": ("image", 8, 224),
    "image tower at 336 px, batch 1": ("image", 1, 336),
    "text tower, 8 × 77 tokens": ("text", 8, 77),
    "text tower, 64 × 12 tokens": ("text", 64, 12),
    "text tower, 1 × 8 tokens": ("text", 1, 8),
    "training step, batch 8": ("training", 8, 224),
    "training step, batch 16": ("training", 16, 224),
}
# Rows of a table: the operators whose times differ most.
MOST_ROWS = 14


def runs_of(kind: str, batch: int, size: int) -> dict[str, Callable[[], object]]:
    """Return a call of each model."""
    image_size = 224 if kind == "text" else size
    models = {CLIP: build(CLIP, image_size, "cpu"), OURS: build("sdpa", image_size, "cpu")}
    if kind == "training":
        return {name: training_run(model, batch, "cpu") for name, model in models.items()}
    inputs = inputs_of(models[CLIP], batch, image_size, size if kind == "text" else 77)
    return {name: tower_run(model, kind, inputs) for name, model in models.items()}


def operators(run: Callable[[], object]) -> list[tuple[str, float]]:
    """Return the operators of one call in order, and how many microseconds each takes without those it calls."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    return [(event.name, event.self_cpu_time_total) for event in profiler.events() if "::" in event.name]


def by_operator(rounds: list[list[tuple[str, float]]]) -> dict[str, dict[str, float]]:
    """Add up the medians of the rounds: how often an operator runs, and its milliseconds."""
    names = [[name for name, _ in one] for one in rounds]
    if any(other != names[0] for other in names):
        raise RuntimeError("The operators of two rounds differ; their times can't be compared one by one.")
    found: dict[str, dict[str, float]] = defaultdict(lambda: {"calls": 0, "ms": 0.0})
    for name, times in zip(names[0], zip(*([time for _, time in one] for one in rounds), strict=True), strict=True):
        found[name]["calls"] += 1
        found[name]["ms"] += statistics.median(times) / 1e3
    return {name: {"calls": each["calls"], "ms": round(each["ms"], 3)} for name, each in found.items()}


def profile_case(name: str, rounds: int) -> dict:
    """Run a case's models in turn."""
    runs = runs_of(*CASES[name])
    for run in runs.values():
        run(), operators(run)
    taken: dict[str, list] = {model: [] for model in runs}
    with busy_processes(1 if name.endswith(BUSY) else 0):
        for _ in range(rounds):
            for model, run in runs.items():
                taken[model].append(operators(run))
    return {"case": name, "rounds": rounds, "operators": {model: by_operator(each) for model, each in taken.items()}}


def table(found: dict) -> str:
    """Return a case's table: the operators whose times differ most, the others together, and all."""
    clip, ours = (found["operators"][model] for model in (CLIP, OURS))
    nothing = {"calls": 0, "ms": 0.0}
    rows = [(name, clip.get(name, nothing), ours.get(name, nothing)) for name in {*clip, *ours}]
    rows.sort(key=lambda row: -abs(row[2]["ms"] - row[1]["ms"]))

    def line(name: str, part: list) -> str:
        base, other = ({key: sum(row[place][key] for row in part) for key in nothing} for place in (1, 2))
        cells = [name, base["calls"], f"{base['ms']:,.2f}", other["calls"], f"{other['ms']:,.2f}"]
        return f"| {' | '.join(map(str, cells))} | {other['ms'] - base['ms']:+,.2f} |"

    head = f"| {found['case']} | CLIPModel, calls | ms | DiffCLIPModel, calls | ms | difference |"
    lines = [head, "|---|---|---|---|---|---|"]
    lines += [line(f"`{row[0]}`", [row]) for row in rows[:MOST_ROWS]]
    lines += [line("others", rows[MOST_ROWS:]), line("all", rows)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the benchmark."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser: argparse.ArgumentParser = make_parser(__doc__, __file__)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help="; ".join(CASES))
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    report = {**measured_on(), "threads": torch.get_num_threads(), "cases": []}
    for name in args.only:
        report["cases"].append(profile_case(name, args.rounds))
        logger.info("%s", table(report["cases"][-1]))
        write_report(args.output, report)
        tables = "\n".join(table(found) for found in report["cases"])
        Path(args.output).with_suffix(".md").write_text(tables, encoding="utf-8")


if __name__ == "__main__":
    main()
