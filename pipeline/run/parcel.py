"""Send jobs and the user's folder to the machines of a cluster. Only the same code opens a job.

Ray puts everything it sends, and the driver's folder, before installed packages on the search path. Our code belongs
there, but the user's folder does not: a ``torch.py`` in it would shadow torch, even for Ray. So the user's folder is
sent one level down, under a name that no import statement can spell, and a process that opens a job changes into it.
"""

import hashlib
import os
import pickle
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pipeline
import stages
from pipeline.run import artifacts
from pipeline.run.jobs import ModelJob, ShardJob
from stages.errors import BadInput

SENT = "notbugs-here"
"""Name of the user's folder within the folder that is sent."""


def _sources() -> str:
    """Digest of every source file that this process has loaded or may still load."""
    found = hashlib.sha256()
    for package in (pipeline, stages):
        root = Path(package.__path__[0])
        for file in sorted(root.rglob("*.py")):
            content = file.read_bytes()
            found.update(f"{package.__name__}/{file.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return found.hexdigest()[:16]


CODE = _sources()
"""Computed at start, since files may change during a run and workers that start late would read the new ones."""


def pack(job: ShardJob | ModelJob) -> bytes:
    """A job as bytes."""
    from ray import cloudpickle

    return pickle.dumps((CODE, pipeline.HOME, cloudpickle.dumps(job)))  # type: ignore[no-untyped-call]


@lru_cache(maxsize=4)
def unpack(parcel: bytes) -> Any:
    """A job from its bytes; cached, so that a process opens it once, not for each shard.

    Raises:
        BadInput: this process's code differs from the sender's.
    """
    from ray import cloudpickle

    code, home, content = pickle.loads(parcel)
    if code != CODE:
        raise BadInput(_other_code(home))
    job: ShardJob | ModelJob = cloudpickle.loads(content)
    job.context = replace(job.context, here=_land(job.context.here))
    return job


def _other_code(home: str) -> str:
    host = artifacts.host()
    if home == pipeline.HOME:
        return (
            f"the code in {home} is not what it was when the run began, as a worker on {host} finds it: "
            "begin the run again, and leave the files alone while it goes on"
        )
    return (
        f"a worker on {host} runs other code, of {pipeline.HOME}, than this command, of {home}: install the same "
        "notbugs on every machine, or take the other one out of the worker's PYTHONPATH"
    )


def _land(here: Path) -> Path:
    """The user's folder on this machine; if it was sent, this process changes into it."""
    if Path(SENT).is_dir():
        os.chdir(SENT)
    return Path.cwd() if Path.cwd().name == SENT else here


@contextmanager
def staged(environment: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A runtime environment with the requested working folder one level down, for as long as Ray reads it."""
    if "working_dir" not in environment:
        yield environment
        return
    with TemporaryDirectory(prefix="notbugs-") as folder:
        (Path(folder) / SENT).symlink_to(environment["working_dir"], target_is_directory=True)
        excludes = [f"/{SENT}{path}" if path.startswith("/") else path for path in environment["excludes"]]
        yield environment | {"working_dir": folder, "excludes": excludes}


def search_path() -> list[str]:
    """The folders that workers on this machine need on their search path to import our code.

    Empty if it is installed; otherwise this process imported it from the folder of its script, or from the current one.
    """
    paths = [os.path.realpath(entry) for entry in sys.path]
    home, library = os.path.realpath(pipeline.HOME), os.path.realpath(sysconfig.get_path("stdlib"))
    given = map(os.path.realpath, filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    installed = home not in paths or home in given or home in paths[paths.index(library) :]
    return [] if installed else [home]
