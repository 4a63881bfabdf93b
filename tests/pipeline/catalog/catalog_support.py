"""Shared by the tests of the catalog: an experiment, and the command line."""

import copy
import json
from typing import Any

from click.testing import CliRunner, Result
from support import TINY

from pipeline.cli import main


def experiment(eps: float) -> dict[str, Any]:
    """The small experiment with one shard of each split."""
    made = copy.deepcopy(TINY)
    made["datasets"]["clean"]["load"]["limit"] = 64
    made["datasets"]["other"]["attack"]["eps"] = eps
    for model in made["models"].values():
        model["train"]["epochs"] = 1
    return made


def invoke(*args: Any, code: int = 0, text: str | None = None) -> Result:
    """Run the command line in this process and check its exit code."""
    result = CliRunner().invoke(main, [str(arg) for arg in args], input=text)
    assert result.exit_code == code, f"{result.output}\n{result.stderr}\n{result.exception!r}"
    return result


def as_json(*args: Any) -> Any:
    return json.loads(invoke(*args, "--json").stdout)


def versions(store: str, node: str) -> list[str]:
    """The versions of a node, the newest first."""
    return [
        one["version"] for one in as_json("ls", "--store", store)["nodes"] if f"{one['group']}/{one['name']}" == node
    ]
