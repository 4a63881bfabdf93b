"""A dataset in another format, at another place: resumable, verified, the same bytes every time.

The unit is a shard. Its files are written and read back, then comes its mark ``.export/<shard>.json``, which names
them; a second export skips the shards that have one. ``.export/done.json`` comes last.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pipeline.publish.formats import FORMATS, File
from pipeline.run import documents
from pipeline.run.artifacts import Artifact
from pipeline.run.documents import Count, Document, Sha
from pipeline.store import Store, at_once, digest
from stages.errors import BadInput

MARKS = ".export"

DONE = f"{MARKS}/done.json"


class Written(Document):
    """A file that was written."""

    name: str
    bytes: Count
    sha256: Sha


class Mark(Document):
    """What was made from which dataset, in which format."""

    made_from: str
    format: str
    files: list[Written]


@dataclass(frozen=True)
class Exported:
    """The outcome of an export.

    Attributes:
        files, bytes: number and size of the files at the destination, without marks.
        units, found: number of units, and of those that were there already.
    """

    files: int
    bytes: int
    units: int
    found: int


def export(
    store: Store,
    made: Artifact,
    to: str,
    place: Store,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Exported:
    """Write a dataset in another format.

    Args:
        store, made: the dataset.
        to: a key of `FORMATS`.
        place: the destination, a folder or a URL.
        progress: called after each unit with the number of units done, and of all.

    Raises:
        BadInput: the destination has other files, or the dataset cannot have this format.
        BadData: a shard is damaged, or a file that was written reads back with other bytes.
    """
    form, there = FORMATS[to](store, made), place.files("", recursive=True)
    asked = {"made_from": f"{made.folder} {made.content}", "format": to}
    marks = _marks(place, there, asked)

    def make(unit: str) -> list[dict[str, Any]]:
        if unit in marks:
            return marks[unit]
        files = [_put(place, file) for file in form.files(unit)]
        place.put_json(f"{MARKS}/{unit}.json", {**asked, "files": files})
        return files

    units, written = form.units(), dict[str, list[dict[str, Any]]]()
    with ThreadPoolExecutor(form.workers) as pool:
        try:
            for unit, files in zip(units, pool.map(make, units), strict=True):
                written[unit] = files
                progress(len(written), len(units))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    last = [_put(place, file) for file in form.last(written)]
    place.put_json(DONE, {**asked, "files": last})
    place.tidy()
    every = [file for files in written.values() for file in files] + last
    return Exported(len(every), sum(file["bytes"] for file in every), len(units), len(marks))


def _marks(place: Store, there: Mapping[str, int], asked: Mapping[str, str]) -> dict[str, list[dict[str, Any]]]:
    """Unit → files, of the units whose files all exist with the sizes of their mark.

    Raises:
        BadInput: the destination has other files.
    """
    paths = [path for path in there if path.startswith(f"{MARKS}/")]
    if there and not paths:
        raise BadInput(f"{place.url} has other files ({min(there)}): name an empty folder")
    found: dict[str, list[dict[str, Any]]] = {}
    marks = at_once(lambda path: documents.find(place, path, Mark), paths)
    for path, mark in zip(paths, marks, strict=True):
        if mark is None:
            continue  # damaged: its unit is written again
        if {name: mark[name] for name in asked} != asked:
            raise BadInput(f"{place.url} has {mark['made_from']} as {mark['format']}: name an empty folder")
        if path != DONE and all(there.get(file["name"]) == file["bytes"] for file in mark["files"]):
            found[path.removeprefix(f"{MARKS}/").removesuffix(".json")] = mark["files"]
    return found


def _put(place: Store, file: File) -> dict[str, Any]:
    """Write a file, read it back, and describe it.

    Raises:
        BadData: it reads back with other bytes.
    """
    name, content = file
    place.put_and_read_back(name, content)
    return {"name": name, "bytes": len(content), "sha256": digest(content)}
