"""Items read by several threads come as if they were read one by one, and no thread stays."""

import os
import threading
import time
import warnings
from contextvars import ContextVar

import pytest
import torch

from diffclip_hf.common.reading_ahead import MOST_WORKERS, check_num_workers, read_ahead, usable_cores


NAME = "diffclip-reading"


@pytest.fixture(autouse=True)
def _no_thread_stays():
    yield
    assert not reading_threads()


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(NAME)]


def slow_square(number: int) -> int:
    """The later, the quicker, so that results come in another order."""
    time.sleep(0.002 * (5 - number % 5))
    return number * number


@pytest.mark.parametrize("num_workers", [0, 1, 2, 5])
@pytest.mark.parametrize("topped_up", [True, False])
def test_the_order_is_the_items(num_workers, topped_up):
    found = read_ahead(iter(range(23)), slow_square, num_workers, 7, topped_up=topped_up)
    assert list(found) == [number * number for number in range(23)]
    assert list(read_ahead([], slow_square, num_workers, 7, topped_up=topped_up)) == []


@pytest.mark.parametrize("num_workers", [0, 4])
def test_an_error_is_raised_where_it_is_its_turn(num_workers):
    def read(number: int) -> int:
        if number in (6, 9):
            raise ValueError(f"{number} can't be read")
        return number

    found = []
    with pytest.raises(ValueError, match="6 can't be read"):
        found.extend(read_ahead(range(20), read, num_workers, 20))
    assert found == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("topped_up", [True, False])
def test_an_error_of_the_items_comes_after_those_before_it(num_workers, topped_up):
    def items():
        yield from range(6)
        raise OSError("the disk is gone")

    found = []
    with pytest.raises(OSError, match="the disk is gone"):
        found.extend(read_ahead(items(), slow_square, num_workers, 4, topped_up=topped_up))
    assert found == [number * number for number in range(6)]


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


def test_what_is_dropped_half_way_leaves_no_thread():
    numbers = read_ahead(range(100), slow_square, 4, 10)
    next(numbers)
    assert reading_threads()
    del numbers
    assert not reading_threads()


def test_an_interruption_leaves_no_thread():
    """As Ctrl-C raises it, in the caller's thread, while it waits or takes an item."""

    def interrupted():
        yield from range(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(read_ahead(interrupted(), slow_square, 4, 10))
    assert not reading_threads()


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
