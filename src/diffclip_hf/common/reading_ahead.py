"""Pictures read by several processes or threads: in order, with the errors of reading one by one, and never far ahead.

Processes read many pictures that can be sent: threads would wait for Python's lock at each of a picture's small steps.
They're forked, so that no script is imported again, and pixel values come back in memory that is shared with them.
Threads read whatever can't be sent, such as open files, and where processes can't be forked.
"""

import ctypes
import io
import math
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from contextvars import copy_context
from numbers import Integral
from typing import Any, TypeVar

import numpy as np
import torch


Item = TypeVar("Item")
Read = TypeVar("Read")
# More threads would wait for each other: what Python itself does of a picture, only one of them can do at a time.
MOST_WORKERS = 32
# From so many items on it's worth starting processes, which takes some 0.05 s.
LEAST_FORKED = 16
# Items that are sent to a process at once.
MOST_SENT = 8
# How far processes stand back where they give way.
NICENESS = 10
# A float32 picture of up to 590×590 pixels; larger values are sent through a pipe, which takes longer.
PLACE_BYTES = 1 << 22


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    # Not every system tells.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_num_workers(num_workers: int | None) -> int:
    """Return a number of workers; of None that of the cores, up to 32.

    Raises:
        ValueError: It isn't a whole number of at least 0.
    """
    if num_workers is None:
        return min(usable_cores(), MOST_WORKERS)
    if not isinstance(num_workers, Integral) or isinstance(num_workers, bool) or num_workers < 0:
        raise ValueError(f"num_workers is {num_workers!r}; it must be a whole number of at least 0, or None.")
    return int(num_workers)


def how_far_ahead(batch_size: int, num_workers: int, total: int | None) -> int:
    """Return how many of so many pictures to read ahead: a batch, and 16 for each worker."""
    ahead = batch_size + 2 * MOST_SENT * num_workers
    return ahead if total is None else min(ahead, total)


def joined(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return `torch.cat(rows)`, by one core on a CPU, for torch's other threads would wait beside those that read."""
    if any(row.device.type != "cpu" for row in rows):
        return torch.cat(list(rows))
    return torch.from_numpy(np.concatenate([row.numpy() for row in rows]))


@contextmanager
def _one_core_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Give so many threads, in each of which torch uses one core, and end them.

    What has not begun is dropped in the end, and what has begun is waited for.
    """
    cores = torch.get_num_threads()
    started = threading.Barrier(count + 1)

    def start() -> None:
        # Asked first, for else torch would take the others' number at its first work.
        if torch.get_num_threads() > 1:
            torch.set_num_threads(1)
        started.wait()

    threads = ThreadPoolExecutor(count, "diffclip-reading", initializer=start)
    try:
        try:
            for _ in range(count):
                threads.submit(int)
            started.wait()
        except BaseException:
            # Those that have started would wait for the others for ever.
            started.abort()
            raise
        if cores > 1:
            # It's each thread's own, but what one sets is what later threads begin with.
            torch.set_num_threads(cores)
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)


def _in_callers_state(read: Callable[[Item], Read]) -> Callable[[Item], Read]:
    """Return a function that reads in another thread as it would in this one."""
    device = torch.get_default_device()
    # Entering a device makes each call of torch slower.
    on_device = nullcontext if device.type == "cpu" else lambda: torch.device(device)

    def read_there(item: Item) -> Read:
        with on_device():
            return read(item)

    return read_there


class _Places:
    """Memory that is shared with forked processes, in places that values are put into.

    It isn't in /dev/shm, which may be small. A place is taken until nothing uses what was put there.
    """

    def __init__(self, count: int):
        self.memory = mmap.mmap(-1, count * PLACE_BYTES)
        self.free = list(range(count))

    def take(self) -> int | None:
        """Return a place, or None where all are taken."""
        return self.free.pop() if self.free else None

    def tensor(self, place: int, dtype: torch.dtype, shape: tuple[int, ...], *, frees: bool) -> torch.Tensor:
        """Return a place as a tensor, with which it may become free again."""
        held = (ctypes.c_char * PLACE_BYTES).from_buffer(self.memory, place * PLACE_BYTES)
        if frees:
            weakref.finalize(held, self.free.append, place).atexit = False
        return torch.frombuffer(held, dtype=dtype, count=math.prod(shape)).view(shape)


class _Sender(pickle.Pickler):
    """Puts the first tensor of a value into a place."""

    def __init__(self, file: Any, places: _Places, place: int | None):
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.places, self.place = places, place

    def persistent_id(self, value: Any) -> Any:
        if self.place is None or not isinstance(value, torch.Tensor) or not 0 < value.nbytes <= PLACE_BYTES:
            return None
        sent, self.place = (self.place, value.dtype, tuple(value.shape)), None
        self.places.tensor(*sent, frees=False).copy_(value)
        return sent


class _Receiver(pickle.Unpickler):
    """Finds what a `_Sender` has sent."""

    def __init__(self, sent: bytes, places: _Places):
        super().__init__(io.BytesIO(sent))
        self.places, self.used = places, False

    def persistent_load(self, sent: Any) -> torch.Tensor:
        self.used = True
        return self.places.tensor(*sent, frees=True)


# What a forked process reads with, and where it puts what it has read.
_in_process: tuple[Callable[[Any], Any], _Places]


def _start_process(read: Callable[[Any], Any], places: _Places, niceness: int) -> None:
    global _in_process
    os.nice(niceness)
    _in_process = read, places
    torch.set_num_threads(1)
    # The caller's process is interrupted too, and ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_caller, daemon=True).start()


def _end_with_caller() -> None:
    caller = multiprocessing.parent_process()
    assert caller is not None
    caller.join()
    os._exit(1)


def _read_in_process(items: list[Any], taken: list[int | None]) -> tuple[list[bytes], bytes | None]:
    """Return what is read of each item, up to the first that can't be, and its error with that one's cause."""
    read, places = _in_process
    found: list[bytes] = []
    try:
        for item, place in zip(items, taken, strict=True):
            sent = io.BytesIO()
            _Sender(sent, places, place).dump(read(item))
            found.append(sent.getvalue())
    except Exception as error:
        try:
            sent_error = pickle.dumps((error, error.__cause__))
            pickle.loads(sent_error)
        except Exception:
            sent_error = pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), None))
        return found, sent_error
    return found, None


def _can_fork() -> bool:
    """Say whether processes can be forked here: on Linux, in the main thread of a process that may have others."""
    return (
        sys.platform == "linux"
        and threading.current_thread() is threading.main_thread()
        and not multiprocessing.current_process().daemon
        and torch.get_default_device().type == "cpu"
    )


@contextmanager
def _forked(count: int, read: Callable[[Any], Any], places: _Places, niceness: int) -> Iterator[ProcessPoolExecutor]:
    """Give so many processes, in each of which torch uses one core, and end them."""
    context = multiprocessing.get_context("fork")
    processes = ProcessPoolExecutor(count, context, initializer=_start_process, initargs=(read, places, niceness))
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


def read_ahead(
    items: Iterable[Item],
    read: Callable[[Item], Read],
    num_workers: int,
    ahead: int,
    *,
    topped_up: bool = True,
    sendable: bool = False,
    gives_way: bool = False,
) -> Generator[Read, None, None]:
    """Yield what `read` returns of each item, in order.

    An error of an item, or of what yields the items, is raised where it is its turn, as without workers. They end with
    the iterator: when it's through, at an error, and when it's closed or dropped.

    Args:
        items: Taken in the caller's thread.
        read: Called in the workers, several at a time.
        num_workers: How many processes or threads; of 0 and 1 none, so that each item is taken and read when it's
            asked for.
        ahead: How many items may be taken that aren't yielded yet.
        topped_up: Whether an item is taken as soon as one is yielded, so that the workers always have work. Else the
            next are taken only when all before them are yielded and another is asked for, for what waits for answers.
        sendable: Whether the items, and what `read` returns, can be sent to another process and back. If so, and
            `ahead` is at least 16, processes read them, on Linux, in the main thread of a process that may have others
            (a daemonic one may not) and where torch's default device is the CPU; elsewhere threads do.
        gives_way: Whether processes leave the cores to what the caller computes there, when both want them: the
            threads of a model on the CPU wait for each other, so that one that's held up holds up all.

    Raises:
        ChildProcessError: A process was killed.
    """
    num_workers = min(num_workers, ahead)
    if num_workers < 2:
        yield from map(read, items)
    elif sendable and ahead >= LEAST_FORKED and _can_fork():
        # As many again may be in use.
        places = _Places(2 * ahead)
        sent_at_once = max(1, min(MOST_SENT, ahead // (3 * num_workers)))
        with _forked(num_workers, read, places, NICENESS if gives_way else 0) as processes:

            def send(chunk: list[Item]) -> Iterator[Read]:
                taken = [places.take() for _ in chunk]
                return _received(processes.submit(_read_in_process, chunk, taken), taken, places)

            yield from _read_in(send, iter(items), sent_at_once, ahead, topped_up)
    else:
        with _one_core_threads(num_workers) as threads:
            read = _in_callers_state(read)

            def start(chunk: list[Item]) -> Iterator[Read]:
                return _results([threads.submit(copy_context().run, read, item) for item in chunk])

            yield from _read_in(start, iter(items), 1, ahead, topped_up)


def _results(futures: list[Future[Read]]) -> Iterator[Read]:
    for future in futures:
        yield future.result()


def _received(
    future: Future[tuple[list[bytes], bytes | None]], taken: list[int | None], places: _Places
) -> Iterator[Any]:
    """Yield what `_read_in_process` returns, and raise its error; places that weren't needed become free."""
    found, sent_error = future.result()
    for sent, place in zip(found, taken, strict=False):
        receiver = _Receiver(sent, places)
        value = receiver.load()
        if place is not None and not receiver.used:
            places.free.append(place)
        yield value
        # Not kept here, so that its place becomes free.
        del value
    if sent_error is not None:
        error, cause = pickle.loads(sent_error)
        raise error from cause


def _read_in(
    submit: Callable[[list[Item]], Iterator[Read]], items: Iterator[Item], at_once: int, ahead: int, topped_up: bool
) -> Iterator[Read]:
    process = os.getpid()
    pending: deque[Iterator[Read]] = deque()
    waiting = 0
    end: Exception | None = None
    while True:
        while end is None and ahead - waiting >= (at_once if topped_up else 1):
            chunk: list[Item] = []
            try:
                while len(chunk) < min(at_once, ahead - waiting):
                    chunk.append(next(items))
            except Exception as error:
                end = error
            if chunk:
                pending.append(submit(chunk))
                waiting += len(chunk)
        while pending:
            for value in pending.popleft():
                waiting -= 1
                yield value
                if os.getpid() != process:
                    raise RuntimeError(
                        "Reading began before the process was forked; begin it anew in the new process."
                    )
                del value
            if topped_up and end is None:
                break
        if end is not None:
            break
    if not isinstance(end, StopIteration):
        raise end


__all__ = ["MOST_WORKERS", "check_num_workers", "how_far_ahead", "joined", "read_ahead", "usable_cores"]
