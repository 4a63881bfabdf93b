"""Tables that line up, and a table of results that hides nothing."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.report import feature_table, result_text, table

WORDS = st.text(st.characters(codec="ascii", exclude_categories=["Cc", "Zs"]), min_size=1, max_size=12)


@given(head=st.lists(WORDS, min_size=2, max_size=5), data=st.data())
def test_every_cell_stands_in_its_column(head, data):
    lines = data.draw(st.lists(st.lists(WORDS, min_size=len(head), max_size=len(head)), min_size=1, max_size=4))
    shown = table(head, lines).splitlines()
    edges = [len(part) for part in shown[1].split("  ")]
    assert len(shown) == len(lines) + 2
    for line, cells in zip(lines, shown[2:], strict=True):
        first = 0
        for cell, width in zip(line, edges, strict=True):
            assert cells[first : first + width].strip() == cell
            first += width + 2


def row(**facts):
    given = {
        "kind": "accuracy",
        "evaluation": "e",
        "model": "m",
        "trained_on": "d",
        "accuracy": 0.5,
        "low": 0.4,
        "high": 0.6,
        "n": 100,
    }
    return given | {"chance": 0.1, "majority": 0.12, "target_reached": 0.9, "under_attack": []} | facts


def test_the_table_of_results_has_dataset_target_learner_accuracy_interval_and_chance():
    shown = result_text([row(), row(model="n", trained_on=None, target_reached=None)])
    assert "90.0 %" in shown and "40.0 % – 60.0 %" in shown and "10.0 %" in shown
    assert "elsewhere" in shown and "constant answer" not in shown


def test_an_unbalanced_test_set_shows_what_a_constant_answer_scores():
    assert "constant answer" in result_text([row(majority=0.58, chance=1 / 9)])


def test_several_evaluations_are_told_apart():
    assert "evaluation" not in result_text([row()])
    assert "evaluation" in result_text([row(), row(evaluation="f")])


def test_answers_under_another_rule_have_a_column():
    assert "agrees with next" not in result_text([row()])
    shown = result_text([row(agreement={"rule": "next", "accuracy": 0.25}), row(model="n")])
    assert [line.split()[-2:] for line in shown.splitlines()[2:]] == [["25.0", "%"], ["%", "–"]]
    assert "agrees with next" in shown


def attack(**facts):
    given = {"attack": "pgd", "norm": "l2", "eps": 0.5, "steps": 7, "step_size": 0.1, "restarts": 1, "source": None}
    ends = {"low": 0.1, "high": 0.3, "n": 100}
    return given | ends | {"toward": None, "accuracy": 0.2, "average": 0.9, "fooled": 0.75} | facts


def test_rows_that_differ_in_the_seed_alone_are_one_with_mean_and_deviation():
    rows = [row(model=f"m@eps=1,seed={seed}", accuracy=accuracy) for seed, accuracy in ((0, 0.5), (1, 0.7))]
    shown = result_text([*rows, row(model="m@eps=2,seed=0")])
    assert "60.0 ± 14.1 %" in shown and "2 seeds" in shown and "m@eps=1 " in shown and "m@eps=2 " in shown


def test_average_case_stands_beside_worst_case_with_the_gap():
    line = result_text([row(under_attack=[attack()])]).splitlines()[-1]
    assert "L2 ε 0.5, 7 steps" in line and line.index("90.0 %") < line.index("20.0 %") < line.index("70.0 %")


def test_a_targeted_attack_says_how_often_it_got_there():
    def under(*attacks):
        return result_text([row(under_attack=list(attacks))]).partition("average and worst case")[2]

    shown = under(attack(toward="next", reached=0.33), attack())
    assert "toward next" in shown and "33.0 %" in shown
    assert "target reached" not in under(attack())


def test_spatial_attacks_name_their_space():
    spatial = {"attack": "spatial", "rotation": 30, "translation": 0.1, "search": "grid", "tries": 775}
    ends = {"low": 0.0, "high": 0.2, "n": 100}
    made = spatial | ends | {"accuracy": 0.1, "average": 0.8, "fooled": 0.5}
    assert "±30°, ±10 %, grid of 775" in result_text([row(under_attack=[made])])


def test_transfer_is_a_matrix_of_source_and_model():
    rows = [
        row(model=model, under_attack=[attack(source=source, fooled=fooled) for source, fooled in made.items()])
        for model, made in {"a": {"a": 0.9, "b": 0.4}, "b": {"a": 0.3, "b": 0.8}}.items()
    ]
    shown = result_text(rows)
    lines = [line.split() for line in shown.partition("fooled by L2 ε 0.5, 7 steps made on\n")[2].splitlines()]
    assert lines[0] == ["a", "b"]
    assert lines[2:] == [["a", "90.0", "%", "40.0", "%"], ["b", "30.0", "%", "80.0", "%"]]
    assert "worst case" not in shown


def test_features_are_counted():
    facts = {"kind": "usefulness", "norm": "l2", "eps": 0.5, "features": 4, "classes": ["a", "b"]}
    shown = feature_table([row(**facts, counts={"robust": 2, "non_robust": 4, "useless": 2})])
    assert "4 × 2" in shown and "25.0 %" in shown and "50.0 %" in shown


def test_a_text_has_only_what_there_is():
    assert len(result_text([row()]).splitlines()) == 3
    assert "average and worst case" in result_text([row(under_attack=[attack()])])
