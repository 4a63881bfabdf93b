"""Sweeps: a list in place of a value stands for one node per value, and one copy per value of all that depends on it.

``steps: [1, 10, 100]`` in an attack makes three datasets, ``rand@steps=1`` and so on, and three of every model
trained on it. ``seeds: [0, 1, 2]``, of an entry or of the whole experiment, does the same with every seed. An axis
is named after its key. Nodes with the same axis are paired along it; different axes span a grid. All this works on
the raw file, before validation; what comes out holds no lists except those that a key takes as its value.
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

CIRCLE = 8
"""Nodes of a circle that an error lists."""

SEED, SEEDS = "seed", "seeds"
SWEPT = ("datasets", "models")
"""Groups whose lists are axes. An evaluation follows the axes of what it scores."""

FIELDS = len(EvalAttack.model_fields)
Axes = dict[str, list[Any]]
Node = TypeVar("Node", str, tuple[str, str])
Point = dict[str, Any]
"""Axis → value."""


def split_name(name: str) -> tuple[str, dict[str, str]]:
    """``rand@eps=0.5,seed=1`` → ``rand`` and ``{"eps": "0.5", "seed": "1"}``."""
    base, _, place = name.partition("@")
    axes = (part.partition("=") for part in place.split(",") if part)
    return base, {axis: value for axis, _, value in axes}


def name_at(base: str, point: Mapping[str, Any]) -> str:
    """``rand`` and ``{"eps": 0.5}`` → ``rand@eps=0.5``; the seed stands last."""
    order = sorted(point, key=lambda axis: axis == SEED)
    place = (f"{axis}={re.sub(r'[^A-Za-z0-9_.-]', '-', str(point[axis]))}" for axis in order)
    return f"{base}@{','.join(place)}" if point else base


def expand(raw: dict[str, Any]) -> dict[str, Any]:
    """Write out the sweeps of an experiment: the same experiment without lists.

    Raises:
        BadInput: a node and its input have different values on the same axis, `seeds` is invalid or has no effect, or
            the sweeps are too large.
    """
    parts = {(group, name): part for group in SWEPT for name, part in entries(raw, group)}
    _refuse_idle_seeds(raw, parts)
    own = {place: _own_axes(place, part, raw.get(SEEDS)) for place, part in parts.items()}
    expanded = {key: value for key, value in raw.items() if key != SEEDS}
    scored = dict(entries(raw, "evaluations"))
    asked = {name: _listed("evaluations", part) for name, part in scored.items()}
    if not any((*own.values(), *asked.values())):
        return expanded
    named = {place: [n for n in _named(place[0], part) if n in parts] for place, part in parts.items()}
    axes: dict[tuple[str, str], Axes] = {}
    for place in in_order(named):
        axes[place] = _joined(place, [own[place], *(axes[n] for n in named[place])])
    evaluations = [(name, part, _met_axes(name, part, asked[name], axes)) for name, part in scored.items()]
    swept = [(place[0], part, axes[place]) for place, part in parts.items()]
    _refuse_too_many([*swept, *(("evaluations", part, own) for _, part, own in evaluations)], axes)
    for group in SWEPT:
        expanded[group] = _all(group, raw, [(n, p, axes[g, n]) for (g, n), p in parts.items() if g == group], axes)
    expanded["evaluations"] = _all("evaluations", raw, evaluations, axes)
    return expanded


def _refuse_idle_seeds(raw: Mapping[str, Any], parts: Mapping[tuple[str, str], dict[str, Any]]) -> None:
    """Refuse invalid seeds, and seeds of nodes that are not stochastic: they would have no effect."""
    own = {(*place, SEEDS): part[SEEDS] for place, part in parts.items() if SEEDS in part}
    for way, seeds in (own | ({(SEEDS,): raw[SEEDS]} if SEEDS in raw else {})).items():
        whole = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
        if not whole or not seeds:
            raise BadInput(f"{'.'.join(way)}: must be a list of whole numbers, such as [0, 1, 2], got {shown(seeds)}")
    idle = [place for place, part in parts.items() if SEEDS in part and not _seeded(place[0], part, source=True)]
    if idle:
        raise BadInput(f"{'.'.join(idle[0])}.{SEEDS}: it has no `seed` of its own to set; leave them out")
    if SEEDS in raw and not any(_seeded(place[0], part) for place, part in parts.items()):
        raise BadInput(f"{SEEDS}: no dataset or model is stochastic; leave them out")


def _refuse_too_many(every: Iterable[tuple[str, dict[str, Any], Axes]], axes: Mapping[Any, Axes]) -> None:
    """Refuse sweeps too large to be useful, before they are written out.

    Args:
        every: group, contents and axes of every entry.
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
            f"{WRITTEN:,} are allowed: shorten the lists, or split the experiment"
        )


def _count(value: Any) -> int:
    """Number of values in a nested value, itself included."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(_count, inner))


def _shortened(group: str, part: dict[str, Any]) -> dict[str, Any]:
    """An entry with each axis cut to one value: the part that is copied for each point."""
    shortened = deepcopy(part)
    if isinstance(shortened.get("relabel"), list):
        shortened["relabel"] = shortened["relabel"][:1]
    for _, model, recipe in _recipes(group, shortened):
        for axis in _lists(model, recipe):
            key, _, inner = axis.partition(".")
            inside, last = (recipe[key], inner) if inner else (recipe, key)
            inside[last] = inside[last][:1]
    return shortened


def _all(
    group: str, raw: Mapping[str, Any], parts: Iterable[tuple[str, dict[str, Any], Axes]], axes: Mapping[Any, Axes]
) -> Any:
    """A group with each entry at each of its points; anything but a mapping is left for validation to refuse."""
    if not isinstance(raw.get(group), dict):
        return raw.get(group, {})
    expanded = {name: part for name, part in raw[group].items() if not isinstance(part, dict)}
    at = _evaluation_at if group == "evaluations" else _at
    for name, whole, own in parts:
        part = _shortened(group, whole)
        for point in _points(own):
            if (variant := name_at(name, point)) in expanded:
                raise BadInput(f"{group}.{name}: two values of {', '.join(point)} give one name, {variant}")
            expanded[variant] = at(part, group, point, axes)
    return expanded


def _met_axes(name: str, part: Mapping[str, Any], own: Axes, axes: Mapping[Any, Axes]) -> Axes:
    """The axes of an evaluation: its own, those of its dataset, and those of its surrogates, so that each attack is
    made on the surrogate of its own point. It scores all variants of its models."""
    surrogates = [name for attack in _attacks(part) for name in _as_list(attack.get("surrogate"))]
    meets = [("datasets", _scoring(part).get("on")), *(("models", surrogate) for surrogate in surrogates)]
    return _joined(("evaluations", name), [own, *(axes.get(place, {}) for place in meets if isinstance(place[1], str))])


def _scoring(part: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of an evaluation, of whichever kind."""
    inner = part.get("usefulness", part)
    return inner if isinstance(inner, dict) else {}


def _attacks(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    attacks = part.get("attacks")
    return [attack for attack in attacks if isinstance(attack, dict)] if isinstance(attacks, list) else []


def in_order(needs: Mapping[Node, Iterable[Node]]) -> list[Node]:
    """The nodes in topological order, inputs first.

    Raises:
        BadInput: the inputs form a circle.
    """
    try:
        return list(graphlib.TopologicalSorter(needs).static_order())
    except graphlib.CycleError as error:
        way: list[str] = ["/".join(node) if isinstance(node, tuple) else node for node in reversed(error.args[1])]
        circle = " → ".join(way if len(way) <= CIRCLE else [*way[: CIRCLE - 1], "…", way[-1]])
        raise BadInput(f"the experiment goes in a circle: {circle}; each is made from the next") from error


def entries(raw: Mapping[str, Any], group: str) -> list[tuple[str, dict[str, Any]]]:
    """The entries of a group that are mappings, by name; any others are left for validation to refuse."""
    known = raw.get(group)
    return [(n, p) for n, p in known.items() if isinstance(p, dict)] if isinstance(known, dict) else []


def _recipes(group: str, part: Mapping[str, Any]) -> Iterator[tuple[str, type[Recipe], dict[str, Any]]]:
    """The recipes in an entry: their key, their model, their contents."""
    known: dict[str, type[Recipe]] = {**STAGES[group], "relabel": Relabel}
    if group == "datasets" and isinstance(part.get("load"), dict):
        known["load"] = SOURCES.get(str(part["load"].get("source")), Recipe)
    for key, model in known.items():
        if isinstance(part.get(key), dict):
            yield key, model, part[key]


def _listed(group: str, part: Mapping[str, Any]) -> Axes:
    axes: Axes = {}
    for _, model, recipe in _recipes(group, part):
        axes |= _lists(model, recipe)
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
    """Values that equal an earlier one; 1 equals 1.0."""
    keys = [repr(value) if isinstance(value, list | dict) else value for value in values]
    first = {key: at for at, key in reversed(list(enumerate(keys)))}
    return [value for at, value in enumerate(values) if first[keys[at]] != at]


def _lists(model: type[BaseModel], recipe: Mapping[str, Any]) -> Axes:
    """The keys whose value is a list although their type is not, here and in nested recipes."""
    axes: Axes = {}
    for key, value in recipe.items():
        field = model.model_fields.get(key)
        if field is None:
            continue
        if isinstance(value, list) and is_axis(field.annotation):
            axes[key] = list(map(fraction, value)) if _takes(field.annotation, float) else value
        inner = next((a for a in (field.annotation, *get_args(field.annotation)) if _is_model(a)), None)
        if isinstance(value, dict) and inner is not None:
            axes |= {f"{key}.{name}": values for name, values in _lists(inner, value).items()}
    return axes


def is_axis(annotation: Any) -> bool:
    """Whether a list in place of a value of this type is an axis: it is none of a key that takes lists."""
    return not _takes(annotation, list)


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _takes(annotation: Any, kind: type) -> bool:
    return kind in (annotation, get_origin(annotation)) or any(_takes(inner, kind) for inner in get_args(annotation))


def _seeded(group: str, part: Mapping[str, Any], source: bool = False) -> bool:
    """Whether an entry is stochastic, without a fixed seed.

    Args:
        group, part: the entry.
        source: whether a source counts, as it does for `seeds` of its own; those of the experiment leave the images and
            their splits alone.
    """
    keys = {key: recipe for key, model, recipe in _recipes(group, part) if SEED in model.model_fields}
    return bool(keys) and (source or "load" not in keys) and not any(SEED in recipe for recipe in keys.values())


def _named(group: str, part: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The inputs of an entry."""
    return [
        (kind, name)
        for _, model, recipe in _recipes(group, part)
        for key, kind in model.inputs.items()
        for name in _as_list(recipe.get(key))
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
                    "its inputs; nodes are paired with their inputs along an axis, so its values must be the same"
                )
    return joined


def _points(axes: Axes) -> Iterator[Point]:
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _at(part: dict[str, Any], group: str, point: Point, axes: Mapping[tuple[str, str], Axes]) -> dict[str, Any]:
    """An entry at one point: its lists replaced by values, its inputs by their variants at that point."""
    variant = deepcopy({key: value for key, value in part.items() if key != SEEDS})
    if "relabel" in point and isinstance(variant.get("relabel"), list):
        variant["relabel"] = point["relabel"]
    if SEED in point and isinstance(variant.get("relabel"), str):
        variant["relabel"] = {"rule": variant["relabel"]}
    for _, model, recipe in _recipes(group, variant):
        for axis, value in point.items():
            key, _, inner = axis.partition(".")
            if inner and isinstance(recipe.get(key), dict) and isinstance(recipe[key].get(inner), list):
                recipe[key][inner] = value
            elif isinstance(recipe.get(axis), list):
                recipe[axis] = value
            elif axis == SEED and SEED in model.model_fields:
                recipe.setdefault(SEED, value)
        _rename(recipe, model.inputs, point, axes)
    return variant


def _rename(recipe: dict[str, Any], inputs: Mapping[str, str], point: Point, axes: Mapping[Any, Axes]) -> None:
    """Replace input names by their variants at a point; a list names all variants along further axes."""
    for key, group in inputs.items():
        if isinstance(recipe.get(key), str):
            recipe[key] = _variants(recipe[key], group, point, axes)[0]
        elif isinstance(recipe.get(key), list):
            recipe[key] = [variant for name in recipe[key] for variant in _variants(name, group, point, axes)]


def _variants(name: Any, group: str, point: Point, axes: Mapping[Any, Axes]) -> list[Any]:
    if not isinstance(name, str):
        return [name]
    fixed = {axis: [point[axis]] if axis in point else values for axis, values in axes.get((group, name), {}).items()}
    return [name_at(name, at) for at in _points(fixed)]


def _evaluation_at(part: dict[str, Any], group: str, point: Point, axes: Mapping[Any, Axes]) -> dict[str, Any]:
    if "usefulness" in part:
        return _at(part, group, point, axes)
    variant = deepcopy(part)
    _rename(variant, Evaluate.inputs, point, axes)
    for attack in _attacks(variant):
        _rename(attack, {"surrogate": "models"}, point, axes)
    return variant
