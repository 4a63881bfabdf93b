"""Every experiment of `configs/` can be planned: its data listed, its networks built and tried, its names resolved."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import calculate_md5

from pipeline.cli import main
from stages.images import encode_png

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Folders laid out as CIFAR-10, ImageNet and Imagenette are, with few images that show nothing."""
    folder = tmp_path_factory.mktemp("data")
    batches = folder / CIFAR10.base_folder
    batches.mkdir()
    images = {"data": np.zeros((100, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(100)]}
    for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list):
        (batches / name).write_bytes(pickle.dumps(images))
    names = [f"class {i}" for i in range(10)]
    (batches / CIFAR10.meta["filename"]).write_bytes(pickle.dumps({CIFAR10.meta["key"]: names}))
    png = encode_png(np.zeros((8, 8, 3), dtype=np.uint8))
    for root, classes, each in (("imagenet", 1000, 4), ("imagenette", 10, 30)):
        for split in ("train", "val"):
            for number in range(classes):
                of_class = folder / root / split / f"n{number:08d}"
                of_class.mkdir(parents=True)
                for image in range(each):
                    (of_class / f"{image}.png").write_bytes(png)
    return folder


@pytest.fixture
def accepted(data, monkeypatch):
    """torchvision takes our CIFAR-10 for whole."""
    folder = data / CIFAR10.base_folder
    for listed in ("train_list", "test_list"):
        sums = [[name, calculate_md5(folder / name)] for name, _ in getattr(CIFAR10, listed)]
        monkeypatch.setattr(CIFAR10, listed, sums)
    monkeypatch.setitem(CIFAR10.meta, "md5", calculate_md5(folder / CIFAR10.meta["filename"]))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_it_can_be_planned(file, data, accepted, tmp_path):
    asked = ["plan", str(file), "--store", str(tmp_path / "s"), "--data", str(data), "--json"]
    result = CliRunner().invoke(main, asked, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    nodes = json.loads(result.stdout)["nodes"]
    assert all(node["state"] == "to make" for node in nodes)
    assert {"datasets", "models", "evaluations"} == {node["node"].partition("/")[0] for node in nodes}
    assert not (tmp_path / "s").exists()
