"""The code that travels with the weights, where there is Transformers and no package: by repository id, from the Hub.

The default tests block the package; the slow one makes a virtual environment that has never had it.
"""

import os
import shutil
import subprocess
import venv
from collections.abc import Callable
from pathlib import Path

import PIL
import pytest
import torch
import transformers
from hub_client import WITHOUT_PACKAGE, picture, save_tiny
from hub_server import HubServer

from diffclip_hf.conversion import push_to_hub
from diffclip_hf.conversion.model_card import Card


REPO = "org/fresh"
NO_PACKAGE = """
try:
    import diffclip_hf
except ImportError:
    pass
else:
    raise AssertionError("the package is there")
"""
LOGITS = """
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline
def check(source):
    model = AutoModel.from_pretrained(source, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
    inputs = processor(text=["a cat", "a dog"], images=Image.open("picture.png"), return_tensors="pt")
    with torch.no_grad():
        found = model(**inputs).logits_per_image
    # The image processors of the two backends may differ by one of 255 levels.
    torch.testing.assert_close(found, torch.load("expected.pt"), rtol=0, atol=2e-2)
    classify = pipeline("zero-shot-image-classification", model=source, trust_remote_code=True)
    scores = [entry["score"] for entry in classify("picture.png", candidate_labels=["a cat", "a dog"])]
    assert abs(sum(scores) - 1) < 1e-5
    return model, processor
"""
FROM_THE_HUB = f"""
model, processor = check({REPO!r})
model.save_pretrained("again")
processor.save_pretrained("again")
check("again")
"""
FROM_THE_FOLDER = """
model, processor = check("again")
model.save_pretrained("once-more")
processor.save_pretrained("once-more")
check("once-more")
"""
REFUSED = """
import sys
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline
for load in (AutoConfig.from_pretrained, AutoModel.from_pretrained, AutoProcessor.from_pretrained,
             lambda repo: pipeline("zero-shot-image-classification", repo)):
    try:
        load({repo!r})
    except ValueError as error:
        sys.stdout.write(str(error) + chr(0))
    else:
        raise AssertionError("loaded without trust")
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with what the upload command puts together: with code in REPO, and without in REPO-no-code."""
    folder = tmp_path_factory.mktemp("fresh")
    torch.save(torch.tensor(save_tiny(folder / "tiny")), folder / "expected.pt")
    files = push_to_hub.check_folder(folder / "tiny")
    with HubServer(folder / "hub") as server:
        for repo, with_code in ((REPO, True), (f"{REPO}-no-code", False)):
            made = folder / repo
            made.mkdir(parents=True)
            card = Card(repo, None, folder / "tiny", None, with_code, None, None, "unknown")
            push_to_hub.assemble(files, with_code, card, made)
            shutil.copyfile(folder / "tiny" / "model.safetensors", made / "model.safetensors")
            server.add(repo, made)
        yield server


@pytest.fixture
def work(hub, tmp_path) -> Path:
    """A working folder with the picture and what the model says of it."""
    picture().save(tmp_path / "picture.png")
    shutil.copyfile(hub.objects.parent.parent / "expected.pt", tmp_path / "expected.pt")
    return tmp_path


@pytest.fixture
def blocked(hub, work, warm_python):
    """Runs code in a process that finds no package, and returns what it printed."""

    def run(code: str, **environment: str) -> str:
        environment = hub.environment(work / "home") | environment
        return warm_python.run("-c", WITHOUT_PACKAGE + NO_PACKAGE + code, folder=work, environment=environment)

    return run


@pytest.fixture
def fresh(hub, work, tmp_path_factory):
    """Runs code in a virtual environment of transformers, torch and Pillow, without which no picture is read."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    versions = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
    wanted = [f"{name}=={version}" for name, version in (versions | {"pillow": PIL.__version__}).items()]

    def call(arguments: list[str], environment: dict[str, str]) -> str:
        environment = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [python, *arguments], cwd=work, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run(code: str, **environment: str) -> str:
        return call(["-c", NO_PACKAGE + code], hub.environment(work / "home") | environment)

    call(["-m", "pip", "install", "--quiet", *wanted], dict(os.environ))
    yield run
    shutil.rmtree(folder)


def check_all(run: Callable, hub: HubServer, work: Path) -> None:
    """Load from the Hub, run, save; then load and save again in a process without network and with no cache."""
    run(LOGITS + FROM_THE_HUB)
    for path in (work / "home", *(work / "again").rglob("__pycache__")):
        shutil.rmtree(path)
    asked = len(hub.requests)
    run(LOGITS + FROM_THE_FOLDER, HF_HUB_OFFLINE="1")
    assert len(hub.requests) == asked


def check_refusals(run: Callable, hub: HubServer) -> None:
    """Without trust and without the package, the error says the one way out and links to where both are."""
    messages = run(REFUSED.format(repo=REPO)).split("\0")[:-1]
    assert len(messages) == 4
    for message in messages:
        assert "trust_remote_code=True" in message
        assert f"https://hf.co/{REPO}" in message
    # That page is the model card. Transformers has no public place for words of ours in the error itself.
    card = hub.head(REPO)["README.md"].content.decode()
    top = card[: card.index("## Use")]
    assert "install the package `diffclip-hf`" in top
    assert "`trust_remote_code=True`" in top


def test_loads_runs_saves_and_loads_again(blocked, hub, work):
    check_all(blocked, hub, work)


def test_the_error_leads_to_both_ways_out(blocked, hub):
    check_refusals(blocked, hub)


def test_without_code_the_error_names_the_architecture(blocked, hub):
    code = f"""
from transformers import AutoModel
try:
    AutoModel.from_pretrained({REPO + "-no-code"!r}, trust_remote_code=True)
except ValueError as error:
    assert "model type `diffclip`" in str(error)
else:
    raise AssertionError("loaded without any code")
"""
    blocked(code)
    card = hub.head(f"{REPO}-no-code")["README.md"].content.decode()
    assert "install the package `diffclip-hf`" in card[: card.index("## Use")]


@pytest.mark.slow
def test_in_a_fresh_virtual_environment(fresh, hub, work):
    check_all(fresh, hub, work)
    check_refusals(fresh, hub)
