"""Export a model to ONNX, checked in ONNX Runtime, with an int8 version, in a folder that transformers.js loads too.

    python -m diffclip_hf.export_onnx DIR OUT

It writes into OUT

    onnx/vision_model.onnx  onnx/text_model.onnx    the towers, in float32
    onnx/model.onnx                                 both, and the logits, for transformers.js's zero-shot pipeline
    onnx/..._quantized.onnx                         each of these with int8 weights
    export_report.json                              errors, similarities, sizes and times
    index.html  page.mjs  fit.mjs                   a page that classifies pictures in the browser alone
    config.json, the processor as Transformers and as transformers.js read it, and the code that loads both where this
    package isn't installed

The inputs are `pixel_values` (batch, channels, image_size, image_size), float32, and `input_ids` and `attention_mask`
(batch, sequence), int64; left padding works as in PyTorch. The towers' outputs, `image_embeds` and `text_embeds`
(batch, projection_dim), are those of `DiffCLIPVisionModelWithProjection` and `DiffCLIPTextModelWithProjection`:
projected, not normalised. Those of `model.onnx` are `DiffCLIPModel`'s: normalised, with `logits_per_image` and
`logits_per_text`. A graph can't raise: a text without an end-of-text token gets one in place of its last token, since
transformers.js cuts it off a long text, where Python's tokenizer keeps it.
"""

import argparse
import json
import logging
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch
from transformers import AutoImageProcessor
from transformers.utils import cached_file

from .common.commands import CommandParser, require_extra, run_command
from .common.json_files import json_text, read_json_object
from .common.loading import check_image_processor, check_tokenizer, load_model, load_processor, load_tokenizer
from .common.machine import describe_machine, describe_versions
from .common.remote_code import add_remote_code
from .common.whole_files import written_whole
from .model.configuration_diffclip import DiffCLIPConfig
from .model.modeling_diffclip import DiffCLIPModel
from .onnx_graphs import (
    DEFAULT_OPSET,
    OPSETS,
    ExportError,
    Inputs,
    Runner,
    Tower,
    export_tower,
    join_towers,
    open_graph,
    quantize_tower,
    towers_of,
)


logger = logging.getLogger("export_onnx")

# Of the largest magnitude of the embeddings. A correct graph departs by some 1e-6.
MAX_ERROR = 1e-4
MIN_COSINE = 0.99
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
REPORT_FILE = "export_report.json"
# Where transformers.js looks for graphs.
GRAPH_FOLDER = "onnx"
# A page that runs the towers in the browser, and what it fetches its library from.
PAGE_FOLDER = Path(__file__).parent / "browser"
LIBRARY = "https://cdn.jsdelivr.net/npm/@huggingface/transformers@4.3.1/dist/transformers.min.js"
PROCESSOR_FILE, IMAGE_PROCESSOR_FILE = "processor_config.json", "preprocessor_config.json"
TOKENIZER_FILE = "tokenizer_config.json"
TOKENIZER_FILES = {"tokenizer.json", TOKENIZER_FILE, "special_tokens_map.json", "vocab.json", "merges.txt"}
# What an image processor does, which transformers.js does too unless told not to, and with what.
IMAGE_STEPS = ("do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize")
IMAGE_NUMBERS = ("size", "resample", "crop_size", "rescale_factor", "image_mean", "image_std")


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


def export_joint(towers: list[Tower], scale: float, folder: Path, int8: bool) -> dict[str, Any]:
    """Write both towers as one graph, in each precision, and compare its logits with those of the towers' graphs.

    Returns:
        For the report: `errors`, precision → the largest difference over the largest logit; and `bytes`, file → size.

    Raises:
        ExportError: An error is over `MAX_ERROR`, or NaN; or as `join_towers` raises.
    """
    errors, sizes = {}, {}
    vision, text = towers
    # Of different numbers.
    images, texts = next(iter(vision.checks.values())), next(reversed(text.checks.values()))
    for name, suffix in {"float32": "", "int8": "_quantized"}.items() if int8 else [("float32", "")]:
        paths = [folder / f"{tower.name}{suffix}.onnx" for tower in towers]
        joint = folder / f"model{suffix}.onnx"
        join_towers(paths[0], paths[1], scale, joint)
        embeds = [open_graph(path)(inputs) for path, inputs in zip(paths, (images, texts), strict=True)]
        image_embeds, text_embeds = (rows / np.linalg.norm(rows, axis=-1, keepdims=True) for rows in embeds)
        expected = scale * image_embeds @ text_embeds.T
        found = open_graph(joint)({**images, **texts})
        errors[name] = float(np.abs(found - expected).max() / np.abs(expected).max())
        if not errors[name] <= MAX_ERROR:
            raise ExportError(
                f"model, {name}: the error of the logits is {errors[name]:.1e} of the largest; it must be at most "
                f"{MAX_ERROR}."
            )
        sizes[joint.name] = joint.stat().st_size
    return {"errors": errors, "bytes": sizes}


def load_processing(source: str, config: DiffCLIPConfig) -> Any:
    """Return a model's processor, or what there is of one: a tokenizer, an image processor, or None.

    Args:
        source: The model's folder or its id on the Hub.
        config: The model's.

    Raises:
        ExportError: The Hub can't be reached.
        ValueError: The tokenizer has no vocabulary, or a part isn't the model's.
    """
    known = (PROCESSOR_FILE, IMAGE_PROCESSOR_FILE, *sorted(TOKENIZER_FILES))
    try:
        names = {name for name in known if cached_file(source, name, _raise_exceptions_for_missing_entries=False)}
    except OSError as error:
        raise ExportError(f"The processor of {source} can't be loaded: {error}") from error
    # An image processor alone has a `preprocessor_config.json`; a processor needs a tokenizer too.
    if PROCESSOR_FILE in names or (IMAGE_PROCESSOR_FILE in names and names & TOKENIZER_FILES):
        return load_processor(source, config)
    if names & TOKENIZER_FILES:
        logger.warning("%s has no image processor: none is written.", source)
        tokenizer = load_tokenizer(source)
        check_tokenizer(tokenizer, config, source)
        return tokenizer
    if names:
        logger.warning("%s has no tokenizer: none is written.", source)
        image_processor = AutoImageProcessor.from_pretrained(source)
        check_image_processor(image_processor, config, source)
        return image_processor
    logger.warning("%s has neither an image processor nor a tokenizer: none is written.", source)
    return None


def add_web_files(folder: Path) -> None:
    """Let transformers.js, which knows none of this package's classes, load a folder's image processor and tokenizer.

    It reads `preprocessor_config.json`, and Transformers reads that only where `processor_config.json` has no image
    processor. Where `tokenizer_config.json` names no class, transformers.js takes its base class, which does all that
    its CLIPTokenizer does, and Transformers takes the model's, DiffCLIPTokenizer.
    """
    both, alone, tokenizer = (folder / name for name in (PROCESSOR_FILE, IMAGE_PROCESSOR_FILE, TOKENIZER_FILE))
    if alone.is_file():
        both.write_text(json_text({"image_processor": read_json_object(alone)}), encoding="utf-8")
    if both.is_file():
        saved = read_json_object(both)["image_processor"]
        fields: dict[str, Any] = {name: bool(saved.get(name)) for name in IMAGE_STEPS}
        fields |= {name: saved[name] for name in IMAGE_NUMBERS if name in saved}
        fields |= {"image_processor_type": "CLIPImageProcessor"}
        alone.write_text(json_text(fields), encoding="utf-8")
    if tokenizer.is_file():
        # Transformers also saves how the tokenizer was loaded.
        saved = {
            name: value
            for name, value in read_json_object(tokenizer).items()
            if name not in ("is_local", "local_files_only")
            and (name, value) != ("tokenizer_class", "DiffCLIPTokenizer")
        }
        tokenizer.write_text(json_text(saved), encoding="utf-8")


def write_processing(source: str, config: DiffCLIPConfig, folder: Path) -> None:
    """Write a model's processor, and the code that loads it, into a folder that has the model's configuration.

    Args:
        source: The model's folder or its id on the Hub.
        config: The model's.
        folder: What Transformers loads, and transformers.js.

    Raises:
        ValueError: As `load_processing` raises.
    """
    processing = load_processing(source, config)
    if processing is not None:
        processing.save_pretrained(folder)
    # Else an `auto_map` of the source's would name files that aren't here.
    add_remote_code(folder)
    add_web_files(folder)


def write_page(folder: Path, scale: float, int8: bool) -> None:
    """Write a page that classifies pictures in the browser alone, with what else the folder holds.

    Args:
        folder: An export's, with a whole processor.
        scale: Of cosine similarities to logits, exp(logit_scale).
        int8: Whether there are graphs with int8 weights, which the page takes then.
    """
    for name in ("page.mjs", "fit.mjs"):
        shutil.copyfile(PAGE_FOLDER / name, folder / name)
    # The library knows an address of its runtime.
    values = {"library": LIBRARY, "runtime": "", "dtype": "q8" if int8 else "fp32", "scale": scale}
    page = Template((PAGE_FOLDER / "index.html").read_text(encoding="utf-8")).substitute(values)
    (folder / "index.html").write_text(page, encoding="utf-8")


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
    joint: bool = True,
) -> dict[str, Any]:
    """Export a saved model's towers into a folder, which is written only if every check passes.

    Args:
        source: The model's folder or its id on the Hub.
        folder: New or empty.
        opset: Of ONNX's operators, one of `OPSETS`.
        int8: Whether to write the int8 versions too.
        runs: How many runs are timed; 0 for none.
        joint: Whether to write both towers as one graph too, which takes as much room again.

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
        model.config.save_pretrained(beside)
        write_processing(source, model.config, beside)
        scale = model.logit_scale.exp().item()
        if (beside / IMAGE_PROCESSOR_FILE).is_file() and (beside / TOKENIZER_FILE).is_file():
            write_page(beside, scale, int8)
        graphs = beside / GRAPH_FOLDER
        graphs.mkdir()
        towers = towers_of(model)
        measured = {tower.name: export_checked(tower, graphs, opset, int8, runs) for tower in towers}
        if joint:
            measured["model"] = export_joint(towers, scale, graphs, int8)
        report = {
            "source": Path(source).resolve().name if Path(source).is_dir() else source,
            "opset": opset,
            "max_error": MAX_ERROR,
            "min_cosine": MIN_COSINE,
            **measured,
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
        "--no-joint",
        dest="joint",
        action="store_false",
        help="Write the towers alone: half the room, but no pipeline of transformers.js.",
    )
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
    return run_command(
        lambda: export_onnx(args.source, args.folder, args.opset, args.int8, args.runs, args.joint), logger
    )


if __name__ == "__main__":
    sys.exit(main())
