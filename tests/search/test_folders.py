"""A folder's pictures are embedded once, and what is kept is never another picture's or another model's."""

import logging
import multiprocessing
import os
import signal
import sys
import time

import numpy as np
import pytest
import torch
from search_models import make_model
from training_samples import picture, tiny_processor

from diffclip_hf import DiffCLIPTokenizer, ImageIndex
from diffclip_hf.common import known_files
from diffclip_hf.evaluation.encoder import Encoder
from diffclip_hf.search import folders


@pytest.fixture
def work(monkeypatch):
    """How many pictures were embedded and read, on a file system that tells of changes, of files however new."""
    counts = {"embedded": 0, "read": 0}
    embed, find_out = Encoder.embed_pixels, folders.find_out

    def embed_pixels(self, pixels, pooled=False):
        counts["embedded"] += len(pixels)
        return embed(self, pixels, pooled)

    def counted(path, compute):
        counts["read"] += 1
        return find_out(path, compute)

    monkeypatch.setattr(Encoder, "embed_pixels", embed_pixels)
    monkeypatch.setattr(folders, "find_out", counted)
    monkeypatch.setattr(known_files, "SETTLED", -(10**18))
    monkeypatch.setattr(known_files, "_mounts", lambda: {"/": "ext4"})
    return counts


@pytest.fixture
def search(model, processor, folder, tmp_path, work):
    """Makes an index of the folder, and says how many pictures were embedded and read for it."""

    def make(model=model, processor=processor, cache_dir=tmp_path / "cache", **options):
        work.update(embedded=0, read=0)
        index = ImageIndex.from_folder(
            folder, model, processor, cache_dir=cache_dir, **{"num_workers": 1, "batch_size": 2, **options}
        )
        return index, (work["embedded"], work["read"])

    return make


def names(index, folder):
    return [os.path.relpath(name, folder) for name in index.names]


def assert_as_new(index, folder, model, processor):
    """Compare with an index of which nothing was kept."""
    new = ImageIndex.from_folder(folder, model, processor, num_workers=1)
    assert index.names == new.names
    assert torch.allclose(index.embeds, new.embeds, atol=1e-6)


def test_only_what_is_new_or_changed_is_embedded(search, folder, model, processor):
    index, done = search()
    assert names(index, folder) == ["a.png", "b.PNG", "c.jpg", "d.webp", "sub/e.png"]
    assert done == (5, 5)
    again, done = search()
    assert done == (0, 0)
    assert again.names == index.names
    assert torch.equal(again.embeds, index.embeds)
    time.sleep(0.02)  # Longer than a tick of the file system's clock.
    picture(10).save(folder / "a.png")
    picture(11).save(folder / "new.png")
    (folder / "d.webp").rename(folder / "sub" / "moved.webp")
    (folder / "b.PNG").touch()
    (folder / "c.jpg").unlink()
    index, done = search()
    # Those that were moved or touched are read, and known by their content.
    assert done == (2, 4)
    assert names(index, folder) == ["a.png", "b.PNG", "new.png", "sub/e.png", "sub/moved.webp"]
    assert_as_new(index, folder, model, processor)
    assert search()[1] == (0, 0)


def test_a_change_that_keeps_size_and_time_is_seen(search, folder, model, processor):
    for seed in (0, 10):
        picture(seed).save(folder / f"{seed}.bmp")
    search()
    before = (folder / "0.bmp").stat()
    time.sleep(0.02)
    (folder / "0.bmp").write_bytes((folder / "10.bmp").read_bytes())
    os.utime(folder / "0.bmp", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (folder / "0.bmp").stat().st_size == before.st_size
    index, done = search()
    assert done == (0, 1)  # It's known by its content.
    assert_as_new(index, folder, model, processor)


def test_where_the_file_system_doesnt_tell_files_are_read_but_not_embedded(search, monkeypatch, tmp_path):
    monkeypatch.setattr(known_files, "_mounts", lambda: {"/": "9p"})
    assert search()[1] == (5, 5)
    parts = sorted((tmp_path / "cache").rglob("part-*"))
    assert search()[1] == (0, 5)
    assert sorted((tmp_path / "cache").rglob("part-*")) == parts


def test_a_links_file_system_is_that_of_its_file(search, monkeypatch, tmp_path, folder):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    picture(10).save(elsewhere / "x.png")
    (folder / "link.png").symlink_to(elsewhere / "x.png")
    for mounts, again in ({"/": "ext4"}, 0), ({"/": "ext4", os.path.realpath(elsewhere): "9p"}, 6):
        monkeypatch.setattr(known_files, "_mounts", lambda mounts=mounts: mounts)
        search()
        assert search()[1] == (0, again)


def test_without_a_cache_nothing_is_kept(search, tmp_path):
    for _ in range(2):
        assert search(cache_dir=None)[1] == (5, 5)
    assert not (tmp_path / "cache").exists()


def test_another_model_never_answers_from_kept_embeddings(search, processor):
    first, _ = search()
    other = tiny_processor(DiffCLIPTokenizer)
    other.image_processor.image_mean = [0.5, 0.5, 0.5]
    second, done = search(model=make_model(1))
    assert done == (5, 5)
    assert search(processor=other)[1] == (5, 5)
    assert (first.embeds - second.embeds).abs().max() > 0.1
    assert search()[1] == (0, 0)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_identical_files_are_embedded_once(batch_size, search, folder, model, processor):
    for name in ("x.png", "y.png", "z.png"):
        (folder / name).write_bytes((folder / "a.png").read_bytes())
    (folder / "xx.png").write_text("not a picture")
    index, done = search(batch_size=batch_size)
    assert done == (5, 9)
    assert names(index, folder) == ["a.png", "b.PNG", "c.jpg", "d.webp", "sub/e.png", "x.png", "y.png", "z.png"]
    pixels = processor(images=list(index.names), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        embeds = model.get_image_features(pixel_values=pixels).pooler_output
    assert torch.allclose(index.embeds, embeds / embeds.norm(dim=1, keepdim=True), atol=1e-5)
    found = index.search(folder / "a.png", 4)
    assert [os.path.basename(name) for _, name in found] == ["a.png", "x.png", "y.png", "z.png"]
    assert len({score for score, _ in found}) == 1


def test_what_cant_be_read_is_named_and_left_out(search, folder, caplog, monkeypatch):
    monkeypatch.setattr(folders, "MOST_NAMED", 2)
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "empty.jpg").touch()
    (folder / "text.gif").write_text("hello")
    for count in (5, 0):
        caplog.clear()
        index, (embedded, _) = search()
        assert embedded == count
        assert len(index) == 5
        assert [os.path.basename(name) for name in index.left_out] == ["broken.png", "empty.jpg", "text.gif"]
        messages = [record.getMessage() for record in caplog.records]
        # The user gave files, whatever the package reads them as.
        assert index.left_out[str(folder / "empty.jpg")] == f"{folder / 'empty.jpg'}: The file is empty."
        assert not any("bytes" in reason for reason in index.left_out.values())
        assert messages[-1] == "3 of 8 pictures can't be read and are left out."
        assert [os.path.basename(message.split(": ")[1]) for message in messages[:-1]] == ["broken.png", "empty.jpg"]
    for path in folder.rglob("*.*"):
        path.write_text("hello")
    with pytest.raises(ValueError, match=r"None of the 8 pictures in .* can be read"):
        search()


def test_links_to_folders_arent_followed(search, folder, caplog):
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "link.png").symlink_to(folder / "a.png")
    (folder / "nowhere.png").symlink_to(folder / "none.png")
    index, _ = search()
    assert names(index, folder) == ["a.png", "b.PNG", "c.jpg", "d.webp", "link.png", "sub/e.png"]
    assert f"Links to folders aren't followed: {folder}/sub/loop." in caplog.text


def test_the_working_folder(search, folder, monkeypatch, model, processor):
    monkeypatch.chdir(folder)
    index = ImageIndex.from_folder(".", model, processor, num_workers=1)
    assert index.names == ("a.png", "b.PNG", "c.jpg", "d.webp", os.path.join("sub", "e.png"))


# What is kept -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="a process is forked and killed")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_killed_process_leaves_what_it_embedded(search, monkeypatch, tmp_path, folder, model, processor):
    monkeypatch.setattr(folders, "KEPT_EVERY", 0)
    embed = Encoder.embed_pixels

    def killed(self, pixels, pooled=False):
        if killed.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        killed.left -= 1
        return embed(self, pixels, pooled)

    killed.left = 2
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "embed_pixels", killed)
        process = multiprocessing.get_context("fork").Process(target=search)
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    index, done = search()
    assert done == (1, 1)
    assert_as_new(index, folder, model, processor)


def test_what_a_killed_writer_left_is_removed_after_a_day(search, tmp_path):
    """But nothing that a living one may be writing, and nothing else."""
    search()
    (part,) = (tmp_path / "cache").rglob("part-*")
    # As write_whole names it, by mkstemp.
    left, living = (part.with_name(f".part-{number:016x}.safetensors-abcd_{number}23") for number in range(2))
    others = [part, living, part.with_name(".nfs0001"), part.with_name("notes.txt")]
    for path in (left, *others[1:]):
        path.write_bytes(b"half")
    for path in (left, *others):
        os.utime(path, (time.time() - (23 if path == living else 25) * 3600,) * 2)
    search()
    assert sorted(part.parent.iterdir()) == sorted(others)


def test_a_damaged_part_is_embedded_again(search, tmp_path, caplog, folder, model, processor):
    search()
    (part,) = (tmp_path / "cache").rglob("part-*")
    part.write_bytes(part.read_bytes()[:-1] + b"\0")
    index, done = search()
    assert done == (5, 5)
    assert "Its pictures are embedded again: " in caplog.text
    assert_as_new(index, folder, model, processor)
    caplog.clear()
    assert search()[1] == (0, 0)
    assert not caplog.records


def test_what_isnt_needed_any_more_is_cleared(search, tmp_path, folder):
    for seed in range(20, 32):
        picture(seed).save(folder / f"{seed}.png")
        search()
    parts = list((tmp_path / "cache").rglob("part-*"))
    assert len(parts) <= folders.MOST_PARTS + 1
    for seed in range(20, 32):
        (folder / f"{seed}.png").unlink()
    search()
    (part,) = (tmp_path / "cache").rglob("part-*")
    _, rows, embeds, _ = folders.read_rows(part)
    assert len(rows) == len(embeds) == 5
    assert search()[1] == (0, 0)


def test_a_full_disk_is_said_and_the_search_goes_on(search, monkeypatch, caplog, tmp_path):
    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(folders, "write_rows", full)
    index, done = search()
    assert len(index) == 5
    assert done == (5, 5)
    assert "Embeddings can't be kept in" in caplog.text


def test_several_processes_read(search, folder, model, processor, monkeypatch):
    """From 16 pictures on; they say what they couldn't read too."""
    monkeypatch.undo()
    for seed in range(20, 40):
        picture(seed).save(folder / f"{seed}.png")
    (folder / "29.png").write_text("hello")
    index = ImageIndex.from_folder(folder, model, processor, num_workers=2, batch_size=8)
    assert len(index) == 24
    assert list(index.left_out) == [str(folder / "29.png")]
    for number, name in enumerate(index.names):
        match = index.search(index.embeds[number], 1)[0]
        assert match.name == name
        assert np.isclose(match.score, 1)
    assert logging.getLogger().level != logging.DEBUG
