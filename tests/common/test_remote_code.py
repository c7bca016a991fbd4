"""What is written beside a model's weights, and what of its folder may leave the machine."""

import json
import shutil
from pathlib import Path

import pytest

from diffclip_hf import add_remote_code
from diffclip_hf.common.remote_code import CODE_FILES, files_to_share


EMOJI = Path(__file__).parents[2] / "embedded" / "diffclip-emoji"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model's folder, without code."""
    return Path(shutil.copytree(EMOJI, tmp_path / "model", ignore=shutil.ignore_patterns("*.py", "__pycache__")))


def test_code_goes_beside_a_snapshot_of_the_hubs_cache_and_not_into_its_blobs(tmp_path, folder):
    """There every file is a link to a blob that is called by its content's hash."""
    snapshot = tmp_path / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(path)
    (tmp_path / "elsewhere.py").write_text("elsewhere")
    (snapshot / CODE_FILES[-1]).symlink_to(tmp_path / "elsewhere.py")
    (snapshot / CODE_FILES[0]).symlink_to(tmp_path / "nowhere.py")
    before = {path: path.read_bytes() for path in [*folder.iterdir(), tmp_path / "elsewhere.py"]}
    add_remote_code(snapshot)
    assert {path: path.read_bytes() for path in before} == before
    assert not (tmp_path / "nowhere.py").exists()
    assert json.loads((snapshot / "config.json").read_text())["auto_map"]
    assert not any((snapshot / name).is_symlink() for name in (*CODE_FILES, "config.json", "processor_config.json"))
    assert {path.name for path in snapshot.iterdir()} == {*CODE_FILES, *(path.name for path in folder.iterdir())}


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, '{"image_processor": 3}'])
def test_a_broken_file_stops_it_before_anything_is_written(folder, content):
    (folder / "processor_config.json").write_text(content)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=r"processor_config\.json (isn't JSON|holds a list|must be an object)"):
        add_remote_code(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_nothing_that_is_not_a_models_leaves(folder, caplog):
    # Not the card, which the upload writes itself.
    own = {path.name for path in folder.iterdir()} - {"README.md"}
    secrets = ("training_args.bin", "optimizer.pt", ".env", "rng_state.pth", "trainer_state.json", "token", "model.py")
    for name in (*secrets, "model.safetensors.bak", "..json"):
        (folder / name).write_text("secret")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "config.json").write_text("secret")
    (folder / "notes.txt").symlink_to(folder / "token")
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "vocab.json", "report.json"):
        (folder / name).write_text("model's")
    found = {path.name for path in files_to_share(folder, also=["report.json"])}
    shards = {"model-00001-of-00002.safetensors", "model.safetensors.index.json"}
    assert found == own | shards | {"vocab.json", "report.json"}
    assert all(name in caplog.text for name in (*secrets, "checkpoint-1", "notes.txt"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_no_link_leaves(folder, tmp_path, name):
    shutil.move(folder / name, tmp_path / "private")
    (folder / name).symlink_to(tmp_path / "private")
    with pytest.raises(ValueError, match=f"model has links: {name}; only files are shared"):
        files_to_share(folder)


def test_other_weights_do_not_leave(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"model has no model\.safetensors"):
        files_to_share(folder)
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        files_to_share(folder / "nowhere")


def test_what_is_no_models_folder_gets_no_code(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json; save a model there first"):
        add_remote_code(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match=r"model_type in .*config\.json is 'clip'; it must be one of"):
        add_remote_code(tmp_path)
    (tmp_path / "config.json").write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(ValueError, match=r"config\.json isn't JSON: .*utf-8"):
        add_remote_code(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
