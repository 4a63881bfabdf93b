"""Lists in place of a value expand into one node per value."""

import time
from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.experiment import spec
from pipeline.experiment.graph import build
from pipeline.experiment.sweeps import expand, name_at, split_name
from stages.errors import BadInput


def experiment(**attack):
    return {
        "name": "x",
        "datasets": {
            "clean": {"load": {"source": "sklearn-digits"}},
            "rand": {"attack": {"images": "clean", "model": "standard", **attack}, "relabel": "random"},
        },
        "models": {
            "standard": {"train": {"on": "clean", "arch": "small_cnn"}},
            "learner": {"train": {"on": "rand", "arch": "small_cnn"}},
        },
        "evaluations": {"accuracy": {"models": ["standard", "learner"], "on": "clean"}},
    }


def nodes(found):
    return {node.id: node for node in build(spec.parse(found))}


def test_without_lists_nothing_changes():
    assert expand(experiment(eps=1.0)) == experiment(eps=1.0)


def test_a_list_makes_a_node_for_each_value_and_all_that_follows_from_it():
    found = nodes(experiment(steps=[1, 10]))
    assert set(found) == {
        "datasets/clean", "datasets/rand@steps=1", "datasets/rand@steps=10", "models/standard",
        "models/learner@steps=1", "models/learner@steps=10", "evaluations/accuracy",
    }  # fmt: skip
    assert found["datasets/rand@steps=10"].recipe.steps == 10
    assert found["models/learner@steps=10"].recipe.on == "rand@steps=10"
    assert found["evaluations/accuracy"].recipe.models == ["standard", "learner@steps=1", "learner@steps=10"]


def test_a_fraction_in_a_list_is_the_number_that_it_is():
    found = nodes(experiment(norm="linf", eps=["1/4", 0.5]))
    assert found["datasets/rand@eps=0.25"].recipe.eps == 0.25
    with pytest.raises(BadInput, match=r"datasets.rand: eps takes the value 0.5 twice"):
        nodes(experiment(norm="linf", eps=["1/2", 0.5]))


def test_what_looks_like_a_fraction_stays_text_where_text_belongs():
    asked = experiment()
    asked["datasets"]["clean"]["load"] = {"source": "image-folder", "root": ["2020/10", "2020/11"]}
    assert nodes(asked)["datasets/clean@root=2020-10"].recipe.root == "2020/10"


def test_two_lists_make_a_grid():
    found = nodes(experiment(steps=[1, 10], eps=[0.5, 1.0]))
    assert sum(name.startswith("models/learner@") for name in found) == 4
    recipe = found["datasets/rand@steps=10,eps=0.5"].recipe
    assert (recipe.steps, recipe.eps, recipe.step_size) == (10, 0.5, 0.1)


def test_seeds_repeat_all_that_chance_has_a_part_in_but_not_the_source():
    found = nodes(experiment() | {"seeds": [0, 1, 2]})
    assert "datasets/clean" in found
    assert len(found) == 1 + 3 * 3 + 1
    rand = found["datasets/rand@seed=2"]
    assert (rand.recipe.seed, rand.relabel.seed, rand.recipe.model) == (2, 2, "standard@seed=2")
    assert found["models/learner@seed=2"].recipe.seed == 2


def test_seeds_of_one_entry_repeat_it_and_what_follows_from_it():
    asked = experiment()
    asked["datasets"]["rand"]["seeds"] = [3, 4]
    found = nodes(asked)
    assert "models/standard" in found
    assert found["models/learner@seed=4"].recipe.seed == 4
    assert found["datasets/rand@seed=4"].recipe.model == "standard"


def test_a_seed_that_is_given_stays():
    asked = experiment() | {"seeds": [0, 1]}
    asked["models"]["standard"]["train"]["seed"] = 7
    found = nodes(asked)
    assert found["models/standard"].recipe.seed == 7
    assert found["models/learner@seed=1"].recipe.seed == 1


def test_nodes_that_meet_are_paired_along_an_axis():
    asked = experiment(not_transferring_to=["other"]) | {"seeds": [0, 1]}
    asked["models"]["other"] = deepcopy(asked["models"]["standard"])
    found = nodes(asked)
    assert found["datasets/rand@seed=1"].recipe.not_transferring_to == ["other@seed=1"]
    assert set(found["datasets/rand@seed=1"].inputs) == {"images", "model", "not_transferring_to.other@seed=1"}


def test_nodes_that_meet_must_have_the_same_values_on_an_axis():
    asked = experiment()
    asked["models"]["standard"]["train"]["lr"] = [0.1, 0.2]
    asked["models"]["learner"]["train"]["lr"] = [0.3]
    with pytest.raises(BadInput, match=r"models.learner: lr takes the values \[0.3\] here and \[0.1, 0.2\]"):
        spec.parse(asked)


def test_a_list_one_level_down_is_an_axis_too():
    asked = experiment()
    asked["models"]["standard"]["train"]["adversarial"] = {"eps": [0.5, 1.0]}
    found = nodes(asked)
    assert found["models/standard@adversarial.eps=1.0"].recipe.adversarial.eps == 1.0
    assert "models/learner@adversarial.eps=1.0" in found


def test_an_evaluation_on_a_swept_dataset_takes_the_models_of_the_same_point():
    asked = experiment(steps=[1, 10])
    asked["evaluations"]["accuracy"] |= {"on": "rand", "split": "train"}
    found = nodes(asked)
    assert found["evaluations/accuracy@steps=10"].recipe.models == ["standard", "learner@steps=10"]


def test_a_transfer_attack_meets_the_models_of_its_own_seed():
    asked = experiment() | {"seeds": [0, 1]}
    asked["evaluations"]["accuracy"]["attacks"] = [{"eps": 1, "surrogate": ["standard"]}]
    found = nodes(asked)
    assert "evaluations/accuracy" not in found
    recipe = found["evaluations/accuracy@seed=1"].recipe
    assert (recipe.models, recipe.surrogates) == (["standard@seed=1", "learner@seed=1"], ["standard@seed=1"])


def test_a_list_in_a_usefulness_evaluation_makes_one_for_each_value():
    asked = experiment() | {"seeds": [0, 1]}
    asked["evaluations"]["features"] = {"usefulness": {"models": ["standard"], "on": "clean", "eps": [0, 0.5]}}
    found = nodes(asked)
    features = {name: node.recipe for name, node in found.items() if name.startswith("evaluations/features")}
    assert {name: recipe.eps for name, recipe in features.items()} == {
        "evaluations/features@eps=0": 0, "evaluations/features@eps=0.5": 0.5
    }  # fmt: skip
    assert features["evaluations/features@eps=0"].models == ["standard@seed=0", "standard@seed=1"]


def test_seeds_of_one_evaluation_are_no_key():
    asked = experiment(steps=[1, 2])
    asked["evaluations"]["accuracy"]["seeds"] = [0, 1]
    with pytest.raises(BadInput, match="seeds"):
        spec.parse(asked)


def test_two_values_that_give_one_name_are_refused():
    asked = experiment()
    asked["models"]["learner"]["train"]["arch"] = ["pkg.nets:a", "pkg.nets-a"]
    with pytest.raises(BadInput, match=r"models\.learner: two values of arch give one name, learner@arch=pkg\.nets-a"):
        spec.parse(asked)


def spoilt(place: str, value):
    """An experiment with seeds and one invalid part."""
    asked = experiment() | {"seeds": [0, 1]}
    *way, last = place.split(".")
    inner = asked
    for key in way:
        inner = inner[key]
    inner[last] = value
    return asked


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("datasets", None), ("datasets", [1]), ("datasets.rand", 5), ("datasets.rand.attack", "x"), ("models", {}),
        ("models.learner", [1]), ("models.learner.train.on", {"a": 1}),
        ("evaluations", 3), ("evaluations.accuracy", 3), ("evaluations.accuracy", {"usefulness": "x"}),
        ("evaluations.accuracy.models", [{}]), ("evaluations.accuracy.models", 4), ("evaluations.accuracy.on", [1]),
        ("evaluations.accuracy.attacks", 5), ("evaluations.accuracy.attacks", [5]),
        ("evaluations.accuracy.attacks", [{"surrogate": [{"a": 1}]}]),
    ],
)  # fmt: skip
def test_what_is_not_what_it_should_be_gets_a_sentence_all_the_same(place, value):
    with pytest.raises(BadInput):
        build(spec.parse(spoilt(place, value)))


def test_an_expanded_experiment_is_left_as_it_is():
    parsed = spec.parse(experiment(steps=[1, 10]) | {"seeds": [0, 1]})
    assert spec.parse(parsed.model_dump(mode="json", exclude_defaults=True)) == parsed


def test_lists_that_a_key_takes_are_no_axes():
    asked = experiment(splits=["train", "test"])
    asked["models"]["learner"]["train"] |= {"schedule": "steps", "milestones": [3, 6]}
    assert set(nodes(asked)) == set(nodes(experiment()))


@pytest.mark.parametrize("seeds", [3, [], "0 1", None, {"a": 1}, [True], [0.5], [-1], ["0"], [[0]]])
@pytest.mark.parametrize("where", ["the experiment", "an entry", "an experiment without chance"])
def test_seeds_must_be_a_list_of_whole_numbers(seeds, where):
    asked = experiment()
    if where == "an experiment without chance":
        asked = {"name": "x", "datasets": {"clean": asked["datasets"]["clean"]}}
    (asked["datasets"]["clean"] if where == "an entry" else asked)["seeds"] = seeds
    place = "datasets.clean.seeds" if where == "an entry" else "seeds"
    with pytest.raises(BadInput, match=f"^{place}: must be a list of whole numbers"):
        spec.parse(asked)


def test_seeds_that_would_repeat_nothing_are_refused():
    asked = {"name": "x", "datasets": {"clean": experiment()["datasets"]["clean"]}, "seeds": [0, 1]}
    with pytest.raises(BadInput, match=r"^seeds: no dataset or model is stochastic"):
        spec.parse(asked)
    asked = experiment()
    asked["models"]["standard"]["train"]["seed"] = 7
    asked["models"]["standard"]["seeds"] = [0, 1]
    with pytest.raises(BadInput, match=r"^models.standard.seeds: it has no `seed` of its own"):
        spec.parse(asked)
    asked = experiment()
    asked["datasets"]["top"] = {"select": {"images": "rand", "keep": "top", "share": 0.5}, "seeds": [0, 1]}
    with pytest.raises(BadInput, match=r"^datasets.top.seeds: it has no `seed` of its own"):
        spec.parse(asked)


def test_seeds_of_a_source_split_it_in_other_ways():
    asked = {"name": "x", "datasets": {"clean": experiment()["datasets"]["clean"] | {"seeds": [0, 1]}}}
    assert [node.recipe.seed for node in nodes(asked).values()] == [0, 1]


@pytest.mark.parametrize("values", [[1, 2, 1], [1, 1.0], ["a", "a"], [{"eps": 1}, {"eps": 1}]])
def test_a_value_that_stands_twice_in_a_list_is_refused(values):
    with pytest.raises(BadInput, match=r"datasets.rand: steps takes the value .* twice"):
        spec.parse(experiment(steps=values))


@pytest.mark.parametrize("asked", [
    experiment() | {"seeds": list(range(10_000))},
    experiment(steps=list(range(1, 400)), eps=list(range(1, 400))),
    # 300 evaluations of 300 models each: few nodes, many models to score.
    experiment(steps=list(range(1, 100))) | {"models": {
        "standard": {"train": {"on": "clean", "arch": "small_cnn", "lr": list(range(1, 300))}},
    }, "evaluations": {"a": {"models": ["standard"], "on": "rand"}, "b": {"usefulness": {
        "models": ["standard"], "on": "clean", "steps": list(range(1, 300))}}}},
])  # fmt: skip
def test_lists_that_stand_for_too_many_nodes_are_refused_at_once(asked):
    began = time.monotonic()
    with pytest.raises(BadInput, match=r"stand for [\d,]+ nodes and [\d,]+ values, at most 10,000 and 500,000"):
        spec.parse(asked)
    assert time.monotonic() - began < 1


def test_a_circle_of_swept_nodes_is_refused():
    asked = experiment(steps=[1, 2])
    asked["models"]["standard"]["train"]["on"] = "rand"
    with pytest.raises(BadInput, match="goes in a circle"):
        spec.parse(asked)


words = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]*", fullmatch=True)


@given(words, st.dictionaries(words, words, max_size=4))
def test_a_name_says_its_place(base, point):
    assert split_name(name_at(base, point)) == (base, point)
