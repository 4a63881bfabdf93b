"""`leakage: rand`: the controls that tell real features from leakage, as nodes of the same graph.

A dataset of relabelled adversarial images may teach in other ways than by what the attack put there: by the labels
that stay right, by images that the attacked model had wrong anyway. Each control keeps one of these ways open and
shuts the rest.
"""

from copy import deepcopy
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.experiment.sweeps import entries
from stages.errors import BadInput, short, shown


class Leakage(BaseModel):
    """The controls of one attacked dataset, beside the headline accuracy of its learner."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    leakage: str = Field(description="The dataset: one made by `attack` with method pgd.")
    learner: str | None = Field(
        None, description="The model that learned from it, whose training the controls repeat; by default the only one."
    )
    robust: str | None = Field(
        None,
        description="A model from adversarial training; by default the only one. Without it two controls are left out.",
    )
    on: str | None = Field(None, description="Dataset to score on; by default the one whose images were attacked.")
    split: str = Field("test", description="Its split.")
    share: float = Field(0.4, gt=0, lt=1, description="Share of the images with the largest margins in the top part.")
    probe: dict[str, Any] = Field(
        {}, description="Keys of `train` that the linear probe has otherwise than the learner."
    )


OF_A_NETWORK = ("arch", "mean", "std", "whiten", "norm_bias_lr", "logit_scale")
"""Keys of a training that a linear probe has no use for: the network is that of the model that it probes."""


def expand(found: dict[str, Any]) -> dict[str, Any]:
    """An experiment with `leakage` evaluations, as one that names all their nodes.

    Raises:
        BadInput: what it names is not there, or is no attacked dataset or training.
    """
    evaluations = found.get("evaluations")
    if not isinstance(evaluations, dict) or not any(_is_leakage(part) for part in evaluations.values()):
        return found
    made = deepcopy(found)
    for name, part in evaluations.items():
        if _is_leakage(part):
            _add(made, found, name, _read(name, part))
    return made


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


def _add(made: dict[str, Any], found: dict[str, Any], name: str, asked: Leakage) -> None:
    """Add to what is made the datasets, the learners and the evaluation, for what was found in the file."""
    place, data = f"evaluations.{name}", asked.leakage
    datasets, models = (dict(entries(found, group)) for group in ("datasets", "models"))
    part = datasets.get(data, {})
    attack = part.get("attack")
    if not isinstance(attack, dict) or attack.get("method", "pgd") != "pgd":
        raise BadInput(f"{place}.leakage: names {shown(data)}, which is no dataset made by an attack with method pgd")
    learner = asked.learner or _only(models, lambda train: train.get("on") == data, f"{place}.learner", f"on {data}")
    train = models.get(learner, {}).get("train")
    if not isinstance(train, dict) or train.get("on") != data:
        raise BadInput(f"{place}.learner: names {shown(learner)}, which is no model that is trained on {data}")
    robust = asked.robust or _only(models, lambda train: "adversarial" in train, f"{place}.robust", None)
    if robust and robust not in models:
        raise BadInput(f"{place}.robust: names {shown(robust)}, which is none of the models")
    sets: dict[str, dict[str, Any]] = {
        "leakage": {**part, "attack": {**_plain(attack), "method": "leakage"}},
        "top": {"select": {"images": data, "keep": "top", "share": asked.share}},
        "bottom": {"select": {"images": data, "keep": "bottom", "share": round(1 - asked.share, 6)}},
    }
    if robust:
        sets["robust-source"] = {**part, "attack": {**_plain(attack), "model": robust}}
    wanted = {control: {**models[learner], "train": {**train, "on": f"{data}.{control}"}} for control in sets}
    if robust:
        like = {key: value for key, value in train.items() if key not in OF_A_NETWORK}
        wanted = {"probe": {**models[learner], "train": {**like, **asked.probe, "on": data, "probe": robust}}, **wanted}
    _put(place, made, "datasets", {f"{data}.{control}": dataset for control, dataset in sets.items()})
    _put(place, made, "models", {f"{learner}.{control}": model for control, model in wanted.items()})
    made["evaluations"][name] = {
        "models": [learner, *(f"{learner}.{control}" for control in wanted)],
        "on": asked.on or attack.get("images"),
        "split": asked.split,
    }


def _put(place: str, made: dict[str, Any], group: str, wanted: dict[str, dict[str, Any]]) -> None:
    """Add the controls to a group; two evaluations of one dataset share those that they have alike."""
    for name, entry in wanted.items():
        if made[group].setdefault(name, entry) != entry:
            raise BadInput(
                f"{place}.leakage: makes {group}.{name}, of which there is another; give one of them another name"
            )


def _plain(attack: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in attack.items() if key != "not_transferring_to"}


def _only(models: dict[str, Any], fits: Any, place: str, what: str | None) -> Any:
    """The one trained model that fits; None where there is none and none is needed."""
    trained = {name: part.get("train") for name, part in models.items()}
    found = [name for name, train in trained.items() if isinstance(train, dict) and fits(train)]
    if len(found) > 1:
        raise BadInput(f"{place}: {' and '.join(found[:2])} would do; name one")
    if what is not None and not found:
        raise BadInput(f"{place}: no model is trained {what}; name one")
    return found[0] if found else None
