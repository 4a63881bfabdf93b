"""The experiment file: what is read, and that whatever is wrong gets one sentence."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import TINY

from pipeline.spec import parse, read
from stages.errors import BadInput


def test_on_is_a_word_and_1e_3_a_number(write):
    text = "name: t\nmodels:\n  m: {train: {on: clean, arch: small_cnn, lr: 1e-3}}\n"
    train = read(write(text)).models["m"].train
    assert (train.on, train.lr) == ("clean", 0.001)


def test_anchors_and_merge_keys_repeat_parts(write):
    text = (
        "name: t\nmodels:\n  a: {train: &a {on: clean, arch: small_cnn, epochs: 3}}\n"
        "  b: {train: {<<: *a, epochs: 4}}\n"
    )
    models = read(write(text)).models
    assert (models["a"].train.epochs, models["b"].train.epochs, models["b"].train.arch) == (3, 4, "small_cnn")


def test_what_a_run_records_of_an_experiment_reads_back_the_same(tiny):
    experiment = parse(tiny)
    assert parse(experiment.model_dump(mode="json", exclude_defaults=True)) == experiment


RULES = "must be one of random, other, next, least_likely, map, or a mapping"


@pytest.mark.parametrize("group, name, key, value, shown", [
    ("datasets", "other", "relabel", 12, "12"),
    ("datasets", "other", "relabel", True, "True"),
    ("evaluations", "accuracy", "agreement", ["next", "other"], r"\['next', 'other'\]"),
    ("evaluations", "accuracy", "attacks", [{"toward": 1}], "1"),
])  # fmt: skip
def test_where_a_rule_belongs_the_rules_are_named(tiny, group, name, key, value, shown):
    tiny[group][name][key] = value
    place = f"{group}.{name}.{key}" + (".0.toward" if key == "attacks" else "")
    with pytest.raises(BadInput, match=f"^{place}: {RULES}, got {shown}$"):
        parse(tiny)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PLACES = st.sampled_from(
    [
        ("datasets", "other"),
        ("datasets", "other", "attack", "eps"),
        ("datasets", "other", "attack"),
        ("datasets", "clean", "load"),
        ("datasets", "clean", "load", "source"),
        ("datasets", "other", "relabel"),
        ("models", "standard", "train"),
        ("models", "standard", "train", "drops"),
        ("evaluations", "accuracy"),
        ("evaluations", "accuracy", "attacks"),
        ("models",),
    ]
)


@given(place=PLACES, value=VALUES)
def test_any_value_anywhere_is_read_or_refused_in_one_sentence(place, value):
    import copy

    experiment = copy.deepcopy(TINY)
    part = experiment
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    try:
        parse(experiment)
    except BadInput as error:
        assert "\n" not in str(error)
        assert str(error).startswith(place[0])


@given(found=VALUES)
def test_any_document_is_refused_in_one_sentence(found):
    with pytest.raises(BadInput) as refused:
        parse(found)
    assert "\n" not in str(refused.value)
