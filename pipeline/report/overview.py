"""The first picture of a page: the clean accuracy of each learner beside chance, controls and published figures."""

from collections import Counter
from collections.abc import Sequence

from pipeline.report import charts, published
from pipeline.report.charts import Bar
from pipeline.report.parts import Chart, command
from pipeline.report.results import RunResults, Score
from pipeline.report.scores import merged, percent
from pipeline.report.verdict import controls_of, headline

BARS = 12
"""Bars in the picture, at most."""

CONTROLS = ("leakage only", "noise", "untouched")
"""Controls that are lines in the picture, not bars; of a linear probe or another source model there are bars."""


def overview(run: RunResults) -> Chart | None:
    """Bars of clean accuracy with intervals; lines of chance and of the controls of the learner in the verdict.

    The learners that the experiment is about come first, the strictest labels on top, then the other models.
    """
    scores = learners(run)
    if not scores:
        return None
    shown = scores[:BARS]
    top = headline(run.held_out)
    levels = [("chance", shown[0].chance), *_lines(top, run.held_out)]
    bars = [_bar(score, name) for score, name in zip(shown, told_apart(shown), strict=True)]
    caption = _caption(shown, len(scores) - len(shown))
    return Chart(
        charts.bars("overview", f"{caption} {_numbers(shown, levels)}", bars, "clean accuracy", *levels),
        caption,
        "accuracy",
        charts.bar_data(bars, "clean accuracy", *levels),
        command(run),
    )


def learners(run: RunResults) -> list[Score]:
    """The models scored on held-out images, without the controls that are lines; of sweeps, only the verdict's."""
    scores = [score for score in merged(run.held_out) if not _is_control(score)]
    top = headline(run.held_out)
    shown = [score for score in scores if not score.axes or (top is not None and score.base == top.base)]
    return sorted(shown or scores, key=_order)


def _is_control(score: Score) -> bool:
    of, _, suffix = (score.kind or "").partition(", ")
    return of in published.LEARNED_FROM and suffix in CONTROLS


def _is_relabelled(score: Score) -> bool:
    """Whether the model was trained on relabelled images, however they were perturbed."""
    return (score.kind or "").partition(", ")[0] in published.LEARNED_FROM


def _order(score: Score) -> int:
    kinds = list(published.LEARNED_FROM)
    return kinds.index(score.kind) if score.kind in kinds else len(kinds) + (score.kind != "D")


def _lines(top: Score | None, scores: Sequence[Score]) -> list[tuple[str, float]]:
    """Name and accuracy of the controls of the learner that the verdict is about: the two that matter most."""
    controls = controls_of(top, scores) if top is not None else []
    return [(f"control: {control.model}", control.clean.mean) for control in controls[:2]]


def told_apart(scores: Sequence[Score]) -> list[str]:
    """The models' names; of a model that was scored on several sets of images, with the images."""
    often = Counter(score.model for score in scores)
    return [score.model if often[score.model] == 1 else f"{score.model}, {score.images}" for score in scores]


def _bar(score: Score, name: str) -> Bar:
    alike = published.same(score.kind, score.data, score.node.arch or "", published.setting(score.node))
    shares = [share for figure in alike for share in figure.shares]
    colour = 0 if _is_relabelled(score) else 7
    return Bar(name, score.clean.mean, score.clean.low, score.clean.high, colour, shares)


def _caption(shown: Sequence[Score], left: int) -> str:
    several = [score.clean.seeds > 1 for score in shown]
    spreads = ["one standard deviation over the seeds to each side"] * any(several)
    spread = ", or of one model ".join([*spreads, *["the 95 % interval"] * (not all(several))])
    learners = " Blue: trained on relabelled images." if any(map(_is_relabelled, shown)) else ""
    more = f" {left} more are in the table." if left else ""
    return (
        f"Share of the untouched {shown[0].split} images that each model classifies correctly; the line on each bar is "
        f"{spread}.{learners}{more}"
    )


def _numbers(shown: Sequence[Score], levels: Sequence[tuple[str, float]]) -> str:
    bars = ", ".join(f"{score.model} {score.clean}" for score in shown)
    return f"{bars}. For comparison: {', '.join(f'{name} {percent(share)}' for name, share in levels)}."
