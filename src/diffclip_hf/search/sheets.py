"""Contact sheets: the pictures that were found, small, with their scores."""

import os
import re
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..model.image_reading_diffclip import read_image
from .index import Match


# In pixels.
CELL, GAP, LINE, FONT_SIZE = 176, 12, 20, 14
MOST_COLUMNS = 5
INK, QUIET = "#202124", "#5f6368"
# Pictures on a sheet, whose pixels then take at most 150 MB.
MOST_DRAWN = 500
# What starts a line or a column, or steers a terminal.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def in_one_line(text: str) -> str:
    """Return a text on one line, with its line breaks, tabs and other control characters as Python writes them."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _shortened(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """Return a text, or its beginning and its end, so that it's no wider than so many pixels."""
    # What isn't UTF-8 in a file's name.
    text = in_one_line(text).encode("utf-8", "replace").decode()
    shown, kept = text, len(text)
    while kept > 1 and font.getlength(shown) > width:
        kept -= 1
        shown = f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
    return shown


def draw_sheet(queries: Sequence[str], results: Sequence[Sequence[Match]]) -> Image.Image:
    """Draw what was found, five pictures in a row, under each query, with scores and file names.

    Args:
        queries: What was searched.
        results: What was found for each; the names are pictures' paths.

    Raises:
        ValueError: A picture can't be read.
    """
    font = ImageFont.load_default(FONT_SIZE)
    columns = max(1, min(MOST_COLUMNS, max(map(len, results), default=1)))
    rows = [-(-len(found) // columns) for found in results]
    height = GAP + sum(LINE + GAP + count * (CELL + 2 * LINE + GAP) for count in rows)
    sheet = Image.new("RGB", (GAP + columns * (CELL + GAP), height), "white")
    draw = ImageDraw.Draw(sheet)
    top = GAP
    for query, found, count in zip(queries, results, rows, strict=True):
        draw.text((GAP, top), _shortened(query, font, sheet.width - 2 * GAP), INK, font)
        top += LINE + GAP
        for index, match in enumerate(found):
            left, upper = GAP + index % columns * (CELL + GAP), top + index // columns * (CELL + 2 * LINE + GAP)
            picture = ImageOps.contain(read_image(match.name), (CELL, CELL))
            sheet.paste(picture, (left + (CELL - picture.width) // 2, upper + (CELL - picture.height) // 2))
            draw.rectangle((left - 1, upper - 1, left + CELL, upper + CELL), outline="#dadce0")
            draw.text((left, upper + CELL + 3), f"{match.score:.3f}", INK, font)
            name = _shortened(os.path.basename(match.name), font, CELL)
            draw.text((left, upper + CELL + LINE), name, QUIET, font)
        top += count * (CELL + 2 * LINE + GAP)
    return sheet


__all__ = ["MOST_DRAWN", "draw_sheet", "in_one_line"]
