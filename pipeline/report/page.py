"""``report.html``: what a run found, on one page that needs nothing but itself."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from pipeline.report import published
from pipeline.report.results import Gathered, Score
from pipeline.report.scores import Attack, shown
from pipeline.report.sections import sections
from pipeline.store import Store
from pipeline.terminal import visible

TEMPLATE = Path(__file__).with_name("page.html")


def write(store: Store, run: Mapping[str, Any]) -> str:
    """Write the page of a run, whatever its state, from what it left in the store.

    Returns:
        The page's path in the store.

    Raises:
        BadInput: the experiment of the record is none that this version knows.
    """
    path = f"runs/{run['run']}/report.html"
    store.put(path, render(store, run).encode())
    return path


def render(store: Store, run: Mapping[str, Any]) -> str:
    """The page as HTML."""
    found = Gathered(store, run)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_unbroken
    )
    environment.filters["breakable"] = _breakable
    html = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        run=run,
        state=state(run),
        reasons=reasons(run),
        verdict=verdict(found.held_out) or _inventory(found),
        besides=list(besides(found.held_out)),
        sections=sections(found),
    )
    return "\n".join(map(visible, html.split("\n")))  # a page is read in a pager, too


def _unbroken(value: Any) -> Any:
    """Keep a number, its deviation and its per cent sign on one line."""
    return value.replace(" %", "\u00a0%").replace(" ± ", "\u00a0±\u00a0") if isinstance(value, str) else value


def _breakable(name: str) -> Markup:
    """Let a long name go on in the next line after a sign that joins its parts."""
    return Markup(re.sub(r"([/@,._=-])(?=\w)", r"\1<wbr>", str(escape(name))))


# ---------------------------------------------------------------------------------------------- state


def state(run: Mapping[str, Any]) -> str | None:
    """Said first of a run that did not make everything; None of one that did."""
    counts = Counter(progress["state"] for progress in run["nodes"].values())
    there, total = counts["done"] + counts["cached"], len(run["nodes"])
    made = f"{there} of {total} nodes are there"
    match run["state"]:
        case "done":
            return None
        case "failed":
            return f"This run failed: {made}."
        case "running":
            return f"This run is not finished: {made}."
        case "lost":
            return f"This run ended without a word, {run['why']}: {made}."
    return f"This run was {run['state']}: {made}."


def reasons(run: Mapping[str, Any]) -> list[str]:
    """Why nodes failed or could not begin."""
    nodes = sorted(run["nodes"].items(), key=lambda item: item[1]["state"] != "failed")
    return [f"{node} {progress['state']}: {progress['why']}" for node, progress in nodes if progress["why"]]


def _inventory(found: Gathered) -> str:
    groups = Counter(node.partition("/")[0] for node in found.manifests)
    made = ", ".join(f"{number} of its {group}" for group, number in groups.items()) or "nothing"
    verb = "is" if sum(groups.values()) < 2 else "are"
    return f"Of this experiment {made} {verb} there, and no accuracy to judge by."


# -------------------------------------------------------------------------------------------- verdict


def verdict(scores: Sequence[Score]) -> str | None:
    """What the run found, in one sentence, judged by held-out images; None where nothing was scored on any."""
    if (headline := _headline(scores)) is not None:
        clean = headline.clean
        learned_from = published.LEARNED_FROM[str(headline.kind)]
        return (
            f"Trained on nothing but {learned_from}, {headline.model} answers {clean} of the untouched "
            f"{headline.split} images right ({clean.interval}), {headline.beside}: {_meaning(headline, scores)}."
        )
    if not scores:
        return None
    best = max(scores, key=lambda score: score.clean.mean)
    return f"{best.model} answers {best.clean} of the {best.split} images right, {best.beside}."


def _meaning(headline: Score, scores: Sequence[Score]) -> str:
    if headline.clean.low <= headline.level[1]:
        return "so nothing that generalises was learned"
    unattacked = [f"{headline.kind}, {control}" for control in ("untouched", "noise", "leakage only")]
    controls = sorted((s for s in scores if s.kind in unattacked), key=lambda s: s.clean.mean)
    if controls and controls[-1].clean.high >= headline.clean.low:
        as_good = controls[-1]
        return f"but without the attack {as_good.model} comes to {as_good.clean}, so leakage alone may explain it"
    leakage = [score for score in controls if score.kind == f"{headline.kind}, leakage only"]
    if leakage:
        points = 100 * (headline.clean.mean - leakage[-1].clean.mean)
        return (
            f"so the perturbations carried features that generalise, worth {points:.1f} points beyond the "
            f"{leakage[-1].clean} of leakage alone"
        )
    return "no leakage-only control was run, so how much of it is leakage is not known"


def _headline(scores: Sequence[Score]) -> Score | None:
    """The learner to judge by: of the strictest set that there is; of a sweep, the last."""
    for kind in published.LEARNED_FROM:
        same = [score for score in scores if score.kind == kind]
        if same:
            return next((score for score in same if not score.axes), same[-1])
    return None


def besides(scores: Sequence[Score]) -> Iterator[str]:
    """What has to be known along with the verdict."""
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
            so = "do not explain it" if control.clean.high < headline.clean.low else "do as much"
            yield f"The same labels on {images} give {control.clean}: the labels alone {so}."
    if (control := by_kind.get(f"{headline.kind}, robust source")) is not None:
        yield f"With a robust source model it is {control.clean}."


def _versions(scores: Sequence[Score]) -> str:
    """How robust the learners of D_R, D_NR and D are."""
    said = []
    for kind in ("D_R", "D_NR", "D"):
        if (score := _most_attacked(kind, scores)) is not None:
            under = _strongest(score)
            said.append(f"{score.model} {score.clean}" + (f", {under.worst} under {under.name}" if under else ""))
    return f"Robust and non-robust versions of the images: {'; '.join(said)}."


def _most_attacked(kind: str, scores: Sequence[Score]) -> Score | None:
    """Of the evaluations of what was trained on this, the one with the attack of the largest radius."""
    return max((score for score in scores if score.kind == kind), key=_largest_radius, default=None)


def _largest_radius(score: Score) -> float:
    attack = _strongest(score)
    return -1.0 if attack is None else float(attack.asked.get("eps", 0.0))


def _strongest(score: Score) -> Attack | None:
    """The untargeted attack of the largest radius that was made on the model itself."""
    untargeted = [attack for attack in score.attacks() if attack.target_rule is None]
    return max(untargeted, key=lambda attack: attack.asked.get("eps", 0.0), default=None)


def _widest_gap(scores: Sequence[Score]) -> Iterator[str]:
    score = _most_attacked("D", scores)
    if score is not None and (attack := _strongest(score)) is not None:
        yield (
            f"Average and worst case differ: {score.model} answers {shown(attack.average)} right on average "
            f"({attack.average_case}), {attack.worst} under {attack.name}."
        )
