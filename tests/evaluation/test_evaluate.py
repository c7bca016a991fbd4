"""The evaluation command and its tasks, against the models, scikit-learn and plain loops on the same pictures."""

import base64
import dataclasses
import json
import multiprocessing
import os
import shlex
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from tiny import randomised
from tokenizer_helper import BYTES, tiny_clip_tokenizer
from torch.nn.functional import normalize
from training_samples import encoded, picture, tiny_pair_model, tiny_processor, write_tar
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    logging,
)

from diffclip_hf.common.embedding_cache import EmbeddingCache
from diffclip_hf.common.keys import model_fingerprint
from diffclip_hf.data import ImageTextCollator, load_image_text_dataset
from diffclip_hf.data.sources import load_own_labels
from diffclip_hf.evaluate import main
from diffclip_hf.evaluation.datasets import load_captioned, load_labelled, load_pairs, with_names
from diffclip_hf.evaluation.encoder import Encoder
from diffclip_hf.evaluation.report import markdown_table
from diffclip_hf.evaluation.specs import DatasetSpec
from diffclip_hf.evaluation.tasks import RUN_TASK, TaskOptions


ROOT = Path(__file__).parents[2]
EMOJI = ROOT / "embedded" / "diffclip-emoji"
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE = {**TOWER, "image_size": 32, "patch_size": 8}
TEMPLATES = ("a photo of a {}.", "{}", "the small {}")


def diffclip():
    return randomised(tiny_pair_model()), tiny_processor()


def clip():
    text = {**TOWER, **BYTES}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=24))
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return randomised(model), CLIPProcessor(image_processor, tiny_clip_tokenizer())


def siglip():
    config = SiglipConfig(
        text_config={**TOWER, "vocab_size": 514, "max_position_embeddings": 24, "projection_size": 32},
        vision_config=IMAGE,
    )
    image_processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    return randomised(SiglipModel(config)), SimpleNamespace(
        image_processor=image_processor, tokenizer=tiny_clip_tokenizer(model_input_names=["input_ids"])
    )


MODELS = {"diffclip": diffclip, "clip": clip, "siglip": siglip}


def image_column(images: list[Image.Image]) -> list[dict]:
    return [{"bytes": encoded(image, "PNG"), "path": None} for image in images]


def labelled_images(per_class: int, seed: int, classes: int = 3) -> tuple[list[Image.Image], list[int]]:
    """Pictures of a colour a class, with much noise."""
    generator = np.random.default_rng(seed)
    colours = np.random.default_rng(0).uniform(80, 170, (classes, 3))
    labels = generator.permutation(np.repeat(np.arange(classes), per_class)).tolist()
    images = [
        Image.fromarray((colours[label] + generator.normal(0, 60, (36, 40, 3))).clip(0, 255).astype(np.uint8))
        for label in labels
    ]
    return images, labels


def save_labelled(folder: Path, names: list[str], **parts: tuple[list[Image.Image], list[int]]) -> str:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    found = {
        split: datasets.Dataset.from_dict({"image": image_column(images), "label": labels}, features=features)
        for split, (images, labels) in parts.items()
    }
    datasets.DatasetDict(found).save_to_disk(str(folder))
    return str(folder)


NAMES = ["red_fox", "ox", "a rather long name"]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("labelled") / "animals"
    return save_labelled(
        folder, NAMES, train=labelled_images(20, 1), validation=labelled_images(8, 2), test=labelled_images(9, 3)
    )


@pytest.fixture(scope="module")
def captioned(tmp_path_factory) -> str:
    """Six pictures with one to three captions each."""
    captions = [[f"caption {number} {letter}" for letter in "abc"[: 1 + number % 3]] for number in range(6)]
    columns = {"image": image_column([picture(number) for number in range(6)]), "captions": captions}
    features = datasets.Features({"image": datasets.Image(), "captions": datasets.List(datasets.Value("string"))})
    folder = tmp_path_factory.mktemp("captioned") / "captions"
    datasets.DatasetDict({"test": datasets.Dataset.from_dict(columns, features=features)}).save_to_disk(str(folder))
    return str(folder)


def one_by_one(model, processor, images: list[Image.Image], texts: list[str], **padding) -> tuple[torch.Tensor, ...]:
    """Normalised embeddings by the model itself, an image and a text at a time."""
    with torch.inference_mode():
        pixels = [processor.image_processor(images=[image], return_tensors="pt") for image in images]
        image_embeds = [model.get_image_features(**one).pooler_output for one in pixels]
        tokens = [processor.tokenizer([text], return_tensors="pt", **padding) for text in texts]
        text_embeds = [model.get_text_features(**one).pooler_output for one in tokens]
    return tuple(normalize(torch.cat(found), dim=-1) for found in (image_embeds, text_embeds))


@pytest.mark.parametrize("name", MODELS)
def test_zero_shot_averages_templates_as_slip_does(name, labelled):
    model, processor = MODELS[name]()
    spec = DatasetSpec("animals", labelled, templates=TEMPLATES, metric="mean_per_class")
    found = RUN_TASK["zero-shot"](Encoder(model, processor, batch_size=5), spec, TaskOptions())
    names = ["red fox", "ox", "a rather long name"]
    images, labels = labelled_images(9, 3)
    padding = {"padding": "max_length", "max_length": 24, "truncation": True} if name == "siglip" else {}
    texts = [template.format(label) for label in names for template in TEMPLATES]
    image_embeds, text_embeds = one_by_one(model, processor, images, texts, **padding)
    means = torch.stack([normalize(part.mean(0), dim=0) for part in text_embeds.split(3)])
    predictions = (image_embeds @ means.t()).argmax(1).tolist()
    assert found["metrics"]["accuracy"] == pytest.approx(np.mean(np.equal(predictions, labels)))
    assert found["metrics"]["mean_per_class"] == pytest.approx(balanced_accuracy_score(labels, predictions))
    assert found["metrics"]["top5_accuracy"] == 1
    assert (found["n"], found["classes"], found["templates"]) == (27, 3, list(TEMPLATES))
    assert found["main"] == "mean_per_class"


@pytest.mark.parametrize("name", ["diffclip", "clip"])
def test_retrieval_counts_any_caption(name, captioned):
    model, processor = MODELS[name]()
    found = RUN_TASK["retrieval"](Encoder(model, processor), DatasetSpec("c", captioned), TaskOptions())
    texts = [f"caption {number} {letter}" for number in range(6) for letter in "abc"[: 1 + number % 3]]
    own = [number for number in range(6) for _ in range(1 + number % 3)]
    # As the stored pictures, which are JPEG's no longer.
    image_embeds, text_embeds = one_by_one(model, processor, [picture(number) for number in range(6)], texts)
    scores = image_embeds @ text_embeds.t()
    for k in (1, 5, 10):
        by_image = [any(own[text] == image for text in scores[image].topk(min(k, 12)).indices) for image in range(6)]
        by_text = [own[text] in scores[:, text].topk(min(k, 6)).indices for text in range(12)]
        assert found["metrics"][f"image_to_text_recall@{k}"] == pytest.approx(np.mean(by_image))
        assert found["metrics"][f"text_to_image_recall@{k}"] == pytest.approx(np.mean(by_text))
    assert (found["n"], found["captions"]) == (6, 12)


@pytest.mark.parametrize("pooled", [True, False])
def test_probe_on_validation_split(pooled, labelled):
    model, processor = diffclip()
    spec = DatasetSpec("animals", labelled, validation_split="validation")
    found = RUN_TASK["linear-probe"](Encoder(model, processor), spec, TaskOptions(pooled=pooled))
    parts = {}
    for split, part in (("both", (20, 1)), ("validation", (8, 2)), ("test", (9, 3))):
        images, labels = labelled_images(*part)
        with torch.inference_mode():
            pixels = processor.image_processor(images=images, return_tensors="pt")
            features = model.vision_model(**pixels).pooler_output if pooled else model.encode_image(**pixels)
        parts[split] = (features.numpy(), np.array(labels))
    both = [np.concatenate(pair) for pair in zip(parts["both"], parts["validation"], strict=True)]
    expected = LogisticRegression(C=found["cost"], max_iter=1000).fit(*both).score(*parts["test"])
    assert found["metrics"]["accuracy"] == pytest.approx(expected)
    assert (found["train_images"], found["validation_images"], found["n"]) == (60, 24, 27)
    assert found["features"] == ("pooled" if pooled else "projected")
    assert expected > 0.6


def test_probe_holds_a_fifth_of_each_class_out(labelled, tmp_path):
    found = RUN_TASK["linear-probe"](Encoder(*diffclip()), DatasetSpec("animals", labelled), TaskOptions())
    assert (found["train_images"], found["validation_images"]) == (48, 12)
    assert found["validation_split"] == "20% of train"
    few = save_labelled(tmp_path / "few", NAMES, train=labelled_images(2, 1), test=labelled_images(1, 2))
    with pytest.raises(ValueError, match="has 6 images of 3 classes, too few to hold 20% out of each"):
        RUN_TASK["linear-probe"](Encoder(*diffclip()), DatasetSpec("few", few), TaskOptions())


def test_few_shot_over_episodes(labelled):
    options = TaskOptions(ways=2, shots=3, queries=4, episodes=40)
    found = RUN_TASK["few-shot"](Encoder(*diffclip()), DatasetSpec("animals", labelled), options)
    assert 0.5 < found["metrics"]["accuracy"] <= 1
    assert found["standard_error"] == pytest.approx(found["deviation"] / 40**0.5)
    assert {name: found[name] for name in ("ways", "shots", "queries", "episodes", "seed")} == {
        "ways": 2,
        "shots": 3,
        "queries": 4,
        "episodes": 40,
        "seed": 0,
    }
    alone = RUN_TASK["few-shot"](
        Encoder(*diffclip()), DatasetSpec("animals", labelled), TaskOptions(ways=None, episodes=1)
    )
    assert alone["deviation"] is None


def write_mmvp(folder: Path) -> Path:
    """Three pairs of two patterns, in the layout of MMVP-VLM."""
    rows = ["Question ID,Type,Statement"]
    for number in range(1, 7):
        pattern = "Texts" if number < 5 else "Quantity and Count"
        path = folder / "MLLM_VLM Images" / pattern / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
        rows.append(f'{number},{pattern},"statement, {number}"')
    (folder / "Questions.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_mmvp_in_its_own_layout_and_as_rows(tmp_path):
    model, processor = diffclip()
    folder = write_mmvp(tmp_path / "mmvp")
    spec = DatasetSpec("mmvp", str(folder), templates=("a photo of {}",))
    found = RUN_TASK["mmvp"](Encoder(model, processor), spec, TaskOptions())
    files = sorted(folder.rglob("*.jpg"), key=lambda path: int(path.stem))
    texts = [f"a photo of statement, {number}" for number in range(1, 7)]
    image_embeds, text_embeds = one_by_one(model, processor, [Image.open(path) for path in files], texts)
    scores = image_embeds @ text_embeds.t()
    by_text = [
        bool(scores[i, i] > scores[i + 1, i] and scores[i + 1, i + 1] > scores[i, i + 1]) for i in range(0, 6, 2)
    ]
    by_image = [
        bool(scores[i, i] > scores[i, i + 1] and scores[i + 1, i + 1] > scores[i + 1, i]) for i in range(0, 6, 2)
    ]
    assert found["patterns"] == {"Texts": sum(by_text[:2]) / 2, "Quantity and Count": float(by_text[2])}
    # Of the two patterns, not of the three pairs.
    assert found["metrics"]["pair_accuracy"] == pytest.approx((sum(by_text[:2]) / 2 + by_text[2]) / 2)
    assert found["metrics"]["pair_accuracy_image_to_text"] == pytest.approx((sum(by_image[:2]) / 2 + by_image[2]) / 2)
    assert (found["n"], found["pairs"]) == (6, 3)
    columns = {
        "image": [{"bytes": path.read_bytes(), "path": None} for path in files],
        "text": [f"statement, {number}" for number in range(1, 7)],
        "kind": ["Texts"] * 4 + ["Quantity and Count"] * 2,
    }
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    rows.save_to_disk(str(tmp_path / "rows"))
    spec = DatasetSpec("rows", str(tmp_path / "rows"), templates=("a photo of {}",), pattern_column="kind")
    again = RUN_TASK["mmvp"](Encoder(model, processor), spec, TaskOptions())
    assert again["patterns"] == found["patterns"]
    assert again["metrics"] == found["metrics"]


def test_pairs_that_are_none(tmp_path):
    folder = write_mmvp(tmp_path / "mmvp")
    spec = DatasetSpec("mmvp", str(folder))
    lines = (folder / "Questions.csv").read_text().splitlines()
    (folder / "Questions.csv").write_text("\n".join(lines[:4]))
    with pytest.raises(ValueError, match="mmvp has 3 rows; there must be an even number"):
        load_pairs(spec, "train")
    (folder / "Questions.csv").write_text("\n".join([*lines[:2], *lines[5:6]]))
    with pytest.raises(ValueError, match="pair 0 have the patterns 'Texts' and 'Quantity and Count'"):
        load_pairs(spec, "train")
    (folder / "Questions.csv").write_text("\n".join([*lines[:2], "1,Texts"]))
    with pytest.raises(ValueError, match=r"the row \['1', 'Texts'\]; each must be"):
        load_pairs(spec, "train")


def test_pairs_of_rows_have_one_statement_each_and_may_have_no_pattern(tmp_path):
    columns = {"image": image_column([picture(0), picture(1)]), "text": ["a", "b"]}
    spec = DatasetSpec("rows", str(tmp_path / "rows"), caption_separator="\n")
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).save_to_disk(spec.source)
    found, patterns = load_pairs(spec, "test")
    assert (found.captions, patterns) == (["a", "b"], ["all"])
    columns["text"] = ["a", "b\nc"]
    other = dataclasses.replace(spec, source=str(tmp_path / "other"))
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).save_to_disk(other.source)
    with pytest.raises(ValueError, match="row 1 of the split test has 2 statements, not one"):
        load_pairs(other, "test")


def test_pairs_and_names_of_the_hub(tmp_path, monkeypatch, labelled):
    """What is fetched is what the description names, and is read as a folder is."""
    folder = write_mmvp(tmp_path / "mmvp")
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    fetched = []

    def fetch(*args, repo_type):
        fetched.append((*args, repo_type))
        return str(folder if len(args) == 1 else tmp_path / "names.txt")

    monkeypatch.setattr("diffclip_hf.evaluation.datasets.snapshot_download", fetch)
    monkeypatch.setattr("diffclip_hf.evaluation.datasets.hf_hub_download", fetch)
    own = load_own_labels(labelled, split="test", image_column=None, label_column=None)
    monkeypatch.setattr("diffclip_hf.evaluation.datasets.load_own_labels", lambda source, **options: own)
    assert load_pairs(DatasetSpec("m", "org/pairs"), "train")[1] == ["Texts", "Texts", "Quantity and Count"]
    found = load_labelled(DatasetSpec("a", "org/animals", class_names_file="names.txt"), "test")
    assert found.names == ["ant", "bee", "cat"]
    assert fetched == [("org/pairs", "dataset"), ("org/animals", "names.txt", "dataset")]
    (folder / "Questions.csv").write_bytes(b"Question ID,Type,Statement\n1,Texts,\xff\n")
    with pytest.raises(ValueError, match=r"Questions\.csv can't be read: 'utf-8' codec"):
        load_pairs(DatasetSpec("m", str(folder)), "train")


# Data ---------------------------------------------------------------------------------------------------------------


def test_rows_of_the_same_picture_are_one_and_captions_are_split(tmp_path):
    images = image_column([picture(0), picture(1), picture(0)])
    columns = {"jpg": images, "txt": ["a\nb", "c", "d\n"]}
    datasets.Dataset.from_dict(columns).cast_column("jpg", datasets.Image()).save_to_disk(str(tmp_path / "rows"))
    found = load_captioned(DatasetSpec("rows", str(tmp_path / "rows"), caption_separator="\n"), "test")
    assert found.captions == ["a", "b", "c", "d"]
    assert found.image_of_caption.tolist() == [0, 0, 1, 0]
    assert [row["image"]["bytes"] for row in found.dataset] == [images[0]["bytes"], images[1]["bytes"]]


def test_shards_as_clip_benchmark_has_them_on_the_hub(tmp_path):
    """The layout of most presets: `SPLIT/0.tar` with `jpg`, `cls` and `txt`, and the names beside."""
    samples = [{"jpg": encoded(picture(n)), "cls": b"%d" % (n % 2), "txt": b"a %d\nb %d" % (n, n)} for n in range(3)]
    (tmp_path / "data" / "test").mkdir(parents=True)
    write_tar(tmp_path / "data" / "test" / "0.tar", samples)
    (tmp_path / "data" / "classnames.txt").write_text("an ant\na bee\n")
    spec = DatasetSpec(
        "data",
        str(tmp_path / "data"),
        label_column="cls",
        class_names_file="classnames.txt",
        caption_column="txt",
        caption_separator="\n",
    )
    found = load_labelled(spec, "test")
    assert (found.names, found.labels.tolist()) == (["an ant", "a bee"], [0, 1, 0])
    captioned = load_captioned(spec, "test")
    assert captioned.captions == ["a 0", "b 0", "a 1", "b 1", "a 2", "b 2"]
    assert captioned.image_of_caption.tolist() == [0, 0, 1, 1, 2, 2]


def test_plain_indices_with_names_from_a_file(tmp_path):
    columns = {"webp": image_column([picture(0), picture(1)]), "cls": [1, 0]}
    dataset = datasets.Dataset.from_dict(columns).cast_column("webp", datasets.Image())
    dataset.save_to_disk(str(tmp_path / "rows"))
    (tmp_path / "rows" / "classnames.txt").write_text("an ant\na bee\n")
    spec = DatasetSpec("rows", str(tmp_path / "rows"), label_column="cls", class_names_file="classnames.txt")
    found = load_labelled(spec, "test")
    assert (found.names, found.labels.tolist()) == (["an ant", "a bee"], [1, 0])
    (tmp_path / "rows" / "classnames.txt").write_text("an ant\n")
    with pytest.raises(ValueError, match="label_names has 1 names; the column cls has the label 1"):
        load_labelled(spec, "test")
    with pytest.raises(ValueError, match="indices with names"):
        load_labelled(DatasetSpec("rows", str(tmp_path / "rows"), label_column="cls"), "test")


def test_names_must_be_as_many_as_labels(labelled):
    spec = DatasetSpec("animals", labelled, class_names=("a", "b"))
    with pytest.raises(ValueError, match="label_names has 2 names; the column label has 3"):
        load_labelled(spec, "test")
    assert load_labelled(DatasetSpec("animals", labelled, class_names=tuple("abc")), "test").names == ["a", "b", "c"]


def test_images_without_a_label_or_a_caption(tmp_path):
    columns = {"image": image_column([picture(0), picture(1)]), "text": ["a", " "], "label": [0, -1]}
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["x"]),
        }
    )
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "rows"))
    with pytest.raises(ValueError, match="rows: row 1 of the split test has no label"):
        load_labelled(DatasetSpec("rows", str(tmp_path / "rows")), "test")
    with pytest.raises(ValueError, match="row 1 of the split test has no caption"):
        load_captioned(DatasetSpec("rows", str(tmp_path / "rows")), "test")


def test_names_that_are_alike_and_a_single_class(tmp_path, labelled, caplog):
    spec = DatasetSpec("animals", labelled, class_names=("ant", "ant", "bee"))
    assert RUN_TASK["zero-shot"](Encoder(*diffclip()), spec, TaskOptions())["metrics"]["top5_accuracy"] == 1
    assert "animals: 1 labels have a name that another has too" in caplog.text
    one = save_labelled(tmp_path / "one", ["p"], train=labelled_images(2, 1, classes=1))
    with pytest.raises(ValueError, match="one: the split train has 1 class; there must be at least 2"):
        RUN_TASK["few-shot"](Encoder(*diffclip()), DatasetSpec("one", one), TaskOptions())


def test_rows_that_cannot_be_measured(tmp_path):
    with pytest.raises(ValueError, match="tars is made of tar shards, which are for training"):
        load_labelled(DatasetSpec("tars", str(tmp_path / "00000.tar")), "test")
    columns = {"image": ["http://127.0.0.1:1/a.png"], "text": ["a"]}
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "far"))
    with pytest.raises(ValueError, match=r"far: row 0 of the split test can't be read: .*refused"):
        load_captioned(DatasetSpec("far", str(tmp_path / "far")), "test")


def test_labels_numbered_differently_in_two_parts(tmp_path):
    """Strings are numbered by what a part has; the test part lacks the first."""
    train, test = labelled_images(6, 1), labelled_images(4, 2, classes=2)
    words = np.array(["ant", "bee", "cat"])
    parts = {
        "train": {"image": image_column(train[0]), "label": words[train[1]].tolist()},
        "test": {"image": image_column(test[0]), "label": words[1:][test[1]].tolist()},
    }
    for split, columns in parts.items():
        rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        rows.to_parquet(str(tmp_path / f"{split}.parquet"))
    dataset = datasets.DatasetDict(
        {split: datasets.Dataset.from_parquet(str(tmp_path / f"{split}.parquet")) for split in parts}
    )
    dataset.save_to_disk(str(tmp_path / "rows"))
    options = TaskOptions(ways=2, shots=2, queries=2, episodes=5)
    spec = DatasetSpec("rows", str(tmp_path / "rows"))
    found = RUN_TASK["few-shot"](Encoder(*diffclip()), spec, options)
    assert found["classes"] == 3
    with pytest.raises(ValueError, match="1 labels that the training split test lacks: ant"):
        RUN_TASK["few-shot"](
            Encoder(*diffclip()), DatasetSpec("rows", spec.source, train_split="test", split="train"), options
        )


@pytest.mark.parametrize("task", ["zero-shot", "retrieval", "linear-probe", "few-shot", "mmvp"])
@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "has no image; 2 of 8 rows are like it"),
        ({"bytes": None, "path": None}, "has no image; 2 of 8 rows are like it"),
        ({"bytes": None, "path": "/nowhere/a.png"}, "has the image /nowhere/a.png, which isn't there"),
    ],
)
def test_rows_without_an_image_are_named_in_every_task(task, image, message, tmp_path):
    images = image_column([picture(number) for number in range(8)])
    images[3], images[6] = image, image
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {"text": [f"text {number}" for number in range(8)], "label": ["x", "y"] * 4}
    pq.write_table(pa.table({"image": pa.array(images, kind), **columns}), tmp_path / "rows.parquet")
    encoder = Encoder(*diffclip())
    encoder.model.forward = lambda *_: pytest.fail("nothing is encoded")
    with pytest.raises(ValueError, match=f"rows.parquet: row 3 of the split (test|train) {message}"):
        RUN_TASK[task](encoder, DatasetSpec("rows.parquet", str(tmp_path / "rows.parquet")), TaskOptions())


def test_base64_text_is_a_picture_in_evaluation_and_in_training(tmp_path):
    files = [encoded(picture(number), "PNG") for number in range(4)]
    texts = [base64.b64encode(file).decode() for file in files]
    texts[1] = f"data:image/png;base64,{texts[1]}"
    columns = {"label": ["x", "y"] * 2, "text": ["a", "b", "c", "d"]}
    for name, images in (("bytes", files), ("base64", texts)):
        pq.write_table(pa.table({"image": images, **columns}), tmp_path / f"{name}.parquet")
    model, processor = diffclip()
    parts = [
        load_labelled(DatasetSpec(name, str(tmp_path / f"{name}.parquet")), "test", True)
        for name in ("bytes", "base64")
    ]
    embeds = [Encoder(model, processor).image_embeds(part.dataset, "test") for part in parts]
    assert torch.equal(*embeds)
    collator = ImageTextCollator(processor, train=False)
    found = [
        collator(list(load_image_text_dataset(str(tmp_path / f"{name}.parquet")))) for name in ("bytes", "base64")
    ]
    assert torch.equal(*(batch["pixel_values"] for batch in found))
    assert collator.counts == {"seen": 8, "corrupt_images": 0, "empty_captions": 0, "undecodable_captions": 0}


def test_splits_of_folders_that_were_numbered_apart(tmp_path):
    """Twelve classes to learn from, of which the test part lacks two; names given by number change nothing."""
    for split, numbers in (("train", range(12)), ("test", [0, 1, 3, 4, 5, 6, 7, 8, 9, 11])):
        for number in numbers:
            (tmp_path / split / str(number)).mkdir(parents=True)
            picture(number).save(tmp_path / split / str(number) / "a.png")
    spec = DatasetSpec("folders", str(tmp_path))
    train = load_labelled(spec, "train", own_names=True)
    test = with_names(load_labelled(spec, "test", own_names=True), train)
    for part in (train, test):
        folders = [Path(row["image"]["path"]).parent.name for row in part.dataset]
        assert [part.names[label] for label in part.labels.tolist()] == folders
    # Folders called otherwise: `datasets` gives both parts the names of all.
    (tmp_path / "test" / "9").rename(tmp_path / "test" / "09")
    with pytest.raises(
        ValueError, match="The split test has 1 labels that the training split train has no rows of: 09"
    ):
        RUN_TASK["linear-probe"](Encoder(*diffclip()), spec, TaskOptions())
    (tmp_path / "test" / "09").rename(tmp_path / "test" / "9")
    named = load_labelled(dataclasses.replace(spec, class_names=tuple(f"name {n}" for n in range(12))), "test")
    folders = [Path(row["image"]["path"]).parent.name for row in named.dataset]
    assert [named.names[label] for label in named.labels.tolist()] == [f"name {folder}" for folder in folders]
    assert len(named.names) == 12


def test_a_damaged_picture_stops_the_measurement(tmp_path):
    columns = {"image": [*image_column([picture(0)]), {"bytes": b"not a picture", "path": "b.png"}], "label": [0, 0]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x"])})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "rows"))
    with pytest.raises(ValueError, match=r"Image 1 of the split test \(b.png\) can't be read"):
        RUN_TASK["zero-shot"](Encoder(*diffclip()), DatasetSpec("rows", str(tmp_path / "rows")), TaskOptions())


# Models and the cache -----------------------------------------------------------------------------------------------


def test_embeddings_that_arent_finite_give_no_figures(tmp_path, captioned):
    """A weight of a tower's projection is NaN; nothing of that tower is kept either."""
    for part, kind in (("text_projection", "text"), ("visual_projection", "image")):
        model, processor = diffclip()
        getattr(model, part).weight.data[0, 0] = float("nan")
        encoder = Encoder(model, processor, cache=EmbeddingCache(tmp_path / kind))
        with pytest.raises(ValueError, match=f"{kind} embeddings aren't finite"):
            RUN_TASK["retrieval"](encoder, DatasetSpec("captions", captioned), TaskOptions())
        assert not list((tmp_path / kind).glob(f"{kind}s*"))


def test_models_and_processors_that_lack_a_part():
    model, processor = diffclip()
    with pytest.raises(ValueError, match="has no get_image_features and no get_text_features"):
        Encoder(model.vision_model, processor)
    with pytest.raises(ValueError, match="has no tokenizer"):
        Encoder(model, SimpleNamespace(image_processor=processor.image_processor))
    with pytest.raises(ValueError, match="batch_size is 0"):
        Encoder(model, processor, batch_size=0)


def test_texts_that_are_cut_are_counted(caplog):
    encoder = Encoder(*diffclip())
    logger = "diffclip_hf.evaluation.encoder"
    with caplog.at_level("WARNING", logger=logger):
        logging.enable_propagation()
        try:
            encoder.text_embeds(["short", "long " * 40])
        finally:
            logging.disable_propagation()
    assert "1 of 2 texts are cut to 77 tokens" in caplog.text


def load_metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def count_calls(encoder: Encoder, monkeypatch) -> dict[str, int]:
    calls = {"_encode_images": 0, "_encode_texts": 0}
    for name in calls:
        original = getattr(encoder, name)

        def counted(*args, _name=name, _original=original):
            calls[_name] += 1
            return _original(*args)

        monkeypatch.setattr(encoder, name, counted)
    return calls


def test_embeddings_are_computed_once_and_anew_where_something_changes(tmp_path, labelled, monkeypatch):
    spec = DatasetSpec("animals", labelled)
    cache = EmbeddingCache(tmp_path / "cache")

    def runs(model, processor, task="zero-shot", spec=spec, **options) -> tuple[int, int, dict]:
        """How often images and texts were encoded, and what was found."""
        encoder = Encoder(model, processor, cache=cache)
        calls = count_calls(encoder, monkeypatch)
        found = RUN_TASK[task](encoder, spec, TaskOptions(**options))
        return calls["_encode_images"], calls["_encode_texts"], found["metrics"]

    model, processor = diffclip()
    first = runs(model, processor)
    assert first[:2] == (1, 1)
    assert runs(*diffclip()) == (0, 0, first[2])
    # The same pictures, but other features of them.
    few = {"ways": 2, "shots": 2, "queries": 2, "episodes": 2}
    assert runs(model, processor, "few-shot", **few)[:2] == (2, 0)
    assert runs(model, processor, "few-shot", **few, pooled=False)[:2] == (1, 0), "the test part is there already"
    # Another part, and other texts.
    assert runs(model, processor, spec=DatasetSpec("animals", labelled, split="validation"))[:2] == (1, 0)
    assert runs(model, processor, spec=DatasetSpec("animals", labelled, templates=("{}",)))[:2] == (0, 1)
    # Preprocessing is of images only.
    _, squashed = diffclip()
    squashed.image_processor.do_center_crop = False
    squashed.image_processor.size = type(squashed.image_processor.size)(height=32, width=32)
    assert runs(model, squashed)[:2] == (1, 0)
    # The tokenizer's length is of texts only.
    _, shortened = diffclip()
    shortened.tokenizer.model_max_length = 20
    assert runs(model, shortened)[:2] == (0, 1)
    with torch.no_grad():
        model.logit_scale.add_(0.5)
    assert runs(model, processor)[:2] == (1, 1), "weights"
    double, _ = diffclip()
    assert runs(double.double(), processor)[:2] == (1, 1), "dtype"
    files = list((tmp_path / "cache").iterdir())
    assert all(file.suffix == ".safetensors" and file.stat().st_mode & 0o777 == 0o644 for file in files)
    assert all(load_file(file)["embeds"].dtype == torch.float32 for file in files)


def test_the_model_is_known_by_its_weights_and_configuration(tmp_path):
    model, _ = diffclip()
    known = model_fingerprint(model)
    model.save_pretrained(tmp_path / "saved")
    assert model_fingerprint(type(model).from_pretrained(tmp_path / "saved")) == known
    model.config.vision_config.layer_norm_eps *= 2
    changed = model_fingerprint(model)
    assert changed != known
    with torch.no_grad():
        model.visual_projection.weight[0, 0] += 1e-3
    assert model_fingerprint(model) not in (known, changed)
    assert model_fingerprint(model.bfloat16()) not in (known, changed)


@pytest.mark.parametrize("damage", ["cut", "a bit", "another key", "of other rows", "a folder's file"])
def test_a_damaged_file_of_the_cache_is_computed_again(damage, tmp_path):
    cache = EmbeddingCache(tmp_path)
    embeds = cache.get("x", {"a": 1}, 2, lambda: torch.ones(2, 3))
    assert torch.equal(cache.get("x", {"a": 1}, 2, lambda: pytest.fail("it is there")), embeds)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[:20])
    elif damage == "a bit":
        file.write_bytes(content[:-1] + b"\x3e")
    elif damage == "another key":
        cache.get("x", {"a": 2}, 2, lambda: torch.zeros(2, 3))
        (other,) = set(tmp_path.iterdir()) - {file}
        file.write_bytes(other.read_bytes())
    elif damage == "of other rows":
        save_file({"embeds": torch.ones(1, 3)}, file, load_metadata(file))
    else:
        file.write_bytes(b"")
    assert torch.equal(cache.get("x", {"a": 1}, 2, lambda: torch.ones(2, 3)), embeds)
    assert torch.equal(cache.get("x", {"a": 1}, 2, lambda: pytest.fail("it is there again")), embeds)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_several_read_what_one_reads(num_workers, tmp_path):
    """Bit for bit, and the same row is named; 20 pictures of two sizes, of which the seventh is damaged later."""
    column = image_column([picture(number).resize((40 + 9 * (number % 2), 37)) for number in range(20)])
    dataset = datasets.Dataset.from_dict({"image": column}).cast_column("image", datasets.Image(decode=False))
    expected = Encoder(*diffclip(), num_workers=0).image_embeds(dataset, "test")
    encoder = Encoder(*diffclip(), cache=EmbeddingCache(tmp_path), num_workers=num_workers)
    assert torch.equal(encoder.image_embeds(dataset, "test"), expected)
    column[6] = {"bytes": column[6]["bytes"][:200], "path": "six.png"}
    dataset = datasets.Dataset.from_dict({"image": column}).cast_column("image", datasets.Image(decode=False))
    with pytest.raises(ValueError, match=r"Image 16 of the split test \(six.png\) can't be read"):
        encoder.image_embeds(dataset, "test", rows=range(10, 30))
    assert not multiprocessing.active_children()


# The table and the command ------------------------------------------------------------------------------------------


def test_the_table_by_hand():
    paper = {"zero-shot": {"accuracy": {"CC3M CLIP": 10.0, "CC12M CLIP": 30.0}}}
    other = {"zero-shot": {"mean_per_class": {"CC12M CLIP": 40.0}}}
    specs = [DatasetSpec("a", "x/a", paper=paper), DatasetSpec("b", "x/b", paper=other)]
    results = [
        {"n": 4, "main": "accuracy", "metrics": {"accuracy": 0.25, "top5_accuracy": 0.5, "mean_per_class": 0.1}},
        {"n": 8, "main": "mean_per_class", "metrics": {"accuracy": 0.9, "top5_accuracy": 1.0, "mean_per_class": 0.5}},
    ]
    assert markdown_table("zero-shot", "ours", specs, results) == (
        "| data set | metric | images | ours | paper, CC3M CLIP | paper, CC12M CLIP |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| a | accuracy | 4 | 25.0 | 10.0 | 30.0 |\n"
        "| a | top-5 accuracy | 4 | 50.0 |  |  |\n"
        "| b | mean per class | 8 | 50.0 |  | 40.0 |\n"
        "| b | top-5 accuracy | 8 | 100.0 |  |  |\n"
        "| mean | each one's | | 37.5 |  | 35.0 |\n"
        "| mean | top-5 accuracy | | 75.0 |  |  |\n"
    ).replace("| |", "|  |")


def test_deviations_and_patterns_in_the_table():
    few = {"n": 75, "main": "accuracy", "deviation": 0.0625, "metrics": {"accuracy": 0.5, "other": 0.1}}
    assert markdown_table("few-shot", "ours", [DatasetSpec("a", "x/a")], [few]).splitlines()[2:] == [
        "| a | accuracy | 75 | 50.0 ± 6.2 |"
    ]
    pairs = {"n": 4, "main": "pair_accuracy", "metrics": {"pair_accuracy": 0.5}, "patterns": {"Texts": 0, "Count": 1}}
    assert markdown_table("mmvp", "ours", [DatasetSpec("m", "x/m")], [pairs]).splitlines()[2:] == [
        "| m | pairs, by text | 4 | 50.0 |",
        "| Texts | pairs, by text |  | 0.0 |",
        "| Count | pairs, by text |  | 100.0 |",
    ]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, str]:
    folders = {}
    for name in ("diffclip", "clip"):
        model, processor = MODELS[name]()
        folder = tmp_path_factory.mktemp("models") / name
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        folders[name] = str(folder)
    return folders


@pytest.mark.parametrize("name", ["diffclip", "clip"])
def test_the_command_on_several_data_sets(name, saved, labelled, tmp_path, capsys):
    other = save_labelled(tmp_path / "others", ["p", "q"], test=labelled_images(5, 9, classes=2))
    output = tmp_path / "out" / "report.json"
    arguments = [saved[name], "--task", "zero-shot", "--dataset", labelled, other, "--templates", "imagenet-small"]
    arguments += ["--output", str(output), "--cache-dir", str(tmp_path / "cache"), "--device", "cpu"]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    report = json.loads(output.read_text())
    assert report["model"]["class"] == {"diffclip": "DiffCLIPModel", "clip": "CLIPModel"}[name]
    assert report["model"]["parameters"] > 0
    assert (report["device"], report["task"], report["model"]["dtype"]) == ("cpu", "zero-shot", "float32")
    assert {"torch", "transformers", "diffclip-hf", "datasets"} <= set(report["versions"])
    assert report["machine"]["cores"] == os.cpu_count()
    assert [result["n"] for result in report["results"]] == [27, 10]
    assert len(report["results"][0]["templates"]) == 7
    accuracies = [result["metrics"]["accuracy"] for result in report["results"]]
    assert report["mean"]["main"] == report["mean"]["accuracy"] == pytest.approx(sum(accuracies) / 2)
    assert f"| mean | accuracy |  | {sum(accuracies) / 2 * 100:.1f} |" in table
    files = set((tmp_path / "cache").iterdir())
    assert len(files) == 4
    assert main([*arguments, "--no-cache"]) == 0
    assert capsys.readouterr().out == table
    assert json.loads(output.read_text())["results"] == report["results"]


def test_an_error_leaves_what_was_measured_before_it(saved, labelled, tmp_path, capsys, caplog):
    columns = {"image": [*image_column([picture(0)]), {"bytes": b"", "path": "b.png"}], "label": [0, 0]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x"])})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "bad"))
    output = tmp_path / "report.json"
    arguments = [saved["diffclip"], "--task", "zero-shot", "--dataset", labelled, str(tmp_path / "bad")]
    assert main([*arguments, "--no-cache", "--output", str(output)]) == 1
    assert "| animals | accuracy | 27 |" in capsys.readouterr().out
    assert [result["dataset"] for result in json.loads(output.read_text())["results"]] == ["animals"]
    assert "Image 1 of the split test (b.png) can't be read" in caplog.text


def test_a_full_disk_leaves_the_table(saved, labelled, tmp_path, capsys, caplog, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffclip_hf.evaluate.write_text_whole", full)
    arguments = [saved["diffclip"], "--task", "zero-shot", "--dataset", labelled, "--no-cache"]
    assert main([*arguments, "--output", str(tmp_path / "report.json")]) == 1
    assert "| animals | accuracy | 27 |" in capsys.readouterr().out
    assert "The results above can't be written" in caplog.text
    assert "No space left on device" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--templates", "a photo"], "each must be a string with {}"),
        (["--shots", "3", "--features", "pooled"], "--features, --shots can't be used with --task zero-shot"),
        (["--batch-size", "0"], "batch_size is 0; it must be at least 1"),
        (["--num-workers", "-1"], "num_workers is -1; it must be a whole number of at least 0"),
        (["--output", "."], ". exists and is not a file"),
        (["--output", "/dev/null/report.json"], "/dev/null/report.json can't be written"),
        (["--cache-dir", "/dev/null/cache"], "Embeddings can't be kept: /dev/null/cache/trial.safetensors"),
        (["--device", "cuda:99"], "The device 'cuda:99' can't be used"),
        (["--dataset", "./picturs"], "There is no picturs"),
        (["--dataset", "tests/nowhere"], "There is no tests/nowhere"),
        (["--dataset", "nowhere/*.parquet"], "There is no file nowhere/*.parquet"),
        (["--class-names", "nowhere.txt"], "The names in nowhere.txt can't be read"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(arguments, message, labelled, tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("diffclip_hf.evaluation.encoder.load_model", lambda *_, **__: pytest.fail("it is loaded"))
    common = ["model", "--task", "zero-shot", "--dataset", labelled, "--cache-dir", str(tmp_path)]
    assert main([*common, *arguments]) == 1
    assert message in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "imagenett"], "the presets aircraft"),
        (["--dataset", "flickr8k"], "is for retrieval, not for zero-shot"),
        (["--split", "dev"], "split is 'dev'"),
        (["--revision", "v1"], "The revision 'v1' can't be used with"),
    ],
)
def test_the_command_says_what_does_not_fit(arguments, message, saved, labelled, tmp_path, caplog):
    common = [saved["diffclip"], "--task", "zero-shot", "--dataset", labelled, "--cache-dir", str(tmp_path)]
    assert main([*common, *arguments]) == 1
    assert message in caplog.text


def test_the_command_needs_a_model_a_task_and_a_data_set(capsys):
    with pytest.raises(SystemExit):
        main(["model", "--task", "zero-shot"])
    assert "MODEL, --task and --dataset are needed" in capsys.readouterr().err
    assert main(["--list"]) == 0
    assert "| mmvp-vlm | mmvp | MMVP/MMVP_VLM |" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["retrieval", "zero-shot"])
def test_the_guide_measures_the_embedded_model(task, warm_python, tmp_path):
    """Its commands as they stand there; every picture is recognised."""
    page = (ROOT / "docs" / "guides" / "measure.md").read_text(encoding="utf-8")
    lines = page.replace("\\\n", " ").splitlines()
    (command,) = (line for line in lines if f"--task {task} " in line and "embedded/pictures" in line)
    arguments = shlex.split(command)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = warm_python(arguments[1:], ROOT, environment)
    assert done.returncode == 0, done.stdout + done.stderr
    metric = {"retrieval": "image to text Recall@1", "zero-shot": "accuracy"}[task]
    assert f"| pictures | {metric} | 8 | 100.0 |" in done.stdout
    assert "image/s" in done.stderr, "a progress bar"
