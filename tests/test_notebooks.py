"""Every notebook runs, offline, and is stored with its outputs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# In a process of its own, for what Jupyter warns of.
EXECUTE = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": sys.argv[2]}}).execute()
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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path):
    """In a clone's folder of its own, where what it writes stays."""
    for name in ("embedded", "conversion", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "notebooks").mkdir()
    executed = tmp_path / "executed.ipynb"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE, path, tmp_path / "notebooks", executed],
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cells = code_cells(executed)
    assert pictures(cells) == pictures(code_cells(path))
    assert len(printed(cells).splitlines()) == len(printed(code_cells(path)).splitlines())
