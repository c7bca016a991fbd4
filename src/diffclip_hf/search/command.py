"""Search a folder of pictures by text, or by a picture.

    python -m diffclip_hf.search FOLDER "two dogs" --model MODEL --top 10 --sheet found.png
    python -m diffclip_hf.search FOLDER --image dog.jpg --model MODEL

MODEL is a folder or an id on the Hub, of a DiffCLIP or another CLIP-like model of Transformers. Each line of the
output is a cosine similarity, a tab and a path, the best first; with several queries a tab and the query follow. The
pictures are embedded once: the next time only new and changed ones are. Pictures that can't be read are left out and
named.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.commands import CommandParser, run_command
from ..common.loading import check_path
from ..common.whole_files import check_output_file, write_whole
from ..evaluate import add_cache_options, add_model_options, find_cache
from ..evaluation.encoder import Encoder, check_batches
from ..evaluation.specs import TEMPLATE_SETS, template_texts
from ..model.image_reading_diffclip import read_image
from ..zero_shot import label_texts
from .index import TEMPLATE, ImageIndex, Match
from .sheets import MOST_DRAWN, draw_sheet, in_one_line


logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = CommandParser(
        prog="python -m diffclip_hf.search",
        usage="%(prog)s FOLDER QUERY [QUERY ...] --model MODEL [OPTION ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", help="The pictures, in sub-folders too.")
    parser.add_argument("queries", metavar="QUERY", nargs="*", help="A text, such as 'two dogs'.")
    parser.add_argument(
        "--model",
        metavar="MODEL",
        required=True,
        help="The model's folder or its id on the Hub, as embedded/diffclip-emoji.",
    )
    parser.add_argument(
        "--image",
        metavar="FILE",
        action="append",
        default=[],
        help="A picture as a query. Can be given several times.",
    )
    parser.add_argument(
        "--top", metavar="N", type=int, default=10, help="How many pictures to show. (default: %(default)s)"
    )
    parser.add_argument(
        "--template",
        metavar="TEXT",
        action="append",
        help=f"A sentence with {{}} for the text, or one of the sets {' and '.join(TEMPLATE_SETS)}. Can be given "
        "several times, to average. (default: the text as it is)",
    )
    parser.add_argument(
        "--sheet",
        metavar="OUT.png",
        type=Path,
        help=f"Draw the pictures on a contact sheet too, at most {MOST_DRAWN}: the best of each query.",
    )
    parser.add_argument(
        "--print0", action="store_true", help="Print the paths alone, each with a NUL at its end, for xargs -0."
    )
    add_cache_options(parser)
    add_model_options(parser)
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Raise a ValueError or an OSError for what can't work, before the work."""
    if not args.queries and not args.image:
        raise ValueError("There is no query; give a text, or a picture with --image.")
    if any(not query.strip() for query in args.queries):
        raise ValueError("A query is empty; give a text, or a picture with --image.")
    if args.top < 1:
        raise ValueError(f"--top is {args.top}; it must be at least 1.")
    if args.template is not None and not args.queries:
        raise ValueError("--template is for texts, and there is none.")
    if args.queries:
        label_texts(args.queries, templates_of(args))
    check_batches(args.batch_size, args.num_workers)
    if args.sheet is not None:
        if args.sheet.suffix.lower() != ".png":
            raise ValueError(f"--sheet is {str(args.sheet)!r}; its name must end in .png.")
        if (count := len(args.queries) + len(args.image)) > MOST_DRAWN:
            raise ValueError(f"--sheet draws at most {MOST_DRAWN} queries, and there are {count}; leave it out.")
        check_output_file(args.sheet)
    folder = check_path(args.folder, "FOLDER")
    if not folder.is_dir():
        raise ValueError(f"FOLDER is {args.folder!r}, which isn't a folder.")
    if args.sheet is not None and folder.resolve() in args.sheet.expanduser().resolve().parents:
        logger.warning("The contact sheet lies in the folder, so it's one of the pictures the next time.")
    args.folder = folder


def templates_of(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the templates that the command line gives."""
    return (TEMPLATE,) if args.template is None else template_texts(args.template)


def write_results(queries: Sequence[str], results: Sequence[Sequence[Match]], alone: bool) -> None:
    """Write what was found, as bytes, for a path needn't be UTF-8.

    Args:
        queries: What was searched.
        results: What was found for each.
        alone: Whether to write the paths alone, exactly. Otherwise what breaks a line or a column is written visibly.
    """
    lines = []
    for query, found in zip(queries, results, strict=True):
        for score, path in found:
            shown = f"\t{in_one_line(query)}" if len(queries) > 1 else ""
            lines.append(f"{path}\0" if alone else f"{score:.4f}\t{in_one_line(path)}{shown}\n")
    sys.stdout.flush()
    sys.stdout.buffer.write("".join(lines).encode("utf-8", "surrogateescape"))
    sys.stdout.flush()


def run(args: argparse.Namespace) -> None:
    """Search as the command line says; print what is found, and draw it.

    Raises:
        ValueError: An option doesn't fit, or the folder has no picture that can be read.
        OSError: Something can't be read or written.
    """
    check_options(args)
    cache = find_cache(args)
    pictures = [read_image(os.path.expanduser(image)) for image in args.image]
    encoder = Encoder.from_pretrained(
        args.model,
        revision=args.revision,
        device=args.device,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
    )
    options: dict[str, Any] = {"batch_size": args.batch_size, "num_workers": args.num_workers}
    index = ImageIndex.from_folder(args.folder, encoder.model, encoder.processor, cache_dir=cache.folder, **options)
    if args.top > len(index):
        logger.info("There are %d pictures, fewer than --top %d: these are all.", len(index), args.top)
    results = index.search([*args.queries, *pictures], args.top, templates_of(args))
    queries = [*args.queries, *args.image]
    write_results(queries, results, args.print0)
    if args.sheet is not None:
        drawn, longest = MOST_DRAWN // len(queries), max(map(len, results))
        if longest > drawn:
            logger.warning("--sheet draws the best %d of the %d pictures found for each query.", drawn, longest)
        sheet = draw_sheet(queries, [found[:drawn] for found in results])
        write_whole(args.sheet, lambda beside: sheet.save(beside, "PNG"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 1, with the reason on the log, where an option or the data doesn't fit."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    # So that options may stand between the folder and the queries.
    args = build_parser().parse_intermixed_args(argv)
    return run_command(lambda: run(args), logger)


__all__ = ["build_parser", "main"]
