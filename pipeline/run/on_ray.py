"""The engine on Ray: each shard a chain of tasks, trainings as tasks or worker groups, over all nodes of a cluster."""

import faulthandler
import os
import re
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from threading import Event
from typing import Any

from pipeline.run import ddp
from pipeline.run.engines import (
    ATTEMPTS,
    FailedShard,
    Report,
    StepResult,
    Stopped,
    commit,
    hopeless,
    make,
    read,
    reason_of,
    work_on,
)
from pipeline.run.jobs import ModelJob, ShardJob, Unit
from pipeline.run.parcel import pack, search_path, staged, unpack
from stages.errors import BadData, BadInput

ACTOR_CPUS = 0.75
STEP_CPUS = 0.25
"""Fractions: where actors reserved whole processors, the tasks that feed them would wait for ever."""

IN_FLIGHT = 3
"""Shards under way per worker: one read, one worked on, one written. Memory does not grow beyond that."""

DEATHS = 2
"""A shard that was being worked on when so many workers died is set aside."""

GRACE = 2.0
"""Seconds by which the driver may hear late that a worker has gone on to its next shard."""

MOVES = 20
"""How often a shard begins again because of something that was not its fault: a node that went, another's death."""

STAFFING = 3.0
"""Seconds between two looks at how large the cluster is."""

PATIENCE = (10, 600.0)
"""A step may take so many times as long as the slowest of its split so far, and at least so many seconds."""


KNOCK = 10.0
"""Seconds in which a cluster has to open its door."""

SAID = 400
"""Characters of what Ray says that are told: the rest is for its developers."""


class OnRay:
    """Shards on all nodes of a cluster; work that loads models runs on actors, one per GPU or processor.

    Args:
        workers: actors per node of the graph; by default one per GPU of the cluster, or per processor,
            as many as there are at the time.
        address: a cluster to join; by default a new local one.
        gpu: whether actors and trainings take a GPU each; by default if the cluster has any now.
        limit: seconds that a step of a shard may take; by default PATIENCE.
        runtime_env: what the workers of a joined cluster need; not inside a job, which has its own.
    """

    def __init__(
        self,
        workers: int | None = None,
        address: str | None = None,
        gpu: bool | None = None,
        limit: float | None = None,
        runtime_env: dict[str, Any] | None = None,
    ) -> None:
        # Else a thread that is still at work after `close` would begin a new cluster, or join this one again.
        os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
        import ray

        self.ray, self.workers, self.limit = ray, workers, limit
        self.stopping = Event()
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns on machines without a GPU
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "job_config": _job_config()}
        if address is None:
            options["include_dashboard"] = False
        with staged(runtime_env or {}) as sent:
            _begin(ray, address, options | {"runtime_env": sent or None})
        self.gpu = gpu if gpu is not None else any(node.gpus for node in self.nodes())
        self.pool = ThreadPoolExecutor(64, thread_name_prefix="node")

    def nodes(self) -> "list[Machine]":
        """The nodes of the cluster that are alive."""
        found = self.ray.nodes()  # type: ignore[no-untyped-call]
        return [
            Machine(node["NodeID"], int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0)))
            for node in found
            if node["Alive"]
        ]

    def start(self, work: Callable[[], Any]) -> "Future[Any]":
        return self.pool.submit(work)

    def shards(self, job: ShardJob, units: Sequence[Unit], report: Report) -> list[FailedShard]:
        return _Crew(self, job, units, report).go()

    def model(self, job: ModelJob, report: Report) -> None:
        attempt = 1
        while True:
            try:
                for metrics in self._streamed(self._training(job)):
                    attempt = 1  # a training on machines that come and go is given up where it no longer gets on
                    report("epoch", metrics)
                return
            except Stopped:
                raise
            except Exception as error:
                died = isinstance(error, self.ray.exceptions.WorkerCrashedError)
                reason = f"its process died: {_death(error)}" if died else reason_of(error)
                if attempt == ATTEMPTS and died:
                    raise BadData(f"{ATTEMPTS} processes died over it, the last one: {_death(error)}") from error
                if attempt == ATTEMPTS or hopeless(error):
                    raise
                report("retried", {"attempt": attempt, "reason": reason})
                attempt += 1

    def _training(self, job: ModelJob) -> Any:
        """A task that makes a model, or, for several workers, one that has a group of processes make it."""
        if job.workers > 1:
            task = self.ray.remote(ddp.steps).options(num_returns="streaming", max_retries=0, num_cpus=0)
            return task.remote(pack(job), self.gpu)
        largest = max((node.cpus for node in self.nodes()), default=1)
        needs = {"num_cpus": 1, "num_gpus": 1} if self.gpu else {"num_cpus": max(1, min(job.threads, largest))}
        return self.ray.remote(_steps).options(num_returns="streaming", max_retries=0, **needs).remote(pack(job))

    def _streamed(self, stream: Any) -> Iterator[Any]:
        while True:
            self.wait([stream])
            try:
                ref = next(stream)
            except StopIteration:
                return
            yield self.ray.get(ref)

    def wait(self, refs: list[Any], timeout: float | None = None) -> list[Any]:
        """Until one of these is ready, or for some seconds.

        Raises:
            Stopped: the engine was closed meanwhile.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.stopping.is_set():
            done, _ = self.ray.wait(refs, num_returns=1, timeout=0.5)
            if done or (deadline is not None and time.monotonic() > deadline):
                return list(done)
        raise Stopped

    def close(self) -> None:
        self.stopping.set()
        self.ray.shutdown()
        self.pool.shutdown(wait=False, cancel_futures=True)


def _job_config() -> Any:
    """Tells workers where to look for modules: where they are installed.

    Ray would put the folder in which this process stands, and that of its script, in front of everything: also of Ray
    itself. It does not where a folder is sent along, so we say that one is.
    """
    from ray.job_config import JobConfig

    class Installed(JobConfig):
        def _runtime_env_has_working_dir(self) -> bool:
            return True

    return Installed(_py_driver_sys_path=search_path())


def _begin(ray: Any, address: str | None, options: dict[str, Any]) -> None:
    """Begin a local Ray, or join a cluster.

    Ray's own answer to SIGTERM, which it sets as it begins, ends the process at once: ours stays.

    Raises:
        BadInput: that is not possible here.
    """
    ours = signal.getsignal(signal.SIGTERM)
    if address not in (None, "auto", "local"):
        _refuse_silent(str(address))
    try:
        ray.init(address=address or "local", **options)
    except SystemExit:  # SIGTERM, while Ray began
        if callable(ours):
            ours(signal.SIGTERM, None)
        raise
    except (OSError, RuntimeError, ValueError) as error:
        ray.shutdown()
        raise BadInput(_why_not(error, address)) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours)


def _refuse_silent(address: str) -> None:
    """Ray would ask for a quarter of an hour.

    Raises:
        BadInput: nobody listens at ``host:port``.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise BadInput(f"--address {address}: must be auto or host:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), KNOCK).close()
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "that is no name of a host"
        raise BadInput(f"--address {address}: no Ray cluster answers there ({why})") from error
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")  # attempts, of 40 s each, if it is another's port


def _why_not(error: Exception, address: str | None) -> str:
    """Why there is no Ray, from what it says of that in many lines."""
    said = " ".join(str(error).split())
    if address is not None:
        gone = isinstance(error, ConnectionError)
        return f"--address {address}: {'no Ray cluster answers there' if gone else said[:SAID]}"
    if "AF_UNIX" in said:
        folder = said.rpartition(": ")[2].partition("/ray/session")[0]
        why = f"the path of its folder is too long for sockets, {folder}; name a shorter one in RAY_TMPDIR"
    elif port := re.search(r"specified port is (\d+)", said):
        set_ = " (of RAY_GCS_SERVER_PORT)" if os.environ.get("RAY_GCS_SERVER_PORT") == port[1] else ""
        why = f"port {port[1]}{set_} is taken; end what listens there, or name another"
    elif isinstance(error, OSError):
        why = f"{reason_of(error)}; if that is its folder, name another in RAY_TMPDIR"
    else:
        why = said[:SAID]
    return f"Ray cannot begin: {why}; or do without it: --engine inline"


@dataclass(frozen=True)
class Machine:
    """A node of the cluster: its id, its processors and GPUs as Ray counts them."""

    id: str
    cpus: int
    gpus: int


# ------------------------------------------------------------------------------------- one job's shards


@dataclass(eq=False)
class _Seat:
    """A place to work.

    Attributes:
        node: id of the node it is on; None while its actor is starting.
        actor: None for work that loads nothing, and runs in any process of the node.
        load: shards on their way through it.
        died: whether its actor was found dead.
        fallen: shards that came back with the news of its death, in the order in which they were given.
        answered: when it last was done with a shard, as far as the driver heard (monotonic seconds).
    """

    node: str | None = None
    actor: Any = None
    load: int = 0
    died: bool = False
    fallen: "list[tuple[_Turn, BaseException]]" = field(default_factory=list)
    answered: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class _Turn:
    """A shard that is to be made, and what it has been through.

    Attributes:
        attempt: number of the attempt, from 1.
        died_on: nodes on which a worker died over it.
        moves: how often it began again through no fault of its own.
        order: its place among all that were given to seats, when it last was.
        began: when that was (monotonic seconds).
    """

    unit: Unit
    attempt: int = 1
    died_on: list[str | None] = field(default_factory=list)
    moves: int = 0
    order: int = 0
    began: float = 0.0


class _Crew:
    """The workers that make one job's shards: as many as the cluster has room for at the time.

    Shards are given only to actors that have started: a node of the graph that waited for an actor
    that waits for another node's to end, while that one waits for ours, would wait for ever.
    """

    def __init__(self, engine: OnRay, job: ShardJob, units: Sequence[Unit], report: Report) -> None:
        self.engine, self.ray, self.job, self.report = engine, engine.ray, job, report
        self.parcel = self.ray.put(pack(job))
        self.waiting = deque(_Turn(unit) for unit in units)
        self.running: dict[Any, tuple[_Turn, _Seat]] = {}
        self.worked: dict[Any, _Seat] = {}
        self.seats: list[_Seat] = []
        self.starting: dict[Any, _Seat] = {}
        self.lost: list[FailedShard] = []
        self.given = self.stillborn = 0
        self.staffed, self.slowest = 0.0, dict[str, float]()

    def go(self) -> list[FailedShard]:
        """Make the shards; those that could not be made."""
        try:
            while self.waiting or self.running:
                self._staff()
                self._deal()
                for ref in self.engine.wait([*self.worked, *self.running, *self.starting], STAFFING):
                    if ref in self.starting:
                        self._welcome(ref)
                    elif ref in self.worked:
                        self._hear(ref)
                    else:
                        self._take(ref)
        finally:
            for seat in (*self.seats, *self.starting.values()):
                self._dismiss(seat)
        return self.lost

    # ------------------------------------------------------------------------------ who works where

    def _staff(self) -> None:
        """Follow the cluster as it grows and shrinks; let go of who has nothing left to do."""
        if not self.waiting:
            for seat in [seat for seat in self.seats if seat.load == 0]:
                self.seats.remove(seat)
                self._dismiss(seat)
        if time.monotonic() - self.staffed < STAFFING and (self.seats or self.starting):
            return
        self.staffed = time.monotonic()
        nodes = self.engine.nodes()
        if self.job.heavy:
            self._hire(nodes)
        else:
            self._spread(nodes)

    def _hire(self, nodes: list[Machine]) -> None:
        room = sum(node.gpus if self.engine.gpu else node.cpus for node in nodes)
        wanted = min(self.engine.workers or max(1, room), len(self.waiting) + len(self.running))
        gpu = {"num_gpus": 1} if self.engine.gpu else {}
        for _ in range(wanted - len(self.seats) - len(self.starting)):
            worker: Any = self.ray.remote(_Worker)
            actor = worker.options(num_cpus=ACTOR_CPUS, max_restarts=0, scheduling_strategy="SPREAD", **gpu).remote(
                self.parcel
            )
            self.starting[actor.started.remote()] = _Seat(actor=actor)

    def _spread(self, nodes: list[Machine]) -> None:
        """Seats for work that loads nothing: one per processor, on its node."""
        room = Counter({node.id: node.cpus for node in nodes if node.cpus} or {nodes[0].id: 1})
        places = list(room.elements())[: self.engine.workers]
        for seat in self.seats:
            if seat.node in places:
                places.remove(seat.node)
        alive = {node.id for node in nodes}
        self.seats = [seat for seat in self.seats if seat.node in alive]
        missing = len(self.waiting) + len(self.running) - len(self.seats)
        self.seats += [_Seat(node=place) for place in places[: max(0, missing)]]

    def _welcome(self, ref: Any) -> None:
        """An actor has answered, or died before it could."""
        seat = self.starting.pop(ref)
        try:
            seat.node = self.ray.get(ref)
        except self.ray.exceptions.RayActorError as error:
            self.stillborn += 1
            self.staffed = 0.0
            if self.stillborn >= ATTEMPTS and not self.seats:
                raise BadData(f"workers die as they start: {reason_of(error)}") from error
            return
        self.stillborn = 0
        seat.answered = time.monotonic()
        self.seats.append(seat)

    def _dismiss(self, seat: _Seat) -> None:
        if seat.actor is not None:
            self.ray.kill(seat.actor)

    # ------------------------------------------------------------------------------ who makes what

    def _deal(self) -> None:
        room = 2 if self.starting else IN_FLIGHT  # what is given to the first would be missed by those to come
        while self.waiting and self.seats and (seat := min(self.seats, key=_load)).load < room:
            turn = self._choose(seat)
            seat.load += 1
            self.given += 1
            turn.order, turn.began = self.given, time.monotonic()
            self.running[self._begin(turn, seat)] = (turn, seat)

    def _choose(self, seat: _Seat) -> _Turn:
        """The next shard; one over which a worker died goes elsewhere, if there is an elsewhere."""
        if len({other.node for other in self.seats}) > 1:
            for turn in self.waiting:
                if seat.node not in turn.died_on:
                    self.waiting.remove(turn)
                    return turn
        return self.waiting.popleft()

    def _begin(self, turn: _Turn, seat: _Seat) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = {
            "num_cpus": STEP_CPUS,
            "max_retries": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(seat.node or "", soft=True),
        }
        limit = self._limit(turn)
        if seat.actor is None:
            return self.ray.remote(_all).options(**here).remote(self.parcel, turn.unit, turn.attempt, limit)
        given = self.ray.remote(_read).options(**here).remote(self.parcel, turn.unit, limit)
        worked, done = seat.actor.work.options(num_returns=2).remote(given, limit)
        self.worked[done] = seat
        return self.ray.remote(_commit).options(**here).remote(self.parcel, turn.unit, worked, turn.attempt, limit)

    def _limit(self, turn: _Turn) -> float | None:
        """Seconds that a step of a shard may take; none are known before another shard of its split was made."""
        if self.engine.limit is not None:
            return self.engine.limit
        slowest = self.slowest.get(turn.unit.split)
        return max(PATIENCE[0] * slowest, PATIENCE[1]) if slowest else None

    def _hear(self, ref: Any) -> None:
        """An actor is done with a shard, which is on its way to the store, or died: `_take` will say."""
        seat = self.worked.pop(ref)
        try:
            self.ray.get(ref)
        except Exception:  # noqa: BLE001 - the shard comes back with the same
            return
        seat.answered = time.monotonic()

    def _take(self, ref: Any) -> None:
        """A shard is made, or failed, or its worker died."""
        turn, seat = self.running.pop(ref)
        seat.load -= 1
        try:
            mark = self.ray.get(ref)
        except Exception as error:  # noqa: BLE001 - a failed shard does not stop the others
            self._failed(turn, seat, error)
        else:
            split = turn.unit.split  # by split: an evaluation may do other work on one than on another
            self.slowest[split] = max(self.slowest.get(split, 0.0), *mark["seconds"].values())
            self.report("committed", mark)
        if seat.died and seat.load == 0:
            self._bury(seat)

    def _failed(self, turn: _Turn, seat: _Seat, error: Exception) -> None:
        died = self.ray.exceptions
        if isinstance(error, died.RayActorError):
            if not seat.died:
                seat.died, self.staffed = True, 0.0
                self.seats.remove(seat)
                self._dismiss(seat)
            seat.fallen.append((turn, error))
        elif isinstance(error, died.WorkerCrashedError | died.OutOfMemoryError):
            self._blame(turn, seat, error, turn.began)
        elif isinstance(error, died.ObjectLostError | died.NodeDiedError | died.LocalRayletDiedError):
            self._move(turn, error)
        elif turn.attempt == ATTEMPTS or hopeless(error):
            self.lost.append(FailedShard(turn.unit.name, reason_of(error)))
        else:
            self._again(turn, reason_of(error))
            turn.attempt += 1

    def _bury(self, seat: _Seat) -> None:
        """All that an actor had is back: the first of it was being worked on when it died, the rest waited."""
        seat.fallen.sort(key=lambda one: one[0].order)
        for number, (turn, error) in enumerate(seat.fallen):
            if number == 0 and not isinstance(error, self.ray.exceptions.ActorUnavailableError):
                self._blame(turn, seat, error, max(turn.began, seat.answered))
            else:
                self._move(turn, error)

    def _blame(self, turn: _Turn, seat: _Seat, error: BaseException, since: float) -> None:
        """A worker that had been at it since then died over this shard, unless its whole node went."""
        limit, waited = self._limit(turn), time.monotonic() - since
        reason = f"took longer than {limit:.0f} s" if limit and waited + GRACE >= limit else _death(error)
        turn.died_on.append(seat.node)
        alive = {node.id for node in self.engine.nodes()}
        if len([node for node in turn.died_on if node in alive]) < DEATHS:
            self._move(turn, error, reason)
        else:
            self.lost.append(FailedShard(turn.unit.name, f"{DEATHS} workers died over it, the last one: {reason}"))

    def _move(self, turn: _Turn, error: BaseException, reason: str | None = None) -> None:
        turn.moves += 1
        if turn.moves > MOVES:
            self.lost.append(
                FailedShard(turn.unit.name, f"was interrupted {turn.moves} times, the last time: {_death(error)}")
            )
        else:
            self._again(turn, reason or f"its worker was lost: {_death(error)}")

    def _again(self, turn: _Turn, reason: str) -> None:
        self.report("retried", {"unit": turn.unit.name, "attempt": turn.attempt, "reason": reason})
        self.waiting.append(turn)


def _load(seat: _Seat) -> int:
    return seat.load


def _death(error: BaseException) -> str:
    """The telling line of one of Ray's long messages about a death."""
    lines = [line.strip() for line in str(getattr(error, "cause", None) or error).splitlines() if line.strip()]
    telling = [line for line in lines if "exit" in line or "node" in line or "memory" in line]
    line = (telling or lines or [type(error).__name__])[0]
    return (line.partition("Worker exit detail: ")[2] or line).partition(" Some common causes")[0][:200]


# ------------------------------------------------------------------------------------------ on workers


@contextmanager
def _watched(limit: float | None) -> Iterator[None]:
    """End this process, with its traceback in its log, if what is begun here takes longer.

    From outside one could not tell a step that hangs from one that waits for its turn, and no
    exception reaches code that hangs in a library.
    """
    if limit is not None:
        faulthandler.dump_traceback_later(limit, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


class _Worker:
    """Keeps a job's models loaded; they load with its first shard, whose failure then says why."""

    def __init__(self, parcel: bytes) -> None:
        self.parcel = parcel

    def started(self) -> str:
        """Answers once the actor has its place, and runs the code that it should: the node's id."""
        import ray

        unpack(self.parcel)
        return str(ray.get_runtime_context().get_node_id())

    @cached_property
    def open(self) -> Callable[[Any], Any]:
        return unpack(self.parcel).open()  # type: ignore[no-any-return]

    def work(self, given: StepResult, limit: float | None) -> tuple[StepResult, None]:
        """What it made, and a sign that it is done, which the driver can have without the data."""
        with _watched(limit):
            return work_on(self.open, given, heavy=True), None


def _read(parcel: bytes, unit: Unit, limit: float | None) -> StepResult:
    with _watched(limit):
        return read(unpack(parcel), unit)


def _commit(parcel: bytes, unit: Unit, given: StepResult, attempt: int, limit: float | None) -> dict[str, Any]:
    with _watched(limit):
        return commit(unpack(parcel), unit, given, attempt)


def _all(parcel: bytes, unit: Unit, attempt: int, limit: float | None) -> dict[str, Any]:
    with _watched(limit):
        job = unpack(parcel)
        return make(job, job.open(), unit, attempt)


def _steps(parcel: bytes) -> Iterator[dict[str, Any]]:
    yield from unpack(parcel).steps()
