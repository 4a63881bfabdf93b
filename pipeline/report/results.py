"""The results that a run left in the store, checked as they are read."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from pipeline.experiment.graph import Node, build
from pipeline.experiment.spec import parse
from pipeline.experiment.sweeps import split_name
from pipeline.report import published
from pipeline.report.scores import OverSeeds, Result, Row, by_seed, over_seeds, results, without_seed
from pipeline.run import artifacts, documents
from pipeline.run.artifacts import Artifact
from pipeline.run.documents import Amount, Count, Document, NodeName, Share, Word
from pipeline.store import Store, at_once

# ---------------------------------------------------------------------------------------- result.json


Norm = Annotated[str, StringConstraints(pattern="^l([0-9]{1,2}|inf)$")]


class _Scored(Document):
    """A share of n images, with its 95 % interval."""

    accuracy: Share
    low: Share
    high: Share
    n: Count


class _Agreement(_Scored):
    rule: Word


class _OfClass(Document):
    accuracy: Share | None
    n: Count


class _Attacked(_Scored):
    average: Share
    fooled: Share | None


class _InBall(_Attacked):
    attack: Word
    norm: Norm
    eps: Amount
    steps: Count
    step_size: Amount | None = None
    restarts: Count
    surrogate: NodeName | None
    target_rule: Word | None
    success_rate: Share | None = None


class _Spatial(_Attacked):
    attack: Literal["spatial"]
    rotation: Amount
    translation: Amount
    search: Literal["grid", "random"]
    tries: Count


class _Row(Document):
    evaluation: NodeName
    on: NodeName
    split: Word
    held_out: bool
    model: NodeName
    trained_on: NodeName | None


class _Accuracy(_Row, _Scored):
    kind: Literal["accuracy"]
    chance: Share
    majority: Share
    per_class: dict[str, _OfClass]
    under_attack: list[_InBall | _Spatial]
    confusion: list[list[Count]] | None = None
    agreement: _Agreement | None = None


class _Usefulness(_Row):
    kind: Literal["usefulness"]
    n: Count
    attacked: Count
    norm: Norm
    eps: Amount
    steps: Count
    useful: Share
    features: Count
    classes: list[str]
    useful_from: list[Share | None]
    counts: dict[Word, Count]
    features_by_best_class: dict[Word, Count]
    points: list[tuple[Count, Count, float, float]]


class Results(Document):
    """``result.json``: a row per model."""

    rows: list[Annotated[_Accuracy | _Usefulness, Field(discriminator="kind")]]


def result_rows(store: Store, run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per finished evaluation and model of a run: the output of `notbugs show --json`.

    Each has ``kind``, ``evaluation``, the dataset ``on`` and its ``split``, ``held_out`` (whether the images are
    untouched and of a split that the model was not trained on), ``model`` and ``trained_on``. Rows of kind accuracy
    have ``accuracy``, ``low``, ``high`` (a 95 % interval), ``n``, ``attack_success_rate`` (attack success rate of the
    dataset trained on), ``chance``, ``majority``, ``per_class``, ``under_attack`` and, if requested, ``agreement`` and
    ``confusion`` (images of each true class, one list per class, by predicted class).
    Rows of kind usefulness have ``counts`` and ``points``.

    Raises:
        BadData: a result is damaged.
    """
    nodes, rows, success = run["nodes"], [], dict[str | None, float | None]()
    for node, progress in nodes.items():
        if node.startswith("evaluations/") and progress["state"] in ("done", "cached"):
            for row in _rows_of(store, run, node):
                if (on := row["trained_on"]) not in success:  # many rows of a sweep go back to one dataset
                    success[on] = dataset_manifest(store, run, on).get("success_rate")
                rows.append({"kind": "accuracy", **row, "attack_success_rate": success[on]})
    return rows


def _rows_of(store: Store, run: Mapping[str, Any], node: str) -> list[dict[str, Any]]:
    """The rows of an evaluation; of one that points at another's, with this run's names in the place of the other's."""
    folder = f"{node}/{run['nodes'][node]['version']}"
    manifest = artifacts.manifest_at(store, folder) or {}
    rows: list[dict[str, Any]] = documents.read(store, f"{manifest.get('at', folder)}/result.json", Results)["rows"]
    if "at" not in manifest:
        return rows
    asked = next(one for one in build(parse(run["experiment"])) if one.id == node)
    learned = {role.removeprefix("models."): one.inputs.get("on") for role, one in asked.inputs.items()}
    names = {model: on.name if on else None for model, on in learned.items()}
    own = {"evaluation": asked.name, "on": asked.inputs["on"].name}
    return [row | own | {"trained_on": names[row["model"]]} for row in rows]


def dataset_manifest(store: Store, run: Mapping[str, Any], name: str | None) -> Mapping[str, Any]:
    """The manifest of a run's dataset; empty if it is not there."""
    progress = run["nodes"].get(f"datasets/{name}")
    return (progress and artifacts.manifest_at(store, f"datasets/{name}/{progress['version']}")) or {}


# --------------------------------------------------------------------------------- results with nodes


RISING = 0.05
"""Share of its training labels that a model learns in its last epoch where its training ended too early."""


@dataclass(frozen=True)
class Score(Result):
    """A result together with its nodes.

    Attributes:
        node, on: the model, and the dataset that it was scored on; of several seeds, the first.
        fit: its accuracy on its own training labels after the last epoch; None if that is not known.
        fit_before: the same one epoch earlier.
    """

    node: Node
    on: Node
    fit: OverSeeds | None = None
    fit_before: OverSeeds | None = None

    @property
    def base(self) -> str:
        """The model's name without its place in a sweep."""
        return split_name(self.model)[0]

    @property
    def axes(self) -> Mapping[str, str]:
        """Its place in a sweep, without the seed: axis → value."""
        return split_name(self.model)[1]

    @property
    def kind(self) -> str | None:
        """The paper's name for the model."""
        return published.kind(self.node)

    @property
    def halfway(self) -> float:
        """The accuracy halfway from the better baseline to all images."""
        return (1 + self.level[1]) / 2

    @property
    def at_baseline(self) -> bool:
        """Whether it is no better than the better baseline, within its interval."""
        return self.clean.low <= self.level[1]

    @property
    def fitted(self) -> bool:
        """Whether it was trained enough to show what its training set teaches: it fits its labels at least halfway
        from the better baseline to all of them, and learned few of them in its last epoch. True if that is unknown."""
        return self.fit is None or (self.fit.mean >= self.halfway and not self.learning)

    @property
    def learning(self) -> bool:
        """Whether its training ended while it still learned its labels: `RISING` or more of them in the last epoch, and
        no more than are left."""
        if self.fit is None or self.fit_before is None:
            return False
        gain = self.fit.mean - self.fit_before.mean
        return RISING <= gain <= 1 - self.fit.mean

    @property
    def data(self) -> str | None:
        """The published data that the model was both trained and scored on; None for any other."""
        data = published.data_of(self.node)
        return data if data == published.data_of(self.on) else None


class RunResults:
    """The results of a run, read from the store.

    Attributes:
        store, run: the store, and the run's record.
        nodes: id → node, each after its inputs.
        manifests: id → manifest of the finished nodes.
        metrics: id → lines of ``metrics.jsonl`` of the finished models.
        scores: accuracies, averaged over seeds.
        held_out: those on untouched images of a split that was not trained on; verdicts rest on these alone.
        usefulness: rows of feature evaluations, grouped by seed.
    """

    def __init__(self, store: Store, run: Mapping[str, Any]) -> None:
        self.store, self.run = store, run
        self.nodes = {node.id: node for node in build(parse(run["experiment"])) if node.id in run["nodes"]}
        finished = [node for node in self.nodes if run["nodes"][node]["state"] in ("done", "cached")]
        self.manifests: dict[str, Row] = {}
        manifests = at_once(lambda node: artifacts.manifest_at(store, self.folder(node)), finished)
        pairs = zip(finished, manifests, strict=True)
        self.manifests |= {node: manifest for node, manifest in pairs if manifest is not None}
        self.metrics: dict[str, list[Row]] = {node: self._metrics(node) for node in self.manifests if _is_model(node)}
        rows = result_rows(store, run)
        self.scores = [self._score(result) for result in results(rows)]
        self.held_out = [score for score in self.scores if score.held_out]
        self.usefulness = by_seed(row for row in rows if row["kind"] == "usefulness")

    def _score(self, result: Result) -> Score:
        row = result.rows[0]
        on = self.nodes[f"evaluations/{row['evaluation']}"].inputs["on"]
        curves = [self.metrics.get(f"models/{row['model']}") or [] for row in result.measured]
        fit, before = (over_seeds(_fit(curve, epoch) for curve in curves) for epoch in (-1, -2))
        return Score(
            result.evaluation, result.model, result.rows, self.nodes[f"models/{row['model']}"], on, fit, before
        )

    def _metrics(self, node: str) -> list[Row]:
        """The lines of ``metrics.jsonl``.

        Raises:
            BadData: they are not those that were published.
        """
        content = artifacts.read_file(self.store, Artifact.of(self.folder(node), self.manifests[node]), "metrics.jsonl")
        return [json.loads(line) for line in content.splitlines()]

    def folder(self, node: str) -> str:
        """The folder in the store of the version that the run used or made, under this name or another."""
        own = f"{node}/{self.run['nodes'][node]['version']}"
        return str(self.manifests[node].get("at", own)) if node in self.manifests else own

    def state(self, node: str) -> str:
        return str(self.run["nodes"][node]["state"])

    def datasets(self) -> list[Node]:
        """Finished datasets; of several seeds, the first."""
        return self._first(lambda node: node.group == "datasets")

    def models(self) -> list[Node]:
        """Finished models; of several seeds, the first."""
        return self._first(lambda node: node.group == "models")

    def _first(self, fits: Callable[[Node], bool]) -> list[Node]:
        first: dict[str, Node] = {}
        for node in self.nodes.values():
            if node.id in self.manifests and fits(node):
                first.setdefault(without_seed(node.name), node)
        return list(first.values())


def _fit(curve: list[Row], epoch: int) -> float | None:
    """Accuracy on the training labels after the last epoch (-1), or an earlier one."""
    return curve[epoch].get("accuracy") if len(curve) >= -epoch else None


def _is_model(node: str) -> bool:
    return node.startswith("models/")
