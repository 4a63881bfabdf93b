"""Accuracies averaged over seeds: the results that the text tables and the page have in common."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any, TypeVar

from pipeline.experiment.sweeps import SEED, name_at, split_name

Row = Mapping[str, Any]
"""A row of ``result.json``, or one attack in it."""

NOISE = "noise of length ε, clipped to [0, 1]"
"""The average case of an attack in a ball."""

SUCCESS, SUCCESS_RATE = "attack success", "attack success rate"
"""The share of images that a model classifies as the target class of an attack: as a heading, and in a sentence."""


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def without_seed(name: str) -> str:
    """``rand@eps=0.5,seed=1`` → ``rand@eps=0.5``."""
    base, point = split_name(name)
    return name_at(base, {axis: value for axis, value in point.items() if axis != SEED})


def norm_name(norm: str) -> str:
    """``l2`` → ``L2``, ``linf`` → ``L∞``."""
    return norm.upper().replace("INF", "∞")


def attack_name(attack: Row) -> str:
    """An attack in a few words, such as ``L2 ε 0.5, 7 steps``."""
    if attack["attack"] == "spatial":
        how = "grid" if attack["search"] == "grid" else "worst"
        return f"±{attack['rotation']:g}°, ±{100 * attack['translation']:g} %, {how} of {attack['tries']}"
    toward = f", toward {attack['target_rule']}" if attack["target_rule"] else ""
    method = "" if attack["attack"] == "pgd" else f"{attack['attack'].upper()} "
    return f"{method}{ball(attack)}, {search_settings(attack)}{toward}"


def ball(row: Row) -> str:
    """The ball of an attack: ``L2 ε 0.5``."""
    return f"{norm_name(row['norm'])} ε {row['eps']:g}"


def search_settings(attack: Row) -> str:
    """Steps and restarts of an attack in a ball; the step size only where it is not ε / 5, the default."""
    step = attack.get("step_size")  # APGD has none
    length = "" if step is None or math.isclose(step, attack["eps"] / 5) else f" of {step:g}"
    restarts = f" × {attack['restarts']}" if attack["restarts"] > 1 else ""
    return f"{attack['steps']} steps{length}{restarts}"


# --------------------------------------------------------------------------------------------- shares


@dataclass(frozen=True)
class OverSeeds:
    """A share measured once or under several seeds.

    Attributes:
        mean: mean over the seeds.
        low, high: with one seed, the 95 % interval if there is one, else the mean; with several seeds, mean ∓ standard
            deviation.
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
        """The 95 % interval, or the number of seeds."""
        if self.seeds > 1:
            return f"{self.seeds} seeds"
        return "–" if self.low == self.high else f"{percent(self.low)} – {percent(self.high)}"


def over_seeds(shares: Iterable[float | None]) -> OverSeeds | None:
    """Mean and standard deviation of one share per seed; None if no seed has one."""
    known = [float(share) for share in shares if share is not None]
    if not known:
        return None
    deviation = stdev(known) if len(known) > 1 else 0.0
    return OverSeeds(mean(known), mean(known) - deviation, mean(known) + deviation, len(known))


def accuracy(rows: Sequence[Row]) -> OverSeeds:
    """Accuracy over rows that differ only in the seed; a single row keeps its 95 % interval."""
    result = over_seeds(row["accuracy"] for row in rows)
    assert result is not None
    return result if result.seeds > 1 else OverSeeds(result.mean, rows[0]["low"], rows[0]["high"], 1)


def shown(share: OverSeeds | None) -> str:
    return "–" if share is None else str(share)


# -------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class AttackResult:
    """The result of one attack on a model.

    Attributes:
        rows: of ``under_attack``, one per seed.
    """

    rows: Sequence[Row]

    @property
    def settings(self) -> Row:
        return self.rows[0]

    @property
    def spatial(self) -> bool:
        """Whether it rotates and shifts the image, rather than moving in a ball."""
        return bool(self.settings["attack"] == "spatial")

    @property
    def name(self) -> str:
        return attack_name(self.settings)

    @property
    def target_rule(self) -> str | None:
        """The rule that names the target class; None for an untargeted attack."""
        rule: str | None = self.settings.get("target_rule")
        return rule

    @property
    def worst(self) -> OverSeeds:
        """Robust accuracy: accuracy under the attack."""
        return accuracy(self.rows)

    @property
    def average(self) -> OverSeeds | None:
        """Accuracy under `NOISE`, or averaged over all rotations and shifts tried."""
        return self.share("average")

    @property
    def average_case(self) -> str:
        """What `average` averages over."""
        return "all rotations and shifts tried" if self.spatial else NOISE

    @property
    def gap(self) -> OverSeeds | None:
        """Average case minus worst case, seed by seed."""
        return over_seeds(row["average"] - row["accuracy"] for row in self.rows)

    def share(self, key: str) -> OverSeeds | None:
        """``average``, ``fooled`` or ``success_rate``."""
        return over_seeds(row.get(key) for row in self.rows)


@dataclass(frozen=True)
class Result:
    """The score of one model in one evaluation, over all seeds.

    Attributes:
        evaluation, model: their names, without seeds.
        rows: of ``result.json``, one per seed.
    """

    evaluation: str
    model: str
    rows: Sequence[Row]

    @property
    def measured(self) -> Sequence[Row]:
        """The rows, each measurement once."""
        return _once(self.rows)

    @property
    def split(self) -> str:
        """The split of the dataset that the model was scored on."""
        return str(self.rows[0]["split"])

    @property
    def images(self) -> str:
        """Dataset and split that the model was scored on: ``clean/test``."""
        return f"{without_seed(self.rows[0]['on'])}/{self.split}"

    @property
    def held_out(self) -> bool:
        """Whether the images are untouched and of a split that the model was not trained on."""
        return all(row["held_out"] for row in self.rows)

    @property
    def clean(self) -> OverSeeds:
        """Accuracy without an attack."""
        return accuracy(self.measured)

    @property
    def chance(self) -> float:
        """Accuracy of guessing: one over the number of classes."""
        return float(self.rows[0]["chance"])

    @property
    def constant(self) -> float:
        """Accuracy of always answering the most frequent class."""
        return float(self.rows[0]["majority"])

    @property
    def level(self) -> tuple[str, float]:
        """The better of these two baselines: its name and its accuracy."""
        return ("constant prediction", self.constant) if self.constant > self.chance else ("chance", self.chance)

    @property
    def beside(self) -> str:
        """The baselines as half a sentence."""
        more = f", and a constant prediction scores {percent(self.constant)}" if self.constant > self.chance else ""
        return f"where chance is {percent(self.chance)}{more}"

    @property
    def trained_on(self) -> str:
        """The dataset's name, without its seed; of pretrained weights, that they are."""
        return without_seed(self.rows[0]["trained_on"] or "pretrained")

    @property
    def success(self) -> OverSeeds | None:
        """Attack success rate of the dataset that the model was trained on."""
        return over_seeds(row["attack_success_rate"] for row in self.measured)

    @property
    def rules(self) -> list[str]:
        """Label rules that the model was also scored against."""
        return list(dict.fromkeys(row["agreement"]["rule"] for row in self.rows if "agreement" in row))

    def agreement(self, rule: str) -> OverSeeds | None:
        """Accuracy against the labels of a rule, in place of the true ones."""
        scored = [row for row in self.rows if row.get("agreement", {}).get("rule") == rule]
        return over_seeds(row["agreement"]["accuracy"] for row in _once(scored))

    def attacks(self) -> list[AttackResult]:
        """Attacks made on the model itself, not transferred from another."""
        each = zip(*(row["under_attack"] for row in self.measured), strict=True)
        return [AttackResult(rows) for rows in each if rows[0].get("surrogate") is None]


def _once(rows: Sequence[Row]) -> list[Row]:
    """Each measurement once: a model without a seed may be scored again beside each seed of others."""
    return list({(row["model"], row["accuracy"], row["n"]): row for row in rows}.values())


R = TypeVar("R", bound=Result)


def by_seed(rows: Iterable[Row]) -> list[list[Row]]:
    """Groups of rows that differ only in the seed, in the order of their first rows."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        names = (without_seed(row[key]) for key in ("evaluation", "model"))
        groups.setdefault((row["kind"], *names), []).append(row)
    return list(groups.values())


def results(rows: Iterable[Row]) -> list[Result]:
    """The accuracies among the rows, averaged over seeds."""
    groups = by_seed(row for row in rows if row["kind"] == "accuracy")
    return [Result(without_seed(same[0]["evaluation"]), without_seed(same[0]["model"]), same) for same in groups]


def rules(scores: Sequence[Result]) -> list[str]:
    """All label rules that any model was also scored against."""
    return list(dict.fromkeys(rule for result in scores for rule in result.rules))


def merged(scores: Iterable[R]) -> list[R]:
    """One result for each model and its images, where several evaluations measured the same accuracy."""
    once: dict[Any, R] = {}
    for result in scores:
        key = (result.model, result.images, result.clean, result.chance)
        once[key] = replace(once[key], rows=[*once[key].rows, *result.rows]) if key in once else result
    return list(once.values())


def all_held_out(scores: Iterable[Result]) -> bool:
    return all(result.held_out for result in scores)


def unbalanced(scores: Iterable[Result]) -> bool:
    """Whether a constant prediction beats chance so clearly that tables must show it."""
    return any(result.constant > 1.5 * result.chance for result in scores)


def attacked(scores: Sequence[R]) -> list[tuple[R, AttackResult]]:
    """Each model with each attack on it; equal outcomes of two evaluations once."""
    once: dict[Any, tuple[R, AttackResult]] = {}
    for result in scores:
        for attack in result.attacks():
            key = (result.model, result.images, result.clean, attack.name, attack.worst, attack.average)
            once.setdefault(key, (result, attack))
    return list(once.values())


# -------------------------------------------------------------------------------------------- columns

Columns = dict[str, list[str]]
"""Heading → a cell per line. The text tables and the page choose from the same columns."""


def scored_on(scores: Sequence[Result]) -> Columns:
    """The images of each result; no column if all were scored on the same held-out images."""
    names = [result.images for result in scores]
    return {} if len(set(names)) < 2 and all_held_out(scores) else {"scored on": names}


def accuracy_head(scores: Iterable[Result]) -> str:
    """The heading of accuracies: only those on held-out images are called clean."""
    return "clean accuracy" if all_held_out(scores) else "accuracy"


def result_columns(scores: Sequence[Result]) -> Columns:
    """Accuracy of every model, with its interval and baselines; the evaluation where one model has several results."""
    columns: Columns = {
        "evaluation": [result.evaluation for result in scores],
        **scored_on(scores),
        "trained on": [result.trained_on for result in scores],
        SUCCESS: [shown(result.success) for result in scores],
        "learner": [result.model for result in scores],
        accuracy_head(scores): [str(result.clean) for result in scores],
        "95 % interval": [result.clean.interval for result in scores],
        "chance": [percent(result.chance) for result in scores],
        "constant prediction": [percent(result.constant) for result in scores],
    }
    if len({(result.model, result.images) for result in scores}) == len(scores):
        del columns["evaluation"]
    if not unbalanced(scores):
        del columns["constant prediction"]
    return columns | {
        agreement_head(rule): [shown(result.agreement(rule)) for result in scores] for rule in rules(scores)
    }


def agreement_head(rule: str) -> str:
    return f"agrees with {rule}"


def attack_columns(pairs: Sequence[tuple[R, AttackResult]]) -> Columns:
    """Average beside worst case: noise beside the attack, the mean transformation beside the worst."""
    columns: Columns = {
        "model": [result.model for result, _ in pairs],
        **scored_on([result for result, _ in pairs]),
        "under": [attack.name for _, attack in pairs],
        "average case": [shown(attack.average) for _, attack in pairs],
        "worst case": [str(attack.worst) for _, attack in pairs],
        "gap": [shown(attack.gap) for _, attack in pairs],
    }
    if any(attack.target_rule for _, attack in pairs):
        columns[SUCCESS] = [shown(attack.share("success_rate")) for _, attack in pairs]
    return columns


# ------------------------------------------------------------------------------------------- transfer

Cell = tuple[str, str]
"""The source model of a transfer attack, and the model that it was transferred to."""


@dataclass(frozen=True)
class Transfer:
    """Transfer attacks that differ only in their source model, and their success on each model.

    Attributes:
        title: what is counted, and the attack.
        target_rule: the rule that names the target class; None for untargeted attacks.
        cells: fooling rate of an untargeted attack, or attack success rate of a targeted one.
    """

    title: str
    target_rule: str | None
    cells: Mapping[Cell, OverSeeds | None]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and lines: a column per source model, a line per attacked model."""
        sources, models = (list(dict.fromkeys(names)) for names in zip(*self.cells, strict=True))
        return ["", *sources], [[m, *(shown(self.cells.get((s, m))) for s in sources)] for m in models]


SETTINGS = ("attack", "norm", "eps", "steps", "step_size", "restarts", "target_rule")
"""The settings of an attack, without its source model."""


def transfers(scores: Sequence[Result]) -> list[Transfer]:
    """A matrix of source and attacked models for each transfer attack."""
    matrices: dict[tuple[Any, ...], dict[Cell, list[Row]]] = {}
    for result in scores:
        for row in result.rows:
            for attack in row["under_attack"]:
                if attack.get("surrogate") is not None:
                    images = "" if result.held_out else f"{result.images}: "
                    key = (result.evaluation, images, *(attack.get(setting) for setting in SETTINGS))
                    cell = (_as_seen_by(row["model"], attack["surrogate"]), result.model)
                    matrices.setdefault(key, {}).setdefault(cell, []).append(attack)
    several = len({evaluation for evaluation, *_ in matrices}) > 1
    return [
        _transfer(f"{evaluation}: {images}" if several else images, cells)
        for (evaluation, images, *_), cells in matrices.items()
    ]


def _as_seen_by(model: str, source: str) -> str:
    """The source model's name, with its seed only if the attacked model has another."""
    own, other = (split_name(name)[1].get(SEED) for name in (model, source))
    return source if own is not None and other is not None and own != other else without_seed(source)


def _transfer(place: str, cells: Mapping[Cell, Sequence[Row]]) -> Transfer:
    settings = next(iter(cells.values()))[0]
    counted, key = ("fooling rate", "fooled") if settings["target_rule"] is None else (SUCCESS_RATE, "success_rate")
    shares = {cell: over_seeds(row[key] for row in rows) for cell, rows in cells.items()}
    return Transfer(f"{place}{counted} of {attack_name(settings)} made on", settings["target_rule"], shares)


# ------------------------------------------------------------------------------------------- features

FEATURES = {"robust": "useful, robust", "non_robust": "useful, not robust", "useless": "useless"}
"""Kinds of feature–class pairs in ``counts``, and their headings."""


def feature_shares(rows: Sequence[Row]) -> dict[str, OverSeeds | None]:
    """Share of the feature–class pairs that are of each of `FEATURES`, over rows that differ only in the seed."""
    return {kind: over_seeds(row["counts"][kind] / sum(row["counts"].values()) for row in rows) for kind in FEATURES}
