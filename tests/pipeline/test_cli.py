"""The command line as a user calls it: results, resume, repair, and one sentence for every bad request."""

import json
import os
import shlex
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image
from support import TINY, contents, files, reseal

from pipeline.cli import main
from pipeline.experiment import spec
from pipeline.experiment.graph import build
from pipeline.run import artifacts
from pipeline.run.jobs import Context, TrainJob
from pipeline.run.preflight import preflight
from pipeline.store import Store
from stages.load import assign_to_shards, list_source
from stages.recipes import ImageFolder


def invoke(*args, code=0):
    """Run the command line in this process; returns stdout after checking the exit code."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == code, f"{result.output}\n{result.stderr}\n{result.exception!r}"
    return result


def make(file, store, *args, code=0):
    return invoke("run", file, "--store", store, "--engine", "inline", *args, code=code)


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    """The store of a finished run of the small experiment, shared."""
    folder = tmp_path_factory.mktemp("made")
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(TINY))
    make(file, folder / "store")
    return folder / "store"


@pytest.fixture
def finished(made_once, tiny, write, tmp_path, monkeypatch):
    """File and store of a finished run of the small experiment, which a test may damage."""
    monkeypatch.chdir(tmp_path)
    return write(tiny), shutil.copytree(made_once, tmp_path / "store")


# ------------------------------------------------------------------------------------ the main job


def test_a_run_makes_every_node_and_prints_the_table(tiny, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = make(write(tiny), "out")
    assert set(contents(tmp_path / "out")) == {
        "datasets/clean",
        "datasets/other",
        "datasets/control",
        "models/standard",
        "models/from_other",
        "evaluations/accuracy",
    }
    lines = result.stdout.splitlines()
    assert any(line.startswith("trained on") for line in lines)
    assert any(line.startswith("other") and "from_other" in line for line in lines)
    assert "each under a wrong label, from_other classifies" in result.stdout, "the verdict of the page"
    assert lines[-1].startswith("The source model, standard, classifies"), "a poor one, which is to be mended first"
    assert str(tmp_path / "out") in result.stderr, "the store is named"
    assert not list((tmp_path / "out/.partial").glob("*")), "nothing half-made is left"
    (page,) = (tmp_path / "out/runs").glob("*/report.html")
    assert str(page) in result.stderr, "the page is named"
    again = invoke("report", "--store", "out", "--out", "page.html")
    assert again.stdout.strip() == "page.html" and Path("page.html").read_bytes() == page.read_bytes()


def test_the_store_is_a_folder_beside_where_one_stands_by_default(tiny, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = {"name": "t", "datasets": {"clean": tiny["datasets"]["clean"]}}
    invoke("run", write(tiny), "--engine", "inline")
    assert (tmp_path / "notbugs-store/datasets/clean").is_dir()


def test_a_second_run_makes_nothing_and_gives_the_same_table(finished):
    file, store = finished
    nodes = [p for p in store.rglob("*") if p.is_file() and not {"runs", "index.html"} & set(p.parts)]
    before = {p: p.stat().st_mtime_ns for p in nodes}
    result = make(file, store)
    after = {p for p in store.rglob("*") if p.is_file() and not {"runs", "index.html"} & set(p.parts)}
    assert before == {p: p.stat().st_mtime_ns for p in after}
    assert result.stderr.count("there already") == 6
    assert "from_other" in result.stdout


def test_a_changed_parameter_makes_a_new_version_and_what_hangs_on_it(finished, tiny, write):
    _, store = finished
    tiny["datasets"]["other"]["attack"]["eps"] = 1.0
    make(write(tiny), store)
    versions = {path.parent.name: len(list(path.parent.iterdir())) for path in store.glob("*/*/*") if path.is_dir()}
    assert versions["other"] == versions["from_other"] == versions["accuracy"] == 2
    assert versions["clean"] == versions["standard"] == versions["control"] == 1


def test_only_makes_a_node_and_what_it_needs(tiny, write, tmp_path):
    make(write(tiny), tmp_path / "s", "--only", "other")
    assert set(contents(tmp_path / "s")) == {"datasets/clean", "models/standard", "datasets/other"}


def test_show_json_gives_the_rows_of_the_latest_run(finished):
    _, store = finished
    said = json.loads(invoke("show", "--json", "--store", store).stdout)
    assert [row["model"] for row in said["rows"]] == ["standard", "from_other"]
    for row in said["rows"]:
        assert {"evaluation", "model", "trained_on", "accuracy", "low", "high", "n"} <= set(row)
        assert 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1
        assert row["n"] == 192
    assert said["rows"][1]["trained_on"] == "other"
    assert 0 <= said["rows"][1]["attack_success_rate"] <= 1


def test_show_and_report_mean_the_latest_run_with_results(finished):
    file, store = finished
    shown = json.loads(invoke("show", "--json", "--store", store).stdout)["run"]
    make(file, store, "--only", "other")
    assert json.loads(invoke("show", "--json", "--store", store).stdout)["run"] == shown
    reported = invoke("report", "--store", store)
    assert reported.stdout == f"{store}/runs/{shown}/report.html\n"
    assert f"has no results yet; {shown} is the latest that has\n" in reported.stderr


def test_run_json_prints_one_document_that_show_repeats(tiny, write, tmp_path):
    printed = json.loads(make(write(tiny), tmp_path / "s", "--json").stdout)
    assert printed == json.loads(invoke("show", "--json", "--store", tmp_path / "s").stdout)
    assert printed["state"] == "done"


def test_show_names_a_node(finished):
    _, store = finished
    text = invoke("show", "other", "--store", store).stdout
    assert "attack success rate" in text
    assert "192 train" in text
    found = json.loads(invoke("show", "datasets/clean", "--json", "--store", store).stdout)["found"]
    assert found[0]["counts"] == {"train": 192, "test": 192}


def test_status_tells_every_node_of_the_latest_run(finished):
    _, store = finished
    text = invoke("status", "--store", store).stdout
    assert "done" in text and "evaluations/accuracy" in text
    said = json.loads(invoke("status", "--json", "--store", store).stdout)
    assert said["state"] == "done"
    assert {p["state"] for p in said["nodes"].values()} == {"done"}
    assert said["nodes"]["datasets/clean"]["done"] == 6
    other = said["nodes"]["datasets/other"]
    assert 0 < other["work"] <= other["seconds"] + 0.1  # one process, so never more than one was at work
    (line,) = (line for line in text.splitlines() if line.startswith("datasets/other"))
    assert f"{other['work'] / other['seconds']:.2f}" in line


def test_plan_says_what_is_there_and_writes_nothing(tiny, write, tmp_path):
    file, store = write(tiny), tmp_path / "s"
    text = invoke("plan", file, "--store", store).stdout
    assert text.count("to make") == 6
    assert "192 train + 192 test" in text
    assert not store.exists()
    make(file, store, "--only", "clean")
    said = json.loads(invoke("plan", file, "--store", store, "--json").stdout)
    assert {node["node"]: node["there"] for node in said["nodes"]}["datasets/clean"] is True
    assert [node["there"] for node in said["nodes"]].count(False) == 5


def test_plan_names_the_commands_that_estimate_and_make_what_it_printed(tiny, write, tmp_path):
    asked = (write(tiny), "--store", tmp_path / "a store", "--only", "clean", "--only", "standard")
    estimate, make = (
        shlex.split(line.partition(": notbugs ")[2]) for line in invoke("plan", *asked).stdout.splitlines()[-2:]
    )
    assert estimate == ["plan", *map(str, asked), "--cost"]
    assert make == ["run", *map(str, asked)]
    invoke(*make, "--engine", "inline")
    assert "Next" not in invoke("plan", *asked).stdout


def test_resume_goes_on_with_the_latest_run_without_its_file(tiny, write, tmp_path):
    file, store = write(tiny), tmp_path / "s"
    make(file, store)
    before = contents(store)
    damage_unmarked(next((store / "datasets/other").glob("*/train-000001.tar")))
    next(store.glob("models/from_other/*/manifest.json")).unlink()
    file.unlink()
    assert (
        "datasets/other: started (attack, 3 shards, 2 there already)"
        in invoke("resume", "--store", store, "--engine", "inline").stderr
    )
    assert contents(store) == before


def test_resume_repeats_the_versions_of_every_kind_of_recipe(tiny, write, tmp_path):
    tiny["datasets"]["clean"]["load"]["seed"] = 3
    tiny["models"]["standard"]["train"] |= {"schedule": "steps", "milestones": [1], "augment": "flip"}
    tiny["evaluations"]["accuracy"] |= {"attacks": [{"eps": 0.5, "steps": 2}], "agreement": "next"}
    file, store = write(tiny), tmp_path / "s"
    make(file, store)
    before = contents(store)
    result = invoke("resume", "--store", store, "--engine", "inline")
    assert result.stderr.count("there already") == 6
    assert contents(store) == before


def test_robustness_and_agreement_stand_in_the_table(tiny, write, tmp_path):
    tiny["evaluations"]["accuracy"] |= {"attacks": [{"eps": 3.0, "steps": 5}], "agreement": "next"}
    result = make(write(tiny), tmp_path / "s")
    assert "L2 ε 3, 5 steps" in result.stdout
    assert "agrees with next" in result.stdout
    for row in json.loads(invoke("show", "--json", "--store", tmp_path / "s").stdout)["rows"]:
        assert row["under_attack"][0]["accuracy"] <= row["accuracy"]
        assert row["agreement"]["accuracy"] + row["accuracy"] <= 1


def test_help_and_version():
    assert "resume" in invoke("--help").stdout
    assert "0.1.0" in invoke("--version").stdout
    for name in main.commands:
        assert invoke(name, "--help").stdout.strip()


# ------------------------------------------------------------------------------- other sources, models


def test_an_image_folder_becomes_a_dataset_with_failures_on_record(tmp_path, write, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "data/pictures", per_class=30)
    (tmp_path / "data/pictures/train/a/07.png").write_bytes(b"no picture")
    load = {"source": "image-folder", "root": "pictures", "resize": 12, "crop": 8, "max_undecodable": 0.1}
    printed = make(write({"name": "f", "datasets": {"pictures": {"load": load}}}), "s").stderr
    said = json.loads(invoke("show", "pictures", "--json", "--store", "s").stdout)["found"][0]
    assert said["counts"] == {"train": 59, "test": 60}
    assert said["failures"] == 1
    assert said["image_shape"] == [3, 8, 8]
    shown = invoke("show", "pictures", "--store", "s").stdout
    assert "majority class of train: 50.0 %" in shown
    reason = "1 left out: cannot be decoded: not one of PNG, JPEG, WEBP, GIF, BMP, TIFF, PPM; the first: a/07.png"
    assert f"\n  {reason}\n" in shown
    assert f"\ndatasets/pictures: {reason}\n" in printed
    assert f"datasets/pictures: {reason}\n" in invoke("show", "--store", "s").stderr


def test_what_is_left_out_of_a_folder_is_told_by_reason_wherever_it_is_shown(tmp_path, write, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = tmp_path / "data/pictures/train/a"
    folder(tmp_path / "data/pictures", per_class=30)
    for number in range(12):
        (train / f"bad{number}.png").write_bytes((train / "00.png").read_bytes()[: -21 - number % 3])
    (train / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    Image.new("1", (13_000, 13_000)).save(train / "huge.png")
    (train / "film.gif").write_bytes(b"GIF89a")
    os.mkfifo(train / "pipe.png")
    (tmp_path / "data/pictures/val/.ipynb_checkpoints").mkdir()
    load = {"source": "image-folder", "root": "pictures", "resize": 12, "crop": 8, "max_undecodable": 0.5}
    file = write({"name": "f", "datasets": {"pictures": {"load": load}}})
    passed = "passed over: 1 gif files, 1 hidden files and folders, 1 links to nothing, pipes and the like"
    assert f"datasets/pictures: {passed}" in invoke("plan", file, "--store", "s").stdout
    skipped = {"gif files": 1, "hidden files and folders": 1, "links to nothing, pipes and the like": 1}
    assert json.loads(invoke("plan", file, "--store", "s", "--json").stdout)["nodes"][0]["skipped"] == skipped
    printed = make(file, "s").stderr
    shown = invoke("show", "pictures", "--store", "s").stdout
    assert "14 left out\n" in shown and "2 classes" in shown
    for line in (passed, "12 left out: cannot be decoded: ", "1 left out: has more than 89,478,485 pixels: make it"):
        assert line in shown and f"datasets/pictures: {line}" in printed
    assert f"datasets/pictures: {passed}" in invoke("plan", file, "--store", "s").stdout
    said = json.loads(invoke("show", "pictures", "--json", "--store", "s").stdout)["found"][0]
    assert said["skipped"] == skipped
    assert [one["images"] for one in said["left_out"]] == [12, 1, 1]
    assert sum(one["images"] for one in said["left_out"]) == said["failures"]
    assert all(one["first"].startswith("a/") for one in said["left_out"])
    invoke("verify", "--store", "s")


def test_a_plan_passes_over_a_first_image_that_does_not_decode(tmp_path, write, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "data/pictures", per_class=30)
    load = {"source": "image-folder", "root": "pictures", "resize": 12, "crop": 8}
    first, *_ = assign_to_shards(list_source(ImageFolder(**load), Path("data")), ImageFolder(**load)).values()
    first[0].ref.write_bytes(b"no picture")
    file = write({"name": "f", "datasets": {"pictures": {"load": load}}})
    invoke("plan", file)
    (status,) = preflight(build(spec.read(file)), Context(Store("s"), Path("data"), Path()))
    assert status.facts["image_shape"] == [3, 8, 8]


def test_too_many_undecodable_images_fail_the_shard_and_the_run(tmp_path, write, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "data/pictures", per_class=30)
    for number in range(5):
        (tmp_path / f"data/pictures/train/a/{number:02}.png").write_bytes(b"no picture")
    load = {"source": "image-folder", "root": "pictures", "resize": 12, "crop": 8}
    file = write({"name": "f", "datasets": {"pictures": {"load": load}}})
    result = make(file, "s", code=1)
    assert "5 of 60 images failed" in result.stderr
    assert "notbugs resume" in result.stderr
    assert json.loads(invoke("status", "--store", "s", "--json").stdout)["state"] == "failed"
    assert not list(Path("s").glob("datasets/*/*/manifest.json"))
    for number in range(5):
        (tmp_path / f"data/pictures/train/a/{number:02}.png").unlink()
    make(file, "s")


def test_our_own_shards_are_a_source(finished, write, tmp_path):
    _, store = finished
    clean = next((store / "datasets/clean").iterdir())
    shards = {"train": f"{clean}/train-{{000000..000002}}.tar", "test": f"{clean}/test-{{000000..000002}}.tar"}
    again = {"load": {"source": "webdataset", "shards": shards, "shard_size": 64}}
    make(write({"name": "again", "datasets": {"again": again}}), tmp_path / "s2")
    said = json.loads(invoke("show", "again", "--json", "--store", tmp_path / "s2").stdout)["found"][0]
    assert said["counts"] == {"train": 192, "test": 192}
    assert said["image_shape"] == [1, 8, 8]
    assert len(said["classes"]) == 10


def test_a_users_net_and_a_users_checkpoint(tiny, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_nets.py").write_text(
        "from torch import nn\n"
        "def linear(num_classes, channels):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, num_classes))\n"
    )
    (tmp_path / "data").mkdir()
    torch.save({"model": {"module.1.weight": torch.randn(10, 64), "module.1.bias": torch.zeros(10)}}, "data/own.pt")
    tiny["models"]["standard"]["train"]["arch"] = "own_nets:linear"
    tiny["models"]["brought"] = {"pretrained": {"arch": "own_nets:linear", "weights": "own.pt", "shape": [1, 8, 8]}}
    tiny["evaluations"]["accuracy"]["models"].append("brought")
    planned = invoke("plan", write(tiny), "--store", "s").stdout
    assert "models/brought: own.pt fits own_nets:linear, for 10 classes and images of 1 × 8 × 8" in planned
    result = make(write(tiny), "s")
    assert "pretrained" in result.stdout


def folder(root, per_class):
    """An image folder of two classes: grey noise at different levels."""
    for split in ("train", "val"):
        for name, level in (("a", 40), ("b", 200)):
            (root / split / name).mkdir(parents=True)
            for number in range(per_class):
                Image.new("RGB", (16, 14), (level, number, 0)).save(root / split / name / f"{number:02}.png")


# ------------------------------------------------------------------------------- damage and repair


def damage_truncated(tar):
    tar.write_bytes(tar.read_bytes()[:-1000])


def damage_cut_at_a_member(tar):
    import tarfile

    with tarfile.open(tar) as opened:
        third = opened.getmembers()[30]
    tar.write_bytes(tar.read_bytes()[: third.offset])


def damage_flipped(tar):
    content = bytearray(tar.read_bytes())
    content[1500] ^= 1
    tar.write_bytes(content)


def damage_unmarked(tar):
    (tar.parent / "commits" / tar.with_suffix(".json").name).unlink()


def damage_gone(tar):
    tar.unlink()


DAMAGES = [damage_truncated, damage_cut_at_a_member, damage_flipped, damage_unmarked, damage_gone]


@pytest.mark.parametrize("name", ["clean", "other"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.removeprefix("damage_"))
def test_damage_is_found_by_verify_and_repaired_by_the_next_run(finished, damage, name):
    file, store = finished
    before, tar = contents(store), next((store / f"datasets/{name}").glob("*/train-000001.tar"))
    good = tar.read_bytes()
    assert "damaged" not in invoke("verify", "--store", store).stdout
    damage(tar)
    said = invoke("verify", "--store", store, code=1).stdout
    assert "train-000001" in said
    make(file, store)
    assert tar.read_bytes() == good
    assert contents(store) == before
    invoke("verify", "--store", store)
    marks = {p.stem: json.loads(p.read_text()) for p in (tar.parent / "commits").glob("*.json")}
    assert len(marks) == len(list(tar.parent.glob("*.tar")))


def test_missing_and_truncated_shards_are_repaired_without_verify(finished):
    file, store = finished
    before = contents(store)
    damage_truncated(next((store / "datasets/clean").glob("*/test-000002.tar")))
    damage_unmarked(next((store / "datasets/other").glob("*/train-000000.tar")))
    make(file, store)
    assert contents(store) == before
    invoke("verify", "--store", store)


def test_a_flipped_byte_is_not_trusted_by_what_reads_it(finished):
    file, store = finished
    before = contents(store)
    damage_flipped(next((store / "datasets/clean").glob("*/train-000002.tar")))
    for manifest in store.glob("datasets/other/*/manifest.json"):
        manifest.unlink()
    for mark in store.glob("datasets/other/*/commits/train-000002.json"):
        mark.unlink()
    result = make(file, store, code=1)
    assert "damaged and was withdrawn" in result.stderr
    make(file, store)
    assert contents(store) == before


def test_verify_keep_only_reports_and_names_limit_it(finished):
    _, store = finished
    tar = next((store / "datasets/other").glob("*/train-000001.tar"))
    damage_flipped(tar)
    everything = files(store)
    said = json.loads(invoke("verify", "other", "--keep", "--json", "--store", store, code=1).stdout)
    assert [d["file"] for d in said["damaged"]] == ["train-000001.tar"]
    assert files(store) == everything
    invoke("verify", "clean", "--store", store)


def test_damaged_weights_and_rows_are_made_again(finished):
    file, store = finished
    before = contents(store)
    damage_truncated(next(store.glob("models/standard/*/weights.safetensors")))
    next(store.glob("datasets/other/*/samples.parquet")).write_bytes(b"")
    invoke("verify", "--store", store, code=1)
    make(file, store)
    assert contents(store) == before
    invoke("verify", "--store", store)


def test_a_flipped_byte_in_a_checkpoint_is_not_gone_on_from(tiny, write, tmp_path):
    """A training that goes on from damaged weights would end "done" with another model that no check can find."""
    tiny["models"]["standard"]["train"]["epochs"] = 3
    file, store = write(tiny), tmp_path / "s"
    make(file, tmp_path / "undisturbed", "--only", "standard")
    make(file, store, "--only", "clean")
    place = Context(Store(str(store)), tmp_path, tmp_path)
    node = next(node for node in build(spec.parse(tiny)) if node.id == "models/standard")
    clean = artifacts.find(place.store, node.inputs["on"])
    steps = TrainJob(node, place, {"on": clean}).steps()
    next(steps)
    steps.close()
    checkpoint = store / node.folder / "checkpoint.safetensors"
    content = bytearray(checkpoint.read_bytes())
    content[-100] ^= 64
    checkpoint.write_bytes(content)
    make(file, store, "--only", "standard")
    assert contents(store)["models/standard"] == contents(tmp_path / "undisturbed")["models/standard"]


def test_damaged_weights_that_are_read_as_input_are_made_again_by_the_next_run(finished, tiny, write):
    _, store = finished
    weights = next(store.glob("models/standard/*/weights.safetensors"))
    good = weights.read_bytes()
    weights.write_bytes(good[:-4] + bytes(4))
    tiny["datasets"]["other"]["attack"]["steps"] = 4
    file = write(tiny)
    assert "damaged and was withdrawn" in make(file, store, code=1).stderr
    make(file, store)
    assert weights.read_bytes() == good


def test_resume_makes_only_what_the_run_was_asked_for(tiny, write, tmp_path):
    store = tmp_path / "s"
    file = write(tiny)
    make(file, store, "--only", "clean")
    next(store.glob("datasets/clean/*/manifest.json")).unlink()
    invoke("resume", "--store", store, "--engine", "inline")
    assert set(contents(store)) == {"datasets/clean"}
    records = [json.loads(record.read_text()) for record in store.glob("runs/*/run.json")]
    assert [record["written"] for record in records] == 2 * [file.read_text()]


def test_the_majority_share_is_that_of_the_images_that_are_kept(tmp_path, write, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "data/pictures", per_class=20)
    load = {"source": "image-folder", "root": "pictures", "resize": 12, "crop": 8, "limit": 15}
    make(write({"name": "f", "datasets": {"p": {"load": load}}}), "s")
    said = json.loads(invoke("show", "p", "--json", "--store", "s").stdout)["found"][0]
    table = pq.read_table(next(Path("s").glob("datasets/p/*/samples.parquet"))).to_pylist()
    labels = [row["label"] for row in table if row["split"] == "train"]
    assert len(labels) == said["counts"]["train"] == 15
    assert said["majority"]["train"] == max(labels.count(0), labels.count(1)) / 15


def test_plan_reads_no_checkpoint_from_elsewhere(tiny, write, tmp_path):
    tiny["models"]["brought"] = {
        "pretrained": {"arch": "small_cnn", "weights": "http://127.0.0.1:9/w.pt", "shape": [1, 8, 8]}
    }
    tiny["evaluations"]["accuracy"]["models"].append("brought")
    planned = invoke("plan", write(tiny), "--store", tmp_path / "s").stdout
    assert "models/brought: http://127.0.0.1:9/w.pt is downloaded by the run, and checked then" in planned
    assert "cannot be fetched" in invoke("run", write(tiny), "--store", tmp_path / "s", code=2).stderr


# --------------------------------------------------------------------------------------- bad input


def change(*path, to):
    """A bad request: one place of the experiment changed."""

    def apply(tiny, tmp_path):
        part = tiny
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = to
        return tiny

    return apply


def load(**recipe):
    return change("datasets", "clean", to={"load": recipe})


def misfit(tiny, tmp_path):
    torch.save({"weight": torch.zeros(10, 3)}, tmp_path / "misfit.pt")
    tiny["models"]["brought"] = {
        "pretrained": {"arch": "small_cnn", "weights": str(tmp_path / "misfit.pt"), "shape": [1, 8, 8]}
    }
    return tiny


def bad_folder(build):
    def apply(tiny, tmp_path):
        root = tmp_path / "pictures"
        root.mkdir()
        recipe = {"source": "image-folder", "root": str(root), "resize": 8, "crop": 8} | (build(root) or {})
        tiny["datasets"]["clean"]["load"] = recipe
        return tiny

    return apply


def one_split(root):
    (root / "train/a").mkdir(parents=True)


def all_broken(root):
    folder(root, 4)
    for image in root.rglob("*.png"):
        image.write_bytes(b"broken")


def no_images(root):
    folder(root, 1)
    for image in root.rglob("*.png"):
        image.unlink()


def unfitting_map(root):
    folder(root, 2)
    return {"classes": {"both": ["a", "0-7"]}}  # a is class 0: naming it twice is no harm


def empty_group(root):
    folder(root, 2)
    return {"classes": {"a": ["a"], "b": []}}


ATTACK = ("datasets", "other", "attack")
BAD = {
    "unknown key": (change(*ATTACK, "stepz", to=3), "datasets.other.attack.stepz: unknown key, did you mean 'steps'?"),
    "unknown key, longer": (change(*ATTACK, "epsilon", to=3), "unknown key, did you mean 'eps'?"),
    "name is a number": (change("datasets", 1, to={"load": {"source": "cifar10"}}), "a name must be text"),
    "no mapping where one belongs": (
        change("datasets", "clean", to=None),
        "datasets.clean: must be a mapping, got None",
    ),
    "source alone": (change("datasets", "clean", "load", to="digits"), "datasets.clean.load: must be a mapping"),
    "eps below a level": (change(*ATTACK, "eps", to=0.001), "less than one 8-bit level"),
    "model twice": (change("evaluations", "accuracy", "models", to=["standard"] * 2), "names 'standard' twice"),
    "std zero": (
        change("models", "standard", "train", "std", to=[0]),
        "must be greater than or equal to 0.000001, got 0",
    ),
    "drop after the end": (
        change(
            "models",
            "standard",
            "train",
            to={"on": "clean", "arch": "small_cnn", "epochs": 2, "schedule": "steps", "milestones": [5]},
        ),
        "milestones must lie between 1 and 1",
    ),
    "group without a class": (bad_folder(empty_group), "classes.b: names no class"),
    "braces open": (load(source="webdataset", shards={"train": "a-{000.."}), "braces that do not close"),
    "scheme unknown": (load(source="webdataset", shards={"train": "foo://a/b.tar"}), "no URL that is read"),
    "key is a list": (lambda tiny, tmp_path: "name: t\n? [a, b]\n: 1\n", "(line 2, column 3): a key must be text"),
    "unknown section": (change("modells", to={}), "modells: unknown key, did you mean 'models'?"),
    "wrong type": (change(*ATTACK, "steps", to="many"), "datasets.other.attack.steps: must be a valid integer"),
    "eps zero": (change(*ATTACK, "eps", to=0), "datasets.other.attack.eps: must be greater than 0, got 0"),
    "eps below": (change(*ATTACK, "eps", to=-1), "datasets.other.attack.eps: must be greater than 0, got -1"),
    "names nothing": (
        change(*ATTACK, "model", to="standart"),
        "names 'standart', which is not one of the models; did you",
    ),
    "cycle": (change("models", "standard", "train", "on", to="other"), "goes in a circle"),
    "no such split": (
        change("evaluations", "accuracy", "split", to="val"),
        "clean has no split 'val', it has train, test",
    ),
    "no such split to attack": (change(*ATTACK, "splits", to=["dev"]), "datasets.other.attack.splits"),
    "map leaves out": (
        change("datasets", "other", "relabel", to={"rule": "map", "map": {0: 1}}),
        "datasets.other.relabel.map: relabel map leaves out 1, 2",
    ),
    "map names no class": (
        change("datasets", "other", "relabel", to={"rule": "map", "map": dict.fromkeys(range(10), "ten")}),
        "'ten', which is no class",
    ),
    "class groups do not fit": (
        bad_folder(unfitting_map),
        "classes.both: there is no class 2, the folder has 2 classes",
    ),
    "arch unknown": (
        change("models", "standard", "train", "arch", to="resnet1"),
        "models.standard.train: arch 'resnet1' is not one of",
    ),
    "arch not importable": (change("models", "standard", "train", "arch", to="no.such:net"), "cannot be imported"),
    "arch refuses the images": (change("models", "standard", "train", "arch", to="alexnet"), "refuses images of 1×8×8"),
    "checkpoint misfit": (misfit, "does not fit arch small_cnn"),
    "checkpoint missing": (
        change(
            "models", "standard", to={"pretrained": {"arch": "small_cnn", "weights": "none.pt", "shape": [1, 8, 8]}}
        ),
        "checkpoint none.pt cannot be read: No such file",
    ),
    "folder missing": (load(source="image-folder", root="nowhere"), "nowhere does not exist"),
    "folder lacks a split": (bad_folder(one_split), "val does not exist"),
    "folder is broken": (bad_folder(all_broken), "8 of 8 images tried fail; the first: "),
    "source is empty": (bad_folder(no_images), "the source is empty"),
    "webdataset missing": (load(source="webdataset", shards={"train": "no-{0..1}.tar"}), "no-0.tar cannot be read"),
    "cifar not there": (load(source="cifar10", download=False), "name its folder with --data"),
    "source unknown": (load(source="cifar11"), "did you mean 'cifar10'?"),
    "secret in a URL": (load(source="webdataset", shards={"train": "s3://KEY:SECRET@b/x.tar"}), "in the environment"),
    "batch larger than the data": (
        change("models", "standard", "train", "batch_size", to=500),
        "more than the 192 images",
    ),
    "pgd without a model": (change(*ATTACK, "model", to=None), "method pgd needs a model"),
    "two ways at once": (
        change("datasets", "clean", "attack", to={"images": "other", "model": "standard"}),
        "has one of",
    ),
    "nothing asked for": (lambda tiny, tmp_path: {"name": "t"}, "names no dataset"),
    "no mapping": (lambda tiny, tmp_path: "[1, 2]", "an experiment file is a mapping"),
    "no yaml": (lambda tiny, tmp_path: "name: [", "is not YAML (line"),
    "key twice": (lambda tiny, tmp_path: "name: a\nname: b\n", "given twice"),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("verb", ["plan", "run"])
def test_bad_input_gets_one_sentence_and_writes_nothing(what, verb, tiny, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spoil, sentence = BAD[what]
    file = write(spoil(tiny, tmp_path))
    before = files(tmp_path)
    result = invoke(verb, file, "--store", tmp_path / "s", code=2)
    assert sentence in result.stderr
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr and "SECRET" not in result.stderr.replace("KEY:SECRET@", "")
    assert files(tmp_path) == before


def test_several_workers_are_refused_without_ray_before_anything_is_made(tiny, write, tmp_path):
    tiny["models"]["standard"]["train"]["workers"] = 2
    refused = make(write(tiny), tmp_path / "s", code=2)
    assert "models.standard.train.workers" in refused.stderr and not (tmp_path / "s").exists()


def test_a_store_that_cannot_be_written_is_refused(tiny, write, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    result = invoke("run", write(tiny), "--store", tmp_path / "file/store", code=2)
    assert "cannot be written" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_dataset_that_is_made_again_from_other_bytes_is_not_there_meanwhile(finished, monkeypatch):
    """Half old and half new shards under the old manifest: seen when a run was killed while it remade a dataset."""
    file, store = finished
    manifest = next(store.glob("datasets/other/*/manifest.json"))

    def trained_elsewhere(value):
        return json.loads(json.dumps(value).replace(contents(store)["models/standard"], "0" * 64))

    for document in (manifest, *(manifest.parent / "commits").glob("*.json")):
        reseal(store, document, trained_elsewhere)
    model = next(store.glob("models/standard/*/weights.safetensors"))
    good = model.read_bytes()
    model.write_bytes(bytes(len(good)))  # the same size: only reading it tells
    assert "weights.safetensors is damaged" in make(file, store, code=1).stderr
    assert not manifest.exists()
    model.write_bytes(good)
    make(file, store)
    marks = [json.loads(mark.read_text()) for mark in (manifest.parent / "commits").glob("*.json")]
    assert {mark["inputs"]["model"] for mark in marks} == {contents(store)["models/standard"]}


def test_plan_downloads_nothing_and_a_failed_download_leaves_nothing(tmp_path, write, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    file = write({"name": "m", "datasets": {"m": {"load": {"source": "mnist"}}}})
    before = files(tmp_path)
    assert "`notbugs run` downloads it" in invoke("plan", file, code=2).stderr
    result = invoke("run", file, code=2)
    assert "cannot" in result.stderr or "can it be downloaded" in result.stderr
    assert result.stderr.count("\n") == 1
    assert files(tmp_path) == before and not (tmp_path / "data").exists()


def test_resume_looks_for_data_where_the_run_did(tmp_path, write, monkeypatch):
    folder(tmp_path / "elsewhere/pictures", per_class=3)
    load = {"source": "image-folder", "root": "pictures", "resize": 12, "crop": 8}
    make(write({"name": "f", "datasets": {"p": {"load": load}}}), tmp_path / "s", "--data", tmp_path / "elsewhere")
    next((tmp_path / "s").glob("datasets/p/*/manifest.json")).unlink()
    invoke("resume", "--store", tmp_path / "s", "--engine", "inline")
    assert contents(tmp_path / "s")


def test_a_missing_file_an_unknown_run_and_an_unknown_node(tiny, write, tmp_path):
    assert "cannot be read" in invoke("run", tmp_path / "none.yaml", code=2).stderr
    assert "no runs" in invoke("status", "--store", tmp_path, code=2).stderr
    assert "no node, run or experiment named x" in invoke("show", "x", "--store", tmp_path, code=2).stderr
    assert "no run x" in invoke("status", "x", "--store", tmp_path, code=2).stderr
    assert "nothing" in invoke("verify", "--store", tmp_path, code=2).stderr
    assert "no such node" in invoke("plan", write(tiny), "--only", "x", "--store", tmp_path / "s", code=2).stderr
    assert invoke("run", write(tiny), "--engine", "fog", code=2)
    assert "need the Ray engine" in invoke("run", write(tiny), "--engine", "inline", "--workers", 2, code=2).stderr


def test_debug_shows_the_traceback(tiny, write, tmp_path):
    tiny["datasets"]["clean"]["load"]["source"] = "fog"
    result = CliRunner().invoke(main, ["--debug", "plan", str(write(tiny))])
    assert result.exception is not None and not isinstance(result.exception, SystemExit)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["show", "othr"], "no node, run or experiment named othr; did you mean 'other'?"),
        (["show", "datasets/othr"], "did you mean 'datasets/other'?"),
        (["verify", "other", "stadard"], "no node stadard to verify; did you mean 'standard'?"),
        (["verify", "qqq"], "no node qqq to verify\n"),
        (["plan", "experiment.yaml", "--only", "models/standrd"], "no such node; did you mean 'models/standard'?"),
        (["plan", "experiment.yaml", "--only", "qqq"], "no such node; it has datasets/clean, "),
    ],
)
def test_a_name_that_is_none_is_refused_with_the_nearest(args, sentence, finished):
    refused = invoke(*args, "--store", finished[1], code=2).stderr
    assert sentence in refused and refused.count("\n") == 1


def test_a_run_is_named_by_its_typo(finished):
    (run,) = (path.name for path in (finished[1] / "runs").iterdir())
    typo = f"{run[:-1]}x"
    assert f"did you mean '{run}'?" in invoke("show", typo, "--store", finished[1], code=2).stderr


@pytest.mark.parametrize("command", [["report"], ["attack", "experiment.yaml", "--model", "standard", "--to", "1"]])
@pytest.mark.parametrize(
    ("out", "why"),
    [("none/x.png", "there is no folder none"), (".", "it is a folder"), ("/proc/x.png", ""), ("x" * 300, "too long")],
)
def test_a_file_that_cannot_be_written_is_refused(command, out, why, finished):
    refused = invoke(*command, "--store", finished[1], "--out", out, code=2).stderr
    assert refused.count("\n") == 1
    if command == ["report"] or out not in ("/proc/x.png", "x" * 300):  # else the picture is seen first to be none
        assert refused.startswith(f"Error: --out {out}: ") and why in refused
