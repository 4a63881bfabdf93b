"""Where steps run: in this process, or on Ray (`on_ray`). Both give the same bytes."""

import platform
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, Protocol

from pipeline import terminal
from pipeline.jobs import ModelJob, ShardJob, Unit
from pipeline.terminal import visible
from stages.errors import BadData, BadInput

ATTEMPTS = 3
"""How often a shard or a training is tried before it is set aside; bad data fails at once."""

Report = Callable[[str, dict[str, Any]], None]
"""Called with what happened (`committed`, `epoch`, `retried`) and its facts."""


@dataclass(frozen=True)
class Lost:
    """A shard that could not be made, and why."""

    unit: str
    reason: str


class Stopped(Exception):
    """The run was told to stop."""


class Engine(Protocol):
    """Runs jobs."""

    def start(self, work: Callable[[], Any]) -> "Future[Any]":
        """Begin some work that calls `shards` or `model`; side by side with other work where the engine can."""

    def shards(self, job: ShardJob, units: Sequence[Unit], report: Report) -> list[Lost]:
        """Make some shards; those that failed."""

    def model(self, job: ModelJob, report: Report) -> None:
        """Make a model.

        Raises:
            Exception: whatever made the last attempt fail.
        """

    def close(self) -> None:
        """Stop all work and let go of everything."""


def foreseen(error: BaseException) -> bool:
    """Whether it is a fault of what was asked for, of data, of the machine or the cluster: its message says enough."""
    cause = _cause(error)
    ours = isinstance(cause, BadData | BadInput | OSError | MemoryError)
    return ours or type(cause).__name__ == "OutOfMemoryError" or type(cause).__module__.startswith("ray.")


def reason_of(error: BaseException) -> str:
    """One line that says what went wrong; of what nobody foresaw, also its kind, for who mends it, and with --debug
    where it happened."""
    plain = foreseen(error)
    if not plain:
        terminal.debug(error)
    return visible(_said(_cause(error), plain))


def _said(cause: BaseException, plain: bool) -> str:
    if isinstance(cause, BadData | BadInput):
        return str(cause)
    kind, first = type(cause).__name__, next(iter(str(cause).strip().splitlines()), "")
    if isinstance(cause, OSError) and cause.strerror:
        return f"{cause.filename}: {cause.strerror}" if cause.filename else cause.strerror
    if isinstance(cause, MemoryError) or kind == "OutOfMemoryError":  # torch's and Ray's are of that name
        return f"memory ran out{': ' * bool(first)}{first}"
    if plain:
        return first or kind
    return f"unexpected: {first} ({kind})" if first else f"unexpected: {kind}"


def _cause(error: BaseException) -> BaseException:
    """What happened in a worker, of the error that Ray makes of it."""
    return getattr(error, "cause", None) or error


def hopeless(error: BaseException) -> bool:
    """Whether trying again would not help."""
    return isinstance(error, BadData | BadInput)


class Inline:
    """Everything in the calling process, one shard after the other.

    Where models are at work on one shard, the next is read and the last one committed in threads beside that.
    """

    def start(self, work: Callable[[], Any]) -> "Future[Any]":
        done: Future[Any] = Future()
        try:
            with redirect_stdout(sys.stderr):  # what the user's network prints is no part of the command's answer
                done.set_result(work())
        except SystemExit as error:
            done.set_exception(BadData(f"the user's network ended the program ({error})"))
        except Exception as error:  # noqa: BLE001 - handed to whoever asks for the result
            done.set_exception(error)
        return done

    def shards(self, job: ShardJob, units: Sequence[Unit], report: Report) -> list[Lost]:
        work, lost = job.open(), list[Lost]()
        if not job.heavy:
            for unit in units:
                self._attempt(unit, report, lost, partial(make, job, work, unit))
            return lost
        store, counted, begun = job.place.store, job.place.store.retries, deque[tuple[Unit, Future[dict[str, Any]]]]()

        def settle(most: int) -> None:
            while len(begun) > most:
                unit, first = begun.popleft()
                self._attempt(unit, report, lost, partial(again, unit, first))

        def again(unit: Unit, first: "Future[dict[str, Any]]", attempt: int) -> dict[str, Any]:
            nonlocal counted  # of all steps: those that go on side by side cannot tell whose request was sent again
            mark = first.result() if attempt == 1 else make(job, work, unit, attempt)
            before, counted = counted, store.retries
            return mark | {"store_retries": counted - before}

        with ThreadPoolExecutor(2, thread_name_prefix="shard") as pool:
            read_next = [pool.submit(read, job, unit) for unit in units[:1]]
            for unit, following in zip_longest(units, units[1:]):
                given, read_next = read_next[0], [pool.submit(read, job, following)] if following else []
                begun.append((unit, _first(pool, job, work, unit, given)))
                settle(1)
            settle(0)
        return lost

    def _attempt(self, unit: Unit, report: Report, lost: list[Lost], make: Callable[[int], dict[str, Any]]) -> None:
        """Make a shard, in as many attempts as it takes or may."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                report("committed", make(attempt))
                return
            except Exception as error:  # noqa: BLE001 - a failed shard does not stop the others
                if attempt == ATTEMPTS or hopeless(error):
                    lost.append(Lost(unit.name, reason_of(error)))
                    return
                report("retried", {"unit": unit.name, "attempt": attempt, "reason": reason_of(error)})

    def model(self, job: ModelJob, report: Report) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                for metrics in job.steps():
                    report("epoch", metrics)
                return
            except Exception as error:
                if attempt == ATTEMPTS or hopeless(error):
                    raise
                report("retried", {"attempt": attempt, "reason": reason_of(error)})

    def close(self) -> None:
        """Nothing was started."""


def _first(
    pool: ThreadPoolExecutor, job: ShardJob, work: Callable[[Any], Any], unit: Unit, given: "Future[Given]"
) -> "Future[dict[str, Any]]":
    """The first attempt at a shard that is being read: the work here and now, the commit in the pool."""
    try:
        return pool.submit(commit, job, unit, work_on(work, given.result(), job.heavy), 1)
    except Exception as error:  # noqa: BLE001 - handed to whoever asks for the mark
        failed: Future[dict[str, Any]] = Future()
        failed.set_exception(error)
        return failed


# ------------------------------------------------------------------------------------------- steps


@dataclass(frozen=True)
class Given:
    """What passes from step to step: a value, the seconds that each step took, what the store made it repeat.

    And the kind of device that it was worked on, with what was set there: see `stages.device.said`.
    """

    value: Any
    seconds: dict[str, float]
    retries: int
    device: str = ""
    settings: tuple[str, ...] = ()


def make(job: ShardJob, work: Callable[[Any], Any], unit: Unit, attempt: int) -> dict[str, Any]:
    """All steps of a shard; its commit mark."""
    return commit(job, unit, work_on(work, read(job, unit), job.heavy), attempt)


def read(job: ShardJob, unit: Unit) -> Given:
    """The first step."""
    started, before = time.perf_counter(), job.place.store.retries
    value = job.read(unit)
    return Given(value, {"read": round(time.perf_counter() - started, 3)}, job.place.store.retries - before)


def work_on(work: Callable[[Any], Any], given: Given, heavy: bool) -> Given:
    """The second step; work that is not heavy has no device but the processor."""
    if not heavy:
        value, seconds = _timed(work, given)
        return Given(value, seconds, given.retries, platform.machine())
    from stages import device

    with device.witnessed() as seen:
        value, seconds = _timed(work, given)
    return Given(value, seconds, given.retries, device.kind(), tuple(sorted(seen)))


def _timed(work: Callable[[Any], Any], given: Given) -> tuple[Any, dict[str, float]]:
    started = time.perf_counter()
    return work(given.value), given.seconds | {"work": round(time.perf_counter() - started, 3)}


def commit(job: ShardJob, unit: Unit, given: Given, attempt: int) -> dict[str, Any]:
    """The last step; the commit mark, and how often the store had to be asked again (``store_retries``)."""
    before = job.place.store.retries
    facts = {"attempt": attempt, "seconds": given.seconds, "device": given.device, "settings": list(given.settings)}
    mark = job.commit(unit, given.value, facts)
    return mark | {"store_retries": given.retries + job.place.store.retries - before}
