"""Mix the weights of two models, such as one before and after it was fine-tuned (WiSE-FT).

    python -m diffclip_hf.interpolate A B --alpha 0.5 --output-dir DIR
    python -m diffclip_hf.interpolate A B --sweep NEW OLD --output-dir DIR

A and B are folders or ids on the Hub, of a DiffCLIP or another CLIP-like model of Transformers. The weights are
(1 - alpha) · A + alpha · B, so that alpha 0 is A and 1 is B. --sweep writes no model: it measures each of --alphas on
two data sets, named as for `python -m diffclip_hf.evaluate`, and leaves `curve.json` and `curve.png` in DIR.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .common.commands import CommandParser, add_device_option, default_device, require_extra, run_command
from .common.fitting import config_differences, processor_differences
from .common.loading import check_device, load_config, load_model, load_processor
from .common.remote_code import add_remote_code
from .common.whole_files import check_output_folder, written_whole
from .evaluate import (
    add_encoding_options,
    add_label_options,
    add_split_and_columns,
    check_options,
    dataset_specs,
)
from .evaluation.encoder import Encoder
from .evaluation.tasks import RUN_TASK, TaskOptions
from .model.modeling_diffclip import DiffCLIPForImageClassification


logger = logging.getLogger(__name__)
ALPHAS = tuple(step / 10 for step in range(11))
# The options that go with --alpha; all others are of --sweep.
MIXING = ("first", "second", "output_dir", "alpha")
CURVE, PICTURE = "curve.json", "curve.png"
Weights = Mapping[str, torch.Tensor]


def check_alpha(alpha: float) -> float:
    """Return a share of the second model's weights; raise a ValueError unless it's in 0..1."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it must be in 0..1.")
    return alpha


def interpolated(first: Weights, second: Weights, alpha: float) -> dict[str, torch.Tensor]:
    """Return (1 - alpha) · first + alpha · second, computed at least in float32.

    Args:
        first, second: Of the same names and shapes. What isn't of floating-point numbers has to be the same in both.
        alpha: In 0..1; 0 gives the first's numbers and 1 the second's exactly.

    Returns:
        New tensors, each of the first's dtype, or of the wider where the second's is another.

    Raises:
        ValueError: They don't fit; a tensor's name is in the message.

    Source: Wortsman et al. 2022 (WiSE-FT).
    """
    check_alpha(alpha)
    if only := sorted(first.keys() ^ second.keys()):
        raise ValueError(f"{only[0]} is a tensor of the {'first' if only[0] in first else 'second'} model alone.")
    mixed = {}
    for name, one in first.items():
        other = second[name].to(one.device)
        if one.shape != other.shape:
            raise ValueError(
                f"{name} has the shapes {tuple(one.shape)} and {tuple(other.shape)}; they must be the same."
            )
        if not (one.is_floating_point() and other.is_floating_point()):
            if not torch.equal(one, other):
                raise ValueError(f"{name} is of {one.dtype}, and isn't the same in both models.")
            mixed[name] = one.clone()
            continue
        dtype = torch.promote_types(one.dtype, other.dtype)
        exact = torch.promote_types(dtype, torch.float32)
        mixed[name] = ((1 - alpha) * one.to(exact) + alpha * other.to(exact)).to(dtype)
    return mixed


# Models -------------------------------------------------------------------------------------------------------------


def _load(name: str) -> tuple[Any, Any]:
    """Return a model in the dtype that it's kept in, and its processor."""
    config: Any = load_config(name)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{name} is quantised; interpolate the model that it was made of.")
    is_classifier = DiffCLIPForImageClassification.__name__ in (config.architectures or [])
    classes = (DiffCLIPForImageClassification,) if is_classifier else ()
    model = load_model(name, *classes, dtype="auto")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(f"{name} holds an adapter; merge it into its model first, with PEFT's merge_and_unload.")
    return model, load_processor(name, config)


def load_pair(first: str, second: str) -> tuple[Any, Any, Any]:
    """Return two models that fit each other, and the first's processor.

    Raises:
        ValueError: One can't be loaded; or they are of other classes, or their configurations, tokenizers or image
            processors differ, and where.
    """
    (model, processor), (other, other_processor) = _load(first), _load(second)
    differences = [
        *([] if type(model) is type(other) else [f"the class is {type(model).__name__} and {type(other).__name__}"]),
        *config_differences(model.config, other.config),
        *processor_differences(processor, other_processor),
    ]
    if differences:
        raise ValueError(
            f"{first} and {second} don't fit: {'; '.join(differences[:3])}"
            f"{f', and {len(differences) - 3} more' if len(differences) > 3 else ''}."
        )
    return model, other, processor


def write_interpolated(first: str, second: str, alpha: float, output_dir: Path) -> None:
    """Write the model between two, with the first's configuration and processor, whole or not at all.

    Raises:
        ValueError: As `load_pair` and `interpolated` raise.
        OSError: The folder exists and isn't empty, or can't be written.
    """
    check_alpha(alpha)
    check_output_folder(output_dir)
    model, other, processor = load_pair(first, second)
    # Assigned, so that each tensor has the dtype that it's mixed in.
    model.load_state_dict(interpolated(model.state_dict(), other.state_dict(), alpha), assign=True)
    with written_whole(output_dir) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        if model.config.model_type.startswith("diffclip"):
            add_remote_code(folder)
    logger.info("%s is %g of %s and %g of %s.", output_dir, 1 - alpha, first, alpha, second)


# A curve over alpha -------------------------------------------------------------------------------------------------


def sweep(
    model: Any, other: Any, alphas: Sequence[float], measure: Callable[[Any], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Measure the models between two.

    Args:
        model: The first; it has its own weights again afterwards.
        other: The second.
        alphas: In 0..1.
        measure: Takes a model and returns what there is to say of it.

    Returns:
        For each alpha {"alpha": alpha, **measure(model)}.
    """
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    points = []
    try:
        for alpha in alphas:
            model.load_state_dict(interpolated(first, other.state_dict(), alpha))
            points.append({"alpha": alpha, **measure(model.eval())})
            logger.info("alpha %g: %s", alpha, {key: value for key, value in points[-1].items() if key != "alpha"})
    finally:
        model.load_state_dict(first)
    return points


def draw_curve(curves: Mapping[str, Sequence[Mapping[str, Any]]], names: Sequence[str], path: Path) -> None:
    """Draw two measures of models between two, each over alpha and one over the other, as a PNG.

    Args:
        curves: Points by what they're called, each with `alpha` and, in 0..1, the two names.
        names: Of the two measures, the one that fine-tuning was for first.
        path: Where to.
    """
    from matplotlib.figure import Figure

    # One above the other, so that a telephone shows them in a size that can be read.
    figure = Figure(figsize=(5.4, 8), layout="constrained")
    over_alpha, over_each_other = figure.subplots(2, 1)
    for line, name in zip("-:", names, strict=True):
        over_alpha.plot([], [], f"o{line}", ms=4, color="0.3", label=name)
    for number, (label, points) in enumerate(curves.items()):
        alphas = [point["alpha"] for point in points]
        values = [[100 * point[name] for point in points] for name in names]
        for line, shares in zip("-:", values, strict=True):
            over_alpha.plot(alphas, shares, f"o{line}", ms=4, color=f"C{number}")
        over_each_other.plot(values[1], values[0], "o-", ms=5, color=f"C{number}", label=label)
        for alpha, across, up in zip(alphas, *values[::-1], strict=True):
            if alpha in (0, 0.5, 1):
                over_each_other.annotate(f"{alpha:g}", (across, up), (4, 4), textcoords="offset points", fontsize=9)
    over_alpha.set(xlabel="alpha", ylabel="%")
    over_each_other.set(xlabel=f"{names[1]}, %", ylabel=f"{names[0]}, %")
    for axis in (over_alpha, over_each_other):
        axis.grid(alpha=0.3)
        if any(axis.get_legend_handles_labels()[1]):
            axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
    figure.savefig(path, dpi=150, format="png")


def write_sweep(args: argparse.Namespace) -> None:
    """Measure as the command line says, and write the curve and its picture, whole or not at all."""
    require_extra("plotting", "matplotlib")
    check_options(args)
    check_output_folder(args.output_dir)
    specs = dataset_specs(args)
    names = [spec.name for spec in specs]
    if len(set(names)) != 2:
        raise ValueError(f"--sweep is {' '.join(args.dataset)}; it must name two data sets.")
    device = check_device(args.device)
    alphas = sorted({check_alpha(alpha) for alpha in args.alphas})
    model, other, processor = load_pair(args.first, args.second)
    for one in (model, other):
        one.to(device, torch.float32)

    def measure(model: Any) -> dict[str, Any]:
        encoder = Encoder(model, processor, batch_size=args.batch_size, num_workers=args.num_workers)
        results = [RUN_TASK[args.task](encoder, spec, TaskOptions()) for spec in specs]
        return {name: result["metrics"][result["main"]] for name, result in zip(names, results, strict=True)} | {
            "results": results
        }

    points = sweep(model, other, alphas, measure)
    curve = {"first": args.first, "second": args.second, "task": args.task, "datasets": names, "points": points}
    with written_whole(args.output_dir) as folder:
        (folder / CURVE).write_text(json.dumps(curve, indent=2, default=str) + "\n", encoding="utf-8")
        draw_curve({"": points}, names, folder / PICTURE)


# The command --------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = CommandParser(
        prog="python -m diffclip_hf.interpolate",
        usage="%(prog)s A B --alpha SHARE --output-dir DIR\n"
        "       %(prog)s A B --sweep NEW OLD --output-dir DIR [OPTION ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("first", metavar="A", help="A model's folder or its id on the Hub; alpha 0 gives its weights.")
    parser.add_argument("second", metavar="B", help="The other model; alpha 1 gives its weights.")
    parser.add_argument(
        "--output-dir", type=Path, required=True, metavar="DIR", help="The folder to write, new or empty."
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--alpha", type=float, metavar="SHARE", help="Write the model with this share of B, in 0..1.")
    which.add_argument(
        "--sweep",
        dest="dataset",
        nargs=2,
        metavar=("NEW", "OLD"),
        help="Measure each of --alphas on two data sets: presets, folders, Parquet files, or ids on the Hub.",
    )
    group = parser.add_argument_group(
        "with --sweep", "What you don't give comes from the data set's preset, or is found by the usual names."
    )
    group.add_argument(
        "--alphas", type=float, nargs="+", metavar="SHARE", help="The shares of B. (default: 0, 0.1 and so on to 1)"
    )
    group.add_argument("--task", choices=("zero-shot", "retrieval"), help="What to measure. (default: zero-shot)")
    add_split_and_columns(group, {"image": "images", "label": "labels", "caption": "captions"})
    add_label_options(group)
    add_encoding_options(group)
    add_device_option(group)
    # So that one that is given without --sweep is found.
    parser.set_defaults(device=None)
    return parser


def run(args: argparse.Namespace) -> None:
    """Write the model between two, or measure many, as the command line says.

    Raises:
        ValueError: An option, the models or the data don't fit.
        OSError: Something can't be read or written.
    """
    if args.alpha is not None:
        if idle := [name for name, value in vars(args).items() if value is not None and name not in MIXING]:
            raise ValueError(f"--{idle[0].replace('_', '-')} can't be used with --alpha, which measures nothing.")
        write_interpolated(args.first, args.second, args.alpha, args.output_dir)
        return
    args.alphas, args.task = args.alphas or ALPHAS, args.task or "zero-shot"
    args.device = args.device or default_device()
    write_sweep(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 1, with the reason on the log, where the models or an option don't fit."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    args = build_parser().parse_args(argv)
    return run_command(lambda: run(args), logger)


if __name__ == "__main__":
    sys.exit(main())
