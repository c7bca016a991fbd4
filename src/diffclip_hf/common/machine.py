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


def cpu_has_bf16() -> bool:
    """Return whether the processor has instructions for bfloat16: x86's AVX-512 BF16 or AMX, or ARM's BF16.

    Without them PyTorch emulates bfloat16 on a CPU, and a model trains many times slower than in float32.
    """
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
