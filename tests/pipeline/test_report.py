"""Tables that line up, and a table of results that hides nothing."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.report import result_table, table

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
    given = {"evaluation": "e", "model": "m", "trained_on": "d", "accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 100}
    return given | {"chance": 0.1, "majority": 0.12, "target_reached": 0.9, "under_attack": []} | facts


def test_the_table_of_results_has_dataset_target_learner_accuracy_interval_and_chance():
    shown = result_table([row(), row(trained_on=None, target_reached=None)])
    assert "90.0 %" in shown and "40.0 % – 60.0 %" in shown and "10.0 %" in shown
    assert "elsewhere" in shown and "constant answer" not in shown


def test_an_unbalanced_test_set_shows_what_a_constant_answer_scores():
    assert "constant answer" in result_table([row(majority=0.58, chance=1 / 9)])


def test_several_evaluations_are_told_apart():
    assert "evaluation" not in result_table([row()])
    assert "evaluation" in result_table([row(), row(evaluation="f")])
