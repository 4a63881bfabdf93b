"""The progress of a run as it is printed: on a terminal the whole run and the nodes at work, elsewhere plain lines."""

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live as Block
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline import terminal
from pipeline.run.jobs import JOBS
from pipeline.run.outlook import Left, Outlook
from pipeline.run.pace import Pace
from pipeline.run.preflight import NodeStatus
from pipeline.run.runs import Progress
from pipeline.terminal import clock, duration, echo, visible

QUIET = 10.0
"""Seconds between two plain lines about the same node."""

BAR, BAR_FROM = 12, 72
"""Characters of a bar, and of the narrowest terminal that has room for one."""


def rate(progress: Progress, pace: Pace | None = None) -> float | None:
    """Images per second of a node that is done, or of one at work: of a training, in its last epoch."""
    if not progress.images:
        return None
    if pace is None:
        return None if progress.seconds is None else progress.images / max(1e-9, progress.seconds)
    return float(progress.last.get("images_per_second") or pace.rate)  # a first epoch includes the start of its worker


def seconds_left(progress: Progress, pace: Pace | None) -> float | None:
    """Time left of a node at work, estimated from its images/s; None before its first shard or epoch is done."""
    if pace is None or progress.state != "running" or not (speed := rate(progress, pace)):
        return None
    return max(0.0, (progress.total_images - progress.images) / speed - (time.time() - pace.last[0]))


def measured(progress: Progress, pace: Pace | None = None) -> list[str]:
    """The last loss of a training, and images/s."""
    loss = [f"loss {progress.last['loss']:.3f}"] if "loss" in progress.last else []
    speed = rate(progress, pace)
    return [*loss, *([f"{speed:,.0f} images/s"] if speed else [])]


def mixed(progress: Progress) -> str:
    """The devices that a node was made on, if there is more than one kind: each rounds in its own way."""
    each = "; ".join(f"{count} on {kind}" for kind, count in progress.devices.items())
    return f"made on unlike devices, so its bytes are no other run's: {each}" if len(progress.devices) > 1 else ""


def sources_to_attack(statuses: Sequence[NodeStatus]) -> dict[str, float]:
    """The models that datasets still to be made are attacked or inverted with: id → chance accuracy."""
    known = {status.node.id: status for status in statuses}
    made = [status.node.inputs for status in statuses if status.to_make and status.node.group == "datasets"]
    attacked = {inputs["model"].id for inputs in made if "model" in inputs}
    return {model: 1 / known[model].facts["design"]["classes"] for model in attacked}


def weak(progress: Progress, chance: float) -> str:
    """A warning where a source model is less than halfway from chance to all test images of its last epoch."""
    share = progress.last.get("test_accuracy")
    if share is None or share >= (1 + chance) / 2:
        return ""
    return (
        f"classifies only {100 * share:.1f} % of the test images, so perturbations from it will carry few features: "
        "stop with Ctrl-C and train it longer, unless this is meant"
    )


def fitted(pieces: Sequence[tuple[int, str]], width: int) -> str:
    """Pieces of a line in their order, without the least important ones where all of them are too wide.

    Args:
        pieces: importance, 0 for the most important, and text; an empty text is left out.
        width: of a terminal, in cells.
    """
    kept = [(rank, visible(text)) for rank, text in pieces if text]
    while len(kept) > 1 and cell_len("  ".join(text for _, text in kept)) > width:
        kept.remove(max(kept, key=lambda piece: piece[0]))
    return "  ".join(text for _, text in kept)


class Display(ABC):
    """What is known of a run from its events.

    Args:
        statuses: what `preflight` found.

    Attributes:
        at_work: node → its progress, from its first shard or epoch to its end.
        queued: nodes that wait for a worker.
        paces: node → when its shards or epochs ended.
        ended: nodes that are there, and of these `cached`, that were there before.
        failed: nodes that could not be made.
        sources: source model → chance accuracy, of those that the run attacks.
    """

    def __init__(self, statuses: Sequence[NodeStatus] = ()) -> None:
        self.total, self.outlook, self.began, self.worked = len(statuses), Outlook(statuses), time.time(), 0.0
        self.sources = sources_to_attack(statuses)
        self.at_work: dict[str, Progress] = {}
        self.queued: set[str] = set()
        self.paces: dict[str, Pace] = {}
        self.ended: set[str] = set()
        self.cached: set[str] = set()
        self.failed: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Answer to Ctrl-C before anything else is ended."""
        if isinstance(error, KeyboardInterrupt):
            terminal.say_interrupted()

    def __call__(self, node: str, progress: Progress, event: str) -> None:
        """Take note of an event of a node, and show it."""
        match event:
            case "started" if progress.state == "queued":
                self.queued.add(node)
            case "started" | "began":
                self.queued.discard(node)
                self.at_work[node] = progress
            case "committed" | "epoch":
                now = time.time()
                self.paces.setdefault(node, Pace(progress.started or now)).ended(now, progress.images)
            case "done" | "cached" | "failed":
                self._end(node, progress, event)
        self.show(node, progress, event)

    def _end(self, node: str, progress: Progress, event: str) -> None:
        self.queued.discard(node)
        self.at_work.pop(node, None)
        if event == "failed":
            self.failed.add(node)
            return
        self.ended.add(node)
        if event == "cached":
            self.cached.add(node)
        elif progress.seconds is not None:
            self.worked += progress.seconds
            self.outlook.ran(node, progress.seconds)

    def warnings(self, node: str, progress: Progress) -> list[str]:
        """What is wrong with a node that was just made."""
        poor = weak(progress, self.sources[node]) if node in self.sources else ""
        return [text for text in (mixed(progress), poor) if text]

    @abstractmethod
    def show(self, node: str, progress: Progress, event: str) -> None:
        """Show an event."""

    def left(self) -> Left | None:
        """Time left of the whole run."""
        now, rest, spent = time.time(), dict[str, float | None](), self.worked
        for node, progress in list(self.at_work.items()):
            since = now - (progress.started or now)
            spent += since
            rest[node] = seconds_left(progress, self.paces.get(node))
            if rest[node] is None and (expected := self.outlook.expected(node)) is not None:
                rest[node] = max(0.0, expected - since)
        return self.outlook.left(self.ended, self.failed, rest, spent / max(1e-9, now - self.began))


class Lines(Display):
    """Plain lines on stderr, for logs."""

    def __init__(self, statuses: Sequence[NodeStatus] = ()) -> None:
        super().__init__(statuses)
        self.printed: dict[str, float] = {}

    def show(self, node: str, progress: Progress, event: str) -> None:
        """Print an event, unless a similar one was printed a moment ago."""
        often = event in ("committed", "epoch")
        if (node in self.queued and event != "waits") or (often and time.time() - self.printed.get(node, 0.0) < QUIET):
            return
        self.printed[node] = time.time()
        echo(f"{node}: {visible(self._line(node, progress, event))}", err=True)

    def _line(self, node: str, progress: Progress, event: str) -> str:
        unit = JOBS[progress.stage].counted
        match event:
            case "cached":
                return f"there already ({progress.version})"
            case "started" | "began":
                found = f", {progress.found} there already" if progress.found else ""
                return (
                    f"started ({progress.stage}, {progress.total} {unit[:-1] if progress.total == 1 else unit}{found})"
                )
            case "done":
                said = [f"done in {duration(progress.seconds)}", *measured(progress), *self.warnings(node, progress)]
                return "  ".join(said)
            case "failed":
                return f"failed: {progress.why}"
            case "retried":
                return "a step failed and is tried again"
            case "waits":
                return f"waits for a worker, {clock(time.time() - (progress.started or time.time()))} so far"
        pace = self.paces.get(node)
        left = seconds_left(progress, pace)
        parts = [f"{progress.done} of {progress.total} {unit}", *measured(progress, pace)]
        return "  ".join([*parts, *([f"{clock(left)} left"] if left is not None else [])])


class Live(Display):
    """A block at the foot of a terminal: the whole run, and the nodes at work; above it a line for each that ended."""

    def __init__(self, statuses: Sequence[NodeStatus] = ()) -> None:
        super().__init__(statuses)
        self.console = Console(stderr=True)
        self.longest = max([cell_len(status.node.id) for status in statuses], default=0)
        self.block = Block(get_renderable=self._drawn, console=self.console, transient=True, refresh_per_second=2)

    def __enter__(self) -> Self:
        self.block.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # the terminal was closed
            self.block.stop()
            if error is None:
                self.console.print(Text(fitted(self._whole(over=True), self.console.width)), soft_wrap=True)
        super().__exit__(kind, error, trace)

    def show(self, node: str, progress: Progress, event: str) -> None:
        """Print a line for a node that ended; the block shows the rest."""
        if event == "failed":
            self.console.print(Text(f"{node}  failed: {visible(str(progress.why))}", style="red"))
        elif event == "done":
            spent = duration(progress.seconds)
            pieces = [(0, node.ljust(self._names())), (1, "done"), (2, spent.rjust(8))]
            line = fitted([*pieces, *((3, text) for text in reversed(measured(progress)))], self.console.width)
            self.console.print(Text(line, no_wrap=True, overflow="ellipsis"))
            for warning in self.warnings(node, progress):
                self.console.print(Text(f"{node}  {visible(warning)}", style="yellow"))

    def _names(self) -> int:
        """Width of the column of names: at most two fifths of the terminal."""
        return max(12, min(self.longest, self.console.width * 2 // 5))

    def _whole(self, over: bool = False) -> list[tuple[int, str]]:
        """The whole run, in pieces; `over` if it has ended."""
        left, spent = None if over else self.left(), clock(time.time() - self.began)
        waiting = self.total - len(self.ended) - len(self.failed) - len(self.at_work) - len(self.queued)
        return [
            (0, f"{len(self.ended)} of {self.total} nodes done"),
            (2, f"{len(self.failed)} failed" if self.failed else ""),
            (5, f"{len(self.cached)} already there" if self.cached else ""),
            (4, f"{len(self.queued)} queued" if self.queued else ""),
            (3, f"{waiting} waiting" if waiting > 0 else ""),
            (6, f"in {spent}" if over else f"{spent} so far"),
            (1, f"{'over ' * left.least}{clock(left.seconds)} left" if left and left.seconds >= 1 else ""),
        ]

    def _drawn(self) -> Table:
        width, names = self.console.width, self._names()
        bar = BAR if width >= BAR_FROM else 0
        room = width - names - 2 - (bar + 2 if bar else 0)
        block = Table.grid(padding=(0, 2, 0, 0))
        block.add_column(no_wrap=True, overflow="ellipsis", width=names)
        if bar:
            block.add_column(width=bar)
        block.add_column(no_wrap=True, overflow="ellipsis", width=room)
        (_, done), *rest = self._whole()
        drawn = [ProgressBar(max(1, self.total), len(self.ended), bar)] if bar else []
        block.add_row(Text(done, style="bold"), *drawn, Text(fitted(rest, room)))
        at_work = list(self.at_work.items())
        most = max(1, self.console.height - 3)
        for node, progress in at_work[:most]:
            drawn = [ProgressBar(max(1, progress.total), progress.done, bar)] if bar else []
            block.add_row(Text(visible(node)), *drawn, Text(fitted(self._of_node(node, progress), room)))
        if len(at_work) > most:
            block.add_row(Text(f"and {len(at_work) - most} more"))
        return block

    def _of_node(self, node: str, progress: Progress) -> list[tuple[int, str]]:
        """A node at work, in pieces."""
        pace = self.paces.get(node)
        left = seconds_left(progress, pace)
        loss_and_rate = measured(progress, pace)
        return [
            (0, f"{progress.done}/{progress.total} {JOBS[progress.stage].counted}"),
            *((3 - number, text) for number, text in enumerate(reversed(loss_and_rate))),
            (1, f"{clock(left)} left" if left is not None else ""),
        ]


def watcher(statuses: Sequence[NodeStatus]) -> Lines | Live:
    """The display for where stderr goes: a block at the foot of a terminal, else lines."""
    return Live(statuses) if sys.stderr.isatty() else Lines(statuses)
