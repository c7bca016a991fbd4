"""The upload command against a Hub on loopback: the card, one commit, and what breaks on the way."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from hub_client import WITHOUT_PACKAGE, Client, picture, save_tiny
from hub_server import READER, WRITER, HubServer
from huggingface_hub import ModelCard
from parity_models import formula_state_dict, golden
from safetensors.torch import load_file, save_file
from tolerances import PARITY_WITH_ORIGINAL, relative_error

from diffclip_hf import DiffCLIPConfig
from diffclip_hf.common.remote_code import CODE_FILES
from diffclip_hf.conversion import convert_original_checkpoint, push_to_hub
from diffclip_hf.conversion.model_card import Card, CardError, render_card
from diffclip_hf.conversion.report import REPORT_FILE


SCRIPT = Path(__file__).parents[2] / "conversion" / "push_to_hub.py"
EVERY_FILE = {
    *("README.md", "config.json", "model.safetensors", "processor_config.json", "tokenizer.json"),
    *("tokenizer_config.json", ".gitattributes", *CODE_FILES),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    save_tiny(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    """A process in which the command runs, by `push`, and that has the package."""
    folder = tmp_path_factory.mktemp("client")
    prelude = """
import logging
from diffclip_hf.conversion import push_to_hub
class Kept(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())
lines = []
push_to_hub.logger.addHandler(Kept())
"""
    client = Client(hub, folder, prelude)
    picture().save(folder / "picture.png")
    yield client
    client.close()


@pytest.fixture
def push(hub, client):
    """Return a function that runs the command with a token, and returns its status and its log."""
    hub.failures.clear()
    hub.requests.clear()

    def run(*args, token: str | None = WRITER) -> tuple[int, str]:
        words = [*map(str, args), *(["--token", token] if token else [])]
        code = f"""
import __main__
from diffclip_hf.conversion import push_to_hub
__main__.lines.clear()
status = push_to_hub.main({words!r})
result = [status, "\\n".join(__main__.lines)]
"""
        status, log = client(code)
        return status, log

    return run


def report(folder: Path, **changes) -> dict:
    """Write the report that the conversion would, with its keys replaced by `changes`."""
    files = {path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in folder.iterdir()}
    errors = {"logits_per_image": 2e-7, "image_embed": 3e-7}
    layers = [{"lambda_init": 0.8, "lambda": 0.75 + 0.01 * layer} for layer in range(3)]
    content = {
        "source": {"file": "checkpoint_best.pt", "bytes": 10, "sha256": "0" * 64},
        "variant": "diffclip",
        "assumptions": ["λ_init is 0.8."],
        "gate": {
            "dtype": "float32",
            "limit": 1e-4,
            "largest_error": 3e-7,
            "errors": {"random": {"eager": errors, "sdpa": errors}},
            "error_is": "largest absolute difference / largest magnitude of the original's output",
        },
        "lambda": {"vision": layers, "text": layers},
        "parameters": {"total": 3000, "vision": 2000, "text": 900},
        "files": files,
        **changes,
    }
    (folder / REPORT_FILE).write_text(json.dumps(content))
    return content


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def snippets(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


# One commit ---------------------------------------------------------------------------------------------------------


def test_one_commit_with_everything_and_a_second_push_makes_none(hub, push, folder):
    report(folder)
    before = contents(folder)
    assert push(folder, "org/all", "--private") == (0, f"Pushed {len(EVERY_FILE)} files to org/all.")
    assert set(hub.head("org/all")) == EVERY_FILE | {REPORT_FILE}
    assert hub.repositories["org/all"].private
    assert len(hub.repositories["org/all"].commits) == 2  # the first is the empty repository's
    assert contents(folder) == before
    config = json.loads(hub.head("org/all")["config.json"].content)
    assert config["auto_map"]["AutoModel"] == "modeling_diffclip.DiffCLIPModel"

    hub.requests.clear()
    assert push(folder, "org/all", "--private") == (0, "org/all has all of it already: no commit was made.")
    assert len(hub.repositories["org/all"].commits) == 2
    assert hub.count("PUT", "") == 0
    assert hub.count("POST", "/commit/") == 0


def test_the_command_line(hub, folder, warm_python, tmp_path):
    """As a person runs it, in a process of its own, the token from the environment."""
    environment = hub.environment(tmp_path / "home", WRITER)
    warm_python.run(SCRIPT, folder, "org/command", folder=tmp_path, environment=environment)
    assert set(hub.head("org/command")) == EVERY_FILE


def test_without_code(hub, push, folder):
    assert push(folder, "org/no-code")[0] == 0
    assert push(folder, "org/no-code", "--no-remote-code")[0] == 0
    files = hub.head("org/no-code")
    assert set(files) == EVERY_FILE - set(CODE_FILES)
    assert not any(b"auto_map" in file.content for name, file in files.items() if name.endswith(".json"))
    assert b"trust_remote_code" not in files["README.md"].content
    assert len(hub.repositories["org/no-code"].commits) == 3


def test_a_branch(hub, push, client, folder):
    assert push(folder, "org/branches", "--revision", "v1")[0] == 0
    assert set(hub.head("org/branches")) == {".gitattributes"}
    card = hub.head("org/branches", "v1")["README.md"].content.decode()
    assert 'AutoModel.from_pretrained("org/branches", revision="v1")' in card
    for code in snippets(card):
        assert client(f"import huggingface_hub\n{code}\nresult = 1") == 1


def test_dry_run_sends_nothing(hub, push, client, folder, capfd):
    assert push(folder, "org/dry", "--dry-run")[0] == 0
    assert hub.requests == []
    assert "org/dry" not in hub.repositories
    listed = client.log.read_text()
    size = f"{(folder / 'model.safetensors').stat().st_size:,}"
    assert re.search(rf"^ *{size}  model\.safetensors$", listed, re.MULTILINE)
    for name in EVERY_FILE - {".gitattributes"}:
        assert f"  {name}\n" in listed


# The card -----------------------------------------------------------------------------------------------------------


def test_every_snippet_of_the_card_runs(hub, push, client, folder, tmp_path):
    assert push(folder, "org/snippets")[0] == 0
    card = hub.head("org/snippets")["README.md"].content.decode()
    with_package, with_pipeline, trusted = snippets(card)
    assert "trust_remote_code" in trusted
    assert "import diffclip_hf" not in trusted
    for code in (with_package, with_pipeline):
        assert client(code + "\nresult = 1") == 1
    stranger = Client(hub, tmp_path / "stranger", WITHOUT_PACKAGE)
    picture().save(tmp_path / "stranger" / "picture.png")
    assert stranger(trusted + "\nresult = 1") == 1
    stranger.close()


def test_front_matter(hub, push, folder):
    report(folder)
    source = "hammh0a/DiffCLIP_ViTB16_CC12M"
    assert push(folder, "org/card", "--source-repo", source, "--license", "mit")[0] == 0
    data = ModelCard(hub.head("org/card")["README.md"].content.decode()).data
    assert (data.pipeline_tag, data.library_name) == ("zero-shot-image-classification", "transformers")
    assert (data.license, data.base_model) == ("mit", source)
    assert data.datasets == ["google-research-datasets/conceptual_12m"]
    assert data.metrics == ["accuracy", "recall"]
    assert {"diffclip", "differential-attention"} <= set(data.tags)


def test_the_report_is_in_the_card(hub, push, folder):
    report(folder)
    assert push(folder, "org/report")[0] == 0
    card = hub.head("org/report")["README.md"].content.decode()
    for words in ("Largest error 3.0e-07", "allowed 1e-04", "| vision | 0.750 | 0.760 | 0.770 |", "λ_init is 0.8."):
        assert words in card
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() in card


def test_a_card_of_ones_own_is_kept(hub, push, folder):
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\nMine.\n")
    status, log = push(folder, "org/own-card")
    assert status == 0
    assert "DIR has a README.md of its own, which becomes the model card" in log
    assert hub.head("org/own-card")["README.md"].content.decode().endswith("Mine.\n")


def test_without_a_report_the_card_says_so(hub, push, folder):
    status, log = push(folder, "org/no-report")
    assert status == 0
    assert "has no conversion_report.json" in log
    assert "There is no report of a conversion" in hub.head("org/no-report")["README.md"].content.decode()


def make_card(folder: Path, dataset: str | None, **config) -> str:
    path = folder / "config.json"
    DiffCLIPConfig(architectures=["DiffCLIPModel"], **config).save_pretrained(folder)
    assert path.is_file()
    return render_card(Card("org/x", None, folder, None, True, dataset, None, "unknown"))


def test_a_clip_of_another_paper_gets_no_figures_of_this_one(folder):
    standard = {"attention_type": "standard"}
    DiffCLIPConfig(vision_config=standard, text_config=standard).save_pretrained(folder)
    for source, words in (
        ("ViTB16-CC12M", "trained on CC12M."),
        ("SynthCLIP_ViTB16_20M", "20 million synthetic pairs"),
    ):
        card = render_card(Card("org/x", None, folder, None, True, None, f"hammh0a/{source}", "unknown"))
        assert words in card
        assert "DiffCLIP's paper has no figures of this model" in card
        assert "31.8" not in card
    with pytest.raises(ValueError, match=r"--dataset is cc3m; .* trained on 20 million synthetic pairs"):
        render_card(Card("org/x", None, folder, None, True, "cc3m", "hammh0a/SynthCLIP_ViTB16_20M", "unknown"))


@pytest.mark.parametrize(
    ("config", "title", "figures"),
    [
        ({}, "DiffCLIP", ["33.8", "Recall@5", "77.3"]),
        (
            {"vision_config": {"lambda_init": "depth"}, "text_config": {"lambda_init": "depth"}},
            "DiffCLIP*",
            ["+2.8 zero-shot on ImageNet"],
        ),
        ({"text_config": {"attention_type": "standard"}}, "DiffCLIP†", ["+1.9 zero-shot on ImageNet"]),
        (
            {"vision_config": {"attention_type": "standard"}, "text_config": {"attention_type": "standard"}},
            "CLIP baseline",
            ["31.8", "77.0"],
        ),
    ],
    ids=["diffclip", "star", "dagger", "clip"],
)
def test_the_papers_figures_are_those_of_the_variant_and_marked(folder, config, title, figures):
    card = make_card(folder, "cc12m", **config)
    section = card[card.index("## What the paper reports") : card.index("## Conversion")]
    assert f"figures** ([arXiv 2503.06626](https://arxiv.org/abs/2503.06626)) of {title}, ViT-B/16" in section
    assert "They were not measured with this repository's files." in section
    for figure in figures:
        assert figure in section
    assert "none of the paper's figures" in make_card(folder, None, **config)


def test_a_variant_of_which_the_paper_has_no_figures(folder):
    """Of CC3M the paper's tables have CLIP and DiffCLIP alone."""
    card = make_card(folder, "cc3m", text_config={"attention_type": "standard"})
    assert "The paper has no figures of this model with" in card
    assert "Accuracy in %" not in card


def test_a_card_of_what_doesnt_fit(folder):
    reported = {"source": {"repo_id": "org/theirs"}}
    with pytest.raises(CardError, match="--source-repo is org/mine; the conversion's report says org/theirs"):
        render_card(Card("org/x", None, folder, reported, True, None, "org/mine", "unknown"))
    with pytest.raises(CardError, match=r"not of the form that the conversion writes \(KeyError: 'gate'\)"):
        render_card(Card("org/x", None, folder, {}, True, None, None, "unknown"))
    (folder / "processor_config.json").write_text('{"image_processor": {"size": {"height": 9}}}')
    with pytest.raises(CardError, match=r"processor_config\.json isn't of DiffCLIP's image processor \(KeyError"):
        render_card(Card("org/x", None, folder, None, True, None, None, "unknown"))


def test_figures_of_the_paper_equal_its_tables():
    """Against the sums that the tables give themselves: each row's mean is of its nine numbers."""
    data = json.loads(Path(push_to_hub.__file__).with_name("model_card_data.json").read_text(encoding="utf-8"))
    for by_variant in data["figures"].values():
        for figures in by_variant.values():
            for rows in (figures.get("linear"), figures.get("few_shot")):
                if rows:
                    assert len(rows) == len(data["columns"]["classification"])
                    assert sum(rows[:-1]) / 9 == pytest.approx(rows[-1], abs=0.1)


def test_a_model_of_another_size_gets_no_figures(hub, push, folder):
    assert push(folder, "org/small", "--dataset", "cc12m")[0] == 0
    card = hub.head("org/small")["README.md"].content.decode()
    assert "none of its figures apply" in card
    assert "33.8" not in card


@pytest.mark.slow
def test_a_full_size_checkpoint_from_file_to_hub_to_logits(hub, push, tmp_path):
    """Convert, check, push, and load by id without the package: the logits are those of the original's code."""
    checkpoint = tmp_path / "checkpoint_best.pt"
    torch.save({"state_dict": formula_state_dict("diffclip")}, checkpoint)
    folder = tmp_path / "diffclip-vitb16"
    converted = ["--checkpoint", checkpoint, "--output-dir", folder, "--variant", "diffclip"]
    assert convert_original_checkpoint.main([str(part) for part in converted]) == 0
    status, log = push(folder, "org/diffclip-vitb16")
    assert status == 0
    assert log.startswith("Pushed ")
    tensors, _ = golden("diffclip", "vitb16")
    save_file({name: tensors[name] for name in ("input_ids", "pixel_values")}, tmp_path / "inputs.safetensors")
    stranger = Client(hub, tmp_path / "stranger", WITHOUT_PACKAGE)
    found = stranger(f"""
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor
AutoProcessor.from_pretrained("org/diffclip-vitb16", trust_remote_code=True)
model = AutoModel.from_pretrained("org/diffclip-vitb16", trust_remote_code=True, dtype=torch.float32)
with torch.inference_mode():
    result = model(**load_file({str(tmp_path / "inputs.safetensors")!r})).logits_per_image.tolist()
""")
    stranger.close()
    error = relative_error(torch.tensor(found), tensors["logits_per_image"])
    assert error <= PARITY_WITH_ORIGINAL
    shutil.rmtree(tmp_path)


# What is refused ----------------------------------------------------------------------------------------------------


def refused(push, hub, folder: Path, *args, words: str) -> None:
    """Run the command, and expect it to fail before anything is sent."""
    before = contents(folder) if folder.is_dir() else None
    status, log = push(folder, "org/refused", *args)
    assert status == 1
    assert re.search(words, log), log
    assert hub.requests == []
    assert before is None or contents(folder) == before


def test_refuses_pickles(push, hub, folder):
    (folder / "old").mkdir()
    (folder / "old" / "optimizer.pt").write_bytes(b"")
    refused(push, hub, folder, words=r"holds old/optimizer\.pt; only safetensors")


def test_refuses_what_is_no_diffclip(push, hub, folder, tmp_path):
    refused(push, hub, tmp_path / "nowhere", words="nowhere is not a folder")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "clip"}))
    refused(push, hub, folder, words="holds a 'clip' of class .* must be a 'diffclip'")
    (folder / "config.json").write_text("{")
    refused(push, hub, folder, words=r"config\.json isn't JSON")


def test_refuses_a_folder_without_weights_or_processor(push, hub, folder):
    (folder / "tokenizer.json").unlink()
    refused(push, hub, folder, words=r"has no tokenizer\.json")


def test_refuses_a_processor_of_another_structure(push, hub, folder):
    (folder / "processor_config.json").write_text('{"image_processor": 3}')
    refused(push, hub, folder, words=r"The processor of .* can't be loaded")


def test_refuses_another_models_tokenizer(push, hub, folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    refused(push, hub, folder, words=r"the model's is 5, so it is another model's tokenizer")


def test_refuses_damaged_weights(push, hub, folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    refused(push, hub, folder, words=r"model\.safetensors can't be read as safetensors")
    weights.unlink()
    refused(push, hub, folder, words=r"has no model\.safetensors")


def test_refuses_weights_that_are_no_floating_point_numbers(push, hub, folder):
    content = load_file(folder / "model.safetensors")
    content["logit_scale"] = torch.tensor(3)
    save_file(content, folder / "model.safetensors")
    refused(push, hub, folder, words="'logit_scale' is of I64; it must be of F32, F16, BF16, F64")


def test_refuses_weights_of_another_configuration(push, hub, folder):
    config = json.loads((folder / "config.json").read_text())
    # Nothing of the larger number is built.
    for layers in (2, 999_999_999):
        config["vision_config"]["num_hidden_layers"] = layers
        (folder / "config.json").write_text(json.dumps(config))
        words = f"3 layers in the vision tower; num_hidden_layers in config.json is {layers}"
        refused(push, hub, folder, words=words)
    config["vision_config"]["num_hidden_layers"] = 3
    config["vision_config"]["intermediate_size"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    words = r"vision_model\.encoder\.layers\.0\..* and others: .* it must have \["
    refused(push, hub, folder, words=words)
    config["vision_config"]["intermediate_size"] -= 1
    config["vision_config"]["lambda_init"] = "deep"
    (folder / "config.json").write_text(json.dumps(config))
    refused(push, hub, folder, words=r"config\.json is not valid: .*'deep'")


@pytest.mark.parametrize("error", [2e-4, float("nan")])
def test_refuses_a_model_beyond_the_limit(push, hub, folder, error):
    content = report(folder)
    report(folder, gate={**content["gate"], "largest_error": error})
    refused(push, hub, folder, words="departs from the original by")


def test_refuses_weights_that_changed_since_the_conversion(push, hub, folder):
    report(folder)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    refused(push, hub, folder, words=r"model\.safetensors has changed since the conversion")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gate": None}, "is no report of the conversion"),
        ({"files": ["model.safetensors"]}, "is no report of the conversion"),
        ({"parameters": {}}, "not of the form"),
        ({"files": {"model-2.safetensors": {"sha256": "0"}}}, "speaks of model-2.safetensors"),
    ],
)
def test_refuses_a_malformed_report(push, hub, folder, changes, words):
    report(folder, **changes)
    refused(push, hub, folder, words=words)


def test_refuses_options_that_contradict(push, hub, folder):
    source = "hammh0a/DiffCLIP_ViTB16_CC12M"
    words = "--dataset is cc3m; .* was trained on cc12m"
    refused(push, hub, folder, "--dataset", "cc3m", "--source-repo", source, words=words)
    report(folder, source={"file": "x.pt", "sha256": "0", "repo_id": source, "commit": "1"})
    refused(push, hub, folder, "--source-repo", "org/other", words="--source-repo is org/other; .* says hammh0a")


def test_refuses_names_that_are_no_repository(push, hub, folder):
    for name in ("just-a-name", "a/b/c", "org/!"):
        status, log = push(folder, name)
        assert status == 1
        assert f"ORG/NAME is {name!r}" in log
    assert hub.requests == []


def test_private_is_not_promised_for_a_public_repository(push, hub, folder):
    assert push(folder, "org/public")[0] == 0
    before = hub.head("org/public")
    status, log = push(folder, "org/public", "--private")
    assert status == 1
    assert "--private is given, and org/public exists and is public" in log
    assert hub.head("org/public") == before


# What breaks on the way ---------------------------------------------------------------------------------------------


@pytest.fixture
def changed(push, hub, folder, request) -> tuple[str, dict]:
    """A repository that was pushed, its files, and weights in `folder` that differ from them."""
    repo = f"org/{request.node.name}".translate(str.maketrans("[]", "--")).strip("-")[:90]
    assert push(folder, repo)[0] == 0
    weights = load_file(folder / "model.safetensors")
    weights["logit_scale"] += torch.rand(())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    hub.requests.clear()
    return repo, hub.head(repo)


@pytest.mark.parametrize(
    ("method", "path", "times", "what"),
    [
        ("PUT", "/upload/", 100, {"cut": True}),
        ("PUT", "/upload/", 100, {"status": 500}),
        ("POST", "/preupload/", 100, {"status": 503}),
        ("POST", "/objects/batch", 100, {"cut": True}),
        ("POST", "/verify/", 100, {"status": 404}),
        ("POST", "/commit/", 1, {"cut": True}),
        ("POST", "/commit/", 1, {"status": 500}),
    ],
    ids=["upload-cut", "upload-500", "preupload-503", "batch-cut", "verify-404", "commit-cut", "commit-500"],
)
def test_a_failure_for_good_leaves_the_remote_as_it_was(push, hub, folder, changed, method, path, times, what):
    repo, before = changed
    hub.fail(method, path, times=times, **what)
    status, log = push(folder, repo)
    assert status == 1
    assert f"Pushing to {repo} failed: " in log
    assert hub.head(repo) == before
    hub.failures.clear()
    assert push(folder, repo)[0] == 0
    assert hub.head(repo) != before


@pytest.mark.parametrize("what", [{"cut": True}, {"status": 500}, {"status": 429, "headers": {"Retry-After": "3"}}])
def test_a_failure_that_passes_is_no_failure(push, hub, folder, changed, what):
    repo, before = changed
    hub.fail("PUT", "/upload/", times=2, **what)
    assert push(folder, repo)[0] == 0
    assert hub.head(repo) != before
    assert hub.count("POST", "/commit/") == 1


def test_an_answer_that_is_lost_after_the_commit(push, hub, folder, changed):
    """The person is told of a failure, and the next push finds that all is there."""
    repo, _ = changed
    hub.fail("POST", "/commit/", times=1, lose_answer=True)
    assert push(folder, repo)[0] == 1
    status, log = push(folder, repo)
    assert status == 0
    assert f"{repo} has all of it already: no commit was made." in log


@pytest.mark.parametrize(("token", "words"), [(READER, "403"), ("hf_wrong", "401"), (None, "401")])
def test_a_token_that_may_not_write(push, hub, folder, token, words):
    status, log = push(folder, "org/forbidden", token=token)
    assert status == 1
    assert "Pushing to org/forbidden failed" in log
    assert words in log
    assert "org/forbidden" not in hub.repositories


def test_somebody_elses_commit_in_between_is_not_overwritten(push, hub, folder, changed):
    repo, before = changed
    theirs = {**before, "README.md": before["config.json"]}
    hub.fail("POST", "/commit/", before=lambda: hub.repositories[repo].commit("main", theirs))
    status, log = push(folder, repo)
    assert status == 1
    assert "412" in log
    assert hub.head(repo) == theirs
