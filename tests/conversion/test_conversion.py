"""The conversion command: what it reads off a checkpoint, and what it refuses."""

import argparse
import gzip
import hashlib
import json
import math
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from parity_models import FIXTURES, VARIANTS, golden
from tolerances import PARITY_WITH_ORIGINAL, relative_error
from transformers import AutoModel, AutoProcessor

from diffclip_hf import DiffCLIPConfig
from diffclip_hf.conversion import convert_original_checkpoint as conversion
from diffclip_hf.conversion import parity_gate
from diffclip_hf.conversion.clip_vocabulary import clip_tokenizer, find_merges_file
from diffclip_hf.conversion.original_keys import Entry, Layout, key_table, key_table_of


SCRIPT = Path(__file__).parents[2] / "conversion" / "convert_original_checkpoint.py"
# Standard towers don't tell their heads.
HEADS = {"diffclip": [], "diffclip-star": [], "diffclip-dagger": ["--text-heads", "6"]}
HEADS["clip"] = ["--text-heads", "6", "--vision-heads", "4"]


def run(*args) -> int:
    return conversion.main([str(arg) for arg in args])


def convert_tiny(variant: str, folder: Path, *args) -> int:
    checkpoint = FIXTURES / f"{variant}-tiny.pt"
    return run("--checkpoint", checkpoint, "--output-dir", folder, *HEADS[variant], *args)


def save(path: Path, state_dict, **others) -> Path:
    torch.save({"state_dict": {f"module.{key}": value for key, value in state_dict.items()}, **others}, path)
    return path


def report_of(folder: Path) -> dict:
    return json.loads((folder / "conversion_report.json").read_text())


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return conversion.load_state_dict(FIXTURES / "diffclip-tiny.pt")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_converted_folder_gives_the_originals_numbers(variant, warm_python, tmp_path):
    """The whole way: the command, the folder, AutoModel, both implementations."""
    command = [SCRIPT, "--checkpoint", FIXTURES / f"{variant}-tiny.pt", "--no-processor"]
    command += ["--output-dir", tmp_path / "out", "--variant", variant, *HEADS[variant]]
    warm_python.run(*command, folder=tmp_path)
    expected, _ = golden(variant, "tiny")
    for implementation in ("eager", "sdpa"):
        model = AutoModel.from_pretrained(tmp_path / "out", attn_implementation=implementation)
        with torch.no_grad():
            out = model(input_ids=expected["input_ids"], pixel_values=expected["pixel_values"])
        assert relative_error(out.logits_per_image, expected["logits_per_image"]) <= PARITY_WITH_ORIGINAL
        assert relative_error(out.vision_model_output.pooler_output, expected["image_embed"]) <= PARITY_WITH_ORIGINAL
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "out").iterdir()} == {"0o644"}


def test_configuration_is_read_off_the_keys(weights):
    config = conversion.infer_config(weights)
    vision, text = config.vision_config, config.text_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (64, 3, 4)
    assert (vision.image_size, vision.patch_size, vision.layer_norm_eps) == (32, 8, 1e-5)
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads) == (48, 4, 6)
    assert (text.vocab_size, text.max_position_embeddings, config.projection_dim) == (300, 16, 24)
    assert (text.bos_token_id, text.eos_token_id) == (298, 299)
    assert (vision.attention_type, text.attention_type, text.lambda_init) == ("differential", "differential", 0.8)


def test_variants_are_four_configurations(tmp_path):
    found = {}
    for variant in VARIANTS:
        assert convert_tiny(variant, tmp_path / variant, "--no-processor", "--variant", variant) == 0
        config = AutoModel.from_pretrained(tmp_path / variant).config
        towers = (config.vision_config, config.text_config)
        found[variant] = [(t.attention_type, t.lambda_init, t.layer_norm_eps) for t in towers]
    assert found["diffclip"] == [("differential", 0.8, 1e-5)] * 2
    assert found["diffclip-star"] == [("differential", "depth", 1e-5)] * 2
    assert found["diffclip-dagger"] == [("differential", 0.8, 1e-5), ("standard", 0.8, 1e-5)]
    assert [(kind, eps) for kind, _, eps in found["clip"]] == [("standard", 1e-6), ("standard", 1e-5)]


def test_processor_of_a_small_vocabulary(tmp_path, caplog):
    assert convert_tiny("diffclip", tmp_path / "out") == 0
    assert "no tokenizer is saved" in caplog.text
    saved = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert saved["size"] == {"shortest_edge": 32}
    assert saved["crop_size"] == {"height": 32, "width": 32}


def failing(tmp_path: Path, caplog, *args, words: list[str]) -> None:
    """Run the command, and expect it to fail with these words and to leave nothing."""
    before = sorted(tmp_path.iterdir())
    assert run("--output-dir", tmp_path / "out", *args) == 1
    assert all(word in caplog.text for word in words), caplog.text
    assert sorted(tmp_path.iterdir()) == before


def test_a_missing_key_stops_it(tmp_path, caplog, weights):
    del weights["visual.blocks.1.attn.lambda_k2"]
    path = save(tmp_path / "x.pt", weights)
    failing(tmp_path, caplog, "--checkpoint", path, words=["Missing: 'visual.blocks.1.attn.lambda_k2'"])


def test_an_unexpected_key_stops_it(tmp_path, caplog, weights):
    path = save(tmp_path / "x.pt", {**weights, "visual.head.weight": torch.zeros(2, 2)})
    failing(tmp_path, caplog, "--checkpoint", path, words=["Unexpected: 'visual.head.weight'"])


def test_a_misshapen_key_stops_it(tmp_path, caplog, weights):
    weights["transformer.resblocks.2.mlp.c_proj.weight"] = torch.zeros(48, 191)
    path = save(tmp_path / "x.pt", weights)
    words = ["transformer.resblocks.2.mlp.c_proj.weight", "(48, 191)", "(48, 192)"]
    failing(tmp_path, caplog, "--checkpoint", path, words=words)


def test_a_value_that_is_not_finite_stops_it(tmp_path, caplog, weights):
    weights["ln_final.bias"][3] = float("nan")
    path = save(tmp_path / "x.pt", weights)
    failing(tmp_path, caplog, "--checkpoint", path, words=["ln_final.bias", "finite"])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--variant", "clip"], ["--variant is clip", "differential"]),
        (["--text-heads", "4"], ["--text-heads is 4", "6"]),
        (["--image-size", "64"], ["--image-size is 64", "4x4"]),
    ],
)
def test_an_option_against_the_keys_stops_it(tmp_path, caplog, args, words):
    failing(tmp_path, caplog, "--checkpoint", FIXTURES / "diffclip-tiny.pt", *args, words=words)


def test_unreadable_heads_ask_for_the_option(tmp_path, caplog):
    failing(tmp_path, caplog, "--checkpoint", FIXTURES / "diffclip-dagger-tiny.pt", words=["pass --text-heads"])


def test_a_folder_in_use_is_left_alone(tmp_path, caplog):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    failing(tmp_path, caplog, "--checkpoint", FIXTURES / "diffclip-tiny.pt", words=["not an empty"])
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_a_failure_while_writing_leaves_nothing(tmp_path, caplog, monkeypatch):
    def full_disk(folder):
        raise OSError("No space left on device")

    monkeypatch.setattr(conversion, "add_remote_code", full_disk)
    failing(tmp_path, caplog, "--checkpoint", FIXTURES / "diffclip-tiny.pt", "--no-processor", words=["No space left"])


def test_a_damaged_file_is_told_by_its_kind(tmp_path, caplog):
    whole = (FIXTURES / "diffclip-tiny.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("letter.txt", "hello")
    torch.save({"state_dict": {"module.a": torch.ones(300)}}, tmp_path / "old", _use_new_zipfile_serialization=False)
    cases = {
        "is empty (0 bytes)": b"",
        "is an HTML page": b"\n<!DOCTYPE html><html>Sign in</html>",
        "is a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "is cut off after 600000 bytes": whole[:600_000],
        "starts with b'Entry not found'": b"Entry not found",
        "a zip archive, but not one of torch.save": (tmp_path / "other.zip").read_bytes(),
        "is damaged: its pickle reads 300 numbers": (tmp_path / "old").read_bytes()[:900],
    }
    for words, content in cases.items():
        caplog.clear()
        (tmp_path / "x.pt").write_bytes(content)
        failing(
            tmp_path, caplog, "--checkpoint", tmp_path / "x.pt", words=[f"--checkpoint {tmp_path / 'x.pt'} ", words]
        )
    failing(tmp_path, caplog, "--checkpoint", tmp_path / "none.pt", words=["none.pt is not a file"])


def test_another_architecture_is_refused(tmp_path, caplog):
    openai = {"visual.conv1.weight": torch.zeros(64, 3, 8, 8), "visual.class_embedding": torch.zeros(64)}
    path = save(tmp_path / "x.pt", openai)
    words = ["no checkpoint of DiffCLIP or of SLIP's CLIP", "visual.class_embedding"]
    failing(tmp_path, caplog, "--checkpoint", path, words=words)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts memory as Linux does")
def test_optimizer_state_stays_on_disk(tmp_path, monkeypatch, weights):
    """`benchmarks/conversion_memory.py` measures a whole conversion at full size."""
    path = save(tmp_path / "x.pt", weights, optimizer={"state": {0: {"exp_avg": torch.ones(50_000_000)}}})
    load, taken = torch.load, []

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def measured_load(*args, **kwargs):
        before = resident()
        checkpoint = load(*args, **kwargs)
        taken.append(resident() - before)
        return checkpoint

    monkeypatch.setattr(torch, "load", measured_load)
    assert conversion.load_state_dict(path).keys() == weights.keys()
    assert path.stat().st_size > 200_000_000
    assert taken[0] < 50_000_000


def test_what_slips_trainer_pickles_is_read(tmp_path, weights):
    """Its arguments, and metrics that are numpy scalars."""
    args = argparse.Namespace(model="DiffCLIP_VITB16", betas=(0.9, 0.98))
    path = save(tmp_path / "x.pt", weights, args=args, best_acc1=np.float64(0.3), epoch=np.int64(3), acc=np.float32(1))
    assert conversion.load_state_dict(path).keys() == weights.keys()


def test_other_forms_of_the_weights(tmp_path, caplog, weights):
    torch.save(weights, tmp_path / "bare.pt")
    torch.save({"state_dict": weights}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save(tmp_path / "half.pt", {key: value.half() for key, value in weights.items()})
    for name in ("bare", "old", "half"):
        folder = tmp_path / name
        caplog.clear()
        assert run("--checkpoint", tmp_path / f"{name}.pt", "--output-dir", folder, "--no-processor") == 0
        model = AutoModel.from_pretrained(folder)
        assert model.dtype == torch.float32
        expected = weights["visual.blocks.0.attn.q_proj.weight"]
        found = model.vision_model.encoder.layers[0].self_attn.q_proj.weight
        assert torch.equal(found, expected.half().float() if name == "half" else expected)
        assert ("Converting to float32 what the checkpoint has as {'float16'" in caplog.text) == (name == "half")
        dtype = "float16" if name == "half" else "float32"
        assert report_of(folder)["source_dtypes"] == {dtype: len(weights)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_report(variant, tmp_path):
    folder = tmp_path / "out"
    assert convert_tiny(variant, folder, "--variant", variant) == 0
    report = report_of(folder)
    checkpoint = FIXTURES / f"{variant}-tiny.pt"
    weights = conversion.load_state_dict(checkpoint)
    assert report["variant"] == variant
    assert report["assumptions"] == report["dropped_keys"] == []
    sha256 = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert report["source"] == {"file": checkpoint.name, "bytes": checkpoint.stat().st_size, "sha256": sha256}
    assert report["files"].keys() == {path.name for path in folder.iterdir()} - {"conversion_report.json"}
    saved = (folder / "model.safetensors").read_bytes()
    assert report["files"]["model.safetensors"]["sha256"] == hashlib.sha256(saved).hexdigest()
    assert report["parameters"]["total"] == sum(value.numel() for value in weights.values())
    assert report["gate"]["errors"].keys() == {"random", "real"}
    assert 0 < report["gate"]["largest_error"] <= PARITY_WITH_ORIGINAL
    for by_output in (errors for kind in report["gate"]["errors"].values() for errors in kind.values()):
        outputs = {"image_embed", "text_embed", "logits_per_image", "vision_hidden", "text_hidden"}
        assert by_output.keys() == outputs
    for tower, blocks in (("vision", "visual.blocks"), ("text", "transformer.resblocks")):
        if f"{blocks}.0.attn.lambda_q1" not in weights:
            assert report["lambda"][tower] is None
            continue
        for layer, found in enumerate(report["lambda"][tower]):
            q1, k1, q2, k2 = (weights[f"{blocks}.{layer}.attn.lambda_{name}"] for name in ("q1", "k1", "q2", "k2"))
            lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer) if variant == "diffclip-star" else 0.8
            expected = math.exp(q1.dot(k1)) - math.exp(q2.dot(k2)) + lambda_init
            assert found == {"lambda_init": pytest.approx(lambda_init), "lambda": pytest.approx(expected, abs=1e-6)}


def test_the_report_has_what_was_assumed(tmp_path):
    assert convert_tiny("diffclip", tmp_path / "out", "--no-processor") == 0
    report = report_of(tmp_path / "out")
    assert report["assumptions"] == ["--variant not given: assuming lambda_init 0.8, that of every released DiffCLIP."]
    assert report["gate"]["errors"].keys() == {"random"}


def swapped_heads(entry: Entry) -> Entry:
    """Return a key table's entry that swaps the first two heads, which a 3-layer tower of width 64 has 16 wide."""
    if entry.original != "visual.blocks.1.attn.q_proj.weight":
        return entry
    order = torch.cat([torch.arange(16, 32), torch.arange(16), torch.arange(32, 64)])
    return replace(entry, layout=Layout(lambda tensor: [tensor[order]], lambda tensors: tensors[0][order]))


@pytest.mark.parametrize("fault", ["table", "epsilon", "file"])
def test_numbers_that_are_not_the_originals_stop_it(tmp_path, caplog, monkeypatch, fault):
    """Faults that no shape tells: a head swapped, a wrong constant, another file than was converted."""
    if fault == "table":
        monkeypatch.setattr(conversion, "key_table_of", lambda *args: [swapped_heads(e) for e in key_table_of(*args)])
    elif fault == "epsilon":
        infer_config = conversion.infer_config

        def with_wrong_constant(*args):
            config = infer_config(*args)
            config.vision_config.diff_norm_eps = 1e-2
            return config

        monkeypatch.setattr(conversion, "infer_config", with_wrong_constant)
    else:
        write_folder = conversion.write_folder

        def with_wrong_weight(model, *args):
            model.text_projection.weight.data[0, 0] += 1
            write_folder(model, *args)

        monkeypatch.setattr(conversion, "write_folder", with_wrong_weight)
    output = {"table": "image_embed", "epsilon": "vision_hidden", "file": "text_embed"}[fault]
    words = ["departs from the original by more than 0.0001", f"{output} (random inputs, eager)"]
    failing(tmp_path, caplog, "--checkpoint", FIXTURES / "diffclip-tiny.pt", words=words)


def test_outputs_that_are_not_finite_stop_it(tmp_path, caplog, weights):
    """Every weight is finite, and yet the original's own numbers overflow."""
    weights["visual.norm.weight"] *= 1e38
    weights["image_projection"] *= 1e38
    path = save(tmp_path / "x.pt", weights)
    failing(tmp_path, caplog, "--checkpoint", path, words=["image_embed (random inputs, eager) by nan"])


def test_slips_own_checkpoint(tmp_path, caplog):
    """It has a head for the self-supervised loss; without it, it is the CLIP baseline."""
    weights = conversion.load_state_dict(FIXTURES / "clip-tiny.pt")
    head = {"image_mlp.layer1.weight": torch.ones(8, 64), "image_mlp.bn1.num_batches_tracked": torch.tensor(3)}
    path = save(tmp_path / "slip.pt", {**weights, **head})
    assert run("--checkpoint", path, "--output-dir", tmp_path / "out", *HEADS["clip"], "--no-processor") == 0
    assert "Dropping SLIP's self-supervised head" in caplog.text
    report = report_of(tmp_path / "out")
    assert report["variant"] == "clip"
    assert report["dropped_keys"] == sorted(head)
    expected, _ = golden("clip", "tiny")
    found = AutoModel.from_pretrained(tmp_path / "out").get_image_features(expected["pixel_values"]).pooler_output
    assert relative_error(found, expected["image_embed"]) <= PARITY_WITH_ORIGINAL


def test_heads_of_slips_small_model():
    """SLIP's ViT-S/16 has 12 heads of 32, not the 6 of 64 that its width suggests."""
    assumptions = []
    assert conversion._heads("vision", 384, None, None, assumptions) == 12
    assert conversion._heads("vision", 768, None, None, assumptions) == 12
    assert conversion._heads("text", 384, None, None, assumptions) == 6
    assert conversion._heads("vision", 384, None, 6, assumptions) == 6
    assert len(assumptions) == 3
    with pytest.raises(conversion.ConversionError, match="--vision-heads is 5; it must divide"):
        conversion._heads("vision", 384, None, 5, assumptions)


def test_options_of_the_two_sources(capsys, caplog, tmp_path):
    for args in (["--checkpoint", "x.pt", "--repo-id", "a/b"], ["--checkpoint", "x.pt", "--token", "t"], []):
        with pytest.raises(SystemExit):
            run("--output-dir", tmp_path / "out", *args)
    assert "--token goes with --repo-id" in capsys.readouterr().err
    args = ["--repo-id", "hammh0a/ViTB16_CC3M", "--variant", "diffclip"]
    failing(tmp_path, caplog, *args, words=["--variant is diffclip", "holds a model of 'clip'"])


def test_the_table_names_every_key_once():
    for differential in (True, False):
        table = key_table(2, 2, differential, differential)
        originals = [entry.original for entry in table]
        ports = [key for entry in table for key in entry.port]
        assert len(set(originals)) == len(originals)
        assert len(set(ports)) == len(ports)


@pytest.fixture(scope="module")
def tokenizer():
    return clip_tokenizer(find_merges_file())


def test_token_ids_are_the_originals(tokenizer):
    cases = json.loads((FIXTURES / "tokens.json").read_text())["same"]
    assert len(cases) > 10
    for case in cases:
        assert tokenizer(case["text"])["input_ids"] == case["ids"], case["text"]


def test_token_ids_where_the_original_repairs_text_first(tokenizer):
    """What the README warns of: these differ, and nothing else does."""
    for case in json.loads((FIXTURES / "tokens.json").read_text())["repaired_by_the_original"]:
        assert tokenizer(case["text"])["input_ids"] != case["ids"], case["text"]


def test_cutting_keeps_the_end_of_text(tokenizer):
    ids = tokenizer("a photo of a very " + "very " * 200 + "old cat", truncation=True)["input_ids"]
    assert len(ids) == 77
    assert (ids[0], ids[-1]) == (49406, 49407)


def test_clips_vocabulary_comes_with_a_checkpoint_of_its_size(tmp_path, weights):
    generator = torch.Generator().manual_seed(0)
    weights["token_embedding.weight"] = torch.randn(49408, 48, generator=generator)
    weights["positional_embedding"] = torch.randn(77, 48, generator=generator)
    path = save(tmp_path / "x.pt", weights)
    assert run("--checkpoint", path, "--output-dir", tmp_path / "out") == 0
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    ids = processor(text=["a photo of a cat"], return_tensors="pt")["input_ids"]
    assert ids.tolist() == [[49406, 320, 1125, 539, 320, 2368, 49407]]
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert model.config.text_config.pad_token_id == processor.tokenizer.pad_token_id == 49407
    assert model.get_text_features(ids).pooler_output.shape == (1, 24)
    # The folder itself is a source for another conversion.
    again = ["--tokenizer", tmp_path / "out", "--output-dir", tmp_path / "again"]
    assert run("--checkpoint", path, *again) == 0


def test_no_vocabulary_to_be_found(tmp_path, caplog, monkeypatch, weights):
    from diffclip_hf.conversion import clip_vocabulary

    weights["token_embedding.weight"] = torch.zeros(49408, 48)
    path = save(tmp_path / "x.pt", weights)
    monkeypatch.setattr(clip_vocabulary, "PACKAGES", ("no_such_package",))
    words = ["no_such_package", "--tokenizer", "--no-processor"]
    failing(tmp_path, caplog, "--checkpoint", path, words=words)
    with gzip.open(tmp_path / "short.txt.gz", "wt") as file:
        file.write("header\na b\n")
    caplog.clear()
    args = ["--tokenizer", tmp_path / "short.txt.gz"]
    failing(tmp_path, caplog, "--checkpoint", path, *args, words=["doesn't hold CLIP's merges"])


def test_the_gate_has_a_picture_of_its_own_where_the_embedded_models_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(parity_gate, "PICTURES", tmp_path)
    (found,) = parity_gate.pictures()
    assert (found.mode, found.size) == ("RGB", (320, 240))
    # The ellipse's middle, and grey beside it.
    assert found.getpixel((130, 110)) == (200, 60, 30)
    assert len(set(found.getpixel((300, 20)))) == 1


def test_the_gate_refuses_what_it_cannot_compare():
    other = DiffCLIPConfig(text_config={"lambda_init": 0.5})
    with pytest.raises(ValueError, match="it must be one number or a name, in both towers"):
        parity_gate.reference_outputs({}, other, {})
    with pytest.raises(conversion.ConversionError, match=r"An output has shape \(2,\); the original's is \(3,\)"):
        parity_gate.relative_error(torch.ones(2), torch.ones(3))
    # By hand: the largest difference is 1, the largest magnitude 4.
    assert parity_gate.relative_error(torch.tensor([1.0, -3.0]), torch.tensor([1.0, -4.0])) == 0.25
