"""Accuracy of `notbugs plan --cost`: estimated and measured seconds of each node, on CIFAR-10.

The estimate comes first. Then the nodes are made one after the other, on the same machine with the same workers, since
a node's estimate is its time alone.

    python -m benchmarks.prediction --data FOLDER                              # the folder with cifar-10-batches-py
    python -m benchmarks.prediction --data FOLDER --images 1000 --steps 5      # a smoke test
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.side_by_side import machine, show
from pipeline.cost import estimate
from pipeline.experiment.graph import build
from pipeline.experiment.spec import parse
from pipeline.run import runs
from pipeline.run.jobs import Context
from pipeline.run.on_ray import OnRay
from pipeline.run.preflight import preflight
from pipeline.store import Store


def experiment(images: int, steps: int, epochs: int, arch: str, precision: str, shard_size: int) -> Any:
    """An experiment with one node of every expensive kind."""
    attack = {"images": "clean", "model": "standard", "eps": 0.5, "step_size": 0.1, "steps": steps}
    train = {"arch": arch, "epochs": epochs, "lr": 0.05, "precision": precision, "threads": 1}
    scored = {"norm": "l2", "eps": 0.25, "steps": steps, "precision": precision}
    load = {"source": "cifar10", "limit": images, "shard_size": shard_size, "download": False}
    return parse(
        {
            "name": "prediction",
            "datasets": {
                "clean": {"load": load},
                "other": {"attack": attack | {"precision": precision}, "relabel": "other"},
                "control": {"attack": {"images": "clean", "method": "none"}, "relabel": "other"},
                "inverted": {
                    "invert": {"images": "clean", "model": "standard", "steps": steps, "precision": precision}
                },
            },
            "models": {
                "standard": {"train": train | {"on": "clean"}},
                "from_other": {"train": train | {"on": "other"}},
                "robust": {"train": train | {"on": "clean", "epochs": 1, "adversarial": {"eps": 0.5, "steps": 3}}},
            },
            "evaluations": {
                "accuracy": {"models": ["standard", "from_other"], "on": "clean"},
                "robustness": {"models": ["standard", "robust"], "on": "clean", "attacks": [scored]},
            },
        }
    )


def predicted(wanted: Any, place: Context, workers: int | None) -> estimate.Estimate:
    """The plan's estimate."""
    statuses = preflight(build(wanted), place, fetch=False)
    return estimate.estimate(statuses, place, workers, lambda what: click.echo(f"trying: {what}", err=True))


def true(wanted: Any, place: Context, workers: int | None) -> dict[str, float]:
    """Seconds to make each node alone."""
    engine, seconds = OnRay(workers=workers), dict[str, float]()
    for node in build(wanted):
        click.echo(f"making: {node.id}", err=True)
        run = runs.Run(wanted, place, only=(node.id,))
        assert run.go(engine), run.record.nodes
        seconds[node.id] = run.record.nodes[node.id].seconds or 0.0
    engine.close()
    return seconds


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True, help="Holds cifar-10-batches-py.")
@click.option("--images", default=10_000, show_default=True, help="Of each split.")
@click.option("--steps", default=20, show_default=True, help="Of attack, inversion and evaluation.")
@click.option("--epochs", default=3, show_default=True)
@click.option("--arch", default="fast_resnet", show_default=True)
@click.option("--precision", type=click.Choice(["float32", "bfloat16"]), default="bfloat16", show_default=True)
@click.option("--shard-size", default=500, show_default=True)
@click.option("--workers", type=int, help="As for run.")
def main(data: Path, workers: int | None, **asked: Any) -> None:
    """Predict, make, compare."""
    wanted = experiment(**asked)
    with tempfile.TemporaryDirectory() as folder:
        place = Context(Store(folder), data.absolute(), Path.cwd())
        started = time.perf_counter()
        estimated = predicted(wanted, place, workers)
        took = time.perf_counter() - started
        seconds = true(wanted, place, workers)
    foretold = {name: each.wall(estimated.site) for name, each in estimated.nodes.items()}
    lines = [[name, f"{foretold[name]:.1f}", f"{seconds[name]:.1f}", f"{foretold[name] / seconds[name]:.2f}"]
             for name in foretold]  # fmt: skip
    sums = sum(foretold.values()), sum(seconds.values())
    lines.append(["all, one after the other", *(f"{total:.1f}" for total in sums), f"{sums[0] / sums[1]:.2f}"])
    click.echo(", ".join(f"{name} {value}" for name, value in asked.items()))
    click.echo(machine("torch", "ray"))
    click.echo(f"{estimated.site.devices} workers, each with {estimated.device}; the prediction took {took:.0f} s")
    show("Prediction and truth", ["node", "predicted s", "true s", "predicted ÷ true"], lines)


if __name__ == "__main__":
    main()
