"""The versions of every experiment in `configs/`, and of one recipe of each kind, are frozen.

They change only if a stage's number in `REVISIONS` is raised. After that, or for a new config, write them again:

    python tests/pipeline/experiment/test_versions.py --write
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.experiment import spec
from pipeline.experiment.graph import build
from stages.recipes import SOURCES, STAGES, Attack, Evaluate, Later, Pretrained, Train

HERE = Path(__file__).resolve()
FROZEN = HERE.parents[2] / "data" / "versions.json"
CONFIGS = sorted((HERE.parents[3] / "configs").glob("*.yaml"))

ON, ATTACK = {"on": "sklearn-digits", "arch": "small_cnn"}, {"images": "sklearn-digits", "model": "train"}
METHODS = ("pgd", "universal", "spatial", "noise", "leakage", "none")
SMALLEST: dict[str, Any] = {
    "name": "smallest",
    "datasets": {
        "sklearn-digits": {"load": {"source": "sklearn-digits"}},
        "cifar10": {"load": {"source": "cifar10"}},
        "image-folder": {"load": {"source": "image-folder", "root": "x"}},
        "cropped": {"load": {"source": "image-folder", "root": "x", "crop": 224}},
        "webdataset": {"load": {"source": "webdataset", "shards": {"train": "x.tar"}}},
        "parquet": {"load": {"source": "parquet", "files": {"train": "x.parquet"}}},
        "synthetic": {"load": {"source": "synthetic"}},
        **{method: {"attack": {**ATTACK, "method": method}, "relabel": "other"} for method in METHODS},
        "next": {"attack": ATTACK, "relabel": "next"},
        "invert": {"invert": ATTACK},
        "select": {"select": {"images": "pgd", "keep": "top", "share": 0.5}},
    },
    "models": {
        "train": {"train": ON},
        "adversarial": {"train": {**ON, "adversarial": {}}},
        "probe": {"train": {"on": "pgd", "probe": "adversarial"}},
        "pretrained": {"pretrained": {"arch": "resnet18", "weights": "x.pt"}},
    },
    "evaluations": {
        "evaluate": {"models": ["train"], "on": "cifar10"},
        "attacked": {"models": ["train"], "on": "cifar10", "attacks": [{}, {"method": "apgd"}]},
        "spatial": {"models": ["train"], "on": "cifar10", "spatial": [{}, {"search": "random"}]},
        "usefulness": {"usefulness": {"models": ["train"], "on": "cifar10"}},
    },
}
"""A recipe of every kind with nothing but what it needs: a key added to one of them would show here."""


def versions(experiment: spec.Experiment) -> dict[str, str]:
    return {node.id: node.version for node in build(experiment)}


def frozen_names() -> dict[str, Any]:
    return {"smallest": None, **{file.stem: file for file in CONFIGS}}


def now(name: str) -> dict[str, str]:
    file = frozen_names()[name]
    return versions(spec.parse(SMALLEST) if file is None else spec.read(file))


@pytest.mark.parametrize("name", frozen_names())
def test_versions_are_those_that_were_frozen(name):
    assert now(name) == json.loads(FROZEN.read_text())[name]


def test_every_kind_of_recipe_is_frozen():
    nodes = build(spec.parse(SMALLEST))
    kinds = {type(node.recipe) for node in nodes}
    assert kinds == {*SOURCES.values(), *(recipe for group in STAGES.values() for recipe in group.values()), Evaluate}


class Hastier(Attack):
    """An attack with an additional key, as if it had always existed."""

    hasty: bool = False


class LaterHastier(Attack):
    """An attack with a key that was added later."""

    hasty: Later[bool] = False


def test_a_key_added_later_is_part_of_a_version_only_where_it_is_not_the_default():
    plain = {"images": "clean", "model": "net"}
    before = Attack(**plain).parameters()
    assert LaterHastier(**plain).parameters() == before
    assert LaterHastier(**plain, hasty=False).parameters() == before, "whether it is written out or not"
    assert LaterHastier(**plain, hasty=True).parameters() == {**before, "hasty": True}
    assert Hastier(**plain).parameters() == {**before, "hasty": False}, "a key from the start is always part of it"


def test_the_rule_holds_in_recipes_within_recipes():
    class Trained(Train):
        adversarial: LaterHastier | None = None  # type: ignore[assignment]

    within = {"images": "clean", "model": "net"}
    recipe = Trained(on="clean", arch="small_cnn", adversarial=within)
    assert recipe.parameters()["adversarial"] == Attack(**within).parameters()


def test_keys_that_came_later_are_marked_on_the_field():
    assert {"key"} == Pretrained(arch="resnet18", weights="w.pt").implied
    later = {"adversarial", "alternating_flip", "compile", "deterministic"}
    later |= {"ema", "logit_scale", "norm_bias_lr", "whiten"}
    assert later == Train(on="clean", arch="small_cnn").implied


if __name__ == "__main__":
    content = json.dumps({name: now(name) for name in frozen_names()}, indent=1, ensure_ascii=False) + "\n"
    if "--write" in sys.argv:
        FROZEN.write_text(content)
    else:
        print(content, end="")
