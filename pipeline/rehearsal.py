"""How fast this machine does a node's work: the real job, on a few images, in a store of its own.

A rehearsal opens, reads, works and commits as a run does, with the same code: a batch, a few steps, a training of two
short epochs. Networks have random weights, for speed does not depend on them; images are the source's own. As many
processes rehearse at the same time as there will be workers, for they share the processors and the memory.
"""

import math
import multiprocessing
import os
import platform
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import astuple, dataclass, replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import BrokenBarrierError
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from pipeline import artifacts
from pipeline.artifacts import Made
from pipeline.graph import Node
from pipeline.jobs import JOBS, LoadJob, ModelJob, Place, ShardJob, Unit
from pipeline.runs import Outlook
from pipeline.store import Store, canonical, digest
from stages.apart import aside
from stages.errors import BadData, BadInput, TooLarge
from stages.recipes import Attack, Evaluate, Invert, Recipe, Spatial, Train
from stages.shard import Shard, pack, unpack

if TYPE_CHECKING:
    from stages.design import Design

SECONDS = 2.0
"""How long a rehearsal of many steps takes, about: the longer, the surer."""

LIMIT = 20.0
"""Seconds that all rehearsals of one part may take, about: what is too slow for that is tried on fewer images."""

REPEATS = 6
"""How many times a batch goes through its least work in all rehearsals of one part."""

PILOT = 8
"""Images of the first try, which says how many can be afforded."""

SAMPLE = 128
"""Images of the source that are looked at; where more are needed, they come again."""

EPOCH = 4
"""Most batches of a rehearsed epoch: a rehearsed training's images are written and read first."""

CROWD = 4
"""Processes for each processor that may rehearse at the same time: more say nothing, and take the memory."""

FILL, FILL_GPU = 0.5, 0.9
"""Share of the memory that a proposed batch may fill, with one in every worker; a GPU has nothing else in it."""

CAPTURED = 3
"""Steps of which one at least is a CUDA graph, whose memory is its own."""

CHOSEN = ("attack", "invert")
"""Stages whose batch size can be chosen: that of a training is part of what it learns."""

IMAGES = ("images", "on")
"""Roles of a job's inputs that are datasets."""

SHARD = "train-000000"

COLUMNS = ("margin", "confidence", "l2", "linf")
"""What an attack says of images: a selection chooses by it, and a commit adds it up."""

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """Work of one kind, which `steps` make longer: what is rehearsed.

    Attributes:
        node: whose job does it; its recipe is reduced to what decides the speed, so that equal work has equal keys.
        models: role → design.
        source: id of the load whose images are taken.
        steps: of a batch, or of an epoch of a training; 0 where there are none.
        once: whether it is what a worker does once, before its first shard.
        processes: how many do it side by side, if not as many as there are workers.
    """

    node: Node
    models: "Mapping[str, Design]"
    source: str
    steps: int
    once: bool = False
    processes: int | None = None

    @property
    def key(self) -> bytes:
        """Equal for what is equally fast, whatever the number of steps."""
        node, rule = self.node, self.node.relabel
        designs = {role: design.as_json() for role, design in self.models.items()}
        said = [node.stage, node.recipe.parameters(), rule.parameters() if rule else None, self.source, designs]
        return canonical([*said, self.once, self.processes])

    @property
    def batch(self) -> int:
        """Images of a batch."""
        return int(getattr(self.node.recipe, "batch_size", SAMPLE))

    def of_batch(self, batch: int) -> "Part":
        """The same work in batches of another size."""
        return replace(self, node=replace(self.node, recipe=self.node.recipe.model_copy(update={"batch_size": batch})))


@dataclass(frozen=True)
class Took:
    """What one rehearsal took, in seconds, and left.

    Attributes:
        open: until the job was ready to work.
        read, commit: of all images.
        first, work: of a batch, or an epoch: the first time, and the second.
        stored: bytes of all images, or of the model.
        held: bytes of memory that it took: of a GPU all, of a processor what gradients hold on to; 0 where not asked.
    """

    open: float
    read: float
    first: float
    work: float
    commit: float
    stored: float
    held: float = 0.0


@dataclass(frozen=True)
class Rate:
    """How fast a part is: a batch takes ``fixed + steps × step`` seconds.

    Attributes:
        fixed, step: seconds.
        open: seconds until a worker is ready, once it has started.
        warm_up: seconds by which its first batch took longer than the second: kernels chosen, code compiled.
        read, commit: seconds of an image.
        stored: bytes of an image, or of a model.
        held, base: bytes of memory for each image of a batch, and for any batch.
        tried: images of the batches that were rehearsed; another number than asked for where these would take too long,
            or are more than a GPU has memory for.
    """

    fixed: float
    step: float
    open: float = 0.0
    warm_up: float = 0.0
    read: float = 0.0
    commit: float = 0.0
    stored: float = 0.0
    held: float = 0.0
    base: float = 0.0
    tried: int = 1

    def seconds(self, steps: int) -> float:
        """Of a batch."""
        return self.fixed + steps * self.step


@dataclass(frozen=True)
class Device:
    """What a worker has: a GPU, or a processor where there is none.

    Attributes:
        name: of the hardware.
        count: how many this machine has.
        memory: bytes that all workers of this machine share, or that are free on a GPU.
        gpu: whether it is one.
    """

    name: str
    count: int
    memory: int
    gpu: bool


class Rehearsal:
    """Rehearses parts of a plan, each kind once.

    Args:
        outlooks: all nodes of the plan, by id.
        place: where they will be made; nothing is written there.
        workers: how many work side by side; by default one for each device, as in a run.
        tell: told of each thing that is rehearsed.
    """

    def __init__(
        self, outlooks: Mapping[str, Outlook], place: Place, workers: int | None, tell: Callable[[str], None]
    ) -> None:
        self.outlooks, self.home, self.tell = outlooks, place, tell
        self.device = device()
        self.workers = workers or self.device.count
        self.processes = 1 if self.device.gpu else self.workers
        if self.processes > (most := CROWD * (os.cpu_count() or 1)):
            raise BadInput(
                f"--workers {self.workers}: so many would be tried here at the same time, at most {most} can be"
            )
        self.rates: dict[bytes, Rate] = {}
        self.made: dict[bytes, Made] = {}
        self.samples: dict[str, Shard] = {}
        self.firsts: dict[str, Unit] = {}

    def __enter__(self) -> "Rehearsal":
        self.folder = TemporaryDirectory()
        self.place = replace(self.home, store=Store(self.folder.name))
        context = multiprocessing.get_context("spawn")
        with aside():
            self.together = context.Barrier(self.processes)
            self.pool = ProcessPoolExecutor(self.processes, context, initializer=_begin, initargs=(self.together,))
            started = time.perf_counter()
            self._side_by_side(self.processes, _ready)
        self.start = time.perf_counter() - started
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # nobody waits for what they are at
            for process in multiprocessing.active_children():
                process.terminate()
        self.pool.shutdown(cancel_futures=True)
        self.folder.cleanup()

    # ------------------------------------------------------------------------------------ what it says

    def rate(self, part: Part) -> Rate:
        """How fast a part is, of whose kind this is the one with most steps."""
        if part.key not in self.rates:
            self.tell(_named(part))
            self.rates[part.key] = self._rate(part)
        return self.rates[part.key]

    def holds(self, rate: Rate) -> int:
        """Images of the largest batch that fits into the memory, going by what one of another size took."""
        room = (FILL_GPU if self.device.gpu else FILL) * self.device.memory / self.processes - rate.base
        return max(0, int(room / rate.held)) if rate.held else sys.maxsize

    def _rate(self, part: Part) -> Rate:
        low, small = min(part.steps, 1), min(PILOT, part.batch)
        pilot = self._time(part, small, min(part.steps, CAPTURED) if self.device.gpu else low, weigh=True)
        batch, first = self._first_of(part, pilot, low)
        last, least, high = first, _asked(part, first), _steps(part, _asked(part, first))
        if high > low:
            last = self._time(part, batch, high)
            step = max(0.0, (_asked(part, last) - least) / (high - low))
            fixed = max(0.0, least - low * step)
        else:
            step, fixed = (least, 0.0) if low else (0.0, least)
        base, held = _memory((small, pilot.held), (batch, last.held))
        whole, images = part.batch / batch, _images(part.node.recipe, batch, low)
        return Rate(
            fixed=fixed * whole,
            step=step * whole,
            open=first.open,
            warm_up=max(0.0, pilot.first - pilot.work, first.first - first.work),
            read=first.read / images,
            commit=first.commit / images,
            stored=first.stored / (1 if part.node.stage == "train" else images),
            held=held,
            base=base,
            tried=batch,
        )

    def _first_of(self, part: Part, pilot: Took, low: int) -> tuple[int, Took]:
        """The largest batch, up to that asked for, that is not too slow or too large to be tried; the first try."""
        batch = part.batch
        while batch > PILOT and _asked(part, pilot) / PILOT * batch * REPEATS > LIMIT:
            batch = max(PILOT, batch // 2)
        while True:
            try:
                return batch, self._time(part, batch, low)
            except TooLarge:
                if part.node.stage not in CHOSEN or batch <= PILOT:
                    raise
                batch = max(PILOT, batch // 2)

    # ------------------------------------------------------------------------------------- how it is done

    def _time(self, part: Part, batch: int, steps: int, weigh: bool = False) -> Took:
        """One rehearsal, the mean over all processes that do it at the same time; work as of one batch."""
        job, unit = self._job(part, batch, steps)
        processes = min(part.processes or self.processes, self.processes)
        found = self._side_by_side(processes, _rehearse, job, unit, weigh)
        took = Took(*np.mean([astuple(one) for one in found], axis=0).tolist())
        batches = 1 if part.node.stage == "train" else math.ceil(_images(part.node.recipe, batch, steps) / batch)
        return replace(took, first=took.first / batches, work=took.work / batches)

    def _side_by_side(self, processes: int, work: Callable[..., T], *args: Any) -> list[T]:
        all_of_them = processes == self.processes
        with aside():
            futures: list[Future[T]] = [self.pool.submit(_perform, all_of_them, work, *args) for _ in range(processes)]
        wait(futures)
        errors = [error for future in futures if (error := future.exception()) is not None]
        if any(isinstance(error, BrokenProcessPool) for error in errors):
            raise BadData(
                "a process that tried this died, as for want of memory: try with fewer --workers"
            ) from errors[0]
        if errors:
            self.together.reset()
            raise next((error for error in errors if not isinstance(error, BrokenBarrierError)), errors[0])
        return [future.result() for future in futures]

    def _job(self, part: Part, batch: int, steps: int) -> tuple[ShardJob | ModelJob, Unit | None]:
        """The real job on the images of so many batches, in the store of the rehearsal."""
        if part.node.stage == "load":
            return self._load(part, batch)
        node = replace(part.node, recipe=_reduced(part.node.recipe, batch, steps))
        images = self._dataset(part.source, _images(part.node.recipe, batch, steps))
        inputs = {role: images for role in part.node.inputs if role in IMAGES}
        inputs |= {role: self._model(design, part.source) for role, design in part.models.items()}
        job = JOBS[node.stage](node, self.place, inputs)
        return job, None if isinstance(job, ModelJob) else job.units()[0]

    def _load(self, part: Part, batch: int) -> tuple[ShardJob, Unit]:
        """A load's first images; its source is listed already."""
        listed = self.outlooks[part.source].job
        assert listed is not None
        recipe = part.node.recipe.model_copy(update={"max_undecodable": 1.0})
        job, unit = LoadJob(replace(part.node, recipe=recipe), self.place, {}), self._first(listed)
        job.listing = listed.listing
        return job, replace(unit, samples=batch, items=unit.items[:batch])

    def _first(self, job: LoadJob) -> Unit:
        """The first shard of a load, as far as it is looked at."""
        if job.node.id not in self.firsts:
            unit = job.units()[0]
            self.firsts[job.node.id] = replace(unit, items=unit.items[:SAMPLE])
        return self.firsts[job.node.id]

    def _sample(self, source: str) -> Shard:
        """Some images of a load, from the store if it is there."""
        if source not in self.samples:
            outlook = self.outlooks[source]
            if outlook.job is not None:
                self.samples[source] = outlook.job.read(self._first(outlook.job))
            else:
                name, made = min(outlook.facts["shards"]), Made(outlook.node.folder, dict(outlook.facts))
                tar = artifacts.read_file(self.home.store, made, f"{name}.tar")
                self.samples[source] = unpack(name, tar, outlook.facts["channels"], len(outlook.facts["classes"]))
        return self.samples[source]

    def _dataset(self, source: str, count: int) -> Made:
        """A dataset of one shard with so many images of a source, and columns to select by."""
        key = canonical([source, count])
        if key not in self.made:
            facts, sample = self.outlooks[source].facts, self._sample(source)
            again = np.arange(count) % len(sample)
            columns = {name: np.linspace(0, 1, count, dtype=np.float32) for name in COLUMNS}
            label, pixels = sample.label[again], sample.images()[again]
            tar = pack(Shard(SHARD, np.arange(count), label, label, pixels, attack=columns))
            files = {f"{SHARD}.tar": tar}
            neutral = {"mean": [0.5] * facts["channels"], "std": [0.5] * facts["channels"]}
            counts = {"counts": {"train": count}, "shards": {SHARD: count}}
            known = {name: facts[name] for name in ("classes", "channels", "image_shape")}
            self.made[key] = self._publish(digest(key), files, digest(tar), known | neutral | counts)
        return self.made[key]

    def _model(self, design: "Design", source: str) -> Made:
        """A network with random weights."""
        key = canonical(design.as_json())
        if key not in self.made:
            weights = random_weights(design, self._sample(source).images()[:PILOT], self.place.here)
            facts = {"design": design.as_json()}
            self.made[key] = self._publish(digest(key), {"weights.safetensors": weights}, digest(weights), facts)
        return self.made[key]

    def _publish(self, folder: str, files: dict[str, bytes], content: str, facts: dict[str, Any]) -> Made:
        for name, body in files.items():
            self.place.store.put(f"{folder}/{name}", body)
        listed = [{"name": name, "bytes": len(body), "sha256": digest(body)} for name, body in files.items()]
        return Made(folder, facts | {"content": content, "files": listed})


def _named(part: Part) -> str:
    node = part.node
    archs = ", ".join(dict.fromkeys([d.arch for d in part.models.values()] or [getattr(node.recipe, "arch", "") or ""]))
    batch = f", batches of {part.batch}" if hasattr(node.recipe, "batch_size") else ""
    return f"{node.stage} {archs}".rstrip() + f" on {part.source}{batch}"


def _memory(*tried: tuple[int, float]) -> tuple[float, float]:
    """Bytes of any batch, and of each of its images, from what two batches took; from the first, if that is all."""
    (small, little), (large, much) = tried
    if not much or large == small:
        return 0.0, little / small
    held = max(0.0, (much - little) / (large - small))
    return max(0.0, little - small * held), held


def _asked(part: Part, took: Took) -> float:
    """Seconds of what is asked for."""
    return took.open if part.once else took.work


def _steps(part: Part, least: float) -> int:
    """How many steps to rehearse, if one takes so many seconds."""
    most = min(part.steps, EPOCH) if part.node.stage == "train" else part.steps
    return min(most, max(3, round(SECONDS / max(least, 1e-3))))


def _images(recipe: Recipe, batch: int, steps: int) -> int:
    """Images that a rehearsal takes: those of all steps of a training's epoch, else a batch; an inversion needs two."""
    return batch * steps if isinstance(recipe, Train) else max(batch, 2)


def _reduced(recipe: Recipe, batch: int, steps: int) -> Recipe:
    """A recipe of so many steps in batches of so many images."""
    some, update = max(steps, 1), dict[str, Any]()
    match recipe:
        case Attack(method="spatial"):
            update = {"spatial": _with_tries(recipe.spatial, some)}
        case Attack():
            # With such steps a few lead as far as the recipe's do, and what is saved is as large as it will be.
            update = {"steps": some, "step_size": recipe.eps}
        case Invert():
            update = {"steps": some}
        case Evaluate():
            threats = [threat.model_copy(update={"steps": some, "batch_size": batch}) for threat in recipe.attacks]
            update = {"attacks": threats, "spatial": [_with_tries(space, some) for space in recipe.spatial]}
    sized = {"batch_size": batch} if hasattr(recipe, "batch_size") else {}
    return recipe.model_copy(update=update | sized)


def _with_tries(space: Spatial, count: int) -> Spatial:
    """A space in which so many turns and shifts are tried."""
    return space.model_copy(update={"grid": [1, 1, count], "tries": count})


def random_weights(design: "Design", pixels_NHWC: np.ndarray, here: Path) -> bytes:
    """Weights as a training begins with, as safetensors.

    Batch norm is given the statistics of some images: without, a deep network's answers may overflow.
    """
    import torch

    from stages.model import Classifier, save, to_unit

    torch.manual_seed(0)
    model = Classifier(design, here)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(to_unit(pixels_NHWC))
    return save(model.network)


def device() -> Device:
    """What this machine has for its workers."""
    import torch

    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(0)
        return Device(facts.name, torch.cuda.device_count(), torch.cuda.mem_get_info(0)[0], gpu=True)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(name or platform.machine(), os.cpu_count() or 1, memory, gpu=False)


# ------------------------------------------------------------------------------------ in the processes

_together: Barrier


def _begin(together: Barrier) -> None:
    global _together
    _together = together


def _perform(all_of_them: bool, work: Callable[..., T], *args: Any) -> T:
    """Some work, for which all processes wait for each other, or none."""
    try:
        return work(_together.wait if all_of_them else _nobody, *args)
    except BaseException:
        _together.abort()
        raise


def _nobody() -> None:
    """There is nobody to wait for."""


def _ready(meet: Callable[[], Any]) -> None:
    """What a worker loads as it starts."""
    import torch

    from stages import attack, device, evaluate, invert, train, usefulness  # noqa: F401

    torch.zeros(1, device=device.device())
    meet()


def _rehearse(meet: Callable[[], Any], job: ShardJob | ModelJob, unit: Unit | None, weigh: bool) -> Took:
    job.node = replace(job.node, version=uuid.uuid4().hex)  # a folder of its own: others rehearse the same
    if isinstance(job, ModelJob):
        return _train(meet, job)
    assert unit is not None
    meet()
    work, opened = _timed(job.open)
    given, read = _timed(lambda: job.read(unit))
    held, first = _timed(lambda: _weighed(work, given, weigh))
    meet()
    result, again = _timed(lambda: work(given))
    mark, commit = _timed(lambda: job.commit(unit, result, {}))
    stored = mark["bytes"] + 2 * mark["rows"]["bytes"] if "rows" in mark else 0  # the rows are in `samples.parquet` too
    return Took(opened, read, first, again, commit, stored, held)


def _train(meet: Callable[[], Any], job: ModelJob) -> Took:
    """Two epochs; the second, with its checkpoint, is the work."""
    meet()
    steps = job.steps()
    _, first = _timed(lambda: next(steps))
    _, again = _timed(lambda: next(steps))
    made = next(steps)["manifest"]
    return Took(0.0, 0.0, first, again, 0.0, sum(file["bytes"] for file in made["files"]))


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def _weighed(work: Callable[[Any], Any], given: Any, weigh: bool) -> int:
    """Do some work; the bytes that it took on a GPU, else, if asked for, of all that was kept for gradients."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        work(given)
        return torch.cuda.max_memory_reserved()
    held = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal held
        held += tensor.nbytes
        return tensor

    # Compiled code is made anew where there are hooks, so there are none where they are not needed.
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor) if weigh else nullcontext():
        work(given)
    return held
