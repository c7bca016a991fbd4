"""CLIP models of Transformers as DiffCLIPs and back, against Transformers' own `CLIPModel` and `CLIPProcessor`."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_client import WITHOUT_PACKAGE, picture
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import randomised, tiny_model
from tokenizer_helper import BYTES, tiny_clip_tokenizer
from tolerances import assert_gradients_close, relative_error
from training_samples import picture as pair_picture
from training_samples import tiny_processor
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoProcessor,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextModelWithProjection,
    SiglipConfig,
    SiglipModel,
)

from diffclip_hf import (
    DiffCLIPConfig,
    DiffCLIPModel,
    DiffCLIPProcessor,
    ZeroShotClassifier,
    evaluate,
    export_onnx,
    train,
)
from diffclip_hf.conversion import convert_clip_checkpoint as conversion
from diffclip_hf.conversion.model_card import Card, render_card
from diffclip_hf.visualization import attention_maps, image_relevance, text_relevance


ROOT = Path(__file__).parents[2]
LIMIT = 1e-5
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
# Architecture → fields of the text tower, the image tower and the whole; the tokenizer is `tiny_clip_tokenizer`'s.
MODELS = {
    # As OpenAI's: quick_gelu in both, the end by its id, the image processor with its defaults.
    "openai": ({}, {"image_size": 224, "patch_size": 32}, {}),
    # As the first configurations and LAION's: gelu, the end as 2, a vocabulary that is padded, unequal towers.
    "old": (
        {"vocab_size": 520, "bos_token_id": 0, "eos_token_id": 2, "hidden_act": "gelu", "num_hidden_layers": 3},
        {"hidden_size": 48, "num_attention_heads": 6, "hidden_act": "gelu", "intermediate_size": 72},
        {"projection_dim": 20, "logit_scale_init_value": 4.0},
    ),
    # One activation each, other epsilons, and a size that patches don't fill.
    "odd": (
        {"layer_norm_eps": 1e-3, "max_position_embeddings": 24, "hidden_act": "quick_gelu", "num_attention_heads": 4},
        {"layer_norm_eps": 1e-2, "image_size": 37, "patch_size": 9, "hidden_act": "gelu", "num_hidden_layers": 1},
        {"projection_dim": 40},
    ),
    # The other way round.
    "swapped": (
        {"hidden_act": "gelu", "hidden_size": 24, "num_attention_heads": 3},
        {"hidden_act": "quick_gelu", "image_size": 20, "patch_size": 5, "num_channels": 3},
        {},
    ),
}


def clip_config(name: str = "openai") -> CLIPConfig:
    text, vision, whole = MODELS[name]
    towers = {
        "text_config": {**TOWER, **BYTES, **text},
        "vision_config": {**TOWER, "image_size": 32, "patch_size": 8, **vision},
    }
    return CLIPConfig(**towers, **{"projection_dim": 24} | whole)


def clip_processor(config: CLIPConfig) -> CLIPProcessor:
    side = config.vision_config.image_size
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return CLIPProcessor(CLIPImageProcessor(**sizes), tiny_clip_tokenizer())


def save_clip(folder: Path, name: str = "openai", dtype: torch.dtype = torch.float32) -> Path:
    config = clip_config(name)
    randomised(CLIPModel(config)).to(dtype).save_pretrained(folder)
    clip_processor(config).save_pretrained(folder)
    return folder


def run(model: object, output: Path, *options: object) -> int:
    return conversion.main(["--model", str(model), "--output-dir", str(output), *map(str, options)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The smallest model, converted: where it was, is and is again."""
    folder = tmp_path_factory.mktemp("clip")
    found = {name: folder / name for name in ("clip", "diffclip", "back")}
    save_clip(found["clip"], "swapped")
    assert run(found["clip"], found["diffclip"]) == 0
    assert run(found["diffclip"], found["back"], "--to-clip") == 0
    return found


def inputs(config: CLIPConfig) -> dict[str, torch.Tensor]:
    """Images, and texts that begin and end as the tokenizer's, with every id between, padded on the right."""
    generator = torch.Generator().manual_seed(1)
    vision, length = config.vision_config, config.text_config.max_position_embeddings
    input_ids = torch.randint(0, BYTES["bos_token_id"], (3, length), generator=generator)
    # The id of the old rule, and that with which the original pads.
    input_ids[:, 1:3] = torch.tensor([2, 0])
    input_ids[:, 0] = BYTES["bos_token_id"]
    for row, end in enumerate((length - 1, 9, 5)):
        input_ids[row, end:] = BYTES["eos_token_id"]
    pixel_values = torch.randn(3, vision.num_channels, vision.image_size, vision.image_size, generator=generator)
    return {"input_ids": input_ids, "pixel_values": pixel_values}


def both_models(clip: Path, diffclip: Path, implementation: str = "eager") -> tuple[CLIPModel, DiffCLIPModel]:
    options = {"attn_implementation": implementation, "dtype": torch.float32}
    return CLIPModel.from_pretrained(clip, **options), DiffCLIPModel.from_pretrained(diffclip, **options)


# Numbers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_same_function_and_comes_back_bit_for_bit(name, tmp_path):
    save_clip(tmp_path / "clip", name)
    assert run(tmp_path / "clip", tmp_path / "diffclip") == 0
    given = inputs(clip_config(name))
    for implementation in ("eager", "sdpa"):
        clip, model = both_models(tmp_path / "clip", tmp_path / "diffclip", implementation)
        theirs, ours = clip(**given, return_loss=True), model(**given, return_loss=True)
        for field in ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds"):
            assert relative_error(ours[field], theirs[field]) <= LIMIT, field
        assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=LIMIT)
        theirs.loss.backward()
        ours.loss.backward()
        gradients = {key.replace("pre_layrnorm", "pre_layernorm"): p.grad for key, p in clip.named_parameters()}
        assert gradients.keys() == {key for key, _ in model.named_parameters()}
        # By the softmax k's bias has no gradient at all, only rounding.
        kept = {key: value for key, value in gradients.items() if not key.endswith("k_proj.bias")}
        assert_gradients_close({key: p.grad for key, p in model.named_parameters()}, kept)
    # Attention is causal: what follows in a text changes no token before it.
    tokens = model.text_model(given["input_ids"]).last_hidden_state
    theirs = clip.text_model(given["input_ids"]).last_hidden_state
    assert relative_error(tokens, theirs) <= LIMIT
    side = clip_config(name).vision_config.image_size
    for height, width in ((side, 2 * side), (2 * side - 3, side), (side, side + 2)):
        wide = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(2))
        found, expected = (
            one.get_image_features(wide, interpolate_pos_encoding=True).pooler_output for one in (model, clip)
        )
        assert relative_error(found, expected) <= LIMIT

    assert run(tmp_path / "diffclip", tmp_path / "back", "--to-clip") == 0
    assert_same_weights(tmp_path / "clip", tmp_path / "back")
    back = CLIPModel.from_pretrained(tmp_path / "back", attn_implementation="sdpa")
    assert torch.equal(back(**given).logits_per_image, clip(**given).logits_per_image)
    before, after = clip.config, back.config
    for field in ("projection_dim", "logit_scale_init_value", "initializer_factor"):
        assert getattr(after, field) == getattr(before, field)
    ends = {"bos_token_id", "eos_token_id"} if name == "old" else set()
    for tower in conversion.FIELDS:
        for field in set(conversion.FIELDS[tower]) - ends:
            assert getattr(getattr(after, tower), field) == getattr(getattr(before, tower), field), field


def assert_same_weights(first: Path, second: Path) -> None:
    found, expected = (load_file(folder / "model.safetensors") for folder in (second, first))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape)
        assert torch.equal(
            found[key].view(torch.uint8 if value.ndim else value.dtype),
            value.view(torch.uint8) if value.ndim else value,
        ), key


def test_the_configuration_says_what_differs(folders):
    written = json.loads((folders["diffclip"] / "config.json").read_text())
    vision = written["vision_config"]
    assert (vision["pre_layernorm"], vision["patch_bias"], vision["attention_type"]) == (True, False, "standard")
    report = json.loads((folders["diffclip"] / "conversion_report.json").read_text())
    assert report["source"] == {"model": "clip"}
    assert report["gate"]["largest_error"] <= report["gate"]["limit"] == LIMIT
    assert set(report["gate"]["errors"]) == {"random", "rectangular", "real"}
    assert "model.safetensors" in report["files"]


def test_existing_models_have_neither():
    """The norm and the patches of a configuration that was saved before the fields were there."""
    folder = ROOT / "embedded" / "diffclip-emoji"
    saved = json.loads((folder / "config.json").read_text())
    del saved["vision_config"]["pre_layernorm"], saved["vision_config"]["patch_bias"]
    config = DiffCLIPConfig.from_dict(saved).vision_config
    assert (config.pre_layernorm, config.patch_bias) == (False, True)
    keys = set(DiffCLIPModel(DiffCLIPConfig.from_pretrained(folder)).state_dict())
    assert keys == set(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_dtype_stays(dtype, tmp_path):
    save_clip(tmp_path / "clip", "swapped", dtype)
    assert run(tmp_path / "clip", tmp_path / "diffclip", "--no-processor") == 0
    assert run(tmp_path / "diffclip", tmp_path / "back", "--to-clip", "--no-processor") == 0
    assert_same_weights(tmp_path / "clip", tmp_path / "back")
    assert load_file(tmp_path / "back" / "model.safetensors")["logit_scale"].dtype == dtype
    assert not (tmp_path / "back" / "tokenizer.json").exists()


def test_weights_of_several_dtypes_keep_their_numbers(tmp_path):
    save_clip(tmp_path / "clip", "swapped", torch.float16)
    weights = load_file(tmp_path / "clip" / "model.safetensors")
    weights["logit_scale"] = torch.tensor(2.123456)
    save_file(weights, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    assert run(tmp_path / "clip", tmp_path / "diffclip") == 0
    found = load_file(tmp_path / "diffclip" / "model.safetensors")
    for key, value in weights.items():
        assert torch.equal(found[key.replace("pre_layrnorm", "pre_layernorm")], value.float())


def test_shards_are_put_together(folders, tmp_path):
    CLIPModel.from_pretrained(folders["clip"]).save_pretrained(tmp_path / "clip", max_shard_size="60KB")
    assert len(list((tmp_path / "clip").glob("*.safetensors"))) > 1
    assert run(tmp_path / "clip", tmp_path / "diffclip", "--no-processor") == 0
    found, expected = (load_file(p / "model.safetensors") for p in (tmp_path / "diffclip", folders["diffclip"]))
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_the_old_rule_without_a_tokenizer_is_assumed_and_said(tmp_path, caplog):
    save_clip(tmp_path / "clip", "old")
    assert run(tmp_path / "clip", tmp_path / "diffclip", "--no-processor") == 0
    assert "assuming that start and end are the vocabulary's last two, 518 and 519" in caplog.text
    text = DiffCLIPConfig.from_pretrained(tmp_path / "diffclip").text_config
    assert (text.bos_token_id, text.eos_token_id) == (518, 519)


# Processor ----------------------------------------------------------------------------------------------------------


def test_openais_processor_gives_the_same_inputs(tmp_path):
    """Pictures of every mode, with odd margins; texts as people write them, and too long ones, as `CLIPProcessor`."""
    save_clip(tmp_path / "clip")
    assert run(tmp_path / "clip", tmp_path / "diffclip") == 0
    assert run(tmp_path / "diffclip", tmp_path / "back", "--to-clip") == 0
    generator = np.random.default_rng(0)
    colours = Image.fromarray(generator.integers(0, 256, (301, 227, 3), dtype=np.uint8))
    wide = Image.fromarray(generator.integers(0, 256, (225, 407, 4), dtype=np.uint8))
    images = [
        colours,
        wide,
        colours.convert("L"),
        colours.convert("P"),
        colours.convert("1"),
        colours.resize((60, 90)),
    ]
    texts = ["a photo", "Two  spaces,\n\tlines", "Crème brûlée 🍕", "<|endoftext|>", "", "long " * 90, "it's 12"]
    expected = CLIPProcessor.from_pretrained(tmp_path / "clip")
    options = {"padding": True, "truncation": True, "return_tensors": "pt"}
    wanted = expected(text=texts, images=images, **options)
    assert wanted["pixel_values"].shape == (6, 3, 224, 224)
    for folder, kind in (("diffclip", DiffCLIPProcessor), ("back", CLIPProcessor)):
        processor = AutoProcessor.from_pretrained(tmp_path / folder)
        assert type(processor) is kind
        found = processor(text=texts, images=images, **options)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        back, clip = (json.loads((tmp_path / folder / name).read_text()) for folder in ("back", "clip"))
        assert back == clip


def test_files_as_openais_are_on_the_hub(tmp_path):
    """Of Transformers 4: ids among the weights, fields of another time, a vocabulary and merges, one number a size."""
    clip = save_clip(tmp_path / "clip", "old")
    expected = CLIPProcessor.from_pretrained(clip)(text=["a 🍕"], images=picture(), return_tensors="pt")
    positions = {"text": torch.arange(77)[None], "vision": torch.arange(17)[None]}
    weights = load_file(clip / "model.safetensors")
    added = {f"{tower}_model.embeddings.position_ids": ids for tower, ids in positions.items()}
    save_file({**weights, **added}, clip / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((clip / "config.json").read_text())
    for tower in ("text_config", "vision_config"):
        config[f"{tower}_dict"] = {name: config[tower][name] for name in conversion.FIELDS[tower]}
        config[tower] |= {"dropout": 0.0, "torch_dtype": None, "add_cross_attention": False, "top_k": 50}
    del config["dtype"]
    (clip / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32", "transformers_version": None}))
    images = json.loads((clip / "processor_config.json").read_text())["image_processor"]
    del images["image_processor_type"]
    images |= {"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32}
    (clip / "preprocessor_config.json").write_text(json.dumps(images))
    (clip / "vocab.json").write_text(json.dumps(json.loads((clip / "tokenizer.json").read_text())["model"]["vocab"]))
    (clip / "merges.txt").write_text("#version: 0.2\n")
    for name in ("processor_config.json", "tokenizer.json"):
        (clip / name).unlink()
    assert run(clip, tmp_path / "diffclip") == 0
    assert run(tmp_path / "diffclip", tmp_path / "back", "--to-clip") == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], value) for key, value in weights.items())
    for folder in ("diffclip", "back"):
        found = AutoProcessor.from_pretrained(tmp_path / folder)(text=["a 🍕"], images=picture(), return_tensors="pt")
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_model_trained_here_from_the_start_goes_to_clip(tmp_path, caplog):
    """Its image processor is DiffCLIP's own, and becomes CLIP's with its settings."""
    clip = {"attention_type": "standard"}
    model = tiny_model(vision={**clip, "pre_layernorm": True, "patch_bias": False}, text={**clip, **BYTES})
    model.save_pretrained(tmp_path / "diffclip")
    tiny_processor().save_pretrained(tmp_path / "diffclip")
    assert run(tmp_path / "diffclip", tmp_path / "back", "--to-clip") == 0
    assert "its crop may lie a pixel elsewhere" in caplog.text
    processors = [AutoProcessor.from_pretrained(tmp_path / name) for name in ("diffclip", "back")]
    assert isinstance(processors[1], CLIPProcessor)
    # Even margins.
    image = Image.effect_mandelbrot((32, 48), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    found, expected = (one(images=image, return_tensors="pt")["pixel_values"] for one in processors[::-1])
    torch.testing.assert_close(found, expected, rtol=0, atol=2 / 255 / 0.2)


# What stops it ------------------------------------------------------------------------------------------------------


def failing(model: object, output: Path, caplog, *words: str, options: tuple = ()) -> None:
    """Run the command, and expect it to fail with these words in one line and to leave nothing."""
    caplog.clear()
    assert run(model, output, *options) == 1
    line = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"][-1]
    assert all(word in line for word in words), line
    assert "\n" not in line
    assert not output.exists()
    assert not list(output.parent.glob(".unfinished*"))


def changed(clip: Path, copy: Path, tower: str | None = None, **fields) -> Path:
    """Copy a folder, with other fields in its configuration."""
    shutil.copytree(clip, copy)
    config = json.loads((copy / "config.json").read_text())
    (config if tower is None else config[tower]).update(fields)
    (copy / "config.json").write_text(json.dumps(config))
    return copy


FIELDS = [
    ("vision_config", {"image_size": [20, 25]}, ["'image_size'", "[20, 25]"]),
    ("vision_config", {"patch_size": [5, 5]}, ["'patch_size'", "[5, 5]"]),
    ("vision_config", {"layer_norm_eps": 0.0}, ["DiffCLIPVisionConfig.layer_norm_eps is 0.0", "positive"]),
    ("vision_config", {"hidden_act": "star"}, ["DiffCLIPVisionConfig.hidden_act is 'star'"]),
    ("vision_config", {"is_causal": True}, ["CLIPVisionConfig.is_causal is True"]),
    ("text_config", {"attention_dropout": None}, ["'attention_dropout'", "None"]),
    ("text_config", {"eos_token_id": [513, 4]}, ["CLIPTextConfig.eos_token_id is [513, 4]", "one token's id"]),
    (None, {"projection_dim": None}, ["'projection_dim'", "None"]),
    (None, {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, ["is quantised"]),
]


@pytest.mark.parametrize(("tower", "fields", "words"), FIELDS, ids=[str(*fields) for _, fields, _ in FIELDS])
def test_a_field_that_can_not_be_is_named(tower, fields, words, folders, tmp_path, caplog):
    failing(changed(folders["clip"], tmp_path / "clip", tower, **fields), tmp_path / "out", caplog, *words)


def test_what_is_no_clip_is_refused(folders, tmp_path, caplog):
    output = tmp_path / "out"
    failing(tmp_path / "nothing", output, caplog, "nothing")
    failing(folders["diffclip"], output, caplog, "'diffclip'; it must be of 'clip'")
    failing(folders["clip"], output, caplog, "'clip'; it must be of 'diffclip'", options=("--to-clip",))
    towers = {
        "text_config": {**TOWER, "vocab_size": 99},
        "vision_config": {**TOWER, "image_size": 32, "patch_size": 8},
    }
    SiglipModel(SiglipConfig(**towers)).save_pretrained(tmp_path / "siglip")
    failing(tmp_path / "siglip", output, caplog, "'siglip'; it must be of 'clip'")
    config = clip_config("swapped")
    CLIPTextModelWithProjection(config.text_config).save_pretrained(tmp_path / "tower")
    failing(tmp_path / "tower", output, caplog, "'clip_text_model'; it must be of 'clip'")
    CLIPForImageClassification(config).save_pretrained(tmp_path / "classes")
    words = ["lacks weights of a CLIPModel", "saved as CLIPForImageClassification", "logit_scale"]
    failing(tmp_path / "classes", output, caplog, *words, options=("--no-processor",))


def test_weights_that_are_not_whole_are_refused(folders, tmp_path, caplog):
    weights = load_file(folders["clip"] / "model.safetensors")
    key = "vision_model.pre_layrnorm.weight"
    damages = {
        "missing": ({name: value for name, value in weights.items() if name != key}, ["lacks weights", key]),
        "misshapen": ({**weights, key: torch.ones(5)}, [key, "shape (5,); it must have (32,)"]),
        "unexpected": ({**weights, "vision_model.more": torch.ones(2)}, ["vision_model.more", "no place"]),
        "nan": ({**weights, key: torch.full((32,), torch.nan)}, ["image_embed (random inputs, eager) by nan"]),
    }
    for damage, (tensors, words) in damages.items():
        copy = changed(folders["clip"], tmp_path / damage)
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        failing(copy, tmp_path / "out", caplog, *words)
    pickled = changed(folders["clip"], tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save(weights, pickled / "pytorch_model.bin")
    failing(pickled, tmp_path / "out", caplog, "safetensors")


def test_a_processor_that_is_not_the_models_is_refused(folders, tmp_path, caplog):
    output = tmp_path / "out"
    without = changed(folders["clip"], tmp_path / "without")
    (without / "processor_config.json").unlink()
    failing(without, output, caplog, "processor_config.json")
    empty = changed(folders["clip"], tmp_path / "empty")
    (empty / "tokenizer.json").unlink()
    failing(empty, output, caplog, "no vocabulary")
    other = changed(folders["clip"], tmp_path / "other")
    clip_processor(clip_config("odd")).save_pretrained(other)
    failing(other, output, caplog, "37x37 pixels; the model's image_size is 20")
    # Its end is no longer the largest id, at which CLIP pools by the old rule.
    added = save_clip(tmp_path / "added", "old")
    tokenizer = tiny_clip_tokenizer()
    tokenizer.add_tokens(["<new>"])
    CLIPProcessor(clip_processor(clip_config("old")).image_processor, tokenizer).save_pretrained(added)
    failing(added, output, caplog, "eos_token_id is 2", "end is 513, where its largest id is 514")


def test_what_clip_does_not_have_does_not_go_back(folders, tmp_path, caplog):
    back, output = ("--to-clip",), tmp_path / "out"
    embedded = ROOT / "embedded" / "diffclip-emoji"
    words = ["DiffCLIPVisionConfig.attention_type is 'differential'; a CLIPModel only has 'standard'"]
    failing(embedded, output, caplog, *words, options=back)
    for tower, field, value, word in (
        ("vision_config", "pre_layernorm", False, "DiffCLIPVisionConfig.pre_layernorm is False"),
        ("vision_config", "patch_bias", True, "DiffCLIPVisionConfig.patch_bias is True"),
        ("text_config", "eos_token_id", 2, "DiffCLIPTextConfig.eos_token_id is 2"),
        ("text_config", "eos_token_id", [5, 6], "DiffCLIPTextConfig.eos_token_id is [5, 6]"),
    ):
        copy = changed(folders["diffclip"], tmp_path / f"{field}-{value}", tower, **{field: value})
        failing(copy, output, caplog, word, options=back)


@pytest.mark.parametrize("fault", ["heads", "epsilon", "weights", "pixels", "ids"])
def test_other_numbers_or_inputs_stop_it(fault, folders, tmp_path, caplog, monkeypatch):
    """Faults that no shape tells."""
    described, written, renamed = conversion.described, conversion.other_processor, conversion.renamed

    def with_fault(config, *args, **kwargs):
        found = described(config, *args, **kwargs)
        setattr(found.text_config, *{"heads": ("num_attention_heads", 2), "epsilon": ("layer_norm_eps", 1e-3)}[fault])
        return found

    def with_other_weight(state_dict, to_diffclip):
        key = "text_model.encoder.layers.0.self_attn.{}_proj.weight"
        swapped = {key.format("q"): state_dict[key.format("k")], key.format("k"): state_dict[key.format("q")]}
        return renamed({**state_dict, **swapped}, to_diffclip)

    def with_other_processor(*args):
        processor = written(*args)
        if fault == "pixels":
            processor.image_processor = CLIPImageProcessor(**{**processor.image_processor.to_dict(), "resample": 2})
        else:
            processor.tokenizer.add_special_tokens({"pad_token": "a"})
        return processor

    words = {"pixels": "other pixel_values", "ids": "other input_ids"}.get(fault, "text_embed (random inputs, eager)")
    if fault == "weights":
        monkeypatch.setattr(conversion, "renamed", with_other_weight)
    elif fault in ("pixels", "ids"):
        monkeypatch.setattr(conversion, "other_processor", with_other_processor)
    else:
        monkeypatch.setattr(conversion, "described", with_fault)
    failing(folders["clip"], tmp_path / "out", caplog, words, "nothing is written")


def test_a_folder_in_use_is_refused_before_the_work(folders, tmp_path, caplog, monkeypatch):
    (tmp_path / "mine").write_text("mine")
    monkeypatch.setattr(conversion, "load_config", None)
    assert run(folders["clip"], tmp_path) == 1
    assert "exists and is not an empty folder" in caplog.text
    assert (tmp_path / "mine").read_text() == "mine"


# Where it goes ------------------------------------------------------------------------------------------------------

LOADS = """
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline
options = {options}
model = AutoModel.from_pretrained("diffclip", **options)
processor = AutoProcessor.from_pretrained("diffclip", **options)
# And not transformers_modules, the folder's code.
assert type(processor.image_processor).__module__.startswith("transformers.models.clip.")
inputs = processor(text=["a cat", "a dog"], images=Image.open("picture.png"), padding=True, return_tensors="pt")
with torch.no_grad():
    scores = model(**inputs).logits_per_image.softmax(-1)[0]
torch.testing.assert_close(scores, torch.load("expected.pt"), rtol=1e-5, atol=1e-6)
classify = pipeline("zero-shot-image-classification", model="diffclip", **options)
found = classify("picture.png", candidate_labels=["cat", "dog"], hypothesis_template="a {{}}")
assert abs({{entry["label"]: entry["score"] for entry in found}}["cat"] - scores[0]) < 1e-5
model.save_pretrained("again")
processor.save_pretrained("again")
assert type(AutoProcessor.from_pretrained("again", **options).image_processor) is type(processor.image_processor)
again = AutoModel.from_pretrained("again", **options)
assert torch.equal(again(**inputs).logits_per_image, model(**inputs).logits_per_image)
"""


@pytest.mark.parametrize("with_package", [True, False])
def test_it_loads_by_the_auto_classes_and_in_a_pipeline(with_package, folders, tmp_path, warm_python):
    shutil.copytree(folders["diffclip"], tmp_path / "diffclip")
    picture().save(tmp_path / "picture.png")
    clip, processor = CLIPModel.from_pretrained(folders["clip"]), CLIPProcessor.from_pretrained(folders["clip"])
    given = processor(text=["a cat", "a dog"], images=picture(), padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.save(clip(**given).logits_per_image.softmax(-1)[0], tmp_path / "expected.pt")
    prelude = "import diffclip_hf\n" if with_package else WITHOUT_PACKAGE
    options = {} if with_package else {"trust_remote_code": True}
    warm_python.run("-c", prelude + LOADS.format(options=options), folder=tmp_path)


def test_the_card_says_what_it_is(folders):
    """As after a conversion from the Hub, of which the guide's test is."""
    report = json.loads((folders["diffclip"] / "conversion_report.json").read_text())
    report["source"] = {"model": "org/clip", "repo_id": "org/clip", "commit": "1" * 40}
    card = render_card(Card("org/new", None, folders["diffclip"], report, True, None, None, "mit"))
    assert f"Converted from the `CLIPModel` `org/clip` at `{'1' * 40}`" in card
    assert "base_model: org/clip" in card
    assert "none of its four" in card
    assert "- differential-attention" not in card
    assert "over white" not in card


def test_pictures_and_maps_are_those_of_the_original(folders):
    clip, model = both_models(folders["clip"], folders["diffclip"])
    given = inputs(clip_config("swapped"))
    for function in (image_relevance, text_relevance):
        found, expected = (torch.from_numpy(function(one, **given)) for one in (model, clip))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    for name in ("pixel_values", "input_ids"):
        one = {name: given[name]}
        found, expected = (torch.from_numpy(attention_maps(each, **one)) for each in (model, clip))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_classifier_is_that_of_the_original(folders):
    found, expected = (
        ZeroShotClassifier(AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder), ["cat", "dog"])(
            [picture()]
        )[0]
        for folder in (folders["diffclip"], folders["clip"])
    )
    assert [entry["label"] for entry in found] == [entry["label"] for entry in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["score"] == pytest.approx(theirs["score"], rel=1e-4)


@torch.inference_mode()
def test_the_exported_graphs_are_the_original(folders, tmp_path):
    clip, model = both_models(folders["clip"], folders["diffclip"])
    given = inputs(clip_config("swapped"))
    expected = clip(**given)
    texts = {"input_ids": given["input_ids"], "attention_mask": torch.ones_like(given["input_ids"])}
    graph_inputs = ({"pixel_values": given["pixel_values"]}, texts)
    for tower, arguments in zip(export_onnx.towers_of(model), graph_inputs, strict=True):
        export_onnx.export_tower(tower, tmp_path / f"{tower.name}.onnx")
        found = torch.from_numpy(export_onnx.open_graph(tmp_path / f"{tower.name}.onnx")(arguments))
        reference = getattr(expected, f"{tower.name}_output").pooler_output
        assert relative_error(found, reference) <= LIMIT


def test_it_trains_is_measured_and_goes_back(folders, tmp_path, capsys):
    """By the commands: on captions, on classes, zero-shot; what was trained is a `CLIPModel` again."""
    rows = []
    for label, name in enumerate(("dark", "light")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(4):
            image = pair_picture(10 * label + number).point(lambda value, label=label: value // 3 + 160 * label)
            image.save(tmp_path / "data" / name / f"{number}.png")
            rows.append({"file_name": f"{name}/{number}.png", "text": f"{name} {number}"})
    shutil.copytree(tmp_path / "data", tmp_path / "pairs")
    (tmp_path / "pairs" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = ["--use_cpu", "--report_to", "none", "--max_steps", "2", "--per_device_train_batch_size", "4"]
    common += ["--model_name_or_path", str(folders["diffclip"]), "--learning_rate", "0.01", "--save_strategy", "no"]
    pairs = ["--train_data", str(tmp_path / "pairs"), "--output_dir", str(tmp_path / "tuned")]
    assert train.main(common + pairs) == 0
    classes = ["--task", "image-classification", "--train_data", str(tmp_path / "data")]
    assert train.main([*common, *classes, "--output_dir", str(tmp_path / "classes")]) == 0
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "classes").config.num_labels == 2

    assert run(tmp_path / "tuned", tmp_path / "tuned-clip", "--to-clip") == 0
    before, after = (load_file(path / "model.safetensors") for path in (folders["clip"], tmp_path / "tuned-clip"))
    assert not torch.equal(before["vision_model.pre_layrnorm.weight"], after["vision_model.pre_layrnorm.weight"])
    tables = []
    for folder in (folders["clip"], folders["diffclip"], tmp_path / "tuned", tmp_path / "tuned-clip"):
        measured = [str(folder), "--task", "zero-shot", "--dataset", str(tmp_path / "data"), "--no-cache"]
        assert evaluate.main([*measured, "--split", "train", "--device", "cpu"]) == 0
        tables.append(capsys.readouterr().out.splitlines()[-1])
    assert tables[0] == tables[1]
    assert tables[2] == tables[3]
