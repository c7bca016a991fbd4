"""Every snippet of the README runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from parity_models import FIXTURES


ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```(python|bash)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
CONVERSION = [code for language, code in BLOCKS if language == "bash" and "conversion/" in code]


@pytest.fixture
def clone(tmp_path) -> Path:
    """A folder with what a clone has, and the checkpoint that the README speaks of (a tiny one)."""
    for name in ("embedded", "conversion"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copyfile(FIXTURES / "diffclip-tiny.pt", tmp_path / "checkpoint_best.pt")
    return tmp_path


def run(command: list[str], clone: Path) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(clone / "modules")}
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_there_are_snippets():
    assert len(PYTHON) == 4
    assert len(CONVERSION) == 1


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_snippet(code, clone):
    printed = run([sys.executable, "-c", code], clone)
    assert ("print(" in code) == bool(printed)


def test_conversion_snippet(clone):
    command = CONVERSION[0].strip()
    assert command.startswith("python ")
    run([sys.executable, *command.split()[1:]], clone)
    assert (clone / "diffclip-vitb16" / "model.safetensors").is_file()


def test_the_commands_are_the_makefiles():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert any(f"make {target}" in code for _, code in BLOCKS)
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
