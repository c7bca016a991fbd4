"""Models, processors and tokenizers load whole or not at all, whatever Transformers would make of them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from tiny import TOWER
from tokenizer_helper import BYTES, tiny_clip_tokenizer
from tokenizers import processors
from training_samples import tiny_pair_model, tiny_processor
from transformers import (
    AutoImageProcessor,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    SiglipConfig,
    SiglipModel,
)

from diffclip_hf import DiffCLIPConfig, DiffCLIPForImageClassification, DiffCLIPModel, DiffCLIPProcessor
from diffclip_hf.common.loading import (
    check_device,
    check_image_processor,
    check_path,
    check_tokenizer,
    find_source,
    is_local,
    load_config,
    load_model,
    load_processor,
    load_tokenizer,
)
from diffclip_hf.evaluation.clip_benchmark import load_for_clip_benchmark
from diffclip_hf.export_onnx import load_processing


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A tiny model with its processor."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    tiny_pair_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def change_config(folder: Path, **text_fields) -> None:
    content = json.loads((folder / "config.json").read_text())
    content["text_config"] |= text_fields
    (folder / "config.json").write_text(json.dumps(content))


# Models -------------------------------------------------------------------------------------------------------------


def test_a_whole_model_loads(whole):
    model = load_model(whole, dtype=torch.float32)
    assert type(model) is DiffCLIPModel
    assert not model.training
    for name, tensor in tiny_reload(whole).items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert type(load_processor(whole, model.config)) is DiffCLIPProcessor


def tiny_reload(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_a_classifiers_folder_isnt_a_contrastive_model(whole, tmp_path, caplog):
    classifier = DiffCLIPForImageClassification.from_pretrained(whole, num_labels=3)
    classifier.save_pretrained(tmp_path)
    caplog.clear()
    with pytest.raises(
        ValueError, match=r"lacks weights of a DiffCLIPModel \(it was saved as DiffCLIPForImage.*logit"
    ):
        load_model(tmp_path)
    assert "REPORT" not in caplog.text


def test_what_starts_anew_is_named_by_the_caller(whole, caplog):
    caplog.set_level("INFO")
    with pytest.raises(ValueError, match=r"lacks weights .*: classifier\.bias, classifier\.weight\."):
        load_model(whole, DiffCLIPForImageClassification)
    model = load_model(whole, DiffCLIPForImageClassification, new=("classifier.",), num_labels=5)
    assert model.classifier.weight.shape == (5, 32)
    assert "start anew: classifier.bias, classifier.weight." in caplog.text


def test_a_head_of_other_labels_starts_anew(whole, tmp_path):
    DiffCLIPForImageClassification.from_pretrained(whole, num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"classifier\.bias has the shape \(3,\); it must have \(5,\)"):
        load_model(tmp_path, DiffCLIPForImageClassification, id2label=dict(enumerate("abcde")))
    model = load_model(
        tmp_path, DiffCLIPForImageClassification, new=("classifier.",), id2label=dict(enumerate("abcde"))
    )
    assert model.classifier.weight.shape == (5, 32)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"intermediate_size": 40}, r"aren't those of its config\.json.*fc1\.bias has the shape \(48,\).*\(40,\)"),
        ({"num_hidden_layers": 2}, r"leaves no place for.*text_model\.encoder\.layers\.2"),
        ({"num_hidden_layers": 4}, r"lacks weights.*text_model\.encoder\.layers\.3"),
        ({"attention_type": "standard"}, r"leaves no place for.*diff_norm"),
    ],
)
def test_a_configuration_of_another_model(copy, fields, words):
    change_config(copy, **fields)
    with pytest.raises(ValueError, match=words):
        load_model(copy)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), r"no file named model\.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"12"), "header"),
        (lambda folder: (folder / "config.json").unlink(), r"has no config\.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "clop"}'), "clop"),
        (lambda folder: change_config(folder, hidden_size="32"), "hidden_size"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "diffclip", "id2label": 5}'), "config"),
    ],
    ids=["no weights", "damaged weights", "no config", "no JSON", "unknown", "wrong type", "no mapping"],
)
def test_a_damaged_folder(copy, damage, words):
    damage(copy)
    with pytest.raises(ValueError, match=words) as raised:
        load_model(copy)
    assert "\n" not in str(raised.value)


def test_a_run_that_was_cut_off_names_its_checkpoints(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run" / "checkpoint-5")
    with pytest.raises(ValueError, match=r"has no config\.json .*; there is one in checkpoint-5\."):
        load_model(tmp_path / "run")


def test_models_of_another_kind(tmp_path, whole):
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=20, **size)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="BertModel, which has no get_image_features"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="of the kind 'bert'; DiffCLIPModel needs one of the kind 'diffclip'"):
        load_model(tmp_path, DiffCLIPModel)
    with pytest.raises(ValueError, match="of the kind 'bert'; it must be of 'diffclip'"):
        load_config(tmp_path, DiffCLIPConfig)
    assert load_config(whole, DiffCLIPConfig).projection_dim == 24


# PEFT's, of Transformers' older name for activation checkpointing.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_loads_over_its_whole_model(whole, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = Path(shutil.copytree(whole, tmp_path / "base"))
    tuned = get_peft_model(DiffCLIPModel.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    tuned.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[512, 5, 513]])
    expected = tuned.eval()(input_ids=ids, pixel_values=torch.ones(1, 3, 32, 32)).logits_per_image
    found = load_model(tmp_path / "adapter")(input_ids=ids, pixel_values=torch.ones(1, 3, 32, 32)).logits_per_image
    torch.testing.assert_close(found, expected)
    change_config(base, num_hidden_layers=4)
    with pytest.raises(ValueError, match=r"lacks weights.*layers\.3"):
        load_model(tmp_path / "adapter")
    shutil.rmtree(base)
    with pytest.raises(ValueError, match=r"There is no .*base"):
        load_model(tmp_path / "adapter")


# Names --------------------------------------------------------------------------------------------------------------


def test_what_can_only_be_a_path():
    for name in (".", "./a/b", "../a", "/a/b", "~/a", "a/b/", "a/b/c", "a", "C:\\a", "a\\b"):
        assert is_local(name), name
    assert not is_local("openai/clip-vit-base-patch16")
    assert not is_local("mnist", needs_owner=False)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("models/difclip", r"There is no models/difclip: .* has no difclip; did you mean diffclip\?.*To load"),
        ("./modles/diffclip", r"has no modles; did you mean models\?"),
        ("a/b/c/d", r"There is no a/b/c/d: .* has no a\."),
        ("diffclip", r"An id on the Hub has an owner and a name"),
        ("", "name is empty"),
        ("https://huggingface.co/org/name/tree/main", r"is an address; .* id on the Hub, 'org/name'"),
    ],
)
def test_a_name_that_isnt_there_doesnt_ask_the_hub(name, words, tmp_path, monkeypatch):
    (tmp_path / "models" / "diffclip").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "diffclip_hf.common.loading.find_adapter_config_file", lambda *args, **kwargs: pytest.fail("asked")
    )
    for load in (find_source, load_model, load_processor, load_tokenizer, load_for_clip_benchmark):
        with pytest.raises(ValueError, match=words):
            load(name)


def test_a_hubs_model_in_the_cache_is_found_beside_a_folder_of_its_owner(tmp_path, monkeypatch):
    (tmp_path / "org").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "models--org--name").mkdir(parents=True)
    assert find_source("org/name") == "org/name"
    assert find_source("other/name") == "other/name"
    with pytest.raises(ValueError, match="has no nme"):
        find_source("org/nme")


def test_old_data_sets_have_no_owner(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_source("mnist", repo_type="dataset") == "mnist"
    with pytest.raises(ValueError, match=r"did you mean pictures\?"):
        find_source("pictres", repo_type="dataset")


def test_what_an_option_names_has_to_be_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "captions").mkdir()
    assert check_path("~/captions", "--data") == tmp_path / "captions"
    with pytest.raises(ValueError, match=r"^--data is '~/caption'\. .* has no caption; did you mean captions\?"):
        check_path("~/caption", "--data")


def test_a_file_and_an_adapter_are_no_models_folder(whole, tmp_path):
    with pytest.raises(ValueError, match=r"config\.json is a file; name the folder that save_pretrained wrote"):
        load_config(whole / "config.json")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no config\.json, but an adapter; name the model that it is for"):
        load_config(tmp_path)
    with pytest.raises(ValueError, match=r"adapter_config\.json names no base_model_name_or_path"):
        load_model(tmp_path)


# Processors ---------------------------------------------------------------------------------------------------------


def test_a_lost_vocabulary(copy):
    (copy / "tokenizer.json").unlink()
    # What Transformers makes of it.
    assert len(DiffCLIPProcessor.from_pretrained(copy).tokenizer) == 2
    for load in (load_processor, load_tokenizer, lambda name: load_for_clip_benchmark(str(name))):
        with pytest.raises(ValueError, match=r"has no vocabulary: its tokenizer\.json.* is missing\."):
            load(copy)


def test_a_lost_limit_is_the_models(copy, caplog):
    """Without tokenizer_config.json texts would be cut at 77 tokens, and the first longer than the model's stop it."""
    (copy / "tokenizer_config.json").unlink()
    change_config(copy, max_position_embeddings=9)
    processor = load_processor(copy, load_config(copy))
    ids = processor(text=["a long text of more tokens than nine"], truncation=True)["input_ids"][0]
    assert (len(ids), ids[-1]) == (9, 513)
    assert "texts are cut at 9" in caplog.text


def test_a_lost_image_processor(copy, caplog):
    (copy / "processor_config.json").unlink()
    load_processing(str(copy), load_config(copy))
    assert "has no image processor: none is written" in caplog.text
    with pytest.raises(ValueError, match=r"has no processor_config\.json or preprocessor_config\.json"):
        load_processor(copy)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"crop_size": {"height": 40, "width": 40}}, r"makes images of 40x40 pixels; the model's image_size is 32"),
        ({"image_std": [0.0, 1.0, 1.0]}, r"has the image_std \[0\.0, 1\.0, 1\.0\]; each must be positive"),
        ({"image_mean": [float("nan"), 1.0, 1.0]}, r"has the image_mean \[nan, 1\.0, 1\.0\]; each must be finite"),
    ],
)
def test_another_models_image_processor(fields, words, copy):
    """Every door that loads a processor refuses it by one function; the export has a door of its own."""
    content = json.loads((copy / "processor_config.json").read_text())
    content["image_processor"] |= fields
    (copy / "processor_config.json").write_text(json.dumps(content))
    config = load_config(copy)
    for load in (lambda: load_processor(copy, config), lambda: load_processing(str(copy), config)):
        with pytest.raises(ValueError, match=words):
            load()


def test_a_part_alone_is_no_processor(whole, tmp_path):
    shutil.copy(whole / "config.json", tmp_path)
    tiny_processor().image_processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a DiffCLIPImageProcessor\w*, which has no .*tokenizer; save the"):
        load_processor(tmp_path, processor_class=AutoImageProcessor)


def test_an_image_processor_that_resizes_nothing_fits_every_model():
    """The pictures that it's given may have the model's size."""
    processor = tiny_processor().image_processor
    config = DiffCLIPConfig(vision_config={"image_size": 64, "patch_size": 8})
    with pytest.raises(ValueError, match="makes images of 32x32 pixels; the model's image_size is 64"):
        check_image_processor(processor, config, "there")
    processor.do_resize = False
    check_image_processor(processor, config, "there")


def test_a_link_to_nothing(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"link is a link to .*gone, which isn't there\.$"):
        load_model(tmp_path / "link")


def test_a_tokenizer_alone_is_no_processor(tmp_path):
    tiny_clip_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no processor_config\.json"):
        load_processor(tmp_path)


def shifted_tokenizer() -> CLIPTokenizer:
    """The tiny tokenizer with one token more, so that its ids of start and end are others."""
    vocabulary = {token: i for i, token in enumerate(sorted(tiny_clip_tokenizer().get_vocab(), key=str.__len__))}
    ends = ("<|startoftext|>", "<|endoftext|>")
    tokens = [token for token in vocabulary if token not in ends]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate([*tokens, "more", *ends])}, merges=[])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"vocab_size": 515}, "has the eos_token_id 514; the model's is 513"),
        ({"vocab_size": 514}, "has ids up to 514; the model's vocab_size is 514"),
        ({"vocab_size": 515, "eos_token_id": 514}, "has the bos_token_id 513; the model's is 512"),
    ],
)
def test_another_models_tokenizer(fields, words):
    text = {**TOWER, "bos_token_id": 512, "eos_token_id": 513, **fields}
    for config in (DiffCLIPConfig(text_config=text), CLIPConfig(text_config=text)):
        with pytest.raises(ValueError, match=words):
            check_tokenizer(shifted_tokenizer(), config, "there")


def test_a_tokenizer_that_ends_no_text():
    tokenizer = tiny_clip_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    text = {**TOWER, "vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513}
    with pytest.raises(ValueError, match="ends no text with the end-of-text id 513, at which the model pools"):
        check_tokenizer(tokenizer, DiffCLIPConfig(text_config=text))


def test_several_ends_of_text():
    text = {**TOWER, "vocab_size": 514, "bos_token_id": 512, "eos_token_id": [7, 513]}
    check_tokenizer(tiny_clip_tokenizer(), DiffCLIPConfig(text_config=text))


def test_the_tokenizers_of_other_models():
    # CLIP's first configurations have 2 for the end and 0 for the start, and pool at the largest id.
    first = CLIPConfig(text_config={**TOWER, "vocab_size": 514, "bos_token_id": 0, "eos_token_id": 2})
    check_tokenizer(tiny_clip_tokenizer(), first)
    tokenizer = tiny_clip_tokenizer()
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ValueError, match="has the end-of-text id 513; the model pools at the largest, 514"):
        check_tokenizer(
            tokenizer, CLIPConfig(text_config={**TOWER, "vocab_size": 600, "bos_token_id": 0, "eos_token_id": 2})
        )
    # SigLIP's configuration has CLIP's ids and not those of its tokenizer.
    siglip = SiglipConfig(text_config={**TOWER, "vocab_size": 600, "bos_token_id": 49406, "eos_token_id": 49407})
    check_tokenizer(tiny_clip_tokenizer(), siglip)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_other_clip_like_models_load(kind, tmp_path):
    text = {**TOWER, **BYTES}
    towers = {"text_config": text, "vision_config": {**TOWER, "image_size": 32, "patch_size": 8}}
    model = CLIPModel(CLIPConfig(**towers)) if kind == "clip" else SiglipModel(SiglipConfig(**towers))
    model.save_pretrained(tmp_path)
    assert type(load_model(tmp_path)) is type(model)


# Machines -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["gpu", "meta", "", "cuda:99"])
def test_devices_that_arent_there(device):
    with pytest.raises(ValueError, match="evice") as raised:
        check_device(device)
    assert "\n" not in str(raised.value)
    assert check_device("cpu") == torch.device("cpu")
