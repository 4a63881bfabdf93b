"""The experiment file: its datasets, models and evaluations, validated."""

import errno
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    StringConstraints,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from pipeline.experiment import controls, sweeps, yaml12
from stages.errors import BadInput, nearest, short, shown
from stages.limits import FILE, NAME, PLACE, TEXT_KEPT
from stages.recipes import (
    RULES,
    SOURCES,
    STAGES,
    Adversary,
    Attack,
    EvalAttack,
    Evaluate,
    Invert,
    Load,
    Pretrained,
    Recipe,
    Relabel,
    Select,
    Spatial,
    Train,
    Usefulness,
    refuse_secrets,
)

PLAIN = rf"[A-Za-z0-9][A-Za-z0-9_.-]{{0,{NAME - 1}}}"
NAMED = (
    "holds letters, digits, `_`, `.` and `-`, begins with a letter or a digit and has at most "
    f"{NAME} characters, including what `leakage` adds; its place in a sweep has at most {PLACE}"
)

Name = Annotated[str, StringConstraints(pattern=rf"^{PLAIN}(@[A-Za-z0-9_.,=-]{{1,{PLACE}}})?$")]
"""The name of a node, and of its folder; after the @, its place in a sweep."""

TAGS = ("(accuracy)", "(measurement)", "[key]")
"""Parts of pydantic's error locations that are no keys of the file."""


RENAMED = {
    "drops": "milestones",
    "freeze": "stop_at_margin",
    "load": "pretrained",
    "source": "surrogate",
    "toward": "target_rule",
    "watch": "eval_images",
}
"""Keys of earlier experiment files → what they are called now. An old name is refused where the new one is a key."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Dataset(_Part):
    """`load`, `attack` with `relabel`, `invert`, or `select`."""

    load: Load | None = Field(None, description="Take clean images from a source.")
    attack: Attack | None = Field(None, description="Perturb another dataset's images toward a target class.")
    relabel: Relabel | None = Field(None, description="Rule for the target class, which becomes the label.")
    invert: Invert | None = Field(None, description="Find images that a model represents as it does another dataset's.")
    select: Select | None = Field(
        None, description="Keep the images of another dataset that have the largest, or smallest, values of a column."
    )

    @model_validator(mode="after")
    def _one_way(self) -> "Dataset":
        *ways, last = [name for name in type(self).model_fields if name != "relabel"]
        if sum(getattr(self, way) is not None for way in (*ways, last)) != 1:
            raise ValueError(f"a dataset has one of {', '.join(f'`{way}`' for way in ways)} and `{last}`")
        if (self.attack is None) != (self.relabel is None):
            raise ValueError("`attack` and `relabel` go together: the relabel rule names the target of the attack")
        return self


class Model(_Part):
    """`train` or `pretrained`."""

    train: Train | None = Field(None, description="Train it on a dataset.")
    pretrained: Pretrained | None = Field(None, description="Take weights that were trained elsewhere.")

    @model_validator(mode="after")
    def _one_way(self) -> "Model":
        if (self.train is None) == (self.pretrained is None):
            raise ValueError("a model has either `train` or `pretrained`")
        return self


class Measurement(_Part):
    """An evaluation of something other than accuracy."""

    usefulness: Usefulness = Field(description="Usefulness and robust usefulness of models' features.")


Evaluation = Annotated[
    Annotated[Evaluate, Tag("(accuracy)")] | Annotated[Measurement, Tag("(measurement)")],
    Discriminator(lambda part: "(measurement)" if _measures(part) else "(accuracy)"),
]


def _measures(part: Any) -> bool:
    return isinstance(part, Measurement) or (isinstance(part, dict) and "usefulness" in part)


def asked(part: Dataset | Model | Evaluate | Measurement) -> tuple[str, Recipe]:
    """The stage and the recipe of an entry of an experiment."""
    if isinstance(part, Evaluate):
        return "evaluate", part
    stages = ((name, getattr(part, name)) for name in type(part).model_fields if name != "relabel")
    return next((name, recipe) for name, recipe in stages if recipe is not None)


Line = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, pattern=r"^[^\n\r]*$")]


class About(_Part):
    """Where the images come from and under which terms, for the cards of the datasets. What is left out is called
    unknown there."""

    license: Line | None = Field(
        None, description="Licence of the images: an identifier such as `cc-by-4.0`, the name of another, or a URL."
    )
    source: Line | None = Field(None, description="Where the images come from: a URL, or a sentence.")
    creators: list[Line] = Field([], max_length=100, description="People or organisations who made the images.")
    description: str | None = Field(None, description="What the images show, as Markdown.")
    citation: str | None = Field(None, description="How the images are cited, as BibTeX.")


class Experiment(_Part):
    """A graph of datasets, models and evaluations."""

    name: Annotated[str, StringConstraints(pattern=f"^{PLAIN}$")] = Field(
        description="Name of the experiment, and part of the names of its runs."
    )
    about: About = Field(
        About(), description="Source and licence of the images, for the datasets' cards. Part of no version."
    )
    datasets: dict[Name, Dataset] = Field({}, description="Datasets by name.")
    models: dict[Name, Model] = Field({}, description="Models by name.")
    evaluations: dict[Name, Evaluation] = Field({}, description="Evaluations by name.")

    _written: str | None = PrivateAttr(None)

    @property
    def written(self) -> str | None:
        """The text that it was read from, verbatim; None if it had none, or one that a record must not hold."""
        return self._written

    def __eq__(self, other: object) -> bool:
        """Equal entries make equal experiments, however they were written."""
        return isinstance(other, Experiment) and dict(self) == dict(other)

    @model_validator(mode="after")
    def _not_empty(self) -> "Experiment":
        if not (self.datasets or self.models or self.evaluations):
            raise ValueError("the experiment names no dataset, model or evaluation")
        return self


def read(path: Path) -> Experiment:
    """Read an experiment file, or standard input where the path is ``-``.

    Raises:
        BadInput: it is missing, not YAML, or invalid; the message names the place.
    """
    name = "the experiment on standard input" if str(path) == "-" else f"experiment file {path}"
    try:
        content = _beginning(path)
    except OSError as error:
        raise BadInput(f"{name} cannot be read: {error.strerror}") from error
    if len(content) > FILE:
        raise BadInput(f"{name} has more than {FILE:,} bytes, the most that one may have")
    try:
        raw = yaml12.load(content)
    except BadInput as error:
        raise BadInput(f"{name} {error}") from error
    if raw is None:
        raise BadInput(f"{name} is empty")
    return parse(raw, _kept(content.decode(errors="replace")))


SECRET = re.compile("secret|password|token|credential|access.?key", re.IGNORECASE)
"""Words that make the text of an experiment stay out of the record: values are checked, comments are not."""


def _kept(text: str) -> str | None:
    """The text of an experiment for the record, unless a program wrote it, it is very long, or it may hold secrets."""
    if text.startswith("{") or len(text) > TEXT_KEPT or SECRET.search(text):
        return None
    try:
        for word in re.split(r"[\s'\",\[\]{}]+", text):
            if "//" in unquote(word):
                refuse_secrets(word)
    except ValueError:
        return None
    return text


def _beginning(path: Path) -> bytes:
    """The first bytes of a file, one more than an experiment may have."""
    if str(path) == "-":
        if sys.stdin is None:
            raise OSError(errno.EBADF, "it is closed")
        return sys.stdin.buffer.read(FILE + 1)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # does not wait for a writer of a pipe
    os.set_blocking(descriptor, True)
    with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor
        return file.read(FILE + 1)


def parse(raw: Any, written: str | None = None) -> Experiment:
    """Expand and validate the contents of an experiment file.

    Args:
        raw: its contents.
        written: its text, to be kept beside them.

    Raises:
        BadInput: the first error, with its place as a path.
    """
    if not isinstance(raw, dict):
        raise BadInput(f"an experiment file is a mapping with name, datasets, models and evaluations, got {shown(raw)}")
    yaml12.refuse_odd(raw)
    expanded = sweeps.expand(controls.expand(raw))
    try:
        experiment = Experiment.model_validate(expanded)
    except ValidationError as error:
        raise BadInput(_sentence(error, expanded)) from error
    experiment._written = written
    return experiment


def _sentence(error: ValidationError, expanded: dict[str, Any]) -> str:
    """The first error with its place. If a key allows several models, it is the error of the one that fits best."""
    errors = [(_way(each, expanded), each) for each in error.errors(include_url=False)]
    start = errors[0][0]
    way, first = max((each for each in errors if each[0][: len(start)] == start), key=lambda each: len(each[0]))
    choices = [each["msg"] for at, each in errors if at == way]
    return f"{'.'.join(short(str(part)) for part in way) or 'experiment'}: {_reason(first, choices)}"


def _way(error: ErrorDetails, expanded: Any) -> tuple[Any, ...]:
    """The keys that lead to an error: pydantic's location without its names for the choices of a union."""
    way, value, kind = list[Any](), expanded, error["type"]
    for at, part in enumerate(error["loc"], 1):
        inside = part in (value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ())
        if inside or value is None or isinstance(part, int) or (kind == "missing" and at == len(error["loc"])):
            way.append(part)
            value = value[part] if inside else None
    return (*way, "source") if kind.startswith("union_tag_") else tuple(way)


def _reason(error: ErrorDetails, choices: Sequence[str]) -> str:
    """The reason of an error.

    Args:
        error: pydantic's details.
        choices: pydantic's message for each model that the key allows.
    """
    context, got, parts = error.get("ctx", {}), error["input"], [str(p) for p in error["loc"] if p not in TAGS]
    match error["type"]:
        case "extra_forbidden":
            return _unknown_key(parts[-1], _keys(parts[:-1]))
        case "missing":
            return f"is missing{_purpose(parts, parts[-1])}"
        case "union_tag_not_found":
            return f"is missing{_purpose(parts, 'source')}"
        case "union_tag_invalid":
            near = nearest(str(context["tag"]), SOURCES)
            hint = f", did you mean {near[0]!r}?" if near else ""
            return f"must be one of {', '.join(SOURCES)}, got {shown(context['tag'])}{hint}"
        case "model_type" | "model_attributes_type" | "dict_type" if len(choices) == 1:
            rule = f"one of {', '.join(RULES)}, or " if _model_at(parts) is Relabel else ""
            return f"must be {rule}a mapping, got {shown(got)}"
        case "invalid_key" | "string_type" if "[key]" in error["loc"] or error["type"] == "invalid_key":
            return "a name must be text, put it in quotes"
        case "string_pattern_mismatch" if "[key]" in error["loc"] or parts == ["name"]:
            return f"a name {NAMED}; got {shown(got)}"
        case "string_pattern_mismatch":
            return f"must match {context['pattern']}, got {shown(got)}"
        case "value_error":
            return str(context["error"])
    rules = [message.partition(" should ")[2] or message for message in dict.fromkeys(choices)]
    must = " or ".join(rules).replace(" or be ", " or ").replace("a valid dictionary", "a mapping")
    return f"must {must}, got {shown(got)}"


def _unknown_key(key: str, known: Sequence[str]) -> str:
    if (renamed := RENAMED.get(key)) in known:
        return f"`{key}` is called `{renamed}` now"
    near = [name for name in known if key.startswith(name)] or nearest(key, known)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
    return f"unknown key, {hint}"


def _purpose(parts: list[str], name: str) -> str:
    field = (_model_at(parts[:-1]) or Experiment).model_fields.get(name)
    if field is None or not field.description:
        return ""
    return f" ({field.description.rstrip('.')[:1].lower()}{field.description.rstrip('.')[1:]})"


def _keys(parts: list[str]) -> list[str]:
    model = _model_at(parts)
    return list(model.model_fields) if model else []


def _model_at(parts: list[str]) -> type[BaseModel] | None:
    """The model that validates the mapping at a place such as ``datasets.rand.attack``."""
    match parts:
        case []:
            return Experiment
        case ["about"]:
            return About
        case ["datasets", _]:
            return Dataset
        case ["models", _]:
            return Model
        case ["evaluations", _]:
            return Evaluate
        case ["datasets", _, "load", tag]:
            return SOURCES.get(tag)
        case [*_, "relabel" | "agreement" | "target_rule"]:
            return Relabel
        case [*_, "adversarial"]:
            return Adversary
        case [*_, "spatial"] | [*_, "spatial", _]:
            return Spatial
        case [*_, "attacks", _]:
            return EvalAttack
        case [group, _, stage]:
            return STAGES.get(group, {}).get(stage)
    return None


def recipes(experiment: Experiment) -> dict[str, Recipe]:
    """Node → recipe, for the whole experiment: ``datasets/rand`` → its attack."""
    return {f"{group}/{name}": asked(part)[1] for group in STAGES for name, part in getattr(experiment, group).items()}
