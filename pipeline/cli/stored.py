"""Commands about what a store holds: show, verify."""

import sys

import click

from pipeline.catalog import describe, listing, names
from pipeline.cli.group import main
from pipeline.cli.options import json_option, store_option
from pipeline.cli.output import print_json, print_results, recorded, results_as_json
from pipeline.run import artifacts, runs, tags
from pipeline.run.engines import reason_of
from pipeline.store import Store
from pipeline.terminal import echo
from stages.errors import BadInput, did_you_mean


@main.command()
@click.argument("name", required=False)
@click.option(
    "--all", "everything", is_flag=True, help="Of a run: every table, also on a terminal, not only the headline."
)
@store_option
@json_option
def show(name: str | None, everything: bool, store: str, as_json: bool) -> None:
    """Show the results of a run, or describe a dataset, model or evaluation: how it was made, its figures, its path.

    NAME is a run, an experiment, for its latest run with results (default: the latest in the store), or a node, such as
    `rand`, `datasets/rand`, or `rand/VERSION`, where VERSION may be a tag or the first digits. All matching versions
    are shown, the newest first.
    """
    place = Store(store)
    found = names.versions(place, name) if name else []
    if name and not found:
        past = place.folders("runs")
        if name not in past and name not in map(runs.experiment_of, past):
            raise BadInput(names.refusal(place, name, past, "node, run or experiment"))
    if not found:
        _show_run(place, name, everything, as_json)
        return
    models = any(one.group == "models" for one in found)
    evaluations = listing.entries(place, ("evaluations",)) if models else ()
    named = {run: runs.versions(record) for run, record in runs.records(place).items() if record}
    about = [describe.described(place, one, named, evaluations) for one in found]
    if as_json:
        print_json({"found": about})
    else:
        echo("\n\n".join(map(describe.as_text, about)))


def _show_run(store: Store, name: str | None, everything: bool, as_json: bool) -> None:
    found = recorded(store, name, with_results=True)
    if as_json:
        print_json(results_as_json(store, found))
    else:
        echo(f"run {found['run']}: {found['state']}\nstore {store.url}")
        print_results(store, found, everything)


@main.command()
@click.argument("nodes", nargs=-1, metavar="[NAMES]...")
@click.option("--keep", is_flag=True, help="Only report; discard nothing.")
@store_option
@json_option
def verify(nodes: tuple[str, ...], keep: bool, store: str, as_json: bool) -> None:
    """Read every byte of the store, or of the nodes NAMES, and check it against manifests and commit marks.

    Damaged files are discarded (their commit marks are removed), so that the next run makes them again. A NAME is as
    for `notbugs show`.
    """
    place = Store(store)
    folders, records = _chosen(place, nodes)
    damages: list[artifacts.Damage] = []
    left: list[str] = []
    unfinished: list[str] = []
    for folder in [*folders, *(f"runs/{name}" for name in records), *([] if nodes else [tags.ROOT])]:
        found, is_node = _verified(place, folder), folder in folders
        damages += found
        if is_node and not found and not place.exists(f"{folder}/manifest.json"):
            unfinished.append(folder)
        if not as_json and (found or is_node):
            state = "unfinished" if folder in unfinished else "whole"
            echo(f"{folder}: {f'{len(found)} damaged' if found else state}")
            for damage in found:
                echo(f"  {damage.file} {damage.reason}")
        if found and not keep and (why := _withdraw(place, found)):
            left.append(f"{folder}: {why}")
    for text in left:
        echo(f"could not be discarded: {text}", err=True)
    if as_json:
        listed = [{"folder": d.folder, "file": d.file, "reason": d.reason, "shard": d.shard} for d in damages]
        about = {"verified": folders, "unfinished": unfinished, "damaged": listed}
        print_json(about | {"withdrawn": bool(listed) and not keep and not left})
    elif damages:
        echo("The next run rebuilds the damaged files." if not keep else "Nothing was discarded (--keep).")
    sys.exit(1 if damages else 0)


def _chosen(store: Store, asked: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Folders of the nodes, and names of the runs, that are to be verified; by default all.

    Raises:
        BadInput: a name stands for nothing, or there is nothing.
    """
    named = {name: artifacts.named(store, name) for name in asked}
    folders = sorted({f for each in named.values() for f in each}) if asked else artifacts.folders(store)
    records = [name for name in runs.names(store) if not asked or name in asked]
    if missing := [name for name, each in named.items() if not each and name not in records]:
        raise BadInput(f"{store.url} has no node {missing[0]} to verify{did_you_mean(missing[0], names.known(store))}")
    if not folders and not records:
        raise BadInput(f"there is nothing in {store.url} to verify")
    return folders, records


def _verified(store: Store, folder: str) -> list[artifacts.Damage]:
    if folder == tags.ROOT:
        return [
            artifacts.Damage(folder, path.removeprefix(f"{folder}/"), artifacts.NOT_OURS)
            for path, tag in tags.every(store).items()
            if tag is None
        ]
    if folder.startswith("runs/"):
        return runs.verify(store, folder.removeprefix("runs/"))
    return artifacts.verify(store, folder)


def _withdraw(store: Store, found: list[artifacts.Damage]) -> str | None:
    """Withdraw damaged files; returns the reason if the store does not allow it."""
    folder = found[0].folder
    try:
        if folder == tags.ROOT or folder.startswith("runs/"):
            for damage in found:
                store.set_aside(f"{folder}/{damage.file}")
        else:
            artifacts.withdraw(store, folder, {damage.shard for damage in found if damage.shard is not None})
    except (BadInput, OSError) as error:
        return reason_of(error)
    return None
