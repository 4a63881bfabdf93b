"""How fast this machine does a node's work: the real job, on a few images, in a store of its own.

A trial opens, reads, works and commits as a run does, with the same code: one batch, a few steps, a training of two
short epochs. Networks have random weights, since speed does not depend on them; images are the source's own. As many
processes are tried at once as there will be workers, since they share processors and memory.
"""

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

from pipeline.run import artifacts
from pipeline.run.artifacts import Artifact
from pipeline.run.jobs import JOBS, Context, LoadJob, ModelJob, ShardJob
from pipeline.run.jobs.base import Unit
from pipeline.run.jobs.checks import neutral_split
from pipeline.run.jobs.work import SAMPLE, Part, Trial
from pipeline.run.preflight import NodeStatus
from pipeline.store import Store, canonical, digest
from stages.apart import aside
from stages.errors import BadData, BadInput, TooLarge
from stages.shard import Shard, pack, shard_name, unpack

if TYPE_CHECKING:
    from stages.design import Design

SECONDS = 2.0
"""Approximate duration of a trial of many steps: the longer, the more precise."""

LIMIT = 20.0
"""Approximate limit in seconds for all trials of one part: slower parts are tried on fewer images."""

REPEATS = 6
"""Upper bound on the one-step passes of a batch in all trials of one part."""

PILOT = 8
"""Images of the first trial, from which the affordable number is computed."""

CROWD = 4
"""Most processes per processor that are tried at once: more add no information and take memory."""

FILL, FILL_GPU = 0.5, 0.9
"""Share of the memory that a proposed batch size may fill, with one batch in every worker; a GPU holds nothing else."""

CAPTURED = 3
"""Steps of which at least one is captured as a CUDA graph, which has memory of its own."""

SHARD = shard_name("train", 0)

COLUMNS = ("margin", "confidence", "l2", "linf")
"""Columns that an attack measures: a selection chooses by them, and a commit adds them up."""

T = TypeVar("T")


@dataclass(frozen=True)
class Measurement:
    """The seconds that one trial took, and what it left.

    Attributes:
        open: until the job was ready to work.
        read, commit: of all images.
        first, work: of a batch, or an epoch: the first time, and the second.
        stored: bytes of all images, or of the model.
        held: bytes of memory: the peak of a GPU, or on a processor the bytes saved for backward; 0 if not measured.
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
        tried: images of the batches that were tried; fewer than asked for where these would take too long, or do not
            fit into a GPU's memory.
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


class Trials:
    """Trials of the parts of a plan, each kind once.

    Args:
        statuses: all nodes of the plan, by id.
        context: where they will be made; nothing is written there.
        workers: how many work side by side; by default one for each device, as in a run.
        announce: called with each part before it is tried.
    """

    def __init__(
        self, statuses: Mapping[str, NodeStatus], context: Context, workers: int | None, announce: Callable[[str], None]
    ) -> None:
        self.statuses, self.home, self.announce = statuses, context, announce
        self.device = device()
        self.workers = workers or self.device.count
        self.processes = 1 if self.device.gpu else self.workers
        if self.processes > (most := CROWD * (os.cpu_count() or 1)):
            raise BadInput(f"--workers {self.workers}: at most {most} processes can be tried at once on this machine")
        self.rates: dict[bytes, Rate] = {}
        self.made: dict[bytes, Artifact] = {}
        self.samples: dict[str, Shard] = {}
        self.firsts: dict[str, Unit] = {}

    def __enter__(self) -> "Trials":
        self.folder = TemporaryDirectory()
        self.context = replace(self.home, store=Store(self.folder.name))
        context = multiprocessing.get_context("spawn")
        with aside():
            self.together = context.Barrier(self.processes)
            self.pool = ProcessPoolExecutor(self.processes, context, initializer=_begin, initargs=(self.together,))
            started = time.perf_counter()
            self._side_by_side(self.processes, _ready)
        self.start = time.perf_counter() - started
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # their results are no longer needed
            for process in multiprocessing.active_children():
                process.terminate()
        self.pool.shutdown(cancel_futures=True)
        self.folder.cleanup()

    # --------------------------------------------------------------------------------------- results

    def rate(self, part: Part) -> Rate:
        """The rate of a part; of equally fast ones, the one with most steps is to be tried."""
        if part.key not in self.rates:
            self.announce(_named(part))
            self.rates[part.key] = self._rate(part)
        return self.rates[part.key]

    def holds(self, rate: Rate) -> int:
        """Images of the largest batch that fits into memory, judged by the bytes that batches of other sizes took."""
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
        whole, short = part.batch / batch, _trial(part, batch, low)
        return Rate(
            fixed=fixed * whole,
            step=step * whole,
            open=first.open,
            warm_up=max(0.0, pilot.first - pilot.work, first.first - first.work),
            read=first.read / short.images,
            commit=first.commit / short.images,
            stored=first.stored / short.outputs,
            held=held,
            base=base,
            tried=batch,
        )

    def _first_of(self, part: Part, pilot: Measurement, low: int) -> tuple[int, Measurement]:
        """The largest batch, up to the part's, that is neither too slow nor too large to be tried; its first trial."""
        batch = part.batch
        while batch > PILOT and _asked(part, pilot) / PILOT * batch * REPEATS > LIMIT:
            batch = max(PILOT, batch // 2)
        while True:
            try:
                return batch, self._time(part, batch, low)
            except TooLarge:
                if not JOBS[part.node.stage].tunes_batch or batch <= PILOT:
                    raise
                batch = max(PILOT, batch // 2)

    # ------------------------------------------------------------------------------------- how it is done

    def _time(self, part: Part, batch: int, steps: int, weigh: bool = False) -> Measurement:
        """One trial: the mean over all processes that run it at once, with work per batch."""
        job, unit = self._job(part, batch, steps)
        processes = min(part.processes or self.processes, self.processes)
        found = self._side_by_side(processes, _measure, job, unit, weigh)
        took = Measurement(*np.mean([astuple(one) for one in found], axis=0).tolist())
        batches = _trial(part, batch, steps).batches
        return replace(took, first=took.first / batches, work=took.work / batches)

    def _side_by_side(self, processes: int, work: Callable[..., T], *args: Any) -> list[T]:
        all_of_them = processes == self.processes
        with aside():
            futures: list[Future[T]] = [self.pool.submit(_perform, all_of_them, work, *args) for _ in range(processes)]
        wait(futures)
        errors = [error for future in futures if (error := future.exception()) is not None]
        if any(isinstance(error, BrokenProcessPool) for error in errors):
            raise BadData("a process died during a trial, probably out of memory: use fewer --workers") from errors[0]
        if errors:
            self.together.reset()
            raise next((error for error in errors if not isinstance(error, BrokenBarrierError)), errors[0])
        return [future.result() for future in futures]

    def _job(self, part: Part, batch: int, steps: int) -> tuple[ShardJob | ModelJob, Unit | None]:
        """The real job on the images of so many batches, in the store of the trials."""
        if part.node.id == part.source:
            return self._load(part, batch)
        short = _trial(part, batch, steps)
        node = replace(part.node, recipe=short.recipe)
        images = self._dataset(part.source, short.images)
        inputs = {role: images for role, parent in part.node.inputs.items() if parent.group == "datasets"}
        inputs |= {role: self._model(design, part.source) for role, design in part.models.items()}
        job = JOBS[node.stage](node, self.context, inputs)
        return job, None if isinstance(job, ModelJob) else job.units()[0]

    def _load(self, part: Part, batch: int) -> tuple[ShardJob, Unit]:
        """A load's first images; its source is listed already."""
        listed = self.statuses[part.source].job
        assert isinstance(listed, LoadJob)
        recipe = part.node.recipe.model_copy(update={"max_undecodable": 1.0})
        job, unit = LoadJob(replace(part.node, recipe=recipe), self.context, {}), self._first(listed)
        job.listing = listed.listing
        return job, replace(job.part(unit, batch), samples=batch)

    def _first(self, job: LoadJob) -> Unit:
        """The first shard of a load, as far as it is looked at."""
        if job.node.id not in self.firsts:
            self.firsts[job.node.id] = job.part(job.units()[0], SAMPLE)
        return self.firsts[job.node.id]

    def _sample(self, source: str) -> Shard:
        """Some images of a load, from the store if it is there."""
        if source not in self.samples:
            status, facts = self.statuses[source], self.statuses[source].facts
            if status.there:
                name, made = min(facts["shards"]), Artifact.of(status.node.folder, facts)
                tar = artifacts.read_file(self.home.store, made, f"{name}.tar")
                self.samples[source] = unpack(name, tar, facts["channels"], len(facts["classes"]))
            else:
                assert isinstance(status.job, LoadJob)
                self.samples[source] = status.job.read(self._first(status.job))
        return self.samples[source]

    def _dataset(self, source: str, count: int) -> Artifact:
        """A dataset of one shard with so many images of a source, and columns to select by."""
        key = canonical([source, count])
        if key not in self.made:
            facts, sample = self.statuses[source].facts, self._sample(source)
            again = np.arange(count) % len(sample)
            columns = {name: np.linspace(0, 1, count, dtype=np.float32) for name in COLUMNS}
            label, pixels = sample.label[again], sample.images()[again]
            tar = pack(Shard(SHARD, np.arange(count), label, label, pixels, attack=columns))
            files = {f"{SHARD}.tar": tar}
            counts = {"counts": {"train": count}, "shards": {SHARD: count}}
            known = {name: facts[name] for name in ("classes", "channels", "image_shape")}
            self.made[key] = self._publish(
                digest(key), files, digest(tar), known | neutral_split(facts["channels"], "train") | counts
            )
        return self.made[key]

    def _model(self, design: "Design", source: str) -> Artifact:
        """A network with random weights."""
        key = canonical(design.as_json())
        if key not in self.made:
            weights = random_weights(design, self._sample(source).images()[:PILOT], self.context.here)
            facts = {"design": design.as_json()}
            self.made[key] = self._publish(digest(key), {"weights.safetensors": weights}, digest(weights), facts)
        return self.made[key]

    def _publish(self, folder: str, files: dict[str, bytes], content: str, facts: dict[str, Any]) -> Artifact:
        for name, body in files.items():
            self.context.store.put(f"{folder}/{name}", body)
        listed = [{"name": name, "bytes": len(body), "sha256": digest(body)} for name, body in files.items()]
        return Artifact(folder, facts | {"content": content, "files": listed})


def _named(part: Part) -> str:
    node = part.node
    archs = ", ".join(dict.fromkeys([d.arch for d in part.models.values()] or [getattr(node.recipe, "arch", "") or ""]))
    batch = f", batches of {part.batch}" if hasattr(node.recipe, "batch_size") else ""
    return f"{node.stage} {archs}".rstrip() + f" on {part.source}{batch}"


def _memory(*tried: tuple[int, float]) -> tuple[float, float]:
    """Bytes of any batch, and of each of its images, from two measured batches; from the first alone if need be."""
    (small, little), (large, much) = tried
    if not much or large == small:
        return 0.0, little / small
    held = max(0.0, (much - little) / (large - small))
    return max(0.0, little - small * held), held


def _asked(part: Part, took: Measurement) -> float:
    """The seconds that are measured of a part: of its opening, or of its work."""
    return took.open if part.once else took.work


def _steps(part: Part, least: float) -> int:
    """How many steps to try, if one takes so many seconds."""
    most = int(min(part.steps, JOBS[part.node.stage].longest_trial))
    return min(most, max(3, round(SECONDS / max(least, 1e-3))))


def _trial(part: Part, batch: int, steps: int) -> Trial:
    return JOBS[part.node.stage].trial(part.node.recipe, batch, steps)


def random_weights(design: "Design", pixels_NHWC: np.ndarray, here: Path) -> bytes:
    """Weights as a training begins with, as safetensors.

    Batch norm is given the statistics of some images: without, a deep network's answers may overflow.
    """
    import torch

    from stages.model import Classifier, save
    from stages.tensors import to_unit

    torch.manual_seed(0)
    model = Classifier(design, here)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(to_unit(pixels_NHWC))
    return save(model.network)


def device() -> Device:
    """The devices of this machine."""
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
    """Do some work; all processes wait for each other before it, or none do."""
    try:
        return work(_together.wait if all_of_them else _nobody, *args)
    except BaseException:
        _together.abort()
        raise


def _nobody() -> None:
    """The barrier of a process that is tried alone."""


def _ready(meet: Callable[[], Any]) -> None:
    """Load the modules that a worker loads as it starts."""
    import torch

    from stages import attack, device, evaluate, invert, train, usefulness  # noqa: F401

    torch.zeros(1, device=device.device())
    meet()


def _measure(meet: Callable[[], Any], job: ShardJob | ModelJob, unit: Unit | None, weigh: bool) -> Measurement:
    job.node = replace(job.node, version=uuid.uuid4().hex)  # a folder of its own: others try the same
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
    return Measurement(opened, read, first, again, commit, stored, held)


def _train(meet: Callable[[], Any], job: ModelJob) -> Measurement:
    """Two epochs; the second, with its checkpoint, is the work."""
    meet()
    steps = job.steps()
    _, first = _timed(lambda: next(steps))
    _, again = _timed(lambda: next(steps))
    made = next(steps)["manifest"]
    return Measurement(0.0, 0.0, first, again, 0.0, sum(file["bytes"] for file in made["files"]))


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def _weighed(work: Callable[[Any], Any], given: Any, weigh: bool) -> int:
    """Do some work; returns the peak of a GPU's memory, or on a processor the bytes saved for backward, if `weigh`."""
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
