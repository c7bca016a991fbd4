"""Tar shards: what is read, how it is divided, positions, and damage."""

import gzip
import io
import itertools
import json
import random
import tarfile

import fsspec
import numpy as np
import pytest
import torch
from accelerate.data_loader import skip_first_batches
from torch.utils.data import DataLoader
from training_samples import encoded, picture, sample, tiny_processor, write_shards, write_tar

from diffclip_hf.common import known_files
from diffclip_hf.data import ImageTextCollator, ImageTextShards, shard_rows, shard_samples, shard_sizes
from diffclip_hf.data.shard_files import expand_braces, find_shards, open_shard


pytestmark = pytest.mark.usefixtures("propagate_logs")


def only_list(rows):
    return rows


def captions(shards: ImageTextShards, workers: int = 0) -> list[str]:
    """What a DataLoader yields, in order; the number of its batches must be as announced."""
    loader = DataLoader(shards, batch_size=shards.batch_size, num_workers=workers, collate_fn=only_list)
    batches = list(loader)
    assert len(batches) == len(loader) == shards.batches_per_epoch
    assert {len(batch) for batch in batches} == {shards.batch_size}
    return [row["caption"] for row in itertools.chain.from_iterable(batches)]


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [
        ("a.tar", ["a.tar"]),
        ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
        ("{a,bc}/{0..1}.tar", ["a/0.tar", "a/1.tar", "bc/0.tar", "bc/1.tar"]),
        ("{a}.tar", ["{a}.tar"]),
    ],
)
def test_braces_are_written_out_as_a_shell_does(pattern, expanded):
    assert expand_braces(pattern) == expanded


def test_shards_are_found_by_folder_pattern_and_list(tmp_path):
    paths = [str(path) for path in write_shards(tmp_path, [1, 1, 1])]
    assert find_shards(str(tmp_path)) == paths
    assert find_shards(f"{tmp_path}/*.tar") == paths
    assert find_shards(f"{tmp_path}/0000{{1..2}}.tar") == paths[1:]
    assert find_shards([paths[2], paths[0]]) == [paths[2], paths[0]]
    assert find_shards("https://example.org/{0..1}.tar") == ["https://example.org/0.tar", "https://example.org/1.tar"]
    with pytest.raises(FileNotFoundError, match=r"00003\.tar"):
        find_shards(f"{tmp_path}/0000{{2..3}}.tar")
    with pytest.raises(ValueError, match="has no tar shards"):
        find_shards(f"{tmp_path}/*.tgz")
    with pytest.raises(ValueError, match="at least one"):
        find_shards([])


def test_a_sample_is_a_run_of_files_with_one_key(tmp_path):
    image = encoded(picture(0))
    files = {
        "a/000.json": b'{"caption": "from the JSON"}',
        "a/000.jpg": image,
        "a/000.txt": b"von Hand",
        "a/001.PNG": encoded(picture(1), "PNG"),
        "a/001.cls": b"7",
        "a/001.json": b'{"caption": ["one", "other"], "width": 48}',
        "b/001.jpeg": image,
        "b/001.txt": b"the same name in another folder",
        "b/002.txt": b"without an image it's no sample",
        "b/.hidden.jpg": image,
        "b/003.webp": encoded(picture(2), "WEBP"),
        "b/003.txt": b"last",
    }
    path, folder = tmp_path / "0.tar", tarfile.TarInfo("a")
    folder.type = tarfile.DIRTYPE
    with tarfile.open(path, "w") as archive:
        archive.addfile(folder)
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    rows = list(ImageTextShards(str(path), 1, shuffle_buffer=0))
    assert [row["key"] for row in rows] == [f"{path}/{key}" for key in ("a/000", "a/001", "b/001", "b/003")]
    assert [row["caption"] for row in rows] == [
        "von Hand",
        ["one", "other"],
        "the same name in another folder",
        "last",
    ]
    names = ("a/000.jpg", "a/001.PNG", "b/001.jpeg", "b/003.webp")
    assert [row["image"] for row in rows] == [{"bytes": files[name], "path": None} for name in names]


# Shards, processes and workers; batches are of 2, so that 24 samples divide evenly throughout.
DIVISIONS = [
    ([5, 9, 10], 1, 0),
    ([5, 9, 10], 2, 0),
    ([5, 9, 10], 1, 2),
    ([5, 9, 10], 2, 2),
    ([24], 2, 2),
    ([1] * 24, 2, 3),
    ([24], 3, 4),
]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("sizes", "world", "workers"), DIVISIONS)
@pytest.mark.parametrize("buffer", [0, 3, 1000])
def test_an_epoch_has_every_sample_once(tmp_path, sizes, world, workers, buffer):
    write_shards(tmp_path, sizes)
    seen = []
    for rank in range(world):
        shards = ImageTextShards(str(tmp_path), 2, shuffle_buffer=buffer, rank=rank, world_size=world)
        assert len(shards) == 24 // world
        seen += captions(shards, workers)
    assert sorted(seen) == sorted(f"picture {number}" for number in range(24))
    assert shards.counts["repeated"] == 0


def test_what_makes_no_whole_batch_for_everyone_is_left_out(tmp_path):
    write_shards(tmp_path, [9, 8])
    seen = []
    for rank in range(2):
        shards = ImageTextShards(str(tmp_path), 3, rank=rank, world_size=2)
        # 17 samples are 8 for each of two processes, which are 2 batches of 3.
        assert (len(shards), shards.batches_per_epoch) == (6, 2)
        seen += captions(shards)
    assert len(set(seen)) == 12


def test_the_order_depends_on_seed_and_epoch_alone(tmp_path):
    write_shards(tmp_path, [20, 20])

    def order(seed, epoch):
        shards = ImageTextShards(str(tmp_path), 2, seed=seed, shuffle_buffer=8)
        shards.set_epoch(epoch)
        return captions(shards)

    first = order(0, 0)
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    assert order(0, 0) == first
    assert len({tuple(order(seed, epoch)) for seed in range(2) for epoch in range(2)}) == 4
    assert first != [f"picture {number}" for number in range(40)]
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    list(ImageTextShards(str(tmp_path), 2))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_resumed_epoch_continues_the_unbroken_one(tmp_path, workers, rank):
    write_shards(tmp_path, [13, 20, 12, 3])

    def loader():
        shards = ImageTextShards(str(tmp_path), 3, seed=4, shuffle_buffer=5, rank=rank, world_size=2)
        collator = ImageTextCollator(tiny_processor(), train=True, seed=4)
        collator.set_epoch(2)
        plain = DataLoader(shards, batch_size=3, num_workers=workers, collate_fn=collator)
        shards.set_epoch(2)
        return shards, collator, plain

    _, _, whole = loader()
    whole = list(whole)
    assert len(whole) == 8
    for done in (0, 1, 3, 8):
        shards, collator, prepared = loader()
        shards.set_position(2, done)
        rest = list(skip_first_batches(prepared, done))
        assert len(rest) == 8 - done
        # Nothing that was passed over was decoded.
        assert collator.counts["seen"] == 3 * (8 - done)
        for batch, expected in zip(rest, whole[done:], strict=True):
            assert batch.keys() == {"pixel_values", "input_ids", "attention_mask", "return_loss"}
            assert all(torch.equal(batch[name], expected[name]) for name in batch.keys() - {"return_loss"})


def test_a_position_is_of_one_epoch(tmp_path):
    write_shards(tmp_path, [8])
    shards = ImageTextShards(str(tmp_path), 2)
    shards.set_position(1, 3)
    assert [row is None for row in shards] == [True] * 6 + [False] * 2
    shards.set_epoch(2)
    assert None not in list(shards)
    for batches in (-1, 5):
        with pytest.raises(ValueError, match=r"batches_done is -?\d; it must be in 0\.\.4"):
            shards.set_position(0, batches)


def test_running_workers_learn_of_the_epoch(tmp_path):
    write_shards(tmp_path, [16])
    shards = ImageTextShards(str(tmp_path), 2)
    loader = DataLoader(shards, batch_size=2, num_workers=2, persistent_workers=True, collate_fn=only_list)
    seen = []
    for epoch in range(2):
        shards.set_epoch(epoch)
        seen.append([row["caption"] for batch in loader for row in batch])
    expected = []
    for epoch in range(2):
        fresh = ImageTextShards(str(tmp_path), 2)
        fresh.set_epoch(epoch)
        expected.append(captions(fresh, 2))
    assert seen == expected


def test_samples_without_a_caption_are_passed_over_and_counted(tmp_path, caplog):
    image = encoded(picture(0))
    unusable = [
        {"jpg": image},
        {"jpg": image, "txt": b" \n"},
        {"jpg": image, "json": b'{"caption": null}'},
        {"jpg": image, "json": b'{"caption": [""]}'},
        {"jpg": image, "txt": "Größe".encode("latin-1")},
        {"jpg": image, "json": b"{"},
        {"jpg": image, "json": b"[]"},
        {"jpg": image, "json": b'{"caption": 3}'},
    ]
    path = write_tar(tmp_path / "0.tar", [*map(sample, range(16)), *unusable])
    shards = ImageTextShards(str(path), 4, shuffle_buffer=0, max_skipped_share=0.5)
    seen = captions(shards)
    # 24 samples were announced; the last two batches repeat the first samples.
    assert seen == [f"picture {number}" for number in (*range(16), *range(8))]
    assert shards.counts == {
        "seen": 32,
        "empty_captions": 4,
        "undecodable_captions": 4,
        "repeated": 8,
        "broken_shards": 0,
    }
    skipped = [record.message for record in caplog.records if "Skipped" in record.message]
    assert len(skipped) == 2
    assert f"{path}/000000016" in skipped[0]
    assert f"{path}/000000020: 'utf-8' codec" in skipped[1]
    shards.check()
    shards = ImageTextShards(str(path), 4, shuffle_buffer=0, max_skipped_share=0.1)
    captions(shards)
    with pytest.raises(ValueError, match=r"8 of 32 samples .*empty captions: 4, .*max_skipped_share=0\.1"):
        shards.check()


@pytest.mark.parametrize("caption", [b"[" * 200_000 + b"]" * 200_000, b'{"caption": "half \\ud83c"}'])
def test_a_caption_of_absurd_json_or_half_a_character_is_counted(tmp_path, caption):
    samples = [{"jpg": encoded(picture(0)), "json": caption}, *map(sample, range(1, 4))]
    shards = ImageTextShards(str(write_tar(tmp_path / "0.tar", samples)), 3, shuffle_buffer=0, max_skipped_share=1)
    assert captions(shards) == ["picture 1", "picture 2", "picture 3"]
    assert shards.counts["undecodable_captions"] == 1


def test_a_name_given_twice_begins_another_sample(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for number in range(2):
            for extension, content in sample(number).items():
                info = tarfile.TarInfo(f"same.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    assert captions(ImageTextShards(str(tmp_path), 2, shuffle_buffer=0)) == ["picture 0", "picture 1"]


def once(folder, batch_size: int, world: int, workers: int) -> list[list[list[str]]]:
    """What each process has of each global batch."""
    processes = []
    for rank in range(world):
        # Fewer samples than a batch are enough, and training's order doesn't matter.
        shards = ImageTextShards(str(folder), 1000, rank=rank, world_size=world, max_skipped_share=1)
        loader = DataLoader(shards.once(batch_size), batch_size=None, num_workers=workers, collate_fn=only_list)
        processes.append([[row["caption"] for row in rows] for rows in loader])
    return [list(parts) for parts in zip(*processes, strict=True)]


def test_evaluation_has_each_pair_once_in_order_by_hand(tmp_path):
    samples = [sample(number, None if number == 2 else "") for number in range(6)]
    write_tar(tmp_path / "0.tar", samples)
    write_tar(tmp_path / "1.tar", map(sample, range(6, 9)), first=6)
    # One that states too few is read to its end.
    (tmp_path / "1_stats.json").write_text('{"successes": 1}')
    of = "picture {}".format
    expected = [[[of(0), of(1)], [of(3)]], [[of(4), of(5)], [of(6), of(7)]], [[of(8)], []]]
    assert once(tmp_path, 2, 2, 0) == expected
    assert once(tmp_path, 2, 2, 2) == expected


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("batch_size", "world", "workers"), [(1, 1, 0), (5, 1, 3), (7, 3, 0), (100, 2, 0)])
def test_evaluation_is_the_same_whatever_the_division(tmp_path, batch_size, world, workers):
    write_shards(tmp_path, [5, 1, 7])
    found = once(tmp_path, batch_size, world, workers)
    assert [caption for batch in found for part in batch for caption in part] == [f"picture {n}" for n in range(13)]


def test_too_many_skipped_stop_the_training(tmp_path):
    tiny = [{"jpg": b"", "txt": b"x" if number % 10 else b""} for number in range(2000)]
    shards = ImageTextShards(str(write_tar(tmp_path / "0.tar", tiny)), 8, shuffle_buffer=0)
    rows = iter(shards)
    # The first is judged once 1,000 have been seen; the next empty caption is the 1,001st sample.
    for _ in range(900):
        next(rows)
    with pytest.raises(ValueError, match=r"101 of 1001 samples had to be skipped .*0\.tar/000001000"):
        next(rows)


def break_inside(path, number: int) -> None:
    """Cut a tar off in the middle of the image of a sample."""
    with tarfile.open(path) as archive:
        member = archive.getmember(f"{number:09d}.jpg")
    with open(path, "r+b") as file:
        file.truncate(member.offset_data + member.size // 2)


def break_header(path, number: int) -> None:
    with tarfile.open(path) as archive:
        member = archive.getmember(f"{number:09d}.jpg")
    with open(path, "r+b") as file:
        file.seek(member.offset)
        file.write(b"\xff" * 300)


def cut_at_header(path, number: int) -> None:
    with tarfile.open(path) as archive:
        member = archive.getmember(f"{number:09d}.jpg")
    with open(path, "r+b") as file:
        file.truncate(member.offset)


def not_a_tar(path, number: int) -> None:
    path.write_bytes(b"<html>404</html>" * 1000)


def nothing(path, number: int) -> None:
    path.write_bytes(b"")


# What is done to the second of three shards at its sample 12 of 10..19, and how many of its samples are left: without
# the header that follows it, sample 11 may lack a file.
DAMAGES = [(break_inside, 2), (break_header, 1), (cut_at_header, 2), (not_a_tar, 0), (nothing, 0)]


@pytest.mark.parametrize(("damage", "left"), DAMAGES)
@pytest.mark.parametrize("stats", [True, False])
def test_a_broken_shard_is_named_and_the_rest_goes_on(tmp_path, caplog, damage, left, stats):
    paths = write_shards(tmp_path, [10, 10, 10], stats=stats)
    damage(paths[1], 12)
    shards = ImageTextShards(str(tmp_path), 1, max_broken_share=0.4, seed=1)
    # A clean cut between two files looks like a tar's end unless one knows how many samples there should be.
    known = stats or damage is not cut_at_header
    assert len(shards) == (30 if stats else 20 + left)
    seen = captions(shards)
    intact = {f"picture {number}" for number in (*range(10 + left), *range(20, 30))}
    assert set(seen) == intact
    assert shards.counts["repeated"] == len(seen) - len(intact)
    errors = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == shards.counts["broken_shards"] == int(known)
    assert not known or f"{paths[1]} is broken after {left} samples" in errors[0]


def test_a_cut_gzip_is_named(tmp_path, caplog):
    whole = gzip.compress(write_tar(tmp_path / "whole.bin", map(sample, range(20))).read_bytes())
    (tmp_path / "0.tar.gz").write_bytes(whole)
    assert captions(ImageTextShards(str(tmp_path), 2, shuffle_buffer=0)) == [f"picture {n}" for n in range(20)]
    (tmp_path / "1.tgz").write_bytes(whole[: len(whole) // 2])
    shards = ImageTextShards(str(tmp_path), 2, max_broken_share=0.5)
    assert 20 < shards.num_samples < 40
    assert f"{tmp_path}/1.tgz is broken after {shards.num_samples - 20} samples: EOFError" in caplog.text


def test_too_many_broken_shards_stop_the_training(tmp_path):
    paths = write_shards(tmp_path, [10, 10, 10])
    for path in paths[:2]:
        break_inside(path, 10 * paths.index(path) + 5)
    shards = ImageTextShards(str(tmp_path), 2, max_broken_share=0.4)
    with pytest.raises(ValueError, match=r"2 of 3 shards are broken.*00000\.tar, .*00001\.tar"):
        list(shards)
    not_a_tar(paths[2], 0)
    for path in paths:
        path.with_name(f"{path.stem}_stats.json").unlink()
    with pytest.raises(ValueError, match="3 of 3 shards are broken"):
        ImageTextShards(str(tmp_path), 2, max_broken_share=0.9)
    with pytest.raises(ValueError, match=r"have 10 samples \(.*00002\.tar can't be read\)"):
        len(ImageTextShards(str(tmp_path), 20, max_broken_share=1))


def test_a_worker_without_any_sample_says_so(tmp_path):
    write_tar(tmp_path / "0.tar", [sample(number, None) for number in range(4)])
    with pytest.raises(ValueError, match=r"Not one sample of the shards .*0\.tar can be used"):
        next(iter(ImageTextShards(str(tmp_path), 2)))


def test_a_workers_error_arrives(tmp_path):
    paths = write_shards(tmp_path, [10, 10])
    not_a_tar(paths[0], 0)
    shards = ImageTextShards(str(tmp_path), 2)
    with pytest.raises(ValueError, match=r"1 of 2 shards are broken.*00000\.tar"):
        captions(shards, 1)


def test_sizes_are_read_beside_the_shards(tmp_path, caplog):
    paths = write_shards(tmp_path, [4, 4, 4])
    for path in paths[1:]:
        path.with_name(f"{path.stem}_stats.json").unlink()
    (tmp_path / "sizes.json").write_text(json.dumps({"00001.tar": 3}))
    shards = ImageTextShards(str(tmp_path), 1, shuffle_buffer=0)
    assert shards.num_samples == 11
    assert "1 of 3 shards have neither" in caplog.text
    # The sample that isn't stated isn't read.
    assert captions(shards) == [f"picture {number}" for number in (0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11)]
    (tmp_path / "sizes.json").write_text("[]")
    with pytest.raises(ValueError, match=r"sizes\.json' has a list; it must have an object"):
        ImageTextShards(str(tmp_path), 1)
    for size in ("true", "-1", '"3"', "2.5"):
        (tmp_path / "sizes.json").write_text(f'{{"00001.tar": {size}}}')
        with pytest.raises(ValueError, match=r"sizes\.json' states .* as 00001\.tar; it must be a whole number"):
            ImageTextShards(str(tmp_path), 1)
    (tmp_path / "sizes.json").write_text("{")
    with pytest.raises(ValueError, match=r"sizes\.json' must be JSON"):
        ImageTextShards(str(tmp_path), 1)


def test_a_url_is_streamed(tmp_path):
    memory = fsspec.filesystem("memory")
    for path in write_shards(tmp_path, [6, 6]):
        memory.pipe(f"/shards/{path.name}", path.read_bytes())
    memory.pipe("/shards/00000_stats.json", b'{"successes": 6}')
    seen = []
    for rank in range(2):
        shards = ImageTextShards("memory://shards/0000{0..1}.tar", 2, rank=rank, world_size=2)
        seen += captions(shards)
    assert sorted(seen) == sorted(f"picture {number}" for number in range(12))
    memory.pipe("/shards/00000.tar", (tmp_path / "00000.tar").read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"1 of 2 shards are broken.*memory://shards/00000\.tar"):
        list(ImageTextShards("memory://shards/0000{0..1}.tar", 2))


def test_the_same_keys_in_several_shards_are_different_samples(tmp_path):
    write_tar(tmp_path / "0.tar", map(sample, range(3)))
    write_tar(tmp_path / "1.tar", map(sample, range(3, 6)))
    assert sorted(captions(ImageTextShards(str(tmp_path), 2))) == [f"picture {number}" for number in range(6)]


def test_one_sample(tmp_path):
    write_shards(tmp_path, [1])
    assert captions(ImageTextShards(str(tmp_path), 1), 2) == ["picture 0"]
    with pytest.raises(ValueError, match="have 1 samples; batch_size=2 on 3 processes needs at least 6"):
        len(ImageTextShards(str(tmp_path), 2, rank=0, world_size=3))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"shuffle_buffer": -1}, "shuffle_buffer is -1"),
        ({"max_skipped_share": 2}, r"max_skipped_share is 2; it must be in 0\.\.1"),
        ({"max_broken_share": -1}, r"max_broken_share is -1; it must be in 0\.\.1"),
        ({"rank": 1}, "rank is 1 and world_size is None"),
        ({"rank": 2, "world_size": 2}, r"rank is 2; with world_size=2 it must be in 0\.\.1"),
    ],
)
def test_arguments_are_checked(tmp_path, kwargs, message):
    write_shards(tmp_path, [2])
    with pytest.raises(ValueError, match=message):
        ImageTextShards(str(tmp_path), **{"batch_size": 1} | kwargs)


def test_the_process_group_must_be_there_first(tmp_path, monkeypatch):
    write_shards(tmp_path, [2])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE is 2, but torch\.distributed isn't initialised"):
        ImageTextShards(str(tmp_path), 1)


def test_no_shard_is_opened_before_the_first_batch_and_then_few(tmp_path, monkeypatch):
    paths = write_shards(tmp_path, [2] * 40)
    opened = []

    def note(path):
        opened.append(path)
        return open_shard(path)

    monkeypatch.setattr(shard_sizes, "open_shard", note)
    monkeypatch.setattr(shard_samples, "open_shard", note)
    shards = ImageTextShards(str(tmp_path), 2, shuffle_buffer=0)
    assert {name.rpartition("_")[2] for name in opened} == {"stats.json"}
    opened.clear()
    sizes = tmp_path / "sizes.json"
    sizes.write_text(json.dumps({path.name: 2 for path in paths}))
    shards = ImageTextShards(str(tmp_path), 2, shuffle_buffer=0)
    assert opened == [str(sizes)]
    assert [row["caption"] for row in itertools.islice(shards, 4)] == [f"picture {number}" for number in range(4)]
    assert opened[1:] == [str(path) for path in paths[:2]]


def test_what_was_counted_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(known_files, "FOLDER", tmp_path / "kept")
    monkeypatch.setattr(known_files, "SETTLED", -(10**18))
    paths = write_shards(tmp_path, [3, 4], stats=False)
    not_a_tar(paths[1], 0)
    first = ImageTextShards([str(path) for path in paths], 1, max_broken_share=0.5)
    monkeypatch.setattr(shard_rows, "_count_samples", None)
    second = ImageTextShards([str(path) for path in paths], 1, max_broken_share=0.5)
    assert first.rows.sizes.tolist() == second.rows.sizes.tolist() == [3, 0]
    assert first.counts == second.counts
