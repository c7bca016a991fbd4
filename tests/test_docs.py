"""Every snippet of the README and of the site runs, and what they say of commands and figures is so."""

import functools
import importlib.util
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from hub_server import WRITER, HubServer
from parity_models import FIXTURES
from released_checkpoint import IMPORTS, imports_of, save_released
from tokenizer_helper import BYTES, tiny_clip_tokenizer
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from diffclip_hf.conversion.original_checkpoint import load_state_dict


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# (page, language, code), in the order of a reader.
BLOCKS = [
    (path.relative_to(ROOT).as_posix(), language, code)
    for path in PAGES
    for language, code in re.findall(r"```(python|bash)\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
]
# Tests of their own, below and in test_transformers_js.py: what needs many steps, what a command has written before,
# or what may not be installed.
OWN = ("load_digits", "onnxruntime", "diffclip-vitb16", "fastapi", "build/embeddings", "transformers.exporters")
LIBRARIES = "docs/guides/other_libraries.md"
# Run from its beginning to its end, for each step needs what another has written.
FORGET = "docs/guides/forget.md"
PYTHON: list[tuple[str, str]] = []
for page, language, code in BLOCKS:
    if language == "python" and page != FORGET:
        # A block that imports nothing goes on from the one before it.
        PYTHON.append((page, code if "import " in code else PYTHON[-1][1] + code))
SOURCE = "hammh0a/DiffCLIP_ViTB16_CC12M"
CONVERT = "docs/guides/convert.md"
# Commands that run here: on what the repository has, in little time.
RUNS_HERE = tuple(
    f"-m diffclip_hf.{words}"
    for words in ("evaluate embedded/", "evaluate --list", "train --help", "train --model_name_or_path embedded/")
)


def commands(page: str | None = None) -> list[tuple[str, list[str]]]:
    """Return the pages' commands of Python, as (page, words), comments left out and lines joined."""
    found = []
    for where, language, code in BLOCKS:
        if language == "bash" and page in (None, where):
            lines = code.replace("\\\n", " ").splitlines()
            found += [(where, words) for line in lines if (words := shlex.split(line, comments=True))]
    return [(where, words[1:]) for where, words in found if words[0] == "python"]


def one_block(page: str, word: str) -> str:
    (code,) = (code for where, code in PYTHON if where == page and word in code)
    return code


@pytest.fixture
def python(warm_python, clone):
    """Runs Python offline in the clone and returns what it printed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(clone / "modules")}
    return functools.partial(warm_python.run, folder=clone, environment=environment)


@pytest.fixture
def clone(tmp_path) -> Path:
    """A folder with what a clone has, and the checkpoint that the pages speak of (a tiny one)."""
    for name in ("embedded", "conversion"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copyfile(FIXTURES / "diffclip-tiny.pt", tmp_path / "checkpoint_best.pt")
    return tmp_path


def test_the_pages_are_short_enough_to_be_read():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_speed_table_is_the_measured_one():
    measured = (ROOT / "benchmarks" / "speed.md").read_text(encoding="utf-8").split("\n\n")[0]
    assert measured in (ROOT / "docs" / "guides" / "speed.md").read_text(encoding="utf-8")


def test_the_table_of_what_is_forgotten_is_the_measured_one():
    measured = (ROOT / "docs" / "forgetting" / "forgetting.md").read_text(encoding="utf-8")
    assert measured in (ROOT / FORGET).read_text(encoding="utf-8")


def test_every_page_of_the_reference_has_an_example():
    with_example = {page for page, _ in PYTHON}
    for path in (ROOT / "docs" / "api").glob("*.md"):
        assert path.relative_to(ROOT).as_posix() in with_example


@pytest.mark.parametrize(
    ("page", "code"),
    [
        pytest.param(page, code, id=f"{page}-{number}")
        for number, (page, code) in enumerate(PYTHON)
        if page != LIBRARIES and not any(word in code for word in OWN)
    ],
)
def test_python_snippet(page, code, python):
    printed = python("-c", code)
    assert ("print(" in code) == bool(printed)


def test_what_the_readme_says_is_printed(python):
    code = one_block("README.md", "pipeline(")
    printed = python("-c", code).splitlines()
    assert printed == [line[2:] for line in code.splitlines() if line.startswith("# ")]


def test_what_the_readme_says_is_found(python):
    code = one_block("README.md", "ImageIndex(")
    assert python("-c", code).splitlines()[-1] == re.findall(r"# (.*)", code)[-1]


def best_paths(printed: str) -> dict[tuple[str, ...], str]:
    """The first path of each query."""
    found: dict[tuple[str, ...], str] = {}
    for line in printed.splitlines():
        _, path, *query = line.split("\t")
        found.setdefault(tuple(query), path)
    return found


def test_the_searches_of_the_guide(python, clone):
    """The best of each query; its score and the others may change with the embedded model."""
    text = (ROOT / "docs" / "guides" / "search.md").read_text(encoding="utf-8")
    searches = re.findall(r"```bash\n(.*?)```\n\n```text\n(.*?)```", text, re.DOTALL)
    assert len(searches) == 2
    for command, said in searches:
        words = shlex.split(command.replace("\\\n", " "))
        printed = python(*words[1:], "--cache-dir", "my-cache")
        assert best_paths(printed) == best_paths(said)
    assert (clone / "found.png").is_file()


@pytest.mark.parametrize(
    ("epochs", "accuracy"),
    [
        # It gets 0.87, far more than the 1 in 10 of chance.
        (1, 0.6),
        pytest.param(4, 0.9, marks=pytest.mark.slow),
    ],
)
def test_digits_are_learned(epochs, accuracy, python):
    digits = one_block("docs/guides/classify.md", "load_digits")
    assert len(digits.strip().splitlines()) < 25
    assert digits.count("num_train_epochs=4") == 1
    code = digits.replace("num_train_epochs=4", f"num_train_epochs={epochs}")
    printed = python("-c", code)
    assert float(printed.strip().splitlines()[-1]) >= accuracy


def test_commands_on_what_the_repository_has(python):
    here = [words for page, words in commands() if page != FORGET and shlex.join(words).startswith(RUNS_HERE)]
    assert len(here) >= 5
    for words in {tuple(words) for words in here}:
        assert python(*words)


def test_the_guide_to_forgetting_less(python, clone):
    for page, language, code in BLOCKS:
        if page == FORGET and "embedded/forgetting.py" not in code:
            words = ["python", "-c", code] if language == "python" else shlex.split(code.replace("\\\n", " "))
            python(*words[1:])
    for name in ("gentle", "taught", "halfway"):
        assert (clone / "build" / name / "model.safetensors").is_file()
    assert {path.name for path in (clone / "build" / "curve").iterdir()} == {"curve.json", "curve.png"}


def test_a_checkpoint_on_disk_is_converted(clone, python):
    (words,) = (words for _, words in commands(CONVERT) if "--checkpoint" in words)
    python(*words)
    assert (clone / "diffclip-vitb16" / "model.safetensors").is_file()
    python("-c", one_block(CONVERT, '"diffclip-vitb16"'))


def test_a_set_is_embedded_and_read(python):
    page = "docs/guides/embed.md"
    (words,) = (words for _, words in commands(page) if "diffclip_hf.embed" in words)
    python(*words)
    code = one_block(page, "np.load")
    assert python("-c", code).splitlines() == re.findall(r"# (.*)", code)


@pytest.mark.parametrize(
    ("module", "word"),
    [
        ("sentence_transformers", "SentenceTransformerTrainer"),
        ("mteb", "mteb"),
        ("torchmetrics", "torchmetrics"),
        ("datasets", "num_proc"),
        ("accelerate", "dispatch_model"),
        ("transformers.exporters", "transformers.exporters"),
    ],
)
# Transformers 5.18 imports what torch warns of.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_what_other_libraries_print(module, word, python):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} isn't installed")
    if module == "transformers.exporters" and not hasattr(importlib.import_module(module), "ExportedModel"):
        pytest.skip("this Transformers can't load what its exporters write")
    (code,) = (code for page, code in PYTHON if page in (LIBRARIES, "docs/guides/deploy.md") and word in code)
    assert python("-c", code).splitlines()[-1] == re.findall(r"^# (.*)", code, re.MULTILINE)[-1]


SERVING = """
import json, socket, threading, time, urllib.error, urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import uvicorn

def post(path, data, kind):
    request = urllib.request.Request(f"{url}/{path}", data, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)["detail"]

listening = socket.create_server(("127.0.0.1", 0))
url = f"http://127.0.0.1:{listening.getsockname()[1]}"
server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
thread = threading.Thread(target=server.run, args=([listening],))
thread.start()
while not server.started:
    time.sleep(0.05)

# The first batch is held up until the other clients wait.
sizes, encode = [], images.encode
def wait_and_encode(rows):
    while not sizes and len(rows) + images.waiting.qsize() < 16:
        time.sleep(0.01)
    sizes.append(len(rows))
    return encode(rows)
images.encode = wait_and_encode
names = ["pizza", "rocket", "snowman", "dog-face"]
pictures = [Path(f"embedded/pictures/{name}.png").read_bytes() for name in names]
labels = post("texts", json.dumps(["pizza", "rocket", "snowman", "dog face"]).encode(), "application/json")
with ThreadPoolExecutor(16) as threads:
    embedded = list(threads.map(lambda index: post("image", pictures[index % 4], "image/png"), range(64)))
refused = [post("image", b"no picture", "image/png"), post("texts", b"[]", "application/json")]
images.encode = lambda rows: encode([row[:, :5, :5] for row in rows])
refused.append(post("image", pictures[0], "image/png"))
images.encode = encode
embedded.append(post("image", pictures[0], "image/png"))
server.should_exit = True
thread.join()
print("SERVED", json.dumps([labels, embedded, refused, sizes]))
"""


def test_sixteen_clients_of_the_server_get_their_own_embeddings(python):
    """From shared batches; what one of them sends wrong, or the model refuses, doesn't stop the rest."""
    pytest.importorskip("fastapi", reason="FastAPI comes with Gradio, which isn't installed")
    printed = python("-c", one_block("docs/guides/deploy.md", "FastAPI()") + SERVING)
    (status, texts), images, refused, sizes = json.loads(printed.split("SERVED ")[1])
    assert status == 200
    assert [status for status, _ in images] == [200] * 65
    assert sum(sizes) == 64
    assert 8 <= max(sizes[:2]) <= 16
    found = torch.tensor([embeds for _, embeds in images])
    assert torch.allclose(found.norm(dim=1), torch.ones(65))
    assert (found @ torch.tensor(texts).T).argmax(1).tolist() == [*[0, 1, 2, 3] * 16, 0]
    assert [status for status, _ in refused] == [422] * 3
    assert "isn't a picture" in refused[0][1]
    assert "pixel_values is 5x5 pixels" in refused[2][1]


def test_from_the_hub_and_back(clone, warm_python, tmp_path):
    """Against a Hub on loopback that has a file like the released one under its name, but for a tiny model."""
    generator = torch.Generator().manual_seed(0)
    weights = load_state_dict(clone / "checkpoint_best.pt")
    weights["token_embedding.weight"] = torch.randn(49408, 48, generator=generator)
    weights["positional_embedding"] = torch.randn(77, 48, generator=generator)
    (tmp_path / "source").mkdir()
    assert imports_of(save_released(tmp_path / "source" / "checkpoint_best.pt", weights, "DIFFCLIP_VITB16")) == IMPORTS
    with HubServer(tmp_path / "server") as hub:
        hub.add(SOURCE, tmp_path / "source")
        environment = hub.environment(tmp_path / "home", WRITER)
        steps = [words for _, words in commands("README.md") if words[0].startswith("conversion/")]
        steps += [words for _, words in commands(CONVERT) if words[0] == "conversion/convert_to_original.py"]
        assert [words[0].split("/")[1] for words in steps] == [
            "convert_original_checkpoint.py",
            "push_to_hub.py",
            "convert_to_original.py",
        ]
        for words in steps:
            # The tests' token may write to this owner's repositories.
            arguments = ["org/name" if word == "ORG/NAME" else word for word in words]
            warm_python.run(*arguments, folder=clone, environment=environment)
        assert {"README.md", "model.safetensors", "tokenizer.json", "modeling_diffclip.py"} <= set(
            hub.head("org/name")
        )
    back = torch.load(clone / "back.pt", weights_only=True)["state_dict"]
    assert back.keys() == {f"module.{key}" for key in weights}
    assert all(torch.equal(back[f"module.{key}"], value) for key, value in weights.items())


def test_a_clip_of_the_hub_and_back(clone, warm_python, tmp_path):
    """By the guide's two commands, against a Hub on loopback that has a tiny CLIP under OpenAI's name."""
    steps = [words for _, words in commands(CONVERT) if words[0] == "conversion/convert_clip_checkpoint.py"]
    (source,) = (words[words.index("--model") + 1] for words in steps if "--to-clip" not in words)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config={**tower, **BYTES}, vision_config={**tower, "patch_size": 112})
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    CLIPProcessor(CLIPImageProcessor(), tiny_clip_tokenizer()).save_pretrained(tmp_path / "clip")
    with HubServer(tmp_path / "server") as hub:
        commit = hub.add(source, tmp_path / "clip")
        for words in steps:
            warm_python.run(*words, folder=clone, environment=hub.environment(tmp_path / "home"))
        options = "--task retrieval --dataset embedded/pictures --split train --no-cache --output measured.json"
        warm_python.run(
            *("-m", "diffclip_hf.evaluate", source, *options.split()),
            folder=clone,
            environment=hub.environment(tmp_path / "home"),
        )
    assert json.loads((clone / "measured.json").read_text())["model"]["commit"] == commit
    report = json.loads((clone / "clip-vitb16" / "conversion_report.json").read_text())
    assert report["source"] == {"model": source, "repo_id": source, "commit": commit}
    for name in ("model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (clone / "back" / name).read_bytes() == (tmp_path / "clip" / name).read_bytes()


def test_the_commands_are_the_makefiles():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in ("demo", "docs", "test"):
        assert f"`make {target}`" in readme
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_links_lead_somewhere():
    """Of the README; the site's are checked where it is built."""
    links = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link
