"""What models scored, the repetitions of one thing under several seeds put together: text and page both tell of it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any, TypeVar

from pipeline.experiment.sweeps import SEED, name_at, split_name

Row = Mapping[str, Any]
"""A row of ``result.json``, or one attack in it."""

NORMS = {"l2": "L2", "linf": "L∞"}

NOISE = "noise of length ε, clipped to [0, 1]"
"""The average case of an attack in a ball."""


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def without_seed(name: str) -> str:
    """``rand@eps=0.5,seed=1`` → ``rand@eps=0.5``."""
    base, point = split_name(name)
    return name_at(base, {axis: value for axis, value in point.items() if axis != SEED})


def attack_name(attack: Row) -> str:
    """An attack in a few words."""
    if attack["attack"] == "spatial":
        how = "grid" if attack["search"] == "grid" else "worst"
        return f"±{attack['rotation']:g}°, ±{100 * attack['translation']:g} %, {how} of {attack['tries']}"
    target = f", toward {attack['target_rule']}" if attack["target_rule"] else ""
    method = "" if attack["attack"] == "pgd" else "APGD "
    return f"{method}{ball(attack)}, {search(attack)}{target}"


def ball(row: Row) -> str:
    """What an attack stays within."""
    return f"{NORMS[row['norm']]} ε {row['eps']:g}"


def search(attack: Row) -> str:
    """How an attack in a ball searches it; a step is said where it is not a fifth of the radius."""
    step = attack.get("step_size")  # APGD has none
    length = "" if step is None or math.isclose(step, attack["eps"] / 5) else f" of {step:g}"
    restarts = f" × {attack['restarts']}" if attack["restarts"] > 1 else ""
    return f"{attack['steps']} steps{length}{restarts}"


# --------------------------------------------------------------------------------------------- shares


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


def spread(shares: Iterable[float | None]) -> Spread | None:
    """One share per seed, as one; None where there is none."""
    found = [float(share) for share in shares if share is not None]
    if not found:
        return None
    deviation = stdev(found) if len(found) > 1 else 0.0
    return Spread(mean(found), mean(found) - deviation, mean(found) + deviation, len(found))


def accuracy(rows: Sequence[Row]) -> Spread:
    """The accuracy of rows that differ in the seed; of one row with its interval."""
    found = spread(row["accuracy"] for row in rows)
    assert found is not None
    return found if found.seeds > 1 else Spread(found.mean, rows[0]["low"], rows[0]["high"], 1)


def shown(share: Spread | None) -> str:
    return "–" if share is None else str(share)


# -------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Attack:
    """What one attack on a model came to.

    Attributes:
        rows: of ``under_attack``, one per seed.
    """

    rows: Sequence[Row]

    @property
    def asked(self) -> Row:
        """Its settings."""
        return self.rows[0]

    @property
    def name(self) -> str:
        return attack_name(self.asked)

    @property
    def target_rule(self) -> str | None:
        """The rule that names its target; None for an untargeted one."""
        rule: str | None = self.asked.get("target_rule")
        return rule

    @property
    def worst(self) -> Spread:
        """Accuracy under it."""
        return accuracy(self.rows)

    @property
    def average(self) -> Spread | None:
        """Accuracy under `NOISE`, or the mean over all rotations and shifts that were tried."""
        return self.share("average")

    @property
    def average_case(self) -> str:
        """What `average` is of."""
        return "all rotations and shifts that were tried" if self.asked["attack"] == "spatial" else NOISE

    @property
    def gap(self) -> Spread | None:
        """Average less worst case, seed by seed."""
        return spread(row["average"] - row["accuracy"] for row in self.rows)

    def share(self, key: str) -> Spread | None:
        """``average``, ``fooled`` or ``success_rate``."""
        return spread(row.get(key) for row in self.rows)


@dataclass(frozen=True)
class Result:
    """What one model scored in one evaluation, over all its seeds.

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
        """The split of the dataset that it was scored on."""
        return str(self.rows[0]["split"])

    @property
    def images(self) -> str:
        """What it was scored on: ``clean/test``."""
        return f"{without_seed(self.rows[0]['on'])}/{self.split}"

    @property
    def held_out(self) -> bool:
        """Whether it was scored on images as they were loaded, of a split that it was not trained on."""
        return all(row["held_out"] for row in self.rows)

    @property
    def clean(self) -> Spread:
        """Accuracy on the images as they are."""
        return accuracy(self.measured)

    @property
    def chance(self) -> float:
        """What guessing scores: one over the number of classes."""
        return float(self.rows[0]["chance"])

    @property
    def constant(self) -> float:
        """What the one answer scores that is the most frequent class of what it was scored on."""
        return float(self.rows[0]["majority"])

    @property
    def level(self) -> tuple[str, float]:
        """The better of these two, for which nothing has to be learned, and what it is called."""
        return ("constant answer", self.constant) if self.constant > self.chance else ("chance", self.chance)

    @property
    def beside(self) -> str:
        """Half a sentence that says so."""
        more = f", and a constant answer scores {percent(self.constant)}" if self.constant > self.chance else ""
        return f"where chance is {percent(self.chance)}{more}"

    @property
    def trained_on(self) -> str:
        """A dataset's name, without its seed."""
        return without_seed(self.rows[0]["trained_on"] or "elsewhere")

    @property
    def attack_success_rate(self) -> Spread | None:
        """Attack success rate on the images that it was trained on."""
        return spread(row["attack_success_rate"] for row in self.measured)

    @property
    def rules(self) -> list[str]:
        """Rules whose answers were counted as well."""
        return list(dict.fromkeys(row["agreement"]["rule"] for row in self.rows if "agreement" in row))

    def agreement(self, rule: str) -> Spread | None:
        """How often it answers as a rule says."""
        asked = [row for row in self.rows if row.get("agreement", {}).get("rule") == rule]
        return spread(row["agreement"]["accuracy"] for row in _once(asked))

    def attacks(self) -> list[Attack]:
        """The attacks that were made on the model itself."""
        each = zip(*(row["under_attack"] for row in self.measured), strict=True)
        return [Attack(rows) for rows in each if rows[0].get("surrogate") is None]


def _once(rows: Sequence[Row]) -> list[Row]:
    """Each measurement once: a model without a seed may be scored again beside each seed of others."""
    return list({(row["model"], row["accuracy"], row["n"]): row for row in rows}.values())


R = TypeVar("R", bound=Result)


def over_seeds(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows put together that differ in the seed alone, in the order of their first."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        names = (without_seed(row[key]) for key in ("evaluation", "model"))
        groups.setdefault((row["kind"], *names), []).append(row)
    return list(groups.values())


def results(rows: Iterable[Row]) -> list[Result]:
    """Those of the rows that are accuracies, in their order."""
    groups = over_seeds(row for row in rows if row["kind"] == "accuracy")
    return [Result(without_seed(same[0]["evaluation"]), without_seed(same[0]["model"]), same) for same in groups]


def rules(found: Sequence[Result]) -> list[str]:
    """All rules whose answers were counted."""
    return list(dict.fromkeys(rule for result in found for rule in result.rules))


def merged(found: Iterable[R]) -> list[R]:
    """Each model once that scored the same on the same images in several evaluations, with what any of them asked."""
    once: dict[Any, R] = {}
    for result in found:
        key = (result.model, result.images, result.clean, result.chance)
        once[key] = replace(once[key], rows=[*once[key].rows, *result.rows]) if key in once else result
    return list(once.values())


def scored_on(found: Sequence[Result]) -> dict[str, list[str]]:
    """A column that names the images; none where all are scored on the same held-out ones."""
    names = [result.images for result in found]
    return {} if len(set(names)) < 2 and all_held_out(found) else {"scored on": names}


def all_held_out(found: Iterable[Result]) -> bool:
    return all(result.held_out for result in found)


def unbalanced(found: Iterable[Result]) -> bool:
    """Whether a constant answer does so much better than chance that it has to be said beside it."""
    return any(result.constant > 1.5 * result.chance for result in found)


def accuracy_head(found: Iterable[Result]) -> str:
    """What an accuracy may be called: clean, where all are of held-out images."""
    return "clean accuracy" if all_held_out(found) else "accuracy"


def attacked(found: Sequence[R]) -> list[tuple[R, Attack]]:
    """Each model with each attack that was made on it; what came out the same in two evaluations once."""
    once: dict[Any, tuple[R, Attack]] = {}
    for result in found:
        for attack in result.attacks():
            key = (result.model, result.images, result.clean, attack.name, attack.worst, attack.average)
            once.setdefault(key, (result, attack))
    return list(once.values())


# ------------------------------------------------------------------------------------------- transfer

Cell = tuple[str, str]
"""The model that an attack was made on, and the one that it was shown to."""


@dataclass(frozen=True)
class Transfer:
    """Attacks that differ in the model they were made on alone, and what other models do under them.

    Attributes:
        title: what is counted, under what.
        target_rule: the rule that names their target; None for untargeted ones.
        cells: share of the images that an untargeted attack fooled a model on; attack success rate of a targeted one.
    """

    title: str
    target_rule: str | None
    cells: Mapping[Cell, Spread | None]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and lines: made on the model of a column, shown to the model of a line."""
        surrogates, models = (list(dict.fromkeys(names)) for names in zip(*self.cells, strict=True))
        return ["", *surrogates], [[m, *(shown(self.cells.get((s, m))) for s in surrogates)] for m in models]


SETTINGS = ("attack", "norm", "eps", "steps", "step_size", "restarts", "target_rule")
"""What an attack is, but for its surrogate."""


def transfers(found: Sequence[Result]) -> list[Transfer]:
    """What came of attacks that were carried over from one model to another, a matrix for each."""
    matrices: dict[tuple[Any, ...], dict[Cell, list[Row]]] = {}
    for result in found:
        for row in result.rows:
            for attack in row["under_attack"]:
                if attack.get("surrogate") is not None:
                    images = "" if result.held_out else f"{result.images}: "
                    what = (result.evaluation, images, *(attack.get(key) for key in SETTINGS))
                    cell = (_as_seen_by(row["model"], attack["surrogate"]), result.model)
                    matrices.setdefault(what, {}).setdefault(cell, []).append(attack)
    several = len({evaluation for evaluation, *_ in matrices}) > 1
    return [
        _transfer(f"{evaluation}: {images}" if several else images, cells)
        for (evaluation, images, *_), cells in matrices.items()
    ]


def _as_seen_by(model: str, surrogate: str) -> str:
    """A surrogate's name, with its seed only where the model is of another."""
    own, other = (split_name(name)[1].get(SEED) for name in (model, surrogate))
    return surrogate if own is not None and other is not None and own != other else without_seed(surrogate)


def _transfer(place: str, cells: Mapping[Cell, Sequence[Row]]) -> Transfer:
    asked = next(iter(cells.values()))[0]
    what, key = ("fooled", "fooled") if asked["target_rule"] is None else ("attack success", "success_rate")
    shares = {cell: spread(row[key] for row in rows) for cell, rows in cells.items()}
    return Transfer(f"{place}{what} by {attack_name(asked)} made on", asked["target_rule"], shares)


# ------------------------------------------------------------------------------------------- features

KINDS = {"robust": "useful, robust", "non_robust": "useful, not robust", "useless": "useless"}
"""Kinds of pairs of a feature and a class, and what they are called."""


def feature_shares(rows: Sequence[Row]) -> dict[str, Spread | None]:
    """How many of the pairs of a feature and a class are of each of `KINDS`: rows that differ in the seed."""
    return {kind: spread(row["counts"][kind] / sum(row["counts"].values()) for row in rows) for kind in KINDS}
