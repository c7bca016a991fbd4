"""Every notebook runs, offline, and is stored with its outputs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Instead of the notebook's epochs, where it isn't to take long.
EPOCHS = ("num_train_epochs=4", "num_train_epochs=1")
# In a process of its own, for what Jupyter warns of; without limits of time.
EXECUTE = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
options = {"timeout": None, "startup_timeout": 3600, "kernel_name": "python3"}
NotebookClient(notebook, resources={"metadata": {"path": sys.argv[2]}}, **options).execute()
nbformat.write(notebook, sys.argv[3])
"""


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def printed(cells: list[dict]) -> str:
    """Return what a notebook's cells wrote to stdout."""
    outputs = (output for cell in cells for output in cell["outputs"])
    return "".join("".join(output["text"]) for output in outputs if output.get("name") == "stdout")


def pictures(cells: list[dict]) -> int:
    return sum("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"])


def test_there_are_five():
    names = ["attention_pictures", "convert_and_push", "evaluate", "fine_tune", "quickstart"]
    assert [path.stem for path in NOTEBOOKS] == names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_as_run(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    text = path.read_text(encoding="utf-8")
    assert "site-packages" not in text, "a warning with this machine's paths"
    # One line switches to the released weights.
    assert "ViT-B/16" in "".join(cells[0]["source"])


def check(path: Path, folder: Path, replaced: tuple[str, str] | None = None) -> None:
    """Run a notebook in a clone's folder of its own, where what it writes stays."""
    for name in ("embedded", "conversion", "tests"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "notebooks").mkdir()
    source, executed = folder / "notebooks" / path.name, folder / "executed.ipynb"
    code = path.read_text(encoding="utf-8")
    if replaced:
        assert code.count(replaced[0]) == 1
        code = code.replace(*replaced)
    source.write_text(code, encoding="utf-8")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE, source, source.parent, executed],
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cells = code_cells(executed)
    assert pictures(cells) == pictures(code_cells(path))
    assert len(printed(cells).splitlines()) == len(printed(code_cells(path)).splitlines())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path):
    check(path, tmp_path, EPOCHS if path.stem == "fine_tune" else None)


@pytest.mark.slow
def test_fine_tuning_runs_whole(tmp_path):
    check(ROOT / "notebooks" / "fine_tune.ipynb", tmp_path)
