"""Images/s of a training with two threads, by how long its threads spin while they wait for each other.

Each measurement is a process of its own, since OpenMP reads the setting once: alone on the machine, and beside one busy
process per core (GNU's OpenMP, thus Linux).

    python -m benchmarks.waiting
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import click
import torch  # before anything that imports `stages`, so that the environment alone decides

from benchmarks.side_by_side import in_turns, machine, over, show, spread
from stages.design import Design
from stages.device import threads
from stages.model import Classifier, on_device

SETTINGS = {"OpenMP's default": {}, "3,000 rounds": {"GOMP_SPINCOUNT": "3000"}, "none": {"OMP_WAIT_POLICY": "PASSIVE"}}
"""How long threads spin → environment. The second is what `stages` sets."""

THREADS, BATCH = 2, 32


@click.command(help=__doc__)
@click.option("--arch", default="fast_resnet", show_default=True)
@click.option("--seconds", default=5.0, show_default=True, help="Of each measurement, at least one step.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--only-measure", is_flag=True, hidden=True)
def main(arch: str, seconds: float, rounds: int, only_measure: bool) -> None:
    if only_measure:
        click.echo(measured(arch, seconds))
        return
    click.echo(f"{machine('torch')}; {arch}, batch {BATCH}, 32 pixels, float32, {THREADS} threads")
    for title, neighbours in (("alone", 0), ("beside a busy process per core", os.cpu_count() or 1)):
        with busy(neighbours):
            found = in_turns({name: partial(in_a_process, arch, seconds, name) for name in SETTINGS}, rounds)
        default = found[next(iter(SETTINGS))]
        lines = [[name, spread(rates, 0), f"{over(rates, default):.2f}"] for name, rates in found.items()]
        show(title, ["threads spin", "images/s", "over the default"], lines)


def in_a_process(arch: str, seconds: float, name: str, number: int) -> float:
    """Images/s in a fresh process with one of the settings."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("GOMP_", "OMP_"))}
    command = [sys.executable, "-m", "benchmarks.waiting", "--only-measure", f"--arch={arch}", f"--seconds={seconds}"]
    ran = subprocess.run(command, env=inherited | SETTINGS[name], check=True, capture_output=True, text=True)
    return float(ran.stdout)


def measured(arch: str, seconds: float) -> float:
    """Images/s of training steps on noise, after one to warm up."""
    model = on_device(Classifier(Design(arch, 10, (3, 32, 32), (0.5,) * 3, (0.25,) * 3), Path.cwd())).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    images, labels = torch.rand(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    with threads(THREADS):
        step()
        steps, started = 0, time.perf_counter()
        while not steps or time.perf_counter() - started < seconds:
            step()
            steps += 1
        return steps * BATCH / (time.perf_counter() - started)


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Processes that compute, at the priority of this one."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
