"""A Ray cluster seen from a laptop: experiments go there as jobs, and their logs come back."""

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
from pipeline.parcel import SENT, staged
from pipeline.spec import Experiment, recipes
from pipeline.store import Store, canonical, digest
from stages import own
from stages.errors import BadInput
from stages.recipes import is_own

JOB_VARIABLE = "NOTBUGS_JOB"
"""Tells a run on the cluster which job it is."""

EXCLUDES = [
    *("__pycache__", ".git", ".venv", "venv", ".tox", ".nox", ".mypy_cache", ".ruff_cache", ".pytest_cache"),
    *(".hypothesis", ".ipynb_checkpoints", ".idea", ".vscode", "*.egg-info", "node_modules", "build", "dist"),
    *("data", "notbugs-store", "*.tar", "*.pt", "*.pth", "*.safetensors"),
]
"""Files and folders of the working folder that stay where they are."""

LARGEST_FILE, LARGEST_FOLDER = 10, 64
"""MiB: a larger file stays where it is; a larger folder is refused. Code is small; data goes to the store."""

SECRET_WORDS = ("KEY", "SECRET", "TOKEN", "PASSWORD", "CREDENTIAL")

TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
"""Loggers that tell of every package sent and every connection closed."""

ENDED = ("succeeded", "failed", "stopped")

STOPPING = 30
"""Seconds that a job is given to end by itself; Ray's own default is 3."""

LISTENING = 60.0
"""Seconds for which a cluster that no longer answers is asked again."""


@dataclass(frozen=True)
class Request:
    """What a job is to do.

    Attributes:
        experiment: what to make.
        store: where; it must be reachable from the cluster and from here.
        only: names of the nodes wanted; by default all.
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
        """Equal for requests that would make the same: the same experiment in the same store."""
        return f"notbugs-{self.experiment.name}-{digest(canonical([self._said, self.store.url, list(self.only)]))[:8]}"

    @property
    def _said(self) -> dict[str, Any]:
        return self.experiment.model_dump(mode="json", exclude_defaults=True)

    def entrypoint(self) -> str:
        """The command that the cluster runs; the experiment is its input."""
        options = ["--store", self.store.url, "--address", "auto", *self.options]
        options += [part for name in self.only for part in ("--only", name)]
        # -P: the folder that it starts in does not come before what is installed.
        command = shlex.join(["python", "-P", "-m", "pipeline", "run", "-", *options])
        enter = f"cd {SENT} && " if sends_folder(self.experiment) else ""
        return f"{enter}exec {command} <<'EXPERIMENT'\n{json.dumps(self._said)}\nEXPERIMENT"


@dataclass(frozen=True)
class Job:
    """A job of the cluster.

    Attributes:
        id: its name on the cluster.
        state: pending, running, succeeded, failed or stopped.
        experiment, store: what it makes, and where.
        started, ended: seconds since 1970.
        code: exit code of its process, once it has one.
        message: what Ray says of its state.
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
        """Whether it has not ended yet."""
        return self.state not in ENDED

    @property
    def exit_code(self) -> int:
        """0 where it succeeded, else what its process ended with, or 1 where that is not known or was a signal."""
        return 0 if self.state == "succeeded" else max(self.code or 1, 1)


class Cluster:
    """The job server of a Ray cluster, as ``http://host:8265``.

    Raises:
        BadInput: nothing answers there, or it refuses the token.
    """

    def __init__(self, address: str) -> None:
        if not address.startswith(("http://", "https://")):
            raise BadInput(f"--address {address}: must be the cluster's job server, such as http://localhost:8265")
        self.address = address
        _use_token()
        from ray import exceptions
        from ray.job_submission import JobSubmissionClient

        for talkative in TALKATIVE:
            logging.getLogger(talkative).setLevel(logging.WARNING)

        try:
            self.client = JobSubmissionClient(address)
        except exceptions.AuthenticationError as error:
            raise BadInput(_token_sentence(address)) from error
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise BadInput(f"--address {address}: no Ray cluster answers there; is the tunnel to it open?") from error

    def jobs(self) -> list[Job]:
        """Our jobs, the oldest first."""
        found = [job for job in self.client.list_jobs() if (job.metadata or {}).get("notbugs")]
        return [_job(job) for job in sorted(found, key=lambda job: (job.start_time or 0, job.submission_id))]

    def job(self, name: str | None) -> Job:
        """A job by its id or the beginning of it; by default the newest that is live, else the newest.

        Raises:
            BadInput: there is no such job, or none at all.
        """
        jobs = self.jobs()
        if name is None:
            live = [job for job in jobs if job.live]
            if not jobs:
                raise BadInput(f"there are no jobs at {self.address}: `notbugs submit FILE --address …` begins one")
            return (live or jobs)[-1]
        chosen = [job for job in jobs if job.id == name] or [job for job in jobs if job.id.startswith(name)]
        if not chosen:
            known = ", ".join(job.id for job in jobs) or "none"
            raise BadInput(f"there is no job {name} at {self.address}; there are {known}")
        return chosen[-1]

    def submit(self, request: Request, here: Path) -> tuple[Job, bool]:
        """Begin a job, unless one that does the same is under way.

        Args:
            request: what to do.
            here: the folder of the user's own modules, which is sent along where the experiment names any.

        Returns:
            The job, and whether it is a new one.

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
                if "No available agent" in str(error):  # a cluster that has just begun; it waited 10 s before saying so
                    if time.monotonic() > deadline:
                        raise BadInput(
                            f"--address {self.address}: the cluster takes no jobs: the agent of its head does not run"
                        ) from error
                elif "already exists" not in str(error):  # else another submit was first: look again, and join it
                    raise
                continue
            return self.job(name), True

    def stop(self, job: Job) -> Job:
        """End a job, as Ctrl-C would; the job once it has ended."""
        self.client.stop_job(job.id)
        deadline = time.monotonic() + 2 * STOPPING
        while (now := self.job(job.id)).live and time.monotonic() < deadline:
            time.sleep(0.5)
        return now

    def logs(self, job: Job) -> str:
        """All that the job has said."""
        return str(self.client.get_job_logs(job.id))

    def follow(self, job: Job, say: Callable[[str], None]) -> Job:
        """Hand on what the job says, as it says it, until it ends; the job as it ended.

        Raises:
            BadInput: the cluster no longer answers.
        """
        import aiohttp

        said, silent = 0, 0.0  # silent: since when the cluster, not only the job, has said nothing; 0 if it does not

        async def tail() -> None:
            nonlocal said, silent
            position = 0  # each new connection tells all from the beginning
            async with asyncio.timeout(LISTENING) as patience:  # a connection may die without a word
                async for text in self.client.tail_job_logs(job.id):
                    fresh, position = text[max(0, said - position) :], position + len(text)
                    said, silent = max(said, position), 0.0
                    say(fresh)
                    patience.reschedule(asyncio.get_running_loop().time() + LISTENING)

        while True:
            try:
                with suppress(TimeoutError):
                    asyncio.run(tail())
                now, silent = self.job(job.id), 0.0
                if not now.live:
                    say(self.logs(job)[said:])
                    return now
            except (OSError, RuntimeError, aiohttp.ClientError) as error:
                silent = silent or time.monotonic()
                if time.monotonic() - silent > LISTENING:
                    raise BadInput(
                        f"--address {self.address}: the cluster no longer answers; job {job.id} may be going on"
                    ) from error
            time.sleep(1.0)


def sends_folder(experiment: Experiment) -> bool:
    """Whether an experiment names code of the user's, so that their folder has to go along."""
    return any(is_own(getattr(recipe, "arch", None)) for recipe in recipes(experiment).values())


def runtime_env(request: Request, here: Path) -> dict[str, Any]:
    """What Ray sends along: this project, and the user's folder where the experiment names modules in it.

    Raises:
        BadInput: the folder is too large, or a variable looks like a secret.
    """
    for name in request.variables or {}:
        if any(word in name.upper() for word in SECRET_WORDS):
            raise BadInput(
                f"--env {name}: secrets are not sent, for the cluster shows a job's variables to everyone on it; "
                "give its machines a role, or set the variable where Ray is started"
            )
    found: dict[str, Any] = {
        "py_modules": [str(Path(module.__path__[0])) for module in (pipeline, stages)],
        "excludes": list(EXCLUDES),
        # Ray's stop is then Ctrl-C, and the run says for itself that it was interrupted.
        "env_vars": {
            "RAY_JOB_STOP_SIGNAL": "SIGINT",
            "RAY_JOB_STOP_WAIT_TIME_S": str(STOPPING),
            **(request.variables or {}),
        },
    }
    if sends_folder(request.experiment):
        left = _left_out(here, Path(request.store.url))
        _refuse_unsent(request.experiment, here, left)
        found["working_dir"] = str(here)
        found["excludes"] += [_pattern(path.relative_to(here)) for path in left]
    if request.pip:
        found["pip"] = list(request.pip)
    return found


def _left_out(here: Path, store: Path) -> list[Path]:
    """What of the folder is no code: files that are too large, the store if it is in there, what cannot be read or ends
    never.

    Ray follows links, so they are followed here; one that leads back to where it lies would be followed for ever, and a
    pipe is read for ever.

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
    """This path alone, in the language of .gitignore."""
    return "/" + re.sub(r"([\\*?\[\]!])", r"\\\1", path.as_posix()).replace(" ", "[ ]")


def _excluded(name: str) -> bool:
    return any(Path(name).match(pattern) for pattern in EXCLUDES)


def _leads_back(folder: Path) -> bool:
    """Whether it is a link to a folder that it lies in, be it through other links."""
    to = folder.resolve()
    return folder.is_symlink() and any(above.resolve().is_relative_to(to) for above in folder.parents)


def _refuse_unsent(experiment: Experiment, here: Path, left: list[Path]) -> None:
    """Raise if an arch names a file that does not go along."""
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


def _use_token() -> None:
    """Show the token that is here. Ray would only where it is told to, before it is imported."""
    default = Path.home() / ".ray" / "auth_token"
    if any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")) or default.exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _token_sentence(address: str) -> str:
    return (
        f"--address {address}: the cluster asks for a token and got none, or a wrong one; put the cluster's into "
        "~/.ray/auth_token, or name its file in RAY_AUTH_TOKEN_PATH"
    )


def _job(found: Any) -> Job:
    facts = found.metadata or {}
    return Job(
        found.submission_id,
        str(found.status.value if hasattr(found.status, "value") else found.status).lower(),
        facts.get("experiment", ""),
        facts.get("store", ""),
        found.start_time and found.start_time / 1000,
        found.end_time and found.end_time / 1000,
        found.driver_exit_code,
        found.message or "",
    )
