"""Lists in place of a value: a node for each, and for each all that is made from it.

``steps: [1, 10, 100]`` in an attack makes three datasets, ``rand@steps=1`` and so on, and three of every model
that is trained on it. ``seeds: [0, 1, 2]``, of an entry or of the whole experiment, does the same with every
seed. An axis has the name of its key: nodes that meet with the same axis are paired along it, with different ones
they make a grid. This works on what the file says, before it is checked: what comes out has no lists but those
that a key takes.
"""

import graphlib
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel

from stages.errors import BadInput, shown
from stages.limits import POINTS, WRITTEN
from stages.recipes import SOURCES, STAGES, EvalAttack, Evaluate, Recipe, Relabel, fraction

SHOWN = 8
"""Nodes of a circle that are named."""

SEED, SEEDS = "seed", "seeds"
GROUPS = ("datasets", "models")
FIELDS = len(EvalAttack.model_fields)
Axes = dict[str, list[Any]]
Node = TypeVar("Node", str, tuple[str, str])
Point = dict[str, Any]
"""Axis → the value on it."""


def split_name(name: str) -> tuple[str, dict[str, str]]:
    """``rand@eps=0.5,seed=1`` → ``rand`` and ``{"eps": "0.5", "seed": "1"}``."""
    base, _, place = name.partition("@")
    axes = (part.partition("=") for part in place.split(",") if part)
    return base, {axis: value for axis, _, value in axes}


def name_at(base: str, point: Mapping[str, Any]) -> str:
    """``rand`` and ``{"eps": 0.5}`` → ``rand@eps=0.5``; the seed stands last."""
    order = sorted(point, key=lambda axis: axis == SEED)
    said = (f"{axis}={re.sub(r'[^A-Za-z0-9_.-]', '-', str(point[axis]))}" for axis in order)
    return f"{base}@{','.join(said)}" if point else base


def expand(found: dict[str, Any]) -> dict[str, Any]:
    """An experiment with lists, as one without.

    Raises:
        BadInput: two nodes that meet have the same axis with other values, seeds are none or have nothing to repeat, or
            the lists stand for too much.
    """
    parts = {(group, name): part for group in GROUPS for name, part in entries(found, group)}
    _refuse_idle_seeds(found, parts)
    own = {place: _own_axes(place, part, found.get(SEEDS)) for place, part in parts.items()}
    made = {key: value for key, value in found.items() if key != SEEDS}
    scored = dict(entries(found, "evaluations"))
    asked = {name: _listed("evaluations", part) for name, part in scored.items()}
    if not any((*own.values(), *asked.values())):
        return made
    named = {place: [n for n in _named(place[0], part) if n in parts] for place, part in parts.items()}
    axes: dict[tuple[str, str], Axes] = {}
    for place in in_order(named):
        axes[place] = _joined(place, [own[place], *(axes[n] for n in named[place])])
    met = [(name, part, _meeting(name, part, asked[name], axes)) for name, part in scored.items()]
    made_of = [(place[0], part, axes[place]) for place, part in parts.items()]
    _refuse_too_many([*made_of, *(("evaluations", part, own) for _, part, own in met)], axes)
    for group in GROUPS:
        made[group] = _all(group, found, [(n, p, axes[g, n]) for (g, n), p in parts.items() if g == group], axes)
    made["evaluations"] = _all("evaluations", found, met, axes)
    return made


def _refuse_idle_seeds(found: Mapping[str, Any], parts: Mapping[tuple[str, str], dict[str, Any]]) -> None:
    """Refuse seeds that are none, and seeds of what has none to be repeated with: they would change nothing."""
    own = {(*place, SEEDS): part[SEEDS] for place, part in parts.items() if SEEDS in part}
    for way, seeds in (own | ({(SEEDS,): found[SEEDS]} if SEEDS in found else {})).items():
        whole = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
        if not whole or not seeds:
            raise BadInput(f"{'.'.join(way)}: must be a list of whole numbers, such as [0, 1, 2], got {shown(seeds)}")
    idle = [place for place, part in parts.items() if SEEDS in part and not _seeded(place[0], part, source=True)]
    if idle:
        raise BadInput(f"{'.'.join(idle[0])}.{SEEDS}: it has no `seed` of its own that they could be; leave them out")
    if SEEDS in found and not any(_seeded(place[0], part) for place, part in parts.items()):
        raise BadInput(f"{SEEDS}: there is no dataset or model that chance has a part in; leave them out")


def _refuse_too_many(every: Iterable[tuple[str, dict[str, Any], Axes]], axes: Mapping[Any, Axes]) -> None:
    """Refuse more than anybody would wait for, before it is written out.

    Args:
        every: the entries: their group, what they say, and their axes.
        axes: the axes of every dataset and model.
    """

    def size(of: Axes, beside: Axes | None = None) -> int:
        return math.prod(len(values) for axis, values in of.items() if axis not in (beside or {}))

    nodes = values = 0
    for group, part, own in every:
        scored = [size(axes.get(("models", name), {}), own) for name in _as_list(_scoring(part).get("models"))]
        attacks = [math.prod(len(v) for v in a.values() if isinstance(v, list)) * FIELDS for a in _attacks(part)]
        nodes += size(own)
        values += size(own) * (_count(_shortened(group, part)) + sum(scored) + sum(attacks))
    if nodes > POINTS or values > WRITTEN:
        raise BadInput(
            f"the lists of the experiment stand for {nodes:,} nodes and {values:,} values, at most {POINTS:,} and "
            f"{WRITTEN:,} are written out: shorten them, or make several experiments"
        )


def _count(value: Any) -> int:
    """How many values something is."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(_count, inner))


def _shortened(group: str, part: dict[str, Any]) -> dict[str, Any]:
    """An entry with one value in each list that is an axis: as much as is copied for each point."""
    made = deepcopy(part)
    if isinstance(made.get("relabel"), list):
        made["relabel"] = made["relabel"][:1]
    for _, model, said in _recipes(group, made):
        for axis in _lists(model, said):
            key, _, inner = axis.partition(".")
            inside, last = (said[key], inner) if inner else (said, key)
            inside[last] = inside[last][:1]
    return made


def _all(
    group: str, found: Mapping[str, Any], parts: Iterable[tuple[str, dict[str, Any], Axes]], axes: Mapping[Any, Axes]
) -> Any:
    """A group with each entry at each of its points; what is no mapping is left for the check to refuse."""
    if not isinstance(found.get(group), dict):
        return found.get(group, {})
    made = {name: part for name, part in found[group].items() if not isinstance(part, dict)}
    at = _evaluation_at if group == "evaluations" else _at
    for name, said, own in parts:
        part = _shortened(group, said)
        for point in _points(own):
            if (variant := name_at(name, point)) in made:
                raise BadInput(f"{group}.{name}: two values of {', '.join(point)} give one name, {variant}")
            made[variant] = at(part, group, point, axes)
    return made


def _meeting(name: str, part: Mapping[str, Any], own: Axes, axes: Mapping[Any, Axes]) -> Axes:
    """The axes of an evaluation: its own, those of what it scores on, and of what attacks are made on, so that each
    attack meets the models of its own point; the models that are scored it takes all."""
    surrogates = [name for attack in _attacks(part) for name in _as_list(attack.get("surrogate"))]
    meets = [("datasets", _scoring(part).get("on")), *(("models", name) for name in surrogates)]
    return _joined(("evaluations", name), [own, *(axes.get(place, {}) for place in meets if isinstance(place[1], str))])


def _scoring(part: Mapping[str, Any]) -> dict[str, Any]:
    """What an evaluation says, whichever kind it is."""
    inner = part.get("usefulness", part)
    return inner if isinstance(inner, dict) else {}


def _attacks(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    attacks = part.get("attacks")
    return [attack for attack in attacks if isinstance(attack, dict)] if isinstance(attacks, list) else []


def in_order(needs: Mapping[Node, Iterable[Node]]) -> list[Node]:
    """Each node after those that it needs.

    Raises:
        BadInput: one needs itself in the end.
    """
    try:
        return list(graphlib.TopologicalSorter(needs).static_order())
    except graphlib.CycleError as error:
        way: list[str] = ["/".join(node) if isinstance(node, tuple) else node for node in reversed(error.args[1])]
        circle = " → ".join(way if len(way) <= SHOWN else [*way[: SHOWN - 1], "…", way[-1]])
        raise BadInput(f"the experiment goes in a circle: {circle}; each needs the next to be made first") from error


def entries(found: Mapping[str, Any], group: str) -> list[tuple[str, dict[str, Any]]]:
    """The entries of a group that are mappings, by name; what is not is left for the check to refuse."""
    known = found.get(group)
    return [(n, p) for n, p in known.items() if isinstance(p, dict)] if isinstance(known, dict) else []


def _recipes(group: str, part: Mapping[str, Any]) -> Iterator[tuple[str, type[Recipe], dict[str, Any]]]:
    """The recipes in an entry: their key, their model, what is said."""
    known: dict[str, type[Recipe]] = {**STAGES[group], "relabel": Relabel}
    if group == "datasets" and isinstance(part.get("load"), dict):
        known["load"] = SOURCES.get(str(part["load"].get("source")), Recipe)
    for key, model in known.items():
        if isinstance(part.get(key), dict):
            yield key, model, part[key]


def _listed(group: str, part: Mapping[str, Any]) -> Axes:
    axes: Axes = {}
    for _, model, said in _recipes(group, part):
        axes |= _lists(model, said)
    return axes


def _own_axes(place: tuple[str, str], part: Mapping[str, Any], seeds: Any) -> Axes:
    axes = _listed(place[0], part)
    if isinstance(part.get("relabel"), list):
        axes["relabel"] = part["relabel"]
    if SEEDS in part or (seeds is not None and _seeded(place[0], part)):
        axes[SEED] = part.get(SEEDS, seeds)
    for axis, values in axes.items():
        if twice := _twice(values):
            raise BadInput(f"{'.'.join(place)}: {axis} takes the value {shown(twice[0])} twice")
    return axes


def _twice(values: Sequence[Any]) -> list[Any]:
    """Values that are equal to one before them; 1 and 1.0 are one."""
    keys = [repr(value) if isinstance(value, list | dict) else value for value in values]
    first = {key: at for at, key in reversed(list(enumerate(keys)))}
    return [value for at, value in enumerate(values) if first[keys[at]] != at]


def _lists(model: type[BaseModel], said: Mapping[str, Any]) -> Axes:
    """The keys whose value is a list although they take none, also one level down."""
    axes: Axes = {}
    for key, value in said.items():
        field = model.model_fields.get(key)
        if field is None:
            continue
        if isinstance(value, list) and not _takes(field.annotation, list):
            axes[key] = list(map(fraction, value)) if _takes(field.annotation, float) else value
        inner = next((a for a in (field.annotation, *get_args(field.annotation)) if _is_model(a)), None)
        if isinstance(value, dict) and inner is not None:
            axes |= {f"{key}.{name}": values for name, values in _lists(inner, value).items()}
    return axes


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _takes(annotation: Any, kind: type) -> bool:
    return kind in (annotation, get_origin(annotation)) or any(_takes(inner, kind) for inner in get_args(annotation))


def _seeded(group: str, part: Mapping[str, Any], source: bool = False) -> bool:
    """Whether chance has a part in how it is made; how images are loaded and split does not change with the seeds.

    Args:
        group, part: the entry.
        source: whether that counts nevertheless, as for an entry with seeds of its own.
    """
    keys = {key: said for key, model, said in _recipes(group, part) if SEED in model.model_fields}
    return bool(keys) and (source or "load" not in keys) and not any(SEED in said for said in keys.values())


def _named(group: str, part: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The nodes that an entry is made from."""
    return [
        (kind, name)
        for _, model, said in _recipes(group, part)
        for key, kind in model.inputs.items()
        for name in _as_list(said.get(key))
    ]


def _as_list(value: Any) -> list[str]:
    return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]


def _joined(place: tuple[str, str], each: list[Axes]) -> Axes:
    joined: Axes = {}
    for axes in each:
        for axis, values in axes.items():
            if not values:
                raise BadInput(f"{'.'.join(place)}: {axis} must be a list of values, got {shown(values)}")
            if joined.setdefault(axis, values) != values:
                raise BadInput(
                    f"{'.'.join(place)}: {axis} takes the values {shown(joined[axis])} here and {shown(values)} in "
                    "what it is made from; nodes that meet are paired along an axis, so its values must be the same"
                )
    return joined


def _points(axes: Axes) -> Iterator[Point]:
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _at(part: dict[str, Any], group: str, point: Point, axes: Mapping[tuple[str, str], Axes]) -> dict[str, Any]:
    """An entry at one point: its lists replaced by values, its names by those of the nodes at that point."""
    made = deepcopy({key: value for key, value in part.items() if key != SEEDS})
    if "relabel" in point and isinstance(made.get("relabel"), list):
        made["relabel"] = point["relabel"]
    if SEED in point and isinstance(made.get("relabel"), str):
        made["relabel"] = {"rule": made["relabel"]}
    for _, model, said in _recipes(group, made):
        for axis, value in point.items():
            key, _, inner = axis.partition(".")
            if inner and isinstance(said.get(key), dict) and isinstance(said[key].get(inner), list):
                said[key][inner] = value
            elif isinstance(said.get(axis), list):
                said[axis] = value
            elif axis == SEED and SEED in model.model_fields:
                said.setdefault(SEED, value)
        _rename(said, model.inputs, point, axes)
    return made


def _rename(said: dict[str, Any], inputs: Mapping[str, str], point: Point, axes: Mapping[Any, Axes]) -> None:
    """Give the nodes that are named the names they have at a point; where they have more axes, name them all."""
    for key, group in inputs.items():
        if isinstance(said.get(key), str):
            said[key] = _variants(said[key], group, point, axes)[0]
        elif isinstance(said.get(key), list):
            said[key] = [variant for name in said[key] for variant in _variants(name, group, point, axes)]


def _variants(name: Any, group: str, point: Point, axes: Mapping[Any, Axes]) -> list[Any]:
    if not isinstance(name, str):
        return [name]
    fixed = {axis: [point[axis]] if axis in point else values for axis, values in axes.get((group, name), {}).items()}
    return [name_at(name, at) for at in _points(fixed)]


def _evaluation_at(part: dict[str, Any], group: str, point: Point, axes: Mapping[Any, Axes]) -> dict[str, Any]:
    if "usefulness" in part:
        return _at(part, group, point, axes)
    made = deepcopy(part)
    _rename(made, Evaluate.inputs, point, axes)
    for attack in _attacks(made):
        _rename(attack, {"surrogate": "models"}, point, axes)
    return made
