"""Statistics of a shard that add up, and what a dataset's manifest says of their sums."""

import io
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.run import artifacts
from stages.images import histogram
from stages.shard import Shard, split_of

REASONS = 10
"""Most reasons for leaving images out that a manifest lists, each with its count."""

Sums = Mapping[str, Any]


def statistics(shard: Shard) -> dict[str, Any]:
    """Sums over a shard that add up over a dataset: exact integers for pixels, counts for the attack."""
    sums, attack = dict[str, Any](), shard.attack
    if shard.pixels is not None:
        sums["shape"] = [shard.pixels.shape[3], *shard.pixels.shape[1:3]]
        sums["pixels"] = int(np.prod(shard.pixels.shape[:3]))
        levels, counts = np.arange(256), histogram(shard.pixels)
        sums["sums"], sums["squares"] = (counts @ levels).tolist(), (counts @ levels**2).tolist()
    if "success" in attack:
        sums["successes"] = int(attack["success"].sum())
    if "success_step" in attack:
        steps = attack["success_step"]
        sums["successes_at"] = np.bincount(steps[steps >= 0]).tolist()
    if "distance" in attack:
        sums["distance"] = float(attack["distance"].astype(np.float64).sum())
    if "l2" in attack:
        sums["l2"], sums["linf"] = float(attack["l2"].sum()), float(attack["linf"].max(initial=0))
        # At their target from the start are those whose target is the true class, or was the model's answer at once.
        aimed = (shard.label != shard.source_label) & (attack.get("success_step", np.array(-1)) != 0)
        sums["aimed"], sums["moved"] = int(aimed.sum()), int((aimed & (attack["l2"] > 0)).sum())
    return sums


def totals(marks: Mapping[str, Sums], steps: int) -> dict[str, Any]:
    """Counts and statistics of a dataset, for its manifest.

    Args:
        marks: the commit mark of each shard.
        steps: steps after which the attack on an image may have succeeded.
    """
    counts = artifacts.per_split((name, mark["samples"]) for name, mark in marks.items())
    named = [(name, mark["statistics"]) for name, mark in marks.items()]
    each = [sums for _, sums in named]
    shapes = {tuple(sums["shape"]) if "shape" in sums else None for sums in each}
    shape = next(iter(shapes)) if len(shapes) == 1 else None
    found: dict[str, Any] = {
        "counts": counts,
        "failures": sum(mark["failures"] for mark in marks.values()),
        "shards": {name: mark["samples"] for name, mark in sorted(marks.items())},
        "image_shape": list(shape) if shape else None,
        "members": [next(iter(marks.values()))["suffix"], "cls", "json"],
    }
    if shape:  # split by split: no pixel of the test split enters a model
        of_splits = {split: [one for name, one in named if split_of(name) == split] for split in counts}
        values = {split: _normalisation(some) for split, some in of_splits.items() if counts[split]}
        found["mean"], found["std"] = ({split: value[i] for split, value in values.items()} for i in (0, 1))
    for key, reduced in REDUCED.items():
        if all(key in sums for sums in each):
            found |= reduced(each, sum(counts.values()), steps)
    return found


def _normalisation(each: Sequence[Sums]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel."""
    from stages.tensors import channel_statistics

    sums, squares = (np.sum([one[key] for one in each], axis=0).tolist() for key in ("sums", "squares"))
    return channel_statistics(sums, squares, sum(one["pixels"] for one in each))


def _success_rate(each: Sequence[Sums], total: int, steps: int) -> dict[str, Any]:
    return {"success_rate": sum(one["successes"] for one in each) / total}


def _success_by_step(each: Sequence[Sums], total: int, steps: int) -> dict[str, Any]:
    length = max(steps + 1, *(len(one["successes_at"]) for one in each))
    at = np.sum([np.pad(one["successes_at"], (0, length - len(one["successes_at"]))) for one in each], axis=0)
    return {"success_by_step": [round(share, 6) for share in (at.cumsum() / total).tolist()]}


def _distance(each: Sequence[Sums], total: int, steps: int) -> dict[str, Any]:
    return {"distance_mean": sum(one["distance"] for one in each) / total}


def _perturbation(each: Sequence[Sums], total: int, steps: int) -> dict[str, Any]:
    return {"l2_mean": sum(one["l2"] for one in each) / total, "linf_max": max(one["linf"] for one in each)}


REDUCED: Mapping[str, Callable[[Sequence[Sums], int, int], dict[str, Any]]] = {
    "successes": _success_rate,
    "successes_at": _success_by_step,
    "distance": _distance,
    "l2": _perturbation,
}
"""Statistic that every shard has → the entries of the manifest made from it, given the samples and the steps."""


def most(counts: Mapping[str, int]) -> dict[str, int]:
    """The largest of some counts, and the sum of the others."""
    order = sorted(counts.items(), key=lambda one: (-one[1], one[0]))
    return dict(order[:REASONS]) | ({"others": sum(n for _, n in order[REASONS:])} if order[REASONS:] else {})


def left_out(table: bytes) -> dict[str, Any]:
    """Why images were left out, if any were, the most frequent reason first: a summary of ``samples.parquet``.

    Reasons that differ only in their numbers count as one. The first image of each stands for all.
    """
    errors = pq.read_table(io.BytesIO(table), columns=["error"])["error"].drop_null().to_pylist()
    first, count = dict[str, dict[str, Any]](), Counter[str]()
    for place, _, reason in (one.partition(": ") for one in errors):
        kind = re.sub(r"[\d.,]+", "", reason)
        first.setdefault(kind, {"reason": reason, "first": place})
        count[kind] += 1
    listed = [{**first[kind], "images": images} for kind, images in count.most_common(REASONS)]
    if rest := len(errors) - sum(count[kind] for kind, _ in count.most_common(REASONS)):
        listed.append({"reason": "other reasons", "images": rest})
    return {"left_out": listed} if listed else {}
