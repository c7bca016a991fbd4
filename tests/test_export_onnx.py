"""The exported graphs against the original's numbers and PyTorch's, and what stops an export."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hub_client import picture, save_tiny
from hub_server import HubServer
from parity_models import golden, parity_model
from tiny import CONTEXT, tiny_inputs, tiny_model
from tolerances import ONNX_AGAINST_PYTORCH, PADDING, PARITY_WITH_ORIGINAL, relative_error
from training_samples import tiny_processor
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

from diffclip_hf import (
    DiffCLIPForImageClassification,
    DiffCLIPImageProcessorPil,
    DiffCLIPModel,
    DiffCLIPTokenizer,
    export_onnx,
    onnx_graphs,
)
from diffclip_hf.common.remote_code import CODE_FILES


NAMES = ("vision_model", "text_model")
GRAPHS = {f"{name}{suffix}.onnx" for name in (*NAMES, "model") for suffix in ("", "_quantized")}


def graph_of(folder: Path, name: str):
    """Return a function: keyword tensors → the graph's first output as a tensor."""
    run = onnx_graphs.open_graph(folder / f"{name}.onnx")
    return lambda **inputs: torch.from_numpy(run(inputs))


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """The folder that the command writes, of a model with golden numbers and no processor."""
    folder = tmp_path_factory.mktemp("exported")
    parity_model("diffclip", "tiny").save_pretrained(folder / "model")
    assert export_onnx.main([str(folder / "model"), str(folder / "out"), "--runs", "1"]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def graphs(exported) -> Path:
    """The folder where transformers.js looks for graphs."""
    return exported / "onnx"


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """A model with 77 text tokens, and its text tower's graph."""
    folder = tmp_path_factory.mktemp("long")
    model = tiny_model()
    onnx_graphs.export_tower(onnx_graphs.towers_of(model)[1], folder / "text_model.onnx")
    return model, graph_of(folder, "text_model")


def assert_golden(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    """Compare both graphs' outputs with the original's."""
    found = graph_of(folder, "vision_model")(pixel_values=expected["pixel_values"])
    assert relative_error(found, expected["image_embed"]) <= PARITY_WITH_ORIGINAL
    input_ids = expected["input_ids"]
    found = graph_of(folder, "text_model")(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
    assert relative_error(found, expected["text_embed"]) <= PARITY_WITH_ORIGINAL


def test_differential_towers_give_the_originals_numbers(graphs):
    assert_golden(graphs, golden("diffclip", "tiny")[0])


def test_standard_towers_give_the_originals_numbers(tmp_path):
    for tower in onnx_graphs.towers_of(parity_model("clip", "tiny")):
        onnx_graphs.export_tower(tower, tmp_path / f"{tower.name}.onnx")
    assert_golden(tmp_path, golden("clip", "tiny")[0])


@pytest.mark.parametrize("batch", [1, 3, 5])
@torch.inference_mode()
def test_every_batch_of_images(graphs, batch):
    pixel_values = tiny_inputs(images=batch, seed=batch)["pixel_values"]
    expected = parity_model("diffclip", "tiny").get_image_features(pixel_values).pooler_output
    found = graph_of(graphs, "vision_model")(pixel_values=pixel_values)
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


def test_a_text_that_was_cut_without_its_end_of_text_gets_it_back(long):
    model, graph = long
    end = model.config.text_config.eos_token_id
    ids = torch.tensor([[97, 5, 6, 7], [97, 5, end, end]])
    kept = torch.tensor([[97, 5, 6, end], [97, 5, end, end]])
    mask = torch.ones_like(ids)
    assert torch.equal(graph(input_ids=ids, attention_mask=mask), graph(input_ids=kept, attention_mask=mask))
    with torch.inference_mode():
        expected = model.get_text_features(kept, mask).pooler_output
    assert relative_error(graph(input_ids=ids, attention_mask=mask), expected) <= ONNX_AGAINST_PYTORCH


@torch.inference_mode()
def test_the_graph_of_both_towers_gives_the_models_outputs(graphs):
    given = golden("diffclip", "tiny")[0]
    # Other numbers of images than of texts.
    inputs = {"pixel_values": given["pixel_values"][:1], "input_ids": given["input_ids"]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    expected = parity_model("diffclip", "tiny")(**inputs)
    session = onnxruntime.InferenceSession(graphs / "model.onnx")
    names = [output.name for output in session.get_outputs()]
    assert names == ["logits_per_image", "logits_per_text", "image_embeds", "text_embeds"]
    found = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
    for name, array in zip(names, found, strict=True):
        assert relative_error(torch.from_numpy(array), expected[name]) <= ONNX_AGAINST_PYTORCH


def test_names_and_dynamic_dimensions(graphs):
    dimensions = {}
    for name in NAMES:
        graph = onnx.load(graphs / f"{name}.onnx").graph
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


def test_pooling_is_in_int32(graphs):
    """Runtimes have had no ArgMax of int64."""
    model = onnx.shape_inference.infer_shapes(onnx.load(graphs / "text_model.onnx"))
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    found = [types[node.input[0]] for node in model.graph.node if node.op_type == "ArgMax"]
    assert found == [onnx.TensorProto.INT32]


@pytest.mark.parametrize("name", NAMES)
def test_lambda_is_a_constant_and_no_path_is_left(graphs, name):
    graph = onnx.load(graphs / f"{name}.onnx").graph
    assert not [node for node in graph.node if node.op_type == "Exp"]
    assert not [weight.name for weight in graph.initializer if "lambda" in weight.name]
    for file in graphs.glob(f"{name}*.onnx"):
        content = file.read_bytes()
        assert b"site-packages" not in content
        assert str(Path(export_onnx.__file__).parent).encode() not in content


def test_the_report_and_the_files(exported, graphs):
    report = json.loads((exported / "export_report.json").read_text())
    assert {path.name for path in exported.iterdir()} == {*CODE_FILES, "config.json", "export_report.json", "onnx"}
    assert {path.name for path in graphs.iterdir()} == GRAPHS
    assert report["source"] == "model"
    assert len(report["vision_model"]["errors"]) == 2
    assert len(report["text_model"]["errors"]) == 8
    for name in NAMES:
        measured = report[name]
        assert max(measured["errors"].values()) <= report["max_error"] == 1e-4
        assert report["min_cosine"] == 0.99 <= measured["cosine"]["min"] <= measured["cosine"]["mean"] <= 1
        assert measured["cosine"]["inputs"] >= 16
        assert measured["bytes"] == {file.name: file.stat().st_size for file in graphs.glob(f"{name}*.onnx")}
        for batch in ("batch 1", "batch 8"):
            assert set(measured["seconds"][batch]) == {"pytorch_eager", "float32", "int8"}
    assert report["model"]["bytes"] == {file.name: file.stat().st_size for file in graphs.glob("model*.onnx")}
    assert report["model"]["errors"].keys() == {"float32", "int8"}
    assert max(report["model"]["errors"].values()) <= report["max_error"]
    assert report["machine"]["threads"] == torch.get_num_threads()


def test_int8_weights_are_in_the_graph(graphs):
    """The products with weights, but for the first block's query and key; the rest stays float32."""
    model = parity_model("diffclip", "tiny")
    for name, tower in (("vision_model", model.vision_model), ("text_model", model.text_model)):
        graph = onnx.load(graphs / f"{name}_quantized.onnx").graph
        weights = {weight.name: weight for weight in graph.initializer}
        products = [node for node in graph.node if node.op_type == "MatMulInteger"]
        assert len(products) == 6 * len(tower.encoder.layers) + 1 - 2
        assert all(weights[node.input[1]].data_type == onnx.TensorProto.INT8 for node in products)
        float_products = [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]
        attention = tower.encoder.layers[0].self_attn
        for node, kept in zip(float_products, (attention.q_proj, attention.k_proj), strict=True):
            stored = onnx.numpy_helper.to_array(weights[node.input[1]])
            assert np.allclose(stored, kept.weight.detach().numpy().T)


def write_processing(source: Path, out: Path) -> None:
    """Write what an export writes beside the graphs."""
    config = DiffCLIPModel.from_pretrained(source).config
    config.save_pretrained(out)
    export_onnx.write_processing(str(source), config, out)


def test_the_processor_is_the_same_in_python_and_known_to_transformers_js(tmp_path):
    save_tiny(tmp_path / "model")
    write_processing(tmp_path / "model", tmp_path / "out")
    processor, expected = (AutoProcessor.from_pretrained(tmp_path / name) for name in ("out", "model"))
    assert type(processor.tokenizer) is DiffCLIPTokenizer
    given = {"text": ["a b", "c"], "images": picture(), "padding": True, "return_tensors": "pt"}
    for name, tensor in expected(**given).items():
        assert torch.equal(processor(**given)[name], tensor)
    image_processor = expected.image_processor
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text()) == {
        "image_processor_type": "CLIPImageProcessor",
        **dict.fromkeys(("do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize"), True),
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32},
        "resample": 2,
        "rescale_factor": 1 / 255,
        "image_mean": list(image_processor.image_mean),
        "image_std": list(image_processor.image_std),
    }
    # transformers.js warns of a class that it doesn't know.
    saved, expected = (
        json.loads((tmp_path / name / "tokenizer_config.json").read_text()) for name in ("out", "model")
    )
    assert {**saved, "tokenizer_class": "DiffCLIPTokenizer"} == {**expected, "auto_map": saved["auto_map"]}
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_the_page_has_its_values_and_the_library_that_is_tested(tmp_path):
    export_onnx.write_page(tmp_path, 12.5, int8=False)
    assert {path.name for path in tmp_path.iterdir()} == {"index.html", "page.mjs", "fit.mjs"}
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    wanted = json.loads((Path(__file__).parent / "package.json").read_text())["dependencies"]
    (version,) = wanted.values()
    assert f"/npm/@huggingface/transformers@{version}/dist/transformers.min.js" in page
    assert 'data-runtime="" data-dtype="fp32" data-scale="12.5"' in page
    assert "$" not in page


def test_half_a_processor_is_written_too(tmp_path, caplog):
    save_tiny(tmp_path / "model")
    for name, part in (("words", "tokenizer"), ("pixels", "image_processor")):
        DiffCLIPModel.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / name)
        getattr(AutoProcessor.from_pretrained(tmp_path / "model"), part).save_pretrained(tmp_path / name)
        write_processing(tmp_path / name, tmp_path / f"{name}-out")
    assert f"{tmp_path / 'words'} has no image processor" in caplog.text
    assert f"{tmp_path / 'pixels'} has no tokenizer" in caplog.text
    assert type(AutoTokenizer.from_pretrained(tmp_path / "words-out")) is DiffCLIPTokenizer
    assert not (tmp_path / "words-out" / "preprocessor_config.json").exists()
    image_processor = AutoImageProcessor.from_pretrained(tmp_path / "pixels-out")
    assert type(image_processor).__name__.startswith("DiffCLIPImageProcessor")
    saved = json.loads((tmp_path / "pixels-out" / "preprocessor_config.json").read_text())
    assert (saved["image_processor_type"], saved["size"]) == ("CLIPImageProcessor", {"shortest_edge": 32})


def test_steps_that_are_off_stay_off(tmp_path):
    """transformers.js takes most steps where nothing is said of them."""
    save_tiny(tmp_path / "model")
    off = dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), False)
    processor = tiny_processor(DiffCLIPTokenizer)
    processor.image_processor = DiffCLIPImageProcessorPil(**off)
    processor.save_pretrained(tmp_path / "model")
    write_processing(tmp_path / "model", tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert off.items() <= saved.items()


def test_a_model_of_the_hub(warm_python, tmp_path):
    """What is read of a repository on loopback, in a process of its own, which isn't offline."""
    save_tiny(tmp_path / "model")
    code = """
from pathlib import Path
from diffclip_hf import export_onnx
config = export_onnx.load_eager("org/tiny").config
config.save_pretrained("out")
export_onnx.write_processing("org/tiny", config, Path("out"))
"""
    with HubServer(tmp_path / "server") as hub:
        hub.add("org/tiny", tmp_path / "model")
        environment = hub.environment(tmp_path / "home")
        warm_python.run("-c", code, folder=tmp_path, environment=environment)
    saved, expected = (
        json.loads((tmp_path / name / "processor_config.json").read_text())["image_processor"]
        for name in ("out", "model")
    )
    assert expected.items() <= saved.items()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "model" / "tokenizer.json").read_bytes()


def test_a_model_in_half_precision_is_loaded_in_float32(tmp_path):
    tiny_model().half().save_pretrained(tmp_path)
    model = export_onnx.load_eager(str(tmp_path))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training


@pytest.fixture
def export_again(exported, graphs, monkeypatch) -> str:
    """The model's folder, whose graphs need no second export."""
    monkeypatch.setattr(
        export_onnx, "export_tower", lambda tower, path, opset: shutil.copyfile(graphs / path.name, path)
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
    names = (*NAMES, "model")
    assert {path.name for path in (tmp_path / "out" / "onnx").iterdir()} == {f"{name}.onnx" for name in names}
    report = json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert all(set(report[name]) == {"errors", "bytes"} for name in names)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o644"}


def test_the_towers_alone(export_again, tmp_path):
    arguments = [export_again, str(tmp_path / "out"), "--no-int8", "--no-joint", "--runs", "0"]
    assert export_onnx.main(arguments) == 0
    assert {path.name for path in (tmp_path / "out" / "onnx").iterdir()} == {f"{name}.onnx" for name in NAMES}
    assert "model" not in json.loads((tmp_path / "out" / "export_report.json").read_text())


def test_nan_is_an_error(tmp_path):
    tower, _ = onnx_graphs.towers_of(tiny_model())
    with pytest.raises(onnx_graphs.ExportError, match="vision_model, batch 1: the error is nan"):
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
    monkeypatch.setattr(onnx_graphs, "MAX_BYTES", 1000)
    tower, _ = onnx_graphs.towers_of(tiny_model())
    with pytest.raises(onnx_graphs.ExportError, match="one ONNX file holds at most 1000"):
        onnx_graphs.export_tower(tower, tmp_path / "vision_model.onnx")
    assert not list(tmp_path.iterdir())


def test_towers_that_are_too_large_together_stop_it(graphs, tmp_path, monkeypatch):
    size = sum((graphs / f"{name}.onnx").stat().st_size for name in NAMES)
    monkeypatch.setattr(onnx_graphs, "MAX_BYTES", size - 1)
    with pytest.raises(onnx_graphs.ExportError, match=f"model.onnx would have {size} bytes; .* --no-joint"):
        onnx_graphs.join_towers(*(graphs / f"{name}.onnx" for name in NAMES), 1.0, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
