"""Options that several commands share."""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from pipeline.launch import DATA, STORE, RunOptions


class Number(click.FloatRange):
    """A finite number, or a fraction. NaN would pass every range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        from stages.recipes import fraction  # here: the recipes take a quarter of a second to load

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
check_files_option = click.option(
    "--check-files",
    is_flag=True,
    help="Compare all images, shards and checkpoints with those of the last run by content, not only those of the same "
    "size and another time.",
)
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
        type=Number(0, 1e8, min_open=True),
        metavar="SECONDS",
        help="Limit for one step of a shard; a slower step is stopped and retried on another worker "
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
    @click.option(
        "--tensorboard",
        metavar="FOLDER",
        help="Also write learning curves and rates as TensorBoard event files (needs the extra notbugs[tensorboard]).",
    )
    @functools.wraps(command)
    def wrapped(
        *args: Any, engine: str, address: str | None, tensorboard: str | None, options: RunOptions, **others: Any
    ) -> Any:
        given = replace(options, engine=engine, address=address, tensorboard=tensorboard)
        return command(*args, options=given, **others)

    return wrapped
