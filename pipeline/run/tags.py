"""Tags: names that people give to versions.

Each is a document of its own, ``tags/<group>/<name>/<tag>.json``, so that two people who tag at the same time do not
overwrite each other's.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from pipeline.run import documents
from pipeline.run.documents import Document, Moment, NodeId, Sha, TagName, Version, fits
from pipeline.store import Store, at_once
from stages.errors import BadData, BadInput

ROOT = "tags"


class Tag(Document):
    """A name for one version of a node. The content digest shows whether it was made again with other bytes."""

    tag: TagName
    node: NodeId
    version: Version
    content: Sha
    made: Moment


def path_of(node: str, tag: str) -> str:
    """Where a tag of ``<group>/<name>`` stands in the store."""
    return f"{ROOT}/{node}/{tag}.json"


def find(store: Store, node: str, tag: str) -> dict[str, Any] | None:
    """A tag of ``<group>/<name>``; None if there is none.

    Raises:
        BadData: it is damaged.
    """
    if not fits(TagName, tag):
        return None
    path = path_of(node, tag)
    found = documents.find(store, path, Tag)
    if found is None and store.find(path) is not None:
        raise BadData(f"{store.at(path)} is damaged: set the tag again with `notbugs tag --force`")
    return found


def every(store: Store, below: str = ROOT) -> dict[str, dict[str, Any] | None]:
    """All tags below a folder, by path; None for each that is damaged."""
    names = [f"{below}/{path}" for path in store.files(below, recursive=True) if path.endswith(".json")]
    return dict(zip(names, at_once(lambda path: documents.find(store, path, Tag), names), strict=True))


def by_folder(found: Mapping[str, dict[str, Any] | None]) -> dict[str, list[str]]:
    """``<group>/<name>/<version>`` → its tags, of the result of `every`."""
    tags: dict[str, list[str]] = {}
    for tag in found.values():
        if tag is not None:
            tags.setdefault(f"{tag['node']}/{tag['version']}", []).append(tag["tag"])
    return tags


def put(store: Store, folder: str, content: str, tag: str, force: bool = False) -> None:
    """Give a version a tag.

    Args:
        store: the store.
        folder: ``<group>/<name>/<version>``.
        content: its content digest.
        tag: the tag.
        force: move the tag if another version has it.

    Raises:
        BadInput: the tag is no name, or another version has it.
    """
    node, _, version = folder.rpartition("/")
    if not fits(TagName, tag) or fits(Version, tag):
        raise BadInput(
            f"{tag!r} is no tag: a tag has letters, digits, `_`, `.` and `-`, begins with a letter or digit, has at "
            "most 64 characters and does not look like a version"
        )
    there = None if force else find(store, node, tag)
    if there is not None and (there["version"], there["content"]) != (version, content):
        other = there["version"] if there["version"] != version else "the same version with other bytes"
        raise BadInput(f"{node} has the tag {tag} already, for {other}: choose another tag, or move it with --force")
    if there is None:
        made = datetime.now(UTC).isoformat(timespec="seconds")
        value = {"tag": tag, "node": node, "version": version, "content": content, "made": made}
        store.put_json(path_of(node, tag), value)


def remove(store: Store, node: str, tag: str) -> None:
    """Take a tag away.

    Raises:
        BadInput: there is none.
    """
    if not fits(TagName, tag) or store.find(path_of(node, tag)) is None:
        raise BadInput(f"{node} has no tag {tag}")
    store.delete(path_of(node, tag))
