"""Label rules: the target of each image."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.errors import BadInput
from stages.recipes import Relabel
from stages.relabel import class_map, targets

CLASSES = tuple("abcdefghij")
MANY = np.arange(4000)


@st.composite
def labelled(draw):
    count = draw(st.integers(2, 12))
    index = draw(st.lists(st.integers(0, 10**7), min_size=1, max_size=30, unique=True))
    label = draw(st.lists(st.integers(0, count - 1), min_size=len(index), max_size=len(index)))
    return tuple(f"c{i}" for i in range(count)), np.array(label), np.array(index)


@given(labelled(), st.sampled_from(["random", "other"]), st.integers(0, 2**63 - 1), st.randoms(use_true_random=False))
def test_a_target_does_not_depend_on_the_shard_its_image_is_in(sample, rule, seed, random):
    classes, label, index = sample
    recipe = Relabel(rule=rule, seed=seed)
    together = dict(zip(index.tolist(), targets(recipe, label, index, classes).tolist(), strict=True))
    order = list(range(len(index)))
    random.shuffle(order)
    cut = random.randint(0, len(order))
    apart = {}
    for part in (order[:cut], order[cut:]):
        if part:
            apart |= dict(
                zip(index[part].tolist(), targets(recipe, label[part], index[part], classes).tolist(), strict=True)
            )
    assert apart == together


@given(labelled(), st.integers(0, 2**63 - 1))
def test_other_never_hits_the_true_class_and_stays_among_the_classes(sample, seed):
    classes, label, index = sample
    wanted = targets(Relabel(rule="other", seed=seed), label, index, classes)
    assert not (wanted == label).any()
    assert ((wanted >= 0) & (wanted < len(classes))).all()


def test_random_hits_the_true_class_about_once_in_c():
    label = MANY % len(CLASSES)
    hits = (targets(Relabel(rule="random"), label, MANY, CLASSES) == label).mean()
    share = 1 / len(CLASSES)
    assert abs(hits - share) < 5 * (share * (1 - share) / len(MANY)) ** 0.5  # five standard deviations


@pytest.mark.parametrize("rule", ["random", "other"])
def test_the_random_rules_are_uniform_over_what_they_may_choose(rule):
    # All true classes are 0. A chi-square above its mean by five of its standard deviations would be no chance.
    label = np.zeros(len(MANY), dtype=np.int64)
    counts = Counter(targets(Relabel(rule=rule), label, MANY, CLASSES).tolist())
    allowed = range(rule == "other", len(CLASSES))
    expected = len(MANY) / len(allowed)
    free = len(allowed) - 1
    assert sum((counts[c] - expected) ** 2 / expected for c in allowed) < free + 5 * (2 * free) ** 0.5


def test_the_random_rules_do_not_look_at_the_label_of_other_images():
    label = MANY[:50] % 10
    changed = label.copy()
    changed[1:] = (changed[1:] + 3) % 10
    for rule in ("random", "other"):
        first = [targets(Relabel(rule=rule), y, MANY[:50], CLASSES)[0] for y in (label, changed)]
        assert first[0] == first[1]


def test_another_seed_gives_other_targets():
    label = MANY % 10
    one, two = (targets(Relabel(rule="random", seed=seed), label, MANY, CLASSES) for seed in (0, 1))
    assert (one != two).mean() > 0.5


def test_next_is_the_following_class_and_after_the_last_comes_the_first():
    assert targets(Relabel(rule="next"), np.arange(10), np.arange(10), CLASSES).tolist() == [*range(1, 10), 0]


def test_map_moves_by_name_and_by_number():
    recipe = Relabel(rule="map", map={"a": "c", "b": 0, 2: "b"})
    assert targets(recipe, np.array([0, 1, 2, 0]), np.arange(4), ("a", "b", "c")).tolist() == [2, 0, 1, 2]


def test_a_class_whose_name_is_a_number_is_found_by_its_name_first():
    assert class_map({"1": 0, "0": 1}, ("1", "0")).tolist() == [1, 0]


def test_a_map_that_leaves_out_a_class_is_refused_by_that_name():
    with pytest.raises(BadInput, match="leaves out b, c"):
        class_map({"a": "b"}, ("a", "b", "c"))


@pytest.mark.parametrize("name", ["z", 3, "3", -1, "²", ""])
def test_a_map_that_names_no_class_is_refused_with_the_classes(name):
    with pytest.raises(BadInput, match="no class: the classes are a, b, c"):
        class_map({"a": "b", "b": "c", "c": name}, ("a", "b", "c"))


@given(st.dictionaries(st.text() | st.integers(), st.text() | st.integers()))
def test_any_map_gives_a_class_for_each_class_or_is_refused_as_bad_input(mapping):
    try:
        assert set(class_map(mapping, ("first class", "second class")).tolist()) <= {0, 1}
    except BadInput as error:
        assert "relabel map" in str(error)


def test_least_likely_is_the_smallest_logit():
    logits = np.array([[3.0, -1.0, 2.0], [0.0, 1.0, -4.0]])
    recipe = Relabel(rule="least_likely")
    assert targets(recipe, np.zeros(2, int), np.arange(2), ("a", "b", "c"), logits).tolist() == [1, 2]


def test_least_likely_without_a_model_is_refused():
    with pytest.raises(BadInput, match="needs the attack to name a model"):
        targets(Relabel(rule="least_likely"), np.zeros(2, int), np.arange(2), CLASSES)


@pytest.mark.parametrize("rule", ["random", "other", "next", "map", "least_likely"])
def test_targets_are_64_bit_integers(rule):
    recipe = Relabel(rule=rule, map=dict.fromkeys(CLASSES, "a") if rule == "map" else None)
    logits = np.zeros((3, 10), dtype=np.float32)
    assert targets(recipe, np.array([1, 2, 3]), np.arange(3), CLASSES, logits).dtype == np.int64


def test_a_class_named_twice_in_a_map_is_refused():
    rule = Relabel(rule="map", map={"cat": "dog", 0: "dog", "dog": "cat"})
    with pytest.raises(BadInput, match="twice"):
        targets(rule, np.array([0]), np.array([0]), ["cat", "dog"])
