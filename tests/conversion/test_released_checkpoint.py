"""The authors' files as they are, and files that are damaged or made to harm."""

import logging
import os
import pathlib
import pickle
import re
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from parity_models import FIXTURES, formula_state_dict
from released_checkpoint import IMPORTS, imports_of, save_released
from safetensors.torch import save_file
from test_conversion import HEADS, failing, run, save

from diffclip_hf.conversion import convert_original_checkpoint as conversion
from diffclip_hf.conversion import convert_to_original as back
from diffclip_hf.conversion.original_checkpoint import ALLOWED_GLOBALS, ConversionError, check_tensors, load_state_dict


TINY = FIXTURES / "diffclip-tiny.pt"


@pytest.fixture(scope="module")
def tiny() -> dict[str, torch.Tensor]:
    return load_state_dict(TINY)


@pytest.fixture
def weights(tiny) -> dict[str, torch.Tensor]:
    return dict(tiny)


# As they are --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "path_class"),
    [("diffclip", "pathlib.PosixPath"), ("clip", "pathlib.PosixPath"), ("diffclip", "pathlib._local.PosixPath")],
)
def test_a_file_like_the_released_ones_converts_bit_for_bit(tmp_path, variant, path_class):
    weights = load_state_dict(FIXTURES / f"{variant}-tiny.pt")
    path = save_released(tmp_path / "checkpoint_best.pt", weights, "DIFFCLIP_VITB16", path_class)
    assert imports_of(path) == {path_class if name == "pathlib.PosixPath" else name for name in IMPORTS}
    args = ["--variant", variant, *HEADS[variant], "--no-processor"]
    assert run("--checkpoint", path, "--output-dir", tmp_path / "out", *args) == 0
    assert back.main([str(tmp_path / "out"), str(tmp_path / "back.pt")]) == 0
    found = torch.load(tmp_path / "back.pt", weights_only=True)["state_dict"]
    assert found.keys() == {f"module.{key}" for key in weights}
    for key, value in weights.items():
        assert found[f"module.{key}"].numpy().tobytes() == value.numpy().tobytes(), key


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["diffclip", "clip"])
def test_a_file_of_the_released_size_converts_bit_for_bit(tmp_path, variant):
    """Of 1.8 GB, with CLIP's vocabulary, by the options of the README alone."""
    weights = formula_state_dict(variant)
    path = save_released(tmp_path / "checkpoint_best.pt", weights, "DIFFCLIP_VITB16")
    assert round(path.stat().st_size / 1e9, 1) == 1.8
    assert run("--checkpoint", path, "--output-dir", tmp_path / "out") == 0
    assert back.main([str(tmp_path / "out"), str(tmp_path / "back.pt")]) == 0
    found = load_state_dict(tmp_path / "back.pt")
    assert found.keys() == weights.keys()
    assert all(found[key].numpy().tobytes() == value.numpy().tobytes() for key, value in weights.items())


def test_it_is_read_where_no_posix_path_can_be_built(tmp_path, monkeypatch, weights):
    """As on Windows, whose Python says so in this way."""
    path = save_released(tmp_path / "x.pt", weights, "DIFFCLIP_VITB16")
    load = torch.load

    def load_on_windows(*args, **kwargs):
        def refuse(cls, *parts, **options):
            raise NotImplementedError(f"cannot instantiate {cls.__name__!r} on your system")

        with monkeypatch.context() as patch:
            patch.setattr(pathlib.PosixPath, "__new__", refuse)
            patch.setattr(pathlib.PosixPath, "__init__", refuse)
            with pytest.raises(NotImplementedError):
                pathlib.PosixPath("x")
            return load(str(args[0]), *args[1:], **kwargs)

    monkeypatch.setattr(torch, "load", load_on_windows)
    assert load_state_dict(path).keys() == weights.keys()


def test_what_is_allowed_is_this_and_nothing_else():
    names = {
        entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__name__}" for entry in ALLOWED_GLOBALS
    }
    assert names == {
        "argparse.Namespace",
        "numpy.dtype",
        "numpy.dtypes.Float32DType",
        "numpy.dtypes.Float64DType",
        "numpy.dtypes.Int64DType",
        "numpy._core.multiarray.scalar",
        "numpy.core.multiarray.scalar",
        "pathlib.PosixPath",
        "pathlib._local.PosixPath",
    }


# Pickles ------------------------------------------------------------------------------------------------------------


class Call:
    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def rewritten(
    path: Path, change=lambda name, content: content, more: dict[str, bytes] | None = None, **options
) -> Path:
    """Copy the tiny checkpoint, its members changed; one that becomes None is left out."""
    with zipfile.ZipFile(TINY) as archive, zipfile.ZipFile(path, "w", **options) as copy, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Duplicate name")
        for name in archive.namelist():
            content = change(name.split("/", 1)[1], archive.read(name))
            if content is not None:
                copy.writestr(name, content)
        for name, content in (more or {}).items():
            copy.writestr(f"diffclip-tiny/{name}", content)
    return path


def refused(path: Path, words: str) -> str:
    """Expect a file to be refused in one line, without advice to turn the check off; return the line."""
    with pytest.raises(ConversionError, match=words) as raised:
        load_state_dict(path)
    line = str(raised.value)
    assert "\n" not in line
    assert not re.search("weights_only|safe_globals|trust", line)
    return line


NESTED = b"".join(b"h\x00h\x00\x86q\x00" for _ in range(100))
PICKLES = {
    "global": (b"\x80\x02cos\nsystem\n(S'id'\ntR.", "it holds 'os.system'"),
    "python 2": (b"\x80\x02c__builtin__\neval\n.", "it holds 'builtins.eval'"),
    "inst": (b"\x80\x02(S'id'\nios\nsystem\n.", "it holds 'os.system'"),
    "extension": (b"\x80\x02\x82\x01.", "it holds 'copyreg.extension 1'"),
    "stack global": (b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93.", "it holds 'os.system'"),
    "from the memo": (b"\x80\x04\x8c\x06system\x94\x8c\x02os\x94h\x01h\x00\x93.", "it holds 'os.system'"),
    "duplicated": (b"\x80\x04\x8c\x02os2\x93.", "it holds 'os.os'"),
    "computed": (
        b"\x80\x04c_codecs\nencode\n\x8c\x02os\x8c\x06latin1\x86R\x8c\x06system\x93.",
        r"'\(computed\).system'",
    ),
    "escaped": (b"\x80\x02cargparse\nName\\x73pace\n.", "it holds 'argparse.Name"),
    "accented": (b"\x80\x02c\xc3\xb6s\nsystem\n.", r"a name that isn't plain ASCII, b'\\xc3\\xb6s'"),
    "with spaces": (b"\x80\x02cos system\nx y\n.", "it holds 'os system.x y'"),
    "with a newline": (b"\x80\x04\x8c\x03o\ns\x8c\x06system\x93.", r"it holds 'o\\ns.system'"),
    "a blocked module": (b"\x80\x02csys\nexit\n.", "it holds 'sys.exit'"),
    "another path": (b"\x80\x02cpathlib\nPath\n.", "it holds 'pathlib.Path'"),
    "a path's method": (b"\x80\x02cpathlib\nPosixPath.write_text\n.", "it holds 'pathlib.PosixPath.write_text'"),
    "in a persistent id": (b"\x80\x02(X\x06\x00\x00\x00modulecos\nsystem\nNNtQ.", "it holds 'os.system'"),
    "before it is cut off": (b"\x80\x02cos\nsystem\nX\xff\x00\x00\x00", "it holds 'os.system'"),
    "memory": (b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "it holds '__builtin__.bytearray'"),
    "a tensor of any size": (b"\x80\x02ctorch\nTensor\nJ\xff\xff\xff\x7f\x85R.", "it holds 'torch.Tensor'"),
    "a text that doubles": (
        b"\x80\x02X\x01\x00\x00\x00aq\x00" + b"c_codecs\nencode\nh\x00X\x03\x00\x00\x00hex\x86Rq\x00" * 40 + b".",
        "it encodes text in another way",
    ),
    "nested keys": (b"\x80\x02K\x01q\x00" + NESTED + b"}h\x00Ns.", "nests its values absurdly"),
    "nested arguments": (
        b"\x80\x02K\x01q\x00" + NESTED + b"c__builtin__\nset\n]h\x00a\x85R.",
        "nests its values absurdly",
    ),
    "nested call": (b"\x80\x02K\x01q\x00" + NESTED + b"cpathlib\nPosixPath\nh\x00R.", "nests its values absurdly"),
    "a call of a text": (b"\x80\x02X\x01\x00\x00\x00a)R.", "unrecognized function a"),
    "a changed number": (b"\x80\x02K\x01}b.", "Can only build Tensor, Parameter, OrderedDict, but got"),
    "a key twice": (b"\x80\x02}(X\x01\x00\x00\x00aNX\x01\x00\x00\x00aNu.", "it gives the key 'a' twice"),
    "an empty stack": (b"\x80\x020.", "a value from an empty stack"),
    "an empty memo": (b"\x80\x02h\x05.", "what it never stored, 5"),
    "no opcode": (b"\x80\x02\xff.", "cut off or damaged"),
    "no end": (b"\x80\x02N", "cut off or damaged"),
    "nothing": (b"", "cut off or damaged"),
    "a long text": (b"\x80\x02X\xff\xff\xff\x7fabc.", "cut off or damaged"),
    "a long number": (b"\x80\x02I" + b"9" * 10_000 + b"\n.", "cut off or damaged"),
    "too much": (b"\x80\x02" + b"N" * 3_000_000 + b".", "a data.pkl of 3000003 bytes"),
}


@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_is_refused_by_what_is_in_it(case, tmp_path):
    content, words = PICKLES[case]
    refused(rewritten(tmp_path / "x.pt", lambda name, old: content if name == "data.pkl" else old), words)


@pytest.mark.parametrize("protocol", range(6))
def test_what_would_run_is_named_whatever_the_protocol_and_the_format(protocol, tmp_path, weights):
    harm = Call(os.mkdir, (str(tmp_path / "side-effect"),))
    (tmp_path / "plain").write_bytes(pickle.dumps(harm, protocol))
    files = ["plain"]
    if protocol >= 2:
        content = {"state_dict": weights, "args": harm}
        for name, is_archive in (("archive", True), ("old", False)):
            with (tmp_path / name).open("wb") as file:
                torch.save(content, file, pickle_protocol=protocol, _use_new_zipfile_serialization=is_archive)
            files.append(name)
    for name in files:
        refused(tmp_path / name, f"it holds '{os.mkdir.__module__}.mkdir'")
    assert not (tmp_path / "side-effect").exists()


def test_what_pytorch_can_not_read_is_said_without_its_advice(tmp_path, weights):
    torch.save({"state_dict": weights}, tmp_path / "x.pt", pickle_protocol=4)
    refused(tmp_path / "x.pt", "the opcode FRAME, of pickle protocol 4, can't be read")


# Files --------------------------------------------------------------------------------------------------------------


def test_what_the_file_is_instead(tmp_path, weights):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "script")
    refused(tmp_path / "script", "is a TorchScript archive")
    with tarfile.open(tmp_path / "tar", "w") as archive:
        archive.add(TINY, "pickle")
    refused(tmp_path / "tar", r"is a tar archive, as PyTorch wrote before 0\.1\.10")
    save_file(weights, tmp_path / "weights")
    refused(tmp_path / "weights", "is a safetensors file")
    (tmp_path / "plain").write_bytes(pickle.dumps({"a": 1}))
    refused(tmp_path / "plain", "is a pickle, but not one of torch.save")
    (tmp_path / "zeros").write_bytes(bytes(10_000))
    refused(tmp_path / "zeros", "is not a file of torch.save")
    refused(tmp_path, "is not a file")


def test_a_file_of_an_older_pytorch_is_read_and_called_that(tmp_path, caplog, weights):
    path = tmp_path / "x.pt"
    torch.save({"state_dict": weights}, path, _use_new_zipfile_serialization=False)
    assert load_state_dict(path).keys() == weights.keys()
    assert "is a file of PyTorch before 1.6" in caplog.text
    whole = path.read_bytes()
    path.write_bytes(whole[:3000])
    refused(path, "it is of PyTorch before 1.6, and cut off or damaged")
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, "is damaged: its pickle reads")


def test_flipped_bits_are_found_by_the_checksums(tmp_path):
    whole = bytearray(TINY.read_bytes())
    with zipfile.ZipFile(TINY) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    whole[largest.header_offset + 4000] ^= 1
    (tmp_path / "x.pt").write_bytes(whole)
    refused(tmp_path / "x.pt", f"is damaged .Bad CRC-32 for file '{largest.filename}'.; fetch it anew")


def test_a_file_without_checksums_is_read_and_said_to_have_none(tmp_path, caplog, weights):
    torch.serialization.set_crc32_options(False)
    try:
        save(tmp_path / "x.pt", weights)
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_state_dict(tmp_path / "x.pt").keys() == weights.keys()
    assert "was saved without checksums" in caplog.text


def halved(name, content):
    return content[: len(content) // 2] if name == "data/0" else content


MEMBERS = {
    "shorter": ({"change": halved}, "reads 768 numbers of FloatStorage from '0', for which the file has 1536 bytes"),
    "missing": ({"change": lambda name, old: None if name == "data/0" else old}, "for which the file has 0 bytes"),
    "another type": (
        {"change": lambda name, old: old.replace(b"FloatStorage", b"HalfStorage") if name == "data.pkl" else old},
        "reads 768 numbers of HalfStorage from '0', for which the file has 3072 bytes",
    ),
    "compressed": ({"compression": zipfile.ZIP_DEFLATED}, "not as torch.save wrote it, which never compresses"),
    "no pickle": ({"change": lambda name, old: None if name == "data.pkl" else old}, "not one of torch.save"),
    "no version": ({"change": lambda name, old: None if name == "version" else old}, "not one of torch.save"),
    "twice": ({"more": {"data.pkl": b"\x80\x02N."}}, "'diffclip-tiny/data.pkl' more than once"),
    "byte order": (
        {"change": lambda name, old: b"pdp" if name == "byteorder" else old},
        "Unknown endianness type: pdp",
    ),
}


@pytest.mark.parametrize("case", MEMBERS)
def test_an_archive_with_other_members_is_refused(case, tmp_path):
    options, words = MEMBERS[case]
    refused(rewritten(tmp_path / "x.pt", **options), words)


def test_an_archive_packed_anew_without_compression_is_read(tmp_path, weights):
    """Its tensors lie at other places, which no number in them may depend on."""
    found = load_state_dict(rewritten(tmp_path / "x.pt"))
    assert all(torch.equal(found[key], value) for key, value in weights.items())


# Keys and tensors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [0.01, 0.5, 0.99, 0.9999])
def test_a_cut_off_archive(tmp_path, ends):
    whole = TINY.read_bytes()
    (tmp_path / "x.pt").write_bytes(whole[: int(ends * len(whole))])
    refused(tmp_path / "x.pt", "is cut off after|is damaged")


def test_a_key_given_twice(tmp_path, weights):
    torch.save({"state_dict": {**weights, "module.ln_final.bias": weights["ln_final.bias"]}}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "Key 'ln_final.bias' is given twice, with and without 'module.'")


def test_keys_and_values_of_other_kinds(tmp_path, weights):
    cases = {
        "Key 3 is of type int; every key must be a text": {"state_dict": {**weights, 3: torch.ones(2)}},
        "is of type dict; it must be a tensor": {"model": weights},
        "Key 'a' is of type NoneType; it must be a tensor": {"state_dict": {"a": None}},
        "no state dict, but an object of type list": {"state_dict": [1]},
        "no state dict, but an object of type int": 3,
        "an empty state dict": {"state_dict": {}, "epoch": 3},
    }
    for words, content in cases.items():
        torch.save(content, tmp_path / "x.pt")
        refused(tmp_path / "x.pt", words)


@pytest.mark.parametrize(
    "key", ["visual.blocks.999999999.norm1.weight", f"transformer.resblocks.{'9' * 5000}.ln_1.weight"]
)
def test_absurd_layer_numbers_are_refused_at_once(tmp_path, caplog, weights, key):
    path = save(tmp_path / "x.pt", {**weights, key: torch.zeros(64)})
    failing(
        tmp_path, caplog, "--checkpoint", path, words=["numbered from 0 without a gap: there is '9999", "but not '"]
    )
    assert len(caplog.text) < 1000


def test_numbers_that_are_no_layers(tmp_path, caplog, weights):
    for layer in ("01", "-1", "٣", ""):
        caplog.clear()
        path = save(tmp_path / "x.pt", {**weights, f"visual.blocks.{layer}.norm1.weight": torch.zeros(64)})
        failing(tmp_path, caplog, "--checkpoint", path, words=["Missing: none. Unexpected: 'visual.blocks."])


def test_many_keys_are_one_short_line(tmp_path, caplog, weights):
    path = save(tmp_path / "x.pt", {**weights, **{f"k{i}": torch.ones(1) for i in range(500)}})
    failing(tmp_path, caplog, "--checkpoint", path, words=["'k0', 'k1', 'k10', 'k100', 'k101' and 495 more"])


def quantised(tensor):
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


TENSORS = {
    "int64": (lambda tensor: tensor.long(), "is of torch.int64; it must be of a floating-point type"),
    "bool": (lambda tensor: tensor.bool(), "is of torch.bool"),
    "complex": (lambda tensor: tensor.to(torch.complex64), "is of torch.complex64"),
    "fp8": (lambda tensor: tensor.to(torch.float8_e4m3fn), "is of torch.float8_e4m3fn"),
    "sparse": (lambda tensor: tensor.to_sparse(), "is sparse"),
    "meta": (lambda tensor: tensor.to("meta"), "is on the meta device"),
    "quantised": (quantised, "is quantised"),
    "nested": (lambda tensor: torch.nested.nested_tensor([tensor, tensor]), "is nested"),
    "empty": (lambda tensor: tensor[:0], r"has shape \(0,\), so it holds no numbers"),
    "repeated": (lambda tensor: torch.zeros(1).expand(10**12, 48), "only 4 bytes of numbers, which it repeats"),
    "infinite in float32": (lambda tensor: tensor.double() * 0 + 1e300, "NaN or infinite values in float32"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_of_other_kinds_stop_it(case, tmp_path, caplog, weights):
    change, words = TENSORS[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = save(tmp_path / "x.pt", {**weights, "ln_final.bias": change(weights["ln_final.bias"])})
    assert run("--checkpoint", path, "--output-dir", tmp_path / "out", "--no-processor") == 1
    (error,) = (record.getMessage() for record in caplog.records if record.levelno == logging.ERROR)
    assert re.search(f"Key 'ln_final.bias' .*{words}", error)


@pytest.mark.parametrize(
    ("key", "shape", "words"),
    [
        ("visual.blocks.0.attn.lambda_q1", (0,), "holds no numbers"),
        ("visual.blocks.0.attn.lambda_q1", (7,), "λ vectors have length 7, its width is 64"),
        ("visual.blocks.0.attn.lambda_q1", (), "must have 1 dimensions"),
        ("token_embedding.weight", (0, 48), "holds no numbers"),
        ("token_embedding.weight", (3, 48), "a vocabulary of 3; it must be from 4"),
        ("positional_embedding", (2, 48), "a number of tokens of 2; it must be from 3"),
        ("positional_embedding", (100_000, 1), "a number of tokens of 100,000; it must be from 3 to 4,096"),
        ("visual.pos_embed", (1, 1, 64), "a number of positions of 1"),
        ("visual.pos_embed", (1, 3, 64), "has 3 positions; they must be a square and one"),
        ("visual.patch_embed.proj.weight", (64, 3, 0, 0), "holds no numbers"),
        ("visual.patch_embed.proj.weight", (64, 1, 8, 8), "has 1 channels; a picture has 3"),
        ("visual.patch_embed.proj.weight", (1, 3, 1000, 1000), "a side of 4,000"),
        ("logit_scale", (2,), r"has shape (2,); it must be ()"),
    ],
)
def test_shapes_that_no_model_has(tmp_path, caplog, weights, key, shape, words):
    path = save(tmp_path / "x.pt", {**weights, key: torch.zeros(shape)})
    failing(tmp_path, caplog, "--checkpoint", path, words=[words])


def test_tensors_that_share_their_numbers_convert(tmp_path, weights):
    shared = {**weights, "visual.blocks.0.norm1.weight": weights["visual.blocks.1.norm1.weight"]}
    path = save(tmp_path / "x.pt", shared)
    assert run("--checkpoint", path, "--output-dir", tmp_path / "out", "--no-processor") == 0


def test_parameters_are_tensors(weights):
    check_tensors({key: torch.nn.Parameter(value) for key, value in weights.items()})


# Before the work ----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_download(monkeypatch):
    monkeypatch.setattr(conversion, "download_checkpoint", lambda *args: pytest.fail("it is refused before"))


RELEASED = ["--repo-id", "hammh0a/DiffCLIP_ViTB16_CC12M"]


def test_an_output_folder_is_refused_before_the_download(tmp_path, caplog, monkeypatch, no_download):
    for name in ("stand", "mounted"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "stand")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").touch()
    cases = {
        ".": "is the working folder",
        "../dangling": "is a link to nowhere",
        "../file": "is not an empty folder",
        "../file/x": "can't be written",
    }
    for folder, words in cases.items():
        caplog.clear()
        assert run(*RELEASED, "--output-dir", folder) == 1
        assert words in caplog.text
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "mounted")
    caplog.clear()
    assert run(*RELEASED, "--output-dir", "../mounted") == 1
    assert "mounted is a mount point, which can't be replaced; name a new folder in it" in caplog.text


def test_a_tokenizer_is_refused_before_the_download(tmp_path, caplog, monkeypatch, no_download):
    from diffclip_hf.conversion import clip_vocabulary

    monkeypatch.setattr(clip_vocabulary, "PACKAGES", ("no_such_package",))
    failing(tmp_path, caplog, *RELEASED, words=["CLIP's vocabulary", "--no-processor"])
    for name, content in (("cut", b"\x1f\x8b\x08\x00"), ("text", b"#version")):
        caplog.clear()
        (tmp_path / f"{name}.txt.gz").write_bytes(content)
        failing(tmp_path, caplog, *RELEASED, "--tokenizer", tmp_path / f"{name}.txt.gz", words=["ERROR"])
    caplog.clear()
    failing(tmp_path, caplog, *RELEASED, "--tokenizer", tmp_path / "none", words=["none"])
