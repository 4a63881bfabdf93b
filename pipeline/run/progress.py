"""The progress of a run as it is printed: a bar per node on a terminal, plain lines elsewhere."""

import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

from pipeline.run.jobs import JOBS
from pipeline.run.runs import Progress
from pipeline.terminal import clock, echo, visible

QUIET = 10.0
"""Seconds between two plain lines about the same node."""


def rate(progress: Progress) -> float | None:
    """Images per second since the node started, in this run."""
    if progress.started is None or not progress.images:
        return None
    return progress.images / max(1e-9, progress.seconds or time.time() - progress.started)


def left(progress: Progress) -> str:
    """Time left, estimated from images/s."""
    speed = rate(progress)
    if not speed or progress.state != "running":
        return ""
    return f"{clock((progress.total_images - progress.images) / speed)} left"


def measured(progress: Progress) -> str:
    """The last loss of a training, and images/s."""
    parts = [f"loss {progress.last['loss']:.3f}"] if "loss" in progress.last else []
    speed = rate(progress)
    return "  ".join([*parts, *([f"{speed:,.0f} images/s"] if speed else [])])


def mixed(progress: Progress) -> str:
    """The devices that a node was made on, if there is more than one kind: each rounds in its own way."""
    each = "; ".join(f"{count} on {kind}" for kind, count in progress.devices.items())
    return f"made on unlike devices, so its bytes are no other run's: {each}" if len(progress.devices) > 1 else ""


class Lines:
    """Plain lines on stderr, for logs."""

    def __init__(self) -> None:
        self.printed: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to restore."""

    def __call__(self, node: str, progress: Progress, event: str) -> None:
        """Print an event, unless a similar one was printed a moment ago."""
        if event in ("committed", "epoch") and time.time() - self.printed.get(node, 0.0) < QUIET:
            return
        self.printed[node] = time.time()
        echo(f"{node}: {visible(self._line(progress, event))}", err=True)

    def _line(self, progress: Progress, event: str) -> str:
        unit = JOBS[progress.stage].counted
        match event:
            case "cached":
                return f"there already ({progress.version})"
            case "started":
                found = f", {progress.found} there already" if progress.found else ""
                return (
                    f"started ({progress.stage}, {progress.total} {unit[:-1] if progress.total == 1 else unit}{found})"
                )
            case "done":
                return "  ".join(
                    filter(None, [f"done in {progress.seconds:.1f} s", measured(progress), mixed(progress)])
                )
            case "failed":
                return f"failed: {progress.why}"
            case "retried":
                return "a step failed and is tried again"
        return f"{progress.done} of {progress.total} {unit}  {measured(progress)}  {left(progress)}".rstrip()


class _Field(ProgressColumn):
    """A field of a task as plain text: no markup, no control characters."""

    def __init__(self, name: str, wraps: bool = False) -> None:
        super().__init__(Column(no_wrap=not wraps))
        self.name = name

    def render(self, task: Task) -> Text:
        """The field, red where the node failed."""
        return Text(visible(task.fields[self.name]), style="red" if task.fields["failed"] else "")


class Live:
    """A bar per node on a terminal."""

    def __init__(self) -> None:
        self.bars = Bars(
            _Field("node"),
            BarColumn(bar_width=16),
            _Field("count"),
            _Field("text", wraps=True),
            console=Console(stderr=True),
        )
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # the terminal was closed
            self.bars.stop()

    def __call__(self, node: str, progress: Progress, event: str) -> None:
        """Move the node's bar."""
        if node not in self.tasks:
            self.tasks[node] = self.bars.add_task("", total=1, node=node, count="", text="", failed=False)
        whole = progress.total or 1
        done = whole if event in ("done", "cached") else progress.done
        text = {
            "cached": "there already",
            "failed": progress.why,
            "done": f"{measured(progress)}  {progress.seconds} s  {mixed(progress)}",
        }
        self.bars.update(
            self.tasks[node],
            total=whole,
            completed=done,
            count=f"{done}/{whole}".rjust(9),
            failed=event == "failed",
            text=text.get(event, f"{measured(progress)}  {left(progress)}"),
        )


def watcher() -> Lines | Live:
    """Bars where stderr is a terminal, else lines."""
    return Live() if sys.stderr.isatty() else Lines()
