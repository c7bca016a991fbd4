import math

import pytest
from tiny import tiny_config
from transformers import AutoConfig, CLIPConfig, CLIPTextConfig, CLIPVisionConfig

from diffclip_hf import DiffCLIPConfig, DiffCLIPModel, DiffCLIPTextConfig, DiffCLIPVisionConfig


TOWERS = [DiffCLIPTextConfig, DiffCLIPVisionConfig]


def test_defaults_are_the_released_vit_b_16():
    config = DiffCLIPConfig()
    vision, text = config.vision_config, config.text_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (768, 12, 12)
    assert (vision.intermediate_size, vision.image_size, vision.patch_size) == (3072, 224, 16)
    assert (vision.hidden_act, text.hidden_act) == ("gelu", "quick_gelu")
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads) == (512, 12, 8)
    assert (text.vocab_size, text.max_position_embeddings, text.eos_token_id) == (49408, 77, 49407)
    assert config.projection_dim == 512
    assert config.logit_scale_init_value == pytest.approx(math.log(1 / 0.07), abs=1e-4)
    for tower in (vision, text):
        assert (tower.attention_type, tower.lambda_init, tower.lambda_init_std) == ("differential", 0.8, 0.1)
        assert (tower.layer_norm_eps, tower.diff_norm_eps) == (1e-5, 1e-5)


@pytest.mark.parametrize(
    ("ours", "clips"),
    [(DiffCLIPConfig, CLIPConfig), (DiffCLIPTextConfig, CLIPTextConfig), (DiffCLIPVisionConfig, CLIPVisionConfig)],
)
def test_every_field_of_clip_is_there(ours, clips):
    assert set(clips().to_dict()) <= set(ours().to_dict())


@pytest.mark.parametrize(
    ("vision_type", "text_type", "parameters"),
    [
        ("standard", "standard", 149_619_969),
        ("differential", "differential", 149_629_185),
        ("differential", "standard", 149_624_577),
    ],
)
def test_the_papers_models_have_their_parameter_counts(vision_type, text_type, parameters):
    import torch

    config = DiffCLIPConfig(vision_config={"attention_type": vision_type}, text_config={"attention_type": text_type})
    with torch.device("meta"):
        model = DiffCLIPModel(config)
    assert model.num_parameters() == parameters


@pytest.mark.parametrize("tower", TOWERS)
def test_lambda_init_forms(tower):
    assert [tower().get_lambda_init(layer) for layer in (0, 11)] == [0.8, 0.8]
    by_depth = tower(lambda_init="depth")
    assert by_depth.get_lambda_init(0) == pytest.approx(0.2)
    assert by_depth.get_lambda_init(3) == pytest.approx(0.8 - 0.6 * 0.4065696597)  # exp(-0.9)
    listed = tower(num_hidden_layers=3, lambda_init=[0.1, 0.2, 0.3])
    assert [listed.get_lambda_init(layer) for layer in range(3)] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_attention_heads": 3, "hidden_size": 48}, ["num_attention_heads", "3", "even"]),
        ({"num_attention_heads": 5}, ["num_attention_heads", "5", "hidden_size"]),
        ({"num_attention_heads": 0}, ["num_attention_heads", "0", "at least 1"]),
        ({"attention_type": "diff"}, ["attention_type", "'diff'", "differential", "standard"]),
        ({"lambda_init": "layer"}, ["lambda_init", "'layer'", "depth"]),
        ({"lambda_init": [0.8, 0.7]}, ["lambda_init", "2", "num_hidden_layers", "12"]),
        ({"lambda_init": float("nan")}, ["lambda_init", "nan", "finite"]),
        ({"lambda_init_std": -0.1}, ["lambda_init_std", "-0.1", "negative"]),
        ({"diff_norm_eps": 0.0}, ["diff_norm_eps", "0.0", "positive"]),
        ({"lambda_init": [0.8] * 11 + [float("inf")]}, ["lambda_init", "inf", "finite"]),
        ({"hidden_act": "quick"}, ["hidden_act", "'quick'", "quick_gelu"]),
    ],
)
def test_a_bad_value_names_field_value_and_what_is_allowed(tower, fields, words):
    with pytest.raises(ValueError, match="must") as error:
        tower(**fields)
    assert all(word in str(error.value) for word in words), error.value


COUNTS = ["hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads"]
NUMBERS = {
    **dict.fromkeys(COUNTS, ([0, -1], "at least 1")),
    **dict.fromkeys(("layer_norm_eps", "diff_norm_eps"), ([0.0, -1e-5, math.nan, math.inf], "positive and finite")),
    **dict.fromkeys(
        ("initializer_range", "initializer_factor", "lambda_init_std"),
        ([-0.1, math.nan, math.inf], "finite, and not negative"),
    ),
    "attention_dropout": ([-0.1, 1.1, math.nan], "from 0 to 1"),
}


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_no_model_can_have(tower, name):
    """However they come: as a field, in the whole model's configuration, or set later and found by the model."""
    values, allowed = NUMBERS[name]
    for value in values:
        message = rf"{tower.__name__}\.{name} is {value}; it must be {allowed}\."
        with pytest.raises(ValueError, match=message):
            tower(**{name: value})
        if name != "projection_dim":
            with pytest.raises(ValueError, match=message):
                DiffCLIPConfig(**{tower.base_config_key: {name: value}})
    config = tiny_config()
    setattr(getattr(config, tower.base_config_key), name, values[0])
    with pytest.raises(ValueError, match=f"{name} is .*; it must be {allowed}"):
        DiffCLIPModel(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"projection_dim": 0}, "DiffCLIPConfig.projection_dim is 0; it must be at least 1"),
        (
            {"logit_scale_init_value": math.inf},
            "DiffCLIPConfig.logit_scale_init_value is inf; it must be from -87 to 88",
        ),
        (
            {"logit_scale_init_value": 1e6},
            "DiffCLIPConfig.logit_scale_init_value is 1000000.0; it must be from -87 to 88",
        ),
        ({"initializer_factor": -1.0}, "DiffCLIPConfig.initializer_factor is -1.0; it must be finite, and not"),
        ({"vision_config": {"num_channels": 0}}, "DiffCLIPVisionConfig.num_channels is 0; it must be at least 1"),
        ({"vision_config": {"image_size": 0}}, "DiffCLIPVisionConfig.image_size is 0; it must be at least 1"),
        ({"text_config": {"vocab_size": 0}}, "DiffCLIPTextConfig.vocab_size is 0; it must be at least 1"),
        ({"text_config": {"max_position_embeddings": 1}}, "max_position_embeddings is 1; it must be at least 2"),
        ({"text_config": {"eos_token_id": []}}, r"eos_token_id is \[\]; it must be a token's id"),
        ({"text_config": {"eos_token_id": -1}}, "eos_token_id is -1; it must be a token's id"),
    ],
)
def test_numbers_of_one_configuration(fields, message):
    with pytest.raises(ValueError, match=message):
        DiffCLIPConfig(**fields)


def test_the_smallest_model_is_one():
    smallest = {
        **dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers"), 2),
        "num_attention_heads": 2,
    }
    config = DiffCLIPConfig(
        text_config={**smallest, "vocab_size": 1, "max_position_embeddings": 2, "attention_dropout": 1},
        vision_config={**smallest, "image_size": 1, "patch_size": 1, "num_channels": 1, "lambda_init_std": 0},
        projection_dim=1,
        initializer_factor=0,
    )
    assert DiffCLIPModel(config).num_parameters() > 0


def test_towers_are_named_as_transformers_names_them():
    """`sub_configs` in the older releases, `sub_configs_defaults` in the newer."""
    towers = {"text_config": DiffCLIPTextConfig, "vision_config": DiffCLIPVisionConfig}
    assert DiffCLIPConfig.sub_configs == towers
    for name, spec in DiffCLIPConfig.sub_configs_defaults.items():
        assert getattr(spec, "config_class", spec) is towers[name]
    with pytest.raises(Exception, match="text_config"):
        DiffCLIPConfig(text_config="vit")


def test_output_attentions_goes_with_every_implementation():
    config = tiny_config(attn_implementation="sdpa")
    config.output_attentions = True
    assert config._attn_implementation == "sdpa"
    assert tiny_config(attn_implementation="sdpa", output_attentions=True).output_attentions
    config.validate()


@pytest.mark.parametrize("given", [CLIPConfig(), DiffCLIPVisionConfig(), None])
def test_a_model_given_another_models_configuration(given):
    with pytest.raises(ValueError, match=r"DiffCLIPModel is given a .*; it must be a DiffCLIPConfig"):
        DiffCLIPModel(given)


def test_odd_heads_are_fine_with_standard_attention():
    assert DiffCLIPTextConfig(num_attention_heads=1, attention_type="standard").num_attention_heads == 1


def test_a_bad_tower_stops_the_whole_configuration():
    with pytest.raises(ValueError, match=r"patch_size is 300; it must be from 1 to image_size"):
        DiffCLIPConfig(vision_config={"patch_size": 300})


@pytest.mark.parametrize("lambda_init", [0.5, "depth", [0.1, 0.2, 0.3]])
def test_round_trip_through_json_and_auto_config(tmp_path, lambda_init):
    config = tiny_config(vision={"lambda_init": lambda_init}, text={"attention_type": "standard"})
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is DiffCLIPConfig
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert loaded.vision_config.lambda_init == lambda_init
    assert DiffCLIPConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_a_tower_loads_from_the_whole_configuration(tmp_path):
    config = tiny_config(vision={"lambda_init": "depth"})
    config.save_pretrained(tmp_path)
    assert DiffCLIPVisionConfig.from_pretrained(tmp_path).lambda_init == "depth"
    text = DiffCLIPTextConfig.from_pretrained(tmp_path)
    assert (text.vocab_size, text.projection_dim) == (99, 24)


def test_towers_given_as_configurations():
    text, vision = DiffCLIPTextConfig(hidden_size=64), DiffCLIPVisionConfig(hidden_size=96)
    config = DiffCLIPConfig(text_config=text, vision_config=vision)
    assert (config.text_config.hidden_size, config.vision_config.hidden_size) == (64, 96)


def test_a_towers_configuration_is_left_as_it_was_given():
    vision = DiffCLIPVisionConfig(projection_dim=7)
    assert DiffCLIPConfig(vision_config=vision, projection_dim=9).vision_config.projection_dim == 9
    assert vision.projection_dim == 7
