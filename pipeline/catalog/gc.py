"""What may be removed from a store, and its removal.

Kept are versions with a tag, versions that a run under way names, what the policy keeps, and everything that one of
these was made from. An evaluation that a run on record names is kept too: it is small, and holds the record's results.
What it was made from may go.

A document that cannot be trusted still protects every version that it mentions.
"""

import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.catalog import listing
from pipeline.catalog.listing import DAMAGED, FINISHED, SAME, Entry
from pipeline.run import artifacts, removals, runs, tags
from pipeline.store import Store, at_once
from stages.errors import BadInput

UNDER_WAY = 3600.0
"""Seconds without a sign of life after which a run on record as running no longer counts as under way. More than
`runs.LOST_AFTER`: its store may be away, or its machine suspended."""


@dataclass(frozen=True)
class Policy:
    """What is kept beside what must be. A version is removed only if every given rule lets it go.

    Attributes:
        keep: keep this many of the newest finished versions of each name, and all that are newer than these.
        older_than: keep what is younger than so many seconds.
        unreferenced: keep what a run on record names.
    """

    keep: int | None = None
    older_than: float | None = None
    unreferenced: bool = False

    def __post_init__(self) -> None:
        if self.keep is None and self.older_than is None and not self.unreferenced:
            raise BadInput("gc needs to know what to remove: add --keep N, --older-than AGE or --unreferenced")


@dataclass(frozen=True)
class Plan:
    """Outcome of a look at a store.

    Attributes:
        removable: versions that may go: those that point at another first, then the newest first. So a version goes
            before what it was made from, or points at.
        kept: folder → why it is kept.
    """

    removable: list[Entry]
    kept: Mapping[str, str]


def plan(store: Store, policy: Policy) -> Plan:
    """Find out what may go.

    Runs are read before versions: a run that had ended by then has published what it made, and one that had not is seen
    to be under way.
    """
    records = runs.records(store)
    unread = [store.find(f"runs/{run}/run.json") or b"" for run, record in records.items() if record is None]
    named = {run: runs.versions(record) for run, record in records.items() if record is not None}
    every = tags.every(store)
    unread += [store.find(path) or b"" for path, tag in every.items() if tag is None]
    entries = {entry.folder: entry for entry in listing.entries(store)}
    unread += [store.find(f"{one.folder}/manifest.json") or b"" for one in entries.values() if one.state == DAMAGED]

    roots = _mentioned(entries, unread)
    roots |= {one.folder: "damaged: `notbugs verify`" for one in entries.values() if one.state == DAMAGED}
    roots |= _kept_by_policy(list(entries.values()), policy, named)
    alive = [run for run, record in records.items() if record is not None and _under_way(record)]
    roots |= {folder: f"run {run} is under way" for run in alive for folder in named[run]}
    roots |= {folder: f"tag {', '.join(names)}" for folder, names in tags.by_folder(every).items()}
    kept = _with_inputs(entries, roots, named)
    for run, folders in named.items():
        kept |= {f: f"results of run {run}" for f in folders if f.startswith("evaluations/") and f not in kept}
    removable = [entry for entry in entries.values() if entry.folder not in kept]
    return Plan(sorted(removable, key=lambda entry: SAME not in entry.parents), kept)


def _under_way(record: Mapping[str, Any]) -> bool:
    silent = abs(time.time() - float(record["updated"]))
    return record["state"] == "running" or (record["state"] == "lost" and silent < UNDER_WAY)


def _mentioned(entries: Mapping[str, Entry], documents: Iterable[bytes]) -> dict[str, str]:
    """The versions that damaged documents mention."""
    found = {match for content in documents for match in re.findall(rb"\b[0-9a-f]{16}\b", content)}
    return {
        folder: "a damaged document mentions it" for folder, one in entries.items() if one.version.encode() in found
    }


def _kept_by_policy(entries: Sequence[Entry], policy: Policy, named: Mapping[str, set[str]]) -> dict[str, str]:
    """The versions that one rule or more keeps.

    Args:
        entries: all versions, the newest first.
        policy: the rules.
        named: run → the versions that it names.
    """
    kept, finished, now = dict[str, str](), dict[str, int](), time.time()
    on_record = {folder: run for run, folders in named.items() for folder in folders}
    for entry in entries:
        newer = finished.get(entry.node, 0)
        finished[entry.node] = newer + (entry.state == FINISHED)
        if policy.keep is not None and newer < policy.keep:
            kept[entry.folder] = f"of the newest {policy.keep}"
        elif policy.older_than is not None and now - entry.when <= policy.older_than:
            kept[entry.folder] = "too young"
        elif policy.unreferenced and entry.folder in on_record:
            kept[entry.folder] = f"run {on_record[entry.folder]} names it"
    return kept


def _with_inputs(
    entries: Mapping[str, Entry], roots: Mapping[str, str], named: Mapping[str, set[str]]
) -> dict[str, str]:
    """The roots, and everything that these were made from.

    The inputs of an unfinished version stand nowhere but in the records of its runs, so all that these name is kept.
    """
    kept, todo = dict(roots), list(roots)
    while todo:
        folder = todo.pop()
        entry = entries.get(folder)
        inputs: Iterable[str] = entry.parents.values() if entry else ()
        if entry is not None and entry.state != FINISHED:
            inputs = {other for folders in named.values() if folder in folders for other in folders}
        for other in inputs:
            if other not in kept:
                kept[other] = f"{folder} needs it"
                todo.append(other)
    return kept


def sized(store: Store, entries: Sequence[Entry]) -> list[Entry]:
    """Versions with the size of all their files, which includes those that no manifest lists; the largest first."""
    sizes = at_once(lambda entry: sum(store.files(entry.folder, recursive=True).values()), entries)
    found = [replace(entry, bytes=size) for entry, size in zip(entries, sizes, strict=True)]
    return sorted(found, key=lambda entry: (-entry.bytes, entry.folder))


def collect(store: Store, policy: Policy, agreed: Collection[str]) -> Iterator[Entry]:
    """Remove versions, one at a time; yields each after its removal.

    The store is looked at again once runs can see that a removal is under way (`removals`), and what is needed by now
    stays. The manifest goes first: a version that is half removed is unfinished, and the next run or removal goes on
    from there.

    Args:
        store: the store.
        policy: the rules.
        agreed: folders of a `plan`; no others are removed.

    Raises:
        BadData: this process was suspended for so long that a run may use what is left.
    """
    removals.sweep(store, time.time() - runs.LEFTOVERS)
    store.sweep(time.time() - runs.LEFTOVERS)
    with removals.announced(store, artifacts.host(), list(agreed)) as notice:
        for entry in plan(store, policy).removable:
            if entry.folder in agreed:
                notice.refuse_if_abandoned()
                artifacts.withdraw(store, entry.folder, set())
                store.delete_folder(entry.folder)
                notice.done(entry.folder)
                yield entry
