"""Tables are aligned, and the table of results is complete."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.experiment.graph import build
from pipeline.experiment.spec import parse
from pipeline.report.tables import feature_table, fitted, headline, result_text, table
from pipeline.run.artifacts import Artifact
from pipeline.run.jobs import Context, EvaluateJob
from pipeline.store import Store

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
        "on": "clean",
        "split": "test",
        "held_out": True,
        "trained_on": "d",
        "accuracy": 0.5,
        "low": 0.4,
        "high": 0.6,
        "n": 100,
    }
    return given | {"chance": 0.1, "majority": 0.12, "attack_success_rate": 0.9, "under_attack": []} | facts


def test_the_table_of_results_has_dataset_target_learner_accuracy_interval_and_chance():
    shown = result_text([row(), row(model="n", trained_on=None, attack_success_rate=None)])
    assert "90.0 %" in shown and "40.0 % – 60.0 %" in shown and "10.0 %" in shown
    assert "pretrained" in shown and "constant prediction" not in shown


def test_an_unbalanced_test_set_shows_what_a_constant_answer_scores():
    assert "constant prediction" in result_text([row(majority=0.58, chance=1 / 9)])


def test_several_evaluations_are_told_apart():
    assert "evaluation" in result_text([row(), row(evaluation="f", accuracy=0.4)])
    for once in ([row()], [row(), row(evaluation="f")], [row(), row(evaluation="f", model="other")]):
        text = result_text(once)
        assert "evaluation" not in text and len(text.splitlines()) == 2 + len({each["model"] for each in once})


ORIGINS = {
    "name": "e",
    "datasets": {
        "clean": {"load": {"source": "sklearn-digits"}},
        "other": {"attack": {"images": "clean", "method": "none", "splits": ["train", "test"]}, "relabel": "other"},
    },
    "models": {
        "learner": {"train": {"on": "other", "arch": "small_cnn"}},
        "brought": {"pretrained": {"arch": "resnet18", "weights": "DEFAULT"}},
    },
}


@pytest.mark.parametrize(
    ("model", "on", "split", "held_out"),
    [
        ("learner", "clean", "test", True),
        ("learner", "clean", "train", False),
        ("learner", "other", "test", False),
        ("brought", "clean", "train", True),
    ],
)
def test_held_out_are_images_as_they_were_loaded_of_a_split_that_was_not_trained_on(
    tmp_path, model, on, split, held_out
):
    asked = {"e": {"models": [model], "on": on, "split": split}}
    (node,) = [n for n in build(parse({**ORIGINS, "evaluations": asked})) if n.group == "evaluations"]
    inputs = {role: Artifact(one.folder, {"content": "c", "classes": ["a", "b"]}) for role, one in node.inputs.items()}
    store = Store(str(tmp_path))
    sums = {"n": 4, "right": 3, "right_per_class": [2, 1], "n_per_class": [2, 2]}
    nothing = {"right_under": [], "average_under": [], "aimed_under": [], "success_under": []}
    marks = {"test-000000": {"samples": 4, "sums": {model: sums | nothing}}}
    EvaluateJob(node, Context(store, Path(), Path()), inputs).finish(marks)
    (found,) = store.find_json(f"{node.folder}/result.json")["rows"]
    assert (found["on"], found["split"], found["held_out"]) == (on, split, held_out)


def test_other_images_than_held_out_ones_are_named():
    shown = result_text([row(), row(model="n", on="other", split="train", held_out=False, under_attack=[attack()])])
    assert "other/train" in shown.partition("average case")[0] and "other/train" in shown.partition("average case")[2]
    assert "clean/test" in shown and "clean accuracy" not in shown
    assert "clean/test" not in result_text([row()]) and "clean accuracy" in result_text([row()])


def test_two_sets_of_held_out_images_are_told_apart():
    shown = result_text([row(), row(model="n", on="few")])
    assert "clean/test" in shown and "few/test" in shown and "clean accuracy" in shown


def test_answers_under_another_rule_have_a_column():
    assert "agrees with next" not in result_text([row()])
    shown = result_text([row(agreement={"rule": "next", "accuracy": 0.25}), row(model="n")])
    assert [line.split()[-2:] for line in shown.splitlines()[2:]] == [["25.0", "%"], ["%", "–"]]
    assert "agrees with next" in shown


def attack(**facts):
    given = {"attack": "pgd", "norm": "l2", "eps": 0.5, "steps": 7, "step_size": 0.1, "restarts": 1, "surrogate": None}
    ends = {"low": 0.1, "high": 0.3, "n": 100}
    return given | ends | {"target_rule": None, "accuracy": 0.2, "average": 0.9, "fooled": 0.75} | facts


def test_rows_that_differ_in_the_seed_alone_are_one_with_mean_and_deviation():
    rows = [row(model=f"m@eps=1,seed={seed}", accuracy=accuracy) for seed, accuracy in ((0, 0.5), (1, 0.7))]
    shown = result_text([*rows, row(model="m@eps=2,seed=0")])
    assert "60.0 ± 14.1 %" in shown and "2 seeds" in shown and "m@eps=1 " in shown and "m@eps=2 " in shown


def test_average_case_stands_beside_worst_case_with_the_gap():
    line = result_text([row(under_attack=[attack()])]).splitlines()[-1]
    assert "noise of length ε, clipped to [0, 1]" in result_text([row(under_attack=[attack()])])
    assert "L2 ε 0.5, 7 steps" in line and line.index("90.0 %") < line.index("20.0 %") < line.index("70.0 %")


def test_a_targeted_attack_says_how_often_it_got_there():
    def under(*attacks):
        return result_text([row(under_attack=list(attacks))]).partition("and worst case")[2]

    shown = under(attack(target_rule="next", success_rate=0.33), attack())
    assert "toward next" in shown and "33.0 %" in shown
    assert "attack success" not in under(attack())


def test_spatial_attacks_name_their_space():
    spatial = {"attack": "spatial", "rotation": 30, "translation": 0.1, "search": "grid", "tries": 775}
    ends = {"low": 0.0, "high": 0.2, "n": 100}
    made = spatial | ends | {"accuracy": 0.1, "average": 0.8, "fooled": 0.5}
    assert "±30°, ±10 %, grid of 775" in result_text([row(under_attack=[made])])


def test_transfer_is_a_matrix_of_source_and_model():
    rows = [
        row(model=model, under_attack=[attack(surrogate=source, fooled=fooled) for source, fooled in made.items()])
        for model, made in {"a": {"a": 0.9, "b": 0.4}, "b": {"a": 0.3, "b": 0.8}}.items()
    ]
    shown = result_text(rows)
    lines = [line.split() for line in shown.partition("fooling rate of L2 ε 0.5, 7 steps made on\n")[2].splitlines()]
    assert lines[0] == ["a", "b"]
    assert lines[2:] == [["a", "90.0", "%", "40.0", "%"], ["b", "30.0", "%", "80.0", "%"]]
    assert "worst case" not in shown


def test_features_are_counted():
    facts = {"kind": "usefulness", "norm": "l2", "eps": 0.5, "features": 4, "classes": ["a", "b"]}
    shown = feature_table([row(**facts, counts={"robust": 2, "non_robust": 4, "useless": 2})])
    assert "4 × 2" in shown and "25.0 %" in shown and "50.0 %" in shown


def test_a_text_has_only_what_there_is():
    assert len(result_text([row()]).splitlines()) == 3
    assert "and worst case" in result_text([row(under_attack=[attack()])])


# ------------------------------------------------------------------------------ tables of a terminal


MANY = [
    row(
        evaluation=evaluation,
        model=f"from_{name}@eps=0.5,steps={steps}",
        trained_on=name,
        under_attack=[attack()] if evaluation == "robustness" else [attack(surrogate="standard")],
        agreement={"rule": "next", "accuracy": 0.25},
    )
    for evaluation in ("robustness", "transfer")
    for name in ("robust_features_noise", "other")
    for steps in (1, 1000)
]
"""An experiment with much to show, whose complete table of accuracies has 137 columns."""


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_table_for_a_terminal_is_no_wider_and_says_what_gave_way(width):
    assert max(map(len, result_text(MANY).splitlines())) > 120
    every = result_text(MANY, width).splitlines()
    assert max(map(len, every)) <= width
    shown = headline(MANY, width, "notbugs show --all").splitlines()
    assert max(map(len, shown)) <= width and len(shown) < len(every)
    assert shown[-1] == "more, under attack, transfer: notbugs show --all"
    head, _, *lines = shown
    assert len({line for line in lines if " 50.0 %" in line}) == 4, "each once, and told apart"
    for needed in ("learner", "accuracy", "95 %", "trained on"):
        assert needed in head
    given_way = " ".join(lines).partition("in every line: ")[2]
    assert "chance" in head or "chance 10.0 %" in given_way
    assert "agrees with next 25.0 %" in given_way


def test_columns_give_way_by_importance_and_a_wide_terminal_shows_them_all():
    head, lines = ["node", "version", "state"], [["a" * 10, "v" * 25, "done"], ["b" * 10, "w" * 25, "there"]]
    assert fitted(head, lines, 44) == fitted(head, lines, None) == table(head, lines)
    assert fitted(head, lines, 43, ["node", "state"]).splitlines() == [
        "node        state",
        "──────────  ─────",
        "aaaaaaaaaa  done",
        "bbbbbbbbbb  there",
        "left out for lack of width: version",
    ]
    assert max(map(len, fitted(head, lines, 8, ["node"]).splitlines())) <= 8
    lines[0][2] = "to make " * 9
    assert fitted(head, lines, 43, ["node"]).splitlines()[0] == "node        version", "what has room is shown"


@given(head=st.lists(WORDS, min_size=1, max_size=5, unique=True), width=st.integers(1, 60), data=st.data())
def test_no_table_is_wider_than_its_terminal_whatever_it_holds(head, width, data):
    cells = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=30)
    lines = data.draw(st.lists(st.lists(cells, min_size=len(head), max_size=len(head)), max_size=4))
    important = data.draw(st.lists(st.sampled_from(head), unique=True))
    table_of_it = fitted(head, lines, width, important).partition("\nin ")[0]
    assert max(map(len, table_of_it.splitlines()), default=0) <= width


def test_names_are_cut_no_more_than_the_columns_need_and_stay_apart():
    head = ["node", "state", "done", "time", "retries"]
    names = ["datasets/robust_features@seed=0", "datasets/nonrobust_features@seed=0", "models/standard@seed=0"]
    lines = [[name, "waiting", "", "", ""] for name in names]
    lines[2][1:3] = ["running", "8 of 10"]

    def shown(width):
        top, _, *rest = fitted(head, lines, width, ("node", "state", "done", "time")).splitlines()
        assert max(map(len, [top, *rest])) <= width
        return top.split(), [line.split()[0] for line in rest[:3]]

    assert shown(60) == (["node", "state", "done"], names), "a column of nothing takes no room"
    top, cut = shown(45)
    assert top == ["node", "state", "done"] and len(set(cut)) == 3 and max(map(len, cut)) == 27, "45 less the others"
    top, cut = shown(33)
    assert top == ["node", "state"] and len(set(cut)) == 3, "a column gives way before two names look alike"
