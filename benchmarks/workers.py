"""Do one worker and several give the same learning curve? Mean ± standard deviation over seeds, epoch by epoch.

The same recipe is trained with 1 worker and with more, on one machine, and each model is scored on the untouched test
split.

    python -m benchmarks.workers                            # the standard model of configs/digits.yaml
    python -m benchmarks.workers --data FOLDER --seeds 1    # that of configs/cifar10.yaml, on part of CIFAR-10
"""

import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import ray

from benchmarks.side_by_side import machine
from pipeline.experiment import spec
from pipeline.experiment.graph import build
from pipeline.report import tables
from pipeline.run import ddp
from pipeline.run.engines import Inline
from pipeline.run.jobs import JOBS, Context, ModelJob, ShardJob
from pipeline.store import Store

ROOT = Path(__file__).resolve().parent.parent


def experiment(images: int | None, epochs: int | None, seeds: int, workers: tuple[int, ...]) -> Any:
    """One model per number of workers and seed; on CIFAR-10 if `images` is given."""
    file = "digits.yaml" if images is None else "cifar10.yaml"
    found = spec.read(ROOT / "configs" / file)
    # In a file with seeds, `standard@seed=0`.
    standard = next(entry.train for name, entry in found.models.items() if name.partition("@")[0] == "standard")
    assert standard is not None
    load = found.datasets["clean"].load.model_dump()  # type: ignore[union-attr]
    recipe = standard.model_dump() | {"epochs": epochs or standard.epochs}
    models = {
        f"w{count}_s{seed}": {"train": recipe | {"seed": seed, "workers": count}}
        for count in workers
        for seed in range(seeds)
    }
    return spec.parse(
        {
            "name": "workers",
            "datasets": {"clean": {"load": load | ({"limit": images, "download": False} if images else {})}},
            "models": models,
            "evaluations": {"test": {"models": list(models), "on": "clean"}},
        }
    )


def run(planned: Any, place: Context, gpu: bool) -> tuple[dict[str, list[dict[str, Any]]], dict[str, float]]:
    """Make every node; metrics of each epoch of each model, and each model's accuracy on the test split."""
    made, curves, scores = dict[str, Any](), dict[str, list[dict[str, Any]]](), dict[str, float]()
    for node in build(planned):
        job = JOBS[node.stage](node, place, {role: made[parent.id] for role, parent in node.inputs.items()})
        if isinstance(job, ShardJob):
            marks = dict[str, Any]()
            lost = Inline().shards(job, job.units(), lambda _, mark, to=marks: to.update({mark["name"]: mark}))
            assert not lost, lost
            made[node.id] = job.finish(marks)
        else:
            *curves[node.name], last = trained(job, gpu)
            made[node.id] = type(made["datasets/clean"])(node.folder, last["manifest"])
            print(node.name, curves[node.name][-1], file=sys.stderr)
    for row in place.store.find_json(f"{made['evaluations/test'].folder}/result.json")["rows"]:
        scores[row["model"]] = row["accuracy"]
    return curves, scores


def trained(job: ModelJob, gpu: bool) -> Iterator[dict[str, Any]]:
    """The metrics of a training, in this process or from a group of workers."""
    if job.workers == 1:
        yield from job.steps()
        return
    task = ray.remote(ddp.steps).options(num_returns="streaming", max_retries=0, num_cpus=0)
    for said in task.remote(job, gpu):
        yield ray.get(said)


def spread(values: list[float], digits: int, unit: float = 1) -> str:
    """Mean ± standard deviation."""
    mean, deviation = statistics.mean(values) * unit, statistics.stdev(values) * unit if len(values) > 1 else 0.0
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


@click.command()
@click.option("--workers", default=2, show_default=True, help="Held against one.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--epochs", type=int, help="[default: the configuration's]")
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="Train on CIFAR-10, which lies here.")
@click.option("--images", default=10_000, show_default=True, help="Of CIFAR-10.")
def main(workers: int, seeds: int, epochs: int | None, data: Path | None, images: int) -> None:
    counts = (1, workers)
    planned = experiment(images if data else None, epochs, seeds, counts)
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    gpu = ray.cluster_resources().get("GPU", 0) >= workers
    with tempfile.TemporaryDirectory() as folder:
        curves, scores = run(planned, Context(Store(folder), data or Path(), ROOT), gpu)
    ray.shutdown()
    of = {count: [f"w{count}_s{seed}" for seed in range(seeds)] for count in counts}
    lines = [
        [str(epoch + 1)]
        + [spread([curves[m][epoch]["loss"] for m in of[c]], 4) for c in counts]
        + [spread([curves[m][epoch]["accuracy"] for m in of[c]], 2, 100) for c in counts]
        for epoch in range(len(curves[of[1][0]]))
    ]
    head = ["epoch", *(f"loss, {c} w" for c in counts), *(f"accuracy %, {c} w" for c in counts)]
    print(f"{machine('torch', 'ray')}, trained on {'GPUs' if gpu else 'processors'}")
    print(f"seeds 0–{seeds - 1}, mean ± standard deviation\n")
    print(tables.table(head, lines), "\n")
    score = [[str(c), spread([scores[m] for m in of[c]], 2, 100)] for c in counts]
    print(tables.table(["workers", "clean test accuracy %"], score))


if __name__ == "__main__":
    main()
