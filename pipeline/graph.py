"""The experiment as a graph: nodes, what each is made from, and the version of each."""

import difflib
import graphlib
from dataclasses import dataclass
from typing import Any

from pipeline.spec import Dataset, Experiment, Model
from pipeline.store import canonical, digest
from stages.errors import BadInput
from stages.recipes import Attack, Bring, Evaluate, Load, Perturbation, Relabel, Train

REVISIONS = {"load": 1, "attack": 1, "relabel": 1, "shard": 1, "train": 1, "bring": 1, "evaluate": 1}
"""A stage's revision is part of every version it makes: raise it when the stage makes other bytes."""


@dataclass(frozen=True)
class Node:
    """Something to be made.

    Attributes:
        group: datasets, models or evaluations.
        name: as the experiment calls it.
        stage: what makes it: load, attack, train, bring or evaluate.
        recipe: how.
        relabel: the label rule of an attack.
        inputs: role → the node it is made from.
        version: digest of the recipe and of the inputs' versions.
    """

    group: str
    name: str
    stage: str
    recipe: Any
    relabel: Relabel | None
    inputs: "dict[str, Node]"
    version: str

    @property
    def id(self) -> str:
        """``datasets/rand``: unique in an experiment."""
        return f"{self.group}/{self.name}"

    @property
    def folder(self) -> str:
        """Its place in the store."""
        return f"{self.group}/{self.name}/{self.version}"

    def described(self) -> dict[str, Any]:
        """The contents of ``recipe.json``."""
        return _described(self.stage, self.recipe, self.relabel, self.inputs) | {"version": self.version}


def build(experiment: Experiment) -> list[Node]:
    """All nodes of an experiment, each after those it is made from.

    Raises:
        BadInput: a node names nothing, or is made from itself.
    """
    wanted = {f"{group}/{name}": part for group in GROUPS for name, part in getattr(experiment, group).items()}
    roles = {place: _roles(part) for place, part in wanted.items()}
    for place, needed in roles.items():
        for key, target in needed.values():
            _refuse_dangling(place, key, target, wanted)
    try:
        order = list(
            graphlib.TopologicalSorter({p: [t for _, t in r.values()] for p, r in roles.items()}).static_order()
        )
    except graphlib.CycleError as error:
        circle = " → ".join(reversed(error.args[1]))
        raise BadInput(f"the experiment goes in a circle: {circle}; each needs the next to be made first") from error
    nodes: dict[str, Node] = {}
    for place in order:
        nodes[place] = _node(place, wanted[place], {role: nodes[target] for role, (_, target) in roles[place].items()})
    return [nodes[place] for place in order]


GROUPS = ("datasets", "models", "evaluations")


def _roles(part: Any) -> dict[str, tuple[str, str]]:
    """Role → (key in the file, place that it names)."""
    match part:
        case Dataset(attack=Attack() as attack):
            roles = {"images": ("attack.images", f"datasets/{attack.images}")}
            if attack.model is not None:
                roles["model"] = ("attack.model", f"models/{attack.model}")
            return roles
        case Model(train=Train() as train):
            return {"on": ("train.on", f"datasets/{train.on}")}
        case Evaluate():
            models = {f"models.{name}": ("models", f"models/{name}") for name in part.models}
            return {"on": ("on", f"datasets/{part.on}"), **models}
    return {}


def _refuse_dangling(place: str, key: str, target: str, wanted: dict[str, Any]) -> None:
    if target in wanted:
        return
    group, name = target.split("/")
    known = [place.split("/")[1] for place in wanted if place.startswith(group)]
    near = difflib.get_close_matches(name, known, 1, 0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known) or 'none'}"
    raise BadInput(f"{place.replace('/', '.')}.{key}: names {name!r}, which is none of the {group}; {hint}")


def _node(place: str, part: Any, inputs: dict[str, Node]) -> Node:
    group, name = place.split("/")
    relabel: Relabel | None = None
    recipe: Any
    match part:
        case Dataset(attack=Attack() as recipe):
            stage, relabel = "attack", part.relabel
        case Dataset():
            stage, recipe = "load", part.load
        case Model(train=Train() as recipe):
            stage = "train"
        case Model():
            stage, recipe = "bring", part.load
        case _:
            stage, recipe = "evaluate", part
    version = digest(canonical(_described(stage, recipe, relabel, inputs)))[:16]
    return Node(group, name, stage, recipe, relabel, inputs, version)


def _described(
    stage: str,
    recipe: Load | Attack | Train | Bring | Evaluate,
    relabel: Relabel | None,
    inputs: dict[str, Node],
) -> dict[str, Any]:
    used = {"load": ["load", "shard"], "attack": ["attack", "relabel", "shard"]}.get(stage, [stage])
    parameters = recipe.parameters()
    if isinstance(recipe, Attack) and recipe.method != "pgd":
        for unused in _UNUSED[recipe.method]:
            parameters.pop(unused)
    return {
        "stage": stage,
        "revisions": {name: REVISIONS[name] for name in used},
        "parameters": parameters,
        "relabel": relabel.parameters() if relabel else None,
        "inputs": {role: node.version for role, node in inputs.items()},
    }


_UNUSED = {
    "none": set(Perturbation.model_fields) - {"batch_size"} | {"seed"},
    "noise": {"steps", "step_size", "precision"},
}
"""What an attack does not use does not make another version of it."""
