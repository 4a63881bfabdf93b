"""Write the tables of the documents from recorded runs.

    python docs/make_figures.py --write            write each marked table from its record
    python docs/make_figures.py --record NAME...   run configs/NAME.yaml first, and record its results

A record, docs/figures/NAME.json, has the versions and rows of `notbugs show --json`, and the commit that made them. A
table is marked by the line `<!-- table:NAME -->` above its block. tests/test_docs.py compares the tables with the
records, and the versions in the records with those that the configurations have now.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline.report import tables

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "docs" / "figures"
UNUSED = ("per_class", "confusion")
"""Parts of a row that no table in the documents needs, and that are most of it."""
TABLE = re.compile(r"(?<=^<!-- table:)([\w-]+)( -->\n```\n)(.*?)(?=^```$)", re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    """The documents that may have marked tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def read(name: str) -> dict[str, Any]:
    """The record of a configuration."""
    record: dict[str, Any] = json.loads((FIGURES / f"{name}.json").read_text(encoding="utf-8"))
    return record


def rendered(page: str) -> str:
    """A page with each marked table as its record has it."""
    return TABLE.sub(lambda found: f"{found[1]}{found[2]}{tables.result_text(read(found[1])['rows'])}\n", page)


def record(name: str) -> None:
    """Make what the default store lacks of an experiment, and record its results."""
    notbugs = str(Path(sys.executable).with_name("notbugs"))
    subprocess.run([notbugs, "run", f"configs/{name}.yaml", "--engine", "inline"], cwd=ROOT, check=True)
    shown = json.loads(_output(notbugs, "show", "--json"))
    made = {
        "commit": _output("git", "describe", "--always", "--dirty").strip(),
        "versions": {node: progress["version"] for node, progress in shown["nodes"].items()},
        "rows": [{key: value for key, value in row.items() if key not in UNUSED} for row in shown["rows"]],
    }
    FIGURES.mkdir(exist_ok=True)
    (FIGURES / f"{name}.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def _output(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def main(option: str, *names: str) -> None:
    """Record if asked to, then write the tables."""
    if option not in ("--write", "--record") or (option == "--write") == bool(names):
        sys.exit(__doc__)
    for name in names:
        record(name)
    for page in pages():
        before = page.read_text(encoding="utf-8")
        if (after := rendered(before)) != before:
            page.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["--help"]))
