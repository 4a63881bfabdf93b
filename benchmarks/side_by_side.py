"""Shared by the benchmarks: timing in turns, statistics of times, images, the machine."""

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
"""Folder in CIFAR-10's archive."""


def machine(*packages: str) -> str:
    """Versions of Python and of these packages, and the device, as one line."""
    versions, found = [f"{name} {importlib.metadata.version(name)}" for name in packages], device()
    computes = f"{found.count} × {found.name}" if found.gpu else f"{found.name}, {found.count} cores"
    return ", ".join([*versions, f"Python {platform.python_version()}", computes])


def highest(process: int | str = "self") -> float:
    """Peak memory of a process so far, in MiB (Linux). `getrusage` would include its parent before the fork."""
    status = Path(f"/proc/{process}/status").read_text()
    return float(status.partition("VmHWM:")[2].split()[0]) / 2**10 if "VmHWM:" in status else 0.0


def on_shards(command: Callable[..., None]) -> Callable[..., None]:
    """Options of a benchmark on shards of images: source, number, size, rounds."""
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
    """Append the seconds of the block to the yielded list, after the GPU has finished its work."""
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
    """Run every contestant once per round, in reverse order in every other round, so that drift affects all alike.

    Args:
        contestants: name → function of the round's number that returns a measurement.
        rounds: number of rounds; warm up before.

    Returns:
        Name → measurement of each round.
    """
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name in contestants if number % 2 == 0 else reversed(contestants):
            found[name].append(contestants[name](number))
            click.echo(f"round {number + 1} of {rounds}: {name}", err=True)
    return found


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median and range."""
    return f"{median(values):,.{digits}f} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"


def over(values: Sequence[float], others: Sequence[float]) -> float:
    """Median over rounds of the ratio to the others."""
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
    """CIFAR-10's test split for 32 pixels, photographs for more, noise without a folder.

    Returns:
        uint8, N × side × side × 3.
    """
    if data is None:
        return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return cifar10(data, count, "test").images() if side == 32 else photographs(data, count, side)


def attacked(pixels_NHWC: np.ndarray, eps: float) -> np.ndarray:
    """Images that compress as attacked ones do: with noise of L2 norm eps, in 8 bits."""
    noise = np.random.default_rng(0).normal(size=pixels_NHWC.shape)
    noise *= 255 * eps / np.sqrt((noise**2).sum((1, 2, 3), keepdims=True))
    moved: np.ndarray = (pixels_NHWC + noise).round().clip(0, 255).astype(np.uint8)
    return moved
