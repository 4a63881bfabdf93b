"""Where steps run: in this process, or on Ray (`on_ray`). Both give the same bytes."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
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
    """Everything in the calling process, one shard after the other."""

    def start(self, work: Callable[[], Any]) -> "Future[Any]":
        done: Future[Any] = Future()
        try:
            done.set_result(work())
        except Exception as error:  # noqa: BLE001 - handed to whoever asks for the result
            done.set_exception(error)
        return done

    def shards(self, job: ShardJob, units: Sequence[Unit], report: Report) -> list[Lost]:
        work, lost = job.open(), []
        for unit in units:
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    report("committed", make(job, work, unit, attempt))
                    break
                except Exception as error:  # noqa: BLE001 - a failed shard does not stop the others
                    if attempt == ATTEMPTS or hopeless(error):
                        lost.append(Lost(unit.name, reason_of(error)))
                        break
                    report("retried", {"unit": unit.name, "attempt": attempt, "reason": reason_of(error)})
        return lost

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


# ------------------------------------------------------------------------------------------- steps


@dataclass(frozen=True)
class Given:
    """What passes from step to step: a value, the seconds that each step took, what the store made it repeat."""

    value: Any
    seconds: dict[str, float]
    retries: int


def make(job: ShardJob, work: Callable[[Any], Any], unit: Unit, attempt: int) -> dict[str, Any]:
    """All steps of a shard; its commit mark."""
    return commit(job, unit, work_on(work, read(job, unit)), attempt)


def read(job: ShardJob, unit: Unit) -> Given:
    """The first step."""
    started, before = time.perf_counter(), job.place.store.retries
    value = job.read(unit)
    return Given(value, {"read": round(time.perf_counter() - started, 3)}, job.place.store.retries - before)


def work_on(work: Callable[[Any], Any], given: Given) -> Given:
    """The second step."""
    started = time.perf_counter()
    value = work(given.value)
    return Given(value, given.seconds | {"work": round(time.perf_counter() - started, 3)}, given.retries)


def commit(job: ShardJob, unit: Unit, given: Given, attempt: int) -> dict[str, Any]:
    """The last step; the commit mark, and how often the store had to be asked again (``store_retries``)."""
    before = job.place.store.retries
    mark = job.commit(unit, given.value, {"attempt": attempt, "seconds": given.seconds})
    return mark | {"store_retries": given.retries + job.place.store.retries - before}
