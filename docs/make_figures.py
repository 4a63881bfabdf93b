"""Run experiments, record their results, and write the tables of the documents from the records.

A record, docs/figures/NAME.json, has the versions and rows of `notbugs show --json`, and the commit that made each
evaluation. A table is marked by the line `<!-- table:NAME -->` above its block, one of some evaluations alone by
`<!-- table:NAME EVALUATION ... -->`. tests/test_docs.py compares the tables with the records, and the versions in the
records with those that the configurations have now.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from pipeline.experiment import spec
from pipeline.experiment.graph import Node, build
from pipeline.experiment.sweeps import split_name
from pipeline.report import tables
from pipeline.run.preflight import wanted

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "docs" / "figures"
NOTBUGS = str(Path(sys.executable).with_name("notbugs"))
UNUSED = ("per_class", "confusion")
"""Parts of a row that no table in the documents needs, and that are most of it."""
TABLE = re.compile(
    r"(?<=^<!-- table:)(?P<name>[\w-]+)(?P<only>[ \w-]*) -->\n```\n(?P<table>.*?)(?=^```$)", re.MULTILINE | re.DOTALL
)

Record = dict[str, Any]


@click.command(help=__doc__)
@click.argument("names", nargs=-1)
@click.option("--only", multiple=True, help="This evaluation alone; what is recorded of others stays.")
@click.option("--run", "runs", multiple=True, help="Run nothing: record this run, which another machine made in parts.")
@click.option("--commit", help="Commit that made the runs.  [default: this one]")
def main(names: tuple[str, ...], only: tuple[str, ...], runs: tuple[str, ...], commit: str | None) -> None:
    commit = commit or _output("git", "describe", "--always", "--dirty").strip()
    for name in names:
        if not runs:
            make(name, only)
        for shown in runs or (name,):
            record(name, shown, commit, joining=bool(only or runs))
    for page in pages():
        before = page.read_text(encoding="utf-8")
        if (after := rendered(before)) != before:
            page.write_text(after, encoding="utf-8")


def pages() -> list[Path]:
    """The documents that may have marked tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def read(name: str) -> Record:
    """The record of a configuration."""
    record: Record = json.loads((FIGURES / f"{name}.json").read_text(encoding="utf-8"))
    return record


def rendered(page: str) -> str:
    """A page with each marked table as its record has it."""
    return TABLE.sub(_table, page)


def _table(found: re.Match[str]) -> str:
    rows, only = read(found["name"])["rows"], found["only"].split()
    bases = [split_name(row["evaluation"])[0] for row in rows]
    if missing := set(only) - set(bases):
        raise SystemExit(f"{found['name']} has no record of {', '.join(sorted(missing))}")
    shown = [row for row, base in zip(rows, bases, strict=True) if not only or base in only]
    return f"{found['name']}{found['only']} -->\n```\n{tables.result_text(shown)}\n"


def make(name: str, only: Sequence[str]) -> None:
    """Make what the default store lacks of an experiment."""
    options = ["--engine", "inline", *(f"--only={evaluation}" for evaluation in only)]
    subprocess.run([NOTBUGS, "run", f"configs/{name}.yaml", *options], cwd=ROOT, check=True)


def record(name: str, run: str, commit: str, joining: bool) -> None:
    """Record the results of a run, or of an experiment's latest, with those recorded before if `joining`."""
    shown = json.loads(_output(NOTBUGS, "show", run, "--json"))
    made = {
        "commits": dict.fromkeys((row["evaluation"] for row in shown["rows"]), commit),
        "versions": {node: progress["version"] for node, progress in shown["nodes"].items()},
        "rows": [{key: value for key, value in row.items() if key not in UNUSED} for row in shown["rows"]],
    }
    FIGURES.mkdir(exist_ok=True)
    if joining and (FIGURES / f"{name}.json").exists():
        made = joined(read(name), made, build(spec.read(ROOT / f"configs/{name}.yaml")))
    (FIGURES / f"{name}.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def joined(before: Record, made: Record, nodes: list[Node]) -> Record:
    """A record with the evaluations of an older one that are still of the configuration, whose nodes these are."""
    names = {node.name for node in nodes if node.group == "evaluations"}

    def versions(evaluations: Iterable[str]) -> dict[str, str]:
        return {node.id: node.version for node in wanted(nodes, tuple(evaluations))}

    kept = {
        evaluation: commit
        for evaluation, commit in before["commits"].items()
        if evaluation in names - set(made["commits"]) and versions([evaluation]).items() <= before["versions"].items()
    }
    rows = [row for row in before["rows"] if row["evaluation"] in kept]
    return {
        "commits": kept | made["commits"],
        "versions": (versions(kept) if kept else {}) | made["versions"],
        "rows": sorted(rows + made["rows"], key=lambda row: str(row["evaluation"])),
    }


def _output(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
