"""Turn a CLIPModel of Transformers, with its processor, into a DiffCLIPModel with standard attention, or back.

  python conversion/convert_clip_checkpoint.py --model openai/clip-vit-base-patch16 --output-dir clip-vitb16
  python -m diffclip_hf.conversion.convert_clip_checkpoint --model clip-vitb16 --output-dir back --to-clip

The first form is for a clone of the repository, the second for an installed package; both take a folder on this
machine or an id on the Hub.

The folder is written only if it gives the numbers and the inputs of what it was made from;
`conversion_report.json` in it says how closely, and what was assumed.
"""

import argparse
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from diffclip_hf import DiffCLIPConfig, DiffCLIPModel, DiffCLIPProcessor, DiffCLIPTokenizer, add_remote_code

from ..common.commands import CommandParser, run_command, started_as
from ..common.fitting import PIXELS
from ..common.loading import (
    OLD_END,
    check_image_processor,
    check_tokenizer,
    commit_of,
    find_source,
    load_config,
    load_model,
    load_processor,
    load_tokenizer,
)
from ..common.whole_files import check_output_folder, written_whole
from ..model.hub_cache_diffclip import checked_downloads
from ..model.image_fetching_diffclip import one_line
from ..model.image_processing_diffclip import SLIPEvaluationTransform
from .download import add_hub_options
from .original_checkpoint import ConversionError
from .parity_gate import TEXTS, Inputs, converted_outputs, count_parameters, measure, pictures, random_inputs
from .report import assume, write_report


logger = logging.getLogger("convert_clip_checkpoint")

# Of the largest magnitude of each output.
MAX_ERROR = 1e-5
# The fields of CLIP's configurations, which DiffCLIP's have under the same names, but for those of both towers.
FIELDS = {
    "text_config": tuple(name for name in CLIPTextConfig.__annotations__ if name != "projection_dim"),
    "vision_config": tuple(name for name in CLIPVisionConfig.__annotations__ if name != "projection_dim"),
}
WHOLE_FIELDS = ("projection_dim", "logit_scale_init_value", "initializer_factor")
# What makes a DiffCLIP a CLIP of Transformers, beside standard attention.
CLIP_TOWER = {"attention_type": "standard", "pre_layernorm": True, "patch_bias": False}
# DiffCLIP's name of a module → Transformers'.
RENAMED = {"pre_layernorm": "pre_layrnorm"}
IMAGE_SETTINGS = (*PIXELS, "do_convert_rgb")
# What a text may hold: spaces, capitals, accents, emoji, the special tokens by name, nothing.
PROBES = [*TEXTS, "  Two  spaces\nand a line ", "Crème brûlée, 2×", "a 🍕!!", "<|endoftext|> it's", ""]


# Configurations -----------------------------------------------------------------------------------------------------


def check_config(config: CLIPConfig | DiffCLIPConfig, source: str) -> None:
    """Raise for a model that can't be described in the other's configuration.

    Raises:
        ConversionError: It names the field, its value and what is allowed.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ConversionError(f"{source} is quantised; convert the model that it was made from.")
    text, vision = config.text_config, config.vision_config
    owner = type(text).__name__
    if not isinstance(text.eos_token_id, int):
        raise ConversionError(f"{owner}.eos_token_id is {text.eos_token_id}; it must be one token's id.")
    for tower in (text, vision):
        if (causal := getattr(tower, "is_causal", None)) is not None:
            raise ConversionError(f"{type(tower).__name__}.is_causal is {causal}; it must not be set.")
    if isinstance(config, CLIPConfig):
        return
    for tower in (text, vision):
        for field, value in CLIP_TOWER.items():
            if (found := getattr(tower, field, value)) != value:
                raise ConversionError(f"{type(tower).__name__}.{field} is {found!r}; a CLIPModel only has {value!r}.")
    if text.eos_token_id == OLD_END:
        raise ConversionError(
            f"{owner}.eos_token_id is {OLD_END}, for which a CLIPModel pools at the largest id of a text instead."
        )


def described(config: CLIPConfig | DiffCLIPConfig, source: str, **ends: int | None) -> Any:
    """Return the configuration of the same model as DiffCLIP's, of CLIP's, or as CLIP's, of DiffCLIP's.

    Args:
        config: One that `check_config` allows.
        source: Where it comes from.
        ends: Fields of the text tower that differ: `bos_token_id` and `eos_token_id`.

    Raises:
        ConversionError: A field has a value that the other configuration doesn't allow.
    """
    to_diffclip = isinstance(config, CLIPConfig)
    towers = {
        tower: {name: getattr(getattr(config, tower), name) for name in names} for tower, names in FIELDS.items()
    }
    towers["text_config"] |= ends
    if to_diffclip:
        towers["text_config"]["attention_type"] = CLIP_TOWER["attention_type"]
        towers["vision_config"] |= CLIP_TOWER
    whole = {name: getattr(config, name) for name in WHOLE_FIELDS}
    other: Any = DiffCLIPConfig if to_diffclip else CLIPConfig
    try:
        return other(**towers, **whole)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ConversionError(
            f"The configuration of {source} can't be a {other.__name__}: {one_line(error)}"
        ) from error


def text_ends(config: CLIPConfig, tokenizer: PreTrainedTokenizerBase | None, notes: list[str]) -> dict[str, Any]:
    """Return the ids of the start and the end of a text, of which CLIP's first configurations have others.

    Args:
        config: CLIP's.
        tokenizer: The model's; None without a processor.
        notes: Gets a sentence for what is assumed.

    Raises:
        ConversionError: CLIP pools at the largest id of a text, which isn't the tokenizer's end.
    """
    text = config.text_config
    old = text.eos_token_id == OLD_END
    if tokenizer is None:
        if not old:
            return {}
        bos, eos = text.vocab_size - 2, text.vocab_size - 1
        assume(
            notes,
            f"eos_token_id is {OLD_END}, by which CLIP pools at the largest id of a text, and there is no tokenizer: "
            f"assuming that start and end are the vocabulary's last two, {bos} and {eos}.",
        )
        return {"bos_token_id": bos, "eos_token_id": eos}
    largest = max(tokenizer.get_vocab().values())
    if old and tokenizer.eos_token_id != largest:
        raise ConversionError(
            f"CLIPTextConfig.eos_token_id is {OLD_END}, so that CLIP pools at the largest id of a text, and the "
            f"tokenizer's end is {tokenizer.eos_token_id}, where its largest id is {largest}; it must be the largest."
        )
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id if old else text.eos_token_id,
    }


# Weights ------------------------------------------------------------------------------------------------------------


def renamed(state_dict: Mapping[str, torch.Tensor], to_diffclip: bool) -> dict[str, torch.Tensor]:
    """Return tensors under the names that the other model has for them."""
    names = {theirs: ours for ours, theirs in RENAMED.items()} if to_diffclip else RENAMED
    return {".".join(names.get(part, part) for part in key.split(".")): value for key, value in state_dict.items()}


def kept_dtype(model: PreTrainedModel, wide: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype that a checkpoint says it has, if no number of its weights changes in it, else `wide`."""
    if dtype is None or all(torch.equal(value, value.to(dtype).to(wide)) for value in model.state_dict().values()):
        return dtype or wide
    return wide


def rectangle(config: DiffCLIPConfig) -> Inputs:
    """Return random inputs whose images are wider than the model's, and wider than high."""
    inputs: dict[str, Any] = random_inputs(config)
    vision = config.vision_config
    height, width = (vision.image_size + add * vision.patch_size for add in (1, 2))
    generator = torch.Generator().manual_seed(1)
    inputs["pixel_values"] = torch.randn(1, vision.num_channels, height, width, generator=generator)
    return {**inputs, "interpolate_pos_encoding": True}


# Processors ---------------------------------------------------------------------------------------------------------


def other_processor(processor: Any, source: str, length: int, options: dict[str, Any]) -> ProcessorMixin:
    """Return a DiffCLIP's processor of a CLIP's, or a CLIP's of a DiffCLIP's.

    The image processor stays as it is, so that the pixels do. One of DiffCLIP's own, of a model that was a DiffCLIP
    from the start, becomes CLIP's with the same settings.

    Args:
        processor: CLIP's or DiffCLIP's.
        source: Where it comes from.
        length: The most tokens that the model takes.
        options: Of `from_pretrained`, for the tokenizer.
    """
    to_clip = isinstance(processor, DiffCLIPProcessor)
    images, tokenizer = processor.image_processor, processor.tokenizer
    wanted: type = CLIPTokenizer if to_clip else DiffCLIPTokenizer
    if type(tokenizer) in (CLIPTokenizer, DiffCLIPTokenizer):
        tokenizer = load_tokenizer(source, wanted, **options)
        # Of the way in which it was loaded, and of code that doesn't go along.
        for name in ("auto_map", "is_local", "local_files_only"):
            tokenizer.init_kwargs.pop(name, None)
    tokenizer.model_max_length = min(tokenizer.model_max_length, length)
    if not to_clip:
        return DiffCLIPProcessor(images, tokenizer)
    if isinstance(images, SLIPEvaluationTransform):
        logger.warning(
            "The image processor becomes CLIP's, with the same settings: its crop may lie a pixel elsewhere, and it "
            "drops transparency."
        )
        settings = images.to_dict()
        images = CLIPImageProcessor(**{name: settings[name] for name in IMAGE_SETTINGS if name in settings})
    return CLIPProcessor(images, tokenizer)


def check_same_inputs(found: Any, original: Any) -> Inputs:
    """Return what a processor makes of pictures and texts, once it is what the original's makes of them.

    Raises:
        ConversionError: They differ.
    """
    options = {"truncation": True, "max_length": found.tokenizer.model_max_length, "return_tensors": "pt"}
    ours, theirs = (
        processor(text=PROBES, images=pictures(), padding=True, **options) for processor in (found, original)
    )
    names = theirs.keys() | ours.keys()
    if type(found.image_processor) is not type(original.image_processor):
        names -= {"pixel_values"}
    for name in sorted(names):
        if name not in theirs or name not in ours or not torch.equal(ours[name], theirs[name]):
            raise ConversionError(
                f"The converted processor gives other {name} than the original's, so nothing is written."
            )
    return dict(theirs)


# Conversion ---------------------------------------------------------------------------------------------------------


def write_folder(
    model: Any, config: Any, dtype: torch.dtype, processor: ProcessorMixin | None, folder: Path
) -> PreTrainedModel:
    """Write the other model, with its processor, into a folder, and return it as it loads from there.

    Args:
        model: The one that is converted.
        config: The other's.
        dtype: Of what is written.
        processor: The other's; None to write none.
        folder: Empty.

    Raises:
        ConversionError: A weight of what was written has another value than the model's.
    """
    to_diffclip = isinstance(config, DiffCLIPConfig)
    other_class: Any = DiffCLIPModel if to_diffclip else CLIPModel
    other = other_class._from_config(config, dtype=model.dtype)
    other.load_state_dict(renamed(model.state_dict(), to_diffclip))
    other.to(dtype).save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    if to_diffclip:
        add_remote_code(folder)
    written = other_class.from_pretrained(folder, dtype=model.dtype)
    found, bits = written.state_dict(), torch.int64 if model.dtype == torch.float64 else torch.int32
    for key, value in renamed(model.state_dict(), to_diffclip).items():
        if not torch.equal(found[key].view(bits), value.view(bits)):
            raise ConversionError(f"{key} is not bit for bit what it was, so nothing is written.")
    return written


def convert_checked(
    source: str, folder: Path, to_clip: bool, with_processor: bool, options: dict[str, Any]
) -> dict[str, Any]:
    """Write the converted model into an existing folder, and measure it there.

    Args:
        source: A folder or the Hub's id.
        folder: Empty.
        to_clip, with_processor: As in `convert`.
        options: Of `from_pretrained`, where the Hub is asked.

    Returns:
        The report, but for the source and the hashes of the files.

    Raises:
        ConversionError: The model can't be the other's, or the numbers or inputs aren't the same.
        ValueError: There is no such model, it isn't whole, or its processor isn't its own.
    """
    original: Any = DiffCLIPModel if to_clip else CLIPModel
    processors: list[Any] = [CLIPProcessor, DiffCLIPProcessor]
    config: Any = load_config(source, original.config_class, **options)
    check_config(config, source)
    notes: list[str] = []
    processor = load_processor(source, None, processors[to_clip], **options) if with_processor else None
    ends = {} if to_clip else text_ends(config, processor and processor.tokenizer, notes)
    other_config = described(config, source, **ends)
    diffclip_config = config if to_clip else other_config
    other_one = None
    if processor is not None:
        check_tokenizer(processor.tokenizer, diffclip_config, source)
        check_image_processor(processor.image_processor, diffclip_config, source)
        length = config.text_config.max_position_embeddings
        other_one = other_processor(processor, source, length, options)
    # Of a half precision's numbers none changes in float32, in which they are compared.
    wide = torch.promote_types(config.dtype or torch.float32, torch.float32)
    with checked_downloads(source):
        model = load_model(source, original, dtype=wide, use_safetensors=True, attn_implementation="eager", **options)
    written = write_folder(model, other_config, kept_dtype(model, wide, config.dtype), other_one, folder)
    inputs = {"random": random_inputs(diffclip_config), "rectangular": rectangle(diffclip_config)}
    if processor is not None:
        found = load_processor(folder, other_config, processors[not to_clip])
        inputs["real"] = check_same_inputs(found, processor)
    expected = {name: converted_outputs(model, given) for name, given in inputs.items()}
    return {
        "class": type(written).__name__,
        "assumptions": notes,
        "gate": measure(written, inputs, expected, MAX_ERROR),
        "lambda": {"vision": None, "text": None},
        "parameters": count_parameters(written),
    }


def convert(
    model: str | os.PathLike,
    output_dir: str | os.PathLike,
    to_clip: bool = False,
    processor: bool = True,
    revision: str | None = None,
    token: str | None = None,
) -> dict[str, Any]:
    """Turn a `CLIPModel` of Transformers into a `DiffCLIPModel` of the same numbers, or back.

    Args:
        model: A folder or an id on the Hub, with weights as safetensors.
        output_dir: A folder that is new or empty; a failure leaves nothing there.
        to_clip: Whether `model` is a `DiffCLIPModel` that becomes a `CLIPModel`.
        processor: Whether the processor goes along.
        revision: Branch, tag or commit on the Hub; the main branch where None.
        token: Of the Hub; that of `hf auth login` or `HF_TOKEN` where None.

    Returns:
        What `conversion_report.json` says, but for the files and versions.

    Raises:
        ValueError: There is no such model, it isn't whole, a field of its configuration or its processor doesn't fit,
            or the numbers or inputs aren't the same.
        OSError: The folder can't be written.
    """
    folder = check_output_folder(output_dir)
    options = {name: value for name, value in (("revision", revision), ("token", token)) if value is not None}
    source = find_source(model)
    about = {"model": Path(source).resolve().name}
    if (commit := commit_of(source, **options)) is not None:
        # All of it is of one commit.
        options["revision"] = commit
        about = {"model": source, "repo_id": source, "commit": commit}
    with written_whole(folder) as beside:
        report = {"source": about, **convert_checked(source, beside, to_clip, processor, options)}
        write_report(beside, report)
    logger.info("Wrote %s: a %s, %d parameters.", output_dir, report["class"], report["parameters"]["total"])
    return report


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = CommandParser(
        prog=started_as("diffclip_hf.conversion.convert_clip_checkpoint"),
        usage="%(prog)s --model FOLDER_OR_ID --output-dir DIR [OPTIONS]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", required=True, metavar="FOLDER_OR_ID", help="A saved CLIPModel: a folder, or an id on the Hub."
    )
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="The folder to write, new or empty.")
    parser.add_argument(
        "--to-clip", action="store_true", help="Go back: --model is a DiffCLIPModel that can be a CLIPModel."
    )
    add_hub_options(parser)
    parser.add_argument(
        "--no-processor", action="store_true", help="Save neither the tokenizer nor the image processor."
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 1, with the reason on the log, where the model doesn't fit."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    args = parse_args(argv)
    return run_command(
        lambda: convert(args.model, args.output_dir, args.to_clip, not args.no_processor, args.revision, args.token),
        logger,
    )


if __name__ == "__main__":
    sys.exit(main())
