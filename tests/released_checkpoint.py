"""A checkpoint as the authors' trainer wrote the released ones, whatever numpy and Python write it here.

What is published of them, and what follows: the Hub's scanner lists eight imports (`IMPORTS`). The trainer (SLIP's,
public in SynthCLIP's `Training/main.py`) saves epoch, state_dict, optimizer, scaler, best_acc1 and args. The model is
in DistributedDataParallel, so keys begin with `module.`. `best_acc1` is a number of numpy's. The launcher makes
`args.output_dir` a path. Python was older than 3.13 and numpy than 2, by the spellings of two imports.
"""

import argparse
import io
import pathlib
import pickle
import pickletools
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch


# The scanner's list of the DiffCLIP_ViTB16_CC3M file; `torch.FloatStorage` says that every tensor is float32.
IMPORTS = {
    "_codecs.encode",
    "torch._utils._rebuild_tensor_v2",
    "numpy.dtype",
    "argparse.Namespace",
    "numpy.core.multiarray.scalar",
    "collections.OrderedDict",
    "pathlib.PosixPath",
    "torch.FloatStorage",
}


class _Pickler(pickle._Pickler):
    """Python's own pickler in Python, with other names for two objects."""

    renamed: dict[int, tuple[str, str]] = {}

    def save_global(self, obj, name=None):
        if id(obj) not in self.renamed:
            return super().save_global(obj, name)
        module, name = self.renamed[id(obj)]
        self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
        self.memoize(obj)
        return None


def _optimizer(weights: dict[str, torch.Tensor]) -> dict:
    """AdamW's state after a step, with SLIP's two groups: with weight decay, and without for vectors."""
    state = {
        number: {"step": torch.tensor(1.0), "exp_avg": 0.1 * value, "exp_avg_sq": 0.01 * value.square()}
        for number, value in enumerate(weights.values())
    }
    groups = [[], []]
    for number, value in enumerate(weights.values()):
        groups[value.ndim < 2].append(number)
    options = {"lr": 5e-4, "betas": (0.9, 0.98), "eps": 1e-8, "amsgrad": False, "foreach": None, "maximize": False}
    return {
        "state": state,
        "param_groups": [
            {**options, "weight_decay": decay, "params": params}
            for decay, params in zip((0.1, 0.0), groups, strict=True)
        ],
    }


def save_released(
    path: Path, weights: dict[str, torch.Tensor], model: str, path_class: str = "pathlib.PosixPath"
) -> Path:
    """Write weights, by the original's keys, as the authors' trainer does; `path_class` is the path's import."""
    state_dict = OrderedDict((f"module.{key}", value) for key, value in weights.items())
    # What Module.state_dict() attaches: a version of every module.
    state_dict._metadata = OrderedDict([("", {"version": 1}), ("module", {"version": 1})])
    content = {
        "epoch": 35,
        "state_dict": state_dict,
        "optimizer": _optimizer(weights),
        "scaler": {
            "scale": 65536.0,
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": 2000,
            "_growth_tracker": 17,
        },
        "best_acc1": np.float64(33.8),
        "args": argparse.Namespace(
            model=model,
            dataset="cc12m",
            betas=(0.9, 0.98),
            distributed=True,
            dist_url="tcp://node:1",
            output_dir=pathlib.PurePosixPath("/checkpoints/user/experiments/7"),
        ),
    }

    class Pickler(_Pickler):
        renamed = {
            id(np.float64(0).__reduce__()[0]): ("numpy.core.multiarray", "scalar"),
            # Written in the place of a PosixPath, which can't be made everywhere and is pickled alike.
            id(pathlib.PurePosixPath): tuple(path_class.rsplit(".", 1)),
        }

    with path.open("wb") as file:
        torch.save(content, file, pickle_module=types.SimpleNamespace(__name__="pickle", Pickler=Pickler))
    return path


def imports_of(path: Path) -> set[str]:
    """Return what `pickletools` finds that a checkpoint's pickle imports, by the older opcode, the only one here."""
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        operations = list(pickletools.genops(io.BytesIO(archive.read(name))))
    assert not {"STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"} & {opcode.name for opcode, _, _ in operations}
    return {argument.replace(" ", ".") for opcode, argument, _ in operations if opcode.name == "GLOBAL"}
