"""Peak memory of making a node, by kind of node, with few shards and with many (Linux only).

Each node is made in a process of its own by the inline engine, with two steps per search, since memory does not grow
with steps. The table also has that process's peak after imports, before the work. Then the same nodes are made on Ray,
with the peak of each kind of Ray's processes; shared memory, which shards pass through, counts in every process that
maps it.

    python -m benchmarks.memory                                              # 32 pixels
    python -m benchmarks.memory --side 224 --shard-size 100 --arch resnet50 --batch 32
    python -m benchmarks.memory --few 1 --many 3 --shard-size 100 --no-ray   # a look
"""

import multiprocessing
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

import click
import psutil

from benchmarks.shards import CLASSES, shards_of
from benchmarks.side_by_side import attacked, highest, images, machine, show
from pipeline.experiment.graph import build
from pipeline.experiment.spec import parse
from pipeline.run.engines import Inline
from pipeline.run.jobs import Context
from pipeline.run.on_ray import OnRay
from pipeline.run.runs import Run
from pipeline.store import Store
from stages.shard import pack

EVERY = 0.1
"""Seconds between two samples of Ray's processes."""


def experiment(source: Path, arch: str, shard_size: int, batch: int) -> dict[str, Any]:
    """An experiment with a node of every kind."""
    search = {"images": "clean", "model": "standard", "steps": 2, "batch_size": batch}
    on = {"models": ["standard"], "on": "clean", "split": "train", "batch_size": batch}
    files = f"{source}/train-{{000000..{len(list(source.iterdir())) - 1:06d}}}.tar"
    load = {"source": "webdataset", "shards": {"train": files}, "classes": CLASSES, "shard_size": shard_size}
    train = {"on": "clean", "arch": arch, "epochs": 1, "batch_size": batch, "threads": 1, "eval_images": 0}
    return {
        "name": "memory",
        "datasets": {
            "load": {"load": load | {"seed": 1}},
            "clean": {"load": load},
            "attack": {"attack": search, "relabel": "other"},
            "invert": {"invert": search},
            "select": {"select": {"images": "attack", "keep": "top", "share": 0.5}},
        },
        "models": {"standard": {"train": train}, "streamed": {"train": train | {"memory_budget": 0}}},
        "evaluations": {
            "evaluate": on | {"attacks": [{"steps": 2, "batch_size": batch}]},
            "usefulness": {"usefulness": on | {"normalise": "train", "steps": 2, "limit": batch}},
        },
    }


def alone(wanted: dict[str, Any], place: Context, node: str, say: Any) -> None:
    """Make a node in this process from inputs that already exist."""
    from stages import apgd, attack, evaluate, invert, train, usefulness  # noqa: F401 - so that they count before

    before, run = highest(), Run(parse(wanted), place, only=(node,))
    assert run.go(Inline()), run.record.nodes[node]
    say.put((before, highest()))


def inline(wanted: dict[str, Any], place: Context) -> dict[str, tuple[float, float]]:
    """Node → memory in MiB of its process, before and after it was made."""
    context, found = multiprocessing.get_context("spawn"), {}
    for node in build(parse(wanted)):
        say = context.Queue()
        process = context.Process(target=alone, args=(wanted, place, node.id, say))
        process.start()
        process.join()
        if process.exitcode:
            raise click.ClickException(f"{node.id} could not be made, see above")
        found[node.id] = say.get()
        click.echo(f"{node.id}: {found[node.id][1]:.0f} MiB", err=True)
    return found


def on_ray(wanted: dict[str, Any], place: Context) -> dict[str, float]:
    """Kind of process → peak memory in MiB, sampled from outside."""
    most: dict[str, float] = defaultdict(float)
    over = Event()

    def look() -> None:
        while not over.wait(EVERY):
            for process in psutil.Process().children(recursive=True):
                try:
                    name = process.cmdline()[0].partition("(")[0].partition(".")[0]
                    if name.startswith("ray::"):
                        most[name] = max(most[name], process.memory_info().rss / 2**20)
                except (psutil.Error, IndexError):
                    continue  # it ended meanwhile
            most["driver"] = max(most["driver"], psutil.Process().memory_info().rss / 2**20)

    watching = Thread(target=look)
    watching.start()
    engine, run = OnRay(), Run(parse(wanted), place)
    done = run.go(engine)
    engine.close()
    over.set()
    watching.join()
    assert done, run.record.nodes
    return dict(most)


@click.command()
@click.option("--side", default=32, show_default=True, help="Height and width of an image, in pixels.")
@click.option("--arch", default="fast_resnet", show_default=True, help="As in an experiment file.")
@click.option("--shard-size", default=500, show_default=True, help="Images per shard.")
@click.option("--batch", default=128, show_default=True, help="Images per batch.")
@click.option("--few", default=2, show_default=True, help="Shards.")
@click.option("--many", default=6, show_default=True, help="Shards.")
@click.option("--ray/--no-ray", "also", default=True, show_default=True, help="Whether Ray's processes are measured.")
def main(side: int, arch: str, shard_size: int, batch: int, few: int, many: int, also: bool) -> None:
    """Measure the memory of every kind of node."""

    def with_shards(count: int, measure: Callable[[dict[str, Any], Context], Any]) -> Any:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "source").mkdir()
            for shard in shards_of(attacked(images(None, count * shard_size, side), 0.5), shard_size):
                (folder / "source" / f"{shard.name}.tar").write_bytes(pack(shard))
            wanted = experiment(folder / "source", arch, shard_size, batch)
            return measure(wanted, Context(Store(str(folder / "store")), folder, Path.cwd()))

    started = time.perf_counter()
    alone_few, alone_many = (with_shards(count, inline) for count in (few, many))
    lines = [
        [node, *(f"{each:.0f}" for each in (*alone_few[node], most)), f"{most - alone_few[node][1]:+.0f}"]
        for node, (_, most) in alone_many.items()
    ]
    counts = [f"{few} shards", f"{many} shards"]
    between = [(with_shards(few, on_ray), with_shards(many, on_ray))] if also else []
    click.echo(f"{arch}, {side} × {side} px, {shard_size} images a shard, batches of {batch}, MiB")
    click.echo(f"{machine('torch', 'ray')}, {time.perf_counter() - started:.0f} s")
    show("One process", ["node", "imported", *counts, "difference"], lines)
    for first, second in between:
        names = sorted(set(first) & set(second))
        seen = [[n, f"{first[n]:.0f}", f"{second[n]:.0f}", f"{second[n] - first[n]:+.0f}"] for n in names]
        show("On Ray", ["process", *counts, "difference"], seen)


if __name__ == "__main__":
    main()
