"""Commands about jobs on a Ray cluster: submit, jobs, logs, stop."""

import os
import sys
import time
from pathlib import Path

import click

from pipeline import terminal
from pipeline.cli.group import main
from pipeline.cli.options import job_server_option, json_option, only_option, store_option, worker_options
from pipeline.cli.output import print_json
from pipeline.cluster import Cluster, Job, Request
from pipeline.experiment import spec
from pipeline.experiment.graph import build
from pipeline.launch import RunOptions
from pipeline.report import tables
from pipeline.run.preflight import wanted
from pipeline.store import Store
from pipeline.terminal import clock, echo, relay
from stages.errors import BadInput


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
        print_json({"jobs": [{**vars(job), "live": job.live} for job in found]})
        return
    lines = [[job.id, job.state, job.experiment, _took(job), job.store] for job in found]
    head = ["job", "state", "experiment", "time", "store"]
    echo(tables.fitted(head, lines, terminal.width()) or f"no jobs at {address}")


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
