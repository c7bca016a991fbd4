"""What the benchmarks share: options, inputs, processes of their own and their memory, and the report."""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diffclip_hf import DiffCLIPImageProcessorPil, DiffCLIPProcessor
from diffclip_hf.common.machine import describe_machine, describe_versions
from diffclip_hf.conversion.clip_vocabulary import clip_tokenizer, find_merges_file


MIB = 2**20
CHILD = "--child"


def make_parser(description: str | None, script: str) -> argparse.ArgumentParser:
    """Return a benchmark's parser with `--output`, by default the JSON file beside the script.

    Args:
        description: The script's docstring.
        script: Its path, `__file__`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=Path(script).with_suffix(".json"), type=Path, metavar="FILE.json")
    return parser


def measured_on(dtype: str = "float32", packages: Sequence[str] = ()) -> dict[str, Any]:
    """Return what every report says: the machine, the versions, of further packages too, and the dtype."""
    return {"machine": describe_machine(), "versions": describe_versions(*packages), "dtype": dtype}


def write_report(path: Path, report: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write a report as JSON."""
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


# Processes ----------------------------------------------------------------------------------------------------------


def memory() -> dict[str, int]:
    """Return this process's memory in bytes, now (VmRSS) and at its highest (VmHWM), as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS")}


def child_arguments() -> list[str] | None:
    """Return the arguments that `run_child` gave this process, None where it wasn't started so."""
    return sys.argv[2:] if sys.argv[1:2] == [CHILD] else None


def run_child(script: str, *arguments: object) -> Any:
    """Run a script in a process of its own, and return what it wrote by `tell_parent`."""
    return run_children(script, [arguments])[0]


def run_children(script: str, each: Sequence[Sequence[object]]) -> list[Any]:
    """Run a script in several processes at once, with the arguments of each, as `run_child` does in one."""
    commands = [[sys.executable, script, CHILD, *map(str, arguments)] for arguments in each]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    written = [process.communicate()[0] for process in running]
    for process in running:
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args)
    return [json.loads(text.splitlines()[-1]) for text in written]


def tell_parent(found: Any) -> None:
    """Write what JSON can hold for `run_child`, as the last that is written."""
    sys.stdout.write(json.dumps(found) + "\n")


# Inputs -------------------------------------------------------------------------------------------------------------


def clip_processor() -> DiffCLIPProcessor:
    """Return a processor with CLIP's own tokenizer."""
    return DiffCLIPProcessor(DiffCLIPImageProcessorPil(), clip_tokenizer(find_merges_file()))


def random_inputs(batch: int, image_size: int = 224, length: int = 77) -> dict[str, torch.Tensor]:
    """Return random images, float32, and texts of full length, each time the same."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(1, 49000, (batch, length), generator=generator)
    input_ids[:, 0], input_ids[:, -1] = 49406, 49407
    return {"input_ids": input_ids, "pixel_values": torch.randn(batch, 3, image_size, image_size, generator=generator)}
