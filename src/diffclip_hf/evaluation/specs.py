"""What is measured: a data set with its splits, columns, names, templates and metric, and the paper's figures.

Each file of `presets` describes a data set of the paper, under the names of `DatasetSpec`'s fields.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ..common.commands import closest
from ..common.loading import find_source
from ..data.dataset_files import local_files
from ..data.label_names import read_label_names
from ..zero_shot import label_texts
from ..zero_shot_templates import IMAGENET_TEMPLATES, IMAGENET_TEMPLATES_SMALL


PRESETS = resources.files(__package__) / "presets"
TASKS = ("zero-shot", "retrieval", "linear-probe", "few-shot", "mmvp")
METRICS = ("accuracy", "mean_per_class")
TEMPLATE_SETS = {"imagenet": IMAGENET_TEMPLATES, "imagenet-small": IMAGENET_TEMPLATES_SMALL}
DEFAULT_TEMPLATES = ("a photo of a {}.",)
# As its authors have it, before a statement.
MMVP_TEMPLATES = ("a photo of {}",)
# The order of a table's columns.
PAPER_MODELS = ("CC3M CLIP", "CC3M DiffCLIP", "CC12M CLIP", "CC12M DiffCLIP")


@dataclass(frozen=True)
class DatasetSpec:
    """A data set to measure on.

    Args:
        name: What it is called in the results.
        source: A folder, a file or a Hub id, as `load_image_label_dataset` and `load_image_text_dataset` take it.
        tasks: What it can be measured with.
        split: The part that is measured.
        train_split: Of a probe or few-shot classification, the part that is learned from.
        validation_split: Where a probe's regularisation is chosen; by default a fifth of `train_split`.
        image_column, label_column, caption_column: Where they aren't called as usual.
        pattern_column: What a pair's visual pattern is called, for `mmvp`.
        caption_separator: What separates an image's captions where they are one text.
        class_names: Each label's name in texts, instead of the data set's own; see `name_labels` for which is whose.
        class_names_file: The same, in a file of `source`, as `read_label_names` reads it.
        templates: Texts with `{}` for the label, or for MMVP's statement.
        metric: `"accuracy"`, or `"mean_per_class"`, the mean of every class's accuracy.
        paper: The paper's figures in percent: task → metric → model → figure.

    Raises:
        ValueError: A task, metric or model doesn't exist, or a template lacks `{}`.
    """

    name: str
    source: str
    tasks: tuple[str, ...] = TASKS
    split: str = "test"
    train_split: str = "train"
    validation_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    caption_column: str | None = None
    pattern_column: str | None = None
    caption_separator: str | None = None
    class_names: tuple[str, ...] | Mapping[str, str] | None = None
    class_names_file: str | None = None
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    metric: str = "accuracy"
    paper: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        models = {model for metrics in self.paper.values() for figures in metrics.values() for model in figures}
        for key, found, allowed in (
            ("tasks", {*self.tasks, *self.paper}, TASKS),
            ("metric", {self.metric}, METRICS),
            ("paper", models, PAPER_MODELS),
        ):
            if unknown := found - set(allowed):
                raise ValueError(f"{self.name}: {key} has {sorted(unknown)}; allowed are {', '.join(allowed)}.")
        label_texts([self.name], self.templates)


def template_texts(templates: Sequence[str] | str) -> tuple[str, ...]:
    """Return templates as they are, or those of a set of `TEMPLATE_SETS` where its name is all there is."""
    texts = (templates,) if isinstance(templates, str) else tuple(templates)
    return TEMPLATE_SETS.get(texts[0], texts) if len(texts) == 1 else texts


def preset_names() -> list[str]:
    """Return the names of the package's presets, sorted."""
    return sorted(entry.name.removesuffix(".yaml") for entry in PRESETS.iterdir() if entry.name.endswith(".yaml"))


def read_preset(name: str) -> DatasetSpec:
    """Return a preset of the package.

    Raises:
        ValueError: It has a key that `DatasetSpec` lacks.
    """
    content = yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))
    indices = content.pop("class_indices", None)
    if "class_names" in content:
        names = read_label_names(PRESETS / content["class_names"])
        content["class_names"] = names if indices is None else tuple(names[index] for index in indices)
    if "templates" in content:
        content["templates"] = template_texts(content["templates"])
    if unknown := set(content) - {one.name for one in dataclasses.fields(DatasetSpec)}:
        raise ValueError(f"The preset {name} has {sorted(unknown)}, which DatasetSpec lacks.")
    return DatasetSpec(name=name, **{**content, "tasks": tuple(content["tasks"])})


def find_dataset(name: str, task: str, changes: Mapping[str, Any]) -> DatasetSpec:
    """Return the preset of that name, or what describes the folder, file or Hub id that it is.

    Args:
        name: A preset's name, unless there is a folder or file that is called so.
        task: One of `TASKS`.
        changes: Fields to set; those that are None are left as they are.

    Raises:
        ValueError: The preset isn't for the task, or there is no such data set.
    """
    if not os.path.exists(name) and name in preset_names():
        spec = read_preset(name)
        if task not in spec.tasks:
            others = [other for other in preset_names() if task in read_preset(other).tasks]
            raise ValueError(
                f"The preset {name} is for {', '.join(spec.tasks)}, not for {task}; those for it are "
                f"{', '.join(others)}."
            )
    elif "/" not in name and not local_files(name) and not name.endswith(".parquet"):
        raise ValueError(
            f"dataset is {name!r}; it must be a folder, a file, an id OWNER/NAME of the Hub, or one of the presets "
            f"{', '.join(preset_names())}{closest(name, preset_names())}"
        )
    elif name.endswith(".parquet") and "://" not in name and not local_files(name):
        raise ValueError(f"There is no file {name}.")
    else:
        source = name if local_files(name) or name.endswith(".parquet") else find_source(name, repo_type="dataset")
        templates = MMVP_TEMPLATES if task == "mmvp" else DEFAULT_TEMPLATES
        spec = DatasetSpec(name=Path(name).name, source=source, templates=templates)
    return dataclasses.replace(spec, **{key: value for key, value in changes.items() if value is not None})


__all__ = [
    "DEFAULT_TEMPLATES",
    "METRICS",
    "PAPER_MODELS",
    "PRESETS",
    "TASKS",
    "TEMPLATE_SETS",
    "DatasetSpec",
    "find_dataset",
    "preset_names",
    "read_preset",
    "template_texts",
]
