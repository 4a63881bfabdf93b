"""One version from what a person calls it."""

from collections.abc import Sequence

from pipeline.catalog import listing
from pipeline.catalog.listing import Entry
from pipeline.experiment.graph import GROUPS
from pipeline.run import artifacts, removals, tags
from pipeline.store import Store, at_once
from stages.errors import BadInput, did_you_mean, some


def known(store: Store) -> list[str]:
    """The names of a store's nodes: both ``rand`` and ``datasets/rand``."""
    return [name for group in GROUPS for base in store.folders(group) for name in (base, f"{group}/{base}")]


def versions(store: Store, name: str) -> list[Entry]:
    """The versions that a name stands for, finished or not, the newest first; empty if there are none.

    Raises:
        BadData: a tag is damaged.
    """
    folders = artifacts.named(store, name)
    nodes = sorted({folder.rpartition("/")[0] for folder in folders})
    found = at_once(lambda node: tags.by_folder(tags.every(store, f"{tags.ROOT}/{node}")), nodes)
    marked = {folder: names for each in found for folder, names in each.items()}
    return listing.newest_first(at_once(lambda f: listing.entry(store, f, marked.get(f, ())), folders))


def refusal(store: Store, name: str, others: Sequence[str] = (), what: str = "node") -> str:
    """The sentence about a name that stands for nothing.

    Args:
        store: the store.
        name: the name.
        others: further names that may have been meant.
        what: what was asked for.
    """
    base, _, version = name.rpartition("/")
    if base not in ("", *GROUPS) and (there := versions(store, base)):
        listed = some([" ".join([each.version, *(f"({tag})" for tag in each.tags)]) for each in there])
        return f"{base} in {store.url} has no version or tag {version}; it has {listed}"
    return f"{store.url} has no {what} named {name}{did_you_mean(name, [*known(store), *others])}"


def one(store: Store, name: str, finished: bool = True) -> Entry:
    """The newest version that a name stands for.

    Args:
        store: the store.
        name: as of `artifacts.named`.
        finished: pass over versions without a valid manifest.

    Raises:
        BadInput: there is none, or the name stands for nodes of several groups.
        BadData: a tag is damaged.
    """
    found = versions(store, name)
    if not found:
        raise BadInput(refusal(store, name))
    fit = [each for each in found if each.state == listing.FINISHED or not finished]
    if not fit:
        raise BadInput(f"{found[0].folder} is {found[0].state}: run its experiment again")
    if len(nodes := sorted({each.node for each in fit})) > 1:
        raise BadInput(f"{name} may be {' or '.join(nodes)}: give the whole name")
    return fit[0]


def tag(store: Store, name: str, version: str, given: str, force: bool = False) -> Entry:
    """Give a finished version a tag; returns the version.

    Args:
        store: the store.
        name: ``rand`` or ``datasets/rand``.
        version: a version of it, the first digits of one, or a tag.
        given: the tag.
        force: move the tag if another version has it.

    Raises:
        BadInput: there is no such version, or the tag is taken.
    """
    entry = one(store, f"{name}/{version}")
    tags.put(store, entry.folder, entry.content, given, force)
    if path := removals.condemned(store).get(entry.folder):  # a removal that began before the tag was there
        removals.wait(store, path, entry.folder)
    if artifacts.manifest_at(store, entry.folder) is None:
        tags.remove(store, entry.node, given)
        raise BadInput(f"{entry.folder} was removed meanwhile by `notbugs gc`: run its experiment again")
    return entry
