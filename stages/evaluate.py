"""Evaluate models on a shard: sums that add up over shards, and the results from them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stages.adversarial_eval import Outcome, in_ball, in_space
from stages.device import computing
from stages.model import Classifier, logits_of
from stages.recipes import EvalAttack, Evaluate, Spatial
from stages.refused import explained
from stages.relabel import targets
from stages.shard import Shard

Sums = dict[str, dict[str, Any]]
"""Model → counts over some samples."""


def score(
    recipe: Evaluate,
    classes: Sequence[str],
    models: Mapping[str, Classifier],
    surrogates: Mapping[str, Classifier],
    shard: Shard,
) -> Sums:
    """Count each model's correct predictions on one shard: clean, under each attack, under each spatial attack.

    Args:
        recipe: the evaluation.
        classes: class names.
        models: models to evaluate, by name.
        surrogates: source models of transfer attacks, by name: all of `recipe.surrogates`.
        shard: images and labels.
    """
    with computing(recipe), explained(recipe, *models.values(), *surrogates.values()):
        answers = {
            name: logits_of(model, shard.images(), recipe.batch_size).argmax(1) for name, model in models.items()
        }
        attacks = [in_ball(attack, classes, models, surrogates, shard) for attack in recipe.attacks]
        attacks += [in_space(space, models, shard, recipe.batch_size) for space in recipe.spatial]
    return {
        name: _clean(recipe, classes, answer, shard) | _under(answer == shard.label, [each[name] for each in attacks])
        for name, answer in answers.items()
    }


def _clean(recipe: Evaluate, classes: Sequence[str], answers: np.ndarray, shard: Shard) -> dict[str, Any]:
    label, count = shard.label, len(classes)
    sums: dict[str, Any] = {
        "n": len(label),
        "right": int((answers == label).sum()),
        "right_per_class": np.bincount(label[answers == label], minlength=count).tolist(),
        "n_per_class": np.bincount(label, minlength=count).tolist(),
        "answers_per_class": np.bincount(answers, minlength=count).tolist(),
    }
    if recipe.confusion:
        sums["confusion"] = np.bincount(label * count + answers, minlength=count**2).reshape(count, count).tolist()
    if recipe.agreement is not None:
        other = targets(recipe.agreement, label, shard.index, classes)
        sums["agreeing"] = int((answers == other).sum())
    return sums


def _under(right_clean: np.ndarray, attacks: Sequence[Outcome]) -> dict[str, Any]:
    """Counts per attack.

    A prediction under attack counts as right only if the clean one is right too: a targeted attack whose target is the
    true label can correct an error, which is not robustness. So robust accuracy never exceeds clean accuracy.
    """
    return {
        "right_under": [int((right_clean & each.right).sum()) for each in attacks],
        "average_under": [int(each.average.sum()) for each in attacks],
        "aimed_under": [int(each.aimed.sum()) for each in attacks],
        "success_under": [int(each.success.sum()) for each in attacks],
    }


def add(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Add up the sums of one model over shards: numbers add, lists add entry by entry, and dicts key by key."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: _add([part[name] for part in parts if name in part]) for name in names}


def _add(values: Sequence[Any]) -> Any:
    match values[0]:
        case list():
            return [_add(entries) for entries in zip(*values, strict=True)]
        case dict():
            return add(values)
        case _:
            return sum(values)


def summary(recipe: Evaluate, classes: Sequence[str], sums: Mapping[str, Any]) -> dict[str, Any]:
    """The results of one model from its sums: accuracy with 95 % interval, per class, under attack, and chance."""
    n = sums["n"]
    attacks: list[EvalAttack | Spatial] = [*recipe.attacks, *recipe.spatial]
    low, high = wilson(sums["right"], n)
    said = {
        "kind": "accuracy",
        "accuracy": sums["right"] / n,
        "low": low,
        "high": high,
        "n": n,
        "chance": 1 / len(classes),
        "majority": max(sums["n_per_class"]) / n,
        "per_class": {
            name: {"accuracy": right / total if total else None, "n": total}
            for name, right, total in zip(classes, sums["right_per_class"], sums["n_per_class"], strict=True)
        },
        "under_attack": [_attacked(attack, at, sums) for at, attack in enumerate(attacks)],
    }
    if recipe.confusion:
        said["confusion"] = sums["confusion"]
    if recipe.agreement is not None:
        low, high = wilson(sums["agreeing"], n)
        said["agreement"] = {
            "rule": recipe.agreement.rule,
            "accuracy": sums["agreeing"] / n,
            "low": low,
            "high": high,
            "n": n,
        }
    return said


def _attacked(attack: EvalAttack | Spatial, at: int, sums: Mapping[str, Any]) -> dict[str, Any]:
    """The result of one attack: worst case, average case, and the fraction of correct predictions that it fooled."""
    n, right, draws = sums["n"], sums["right_under"][at], 1
    low, high = wilson(right, n)
    if isinstance(attack, EvalAttack):
        ball = {"norm", "eps", "steps"} | ({"step_size"} if attack.method == "pgd" else set())
        what = attack.model_dump(include=ball | {"restarts", "surrogate"})
        what |= {
            "attack": attack.method,
            "target_rule": None if attack.target_rule is None else attack.target_rule.rule,
        }
        if attack.target_rule is not None:
            what["success_rate"] = _share(sums["success_under"][at], sums["aimed_under"][at])
    else:
        draws = attack.candidates
        what = attack.model_dump(include={"rotation", "translation", "search"}) | {"attack": "spatial", "tries": draws}
    return what | {
        "accuracy": right / n,
        "low": low,
        "high": high,
        "n": n,
        "average": sums["average_under"][at] / (n * draws),
        "fooled": _share(sums["right"] - right, sums["right"]),
    }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def wilson(right: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927), which has good coverage near 0 and 1."""
    share = right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)
