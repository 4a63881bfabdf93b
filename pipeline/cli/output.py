"""Output that several commands share: documents, results, files that `--out` names."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import terminal
from pipeline.terminal import echo
from stages.errors import BadInput

if TYPE_CHECKING:
    from pipeline.run.jobs import Context
    from pipeline.store import Store


def context_of(store: str, data: Path, here: Path | None = None, check_files: bool = False) -> "Context":
    from pipeline.run.jobs import Context
    from pipeline.store import Store

    return Context(Store(store), data.expanduser().absolute(), here or Path.cwd(), check_files)


def results_as_json(store: "Store", run: dict[str, Any]) -> dict[str, Any]:
    from pipeline.report import results

    nodes = {name: {k: p[k] for k in ("state", "version", "why", "seconds")} for name, p in run["nodes"].items()}
    return {
        "run": run["run"],
        "state": run["state"],
        "store": store.url,
        "rows": results.result_rows(store, run),
        "nodes": nodes,
    }


def print_results(store: "Store", run: dict[str, Any], everything: bool = False) -> None:
    """Print the tables of a run: on a terminal the headline, unless everything is asked for; elsewhere all of them."""
    from pipeline.report import results, tables

    rows, width = results.result_rows(store, run), terminal.width()
    if rows and width and not everything:
        echo("\n" + tables.headline(rows, width, f"notbugs show {run['run']} --all --store {store.url}"))
    elif rows:
        echo("\n" + tables.result_text(rows, width))
    for line in tables.left_out_of(store, run):
        echo(line, err=True)


def print_json(value: Any) -> None:
    echo(json.dumps(value, indent=1))  # ASCII, for any terminal


def recorded(store: "Store", run: str | None, with_results: bool = False) -> dict[str, Any]:
    """A run on record, the newest or the newest with results; a newer one that is skipped is named in a note."""
    from pipeline.run import runs

    without = list[str]()

    def fits(record: dict[str, Any]) -> bool:
        if not with_results or runs.has_results(record):
            return True
        without.append(record["run"])
        return False

    def pass_over(name: str) -> None:
        echo(f"skipped run {name}: its record is missing or damaged", err=True)

    found = runs.load_run(store, run, fits, pass_over)
    if without and found["run"] not in without:
        echo(f"run {without[0]} has no results yet; {found['run']} is the latest that has", err=True)
    return found


def refuse_no_place(out: Path | None) -> None:
    """Refuse an output path that cannot be written, before any work is done."""
    with _written(out):
        if out is not None and not out.parent.is_dir():
            raise BadInput(f"--out {out}: cannot be written: there is no folder {out.parent}")
        if out is not None and out.is_dir():
            raise BadInput(f"--out {out}: cannot be written: it is a folder; name a file in it")


def write(path: Path, content: bytes) -> None:
    with _written(path):
        path.write_bytes(content)


@contextmanager
def _written(path: Path | None) -> Iterator[None]:
    """Raises:
    BadInput: a file that was asked for cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise BadInput(f"--out {path}: cannot be written: {error.strerror}") from error


QUIET = 10.0
"""Seconds between two lines of progress."""


def counting(what: str) -> Callable[[int, int], None]:
    """A function that prints how much is done, from time to time and at the end of long work."""
    printed = started = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal printed
        now = time.monotonic()
        if now - printed > QUIET or (done == total and now - started > QUIET):
            printed = now
            echo(f"{done} of {total} {what}", err=True)

    return show
