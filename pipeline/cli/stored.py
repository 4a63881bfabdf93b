"""Commands about what a store holds: show, verify."""

import sys

import click

from pipeline.cli.group import main
from pipeline.cli.options import json_option, store_option
from pipeline.cli.output import print_json, print_results, recorded, results_as_json
from pipeline.experiment.graph import GROUPS
from pipeline.report import tables
from pipeline.run import artifacts, runs
from pipeline.run.engines import reason_of
from pipeline.store import Store
from pipeline.terminal import echo
from stages.errors import BadInput, did_you_mean


@main.command()
@click.argument("name", required=False)
@click.option("--all", "everything", is_flag=True, help="Of a run: also on a terminal every table, not the headline.")
@store_option
@json_option
def show(name: str | None, everything: bool, store: str, as_json: bool) -> None:
    """Show the results of a run, or describe a dataset, model or evaluation.

    NAME is a run (default: the latest in the store) or a node, such as `rand` or `datasets/rand`.
    """
    place = Store(store)
    manifests = [one.manifest for one in artifacts.by_name(place, name)] if name else []
    if name and not manifests and name not in (past := place.folders("runs")):
        near = did_you_mean(name, [*_names(place), *past]) or "; `notbugs status` lists the latest run and its nodes"
        raise BadInput(f"{place.url} has no node or run named {name}{near}")
    if manifests:
        if as_json:
            print_json({"found": manifests})
        else:
            echo("\n\n".join("\n".join(tables.manifest_lines(m)) for m in manifests))
        return
    found = recorded(place, name, runs.has_results)
    if as_json:
        print_json(results_as_json(place, found))
    else:
        echo(f"run {found['run']}: {found['state']}\nstore {place.url}")
        print_results(place, found, everything)


def _names(store: Store) -> list[str]:
    """The names of a store's nodes: both ``rand`` and ``datasets/rand``."""
    return [name for group in GROUPS for base in store.folders(group) for name in (base, f"{group}/{base}")]


@main.command()
@click.argument("names", nargs=-1)
@click.option("--keep", is_flag=True, help="Only report; discard nothing.")
@store_option
@json_option
def verify(names: tuple[str, ...], keep: bool, store: str, as_json: bool) -> None:
    """Read every byte of the store, or of the nodes NAMES, and check it against manifests and commit marks.

    Damaged files are discarded (their commit marks are removed), so that the next run rebuilds them.
    """
    place = Store(store)
    folders = [f for f in artifacts.folders(place) if not names or {f.split("/")[1], f.rpartition("/")[0]} & set(names)]
    records = [name for name in runs.names(place) if not names or name in names]
    known = {name for f in folders for name in (f.split("/")[1], f.rpartition("/")[0])} | set(records)
    if missing := [name for name in names if name not in known]:
        raise BadInput(f"{place.url} has no node {missing[0]} to verify{did_you_mean(missing[0], _names(place))}")
    if not folders and not records:
        raise BadInput(f"there is nothing in {place.url} to verify")
    damages: list[artifacts.Damage] = []
    left: list[str] = []
    for folder in [*folders, *(f"runs/{name}" for name in records)]:
        of_run = folder.startswith("runs/")
        found = runs.verify(place, folder.removeprefix("runs/")) if of_run else artifacts.verify(place, folder)
        damages += found
        if not as_json and (found or not of_run):
            echo(f"{folder}: {f'{len(found)} damaged' if found else 'whole'}")
            for damage in found:
                echo(f"  {damage.file} {damage.reason}")
        if found and not keep and (why := _withdraw(place, found)):
            left.append(f"{folder}: {why}")
    for text in left:
        echo(f"could not be discarded: {text}", err=True)
    if as_json:
        listed = [{"folder": d.folder, "file": d.file, "reason": d.reason, "shard": d.shard} for d in damages]
        print_json({"verified": folders, "damaged": listed, "withdrawn": bool(listed) and not keep and not left})
    elif damages:
        echo("The next run rebuilds the damaged files." if not keep else "Nothing was discarded (--keep).")
    sys.exit(1 if damages else 0)


def _withdraw(store: Store, found: list[artifacts.Damage]) -> str | None:
    """Withdraw damaged files; returns the reason if the store does not allow it."""
    folder = found[0].folder
    try:
        if folder.startswith("runs/"):
            store.set_aside(f"{folder}/run.json")
        else:
            artifacts.withdraw(store, folder, {damage.shard for damage in found if damage.shard is not None})
    except (BadInput, OSError) as error:
        return reason_of(error)
    return None
