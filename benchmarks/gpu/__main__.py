"""Check and measure everything on a GPU within a time limit, most important first.

    python -m benchmarks.gpu --data FOLDER --minutes 8 --out FOLDER      # --data holds cifar-10-batches-py
    python -m benchmarks.gpu --tiny --out FOLDER                         # a rehearsal, on a processor: two minutes
    python -m benchmarks.gpu --step loops --minutes 4 --out FOLDER       # one step with all the time

Each step runs in a process of its own, which is ended when its time is over, so that a broken GPU state cannot harm the
next step. It keeps its measurements so far in OUT/STEP.json and prints its tables at its end; OUT/gpu.json has all of
them. Later steps get the time that a step leaves over. Neither Ray nor the network is used.
"""

import contextlib
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import click

from benchmarks.gpu.sheet import Sheet, printed

SHARES = {"device": 15, "correctness": 65, "loops": 125, "determinism": 35, "experiment": 155, "node": 65}
"""Steps in order → their shares of the time."""

MARGIN, GRACE = 5.0, 8.0
"""Seconds reserved for the end of the whole run, and for the end of a step."""


def run(step: str, seconds: float, data: Path | None, out: Path, tiny: bool) -> dict[str, object]:
    """Run one step in a process of its own; returns what it wrote, even if it failed."""
    file = out / f"{step}.json"
    file.unlink(missing_ok=True)
    given = ["--data", str(data)] if data else []
    command = [sys.executable, "-m", "benchmarks.gpu", "--inside", step, "--minutes", str(seconds / 60)]
    process = subprocess.Popen([*command, "--out", str(out), *given, *["--tiny"] * tiny])
    started, why = time.monotonic(), None
    try:
        if process.wait(seconds + GRACE):
            why = f"ended with exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        why = f"was cut off after {seconds + GRACE:.0f} s"
        process.kill()
        process.wait()
    found = json.loads(file.read_text()) if file.exists() else {"tables": [], "said": []}
    return {"step": step, **found, "seconds": round(time.monotonic() - started, 1), "failed": why}


def inside(step: str, sheet: Sheet) -> None:
    """Run the step in its own process."""
    with contextlib.redirect_stdout(sys.stderr):  # output of the commands that a step runs
        importlib.import_module(f"benchmarks.gpu.{step}").measure(sheet)
    sheet.write()


@click.command()
@click.option(
    "--data", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Holds cifar-10-batches-py."
)
@click.option("--minutes", type=float, default=8.0, show_default=True, help="For all steps together.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Where the JSON goes.")
@click.option("--step", "chosen", type=click.Choice(list(SHARES)), multiple=True, help="Only this step; repeatable.")
@click.option("--tiny", is_flag=True, help="Small networks, few images: whether it runs, not how fast.")
@click.option("--inside", type=click.Choice(list(SHARES)), hidden=True)
def main(data: Path | None, minutes: float, out: Path, chosen: tuple[str, ...], tiny: bool, inside: str | None) -> None:
    """Prove and measure everything on a GPU, the most worth first."""
    out.mkdir(parents=True, exist_ok=True)
    if inside is not None:
        return globals()["inside"](inside, Sheet(inside, out, data, tiny, time.monotonic() + 60 * minutes))
    end = time.monotonic() + 60 * minutes - MARGIN
    steps = [step for step in SHARES if step in chosen or not chosen]
    found: list[dict[str, object]] = []
    for at, step in enumerate(steps):
        left = end - time.monotonic() - GRACE
        share = 1.0 if tiny else SHARES[step] / sum(SHARES[later] for later in steps[at:])
        seconds = left * share
        if seconds < 3:
            click.echo(f"\n{step}: no time left")
            continue
        click.echo(f"\n══ {at + 1}. {step}, at most {seconds:.0f} s ══", err=True)
        found.append(run(step, seconds, data, out, tiny))
        click.echo(printed(found[-1]))
        (out / "gpu.json").write_text(json.dumps(found, indent=1, ensure_ascii=False))
    if any(one["failed"] for one in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
