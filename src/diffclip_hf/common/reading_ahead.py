"""Pictures read by several threads: in order, with the errors of reading one by one, and never far ahead.

Threads rather than processes: Pillow, numpy and torch let go of the interpreter's lock while they decode and resize,
and nothing has to be copied between processes, imported again, or left behind.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import copy_context
from numbers import Integral
from typing import Any, TypeVar

import torch


Item = TypeVar("Item")
Read = TypeVar("Read")
# More would wait for each other: what Python itself does of a picture, only one of them can do at a time.
MOST_WORKERS = 32


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    # Not every system tells.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_num_workers(num_workers: int | None) -> int:
    """Return a number of threads; of None that of the cores, up to 32.

    Raises:
        ValueError: It isn't a whole number of at least 0.
    """
    if num_workers is None:
        return min(usable_cores(), MOST_WORKERS)
    if not isinstance(num_workers, Integral) or isinstance(num_workers, bool) or num_workers < 0:
        raise ValueError(f"num_workers is {num_workers!r}; it must be a whole number of at least 0, or None.")
    return int(num_workers)


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


def read_ahead(
    items: Iterable[Item],
    read: Callable[[Item], Read],
    num_workers: int,
    ahead: int,
    *,
    topped_up: bool = True,
) -> Generator[Read, None, None]:
    """Yield what `read` returns of each item, in order.

    An error of an item, or of what yields the items, is raised where it is its turn, as without threads. The threads
    end with the iterator: when it's through, at an error, and when it's closed or dropped.

    Args:
        items: Taken in the caller's thread.
        read: Called in the threads, several at a time.
        num_workers: How many threads; of 0 and 1 none, so that each item is taken and read when it's asked for.
        ahead: How many items may be taken that aren't yielded yet.
        topped_up: Whether an item is taken as soon as one is yielded, so that the threads always have work. Else the
            next are taken only when all before them are yielded and another is asked for, for what waits for answers.
    """
    num_workers = min(num_workers, ahead)
    if num_workers < 2:
        yield from map(read, items)
        return
    with _one_core_threads(num_workers) as threads:
        yield from _read_in(threads, iter(items), _in_callers_state(read), ahead, topped_up)


def _read_in(
    threads: ThreadPoolExecutor, items: Iterator[Any], read: Callable[[Any], Read], ahead: int, topped_up: bool
) -> Iterator[Read]:
    process = os.getpid()
    pending: deque[Future[Read]] = deque()
    end: Exception | None = None
    while True:
        while end is None and len(pending) < ahead:
            try:
                item = next(items)
            except Exception as error:
                end = error
            else:
                pending.append(threads.submit(copy_context().run, read, item))
        while pending:
            yield pending.popleft().result()
            if os.getpid() != process:
                raise RuntimeError("Reading began before the process was forked; begin it anew in the new process.")
            if topped_up and end is None:
                break
        if end is not None and not pending:
            break
    if not isinstance(end, StopIteration):
        raise end


__all__ = ["MOST_WORKERS", "check_num_workers", "read_ahead", "usable_cores"]
