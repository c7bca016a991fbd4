"""Embed tar shards, folders of pictures or data sets, on any number of processes.

    python -m diffclip_hf.embed SOURCE OUT --model MODEL [OPTION ...]
    accelerate launch -m diffclip_hf.embed SOURCE OUT --model MODEL [OPTION ...]

SOURCE is tar shards (a folder, a pattern or a URL), a folder of pictures, Parquet files, or a data set of the Hub. OUT
gets the embeddings, L2-normalised, and what is said of each picture, in the layout that clip-retrieval reads. The same
command again goes on where one was stopped, on any number of processes.
"""

import argparse
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers.utils import logging as transformers_logging

from .common.commands import EXPECTED, CommandParser, require_extra, run_command, warn_of_one_process
from .common.embedding_parts import IMAGES, REPORT, TEXTS, EmbeddingParts, PartWriter, begin, check_place, locked
from .common.keys import describe, fingerprint
from .common.known_files import THREADS
from .common.loading import check_device
from .common.reading_ahead import check_num_workers
from .common.reading_batches import read_batches
from .common.whole_files import write_text_whole
from .data.counts import CAPTION_KINDS, SkipCounts
from .data.parts import ShardParts, TableParts, find_parts
from .data.shard_files import names_shards
from .evaluate import add_model_options, add_split_and_columns, describe_encoder
from .evaluation.encoder import Encoder, check_batches, check_finite, text_options
from .model.image_fetching_diffclip import one_line


logger = logging.getLogger(__name__)
Found = TypeVar("Found")
Parts = ShardParts | TableParts
# A process may wait for as long as another has work; gloo counts in milliseconds, of which int32 holds 24 days.
WAITS = timedelta(days=14)
PART_ROWS = 10_000
# Of a norm that float32 has made 1.
UNIT_TOLERANCE = 1e-3
# What tar shards have no use for.
TABLE_OPTIONS = ("split", "image_column", "caption_column", "part_rows")


# Rows ---------------------------------------------------------------------------------------------------------------


def _reader(encoder: Encoder) -> Callable[[dict[str, Any]], tuple[torch.Tensor | None, tuple[dict[str, Any], str]]]:
    """Return a function that reads a row: its picture's pixel values or None, the rest of it, and what is wrong."""

    def read(row: dict[str, Any]) -> tuple[torch.Tensor | None, tuple[dict[str, Any], str]]:
        image = row.pop("image")
        # A damaged file makes Pillow and its plug-ins raise nearly anything.
        try:
            return encoder.pixel_values(image)[0], (row, "")
        except Exception as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            return None, (row, f"{kind}{one_line(error)}")

    return read


def write_part(parts: Parts, number: int, encoder: Encoder, output: EmbeddingParts, bar: Any) -> None:
    """Embed a part and write its files, whole or not at all.

    Batches begin with the part, so that its embeddings depend on nothing else.

    Args:
        parts: What there is to embed.
        number: Which part.
        encoder: Embeds it.
        output: Where it's written.
        bar: Shows how many rows are read.

    Raises:
        ValueError: More rows or shards than allowed are broken, or an embedding can't be normalised.
        OSError: It can't be written.
    """
    before, stamp, cut = parts.skipped.counts, parts.stamp(number), 0
    with output.writing(number) as writer:
        batches = read_batches(
            parts.rows(number),
            _reader(encoder),
            encoder.batch_size,
            encoder.num_workers,
            sendable=True,
            gives_way=encoder.device.type == "cpu",
        )
        with closing(batches):
            for pixels, read in batches:
                rows = [row for row, wrong in read if not wrong]
                for row, wrong in read:
                    if wrong:
                        parts.skipped.skip("corrupt_images", row["image_path"], wrong)
                parts.skipped.check()
                if rows:
                    cut += _write_batch(pixels, rows, parts.captions, encoder, writer)
                bar.update(len(read))
        if parts.stamp(number) != stamp:
            raise ValueError(f"{stamp[0]} changed while it was read; give the same command again.")
        counts = {kind: count - before[kind] for kind, count in parts.skipped.counts.items()}
        writer.finish({"stamp": stamp, "broken": parts.is_broken(number), "counts": counts | {"cut_captions": cut}})


def _check_unit(embeds: torch.Tensor, kind: str) -> torch.Tensor:
    """Return embeddings, (rows, width); raise a ValueError where one isn't finite or hasn't the norm 1.

    PyTorch normalises what is 0, or so large that the sum of its squares overflows, to zeros, which are finite.
    """
    norms = check_finite(embeds, kind).norm(dim=-1)
    if bad := int(((norms - 1).abs() > UNIT_TOLERANCE).sum()):
        raise ValueError(
            f"{bad} of {len(embeds)} {kind} embeddings can't be L2-normalised: the norm of what the model returns "
            "must be above 1e-12 and below 1.8e19, so its weights are broken, or its image processor's mean and std."
        )
    return embeds


def _write_batch(
    pixels: torch.Tensor, rows: Sequence[dict[str, Any]], captions: bool, encoder: Encoder, writer: PartWriter
) -> int:
    """Embed and write a batch; return how many captions are cut to the model's length."""
    embeds = {IMAGES: _check_unit(encoder.embed_pixels(pixels), "image").numpy()}
    cut = 0
    if captions:
        tokens, cut = encoder.tokenize([row["caption"] for row in rows])
        texts = torch.cat([encoder.embed_tokens(some) for some in tokens])
        embeds[TEXTS] = _check_unit(texts, "text").numpy()
    writer.add(embeds, rows)
    return cut


# Processes ----------------------------------------------------------------------------------------------------------


def start_processes(device: str | None) -> Any:
    """Return accelerate's state of all processes, which it starts to speak with each other.

    Args:
        device: Where the model runs, None for what accelerate chooses.

    Raises:
        ValueError: As `check_device` raises, or several processes would share one GPU.
    """
    from accelerate import PartialState

    on_cpu = not torch.cuda.is_available() if device is None else check_device(device).type == "cpu"
    state = PartialState(cpu=on_cpu, timeout=WAITS)
    if device is not None and ":" in device and state.num_processes > 1:
        raise ValueError(f"device is {device}, and there are {state.num_processes} processes; leave it to accelerate.")
    return state


@contextmanager
def _with_others() -> Iterator[None]:
    """Say what it means where another process isn't there any more."""
    try:
        yield
    except RuntimeError as error:
        raise ChildProcessError(
            "Another process ended before its work was done, and its own error says why. What is written stays; the "
            "same command goes on from there."
        ) from error


def in_the_first(state: Any, work: Callable[[], Found]) -> Found:
    """Return what `work` returns in the first process, or raise its error, in all of them."""
    from accelerate.utils import broadcast_object_list

    answer: list[Any] = [None, None]
    if state.is_main_process:
        try:
            answer[0] = work()
        except EXPECTED as error:
            answer[1] = one_line(error)
    with _with_others():
        broadcast_object_list(answer)
    if answer[1] is not None:
        raise ValueError(answer[1])
    return answer[0]


# The command --------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = CommandParser(
        prog="python -m diffclip_hf.embed",
        usage="%(prog)s SOURCE OUT --model MODEL [OPTION ...]\n"
        "       accelerate launch -m diffclip_hf.embed SOURCE OUT --model MODEL [OPTION ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="Tar shards, a folder of pictures, Parquet files, or a data set of the Hub."
    )
    parser.add_argument(
        "output", metavar="OUT", type=Path, help="The folder to write: new, empty, or begun by the same command."
    )
    parser.add_argument("--model", metavar="MODEL", required=True, help="A model's folder or its id on the Hub.")
    parser.add_argument(
        "--output-dtype",
        choices=("float16", "float32"),
        default="float16",
        help="The numbers' type in the files. (default: %(default)s)",
    )
    parser.add_argument("--no-captions", action="store_true", help="Embed the pictures alone.")
    group = parser.add_argument_group("data", "Columns that you don't give are found by the usual names.")
    add_split_and_columns(group, {"image": "images", "caption": "captions"}, "The split to embed. (default: train)")
    group.add_argument(
        "--part-rows",
        type=int,
        metavar="N",
        help=f"How many rows a part has, where SOURCE isn't tar shards. (default: {PART_ROWS})",
    )
    for name, share, what in (("skipped", 0.01, "rows"), ("broken", 0.1, "shards")):
        group.add_argument(
            f"--max-{name}-share",
            type=float,
            metavar="SHARE",
            default=share,
            help=f"The largest share of {what} that may be unreadable. (default: %(default)s)",
        )
    add_model_options(parser)
    # Each process has its own.
    parser.set_defaults(device=None)
    return parser


def _check_options(args: argparse.Namespace, shards: bool) -> None:
    """Raise a ValueError for options that don't fit, an ImportError for a missing extra."""
    require_extra("training", "accelerate", "datasets")
    check_batches(args.batch_size, args.num_workers)
    if args.part_rows is not None and args.part_rows < 1:
        raise ValueError(f"part_rows is {args.part_rows}; it must be at least 1.")
    if shards and (idle := [name for name in TABLE_OPTIONS if getattr(args, name) is not None]):
        raise ValueError(f"--{idle[0].replace('_', '-')} can't be used with {args.source!r}, which names tar shards.")
    if args.no_captions and args.caption_column is not None:
        raise ValueError("--caption-column can't be used with --no-captions.")
    source, output = Path(args.source).resolve(), args.output.expanduser().resolve()
    if source.is_dir() and output.is_relative_to(source):
        raise ValueError(f"{args.output} is in {args.source}, of which it would become a part; name another folder.")


def _load_encoder(args: argparse.Namespace, state: Any) -> Encoder:
    """Return the model on this process's device; the cores are shared out among the processes of a machine."""
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    workers = max(1, check_num_workers(None) // beside) if args.num_workers is None else args.num_workers
    return Encoder.from_pretrained(
        args.model,
        revision=args.revision,
        device=args.device or state.device,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        batch_size=args.batch_size,
        num_workers=workers,
    )


def _settings(args: argparse.Namespace, parts: Parts, encoder: Encoder) -> dict[str, Any]:
    """Return all that the embeddings depend on, as JSON: source, model and options."""
    processor = encoder.processor
    image_processor, tokenizer = processor.image_processor, processor.tokenizer
    reading = [describe(image_processor.to_dict()), tokenizer.get_vocab(), text_options(encoder.model, tokenizer)]
    return {
        "source": args.source,
        **parts.describe(),
        "captions": parts.captions,
        "columns": list(parts.columns),
        **{name: getattr(args, name) for name in TABLE_OPTIONS[:3]},
        # Of weights that show no plain values the name has to do.
        "weights": encoder.weights() or args.model,
        "processor": fingerprint(reading),
        "dtype": args.dtype,
        "attn_implementation": encoder.model.config._attn_implementation,
        "batch_size": encoder.batch_size,
        "output_dtype": args.output_dtype,
    }


def _unfinished(parts: Parts, output: EmbeddingParts) -> list[int]:
    """Return the parts that are still to be written: those that aren't there, have changed since, or broke off."""

    def is_done(number: int) -> bool:
        note = output.note(number)
        return note is not None and not note["broken"] and note["stamp"] == parts.stamp(number)

    # A shard is read anew where it isn't known that it's the same.
    with (
        ThreadPoolExecutor(THREADS) as pool,
        transformers_logging.tqdm(total=len(parts), desc="Parts", unit="part", disable=len(parts) < 2) as bar,
    ):
        unfinished = []
        for number, done in enumerate(pool.map(is_done, range(len(parts)))):
            unfinished += [] if done else [number]
            bar.update()
    return unfinished


def _report(args: argparse.Namespace, parts: Parts, encoder: Encoder, output: EmbeddingParts) -> None:
    """Judge what was counted in all parts, and write it.

    Raises:
        ValueError: A part isn't there, or more rows or shards than allowed were broken.
    """
    notes = [output.note(number) for number in range(len(parts))]
    if missing := [number for number, note in enumerate(notes) if note is None]:
        raise ValueError(f"Part {missing[0]} of {args.output} isn't there any more; give the same command again.")
    total: Counter[str] = Counter()
    for note in notes:
        assert note is not None
        total.update({"rows": note["rows"], **note["counts"]})
    broken = parts.check_broken([number for number, note in enumerate(notes) if note and note["broken"]])
    parts.skipped.check({kind: total[kind] for kind in parts.skipped.counts}, least_seen=1)
    described = describe_encoder(args.model, "embed", encoder)
    report = {
        "source": args.source,
        **{name: described[name] for name in ("model", "preprocessing", "versions")},
        "parts": len(parts),
        "captions": parts.captions,
        "output_dtype": args.output_dtype,
        **{name: total[name] for name in ("rows", *parts.skipped.counts, "cut_captions")},
        "broken_shards": broken,
    }
    write_text_whole(args.output / REPORT, json.dumps(report, indent=2, default=str) + "\n")
    logger.info("%s has the embeddings of %d of %d rows.", args.output, total["rows"], total["seen"])


def _embed_own(parts: Parts, numbers: Sequence[int], encoder: Encoder, output: EmbeddingParts, first: bool) -> None:
    """Embed this process's parts; the first process shows how far it is."""
    with transformers_logging.tqdm(
        total=parts.count_rows(numbers), desc="Images", unit="image", disable=not first
    ) as bar:
        for number in numbers:
            write_part(parts, number, encoder, output, bar)


def _embed_together(args: argparse.Namespace, state: Any, parts: Parts, encoder: Encoder) -> None:
    """Share the parts out among the processes, embed them and report; OUT is locked by the first process meanwhile."""
    settings = _settings(args, parts, encoder)
    columns = (*parts.columns, "caption") if parts.captions else parts.columns
    output = EmbeddingParts(args.output, len(parts), parts.captions, args.output_dtype, columns)
    with ExitStack() as lock:

        def plan() -> tuple[dict[str, Any], list[int]]:
            lock.enter_context(locked(args.output))
            begin(args.output, settings)
            return settings, _unfinished(parts, output)

        planned, unfinished = in_the_first(state, plan)
        if planned != settings:
            different = ", ".join(name for name in settings if planned.get(name) != settings[name])
            raise ValueError(f"Process {state.process_index} has another {different} than the first process.")
        logger.info(
            "%d of %d parts are to be embedded, %s, by %s.",
            len(unfinished),
            len(parts),
            "with captions" if parts.captions else "pictures alone",
            "1 process" if state.num_processes == 1 else f"{state.num_processes} processes",
        )
        own = unfinished[state.process_index :: state.num_processes]
        _embed_own(parts, own, encoder, output, state.is_main_process)
        with _with_others():
            state.wait_for_everyone()
        in_the_first(state, lambda: _report(args, parts, encoder, output))


def run(args: argparse.Namespace) -> None:
    """Embed as the command line says, as one of the processes that accelerate has started.

    Raises:
        ValueError: An option, the model or the data don't fit, or OUT was begun with others, or is being written.
        OSError: Something can't be read or written, or another process has ended.
    """
    shards = names_shards(args.source)
    _check_options(args, shards)
    warn_of_one_process("--device cpu", logger)
    args.output = args.output.expanduser()
    state = start_processes(args.device)
    in_the_first(state, lambda: check_place(args.output))
    skipped = SkipCounts(("corrupt_images", *CAPTION_KINDS), args.max_skipped_share)
    table = {"split": args.split or "train", "image_column": args.image_column, "caption_column": args.caption_column}
    parts = find_parts(
        args.source,
        shards=shards,
        skipped=skipped,
        max_broken_share=args.max_broken_share,
        part_rows=args.part_rows or PART_ROWS,
        captions=not args.no_captions,
        **({} if shards else table),
    )
    encoder = _load_encoder(args, state)
    _embed_together(args, state, parts, encoder)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 1, with the reason on the log, where an option, the model or the data doesn't fit."""
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if first else logging.ERROR, format="%(levelname)s %(message)s")
    args = build_parser().parse_args(argv)
    status = run_command(lambda: run(args), logger)
    if status == 0:
        from accelerate import PartialState

        # A process that leaves its group open at its exit may take the others' connections down with it.
        PartialState().destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
