"""Plan, list, finish and resume at ImageNet's size: 1,300 shards of 1,000 synthetic images.

The datasets are one loaded and one attacked (one step of PGD on an untrained small_cnn). The source, its listing, the
units, and the first `--share` shards of each are real: these shards are read, attacked, packed, verified and committed.

The other shards are stand-ins. Their rows and commit marks have the names, inputs, indices and labels that the pipeline
gives them; other values are those of a real shard, measurements varied slightly. Each tar is replaced by 1 KiB, which
only `verify` would open; its mark states its size and digest. So `finish` and later steps see all marks and rows.

Each step runs in a process of its own. Memory is the peak of that process: with `+`, above its memory before the step;
without (for commands), in total, including the start of Python.

    python -m benchmarks.imagenet_scale                                        # 1,300 shards, 4 of them run, at 224 px
    python -m benchmarks.imagenet_scale --s3                                   # plan and resume on an S3 server as well
    python -m benchmarks.imagenet_scale --shards 40 --share 1 --size 32 --rounds 1              # a trial
"""

import contextlib
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from ray import cloudpickle

from benchmarks.scale import Looked, on_s3, take_away, until_asked
from benchmarks.side_by_side import highest, machine, show
from pipeline.experiment.graph import build
from pipeline.experiment.spec import parse
from pipeline.run import artifacts
from pipeline.run.engines import Inline
from pipeline.run.jobs import JOBS, Context, DatasetJob, Unit
from pipeline.run.runs import Run
from pipeline.store import Store, digest
from stages import nets
from stages.model import save
from stages.shard import key

DATASETS = ("clean", "moved")
STAND_IN = bytes(1024)
"""Content of a stand-in's tar."""

LOOK = 0.02
"""Seconds between two samples of a command's memory."""


def experiment(shards: int, shard_size: int, size: int, classes: int, steps: int, weights: Path) -> dict[str, Any]:
    """A loaded dataset, and one made from it by attacking an untrained network."""
    load = {"source": "synthetic", "images": {"train": shards * shard_size}, "classes": classes, "size": size}
    attack = {"images": "clean", "model": "net", "eps": 0.5, "steps": steps, "batch_size": 100}
    bring = {"arch": "small_cnn", "weights": str(weights), "shape": [3, size, size]}
    return {
        "name": "imagenet-scale",
        "datasets": {
            "clean": {"load": {**load, "shard_size": shard_size}},
            "moved": {"attack": attack, "relabel": "other"},
        },
        "models": {"net": {"pretrained": bring}},
    }


# ---------------------------------------------------------------------------- a process for each step


@dataclass(frozen=True)
class Took:
    """A step's duration in seconds, peak memory in MiB, and result."""

    seconds: float
    peak: float
    said: Any = None


@dataclass
class Table:
    """A table of measurements, each repeated several times."""

    rounds: int
    lines: list[list[str]] = field(default_factory=list)

    def add(self, what: str, measure: Callable[[], Took], sign: str = "+", size: Callable[[Any], Any] = str) -> None:
        """Measure something; ``size`` formats the last result for the table."""
        each = [measure() for _ in range(self.rounds)]
        peak = f"{sign}{max(took.peak for took in each):.0f}"
        self.note([what, _median([took.seconds for took in each]), peak, size(each[-1].said)])

    def note(self, line: list[str]) -> None:
        """Add a line to the table and print it at once."""
        self.lines.append(line)
        click.echo("  ".join(line), err=True)


def _median(seconds: Sequence[float]) -> str:
    spread = f" ({min(seconds):.2f} – {max(seconds):.2f})" if len(seconds) > 1 else ""
    return f"{np.median(seconds):.2f}{spread}"


def alone(step: Callable[..., Any], *args: Any) -> Took:
    """Run a step in a separate process, after its imports."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measured, step, *args).result()


def _measured(step: Callable[..., Any], *args: Any) -> Took:
    before, started = psutil.Process().memory_info().rss, time.perf_counter()
    said = step(*args)
    return Took(time.perf_counter() - started, highest() - before / 2**20, said)


def command(*args: Any) -> Took:
    """Run a command as a user does, including the start of Python."""
    started, peak = time.perf_counter(), 0.0
    notbugs = str(Path(sys.executable).with_name("notbugs"))
    with subprocess.Popen([notbugs, *map(str, args)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while process.poll() is None:
            peak = max(peak, highest(process.pid))
            time.sleep(LOOK)
        assert process.returncode == 0, args
        said = process.stdout.read().decode()
    return Took(time.perf_counter() - started, peak, said)


# ---------------------------------------------------------------------------------------- the steps


def job_of(place: Context, wanted: Any, name: str) -> DatasetJob:
    """A dataset's job, with its inputs from the store."""
    node = next(node for node in build(parse(wanted)) if node.id == f"datasets/{name}")
    inputs = {role: artifacts.find(place.store, parent) for role, parent in node.inputs.items()}
    job = JOBS[node.stage](node, place, {role: made for role, made in inputs.items() if made is not None})
    assert isinstance(job, DatasetJob)
    return job


def listing(place: Context, wanted: Any) -> str:
    """List the source."""
    job: Any = job_of(place, wanted, "clean")
    return f"{sum(map(len, job.listing.items.values())):,} images"


def units(place: Context, wanted: Any, name: str) -> str:
    """The units of a dataset, with the digests of their inputs, and the size of what is sent to workers."""
    job = job_of(place, wanted, name)
    found = job.units()
    each = len(cloudpickle.dumps(found[0]))
    return f"job {len(cloudpickle.dumps(job)) / 1000:.1f} kB, a shard {each / 1000:.1f} kB"


def committed(place: Context, wanted: Any, name: str) -> str:
    """List the node's files and read its shards' marks."""
    job = job_of(place, wanted, name)
    return f"{len(job.committed(job.units(), job.stored())):,} hold"


class Noting(Store):
    """A store that records when each file was written, and its size."""

    def put(self, path: str, content: bytes) -> None:
        super().put(path, content)
        self.written = {**getattr(self, "written", {}), path.rpartition("/")[2]: (time.perf_counter(), len(content))}


def finish(place: Context, wanted: Any, name: str) -> tuple[float, str]:
    """Publish a dataset from its shards' marks and rows; seconds, without reading the marks."""
    store = Noting(place.store.url)
    job = job_of(Context(store, place.data, place.here), wanted, name)
    marks = job.committed(job.units(), job.stored())
    started = time.perf_counter()
    job.finish(marks)
    said, before = [], started
    for file, (at, size) in store.written.items():
        said.append(f"{file} {at - before:.2f} s, {size / 1e6:.2f} MB")
        before = at
    return before - started, "; ".join(said)


READERS: dict[str, Callable[[bytes], Any]] = {
    "pyarrow, all columns": lambda content: pq.read_table(BytesIO(content)),
    "pyarrow, two columns": lambda content: pq.read_table(BytesIO(content), columns=["key", "success"]),
    "pandas, all columns": lambda content: pd.read_parquet(BytesIO(content)),
}


def read(place: Context, path: str, reader: str) -> str:
    """Read ``samples.parquet``."""
    return f"{len(READERS[reader](place.store.read(path))):,} rows"


# ------------------------------------------------------------------------------ real shards and stand-ins


class Share(Inline):
    """Makes only the first shards of one dataset, and all of other nodes."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count

    def shards(self, job: Any, units: Any, report: Any) -> Any:
        """Stop the run at that dataset, since it stays incomplete."""
        if job.node.name != self.name:
            return super().shards(job, units, report)
        lost = super().shards(job, units[: self.count], report)
        assert not lost, lost
        raise Looked


def run_share(place: Context, wanted: Any, name: str, share: int) -> list[str]:
    """Make the real shards of a dataset; returns a line of the table."""
    Run(parse(wanted), place, only=(name,)).go(Share(name, share))
    job = job_of(place, wanted, name)
    marks = list(job.committed(job.units()[:share], job.stored()).values())
    steps = {step: float(np.mean([mark["seconds"][step] for mark in marks])) for step in marks[0]["seconds"]}
    images, size = sum(mark["samples"] for mark in marks), float(np.mean([mark["bytes"] for mark in marks]))
    said = f"images/s {images / len(marks) / sum(steps.values()):.0f}, {size / 1e6:.1f} MB a shard"
    parts = ", ".join(f"{step} {seconds:.2f}" for step, seconds in steps.items())
    return [f"{name}: a shard of the {len(marks)} really run: {parts}", f"{sum(steps.values()):.2f}", "", said]


def stand_in(place: Context, wanted: Any, name: str, share: int) -> list[str]:
    """Write stand-in tar, rows and mark of every other shard; returns a line of the table."""
    started, job = time.perf_counter(), job_of(place, wanted, name)
    store, folder, all_units = place.store, job.node.folder, job.units()
    real = job.committed(all_units[:share], job.stored())
    patterns = [(mark, pq.read_table(BytesIO(store.read(f"{folder}/{artifacts.rows_path(one)}"))))
                for one, mark in real.items()]  # fmt: skip
    for unit, (mark, rows) in zip(all_units[share:], itertools.cycle(patterns)):
        table = BytesIO()
        pq.write_table(_rows(job, unit, rows), table, compression="zstd")
        content = table.getvalue()
        mine = {
            "name": unit.name,
            "inputs": unit.inputs,
            "bytes": len(STAND_IN),
            "sha256": digest(STAND_IN),
            "rows": {"bytes": len(content), "sha256": digest(content)},
        }
        store.put(f"{folder}/{unit.name}.tar", STAND_IN)
        store.put(f"{folder}/{artifacts.rows_path(unit.name)}", content)
        store.put_json(f"{folder}/{artifacts.mark_path(unit.name)}", mark | mine)
    count = len(all_units) - share
    return [f"{name}: stand-ins for {count:,} shards", f"{time.perf_counter() - started:.2f}", "", ""]


def _rows(job: DatasetJob, unit: Unit, like: pa.Table) -> pa.Table:
    """The rows of a stand-in: its own names, indices and labels, and the measurements of a real shard."""
    if unit.items:
        own = {"index": [item.index for item in unit.items], "source_label": [item.label for item in unit.items]}
        own["label"] = own["source_label"]
    else:
        path = f"{job.inputs['images'].folder}/{artifacts.rows_path(unit.name)}"
        own = pq.read_table(BytesIO(job.context.store.read(path)), columns=["index", "source_label"]).to_pydict()
    own |= {"key": [key(index) for index in own["index"]], "shard": [unit.name] * unit.samples}
    columns = [
        pa.array(own[each.name], each.type) if each.name in own else _varied(like[each.name], own["index"][0])
        for each in like.schema
    ]
    return pa.table(columns, schema=like.schema)


def _varied(column: pa.ChunkedArray, seed: int) -> pa.ChunkedArray:
    """Measurements varied slightly: if they were equal in all shards, the file would compress to almost nothing."""
    if not pa.types.is_floating(column.type) or column.null_count:
        return column
    factors = np.random.default_rng(seed).uniform(0.9, 1.1, len(column))
    return pa.chunked_array([pa.array(column.to_numpy() * factors, column.type)])


# ----------------------------------------------------------------------------------------- in order


def measure(table: Table, place: Context, file: Path, wanted: Any, share: int) -> None:
    """Measure every step on a local folder, from an empty store to a finished one."""
    store = ["--store", place.store.url]
    table.add("notbugs plan, the store empty", lambda: command("plan", file, *store), "", lambda _: "")
    table.add("clean: list the source", lambda: alone(listing, place, wanted))
    for name in DATASETS:
        table.note(run_share(place, wanted, name, share))
        table.note(stand_in(place, wanted, name, share))
        table.add(f"{name}: the shards, and what travels", lambda name=name: alone(units, place, wanted, name))
        table.add(
            f"{name}: list what is there, read all marks", lambda name=name: alone(committed, place, wanted, name)
        )
        table.add(f"{name}: finish", lambda name=name: _finish(place, wanted, name))
    table.add("notbugs plan, all there", lambda: command("plan", file, *store), "", lambda _: "")
    table.add(
        "notbugs show moved", lambda: command("show", "moved", *store), "", lambda said: f"{len(said)} characters"
    )
    table.add("notbugs verify --keep moved", lambda: command("verify", "moved", "--keep", *store), "", str.strip)
    path = f"{job_of(place, wanted, 'moved').node.folder}/samples.parquet"
    for reader in READERS:
        table.add(f"moved: samples.parquet, {reader}", lambda reader=reader: alone(read, place, path, reader))
    resume(table, place, file, "local folder", wanted)


def _finish(place: Context, wanted: Any, name: str) -> Took:
    took = alone(finish, place, wanted, name)
    return Took(took.said[0], took.peak, took.said[1])


def resume(table: Table, place: Context, file: Path, where: str, wanted: Any) -> None:
    """Remove one shard of each dataset; measure a run up to the point where it remakes it, and `plan`."""
    for name in DATASETS:
        with restored(place.store, job_of(place, wanted, name).node.folder):
            count = take_away(place, parse(wanted), f"datasets/{name}", 1)
            what = f"{where}, {name}: {count - 1:,} of {count:,} there"
            table.add(f"{what}: run, until the missing one begins", lambda: _resumed(place, wanted))
            table.add(
                f"{what}: notbugs plan", lambda: command("plan", file, "--store", place.store.url), "", lambda _: ""
            )


def _resumed(place: Context, wanted: Any) -> Took:
    took = alone(until_asked, place, parse(wanted))
    seconds, missing = took.said
    return Took(seconds, took.peak, f"{missing} to make")


@contextlib.contextmanager
def restored(store: Store, folder: str) -> Iterator[None]:
    """Restore files of a node that are removed inside."""
    kept = store.find_all(f"{folder}/{name}" for name in store.files(folder, recursive=True) if name.endswith(".json"))
    yield
    for name in store.files(folder, recursive=True):
        kept.pop(f"{folder}/{name}", None)
    for path, content in kept.items():
        store.put(path, content or b"")


@click.command()
@click.option("--shards", default=1300, show_default=True)
@click.option("--shard-size", default=1000, show_default=True, help="Images per shard.")
@click.option("--size", default=224, show_default=True, help="Side of an image in pixels.")
@click.option("--classes", default=1000, show_default=True)
@click.option("--share", default=4, show_default=True, help="Shards that are really run, of each dataset.")
@click.option("--steps", default=1, show_default=True, help="Of the attack.")
@click.option("--rounds", default=3, show_default=True, help="How often each step is measured.")
@click.option("--s3", is_flag=True, help="Also plan and resume on an S3 server (SeaweedFS, started and stopped here).")
def main(shards: int, shard_size: int, size: int, classes: int, share: int, steps: int, rounds: int, s3: bool) -> None:
    """Measure the pipeline at ImageNet's size."""
    table = Table(rounds)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = folder / "net.safetensors"
        weights.write_bytes(save(nets.build("small_cnn", classes, 3, folder)))
        wanted = experiment(shards, shard_size, size, classes, steps, weights)
        file = folder / "scale.yaml"
        file.write_text(yaml.safe_dump(wanted))
        place = Context(Store(str(folder / "store")), folder, folder)
        measure(table, place, file, wanted, share)
        if s3:
            with on_s3(place, folder) as far:
                resume(table, far, file, "S3 server", wanted)
    click.echo(machine("pyarrow"))
    show(
        f"{shards:,} shards of {shard_size:,} images of {size} × {size} px",
        ["", "seconds", "peak MiB", ""],
        table.lines,
    )


if __name__ == "__main__":
    main()
