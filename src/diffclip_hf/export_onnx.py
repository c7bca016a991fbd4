"""Export a model's two towers to ONNX, checked in ONNX Runtime, and an int8 version of each.

    python -m diffclip_hf.export_onnx DIR OUT

It writes into OUT

    vision_model.onnx  text_model.onnx                        float32
    vision_model_quantized.onnx  text_model_quantized.onnx    int8 weights, named as by optimum and transformers.js
    export_report.json                                        errors, similarities, sizes and times
    config.json, the processor, and the code that loads both where this package isn't installed

The inputs are `pixel_values` (batch, channels, image_size, image_size), float32, and `input_ids` and `attention_mask`
(batch, sequence), int64; left padding works as in PyTorch. The outputs, `image_embeds` and `text_embeds` (batch,
projection_dim), are those of `DiffCLIPVisionModelWithProjection` and `DiffCLIPTextModelWithProjection`: projected, not
normalised. A graph can't raise: a text without an end-of-text token gives the embedding of its first position.
"""

import argparse
import json
import logging
import os
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.utils import cached_file

from .common.commands import CommandParser, require_extra, run_command
from .common.loading import check_tokenizer, load_model, load_processor, load_tokenizer
from .common.machine import describe_machine, describe_versions
from .common.remote_code import add_remote_code
from .common.whole_files import written_whole
from .model.configuration_diffclip import DiffCLIPConfig, DiffCLIPTextConfig, DiffCLIPVisionConfig
from .model.modeling_diffclip import DiffCLIPModel


logger = logging.getLogger("export_onnx")

# Of the largest magnitude of the embeddings. A correct graph departs by some 1e-6.
MAX_ERROR = 1e-4
MIN_COSINE = 0.99
BATCHES = (1, 3)
LENGTHS = (7, 77)
TIMED_BATCHES = (1, 8)
OPSETS = range(18, 24)
DEFAULT_OPSET = 20
# What one protobuf file may hold, less some room for the graph itself.
MAX_BYTES = 2**31 - 2**24
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
REPORT_FILE = "export_report.json"
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"}
Inputs = dict[str, torch.Tensor]
# What computes embeddings, (batch, projection_dim), in PyTorch or ONNX Runtime.
Runner = Callable[[Inputs], np.ndarray]


class ExportError(ValueError):
    """The export can't be done, or a check of it failed."""


class VisionTower(nn.Module):
    """The image tower with its projection, as one function of tensors."""

    def __init__(self, model: DiffCLIPModel):
        super().__init__()
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return (batch, projection_dim), not normalised, of (batch, channels, image_size, image_size)."""
        return self.visual_projection(self.vision_model(pixel_values, return_dict=True).pooler_output)


class TextTower(nn.Module):
    """The text tower with its projection, as one function of tensors."""

    def __init__(self, model: DiffCLIPModel):
        super().__init__()
        self.text_model, self.text_projection = model.text_model, model.text_projection

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return (batch, projection_dim), not normalised, of token ids and their mask, (batch, tokens), int64."""
        return self.text_projection(self.text_model(input_ids, attention_mask, return_dict=True).pooler_output)


def image_inputs(config: DiffCLIPVisionConfig, batch: int, seed: int = 0, smooth: bool = False) -> Inputs:
    """Return random images, float32 with standard deviation near 1, as an image processor's are.

    Args:
        config: The image tower's.
        batch: How many images.
        seed: Of the random numbers.
        smooth: Whether neighbouring pixels are alike, as in pictures; otherwise every pixel is noise of its own.

    Returns:
        `pixel_values`, (batch, channels, image_size, image_size).
    """
    generator = torch.Generator().manual_seed(seed)
    side = config.image_size
    if not smooth:
        return {"pixel_values": torch.randn(batch, config.num_channels, side, side, generator=generator)}
    coarse = torch.randn(batch, config.num_channels, 5, 5, generator=generator)
    return {"pixel_values": nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")}


def text_inputs(config: DiffCLIPTextConfig, batch: int, length: int, padding: str = "right", seed: int = 0) -> Inputs:
    """Return random texts, the first of `length` tokens and each other one shorter by one, padded on one side.

    Args:
        config: The text tower's.
        batch: How many texts.
        length: Tokens a row, 3 or more.
        padding: `"right"` or `"left"`.
        seed: Of the random numbers.

    Returns:
        `input_ids` and `attention_mask`, (batch, length), int64.
    """
    generator = torch.Generator().manual_seed(seed)
    eos = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    special = {config.bos_token_id, config.pad_token_id}
    special |= set(config.eos_token_id) if isinstance(config.eos_token_id, list) else {eos}
    words = torch.tensor([token for token in range(config.vocab_size) if token not in special])
    pad = 0 if config.pad_token_id is None else config.pad_token_id
    input_ids = torch.full((batch, length), pad)
    attention_mask = torch.zeros(batch, length, dtype=torch.long)
    for row in range(batch):
        tokens = max(length - row, 3)
        place = slice(0, tokens) if padding == "right" else slice(length - tokens, length)
        text = words[torch.randint(len(words), (tokens,), generator=generator)]
        if config.bos_token_id is not None:
            text[0] = config.bos_token_id
        text[-1] = eos
        input_ids[row, place] = text
        attention_mask[row, place] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@dataclass(frozen=True)
class Tower:
    """A tower, and with what it is exported and checked.

    Args:
        name: Of its files, without ".onnx".
        module: Of the model in float32, in evaluation mode, under eager attention.
        output: Name of the graph's output.
        dynamic_shapes: Input → dimension → name of what may vary.
        checks: Name of a check → inputs, at every batch and length that the graph has to serve.
        samples: Inputs for the similarity of int8 to float32.
        timed: Batch → inputs of full length.
    """

    name: str
    module: nn.Module
    output: str
    dynamic_shapes: dict[str, dict[int, Any]]
    checks: dict[str, Inputs]
    samples: list[Inputs]
    timed: dict[int, Inputs]

    @torch.inference_mode()
    def __call__(self, inputs: Inputs) -> np.ndarray:
        """Return PyTorch's embeddings, (batch, projection_dim)."""
        return self.module(**inputs).numpy()


def towers_of(model: DiffCLIPModel) -> list[Tower]:
    """Return a model's two towers."""
    vision, text = model.vision_model.config, model.text_model.config
    context = text.max_position_embeddings
    # The two names are the same dimensions in both inputs of the text tower.
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence", max=context)
    lengths = sorted({min(length, context) for length in LENGTHS})
    return [
        Tower(
            name="vision_model",
            module=VisionTower(model),
            output="image_embeds",
            dynamic_shapes={"pixel_values": {0: batch}},
            checks={f"batch {size}": image_inputs(vision, size) for size in BATCHES},
            samples=[image_inputs(vision, 8, seed=1), image_inputs(vision, 8, seed=2, smooth=True)],
            timed={size: image_inputs(vision, size, seed=3) for size in TIMED_BATCHES},
        ),
        Tower(
            name="text_model",
            module=TextTower(model),
            output="text_embeds",
            dynamic_shapes={name: {0: batch, 1: sequence} for name in ("input_ids", "attention_mask")},
            checks={
                f"batch {size}, length {length}, {side} padding": text_inputs(text, size, length, side)
                for size in BATCHES
                for length in lengths
                for side in ("right", "left")
            },
            samples=[text_inputs(text, 16, length, seed=1) for length in lengths],
            timed={size: text_inputs(text, size, context, seed=2) for size in TIMED_BATCHES},
        ),
    ]


def export_tower(tower: Tower, path: Path, opset: int = DEFAULT_OPSET) -> None:
    """Write a tower as one ONNX file, its weights in it, λ folded to a constant and no path of this machine in it.

    Args:
        tower: What `towers_of` returned.
        path: Of the file.
        opset: Of ONNX's operators.

    Raises:
        ExportError: The tower is too large for one file.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    size = sum(tensor.nbytes for tensor in tower.module.state_dict().values())
    if size > MAX_BYTES:
        raise ExportError(f"{tower.name} has {size} bytes of weights; one ONNX file holds at most {MAX_BYTES}.")
    # Of another batch and length than what is checked. Not of 1, which torch.export would take for a constant.
    inputs = {name: tensor[:2] for name, tensor in next(reversed(tower.checks.values())).items()}
    with warnings.catch_warnings(), torch.no_grad():
        # input_ids and attention_mask share their dimensions' names, as they should.
        warnings.filterwarnings("ignore", "# The axis name: .* will not be used", UserWarning)
        # torch 2.13's own, fixed in 2.14.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        program = torch.export.export(tower.module, (), kwargs=inputs, dynamic_shapes=tower.dynamic_shapes)
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=tower.dynamic_shapes,
            input_names=list(inputs),
            output_names=[tower.output],
            verbose=False,
        )
    assert onnx_program is not None
    # Each node has a stack trace, with the paths of the code that made it.
    ClearMetadataAndDocStringPass()(onnx_program.model)
    onnx_program.save(path, external_data=False)


def quantize_tower(path: Path, quantized: Path) -> None:
    """Write the int8 version of a graph: weights of the matrix products, per channel; activations at run time.

    The patch convolution, the embedding tables and the first block's query and key stay float32. Weights have 7 bits:
    with 8, a processor without VNNI overflows the 16-bit sums of two products.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = quantized.with_suffix(".prepared")
    # onnx's shape inference alone: ONNX Runtime optimises the graph when it loads it.
    quant_pre_process(path, prepared, skip_optimization=True, skip_symbolic_shape=True)
    model = onnx.load(prepared)
    prepared.unlink()
    # Of the products that it transposes, ONNX Runtime 1.23 would take the old shapes to be contradictions.
    del model.graph.value_info[:]
    weights = {weight.name for weight in model.graph.initializer}
    products = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    quantize_dynamic(
        model,
        quantized,
        op_types_to_quantize=["MatMul", "Gemm"],
        # In the order of the graph, the first are the first block's query and key. Where A1·v and λ·A2·v nearly
        # cancel, the RMSNorm behind them magnifies an error of the maps: of the embedded model's texts of three tokens
        # some fall to a similarity of 0.986 with int8 here, and to 0.998 without.
        nodes_to_exclude=products[:2],
        per_channel=True,
        reduce_range=True,
        weight_type=QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True},
    )


def open_graph(path: Path) -> Runner:
    """Return a function that runs a graph on the CPU, with as many threads as PyTorch's: inputs → its one output."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that spin after a run would slow what is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]


def check_tower(tower: Tower, graph: Runner) -> dict[str, float]:
    """Compare a graph with PyTorch at every batch, length and padding.

    Args:
        tower: What `towers_of` returned.
        graph: What `open_graph` returned.

    Returns:
        Check → the largest absolute difference over the largest magnitude expected.

    Raises:
        ExportError: An error is over `MAX_ERROR`, or NaN.
    """
    errors = {}
    for name, inputs in tower.checks.items():
        expected, found = tower(inputs), graph(inputs)
        if found.shape != expected.shape:
            raise ExportError(f"{tower.name}, {name}: the shape is {found.shape}; PyTorch's is {expected.shape}.")
        errors[name] = float(np.abs(found - expected).max() / np.abs(expected).max())
        # Not `>`, which NaN passes.
        if not errors[name] <= MAX_ERROR:
            raise ExportError(
                f"{tower.name}, {name}: the error is {errors[name]:.1e} of the largest magnitude; it must be at most "
                f"{MAX_ERROR}."
            )
    return errors


def check_quantized(tower: Tower, graph: Runner, quantized: Runner) -> dict[str, float]:
    """Compare the embeddings of the int8 graph with the float32 graph's.

    Args:
        tower: What `towers_of` returned.
        graph, quantized: What `open_graph` returned for each file.

    Returns:
        `inputs`, how many were compared, and the `min` and `mean` of their cosine similarities.

    Raises:
        ExportError: The least similarity is under `MIN_COSINE`, or NaN.
    """
    cosines = []
    for inputs in tower.samples:
        expected, found = (torch.from_numpy(run(inputs)).double() for run in (graph, quantized))
        cosines.append(torch.cosine_similarity(expected, found, dim=-1))
    cosine = torch.cat(cosines)
    least = cosine.min().item()
    if not least >= MIN_COSINE:
        raise ExportError(
            f"{tower.name}, int8: the least cosine similarity to float32 is {least:.4f}; it must be at least "
            f"{MIN_COSINE}. Pass --no-int8 to export float32 alone."
        )
    return {"inputs": len(cosine), "min": least, "mean": cosine.mean().item()}


def median_seconds(runners: dict[str, Runner], inputs: Inputs, runs: int) -> dict[str, float]:
    """Return each runner's median time in seconds, over runs that take turns, after one that isn't counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(runs + 1):
        for name, runner in runners.items():
            start = time.perf_counter()
            runner(inputs)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def export_checked(tower: Tower, folder: Path, opset: int, int8: bool, runs: int) -> dict[str, Any]:
    """Write a tower's files into a folder and measure them there.

    Returns:
        For the report: `errors` as of `check_tower`; `cosine` as of `check_quantized`; `seconds`, batch → runner →
        median time; and `bytes`, file → size.

    Raises:
        ExportError: As `export_tower`, `check_tower` and `check_quantized` raise.
    """
    paths = {"float32": folder / f"{tower.name}.onnx"}
    logger.info("Exporting %s.", tower.name)
    export_tower(tower, paths["float32"], opset)
    runners: dict[str, Runner] = {"pytorch_eager": tower, "float32": open_graph(paths["float32"])}
    measured: dict[str, Any] = {"errors": check_tower(tower, runners["float32"])}
    logger.info("%s: the largest error is %.1e of %s.", tower.name, max(measured["errors"].values()), MAX_ERROR)
    if int8:
        paths["int8"] = folder / f"{tower.name}_quantized.onnx"
        quantize_tower(paths["float32"], paths["int8"])
        runners["int8"] = open_graph(paths["int8"])
        measured["cosine"] = check_quantized(tower, runners["float32"], runners["int8"])
        logger.info("%s: the least cosine of int8 to float32 is %.4f.", tower.name, measured["cosine"]["min"])
    if runs:
        logger.info("Timing %s.", tower.name)
        measured["seconds"] = {
            f"batch {size}": median_seconds(runners, inputs, runs) for size, inputs in tower.timed.items()
        }
    measured["bytes"] = {path.name: path.stat().st_size for path in paths.values()}
    return measured


def find_processor(source: str, config: DiffCLIPConfig) -> list[Path]:
    """Return the files of a model's image processor and tokenizer, after a look whether they are the model's.

    Args:
        source: The model's folder or its id on the Hub.
        config: The model's.

    Raises:
        ExportError: The Hub can't be reached.
        ValueError: The tokenizer has no vocabulary, or a part isn't the model's.
    """
    try:
        cached = [cached_file(source, name, _raise_exceptions_for_missing_entries=False) for name in PROCESSOR_FILES]
    except OSError as error:
        raise ExportError(f"The processor of {source} can't be loaded: {error}") from error
    found = [Path(path) for path in cached if path]
    names = {path.name for path in found}
    # An image processor alone has a `preprocessor_config.json`; a processor needs a tokenizer too.
    tokenizer = names & TOKENIZER_FILES
    if "processor_config.json" in names or (tokenizer and "preprocessor_config.json" in names):
        load_processor(source, config)
    elif tokenizer:
        check_tokenizer(load_tokenizer(source), config, source)
        logger.warning("%s has no image processor: none is written.", source)
    if not found:
        logger.warning("%s has neither an image processor nor a tokenizer: none is written.", source)
    return found


def load_eager(source: str) -> DiffCLIPModel:
    """Return a model in float32, in evaluation mode, under eager attention, whatever it was saved as.

    Eager, since its graph has one product with v for each pair of heads, and runs faster than SDPA's, which has two.

    Raises:
        ValueError: There is no such model, it lacks weights, or it's quantised.
    """
    model = load_model(source, DiffCLIPModel, dtype=torch.float32, attn_implementation="eager")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ExportError(f"{source} is quantised, which can't be exported; name the model from before.")
    return model


def export_onnx(
    source: str | os.PathLike,
    folder: str | os.PathLike,
    opset: int = DEFAULT_OPSET,
    int8: bool = True,
    runs: int = 5,
) -> dict[str, Any]:
    """Export a saved model's towers into a folder, which is written only if every check passes.

    Args:
        source: The model's folder or its id on the Hub.
        folder: New or empty.
        opset: Of ONNX's operators, one of `OPSETS`.
        int8: Whether to write the int8 versions too.
        runs: How many runs are timed; 0 for none.

    Returns:
        What `export_report.json` holds.

    Raises:
        ValueError: An option or the model isn't as it must be, its processor isn't whole, or, as an `ExportError`, a
            check failed.
        ImportError: A package is missing.
        OSError: `folder` can't be written; see `check_output_folder`.
    """
    require_extra("onnx", *PACKAGES)
    if opset not in OPSETS:
        raise ValueError(f"opset is {opset!r}; it must be from {OPSETS[0]} to {OPSETS[-1]}.")
    if runs < 0:
        raise ValueError(f"runs is {runs}; it must be 0 or more.")
    source = os.fspath(source)
    # It finds out whether the folder can be written before the work begins.
    with written_whole(Path(folder)) as beside:
        model = load_eager(source)
        files = find_processor(source, model.config)
        model.config.save_pretrained(beside)
        for path in files:
            shutil.copyfile(path, beside / path.name)
        # Else an `auto_map` of the source's would name files that aren't here.
        add_remote_code(beside)
        report = {
            "source": Path(source).resolve().name if Path(source).is_dir() else source,
            "opset": opset,
            "max_error": MAX_ERROR,
            "min_cosine": MIN_COSINE,
            **{tower.name: export_checked(tower, beside, opset, int8, runs) for tower in towers_of(model)},
            "runs": runs,
            "machine": describe_machine(),
            "versions": describe_versions(*PACKAGES),
        }
        (beside / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    logger.info("Wrote %s.", folder)
    return report


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = CommandParser(
        prog="python -m diffclip_hf.export_onnx",
        usage="%(prog)s DIR OUT [OPTION ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="DIR", help="A saved model's folder, or its id on the Hub.")
    parser.add_argument("folder", metavar="OUT", help="The folder to write, new or empty.")
    parser.add_argument(
        "--opset",
        type=int,
        default=DEFAULT_OPSET,
        choices=OPSETS,
        help="The version of ONNX's operators. (default: %(default)s)",
    )
    parser.add_argument("--no-int8", dest="int8", action="store_false", help="Write the float32 graphs alone.")
    parser.add_argument(
        "--runs",
        type=int,
        default=5,
        metavar="N",
        help="How often to run each graph for its time; 0 times none. (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    if args.runs < 0:
        parser.error(f"--runs is {args.runs}; it must be 0 or more")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 1, with the reason on the log, where it can't be done or a check failed."""
    # The exporter and the quantiser tell of every node at the level INFO.
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logger.setLevel(logging.INFO)
    args = parse_args(argv)
    return run_command(lambda: export_onnx(args.source, args.folder, args.opset, args.int8, args.runs), logger)


if __name__ == "__main__":
    sys.exit(main())
