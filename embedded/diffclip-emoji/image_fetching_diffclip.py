"""Files from the web and from other file systems, within a time and a size."""

import os
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any


URL_SECONDS, URL_MEGABYTES, URL_REDIRECTS = 30, 50, 5


def one_line(error: BaseException, longest: int = 1000) -> str:
    """Return an error's message in one line, of at most so many characters; its type where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= longest else f"{text[:longest]}…"


def _read_within(response: Any, deadline: float) -> bytes:
    """Return a response's body, if it's small enough and there in time."""
    chunks, size = [], 0
    while chunk := response.read1(1 << 16):
        chunks.append(chunk)
        size += len(chunk)
        if size > URL_MEGABYTES * 1_000_000:
            raise ValueError(f"it is larger than {URL_MEGABYTES} MB")
        if time.monotonic() > deadline:
            raise TimeoutError
    if response.length:
        raise ValueError(f"it ended {response.length} bytes too early")
    return b"".join(chunks)


def _download(url: str, deadline: float) -> bytes:
    """Return what is at a URL, after up to 5 redirects to other http(s) URLs."""
    # Without urllib's own handler of redirects, which reads their bodies whole and goes on to FTP.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    for _ in range(URL_REDIRECTS + 1):
        if not is_url(url):
            raise ValueError(f"it leads to {url!r:.200}, which isn't an http(s) URL")
        headers = {"User-Agent": "diffclip-hf", "Accept": "image/*,*/*;q=0.5"}
        request = urllib.request.Request(_in_ascii(url), headers=headers)
        try:
            with opener.open(request, timeout=max(deadline - time.monotonic(), 0.001)) as response:
                # A part of a file, as of status 206, isn't the picture.
                if response.status != 200:
                    raise ValueError(f"the server answered with status {response.status} {response.reason}")
                return _read_within(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                location = error.headers.get("Location")
                if error.code not in (301, 302, 303, 307, 308) or not location:
                    raise ValueError(f"the server answered with status {error.code} {error.reason}") from error
                url = urllib.parse.urljoin(url, location)
    raise ValueError(f"it is redirected more than {URL_REDIRECTS} times")


def _in_ascii(url: str) -> str:
    """Quote spaces and letters beyond ASCII, as browsers do."""
    parts = urllib.parse.urlsplit(url.strip())
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    return urllib.parse.quote(parts._replace(netloc=host).geturl(), safe="%/:=&?~#+!$,;'@()*[]")


def _in_time(work: Callable[[], bytes]) -> bytes:
    """Return what a function returns, if it does so within 30 seconds; what it raises is raised here.

    A socket's own limit is of each read, and a server can send a byte of its headers at a time for ever.
    """
    result: list[bytes | Exception] = []

    def run() -> None:
        try:
            result.append(work())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(URL_SECONDS)
    if not result:
        raise TimeoutError
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def fetch_url(url: str) -> bytes:
    """Return what is at a URL.

    Raises:
        ValueError: The server can't be reached, doesn't answer with status 200 and the whole file within 30 seconds,
            or sends more than 50 MB.
    """
    # Whatever a server says and a network does.
    try:
        return _in_time(lambda: _download(url, time.monotonic() + URL_SECONDS))
    except Exception as error:
        raise ValueError(f"The URL {url!r:.200} can't be read: {_reason(error)}.") from error


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", error)
    return f"it took longer than {URL_SECONDS} seconds" if isinstance(reason, TimeoutError) else one_line(reason, 300)


def is_url(text: str) -> bool:
    return re.match(r"https?://", text, re.IGNORECASE) is not None


def is_elsewhere(path: str) -> bool:
    """Say whether a path is of another file system, such as a zip file's."""
    return not os.path.exists(path) and re.match(r"[a-z][a-z0-9+]+://", path) is not None


def read_elsewhere(path: str) -> bytes:
    """Return a file of another file system, as `datasets` reads it, within 30 seconds and 50 MB."""

    def work() -> bytes:
        # What huggingface_hub brings.
        import fsspec

        with fsspec.open(path, "rb") as file:
            return file.read(URL_MEGABYTES * 1_000_000 + 1)

    # Each file system has errors of its own.
    try:
        data = _in_time(work)
    except (FileNotFoundError, KeyError) as error:
        raise ValueError(f"There is no file {path!r:.200}.") from error
    except Exception as error:
        raise ValueError(f"The file {path!r:.200} can't be read: {_reason(error)}") from error
    if len(data) > URL_MEGABYTES * 1_000_000:
        raise ValueError(f"The file {path!r:.200} is larger than {URL_MEGABYTES} MB.")
    return data


__all__ = ["fetch_url", "is_elsewhere", "is_url", "one_line", "read_elsewhere"]
