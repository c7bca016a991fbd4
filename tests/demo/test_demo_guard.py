"""What the web demo lets through: requests of every door against one server in this process."""

import asyncio
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import ExifTags, Image


pytest.importorskip("gradio", reason="the demo needs Gradio, which the extra `dev` has")

import httpx

from diffclip_hf.demo import guard as demo_guard
from diffclip_hf.demo import page as demo
from diffclip_hf.demo.guard import host_names, private_store, sweep, uploaded_file
from diffclip_hf.demo.space import prepare_examples


ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "embedded" / "diffclip-emoji")
PICTURES = ROOT / "embedded" / "pictures"
LONG_NAME = json.dumps({"data": [], "fn_index": 0, "session_hash": "a" * 101})
ELSEWHERE = "isn't among those that were uploaded here"


@pytest.fixture(scope="module")
def store():
    with private_store() as store:
        yield store


@pytest.fixture(scope="module")
def client(store):
    """A client of a page that listens on loopback, with one example."""
    examples = prepare_examples([PICTURES / "rocket.png"], store / "examples")

    async def begin() -> tuple[Any, str]:
        page = demo.build_page({"diffclip-emoji": MODEL}, store, "cpu", examples)
        return page, demo.open_server(page, store, host_names("127.0.0.1"))

    # Outside of a loop Gradio makes loops of its own, and doesn't close them.
    page, address = asyncio.run(begin())
    with httpx.Client(base_url=address, trust_env=False, timeout=600) as client:
        yield client
    page.close(verbose=False)


@pytest.fixture(scope="module")
def uploaded(client) -> str:
    """Where an uploaded pizza lies on the server."""
    answer = client.post("/gradio_api/upload", files={"files": ("pizza.png", (PICTURES / "pizza.png").read_bytes())})
    assert answer.status_code == 200
    return answer.json()[0]


def classified(client, picture: dict) -> str:
    """The events by which a call answers."""
    asked = client.post(
        "/gradio_api/call/classify", json={"data": [picture, "pizza, rocket", "{}", "diffclip-emoji", "values"]}
    )
    assert asked.status_code == 200, asked.text
    return client.get(f"/gradio_api/call/classify/{asked.json()['event_id']}").text


def functions(client) -> dict[str, int]:
    """What each function of the page is called → its index."""
    return {one["api_name"]: one["id"] for one in client.get("/config").json()["dependencies"]}


@pytest.fixture(scope="module")
def asked():
    """A server's address, and the paths that it was asked for."""
    paths = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET  # noqa: N815 (the standard library's name)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", paths
        server.shutdown()
        thread.join()


def test_an_uploaded_picture_is_classified_through_the_queue(client, uploaded):
    events = classified(client, {"path": uploaded, "meta": {"_type": "gradio.FileData"}})
    assert events.startswith("event: complete")
    assert json.loads(events.partition("data: ")[2])[1]["label"] == "pizza"
    # Without the mark by which Gradio knows files, it's the same file.
    assert '"label": "pizza"' in classified(client, {"path": uploaded})


def test_no_other_file_is_read(client, uploaded, store, asked, tmp_path):
    """Not by the path that a client gives, whatever it looks like, at any door of the queue."""
    address, paths = asked
    private = tmp_path / "private.png"
    private.write_bytes((PICTURES / "snowman.png").read_bytes())
    (store / "linked.png").symlink_to(private)
    (store / "folder").symlink_to(tmp_path)
    own = Path(uploaded)
    given = [
        *(str(private), "/etc/passwd", "../../../../etc/passwd", f"{store}/../{tmp_path.name}/private.png"),
        *(f"{own.parent}/../{own.parent.name}/{own.name}", f"{store}/linked.png", f"{store}/folder/private.png"),
        *(str(own.parent), f"{own}\0", f"{own}/", f"//{own}", f"file://{own}", f"{own}?", "", " ", f"{own}x"),
        *(f"{address}/path", address.replace("http", "HTTP") + "/path", "ftp://127.0.0.1/x", "data:,x", "~", "."),
        *(os.path.relpath(uploaded), [uploaded], {"path": "/etc/passwd"}, 1, True),
    ]
    marks = ({}, {"meta": {"_type": "gradio.FileData"}})
    texts = ["pizza", "{}", "diffclip-emoji", "values"]
    index = functions(client)["classify"]
    for path in given:
        for mark in marks:
            picture = {"path": path, **mark}
            for door, body in {
                "call/classify": {"data": [picture, *texts]},
                "call/v2/classify": {"upload": picture, "labels": "pizza"},
                "queue/join": {"data": [picture, *texts], "fn_index": index, "session_hash": "1"},
            }.items():
                answer = client.post(f"/gradio_api/{door}", json=body)
                assert (answer.status_code, ELSEWHERE in answer.text) == (400, True), (door, path)
    # An address beside no path, or beside a right one, is nothing; one for a path is no file.
    for picture in ({"url": f"{address}/url"}, {"path": uploaded, "url": f"{address}/url"}):
        for mark in marks:
            classified(client, {**picture, **mark})
    # Deep inside, or where no picture belongs.
    for data in (
        [[[{"a": {"path": "/etc/passwd"}}]]],
        [None, {"path": "/etc/passwd"}, "{}", "diffclip-emoji", "values"],
    ):
        assert client.post("/gradio_api/call/classify", json={"data": data}).status_code == 400
    twice = f'{{"data": [{{"path": {json.dumps(uploaded)}, "path": "/etc/passwd"}}]}}'
    assert client.post("/gradio_api/call/classify", content=twice).status_code == 400
    assert paths == []


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "%2Fetc%2Fpasswd",
        "../../etc/passwd",
        "..%2F..%2Fetc%2Fpasswd",
        "%252Fetc%252Fpasswd",
        "STORE",
        "STORE/../passwd",
        "STORE/linked.txt",
        "file:///etc/passwd",
        "ADDRESS/x",
        "",
    ],
)
def test_no_other_file_is_sent(client, uploaded, store, asked, tmp_path, path):
    address, paths = asked
    if not (store / "linked.txt").is_symlink():
        (tmp_path / "private.txt").write_text("private")
        (store / "linked.txt").symlink_to(tmp_path / "private.txt")
    where = path.replace("STORE", str(store)).replace("ADDRESS", address)
    for door in ("file=", "file/"):
        assert client.get(f"/gradio_api/{door}{where}").status_code in (400, 404)
    assert paths == []
    sent = client.get(f"/gradio_api/file={uploaded}")
    assert sent.content == (PICTURES / "pizza.png").read_bytes()


@pytest.mark.parametrize(
    "request_line",
    [
        # Past the queue.
        *("POST run/classify", "POST api/classify", "POST run/predict", "POST run/classify/", "POST %72un/classify"),
        # What Gradio serves beside, and the page doesn't need.
        *(
            "POST component_server",
            "POST stream/1",
            "POST process_recording",
            "POST cancel",
            "GET proxy=http://127.0.0.1",
        ),
        *("GET deep_link", "POST vibe-edit", "GET dev/reload", "GET custom_component/1/client/component/index.js"),
        *("GET openapi.json", "GET runs", "POST run-history/connect", "GET user", "GET token", "GET queue/status"),
        *("GET /monitoring", "GET /monitoring/summary", "POST /login", "GET /docs", "GET /openapi.json", "GET /mcp"),
        *("PUT upload", "DELETE upload", "GET upload", "OPTIONS upload", "TRACE upload", "POST upload/"),
    ],
)
def test_other_doors_are_closed(client, request_line):
    method, _, path = request_line.partition(" ")
    answer = client.request(method, path if path.startswith("/") else f"/gradio_api/{path}")
    assert (answer.status_code, answer.text) == (404, "There is nothing here.")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:7860"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "evil.example@127.0.0.1"}, 403),
        ({"Host": "127.0.0.1/evil.example"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "0.0.0.0"}, 403),
        ({"Host": "localhost:7860"}, 200),
        ({"Host": "LOCALHOST"}, 200),
        ({"Host": "[::1]:1"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:1"}, 200),
    ],
)
def test_the_host_is_checked_on_loopback(client, headers, status):
    assert client.get("/config", headers=headers).status_code == status
    body = {"data": [None], "fn_index": 0, "session_hash": "host"}
    assert client.post("/gradio_api/queue/join", json=body, headers=headers).status_code == status
    files = {"files": ("a.txt", b"a")}
    assert client.post("/gradio_api/upload", files=files, headers=headers).status_code == status


def test_which_hosts_are_right():
    names = {"localhost", "127.0.0.1", "::1"}
    assert host_names("127.0.0.1") == host_names("LocalHost") == host_names("[::1]") == names
    assert host_names("127.1.2.3") == names | {"127.1.2.3"}
    assert host_names("0.0.0.0") is None
    assert host_names("a.example") is None
    assert host_names("0.0.0.0", ["Proxy.example"]) == names | {"0.0.0.0", "proxy.example"}
    for name in ("https://proxy.example", "proxy.example:80", "proxy.example/", "[::1", ""):
        with pytest.raises(ValueError, match="is no host's name"):
            host_names("127.0.0.1", [name])


def through_guard(scope: dict, received: list[dict], store: Path, hosts: frozenset[str] | None, app) -> list[dict]:
    """What the guard sends, as ASGI, of what it receives."""
    sent: list[dict] = []

    async def receive() -> dict:
        return received.pop(0)

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": demo_guard.UPLOAD, "headers": [], **scope}
    asyncio.run(demo_guard.Guard(app, store, hosts)(scope, receive, send))
    return sent


async def begin_answer(scope, receive, send) -> None:
    """An app that answers before it reads."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await receive()


def test_what_is_no_request(tmp_path):
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["type"])

    assert through_guard({"type": "websocket"}, [], tmp_path, None, app) == [{"type": "websocket.close", "code": 1008}]
    assert through_guard({"type": "lifespan"}, [], tmp_path, None, app) == []
    assert seen == ["lifespan"]


@pytest.mark.parametrize(("hosts", "status"), [(None, 200), (frozenset({"localhost"}), 403)])
def test_a_page_that_listens_everywhere_has_any_name(tmp_path, hosts, status):
    scope = {"method": "GET", "path": "/", "headers": [(b"host", b"a.example")]}
    sent = through_guard(scope, [{"type": "http.request"}], tmp_path, hosts, begin_answer)
    assert sent[0]["status"] == status


def test_a_client_that_goes_away_and_a_body_that_grows_too_late(tmp_path, monkeypatch):
    call = {"path": "/gradio_api/queue/join"}
    part = {"type": "http.request", "body": b'{"data', "more_body": True}
    start, body = through_guard(call, [part, {"type": "http.disconnect"}], tmp_path, None, begin_answer)
    assert (start["status"], body["body"]) == (400, b"The request's body ended too early.")
    # A second answer can't follow the first.
    monkeypatch.setattr(demo_guard, "MAX_UPLOAD_BODY", 5)
    with pytest.raises(demo_guard._TooLargeError):
        through_guard({}, [part], tmp_path, None, begin_answer)


def test_the_store_is_swept_while_the_page_is_served(tmp_path, monkeypatch):
    """By a clock two hours on, to which all files are old; what was there before the page stays."""
    monkeypatch.setattr(demo_guard, "SWEEP_EVERY", 0.001)
    monkeypatch.setattr(demo_guard, "time", SimpleNamespace(time=lambda: time.time() + 7200))
    (tmp_path / "example.png").touch()

    async def serve() -> None:
        async with demo_guard.sweeping(tmp_path)(None):
            (tmp_path / "upload.png").touch()
            while (tmp_path / "upload.png").exists():
                await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(serve(), 60))
    assert [path.name for path in tmp_path.iterdir()] == ["example.png"]


def test_bodies_have_a_size(client, store):
    def in_parts(count: int):
        """A body of as many megabytes, whose length isn't announced."""
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        for _ in range(count):
            yield bytes(2**20)
        yield b"\r\n--x--\r\n"

    header = {"Content-Type": "multipart/form-data; boundary=x"}
    assert client.post("/gradio_api/upload", content=in_parts(19), headers=header).status_code == 200
    assert client.post("/gradio_api/upload", content=in_parts(40), headers=header).status_code == 413
    # Of one body, not of each file in it.
    many = [("files", (f"{number}.png", bytes(2**20))) for number in range(30)]
    assert client.post("/gradio_api/upload", files=many).status_code == 413
    assert client.post("/gradio_api/queue/join", content=b" " * 200_001).status_code == 413
    assert client.post("/gradio_api/queue/join", content=iter([bytes(2**20)] * 3)).status_code == 413


@pytest.mark.parametrize("body", ["[" * 100_000, '{"data":' + "[" * 50 + "]" * 50 + "}", "{", "", "\xff", LONG_NAME])
def test_calls_that_cannot_be(client, body):
    assert client.post("/gradio_api/queue/join", content=body.encode("latin-1")).status_code == 400


def test_no_more_is_stored_than_there_may_be(client, uploaded, monkeypatch):
    monkeypatch.setattr(demo_guard, "MAX_STORED_BYTES", 10)
    answer = client.post("/gradio_api/upload", files={"files": ("a.txt", b"a")})
    assert (answer.status_code, "try again" in answer.text) == (507, True)


@pytest.mark.parametrize(
    "data",
    [
        [None, "pizza", "{}", "diffclip-emoji", "values"],
        ["UPLOADED", 5, "{}", "diffclip-emoji", "values"],
        ["UPLOADED", "pizza", ["{}"], "diffclip-emoji", "values"],
        ["UPLOADED", "pizza", "{}", ["diffclip-emoji"], "values"],
        ["UPLOADED", "pizza", "{}", "/etc", "values"],
        ["UPLOADED", "\ud83d", "{}", "diffclip-emoji", "values"],
        ["UPLOADED", "pizza", "{}\ud83d", "diffclip-emoji", "values"],
        [["a"], "pizza", "{}", "diffclip-emoji", "values"],
        ["a", "pizza", "{}", "diffclip-emoji", "values"],
        ["UPLOADED", "pizza", "{}", "diffclip-emoji", "magic"],
        ["UPLOADED", "pizza", "{}", "diffclip-emoji", ["values"]],
    ],
)
def test_values_of_other_kinds_are_refused_and_tell_nothing(client, uploaded, store, data):
    data = [{"path": uploaded} if value == "UPLOADED" else value for value in data]
    body = json.dumps({"data": data}).encode()
    answer = client.post("/gradio_api/call/classify", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200
    events = client.get(f"/gradio_api/call/classify/{answer.json()['event_id']}").text
    assert "event: error" in events
    assert str(store) not in events
    assert "Traceback" not in events
    assert str(ROOT) not in events


def test_the_queue_holds_so_many(client, uploaded, monkeypatch):
    """Here one waits for the model until it's let go, and the queue behind it fills."""
    free, begun = threading.Event(), threading.Event()

    def wait(*_):
        begun.set()
        free.wait(600)
        raise ValueError("enough")

    monkeypatch.setattr(demo, "classify", wait)
    body = {"data": [{"path": uploaded}, "pizza", "{}", "diffclip-emoji", "values"]}
    try:
        statuses = [client.post("/gradio_api/call/classify", json=body).status_code]
        assert begun.wait(600)
        statuses += [client.post("/gradio_api/call/classify", json=body).status_code for _ in range(40)]
    finally:
        free.set()
    assert statuses == [200] * (1 + demo.MAX_WAITING) + [503] * (40 - demo.MAX_WAITING)
    # What was asked last is answered last; then it goes on.
    while (asked := client.post("/gradio_api/call/classify", json=body)).status_code == 503:
        time.sleep(0.01)
    assert "enough" in client.get(f"/gradio_api/call/classify/{asked.json()['event_id']}").text
    monkeypatch.undo()
    assert "event: complete" in classified(client, {"path": uploaded})


def test_an_example_is_chosen_through_the_queue(client):
    index = functions(client)["on_example"]
    for number, labels, words in [(0, "pizza, rocket", ""), (1, "", "no such example"), (-1, 5, "no such example")]:
        body = {"data": [number, labels], "fn_index": index, "session_hash": f"example{number}"}
        assert client.post("/gradio_api/queue/join", json=body).status_code == 200
        events = client.get("/gradio_api/queue/data", params={"session_hash": f"example{number}"}).text
        if number:
            assert words in events
        else:
            picture, kept = next(
                event["output"]["data"]
                for line in events.splitlines()
                if (event := json.loads(line.removeprefix("data: ") or "{}")).get("msg") == "process_completed"
            )
            assert kept == labels
            assert '"label": "rocket"' in classified(client, {"path": picture["path"]})


def test_the_store_is_private_and_goes_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    with private_store() as store:
        assert store.parent == tmp_path / "uploads"
        assert store.stat().st_mode & 0o777 == 0o700
        assert os.environ["GRADIO_TEMP_DIR"] == str(store)
        (store / "hash").mkdir()
        (store / "hash" / "picture.png").touch()
        assert uploaded_file(str(store / "hash" / "picture.png"), store)
    assert os.environ["GRADIO_TEMP_DIR"] == str(tmp_path / "uploads")
    assert list((tmp_path / "uploads").iterdir()) == []


def test_what_is_old_is_swept(tmp_path):
    (tmp_path / "hash").mkdir()
    for name in ("kept.png", "hash/picture.png", "tmp-half"):
        (tmp_path / name).touch()
    (tmp_path / "linked").symlink_to(tmp_path.parent)
    sweep(tmp_path, {tmp_path / "kept.png"}, seconds=3600)
    assert len(list(tmp_path.iterdir())) == 4
    sweep(tmp_path, {tmp_path / "kept.png"}, seconds=-1)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.parent == tmp_path) == [
        "hash",
        "kept.png",
        "linked",
    ]
    assert list((tmp_path / "hash").iterdir()) == []


def test_examples_say_nothing_of_where_they_were_taken(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (48.0, 8.0, 13.0)
    Image.new("RGB", (2000, 1000), (9, 8, 7)).save(tmp_path / "photo.jpg", exif=exif, icc_profile=b"profile")
    with Image.open(tmp_path / "photo.jpg") as photo:
        assert photo.getexif().get_ifd(ExifTags.IFD.GPSInfo)
    (path,) = prepare_examples([tmp_path / "photo.jpg"], tmp_path / "examples")
    assert path.name == "00-photo.png"
    with Image.open(path) as image:
        assert (image.mode, image.size, dict(image.info), dict(image.getexif())) == ("RGB", (512, 1024), {}, {})
    (tmp_path / "text.png").write_text("text")
    (tmp_path / "linked.png").symlink_to(path)
    for name, words in {"text.png": "isn't a picture", "linked.png": "is a link"}.items():
        with pytest.raises(ValueError, match=words):
            prepare_examples([tmp_path / name], tmp_path / "others")
