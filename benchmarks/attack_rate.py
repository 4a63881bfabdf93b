"""How fast images are attacked on this machine: image·steps/s of the loop that makes datasets, and bytes per image.

One image·step is a forward and a backward pass of one image through the attacked network, and a step. The
rate times the price of the machine is what a dataset costs (docs/cluster.md). The weights are random:
speed does not depend on them. Random images do; with `--images` the sizes of the PNGs are printed too.

    python benchmarks/attack_rate.py --arch resnet50                            # this machine's GPU, or one core
    python benchmarks/attack_rate.py --arch resnet50 --images FOLDER --eps 3    # photographs, any depth of folders
"""

import os
import platform
import time
from pathlib import Path

import click
import numpy as np
import torch

from stages import images as codec
from stages.attack import perturb, targeted
from stages.model import Classifier, Design, device, on_device, threads
from stages.recipes import Perturbation

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def photographs(folder: Path | None, count: int, side: int) -> np.ndarray:
    """uint8, N × side × side × 3: the centre of images spread over a folder, or noise."""
    if folder is None:
        return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(files) < count:
        raise click.UsageError(
            f"{folder} holds {len(files)} images, expected at least {count}: lower --batch or --batches"
        )
    spread = [files[i * len(files) // count] for i in range(count)]
    return np.stack([codec.decode(path.read_bytes(), 3, resize=side, crop=side) for path in spread])


def processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


@click.command()
@click.option("--arch", default="resnet50", show_default=True, help="As in an experiment file.")
@click.option("--side", default=224, show_default=True, help="Height and width of an image, in pixels.")
@click.option("--classes", default=1000, show_default=True)
@click.option("--batch", default=128, show_default=True, help="Images attacked together.")
@click.option("--batches", default=1, show_default=True, help="Timed, after one that is not.")
@click.option("--steps", default=20, show_default=True)
@click.option("--eps", default=3.0, show_default=True, help="Radius of the L2 ball, in pixel units of [0, 1].")
@click.option("--precision", type=click.Choice(["float32", "bfloat16"]), default="bfloat16", show_default=True)
@click.option("--cores", default=1, show_default=True, help="Threads; a worker of a run has one.")
@click.option(
    "--images", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Attack these, not noise."
)
def main(
    arch: str,
    side: int,
    classes: int,
    batch: int,
    batches: int,
    steps: int,
    eps: float,
    precision: str,
    cores: int,
    images: Path | None,
) -> None:
    """Measure the attack alone: images in memory, one process."""
    design = Design(arch, classes, (3, side, side), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.manual_seed(0)
    model = on_device(Classifier(design, Path.cwd())).eval().requires_grad_(False).using(precision)
    ball = Perturbation(eps=eps, steps=steps, precision=precision, batch_size=batch)
    clean = photographs(images, batch * batches, side)
    wanted = torch.arange(batch) % classes

    def attack(pixels: np.ndarray, asked: Perturbation) -> np.ndarray:
        return perturb(pixels, asked, targeted(model, wanted.to(device())), device())

    with threads(cores):
        attack(clean[:batch], ball.model_copy(update={"steps": 1}))  # kernels are chosen and memory is taken once
        started = time.perf_counter()
        moved = [attack(clean[first : first + batch], ball) for first in range(0, len(clean), batch)]
        seconds = time.perf_counter() - started

    rate = len(clean) * steps / seconds
    click.echo(f"{arch}, {side} × {side} px, L2 eps {eps:g}, {steps} steps, batches of {batch}, {precision}")
    where = "" if torch.cuda.is_available() else f", {cores} of {os.cpu_count()} cores"
    click.echo(f"torch {torch.__version__}, {processor()}{where}")
    click.echo(f"{len(clean)} images in {seconds:.1f} s: {rate:.2f} image·steps/s")
    if images is not None:
        for what, pixels in (("clean", clean), ("attacked", np.concatenate(moved))):
            size = np.mean([len(codec.encode_png(one)) for one in pixels])
            click.echo(f"PNG, {what}: {size:,.0f} bytes per image")


if __name__ == "__main__":
    main()
