"""Usefulness and robust usefulness of features, against closed forms and definitions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.errors import BadInput
from stages.evaluate import add
from stages.features import Penultimate
from stages.model import Classifier, Design
from stages.recipes import Usefulness
from stages.shard import Shard
from stages.tensors import to_unit
from stages.usefulness import measure, summarise

CLASSES = ("a", "b", "c")
DIGITS = tuple("0123456789")


def recipe(**asked):
    return Usefulness(**{"models": ["net"], "on": "digits", "batch_size": 64, "steps": 6} | asked)


@pytest.fixture
def linear(make_module, tmp_path):
    """Five features that are linear in sixteen pixels; the last is constant."""
    source = """
        from torch import nn

        def net(classes, channels):
            return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Linear(5, classes))
        """
    torch.manual_seed(0)
    model = Classifier(Design(f"{make_module(source)}:net", 3, (1, 4, 4), (0.4,), (0.2,)), tmp_path)
    with torch.no_grad():
        model.network[1].weight[4] = 0
    return model.eval().requires_grad_(False)


def shard(name, count, seed):
    """Grey images, far from black and white; one class is brighter, another varies more."""
    draw = np.random.default_rng(seed)
    label = draw.integers(0, 3, count)
    pixels = 120 + 15 * (label == 1)[:, None] + draw.normal(0, 6 + 6 * (label == 2)[:, None], (count, 16))
    return Shard(name, np.arange(count), label, label, pixels.reshape(count, 4, 4, 1).round().astype(np.uint8))


def measured(asked, model, classes, *parts, limit=1000):
    return summarise(asked, classes, add([measure(asked, classes, {"net": model}, p, limit)["net"] for p in parts]))


def points(row):
    """ρ and γ by feature and class."""
    return {(feature, k): (rho, gamma) for feature, k, rho, gamma in row["points"]}


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.1), ("linf", 0.02)])
def test_of_linear_features_the_worst_case_is_rho_less_eps_times_the_dual_norm(linear, norm, eps):
    train, test = shard("train-000000", 80, 1), shard("test-000000", 40, 2)
    row = measured(recipe(norm=norm, eps=eps), linear, CLASSES, train, test)
    weight, bias = (p.double().numpy() for p in linear.network[1].parameters())

    def features(part):
        return ((part.images().reshape(len(part), -1) / 255 - 0.4) / 0.2) @ weight.T + bias

    mean, deviation = features(train).mean(0), features(train).std(0)
    slope = np.linalg.norm(weight / 0.2, ord=2 if norm == "l2" else 1, axis=1)
    found = points(row)
    assert len(found) == 5 * 3
    for (feature, k), (rho, gamma) in found.items():
        if feature == 4:
            assert rho == gamma == 0
            continue
        y = np.where(test.label == k, 1, -1)
        expected = abs(np.mean(y * (features(test)[:, feature] - mean[feature]) / deviation[feature]))
        assert rho == pytest.approx(expected, abs=1e-4)
        assert gamma == pytest.approx(expected - eps * slope[feature] / deviation[feature], abs=1e-4)


def test_features_are_counted_as_the_thresholds_say_for_each_class_and_for_the_best(linear):
    parts = shard("train-000000", 80, 1), shard("test-000000", 40, 2)
    asked = recipe(eps=0.03, useful=0.3)
    row = measured(asked, linear, CLASSES, *parts)

    shares = np.bincount(parts[1].label) / 40
    largest = 2 * np.sqrt(shares * (1 - shares))
    np.testing.assert_allclose(row["useful_from"], 0.3 * largest, rtol=1e-12)

    def kind(k, rho, gamma):
        return "useless" if rho < 0.3 * largest[k] else "robust" if gamma > 0 else "non_robust"

    kinds = [kind(k, *point) for (_, k), point in points(row).items()]
    assert row["counts"] == {name: kinds.count(name) for name in ("robust", "non_robust", "useless")}
    assert all(row["counts"].values())
    best = [max(((k, *points(row)[d, k]) for k in range(3)), key=lambda point: point[1]) for d in range(5)]
    best_kinds = [kind(*point) for point in best]
    assert row["features_by_best_class"] == {
        name: best_kinds.count(name) for name in ("robust", "non_robust", "useless")
    }
    assert {"kind": "usefulness", "n": 40, "attacked": 40, "norm": "l2", "eps": 0.03, "steps": 6}.items() <= row.items()
    assert {"layer": None, "features": 5, "useful": 0.3, "classes": list(CLASSES)}.items() <= row.items()
    assert json.loads(json.dumps(row)) == row
    nothing_asked = measured(recipe(eps=0.03, useful=0), linear, CLASSES, *parts)
    assert nothing_asked["counts"]["useless"] == 3  # the constant feature, for each class


@pytest.mark.parametrize("rare", [1, 10])
def test_a_feature_that_tells_a_class_from_the_rest_is_as_useful_as_can_be_however_rare_the_class(linear, rare):
    label = (np.arange(20) < rare).astype(np.int64)
    pixels = np.broadcast_to((120 + 60 * label).astype(np.uint8)[:, None, None, None], (20, 4, 4, 1))
    test = Shard("test-000000", np.arange(20), label, label, pixels)
    row = measured(recipe(split="test", normalise="test", eps=1e-3, useful=0.999), linear, CLASSES, test)
    share = rare / 20
    for (feature, _), (rho, _) in points(row).items():
        assert rho == pytest.approx(2 * np.sqrt(share * (1 - share)) if feature < 4 else 0, rel=1e-4)
    assert row["counts"] == {"robust": 8, "non_robust": 0, "useless": 2}
    assert row["useful_from"][2] is None  # no image
    destroyed = measured(recipe(split="test", normalise="test", eps=2.0), linear, CLASSES, test)
    assert destroyed["counts"] == {"robust": 0, "non_robust": 8, "useless": 2}


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_no_feature_is_more_useful_under_attack_and_without_a_radius_all_are_as_useful(trained, digits, part, norm):
    test = part(digits["test"], slice(0, 6), "test-000000")
    train = part(digits["train"], slice(0, 100), "train-000000")
    attacked, alone = (
        points(measured(recipe(norm=norm, eps=eps, steps=2, batch_size=256), trained, DIGITS, train, test))
        for eps in (0.1, 0.0)
    )
    assert len(attacked) == 128 * len(np.unique(test.label))
    assert all(gamma <= rho for rho, gamma in attacked.values())
    assert sum(gamma < rho - 0.01 for rho, gamma in attacked.values()) > 0.9 * len(attacked)
    assert all(rho == pytest.approx(gamma, abs=1e-5) for rho, gamma in alone.values())
    assert {key: rho for key, (rho, _) in attacked.items()} == {key: rho for key, (rho, _) in alone.items()}


def test_a_search_that_oversteps_leaves_the_feature_as_it_was(trained, digits, part):
    label = digits["test"].label
    test = part(digits["test"], np.array([np.flatnonzero(label == k)[0] for k in (3, 7)]), "test-000000")
    far = recipe(eps=3.0, step_size=3.0, steps=1, batch_size=256)
    sums = measure(far, DIGITS, {"net": trained}, test, 2)["net"]
    for moved in (*sums["fall"].values(), *sums["rise"].values()):  # one image each
        assert min(moved) >= 0
    assert all(0 in fall for fall in sums["fall"].values()), "one step too far was no better than none"


def test_what_is_measured_is_a_property_of_the_images_not_of_their_shards(linear, part):
    train, test = shard("train-000000", 64, 1), shard("test-000000", 30, 2)
    cut = [part(train, slice(0, 20)), part(train, slice(20, 64), "train-000001")]
    cut += [part(test, slice(0, 17), "test-000000"), part(test, slice(17, 30), "test-000001")]
    whole, sums = points(measured(recipe(), linear, CLASSES, train, test)), measured(recipe(), linear, CLASSES, *cut)
    for key, found in points(sums).items():
        assert found == pytest.approx(whole[key], abs=1e-5)


def test_one_split_can_both_normalise_and_be_measured_and_only_its_first_images_are_attacked(linear, part):
    asked = recipe(split="train")
    train = shard("train-000000", 64, 1)
    sums = measure(asked, CLASSES, {"net": linear}, train, 10)["net"]
    features = Penultimate(linear)(to_unit(train.images())).double().numpy()
    assert sums["normalise"]["n"] == 64
    np.testing.assert_allclose(sums["normalise"]["f"], features.sum(0), rtol=1e-5)
    assert sums["n_per_class"] == np.bincount(train.label, minlength=3).tolist()
    assert sums["attacked"] == 10
    first = measure(recipe(), CLASSES, {"net": linear}, part(train, slice(0, 10), "test-000000"), 10)["net"]
    for name in ("fall", "rise"):
        assert set(sums[name]) == set(map(str, np.unique(train.label[:10])))
        for k, moved in sums[name].items():
            np.testing.assert_allclose(moved, first[name][k], rtol=1e-4, atol=1e-5)
            assert min(moved) >= 0
    for k, of in sums["f"].items():
        np.testing.assert_allclose(of, features[train.label == int(k)].sum(0), rtol=1e-4, atol=1e-5)


def test_features_that_have_nothing_to_do_with_the_class_are_useless_however_few_images_are_attacked(linear):
    draw = np.random.default_rng(0)
    parts = []
    for name, count in (("train-000000", 3000), ("test-000000", 3000)):
        label = draw.integers(0, 3, count)
        pixels = draw.integers(80, 160, (count, 4, 4, 1)).astype(np.uint8)
        parts.append(Shard(name, np.arange(count), label, label, pixels))
    row = measured(recipe(eps=0.01), linear, CLASSES, *parts, limit=20)
    assert (row["n"], row["attacked"]) == (3000, 20)
    assert row["counts"] == {"robust": 0, "non_robust": 0, "useless": 15}


def test_a_class_without_images_has_no_points(linear, part):
    test = shard("test-000000", 40, 2)
    two = part(test, np.flatnonzero(test.label != 1), "test-000000")
    row = measured(recipe(), linear, CLASSES, shard("train-000000", 40, 1), two)
    assert {k for _, k in points(row)} == {0, 2}


def test_a_model_without_features_is_refused():
    torch.manual_seed(0)
    model = Classifier(Design("squeezenet1_1", 3, (3, 32, 32), (0.0,) * 3, (1.0,) * 3), Path()).eval()
    pixels = np.zeros((1, 32, 32, 3), np.uint8)
    images = Shard("test-000000", np.arange(1), np.zeros(1, np.int64), np.zeros(1, np.int64), pixels)
    with pytest.raises(BadInput, match="no linear layer"):
        measure(recipe(), CLASSES, {"net": model}, images, 1)
