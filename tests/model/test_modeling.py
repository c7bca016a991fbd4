"""The models behave as Transformers' CLIP does, and as Transformers asks of every model."""

import copy
import json
import math

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import BOS, CONTEXT, EOS, both, randomised, tiny_config, tiny_inputs, tiny_model
from tolerances import (
    CLOSED_FORM,
    HALF_PRECISION,
    PADDING,
    assert_gradients_close,
    relative_error,
)
from transformers import AutoModel, CLIPConfig, CLIPModel

from diffclip_hf import (
    DiffCLIPConfig,
    DiffCLIPForImageClassification,
    DiffCLIPModel,
    DiffCLIPTextModel,
    DiffCLIPTextModelWithProjection,
    DiffCLIPVisionModel,
    DiffCLIPVisionModelWithProjection,
    differential_attention_map,
)
from diffclip_hf.model.layers_diffclip import DiffCLIPDifferentialAttention


ATTENTION_TYPES = ["differential", "standard"]
# Class → the inputs that it takes and its main output.
CLASSES = {
    DiffCLIPModel: (("input_ids", "attention_mask", "pixel_values"), "logits_per_image"),
    DiffCLIPTextModel: (("input_ids", "attention_mask"), "pooler_output"),
    DiffCLIPVisionModel: (("pixel_values",), "pooler_output"),
    DiffCLIPTextModelWithProjection: (("input_ids", "attention_mask"), "text_embeds"),
    DiffCLIPVisionModelWithProjection: (("pixel_values",), "image_embeds"),
    DiffCLIPForImageClassification: (("pixel_values",), "logits"),
}
all_classes = pytest.mark.parametrize("model_class", CLASSES, ids=lambda c: c.__name__)


def build(model_class, **kwargs):
    """A model of the class with random weights, its inputs, and a function that reads its main output."""
    config = tiny_config(**kwargs)
    if "Text" in model_class.__name__:
        config = config.text_config
    elif "Vision" in model_class.__name__:
        config = config.vision_config
    config = copy.deepcopy(config)
    config._attn_implementation = kwargs.get("attn_implementation", "eager")
    names, output = CLASSES[model_class]
    inputs = {name: value for name, value in tiny_inputs().items() if name in names}
    return randomised(model_class(config)), inputs, output


def checkpoint_activations(model, use_reentrant):
    # The newer name came after the oldest release supported.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


# --- API ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_outputs_have_clips_fields_and_shapes(attention_type):
    model = tiny_model(**both(attention_type))
    out = model(**tiny_inputs(texts=2, images=3), output_hidden_states=True, output_attentions=True)
    assert out.logits_per_image.shape == (3, 2)
    torch.testing.assert_close(out.logits_per_text, out.logits_per_image.t())
    assert out.loss is None
    assert (out.image_embeds.shape, out.text_embeds.shape) == ((3, 24), (2, 24))
    for tower, tokens, batch in ((out.vision_model_output, 17, 3), (out.text_model_output, 12, 2)):
        assert tower.last_hidden_state.shape == (batch, tokens, 32)
        assert tower.pooler_output.shape == (batch, 24)
        assert [state.shape for state in tower.hidden_states] == [(batch, tokens, 32)] * 4
        assert [maps.shape for maps in tower.attentions] == [(batch, 4, tokens, tokens)] * 3
        for maps in tower.attentions:
            torch.testing.assert_close(maps.sum(-1), torch.ones(batch, 4, tokens))


def test_logits_and_loss_are_the_closed_form():
    model = tiny_model().requires_grad_(False)
    inputs = tiny_inputs()
    out = model(**inputs, return_loss=True)
    image = model.get_image_features(inputs["pixel_values"]).pooler_output.double()
    text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output.double()
    cosine = torch.tensor(
        [[(i @ t / math.sqrt((i @ i) * (t @ t))).item() for t in text] for i in image], dtype=torch.float64
    )
    logits = math.exp(model.logit_scale.item()) * cosine
    assert relative_error(out.logits_per_image.double(), logits) <= CLOSED_FORM
    rows = sum(math.log(sum(math.exp(x) for x in row)) - row[i].item() for i, row in enumerate(logits))
    columns = sum(math.log(sum(math.exp(x) for x in row)) - row[i].item() for i, row in enumerate(logits.t()))
    assert out.loss.item() == pytest.approx((rows + columns) / 6, rel=CLOSED_FORM)


def test_feature_methods_agree():
    model = tiny_model()
    inputs = tiny_inputs()
    out = model(**inputs)
    for features, encoded, embeds in (
        (
            model.get_text_features(inputs["input_ids"], inputs["attention_mask"]),
            model.encode_text(inputs["input_ids"], inputs["attention_mask"]),
            out.text_embeds,
        ),
        (
            model.get_image_features(inputs["pixel_values"]),
            model.encode_image(inputs["pixel_values"]),
            out.image_embeds,
        ),
    ):
        torch.testing.assert_close(encoded, embeds)
        torch.testing.assert_close(encoded.norm(dim=-1), torch.ones(3))
        norms = features.pooler_output.norm(dim=-1, keepdim=True)
        assert (norms - 1).abs().max() > 0.01
        torch.testing.assert_close(features.pooler_output / norms, encoded)


def test_one_modality_alone():
    model = tiny_model()
    inputs = tiny_inputs()
    whole = model(**inputs)
    image_only = model(pixel_values=inputs["pixel_values"])
    torch.testing.assert_close(image_only.image_embeds, whole.image_embeds)
    assert image_only.logits_per_image is None
    text_only = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    torch.testing.assert_close(text_only.text_embeds, whole.text_embeds)
    with pytest.raises(ValueError, match="input_ids and pixel_values are both None"):
        model()
    with pytest.raises(ValueError, match="return_loss is True, but pixel_values is None"):
        model(input_ids=inputs["input_ids"], return_loss=True)


@all_classes
def test_return_dict_false_gives_the_same_tensors(model_class):
    model, inputs, _ = build(model_class)

    def flatten(value):
        return [value] if isinstance(value, torch.Tensor) else [leaf for item in value for leaf in flatten(item)]

    with torch.no_grad():
        as_dict = model(**inputs, output_hidden_states=True).to_tuple()
        as_tuple = model(**inputs, output_hidden_states=True, return_dict=False)
    assert isinstance(as_tuple, tuple)
    for left, right in zip(flatten(as_dict), flatten(as_tuple), strict=True):
        assert torch.equal(left, right)


def test_call_signatures_are_clips():
    import inspect

    for ours, clips in ((DiffCLIPModel, CLIPModel),):
        for method in ("forward", "get_text_features", "get_image_features"):
            expected = list(inspect.signature(getattr(clips, method)).parameters)
            assert list(inspect.signature(getattr(ours, method)).parameters) == expected


def test_hidden_states_are_embeddings_then_blocks_before_the_final_norm():
    model = tiny_model()
    inputs = tiny_inputs()
    vision = model.vision_model
    out = vision(inputs["pixel_values"], output_hidden_states=True)
    assert torch.equal(out.hidden_states[0], vision.embeddings(inputs["pixel_values"]))
    state = out.hidden_states[0]
    for layer, expected in zip(vision.encoder.layers, out.hidden_states[1:], strict=True):
        state = layer(state)
        assert torch.equal(state, expected)
    assert torch.equal(vision.post_layernorm(state), out.last_hidden_state)
    assert torch.equal(out.pooler_output, out.last_hidden_state[:, 0])


def test_maps_and_lambda_make_the_differential_map():
    model = tiny_model()
    out = model.vision_model(tiny_inputs()["pixel_values"], output_attentions=True)
    for layer, maps in zip(model.vision_model.encoder.layers, out.attentions, strict=True):
        lam = layer.self_attn.get_lambda()
        difference = differential_attention_map(maps, lam)
        assert difference.shape == (3, 2, 17, 17)
        torch.testing.assert_close(difference.sum(-1), (1 - lam).expand(3, 2, 17))
        torch.testing.assert_close(difference[:, 1], maps[:, 2] - lam * maps[:, 3])


IMPLEMENTATIONS = ["sdpa", "flex_attention", "flash_attention_2", "differential_triton"]


def leaves(value):
    """Every tensor of an output, in order."""
    if value is None or isinstance(value, torch.Tensor):
        return [] if value is None else [value]
    return [leaf for item in (value.values() if hasattr(value, "values") else value) for leaf in leaves(item)]


@all_classes
@pytest.mark.parametrize("how", ["call", "config"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_attentions_under_every_implementation_are_eagers(model_class, how, implementation):
    model, inputs, _ = build(model_class)
    expected = model(**inputs, output_attentions=True)
    # Set on the configuration, since a model can't be made with FlashAttention where it isn't installed.
    model.config._attn_implementation = implementation
    if how == "config":
        model.config.output_attentions = True
        found = model(**inputs)
    else:
        found = model(**inputs, output_attentions=True)
    for left, right in zip(leaves(found), leaves(expected), strict=True):
        assert torch.equal(left, right)
    assert len(leaves(found)) > 3
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_asking_for_attentions_warns_once_and_changes_nothing_else(attention_type, caplog):
    from transformers.utils import logging

    logging.warning_once.cache_clear()
    model = tiny_model(**both(attention_type), attn_implementation="sdpa")
    inputs = tiny_inputs()
    with torch.no_grad():
        before = model(**inputs)
        for _ in range(2):
            with_maps = model(**inputs, output_attentions=True)
        after = model(**inputs)
    assert [record.message for record in caplog.records if "slower" in record.message] == [caplog.messages[0]]
    assert "attn_implementation='eager'" in caplog.messages[0]
    assert torch.equal(before.logits_per_image, after.logits_per_image)
    assert after.vision_model_output.attentions is None
    torch.testing.assert_close(with_maps.logits_per_image, before.logits_per_image)


def test_attentions_in_training_with_dropout_and_checkpointing():
    """The maps are those before dropout, and gradients flow as under eager with the same random numbers."""
    found = {}
    for implementation in ("eager", "sdpa"):
        for checkpointing in (False, True):
            model = tiny_model(**both("differential", attention_dropout=0.3), attn_implementation=implementation)
            model.train()
            if checkpointing:
                checkpoint_activations(model, use_reentrant=False)
            torch.manual_seed(0)
            out = model(**tiny_inputs(), return_loss=True, output_attentions=True)
            out.loss.backward()
            found[implementation, checkpointing] = [
                *out.vision_model_output.attentions,
                *out.text_model_output.attentions,
                *(parameter.grad for parameter in model.parameters()),
            ]
    for values in found.values():
        for left, right in zip(values, found["eager", False], strict=True):
            torch.testing.assert_close(left, right)
    for maps in found["sdpa", True][:6]:
        torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]))


def test_threads_that_ask_for_attentions_and_that_do_not_share_a_model():
    from concurrent.futures import ThreadPoolExecutor

    model, pixel_values = tiny_model(attn_implementation="sdpa").vision_model, tiny_inputs()["pixel_values"]

    def call(asked):
        with torch.no_grad():
            return model(pixel_values, output_attentions=asked).attentions

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(call, [bool(i % 2) for i in range(64)]))
    assert all((maps is not None and len(maps) == 3) == bool(i % 2) for i, maps in enumerate(found))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_mask_of_four_dimensions_serves_maps_too(implementation):
    """A bool mask is where to attend, as SDPA takes it; here the causal one, which is what a text has anyway."""
    model = tiny_model(attn_implementation=implementation).text_model
    ids = torch.tensor([[BOS, 5, 6, 7, EOS]])
    mask = torch.ones(5, 5).tril().bool()[None, None]
    expected = model(ids, output_attentions=True)
    found = model(ids, mask, output_attentions=True)
    assert torch.equal(found.pooler_output, expected.pooler_output)
    assert torch.equal(found.attentions[0], expected.attentions[0])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_is_causal_is_what_it_says_in_both_towers(implementation, attention_type):
    model, inputs = tiny_model(**both(attention_type), attn_implementation=implementation), tiny_inputs()
    triangle = {"text_model": True, "vision_model": False}
    for name, default in triangle.items():
        tower = getattr(model, name)
        given = [inputs["pixel_values"]] if name == "vision_model" else [inputs["input_ids"], inputs["attention_mask"]]
        with torch.no_grad():
            plain = tower(*given).pooler_output
            assert torch.equal(tower(*given, is_causal=default).pooler_output, plain)
            other = tower(*given, is_causal=not default, output_attentions=True)
            torch.testing.assert_close(tower(*given, is_causal=not default).pooler_output, other.pooler_output)
            tower.config.is_causal = not default
            torch.testing.assert_close(tower(*given).pooler_output, other.pooler_output)
            assert torch.equal(tower(*given, is_causal=default).pooler_output, plain)
        above = torch.stack(other.attentions).triu(1)
        assert bool(above.any()) == default
        assert not torch.allclose(other.pooler_output, plain)


def test_config_level_defaults_are_clips():
    """What the configuration asks of a call, against `CLIPModel` of the same sizes: what comes back, and as what."""
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = tiny_config()
    towers = {
        name: {field: getattr(getattr(config, name), field) for field in fields}
        for name in ("text_config", "vision_config")
    }
    towers["text_config"] |= {"vocab_size": 99, "bos_token_id": BOS, "eos_token_id": EOS}
    towers["vision_config"] |= {"image_size": 32, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(**towers, projection_dim=24)).eval()
    ours, inputs = tiny_model(attn_implementation="sdpa"), tiny_inputs()

    def outcome(model, part, call):
        with torch.no_grad():
            value = call(getattr(model, part) if part else model)
        return isinstance(value, tuple), [tuple(leaf.shape) for leaf in leaves(value)]

    text = [inputs["input_ids"], inputs["attention_mask"]]
    calls = {
        "text_model": lambda tower: tower(*text),
        "vision_model": lambda tower: tower(inputs["pixel_values"]),
        "": lambda model: model.get_text_features(*text),
    }
    for settings in ({"return_dict": False}, {"output_hidden_states": True}, {"output_hidden_states": [1]}):
        for part, call in calls.items():
            found = []
            for model in (clip, ours):
                owner = getattr(model, part) if part else model
                # CLIP's features read the tower's configuration alone.
                held = [owner.config] if part else [owner.config, owner.config.text_config]
                for where in held:
                    for name, value in settings.items():
                        setattr(where, name, value)
                found.append(outcome(model, part, call))
                for where in held:
                    where.return_dict, where.output_hidden_states = True, False
            assert found[0] == found[1], (settings, part)


@all_classes
@pytest.mark.parametrize("selection", [[1], [0, -1]])
def test_a_configurations_selection_of_hidden_states_is_passed_on(model_class, selection):
    """As a call's own argument selects them, whatever this release of Transformers takes that to mean."""
    model, inputs, _ = build(model_class)
    expected = model(**inputs, output_hidden_states=selection)
    model.config.output_hidden_states = selection
    found = model(**inputs)

    def states(out):
        towers = (out.text_model_output, out.vision_model_output) if model_class is DiffCLIPModel else (out,)
        return [[state is None for state in tower.hidden_states] for tower in towers]

    assert states(found) == states(expected)
    assert any(any(missing) for missing in states(found))


@all_classes
def test_what_the_configuration_asks_for_is_returned(model_class):
    model, inputs, _ = build(model_class)
    model.config.output_attentions = True
    model.config.output_hidden_states = True
    out = model(**inputs)
    towers = (out.text_model_output, out.vision_model_output) if model_class is DiffCLIPModel else (out,)
    for tower in towers:
        assert (len(tower.attentions), len(tower.hidden_states)) == (3, 4)


def test_attention_implementation_that_is_not_supported_is_refused():
    with pytest.raises((ValueError, ImportError), match=r"(?i)flash"):
        DiffCLIPModel(tiny_config(attn_implementation="flash_attention_2"))


# --- Text: padding, length, end of text -----------------------------------------------------------------------------


def embed(model, rows, mask=None):
    ids = torch.tensor(rows)
    mask = None if mask is None else torch.tensor(mask)
    with torch.no_grad():
        return model.get_text_features(ids, mask).pooler_output


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize("pad", [0, EOS])
@pytest.mark.parametrize("masked", [True, False])
def test_padding_never_changes_a_text(implementation, attention_type, pad, masked):
    model = tiny_model(**both(attention_type), attn_implementation=implementation)
    text = [BOS, 5, 6, 7, EOS]
    expected = embed(model, [text])
    for length in (6, 20, CONTEXT):
        padding = [pad] * (length - len(text))
        zeros = [0] * len(padding)
        for ids, mask in ((text + padding, [1] * 5 + zeros), (padding + text, zeros + [1] * 5)):
            found = embed(model, [ids], [mask] if masked else None)
            assert relative_error(found, expected) <= PADDING
    mixed = embed(model, [[pad] * 3 + text, [*text, pad, pad, pad]])
    assert relative_error(mixed, expected.expand(2, -1)) <= PADDING


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_mask_that_hides_the_end_of_text_keeps_it(implementation):
    """`input_ids != pad_token_id` hides the end of text where padding has its id."""
    model = tiny_model(attn_implementation=implementation)
    text = [BOS, 5, 6, 7, EOS]
    for ids in (text + [EOS] * 4, [EOS] * 4 + text):
        mask = [int(token != EOS) for token in ids]
        assert relative_error(embed(model, [ids], [mask]), embed(model, [text])) <= PADDING


def test_what_follows_the_first_end_of_text_is_ignored():
    model = tiny_model()
    expected = embed(model, [[BOS, 5, EOS]])
    assert relative_error(embed(model, [[BOS, 5, EOS, 9, 8, EOS]]), expected) <= PADDING


def test_a_masked_token_is_not_attended_to():
    model = tiny_model()
    mask = [[1, 1, 0, 1, 1]]
    first, second = embed(model, [[BOS, 5, 6, 7, EOS]], mask), embed(model, [[BOS, 5, 40, 7, EOS]], mask)
    assert torch.equal(first, second)
    assert not torch.equal(first, embed(model, [[BOS, 5, 6, 7, EOS]]))


def test_a_token_above_the_end_of_text_does_not_move_the_pooling():
    model = tiny_model()
    model.resize_token_embeddings(103)
    text = [BOS, 5, 6, EOS]
    expected = model.text_model(torch.tensor([text])).last_hidden_state[:, 3]
    assert torch.equal(model.text_model(torch.tensor([text])).pooler_output, expected)
    with_new = model.text_model(torch.tensor([[BOS, 101, 6, EOS]]))
    assert torch.equal(with_new.pooler_output, with_new.last_hidden_state[:, 3])


def test_several_end_of_text_ids():
    model = tiny_model(text={"eos_token_id": [90, EOS]})
    out = model.text_model(torch.tensor([[BOS, 5, 90, 7, EOS]]))
    assert torch.equal(out.pooler_output, out.last_hidden_state[:, 2])


@pytest.mark.parametrize("model_class", [DiffCLIPModel, DiffCLIPTextModel, DiffCLIPTextModelWithProjection])
def test_a_row_without_end_of_text_is_an_error(model_class):
    model, inputs, _ = build(model_class)
    inputs["input_ids"][1][inputs["input_ids"][1] == EOS] = 7
    with pytest.raises(ValueError, match=rf"no end-of-text token in rows \[1\]; each row must hold {EOS}"):
        model(**inputs)


def test_too_long_and_missing_texts_are_errors():
    model = tiny_model().text_model
    with pytest.raises(ValueError, match="78 tokens a row; it must have at most 77"):
        model(torch.full((1, 78), EOS))
    with pytest.raises(ValueError, match="input_ids is None"):
        model()


def test_position_ids_are_used():
    model = tiny_model().text_model
    ids = torch.tensor([[BOS, 5, 6, EOS]])
    positions = torch.tensor([[0, 1, 2, 3]])
    assert torch.equal(model(ids, position_ids=positions).pooler_output, model(ids).pooler_output)
    assert not torch.equal(model(ids, position_ids=positions + 1).pooler_output, model(ids).pooler_output)


# --- Images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_interpolated_positions(implementation):
    model = tiny_model(attn_implementation=implementation).vision_model
    native = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(native, interpolate_pos_encoding=True).pooler_output, model(native).pooler_output)
    for height, width in ((48, 48), (16, 40), (35, 33)):
        image = torch.randn(2, 3, height, width)
        tokens = 1 + (height // 8) * (width // 8)
        out = model(image, interpolate_pos_encoding=True)
        assert out.last_hidden_state.shape == (2, tokens, 32)
        with pytest.raises(ValueError, match=rf"{height}x{width} pixels; it must be 32x32"):
            model(image)
    with pytest.raises(ValueError, match="at least 8"):
        model(torch.randn(1, 3, 4, 40), interpolate_pos_encoding=True)


def test_interpolation_is_bicubic():
    """At 336 px, against torch's bicubic resize of the position grid done by hand."""
    config = tiny_config(vision={"image_size": 224, "patch_size": 16, "num_hidden_layers": 1}).vision_config
    model = randomised(DiffCLIPVisionModel(config))
    embeddings = model.embeddings
    weight = embeddings.position_embedding.weight
    for height, width in ((336, 336), (160, 320)):
        image = torch.randn(1, 3, height, width)
        grid = weight[1:].T.reshape(1, 32, 14, 14)
        grid = torch.nn.functional.interpolate(grid, (height // 16, width // 16), mode="bicubic")
        positions = torch.cat([weight[:1], grid[0].flatten(1).T])
        patches = embeddings.patch_embedding(image).flatten(2).transpose(1, 2)
        expected = torch.cat([embeddings.class_embedding[None, None], patches], 1) + positions
        torch.testing.assert_close(embeddings(image, interpolate_pos_encoding=True), expected)


def test_missing_images_are_an_error():
    with pytest.raises(ValueError, match="pixel_values is None"):
        tiny_model().vision_model()


def test_classifier_takes_the_mean_of_the_patches():
    model, inputs, _ = build(DiffCLIPForImageClassification, num_labels=5)
    labels = torch.tensor([0, 4, 2])
    out = model(**inputs, labels=labels)
    mean = model.vision_model(**inputs).last_hidden_state[:, 1:].mean(1)
    torch.testing.assert_close(out.logits, model.classifier(mean))
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, labels))


# --- What Transformers asks of every model --------------------------------------------------------------------------


@all_classes
@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_saving_and_loading_is_bit_equal(model_class, attention_type, tmp_path):
    model, inputs, output = build(model_class, **both(attention_type, lambda_init="depth"))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded, info = model_class.from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for (name, left), (other, right) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(left, right), name
    assert torch.equal(model(**inputs)[output], loaded(**inputs)[output])


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_every_buffer_is_right_after_loading(attention_type, tmp_path):
    model = tiny_model(**both(attention_type))
    model.save_pretrained(tmp_path)
    loaded = DiffCLIPModel.from_pretrained(tmp_path)
    fresh = dict(DiffCLIPModel(tiny_config(**both(attention_type))).named_buffers())
    found = dict(loaded.named_buffers())
    assert found.keys() == fresh.keys()
    assert all(torch.equal(found[name], fresh[name]) for name in fresh)
    assert all(tensor.device.type == "cpu" for tensor in (*loaded.parameters(), *loaded.buffers()))


@pytest.mark.parametrize("missing", ["self_attn.lambda_q2", "self_attn.diff_norm.weight", "self_attn.q_proj.bias"])
def test_a_missing_tensor_alone_changes_and_is_reported(tmp_path, missing):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    key = f"vision_model.encoder.layers.1.{missing}"
    del weights[key]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = DiffCLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {key}
    expected = model.state_dict()
    assert {name for name, value in loaded.state_dict().items() if not torch.equal(value, expected[name])} == {key}
    assert loaded.state_dict()[key].isfinite().all()


@pytest.mark.parametrize("key", ["vision_model.surplus", "text_model.surplus", "surplus"])
def test_an_unexpected_tensor_is_reported(tmp_path, key):
    tiny_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, key: torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, info = DiffCLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {key}


@all_classes
def test_a_part_loads_from_the_whole_models_folder(model_class, tmp_path):
    whole = tiny_model()
    whole.save_pretrained(tmp_path)
    part, info = model_class.from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert all(key.startswith("classifier.") for key in info["missing_keys"])
    inputs = {name: value for name, value in tiny_inputs().items() if name in CLASSES[model_class][0]}
    out = part(**inputs)
    if model_class is DiffCLIPTextModelWithProjection:
        assert torch.equal(out.text_embeds, whole.get_text_features(**inputs).pooler_output)
    elif model_class is DiffCLIPVisionModelWithProjection:
        assert torch.equal(out.image_embeds, whole.get_image_features(**inputs).pooler_output)
    elif model_class is DiffCLIPTextModel:
        assert torch.equal(out.pooler_output, whole.text_model(**inputs).pooler_output)
    elif model_class is DiffCLIPVisionModel:
        assert torch.equal(out.pooler_output, whole.vision_model(**inputs).pooler_output)


def test_a_tower_saved_alone_loads_into_its_projection(tmp_path):
    model, inputs, _ = build(DiffCLIPVisionModel)
    model.save_pretrained(tmp_path)
    loaded, info = DiffCLIPVisionModelWithProjection.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"visual_projection.weight"}
    torch.testing.assert_close(loaded(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


def test_sharded_weights(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    loaded = DiffCLIPModel.from_pretrained(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    vision = DiffCLIPVisionModel.from_pretrained(tmp_path)
    assert torch.equal(vision.post_layernorm.weight, model.vision_model.post_layernorm.weight)


@all_classes
@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_eager_equals_sdpa(model_class, attention_type):
    model, inputs, output = build(model_class, **both(attention_type))
    found = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        value = model(**inputs)[output]
        value.square().sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found[implementation] = {"output": value.detach(), **gradients}
    assert_gradients_close(found["sdpa"], found["eager"])


@all_classes
@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(model_class, attention_type, use_reentrant):
    model, inputs, output = build(model_class, **both(attention_type))
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_activations(model, use_reentrant=use_reentrant)
            assert all(layer.gradient_checkpointing for layer in model.modules() if hasattr(layer, "self_attn"))
        model.zero_grad()
        model(**inputs)[output].square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=name)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_every_parameter_is_trained(attention_type):
    model = tiny_model(**both(attention_type)).train()
    model(**tiny_inputs(), return_loss=True).loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("model_class", [DiffCLIPModel, DiffCLIPTextModel, DiffCLIPTextModelWithProjection])
def test_resize_token_embeddings(model_class, tmp_path):
    model, inputs, output = build(model_class)
    before = model(**inputs)[output]
    model.resize_token_embeddings(120)
    assert model.get_input_embeddings().weight.shape == (120, 32)
    assert model.config.get_text_config().vocab_size == 120
    assert torch.equal(model(**inputs)[output], before)
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(loaded(**inputs)[output], before)
    assert not torch.equal(
        model.get_input_embeddings().weight[100:], torch.zeros_like(model.get_input_embeddings().weight[100:])
    )


# accelerate warns of a parameter of the model's own in a device_map, and fails without it.
@pytest.mark.filterwarnings("ignore:The following device_map keys do not match")
@all_classes
def test_device_map_auto_and_offload(model_class, tmp_path):
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    model, inputs, output = build(model_class)
    model.save_pretrained(tmp_path / "model")
    expected = model(**inputs)[output]
    auto = model_class.from_pretrained(tmp_path / "model", device_map="auto", attn_implementation="eager")
    assert torch.equal(auto(**inputs)[output], expected)
    # Everything that can be is left on disk, so that each module's weights are there only during its forward.
    names = [
        name for name, module in model.named_modules() if not list(module.children()) or name.endswith("embeddings")
    ]
    whole = [n for n in names if not any(n.startswith(o + ".") for o in names)]
    blocks = [n for n, m in model.named_modules() if type(m).__name__ in model._no_split_modules]
    device_map = {n: "disk" for n in blocks}
    device_map |= {n: "cpu" for n in whole if not any(n == b or n.startswith(b + ".") for b in blocks)}
    own = [n for n, _ in model.named_parameters(recurse=False)]
    device_map |= {n: "cpu" for n in own}
    offloaded = model_class.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "disk", attn_implementation="eager"
    )
    with torch.no_grad():
        torch.testing.assert_close(offloaded(**inputs)[output], expected)


@all_classes
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(model_class, dtype, implementation, tmp_path):
    model, inputs, output = build(model_class, attn_implementation=implementation)
    model.save_pretrained(tmp_path)
    expected = model(**inputs)[output]
    half = model_class.from_pretrained(tmp_path, dtype=dtype, attn_implementation=implementation)
    assert {p.dtype for name, p in half.named_parameters() if ".lambda_" not in name} == {dtype}
    assert half.dtype == dtype
    found = half(**inputs)[output]
    assert found.dtype == dtype
    assert relative_error(found.float(), expected) <= 4 * HALF_PRECISION[dtype]
    assert AutoModel.from_pretrained(tmp_path, dtype="auto").dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lambda_stays_in_float32(dtype, tmp_path):
    """As in the original under autocast; in half precision these vectors would lose λ's third digit."""
    model = tiny_model(attn_implementation="sdpa")

    def vectors(of):
        return {name: value for name, value in of.state_dict().items() if ".lambda_" in name}

    model.save_pretrained(tmp_path / "float32")
    half = DiffCLIPModel.from_pretrained(tmp_path / "float32", dtype=dtype)
    half.save_pretrained(tmp_path / "half")
    assert load_file(tmp_path / "half" / "model.safetensors")["logit_scale"].dtype == dtype
    again = DiffCLIPModel.from_pretrained(tmp_path / "half")
    assert again.dtype == dtype
    tower = DiffCLIPVisionModel.from_pretrained(tmp_path / "float32", dtype=dtype)
    for loaded, expected in ((half, model), (again, model), (tower, model.vision_model)):
        assert len(vectors(loaded)) >= 12
        for name, vector in vectors(expected).items():
            assert vectors(loaded)[name].dtype == torch.float32
            assert torch.equal(vectors(loaded)[name], vector)
    layers = [m.vision_model.encoder.layers[0].self_attn for m in (half, model)]
    assert torch.equal(layers[0].get_lambda(), layers[1].get_lambda())
    # A gradient reaches them, and a model made in half precision has them so too.
    half(**tiny_inputs(), return_loss=True).loss.backward()
    assert layers[0].lambda_q1.grad.dtype == torch.float32
    made = AutoModel.from_config(tiny_config(), dtype=dtype)
    assert {vector.dtype for vector in vectors(made).values()} == {torch.float32}
    # What asks for another dtype in so many words gets it.
    assert {p.dtype for p in half.to(dtype).parameters()} == {dtype}
    assert {p.dtype for p in half.double().parameters()} == {torch.float64}


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_initial_distributions_are_the_originals(attention_type):
    wide = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "attention_type": attention_type}
    torch.manual_seed(0)
    model = DiffCLIPModel(
        DiffCLIPConfig(
            text_config={**wide, "num_attention_heads": 4, "vocab_size": 2000},
            vision_config={**wide, "num_attention_heads": 4, "image_size": 112, "patch_size": 8},
        )
    )
    uniform = 3**-0.5  # standard deviation of PyTorch's default, in units of fan_in^-0.5
    text, vision = model.text_model.encoder.layers[1], model.vision_model.encoder.layers[1]
    stds = {
        model.text_model.embeddings.token_embedding.weight: 0.02,
        model.text_model.embeddings.position_embedding.weight: 0.01,
        text.self_attn.q_proj.weight: 128**-0.5,
        text.self_attn.k_proj.weight: 128**-0.5,
        text.self_attn.v_proj.weight: 128**-0.5,
        text.self_attn.out_proj.weight: 128**-0.5 * 4**-0.5,
        text.mlp.fc1.weight: 256**-0.5,
        text.mlp.fc2.weight: 128**-0.5 * 4**-0.5,
        text.mlp.fc1.bias: uniform * 128**-0.5,
        model.vision_model.embeddings.position_embedding.weight: 0.02,
        model.vision_model.embeddings.class_embedding: 1e-6,
        model.vision_model.embeddings.patch_embedding.weight: uniform * 192**-0.5,
        model.visual_projection.weight: 128**-0.5,
        model.text_projection.weight: 128**-0.5,
    }
    if attention_type == "differential":
        stds[vision.self_attn.q_proj.weight] = uniform * 128**-0.5
        stds[vision.mlp.fc2.weight] = uniform * 512**-0.5
        lambdas = [
            getattr(module, name)
            for module in model.modules()
            if isinstance(module, DiffCLIPDifferentialAttention)
            for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
        ]
        stds[torch.cat(lambdas)] = 0.1
        assert torch.equal(vision.self_attn.diff_norm.weight, torch.ones(64))
    else:
        stds[vision.self_attn.q_proj.weight] = 0.02
        assert not vision.mlp.fc2.bias.any()
    for tensor, std in stds.items():
        # Four standard errors of a sample's standard deviation.
        tolerance = 4 * (2 * tensor.numel()) ** -0.5
        assert tensor.std().item() == pytest.approx(std, rel=max(tolerance, 0.03)), (tuple(tensor.shape), std)
        assert abs(tensor.mean().item()) <= 5 * std * tensor.numel() ** -0.5
    assert model.logit_scale.item() == pytest.approx(2.6592)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name


def test_seeded_models_are_equal():
    models = []
    for _ in range(2):
        torch.manual_seed(7)
        models.append(DiffCLIPModel(tiny_config()))
    left, right = (model.state_dict() for model in models)
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_batch_of_one_equals_its_row(attention_type):
    model = tiny_model(**both(attention_type))
    inputs = tiny_inputs()
    whole = model(**inputs)
    single = model(**{name: value[:1] for name, value in inputs.items()})
    torch.testing.assert_close(single.image_embeds, whole.image_embeds[:1])
    torch.testing.assert_close(single.text_embeds, whole.text_embeds[:1])


# --- Plain mistakes -------------------------------------------------------------------------------------------------

PIXELS, IDS = torch.zeros(1, 3, 32, 32), torch.tensor([[BOS, 5, EOS]])


@all_classes
def test_an_unknown_argument_is_named_with_its_mend(model_class):
    model, inputs, _ = build(model_class)
    name = model_class.__name__
    if "pixel_values" in inputs:
        with pytest.raises(TypeError, match=rf"^{name}\.forward takes no pixel_vales; did you mean pixel_values\?$"):
            model(**inputs, pixel_vales=PIXELS)
    else:
        with pytest.raises(TypeError, match=rf"^{name}\.forward takes no inputs_embeds; give input_ids"):
            model(**inputs, inputs_embeds=torch.zeros(3, 12, 32))
    with pytest.raises(
        TypeError, match=rf"^{name}\.forward takes no output_attention; did you mean output_attentions"
    ):
        model(**inputs, output_attention=True)
    with pytest.raises(TypeError, match=rf"^{name}\.forward takes no colour; it takes .*mask|pixel_values"):
        model(**inputs, colour=None)
    # Transformers' own, of which some have no use here, and what PEFT gives as None.
    model(
        **inputs,
        output_hidden_states=None,
        return_dict=True,
        use_cache=False,
        num_items_in_batch=1,
        cu_seq_lens_q=None,
    )
    model(**inputs, inputs_embeds=None)


def test_unknown_arguments_of_the_feature_methods():
    model = tiny_model()
    with pytest.raises(TypeError, match=r"get_image_features takes no interpolate; did you mean interpolate_pos_"):
        model.get_image_features(PIXELS, interpolate=True)
    with pytest.raises(TypeError, match=r"get_text_features takes no attention_masks; did you mean attention_mask\?"):
        model.get_text_features(IDS, attention_masks=torch.ones(1, 3))
    with pytest.raises(TypeError, match="output_attentions"):
        model.encode_text(IDS, output_attentions=True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.encode_text("a cat"), TypeError, "input_ids is of type str; it must be a tensor: .*processor"),
        (lambda m: m.encode_text(["a cat"]), TypeError, "input_ids is of type list; .*processor"),
        (lambda m: m.encode_text({"input_ids": IDS}), TypeError, r"input_ids is of type dict; .*model\(\*\*inputs\)"),
        (
            lambda m: m.encode_image(Image.new("RGB", (32, 32))),
            TypeError,
            "is of type Image; .*processor",
        ),
        (lambda m: m.encode_image([PIXELS[0]]), TypeError, "pixel_values is of type list; .*processor"),
        (
            lambda m: m.encode_image(PIXELS.numpy()),
            TypeError,
            "is of type ndarray; .*return_tensors='pt'",
        ),
        (lambda m: m.encode_image(None), ValueError, "pixel_values is None"),
        (lambda m: m(PIXELS), ValueError, r"input_ids is torch.float32, .*; .*pixel_values=\.\.\."),
        (lambda m: m(IDS, IDS), ValueError, "pixel_values is torch.int64"),
        (lambda m: m.encode_image(PIXELS[0]), ValueError, r"\(3, 32, 32\); .*pixel_values\[None\]"),
        (lambda m: m.encode_image(PIXELS[None]), ValueError, r"\(1, 1, 3, 32, 32\); it must be \(batch, channels"),
        (lambda m: m.encode_image(PIXELS.byte()), ValueError, "pixel_values is torch.uint8.*image processor"),
        (lambda m: m.encode_image(PIXELS[:, :1]), ValueError, "with 1 channels; .* with 3 channels"),
        (lambda m: m.encode_image(PIXELS.movedim(1, 3)), ValueError, "with 32 channels; .* with 3 channels"),
        (lambda m: m.encode_text(IDS.float()), ValueError, "input_ids is torch.float32"),
        (lambda m: m.encode_text(IDS.bool()), ValueError, "input_ids is torch.bool"),
        (lambda m: m.encode_text(IDS[:, :0]), ValueError, r"has shape \(1, 0\); .*at least one token"),
        (lambda m: m.encode_text(IDS[0, 0]), ValueError, r"has shape \(\); it must be \(batch, tokens\)"),
        (lambda m: m.encode_text(IDS + 2), ValueError, "input_ids holds 99; an id must be from 0 to 98"),
        (lambda m: m.encode_text(-IDS), ValueError, "input_ids holds -97; an id must be from 0 to 98"),
        (lambda m: m.encode_text(IDS, torch.ones(1, 4)), ValueError, r"attention_mask has shape \(1, 4\).*\(1, 3\)"),
        (lambda m: m.encode_text(IDS, torch.ones(2, 3)), ValueError, r"attention_mask has shape \(2, 3\).*\(1, 3\)"),
        (lambda m: m.encode_text(IDS, [[1, 1, 1]]), TypeError, "attention_mask is of type list"),
        (lambda m: m.encode_text(IDS, None, IDS), ValueError, "position_ids holds 98; .* from 0 to 76"),
        (lambda m: m.encode_text(IDS, None, IDS.float()), ValueError, "position_ids is torch.float32; .*whole"),
    ],
)
def test_a_plain_mistake_is_one_line_that_names_the_mend(call, error, message):
    with pytest.raises(error, match=message) as raised:
        call(tiny_model())
    assert "\n" not in str(raised.value)


def test_one_label_is_a_number_to_be_met():
    """As in Transformers: the loss is the mean square of the difference."""
    model = DiffCLIPForImageClassification(tiny_config(num_labels=1)).eval()
    outputs = model(pixel_values=tiny_inputs(images=1)["pixel_values"], labels=torch.tensor([0.5]))
    assert outputs.logits.shape == (1, 1)
    assert outputs.loss.item() == pytest.approx((outputs.logits.item() - 0.5) ** 2)


@pytest.mark.parametrize(
    ("labels", "num_labels", "error", "message"),
    [
        ([0], 3, TypeError, "labels is of type list; it must be a tensor"),
        (torch.tensor([0, 1]), 3, ValueError, r"labels has shape \(2,\); .* each of 1 images"),
        (torch.tensor([0]), 0, ValueError, "the model has no classes; load it with num_labels"),
        (torch.tensor(0), 3, ValueError, r"labels has shape \(\); .* each of 1 images"),
        (torch.tensor([3]), 3, ValueError, r"labels holds 3; a class must be from 0 to 2 \(num_labels - 1\)"),
        (torch.tensor([-1]), 3, ValueError, "labels holds -1; a class must be from 0 to 2"),
    ],
)
def test_labels_that_are_not_the_images(labels, num_labels, error, message):
    model = DiffCLIPForImageClassification(tiny_config(num_labels=num_labels))
    with pytest.raises(error, match=message):
        model(PIXELS, labels)


def test_one_text_needs_no_batch():
    """As in Transformers' CLIP, with its mask."""
    model = tiny_model()
    expected = model.encode_text(IDS)
    assert torch.equal(model.encode_text(IDS[0]), expected)
    assert torch.equal(model.encode_text(IDS[0], torch.ones(3, dtype=torch.long)), expected)
    assert torch.equal(model.encode_text(IDS.int()), expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_an_empty_batch_is_an_empty_result(implementation, attention_type):
    model = tiny_model(**both(attention_type), attn_implementation=implementation)
    with torch.no_grad():
        assert model.encode_text(IDS[:0]).shape == (0, 24)
        assert model.encode_image(PIXELS[:0]).shape == (0, 24)
        assert model(IDS[:0], PIXELS).logits_per_image.shape == (1, 0)


# --- Weights that are elsewhere -------------------------------------------------------------------------------------


@all_classes
def test_a_model_on_the_meta_device(model_class):
    model, inputs, output = build(model_class, attn_implementation="sdpa")
    expected = model(**inputs)[output].shape
    model = model.to("meta")
    with pytest.raises(ValueError, match="on the meta device, which holds shapes and no weights; load it with"):
        model(**inputs)
    out = model(**{name: value.to("meta") for name, value in inputs.items()})
    assert (out[output].shape, out[output].device.type) == (expected, "meta")


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match")
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_serve_what_is_computed_outside_a_forward(where, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate offloads weights")
    from diffclip_hf.visualization import image_relevance, lambda_values

    model, inputs = tiny_model(), tiny_inputs()
    offloaded = tiny_model(attn_implementation="sdpa")
    if where == "cpu":
        accelerate.cpu_offload(offloaded, torch.device("cpu"))
    else:
        accelerate.disk_offload(offloaded, tmp_path, torch.device("cpu"))
    attention = offloaded.vision_model.encoder.layers[1].self_attn
    assert attention.lambda_q1.is_meta
    assert offloaded.device == torch.device("cpu")
    assert torch.equal(attention.get_lambda(), model.vision_model.encoder.layers[1].self_attn.get_lambda())
    assert attention.lambda_q1.is_meta
    for tower, values in lambda_values(model).items():
        assert (lambda_values(offloaded)[tower] == values).all()
    found, expected = image_relevance(offloaded, **inputs), image_relevance(model, **inputs)
    torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(expected))
    with torch.no_grad():
        torch.testing.assert_close(
            offloaded(**inputs, output_attentions=True).logits_per_image, model(**inputs).logits_per_image
        )


@pytest.mark.parametrize(
    ("rows", "columns", "fits"), [(64, 128, True), (64, 96, False), (10, 64, False)], ids=["fits", "columns", "rows"]
)
def test_four_bit_weights_that_a_cpu_cannot_pack(rows, columns, fits):
    """A stand-in for bitsandbytes' layer on a CPU that packs; its own error is the shape of a scale."""
    from diffclip_hf.model.offloading_diffclip import check_four_bit_widths, check_passes_gradients

    layer = torch.nn.Linear(columns, rows)
    model = torch.nn.ModuleDict({"tower": layer})
    check_passes_gradients(model)
    layer.support_avx512bf16_for_cpu = True
    if fits:
        check_four_bit_widths(model)
    else:
        with pytest.raises(ValueError, match=rf"^tower has weights of {rows}x{columns}; .* multiples of 32x64 alone"):
            check_four_bit_widths(model)
    with pytest.raises(ValueError, match=r"^tower has 4-bit weights, which pass no gradient on"):
        check_passes_gradients(model)


def test_initialisation_passes_over_tensors_that_are_none():
    """As pruning and quantisers leave them."""
    model = tiny_model()
    layer = model.vision_model.encoder.layers[0]
    layer.self_attn.q_proj.bias = layer.layer_norm1.bias = layer.layer_norm1.weight = None
    layer.self_attn.lambda_q1 = layer.self_attn.diff_norm.weight = layer.mlp.fc1.weight = None
    model.vision_model.embeddings.class_embedding = None
    before = layer.mlp.fc1.bias.clone()
    for module in model.vision_model.modules():
        model.vision_model._init_weights(module)
    assert layer.mlp.fc1.weight is None
    assert torch.equal(layer.mlp.fc1.bias, before)
    assert not torch.equal(layer.mlp.fc2.weight, tiny_model().vision_model.encoder.layers[0].mlp.fc2.weight)
