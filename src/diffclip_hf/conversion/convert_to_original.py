"""Write a converted model's weights as a checkpoint of the original code: the reverse of the conversion.

  python conversion/convert_to_original.py diffclip-vitb16 checkpoint.pt
  python -m diffclip_hf.conversion.convert_to_original diffclip-vitb16 checkpoint.pt

The first form is for a clone of the repository, the second for an installed package.
"""

import argparse
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from diffclip_hf import DiffCLIPConfig, DiffCLIPModel

from ..common.commands import CommandParser, run_command, started_as
from ..common.json_files import read_json_object
from ..common.loading import load_config
from ..common.whole_files import check_output_file, write_whole
from .original_checkpoint import ConversionError, check_tensors, listed
from .original_keys import key_table_of


logger = logging.getLogger("convert_to_original")

_SHARD = re.compile(r"[\w.-]+\.safetensors")


def check_config(config: DiffCLIPConfig) -> None:
    """Raise for a model that the original's code would compute differently, and say what its file won't tell.

    Raises:
        ConversionError: A field differs from what is fixed in the original's code.
    """
    vision, text = config.vision_config, config.text_config
    vision_eps = 1e-5 if vision.attention_type == "differential" else 1e-6
    fixed = [
        (vision, "hidden_act", "gelu"),
        (text, "hidden_act", "quick_gelu"),
        (vision, "layer_norm_eps", vision_eps),
        (text, "layer_norm_eps", 1e-5),
        (vision, "diff_norm_eps", 1e-5),
        (text, "diff_norm_eps", 1e-5),
        (vision, "pre_layernorm", False),
        (vision, "patch_bias", True),
        # The original pools at the largest id of a text.
        (text, "eos_token_id", text.vocab_size - 1),
    ]
    for tower, field, value in fixed:
        if getattr(tower, field) != value:
            raise ConversionError(
                f"{type(tower).__name__}.{field} is {getattr(tower, field)!r}; the original only has {value!r}."
            )
    for name, tower in (("vision", vision), ("text", text)):
        if tower.attention_type == "differential":
            logger.warning("The file won't tell lambda_init, which is %r in the %s tower.", tower.lambda_init, name)
        else:
            logger.warning(
                "The file won't tell the %s tower's heads, of which it has %d.", name, tower.num_attention_heads
            )


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    """Return a folder's tensors as they are stored, from one safetensors file or from its shards.

    Raises:
        ConversionError: There is no such file, or it is damaged.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        shards = read_json_object(index).get("weight_map")
        if not isinstance(shards, dict) or not all(_SHARD.fullmatch(str(name)) for name in shards.values()):
            raise ConversionError(f"{index} has no weight_map from each key to a shard of {folder}.")
        names = sorted(set(shards.values()))
    state_dict: dict[str, torch.Tensor] = {}
    for name in names:
        try:
            found = load_file(folder / name)
        except (OSError, SafetensorError) as error:
            raise ConversionError(f"{folder / name} can't be read as safetensors: {error}") from error
        if twice := sorted(found.keys() & state_dict.keys()):
            raise ConversionError(f"{folder / name} gives {listed(twice)} anew, which another shard has.")
        state_dict.update(found)
    check_tensors(state_dict)
    return state_dict


def check_layers(keys: Iterable[str], config: DiffCLIPConfig) -> None:
    """Raise unless keys of this port have the layers that a configuration says; before it's built, which takes long.

    Raises:
        ConversionError: It says which tower, and the number in the keys and in the configuration.
    """
    keys = list(keys)
    for name, tower in (("vision", config.vision_config), ("text", config.text_config)):
        pattern = re.compile(rf"{name}_model\.encoder\.layers\.([^.]*)\.")
        layers = {match[1] for match in map(pattern.match, keys) if match}
        if len(layers) != tower.num_hidden_layers:
            raise ConversionError(
                f"The weights have {len(layers)} layers in the {name} tower; num_hidden_layers in config.json is "
                f"{tower.num_hidden_layers}."
            )


def original_state_dict(state_dict: Mapping[str, torch.Tensor], config: DiffCLIPConfig) -> dict[str, torch.Tensor]:
    """Return a model's weights under the original's keys and in its shapes, in the dtypes that they have.

    Args:
        state_dict: Of a `DiffCLIPModel`.
        config: Its configuration.

    Raises:
        ConversionError: A key is missing, unexpected or of another shape than the configuration's.
    """
    check_layers(state_dict, config)
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in DiffCLIPModel(config).state_dict().items()}
    missing, unexpected = sorted(shapes.keys() - state_dict.keys()), sorted(state_dict.keys() - shapes.keys())
    if missing or unexpected:
        raise ConversionError(
            f"The keys aren't those of a DiffCLIPModel. Missing: {listed(missing)}. Unexpected: {listed(unexpected)}."
        )
    for key, shape in shapes.items():
        if state_dict[key].shape != shape:
            raise ConversionError(
                f"Key {key!r} has shape {tuple(state_dict[key].shape)}; config.json says {tuple(shape)}."
            )
    table = key_table_of(config)
    return {entry.original: entry.layout.to_original([state_dict[key] for key in entry.port]) for entry in table}


def convert(folder: Path, output: Path) -> None:
    """Write `{"state_dict": {"module." + key: tensor}}`, as the original's trainer does, without optimizer state.

    Args:
        folder: Of a saved `DiffCLIPModel`.
        output: A file that is new, or empty.

    Raises:
        ConversionError: The folder isn't such a model's, its model can't be the original's, or the file exists.
    """
    check_output_file(output)
    if output.exists() and output.stat().st_size > 0:
        raise ConversionError(f"FILE.pt {output} exists and is not an empty file; name a new one.")
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ConversionError(
            f"DIR {folder} has no config.json; it must be a folder that a DiffCLIP model was saved to."
        )
    config = cast(DiffCLIPConfig, load_config(folder, DiffCLIPConfig))
    check_config(config)
    state_dict = original_state_dict(load_folder(folder), config)
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in state_dict.values())
    if set(dtypes) != {"float32"}:
        logger.warning(
            "The folder's tensors, and so the file's, are %s (number of tensors), not float32.", dict(dtypes)
        )

    content = {"state_dict": {f"module.{key}": tensor for key, tensor in state_dict.items()}}

    def write(beside: Path) -> None:
        # By a file, since a path's name would become part of the archive.
        with beside.open("wb") as file:
            torch.save(content, file)

    write_whole(output, write)
    logger.info("Wrote %s: %d tensors.", output, len(state_dict))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = CommandParser(
        prog=started_as("diffclip_hf.conversion.convert_to_original"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", help="A saved DiffCLIPModel's folder.")
    parser.add_argument("output", metavar="FILE.pt", help="The file to write, new or empty.")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 1, with the reason on the log, where the folder doesn't fit."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    args = parse_args(argv)
    return run_command(lambda: convert(Path(args.folder).expanduser(), Path(args.output).expanduser()), logger)


if __name__ == "__main__":
    sys.exit(main())
