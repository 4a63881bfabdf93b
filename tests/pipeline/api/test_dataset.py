"""A dataset opened by name has the content of its shards."""

import gc
import io
import pickle
import shutil

import numpy as np
import pytest
import webdataset as wds
import yaml
from click.testing import CliRunner
from PIL import Image
from support import TINY

import notbugs
from pipeline.cli import main
from stages.errors import BadInput


@pytest.mark.filterwarnings(
    "ignore:unclosed file", "ignore:Exception ignored in"
)  # webdataset leaves that to the collector
def test_samples_are_those_that_webdataset_reads(opened):
    store, _ = opened
    found = notbugs.open("other", store=store)
    tars = sorted(f"file:{path}" for path in store.glob(f"datasets/other/{found.version}/*.tar"))
    expected = list(wds.WebDataset(tars, shardshuffle=False))
    assert len(found) == len(expected) == sum(found.splits.values())
    gc.collect()
    for sample, other in zip(found, expected, strict=True):
        assert (sample.key, sample.label) == (other["__key__"], int(other["cls"]))
        assert np.array_equal(sample.image[:, :, 0], np.asarray(Image.open(io.BytesIO(other["png"]))))


def test_a_sample_is_found_by_position_from_either_end(opened):
    found = notbugs.open("clean", store=opened[0])
    last = found[len(found) - 1]
    assert found[-1].key == last.key and found[-1].index == last.index
    with pytest.raises(IndexError, match=f"clean has {len(found)} samples, got position {len(found)}"):
        found[len(found)]


def test_table_recipe_and_parents_are_what_the_store_holds(opened):
    found, clean = (notbugs.open(name, store=opened[0]) for name in ("other", "clean"))
    assert found.table.num_rows == len(found) and found.table["l2"].to_numpy().max() <= 1.5 + 1e-9
    assert found.recipe["parameters"]["eps"] == 1.5
    assert found.parents["images"] == {
        "node": "datasets/clean",
        "version": clean.version,
        "content": clean.manifest["content"],
    }
    assert found.classes == [str(digit) for digit in range(10)] and found.image_shape == (1, 8, 8)
    assert found.version in found.path and "train: 192" in repr(found) and "images 1 × 8 × 8" in repr(found)


def test_the_source_of_a_dataset_is_that_of_its_images_and_not_the_newest_of_its_name(opened, tmp_path):
    """A learner was scored on the test images of another experiment, which were of another size."""
    store = tmp_path / "s"
    shutil.copytree(opened[0], store)
    later = TINY | {"name": "later"}
    later["datasets"] = TINY["datasets"] | {"clean": {"load": TINY["datasets"]["clean"]["load"] | {"limit": 20}}}
    (tmp_path / "later.yaml").write_text(yaml.safe_dump(later))
    made = CliRunner().invoke(
        main, ["run", str(tmp_path / "later.yaml"), "--store", str(store), "--only", "clean", "--engine", "inline"]
    )
    assert made.exit_code == 0, made.stderr
    other, newest = notbugs.open("other", store=store), notbugs.open("clean", store=store)
    assert other.source.version == notbugs.open("clean", store=opened[0]).version != newest.version
    assert "test" in other.source.splits and newest.source.version == newest.version
    with pytest.raises(BadInput, match="it was made from clean, which may have it: see `source`"):
        other.torch("test")


def test_a_dataset_travels_to_another_process(opened):
    found = notbugs.open("clean", store=opened[0])
    assert pickle.loads(pickle.dumps(found))[3].key == found[3].key


def test_the_newest_version_is_opened_unless_another_is_asked_for(opened):
    found = notbugs.open("clean", store=opened[0])
    assert notbugs.open("clean", store=opened[0], version=found.version[:6]).version == found.version


def test_what_a_run_made_is_found_by_its_name_or_its_experiments(opened, tmp_path):
    store, results = opened
    for run in (results.run, "tiny"):
        assert notbugs.open("other", store=store, run=run).version == notbugs.open("other", store=store).version
    for name, run, sentence in [
        ("others", "tiny", f"run {results.run} has no dataset others; did you mean 'other'"),
        ("other", "tinny", "there is no run tinny in .*; did you mean 'tiny'"),
        ("other", "xyz", "there is no run xyz in .*; there are runs of tiny"),
    ]:
        with pytest.raises(notbugs.BadInput, match=sentence):
            notbugs.open(name, store=store, run=run)
    for verb, line in [("status", f"run {results.run}: done"), ("show", f"run {results.run}: done")]:
        said = CliRunner().invoke(main, [verb, "tiny", "--store", str(store)])
        assert said.exit_code == 0 and said.stdout.startswith(line), said.output
    copy = tmp_path / "page.html"
    assert CliRunner().invoke(main, ["report", "tiny", "--store", str(store), "--out", str(copy)]).exit_code == 0
    assert copy.exists()


@pytest.mark.parametrize(
    ("name", "version", "sentence"),
    [
        ("others", None, "has no dataset others; did you mean 'other'?"),
        ("zzz", None, "has no dataset zzz; it has clean, control, other"),
        ("clean", "ffff", "has no version ffff of dataset clean"),
        ("../x", None, "'../x' is no name of a dataset"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(name, version, sentence, opened):
    with pytest.raises(notbugs.BadInput, match=sentence.replace("?", r"\?")):
        notbugs.open(name, store=opened[0], version=version)


def test_a_store_without_datasets_is_perhaps_another(tmp_path):
    with pytest.raises(notbugs.BadInput, match="has no datasets: name another, or run an experiment first"):
        notbugs.open("clean", store=tmp_path)


def test_an_image_that_is_damaged_or_elsewhere_is_not_taken_for_the_sample(opened, tmp_path):
    import shutil

    shutil.copytree(opened[0], tmp_path / "store")
    found = notbugs.open("clean", store=tmp_path / "store")
    shard = next((tmp_path / "store").glob(f"datasets/clean/{found.version}/train-000000.tar"))
    content = bytearray(shard.read_bytes())
    content[512 + 40] ^= 1  # within the first image
    shard.write_bytes(content)
    with pytest.raises(notbugs.BadData, match="`notbugs verify` checks every file"):
        list(found)
    shard.write_bytes(bytes(512) + content)
    with pytest.raises(notbugs.BadData, match=r"is not where samples\.parquet has it"):
        list(found)


def test_datasets_on_an_object_store_are_read_alike(opened, s3_url):
    from pipeline.store import Store

    local, away = Store(str(opened[0])), Store(s3_url)
    for path in local.files("datasets/clean", recursive=True):
        away.put(f"datasets/clean/{path}", local.read(f"datasets/clean/{path}"))
    here, there = notbugs.open("clean", store=opened[0]), notbugs.open("clean", store=s3_url)
    assert [s.key for s in there.stream("test", shuffle=False, transform=None).dataset] == [s.key for s in here]
    assert np.array_equal(there[7].image, here[7].image)
