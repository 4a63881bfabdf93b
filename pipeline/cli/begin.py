"""Commands for beginners: init, schema, doctor, pack."""

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from pipeline.cli.group import main
from pipeline.cli.options import data_option, json_option, run_options, store_option
from pipeline.cli.output import context_of, counting, print_json
from pipeline.experiment import spec, yaml12
from pipeline.experiment.graph import build
from pipeline.launch import RunOptions
from pipeline.report.tables import left_out_lines
from pipeline.store import Store
from pipeline.terminal import echo
from stages.errors import BadInput
from stages.recipes import SOURCES, refuse_secrets

EXPERIMENT = "experiment.yaml"
"""The file that `init` writes unless told otherwise; the experiment then takes the name of its images."""

LISTED = 20
"""Classes up to which their names are printed."""

MARKS = {"good": "ok", "attention": "warn", "broken": "fail"}


@main.command()
@click.argument(
    "kind", required=False, metavar="[KIND]", type=click.Choice(["digits", "images", "cifar10", "imagenet"])
)
@click.option("--images", metavar="PLACE", help="Image folder, parquet files or URL, relative to --data.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=EXPERIMENT,
    show_default=True,
    help="The file to write, whose name the experiment gets; with the default, it gets that of the images. An existing "
    "file is not overwritten.",
)
@click.option("--size", metavar="PIXELS", type=click.IntRange(1), help="Side of the images [default: from theirs].")
@click.option(
    "--arch",
    metavar="NETWORK",
    help="Network of the models: a name, or module:name for your own class or function [default: for the size].",
)
@click.option("--weights", metavar="FILE", help="Attack this checkpoint, relative to --data; --arch is its network.")
@data_option
def init(
    kind: str | None,
    images: str | None,
    out: Path,
    size: int | None,
    arch: str | None,
    weights: str | None,
    data: Path,
) -> None:
    """Write a commented experiment file for your images.

    Without KIND, for the images in --data: CIFAR-10, ImageNet, an image folder (train/<class>/<image>) or parquet
    files, whose classes, sizes and colours it reads; for scikit-learn's digits if there are none.

    With --arch, the models have that network; with --weights besides, the attacked model is that checkpoint.

    \b
    digits    scikit-learn's handwritten digits: a minute, no download
    images    the image folder or parquet files at --images, or in --data
    cifar10   the paper's CIFAR-10, sized for two CPU cores
    imagenet  ImageNet with a pretrained ResNet-50, for GPUs
    """
    from pipeline.begin import experiment
    from pipeline.experiment.schema import schema as schema_

    begun = experiment.start(kind, images, data.expanduser(), size).with_network(arch, weights)
    reads_data = weights is not None or begun.load["source"] not in ("sklearn-digits", "cifar10")
    where = f" --data {data}" if reads_data else ""
    named = out.stem if out.name != EXPERIMENT else images or kind or begun.load.get("root") or begun.load["source"]
    text = experiment.as_yaml(_name_of(named), begun, where)
    spec.parse(yaml12.load(text.encode()))
    _write_new(out, text)
    beside, also = out.with_name(experiment.SCHEMA), ""
    if not beside.exists():
        _write_new(beside, json.dumps(schema_(), indent=1, ensure_ascii=False) + "\n")
        also = f"\n{beside}: with it, editors check and complete the file"
    if weights is not None and _missing(weights, data):
        echo(f"Warning: there is no file {weights} in {data}: put it there before the run", err=True)
    if not begun.tested:
        echo("Warning: there is no test split, so scores will be of training images; name one in `load`", err=True)
    chosen = (
        f"Network {begun.arch}, learners {begun.learner_arch}; attack in L2 at ε {begun.eps:g}, {begun.steps} steps"
    )
    echo(f"{out}: {begun.title}\n{chosen}{also}\nNext: notbugs plan {out}{where}")


def _missing(weights: str, data: Path) -> bool:
    """Whether a checkpoint named by a path is not there; a name without suffix may be one of torchvision's."""
    from stages.pretrained import fetch

    place = fetch.local(weights, data.expanduser())
    return place is not None and bool(place.suffix) and not place.exists()


def _write_new(path: Path, text: str) -> None:
    """Write a file that must not exist yet."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise BadInput(
            f"{path} exists already and was not overwritten: delete it, or name another file with --out"
        ) from error
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror}") from error


def _name_of(place: str) -> str:
    """A name for what lies at a place: the last part of its path, in letters that names allow."""
    last = place.partition("?")[0].rstrip("/").rpartition("/")[2].removesuffix(".parquet")
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", last).strip("-_.")[:40] or "images"


@main.command()
def schema() -> None:
    """Print the JSON Schema of the experiment file, with which editors complete and check it.

    Name the schema's file in the first line of an experiment: # yaml-language-server: $schema=notbugs.schema.json
    """
    from pipeline.experiment.schema import schema as schema_

    echo(json.dumps(schema_(), indent=1, ensure_ascii=True))


@main.command()
@store_option
@data_option
@click.option("--address", help="Ray cluster to check, as host:6379 [default: a local one].")
@json_option
def doctor(store: str, data: Path, address: str | None, as_json: bool) -> None:
    """Check whether this machine is ready for a run; each line says what to do.

    Checks Python and packages, GPU, Ray, the store (in which it writes and removes an empty file), disk, shared memory
    and ports. Exit code 1 if a run would fail.
    """
    from pipeline.begin.doctor import examine

    findings = []
    for finding in examine(store, data.expanduser(), address):
        findings.append(finding)
        if not as_json:
            remedy = f": {finding.remedy}" if finding.remedy else ""
            echo(f"{MARKS[finding.state]:<5} {finding.what:<17} {finding.found}{remedy}")
    broken = any(finding.state == "broken" for finding in findings)
    if as_json:
        print_json({"ready": not broken, "findings": [asdict(finding) for finding in findings]})
    sys.exit(1 if broken else 0)


@main.command()
@click.argument("source")
@click.argument("dest")
@click.option("--name", help="Name of the dataset in the store [default: from SOURCE].")
@click.option("--shard-size", type=click.IntRange(1), default=1000, show_default=True, help="Images per shard.")
@click.option("--resize", type=click.IntRange(1), help="Shorter side after resizing, in pixels [default: unchanged].")
@click.option("--crop", type=click.IntRange(1), help="Side of the centre crop, in pixels [default: none].")
@click.option("--limit", type=click.IntRange(1), help="At most this many images of each split.")
@store_option
@data_option
@run_options
@json_option
def pack(
    source: str,
    dest: str,
    name: str | None,
    store: str,
    data: Path,
    options: RunOptions,
    as_json: bool,
    **keys: int | None,
) -> None:
    """Pack images into WebDataset shards: train-000000.tar … in DEST, with a table and a manifest.

    SOURCE is an image folder (train/<class>/<image> and val/<class>/<image>, or <class>/<image>), parquet files with
    images (also a pattern, or their folder), each a path relative to --data or a URL; or cifar10, cifar100, mnist,
    fashion-mnist. DEST is a folder, or an s3:// or gs:// URL.

    It is a run of one dataset, which also stays in the store: after an interruption, the same command continues.
    Without --resize and --crop, the files are kept unchanged if all are png, all jpg or all webp.
    """
    from pipeline.begin.pack import lay_down, make, refuse_foreign
    from pipeline.begin.source import recipe_for

    for what, url in (("SOURCE", source), ("DEST", dest)):
        _refuse_secrets(what, url)
    place, context = Store(dest), context_of(store, data)
    recipe = recipe_for(source, context.data)
    known = SOURCES[recipe["source"]].model_fields
    given = {key: value for key, value in keys.items() if value is not None}
    if odd := [key for key in given if key not in known]:
        raise BadInput(f"--{odd[0]}: images of {source} are taken as they are; leave it out")
    name = name or _name_of(source)
    experiment = spec.parse({"name": name, "datasets": {name: {"load": {**recipe, **given}}}})
    (node,) = build(experiment)
    refuse_foreign(node.version, place)
    place.refuse_unless_writable()
    made = make(experiment, context, options)
    found = lay_down(context.store, made, place, counting("files"))
    patterns = _patterns(place, made.manifest["shards"])
    if as_json:
        facts = {"dest": place.url, "files": len(made.files) + 1, "there_before": found, "shards": patterns}
        print_json({"store": context.store.url, "node": node.id, "version": node.version, **facts})
        return
    for line in left_out_lines(made.manifest):
        echo(line)
    counts = " and ".join(f"{count:,} {split}" for split, count in made.manifest["counts"].items())
    echo(f"{place.url}: {counts} images in {len(made.manifest['shards']):,} shards\nIn an experiment:\n")
    shards = ", ".join(f'{split}: "{pattern}"' for split, pattern in patterns.items())
    names = made.manifest["classes"]
    classes = json.dumps(names, ensure_ascii=False) if len(names) <= LISTED else len(names)
    echo(f"  {name}: {{load: {{source: webdataset, shards: {{{shards}}}, classes: {classes}}}}}")


def _refuse_secrets(what: str, url: str) -> None:
    try:
        if "://" in url:
            refuse_secrets(url)
    except ValueError as error:
        raise BadInput(f"{what}: {error}") from error


def _patterns(place: Store, shards: dict[str, Any]) -> dict[str, str]:
    """Split → brace pattern of its shards."""
    last = dict[str, str]()
    for shard in sorted(shards):
        split, _, number = shard.rpartition("-")
        last[split] = number
    return {
        split: place.at(f"{split}-{{{'0' * len(number)}..{number}}}.tar" if int(number) else f"{split}-{number}.tar")
        for split, number in last.items()
    }
