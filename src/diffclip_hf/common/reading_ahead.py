"""Items read by several threads: in order, with the errors of reading one by one, and never far ahead."""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import copy_context
from numbers import Integral
from typing import TypeVar

import torch


Item = TypeVar("Item")
Read = TypeVar("Read")
# More threads would wait for each other: what Python itself does of a picture, only one of them can do at a time.
MOST_WORKERS = 32


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


@contextmanager
def _one_core_threads(number: int) -> Iterator[ThreadPoolExecutor]:
    """Give so many threads, in each of which torch uses one core, and end them.

    What has not begun is dropped in the end, and what has begun is waited for.
    """
    cores = torch.get_num_threads()
    started = threading.Barrier(number + 1)

    def start() -> None:
        # Asked first, for else torch would take the others' number at its first work.
        if torch.get_num_threads() > 1:
            torch.set_num_threads(1)
        started.wait()

    threads = ThreadPoolExecutor(number, "diffclip-reading", initializer=start)
    try:
        try:
            for _ in range(number):
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


def read_ahead(
    items: Iterable[Item], read: Callable[[Item], Read], num_workers: int, ahead: int, *, topped_up: bool = True
) -> Generator[Read, None, None]:
    """Yield what `read` returns of each item, in order, read by threads in the caller's state.

    An error of an item, or of what yields the items, is raised where it is its turn, as without threads. They end with
    the iterator: when it's through, at an error, and when it's closed or dropped.

    Args:
        items: Taken in the caller's thread.
        read: Called in the threads, several at a time.
        num_workers: How many threads; of 0 and 1 none, so that each item is taken and read when it's asked for.
        ahead: How many items may be taken that aren't yielded yet.
        topped_up: Whether an item is taken as soon as one is yielded, so that the workers always have work. Else the
            next are taken only when all before them are yielded and another is asked for, for what waits for answers.
    """
    num_workers = min(num_workers, ahead)
    if num_workers < 2:
        yield from map(read, items)
        return
    device = torch.get_default_device()
    # Entering a device makes each call of torch slower.
    on_device = nullcontext if device.type == "cpu" else lambda: torch.device(device)

    def read_there(item: Item) -> Read:
        with on_device():
            return read(item)

    with _one_core_threads(num_workers) as threads:

        def start(_: int, chunk: list[Item]) -> Iterator[Read]:
            return _results([threads.submit(copy_context().run, read_there, item) for item in chunk])

        yield from in_order(start, items, 1, ahead, topped_up)


def _results(futures: list[Future[Read]]) -> Iterator[Read]:
    for future in futures:
        yield future.result()


def in_order(
    start: Callable[[int, list[Item]], Iterator[Read]],
    items: Iterable[Item],
    at_once: int,
    ahead: int,
    topped_up: bool,
) -> Iterator[Read]:
    """Yield what becomes of each item, in order, of which so many are taken and started at once.

    `start` gets the number of its first item too; what it returns waits.
    """
    process, items, taken, yielded = os.getpid(), iter(items), 0, 0
    pending: deque[Iterator[Read]] = deque()
    end: Exception | None = None
    while True:
        if topped_up or not pending:
            while end is None and taken + at_once <= yielded + ahead:
                chunk, end = _take(items, at_once)
                if chunk:
                    pending.append(start(taken, chunk))
                    taken += len(chunk)
        if not pending:
            break
        for value in pending.popleft():
            yielded += 1
            yield value
            if os.getpid() != process:
                raise RuntimeError("Reading began before the process was forked; begin it anew in the new process.")
            # Not kept while the next is waited for.
            del value
    assert end is not None
    if not isinstance(end, StopIteration):
        raise end


def _take(items: Iterator[Item], count: int) -> tuple[list[Item], Exception | None]:
    """Return the next items, and what ended them before there were so many."""
    taken: list[Item] = []
    try:
        while len(taken) < count:
            taken.append(next(items))
    except Exception as end:
        return taken, end
    return taken, None


__all__ = ["MOST_WORKERS", "check_num_workers", "in_order", "read_ahead", "usable_cores"]
