"""What stands before the web demo: which requests Gradio gets to see, and where what is uploaded lies, and how long.

Gradio serves more than a page needs: calls that pass its queue by, files of other addresses, recordings, a proxy. Of
all that, `Guard` lets through what the page, `gradio_client` and curl need. It reads the body of every call, and lets
it through if the files in it are ones that were uploaded here: Gradio itself downloads an address that is given in a
picture's place, and believes a path that is given without the mark by which it knows files.
"""

import asyncio
import contextlib
import ipaddress
import json
import os
import re
import tempfile
import time
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


# An uploaded picture; its request has a little more, and calls have texts alone.
MAX_MEGABYTES = 20
MAX_UPLOAD_BODY, MAX_CALL_BODY, MAX_DEPTH = MAX_MEGABYTES * 2**20 + 100_000, 200_000, 20
MAX_SESSION_NAME = 100
# Of all that is stored at a time.
MAX_STORED_BYTES = 2_000_000_000
# How long it is, in seconds, and how often that's looked at.
MAX_AGE, SWEEP_EVERY = 3600, 60
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
UPLOAD, FILES = "/gradio_api/upload", "/gradio_api/file="
_READ = re.compile(
    r"/|/config/?|(/gradio_api)?/theme\.css|/robots\.txt|/manifest\.json|/favicon\.ico|/(assets|static|svelte)/.+"
    r"|/gradio_api/(app_id|startup-events|info|queue/data|upload_progress|heartbeat/[^/]+|call/[^/]+/[^/]+|file=.+)/?"
)
# All of these go through the queue.
_CALL = re.compile(r"/gradio_api/(queue/join|call/(v2/)?[^/]+|reset)/?")


class _TooLargeError(Exception):
    """A body has more bytes than its door lets through."""


class _RefusedError(Exception):
    """A request doesn't get through: the status, and a line that says why."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


def uploaded_file(path: Any, store: Path) -> Path:
    """Return a file that lies in the store, after all links.

    Args:
        path: What a client gave.
        store: The folder that `private_store` gives.

    Raises:
        ValueError: It's no such file: there's none, it's elsewhere, or a link leads to it.
    """
    # First the path as it's written, so that nothing elsewhere is so much as looked at.
    inside = isinstance(path, str) and Path(path).is_relative_to(store)
    if inside and os.path.isfile(path) and os.path.realpath(path) == path:
        return Path(path)
    raise ValueError("The picture isn't among those that were uploaded here, or was deleted since; upload it again.")


@contextlib.contextmanager
def private_store() -> Iterator[Path]:
    """Give Gradio a folder for what it stores, which only this user can look into and which goes in the end.

    It's in the folder of the environment's `GRADIO_TEMP_DIR`, which leads to it meanwhile, or else in the system's for
    temporary files.
    """
    given = os.environ.get("GRADIO_TEMP_DIR")
    if given:
        Path(given).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="diffclip-demo-", dir=given or None, ignore_cleanup_errors=True) as name:
        store = Path(name).resolve()
        os.environ["GRADIO_TEMP_DIR"] = str(store)
        try:
            yield store
        finally:
            del os.environ["GRADIO_TEMP_DIR"]
            if given:
                os.environ["GRADIO_TEMP_DIR"] = given


def stored_files(store: Path) -> dict[Path, os.stat_result]:
    """Return every file of the store and what the file system says of it."""
    found = {}
    for path in store.rglob("*"):
        # Another one may go meanwhile.
        with contextlib.suppress(FileNotFoundError):
            if not path.is_dir():
                found[path] = path.lstat()
    return found


def sweep(store: Path, kept: Collection[Path], seconds: float = MAX_AGE) -> None:
    """Delete the store's files that are older than so many seconds, but for some; half an upload is among them."""
    for path, status in stored_files(store).items():
        # When it was put there: a picture's own time may be any.
        if path not in kept and time.time() - status.st_ctime > seconds:
            path.unlink(missing_ok=True)


def sweeping(store: Path) -> Any:
    """Return a lifespan, as Starlette takes it, in which the store is swept; what is there before it stays."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        kept = frozenset(stored_files(store))

        async def keep_sweeping() -> None:
            while True:
                await asyncio.sleep(SWEEP_EVERY)
                await asyncio.to_thread(sweep, store, kept)

        task = asyncio.create_task(keep_sweeping())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    return lifespan


def host_names(host: str, more: Sequence[str] = ()) -> frozenset[str] | None:
    """Return the names that requests must be for, lower-case, or None for any.

    Where a page listens on loopback, another page in the same browser can have its own name lead there too, and then
    counts as the same (DNS rebinding). Any port is right, since tunnels have their own.

    Args:
        host: The address that is listened at.
        more: Names that are right too, such as a proxy's.

    Raises:
        ValueError: One of these is no name.
    """
    for name in more:
        if _name_of(f"//{name}") != name.strip("[]").lower():
            raise ValueError(f"{name!r} is no host's name, such as demo.example; give it without port and address.")
    bare = host.strip("[]").lower()
    try:
        loopback = ipaddress.ip_address(bare).is_loopback
    except ValueError:
        loopback = bare == "localhost"
    if not loopback and not more:
        return None
    return frozenset(name.strip("[]").lower() for name in (*LOOPBACK_NAMES, bare, *more))


def _name_of(address: str) -> str | None:
    """Return the host's name in an origin, or, with `//` before it, in a `Host` header; None where it isn't one."""
    if not re.fullmatch(r"(https?:)?//[^/?#@\\]+", address, re.IGNORECASE):
        return None
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


class Guard:
    """Let through to Gradio what the page needs, as ASGI middleware.

    Args:
        app: What comes behind.
        store: The folder that `private_store` gives.
        hosts: The names that requests must be for, or None for any.
    """

    def __init__(self, app: ASGIApp, store: Path, hosts: frozenset[str] | None):
        self.app, self.store, self.hosts = app, store, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            # The page has no web sockets; this refuses one.
            await send({"type": "websocket.close", "code": 1008})
            return
        body = _Body(receive)
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            self._check_names(Headers(scope=scope))
            await self.app(scope, await self._checked(scope, body), watched)
        except (_RefusedError, _TooLargeError) as error:
            if started:
                raise
            refused = (
                error if isinstance(error, _RefusedError) else _RefusedError(413, "The request's body is too large.")
            )
            await body.drain()
            await PlainTextResponse(refused.reason, refused.status)(scope, receive, send)

    def _check_names(self, headers: Headers) -> None:
        """Refuse a request for another host, or from another host's page."""
        if self.hosts is None:
            return
        given = [f"//{value}" for value in headers.getlist("host")]
        if len(given) != 1 or _name_of(given[0]) not in self.hosts:
            raise _RefusedError(403, "This page isn't served under that name; see --allowed-host.")
        if any(_name_of(origin) not in self.hosts for origin in headers.getlist("origin")):
            raise _RefusedError(403, "Another page can't use this one.")

    async def _checked(self, scope: Scope, body: "_Body") -> Receive:
        """Return what gives a request's body to Gradio, after a look at the request and, of a call, at the body."""
        path = scope["path"]
        if scope["method"] in ("GET", "HEAD") and _READ.fullmatch(path):
            if path.startswith(FILES):
                self._check_file(path.removeprefix(FILES), 404)
        elif scope["method"] == "POST" and path == UPLOAD:
            stored = await asyncio.to_thread(stored_files, self.store)
            if sum(status.st_size for status in stored.values()) > MAX_STORED_BYTES:
                raise _RefusedError(507, "Too many pictures are stored already; try again in an hour.")
            body.most = MAX_UPLOAD_BODY
        elif scope["method"] == "POST" and _CALL.fullmatch(path):
            body.replace(self._check_call(await body.read()))
        else:
            raise _RefusedError(404, "There is nothing here.")
        return body.receive

    def _check_file(self, path: Any, status: int) -> None:
        try:
            uploaded_file(path, self.store)
        except ValueError as error:
            raise _RefusedError(status, str(error)) from error

    def _check_call(self, body: bytes) -> bytes:
        """Return a call's body as it was understood, so that nobody understands it otherwise."""
        try:
            content = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise _RefusedError(400, "The request's body isn't JSON, or is nested too deeply.") from error
        if isinstance(content, dict) and len(str(content.get("session_hash"))) > MAX_SESSION_NAME:
            raise _RefusedError(400, f"session_hash may have up to {MAX_SESSION_NAME} characters.")
        parts = [(content, 0)]
        while parts:
            part, depth = parts.pop()
            if depth > MAX_DEPTH:
                raise _RefusedError(400, f"The request's body is nested more than {MAX_DEPTH} levels deep.")
            if isinstance(part, dict):
                if part.get("path") is not None:
                    self._check_file(part["path"], 400)
                # Gradio makes the address anew from the path.
                part.pop("url", None)
            if isinstance(part, (dict, list)):
                inside = part.values() if isinstance(part, dict) else part
                parts.extend((one, depth + 1) for one in inside)
        return json.dumps(content).encode()


class _Body:
    """A request's body, as it is received.

    Args:
        receive: What the server gives.

    Attributes:
        most: How many bytes it may have.
    """

    def __init__(self, receive: Receive):
        self._receive, self._size, self._ended = receive, 0, False
        self._instead: Message | None = None
        self.most = MAX_CALL_BODY

    async def receive(self) -> Message:
        """Receive the next part.

        Raises:
            _TooLargeError: There are more than `most` bytes.
        """
        if self._instead is not None:
            message, self._instead = self._instead, None
            return message
        message = await self._receive()
        self._size += len(message.get("body", b""))
        self._ended = self._ended or not message.get("more_body", False)
        if self._size > self.most:
            raise _TooLargeError
        return message

    async def read(self) -> bytes:
        """Return all of it."""
        parts = []
        while not self._ended:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise _RefusedError(400, "The request's body ended too early.")
            parts.append(message.get("body", b""))
        return b"".join(parts)

    def replace(self, body: bytes) -> None:
        """Let `receive` give another body first."""
        self._instead = {"type": "http.request", "body": body, "more_body": False}

    async def drain(self) -> None:
        """Read what is left, up to some times what is allowed, so that a client comes to read the answer."""
        self.most = self._size + 10 * MAX_UPLOAD_BODY
        with contextlib.suppress(_TooLargeError):
            while not self._ended:
                await self.receive()


__all__ = ["MAX_MEGABYTES", "Guard", "host_names", "private_store", "sweep", "sweeping", "uploaded_file"]
