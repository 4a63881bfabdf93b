"""`leakage: rand`: the controls that tell real features from leakage, as nodes of the same graph.

A learner of relabelled adversarial images can learn from more than the features that the attack added: from labels
that stayed right, or from images that the source model misclassified anyway. Each control leaves one of these paths
open and closes the others.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.experiment.sweeps import entries
from stages.errors import BadInput, short, shown

Entry = dict[str, Any]
"""A dataset or model as the file describes it, before validation."""


OF_A_NETWORK = ("arch", "mean", "std", "whiten", "norm_bias_lr", "logit_scale")
"""Keys of a training that a linear probe ignores: its network is that of the model that it probes."""


Control = Literal["leakage", "top", "bottom", "probe", "robust-source"]

ROBUST: tuple[Control, ...] = ("probe", "robust-source")
"""Controls that need an adversarially trained model."""


class Leakage(BaseModel):
    """The controls of one attacked dataset, beside the headline accuracy of its learner."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    leakage: str = Field(description="The dataset: one made by `attack` with method pgd.")
    learner: str | None = Field(
        None, description="The model trained on it, whose training the controls repeat; by default the only one."
    )
    robust: str | None = Field(
        None,
        description="An adversarially trained model; by default the only one. Without one, two controls are left out.",
    )
    on: str | None = Field(None, description="Dataset to score on; by default the one whose images were attacked.")
    split: str = Field("test", description="Its split.")
    controls: list[Control] | None = Field(
        None, min_length=1, description="Which controls, by default all: each is a training of its own."
    )
    share: float = Field(0.4, gt=0, lt=1, description="Share of the images with the largest margins in the top part.")
    probe: dict[str, Any] = Field({}, description="Keys of `train` in which the linear probe differs from the learner.")


def expand(raw: dict[str, Any]) -> dict[str, Any]:
    """Replace the `leakage` evaluations of an experiment by the nodes that they stand for.

    Raises:
        BadInput: an evaluation names something that is missing, or is no attacked dataset or training.
    """
    evaluations = raw.get("evaluations")
    if not isinstance(evaluations, dict) or not any(_is_leakage(part) for part in evaluations.values()):
        return raw
    expanded = deepcopy(raw)
    for name, part in evaluations.items():
        if _is_leakage(part):
            _add(expanded, raw, name, _read(name, part))
    return expanded


def _is_leakage(part: Any) -> bool:
    return isinstance(part, dict) and "leakage" in part


def _read(name: str, part: dict[str, Any]) -> Leakage:
    try:
        return Leakage.model_validate(part)
    except ValidationError as error:
        first = error.errors()[0]
        keys, must = ", ".join(Leakage.model_fields), first["msg"].partition(" should ")[2]
        hint = f"unknown key, known keys: {keys}" if first["type"] == "extra_forbidden" else f"must {must}"
        way = ".".join(short(str(key)) for key in first["loc"] if key != "[key]")
        raise BadInput(f"evaluations.{short(str(name))}.{way}: {hint}, got {shown(first['input'])}") from error


def _add(expanded: dict[str, Any], raw: dict[str, Any], name: str, asked: Leakage) -> None:
    """Add the datasets, learners and evaluation of one `leakage` entry of the raw file."""
    place, data = f"evaluations.{name}", asked.leakage
    models = dict(entries(raw, "models"))
    dataset = _attacked(place, dict(entries(raw, "datasets")), data)
    learner = _learner(place, asked, models)
    robust = asked.robust or _only(models, lambda train: "adversarial" in train, f"{place}.robust", None)
    if robust and robust not in models:
        raise BadInput(f"{place}.robust: names {shown(robust)}, which is not one of the models")
    wanted = asked.controls or get_args(Control)
    if not robust and (without := [control for control in asked.controls or () if control in ROBUST]):
        raise BadInput(f"{place}.controls: {without[0]} needs an adversarially trained model: name it in `robust`")
    sets = {control: entry for control, entry in _sets(dataset, asked, robust).items() if control in wanted}
    learners = _learners(models[learner], asked, list(sets), robust if "probe" in wanted else None)
    _put(place, expanded, "datasets", {f"{data}.{control}": entry for control, entry in sets.items()})
    _put(place, expanded, "models", {f"{learner}.{control}": entry for control, entry in learners.items()})
    expanded["evaluations"][name] = {
        "models": [learner, *(f"{learner}.{control}" for control in learners)],
        "on": asked.on or dataset["attack"].get("images"),
        "split": asked.split,
    }


def _attacked(place: str, datasets: dict[str, Entry], name: str) -> Entry:
    dataset = datasets.get(name, {})
    attack = dataset.get("attack")
    if not isinstance(attack, dict) or attack.get("method", "pgd") != "pgd":
        raise BadInput(f"{place}.leakage: names {shown(name)}, which is no dataset made by an attack with method pgd")
    return dataset


def _learner(place: str, asked: Leakage, models: dict[str, Entry]) -> str:
    on = asked.leakage
    name: str = asked.learner or _only(models, lambda train: train.get("on") == on, f"{place}.learner", f"on {on}")
    train = models.get(name, {}).get("train")
    if not isinstance(train, dict) or train.get("on") != on:
        raise BadInput(f"{place}.learner: names {shown(name)}, which is no model that is trained on {on}")
    return name


def _sets(dataset: Entry, asked: Leakage, robust: str | None) -> dict[str, Entry]:
    """Control → its dataset. The linear probe is trained on the attacked dataset itself."""
    attack = {key: value for key, value in dataset["attack"].items() if key != "not_transferring_to"}
    plain = {key: value for key, value in attack.items() if key not in ("stop_at_margin", "views")}  # keys of a search
    sets: dict[str, Entry] = {
        "leakage": {**dataset, "attack": {**plain, "method": "leakage"}},
        "top": {"select": {"images": asked.leakage, "keep": "top", "share": asked.share}},
        "bottom": {"select": {"images": asked.leakage, "keep": "bottom", "share": round(1 - asked.share, 6)}},
    }
    return sets | ({"robust-source": {**dataset, "attack": {**attack, "model": robust}}} if robust else {})


def _learners(learner: Entry, asked: Leakage, controls: list[str], robust: str | None) -> dict[str, Entry]:
    """Control → the model trained on its dataset, as the learner is trained."""
    train, data = learner["train"], asked.leakage
    learners = {control: {**learner, "train": {**train, "on": f"{data}.{control}"}} for control in controls}
    if not robust:
        return learners
    like = {key: value for key, value in train.items() if key not in OF_A_NETWORK}
    probe = {**learner, "train": {**like, **asked.probe, "on": data, "probe": robust}}
    return {"probe": probe, **learners}


def _put(place: str, expanded: dict[str, Any], group: str, added: dict[str, Entry]) -> None:
    """Add controls to a group; two evaluations of one dataset share their common controls."""
    for name, entry in added.items():
        if expanded[group].setdefault(name, entry) != entry:
            raise BadInput(f"{place}.leakage: makes {group}.{name}, which is defined differently already; rename one")


def _only(models: dict[str, Entry], fits: Callable[[Entry], bool], place: str, what: str | None) -> Any:
    """The one trained model that fits; None if none does and none is needed."""
    trained = {name: part.get("train") for name, part in models.items()}
    fitting = [name for name, train in trained.items() if isinstance(train, dict) and fits(train)]
    if len(fitting) > 1:
        raise BadInput(f"{place}: both {' and '.join(fitting[:2])} fit; name one")
    if what is not None and not fitting:
        raise BadInput(f"{place}: no model is trained {what}; name one")
    return fitting[0] if fitting else None
