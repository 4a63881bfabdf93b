"""Averages over seeds: means and deviations, values that count once, transfer attacks on models of the same seed."""

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.report.scores import attack_name, attacked, by_seed, merged, over_seeds, results, transfers, without_seed


def row(model="m", accuracy=0.5, **facts):
    given = {"kind": "accuracy", "evaluation": "e", "trained_on": "d", "n": 100, "chance": 0.1, "majority": 0.12}
    given |= {"on": "clean", "split": "test", "held_out": True}
    ends = {"low": accuracy - 0.1, "high": accuracy + 0.1}
    return (
        given | ends | {"model": model, "accuracy": accuracy, "attack_success_rate": None, "under_attack": []} | facts
    )


def attack(accuracy=0.2, **facts):
    given = {"attack": "pgd", "norm": "l2", "eps": 0.5, "steps": 7, "step_size": 0.1, "restarts": 1, "surrogate": None}
    ends = {"low": 0.1, "high": 0.3, "n": 100}
    return given | ends | {"target_rule": None, "accuracy": accuracy, "average": 0.9, "fooled": 0.75} | facts


@given(shares=st.lists(st.floats(0, 1), min_size=2, max_size=5))
def test_several_shares_are_their_mean_and_deviation(shares):
    found = over_seeds([None, *shares])
    assert found is not None and found.seeds == len(shares)
    assert found.mean == pytest.approx(statistics.mean(shares))
    assert found.high - found.low == pytest.approx(2 * statistics.stdev(shares), abs=1e-12)


def test_one_share_has_no_deviation_and_none_is_none():
    assert str(over_seeds([0.5, None])) == "50.0 %"
    assert over_seeds([None]) is None


def test_a_seed_is_taken_from_a_name_and_nothing_else():
    assert without_seed("m@eps=1,seed=3") == "m@eps=1"
    rows = [row(f"m@eps={eps},seed={seed}") for seed in (0, 1) for eps in (1, 2)]
    assert [[each["model"] for each in same] for same in by_seed(rows)] == [
        ["m@eps=1,seed=0", "m@eps=1,seed=1"],
        ["m@eps=2,seed=0", "m@eps=2,seed=1"],
    ]


def test_one_measurement_has_its_interval_and_several_their_number():
    one, several = results([row("a"), row("b@seed=0", 0.4), row("b@seed=1", 0.6)])
    assert (str(one.clean), one.clean.interval) == ("50.0 %", "40.0 % – 60.0 %")
    assert (str(several.clean), several.clean.interval) == ("50.0 ± 14.1 %", "2 seeds")


def test_a_model_without_a_seed_that_is_scored_beside_each_seed_of_others_was_measured_once():
    rows = [row("brought", evaluation=f"e@seed={seed}", under_attack=[attack()]) for seed in (0, 1)]
    (found,) = results(rows)
    assert found.clean.seeds == 1 == found.attacks()[0].worst.seeds


def test_an_attack_that_came_to_the_same_in_two_evaluations_stands_once():
    rows = [row("m", evaluation=name, under_attack=[attack()]) for name in ("e", "f")]
    assert len(attacked(results(rows))) == 1
    assert len(attacked(results([*rows, row("m", evaluation="g", under_attack=[attack(0.3)])]))) == 2


def test_the_gap_is_that_of_each_seed():
    rows = [
        row(f"m@seed={s}", under_attack=[attack(w, average=a)]) for s, (w, a) in enumerate([(0.1, 0.7), (0.3, 0.9)])
    ]
    ((_, made),) = attacked(results(rows))
    assert str(made.average) == "80.0 ± 14.1 %" and str(made.gap) == "60.0 ± 0.0 %"


def test_the_same_on_other_images_is_another_line():
    rows = [row("m", evaluation=name, on=name, under_attack=[attack()]) for name in ("e", "f")]
    assert len(attacked(results(rows))) == 2 == len(merged(results(rows)))


def test_a_model_that_scored_the_same_in_two_evaluations_is_told_once_with_all_that_either_asked():
    agreeing = {"rule": "next", "accuracy": 0.25}
    rows = [
        row(f"m@seed={seed}", 0.4 + seed / 5, evaluation=name, **facts)
        for name, facts in (("e", {}), ("f", {"agreement": agreeing}), ("g", {}))
        for seed in (0, 1)
    ]
    (found,) = merged(results(rows))
    assert found.evaluation == "e" and str(found.clean) == "50.0 ± 14.1 %" and found.clean.seeds == 2
    assert str(found.agreement("next")) == "25.0 ± 0.0 %" and found.agreement("other") is None


def test_a_step_is_said_where_it_is_not_a_fifth_of_the_radius():
    assert attack_name(attack()) == "L2 ε 0.5, 7 steps"
    assert attack_name(attack(step_size=0.3, restarts=5)) == "L2 ε 0.5, 7 steps of 0.3 × 5"
    apgd = {key: value for key, value in attack(attack="apgd").items() if key != "step_size"}
    assert attack_name(apgd) == "APGD L2 ε 0.5, 7 steps"


def test_a_matrix_of_other_than_held_out_images_says_so():
    given = {"on": "clean", "split": "train", "held_out": False, "under_attack": [attack(surrogate="a", fooled=0.5)]}
    (found,) = transfers(results([row("b", **given)]))
    assert found.title == "clean/train: fooling rate of L2 ε 0.5, 7 steps made on"


def carried(evaluation, model, fooled):
    made = [attack(surrogate=source, fooled=share) for source, share in fooled.items()]
    return row(model, evaluation=evaluation, under_attack=[attack(), *made])


def test_a_cell_has_one_value_per_seed():
    rows = [
        carried("t@seed=0", "a@seed=0", {"a@seed=0": 0.9, "b@seed=0": 0.2}),
        carried("t@seed=1", "a@seed=1", {"a@seed=1": 0.7, "b@seed=1": 0.4}),
        *(carried(f"t@seed={s}", "brought", {f"a@seed={s}": 0.5 + s / 10, f"b@seed={s}": 0.1}) for s in (0, 1)),
    ]
    (found,) = transfers(results(rows))
    assert {cell: str(share) for cell, share in found.cells.items()} == {
        ("a", "a"): "80.0 ± 14.1 %",
        ("b", "a"): "30.0 ± 14.1 %",
        ("a", "brought"): "55.0 ± 7.1 %",
        ("b", "brought"): "10.0 ± 0.0 %",
    }


def test_attacks_on_another_seed_are_not_mixed_with_those_on_the_own_one():
    rows = [carried("t", f"a@seed={s}", {"a@seed=0": 0.9 if s == 0 else 0.3, "a@seed=1": 0.2 + s / 2}) for s in (0, 1)]
    (found,) = transfers(results(rows))
    assert {cell: str(share) for cell, share in found.cells.items()} == {
        ("a", "a"): "80.0 ± 14.1 %",
        ("a@seed=1", "a"): "20.0 %",
        ("a@seed=0", "a"): "30.0 %",
    }


def test_attacks_of_other_settings_or_evaluations_are_other_tables():
    attacks = [
        attack(surrogate="a"),
        attack(surrogate="a", eps=1.0),
        attack(surrogate="a", target_rule="next", success_rate=0.3),
    ]
    rows = [row("b", evaluation=name, under_attack=attacks) for name in ("e", "f")]
    found = transfers(results(rows))
    assert len({matrix.title for matrix in found}) == len(found) == 6
    assert found[2].title == "e: attack success rate of L2 ε 0.5, 7 steps, toward next made on"
    assert str(found[2].cells["a", "b"]) == "30.0 %"
