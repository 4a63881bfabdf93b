"""Commands that show a store, and take datasets out of it: card, export, push, index."""

from typing import TYPE_CHECKING

import click

from pipeline.catalog import names
from pipeline.cli.group import main
from pipeline.cli.options import json_option, store_option
from pipeline.cli.output import counting, print_json
from pipeline.run import artifacts
from pipeline.run.artifacts import Artifact
from pipeline.store import Store
from pipeline.terminal import echo, size
from stages.errors import BadInput

if TYPE_CHECKING:
    from pipeline.publish.push import Plan


def _version(store: Store, name: str) -> Artifact:
    """The newest finished version that a name stands for.

    Raises:
        BadInput: there is none, or nodes of two groups have the name.
    """
    folder = names.one(store, name).folder
    if (made := artifacts.artifact_at(store, folder)) is None:
        raise BadInput(f"{folder} was removed meanwhile: run its experiment again")
    return made


def _dataset(store: Store, name: str) -> Artifact:
    return _version(store, name if name.startswith("datasets/") else f"datasets/{name}")


@main.command()
@click.argument("name")
@store_option
def card(name: str, store: str) -> None:
    """Rebuild the card of a dataset: README.md for the Hugging Face Hub, croissant.json, and a picture of samples.

    NAME is a dataset (its newest version), or `datasets/NAME/VERSION`. A run writes the cards of the datasets that it
    makes. This command adds what the newest run with the dataset has: the results of models trained on it, and `about`
    of the experiment file.
    """
    from pipeline.publish import card as cards

    place = Store(store)
    for path in cards.write_again(place, _dataset(place, name)):
        echo(place.at(path))


@main.command()
@store_option
def index(store: str) -> None:
    """Write index.html of the whole store: runs with their verdicts, datasets with pictures, models, evaluations.

    One page of less than 2 MB that loads nothing from the network; its links to reports and cards are relative to the
    store. Each run writes it when it ends.
    """
    from pipeline.publish import index as page

    place = Store(store)
    echo(place.at(page.write(place)))


@main.command("export")
@click.argument("name")
@click.argument("dest")
@click.option(
    "--to",
    "form",
    type=click.Choice(["imagefolder", "parquet", "wids", "mds", "npz"]),
    required=True,
    help="The format.",
)
@store_option
@json_option
def export_(name: str, dest: str, form: str, store: str, as_json: bool) -> None:
    """Write dataset NAME in another format to DEST, an empty folder or s3:// or gs:// URL.

    \b
    imagefolder  SPLIT/CLASS/KEY.png, for torchvision's ImageFolder
    parquet      with an image column and a card, for pandas, duckdb and the Hugging Face Hub's viewer
    wids         the shards under unique names with an index, for random access by wids
    mds          MosaicML Streaming
    npz          one array of pixels per split, for numpy

    Labels keep their numbers. Every file is read back after it is written. The same command again continues after an
    interruption. NAME is a dataset (its newest version), or `datasets/NAME/VERSION`.
    """
    from pipeline.publish.export import export

    place, to = Store(store), _destination(dest)
    done = export(place, _dataset(place, name), form, to, counting("shards"))
    if as_json:
        print_json({"dest": to.url, "format": form, "files": done.files, "bytes": done.bytes, "found": done.found})
    else:
        found = f"; {done.found} of {done.units} parts were there already" if done.found else ""
        echo(f"{to.url}: {done.files:,} files, {size(done.bytes)}{found}")


def _destination(dest: str) -> Store:
    """The destination of a copy.

    Raises:
        BadInput: it cannot be written.
    """
    if not dest.strip():
        raise BadInput("DEST is empty; if a variable stands there, is it set?")
    place = Store(dest)
    place.refuse_unless_writable()
    return place


@main.command()
@click.argument("name")
@click.argument("dest")
@click.option("--dry-run", is_flag=True, help="Print what would be sent; send nothing.")
@click.option("--private", is_flag=True, help="On the Hub: make the repository private, if it is new.")
@store_option
@json_option
def push(name: str, dest: str, dry_run: bool, private: bool, store: str, as_json: bool) -> None:
    """Copy NAME to DEST: hf://USER/REPO on the Hugging Face Hub, or another store (folder, s3:// or gs:// URL).

    On the Hub, a dataset's shards, table, card and manifest are the files of a repository; the commit gets the version
    as its tag. This needs `pip install 'notbugs[hub]'` and `hf auth login`. In another store, a dataset, model or
    evaluation is what it is in this one, without what it was made from. What is there already is not sent again, so
    the same command continues after an interruption.

    NAME is a node (its newest version), such as `rand` or `datasets/rand`, or `datasets/NAME/VERSION`.
    """
    from pipeline.publish import hub, push

    place = Store(store)
    if dest.startswith(hub.SCHEME):
        repo, made, there = hub.repository(dest), _dataset(place, name), hub.api()
        plan = hub.plan(there, repo, place, made)
        if not dry_run:
            hub.push(there, repo, place, made, plan, private, counting("files"))
    else:
        if private:
            raise BadInput("--private is for the Hub: leave it out")
        made, to = _version(place, name), Store(dest) if dry_run else _destination(dest)
        plan = push.to_store(place, made, to)
        if not dry_run:
            push.copy(place, made, to, plan, counting("files"))
    _print_plan(plan, made, dry_run, as_json)


def _print_plan(plan: "Plan", made: Artifact, dry_run: bool, as_json: bool) -> None:
    send = [{"name": file.name, "bytes": file.bytes} for file in plan.send]
    if as_json:
        version = made.manifest["version"]
        print_json(
            {"dest": plan.dest, "version": version, "sent": not dry_run, "files": send, "deleted": list(plan.delete)}
        )
        return
    if dry_run:
        for file in plan.send:
            echo(f"{file.name}  {size(file.bytes)}")
        for old in plan.delete:
            echo(f"{old}  is deleted: it belongs to another version")
    verb = "would be sent" if dry_run else "sent"
    there = f"; {plan.there:,} were there already" if plan.there else ""
    echo(f"{plan.dest}: {len(plan.send):,} files, {size(plan.bytes)}, {verb}{there}")
