"""Checks of a node against what it is made from, before any work is done and before anything is written."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pipeline.experiment.graph import Node
from stages.apart import apart
from stages.errors import BadInput
from stages.recipes import Relabel, is_own

T = TypeVar("T")


def tried(model: Node, function: Callable[..., T], *args: Any) -> T:
    """The result of a function that builds a model's network, called in another process where that is user code."""
    arch = model.arch or ""
    return apart(function, *args, arch=arch) if is_own(arch) else function(*args)


def neutral(channels: int) -> dict[str, list[float]]:
    """A placeholder for a model's mean and deviation, where they are not known yet or make no difference."""
    return {"mean": [0.5] * channels, "std": [0.5] * channels}


def neutral_split(channels: int, split: str) -> dict[str, dict[str, list[float]]]:
    """The same for a dataset, which has them split by split."""
    return {name: {split: values} for name, values in neutral(channels).items()}


def try_features(model: Node, design: Mapping[str, Any], layer: str | None, here: Path) -> None:
    """Find the features of a model.

    Args:
        model: its node.
        design: its design, or as much as is predicted of it.
        layer: the module whose output they are; by default the input of the last linear layer.
        here: folder of the user's modules.

    Raises:
        BadInput: it has none.
    """
    from stages import features
    from stages.design import Design

    if "arch" in design:  # of a model that is not fetched yet, no more than classes and shape are known
        tried(model, features.refuse_without, Design.from_json({**design, "arch": model.arch}), layer, here)


def refuse_model(place: str, node: Node, model: Mapping[str, Any], dataset: Mapping[str, Any]) -> None:
    """Refuse a model of other classes, or for images of another shape, than a dataset has.

    Raises:
        BadInput: it does not fit.
    """
    design, classes, shape = model["design"], len(dataset["classes"]), dataset["image_shape"]
    if design["classes"] not in (None, classes):
        raise BadInput(f"{place}: {node.name} knows {design['classes']} classes, the dataset has {classes}")
    if shape is not None and list(design["shape"]) != list(shape):
        sizes = ["×".join(map(str, s)) for s in (design["shape"], shape)]
        has_shape = hasattr(node.recipe, "shape")
        hint = (
            f": if its network takes these, too, give it `shape: {list(shape)}`; if not, resize the images"
            if has_shape
            else ""
        )
        raise BadInput(f"{place}: {node.name} takes images of {sizes[0]}, the dataset has {sizes[1]}{hint}")


def refuse_rule(place: str, rule: Relabel, classes: list[str], model: str | None) -> None:
    """Refuse a label rule that cannot be applied.

    Raises:
        BadInput: it needs another class, or a model, or its map does not fit the classes.
    """
    from stages.relabel import class_map

    if rule.rule == "other" and len(classes) < 2:
        raise BadInput(f"{place}: other needs another class, the dataset has one")
    if rule.rule == "least_likely" and model is None:
        raise BadInput(f"{place}: least_likely needs the attack to name a model")
    if rule.map is not None:
        try:
            class_map(rule.map, classes)
        except BadInput as error:
            raise BadInput(f"{place}.map: {error}") from error
