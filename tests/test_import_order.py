"""Imports point one way between rooms and inside them, and the files that travel with a checkpoint are flat."""

import ast
import sys
from pathlib import Path

import pytest

from diffclip_hf.common.remote_code import CODE_FILES


PACKAGE = Path(__file__).parents[1] / "src" / "diffclip_hf"
# Room, or file of the root → the rooms and root files that it may import; `docs/architecture.md` draws them.
ARROWS = {
    "model": set(),
    "common": {"model"},
    "data": {"common", "model"},
    "version": set(),
    "zero_shot_templates": set(),
    "zero_shot": {"common", "model"},
    "visualization": {"common", "model"},
    "training": {"common", "data", "model", "zero_shot", "zero_shot_templates"},
    "evaluation": {"common", "data", "model", "zero_shot", "zero_shot_templates"},
    "demo": {"common", "model", "visualization", "zero_shot"},
    # Its files import the public face too, as a user does.
    "conversion": {"common", "model", "__init__"},
    "search": {"common", "evaluate", "evaluation", "model", "zero_shot"},
    "train": {"common", "training"},
    "evaluate": {"common", "data", "evaluation"},
    "embed": {"common", "data", "evaluate", "evaluation", "model"},
    "onnx_graphs": {"model"},
    "export_onnx": {"common", "model", "onnx_graphs"},
    "interpolate": {"common", "evaluate", "evaluation", "model"},
    "__init__": {"common", "model", "search", "version", "zero_shot", "zero_shot_templates"},
}
# What may be imported without a guard in code that travels: Transformers refuses to load it where one is missing.
TRAVELLING_IMPORTS = {"torch", "transformers", "huggingface_hub", "numpy", "PIL"}
# What an extra brings → the rooms that may import it at their top, where nothing works without it.
EXTRAS: dict[str, set[str]] = {"accelerate": {"training"}, "gradio": {"demo"}}
EXTRAS |= {name: set() for name in ("datasets", "fsspec", "matplotlib", "onnx", "onnxruntime", "peft", "sklearn")}
EXTRAS |= {name: set() for name in ("faiss", "hnswlib")}
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """Return a file's dotted name within the package, `model.loss_diffclip`; of a room's face the room's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def place_of(name: str) -> str:
    return name.split(".")[0]


def imports(path: Path) -> set[str]:
    """Return the package's files that one imports, by their dotted names."""
    found = set()
    rooms = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {"__init__" for alias in node.names if alias.name == "diffclip_hf"}
            continue
        if not isinstance(node, ast.ImportFrom):
            continue
        module = node.module or ""
        if node.level:
            assert node.level <= len(rooms) + 1, f"{path} imports from above the package"
            base = [*rooms[: len(rooms) + 1 - node.level], *filter(None, [module])]
        elif module.split(".")[0] == "diffclip_hf":
            base = module.split(".")[1:] or ["__init__"]
        else:
            continue
        for alias in node.names:
            inner = PACKAGE.joinpath(*base, f"{alias.name}.py")
            found.add(".".join([*base, alias.name] if inner.is_file() else base) or "__init__")
    return found


GRAPH = {name_of(path): imports(path) for path in FILES if path.stem != "__main__"}


def test_every_place_is_in_the_table():
    assert {place_of(name) for name in GRAPH} == set(ARROWS)


@pytest.mark.parametrize("place", ARROWS)
def test_arrows_between_rooms(place):
    found = {place_of(imported) for name, reached in GRAPH.items() if place_of(name) == place for imported in reached}
    assert found - {place} <= ARROWS[place]


def test_there_is_no_circle():
    """Neither between rooms nor between files, but for what type checking alone imports."""
    for graph in (ARROWS, GRAPH):
        left = {name: set(reached) & set(graph) - {name} for name, reached in graph.items()}
        if graph is GRAPH:
            for name in left:  # A room's face imports its files.
                left[name] = {one for one in left[name] if not (one == place_of(name) and name != one)}
        while free := {name for name, reached in left.items() if not reached & set(left)}:
            left = {name: reached for name, reached in left.items() if name not in free}
        assert not left, f"a circle among {sorted(left)}"


def test_what_travels_is_the_room_of_the_model():
    assert set(CODE_FILES) == {path.name for path in (PACKAGE / "model").glob("*.py")} - {"__init__.py"}


@pytest.mark.parametrize("name", CODE_FILES)
def test_the_code_that_travels_imports_what_everyone_has(name):
    tree = ast.parse((PACKAGE / "model" / name).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, "only `from .sibling import thing`"
            assert node.module is not None
            assert f"{node.module}.py" in CODE_FILES
    for node in tree.body:
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module]
        roots = {module.split(".")[0] for module in modules}
        assert roots <= TRAVELLING_IMPORTS | set(sys.stdlib_module_names), roots


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_what_an_extra_brings_is_imported_where_it_is_needed(path):
    """So that each room can be imported with the packages of its own extra."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module]
        for root in {module.split(".")[0] for module in modules} & set(EXTRAS):
            assert place_of(name_of(path)) in EXTRAS[root], f"{path} imports {root} at its top"


def test_the_demo_works_outside_the_package():
    """As a Space's `app.py` it has no siblings, so it names the package."""
    tree = ast.parse((PACKAGE / "demo" / "page.py").read_text(encoding="utf-8"))
    assert not any(node.level for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
