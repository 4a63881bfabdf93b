"""What the benchmarks share: things timed in turns, and what their times say; images; the machine."""

import gc
import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import click
import numpy as np
import torch

from pipeline.cost.trial import device
from pipeline.report import tables
from stages import load
from stages.images import decode
from stages.recipes import Torchvision
from stages.shard import Shard

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}

CIFAR10 = "cifar-10-batches-py"
"""The folder that CIFAR-10 comes in."""


def machine(*packages: str) -> str:
    """Versions of Python and of these packages, and what computes here, in one line."""
    versions, found = [f"{name} {importlib.metadata.version(name)}" for name in packages], device()
    computes = f"{found.count} × {found.name}" if found.gpu else f"{found.name}, {found.count} cores"
    return ", ".join([*versions, f"Python {platform.python_version()}", computes])


def highest(process: int | str = "self") -> float:
    """The most memory that a process has had so far, MiB (Linux). `getrusage` would count what it was forked from."""
    status = Path(f"/proc/{process}/status").read_text()
    return float(status.partition("VmHWM:")[2].split()[0]) / 2**10 if "VmHWM:" in status else 0.0


def on_shards(command: Callable[..., None]) -> Callable[..., None]:
    """The options of a benchmark on shards of images: which, how many, how large, how often."""
    for option in reversed((
        click.option("--side", default=32, show_default=True, help="Height and width of an image, in pixels."),
        click.option(
            "--data", type=click.Path(path_type=Path, exists=True, file_okay=False),
            help="Holds cifar-10-batches-py (32 pixels) or photographs; else the images are noise.",
        ),
        click.option("--images", "count", default=4000, show_default=True),
        click.option("--shard-size", default=1000, show_default=True, help="Images per shard."),
        click.option("--rounds", default=3, show_default=True),
    )):  # fmt: skip
        command = option(command)
    return command


@contextmanager
def stopwatch() -> Iterator[list[float]]:
    """Seconds of what happens inside, appended to what is given; a GPU has then done what it was told."""
    seconds: list[float] = []
    gc.collect()
    started = time.perf_counter()
    yield seconds
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - started)


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds that some work takes."""
    with stopwatch() as seconds:
        work()
    return seconds[0]


def in_turns(contestants: Mapping[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Every contestant once in every round, every other round in reverse order: a machine that slows, slows all.

    Args:
        contestants: name → the number of the round → what was measured.
        rounds: how many; what has to be warmed up was warmed up before.

    Returns:
        Name → what was measured in each round.
    """
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name in contestants if number % 2 == 0 else reversed(contestants):
            found[name].append(contestants[name](number))
            click.echo(f"round {number + 1} of {rounds}: {name}", err=True)
    return found


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median, and from the least to the most."""
    return f"{median(values):,.{digits}f} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"


def over(values: Sequence[float], others: Sequence[float]) -> float:
    """How many times the others, by the median over rounds of the ratio within a round."""
    return median(a / b for a, b in zip(values, others, strict=True))


def show(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    click.echo(f"\n{title}\n\n{tables.table(head, lines)}")


# ------------------------------------------------------------------------------------------------ images


def cifar10(data: Path, count: int, split: str = "train") -> Shard:
    """Some of CIFAR-10, drawn at random with seed 0."""
    if not (data / CIFAR10).exists():
        raise click.UsageError(f"--data {data} holds no {CIFAR10}: unpack CIFAR-10 there, or leave --data out")
    recipe = Torchvision(source="cifar10", limit=count, shard_size=count, download=False)
    listing = load.list_source(recipe, data)
    spread_out = load.assign_to_shards(listing, recipe)
    name = next(name for name in spread_out if name.startswith(split))
    return load.read(recipe, name, spread_out[name], listing.channels, listing.suffix)


def photographs(folder: Path, count: int, side: int) -> np.ndarray:
    """The centre of images spread over a folder: uint8, N × side × side × 3."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(files) < count:
        raise click.UsageError(f"{folder} holds {len(files)} images, expected at least {count}: ask for fewer")
    chosen = [files[i * len(files) // count] for i in range(count)]
    return np.stack([decode(path.read_bytes(), 3, resize=side, crop=side) for path in chosen])


def images(data: Path | None, count: int, side: int) -> np.ndarray:
    """CIFAR-10's test split where 32 pixels are asked for, photographs where it is more, noise without a folder.

    Returns:
        uint8, N × side × side × 3.
    """
    if data is None:
        return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return cifar10(data, count, "test").images() if side == 32 else photographs(data, count, side)


def attacked(pixels_NHWC: np.ndarray, eps: float) -> np.ndarray:
    """The images as an attack leaves them, as far as their files go: noise of L2 norm eps added, in 8 bits."""
    noise = np.random.default_rng(0).normal(size=pixels_NHWC.shape)
    noise *= 255 * eps / np.sqrt((noise**2).sum((1, 2, 3), keepdims=True))
    moved: np.ndarray = (pixels_NHWC + noise).round().clip(0, 255).astype(np.uint8)
    return moved
