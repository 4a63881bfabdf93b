"""The artifacts of a store, and whether each can be trusted.

A folder without ``manifest.json`` is no dataset, model or evaluation; one whose files differ from its manifest is
damaged. Every run checks sizes, from one listing; `verify` checks bytes.
"""

import platform
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from importlib import metadata
from typing import Annotated, Any, Literal, Self

import pyarrow as pa
from pydantic import Field, model_validator

from pipeline.experiment.graph import GROUPS, Node
from pipeline.run import documents, fingerprints, tags
from pipeline.run.documents import (
    Amount,
    Count,
    Document,
    FileName,
    Folder,
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
from pipeline.store import Store, at_once, canonical, digest
from stages.design import Design
from stages.errors import BadData, BadInput
from stages.shard import split_of

FORMAT = 3

NOT_OURS, LOST = "is damaged, or of another version of this program", "is missing, although all else is there"
"""Faults of the document that describes a folder."""

DANGLING = "points at another name, where the node is missing or damaged"
"""The same of a `Pointer`."""

LAST_BUT_ONE = "recipe.json"
"""The file written just before the manifest: if it exists alone, the manifest was lost."""

LIBRARIES = ("notbugs", "torch", "torchvision", "numpy", "pillow", "pyarrow", "ray")


class File(Document):
    """A file as it was published."""

    name: FileName
    bytes: Count
    sha256: Sha


class Parent(Document):
    """An input of an artifact."""

    node: NodeId
    version: Version
    content: Sha


class Manifest(Document):
    """The keys of every manifest; `docs/data-format.md` defines them."""

    format: Literal[3]
    group: Group
    name: NodeName
    version: Version
    content: Sha
    parents: dict[str, Parent]
    files: list[File]
    environment: dict[str, str]
    devices: dict[str, Count]
    settings: dict[str, Count] = Field(default_factory=dict)
    fingerprints: dict[str, Sha] = Field(default_factory=dict)
    made: Moment

    def _digest_of(self, name: str) -> str:
        return next((file.sha256 for file in self.files if file.name == name), "")


class LeftOut(Document):
    """A reason why images were left out, their number, and the first of them."""

    reason: str
    images: Count
    first: str = ""


class DatasetManifest(Manifest):
    """A dataset. Its shards are among its files, and the counts of its splits are those of its shards."""

    classes: list[str] = Field(min_length=1)
    channels: Literal[1, 3]
    image_shape: Annotated[list[Annotated[int, Field(ge=1, lt=2**14)]], Field(min_length=3, max_length=3)] | None
    members: list[str]
    counts: dict[Word, Count]
    shards: dict[ShardName, Count]
    failures: Count
    left_out: list[LeftOut] | None = None
    skipped: dict[str, Count] | None = None
    mean: dict[Word, list[float]] | None = None
    std: dict[Word, list[Annotated[float, Field(gt=0)]]] | None = None
    majority: dict[Word, Share] | None = None
    success_rate: Share | None = None
    success_by_step: list[Share] | None = None
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
    """A model. Its content is the digest of its weights."""

    design: Design
    trained_on: NodeName | None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.content != self._digest_of("weights.safetensors"):
            raise ValueError("the content is not that of the weights")
        return self


class EvaluationManifest(Manifest):
    """An evaluation: its result, and the shards that were scored."""

    shards: dict[ShardName, Count]

    @model_validator(mode="after")
    def _has_a_result(self) -> Self:
        if not self._digest_of("result.json"):
            raise ValueError("there is no result")
        return self


MANIFESTS = {"datasets": DatasetManifest, "models": ModelManifest, "evaluations": EvaluationManifest}


class Pointer(Document):
    """In the place of a manifest: the same recipe was made under another name."""

    format: Literal[3]
    group: Group
    name: NodeName
    version: Version
    at: Folder


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
    successes: Count | None = None
    successes_at: list[Count] | None = None
    distance: Amount | None = None
    l2: Amount | None = None
    linf: Amount | None = None


class ShardMark(Mark):
    """The commit mark of a dataset's shard."""

    contents: str = ""
    failures: Count
    bytes: Count
    sha256: Sha
    rows: Rows
    statistics: Statistics
    suffix: Word


class ScoreMark(Mark):
    """The commit mark of an evaluation's shard: the sums of each model."""

    sums: dict[str, dict[str, Any]]


MARKS: dict[str, type[Mark]] = {"datasets": ShardMark, "evaluations": ScoreMark}


@dataclass(frozen=True)
class Artifact:
    """A finished dataset, model or evaluation of the store.

    Attributes:
        folder: ``<group>/<name>/<version>``, in which its files lie: another name's if it points there.
        manifest: its manifest; before it is made, the predicted facts.
    """

    folder: str
    manifest: dict[str, Any]

    @classmethod
    def of(cls, folder: str, manifest: Mapping[str, Any]) -> "Artifact":
        """The artifact with a manifest, in the folder that this points at."""
        return cls(manifest.get("at", folder), dict(manifest))

    @property
    def content(self) -> str:
        """Digest of its bytes; the same wherever they were made."""
        return str(self.manifest["content"])

    @cached_property
    def files(self) -> dict[str, dict[str, Any]]:
        """File name → its entry in the manifest, with bytes and sha256."""
        return {file["name"]: file for file in self.manifest["files"]}

    def shards(self, split: str) -> list[str]:
        """Names of a split's shards, in order."""
        return sorted(name for name in self.manifest["shards"] if split_of(name) == split)


def manifest_at(store: Store, folder: str) -> dict[str, Any] | None:
    """The manifest of ``<group>/<name>/<version>``; None if it is missing or cannot be trusted.

    Of a node that points at another, the other's manifest, with its own name and the other's folder as ``at``.
    """
    group, name, version = folder.split("/")
    found = store.find_json(f"{folder}/manifest.json")
    if found is None or (found.get("group"), found.get("name"), found.get("version")) != (group, name, version):
        return None
    if "content" in found:
        found.pop("at", None)
        return found if fits(MANIFESTS[group], found) else None
    if not fits(Pointer, found) or [(parts := found["at"].split("/"))[0], parts[2]] != [group, version]:
        return None
    there = documents.find(store, f"{found['at']}/manifest.json", MANIFESTS[group])
    if there is None or (there["group"], there["name"], there["version"]) != tuple(parts):
        return None
    return there | {"name": name, "at": found["at"]}


def artifact_at(store: Store, folder: str) -> Artifact | None:
    """The artifact of ``<group>/<name>/<version>``, with the folder that its files lie in."""
    manifest = manifest_at(store, folder)
    return Artifact.of(folder, manifest) if manifest else None


def point(store: Store, node: Node, made: Artifact) -> Artifact:
    """Publish a node as another one of the same recipe, which is there under another name."""
    own = {"format": FORMAT, "group": node.group, "name": node.name, "version": node.version, "at": made.folder}
    store.put_json(f"{node.folder}/manifest.json", own)
    return Artifact(made.folder, made.manifest | {"name": node.name, "at": made.folder})


def names_by_version(store: Store, group: str) -> dict[str, list[str]]:
    """Version → names under which a group has a folder of it."""
    found: dict[str, list[str]] = {}
    for folder in folders(store, (group,)):
        _, name, version = folder.split("/")
        found.setdefault(version, []).append(name)
    return found


def named(store: Store, name: str, groups: Sequence[str] = GROUPS) -> list[str]:
    """Folders ``<group>/<name>/<version>`` that a name stands for, finished or not.

    Args:
        store: the store.
        name: ``rand``, ``datasets/rand``, or either with a version: ``rand/<version>``, where the version is sixteen
            hexadecimal digits, the first of them, or a tag.
        groups: the groups to search.

    Raises:
        BadData: a tag is damaged.
    """
    prefix = next((group for group in groups if name.startswith(f"{group}/")), "")
    base, *rest = name.removeprefix(f"{prefix}/").split("/")
    if len(rest) > 1 or not fits(NodeName, base):
        return []
    found: list[str] = []
    for node in [f"{group}/{base}" for group in groups if prefix in ("", group)]:
        versions = [version for version in store.folders(node) if fits(Version, version)]
        wanted = rest[0] if rest else ""
        if wanted and versions and wanted not in versions and (tag := tags.find(store, node, wanted)):
            wanted = tag["version"]
        found += [f"{node}/{version}" for version in versions if version.startswith(wanted)]
    return found


def by_name(store: Store, name: str, groups: Sequence[str] = GROUPS) -> list[Artifact]:
    """The finished artifacts that a name stands for, oldest first; arguments and errors as of `named`."""
    found = at_once(partial(artifact_at, store), named(store, name, groups))
    return sorted(filter(None, found), key=lambda one: str(one.manifest["made"]))


def find(store: Store, node: Node, folder: str | None = None) -> Artifact | None:
    """The node's artifact in the store; None unless every file and commit mark exists with its stated size.

    Args:
        store: the store.
        node: the node.
        folder: where it may be; by default under its own name.
    """
    made = artifact_at(store, folder or node.folder)
    if made is None or (node.group == "models" and made.manifest["design"]["arch"] != node.arch):
        return None
    manifest, there = made.manifest, store.files(made.folder, recursive=True)
    whole = all(there.get(name) == file["bytes"] for name, file in made.files.items())
    marked = all(mark_path(name) in there for name in manifest.get("shards", {}))
    read = node.group != "evaluations" or _compare(store, made.folder, "result.json", made.files["result.json"]) == []
    return made if whole and marked and read else None


def read_file(store: Store, made: Artifact, name: str, take_back: bool = False) -> bytes:
    """Read a file of a node and check its digest.

    Args:
        store: the store.
        made: the node's artifact.
        name: the file's name.
        take_back: if the file is damaged, withdraw its commit mark and the manifest at once.

    Raises:
        BadData: it is missing or damaged.
    """
    content = store.find(f"{made.folder}/{name}")
    if content is not None and digest(content) == made.files.get(name, {}).get("sha256"):
        return content
    if not take_back:
        raise BadData(
            f"{made.folder}/{name} is damaged: `notbugs verify` withdraws it, and the next run makes it again"
        )
    withdraw(store, made.folder, {name.removesuffix(".tar")} if name.endswith(".tar") else set())
    raise BadData(f"{made.folder}/{name} is damaged and was withdrawn: the next run makes it again")


def parents_of(made: Artifact) -> dict[str, str]:
    """Role → content digest of each input."""
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
    inputs: Mapping[str, Artifact],
    sources: pa.Table,
    facts: dict[str, Any],
) -> Artifact:
    """Write the manifest after all other files, which finishes the node.

    Args:
        store: the store.
        node: the node.
        files: name → (bytes, sha256) of every file except commit marks.
        content: digest of its content.
        inputs: role → input artifact.
        sources: the user's own files that it was made from.
        facts: further entries.
    """
    if sources.num_rows:
        record = fingerprints.pack(sources)
        store.put(f"{node.folder}/{fingerprints.RECORD}", record)
        files = files | {fingerprints.RECORD: (len(record), digest(record))}
        facts = facts | {"fingerprints": fingerprints.digests(sources)}
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
    return Artifact(node.folder, manifest)


def per_split(samples: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Samples per split, from samples per shard."""
    counts: dict[str, int] = {}
    for name, count in samples:
        split = split_of(name)
        counts[split] = counts.get(split, 0) + count
    return counts


def content_digest(files: Mapping[str, str]) -> str:
    """One digest over the names and sha256 of several files."""
    return digest(canonical(dict(sorted(files.items()))))


def environment() -> dict[str, str]:
    """Versions of Python and the libraries, and the kind of machine."""
    versions = {name: version(name) for name in LIBRARIES}
    return {"python": platform.python_version(), "machine": platform.machine(), **versions}


def version(name: str) -> str:
    """Version of a package; a source tree run in place is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def host() -> str:
    return socket.gethostname()


# ---------------------------------------------------------------------------------------- verifying


@dataclass(frozen=True)
class Damage:
    """A damaged or missing file of the store.

    Attributes:
        folder: ``<group>/<name>/<version>``.
        file: its name in the folder.
        reason: what is wrong with it.
        shard: the shard whose commit mark must be withdrawn, so that the next run remakes it.
    """

    folder: str
    file: str
    reason: str
    shard: str | None = None


def folders(store: Store, groups: Sequence[str] = GROUPS) -> list[str]:
    """Every ``<group>/<name>/<version>`` of a store; other folders are ignored."""
    nodes = [f"{group}/{name}" for group in groups for name in store.folders(group) if fits(NodeName, name)]
    versions = zip(nodes, at_once(store.folders, nodes), strict=True)
    return [f"{node}/{version}" for node, each in versions for version in each if fits(Version, version)]


def verify(store: Store, folder: str) -> list[Damage]:
    """Read every byte of a node and compare it with its manifest and commit marks.

    A node without a manifest is compared with the marks of the shards made so far. A file that cannot be read counts as
    damaged, and the others are still read.
    """
    found: list[Damage] = []
    there, manifest = dict[str, int](), None
    with _reported(store, found, Damage(folder, "", "cannot be listed")):
        there = store.files(folder, recursive=True)
    with _reported(store, found, Damage(folder, "manifest.json", "cannot be read")):
        if (manifest := manifest_at(store, folder)) is None and {"manifest.json", LAST_BUT_ONE} & set(there):
            why = NOT_OURS if "manifest.json" in there else LOST
            why = DANGLING if fits(Pointer, store.find_json(f"{folder}/manifest.json")) else why
            found.append(Damage(folder, "manifest.json", why))
    marks = {name.removeprefix("commits/").removesuffix(".json") for name in there if _is_mark(name)}
    if manifest and "at" in manifest:
        return found  # its files are another's, which is verified itself
    shards = manifest.get("shards", {}) if manifest else {name for name in marks if fits(ShardName, name)}
    listed = {file["name"]: file for file in manifest["files"]} if manifest else {}
    for shard in [] if folder.startswith("models/") else sorted(shards):
        found += _verify_shard(store, folder, shard, listed.pop(f"{shard}.tar", None))
    for name, file in listed.items():
        found += _compare(store, folder, name, file)
    return found


@contextmanager
def _reported(store: Store, found: list[Damage], damage: Damage) -> Iterator[None]:
    """Report unreadable files of a local store as damage; raise errors of an object store."""
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
    if mark is None or kind is ScoreMark:  # an evaluation's marks have no files
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
    """Delete the commit marks of some shards, and the manifest, so that the next run remakes them."""
    store.delete(f"{folder}/manifest.json")
    store.delete(f"{folder}/{LAST_BUT_ONE}")
    for shard in shards:
        store.delete(f"{folder}/{mark_path(shard)}")
