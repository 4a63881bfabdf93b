"""The measurements of a step, written as it runs; and helpers of the steps: time left, timing, networks, images."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.side_by_side import CIFAR10, cifar10
from pipeline.report import tables
from stages import model as models
from stages.device import device
from stages.model import Classifier, Design
from stages.shard import Shard

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Sheet:
    """A step's tables, written to its file at each addition, so that nothing is lost if the step is ended.

    Attributes:
        step: its name.
        out: folder of the files.
        data: folder of CIFAR-10, if any.
        tiny: whether it is only a rehearsal.
        end: when the step must end (monotonic seconds).
    """

    step: str
    out: Path
    data: Path | None
    tiny: bool
    end: float
    tables: list[dict[str, Any]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds left for this step."""
        return self.end - time.monotonic()

    def table(self, title: str, *head: str) -> Callable[..., None]:
        """Begin a table; returns a function that adds a line."""
        lines: list[list[str]] = []
        self.tables.append({"title": title, "head": list(head), "lines": lines})

        def add(*cells: object) -> None:
            lines.append([f"{cell:,.3g}" if isinstance(cell, float) else str(cell) for cell in cells])
            self.write()

        return add

    def say(self, sentence: str) -> None:
        """Add a line under the tables."""
        self.said.append(sentence)
        self.write()

    def write(self) -> None:
        """Write everything, atomically."""
        new = self.out / f"{self.step}.new"
        new.write_text(json.dumps({"tables": self.tables, "said": self.said}, indent=1, ensure_ascii=False))
        new.rename(self.out / f"{self.step}.json")

    def noted(self, step: str, name: str) -> float | None:
        """A number that an earlier step stored with `note`."""
        file = self.out / f"{step}.notes.json"
        found = json.loads(file.read_text()) if file.exists() else {}
        return found.get(name)

    def note(self, name: str, value: float) -> None:
        """Store a number for later steps."""
        file = self.out / f"{self.step}.notes.json"
        found = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(found | {name: value}))


def printed(found: dict[str, Any]) -> str:
    """A step's tables as text, and its outcome."""
    parts = [f"{table['title']}\n\n{tables.table(table['head'], table['lines'])}\n" for table in found["tables"]]
    end = found["failed"] or f"done after {found['seconds']:.0f} s"
    return "\n".join([*parts, *found["said"], f"{found['step']}: {end}\n"])


# -------------------------------------------------------------------------------------------------- timing


def waited() -> float:
    """The time, after the device has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(work: Callable[[], object], rounds: int = 1) -> float:
    """Seconds of some work: the median over rounds."""
    found = []
    for _ in range(rounds):
        started = waited()
        work()
        found.append(waited() - started)
    return median(found)


# --------------------------------------------------------------------------------------- networks and images


def untrained(arch: str, side: int, classes: int) -> Classifier:
    """A network with random weights and batch norm statistics of noise: else a deep network's logits overflow."""
    torch.manual_seed(0)
    design = Design(arch, classes, (3, side, side), IMAGENET_MEAN, IMAGENET_STD)
    made = models.on_device(Classifier(design, Path.cwd()))
    for layer in made.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.momentum = 1.0
    with torch.no_grad():
        made.train()(torch.rand(32, 3, side, side, device=device()))
    return made.eval().requires_grad_(False)


def images(sheet: Sheet, count: int, split: str = "train") -> Shard:
    """Some images of CIFAR-10; noise without its folder."""
    if sheet.data is not None and (sheet.data / CIFAR10).exists():
        return cifar10(sheet.data, count, split)
    draw = np.random.default_rng(0)
    pixels, label = draw.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), draw.integers(0, 10, count)
    return Shard(f"{split}-000000", np.arange(count), label, label.copy(), pixels)


def noise(count: int, side: int) -> np.ndarray:
    """uint8, N × side × side × 3."""
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def percent(part: Sequence[bool] | np.ndarray) -> str:
    """A share, in percent."""
    return f"{100 * float(np.mean(part)):.1f}"
