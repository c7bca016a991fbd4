"""Node with transformers.js, for the tests of what the ONNX export writes."""

import shutil
import subprocess
from pathlib import Path

import pytest


NODE = shutil.which("node")
PACKAGES = Path(__file__).parent.parent / "build" / "node" / "node_modules"


def run_node(code: str, folder: Path, *arguments: str) -> str:
    """Run code in a folder where it can import transformers.js, or skip, and return what it prints."""
    if NODE is None or not (PACKAGES / "@huggingface" / "transformers").is_dir():
        pytest.skip("Node or its package @huggingface/transformers isn't installed; `make node` installs the package")
    (folder / "code.mjs").write_text(code, encoding="utf-8")
    if not (folder / "node_modules").exists():
        (folder / "node_modules").symlink_to(PACKAGES)
    done = subprocess.run([NODE, "code.mjs", *arguments], cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
