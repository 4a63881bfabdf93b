"""Usefulness and robust usefulness of features (Ilyas et al. 2019, section 2), from sums over shards.

For a feature f with mean 0 and standard deviation 1, and y = ±1 for one class against the rest: usefulness
ρ = E[y f(x)], robust usefulness γ = E[inf y f(x + δ)] over a ball. Normalisation is a positive affine map: it preserves
the argmin and argmax over the ball, so it can be applied after summing.

ρ needs no attack and is estimated on the whole split: on a hundred images, a feature independent of the class has a |ρ|
of .1 by chance, as much as a useful one. The attack is costly and runs on few images; the decrease of y f varies little
between images, and γ is ρ minus its mean.

A feature is useful for a class above a threshold on ρ. ρ is a covariance with y, whose standard deviation is
2√(p(1 − p)) for a class with a fraction p of the images, and thus bounded by it. The threshold is a fraction of this
bound, so that it means the same for ten classes and for a thousand. A useful feature is robust if γ > 0; otherwise it
is not γ-robustly useful for any γ > 0.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.device import computing, sent
from stages.errors import BadData
from stages.evaluate import Sums
from stages.features import Penultimate
from stages.inference import optimized
from stages.model import Classifier
from stages.pgd import Descent, graphs
from stages.recipes import Usefulness
from stages.refused import explained
from stages.shard import Shard
from stages.targeted_pgd import entry
from stages.tensors import in_batches, to_unit

CONSTANT = 1e-10  # variance of a constant feature in float32, by rounding, relative to its mean square
KINDS = ("robust", "non_robust", "useless")


def measure(
    recipe: Usefulness, classes: Sequence[str], models: Mapping[str, Classifier], shard: Shard, limit: int
) -> Sums:
    """Sums over one shard for each model's features: for normalisation, for usefulness, or both.

    Args:
        recipe: the settings; of its `limit`, this shard has the part `limit`.
        classes: class names.
        models: by name.
        shard: of split `recipe.normalise` or `recipe.split`, which may be the same.
        limit: number of leading images to attack in a shard of `recipe.split`; the others count for ρ only.

    Returns:
        Model → sums, which `evaluate.add` adds up over shards.

    Raises:
        BadInput: a model has no such features.
        BadData: a feature is NaN or infinite.
    """
    with computing(recipe), explained(recipe, *models.values()):
        return {name: _measure(recipe, len(classes), model, shard, limit) for name, model in models.items()}


def _measure(recipe: Usefulness, count: int, model: Classifier, shard: Shard, limit: int) -> dict[str, Any]:
    features = Penultimate(optimized(model, recipe, recipe.layer), recipe.layer)
    pixels = shard.images()
    clean = _features(features, pixels, recipe.batch_size)
    sums: dict[str, Any] = {}
    if shard.split == recipe.normalise:
        sums["normalise"] = {"n": len(clean), "f": clean.sum(0).tolist(), "ff": (clean**2).sum(0).tolist()}
    if shard.split == recipe.split:
        sums["n_per_class"] = np.bincount(shard.label, minlength=count).tolist()
        sums["f"] = _by_class(shard.label, clean)
        some = clean[:limit]
        low, high = _extremes(features, recipe, pixels[:limit], some)
        sums["attacked"] = len(some)
        sums["fall"], sums["rise"] = (_by_class(shard.label[:limit], by) for by in (some - low, high - some))
    return sums


def _by_class(label_N: np.ndarray, value_ND: np.ndarray) -> dict[str, list[float]]:
    """Sums per class, for classes that occur in the shard."""
    return {str(k): value_ND[label_N == k].sum(0).tolist() for k in np.unique(label_N)}


def _features(features: Penultimate, pixels: np.ndarray, batch_size: int) -> np.ndarray:
    """The features of clean images, N × D, float64."""

    @torch.no_grad()
    def one(some: np.ndarray) -> np.ndarray:
        return np.asarray(features(to_unit(some, features.model.mean.device)).double().cpu())

    clean = in_batches(one, batch_size, pixels)
    if not np.isfinite(clean).all():
        raise BadData(f"the features of the model ({features.model.design.arch}) are NaN or infinite for some images")
    return clean


def _extremes(
    features: Penultimate, recipe: Usefulness, pixels: np.ndarray, clean_ND: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest value found for each feature in the ball around each image: N × D each.

    A batch holds triples of an image, a feature and a sign, each with a search of its own; one pass through the network
    serves them all. The clean image counts too, so that no attack improves a feature.
    """
    where = features.model.mean.device
    axes = np.meshgrid(*(np.arange(size) for size in clean_ND.shape), np.array([1.0, -1.0]), indexing="ij")

    def value(x: Tensor, column_N: Tensor) -> Tensor:
        return entry(features(x), column_N)

    descent = Descent(
        lambda x, column_N, sign_N: sign_N * value(x, column_N),
        norm=recipe.norm,
        eps=recipe.eps,
        step_size=recipe.step,
        capture=graphs(recipe, where),
    )

    def one(image: np.ndarray, feature: np.ndarray, sign: np.ndarray) -> np.ndarray:
        column, signs = sent(feature, where), sent(sign, where).float()
        last = descent(to_unit(pixels[image], where), column, signs, steps=recipe.steps)
        with torch.no_grad():
            return np.asarray(value(last, column).double().cpu())

    ends = in_batches(one, recipe.batch_size, *(axis.ravel() for axis in axes)).reshape(*clean_ND.shape, 2)
    return np.minimum(clean_ND, ends.min(2)), np.maximum(clean_ND, ends.max(2))


def summarise(recipe: Usefulness, classes: Sequence[str], sums: Mapping[str, Any]) -> dict[str, Any]:
    """The results of one model from its sums: ρ and γ of each feature for each class with images, and counts per kind.

    Points are (feature, class, ρ, γ), by number; a feature's sign is flipped for a class if that makes ρ ≥ 0.
    `useful_from` is the threshold on ρ per class, None for a class without images.
    """
    present = [k for k, n in enumerate(sums["n_per_class"]) if n]
    rho_KD, gamma_KD = _usefulness(sums, present)
    share_C = np.array(sums["n_per_class"]) / sum(sums["n_per_class"])
    from_C = recipe.useful * 2 * np.sqrt(share_C * (1 - share_C))
    kinds_KD = np.where(rho_KD < from_C[present, None], 2, np.where(gamma_KD > 0, 0, 1))
    kinds_KD[:, ~_varies(sums)] = 2
    best_D, every = rho_KD.argmax(0), np.arange(rho_KD.shape[1])
    return {
        "kind": "usefulness",
        "n": sum(sums["n_per_class"]),
        "attacked": sums["attacked"],
        **recipe.model_dump(include={"norm", "eps", "steps", "layer", "useful"}),
        "features": len(every),
        "classes": list(classes),
        "useful_from": [float(least) if share else None for least, share in zip(from_C, share_C, strict=True)],
        "counts": _counts(kinds_KD),
        "features_by_best_class": _counts(kinds_KD[best_D, every]),
        "points": [
            [int(d), k, round(float(rho_KD[at, d]), 6), round(float(gamma_KD[at, d]), 6)]
            for d in every
            for at, k in enumerate(present)
        ],
    }


def _counts(kinds: np.ndarray) -> dict[str, int]:
    found = Counter(kinds.ravel().tolist())
    return {name: found[number] for number, name in enumerate(KINDS)}


def _moments(sums: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and mean square of each feature over the normalisation split: D each."""
    of = sums["normalise"]
    return np.array(of["f"]) / of["n"], np.array(of["ff"]) / of["n"]


def _varies(sums: Mapping[str, Any]) -> np.ndarray:
    mean, square = _moments(sums)
    varies: np.ndarray = square - mean**2 > CONSTANT * square
    return varies


def _usefulness(sums: Mapping[str, Any], present: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """ρ and γ, K × D each, for K classes against the rest; 0 for a constant feature."""
    mean, square = _moments(sums)
    deviation = np.sqrt(np.where(_varies(sums), square - mean**2, np.inf))
    own_K1 = np.array([[sums["n_per_class"][k]] for k in present])
    total, none = own_K1.sum(), np.zeros_like(mean)
    f, fall, rise = (np.array([sums[name].get(str(k), none) for k in present]) for name in ("f", "fall", "rise"))
    rho = (2 * f - f.sum(0) - mean * (2 * own_K1 - total)) / (deviation * total)

    def taken(own_KD: np.ndarray, rest_KD: np.ndarray) -> np.ndarray:
        """Decrease of E[y f̂] by the attack, which moves f one way for the class and the other way for the rest."""
        found: np.ndarray = (own_KD + rest_KD.sum(0) - rest_KD) / (deviation * sums["attacked"])
        return found

    return np.abs(rho), np.abs(rho) - np.where(rho >= 0, taken(fall, rise), taken(rise, fall))
