"""Charts are valid SVG in the page's own colours, and a graph's layout keeps every box readable."""

import re
from xml.etree import ElementTree

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.report.charts import BOX, Bar, Line, bars, graph, lines, scatter
from pipeline.terminal import visible

SHARES = st.floats(0, 1)
NAMES = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1, max_size=30)

LINES = [
    Line("a", [1, 10, 100], [0.1, 0.5, 0.9], [0.0, 0.4, 0.8], [0.2, 0.6, 1.0]),
    Line("", [1, 10], [0, 1], dashed=True, colour=9),
]
BARS = [Bar("headline", 0.8, 0.7, 0.9), Bar("control", 0.1, 0.0, 0.2, 1)]


def charts(name: str, said: str) -> list[str]:
    return [
        lines(name, said, LINES, "steps", "share", log=True, level=("chance", 0.1)),
        bars(name, said, BARS, "accuracy", ("chance", 0.1)),
        scatter(name, said, {"ours": [(0.1, 0.2)], "theirs": [(0.3, 0.4)]}, "x", "y", [0.1], [0], True, ["resnet18"]),
    ]


@settings(max_examples=3)
@given(said=st.text(st.characters(exclude_categories=["Cc", "Cs"])))
def test_a_chart_is_whole_svg_that_says_what_it_shows(said):
    for chart in charts("a", said):
        root = ElementTree.fromstring(chart)
        assert root.get("aria-label") == said and root.get("viewBox") and root.get("width") is None


def test_a_chart_takes_every_colour_from_the_page():
    for chart in charts("a", ""):
        used = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", chart))
        assert used <= {"none", "var(--ink)", "var(--rule)", "var(--paper)", *(f"var(--c{i})" for i in range(8))}
        assert "var(--ink)" in used and "var(--c0)" in used


def test_charts_of_other_names_share_no_ids():
    ids = [set(re.findall(r' id="([^"]+)"', charts(name, "")[0])) for name in ("a", "b")]
    assert ids[0] and not ids[0] & ids[1]
    for chart in charts("a", ""):
        known = set(re.findall(r' id="([^"]+)"', chart))
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', chart)) <= known


def test_the_same_chart_has_the_same_bytes():
    assert charts("a", "b") == charts("a", "b")


@settings(max_examples=20)
@given(share=SHARES, levels=st.lists(st.floats(0, 0.5), max_size=2))
def test_no_line_of_a_baseline_crosses_the_value_beside_a_bar(share, levels):
    chart = bars("a", "", [Bar("a bar", share, share, share)], "x", *(("level", level) for level in levels))
    label = re.search(r'd="M ([\d.]+) [^"]*"[^>]*fill: var\(--paper\)', chart)
    lines = [float(x) for x in re.findall(r'd="M ([\d.]+) [^"]*"[^>]*stroke-dasharray[^>]*stroke-width: 1.5', chart)]
    assert label is not None and len(lines) == 2 * len(levels), "each in the chart and in its legend"
    left, right = float(label[1]), float(label[1]) + 28
    assert not [x for x in lines[: len(levels)] if left < x < right]


@settings(max_examples=6)
@given(name=NAMES)
def test_names_are_shown_as_they_are(name):
    chart = bars("a", "", [Bar(name, 0.5, 0.4, 0.6)], "accuracy", ("chance", 0.1))
    texts = ["".join(text.itertext()) for text in ElementTree.fromstring(chart).iter("text")]
    assert " ".join(name.split()) in {" ".join(text.split()) for text in texts}


@pytest.mark.parametrize("number", [1, 12])
def test_a_chart_grows_with_what_it_shows_and_stays_as_wide(number):
    chart = bars("a", "", [Bar(f"b{i}", 0.5, 0.4, 0.6) for i in range(number)], "accuracy", ("chance", 0.1))
    _, _, width, height = map(float, ElementTree.fromstring(chart).get("viewBox", "").split())
    assert width == 360 and height > 25 * number


@given(
    needs=st.lists(st.sets(st.integers(0, 14)), min_size=1, max_size=15).map(
        lambda drawn: {f"n{i}": [f"n{j}" for j in sorted(needed) if j < i] for i, needed in enumerate(drawn)}
    )
)
def test_every_box_stands_right_of_what_it_is_made_from_and_on_no_other(needs):
    drawing = graph({key: (key, "", "done") for key in needs}, needs)
    at = {box.key: box for box in drawing.boxes}
    assert all(at[need].x + BOX[0] < at[key].x for key in needs for need in needs[key])
    whole = nx.DiGraph(needs)
    assert len(drawing.arrows) == nx.transitive_reduction(whole).number_of_edges()
    for one in drawing.boxes:
        assert 0 <= one.x <= drawing.width - BOX[0] and 0 <= one.y <= drawing.height - BOX[1]
        for other in drawing.boxes:
            assert one is other or abs(one.x - other.x) >= BOX[0] or abs(one.y - other.y) >= BOX[1]


@settings(max_examples=10)
@given(last=st.integers(1, 400))
def test_a_learning_curve_ends_at_a_tick(last):
    chart = lines("a", "", [Line("a", list(range(1, last + 1)), [0.5] * last)], "epoch", "accuracy")
    assert {"1", str(last)} <= set(map(str.strip, ElementTree.fromstring(chart).itertext()))


@pytest.mark.parametrize("name", ["a\x1b[2J", "\udcff", "<b>&", "$x^{2$", "\u202egnp", "猫", "a\nb", "\x00"])
def test_a_name_is_drawn_whatever_signs_it_has(name):
    for chart in (
        lines("a", "", [Line(name, [1, 2], [0.1, 0.2])], "steps", "share"),
        bars("a", "", [Bar(name, 0.5, 0.4, 0.6)], "accuracy", ("chance", 0.1)),
        scatter("a", "", {"ours": [(0.1, 0.2)]}, "x", "y", shares=True, names=[name]),
    ):
        text = "".join(ElementTree.fromstring(chart).itertext())
        assert visible(name) in text
