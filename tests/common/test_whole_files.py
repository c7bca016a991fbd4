"""What is written appears whole or not at all."""

import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from diffclip_hf.common import whole_files
from diffclip_hf.common.whole_files import (
    check_output_file,
    check_output_folder,
    write_text_whole,
    write_whole,
    written_whole,
)


def content(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_replaces_the_old_one(tmp_path):
    (tmp_path / "file").write_text("old")
    write_whole(tmp_path / "file", lambda beside: beside.write_text("new"))
    write_whole(tmp_path / "new" / "file", lambda beside: beside.write_text("new"))
    assert content(tmp_path) == {"file": "new", "new/file": "new"}
    assert mode(tmp_path / "file") == 0o644


def test_a_file_that_could_not_be_written_leaves_the_old_one(tmp_path):
    (tmp_path / "file").write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("full")

    with pytest.raises(RuntimeError, match="full"):
        write_whole(tmp_path / "file", fail)
    assert content(tmp_path) == {"file": "old"}


def test_a_folder_can_be_read_by_everyone_with_what_is_in_it(tmp_path):
    with written_whole(tmp_path / "folder") as beside:
        (beside / "below").mkdir(mode=0o700)
        (beside / "below" / "file").write_text("new")
        (beside / "below" / "file").chmod(0o600)
        assert not (tmp_path / "folder").exists()
    assert content(tmp_path) == {"folder/below/file": "new"}
    assert mode(tmp_path / "folder") == mode(tmp_path / "folder" / "below") == 0o755
    assert mode(tmp_path / "folder" / "below" / "file") == 0o644


def test_nothing_is_left_of_a_folder_that_could_not_be_written(tmp_path):
    def fail() -> None:
        with written_whole(tmp_path / "folder") as beside:
            (beside / "file").write_text("half")
            raise RuntimeError("full")

    with pytest.raises(RuntimeError, match="full"):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_kept(tmp_path):
    (tmp_path / "file").write_text("old")
    with (
        pytest.raises(FileExistsError, match=f"{tmp_path} exists and is not an empty folder"),
        written_whole(tmp_path),
    ):
        pytest.fail("it is refused before")
    assert content(tmp_path) == {"file": "old"}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """A folder to write in, and another to stand in."""
    (tmp_path / "stand").mkdir()
    monkeypatch.chdir(tmp_path / "stand")
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def test_a_folder_that_can_be_written_is_found_and_nothing_is_left(elsewhere):
    assert check_output_folder(elsewhere / "new") == elsewhere / "new"
    assert check_output_folder("../in/a/b/c") == elsewhere / "a" / "b" / "c"
    assert not list(elsewhere.iterdir())
    (elsewhere / "empty").mkdir(mode=0o750)
    (elsewhere / "link").symlink_to("empty")
    before = (elsewhere / "empty").stat()
    assert check_output_folder(elsewhere / "link") == elsewhere / "empty"
    assert (before.st_ino, before.st_mode) == ((now := (elsewhere / "empty").stat()).st_ino, now.st_mode)
    assert sorted(path.name for path in elsewhere.iterdir()) == ["empty", "link"]
    with written_whole(elsewhere / "link") as beside:
        (beside / "file").write_text("new")
    assert (elsewhere / "link").is_symlink()
    assert content(elsewhere / "empty") == {"file": "new"}


def test_a_folder_that_could_not_be_written_in_the_end_is_refused_before(elsewhere):
    (elsewhere / "file").write_text("old")
    (elsewhere / "dangling").symlink_to("nowhere")
    (elsewhere / "loop").symlink_to("loop")
    (elsewhere / "filled").symlink_to(elsewhere)
    cases = {
        ".": ". is the working folder",
        "": ". is the working folder",
        "../stand": "../stand is the working folder",
        elsewhere / "file": "file exists and is not an empty folder",
        elsewhere / "filled": "filled exists and is not an empty folder",
        elsewhere / "file" / "out": "file/out can't be written (",
        elsewhere / "dangling": "dangling is a link to nowhere, which isn't there",
        elsewhere / "dangling" / "out": "dangling is a link to nowhere, which isn't there",
        elsewhere / "loop": "loop is a link to loop",
        elsewhere / ("n" * 300): "can't be written (File name too long",
        "/": "/ exists and is not an empty folder",
    }
    if Path("/proc/self").exists():
        cases["/proc/out"] = "/proc/out can't be written ("
    before = sorted(elsewhere.iterdir())
    for folder, words in cases.items():
        with pytest.raises(OSError, match=re.escape(words)):
            check_output_folder(folder)
        with pytest.raises(OSError, match=re.escape(words)), written_whole(Path(folder)):
            pytest.fail("it is refused before")
    assert sorted(elsewhere.iterdir()) == before


def test_a_mount_point_is_refused(elsewhere):
    """One of the same file system too, which `os.path.ismount` takes for a plain folder."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['check_output_folder'](sys.argv[2])"
    script = 'set -e; mkdir of out; mount --bind of out; exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", script, "sh"]
    try:
        able = subprocess.run([*command, "true"], cwd=elsewhere, capture_output=True).returncode == 0
    except FileNotFoundError:
        able = False
    if not able:
        pytest.skip("needs a user's own mounts, by unshare")
    for path in elsewhere.iterdir():
        path.rmdir()
    done = subprocess.run(
        [*command, sys.executable, "-c", code, whole_files.__file__, str(elsewhere / "out")],
        cwd=elsewhere,
        capture_output=True,
        text=True,
    )
    assert f"OSError: {elsewhere / 'out'} is a mount point, which can't be replaced" in done.stderr


def test_a_file_that_could_not_be_written_in_the_end_is_refused_before(elsewhere):
    (elsewhere / "file").write_text("old")
    (elsewhere / "link").symlink_to("file")
    (elsewhere / "dangling").symlink_to("nowhere")
    before = sorted(elsewhere.iterdir())
    for path in ("new", "file", "link", "dangling", "a/b/new"):
        check_output_file(elsewhere / path)
    check_output_file("new")
    cases = {
        ".": ". exists and is not a file",
        elsewhere: "in exists and is not a file",
        "/dev/null": "/dev/null exists and is not a file",
        elsewhere / "file" / "new": "file/new can't be written (",
        elsewhere / "dangling" / "new": "dangling is a link to nowhere",
        elsewhere / ("n" * 300): "can't be written (File name too long",
    }
    for path, words in cases.items():
        with pytest.raises(OSError, match=re.escape(words)):
            check_output_file(path)
    assert sorted(elsewhere.iterdir()) == before
    assert not list(Path().iterdir())


def test_a_tilde_is_the_home_folder(elsewhere, monkeypatch):
    monkeypatch.setenv("HOME", str(elsewhere / "home"))
    assert check_output_folder("~/out") == elsewhere / "home" / "out"
    with written_whole(Path("~/out")) as beside:
        (beside / "a").write_text("b")
    check_output_file("~/file")
    write_text_whole(Path("~/file"), "c")
    assert [(elsewhere / "home" / name).read_text() for name in ("out/a", "file")] == ["b", "c"]
    assert not list(Path().iterdir())


def test_a_mount_point_is_found_where_it_shows(elsewhere, monkeypatch):
    (elsewhere / "mounted").mkdir()
    (elsewhere / "mounted.json").touch()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).stem == "mounted")
    with pytest.raises(OSError, match="mounted is a mount point, which can't be replaced; name a new folder in it"):
        whole_files.check_output_folder(elsewhere / "mounted")
    with pytest.raises(OSError, match=r"mounted\.json is a mount point, which can't be replaced; name another"):
        whole_files.check_output_file(elsewhere / "mounted.json")
