"""What the tests share: a small experiment on real digits, and the command line as a user calls it."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import settings

# No deadline: other jobs share the machine. Derandomised: a run that fails fails again for the next person.
settings.register_profile("notbugs", deadline=None, derandomize=True, max_examples=60, database=None)
settings.load_profile("notbugs")

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

TINY: dict[str, Any] = {
    "name": "tiny",
    "datasets": {
        "clean": {"load": {"source": "sklearn-digits", "shard_size": 64, "limit": 192}},
        "other": {
            "attack": {"images": "clean", "model": "standard", "eps": 1.5, "steps": 3, "batch_size": 32},
            "relabel": "other",
        },
        "control": {"attack": {"images": "clean", "method": "none"}, "relabel": "other"},
    },
    "models": {
        "standard": {"train": {"on": "clean", "arch": "small_cnn", "epochs": 2, "batch_size": 32, "threads": 1}},
        "from_other": {"train": {"on": "other", "arch": "small_cnn", "epochs": 2, "batch_size": 32, "threads": 1}},
    },
    "evaluations": {"accuracy": {"models": ["standard", "from_other"], "on": "clean", "split": "test"}},
}
"""Three shards of 64 training images, three of test images, in a few seconds."""


@pytest.fixture
def tiny() -> dict[str, Any]:
    """The experiment above, the test's own to change."""
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


def command() -> str:
    """The console script of this environment."""
    return str(Path(sys.executable).with_name("notbugs"))


def contents(store: Path) -> dict[str, str]:
    """Node → content digest of everything that is finished in a local store."""
    found = {}
    for manifest in sorted(store.glob("*/*/*/manifest.json")):
        facts = json.loads(manifest.read_text())
        found[f"{facts['group']}/{facts['name']}"] = facts["content"]
    return found


def files(folder: Path) -> set[str]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
