"""Options of a command line and of a file, by the same types."""

import argparse
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from ..model.image_fetching_diffclip import one_line
from .commands import closest
from .json_files import parse_json_object


KIND_NAMES = {int: ("a whole number", "whole numbers"), float: ("a number", "numbers"), str: ("a text", "texts")}
# What stands for an option's value in --help, by the first of its types that is here.
METAVARS = {bool: "true|false", dict: "JSON", int: "NUMBER", float: "NUMBER"}
MOST_CHOICES = 6  # more make --help hard to read
# What YAML reads as a boolean.
YAML_WORDS = {True: ("yes", "on", "true"), False: ("no", "off", "false", "none")}


# Files --------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML without a key given twice, and with `1e-5` as the number that it is in YAML 1.2 and JSON."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        try:
            twice = {key for key in keys if keys.count(key) > 1}
        except TypeError as error:
            raise yaml.constructor.ConstructorError(
                None, None, "a key holds several values", node.start_mark
            ) from error
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{twice.pop()} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_options(path: Path, what: str) -> dict[str, Any]:
    """Return the options in a YAML or JSON file.

    Raises:
        ValueError: It can't be read or holds something else, or a key twice; the message calls it `what`.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{what} can't be read: {one_line(error)}") from error
    if path.suffix.lower() == ".json":
        return parse_json_object(text, what)
    try:
        options = yaml.load(text, _Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f" (line {mark.line + 1})" if mark is not None else ""
        raise ValueError(f"{what} isn't YAML or JSON: {error.problem}{line}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} isn't YAML or JSON: {one_line(error)}") from error
    if not isinstance(options, dict):
        held = "nothing" if options is None else f"a {type(options).__name__}"
        raise ValueError(f"{what} holds {held}; it must hold options by name.")
    return options


# Types --------------------------------------------------------------------------------------------------------------


def check_names(names: Iterable[Any], known: Iterable[str], where: str, kind: str) -> None:
    """Raise a ValueError for a name that isn't among the known ones, with those that are spelt alike.

    Args:
        names: What was given.
        known: What there is.
        where: What has the names.
        kind: What a name is one of, as `"an option"`.
    """
    known = set(known)
    if unknown := [str(name) for name in names if name not in known]:
        raise ValueError(f"{where} has {unknown[0]!r}, which isn't {kind}{closest(unknown[0], sorted(known))}")


def _object_or_text(name: str, text: str) -> dict[str, Any] | str:
    """Return the JSON object in a text, or the text where it is none, which may name a file."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        return parse_json_object(text, f"{name} {text}")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


@dataclass(frozen=True)
class OptionGroup:
    """Options that `--help` shows together.

    Args:
        title: What they are called.
        note: What is said of them all, if anything.
        names: Their names.
    """

    title: str
    note: str | None
    names: Collection[str]


class _HelpFormatter(argparse.HelpFormatter):
    """Shows each option by one of its spellings, though Transformers' parser takes `--a-b` for `--a_b`."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.dest == "help":
            return super()._format_action_invocation(action)
        values = "" if action.nargs == 0 else self._format_args(action, action.dest.upper())
        return f"{action.option_strings[0]} {values}".rstrip()


class OptionParser(HfArgumentParser):
    """Transformers' parser of data classes, with errors of one line, and for options of a file too.

    Args:
        classes: The data classes.
        words: Option → boolean or None → what it stands for there, where an option takes words.
        groups: How `--help` shows the options, in this order.
        hidden: The options that it doesn't show.
        kwargs: As in `argparse.ArgumentParser`.

    Raises:
        ValueError: From the parsing, where an option or its value doesn't fit.
    """

    def __init__(
        self,
        classes: Sequence[type],
        words: dict[str, dict[bool | None, Any]],
        groups: Sequence[OptionGroup],
        hidden: Collection[str] = (),
        **kwargs: Any,
    ):
        self.options: dict[str, argparse.Action] = {}
        self.words, self.parts, self.groups, self.hidden = words, len(classes), groups, hidden
        self.adders: dict[str, Callable[..., argparse.Action]] = {}
        hints = {name: hint for cls in classes for name, hint in typing.get_type_hints(cls).items()}
        self.kinds = {name: self._kinds_of(hint) for name, hint in hints.items()}
        super().__init__(classes, allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)  # type: ignore[arg-type]

    @staticmethod
    def _kinds_of(hint: Any) -> set[Any]:
        """Return the types of a type hint, without what they hold."""
        is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        return {typing.get_origin(kind) or kind for kind in (typing.get_args(hint) if is_union else (hint,))}

    def add_argument(self, *names: Any, **kwargs: Any) -> argparse.Action:
        name = kwargs.get("dest", names[0].lstrip("-"))
        if name not in self.kinds:
            action = super().add_argument(*names, **kwargs)
        else:
            if dict in self.kinds[name]:
                kwargs["type"] = partial(_object_or_text, name)
            if not self.adders:
                for group in self.groups:
                    shown = self.add_argument_group(group.title, group.note)
                    self.adders |= dict.fromkeys(group.names, shown.add_argument)
            action = self.adders[name](*names, **kwargs | self._help(name, kwargs))
        self.options.setdefault(action.dest, action)
        return action

    def _help(self, name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return how `--help` shows an option: what stands for its value, and what is said of it."""
        if name in self.hidden:
            return {"help": argparse.SUPPRESS}
        if kwargs.get("action") == "store_false":
            return {"help": f"The same as --{name} false."}
        said, default = kwargs.get("help", ""), kwargs.get("default")
        found: dict[str, Any] = {}
        if len(choices := kwargs.get("choices") or ()) > MOST_CHOICES:
            said += f" One of {', '.join(map(str, choices))}."
            found["metavar"] = "NAME"
        elif not choices:
            found["metavar"] = kwargs.get("metavar") or next(
                (word for kind, word in METAVARS.items() if kind in self.kinds[name]), "TEXT"
            )
        if default not in (None, False, "", []):
            default = getattr(default, "value", default)
            shown = " ".join(map(str, default)) if isinstance(default, list) else str(default).replace("%", "%%")
            said += f" (default: {shown})"
        return {**found, "help": said}

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.removeprefix('argument ').rstrip('.')}; see --help.")

    def given(self, argv: Sequence[str]) -> set[str]:
        """Return the names of the options on a command line."""
        flags = {flag: name for name, action in self.options.items() for flag in action.option_strings}
        return {flags[word.split("=")[0]] for word in argv if word.split("=")[0] in flags}

    def parse(self, argv: Sequence[str], from_file: dict[str, Any], what: str) -> tuple[Any, ...]:
        """Return an object of each class, from the command line over a file.

        Args:
            argv: The command line.
            from_file: The file's options.
            what: What the file is called in messages.
        """
        check_names(from_file, self.kinds.keys() & self.options.keys(), what, "an option")
        self.set_defaults(**{name: self.typed(name, value, what) for name, value in from_file.items()})
        try:
            *parsed, rest = self.parse_args_into_dataclasses(
                list(argv), return_remaining_strings=True, look_for_args_file=False
            )
        # Of options that hold fields by name, the classes raise it for a field that they haven't.
        except TypeError as error:
            raise ValueError(f"An option's value doesn't fit: {one_line(error)}.") from error
        # Some name a file.
        except OSError as error:
            raise ValueError(f"A file that an option names can't be read: {one_line(error)}.") from error
        if rest:
            flags = [flag for action in self.options.values() for flag in action.option_strings]
            raise ValueError(f"{rest[0]!r} isn't an option{closest(rest[0], flags)} See --help.")
        return tuple(parsed[: self.parts])

    def typed(self, name: str, value: Any, what: str) -> Any:
        """Return a file's value as the command line would have it.

        Raises:
            ValueError: The option takes no such value.
        """
        kinds, option = self.kinds[name], f"{name} in {what}"
        if value is None:
            if type(None) not in kinds:
                raise ValueError(f"{option} is null; it must be {self._wanted(name)}, or left out for the default.")
            return self.words.get(name, {}).get(None)
        if isinstance(value, dict):
            if dict not in kinds:
                raise ValueError(f"{option} holds fields by name; it must be {self._wanted(name)}.")
            return value
        if isinstance(value, list):
            if list not in kinds:
                raise ValueError(f"{option} is a list; it must be {self._wanted(name)}.")
            if not value and self.options[name].nargs == "+":
                raise ValueError(f"{option} is an empty list; it must have at least one value.")
            return [self._converted(name, one, option) for one in value]
        if isinstance(value, bool) and bool not in kinds:
            found = self._word(name, value, option)
        else:
            found = self._converted(name, value, option)
        return [found] if self.options[name].nargs == "+" else found

    def _wanted(self, name: str) -> str:
        """Return what an option must be, in words."""
        action, kinds = self.options[name], self.kinds[name]
        if action.choices is not None:
            return "one of " + ", ".join(map(str, action.choices))
        if bool in kinds:
            return "true or false"
        if dict in kinds:
            return "fields by name, as in {name: value}"
        one, many = KIND_NAMES.get(action.type, KIND_NAMES[str])  # type: ignore[call-overload]
        if action.nargs == "+":
            return f"a list of {many}"
        return f"{one} or a list of {many}" if list in kinds else one

    def _word(self, name: str, value: bool, option: str) -> Any:
        """Return what a boolean stands for where an option takes words."""
        if value in self.words.get(name, {}):
            return self.words[name][value]
        for word in YAML_WORDS[value]:
            if word in (self.options[name].choices or ()):
                return word
        raise ValueError(f"{option} is {str(value).lower()}; it must be {self._wanted(name)}.")

    def _converted(self, name: str, value: Any, option: str) -> Any:
        """Return a single value, converted from its text as on the command line."""
        action = self.options[name]
        convert: Callable[[str], Any] = action.type if callable(action.type) else str
        wrong = f"{option} is {value!r}; it must be {self._wanted(name)}"
        if isinstance(value, (dict, list, set, bytes)) or (isinstance(value, bool) and bool not in self.kinds[name]):
            raise ValueError(f"{wrong}.")
        try:
            found = convert(str(value))
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"{wrong}.") from error
        if action.choices is not None and found not in action.choices:
            raise ValueError(wrong + closest(str(value), map(str, action.choices)))
        return found


__all__ = ["OptionGroup", "OptionParser", "check_names", "read_options"]
