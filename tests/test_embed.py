"""`python -m diffclip_hf.embed`: right values in clip-retrieval's layout, each row once, whatever stops it."""

import errno
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import accelerate.utils
import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from distributed import launch
from PIL import Image
from tiny import randomised, tiny_config
from tokenizer_helper import BYTES
from torch.nn.functional import normalize
from training_samples import pair_dataset, sample, tiny_processor, write_shards, write_tar
from transformers import AutoModel, AutoProcessor
from transformers import logging as transformers_logging

from diffclip_hf import DiffCLIPModel
from diffclip_hf.common import embedding_parts, known_files
from diffclip_hf.common.embedding_parts import LOCK, REPORT, SETTINGS, locked
from diffclip_hf.data.parts import ShardParts
from diffclip_hf.embed import build_parser, main, run


SIZES = (5, 3, 9, 1)


@pytest.fixture(scope="module", autouse=True)
def _no_bars():
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    yield
    transformers_logging.enable_progress_bar()
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Shards, a model, and what one process makes of them in float32."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "shards").mkdir()
    write_shards(folder / "shards", SIZES, stats=False)
    for name, seed in (("model", 0), ("other", 1)):
        randomised(DiffCLIPModel(tiny_config(text=BYTES)), seed).save_pretrained(folder / name)
        tiny_processor().save_pretrained(folder / name)
    assert main(line(folder / "shards", folder / "whole", folder)) == 0
    return folder


def line(source, out: Path, data: Path, *options: str, dtype: str = "float32", model: str = "model") -> list[str]:
    given = ["--model", data / model, "--output-dtype", dtype, "--batch-size", 4, "--num-workers", 1]
    return [str(word) for word in (source, out, *given, "--device", "cpu", *options)]


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def embeddings(out: Path, kind: str) -> np.ndarray:
    return np.concatenate([np.load(path) for path in sorted((out / kind).glob("*.npy"))])


def metadata(out: Path) -> dict[str, list]:
    tables = [pq.read_table(path).to_pydict() for path in sorted((out / "metadata").glob("*.parquet"))]
    return {name: [value for table in tables for value in table[name]] for name in tables[0]}


def report(out: Path) -> dict:
    return json.loads((out / REPORT).read_text())


def expected(data: Path, numbers) -> tuple[np.ndarray, np.ndarray]:
    """The embeddings of pictures and their captions, one by one, by what Transformers has."""
    model, processor = AutoModel.from_pretrained(data / "model"), AutoProcessor.from_pretrained(data / "model")
    images, texts = [], []
    with torch.no_grad():
        for number in numbers:
            inputs = processor(
                text=f"picture {number}", images=Image.open(io.BytesIO(sample(number)["jpg"])), return_tensors="pt"
            )
            pixels = inputs.pop("pixel_values")
            images.append(normalize(model.get_image_features(pixels).pooler_output))
            texts.append(normalize(model.get_text_features(**inputs).pooler_output))
    return torch.cat(images).numpy(), torch.cat(texts).numpy()


# What is written ----------------------------------------------------------------------------------------------------


def test_the_embeddings_are_the_models_and_in_clip_retrievals_layout(data):
    out, count = data / "whole", sum(SIZES)
    images, texts = expected(data, range(count))
    for kind, right in (("img_emb", images), ("text_emb", texts)):
        assert [np.load(out / kind / f"{kind}_{part}.npy").shape for part in range(4)] == [(n, 24) for n in SIZES]
        found = embeddings(out, kind)
        assert found.dtype == np.float32
        assert np.abs(found - right).max() < 1e-5
    shards = [str(data / "shards" / f"{part:05d}.tar") for part, size in enumerate(SIZES) for _ in range(size)]
    assert metadata(out) == {
        "image_path": [f"{shard}/{number:09d}" for number, shard in enumerate(shards)],
        "caption": [f"picture {number}" for number in range(count)],
    }
    counts = {"rows": count, "seen": count, "corrupt_images": 0, "cut_captions": 0, "parts": 4, "broken_shards": []}
    assert counts.items() <= report(out).items()
    assert {path.name for path in out.iterdir()} == {"img_emb", "text_emb", "metadata", SETTINGS, REPORT}


def test_float16_is_the_rounded_float32(data, tmp_path):
    assert main(line(data / "shards", tmp_path / "out", data, "--num-workers", "2", dtype="float16")) == 0
    for kind in ("img_emb", "text_emb"):
        found = embeddings(tmp_path / "out", kind)
        assert found.dtype == np.float16
        assert (found == embeddings(data / "whole", kind).astype(np.float16)).all()


def test_numpys_own_files_have_the_same_bytes(data, tmp_path):
    for path in (data / "whole").rglob("*.npy"):
        np.save(tmp_path / path.name, np.load(path))
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_names_sort_as_the_parts_do(data, tmp_path):
    """For clip-retrieval joins the files in alphabetical order."""
    pair_dataset(11).save_to_disk(tmp_path / "pairs")
    assert main(line(tmp_path / "pairs", tmp_path / "out", data, "--part-rows", "1")) == 0
    assert sorted(path.name for path in (tmp_path / "out" / "img_emb").iterdir())[::5] == [
        f"img_emb_{part}.npy" for part in ("00", "05", "10")
    ]
    assert metadata(tmp_path / "out")["caption"] == [f"picture {number}" for number in range(11)]
    images, texts = expected(data, range(11))
    assert np.abs(embeddings(tmp_path / "out", "img_emb") - images).max() < 1e-5
    assert np.abs(embeddings(tmp_path / "out", "text_emb") - texts).max() < 1e-5


def test_a_folder_of_pictures_and_parquet(data, tmp_path):
    """A folder has no captions, so that its pictures are embedded alone."""
    (tmp_path / "pictures").mkdir()
    for number in range(5):
        (tmp_path / "pictures" / f"{number}.jpg").write_bytes(sample(number)["jpg"])
    assert main(line(tmp_path / "pictures", tmp_path / "out", data, "--part-rows", "3")) == 0
    assert metadata(tmp_path / "out") == {"image_path": [str(tmp_path / "pictures" / f"{n}.jpg") for n in range(5)]}
    pair_dataset(5, "photo", "words").to_parquet(tmp_path / "pairs.parquet")
    columns = ("--image-column", "photo", "--caption-column", "words")
    assert main(line(tmp_path / "pairs.parquet", tmp_path / "pairs", data, *columns)) == 0
    assert metadata(tmp_path / "pairs")["caption"][4] == "picture 4"
    images, _ = expected(data, range(5))
    for out, parts in ((tmp_path / "out", 2), (tmp_path / "pairs", 1)):
        assert report(out)["parts"] == parts
        assert np.abs(embeddings(out, "img_emb") - images).max() < 1e-5
    assert not (tmp_path / "out" / "text_emb").exists()


def test_shards_with_urls_and_without_captions(data, tmp_path):
    samples = [{"jpg": sample(n)["jpg"], "json": json.dumps({"url": f"https://a/{n}.jpg"}).encode()} for n in range(3)]
    write_tar(tmp_path / "0.tar", samples)
    assert main(line(tmp_path / "0.tar", tmp_path / "out", data)) == 0
    assert metadata(tmp_path / "out") == {
        "image_path": [f"{tmp_path}/0.tar/{number:09d}" for number in range(3)],
        "url": [f"https://a/{number}.jpg" for number in range(3)],
    }
    assert main(line(data / "shards", tmp_path / "alone", data, "--no-captions")) == 0
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {"img_emb", "metadata", SETTINGS, REPORT}
    assert (embeddings(tmp_path / "alone", "img_emb") == embeddings(data / "whole", "img_emb")).all()


# What can't be used -------------------------------------------------------------------------------------------------


def write_damaged(folder: Path) -> Path:
    """Of 11 samples 1 is no picture, 2 has no caption, 4 half a character; the second shard ends after 2 of 5."""
    folder.mkdir()
    captions: dict[int, bytes | None] = {2: None, 4: b"\xed\xa0\xbc"}
    samples = [sample(number, captions.get(number, "")) for number in range(11)]
    samples[1]["jpg"] = samples[1]["jpg"][:100]
    write_tar(folder / "0.tar", samples[:6])
    whole = write_tar(folder / "1.tar", samples[6:], first=6).read_bytes()
    (folder / "1.tar").write_bytes(whole[: whole.index(b"000000008.jpg") + 600])
    return folder


def test_damaged_rows_are_left_out_and_counted(data, tmp_path, caplog):
    source, out = write_damaged(tmp_path / "shards"), tmp_path / "out"
    assert main(line(source, out, data, "--max-broken-share", "0.5")) == 1
    assert "3 of 8 samples had to be skipped" in caplog.messages[-1]
    assert "max_skipped_share=0.01" in caplog.messages[-1]
    assert not (out / REPORT).exists()
    first = (out / "img_emb" / "img_emb_0.npy").stat()
    assert main(line(source, out, data, "--max-skipped-share", "0.5")) == 1
    assert "1 of 2 shards are broken, more than max_broken_share=0.1" in caplog.messages[-1]
    assert main(line(source, out, data, "--max-skipped-share", "0.5", "--max-broken-share", "0.5")) == 0
    # Shares are of the run alone, so that what is whole isn't done again.
    assert (out / "img_emb" / "img_emb_0.npy").stat() == first
    numbers = [0, 3, 5, 6, 7]
    assert metadata(out)["caption"] == [f"picture {number}" for number in numbers]
    images, texts = expected(data, numbers)
    assert np.abs(embeddings(out, "img_emb") - images).max() < 1e-5
    assert np.abs(embeddings(out, "text_emb") - texts).max() < 1e-5
    counts = {"rows": 5, "seen": 8, "corrupt_images": 1, "empty_captions": 1, "undecodable_captions": 1}
    assert counts.items() <= report(out).items()
    assert report(out)["broken_shards"] == [str(source / "1.tar")]


def test_damaged_rows_of_a_table(data, tmp_path):
    images = [{"bytes": sample(number)["jpg"], "path": None} for number in range(6)]
    images[0], images[3] = {"bytes": b"no picture", "path": None}, None
    captions = ["a", "", "c" * 200, "d", None, "f"]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    table = datasets.Dataset.from_dict({"image": images, "caption": captions}, features=features)
    table.save_to_disk(tmp_path / "table")
    # The second part has no row that can be used, and so no embeddings.
    share = ("--max-skipped-share", "1", "--part-rows", "1")
    assert main(line(tmp_path / "table", tmp_path / "out", data, *share)) == 0
    assert metadata(tmp_path / "out") == {"image_path": ["2", "5"], "caption": ["c" * 200, "f"]}
    assert [path.name for path in sorted((tmp_path / "out" / "text_emb").iterdir())] == [
        "text_emb_2.npy",
        "text_emb_5.npy",
    ]
    counts = {"rows": 2, "seen": 6, "corrupt_images": 2, "empty_captions": 2, "cut_captions": 1}
    assert counts.items() <= report(tmp_path / "out").items()


@pytest.mark.parametrize(("kind", "factor"), [("image", 1e25), ("image", 0.0), ("text", 1e25)])
def test_what_cant_be_normalised_is_refused(kind, factor, data, tmp_path, caplog):
    """Of a vector whose squares overflow PyTorch makes zeros, without a word."""
    model = DiffCLIPModel.from_pretrained(data / "model")
    projection = {"image": model.visual_projection, "text": model.text_projection}[kind]
    with torch.no_grad():
        projection.weight.mul_(factor)
    model.save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    assert main(line(data / "shards", tmp_path / "out", tmp_path)) == 1
    assert caplog.messages[-1].startswith(f"4 of 4 {kind} embeddings can't be L2-normalised: the norm of what")
    assert not list((tmp_path / "out").rglob("*.npy"))


# Going on -----------------------------------------------------------------------------------------------------------

KILL = """
import os, pathlib, signal, sys
from diffclip_hf import embed
from diffclip_hf.evaluation.encoder import Encoder
place, call = sys.argv.pop(1), int(sys.argv.pop(1))
owner, name = {"batch": (Encoder, "embed_pixels"), "rename": (pathlib.Path, "rename"), "keep": (os, "replace")}[place]
usual = getattr(owner, name)
def fatal(*args, **kwargs):
    global call
    call -= 1
    if call == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return usual(*args, **kwargs)
setattr(owner, name, fatal)
sys.exit(embed.main())
"""


def test_killed_again_and_again_it_makes_what_one_run_does(data, warm_python, tmp_path):
    # While the settings are written; in the second part's only batch; between the renames of the second and the third.
    for place, call, parts in (("keep", 1, 0), ("batch", 3, 1), ("rename", 2, 1), ("rename", 5, 2)):
        done = warm_python(["-c", KILL, place, call, *line(data / "shards", tmp_path / "out", data)], tmp_path)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert len(list((tmp_path / "out").glob("metadata/*"))) == parts
        assert list((tmp_path / "out").glob(".[!l]*"))
        assert (tmp_path / "out" / LOCK).exists()
    assert main(line(data / "shards", tmp_path / "out", data)) == 0
    assert content(tmp_path / "out") == content(data / "whole")


def run_in_process(folder: Path, words: list[str]) -> None:
    run(build_parser().parse_args(words))


def run_with_one_killed(folder: Path, words: list[str]) -> None:
    """Embed; the second process is killed in its second part, whereupon the first is ended too, as launchers do."""
    if dist.get_rank() == 1:
        usual, kills = ShardParts.rows, iter((False, True))
        ShardParts.rows = lambda self, number: (  # type: ignore[method-assign]
            os.kill(os.getpid(), signal.SIGKILL) if next(kills) else usual(self, number)
        )
    run(build_parser().parse_args(words))


def test_two_processes_make_what_one_does(data, tmp_path):
    launch(run_in_process, 2, tmp_path / "two", line(data / "shards", tmp_path / "out", data))
    assert content(tmp_path / "out") == content(data / "whole")


@pytest.mark.slow
def test_one_process_goes_on_where_two_were_killed(data, tmp_path):
    words = line(data / "shards", tmp_path / "out", data)
    with pytest.raises(Exception, match="SIGKILL"):
        launch(run_with_one_killed, 2, tmp_path / "killed", words)
    assert len(list((tmp_path / "out").glob("metadata/*.parquet"))) in (1, 2, 3)
    assert main(words) == 0
    assert content(tmp_path / "out") == content(data / "whole")


WAIT = """
import pathlib, sys, time
from diffclip_hf import embed
from diffclip_hf.evaluation.encoder import Encoder
folder, usual = pathlib.Path.cwd(), Encoder.embed_pixels
def wait(*args, **kwargs):
    (folder / "begun").touch()
    for _ in range(60000):
        if (folder / "go").exists():
            return usual(*args, **kwargs)
        time.sleep(0.01)
Encoder.embed_pixels = wait
sys.exit(embed.main())
"""


def test_a_second_command_is_refused_while_the_first_writes(data, warm_python, tmp_path, caplog):
    out = tmp_path / "out"
    words = line(data / "shards", out, data)
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(warm_python, ["-c", WAIT, *words], tmp_path)
        try:
            while not (tmp_path / "begun").exists():
                assert not first.done(), first.result().stderr
                time.sleep(0.01)
            (part,) = out.glob(".part-*")
            before = sorted(path.name for path in part.iterdir())
            assert main(words) == 1
            assert (
                caplog.messages[-1]
                == f"Another process is writing to {out}; wait for its end, or name another folder."
            )
            assert sorted(path.name for path in part.iterdir()) == before == ["img_emb", "metadata", "text_emb"]
        finally:
            (tmp_path / "go").touch()
    assert first.result().returncode == 0, first.result().stderr
    assert content(out) == content(data / "whole")


def refusal_in_process(folder: Path, words: list[str]) -> str:
    try:
        run(build_parser().parse_args(words))
    except ValueError as error:
        return str(error)
    return ""


def test_all_processes_learn_of_a_refusal(data, tmp_path):
    with locked(tmp_path / "out"):
        words = line(data / "shards", tmp_path / "out", data)
        found = launch(refusal_in_process, 2, tmp_path / "two", words)
    assert (
        found == [f"Another process is writing to {tmp_path / 'out'}; wait for its end, or name another folder."] * 2
    )


LOCK_AND_DIE = """
import os, pathlib, signal, sys, time
from diffclip_hf.common.embedding_parts import locked
with locked(pathlib.Path(sys.argv[1])):
    ready, tell = os.pipe()
    if os.fork() == 0:
        # As a process that reads pictures; pytest waits for what it could print.
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        pathlib.Path("child").write_text(str(os.getpid()))
        os.write(tell, b"x")
        time.sleep(3600)
    os.read(ready, 1)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_lock_ends_with_its_process_though_one_that_it_has_forked_lives(warm_python, tmp_path):
    out = tmp_path / "out"
    done = warm_python(["-c", LOCK_AND_DIE, out], tmp_path)
    child = int((tmp_path / "child").read_text())
    try:
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert (out / LOCK).exists()
        os.kill(child, 0)
        with locked(out):
            assert (out / LOCK).exists()
        assert not (out / LOCK).exists()
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("missing", ["module", "support"])
def test_where_nothing_can_be_locked_it_says_so_and_goes_on(missing, tmp_path, monkeypatch, caplog, propagate_logs):
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    if missing == "module":
        monkeypatch.setattr(embedding_parts, "fcntl", None)
    else:
        monkeypatch.setattr(embedding_parts.fcntl, "lockf", fail)
    reason = {"module": "this system has no locks", "support": "Function not implemented"}[missing]
    with locked(tmp_path / "out"):
        assert caplog.messages == [
            f"{tmp_path / 'out'} can't be locked ({reason}): see to it that only one command at a time writes there."
        ]


def test_a_lock_of_a_file_that_was_removed_meanwhile_is_none(tmp_path, monkeypatch):
    """The process before may remove the file and end its lock between another's opening it and locking it."""
    usual, removed = embedding_parts.fcntl.lockf, []

    def lockf(file, *args: object) -> None:
        if not removed:
            (tmp_path / LOCK).unlink()
            removed.append(file)
        usual(file, *args)

    monkeypatch.setattr(embedding_parts.fcntl, "lockf", lockf)
    with locked(tmp_path):
        assert removed[0].closed
        assert (tmp_path / LOCK).exists()


def test_it_says_that_another_process_has_ended(data, tmp_path, caplog, monkeypatch):
    def fail(objects: list) -> None:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:37501")

    monkeypatch.setattr(accelerate.utils, "broadcast_object_list", fail)
    assert main(line(data / "shards", tmp_path / "out", data)) == 1
    assert caplog.messages[-1].startswith("Another process ended before its work was done")


def test_what_is_whole_stays_and_what_isnt_is_done_again(data, tmp_path):
    shutil.copytree(data / "shards", tmp_path / "shards")
    words = line(tmp_path / "shards", tmp_path / "out", data)
    assert main(words) == 0
    before = content(tmp_path / "out")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.npy")}
    assert main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    (tmp_path / "out" / "img_emb" / "img_emb_1.npy").unlink()
    (tmp_path / "out" / "text_emb" / "text_emb_2.npy").write_bytes(before["text_emb/text_emb_2.npy"][:200])
    assert main(words) == 0
    assert content(tmp_path / "out") == before
    # A shard that was mended.
    write_tar(tmp_path / "shards" / "00001.tar", [sample(100), sample(101)])
    assert main(words) == 0
    captions = [f"picture {number}" for number in (*range(5), 100, 101, *range(8, 18))]
    assert metadata(tmp_path / "out")["caption"] == captions
    assert report(tmp_path / "out")["rows"] == 17


@pytest.fixture
def new_files_known(tmp_path, monkeypatch):
    """What is found out about files is kept in a folder of the test's, of files however new."""
    monkeypatch.setattr(known_files, "FOLDER", tmp_path / "kept")
    monkeypatch.setattr(known_files, "SETTLED", -(10**18))
    return tmp_path / "kept"


@pytest.mark.usefixtures("new_files_known")
@pytest.mark.parametrize("kind", ["ext4", "fuse.sshfs"])
def test_a_shard_is_known_by_what_it_holds(kind, data, tmp_path, monkeypatch):
    """Not by its size and mtime, which `cp -p` keeps, nor by its inode, which is another on each machine."""
    monkeypatch.setattr(known_files, "_mounts", lambda: {"/": kind})
    shards = tmp_path / "shards"
    shutil.copytree(data / "shards", shards)
    words = line(shards, tmp_path / "out", data)
    assert main(words) == 0
    before = content(tmp_path / "out")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.npy")}
    # The same content in another file, with another time.
    shutil.copyfile(shards / "00002.tar", tmp_path / "copy")
    (tmp_path / "copy").rename(shards / "00002.tar")
    # Other content of the same size and time, as `rsync -t` leaves it.
    old = (shards / "00001.tar").stat()
    write_tar(tmp_path / "new.tar", [sample(number) for number in (15, 16, 17)], first=5)
    os.utime(tmp_path / "new.tar", ns=(old.st_atime_ns, old.st_mtime_ns))
    (tmp_path / "new.tar").rename(shards / "00001.tar")
    new = (shards / "00001.tar").stat()
    assert (new.st_size, new.st_mtime_ns) == (old.st_size, old.st_mtime_ns)
    assert main(words) == 0
    captions = [f"picture {number}" for number in (*range(5), 15, 16, 17, *range(8, 18))]
    assert metadata(tmp_path / "out")["caption"] == captions
    images, _ = expected(data, (15, 16, 17))
    assert np.abs(np.load(tmp_path / "out" / "img_emb" / "img_emb_1.npy") - images).max() < 1e-5
    changed = {path.name for path, time_ns in written.items() if path.stat().st_mtime_ns != time_ns}
    assert changed == {"img_emb_1.npy", "text_emb_1.npy"}
    digest = hashlib.sha256((shards / "00002.tar").read_bytes()).hexdigest()
    note = pq.read_metadata(tmp_path / "out" / "metadata" / "metadata_2.parquet").metadata[b"diffclip_hf"]
    assert json.loads(note)["stamp"] == [str(shards / "00002.tar"), digest]
    assert content(tmp_path / "out")["metadata/metadata_2.parquet"] == before["metadata/metadata_2.parquet"]


@pytest.mark.usefixtures("new_files_known")
def test_a_table_is_known_by_what_it_holds(data, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(known_files, "_mounts", lambda: {"/": "ext4"})
    (tmp_path / "pictures").mkdir()
    for number in range(2):
        (tmp_path / "pictures" / f"{number}.jpg").write_bytes(sample(number)["jpg"])
    words = line(tmp_path / "pictures", tmp_path / "out", data)
    assert main(words) == 0
    first = tmp_path / "pictures" / "0.jpg"
    os.utime(first, ns=(0, 0))
    assert main(words) == 0
    content_before = first.read_bytes()
    first.write_bytes(content_before[:-3] + b"x" + content_before[-2:])
    os.utime(first, ns=(0, 0))
    assert main(words) == 1
    assert "begun with other source_files" in caplog.messages[-1]


@pytest.mark.usefixtures("new_files_known")
@pytest.mark.parametrize("kind", ["ext4", "fuse.sshfs"])
def test_a_shard_that_changes_while_it_is_read_is_refused(kind, data, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(known_files, "_mounts", lambda: {"/": kind})
    shard = write_tar(tmp_path / "0.tar", [sample(0), sample(1)])
    usual = ShardParts.rows

    def rows(self, number):
        yield from usual(self, number)
        old = shard.stat()
        write_tar(shard, [sample(2), sample(3)])
        os.utime(shard, ns=(old.st_atime_ns, old.st_mtime_ns))

    monkeypatch.setattr(ShardParts, "rows", rows)
    assert main(line(shard, tmp_path / "out", data)) == 1
    assert caplog.messages[-1] == f"{shard} changed while it was read; give the same command again."
    assert not list((tmp_path / "out").rglob("*.npy"))


def test_of_a_url_nothing_is_known_but_the_url(monkeypatch):
    url = "https://example.org/0.tar"
    monkeypatch.setattr(ShardParts, "__init__", lambda self: setattr(self, "shards", [url]))
    assert ShardParts().stamp(0) == [url]


@pytest.mark.parametrize(
    ("options", "changes", "words"),
    [
        (("--batch-size", "2"), {}, "begun with batch_size 4, and it is 2 now"),
        (("--no-captions",), {}, "begun with captions True, and it is False now"),
        ((), {"model": "other"}, "begun with other weights; give"),
        ((), {"dtype": "float16"}, "begun with output_dtype 'float32', and it is 'float16' now"),
        ((), {"source": "shards/00001.tar"}, "begun with shards 4, and it is 1 now"),
    ],
)
def test_it_goes_on_with_nothing_else(options, changes, words, data, caplog):
    before = content(data / "whole")
    source = data / changes.pop("source", "shards")
    assert main(line(source, data / "whole", data, *options, **changes)) == 1
    assert words in caplog.messages[-1]
    assert "\n" not in caplog.messages[-1]
    assert content(data / "whole") == before


def test_what_cant_work_is_refused_before_the_work(data, tmp_path, caplog):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    new = tmp_path / "new"
    for source, out, options, words in (
        (data / "shards", tmp_path / "full", (), "isn't empty, and no embeddings were begun there"),
        (data / "shards", tmp_path / "file" / "in", (), "can't be written"),
        (data / "shards", data / "shards" / "in", (), "of which it would become a part"),
        (data / "shards", new, ("--split", "test"), "--split can't be used with"),
        (data / "shards", new, ("--device", "gpu"), "device"),
        (data / "shards", new, ("--part-rows", "0"), "part_rows is 0; it must be at least 1"),
        (data / "shards", new, ("--batch-size", "0"), "batch_size is 0"),
        (data / "shards", new, ("--max-skipped-share", "2"), "max_skipped_share is 2.0; it must be in 0..1"),
        (data / "model", new, ("--no-captions", "--caption-column", "a"), "can't be used with --no-captions"),
        (data / "missing.tar", new, (), "missing.tar' isn't there"),
        (data / "shard", new, (), "did you mean shards"),
    ):
        assert main(line(source, out, data, *options)) == 1
        assert words in caplog.messages[-1]
        assert not new.exists()
    assert content(tmp_path / "full") == {"notes.txt": b"mine"}


@pytest.mark.slow
def test_accelerate_launches_two_processes(data, tmp_path):
    from training.test_train import free_port, run_command  # type: ignore[import-not-found]

    starts = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    starts += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())]
    words = line(data / "shards", tmp_path / "out", data)
    done = run_command([sys.executable, *starts, "-m", "diffclip_hf.embed", *words], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "4 of 4 parts are to be embedded, with captions, by 2 processes" in done.stderr
    assert content(tmp_path / "out") == content(data / "whole")
