"""Every kind of node in one small experiment, made by the command line, and refused requests."""

import copy
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner

from pipeline.cli import main
from pipeline.experiment import spec
from pipeline.experiment.graph import build
from pipeline.run import artifacts
from pipeline.run.jobs import AttackJob, Context
from pipeline.store import Store
from stages.model import save
from stages.recipes import Attack

TRAIN = {"on": "clean", "arch": "small_cnn", "epochs": 1, "batch_size": 32, "threads": 1}
ATTACK = {"images": "clean", "model": "standard", "eps": 1.5, "steps": 2, "batch_size": 32}
KINDS = {
    "name": "kinds",
    "datasets": {
        "clean": {"load": {"source": "sklearn-digits", "shard_size": 48, "limit": 96}},
        "other": {"attack": ATTACK, "relabel": "other"},
        "spared": {"attack": {**ATTACK, "not_transferring_to": ["robust"]}, "relabel": "next"},
        "universal": {"attack": {**ATTACK, "method": "universal"}, "relabel": "other"},
        "turned": {
            "attack": {"images": "clean", "model": "standard", "method": "spatial", "spatial": {"grid": [1, 1, 3]}},
            "relabel": "other",
        },
        "d_r": {"invert": {"images": "clean", "model": "robust", "steps": 2, "batch_size": 32}},
        "d_nr": {"invert": {"images": "clean", "model": "standard", "steps": 2, "start": "noise", "batch_size": 32}},
    },
    "models": {
        "standard": {"train": TRAIN},
        "robust": {"train": {**TRAIN, "adversarial": {"eps": 0.5, "steps": 2}}},
        "turning": {"train": {**TRAIN, "augment": "spatial"}},
        "from_other": {"train": {**TRAIN, "on": "other"}},
        "from_d_r": {"train": {**TRAIN, "on": "d_r"}},
    },
    "evaluations": {
        "accuracy": {
            "models": ["standard", "from_other", "from_d_r", "turning"],
            "on": "clean",
            "attacks": [
                {"eps": [0.5, 1.0], "steps": 2, "restarts": 2},
                {"eps": 1.0, "steps": 2, "surrogate": ["standard", "robust"], "target_rule": "next"},
                {"method": "apgd", "eps": 1.0, "steps": 4},
            ],
            "spatial": [{"search": "random", "tries": 2}],
        },
        "leak": {"leakage": "other"},
        "features": {"usefulness": {"models": ["standard"], "on": "clean", "steps": 1, "limit": 2}},
    },
}


def invoke(*args, code=0):
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == code, f"{result.output}\n{result.stderr}\n{result.exception!r}"
    return result


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The store of the experiment above, and the run's JSON output."""
    folder = tmp_path_factory.mktemp("kinds")
    file = folder / "kinds.yaml"
    file.write_text(yaml.safe_dump(KINDS))
    shown = invoke("run", file, "--store", folder / "store", "--engine", "inline", "--json").stdout
    return folder / "store", json.loads(shown)


def samples(store: Path, name: str) -> dict:
    (file,) = (store / "datasets" / name).glob("*/samples.parquet")
    return pq.read_table(file).to_pydict()


def manifest(store: Path, node: str) -> dict:
    (file,) = (store / node).glob("*/manifest.json")
    return json.loads(file.read_text())


def test_everything_is_made(made):
    _, said = made
    assert {node["state"] for node in said["nodes"].values()} == {"done"}


def test_a_step_is_named_at_which_the_target_was_reached(made):
    rows, facts = samples(made[0], "other"), manifest(made[0], "datasets/other")
    steps = ATTACK["steps"]
    assert all(-1 <= step <= steps for step in rows["success_step"])
    by_step = facts["success_by_step"]
    assert by_step == sorted(by_step) and len(by_step) == steps + 1
    assert by_step[-1] == pytest.approx(sum(s >= 0 for s in rows["success_step"]) / len(rows["key"]), abs=1e-6)


def test_inverted_images_keep_their_labels_and_say_how_near_their_features_are(made):
    rows = samples(made[0], "d_r")
    assert rows["label"] == rows["source_label"]
    assert all(distance >= 0 for distance in rows["distance"])
    assert set(rows["target"]) == {None}
    mean = sum(rows["distance"]) / len(rows["distance"])
    assert manifest(made[0], "datasets/d_r")["distance_mean"] == pytest.approx(mean, rel=1e-5)


def test_the_parts_of_largest_and_least_margin_divide_the_dataset(made):
    whole, top, bottom = (samples(made[0], name) for name in ("other", "other.top", "other.bottom"))
    assert sorted(top["key"] + bottom["key"]) == sorted(whole["key"])
    by_key = dict(zip(whole["key"], whole["margin"], strict=True))
    for shard in set(top["shard"]):
        tops = [by_key[k] for k, s in zip(top["key"], top["shard"], strict=True) if s == shard]
        bottoms = [by_key[k] for k, s in zip(bottom["key"], bottom["shard"], strict=True) if s == shard]
        assert min(tops) >= max(bottoms)
        assert len(tops) == round(0.4 * (len(tops) + len(bottoms)))


def test_a_learning_curve_has_the_clean_test_set_beside_the_labels_trained_on(made):
    (metrics,) = (made[0] / "models/from_other").glob("*/metrics.jsonl")
    line = json.loads(metrics.read_text().splitlines()[0])
    assert 0 <= line["test_accuracy"] <= 1 and 0 <= line["accuracy"] <= 1


def test_every_attack_has_its_average_case_beside_it(made):
    rows = [row for row in made[1]["rows"] if row["evaluation"] == "accuracy"]
    under = rows[0]["under_attack"]
    assert [(a["attack"], a.get("eps"), a.get("surrogate")) for a in under] == [
        ("pgd", 0.5, None), ("pgd", 1.0, None), ("pgd", 1.0, "standard"), ("pgd", 1.0, "robust"),
        ("apgd", 1.0, None), ("spatial", None, None),
    ]  # fmt: skip
    assert all(0 <= attack["accuracy"] <= 1 and 0 <= attack["average"] <= 1 for attack in under)
    assert under[-1]["accuracy"] <= under[-1]["average"]


def test_the_leakage_controls_stand_beside_the_headline(made):
    models = [row["model"] for row in made[1]["rows"] if row["evaluation"] == "leak"]
    assert models == [
        "from_other",
        *(f"from_other.{c}" for c in ("probe", "leakage", "top", "bottom", "robust-source")),
    ]


def test_no_feature_is_more_useful_under_attack(made):
    (row,) = [row for row in made[1]["rows"] if row["kind"] == "usefulness"]
    assert row["points"] and all(gamma <= rho for _, _, rho, gamma in row["points"])
    assert sum(row["counts"].values()) == len(row["points"])


def test_it_is_all_there_the_second_time(made):
    file = made[0].parent / "kinds.yaml"
    again = json.loads(invoke("run", file, "--store", made[0], "--engine", "inline", "--json").stdout)
    assert {node["state"] for node in again["nodes"].values()} == {"cached"}
    assert again["rows"] == made[1]["rows"]


def test_the_tables_show_attacks_transfer_and_features(made):
    shown = invoke("show", "--store", made[0]).stdout
    for said in ("average case", "worst case", "APGD L2 ε 1", "toward next made on", "useful, not robust"):
        assert said in shown


def test_what_a_method_does_not_use_makes_no_other_version():
    one, two = (Attack(images="a", model="m", method="spatial", eps=eps).parameters() for eps in (1, 2))
    assert one == two


def test_the_order_of_the_models_spared_changes_nothing(made):
    def opened(order):
        asked = copy.deepcopy(KINDS)
        asked["datasets"]["spared"]["attack"]["not_transferring_to"] = order
        nodes = {node.id: node for node in build(spec.parse(asked))}
        node, place = nodes["datasets/spared"], Context(Store(str(made[0])), made[0], made[0])
        inputs = {role: artifacts.find(place.store, parent) for role, parent in node.inputs.items()}
        work = AttackJob(node, place, inputs).open()
        return node.version, [save(model.network) for model in work.spared]

    assert opened(["robust", "turning"]) == opened(["turning", "robust"])


def test_only_a_name_of_a_sweep_means_all_its_points(made, tmp_path):
    file = tmp_path / "seeds.yaml"
    file.write_text(yaml.safe_dump({**KINDS, "evaluations": {}, "seeds": [0, 1]}))
    shown = json.loads(invoke("plan", file, "--only", "other", "--store", made[0], "--json").stdout)
    assert {node["node"] for node in shown["nodes"]} == {
        "datasets/clean", "models/standard@seed=0", "models/standard@seed=1",
        "datasets/other@seed=0", "datasets/other@seed=1",
    }  # fmt: skip


NO_LINEAR = """
from torch import nn

def net(classes):
    return nn.Sequential(nn.Conv2d(1, classes, 8), nn.Flatten())
"""


def changed(place: str, value):
    """The experiment with one change."""
    asked = copy.deepcopy(KINDS)
    *way, last = place.split(".")
    inner = asked
    for key in way:
        inner = inner[key]
    inner[last] = value
    return asked


WRONG = {
    "spared model is the attacked one": (
        changed("models.twin", {"train": TRAIN})
        | {"datasets": changed("datasets.spared.attack.not_transferring_to", ["robust", "twin"])["datasets"]},
        "datasets.spared.attack.not_transferring_to: twin is the attacked model, standard, under another name; give",
    ),
    "no penultimate layer": (
        changed("models.standard.train.arch", "convnet:net"),
        "has no linear layer: name the layer of its features with `layer`",
    ),
    "no such layer": (
        changed("datasets.d_r.invert.layer", "fc"),
        "datasets.d_r.invert: arch small_cnn has no layer 'fc': its last ones are",
    ),
    "other classes": (
        changed("models.standard", {"pretrained": {"arch": "small_cnn", "weights": "seven.pt", "shape": [1, 8, 8]}}),
        "standard knows 7 classes, the dataset has 10",
    ),
    "other size": (
        changed("datasets.clean.load", {"source": "image-folder", "root": "photos", "resize": 12, "crop": 12})
        | {
            "models": {
                **KINDS["models"],
                "standard": {"pretrained": {"arch": "small_cnn", "weights": "ten.pt", "shape": [1, 8, 8]}},
            }
        },
        "standard takes images of 1×8×8, the dataset has 3×12×12: if its network takes these, too, give it `shape: [3",
    ),
    "other channels": (
        changed("models.standard", {"pretrained": {"arch": "small_cnn", "weights": "ten.pt", "shape": [3, 8, 8]}}),
        "(1 of 20 entries differ): it takes images of 1 channel, the first number of `shape`",
    ),
    "size refused": (
        changed("models.standard.train.arch", "vgg11"),
        "arch vgg11 refuses images of 1×8×8",
    ),
    "target no class": (
        changed("datasets.other.relabel", {"rule": "map", "map": {"cat": "dog"}}),
        "relabel map names 'cat', which is no class",
    ),
    "attack toward no class": (
        changed("evaluations.accuracy.attacks", [{"eps": 1, "target_rule": {"rule": "map", "map": {"0": "11"}}}]),
        "evaluations.accuracy.attacks.0.target_rule.map: relabel map names '11', which is no class",
    ),
    "probe of another shape": (
        changed("models.from_other.train", {"on": "other", "probe": "brought", "batch_size": 32})
        | {"datasets": KINDS["datasets"]},
        "models.from_other.train.probe: names 'brought', which is not one of the models",
    ),
    "surrogate that is not there": (
        changed("evaluations.accuracy.attacks", [{"eps": 1, "surrogate": "nobody"}]),
        "evaluations.accuracy.attacks.surrogate: names 'nobody', which is not one of the models",
    ),
    "probe without a linear layer": (
        changed("models.probing", {"train": {"on": "other", "probe": "convolved", "batch_size": 32, "threads": 1}})
        | {"evaluations": {}},
        "arch convnet:net has no linear layer",
    ),
    "select without an attack": (
        changed("datasets.best", {"select": {"images": "clean", "keep": "top", "share": 0.5}}),
        "datasets.best.select: clean has no column margin",
    ),
}


@pytest.mark.parametrize(("experiment", "sentence"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_one_sentence_before_anything_runs(experiment, sentence, tmp_path, monkeypatch):
    import torch
    from PIL import Image

    from stages import nets

    monkeypatch.chdir(tmp_path)
    if "probing" in experiment["models"]:
        experiment["models"]["convolved"] = {"train": {**TRAIN, "arch": "convnet:net"}}
    Path("convnet.py").write_text(NO_LINEAR)
    for classes, name in ((7, "seven"), (10, "ten")):
        torch.save(nets.build("small_cnn", classes, 1, tmp_path).state_dict(), f"{name}.pt")
    for split in ("train", "val"):
        for number in range(10):
            folder = Path("photos") / split / str(number)
            folder.mkdir(parents=True)
            for image in range(8):
                Image.new("RGB", (16, 16)).save(folder / f"{image}.png")
    Path("wrong.yaml").write_text(yaml.safe_dump(experiment))
    result = invoke("run", "wrong.yaml", "--store", "store", "--data", ".", "--engine", "inline", code=2)
    assert sentence in result.stderr and result.stderr.count("\n") == 1
    assert not Path("store").exists()


# ------------------------------------------------------------------------ an attack that moves nothing

NO_SLOPE = """
from torch import nn

class Sign(nn.Module):
    def forward(self, x):
        return x.sign()

def net(classes):
    return nn.Sequential(Sign(), nn.Flatten(), nn.Linear(64, classes))
"""

IDENTITY = {"rule": "map", "map": {str(n): str(n) for n in range(10)}}

MOVES = {
    "pgd": ({"eps": 1.5, "steps": 2}, "other", "small_cnn", 1),
    "a small radius": ({"eps": 0.25, "steps": 3}, "other", "small_cnn", 1),
    "too small a radius": ({"eps": 0.004, "steps": 3}, "other", "small_cnn", 0),
    "no gradient": ({"eps": 1.5, "steps": 2}, "other", "slopeless:net", 0),
    "no gradient for a universal one": ({"eps": 1.5, "method": "universal", "steps": 2}, "other", "slopeless:net", 0),
    "noise of a level": ({"eps": 0.004, "method": "noise"}, "other", "small_cnn", 0),
    "no way to go": ({"eps": 1.5, "steps": 2}, IDENTITY, "slopeless:net", 1),
    "frozen from the start": ({"eps": 1.5, "steps": 5, "stop_at_margin": 0}, IDENTITY, "small_cnn", 1),
    "leakage": ({"eps": 0.004, "method": "leakage"}, "other", "small_cnn", 1),
    "none": ({"eps": 1.5, "method": "none"}, "other", "small_cnn", 1),
}


@pytest.mark.parametrize("what", MOVES)
def test_a_set_whose_images_did_not_move_is_not_published(what, tmp_path, monkeypatch):
    said, rule, arch, made = MOVES[what]
    monkeypatch.chdir(tmp_path)
    Path("slopeless.py").write_text(NO_SLOPE)
    asked = {
        "name": "moved",
        "datasets": {
            "clean": KINDS["datasets"]["clean"],
            "other": {"attack": {"images": "clean", "model": "standard", "batch_size": 32, **said}, "relabel": rule},
        },
        "models": {"standard": {"train": {**TRAIN, "arch": arch}}},
    }
    Path("moved.yaml").write_text(yaml.safe_dump(asked))
    for _ in range(2):  # what was committed the first time is not taken for done the second
        result = invoke("run", "moved.yaml", "--store", "store", "--engine", "inline", code=1 - made)
        assert len(list(Path("store/datasets/other").glob("*/manifest.json"))) == made
        assert ("images to be moved have changed by a level of 8 bits" in result.stderr) is not bool(made)
