"""The JSON Schema of the experiment file, for editors: the models' own, widened by what is expanded before validation.

pydantic describes what is validated. A file may say more: lists stand for sweeps, `seeds` for repetitions, `leakage`
for controls, a rule's name for a rule, a fraction for a number.
"""

from collections.abc import Callable, Iterator
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

from pipeline.experiment import controls, spec, sweeps
from stages.recipes import LISTED, RULES, SOURCES, STAGES, EvalAttack, Evaluate, Relabel, fraction

DIALECT = "https://json-schema.org/draft/2020-12/schema"

FRACTION = r"^\s*\d+(\.\d+)?\s*/\s*\d+(\.\d+)?\s*$"

Schema = dict[str, Any]

SEEDS = {
    "description": "Repeat every stochastic node with each of these seeds.",
    "type": "array",
    "items": {"type": "integer", "minimum": 0},
    "minItems": 1,
    "uniqueItems": True,
}


class Written(spec.Experiment):
    """An experiment before its leakage controls are written out."""

    evaluations: dict[spec.Name, spec.Evaluation | controls.Leakage] = Field(  # type: ignore[assignment]
        {}, description="Evaluations by name."
    )


def schema() -> Schema:
    """The schema of an experiment file as its author writes it."""
    found: Schema = Written.model_json_schema()
    models = {model.__name__: model for model in _models(Written)}
    for name, model in models.items():
        if name in found["$defs"]:
            _widen(found["$defs"][name], model)
    for group in ("datasets", "models", "evaluations"):
        found["properties"][group]["additionalProperties"] = False  # names are as the pattern says
    for part in (spec.Dataset, spec.Model):
        _choose(found["$defs"][part.__name__], [name for name in part.model_fields if name != "relabel"])
        found["$defs"][part.__name__]["properties"][sweeps.SEEDS] = SEEDS
    found["$defs"]["Dataset"]["dependentRequired"] = {"attack": ["relabel"], "relabel": ["attack"]}
    found["properties"][sweeps.SEEDS] = SEEDS
    return {"$schema": DIALECT, "title": "notbugs experiment", **{k: v for k, v in found.items() if k != "title"}}


def _models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A model, and all models that its fields hold."""
    yield model
    for field in model.model_fields.values():
        for inner in _within(field.annotation):
            yield from _models(inner)


def _within(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _within(inner)


def _widen(part: Schema, model: type[BaseModel]) -> None:
    """Allow what a file may say in place of a model's values."""
    may_sweep = _sweeps(model)
    for name, field in model.model_fields.items():
        value = part["properties"][name]
        about = {key: value.pop(key) for key in ("description", "title", "default") if key in value}
        if "gt" in str(value):
            value = _with_bounds(value)
        if Relabel in _within(field.annotation):
            value = {"anyOf": [{"enum": [rule for rule in RULES if rule != "map"]}, value]}
        if _takes_fractions(field):
            value = {"anyOf": [value, {"type": "string", "pattern": FRACTION}]}
        if may_sweep(name, field):
            value = {"anyOf": [value, {"type": "array", "items": value, "minItems": 1}]}
        part["properties"][name] = {**{k: v for k, v in about.items() if k != "title"}, **value}


def _sweeps(model: type[BaseModel]) -> Callable[[str, FieldInfo], bool]:
    """Whether a list in place of a value of a field stands for one node, or one attack, per value."""
    swept = {*SOURCES.values(), *(recipe for group in STAGES.values() for recipe in group.values())}
    nested = {
        inner for recipe in swept for field in recipe.model_fields.values() for inner in _within(field.annotation)
    }
    if model is EvalAttack:
        return lambda name, field: name in LISTED
    if model is spec.Dataset:
        return lambda name, field: name == "relabel"
    if model in (swept | nested | {Relabel}) - {Evaluate}:
        return lambda name, field: sweeps.is_axis(field.annotation)
    return lambda name, field: False


def _takes_fractions(field: FieldInfo) -> bool:
    def converts(annotation: Any) -> bool:
        marks = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
        return any(getattr(mark, "func", None) is fraction for mark in marks) or any(
            map(converts, get_args(annotation))
        )

    return any(getattr(mark, "func", None) is fraction for mark in field.metadata) or converts(field.annotation)


def _with_bounds(value: Schema) -> Schema:
    """pydantic leaves the bounds of an optional converted number in its own words."""
    words = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}
    if isinstance(value, list):
        return [_with_bounds(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {words.get(key, key): _with_bounds(inner) for key, inner in value.items()}


def _choose(part: Schema, ways: list[str]) -> None:
    """One of some keys is required, and only one allowed."""
    part["oneOf"] = [{"required": [way]} for way in ways]
