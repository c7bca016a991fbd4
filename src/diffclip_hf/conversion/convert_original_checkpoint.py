"""Convert a checkpoint of the original DiffCLIP code, or of its CLIP baseline, into a folder for Transformers.

  python conversion/convert_original_checkpoint.py --checkpoint checkpoint_best.pt --output-dir diffclip-vitb16
  python -m diffclip_hf.conversion.convert_original_checkpoint \\
    --repo-id hammh0a/DiffCLIP_ViTB16_CC12M --output-dir diffclip-vitb16

The first form is for a clone of the repository, the second for an installed package; both take a checkpoint on this
machine or one of the Hub.

The folder is written only if it gives the numbers of the original's forward pass; `conversion_report.json` in it says
how closely, and what was assumed.
"""

import argparse
import logging
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

from diffclip_hf import (
    DiffCLIPConfig,
    DiffCLIPImageProcessorPil,
    DiffCLIPModel,
    DiffCLIPProcessor,
    DiffCLIPTokenizer,
    add_remote_code,
)

from ..common.commands import CommandParser, run_command, started_as
from ..common.loading import check_tokenizer, load_tokenizer
from ..common.whole_files import check_output_folder, written_whole
from .clip_vocabulary import VOCABULARY_SIZE, clip_tokenizer, find_merges_file
from .download import KNOWN_REPOSITORIES, add_hub_options, download_checkpoint
from .original_checkpoint import ConversionError, check_tensors, listed, load_state_dict
from .original_keys import key_table_of
from .parity_gate import random_inputs, real_inputs, reference_outputs, run_gate
from .report import assume, describe_file, write_report


logger = logging.getLogger("convert_original_checkpoint")

# Variant → (vision differential, text differential, lambda_init); the four models of the paper.
VARIANTS: dict[str, tuple[bool, bool, float | str]] = {
    "diffclip": (True, True, 0.8),
    "diffclip-star": (True, True, "depth"),
    "diffclip-dagger": (True, False, 0.8),
    "clip": (False, False, 0.8),
}
# Tower → what the keys of its blocks start with.
BLOCKS = {"vision": "visual.blocks", "text": "transformer.resblocks"}
HEAD_DIM = 64
# Far beyond any model of the kind; what a damaged shape says could fill the memory when the model is measured.
MAX_VOCABULARY, MAX_TOKENS, MAX_SIDE = 10_000_000, 4096, 2048
# SLIP's ViT-S/16, whose standard image tower has narrower heads: width → heads.
SLIP_VISION_HEADS = {384: 12}
# SLIP's head for the self-supervised loss, of no use after training.
SELF_SUPERVISED_HEAD = "image_mlp."


def _shape(state_dict: Mapping[str, torch.Tensor], key: str, dimensions: int) -> torch.Size:
    """Return a tensor's shape, or raise naming the key."""
    if key not in state_dict:
        raise ConversionError(f"Key {key!r} is missing.")
    shape = state_dict[key].shape
    if len(shape) != dimensions:
        raise ConversionError(f"Key {key!r} has shape {tuple(shape)}; it must have {dimensions} dimensions.")
    return shape


def _depth(state_dict: Mapping[str, torch.Tensor], blocks: str) -> int:
    """Return the number of blocks whose keys start with `blocks`."""
    pattern = re.compile(rf"{re.escape(blocks)}\.(0|[1-9][0-9]*)\.", re.ASCII)
    layers = {match[1] for match in map(pattern.match, state_dict) if match}
    if not layers:
        raise ConversionError(
            f"No key starts with {blocks!r}: this is no checkpoint of DiffCLIP or of SLIP's CLIP. Its first keys are "
            f"{listed(sorted(state_dict), 3)}."
        )
    # As text, since a number may have any length.
    missing = [str(layer) for layer in range(len(layers)) if str(layer) not in layers]
    if missing:
        beyond = layers - set(map(str, range(len(layers))))
        raise ConversionError(
            f"The keys have {len(layers)} layers that start with {blocks!r}, which must be numbered from 0 without a "
            f"gap: there is {listed(sorted(beyond))}, but not {listed(missing)}."
        )
    return len(layers)


def _heads(tower: str, width: int, lambda_length: int | None, given: int | None, assumptions: list[str]) -> int:
    """Return a tower's number of heads: from λ's length, else from the option, else one every 64 channels."""
    if lambda_length is not None:
        if width % lambda_length != 0:
            raise ConversionError(f"The {tower} tower's λ vectors have length {lambda_length}, its width is {width}.")
        heads = width // lambda_length
        if given is not None and given != heads:
            raise ConversionError(f"--{tower}-heads is {given}; the checkpoint's λ vectors say {heads}.")
        return heads
    if given is not None:
        if given < 1 or width % given != 0:
            raise ConversionError(f"--{tower}-heads is {given}; it must divide the {tower} tower's width, {width}.")
        return given
    if tower == "vision" and width in SLIP_VISION_HEADS:
        heads = SLIP_VISION_HEADS[width]
        assume(assumptions, f"--vision-heads not given: assuming {heads}, those of SLIP's ViT-S/16.")
        return heads
    if width % HEAD_DIM != 0:
        raise ConversionError(
            f"The {tower} tower is standard and {width} wide, so its heads can't be read off the keys; pass "
            f"--{tower}-heads."
        )
    heads = width // HEAD_DIM
    assume(assumptions, f"--{tower}-heads not given: assuming {heads}, one every {HEAD_DIM} channels.")
    return heads


def _check_size(what: str, found: int, least: int, most: int) -> None:
    """Raise unless a size that a shape tells is one of a model that can be measured."""
    if not least <= found <= most:
        raise ConversionError(f"{what} {found:,}; it must be from {least} to {most:,}.")


def _image_size(state_dict: Mapping[str, torch.Tensor], given: int | None) -> int:
    """Return the side of an image in pixels: the option, if it fits the position grid, else the patches' together."""
    _, channels, patch_size, _ = _shape(state_dict, "visual.patch_embed.proj.weight", 4)
    if channels != 3:
        raise ConversionError(f"Key 'visual.patch_embed.proj.weight' has {channels} channels; a picture has 3.")
    positions = _shape(state_dict, "visual.pos_embed", 3)[1]
    _check_size("'visual.pos_embed' has a number of positions of", positions, 2, MAX_TOKENS)
    grid = math.isqrt(positions - 1)
    if grid * grid != positions - 1:
        raise ConversionError(f"Key 'visual.pos_embed' has {positions} positions; they must be a square and one.")
    if given is not None and given // patch_size != grid:
        raise ConversionError(
            f"--image-size is {given}; 'visual.pos_embed' has {grid}x{grid} patches of {patch_size} pixels."
        )
    image_size = grid * patch_size if given is None else given
    _check_size("The patches make images with a side of", image_size, 1, MAX_SIDE)
    return image_size


def _lambda_init(variant: str, found: tuple[bool, ...], assumptions: list[str]) -> float | str:
    """Return λ_init of a variant, or raise where a checkpoint's towers aren't that variant's.

    Args:
        variant: `"auto"` or a key of `VARIANTS`.
        found: Whether the checkpoint's image and text towers are differential.
        assumptions: As in `infer_config`.
    """
    if variant == "auto":
        if any(found):
            assume(assumptions, "--variant not given: assuming lambda_init 0.8, that of every released DiffCLIP.")
        return 0.8
    *expected, lambda_init = VARIANTS[variant]
    if found != tuple(expected):
        names = {True: "differential", False: "standard"}
        raise ConversionError(
            f"--variant is {variant}, whose towers are {names[bool(expected[0])]} (vision) and "
            f"{names[bool(expected[1])]} (text); the checkpoint's are {names[found[0]]} and {names[found[1]]}."
        )
    return lambda_init


def _attention(
    state_dict: Mapping[str, torch.Tensor], tower: str, width: int, heads: int | None, assumptions: list[str]
) -> dict[str, Any]:
    """Return the width and the attention of a tower, as fields of its configuration."""
    key = f"{BLOCKS[tower]}.0.attn.lambda_q1"
    lambda_length = _shape(state_dict, key, 1)[0] if key in state_dict else None
    return {
        "hidden_size": width,
        "attention_type": "standard" if lambda_length is None else "differential",
        "num_attention_heads": _heads(tower, width, lambda_length, heads, assumptions),
    }


def infer_config(
    state_dict: Mapping[str, torch.Tensor],
    variant: str = "auto",
    text_heads: int | None = None,
    vision_heads: int | None = None,
    image_size: int | None = None,
    assumptions: list[str] | None = None,
) -> DiffCLIPConfig:
    """Read a model's configuration off its original keys and shapes.

    Args:
        state_dict: Original key → tensor.
        variant: `"auto"` or a key of `VARIANTS`. Only `"diffclip-star"` has to be told: λ_init is in no checkpoint.
        text_heads, vision_heads: Heads of a standard tower, which can't be read; one every 64 channels by default.
        image_size: In pixels; by default patch size × side of the position grid.
        assumptions: Gets a sentence for each thing that neither the keys nor an option tell.

    Raises:
        ConversionError: A key is missing or misshapen, or an option contradicts the keys.
    """
    assumptions = [] if assumptions is None else assumptions
    check_tensors(state_dict)
    vision_layers, text_layers = (_depth(state_dict, blocks) for blocks in BLOCKS.values())
    found = tuple(f"{blocks}.0.attn.lambda_q1" in state_dict for blocks in BLOCKS.values())
    lambda_init = _lambda_init(variant, found, assumptions)
    image_size = _image_size(state_dict, image_size)
    width, channels, patch_size, _ = _shape(state_dict, "visual.patch_embed.proj.weight", 4)
    vocab_size, text_width = _shape(state_dict, "token_embedding.weight", 2)
    length = _shape(state_dict, "positional_embedding", 2)[0]
    _check_size("'token_embedding.weight' has a vocabulary of", vocab_size, 4, MAX_VOCABULARY)
    _check_size("'positional_embedding' has a number of tokens of", length, 3, MAX_TOKENS)
    return DiffCLIPConfig(
        projection_dim=_shape(state_dict, "image_projection", 2)[1],
        vision_config={
            "intermediate_size": _shape(state_dict, "visual.blocks.0.mlp.fc1.weight", 2)[0],
            "num_hidden_layers": vision_layers,
            "num_channels": channels,
            "image_size": image_size,
            "patch_size": patch_size,
            # The original's differential tower swaps timm's norm class, and with it the epsilon.
            "layer_norm_eps": 1e-5 if found[0] else 1e-6,
            "lambda_init": lambda_init,
            **_attention(state_dict, "vision", width, vision_heads, assumptions),
        },
        text_config={
            "vocab_size": vocab_size,
            "intermediate_size": _shape(state_dict, "transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
            "num_hidden_layers": text_layers,
            "max_position_embeddings": length,
            "bos_token_id": vocab_size - 2,
            "eos_token_id": vocab_size - 1,
            "lambda_init": lambda_init,
            **_attention(state_dict, "text", text_width, text_heads, assumptions),
        },
    )


def convert_state_dict(state_dict: Mapping[str, torch.Tensor], config: DiffCLIPConfig) -> DiffCLIPModel:
    """Return the model with the checkpoint's weights, in float32.

    Raises:
        ConversionError: A key is missing, unexpected, of another shape than the configuration's, or not finite.
    """
    check_tensors(state_dict)
    table = key_table_of(config)
    missing = [entry.original for entry in table if entry.original not in state_dict]
    unexpected = sorted(set(state_dict) - {entry.original for entry in table})
    if missing or unexpected:
        raise ConversionError(f"The keys don't fit. Missing: {listed(missing)}. Unexpected: {listed(unexpected)}.")
    with torch.device("meta"):
        model = DiffCLIPModel(config)
    shapes = model.state_dict()

    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in state_dict.values())
    if set(dtypes) != {"float32"}:
        logger.warning("Converting to float32 what the checkpoint has as %s (number of tensors).", dict(dtypes))
    converted: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for entry in table:
        tensor = state_dict[entry.original]
        expected = entry.layout.to_original([shapes[key] for key in entry.port]).shape
        if tensor.shape != expected:
            raise ConversionError(
                f"Key {entry.original!r} has shape {tuple(tensor.shape)}; it must be {tuple(expected)}."
            )
        tensor = tensor.float()
        # Not isfinite(), whose intermediates would be another copy of the largest tensor in memory.
        if not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise ConversionError(
                f"Key {entry.original!r} holds NaN or infinite values in float32; every value must be finite."
            )
        # safetensors has no place for tensors that share theirs.
        if (storage := tensor.untyped_storage().data_ptr()) in storages:
            tensor = tensor.clone()
        storages.add(storage)
        converted.update(zip(entry.port, entry.layout.to_port(tensor), strict=True))
    model.load_state_dict(converted, strict=True, assign=True)
    return model.eval()


def given_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of `--tokenizer`: a folder's, a Hub id's or a merges file's.

    Raises:
        ValueError: The source has no tokenizer, or one without a vocabulary.
    """
    if source.endswith(".txt.gz"):
        return clip_tokenizer(Path(source))
    tokenizer = load_tokenizer(source)
    return load_tokenizer(source, DiffCLIPTokenizer) if type(tokenizer) is CLIPTokenizer else tokenizer


def default_tokenizer(vocab_size: int) -> PreTrainedTokenizerBase | None:
    """Return CLIP's tokenizer from an installed package, or None where the checkpoint's vocabulary isn't CLIP's."""
    if vocab_size == VOCABULARY_SIZE:
        return clip_tokenizer(find_merges_file())
    logger.warning(
        "The vocabulary has %d tokens, CLIP's %d: no tokenizer is saved; pass --tokenizer to save one.",
        vocab_size,
        VOCABULARY_SIZE,
    )
    return None


def write_folder(
    model: DiffCLIPModel, tokenizer: PreTrainedTokenizerBase | None, processor: bool, folder: Path
) -> None:
    """Write model, code and, if wanted, processor into a folder."""
    model.save_pretrained(folder)
    if processor:
        side = model.config.vision_config.image_size
        # The Pillow twin, since torchvision is optional; both write the same file.
        image_processor = DiffCLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )
        saved = image_processor if tokenizer is None else DiffCLIPProcessor(image_processor, tokenizer)
        saved.save_pretrained(folder)
    add_remote_code(folder)


def variant_of(config: DiffCLIPConfig) -> str:
    """Return which of the paper's models a configuration is, "openai-clip" for a CLIP of others, or "other"."""
    vision, text = config.vision_config, config.text_config
    towers = [tower.attention_type == "differential" for tower in (vision, text)]
    if vision.pre_layernorm or not vision.patch_bias:
        return "other" if any(towers) else "openai-clip"
    for name, (*differential, lambda_init) in VARIANTS.items():
        # A model without differential towers has no λ_init.
        if differential == towers and (not any(towers) or vision.lambda_init == lambda_init):
            return name
    return "other"


def convert_checked(
    source: Path,
    folder: Path,
    args: argparse.Namespace,
    variant: str,
    tokenizer: PreTrainedTokenizerBase | None,
) -> dict[str, Any]:
    """Write the converted model into an existing folder and measure it there.

    Args:
        source: The checkpoint.
        folder: Empty.
        args: The command line's.
        variant: `"auto"` or a key of `VARIANTS`.
        tokenizer: That of `--tokenizer`.

    Returns:
        The report, but for the source and the hashes of the files.

    Raises:
        ConversionError: The checkpoint or an option doesn't fit, or the numbers aren't the original's.
    """
    assumptions: list[str] = []
    state_dict = load_state_dict(source)
    dropped = sorted(key for key in state_dict if key.startswith(SELF_SUPERVISED_HEAD))
    if dropped:
        logger.warning("Dropping SLIP's self-supervised head, of no use after training: %s.", ", ".join(dropped))
        state_dict = {key: value for key, value in state_dict.items() if key not in dropped}
    config = infer_config(state_dict, variant, args.text_heads, args.vision_heads, args.image_size, assumptions)
    if tokenizer is None and not args.no_processor:
        tokenizer = default_tokenizer(config.text_config.vocab_size)
    if tokenizer is not None:
        check_tokenizer(tokenizer, config, args.tokenizer or "")
        config.text_config.pad_token_id = tokenizer.pad_token_id
        tokenizer.model_max_length = min(tokenizer.model_max_length, config.text_config.max_position_embeddings)
    write_folder(convert_state_dict(state_dict, config), tokenizer, not args.no_processor, folder)

    inputs = {"random": random_inputs(config)}
    if (real := real_inputs(folder, config)) is not None:
        inputs["real"] = real
    expected = {name: reference_outputs(state_dict, config, given) for name, given in inputs.items()}
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in state_dict.values())
    # The checkpoint's pages leave memory before the converted weights come into it.
    del state_dict
    measured = run_gate(folder, inputs, expected)
    return {
        "variant": variant_of(config),
        "assumptions": assumptions,
        "dropped_keys": dropped,
        "source_dtypes": dict(dtypes),
        **measured,
    }


def resolve_source(args: argparse.Namespace) -> tuple[Path, str, dict[str, Any]]:
    """Return the checkpoint's path, its variant or "auto", and what the report says of where it is from.

    Raises:
        ConversionError: The Hub has no such file.
    """
    if args.checkpoint is not None:
        path = Path(args.checkpoint).expanduser()
        return path, args.variant, {"file": path.name}
    variant = KNOWN_REPOSITORIES.get(args.repo_id, args.variant)
    path, commit = download_checkpoint(args.repo_id, args.filename, args.revision, args.token)
    return path, variant, {"file": args.filename, "repo_id": args.repo_id, "commit": commit}


def check_before(args: argparse.Namespace) -> PreTrainedTokenizerBase | None:
    """Find out before a download what would end the conversion after it; return the tokenizer of `--tokenizer`.

    Raises:
        ConversionError: `--variant` contradicts what a known repository holds.
        OSError: The folder can't be written, or CLIP's vocabulary is missing.
        ValueError: `--tokenizer` has none.
    """
    check_output_folder(args.output_dir)
    known = KNOWN_REPOSITORIES.get(args.repo_id)
    if known is not None and args.variant not in ("auto", known):
        raise ConversionError(f"--variant is {args.variant}; --repo-id {args.repo_id} holds a model of {known!r}.")
    if args.no_processor:
        return None
    if args.tokenizer is not None:
        return given_tokenizer(args.tokenizer)
    if known is not None:
        # All of them have CLIP's vocabulary.
        find_merges_file()
    return None


def convert(args: argparse.Namespace) -> None:
    """Convert as the command line says; a failure leaves nothing at `--output-dir`."""
    folder = Path(args.output_dir)
    tokenizer = check_before(args)
    path, variant, source = resolve_source(args)
    with written_whole(folder) as beside:
        report = convert_checked(path, beside, args, variant, tokenizer)
        write_report(beside, {"source": {**source, **describe_file(path)}, **report})
    logger.info("Wrote %s: %s, %d parameters.", folder, report["variant"], report["parameters"]["total"])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = CommandParser(
        prog=started_as("diffclip_hf.conversion.convert_original_checkpoint"),
        usage="%(prog)s (--checkpoint FILE.pt | --repo-id OWNER/NAME) --output-dir DIR [OPTIONS]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", metavar="FILE.pt", help="A checkpoint on this machine.")
    source.add_argument("--repo-id", metavar="OWNER/NAME", help="A repository on the Hub that holds a checkpoint.")
    parser.add_argument(
        "--filename", metavar="NAME", help="The checkpoint's name in the repository. (default: checkpoint_best.pt)"
    )
    add_hub_options(parser)
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="The folder to write, new or empty.")
    parser.add_argument(
        "--variant",
        default="auto",
        choices=["auto", *VARIANTS],
        help="The model. auto tells it by the keys. Give diffclip-star yourself, since no checkpoint holds λ_init.",
    )
    parser.add_argument(
        "--text-heads", type=int, metavar="N", help="How many heads a standard text tower has. (default: width / 64)"
    )
    parser.add_argument(
        "--vision-heads",
        type=int,
        metavar="N",
        help="How many heads a standard image tower has. (default: width / 64)",
    )
    parser.add_argument(
        "--image-size", type=int, metavar="N", help="The images' size in pixels. (default: patch size x position grid)"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="DIR_OR_ID",
        help="A tokenizer's folder, its id on the Hub, or bpe_simple_vocab_16e6.txt.gz. (default: a package's)",
    )
    parser.add_argument("--no-processor", action="store_true", help="Save neither a tokenizer nor an image processor.")
    args = parser.parse_args(argv)
    if args.repo_id is None:
        for option in ("filename", "revision", "token"):
            if getattr(args, option) is not None:
                parser.error(f"--{option} goes with --repo-id, not with --checkpoint")
    args.filename = args.filename or "checkpoint_best.pt"
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 1, with the reason on the log, where the checkpoint doesn't fit."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    args = parse_args(argv)
    return run_command(lambda: convert(args), logger)


if __name__ == "__main__":
    sys.exit(main())
