"""Loading and finishing a dataset: its units, its rows, and the size of what is sent."""

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.cli import main
from pipeline.experiment.graph import build
from pipeline.experiment.spec import parse
from pipeline.run.jobs import Context, LoadJob, datasets
from pipeline.run.jobs.statistics import left_out
from pipeline.store import Store
from stages.shard import unpack

SYNTHETIC = {"source": "synthetic", "images": {"train": 24, "test": 6}, "classes": 3, "size": 8, "shard_size": 6}
EXPERIMENT = {
    "name": "made",
    "datasets": {
        "clean": {"load": SYNTHETIC},
        "noisy": {"attack": {"images": "clean", "method": "noise", "eps": 0.5}, "relabel": "other"},
    },
}


def load_job(**said):
    (node,) = build(parse({"name": "made", "datasets": {"clean": {"load": SYNTHETIC | said}}}))
    return LoadJob(node, Context(Store("nowhere"), Path(), Path()), {})


def described(units):
    return [(unit.name, unit.samples, unit.inputs) for unit in units]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20))
def test_units_hold_each_image_once_and_are_the_same_for_all_who_ask(train, test, shard_size):
    asked = {"images": {"train": train, "test": test}, "shard_size": shard_size}
    units = load_job(**asked).units()
    held = sorted((item.index, item.label) for unit in units for item in unit.items)
    assert held == [(index, index % 3) for index in range(train + test)]
    assert all(unit.samples == len(unit.items) <= shard_size for unit in units)
    assert len({unit.name for unit in units}) == len({json.dumps(unit.inputs) for unit in units}) == len(units)
    assert described(load_job(**asked).units()) == described(units)


def run(folder, *args):
    file = folder / "made.yaml"
    file.write_text(yaml.safe_dump(EXPERIMENT))
    result = CliRunner().invoke(main, [*args, str(file), "--store", str(folder / "store"), *ENGINE[args[0]]])
    assert result.exit_code == 0, result.output
    return result.stdout


ENGINE = {"run": ["--engine", "inline"], "plan": ["--json"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    run(folder, "run")
    return folder


def test_images_that_are_made_go_through_the_pipeline_as_any(made):
    (file,) = (made / "store/datasets/noisy").glob("*/samples.parquet")
    rows = pq.read_table(file).to_pydict()
    assert sorted(rows["index"]) == list(range(6, 30))  # test comes before train
    assert rows["source_label"] == [index % 3 for index in rows["index"]]
    assert all(label != true for label, true in zip(rows["label"], rows["source_label"], strict=True))
    assert all(0 < moved <= 0.5 for moved in rows["l2"])


def test_a_plan_foresees_of_a_source_what_its_manifest_says(made, tmp_path):
    there, to_make = (json.loads(run(folder, "plan"))["nodes"] for folder in (made, tmp_path))
    assert [node["there"] for node in there + to_make] == [True, True, False, False]
    for before, after in zip(to_make, there, strict=True):
        assert before["images"] == after["images"]
        assert before["majority"] == after["majority"]


def test_a_model_is_normalised_by_the_split_that_it_learned_from_and_no_other(tmp_path, monkeypatch):
    train = {"on": "clean", "arch": "small_cnn", "epochs": 1, "batch_size": 2, "threads": 1}
    models = {split: {"train": train | {"split": split}} for split in ("train", "test")}
    monkeypatch.setitem(EXPERIMENT, "models", models)
    run(tmp_path, "run")
    (clean,) = (tmp_path / "store/datasets/clean").iterdir()
    for split in models:
        shards = [unpack(tar.stem, tar.read_bytes(), 3, 3) for tar in sorted(clean.glob(f"{split}-*.tar"))]
        values = np.concatenate([shard.images() for shard in shards]).astype(np.float64) / 255
        (manifest,) = (tmp_path / "store/models" / split).glob("*/manifest.json")
        found = json.loads(manifest.read_text())["design"]
        np.testing.assert_allclose(found["mean"], values.mean((0, 1, 2)), rtol=1e-9)
        np.testing.assert_allclose(found["std"], values.std((0, 1, 2)), rtol=1e-9)


def test_rows_are_in_the_order_of_the_shards_however_many_are_held_at_once(made, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "ROWS", 10)
    run(tmp_path, "run")
    for name, groups in (("clean", 3), ("noisy", 2)):
        (at_once,), (in_groups,) = (
            [pq.ParquetFile(file) for file in (folder / "store/datasets" / name).glob("*/samples.parquet")]
            for folder in (made, tmp_path)
        )
        assert (at_once.num_row_groups, in_groups.num_row_groups) == (1, groups)
        assert at_once.read().equals(in_groups.read())
        shards = in_groups.read()["shard"].to_pylist()
        assert shards == sorted(shards)


def table_of(errors):
    out = io.BytesIO()
    pq.write_table(pa.table({"error": pa.array(errors, pa.string())}), out)
    return out.getvalue()


def test_reasons_that_differ_in_numbers_alone_are_one_and_the_rarest_are_put_together():
    assert left_out(table_of([None, None])) == {}
    sizes = [f"c/{i}.png: is {i + 1} × {2 * i} pixels, smaller than the crop of 800" for i in range(50)]
    letters = [f"c/{letter}.png: is {letter * 3}" for letter in "abcdefghijkl"]
    (found,) = left_out(table_of([None, *letters, *sizes, "https://a/b.tar: is gone: for 3 days"] * 2)).values()
    assert found[0] == {"reason": sizes[0].removeprefix("c/0.png: "), "first": "c/0.png", "images": 100}
    assert [one["images"] for one in found] == [100, *[2] * 9, 2 * 4]
    assert found[-1] == {"reason": "other reasons", "images": 8}
    (found,) = left_out(table_of(["https://a/b.tar: is gone: for 3 days"])).values()
    assert found == [{"reason": "is gone: for 3 days", "first": "https://a/b.tar", "images": 1}]


def folder_job(root, data):
    said = {"source": "image-folder", "root": root, "splits": {"train": "train"}}
    (node,) = build(parse({"name": "made", "datasets": {"clean": {"load": said}}}))
    return LoadJob(node, Context(Store("nowhere"), data, data), {})


def test_the_digest_of_a_listing_holds_whole_paths_wherever_the_data_lie(tmp_path):
    def listed(data, place):
        file = data / "photos/train/ant" / place
        file.parent.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(file)
        (unit,) = folder_job("photos", data).units()
        assert pickle.loads(pickle.dumps(folder_job("photos", data))).facts() == folder_job("photos", data).facts()
        return unit.inputs["source"]

    here, moved = listed(tmp_path / "here", "x/same/0.png"), listed(tmp_path / "moved", "x/same/0.png")
    assert here == moved != listed(tmp_path / "other", "y/same/0.png")


def test_a_model_that_two_runs_finish_at_once_is_whole(tmp_path, monkeypatch):
    """The other run's metrics arrive after this run's, and before its manifest."""
    put_json, model = Store.put_json, []

    def overtaken(store, path, value):
        if path.startswith("models/") and path.endswith("manifest.json") and not model:
            model.append(path)
            store.put(path.replace("manifest.json", "metrics.jsonl"), b'{"images_per_second": 1}\n')
        return put_json(store, path, value)

    monkeypatch.setattr(Store, "put_json", overtaken)
    datasets = {"clean": {"load": {"source": "sklearn-digits", "limit": 64, "shard_size": 64}}}
    trained = {"train": {"on": "clean", "arch": "small_cnn", "epochs": 1, "batch_size": 32}}
    file = tmp_path / "twice.yaml"
    file.write_text(yaml.safe_dump({"name": "twice", "datasets": datasets, "models": {"net": trained}}))
    store = ["--store", str(tmp_path / "s")]
    made = CliRunner().invoke(main, ["run", str(file), *store, "--engine", "inline"])
    assert made.exit_code == 0 and model, made.output
    verified = CliRunner().invoke(main, ["verify", *store])
    assert verified.exit_code == 0, verified.output
