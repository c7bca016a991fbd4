"""What is written appears whole or not at all."""

import stat
from pathlib import Path

import pytest

from diffclip_hf.whole_files import write_whole, written_whole


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
