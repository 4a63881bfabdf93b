"""One attempt to make what an experiment names: what it found, made and failed to make, on record."""

import json
import math
import os
import secrets
import time
from collections.abc import Callable, Container, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from threading import Event, RLock, Thread
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.experiment.graph import Node, build
from pipeline.experiment.spec import Experiment
from pipeline.experiment.sweeps import split_name
from pipeline.run import artifacts, documents
from pipeline.run.artifacts import Made
from pipeline.run.documents import Amount, Count, Document, Moment, NodeId, RunName, Version, Word
from pipeline.run.engines import Engine, Lost, reason_of
from pipeline.run.jobs import JOBS, LoadJob, ModelJob, Place, ShardJob, Unit, design_of
from pipeline.store import Store
from stages import load
from stages.apart import apart, forget
from stages.errors import BadData, BadInput, did_you_mean, short, some
from stages.limits import MEMORY
from stages.recipes import Bring, Relabel, is_own
from stages.select import kept

if TYPE_CHECKING:
    from stages.design import Design

T = TypeVar("T")

BEAT = 10.0
"""Seconds between signs of life of a run."""

EVENTS = 60.0
"""Seconds between two writings of all events so far."""

LOST_AFTER = 60.0
"""Seconds without a sign of life after which a run counts as dead."""

TOMORROW = 86_400.0
"""Seconds by which a clock may be ahead before what it dated is not believed."""

LEFTOVERS = 3600.0
"""Age in seconds of half-written files that a new run sweeps away."""


@dataclass
class Progress:
    """How far a node is.

    Attributes:
        state: waiting, running, done, cached, failed, or interrupted: at work when the run ended.
        why: one sentence, where it failed or cannot start.
        total, done: shards, or epochs of a training.
        found: of those done, how many were there before this run.
        images: images gone through in this run.
        total_images: images that this run has to go through.
        retries: shards or epochs that were begun again.
        store_retries: requests that its workers sent to the store again.
        started, seconds: when it began (seconds since 1970), and how long it took.
        work: seconds that workers were at the work on its shards, all of them together.
        lost: shards that could not be made, with reasons.
        last: what the last step measured.
        devices: kind of device → how many of its shards or epochs were made on one, in this run and before.
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


Watcher = Callable[[str, Progress, str], None]
"""Told of each event: node, how far it is, what happened."""


class Record:
    """The run in the store: ``run.json`` every few seconds, ``events.jsonl`` every minute, both at every turn."""

    def __init__(
        self, place: Place, experiment: Experiment, only: tuple[str, ...], nodes: list[Node], watch: Watcher
    ) -> None:
        self.store, self.watch, self.lock, self.ended = place.store, watch, RLock(), Event()
        started = datetime.now(UTC)
        self.id = f"{started:%Y%m%d-%H%M%S}-{experiment.name}-{secrets.token_hex(2)}"
        self.nodes = {node.id: Progress(node.stage, node.version) for node in nodes}
        self.about = {
            "run": self.id,
            "experiment": experiment.model_dump(mode="json", exclude_defaults=True),
            "state": "running",
            "started": started.isoformat(timespec="seconds"),
            "only": list(only),
            "data": str(place.data),
            "here": str(place.here),
            "host": artifacts.host(),
            "pid": os.getpid(),
            "job": os.environ.get("NOTBUGS_JOB"),
            "environment": artifacts.environment(),
        }
        self.events: list[str] = []
        self.told = 0.0

    def note(self, node: str, event: str, **facts: Any) -> None:
        """Record an event, and tell the watcher; what changes a node's state is written at once."""
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
                self.write()
            except (OSError, BadInput):
                continue  # the store is away: that there is no sign of life says so; the work itself reports it

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
            if progress.state == "running":
                progress.state = "interrupted"
        self.about |= {"state": state, "ended": datetime.now(UTC).isoformat(timespec="seconds")}
        self.write(turn=True)


class Run:
    """Makes what is missing of an experiment.

    Args:
        experiment: what to make.
        place: where.
        only: names or ids of the nodes wanted, with what they need; by default all.
        watch: told of each event.
    """

    def __init__(
        self,
        experiment: Experiment,
        place: Place,
        only: tuple[str, ...] = (),
        watch: Watcher = lambda node, progress, event: None,
    ) -> None:
        self.experiment, self.place = experiment, place
        self.nodes = wanted(build(experiment), only)
        self.made: dict[str, Made] = {}
        self.record = Record(place, experiment, only, self.nodes, watch)

    def go(self, engine: Engine) -> bool:
        """Make every node whose inputs are there, side by side where the engine can.

        Returns:
            Whether everything was made.
        """
        self.place.store.sweep(older_than=time.time() - LEFTOVERS)
        todo, running = list(self.nodes), dict[Future[Any], Node]()
        self.record.start()
        try:
            while todo or running:
                for node in [n for n in todo if all(i.id in self.made for i in n.inputs.values())]:
                    todo.remove(node)
                    running[engine.start(partial(self._make, node, engine))] = node
                if not running:
                    self._give_up(todo)
                    break
                ended, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in ended:
                    self._settle(running.pop(future), future)
        except BaseException as error:
            with suppress(OSError, BadInput):  # a store that is away, or full, may be what went wrong
                self.record.end("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            raise
        complete = len(self.made) == len(self.nodes)
        self.record.end("done" if complete else "failed")
        return complete

    def _settle(self, node: Node, future: "Future[Made]") -> None:
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

    def _make(self, node: Node, engine: Engine) -> Made:
        inputs = {role: self.made[parent.id] for role, parent in node.inputs.items()}
        progress = self.record.nodes[node.id]
        if (there := artifacts.find_or_withdraw(self.place.store, node, inputs)) is not None:
            progress.state = "cached"
            self.record.note(node.id, "cached")
            return there
        progress.state, progress.started = "running", time.time()
        refuse_mismatch(node, {role: made.manifest for role, made in inputs.items()})
        job = JOBS[node.stage](node, self.place, inputs)
        made = self._make_model(job, engine) if isinstance(job, ModelJob) else self._make_shards(job, engine)
        progress.state, progress.seconds = "done", round(time.time() - progress.started, 1)
        progress.devices = made.manifest["devices"]
        self.record.note(node.id, "done", seconds=progress.seconds, devices=progress.devices)
        return made

    def _make_shards(self, job: ShardJob, engine: Engine) -> Made:
        """Make what one listing says is missing; then read the marks of the rest, and make what does not hold."""
        units, there, marks = job.units(), job.stored(), dict[str, dict[str, Any]]()
        progress = self.record.nodes[job.node.id]
        marked = [unit for unit in units if artifacts.mark_path(unit.name) in there]
        progress.total, progress.done, progress.found = len(units), len(marked), len(marked)
        self.record.note(job.node.id, "started", shards=len(units), there=len(marked))
        self._commit([unit for unit in units if artifacts.mark_path(unit.name) not in there], job, engine, marks)
        marks |= job.committed(marked, there)
        stale = [unit for unit in marked if unit.name not in marks]
        progress.done, progress.found = len(marks), len(marked) - len(stale)
        self._commit(stale, job, engine, marks)
        return job.finish(marks)

    def _commit(self, todo: list[Unit], job: ShardJob, engine: Engine, marks: dict[str, dict[str, Any]]) -> None:
        """Have some shards made, and collect their commit marks.

        Raises:
            BadData: some could not be made.
        """
        node, progress = job.node, self.record.nodes[job.node.id]
        progress.total_images += sum(unit.samples for unit in todo)

        def report(event: str, facts: dict[str, Any]) -> None:
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
            raise BadData(_tell(lost, progress.total))

    def _make_model(self, job: ModelJob, engine: Engine) -> Made:
        node, progress = job.node, self.record.nodes[job.node.id]
        progress.total, progress.total_images = job.epochs, job.images() * job.epochs
        published: list[Made] = []
        self.record.note(node.id, "started", epochs=job.epochs)

        def report(event: str, facts: dict[str, Any]) -> None:
            if "manifest" in facts:
                published.append(Made(node.folder, facts["manifest"]))
                return
            if event == "epoch":
                if progress.images == 0:
                    progress.found = facts["epoch"] - 1
                    progress.total_images = job.images() * (job.epochs - progress.found)
                progress.done, progress.last = facts["epoch"], facts
                progress.store_retries += facts.get("store_retries", 0)
                progress.images += job.images()
            else:
                progress.retries += 1
            self.record.note(node.id, event, **facts)

        engine.model(job, report)
        return published[0]


def _brief(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in facts.items() if k in ("name", "unit", "samples", "attempt", "seconds", "reason", "host")}


def _tell(lost: list[Lost], total: int) -> str:
    first = f"{lost[0].unit}: {lost[0].reason}"
    return f"{len(lost)} of {total} shards failed, {'the first: ' if len(lost) > 1 else ''}{first}"


def wanted(nodes: list[Node], only: tuple[str, ...]) -> list[Node]:
    """The nodes asked for with all that they need, in order; of a sweep, a name means all its points.

    Raises:
        BadInput: a name that is no node's.
    """
    if not only:
        return nodes
    names = {node.id: {node.id, node.name, *(split_name(name)[0] for name in (node.id, node.name))} for node in nodes}
    chosen = [node for name in only for node in nodes if name in names[node.id]]
    if missing := [name for name in only if not any(name in known for known in names.values())]:
        known = {name for several in names.values() for name in several}
        near = did_you_mean(missing[0], known) or f"; it has {some(list(names))}"
        raise BadInput(f"--only {short(missing[0])}: the experiment has no such node{near}")
    keep: set[str] = set()
    while chosen:
        node = chosen.pop()
        keep.add(node.id)
        chosen.extend(node.inputs.values())
    return [node for node in nodes if node.id in keep]


# ------------------------------------------------------------------------- before anything is written


@dataclass(frozen=True)
class Outlook:
    """What is known of a node before a run.

    Attributes:
        node: the node.
        there: whether it stands in the store, whole.
        partial: shards that are committed, where it is not.
        facts: its manifest, or what can be foreseen of it.
        job: the job of a load that is not there, its source listed.
    """

    node: Node
    there: bool
    partial: int
    facts: Mapping[str, Any]
    job: LoadJob | None = None

    @property
    def state(self) -> str:
        """One phrase for a person."""
        if self.there:
            return "there"
        return f"{self.partial} shards there, rest to make" if self.partial else "to make"


def preflight(nodes: list[Node], place: Place, fetch: bool = True) -> list[Outlook]:
    """Check all that can be checked without doing the work, and say what is there already.

    Sources are listed, networks built and tried once on empty images, splits and maps held against
    each other. Nothing is written to the store.

    Args:
        nodes: what is to be made, each after its inputs.
        place: where.
        fetch: whether sources that are not there may be downloaded.

    Raises:
        BadInput: the first thing that cannot be.
    """
    forget()
    found: dict[str, Outlook] = {}
    for node in nodes:
        inputs = {role: found[parent.id].facts for role, parent in node.inputs.items()}
        refuse_mismatch(node, inputs)
        made = artifacts.find(place.store, node)
        marks = [] if made else [f for f in place.store.files(f"{node.folder}/commits") if f.endswith(".json")]
        job = LoadJob(node, place, {}, fetch) if node.stage == "load" and made is None else None
        try:
            if made is None:
                _try_models(node, place, found)
            facts = made.manifest if made else _foresee(node, place, inputs, job, fetch)
        except BadInput as error:
            raise BadInput(f"{_file_key(node)}: {error}") from error
        found[node.id] = Outlook(node, made is not None, len(marks), facts, job)
    return list(found.values())


def _file_key(node: Node) -> str:
    """The place in the experiment file that asks for a node."""
    place = f"{node.group}.{node.name}"
    key = {"bring": "load", "evaluate": None}.get(node.stage, node.stage)
    return f"{place}.{key}" if key else place


def _foresee(
    node: Node, place: Place, inputs: Mapping[str, Mapping[str, Any]], job: LoadJob | None, fetch: bool
) -> dict[str, Any]:
    """What can be known of a node before it is made, in the terms of its manifest."""
    match node.stage:
        case "load":
            assert job is not None
            spread = load.spread(job.listing, node.recipe)  # not `job.units`: these are digests of every image
            shards = {name: len(items) for name, items in spread.items()}
            facts = job.facts() | _counted(shards) | {"image_shape": _first_shape(job, spread)}
            _refuse_heavy(facts)
            return facts
        case "attack" | "invert" | "select":
            images = inputs["images"]
            splits = getattr(node.recipe, "splits", images["counts"])
            shards = _shards_of(images, splits)
            if node.stage == "select":
                shards = {name: kept(node.recipe, n) for name, n in shards.items()}
            if node.stage == "invert":
                _try_features(node, place, "model", inputs)
            return {k: images[k] for k in ("classes", "channels", "image_shape")} | _counted(shards)
        case "train":
            return {"design": _try_training(node, place, inputs)}
        case "bring":
            from stages.pretrained import checkpoint

            if not fetch and checkpoint.is_remote(node.recipe):
                classes = len(node.recipe.outputs) if node.recipe.outputs else node.recipe.classes
                return {"design": {"classes": classes, "shape": node.recipe.shape}}
            return {"design": _tried(node, _brought, node.recipe, place.data, place.here).as_json()}
        case "usefulness":
            for name in node.recipe.models:
                _try_features(node, place, f"models.{name}", inputs)
    splits = {getattr(node.recipe, key) for key, _, _ in _splits_asked(node)}
    return {"shards": _shards_of(inputs["on"], splits)}


def _refuse_heavy(facts: Mapping[str, Any]) -> None:
    """Refuse shards that no worker could hold, as far as the size of the images is known."""
    if facts["image_shape"] and (size := _largest(facts) * math.prod(facts["image_shape"])) > MEMORY:
        raise BadInput(
            f"a shard of {_largest(facts)} images of {'×'.join(map(str, facts['image_shape']))} takes "
            f"{size / 2**30:.1f} GiB, at most {MEMORY / 2**30:g} GiB are taken: lower shard_size"
        )


def _shards_of(dataset: Mapping[str, Any], splits: Container[str]) -> dict[str, int]:
    return {name: count for name, count in dataset["shards"].items() if name.rpartition("-")[0] in splits}


def _counted(shards: dict[str, int]) -> dict[str, Any]:
    return {"shards": shards, "counts": artifacts.per_split(shards.items())}


def _tried(model: Node, function: Callable[..., T], *args: Any) -> T:
    """What a function gives that builds a model's network: apart from this process where that is code of the user's."""
    arch = model.arch or ""
    return apart(function, *args, arch=arch) if is_own(arch) else function(*args)


def _neutral(channels: int) -> dict[str, list[float]]:
    """Stands for the mean and deviation of a split, which are not known yet, or make no difference."""
    return {"mean": [0.5] * channels, "std": [0.5] * channels}


def _brought(recipe: Bring, data: Path, here: Path) -> "Design":
    from stages.pretrained import checkpoint

    return checkpoint.bring(recipe, data, here)[0]


def _try_models(node: Node, place: Place, found: Mapping[str, Outlook]) -> None:
    """Try the user's networks among the models that are there already and that a node is made from.

    Raises:
        BadInput: one can no longer be built, or ends the process.
    """
    from stages import train
    from stages.design import Design

    for parent in node.inputs.values():
        if parent.group == "models" and found[parent.id].there and is_own(parent.arch):
            design = found[parent.id].facts["design"] | {"arch": parent.arch}
            design = Design.from_json(design | _neutral(design["shape"][0]))
            _tried(parent, train.refuse_misfit, design, place.here)


def _try_features(node: Node, place: Place, role: str, inputs: Mapping[str, Mapping[str, Any]]) -> None:
    """Find the features of a model, before any work is done.

    Raises:
        BadInput: it has none.
    """
    from stages import features
    from stages.design import Design

    if "arch" in (design := inputs[role]["design"]):  # of a model to be fetched, only so much is known
        model = node.inputs[role]
        asked = Design.from_json(design | {"arch": model.arch})
        _tried(model, features.refuse_without, asked, node.recipe.layer, place.here)


def _first_shape(job: LoadJob, spread: Mapping[str, load.Images]) -> list[int] | None:
    """Channels, height and width, from the first image that decodes; None where sizes may differ."""
    if getattr(job.node.recipe, "keeps_sizes", False):
        return None
    name, items = next(iter(spread.items()))
    for at in range(len(items)):
        with suppress(BadData):
            first = load.read(job.node.recipe, name, items[at : at + 1], job.listing.channels, None).images()
            return [first.shape[3], *first.shape[1:3]]
    return None


def _try_training(node: Node, place: Place, inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Build what is to be trained and try it on empty images; its design, as far as it is known."""
    from stages import features, train

    recipe, on = node.recipe, inputs["on"]
    count = on["counts"][recipe.split]
    if count < recipe.batch_size:
        raise BadInput(f"batch_size {recipe.batch_size} is more than the {count} images of {recipe.on} {recipe.split}")
    if on["image_shape"] is None or (recipe.probe and "arch" not in inputs["probe"]["design"]):
        return {"classes": len(on["classes"]), "shape": on["image_shape"]}
    neutral = {name: {recipe.split: value} for name, value in _neutral(on["channels"]).items()}
    design = design_of(node, {**on, **neutral}, inputs.get("probe"))
    _tried(node, train.refuse_misfit, design, place.here)
    if recipe.whiten or recipe.norm_bias_lr != 1:
        _tried(node, train.refuse_unfit, recipe, design, place.here)
    if recipe.probe:
        _tried(node, features.refuse_without, design, None, place.here)
    return dict(design.as_json())


def refuse_mismatch(node: Node, inputs: Mapping[str, Mapping[str, Any]]) -> None:
    """Hold a node against the manifests, or the foreseen facts, of what it is made from.

    Raises:
        BadInput: a split that does not exist, a map that does not fit, classes or shapes that differ.
    """
    place, recipe = _file_key(node), node.recipe
    images = inputs.get("images") or inputs.get("on")
    for key, name, split in _splits_asked(node):
        assert images is not None
        if split not in images["counts"]:
            raise BadInput(f"{place}.{key}: {name} has no split {split!r}, it has {', '.join(images['counts'])}")
    if images is not None and images["image_shape"] and (why := recipe.misfit(images["image_shape"], _largest(images))):
        raise BadInput(f"{place}: {why}")
    for role, parent in node.inputs.items():
        if parent.group == "models" and images is not None:
            _refuse_model(f"{place}.{role.partition('.')[0]}", parent.name, inputs[role], images)
    if node.stage == "attack":
        _refuse_spared_target(f"{place}.not_transferring_to", node.inputs)
    if node.stage == "select" and not _has_column(node.inputs["images"], recipe.by):
        raise BadInput(
            f"{place}: {recipe.images} has no column {recipe.by}: select from a dataset that attacks a model"
        )
    if node.relabel is not None and images is not None:
        _refuse_rule(f"{node.group}.{node.name}.relabel", node.relabel, images["classes"], recipe.model)
    if node.stage == "evaluate" and images is not None:
        rules = {"agreement": recipe.agreement} | {
            f"attacks.{i}.toward": a.toward for i, a in enumerate(recipe.attacks)
        }
        for key, rule in rules.items():
            if rule is not None:
                _refuse_rule(f"{place}.{key}", rule, images["classes"], None)


def _largest(dataset: Mapping[str, Any]) -> int:
    """Images of its largest shard."""
    return int(max(dataset["shards"].values()))


def _refuse_spared_target(place: str, inputs: Mapping[str, Node]) -> None:
    for role, spared in inputs.items():
        if role.startswith("not_transferring_to.") and spared.version == (attacked := inputs["model"]).version:
            raise BadInput(
                f"{place}: {spared.name} is the attacked model, {attacked.name}, under another name; give it a seed of "
                "its own, or leave it out"
            )


def _has_column(dataset: Node, column: str) -> bool:
    """Whether the samples of a dataset will have a column of what an attack did to them."""
    if dataset.stage == "select":
        return _has_column(dataset.inputs["images"], column)
    return dataset.stage == "attack" and (column == "l2" or "model" in dataset.inputs)


def _splits_asked(node: Node) -> list[tuple[str, str, str]]:
    """Key, dataset and split of each split that a recipe names."""
    match node.stage:
        case "attack" | "invert":
            return [("splits", node.recipe.images, split) for split in node.recipe.splits]
        case "train" | "evaluate":
            return [("split", node.recipe.on, node.recipe.split)]
        case "usefulness":
            return [(key, node.recipe.on, getattr(node.recipe, key)) for key in ("split", "normalise")]
    return []


def _refuse_model(place: str, name: str, model: Mapping[str, Any], dataset: Mapping[str, Any]) -> None:
    design, classes, shape = model["design"], len(dataset["classes"]), dataset["image_shape"]
    if design["classes"] not in (None, classes):
        raise BadInput(f"{place}: {name} knows {design['classes']} classes, the dataset has {classes}")
    if shape is not None and list(design["shape"]) != list(shape):
        sizes = ["×".join(map(str, s)) for s in (design["shape"], shape)]
        raise BadInput(f"{place}: {name} takes images of {sizes[0]}, the dataset has {sizes[1]}")


def _refuse_rule(place: str, rule: Relabel, classes: list[str], model: str | None) -> None:
    from stages.relabel import class_map

    if rule.rule == "other" and len(classes) < 2:
        raise BadInput(f"{place}: other needs another class, the dataset has one")
    if rule.rule == "least_likely" and model is None:
        raise BadInput(f"{place}: least_likely needs the attack to name a model")
    if rule.map is not None:
        try:
            class_map(rule.map, classes)
        except BadInput as error:
            raise BadInput(f"{place}.map: {error}") from error


# ------------------------------------------------------------------------------------- runs on record


class RunRecord(Document):
    """``run.json``."""

    run: RunName
    experiment: dict[str, Any]
    state: Word
    started: Moment
    only: list[str]
    data: str
    here: str
    host: str
    updated: Amount
    store_retries: Count
    nodes: dict[NodeId, Progress]


def _record(store: Store, run: str) -> dict[str, Any] | None:
    """A run's record, its state judged by its signs of life; None where it is missing or cannot be trusted."""
    found = documents.find(store, f"runs/{run}/run.json", RunRecord)
    if found is None or found["run"] != run:
        return None
    silent = time.time() - found["updated"]
    if found["state"] == "running" and not -TOMORROW < silent < LOST_AFTER:
        found["state"], found["why"] = "lost", f"no sign of life for {max(silent, 0.0):.0f} s"
    return found


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
        run: its name; by default the newest that fits, or the newest where none does.
        fits: what is asked of it, where no name is given.
        pass_over: called with the name of each newer run whose record cannot be read.

    Raises:
        BadInput: there is no such run, or none at all.
        BadData: the record of the run asked for cannot be read.
    """
    if run is not None:
        if run not in store.folders("runs"):
            raise BadInput(f"there is no run {run} in {store.url}; `notbugs status` names the latest")
        if (found := _record(store, run)) is None:
            raise BadData(
                f"the record of run {run} is missing or damaged; what the run made is there all the same: "
                "`notbugs run FILE` goes on from it"
            )
        return found
    newest = None
    for name in names(store):
        if (found := _record(store, name)) is None:
            pass_over(name)
        elif fits(found):
            return found
        else:
            newest = newest or found
    if newest is None:
        raise BadInput(f"there are no runs in {store.url}: `notbugs run FILE --store …` makes one")
    return newest


def has_results(record: Mapping[str, Any]) -> bool:
    """Whether there is a table to show of a run."""
    nodes = record["nodes"].items()
    return any(name.startswith("evaluations/") and p["state"] in ("done", "cached") for name, p in nodes)


def verify(store: Store, run: str) -> list[artifacts.Damage]:
    """What is wrong with the record of a run; without one, nothing stands there that could be."""
    if _record(store, run) is not None or not store.exists(f"runs/{run}/run.json"):
        return []
    return [artifacts.Damage(f"runs/{run}", "run.json", artifacts.NOT_OURS)]
