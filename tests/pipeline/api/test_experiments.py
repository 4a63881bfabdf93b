"""Experiments from Python: the same versions and results as from a file."""

import copy
import shutil
import subprocess
import sys

import pytest
import yaml
from support import TINY

import notbugs
from pipeline.experiment.graph import build
from pipeline.experiment.spec import Experiment, read


def test_a_file_and_its_python_twin_have_equal_versions(tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    twin = notbugs.Experiment(**copy.deepcopy(TINY))
    assert isinstance(twin, Experiment)
    versions = [{node.id: node.version for node in build(one)} for one in (read(tmp_path / "tiny.yaml"), twin)]
    assert versions[0] == versions[1] != {}


def test_a_run_returns_its_results_and_a_second_one_makes_nothing_again(opened, tmp_path):
    store, found = shutil.copytree(opened[0], tmp_path / "store"), opened[1]
    table = found.to_pandas()
    assert table["model"].tolist() == ["standard", "from_other"] and table["accuracy"].between(0, 1).all()
    assert found.page.endswith("report.html")
    before = {path: path.stat().st_mtime_ns for path in store.glob("datasets/**/*")}
    again = notbugs.run(notbugs.Experiment(**TINY), store=store, engine="inline", only=["accuracy"])
    assert again.rows == found.rows and again.run != found.run
    assert {path: path.stat().st_mtime_ns for path in store.glob("datasets/**/*")} == before


def test_a_failed_run_names_what_failed(tmp_path):
    wrong = copy.deepcopy(TINY)
    wrong["models"]["standard"]["train"]["lr"] = 1e30
    with pytest.raises(notbugs.BadData, match=r"models/standard: the loss is nan"):
        notbugs.run(wrong, store=tmp_path / "s", engine="inline")


def test_the_public_names_are_listed_typed_and_loaded_when_used():
    assert "open" in dir(notbugs) and set(notbugs.__all__) == set(dir(notbugs))
    assert all(getattr(notbugs, name).__doc__ for name in notbugs.__all__)
    with pytest.raises(AttributeError, match="notbugs has no attak; it has BadData"):
        notbugs.attak  # noqa: B018
    loaded = "import sys, notbugs; print('torch' in sys.modules or 'ray' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert said.stdout == "False\n"
