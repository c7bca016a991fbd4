"""Names and labels that come from different places find each other, or are refused."""

import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import randomised
from training_samples import encoded, picture, tiny_pair_model, tiny_processor

from diffclip_hf import DiffCLIPForImageClassification
from diffclip_hf.data import load_image_label_dataset
from diffclip_hf.data.label_names import label_numbers, match_labels, name_labels, own_labels, read_label_names
from diffclip_hf.training import DiffCLIPTrainingArguments
from diffclip_hf.training.options import DataArguments, ModelArguments
from diffclip_hf.training.tasks import classification_parts


def named(labels, names):
    """The labels with their names."""
    indices, found = name_labels(labels, names)
    return {label: found[index] for label, index in zip(labels, indices, strict=True)}


TWELVE = [f"name {number}" for number in range(12)]


@pytest.mark.parametrize("pattern", ["{}", "{:02}", "class_{}", "{}.0", "v2 class {} (new)", "{}_bird"])
def test_numbered_labels_go_by_number(pattern):
    labels = sorted(pattern.format(number) for number in range(12))
    assert named(labels, TWELVE) == {pattern.format(number): f"name {number}" for number in range(12)}
    # Classes that a part lacks change nothing.
    some = [label for label in labels if label not in (pattern.format(2), pattern.format(11))]
    assert named(some, TWELVE) == {label: name for label, name in named(labels, TWELVE).items() if label in some}


def test_labels_from_one_go_by_number_where_that_is_sure():
    labels = sorted(str(number) for number in range(1, 13))
    assert named(labels, TWELVE) == {str(number): f"name {number - 1}" for number in range(1, 13)}
    with pytest.raises(ValueError, match="isn't sure whether the first name is that of 0 or of 1"):
        name_labels(labels[:-1], TWELVE)
    assert named(labels, {label: f"the {label}" for label in labels})["10"] == "the 10"


def test_names_that_are_the_labels_own_go_by_name():
    assert named(["ant", "bee", "red_fox"], ["Red Fox", "ant", "bee"]) == {
        "ant": "ant",
        "bee": "bee",
        "red_fox": "Red Fox",
    }
    assert named(["bee"], ["ant", "bee"]) == {"bee": "bee"}


def test_other_labels_go_by_position():
    wnids = ["n01440764", "n01443537", "n02096585"]
    assert list(named(wnids, ["tench", "goldfish", "Boston bull"]).values()) == ["tench", "goldfish", "Boston bull"]
    assert named(["tabby, tabby cat", "tiger cat"], ["tabby", "tiger cat"])["tabby, tabby cat"] == "tabby"


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        (["a", "b"], ["x"], r"has 1 names; the column label has 2 labels \(a, b\)"),
        (["0", "1", "3"], ["x", "y", "z"], "has the label 3. The first name is that of 0"),
        (["-1", "0", "1"], ["x", "y", "z"], "'-1' before '0'"),
        (["1", "10", "2", "other"], ["w", "x", "y", "z"], "'10' before '2'"),
        (["DC-10 jet", "DC-3 plane"], ["x", "y"], "'DC-10 jet' before 'DC-3 plane'"),
        (["cat", "dog"], ["dog", "puppy"], "the name 'dog' to the label 'cat', though the column label has a label"),
        (["cat"], {"dog": "x"}, "no name for 1 labels of the column label, 'cat' the first"),
    ],
)
def test_what_is_not_sure_is_refused(labels, names, message):
    with pytest.raises(ValueError, match=message):
        name_labels(labels, names)


def test_labels_without_numbers_or_with_too_many():
    assert label_numbers([]) is None
    assert label_numbers(["a1", "b2"]) is None
    assert label_numbers(["1", "01"]) is None
    assert label_numbers(["class_1", "class_2_of_3"]) is None
    assert label_numbers(["9" * 30, "1"]) is None
    assert named(["a²", "b³"], ["x", "y"]) == {"a²": "x", "b³": "y"}
    assert match_labels(["b", "a"], ["a", "b", "c"], "eval", "train") == [1, 0]
    with pytest.raises(ValueError, match="eval has 1 labels that train lacks: d"):
        match_labels(["d"], ["a"], "eval", "train")


def test_files_of_names(tmp_path):
    lines, listed, mapping = tmp_path / "names.txt", tmp_path / "list.json", tmp_path / "mapping.json"
    lines.write_bytes("\ufeffan ant\r\n a bee \r\nthe\u2028cat\r\n\r\n".encode())
    assert read_label_names(lines) == ("an ant", "a bee", "the\u2028cat")
    listed.write_text('["an ant", "a bee"]')
    assert read_label_names(listed) == ("an ant", "a bee")
    mapping.write_text(json.dumps({"7": "an ant"}))
    assert read_label_names(mapping) == {"7": "an ant"}
    for path, content, message in (
        (lines, "a\n\nb\n", "the name 2 is ''"),
        (lines, b"\xff", "can't be read"),
        (lines, "", "the name 1 is ''"),
        (mapping, '{"7": ["n01", "ant"]}', r"the name 7 is \['n01', 'ant'\]"),
        (mapping, "[" * 100_000, "can't be read"),
        (mapping, "7", "it must hold a list"),
        (tmp_path / "none.txt", None, "can't be read"),
    ):
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match=message):
            read_label_names(path)


@pytest.mark.parametrize("kind", ["folders", "strings", "classes", "indices"])
def test_every_kind_of_column_gets_the_same_names(kind, tmp_path):
    """Twelve labels, of which the picture's colour tells the number."""
    numbers = np.random.default_rng(0).permutation(12).tolist()
    if kind == "folders":
        for number in numbers:
            (tmp_path / str(number)).mkdir()
            (tmp_path / str(number) / "a.png").write_bytes(encoded(picture(number), "PNG"))
    else:
        columns = {"image": [{"bytes": encoded(picture(number), "PNG"), "path": None} for number in numbers]}
        texts = sorted(map(str, range(12)))
        labels = {
            "strings": [str(number) for number in numbers],
            "classes": [texts.index(str(number)) for number in numbers],
            "indices": numbers,
        }[kind]
        feature = {
            "strings": datasets.Value("string"),
            "classes": datasets.ClassLabel(names=texts),
            "indices": datasets.Value("int64"),
        }[kind]
        features = datasets.Features({"image": datasets.Image(), "label": feature})
        datasets.Dataset.from_dict({**columns, "label": labels}, features=features).to_parquet(tmp_path / "t.parquet")
    source = str(tmp_path if kind == "folders" else tmp_path / "t.parquet")
    dataset, names = load_image_label_dataset(source, label_names=TWELVE)
    number_of_picture = {encoded(picture(number), "PNG"): number for number in range(12)}
    for row in dataset:
        content = row["image"]["bytes"] or Path(row["image"]["path"]).read_bytes()
        assert names[row["label"]] == f"name {number_of_picture[content]}"


def test_strings_that_say_nothing_are_no_labels(tmp_path):
    images = [{"bytes": encoded(picture(0)), "path": None}] * 4
    dataset = datasets.Dataset.from_dict({"image": images, "label": ["b", None, " ", "a"]})
    dataset.to_parquet(tmp_path / "t.parquet")
    found, names = load_image_label_dataset(str(tmp_path / "t.parquet"))
    assert (names, found["label"][:]) == (["a", "b"], [1, -1, -1, 0])


def test_files_that_number_their_labels_apart_are_refused(tmp_path):
    """`datasets` would take the first file's names for both."""
    for file, names in (("a", ["x", "y"]), ("b", ["y", "x"])):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        columns = {"image": [{"bytes": encoded(picture(0)), "path": None}], "label": [0]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{file}.parquet")
    for source in (tmp_path, tmp_path / "*.parquet", tmp_path / "{a,b}.parquet"):
        with pytest.raises(ValueError, match=r"b.parquet numbers the labels of the column label otherwise than "):
            load_image_label_dataset(str(source))
    assert load_image_label_dataset(str(tmp_path / "b.parquet"))[1] == ["y", "x"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"file_name": "a.png", "label": "x", "more": ' + "[" * 20_000 + "]" * 20_000 + "}", "is nested 20001 deep"),
        ('{"file_name": "a.png", "more": ' + "[\n" * 20_000 + "]\n" * 20_000 + "}", "Line 500 .* is nested 501 deep"),
        ('{"}":\n' * 20_000 + "1" + "}" * 20_000, "Line 501 .* is nested 501 deep"),
        ('{"more": "' + "[" * 600 + '"}\n' + '{"more": [1, {"}]": 2}]}\n' * 600 + "!", "can't be read: ArrowInvalid"),
        ("", "can't be read: IndexError"),
        ('{"file_name": "a.png", "label": "\\ud83d"}', "can't be read: ArrowInvalid: .*surrogate"),
        ('{"file_name": "a.png", "label": "x"}\nnot JSON', "can't be read: ArrowInvalid"),
    ],
)
def test_metadata_that_cannot_be_read_is_one_error(lines, message, tmp_path):
    """The first three would end the process."""
    (tmp_path / "a.png").write_bytes(encoded(picture(0)))
    (tmp_path / "metadata.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=message):
        load_image_label_dataset(str(tmp_path))


def test_columns_that_are_no_images_or_labels(tmp_path):
    pq.write_table(pa.table({"image": [1], "label": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"The column image is .*; images must be encoded, as bytes or base64"):
        load_image_label_dataset(str(tmp_path / "a.parquet"))
    broken = pa.array([b"x", b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"image": [encoded(picture(0))] * 2, "label": broken}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="Row 1 of the column label isn't UTF-8"):
        load_image_label_dataset(str(tmp_path / "b.parquet"))


def test_indices_without_a_name_and_numbers_that_are_no_indices():
    """What `datasets` would let through, as where a file's features are older than its rows."""
    features = datasets.Features({"label": datasets.ClassLabel(names=["x", "y"])})
    beyond = datasets.Dataset(pa.table({"label": [0, 5]}), info=datasets.DatasetInfo(features=features))
    with pytest.raises(ValueError, match="The column cls has the index 5, and names for 2 labels"):
        own_labels(beyond, "cls")
    with pytest.raises(ValueError, match=r"The column cls is .*float64.*; labels must be ClassLabel or strings"):
        own_labels(datasets.Dataset.from_dict({"label": [0.5]}), "cls")


def labelled_folder(folder: Path, names: str) -> str:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "a.png").write_bytes(encoded(picture(ord(name)), "PNG"))
    return str(folder)


def test_a_classifier_keeps_its_labels_when_it_is_trained_further(tmp_path):
    """The saved classifier has c before a; the data set is in alphabetical order, and that to evaluate on lacks a."""
    names = ["c", "a", "b"]
    config = tiny_pair_model().config
    config.id2label, config.label2id = dict(enumerate(names)), {name: index for index, name in enumerate(names)}
    model = randomised(DiffCLIPForImageClassification(config))
    model.save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")

    def parts(data: str, eval_data: str | None = None):
        model_args = ModelArguments(model_name_or_path=str(tmp_path / "model"), task="image-classification")
        data_args = DataArguments(train_data=data, eval_data=eval_data, eval_split="train")
        return classification_parts(model_args, data_args, DiffCLIPTrainingArguments(output_dir=str(tmp_path / "out")))

    found = parts(labelled_folder(tmp_path / "abc", "abc"), labelled_folder(tmp_path / "bc", "bc"))
    assert list(found.model.config.id2label.values()) == names
    assert torch.equal(found.model.classifier.weight, model.classifier.weight)
    assert sorted(found.train_dataset["label"]) == [0, 1, 2]
    for dataset in (found.train_dataset, found.eval_dataset):
        for row in dataset:
            assert Path(row["image"]["path"]).parent.name == names[row["label"]]
    other = parts(labelled_folder(tmp_path / "xyz", "xyz"))
    assert list(other.model.config.id2label.values()) == ["x", "y", "z"]
    assert not torch.allclose(other.model.classifier.weight, model.classifier.weight)
    with pytest.raises(ValueError, match="eval_data has 3 labels that train_data lacks: x, y, z"):
        parts(str(tmp_path / "abc"), str(tmp_path / "xyz"))
