"""`python -m diffclip_hf.search`: what it prints and draws, and what it refuses."""

import logging
import os
import re
import subprocess

import numpy as np
import pytest
from PIL import Image
from training_samples import picture
from transformers import AutoModel, AutoProcessor

from diffclip_hf import ImageIndex
from diffclip_hf.search import Match, command
from diffclip_hf.search.command import main
from diffclip_hf.search.sheets import draw_sheet


@pytest.fixture
def search(saved_model, tmp_path, capfdbinary, caplog):
    """Runs the command in this process; returns its status, what it printed, and its log."""

    def run(*arguments):
        caplog.clear()
        caplog.set_level(logging.INFO)
        words = [*arguments, "--model", saved_model, "--device", "cpu", "--cache-dir", tmp_path / "cache"]
        status = main([str(word) for word in [*words, "--num-workers", "1"]])
        return status, capfdbinary.readouterr().out, [record.getMessage() for record in caplog.records]

    return run


def wanted(folder, saved_model, text, top):
    model, processor = (one.from_pretrained(saved_model) for one in (AutoModel, AutoProcessor))
    index = ImageIndex.from_folder(folder, model, processor, num_workers=1)
    return [f"{score:.4f}\t{name}" for score, name in index.search(text, top)]


def test_what_it_prints(search, folder, saved_model):
    # An option may stand between the folder and the query.
    status, printed, _ = search(folder, "--top", 3, "two dogs")
    assert status == 0
    assert printed.decode().splitlines() == wanted(folder, saved_model, "two dogs", 3)
    # The second time from what was kept; a template, and several queries, one twice.
    status, printed, _ = search(folder, "dogs", "cat", "dogs", "--template", "two {}", "--image", folder / "c.jpg")
    lines = [line.split("\t") for line in printed.decode().splitlines()]
    assert [line[2] for line in lines] == [
        query for query in ("dogs", "cat", "dogs", str(folder / "c.jpg")) for _ in range(5)
    ]
    assert ["\t".join(line[:2]) for line in lines[:5]] == wanted(folder, saved_model, "two dogs", 5)
    assert lines[:5] == lines[10:15]
    assert lines[15][:2] == ["1.0000", str(folder / "c.jpg")]


def test_more_than_there_are_is_said(search, folder):
    status, printed, messages = search(folder, "dog", "--top", 9)
    assert (status, len(printed.splitlines())) == (0, 5)
    assert "There are 5 pictures, fewer than --top 9: these are all." in messages


def test_paths_for_xargs(search, folder):
    names = [b"new\nline.png", b"tab\t and space.png", b"not utf-8 \xff.png"]
    for seed, name in enumerate(names, 20):
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            picture(seed).save(file, "PNG")
    status, printed, _ = search(folder, "dog", "--print0")
    assert status == 0
    found = subprocess.run(["xargs", "-0", "ls", "--zero"], input=printed, capture_output=True, check=True)
    assert sorted(found.stdout.split(b"\0")[:-1]) == sorted(printed.split(b"\0")[:-1])
    assert {os.path.join(os.fsencode(folder), name) for name in names} <= set(printed.split(b"\0"))
    assert len(printed.split(b"\0")) == 9
    # Without --print0 each is one line of three columns all the same.
    lines = search(folder, "dog", "a\ncat")[1].split(b"\n")
    assert [line.count(b"\t") for line in lines] == [2] * 16 + [0]
    printed = {os.path.basename(line.split(b"\t")[1]) for line in lines[:-1]}
    assert {rb"new\nline.png", rb"tab\t and space.png", b"not utf-8 \xff.png"} <= printed
    assert {line.split(b"\t")[2] for line in lines[:-1]} == {b"dog", rb"a\ncat"}


def test_the_contact_sheet(search, folder, tmp_path):
    """One colour a picture, so that it's known where each is."""
    for path in list(folder.rglob("*.*")):
        path.unlink()
    colours = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255)}
    for name in colours:
        Image.new("RGB", (90, 30), name).save(folder / f"a very long name of a picture that is {name}.png")
    sheet = tmp_path / "out" / "sheet.png"
    status, printed, _ = search(folder, "dog", "cat", "--sheet", sheet, "--top", 2)
    assert status == 0
    paths = [line.split("\t")[1] for line in printed.decode().splitlines()]
    assert [path.name for path in sheet.parent.iterdir()] == ["sheet.png"]
    with Image.open(sheet) as image:
        pixels = np.array(image.convert("RGB"))
    # Two rows of two, read from left to right.
    places = {}
    for name, colour in colours.items():
        close = (np.abs(pixels.astype(int) - colour).sum(-1) < 8).astype(np.uint8)
        for top in range(2):
            for left in range(2):
                half = close[top * len(close) // 2 :][: len(close) // 2, left * close.shape[1] // 2 :]
                share = half[:, : close.shape[1] // 2].mean()
                if share > 0.05:
                    places[top, left] = name
    assert [f"{places[top, left]}.png" in path for (top, left), path in zip(sorted(places), paths, strict=True)] == [
        True
    ] * 4


def test_a_contact_sheet_is_bounded(search, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "MOST_DRAWN", 5)
    sheet = tmp_path / "sheet.png"
    status, printed, messages = search(folder, "dog", "cat", "--sheet", sheet, "--top", 4)
    assert (status, len(printed.splitlines())) == (0, 8)
    assert "--sheet draws the best 2 of the 4 pictures found for each query." in messages
    with Image.open(sheet) as drawn:
        assert drawn.width < 3 * 200
    status, printed, messages = search(folder, *"abcdef", "--sheet", sheet)
    assert (status, printed) == (1, b"")
    assert messages[-1] == "--sheet draws at most 5 queries, and there are 6; leave it out."


def test_a_line_break_in_a_name_is_drawn_on_its_line(tmp_path):
    """The name is the same picture as one in which the two characters are written."""
    pixels = []
    for name in ("a\nb.png", r"a\nb.png"):
        picture(0).save(tmp_path / name)
        pixels.append(np.array(draw_sheet(["dog"], [[Match(0.5, str(tmp_path / name))]])))
    assert np.array_equal(*pixels)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{folder}"], "There is no query; give a text, or a picture with --image"),
        (["{folder}", " "], "A query is empty"),
        (["{folder}", "dog", "--top", "0"], r"--top is 0; it must be at least 1"),
        (["{folder}/none", "dog"], r"FOLDER is .*none'\. There is no"),
        (["{folder}/a.png", "dog"], "which isn't a folder"),
        (["{folder}/empty", "dog"], r"has no pictures; their names must end in one of \.avif"),
        (["{folder}", "--image", "{folder}/none.png"], "There is no file .*none.png"),
        (["{folder}", "--image", "{folder}/notes.txt"], "notes.txt"),
        (["{folder}", "dog", "--sheet", "out.jpg"], r"--sheet is 'out\.jpg'; its name must end in \.png"),
        (["{folder}", "dog", "--sheet", "{folder}/a.png/out.png"], "can't be written"),
        (["{folder}", "dog", "--template", "a dog"], "templates has 'a dog'"),
        (["{folder}", "--image", "{folder}/a.png", "--template", "a {}"], "--template is for texts"),
        (["{folder}", "dog", "--batch-size", "0"], "batch_size is 0"),
        (["{folder}", "dog", "--revision", "main"], "The revision 'main' can't be used"),
    ],
)
def test_what_cant_work_is_one_line(arguments, words, search, folder):
    (folder / "empty").mkdir()
    status, printed, messages = search(*(word.replace("{folder}", str(folder)) for word in arguments))
    assert (status, printed) == (1, b"")
    assert re.search(words, messages[-1]), messages
    assert "\n" not in messages[-1]


def test_a_sheet_in_the_folder_is_warned_of(search, folder):
    status, _, messages = search(folder, "dog", "--sheet", folder / "sub" / "found.png", "--top", 1)
    assert status == 0
    assert "The contact sheet lies in the folder, so it's one of the pictures the next time." in messages


def test_no_argument_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["folder", "dog"])
    assert stopped.value.code == 2
    assert "--model" in capsys.readouterr().err
