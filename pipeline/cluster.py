"""A Ray cluster from a laptop: submit experiments as jobs, follow their logs, stop them."""

import asyncio
import json
import logging
import os
import re
import shlex
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pipeline
import stages
from pipeline.experiment.spec import Experiment, recipes
from pipeline.run.engines import reason_of
from pipeline.run.parcel import SENT, staged
from pipeline.store import Store, canonical, digest
from stages import own
from stages.errors import BadInput
from stages.recipes import is_own

JOB_VARIABLE = "NOTBUGS_JOB"
"""Environment variable with the job's name, for the run on the cluster."""

EXCLUDES = [
    *("__pycache__", ".git", ".venv", "venv", ".tox", ".nox", ".mypy_cache", ".ruff_cache", ".pytest_cache"),
    *(".hypothesis", ".ipynb_checkpoints", ".idea", ".vscode", "*.egg-info", "node_modules", "build", "dist"),
    *("data", "notbugs-store", "*.tar", "*.pt", "*.pth", "*.safetensors"),
]
"""Files and folders of the working folder that are not sent."""

LARGEST_FILE, LARGEST_FOLDER = 10, 64
"""MiB: a larger file is not sent; a larger folder is refused. Code is small; data belongs in the store."""

SECRET_WORDS = ("KEY", "SECRET", "TOKEN", "PASSWORD", "CREDENTIAL")

TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
"""Loggers that report every package sent and every connection closed."""

ENDED = ("succeeded", "failed", "stopped")

STOPPING = 30
"""Seconds that a stopped job has to shut down; Ray's default is 3."""

LISTENING = 60.0
"""Seconds for which an unresponsive cluster is retried."""


@dataclass(frozen=True)
class Request:
    """The work of a job.

    Attributes:
        experiment: the experiment to run.
        store: its store, which must be reachable from the cluster and from this machine.
        only: names of the nodes to make; by default all.
        options: further options of `notbugs run`.
        pip: packages to install beside those of the cluster.
        variables: environment variables of the job.
    """

    experiment: Experiment
    store: Store
    only: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    pip: tuple[str, ...] = ()
    variables: dict[str, str] | None = None

    @property
    def id(self) -> str:
        """Equal for equal work: the same nodes of the same experiment in the same store."""
        work = digest(canonical([self._document, self.store.url, list(self.only)]))
        return f"notbugs-{self.experiment.name}-{work[:8]}"

    @property
    def _document(self) -> dict[str, Any]:
        return self.experiment.model_dump(mode="json", exclude_defaults=True)

    def entrypoint(self) -> str:
        """The command that the cluster runs, with the experiment as its standard input."""
        options = ["--store", self.store.url, "--address", "auto", *self.options]
        options += [part for name in self.only for part in ("--only", name)]
        # -P: the working folder does not take precedence over installed packages.
        command = shlex.join(["python", "-P", "-m", "pipeline", "run", "-", *options])
        enter = f"cd {SENT} && " if sends_folder(self.experiment) else ""
        return f"{enter}exec {command} <<'EXPERIMENT'\n{json.dumps(self._document)}\nEXPERIMENT"


@dataclass(frozen=True)
class Job:
    """A job of the cluster.

    Attributes:
        id: its submission id.
        state: pending, running, succeeded, failed or stopped.
        experiment, store: the experiment's name, and the store's URL.
        started, ended: seconds since 1970.
        code: exit code of its process, once it has ended.
        message: Ray's description of its state.
    """

    id: str
    state: str
    experiment: str
    store: str
    started: float | None
    ended: float | None
    code: int | None
    message: str

    @property
    def live(self) -> bool:
        """Whether it has not ended."""
        return self.state not in ENDED

    @property
    def exit_code(self) -> int:
        """0 if it succeeded, else the exit code of its process, or 1 if that is unknown or a signal."""
        return 0 if self.state == "succeeded" else max(self.code or 1, 1)


class Cluster:
    """The job server of a Ray cluster, as ``http://host:8265``.

    Raises:
        BadInput: no cluster answers there, or it refuses the token.
    """

    def __init__(self, address: str) -> None:
        if not address.startswith(("http://", "https://")):
            raise BadInput(f"--address {address}: must be the cluster's job server, such as http://localhost:8265")
        self.address = address
        from ray import exceptions
        from ray.job_submission import JobSubmissionClient

        for logger in TALKATIVE:
            logging.getLogger(logger).setLevel(logging.WARNING)

        token = _authorization()
        try:
            self.client = JobSubmissionClient(address, headers=token)
        except exceptions.AuthenticationError as error:
            raise BadInput(_token_sentence(address)) from error
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise BadInput(f"--address {address}: no Ray cluster answers there; is the tunnel to it open?") from error

    def jobs(self) -> list[Job]:
        """Our jobs, the oldest first."""
        ours = [job for job in self.client.list_jobs() if (job.metadata or {}).get("notbugs")]
        return [_job(job) for job in sorted(ours, key=lambda job: (job.start_time or 0, job.submission_id))]

    def job(self, name: str | None) -> Job:
        """A job by its id or a prefix of it; by default the newest live one, else the newest.

        Raises:
            BadInput: there is no such job, or none at all.
        """
        jobs = self.jobs()
        if name is None:
            live = [job for job in jobs if job.live]
            if not jobs:
                raise BadInput(f"there are no jobs at {self.address}: `notbugs submit FILE --address …` starts one")
            return (live or jobs)[-1]
        chosen = [job for job in jobs if job.id == name] or [job for job in jobs if job.id.startswith(name)]
        if not chosen:
            known = ", ".join(job.id for job in jobs) or "none"
            raise BadInput(f"there is no job {name} at {self.address}; there are {known}")
        return chosen[-1]

    def submit(self, request: Request, here: Path) -> tuple[Job, bool]:
        """Start a job, unless one with the same work is live.

        Args:
            request: the work.
            here: the folder of the user's own modules, which is sent along if the experiment names any.

        Returns:
            The job, and whether it is new.

        Raises:
            BadInput: the folder is too large to send, or the cluster takes no jobs.
        """
        with staged(runtime_env(request, here)) as environment:
            return self._submit(request, environment)

    def _submit(self, request: Request, environment: dict[str, Any]) -> tuple[Job, bool]:
        deadline = time.monotonic() + LISTENING
        while True:
            same = [job for job in self.jobs() if job.id.rpartition("-")[0] == request.id]
            if same and same[-1].live:
                return same[-1], False
            name = f"{request.id}-{max((int(job.id.rpartition('-')[2]) for job in same), default=0) + 1}"
            environment["env_vars"] |= {JOB_VARIABLE: name}
            facts = {"notbugs": "1", "experiment": request.experiment.name, "store": request.store.url}
            try:
                self.client.submit_job(
                    entrypoint=request.entrypoint(), submission_id=name, runtime_env=environment, metadata=facts
                )
            except RuntimeError as error:
                if "No available agent" in str(error):  # the cluster has just started; Ray waited 10 s for an agent
                    if time.monotonic() > deadline:
                        raise BadInput(
                            f"--address {self.address}: the cluster takes no jobs: no agent runs on its head node"
                        ) from error
                elif "already exists" not in str(error):  # else another submit was first: look again, and join its job
                    raise
                continue
            return self.job(name), True

    def stop(self, job: Job) -> Job:
        """Stop a job as Ctrl-C would; return it once it has ended."""
        self.client.stop_job(job.id)
        deadline = time.monotonic() + 2 * STOPPING
        while (now := self.job(job.id)).live and time.monotonic() < deadline:
            time.sleep(0.5)
        return now

    def logs(self, job: Job) -> str:
        """The complete log of a job."""
        return str(self.client.get_job_logs(job.id))

    def follow(self, job: Job, show: Callable[[str], None]) -> Job:
        """Pass on a job's log as it grows, until the job ends; return the ended job.

        Raises:
            BadInput: the cluster no longer answers.
        """
        import aiohttp

        shown, silent = 0, 0.0  # characters passed on; since when the cluster, not only the job, is unresponsive, or 0

        async def tail() -> None:
            nonlocal shown, silent
            position = 0  # each new connection sends the log from the beginning
            async with asyncio.timeout(LISTENING) as patience:  # a connection may die silently
                async for text in self.client.tail_job_logs(job.id):
                    fresh, position = text[max(0, shown - position) :], position + len(text)
                    shown, silent = max(shown, position), 0.0
                    show(fresh)
                    patience.reschedule(asyncio.get_running_loop().time() + LISTENING)

        while True:
            try:
                with suppress(TimeoutError):
                    asyncio.run(tail())
                now, silent = self.job(job.id), 0.0
                if not now.live:
                    show(self.logs(job)[shown:])
                    return now
            except (OSError, RuntimeError, aiohttp.ClientError) as error:
                silent = silent or time.monotonic()
                if time.monotonic() - silent > LISTENING:
                    raise BadInput(
                        f"--address {self.address}: the cluster no longer answers; job {job.id} may still be running"
                    ) from error
            time.sleep(1.0)


def sends_folder(experiment: Experiment) -> bool:
    """Whether an experiment names the user's own code, so that their folder has to be sent."""
    return any(is_own(getattr(recipe, "arch", None)) for recipe in recipes(experiment).values())


def runtime_env(request: Request, here: Path) -> dict[str, Any]:
    """Ray's runtime environment: this project, and the user's folder if the experiment names modules in it.

    Raises:
        BadInput: the folder is too large, or a variable looks like a secret.
    """
    for name in request.variables or {}:
        if any(word in name.upper() for word in SECRET_WORDS):
            raise BadInput(
                f"--env {name}: secrets are not sent, for the cluster shows a job's variables to everyone on it; "
                "give its machines a role, or set the variable where Ray is started"
            )
    environment: dict[str, Any] = {
        "py_modules": [str(Path(module.__path__[0])) for module in (pipeline, stages)],
        "excludes": list(EXCLUDES),
        # Ray then stops a job with SIGINT, and the run itself records that it was interrupted.
        "env_vars": {
            "RAY_JOB_STOP_SIGNAL": "SIGINT",
            "RAY_JOB_STOP_WAIT_TIME_S": str(STOPPING),
            **(request.variables or {}),
        },
    }
    if sends_folder(request.experiment):
        left = _left_out(here, Path(request.store.url))
        _refuse_unsent(request.experiment, here, left)
        environment["working_dir"] = str(here)
        environment["excludes"] += [_pattern(path.relative_to(here)) for path in left]
    if request.pip:
        environment["pip"] = list(request.pip)
    return environment


def _left_out(here: Path, store: Path) -> list[Path]:
    """Paths of the folder that are not sent: the store, and files that are too large, unreadable or not regular.

    Ray follows links, so they are followed here, except one that leads back to a folder above it: that, or reading a
    pipe, would never end.

    Raises:
        BadInput: the rest is too large.
    """
    left, total = [store] if here in store.parents else [], 0
    for folder, names, files in os.walk(here, followlinks=True):
        there = {name: Path(folder, name) for name in names if not _excluded(name)}
        shut = [path for path in there.values() if not os.access(path, os.R_OK | os.X_OK) or _leads_back(path)]
        names[:] = [name for name, path in there.items() if path != store and path not in shut]
        left += shut
        for path in (Path(folder, name) for name in files if not _excluded(name)):
            if not path.is_file() or not os.access(path, os.R_OK) or path.stat().st_size > LARGEST_FILE * 2**20:
                left.append(path)
                continue
            total += path.stat().st_size
            if total > LARGEST_FOLDER * 2**20:
                raise BadInput(
                    f"{here} has more than {LARGEST_FOLDER} MiB to send to the cluster: submit from a folder that "
                    "holds the experiment's own modules and little else"
                )
    return left


def _pattern(path: Path) -> str:
    """A .gitignore pattern that matches this path alone."""
    return "/" + re.sub(r"([\\*?\[\]!])", r"\\\1", path.as_posix()).replace(" ", "[ ]")


def _excluded(name: str) -> bool:
    return any(Path(name).match(pattern) for pattern in EXCLUDES)


def _leads_back(folder: Path) -> bool:
    """Whether it is a link, direct or through others, to a folder that contains it."""
    to = folder.resolve()
    return folder.is_symlink() and any(above.resolve().is_relative_to(to) for above in folder.parents)


def _refuse_unsent(experiment: Experiment, here: Path, left: list[Path]) -> None:
    """Raise if an arch names a file that is not sent."""
    for place, recipe in recipes(experiment).items():
        where = (getattr(recipe, "arch", None) or "").rpartition(":")[0]
        if not own.is_file(where):
            continue
        path = Path(os.path.normpath(here / where))
        inside = path.is_relative_to(here) and not Path(where).is_absolute()
        if not inside or not path.is_file() or any(map(_excluded, path.relative_to(here).parts)) or path in left:
            raise BadInput(
                f"{place.replace('/', '.')}: {where} is not among what is sent to the cluster: name a file of the "
                "current folder, or of one below it, by its path from there"
            )


def _authorization() -> dict[str, str]:
    """The header with this machine's token, from where Ray looks for it. Ray itself reads it only where a variable of
    the whole process says so, which a local cluster of the same process would heed too."""
    token, file = os.environ.get("RAY_AUTH_TOKEN", ""), os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    place = Path(file) if file else Path.home() / ".ray" / "auth_token"
    if not token and place.is_file():
        try:
            token = place.read_text(encoding="ascii")
        except (OSError, ValueError) as error:
            raise BadInput(f"{place}: holds no token that can be read ({reason_of(error)})") from error
    return {"Authorization": f"Bearer {token.strip()}"} if token.strip() else {}


def _token_sentence(address: str) -> str:
    return (
        f"--address {address}: the cluster requires a token and got none, or a wrong one; put the cluster's into "
        "~/.ray/auth_token, or name its file in RAY_AUTH_TOKEN_PATH"
    )


def _job(details: Any) -> Job:
    facts = details.metadata or {}
    return Job(
        details.submission_id,
        str(details.status.value if hasattr(details.status, "value") else details.status).lower(),
        facts.get("experiment", ""),
        facts.get("store", ""),
        details.start_time and details.start_time / 1000,
        details.end_time and details.end_time / 1000,
        details.driver_exit_code,
        details.message or "",
    )
