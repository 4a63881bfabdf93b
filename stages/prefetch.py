"""Prefetch: work on the next items in threads or processes while the caller uses the current one."""

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


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prefetch(work: Callable[[T], R], items: Iterable[T], count: int, pool: Executor | None = None) -> Iterator[R]:
    """Map `work` over items in order, with the next results computed meanwhile.

    Args:
        work: called in threads, on several items at a time; in a pool of processes, it and its results are pickled.
        items: consumed one by one, as work on them starts.
        count: number of items in progress or done ahead of the caller, and number of threads.
        pool: does the work, in place of threads; see `processes`.

    Raises:
        Exception: the exception of `work`, at the item's turn. Work in progress is finished, no more is started.
        ChildProcessError: a process of the pool died.
    """
    if pool is None:
        with ThreadPoolExecutor(count, thread_name_prefix="prefetch") as threads:
            yield from prefetch(work, items, count, threads)
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
        raise ChildProcessError("a prefetching process died, probably out of memory") from error
    finally:
        for future in under_way:
            future.cancel()


@contextmanager
def processes(count: int) -> Iterator[Executor | None]:
    """A pool of this many processes for `prefetch`; they end with it, or with this process. None for a count of 0.

    Threads suffice where one or two cores read and decode: files, sockets and Pillow's decoders release the GIL. But a
    fifth of the decoding time of a photograph, and most of that of a small image, is Python code, which holds the GIL.
    So many threads would block each other, and the training loop.
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
    """In a process of the pool: end it with its parent; if the parent were killed, it would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    Thread(target=follow, daemon=True).start()
