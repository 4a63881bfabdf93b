"""Scores: sums over shards, and the results from them."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.adversarial_eval import in_ball
from stages.evaluate import add, score, summary, wilson
from stages.model import Classifier, Design, logits_of
from stages.recipes import Evaluate
from stages.shard import Shard

CLASSES = tuple("0123456789")
BATCH = 20


def recipe(**asked):
    return Evaluate(**{"models": ["net"], "on": "clean", "batch_size": BATCH} | asked)


@pytest.fixture
def shard(digits, part):
    return part(digits["test"], slice(0, 60), "test-000000")


UNDER = [
    {"eps": 0.5, "steps": 4, "batch_size": BATCH},
    {"eps": 3.0, "steps": 6, "batch_size": BATCH},
    {"norm": "linf", "eps": 0.1, "steps": 4, "batch_size": BATCH},
]


def test_what_is_counted_is_what_the_model_answers(trained, shard):
    answers = logits_of(trained, shard.images(), BATCH).argmax(1)
    sums = score(recipe(), CLASSES, {"net": trained}, {}, shard)["net"]
    assert sums["n"] == 60
    assert sums["right"] == sum(int(a == y) for a, y in zip(answers, shard.label, strict=True))
    for c in range(10):
        assert sums["n_per_class"][c] == (shard.label == c).sum()
        assert sums["answers_per_class"][c] == (answers == c).sum()
        assert sums["right_per_class"][c] == ((answers == c) & (shard.label == c)).sum()


def test_a_trained_network_is_right_far_more_often_than_chance(trained, shard):
    assert score(recipe(), CLASSES, {"net": trained}, {}, shard)["net"]["right"] > 0.5 * 60  # chance is 0.1


def test_sums_of_two_shards_add_up_to_those_of_the_whole(trained, shard, part):
    # Cut where a batch ends, so that every batch is the same and the attack, too, gives the same bits.
    attacks = [
        *UNDER,
        {**UNDER[0], "target_rule": "random", "restarts": 2},
        {**UNDER[0], "surrogate": "net", "method": "apgd"},
    ]
    spatial = [{"grid": [1, 1, 3]}, {"search": "random", "tries": 2}]
    asked = recipe(attacks=attacks, spatial=spatial, agreement={"rule": "other"})
    one, two = part(shard, slice(0, 40), "test-000000"), part(shard, slice(40, 60), "test-000001")
    models = {"net": trained}
    parts = [score(asked, CLASSES, models, models, each)["net"] for each in (one, two)]
    whole = score(asked, CLASSES, models, models, shard)["net"]
    assert add(parts) == whole
    assert set(whole) >= {"right", "right_under", "agreeing", "n_per_class"}
    assert all(len(value) == 7 for name, value in whole.items() if name.endswith("_under"))
    assert json.loads(json.dumps(whole)) == whole


@given(st.lists(st.tuples(st.integers(0, 99), st.lists(st.integers(0, 9), min_size=3, max_size=3)), min_size=1))
def test_numbers_add_and_lists_add_entry_by_entry(pairs):
    whole = add([{"n": n, "each": each} for n, each in pairs])
    assert whole == {"n": sum(n for n, _ in pairs), "each": np.sum([each for _, each in pairs], axis=0).tolist()}


def test_dicts_add_key_by_key_and_what_only_some_parts_have_adds_too():
    parts = [{"n": 1, "by": {"a": [[1, 2]]}}, {"n": 2, "by": {"b": [[3, 4]], "a": [[5, 6]]}}, {"other": 7}]
    assert add(parts) == {"n": 3, "by": {"a": [[6, 8]], "b": [[3, 4]]}, "other": 7}


def test_an_attack_never_makes_a_network_better_and_a_larger_one_makes_it_worse(trained, shard):
    sums = score(recipe(attacks=UNDER), CLASSES, {"net": trained}, {}, shard)["net"]
    small, large, linf = sums["right_under"]
    assert large <= small <= sums["right"]
    assert linf <= sums["right"]
    assert large < sums["right"]


def test_the_worst_case_stands_beside_the_average_case_and_what_it_turned(trained, shard):
    asked = recipe(
        attacks=[*UNDER[1:2], {**UNDER[1], "target_rule": "other"}], spatial=[{"grid": [1, 3, 3]}, {"search": "random"}]
    )
    sums = score(asked, CLASSES, {"net": trained}, {}, shard)["net"]
    said = summary(asked, CLASSES, sums)
    worst, aimed, grid, drawn = said["under_attack"]
    clean = logits_of(trained, shard.images(), BATCH).argmax(1) == shard.label
    found = in_ball(asked.attacks[0], CLASSES, {"net": trained}, {}, shard)["net"]
    assert worst["fooled"] == pytest.approx((clean & ~found.right).sum() / clean.sum(), abs=1e-12)
    assert [row["attack"] for row in said["under_attack"]] == ["pgd", "pgd", "spatial", "spatial"]
    for at, row in enumerate(said["under_attack"]):
        right = sums["right_under"][at]
        assert (row["accuracy"], row["n"]) == (right / 60, 60)
        assert (row["low"], row["high"]) == wilson(right, 60)
        assert row["accuracy"] < row["average"] <= 1
        assert row["fooled"] == (sums["right"] - right) / sums["right"]
    assert {
        "norm": "l2",
        "eps": 3.0,
        "steps": 6,
        "step_size": 0.6,
        "restarts": 1,
        "surrogate": None,
    }.items() <= worst.items()
    assert worst["target_rule"] is None
    assert "success_rate" not in worst
    assert aimed["target_rule"] == "other"
    assert aimed["success_rate"] == sums["success_under"][1] / 60
    assert 0 < aimed["success_rate"] <= 1 - aimed["accuracy"]
    assert {"rotation": 30, "translation": 0.1, "search": "grid", "tries": 9}.items() <= grid.items()
    assert {"search": "random", "tries": 10}.items() <= drawn.items()
    assert grid["average"] == sums["average_under"][2] / (60 * 9)


def test_of_no_right_answers_and_of_no_targets_there_is_no_share(trained, shard, part):
    wrong = part(shard, slice(None), "test-000000")
    wrong.label[:] = (logits_of(trained, shard.images(), BATCH).argmax(1) + 1) % 10
    own = {str(c): c for c in range(10)}
    asked = recipe(attacks=[{**UNDER[0], "target_rule": {"rule": "map", "map": own}}])
    said = summary(asked, CLASSES, score(asked, CLASSES, {"net": trained}, {}, wrong)["net"])
    assert said["accuracy"] == 0
    assert said["under_attack"][0]["fooled"] is None
    assert said["under_attack"][0]["success_rate"] is None


def test_an_attack_toward_the_true_class_makes_no_answer_right(trained, shard):
    own = {str(c): c for c in range(10)}
    asked = recipe(attacks=[{**UNDER[1], "target_rule": {"rule": "map", "map": own}}])
    with torch.no_grad():
        trained.network[-1].bias[3] += 5  # answers 3 more often than it should
    found = in_ball(asked.attacks[0], CLASSES, {"net": trained}, {}, shard)["net"]
    sums = score(asked, CLASSES, {"net": trained}, {}, shard)["net"]
    assert 0 < sums["right"] < found.right.sum()
    assert sums["right_under"][0] <= sums["right"]
    assert summary(asked, CLASSES, sums)["under_attack"][0]["fooled"] >= 0


def test_each_model_has_sums_of_its_own(trained, shard):
    class Constant:
        """A model that always predicts class 3."""

        mean = torch.zeros(1)

        def using(self, precision):
            return self

        def __call__(self, x):
            return torch.eye(10)[3].expand(len(x), -1)

    sums = score(recipe(models=["net", "three"]), CLASSES, {"net": trained, "three": Constant()}, {}, shard)
    assert sums["three"]["right"] == (shard.label == 3).sum()
    assert sums["three"]["answers_per_class"] == [60 * (c == 3) for c in range(10)]
    assert sums["net"]["right"] != sums["three"]["right"]


def test_agreement_with_next_counts_answers_that_are_one_too_high(trained, shard, part):
    answers = logits_of(trained, shard.images(), BATCH).argmax(1)
    shifted = part(shard, slice(None), "test-000000")
    shifted.label[:30] = (answers[:30] - 1) % 10  # half of the labels are one below what the network says
    sums = score(recipe(agreement="next"), CLASSES, {"net": trained}, {}, shifted)["net"]
    assert sums["agreeing"] == ((shifted.label + 1) % 10 == answers).sum()
    assert sums["agreeing"] >= 30


def test_confusions_are_counted_only_if_asked_for_and_add_up_to_the_images_and_answers(trained, shard):
    asked, sums = recipe(confusion=True), {}
    for each in (asked, recipe()):
        sums[each.confusion] = score(each, CLASSES, {"net": trained}, {}, shard)["net"]
    matrix = np.array(sums[True]["confusion"])
    assert matrix.sum(1).tolist() == sums[True]["n_per_class"]
    assert matrix.sum(0).tolist() == sums[True]["answers_per_class"]
    assert matrix.diagonal().tolist() == sums[True]["right_per_class"]
    assert summary(asked, CLASSES, sums[True])["confusion"] == sums[True]["confusion"]
    assert "confusion" not in sums[False] and "confusion" not in summary(recipe(), CLASSES, sums[False])


def test_the_label_that_is_scored_is_the_one_to_train_on_not_that_of_the_source(trained, shard, part):
    answers = logits_of(trained, shard.images(), BATCH).argmax(1)
    relabelled = part(shard, slice(None), "test-000000")
    relabelled.label[:] = answers
    assert score(recipe(), CLASSES, {"net": trained}, {}, relabelled)["net"]["right"] == 60


def test_the_summary_says_what_the_sums_say(trained, shard):
    asked = recipe(attacks=UNDER, agreement="next")
    sums = score(asked, CLASSES, {"net": trained}, {}, shard)["net"]
    said = summary(asked, CLASSES, sums)
    assert said["kind"] == "accuracy"
    assert said["accuracy"] == sums["right"] / 60
    assert said["chance"] == 0.1
    assert said["majority"] == np.bincount(shard.label).max() / 60
    assert (said["low"], said["high"]) == wilson(sums["right"], 60)
    assert said["agreement"]["accuracy"] == sums["agreeing"] / 60
    assert said["agreement"]["rule"] == "next"
    assert [under["eps"] for under in said["under_attack"]] == [0.5, 3.0, 0.1]
    assert [under["accuracy"] for under in said["under_attack"]] == [right / 60 for right in sums["right_under"]]
    assert said["under_attack"][0]["step_size"] == 0.5 / 5
    assert sum(c["accuracy"] * c["n"] for c in said["per_class"].values()) == pytest.approx(sums["right"])


def test_a_class_without_images_has_no_accuracy(trained, shard, part):
    ones = part(shard, np.flatnonzero(shard.label == 1), "test-000000")
    said = summary(recipe(), CLASSES, score(recipe(), CLASSES, {"net": trained}, {}, ones)["net"])
    assert said["per_class"]["0"] == {"accuracy": None, "n": 0}
    assert said["majority"] == 1.0


# -------------------------------------------------------------------------------------- intervals

Z = 1.959963984540054  # the normal quantile of 97.5 %


def by_the_quadratic(right, n):
    """Wilson's interval by its definition: the proportions p with |right/n − p| = z √(p (1 − p) / n)."""
    share = right / n
    return sorted(np.roots([1 + Z**2 / n, -(2 * share + Z**2 / n), share**2]).real)


@pytest.mark.parametrize(("right", "n"), [(1, 10), (5, 10), (81, 263), (15, 148), (9500, 10_000), (1, 1000)])
def test_the_interval_is_the_solution_of_wilsons_quadratic(right, n):
    np.testing.assert_allclose(wilson(right, n), by_the_quadratic(right, n), atol=1e-9)


def test_the_interval_is_the_one_in_the_textbooks():
    # Newcombe 1998 (Statistics in Medicine 17), table I, method 3, to four places.
    for right, n, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)]:
        np.testing.assert_allclose(wilson(right, n), (low, high), atol=5e-5)


def test_the_quantile_is_that_of_95_percent():
    assert math.erf(Z / math.sqrt(2)) == pytest.approx(0.95, abs=1e-12)


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_holds_the_share_and_stays_between_zero_and_one(case):
    right, n = case
    low, high = wilson(right, n)
    assert 0 <= low < high <= 1
    assert low - 1e-12 <= right / n <= high + 1e-12
    flipped = wilson(n - right, n)
    assert (1 - flipped[1], 1 - flipped[0]) == pytest.approx((low, high), abs=1e-12)


def test_a_small_ball_keeps_its_whole_strength_on_a_linear_model(make_module, tmp_path):
    """Robust accuracy is the share of images further from the boundary than ε, also where ε is under one 8-bit level.

    Scored on rounded images, a ball this small would leave every answer as it is.
    """
    source = """
        from torch import nn

        def net(classes, channels):
            return nn.Sequential(nn.Flatten(), nn.Linear(channels * 64, classes))
        """
    design = Design(f"{make_module(source)}:net", 2, (1, 8, 8), (0.0,), (1.0,))
    model = Classifier(design, tmp_path).eval().requires_grad_(False)
    draw = np.random.default_rng(0)
    pixels = draw.integers(100, 156, (200, 8, 8, 1), dtype=np.uint8)
    weight, bias = (p.double().numpy() for p in model.network[1].parameters())
    across = weight[1] - weight[0]
    signed = (pixels.reshape(200, -1) / 255 @ across + bias[1] - bias[0]) / np.linalg.norm(across)
    middle = np.median(signed)
    with torch.no_grad():
        model.network[1].bias[1] -= float(middle * np.linalg.norm(across))  # the boundary through the middle
    signed = signed - middle
    eps = float(np.median(np.abs(signed))) / 4
    assert eps * 255 < 8 * 0.5, "a step of that length moves the 64 pixels by less than half a level each"
    index = np.arange(200)
    label = (signed > 0).astype(np.int64)
    shard = Shard("test-000000", index, label, label.copy(), pixels)
    asked = recipe(attacks=[{"eps": eps, "steps": 10, "batch_size": BATCH}])
    sums = score(asked, ("a", "b"), {"net": model}, {}, shard)["net"]
    assert sums["right"] == 200
    clear = np.abs(np.abs(signed) - eps) > 1e-5  # closer than rounding can tell
    assert abs(sums["right_under"][0] - int((np.abs(signed) > eps).sum())) <= int((~clear).sum())
    assert 100 < sums["right_under"][0] < 200
