"""Fetching a checkpoint by its repository id, with huggingface_hub's own client against a Hub on loopback."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import READER, WRITER, HubServer
from huggingface_hub.errors import HfHubHTTPError
from parity_models import FIXTURES

from diffclip_hf.conversion import convert_original_checkpoint as conversion
from diffclip_hf.conversion import download


SCRIPT = Path(__file__).parents[2] / "conversion" / "convert_original_checkpoint.py"
FETCH = """
import json, sys, time
from diffclip_hf.conversion.download import ConversionError, download_checkpoint
time.sleep = lambda seconds: None  # the client waits between its tries
for args in json.loads(sys.argv[1]):
    try:
        path, commit = download_checkpoint(*args)
        print(json.dumps([path.read_bytes().hex(), commit]))
    except ConversionError as error:
        print(json.dumps([str(error), None]))
"""


@pytest.fixture
def hub(tmp_path):
    with HubServer(tmp_path / "server") as server:
        yield server


def add(hub: HubServer, tmp_path: Path, repo: str, content: bytes = b"weights" * 50_000, **options) -> str:
    folder = tmp_path / repo.replace("/", "-")
    folder.mkdir()
    (folder / "checkpoint_best.pt").write_bytes(content)
    return hub.add(repo, folder, **options)


@pytest.fixture
def fetch(warm_python, tmp_path, hub):
    """Fetches each case of (repository, file, revision, token): [content in hex, commit] or [message, None]."""

    def run(cases: list[list], home: str = "home", token: str | None = None, **environment: str) -> list[list]:
        environment = {**hub.environment(tmp_path / home, token), **environment}
        printed = warm_python.run("-c", FETCH, json.dumps(cases), folder=SCRIPT.parent, environment=environment)
        return [json.loads(line) for line in printed.splitlines()]

    return run


def test_each_refusal_names_what_to_change(tmp_path, hub, fetch):
    file = "checkpoint_best.pt"
    for name, options in {"open": {}, "private": {"private": True}, "gated": {"gated": True}}.items():
        add(hub, tmp_path, f"org/{name}", **options)
    for name, status in {"forbidden": 403, "busy": 429, "broken": 500}.items():
        add(hub, tmp_path, f"org/{name}")
        hub.fail("HEAD", f"/org/{name}/", times=100, status=status)
    cases = {
        "--repo-id org/none doesn't exist": ["org/none", file, None, None],
        "--repo-id org/private doesn't exist, or is private": ["org/private", file, None, None],
        "--repo-id org/gated asks its readers to accept conditions": ["org/gated", file, None, None],
        "--repo-id a/b/c is no repository id": ["a/b/c", file, None, None],
        "--filename none.pt is no file of org/open": ["org/open", "none.pt", None, None],
        "--revision none is no branch, tag or commit of org/open": ["org/open", file, "none", None],
        "the token has no access to this repository (403); pass another with --token": [
            "org/forbidden",
            file,
            None,
            READER,
        ],
        "--repo-id org/busy: the Hub asks to slow down (429)": ["org/busy", file, None, None],
        "--repo-id org/broken: the Hub answered 500": ["org/broken", file, None, None],
    }
    found = fetch(list(cases.values()))
    for words, (message, commit) in zip(cases, found, strict=True):
        assert words in message
        assert commit is None
        assert READER not in message


def test_a_token_opens_a_private_repository(tmp_path, hub, fetch):
    commit = add(hub, tmp_path, "org/private", private=True)
    case = ["org/private", "checkpoint_best.pt", None]
    expected = [(b"weights" * 50_000).hex(), commit]
    assert fetch([[*case, WRITER]]) == [expected]
    # From the cache, for which the Hub isn't asked, and from the environment's token.
    assert fetch([[*case, None]], HF_HUB_OFFLINE="1") == [expected]
    assert fetch([[*case[:2], commit, None]], "anew", token=WRITER) == [expected]


def test_a_lost_connection(tmp_path, hub, fetch):
    commit = add(hub, tmp_path, "org/open")
    case = ["org/open", "checkpoint_best.pt", None, None]
    (offline,) = fetch([case], HF_HUB_OFFLINE="1")
    assert "checkpoint_best.pt isn't in the cache and the Hub can't be reached" in offline[0]
    assert "pass --checkpoint" in offline[0]
    (unreachable,) = fetch([case], HF_ENDPOINT="http://127.0.0.1:9")
    assert "the Hub can't be reached" in unreachable[0]
    # Cut at half the file: the client asks for the rest.
    hub.fail("GET", "/cdn/", times=1, cut=True)
    assert fetch([case]) == [[(b"weights" * 50_000).hex(), commit]]


def test_a_file_of_another_hash_is_removed(tmp_path, hub, fetch):
    commit = add(hub, tmp_path, "org/open")
    case = ["org/open", "checkpoint_best.pt", None, None]
    hub.fail("GET", "/cdn/", times=1, flip_at=1000)
    first, second = fetch([case, case])
    assert "checkpoint_best.pt came with SHA-256" in first[0]
    assert "The damaged file was removed" in first[0]
    assert second == [(b"weights" * 50_000).hex(), commit]


def test_a_known_repository_converts_in_one_command(tmp_path, hub, warm_python):
    commit = add(hub, tmp_path, "hammh0a/DiffCLIP_ViTB16_CC12M", (FIXTURES / "diffclip-tiny.pt").read_bytes())
    command = [SCRIPT, "--repo-id", "hammh0a/DiffCLIP_ViTB16_CC12M", "--token", READER]
    done = warm_python([*command, "--output-dir", tmp_path / "out"], tmp_path, hub.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert (report["variant"], report["assumptions"]) == ("diffclip", [])
    source = report["source"]
    found = (source["repo_id"], source["file"], source["commit"])
    assert found == ("hammh0a/DiffCLIP_ViTB16_CC12M", "checkpoint_best.pt", commit)
    assert all(READER not in path.read_text(errors="ignore") for path in (tmp_path / "out").iterdir())
    assert READER not in done.stderr + done.stdout


def test_an_unknown_repository_is_read_off_its_keys(tmp_path, monkeypatch):
    """What is asked of the Hub is tested above; here it is what is made of the answer."""
    asked = []

    def downloaded(*args):
        asked.append(args)
        return FIXTURES / "diffclip-tiny.pt", "c0ffee"

    monkeypatch.setattr(conversion, "download_checkpoint", downloaded)
    args = ["--repo-id", "org/mine", "--filename", "x.pt", "--revision", "v1", "--no-processor"]
    assert conversion.main([*args, "--output-dir", str(tmp_path / "out")]) == 0
    assert asked == [("org/mine", "x.pt", "v1", None)]
    report = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert "assuming lambda_init 0.8" in report["assumptions"][0]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            HfHubHTTPError("No.", response=SimpleNamespace(status_code=401, headers={}, request=None)),
            "(401); pass",
        ),
        (
            OSError(28, "No space left on device"),
            "a.pt could not be fetched whole ([Errno 28] No space left on device)",
        ),
    ],
    ids=["token", "disk"],
)
def test_what_the_client_raises_otherwise(error, words, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(download, "hf_hub_download", fail)
    with pytest.raises(download.ConversionError) as raised:
        download.download_checkpoint("org/x", "a.pt", None, None)
    assert str(raised.value).startswith("--repo-id org/x: ")
    assert words in str(raised.value)
