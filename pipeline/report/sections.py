"""The sections of a run's page: each a sentence computed from the data, with charts, tables and images under it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import mean
from types import MappingProxyType

import yaml

from pipeline.experiment.graph import Node
from pipeline.experiment.sweeps import name_at, split_name
from pipeline.report import charts, published
from pipeline.report.charts import COLOURS, Bar, Drawing, Line
from pipeline.report.gallery import Gallery, gallery
from pipeline.report.results import Gathered, Score
from pipeline.report.scores import (
    NOISE,
    NORMS,
    Attack,
    Row,
    Spread,
    accuracy_head,
    attacked,
    ball,
    feature_shares,
    merged,
    percent,
    rules,
    scored_on,
    shown,
    transfers,
    unbalanced,
    without_seed,
)

LINES = 200
"""Lines of a table that are shown."""

CURVES = 6
"""Charts of a section."""

IMAGES = 1_200_000
"""Bytes of images in a page."""

POINTS = 800
"""Points of a scatter plot."""

BOXES = 80
"""Boxes of a drawn graph; a larger one is listed only."""

PIXELS = "pixel units of [0, 1]"
"""Of lengths: radii and steps."""


@dataclass(frozen=True)
class Chart:
    """An SVG and what it shows."""

    svg: str
    text: str


@dataclass(frozen=True)
class Table:
    """Lines of text under a head; a cell may have several lines."""

    head: Sequence[str]
    lines: Sequence[Sequence[str]]
    title: str = ""

    @property
    def shown(self) -> Sequence[Sequence[str]]:
        return self.lines[:LINES]

    @property
    def more(self) -> int:
        """Lines that are not shown."""
        return max(0, len(self.lines) - LINES)


@dataclass(frozen=True)
class Section:
    """A part of the page. Of the galleries the first is open, the others unfold."""

    title: str
    text: str
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    galleries: Sequence[Gallery] = ()
    drawing: Drawing | None = None
    source: str | None = None


def sections(found: Gathered) -> list[Section]:
    """All that have something to show, in order."""
    parts: list[Callable[[Gathered], Section | None]] = [
        results,
        pictures,
        leakage,
        sweeps,
        target_rate,
        learning,
        robustness,
        transfer,
        features,
        nodes,
        environment,
    ]
    return [section for part in parts if (section := part(found)) is not None]


# -------------------------------------------------------------------------------------------- results


def results(found: Gathered) -> Section | None:
    """Accuracy of every model, with its interval, what it is compared with, and the published figures."""
    if not found.scores:
        return None
    scores = sorted(merged(found.scores), key=lambda score: bool(score.axes))
    columns = {
        "model": [score.model for score in scores],
        accuracy_head(scores): [str(score.clean) for score in scores],
        "95 % interval": [score.clean.interval for score in scores],
        **scored_on(scores),
        "published": [_published(score) for score in scores],
        "which is": [score.kind or "–" for score in scores],
        "trained on": [score.trained_on for score in scores],
        "network and setting": [_made_with(score) for score in scores],
        "attack success": [shown(score.attack_success_rate) for score in scores],
        "chance": [percent(score.chance) for score in scores],
    }
    if unbalanced(scores):
        columns["constant answer"] = [percent(score.constant) for score in scores]
    for rule in rules(scores):
        columns[f"answers as {rule} says"] = [shown(score.agreement(rule)) for score in scores]
        theirs = [_published(score, f"as {rule}") if score.agreement(rule) else "–" for score in scores]
        if set(theirs) != {"–"}:
            columns[f"published, as {rule} says"] = theirs
    if len({score.evaluation for score in scores}) > 1:
        columns["evaluation"] = [score.evaluation for score in scores]
    text = (
        f"{_scored(scores)} Chance is one over the number of classes; a constant answer is the most frequent class. "
        f"{_orientation(scores)}"
    )
    return Section("Results", text, tables=[Table(list(columns), list(zip(*columns.values(), strict=True)))])


def _scored(scores: Sequence[Score]) -> str:
    held_out = [score for score in scores if score.held_out]
    images = max((row["n"] for score in held_out for row in score.rows), default=0)
    said = f"{_count(len(held_out), 'model')} on {images:,} held-out images with their true labels."
    if other := len(scores) - len(held_out):
        verb = "is" if other == 1 else "are"
        said += f" {_count(other, 'line')} {verb} of other images, changed or trained on: see what each is scored on."
    return said


def _orientation(scores: Sequence[Score]) -> str:
    if any(score.data for score in scores):
        data = "are of the same data, where there are any, of other networks where they say so"
    else:
        data = "are of other data, named beside them: for orientation, not for comparison"
    return (
        f"The published figures {data}. Where a figure was made with another setting than ours, it says with which, as "
        "far as that is known here."
    )


def _published(score: Score, under: str = "clean", how: published.Setting = MappingProxyType({})) -> str:
    """Published figures of the same, one per line; the data and settings are named where they are others.

    Args:
        score: ours; of images that are not held out there are no figures.
        under: as figures name what it is scored under.
        how: what that was made with.
    """
    ours = {**published.setting(score.node), **how}
    lines = []
    for figure in published.beside(score.kind, score.data, ours, under) if score.held_out else []:
        data = "" if figure.data == score.data else figure.data
        said = filter(None, (data, figure.network, *figure.differing(ours), figure.source))
        lines.append(f"{figure.percent} % {', '.join(said)}")
    return "\n".join(lines) or "–"


def _made_with(score: Score) -> str:
    """Our network, and what it and its images were made with."""
    recipe = score.node.recipe
    return ", ".join([recipe.arch or f"linear, on {recipe.probe}", *map(str, published.setting(score.node).values())])


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"


def pictures(found: Gathered) -> Section | None:
    """Images of each dataset that was made from another, as many as fit."""
    fitting: list[Gallery] = []
    made = sorted(found.datasets("attack", "invert"), key=lambda dataset: dataset.recipe.model is None)
    for dataset in made:
        if sum(one.size for one in fitting) < IMAGES and (one := gallery(found, dataset)) is not None:
            fitting.append(one)
    if not fitting:
        return None
    left = "" if len(fitting) == len(made) else f" {len(fitting)} of {len(made)} datasets are shown."
    return Section("Look for yourself", f"What a person sees, and what the label says.{left}", galleries=fitting)


# -------------------------------------------------------------------------------------------- leakage

CONTROLS = {
    "": ("headline", "the attacked images under their new labels"),
    "probe": ("linear probe", "a linear model on the features of a robust model"),
    "leakage": ("leakage only", "noise in place of the attack, nothing where the label was right already"),
    "robust-source": ("robust source", "the same attack on a robust model"),
    "top": ("top margins", "the images whose new label the attacked model answers by the largest margin"),
    "bottom": ("bottom margins", "those whose new label it answers by the smallest"),
}
"""Ending of a model's name → what it is called, and what it learned from."""


def leakage(found: Gathered) -> Section | None:
    """For each learner with controls: the headline accuracy beside what each control leaves of it."""
    panels: dict[tuple[str, str], dict[str, Score]] = {}
    for score in found.held_out:
        base, _, control = score.base.rpartition(".")
        if control in CONTROLS and base:
            panels.setdefault((score.evaluation, name_at(base, score.axes)), {})[control] = score
    for score in found.held_out:
        if (score.evaluation, score.model) in panels:
            panels[score.evaluation, score.model][""] = score
    whole = {place: panel for place, panel in panels.items() if "" in panel}
    if not whole:
        return None
    charts = [_panel(number, learner, panel) for number, ((_, learner), panel) in enumerate(whole.items())][:CURVES]
    head = ["learner", "control", "learned from", "clean accuracy", "95 % interval", "published", "network and setting"]
    lines = [
        [learner, *CONTROLS[c], str(s.clean), s.clean.interval, _published(s), _made_with(s)]
        for (_, learner), panel in whole.items()
        for c, s in _in_order(panel)
    ]
    text = (
        "How much of the accuracy is real: each control keeps one way in which labels can leak and shuts the others. "
        "What a control reaches needs no feature that the attack put there."
    )
    return Section("Leakage", text, charts, [Table(head, lines)])


def _in_order(panel: Mapping[str, Score]) -> list[tuple[str, Score]]:
    return [(control, panel[control]) for control in CONTROLS if control in panel]


def _panel(number: int, learner: str, panel: Mapping[str, Score]) -> Chart:
    headline = panel[""]
    said = [f"{learner} answers {headline.clean} of the {headline.split} images right, {headline.beside}."]
    if "leakage" in panel:
        rest = headline.clean.mean - panel["leakage"].clean.mean
        said.append(f"Leakage alone gives {panel['leakage'].clean}, {_points(rest)} less.")
    if "probe" in panel:
        said.append(f"A linear model on robust features gives {panel['probe'].clean}.")
    if "robust-source" in panel:
        said.append(f"With a robust source it is {panel['robust-source'].clean}.")
    if {"top", "bottom"} <= set(panel):
        said.append(f"The top margins give {panel['top'].clean}, the bottom margins {panel['bottom'].clean}.")
    drawn = [
        Bar(CONTROLS[control][0], score.clean.mean, score.clean.low, score.clean.high, int(control != ""))
        for control, score in _in_order(panel)
    ]
    text = " ".join(said)
    return Chart(charts.bars(f"leakage{number}", text, drawn, "clean accuracy", headline.level), text)


def _points(share: float) -> str:
    return f"{100 * share:.1f} points"


# --------------------------------------------------------------------------------------------- sweeps


def sweeps(found: Gathered) -> Section | None:
    """Clean accuracy along every axis of a sweep that has numbers, with the attack success rate beside it."""
    curves: dict[tuple[str, str, str], dict[str, list[tuple[float, Score]]]] = {}
    for score in found.held_out:
        for axis, value in score.axes.items():
            if (place := _number(value)) is not None:
                rest = ", ".join(f"{a} {v}" for a, v in score.axes.items() if a != axis)
                key = (split_name(score.evaluation)[0], score.base, axis)
                curves.setdefault(key, {}).setdefault(rest, []).append((place, score))
    drawn = {key: lines for key, lines in curves.items() if max(map(len, lines.values())) > 1}
    if not drawn:
        return None
    charts = [_sweep(number, model, axis, lines) for number, ((_, model, axis), lines) in enumerate(drawn.items())]
    seeds = max(score.clean.seeds for score in found.held_out)
    spreads = f" Vertical lines are a standard deviation over {seeds} seeds." if seeds > 1 else ""
    left = f" {CURVES} of {len(charts)} curves are drawn." if len(charts) > CURVES else ""
    text = f"Solid: clean accuracy of the learner. Dashed: attack success rate on its training images.{spreads}{left}"
    return Section("Sweeps", text, charts[:CURVES])


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def _sweep(number: int, model: str, axis: str, drawn: Mapping[str, list[tuple[float, Score]]]) -> Chart:
    lines, said = [], []
    for colour, (rest, unsorted) in enumerate(list(drawn.items())[:COLOURS]):
        points = sorted(unsorted, key=lambda point: point[0])
        xs, clean = [x for x, _ in points], [score.clean for _, score in points]
        ends = ([c.low for c in clean], [c.high for c in clean])
        lines.append(Line(rest or model, xs, [c.mean for c in clean], *ends, colour=colour))
        success = [(x, r.mean) for x, score in points if (r := score.attack_success_rate) is not None]
        lines.append(Line("", [x for x, _ in success], [r for _, r in success], dashed=True, colour=colour))
        best = max(range(len(xs)), key=lambda i: clean[i].mean)
        said.append(
            f"{model}{f' with {rest}' if rest else ''}: {clean[0]} at {axis} {xs[0]:g}, {clean[-1]} at {xs[-1]:g}, "
            f"highest {clean[best]} at {xs[best]:g}"
        )
        if success:
            said[-1] += f"; attack success {percent(success[0][1])} and {percent(success[-1][1])}"
    first = next(iter(drawn.values()))
    values = [x for x, _ in first]
    log = min(values) > 0 and max(values) / min(values) >= 20
    text = f"{'. '.join(said)}."
    level = first[0][1].level
    label = f"{axis}, {PIXELS}" if axis.rpartition(".")[2] in ("eps", "step_size") else axis
    return Chart(charts.lines(f"sweep{number}", text, lines, label, "share", log, level), text)


# ------------------------------------------------------------------------------------ while it went on


def target_rate(found: Gathered) -> Section | None:
    """Attack success rate by step of the attack."""
    manifests = {without_seed(node.name): found.manifests[node.id] for node in found.datasets("attack")}
    rates = {name: manifest["success_by_step"] for name, manifest in manifests.items() if "success_by_step" in manifest}
    if not rates:
        return None
    drawn = list(rates.items())[:COLOURS]
    lines = [Line(name, range(len(rate)), rate, colour=number) for number, (name, rate) in enumerate(drawn)]
    said = [
        f"{name}: {percent(rate[0])} before the first step, half by {_half(rate)}, {percent(rate[-1])} by step "
        f"{len(rate) - 1}"
        for name, rate in drawn
    ]
    left = f" {COLOURS} of {len(rates)} datasets are shown." if len(rates) > COLOURS else ""
    text = f"{'. '.join(said)}."
    chart = Chart(charts.lines("target", text, lines, "step of the attack", "attack success"), text)
    about = f"The share of images that the attacked model answered as their target, step by step.{left}"
    return Section("Attack success rate", about, [chart])


def _half(rate: Sequence[float]) -> str:
    step = next((step for step, share in enumerate(rate) if share >= 0.5), None)
    return "none of them" if step is None else f"step {step}"


def learning(found: Gathered) -> Section | None:
    """Learning curves: on the labels trained on, and on clean test images."""
    curves = [(node, lines) for node in found.models() if len(lines := found.metrics.get(node.id, [])) > 1]
    curves.sort(key=lambda curve: ("@" in curve[0].name, published.kind(curve[0]) not in published.LEARNED_FROM))
    if not curves:
        return None
    charts = [_learning(number, *curve) for number, curve in enumerate(curves[:CURVES])]
    text = "Accuracy on the labels that a model is trained on, epoch by epoch; the last epoch is the model."
    if any("test_accuracy" in epoch for _, epochs in curves for epoch in epochs):
        text += " Dashed: on clean test images with their true labels, which played no part in the training."
    if len(curves) > CURVES:
        text += f" {CURVES} of {len(curves)} models are shown."
    return Section("Learning curves", text, charts)


def _learning(number: int, model: Node, metrics: Sequence[Row]) -> Chart:
    name = without_seed(model.name)
    wrong = " (made by a rule, whatever the image shows)" if model.inputs["on"].relabel is not None else ""
    text = f"{name}: after {len(metrics)} epochs {percent(metrics[-1]['accuracy'])} on its training labels{wrong}"
    drawn = [Line("labels trained on", [m["epoch"] for m in metrics], [m["accuracy"] for m in metrics])]
    tested = [(m["epoch"], m["test_accuracy"]) for m in metrics if m.get("test_accuracy") is not None]
    if tested:
        epochs, shares = [e for e, _ in tested], [share for _, share in tested]
        best = max(shares)
        at = epochs[shares.index(best)]
        text += f", {percent(shares[-1])} on clean test images; at most {percent(best)}, after epoch {at}"
        drawn.append(Line("clean test images", epochs, shares, dashed=True, colour=1))
    text += "."
    return Chart(charts.lines(f"learning{number}", text, drawn, "epoch", "accuracy"), text)


# ---------------------------------------------------------------------------------------- robustness


def robustness(found: Gathered) -> Section | None:
    """Worst case beside average case of every attack that is not carried over from another model."""
    pairs = attacked(found.scores)
    if not pairs:
        return None
    columns = {
        "model": [score.model for score, _ in pairs],
        **scored_on([score for score, _ in pairs]),
        "under": [attack.name for _, attack in pairs],
        "average case": [shown(attack.average) for _, attack in pairs],
        "worst case": [str(attack.worst) for _, attack in pairs],
        "95 % interval": [attack.worst.interval for _, attack in pairs],
        "published worst case": [_published(score, *published.under(attack.asked)) for score, attack in pairs],
    }
    if any(attack.asked["attack"] == "spatial" for _, attack in pairs):
        columns["published average case"] = [_published(s, published.on_average(a.asked)) for s, a in pairs]
    columns["clean"] = [str(score.clean) for score, _ in pairs]
    columns["fooled"] = [shown(attack.share("fooled")) for _, attack in pairs]
    if any(attack.target_rule for _, attack in pairs):
        columns["attack success"] = [shown(attack.share("success_rate")) for _, attack in pairs]
    held_out = [(score, attack) for score, attack in pairs if score.held_out]
    text = (
        f"Average case: {NOISE}, or all rotations and shifts that were tried. Worst case: the attack. {_gap(held_out)} "
        "Fooled: of the images that the model answers right, those that it no longer does under attack."
    )
    table = Table(list(columns), list(zip(*columns.values(), strict=True)))
    return Section("Robustness", text, _robustness_curves(held_out), [table])


Attacked = Sequence[tuple[Score, Attack]]


def _gap(pairs: Attacked) -> str:
    gaps = [(gap.mean, score, attack) for score, attack in pairs if not attack.target_rule and (gap := attack.gap)]
    if not gaps:
        return ""
    widest, score, attack = max(gaps, key=lambda found: found[0])
    return (
        f"The gap is widest for {score.model} under {attack.name}: {shown(attack.average)} on average, {attack.worst} "
        f"at worst, {_points(widest)}."
    )


def _robustness_curves(pairs: Attacked) -> list[Chart]:
    """A chart per kind of ball: accuracy of each model against the radius."""
    kinds: dict[tuple[str, str], dict[tuple[str, Spread], list[tuple[Score, Attack]]]] = {}
    for score, attack in pairs:
        if attack.asked["attack"] != "spatial" and not attack.target_rule:
            models = kinds.setdefault((attack.asked["attack"], attack.asked["norm"]), {})
            models.setdefault((score.model, score.clean), []).append((score, attack))
    return [_curve(number, *kind, list(models.values())) for number, (kind, models) in enumerate(kinds.items())]


def _curve(number: int, attack: str, norm: str, models: Sequence[Attacked]) -> Chart:
    lines, said = [], []
    for colour, pairs in enumerate(models[:COLOURS]):
        score = pairs[0][0]
        radii = {0.0: (score.clean, score.clean)}
        for _, made in pairs:
            eps = made.asked["eps"]
            if eps not in radii or made.worst.mean < radii[eps][0].mean:
                radii[eps] = (made.worst, made.average or made.worst)
        xs = sorted(radii)
        worst_case, average_case = [radii[x][0] for x in xs], [radii[x][1] for x in xs]
        ends = ([w.low for w in worst_case], [w.high for w in worst_case])
        lines.append(Line(score.model, xs, [w.mean for w in worst_case], *ends, colour=colour))
        lines.append(Line("", xs, [a.mean for a in average_case], dashed=True, colour=colour))
        said.append(f"{score.model} {worst_case[-1]}")
    largest = max(made.asked["eps"] for pairs in models for _, made in pairs)
    left = f"; {COLOURS} of {len(models)} models are drawn" if len(models) > COLOURS else ""
    text = (
        f"{attack.upper()}, {NORMS[norm]}: solid the worst case, dashed the average case. At the largest radius, "
        f"{largest:g}: {', '.join(said)}{left}."
    )
    return Chart(charts.lines(f"robustness{number}", text, lines, f"{NORMS[norm]} radius, {PIXELS}", "accuracy"), text)


# ------------------------------------------------------------------------------------------ transfer


def transfer(found: Gathered) -> Section | None:
    """Attacks made on one model and shown to others: a matrix for each, and the paper's figure 3."""
    matrices = transfers(found.scores)
    if not matrices:
        return None
    left = f" {CURVES} of {len(matrices)} tables are shown." if len(matrices) > CURVES else ""
    text = (
        "Attacks made on the model of a column and shown to the model of a row. Fooled: of the images that it "
        "answered right, those that it no longer does. Attack success: of the images whose target is not their true "
        f"class, those that it answers as their target.{left}"
    )
    tables = [Table(*matrix.table(), matrix.title[0].upper() + matrix.title[1:]) for matrix in matrices[:CURVES]]
    return Section("Transfer", text, _against_transferability(found), tables)


def _against_transferability(found: Gathered) -> list[Chart]:
    """For a dataset that several architectures learned from: accuracy against how well its source transfers to each."""
    learners: dict[str, dict[str, tuple[float, float]]] = {}
    for score in found.held_out:
        if score.kind in published.LEARNED_FROM and score.node.recipe.arch is not None:
            made, arch = score.node.inputs["on"], score.node.recipe.arch
            if (rate := _fooled(found, made.inputs["model"], made.inputs["images"], arch)) is not None:
                learners.setdefault(without_seed(made.name), {})[arch] = (rate, score.clean.mean)
    several = [(name, points) for name, points in learners.items() if len(points) > 1]
    return [_transferability(number, *found) for number, found in enumerate(several[:CURVES])]


def _transferability(number: int, dataset: str, points: Mapping[str, tuple[float, float]]) -> Chart:
    low, high = (pick(points, key=lambda arch: points[arch][0]) for pick in (min, max))
    text = (
        f"Learners from {dataset}. Attacks on its source transfer least to {low}, {percent(points[low][0])}, which "
        f"answers {percent(points[low][1])} right; most to {high}, {percent(points[high][0])}, which answers "
        f"{percent(points[high][1])} right. The paper's learners, from D_det of CIFAR-10, stand beside them."
    )
    groups = {
        "learners of this run": list(points.values()),
        "the paper, CIFAR-10": [(rate / 100, accuracy / 100) for rate, accuracy in published.TRANSFER.values()],
    }
    labels = ("fooled by an attack on the source", "clean accuracy of the learner")
    chart = charts.scatter(f"transfer{number}", text, groups, *labels, shares=True, names=list(points))
    return Chart(chart, text)


def _fooled(found: Gathered, source: Node, clean: Node, arch: str) -> float | None:
    """How much an untargeted attack on a model fools another of some architecture that was trained on clean images."""
    scores = (score for score in found.held_out if score.kind == "D" and score.node.recipe.arch == arch)
    cells = [(without_seed(source.name), s.model) for s in scores if s.node.inputs["on"].id == clean.id]
    untargeted = [matrix.cells for matrix in transfers(found.held_out) if matrix.target_rule is None]
    shares = (shares[cell] for shares in untargeted for cell in cells if cell in shares)
    return next((share.mean for share in shares if share is not None), None)


# ------------------------------------------------------------------------------------------ features


def features(found: Gathered) -> Section | None:
    """Usefulness against robust usefulness of each penultimate feature; of several seeds the first is drawn."""
    if not found.usefulness:
        return None
    charts = [_features(number, same) for number, same in enumerate(found.usefulness[:CURVES])]
    text = (
        "Each point is a feature of the penultimate layer for one class against the rest: to the right how useful it "
        "is, ρ, upwards how useful it stays under the worst perturbation, γ. A rare class allows less than a common "
        "one, so each class has its own ρ from which on a feature is useful: the vertical lines, or the one, are the "
        "least and the greatest of these. Of what is useful, what lies above the horizontal line, γ = 0, is robust, "
        "and the rest is not."
    )
    return Section("Features", text, charts)


def _features(number: int, same: Sequence[Row]) -> Chart:
    row, shares = same[0], feature_shares(same)
    step = math.ceil(len(row["points"]) / POINTS) or 1
    part = f" One in {step} is drawn." if step > 1 else ""
    text = (
        f"{without_seed(row['model'])}, {ball(row)}, ρ on {row['n']:,} images, of which {row['attacked']:,} were "
        f"attacked for γ: of {sum(row['counts'].values()):,} pairs of a feature and a "
        f"class {shown(shares['robust'])} are useful and robust, {shown(shares['non_robust'])} useful and not robust, "
        f"{shown(shares['useless'])} useless.{part}"
    )
    groups: dict[str, list[tuple[float, float]]] = {"useful and robust": [], "useful, not robust": [], "useless": []}
    for _, k, rho, gamma in row["points"][::step]:
        least = row["useful_from"][k]
        kind = "useless" if rho < least else "useful and robust" if gamma > 0 else "useful, not robust"
        groups[kind].append((rho, gamma))
    known = [least for least in row["useful_from"] if least is not None]  # of classes that have images
    ends = sorted({min(known), max(known)})
    labels = ("usefulness ρ", "under attack γ")
    return Chart(charts.scatter(f"features{number}", text, groups, *labels, vertical=ends, horizontal=[0.0]), text)


# ------------------------------------------------------------------------------- how it came about


def nodes(found: Gathered) -> Section:
    """The graph of the run, and each node with its version, time and speed."""
    progress = found.run["nodes"]
    lines = [
        [
            node.id,
            node.stage,
            ", ".join(dict.fromkeys(parent.name for parent in node.inputs.values())) or "–",
            progress[node.id]["version"],
            _state(found, node.id),
            seconds(progress[node.id]["seconds"]),
            _rate(found, node.id),
        ]
        for node in found.nodes.values()
    ]
    made = [one["seconds"] for one in progress.values() if one["seconds"]]
    text = f"{_count(len(lines), 'node')}; those that this run made, {len(made)}, took {seconds(sum(made))} together."
    boxes = _boxes(found)
    if len(boxes) > BOXES:
        text += f" The graph is not drawn: of its {len(boxes)} boxes no more than {BOXES} can be read."
    head = ["node", "made by", "from", "version", "state", "time", "images/s"]
    drawing = _drawing(found, boxes) if len(boxes) <= BOXES else None
    return Section("How it was made", text, tables=[Table(head, lines)], drawing=drawing)


def _state(found: Gathered, node: str) -> str:
    progress = found.run["nodes"][node]
    if progress["state"] == "cached":
        return (
            f"made before, {found.manifests[node]['made'][:16].replace('T', ' ')}"
            if node in found.manifests
            else "made before"
        )
    return f"{progress['state']}: {progress['why']}" if progress["why"] else str(progress["state"])


def _rate(found: Gathered, node: str) -> str:
    progress = found.run["nodes"][node]
    if progress["images"] and progress["seconds"]:
        return f"{progress['images'] / progress['seconds']:,.0f}"
    rates = [epoch["images_per_second"] for epoch in found.metrics.get(node, []) if "images_per_second" in epoch]
    return f"{mean(rates):,.0f}" if rates else "–"


def seconds(time: float | None) -> str:
    """A span of time, as a person reads it."""
    if time is None:
        return "–"
    if time < 100:
        return f"{time:.1f} s"
    minutes = round(time / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


ORDER = ("failed", "interrupted", "running", "waiting", "done", "cached")
"""States, the first of which a box of several nodes has."""


def _boxes(found: Gathered) -> dict[str, list[Node]]:
    """Nodes that differ in their place in a sweep are one box."""
    boxes: dict[str, list[Node]] = {}
    for node in found.nodes.values():
        boxes.setdefault(split_name(node.id)[0], []).append(node)
    return boxes


def _drawing(found: Gathered, boxes: Mapping[str, Sequence[Node]]) -> Drawing:
    wanted, needs = {}, {}
    for key, same in boxes.items():
        state = min((found.state(node.id) for node in same), key=ORDER.index)
        spent = sum(found.run["nodes"][node.id]["seconds"] or 0 for node in same)
        detail = f"{same[0].stage}, {seconds(spent) if spent else state}"
        wanted[key] = (key.partition("/")[2] + (f" × {len(same)}" if len(same) > 1 else ""), detail, state)
        needs[key] = list(dict.fromkeys(split_name(p.id)[0] for node in same for p in node.inputs.values()))
    return charts.graph(wanted, needs)


def environment(found: Gathered) -> Section:
    """What computed it, and the experiment that was asked for."""
    run = found.run
    started, took = datetime.fromisoformat(run["started"]), ""
    if run.get("ended"):
        took = f" and took {seconds((datetime.fromisoformat(run['ended']) - started).total_seconds())}"
    text = f"Run {run['run']} began on {started:%d %B %Y at %H:%M} UTC{took}."
    lines = [[name, str(version)] for name, version in run["environment"].items()]
    source = yaml.safe_dump(run["experiment"], sort_keys=False, allow_unicode=True)
    return Section("Environment", text, tables=[Table(["what", "version"], lines)], source=_bounded(source))


def _bounded(text: str, most: int = 60_000) -> str:
    return text if len(text) <= most else f"{text[:most]}\n… (the whole of it is in run.json)"
