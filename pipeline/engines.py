"""Where steps run: in this process, or as Ray tasks and actors. Both give the same bytes."""

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from threading import Event
from typing import Any, Protocol

from pipeline.jobs import ModelJob, ShardJob, Unit
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


def reason_of(error: BaseException) -> str:
    """One line that says what went wrong."""
    cause = getattr(error, "cause", None) or error
    first = str(cause).strip().splitlines()[0] if str(cause).strip() else ""
    return first if isinstance(cause, BadData | BadInput) else f"{type(cause).__name__}: {first}"


def _hopeless(error: BaseException) -> bool:
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
                    report("committed", _make(job, work, unit, attempt))
                    break
                except Exception as error:  # noqa: BLE001 - a failed shard does not stop the others
                    if attempt == ATTEMPTS or _hopeless(error):
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
                if attempt == ATTEMPTS or _hopeless(error):
                    raise
                report("retried", {"attempt": attempt, "reason": reason_of(error)})

    def close(self) -> None:
        """Nothing was started."""


def _make(job: ShardJob, work: Callable[[Any], Any], unit: Unit, attempt: int) -> dict[str, Any]:
    return _commit(job, unit, _work(work, _read(job, unit)), attempt)


# What passes from step to step: a value, and the seconds that each step took.


def _read(job: ShardJob, unit: Unit) -> tuple[Any, dict[str, float]]:
    started = time.perf_counter()
    return job.read(unit), {"read": round(time.perf_counter() - started, 3)}


def _work(work: Callable[[Any], Any], given: tuple[Any, dict[str, float]]) -> tuple[Any, dict[str, float]]:
    started = time.perf_counter()
    return work(given[0]), given[1] | {"work": round(time.perf_counter() - started, 3)}


def _commit(job: ShardJob, unit: Unit, given: tuple[Any, dict[str, float]], attempt: int) -> dict[str, Any]:
    return job.commit(unit, given[0], {"attempt": attempt, "seconds": given[1]})


# ------------------------------------------------------------------------------------------- on Ray

ACTOR_CPUS = 0.75
STEP_CPUS = 0.25
"""Fractions: where actors reserved whole processors, the tasks that feed them would wait for ever."""

IN_FLIGHT = 3
"""Shards under way per worker: one read, one worked on, one written. Memory does not grow beyond that."""


class OnRay:
    """Each shard a chain of Ray tasks; work that loads models runs on actors, one per processor or GPU.

    Args:
        workers: actors per node of the graph; by default one per GPU of the cluster, or per processor.
        address: a cluster to join; by default a new local one.
    """

    def __init__(self, workers: int | None = None, address: str | None = None) -> None:
        import ray

        self.ray = ray
        self.stopping = Event()
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns on machines without a GPU
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if address is None:
            options["include_dashboard"] = False
        ray.init(address=address or "local", **options)
        total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        self.gpus = int(total.get("GPU", 0))
        self.cpus = max(1, int(total.get("CPU", 1)))
        self.workers = workers or self.gpus or self.cpus
        self.pool = ThreadPoolExecutor(64, thread_name_prefix="node")
        self._read = ray.remote(_read).options(num_cpus=STEP_CPUS, max_retries=0)
        self._commit = ray.remote(_commit).options(num_cpus=STEP_CPUS, max_retries=0)
        self._light = ray.remote(_make_light).options(num_cpus=STEP_CPUS, max_retries=0)

    def start(self, work: Callable[[], Any]) -> "Future[Any]":
        return self.pool.submit(work)

    def shards(self, job: ShardJob, units: Sequence[Unit], report: Report) -> list[Lost]:
        handle, lost = self.ray.put(job), list[Lost]()
        waiting = deque((unit, 1) for unit in units)
        running: dict[Any, tuple[Unit, int, _Seat]] = {}
        # Shards are given only to actors that have started: a node of the graph that waited for an actor
        # that waits for another node's to end, while that one waits for ours, would wait for ever.
        seats, starting = list[_Seat](), dict[Any, _Seat]()
        for _ in range(min(self.workers, len(units))):
            self._seat(job, handle, seats, starting)
        try:
            while waiting or running:
                while waiting and seats and (seat := min(seats, key=_load)).load < (2 if starting else IN_FLIGHT):
                    unit, attempt = waiting.popleft()
                    running[self._begin(handle, unit, attempt, seat)] = (unit, attempt, seat)
                for ref in self._wait([*running, *starting]):
                    if ref in starting:
                        seats += self._started(job, handle, ref, starting)
                        continue
                    unit, attempt, seat = running.pop(ref)
                    seat.load -= 1
                    try:
                        report("committed", self.ray.get(ref))
                    except Exception as error:  # noqa: BLE001 - a failed shard does not stop the others
                        if seat in seats and isinstance(error, self.ray.exceptions.RayActorError):
                            seats.remove(seat)
                            self._seat(job, handle, seats, starting)
                        if attempt == ATTEMPTS or _hopeless(error):
                            lost.append(Lost(unit.name, reason_of(error)))
                            continue
                        report("retried", {"unit": unit.name, "attempt": attempt, "reason": reason_of(error)})
                        waiting.append((unit, attempt + 1))
        finally:
            for seat in (*seats, *starting.values()):
                if seat.actor is not None:
                    self.ray.kill(seat.actor)
        return lost

    def _started(self, job: ShardJob, handle: Any, ref: Any, starting: "dict[Any, _Seat]") -> "list[_Seat]":
        """The seat whose actor has answered; one that died before is replaced, a bounded number of times."""
        seat = starting.pop(ref)
        try:
            self.ray.get(ref)
        except self.ray.exceptions.RayActorError as error:
            if seat.births == ATTEMPTS:
                raise BadData(f"workers die as they start: {reason_of(error)}") from error
            self._seat(job, handle, [], starting, seat.births + 1)
            return []
        return [seat]

    def _seat(
        self, job: ShardJob, handle: Any, seats: "list[_Seat]", starting: "dict[Any, _Seat]", births: int = 1
    ) -> None:
        """One more place to work: an actor that is starting, or for light work any process."""
        if not job.heavy:
            seats.append(_Seat(None))
            return
        gpu = {"num_gpus": 1} if self.gpus else {}
        worker: Any = self.ray.remote(_Worker)
        actor = worker.options(num_cpus=ACTOR_CPUS, max_restarts=0, **gpu).remote(handle)
        starting[actor.started.remote()] = _Seat(actor, births=births)

    def _begin(self, handle: Any, unit: Unit, attempt: int, seat: "_Seat") -> Any:
        seat.load += 1
        if seat.actor is None:
            return self._light.remote(handle, unit, attempt)
        return self._commit.remote(handle, unit, seat.actor.work.remote(self._read.remote(handle, unit)), attempt)

    def _wait(self, refs: list[Any]) -> list[Any]:
        while not self.stopping.is_set():
            done, _ = self.ray.wait(refs, num_returns=1, timeout=0.5)
            if done:
                return list(done)
        raise Stopped

    def model(self, job: ModelJob, report: Report) -> None:
        cpus = min(job.threads, self.cpus)
        where = {"num_cpus": 1, "num_gpus": 1} if self.gpus else {"num_cpus": cpus}
        task = self.ray.remote(_steps).options(num_returns="streaming", max_retries=0, **where)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                for ref in self._streamed(task.remote(job)):
                    report("epoch", self.ray.get(ref))
                return
            except Stopped:
                raise
            except Exception as error:
                if attempt == ATTEMPTS or _hopeless(error):
                    raise
                report("retried", {"attempt": attempt, "reason": reason_of(error)})

    def _streamed(self, stream: Any) -> Any:
        while True:
            self._wait([stream])
            try:
                yield next(stream)
            except StopIteration:
                return

    def close(self) -> None:
        self.stopping.set()
        self.ray.shutdown()
        self.pool.shutdown(wait=False, cancel_futures=True)


@dataclass(eq=False)
class _Seat:
    """A place to work, and how many shards are on their way through it."""

    actor: Any
    """None for work that loads nothing."""
    load: int = 0
    births: int = 1
    """How many actors have been started for it."""


def _load(seat: _Seat) -> int:
    return seat.load


class _Worker:
    """Keeps a job's models loaded; they load with its first shard, whose failure then says why."""

    def __init__(self, job: ShardJob) -> None:
        self.job = job

    def started(self) -> None:
        """Answers once the actor has its place."""

    @cached_property
    def open(self) -> Callable[[Any], Any]:
        return self.job.open()

    def work(self, given: tuple[Any, dict[str, float]]) -> tuple[Any, dict[str, float]]:
        return _work(self.open, given)


def _make_light(job: ShardJob, unit: Unit, attempt: int) -> dict[str, Any]:
    return _make(job, job.open(), unit, attempt)


def _steps(job: ModelJob) -> Any:
    yield from job.steps()
