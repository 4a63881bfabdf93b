"""What the sections of a page consist of: charts, tables, images, and the numbers behind them as CSV files."""

import base64
import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.report.charts import Drawing
from pipeline.report.gallery import Gallery
from pipeline.report.results import RunResults

LINES = 200
"""Lines shown of a table."""


@dataclass(frozen=True)
class Chart:
    """An SVG with what stands around it.

    Attributes:
        text: its caption.
        name, data: file name and rows of the numbers behind it.
        again: the command that draws it again.
        title: above it, if it is one of several that look alike.
    """

    svg: str
    text: str
    name: str
    data: Sequence[Sequence[object]]
    again: str
    title: str = ""

    @property
    def csv(self) -> str:
        """Its numbers as a data URL."""
        return csv_url(self.data)


def csv_url(rows: Sequence[Sequence[object]]) -> str:
    """Rows as a CSV file (RFC 4180) in a data URL."""
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return f"data:text/csv;charset=utf-8;base64,{base64.b64encode(out.getvalue().encode()).decode()}"


def command(run: RunResults) -> str:
    """The command that draws the page of a run again from the store."""
    return f"notbugs report {run.run['run']}"


@dataclass(frozen=True)
class Table:
    """Lines of text under a head; a cell may have several lines.

    Attributes:
        title: above the table.
        fold: the line that unfolds it; empty for a table that is open.
        note: a paragraph above a table that unfolds.
        stacks: whether a narrow page shows each line as a block, its cells one below the other with their headings.
    """

    head: Sequence[str]
    lines: Sequence[Sequence[str]]
    title: str = ""
    fold: str = ""
    note: str = ""
    stacks: bool = False

    @property
    def csv(self) -> str:
        """All its lines as a data URL."""
        return csv_url([self.head, *self.lines])

    @property
    def shown(self) -> Sequence[Sequence[str]]:
        return self.lines[:LINES]

    @property
    def more(self) -> int:
        """Number of lines that are not shown."""
        return max(0, len(self.lines) - LINES)


@dataclass(frozen=True)
class Matrix:
    """Shares in [0, 1] for pairs of names, None for a pair without any.

    Attributes:
        title: above it; of the first of a section it is open, the others unfold.
        text: what a cell is.
        corner: what the rows and the columns are.
        rows, columns: their names.
        shares: row by row.
        name, again: as of a `Chart`.
    """

    title: str
    text: str
    corner: str
    rows: Sequence[str]
    columns: Sequence[str]
    shares: Sequence[Sequence[float | None]]
    name: str
    again: str

    @property
    def csv(self) -> str:
        """Its numbers as a data URL."""
        return csv_url([[self.corner, *self.columns], *([r, *s] for r, s in zip(self.rows, self.shares, strict=True))])

    @property
    def lines(self) -> list[tuple[str, Sequence[float | None]]]:
        """Each row's name and shares."""
        return list(zip(self.rows, self.shares, strict=True))

    @property
    def upright(self) -> bool:
        """Whether the names of the columns are short enough to stand side by side."""
        return max(map(len, self.columns)) * len(self.columns) <= 70


@dataclass(frozen=True)
class Section:
    """A section of the page. Its first gallery and its first matrix are open, the others unfold, as do its sources:
    pairs of a title and a text."""

    title: str
    text: str
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    galleries: Sequence[Gallery] = ()
    matrices: Sequence[Matrix] = ()
    drawing: Drawing | None = None
    sources: Sequence[tuple[str, str]] = ()
