"""How a run is started, from the command line and from Python: its options, its defaults, its engine."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from pipeline import terminal
from stages.errors import BadInput

if TYPE_CHECKING:
    from pipeline.experiment.spec import Experiment
    from pipeline.run.engines import Engine
    from pipeline.run.jobs import Context
    from pipeline.run.preflight import NodeStatus
    from pipeline.run.progress import Display
    from pipeline.run.runs import Run
    from pipeline.run.tensorboard import Events

STORE, DATA = "notbugs-store", "data"
"""Default store, and default folder of local sources and checkpoints."""


@dataclass(frozen=True)
class RunOptions:
    """Options of how a run is made.

    Attributes:
        workers: number of workers that attack in parallel.
        gpu: whether each takes a GPU.
        shard_timeout: seconds that a step of a shard may take.
        engine: ``ray`` or ``inline``.
        address: of the Ray cluster that is joined.
        tensorboard: folder of event files.
    """

    workers: int | None = None
    gpu: bool | None = None
    shard_timeout: float | None = None
    engine: str = "ray"
    address: str | None = None
    tensorboard: str | None = None

    def arguments(self) -> list[str]:
        """The worker options, as arguments of `run`."""
        given: list[str] = []
        if self.workers is not None:
            given += ["--workers", str(self.workers)]
        if self.gpu is not None:
            given.append("--gpu" if self.gpu else "--no-gpu")
        if self.shard_timeout is not None:
            given += ["--shard-timeout", str(self.shard_timeout)]
        return given


class Prepared(NamedTuple):
    """A run that may begin.

    Attributes:
        run: the run, on record once it goes.
        begin: starts the engine.
        display: of its events; None if they are not shown.
    """

    run: "Run"
    begin: "Callable[[], Engine]"
    display: "Display | Events | None"


def prepare(
    experiment: "Experiment",
    context: "Context",
    options: RunOptions,
    only: tuple[str, ...] = (),
    cards: bool = True,
    shown: bool = True,
) -> Prepared:
    """Check everything about a run before it begins; nothing is written to the store.

    Args:
        experiment, context, options: what is made, where, and how.
        only: names or ids of the wanted nodes.
        cards: whether datasets get their cards as they are made.
        shown: whether its progress is printed.

    Raises:
        BadInput: the experiment, its sources, the store or the options are unfit.
    """
    from pipeline.experiment.graph import build
    from pipeline.publish.after import after_node
    from pipeline.run.preflight import preflight, remarks, wanted
    from pipeline.run.runs import Run, unnoticed

    begin = engine(experiment, context, options)
    with terminal.noting_long("checking" if shown else None) as at:
        checked = preflight(wanted(build(experiment), only), context, at=at)
    display = _watching(options, checked) if shown else None
    context.store.refuse_unless_writable()
    for line in remarks(checked) if shown else ():
        terminal.echo(line, err=True)
    published = after_node(context.store, experiment.about) if cards else unnoticed
    return Prepared(Run(experiment, context, only, display or unnoticed, checked, published), begin, display)


def _watching(options: RunOptions, statuses: "Sequence[NodeStatus]") -> "Display | Events":
    """The display of a run's events: the progress that is printed, and event files where they are asked for.

    Args:
        options: of the run.
        statuses: what was found of its nodes before it.

    Raises:
        BadInput: event files cannot be written.
    """
    from pipeline.run.progress import watcher
    from pipeline.run.tensorboard import Events

    shown = watcher(statuses)
    return Events(options.tensorboard, shown) if options.tensorboard else shown


def engine(experiment: "Experiment", context: "Context", options: RunOptions) -> "Callable[[], Engine]":
    """A function that starts the requested engine; user modules go along to a cluster that is joined.

    Raises:
        BadInput: the options, or trainings, do not go with the engine.
    """
    from pipeline.cluster import JOB_VARIABLE, Request, runtime_env
    from pipeline.run.engines import Inline
    from pipeline.run.on_ray import OnRay

    if options.engine == "inline":
        _refuse_parallel(experiment, options)
        return Inline
    address, sent = options.address, None
    if address and "://" in address:
        raise BadInput(
            f"--address {address}: must be auto or host:6379, on a machine of the cluster; "
            "from elsewhere: notbugs submit FILE --address http://…"
        )
    if address and JOB_VARIABLE not in os.environ:  # a job's workers have what was sent with the job
        sent = runtime_env(Request(experiment, context.store), context.here)
    return lambda: OnRay(options.workers, address, options.gpu, options.shard_timeout, sent)


def _refuse_parallel(experiment: "Experiment", options: RunOptions) -> None:
    """Refuse options and trainings that need several processes."""
    if options != replace(options, workers=None, gpu=None, shard_timeout=None, address=None):
        raise BadInput("--workers, --gpu, --shard-timeout and --address need the Ray engine, got --engine inline")
    for name, model in experiment.models.items():
        if model.train is not None and model.train.workers > 1:
            raise BadInput(f"models.{name}.train.workers: several workers need the Ray engine, got --engine inline")
