"""The exported graphs against the original's numbers and PyTorch's, and what stops an export."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hub_client import picture, save_tiny
from hub_server import HubServer
from parity_models import golden, parity_model
from tiny import CONTEXT, tiny_inputs, tiny_model
from tolerances import ONNX_AGAINST_PYTORCH, PADDING, PARITY_WITH_ORIGINAL, relative_error
from transformers import AutoProcessor

from diffclip_hf import DiffCLIPForImageClassification, DiffCLIPModel, export_onnx
from diffclip_hf.common.remote_code import CODE_FILES


NAMES = ("vision_model", "text_model")


def graph_of(folder: Path, name: str):
    """Return a function: keyword tensors → the graph's output as a tensor."""
    run = export_onnx.open_graph(folder / f"{name}.onnx")
    return lambda **inputs: torch.from_numpy(run(inputs))


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """The folder that the command writes, of a model with golden numbers."""
    folder = tmp_path_factory.mktemp("exported")
    parity_model("diffclip", "tiny").save_pretrained(folder / "model")
    assert export_onnx.main([str(folder / "model"), str(folder / "out"), "--runs", "1"]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """A model with 77 text tokens, and its text tower's graph."""
    folder = tmp_path_factory.mktemp("long")
    model = tiny_model()
    export_onnx.export_tower(export_onnx.towers_of(model)[1], folder / "text_model.onnx")
    return model, graph_of(folder, "text_model")


def assert_golden(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    """Compare both graphs' outputs with the original's."""
    found = graph_of(folder, "vision_model")(pixel_values=expected["pixel_values"])
    assert relative_error(found, expected["image_embed"]) <= PARITY_WITH_ORIGINAL
    input_ids = expected["input_ids"]
    found = graph_of(folder, "text_model")(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
    assert relative_error(found, expected["text_embed"]) <= PARITY_WITH_ORIGINAL


def test_differential_towers_give_the_originals_numbers(exported):
    assert_golden(exported, golden("diffclip", "tiny")[0])


def test_standard_towers_give_the_originals_numbers(tmp_path):
    for tower in export_onnx.towers_of(parity_model("clip", "tiny")):
        export_onnx.export_tower(tower, tmp_path / f"{tower.name}.onnx")
    assert_golden(tmp_path, golden("clip", "tiny")[0])


@pytest.mark.parametrize("batch", [1, 3, 5])
@torch.inference_mode()
def test_every_batch_of_images(exported, batch):
    pixel_values = tiny_inputs(images=batch, seed=batch)["pixel_values"]
    expected = parity_model("diffclip", "tiny").get_image_features(pixel_values).pooler_output
    found = graph_of(exported, "vision_model")(pixel_values=pixel_values)
    assert relative_error(found, expected) <= ONNX_AGAINST_PYTORCH


@pytest.mark.parametrize("length", [7, 20, CONTEXT])
@pytest.mark.parametrize("batch", [1, 3, 5])
@torch.inference_mode()
def test_every_batch_and_length_of_texts_on_either_side(long, batch, length):
    model, graph = long
    given = tiny_inputs(texts=batch + 1, length=length, seed=length)
    # Without the first row, which fills the length.
    right = {name: given[name][1:] for name in ("input_ids", "attention_mask")}
    padding = (right["attention_mask"] == 0).sum(-1).tolist()
    left = {
        name: torch.stack([row.roll(by) for row, by in zip(rows, padding, strict=True)])
        for name, rows in right.items()
    }
    for inputs in (right, left):
        expected = model.get_text_features(**inputs).pooler_output
        assert relative_error(graph(**inputs), expected) <= ONNX_AGAINST_PYTORCH
    assert relative_error(graph(**left), graph(**right)) <= PADDING


def test_a_row_without_end_of_text_gives_its_first_position(long):
    _, graph = long
    without = torch.tensor([[97, 5, 6, 7]])
    assert graph(input_ids=without, attention_mask=torch.ones_like(without)).isfinite().all()


def test_names_and_dynamic_dimensions(exported):
    dimensions = {}
    for name in NAMES:
        graph = onnx.load(exported / f"{name}.onnx").graph
        for value in (*graph.input, *graph.output):
            shape = value.type.tensor_type.shape
            dimensions[value.name] = [dim.dim_param or dim.dim_value for dim in shape.dim]
    assert dimensions == {
        "pixel_values": ["batch", 3, 32, 32],
        "image_embeds": ["batch", 24],
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "sequence"],
        "text_embeds": ["batch", 24],
    }


def test_pooling_is_in_int32(exported):
    """Runtimes have had no ArgMax of int64."""
    model = onnx.shape_inference.infer_shapes(onnx.load(exported / "text_model.onnx"))
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    found = [types[node.input[0]] for node in model.graph.node if node.op_type == "ArgMax"]
    assert found == [onnx.TensorProto.INT32]


@pytest.mark.parametrize("name", NAMES)
def test_lambda_is_a_constant_and_no_path_is_left(exported, name):
    graph = onnx.load(exported / f"{name}.onnx").graph
    assert not [node for node in graph.node if node.op_type == "Exp"]
    assert not [weight.name for weight in graph.initializer if "lambda" in weight.name]
    for file in exported.glob(f"{name}*.onnx"):
        content = file.read_bytes()
        assert b"site-packages" not in content
        assert str(Path(export_onnx.__file__).parent).encode() not in content


def test_the_report_and_the_files(exported):
    report = json.loads((exported / "export_report.json").read_text())
    graphs = {f"{name}{suffix}.onnx" for name in NAMES for suffix in ("", "_quantized")}
    assert {path.name for path in exported.iterdir()} == {*graphs, *CODE_FILES, "config.json", "export_report.json"}
    assert report["source"] == "model"
    assert len(report["vision_model"]["errors"]) == 2
    assert len(report["text_model"]["errors"]) == 8
    for name in NAMES:
        measured = report[name]
        assert max(measured["errors"].values()) <= report["max_error"] == 1e-4
        assert report["min_cosine"] == 0.99 <= measured["cosine"]["min"] <= measured["cosine"]["mean"] <= 1
        assert measured["cosine"]["inputs"] >= 16
        assert measured["bytes"] == {file.name: file.stat().st_size for file in exported.glob(f"{name}*.onnx")}
        for batch in ("batch 1", "batch 8"):
            assert set(measured["seconds"][batch]) == {"pytorch_eager", "float32", "int8"}
    assert report["machine"]["threads"] == torch.get_num_threads()


def test_int8_weights_are_in_the_graph(exported):
    """The products with weights, but for the first block's query and key; the rest stays float32."""
    model = parity_model("diffclip", "tiny")
    for name, tower in (("vision_model", model.vision_model), ("text_model", model.text_model)):
        graph = onnx.load(exported / f"{name}_quantized.onnx").graph
        weights = {weight.name: weight for weight in graph.initializer}
        products = [node for node in graph.node if node.op_type == "MatMulInteger"]
        assert len(products) == 6 * len(tower.encoder.layers) + 1 - 2
        assert all(weights[node.input[1]].data_type == onnx.TensorProto.INT8 for node in products)
        float_products = [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]
        attention = tower.encoder.layers[0].self_attn
        for node, kept in zip(float_products, (attention.q_proj, attention.k_proj), strict=True):
            stored = onnx.numpy_helper.to_array(weights[node.input[1]])
            assert np.allclose(stored, kept.weight.detach().numpy().T)


def test_the_folder_has_its_processor(tmp_path):
    save_tiny(tmp_path / "model")
    (tmp_path / "out").mkdir()
    config = DiffCLIPModel.from_pretrained(tmp_path / "model").config
    for path in export_onnx.find_processor(str(tmp_path / "model"), config):
        shutil.copyfile(path, tmp_path / "out" / path.name)
    config.save_pretrained(tmp_path / "out")
    processor, expected = (AutoProcessor.from_pretrained(tmp_path / name) for name in ("out", "model"))
    given = {"text": ["a b", "c"], "images": picture(), "padding": True, "return_tensors": "pt"}
    for name, tensor in expected(**given).items():
        assert torch.equal(processor(**given)[name], tensor)


def test_a_model_of_the_hub(warm_python, tmp_path):
    """What is read of a repository on loopback, in a process of its own, which isn't offline."""
    save_tiny(tmp_path / "model")
    code = """
from diffclip_hf import export_onnx
print(*export_onnx.find_processor("org/tiny", export_onnx.load_eager("org/tiny").config), sep="\\n")
"""
    with HubServer(tmp_path / "server") as hub:
        hub.add("org/tiny", tmp_path / "model")
        environment = hub.environment(tmp_path / "home")
        printed = warm_python.run("-c", code, folder=tmp_path, environment=environment)
    copied = {Path(path).name: Path(path).read_bytes() for path in printed.splitlines()}
    assert copied.keys() == {"processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert all((tmp_path / "model" / name).read_bytes() == content for name, content in copied.items())


def test_a_model_in_half_precision_is_loaded_in_float32(tmp_path):
    tiny_model().half().save_pretrained(tmp_path)
    model = export_onnx.load_eager(str(tmp_path))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training


@pytest.fixture
def export_again(exported, monkeypatch) -> str:
    """The model's folder, whose graphs need no second export."""
    monkeypatch.setattr(
        export_onnx, "export_tower", lambda tower, path, opset: shutil.copyfile(exported / path.name, path)
    )
    return str(exported.parent / "model")


def failing(tmp_path: Path, caplog, *args: str, words: list[str]) -> None:
    """Run the command, which must fail with these words and leave nothing."""
    before = sorted(tmp_path.iterdir())
    assert export_onnx.main([*args, "--runs", "0"]) == 1
    assert all(word in caplog.text for word in words), caplog.text
    assert sorted(tmp_path.iterdir()) == before


def test_a_wrong_graph_is_not_written(export_again, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(export_onnx, "MAX_ERROR", 1e-12)
    words = ["vision_model, batch 1: the error is ", "at most 1e-12"]
    failing(tmp_path, caplog, export_again, str(tmp_path / "out"), words=words)


def test_a_dissimilar_int8_graph_is_not_written(export_again, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(export_onnx, "MIN_COSINE", 1.5)
    words = ["vision_model, int8: the least cosine similarity to float32 is ", "at least 1.5", "--no-int8"]
    failing(tmp_path, caplog, export_again, str(tmp_path / "out"), words=words)


def test_float32_alone(export_again, tmp_path):
    assert export_onnx.main([export_again, str(tmp_path / "out"), "--no-int8", "--runs", "0"]) == 0
    assert {path.name for path in (tmp_path / "out").glob("*.onnx")} == {f"{name}.onnx" for name in NAMES}
    report = json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert all(set(report[name]) == {"errors", "bytes"} for name in NAMES)
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "out").iterdir()} == {"0o644"}


def test_nan_is_an_error(tmp_path):
    tower, _ = export_onnx.towers_of(tiny_model())
    with pytest.raises(export_onnx.ExportError, match="vision_model, batch 1: the error is nan"):
        export_onnx.check_tower(tower, lambda inputs: np.full((len(inputs["pixel_values"]), 24), np.nan))


def test_a_folder_in_use_stops_it(tmp_path, caplog):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    failing(tmp_path, caplog, str(tmp_path), str(tmp_path / "out"), words=["exists and is not an empty folder"])
    assert (tmp_path / "out" / "mine").exists()


def test_a_missing_model_stops_it(tmp_path, caplog):
    failing(tmp_path, caplog, str(tmp_path / "none"), str(tmp_path / "out"), words=["There is no", "none"])


def test_a_model_that_lacks_a_part_stops_it(tmp_path, caplog):
    """A classifier's folder has no text tower; and a tokenizer without its vocabulary loads too."""
    save_tiny(tmp_path / "whole")
    model = DiffCLIPForImageClassification.from_pretrained(tmp_path / "whole", num_labels=3)
    model.save_pretrained(tmp_path / "classifier")
    shutil.copytree(tmp_path / "whole", tmp_path / "tokenless")
    (tmp_path / "tokenless" / "tokenizer.json").unlink()
    shutil.copytree(tmp_path / "whole", tmp_path / "other")
    tokenizer = Path(__file__).parent.parent / "embedded" / "diffclip-emoji" / "tokenizer.json"
    shutil.copyfile(tokenizer, tmp_path / "other" / "tokenizer.json")
    for name, words in {"classifier": "text_model", "tokenless": "no vocabulary", "other": "another model"}.items():
        caplog.clear()
        failing(tmp_path, caplog, str(tmp_path / name), str(tmp_path / "out"), words=[words])


@pytest.mark.parametrize("options", [{"opset": 99}, {"runs": -1}])
def test_options_that_cannot_be_stop_it(tmp_path, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is .*; it must be"):
        export_onnx.export_onnx(tmp_path, tmp_path / "out", **options)


def test_a_missing_package_stops_it(tmp_path, caplog, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name))
    words = ["onnxruntime can't be imported; pip install 'diffclip-hf[onnx]'"]
    failing(tmp_path, caplog, str(tmp_path), str(tmp_path / "out"), words=words)


def test_a_tower_over_two_gigabytes_stops_it(tmp_path, monkeypatch):
    monkeypatch.setattr(export_onnx, "MAX_BYTES", 1000)
    tower, _ = export_onnx.towers_of(tiny_model())
    with pytest.raises(export_onnx.ExportError, match="one ONNX file holds at most 1000"):
        export_onnx.export_tower(tower, tmp_path / "vision_model.onnx")
    assert not list(tmp_path.iterdir())
