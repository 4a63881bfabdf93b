"""Code of the user's, through the command line: tried where it can do no harm, and run after what is installed."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from pipeline.cli import main
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


def experiment(arch, **more):
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
        "models": {
            "mine": {"train": {"on": "clean", "arch": arch, "epochs": 1, "batch_size": 32, "threads": 1, **more}}
        },
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The user's folder, which they stand in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "mynets", raising=False)
    (tmp_path / "mynets.py").write_text(NETS)
    return tmp_path


def ask(verb, what, *more):
    """A command about an experiment, in this process."""
    Path("experiment.yaml").write_text(yaml.safe_dump(what))
    return CliRunner().invoke(main, [verb, "experiment.yaml", "--store", "s", *more])


# -------------------------------------------------------------------------- tried where it does no harm

HARMFUL = {
    "os:_exit": "ends the program with exit code 10 when it is tried",
    "mynets:exits": "cannot be built for 10 classes: mynets.py line 14: it ends the program (3)",
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
    brought = {"load": {"arch": "os:_exit", "weights": "w.pt", "classes": 10, "shape": [1, 8, 8]}}
    said = ask("plan", {"name": "mine", "models": {"theirs": brought}})
    assert said.exit_code == 2 and said.stderr.startswith("Error: models.theirs.load: ")


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
