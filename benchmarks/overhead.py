"""The pipeline's overhead over the bare attack loop: images/s of a whole dataset node beside the loop alone.

Both attack the same images with the same model and steps, in turns. The bare loop runs as one process with one thread,
one process with a thread per core, and one process per core; the node is compared with the fastest. The node is made by
one worker and by one per core, to compare its scaling with that of bare loops. A second table breaks down the node's
time into wall seconds of each step; two steps that share a core both count, so the remainder can be negative. The last
table breaks down one shard, in a process that has the machine to itself.

    python -m benchmarks.overhead --data FOLDER     # the folder that holds cifar-10-batches-py
    python -m benchmarks.overhead --data FOLDER --images 400 --shard-size 100 --steps 10 --rounds 1     # a look
"""

import multiprocessing
import os
import tempfile
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import torch

from benchmarks.attack import ours
from benchmarks.side_by_side import in_turns, machine, over, seconds_of, show, spread
from pipeline.experiment.spec import parse
from pipeline.run.jobs import AttackJob, Context
from pipeline.run.jobs.statistics import statistics
from pipeline.run.on_ray import OnRay
from pipeline.run.runs import Run
from pipeline.store import Store
from stages.device import threads
from stages.inference import optimized
from stages.model import logits_of
from stages.pgd import round_in_ball
from stages.recipes import Attack
from stages.shard import Shard, pack, unpack
from stages.tensors import distances, to_unit

NODE = "datasets/other"


def experiment(images: int, shard_size: int, attack: dict[str, Any], arch: str, seed: int) -> Any:
    """An attacked dataset on part of CIFAR-10 with random targets, and a source model trained briefly."""
    train = {
        "on": "clean",
        "arch": arch,
        "epochs": 1,
        "lr": 0.1,
        "precision": "bfloat16",
        "threads": 2,
        "eval_images": 0,
    }
    load = {"source": "cifar10", "limit": images, "shard_size": shard_size, "download": False}
    relabel = {"rule": "other", "seed": seed}
    return parse(
        {
            "name": "overhead",
            "datasets": {"clean": {"load": load}, "other": {"attack": attack, "relabel": relabel}},
            "models": {"standard": {"train": train}},
        }
    )


def job_of(run: Run) -> AttackJob:
    """The dataset node as the pipeline would make it."""
    node = next(node for node in run.nodes if node.id == NODE)
    return AttackJob(node, run.context, {role: run.made[parent.id] for role, parent in node.inputs.items()})


# ---------------------------------------------------------------------------------------------- the bare loop


def batches(job: AttackJob, names: list[str]) -> tuple[Attack, Any, list[tuple[np.ndarray, torch.Tensor]]]:
    """The recipe, the optimised network, and the images of some shards in batches with their targets."""
    recipe, attacker = job.node.recipe, job.open()
    model = optimized(attacker.model, recipe)
    shards = [job.read(unit) for unit in job.units() if unit.name in names]
    pixels = np.concatenate([shard.images() for shard in shards])
    wanted = torch.from_numpy((np.concatenate([shard.label for shard in shards]) + 1) % 10).to(model.mean.device)
    firsts = range(0, len(pixels), recipe.batch_size)
    return recipe, model, [(pixels[i : i + recipe.batch_size], wanted[i : i + recipe.batch_size]) for i in firsts]


def bare(job: AttackJob, names: list[str], count: int, ready: Barrier, say: Any) -> None:
    """Run only the loop, on images in memory; everything else precedes the barrier."""
    recipe, model, todo = batches(job, names)
    loop = ours(model)
    with threads(count):
        loop(*todo[0], recipe.model_copy(update={"steps": 1}))
        ready.wait()
        say.put(seconds_of(lambda: [loop(pixels, target, recipe) for pixels, target in todo]))


def time_bare(job: AttackJob, processes: int, count: int) -> float:
    """Seconds of the loop over all images, split over some processes with some threads each."""
    context = multiprocessing.get_context("spawn")
    ready, say = context.Barrier(processes), context.Queue()
    names = [unit.name for unit in job.units()]
    parts = [names[i::processes] for i in range(processes)]
    started = [context.Process(target=bare, args=(job, part, count, ready, say)) for part in parts]
    for process in started:
        process.start()
    took = max(say.get() for _ in started)
    for process in started:
        process.join()
    return float(took)


# -------------------------------------------------------------------------------------------- the whole node


def steps_of(store: Store, folder: str) -> dict[str, float]:
    """Seconds of each step, summed over the marks of all shards."""
    marks = [store.find_json(f"{folder}/commits/{name}") for name in store.files(f"{folder}/commits")]
    found = [mark["seconds"] for mark in marks if mark is not None]
    return {step: sum(each[step] for each in found) for step in ("read", "work", "commit")}


def parts(job: AttackJob) -> dict[str, float]:
    """Seconds of each part of one shard's work, with nothing else running."""
    unit, recipe, attacker = job.units()[0], job.node.recipe, job.open()
    shard: Shard = job.read(unit)
    done: Shard = attacker(shard)
    clean, moved = shard.images(), done.images()
    bounds = range(0, len(clean), recipe.batch_size)
    unit_NCHW, levels = to_unit(moved), torch.from_numpy(clean).permute(0, 3, 1, 2)
    tar = pack(done)
    with threads(1):
        return {
            "read and decode": seconds_of(lambda: job.read(unit)),
            "attack, whole": seconds_of(lambda: attacker(shard)),
            "– of it rounding inside the ball": sum(
                seconds_of(
                    lambda at=slice(first, first + recipe.batch_size): round_in_ball(
                        unit_NCHW[at], levels[at], recipe.norm, recipe.eps
                    )
                )
                for first in bounds
            ),
            "– of it distances": seconds_of(lambda: distances(clean, moved)),
            "– of it answers in float32": seconds_of(lambda: logits_of(attacker.model, moved, recipe.batch_size)),
            "commit, whole": seconds_of(lambda: job.commit(unit, done, {})),
            "– of it encode and pack": seconds_of(lambda: pack(done)),
            "– of it read back": seconds_of(lambda: unpack(unit.name, tar, 3)),
            "– of it statistics": seconds_of(lambda: statistics(done)),
        }


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True, help="Holds cifar-10-batches-py.")
@click.option("--images", default=10_000, show_default=True)
@click.option("--shard-size", default=500, show_default=True, help="Images per shard.")
@click.option("--steps", default=50, show_default=True)
@click.option("--arch", default="fast_resnet", show_default=True, help="As in an experiment file.")
@click.option("--precision", type=click.Choice(["float32", "bfloat16"]), default="bfloat16", show_default=True)
@click.option("--rounds", default=3, show_default=True)
def main(data: Path, images: int, shard_size: int, steps: int, arch: str, precision: str, rounds: int) -> None:
    """Measure a dataset node against the bare loop, and say where the rest goes."""
    cores = os.cpu_count() or 1
    attack = {"images": "clean", "model": "standard", "eps": 0.5, "steps": steps, "precision": precision}
    told: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        place, engine = Context(Store(folder), data.absolute(), Path.cwd()), OnRay()
        workers = sum(one.gpus or one.cpus for one in engine.nodes())

        def run_of(seed: int) -> Run:
            return Run(experiment(images, shard_size, attack, arch, seed), place)

        before = Run(run_of(0).experiment, place, only=("clean", "standard"))
        assert before.go(engine), before.record.nodes
        start = run_of(0)
        start.made = before.made
        job = job_of(start)

        def node(turn: int, count: int) -> float:
            engine.workers, run = count, run_of(turn * workers + count)  # other targets, else it would be cached
            assert run.go(engine), run.record.nodes
            seconds = run.record.nodes[NODE].seconds or 0.0
            if count == workers:
                told.append(steps_of(place.store, job_of(run).node.folder) | {"node": seconds})
            return seconds

        seconds = in_turns(
            {
                "bare loop, 1 process × 1 thread": lambda _: time_bare(job, 1, 1),
                f"bare loop, 1 process × {cores} threads": lambda _: time_bare(job, 1, cores),
                f"bare loop, {cores} processes × 1 thread": lambda _: time_bare(job, cores, 1),
                "dataset node, 1 worker": lambda turn: node(turn, 1),
                f"dataset node, {workers} workers": lambda turn: node(turn, workers),
            },
            rounds,
        )
        engine.close()
        apart = parts(job)
    best = min([name for name in seconds if name.startswith("bare")], key=lambda name: median(seconds[name]))
    click.echo(f"{arch}, {precision}, {images} images in shards of {shard_size}, {steps} steps, {rounds} rounds")
    click.echo(f"{machine('torch', 'ray')}, {workers} workers")
    show(
        "A dataset node over the bare loop",
        ["", "images/s", "seconds", f"over {best}"],
        [
            [name, spread([images / one for one in taken]), spread(taken), f"{over(seconds[best], taken):.3f}"]
            for name, taken in seconds.items()
        ],
    )
    one, several = "dataset node, 1 worker", f"dataset node, {workers} workers"
    bare = [f"bare loop, {processes} process{'es' * (processes > 1)} × 1 thread" for processes in (1, cores)]
    twice = [[f"{a} over {b}", f"{over(seconds[b], seconds[a]):.3f}"] for a, b in ((several, one), bare[::-1])]
    show("Several over one", ["", ""], twice)
    show("Where the node's time goes", ["", "worker-seconds", "share"], shares(told, workers))
    whole = sum(took for name, took in apart.items() if not name.startswith("–"))
    show(
        f"One shard of {shard_size}, alone", ["", "seconds", "share"],
        [[name, f"{took:.3f}", f"{took / whole:.4f}"] for name, took in apart.items()],
    )  # fmt: skip


def shares(told: list[dict[str, float]], workers: int) -> list[list[str]]:
    """Each step's share of workers × the node's seconds, in the median round; the second line is the busy share."""
    whole = [each["node"] * workers for each in told]
    steps = {
        "read and decode": [each["read"] for each in told],
        "attack, round and measure: workers are busy": [each["work"] for each in told],
        "encode, verify and commit": [each["commit"] for each in told],
    }
    rest = [all_of - sum(each) for all_of, *each in zip(whole, *steps.values(), strict=True)]
    steps["start of workers, waiting, bookkeeping"] = rest
    return [[name, f"{median(taken):.1f}", f"{over(taken, whole):.3f}"] for name, taken in steps.items()]


if __name__ == "__main__":
    main()
