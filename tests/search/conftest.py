"""A tiny model that takes pictures and texts, and pictures on disk."""

from pathlib import Path

import pytest
from search_models import make_model
from training_samples import picture, tiny_processor
from transformers import logging

from diffclip_hf import DiffCLIPTokenizer, ImageIndex


@pytest.fixture(scope="package", autouse=True)
def _no_bars():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="package")
def model():
    return make_model()


@pytest.fixture(scope="package")
def processor():
    return tiny_processor(DiffCLIPTokenizer)


@pytest.fixture(scope="package")
def saved_model(model, processor, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def index(model, processor) -> ImageIndex:
    return ImageIndex(model, processor, num_workers=1)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five pictures, one in a sub-folder, among what isn't one."""
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for seed, name in enumerate(("a.png", "b.PNG", "c.jpg", "d.webp", "sub/e.png")):
        picture(seed).save(folder / name)
    (folder / "notes.txt").write_text("not a picture")
    (folder / ".hidden.png").write_text("nor this")
    return folder
