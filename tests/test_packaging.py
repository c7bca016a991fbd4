"""What is built from the repository: a wheel that holds all that the package reads, starts and offers."""

import ast
import importlib.metadata
import re
import subprocess
from pathlib import Path

import yaml
from setuptools import find_packages
from setuptools.config.pyprojecttoml import load_file

from diffclip_hf import __main__ as listing
from diffclip_hf import __version__


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "diffclip_hf"
PROJECT = load_file(ROOT / "pyproject.toml")
EXTRAS = PROJECT["project"]["optional-dependencies"]


def test_the_wheel_has_every_file_of_the_package():
    settings = PROJECT["tool"]["setuptools"]
    (where,) = settings["packages"]["find"]["where"]
    packed = {
        path for name in find_packages(ROOT / where) for path in (ROOT / where / name.replace(".", "/")).glob("*.py")
    }
    for name, patterns in settings["package-data"].items():
        for pattern in patterns:
            found = set((ROOT / where / name).glob(pattern))
            assert found, f"{pattern} names no file"
            packed |= found
    known = subprocess.run(["git", "ls-files", "-z", PACKAGE], cwd=ROOT, capture_output=True, text=True, check=True)
    there = {path for name in known.stdout.split("\0") if (path := ROOT / name).is_file()}
    assert there - packed == set()


def test_every_command_is_listed(capsys):
    """A command is a module that can be started, or a room with such a module of that name."""
    started = []
    for path in PACKAGE.rglob("*.py"):
        tests = [node.test for node in ast.parse(path.read_text()).body if isinstance(node, ast.If)]
        if any(ast.unparse(test) == "__name__ == '__main__'" for test in tests):
            started.append(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    # A room is started by its own file of that name, as the list is by the package; the page is also a Space's.
    started += [path.parent.name for path in PACKAGE.glob("*/__main__.py")]
    assert set(started) - {"__main__", "demo.page"} == set(listing.COMMANDS)
    assert listing.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in listing.COMMANDS:
        assert sum(line.split()[:1] == [name] for line in lines) == 1
    assert f"torch {importlib.metadata.version('torch')}" in [" ".join(line.split()) for line in lines]


def test_a_package_that_is_missing_is_said_to_be():
    assert listing.version_of("no-such-package") == "not installed"


def test_every_extra_that_is_named_is_offered():
    named = {"training"}
    for path in [*PACKAGE.rglob("*.py"), ROOT / "README.md", ROOT / "Makefile", *ROOT.glob("docs/**/*.md")]:
        text = path.read_text(encoding="utf-8")
        for found in re.findall(r"(?:diffclip-hf|'\.|\"\.)\[([\w,]+)\]", text):
            named |= set(found.split(","))
        named |= set(re.findall(r'require_extra\("(\w+)"', text))
    assert named - EXTRAS.keys() == set()
    assert not [extra for extra, packages in EXTRAS.items() if not packages]


def test_what_is_said_of_the_project_agrees():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert citation["license"] == PROJECT["project"]["license"]
    for name in PROJECT["project"]["license-files"]:
        assert "the diffclip-hf maintainers" in (ROOT / name).read_text(encoding="utf-8")
    card = (ROOT / "embedded" / "diffclip-emoji" / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---")[1])["license"] == "cc-by-sa-4.0"
