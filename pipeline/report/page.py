"""``report.html``: the results of a run on one self-contained page."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from pipeline.report import published
from pipeline.report.results import RunResults, Score
from pipeline.report.scores import AttackResult, shown
from pipeline.report.sections import sections
from pipeline.store import Store
from pipeline.terminal import visible

TEMPLATE = Path(__file__).with_name("page.html")


def write(store: Store, run: Mapping[str, Any]) -> str:
    """Write the page of a run, in whatever state, from its results in the store.

    Returns:
        The page's path in the store.

    Raises:
        BadInput: this version cannot read the experiment of the record.
    """
    path = f"runs/{run['run']}/report.html"
    store.put(path, render(store, run).encode())
    return path


def render(store: Store, run: Mapping[str, Any]) -> str:
    """The page as HTML."""
    results = RunResults(store, run)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_unbroken
    )
    environment.filters["breakable"] = _breakable
    html = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        run=run,
        state=state(run),
        reasons=reasons(run),
        verdict=verdict(results.held_out) or _inventory(results),
        remarks=list(remarks(results.held_out)),
        sections=sections(results),
    )
    return "\n".join(map(visible, html.split("\n")))  # a page is read in a pager, too


def _unbroken(value: Any) -> Any:
    """Keep a number, its deviation and its percent sign on one line."""
    return value.replace(" %", "\u00a0%").replace(" ± ", "\u00a0±\u00a0") if isinstance(value, str) else value


def _breakable(name: str) -> Markup:
    """Let a long name break after the characters that join its parts."""
    return Markup(re.sub(r"([/@,._=-])(?=\w)", r"\1<wbr>", str(escape(name))))


# ---------------------------------------------------------------------------------------------- state


def state(run: Mapping[str, Any]) -> str | None:
    """The first sentence of an incomplete run; None for a complete one."""
    counts = Counter(progress["state"] for progress in run["nodes"].values())
    there, total = counts["done"] + counts["cached"], len(run["nodes"])
    made = f"{there} of {total} nodes are finished"
    match run["state"]:
        case "done":
            return None
        case "failed":
            return f"This run failed: {made}."
        case "running":
            return f"This run is not finished: {made}."
        case "lost":
            return f"This run was lost, {run['why']}: {made}."
    return f"This run was {run['state']}: {made}."


def reasons(run: Mapping[str, Any]) -> list[str]:
    """Why nodes failed or did not start."""
    nodes = sorted(run["nodes"].items(), key=lambda item: item[1]["state"] != "failed")
    return [f"{node} {progress['state']}: {progress['why']}" for node, progress in nodes if progress["why"]]


def _inventory(results: RunResults) -> str:
    groups = Counter(node.partition("/")[0] for node in results.manifests)
    finished = ", ".join(f"{number} of the {group}" for group, number in groups.items()) or "Nothing"
    verb = "is" if sum(groups.values()) < 2 else "are"
    return f"{finished} {verb} finished; there is no accuracy yet."


# -------------------------------------------------------------------------------------------- verdict


def verdict(scores: Sequence[Score]) -> str | None:
    """The main result in one sentence, from held-out images; None if no model was scored on any."""
    if (headline := _headline(scores)) is not None:
        clean = headline.clean
        learned_from = published.LEARNED_FROM[str(headline.kind)]
        return (
            f"Trained only on {learned_from}, {headline.model} classifies {clean} of the untouched {headline.split} "
            f"images correctly ({clean.interval}), {headline.beside}: {_meaning(headline, scores)}."
        )
    if not scores:
        return None
    best = max(scores, key=lambda score: score.clean.mean)
    return f"{best.model} classifies {best.clean} of the {best.split} images correctly, {best.beside}."


def _meaning(headline: Score, scores: Sequence[Score]) -> str:
    if headline.clean.low <= headline.level[1]:
        return "it learned nothing that generalises"
    unattacked = [f"{headline.kind}, {control}" for control in ("untouched", "noise", "leakage only")]
    controls = sorted((s for s in scores if s.kind in unattacked), key=lambda s: s.clean.mean)
    if controls and controls[-1].clean.high >= headline.clean.low:
        best = controls[-1]
        return f"but without the attack {best.model} reaches {best.clean}, so leakage alone may explain it"
    leakage = [score for score in controls if score.kind == f"{headline.kind}, leakage only"]
    if leakage:
        points = 100 * (headline.clean.mean - leakage[-1].clean.mean)
        return (
            f"so the perturbations contain features that generalise, worth {points:.1f} points beyond the "
            f"{leakage[-1].clean} of leakage alone"
        )
    return "without a leakage-only control, the share of leakage is unknown"


def _headline(scores: Sequence[Score]) -> Score | None:
    """The learner that the verdict is about: of the strictest training set present; of a sweep, the last."""
    for kind in published.LEARNED_FROM:
        same = [score for score in scores if score.kind == kind]
        if same:
            return next((score for score in same if not score.axes), same[-1])
    return None


def remarks(scores: Sequence[Score]) -> Iterator[str]:
    """Sentences that qualify the verdict."""
    headline = _headline(scores)
    by_kind = {score.kind: score for score in reversed(scores)}
    if headline is not None:
        yield from _controls(headline, by_kind)
    if "D_R" in by_kind:
        yield _versions(scores)
    yield from _widest_gap(scores)


def _controls(headline: Score, by_kind: Mapping[str | None, Score]) -> Iterator[str]:
    for kind, images in (("untouched", "untouched images"), ("noise", "images with noise")):
        if (control := by_kind.get(f"{headline.kind}, {kind}")) is not None:
            so = "do not explain it" if control.clean.high < headline.clean.low else "explain it as well"
            yield f"The same labels on {images} give {control.clean}: the labels alone {so}."
    if (control := by_kind.get(f"{headline.kind}, robust source")) is not None:
        yield f"A robust source model gives {control.clean}."


def _versions(scores: Sequence[Score]) -> str:
    """Clean and robust accuracy of the learners of D_R, D_NR and D."""
    parts = []
    for kind in ("D_R", "D_NR", "D"):
        if (score := _most_attacked(kind, scores)) is not None:
            attack = _strongest(score)
            parts.append(f"{score.model} {score.clean}" + (f", {attack.worst} under {attack.name}" if attack else ""))
    return f"Robust and non-robust versions of the images: {'; '.join(parts)}."


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


def _widest_gap(scores: Sequence[Score]) -> Iterator[str]:
    score = _most_attacked("D", scores)
    if score is not None and (attack := _strongest(score)) is not None:
        yield (
            f"Average and worst case differ: the accuracy of {score.model} is {shown(attack.average)} on average "
            f"({attack.average_case}) and {attack.worst} under {attack.name}."
        )
