"""The experiment file: which datasets, models and evaluations, each made how from the others."""

import difflib
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    model_validator,
)

from pipeline import controls, sweeps
from stages.errors import BadInput
from stages.recipes import (
    RULES,
    SOURCES,
    STAGES,
    Adversary,
    Attack,
    Bring,
    Evaluate,
    Invert,
    Load,
    Recipe,
    Relabel,
    Select,
    Spatial,
    Threat,
    Train,
    Usefulness,
)

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*(@[A-Za-z0-9_.,=-]+)?$", max_length=128)]
"""Of a node; after the @, its place in a sweep."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Dataset(_Part):
    """`load`, `attack` with `relabel`, `invert`, or `select`."""

    load: Load | None = Field(None, description="Take clean images from a source.")
    attack: Attack | None = Field(None, description="Perturb another dataset's images toward a target class.")
    relabel: Relabel | None = Field(None, description="Rule for the target class, which becomes the label.")
    invert: Invert | None = Field(None, description="Find images that a model represents as it does another dataset's.")
    select: Select | None = Field(
        None, description="Keep those of another dataset's images that an attack did most to."
    )

    @model_validator(mode="after")
    def _one_way(self) -> "Dataset":
        if [self.load, self.attack, self.invert, self.select].count(None) != 3:
            raise ValueError("a dataset has one of `load`, `attack`, `invert` and `select`")
        if (self.attack is None) != (self.relabel is None):
            raise ValueError("`attack` and `relabel` go together: the relabel rule names the target of the attack")
        return self


class Model(_Part):
    """`train` or `load`."""

    train: Train | None = Field(None, description="Train it on a dataset.")
    load: Bring | None = Field(None, description="Bring a model made elsewhere.")

    @model_validator(mode="after")
    def _one_way(self) -> "Model":
        if (self.train is None) == (self.load is None):
            raise ValueError("a model has either `train` or `load`")
        return self


class Measurement(_Part):
    """An evaluation of something else than accuracy."""

    usefulness: Usefulness = Field(description="Usefulness and robust usefulness of models' features.")


Evaluation = Annotated[
    Annotated[Evaluate, Tag("(accuracy)")] | Annotated[Measurement, Tag("(measurement)")],
    Discriminator(lambda found: "(measurement)" if _measures(found) else "(accuracy)"),
]


def _measures(found: Any) -> bool:
    return isinstance(found, Measurement) or (isinstance(found, dict) and "usefulness" in found)


def asked(part: Dataset | Model | Evaluate | Measurement) -> tuple[str, Recipe]:
    """What an entry of an experiment asks for: the stage, and the recipe."""
    match part:
        case Evaluate():
            return "evaluate", part
        case Model(load=Bring() as recipe):
            return "bring", recipe
    stages = ((name, getattr(part, name)) for name in type(part).model_fields if name != "relabel")
    return next((name, recipe) for name, recipe in stages if recipe is not None)


class Experiment(_Part):
    """A graph of datasets, models and evaluations."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)] = Field(
        description="Name of the experiment; it stands in the names of its runs."
    )
    datasets: dict[Name, Dataset] = Field({}, description="Datasets by name.")
    models: dict[Name, Model] = Field({}, description="Models by name.")
    evaluations: dict[Name, Evaluation] = Field({}, description="Evaluations by name.")

    @model_validator(mode="after")
    def _not_empty(self) -> "Experiment":
        if not (self.datasets or self.models or self.evaluations):
            raise ValueError("the experiment names no dataset, model or evaluation")
        return self


def read(path: Path) -> Experiment:
    """Read an experiment file, or standard input where the path is ``-``.

    Raises:
        BadInput: it is not there, not YAML, or says something that cannot be; the message names the place.
    """
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise BadInput(f"experiment file {path} cannot be read: {reason}") from error
    try:
        found = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        reason = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise BadInput(f"{path} is not YAML{place}: {reason}") from error
    return parse(found)


def parse(found: Any) -> Experiment:
    """Check what an experiment file says.

    Raises:
        BadInput: the first thing that is wrong, with its place as a path.
    """
    if not isinstance(found, dict):
        raise BadInput(
            f"an experiment file is a mapping with name, datasets, models and evaluations, got {_shown(found)}"
        )
    try:
        return Experiment.model_validate(sweeps.expand(controls.expand(found)))
    except ValidationError as error:
        raise BadInput(_sentence(error)) from error


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _yaml_1_2() -> None:
    """Read `on:` as a word, not as true, and 1e-3 as a number, not as text: YAML 1.1 has both wrong way round."""
    boolean, number = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
    _Loader.yaml_implicit_resolvers = {
        letter: [(tag, pattern) for tag, pattern in resolvers if tag != boolean]
        for letter, resolvers in _Loader.yaml_implicit_resolvers.items()
    }
    _Loader.add_implicit_resolver(boolean, re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
    _Loader.add_implicit_resolver(number, re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


_yaml_1_2()


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    kind, context, got = first["type"], first.get("ctx", {}), first["input"]
    parts = [str(part) for part in first["loc"] if not str(part).startswith(("(", "["))]
    tag = next((part for i, part in enumerate(parts) if part in SOURCES and parts[i - 1 : i] == ["load"]), None)
    place = ".".join(part for part in parts if part != tag) or "experiment"
    match kind:
        case "extra_forbidden":
            known = _keys(parts[:-1])
            near = [key for key in known if parts[-1].startswith(key)] or difflib.get_close_matches(parts[-1], known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
            return f"{place}: unknown key, {hint}"
        case "missing" | "union_tag_not_found":
            name = "source" if kind == "union_tag_not_found" else parts[-1]
            where = place if kind == "missing" else f"{place}.source"
            return f"{where}: is missing{_purpose(parts, name)}"
        case "union_tag_invalid":
            near = difflib.get_close_matches(str(context["tag"]), SOURCES, 1, 0.5)
            hint = f", did you mean {near[0]!r}?" if near else ""
            return f"{place}.source: must be one of {', '.join(SOURCES)}, got {context['tag']!r}{hint}"
        case "model_type" | "model_attributes_type" | "dict_type":
            short = f"one of {', '.join(RULES)}, or " if _model_at(parts) is Relabel else ""
            return f"{place}: must be {short}a mapping, got {_shown(got)}"
        case "string_type" if "[key]" in first["loc"]:
            return f"{place}: a name must be text, put it in quotes"
        case "value_error":
            return f"{place}: {context['error']}"
        case "string_pattern_mismatch":
            return f"{place}: must match {context['pattern']}, got {_shown(got)}"
    said = re.sub(r"^(Input|Value|List|Dictionary|String) should ", "must ", first["msg"])
    return f"{place}: {said}, got {_shown(got)}"


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, dict) else "a mapping"
    return text if len(text) <= 60 else text[:57] + "…"


def _purpose(parts: list[str], name: str) -> str:
    field = (_model_at(parts[:-1]) or Experiment).model_fields.get(name)
    if field is None or not field.description:
        return ""
    return f" ({field.description.rstrip('.')[:1].lower()}{field.description.rstrip('.')[1:]})"


def _keys(parts: list[str]) -> list[str]:
    model = _model_at(parts)
    return list(model.model_fields) if model else []


def _model_at(parts: list[str]) -> type[BaseModel] | None:
    """The model that reads the mapping at a place such as ``datasets.rand.attack``."""
    match parts:
        case []:
            return Experiment
        case ["datasets", _]:
            return Dataset
        case ["models", _]:
            return Model
        case ["evaluations", _]:
            return Evaluate
        case ["datasets", _, "load", tag]:
            return SOURCES.get(tag)
        case [*_, "relabel" | "agreement" | "toward"]:
            return Relabel
        case [*_, "adversarial"]:
            return Adversary
        case [*_, "spatial"] | [*_, "spatial", _]:
            return Spatial
        case [*_, "attacks", _]:
            return Threat
        case [group, _, stage]:
            return STAGES.get(group, {}).get(stage)
    return None


def recipes(experiment: Experiment) -> dict[str, Recipe]:
    """Every recipe of an experiment by its place: ``datasets/rand`` → its attack."""
    return {f"{group}/{name}": asked(part)[1] for group in STAGES for name, part in getattr(experiment, group).items()}
