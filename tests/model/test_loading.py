"""Both ways to load, each in a fresh process: with the package, and with the code that travels with the weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_client import WITHOUT_PACKAGE, picture
from tiny import tiny_config
from tokenizer_helper import BYTES
from training_samples import tiny_processor

from diffclip_hf import (
    DiffCLIPForImageClassification,
    DiffCLIPModel,
    DiffCLIPTokenizer,
    DiffCLIPVisionModel,
    add_remote_code,
)


@pytest.fixture
def run(warm_python):
    """Runs code in a process of its own, offline and with an empty module cache, and returns its log."""

    def run(code: str, folder: Path, modules: Path) -> str:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(modules)}
        done = warm_python(["-c", code], folder, environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Three models' folders, with processors and without code, and the first one's logits in `expected.pt`."""
    root = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    processor = tiny_processor(DiffCLIPTokenizer)
    config = tiny_config(text=BYTES, num_labels=3)
    model = DiffCLIPModel(config).eval()
    model.save_pretrained(root / "clip")
    processor.save_pretrained(root / "clip")
    DiffCLIPForImageClassification(config).save_pretrained(root / "classifier")
    processor.image_processor.save_pretrained(root / "classifier")
    DiffCLIPVisionModel(config.vision_config).save_pretrained(root / "vision")
    processor.image_processor.save_pretrained(root / "vision")
    image = picture()
    image.save(root / "picture.png")
    inputs = processor(text=["a cat", "a dog"], images=image, return_tensors="pt")
    with torch.no_grad():
        torch.save(model(**inputs).logits_per_image, root / "expected.pt")
    return root


CHECK_LOGITS = """
import torch
from PIL import Image
def check(model, processor):
    inputs = processor(text=["a cat", "a dog"], images=Image.open("picture.png"), return_tensors="pt")
    with torch.no_grad():
        found = model(**inputs).logits_per_image
    # The image processors of the two backends may differ by one of 255 levels.
    torch.testing.assert_close(found, torch.load("expected.pt"), rtol=0, atol=2e-2)
"""


def test_with_the_package(folders, run, tmp_path):
    log = run(
        CHECK_LOGITS
        + """
import diffclip_hf
from transformers import (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification, AutoProcessor, AutoTokenizer, pipeline)
assert type(AutoConfig.from_pretrained("clip")) is diffclip_hf.DiffCLIPConfig
assert type(AutoTokenizer.from_pretrained("clip")) is diffclip_hf.DiffCLIPTokenizer
processor = AutoProcessor.from_pretrained("clip")
assert type(processor) is diffclip_hf.DiffCLIPProcessor
assert isinstance(AutoImageProcessor.from_pretrained("clip", backend="pil"), diffclip_hf.DiffCLIPImageProcessorPil)
for auto in (AutoModel, AutoModelForZeroShotImageClassification):
    model = auto.from_pretrained("clip")
    assert type(model) is diffclip_hf.DiffCLIPModel
    check(model, processor)
assert type(AutoModelForImageClassification.from_pretrained("classifier")).__name__ == "DiffCLIPForImageClassification"
assert type(AutoModel.from_pretrained("vision")) is diffclip_hf.DiffCLIPVisionModel
out = pipeline("zero-shot-image-classification", model="clip")("picture.png", candidate_labels=["a", "b " * 60])
assert abs(sum(entry["score"] for entry in out) - 1) < 1e-5
assert len(pipeline("image-classification", model="classifier")("picture.png")) == 3
assert len(pipeline("image-feature-extraction", model="vision")("picture.png")[0]) == 17
assert len(pipeline("image-feature-extraction", model="clip")("picture.png")[0]) == 24
""",
        folders,
        tmp_path,
    )
    assert "not supported" not in log
    assert "trust_remote_code" not in log
    assert not list(tmp_path.rglob("*.py"))


def test_with_the_package_a_folders_own_code_is_left_alone(folders, run, tmp_path):
    run(
        """
import shutil
import diffclip_hf
from transformers import AutoModel, AutoProcessor
shutil.copytree("clip", "with-code")
diffclip_hf.add_remote_code("with-code")
assert type(AutoModel.from_pretrained("with-code")) is diffclip_hf.DiffCLIPModel
assert type(AutoProcessor.from_pretrained("with-code")) is diffclip_hf.DiffCLIPProcessor
""",
        folders,
        tmp_path,
    )
    assert not list(tmp_path.rglob("*.py"))


def test_without_the_package(folders, run, tmp_path):
    import shutil

    for name in ("clip", "classifier", "vision"):
        shutil.copytree(folders / name, tmp_path / name)
        add_remote_code(tmp_path / name)
    for name in ("picture.png", "expected.pt"):
        shutil.copyfile(folders / name, tmp_path / name)
    log = run(
        WITHOUT_PACKAGE
        + CHECK_LOGITS
        + """
import shutil
from transformers import (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification, AutoProcessor, AutoTokenizer, pipeline)
trust = {"trust_remote_code": True}
source = "clip"
for target in ("again", "once-more"):
    model, processor = AutoModel.from_pretrained(source, **trust), AutoProcessor.from_pretrained(source, **trust)
    check(model, processor)
    model.save_pretrained(target)
    processor.save_pretrained(target)
    shutil.rmtree(source)
    source = target
assert AutoConfig.from_pretrained(source, **trust).model_type == "diffclip"
assert type(AutoTokenizer.from_pretrained(source, **trust)).__name__ == "DiffCLIPTokenizer"
assert type(AutoImageProcessor.from_pretrained(source, backend="pil", **trust)).__name__ == "DiffCLIPImageProcessorPil"
check(AutoModelForZeroShotImageClassification.from_pretrained(source, **trust), processor)
out = pipeline("zero-shot-image-classification", model=source, **trust)("picture.png", candidate_labels=["a", "b"])
assert abs(sum(entry["score"] for entry in out) - 1) < 1e-5
assert len(pipeline("image-classification", model="classifier", **trust)("picture.png")) == 3
assert len(pipeline("image-feature-extraction", model="vision", **trust)("picture.png")[0]) == 17
assert "diffclip_hf" not in [name for name, module in sys.modules.items() if module is not None]
""",
        tmp_path,
        tmp_path / "modules",
    )
    assert "newly initialized" not in log


def test_transformers_own_way_to_add_the_code(folders, run, tmp_path):
    """`register_for_auto_class` before `save_pretrained`, as Transformers' documentation of custom models has it."""
    run(
        """
from diffclip_hf import DiffCLIPConfig, DiffCLIPModel
DiffCLIPConfig.register_for_auto_class()
DiffCLIPModel.register_for_auto_class("AutoModel")
DiffCLIPModel.from_pretrained("clip").save_pretrained("own")
""",
        folders,
        tmp_path / "unused",
    )
    run(
        WITHOUT_PACKAGE
        + """
from transformers import AutoModel
model = AutoModel.from_pretrained("own", trust_remote_code=True)
assert type(model).__name__ == "DiffCLIPModel"
""",
        folders,
        tmp_path / "modules",
    )


def imported(code: str, folder: Path) -> set[str]:
    """Return the names of the modules that code imports in a new Python."""
    command = [sys.executable, "-c", code + "\nimport sys; print(*sys.modules)"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_import_is_light(tmp_path):
    """The package imports none of the extras, and no model that registering with the Auto classes doesn't import."""
    ours = imported("import diffclip_hf", tmp_path)
    needed = imported(
        "from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer, CLIPTokenizer\n"
        "from transformers import PreTrainedModel, ProcessorMixin",
        tmp_path,
    )
    extras = {"datasets", "matplotlib", "pandas", "scipy", "sklearn", "emoji", "clip", "gradio"}
    assert not extras & {name.split(".")[0] for name in ours - needed}
    assert not {name for name in ours - needed if name.startswith("transformers.models.")}
    assert "transformers.models.clip.modeling_clip" not in ours
