"""The engine on Ray: a shard is a chain of tasks, a training a task or a worker group, on all nodes of a cluster."""

import faulthandler
import os
import re
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from threading import Event
from typing import Any, ClassVar

from pipeline.run import ddp
from pipeline.run.engines import (
    ATTEMPTS,
    IN_FLIGHT,
    FailedShard,
    Report,
    StepResult,
    Stopped,
    commit,
    hopeless,
    in_flight,
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
"""Fractions: if actors reserved whole processors, the tasks that feed them would never start."""

DEATHS = 2
"""Deaths of workers after which their shard is set aside."""

GRACE = 2.0
"""Longest delay, in seconds, with which the driver learns that a worker went on to its next shard."""

MOVES = 20
"""Restarts of a shard for other reasons, such as a lost node, after which it is set aside."""

SCALE_INTERVAL = 3.0
"""Seconds between two checks of the cluster's size."""

PATIENCE = (10, 600.0)
"""Time limit of a step: a multiple of the slowest so far in its split, and a minimum in seconds."""

CONNECT_TIMEOUT = 10.0
"""Seconds in which a cluster must accept a connection."""

GCS_WAIT = "RAY_gcs_server_port_wait_time_s"
"""Ray's variable for how often to try to join a cluster, and for the seconds in which a local one must start."""

STARTS = {"RAY_worker_register_timeout_seconds": "180", "RAY_pop_worker_max_retries": "1"}
"""Seconds in which a worker of a local Ray must start, and further tries. Ray's own 60 s are too few on a busy machine.
On top come our ATTEMPTS, so that a run gives up after about 18 minutes."""

NOT_STARTED = "Failed to startup worker"
"""The beginning of Ray's message where it has given up on starting a worker for a task."""

LEAVE = 10.0
"""Most seconds in which threads leave Ray before it ends: one that is inside may never return, and would hold us up."""

LONGEST = 400
"""Most characters of Ray's error messages to show; the rest is for its developers."""


class OnRay:
    """Shards on all nodes of a cluster; work that loads models runs on actors, one per GPU or processor.

    Args:
        workers: actors per node of the graph; by default one per GPU of the cluster, or per CPU, following its size.
        address: the cluster to join; by default a new local one.
        gpu: whether each actor and training takes a GPU; by default if the cluster has any at the start.
        limit: time limit of a shard's step in seconds; by default PATIENCE.
        runtime_env: Ray's runtime environment for workers of a joined cluster; None inside a job, which has its own.
    """

    queues: ClassVar[bool] = True

    def __init__(
        self,
        workers: int | None = None,
        address: str | None = None,
        gpu: bool | None = None,
        limit: float | None = None,
        runtime_env: dict[str, Any] | None = None,
    ) -> None:
        # Otherwise a thread that still works after `close` would start a new cluster, or join this one again.
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
        self.started: list[Future[Any]] = []

    def nodes(self) -> "list[Machine]":
        """The nodes of the cluster that are alive."""
        found = self.ray.nodes()  # type: ignore[no-untyped-call]
        return [
            Machine(node["NodeID"], int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0)))
            for node in found
            if node["Alive"]
        ]

    def start(self, work: Callable[[], Any]) -> "Future[Any]":
        self.started.append(self.pool.submit(work))
        return self.started[-1]

    def shards(self, job: ShardJob, units: Sequence[Unit], report: Report) -> list[FailedShard]:
        return ShardScheduler(self, job, units, report).go()

    def model(self, job: ModelJob, report: Report) -> None:
        attempt = 1
        while True:
            try:
                for metrics in self._streamed(self._training(job)):
                    if metrics == ddp.BEGAN:
                        report("began", {})
                        continue
                    attempt = 1  # machines come and go: give up only without progress
                    report("epoch", metrics)
                return
            except Stopped:
                raise
            except Exception as error:
                died = isinstance(error, self.ray.exceptions.WorkerCrashedError)
                reason = f"its process died: {_death(error)}" if died else reason_of(error)
                if attempt == ATTEMPTS and died:
                    raise BadData(f"{ATTEMPTS} processes died over it, the last one: {_death(error)}") from error
                if attempt == ATTEMPTS and self.not_started(error):
                    raise BadData(_no_worker(error)) from error
                if attempt == ATTEMPTS or hopeless(error):
                    raise
                report("retried", {"attempt": attempt, "reason": reason})
                attempt += 1

    def _training(self, job: ModelJob) -> Any:
        """The task that makes a model; for several workers, it starts a group of processes."""
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
        """Wait until one of these is ready, at most `timeout` seconds.

        Raises:
            Stopped: the engine was closed meanwhile.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.stopping.is_set():
            done, _ = self.ray.wait(refs, num_returns=1, timeout=0.5)
            if done or (deadline is not None and time.monotonic() > deadline):
                return list(done)
        raise Stopped

    def not_started(self, error: BaseException) -> bool:
        """Whether Ray has given up on starting a worker, be it slow or broken."""
        return isinstance(error, self.ray.exceptions.ActorUnschedulableError) or NOT_STARTED in str(error)

    def close(self) -> None:
        self.stopping.set()
        self.pool.shutdown(wait=False, cancel_futures=True)
        wait(self.started, LEAVE)
        self.ray.shutdown()


def _job_config() -> Any:
    """A job configuration with which workers import modules from where they are installed.

    Ray would put this process's working folder, and that of its script, before everything else, even Ray itself. It
    does not if a folder is sent along, so this configuration claims that one is.
    """
    from ray.job_config import JobConfig

    class Installed(JobConfig):
        def _runtime_env_has_working_dir(self) -> bool:
            return True

    return Installed(_py_driver_sys_path=search_path())


def _begin(ray: Any, address: str | None, options: dict[str, Any]) -> None:
    """Start a local Ray, or join a cluster.

    At its start, Ray installs a SIGTERM handler that ends the process at once; this restores ours.

    Raises:
        BadInput: it cannot be joined.
        OSError: it cannot be started.
    """
    ours = signal.getsignal(signal.SIGTERM)
    joins = address not in (None, "auto", "local")
    if joins:
        _refuse_silent(str(address))
    once = joins and GCS_WAIT not in os.environ
    if once:  # an attempt takes 40 s where something else has the port
        os.environ[GCS_WAIT] = "1"
    if address is None:
        for variable, value in STARTS.items():
            os.environ.setdefault(variable, value)
    try:
        ray.init(address=address or "local", **options)
    except SystemExit:  # SIGTERM, while Ray started
        if callable(ours):
            ours(signal.SIGTERM, None)
        raise
    except Exception as error:  # a bare one where its processes are slow to start
        ray.shutdown()
        raise (OSError if address is None else BadInput)(_why_not(error, address)) from error
    finally:
        if once:
            del os.environ[GCS_WAIT]
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours)


def _refuse_silent(address: str) -> None:
    """Refuse an address at which nothing listens: Ray would retry for a quarter of an hour.

    Raises:
        BadInput: nothing listens at ``host:port``.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise BadInput(f"--address {address}: must be auto or host:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT).close()
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "that is no name of a host"
        raise BadInput(f"--address {address}: no Ray cluster answers there ({why})") from error


def _why_not(error: Exception, address: str | None) -> str:
    """Ray's reason for not starting, as one sentence out of its long message."""
    said = " ".join(str(error).split())
    if address is not None:
        gone = isinstance(error, ConnectionError)
        return f"--address {address}: {'no Ray cluster answers there' if gone else said[:LONGEST]}"
    if "AF_UNIX" in said:
        folder = said.rpartition(": ")[2].partition("/ray/session")[0]
        why = f"the path of its folder is too long for sockets, {folder}; name a shorter one in RAY_TMPDIR"
    elif port := re.search(r"specified port is (\d+)", said):
        set_ = " (of RAY_GCS_SERVER_PORT)" if os.environ.get("RAY_GCS_SERVER_PORT") == port[1] else ""
        why = f"port {port[1]}{set_} is taken; end what listens there, or name another"
    elif "timed out" in said:
        why = "its processes were too slow to start, as on a busy machine; run again"
    elif isinstance(error, OSError):
        why = f"{reason_of(error)}; if that is its folder, name another in RAY_TMPDIR"
    else:
        why = said[:LONGEST]
    return f"Ray cannot begin: {why}; or do without it: --engine inline gives the same bytes"


@dataclass(frozen=True)
class Machine:
    """A node of the cluster: its id, and its CPUs and GPUs as Ray counts them."""

    id: str
    cpus: int
    gpus: int


# ------------------------------------------------------------------------------------- one job's shards


@dataclass(eq=False)
class Slot:
    """Capacity for one shard at a time: an actor, or a CPU for work that loads no model.

    Attributes:
        node: id of its node; None while its actor is starting.
        actor: None for work that loads no model, which runs in any process of the node.
        load: shards in flight on it.
        died: whether its actor was found dead.
        orphaned: shards that failed because it died, in order of assignment.
        answered: when it last finished a shard, as far as the driver knows (monotonic seconds).
    """

    node: str | None = None
    actor: Any = None
    load: int = 0
    died: bool = False
    orphaned: "list[tuple[ShardTask, BaseException]]" = field(default_factory=list)
    answered: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class ShardTask:
    """A shard to make, with its history.

    Attributes:
        attempt: number of the attempt, from 1.
        died_on: nodes on which a worker died while working on it.
        moves: restarts for other reasons.
        order: sequence number of its last assignment.
        began: time of its last assignment (monotonic seconds).
    """

    unit: Unit
    attempt: int = 1
    died_on: list[str | None] = field(default_factory=list)
    moves: int = 0
    order: int = 0
    began: float = 0.0


class ShardScheduler:
    """Makes one job's shards with as many workers as currently fit on the cluster.

    Shards are assigned only to actors that have started. Otherwise two nodes of the graph could deadlock, each holding
    tasks that wait for its own actors, which wait for the other node's actors to end.
    """

    def __init__(self, engine: OnRay, job: ShardJob, units: Sequence[Unit], report: Report) -> None:
        self.engine, self.ray, self.job, self.report = engine, engine.ray, job, report
        self.pickled_job = self.ray.put(pack(job))
        self.waiting = deque(ShardTask(unit) for unit in units)
        self.running: dict[Any, tuple[ShardTask, Slot]] = {}
        self.worked: dict[Any, Slot] = {}
        self.slots: list[Slot] = []
        self.starting: dict[Any, Slot] = {}
        self.failed: list[FailedShard] = []
        self.assigned = self.failed_starts = 0
        self.scaled, self.slowest, self.room = 0.0, dict[str, float](), IN_FLIGHT
        self.first: list[Any] = []

    def go(self) -> list[FailedShard]:
        """Make the shards; returns those that failed."""
        if not self.job.heavy:  # its shards are one task each, which shows only when it ends
            self.first = [self.ray.remote(_nothing).options(num_cpus=STEP_CPUS, max_retries=0).remote()]
        try:
            while self.waiting or self.running:
                self._scale()
                self._assign()
                for ref in self.engine.wait([*self.first, *self.worked, *self.running, *self.starting], SCALE_INTERVAL):
                    if ref in self.first:
                        self.first.remove(ref)
                        self.report("began", {})
                    elif ref in self.starting:
                        self._actor_ready(ref)
                    elif ref in self.worked:
                        self._work_done(ref)
                    else:
                        self._task_done(ref)
        finally:
            for slot in (*self.slots, *self.starting.values()):
                self._stop(slot)
        return self.failed

    # --------------------------------------------------------------------------------------- slots

    def _scale(self) -> None:
        """Follow the cluster as it grows and shrinks; stop actors that have nothing left to do."""
        if not self.waiting:
            for slot in [slot for slot in self.slots if slot.load == 0]:
                self.slots.remove(slot)
                self._stop(slot)
        if time.monotonic() - self.scaled < SCALE_INTERVAL and (self.slots or self.starting):
            return
        self.scaled = time.monotonic()
        nodes = self.engine.nodes()
        if self.job.heavy:
            self._start_actors(nodes)
        else:
            self._add_slots(nodes)

    def _start_actors(self, nodes: list[Machine]) -> None:
        hosts = [node for node in nodes if node.gpus] if self.engine.gpu else nodes
        room = sum(node.gpus if self.engine.gpu else node.cpus for node in hosts)
        wanted = min(self.engine.workers or max(1, room), len(self.waiting) + len(self.running))
        self.room = in_flight(sum(node.cpus for node in hosts) / wanted)
        gpu = {"num_gpus": 1} if self.engine.gpu else {}
        for _ in range(wanted - len(self.slots) - len(self.starting)):
            worker: Any = self.ray.remote(_Worker)
            actor = worker.options(num_cpus=ACTOR_CPUS, max_restarts=0, scheduling_strategy="SPREAD", **gpu).remote(
                self.pickled_job
            )
            self.starting[actor.started.remote()] = Slot(actor=actor)

    def _add_slots(self, nodes: list[Machine]) -> None:
        """Add slots for work that loads no model: one per CPU of each node."""
        room = Counter({node.id: node.cpus for node in nodes if node.cpus} or {nodes[0].id: 1})
        places = list(room.elements())[: self.engine.workers]
        for slot in self.slots:
            if slot.node in places:
                places.remove(slot.node)
        alive = {node.id for node in nodes}
        self.slots = [slot for slot in self.slots if slot.node in alive]
        missing = len(self.waiting) + len(self.running) - len(self.slots)
        self.slots += [Slot(node=place) for place in places[: max(0, missing)]]

    def _actor_ready(self, ref: Any) -> None:
        """An actor has started, or died or was given up before it could."""
        slot, died = self.starting.pop(ref), self.ray.exceptions
        try:
            slot.node = self.ray.get(ref)
        except (died.RayActorError, died.ActorUnschedulableError) as error:
            self.failed_starts += 1
            self.scaled = 0.0
            if self.failed_starts >= ATTEMPTS and not self.slots:
                slow = self.engine.not_started(error)
                why = _no_worker(error) if slow else f"workers die as they start: {reason_of(error)}"
                raise BadData(why) from error
            return
        self.failed_starts = 0
        slot.answered = time.monotonic()
        self.slots.append(slot)
        self.report("began", {})

    def _stop(self, slot: Slot) -> None:
        if slot.actor is not None:
            self.ray.kill(slot.actor)

    # --------------------------------------------------------------------------------- assignment

    def _assign(self) -> None:
        room = 2 if self.starting else self.room  # keep shards back for actors that are still starting
        while self.waiting and self.slots and (slot := min(self.slots, key=_load_of)).load < room:
            task = self._next_task(slot)
            slot.load += 1
            self.assigned += 1
            task.order, task.began = self.assigned, time.monotonic()
            self.running[self._submit(task, slot)] = (task, slot)

    def _next_task(self, slot: Slot) -> ShardTask:
        """The next shard. After a worker's death, a shard is retried on another node if there is one."""
        if len({other.node for other in self.slots}) > 1:
            for task in self.waiting:
                if slot.node not in task.died_on:
                    self.waiting.remove(task)
                    return task
        return self.waiting.popleft()

    def _submit(self, task: ShardTask, slot: Slot) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = {
            "num_cpus": STEP_CPUS,
            "max_retries": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(slot.node or "", soft=True),
        }
        limit = self._limit(task)
        if slot.actor is None:
            return self.ray.remote(_make).options(**here).remote(self.pickled_job, task.unit, task.attempt, limit)
        given = self.ray.remote(_read).options(**here).remote(self.pickled_job, task.unit, limit)
        worked, done = slot.actor.work.options(num_returns=2).remote(given, limit)
        self.worked[done] = slot
        return self.ray.remote(_commit).options(**here).remote(self.pickled_job, task.unit, worked, task.attempt, limit)

    def _limit(self, task: ShardTask) -> float | None:
        """Time limit of a step in seconds; None until a shard of its split is finished."""
        if self.engine.limit is not None:
            return self.engine.limit
        slowest = self.slowest.get(task.unit.split)
        return max(PATIENCE[0] * slowest, PATIENCE[1]) if slowest else None

    def _work_done(self, ref: Any) -> None:
        """An actor finished its work on a shard, which is now being committed, or died; `_task_done` tells which."""
        slot = self.worked.pop(ref)
        try:
            self.ray.get(ref)
        except Exception:  # noqa: BLE001 - the shard's commit fails with the same error
            return
        slot.answered = time.monotonic()

    def _task_done(self, ref: Any) -> None:
        """A shard was committed or failed, or its worker died."""
        task, slot = self.running.pop(ref)
        slot.load -= 1
        try:
            mark = self.ray.get(ref)
        except Exception as error:  # noqa: BLE001 - a failed shard does not stop the others
            self._failed(task, slot, error)
        else:
            split = task.unit.split  # by split: an evaluation's work may differ between splits
            self.slowest[split] = max(self.slowest.get(split, 0.0), *mark["seconds"].values())
            self.report("committed", mark)
        if slot.died and slot.load == 0:
            self._actor_died(slot)

    def _failed(self, task: ShardTask, slot: Slot, error: Exception) -> None:
        died = self.ray.exceptions
        if isinstance(error, died.RayActorError):
            if not slot.died:
                slot.died, self.scaled = True, 0.0
                self.slots.remove(slot)
                self._stop(slot)
            slot.orphaned.append((task, error))
        elif isinstance(error, died.WorkerCrashedError | died.OutOfMemoryError):
            self._blame(task, slot, error, task.began)
        elif isinstance(error, died.ObjectLostError | died.NodeDiedError | died.LocalRayletDiedError):
            self._requeue(task, error)
        elif task.attempt == ATTEMPTS or hopeless(error):
            why = _no_worker(error) if self.engine.not_started(error) else reason_of(error)
            self.failed.append(FailedShard(task.unit.name, why))
        else:
            self._retry(task, reason_of(error))
            task.attempt += 1

    def _actor_died(self, slot: Slot) -> None:
        """Blame the shard that a dead actor was working on, the first of its shards; requeue the others."""
        slot.orphaned.sort(key=lambda one: one[0].order)
        for number, (task, error) in enumerate(slot.orphaned):
            if number == 0 and not isinstance(error, self.ray.exceptions.ActorUnavailableError):
                self._blame(task, slot, error, max(task.began, slot.answered))
            else:
                self._requeue(task, error)

    def _blame(self, task: ShardTask, slot: Slot, error: BaseException, since: float) -> None:
        """Count a worker's death against the shard that it began at `since`; deaths with a lost node do not count."""
        limit, waited = self._limit(task), time.monotonic() - since
        reason = f"took longer than {limit:.0f} s" if limit and waited + GRACE >= limit else _death(error)
        task.died_on.append(slot.node)
        alive = {node.id for node in self.engine.nodes()}
        if len([node for node in task.died_on if node in alive]) < DEATHS:
            self._requeue(task, error, reason)
        else:
            self.failed.append(FailedShard(task.unit.name, f"{DEATHS} workers died over it, the last one: {reason}"))

    def _requeue(self, task: ShardTask, error: BaseException, reason: str | None = None) -> None:
        task.moves += 1
        if task.moves > MOVES:
            self.failed.append(
                FailedShard(task.unit.name, f"was interrupted {task.moves} times, the last time: {_death(error)}")
            )
        else:
            self._retry(task, reason or f"its worker was lost: {_death(error)}")

    def _retry(self, task: ShardTask, reason: str) -> None:
        self.report("retried", {"unit": task.unit.name, "attempt": task.attempt, "reason": reason})
        self.waiting.append(task)


def _load_of(slot: Slot) -> int:
    return slot.load


def _no_worker(error: BaseException) -> str:
    """What to do where no worker starts."""
    why = reason_of(error).partition(". ")[0]
    return (
        f"no worker started in {ATTEMPTS} attempts ({why}): if the machine is busy or short of memory, run again with "
        "--workers 1 or --engine inline, which go on from what is there"
    )


def _death(error: BaseException) -> str:
    """The informative line of Ray's long message about a death."""
    lines = [line.strip() for line in str(getattr(error, "cause", None) or error).splitlines() if line.strip()]
    telling = [line for line in lines if "exit" in line or "node" in line or "memory" in line]
    line = (telling or lines or [type(error).__name__])[0]
    return (line.partition("Worker exit detail: ")[2] or line).partition(" Some common causes")[0][:200]


# ------------------------------------------------------------------------------------------ on workers


@contextmanager
def _watched(limit: float | None) -> Iterator[None]:
    """End this process, with its traceback in its log, if the block takes longer.

    From outside, a step that hangs looks like one that is queued, and no exception reaches code that hangs in a
    library.
    """
    if limit is not None:
        faulthandler.dump_traceback_later(limit, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


class _Worker:
    """Keeps a job's models loaded. They load with the first shard, so that a failure to load is that shard's error."""

    def __init__(self, pickled_job: bytes) -> None:
        self.pickled_job = pickled_job

    def started(self) -> str:
        """The node's id, once the actor is scheduled, runs the driver's code, and has read what takes long to import.

        A shard has a limit on its time, and on a busy machine torch alone may take half a minute.
        """
        import ray
        import torch  # noqa: F401

        unpack(self.pickled_job)
        return str(ray.get_runtime_context().get_node_id())

    @cached_property
    def open(self) -> Callable[[Any], Any]:
        return unpack(self.pickled_job).open()  # type: ignore[no-any-return]

    def work(self, given: StepResult, limit: float | None) -> tuple[StepResult, None]:
        """The result, and a signal that it is there, which the driver can fetch without the data."""
        with _watched(limit):
            return work_on(self.open, given, heavy=True), None


def _read(pickled_job: bytes, unit: Unit, limit: float | None) -> StepResult:
    with _watched(limit):
        return read(unpack(pickled_job), unit)


def _commit(pickled_job: bytes, unit: Unit, given: StepResult, attempt: int, limit: float | None) -> dict[str, Any]:
    with _watched(limit):
        return commit(unpack(pickled_job), unit, given, attempt)


def _make(pickled_job: bytes, unit: Unit, attempt: int, limit: float | None) -> dict[str, Any]:
    with _watched(limit):
        job = unpack(pickled_job)
        return make(job, job.open(), unit, attempt)


def _steps(pickled_job: bytes) -> Iterator[dict[str, Any]]:
    yield ddp.BEGAN
    yield from unpack(pickled_job).steps()


def _nothing() -> None:
    """Ends as soon as a worker has room for it."""
