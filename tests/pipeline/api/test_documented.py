"""Every example of docs/python.md runs, in order, in a folder with a small experiment."""

import copy
import re
from pathlib import Path

import pytest
import yaml
from support import TINY

import notbugs

PAGE = Path(__file__).parents[3] / "docs/python.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small `configs/digits.yaml`, and the store of its run."""
    folder = tmp_path_factory.mktemp("documented")
    experiment = copy.deepcopy(TINY)
    experiment["datasets"]["rand"] = experiment["datasets"].pop("other")
    experiment["models"]["from_other"]["train"]["on"] = "rand"
    (folder / "configs").mkdir()
    (folder / "configs/digits.yaml").write_text(yaml.safe_dump(experiment))
    notbugs.run(folder / "configs/digits.yaml", store=folder / "notbugs-store", engine="inline")
    return folder


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_runs(number, folder, monkeypatch):
    monkeypatch.chdir(folder)
    exec(compile(EXAMPLES[number], f"{PAGE.name}, example {number + 1}", "exec"), {})
