"""`notbugs pack` lays images down as WebDataset shards that a run reads again."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner
from PIL import Image
from support import files
from torchvision.datasets import CIFAR10

from pipeline.cli import main
from pipeline.experiment import spec
from pipeline.store import Store
from stages.load import list_source


def png(number):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 11, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def data(tmp_path):
    for split in ("train", "val"):
        for label, name in enumerate(("ant", "bee")):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for at in range(7):
                (tmp_path / "photos" / split / name / f"{at}.png").write_bytes(png(label * 7 + at))
    return tmp_path


def pack(data, *args):
    where = ["--engine", "inline", "--store", str(data / "store"), "--data", str(data)]
    return CliRunner().invoke(main, ["pack", *map(str, args), *where])


def read(folder, split="train"):
    """Image file and label of each sample."""
    samples = []
    for path in folder.glob(f"{split}-*.tar"):
        with tarfile.open(path) as tar:
            found = {member.name: tar.extractfile(member).read() for member in tar}
        samples += [(found[name], int(found[f"{name[:-4]}.cls"])) for name in found if name.endswith(".png")]
    return sorted(samples)


def test_an_image_folder_becomes_shards_that_the_printed_recipe_reads(data):
    done = pack(data, "photos", data / "out", "--shard-size", 5)
    assert done.exit_code == 0, done.output
    wanted = sorted((png(number), number // 7) for number in range(14))
    assert read(data / "out") == read(data / "out", "test") == wanted
    (line,) = [line for line in done.stdout.splitlines() if "source: webdataset" in line]
    experiment = spec.parse({"name": "again", "datasets": yaml.safe_load(line)})
    listing = list_source(experiment.datasets["photos"].load, Path("nowhere"))
    assert listing.classes == ("ant", "bee")
    assert {split: len(images) for split, images in listing.items.items()} == {"train": 14, "test": 14}
    assert {path.name for path in (data / "out").iterdir()} >= {"manifest.json", "samples.parquet", "recipe.json"}


def test_a_packing_that_was_stopped_goes_on_and_copies_only_what_lacks_or_is_damaged(data):
    pack(data, "photos", data / "out", "--shard-size", 5)
    whole = {name: (data / "out" / name).read_bytes() for name in files(data / "out")}
    (data / "out/manifest.json").unlink()
    (data / "out/train-000001.tar").unlink()
    (data / "out/test-000000.tar").write_bytes(bytes(len(whole["test-000000.tar"])))
    done = pack(data, "photos", data / "out", "--shard-size", 5, "--json")
    facts = json.loads(done.stdout)
    assert facts["there_before"] == facts["files"] - 3
    assert {name: (data / "out" / name).read_bytes() for name in whole} == whole
    assert facts["shards"]["train"].endswith("/out/train-{000000..000002}.tar")


def test_another_data_set_in_the_folder_is_not_mixed_in(data):
    pack(data, "photos", data / "out", "--shard-size", 5)
    done = pack(data, "photos", data / "out", "--shard-size", 6)
    assert done.exit_code == 2 and "holds another dataset already: name an empty folder, or empty it" in done.output
    (data / "out/manifest.json").unlink()
    done = pack(data, "photos", data / "out", "--shard-size", 14)
    assert done.exit_code == 2 and "holds shards of another dataset, test-000001.tar" in done.output


def test_parquet_goes_to_an_object_store_and_a_set_of_torchvision_to_a_folder(data, s3_url, cifar):
    table = pa.table({"image": [png(number) for number in range(9)], "label": [number % 3 for number in range(9)]})
    pq.write_table(table, data / "t.parquet")
    assert pack(data, "t.parquet", f"{s3_url}/packed").exit_code == 0
    there = Store(f"{s3_url}/packed").files("")
    assert set(there) == {"train-000000.tar", "samples.parquet", "recipe.json", "sources.arrow", "manifest.json"}
    assert pack(data, "cifar10", data / "cifar", "--limit", 6).exit_code == 0
    assert len(read(data / "cifar")) == 6 and len(read(data / "cifar", "test")) == 6


@pytest.fixture
def cifar(data, monkeypatch):
    """Torchvision's reader, with six images of each split in place of its files."""

    def make(self, root, train, download):
        self.data = np.arange(8 * 32 * 32 * 3, dtype=np.uint64).astype(np.uint8).reshape(8, 32, 32, 3) + train
        self.targets, self.classes = [0, 1] * 4, ["cat", "dog"]

    monkeypatch.setattr(CIFAR10, "__init__", make)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("gone", "out"), "gone is neither a folder nor one of cifar10, cifar100, mnist, fashion-mnist"),
        (("https://user:word@far.example/t.parquet", "out"), "a URL with credentials would be stored and shown"),
        (("s3://", "out"), "s3:// is no place that can be read: Not a valid bucket name"),
        (("cifar10", "out", "--crop", 8), "--crop: images of cifar10 are taken as they are; leave it out"),
        (("photos/train/ant", "out"), "holds neither folders of images (train/<class>/<image>, or <class>/<image>)"),
    ],
)
def test_what_cannot_be_packed_is_one_sentence_and_nothing_is_written(args, sentence, data):
    before = files(data)
    done = pack(data, args[0], data / args[1], *args[2:])
    assert done.exit_code == 2 and sentence in done.output and files(data) == before
