"""What the commands share: mistakes are one line, faults keep their traceback, and extras are named."""

import importlib
import importlib.util
import logging
import runpy
import sys

import pytest
import torch

from diffclip_hf.common.commands import (
    CommandParser,
    closest,
    require_extra,
    run_command,
    started_as,
    stop_without_extra,
)
from diffclip_hf.common.json_files import read_json_object


logger = logging.getLogger("a command")


def raising(error: BaseException):
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    "error",
    [
        ValueError("two\n  lines"),
        FileNotFoundError("two lines"),
        ImportError("two lines"),
        FloatingPointError("two lines"),
        torch.OutOfMemoryError("two lines"),
    ],
)
def test_a_mistake_is_one_line_and_status_1(error, caplog):
    assert run_command(raising(error), logger) == 1
    assert caplog.messages == ["two lines"]


def test_a_fault_keeps_its_traceback():
    with pytest.raises(KeyError):
        run_command(raising(KeyError("x")), logger)
    assert run_command(lambda: None, logger) == 0


def test_what_is_spelt_alike():
    assert closest("learning_rte", ["learning_rate", "seed"]) == "; did you mean learning_rate?"
    assert closest("xyz", ["learning_rate", "seed"]) == "."


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["--datset", "x"], "unrecognized arguments: --datset x; did you mean --dataset? See --help."),
        (["--data", "x"], "unrecognized arguments: --data x"),
        (["--number", "x"], "argument --number: invalid int value: 'x'. See --help."),
    ],
)
def test_the_parser_says_it_in_one_line(line, said, capsys):
    parser = CommandParser(prog="measure")
    parser.add_argument_group("g").add_argument("--dataset")
    parser.add_argument("--number", type=int)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(line)
    assert ended.value.code == 2
    (written,) = capsys.readouterr().err.splitlines()
    assert written.startswith(f"measure: error: {said}")


def test_a_missing_extra_is_named(monkeypatch):
    require_extra("training", "torch")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"^peft can't be imported; pip install 'diffclip-hf\[training\]'\.$"):
        require_extra("training", "torch", "peft")
    with pytest.raises(ImportError, match=r"peft can't be imported; pip install 'diffclip-hf\[training\]'"):
        stop_without_extra(ModuleNotFoundError(name="peft.tuners"), "training", "diffclip_hf.train")


def test_a_lost_module_of_the_package_is_no_missing_extra():
    with pytest.raises(ModuleNotFoundError, match="lost"):
        stop_without_extra(ModuleNotFoundError("lost", name="diffclip_hf.training.trainer"), "training", "__main__")


@pytest.mark.filterwarnings("ignore:'diffclip_hf.train' found in sys.modules:RuntimeWarning")
def test_training_without_accelerate_ends_with_one_line(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("diffclip_hf.train", run_name="__main__")
    assert ended.value.code == 1
    assert caplog.messages == ["accelerate can't be imported; pip install 'diffclip-hf[training]'."]


@pytest.mark.parametrize(
    ("line", "is_module", "usage"),
    [
        ("../conversion/push_to_hub.py", False, "python ../conversion/push_to_hub.py"),
        ("/site-packages/diffclip_hf/conversion/push_to_hub.py", True, "python -m diffclip_hf.conversion.push_to_hub"),
        ("-c", False, "python -m diffclip_hf.conversion.push_to_hub"),
    ],
)
def test_a_command_is_named_as_it_was_started(line, is_module, usage, monkeypatch):
    monkeypatch.setattr(sys, "argv", [line])
    spec = importlib.util.find_spec("diffclip_hf.conversion.push_to_hub") if is_module else None
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    assert started_as("diffclip_hf.conversion.push_to_hub") == usage


@pytest.mark.parametrize("command", ["convert_original_checkpoint", "convert_to_original", "push_to_hub"])
def test_help_of_the_conversion_shows_both_ways_to_start_it(command, capsys):
    module = importlib.import_module(f"diffclip_hf.conversion.{command}")
    with pytest.raises(SystemExit):
        module.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert f"python conversion/{command}.py " in shown
    assert f"python -m diffclip_hf.conversion.{command} " in shown


def test_a_key_given_twice_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "a", "model_type": "b"}')
    with pytest.raises(ValueError, match=r"config\.json isn't JSON: 'model_type' is given twice"):
        read_json_object(tmp_path / "config.json")
