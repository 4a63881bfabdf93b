"""The published figures, and the model of a run that each compares with, recognised by how it was made."""

import re
from typing import Any

import pytest

from pipeline.experiment.graph import build
from pipeline.experiment.spec import parse
from pipeline.report import published
from pipeline.report.published import CIFAR10, RESTRICTED, TABLE, Condition, Setting, beside, data_of, kind, setting

ATTACK = {"images": "a", "model": "b"}
TRAIN = {"arch": "small_cnn"}

DATASETS = {
    "D_rand": {"attack": ATTACK, "relabel": "random"},
    "D_other": {"attack": ATTACK, "relabel": "other"},
    "D_det": {"attack": ATTACK, "relabel": "next"},
    "D_det, robust source": {"attack": {**ATTACK, "model": "robust"}, "relabel": "next"},
    "D_det, not transferring": {"attack": {**ATTACK, "not_transferring_to": ["robust"]}, "relabel": "next"},
    "D_rand, leakage only": {"attack": {**ATTACK, "method": "leakage"}, "relabel": "random"},
    "D_other, noise": {"attack": {"images": "a", "method": "noise"}, "relabel": "other"},
    "D_other, untouched": {"attack": {"images": "a", "method": "none"}, "relabel": "other"},
    "D_rand, universal": {"attack": {**ATTACK, "method": "universal"}, "relabel": "random"},
    "D_R": {"invert": {"images": "a", "model": "robust"}},
    "D_R, from noise": {"invert": {"images": "a", "model": "robust", "start": "noise"}},
    "D_NR": {"invert": {"images": "a", "model": "b"}},
}

BROUGHT: list[tuple[dict[str, Any], str | None]] = [
    ({"attack": {**ATTACK, "model": "brought"}, "relabel": "random"}, "D_rand"),
    ({"attack": {**ATTACK, "model": "brought", "method": "leakage"}, "relabel": "random"}, "D_rand, leakage only"),
    ({"invert": {"images": "a", "model": "brought"}}, None),
]
"""What is made from a model of which nobody here knows how robust it is, and what a learner from it is."""

TEN = range(10)

NEITHER: list[dict[str, Any]] = [
    {"attack": {"images": "d9", "model": "b"}, "relabel": "other"},
    {"invert": {"images": "d1", "model": "robust"}},
    {"attack": ATTACK, "relabel": {"rule": "map", "map": {str(k): k for k in TEN}}},
]
"""None of the paper's sets: an attack on D_R, the inversion of D_other, true labels."""


def made(load, **models):
    """Name → node of an experiment whose datasets are called d0, d1, …"""
    datasets = {"a": {"load": load}, **{f"d{i}": dataset for i, dataset in enumerate(DATASETS.values())}}
    datasets |= {f"brought{i}": dataset for i, (dataset, _) in enumerate(BROUGHT)}
    datasets |= {f"neither{i}": dataset for i, dataset in enumerate(NEITHER)}
    datasets["shifted"] = {"attack": ATTACK, "relabel": {"rule": "map", "map": {k: (k + 1) % 10 for k in TEN}}}
    datasets["top"] = {"select": {"images": "d1", "keep": "top", "share": 0.4}}
    learners = {f"m{i}": {"train": {**TRAIN, "on": f"d{i}"}} for i in range(len(DATASETS))}
    sources = {
        "b": {"train": {**TRAIN, "on": "a"}},
        "robust": {"train": {**TRAIN, "on": "a", "adversarial": {"eps": 0.5, "steps": 7}}},
        "brought": {"pretrained": {"arch": "resnet18", "weights": "DEFAULT"}},
    }
    experiment = {"name": "e", "datasets": datasets, "models": {**sources, **learners, **models}}
    return {node.name: node for node in build(parse(experiment))}


@pytest.fixture(scope="module")
def nodes():
    more = {
        "best": {"train": {**TRAIN, "on": "top"}},
        "linear": {"train": {"on": "d0", "probe": "robust"}},
        "turned": {"train": {**TRAIN, "on": "a", "augment": "spatial"}},
        "linear_brought": {"train": {"on": "d0", "probe": "brought"}},
        **{f"from_neither{i}": {"train": {**TRAIN, "on": f"neither{i}"}} for i in range(len(NEITHER))},
        "from_shifted": {"train": {**TRAIN, "on": "shifted"}},
        **{f"from_brought{i}": {"train": {**TRAIN, "on": f"brought{i}"}} for i in range(len(BROUGHT))},
    }
    return made({"source": "cifar10"}, **more)


@pytest.mark.parametrize(("number", "words"), list(enumerate(DATASETS)))
def test_a_learner_is_what_it_learned_from(nodes, number, words):
    assert kind(nodes[f"m{number}"]) == words


@pytest.mark.parametrize(("number", "words"), [(i, words) for i, (_, words) in enumerate(BROUGHT)])
def test_a_model_from_elsewhere_is_not_said_to_be_robust_or_not(nodes, number, words):
    assert kind(nodes[f"from_brought{number}"]) == words


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("b", "D"),
        ("robust", "D, adversarial training"),
        ("turned", "D, spatial augmentation"),
        ("best", "D_other, top margins"),
        ("linear", "D_rand, robust features only"),
        ("linear_brought", None),
        ("brought", None),
        ("from_neither0", None),
        ("from_neither1", None),
        ("from_neither2", None),
        ("from_shifted", "D_map"),
    ],
)
def test_other_models_are_what_was_done_with_them(nodes, name, words):
    assert kind(nodes[name]) == words


BALL = {"norm": Condition("L2", "ε 0.5"), "steps": Condition("", "100 steps of 0.1")}
SOURCE = {"source": Condition("source L2", "ε 0.5")}


def percents(of: str | None, data: str | None, ours: Setting, under: str = "clean") -> list[str]:
    return [figure.percent for figure in beside(of, data, ours, under)]


def test_figures_are_of_the_same_data_where_there_are_any():
    assert percents("D_rand", RESTRICTED, BALL) == ["87.9"]
    assert {f.data for f in beside("D_rand", None, BALL)} == {CIFAR10}
    assert {f.data for f in beside("D_other", RESTRICTED, BALL)} == {CIFAR10}
    assert percents("D_R", CIFAR10, SOURCE, "L2 ε 0.5") == ["21.85", "19.22"]
    assert [f.data for f in beside("D", CIFAR10, {}, "±30°, ±10 %, worst of 10")] == ["ImageNet"]
    assert percents("D_det", None, BALL, "as next") == ["16.2"]
    assert percents("D_det, robust source", CIFAR10, BALL | SOURCE, "as next") == ["65.5"]
    assert percents("D_det, not transferring", CIFAR10, BALL, "as next") == ["70.8"]
    assert percents(None, CIFAR10, BALL) == [] == percents("D_rand", CIFAR10, BALL, "L2 ε 0.5")


def test_figures_of_another_norm_share_or_source_are_not_beside():
    linf = {"norm": Condition("L∞", "ε 0.03")}
    assert percents("D_rand", CIFAR10, linf) == [] == percents("D, adversarial training", CIFAR10, linf)
    assert percents("D_R", CIFAR10, {"source": Condition("source L∞", "ε 0.03")}) == []
    top = {"share": Condition("share 40 %")}
    assert percents("D_other, top margins", CIFAR10, BALL | top) == ["78.2"]
    assert percents("D_other, top margins", CIFAR10, BALL | {"share": Condition("share 10 %")}) == []


def test_a_figure_says_what_it_was_made_with_where_that_is_not_as_here():
    (figure,) = [f for f in beside("D_rand", CIFAR10, BALL) if f.source == published.PAPER]
    assert figure.differing(BALL) == []
    assert figure.differing(BALL | {"norm": Condition("L2", "ε 0.75")}) == ["L2 ε 0.5"]
    assert figure.differing({"norm": Condition("L2", "ε 0.5"), "steps": Condition("", "7 steps of 0.1")}) == [
        "100 steps of 0.1"
    ]
    (jordans,) = [f for f in beside("D_other", CIFAR10, BALL) if f.source == published.JORDAN]
    assert jordans.differing(BALL) == ["L2 ε about 0.5", "12 steps of 0.25", "64 epochs"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("b", ["30 epochs"]),
        ("brought", []),
        ("robust", ["L2 ε 0.5", "7 steps of 0.1", "30 epochs"]),
        ("m0", ["L2 ε 0.5", "100 steps of 0.1", "30 epochs"]),
        ("m3", ["L2 ε 0.5", "100 steps of 0.1", "source L2 ε 0.5", "30 epochs"]),
        ("m6", ["L2 ε 0.5", "30 epochs"]),
        ("m7", ["30 epochs"]),
        ("m9", ["inverted in 1000 steps of 0.1", "source L2 ε 0.5", "30 epochs"]),
        ("m11", ["inverted in 1000 steps of 0.1", "30 epochs"]),
        ("best", ["L2 ε 0.5", "100 steps of 0.1", "share 40 %", "30 epochs"]),
    ],
)
def test_a_setting_is_what_a_model_and_its_images_were_made_with(nodes, name, said):
    assert [str(part) for part in setting(nodes[name]).values()] == said


@pytest.mark.parametrize(
    ("load", "data"),
    [
        ({"source": "cifar10"}, CIFAR10),
        ({"source": "image-folder", "root": "x", "classes": "restricted-imagenet"}, RESTRICTED),
        ({"source": "image-folder", "root": "x"}, None),
        ({"source": "sklearn-digits"}, None),
    ],
)
def test_data_is_that_of_the_source_however_often_it_was_changed(load, data):
    assert {data_of(node) for node in made(load).values() if node.stage != "pretrained"} == {data}


def test_a_model_from_elsewhere_was_trained_on_no_data_known_here(nodes):
    assert data_of(nodes["brought"]) is None


def test_every_figure_is_a_share_with_a_source_and_none_stands_twice():
    for figure in TABLE:
        low, *high = (float(part) for part in re.split(" – ", figure.percent))
        assert 0 <= low <= 100 and all(low < value <= 100 for value in high) and figure.source
    places = [(f.of, f.data, f.source, f.under) for f in TABLE]
    assert len(places) == len(set(places))
    assert all(0 < share < 100 for rates in published.TRANSFER.values() for share in rates)
