"""A node of a store, copied to another store or to the Hugging Face Hub: resumable, the manifest last.

In another store a node has the same path, for its documents are sealed with it; `notbugs.open` reads it there.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.publish import card, croissant, pictures
from pipeline.run import artifacts
from pipeline.run.artifacts import Artifact
from pipeline.run.documents import fits
from pipeline.store import Store, at_once, digest, unsealed
from stages.errors import BadData, BadInput

MANIFEST = "manifest.json"

CARD = (pictures.NAME, croissant.NAME, card.NAME)
"""Files beside the manifest that it does not list."""

WORKERS = 4
"""Files in work at a time; each is held in memory."""


@dataclass(frozen=True)
class File:
    """A file of a node that is to be copied; its digest is None where no document has it."""

    name: str
    bytes: int
    sha256: str | None


@dataclass(frozen=True)
class Plan:
    """What a push would do.

    Attributes:
        dest: where the files go.
        send: files to copy, in order.
        there: number of files that are there already.
        delete: files at the destination that belong to another version.
    """

    dest: str
    send: Sequence[File]
    there: int
    delete: Sequence[str] = ()

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.send)


def files(store: Store, made: Artifact, marks: bool) -> list[File]:
    """The files of a node, in the order in which they are written: shards, the rest, the card, the manifest.

    Args:
        store, made: the node.
        marks: whether to include commit marks, each after its shard, and the shards' rows.

    Raises:
        BadData: a commit mark is missing or damaged.
    """
    listed = [File(name, file["bytes"], file["sha256"]) for name, file in made.files.items()]
    sizes = store.files(made.folder)
    beside = [File(name, sizes[name], None) for name in (*CARD, MANIFEST) if name in sizes]
    listed.sort(key=lambda file: (not file.name.endswith(".tar"), file.name))
    if not marks:
        return [*listed, *beside]
    names = sorted(made.manifest.get("shards", {}))
    shards = [file for each in at_once(lambda name: _shard(store, made, name), names) for file in each]
    return [*shards, *(file for file in listed if not file.name.endswith(".tar")), *beside]


def _shard(store: Store, made: Artifact, name: str) -> list[File]:
    """A shard, its rows and its commit mark; an evaluation has marks alone."""
    path, kind = artifacts.mark_path(name), artifacts.MARKS[made.manifest["group"]]
    content = store.find(f"{made.folder}/{path}")
    mark = None if content is None else unsealed(f"{made.folder}/{path}", content)
    if content is None or mark is None or not fits(kind, mark):
        raise BadData(f"{made.folder}/{path} is missing or damaged: `notbugs verify` withdraws it")
    last = File(path, len(content), digest(content))
    if "rows" not in mark:
        return [last]
    rows = File(artifacts.rows_path(name), mark["rows"]["bytes"], mark["rows"]["sha256"])
    return [File(f"{name}.tar", mark["bytes"], made.files[f"{name}.tar"]["sha256"]), rows, last]


def read(store: Store, made: Artifact, file: File) -> bytes:
    """The content of a file, checked against its digest if it has one.

    Raises:
        BadData: it is damaged.
    """
    content = store.find(f"{made.folder}/{file.name}")
    if content is None or (file.sha256 is not None and digest(content) != file.sha256):
        raise BadData(f"{store.at(made.folder)}/{file.name} is missing or damaged: `notbugs verify` says what else is")
    return content


def to_store(store: Store, made: Artifact, place: Store) -> Plan:
    """What is to be copied to another store: what has another size there, and, unless the same manifest is there, which
    was written last, every shard without the same commit mark. Cards are compared byte for byte.

    Raises:
        BadInput: the other store has the version with other bytes.
        BadData: a commit mark is damaged.
    """
    _refuse_other(made, place)
    there, every = place.files(made.folder, recursive=True), files(store, made, marks=True)
    alike = {file.name for file in every if there.get(file.name) == file.bytes}
    done = _equal(store, place, made.folder, alike & {*CARD, MANIFEST})
    if MANIFEST in done:
        done |= alike - set(CARD)
    else:
        marks = _equal(store, place, made.folder, {name for name in alike if _is_mark(name)})
        done |= marks | {name for name in alike if artifacts.mark_path(_stem(name)) in marks}
    send = [file for file in every if file.name not in done]
    return Plan(place.at(made.folder), send, len(every) - len(send))


def _equal(store: Store, place: Store, folder: str, names: set[str]) -> set[str]:
    """The files that have the same bytes in both stores."""
    paths = {f"{folder}/{name}": name for name in names}
    ours, theirs = store.find_all(paths), place.find_all(paths)
    return {name for path, name in paths.items() if ours[path] == theirs[path]}


def _is_mark(name: str) -> bool:
    return name.startswith("commits/") and name.endswith(".json")


def _stem(name: str) -> str:
    return name.removeprefix("commits/").rpartition(".")[0]


def _refuse_other(made: Artifact, place: Store) -> None:
    other = artifacts.manifest_at(place, made.folder)
    if other is not None and other["content"] != made.content:
        raise BadInput(f"{place.at(made.folder)} is the same version with other bytes: push to another place")


def copy(
    store: Store, made: Artifact, place: Store, plan: Plan, progress: Callable[[int, int], None] = lambda *_: None
) -> None:
    """Copy the files of a plan, and read each back.

    Raises:
        BadData: a file is damaged, or reads back with other bytes than were written.
    """

    def send(unit: Sequence[File]) -> int:
        for file in unit:
            place.put_and_read_back(f"{made.folder}/{file.name}", read(store, made, file))
        return len(unit)

    done = 0
    for units in _in_order(plan.send):
        with ThreadPoolExecutor(WORKERS) as pool:
            for sent in pool.map(send, units):
                done += sent
                progress(done, len(plan.send))
    place.tidy()


def _in_order(send: Sequence[File]) -> list[list[list[File]]]:
    """Files one after another, in units side by side: shards, each with its rows and then its mark; the rest; the
    manifest."""
    shards, rest = dict[str, list[File]](), list[list[File]]()
    for file in send:
        if file.name.endswith(".tar") or file.name.startswith("commits/"):
            shards.setdefault(_stem(file.name), []).append(file)
        elif file.name != MANIFEST:
            rest.append([file])
    return [list(shards.values()), rest, [[file for file in send if file.name == MANIFEST]]]
