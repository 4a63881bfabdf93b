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
    """An SVG, its caption, the file name and rows of the numbers behind it, and the command that draws it again."""

    svg: str
    text: str
    name: str
    data: Sequence[Sequence[object]]
    again: str

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
        stacks: whether a narrow page shows each line as a block, its cells one below the other with their headings.
    """

    head: Sequence[str]
    lines: Sequence[Sequence[str]]
    title: str = ""
    fold: str = ""
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
class Section:
    """A section of the page. Its first gallery is open, the others unfold."""

    title: str
    text: str
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    galleries: Sequence[Gallery] = ()
    drawing: Drawing | None = None
    source: str | None = None
