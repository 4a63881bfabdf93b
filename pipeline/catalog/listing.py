"""Every version in a store, from the listings of its folders and one document for each version."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pipeline.experiment.graph import GROUPS
from pipeline.run import artifacts, runs, tags
from pipeline.store import Store, at_once

FINISHED, UNFINISHED, DAMAGED = "finished", "unfinished", "damaged"


@dataclass(frozen=True)
class Entry:
    """One version of a dataset, model or evaluation.

    Attributes:
        folder: ``<group>/<name>/<version>``.
        state: finished; unfinished: without a manifest; damaged: with a manifest that cannot be trusted.
        when: time of publication; of what has no manifest, of the last write (seconds since 1970).
        bytes: size of the files in the manifest; of what has no manifest, of all files.
        samples: images of a dataset, or images that an evaluation scored; None for a model, or if it is not known.
        parents: role → folder of the version that it was made from; of one that points at another, `SAME` → it.
        content: content digest, empty if it is not finished.
        steps: of what is unfinished, what is there: ``3 shards``.
        tags: its tags, sorted.
    """

    folder: str
    state: str
    when: float
    bytes: int
    samples: int | None
    parents: Mapping[str, str]
    content: str = ""
    steps: str = ""
    tags: tuple[str, ...] = ()

    @property
    def node(self) -> str:
        """``<group>/<name>``."""
        return self.folder.rpartition("/")[0]

    @property
    def group(self) -> str:
        return self.folder.partition("/")[0]

    @property
    def version(self) -> str:
        return self.folder.rpartition("/")[2]

    @property
    def made(self) -> str:
        """`when` as a date."""
        return datetime.fromtimestamp(self.when, UTC).isoformat(timespec="seconds")

    def as_json(self) -> dict[str, Any]:
        group, name, version = self.folder.split("/")
        return {
            "group": group,
            "name": name,
            "version": version,
            "tags": list(self.tags),
            "state": self.state,
            "made": self.made,
            "samples": self.samples,
            "bytes": self.bytes,
        }


def entries(store: Store, groups: Sequence[str] = GROUPS) -> list[Entry]:
    """Every version in a store, the newest first.

    Takes one listing for each group and name, and one document for each version, whatever the number of shards.

    Raises:
        BadInput: the store cannot be read.
    """
    named = tags.by_folder(tags.every(store))
    folders = artifacts.folders(store, groups)
    return newest_first(at_once(lambda folder: entry(store, folder, named.get(folder, ())), folders))


def newest_first(found: Iterable[Entry | None]) -> list[Entry]:
    """The entries, the newest first; those of the same second by name."""
    return sorted((one for one in found if one is not None), key=lambda one: (-int(one.when), one.folder))


def entry(store: Store, folder: str, named: Iterable[str] = ()) -> Entry | None:
    """One version of a store, with its tags; None if its folder is empty."""
    marked = tuple(sorted(named))
    if (manifest := artifacts.manifest_at(store, folder)) is not None:
        return _finished(folder, manifest, marked)
    there = store.stats(folder, recursive=True)
    if not there:
        return None
    if "manifest.json" in there and (manifest := artifacts.manifest_at(store, folder)) is not None:
        return _finished(folder, manifest, marked)  # published between the two looks
    damaged = "manifest.json" in there
    marks = sum(name.startswith("commits/") and name.endswith(".json") for name in there)
    begun = "a checkpoint" if "checkpoint.safetensors" in there else ""
    steps = "" if damaged else f"{marks} shard{'s' * (marks != 1)}" if marks else begun
    when, size = max(one.modified for one in there.values()), sum(one.bytes for one in there.values())
    state = DAMAGED if damaged else UNFINISHED
    return Entry(folder, state, when, size, None, {}, steps=steps, tags=marked)


SAME = "same as"
"""Role of the version that one of the same recipe points at, which holds its files."""


def _finished(folder: str, manifest: Mapping[str, Any], marked: tuple[str, ...]) -> Entry:
    target = {SAME: manifest["at"]} if "at" in manifest else {}
    parents = {role: f"{parent['node']}/{parent['version']}" for role, parent in manifest["parents"].items()}
    counts = manifest.get("counts", manifest.get("shards"))
    return Entry(
        folder,
        FINISHED,
        datetime.fromisoformat(manifest["made"]).timestamp(),
        0 if target else sum(file["bytes"] for file in manifest["files"]),
        None if counts is None else sum(counts.values()),
        target or parents,
        manifest["content"],
        tags=marked,
    )


def run_entries(store: Store) -> list[dict[str, Any]]:
    """Every run of a store in a few words, the newest first."""
    return [_run(name, record) for name, record in runs.records(store).items()]


def _run(name: str, record: Mapping[str, Any] | None) -> dict[str, Any]:
    if record is None:
        return {"run": name, "state": DAMAGED, "experiment": None, "started": None, "seconds": None, "nodes": {}}
    began = datetime.fromisoformat(record["started"]).timestamp()
    states = [progress["state"] for progress in record["nodes"].values()]
    return {
        "run": name,
        "state": record["state"],
        "experiment": record["experiment"].get("name"),
        "started": record["started"],
        "seconds": round(max(0.0, record["updated"] - began), 1),
        "nodes": {state: states.count(state) for state in sorted(set(states))},
    }
