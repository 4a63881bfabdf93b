"""What stands in the store for a node, and whether it can be trusted.

A folder without ``manifest.json`` is not a dataset, a model or an evaluation; one whose files are not
what the manifest says is damaged. Sizes are checked by every run, from one listing; bytes by `verify`.
"""

import platform
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib import metadata
from typing import Any

from pipeline.graph import GROUPS, Node
from pipeline.store import Store, canonical, digest

FORMAT = 1
LIBRARIES = ("notbugs", "torch", "torchvision", "numpy", "pillow", "pyarrow", "ray")


@dataclass(frozen=True)
class Made:
    """A node that is there, whole."""

    folder: str
    manifest: dict[str, Any]

    @property
    def content(self) -> str:
        """Digest of what it holds: equal contents have equal digests, wherever they were made."""
        return str(self.manifest["content"])

    @cached_property
    def files(self) -> dict[str, dict[str, Any]]:
        """Each file's name with its bytes and sha256."""
        return {file["name"]: file for file in self.manifest["files"]}

    def shards(self, split: str) -> list[str]:
        """Names of a split's shards, in order."""
        return sorted(name for name in self.manifest["shards"] if name.rpartition("-")[0] == split)


def find(store: Store, node: Node) -> Made | None:
    """The node as it stands in the store; None unless every file and commit mark is there with its size."""
    return _whole(store, node, store.find_json(f"{node.folder}/manifest.json"))


def _whole(store: Store, node: Node, manifest: Any) -> Made | None:
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return None
    made = Made(node.folder, manifest)
    there = store.files(node.folder, recursive=True)
    whole = all(there.get(name) == file["bytes"] for name, file in made.files.items())
    marked = all(mark_path(name) in there for name in manifest.get("shards", {}))
    return made if whole and marked else None


def find_or_withdraw(store: Store, node: Node, inputs: Mapping[str, Made]) -> Made | None:
    """The node, if it is whole and was made from these very inputs; otherwise its manifest is taken back.

    A node that is about to be made again is not there meanwhile: under its old manifest, new shards
    would stand beside old ones.
    """
    manifest = store.find_json(f"{node.folder}/manifest.json")
    made = _whole(store, node, manifest)
    if made is not None and parents_of(made) == {role: one.content for role, one in inputs.items()}:
        return made
    if manifest is not None:
        store.delete(f"{node.folder}/manifest.json")
    return None


def parents_of(made: Made) -> dict[str, str]:
    """Role → content digest of what it was made from."""
    return {role: parent["content"] for role, parent in made.manifest["parents"].items()}


def mark_path(shard: str) -> str:
    return f"commits/{shard}.json"


def rows_path(shard: str) -> str:
    return f"commits/{shard}.parquet"


def publish(
    store: Store,
    node: Node,
    files: dict[str, tuple[int, str]],
    content: str,
    inputs: Mapping[str, Made],
    facts: dict[str, Any],
) -> Made:
    """Write the manifest, last of all files: from now on the node is there.

    Args:
        store: where.
        node: what.
        files: name → (bytes, sha256) of every file but the commit marks.
        content: digest of what it holds.
        inputs: what it was made from.
        facts: what else readers want to know.
    """
    manifest = {
        "format": FORMAT,
        "group": node.group,
        "name": node.name,
        "version": node.version,
        "content": content,
        **facts,
        "parents": {
            role: {
                "node": node.inputs[role].id,
                "version": node.inputs[role].version,
                "content": made.content,
            }
            for role, made in inputs.items()
        },
        "files": [{"name": name, "bytes": size, "sha256": sha} for name, (size, sha) in sorted(files.items())],
        "environment": environment(),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    store.put_json(f"{node.folder}/manifest.json", manifest)
    return Made(node.folder, manifest)


def content_digest(files: Mapping[str, str]) -> str:
    """One digest for several files, by name and sha256."""
    return digest(canonical(dict(sorted(files.items()))))


def environment() -> dict[str, str]:
    """Versions of what computed it."""
    versions = {name: version(name) for name in LIBRARIES}
    return {"python": platform.python_version(), "machine": platform.machine(), **versions}


def version(name: str) -> str:
    """Of an installed package; a copy of the source that is run where it lies is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def host() -> str:
    return socket.gethostname()


# ---------------------------------------------------------------------------------------- verifying


@dataclass(frozen=True)
class Damage:
    """Something in the store that is not what it should be.

    Attributes:
        folder: ``<group>/<name>/<version>``.
        file: the file in it.
        reason: what is wrong with it.
        shard: the shard whose commit mark must go for the next run to make it again.
    """

    folder: str
    file: str
    reason: str
    shard: str | None = None


def folders(store: Store) -> list[str]:
    """Every ``<group>/<name>/<version>`` of a store."""
    return [
        f"{group}/{name}/{version}"
        for group in GROUPS
        for name in store.folders(group)
        for version in store.folders(f"{group}/{name}")
    ]


def verify(store: Store, folder: str, progress: Callable[[str], None] = lambda name: None) -> list[Damage]:
    """Read every byte of a node and compare it with its manifest and commit marks.

    One that has no manifest yet is held against the marks of the shards that it has so far.
    """
    there = store.files(folder, recursive=True)
    manifest = store.find_json(f"{folder}/manifest.json")
    if not isinstance(manifest, dict):
        if "manifest.json" in there:
            return [Damage(folder, "manifest.json", "is not JSON")]
        marks = [name.removeprefix("commits/").removesuffix(".json") for name in there if _is_mark(name)]
        manifest = {"shards": dict.fromkeys(marks), "files": []}
    listed = {file["name"]: file for file in manifest["files"]}
    found = []
    for shard in sorted(manifest.get("shards", {})):
        progress(shard)
        found += _verify_shard(store, folder, shard, listed.pop(f"{shard}.tar", None))
    for name, file in listed.items():
        progress(name)
        found += _compare(store, folder, name, file)
    return found


def _is_mark(name: str) -> bool:
    return name.startswith("commits/") and name.endswith(".json")


def _verify_shard(store: Store, folder: str, shard: str, listed: Mapping[str, Any] | None) -> list[Damage]:
    mark = store.find_json(f"{folder}/{mark_path(shard)}")
    if not isinstance(mark, dict):
        return [Damage(folder, mark_path(shard), "is missing or no JSON", shard)]
    if "sha256" not in mark:  # an evaluation: the mark is all there is
        return []
    found = _compare(store, folder, f"{shard}.tar", listed or mark, shard)
    found += _compare(store, folder, rows_path(shard), mark["rows"], shard)
    if listed is not None and listed["sha256"] != mark["sha256"]:
        found.append(Damage(folder, mark_path(shard), "names another digest than the manifest", shard))
    return found


def _compare(store: Store, folder: str, name: str, file: Mapping[str, Any], shard: str | None = None) -> list[Damage]:
    content = store.find(f"{folder}/{name}")
    if content is None:
        return [Damage(folder, name, "is missing", shard)]
    if len(content) != file["bytes"]:
        return [Damage(folder, name, f"has {len(content)} bytes, expected {file['bytes']}", shard)]
    if digest(content) != file["sha256"]:
        return [Damage(folder, name, "has other bytes than were committed", shard)]
    return []


def withdraw(store: Store, folder: str, shards: set[str]) -> None:
    """Take back the commit marks of some shards and the manifest: the next run makes them again."""
    store.delete(f"{folder}/manifest.json")
    for shard in shards:
        store.delete(f"{folder}/{mark_path(shard)}")
