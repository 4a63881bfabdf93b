"""What is to be made, and what it takes, node by node: images, steps, shards, bytes, hours of devices, and time.

A node's work is cut into parts of one kind each, which `rehearsal` measures; here they are counted and added up:

    shard = read + work + commit;  work = sum over parts of batches × (fixed + steps × step)

A worker (a GPU, or a processor where there is none) makes one shard after the other; where there are processors for it,
the next is read and the last one committed beside that. Shards are never divided.
"""

import heapq
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipeline import report
from pipeline.display import clock
from pipeline.graph import DATASETS, Node
from pipeline.jobs import Place
from pipeline.on_ray import IN_FLIGHT
from pipeline.rehearsal import CHOSEN, IMAGES, Part, Rate, Rehearsal
from pipeline.runs import Outlook
from stages.errors import BadInput
from stages.recipes import Evaluate, Invert, Relabel, Spatial, Threat, Usefulness

if TYPE_CHECKING:
    from stages.design import Design

SIZES = (0.25, 0.5)
"""Batches that are tried, besides the recipe's, as shares of it; and the one that a shard is made of without a rest;
and larger ones, each twice the last, as long as shard and memory hold them and each pays."""

SMALLEST = 8
"""Images of the smallest batch that is tried."""

GAIN = 1.02
"""From here on another batch is worth proposing: below, it is the noise of measuring."""

UNKNOWN_CLASSES = 1000
"""Of a network whose weights are not here to tell: ImageNet's. The last layer takes next to no time."""

NEUTRAL: dict[str, Any] = {"splits": ["train"], "seed": 0, "fit_shards": 1, "steps": 1, "freeze": None}
"""What does not change the speed of an attack or an inversion: equal for all, so that what is equally fast is seen."""

NEXT = Relabel(rule="next")

SHORT: dict[str, Any] = {
    "split": "train",
    "seed": 0,
    "epochs": 2,
    "lr": 1e-6,
    "schedule": "constant",
    "drops": [],
    "memory_budget": 2**20,
    "watch": 0,
    "workers": 1,
}
"""The same of a training."""


@dataclass(frozen=True)
class Work:
    """A part, and how many batches of it there are: in each shard, or in each epoch of a training.

    What a worker does once has one entry.
    """

    part: Part
    batches: tuple[int, ...]

    def seconds(self, rate: Rate) -> list[float]:
        return [count * rate.seconds(self.part.steps) for count in self.batches]


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
    """What a node takes.

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
        tried: share of a batch that was measured, and the time of the rest foretold from it.
        known: whether it was measured at all; what is fetched from elsewhere is not.
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
        """Seconds from its first worker's start to its last commit, with nothing else beside it."""
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
        """Seconds that devices are held, start and waiting for the last shard left out; of a processor the same."""
        if self.workers:
            larger = self.workers / min(self.workers, site.devices)
            busy = self.once + sum(self.read) + larger * sum(self.work) + sum(self.commit)
            return busy * min(self.workers, site.devices) * min(self.held, site.devices)
        return sum(self._paces(site) if self.heavy else self._whole())

    def _whole(self) -> list[float]:
        return [sum(steps) for steps in zip(self.read, self.work, self.commit, strict=True)]

    def _paces(self, site: Site) -> list[float]:
        """Seconds from a shard to the next of one worker: as it works on one, others are read and committed.

        That is free where there are processors for it; so many of its shards at most are under way.
        """
        overlap = max(1.0, min(IN_FLIGHT, site.processors / site.devices))
        return [max(work, whole / overlap) for work, whole in zip(self.work, self._whole(), strict=True)]


def makespan(seconds: Iterable[float], workers: int) -> float:
    """When the last of some shards is done, each given to the worker that is free first."""
    free = [0.0] * workers
    for each in seconds:
        heapq.heapreplace(free, free[0] + each)
    return max(free)


@dataclass(frozen=True)
class Batch:
    """The batch size for an attack or an inversion.

    Attributes:
        recipe: what is asked for.
        fastest: the fastest of those tried that the memory holds.
        gain: how many times as fast as the recipe's it is.
        holds: images of the largest that the memory holds, a whole shard at most.
        shard: images of the largest shard.
    """

    recipe: int
    fastest: int
    gain: float
    holds: int
    shard: int

    @property
    def fits(self) -> bool:
        """Whether the recipe's does."""
        return self.recipe <= self.holds


@dataclass(frozen=True)
class Prices:
    """What a plan takes.

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

    def device_seconds(self, site: Site) -> float:
        """Of all nodes."""
        return sum(cost.device_seconds(site) for cost in self.nodes.values())

    def wall(self, site: Site) -> tuple[float, float]:
        """Seconds at least and at most: nodes that do not depend on each other run side by side where there is room.

        At least as long as the longest chain of nodes, and as all devices together are held; at most one node after the
        other.
        """
        ends: dict[str, float] = {}
        for name, cost in self.nodes.items():
            begun = max((ends.get(parent, 0.0) for parent in self.inputs[name]), default=0.0)
            ends[name] = begun + cost.wall(site)
        longest = max(ends.values(), default=0.0)
        total = sum(cost.wall(site) for cost in self.nodes.values())
        return min(total, max(longest, self.device_seconds(site) / site.devices)), total


def price(
    outlooks: Sequence[Outlook], place: Place, workers: int | None, tell: Callable[[str], None] = lambda what: None
) -> Prices:
    """Measure, and add up.

    Args:
        outlooks: all nodes, each after its inputs.
        place: where they are to be made; nothing is written there.
        workers: as for a run.
        tell: told of each thing that is measured.

    Raises:
        BadInput: something cannot be known before a node that comes first is made.
    """
    known = {outlook.node.id: outlook for outlook in outlooks}
    todo = [outlook for outlook in outlooks if not outlook.there]
    left = {outlook.node.id: _left(outlook, place) for outlook in todo}
    plan = {o.node.id: works(o.node, known, left[o.node.id], place) for o in todo}
    longest: dict[bytes, Part] = {}
    for part in (work.part for parts in plan.values() for work in parts):
        longest[part.key] = max(part, longest.get(part.key, part), key=lambda one: one.steps)
    with Rehearsal(known, place, workers, tell) as rehearsal:
        rates = {key: rehearsal.rate(part) for key, part in longest.items()}
        batches = {name: fastest(plan[name], list(left[name].values()), rehearsal) for name in plan}
    stored = {o.node.id: _stored(o) for o in outlooks if o.there and o.node.stage in DATASETS}
    nodes: dict[str, Cost] = {}
    for name, parts in plan.items():
        node = known[name].node
        match node.stage:
            case "bring":
                nodes[name] = _brought(node, place)
            case "train":
                nodes[name] = training(node, known[node.inputs["on"].id].facts, parts, rates, rehearsal.device.gpu)
            case _:
                nodes[name] = sharded(node, left[name], _taken(node, left[name], known), parts, rates, stored)
    device = rehearsal.device
    return Prices(
        device=device.name if device.gpu else f"one of {device.count} processors, {device.name}",
        site=Site(rehearsal.workers, os.cpu_count() or 1, rehearsal.start),
        nodes=nodes,
        batches={name: found for name, found in batches.items() if found is not None},
        inputs={name: [parent.id for parent in known[name].node.inputs.values()] for name in nodes},
    )


def _left(outlook: Outlook, place: Place) -> dict[str, int]:
    """The shards that are still to be made, with their images; none for a model."""
    node, facts = outlook.node, outlook.facts
    if node.group == "models":
        return {}
    marked = set(place.store.files(f"{node.folder}/commits"))
    return {name: count for name, count in facts["shards"].items() if f"{name}.json" not in marked}


def _taken(node: Node, left: Mapping[str, int], known: Mapping[str, Outlook]) -> list[int]:
    """Images that are read for each shard: more than are left of a selection."""
    shards = known[_images(node).id].facts["shards"]
    return [shards[name] for name in left]


def _images(node: Node) -> Node:
    """The dataset that a node takes images from: of a load, itself."""
    return next((node.inputs[role] for role in IMAGES if role in node.inputs), node)


def _source(node: Node) -> Node:
    """The load that a node's images go back to."""
    images = _images(node)
    return node if images is node else _source(images)


def _stored(outlook: Outlook) -> float:
    """Bytes of an image of a dataset that is there."""
    return float(sum(file["bytes"] for file in outlook.facts["files"]) / sum(outlook.facts["counts"].values()))


# ------------------------------------------------------------------------------------------- counting


def works(node: Node, known: Mapping[str, Outlook], left: Mapping[str, int], place: Place) -> list[Work]:
    """A node's work, cut into parts.

    Args:
        node: to be made.
        known: all nodes, by id.
        left: its shards that are to be made, with the images of each.
        place: where.

    Raises:
        BadInput: the images that it takes may differ in size, or will only be known when they are there.
    """
    source, sizes = _source(node), list(left.values())
    if node.stage not in ("load", "bring") and known[source.id].facts["image_shape"] is None:
        raise BadInput(
            f"--cost: the size of the images of {source.name} is not known before they are loaded: first make it, "
            f"with --only {source.name}"
        )
    designs = {role: design_of(known[one.id]) for role, one in node.inputs.items() if one.group == "models"}
    match node.stage:
        case "bring":
            return []
        case "load" | "select":
            return [Work(Part(node, {}, source.id, 0), (0,) * len(sizes))]
        case "attack":
            return _attack(node, designs, source, sizes)
        case "invert":
            part = Part(_neutral(node), designs, source.id, node.recipe.steps)
            return [Work(part, _batches(sizes, node.recipe.batch_size))]
        case "train":
            return _training(node, design_of(known[node.id]), designs, known)
        case "usefulness":
            return _usefulness(node, designs, left, known, place)
        case _:
            return _evaluation(node, designs, source, sizes)


def design_of(outlook: Outlook) -> "Design":
    """What a model is, as far as its speed goes."""
    from stages.design import Design

    design, recipe = outlook.facts["design"], outlook.node.recipe
    if "arch" in design:
        return Design.from_json(design)
    channels, height, width = recipe.shape  # its weights are elsewhere
    classes = design["classes"] or UNKNOWN_CLASSES
    return Design(recipe.arch, classes, (channels, height, width), (0.5,) * channels, (0.5,) * channels)


def _neutral(node: Node) -> Node:
    """The node that all that are equally fast have in common; of the rules, only the least likely class takes time."""
    fields, rule = type(node.recipe).model_fields, node.relabel
    recipe = node.recipe.model_copy(update={name: value for name, value in NEUTRAL.items() if name in fields})
    return replace(node, recipe=recipe, relabel=rule if rule is None or rule.rule == "least_likely" else NEXT)


def _batches(sizes: Iterable[int], batch: int, times: int = 1) -> tuple[int, ...]:
    """Batches of each shard, gone through so many times; none goes beyond its shard."""
    return tuple(times * math.ceil(size / batch) for size in sizes)


def _attack(node: Node, designs: "Mapping[str, Design]", source: Node, sizes: list[int]) -> list[Work]:
    recipe = node.recipe
    match recipe.method:
        case "spatial":
            steps = _tries(recipe.spatial)
        case "universal":
            steps = 0
        case _:
            steps = 0 if "steps" in recipe.unused else recipe.steps
    part = Part(_neutral(node), designs, source.id, steps)
    found = [Work(part, _batches(sizes, recipe.batch_size))]
    if recipe.method == "universal":  # every worker finds the perturbations anew
        fit = sum(sizes[: recipe.fit_shards])
        found.append(Work(replace(part, steps=recipe.steps, once=True), _batches([fit], recipe.batch_size)))
    return found


def _tries(space: Spatial) -> int:
    return math.prod(space.grid) if space.search == "grid" else space.tries


def _training(node: Node, design: "Design", probed: "Mapping[str, Design]", known: Mapping[str, Outlook]) -> list[Work]:
    recipe, facts, source = node.recipe, known[node.inputs["on"].id].facts, _source(node)
    update = SHORT | {"batch_size": recipe.batch_size // recipe.workers}
    short = replace(node, recipe=recipe.model_copy(update=update))
    steps = facts["counts"][recipe.split] // recipe.batch_size
    watched = min(recipe.watch, known[source.id].facts["counts"].get("test", 0))
    return [
        Work(Part(short, probed, source.id, steps, processes=recipe.workers), (recipe.epochs,)),
        _clean(design, source, [watched] * recipe.epochs, recipe.batch_size),
    ]


def _clean(design: "Design", source: Node, sizes: Iterable[int], batch: int) -> Work:
    """What a model answers to images as they are."""
    return Work(_scoring(design, source, batch), _batches(sizes, batch))


def _scoring(design: "Design", source: Node, batch: int, steps: int = 0, **under: Any) -> Part:
    recipe = Evaluate(models=["m"], on="x", split="train", batch_size=batch, **under)
    node = Node("evaluations", "rehearsal", "evaluate", recipe, None, {"on": source}, "")
    return Part(node, {"models.m": design}, source.id, steps)


def _evaluation(node: Node, designs: "Mapping[str, Design]", source: Node, sizes: list[int]) -> list[Work]:
    recipe = node.recipe
    models = [designs[f"models.{name}"] for name in recipe.models]
    found = [_clean(model, source, sizes, recipe.batch_size) for model in models]
    for threat in recipe.attacks:
        batches = _batches(sizes, threat.batch_size, threat.restarts)
        for attacked in models if threat.source is None else [designs[f"sources.{threat.source}"]]:
            part = _scoring(attacked, source, threat.batch_size, threat.steps, attacks=[_any(threat)])
            found.append(Work(part, batches))
        if threat.source is not None:  # what came of it, and noise, is shown to all models
            shown = _batches(sizes, threat.batch_size, 1 + threat.restarts)
            found += [Work(_scoring(model, source, threat.batch_size), shown) for model in models]
    for space in recipe.spatial:
        parts = [_scoring(model, source, recipe.batch_size, _tries(space), spatial=[space]) for model in models]
        found += [Work(part, _batches(sizes, recipe.batch_size)) for part in parts]
    return found


def _any(threat: Threat) -> Threat:
    """A threat that is as fast, and equal for all that are: radius, seed and source do not matter."""
    return threat.model_copy(
        update={"eps": 0.5, "step_size": 0.1, "steps": 1, "restarts": 1, "source": None, "seed": 0}
    )


def _usefulness(
    node: Node, designs: "Mapping[str, Design]", left: Mapping[str, int], known: Mapping[str, Outlook], place: Place
) -> list[Work]:
    """Features of all images; of some a search for each feature, both ways, which is as fast as an inversion's."""
    from stages.features import Penultimate
    from stages.model import Classifier

    recipe, source, found = node.recipe, _source(node), list[Work]()
    total = known[node.inputs["on"].id].facts["counts"][recipe.split]
    shared = Invert.model_fields.keys() & Usefulness.model_fields.keys() - {"step_size", "steps"}
    asked = Invert(images="x", model="m", steps=1, **{name: getattr(recipe, name) for name in shared})
    search = Node("datasets", "rehearsal", "invert", asked, None, {"images": source}, "")
    for design in designs.values():
        width = Penultimate(Classifier(design, place.here).eval(), recipe.layer).width
        searches = [
            2 * width * math.ceil(recipe.limit * count / total) if name.rpartition("-")[0] == recipe.split else 0
            for name, count in left.items()
        ]
        found.append(_clean(design, source, left.values(), recipe.batch_size))
        part = Part(search, {"model": design}, source.id, recipe.steps)
        found.append(Work(part, _batches(searches, recipe.batch_size)))
    return found


# ------------------------------------------------------------------------------------------ adding up


def sharded(
    node: Node,
    left: Mapping[str, int],
    taken: Sequence[int],
    parts: Sequence[Work],
    rates: Mapping[bytes, Rate],
    stored: dict[str, float],
) -> Cost:
    """What a dataset or an evaluation takes.

    Args:
        node: to be made.
        left: its shards that are to be made, with the images of each.
        taken: images that each of them is made from.
        parts: its work.
        rates: of every part.
        stored: id → bytes of an image; what this node's has is added.
    """
    main, heavy = rates[parts[0].part.key], node.group == "evaluations" or "model" in node.inputs
    each = [work for work in parts if not work.part.once]
    single = [work for work in parts if work.part.once]
    seconds = [work.seconds(rates[work.part.key]) for work in each]
    opened = {work.part.key: rates[work.part.key] for work in each}.values() if heavy else ()
    warm_up = sum(rate.warm_up for rate in opened)
    found = sum(sum(work.seconds(rates[work.part.key])) for work in single)
    if node.group == "datasets":
        stored[node.id] = stored[node.inputs["images"].id] if node.stage == "select" else main.stored
    return Cost(
        images=sum(left.values()),
        steps=sum(work.part.steps * sum(work.batches) for work in parts),
        shards=len(left),
        stored=round(sum(left.values()) * stored.get(node.id, 0)),
        read=tuple(main.read * count for count in taken),
        work=tuple(sum(column) for column in zip(*seconds, strict=True)),
        commit=tuple(main.commit * count for count in left.values()),
        once=warm_up + found + sum(rate.open for rate in opened if not single),
        warm_up=warm_up,
        heavy=heavy,
        tried=_tried(parts, rates),
    )


def training(node: Node, on: Mapping[str, Any], parts: Sequence[Work], rates: Mapping[bytes, Rate], gpu: bool) -> Cost:
    """What a training takes: its images are read once, or, where they do not fit into its memory, in every epoch."""
    recipe, (fit, watch) = node.recipe, parts
    count, rate = on["counts"][recipe.split], rates[fit.part.key]
    streamed = count * math.prod(on["image_shape"]) > recipe.memory_budget * 2**20 * recipe.workers
    passes = 1 + (recipe.adversarial.steps if recipe.adversarial else 0)
    return Cost(
        images=count * recipe.epochs,
        steps=recipe.epochs * fit.part.steps * passes,
        shards=0,
        stored=round(rate.stored),
        read=(count * rates[watch.part.key].read * (recipe.epochs if streamed else 1) / recipe.workers,),
        work=(sum(fit.seconds(rate)),),
        commit=(sum(watch.seconds(rates[watch.part.key])),),
        once=rate.warm_up,
        warm_up=rate.warm_up,
        workers=recipe.workers,
        held=1 if gpu else recipe.threads,
        tried=_tried(parts, rates),
    )


def _tried(parts: Sequence[Work], rates: Mapping[bytes, Rate]) -> float:
    return min(rates[work.part.key].tried / work.part.batch for work in parts)


def _brought(node: Node, place: Place) -> Cost:
    """A model that is read from here, which is done on the spot; one that is to be fetched is not."""
    from stages import checkpoint

    nothing = Cost(0, 0, 0, 0, (), (), (), workers=1, known=False)
    if checkpoint.is_remote(node.recipe):
        return nothing
    started = time.perf_counter()
    _, weights = checkpoint.bring(node.recipe, place.data, place.here)
    took = time.perf_counter() - started
    return replace(nothing, stored=len(weights), read=(0.0,), work=(took,), commit=(0.0,), known=True)


def fastest(parts: Sequence[Work], sizes: Sequence[int], rehearsal: Rehearsal) -> Batch | None:
    """The fastest batch size of an attack or an inversion, of those tried; None where there is nothing to try."""
    part = parts[0].part if parts else None
    if part is None or part.node.stage not in CHOSEN or not part.steps or not sizes:
        return None
    own, largest = rehearsal.rate(part), max(sizes)
    whole = max(largest, part.batch)  # a batch goes beyond its shard only where the recipe's does
    holds = min(max(rehearsal.holds(own), own.tried), whole)
    most = min(largest, own.tried) if own.tried < part.batch else min(largest, holds)

    def seconds(batch: int) -> float:
        return sum(_batches(sizes, batch)) * rehearsal.rate(part.of_batch(batch)).seconds(part.steps)

    even = math.ceil(largest / sum(_batches([largest], part.batch)))
    smaller = {even, own.tried, *(int(part.batch * share) for share in SIZES)}
    took = {batch: seconds(batch) for batch in sorted({part.batch, *(b for b in smaller if SMALLEST <= b <= most)})}
    batch = part.batch
    while 2 * batch <= most:
        took[2 * batch] = seconds(2 * batch)
        if took[batch] < GAIN * took[2 * batch]:
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


def total_as_json(prices: Prices, gpus: int | None) -> dict[str, Any]:
    """What all nodes take together."""
    said = {
        "device": prices.device,
        "devices": prices.site.devices,
        "worker_start_seconds": round(prices.site.start, 3),
        "stored_bytes": sum(cost.stored for cost in prices.nodes.values()),
        "device_seconds": round(prices.device_seconds(prices.site), 3),
        "wall_seconds": _between(prices.wall(prices.site)),
    }
    if gpus is not None:
        said |= {"gpus": gpus, "wall_seconds_on_gpus": _between(prices.wall(prices.site.of(gpus)))}
    return said


def _between(seconds: tuple[float, float]) -> dict[str, float]:
    return {"at_least": round(seconds[0], 3), "at_most": round(seconds[1], 3)}


def told(prices: Prices, gpus: int | None) -> str:
    """Prices as a person reads them."""
    site = prices.site
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
        for name, cost in prices.nodes.items()
    ]
    stored = sum(cost.stored for cost in prices.nodes.values())
    total = ["all", "", "", "", size(stored), hours(prices.device_seconds(site)), ""]
    lines.append([*total, *(" – ".join(map(duration, prices.wall(each))) for each in sites)])
    walls = [f"time on {each.devices}" for each in sites]
    return "\n".join([report.table([*head, *walls], lines), "", *_notes(prices)])


def _notes(prices: Prices) -> list[str]:
    said = [
        f"A device is {prices.device}. A worker starts in {prices.site.start:.1f} s; the times contain it.",
        "All: at least the longest chain of nodes, or the device-hours over the devices; at most node after node.",
    ]
    for name, cost in prices.nodes.items():
        if not cost.known:
            said.append(f"{name} is fetched from elsewhere: not measured.")
        elif cost.tried < 1 and (name not in prices.batches or prices.batches[name].fits):
            said.append(f"{name}: a batch takes too long to be tried; foretold from {cost.tried:.0%} of it.")
    better = {name: batch for name, batch in prices.batches.items() if batch.fastest != batch.recipe}
    for name, batch in better.items():
        held = f"the memory holds {_held(batch.holds, batch.shard)}"
        if batch.fits:
            gain = f"{batch.gain:.2f} times as fast as {batch.recipe}"
            said.append(f"{name}: batch_size {batch.fastest} is {gain}; {held}.")
        else:
            said.append(
                f"{name}: batch_size {batch.recipe} does not fit, {held}: {batch.fastest} is the fastest tried."
            )
    if others := [batch for name, batch in prices.batches.items() if name not in better]:
        least = min(others, key=lambda batch: batch.holds)
        said.append(
            "Of the other attacks and inversions, the recipe's batch_size is the fastest of those tried; the memory "
            f"holds {_held(least.holds, least.shard)}{' or more' * (len(others) > 1)}."
        )
    return said


def _held(images: int, shard: int) -> str:
    return "a whole shard" if images >= shard else f"{images:,} images"


def size(count: float) -> str:
    """Bytes, in units of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if count else "–"
        count /= 1000
    return f"{count:,.3g} TB"


def duration(seconds: float) -> str:
    """A time as a person reads it."""
    return f"{seconds:.1f} s" if seconds < 100 else clock(seconds)


def hours(seconds: float) -> str:
    """Hours, to a few digits."""
    return f"{seconds / 3600:,.4f}" if seconds < 36_000 else f"{seconds / 3600:,.1f}"
