"""What a source holds, before any image is decoded: its classes, and where each image lies."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from stages.images import KEPT
from stages.seeds import generator

Span = tuple[str, int, int]
"""A tar, an offset in it, and a number of bytes."""

TRIED = 16
"""Images of a split that are looked at when a source is listed."""

SUFFIXES = {suffix: suffix for suffix in KEPT} | {"jpeg": "jpg"}

CLUTTER = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "lost+found"}
"""Names that operating systems and file servers put beside one's files, in small letters."""

HIDDEN = "hidden files and folders"


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder in its path, is hidden (`._1.png`, `.git`) or of `CLUTTER`."""
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return any(part.startswith(".") or part.lower() in CLUTTER for part in parts)


def printable(name: str) -> str:
    """A file's name as text that can be stored and shown: what of it is not UTF-8 is written as an escape."""
    return name.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a source: where it is in the order, where it lies, what it shows."""

    index: int
    ref: Any
    """Pixels (H × W × C, uint8), a path, a `Span` of a tar; None for an image that is made from its index."""
    label: int


@dataclass(frozen=True, eq=False)
class Images(Sequence[Item]):
    """Images of one split, in columns: a million items as objects would take hundreds of MiB.

    A slice, or an array of positions, chooses some of them; an integer gives an `Item`. To another process they
    travel as a tuple of items, each with its own reference alone.

    Attributes:
        indices, labels: N each, what `Item` says, int64.
        refs: of all images of the split, those left out included, in the order of the source; None for images that
            are made.
        first: index of the image that the first reference is of.
    """

    indices: np.ndarray
    labels: np.ndarray
    refs: Any = None
    first: int = 0

    @classmethod
    def whole(cls, label: Sequence[int] | np.ndarray, refs: Any = None, first: int = 0) -> "Images":
        """A whole split, whose images have the indices from ``first`` on."""
        labels = np.asarray(label, dtype=np.int64)
        return cls(np.arange(first, first + len(labels)), labels, refs, first)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, at: Any) -> Any:
        index, label = self.indices[at], self.labels[at]
        if isinstance(at, slice | np.ndarray):
            return replace(self, indices=index, labels=label)
        return self._item(int(index), int(label))

    def __iter__(self) -> Iterator[Item]:
        return map(self._item, self.indices.tolist(), self.labels.tolist())

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (tuple(self),)

    def _item(self, index: int, label: int) -> Item:
        return Item(index, None if self.refs is None else self.refs[index - self.first], label)


def few(images: Images) -> Images:
    """The few images of a split that are looked at when a source is listed, the same ones each time."""
    chosen: Images = images[generator(0, "probe").permutation(len(images))[:TRIED]]
    return chosen


@dataclass(frozen=True)
class Listing:
    """All that is known of a source without decoding an image."""

    classes: tuple[str, ...]
    items: dict[str, Images]
    """Split → its images in the order of the source."""
    channels: int
    suffix: str | None = None
    """What the files are, where all are of one kind that can be kept."""
    skipped: dict[str, int] = field(default_factory=dict)
    """What is no data and was passed over: a reason, as a plural noun, → how many."""

    def majority(self, split: str) -> float:
        """Share of the most frequent class: what a constant answer scores."""
        labels = self.items[split].labels
        return int(np.bincount(labels).max()) / len(labels)
