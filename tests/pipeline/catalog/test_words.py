"""Every recipe is described in words, from what its folder in the store holds."""

from pathlib import Path

import pytest

from pipeline.catalog.words import RULES, in_words
from pipeline.experiment import spec
from pipeline.experiment.graph import build
from stages import recipes

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))

CLEAN = {"load": {"source": "sklearn-digits"}}
STANDARD = {"train": {"on": "clean", "arch": "small_cnn"}}
ATTACK = {"images": "clean", "model": "standard", "eps": 1.5}


def described(node):
    """A node in words, from its group, its inputs and its ``recipe.json``."""
    parents = {role: {"node": parent.id, "version": parent.version} for role, parent in node.inputs.items()}
    return in_words({"group": node.group, "parents": parents}, node.described())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_node_of_the_configs_has_a_sentence(config):
    for node in build(spec.read(config)):
        text = described(node)
        assert not text.startswith(f"{node.stage} with "), text
        assert "None" not in text and "\n" not in text
        if node.stage in ("invert", "select", "train"):
            assert all(parent.name in text for parent in node.inputs.values()), text


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (
            {"datasets": {"x": {"load": {"source": "image-folder", "root": "val", "resize": 256, "crop": 224}}}},
            "images of image-folder val, 224×224 pixels",
        ),
        ({"datasets": {"x": {"attack": ATTACK | {"method": "noise"}, "relabel": "next"}}},
            "clean with random noise, L2 ε 1.5, labelled with the target, the class after "
            "the true one, cyclically"),
        ({"datasets": {"x": {"attack": ATTACK | {"not_transferring_to": ["other"]}, "relabel": "random"}}},
            "clean attacked by targeted PGD on standard, not fooling other: L2 ε 1.5, 100 steps of 0.3; labelled with "
            "the target, a class drawn uniformly from all classes"),
        ({"datasets": {"x": {"invert": {"images": "clean", "model": "standard"}}}},
            "images with the features of clean under standard, from another image, 1000 steps of 0.1"),
        ({"datasets": {"x": {"select": {"images": "moved", "by": "margin", "keep": "top", "share": 0.25}}}},
            "the 25% of moved with the largest margin in each shard"),
        ({"models": {"x": {"train": {"on": "clean", "probe": "standard", "adversarial": {"eps": 0.5}}}}},
            "a linear layer on the features of standard trained on clean train for 30 epochs from lr 0.05, "
            "adversarially: L2 ε 0.5, 7 steps of 0.1, seed 0"),
        ({"models": {"x": {"pretrained": {"arch": "resnet50", "weights": "IMAGENET1K_V2"}}}},
            "resnet50 with pretrained weights: IMAGENET1K_V2"),
        ({"evaluations": {"x": {"models": ["standard", "other"], "on": "clean", "attacks": [{"eps": [0.5, 1]}]}}},
            "accuracy of standard, other on clean test, clean and under 2 attacks"),
        ({"evaluations": {"x": {"usefulness": {"models": ["standard"], "on": "clean", "eps": 0.25}}}},
            "usefulness of the features of standard on clean test, L2 ε 0.25, 10 steps of 0.05"),
    ],
)  # fmt: skip
def test_a_recipe_in_words(part, words):
    experiment = {
        "name": "words",
        "datasets": {"clean": CLEAN, "moved": {"attack": ATTACK, "relabel": "other"}, **part.get("datasets", {})},
        "models": {"standard": STANDARD, "other": STANDARD, **part.get("models", {})},
        "evaluations": part.get("evaluations", {}),
    }
    (node,) = (node for node in build(spec.parse(experiment)) if node.name == "x")
    assert described(node) == words


def test_a_recipe_of_another_revision_is_listed_by_its_keys():
    (node,) = build(spec.parse({"name": "words", "datasets": {"clean": CLEAN}}))
    file = node.described()
    file["parameters"] = file["parameters"] | {"unknown": 3}
    text = in_words({"group": "datasets", "parents": {}}, file)
    assert "unknown 3" in text


def test_every_label_rule_has_words():
    assert set(RULES) == set(recipes.RULES)
