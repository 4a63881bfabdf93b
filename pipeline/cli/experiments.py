"""Commands that make an experiment, and show its runs: plan, run, resume, status, report."""

import os
import shlex
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline import terminal
from pipeline.cli.group import main
from pipeline.cli.options import check_files_option, data_option, json_option, only_option, run_options, store_option
from pipeline.cli.output import context_of, print_json, print_results, recorded, refuse_no_place, results_as_json, write
from pipeline.launch import Prepared, RunOptions, prepare
from pipeline.terminal import duration, echo, visible
from stages.errors import BadInput, some

if TYPE_CHECKING:
    from pipeline.cost.estimate import Estimate
    from pipeline.experiment.spec import Experiment
    from pipeline.run.jobs import Context
    from pipeline.run.preflight import NodeStatus
    from pipeline.store import Store


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@store_option
@data_option
@only_option
@check_files_option
@json_option
@click.option("--cost", is_flag=True, help="Estimate the remaining time and cost from trial runs on this machine.")
@click.option("--gpus", type=click.IntRange(1, 100_000), help="With --cost: also the time on this many such devices.")
@click.option("--workers", type=click.IntRange(1), help="With --cost: workers of a run on this machine, as for run.")
def plan(
    file: Path,
    store: str,
    data: Path,
    only: tuple[str, ...],
    check_files: bool,
    as_json: bool,
    cost: bool,
    gpus: int | None,
    workers: int | None,
) -> None:
    """Print the graph of FILE: each node, its version, and whether it is done. Writes nothing.

    For a node whose version was made before and is to be made again, it prints the reason; for a new version, if the
    experiment ran before, the keys and inputs that differ from the newest one of that name in the store. Notes on the
    recipes come last.

    With --cost, each kind of work is tried on a few images, in as many processes as a run has workers. The estimate
    gives, for every node that is not done: images, steps (forward and backward passes of a batch), shards, size,
    device-hours (of a GPU, or of a CPU where there is none), and the time to make it alone; with --gpus N, also
    the time on N such devices. For attacks and inversions, other batch sizes are tried and the fastest is reported. A
    trial takes about ten seconds for each kind of work, longer for large images.
    """
    if not cost and (gpus or workers):
        raise BadInput("--gpus and --workers need --cost: add it, or leave them out")
    from pipeline.cost import estimate
    from pipeline.experiment import spec
    from pipeline.experiment.graph import build
    from pipeline.run import runs
    from pipeline.run.preflight import preflight, wanted

    context, experiment = context_of(store, data, check_files=check_files), spec.read(file)
    with terminal.noting_long("checking") as at:
        had = runs.had(context.store, experiment.name)
        statuses = preflight(wanted(build(experiment), only), context, fetch=False, at=at, among=had)
    estimated = _estimated(statuses, context, workers) if cost else None
    if as_json:
        nodes = [_status_as_json(status) | _cost_as_json(status, estimated, gpus) for status in statuses]
        total = {"cost": estimate.total_as_json(estimated, gpus)} if estimated else {}
        print_json({"store": context.store.url, "nodes": nodes} | total)
    else:
        _print_plan(context.store, statuses)
        if estimated is not None:
            echo(f"\n{estimate.as_text(estimated, gpus, terminal.width())}")
        if not all(status.there for status in statuses):
            echo("" if cost else f"\nTime and size: {_command('plan')} --cost")
            echo(f"Next: {_command('run')}")


def _print_plan(store: "Store", statuses: "list[NodeStatus]") -> None:
    """Print a plan, with what differs from the versions of earlier runs of the experiment."""
    from pipeline.report import tables
    from pipeline.report.scores import percent
    from pipeline.run.preflight import remarks
    from pipeline.run.why import sentence

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
    head = ["node", "stage", "version", "images", "state", "from"]
    echo(tables.fitted(head, lines, terminal.width(), ("node", "state", "stage")))
    following = dict.fromkeys(_following(statuses))
    for status in statuses:
        if status.node.id in following:
            continue
        if status.why:
            what = "to make again" if status.again else "differs from this experiment's newest version"
            echo(f"{status.node.id}: {what}: {visible(sentence(status.why))}")
        elif status.there and status.awaits:
            echo(f"{status.node.id}: made again if {', '.join(status.awaits)} comes out with other content")
    if following:
        echo(f"{some(list(following))}: {'follow' if len(following) > 1 else 'follows'} from that")
    for status in statuses:
        for line in tables.left_out_lines(status.facts):
            echo(f"{status.node.id}: {line}")
        if shares := status.facts.get("majority"):
            scores = ", ".join(f"{percent(share)} of {split}" for split, share in shares.items())
            echo(f"{status.node.id}: predicting the most frequent class for every image scores {scores}")
        if status.to_make and (checked := status.job.checked()):
            echo(f"{status.node.id}: {visible(checked)}")
    for line in remarks(statuses):
        echo(line)


def _following(statuses: "list[NodeStatus]") -> list[str]:
    """Nodes made anew only because inputs are, of which the plan gives the reason."""
    explained = {status.node.id for status in statuses if status.why}
    return [
        status.node.id
        for status in statuses
        if status.why and not status.again
        if all(one.kind == "input" and status.node.inputs[one.key].id in explained for one in status.why)
    ]


def _command(name: str) -> str:
    """Another command with the file and the options that `plan` was given on its command line."""
    context = click.get_current_context()
    command = ["notbugs", name, str(context.params["file"])]
    for option in ("store", "data", "only"):
        if context.get_parameter_source(option) is click.core.ParameterSource.COMMANDLINE:
            given = context.params[option]
            for value in given if isinstance(given, tuple) else (given,):
                command += [f"--{option}", str(value)]
    return shlex.join(command)


def _estimated(statuses: "list[NodeStatus]", context: "Context", workers: int | None) -> "Estimate":
    from pipeline.cost import estimate

    return estimate.estimate(statuses, context, workers, lambda what: echo(f"trying: {what}", err=True))


def _cost_as_json(status: "NodeStatus", estimated: "Estimate | None", gpus: int | None) -> dict[str, Any]:
    from pipeline.cost import estimate

    name = status.node.id
    if estimated is None:
        return {}
    if name not in estimated.nodes:
        return {"cost": None}
    return {"cost": estimate.as_json(estimated.nodes[name], estimated.site, gpus, estimated.batches.get(name))}


def _status_as_json(status: "NodeStatus") -> dict[str, Any]:
    node = status.node
    said = {
        "node": node.id,
        "stage": node.stage,
        "version": node.version,
        "there": status.there,
        "state": status.state,
        "same_as": status.same,
        "why": [reason.as_json() for reason in status.why],
        "awaits": list(status.awaits),
        "remark": status.remark,
    }
    return said | {
        "shards_there": status.partial,
        "images": status.facts.get("counts"),
        "majority": status.facts.get("majority"),
        "skipped": status.facts.get("skipped", {}),
        "inputs": {role: parent.id for role, parent in node.inputs.items()},
    }


def _size(facts: Any) -> str:
    """Images of each split, those of training first."""
    counts = sorted(facts.get("counts", {}).items(), key=lambda item: item[0] != "train")
    return " + ".join(f"{count:,} {split}" for split, count in counts)


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@store_option
@data_option
@run_options
@only_option
@check_files_option
@json_option
def run(
    file: Path,
    store: str,
    data: Path,
    options: RunOptions,
    only: tuple[str, ...],
    check_files: bool,
    as_json: bool,
) -> None:
    """Make whatever FILE (- for standard input) defines and the store lacks, then print the table.

    Finished work is never repeated: after a failure or an interruption, run the same command again.
    """
    from pipeline.experiment import spec

    _run(spec.read(file), context_of(store, data, check_files=check_files), options, only, as_json)


@main.command()
@click.argument("run", required=False)
@store_option
@run_options
@only_option
@check_files_option
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
    check_files: bool,
    as_json: bool,
    data: Path | None,
    modules: Path | None,
) -> None:
    """Continue RUN, or an experiment's latest run (default: the latest in the store).

    The experiment, --only and --data are those of that run.
    """
    from pipeline.experiment import spec
    from pipeline.store import Store

    found = recorded(Store(store), run)
    experiment = spec.parse(found["experiment"], found.get("written"))
    if modules is None:
        _refuse_code(experiment, found["run"], Path(found["here"]))
    context = context_of(store, data or Path(found["data"]), modules, check_files)
    _run(experiment, context, options, only or tuple(found["only"]), as_json)


def _refuse_code(experiment: "Experiment", run: str, here: Path) -> None:
    """Refuse code that a record names, except modules in the current folder if the run was started there.

    Raises:
        BadInput: the record names other code.
    """
    from pipeline.experiment.graph import build
    from stages.recipes import is_own

    archs = sorted({node.arch or "" for node in build(experiment) if is_own(node.arch)})
    others = [arch for arch in archs if not (here == Path.cwd() and _lies_in(here, arch))]
    if others:
        raise BadInput(
            f"the record of run {run} names code outside the current folder, {', '.join(others)}, which a store may "
            "not load: name its folder with --modules, or use `notbugs run FILE`, which continues as well"
        )


def _lies_in(folder: Path, arch: str) -> bool:
    """Whether an arch is a module in a folder rather than an installed one."""
    import importlib.metadata
    from importlib.machinery import PathFinder

    from stages import own

    module = arch.rpartition(":")[0]
    if own.is_file(module):
        return (folder / module).resolve().is_relative_to(folder.resolve())
    top = module.partition(".")[0]
    installed = top in sys.stdlib_module_names or top in importlib.metadata.packages_distributions()
    return not installed and PathFinder.find_spec(top, [str(folder)]) is not None


def _run(
    experiment: "Experiment", context: "Context", options: RunOptions, only: tuple[str, ...], as_json: bool
) -> None:
    terminal.if_interrupted("Nothing was begun; the same command again begins it.")
    if sys.stderr.isatty():  # networks are tried, which takes seconds; elsewhere, an error is the only line
        echo(f"checking {experiment.name}", err=True)
    prepared = prepare(experiment, context, options, only)
    run = prepared.run.record.id
    echo(f"run {run}\nstore {context.store.url}", err=True)
    if options.engine == "ray":
        echo(f"joining Ray at {options.address}" if options.address else "starting Ray", err=True)
    complete = _attempt(prepared)
    terminal.if_interrupted(f"Finished work is kept; see it with: notbugs report --store {context.store.url}")
    _conclude(context.store, run, complete, as_json)


def _attempt(prepared: Prepared) -> bool:
    from pipeline.cluster import JOB_VARIABLE

    if JOB_VARIABLE in os.environ:  # Ray stops a job by SIGINT, and what a shell began in the background ignores it
        terminal.listen(force=True)
    engine = prepared.begin()
    try:
        terminal.if_interrupted(f"Finished work is kept; continue with: {_again(prepared.run.context.store)}")
        return prepared.run.go(engine, prepared.display)
    finally:
        engine.close()


def _again(store: "Store") -> str:
    from pipeline.cluster import JOB_VARIABLE

    if JOB_VARIABLE in os.environ:
        return "notbugs submit, as before"
    return f"notbugs resume --store {store.url}"


def _conclude(store: "Store", run: str, complete: bool, as_json: bool) -> None:
    """Write the page, then print the results: a closed terminal does not cost the page."""
    from pipeline.run import runs
    from pipeline.run.engines import reason_of

    found, told = runs.load_run(store, run), list[str]()
    try:
        from pipeline.report import page  # here: what draws takes a second to load

        made = page.write(store, found)
        where, told = f"page {store.at(made.path)}", [text for text in (made.verdict, made.advice) if text]
    except Exception as error:  # noqa: BLE001 - the results stand without the page
        where = f"The page could not be written: {visible(reason_of(error))}; retry with: notbugs report"
    from pipeline.publish.after import after_run

    after_run(store, found)
    if as_json:
        print_json(results_as_json(store, found))
    else:
        print_results(store, found)
        for text in told:
            echo(f"\n{textwrap.fill(text, terminal.width() or len(text))}")
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
    """Show the progress of RUN, or of an experiment's latest run (default: the latest in the store)."""
    from pipeline.report import tables
    from pipeline.run.runs import in_words
    from pipeline.store import Store

    place = Store(store)
    found, width = recorded(place, run), terminal.width()
    if as_json:
        print_json(found)
        return
    echo(f"run {found['run']}: {found['state']}{', ' + found['why'] if 'why' in found else ''}\nstore {place.url}\n")
    lines = []
    for node, p in found["nodes"].items():
        seconds = duration(p["seconds"]) if p["seconds"] is not None else ""
        count = f"{p['done']} of {p['total']}" if p["total"] else ""
        lines.append([node, in_words(p["state"]), count, seconds, _at_work(p), str(p["retries"] or ""), p["why"] or ""])
    head = ["node", "state", "done", "time", "workers busy", "retries", "why"]
    if width:  # a reason is longer than a column
        head, lines = head[:-1], [line[:-1] for line in lines]
    echo(tables.fitted(head, lines, width, ("node", "state", "done", "time", "workers busy")))
    for node, p in found["nodes"].items():
        if width and p["why"]:
            echo(f"{node}: {visible(p['why'])}")
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
    """Rebuild the page of RUN, or of an experiment's latest run with results (default: the latest in the store).

    It is report.html, one file that needs no network.
    """
    refuse_no_place(out)
    from pipeline.report import page
    from pipeline.store import Store

    place = Store(store)
    path = page.write(place, recorded(place, run, with_results=True)).path
    if out is not None:
        write(out, place.read(path))
    echo(out or place.at(path))
