"""JSON files that hold an object."""

import json
from pathlib import Path
from typing import Any

from ..model.image_fetching_diffclip import one_line


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object that JSON's pairs make.

    Raises:
        ValueError: A key is given twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found


def parse_json_object(text: str, what: str) -> dict[str, Any]:
    """Return the JSON object in a text.

    Raises:
        ValueError: It's no JSON, or JSON of another kind, or gives a key twice; the message calls it `what`.
    """
    try:
        found = json.loads(text, object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} isn't JSON: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{what} holds a {type(found).__name__}; it must hold fields by name, as in {{...}}.")
    return found


def read_json_object(path: Path) -> dict[str, Any]:
    """Return a JSON file's object.

    Raises:
        ValueError: As `parse_json_object` raises; the message names the file.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} isn't JSON: {one_line(error)}") from error
    return parse_json_object(text, str(path))


def json_text(content: Any) -> str:
    """Return a value as the JSON of the folder's files: indented, with letters as they are, ending in a line break."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


__all__ = ["json_text", "parse_json_object", "read_json_object"]
