"""A recipe in words."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from pipeline.report.scores import norm_name
from pipeline.run import artifacts
from pipeline.run.artifacts import Artifact
from pipeline.run.documents import Document, Version, Word, fits
from pipeline.store import Store, unsealed
from stages.errors import BadData, short
from stages.recipes import (
    SOURCES,
    STAGES,
    Adversary,
    Attack,
    Ball,
    Evaluate,
    Invert,
    Pretrained,
    Recipe,
    Relabel,
    Select,
    Train,
    Usefulness,
)


class RecipeFile(Document):
    """``recipe.json``."""

    stage: Word
    revisions: dict[Word, int]
    parameters: dict[str, Any]
    relabel: dict[str, Any] | None
    inputs: dict[str, Version]


def recipe_file(store: Store, made: Artifact) -> dict[str, Any]:
    """``recipe.json`` of a finished version.

    Raises:
        BadData: it is damaged.
    """
    content = artifacts.read_file(store, made, "recipe.json")
    found = unsealed(f"{made.folder}/recipe.json", content)
    if found is None or not fits(RecipeFile, found):
        raise BadData(f"{made.folder}/recipe.json is damaged, or of another version of this program")
    return found


def in_words(manifest: Mapping[str, Any], file: Mapping[str, Any]) -> str:
    """How a version was made, in one sentence without a full stop.

    Args:
        manifest: its manifest, which names the inputs.
        file: its ``recipe.json``.
    """
    try:
        recipe = _recipe(manifest["group"], file["stage"], file["parameters"], manifest["parents"])
        relabel = None if file["relabel"] is None else Relabel.model_validate(file["relabel"])
    except (ValidationError, KeyError):  # written by another revision, whose keys were others
        return _keys(file)
    match recipe:
        case Attack():
            return _attack(recipe, relabel)
        case Invert():
            start = "another image" if recipe.start == "other" else "noise"
            return (
                f"images with the features of {recipe.images} under {recipe.model}, "
                f"from {start}, {recipe.steps} steps of {recipe.step_size:g}"
            )
        case Select():
            return f"the {recipe.share:.0%} of {recipe.images} with the {_END[recipe.keep]} {recipe.by} in each shard"
        case Train():
            return _training(recipe)
        case Pretrained():
            return f"{recipe.arch} with pretrained weights: {recipe.weights}"
        case Evaluate():
            attacks = len(recipe.attacks) + len(recipe.spatial)
            under = f", clean and under {attacks} attack{'s' * (attacks != 1)}" if attacks else ""
            return f"accuracy of {_listed(recipe.models)} on {recipe.on} {recipe.split}{under}"
        case Usefulness():
            return (
                f"usefulness of the features of {_listed(recipe.models)} on {recipe.on} {recipe.split}, {_ball(recipe)}"
            )
    return _source(recipe) if "source" in file["parameters"] else _keys(file)


def _keys(file: Mapping[str, Any]) -> str:
    listed = ", ".join(f"{key} {short(str(value))}" for key, value in file["parameters"].items())
    return f"{file['stage']} with {listed}"


_END = {"top": "largest", "bottom": "smallest"}


def _recipe(group: str, stage: str, parameters: Mapping[str, Any], parents: Mapping[str, Any]) -> Recipe:
    """The recipe with the names of its inputs, which are not among the parameters.

    Raises:
        ValidationError, KeyError: it is of another revision.
    """
    kinds = {"load": SOURCES.get(parameters.get("source", "")), "evaluate": Evaluate, **STAGES[group]}
    kind = kinds[stage]
    if kind is None:
        raise KeyError(stage)
    named = {role: parent["node"].partition("/")[2] for role, parent in parents.items()}
    inputs: dict[str, Any] = {field: named[field] for field in kind.inputs if field in named}
    for field in kind.inputs:
        several = [name for role, name in named.items() if role.startswith(f"{field}.")]
        if several and field in kind.model_fields:
            inputs[field] = several
    return kind.model_validate({**parameters, **inputs})


def _attack(recipe: Attack, relabel: Relabel | None) -> str:
    rule = relabel.rule if relabel else "unknown"
    label = f"labelled with the target, {RULES.get(rule, rule)}"
    match recipe.method:
        case "none":
            return f"{recipe.images} unchanged, {label}"
        case "noise":
            return f"{recipe.images} with random noise, {norm_name(recipe.norm)} ε {recipe.eps:g}, {label}"
        case "leakage":
            return f"{recipe.images} as a control of leakage: unchanged if the target is right already, else noise"
        case "spatial":
            return f"{recipe.images}, rotated and shifted toward a target of {recipe.model}, {label}"
    how = "one perturbation per class" if recipe.method == "universal" else "targeted PGD"
    spared = f", not fooling {_listed(recipe.not_transferring_to)}" if recipe.not_transferring_to else ""
    return f"{recipe.images} attacked by {how} on {recipe.model}{spared}: {_ball(recipe)}; {label}"


RULES = {
    "random": "a class drawn uniformly from all classes",
    "other": "a class drawn uniformly from the wrong classes",
    "next": "the class after the true one, cyclically",
    "least_likely": "the class that the model finds least likely",
    "map": "the class that a fixed map assigns to the true one",
}
"""Label rule → the class that an image gets."""


def _ball(recipe: Ball) -> str:
    return f"{norm_name(recipe.norm)} ε {recipe.eps:g}, {recipe.steps} steps of {recipe.step:g}"


def _training(recipe: Train) -> str:
    what = recipe.arch if recipe.probe is None else f"a linear layer on the features of {recipe.probe}"
    hard: Adversary | None = recipe.adversarial
    how = f", adversarially: {_ball(hard)}" if hard else ""
    return (
        f"{what} trained on {recipe.on} {recipe.split} for {recipe.epochs} epoch{'s' * (recipe.epochs != 1)} "
        f"from lr {recipe.lr:g}{how}, seed {recipe.seed}"
    )


def _source(recipe: Any) -> str:
    where = getattr(recipe, "root", None) if recipe.source == "image-folder" else None
    shards = ", ".join(recipe.shards.values()) if recipe.source == "webdataset" else None
    place = f" {where or shards}" if where or shards else ""
    limit = f", at most {recipe.limit:,} images of each split" if recipe.limit else ""
    size = f", {recipe.crop}×{recipe.crop} pixels" if getattr(recipe, "crop", None) else ""
    return f"images of {recipe.source}{place}{limit}{size}"


def _listed(names: list[str]) -> str:
    return ", ".join(names)
