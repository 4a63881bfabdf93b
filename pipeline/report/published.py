"""Published figures to compare a run with, and the paper's name for each of its models."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.experiment.graph import Node
from pipeline.report.scores import Row, attack_name, ball, norm_name, search_settings
from pipeline.run.jobs.base import source_of
from stages.recipes import SOURCES, Attack, Ball, ImageFolder, Invert, Select, Torchvision, Train

CIFAR10, RESTRICTED = "CIFAR-10", "Restricted ImageNet"

PAPER = "Ilyas et al. 2019"
PHIBENZ = "phibenz, public regeneration"
JORDAN = "K. Jordan"
GOH = "Goh 2019"
NAKKIRAN = "Nakkiran 2019"
SPATIAL = "Engstrom et al. 2019"


class Condition(NamedTuple):
    """One condition of an experiment: what must agree for two figures to be comparable, and what may differ."""

    same: str
    free: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, self))


Setting = Mapping[str, Condition]
"""The conditions of a figure; of a published one, those that its source states."""

L2 = {"norm": Condition("L2")}
ATTACKED = {"norm": Condition("L2", "ε 0.5"), "steps": Condition("", "100 steps of 0.1")}
LONG = {"epochs": Condition("", "150 epochs")}
"""Of those who repeated the paper, which does not say how long it trained."""
JORDANS = {"epochs": Condition("", "64 epochs")}
REPEATED = {"norm": Condition("L2"), **LONG}
IN_FEW_STEPS = {"norm": Condition("L2", "ε about 0.5"), "steps": Condition("", "12 steps of 0.25"), **JORDANS}
ATTACKED_LARGE = {"norm": Condition("L2", "ε 3"), "steps": Condition("", "100 steps of 0.1")}
HARDENED = {"norm": Condition("L2", "ε 0.5"), "steps": Condition("", "7 steps of 0.1")}
INVERTED = {"steps": Condition("inverted in", "1000 steps of 0.1")}
SOURCE = {"source": Condition("source L2", "ε 0.5")}
SOURCE_L2 = {"source": Condition("source L2")}
UNDER = {"under": Condition("under", "7 steps")}
TOP, BOTTOM = {"share": Condition("share 40 %")}, {"share": Condition("share 60 %")}


@dataclass(frozen=True)
class Figure:
    """One published accuracy.

    Attributes:
        of: the training set, as `kind` names it.
        data: the images, of whose test set the accuracy is.
        percent: accuracy on the test set, as printed: 63.3, or a range 81.1 – 83.9.
        source: the publication.
        network: architecture of the learner; empty if it is not stated.
        under: ``clean``; or the attack that the model is scored under; or ``as`` and a label rule, if it is scored
            against the rule's labels instead of the true ones.
        setting: its conditions.
    """

    of: str
    data: str
    percent: str
    source: str = PAPER
    network: str = "ResNet-50"
    under: str = "clean"
    setting: Setting = field(default_factory=dict)

    @property
    def shares(self) -> list[float]:
        """The accuracy in [0, 1], or both ends of its range."""
        return [float(end) / 100 for end in self.percent.split(" – ")]

    def fits(self, ours: Setting) -> bool:
        """Whether the conditions that must agree do."""
        return all(part.same == ours[name].same for name, part in self.setting.items() if name in ours)

    def differing(self, ours: Setting) -> list[str]:
        """Its conditions that differ from ours."""
        return [str(part) for name, part in self.setting.items() if part.free and part != ours.get(name)]


TABLE = (
    # The paper's table of datasets, its appendix, and replications.
    Figure("D", CIFAR10, "95.25"),
    Figure("D", CIFAR10, "4.49", under="L2 ε 0.25", setting=UNDER),
    Figure("D", CIFAR10, "0", under="L2 ε 0.5", setting=UNDER),
    Figure("D", RESTRICTED, "96.6"),
    Figure("D", CIFAR10, "93.7", JORDAN, "ResNet-9", setting=JORDANS),
    Figure("D, adversarial training", CIFAR10, "90.83", setting=HARDENED),
    Figure("D, adversarial training", CIFAR10, "82.48", under="L2 ε 0.25", setting=HARDENED | UNDER),
    Figure("D, adversarial training", CIFAR10, "70.90", under="L2 ε 0.5", setting=HARDENED | UNDER),
    Figure("D_rand", CIFAR10, "63.3", setting=ATTACKED),
    Figure("D_rand", RESTRICTED, "87.9", setting=ATTACKED_LARGE),
    Figure("D_rand", CIFAR10, "67.75", PHIBENZ, setting=REPEATED),
    Figure("D_rand", CIFAR10, "81.1 – 83.9", JORDAN, "ResNet-9", setting=IN_FEW_STEPS),
    Figure("D_other", CIFAR10, "66 – 67", JORDAN, "ResNet-9", setting=IN_FEW_STEPS),
    Figure("D_det", CIFAR10, "43.7", setting=ATTACKED),
    Figure("D_det", RESTRICTED, "64.4", setting=ATTACKED_LARGE),
    Figure("D_det", CIFAR10, "42.03", PHIBENZ, setting=REPEATED),
    Figure("D_det", CIFAR10, "19.8", JORDAN, "ResNet-9", setting=IN_FEW_STEPS),
    Figure("D_det", CIFAR10, "16.2", under="as next", setting=ATTACKED),
    Figure("D_R", CIFAR10, "85.40", setting=INVERTED | SOURCE),
    Figure("D_R", CIFAR10, "48.20", under="L2 ε 0.25", setting=INVERTED | SOURCE | UNDER),
    Figure("D_R", CIFAR10, "21.85", under="L2 ε 0.5", setting=INVERTED | SOURCE | UNDER),
    Figure("D_R", CIFAR10, "86.79", PHIBENZ, setting=SOURCE_L2 | LONG),
    Figure("D_R", CIFAR10, "49.93", PHIBENZ, under="L2 ε 0.25", setting=SOURCE_L2 | LONG),
    Figure("D_R", CIFAR10, "19.22", PHIBENZ, under="L2 ε 0.5", setting=SOURCE_L2 | LONG),
    Figure("D_R, from noise", CIFAR10, "84.10", setting=INVERTED | SOURCE),
    Figure("D_R, from noise", CIFAR10, "48.27", under="L2 ε 0.25", setting=INVERTED | SOURCE | UNDER),
    Figure("D_R, from noise", CIFAR10, "29.40", under="L2 ε 0.5", setting=INVERTED | SOURCE | UNDER),
    Figure("D_NR", CIFAR10, "87.68", setting=INVERTED),
    Figure("D_NR", CIFAR10, ".82", under="L2 ε 0.25", setting=INVERTED | UNDER),
    Figure("D_NR", CIFAR10, "0", under="L2 ε 0.5", setting=INVERTED | UNDER),
    Figure("D_NR", CIFAR10, "84.38", PHIBENZ, setting=LONG),
    Figure("D_NR", CIFAR10, ".02", PHIBENZ, under="L2 ε 0.25", setting=LONG),
    Figure("D_NR", CIFAR10, "0", PHIBENZ, under="L2 ε 0.5", setting=LONG),
    # Controls that separate features from leakage.
    Figure("D_rand, robust source", CIFAR10, "25.2", setting=ATTACKED | SOURCE),
    Figure("D_det, robust source", CIFAR10, "5.8", setting=ATTACKED | SOURCE),
    Figure("D_det, robust source", CIFAR10, "65.5", under="as next", setting=ATTACKED | SOURCE),
    Figure("D_rand, leakage only", CIFAR10, "79.5", JORDAN, "ResNet-9", setting=IN_FEW_STEPS),
    Figure("D_other, leakage only", CIFAR10, "50.1", JORDAN, "ResNet-9", setting=IN_FEW_STEPS),
    Figure("D_other, top margins", CIFAR10, "78.2", JORDAN, "ResNet-9", setting=IN_FEW_STEPS | TOP),
    Figure("D_other, bottom margins", CIFAR10, "3.0", JORDAN, "ResNet-9", setting=IN_FEW_STEPS | BOTTOM),
    Figure("D_rand, robust features only", CIFAR10, "23.5", GOH, "linear", setting=L2),
    Figure("D_det, robust features only", CIFAR10, "6.8", GOH, "linear", setting=L2),
    Figure("D_det, not transferring", CIFAR10, "2.8", NAKKIRAN, "", setting=L2),
    Figure("D_det, not transferring", CIFAR10, "70.8", NAKKIRAN, "", under="as next", setting=L2),
    # Rotations by up to 30 degrees and shifts by up to a tenth of the width.
    Figure("D", CIFAR10, "94.8", SPATIAL),
    Figure("D", CIFAR10, "15.3", SPATIAL, under="±30°, ±10 %, grid of 775"),
    Figure("D", "ImageNet", "71.3", SPATIAL, "ResNet-18"),
    Figure("D", "ImageNet", "60.6", SPATIAL, "ResNet-18", under="±30°, ±10 %, worst of 10, average"),
    Figure("D", "ImageNet", "39.9", SPATIAL, "ResNet-18", under="±30°, ±10 %, worst of 10"),
    Figure("D", "ImageNet", "20.9", SPATIAL, "ResNet-18", under="±30°, ±10 %, grid of 775"),
    Figure("D, spatial augmentation", "ImageNet", "68.9", SPATIAL, "ResNet-18"),
    Figure(
        "D, spatial augmentation", "ImageNet", "68.0", SPATIAL, "ResNet-18", under="±30°, ±10 %, worst of 10, average"
    ),
    Figure("D, spatial augmentation", "ImageNet", "54.6", SPATIAL, "ResNet-18", under="±30°, ±10 %, worst of 10"),
    Figure("D, spatial augmentation", "ImageNet", "38.1", SPATIAL, "ResNet-18", under="±30°, ±10 %, grid of 775"),
)

TRANSFER = {
    "VGG-16": (65.6, 28.0),
    "Inception-v3": (82.8, 39.4),
    "ResNet-18": (92.1, 40.9),
    "DenseNet": (92.7, 41.7),
    "ResNet-50": (98.7, 44.7),
}
"""Learner → untargeted transfer rate to its architecture, and clean accuracy after training on D_det, both in %, read
off figure 3 of the paper, ± 2 points."""


def beside(of: str | None, data: str | None, ours: Setting, under: str = "clean") -> list[Figure]:
    """Published figures of the same training set: on the same data if there are any, else on CIFAR-10, else on any."""
    same = [figure for figure in TABLE if figure.of == of and figure.under == under and figure.fits(ours)]
    return [f for f in same if f.data == data] or [f for f in same if f.data == CIFAR10] or same


def same(of: str | None, data: str | None, network: str, ours: Setting) -> list[Figure]:
    """Published clean accuracies of the same training set, data, network and settings, as far as these are known."""
    alike = [figure for figure in beside(of, data, ours) if figure.data == data and not figure.differing(ours)]
    return [figure for figure in alike if _plain(figure.network) == _plain(network.rpartition(":")[2])]


def _plain(network: str) -> str:
    """``ResNet-50`` → ``resnet50``."""
    return re.sub("[^a-z0-9]", "", network.lower())


def data_of(node: Node) -> str | None:
    """The published dataset that the images of a node come from, through all inputs; None for any other."""
    match source_of(node).recipe:
        case Torchvision(source="cifar10"):
            return CIFAR10
        case ImageFolder(classes="restricted-imagenet"):
            return RESTRICTED
    return None


def kind(model: Node) -> str | None:
    """The paper's name for a model, derived from its recipe, not from its name in the experiment.

    Returns:
        Such as ``D``, ``D_rand``, ``D_rand, robust source``, ``D_R``. None if the paper has no such model, if it is
        pretrained, or if the name depends on the robustness of a pretrained model.
    """
    if not isinstance(model.recipe, Train) or (of := _training_set(model.inputs["on"])) is None:
        return None
    if model.recipe.adversarial is not None:
        return f"{of}, adversarial training"
    if "probe" in model.inputs:
        probed = {True: "robust features only", False: "linear probe", None: None}[is_robust(model.inputs["probe"])]
        return probed and f"{of}, {probed}"
    return f"{of}, spatial augmentation" if model.recipe.augment == "spatial" else of


class LabelRule(NamedTuple):
    """The paper's name for a training set under one label rule, and what a learner sees of it."""

    training_set: str
    learned_from: str


LABEL_RULES: Mapping[str, LabelRule] = {
    "other": LabelRule("D_other", "adversarial images, each under a wrong label"),
    "random": LabelRule("D_rand", "adversarial images, each under a random label"),
    "next": LabelRule("D_det", "adversarial images, each under the label of the next class"),
    "least_likely": LabelRule("D_least", "adversarial images, each under its least likely label"),
    "map": LabelRule("D_map", "adversarial images, each under a label assigned by its class"),
}
"""The strictest first. A rule without an entry makes a set that the paper does not have."""

LEARNED_FROM = {rule.training_set: rule.learned_from for rule in LABEL_RULES.values()}
"""Training sets whose learners' accuracy is the point of the experiment; the strictest first."""

METHODS: Mapping[str, str] = {
    "pgd": "",
    "universal": ", universal",
    "spatial": ", rotated and shifted",
    "noise": ", noise",
    "leakage": ", leakage only",
    "none": ", untouched",
}
"""How an attack method is named. One without an entry makes a set that the paper does not have."""

SELECTED_BY: Mapping[str, str] = {"margin": "margins", "confidence": "confidences", "l2": "perturbations"}
"""How the column that images are selected by is named."""


def _training_set(dataset: Node) -> str | None:
    """The paper's name for a dataset; None if the paper has no such dataset."""
    if not (images := dataset.inputs.get("images")):
        return "D" if isinstance(dataset.recipe, tuple(SOURCES.values())) else None
    match dataset.recipe:
        case Select(by=column, keep=kept):
            by, of = SELECTED_BY.get(column), _training_set(images)
            return of and by and f"{of}, {kept} {by}"
        case Attack() | Invert() if images.inputs:
            return None  # the paper's sets are made from untouched images
        case Attack():
            return _attacked_set(dataset)
        case Invert(start=start):
            version = {True: "D_R", False: "D_NR", None: None}[is_robust(dataset.inputs["model"])]
            return version and f"{version}{', from noise' if start == 'noise' else ''}"
    return None


def _attacked_set(dataset: Node) -> str | None:
    assert dataset.relabel is not None
    if any(str(true) == str(target) for true, target in (dataset.relabel.map or {}).items()):
        return None  # some labels are left right on purpose
    rule, method = LABEL_RULES.get(dataset.relabel.rule), METHODS.get(dataset.recipe.method)
    if rule is None or method is None:
        return None
    robust = dataset.recipe.method == "pgd" and is_robust(dataset.inputs["model"])
    source = ", robust source" if robust else ""
    spared = ", not transferring" if dataset.recipe.not_transferring_to else ""
    return f"{rule.training_set}{method}{source}{spared}"


def is_robust(model: Node) -> bool | None:
    """Whether a model was trained adversarially; None if it is pretrained, since its record does not say."""
    return model.recipe.adversarial is not None if isinstance(model.recipe, Train) else None


# ------------------------------------------------------------------------------------------- settings


def setting(model: Node) -> Setting:
    """The conditions of a trained model and of its training images in which figures differ."""
    if not isinstance(model.recipe, Train):
        return {}
    hardened = _ball(model.recipe.adversarial) if model.recipe.adversarial else {}
    return {**_made(model.inputs["on"]), **hardened, "epochs": Condition("", _epochs(model.recipe.epochs))}


def _epochs(count: int) -> str:
    return f"{count} epoch" if count == 1 else f"{count} epochs"


def _made(dataset: Node) -> Setting:
    match dataset.recipe:
        case Attack() as ball:
            return {**_ball(ball), **_source(dataset)}
        case Invert(steps=count, step_size=length):
            return {"steps": Condition("inverted in", f"{count} steps of {length:g}"), **_source(dataset)}
        case Select(share=share):
            return {**_made(dataset.inputs["images"]), "share": Condition(f"share {100 * share:g} %")}
    return {}


def _ball(recipe: Ball) -> Setting:
    parts = {
        "norm": Condition(norm_name(recipe.norm), f"ε {recipe.eps:g}"),
        "steps": Condition("", f"{recipe.steps} steps of {recipe.step:g}"),
    }
    return {name: part for name, part in parts.items() if name not in recipe.unused}


def _source(dataset: Node) -> Setting:
    """The ball in which the source model of a dataset is robust, if it is."""
    model = dataset.inputs.get("model")
    if model is None or not is_robust(model):
        return {}
    hardened = model.recipe.adversarial
    return {"source": Condition(f"source {norm_name(hardened.norm)}", f"ε {hardened.eps:g}")}


def under(attack: Row) -> tuple[str, Setting]:
    """The attack that a model is scored under, as figures name it, and its search settings."""
    if attack["attack"] == "pgd" and attack["target_rule"] is None:
        return ball(attack), {"under": Condition("under", search_settings(attack))}
    return attack_name(attack), {}


def on_average(attack: Row) -> str:
    """The average case of an attack, as figures name it."""
    return f"{attack_name(attack)}, average"
