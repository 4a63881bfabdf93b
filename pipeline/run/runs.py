"""One attempt to make an experiment's nodes, and its record: what was found, made, and failed."""

import json
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from threading import Event, RLock, Thread
from typing import Any

from pipeline.experiment.graph import Node, build
from pipeline.experiment.spec import Experiment
from pipeline.run import artifacts, documents, removals
from pipeline.run.artifacts import Artifact
from pipeline.run.documents import Amount, Count, Document, Moment, NodeId, RunName, Version, Word
from pipeline.run.engines import Engine, FailedShard, Inline, reason_of
from pipeline.run.jobs import JOBS, Context, ModelJob, ShardJob, Unit
from pipeline.run.preflight import NodeStatus, wanted
from pipeline.run.why import outdated
from pipeline.store import Store, at_once
from stages.errors import BadData, BadInput, did_you_mean, some

BEAT = 10.0
"""Seconds between signs of life of a run."""

EVENTS = 60.0
"""Seconds between two writes of all events so far."""

WAITS = 60.0
"""Seconds for which no worker takes up anything until the watcher is told, then and as often again."""

LOST_AFTER = 60.0
"""Seconds without a sign of life after which a run counts as dead."""

TOMORROW = 86_400.0
"""Seconds by which a clock may be ahead before its dates are ignored."""

LEFTOVERS = 3600.0
"""Age in seconds from which a new run deletes half-written files."""


@dataclass
class Progress:
    """The progress of a node.

    Attributes:
        state: waiting (for its inputs), queued (for a worker), running, done, cached, failed, or interrupted: at work
            when the run ended.
        why: one sentence, if it failed or cannot start.
        total, done: shards, or epochs of a training.
        found: of those done, how many were there before this run.
        images: images processed in this run.
        total_images: images that this run has to process.
        retries: shards or epochs that were restarted.
        store_retries: requests that its workers sent to the store again.
        started, seconds: when its first shard or epoch began (seconds since 1970), and its duration from then on; while
            it is queued, `started` is since when.
        work: seconds that all workers together spent working on its shards.
        lost: shards that could not be made, with reasons.
        last: metrics of the last step.
        devices: kind of device → its shards or epochs that were made on one, in this run and before.
    """

    stage: Word
    version: Version
    state: Word = "waiting"
    why: str | None = None
    total: int = 0
    done: int = 0
    found: int = 0
    images: int = 0
    total_images: int = 0
    retries: int = 0
    store_retries: int = 0
    started: float | None = None
    seconds: float | None = None
    work: float = 0.0
    lost: list[dict[str, str]] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)
    devices: dict[str, int] = field(default_factory=dict)


def in_words(state: str) -> str:
    """A node's state as people read it; `plan` has the same word for a node that need not be made."""
    return "there" if state == "cached" else state


Watcher = Callable[[str, Progress, str], None]
"""Called with each event: node, its progress, the event."""


class Record:
    """The run in the store: ``run.json`` every few seconds, ``events.jsonl`` every minute, both at every turn."""

    def __init__(
        self, context: Context, experiment: Experiment, only: tuple[str, ...], nodes: list[Node], watch: Watcher
    ) -> None:
        self.store, self.watch, self.lock, self.ended = context.store, watch, RLock(), Event()
        started = datetime.now(UTC)
        self.id = f"{started:%Y%m%d-%H%M%S}-{experiment.name}-{secrets.token_hex(2)}"
        self.nodes = {node.id: Progress(node.stage, node.version) for node in nodes}
        self.about = {
            "run": self.id,
            "experiment": experiment.model_dump(mode="json", exclude_defaults=True),
            "written": experiment.written,
            "state": "running",
            "started": started.isoformat(timespec="seconds"),
            "only": list(only),
            "data": str(context.data),
            "here": str(context.here),
            "host": artifacts.host(),
            "pid": os.getpid(),
            "job": os.environ.get("NOTBUGS_JOB"),
            "environment": artifacts.environment(),
        }
        self.events: list[str] = []
        self.told = 0.0
        self.waited = 0.0

    def note(self, node: str, event: str, **facts: Any) -> None:
        """Record an event and call the watcher; a change of a node's state is written at once."""
        with self.lock:
            self.watch(node, self.nodes[node], event)
            at = datetime.now(UTC).isoformat(timespec="milliseconds")
            self.events.append(json.dumps({"at": at, "node": node, "event": event, **facts}))
            if event in ("started", "done", "cached", "failed"):
                self.write(turn=True)

    def start(self) -> None:
        """Write the record, and from now on give signs of life however long a step takes."""
        self.write(turn=True)
        Thread(target=self._beat, daemon=True, name="record").start()

    def _beat(self) -> None:
        while not self.ended.wait(BEAT):
            try:
                self._tell_waiting()
                self.write()
            except (OSError, BadInput):
                continue  # the store is away: the missing sign of life shows it, and the work itself reports it

    def _tell_waiting(self) -> None:
        """Tell the watcher of the node that has waited longest for a worker, while none is at work."""
        with self.lock:
            queued = {node: one for node, one in self.nodes.items() if one.state == "queued" and one.started}
            if not queued or any(one.state == "running" for one in self.nodes.values()):
                return
            first = min(queued, key=lambda node: queued[node].started or 0.0)
            since = max(self.waited, queued[first].started or 0.0)
            if time.time() - since >= WAITS:
                self.waited = time.time()
                self.watch(first, queued[first], "waits")

    def write(self, turn: bool = False) -> None:
        """Write the record; the events, which no object store can append to, seldom or at a turn."""
        with self.lock:
            nodes = {name: asdict(progress) for name, progress in self.nodes.items()}
            now = {"updated": time.time(), "store_retries": self.store.retries, "nodes": nodes}
            self.store.put_json(f"runs/{self.id}/run.json", self.about | now)
            if turn or time.monotonic() - self.told > EVENTS:
                self.told = time.monotonic()
                self.store.put(f"runs/{self.id}/events.jsonl", "".join(f"{line}\n" for line in self.events).encode())

    def end(self, state: str) -> None:
        """Write the record for the last time."""
        self.ended.set()
        for progress in self.nodes.values():
            if progress.state in ("queued", "running"):
                progress.state = "interrupted" if progress.state == "running" else "waiting"
        self.about |= {"state": state, "ended": datetime.now(UTC).isoformat(timespec="seconds")}
        self.write(turn=True)


def unnoticed(*_: Any) -> None:
    """Take no notice of an event."""


class Run:
    """Makes the missing nodes of an experiment.

    Args:
        experiment: what to make.
        context: where.
        only: names or ids of the wanted nodes, which are made with all that they need; by default all.
        watch: called with each event.
        checked: the outcome of `preflight`, whose jobs have listed sources and read weights; else they do so here.
        published: called with each node that the run has made, once its manifest is written.
    """

    def __init__(
        self,
        experiment: Experiment,
        context: Context,
        only: tuple[str, ...] = (),
        watch: Watcher = unnoticed,
        checked: Sequence[NodeStatus] | None = None,
        published: Callable[[Artifact], None] = unnoticed,
    ) -> None:
        self.experiment, self.context, self.published = experiment, context, published
        self.jobs = {status.node.id: status.job for status in checked or ()}
        self.same = {status.node.id: status.same for status in checked or ()}
        self.nodes = [status.node for status in checked] if checked else wanted(build(experiment), only)
        self.made: dict[str, Artifact] = {}
        self.condemned: dict[str, str] = {}
        self.record = Record(context, experiment, only, self.nodes, watch)

    def go(self, engine: Engine, display: AbstractContextManager[Any] | None = None) -> bool:
        """Make every node whose inputs are there, side by side where the engine can.

        Args:
            engine: what makes them.
            display: opened for that time; it closes before the record is written for the last time.

        Returns:
            Whether everything was made.
        """
        self.context.store.sweep(older_than=time.time() - LEFTOVERS)
        self.record.start()
        try:
            self.condemned = removals.condemned(self.context.store)  # after the record is written: see `removals`
            with display or nullcontext():
                self._make_all(engine)
        except BaseException as error:
            with suppress(OSError, BadInput):  # a store that is away, or full, may be what went wrong
                self.record.end("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            raise
        complete = len(self.made) == len(self.nodes)
        self.record.end("done" if complete else "failed")
        return complete

    def _make_all(self, engine: Engine) -> None:
        todo, running = list(self.nodes), dict[Future[Any], Node]()
        while todo or running:
            for node in [n for n in todo if all(i.id in self.made for i in n.inputs.values())]:
                if any(_same(node, other) for other in running.values()):
                    continue  # it is being made, under another name
                todo.remove(node)
                running[engine.start(partial(self._make, node, engine))] = node
            if not running:
                self._give_up(todo)
                break
            ended, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in ended:
                self._settle(running.pop(future), future)

    def _settle(self, node: Node, future: "Future[Artifact]") -> None:
        progress, error = self.record.nodes[node.id], future.exception()
        if error is None:
            self.made[node.id] = future.result()
        else:
            progress.state, progress.why = "failed", reason_of(error)
            self.record.note(node.id, "failed", why=progress.why)

    def _give_up(self, nodes: list[Node]) -> None:
        for node in nodes:
            missing = [i.id for i in node.inputs.values() if i.id not in self.made]
            self.record.nodes[node.id].why = f"needs {', '.join(missing)}"

    def _make(self, node: Node, engine: Engine) -> Artifact:
        inputs = {role: self.made[parent.id] for role, parent in node.inputs.items()}
        progress = self.record.nodes[node.id]
        if node.folder in self.condemned:
            progress.why = "waits for `notbugs gc`, which is removing this version"
            removals.wait(self.context.store, self.condemned[node.folder], node.folder)
            progress.why = None
        job = self.jobs.pop(node.id, None) or JOBS[node.stage](node, self.context, inputs)
        job.inputs = inputs  # until now, what was predicted of them
        job.note_sources()
        if (there := self._find(job)) is not None:
            progress.state = "cached"
            self.record.note(node.id, "cached", at=there.folder)
            return there
        progress.state, progress.started = "queued" if engine.queues else "running", time.time()
        job.refuse_mismatch()
        made = self._make_model(job, engine) if isinstance(job, ModelJob) else self._make_shards(job, engine)
        progress.state, progress.seconds = "done", round(time.time() - progress.started, 1)
        progress.devices = made.manifest["devices"]
        self.published(made)
        self.record.note(node.id, "done", seconds=progress.seconds, devices=progress.devices)
        return made

    def _find(self, job: ShardJob | ModelJob) -> Artifact | None:
        """The artifact of a job, made from exactly these inputs and files, under its name or another.

        Otherwise its manifest is withdrawn: a node that is being remade must not look finished, since its old manifest
        would cover old and new shards.
        """
        store, node = self.context.store, job.node
        made = artifacts.find(store, node)
        if made is not None and not outdated(job, made):
            return made
        artifacts.withdraw(store, node.folder, set())
        others = [self.made[other.id].folder for other in self.nodes if other.id in self.made and _same(node, other)]
        for folder in dict.fromkeys(filter(None, [self.same.get(node.id), *others])):
            twin = artifacts.find(store, node, folder) if folder not in self.condemned else None
            if twin is not None and not outdated(job, twin):
                return artifacts.point(store, node, twin)
        return None

    def _make_shards(self, job: ShardJob, engine: Engine) -> Artifact:
        """Make the shards that a listing lacks; then read the marks of the rest, and make those without a valid one."""
        units, there, marks = job.units(), job.stored(), dict[str, dict[str, Any]]()
        progress = self.record.nodes[job.node.id]
        marked = [unit for unit in units if artifacts.mark_path(unit.name) in there]
        progress.total, progress.done, progress.found = len(units), len(marked), len(marked)
        self.record.note(job.node.id, "started", shards=len(units), there=len(marked))
        self._commit([unit for unit in units if artifacts.mark_path(unit.name) not in there], job, engine, marks)
        self._begun(job.node)
        marks |= job.committed(marked, there)
        stale = [unit for unit in marked if unit.name not in marks]
        progress.done, progress.found = len(marks), len(marked) - len(stale)
        self._commit(stale, job, engine, marks)
        return job.finish(marks)

    def _begun(self, node: Node) -> None:
        """A worker took up the node, whose duration counts from now on."""
        progress = self.record.nodes[node.id]
        if progress.state == "queued":
            progress.state, progress.started = "running", time.time()
            self.record.note(node.id, "began")

    def _commit(self, todo: list[Unit], job: ShardJob, engine: Engine, marks: dict[str, dict[str, Any]]) -> None:
        """Have some shards made, and collect their commit marks.

        Raises:
            BadData: some could not be made.
        """
        node, progress = job.node, self.record.nodes[job.node.id]
        progress.total_images += sum(unit.samples for unit in todo)

        def report(event: str, facts: dict[str, Any]) -> None:
            self._begun(node)
            if event == "began":
                return
            if event == "committed":
                marks[facts["name"]] = facts
                progress.done += 1
                progress.images += facts["samples"] + facts.get("failures", 0)
                progress.store_retries += facts["store_retries"]
                progress.work = round(progress.work + facts["seconds"]["work"], 3)
            else:
                progress.retries += 1
            self.record.note(node.id, event, **_brief(facts))

        if todo and (lost := engine.shards(job, todo, report)):
            progress.lost = [asdict(one) for one in lost]
            raise BadData(_sentence(lost, progress.total))

    def _make_model(self, job: ModelJob, engine: Engine) -> Artifact:
        node, progress = job.node, self.record.nodes[job.node.id]
        progress.total, progress.total_images = job.epochs, job.epoch_images() * job.epochs
        published: list[Artifact] = []
        self.record.note(node.id, "started", epochs=job.epochs)
        maker = Inline() if job.ready else engine
        if not maker.queues:
            self._begun(node)

        def report(event: str, facts: dict[str, Any]) -> None:
            self._begun(node)
            if event == "began":
                return
            if "manifest" in facts:
                published.append(Artifact(node.folder, facts["manifest"]))
                return
            if event == "epoch":
                if progress.images == 0:
                    progress.found = facts["epoch"] - 1
                    progress.total_images = job.epoch_images() * (job.epochs - progress.found)
                progress.done, progress.last = facts["epoch"], facts
                progress.store_retries += facts.get("store_retries", 0)
                progress.images += job.epoch_images()
            else:
                progress.retries += 1
            self.record.note(node.id, event, **facts)

        maker.model(job, report)
        return published[0]


def _same(node: Node, other: Node) -> bool:
    """Whether two nodes are the same recipe under two names."""
    return (node.group, node.version) == (other.group, other.version)


def _brief(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in facts.items() if k in ("name", "unit", "samples", "attempt", "seconds", "reason", "host")}


def _sentence(lost: list[FailedShard], total: int) -> str:
    first = f"{lost[0].unit}: {lost[0].reason}"
    return f"{len(lost)} of {total} shards failed, {'the first: ' if len(lost) > 1 else ''}{first}"


# ------------------------------------------------------------------------------------- runs on record


class RunRecord(Document):
    """``run.json``."""

    run: RunName
    experiment: dict[str, Any]
    written: str | None = None
    state: Word
    started: Moment
    only: list[str]
    data: str
    here: str
    host: str
    updated: Amount
    store_retries: Count
    nodes: dict[NodeId, Progress]


def find(store: Store, run: str) -> dict[str, Any] | None:
    """A run's record, its state judged by its signs of life; None where it is missing or cannot be trusted."""
    found = documents.find(store, f"runs/{run}/run.json", RunRecord)
    if found is None or found["run"] != run:
        return None
    silent = time.time() - found["updated"]
    if found["state"] == "running" and not -TOMORROW < silent < LOST_AFTER:
        found["state"], found["why"] = "lost", f"no sign of life for {max(silent, 0.0):.0f} s"
    return found


def records(store: Store) -> dict[str, dict[str, Any] | None]:
    """Every run of a store with its record, the newest first; None for each whose record cannot be trusted."""
    runs = names(store)
    return dict(zip(runs, at_once(partial(find, store), runs), strict=True))


def names(store: Store) -> list[str]:
    """The runs of a store, the newest first; those that a clock dated later than tomorrow come last."""
    future = f"{datetime.now(UTC) + timedelta(seconds=TOMORROW):%Y%m%d-%H%M%S}"
    return sorted(store.folders("runs"), key=lambda name: (name < future, name), reverse=True)


def load_run(
    store: Store,
    run: str | None = None,
    fits: Callable[[dict[str, Any]], bool] = lambda record: True,
    pass_over: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """A run on record.

    Args:
        store: where.
        run: its name, or an experiment's, of whose runs, or by default of all, the newest that fits is meant, or the
            newest where none does.
        fits: what is asked of it, where no name is given.
        pass_over: called with the name of each newer run whose record cannot be read.

    Raises:
        BadInput: there is no such run, or none at all.
        BadData: the record of the run asked for cannot be read.
    """
    candidates = names(store)
    if run is not None and run not in candidates:
        of_experiment = [name for name in candidates if experiment_of(name) == run]
        if not of_experiment:
            known = list(dict.fromkeys(filter(None, map(experiment_of, candidates))))
            there = f"; there are runs of {some(known)}" if known else ""
            near = did_you_mean(run, [*known, *candidates]) or there
            raise BadInput(f"there is no run {run} in {store.url}{near}")
        candidates, run = of_experiment, None
    if run is not None:
        if (found := find(store, run)) is None:
            raise BadData(
                f"the record of run {run} is missing or damaged; what the run made is there all the same: "
                "`notbugs run FILE` goes on from it"
            )
        return found
    newest = None
    for name in candidates:
        if (found := find(store, name)) is None:
            pass_over(name)
        elif fits(found):
            return found
        else:
            newest = newest or found
    if newest is None:
        raise BadInput(f"there are no runs in {store.url}: name another store, or make a run with `notbugs run FILE`")
    return newest


def experiment_of(run: str) -> str | None:
    """The name of a run's experiment, which is a part of the run's."""
    return run.split("-", 2)[2].rpartition("-")[0] if documents.fits(RunName, run) else None


RECENT = 20
"""Runs of an experiment, the newest, that are read for the versions it had."""


def had(store: Store, experiment: str) -> set[str]:
    """Folders of the versions that recent runs of an experiment of this name made or found."""
    of_it = [name for name in names(store) if experiment_of(name) == experiment][:RECENT]
    return set().union(*(versions(record) for record in at_once(partial(find, store), of_it) if record))


def versions(record: Mapping[str, Any]) -> set[str]:
    """Folders of the versions that a run names."""
    return {f"{node}/{progress['version']}" for node, progress in record["nodes"].items()}


def has_results(record: Mapping[str, Any]) -> bool:
    """Whether there is a table to show of a run."""
    nodes = record["nodes"].items()
    return any(name.startswith("evaluations/") and p["state"] in ("done", "cached") for name, p in nodes)


def verify(store: Store, run: str) -> list[artifacts.Damage]:
    """What is wrong with the record of a run; without one, nothing stands there that could be."""
    if find(store, run) is not None or not store.exists(f"runs/{run}/run.json"):
        return []
    return [artifacts.Damage(f"runs/{run}", "run.json", artifacts.NOT_OURS)]
