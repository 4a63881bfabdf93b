"""What stands in the store for a node, and whether it can be trusted.

A folder without ``manifest.json`` is not a dataset, a model or an evaluation; one whose files are not
what the manifest says is damaged. Sizes are checked by every run, from one listing; bytes by `verify`.
"""

import platform
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from importlib import metadata
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pipeline import documents
from pipeline.documents import (
    Amount,
    Count,
    Document,
    FileName,
    Group,
    Moment,
    NodeId,
    NodeName,
    Sha,
    ShardName,
    Share,
    Version,
    Word,
    fits,
)
from pipeline.graph import GROUPS, Node
from pipeline.store import Store, canonical, digest
from stages.design import Design
from stages.errors import BadData, BadInput

FORMAT = 2

NOT_OURS, LOST = "is damaged, or of another version of this program", "is missing, although all else is there"
"""What may be wrong with a document that says what a folder holds."""

LAST_BUT_ONE = "recipe.json"
"""The file that is written before the manifest: where it stands without one, the manifest was lost."""

LIBRARIES = ("notbugs", "torch", "torchvision", "numpy", "pillow", "pyarrow", "ray")


class File(Document):
    """A file as it was published."""

    name: FileName
    bytes: Count
    sha256: Sha


class Parent(Document):
    """What a node was made from."""

    node: NodeId
    version: Version
    content: Sha


class Manifest(Document):
    """What stands in every manifest; `docs/data-format.md` says what each key means."""

    format: Literal[2]
    group: Group
    name: NodeName
    version: Version
    content: Sha
    parents: dict[str, Parent]
    files: list[File]
    environment: dict[str, str]
    devices: dict[str, Count]
    settings: dict[str, Count] = Field(default_factory=dict)
    made: Moment

    def _digest_of(self, name: str) -> str:
        return next((file.sha256 for file in self.files if file.name == name), "")


class LeftOut(Document):
    """Why some images were left out, and the first of them."""

    reason: str
    images: Count
    first: str = ""


class DatasetManifest(Manifest):
    """A dataset: its shards are the files that it lists, and its splits hold what its shards hold."""

    classes: list[str] = Field(min_length=1)
    channels: Literal[1, 3]
    image_shape: Annotated[list[Annotated[int, Field(ge=1, lt=2**14)]], Field(min_length=3, max_length=3)] | None
    members: list[str]
    counts: dict[Word, Count]
    shards: dict[ShardName, Count]
    failures: Count
    left_out: list[LeftOut] | None = None
    skipped: dict[str, Count] | None = None
    mean: list[float] | None = None
    std: list[Annotated[float, Field(gt=0)]] | None = None
    majority: dict[Word, Share] | None = None
    reached: Share | None = None
    reached_by_step: list[Share] | None = None
    l2_mean: Amount | None = None
    linf_max: Amount | None = None
    distance_mean: Amount | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        tars = {f"{name}.tar": self._digest_of(f"{name}.tar") for name in self.shards}
        if not all(tars.values()) or self.content != content_digest(tars):
            raise ValueError("the content is not that of the shards")
        if self.counts != per_split(self.shards.items()):
            raise ValueError("the counts are not those of the shards")
        return self


class ModelManifest(Manifest):
    """A model: its content is that of its weights."""

    design: Design
    trained_on: NodeName | None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.content != self._digest_of("weights.safetensors"):
            raise ValueError("the content is not that of the weights")
        return self


class EvaluationManifest(Manifest):
    """An evaluation: its result, and the shards that were counted."""

    shards: dict[ShardName, Count]

    @model_validator(mode="after")
    def _has_a_result(self) -> Self:
        if not self._digest_of("result.json"):
            raise ValueError("there is no result")
        return self


MANIFESTS = {"datasets": DatasetManifest, "models": ModelManifest, "evaluations": EvaluationManifest}


class Rows(Document):
    """The rows of a shard, as a file."""

    bytes: Count
    sha256: Sha


class Mark(Document):
    """A commit mark."""

    name: ShardName
    samples: Count
    inputs: dict[str, str]
    host: str
    device: str
    settings: list[str] = Field(default_factory=list)


class Statistics(Document):
    """Sums over a shard that add up over a dataset; see `jobs.statistics`."""

    shape: Annotated[list[Count], Field(min_length=3, max_length=3)] | None = None
    pixels: Count | None = None
    sums: list[Count] | None = None
    squares: list[Count] | None = None
    reached: Count | None = None
    reached_at: list[Count] | None = None
    distance: Amount | None = None
    l2: Amount | None = None
    linf: Amount | None = None


class ShardMark(Mark):
    """The commit mark of a dataset's shard."""

    failures: Count
    bytes: Count
    sha256: Sha
    rows: Rows
    statistics: Statistics
    suffix: Word


class ScoreMark(Mark):
    """The commit mark of an evaluation's shard: what was counted, by model."""

    sums: dict[str, dict[str, Any]]


MARKS: dict[str, type[Mark]] = {"datasets": ShardMark, "evaluations": ScoreMark}


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


def manifest_at(store: Store, folder: str) -> dict[str, Any] | None:
    """The manifest of ``<group>/<name>/<version>``; None where there is none, or it cannot be trusted."""
    group, name, version = folder.split("/")
    found = documents.find(store, f"{folder}/manifest.json", MANIFESTS[group])
    return found if found and (found["group"], found["name"], found["version"]) == (group, name, version) else None


def find(store: Store, node: Node) -> Made | None:
    """The node as it stands in the store; None unless every file and commit mark is there with its size."""
    manifest = manifest_at(store, node.folder)
    if manifest is None or (node.group == "models" and manifest["design"]["arch"] != node.arch):
        return None
    made = Made(node.folder, manifest)
    there = store.files(node.folder, recursive=True)
    whole = all(there.get(name) == file["bytes"] for name, file in made.files.items())
    marked = all(mark_path(name) in there for name in manifest.get("shards", {}))
    read = node.group != "evaluations" or _compare(store, node.folder, "result.json", made.files["result.json"]) == []
    return made if whole and marked and read else None


def find_or_withdraw(store: Store, node: Node, inputs: Mapping[str, Made]) -> Made | None:
    """The node, if it is whole and was made from these very inputs; otherwise its manifest is taken back.

    A node that is about to be made again is not there meanwhile: under its old manifest, new shards
    would stand beside old ones.
    """
    made = find(store, node)
    if made is not None and parents_of(made) == {role: one.content for role, one in inputs.items()}:
        return made
    withdraw(store, node.folder, set())
    return None


def read_file(store: Store, made: Made, name: str, take_back: bool = False) -> bytes:
    """A file of a node, as it was published.

    Args:
        store: where.
        made: the node.
        name: the file.
        take_back: whether a damaged file's mark and manifest are withdrawn at once.

    Raises:
        BadData: it is missing or damaged.
    """
    content = store.find(f"{made.folder}/{name}")
    if content is not None and digest(content) == made.files.get(name, {}).get("sha256"):
        return content
    if not take_back:
        raise BadData(
            f"{made.folder}/{name} is damaged: `notbugs verify` takes it back, and the next run makes it again"
        )
    withdraw(store, made.folder, {name.removesuffix(".tar")} if name.endswith(".tar") else set())
    raise BadData(f"{made.folder}/{name} is damaged and was withdrawn: the next run makes it again")


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


def per_split(samples: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Samples of each split, from those of each shard."""
    counts: dict[str, int] = {}
    for name, count in samples:
        split = name.rpartition("-")[0]
        counts[split] = counts.get(split, 0) + count
    return counts


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
    """Every ``<group>/<name>/<version>`` of a store; other folders are none of ours."""
    return [
        f"{group}/{name}/{version}"
        for group in GROUPS
        for name in store.folders(group)
        if fits(NodeName, name)
        for version in store.folders(f"{group}/{name}")
        if fits(Version, version)
    ]


def verify(store: Store, folder: str) -> list[Damage]:
    """Read every byte of a node and compare it with its manifest and commit marks.

    One that has no manifest yet is held against the marks of the shards that it has so far. A file that cannot be read
    is damaged; the others are read all the same.
    """
    found: list[Damage] = []
    there, manifest = dict[str, int](), None
    with _reported(store, found, Damage(folder, "", "cannot be listed")):
        there = store.files(folder, recursive=True)
    with _reported(store, found, Damage(folder, "manifest.json", "cannot be read")):
        if (manifest := manifest_at(store, folder)) is None and {"manifest.json", LAST_BUT_ONE} & set(there):
            why = NOT_OURS if "manifest.json" in there else LOST
            found.append(Damage(folder, "manifest.json", why))
    marks = {name.removeprefix("commits/").removesuffix(".json") for name in there if _is_mark(name)}
    shards = manifest.get("shards", {}) if manifest else {name for name in marks if fits(ShardName, name)}
    listed = {file["name"]: file for file in manifest["files"]} if manifest else {}
    for shard in [] if folder.startswith("models/") else sorted(shards):
        found += _verify_shard(store, folder, shard, listed.pop(f"{shard}.tar", None))
    for name, file in listed.items():
        found += _compare(store, folder, name, file)
    return found


@contextmanager
def _reported(store: Store, found: list[Damage], damage: Damage) -> Iterator[None]:
    """Report what a local store does not let be read; what an object store does not is a reason to stop."""
    try:
        yield
    except (BadInput, OSError) as error:
        if not store.local:
            raise
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        found.append(replace(damage, reason=f"{damage.reason}: {why}"))


def _is_mark(name: str) -> bool:
    return name.startswith("commits/") and name.endswith(".json")


def _verify_shard(store: Store, folder: str, shard: str, listed: Mapping[str, Any] | None) -> list[Damage]:
    found: list[Damage] = []
    path, mark, kind = mark_path(shard), None, MARKS[folder.partition("/")[0]]
    with _reported(store, found, Damage(folder, path, "cannot be read", shard)):
        mark = documents.find(store, f"{folder}/{path}", kind)
        if mark is None or mark["name"] != shard:
            return [Damage(folder, path, "is missing or damaged", shard)]
    if mark is None or kind is ScoreMark:  # of an evaluation, the mark is all there is
        return found
    found += _compare(store, folder, f"{shard}.tar", listed or mark, shard)
    found += _compare(store, folder, rows_path(shard), mark["rows"], shard)
    if listed is not None and listed["sha256"] != mark["sha256"]:
        found.append(Damage(folder, path, "names another digest than the manifest", shard))
    return found


def _compare(store: Store, folder: str, name: str, file: Mapping[str, Any], shard: str | None = None) -> list[Damage]:
    found: list[Damage] = []
    with _reported(store, found, Damage(folder, name, "cannot be read", shard)):
        content = store.find(f"{folder}/{name}")
        if content is None:
            return [Damage(folder, name, "is missing, or no file", shard)]
        if len(content) != file["bytes"]:
            return [Damage(folder, name, f"has {len(content)} bytes, expected {file['bytes']}", shard)]
        if digest(content) != file["sha256"]:
            return [Damage(folder, name, "has other bytes than were committed", shard)]
    return found


def withdraw(store: Store, folder: str, shards: set[str]) -> None:
    """Take back the commit marks of some shards and the manifest: the next run makes them again."""
    store.delete(f"{folder}/manifest.json")
    store.delete(f"{folder}/{LAST_BUT_ONE}")
    for shard in shards:
        store.delete(f"{folder}/{mark_path(shard)}")
