"""Commands that show a store, and take datasets out of it: card, export, push, index."""

import time
from collections.abc import Callable

import click

from pipeline.cli.group import main
from pipeline.cli.options import json_option, store_option
from pipeline.cli.output import print_json
from pipeline.run import artifacts
from pipeline.run.artifacts import Artifact
from pipeline.store import Store
from pipeline.terminal import echo, size
from stages.errors import BadInput, did_you_mean


def _dataset(store: Store, name: str) -> Artifact:
    """The newest version of a dataset, or the one named.

    Raises:
        BadInput: there is none.
    """
    if found := artifacts.by_name(store, name, ("datasets",)):
        return found[-1]
    known = store.folders("datasets")
    near = did_you_mean(name, known, f"it has {', '.join(known) or 'none'}")
    raise BadInput(f"{store.url} has no finished dataset {name}{near}")


@main.command()
@click.argument("name")
@store_option
def card(name: str, store: str) -> None:
    """Write the card of a dataset again: README.md for the Hugging Face Hub, croissant.json, and a picture of samples.

    NAME is a dataset (its newest version), or `datasets/NAME/VERSION`. A run writes the cards of the datasets that it
    makes. This command adds what the newest run that names the dataset knows: results of models trained on it, and
    `about` of the experiment file.
    """
    from pipeline.publish import card as cards

    place = Store(store)
    for path in cards.write_again(place, _dataset(place, name)):
        echo(place.at(path))


@main.command()
@store_option
def index(store: str) -> None:
    """Write index.html of the whole store: runs with their verdicts, datasets with pictures, models, evaluations.

    One page of less than 2 MB that loads nothing from elsewhere; its links to reports and cards work where the page
    lies. Each run writes it at its end.
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
    done = export(place, _dataset(place, name), form, to, _progress("shards"))
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


QUIET = 10.0
"""Seconds between two lines of progress."""


def _progress(what: str) -> Callable[[int, int], None]:
    """A function that prints how much is done, from time to time and at the end of long work."""
    printed = started = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal printed
        now = time.monotonic()
        if now - printed > QUIET or (done == total and now - started > QUIET):
            printed = now
            echo(f"{done} of {total} {what}", err=True)

    return show
