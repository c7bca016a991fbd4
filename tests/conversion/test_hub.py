"""Loading and pushing by repository id, by Transformers' own client code, against a Hub on loopback."""

import shutil
from pathlib import Path

import pytest
import torch
from hub_client import WITHOUT_PACKAGE, Client, ClientError, picture, save_tiny
from hub_server import READER, WRITER, HubServer

from diffclip_hf import add_remote_code


LOGITS = """
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor
def logits(repo, **kwargs):
    model, processor = AutoModel.from_pretrained(repo, **kwargs), AutoProcessor.from_pretrained(repo, **kwargs)
    inputs = processor(text=["a cat", "a dog"], images=Image.open("picture.png"), return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits_per_image.tolist()
"""
LOAD = "from transformers import AutoModel\nAutoModel.from_pretrained({repo!r}, {options})"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, list[list[float]]]:
    """A folder with a tiny model, its processor and its code, and the model's logits."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    expected = save_tiny(folder)
    add_remote_code(folder)
    return folder, expected


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        yield server


def open_client(hub: HubServer, folder: Path, prelude: str):
    client = Client(hub, folder, prelude)
    picture().save(folder / "picture.png")
    yield client
    client.close()


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    """A client that has the package."""
    yield from open_client(hub, tmp_path_factory.mktemp("with-package"), "import diffclip_hf\n")


@pytest.fixture(scope="module")
def stranger(hub, tmp_path_factory):
    """A client that hasn't."""
    yield from open_client(hub, tmp_path_factory.mktemp("without-package"), WITHOUT_PACKAGE)


@pytest.fixture
def repo(hub, tiny, request) -> str:
    """A repository of its own for each test, so that nothing is in the client's cache, and no failure left over."""
    name = f"org/{request.node.name}".translate(str.maketrans("[]", "--")).strip("-")[:96]
    hub.add(name, tiny[0])
    hub.failures.clear()
    hub.requests.clear()
    return name


def assert_loads(client: Client, repo: str, tiny, options: str = "") -> None:
    found = client(LOGITS + f"result = logits({repo!r}, {options})")
    # The image processors of the two backends may differ by one of 255 levels.
    torch.testing.assert_close(torch.tensor(found), torch.tensor(tiny[1]), rtol=0, atol=2e-2)
    assert client.left_over() == []


# What works ---------------------------------------------------------------------------------------------------------


def test_loads_by_id_with_the_package(hub, client, repo, tiny):
    assert_loads(client, repo, tiny)
    # The weights came over the other host, which never saw a token (it refuses one).
    assert hub.count("GET", "^/cdn/") == 1
    code = "from transformers import pipeline\nresult = pipeline('zero-shot-image-classification', model={!r})("
    code += "'picture.png', candidate_labels=['a', 'b'])"
    assert sum(entry["score"] for entry in client(code.format(repo))) == pytest.approx(1, abs=1e-5)
    assert hub.count("GET", "^/cdn/") == 1


def test_loads_by_id_without_the_package(hub, stranger, repo, tiny):
    trust = "trust_remote_code=True"
    assert_loads(stranger, repo, tiny, trust)
    code = (
        f"from transformers import pipeline\nlabel = pipeline('zero-shot-image-classification', {repo!r}, {trust})\n"
    )
    code += "result = label('picture.png', candidate_labels=['a', 'b'])"
    assert sum(entry["score"] for entry in stranger(code)) == pytest.approx(1, abs=1e-5)


def test_a_second_load_downloads_nothing(hub, client, repo, tiny):
    assert_loads(client, repo, tiny)
    hub.requests.clear()
    assert_loads(client, repo, tiny)
    assert hub.count("GET", "/cdn/|/resolve/") == 0


def test_loads_a_branch_and_a_commit(hub, client, repo, tiny, tmp_path):
    main = hub.repositories[repo].branches["main"]
    other = tmp_path / "other"
    shutil.copytree(tiny[0], other)
    (other / "model.safetensors").unlink()
    hub.add(repo, other)
    with pytest.raises(ClientError, match=r"does not appear to have a file named .*model\.safetensors"):
        client(LOAD.format(repo=repo, options=""))
    assert_loads(client, repo, tiny, f"revision={main!r}")
    hub.repositories[repo].branches["v1"] = main
    assert_loads(client, repo, tiny, "revision='v1'")
    with pytest.raises(ClientError, match="v2 is not a valid git identifier"):
        client(LOAD.format(repo=repo, options="revision='v2'"))


def test_a_private_repository_needs_its_token(hub, client, repo, tiny):
    hub.repositories[repo].private = True
    for token in ("False", repr(READER)):
        with pytest.raises(ClientError, match="is not a valid model identifier"):
            client(LOAD.format(repo=repo, options=f"token={token}"))
    assert_loads(client, repo, tiny, f"token={WRITER!r}")


@pytest.mark.parametrize("revision", [None, "trial"])
def test_push_to_hub(hub, client, repo, tiny, revision):
    target = f"{repo}-pushed"
    client(f"""
from transformers import AutoModel, AutoProcessor
for kind in (AutoModel, AutoProcessor):
    kind.from_pretrained({repo!r}).push_to_hub({target!r}, token={WRITER!r}, revision={revision!r}, private=True)
""")
    files = hub.head(target, revision or "main")
    expected = {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert expected | {"processor_config.json", "tokenizer.json", "tokenizer_config.json"} <= set(files)
    assert files["model.safetensors"].sha256 == hub.head(repo)["model.safetensors"].sha256
    assert hub.repositories[target].private
    assert_loads(client, target, tiny, f"token={WRITER!r}, revision={revision!r}")
    if revision:
        assert set(hub.head(target)) == {".gitattributes"}


@pytest.mark.parametrize(("token", "words"), [("False", "401"), (repr(READER), "403 Forbidden"), ("'hf_no'", "401")])
def test_push_to_hub_is_refused(hub, client, repo, token, words):
    code = f"from transformers import AutoModel\nmodel = AutoModel.from_pretrained({repo!r})\n"
    with pytest.raises(ClientError, match=words):
        client(code + f"model.push_to_hub('org/refused', token={token})")
    assert "org/refused" not in hub.repositories


# What fails ---------------------------------------------------------------------------------------------------------


def test_a_repository_that_isnt_there(hub, client):
    for token in ("False", repr(WRITER)):
        with pytest.raises(
            ClientError, match="OSError: org/nowhere is not a local folder and is not a valid model id"
        ):
            client(LOAD.format(repo="org/nowhere", options=f"token={token}"))


@pytest.mark.parametrize(
    ("name", "words"), [("config.json", "config.json"), ("model.safetensors", "model.safetensors")]
)
def test_a_file_that_isnt_there(hub, client, repo, tiny, name, words):
    files = hub.head(repo)
    file = files.pop(name)
    with pytest.raises(ClientError, match=words):
        client(LOAD.format(repo=repo, options=""))
    hub.repositories[repo].commit("main", {**files, name: file})
    assert_loads(client, repo, tiny)


def test_a_wrong_token(hub, client, repo, tiny):
    with pytest.raises(ClientError, match=r"401|Invalid credentials"):
        client(LOAD.format(repo=repo, options="token='hf_wrong'"))
    assert_loads(client, repo, tiny)


@pytest.mark.parametrize("token", ["False", repr(READER)], ids=["nobody", "reader"])
def test_a_gated_repository(hub, client, repo, tiny, token):
    hub.repositories[repo].gated = True
    with pytest.raises(ClientError, match="gated repo"):
        client(LOAD.format(repo=repo, options=f"token={token}"))
    assert_loads(client, repo, tiny, f"token={WRITER!r}")


def test_too_many_requests_waits_as_long_as_told(hub, client, repo, tiny):
    hub.fail("HEAD", f"{repo}/resolve/.*/config.json", times=2, status=429, headers={"Retry-After": "7"})
    hub.fail("GET", "/cdn/", times=1, status=429, headers={"Retry-After": "11"})
    waits = client(LOAD.format(repo=repo, options="") + "\nresult = list(sleeps)")
    assert any(7 <= wait <= 8 for wait in waits)
    assert any(11 <= wait <= 12 for wait in waits)
    assert_loads(client, repo, tiny)


def test_a_server_error_and_then_success(hub, client, repo, tiny):
    hub.fail("HEAD", f"{repo}/resolve/.*/config.json", times=2, status=500)
    hub.fail("HEAD", f"{repo}/resolve/.*/model.safetensors", times=2, status=503)
    assert_loads(client, repo, tiny)
    assert [failure.times for failure in hub.failures] == [0, 0]


def test_a_server_error_that_stays(hub, client, repo, tiny):
    hub.fail("GET", "/cdn/", times=100, status=500)
    with pytest.raises(ClientError, match=r"500|model\.safetensors"):
        client(LOAD.format(repo=repo, options=""))
    assert client.left_over() == []
    hub.failures.clear()
    assert_loads(client, repo, tiny)


def test_a_connection_dropped_at_half_the_file_resumes(hub, client, repo, tiny):
    # The client keeps what came in whole pieces, of 10 MB by default; the model is smaller.
    piece = "from huggingface_hub import constants\nresult = constants.DOWNLOAD_CHUNK_SIZE\n"
    usual = client(piece + "constants.DOWNLOAD_CHUNK_SIZE = 4096")
    hub.fail("GET", "/cdn/", times=1, cut=True)
    assert_loads(client, repo, tiny)
    client(piece + f"constants.DOWNLOAD_CHUNK_SIZE = {usual}")
    assert [status for method, path, status in hub.requests if method == "GET" and "/cdn/" in path] == [0, 206]


def test_a_connection_dropped_for_good_leaves_nothing(hub, client, repo, tiny):
    hub.fail("GET", "/cdn/", times=1, cut=True)
    hub.fail("GET", "/cdn/", times=100, status=500)
    with pytest.raises(ClientError, match=r"500|model\.safetensors"):
        client(LOAD.format(repo=repo, options=""))
    assert client.left_over() == []
    assert not [path for path in client.home.rglob("model.safetensors") if repo.split("/")[1] in str(path)]
    hub.failures.clear()
    assert_loads(client, repo, tiny)


def test_a_truncated_file_is_an_error(hub, client, repo, tiny):
    """A body that ends early though the connection doesn't break: the size is checked."""
    sha256 = hub.head(repo)["model.safetensors"].sha256
    stored = hub.objects / sha256
    content = stored.read_bytes()
    stored.write_bytes(content[:-100])
    with pytest.raises(ClientError, match=r"Consistency check failed|model\.safetensors"):
        client(LOAD.format(repo=repo, options=""))
    assert client.left_over() == []
    stored.write_bytes(content)
    assert_loads(client, repo, tiny)


@pytest.mark.parametrize("flip_at", [0, -1], ids=["header", "weights"])
@pytest.mark.parametrize(
    "options", ["", "trust_remote_code=True", "cache_dir='another'"], ids=["usual", "remote-code", "cache-dir"]
)
def test_a_corrupt_file_is_an_error_and_fetched_again_by_the_next_load(
    hub, client, stranger, repo, tiny, options, flip_at
):
    """huggingface_hub checks the size of a plain HTTP download and not its hash; the model class does."""
    reader = stranger if "trust" in options else client
    hub.fail("GET", "/cdn/", times=1, flip_at=flip_at)
    with pytest.raises(ClientError, match=r"OSError: .* came with SHA-256 .* The damaged file was removed"):
        reader(LOAD.format(repo=repo, options=options))
    assert_loads(reader, repo, tiny, options)


def test_the_hubs_own_check_agrees_on_a_loaded_repository(hub, client, repo, tiny):
    """`hf cache verify`, which this is, compares every file, also those that Transformers' own classes load."""
    assert_loads(client, repo, tiny)
    verify = f"from huggingface_hub import HfApi\nfound = HfApi().verify_repo_checksums({repo!r})\n"
    assert client(verify + "result = [entry['path'] for entry in found.mismatches]") == []
    assert client(verify + "result = found.checked_count") > 3
