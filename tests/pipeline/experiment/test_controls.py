"""`leakage: rand` expands into these nodes."""

import pytest

from pipeline.experiment import spec
from pipeline.experiment.graph import build
from stages.errors import BadInput


def experiment(with_robust=True, **leak):
    train = {"on": "clean", "arch": "small_cnn", "epochs": 3}
    return {
        "name": "x",
        "datasets": {
            "clean": {"load": {"source": "sklearn-digits"}},
            "rand": {"attack": {"images": "clean", "model": "standard", "eps": 1.5}, "relabel": "random"},
        },
        "models": {
            "standard": {"train": train},
            **({"robust": {"train": {**train, "adversarial": {"eps": 0.5, "steps": 2}}}} if with_robust else {}),
            "learner": {"train": {**train, "on": "rand", "lr": 0.02, "mean": [0.5]}},
        },
        "evaluations": {"leak": {"leakage": "rand", **leak}},
    }


def nodes(found):
    return {node.id: node for node in build(spec.parse(found))}


def test_every_control_is_a_node():
    found = nodes(experiment())
    assert found["evaluations/leak"].recipe.models == [
        "learner", "learner.probe", "learner.leakage", "learner.top", "learner.bottom", "learner.robust-source",
    ]  # fmt: skip
    assert found["evaluations/leak"].recipe.on == "clean"
    assert found["datasets/rand.leakage"].recipe.method == "leakage"
    assert found["datasets/rand.leakage"].recipe.eps == 1.5
    assert found["datasets/rand.leakage"].relabel == found["datasets/rand"].relabel
    assert found["datasets/rand.robust-source"].recipe.model == "robust"
    assert (found["datasets/rand.top"].recipe.share, found["datasets/rand.bottom"].recipe.share) == (0.4, 0.6)


def test_the_learners_of_the_controls_are_trained_as_the_learner_is():
    found = nodes(experiment(probe={"lr": 0.5}))
    assert found["models/learner.leakage"].recipe == found["models/learner"].recipe.model_copy(
        update={"on": "rand.leakage"}
    )
    probe = found["models/learner.probe"].recipe
    assert (probe.probe, probe.on, probe.arch, probe.lr, probe.epochs) == ("robust", "rand", None, 0.5, 3)


def test_a_probe_is_not_asked_what_only_a_network_has():
    said = experiment()
    said["models"]["learner"]["train"] |= {"arch": "airnet", "whiten": True, "norm_bias_lr": 64, "logit_scale": 0.2}
    probe = nodes(said)["models/learner.probe"].recipe
    assert (probe.whiten, probe.norm_bias_lr, probe.logit_scale) == (False, 1, None)


def test_a_search_that_stops_early_has_a_control_of_noise_that_does_not():
    said = experiment()
    said["datasets"]["rand"]["attack"] |= {"stop_at_margin": 2.0, "views": 2}
    found = nodes(said)
    assert found["datasets/rand.leakage"].recipe.stop_at_margin is None
    assert found["datasets/rand.robust-source"].recipe.stop_at_margin == 2.0


def test_without_a_robust_model_its_controls_are_left_out():
    found = nodes(experiment(with_robust=False))
    assert found["evaluations/leak"].recipe.models == ["learner", "learner.leakage", "learner.top", "learner.bottom"]


@pytest.mark.parametrize("asked", [["leakage"], ["probe"], ["robust-source", "top"]])
def test_only_the_controls_asked_for_are_made(asked):
    found = nodes(experiment(controls=asked))
    assert set(found["evaluations/leak"].recipe.models) == {"learner", *(f"learner.{control}" for control in asked)}
    sets = {name for name in found if name.startswith("datasets/rand.")}
    assert sets == {f"datasets/rand.{control}" for control in asked if control != "probe"}


@pytest.mark.parametrize(
    ("leak", "sentence"),
    [
        ({"controls": []}, "evaluations.leak.controls: "),
        ({"controls": ["probes"]}, "evaluations.leak.controls.0: must be 'leakage', 'top', 'bottom', 'probe' or"),
        ({"leakage": "clean"}, "evaluations.leak.leakage: names 'clean', which is no dataset made by an attack"),
        ({"learner": "nobody"}, "evaluations.leak.learner: names 'nobody', which is no model that is trained"),
        ({"lerner": "x"}, "evaluations.leak.lerner: unknown key, known keys: leakage, learner"),
        ({"share": 2}, "evaluations.leak.share: must be less than 1, got 2"),
        ({"robust": "nobody"}, "evaluations.leak.robust: names 'nobody', which is not one of the models"),
        (
            {"learner": "standard"},
            "evaluations.leak.learner: names 'standard', which is no model that is trained on rand",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(leak, sentence):
    with pytest.raises(BadInput) as refused:
        build(spec.parse(experiment(**leak)))
    assert str(refused.value).startswith(sentence)


def test_a_learner_that_is_not_the_only_one_must_be_named():
    asked = experiment()
    asked["models"]["second"] = asked["models"]["learner"]
    with pytest.raises(BadInput, match=r"evaluations\.leak\.learner: both learner and second fit; name one"):
        spec.parse(asked)
    del asked["models"]["second"], asked["models"]["learner"]
    with pytest.raises(BadInput, match=r"evaluations\.leak\.learner: no model is trained on rand; name one"):
        spec.parse(asked)


def test_two_evaluations_share_the_controls_that_they_have_alike_and_may_not_differ_in_one():
    asked = experiment()
    asked["evaluations"]["again"] = {"leakage": "rand", "split": "train"}
    assert nodes(asked)["evaluations/again"].recipe.models == nodes(asked)["evaluations/leak"].recipe.models
    asked["evaluations"]["again"]["share"] = 0.2
    with pytest.raises(
        BadInput, match=r"evaluations\.again\.leakage: makes datasets\.rand\.top, which is defined differently"
    ):
        spec.parse(asked)


@pytest.mark.parametrize("group", ["datasets", "models"])
@pytest.mark.parametrize("value", [None, 5, {}, {"rand": 1, "learner": 2}])
def test_what_is_not_what_it_should_be_gets_a_sentence_all_the_same(group, value):
    with pytest.raises(BadInput):
        spec.parse(experiment() | {group: value})
