"""Why a node is to be made again: what differs from what the store holds of it."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.experiment.graph import Node
from pipeline.run import artifacts, fingerprints
from pipeline.run.artifacts import Artifact
from pipeline.run.fingerprints import Change
from pipeline.run.jobs import ModelJob, ShardJob
from stages.errors import BadData, short

MOST = 20
"""Changed files that are named."""

SHOWN = 3
"""Those that a sentence names."""

MOVED = " has another version"
"""Ends what is said of an input of which that is all."""


@dataclass(frozen=True)
class Reason:
    """One difference.

    Attributes:
        kind: parameter, input, revision, file, files (their number, if more than `MOST` changed), or damage.
        key: the parameter, the role of the input, the stage, or the file.
        before, now: the values; versions or contents of an input; sizes of a file in bytes.
        text: a phrase for a person.
    """

    kind: str
    key: str
    before: Any
    now: Any
    text: str

    def as_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "key": self.key, "before": self.before, "now": self.now}


def sentence(reasons: Sequence[Reason]) -> str:
    """All reasons in one line, of files only the first."""
    files = [reason for reason in reasons if reason.kind == "file"]
    left = len(files[SHOWN:]) + sum(reason.now - MOST for reason in reasons if reason.kind == "files")
    named = [reason.text for reason in reasons if reason.kind not in ("file", "files")]
    moved = [text.removesuffix(MOVED) for text in named if text.endswith(MOVED)]
    if len(moved) > 1:
        all_moved = f"{', '.join(moved[:-1])} and {moved[-1]} have other versions"
        named = [all_moved, *(text for text in named if not text.endswith(MOVED))]
    named += [reason.text for reason in files[:SHOWN]]
    return "; ".join([*named, *([f"{left:,} more files"] if left else [])])


# ------------------------------------------------------------------------------- of the same version


def outdated(job: ShardJob | ModelJob, made: Artifact) -> list[Reason]:
    """Why an artifact of the job's version can no longer be used; empty if it can.

    Inputs that are not made yet, and files that are gone, are not compared.
    """
    before = artifacts.parents_of(made)
    inputs = [
        Reason("input", role, before.get(role), one.content, f"{job.node.inputs[role].id} has other content")
        for role, one in job.inputs.items()
        if "content" in one.manifest and before.get(role) != one.content
    ]
    return [*inputs, *_changed_files(job, made)]


def _changed_files(job: ShardJob | ModelJob, made: Artifact) -> list[Reason]:
    recorded, now, read = made.manifest.get("fingerprints", {}), job.fingerprints, job.context.check_files
    if not any(role in recorded and (read or recorded[role] != now[role]) for role in now):
        return []
    try:
        before = fingerprints.unpack(artifacts.read_file(job.context.store, made, fingerprints.RECORD))
    except (BadData, ValueError, pa.ArrowException):
        text = "the record of the files it was made from is damaged"
        return [Reason("damage", fingerprints.RECORD, None, None, text)]
    changes = fingerprints.changes(before, job.sources, read)
    if changes and not read and all(one.what == "changed" and one.before == one.now for one in changes):
        touched = frozenset(one.file for one in changes)
        changes = fingerprints.changes(before, job.sources_with_contents(touched), by_content=True)
    found = [Reason("file", one.file, one.before, one.now, _about(one)) for one in changes[:MOST]]
    more = f"{len(changes):,} files changed"
    return found + ([Reason("files", "", None, len(changes), more)] if len(changes) > MOST else [])


def _about(change: Change) -> str:
    sizes = f" ({change.before:,} → {change.now:,} bytes)" if change.what == "changed" else ""
    return f"{short(change.file)} was {change.what}{sizes if change.before != change.now else ''}"


# ------------------------------------------------------------------------------- of another version


def differences(job: ShardJob | ModelJob, among: Collection[str] | None = None) -> list[Reason]:
    """What differs from the newest artifact of the node's name; empty if there is none.

    Args:
        job: of the node.
        among: folders of the versions to compare with; by default all.
    """
    store, node = job.context.store, job.node
    known = artifacts.by_name(store, node.id)
    if any(one.manifest["version"] == node.version for one in known):
        return [Reason("damage", node.folder, None, None, "a file of it is missing or damaged")]
    known = [one for one in known if among is None or one.folder in among]
    if not known:
        return []
    before = store.find_json(f"{known[-1].folder}/recipe.json") or {}
    found = list(_compared(node, before))
    of_stage = [one for one in found if one[0] == "stage"]  # two stages have hardly a parameter in common
    return [_reason(node, *difference) for difference in of_stage or found]


def _compared(node: Node, before: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Key, old and new value of what differs between the recipe of a node and a stored one."""
    old, new = (dict(_flat(recipe)) for recipe in (before, node.described()))
    for key in sorted(old.keys() | new.keys()):
        values = [recipe[key] if key in recipe else _default(node, key) for recipe in (old, new)]
        if key != "version" and values[0] != values[1]:
            yield key, values[0], values[1]


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else name)
    elif not (isinstance(value, dict) or (value is None and key == "relabel")):
        yield key, value


def _default(node: Node, key: str) -> Any:
    """The value of a parameter that a recipe leaves out."""
    group, _, name = key.partition(".")
    recipe = node.relabel if group == "relabel" else node.recipe if group == "parameters" else None
    field = type(recipe).model_fields.get(name) if recipe is not None else None
    default = (
        field.get_default(call_default_factory=True, validated_data={}) if field and not field.is_required() else None
    )
    return default


def _reason(node: Node, key: str, before: Any, now: Any) -> Reason:
    group, _, name = key.partition(".")
    change = f"was {_value(before)}, is {_value(now)}"
    match group:
        case "inputs" if now is None:
            return Reason("input", name, before, now, f"it no longer has an input {name}")
        case "inputs":
            what = " is new" if before is None else MOVED
            return Reason("input", name, before, now, f"{node.inputs[name].id}{what}")
        case "revisions":
            return Reason("revision", name, before, now, f"the code of {name} has a new revision")
        case "parameters":
            return Reason("parameter", name, before, now, f"{name} {change}")
    return Reason("parameter", key, before, now, f"{key} {change}")


def _value(value: Any) -> str:
    return "not set" if value is None else short(json.dumps(value, ensure_ascii=False))
