"""Fetch and decode what comes next while something else is at work on what is there."""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from threading import Thread
from typing import TypeVar

from stages.apart import aside

T = TypeVar("T")
R = TypeVar("R")


def ahead(work: Callable[[T], R], items: Iterable[T], count: int, pool: Executor | None = None) -> Iterator[R]:
    """What some work makes of each item, in order; the next ones are under way meanwhile.

    Args:
        work: done in threads, several items at a time; in a pool of processes, it and what it gives are pickled.
        items: taken one by one, as work on them begins.
        count: how many are under way or done ahead of the one that is given; as many threads.
        pool: who works, in the place of threads.

    Raises:
        Exception: whatever the work raised, at the item's turn; what is under way is still done, no more is begun.
        ChildProcessError: a process of the pool died.
    """
    if pool is None:
        with ThreadPoolExecutor(count, thread_name_prefix="ahead") as threads:
            yield from ahead(work, items, count, threads)
        return
    left, under_way = iter(items), deque[Future[R]]()

    def begin(most: int) -> None:
        with aside():
            under_way.extend(pool.submit(work, item) for item in islice(left, most))

    try:
        begin(count)
        while under_way:
            done = under_way.popleft().result()
            begin(1)
            yield done
    except BrokenProcessPool as error:
        raise ChildProcessError("a process that reads ahead died, as for want of memory") from error
    finally:
        for future in under_way:
            future.cancel()


@contextmanager
def processes(count: int) -> Iterator[Executor | None]:
    """A pool of so many processes for `ahead`, which end with it, or with this process; None of none.

    Threads do where a core or two read and decode: files, sockets and Pillow's decoders let others run meanwhile. But a
    fifth of a photograph's time, and most of a small image's, is Python's, of which one process does one thing at a
    time, so that many threads would hold up each other, and what they read for.
    """
    if not count:
        yield None
        return
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=_begin)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """In a process of the pool: one whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    Thread(target=follow, daemon=True).start()
