"""What is done ahead: in order, no further than asked, and with its errors at their turn."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.prefetch import prefetch


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
