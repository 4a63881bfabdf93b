"""Charts as inline SVG that take their colours from the page, so that they fit a light and a dark theme."""

import html
import io
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from pipeline.terminal import visible

COLOURS = 8
"""Series colours that the page defines: ``--c0`` … ``--c7``."""

INK, FAINT, PAPER = "#010203", "#010204", "#010205"
"""Placeholders for the page's text, rule and background colours, replaced when the SVG is written; as are those of
`_series`."""

BESIDE: Any = {"va": "center", "fontsize": 9, "bbox": {"facecolor": PAPER, "edgecolor": "none", "pad": 1}}
"""A text beside a bar, which interrupts the lines that it crosses."""

MARKS = "osD^vPX*"

DASHES = (":", "--", "-.")
"""Of the lines of baselines, in turn."""

STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.markersize": 4,
}


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: entry in the legend; empty for a line that another of its colour explains.
        x, y: its points; y are shares in [0, 1].
        low, high: ends of the error bar of each point; empty for none.
        dashed: whether it is the second of a pair.
        colour: number of its colour, modulo `COLOURS`.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = field(default=())
    high: Sequence[float] = field(default=())
    dashed: bool = False
    colour: int = 0


def lines(
    name: str,
    text: str,
    drawn: Sequence[Line],
    x_label: str,
    y_label: str,
    log: bool = False,
    level: tuple[str, float] | None = None,
) -> str:
    """Shares as a function of a quantity.

    Args:
        name: of the chart; unique in the page.
        text: description for readers who cannot see the chart.
        drawn: the lines.
        x_label, y_label: of the axes.
        log: whether the x axis is logarithmic.
        level: name and value of a baseline share.
    """
    places = sorted({x for line in drawn for x in line.x})
    with plain_text(STYLE):
        figure, axes = _empty(3.3 + 0.24 * ((sum(bool(line.name) for line in drawn) + 1) // 2))
        for line in drawn:
            _draw(axes, line)
        if level is not None:
            axes.axhline(level[1], color=INK, linewidth=1, linestyle=":", label=level[0])
        if log:
            axes.set_xscale("log")
            axes.set_xticks(places)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
        elif places and all(x == int(x) for x in places):
            axes.set_xticks(_whole_ticks(places))
        axes.set(xlabel=x_label, ylabel=y_label, ylim=(-0.03, 1.03))
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        _legend(figure, axes)
        return _svg(figure, name, text)


def _whole_ticks(places: Sequence[float]) -> list[float]:
    """Both ends of sorted whole numbers, and round ticks between them, none within half a step of an end."""
    first, last = places[0], places[-1]
    ticks = MaxNLocator(integer=True).tick_values(first, last)
    margin = (ticks[1] - ticks[0]) / 2
    return sorted({first, *(float(tick) for tick in ticks if first + margin < tick < last - margin), last})


def line_data(drawn: Sequence[Line], x_label: str, y_label: str) -> list[list[object]]:
    """The numbers behind `lines`, a row per point, under a head."""
    rows: list[list[object]] = [["line", "dashed", x_label, y_label, "low", "high"]]
    name = ""
    for line in drawn:
        name = line.name or name  # a nameless line is explained by the one before it
        ends = zip(line.low, line.high, strict=True) if line.low else [("", "")] * len(line.x)
        rows += [[name, line.dashed, x, y, *end] for x, y, end in zip(line.x, line.y, ends, strict=True)]
    return rows


def _draw(axes: Axes, line: Line) -> None:
    few = len(line.x) <= 12
    axes.plot(
        line.x,
        line.y,
        color=_series(line.colour),
        linestyle="--" if line.dashed else "-",
        marker=MARKS[line.colour % len(MARKS)] if few else None,
        label=visible(line.name) or None,
    )
    if line.low:
        axes.vlines(line.x, line.low, line.high, color=_series(line.colour), linewidth=1)


@dataclass(frozen=True)
class Bar:
    """A bar of a chart: a share in [0, 1] with its interval.

    Attributes:
        name: beside the bar.
        value, low, high: the share, and the ends of its interval.
        colour: number of its colour, modulo `COLOURS`.
        published: published shares of the same thing, drawn as marks.
    """

    name: str
    value: float
    low: float
    high: float
    colour: int = 0
    published: Sequence[float] = ()


def bars(name: str, text: str, drawn: Sequence[Bar], x_label: str, *levels: tuple[str, float]) -> str:
    """Horizontal bars, the first on top, with their values, and the names and values of baseline shares as lines."""
    with plain_text(STYLE):
        figure, axes = _empty(1.1 + 0.36 * len(drawn) + 0.2 * max(0, len(levels) - 1))
        places = range(len(drawn))
        axes.barh(places, [b.value for b in drawn], 0.6, color=[_series(b.colour) for b in drawn])
        axes.hlines(places, [b.low for b in drawn], [b.high for b in drawn], color=INK, linewidth=1.2)
        for place, bar in enumerate(drawn):
            axes.text(_free(bar, [share for _, share in levels]) + 0.03, place, f"{100 * bar.value:.1f} %", **BESIDE)
        marks = [(share, place) for place, bar in enumerate(drawn) for share in bar.published]
        if marks:
            xs, ys = zip(*marks, strict=True)
            axes.scatter(xs, ys, 34, INK, marker="D", label="published, same setting", zorder=3)
        for number, (label, share) in enumerate(levels):
            colour, dashes = (_series(number), DASHES[number % len(DASHES)]) if number else (INK, ":")
            axes.axvline(
                share, color=colour, linewidth=1.5, linestyle=dashes, label=f"{visible(label)} {100 * share:.1f} %"
            )
        axes.set(xlabel=x_label, xlim=(-0.01, 1.13))
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.set_yticks(places, [visible(b.name) for b in drawn])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        _legend(figure, axes)
        return _svg(figure, name, text)


LABEL = 0.15
"""Width of a bar's label, in units of the shares."""


def _free(bar: Bar, levels: Sequence[float]) -> float:
    """The end of a bar, or the last published mark or line of a baseline that its label would cover."""
    end = max(bar.value, bar.high)
    for mark in sorted([*bar.published, *levels]):
        end = max(end, mark) if mark < end + LABEL else end
    return end


def bar_data(drawn: Sequence[Bar], x_label: str, *levels: tuple[str, float]) -> list[list[object]]:
    """The numbers behind `bars`, a row per bar, mark and line, under a head."""
    rows: list[list[object]] = [["name", x_label, "low", "high"]]
    for bar in drawn:
        rows += [
            [bar.name, bar.value, bar.low, bar.high],
            *([f"{bar.name}, published", p, "", ""] for p in bar.published),
        ]
    return rows + [[label, share, "", ""] for label, share in levels]


Point = tuple[float, float]


def scatter(
    name: str,
    text: str,
    groups: Mapping[str, Sequence[Point]],
    x_label: str,
    y_label: str,
    vertical: Sequence[float] = (),
    horizontal: Sequence[float] = (),
    shares: bool = False,
    names: Sequence[str] = (),
) -> str:
    """Points of several kinds.

    Args:
        name: of the chart; unique in the page.
        text: description for readers who cannot see the chart.
        groups: kind → its points; a kind has the same colour in every chart, even if others have no points.
        x_label, y_label: of the axes.
        vertical, horizontal: x and y of reference lines.
        shares: whether both axes are shares in [0, 1].
        names: labels of the points of the first kind.
    """
    with plain_text(STYLE):
        figure, axes = _empty(3.6)
        _draw_points(axes, groups)
        for label, (x, y) in zip(names, next(iter(groups.values())), strict=False):
            axes.annotate(visible(label), (x, y), (4, 4), textcoords="offset points", fontsize=8)
        for x in vertical:
            axes.axvline(x, color=INK, linewidth=0.8, linestyle=":")
        for y in horizontal:
            axes.axhline(y, color=INK, linewidth=0.8, linestyle=":")
        axes.set(xlabel=x_label, ylabel=y_label)
        if shares:
            axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
            axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        _legend(figure, axes)
        return _svg(figure, name, text)


def scatter_data(groups: Mapping[str, Sequence[Point]], x_label: str, y_label: str) -> list[list[object]]:
    """The numbers behind `scatter`, a row per point, under a head."""
    return [["kind", x_label, y_label], *([kind, *point] for kind, points in groups.items() for point in points)]


def _draw_points(axes: Axes, groups: Mapping[str, Sequence[Point]]) -> None:
    for number, (kind, points) in enumerate(groups.items()):
        if points:
            xs, ys = [p[0] for p in points], [p[1] for p in points]
            size, mark = (12, "o") if len(points) > 20 else (28, MARKS[number % len(MARKS)])
            axes.scatter(xs, ys, s=size, marker=mark, color=_series(number), alpha=0.75, linewidths=0, label=kind)


# -------------------------------------------------------------------------------------------- drawing


@contextmanager
def plain_text(style: Any) -> Iterator[None]:
    """Draw in a style that keeps text as it is: no formulas, and no warnings about letters missing from the font."""
    with matplotlib.rc_context({**style, "text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def _empty(height: float) -> tuple[Figure, Axes]:
    """A chart five inches wide: 360 units, the width of a phone, so that its text is readable there."""
    figure = Figure(figsize=(5, height), layout="constrained")
    return figure, figure.add_subplot()


def _series(number: int) -> str:
    return f"#0a0b{number % COLOURS:02x}"


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        columns = 1 if max(map(len, labels)) > 24 else 2
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _svg(figure: Figure, name: str, text: str) -> str:
    """Matplotlib's SVG in the page's colours, with ids of its own and without metadata."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    svg = out.getvalue()
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"\s*\n\s*", " ", re.sub(r" font-family: [^;]*;", "", svg))
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"#0a0b(\d\d)", lambda match: f"var(--c{int(match[1])})", svg)
    svg = svg.replace(INK, "var(--ink)").replace(FAINT, "var(--rule)").replace(PAPER, "var(--paper)")
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    head = f'<svg class="chart" role="img" aria-label="{html.escape(text)}" {box[0]}>'
    return head + svg[svg.index(">") + 1 :].replace("xlink:href", "href")


# ------------------------------------------------------------------------------------ graph of a run


@dataclass(frozen=True)
class Box:
    """A box of a drawn graph: its text, and its position in units of the drawing."""

    key: str
    title: str
    detail: str
    state: str
    x: float
    y: float


@dataclass(frozen=True)
class Drawing:
    """A graph in layers from left to right: boxes, and arrows as SVG paths."""

    width: float
    height: float
    boxes: list[Box]
    arrows: list[str]


BOX, GAP = (150, 40), (46, 12)
"""Width and height of a box, and the space between two."""


def graph(labels: Mapping[str, tuple[str, str, str]], needs: Mapping[str, Sequence[str]]) -> Drawing:
    """Lay out a graph: every box to the right of its inputs, near their height.

    No arrow is drawn where a longer path leads from the input to the box.

    Args:
        labels: key → title, detail and state of each box, every box after its inputs.
        needs: key → keys of its inputs.
    """
    depth: dict[str, int] = {}
    layers: list[list[str]] = []
    for key in labels:
        depth[key] = 1 + max((depth[need] for need in needs[key]), default=-1)
        layers += [[] for _ in range(depth[key] + 1 - len(layers))]
        layers[depth[key]].append(key)
    height = max(map(len, layers)) * (BOX[1] + GAP[1])
    places: dict[str, Point] = {}
    for number, layer in enumerate(layers):
        layer.sort(key=lambda key: _mean([places[need][1] for need in needs[key]]))
        top = (height - len(layer) * (BOX[1] + GAP[1]) + GAP[1]) / 2
        for row, key in enumerate(layer):
            places[key] = (number * (BOX[0] + GAP[0]), top + row * (BOX[1] + GAP[1]))
    boxes = [Box(key, *labels[key], *places[key]) for key in labels]
    direct = _direct(labels, needs)
    arrows = [_arrow(places[need], places[key]) for key in labels for need in direct[key]]
    return Drawing(len(layers) * (BOX[0] + GAP[0]) - GAP[0], height, boxes, arrows)


def _direct(keys: Iterable[str], needs: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """key → its inputs that are not inputs of its other inputs, at any distance; every key after its inputs."""
    before = dict[str, set[str]]()
    for key in keys:
        before[key] = set(needs[key]).union(*(before[need] for need in needs[key]))
    return {
        key: [need for need in dict.fromkeys(needs[key]) if not any(need in before[other] for other in needs[key])]
        for key in before
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _arrow(start: Point, end: Point) -> str:
    x, y = start[0] + BOX[0], start[1] + BOX[1] / 2
    to_x, to_y = end[0], end[1] + BOX[1] / 2
    bend = GAP[0] / 2
    return f"M{x:g} {y:g} C{x + bend:g} {y:g} {to_x - bend:g} {to_y:g} {to_x:g} {to_y:g}"
