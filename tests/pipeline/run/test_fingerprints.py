"""Files of the user's own that a node is made from: changed, it is made again, with what depends on it."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image
from support import contents, tar_of

from pipeline.cli import main
from stages.images import encode
from stages.nets import small_cnn

NET = """
from torch import nn
import helper

def net(classes, channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, {width}), helper.act(), nn.Linear({width}, classes))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The user's folder, as the working directory, with nothing of it imported before or after."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    for name in ("mynets", "helper"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield tmp_path
    for name in ("mynets", "helper"):
        sys.modules.pop(name, None)


def ask(verb, experiment, *more, fails=0):
    """The states of the nodes after a command: of a plan as JSON, of a run by its record."""
    Path("experiment.yaml").write_text(yaml.safe_dump(experiment))
    engine = ["--engine", "inline"] if verb == "run" else []
    done = CliRunner().invoke(
        main, [verb, "experiment.yaml", "--store", "s", "--data", "data", *engine, *more, "--json"]
    )
    assert done.exit_code == fails, done.output
    if fails:
        return done.stderr
    nodes = json.loads(done.stdout)["nodes"]
    return (
        {node["node"]: node for node in nodes} if verb == "plan" else {n: facts["state"] for n, facts in nodes.items()}
    )


def files_of(node):
    return [reason["key"] for reason in node["why"] if reason["kind"] == "file"]


def test_a_changed_network_is_not_served_as_it_was(folder):
    (folder / "mynets.py").write_text(NET.format(width=8))
    (folder / "helper.py").write_text("from torch.nn import ReLU as act\n")
    mine = {"on": "clean", "arch": "mynets:net", "epochs": 1, "batch_size": 32, "threads": 1}
    attack = {"images": "clean", "model": "mine", "eps": 1.5, "steps": 1, "batch_size": 32}
    experiment = {
        "name": "mine",
        "datasets": {
            "clean": {"load": {"source": "sklearn-digits", "shard_size": 64, "limit": 64}},
            "other": {"attack": attack, "relabel": "other"},
        },
        "models": {
            "mine": {"train": mine},
            "not_mine": {"train": {**mine, "arch": "small_cnn", "on": "clean"}},
        },
    }
    assert set(ask("run", experiment).values()) == {"done"}
    (model,) = (folder / "s/models/mine").iterdir()
    before = (model / "weights.safetensors").read_bytes()
    os.utime("mynets.py", (1, 1))
    assert set(ask("run", experiment).values()) == {"cached"}, "a time does not change code"

    (folder / "mynets.py").write_text(NET.format(width=16))
    (folder / "helper.py").write_text("from torch.nn import Tanh as act\n")
    planned = ask("plan", experiment)
    assert {name: node["there"] for name, node in planned.items()} == {
        "datasets/clean": True,
        "models/mine": False,
        "datasets/other": False,
        "models/not_mine": True,
    }
    assert files_of(planned["models/mine"]) == files_of(planned["datasets/other"]) == ["helper.py", "mynets.py"]
    assert ask("run", experiment) == {
        "datasets/clean": "cached",
        "models/mine": "done",
        "datasets/other": "done",
        "models/not_mine": "cached",
    }
    assert (model / "weights.safetensors").read_bytes() != before
    assert all(node["there"] for node in ask("plan", experiment).values())

    (folder / "helper.py").write_text(
        "from torch.nn import Sigmoid as act\n"
    )  # the same weights, read by another network
    assert files_of(ask("plan", experiment)["datasets/other"]) == ["helper.py"]


def images(root, count=8, value=0):
    for split in ("train", "val"):
        for label in ("a", "b"):
            place = root / split / label
            place.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = np.full((8, 8, 3), 10 * i + (label == "b") + value, np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")


FOLDER = {
    "name": "photos",
    "datasets": {
        "photos": {"load": {"source": "image-folder", "root": "photos", "shard_size": 4}},
        "noisy": {"attack": {"images": "photos", "method": "noise", "eps": 0.5}, "relabel": "other"},
    },
}


def test_a_changed_image_folder_is_loaded_again_and_no_more_of_it_than_changed(folder):
    images(folder / "data/photos")
    assert set(ask("run", FOLDER).values()) == {"done"}
    (folder / "data").rename(folder / "moved")
    (folder / "data").symlink_to("moved")
    assert set(ask("run", FOLDER).values()) == {"cached"}, "moved"

    marks = {path: path.stat().st_mtime_ns for path in (folder / "s/datasets/photos").glob("*/commits/*.json")}
    changed = folder / "data/photos/train/b/3.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(changed)
    planned = ask("plan", FOLDER)
    assert files_of(planned["datasets/photos"]) == ["train/b/3.png"]
    assert planned["datasets/noisy"]["there"] and planned["datasets/noisy"]["awaits"] == ["datasets/photos"]
    before = contents(folder / "s")
    assert set(ask("run", FOLDER).values()) == {"done"}
    after = contents(folder / "s")
    assert all(before[name] != after[name] for name in before)
    assert sum(path.stat().st_mtime_ns != time for path, time in marks.items()) == 1, "one shard holds it"

    (folder / "data/photos/val/a/9.png").write_bytes(changed.read_bytes())
    changed.unlink()
    assert files_of(ask("plan", FOLDER)["datasets/photos"]) == ["test/a/9.png", "train/b/3.png"]
    (folder / "data").unlink()
    assert set(ask("run", FOLDER).values()) == {"cached"}, "removed after it was loaded"


def test_contents_are_compared_where_that_is_asked(folder):
    images(folder / "data/photos")
    ask("run", FOLDER)
    for path in (folder / "data").rglob("*.png"):
        os.utime(path, (1, 1))
    assert len(files_of(ask("plan", FOLDER)["datasets/photos"])) == 20
    assert set(ask("run", FOLDER, "--check-files").values()) == {"cached"}, "only times differ"
    assert set(ask("run", FOLDER).values()) == {"done", "cached"}, "the same bytes"
    path = folder / "data/photos/train/a/0.png"
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    about = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert ask("plan", FOLDER)["datasets/photos"]["there"], "same name, size and time"
    assert files_of(ask("plan", FOLDER, "--check-files")["datasets/photos"]) == ["train/a/0.png"]
