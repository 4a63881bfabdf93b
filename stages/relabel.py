"""Target classes: the class that an image is perturbed toward and labelled as."""

from collections.abc import Mapping, Sequence

import numpy as np

from stages.errors import BadInput, shown, some
from stages.recipes import Relabel
from stages.seeds import generator


def targets(
    rule: Relabel,
    label: np.ndarray,
    index: np.ndarray,
    classes: Sequence[str],
    logits_NC: np.ndarray | None = None,
) -> np.ndarray:
    """The target class of each of N images.

    `random` and `other` draw once per image from (seed, index), independent of the shard and of the other images.

    Args:
        rule: the rule, with its seed or map.
        label: N; true classes.
        index: N; positions in the source.
        classes: class names, C of them.
        logits_NC: the source model's logits on the clean images; for `least_likely` only.

    Returns:
        N, int64.

    Raises:
        BadInput: the map does not match the classes, or `least_likely` has no logits.
    """
    count = len(classes)
    match rule.rule:
        case "next":
            return np.asarray((label + 1) % count)
        case "random":
            return np.array([generator(rule.seed, "target", i).integers(count) for i in index], dtype=np.int64)
        case "other":
            steps = [generator(rule.seed, "target", i).integers(1, count) for i in index]
            return np.asarray((label + np.array(steps, dtype=np.int64)) % count)
        case "map":
            assert rule.map is not None
            return np.asarray(class_map(rule.map, classes)[label])
        case "least_likely":
            if logits_NC is None:
                raise BadInput("relabel least_likely needs the attack to name a model")
            return np.asarray(logits_NC.argmin(axis=1), dtype=np.int64)


def class_map(mapping: Mapping[str | int, str | int], classes: Sequence[str]) -> np.ndarray:
    """A user's map as an array, C: true class → target class.

    Raises:
        BadInput: a name or number is no class, or a class is missing.
    """
    named = {name: number for number, name in reversed(list(enumerate(classes)))}
    numbers = {_class_number(k, classes, named): _class_number(v, classes, named) for k, v in mapping.items()}
    if len(numbers) < len(mapping):
        raise BadInput("relabel map names a class twice, by name and by number")
    missing = [name for i, name in enumerate(classes) if i not in numbers]
    if missing:
        raise BadInput(f"relabel map leaves out {some(missing)}: every class needs a target")
    return np.array([numbers[i] for i in range(len(classes))], dtype=np.int64)


def _class_number(name: str | int, classes: Sequence[str], named: Mapping[str, int]) -> int:
    if str(name) in named:
        return named[str(name)]
    if str(name).isdecimal() and int(name) < len(classes):
        return int(name)
    raise BadInput(f"relabel map names {shown(name)}, which is no class: the classes are {some(classes)}")
