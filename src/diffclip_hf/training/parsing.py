"""The command line of `python -m diffclip_hf.train`, over the options of a file or a recipe."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any

from ..common.options import OptionGroup, OptionParser, read_options
from .arguments import DiffCLIPTrainingArguments
from .option_checks import check_options
from .options import DataArguments, ModelArguments


RECIPES = resources.files(__package__) / "recipes"
USAGE = """python -m diffclip_hf.train --model_name_or_path MODEL --train_data DATA --output_dir FOLDER [OPTION ...]
       accelerate launch -m diffclip_hf.train --config FILE --train_data DATA --output_dir FOLDER [OPTION ...]"""
DESCRIPTION = "Train or fine-tune DiffCLIP on images with captions, or on images with labels."
EPILOG = "Every option can also stand in the file that --config names, without the dashes: `learning_rate: 1e-4`."


def _names(arguments: type) -> set[str]:
    return {field.name for field in fields(arguments)}


BATCH = {"global_batch_size", "contrastive_chunk_size"}
KEEPING = {"lock", "layer_decay", "teacher", "distill_weight", "distill_feature_weight"}
GROUPS = (
    OptionGroup("what is trained", "Give model_name_or_path or model_config.", _names(ModelArguments) - KEEPING),
    OptionGroup("what it is trained and evaluated on", "train_data is required.", _names(DataArguments) - BATCH),
    OptionGroup("how large a batch is", None, BATCH),
    OptionGroup("how a fine-tuned model forgets less", "Each can be used with the others.", KEEPING),
    OptionGroup(
        "how it is trained (Transformers' TrainingArguments)",
        "The ones that are needed most: output_dir, num_train_epochs or max_steps, per_device_train_batch_size, "
        "learning_rate, warmup_steps, bf16, eval_strategy, save_steps, resume_from_checkpoint.",
        _names(DiffCLIPTrainingArguments) - BATCH - KEEPING,
    ),
)
# Options of Transformers that have no effect here, and are refused where they ask for one.
HIDDEN = ("do_train", "do_eval", "do_predict", "local_rank")
# What YAML's booleans and null stand for in options that take words.
BOOLEAN_WORDS: dict[str, dict[bool | None, Any]] = {
    "resume_from_checkpoint": {True: "last", False: None},
    "report_to": {False: "none", None: "none"},
    "fsdp": {True: True, False: None},
    "trackio_static_space_id": {False: False},
}


def recipe_names() -> list[str]:
    """Return the names of the package's recipes."""
    return sorted(entry.name.removesuffix(".yaml") for entry in RECIPES.iterdir() if entry.name.endswith(".yaml"))


def read_config(name: str) -> dict[str, Any]:
    """Return the options in a YAML or JSON file, or in the package's recipe of that name.

    Raises:
        ValueError: There is no such file or recipe, or it doesn't hold options.
    """
    recipe = RECIPES / f"{name}.yaml"
    path = Path(name)
    if not path.is_file() and not recipe.is_file():
        raise ValueError(f"--config is {name!r}; it must be a file or one of the recipes {', '.join(recipe_names())}.")
    options = read_options(path if path.is_file() else Path(str(recipe)), f"--config {name}")
    if isinstance(options.get("model_config"), dict):
        options["model_config"] = json.dumps(options["model_config"], default=str)
    return options


def parse_arguments(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, DiffCLIPTrainingArguments]:
    """Return the options of a command line, over those of its `--config`.

    Raises:
        ValueError: The configuration can't be read, an option doesn't exist, its value isn't of its type, it would
            have no effect, or options contradict.
    """
    parser = OptionParser(
        (ModelArguments, DataArguments, DiffCLIPTrainingArguments),
        BOOLEAN_WORDS,
        GROUPS,
        HIDDEN,
        prog="python -m diffclip_hf.train",
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="A YAML or JSON file of options, or a recipe with the paper's settings: "
        f"{', '.join(recipe_names())}. Options on the command line override it.",
    )
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", nargs="?", action="append")
    names = [name for name in first.parse_known_args(argv)[0].config or [] if name is not None]
    if len(names) > 1:
        raise ValueError(f"--config is given {len(names)} times; put the options into one file.")
    options = read_config(names[0]) if names else {}
    what = f"--config {names[0]}" if names else "the command line"
    model_args, data_args, training_args = parser.parse(argv, options, what)
    check_options(model_args, data_args, training_args, given=parser.given(argv) | options.keys())
    return model_args, data_args, training_args


__all__ = ["parse_arguments", "read_config"]
