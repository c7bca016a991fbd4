"""The loader for clip_benchmark, against a stand-in that calls it as clip_benchmark does, and against `Encoder`.

clip_benchmark itself comes with OpenCLIP and more, so it isn't installed for the tests.
"""

import sys
from types import ModuleType

import datasets
import pytest
import torch
from test_evaluate import MODELS, TaskOptions, image_column, one_by_one
from tolerances import CLOSED_FORM, relative_error
from torch.nn.functional import normalize
from torch.utils.data import DataLoader
from training_samples import picture
from transformers import AutoProcessor

from diffclip_hf.evaluation.clip_benchmark import load_for_clip_benchmark, register
from diffclip_hf.evaluation.encoder import Encoder
from diffclip_hf.evaluation.specs import DatasetSpec
from diffclip_hf.evaluation.tasks import RUN_TASK


TEXTS = ["a dog", "a very long caption of a picture that shows nothing", "ox"]
CAPTIONS = [[f"caption {number} {letter}" for letter in "abc"[: 1 + number % 3]] for number in range(6)]


@pytest.fixture(scope="module", params=["diffclip", "clip"])
def loaded(request, tmp_path_factory):
    """A model and its processor, as their folder loads, and the loader's three from it."""
    model, processor = MODELS[request.param]()
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    # Torchvision's image processor where it's installed, which differs from Pillow's by a level here and there.
    processor = AutoProcessor.from_pretrained(folder)
    return model, processor, load_for_clip_benchmark(str(folder), "main", device="cpu")


def test_the_three_give_the_models_embeddings(loaded):
    model, processor, (benchmark, transform, tokenizer) = loaded
    images = [picture(0), picture(1, 90, 40).convert("L"), picture(2).convert("RGBA")]
    ids = tokenizer(TEXTS)
    assert (ids.dtype, tuple(ids.shape)) == (torch.int64, (3, 77))
    assert torch.equal(tokenizer(TEXTS[0]), ids[:1])
    pixels = torch.stack([transform(image) for image in images])
    assert (pixels.dtype, tuple(pixels.shape)) == (torch.float32, (3, 3, 32, 32))
    with torch.no_grad():
        found = [normalize(part, dim=-1) for part in (benchmark.encode_image(pixels), benchmark.encode_text(ids))]
    # Without padding, and so without a mask to speak of.
    expected = one_by_one(model, processor, [image.convert("RGB") for image in images], TEXTS)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) <= CLOSED_FORM


def recall_as_clip_benchmark(model, transform, tokenizer, k: int) -> dict[str, float]:
    """clip_benchmark's procedure: a loader of transformed images with lists of captions, tokenized by the batch."""
    rows = [(transform(picture(number)), captions) for number, captions in enumerate(CAPTIONS)]
    loader = DataLoader(rows, batch_size=2, collate_fn=lambda batch: tuple(zip(*batch, strict=True)))
    image_embeds, text_embeds, own = [], [], []
    for images, captions in loader:
        start = sum(len(part) for part in image_embeds)
        own += [start + index for index, texts in enumerate(captions) for _ in texts]
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            image_embeds.append(normalize(model.encode_image(torch.stack(images)), dim=-1))
            text_embeds.append(normalize(model.encode_text(tokenizer([t for ts in captions for t in ts])), dim=-1))
    scores = torch.cat(text_embeds) @ torch.cat(image_embeds).t()
    positive = torch.nn.functional.one_hot(torch.tensor(own), len(CAPTIONS)).bool()
    return {
        "text_to_image": positive.gather(1, scores.topk(k, dim=1).indices).any(1).double().mean().item(),
        "image_to_text": positive.t().gather(1, scores.t().topk(k, dim=1).indices).any(1).double().mean().item(),
    }


def test_recall_is_that_of_the_evaluation(loaded, tmp_path):
    model, processor, three = loaded
    columns = {"image": image_column([picture(number) for number in range(6)]), "captions": CAPTIONS}
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    rows.save_to_disk(str(tmp_path / "rows"))
    found = RUN_TASK["retrieval"](
        Encoder(model, processor), DatasetSpec("rows", str(tmp_path / "rows")), TaskOptions()
    )
    for k in (1, 5):
        for direction, recall in recall_as_clip_benchmark(*three, k).items():
            assert found["metrics"][f"{direction}_recall@{k}"] == pytest.approx(recall)


def test_registering_twice_is_registering_once(monkeypatch):
    package, models = ModuleType("clip_benchmark"), ModuleType("clip_benchmark.models")
    models.TYPE2FUNC, models.MODEL_TYPES = {"open_clip": None}, ["open_clip"]
    package.models = models
    monkeypatch.setitem(sys.modules, "clip_benchmark", package)
    monkeypatch.setitem(sys.modules, "clip_benchmark.models", models)
    register()
    register()
    assert models.MODEL_TYPES == ["open_clip", "diffclip"]
    assert models.TYPE2FUNC["diffclip"] is load_for_clip_benchmark


def test_a_model_without_texts_is_refused(tmp_path):
    model, processor = MODELS["diffclip"]()
    model.vision_model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no get_image_features"):
        load_for_clip_benchmark(str(tmp_path))


def test_a_folder_has_no_revision(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"The revision 'v1' can't be used with .*, a folder"):
        load_for_clip_benchmark(str(tmp_path), "v1")
