"""Files of the user's own that a node is made from: changed, it is made again, with what depends on it."""

import copy
import hashlib
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
from support import TINY, contents, tar_of

import notbugs
from pipeline.cli import main
from pipeline.run.jobs import checks
from pipeline.store import Store
from stages import load
from stages.images import encode
from stages.nets import small_cnn
from stages.shard import unpack

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


def test_a_changed_network_is_not_served_as_it_was(folder, monkeypatch):
    monkeypatch.setattr(checks, "apart", lambda function, *args, arch: function(*args))  # a process takes seconds
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
    os.utime("mynets.py", (1, 1))
    assert set(ask("run", experiment).values()) == {"cached"}, "a time does not change code"


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
    path = folder / "data/photos/train/a/0.png"
    about = path.stat()
    for each in (folder / "data").rglob("*.png"):
        os.utime(each, (1, 1))
    for more in ([], ["--check-files"]):
        assert set(ask("run", FOLDER, *more).values()) == {"cached"}, "only times differ"
    changed = folder / "data/photos/val/a/0.png"
    content = changed.read_bytes()
    changed.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert files_of(ask("plan", FOLDER)["datasets/photos"]) == ["test/a/0.png"], "of the same size, and no other"
    changed.write_bytes(content)
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert ask("plan", FOLDER)["datasets/photos"]["there"], "same name, size and time"
    assert files_of(ask("plan", FOLDER, "--check-files")["datasets/photos"]) == ["train/a/0.png"]


def shard(*values):
    """A tar of images of one value each; the label is its parity."""
    files = [
        (f"{i:04d}.{ending}", content)
        for i, value in enumerate(values)
        for ending, content in (("png", encode(np.full((8, 8, 3), value, np.uint8))), ("cls", b"%d" % (value % 2)))
    ]
    return tar_of(*files)


def test_shards_and_checkpoints_that_were_changed_are_read_again(folder):
    data = folder / "data"
    data.mkdir()
    for name, values in {"train-0": range(8), "train-1": range(8, 16), "test-0": range(16, 20)}.items():
        (data / f"{name}.tar").write_bytes(shard(*values))
    torch.manual_seed(0)
    torch.save(small_cnn(2, 3).state_dict(), data / "w.pt")
    brought = {"arch": "small_cnn", "weights": "w.pt", "shape": [3, 8, 8], "classes": 2}
    shards = {"source": "webdataset", "shards": {"train": "train-{0..1}.tar", "test": "test-0.tar"}, "shard_size": 8}
    experiment = {
        "name": "shards",
        "datasets": {"clean": {"load": shards}},
        "models": {
            "brought": {"pretrained": brought},
            "kept": {"pretrained": brought | {"sha256": _sha(data / "w.pt")}},
        },
        "evaluations": {"accuracy": {"models": ["brought"], "on": "clean"}},
    }
    assert set(ask("run", experiment).values()) == {"done"}
    assert set(ask("run", experiment, "--check-files").values()) == {"cached"}
    for path in data.iterdir():
        os.utime(path, (1, 1))
    assert set(ask("run", experiment).values()) == {"cached"}, "only times differ"

    (data / "train-1.tar").write_bytes(shard(*range(30, 38)))
    torch.save(small_cnn(2, 3).state_dict(), data / "w.pt")
    for more in ([], ["--check-files"]):
        planned = ask("plan", experiment, *more)
        assert files_of(planned["datasets/clean"]) == ["train/train-1.tar"]
        assert files_of(planned["models/brought"]) == ["w.pt"]
        assert planned["models/kept"]["there"], "a digest in the recipe stands for the file"
    assert ask("run", experiment) == {
        "datasets/clean": "done",
        "models/brought": "done",
        "models/kept": "cached",
        "evaluations/accuracy": "done",
    }
    for path in data.iterdir():
        path.unlink()
    assert set(ask("run", experiment).values()) == {"cached"}, "removed after they were read"


def _sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_run_that_failed_in_mid_way_never_mixes_old_and_new_files(folder):
    images(folder / "data/photos")
    for path in sorted((folder / "data/photos/train/b").iterdir())[:3]:
        path.write_bytes(b"no image")
    experiment = {"name": "photos", "datasets": {"photos": FOLDER["datasets"]["photos"]}}
    ask("run", experiment, fails=1)
    images(folder / "data/photos", value=100)
    assert ask("run", experiment) == {"datasets/photos": "done"}
    (made,) = (folder / "s/datasets/photos").iterdir()
    tars = [unpack(path.stem, path.read_bytes(), 3, 2) for path in made.glob("*.tar")]
    assert min(tar.images().min() for tar in tars) == 100 and sum(map(len, tars)) == 32


def test_a_file_that_changes_under_a_run_fails_the_shard_that_was_made_of_it(folder, monkeypatch):
    images(folder / "data/photos")
    read = load.read

    def changing(*args):
        (folder / "data/photos/train/a/0.png").write_bytes(encode(np.zeros((8, 8, 3), np.uint8)) + b"more")
        return read(*args)

    monkeypatch.setattr(load, "read", changing)
    experiment = {"name": "photos", "datasets": {"photos": FOLDER["datasets"]["photos"]}}
    said = ask("run", experiment, fails=1)
    assert "1 of 8 shards failed, train-00000" in said and "changed after they were listed: run again" in said
    monkeypatch.undo()


def test_a_plan_names_what_differs_from_what_the_experiment_had_before(folder):
    experiment = copy.deepcopy(TINY)
    del experiment["models"]["from_other"], experiment["evaluations"]
    experiment["datasets"]["clean"]["load"]["limit"] = 64
    experiment["models"]["standard"]["train"]["epochs"] = 1
    assert all(node["why"] == [] for node in ask("plan", experiment).values()), "nothing was made before"
    ask("run", experiment)
    slower = copy.deepcopy(experiment)
    slower["models"]["standard"]["train"]["lr"] = 0.02
    assert ask("plan", slower)["datasets/other"]["why"][0]["kind"] == "input"
    said = CliRunner().invoke(main, ["plan", "experiment.yaml", "--store", "s"]).stdout
    assert said.count("differs from") == 1 and "datasets/other: follows from that\n" in said, "the cause is named once"
    experiment["datasets"]["other"]["attack"] |= {"eps": 2.5, "stop_at_margin": 3}
    experiment["datasets"]["control"]["relabel"] = "next"
    planned = ask("plan", experiment)
    assert planned["datasets/other"]["why"] == [
        {"kind": "parameter", "key": "eps", "before": 1.5, "now": 2.5},
        {"kind": "parameter", "key": "step_size", "before": 0.3, "now": 0.5},  # by default a fifth of eps
        {"kind": "parameter", "key": "stop_at_margin", "before": None, "now": 3.0},
    ]
    assert [reason["key"] for reason in planned["datasets/control"]["why"]] == ["relabel.rule"]
    experiment["models"]["standard"]["train"]["lr"] = 0.01
    said = CliRunner().invoke(main, ["plan", "experiment.yaml", "--store", "s"]).stdout
    line = "eps was 1.5, is 2.5; step_size was 0.3, is 0.5; stop_at_margin was not set, is 3.0"
    assert f"datasets/other: differs from this experiment's newest version: {line}\n" in said
    Path("another.yaml").write_text(json.dumps(experiment | {"name": "another"}))
    said = CliRunner().invoke(main, ["plan", "another.yaml", "--store", "s"]).stdout
    assert "to make" in said and "differs from" not in said, "what another experiment of these names made is no news"
    another = copy.deepcopy(experiment) | {"name": "another"}
    another["datasets"]["other"]["attack"]["eps"] = 3.5
    Path("another.yaml").write_text(json.dumps(another))
    made = CliRunner().invoke(main, ["run", "another.yaml", "--store", "s", "--engine", "inline", "--only", "other"])
    assert made.exit_code == 0, made.stderr
    said = CliRunner().invoke(main, ["plan", "experiment.yaml", "--store", "s"]).stdout
    assert "eps was 1.5, is 2.5" in said and "3.5" not in said, "nor is it what this experiment had before"
    assert planned["datasets/other"]["state"] == "to make", "this version was never made"
    planned = ask("plan", experiment)
    (reason, *_), version = planned["datasets/other"]["why"], planned["models/standard"]["version"]
    assert (reason["kind"], reason["key"], reason["now"]) == ("input", "model", version)


def test_a_node_of_another_stage_differs_in_its_stage_and_inputs_with_other_versions_are_one_phrase(folder):
    """A checkpoint in place of a training differed in twenty parameters, most of which the user never wrote."""
    experiment = copy.deepcopy(TINY)
    experiment["datasets"]["clean"]["load"]["limit"] = 64
    for model in experiment["models"].values():
        model["train"]["epochs"] = 1
    ask("run", experiment)
    torch.save(small_cnn(10, 1).state_dict(), folder / "net.pt")
    checkpoint = {"arch": "small_cnn", "weights": str(folder / "net.pt"), "shape": [1, 8, 8]}
    experiment["models"]["standard"] = {"pretrained": checkpoint}
    planned = ask("plan", experiment)
    why = {"kind": "parameter", "key": "stage", "before": "train", "now": "pretrained"}
    assert planned["models/standard"]["why"] == [why]
    said = CliRunner().invoke(main, ["plan", "experiment.yaml", "--store", "s"]).stdout
    assert 'version: stage was "train", is "pretrained"\n' in said
    assert "evaluations/accuracy" in said.partition(": follow from that\n")[0].splitlines()[-1]
    assert "models.standard.pretrained: neither the recipe nor the checkpoint has mean and std" in said
    checkpoint |= {"mean": [0.5]}
    ask("plan", experiment)
    said = CliRunner().invoke(main, ["plan", "experiment.yaml", "--store", "s"]).stdout
    assert "models.standard.pretrained: it has no std beside its mean: set both" in said
    checkpoint |= {"mean": [0], "std": [1]}
    ask("plan", experiment)
    assert "pretrained: " not in CliRunner().invoke(main, ["plan", "experiment.yaml", "--store", "s"]).stdout
    run = ["run", "experiment.yaml", "--store", "s", "--engine", "inline", "--only", "models/from_other"]
    assert CliRunner().invoke(main, run).exit_code == 0
    said = CliRunner().invoke(main, ["plan", "experiment.yaml", "--store", "s"]).stdout
    assert "version: models/from_other and models/standard have other versions\n" in said, "both are there"


def test_the_same_recipe_under_another_name_is_pointed_at(folder):
    experiment = copy.deepcopy(TINY)
    del experiment["datasets"]["control"]
    experiment["datasets"]["clean"]["load"]["limit"] = 64
    datasets, models = experiment["datasets"], experiment["models"]
    for model in models.values():
        model["train"]["epochs"] = 1
    made = ask("run", experiment | {"models": models | {"twin": models["standard"]}})
    assert sorted(made[f"models/{name}"] for name in ("twin", "standard")) == ["cached", "done"], "made once in a run"

    moved = {"attack": datasets["other"]["attack"] | {"images": "pure"}, "relabel": "other"}
    renamed = {
        "name": "renamed",
        "datasets": {"pure": datasets["clean"], "moved": moved},
        "models": {
            "standard": {"train": models["standard"]["train"] | {"on": "pure"}},
            "from_other": {"train": models["from_other"]["train"] | {"on": "moved"}},
        },
        "evaluations": {"scores": experiment["evaluations"]["accuracy"] | {"on": "pure"}},
    }
    planned = ask("plan", renamed)
    others = {name: node["same_as"] and node["same_as"].rpartition("/")[0] for name, node in planned.items()}
    assert others == {
        "datasets/pure": "datasets/clean",
        "datasets/moved": "datasets/other",
        "models/standard": None,
        "models/from_other": None,
        "evaluations/scores": "evaluations/accuracy",
    }
    for _ in range(2):
        assert set(ask("run", renamed).values()) == {"cached"}
    for name in ("datasets/pure", "datasets/moved", "evaluations/scores"):
        assert [path.name for path in (folder / "s" / name).rglob("*") if path.is_file()] == ["manifest.json"]
    here, there = (notbugs.open(name, store="s") for name in ("moved", "other"))
    assert (here.name, here[0].label, here.table) == ("moved", there[0].label, there.table)
    shown = json.loads(CliRunner().invoke(main, ["show", "--store", "s", "--json"]).stdout)
    rows = {(row["evaluation"], row["on"], row["trained_on"]): row["attack_success_rate"] for row in shown["rows"]}
    assert rows == {("scores", "pure", "pure"): None, ("scores", "pure", "moved"): there.manifest["success_rate"]}
    page = CliRunner().invoke(main, ["report", "--store", "s"])
    assert page.exit_code == 0 and "moved" in Path(page.stdout.strip()).read_text()
    verified = CliRunner().invoke(main, ["verify", "--store", "s"])
    assert verified.exit_code == 0 and "datasets/moved" in verified.stdout

    next((folder / "s/datasets/other").glob("*/train-000000.tar")).unlink()
    assert not ask("plan", renamed)["datasets/moved"]["there"], "what it points at is damaged"
    damaged = [CliRunner().invoke(main, ["verify", "datasets/other", "datasets/moved", "--store", "s"]) for _ in "12"]
    assert "points at another name, where the node is missing or damaged" in damaged[1].stdout
    assert ask("run", renamed, "--only", "moved")["datasets/moved"] == "done"
    assert ask("run", experiment, "--only", "other")["datasets/other"] == "cached", "and now the other way round"


def test_shards_on_an_object_store_are_compared_by_one_listing(folder, s3, s3_url):
    store = Store(s3_url)
    for name, values in {"a-0": range(8), "a-1": range(8, 16), "b-0": range(16, 20)}.items():
        store.put(f"{name}.tar", shard(*values))
    shards = {"source": "webdataset", "shards": {"train": f"{s3_url}/a-{{0..1}}.tar", "test": f"{s3_url}/b-0.tar"}}
    experiment = {"name": "far", "datasets": {"clean": {"load": shards}}}
    assert ask("run", experiment) == {"datasets/clean": "done"}
    before = s3.requests()
    assert ask("run", experiment) == {"datasets/clean": "cached"}
    asked = s3.requests() - before
    store.put("a-1.tar", shard(*range(30)))  # times are whole seconds there
    assert files_of(ask("plan", experiment)["datasets/clean"]) == ["train/a-1.tar"]
    assert ask("run", experiment) == {"datasets/clean": "done"}
    for name in ("a-0", "a-1", "b-0"):
        store.delete(f"{name}.tar")
    assert ask("run", experiment) == {"datasets/clean": "cached"}
    assert asked == {"LIST": 1}
