"""The presets, whose figures of the paper are checked by the means that it reports."""

from pathlib import Path

import pytest
import yaml

from diffclip_hf import IMAGENET_TEMPLATES_SMALL
from diffclip_hf.evaluation.specs import (
    PAPER_MODELS,
    PRESETS,
    TASKS,
    DatasetSpec,
    find_dataset,
    preset_names,
    read_preset,
    template_texts,
)


SPECS = {name: read_preset(name) for name in preset_names()}
PROBES = ("caltech101", "dtd", "pets", "flowers", "sun397", "aircraft", "cifar10", "cifar100", "food101")
# The last column of the paper's tables.
PAPER_MEANS = {"linear-probe": (63.8, 64.8, 77.0, 77.3), "few-shot": (73.9, 74.6, 85.3, 85.4)}


@pytest.mark.parametrize("task", PAPER_MEANS)
def test_the_paper_reports_the_mean_of_these_figures(task):
    for model, expected in zip(PAPER_MODELS, PAPER_MEANS[task], strict=True):
        figures = [figure[model] for name in PROBES for figure in SPECS[name].paper[task].values()]
        assert len(figures) == 9
        # Of figures that are themselves rounded.
        assert sum(figures) / 9 == pytest.approx(expected, abs=0.11)


def test_the_paper_gains_as_it_says():
    """DiffCLIP over CLIP with CC3M and CC12M, from the two tables that have no means."""
    imagenet = SPECS["imagenet"].paper["zero-shot"]["accuracy"]
    assert imagenet["CC12M DiffCLIP"] - imagenet["CC12M CLIP"] == pytest.approx(2.0)
    pairs = SPECS["mmvp-vlm"].paper["mmvp"]["pair_accuracy"]
    assert pairs == {"CC12M CLIP": 21.9, "CC12M DiffCLIP": 27.6}
    for name in ("flickr30k", "flickr8k", "mscoco"):
        figures = SPECS[name].paper["retrieval"]
        # Of an image's five captions the best counts, so texts are found more easily.
        assert all(figures["image_to_text_recall@5"][m] > figures["text_to_image_recall@5"][m] for m in PAPER_MODELS)


def test_every_task_has_presets_and_every_file_is_one():
    assert {task for spec in SPECS.values() for task in spec.tasks} == set(TASKS)
    files = {Path(entry.name).name for entry in PRESETS.iterdir()}
    assert files == {f"{name}.yaml" for name in SPECS} | {"imagenet_class_names.txt"}
    for name, spec in SPECS.items():
        assert spec.source.count("/") == 1
        assert all("{}" in template for template in spec.templates)
        assert set(spec.paper) <= set(spec.tasks), name


def test_imagenet_and_its_relatives():
    names = SPECS["imagenet"].class_names
    assert len(names) == 1000
    assert (names[0], names[207], names[999]) == ("tench", "Golden Retriever", "toilet paper")
    assert SPECS["imagenet-v2"].class_names == SPECS["imagenet-sketch"].class_names == names
    assert SPECS["imagenet"].templates == IMAGENET_TEMPLATES_SMALL
    for name, first in (("imagenet-a", "stingray"), ("imagenet-r", "goldfish")):
        found = SPECS[name].class_names
        assert len(found) == 200
        assert found[0] == first
        indices = yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))["class_indices"]
        assert indices == sorted(set(indices))
        assert all(names[index] == label for index, label in zip(indices, found, strict=True))


def test_mean_per_class_is_where_el_banani_and_others_use_it():
    assert {name for name in PROBES if SPECS[name].metric == "mean_per_class"} == {
        "aircraft",
        "caltech101",
        "flowers",
        "pets",
    }


def test_what_is_asked_for_goes_over_the_preset(tmp_path):
    spec = find_dataset("imagenet", "zero-shot", {"split": "train", "metric": None})
    assert (spec.split, spec.metric, spec.source) == ("train", "accuracy", "ILSVRC/imagenet-1k")
    spec = find_dataset(str(tmp_path), "mmvp", {})
    assert (spec.name, spec.source, spec.templates) == (tmp_path.name, str(tmp_path), ("a photo of {}",))
    assert find_dataset("owner/name", "retrieval", {}).source == "owner/name"
    assert template_texts("imagenet-small") == template_texts(["imagenet-small"]) == IMAGENET_TEMPLATES_SMALL
    assert template_texts(["{}", "a {}"]) == ("{}", "a {}")


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("imagenett", "zero-shot", "it must be a folder.*the presets aircraft, caltech101"),
        ("imagenet", "retrieval", "is for zero-shot, not for retrieval; those for it are flickr30k, flickr8k, mscoco"),
    ],
)
def test_what_cannot_be_found(name, task, message):
    with pytest.raises(ValueError, match=message):
        find_dataset(name, task, {})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metric": "f1"}, "metric has .*allowed are accuracy, mean_per_class"),
        ({"tasks": ("probe",)}, "tasks has"),
        ({"paper": {"zero-shot": {"accuracy": {"CLIP": 1.0}}}}, "paper has .*CC3M CLIP"),
    ],
)
def test_a_description_that_says_nothing(fields, message):
    with pytest.raises(ValueError, match=message):
        DatasetSpec(name="x", source="y", **fields)


def test_a_preset_is_plain_yaml():
    content = yaml.safe_load((PRESETS / "flickr8k.yaml").read_text(encoding="utf-8"))
    assert content["caption_separator"] == "\n"
