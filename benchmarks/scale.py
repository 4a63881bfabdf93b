"""Scaling of the pipeline itself: many workers and many shards, with the attack replaced by a wait of known length.

Measures the share of time in which workers are busy, the growth of the driver's memory with the number of shards, and
the time to find the remaining work when nearly all is done.

    python -m benchmarks.scale                                    # 64 workers, 5,000 shards
    python -m benchmarks.scale --s3                               # the same plans, on a real S3 server on loopback
"""

import contextlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import pyarrow.fs
import yaml
from PIL import Image
from ray.cluster_utils import Cluster

from benchmarks.side_by_side import machine, show
from pipeline.experiment.spec import parse
from pipeline.run import jobs
from pipeline.run.jobs import AttackJob, Context
from pipeline.run.on_ray import ACTOR_CPUS, OnRay
from pipeline.run.runs import Run
from pipeline.store import Store
from stages.relabel import targets
from stages.shard import Shard

ROOT = Path(__file__).resolve().parent.parent
STEPS_AT_ONCE = 16
"""Reads and commits that may run concurrently with the waiting workers."""


def waiting(seconds: float) -> type[AttackJob]:
    """An attack that only waits; reading, packing, verifying and committing are real."""

    class Waiting(AttackJob):
        heavy = True  # type: ignore[assignment]

        def open(self) -> Callable[[Shard], Shard]:
            rule, classes = self.node.relabel, self.facts()["classes"]

            def work(shard: Shard) -> Shard:
                time.sleep(seconds)
                return replace(shard, label=targets(rule, shard.label, shard.index, classes))  # type: ignore[arg-type]

            return work

    return Waiting


def experiment(shards: int, source: Path) -> dict[str, Any]:
    """Two small images in each shard."""
    load = {"source": "webdataset", "shards": {"train": str(source)}, "classes": 10, "shard_size": 2}
    return {
        "name": "scale",
        "datasets": {
            "clean": {"load": load},
            "waited": {"attack": {"images": "clean", "method": "none"}, "relabel": "other"},
        },
    }


def write_source(file: Path, count: int) -> None:
    """A tar of random images of 8 × 8."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    with tarfile.open(file, "w") as tar:
        for index, image in enumerate(pixels):
            out = io.BytesIO()
            Image.fromarray(image).save(out, "png")
            for suffix, content in (("png", out.getvalue()), ("cls", str(index % 10).encode())):
                member = tarfile.TarInfo(f"{index:08d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


class Memory:
    """Records when shards are finished, and this process's memory at that time."""

    def __init__(self) -> None:
        self.driver: dict[int, float] = {}
        self.times: list[float] = []

    def __call__(self, node: str, progress: Any, event: str) -> None:
        """Record the time of each shard, and now and then the driver's memory in MiB."""
        if event != "committed" or node != "datasets/waited":
            return
        self.times.append(time.monotonic())
        if progress.done % (progress.total // 10) == 0:
            self.driver[progress.done] = psutil.Process().memory_info().rss / 2**20


@contextlib.contextmanager
def cluster(cpus: int) -> Iterator[str]:
    """A one-node cluster that claims as many CPUs as the workers request; yields its address."""
    node = {"num_cpus": cpus, "object_store_memory": 2**30, "include_dashboard": False}
    started = Cluster(initialize_head=True, connect=False, head_node_args=node)
    try:
        yield started.address
    finally:
        started.shutdown()


def busy(place: Context, wanted: Any, workers: int, wait: float) -> list[list[str]]:
    """Run the waiting node; returns how busy its workers were."""
    with cluster(STEPS_AT_ONCE // 4 + 4) as address:
        engine = OnRay(workers=4, address=address)
        load = Run(wanted, place, only=("clean",))
        assert load.go(engine), load.record.nodes
        engine.close()
    seconds = load.record.nodes["datasets/clean"].seconds or 0.0
    count = load.record.nodes["datasets/clean"].total
    jobs.JOBS["attack"] = waiting(wait)
    with cluster(int(workers * ACTOR_CPUS) + STEPS_AT_ONCE // 4) as address:
        memory = Memory()
        engine = OnRay(workers=workers, address=address)
        run = Run(wanted, place, watch=memory)
        assert run.go(engine), run.record.nodes
        engine.close()
    node = run.record.nodes["datasets/waited"]
    marks = [mark for mark in _marks(place.store, run) if mark is not None]
    worked, whole = sum(mark["seconds"]["work"] for mark in marks), node.seconds or 1.0
    steady = memory.times[len(memory.times) // 10 : -2 * workers]
    flow = (len(steady) - 1) * wait / (steady[-1] - steady[0]) / workers
    fewest, most = min(memory.driver, key=lambda done: abs(done - 1000)), max(memory.driver)
    return [
        ["load, shards per second (4 tasks at a time)", f"{count / seconds:.1f}"],
        [f"wait of {wait:g} s × {count:,} shards ÷ ({workers} workers × {whole:.0f} s of the node)",
         f"{len(marks) * wait / workers / whole:.3f}"],
        ["share of time that workers were busy, start and end included", f"{worked / workers / whole:.3f}"],
        ["share of time that workers waited as they should, first tenth and last shards left out", f"{flow:.3f}"],
        [f"driver, MiB after {fewest:,} shards", f"{memory.driver[fewest]:.0f}"],
        [f"driver, MiB after {most:,} shards", f"{memory.driver[most]:.0f}"],
    ]  # fmt: skip


def _marks(store: Store, run: Run) -> list[Any]:
    node = next(node for node in run.nodes if node.id == "datasets/waited")
    return [store.find_json(f"{node.folder}/commits/{name}") for name in store.files(f"{node.folder}/commits")]


class Looked(Exception):
    """The engine was called: all preceding work is done."""


class Look:
    """An engine that only records the time at which shards are requested."""

    def start(self, work: Callable[[], Any]) -> Any:
        from pipeline.run.engines import Inline

        return Inline().start(work)

    def shards(self, job: Any, units: Any, report: Any) -> Any:
        self.at, self.units = time.perf_counter(), len(units)
        raise Looked


def take_away(place: Context, wanted: Any, made: str, gone: int) -> int:
    """Remove some shards of a node, as if they had not been made; returns its number of shards."""
    folder = next(node.folder for node in Run(wanted, place).nodes if node.id == made)
    there = place.store.files(folder, recursive=True)
    shards = sorted(name for name in there if name.startswith("commits/") and name.endswith(".json"))
    place.store.delete(f"{folder}/manifest.json")
    for mark in shards[:: max(1, len(shards) // gone)][:gone]:
        place.store.delete(f"{folder}/{mark}")
    return len(shards)


def until_asked(place: Context, wanted: Any) -> tuple[float, int]:
    """Seconds until a run starts on the missing shards, and their number."""
    look: Any = Look()
    started = time.perf_counter()
    Run(wanted, place).go(look)
    return look.at - started, look.units


def plan(place: Context, file: Path, name: str, wanted: Any, gone: int = 10) -> list[list[str]]:
    """Remove some shards, and measure how long it takes to detect that."""
    shards = take_away(place, wanted, "datasets/waited", gone)
    seconds, missing = until_asked(place, wanted)
    command = [str(Path(sys.executable).with_name("notbugs")), "plan", str(file), "--store", place.store.url]
    began = time.perf_counter()
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert str(shards - missing) in said, said
    return [
        [f"{name}: run, until the first of the {missing} missing of {shards:,} begins, s", f"{seconds:.2f}"],
        [f"{name}: `notbugs plan`, start of Python included, s", f"{time.perf_counter() - began:.2f}"],
    ]


@click.command()
@click.option("--workers", default=64, show_default=True)
@click.option("--shards", default=5000, show_default=True)
@click.option("--wait", default=10.0, show_default=True, help="Seconds that stand for the attack on a shard.")
@click.option("--s3", is_flag=True, help="Also plan on an S3 server (SeaweedFS, started and stopped here).")
def main(workers: int, shards: int, wait: float, s3: bool) -> None:
    """Measure how the pipeline scales on this machine."""
    lines: list[list[str]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_source(folder / "source.tar", 2 * shards)
        (folder / "scale.yaml").write_text(yaml.safe_dump(experiment(shards, folder / "source.tar")))
        wanted = parse(experiment(shards, folder / "source.tar"))
        place = Context(Store(str(folder / "store")), folder, folder)
        lines += busy(place, wanted, workers, wait)
        if s3:
            with on_s3(place, folder) as far:
                lines += plan(far, folder / "scale.yaml", "S3 server", wanted)
        lines += plan(place, folder / "scale.yaml", "local folder", wanted)
    click.echo(machine("ray"))
    show(f"{workers} workers, {shards:,} shards, {wait:g} s of attack each", ["", "measured"], lines)


@contextlib.contextmanager
def on_s3(place: Context, folder: Path) -> Iterator[Context]:
    """Copy a store to an S3 server that runs meanwhile."""
    sys.path.insert(0, str(ROOT / "tests"))
    from s3 import S3Server

    with S3Server(folder / "s3") as server:
        os.environ.update(server.environment)
        server.make_bucket("scale")
        store = Store("s3://scale/store")
        for group in ("datasets", "models"):
            files = place.store.files(group, recursive=True)
            if not files:
                continue
            pyarrow.fs.copy_files(
                f"{place.store.url}/{group}", f"scale/store/{group}",
                source_filesystem=pyarrow.fs.LocalFileSystem(),
                destination_filesystem=pyarrow.fs.S3FileSystem(
                    endpoint_override=server.url, allow_delayed_open=True, background_writes=False
                ),
                use_threads=True,
            )  # fmt: skip
            assert len(store.files(group, recursive=True)) == len(files)
        yield replace(place, store=store)


if __name__ == "__main__":
    main()
