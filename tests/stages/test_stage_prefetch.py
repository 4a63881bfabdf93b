"""Prefetching: results in order, no further ahead than requested, and errors in their turn."""

import multiprocessing
import operator
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.prefetch import prefetch, processes


@given(st.lists(st.integers()), st.integers(1, 5))
def test_all_come_in_order(items, count):
    assert list(prefetch(lambda item: -item, items, count)) == [-item for item in items]


def test_the_next_is_worked_on_while_one_is_in_use():
    begun = [threading.Event() for _ in range(4)]
    given_out = prefetch(lambda number: begun[number].set(), range(4), 1)
    next(given_out)
    assert begun[1].wait(10)
    assert not begun[2].is_set() and not begun[3].is_set()


def test_an_error_comes_at_its_items_turn():
    given_out = prefetch(lambda item: 1 // item, [1, 1, 0, 1], 2)
    assert [next(given_out), next(given_out)] == [1, 1]
    with pytest.raises(ZeroDivisionError):
        next(given_out)


def test_who_stops_half_way_leaves_no_thread_behind():
    before = threading.active_count()
    given_out = prefetch(abs, range(100), 3)
    next(given_out)
    given_out.close()
    assert threading.active_count() == before


def test_processes_give_the_same_in_order_and_an_error_at_its_turn():
    with processes(2) as pool:
        assert list(prefetch(operator.neg, range(7), 3, pool)) == [-item for item in range(7)]
        given_out = prefetch(int, ["1", "2", "x", "4"], 3, pool)
        assert [next(given_out), next(given_out)] == [1, 2]
        with pytest.raises(ValueError, match="'x'"):
            next(given_out)
        stopped = prefetch(operator.neg, range(100), 3, pool)
        assert next(stopped) == 0
        stopped.close()
        assert next(prefetch(operator.neg, [5], 3, pool)) == -5  # the pool goes on
    assert multiprocessing.active_children() == []


def test_of_no_processes_there_is_no_pool():
    with processes(0) as pool:
        assert pool is None


def test_a_process_that_dies_is_said():
    with processes(1) as pool, pytest.raises(ChildProcessError, match="a prefetching process died"):
        list(prefetch(os._exit, [3], 1, pool))


HELD = """
import time
from stages.prefetch import prefetch, processes
with processes(1) as pool:
    for process in prefetch(eval, ["__import__('os').getpid()"] * 3, 1, pool):
        print(process, flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_the_one_that_they_work_for(how):
    parent = subprocess.Popen(
        [sys.executable, "-c", HELD], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    if how == signal.SIGINT:
        os.killpg(parent.pid, how)  # as a terminal does
    else:
        parent.kill()
    said = parent.communicate(timeout=30)[1]
    assert said.count("KeyboardInterrupt") == (how == signal.SIGINT)  # the child says nothing
    deadline = time.monotonic() + 10
    while _runs(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
