"""The estimated cost of a plan, node by node: images, steps, shards, bytes, device-hours, and time.

A node's work is cut into parts of one kind each, which `trial` measures; here they are counted and added up:

    shard = read + work + commit;  work = sum over parts of batches × (fixed + steps × step)

A worker (a GPU, or a processor where there is none) makes one shard after the other. Where processors are free, reading
the next shard and committing the last one overlap with that. Shards are never divided.
"""

import heapq
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any

from pipeline.cost.trial import Rate, Trials
from pipeline.report import tables
from pipeline.run.engines import in_flight
from pipeline.run.jobs import JOBS, Context, DatasetJob, PretrainedJob, ShardJob, TrainJob
from pipeline.run.jobs.base import source_of
from pipeline.run.jobs.work import Part, Work, in_batches
from pipeline.run.preflight import NodeStatus
from pipeline.terminal import duration, hours, size
from stages.errors import BadInput

SIZES = (0.25, 0.5)
"""Batch sizes that are tried, besides the recipe's, as multiples of it; one more divides a shard without remainder.
Larger sizes are tried too: each twice the last, while the shard and the memory hold it and the last doubling paid."""

SMALLEST = 8
"""Images of the smallest batch that is tried."""

NOISE, GAIN = 1.02, 1.1
"""Speed-ups: anything below the first is measurement noise; from the second on, another batch size is proposed."""


@dataclass(frozen=True)
class Site:
    """Where it is made.

    Attributes:
        devices: workers that have a GPU, or a processor, each.
        processors: of all devices together.
        start: seconds in which a worker starts.
    """

    devices: int
    processors: float
    start: float

    def of(self, devices: int) -> "Site":
        """So many devices like these."""
        return replace(self, devices=devices, processors=self.processors / self.devices * devices)


@dataclass(frozen=True)
class Cost:
    """The cost of a node.

    Attributes:
        images: gone through, in all epochs.
        steps: forward and backward passes of a batch.
        shards: to be made; 0 for a model.
        stored: bytes that it leaves in the store.
        read, work, commit: seconds of each shard; of a model each has one entry, for all of it.
        once: seconds of a worker before its first shard, besides its start.
        warm_up: of these, seconds by which a first batch is slower than those after it.
        heavy: whether it takes workers with models; the rest is done by any processor.
        workers: of a training: how many it asks for; 0 for shards.
        held: processors that a worker of a training holds, where there is no GPU.
        tried: share of a batch that was measured; the time of the whole is extrapolated from it.
        known: whether it was measured at all; a download is not.
    """

    images: int
    steps: int
    shards: int
    stored: int
    read: tuple[float, ...]
    work: tuple[float, ...]
    commit: tuple[float, ...]
    once: float = 0.0
    warm_up: float = 0.0
    heavy: bool = True
    workers: int = 0
    held: int = 1
    tried: float = 1.0
    known: bool = True

    def wall(self, site: Site) -> float:
        """Seconds from its first worker's start to its last commit, if nothing else runs."""
        if not self.work:
            return 0.0
        if self.workers:  # fewer workers have larger parts of every batch
            larger = self.workers / min(self.workers, site.devices)
            return site.start + self.once + sum(self.read) + larger * sum(self.work) + sum(self.commit)
        whole = self._whole()
        if not self.heavy:
            return site.start + max(sum(whole) / site.processors, *whole)
        paces, last = self._paces(site), len(whole) - 1
        return site.start + self.once + makespan(paces, site.devices) + whole[last] - paces[last]

    def device_seconds(self, site: Site) -> float:
        """Seconds that devices, or processors, are held, without their start and the wait for the last shard."""
        if self.workers:
            larger = self.workers / min(self.workers, site.devices)
            busy = self.once + sum(self.read) + larger * sum(self.work) + sum(self.commit)
            return busy * min(self.workers, site.devices) * min(self.held, site.devices)
        return sum(self._paces(site) if self.heavy else self._whole())

    def _whole(self) -> list[float]:
        return [sum(steps) for steps in zip(self.read, self.work, self.commit, strict=True)]

    def _paces(self, site: Site) -> list[float]:
        """Seconds from one shard to the next of a worker.

        Reading and committing overlap with work while processors are free, up to a worker's shards in flight.
        """
        processors = site.processors / site.devices
        overlap = max(1.0, min(in_flight(processors), processors))
        return [max(work, whole / overlap) for work, whole in zip(self.work, self._whole(), strict=True)]


def makespan(seconds: Iterable[float], workers: int) -> float:
    """Seconds until the last shard is done, if each goes to the first free worker."""
    free = [0.0] * workers
    for each in seconds:
        heapq.heapreplace(free, free[0] + each)
    return max(free)


@dataclass(frozen=True)
class Batch:
    """The batch size of an attack or an inversion.

    Attributes:
        recipe: the recipe's.
        fastest: the fastest of those tried that fit into memory.
        gain: its speed-up over the recipe's.
        holds: images of the largest that fits into memory, a whole shard at most.
        shard: images of the largest shard.
    """

    recipe: int
    fastest: int
    gain: float
    holds: int
    shard: int

    @property
    def fits(self) -> bool:
        """Whether the recipe's fits into memory."""
        return self.recipe <= self.holds


@dataclass(frozen=True)
class Estimate:
    """The cost of a plan.

    Attributes:
        device: what a worker has.
        site: this machine.
        nodes: id → cost, of those that are to be made.
        batches: id → the fastest batch.
        inputs: id → ids of what it is made from.
    """

    device: str
    site: Site
    nodes: dict[str, Cost]
    batches: dict[str, Batch]
    inputs: dict[str, list[str]]

    @property
    def stored(self) -> int:
        """Bytes that all nodes leave in the store."""
        return sum(cost.stored for cost in self.nodes.values())

    def device_seconds(self, site: Site) -> float:
        """Of all nodes."""
        return sum(cost.device_seconds(site) for cost in self.nodes.values())

    def wall(self, site: Site) -> tuple[float, float]:
        """Lower and upper bound in seconds: independent nodes run side by side where there is room.

        The lower bound is the longest chain of nodes, or the device time over the devices; the upper bound is one node
        after the other.
        """
        ends: dict[str, float] = {}
        for name, cost in self.nodes.items():
            begun = max((ends.get(parent, 0.0) for parent in self.inputs[name]), default=0.0)
            ends[name] = begun + cost.wall(site)
        longest = max(ends.values(), default=0.0)
        total = sum(cost.wall(site) for cost in self.nodes.values())
        return min(total, max(longest, self.device_seconds(site) / site.devices)), total


def estimate(
    statuses: Sequence[NodeStatus],
    context: Context,
    workers: int | None,
    announce: Callable[[str], None] = lambda what: None,
) -> Estimate:
    """Estimate the cost of a plan from trials on this machine.

    Args:
        statuses: all nodes, each after its inputs.
        context: where they are to be made; nothing is written there.
        workers: as for a run.
        announce: called with each kind of work before it is measured.

    Raises:
        BadInput: the cost depends on a node that has to be made first.
    """
    known = {status.node.id: status for status in statuses}
    left = {status.node.id: _left(status, context) for status in statuses if status.to_make}
    plan = {name: parts_of(known[name], known, left[name]) for name in left}
    longest: dict[bytes, Part] = {}
    for part in (work.part for parts in plan.values() for work in parts):
        longest[part.key] = max(part, longest.get(part.key, part), key=lambda one: one.steps)
    with Trials(known, context, workers, announce) as trials:
        rates = {key: trials.rate(part) for key, part in longest.items()}
        batches = {name: fastest(plan[name], list(left[name].values()), trials) for name in plan}
    stored = {s.node.id: _stored(s) for s in statuses if s.there and s.node.group == "datasets"}
    nodes: dict[str, Cost] = {}
    for name, parts in plan.items():
        nodes[name] = cost_of(known[name].job, left[name], parts, Measured(rates, trials.device.gpu, stored))
    device = trials.device
    return Estimate(
        device=device.name if device.gpu else f"one of {device.count} processors, {device.name}",
        site=Site(trials.workers, os.cpu_count() or 1, trials.start),
        nodes=nodes,
        batches={name: found for name, found in batches.items() if found is not None},
        inputs={name: [parent.id for parent in known[name].node.inputs.values()] for name in nodes},
    )


def _left(status: NodeStatus, context: Context) -> dict[str, int]:
    """The shards that are still to be made, with their images; none for a model."""
    shards: Mapping[str, int] = status.facts.get("shards", {})
    marked = set(context.store.files(f"{status.node.folder}/commits")) if shards and status.partial else set()
    return {name: count for name, count in shards.items() if f"{name}.json" not in marked}


def _stored(status: NodeStatus) -> float:
    """Bytes of an image of a dataset that is there."""
    return float(sum(file["bytes"] for file in status.facts["files"]) / sum(status.facts["counts"].values()))


def parts_of(status: NodeStatus, known: Mapping[str, NodeStatus], left: Mapping[str, int]) -> list[Work]:
    """A node's work, cut into parts.

    Args:
        status: a node that is to be made.
        known: all nodes, by id.
        left: its shards that are to be made, with the images of each.

    Raises:
        BadInput: the images that it takes may differ in size, or will only be known when they are there.
    """
    source = source_of(status.node)
    if status.node.inputs and known[source.id].facts["image_shape"] is None:
        raise BadInput(
            f"--cost: the size of the images of {source.name} is not known before they are loaded: first make it, "
            f"with --only {source.name}"
        )
    return status.job.parts(left, known[source.id].facts)


# ------------------------------------------------------------------------------------------ adding up


@dataclass(frozen=True)
class Measured:
    """The measurements that costs are computed from.

    Attributes:
        rates: of every part, by its key.
        gpu: whether a worker has a GPU.
        stored: id of a dataset → bytes of an image; what a job's images take is added.
    """

    rates: Mapping[bytes, Rate]
    gpu: bool
    stored: dict[str, float]

    def of(self, work: Work) -> Rate:
        """The rate of a part."""
        return self.rates[work.part.key]

    def seconds(self, work: Work) -> list[float]:
        """Seconds of its batches in each shard."""
        return [count * self.of(work).seconds(work.part.steps) for count in work.batches]


@singledispatch
def cost_of(job: Any, left: Mapping[str, int], parts: Sequence[Work], measured: Measured) -> Cost:
    """The cost of a node.

    Args:
        job: how it is made.
        left: its shards that are to be made, with the images of each.
        parts: its work.
        measured: the rate of every part.
    """
    raise NotImplementedError(f"no cost is known of a {type(job).__name__}")


@cost_of.register
def _sharded(job: ShardJob, left: Mapping[str, int], parts: Sequence[Work], measured: Measured) -> Cost:
    """A dataset or an evaluation."""
    main, stored, node = measured.of(parts[0]), measured.stored, job.node
    each = [work for work in parts if not work.part.once]
    single = [work for work in parts if work.part.once]
    opened = {work.part.key: measured.of(work) for work in each}.values() if job.heavy else ()
    warm_up = sum(rate.warm_up for rate in opened)
    found = sum(sum(measured.seconds(work)) for work in single)
    if isinstance(job, DatasetJob):
        stored[node.id] = stored[node.inputs["images"].id] if job.copies else main.stored
    taken = left if job.dataset is None else {name: job.dataset["shards"][name] for name in left}
    return Cost(
        images=sum(left.values()),
        steps=sum(work.part.steps * sum(work.batches) for work in parts),
        shards=len(left),
        stored=round(sum(left.values()) * stored[node.id]) if node.id in stored else 0,
        read=tuple(main.read * count for count in taken.values()),
        work=tuple(sum(column) for column in zip(*map(measured.seconds, each), strict=True)),
        commit=tuple(main.commit * count for count in left.values()),
        once=warm_up + found + sum(rate.open for rate in opened if not single),
        warm_up=warm_up,
        heavy=job.heavy,
        tried=_tried(parts, measured),
    )


@cost_of.register
def _trained(job: TrainJob, left: Mapping[str, int], parts: Sequence[Work], measured: Measured) -> Cost:
    """A training: its images are read once, or in every epoch if they exceed its memory budget."""
    recipe, (fit, watch) = job.node.recipe, parts
    on, count, rate = job.inputs["on"].manifest, job.epoch_images(), measured.of(fit)
    streamed = count * math.prod(on["image_shape"]) > recipe.memory_budget * 2**20 * recipe.workers
    passes = 1 + (recipe.adversarial.steps if recipe.adversarial else 0)
    return Cost(
        images=count * recipe.epochs,
        steps=recipe.epochs * fit.part.steps * passes,
        shards=0,
        stored=round(rate.stored),
        read=(count * measured.of(watch).read * (recipe.epochs if streamed else 1) / recipe.workers,),
        work=(sum(measured.seconds(fit)),),
        commit=(sum(measured.seconds(watch)),),
        once=rate.warm_up,
        warm_up=rate.warm_up,
        workers=recipe.workers,
        held=1 if measured.gpu else recipe.threads,
        tried=_tried(parts, measured),
    )


@cost_of.register
def _pretrained(job: PretrainedJob, left: Mapping[str, int], parts: Sequence[Work], measured: Measured) -> Cost:
    """A pretrained model that was read from this machine; one that is to be downloaded is not measured."""
    nothing = Cost(0, 0, 0, 0, (), (), (), workers=1, known=False)
    if not job.ready:
        return nothing
    weights, seconds = len(job.imported.weights), job.imported.seconds
    return replace(nothing, stored=weights, read=(0.0,), work=(seconds,), commit=(0.0,), known=True)


def _tried(parts: Sequence[Work], measured: Measured) -> float:
    return min(measured.of(work).tried / work.part.batch for work in parts)


def fastest(parts: Sequence[Work], sizes: Sequence[int], trials: Trials) -> Batch | None:
    """The fastest batch size of an attack or an inversion, of those tried; None where there is nothing to try."""
    part = parts[0].part if parts else None
    if part is None or not JOBS[part.node.stage].tunes_batch or not part.steps or not sizes:
        return None
    own, largest = trials.rate(part), max(sizes)
    whole = max(largest, part.batch)  # a batch exceeds its shard only where the recipe's does
    holds = min(max(trials.holds(own), own.tried), whole)
    most = min(largest, own.tried) if own.tried < part.batch else min(largest, holds)

    def seconds(batch: int) -> float:
        return sum(in_batches(sizes, batch)) * trials.rate(part.of_batch(batch)).seconds(part.steps)

    even = math.ceil(largest / sum(in_batches([largest], part.batch)))
    smaller = {even, own.tried, *(int(part.batch * share) for share in SIZES)}
    took = {batch: seconds(batch) for batch in sorted({part.batch, *(b for b in smaller if SMALLEST <= b <= most)})}
    batch = part.batch
    while 2 * batch <= most:
        took[2 * batch] = seconds(2 * batch)
        if took[batch] < NOISE * took[2 * batch]:
            break
        batch *= 2
    held = {batch: time for batch, time in took.items() if batch <= holds}
    if len(held) == 1 and part.batch in held:
        return None
    best = min(held, key=lambda batch: held[batch])
    gain = took[part.batch] / took[best]
    if part.batch in held and gain < GAIN:
        best, gain = part.batch, 1.0
    return Batch(part.batch, best, gain, holds, largest)


# --------------------------------------------------------------------------------------------- saying


def as_json(cost: Cost, site: Site, gpus: int | None, batch: Batch | None) -> dict[str, Any]:
    """A node's cost, units in the names."""
    said: dict[str, Any] = {
        "images": cost.images,
        "batch_steps": cost.steps,
        "shards": cost.shards,
        "stored_bytes": cost.stored,
        "measured": cost.known,
        "device_seconds": round(cost.device_seconds(site), 3),
        "warm_up_seconds": round(cost.warm_up, 3),
        "wall_seconds": round(cost.wall(site), 3),
    }
    if gpus is not None:
        said["wall_seconds_on_gpus"] = round(cost.wall(site.of(gpus)), 3)
    if batch is not None:
        said["batch_size"] = {"recipe": batch.recipe, "fastest": batch.fastest, "times_as_fast": round(batch.gain, 3)}
        said["batch_size"]["memory_holds"] = batch.holds
    return said


def total_as_json(estimated: Estimate, gpus: int | None) -> dict[str, Any]:
    """The cost of all nodes together."""
    said = {
        "device": estimated.device,
        "devices": estimated.site.devices,
        "worker_start_seconds": round(estimated.site.start, 3),
        "stored_bytes": estimated.stored,
        "device_seconds": round(estimated.device_seconds(estimated.site), 3),
        "wall_seconds": _between(estimated.wall(estimated.site)),
    }
    if gpus is not None:
        said |= {"gpus": gpus, "wall_seconds_on_gpus": _between(estimated.wall(estimated.site.of(gpus)))}
    return said


def _between(seconds: tuple[float, float]) -> dict[str, float]:
    return {"at_least": round(seconds[0], 3), "at_most": round(seconds[1], 3)}


def as_text(estimated: Estimate, gpus: int | None, width: int | None = None) -> str:
    """An estimate as a table, with notes; no wider than the terminal, if a width is given."""
    site = estimated.site
    sites = [site] + ([site.of(gpus)] if gpus else [])
    head = ["to make", "images", "steps", "shards", "size", "device-hours", "warm-up"]
    lines = [
        [
            name,
            *(f"{count:,}" if count else "–" for count in (cost.images, cost.steps, cost.shards)),
            size(cost.stored),
            hours(cost.device_seconds(site)),
            f"{cost.warm_up:.1f} s" if cost.warm_up >= 0.05 else "–",
            *(duration(cost.wall(each)) if cost.known else "not known" for each in sites),
        ]
        for name, cost in estimated.nodes.items()
    ]
    total = ["all", "", "", "", size(estimated.stored), hours(estimated.device_seconds(site)), ""]
    lines.append([*total, *(_time(estimated, each) for each in sites)])
    walls = [f"time on {each.devices} device{'s' * (each.devices > 1)}" for each in sites]
    shown = tables.fitted([*head, *walls], lines, width, ("to make", *walls, "size", "images", "device-hours"))
    return "\n".join([*(_summary(estimated, each) for each in sites), "", shown, "", *_notes(estimated)])


def _summary(estimated: Estimate, site: Site) -> str:
    """What the whole takes, in a line."""
    devices = f"{site.devices} device{'s' * (site.devices > 1)}"
    return f"In all: {_time(estimated, site)} on {devices}, and {size(estimated.stored)} in the store."


def _time(estimated: Estimate, site: Site) -> str:
    """The time of all nodes, or its bounds."""
    return " – ".join(dict.fromkeys(map(duration, estimated.wall(site))))


def _notes(estimated: Estimate) -> list[str]:
    said = [
        f"A device is {estimated.device}. A worker starts in {estimated.site.start:.1f} s; times include it.",
        "The images of a training are counted once per epoch.",
        "The total is a range: from nodes side by side, as the graph and the devices allow, to one after the other.",
    ]
    for name, cost in estimated.nodes.items():
        if not cost.known:
            said.append(f"{name} is downloaded: not measured.")
        elif cost.tried < 1 and (name not in estimated.batches or estimated.batches[name].fits):
            said.append(
                f"{name}: a whole batch takes too long to be tried; extrapolated from {100 * cost.tried:.0f} % of it."
            )
    better = {name: batch for name, batch in estimated.batches.items() if batch.fastest != batch.recipe}
    for name, batch in better.items():
        if batch.fits:
            gain = f"{batch.gain:.2f} times as fast as {batch.recipe}"
            said.append(f"{name}: add `batch_size: {batch.fastest}`, {gain}{_held(batch)}.")
        else:
            said.append(
                f"{name}: batch_size {batch.recipe} does not fit{_held(batch)}: {batch.fastest} is the fastest tried."
            )
    if others := [batch for name, batch in estimated.batches.items() if name not in better]:
        held = _held(min(others, key=lambda batch: batch.holds))
        which = "Of the other attacks and inversions" if better else "Of each attack and inversion"
        said.append(f"{which}, the recipe's batch_size is the fastest tried{held}.")
    return said


def _held(batch: Batch) -> str:
    """How much the memory holds, where that limits the batch: a batch is never more than a shard."""
    return "" if batch.holds >= batch.shard else f"; the memory holds {batch.holds:,} images"
