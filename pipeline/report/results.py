"""What a run left in the store, read once."""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pipeline.experiment.graph import Node, build
from pipeline.experiment.spec import parse
from pipeline.experiment.sweeps import split_name
from pipeline.report import published
from pipeline.report.scores import Result, Row, over_seeds, results, without_seed
from pipeline.report.tables import result_rows
from pipeline.run import artifacts
from pipeline.run.artifacts import Artifact
from pipeline.store import READERS, Store


@dataclass(frozen=True)
class Score(Result):
    """What a model scored, and what is known of it besides.

    Attributes:
        node, on: the model, and the dataset that it was scored on; of several seeds, the first.
    """

    node: Node
    on: Node

    @property
    def base(self) -> str:
        """The model's name without its place in a sweep."""
        return split_name(self.model)[0]

    @property
    def axes(self) -> Mapping[str, str]:
        """That place, without the seed."""
        return split_name(self.model)[1]

    @property
    def kind(self) -> str | None:
        """What it is in the words of the paper."""
        return published.kind(self.node)

    @property
    def data(self) -> str | None:
        """The published data that it was trained and scored on; None where it is another."""
        data = published.data_of(self.node)
        return data if data == published.data_of(self.on) else None


class Gathered:
    """What a run left in the store.

    Attributes:
        store, run: the store, and the run's record.
        nodes: id → node, each after those it is made from.
        manifests: id → manifest of those that are there.
        metrics: id → the lines of ``metrics.jsonl`` of models that are there.
        scores: results, seeds put together.
        held_out: those on images as they were loaded, of a split that was not trained on: what a model is judged by.
        usefulness: rows of evaluations of features, seeds put together.
    """

    def __init__(self, store: Store, run: Mapping[str, Any]) -> None:
        self.store, self.run = store, run
        self.nodes = {node.id: node for node in build(parse(run["experiment"])) if node.id in run["nodes"]}
        there = [node for node in self.nodes if run["nodes"][node]["state"] in ("done", "cached")]
        with ThreadPoolExecutor(READERS) as pool:
            found = list(pool.map(lambda node: artifacts.manifest_at(store, self.folder(node)), there))
        self.manifests: dict[str, Row] = {node: one for node, one in zip(there, found, strict=True) if one is not None}
        self.metrics: dict[str, list[Row]] = {node: self._metrics(node) for node in self.manifests if _is_model(node)}
        rows = result_rows(store, run)
        self.scores = [self._score(one) for one in results(rows)]
        self.held_out = [score for score in self.scores if score.held_out]
        self.usefulness = over_seeds(row for row in rows if row["kind"] == "usefulness")

    def _score(self, one: Result) -> Score:
        row = one.rows[0]
        on = self.nodes[f"evaluations/{row['evaluation']}"].inputs["on"]
        return Score(one.evaluation, one.model, one.rows, self.nodes[f"models/{row['model']}"], on)

    def _metrics(self, node: str) -> list[Row]:
        """The lines of ``metrics.jsonl``.

        Raises:
            BadData: they are not those that were published.
        """
        content = artifacts.read_file(
            self.store, Artifact(self.folder(node), dict(self.manifests[node])), "metrics.jsonl"
        )
        return [json.loads(line) for line in content.splitlines()]

    def folder(self, node: str) -> str:
        """The place in the store of what the run used, or made."""
        return f"{node}/{self.run['nodes'][node]['version']}"

    def state(self, node: str) -> str:
        return str(self.run["nodes"][node]["state"])

    def datasets(self, *stages: str) -> list[Node]:
        """Datasets that are there and were made by some stages; of several seeds, the first."""
        return self._first(lambda node: node.stage in stages)

    def models(self) -> list[Node]:
        """Models that are there and were trained; of several seeds, the first."""
        return self._first(lambda node: node.stage == "train")

    def _first(self, wanted: Callable[[Node], bool]) -> list[Node]:
        found: dict[str, Node] = {}
        for node in self.nodes.values():
            if node.id in self.manifests and wanted(node):
                found.setdefault(without_seed(node.name), node)
        return list(found.values())


def _is_model(node: str) -> bool:
    return node.startswith("models/")
