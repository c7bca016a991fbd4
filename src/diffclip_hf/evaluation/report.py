"""What an evaluation found, as a table beside the paper's figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from .specs import PAPER_MODELS, DatasetSpec


TITLES = {
    "accuracy": "accuracy",
    "mean_per_class": "mean per class",
    "top5_accuracy": "top-5 accuracy",
    "pair_accuracy": "pairs, by text",
    "pair_accuracy_image_to_text": "pairs, by image",
}


def mean_metrics(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean over data sets, each counting alike, of the metrics that all have and of the main ones (`main`).

    It's in 0..1.
    """
    shared = [name for name in results[0]["metrics"] if all(name in result["metrics"] for result in results)]
    metrics = {name: [result["metrics"][name] for result in results] for name in shared}
    metrics["main"] = [result["metrics"][result["main"]] for result in results]
    return {name: sum(values) / len(values) for name, values in metrics.items()}


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _title(metric: str) -> str:
    return TITLES.get(metric) or metric.replace("_", " ").replace("recall", "Recall")


def _shown_metrics(task: str, result: Mapping[str, Any]) -> list[str]:
    """Return the metrics that have a row: of a classification the data set's own, and the top 5."""
    if task in ("linear-probe", "few-shot"):
        return [result["main"]]
    if task == "zero-shot":
        return [result["main"], "top5_accuracy"]
    return list(result["metrics"])


def _rows(task: str, spec: DatasetSpec, result: Mapping[str, Any]) -> list[list[str]]:
    """Return a data set's rows."""
    paper = spec.paper.get(task, {})
    rows = []
    for metric in _shown_metrics(task, result):
        measured = _percent(result["metrics"][metric] * 100)
        if result.get("deviation") is not None:
            measured += f" ± {_percent(result['deviation'] * 100)}"
        figures = [_percent(paper.get(metric, {}).get(model)) for model in PAPER_MODELS]
        rows.append([spec.name, _title(metric), str(result["n"]), measured, *figures])
    for pattern, share in result.get("patterns", {}).items():
        rows.append([pattern, _title("pair_accuracy"), "", _percent(share * 100), *[""] * len(PAPER_MODELS)])
    return rows


def _mean_rows(task: str, specs: Sequence[DatasetSpec], results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the rows of the means over data sets, with the paper's where it has every data set."""
    rows = []
    for metrics in zip(*(_shown_metrics(task, result) for result in results), strict=True):
        values = [result["metrics"][metric] for result, metric in zip(results, metrics, strict=True)]
        papers = [spec.paper.get(task, {}).get(metric, {}) for spec, metric in zip(specs, metrics, strict=True)]
        figures = [
            _percent(sum(paper[model] for paper in papers) / len(papers))
            if all(model in paper for paper in papers)
            else ""
            for model in PAPER_MODELS
        ]
        title = _title(metrics[0]) if len(set(metrics)) == 1 else "each one's"
        rows.append(["mean", title, "", _percent(sum(values) / len(values) * 100), *figures])
    return rows


def markdown_table(task: str, model: str, specs: Sequence[DatasetSpec], results: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table in percent, with the paper's figures where it has some, and means of several data sets.

    Args:
        task: What was measured.
        model: What the column of what was measured is called.
        specs: The data sets.
        results: Each one's, as the task returns it.
    """
    rows = [row for spec, result in zip(specs, results, strict=True) for row in _rows(task, spec, result)]
    if len(results) > 1:
        rows += _mean_rows(task, specs, results)
    header = ["data set", "metric", "images", model, *(f"paper, {name}" for name in PAPER_MODELS)]
    # The paper's columns are left out where it has no figures.
    kept = [index for index in range(len(header)) if index < 4 or any(row[index] for row in rows)]
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line[index] for index in kept)} |\n" for line in lines)


__all__ = ["markdown_table", "mean_metrics"]
