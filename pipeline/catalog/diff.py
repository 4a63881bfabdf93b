"""Differences between two versions of a node, or between two runs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.catalog import describe, words
from pipeline.catalog.listing import Entry
from pipeline.report import results
from pipeline.report.scores import attack_name
from pipeline.run import artifacts
from pipeline.run.artifacts import Artifact
from pipeline.store import Store
from stages.errors import BadData, BadInput


@dataclass(frozen=True)
class Change:
    """A value that differs.

    Attributes:
        key: its path, such as ``attacks.0.eps``.
        a, b: the two values; None if there is none.
    """

    key: str
    a: Any
    b: Any

    @property
    def difference(self) -> float | None:
        """b − a of two numbers."""
        if isinstance(self.a, bool) or isinstance(self.b, bool):
            return None
        return self.b - self.a if isinstance(self.a, int | float) and isinstance(self.b, int | float) else None

    def as_json(self) -> dict[str, Any]:
        return {"key": self.key, "a": self.a, "b": self.b, "difference": self.difference}


Difference = dict[str, list[Change]]
"""Kind of difference → the values that differ, in the order of the file."""


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Path → value of every leaf of a JSON value."""
    if isinstance(value, Mapping):
        pairs = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list):
        pairs = [(str(number), inner) for number, inner in enumerate(value)]
    else:
        return {path: value}
    return {way: leaf for key, inner in pairs for way, leaf in flat(inner, f"{path}.{key}" if path else key).items()}


def changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Change]:
    """The leaves that differ between two JSON objects."""
    one, other = flat(a), flat(b)
    return [
        Change(key, one.get(key), other.get(key)) for key in {**one, **other} if not _same(one.get(key), other.get(key))
    ]


def _same(a: Any, b: Any) -> bool:
    """Equality of two leaves, in which a figure that was computed twice may differ in its last digits."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-12)
    return type(a) is type(b) and bool(a == b)


def of_versions(store: Store, a: Entry, b: Entry) -> Difference:
    """Differences of two finished versions: the recipe's parameters, the inputs' versions, the figures.

    Raises:
        BadInput: one is a dataset and the other a model, for example.
        BadData: a file is damaged.
    """
    if a.group != b.group:
        raise BadInput(f"{a.node} and {b.node} differ in kind: compare two of the {a.group}, or two of the {b.group}")
    (recipe_a, made_a), (recipe_b, made_b) = (_read(store, entry) for entry in (a, b))
    return {
        "recipe": changes(_asked(recipe_a), _asked(recipe_b)),
        "inputs": changes(dict(a.parents), dict(b.parents)),
        "figures": changes(figures(store, a, made_a), figures(store, b, made_b)),
        "content": changes({"sha256": a.content}, {"sha256": b.content}),
    }


def _read(store: Store, entry: Entry) -> tuple[dict[str, Any], Artifact]:
    made = artifacts.artifact_at(store, entry.folder)
    if made is None:
        raise BadData(f"{entry.folder}/manifest.json is missing or damaged: run its experiment again")
    return words.recipe_file(store, made), made


def _asked(file: Mapping[str, Any]) -> dict[str, Any]:
    """What an experiment asked for, under the keys of its file, and the revisions of the code."""
    rule = {"relabel": file["relabel"]} if file["relabel"] is not None else {}
    return {file["stage"]: file["parameters"], **rule, "revisions": file["revisions"]}


def figures(store: Store, entry: Entry, made: Artifact) -> dict[str, Any]:
    """The measurements of a version, by name."""
    manifest = made.manifest
    if entry.group == "models":
        last = describe.training(store, made) or {}
        return {key: last[key] for key in ("loss", "accuracy", "test_accuracy") if key in last}
    if entry.group == "evaluations":
        return of_rows(describe.rows(store, entry), evaluation=False)
    keys = ("counts", "failures", "success_rate", "l2_mean", "linf_max", "distance_mean", "majority")
    return {key: manifest[key] for key in keys if key in manifest} | {"bytes": entry.bytes}


def of_rows(rows: describe.Rows, evaluation: bool = True) -> dict[str, float]:
    """The figures of evaluations' rows: evaluation, model, images, and what was measured → share."""
    found: dict[str, float] = {}
    for row in rows:
        name = f"{row['evaluation']}: " if evaluation else ""
        name += f"{row['model']} on {row['on']} {row['split']}"
        if row["kind"] == "usefulness":
            found |= {f"{name}, {kind} features": count for kind, count in row["counts"].items()}
            continue
        found[f"{name}, accuracy"] = row["accuracy"]
        found |= {f"{name}, {attack_name(attack)}": attack["accuracy"] for attack in row["under_attack"]}
        if "agreement" in row:
            found[f"{name}, agreement with {row['agreement']['rule']}"] = row["agreement"]["accuracy"]
    return found


def of_runs(store: Store, a: Mapping[str, Any], b: Mapping[str, Any]) -> Difference:
    """Differences of two runs on record: the experiments, the versions and states of the nodes, the results.

    Raises:
        BadData: a result is damaged.
    """
    versions = [{node: p["version"] for node, p in run["nodes"].items()} for run in (a, b)]
    states = [{node: p["state"] for node, p in run["nodes"].items()} for run in (a, b)]
    shares = [of_rows(results.result_rows(store, run)) for run in (a, b)]
    return {
        "recipe": changes(a["experiment"], b["experiment"]),
        "versions": changes(*versions),
        "states": [Change(c.key, c.a, c.b) for c in changes(*states) if {c.a, c.b} != {"done", "cached"}],
        "figures": changes(*shares),
    }
