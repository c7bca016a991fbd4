"""`ZeroShotClassifier` against Transformers' own pipeline, and against averages worked out by hand."""

import io
import multiprocessing
import re
import struct
import sys
import threading
import zlib
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from hub_client import picture
from PIL import Image
from tiny import randomised, tiny_config
from tokenizer_helper import BYTES, tiny_clip_tokenizer
from torch.nn.functional import normalize
from training_samples import encoded, tiny_processor
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    SiglipConfig,
    SiglipModel,
    dynamic_module_utils,
    logging,
    pipeline,
)

from diffclip_hf import (
    IMAGENET_TEMPLATES,
    IMAGENET_TEMPLATES_SMALL,
    DiffCLIPModel,
    DiffCLIPProcessor,
    DiffCLIPTokenizer,
    ZeroShotClassifier,
    add_remote_code,
)
from diffclip_hf.zero_shot import image_files


# Of different lengths, so that batches pad, and with one twice, as among ImageNet's usual names.
LABELS = ["cat", "a very small brown dog", "ox", "sunglasses", "tree", "sunglasses", "the inside of an old house"]
SIDE = 32


@pytest.fixture(scope="module", autouse=True)
def _no_bars():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def model():
    return randomised(DiffCLIPModel(tiny_config(text=BYTES)))


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(DiffCLIPTokenizer)


def clip() -> tuple[CLIPModel, CLIPProcessor]:
    """Transformers' own model, small, and its processor."""
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**tower, **BYTES}, vision_config={**tower, "image_size": SIDE, "patch_size": 8}, projection_dim=24
    )
    image_processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return randomised(CLIPModel(config)), CLIPProcessor(image_processor, tiny_clip_tokenizer())


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    base = picture()
    return [base.rotate(40 * turn).resize((40 + turn, 50 - turn)) for turn in range(5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, images) -> Path:
    """The images as files, the last in a sub-folder, with other files beside them."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "z").mkdir()
    for index, image in enumerate(images):
        image.save(folder / ("z" if index == len(images) - 1 else "") / f"{index}.{'PNG' if index % 2 else 'png'}")
    (folder / "notes.txt").write_text("not a picture")
    (folder / "._0.png").write_text("what macOS leaves beside a file")
    (folder / ".ipynb_checkpoints").mkdir()
    images[0].save(folder / ".ipynb_checkpoints" / "0-checkpoint.png")
    return folder


def stock_pipeline(model, processor):
    """Return Transformers' pipeline."""
    return pipeline(
        "zero-shot-image-classification",
        model=model,
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
    )


@pytest.fixture(scope="module")
def expected(model, processor, images) -> torch.Tensor:
    """The images' logits, from one call of the model."""
    texts = [f"This is a photo of {label}." for label in LABELS]
    with torch.inference_mode():
        return model(**processor(text=texts, images=images, return_tensors="pt")).logits_per_image


def assert_equal(found: list[list[dict]], expected: list[list[dict]]) -> None:
    assert len(found) == len(expected)
    for found_row, expected_row in zip(found, expected, strict=True):
        assert [entry["label"] for entry in found_row] == [entry["label"] for entry in expected_row]
        assert [entry["score"] for entry in found_row] == pytest.approx(
            [entry["score"] for entry in expected_row], abs=1e-6
        )


def test_the_templates_are_the_notebooks():
    assert len(set(IMAGENET_TEMPLATES)) == len(IMAGENET_TEMPLATES) == 80
    assert (IMAGENET_TEMPLATES[0], IMAGENET_TEMPLATES[-1]) == ("a bad photo of a {}.", "a tattoo of the {}.")
    assert len(IMAGENET_TEMPLATES_SMALL) == 7
    assert set(IMAGENET_TEMPLATES_SMALL) < set(IMAGENET_TEMPLATES)
    assert all(template.count("{}") == 1 for template in IMAGENET_TEMPLATES)


@pytest.mark.parametrize("template", ["This is a photo of {}.", "{}", "itap of a {}."])
def test_scores_equal_the_pipelines(model, processor, images, template):
    expected = stock_pipeline(model, processor)(images, candidate_labels=LABELS, hypothesis_template=template)
    assert_equal(ZeroShotClassifier(model, processor, LABELS, template)(images), expected)


def test_the_default_template_is_the_pipelines(model, processor, images):
    pipe = stock_pipeline(model, processor)
    found = ZeroShotClassifier(model, processor, LABELS)(images[0])
    assert_equal([found], [pipe(images[0], candidate_labels=LABELS)])


def test_another_clip_equals_the_pipeline(images):
    model, processor = clip()
    pipe = stock_pipeline(model, processor)
    assert_equal(ZeroShotClassifier(model, processor, LABELS)(images), pipe(images, candidate_labels=LABELS))


def test_a_turned_photograph_is_put_upright(images):
    """By its EXIF orientation, which CLIP's own image processor leaves out and the pipeline doesn't."""
    model, processor = clip()
    turned = images[0].copy()
    turned.getexif()[0x0112] = 6
    found = ZeroShotClassifier(model, processor, LABELS)(turned)
    assert_equal([found], [stock_pipeline(model, processor)(turned, candidate_labels=LABELS)])


def test_several_templates_are_averaged_as_slip_does(model, processor):
    """Each label's texts in a call of their own, at another length than the classifier's batches give."""
    classifier = ZeroShotClassifier(model, processor, LABELS, IMAGENET_TEMPLATES_SMALL, text_batch_size=5)
    for label, found in zip(LABELS, classifier.label_embeds, strict=True):
        texts = [template.replace("{}", label) for template in IMAGENET_TEMPLATES_SMALL]
        tokens = processor.tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            features = model.get_text_features(**tokens).pooler_output
        features = features / features.norm(dim=-1, keepdim=True)
        # The features' lengths differ, so that leaving out the first norm shows.
        mean = features.mean(0)
        torch.testing.assert_close(found, mean / mean.norm(), atol=1e-6, rtol=0)
        assert mean.norm() < 0.999


def test_a_label_with_several_names(model, processor):
    mapping = {"happy": ["happy", "smiling"], "sad": "sad"}
    names = ZeroShotClassifier(model, processor, ["happy", "smiling", "sad"]).label_embeds
    classifier = ZeroShotClassifier(model, processor, mapping)
    assert classifier.labels == ["happy", "sad"]
    torch.testing.assert_close(classifier.label_embeds[0], normalize(names[0] + names[1], dim=0))
    torch.testing.assert_close(classifier.label_embeds[1], names[2])


def test_the_text_tower_runs_once_for_any_number_of_images(model, processor, images, monkeypatch):
    shapes, count = [], model.text_model.forward
    monkeypatch.setattr(
        model.text_model, "forward", lambda **kw: (shapes.append(kw["input_ids"].shape), count(**kw))[1]
    )
    classifier = ZeroShotClassifier(model, processor, LABELS, ["a {}", "the {}"], text_batch_size=4)
    # 14 texts.
    assert [rows for rows, _ in shapes] == [4, 4, 4, 2]
    # No batch is wider than its longest text; the shortest label has 2 letters, with "a" and two special tokens.
    lengths = [columns for _, columns in shapes]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] < lengths[0] // 2
    classifier(images * 3)
    list(classifier.stream(images))
    classifier.logits(images)
    assert len(shapes) == 4


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_batch_sizes_dont_matter(model, processor, images, expected, batch_size):
    classifier = ZeroShotClassifier(model, processor, LABELS, batch_size=batch_size, text_batch_size=batch_size)
    found = classifier.logits(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def row_of(image: Image.Image) -> dict:
    return {"bytes": encoded(image, "PNG"), "path": None}


@pytest.fixture(scope="module")
def dataset(images) -> datasets.Dataset:
    features = datasets.Features({"label": datasets.Value("int64"), "photo": datasets.Image()})
    rows = {"label": list(range(len(images))), "photo": [row_of(image) for image in images]}
    return datasets.Dataset.from_dict(rows, features=features)


def with_two_columns(dataset: datasets.Dataset) -> datasets.Dataset:
    """A second column of images, in the other order."""
    more = dataset.select(range(len(dataset))[::-1]).select_columns("photo").rename_column("photo", "more")
    return datasets.concatenate_datasets([dataset, more], axis=1)


GIVEN = {
    "paths": lambda images, folder, dataset: image_files(folder),
    "strings": lambda images, folder, dataset: tuple(map(str, image_files(folder))),
    "folder": lambda images, folder, dataset: folder,
    "folder's name": lambda images, folder, dataset: str(folder),
    "a folder among others": lambda images, folder, dataset: [*image_files(folder)[:4], folder / "z"],
    "generator": lambda images, folder, dataset: (image for image in images),
    "dataset": lambda images, folder, dataset: dataset,
    "streamed dataset": lambda images, folder, dataset: dataset.to_iterable_dataset(),
    "dataset in numpy's format": lambda images, folder, dataset: dataset.with_format("numpy"),
    "column": lambda images, folder, dataset: dataset["photo"],
    "rows": lambda images, folder, dataset: ({"image": image, "other": 1} for image in images),
    "mixed": lambda images, folder, dataset: [images[0], *image_files(folder)[1:]],
    "bytes": lambda images, folder, dataset: [row_of(image)["bytes"] for image in images],
    "undecoded": lambda images, folder, dataset: [row_of(image) for image in images],
    "file objects": lambda images, folder, dataset: [io.BytesIO(row_of(image)["bytes"]) for image in images],
    "dataset with a transform": lambda images, folder, dataset: dataset.with_transform(lambda rows: rows),
}


@pytest.mark.parametrize("given", GIVEN)
def test_every_kind_of_input_gives_the_same(model, processor, images, folder, dataset, expected, given):
    classifier = ZeroShotClassifier(model, processor, LABELS, batch_size=2)
    make = GIVEN[given]
    torch.testing.assert_close(classifier.logits(make(images, folder, dataset)), expected, atol=1e-5, rtol=1e-5)
    assert_equal(classifier(make(images, folder, dataset)), classifier(images))
    assert_equal(list(classifier.stream(make(images, folder, dataset))), classifier(images))


def test_one_image_gives_one_list(model, processor, images, folder):
    classifier = ZeroShotClassifier(model, processor, LABELS)
    first = classifier(images)[0]
    for image in (images[0], folder / "0.png", str(folder / "0.png"), row_of(images[0])["bytes"], row_of(images[0])):
        assert_equal([classifier(image)], [first])
    assert_equal(classifier([images[0]]), [first])


def test_files_are_sorted_and_others_left_out(folder):
    names = [path.relative_to(folder).as_posix() for path in image_files(folder)]
    assert names == ["0.png", "1.PNG", "2.png", "3.PNG", "z/4.png"]


def test_transparency_is_laid_over_white(model, processor):
    classifier = ZeroShotClassifier(model, processor, LABELS)
    clear, white = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0)), Image.new("RGB", (SIDE, SIDE), "white")
    assert torch.equal(classifier.logits(clear), classifier.logits(white))


def test_no_image_is_no_result(model, processor):
    classifier = ZeroShotClassifier(model, processor, LABELS)
    assert classifier([]) == []
    assert classifier.logits([]).shape == (0, len(LABELS))


def test_top_k(model, processor, images):
    classifier = ZeroShotClassifier(model, processor, LABELS)
    every = classifier(images)
    assert [len(row) for row in every] == [len(LABELS)] * len(images)
    assert_equal(classifier(images, top_k=2), [row[:2] for row in every])
    assert_equal(classifier(images, top_k=100), every)


def test_a_stream_reads_a_batch_at_a_time(model, processor, images):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield images[len(taken) % len(images)]

    stream = ZeroShotClassifier(model, processor, LABELS, batch_size=3).stream(endless())
    assert not taken
    for given in range(1, 10):
        next(stream)
        assert len(taken) == 3 * -(-given // 3)
    stream.close()


@pytest.fixture(scope="module")
def twenty(tmp_path_factory) -> list[Path]:
    """Files of pictures that differ."""
    folder, base = tmp_path_factory.mktemp("twenty"), picture()
    for number in range(20):
        base.rotate(17 * number).resize((40 + number, 36)).save(folder / f"{number:02}.png")
    return image_files(folder)


def test_several_read_what_one_reads(model, processor, twenty, tmp_path):
    """Bit for bit, whatever the pictures are given as; the seventh, damaged, is named, and nothing is left behind."""
    alone, many = (ZeroShotClassifier(model, processor, LABELS, batch_size=3, num_workers=number) for number in (0, 4))
    expected = alone.logits(twenty)
    opened = [Image.open(path) for path in twenty]
    mixed = [twenty[0], *map(Image.open, twenty[1:3]), *twenty[3:]]
    for given in (twenty, map(str, twenty), opened, [path.read_bytes() for path in twenty], mixed):
        assert torch.equal(many.logits(given), expected)
    assert torch.equal(many.logits([Image.open(twenty[0])] * 20), expected[:1].expand(20, -1))
    broken = tmp_path / "broken.png"
    broken.write_bytes(twenty[6].read_bytes()[:200])
    damaged = [*twenty[:6], broken, *twenty[7:]]
    found = {}
    for classifier in (alone, many):
        results = found.setdefault(classifier, [])
        with pytest.raises(ValueError, match="Image 6 ") as caught:
            results.extend(classifier.stream(damaged))
        results.append(str(caught.value))
    assert found[alone] == found[many]
    assert len(found[many]) == 7, "two batches, and the error"
    stream = many.stream(twenty)
    next(stream)
    assert len(multiprocessing.active_children()) == 4
    del stream
    assert not multiprocessing.active_children()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("diffclip-reading")]


def test_a_picture_that_its_iterator_changes_is_read_at_once(model, processor, images):
    """As frames of a video or a GIF may be."""

    def frames():
        buffer = np.zeros((50, 40, 3), np.uint8)
        for image in images:
            buffer[:] = np.asarray(image.resize((40, 50)))
            yield buffer

    classifier = ZeroShotClassifier(model, processor, LABELS, batch_size=2, num_workers=3)
    expected = classifier.logits([np.asarray(image.resize((40, 50))) for image in images])
    assert torch.equal(classifier.logits(frames()), expected)


def test_label_embeddings_are_kept_and_computed_anew_where_something_changes(processor, tmp_path, monkeypatch):
    model = randomised(DiffCLIPModel(tiny_config(text=BYTES)))
    runs, encode = [], DiffCLIPModel.get_text_features

    def counted(self, **inputs):
        runs.append(1)
        return encode(self, **inputs)

    monkeypatch.setattr(DiffCLIPModel, "get_text_features", counted)

    def embeds(labels=LABELS, templates="a {}", model=model, **options):
        runs.clear()
        found = ZeroShotClassifier(model, processor, labels, templates, cache_dir=tmp_path, **options).label_embeds
        return found, len(runs)

    plain = ZeroShotClassifier(model, processor, LABELS, "a {}").label_embeds
    first, count = embeds()
    assert count == 1
    again, count = embeds()
    assert count == 0
    assert torch.equal(first, plain)
    assert torch.equal(again, plain)
    model.train()
    assert embeds()[1] == 0, "the mode changes nothing, for it's run in evaluation mode"
    model.eval()
    assert embeds(templates="the {}")[1] == 1
    assert embeds(labels=LABELS[:-1])[1] == 1
    swapped, count = embeds(labels={"x": LABELS[1], "y": LABELS[0]})
    assert count == 1
    assert torch.equal(swapped, embeds(labels={"y": LABELS[1], "x": LABELS[0]})[0]), "by texts, not by labels"
    with torch.no_grad():
        model.text_projection.weight[0, 0] += 0.5
    changed, count = embeds()
    assert count == 1
    assert not torch.equal(changed, plain)
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    repaired, count = embeds()
    assert count == 1
    assert torch.equal(repaired, changed)
    assert embeds()[1] == 0
    with pytest.raises(OSError, match="Embeddings can't be kept: /dev/null/cache"):
        ZeroShotClassifier(model, processor, LABELS, cache_dir="/dev/null/cache")


def test_the_mode_is_left_as_it_was(processor, images):
    """Some modules in training, others not; with dropout the scores would differ in training."""
    model = randomised(DiffCLIPModel(tiny_config(text=BYTES, vision={"attention_dropout": 0.5})))
    expected = ZeroShotClassifier(model, processor, LABELS).logits(images)
    model.train()
    model.text_model.eval()
    modes = [module.training for module in model.modules()]
    classifier = ZeroShotClassifier(model, processor, LABELS, batch_size=2)
    torch.testing.assert_close(classifier.logits(images), expected, atol=1e-5, rtol=1e-5)
    stream = classifier.stream(images)
    next(stream)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError, match="Image 0"):
        classifier("nowhere.png")
    assert [module.training for module in model.modules()] == modes
    assert not classifier.label_embeds.requires_grad
    # Usable in training, unlike what comes out of inference mode.
    weights = torch.ones(len(LABELS), 24, requires_grad=True)
    (weights * classifier.label_embeds).sum().backward()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float64, 1e-5)])
def test_dtypes(processor, images, dtype, tolerance):
    """Against the model's own logits in that dtype, of up to 4.3, of which bfloat16 keeps 8 bits."""
    model = randomised(DiffCLIPModel(tiny_config(text=BYTES))).to(dtype)
    inputs = processor(text=[f"This is a photo of {label}." for label in LABELS], images=images, return_tensors="pt")
    with torch.inference_mode():
        expected = model(**inputs.to(dtype)).logits_per_image.float()
    classifier = ZeroShotClassifier(model, processor, LABELS)
    assert classifier.label_embeds.dtype == torch.float32
    torch.testing.assert_close(classifier.logits(images), expected, atol=tolerance, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device(processor, images, expected):
    model = randomised(DiffCLIPModel(tiny_config(text=BYTES))).to("cuda")
    classifier = ZeroShotClassifier(model, processor, LABELS)
    assert classifier.label_embeds.device.type == "cuda"
    torch.testing.assert_close(classifier.logits(images), expected, atol=1e-4, rtol=0)


def test_inputs_go_to_the_models_device_and_dtype(processor, images, monkeypatch):
    """To the meta device, which every machine has; it holds no values, so that the towers stand aside."""
    seen = {}

    def features(**inputs):
        tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        seen.update({name: (value.device.type, value.dtype) for name, value in tensors.items()})
        return SimpleNamespace(pooler_output=torch.ones(1, 24))

    model = DiffCLIPModel(tiny_config(text=BYTES)).to(torch.bfloat16)
    monkeypatch.setattr("diffclip_hf.zero_shot.execution_device", lambda model: torch.device("meta"))
    monkeypatch.setattr(model, "get_text_features", features)
    monkeypatch.setattr(model, "get_image_features", features)
    ZeroShotClassifier(model, processor, ["cat"]).logits(images[0])
    assert seen == {
        "input_ids": ("meta", torch.int64),
        "attention_mask": ("meta", torch.int64),
        "pixel_values": ("meta", torch.bfloat16),
    }


def test_a_model_with_tuples_for_outputs(processor, images, expected):
    model = randomised(DiffCLIPModel(tiny_config(text=BYTES, return_dict=False)))
    torch.testing.assert_close(
        ZeroShotClassifier(model, processor, LABELS).logits(images), expected, atol=1e-5, rtol=1e-5
    )


def test_a_model_with_code_of_its_own(model, processor, images, tmp_path, monkeypatch):
    """As `trust_remote_code` loads it where the package isn't imported: classes that are none of the package's."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    add_remote_code(folder)
    model_class, processor_class = (
        dynamic_module_utils.get_class_from_dynamic_module(name, folder)
        for name in ("modeling_diffclip.DiffCLIPModel", "processing_diffclip.DiffCLIPProcessor")
    )
    assert not issubclass(model_class, DiffCLIPModel)
    assert not issubclass(processor_class, DiffCLIPProcessor)
    remote = model_class.from_pretrained(folder, attn_implementation="eager")
    # The folder's image processor may be torchvision's, which differs a little from Pillow's.
    remote_processor = processor_class.from_pretrained(folder)
    inputs = remote_processor(text=LABELS, images=images, return_tensors="pt")
    with torch.inference_mode():
        expected = remote(**inputs).logits_per_image
    found = ZeroShotClassifier(remote, remote_processor, LABELS, "{}").logits(images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_progress_bars(model, processor, images, capsys):
    logging.enable_progress_bar()
    try:
        classifier = ZeroShotClassifier(model, processor, LABELS, text_batch_size=2, batch_size=2)
        classifier.logits(images)
        shown = capsys.readouterr().err
        assert "Texts: 100%" in shown
        assert "7/7" in shown
        assert "Images: 100%" in shown
        assert "5/5" in shown
        classifier.logits(image for image in images)
        assert "Images: 5image" in capsys.readouterr().err
        classifier(images[0])
        assert capsys.readouterr().err == ""
        ZeroShotClassifier(model, processor, LABELS, text_batch_size=2, progress_bar=False).logits(images)
        assert capsys.readouterr().err == ""
    finally:
        logging.disable_progress_bar()
    ZeroShotClassifier(model, processor, LABELS, text_batch_size=2).logits(images)
    assert capsys.readouterr().err == ""


def test_a_long_label_is_cut_with_one_warning(model, processor, images):
    labels = ["b", "a" * 100, "c" * 101]
    with pytest.warns(UserWarning, match="2 of 3 texts are cut to 77 tokens") as warned:
        found = ZeroShotClassifier(model, processor, labels, "{}", text_batch_size=1).logits(images[0])
    assert len(warned) == 1
    assert warned[0].filename == __file__
    with pytest.warns(UserWarning, match="cut"):
        inputs = processor(text=labels, images=images[0], return_tensors="pt")
    with torch.inference_mode():
        torch.testing.assert_close(found, model(**inputs).logits_per_image, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"labels": []}, "labels is empty"),
        ({"labels": "cat"}, "labels is 'cat'"),
        ({"labels": 3}, "labels is 3"),
        ({"labels": ["cat", 3]}, "labels has 3"),
        ({"labels": {"cat": []}}, "labels has 'cat'"),
        ({"templates": []}, "templates is empty"),
        ({"templates": ["a {}", "a photo"]}, "templates has 'a photo'"),
        ({"templates": "a {} and {}"}, "templates has 'a {} and {}'"),
        ({"templates": "a {{}}"}, "templates has 'a {{}}'"),
        ({"templates": "a {label}"}, "templates has 'a {label}'"),
        ({"templates": [None]}, "templates has None"),
        ({"templates": 3}, "templates is 3"),
        ({"templates": "half a \ud83c {}"}, r"The text 'half a \ud83c {}' has half a character"),
        ({"labels": ["cat", "pizza \ud83c"]}, r"The text 'pizza \ud83c' has half a character at place 6"),
        ({"labels": {"cat": ["pizza \ud83c"]}}, r"The text 'pizza \ud83c' has half a character at place 6"),
        ({"batch_size": "8"}, "batch_size is '8'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": True}, "batch_size is True"),
        ({"text_batch_size": -1}, "text_batch_size is -1"),
        ({"num_workers": -1}, "num_workers is -1; it must be a whole number of at least 0, or None"),
        ({"processor": object()}, "processor is a object, which has no tokenizer and no image_processor"),
        ({"model": torch.nn.Linear(1, 1)}, "model is a Linear, which has no get_text_features"),
    ],
)
def test_what_is_refused(model, processor, arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        ZeroShotClassifier(**{"model": model, "processor": processor, "labels": LABELS, **arguments})


def test_siglip_is_refused(processor):
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = SiglipModel(SiglipConfig(text_config=tower, vision_config={**tower, "image_size": 32}))
    with pytest.raises(ValueError, match="logit_bias"):
        ZeroShotClassifier(model, processor, LABELS)


def test_images_that_are_refused(model, processor, images, folder, dataset, tmp_path):
    classifier = ZeroShotClassifier(model, processor, LABELS)
    broken = tmp_path / "broken.png"
    broken.write_bytes((folder / "0.png").read_bytes()[:200])
    (tmp_path / "empty").mkdir()

    def refused(images, *words, **kwargs):
        with pytest.raises(ValueError, match=".*".join(map(re.escape, words))):
            classifier(images, **kwargs)

    refused(broken, "Image 0", "broken.png")
    refused([images[0], str(broken)], "Image 1", "broken.png")
    refused(tmp_path, "Image 0", "broken.png")
    refused([images[0], tmp_path / "nowhere.png"], "Image 1", "nowhere.png")
    refused([images[0], None], "Image 1", "There is no image")
    refused("a photo of a cat", "Image 0 can't be read: There is no file 'a photo of a cat'")
    refused(["\ud83c"], "Image 0 can't be read: There is no file")
    refused([b"no picture"], "Image 0 can't be read", "isn't a picture of a format that is read")
    refused([Image.new("RGB", (2000, 1))], "Image 0 can't be read", "200 times the other")
    refused(None, "images is of type NoneType")
    refused(images, "top_k is '1'", top_k="1")
    refused([images], "Image 0", "list")
    refused(tmp_path / "empty", "empty", "no pictures", ".png")
    refused([images[0], tmp_path / "empty"], "empty", "no pictures")
    refused(3, "images is of type int")
    refused(images, "top_k is 0", top_k=0)
    refused(images, "top_k is True", top_k=True)

    refused(datasets.DatasetDict(train=dataset), "'train'")
    refused(dataset, "Row 0", "photo", "'nothing'", image_column="nothing")
    refused(dataset.remove_columns("photo"), "label", "image_column")
    refused(with_two_columns(dataset), "['photo', 'more']")
    rows = {"photo": [row_of(images[0]), {"bytes": broken.read_bytes(), "path": None}]}
    refused(
        datasets.Dataset.from_dict(rows, features=datasets.Features({"photo": datasets.Image()})), "Image 1 can't be"
    )


def test_datasets_images_are_read_by_the_one_reader(model, processor, images, expected):
    """`datasets` would open them with Pillow alone, which refuses this resolution, and runs Ghostscript on EPS."""
    classifier = ZeroShotClassifier(model, processor, LABELS)
    features = datasets.Features({"photo": datasets.Image()})
    png = row_of(images[0])["bytes"]
    broken = png[:33] + struct.pack(">I", 1) + b"pHYs\0" + struct.pack(">I", zlib.crc32(b"pHYs\0")) + png[33:]
    dataset = datasets.Dataset.from_dict({"photo": [{"bytes": broken, "path": None}]}, features=features)
    torch.testing.assert_close(classifier.logits(dataset), expected[:1], atol=1e-5, rtol=1e-5)
    eps = {"bytes": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "path": None}
    dataset = datasets.Dataset.from_dict({"photo": [eps]}, features=features)
    for given in (dataset, dataset["photo"], dataset.to_iterable_dataset()):
        with pytest.raises(ValueError, match=r"Image 0 can't be read.*isn't a picture"):
            classifier(given)


def test_an_image_column_is_chosen(model, processor, dataset, expected):
    classifier = ZeroShotClassifier(model, processor, LABELS)
    found = classifier.logits(with_two_columns(dataset), image_column="photo")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_works_without_datasets(warm_python, tmp_path):
    """In a fresh process, where importing `datasets` fails."""
    code = "import sys; sys.modules['datasets'] = None\nimport diffclip_hf\nprint(diffclip_hf.ZeroShotClassifier)"
    warm_python.run("-c", code, folder=tmp_path)
