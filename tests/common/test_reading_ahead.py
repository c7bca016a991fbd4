"""Items read by several threads or processes come as if they were read one by one, and none of these stays."""

import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable
from contextvars import ContextVar
from functools import partial
from typing import Any

import pytest
import torch

from diffclip_hf.common.reading_ahead import MOST_WORKERS, check_num_workers, read_ahead, usable_cores
from diffclip_hf.common.reading_batches import read_batches


NAME = "diffclip-reading"
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _none_stays():
    yield
    assert not reading_threads()
    assert not multiprocessing.active_children()


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(NAME)]


def slow_square(number: int) -> int:
    """The later, the quicker, so that results come in another order."""
    time.sleep(0.002 * (5 - number % 5))
    return number * number


def by_threads(items: Iterable, read: Callable, num_workers: int, **options: Any) -> Generator[Any, None, None]:
    return read_ahead(items, read, num_workers, 20, **options)


def by_processes(items: Iterable, read: Callable, num_workers: int) -> Generator[Any, None, None]:
    """In batches of three, of which each number is in the pixel values too."""

    def read_pixels(item: Any) -> tuple[torch.Tensor, Any]:
        found = read(item)
        return torch.tensor([[found, 1]]), found

    for pixels, rest in read_batches(items, read_pixels, 3, num_workers, sendable=True):
        assert pixels.tolist() == [[found, 1] for found in rest]
        yield from rest


WAYS = pytest.mark.parametrize("through", [by_threads, by_processes])


@pytest.mark.parametrize("num_workers", [0, 1, 2, 5])
@pytest.mark.parametrize("through", [by_threads, partial(by_threads, topped_up=False), by_processes])
def test_the_order_is_the_items(num_workers, through):
    for count in (0, 43):
        found = through(iter(range(count)), slow_square, num_workers)
        assert list(found) == [number * number for number in range(count)]


@pytest.mark.parametrize("num_workers", [0, 4])
@WAYS
def test_an_error_is_raised_where_it_is_its_turn(num_workers, through):
    def read(number: int) -> int:
        if number in (6, 9):
            raise ValueError(f"{number} can't be read") from KeyError(number)
        return number

    found = []
    with pytest.raises(ValueError, match=r"^6 can't be read$") as caught:
        found.extend(through(range(20), read, num_workers))
    assert repr(caught.value.__cause__) == "KeyError(6)"
    assert found == [0, 1, 2, 3, 4, 5]


class LocalError(Exception):
    """Can't be made again of its text alone."""

    def __init__(self, first: str, second: str):
        super().__init__(f"{first} {second}")


def test_an_error_that_cannot_be_sent_is_told():
    def read(number: int) -> int:
        raise LocalError("never", "again")

    with pytest.raises(RuntimeError, match="LocalError: never again"):
        list(by_processes(range(20), read, 2))


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("through", [by_threads, partial(by_threads, topped_up=False), by_processes])
def test_an_error_of_the_items_comes_after_those_before_it(num_workers, through):
    def items():
        yield from range(21)
        raise OSError("the disk is gone")

    found = []
    with pytest.raises(OSError, match="the disk is gone"):
        found.extend(through(items(), slow_square, num_workers))
    assert found == [number * number for number in range(21)]


def test_it_runs_a_bounded_number_ahead():
    taken, read = [], []
    numbers = read_ahead((taken.append(n) or n for n in range(100)), lambda n: read.append(n) or n, 3, 8)
    assert not taken
    assert not reading_threads()
    for number in range(40):
        assert next(numbers) == number
        assert len(taken) == number + 8
        assert len(read) <= number + 8
    assert len(reading_threads()) == 3
    numbers.close()
    assert len(taken) == 47


def test_what_may_wait_for_answers_is_asked_when_all_before_is_given_out():
    taken = []
    numbers = read_ahead((taken.append(n) or n for n in range(100)), slow_square, 3, 8, topped_up=False)
    for number in range(20):
        next(numbers)
        assert len(taken) == 8 * (number // 8 + 1)
    numbers.close()


def test_one_item_needs_no_threads():
    names = list(read_ahead([1], lambda _: threading.current_thread().name, 8, 1))
    assert names == [threading.current_thread().name]
    assert set(read_ahead(range(9), lambda _: threading.current_thread().name[: len(NAME)], 8, 9)) == {NAME}


def workers() -> list:
    return reading_threads() or multiprocessing.active_children()


@WAYS
def test_what_is_dropped_half_way_leaves_none(through):
    numbers = through(range(100), slow_square, 4)
    next(numbers)
    assert len(workers()) == 4
    del numbers
    assert not workers()


@WAYS
def test_an_interruption_leaves_none(through):
    """As Ctrl-C raises it, in the caller's thread, while it waits or takes an item."""

    def interrupted():
        yield from range(17)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(through(interrupted(), slow_square, 4))
    assert not workers()


def test_processes_run_a_bounded_number_ahead_of_what_is_yielded():
    taken: list[int] = []
    numbers = by_processes((taken.append(n) or n for n in range(400)), slow_square, 3)
    for number in range(300):
        assert next(numbers) == number * number
        # A batch in use, another in the making, and what's ahead: a batch, and 16 for each of three.
        assert len(taken) <= number + 3 + 3 + 3 + 48
    assert len(multiprocessing.active_children()) == 3
    numbers.close()


@pytest.mark.parametrize(("batch_size", "side"), [(1, 3), (5, 3), (64, 3), (1000, 3), (5, 601)])
def test_a_batch_stays_until_the_next_is_asked_for(batch_size, side):
    """While processes read ahead, of which some pictures are left out."""

    def read(number: int) -> tuple[torch.Tensor | None, bytes]:
        left_out = (number % 11 == 4 and number > 9) or number in (100, 101, 102, 103, 104)
        return None if left_out else torch.full((1, 3, side, side), number + 0.5), bytes([number])

    # Pixel values of the larger side don't fit into a place.
    count, numbers = 150 if side < 9 else 20, []
    for pixels, rest in read_batches(range(count), read, batch_size, 2, count, sendable=True):
        there = [row[0] for row in rest if read(row[0])[0] is not None]
        time.sleep(0.002)
        assert len(pixels) == len(there)
        assert not there or torch.equal(pixels, torch.cat([torch.full((1, 3, side, side), n + 0.5) for n in there]))
        numbers += [row[0] for row in rest]
    assert numbers == list(range(count))


def test_pictures_of_two_shapes_are_no_batch():
    def read(number: int) -> tuple[torch.Tensor, None]:
        return torch.zeros(1, 3, 4, 5 if number == 9 else 4), None

    with pytest.raises(ValueError, match=r"shapes \(3, 4, [45]\) and \(3, 4, [45]\); they must have one"):
        list(read_batches(range(20), read, 4, 2, sendable=True))


def test_a_killed_process_is_one_plain_error():
    def read(number: int) -> int:
        if number == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with pytest.raises(ChildProcessError, match="was killed"):
        list(by_processes(range(100), read, 2))


def test_no_process_outlives_a_caller_that_is_killed():
    def start() -> None:
        numbers = by_processes(range(100), slow_square, 2)
        next(numbers)
        sending.send([child.pid for child in multiprocessing.active_children()])
        os.kill(os.getpid(), signal.SIGKILL)

    receiving, sending = FORK.Pipe(duplex=False)
    forked(start, daemon=False)
    pids = receiving.recv()
    assert len(pids) == 2
    for _ in range(600):
        if not any(alive(pid) for pid in pids):
            break
        time.sleep(0.1)
    assert not any(alive(pid) for pid in pids)


def forked(work: Callable[[], None], daemon: bool) -> None:
    """Run something in a forked process, and wait for its end."""
    process = FORK.Process(target=work, daemon=daemon)
    with warnings.catch_warnings():
        # Of Python 3.12 and later, since torch may have threads.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    process.join()


def alive(pid: int) -> bool:
    """Say whether a process runs; one that has ended may still wait for whoever takes its status."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def read_where(_: int) -> tuple[torch.Tensor, tuple[int, int]]:
    return torch.empty(1, 1), (os.getpid(), torch.get_num_threads())


def no_lock(*_: Any, **__: Any) -> None:
    raise OSError(30, "Read-only file system")


def test_where_no_process_can_be_forked_threads_read(monkeypatch):
    """In another thread and in a daemonic process, which may have no children; where torch is on a device; and where
    the system has no place for locks."""

    def seen() -> set:
        batches = read_batches(range(40), read_where, 2, 2, sendable=True)
        return {where for _, rest in batches for where in rest}

    here = {(os.getpid(), 1)}
    assert {threads for _, threads in seen()} == {1}
    assert not seen() & here
    found: list[set] = []
    thread = threading.Thread(target=lambda: found.append(seen()))
    thread.start()
    thread.join()
    with torch.device("meta"):
        found.append(seen())
    with monkeypatch.context() as patch:
        patch.setattr("multiprocessing.synchronize.SemLock.__init__", no_lock)
        found.append(seen())
    assert found == [here, here, here]
    receiving, sending = FORK.Pipe(duplex=False)
    forked(lambda: sending.send((os.getpid(), seen())), daemon=True)
    pid, there = receiving.recv()
    assert there == {(pid, 1)}


def test_a_forked_process_ends_and_is_told():
    """Here rather than by multiprocessing, which would end without cleaning up."""
    numbers = read_ahead(range(100), slow_square, 3, 10)
    next(numbers)
    with warnings.catch_warnings():
        # Of Python 3.12 and later, since there are threads.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        status = 1
        try:
            next(numbers)
        except RuntimeError as error:
            fresh = list(read_ahead(range(9), slow_square, 3, 9)) == [n * n for n in range(9)]
            status = 0 if "begin it anew" in str(error) and fresh else 2
        finally:
            os._exit(status)
    for _ in range(600):
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            break
        time.sleep(0.1)
    assert (found, os.waitstatus_to_exitcode(status)) == (child, 0)
    assert list(numbers)[:2] == [1, 4]


def test_threads_read_in_the_callers_state():
    variable: ContextVar[int] = ContextVar("variable", default=0)
    token = variable.set(3)
    try:
        with torch.device("meta"):
            found = list(read_ahead(range(5), lambda n: (torch.empty(n).device.type, variable.get()), 2, 5))
    finally:
        variable.reset(token)
    assert found == [("meta", 3)] * 5


def test_torch_uses_one_core_in_each_thread_and_all_elsewhere():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        numbers = read_ahead(range(20), lambda _: torch.get_num_threads(), 2, 4)
        assert next(numbers) == 1
        assert torch.get_num_threads() == 3
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [3]
        assert set(numbers) == {1}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_the_number_of_workers():
    assert check_num_workers(None) == min(usable_cores(), MOST_WORKERS) >= 1
    assert [check_num_workers(number) for number in (0, 1, 7)] == [0, 1, 7]
    for wrong in (-1, 1.5, True, "2"):
        with pytest.raises(ValueError, match=f"num_workers is {wrong!r}; it must be a whole number of at least 0"):
            check_num_workers(wrong)
