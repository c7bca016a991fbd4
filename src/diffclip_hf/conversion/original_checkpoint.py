"""Read a checkpoint of the original code: safely, and no more of it than the weights."""

import argparse
import io
import logging
import pathlib
import pickle
import pickletools
import re
import reprlib
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .pickle_scan import MAX_BYTES, Contents, Name, PickleError, Storage, follow_pickle


logger = logging.getLogger("convert_original_checkpoint")

# numpy has no public name for the function that its scalars are pickled by.
NUMPY_SCALAR = np.float64(0).__reduce__()[0]
# What SLIP's trainer pickles beside tensors: its arguments, with the path of its output, and numpy scalars among the
# metrics. The second form of a pair is a name under which other versions of numpy and Python wrote the same object.
ALLOWED_GLOBALS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    np.dtypes.Float32DType,
    np.dtypes.Float64DType,
    np.dtypes.Int64DType,
    (NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    (NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    # A path that is only text, since Windows can't build a PosixPath; Python 3.13 has it in pathlib._local.
    (pathlib.PurePosixPath, "pathlib.PosixPath"),
    (pathlib.PurePosixPath, "pathlib._local.PosixPath"),
]
FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ZIP_START = b"PK\x03\x04"
MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
# Bytes of a number in a storage, by the type's name in a pickle; an untyped storage counts bytes.
ITEM_BYTES = {
    "BFloat16Storage": 2,
    "BoolStorage": 1,
    "ByteStorage": 1,
    "CharStorage": 1,
    "ComplexDoubleStorage": 16,
    "ComplexFloatStorage": 8,
    "DoubleStorage": 8,
    "FloatStorage": 4,
    "HalfStorage": 2,
    "IntStorage": 4,
    "LongStorage": 8,
    "ShortStorage": 2,
    "UntypedStorage": 1,
}
# Allowed by PyTorch, but nothing of a state dict, and a call of it takes as much memory as it asks for.
_ALLOCATING = re.compile(r"(__builtin__|builtins)\.bytearray|torch(\.\w+)*\.(\w*Tensor|(Unt|T)ypedStorage)")
# What PyTorch's messages say of ways around the check.
_ADVICE = re.compile(r"weights_only|safe_globals|allowlist|trust|file an issue", re.IGNORECASE)


class ConversionError(ValueError):
    """The checkpoint or an option doesn't fit; the message says which key or option, and what is expected."""


def listed(names: Iterable[object], most: int = 5) -> str:
    """Return the first names, each in quotes and cut where it is long, and how many more there are."""
    names = list(names)
    short = reprlib.Repr()
    short.maxstring = short.maxother = 120
    text = ", ".join(short.repr(name) for name in names[:most]) or "none"
    return f"{text} and {len(names) - most:,} more" if len(names) > most else text


def check_kind(path: Path) -> bool:
    """Raise for a file that can't be a checkpoint, saying what it is instead.

    Returns:
        Whether it is an archive of `torch.save` since PyTorch 1.6, of which a part can be read.

    Raises:
        ConversionError: The file is missing, empty, cut off, an HTML page, a Git LFS pointer or anything else.
    """
    if not path.is_file():
        raise ConversionError(f"--checkpoint {path} is not a file.")
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise ConversionError(f"--checkpoint {path} is empty (0 bytes); fetch it anew.")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ConversionError(
            f"--checkpoint {path} is an HTML page, such as a server's error or log-in page, saved under that name; "
            "fetch the file anew, or let --repo-id fetch it."
        )
    if start.startswith(b"version https://git-lfs"):
        raise ConversionError(
            f"--checkpoint {path} is a Git LFS pointer, not the file that it stands for; run `git lfs pull`, or let "
            "--repo-id fetch it."
        )
    if start[8:10] == b'{"':
        raise ConversionError(
            f"--checkpoint {path} is a safetensors file; expected is a .pt file that the original's trainer wrote."
        )
    if start.startswith(ZIP_START):
        return True
    if start[257:262] == b"ustar":
        raise ConversionError(
            f"--checkpoint {path} is a tar archive, as PyTorch wrote before 0.1.10; it can't be read safely. Expected "
            "is a .pt file of a later torch.save."
        )
    return False


def read_archive(path: Path) -> tuple[bytes, dict[str, int]]:
    """Check every byte of an archive of `torch.save` against its checksums, a piece at a time.

    Returns:
        The pickle in it, and the bytes of each storage by its key.

    Raises:
        ConversionError: The archive is cut off, damaged, of another program, or a TorchScript archive.
    """
    # The table of an archive's members stands at its end.
    if not zipfile.is_zipfile(path):
        raise ConversionError(
            f"--checkpoint {path} is cut off after {path.stat().st_size} bytes (an archive without its end); fetch it "
            "anew."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_members(path, archive)
    except ConversionError:
        raise
    # What zipfile raises for damage, encryption and unknown methods.
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, RuntimeError) as error:
        raise ConversionError(f"--checkpoint {path} is damaged ({error}); fetch it anew.") from error


def _read_members(path: Path, archive: zipfile.ZipFile) -> tuple[bytes, dict[str, int]]:
    """Do what `read_archive` does, for an open archive."""
    members = archive.infolist()
    root = members[0].filename.partition("/")[0] if members else ""
    names = [member.filename for member in members]
    if f"{root}/constants.pkl" in names:
        raise ConversionError(
            f"--checkpoint {path} is a TorchScript archive, which holds a program; expected is a .pt file of "
            "torch.save with the model's state dict."
        )
    if not {f"{root}/data.pkl", f"{root}/version"}.issubset(names):
        raise ConversionError(
            f"--checkpoint {path} is a zip archive, but not one of torch.save, which has a data.pkl and a version."
        )
    if len(set(names)) < len(names):
        twice = [name for name, times in Counter(names).items() if times > 1]
        raise ConversionError(f"--checkpoint {path} is damaged: it holds {listed(twice)} more than once.")
    packed = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise ConversionError(
            f"--checkpoint {path} is not as torch.save wrote it, which never compresses: {listed(packed)}. Fetch the "
            "file anew."
        )
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise ConversionError(f"--checkpoint {path} is damaged: its members are larger than the file; fetch it anew.")
    # As torch.save leaves them with its checksums turned off.
    unchecked = not any(member.CRC for member in members)
    if unchecked:
        logger.warning("%s was saved without checksums, so damage in it wouldn't show.", path)
    for member in members:
        if unchecked:
            # To zipfile, one that isn't known.
            member.CRC = None  # type: ignore[assignment]
        with archive.open(member) as file:
            while file.read(1 << 20):
                pass
    pickled = archive.getinfo(f"{root}/data.pkl")
    if pickled.file_size > MAX_BYTES:
        raise ConversionError(f"--checkpoint {path} has a data.pkl of {pickled.file_size} bytes; no checkpoint has.")
    start = f"{root}/data/"
    sizes = {name.removeprefix(start): archive.getinfo(name).file_size for name in names if name.startswith(start)}
    return archive.read(pickled), sizes


def refused_names(names: Iterable[Name]) -> set[str]:
    """Return which of the objects that a pickle imports PyTorch's reader of weights refuses, with our allow-list."""
    written = io.BytesIO()
    odd: list[str] = []
    for name in names:
        # Only the newer of the two opcodes can have such a name, which the reader doesn't know at all.
        if "\n" in str(name) or not str(name).isprintable():
            odd.append(str(name))
        else:
            written.write(f"c{name.module}\n{name.name}\n".encode())
    checked = io.BytesIO()
    with zipfile.ZipFile(checked, "w") as archive:
        archive.writestr("names/data.pkl", pickle.PROTO + b"\x02" + written.getvalue() + pickle.NONE + pickle.STOP)
        archive.writestr("names/version", "3")
    checked.seek(0)
    with torch.serialization.safe_globals(ALLOWED_GLOBALS):
        return {*torch.serialization.get_unsafe_globals_in_checkpoint(checked), *odd}


def check_storages(path: Path, storages: Iterable[Storage], sizes: Mapping[str, int] | None) -> None:
    """Raise where a pickle reads more or fewer numbers than the file has for it.

    Args:
        path: The file.
        storages: What the pickle reads.
        sizes: Bytes of each storage, by its key; None for a file that doesn't tell them apart.
    """
    left = path.stat().st_size
    for storage in storages:
        item = ITEM_BYTES.get(storage.kind, 1)
        left -= storage.count * item
        if sizes is None:
            found, right = path.stat().st_size, storage.count >= 0 and left >= 0
        else:
            found = sizes.get(storage.key, 0)
            # What isn't in the table is too rare to know its size.
            right = storage.key in sizes and (storage.kind not in ITEM_BYTES or found == storage.count * item)
        if not right:
            raise ConversionError(
                f"--checkpoint {path} is damaged: its pickle reads {storage.count} numbers of {storage.kind} from "
                f"{listed([storage.key])}, for which the file has {found} bytes; fetch it anew."
            )


def check_pickles(path: Path, is_archive: bool) -> None:
    """Raise for a file whose pickles import what isn't allowed, or read what the file hasn't got.

    Raises:
        ConversionError: It says which object is refused, or what is damaged.
    """
    sizes: dict[str, int] | None = None
    if is_archive:
        data, sizes = read_archive(path)
    else:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES)
    pickles: list[Contents] = []
    problem: PickleError | None = None
    position = 0
    # Before PyTorch 1.6: a magic number, versions, the machine's, the checkpoint, and the storages' order.
    for _ in range(1 if is_archive else 5):
        pickles.append(Contents())
        try:
            position = follow_pickle(data, position, pickles[-1])
        except PickleError as error:
            problem = error
            break
        if not is_archive and pickles[0].value != MAGIC_NUMBER:
            break
    refused = refused_names(name for found in pickles for name in found.names)
    refused |= {str(name) for found in pickles for name in found.called if _ALLOCATING.fullmatch(str(name))}
    if refused:
        raise ConversionError(
            f"--checkpoint {path} can't be read as a checkpoint of tensors: it holds {listed(sorted(refused))}, which "
            "is no tensor, plain value or SLIP's argument. It is refused, since reading such objects can run any "
            "code, and none was run."
        )
    if not is_archive and pickles[0].value != MAGIC_NUMBER:
        if problem is not None and not data.startswith(pickle.PROTO):
            raise ConversionError(
                f"--checkpoint {path} is not a file of torch.save: it starts with {data[:16]!r}. Expected is a .pt "
                "file that the original's trainer wrote."
            )
        raise ConversionError(
            f"--checkpoint {path} can't be read as a checkpoint of tensors: it is a pickle, but not one of torch.save."
        )
    if problem is not None:
        kind = "is" if is_archive else "is of PyTorch before 1.6, and"
        raise ConversionError(
            f"--checkpoint {path} can't be read as a checkpoint of tensors: it {kind} cut off or damaged ({problem})."
        )
    check_storages(path, (storage for found in pickles for storage in found.storages), sizes)


def load_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Read a checkpoint's weights, never unpickling anything outside the allow-list.

    Args:
        path: A file that SLIP's trainer wrote, or a bare state dict saved by `torch.save`.

    Returns:
        Original key, without `module.`, → tensor, mapped from the file: the operating system reads a tensor when it is
        first used, so optimizer state stays on disk. Files of PyTorch before 1.6 can't be mapped, and are read whole.

    Raises:
        ConversionError: The file is missing, damaged, isn't a checkpoint, or holds objects outside the allow-list.
    """
    is_archive = check_kind(path)
    check_pickles(path, is_archive)
    if not is_archive:
        logger.warning("%s is a file of PyTorch before 1.6, which is read whole into memory.", path)
    try:
        with torch.serialization.safe_globals(ALLOWED_GLOBALS), warnings.catch_warnings():
            # Of kinds of tensors and of protocols, of which we speak ourselves where they matter.
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception as error:
        # torch.load raises errors of many types for a damaged file; each is the file's fault, and is reported as such.
        raise ConversionError(
            f"--checkpoint {path} can't be read as a checkpoint of tensors: it is cut off or damaged, or holds "
            f"something else. PyTorch says: {_reason(error)}"
        ) from error
    state_dict = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else checkpoint
    if not isinstance(state_dict, Mapping):
        raise ConversionError(
            f"--checkpoint {path} holds no state dict, but an object of type {type(state_dict).__name__}."
        )
    if not state_dict:
        raise ConversionError(f"--checkpoint {path} holds an empty state dict.")
    weights: dict[str, torch.Tensor] = {}
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise ConversionError(f"Key {listed([key])} is of type {type(key).__name__}; every key must be a text.")
        if type(value) not in (torch.Tensor, torch.nn.Parameter):
            raise ConversionError(f"Key {listed([key])} is of type {type(value).__name__}; it must be a tensor.")
        name = key.removeprefix("module.")
        if name in weights:
            raise ConversionError(f"Key {listed([name])} is given twice, with and without 'module.'; one must go.")
        weights[name] = value.detach()
    return weights


def check_tensors(state_dict: Mapping[str, torch.Tensor]) -> None:
    """Raise unless all tensors are dense, hold floating-point numbers, and have a number of their own at every place.

    Raises:
        ConversionError: It says which key, and what it is instead.
    """
    for key, tensor in state_dict.items():
        kinds = {
            "nested": tensor.is_nested,
            "on the meta device, without numbers": tensor.is_meta,
            "quantised": tensor.is_quantized,
            "sparse": tensor.layout != torch.strided,
        }
        for kind in (kind for kind, found in kinds.items() if found):
            raise ConversionError(f"Key {listed([key])} is {kind}; it must be a dense floating-point tensor.")
        if tensor.dtype not in FLOATING:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
            raise ConversionError(
                f"Key {listed([key])} is of {tensor.dtype}; it must be of a floating-point type of {allowed}."
            )
        if tensor.numel() == 0:
            raise ConversionError(f"Key {listed([key])} has shape {tuple(tensor.shape)}, so it holds no numbers.")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ConversionError(
                f"Key {listed([key])} has shape {tuple(tensor.shape)}, but only {tensor.untyped_storage().nbytes()} "
                "bytes of numbers, which it repeats."
            )


def _reason(error: Exception) -> str:
    """Return in one line what PyTorch met, without its advice to turn the check off."""
    text = str(error).rpartition("WeightsUnpickler error: ")[2]
    if operand := re.search(r"Unsupported operand (\d+)", text):
        opcode = {ord(one.code): one for one in pickletools.opcodes}.get(int(operand[1]))
        name = f"{opcode.name}, of pickle protocol {opcode.proto}" if opcode else operand[1]
        return f"the opcode {name}, can't be read; torch.save's own protocol, 2, can."
    text = re.sub(r"(,| or) (types|classes) allowlisted\s+via `\w+`", "", text)
    lines = (re.sub(r"(?<=\.) Please .*", "", line).strip() for line in text.splitlines())
    return next((line for line in lines if line and not _ADVICE.search(line)), type(error).__name__)
