"""Measure DiffCLIP, or another of Transformers' CLIP-like models, as the paper does.

    python -m diffclip_hf.evaluate MODEL --task zero-shot --dataset imagenet-v2 imagenet-a --output results.json
    python -m diffclip_hf.evaluate MODEL --task retrieval --dataset my-pictures --split train

The command prints a table of percentages beside the paper's figures, with the means of several data sets. --output
writes all that was measured, as shares of 1.
"""

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .common.commands import CommandParser, add_device_option, require_extra, run_command
from .common.embedding_cache import DEFAULT_FOLDER, EmbeddingCache
from .common.machine import describe_machine, describe_versions
from .common.whole_files import check_output_file, write_text_whole
from .data.label_names import read_label_names
from .evaluation.encoder import Encoder, check_batches
from .evaluation.report import markdown_table, mean_metrics
from .evaluation.specs import (
    METRICS,
    TASKS,
    TEMPLATE_SETS,
    DatasetSpec,
    find_dataset,
    preset_names,
    read_preset,
    template_texts,
)
from .evaluation.tasks import EPISODE_OPTIONS, RUN_TASK, TaskOptions


logger = logging.getLogger(__name__)
LABELLED, TEXTS, PROBES = (
    ("zero-shot", "linear-probe", "few-shot"),
    ("zero-shot", "mmvp"),
    ("linear-probe", "few-shot"),
)
# The tasks that an option is for, if not for all.
OPTION_TASKS = {
    **{name: PROBES for name in ("train_split", "features")},
    **{name: ("few-shot",) for name in ("ways", "shots", "queries", "episodes")},
    "seed": PROBES,
    "validation_split": ("linear-probe",),
    "label_column": LABELLED,
    "caption_column": ("retrieval", "mmvp"),
    "pattern_column": ("mmvp",),
    "caption_separator": ("retrieval",),
    "class_names": ("zero-shot",),
    "templates": TEXTS,
    "metric": ("zero-shot", "linear-probe"),
}


def _count_or_all(text: str) -> int | None:
    """Return a number, or None for `all`."""
    return None if text == "all" else int(text)


def add_split_and_columns(
    group: argparse._ActionsContainer, held: Mapping[str, str], split: str = "The split to measure. (default: test)"
) -> None:
    """Add what is used of a data set: its split, and for each kind of column what it holds."""
    group.add_argument("--split", metavar="NAME", help=split)
    for column, content in held.items():
        group.add_argument(f"--{column}-column", metavar="NAME", help=f"The column that has the {content}.")


def add_label_options(group: argparse._ActionsContainer) -> None:
    """Add how labels become texts."""
    group.add_argument(
        "--class-names",
        metavar="FILE",
        type=Path,
        help="A file with the classes' names, one a line in the order of the labels, or JSON from label to name.",
    )
    group.add_argument(
        "--templates",
        nargs="+",
        metavar="TEXT",
        help=f"Sentences with {{}} for the label, or one of the sets {' and '.join(TEMPLATE_SETS)}.",
    )


def add_encoding_options(group: argparse._ActionsContainer) -> None:
    """Add how many images are read and encoded at once."""
    group.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="How many images are encoded at once. (default: 8 on a CPU, else 64)",
    )
    group.add_argument(
        "--num-workers",
        type=int,
        metavar="N",
        help="How many processes read images; 0 or 1 reads them one after the other. "
        "(default: one for each core, at most 32)",
    )


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "data sets", "What you don't give comes from the preset, or is found by the usual names."
    )
    add_split_and_columns(
        group,
        {
            "image": "images",
            "label": "labels",
            "caption": "captions, or MMVP's texts",
            "pattern": "visual patterns, for mmvp",
        },
    )
    group.add_argument(
        "--train-split", metavar="NAME", help="The split that probes and few-shot classes learn from. (default: train)"
    )
    group.add_argument(
        "--validation-split",
        metavar="NAME",
        help="The split on which a probe's regularisation is chosen. (default: a fifth of the training split)",
    )
    group.add_argument(
        "--caption-separator", metavar="TEXT", help="What lies between captions, where several are one text."
    )
    add_label_options(group)
    group.add_argument("--metric", choices=METRICS, help="The figure for the table and the mean. (default: accuracy)")


def _add_task_options(parser: argparse.ArgumentParser) -> None:
    defaults = TaskOptions()
    group = parser.add_argument_group("linear-probe and few-shot")
    group.add_argument(
        "--features",
        choices=("pooled", "projected"),
        help="The image tower's output before the projection, or the normalised embedding. (default: pooled)",
    )
    # Without defaults here, so that those given for another task are found.
    for name, kind, text in (
        ("ways", _count_or_all, "How many classes an episode has, or all."),
        ("shots", int, "How many training images a class has."),
        ("queries", _count_or_all, "How many test images a class has, or all."),
        ("episodes", int, "How many episodes there are."),
        ("seed", int, "Where the random choice of images starts."),
    ):
        shown = f"{text} (default: {getattr(defaults, name)})"
        group.add_argument(f"--{name}", type=kind, metavar="N", default=argparse.SUPPRESS, help=shown)


def add_cache_options(group: argparse._ActionsContainer) -> None:
    """Add where embeddings are kept, if they are."""
    group.add_argument(
        "--cache-dir",
        metavar="FOLDER",
        type=Path,
        help=f"Where embeddings are kept. (default: {str(DEFAULT_FOLDER).replace('%', '%%')})",
    )
    group.add_argument("--no-cache", action="store_true", help="Keep no embeddings, and use none.")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add which model it is, and where and how it runs."""
    group = parser.add_argument_group("model")
    group.add_argument("--revision", metavar="NAME", help="A branch, tag or commit of the model on the Hub.")
    add_device_option(group)
    group.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="The numbers' type in the model. (default: %(default)s)",
    )
    group.add_argument("--attn-implementation", metavar="NAME", help="What computes attention, such as eager or sdpa.")
    add_encoding_options(group)


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = CommandParser(
        prog="python -m diffclip_hf.evaluate",
        usage="%(prog)s MODEL --task TASK --dataset NAME [NAME ...] [OPTION ...]\n       %(prog)s --list",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="A model's folder or its id on the Hub.")
    parser.add_argument("--task", metavar="TASK", choices=TASKS, help=f"What to measure: {', '.join(TASKS)}.")
    parser.add_argument(
        "--dataset",
        nargs="+",
        metavar="NAME",
        default=[],
        help="What to measure it on: presets (see --list), folders, Parquet files, or ids on the Hub.",
    )
    parser.add_argument("--list", action="store_true", help="List the presets and stop.")
    parser.add_argument("--output", metavar="FILE.json", type=Path, help="Write all results to this file too.")
    add_cache_options(parser)
    _add_data_options(parser)
    _add_task_options(parser)
    add_model_options(parser)
    return parser


def list_presets() -> str:
    """Return a Markdown table of the presets."""
    lines = ["| preset | tasks | on the Hub |", "| --- | --- | --- |"]
    for name in preset_names():
        spec = read_preset(name)
        lines.append(f"| {name} | {', '.join(spec.tasks)} | {spec.source} |")
    return "\n".join(lines) + "\n"


def dataset_specs(args: argparse.Namespace) -> list[DatasetSpec]:
    """Return what the command line says of each data set.

    Raises:
        ValueError: As `find_dataset` raises.
    """
    fields = {one.name for one in dataclasses.fields(DatasetSpec)} - {"name", "source", "tasks", "paper"}
    changes = {name: value for name, value in vars(args).items() if name in fields}
    changes["class_names"] = None if args.class_names is None else read_label_names(args.class_names)
    changes["templates"] = None if args.templates is None else template_texts(args.templates)
    return [find_dataset(name, args.task, changes) for name in args.dataset]


def describe_encoder(name: str, task: str, encoder: Encoder) -> dict[str, Any]:
    """Return what a measurement depends on: the model, its preprocessing, and where and how it runs."""
    model, image_processor = encoder.model, encoder.processor.image_processor
    packages = ("datasets", "scikit-learn") if task == "linear-probe" else ("datasets",)
    return {
        "model": {
            "name": name,
            "class": type(model).__name__,
            "commit": encoder.commit,
            "weights_sha256": encoder.weights(),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
            "attn_implementation": model.config._attn_implementation,
        },
        "preprocessing": {"class": type(image_processor).__name__, **image_processor.to_dict()},
        "device": str(model.device),
        "machine": describe_machine(),
        "versions": describe_versions(*packages),
    }


def check_options(args: argparse.Namespace) -> None:
    """Raise a ValueError for options that the task takes no notice of, or too small, or a missing extra."""
    given = [name for name, value in vars(args).items() if value is not None or name in EPISODE_OPTIONS]
    if idle := [name for name in given if args.task not in OPTION_TASKS.get(name, TASKS)]:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        raise ValueError(f"{names} can't be used with --task {args.task}.")
    require_extra("evaluation", "datasets", *(["sklearn"] if args.task == "linear-probe" else []))
    check_batches(args.batch_size, args.num_workers)


def find_cache(args: argparse.Namespace) -> EmbeddingCache:
    """Return where `add_cache_options` says that embeddings are kept.

    Raises:
        OSError: Nothing can be written there.
    """
    cache = EmbeddingCache(None if args.no_cache else args.cache_dir or DEFAULT_FOLDER)
    cache.check(mend="Or keep none, with --no-cache.")
    return cache


def load_encoder(args: argparse.Namespace) -> Encoder:
    """Return the model that the command line names, after it's sure that what is found can be written.

    Raises:
        ValueError: An option doesn't fit the model, or it can't be loaded.
        OSError: The embeddings or the output can't be written.
    """
    cache = find_cache(args)
    if args.output is not None:
        check_output_file(args.output)
    return Encoder.from_pretrained(
        args.model,
        revision=args.revision,
        device=args.device,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        cache=cache,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
    )


def report_results(
    args: argparse.Namespace, encoder: Encoder, specs: Sequence[DatasetSpec], results: Sequence[dict[str, Any]]
) -> None:
    """Print the table and write the results, the table first, so that it's there whatever happens to the file."""
    sys.stdout.write(markdown_table(args.task, args.model, specs, results))
    sys.stdout.flush()
    if args.output is None:
        return
    report = {"task": args.task, **describe_encoder(args.model, args.task, encoder), "results": list(results)}
    if len(results) > 1:
        report["mean"] = mean_metrics(results)
    try:
        write_text_whole(args.output, json.dumps(report, indent=2, default=str) + "\n")
    except OSError as error:
        raise OSError(f"The results above can't be written to {args.output}: {error}") from error


def run(args: argparse.Namespace) -> None:
    """Measure as the command line says; print and write the results, those before an error too.

    Raises:
        ValueError: An option doesn't fit the model or the data.
        OSError: Something can't be read or written.
    """
    check_options(args)
    specs = dataset_specs(args)
    encoder = load_encoder(args)
    options = TaskOptions(
        pooled=args.features != "projected",
        **{name: getattr(args, name) for name in EPISODE_OPTIONS if hasattr(args, name)},
    )
    results: list[dict[str, Any]] = []
    try:
        for spec in specs:
            logger.info("%s on %s", args.task, spec.name)
            results.append(RUN_TASK[args.task](encoder, spec, options))
    except BaseException:
        if results:
            # Both errors count.
            run_command(lambda: report_results(args, encoder, specs[: len(results)], results), logger)
        raise
    report_results(args, encoder, specs, results)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 1, with the reason on the log, where an option or the data doesn't fit."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.list:
        sys.stdout.write(list_presets())
        return 0
    if args.model is None or args.task is None or not args.dataset:
        parser.error("MODEL, --task and --dataset are needed")
    return run_command(lambda: run(args), logger)


if __name__ == "__main__":
    sys.exit(main())
