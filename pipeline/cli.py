"""The command line."""

import errno
import functools
import importlib.metadata
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, get_args

import click
from click.core import ParameterSource

from pipeline import picture, terminal
from pipeline.cluster import JOB_VARIABLE, Cluster, Job, Request
from pipeline.cost import estimate
from pipeline.experiment import spec
from pipeline.experiment.graph import GROUPS, build
from pipeline.experiment.spec import Experiment
from pipeline.launch import DATA, STORE, RunOptions, engine
from pipeline.report import results, tables
from pipeline.report.scores import percent
from pipeline.run import artifacts, runs
from pipeline.run.engines import Engine, expected, reason_of
from pipeline.run.jobs import Context
from pipeline.run.preflight import NodeStatus, preflight, wanted
from pipeline.run.progress import watcher
from pipeline.store import Store
from pipeline.terminal import Unheard, clock, echo, relay, visible
from stages import own
from stages.errors import BadInput, did_you_mean
from stages.images import encode_png
from stages.recipes import Norm, fraction, is_own

INTERRUPTED = 130


class _Number(click.FloatRange):
    """A finite number, or a fraction. NaN would pass every range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(fraction(value), param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


store_option = click.option(
    "--store",
    default=STORE,
    envvar="NOTBUGS_STORE",
    show_default=True,
    help="Folder, or s3:// or gs:// URL.",
)
data_option = click.option(
    "--data",
    default=DATA,
    envvar="NOTBUGS_DATA",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of local sources and checkpoints, and for downloads.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
only_option = click.option(
    "--only", multiple=True, metavar="NODE", help="Make only this node and its inputs; may be repeated."
)
job_server_option = click.option(
    "--address",
    envvar="RAY_API_SERVER_ADDRESS",
    default="http://localhost:8265",
    show_default=True,
    help="Job server of the cluster.",
)


def worker_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options about workers; the command receives them as one `RunOptions`."""

    @click.option(
        "--workers",
        type=click.IntRange(1),
        help="Parallel workers per node [default: one per GPU, or per CPU].",
    )
    @click.option(
        "--gpu/--no-gpu",
        default=None,
        help="One GPU per worker and per training; an autoscaling cluster grows to match "
        "[default: if the cluster has GPUs].",
    )
    @click.option(
        "--shard-timeout",
        type=_Number(0, 1e8, min_open=True),
        metavar="SECONDS",
        help="Limit for one step of a shard; a slower step is ended and retried elsewhere "
        "[default: ten times the slowest step so far, at least 600].",
    )
    @functools.wraps(command)
    def wrapped(*args: Any, workers: int | None, gpu: bool | None, shard_timeout: float | None, **others: Any) -> Any:
        return command(*args, options=RunOptions(workers, gpu, shard_timeout), **others)

    return wrapped


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options about the engine and its workers; the command receives them as one `RunOptions`."""

    @click.option(
        "--engine",
        type=click.Choice(["ray", "inline"]),
        default="ray",
        show_default=True,
        help="inline runs in this process, without Ray.",
    )
    @worker_options
    @click.option("--address", help="Ray cluster to join: auto, or host:6379 [default: a local one].")
    @functools.wraps(command)
    def wrapped(*args: Any, engine: str, address: str | None, options: RunOptions, **others: Any) -> Any:
        return command(*args, options=replace(options, engine=engine, address=address), **others)

    return wrapped


class _Command(click.Command):
    """A command that refuses empty and unprintable values, such as those of unset shell variables."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given, _, parameters = self.make_parser(ctx).parse_args(list(args))
        for parameter in parameters if not ctx.resilient_parsing else []:
            value = given.get(str(parameter.name))
            for one in value if isinstance(value, list | tuple) else [value]:
                if isinstance(one, str) and (why := _mistake_in(one, str(parameter.name))):
                    raise click.UsageError(f"{parameter.get_error_hint(ctx)} {why}", ctx)
        return super().parse_args(ctx, args)


LOCAL = ("file", "image", "out")
"""Parameters that are local paths: the operating system allows any bytes in them."""


def _mistake_in(value: str, name: str) -> str | None:
    """Why a value of an option or argument must be a mistake; None if it need not be."""
    if not value.strip():
        return "is empty; if a variable stands there, is it set?"
    if "\0" in value:
        return "has a NUL character"
    if name not in LOCAL and any("\ud800" <= sign <= "\udfff" for sign in value):
        return f"is not UTF-8 text, got {value!r}"
    if name in ("store", "data") and value.startswith("~") and os.path.expanduser(value) == value:  # noqa: PTH111
        return f"must name a known home folder, got {value!r}"
    if name == "store" and re.match(r"[A-Za-z][\w+.-]+:(?!//)", value):  # s3:/bucket would be a folder beside us
        return f"must be a URL (with ://) or a folder (such as ./{value})"
    return None


class _Group(click.Group):
    """The outermost layer: every error becomes one sentence and an exit code."""

    command_class = _Command

    def main(self, *args: Any, **options: Any) -> Any:
        with terminal.session():
            try:
                code = super().main(*args, **{**options, "standalone_mode": False})
            except click.ClickException as error:
                sys.exit(_misused(error))
            except click.Abort as abort:  # click's word for Ctrl-C before the command has begun
                sys.exit(_interrupted(abort.__cause__))
            except (OSError, Unheard) as error:
                sys.exit(_unheard(error if isinstance(error, Unheard) else Unheard(error)))
        sys.exit(code)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            _refuse_lost_folder()
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupted:
            sys.exit(_interrupted(interrupted))
        except (click.ClickException, click.exceptions.Exit, Unheard):
            raise
        except Exception as error:
            if ctx.params["debug"]:
                raise
            hint = "" if expected(error) else "; notbugs --debug shows where"
            _say_error(f"{reason_of(error)}{hint}")
            asked = isinstance(error, BadInput) or getattr(error, "errno", None) == errno.ENAMETOOLONG
            sys.exit(2 if asked else 1)


def _say_error(sentence: str) -> None:
    echo(f"Error: {visible(sentence)}", err=True)


def _interrupted(error: BaseException | None) -> int:
    terminal.say_interrupted()
    return getattr(error, "code", INTERRUPTED)


def _misused(error: click.ClickException) -> int:
    if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
        echo(error.message, err=True)
    else:
        context = getattr(error, "ctx", None)
        help_ = f" ({context.command_path} --help)" if context is not None else ""
        _say_error(f"{error.format_message()}{help_}")
    return error.exit_code


def _unheard(error: Unheard) -> int:
    if not error.reader_left:  # a reader that closes the pipe, as `head` does, has read enough
        _say_error(str(error))
    return 1


def _refuse_lost_folder() -> None:
    try:
        str(Path.cwd()).encode()
    except OSError as error:
        raise BadInput(
            f"the current folder no longer exists ({error.strerror}): change to another, for example with cd ~"
        ) from error
    except UnicodeEncodeError as error:
        raise BadInput(f"the name of the current folder is not UTF-8: {Path.cwd()}; change to another") from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(artifacts.version("notbugs"), prog_name="notbugs")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def main(debug: bool) -> None:
    """Datasets that separate robust from non-robust features.

    An experiment file defines datasets, models and evaluations, and how each is made from the others.
    `notbugs run FILE` makes what is missing; run it again to continue after a stop.

    Exit codes: 0 done, 1 something failed, 2 bad request, 130 Ctrl-C (143 SIGTERM, 129 a closed terminal).
    """
    terminal.show_tracebacks(debug)


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@store_option
@data_option
@only_option
@json_option
@click.option("--cost", is_flag=True, help="Estimate the remaining time and cost from trial runs on this machine.")
@click.option("--gpus", type=click.IntRange(1, 100_000), help="With --cost: also the time on this many such devices.")
@click.option("--workers", type=click.IntRange(1), help="With --cost: workers of a run on this machine, as for run.")
def plan(
    file: Path,
    store: str,
    data: Path,
    only: tuple[str, ...],
    as_json: bool,
    cost: bool,
    gpus: int | None,
    workers: int | None,
) -> None:
    """Print the graph of FILE: each node, its version, and whether it is done. Writes nothing.

    With --cost, each kind of work is tried on a few images, in as many processes as a run has workers. The estimate
    gives, for every node that is not done: images, steps (forward and backward passes of a batch), shards, size,
    device-hours (of a GPU, or of a CPU where there is none), and the time of a run for it alone; with --gpus N, also
    the time on N such devices. For attacks and inversions, other batch sizes are tried and the fastest is reported. A
    trial takes about ten seconds for each kind of work, longer for large images.
    """
    if not cost and (gpus or workers):
        raise BadInput("--gpus and --workers need --cost: add it, or leave them out")
    context = _context(store, data)
    statuses = preflight(wanted(build(spec.read(file)), only), context, fetch=False)
    estimated = _estimated(statuses, context, workers) if cost else None
    if as_json:
        nodes = [_status_as_json(status) | _cost_as_json(status, estimated, gpus) for status in statuses]
        total = {"cost": estimate.total_as_json(estimated, gpus)} if estimated else {}
        _print_json({"store": context.store.url, "nodes": nodes} | total)
    else:
        _print_plan(context.store, statuses)
        if estimated is not None:
            echo(f"\n{estimate.as_text(estimated, gpus)}")


def _print_plan(store: Store, statuses: list[NodeStatus]) -> None:
    lines = [
        [
            s.node.id,
            s.node.stage,
            s.node.version,
            _size(s.facts),
            s.state,
            ", ".join(p.name for p in s.node.inputs.values()),
        ]
        for s in statuses
    ]
    echo(f"store {store.url}\n")
    echo(tables.table(["node", "stage", "version", "images", "state", "from"], lines))
    for status in statuses:
        for line in tables.left_out_lines(status.facts):
            echo(f"{status.node.id}: {line}")
        for split, share in status.facts.get("majority", {}).items():
            echo(f"{status.node.id} {split}: a constant prediction scores {percent(share)}")


def _estimated(statuses: list[NodeStatus], context: Context, workers: int | None) -> estimate.Estimate:
    return estimate.estimate(statuses, context, workers, lambda what: echo(f"trying: {what}", err=True))


def _cost_as_json(status: NodeStatus, estimated: estimate.Estimate | None, gpus: int | None) -> dict[str, Any]:
    name = status.node.id
    if estimated is None:
        return {}
    if name not in estimated.nodes:
        return {"cost": None}
    return {"cost": estimate.as_json(estimated.nodes[name], estimated.site, gpus, estimated.batches.get(name))}


def _status_as_json(status: NodeStatus) -> dict[str, Any]:
    node = status.node
    said = {
        "node": node.id,
        "stage": node.stage,
        "version": node.version,
        "there": status.there,
        "state": status.state,
    }
    return said | {
        "shards_there": status.partial,
        "images": status.facts.get("counts"),
        "majority": status.facts.get("majority"),
        "skipped": status.facts.get("skipped", {}),
        "inputs": {role: parent.id for role, parent in node.inputs.items()},
    }


def _size(facts: Any) -> str:
    return " + ".join(f"{count:,} {split}" for split, count in facts.get("counts", {}).items())


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@store_option
@data_option
@run_options
@only_option
@json_option
def run(file: Path, store: str, data: Path, options: RunOptions, only: tuple[str, ...], as_json: bool) -> None:
    """Make whatever FILE (- for standard input) defines and the store lacks, then print the table.

    Finished work is never repeated: after a failure or an interruption, run the same command again.
    """
    _run(spec.read(file), _context(store, data), options, only, as_json)


@main.command()
@click.argument("run", required=False)
@store_option
@run_options
@only_option
@json_option
@click.option(
    "--data", type=click.Path(file_okay=False, path_type=Path), help="As for run [default: the folder of that run]."
)
@click.option(
    "--modules",
    type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path),
    help="Folder of the experiment's own networks; code named by a store runs only with this option.",
)
def resume(
    run: str | None,
    store: str,
    options: RunOptions,
    only: tuple[str, ...],
    as_json: bool,
    data: Path | None,
    modules: Path | None,
) -> None:
    """Continue RUN (default: the latest in the store) with its experiment, --only and --data."""
    found = _recorded(Store(store), run)
    experiment = spec.parse(found["experiment"])
    if modules is None:
        _refuse_code(experiment, found["run"], Path(found["here"]))
    context = _context(store, data or Path(found["data"]), modules)
    _run(experiment, context, options, only or tuple(found["only"]), as_json)


def _refuse_code(experiment: Experiment, run: str, here: Path) -> None:
    """Refuse code that a record names, except modules in the current folder if the run was started there.

    Raises:
        BadInput: the record names other code.
    """
    archs = sorted({node.arch or "" for node in build(experiment) if is_own(node.arch)})
    others = [arch for arch in archs if not (here == Path.cwd() and _lies_in(here, arch))]
    if others:
        raise BadInput(
            f"the record of run {run} names code outside the current folder, {', '.join(others)}, which a store may "
            "not load: name its folder with --modules, or use `notbugs run FILE`, which continues as well"
        )


def _lies_in(folder: Path, arch: str) -> bool:
    """Whether an arch is a module in a folder rather than an installed one."""
    module = arch.rpartition(":")[0]
    if own.is_file(module):
        return (folder / module).resolve().is_relative_to(folder.resolve())
    top = module.partition(".")[0]
    installed = top in sys.stdlib_module_names or top in importlib.metadata.packages_distributions()
    return not installed and PathFinder.find_spec(top, [str(folder)]) is not None


def _run(experiment: Experiment, context: Context, options: RunOptions, only: tuple[str, ...], as_json: bool) -> None:
    terminal.if_interrupted("Nothing was begun; the same command again begins it.")
    begin = engine(experiment, context, options)
    checked = preflight(wanted(build(experiment), only), context)
    context.store.refuse_unless_writable()
    watch = watcher()
    attempt = runs.Run(experiment, context, only, watch, checked)
    del checked  # a source's listing is large, and the run lets go of it
    echo(f"run {attempt.record.id}\nstore {context.store.url}", err=True)
    with watch:
        complete = _attempt(attempt, begin)
    terminal.if_interrupted(f"Finished work is kept; see it with: notbugs report --store {context.store.url}")
    _conclude(context.store, attempt.record.id, complete, as_json)


def _attempt(attempt: runs.Run, begin: Callable[[], Engine]) -> bool:
    if JOB_VARIABLE in os.environ:  # Ray stops a job by SIGINT, and what a shell began in the background ignores it
        terminal.listen(force=True)
    engine = begin()
    try:
        terminal.if_interrupted(f"Finished work is kept; continue with: {_again(attempt.context.store)}")
        return attempt.go(engine)
    finally:
        engine.close()


def _again(store: Store) -> str:
    if JOB_VARIABLE in os.environ:
        return "notbugs submit, as before"
    return f"notbugs resume --store {store.url}"


def _conclude(store: Store, run: str, complete: bool, as_json: bool) -> None:
    """Write the page, then print the results: a closed terminal does not cost the page."""
    found = runs.load_run(store, run)
    try:
        from pipeline.report import page  # here: what draws takes a second to load

        where = f"page {store.at(page.write(store, found))}"
    except Exception as error:  # noqa: BLE001 - the results stand without the page
        where = f"The page could not be written: {visible(reason_of(error))}; retry with: notbugs report"
    if as_json:
        _print_json(_results_as_json(store, found))
    else:
        _print_results(store, found)
        for node, progress in found["nodes"].items():
            if progress["why"]:
                echo(f"{node}: {progress['state']}, {visible(progress['why'])}", err=True)
    echo(where, err=True)
    if not complete:
        echo(f"The run failed; fix the cause, then continue with: {_again(store)}", err=True)
        sys.exit(1)


@main.command()
@click.argument("run", required=False)
@store_option
@json_option
def status(run: str | None, store: str, as_json: bool) -> None:
    """Show the progress of RUN (default: the latest in the store)."""
    place = Store(store)
    found = _recorded(place, run)
    if as_json:
        _print_json(found)
        return
    echo(f"run {found['run']}: {found['state']}{', ' + found['why'] if 'why' in found else ''}\nstore {place.url}\n")
    lines = []
    for node, p in found["nodes"].items():
        seconds = f"{p['seconds']} s" if p["seconds"] is not None else ""
        count = f"{p['done']} of {p['total']}" if p["total"] else ""
        lines.append([node, p["state"], count, seconds, _at_work(p), str(p["retries"] or ""), p["why"] or ""])
    echo(tables.table(["node", "state", "done", "time", "workers busy", "retries", "why"], lines))
    if again := found["store_retries"] + sum(p["store_retries"] for p in found["nodes"].values()):
        echo(f"\nretried requests to the store: {again}")


def _at_work(progress: dict[str, Any]) -> str:
    """Average number of workers at work on its shards, from its start to its end."""
    work = progress.get("work")
    return f"{work / progress['seconds']:.2f}" if work and progress["seconds"] else ""


@main.command("report")
@click.argument("run", required=False)
@store_option
@click.option("--out", type=click.Path(path_type=Path), help="Also write a copy to this file.")
def report_(run: str | None, store: str, out: Path | None) -> None:
    """Rebuild the page of RUN (default: the latest in the store): report.html, one file that needs no network."""
    from pipeline.report import page

    _refuse_no_place(out)
    place = Store(store)
    path = page.write(place, _recorded(place, run))
    if out is not None:
        _write(out, place.read(path))
    echo(out or place.at(path))


def _refuse_no_place(out: Path | None) -> None:
    """Refuse an output path that cannot be written, before any work is done."""
    with _written(out):
        if out is not None and not out.parent.is_dir():
            raise BadInput(f"--out {out}: cannot be written: there is no folder {out.parent}")
        if out is not None and out.is_dir():
            raise BadInput(f"--out {out}: cannot be written: it is a folder; name a file in it")


def _write(path: Path, content: bytes) -> None:
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


@main.command()
@click.argument("image", type=click.Path(path_type=Path))
@click.option(
    "--model",
    required=True,
    help="A model of the store, such as standard, or a torchvision classifier, such as resnet50 (weights are fetched).",
)
@click.option("--to", "target", required=True, metavar="CLASS", help="The class, by name or number.")
@click.option("--arch", metavar="MODULE:NAME", help="The model's network, if it is your own code.")
@click.option("--out", type=click.Path(path_type=Path), help="The picture to write [default: IMAGE-as-CLASS.png].")
@click.option("--norm", type=click.Choice(get_args(Norm)), default="l2", show_default=True, help="Norm of the ball.")
@click.option("--eps", type=_Number(0, min_open=True), metavar="LENGTH", help="Radius in units of [0, 1], 0.5 or "
              "8/255 [default: L2 0.5 for 32 pixels, larger in proportion; L∞ 8/255].")  # fmt: skip
@click.option("--steps", type=click.IntRange(1), default=100, show_default=True, help="Steps of PGD.")
@click.option("--rotate", is_flag=True, help="Search over rotations and shifts instead.")
@store_option
@data_option
@json_option
def attack(
    image: Path,
    model: str,
    target: str,
    arch: str | None,
    out: Path | None,
    norm: str,
    eps: float | None,
    steps: int,
    rotate: bool,
    store: str,
    data: Path,
    as_json: bool,
) -> None:
    """Attack one IMAGE toward a class: the pig that becomes an airliner.

    Writes a picture of the original, the magnified perturbation and the result, with the model's predictions, and the
    adversarial image as a file of its own.
    """
    if rotate:
        _refuse_idle("norm", "eps", "steps")
    _refuse_no_place(out)
    context = _context(store, data)
    attacked, classes = picture.find_model(context, model, arch)
    pixels, shape = picture.read(image, attacked.design.shape), attacked.design.shape
    ball = {"norm": norm, "eps": eps or RADIUS[norm](shape), "steps": steps}
    number = picture.class_number(target, classes)
    made = picture.move(pixels, attacked, classes, number, {"method": "spatial"} if rotate else ball)
    drawn = out or image.with_name(f"{image.stem}-as-{re.sub(r'[^A-Za-z0-9]+', '-', classes[number])}.png")
    moved = drawn.with_name(f"{drawn.stem}-image.png")
    _write(drawn, picture.draw(made))
    _write(moved, encode_png(made.after))
    if as_json:
        _print_json({**made.as_json(), "picture": str(drawn), "image": str(moved)})
    else:
        _print_answers(made, number, classes)
        echo(f"\n{made.how}: perturbed by L2 {made.l2:.3f}, L∞ {made.linf:.3f}\n{drawn}\n{moved}")


RADIUS: Mapping[str, Callable[[tuple[int, int, int]], float]] = {
    "l2": picture.radius,
    "linf": lambda shape: 8 / 255,
}
"""Norm → the usual radius for images of some channels, height and width."""


def _refuse_idle(*names: str) -> None:
    """Refuse options of an attack that rotations do not use."""
    source = click.get_current_context().get_parameter_source
    if idle := [f"--{name}" for name in names if source(name) is not ParameterSource.DEFAULT]:
        raise BadInput(f"--rotate: does not use {' and '.join(idle)}; leave out one or the other")


def _print_answers(made: picture.Picture, number: int, classes: list[str]) -> None:
    """The model's answers to an image before and after."""
    lines = [
        [when, percent(made.confidence[i, number]), *(f"{name} {percent(share)}" for name, share in made.top(i))]
        for i, when in enumerate(("before", "after"))
    ]
    echo(tables.table(["", classes[number], "first", "second", "third"][: len(lines[0])], lines))


@main.command()
@click.argument("name", required=False)
@store_option
@json_option
def show(name: str | None, store: str, as_json: bool) -> None:
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
            _print_json({"found": manifests})
        else:
            echo("\n\n".join("\n".join(tables.manifest_lines(m)) for m in manifests))
        return
    found = _recorded(place, name, runs.has_results)
    if as_json:
        _print_json(_results_as_json(place, found))
    else:
        echo(f"run {found['run']}: {found['state']}\nstore {place.url}")
        _print_results(place, found)


def _recorded(
    store: Store, run: str | None, fits: Callable[[dict[str, Any]], bool] = lambda run: True
) -> dict[str, Any]:
    """A run on record; newer ones whose record is damaged are skipped with a note."""

    def pass_over(name: str) -> None:
        echo(f"skipped run {name}: its record is missing or damaged", err=True)

    return runs.load_run(store, run, fits, pass_over)


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
        _print_json({"verified": folders, "damaged": listed, "withdrawn": bool(listed) and not keep and not left})
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


# ------------------------------------------------------------------------------------------ on a cluster


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@job_server_option
@store_option
@worker_options
@only_option
@click.option("--data", help="Folder of local sources and checkpoints, on the cluster's machines.")
@click.option("--pip", multiple=True, metavar="PACKAGE", help="Package to install for the job; may be repeated.")
@click.option(
    "--env",
    multiple=True,
    metavar="NAME[=VALUE]",
    help="Environment variable of the job, not a secret; without a value, its value here. May be repeated.",
)
@click.option("--follow", "-f", is_flag=True, help="Show its progress until it ends; exit as it does.")
def submit(
    file: Path,
    address: str,
    store: str,
    options: RunOptions,
    only: tuple[str, ...],
    data: str | None,
    pip: tuple[str, ...],
    env: tuple[str, ...],
    follow: bool,
) -> None:
    """Submit FILE to a Ray cluster as a job.

    The job carries this project and, if the experiment names modules of its own, the current folder. If the same job
    is running, it is joined; if it failed or was stopped, it is continued.
    """
    experiment = spec.read(file)
    wanted(build(experiment), only)
    place = Store(store)
    if place.local and "://" not in store and not Path(store).is_absolute():
        raise BadInput(f"--store {store}: the cluster needs an s3:// or gs:// URL, or a folder that all machines share")
    variables = dict(_variable(text) for text in env)
    passed_on = [*options.arguments(), *(["--data", data] if data is not None else [])]
    request = Request(experiment, place, only, tuple(passed_on), pip, variables)
    cluster = Cluster(address)
    job, fresh = cluster.submit(request, Path.cwd())
    echo(job.id)
    echo("submitted" if fresh else "already running: joined", err=True)
    if follow:
        _follow(cluster, job)
    else:
        echo(f"watch it with: notbugs logs {job.id} --follow --address {address}", err=True)


def _variable(text: str) -> tuple[str, str]:
    name, given, value = text.partition("=")
    if not given and name not in os.environ:
        raise BadInput(f"--env {name}: has no value here; give it one: --env {name}=…")
    return name, value if given else os.environ[name]


@main.command()
@job_server_option
@json_option
def jobs(address: str, as_json: bool) -> None:
    """List the cluster's jobs, oldest first."""
    found = Cluster(address).jobs()
    if as_json:
        _print_json({"jobs": [{**vars(job), "live": job.live} for job in found]})
        return
    lines = [[job.id, job.state, job.experiment, _took(job), job.store] for job in found]
    echo(tables.table(["job", "state", "experiment", "time", "store"], lines) or f"no jobs at {address}")


def _took(job: Job) -> str:
    return "" if job.started is None else clock((job.ended or time.time()) - job.started)


@main.command()
@click.argument("job", required=False)
@job_server_option
@click.option("--follow", "-f", is_flag=True, help="Follow the job until it ends; exit as it does.")
def logs(job: str | None, address: str, follow: bool) -> None:
    """Print the log of JOB (default: the newest running job, else the newest)."""
    cluster = Cluster(address)
    found = cluster.job(job)
    if follow:
        _follow(cluster, found)
    else:
        relay(cluster.logs(found))


def _follow(cluster: Cluster, job: Job) -> None:
    terminal.if_interrupted(f"The job continues. Stop it with: notbugs stop {job.id} --address {cluster.address}")
    ended = cluster.follow(job, relay)
    echo(f"{ended.id}: {ended.state}", err=True)
    sys.exit(ended.exit_code)


@main.command()
@click.argument("job", required=False)
@job_server_option
def stop(job: str | None, address: str) -> None:
    """Stop JOB (default: the newest running). Finished work is kept; submit it again to continue."""
    cluster = Cluster(address)
    found = cluster.job(job)
    if not found.live:
        echo(f"{found.id}: already {found.state}")
        return
    ended = cluster.stop(found)
    echo(f"{ended.id}: {ended.state}")
    sys.exit(1 if ended.live else 0)


def _context(store: str, data: Path, here: Path | None = None) -> Context:
    return Context(Store(store), data.expanduser().absolute(), here or Path.cwd())


def _results_as_json(store: Store, run: dict[str, Any]) -> dict[str, Any]:
    nodes = {name: {k: p[k] for k in ("state", "version", "why", "seconds")} for name, p in run["nodes"].items()}
    return {
        "run": run["run"],
        "state": run["state"],
        "store": store.url,
        "rows": results.result_rows(store, run),
        "nodes": nodes,
    }


def _print_results(store: Store, run: dict[str, Any]) -> None:
    rows = results.result_rows(store, run)
    if rows:
        echo("\n" + tables.result_text(rows))
    for line in tables.left_out_of(store, run):
        echo(line, err=True)


def _print_json(value: Any) -> None:
    echo(json.dumps(value, indent=1))  # ASCII, for any terminal
