"""The way back to the original's checkpoints."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from parity_models import FIXTURES, VARIANTS
from safetensors.torch import load_file, save_file
from test_conversion import convert_tiny

from diffclip_hf import DiffCLIPModel
from diffclip_hf.conversion import convert_original_checkpoint as conversion
from diffclip_hf.conversion import convert_to_original as back


def run(*args) -> int:
    return back.main([str(arg) for arg in args])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("back") / "diffclip"
    assert convert_tiny("diffclip", folder, "--no-processor") == 0
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back_is_bit_exact(variant, tmp_path):
    assert convert_tiny(variant, tmp_path / "folder", "--variant", variant, "--no-processor") == 0
    (tmp_path / "back.pt").touch()  # an empty file may be written over
    assert run(tmp_path / "folder", tmp_path / "back.pt") == 0
    written = torch.load(tmp_path / "back.pt", weights_only=True)
    original = torch.load(FIXTURES / f"{variant}-tiny.pt", weights_only=False)["state_dict"]
    assert written.keys() == {"state_dict"}
    assert written["state_dict"].keys() == original.keys()
    for key, value in original.items():
        found = written["state_dict"][key]
        assert (found.dtype, found.shape) == (value.dtype, value.shape)
        # Bytes, since equality of numbers takes −0 for 0.
        assert found.numpy().tobytes() == value.numpy().tobytes(), key
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.pt", "folder"]


def test_shards_are_put_together(tmp_path, folder):
    DiffCLIPModel.from_pretrained(folder).save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert run(tmp_path / "shards", tmp_path / "back.pt") == 0
    found, expected = (conversion.load_state_dict(p) for p in (tmp_path / "back.pt", FIXTURES / "diffclip-tiny.pt"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_half_precision_is_kept_and_said(tmp_path, folder, caplog):
    DiffCLIPModel.from_pretrained(folder, dtype=torch.float16).save_pretrained(tmp_path / "half")
    assert run(tmp_path / "half", tmp_path / "half.pt") == 0
    assert "{'float16': " in caplog.text
    found, expected = (conversion.load_state_dict(p) for p in (tmp_path / "half.pt", FIXTURES / "diffclip-tiny.pt"))
    key = "visual.blocks.1.attn.k_proj.weight"
    assert torch.equal(found[key], expected[key].half())


def test_what_the_file_will_not_tell_is_said(tmp_path, caplog):
    assert convert_tiny("diffclip-dagger", tmp_path / "folder", "--no-processor") == 0
    assert run(tmp_path / "folder", tmp_path / "back.pt") == 0
    assert "won't tell lambda_init, which is 0.8 in the vision tower" in caplog.text
    assert "won't tell the text tower's heads, of which it has 6" in caplog.text


def failing(caplog, folder: Path, output: Path, words: list[str]) -> None:
    """Run the command, and expect it to fail with these words and to leave nothing."""
    before = sorted(output.parent.iterdir())
    caplog.clear()
    assert run(folder, output) == 1
    assert all(word in caplog.text for word in words), caplog.text
    assert sorted(output.parent.iterdir()) == before


def test_a_file_in_use_is_left_alone(tmp_path, folder, caplog):
    (tmp_path / "mine.pt").write_text("mine")
    failing(caplog, folder, tmp_path / "mine.pt", ["mine.pt exists and is not an empty file"])
    assert (tmp_path / "mine.pt").read_text() == "mine"
    failing(caplog, folder, tmp_path, ["exists and is not a file"])


def changed(folder: Path, copy: Path, tower: str, **fields) -> Path:
    """Copy a folder, with other fields in its configuration."""
    shutil.copytree(folder, copy)
    config = json.loads((folder / "config.json").read_text())
    config[tower].update(fields)
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_what_is_no_original_is_refused(tmp_path, folder, caplog):
    output = tmp_path / "x.pt"
    failing(caplog, tmp_path, output, ["has no config.json"])
    activation = changed(folder, tmp_path / "activation", "vision_config", hidden_act="quick_gelu")
    words = ["DiffCLIPVisionConfig.hidden_act is 'quick_gelu'; the original only has 'gelu'"]
    failing(caplog, activation, output, words)
    end = changed(folder, tmp_path / "end", "text_config", eos_token_id=2)
    failing(caplog, end, output, ["DiffCLIPTextConfig.eos_token_id is 2; the original only has 299"])
    wider = changed(folder, tmp_path / "wider", "text_config", intermediate_size=200)
    failing(caplog, wider, output, ["has shape (192, 48); config.json says (200, 48)"])
    deeper = changed(folder, tmp_path / "deeper", "text_config", num_hidden_layers=5)
    failing(caplog, deeper, output, ["4 layers in the text tower; num_hidden_layers in config.json is 5"])
    # Nothing of the size that it says is built.
    absurd = changed(folder, tmp_path / "absurd", "vision_config", num_hidden_layers=999_999_999)
    failing(caplog, absurd, output, ["3 layers in the vision tower; num_hidden_layers in config.json is 999999999"])
    model = DiffCLIPModel.from_pretrained(folder)
    model.vision_model.save_pretrained(tmp_path / "tower")
    failing(caplog, tmp_path / "tower", output, ["of the kind 'diffclip_vision_model'; it must be of 'diffclip'"])
    weights = activation / "model.safetensors"
    (activation / "config.json").write_bytes((folder / "config.json").read_bytes())
    weights.write_bytes(weights.read_bytes()[:1000])
    failing(caplog, activation, output, ["model.safetensors can't be read as safetensors"])
    weights.unlink()
    failing(caplog, activation, output, ["model.safetensors can't be read as safetensors"])


@pytest.mark.parametrize("fault", ["gap", "twice", "whole", "index"])
def test_damaged_shards_are_refused(tmp_path, folder, caplog, fault):
    shards = tmp_path / "shards"
    DiffCLIPModel.from_pretrained(folder).save_pretrained(shards, max_shard_size="200KB")
    first = next(shards.glob("*-00001-of-*.safetensors"))
    content = load_file(first)
    key = next(key for key in content if "layers.0." in key)
    if fault == "gap":
        content[key.replace("layers.0.", "layers.999999999.")] = content.pop(key)
        words = ["layers in the", "in config.json is"]
    elif fault == "twice":
        other = next(shards.glob("*-00002-of-*.safetensors"))
        content |= load_file(other)
        words = ["which another shard has"]
    elif fault == "whole":
        content[key] = content[key].long()
        words = [f"{key!r} is of torch.int64"]
    else:
        (shards / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret.safetensors"}}')
        words = ["has no weight_map"]
    save_file(content, first)
    failing(caplog, shards, tmp_path / "x.pt", words)


def test_an_output_that_can_not_be_written_is_refused_before_the_work(tmp_path, folder, caplog, monkeypatch):
    monkeypatch.setattr(back, "load_folder", lambda folder: pytest.fail("too late"))
    failing(caplog, folder, tmp_path / ("n" * 300), ["can't be written (File name too long"])


def test_a_failure_while_writing_leaves_nothing(tmp_path, folder, caplog, monkeypatch):
    def full_disk(content, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    failing(caplog, folder, tmp_path / "x.pt", ["No space left"])
