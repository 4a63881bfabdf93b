"""Early stopping per image (`stop_at_margin`): the time that it saves in an attack, and its effect on the result.

A network is trained briefly on CIFAR-10. One shard of other images is attacked toward other classes without
`stop_at_margin` and with several margins, in turns. The results are measured on the saved images, by the unfolded
network in float32, as for a dataset.

    python -m benchmarks.stop_at_margin --data FOLDER    # FOLDER/cifar-10-batches-py
"""

import os
from pathlib import Path
from statistics import median

import click
import numpy as np

from benchmarks.attack import network
from benchmarks.side_by_side import cifar10, in_turns, machine, over, seconds_of, show, spread
from stages.attack import Attacker
from stages.recipes import Attack, Relabel, Train
from stages.shard import Shard


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--arch", default="fast_resnet", show_default=True, help="As in an experiment file.")
@click.option("--train", "taught", default=10_000, show_default=True, help="Images of CIFAR-10 to train on.")
@click.option("--epochs", default=6, show_default=True, help="Of that training.")
@click.option("--images", default=500, show_default=True, help="Of the shard.")
@click.option("--batch", default=50, show_default=True, help="Images attacked together.")
@click.option("--steps", default=50, show_default=True)
@click.option("--eps", default=0.5, show_default=True, help="Radius of the L2 ball in [0, 1] units.")
@click.option(
    "--stop-at-margin", "margins", type=float, multiple=True, default=(0.0, 2.0, 5.0, 10.0), show_default=True
)
@click.option("--precision", type=click.Choice(["float32", "bfloat16"]), default="bfloat16", show_default=True)
@click.option("--rounds", default=3, show_default=True)
def main(
    data: Path,
    arch: str,
    taught: int,
    epochs: int,
    images: int,
    batch: int,
    steps: int,
    eps: float,
    margins: tuple[float, ...],
    precision: str,
    rounds: int,
) -> None:
    """Measure attacks with and without early stopping per image."""
    lesson = Train(
        on="cifar10", arch=arch, epochs=epochs, eval_images=taught, precision="bfloat16", threads=os.cpu_count()
    )
    model, shard = network(arch, None, 32, 10, data, lesson), cifar10(data, images, "test")
    classes = [str(k) for k in range(10)]
    asked = {"images": "", "model": "", "eps": eps, "steps": steps, "batch_size": batch, "precision": precision}
    attackers = {
        margin: Attacker(Attack(**asked, stop_at_margin=margin), Relabel(rule="other"), classes, model)
        for margin in (None, *margins)
    }
    moved: dict[float | None, Shard] = {}

    def turn(margin: float | None) -> float:
        return seconds_of(lambda: moved.update({margin: attackers[margin](shard)}))

    names = {margin: "never" if margin is None else f"{margin:g}" for margin in attackers}
    seconds = in_turns({names[f]: lambda _, margin=f: turn(margin) for f in attackers}, rounds)
    lines = []
    for margin, name in names.items():
        effect, taken = moved[margin].attack, seconds[name]
        lines.append([
            name, spread([images / each for each in taken]), f"{over(seconds['never'], taken):.2f}",
            f"{100 * effect['success'].mean():.1f}", f"{effect['margin'].mean():.2f}",
            f"{median(effect['margin'].tolist()):.2f}", f"{effect['l2'].mean():.3f}",
        ])  # fmt: skip
    click.echo(f"{arch}, CIFAR-10, {images} images in one shard, batches of {batch}, L2 eps {eps:g}, {steps} steps")
    click.echo(f"{precision}, 1 thread; {machine('torch')}")
    head = [
        "frozen at a margin of",
        "images/s",
        "times as fast",
        "attack success %",
        "mean margin",
        "median",
        "mean L2",
    ]
    show("Frozen images", head, lines)
    late = np.mean(moved[None].attack["success_step"][moved[None].attack["success"]])
    click.echo(f"\nreached first after {late:.1f} steps on average, where it was")


if __name__ == "__main__":
    main()
