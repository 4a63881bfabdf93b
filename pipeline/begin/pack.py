"""Pack a source: load it into the store, then lay its shards, table and manifest down in one folder."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from pipeline import terminal
from pipeline.experiment.spec import Experiment
from pipeline.launch import RunOptions, prepare
from pipeline.run import artifacts
from pipeline.run.artifacts import Artifact
from pipeline.run.jobs import Context
from pipeline.store import LARGEST_JSON, Store, digest
from stages.errors import BadData, BadInput, some

MANIFEST = "manifest.json"

COPIES = 4
"""Files that are copied concurrently; each is held in memory, as every shard is while it is made."""


def refuse_foreign(version: str, dest: Store) -> None:
    """Refuse a folder with another dataset.

    Args:
        version: of the dataset that is to lie there.
        dest: the folder.

    Raises:
        BadInput: it has the manifest of another.
    """
    if (content := dest.find(MANIFEST, LARGEST_JSON)) is None:
        return
    try:
        there = json.loads(content)
    except (ValueError, RecursionError):
        there = None
    if not isinstance(there, dict) or there.get("version") != version:
        raise BadInput(f"{dest.url} holds another dataset already: name an empty folder, or empty it")


def make(experiment: Experiment, context: Context, options: RunOptions) -> Artifact:
    """Make the one dataset of an experiment, with a record in the store as of any run.

    Raises:
        BadInput: its source, or the store, is missing or unfit.
        BadData: it cannot be made; finished shards are kept.
    """
    attempt, begin, display = prepare(experiment, context, options, cards=False)
    (node,) = attempt.nodes
    terminal.if_interrupted("Finished shards are kept; the same command continues.")
    working = begin()
    try:
        attempt.go(working, display)
    finally:
        working.close()
    if node.id not in attempt.made:
        raise BadData(f"{attempt.record.nodes[node.id].why}; the same command continues")
    return attempt.made[node.id]


def lay_down(store: Store, made: Artifact, dest: Store, report: Callable[[int, int], None]) -> int:
    """Copy the files of a dataset that a folder lacks, each verified, the manifest last.

    Args:
        store: where the dataset is.
        made: the dataset.
        dest: the folder.
        report: called with the files done and the files in all.

    Returns:
        The number of files that were there already.

    Raises:
        BadInput: the folder holds other shards.
        BadData: a file of the store is damaged; its mark is withdrawn, so that packing again makes it anew.
    """
    there = dest.files("")
    if others := sorted(name for name in there if name.endswith(".tar") and name not in made.files):
        raise BadInput(
            f"{dest.url} holds shards of another dataset, {some(others, 3)}: name an empty folder, or empty it"
        )

    def copy(name: str) -> bool:
        file = made.files[name]
        if there.get(name) == file["bytes"] and digest(dest.read(name)) == file["sha256"]:
            return False
        dest.put(name, artifacts.read_file(store, made, name, take_back=name.endswith(".tar")))
        return True

    copied = 0
    with ThreadPoolExecutor(COPIES) as pool:
        for done, new in enumerate(pool.map(copy, sorted(made.files)), 1):
            copied += new
            report(done, len(made.files))
    dest.put(MANIFEST, store.read(f"{made.folder}/{MANIFEST}"))
    return len(made.files) - copied
