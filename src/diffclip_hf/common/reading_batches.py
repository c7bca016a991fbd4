"""Batches of pictures read by several processes or threads, in order, with the errors of reading one by one.

Processes read many pictures that can be sent, for threads would wait for Python's lock at each of a picture's small
steps. They're forked, so that no script is imported again, and put pixel values into memory that is shared with them.
Threads read whatever can't be sent, such as open files, and where processes can't be forked.

torch's `DataLoader` doesn't do it: its processes end only when nothing refers to it any more, so the traceback of an
error, which a notebook keeps, keeps them too, and one that's killed raises wherever the caller is. Its tensors need
`/dev/shm`, of which a container usually has 64 MB.
"""

import ctypes
import math
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from itertools import count, islice
from typing import Any, TypeVar

import numpy as np
import torch

from .reading_ahead import in_order, read_ahead


Item = TypeVar("Item")
# From so many items on it's worth starting processes, which takes some 0.05 s.
LEAST_FORKED = 16
# Items that are sent to a process at once.
MOST_SENT = 8
# A float32 picture of up to 590×590 pixels; larger values are sent through a pipe, which takes longer.
PLACE_BYTES = 1 << 22
# Memory that a process keeps from picture to picture. glibc would give it back and take it anew, page by page, which
# is a third of the time of a 12-megapixel JPEG. The names are those of malloc.h.
KEPT_BYTES = 1 << 28
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
# How far processes stand back where they give way.
NICENESS = 10


def read_batches(
    items: Iterable[Item],
    read: Callable[[Item], tuple[torch.Tensor | None, Any]],
    batch_size: int,
    num_workers: int,
    total: int | None = None,
    *,
    topped_up: bool = True,
    sendable: bool = False,
    gives_way: bool = False,
) -> Generator[tuple[torch.Tensor, list[Any]], None, None]:
    """Yield batches of what `read` returns of pictures, at most a batch and 16 pictures a worker ahead.

    Order, errors and end are those of `read_ahead`; a batch of which a picture can't be read isn't yielded.

    Args:
        items: Taken in the caller's thread.
        read: Returns an item's pixel values, (1, ...), of one shape and dtype for all, or None to leave it out of the
            batch; and anything else.
        batch_size: How many items are in a batch; in the last there may be fewer.
        num_workers: How many processes or threads; of 0 and 1 none.
        total: How many items there are, if that's known.
        topped_up: As in `read_ahead`; if it's off, a batch is read at a time.
        sendable: Whether the items, and what `read` returns of them, can be sent to another process and back. If so,
            processes read 16 items and more, on Linux, in the main thread of a process that may have others (a
            daemonic one may not), where /dev/shm can be written and torch's default device is the CPU; elsewhere
            threads do.
        gives_way: Whether processes leave the cores to what the caller computes there, when both want them: the
            threads of a model on the CPU wait for each other, so that one that's held up holds up all.

    Returns:
        An iterator over the pixel values of a batch, (items, ...), which those of another may replace when the next
        batch is asked for; and what else is returned of each item.

    Raises:
        ValueError: Pixel values of a batch differ in shape.
        ChildProcessError: A process was killed.
    """
    ahead = batch_size + 2 * MOST_SENT * num_workers if topped_up else batch_size
    ahead = ahead if total is None else min(ahead, total)
    num_workers = min(num_workers, ahead)
    if sendable and topped_up and num_workers > 1 and ahead >= LEAST_FORKED and _can_fork():
        yield from _read_by_processes(items, read, batch_size, num_workers, ahead, NICENESS if gives_way else 0)
        return
    with closing(read_ahead(items, read, num_workers, ahead, topped_up=topped_up)) as found:
        while batch := list(islice(found, batch_size)):
            yield _joined(pixels for pixels, _ in batch), [rest for _, rest in batch]


def _joined(rows: Iterable[torch.Tensor | None]) -> torch.Tensor:
    """Return the rows that there are as one tensor.

    On a CPU that's done by one core, for torch's other threads would wait beside those that read.
    """
    there = [row for row in rows if row is not None]
    if not there or any(row.device.type != "cpu" for row in there):
        return torch.cat(there) if there else torch.empty(0)
    return torch.from_numpy(np.concatenate([row.numpy() for row in there]))


def _can_fork() -> bool:
    """Say whether processes can be forked here: on Linux, in the main thread of a process that may have others."""
    if (
        sys.platform != "linux"
        or threading.current_thread() is not threading.main_thread()
        or multiprocessing.current_process().daemon
        or torch.get_default_device().type != "cpu"
    ):
        return False
    # They lock their queues, for which the system needs a /dev/shm that can be written, but next to nothing of it.
    try:
        multiprocessing.get_context("fork").Lock()
    except (ImportError, OSError):
        return False
    return True


def _place(memory: torch.Tensor, first: int, rows: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return where the pixel values of so many pictures of a batch are, from that of a number on, each of a shape.

    `memory` is uint8, (batches, batch_size, PLACE_BYTES); batches use it in turn, and a batch's values stand together.
    """
    batch, row = divmod(first, memory.shape[1])
    size = math.prod(shape)
    values = memory[batch % len(memory)].view(-1).view(dtype)
    return values[row * size : (row + rows) * size].view(rows, *shape)


def _gathered(memory: torch.Tensor, first: int, sent: Sequence[Any]) -> torch.Tensor:
    """Return a batch, of whose pictures each is a shape and dtype if it's in its place, a tensor or None."""
    kinds = {row for row in sent if isinstance(row, tuple)}
    if len(kinds) > 1:
        shapes = " and ".join(str(tuple(shape)) for shape, _ in kinds)
        raise ValueError(f"Pixel values of one batch have the shapes {shapes}; they must have one shape.")
    if kinds and all(isinstance(row, tuple) for row in sent):
        return _place(memory, first, len(sent), *kinds.pop())
    rows = [_place(memory, n, 1, *row) if isinstance(row, tuple) else row for n, row in enumerate(sent, first)]
    return _joined(rows)


# What a forked process reads with, and where it puts what it has read.
_in_process: tuple[Callable[[Any], Any], torch.Tensor]


def _start_process(read: Callable[[Any], Any], memory: torch.Tensor, niceness: int) -> None:
    global _in_process
    os.nice(niceness)
    _in_process = read, memory
    torch.set_num_threads(1)
    _keep_freed_memory()
    # The caller's process is interrupted too, and ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_caller, daemon=True).start()


def _keep_freed_memory() -> None:
    """Let this process keep memory that it frees, up to `KEPT_BYTES`, where its C library is glibc."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def _end_with_caller() -> None:
    caller = multiprocessing.parent_process()
    assert caller is not None
    caller.join()
    os._exit(1)


def _read_in_process(first: int, sent_items: bytes) -> bytes:
    """Return what is read of each item, up to the first that can't be, and its error with that one's cause.

    Both ways bytes are sent, for torch would send tensors through /dev/shm.
    """
    read, memory = _in_process
    found: list[tuple[Any, Any]] = []
    error: Exception | None = None
    try:
        for number, item in enumerate(pickle.loads(sent_items), first):
            pixels, rest = read(item)
            if pixels is not None and pixels.nbytes <= PLACE_BYTES:
                kind = pixels.shape[1:], pixels.dtype
                _place(memory, number, 1, *kind).copy_(pixels)
                pixels = kind
            found.append((pixels, rest))
        return pickle.dumps((found, None, None))
    except Exception as caught:
        error = caught
    try:
        sent = pickle.dumps((found, error, error.__cause__))
        pickle.loads(sent)
        return sent
    except Exception:
        return pickle.dumps((found, RuntimeError(f"{type(error).__name__}: {error}"), None))


@contextmanager
def _forked(number: int, *start_with: Any) -> Iterator[ProcessPoolExecutor]:
    """Give so many processes, each started by `_start_process`, and end them."""
    context = multiprocessing.get_context("fork")
    processes = ProcessPoolExecutor(number, context, initializer=_start_process, initargs=start_with)
    # Else tokenizers would warn in each process that it doesn't use its threads there; none uses a tokenizer.
    parallel = os.environ.get("TOKENIZERS_PARALLELISM")
    try:
        with warnings.catch_warnings():
            # Of Python 3.12 and later, for locks that other threads may hold; torch's aren't used there.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            os.environ["TOKENIZERS_PARALLELISM"] = parallel or "false"
            try:
                processes.submit(int)
            finally:
                if parallel is None:
                    del os.environ["TOKENIZERS_PARALLELISM"]
        yield processes
    except BrokenProcessPool:
        raise ChildProcessError(
            "A process that reads pictures was killed, perhaps for want of memory; num_workers=1 starts no processes."
        ) from None
    finally:
        processes.shutdown(cancel_futures=True)


def _read_by_processes(
    items: Iterable[Item], read: Callable[[Item], Any], batch_size: int, num_workers: int, ahead: int, niceness: int
) -> Iterator[tuple[torch.Tensor, list[Any]]]:
    batch_size = min(batch_size, ahead)
    # The one that is in use or in the making, and what is ahead, which may begin and end within batches.
    held = ahead // batch_size + 2
    # Not in /dev/shm, which may be small.
    memory = torch.frombuffer(mmap.mmap(-1, held * batch_size * PLACE_BYTES), dtype=torch.uint8)
    memory = memory.view(held, batch_size, PLACE_BYTES)
    with _forked(num_workers, read, memory, niceness) as processes:

        def start(first: int, chunk: list[Item]) -> Iterator[tuple[Any, Any]]:
            return _received(processes.submit(_read_in_process, first, pickle.dumps(chunk)))

        at_once = max(1, min(MOST_SENT, ahead // (3 * num_workers)))
        found = in_order(start, items, at_once, ahead, True)
        for first in count(0, batch_size):
            if not (sent := list(islice(found, batch_size))):
                break
            rows, rest = zip(*sent, strict=True)
            yield _gathered(memory, first, rows), list(rest)


def _received(future: Future[bytes]) -> Iterator[tuple[Any, Any]]:
    """Yield what `_read_in_process` returns, and raise its error."""
    found, error, cause = pickle.loads(future.result())
    yield from found
    if error is not None:
        raise error from cause


__all__ = ["read_batches"]
