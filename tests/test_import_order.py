"""Imports point one way, and the files that travel with a checkpoint are flat."""

import ast
from pathlib import Path

import pytest

from diffclip_hf.remote_code import CODE_FILES


PACKAGE = Path(__file__).parent.parent / "src" / "diffclip_hf"
# File → the siblings that it may import.
ARROWS = {
    "configuration_diffclip": set(),
    "kernels_diffclip": set(),
    "blocked_attention_diffclip": set(),
    "attention_diffclip": {"blocked_attention_diffclip"},
    "hub_cache_diffclip": set(),
    "inputs_diffclip": set(),
    "offloading_diffclip": set(),
    "label_names": set(),
    "loss_diffclip": set(),
    "modeling_diffclip": {
        "attention_diffclip",
        "configuration_diffclip",
        "hub_cache_diffclip",
        "inputs_diffclip",
        "kernels_diffclip",
        "loss_diffclip",
        "offloading_diffclip",
    },
    # The two image processors name each other for Transformers' copying of files; at run time the arrow is one way.
    "image_processing_pil_diffclip": {"image_processing_diffclip", "image_reading"},
    "image_processing_diffclip": {"image_processing_pil_diffclip", "image_reading"},
    "image_reading": set(),
    "processing_diffclip": {"image_processing_diffclip", "image_processing_pil_diffclip", "image_reading"},
    "remote_code": {"whole_files"},
    "export_onnx": {
        "commands",
        "configuration_diffclip",
        "loading",
        "machine",
        "modeling_diffclip",
        "remote_code",
        "whole_files",
    },
    "clip_benchmark_loader": {"evaluation_model", "image_processing_pil_diffclip", "loading"},
    "evaluate": {
        "commands",
        "evaluation_cache",
        "evaluation_model",
        "evaluation_presets",
        "evaluation_report",
        "evaluation_tasks",
        "label_names",
        "machine",
        "whole_files",
    },
    "evaluation_cache": {"evaluation_keys", "whole_files"},
    "evaluation_data": {
        "dataset_files",
        "commands",
        "evaluation_keys",
        "evaluation_presets",
        "label_names",
        "training_counts",
        "training_data",
        "training_shards",
    },
    "dataset_files": {"training_shards"},
    "evaluation_keys": {"image_reading"},
    "evaluation_metrics": set(),
    "evaluation_model": {
        "evaluation_cache",
        "evaluation_keys",
        "image_reading",
        "loading",
        "offloading_diffclip",
        "processing_diffclip",
        "zero_shot",
    },
    "evaluation_presets": {
        "commands",
        "dataset_files",
        "label_names",
        "loading",
        "training_shards",
        "zero_shot",
        "zero_shot_templates",
    },
    "evaluation_report": {"evaluation_presets"},
    "evaluation_tasks": {
        "commands",
        "evaluation_data",
        "evaluation_metrics",
        "evaluation_model",
        "evaluation_presets",
        "retrieval_metrics",
        "zero_shot",
    },
    "demo": {"commands", "demo_guard", "demo_scores", "demo_space", "loading", "whole_files", "zero_shot"},
    "demo_guard": set(),
    "demo_scores": {"image_reading", "loading", "visualization", "zero_shot"},
    "demo_space": {"image_reading", "remote_code", "whole_files"},
    "machine": set(),
    "whole_files": set(),
    "train": {
        "checkpoints",
        "commands",
        "configuration_diffclip",
        "image_processing_pil_diffclip",
        "label_names",
        "loading",
        "modeling_diffclip",
        "processing_diffclip",
        "trainer",
        "training_data",
        "training_options",
        "whole_files",
        "zero_shot",
    },
    "training_options": {
        "commands",
        "configuration_diffclip",
        "loading",
        "options",
        "trainer",
        "training_shards",
        "zero_shot",
        "zero_shot_templates",
    },
    "commands": set(),
    "loading": {"commands"},
    "options": {"commands", "loading"},
    "training_counts": {"processing_diffclip"},
    "training_data": {
        "commands",
        "dataset_files",
        "loading",
        "image_reading",
        "label_names",
        "training_counts",
        "training_shards",
    },
    "training_shards": {"training_counts"},
    "retrieval_metrics": set(),
    "checkpoints": set(),
    "gradient_cache": {"loss_diffclip"},
    "shared_batches": {"training_counts"},
    "trainer": {
        "checkpoints",
        "gradient_cache",
        "loss_diffclip",
        "remote_code",
        "retrieval_metrics",
        "shared_batches",
        "training_counts",
        "zero_shot",
    },
    "version": set(),
    "visualization": {
        "attention_diffclip",
        "commands",
        "inputs_diffclip",
        "modeling_diffclip",
        "offloading_diffclip",
    },
    "zero_shot": {"image_reading", "offloading_diffclip", "processing_diffclip"},
    "zero_shot_templates": set(),
    "__init__": {
        "attention_diffclip",
        "configuration_diffclip",
        "image_processing_diffclip",
        "image_processing_pil_diffclip",
        "modeling_diffclip",
        "processing_diffclip",
        "remote_code",
        "version",
        "zero_shot",
        "zero_shot_templates",
    },
}
# What may be imported without a guard in code that travels: Transformers refuses to load it where one is missing.
TRAVELLING_IMPORTS = {"torch", "transformers", "huggingface_hub", "numpy", "PIL"}


def imports(path: Path) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]


def test_every_file_is_in_the_table():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(ARROWS)


def test_the_demo_works_outside_the_package():
    """As a Space's `app.py` it has no siblings, so it names the package, by arrows of the same table."""
    found = [node for node in imports(PACKAGE / "demo.py") if isinstance(node, ast.ImportFrom)]
    assert not any(node.level for node in found)
    named = [node.module.removeprefix("diffclip_hf.") for node in found if node.module.startswith("diffclip_hf.")]
    assert set(named) == ARROWS["demo"]


@pytest.mark.parametrize("name", ARROWS)
def test_siblings(name):
    relative = [node for node in imports(PACKAGE / f"{name}.py") if isinstance(node, ast.ImportFrom) and node.level]
    assert all(node.level == 1 and node.module for node in relative), "only `from .name import thing`"
    assert {node.module for node in relative} <= ARROWS[name]


def test_the_code_that_travels_names_every_file_that_it_needs():
    travelling = {Path(name).stem for name in CODE_FILES}
    for name in travelling:
        assert ARROWS[name] <= travelling


@pytest.mark.parametrize("name", [Path(name).stem for name in CODE_FILES])
def test_the_code_that_travels_imports_what_everyone_has(name):
    import sys

    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    top_level = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in top_level:
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
        if isinstance(node, ast.ImportFrom) and node.level:
            continue
        roots = {module.split(".")[0] for module in modules}
        assert roots <= TRAVELLING_IMPORTS | set(sys.stdlib_module_names), roots
