"""Other readers read the shards: labels and pixels agree with samples.parquet and with each other."""

import io
import json
import tarfile

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image
from support import TINY

from pipeline.cli import main


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """The folder of a finished adversarial dataset."""
    folder = tmp_path_factory.mktemp("readers")
    (folder / "tiny.yaml").write_text(json.dumps(TINY))
    args = ["run", str(folder / "tiny.yaml"), "--store", str(folder / "s"), "--engine", "inline", "--only", "other"]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    return next((folder / "s/datasets/other").iterdir())


@pytest.fixture(scope="module")
def expected(dataset):
    """Key → (label, digest of the pixels), read with tarfile and Pillow and checked against samples.parquet."""
    rows = {row["key"]: row for row in pq.read_table(dataset / "samples.parquet").to_pylist()}
    found = {}
    for shard in sorted(dataset.glob("*.tar")):
        with tarfile.open(shard) as tar:
            content = {member.name: tar.extractfile(member).read() for member in tar}
        for name in (n for n in content if n.endswith(".png")):
            key = name.removesuffix(".png")
            pixels = np.asarray(Image.open(io.BytesIO(content[name])))
            facts, row = json.loads(content[f"{key}.json"]), rows[key]
            assert int(content[f"{key}.cls"]) == row["label"] == facts["target"]
            assert facts["source_label"] == row["source_label"] != row["label"]
            assert shard.stem == row["shard"]
            assert facts["index"] == row["index"] == int(key)
            found[key] = (row["label"], pixels.tobytes())
    assert set(found) == set(rows)
    assert len(found) == 192
    return found


def urls(dataset):
    return f"{dataset}/train-{{000000..000002}}.tar"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its files open
def test_webdataset_reads_them(dataset, expected):
    import webdataset as wds

    samples = wds.WebDataset(urls(dataset), shardshuffle=False).decode("pil").to_tuple("__key__", "png", "cls")
    found = {key: (label, np.asarray(image.convert("L")).tobytes()) for key, image, label in samples}
    assert found == expected


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_datasets_reads_them(dataset, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    files = {"train": sorted(map(str, dataset.glob("train-*.tar")))}
    read = datasets.load_dataset("webdataset", data_files=files, split="train", cache_dir=str(tmp_path))
    found = {row["__key__"]: (row["cls"], np.asarray(row["png"].convert("L")).tobytes()) for row in read}
    assert found == expected
    assert {"png", "cls", "json"} <= set(read.features)


@pytest.mark.filterwarnings("ignore")
def test_ray_data_reads_them(dataset, expected):
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = ray.data.read_webdataset([str(path) for path in sorted(dataset.glob("train-*.tar"))]).take_all()
        found = {row["__key__"]: (row["cls"], np.asarray(row["png"]).tobytes()) for row in rows}
    finally:
        ray.shutdown()
    assert {key: label for key, (label, _) in found.items()} == {key: label for key, (label, _) in expected.items()}
    assert found == expected


def test_samples_parquet_answers_with_plain_pyarrow(dataset):
    table = pq.read_table(dataset / "samples.parquet")
    per_class = table.group_by("target").aggregate([("success", "mean"), ("success", "count")])
    assert sum(per_class["success_count"].to_pylist()) == 192
    assert pc.max(table["l2"]).as_py() <= 1.5
    assert pc.min(table["l2"]).as_py() > 0
    assert all((m > 0) == r for m, r in zip(table["margin"].to_pylist(), table["success"].to_pylist(), strict=True))
    failed = table.filter(pc.invert(table["success"]))
    assert len(failed) + pc.sum(table["success"]).as_py() == 192
    assert len(failed) > 0
    assert pc.min(failed["l2"]).as_py() > 0, "a failed sample stays perturbed"


def test_the_manifest_says_what_a_reader_needs(dataset):
    manifest = json.loads((dataset / "manifest.json").read_text())
    assert manifest["classes"] == list("0123456789")
    assert manifest["image_shape"] == [1, 8, 8]
    assert manifest["counts"] == {"train": 192}
    assert manifest["members"] == ["png", "cls", "json"]
    assert {f["name"] for f in manifest["files"]} >= {"samples.parquet", "recipe.json", "train-000002.tar"}
    assert set(manifest["parents"]) == {"images", "model"}
