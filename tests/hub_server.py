"""A small Hugging Face Hub on loopback, for huggingface_hub's and Transformers' own client code.

It speaks the part of the Hub's HTTP interface that loading and pushing a model use: commits, branches, LFS objects
that are served from another host by redirect, bearer tokens, private and gated repositories. Failures are injected by
`HubServer.fail`. Every commit is all or nothing.
"""

import base64
import hashlib
import io
import json
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit


WRITER, READER = "hf_writer", "hf_reader"  # the tokens: WRITER's user belongs to the organisation "org"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt")
TREE_PAGE = 5
CHUNK = 1 << 16


@dataclass(frozen=True)
class File:
    """A file of a commit: its bytes, or for LFS the name of its object."""

    content: bytes = b""
    sha256: str | None = None
    size: int = 0

    @property
    def oid(self) -> str:
        """The hash that the Hub compares by, and gives as ETag: git's of the blob, for LFS the content's SHA-256."""
        if self.sha256 is not None:
            return self.sha256
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repository:
    """Commits, each a whole tree, and branches."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, File]) -> str:
        tree = json.dumps({path: file.oid for path, file in files.items()}, sort_keys=True)
        commit = hashlib.sha1(f"{len(self.commits)} {tree}".encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit


@dataclass
class Failure:
    """What goes wrong with requests whose method and path fit, the first `times` of them.

    Attributes:
        status, headers: Answer with these and do nothing.
        cut: Close the connection at half of the request's body or, of a download, of the answer's.
        flip_at: Index of the byte of the answer's body that is sent wrong.
        lose_answer: Do what was asked, and close the connection instead of answering.
        before: Called before the request is dealt with.
    """

    method: str
    path: str
    times: int
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    flip_at: int | None = None
    lose_answer: bool = False
    before: Callable[[], object] | None = None


class Refusal(Exception):  # noqa: N818 - an answer, not a defect
    """An error answer of the Hub."""

    def __init__(self, status: int, code: str = "", message: str = "", **body: str):
        self.status, self.code, self.message, self.body = status, code, message, body


@dataclass
class Answer:
    """Status, headers, and bytes or a file."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | Path = b""

    @classmethod
    def of(cls, content: object, status: int = 200, headers: dict[str, str] | None = None) -> "Answer":
        return cls(status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(content).encode())


class HubServer:
    """A context manager around the server; `url` is what HF_ENDPOINT has to be.

    Attributes:
        repositories: `org/name` → repository, for tests to look at.
        requests: (method, path, status) of every request that was answered; status 0 for a connection that was cut.
    """

    def __init__(self, folder: Path):
        self.objects = folder / "lfs-objects"
        self.objects.mkdir(parents=True)
        self.repositories: dict[str, Repository] = {}
        self.failures: list[Failure] = []
        self.requests: list[tuple[str, str, int]] = []
        self.tokens = {WRITER: {"org"}, READER: set()}
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        port = self._server.server_address[1]
        # The same server under another name is another host to the client, as the Hub's content network is.
        self.url, self.cdn = f"http://127.0.0.1:{port}", f"http://localhost:{port}/cdn"

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Return the environment of a client process with its cache in `home`, reaching this server only."""
        proxies = {"http_proxy", "https_proxy", "all_proxy"}
        kept = {
            name: value
            for name, value in os.environ.items()
            if name.lower() not in proxies and not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
        }
        ours = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
        return kept | ours | ({"HF_TOKEN": token} if token else {})

    def fail(self, method: str, path: str, times: int = 1, **what) -> None:
        """Inject a failure; `path` is a regular expression, found anywhere in the path."""
        self.failures.append(Failure(method, path, times, **what))

    def add(self, repo: str, folder: Path, branch: str = "main", **options) -> str:
        """Make a commit of a folder's files without going through HTTP, and return it."""
        repository = self.repositories.setdefault(repo, Repository(**options))
        files = {}
        for path in sorted(folder.iterdir()):
            content = path.read_bytes()
            if path.name.endswith(LFS_SUFFIXES):
                sha256 = hashlib.sha256(content).hexdigest()
                (self.objects / sha256).write_bytes(content)
                files[path.name] = File(sha256=sha256, size=len(content))
            else:
                files[path.name] = File(content, size=len(content))
        return repository.commit(branch, files)

    def head(self, repo: str, branch: str = "main") -> dict[str, File]:
        """Return a branch's files."""
        repository = self.repositories[repo]
        return repository.commits[repository.branches[branch]]

    def count(self, method: str, path: str) -> int:
        """Return how many requests of a method had a path that fits."""
        return sum(sent == method and re.search(path, where) is not None for sent, where, _ in self.requests)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Keep the tests' output clean; `HubServer.requests` is the log."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 - the names that http.server looks for

    # Requests and answers ---------------------------------------------------------------------------------------

    def _answer(self) -> None:
        failure = self._next_failure()
        length = int(self.headers.get("Content-Length") or 0)
        if failure is not None and failure.cut and self.command in ("POST", "PUT"):
            self.rfile.read(length // 2)
            return self._cut()
        # The content of a large file is never in memory as a whole.
        self.incoming = self.hub.objects / f"incoming-{uuid.uuid4().hex}"
        try:
            if self.command == "PUT":
                self.body = b""
                with self.incoming.open("wb") as file:
                    file.writelines(self._pieces(length))
            else:
                self.body = b"".join(self._pieces(length))
            return self._act(failure)
        finally:
            self.incoming.unlink(missing_ok=True)

    def _act(self, failure: Failure | None) -> None:
        if failure is not None and failure.status is not None:
            code = failure.headers.get("X-Error-Code", "")
            return self._send(self._refused(Refusal(failure.status, code, "injected"), failure.headers))
        try:
            with self.hub.lock:
                if failure is not None and failure.before is not None:
                    failure.before()
                answer = self._route()
        except Refusal as refusal:
            answer = self._refused(refusal)
        if failure is not None and failure.lose_answer:
            return self._cut()
        return self._send(answer, failure)

    def _next_failure(self) -> Failure | None:
        with self.hub.lock:
            for failure in self.hub.failures:
                if failure.times > 0 and failure.method == self.command and re.search(failure.path, self.path):
                    failure.times -= 1
                    return failure
        return None

    def _pieces(self, length: int) -> Iterator[bytes]:
        """Yield the request's body."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            for start in range(0, length, CHUNK):
                yield self.rfile.read(min(CHUNK, length - start))
            return
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _cut(self) -> None:
        self.hub.requests.append((self.command, self.path, 0))
        self.close_connection = True
        self.connection.close()

    @staticmethod
    def _refused(refusal: Refusal, headers: dict[str, str] | None = None) -> Answer:
        names = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
        return Answer.of({"error": refusal.message, **refusal.body}, refusal.status, names | (headers or {}))

    def _send(self, answer: Answer, failure: Failure | None = None) -> None:
        size = answer.body.stat().st_size if isinstance(answer.body, Path) else len(answer.body)
        start, status, headers = 0, answer.status, dict(answer.headers)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and status == 200 and int(asked[1]) < size:
            start, status = int(asked[1]), 206
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        self.send_response(status)
        for name, value in ({"Content-Length": str(size - start)} | headers).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        cut = failure is not None and failure.cut
        if self.command != "HEAD":
            end = start + (size - start) // 2 if cut else size
            self._send_body(answer.body, start, end, failure.flip_at if failure else None)
        if cut:
            return self._cut()
        self.hub.requests.append((self.command, self.path, status))

    def _send_body(self, body: bytes | Path, start: int, end: int, flip_at: int | None) -> None:
        with body.open("rb") if isinstance(body, Path) else io.BytesIO(body) as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(start)
            for position in range(start, end, CHUNK):
                piece = bytearray(file.read(min(CHUNK, end - position)))
                if flip_at is not None and 0 <= flip_at % size - position < len(piece):
                    piece[flip_at % size - position] ^= 0xFF
                self.wfile.write(piece)

    # Who may do what --------------------------------------------------------------------------------------------

    def _token(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        token = header.removeprefix("Bearer ")
        if token not in self.hub.tokens:
            raise Refusal(401, message="Invalid credentials in Authorization header")
        return token

    def _may_write(self, owner: str) -> None:
        token = self._token()
        if token is None:
            raise Refusal(401, message="Invalid username or password.")
        if owner not in self.hub.tokens[token]:
            raise Refusal(403, message=f"You don't have the rights to write in {owner}")

    def _repository(self, repo: str) -> Repository:
        token = self._token()
        repository = self.hub.repositories.get(repo)
        hidden = repository is not None and repository.private
        if repository is None or (hidden and (token is None or repo.split("/")[0] not in self.hub.tokens[token])):
            # The Hub doesn't tell strangers which repositories exist.
            raise Refusal(401 if token is None else 404, "RepoNotFound", "Repository not found")
        return repository

    @staticmethod
    def _commit(repository: Repository, revision: str) -> str:
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # Routes -----------------------------------------------------------------------------------------------------

    def _route(self) -> Answer:
        path = urlsplit(self.path).path
        for methods, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split():
                return action(self, **{name: unquote(value or "") for name, value in match.groupdict().items()})
        raise Refusal(404, message=f"No such endpoint: {self.command} {path}")

    def whoami(self) -> Answer:
        token = self._token()
        if token is None:
            raise Refusal(401, message="Invalid username or password.")
        orgs = [{"name": name, "type": "org"} for name in self.hub.tokens[token]]
        return Answer.of({"type": "user", "name": token, "orgs": orgs, "auth": {"type": "access_token"}})

    def validate_yaml(self) -> Answer:
        content = json.loads(self.body)["content"]
        if content.startswith("---\n") and "\n---\n" in content[4:]:
            return Answer.of({"errors": [], "warnings": []})
        errors = [{"message": "README.md has no front matter"}]
        return Answer.of({"errors": errors, "warnings": []}, 400)

    def create(self) -> Answer:
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or ""
        self._may_write(owner)
        repo = f"{owner}/{wanted['name']}"
        if repo in self.hub.repositories:
            raise Refusal(409, message="You already created this model repo", url=f"{self.hub.url}/{repo}")
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.repositories[repo] = Repository(private=private)
        self.hub.repositories[repo].commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", size=25)})
        return Answer.of({"url": f"{self.hub.url}/{repo}", "name": repo})

    def info(self, repo: str, revision: str = "main") -> Answer:
        repository = self._repository(repo)
        commit = self._commit(repository, revision)
        siblings = [{"rfilename": path} for path in repository.commits[commit]]
        about = {"id": repo, "sha": commit, "private": repository.private, "siblings": siblings, "tags": []}
        return Answer.of(about | {"gated": "manual" if repository.gated else False, "modelId": repo})

    def refs(self, repo: str) -> Answer:
        branches = self._repository(repo).branches.items()
        found = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit} for name, commit in branches]
        return Answer.of({"branches": found, "converts": [], "tags": []})

    @staticmethod
    def _entry(path: str, file: File) -> dict:
        entry = {"type": "file", "path": path, "size": file.size, "oid": file.oid}
        if file.sha256:
            entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
        return entry

    def tree(self, repo: str, revision: str, path: str = "") -> Answer:
        repository = self._repository(repo)
        files = repository.commits[self._commit(repository, revision)]
        if path and not any(name.startswith(f"{path}/") for name in files):
            raise Refusal(404, "EntryNotFound", f"{path} does not exist")
        query = parse_qs(urlsplit(self.path).query)
        entries = [self._entry(name, file) for name, file in sorted(files.items()) if name.startswith(path)]
        start = int(query.get("cursor", ["0"])[0])
        following = start + TREE_PAGE
        headers = {}
        if following < len(entries):
            rest = f"{urlsplit(self.path).path}?recursive=true&cursor={following}"
            headers["Link"] = f'<{self.hub.url}{rest}>; rel="next"'
        return Answer.of(entries[start:following], headers=headers)

    def paths_info(self, repo: str, revision: str) -> Answer:
        repository = self._repository(repo)
        files = repository.commits[self._commit(repository, revision)]
        wanted = parse_qs(self.body.decode()).get("paths", [])
        return Answer.of([self._entry(path, files[path]) for path in wanted if path in files])

    def branch(self, repo: str, branch: str) -> Answer:
        repository = self._repository(repo)
        self._may_write(repo.split("/")[0])
        if branch in repository.branches:
            raise Refusal(409, message=f"Reference already exists: {branch}")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repository.branches[branch] = self._commit(repository, start)
        return Answer.of({})

    def preupload(self, repo: str, revision: str) -> Answer:
        repository = self._repository(repo)
        self._may_write(repo.split("/")[0])
        files = repository.commits[self._commit(repository, revision)]
        answers = []
        for wanted in json.loads(self.body)["files"]:
            path = wanted["path"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
            answers[-1]["oid"] = files[path].oid if path in files else None
        return Answer.of({"files": answers})

    def lfs_batch(self, repo: str) -> Answer:
        self._repository(repo)
        self._may_write(repo.split("/")[0])
        answers = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if not (self.hub.objects / wanted["oid"]).exists():
                hrefs = {name: f"{self.hub.url}/{name}/{wanted['oid']}" for name in ("upload", "verify")}
                answer["actions"] = {name: {"href": href} for name, href in hrefs.items()}
            answers.append(answer)
        return Answer.of({"transfer": "basic", "objects": answers})

    def upload(self, oid: str) -> Answer:
        digest = hashlib.sha256()
        with self.incoming.open("rb") as file:
            while piece := file.read(CHUNK):
                digest.update(piece)
        if digest.hexdigest() != oid:
            raise Refusal(400, message="The content's hash isn't the one that was announced")
        self.incoming.rename(self.hub.objects / oid)
        return Answer()

    def verify(self, oid: str) -> Answer:
        wanted, stored = json.loads(self.body), self.hub.objects / oid
        if not stored.exists() or stored.stat().st_size != wanted["size"]:
            raise Refusal(404, message=f"Object {oid} isn't there")
        return Answer.of({})

    def commit(self, repo: str, revision: str) -> Answer:
        repository = self._repository(repo)
        self._may_write(repo.split("/")[0])
        parent = self._commit(repository, revision)
        if revision not in repository.branches:
            raise Refusal(404, "RevisionNotFound", f"{revision} is not a branch")
        files = dict(repository.commits[parent])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                if value.get("parentCommit", parent) != parent:
                    raise Refusal(412, message="A commit has happened since. Please refresh and try again.")
            elif item["key"] == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = File(content, size=len(content))
            elif item["key"] == "lfsFile":
                stored = self.hub.objects / value["oid"]
                if not stored.exists():
                    raise Refusal(400, message=f"LFS object of {value['path']} was not uploaded")
                files[value["path"]] = File(sha256=value["oid"], size=stored.stat().st_size)
            elif item["key"] == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refusal(404, "EntryNotFound", f"{value['path']}: A file with this name doesn't exist")
            else:
                raise Refusal(400, message=f"Unknown operation {item['key']}")
        commit = repository.commit(revision, files)
        return Answer.of({"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit}"})

    def resolve(self, repo: str, revision: str, path: str) -> Answer:
        repository = self._repository(repo)
        if repository.gated and not (self._token() and repo.split("/")[0] in self.hub.tokens[self._token()]):
            message = f"Access to model {repo} is restricted. You must ask its authors for access."
            raise Refusal(403 if self._token() else 401, "GatedRepo", message)
        commit = self._commit(repository, revision)
        file = repository.commits[commit].get(path)
        if file is None:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.oid}"'}
        if file.sha256 is None:
            return Answer(200, headers, file.content)
        linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        return Answer(302, headers | linked | {"Location": f"{self.hub.cdn}/{quote(file.sha256)}"})

    def content(self, oid: str) -> Answer:
        if self.headers.get("Authorization"):
            raise Refusal(400, message="A token must not leave the Hub's own host")
        stored = self.hub.objects / oid
        if not stored.exists():
            raise Refusal(404, message="No such object")
        return Answer(200, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}, stored)


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_MODEL = f"/api/models/{_REPO}"
_REVISION = r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", "/api/repos/create", _Handler.create),
    ("GET", _MODEL, _Handler.info),
    ("GET", f"{_MODEL}/revision/{_REVISION}", _Handler.info),
    ("GET", f"{_MODEL}/refs", _Handler.refs),
    ("GET", f"{_MODEL}/tree/{_REVISION}(?:/(?P<path>.+))?", _Handler.tree),
    ("POST", f"{_MODEL}/paths-info/{_REVISION}", _Handler.paths_info),
    ("POST", f"{_MODEL}/branch/(?P<branch>[^/]+)", _Handler.branch),
    ("POST", f"{_MODEL}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", f"{_MODEL}/commit/{_REVISION}", _Handler.commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/upload/(?P<oid>[0-9a-f]{64})", _Handler.upload),
    ("POST", "/verify/(?P<oid>[0-9a-f]{64})", _Handler.verify),
    ("GET HEAD", "/cdn/(?P<oid>[0-9a-f]{64})", _Handler.content),
    ("GET HEAD", f"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve),
]
