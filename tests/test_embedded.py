"""The model in the repository, and the demo made of it."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageClassification, AutoProcessor, pipeline

from diffclip_hf import (
    DiffCLIPForImageClassification,
    DiffCLIPModel,
    DiffCLIPTextModel,
    DiffCLIPTextModelWithProjection,
    DiffCLIPVisionModel,
    DiffCLIPVisionModelWithProjection,
)
from diffclip_hf.common.remote_code import CODE_FILES


ROOT = Path(__file__).parent.parent
EMBEDDED = ROOT / "embedded"
MODEL = EMBEDDED / "diffclip-emoji"


@pytest.fixture
def demo():
    pytest.importorskip("matplotlib", reason="the demo draws with matplotlib")
    sys.path.insert(0, str(EMBEDDED))
    import demo

    yield demo
    sys.path.remove(str(EMBEDDED))


def test_the_folder_is_small_and_says_what_it_is():
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 5 * 1024**2
    config = json.loads((MODEL / "config.json").read_text())
    assert config["vision_config"]["attention_type"] == "differential"
    assert "random" not in (EMBEDDED / "README.md").read_text().split("\n")[0]


CLASSES = {
    AutoModel: DiffCLIPModel,
    AutoModelForImageClassification: DiffCLIPForImageClassification,
    DiffCLIPTextModel: DiffCLIPTextModel,
    DiffCLIPVisionModel: DiffCLIPVisionModel,
    DiffCLIPTextModelWithProjection: DiffCLIPTextModelWithProjection,
    DiffCLIPVisionModelWithProjection: DiffCLIPVisionModelWithProjection,
}


@pytest.mark.parametrize("auto", CLASSES, ids=lambda auto: auto.__name__)
def test_it_loads_as_float32_unasked(auto):
    """7 times as fast as half precision on a CPU; the values are those of the float16 file."""
    model = auto.from_pretrained(MODEL)
    assert type(model) is CLASSES[auto]
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    stored = load_file(MODEL / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    prefix = getattr(model, "base_model_prefix", "") if auto in (DiffCLIPTextModel, DiffCLIPVisionModel) else ""
    for name, tensor in model.state_dict().items():
        if not name.startswith("classifier"):
            assert torch.equal(tensor, stored[f"{prefix}.{name}" if prefix else name].float()), name
    assert auto.from_pretrained(MODEL, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_its_code_is_the_packages():
    """So that Transformers says what to do without `import diffclip_hf`; `make embedded-code` refreshes it."""
    for name in CODE_FILES:
        assert (MODEL / name).read_bytes() == (ROOT / "src" / "diffclip_hf" / "model" / name).read_bytes(), name
    assert {path.name for path in MODEL.glob("*.py")} == set(CODE_FILES)
    config = json.loads((MODEL / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_diffclip.DiffCLIPModel"


@pytest.mark.parametrize(
    "load",
    [
        "from transformers import AutoModel; AutoModel.from_pretrained('diffclip-emoji')",
        "from transformers import AutoProcessor; AutoProcessor.from_pretrained('diffclip-emoji')",
        "from transformers import pipeline; pipeline('zero-shot-image-classification', 'diffclip-emoji')",
    ],
)
def test_a_forgotten_import_is_told_of(load, warm_python, tmp_path):
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path), "PYTHONPATH": ""}
    done = warm_python(["-c", load], EMBEDDED, environment)
    assert done.returncode == 1
    assert "trust_remote_code=True" in done.stderr.splitlines()[-1]


def test_it_names_the_pictures_of_the_vendor_that_it_never_saw(demo):
    """Right far more often than the 1 in 20 of chance."""
    classifier = pipeline("zero-shot-image-classification", model=str(MODEL))
    labels = [*demo.PICTURES.values(), *demo.OTHER_LABELS]
    assert len(labels) == 20
    right = 0
    for name, label in demo.PICTURES.items():
        best = classifier(str(EMBEDDED / "pictures" / name), candidate_labels=labels, hypothesis_template="{}")[0]
        right += best["label"] == label
    assert right >= 5


def test_the_saved_weights_are_finite_and_lambda_is_learned():
    model = AutoModel.from_pretrained(MODEL)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    lambdas = [module.get_lambda().item() for module in model.modules() if hasattr(module, "get_lambda")]
    towers = (model.config.vision_config, model.config.text_config)
    layers = sum(tower.num_hidden_layers for tower in towers if tower.attention_type == "differential")
    assert len({round(value, 4) for value in lambdas}) == len(lambdas) == layers >= 5


def test_its_tokenizer_ends_every_text():
    processor = AutoProcessor.from_pretrained(MODEL)
    model = AutoModel.from_pretrained(MODEL)
    ids = processor(text=["a cat", "a very " * 40 + "old cat"], truncation=True, return_tensors="pt")["input_ids"]
    assert ids.shape == (2, model.config.text_config.max_position_embeddings)
    assert model.encode_text(ids).isfinite().all()


def test_demo_prints_a_table_and_writes_a_picture(demo, tmp_path, capsys):
    assert demo.main(["--output", str(tmp_path / "demo.png")]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in demo.PICTURES)
    assert "of 8 right" in printed
    from PIL import Image

    with Image.open(tmp_path / "demo.png") as image:
        assert image.width > 800
    assert [path.name for path in tmp_path.iterdir()] == ["demo.png"]


def test_demo_takes_a_picture_of_ones_own(demo, tmp_path, capsys):
    picture = EMBEDDED / "pictures" / "pizza.png"
    args = ["--image", str(picture), "--labels", "a pizza, a dog", "--output", str(tmp_path / "x.png")]
    assert demo.main(args) == 0
    printed = capsys.readouterr().out
    assert "a pizza (" in printed
    assert "right" not in printed


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--image", "none.png", "--labels", "a,b"], ["IMAGE is 'none.png'", "picture's file"]),
        (["--labels", "one"], ["LABELS is 'one'", "at least two"]),
    ],
)
def test_demo_says_what_is_wrong(demo, tmp_path, caplog, args, words):
    assert demo.main([*args, "--output", str(tmp_path / "x.png")]) == 1
    assert all(word in caplog.text for word in words)
    assert not list(tmp_path.iterdir())


def test_the_report_is_of_the_held_out_vendor():
    report = json.loads((EMBEDDED / "report.json").read_text())
    assert report["vendor"] == "google"
    figures = report["figures"]
    assert figures["zero-shot top-1 among 20"]["chance"] == 0.05
    assert figures["zero-shot top-1 among 100"]["chance"] == 0.01
    assert all(row["measured"] > 5 * row["chance"] for row in figures.values())
    # A whole number of the forty phrases.
    phrases = [row for name, row in figures.items() if name.startswith("everyday phrases")]
    assert [40 * row["measured"] % 1 for row in phrases] == [0, 0]
