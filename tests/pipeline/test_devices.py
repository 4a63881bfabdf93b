"""The settings that every process of a run computes with, and the recorded device of a node."""

import json
import os
import sys
from collections import Counter

import pytest
import yaml
from click.testing import CliRunner

from pipeline.cli import main
from stages import device, train

WITNESS = """
import json, os
from pathlib import Path
from stages.device import settings
from stages.nets import small_cnn

class Witness:
    def __call__(self, module, inputs):
        line = {"process": os.getpid(), **settings()}
        with (Path(__file__).parent / "seen.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\\n")

def net(classes, channels):
    net = small_cnn(classes, channels)
    net.register_forward_pre_hook(Witness())
    return net
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of the run and of the user's modules."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", sys.path[:])
    return tmp_path


def experiment(workers, module="witness"):
    train = {"arch": f"{module}:net", "epochs": 1, "batch_size": 64, "threads": 1}
    attack = {"images": "clean", "model": "model", "eps": 1, "steps": 2, "batch_size": 32}
    threat = {"eps": 1, "steps": 1, "batch_size": 32, "precision": "tf32"}
    return {
        "name": "seen",
        "datasets": {
            "clean": {"load": {"source": "sklearn-digits", "shard_size": 64, "limit": 128}},
            "exact": {"attack": attack, "relabel": "next"},
            "tf32": {"attack": attack | {"precision": "tf32", "splits": ["test"]}, "relabel": "next"},
            "robust": {"invert": {"images": "clean", "model": "model", "steps": 2, "batch_size": 32}},
        },
        "models": {"model": {"train": train | {"on": "clean", "workers": workers}}},
        "evaluations": {"accuracy": {"models": ["model"], "on": "clean", "attacks": [threat]}},
    }


def run(folder, what, *args):
    (folder / f"{what['models']['model']['train']['arch'].partition(':')[0]}.py").write_text(WITNESS)
    file = folder / "seen.yaml"
    file.write_text(yaml.safe_dump(what))
    result = CliRunner().invoke(main, ["run", str(file), "--store", str(folder / "store"), *args])
    assert result.exit_code == 0, result.output
    return result.output


def seen(folder, here):
    """Processes and settings that the network recorded at each call, in this process or in others."""
    lines = [json.loads(line) for line in (folder / "seen.jsonl").read_text().splitlines()]
    lines = [line for line in lines if (line["process"] == os.getpid()) is here]
    return {line["process"] for line in lines}, Counter((line["tf32"], line["deterministic"]) for line in lines)


def marks(folder, dataset):
    found = sorted(folder.glob(f"store/*/{dataset}/*/commits/*.json"))
    return {path.stem: json.loads(path.read_text()) for path in found}


def manifest(folder, node):
    (path,) = folder.glob(f"store/*/{node}/*/manifest.json")
    return json.loads(path.read_text())


def test_numbers_and_kernels_are_set_before_the_first_pass_in_the_process_that_runs_all(folder):
    run(folder, experiment(1, "one"), "--engine", "inline")
    _, settings = seen(folder, here=True)
    assert settings.pop((False, True)) > 10
    assert settings.pop((True, True)) >= 2
    assert sum(settings.values()) <= 3  # tries of the network before the run, whose answers nobody looks at


@pytest.mark.slow  # a worker group of Ray Train takes long to start
def test_every_worker_and_every_process_of_a_group_sets_them_too(folder):
    run(folder, experiment(2))
    processes, settings = seen(folder, here=False)
    assert len(processes) >= 4  # two that train, an actor for each of the others, at least
    assert settings.pop((False, False), 0) <= 3  # tries of the network before the run, whose answers nobody looks at
    assert set(settings) == {(False, True), (True, True)}


def test_the_device_stands_in_every_mark_and_a_node_made_on_two_kinds_says_so(folder, monkeypatch):
    what = experiment(1, "two")
    assert "unlike devices" not in run(folder, what, "--engine", "inline", "--only", "exact")
    here = device.kind()
    assert {mark["device"] for mark in marks(folder, "exact").values()} == {here}
    assert all(mark["device"] for mark in marks(folder, "clean").values())
    assert manifest(folder, "exact")["devices"] == {here: 2}
    assert manifest(folder, "model")["devices"] == {here: 1}
    assert manifest(folder, "model")["settings"] == {"float32, deterministic kernels": 1}
    assert manifest(folder, "exact")["settings"] == {"float32, deterministic kernels": 2}
    assert manifest(folder, "clean")["settings"] == {}
    run(folder, what, "--engine", "inline")
    assert {tuple(mark["settings"]) for mark in marks(folder, "tf32").values()} == {("tf32, deterministic kernels",)}
    assert manifest(folder, "tf32")["settings"] == {"tf32, deterministic kernels": 2}
    assert manifest(folder, "accuracy")["settings"] == {
        "float32, deterministic kernels": 2,  # what is scored clean
        "tf32, deterministic kernels": 2,  # its attack
    }
    (made,) = folder.glob("store/datasets/exact/*")
    (made / "commits" / "train-000001.json").unlink()
    monkeypatch.setattr(device, "kind", lambda: "NVIDIA H100 80GB HBM3, 9.0")
    said = run(folder, what, "--engine", "inline", "--only", "exact")
    assert "datasets/exact: done" in said
    assert f"1 on NVIDIA H100 80GB HBM3, 9.0; 1 on {here}" in said
    assert manifest(folder, "exact")["devices"] == {"NVIDIA H100 80GB HBM3, 9.0": 1, here: 1}


def test_processes_that_decode_what_streams_change_no_byte(folder, monkeypatch):
    asked = {"on": "clean", "arch": "small_cnn", "epochs": 2, "batch_size": 64, "threads": 1, "memory_budget": 0}
    clean = {"load": {"source": "sklearn-digits", "shard_size": 64, "limit": 400}}
    what = {"name": "streamed", "datasets": {"clean": clean}, "models": {"model": {"train": asked}}}
    file, found = folder / "streamed.yaml", []
    file.write_text(yaml.safe_dump(what))
    for count in (0, 2):
        monkeypatch.setattr(train, "spare", lambda where, count=count: count)
        store = folder / f"store-{count}"
        result = CliRunner().invoke(main, ["run", str(file), "--store", str(store), "--engine", "inline"])
        assert result.exit_code == 0, result.output
        (path,) = store.glob("models/model/*/manifest.json")
        found.append(json.loads(path.read_text())["content"])
    assert found[0] == found[1]
