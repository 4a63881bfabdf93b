"""The verdict of a run: its main result in one sentence, what limits it, and the words it uses."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import NamedTuple

from pipeline.experiment.sweeps import split_name
from pipeline.report import published
from pipeline.report.results import Score
from pipeline.report.scores import AttackResult, Row, percent, shown, unbalanced
from stages.recipes import Pretrained

FEW = 1000
"""Held-out images below which the verdict names its uncertainty in points."""

LOW_SUCCESS, SUFFICIENT = 0.5, 0.9
"""Attack success rates below which the verdict names it: of any learner, and of one that is no better than chance. On
CIFAR-10, a rate of 76 % teaches nothing, one of 86 % little, one of 92 % nearly all (docs/results.md)."""

NEVER_RIGHT = ("D_other", "D_det")
"""Training sets in which no label is right."""

SEEDS = "seeds: [0, 1, 2]"
"""What to add to an experiment for three trainings of everything."""


@dataclass(frozen=True)
class Remark:
    """A sentence that qualifies the verdict.

    Attributes:
        text: the sentence.
        add: lines to add to the experiment file, if it is about something missing.
    """

    text: str
    add: str = ""


def verdict(scores: Sequence[Score]) -> str | None:
    """The main result in one sentence, from held-out images; None if no model was scored on any."""
    if (top := headline(scores)) is not None:
        learned_from = published.LEARNED_FROM[str(top.kind)]
        return (
            f"Trained only on {learned_from}, {top.model} classifies {top.clean} of the untouched {top.split} images "
            f"correctly ({top.clean.interval}), {_baseline(top)}: {_meaning(top, scores)}."
        )
    if any(score.kind == "D_R" for score in scores):
        return _versions(scores)
    if not scores:
        return None
    best = max(scores, key=lambda score: score.clean.mean)
    short = "" if best.fitted else f"; {_short('it', best)}: train it longer"
    known = ". Is that the accuracy you know it for? If not, check `mean`, `std` and the order of its classes"
    loaded = known if isinstance(best.node.recipe, Pretrained) else ""
    return f"{best.model} classifies {best.clean} of the {best.split} images correctly, {best.beside}{short}{loaded}."


def headline(scores: Sequence[Score]) -> Score | None:
    """The learner that the verdict is about: of the strictest training set present; of a sweep, the last."""
    for kind in published.LEARNED_FROM:
        same = [score for score in scores if score.kind == kind]
        if same:
            return next((score for score in same if not score.axes), same[-1])
    return None


def controls_of(top: Score, scores: Sequence[Score]) -> list[Score]:
    """The controls of a learner that has the same labels without the attack; the leakage-only control first."""
    kinds = [f"{top.kind}, {control}" for control in ("leakage only", "noise", "untouched")]
    return sorted((score for score in scores if score.kind in kinds), key=lambda score: kinds.index(str(score.kind)))


def _baseline(top: Score) -> str:
    """The baselines as half a sentence; a constant prediction only where it is clearly better than chance."""
    return top.beside if unbalanced([top]) else f"where chance is {percent(top.chance)}"


def _level(score: Score, share: float) -> str:
    """The baseline that an accuracy does not exceed, in a sentence."""
    return "chance" if share <= score.chance else f"a constant prediction ({percent(score.constant)})"


def _meaning(top: Score, scores: Sequence[Score]) -> str:
    controls = controls_of(top, scores)
    best = max(controls, key=lambda score: score.clean.mean, default=None)
    if top.at_baseline:
        if not top.fitted:
            return f"{_short('it', top)}, so the result is inconclusive"
        level = _level(top, top.clean.low)
        if best is not None and best.clean.high < top.clean.low:
            return (
                f"no better than {level}. The perturbations raise it from the {best.clean} of {best.model}, which has "
                f"no attack, but an accuracy no higher than {level} does not show that it recognises any class"
            )
        beside = f"; without the attack, {best.model} reaches {best.clean}" if best is not None else ""
        return f"no better than {level}{beside}, so there is no sign that it learned anything that generalises"
    if best is not None and best.clean.high >= top.clean.low:
        return f"without the attack, {best.model} reaches {best.clean}, so leakage alone may explain it"
    if controls and controls[0].kind == f"{top.kind}, leakage only":
        leakage = controls[0].clean
        known = "the perturbations contain features that generalise"
        if leakage.mean <= top.level[1]:
            below = leakage.high < top.level[1]
            avoids = ", as it taught only which class an image is not" if below and top.kind in NEVER_RIGHT else ""
            compared = f"{'below' if below else 'no more than'} {_level(top, leakage.mean)}"
            return f"{known}; leakage alone gives {leakage}, {compared}{avoids}"
        points = 100 * (top.clean.mean - leakage.mean)
        return f"{known}, worth {points:.1f} points beyond the {leakage} of leakage alone"
    known = f"without the attack, {best.model} reaches {best.clean}; " if best is not None else ""
    return f"{known}how much of the {top.clean} is leakage is unknown without a leakage-only control"


def _short(subject: str, score: Score) -> str:
    """In what way a training was too short, as a clause."""
    if score.learning:
        return (
            f"{subject} was still learning its own training labels when its training ended ({shown(score.fit_before)} "
            f"of them after the last epoch but one, {shown(score.fit)} after the last)"
        )
    return f"{subject} fits only {shown(score.fit)} of its own training labels"


# -------------------------------------------------------------------------------------------- remarks


def advice(scores: Sequence[Score]) -> str | None:
    """What is wrong, and what to mend first: the source model, the attack, the learner's training, or else what is left
    to try for a learner at chance; None where nothing is wrong."""
    if (top := headline(scores)) is None:
        return None
    said = list(_source(top, scores)) or [*_one_class(top), *_unfitted(top, ()), *_untried(top, scores)]
    return " ".join(remark.text for remark in said) or None


def remarks(scores: Sequence[Score]) -> Iterator[Remark]:
    """Sentences that qualify the verdict: what controls show, and what is missing, with what to run."""
    top = headline(scores)
    by_kind = {score.kind: score for score in reversed(scores)}
    if top is not None:
        poor, controls = list(_source(top, scores)), controls_of(top, scores)
        yield from _avoids(top)
        yield from poor
        yield from _controls(top, by_kind)
        if not poor:  # else its trainings are not at fault
            yield from _scale(top, scores)
            yield from _one_class(top)
            yield from _unfitted(top, controls)
            yield from _untried(top, scores)
        yield from _limits(top, controls)
    if top is not None and "D_R" in by_kind:
        yield Remark(_versions(scores))
    yield from _widest_gap(scores)


def _source(top: Score, scores: Sequence[Score]) -> Iterator[Remark]:
    """Whether the source model and the attack were good enough for the dataset to teach anything."""
    source = _attacked(top, scores)
    if source is not None and (poor := _poor(source)) is not None:
        loaded = isinstance(source.node.recipe, Pretrained)
        mend = "If it was better before, check `mean`, `std` and `outputs`." if loaded else "Train it longer."
        yield Remark(f"The source model, {source.model}, classifies {source.clean} correctly, {poor}. {mend}")
    elif top.success is not None and top.success.mean < (SUFFICIENT if top.at_baseline else LOW_SUCCESS):
        yield Remark(
            f"The attack reached its target for only {top.success} of the images; the others carry weaker features of "
            "their label. Double its `eps` for a start, or raise its `steps`."
        )


def _attacked(top: Score, scores: Sequence[Score]) -> Score | None:
    """The score of the model that a learner's images were attacked with."""
    attacked = top.node.inputs["on"].inputs.get("model")
    return next((score for score in scores if attacked is not None and score.node.id == attacked.id), None)


def _scale(top: Score, scores: Sequence[Score]) -> Iterator[Remark]:
    """What to hold a learner's accuracy against: that of the source model, on the same images."""
    source = _attacked(top, scores)
    if source is None or source.images != top.images or top.at_baseline:
        return
    recovered = (top.clean.mean - top.chance) / (source.clean.mean - top.chance)
    share = f"; {top.model} recovers {100 * recovered:.0f} % of its accuracy above chance" if recovered < 1 else ""
    yield Remark(f"For scale: the source model, {source.model}, classifies {source.clean}{share}.")


def _one_class(top: Score) -> Iterator[Remark]:
    """Whether most correct answers are of one class, as of a learner that answers it whatever it sees."""
    per_class: Mapping[str, Row] = top.rows[0]["per_class"]
    right = {name: of_class["n"] * (of_class["accuracy"] or 0.0) for name, of_class in per_class.items()}
    name = max(right, key=lambda name: right[name], default="")
    if name and right[name] > sum(right.values()) * (1 + 1 / len(right)) / 2:
        own = percent(per_class[name]["accuracy"])
        others = percent(mean(of_class["accuracy"] or 0.0 for one, of_class in per_class.items() if one != name))
        yield Remark(
            f"Most correct answers of {top.model} are of one class: it classifies {own} of `{name}` correctly and "
            f"{others} of the others, so it hardly tells the classes apart."
        )


def _avoids(top: Score) -> Iterator[Remark]:
    """Why a learner is below chance, where no label is right."""
    if top.clean.high < top.chance and top.kind in NEVER_RIGHT:
        yield Remark(
            f"Below chance is no mistake: as no label of {top.trained_on} is right, {top.model} learned which class an "
            "image is not, but not which it is."
        )


def _poor(source: Score) -> str | None:
    """Why little can be learned from a source model's perturbations; None if it classifies well enough."""
    if source.at_baseline:
        level = _level(source, source.clean.low)
        return f"no better than {level}, so its perturbations cannot carry features of a class"
    if source.clean.mean < source.halfway:
        return "so its perturbations carry only the few features that it has learned"
    return None


def _controls(top: Score, by_kind: Mapping[str | None, Score]) -> Iterator[Remark]:
    for kind, images in (("untouched", "untouched images"), ("noise", "images with noise")):
        control = by_kind.get(f"{top.kind}, {kind}")
        if control is not None and not top.at_baseline:  # else there is no result to explain
            so = "do not explain the result" if control.clean.high < top.clean.low else "may explain the result"
            yield Remark(f"The same labels on {images} give {control.clean}: the labels alone {so}.")
    if (control := by_kind.get(f"{top.kind}, robust source")) is not None:
        yield Remark(f"The same attack on a robust source model, which moves robust features, gives {control.clean}.")
    if (control := by_kind.get(f"{top.kind}, robust features only")) is not None:
        yield Remark(f"A linear layer on a robust model's features, trained on the same images, gives {control.clean}.")


def _unfitted(top: Score, controls: Sequence[Score]) -> Iterator[Remark]:
    """Learners that did not fit their own labels."""
    if not top.fitted:
        yield Remark(
            f"{_short(top.model, top)}. Trained longer, it may learn more: raise its `epochs`"
            f"{'' if top.learning else ' or its `lr`'}."
        )
    for control in controls:
        if not control.fitted:
            yield Remark(
                f"{_short(f'The control {control.model}', control)}. Trained longer, it may reach a higher accuracy: "
                "raise its `epochs`."
            )


def _untried(top: Score, scores: Sequence[Score]) -> Iterator[Remark]:
    """What is left to try for a learner at chance that fits its labels, where `_source` finds nothing wrong."""
    source = _attacked(top, scores)
    if source is None or not (top.at_baseline and top.fitted):
        return
    unlike = source.node.arch != top.node.arch
    network = [f"the source model's network for {top.model}, `arch: {source.node.arch}`"] if unlike else []
    views = "`views: 4` in the attack with twice its `eps`, as steps that follow several views reach fewer targets"
    left = "; ".join([*network, views])
    yield Remark(
        f"The source model is good and the attack reaches its targets. What is left to try: {left}; or more images. "
        "Settings chosen by their accuracy on test images look better than they are: confirm the last ones with "
        f"other seeds (`{SEEDS}`)."
    )


def _limits(top: Score, controls: Sequence[Score]) -> Iterator[Remark]:
    """What the verdict does not rest on, with what to run for it."""
    if f"{top.kind}, leakage only" not in [control.kind for control in controls]:
        data, learner = split_name(top.trained_on)[0], top.base
        yield Remark(
            "No control measures how much of this is leakage. One more training does: add this line below "
            "`evaluations:` and run the file again.",
            f"  leakage-{data}: {{leakage: {data}, learner: {learner}, controls: [leakage]}}",
        )
    if top.clean.seeds == 1:
        close = ""
        if not top.at_baseline and top.clean.low - top.level[1] < top.clean.mean - top.clean.low:
            close = f" That of {top.model} begins close to {_level(top, top.level[1])}: another seed may not exceed it."
        yield Remark(
            "Each training ran once. The interval covers the choice of test images, not the variation between "
            f"seeds, which may be larger.{close} To train each model three times, add this and run the file again.",
            SEEDS,
        )
    if (n := top.rows[0]["n"]) < FEW:
        yield Remark(
            f"The test set has only {n:,} images: a difference of less than about {_points(top):.2g} points between "
            f"two models of about this accuracy may be sampling error. {_more_images(top)}"
        )


def _points(top: Score) -> float:
    """Half of the 95 % interval, in points, of the difference between two models of this accuracy on as many images.

    From their own Wilson intervals (Newcombe 1998, method 10), as if each were scored on a test set of its own: on the
    same images, the interval is usually narrower.
    """
    share, low, high = (float(top.rows[0][key]) for key in ("accuracy", "low", "high"))
    return 100 * math.hypot(share - low, high - share)


def _more_images(top: Score) -> str:
    recipe = top.on.recipe
    if getattr(recipe, "limit", None) is not None:
        return f"To score on more, raise or remove `limit` of {top.on.name}."
    return f"All {top.split} images of {top.on.name} are scored: only a larger test set narrows the intervals."


VERSIONS = {"D_R": "robust features", "D_NR": "non-robust features", "D": "the images themselves"}
"""The paper's training sets for one comparison, in words."""


def _versions(scores: Sequence[Score]) -> str:
    """Clean and robust accuracy of the learners of D_R, D_NR and D."""
    parts = list[str]()
    for kind, images in VERSIONS.items():
        if (score := _most_attacked(kind, scores)) is not None:
            attack, of = _strongest(score), "" if parts else f" of the {score.split} images correctly"
            under = f", {attack.worst} under {attack.name}" if attack else ""
            parts.append(f"{images}, {score.model} classifies {score.clean}{of}{under}")
    return f"Trained on {'; on '.join(parts)}."


def _most_attacked(kind: str, scores: Sequence[Score]) -> Score | None:
    """Of the models trained on a kind of dataset, the score with the attack of the largest radius."""
    return max((score for score in scores if score.kind == kind), key=_largest_radius, default=None)


def _largest_radius(score: Score) -> float:
    attack = _strongest(score)
    return -1.0 if attack is None else float(attack.settings.get("eps", 0.0))


def _strongest(score: Score) -> AttackResult | None:
    """The untargeted attack on the model itself with the largest radius."""
    untargeted = [attack for attack in score.attacks() if attack.target_rule is None]
    return max(untargeted, key=lambda attack: attack.settings.get("eps", 0.0), default=None)


def _widest_gap(scores: Sequence[Score]) -> Iterator[Remark]:
    score = _most_attacked("D", scores)
    if score is not None and (attack := _strongest(score)) is not None:
        yield Remark(
            f"Average and worst case differ: the accuracy of {score.model} is {shown(attack.average)} on average "
            f"({attack.average_case}) and {attack.worst} under {attack.name}."
        )


# ---------------------------------------------------------------------------------------------- words


class Word(NamedTuple):
    """A term, how it occurs in a text, and what it means."""

    term: str
    within: str
    meaning: str


WORDS = (
    Word(
        "adversarial image",
        "adversarial images",
        "an image altered pixel by pixel, within a small radius, so that the attacked network takes it for another "
        "class",
    ),
    Word(
        "untouched test images",
        "untouched",
        "images without any alteration, which no training of this run saw, scored with their true class",
    ),
    Word(
        "perturbations",
        "perturbations",
        "what the attack added to the images: pixel by pixel the altered image minus the original",
    ),
    Word(
        "95 % interval",
        " – ",
        "the Wilson score interval, in brackets: over many random samples of test images, about 95 % of such intervals "
        "contain the model's accuracy on all images of that kind",
    ),
    Word("chance", "chance", "the accuracy of guessing at random: one over the number of classes"),
    Word("constant prediction", "constant prediction", "predicting the most frequent class for every image"),
    Word(
        "leakage",
        "leakage",
        "what can be learned from the labels and images without the attack; its control is trained like the learner, "
        "on noise in place of perturbations",
    ),
    Word(
        "features that generalise",
        "features that generalise",
        "patterns that also predict the class of new, untouched images",
    ),
)


def words(text: str | None) -> list[Word]:
    """The terms that a text uses, with their meaning."""
    return [word for word in WORDS if word.within in (text or "")]
