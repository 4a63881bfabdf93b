"""Fetch and decode what comes next while something else is at work on what is there."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(work: Callable[[T], R], items: Iterable[T], count: int) -> Iterator[R]:
    """What some work makes of each item, in order; the next ones are under way in threads meanwhile.

    Threads do for reading and decoding, which let others run: files, Pillow and sockets do not hold the interpreter.

    Args:
        work: done in threads, several items at a time.
        items: taken one by one, as work on them begins.
        count: how many are under way or done ahead of the one that is given; as many threads.

    Raises:
        Exception: whatever the work raised, at the item's turn; what is under way is still done, no more is begun.
    """
    left = iter(items)
    with ThreadPoolExecutor(count, thread_name_prefix="ahead") as pool:
        under_way = deque(pool.submit(work, item) for item in islice(left, count))
        while under_way:
            done = under_way.popleft().result()
            under_way.extend(pool.submit(work, item) for item in islice(left, 1))
            yield done
