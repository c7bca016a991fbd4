"""What embeddings depend on, known by its content: weights, modules and their settings, code, versions, files."""

import enum
import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import re
import sys
import types
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..model.hub_cache_diffclip import sha256_of
from ..model.image_reading_diffclip import read_encoded
from ..model.offloading_diffclip import execution_device


# What a configuration says of where it comes from rather than of what is computed; weights have a dtype of their own.
PROVENANCE = frozenset({"_name_or_path", "architectures", "dtype", "transformers_version"})
# What a module holds that says nothing of what it computes, or is described apart.
_NOT_COMPUTED = frozenset({"config", "generation_config", "hf_quantizer", "name_or_path", "warnings_issued"})
# What it computes by, beside what has a public name: torch's hooks and PEFT's choice of adapters.
_HIDDEN = ("_forward_pre_hooks", "_forward_hooks", "_active_adapter", "_disable_adapters")
PACKAGES = (
    *("torch", "transformers", "tokenizers", "numpy", "pillow", "torchvision"),
    *("peft", "bitsandbytes", "torchao", "accelerate"),
)
# Their code is known by the version.
_VERSIONED = frozenset({"builtins", *PACKAGES})


class UnknownContentError(ValueError):
    """Something can't be known by its content."""


def fingerprint(content: Any) -> str:
    """Return the SHA-256, in hexadecimal, of what JSON can hold; the order of keys doesn't matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# Tensors and objects ------------------------------------------------------------------------------------------------


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's dtype, shape and values; of a subclass, as torchao's are, of what it's made of.

    Raises:
        UnknownContentError: It's on the meta device, as offloaded weights are, or of a layout without plain values.
    """
    if tensor.is_meta:
        raise UnknownContentError("a tensor is on the meta device")
    if hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        parts = {name: tensor_digest(getattr(tensor, name)) for name in names}
        return fingerprint([_class_name(type(tensor)), describe(context), parts])
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise UnknownContentError(f"a tensor has the layout {tensor.layout} and the dtype {tensor.dtype}")
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().flatten()
    # numpy has no bfloat16.
    digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()


@functools.cache
def _file_digest(path: str) -> str:
    return sha256_of(Path(path))


def _class_name(cls: type) -> str:
    """Return where a class is from, with the digest of its file where no version stands for it."""
    name = f"{cls.__module__}.{cls.__qualname__}"
    package = cls.__module__.split(".")[0]
    if package in _VERSIONED or package in sys.stdlib_module_names or package == __name__.split(".")[0]:
        return name
    try:
        return f"{name} {_file_digest(inspect.getfile(cls))}"
    except (OSError, TypeError) as error:
        raise UnknownContentError(f"the class {name} has no file") from error


def _describe_code(code: types.CodeType) -> list[Any]:
    constants = [_describe_code(one) if isinstance(one, types.CodeType) else repr(one) for one in code.co_consts]
    return [code.co_code.hex(), list(code.co_names), constants]


def _describe_function(function: types.FunctionType, seen: frozenset[int]) -> list[Any]:
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return [
        "function",
        f"{function.__module__}.{function.__qualname__}",
        _describe_code(function.__code__),
        describe([function.__defaults__, function.__kwdefaults__, cells], seen),
    ]


def _describe_simple(value: Any) -> Any:
    """Return what describes a value without parts, None for others."""
    if isinstance(value, enum.Enum):
        return ["enum", type(value).__qualname__, repr(value.value)]
    if isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (float, complex, torch.dtype, torch.device, torch.Size, np.dtype, np.generic, os.PathLike)):
        return [type(value).__qualname__, repr(value)]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", hashlib.sha256(value).hexdigest()]
    if isinstance(value, type):
        return ["class", _class_name(value)]
    if isinstance(value, torch.Tensor):
        return ["tensor", tensor_digest(value)]
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return ["array", str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, re.Pattern):
        return ["pattern", str(value.pattern), value.flags]
    if isinstance(value, (types.BuiltinFunctionType, np.ufunc)):
        return ["builtin", getattr(value, "__module__", None), value.__name__]
    if isinstance(value, (types.ModuleType, weakref.ref)):
        return [type(value).__qualname__, getattr(value, "__name__", "")]
    return None


def describe(value: Any, seen: frozenset[int] = frozenset()) -> Any:
    """Return what tells a value from others, as JSON: plain values as they are, objects by their class and attributes.

    Args:
        value: Anything.
        seen: The ids of what it's part of, which isn't described again.

    Raises:
        UnknownContentError: A part of it shows nothing of what it holds.
    """
    if value is None:
        return None
    if (found := _describe_simple(value)) is not None:
        return found
    if id(value) in seen:
        return ["seen", type(value).__qualname__]
    seen = seen | {id(value)}
    if isinstance(value, Mapping):
        pairs = [[describe(key, seen), describe(part, seen)] for key, part in value.items()]
        return ["mapping", sorted(pairs, key=json.dumps)]
    if isinstance(value, (list, tuple)):
        return ["list", *(describe(part, seen) for part in value)]
    if isinstance(value, (set, frozenset)):
        return ["set", *sorted((describe(part, seen) for part in value), key=json.dumps)]
    if isinstance(value, types.FunctionType):
        return _describe_function(value, seen)
    if isinstance(value, types.MethodType):
        return ["method", describe(value.__func__, seen), describe(value.__self__, seen)]
    if isinstance(value, functools.partial):
        return ["partial", *(describe(part, seen) for part in (value.func, value.args, value.keywords))]
    if isinstance(value, PreTrainedConfig):
        return describe_config(value)
    attributes = dict(getattr(value, "__dict__", {}))
    slots = [name for cls in type(value).__mro__ for name in vars(cls).get("__slots__", ())]
    attributes.update({name: getattr(value, name) for name in slots if hasattr(value, name)})
    if not attributes and type(value).__module__ not in ("types", __name__) and not hasattr(value, "__dict__"):
        raise UnknownContentError(f"a {type(value).__module__}.{type(value).__qualname__} doesn't show what it holds")
    return ["object", _class_name(type(value)), describe(attributes, seen)]


# Models -------------------------------------------------------------------------------------------------------------


def _without_provenance(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {key: _without_provenance(value) for key, value in config.items() if key not in PROVENANCE}


def describe_config(config: PreTrainedConfig) -> list[Any]:
    """Return what a configuration computes, with its attention's implementation and what is registered under it."""
    implementation = getattr(config, "_attn_implementation", None)
    registered = ALL_ATTENTION_FUNCTIONS.get(implementation) if isinstance(implementation, str) else None
    return [
        type(config).__qualname__,
        describe(_without_provenance(config.to_dict())),
        describe(implementation),
        describe(registered),
    ]


def model_fingerprint(model: PreTrainedModel) -> str:
    """Return the SHA-256, in hexadecimal, of a model's configuration and of every weight's name, dtype and value.

    Raises:
        UnknownContentError: A weight isn't there, or can't be read as plain values.
    """
    weights = {name: tensor_digest(tensor) for name, tensor in _tensors(model.state_dict()).items()}
    return fingerprint([describe(_without_provenance(model.config.to_dict())), weights])


def _tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def _describe_module(module: nn.Module, seen: frozenset[int]) -> list[Any]:
    """Return what a module computes by beside its weights and its children."""
    name = _class_name(type(module))
    # Its settings change with the first forward pass; what it holds is among the weights.
    if name.startswith("bitsandbytes."):
        return [name]
    attributes = {
        key: value
        for key, value in vars(module).items()
        if (not key.startswith("_") and key not in _NOT_COMPUTED) or (key in _HIDDEN and value)
    }
    for key in ("_forward_pre_hooks", "_forward_hooks"):
        if key in attributes:
            attributes[key] = list(attributes[key].values())
    kept = set(module._non_persistent_buffers_set)
    buffers = {key: tensor for key, tensor in module._buffers.items() if key in kept and tensor is not None}
    return [name, describe(attributes, seen), describe(buffers)]


def describe_model(model: PreTrainedModel) -> dict[str, Any]:
    """Return what a model computes by, beside its weights and its own configuration.

    That is each module's class and settings, such as an epsilon, an adapter's scale or whether it's on, its hooks and
    buffers that aren't saved, and the parts' configurations and attention implementations.

    Raises:
        UnknownContentError: A part can't be known by its content.
    """
    modules = dict(model.named_modules())
    seen = frozenset(id(module) for module in modules.values())
    configs = {id(found): found for module in modules.values() if (found := getattr(module, "config", None))}
    return {
        "modules": fingerprint({name: _describe_module(module, seen) for name, module in modules.items()}),
        "configs": fingerprint(
            sorted(
                (describe_config(found) for found in configs.values() if isinstance(found, PreTrainedConfig)),
                key=json.dumps,
            )
        ),
    }


# Machines, code and files -------------------------------------------------------------------------------------------


@functools.cache
def _own_code() -> str:
    """Return the digest of this package's modules."""
    package = Path(__file__).parents[1]
    files = sorted(package.rglob("*.py"))
    return fingerprint({file.relative_to(package).as_posix(): _file_digest(str(file)) for file in files})


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe_run(device: torch.device) -> dict[str, Any]:
    """Return how anything runs on a device: its kind, the precision asked for, and the versions of the code."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": [
            torch.get_float32_matmul_precision(),
            torch.backends.cuda.matmul.fp32_precision,
            torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
            str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else None,
        ],
        "versions": _versions(),
        "code": _own_code(),
    }


def embedding_key(model: PreTrainedModel, **parts: Any) -> dict[str, Any]:
    """Return all that a model's embeddings depend on, as JSON: the model as it is now, how it runs, and `parts`.

    Args:
        model: Any of Transformers'.
        parts: What goes into it and how, such as tokens, or an image processor.

    Raises:
        UnknownContentError: Something can't be known by its content, so that nothing should be kept.
    """
    return {
        "weights": model_fingerprint(model),
        "model": describe_model(model),
        "dtype": str(model.dtype),
        "run": describe_run(execution_device(model)),
        **{name: describe(part) for name, part in parts.items()},
    }


def image_digest(image: Mapping[str, Any] | None) -> bytes:
    """Return the SHA-256 of a picture's file, as `datasets` holds it undecoded.

    Raises:
        ValueError: There's none, or it can't be read.
    """
    return hashlib.sha256(read_encoded(image)).digest()


__all__ = [
    "UnknownContentError",
    "describe",
    "describe_model",
    "describe_run",
    "embedding_key",
    "fingerprint",
    "image_digest",
    "model_fingerprint",
    "tensor_digest",
]
