"""Score models on a shard: sums that add up over shards, and what the sums say."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stages.attack import logits_of, logits_under_attack
from stages.model import Classifier, threads
from stages.recipes import Evaluate, Perturbation
from stages.relabel import targets
from stages.shard import Shard

Sums = dict[str, dict[str, Any]]
"""Model → what was counted on some samples."""


def score(recipe: Evaluate, classes: Sequence[str], models: Mapping[str, Classifier], shard: Shard) -> Sums:
    """Count what each model gets right on one shard, clean and under each attack."""
    with threads(1):
        return {name: _score_one(recipe, classes, model, shard) for name, model in models.items()}


def _score_one(recipe: Evaluate, classes: Sequence[str], model: Classifier, shard: Shard) -> dict[str, Any]:
    clean, label = shard.images(), shard.label
    answers = logits_of(model, clean, recipe.batch_size).argmax(1)
    count = len(classes)
    sums: dict[str, Any] = {
        "n": len(label),
        "right": int((answers == label).sum()),
        "right_per_class": np.bincount(label[answers == label], minlength=count).tolist(),
        "n_per_class": np.bincount(label, minlength=count).tolist(),
        "answers_per_class": np.bincount(answers, minlength=count).tolist(),
        "right_under": [],
    }
    if recipe.agreement is not None:
        other = targets(recipe.agreement, label, shard.index, classes)
        sums["agreeing"] = int((answers == other).sum())
    for ball in recipe.attacks:
        sums["right_under"].append(int((logits_under_attack(model, ball, clean, label).argmax(1) == label).sum()))
    return sums


def add(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Add up the sums of one model over shards."""
    first = parts[0]
    return {
        name: [sum(values) for values in zip(*(p[name] for p in parts), strict=True)]
        if isinstance(first[name], list)
        else sum(p[name] for p in parts)
        for name in first
    }


def summary(recipe: Evaluate, classes: Sequence[str], sums: Mapping[str, Any]) -> dict[str, Any]:
    """What the sums of one model say: accuracies with 95 % intervals, per class, under attack, and chance."""
    n = sums["n"]
    low, high = wilson(sums["right"], n)
    said = {
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
        "under_attack": [
            _under(ball, right, n) for ball, right in zip(recipe.attacks, sums["right_under"], strict=True)
        ],
    }
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


def _under(ball: Perturbation, right: int, n: int) -> dict[str, Any]:
    low, high = wilson(right, n)
    what = {"norm": ball.norm, "eps": ball.eps, "steps": ball.steps, "step_size": ball.step}
    return what | {"accuracy": right / n, "low": low, "high": high, "n": n}


def wilson(right: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927): it stays inside [0, 1] and is honest near its ends."""
    share = right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)
