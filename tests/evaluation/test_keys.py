"""Embeddings from the cache are those that would be computed now, whatever has changed since they were kept."""

import hashlib
import importlib
import json
import os
import re
import shutil
import sys
import time
import zipfile
from functools import partial
from pathlib import Path
from types import MethodType

import datasets
import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny import randomised, tiny_config
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from training_samples import encoded, picture, tiny_pair_model, tiny_processor
from transformers import CLIPImageProcessor, CLIPImageProcessorPil, logging

from diffclip_hf.common import known_files
from diffclip_hf.common.embedding_cache import EmbeddingCache
from diffclip_hf.common.keys import UnknownContentError, describe, describe_model, tensor_digest
from diffclip_hf.evaluation import encoder as encoder_module
from diffclip_hf.evaluation.datasets import load_captioned, load_labelled, load_pairs
from diffclip_hf.evaluation.encoder import Encoder
from diffclip_hf.evaluation.specs import DatasetSpec


TEXTS = ["a red fox", "an ox"]


def pictures(*numbers: int) -> datasets.Dataset:
    images = [{"bytes": encoded(picture(number), "PNG"), "path": None} for number in numbers]
    return datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image(decode=False))


def embeds_of(model, processor, folder: Path | None) -> torch.Tensor:
    """Both towers' embeddings, side by side."""
    encoder = Encoder(model, processor, cache=EmbeddingCache(folder))
    return torch.cat([encoder.image_embeds(pictures(0, 1), "test"), encoder.text_embeds(TEXTS)], dim=1)


def lora():
    config = LoraConfig(r=2, lora_alpha=16, target_modules=["q1_proj", "q_proj", "v_proj", "fc1"])
    model = get_peft_model(randomised(tiny_pair_model()), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) / 4)
    return model


def _attention(model):
    return model.vision_model.encoder.layers[0].self_attn


def _change_scales(model) -> None:
    for module in model.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling["default"] *= 4


def _add_adapter(model) -> None:
    model.add_adapter("other", LoraConfig(r=2, target_modules=["fc1"], init_lora_weights=False))
    model.set_adapter("other")


def _set_attributes(model, name: str, change) -> None:
    found = [module for module in model.modules() if isinstance(getattr(module, name, None), float)]
    assert found
    for module in found:
        setattr(module, name, change(getattr(module, name)))


def _patch_method(model) -> None:
    plain = model.get_image_features
    model.get_image_features = MethodType(lambda self, pixel_values, **_: plain(pixel_values=-pixel_values), model)


SQUASHED = {"size": {"height": 32, "width": 32}, "do_center_crop": False}
CHANGES = {
    "a weight": lambda model, _: model.visual_projection.weight.data.mul_(-1),
    "an epsilon": lambda model, _: _set_attributes(model, "eps", lambda eps: eps + 0.5),
    "lambda_init": lambda model, _: _set_attributes(model, "lambda_init", lambda value: 0.9 - value),
    "an activation": lambda model, _: setattr(model.vision_model.encoder.layers[0].mlp, "activation_fn", nn.Tanh()),
    "a hook": lambda model, _: model.vision_model.encoder.layers[0].register_forward_hook(lambda m, i, o: o * 1.5),
    "a hook before": lambda model, _: model.vision_model.embeddings.register_forward_pre_hook(lambda _, i: (-i[0],)),
    "a method": lambda model, _: _patch_method(model),
    "a layer out": lambda model, _: model.vision_model.encoder.layers.pop(-1),
    "the tokens": lambda _, processor: setattr(processor.tokenizer, "model_max_length", 5),
    "the mean": lambda _, processor: setattr(processor.image_processor, "image_mean", [0.1, 0.2, 0.3]),
    "the filter": lambda _, processor: setattr(processor.image_processor, "resample", Image.Resampling.NEAREST),
    "a step": lambda _, processor: setattr(processor.image_processor, "normalize", lambda image, *_, **__: image * 0),
    "the processor": lambda _, processor: setattr(processor, "image_processor", CLIPImageProcessorPil(**SQUASHED)),
}  # fmt: skip
ADAPTER_CHANGES = {
    "its scale": lambda model: _change_scales(model),
    "another": _add_adapter,
    "none": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_embeddings_changes_the_key(change, tmp_path):
    model, processor = randomised(tiny_pair_model()), tiny_processor()
    before = embeds_of(model, processor, tmp_path)
    assert torch.equal(embeds_of(model, processor, tmp_path), before)
    count = len(list(tmp_path.iterdir()))
    CHANGES[change](model, processor)
    after = embeds_of(model, processor, tmp_path)
    assert torch.equal(after, embeds_of(model, processor, None))
    assert not torch.allclose(after, before)
    # Kept too, for all of these are known.
    assert len(list(tmp_path.iterdir())) > count


# Of PEFT's own.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("change", ADAPTER_CHANGES)
def test_adapters_are_part_of_the_key(change, tmp_path):
    model, processor = lora(), tiny_processor()
    before = embeds_of(model, processor, tmp_path)
    assert torch.equal(embeds_of(lora(), processor, tmp_path), before), "the same one"
    plain = embeds_of(randomised(tiny_pair_model()), processor, tmp_path)
    assert not torch.allclose(plain, before)
    ADAPTER_CHANGES[change](model)
    after = embeds_of(model, processor, tmp_path)
    assert torch.equal(after, embeds_of(model, processor, None))
    if change == "none":
        torch.testing.assert_close(after, plain)
    elif change != "merged":
        assert not torch.allclose(after, before)


def test_one_encoder_sees_what_changes_later(tmp_path):
    model = randomised(tiny_pair_model())
    encoder = Encoder(model, tiny_processor(), cache=EmbeddingCache(tmp_path))
    before = encoder.text_embeds(TEXTS)
    with torch.no_grad():
        model.text_projection.weight.neg_()
    torch.testing.assert_close(encoder.text_embeds(TEXTS), -before)


def test_implementations_and_backends_have_keys_of_their_own(tmp_path):
    model, processor = randomised(tiny_pair_model()), tiny_processor()
    embeds_of(model, processor, tmp_path)
    model.config.vision_config._attn_implementation = "sdpa"
    embeds_of(model, processor, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    # Without torchvision there's one.
    backends = {type(backend(**size)) for backend in (CLIPImageProcessorPil, CLIPImageProcessor)}
    for backend in backends:
        processor.image_processor = backend(**size)
        embeds_of(model, processor, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4 + len(backends)


def test_what_cannot_be_known_is_not_kept(tmp_path, caplog):
    model, processor = randomised(tiny_pair_model()), tiny_processor()
    model.vision_model.encoder.layers[0].noise = torch.Generator()
    encoder = Encoder(model, processor, cache=EmbeddingCache(tmp_path))
    logging.enable_propagation()
    try:
        encoder.text_embeds(TEXTS)
    finally:
        logging.disable_propagation()
    assert not list(tmp_path.iterdir())
    assert "it can't be known what they depend on: a torch._C.Generator doesn't show what it holds" in caplog.text
    del model.vision_model.encoder.layers[0].noise
    plain = embeds_of(model, processor, None)
    offloaded = cpu_offload(model, execution_device=torch.device("cpu"))
    assert Encoder(offloaded, processor).weights() is None
    assert torch.equal(embeds_of(offloaded, processor, tmp_path), plain)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="on the meta device"):
        Encoder(tiny_pair_model().to("meta"), processor)


def test_values_that_look_alike_are_told_apart():
    thousand = torch.zeros(5000)
    other = thousand.clone()
    other[2500] = 1
    assert str(thousand) == str(other)
    pairs = [
        (thousand, other),
        (thousand.numpy(), other.numpy()),
        (1, 1.0),
        ("1", 1),
        (None, "None"),
        (lambda x: x + 1, lambda x: x + 2),
        ({"a": 1, "b": 2}, {"a": 2, "b": 1}),
        ([1, [2]], [[1], 2]),
        (float("nan"), float("inf")),
        (b"a", b"b"),
        (int, float),
        (re.compile("a"), re.compile("a", re.IGNORECASE)),
        (torch.relu, torch.tanh),
        (json, os),
        (partial(pictures, 1), partial(pictures, 2)),
        (tiny_config(), tiny_config(projection_dim=16)),
    ]
    for first, second in pairs:
        assert describe(first) != describe(second)
        json.dumps(describe(first))
    assert describe({"a": 1, "b": {2, 3}}) == describe({"b": {3, 2}, "a": 1})
    loop: list = []
    loop.append(loop)
    assert describe(loop) == ["list", ["seen", "list"]]
    with pytest.raises(UnknownContentError):
        describe(object())
    assert tensor_digest(torch.ones(2, 3)) != tensor_digest(torch.ones(3, 2))
    assert tensor_digest(torch.ones(2, dtype=torch.bfloat16)) != tensor_digest(torch.ones(2, dtype=torch.float16))
    # Made of others, as torchao's quantised weights are.
    ones, twos = torch.ones(2), torch.full((2,), 2.0)
    assert tensor_digest(TwoTensor(ones, ones)) == tensor_digest(TwoTensor(ones.clone(), ones))
    assert tensor_digest(TwoTensor(ones, ones)) != tensor_digest(TwoTensor(ones, twos))
    with pytest.raises(UnknownContentError):
        tensor_digest(torch.eye(2).to_sparse())


def test_a_class_of_elsewhere_is_known_by_its_file(tmp_path, monkeypatch):
    (tmp_path / "their_model.py").write_text("class Layer:\n    epsilon = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = describe(importlib.import_module("their_model").Layer)
    monkeypatch.delitem(sys.modules, "their_model")
    content = (tmp_path / "their_model.py").read_bytes()
    assert found == ["class", f"their_model.Layer {hashlib.sha256(content).hexdigest()}"]
    with pytest.raises(UnknownContentError, match=r"the class nowhere\.Layer has no file"):
        describe(type("Layer", (), {"__module__": "nowhere"}))


def test_settings_of_bitsandbytes_layers_change_with_use(tmp_path):
    """And only theirs are passed over."""
    for module, same in (("bitsandbytes.nn.modules", True), ("torch.nn.modules", False)):
        layer = type("Linear8bitLt", (nn.Linear,), {"__module__": module})(2, 2)
        model = randomised(tiny_pair_model())
        model.head = layer
        before = describe_model(model)
        layer.threshold = 6.0
        assert (describe_model(model) == before) is same


def test_a_probe_needs_a_tower_under_its_usual_name():
    model = randomised(tiny_pair_model())
    model.visual = model.vision_model
    del model.vision_model
    encoder = Encoder(model, tiny_processor())
    with pytest.raises(ValueError, match="The model is a DiffCLIPModel, which has no vision_model"):
        encoder.image_embeds(pictures(0), "test", pooled=True)


def test_a_picture_that_is_lost_is_named_by_its_row(tmp_path):
    encoder = Encoder(randomised(tiny_pair_model()), tiny_processor(), cache=EmbeddingCache(tmp_path))
    dataset = datasets.Dataset.from_dict({"image": [None]}, features=datasets.Features({"image": datasets.Image()}))
    dataset = dataset.cast_column("image", datasets.Image(decode=False))
    with pytest.raises(ValueError, match=r"Image 7 of the split test can't be read: There is no image"):
        encoder.image_embeds(dataset, "test", rows=[7])


# Data ---------------------------------------------------------------------------------------------------------------


def replace(path: Path, content: bytes) -> None:
    """Write another content under the same name, of the same size and with the same times."""
    status = path.stat()
    assert len(content) == status.st_size, "else the size tells"
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def flat(colour: int) -> bytes:
    """A picture whose file is as large whatever its colour."""
    return encoded(Image.new("RGB", (16, 16), (colour, 255 - colour, colour)), "BMP")


@pytest.mark.parametrize("kind", ["files", "table"])
def test_pictures_are_read_for_the_key_when_they_have_changed_and_only_then(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(known_files, "FOLDER", tmp_path / "kept")
    monkeypatch.setattr(known_files, "SETTLED", -(10**18))
    monkeypatch.setattr(known_files, "_mounts", lambda: {"/": "ext4"})
    read, colours = [], {"a": 10, "b": 200}
    digest = encoder_module.image_digest
    monkeypatch.setattr(encoder_module, "image_digest", lambda image: read.append(image) or digest(image))
    paths = {name: tmp_path / f"{name}.bmp" for name in colours}
    for name, colour in colours.items():
        paths[name].write_bytes(flat(colour))
    dataset = datasets.Dataset.from_dict({"image": [str(path) for path in paths.values()]})
    dataset = dataset.cast_column("image", datasets.Image())
    if kind == "table":
        embedded = datasets.Dataset.from_dict({"image": [{"bytes": flat(c), "path": None} for c in (10, 200)]})
        embedded.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "table")
        dataset = datasets.load_from_disk(tmp_path / "table")
    dataset = dataset.cast_column("image", datasets.Image(decode=False))
    model, processor = randomised(tiny_pair_model()), tiny_processor()
    encoder = Encoder(model, processor, cache=EmbeddingCache(tmp_path / "embeddings"))
    first = encoder.image_embeds(dataset, "test")
    assert len(read) == 2
    assert torch.equal(encoder.image_embeds(dataset, "test"), first)
    assert len(read) == 2
    reversed_rows = encoder.image_embeds(dataset.select([1, 0]), "test")
    torch.testing.assert_close(reversed_rows, first.flip(0))
    assert len(read) == 4
    time.sleep(0.02)  # Longer than a tick of the file system's clock.
    if kind == "files":
        replace(paths["b"], flat(90))
        after = encoder.image_embeds(dataset, "test")
        assert len(read) == 6
        assert torch.equal(after, Encoder(model, processor).image_embeds(dataset, "test"))
        assert not torch.allclose(after, first)


def write_source(kind: str, folder: Path, colours: list[int]) -> tuple[DatasetSpec, dict[str, bytes]]:
    """Write a data set of two pictures, and return it with its files' contents."""
    files: dict[str, bytes] = {}
    source = folder
    if kind in ("folders", "metadata"):
        for name, colour in zip("ab", colours, strict=True):
            where = folder / name / "x.bmp" if kind == "folders" else folder / f"{name}.bmp"
            files[str(where)] = flat(colour)
        if kind == "metadata":
            words = ["one", "two"] if colours[0] < colours[1] else ["two", "one"]
            lines = [
                json.dumps({"file_name": f"{name}.bmp", "text": word}) for name, word in zip("ab", words, strict=True)
            ]
            files[str(folder / "metadata.jsonl")] = "\n".join(lines).encode()
            # The captions alone change.
            files[str(folder / "a.bmp")], files[str(folder / "b.bmp")] = flat(0), flat(200)
    elif kind == "mmvp":
        rows = ["ID,Type,Statement"]
        for number, colour in enumerate(colours, 1):
            files[str(folder / "MLLM_VLM Images" / "Texts" / f"{number}.jpg")] = flat(colour)
            rows.append(f"{number},Texts,statement {number}")
        files[str(folder / "Questions.csv")] = "\n".join(rows).encode()
    elif kind == "zip paths":
        with zipfile.ZipFile(folder / "p.zip", "w") as archive:
            for name, colour in zip("ab", colours, strict=True):
                archive.writestr(zipfile.ZipInfo(f"{name}.bmp"), flat(colour))
        paths = [f"zip://{name}.bmp::{folder / 'p.zip'}" for name in "ab"]
        source = folder / "t.parquet"
        datasets.Dataset.from_dict({"image": paths, "text": ["one", "two"]}).to_parquet(source)
    elif kind == "zipped folder":
        with zipfile.ZipFile(folder / "p.zip", "w") as archive:
            for name, colour in zip("ab", colours, strict=True):
                archive.writestr(zipfile.ZipInfo(f"{name}.bmp"), flat(colour))
            lines = [
                json.dumps({"file_name": f"{name}.bmp", "text": word}) for name, word in (("a", "one"), ("b", "two"))
            ]
            archive.writestr(zipfile.ZipInfo("metadata.jsonl"), "\n".join(lines))
    else:
        source = folder / "t.parquet"
        paths = [str(folder / f"{name}.bmp") for name in "ab"]
        images = [{"bytes": flat(colour), "path": None} for colour in colours] if kind == "parquet" else paths
        if kind == "parquet paths":
            files = {path: flat(colour) for path, colour in zip(paths, colours, strict=True)}
        datasets.Dataset.from_dict({"image": images, "text": ["one", "two"]}).to_parquet(source)
    for path, content in files.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content)
    return DatasetSpec("x", str(source), split="train"), {
        str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def open_part(kind: str, spec: DatasetSpec):
    if kind == "mmvp":
        return load_pairs(spec, "train")[0]
    return load_labelled(spec, "train") if kind == "folders" else load_captioned(spec, "train")


KINDS = ("folders", "metadata", "mmvp", "parquet", "parquet paths", "zip paths", "zipped folder")


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_and_captions_that_changed_under_the_same_names(kind, tmp_path, monkeypatch):
    """Sizes and times are as before, so that the content alone tells."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = tmp_path / "data"
    folder.mkdir()
    spec, before = write_source(kind, folder, [0, 200])
    encoder = Encoder(randomised(tiny_pair_model()), tiny_processor(), cache=EmbeddingCache(tmp_path / "cache"))
    part = open_part(kind, spec)
    first = encoder.image_embeds(part.dataset, "train")
    captions = getattr(part, "captions", None)
    other = tmp_path / "other"
    other.mkdir()
    shutil.move(folder, other / "kept")
    folder.mkdir()
    _, after = write_source(kind, folder, [200, 0])
    shutil.rmtree(folder)
    shutil.move(other / "kept", folder)
    assert before.keys() == after.keys()
    assert before != after
    for path, content in after.items():
        replace(Path(path), content)
    part = open_part(kind, spec)
    found = encoder.image_embeds(part.dataset, "train")
    # Rows of the same content in the other order.
    if kind == "metadata":
        assert captions == ["one", "two"]
        assert part.captions == ["two", "one"]
        assert torch.equal(found, first)
    else:
        assert torch.equal(found, first.flip(0))
        assert not torch.equal(found, first)


def test_pictures_that_change_while_they_are_read(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(encoded(picture(0), "PNG"))
    dataset = datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png")]})
    dataset = dataset.cast_column("image", datasets.Image(decode=False))
    encoder = Encoder(randomised(tiny_pair_model()), tiny_processor(), cache=EmbeddingCache(tmp_path / "cache"))
    plain = encoder._images_digest

    def digest(*arguments):
        found = plain(*arguments)
        (tmp_path / "a.png").write_bytes(encoded(picture(1), "PNG"))
        return found

    monkeypatch.setattr(encoder, "_images_digest", digest)
    with pytest.raises(ValueError, match="Pictures of the split test changed while they were read"):
        encoder.image_embeds(dataset, "test")
    assert not (tmp_path / "cache").exists()


def test_embeddings_that_cannot_be_kept_are_returned(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffclip_hf.common.embedding_cache.write_whole", full)
    cache = EmbeddingCache(tmp_path / "cache")
    logging.enable_propagation()
    try:
        assert torch.equal(cache.get("x", {"a": 1}, 1, lambda: torch.ones(1, 2)), torch.ones(1, 2))
    finally:
        logging.disable_propagation()
    assert "can't be kept" in caplog.text
    assert "No space left on device" in caplog.text
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Embeddings can't be kept.*--no-cache"):
        EmbeddingCache(tmp_path / "file" / "cache").check(mend="Or keep none, with --no-cache.")
