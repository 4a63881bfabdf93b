"""Prefetch: work on the next items in threads while the caller uses the current one."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def prefetch(work: Callable[[T], R], items: Iterable[T], count: int) -> Iterator[R]:
    """Map `work` over items in order, with the next results computed in threads meanwhile.

    Threads suffice for reading and decoding: files, Pillow and sockets release the GIL.

    Args:
        work: called in threads, on several items at a time.
        items: consumed one by one, as work on them starts.
        count: number of items in progress or done ahead of the caller, and number of threads.

    Raises:
        Exception: the exception of `work`, at the item's turn. Work in progress is finished, no more is started.
    """
    left = iter(items)
    with ThreadPoolExecutor(count, thread_name_prefix="prefetch") as pool:
        under_way = deque(pool.submit(work, item) for item in islice(left, count))
        while under_way:
            done = under_way.popleft().result()
            under_way.extend(pool.submit(work, item) for item in islice(left, 1))
            yield done
