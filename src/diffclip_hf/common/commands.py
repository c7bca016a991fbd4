"""What the package's commands share: mistakes are one line, and missing extras are named."""

import argparse
import difflib
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from ..model.image_fetching_diffclip import one_line


logger = logging.getLogger(__name__)
# What a wrong option, file, network or machine leads to; anything else is a fault, and keeps its traceback.
EXPECTED = (
    ValueError,
    OSError,
    ImportError,
    FloatingPointError,
    StrictDataclassError,
    SafetensorError,
    torch.OutOfMemoryError,
)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def closest(word: str, words: Iterable[str]) -> str:
    """Return `"; did you mean …?"` with those of the words that are spelt like one, or `"."` where none is."""
    found = difflib.get_close_matches(word, list(words), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(found)}?" if found else "."


class CommandParser(argparse.ArgumentParser):
    """A command line's parser whose errors are one line, with what is spelt alike; it takes no abbreviated options."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, add_help=False, **kwargs)
        self.add_argument("-h", "--help", action="help", help="Show this help and stop.")

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        hint = closest(unknown[1], set(re.findall(r"--[\w-]+", self.format_help()))) if unknown else "."
        self.exit(2, f"{self.prog}: error: {message.rstrip('.')}{hint} See --help.\n")


def default_device() -> str:
    """Return where a model runs where `--device` isn't given: a GPU where PyTorch finds one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def add_device_option(parser: argparse._ActionsContainer) -> None:
    """Add `--device` to a command, a GPU by default where PyTorch finds one."""
    parser.add_argument(
        "--device",
        metavar="NAME",
        default=default_device(),
        help="Where the model runs, such as cpu or cuda:1. (default: cuda where there is a GPU, else cpu)",
    )


def warn_of_one_process(option: str, log: logging.Logger = logger) -> None:
    """Warn where `accelerate launch` was asked for several processes, and started one.

    Args:
        option: What has a command run on the CPU.
        log: Where the warning goes.
    """
    if "ACCELERATE_USE_CPU" in os.environ and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        # What `accelerate launch --num_processes 2` leaves where it finds no GPU, without a word.
        log.warning(
            "accelerate started one process, though it was asked for several: without GPUs it starts them with "
            "--multi_gpu, or use torchrun; and pass %s.",
            option,
        )


def started_as(module: str) -> str:
    """Return how a command with a script of its own was started, for its usage.

    Args:
        module: The dotted name of the command's module, whose last part is also the script's name.
    """
    script = Path(sys.argv[0])
    # `python -m` gives a spec, and the module's whole path.
    is_script = sys.modules["__main__"].__spec__ is None and script.name == f"{module.split('.')[-1]}.py"
    return f"python {script if is_script else f'-m {module}'}"


def run_command(work: Callable[[], object], log: logging.Logger = logger) -> int:
    """Do a command's work and return its exit status: 0, or 1 with the reason on the log.

    Args:
        work: What is done. An error of the types in `EXPECTED` is one line of the log.
        log: Where the line goes; its traceback goes there too at the level DEBUG.

    Raises:
        Exception: An error of another type, which is a fault of the program.
    """
    try:
        work()
    except EXPECTED as error:
        log.error("%s", one_line(error))
        log.debug("This is where it comes from.", exc_info=True)
        return 1
    return 0


def missing_extra(package: str | None, extra: str) -> str:
    """Return the sentence that says which of the project's extras brings a package."""
    return f"{package} can't be imported; pip install 'diffclip-hf[{extra}]'."


def require_extra(extra: str, *packages: str) -> None:
    """Raise an ImportError that names the extra, if one of the packages that it brings isn't installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(missing_extra(", ".join(missing), extra))


def stop_without_extra(error: ModuleNotFoundError, extra: str, module: str) -> NoReturn:
    """Say which extra a module needs that couldn't import a package: end a command, raise an ImportError elsewhere.

    Args:
        error: What an import raised.
        extra: The extra that brings the package.
        module: The `__name__` of the module that has the import.
    """
    package = (error.name or "").split(".")[0]
    # A module of this package that is missing is another fault.
    if package == __name__.split(".")[0]:
        raise error
    message = missing_extra(package, extra)
    if module == "__main__":
        logging.basicConfig(format="%(levelname)s %(message)s")
        logger.error("%s", message)
        sys.exit(1)
    raise ImportError(message, name=error.name) from error


__all__ = [
    "EXPECTED",
    "CommandParser",
    "add_device_option",
    "closest",
    "default_device",
    "first_line",
    "missing_extra",
    "require_extra",
    "run_command",
    "started_as",
    "stop_without_extra",
    "warn_of_one_process",
]
