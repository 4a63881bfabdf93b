"""The experiment as a graph: nodes, what each is made from, and the version of each."""

import difflib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.experiment.spec import Experiment, asked
from pipeline.experiment.sweeps import in_order
from pipeline.store import canonical, digest
from stages.errors import BadInput, shown, some
from stages.limits import DEPTH
from stages.recipes import STAGES, Recipe, Relabel

REVISIONS = {
    "load": 4,
    "attack": 3,
    "invert": 2,
    "select": 1,
    "relabel": 1,
    "shard": 2,
    "train": 2,
    "bring": 2,
    "evaluate": 4,
    "usefulness": 3,
}
"""A stage's revision is part of every version it makes: raise it when the stage makes other bytes."""


@dataclass(frozen=True)
class Node:
    """Something to be made.

    Attributes:
        group: datasets, models or evaluations.
        name: as the experiment calls it.
        stage: what makes it: load, attack, invert, select, train, bring, evaluate or usefulness.
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
    def arch(self) -> str | None:
        """What a model's network is built from, as the experiment says; a probe's is that of the model it probes."""
        probed = self.inputs.get("probe")
        said: str | None = probed.arch if probed else getattr(self.recipe, "arch", None)
        return said

    @cached_property
    def generation(self) -> int:
        """How many models stand behind it, one made from the other: 0 for what no model has had a part in."""
        return _generation(self.inputs)

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
        BadInput: a node names nothing, is made from itself, or from too many others in turn.
    """
    wanted = {f"{group}/{name}": part for group in GROUPS for name, part in getattr(experiment, group).items()}
    roles = {place: _roles(part) for place, part in wanted.items()}
    for place, needed in roles.items():
        for key, target in needed.values():
            _refuse_dangling(place, key, target, wanted)
    order = in_order({place: [target for _, target in needed.values()] for place, needed in roles.items()})
    nodes, depth = dict[str, Node](), dict[str, int]()
    for place in order:
        depth[place] = 1 + max((depth[target] for _, target in roles[place].values()), default=0)
        if depth[place] > DEPTH:
            raise BadInput(f"{place.replace('/', '.')}: more than {DEPTH} nodes are made from each other to make it")
        nodes[place] = _node(place, wanted[place], {role: nodes[target] for role, (_, target) in roles[place].items()})
    return [nodes[place] for place in order]


GROUPS = tuple(STAGES)
DATASETS = ("load", "attack", "invert", "select")
"""Stages that make a dataset."""


def _roles(part: Any) -> dict[str, tuple[str, str]]:
    """Role → (key in the file, place that it names): `model`, or `models.standard` where a key names several."""
    stage, recipe = asked(part)
    prefix = "" if stage == "evaluate" else "load." if stage == "bring" else f"{stage}."
    said = {"sources": "attacks.source"}  # a property of the recipe, which the file says elsewhere
    roles: dict[str, tuple[str, str]] = {}
    for field, group in recipe.inputs.items():
        named = getattr(recipe, field)
        each = {f"{field}.{name}": name for name in named} if isinstance(named, list) else {field: named}
        roles |= {
            role: (prefix + said.get(field, field), f"{group}/{name}")
            for role, name in each.items()
            if name is not None
        }
    return roles


def _refuse_dangling(place: str, key: str, target: str, wanted: dict[str, Any]) -> None:
    if target in wanted:
        return
    group, _, name = target.partition("/")  # what a file names may hold more slashes
    known = [place.partition("/")[2] for place in wanted if place.startswith(f"{group}/")]
    near = difflib.get_close_matches(name, known, 1, 0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {some(known) or 'none'}"
    raise BadInput(f"{place.replace('/', '.')}.{key}: names {shown(name)}, which is none of the {group}; {hint}")


def _node(place: str, part: Any, inputs: dict[str, Node]) -> Node:
    group, _, name = place.partition("/")
    stage, recipe = asked(part)
    relabel = part.relabel if stage == "attack" else None
    version = digest(canonical(_described(stage, recipe, relabel, inputs)))[:16]
    return Node(group, name, stage, recipe, relabel, inputs, version)


def _generation(inputs: dict[str, Node]) -> int:
    return max((node.generation + (node.group == "models") for node in inputs.values()), default=0)


def _described(stage: str, recipe: Recipe, relabel: Relabel | None, inputs: dict[str, Node]) -> dict[str, Any]:
    used = [stage, *(["relabel"] if relabel else []), *(["shard"] if stage in DATASETS else [])]
    # A learner's chance is not that of the models before it: its seed says less than which numbers it draws.
    generation = _generation(inputs) if stage == "train" else 0
    return ({"generation": generation} if generation else {}) | {
        "stage": stage,
        "revisions": {name: REVISIONS[name] for name in used},
        "parameters": recipe.parameters(),
        "relabel": relabel.parameters() if relabel else None,
        "inputs": {role: node.version for role, node in inputs.items()},
    }
