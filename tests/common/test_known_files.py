"""What is kept about files is never that of other content, and nothing is read that is known."""

import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from diffclip_hf.common import known_files
from diffclip_hf.common.known_files import known_value, known_values, tells_changes


@pytest.fixture
def read(tmp_path, monkeypatch):
    """The paths that were read, with what is kept in a folder of the test's, of files however new."""
    monkeypatch.setattr(known_files, "FOLDER", tmp_path / "kept")
    monkeypatch.setattr(known_files, "SETTLED", -(10**18))
    monkeypatch.setattr(known_files, "_mounts", lambda: {"/": "ext4"})
    return []


def values(paths: list[Path], read: list[str]) -> list[str]:
    def compute(path: str) -> str:
        read.append(Path(path).name)
        return Path(path).read_text()

    return known_values("text", [str(path) for path in paths], compute)


def rewrite(path: Path, how: str) -> None:
    """Give a file content of the same size and the same mtime, as programs that keep times do."""
    before = path.stat()
    if how == "in place":
        with path.open("r+") as file:
            file.write("new")
    else:
        other = path.with_name("other")
        other.write_text("new")
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        if how == "renamed":
            other.rename(path)
        else:
            shutil.copy2(other, path)  # as cp -p
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize("how", ["in place", "renamed", "copied"])
def test_a_change_that_keeps_size_and_time_is_seen_and_the_rest_isnt_read_again(how, tmp_path, read):
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path in paths:
        path.write_text("old")
    assert values(paths, read) == ["old"] * 3
    assert values(paths[::-1], read) == ["old"] * 3
    assert sorted(read) == ["a", "b", "c"]
    time.sleep(0.02)  # Longer than a tick of the file system's clock.
    rewrite(paths[1], how)
    assert values(paths, read) == ["old", "new", "old"]
    assert values(paths, read) == ["old", "new", "old"]
    assert sorted(read) == ["a", "b", "b", "c"]


def test_what_changed_just_now_or_is_elsewhere_is_read_each_time(tmp_path, read, monkeypatch):
    path = tmp_path / "a"
    path.write_text("old")
    monkeypatch.setattr(known_files, "SETTLED", 10**18)
    assert values([path], read) + values([path], read) == ["old", "old"]
    monkeypatch.setattr(known_files, "SETTLED", -(10**18))
    monkeypatch.setattr(known_files, "_mounts", lambda: {"/": "ext4", str(tmp_path): "fuse.sshfs"})
    assert values([path], read) + values([path], read) == ["old", "old"]
    assert read == ["a"] * 4


def test_a_link_to_a_file_elsewhere_is_read_each_time(tmp_path, read, monkeypatch):
    """The link's own file system tells of changes, and that of its file doesn't."""
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "far" / "file")
    (tmp_path / "near").write_text("old")
    monkeypatch.setattr(known_files, "_mounts", lambda: {"/": "ext4", str(tmp_path / "far"): "fuse.sshfs"})
    link, near = tmp_path / "link", tmp_path / "near"
    for path in (link, near, link, near):
        assert values([path], read) == ["old"]
        found = known_value("one", str(path), [str(path)], lambda path=path: read.append(f"one {path.name}"))
        assert found is None
    assert read == ["link", "one link", "near", "one near", "link", "one link"]


def test_file_systems_by_hand():
    mounts = {"/": "ext4", "/mnt": "cifs", "/mnt/fast": "xfs"}
    assert [tells_changes(place, mounts) for place in ("/x", "/mnt", "/mnt/x/y", "/mnt/fast/x", "/mnt/faster")] == [
        *(True, False, False, True, False)
    ]
    assert not tells_changes("/x", {})


def test_names_of_mounts_are_read_as_the_kernel_writes_them(tmp_path, monkeypatch):
    """It escapes a space, tab, line break, backslash and #, and nothing else, whatever the encoding."""
    lines = [
        b"/dev/a / ext4 rw,relatime 0 0",
        "/dev/b /media/Fotos\\040\u00e4 vfat rw 0 0".encode(),
        b"/dev/c /media/b\xff vfat rw 0 0",
        rb"/dev/\043d /a\011b\012c\134d\043e vfat rw 0 0",
        # A backslash before what looks like an escape, and a character at which str.splitlines divides.
        rb"/dev/e /f\134040 vfat rw 0 0",
        "/dev/f /g\u0085h xfs rw 0 0".encode(),
    ]
    (tmp_path / "mounts").write_bytes(b"\n".join(lines) + b"\n")
    monkeypatch.setattr(known_files, "MOUNTS", tmp_path / "mounts")
    mounts = known_files._mounts()
    assert mounts == {
        "/": "ext4",
        "/media/Fotos \u00e4": "vfat",
        "/media/b\udcff": "vfat",
        "/a\tb\nc\\d#e": "vfat",
        "/f\\040": "vfat",
        "/g\u0085h": "xfs",
    }
    places = ("/media/Fotos \u00e4/x", "/media/b\udcff/x", "/media/x", "/g\u0085h/x")
    assert [tells_changes(place, mounts) for place in places] == [False, False, True, True]
    assert known_files.all_tell_changes(["/media/x/file"])
    monkeypatch.setattr(known_files, "MOUNTS", tmp_path / "none")
    assert not known_files.all_tell_changes(["/media/x/file"])


def test_one_that_asks_at_the_same_time_waits_for_the_other(tmp_path, read):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_text("old")
    begun, found = threading.Event(), []

    def compute(path: str) -> str:
        read.append(path)
        begun.set()
        time.sleep(0.1)
        return "x"

    def ask() -> None:
        found.append(known_values("text", list(map(str, paths)), compute))

    others = [threading.Thread(target=ask) for _ in range(2)]
    others[0].start()
    begun.wait()
    others[1].start()
    for other in others:
        other.join()
    assert found == [["x", "x"], ["x", "x"]]
    assert len(read) == 2


def test_a_damaged_index_and_a_folder_that_cant_be_written_are_no_errors(tmp_path, read, monkeypatch):
    path = tmp_path / "a"
    path.write_text("old")
    values([path], read)
    (index,) = (tmp_path / "kept").glob("*.json")
    for text in ("{", "[]", '{"a": 3}'):
        index.write_text(text.replace("a", str(path)))
        assert values([path], read) == ["old"]
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(known_files, "FOLDER", tmp_path / "file" / "kept")
    assert values([path], read) == ["old"]
    with pytest.raises(FileNotFoundError):
        values([tmp_path / "none"], read)
