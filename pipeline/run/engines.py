"""Engines run the steps of jobs: in this process, or on Ray (`on_ray`). Both give the same bytes."""

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
from typing import Any, ClassVar, Protocol

from pipeline import terminal
from pipeline.run.jobs import ModelJob, ShardJob, Unit
from pipeline.terminal import visible
from stages.errors import BadData, BadInput
from stages.prefetch import cores

IN_FLIGHT, MOST_IN_FLIGHT = 3, 10
"""Shards in flight per worker: one being read, one worked on, the others written. This bounds the memory."""

ATTEMPTS = 3
"""Attempts per shard or training; bad data fails at once."""

Report = Callable[[str, dict[str, Any]], None]
"""Called with the kind of an event (`committed`, `epoch`, `retried`) and its facts; by an engine that `queues`, also
with `began`, once or more, as workers take up the work."""


@dataclass(frozen=True)
class FailedShard:
    """A shard that could not be made, with the reason."""

    unit: str
    reason: str


class Stopped(Exception):
    """The run was stopped."""


class Engine(Protocol):
    """Runs jobs."""

    queues: ClassVar[bool]
    """Whether work may have to wait for a worker."""

    def start(self, work: Callable[[], Any]) -> "Future[Any]":
        """Start work that calls `shards` or `model`, in parallel with other work if the engine can."""

    def shards(self, job: ShardJob, units: Sequence[Unit], report: Report) -> list[FailedShard]:
        """Make some shards; returns those that failed."""

    def model(self, job: ModelJob, report: Report) -> None:
        """Make a model.

        Raises:
            Exception: the error of the last attempt.
        """

    def close(self) -> None:
        """Stop all work and release everything."""


def expected(error: BaseException) -> bool:
    """Whether an error is due to the request, the data, the machine or the cluster, so that its message is enough."""
    cause = _cause(error)
    ours = isinstance(cause, BadData | BadInput | OSError | MemoryError)
    return ours or type(cause).__name__ == "OutOfMemoryError" or type(cause).__module__.startswith("ray.")


def reason_of(error: BaseException) -> str:
    """An error as one line, with its type if it is unexpected; with --debug, also print its traceback."""
    plain = expected(error)
    if not plain:
        terminal.debug(error)
    return visible(_sentence(_cause(error), plain))


def _sentence(cause: BaseException, plain: bool) -> str:
    if isinstance(cause, BadData | BadInput):
        return str(cause)
    kind, first = type(cause).__name__, next(iter(str(cause).strip().splitlines()), "")
    if isinstance(cause, OSError) and cause.strerror:
        return f"{cause.filename}: {cause.strerror}" if cause.filename else cause.strerror
    if isinstance(cause, MemoryError) or kind == "OutOfMemoryError":  # the name of torch's and Ray's
        return f"memory ran out{': ' * bool(first)}{first}"
    if plain:
        return first or kind
    return f"unexpected: {first} ({kind})" if first else f"unexpected: {kind}"


def _cause(error: BaseException) -> BaseException:
    """The error that a worker raised, unwrapped from Ray's."""
    return getattr(error, "cause", None) or error


def hopeless(error: BaseException) -> bool:
    """Whether a retry cannot help."""
    return isinstance(error, BadData | BadInput)


def in_flight(processors: float) -> int:
    """Number of shards in flight of a worker that has so many processors to itself.

    A GPU attacks images faster than one core encodes them.
    """
    return max(IN_FLIGHT, min(MOST_IN_FLIGHT, int(processors)))


class Inline:
    """Runs everything in this process, shard by shard; threads meanwhile read the next and commit the last ones."""

    queues: ClassVar[bool] = False

    def start(self, work: Callable[[], Any]) -> "Future[Any]":
        done: Future[Any] = Future()
        try:
            with redirect_stdout(sys.stderr):  # keep output of the user's network off the command's stdout
                done.set_result(work())
        except SystemExit as error:
            done.set_exception(BadData(f"the user's network ended the program ({error})"))
        except Exception as error:  # noqa: BLE001 - raised by `result`
            done.set_exception(error)
        return done

    def shards(self, job: ShardJob, units: Sequence[Unit], report: Report) -> list[FailedShard]:
        work, lost = job.open(), list[FailedShard]()
        store, counted, committers = job.context.store, job.context.store.retries, in_flight(cores()) - 2
        begun = deque[tuple[Unit, Future[dict[str, Any]]]]()

        def settle(most: int) -> None:
            while begun and (len(begun) > most or begun[0][1].done()):
                unit, first = begun.popleft()
                self._attempt(unit, report, lost, partial(again, unit, first))

        def again(unit: Unit, first: "Future[dict[str, Any]]", attempt: int) -> dict[str, Any]:
            nonlocal counted  # over all steps: concurrent ones cannot be told apart
            mark = first.result() if attempt == 1 else make(job, work, unit, attempt)
            before, counted = counted, store.retries
            return mark | {"store_retries": counted - before}

        with ThreadPoolExecutor(1 + committers, thread_name_prefix="shard") as pool:
            read_next = [pool.submit(read, job, unit) for unit in units[:1]]
            for unit, following in zip_longest(units, units[1:]):
                given, read_next = read_next[0], [pool.submit(read, job, following)] if following else []
                begun.append((unit, _first(pool, job, work, unit, given)))
                settle(committers)
            settle(0)
        return lost

    def _attempt(
        self, unit: Unit, report: Report, lost: list[FailedShard], make: Callable[[int], dict[str, Any]]
    ) -> None:
        """Make a shard, in at most `ATTEMPTS` attempts."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                report("committed", make(attempt))
                return
            except Exception as error:  # noqa: BLE001 - a failed shard does not stop the others
                if attempt == ATTEMPTS or hopeless(error):
                    lost.append(FailedShard(unit.name, reason_of(error)))
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
    pool: ThreadPoolExecutor, job: ShardJob, work: Callable[[Any], Any], unit: Unit, given: "Future[StepResult]"
) -> "Future[dict[str, Any]]":
    """The first attempt at a shard that is being read: do its work here, and its commit in the pool."""
    try:
        return pool.submit(commit, job, unit, work_on(work, given.result(), job.heavy), 1)
    except Exception as error:  # noqa: BLE001 - raised by `result`
        failed: Future[dict[str, Any]] = Future()
        failed.set_exception(error)
        return failed


# ------------------------------------------------------------------------------------------- steps


@dataclass(frozen=True)
class StepResult:
    """The result of one step of a shard, passed to the next.

    Attributes:
        value: the step's result.
        seconds: step → its duration in seconds.
        retries: repeated requests to the store.
        device: kind of device used for the work.
        settings: PyTorch's settings during the work: see `stages.device.settings_text`.
    """

    value: Any
    seconds: dict[str, float]
    retries: int
    device: str = ""
    settings: tuple[str, ...] = ()


def make(job: ShardJob, work: Callable[[Any], Any], unit: Unit, attempt: int) -> dict[str, Any]:
    """Run all steps of a shard; returns its commit mark."""
    return commit(job, unit, work_on(work, read(job, unit), job.heavy), attempt)


def read(job: ShardJob, unit: Unit) -> StepResult:
    """The first step: fetch and decode the input."""
    started, before = time.perf_counter(), job.context.store.retries
    value = job.read(unit)
    return StepResult(value, {"read": round(time.perf_counter() - started, 3)}, job.context.store.retries - before)


def work_on(work: Callable[[Any], Any], given: StepResult, heavy: bool) -> StepResult:
    """The second step. Work that loads no model runs on the CPU."""
    if not heavy:
        value, seconds = _timed(work, given)
        return StepResult(value, seconds, given.retries, platform.machine())
    from stages import device

    with device.witnessed() as seen:
        value, seconds = _timed(work, given)
    return StepResult(value, seconds, given.retries, device.kind(), tuple(sorted(seen)))


def _timed(work: Callable[[Any], Any], given: StepResult) -> tuple[Any, dict[str, float]]:
    started = time.perf_counter()
    return work(given.value), given.seconds | {"work": round(time.perf_counter() - started, 3)}


def commit(job: ShardJob, unit: Unit, given: StepResult, attempt: int) -> dict[str, Any]:
    """The last step; returns the commit mark, with the number of repeated requests to the store (``store_retries``)."""
    before = job.context.store.retries
    facts = {"attempt": attempt, "seconds": given.seconds, "device": given.device, "settings": list(given.settings)}
    mark = job.commit(unit, given.value, facts)
    return mark | {"store_retries": given.retries + job.context.store.retries - before}
