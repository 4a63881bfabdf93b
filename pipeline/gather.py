"""What a run left in the store, read once, with the repetitions of one thing under several seeds put together."""

import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline import published
from pipeline.graph import Node, build
from pipeline.report import over_seeds, percent, result_rows, without_seed
from pipeline.spec import parse
from pipeline.store import Store
from pipeline.sweeps import split_name

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Spread:
    """A share measured once or under several seeds.

    Attributes:
        mean: mean over the seeds.
        low, high: a 95 % interval where it was measured once and has one; mean ∓ standard deviation over several
            seeds; else the mean.
        seeds: number of seeds.
    """

    mean: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        if self.seeds == 1:
            return percent(self.mean)
        return f"{100 * self.mean:.1f} ± {100 * (self.high - self.mean):.1f} %"

    @property
    def interval(self) -> str:
        """Its range, as a person reads it."""
        if self.seeds > 1:
            return f"{self.seeds} seeds"
        return "–" if self.low == self.high else f"{percent(self.low)} – {percent(self.high)}"


def spread(rows: Iterable[Row], key: str = "accuracy") -> Spread | None:
    """A share over several rows; None where none of them has it."""
    found = [row for row in rows if row.get(key) is not None]
    values = [float(row[key]) for row in found]
    if not values:
        return None
    if len(values) > 1:
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        return Spread(mean, mean - deviation, mean + deviation, len(values))
    ends = found[0] if key == "accuracy" else {}
    return Spread(values[0], ends.get("low", values[0]), ends.get("high", values[0]), 1)


@dataclass(frozen=True)
class Score:
    """What one model scored in one evaluation, over all its seeds.

    Attributes:
        evaluation, model: their names, without seeds.
        base: the model's name without its place in a sweep.
        axes: that place, without the seed.
        node: the model; of several seeds, the first.
        rows: of ``result.json``, one per seed.
    """

    evaluation: str
    model: str
    base: str
    axes: Mapping[str, str]
    node: Node
    rows: list[Row]

    @property
    def kind(self) -> str | None:
        """What it is in the words of the paper."""
        return published.kind(self.node)

    @property
    def clean(self) -> Spread:
        """Accuracy on the images as they are."""
        found = spread(self.rows)
        assert found is not None
        return found

    @property
    def chance(self) -> float:
        """What the better of guessing and a constant answer scores."""
        return float(max(self.rows[0]["chance"], self.rows[0]["majority"]))

    def attacks(self) -> list[list[Row]]:
        """The attacks it was scored under; for each, what it came to under each seed."""
        each = [row.get("under_attack") or [] for row in self.rows]
        return [list(same) for same in zip(*each, strict=False)]


class Gathered:
    """What a run left in the store.

    Attributes:
        store, run: the store, and the run's record.
        nodes: id → node, each after those it is made from.
        manifests: id → manifest of those that are there.
        metrics: id → the lines of ``metrics.jsonl`` of models that are there.
        scores: results, seeds put together.
        usefulness: rows of evaluations of features.
    """

    def __init__(self, store: Store, run: Mapping[str, Any]) -> None:
        self.store, self.run = store, run
        self.nodes = {node.id: node for node in build(parse(run["experiment"])) if node.id in run["nodes"]}
        there = [node for node in self.nodes if run["nodes"][node]["state"] in ("done", "cached")]
        found = store.find_all([f"{self.folder(node)}/{name}" for node in there for name in _files(node)])
        self.manifests: dict[str, Row] = {}
        self.metrics: dict[str, list[Row]] = {}
        for node in there:
            if content := found[f"{self.folder(node)}/manifest.json"]:
                self.manifests[node] = json.loads(content)
            if content := found.get(f"{self.folder(node)}/metrics.jsonl"):
                self.metrics[node] = [json.loads(line) for line in content.splitlines()]
        rows = result_rows(store, run)
        self.scores = _scores([row for row in rows if row["kind"] == "accuracy"], self.nodes)
        self.usefulness = [row for row in rows if row["kind"] == "usefulness"]

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


def _files(node: str) -> list[str]:
    return ["manifest.json", "metrics.jsonl"] if node.startswith("models/") else ["manifest.json"]


def _scores(rows: list[Row], nodes: Mapping[str, Node]) -> list[Score]:
    """One score for all rows that differ in the seed alone, in the order of the rows."""
    found = []
    for same in over_seeds(rows):
        evaluation, model = (without_seed(same[0][key]) for key in ("evaluation", "model"))
        found.append(Score(evaluation, model, *split_name(model), nodes[f"models/{same[0]['model']}"], same))
    return found
