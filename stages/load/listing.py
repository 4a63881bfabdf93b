"""The contents of a source before decoding: its classes and the location of each image."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from stages.images import KEPT
from stages.seeds import generator

Span = tuple[str, int, int]
"""Tar, offset, number of bytes."""

TRIED = 16
"""Images of a split that are decoded when a source is listed."""

SUFFIXES = {suffix: suffix for suffix in KEPT} | {"jpeg": "jpg"}

CLUTTER = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "lost+found"}
"""Lower-case names of files and folders that operating systems and file servers create."""

HIDDEN = "hidden files and folders"


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder in its path, is hidden (`._1.png`, `.git`) or in `CLUTTER`."""
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return any(part.startswith(".") or part.lower() in CLUTTER for part in parts)


def printable(name: str) -> str:
    """A file's name as valid text: bytes that are not UTF-8 are escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a source: index, location and label."""

    index: int
    ref: Any
    """Pixels (H × W × C, uint8), a path, or a `Span` of a tar; None for a synthetic image."""
    label: int


@dataclass(frozen=True, eq=False)
class Images(Sequence[Item]):
    """Images of one split, in columns: a million objects would take hundreds of MiB.

    A slice or an array of positions selects images; an integer gives an `Item`. Pickled as a tuple of items, each with
    its own reference only.

    Attributes:
        indices, labels: as in `Item`, N each, int64.
        refs: references of all images of the split, in the order of the source; None for synthetic images.
        first: index of the image of the first reference.
    """

    indices: np.ndarray
    labels: np.ndarray
    refs: Any = None
    first: int = 0

    @classmethod
    def whole(cls, label: Sequence[int] | np.ndarray, refs: Any = None, first: int = 0) -> "Images":
        """A whole split, with indices from ``first``."""
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
    """A fixed random sample of a split, decoded when a source is listed."""
    chosen: Images = images[generator(0, "probe").permutation(len(images))[:TRIED]]
    return chosen


@dataclass(frozen=True)
class Listing:
    """The contents of a source, known without decoding all images."""

    classes: tuple[str, ...]
    items: dict[str, Images]
    """Split → its images in the order of the source."""
    channels: int
    suffix: str | None = None
    """Format of the files if all have the same one and can be kept."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Skipped entries: reason, as a plural noun → count."""

    def majority(self, split: str) -> float:
        """Fraction of the most frequent class: the accuracy of a constant prediction."""
        labels = self.items[split].labels
        return int(np.bincount(labels).max()) / len(labels)
