"""Models between two: their weights by hand, what doesn't fit, what is written, and the curve."""

import json
import logging
import shutil

import pytest
import torch
from pairs import TEXT
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import randomised, tiny_config
from training_samples import encoded, picture, tiny_processor

from diffclip_hf import DiffCLIPForImageClassification, DiffCLIPModel
from diffclip_hf.interpolate import draw_curve, interpolated, main, sweep


def saved(folder, seed: int, dtype: torch.dtype = torch.float32, processor=None, cls=DiffCLIPModel, **config):
    model = randomised(cls(tiny_config(text={**TEXT, **config.pop("text", {})}, **config)), seed).to(dtype)
    model.save_pretrained(folder)
    (tiny_processor() if processor is None else processor).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pair(tmp_path):
    return saved(tmp_path / "a", 0), saved(tmp_path / "b", 1)


# The weights --------------------------------------------------------------------------------------------------------


def test_weights_by_hand():
    first = {
        "w": torch.tensor([1.0, -2.0]),
        "ids": torch.tensor([0, 1]),
        "h": torch.tensor([1.0], dtype=torch.float16),
    }
    second = {"w": torch.tensor([3.0, 2.0]), "ids": torch.tensor([0, 1]), "h": torch.tensor([2.0])}
    mixed = interpolated(first, second, 0.25)
    assert mixed["w"].tolist() == [1.5, -1.0]
    assert mixed["ids"].tolist() == [0, 1]
    assert mixed["ids"].dtype == torch.int64
    # Of two dtypes the wider.
    assert mixed["h"].dtype == torch.float32
    assert mixed["h"].tolist() == [1.25]


def test_half_precision_is_rounded_once():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(1000, generator=generator).bfloat16() for _ in range(2))
    mixed = interpolated({"w": first}, {"w": second}, 0.25)["w"]
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed, (0.75 * first.double() + 0.25 * second.double()).bfloat16())


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({"v": torch.zeros(2)}, "v is a tensor of the second model alone"),
        ({"w": torch.zeros(3)}, r"w has the shapes \(2,\) and \(3,\)"),
        ({"w": torch.zeros(2, dtype=torch.int64)}, "w is of torch.float32, and isn't the same in both"),
    ],
)
def test_weights_that_dont_fit(second, words):
    with pytest.raises(ValueError, match=words):
        interpolated({"w": torch.ones(2)}, second, 0.5)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alpha_is_a_share(alpha):
    with pytest.raises(ValueError, match=r"it must be in 0\.\.1"):
        interpolated({}, {}, alpha)


# The command --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_between_two_is_written_with_its_processor(dtype, tmp_path):
    a, b = saved(tmp_path / "a", 0, dtype), saved(tmp_path / "b", 1, dtype)
    for alpha in ("0", "0.5", "1"):
        assert main([a, b, "--alpha", alpha, "--output-dir", str(tmp_path / alpha)]) == 0
    first, second, mixed = (load_file(f"{folder}/model.safetensors") for folder in (a, b, tmp_path / "0.5"))
    for name, value in mixed.items():
        # λ's vectors are loaded in float32 whatever the rest is in.
        assert value.dtype == (torch.float32 if "lambda_" in name else dtype)
        expected = (first[name].double() + second[name].double()) / 2
        torch.testing.assert_close(
            value.double(), expected, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-9
        )
    for folder, alpha in ((a, "0"), (b, "1")):
        kept = load_file(tmp_path / alpha / "model.safetensors")
        assert all(torch.equal(kept[name], value) for name, value in load_file(f"{folder}/model.safetensors").items())
    written = {path.name for path in (tmp_path / "0.5").iterdir()}
    assert written >= {"config.json", "tokenizer.json", "processor_config.json", "modeling_diffclip.py"}
    loaded = DiffCLIPModel.from_pretrained(tmp_path / "0.5", dtype="auto")
    assert loaded.dtype == dtype


def test_classifiers_can_be_mixed_too(tmp_path):
    a, b = (saved(tmp_path / str(seed), seed, cls=DiffCLIPForImageClassification, num_labels=3) for seed in (0, 1))
    assert main([a, b, "--alpha", "0.5", "--output-dir", str(tmp_path / "out")]) == 0
    assert "classifier.weight" in load_file(tmp_path / "out" / "model.safetensors")


def other_vocabulary(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))


def other_size(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["visual_projection.weight"] = tensors["visual_projection.weight"][:5].clone()
    save_file(tensors, path, {"format": "pt"})


def other_mean(folder):
    processor = tiny_processor()
    processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    processor.save_pretrained(folder)


def a_weight_less(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["logit_scale"]
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_vocabulary, "don't fit: the id of the token 'a' is 64 and 65"),
        (other_mean, r"don't fit: image_mean is \[0\.48.*\] and \[0\.5, 0\.5, 0\.5\]"),
        (other_size, "visual_projection.weight has the shape (5, 32); it must have (24, 32)"),
        (a_weight_less, "lacks weights of a DiffCLIPModel: logit_scale"),
    ],
)
def test_models_that_dont_fit(change, words, pair, tmp_path, caplog):
    change(tmp_path / "b")
    assert main([*pair, "--alpha", "0.5", "--output-dir", str(tmp_path / "out")]) == 1
    assert words.replace("\\", "").split(".*")[0] in caplog.text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"text": {"num_hidden_layers": 2}}, "text_config.num_hidden_layers is 3 and 2"),
        ({"projection_dim": 16}, "projection_dim is 24 and 16"),
        ({"cls": DiffCLIPForImageClassification}, "the class is DiffCLIPModel and DiffCLIPForImageClassification"),
    ],
)
def test_configurations_that_dont_fit(options, words, tmp_path, caplog):
    a, b = saved(tmp_path / "a", 0), saved(tmp_path / "b", 1, **options)
    assert main([a, b, "--alpha", "0.5", "--output-dir", str(tmp_path / "out")]) == 1
    assert words in caplog.text


def test_what_changes_no_weights_meaning_may_differ(tmp_path):
    a, b = saved(tmp_path / "a", 0), saved(tmp_path / "b", 1, text={"attention_dropout": 0.1})
    assert main([a, b, "--alpha", "0.5", "--output-dir", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["--alpha", "2"], "alpha is 2.0; it must be in 0..1"),
        (["--alpha", "0.5", "--task", "retrieval"], "--task can't be used with --alpha"),
        (["--sweep", "pets", "pets"], "it must name two data sets"),
    ],
)
def test_options_that_dont_fit(line, words, pair, tmp_path, caplog):
    if line[0] == "--sweep":
        make_data(tmp_path / "pets")
        line = ["--sweep", *[str(tmp_path / "pets")] * 2]
    assert main([*pair, *line, "--output-dir", str(tmp_path / "out")]) == 1
    assert words in caplog.text
    assert not (tmp_path / "out").exists()


# The curve ----------------------------------------------------------------------------------------------------------


def make_data(folder):
    for label in ("cat", "dog"):
        (folder / "test" / label).mkdir(parents=True)
        for number in range(3):
            (folder / "test" / label / f"{number}.jpg").write_bytes(encoded(picture(number + len(label))))


def test_a_sweep_leaves_the_first_model_as_it_was():
    model, other = (randomised(DiffCLIPModel(tiny_config()), seed) for seed in (0, 1))
    before = model.logit_scale.item()
    points = sweep(model, other, [0, 0.5, 1], lambda model: {"scale": model.logit_scale.item()})
    middle = (before + other.logit_scale.item()) / 2
    assert [point["scale"] for point in points] == pytest.approx([before, middle, other.logit_scale.item()])
    assert model.logit_scale.item() == before


def test_a_sweep_is_written_with_its_picture(pair, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for name in ("pets", "beasts"):
        make_data(tmp_path / name)
    shutil.rmtree(tmp_path / "beasts" / "test" / "dog")
    (tmp_path / "beasts" / "test" / "elk").mkdir()
    (tmp_path / "beasts" / "test" / "elk" / "0.jpg").write_bytes(encoded(picture(9)))
    line = ["--sweep", str(tmp_path / "pets"), str(tmp_path / "beasts"), "--alphas", "1", "0", "0.5"]
    assert main([*pair, *line, "--output-dir", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"curve.json", "curve.png"}
    curve = json.loads((tmp_path / "out" / "curve.json").read_text())
    assert [point["alpha"] for point in curve["points"]] == [0, 0.5, 1]
    assert curve["datasets"] == ["pets", "beasts"]
    for point in curve["points"]:
        for name, result in zip(curve["datasets"], point["results"], strict=True):
            assert point[name] == result["metrics"]["accuracy"]
    assert [result["n"] for result in curve["points"][0]["results"]] == [6, 4]
    with Image.open(tmp_path / "out" / "curve.png") as image:
        assert image.width > 800


def test_several_curves_in_one_picture(tmp_path):
    points = [{"alpha": alpha, "new": alpha, "old": 1 - alpha} for alpha in (0, 0.5, 1)]
    draw_curve({"plain": points, "locked": points}, ["new", "old"], tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000
