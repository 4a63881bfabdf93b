"""What the pipeline adds to the bare attack loop: images/s of a whole dataset node over the loop alone.

Both attack the same images with the same model and steps, one after the other in one run. The bare
loop is measured twice, as one process with a thread per core and as one process per core with one
thread; the node is held against the faster. Steps are counted in wall seconds and added up: where two
share a core both count, and the rest can come out negative.

    python benchmarks/overhead.py --data FOLDER     # the folder that holds cifar-10-batches-py
"""

import multiprocessing
import os
import platform
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from pipeline import report
from pipeline.jobs import AttackJob, Place
from pipeline.on_ray import OnRay
from pipeline.runs import Run
from pipeline.spec import parse
from pipeline.store import Store
from stages.attack import attack_batches, targeted
from stages.model import threads


def experiment(images: int, steps: int, precision: str) -> Any:
    """A dataset node on part of CIFAR-10, and a source model trained just enough to have gradients."""
    attack = {
        "images": "clean",
        "model": "standard",
        "eps": 0.5,
        "step_size": 0.1,
        "steps": steps,
        "precision": precision,
    }
    train = {"on": "clean", "arch": "fast_resnet", "epochs": 1, "lr": 0.1, "precision": "bfloat16", "threads": 2}
    return parse(
        {
            "name": "benchmark",
            "datasets": {
                "clean": {"load": {"source": "cifar10", "limit": images, "download": False}},
                "other": {"attack": attack, "relabel": "other"},
            },
            "models": {"standard": {"train": train}},
        }
    )


def job_of(run: Run) -> AttackJob:
    """The dataset node as the pipeline would make it."""
    node = next(node for node in run.nodes if node.id == "datasets/other")
    return AttackJob(node, run.place, {role: run.made[parent.id] for role, parent in node.inputs.items()})


def bare(job: AttackJob, names: list[str], count: int, ready: Barrier, seconds: Any) -> None:
    """Only the loop, on images that are already in memory; everything else happens before the barrier."""
    units = [unit for unit in job.units() if unit.name in names]
    shards = [job.read(unit) for unit in units]
    pixels = np.concatenate([shard.images() for shard in shards])
    wanted = (np.concatenate([shard.label for shard in shards]) + 1) % 10
    attacker = job.open()
    model, recipe = attacker.model, attacker.recipe
    with threads(count):
        attack_batches(model, recipe, targeted, pixels[: recipe.batch_size], wanted[: recipe.batch_size])
        ready.wait()
        started = time.perf_counter()
        attack_batches(model, recipe, targeted, pixels, wanted)
        seconds.put(time.perf_counter() - started)


def time_bare(job: AttackJob, processes: int, count: int) -> float:
    """Seconds of the loop over all images, split over some processes with some threads each."""
    context = multiprocessing.get_context("spawn")
    ready, seconds = context.Barrier(processes), context.Queue()
    names = [unit.name for unit in job.units()]
    started = [
        context.Process(target=bare, args=(job, names[i::processes], count, ready, seconds)) for i in range(processes)
    ]
    for process in started:
        process.start()
    took = max(seconds.get() for _ in started)
    for process in started:
        process.join()
    return float(took)


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True, help="Holds cifar-10-batches-py.")
@click.option("--images", default=10_000, show_default=True)
@click.option("--steps", default=20, show_default=True)
@click.option("--precision", type=click.Choice(["float32", "bfloat16"]), default="bfloat16", show_default=True)
def main(data: Path, images: int, steps: int, precision: str) -> None:
    """Measure a dataset node against the bare loop, and say where the rest goes."""
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Store(folder), data.absolute(), Path.cwd())
        wanted = experiment(images, steps, precision)
        before = Run(wanted, place, only=("clean", "standard"))
        engine = OnRay()
        assert before.go(engine), before.record.nodes
        run = Run(wanted, place)
        run.made = before.made
        loops = {
            f"bare loop, 1 process × {cores} threads": time_bare(job_of(run), 1, cores),
            f"bare loop, {cores} processes × 1 thread": time_bare(job_of(run), cores, 1),
        }
        run = Run(wanted, place)
        assert run.go(engine), run.record.nodes
        engine.close()
        node = run.record.nodes["datasets/other"].seconds or 0.0
        steps_seconds = _seconds(place.store, run)
    best = min(loops.values())
    lines = [[name, f"{images / took:.1f}", f"{took:.1f}", f"{best / took:.3f}"] for name, took in loops.items()]
    lines.append(["dataset node", f"{images / node:.1f}", f"{node:.1f}", f"{best / node:.3f}"])
    click.echo(f"{images} images, {steps} steps, fast_resnet, {precision}")
    click.echo(f"torch {torch.__version__}, {_processor()}, {cores} cores\n")
    click.echo(report.table(["", "images/s", "seconds", "over the best loop"], lines))
    whole, told = node * cores, sum(steps_seconds.values())
    rest = {"read and decode": "read", "attack, round and measure": "work", "encode, verify and commit": "commit"}
    shares = [[name, f"{steps_seconds[key]:.1f}", f"{steps_seconds[key] / whole:.3f}"] for name, key in rest.items()]
    shares.append(["start of workers, waiting, bookkeeping", f"{whole - told:.1f}", f"{(whole - told) / whole:.3f}"])
    click.echo("\n" + report.table(["where the node's time goes", "core-seconds", "share"], shares))


def _seconds(store: Store, run: Run) -> dict[str, float]:
    node = next(node for node in run.nodes if node.id == "datasets/other")
    marks = [store.find_json(f"{node.folder}/commits/{name}") for name in store.files(f"{node.folder}/commits")]
    found = [mark["seconds"] for mark in marks if mark is not None]
    return {key: sum(one[key] for one in found) for key in ("read", "work", "commit")}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
