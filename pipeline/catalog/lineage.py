"""The lineage of a version: what it was made from, and what was made from it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.catalog import listing
from pipeline.catalog.listing import Entry
from pipeline.store import Store


@dataclass(frozen=True)
class Branch:
    """A version in a tree of lineage.

    Attributes:
        folder: ``<group>/<name>/<version>``.
        role: what it is to the version above it, or that one to it: ``images``, ``model``, ``on``.
        entry: None if it is no longer in the store.
        repeated: whether it stands in the tree before, with its branches, which are left out here.
        branches: what it was made from, or what was made from it.
    """

    folder: str
    role: str
    entry: Entry | None
    repeated: bool = False
    branches: Sequence["Branch"] = field(default=())

    def as_json(self) -> dict[str, Any]:
        node, _, version = self.folder.rpartition("/")
        about = {"role": self.role, "node": node, "version": version, "there": self.entry is not None}
        return about | {"repeated": self.repeated, "branches": [branch.as_json() for branch in self.branches]}


Edges = Mapping[str, Sequence[tuple[str, str]]]
"""Folder → role and folder of each version beside it, in one direction."""


def lineage(store: Store, folder: str) -> tuple[Branch, Branch]:
    """A version as the root of two trees: of what it was made from, and of what was made from it."""
    entries = {one.folder: one for one in listing.entries(store)}
    up: dict[str, list[tuple[str, str]]] = {one.folder: list(one.parents.items()) for one in entries.values()}
    down: dict[str, list[tuple[str, str]]] = {}
    for one in reversed(entries.values()):  # the oldest first
        for role, parent in one.parents.items():
            down.setdefault(parent, []).append((role, one.folder))
    return _tree(folder, "", entries, up, set()), _tree(folder, "", entries, down, set())


def _tree(folder: str, role: str, entries: Mapping[str, Entry], edges: Edges, seen: set[str]) -> Branch:
    """A tree in which every version has its branches once: a store may hold more paths than any screen has lines."""
    below, entry = edges.get(folder, ()), entries.get(folder)
    if folder in seen:
        return Branch(folder, role, entry, repeated=bool(below))
    seen.add(folder)
    branches = [_tree(other, named, entries, edges, seen) for named, other in below]
    return Branch(folder, role, entry, branches=branches)


def lines(branches: Sequence[Branch], indent: str = "") -> Iterator[str]:
    """Branches as the lines of a tree."""
    for number, branch in enumerate(branches, 1):
        last = number == len(branches)
        yield f"{indent}{'└─' if last else '├─'} {label(branch)}"
        yield from lines(branch.branches, indent + ("   " if last else "│  "))


def label(branch: Branch) -> str:
    """A version in one line."""
    entry, (node, _, version) = branch.entry, branch.folder.rpartition("/")
    tagged = f" ({', '.join(entry.tags)})" if entry and entry.tags else ""
    state = "" if entry and entry.state == listing.FINISHED else f" {entry.state if entry else 'not in the store'}"
    again = " …" if branch.repeated else ""
    role = f"{branch.role}: " if branch.role else ""
    return f"{role}{node} {version}{tagged}{state}{again}"
