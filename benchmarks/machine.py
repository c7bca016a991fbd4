"""What a measurement was taken on."""

import os
import platform
from pathlib import Path

import torch
import transformers

import diffclip_hf


def cpu_name() -> str:
    """Return the processor's name as Linux has it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def machine() -> dict:
    """Return the machine's description."""
    described = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    return described | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def memory() -> dict[str, int]:
    """Return this process's memory in bytes, now and at its highest, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    names = ("VmHWM", "VmRSS", "RssAnon", "RssFile")
    return {name: int(fields[name].split()[0]) * 1024 for name in names}


def versions() -> dict[str, str]:
    """Return the versions of what was measured."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "diffclip_hf": diffclip_hf.__version__,
        "python": platform.python_version(),
    }
