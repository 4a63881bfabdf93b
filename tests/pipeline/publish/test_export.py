"""Exports, each read by the reader it is for."""

import io
import itertools
import json
import shutil
from collections import Counter
from contextlib import redirect_stderr

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from support import files

import notbugs
from pipeline.cli import main
from pipeline.publish import export as exports
from pipeline.publish.formats import FORMATS, Format
from pipeline.store import Store


@pytest.fixture(scope="module")
def source(opened):
    return notbugs.open("other", store=opened[0])


@pytest.fixture(scope="module")
def expected(source):
    """Key → label, true class and pixels."""
    return {sample.key: (sample.label, sample.source_label, sample.image[:, :, 0].tobytes()) for sample in source}


@pytest.fixture(scope="module")
def exported(opened, tmp_path_factory):
    """Export the attacked digits, and give the folder."""
    made = {}

    def export(form):
        if form not in made:
            made[form] = tmp_path_factory.mktemp(form) / "out"
            invoke("export", "other", made[form], "--to", form, "--store", opened[0])
        return made[form]

    return export


def invoke(*args, code=0):
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result.output


def pixels(image):
    return np.asarray(image.convert("L")).tobytes()


def test_torchvision_reads_an_image_folder_with_the_labels_numbers(exported, expected):
    from torchvision.datasets import ImageFolder

    read = ImageFolder(str(exported("imagefolder") / "train"))
    assert read.classes == [str(digit) for digit in range(10)]
    found = {path[-12:-4]: (label, pixels(read[i][0])) for i, (path, label) in enumerate(read.samples)}
    assert found == {key: (label, image) for key, (label, _, image) in expected.items()}


def test_folders_of_classes_keep_their_order_and_none_is_missing(opened, tmp_path):
    from torchvision.datasets import ImageFolder

    made = exports_of(opened[0], classes=["z/../..", "a", "A", "", ".", *"56789"])
    folders = FORMATS["imagefolder"](Store(str(opened[0])), made).folders
    assert folders == sorted(folders) and len({folder.casefold() for folder in folders}) == 10
    assert not any("/" in folder or folder.startswith(".") for folder in folders)
    form = FORMATS["imagefolder"](Store(str(opened[0])), exports_of(opened[0], classes=[*map(str, range(11))]))
    assert [path for path, _ in form.last({})] == ["train/10_10/.empty"]
    for path, content in [*form.files("train-000000"), *form.last({})]:
        Store(str(tmp_path)).put(path, content)
    read = ImageFolder(str(tmp_path / "train"), allow_empty=True)
    assert read.classes == form.folders and len(read) == 64


def exports_of(store, **changes):
    """The attacked digits, with another manifest."""
    found = notbugs.open("other", store=store)
    return type(found._artifact)(found._artifact.folder, {**found.manifest, **changes})


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_datasets_and_pandas_read_parquet_with_images_and_class_names(
    exported, expected, source, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets
    import pandas as pd

    folder = exported("parquet")
    read = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path))
    assert isinstance(read.features["image"], datasets.Image) and read.features["label"].names == source.classes
    found = {row["key"]: (row["label"], row["source_label"], pixels(row["image"])) for row in read}
    assert found == expected
    frame = pd.concat(map(pd.read_parquet, sorted(folder.glob("data/train-*-of-00003.parquet"))))
    first = frame.iloc[0]
    assert pixels(Image.open(io.BytesIO(first["image"]["bytes"]))) == expected[first["key"]][2]
    assert frame["l2"].tolist() == source.table["l2"].to_pylist(), "measurements are exact"


def test_duckdb_asks_all_files_of_a_split_at_once(exported, expected):
    import duckdb

    found = duckdb.sql(
        "select label, count(*), octet_length(first(image.bytes)) > 0 "
        f"from '{exported('parquet')}/data/train-*.parquet' group by label order by label"
    ).fetchall()
    counts = Counter(label for label, _, _ in expected.values())
    assert found == [(label, counts[label], True) for label in sorted(counts)]


@pytest.mark.filterwarnings("ignore")
def test_wids_reads_samples_at_random_and_its_cache_takes_no_shard_for_another(
    exported, expected, opened, tmp_path, monkeypatch
):
    import wids

    monkeypatch.setenv("WIDS_CACHE", str(tmp_path / "cache"))
    invoke("export", "control", tmp_path / "control", "--to", "wids", "--store", opened[0])
    with redirect_stderr(io.StringIO()):
        control = wids.ShardListDataset(str(tmp_path / "control/train.json"))
        read = wids.ShardListDataset(str(exported("wids") / "train.json"))
    assert len(read) == len(control) == 192
    for i in (191, 0, 100):
        sample = read[i]
        label, _, image = expected[sample["__key__"].rpartition("/")[2]]
        assert (int(sample[".cls"]), pixels(sample[".png"])) == (label, image)
        assert pixels(control[i][".png"]) != image, "another dataset's shard of the same number"


def test_numpy_reads_arrays(exported, expected):
    with np.load(exported("npz") / "train.npz") as read:
        assert read["images"].shape == (192, 8, 8, 1) and read["images"].dtype == np.uint8
        rows = zip(read["indices"], read["labels"], read["source_labels"], read["images"], strict=True)
        found = {f"{index:08d}": (label, truth, image.tobytes()) for index, label, truth, image in rows}
        assert found == expected and read["classes"].tolist() == [str(digit) for digit in range(10)]


def test_mosaicml_streaming_reads_shards(exported, expected, monkeypatch):
    streaming = pytest.importorskip("streaming", reason="mosaicml-streaming pins numpy 2.1 and five clouds' libraries")
    read = streaming.StreamingDataset(local=str(exported("mds")), split="train", shuffle=False, batch_size=1)
    found = {row["key"]: (row["label"], row["source_label"], pixels(row["image"])) for row in read}
    assert found == expected


def test_a_shard_of_mds_is_laid_out_as_its_format_says(exported, expected):
    """Read by the format's description: https://docs.mosaicml.com/projects/streaming, dataset format MDS."""
    folder = exported("mds") / "train"
    index, found = json.loads((folder / "index.json").read_text()), {}
    assert sum(shard["samples"] for shard in index["shards"]) == 192
    for shard in index["shards"]:
        content = (folder / shard["raw_data"]["basename"]).read_bytes()
        assert shard["raw_data"]["bytes"] == len(content)
        count = int(np.frombuffer(content, np.uint32, 1)[0])
        offsets = np.frombuffer(content, np.uint32, count + 1, offset=4)
        assert (count, int(offsets[-1])) == (shard["samples"], len(content))
        config = json.loads(content[4 * (count + 2) : offsets[0]])
        assert config["column_names"] == ["image", "key", "label", "source_label"]
        assert config["column_sizes"] == shard["column_sizes"] == [None, None, 8, 8]
        for begin, end in itertools.pairwise(offsets):
            row = content[begin:end]
            image, stem = np.frombuffer(row, np.uint32, 2)
            values = np.frombuffer(row[8 + image + stem :], np.int64)
            key = row[8 + image : 8 + image + stem].decode()
            found[key] = (*values, pixels(Image.open(io.BytesIO(row[8 : 8 + image]))))
    assert found == expected


@pytest.mark.parametrize("form", FORMATS)
def test_an_export_is_the_same_bytes_and_continues_where_it_was_cut(form, exported, opened, tmp_path, monkeypatch):
    whole, again = exported(form), tmp_path / "out"
    real, calls = exports._put, []

    def dies(place, file):
        calls.append(file[0])
        if len(calls) > (1 if form in ("wids", "parquet", "mds") else 0):
            raise KeyboardInterrupt
        return real(place, file)

    monkeypatch.setattr(Format, "workers", 1)
    monkeypatch.setattr(exports, "_put", dies)
    invoke("export", "other", again, "--to", form, "--store", opened[0], code=130)
    assert not (again / ".export/done.json").exists()
    monkeypatch.setattr(exports, "_put", real)
    assert "files" in invoke("export", "other", again, "--to", form, "--store", opened[0])
    assert files(again) == files(whole)
    assert all((again / name).read_bytes() == (whole / name).read_bytes() for name in files(whole))
    said = json.loads(invoke("export", "other", again, "--to", form, "--store", opened[0], "--json"))
    assert said["found"] == (1 if form == "npz" else 3)


def test_a_destination_with_other_files_is_refused_and_a_lost_file_is_written_again(exported, opened, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(exported("wids"), folder)
    store = ("--store", opened[0])
    assert "name an empty folder" in invoke("export", "control", folder, "--to", "wids", *store, code=2)
    assert "as wids: name an empty folder" in invoke("export", "other", folder, "--to", "npz", *store, code=2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    assert "has other files (thesis.tex)" in invoke("export", "other", tmp_path / "mine", "--to", "npz", *store, code=2)
    lost = next(folder.glob("other-*-train-000001.tar"))
    lost.unlink()
    assert "2 of 3 parts were there already" in invoke("export", "other", folder, "--to", "wids", *store)
    assert lost.read_bytes() == (exported("wids") / lost.name).read_bytes()


def test_what_is_written_is_read_back(opened, tmp_path, monkeypatch):
    real = Store.put
    monkeypatch.setattr(Store, "put", lambda self, path, content: real(self, path, content[:-1] + b"x"))
    output = invoke("export", "other", tmp_path / "out", "--to", "npz", "--store", opened[0], code=1)
    assert "train.npz reads back with other bytes than were written" in output


def test_an_export_goes_to_an_object_store_alike(exported, opened, s3_url, s3_server):
    invoke("export", "other", s3_url, "--to", "wids", "--store", opened[0])
    there, here = s3_server.contents(s3_url.removeprefix("s3://")), exported("wids")
    assert {name for name in there if not name.endswith("/")} == files(here)
    assert there["train.json"] == (here / "train.json").read_bytes()
