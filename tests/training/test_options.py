"""The options of training: a file's have the command line's types, and what can't work is said before the work."""

import dataclasses
import json
import re
import sys

import pytest
import torch
from tiny import TOWER

from diffclip_hf import train
from diffclip_hf.common.options import read_options
from diffclip_hf.train import main
from diffclip_hf.training import DiffCLIPTrainingArguments
from diffclip_hf.training.model_configs import build_config
from diffclip_hf.training.options import DataArguments, ModelArguments
from diffclip_hf.training.parsing import parse_arguments


BASE = {"model_config": {}, "train_data": "pairs", "use_cpu": True, "report_to": "none"}
LINE = ["--use_cpu", "--report_to", "none"]
NEW = ["--model_config", "{}", "--train_data", "pairs"]


@pytest.fixture
def parsed(tmp_path):
    """Parse a YAML file of one option over a few that are needed; return the three parts' fields."""

    def parse(text: str, *line: str) -> dict:
        path = tmp_path / "options.yaml"
        given = {row.split(":")[0] for row in text.splitlines()}
        base = {name: value for name, value in BASE.items() if name not in given}
        path.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in base.items()) + text)
        parts = parse_arguments(["--config", str(path), "--output_dir", str(tmp_path / "out"), *line])
        return {name: value for part in parts for name, value in vars(part).items()}

    return parse


# Types --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("resume_from_checkpoint: true", "resume_from_checkpoint", "last"),
        ("resume_from_checkpoint: no", "resume_from_checkpoint", None),
        ("save_strategy: no", "save_strategy", "no"),
        ("eval_strategy: off", "eval_strategy", "no"),
        ("logging_strategy: false", "logging_strategy", "no"),
        ("report_to: no", "report_to", []),
        ("report_to: [none]", "report_to", []),
        ("report_to: null", "report_to", []),
        # YAML 1.1 takes it for a text.
        ("learning_rate: 5e-4", "learning_rate", 0.0005),
        ("max_steps: '7'", "max_steps", 7),
        ("num_train_epochs: 3", "num_train_epochs", 3.0),
        ("bf16: 0", "bf16", False),
        ("pad_to_max_length: 'yes'", "pad_to_max_length", True),
        ("run_name: 5", "run_name", "5"),
        ("train_data: 2024", "train_data", "2024"),
        ("disable_tqdm: null", "disable_tqdm", False),
        ("ddp_find_unused_parameters: null", "ddp_find_unused_parameters", None),
        ("zero_shot_data: x\nzero_shot_templates: a {}", "zero_shot_templates", ["a {}"]),
        ("crop_scale: [1, 1.0]", "crop_scale", [1.0, 1.0]),
        (
            "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-5}",
            "lr_scheduler_kwargs",
            {"min_lr": 0.00001},
        ),
        (
            "gradient_checkpointing: true\ngradient_checkpointing_kwargs: {use_reentrant: no}",
            "gradient_checkpointing_kwargs",
            {"use_reentrant": False},
        ),
    ],
)
# Transformers' newer name of it isn't known everywhere.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_a_files_value_is_that_of_the_command_line(parsed, text, name, value):
    found = parsed(text)[name]
    assert found == value
    assert type(found) is type(value) or isinstance(found, str)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rte: 1", r"has 'learning_rte', which isn't an option; did you mean learning_rate\?"),
        ("1: 2", "has '1', which isn't an option"),
        ("yes: 2", "has 'True', which isn't an option"),
        ("learning_rate: true", "learning_rate .* is true; it must be a number"),
        ("learning_rate: fast", "learning_rate .* is 'fast'; it must be a number"),
        ("learning_rate: [1]", "learning_rate .* is a list; it must be a number"),
        ("warmup_steps: null", "warmup_steps .* is null; it must be a number, or left out"),
        ("max_steps: 1.5", "max_steps .* is 1.5; it must be a whole number"),
        ("use_cpu: maybe", "use_cpu .* is 'maybe'; it must be true or false"),
        ("save_strategy: true", "save_strategy .* is true; it must be one of no, steps, epoch, best"),
        ("save_strategy: stps", r"save_strategy .* is 'stps'; .*; did you mean steps\?"),
        ("hub_model_id: true", "hub_model_id .* is true; it must be a text"),
        ("run_name: {a: 1}", "run_name .* holds fields by name; it must be a text"),
        ("train_data: [a, b]", "train_data .* is a list; it must be a text"),
        ("crop_scale: []", "crop_scale .* is an empty list"),
        ("crop_scale: 0.5", r"crop_scale is \[0.5\]; it must be two numbers"),
        ("crop_scale: [[0.5, 1]]", r"crop_scale .* is \[0.5, 1\]; it must be a list of numbers"),
        ("lr_scheduler_kwargs: [1]", "lr_scheduler_kwargs .* is a list; it must be fields by name"),
        ("lr_scheduler_kwargs: 5", "lr_scheduler_kwargs is '5'; it must hold fields by name"),
        ("lr_scheduler_kwargs: {min_lrr: 1}", "unexpected keyword argument 'min_lrr'"),
        ("accelerator_config: {evn: 1}", "unexpected keyword argument 'evn'"),
        ("max_steps: 1\nmax_steps: 2", r"max_steps is given twice \(line 1\)"),
        ("model_config: {projection_dim: 1, projection_dim: 2}", "projection_dim is given twice"),
        ("a: b: c", r"isn't YAML or JSON: mapping values are not allowed here \(line 5\)"),
        ("? [a]\n: 1", "isn't YAML or JSON"),
    ],
)
def test_a_files_value_that_doesnt_fit(parsed, text, words):
    with pytest.raises(ValueError, match=words) as raised:
        parsed(text)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", '{"a": 1, "a": 2}', "'a' is given twice"),
        ("a.json", "[" * 100_000, "isn't JSON"),
        ("a.yaml", "[" * 100_000, "isn't YAML or JSON"),
        ("a.yaml", "- a", "holds a list; it must hold options by name"),
        ("a.yaml", "", "holds nothing"),
        ("a.yaml", "!!python/object:os.system {}", "isn't YAML or JSON"),
        ("a.yaml", b"\xff\xfe\x00", "can't be read"),
    ],
)
def test_a_file_that_isnt_one_of_options(name, text, words, tmp_path):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=words):
        read_options(tmp_path / name, "the file")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["--learning_rte", "1"], r"'--learning_rte' isn't an option; did you mean --learning_rate"),
        (["--learn", "1"], "'--learn' isn't an option"),
        (["--learning_rate", "x"], "learning-rate: invalid float value: 'x'; see --help"),
        (["--task", "x"], "--task: invalid choice: 'x'"),
        (["--config"], "--config: expected one argument"),
        (["--config", "diffclip-vitb16", "--config", "clip-vitb16"], "--config is given 2 times"),
        (["--lr_scheduler_kwargs", "{a"], "lr_scheduler_kwargs {a isn't JSON"),
    ],
)
def test_a_command_line_that_doesnt_fit(line, words, capsys):
    with pytest.raises(ValueError, match=words):
        parse_arguments([*NEW, *LINE, *line])
    assert capsys.readouterr().err == ""


def test_without_options_the_command_says_what_is_missing(caplog):
    assert main([]) == 1
    (said,) = caplog.messages
    assert "model_name_or_path" in said


# Configurations -----------------------------------------------------------------------------------------------------


def test_help_shows_the_projects_own_options_first_and_each_once(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse_arguments(["--help"])
    shown = capsys.readouterr().out
    flags = re.findall(r"^  (--[a-z_0-9-]+)", shown, flags=re.MULTILINE)
    assert flags[0] == "--config"
    own = [f"--{field.name}" for cls in (ModelArguments, DataArguments) for field in dataclasses.fields(cls)]
    own += ["--contrastive_chunk_size", "--lock", "--layer_decay", "--distill_weight", "--distill_feature_weight"]
    assert set(flags[1 : len(own) + 1]) == {*own}
    assert flags[len(own) + 1] == "--output_dir"
    others = {f"--{field.name}" for field in dataclasses.fields(DiffCLIPTrainingArguments) if field.init}
    assert others - set(flags) == {"--do_train", "--do_eval", "--do_predict", "--local_rank"}
    assert len(set(flags)) == len(flags)
    assert not any("-" in flag[2:] for flag in flags)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hiden": 1}, "model_config.* has 'hiden', which isn't a field"),
        ({"text_config": {"hiden_size": 32}}, r"text_config of .* has 'hiden_size', .* did you mean hidden_size"),
        ({"vision_config": {"vocab_size": 32}}, "vision_config of .* has 'vocab_size', which isn't a field"),
        ({"text_config": 5}, "text_config of .* is 5; it must hold fields by name"),
        ({"projection_dim": "wide"}, "wrong kind.*'projection_dim' expected int, got str"),
        ({"vision_config": {"image_size": [48]}}, "wrong kind.*'image_size' expected int, got list"),
        ({"id2label": 5}, "wrong kind"),
        ({"model_type": "clip"}, "model_type .* is 'clip'; it must be 'diffclip'"),
    ],
)
def test_fields_that_a_configuration_hasnt(fields, words, parsed, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    for given in (json.dumps(fields), str(tmp_path / "config.json")):
        with pytest.raises(ValueError, match=words):
            build_config(given)
    with pytest.raises(ValueError, match=words):
        parsed(f"model_config: {json.dumps(fields)}")


def test_a_saved_configuration_is_one_of_known_fields(tmp_path):
    config = build_config(json.dumps({"text_config": TOWER, "num_labels": 3}))
    config.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    for given in (text, str(tmp_path / "config.json"), str(tmp_path)):
        assert build_config(given).to_diff_dict() == config.to_diff_dict()
    # As Transformers has it, the class itself keeps what it doesn't know.
    (tmp_path / "config.json").write_text(json.dumps({**json.loads(text), "of_another_library": 1}))
    assert build_config(str(tmp_path)).of_another_library == 1


# Before the work ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["--model_name_or_path", "a/b", "--tokenizer", "openai/clip-vit-base-patch16"], "tokenizer .* no effect"),
        (["--lora_alpha", "4"], "lora_alpha .* no effect without lora_rank"),
        (["--linear_probe"], "linear_probe .* no effect without task='image-classification'"),
        (["--task", "image-classification", "--pad_to_max_length"], "pad_to_max_length .* task='contrastive'"),
        (["--task", "image-classification", "--contrastive_chunk_size", "2"], "contrastive_chunk_size .* no effect"),
        (["--task", "image-classification", "--zero_shot_data", "x"], "zero_shot_data .* no effect"),
        (["--zero_shot_split", "test"], "zero_shot_split .* without zero_shot_data"),
        (["--zero_shot_templates", "a {}"], "zero_shot_templates .* without zero_shot_data"),
        (["--eval_split", "validation"], "eval_split .* without eval_data"),
        (["--label_column", "x"], "label_column .* no effect"),
        (["--train_data", "x.tar", "--image_column", "x"], "image_column .* on tar shards"),
        (["--train_data", "x.tar", "--data_seed", "1"], "data_seed .* on tar shards, whose order goes by seed"),
        (["--train_data", "x.tar", "--train_split", "x"], "train_split .* on tar shards"),
        (["--shuffle_buffer", "5"], "shuffle_buffer .* without tar shards"),
        (["--global_batch_size", "8", "--per_device_train_batch_size", "8"], "per_device_train_batch_size .* beside"),
        (["--save_strategy", "no", "--save_steps", "5"], "save_steps .* without save_strategy='steps'"),
        (["--eval_steps", "5"], "eval_steps .* without eval_strategy='steps'"),
        (["--hub_model_id", "a/b"], "hub_model_id .* without push_to_hub"),
        (["--do_train"], "do_train .* train_data is trained on"),
        (["--fsdp_config", "{}"], "fsdp_config .* without fsdp"),
    ],
)
def test_options_without_effect(line, words):
    base = ["--train_data", "pairs"] if "--model_name_or_path" in line else NEW
    with pytest.raises(ValueError, match=words):
        parse_arguments([*base, *LINE, *line])


def test_what_asks_for_no_effect_is_taken(parsed):
    parsed("pad_to_max_length: false\ntask: image-classification\nlora_alpha: null\npush_to_hub: false")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["--max_steps", "0"], "max_steps is 0; it must be at least 1, or -1"),
        (["--num_train_epochs", "0"], "num_train_epochs is 0.0; it must be more than 0"),
        (["--learning_rate", "nan"], "learning_rate is nan; it must be at least 0"),
        (["--weight_decay", "-1"], "weight_decay is -1.0"),
        (["--gradient_accumulation_steps", "0", "--global_batch_size", "4"], "gradient_accumulation_steps is 0"),
        (["--global_batch_size", "0"], "global_batch_size is 0"),
        (["--lora_rank", "-1"], "lora_rank is -1"),
        (["--lora_rank", "2", "--lora_alpha", "0"], "lora_alpha is 0.0; it must be more than 0"),
        (["--lora_rank", "2", "--lora_alpha", "inf"], "lora_alpha is inf"),
        (["--lora_rank", "2", "--lora_dropout", "nan"], "lora_dropout is nan; it must be in 0..1, not 1"),
        (["--save_steps", "0"], "save_steps is 0.0; it must be more than 0; save_strategy='no'"),
        (["--save_total_limit", "0"], "save_total_limit is 0; it must be at least 1"),
        (["--dataloader_num_workers", "1", "--dataloader_prefetch_factor", "0"], "dataloader_prefetch_factor is 0"),
        (["--adam_beta1", "nan"], "adam_beta1 is nan; it must be in 0..1, not 1"),
        (["--adam_beta2", "1"], "adam_beta2 is 1.0"),
        (["--adam_epsilon=-1"], "adam_epsilon is -1.0; it must be at least 0"),
        (["--optim_args", "x"], "optim_args is 'x'"),
        (["--fp16"], "fp16 is True, which needs a GPU"),
        (["--eval_strategy", "epoch"], "eval_strategy is 'epoch'; it needs eval_data or zero_shot_data"),
        (["--zero_shot_data", "x", "--zero_shot_templates", "a photo"], "templates has 'a photo'"),
        (["--zero_shot_data", "x", "--zero_shot_templates", "imagenet", "a {}"], "templates has 'imagenet'"),
        (["--metric_for_best_model", "acc"], "metric_for_best_model is 'acc'; .*nothing"),
        (["--eval_data", "x", "--metric_for_best_model", "accuracy"], "'accuracy'; .*text_to_image_recall@5"),
        (["--report_to", "wandbb"], "report_to is 'wandbb', which isn't installed"),
        (["--model_config", '{"text_config": {"hiden_size": 1}}'], "hiden_size"),
    ],
)
def test_what_cant_work_is_said_before_the_work(line, words):
    with pytest.raises(ValueError, match=words):
        parse_arguments([*NEW, *LINE, *line])


def test_missing_packages_are_named_before_the_work(monkeypatch):
    for package, line in (("peft", ["--lora_rank", "2"]), ("datasets", [])):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(ImportError, match=rf"{package} can't be imported; pip install .*training"):
                parse_arguments([*NEW, *LINE, *line])


def test_output_folders_that_cant_be_written(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(train, "contrastive_parts", lambda *args: pytest.fail("worked"))
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    (tmp_path / "run" / "model.safetensors").mkdir(parents=True)
    for name, words in (
        ("file", "which is a file"),
        ("link", "isn't there"),
        ("file/below", "can't be written"),
        ("run", "model.safetensors exists and is not a file"),
    ):
        caplog.clear()
        assert main([*NEW, *LINE, "--output_dir", str(tmp_path / name)]) == 1
        assert words in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "run"]


def test_what_is_resumed_must_be_a_checkpoint(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(train, "contrastive_parts", lambda *args: pytest.fail("worked"))
    line = [*NEW, *LINE, "--output_dir", str(tmp_path / "out"), "--resume_from_checkpoint", str(tmp_path)]
    assert main(line) == 1
    assert "has no trainer_state.json: no checkpoint" in caplog.text


# What the processor can ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capabilities", "option", "warned"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, "True", True),
        ({"architecture": "aarch64"}, "True", True),
        ({"avx2": True}, "False", False),
        ({"avx512_bf16": True, "amx_bf16": False}, "True", False),
        ({"avx512_bf16": False, "amx_bf16": True}, "True", False),
        ({"arm_bf16": True}, "True", False),
    ],
)
def test_bf16_without_instructions_for_it_is_warned_of(tmp_path, caplog, monkeypatch, capabilities, option, warned):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    # The folder is a file, so that the command ends before it trains.
    (tmp_path / "out").touch()
    assert main([*LINE, *NEW, "--bf16", option, "--output_dir", str(tmp_path / "out")]) == 1
    assert ("no bfloat16 instructions" in caplog.text) == warned
