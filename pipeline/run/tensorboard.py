"""Learning curves and rates as TensorBoard event files, beside the progress that is printed."""

import math
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.run.progress import Lines, Live, rate
from pipeline.run.runs import Progress
from stages.errors import BadInput

FLUSHED = 10
"""Seconds after which values are in the file."""


class Events:
    """Watches a run, and writes each node's values to ``<folder>/<group>/<name>/<version>``.

    A training has its metrics per epoch, a node made of shards its images per second per shard. A version's folder is
    the same in every run, so a resumed training continues its curves.

    Args:
        folder: where the event files go, a local folder.
        shown: the progress that is printed, told of the same events.

    Raises:
        BadInput: tensorboardX is not installed, or the folder cannot be made.
    """

    def __init__(self, folder: str, shown: Lines | Live) -> None:
        if "://" in folder:
            raise BadInput(f"--tensorboard {folder}: event files go to a local folder, got a URL")
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise BadInput("--tensorboard needs tensorboardX: pip install 'notbugs[tensorboard]'") from error
        self.folder, self.shown, self.make = Path(folder).expanduser(), shown, SummaryWriter
        self.writers = dict[str, Any]()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"--tensorboard {folder}: cannot be made: {error.strerror}") from error

    def __enter__(self) -> Self:
        self.shown.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self.writers.values():
            writer.close()
        self.shown.__exit__(kind, error, trace)

    def __call__(self, node: str, progress: Progress, event: str) -> None:
        """Print an event, and write its values."""
        self.shown(node, progress, event)
        if event == "epoch":
            self._write(node, progress, progress.last)
        elif event == "committed" and (speed := rate(progress, self.shown.paces[node])):
            self._write(node, progress, {"images_per_second": speed})

    def _write(self, node: str, progress: Progress, values: dict[str, Any]) -> None:
        if node not in self.writers:
            place = self.folder / node / progress.version
            self.writers[node] = self.make(str(place), flush_secs=FLUSHED, write_to_disk=True)
        for name, value in values.items():
            if name != "epoch" and type(value) in (int, float) and math.isfinite(value):
                self.writers[node].add_scalar(name, value, progress.done)
