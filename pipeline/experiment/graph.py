"""The experiment as a graph: its nodes, with their inputs and versions."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.experiment.spec import Experiment, asked
from pipeline.experiment.sweeps import in_order
from pipeline.store import canonical, digest
from stages.errors import BadInput, did_you_mean, shown, some
from stages.limits import DEPTH
from stages.recipes import STAGES, Recipe, Relabel

REVISIONS = {
    "load": 4,
    "attack": 4,
    "invert": 2,
    "select": 1,
    "relabel": 1,
    "shard": 4,
    "train": 2,
    "pretrained": 2,
    "evaluate": 5,
    "usefulness": 3,
}
"""A stage's revision is part of the version of its nodes: raise it when the stage gives other bytes."""


@dataclass(frozen=True)
class Node:
    """A dataset, model or evaluation of an experiment.

    Attributes:
        group: datasets, models or evaluations.
        name: its name in the experiment.
        stage: the stage that makes it: load, attack, invert, select, train, pretrained, evaluate or usefulness.
        recipe: the parameters of that stage.
        relabel: the label rule of an attack.
        inputs: role → input node.
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
        """The architecture of a model, as the experiment names it; a probe has that of the model it probes."""
        probed = self.inputs.get("probe")
        arch: str | None = probed.arch if probed else getattr(self.recipe, "arch", None)
        return arch

    @cached_property
    def generation(self) -> int:
        """Length of the longest chain of models among its ancestors: 0 if it depends on no model."""
        return _generation(self.inputs)

    @property
    def folder(self) -> str:
        """Its place in the store."""
        return f"{self.group}/{self.name}/{self.version}"

    def described(self) -> dict[str, Any]:
        """The contents of ``recipe.json``."""
        return _described(self.group, self.stage, self.recipe, self.relabel, self.inputs) | {"version": self.version}


def build(experiment: Experiment) -> list[Node]:
    """All nodes of an experiment, each after its inputs.

    Raises:
        BadInput: an input does not exist, or the inputs form a circle or too long a chain.
    """
    parts = {f"{group}/{name}": part for group in GROUPS for name, part in getattr(experiment, group).items()}
    roles = {place: _roles(part) for place, part in parts.items()}
    for place, needed in roles.items():
        for key, target in needed.values():
            _refuse_dangling(place, key, target, parts)
    order = in_order({place: [target for _, target in needed.values()] for place, needed in roles.items()})
    nodes, depth = dict[str, Node](), dict[str, int]()
    for place in order:
        depth[place] = 1 + max((depth[target] for _, target in roles[place].values()), default=0)
        if depth[place] > DEPTH:
            raise BadInput(f"{place.replace('/', '.')}: more than {DEPTH} nodes in a chain lead to it")
        nodes[place] = _node(place, parts[place], {role: nodes[target] for role, (_, target) in roles[place].items()})
    return [nodes[place] for place in order]


GROUPS = tuple(STAGES)


def _roles(part: Any) -> dict[str, tuple[str, str]]:
    """Role → (key in the file, node that it names): `model`, or `models.standard` if the key is a list of names."""
    stage, recipe = asked(part)
    prefix = "" if stage == "evaluate" else f"{stage}."
    keys = {"surrogates": "attacks.surrogate"}  # a property of the recipe, under another key in the file
    roles: dict[str, tuple[str, str]] = {}
    for field, group in recipe.inputs.items():
        named = getattr(recipe, field)
        each = {f"{field}.{name}": name for name in named} if isinstance(named, list) else {field: named}
        roles |= {
            role: (prefix + keys.get(field, field), f"{group}/{name}")
            for role, name in each.items()
            if name is not None
        }
    return roles


def _refuse_dangling(place: str, key: str, target: str, parts: dict[str, Any]) -> None:
    if target in parts:
        return
    group, _, name = target.partition("/")  # the name may contain more slashes
    known = [place.partition("/")[2] for place in parts if place.startswith(f"{group}/")]
    hint = did_you_mean(name, known, otherwise=f"there are {some(known) or 'none'}")
    raise BadInput(f"{place.replace('/', '.')}.{key}: names {shown(name)}, which is not one of the {group}{hint}")


def _node(place: str, part: Any, inputs: dict[str, Node]) -> Node:
    group, _, name = place.partition("/")
    stage, recipe = asked(part)
    relabel = part.relabel if stage == "attack" else None
    version = digest(canonical(_described(group, stage, recipe, relabel, inputs)))[:16]
    return Node(group, name, stage, recipe, relabel, inputs, version)


def _generation(inputs: dict[str, Node]) -> int:
    return max((node.generation + (node.group == "models") for node in inputs.values()), default=0)


def _described(
    group: str, stage: str, recipe: Recipe, relabel: Relabel | None, inputs: dict[str, Node]
) -> dict[str, Any]:
    used = [stage, *(["relabel"] if relabel else []), *(["shard"] if group == "datasets" else [])]
    # With the same seed, a learner would draw the initial weights of the model that its images were made with; the
    # perturbations would transfer unusually well and inflate its accuracy.
    generation = _generation(inputs) if stage == "train" else 0
    return ({"generation": generation} if generation else {}) | {
        "stage": stage,
        "revisions": {name: REVISIONS[name] for name in used},
        "parameters": recipe.parameters(),
        "relabel": relabel.parameters() if relabel else None,
        "inputs": {role: node.version for role, node in inputs.items()},
    }
