"""What a measurement was taken on."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch


def describe_machine() -> dict[str, Any]:
    """Return what times depend on: the processor, its cores, the threads used, and a GPU's name if there is one."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    described = {
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    return described | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def describe_versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python, torch, transformers and this package, and of further ones by name."""
    names = ("torch", "transformers", "diffclip-hf", *packages)
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}
