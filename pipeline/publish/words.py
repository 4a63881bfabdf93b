"""A dataset's recipe in words."""

from collections.abc import Mapping
from typing import Any

from pipeline.report.scores import norm_name, percent

RULES = {
    "random": "a class drawn uniformly from all classes",
    "other": "a class drawn uniformly from the wrong classes",
    "next": "the class after the true one, cyclically",
    "least_likely": "the class that the source model finds least likely",
    "map": "the class that a fixed map assigns to the true one",
}
"""Label rule → the class that an image gets."""

CONTROLS = {
    "none": "left unchanged: a control, in which the labels alone differ",
    "noise": "given random noise of the radius of an attack: a control",
    "leakage": "unchanged where the label is the true class or already the model's prediction, else given noise: a "
    "control for leakage",
}
"""Methods that perturb toward no class → what is done to an image."""


def how(recipe: Mapping[str, Any], parents: Mapping[str, Mapping[str, str]]) -> str:
    """How a dataset was made, in a few sentences.

    Args:
        recipe: the contents of its ``recipe.json``.
        parents: role → input, from its manifest.
    """
    with_, names = recipe["parameters"], {role: parent["node"].partition("/")[2] for role, parent in parents.items()}
    match recipe["stage"]:
        case "load":
            changes = [f"{key}: {with_[key]}" for key in ("resize", "crop", "channels") if with_.get(key)]
            return (
                f"The images and labels of the source `{with_['source']}`, loaded and spread over shards at random"
                f"{' (' + ', '.join(changes) + ')' if changes else ''}."
            )
        case "invert":
            return (
                f"For each image of `{names['images']}`, another image was searched that the model `{names['model']}` "
                f"represents alike: {with_['steps']} steps of {with_['step_size']:g} toward the same features, from "
                f"{'another image' if with_['start'] == 'other' else 'noise'}. Each keeps the label of its original."
            )
        case "select":
            end = "largest" if with_["keep"] == "top" else "smallest"
            return (
                f"From `{names['images']}`, the {percent(with_['share'])} of the images with the {end} "
                f"{with_['by']} were kept, with their labels."
            )
    return f"{_attack(with_, names)} {_label(recipe['relabel'])}"


def _attack(with_: Mapping[str, Any], names: Mapping[str, str]) -> str:
    images = f"Each image of `{names['images']}` was"
    match with_["method"]:
        case "spatial":
            return f"{images} rotated and shifted so that the model `{names['model']}` takes it for a target class."
        case "universal":
            what = "perturbed by one perturbation per target class"
        case "pgd":
            what = "perturbed toward a target class"
        case control:
            return f"{images} {CONTROLS[control]}."
    ball = f"within an {norm_name(with_['norm'])} ball of radius {with_['eps']:g} (in pixel units of [0, 1])"
    return (
        f"{images} {what}, by {with_['steps']} steps of {with_['step_size']:g} of projected gradient descent on the "
        f"model `{names['model']}`, {ball}, and rounded to 8 bits inside the ball."
    )


def _label(relabel: Mapping[str, Any]) -> str:
    return f"The target, which became the label, is {RULES[relabel['rule']]} (rule `{relabel['rule']}`)."
