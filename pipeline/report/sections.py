"""The sections of a run's page: each a sentence computed from the results, with its charts, tables and images."""

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from statistics import mean
from types import MappingProxyType

import yaml

from pipeline.experiment import spec
from pipeline.experiment.graph import Node
from pipeline.experiment.sweeps import name_at, split_name
from pipeline.report import charts, published, verdict
from pipeline.report.charts import COLOURS, Bar, Drawing, Line
from pipeline.report.gallery import Gallery, gallery
from pipeline.report.parts import Chart, Section, Table, command
from pipeline.report.per_class import per_class
from pipeline.report.results import RunResults, Score
from pipeline.report.scores import (
    NOISE,
    SUCCESS,
    SUCCESS_RATE,
    AttackResult,
    Cell,
    Columns,
    OverSeeds,
    Row,
    accuracy_head,
    agreement_head,
    attack_columns,
    attacked,
    ball,
    feature_shares,
    merged,
    norm_name,
    percent,
    result_columns,
    rules,
    shown,
    transfers,
    without_seed,
)
from pipeline.run.jobs import JOBS, DatasetJob
from pipeline.run.runs import in_words
from pipeline.terminal import duration

CURVES = 6
"""Charts in a section, at most."""

IMAGES = 2_000_000
"""Bytes of images in a page, at most."""

POINTS = 800
"""Points in a scatter plot, at most."""

BOXES = 80
"""Boxes in a drawn graph; a larger graph is only listed."""

PIXELS = "pixel units of [0, 1]"
"""The unit of radii and steps."""


def _table(columns: Columns, fold: str = "", note: str = "", stacks: bool = False) -> Table:
    return Table(list(columns), list(zip(*columns.values(), strict=True)), fold=fold, note=note, stacks=stacks)


def sections(run: RunResults) -> list[Section]:
    """All sections that have something to show, in order."""
    parts: list[Callable[[RunResults], Section | None]] = [
        results,
        pictures,
        per_class,
        leakage,
        sweeps,
        success_rate,
        learning,
        robustness,
        transfer,
        features,
        nodes,
        environment,
    ]
    return [section for part in parts if (section := part(run)) is not None]


# -------------------------------------------------------------------------------------------- results


def results(run: RunResults) -> Section | None:
    """Accuracy of every model with its interval and baselines; folded, the published figures and the settings."""
    if not run.scores:
        return None
    scores = sorted(merged(run.scores), key=lambda score: bool(score.axes))
    columns = result_columns(scores)
    first = ("learner", accuracy_head(scores), "95 % interval", "scored on", "trained on", SUCCESS)
    lead = {name: columns.pop(name) for name in first if name in columns}
    if set(lead.get(SUCCESS, "–")) == {"–"}:
        lead.pop(SUCCESS, None)
    asked_by = {"evaluation": columns.pop("evaluation")} if "evaluation" in columns else {}
    if len(set(columns["chance"])) == 1:
        del columns["chance"]
    more: Columns = {
        "learner": lead["learner"],
        "published": [_published(score) for score in scores],
        **_published_agreement(scores),
        "training set": [score.kind or "–" for score in scores],
        "network and setting": [_made_with(score) for score in scores],
    }
    text = (
        f"{_scored(scores)} Chance, one over the number of classes, is "
        f"{' or '.join(dict.fromkeys(percent(score.chance) for score in scores))}."
    )
    if "constant prediction" in columns:
        text += " The constant prediction is always the most frequent class."
    if any((score.kind or "").endswith(", leakage only") for score in scores):
        text += (
            " Where a control has no attack, attack success is the share of images that the source model takes for "
            "their label without one."
        )
    folded = _table(more | asked_by, "Published figures, networks and settings", _orientation(scores))
    return Section("Results", text, tables=[_table(lead | columns, stacks=True), folded])


def _published_agreement(scores: Sequence[Score]) -> Columns:
    """Published figures of models scored against the labels of a rule: a column for each rule that has any."""
    columns: Columns = {}
    for rule in rules(scores):
        figures = [_published(score, f"as {rule}") if score.agreement(rule) else "–" for score in scores]
        if set(figures) != {"–"}:
            columns[f"published, {agreement_head(rule)}"] = figures
    return columns


def _scored(scores: Sequence[Score]) -> str:
    held_out = [score for score in scores if score.held_out]
    models, counts = {score.model for score in held_out}, {row["n"] for score in held_out for row in score.rows}
    images = " to ".join(f"{n:,}" for n in sorted({min(counts, default=0), max(counts, default=0)}))
    text = f"{_count(len(models), 'model')} scored on {images} held-out images with their true labels."
    if other := len(scores) - len(held_out):
        verb = "is" if other == 1 else "are"
        text += f" {_count(other, 'line')} {verb} of modified images or of a training split: see “scored on”."
    return text


def _orientation(scores: Sequence[Score]) -> str:
    if any(score.data for score in scores):
        data = "of the same data, where there are any, and name the network where it differs"
    else:
        data = "of other data, named in each row: a guide, not a comparison"
    return f"The published figures are {data}. Settings that differ from ours are listed, as far as they are known."


def _published(score: Score, under: str = "clean", how: published.Setting = MappingProxyType({})) -> str:
    """Published figures of the same training set, one per line, with the data and settings that differ.

    Args:
        score: ours. Only held-out images have published figures.
        under: how the model is scored, as in `published.Figure.under`.
        how: the conditions of that scoring.
    """
    ours = {**published.setting(score.node), **how}
    lines = []
    for figure in published.beside(score.kind, score.data, ours, under) if score.held_out else []:
        data = "" if figure.data == score.data else figure.data
        parts = filter(None, (data, figure.network, *figure.differing(ours), figure.source))
        lines.append(f"{figure.percent} % {', '.join(parts)}")
    return "\n".join(lines) or "–"


def _made_with(score: Score) -> str:
    """Our network, and the conditions of its training and of its images."""
    node = score.node
    network = f"linear, on {node.inputs['probe'].name}" if "probe" in node.inputs else node.arch or node.stage
    return ", ".join([network, *map(str, published.setting(node).values())])


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"


def copies(dataset: Node) -> bool:
    """Whether the images of a dataset are unchanged copies."""
    job = JOBS[dataset.stage]
    return issubclass(job, DatasetJob) and job.copies


def pictures(run: RunResults) -> Section | None:
    """Images of each dataset that was made from another's images, as many as fit; that of the verdict first."""
    fitting: list[Gallery] = []
    top = verdict.headline(run.held_out)
    first = top.trained_on if top is not None else ""
    made = [dataset for dataset in run.datasets() if "images" in dataset.inputs and not copies(dataset)]
    made.sort(key=lambda dataset: (without_seed(dataset.name) != first, "model" not in dataset.inputs))
    for dataset in made:
        if sum(one.size for one in fitting) < IMAGES and (one := gallery(run, dataset)) is not None:
            fitting.append(one)
    if not fitting:
        return None
    left = "" if len(fitting) == len(made) else f" {len(fitting)} of {len(made)} datasets are shown."
    return Section("Look for yourself", f"The images and their labels, for a person to check.{left}", galleries=fitting)


# -------------------------------------------------------------------------------------------- leakage

CONTROLS = {
    "": ("the learner itself", "the adversarial images under their new labels"),
    "probe": ("linear probe", "a linear layer on the features of a robust model"),
    "leakage": ("leakage only", "noise in place of the attack; no change where the label was right already"),
    "robust-source": ("robust source", "the same attack on a robust source model"),
    "top": (
        "top margins",
        "the images with the largest margins of the new label in the source model, true random labels among them",
    ),
    "bottom": ("bottom margins", "those with the smallest margins of the new label"),
}
"""Suffix of a model's name → name of the control, and what the model learned from."""


def leakage(run: RunResults) -> Section | None:
    """For each learner with controls: its accuracy beside that of each control."""
    panels: dict[tuple[str, str], dict[str, Score]] = {}
    for score in run.held_out:
        base, _, control = score.base.rpartition(".")
        if control in CONTROLS and base:
            panels.setdefault((score.evaluation, name_at(base, score.axes)), {})[control] = score
    for score in run.held_out:
        if (score.evaluation, score.model) in panels:
            panels[score.evaluation, score.model][""] = score
    whole = {place: panel for place, panel in panels.items() if "" in panel}
    if not whole:
        return None
    panel_of = [_panel(run, number, learner, panel) for number, ((_, learner), panel) in enumerate(whole.items())]
    places = [(learner, c, s) for (_, learner), panel in whole.items() for c, s in _in_order(panel)]
    head = ["learner", "control", "learned from", "clean accuracy", "95 % interval"]
    lines = [[learner, *CONTROLS[c], str(s.clean), s.clean.interval] for learner, c, s in places]
    more = [[learner, CONTROLS[c][0], _published(s), _made_with(s)] for learner, c, s in places]
    folded = Table(["learner", "control", "published", "network and setting"], more, fold="Published figures, settings")
    text = (
        "What else could explain the accuracy of a learner? Each control has one other explanation and lacks the "
        "attack on the source model. A control that is as accurate as its learner explains it."
    )
    return Section("Leakage", text, panel_of[:CURVES], [Table(head, lines, stacks=True), folded])


def _in_order(panel: Mapping[str, Score]) -> list[tuple[str, Score]]:
    return [(control, panel[control]) for control in CONTROLS if control in panel]


def _panel(run: RunResults, number: int, learner: str, panel: Mapping[str, Score]) -> Chart:
    headline = panel[""]
    sentences = [f"{learner} classifies {headline.clean} of the {headline.split} images correctly, {headline.beside}."]
    if "leakage" in panel:
        rest = headline.clean.mean - panel["leakage"].clean.mean
        than = "less" if rest >= 0 else "more"
        sentences.append(f"Leakage alone gives {panel['leakage'].clean}, {_points(abs(rest))} {than}.")
    if "probe" in panel:
        sentences.append(f"A linear probe on robust features gives {panel['probe'].clean}.")
    if "robust-source" in panel:
        sentences.append(f"A robust source model gives {panel['robust-source'].clean}.")
    if {"top", "bottom"} <= set(panel):
        sentences.append(f"The top margins give {panel['top'].clean}, the bottom margins {panel['bottom'].clean}.")
    bars = [
        Bar(CONTROLS[control][0], score.clean.mean, score.clean.low, score.clean.high, int(control != ""))
        for control, score in _in_order(panel)
    ]
    text, drawn = " ".join(sentences), (bars, "clean accuracy", headline.level)
    return _chart(
        run, f"leakage-{learner}", charts.bars(f"leakage{number}", text, *drawn), text, charts.bar_data(*drawn)
    )


def _chart(run: RunResults, name: str, svg: str, text: str, data: Sequence[Sequence[object]], title: str = "") -> Chart:
    return Chart(svg, text, name, data, command(run), title)


def _points(share: float) -> str:
    return f"{100 * share:.1f} points"


# --------------------------------------------------------------------------------------------- sweeps


def sweeps(run: RunResults) -> Section | None:
    """Clean accuracy along every numeric axis of a sweep, beside the attack success rate."""
    curves: dict[tuple[str, str, str], dict[str, list[tuple[float, Score]]]] = {}
    for score in run.held_out:
        for axis, value in score.axes.items():
            if (place := _number(value)) is not None:
                rest = ", ".join(f"{a} {v}" for a, v in score.axes.items() if a != axis)
                key = (split_name(score.evaluation)[0], score.base, axis)
                curves.setdefault(key, {}).setdefault(rest, []).append((place, score))
    several = {key: lines for key, lines in curves.items() if max(map(len, lines.values())) > 1}
    if not several:
        return None
    charts = [_sweep(run, number, *key[1:], lines) for number, (key, lines) in enumerate(several.items())]
    seeds = max(score.clean.seeds for score in run.held_out)
    bars = f" Error bars are one standard deviation over {seeds} seeds." if seeds > 1 else ""
    left = f" {CURVES} of {len(charts)} curves are shown." if len(charts) > CURVES else ""
    text = f"Solid: clean accuracy of the learner. Dashed: {SUCCESS_RATE} of its training images.{bars}{left}"
    return Section("Sweeps", text, charts[:CURVES])


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def _sweep(
    run: RunResults, number: int, model: str, axis: str, curves: Mapping[str, list[tuple[float, Score]]]
) -> Chart:
    lines, sentences = [], []
    for colour, (rest, unsorted) in enumerate(list(curves.items())[:COLOURS]):
        points = sorted(unsorted, key=lambda point: point[0])
        xs, clean = [x for x, _ in points], [score.clean for _, score in points]
        ends = ([c.low for c in clean], [c.high for c in clean])
        lines.append(Line(rest or model, xs, [c.mean for c in clean], *ends, colour=colour))
        success = [(x, s.mean) for x, score in points if (s := score.success) is not None]
        lines.append(Line("", [x for x, _ in success], [s for _, s in success], dashed=True, colour=colour))
        best = max(range(len(xs)), key=lambda i: clean[i].mean)
        sentence = (
            f"{model}{f' with {rest}' if rest else ''}: {clean[0]} at {axis} {xs[0]:g}, {clean[-1]} at {xs[-1]:g}, "
            f"highest {clean[best]} at {xs[best]:g}"
        )
        if success:
            sentence += f"; {SUCCESS_RATE} {percent(success[0][1])} and {percent(success[-1][1])}"
        sentences.append(f"{sentence}.")
    first = next(iter(curves.values()))
    values = [x for x, _ in first]
    log = min(values) > 0 and max(values) / min(values) >= 20
    text = " ".join(sentences)
    label = f"{axis}, {PIXELS}" if axis.rpartition(".")[2] in ("eps", "step_size") else axis
    svg = charts.lines(f"sweep{number}", text, lines, label, "share", log, first[0][1].level)
    return _chart(run, f"sweep-{model}-{axis}", svg, text, charts.line_data(lines, label, "share"))


# ------------------------------------------------------------------------------------ step by step


def success_rate(run: RunResults) -> Section | None:
    """Attack success rate of each dataset, step by step."""
    manifests = {without_seed(node.name): run.manifests[node.id] for node in run.datasets()}
    rates = {name: manifest["success_by_step"] for name, manifest in manifests.items() if "success_by_step" in manifest}
    if not rates:
        return None
    first = list(rates.items())[:COLOURS]
    lines = [Line(name, range(len(rate)), rate, colour=number) for number, (name, rate) in enumerate(first)]
    sentences = [
        f"{name}: {percent(rate[0])} before the first step, {_half(rate)}, {percent(rate[-1])} by step {len(rate) - 1}."
        for name, rate in first
    ]
    left = f" {COLOURS} of {len(rates)} datasets are shown." if len(rates) > COLOURS else ""
    text = " ".join(sentences)
    drawn = (lines, "step of the attack", SUCCESS_RATE)
    chart = _chart(run, "attack-success", charts.lines("success", text, *drawn), text, charts.line_data(*drawn))
    about = (
        "Share of the images that the source model classifies as their target class, step by step, before the pixels "
        f"are rounded to 8 bits.{left}"
    )
    return Section("Attack success rate", about, [chart])


def _half(rate: Sequence[float]) -> str:
    step = next((step for step, share in enumerate(rate) if share >= 0.5), None)
    return "never half" if step is None else f"half by step {step}"


def learning(run: RunResults) -> Section | None:
    """Learning curves: on the training labels, and on clean test images."""
    curves = [(node, lines) for node in run.models() if len(lines := run.metrics.get(node.id, [])) > 1]
    curves.sort(key=lambda curve: ("@" in curve[0].name, published.kind(curve[0]) not in published.LEARNED_FROM))
    if not curves:
        return None
    charts = [_learning(run, number, *curve) for number, curve in enumerate(curves[:CURVES])]
    of = " The first seed's." if max((score.clean.seeds for score in run.scores), default=1) > 1 else ""
    text = f"Solid: accuracy on the training labels, epoch by epoch.{of} The model is that of the last epoch."
    if any("test_accuracy" in epoch for _, epochs in curves for epoch in epochs):
        text += " Dashed: accuracy on clean test images with their true labels, which the training does not use."
    if len(curves) > CURVES:
        text += f" {CURVES} of {len(curves)} models are shown."
    return Section("Learning curves", text, charts)


def _learning(run: RunResults, number: int, model: Node, metrics: Sequence[Row]) -> Chart:
    name = without_seed(model.name)
    relabelled = "on" in model.inputs and model.inputs["on"].relabel is not None
    wrong = " (the new ones, not the true ones)" if relabelled else ""
    text = f"After {len(metrics)} epochs {percent(metrics[-1]['accuracy'])} on its training labels{wrong}"
    lines = [Line("training labels", [m["epoch"] for m in metrics], [m["accuracy"] for m in metrics])]
    tested = [(m["epoch"], m["test_accuracy"]) for m in metrics if m.get("test_accuracy") is not None]
    if tested:
        epochs, shares = [e for e, _ in tested], [share for _, share in tested]
        best = max(shares)
        at = epochs[shares.index(best)]
        text += f", {percent(shares[-1])} on clean test images; the highest is {percent(best)}, after epoch {at}"
        lines.append(Line("clean test images", epochs, shares, dashed=True, colour=1))
    text += "."
    drawn = (lines, "epoch", "accuracy")
    svg = charts.lines(f"learning{number}", f"{name}. {text}", *drawn)
    return _chart(run, f"learning-{name}", svg, text, charts.line_data(*drawn), name)


# ---------------------------------------------------------------------------------------- robustness

Attacked = Sequence[tuple[Score, AttackResult]]


def robustness(run: RunResults) -> Section | None:
    """Worst case beside average case of every attack on the model itself."""
    pairs = attacked(run.scores)
    if not pairs:
        return None
    held_out = [(score, attack) for score, attack in pairs if score.held_out]
    text = (
        f"Average case: {NOISE}, or all rotations and shifts tried. Worst case: robust accuracy, under the attack. "
        f"{_gap(held_out)} Fooling rate: the share of the correctly classified images that the model misclassifies "
        "under attack."
    )
    return Section("Robustness", text, _robustness_curves(run, held_out), [_table(_robustness_columns(pairs))])


def _robustness_columns(pairs: Attacked) -> Columns:
    columns = attack_columns(pairs)
    del columns["gap"]
    last = {SUCCESS: columns.pop(SUCCESS)} if SUCCESS in columns else {}
    columns["95 % interval"] = [attack.worst.interval for _, attack in pairs]
    columns["published worst case"] = [_published(s, *published.under(a.settings)) for s, a in pairs]
    if any(attack.spatial for _, attack in pairs):
        columns["published average case"] = [_published(s, published.on_average(a.settings)) for s, a in pairs]
    columns["clean"] = [str(score.clean) for score, _ in pairs]
    columns["fooling rate"] = [shown(attack.share("fooled")) for _, attack in pairs]
    return columns | last


def _gap(pairs: Attacked) -> str:
    gaps = [(gap.mean, score, attack) for score, attack in pairs if not attack.target_rule and (gap := attack.gap)]
    if not gaps:
        return ""
    widest, score, attack = max(gaps, key=lambda gap: gap[0])
    return (
        f"The gap is widest for {score.model} under {attack.name}: {shown(attack.average)} on average, {attack.worst} "
        f"in the worst case, {_points(widest)}."
    )


def _robustness_curves(run: RunResults, pairs: Attacked) -> list[Chart]:
    """A chart per kind of ball: accuracy of each model against the radius."""
    kinds: dict[tuple[str, str], dict[tuple[str, OverSeeds], list[tuple[Score, AttackResult]]]] = {}
    for score, attack in pairs:
        if not attack.spatial and not attack.target_rule:
            models = kinds.setdefault((attack.settings["attack"], attack.settings["norm"]), {})
            models.setdefault((score.model, score.clean), []).append((score, attack))
    return [_curve(run, number, *kind, list(models.values())) for number, (kind, models) in enumerate(kinds.items())]


def _curve(run: RunResults, number: int, method: str, norm: str, models: Sequence[Attacked]) -> Chart:
    lines, worst_cases = [], []
    for colour, pairs in enumerate(models[:COLOURS]):
        score = pairs[0][0]
        radii = {0.0: (score.clean, score.clean)}
        for _, attack in pairs:
            eps = attack.settings["eps"]
            if eps not in radii or attack.worst.mean < radii[eps][0].mean:
                radii[eps] = (attack.worst, attack.average or attack.worst)
        xs = sorted(radii)
        worst, average = [radii[x][0] for x in xs], [radii[x][1] for x in xs]
        ends = ([w.low for w in worst], [w.high for w in worst])
        lines.append(Line(score.model, xs, [w.mean for w in worst], *ends, colour=colour))
        lines.append(Line("", xs, [a.mean for a in average], dashed=True, colour=colour))
        worst_cases.append(f"{score.model} {worst[-1]}")
    largest = max(attack.settings["eps"] for pairs in models for _, attack in pairs)
    left = f"; {COLOURS} of {len(models)} models are shown" if len(models) > COLOURS else ""
    text = (
        f"{method.upper()}, {norm_name(norm)}: solid the worst case, dashed the average case. At the largest radius, "
        f"{largest:g}: {', '.join(worst_cases)}{left}."
    )
    label = f"{norm_name(norm)} radius, {PIXELS}"
    drawn = (lines, label, "accuracy")
    svg = charts.lines(f"robustness{number}", text, *drawn)
    return _chart(run, f"robustness-{method}-{norm}", svg, text, charts.line_data(*drawn))


# ------------------------------------------------------------------------------------------ transfer


def transfer(run: RunResults) -> Section | None:
    """Transfer attacks: a matrix of source and attacked models for each, and the paper's figure 3."""
    matrices = transfers(run.scores)
    if not matrices:
        return None
    left = f" {CURVES} of {len(matrices)} tables are shown." if len(matrices) > CURVES else ""
    text = (
        "Columns are source models, rows are attacked models. Fooling rate: the share of the images that the attacked "
        "model classifies correctly without the attack and misclassifies under it. Attack success rate: the share of "
        f"the images with a target other than their true class that it classifies as their target.{left}"
    )
    tables = [
        Table(["attacked model", *head[1:]], lines, matrix.title[0].upper() + matrix.title[1:])
        for matrix, (head, lines) in ((matrix, matrix.table()) for matrix in matrices[:CURVES])
    ]
    return Section("Transfer", text, _against_transferability(run), tables)


def _against_transferability(run: RunResults) -> list[Chart]:
    """For a dataset that several architectures learned from: accuracy against the transferability of its attack."""
    learners: dict[str, dict[str, tuple[float, float]]] = {}
    untargeted = [matrix.cells for matrix in transfers(run.held_out) if matrix.target_rule is None]
    for score in run.held_out if untargeted else []:
        if score.kind in published.LEARNED_FROM and score.node.recipe.arch is not None:
            dataset, arch = score.node.inputs["on"], score.node.recipe.arch
            if (rate := _fooled(run, untargeted, dataset, arch)) is not None:
                learners.setdefault(without_seed(dataset.name), {})[arch] = (rate, score.clean.mean)
    several = [(name, points) for name, points in learners.items() if len(points) > 1]
    return [_transferability(run, number, *points) for number, points in enumerate(several[:CURVES])]


def _transferability(run: RunResults, number: int, dataset: str, points: Mapping[str, tuple[float, float]]) -> Chart:
    low, high = (pick(points, key=lambda arch: points[arch][0]) for pick in (min, max))
    text = (
        f"Learners from {dataset}. Attacks on its source model transfer least to {low}, {percent(points[low][0])}, "
        f"whose clean accuracy is {percent(points[low][1])}; most to {high}, {percent(points[high][0])}, whose clean "
        f"accuracy is {percent(points[high][1])}. For comparison: the paper's, from D_det of CIFAR-10."
    )
    groups = {
        "learners of this run": list(points.values()),
        "the paper, CIFAR-10": [(rate / 100, accuracy / 100) for rate, accuracy in published.TRANSFER.values()],
    }
    labels = ("fooling rate of an attack on the source model", "clean accuracy of the learner")
    svg = charts.scatter(f"transfer{number}", text, groups, *labels, shares=True, names=list(points))
    return _chart(run, f"transfer-{dataset}", svg, text, charts.scatter_data(groups, *labels))


def _fooled(
    run: RunResults, untargeted: Sequence[Mapping[Cell, OverSeeds | None]], dataset: Node, arch: str
) -> float | None:
    """Fooling rate of an untargeted attack on the source model of a dataset, on another of some architecture and the
    same images."""
    source, clean = dataset.inputs["model"], dataset.inputs["images"]
    scores = (score for score in run.held_out if score.kind == "D" and score.node.recipe.arch == arch)
    cells = [(without_seed(source.name), s.model) for s in scores if s.node.inputs["on"].id == clean.id]
    shares = (shares[cell] for shares in untargeted for cell in cells if cell in shares)
    return next((share.mean for share in shares if share is not None), None)


# ------------------------------------------------------------------------------------------ features


def features(run: RunResults) -> Section | None:
    """Usefulness against robust usefulness of each penultimate feature; of several seeds the first is drawn."""
    if not run.usefulness:
        return None
    charts = [_features(run, number, same) for number, same in enumerate(run.usefulness[:CURVES])]
    text = (
        "Each point is a feature of the penultimate layer for one class against the rest: to the right its usefulness "
        "ρ, upwards its robust usefulness γ, under the worst perturbation. The largest possible ρ is smaller for a "
        "rare class, so each class has its own threshold above which a feature is useful: the vertical lines are the "
        "smallest and the largest of these thresholds, one line if they are equal. A useful feature above the "
        "horizontal line, γ = 0, is robust; below it, non-robust."
    )
    return Section("Features", text, charts)


def _features(run: RunResults, number: int, same: Sequence[Row]) -> Chart:
    row, shares = same[0], feature_shares(same)
    step = math.ceil(len(row["points"]) / POINTS) or 1
    part = f" One in {step} is drawn." if step > 1 else ""
    text = (
        f"{without_seed(row['model'])}, {ball(row)}, ρ on {row['n']:,} images, γ on {row['attacked']:,} of them under "
        f"attack: of {sum(row['counts'].values()):,} feature–class pairs, {shown(shares['robust'])} are useful and "
        f"robust, {shown(shares['non_robust'])} useful and not robust, {shown(shares['useless'])} useless.{part}"
    )
    groups: dict[str, list[tuple[float, float]]] = {"useful and robust": [], "useful, not robust": [], "useless": []}
    for _, k, rho, gamma in row["points"][::step]:
        least = row["useful_from"][k]
        kind = "useless" if rho < least else "useful and robust" if gamma > 0 else "useful, not robust"
        groups[kind].append((rho, gamma))
    known = [least for least in row["useful_from"] if least is not None]  # of classes that have images
    ends = sorted({min(known), max(known)})
    labels = ("usefulness ρ", "robust usefulness γ")
    svg = charts.scatter(f"features{number}", text, groups, *labels, vertical=ends, horizontal=[0.0])
    name = f"features-{without_seed(row['model'])}"
    return _chart(run, name, svg, text, charts.scatter_data(groups, *labels))


# ------------------------------------------------------------------------------- graph and environment


def nodes(run: RunResults) -> Section:
    """The graph of the run, and each node with its version, time and speed."""
    progress = run.run["nodes"]
    lines = [
        [
            node.id,
            node.stage,
            ", ".join(dict.fromkeys(parent.name for parent in node.inputs.values())) or "–",
            progress[node.id]["version"],
            _state(run, node.id),
            duration(progress[node.id]["seconds"]),
            _rate(run, node.id),
        ]
        for node in run.nodes.values()
    ]
    made = [one["seconds"] or 0.0 for one in progress.values() if one["state"] == "done"]
    text = f"{_count(len(lines), 'node')}, of which this run made {len(made) or 'none'}"
    text += f"; their times add up to {duration(sum(made))}." if made else "."
    boxes, drawing = _boxes(run), None
    if len(boxes) > BOXES:
        text += f" The graph is not drawn: it has {len(boxes)} boxes, and only {BOXES} are readable."
    else:
        text += " The drawing leaves out an arrow where a longer path leads to the same node."
        drawing = _drawing(run, boxes)
    head = ["node", "stage", "inputs", "version", "state", "time", "images/s"]
    return Section("How it was made", text, tables=[Table(head, lines)], drawing=drawing)


def _state(run: RunResults, node: str) -> str:
    progress = run.run["nodes"][node]
    state = in_words(progress["state"])
    if progress["state"] == "cached" and node in run.manifests:
        return f"{state}, made {run.manifests[node]['made'][:16].replace('T', ' ')}"
    return f"{state}: {progress['why']}" if progress["why"] else state


def _rate(run: RunResults, node: str) -> str:
    progress = run.run["nodes"][node]
    if progress["images"] and progress["seconds"]:
        return f"{progress['images'] / progress['seconds']:,.0f}"
    rates = [epoch["images_per_second"] for epoch in run.metrics.get(node, []) if "images_per_second" in epoch]
    return f"{mean(rates):,.0f}" if rates else "–"


ORDER = ("failed", "interrupted", "running", "queued", "waiting", "done", "cached")
"""States in order of precedence: a box of several nodes has the first that occurs."""


def _boxes(run: RunResults) -> dict[str, list[Node]]:
    """One box for all nodes that differ only in their place in a sweep."""
    boxes: dict[str, list[Node]] = {}
    for node in run.nodes.values():
        boxes.setdefault(split_name(node.id)[0], []).append(node)
    return boxes


def _drawing(run: RunResults, boxes: Mapping[str, Sequence[Node]]) -> Drawing:
    labels, needs = {}, {}
    for key, same in boxes.items():
        state = min((run.state(node.id) for node in same), key=ORDER.index)
        spent = sum(run.run["nodes"][node.id]["seconds"] or 0 for node in same)
        detail = f"{same[0].stage}, {duration(spent) if spent else in_words(state)}"
        labels[key] = (key.partition("/")[2] + (f" × {len(same)}" if len(same) > 1 else ""), detail, state)
        needs[key] = list(dict.fromkeys(split_name(p.id)[0] for node in same for p in node.inputs.values()))
    return charts.graph(labels, needs)


def environment(run: RunResults) -> Section:
    """The environment that the run was computed in, and its experiment."""
    record = run.run
    started, took = datetime.fromisoformat(record["started"]), ""
    if record.get("ended"):
        took = f" and took {duration((datetime.fromisoformat(record['ended']) - started).total_seconds())}"
    text = f"Run {record['run']} began on {started:%d %B %Y at %H:%M} UTC{took}."
    lines = [[name, str(version)] for name, version in record["environment"].items()]
    sources = [("The experiment as it was written", record["written"])] if record.get("written") else []
    sources.append(("The experiment with all defaults", _with_defaults(record["experiment"])))
    return Section("Environment", text, tables=[Table(["component", "version"], lines)], sources=sources)


def _with_defaults(experiment: Row) -> str:
    """Every key of every entry, those of a method that ignores them included."""
    whole = spec.parse(experiment).model_dump(mode="json", exclude_none=True)
    fast = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    return _bounded(yaml.dump(whole, Dumper=fast, sort_keys=False, allow_unicode=True))


def _bounded(text: str, most: int = 60_000) -> str:
    return text if len(text) <= most else f"{text[:most]}\n… (continued in run.json)"
