"""Commands that find, compare and keep what a store holds: ls, log, diff, tag, gc."""

import re
import sys
from datetime import datetime
from typing import Any

import click

from pipeline.catalog import diff as differences
from pipeline.catalog import gc as collection
from pipeline.catalog import lineage, listing, names
from pipeline.catalog.diff import Change
from pipeline.cli.group import main
from pipeline.cli.options import json_option, store_option
from pipeline.cli.output import print_json
from pipeline.experiment.graph import GROUPS
from pipeline.report import tables
from pipeline.run import runs, tags
from pipeline.store import Store
from pipeline.terminal import duration, echo, size
from stages.errors import BadInput, short


@main.command()
@click.argument("group", required=False, type=click.Choice([*GROUPS, "runs"]))
@store_option
@json_option
def ls(group: str | None, store: str, as_json: bool) -> None:
    """List what a store holds, the newest first: every version of its datasets, models and evaluations, and its runs.

    The state is finished, unfinished (a run continues it) or damaged (`notbugs verify`). The size is that of the
    files in a version's manifest.
    """
    place = Store(store)
    found = listing.entries(place, GROUPS if group is None else (group,)) if group != "runs" else []
    past = listing.run_entries(place) if group in (None, "runs") else []
    if as_json:
        print_json({"store": place.url, "nodes": [one.as_json() for one in found], "runs": past})
        return
    nodes = tables.table(["node", "version", "tags", "made", "samples", "size", "state"], list(map(_node_line, found)))
    attempts = tables.table(["run", "state", "nodes", "time"], list(map(_run_line, past)))
    echo("\n\n".join(filter(None, (nodes, attempts))) or f"{place.url} holds no {group or 'datasets, models or runs'}")


def _node_line(one: listing.Entry) -> list[str]:
    samples = "–" if one.samples is None else f"{one.samples:,}"
    state = f"{one.state}, {one.steps}" if one.steps else one.state
    return [one.node, one.version, ", ".join(one.tags), _minute(one.made), samples, size(one.bytes), state]


def _run_line(run: dict[str, Any]) -> list[str]:
    nodes = ", ".join(f"{count} {state}" for state, count in run["nodes"].items())
    return [run["run"], run["state"], nodes, duration(run["seconds"])]


def _minute(moment: str) -> str:
    return f"{datetime.fromisoformat(moment):%Y-%m-%d %H:%M}"


@main.command()
@click.argument("name")
@store_option
@json_option
def log(name: str, store: str, as_json: bool) -> None:
    """Show the lineage of NAME as a tree: what it was made from, and what was made from it.

    NAME is as for `notbugs show`; of several versions, the newest is taken. A version that occurs twice in a tree has
    its branches once; the second time, it ends in "…".
    """
    place = Store(store)
    up, down = lineage.lineage(place, names.one(place, name, finished=False).folder)
    if as_json:
        trees = {"made_from": up.as_json()["branches"], "used_by": down.as_json()["branches"]}
        print_json({"node": up.folder.rpartition("/")[0], "version": up.folder.rpartition("/")[2]} | trees)
        return
    echo(lineage.label(up))
    for title, branch in (("made from", up), ("used by", down)):
        echo("\n".join([f"\n{title}", *lineage.lines(branch.branches)]) if branch.branches else f"\n{title}: nothing")


@main.command()
@click.argument("a")
@click.argument("b")
@store_option
@json_option
def diff(a: str, b: str, store: str, as_json: bool) -> None:
    """Compare A and B: two versions of datasets, models or evaluations, or two runs.

    Prints which parameters differ, which inputs, and which figures, by how much. Each is as for `notbugs show`; of a
    name with several versions, the newest is taken: `notbugs diff rand/v1 rand`.
    """
    place = Store(store)
    past = place.folders("runs")
    if (a in past) != (b in past):
        raise BadInput(f"{a if a in past else b} is a run and the other is none: compare two runs, or two versions")
    if a in past:
        found = differences.of_runs(place, runs.load_run(place, a), runs.load_run(place, b))
        named = (a, b)
    else:
        one, other = names.one(place, a), names.one(place, b)
        found, named = differences.of_versions(place, one, other), (one.folder, other.folder)
    if as_json:
        parts = {kind: [change.as_json() for change in changes] for kind, changes in found.items()}
        print_json({"a": named[0], "b": named[1]} | parts)
        return
    echo(f"a: {named[0]}\nb: {named[1]}")
    for kind, changes in found.items():
        if changes:
            head = [kind, "a", "b", *(["b − a"] if kind == "figures" else [])]
            echo("\n" + tables.table(head, _lines(kind, changes)))
    if not any(found.values()):
        echo("\nno difference")


def _lines(kind: str, changes: list[Change]) -> list[list[str]]:
    lines = [[change.key, _value(change.a), _value(change.b)] for change in changes]
    if kind == "figures":
        for line, change in zip(lines, changes, strict=True):
            line.append("" if change.difference is None else f"{change.difference:+.6g}")
    return lines


def _value(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.6g}" if isinstance(value, float) else short(str(value), 40)


@main.command()
@click.argument("name")
@click.argument("version")
@click.argument("tag", required=False)
@click.option("--force", is_flag=True, help="Move the tag if another version has it.")
@click.option("--remove", is_flag=True, help="Remove the tag VERSION from NAME.")
@store_option
@json_option
def tag(name: str, version: str, tag: str | None, force: bool, remove: bool, store: str, as_json: bool) -> None:
    """Give VERSION of NAME a TAG, which then names it in any command: `notbugs show rand/v1`.

    VERSION is one that `notbugs ls` shows, its first digits, or another tag. A tag stays with its version unless it is
    moved with --force, and `notbugs gc` keeps what has one. To remove one: `notbugs tag NAME TAG --remove`.
    """
    place = Store(store)
    if remove == (tag is not None):
        raise BadInput("a tag is set with NAME VERSION TAG, and removed with NAME TAG --remove")
    if tag is None:
        entry = names.one(place, f"{name}/{version}", finished=False)
        tags.remove(place, entry.node, version)
    else:
        entry = names.tag(place, name, version, tag, force)
    if as_json:
        print_json({"node": entry.node, "version": entry.version, "tag": tag or version, "removed": remove})
    else:
        echo(f"{entry.node} {entry.version}: {'no longer ' if remove else ''}{tag or version}")


AGE = re.compile(r"(\d+(?:\.\d+)?)\s*(h|d|w)")
SECONDS = {"h": 3600, "d": 86_400, "w": 604_800}


class Age(click.ParamType):  # type: ignore[type-arg]
    """A time span: ``12h``, ``30d``, ``8w``. Gives seconds."""

    name = "age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        if (found := AGE.fullmatch(value)) is None:
            self.fail(f"{value} is no age; write hours, days or weeks, as 12h, 30d or 8w", param, ctx)
        return float(found[1]) * SECONDS[found[2]]


@main.command()
@click.option("--keep", type=click.IntRange(0), metavar="N", help="Keep the newest N finished versions of each name.")
@click.option("--older-than", type=Age(), metavar="AGE", help="Keep what is younger than AGE, as 12h, 30d or 8w.")
@click.option("--unreferenced", is_flag=True, help="Keep what any run on record names.")
@click.option("--dry-run", is_flag=True, help="List what would be removed; remove nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@store_option
@json_option
def gc(
    keep: int | None, older_than: float | None, unreferenced: bool, dry_run: bool, yes: bool, store: str, as_json: bool
) -> None:
    """Remove versions that nothing needs, after listing them with their sizes and asking.

    At least one of --keep, --older-than and --unreferenced is required; a version is removed only if all that are given
    allow it. Always kept are versions with a tag, versions in a run under way, whatever a kept version was made from,
    and the records and evaluations of runs. It is safe while a run is under way. A run that needs a removed version
    makes it again.
    """
    place, policy = Store(store), collection.Policy(keep, older_than, unreferenced)
    planned = collection.plan(place, policy)
    found = collection.sized(place, planned.removable)
    if not as_json:
        _print_removable(place, found)
    removed: list[listing.Entry] = []
    if found and not dry_run and (yes or _agreed(found, as_json)):
        sizes = {one.folder: one for one in found}
        for one in collection.collect(place, policy, sizes):
            removed.append(sizes[one.folder])
            echo(f"removed {one.folder}", err=True)
    if as_json:
        gone = {one.folder for one in removed}
        listed = [one.as_json() | {"removed": one.folder in gone} for one in found]
        print_json({"store": place.url, "bytes": _total(found), "versions": listed, "kept": dict(planned.kept)})
    elif removed:
        spared = f"; {len(found) - len(removed)} needed by now, and kept" if len(removed) < len(found) else ""
        echo(f"removed {_count(removed)}, {size(_total(removed))}{spared}")


def _print_removable(store: Store, found: list[listing.Entry]) -> None:
    if not found:
        echo(f"nothing to remove from {store.url}")
        return
    lines = [[size(one.bytes), one.node, one.version, _minute(one.made), one.state] for one in found]
    echo(tables.table(["size", "node", "version", "made", "state"], lines))
    echo(f"\n{_count(found)}, {size(_total(found))}")


def _count(found: list[listing.Entry]) -> str:
    return f"{len(found)} version{'s' * (len(found) != 1)}"


def _total(found: list[listing.Entry]) -> int:
    return sum(one.bytes for one in found)


def _agreed(found: list[listing.Entry], as_json: bool) -> bool:
    """Ask, and read the answer from standard input.

    Raises:
        BadInput: there is nobody to ask.
    """
    if not as_json:
        echo(f"Remove {_count(found)}, {size(_total(found))}? [y/N] ", err=True, nl=False)
        if answer := sys.stdin.readline():
            return answer.strip().lower() in ("y", "yes")
    raise BadInput("there is no terminal to confirm on: add --yes to remove, or --dry-run to list")
