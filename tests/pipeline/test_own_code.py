"""The user's own code, through the command line: tried in a separate process, and imported after installed modules."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from support import command, contents

import pipeline
import stages
from pipeline.cli import main
from pipeline.run import artifacts
from stages import apart

NETS = """
import os, sys, time
from torch import nn

class Net(nn.Sequential):
    def __init__(self, classes):
        print("told as it is built")
        super().__init__(nn.Flatten(), nn.Linear(64, classes))
    def forward(self, x):
        print("told as images go through it")
        return super().forward(x)

def exits(classes):
    sys.exit(3)

def hangs(classes):
    while True: time.sleep(0.1)

class Dies(Net):
    def forward(self, x):
        os._exit(7)

def moody(classes):
    if os.path.exists("bad mood"):
        os._exit(7)
    return Net(classes)
"""


def experiment(arch):
    """A training of the user's network, and a dataset attacked through it."""
    return {
        "name": "mine",
        "datasets": {
            "clean": {"load": {"source": "sklearn-digits", "shard_size": 64, "limit": 64}},
            "other": {
                "attack": {"images": "clean", "model": "mine", "eps": 1.5, "steps": 2, "batch_size": 32},
                "relabel": "other",
            },
        },
        "models": {"mine": {"train": {"on": "clean", "arch": arch, "epochs": 1, "batch_size": 32, "threads": 1}}},
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The user's folder, as the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "mynets", raising=False)
    (tmp_path / "mynets.py").write_text(NETS)
    return tmp_path


def ask(verb, what, *more):
    """Run a command about an experiment, in this process."""
    Path("experiment.yaml").write_text(yaml.safe_dump(what))
    return CliRunner().invoke(main, [verb, "experiment.yaml", "--store", "s", *more])


# -------------------------------------------------------------------------- tried where it does no harm

HARMFUL = {
    "os:_exit": "ends the program with exit code 10 when it is tried",
    "./mynets.py:hangs": "does not come to an end within 10 s when it is tried, in mynets.py line 17",
    "mynets:Dies": "ends the program with exit code 7 when it is tried",
}


@pytest.mark.parametrize("arch", HARMFUL)
def test_an_arch_that_ends_or_holds_the_program_is_one_sentence(arch, folder, monkeypatch):
    monkeypatch.setattr(apart, "PATIENCE", 10.0)
    said = ask("run", experiment(arch), "--engine", "inline")
    assert (said.exit_code, said.stderr) == (2, f"Error: models.mine.train: arch {arch} {HARMFUL[arch]}\n")
    assert not (folder / "s").exists()


def test_a_checkpoint_whose_arch_ends_the_program_is_one_sentence(folder):
    (folder / "data").mkdir()
    (folder / "data/w.pt").write_bytes(b"")
    brought = {"pretrained": {"arch": "os:_exit", "weights": "w.pt", "classes": 10, "shape": [1, 8, 8]}}
    said = ask("plan", {"name": "mine", "models": {"theirs": brought}})
    assert said.exit_code == 2 and said.stderr.startswith("Error: models.theirs.pretrained: ")


def test_the_answer_of_a_command_is_not_mixed_with_what_the_users_network_prints(folder):
    for verb, more in (("plan", []), ("run", ["--engine", "inline"])):
        said = ask(verb, experiment("mynets:Net"), "--json", *more)
        assert said.exit_code == 0, said.stderr
        json.loads(said.stdout)
    assert "told as images go through it" in said.stderr


def test_the_network_of_a_model_that_is_there_is_tried_before_another_node_runs_it(folder):
    made = ask("run", experiment("mynets:moody"), "--engine", "inline", "--only", "mine")
    assert made.exit_code == 0, made.stderr
    (folder / "bad mood").touch()
    said = ask("run", experiment("mynets:moody"), "--engine", "inline")
    assert said.exit_code == 2
    assert (
        said.stderr
        == "Error: datasets.other.attack: arch mynets:moody ends the program with exit code 7 when it is tried\n"
    )
    (folder / "bad mood").unlink()
    assert ask("run", experiment("mynets:moody"), "--engine", "inline").exit_code == 0
    (folder / "bad mood").touch()
    assert ask("run", experiment("mynets:moody"), "--engine", "inline").exit_code == 0, "all is there: nothing runs it"


# ------------------------------------------------------------------------ behind what is installed

HIDING = ["json", "numpy", "pipeline", "pyarrow", "random", "ray", "torch", "stages", "stages/train"]
"""What is installed, or a part of it, and is also the name of a file in the user's folder."""


def hide(folder, names=HIDING):
    """Fill a folder with modules that must not shadow installed ones."""
    for name in names:
        path = folder / name / "__init__.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise RuntimeError(f'{__file__} is taken for what is installed')")


OWN = """
from torch import nn
from .layers import flat

def net(classes):
    return nn.Sequential(flat, nn.Linear(64, classes))
"""


@pytest.mark.slow
def test_nothing_in_the_users_folder_is_taken_for_what_is_installed_here_or_in_a_worker(tmp_path, notbugs):
    """On Ray: a training and an attack through a network of the user's, which imports its sibling."""
    hide(tmp_path)
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets/mine.py").write_text(OWN)
    (tmp_path / "nets/layers.py").write_text("from torch import nn\nflat = nn.Flatten()")
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(experiment("./nets/mine.py:net")))
    done = notbugs("run", "experiment.yaml", "--store", "ray")
    assert done.returncode == 0, done.stderr
    assert set(contents(tmp_path / "ray")) == {"datasets/clean", "datasets/other", "models/mine"}


BEGUN = {
    "python -m pipeline": ([sys.executable, "-m", "pipeline"], {}, [name for name in HIDING if name != "pipeline"]),
    "a search path that begins with a colon": ([command()], {"PYTHONPATH": ":/nowhere"}, ["stages", "torch", "yaml"]),
    "a search path to a project with stages": ([command()], {"PYTHONPATH": "project"}, ["project/stages", "torch"]),
    "Python's own switch": ([command()], {"PYTHONSAFEPATH": "1"}, HIDING),
}


@pytest.mark.parametrize("how", BEGUN)
def test_however_the_program_is_begun(how, tmp_path):
    words, variables, names = BEGUN[how]
    hide(tmp_path, names)
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(experiment("small_cnn")))
    asked = [*words, "plan", "experiment.yaml", "--json"]
    done = subprocess.run(
        asked, cwd=tmp_path, env=os.environ | variables, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["nodes"]) == 3


def test_the_cost_is_measured_by_what_is_installed(tmp_path, notbugs):
    hide(tmp_path, [*HIDING, "multiprocessing", "socket", "struct"])
    (tmp_path / "experiment.yaml").write_text(
        "name: e\ndatasets: {clean: {load: {source: sklearn-digits, limit: 64}}}\n"
    )
    done = notbugs("plan", "experiment.yaml", "--cost", "--workers", 1)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def elsewhere(tmp_path):
    """A copy of our code, and the Python of an environment that has every package except our own."""
    for package in (pipeline, stages):
        source = Path(package.__path__[0])
        shutil.copytree(source, tmp_path / "copy" / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    (site,) = (tmp_path / "env/lib").glob("*/site-packages")
    (site / "borrowed.pth").write_text(str(Path(torch.__file__).parent.parent))
    return tmp_path / "copy", tmp_path / "env/bin/python"


@pytest.mark.slow
def test_code_that_is_not_installed_runs_in_workers_too_where_the_program_is_begun_in_its_folder(elsewhere):
    copy, python = elsewhere
    (copy / "mynets.py").write_text(NETS)
    (copy / "experiment.yaml").write_text(yaml.safe_dump(experiment("mynets:Net")))
    asked = [python, "-m", "pipeline", "run", "experiment.yaml", "--store", "s"]
    done = subprocess.run(asked, cwd=copy, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr


MISLED = """
import sys
if any("default_worker" in part for part in sys.orig_argv):
    sys.path.insert(0, {!r})
"""
"""A machine whose workers find another copy of our code."""


@pytest.mark.slow
def test_a_worker_that_runs_other_code_refuses_the_job_alone_or_in_a_group(elsewhere, tmp_path, notbugs, monkeypatch):
    copy, _ = elsewhere
    with (copy / "stages/pgd.py").open("a") as file:
        file.write("# another version\n")
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(MISLED.format(str(copy)))
    what = experiment("small_cnn")
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(what))
    made = notbugs("run", "experiment.yaml", "--store", "s", "--only", "clean", "--engine", "inline")
    assert made.returncode == 0, made.stderr
    what["models"]["group"] = {"train": what["models"]["mine"]["train"] | {"workers": 2}}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(what))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    done = notbugs("run", "experiment.yaml", "--store", "s")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for model in ("mine", "group"):
        assert (
            f"models/{model}: failed, a worker on {artifacts.host()} runs other code, of {copy}, than this command, of "
            in done.stderr
        )
