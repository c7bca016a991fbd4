"""Which name belongs to which label, wherever names and labels come from different places.

A data set's own labels are folders' names, a `ClassLabel`'s names, strings, or plain indices, whose own names are `0`,
`1`, `2` and so on. What is sorted as text, as folders and strings are, has `10` before `2`, so names given in order
are matched by what the labels say wherever they say it.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers.utils import logging


if TYPE_CHECKING:
    import datasets

logger = logging.get_logger(__name__)
# Beyond what numbers labels.
MOST_DIGITS = 18
MEND = "or give a mapping from label to name (a file whose name ends in .json)"


def read_label_names(path: Any) -> "tuple[str, ...] | dict[str, str]":
    """Return the names in a file: a name a line, or of JSON a list of names or a mapping from label to name.

    Args:
        path: A `Path`, or a resource of a package. Empty lines at the end don't count.

    Raises:
        ValueError: It can't be read as such, or a name is empty.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        found = json.loads(text) if path.name.endswith(".json") else text.rstrip().split("\n")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"The names in {path} can't be read: {error}") from error
    if not isinstance(found, (list, dict)) or not found:
        raise ValueError(f"{path} holds {found!r:.50}; it must hold a list of names, or a mapping from label to name.")
    listed = found.items() if isinstance(found, dict) else enumerate(found, 1)
    for which, name in listed:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{path}: the name {which} is {name!r:.50}; each must be a text that says something.")
    if isinstance(found, dict):
        return {label: name.strip() for label, name in found.items()}
    return tuple(name.strip() for name in found)


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).casefold()


def label_numbers(labels: Sequence[str]) -> list[int] | None:
    """Return the numbers by which labels are called, such as 0 and 10 of `class_0` and `class_10`.

    They are where every label begins with a number, or where nothing else differs; None if there are none.
    """
    parts = [re.split("([0-9]+)", label) for label in labels]
    if not parts or min(len(part) for part in parts) == 1:
        return None
    if all(not part[0] for part in parts):
        place = 1
    else:
        if len({len(part) for part in parts}) > 1:
            return None
        differing = [index for index, found in enumerate(zip(*parts, strict=True)) if len(set(found)) > 1]
        if len(differing) != 1 or differing[0] % 2 == 0:
            return None
        (place,) = differing
    if any(len(part[place]) > MOST_DIGITS for part in parts):
        return None
    numbers = [int(part[place]) for part in parts]
    return numbers if len(set(numbers)) == len(numbers) else None


def _natural(label: str) -> list[Any]:
    """Return what sorts a label with its numbers as numbers."""
    return [
        (0, int(part), "") if part.isascii() and part.isdigit() and len(part) <= MOST_DIGITS else (1, 0, part)
        for part in re.split("([0-9]+)", label)
        if part
    ]


def _by_mapping(labels: Sequence[str], names: Mapping[str, str], column: str) -> list[str]:
    if missing := [label for label in labels if label not in names]:
        raise ValueError(
            f"label_names has no name for {len(missing)} labels of the column {column}, {missing[0]!r} the first."
        )
    return [names[label] for label in labels]


def _by_position(labels: Sequence[str], names: Sequence[str], column: str) -> list[int]:
    """Return each label's place, where it's sure that names are in the labels' order."""
    if len(labels) != len(names):
        raise ValueError(
            f"label_names has {len(names)} names; the column {column} has {len(labels)} labels "
            f"({', '.join(labels[:3])}{', …' if len(labels) > 3 else ''}). Give one for each, in that order, {MEND}."
        )
    natural = sorted(labels, key=_natural)
    if list(labels) == sorted(labels) != natural:
        first = next(index for index, label in enumerate(labels) if label != natural[index])
        raise ValueError(
            f"The labels of the column {column} are sorted as text, {labels[first]!r} before {natural[first]!r}; "
            f"it isn't sure that names given in order are theirs. Make the numbers equally long, {MEND}."
        )
    own, given = [_plain(label) for label in labels], [_plain(name) for name in names]
    for index, name in enumerate(given):
        if name in own and own[index] != name and given[own.index(name)] != name:
            raise ValueError(
                f"label_names gives the name {names[index]!r} to the label {labels[index]!r}, though the column "
                f"{column} has a label called so. Put the names in the labels' order, {MEND}."
            )
    return list(range(len(labels)))


def name_labels(
    labels: Sequence[str], names: Sequence[str] | Mapping[str, str] | None, column: str = "label"
) -> tuple[list[int], list[str]]:
    """Return the index of each label's name, and the names.

    Of names in a list, those that are the labels' own are found by name. Where labels are numbers, or differ in a
    number alone, names go by it: from 0 where one is 0, in the numbers' order where they are 1 to the number of names.
    Else they go by position.

    Args:
        labels: A data set's own, in its order.
        names: A list of names, or a mapping from label to name; None for the labels themselves.
        column: What the labels' column is called in errors.

    Raises:
        ValueError: A label has no name, or it isn't sure which is its.
    """
    if names is None:
        return list(range(len(labels))), list(labels)
    if isinstance(names, Mapping):
        return list(range(len(labels))), _by_mapping(labels, names, column)
    names = list(names)
    own, given = [_plain(label) for label in labels], [_plain(name) for name in names]
    if len(set(own)) == len(own) and len(set(given)) == len(given) and set(own) <= set(given):
        return [given.index(label) for label in own], names
    numbers = label_numbers(labels)
    if numbers is None:
        return _by_position(labels, names, column), names
    if 0 in numbers:
        if max(numbers) + 1 < len(names):
            logger.warning(
                f"label_names has {len(names)} names; the labels of the column {column} go up to {max(numbers)}."
            )
        if max(numbers) >= len(names):
            raise ValueError(
                f"label_names has {len(names)} names; the column {column} has the label "
                f"{labels[numbers.index(max(numbers))]}. The first name is that of 0; give as many as there are "
                f"numbers, {MEND}."
            )
        return numbers, names
    if sorted(numbers) == list(range(1, len(names) + 1)):
        return [number - 1 for number in numbers], names
    if len(labels) != len(names) and max(numbers) <= len(names):
        raise ValueError(
            f"label_names has {len(names)} names; the column {column} has {len(labels)} labels, numbered from "
            f"{min(numbers)}, so that it isn't sure whether the first name is that of 0 or of 1. Rename the labels, "
            f"{MEND}."
        )
    return _by_position(labels, names, column), names


def match_labels(labels: Sequence[str], others: Sequence[str], which: str, other: str) -> list[int]:
    """Return where each label is among another part's, which may be numbered otherwise.

    Args:
        labels: A part's own.
        others: The other part's, all of which count.
        which: What the first is called in errors.
        other: What the second is called.

    Raises:
        ValueError: The other part lacks one.
    """
    index_of_label = {label: index for index, label in enumerate(others)}
    if unknown := [label for label in labels if label not in index_of_label]:
        raise ValueError(
            f"{which} has {len(unknown)} labels that {other} lacks: {', '.join(unknown[:5])}"
            f"{', …' if len(unknown) > 5 else ''}."
        )
    return [index_of_label[label] for label in labels]


def wrong_labels(column: str, feature: Any) -> ValueError:
    """Return the error of a column that can't be labels."""
    return ValueError(
        f"The column {column} is {feature}; labels must be ClassLabel or strings, or indices with names (label_names)."
    )


def check_seen(labels: Iterable[int], learned: Iterable[int], names: Sequence[str], which: str, other: str) -> None:
    """Raise a ValueError where a part has rows of labels that another part, which is learned from, has none of.

    That's so where the parts' folders are called otherwise, such as `0` here and `00` there: `datasets` gives both
    parts the names of all.

    Args:
        labels: The part's, as indices; None or below 0 for none.
        learned: The other part's, likewise.
        names: Both parts'.
        which: What the first is called in errors.
        other: What the second is called.
    """
    unseen = {label for label in labels if label is not None and label >= 0} - set(learned)
    if unseen:
        some = ", ".join(names[label] for label in sorted(unseen)[:5])
        raise ValueError(
            f"{which} has {len(unseen)} labels that {other} has no rows of: {some}{', …' if len(unseen) > 5 else ''}."
        )


def read_texts(dataset: "datasets.Dataset", column: str) -> list[Any]:
    """Return a column of texts, or of lists of texts.

    Raises:
        ValueError: A row isn't UTF-8, which Parquet files and the like don't ensure.
    """
    try:
        return list(dataset[column])
    except UnicodeDecodeError:
        for row in range(len(dataset)):
            try:
                dataset[row][column]
            except UnicodeDecodeError as error:
                raise ValueError(f"Row {row} of the column {column} isn't UTF-8: {error.object[:80]!r}.") from error
        raise


def check_texts(dataset: "datasets.Dataset", column: str) -> None:
    """Raise a ValueError where a row of a column of texts isn't UTF-8, before a worker comes to it."""
    import pyarrow  # type: ignore[import-untyped]

    try:
        # Without making objects of Python of millions of texts.
        dataset.data.column(column).validate(full=True)
    except pyarrow.ArrowInvalid as error:
        read_texts(dataset, column)
        raise ValueError(f"The column {column} is damaged: {error}") from error


def own_labels(dataset: "datasets.Dataset", column: str) -> "tuple[datasets.Dataset, list[str]]":
    """Return the data set with its column `label` as indices, and what the labels are called there.

    Strings are numbered in alphabetical order; an empty one is no label. Plain indices are called by their numbers.

    Args:
        dataset: With a column `label`, of `ClassLabel`, strings or integers.
        column: What the column is called in errors.

    Raises:
        ValueError: The column has another type, or an index without a name.
    """
    import datasets
    import pyarrow.compute  # type: ignore[import-untyped]

    feature = dataset.features["label"]
    if isinstance(feature, datasets.ClassLabel):
        largest = pyarrow.compute.max(dataset.data.column("label")).as_py()
        if largest is not None and largest >= len(feature.names):
            raise ValueError(
                f"The column {column} has the index {largest}, and names for {len(feature.names)} labels."
            )
        return dataset, list(feature.names)
    kind = getattr(feature, "dtype", "")
    if isinstance(feature, datasets.Value) and "int" in kind:
        largest = max((label for label in dataset["label"] if label is not None), default=-1)
        return dataset, [str(index) for index in range(largest + 1)]
    if kind not in ("string", "large_string"):
        raise wrong_labels(column, feature)
    texts = read_texts(dataset, "label")
    names = sorted({text for text in texts if text and text.strip()})
    index_of_name = {name: index for index, name in enumerate(names)}
    indices = [index_of_name.get(text, -1) for text in texts]
    return _replaced(dataset, indices, datasets.ClassLabel(names=names)), names


def _replaced(dataset: "datasets.Dataset", indices: list[int], feature: Any) -> "datasets.Dataset":
    return dataset.remove_columns("label").add_column("label", indices, feature=feature)


def renumbered(dataset: "datasets.Dataset", indices: Sequence[int]) -> "datasets.Dataset":
    """Return the data set with every index of its column `label` replaced by `indices` of it; none stays none."""
    import datasets

    if list(indices) == list(range(len(indices))):
        return dataset
    found = [-1 if label is None or label < 0 else indices[label] for label in dataset["label"]]
    return _replaced(dataset, found, datasets.Value("int64"))


__all__ = [
    "check_seen",
    "check_texts",
    "label_numbers",
    "match_labels",
    "name_labels",
    "own_labels",
    "read_texts",
    "read_label_names",
    "renumbered",
    "wrong_labels",
]
