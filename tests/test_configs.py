"""Every experiment of `configs/` can be planned: its data listed, its networks built and tried, its names resolved."""

import json
import pickle
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import calculate_md5

from pipeline.cli import main
from pipeline.cluster import Request, runtime_env
from pipeline.experiment import spec, yaml12
from pipeline.experiment.graph import build
from pipeline.store import Store
from stages.images import encode_png
from stages.recipes import is_own

FOLDER = Path(__file__).parent.parent / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Folders in the layout of CIFAR-10, ImageNet and Imagenette, with a few meaningless images."""
    folder = tmp_path_factory.mktemp("data")
    batches = folder / CIFAR10.base_folder
    batches.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (400, 3072), np.uint8)
    images = {"data": noise, "labels": [i % 10 for i in range(400)]}
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
    """torchvision accepts our CIFAR-10 as complete."""
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
    assert all(re.fullmatch("to make(, as .*)?", node["state"]) for node in nodes)
    assert {"datasets", "models", "evaluations"} == {node["node"].partition("/")[0] for node in nodes}
    assert not (tmp_path / "s").exists()


LESS = {"epochs": 1, "batch_size": 20, "steps": 2}


def lessened(said):
    """The same experiment with few images and few steps."""
    if isinstance(said, list):
        return [lessened(one) for one in said]
    if not isinstance(said, dict):
        return said
    less = {key: LESS.get(key, value) if isinstance(value, int) else lessened(value) for key, value in said.items()}
    loads = isinstance(said.get("source"), str)
    return less | {"limit": 20 if "limit" in said else 60, "shard_size": 20} if loads else less


@pytest.mark.slow
def test_cifar10_runs_on_few_images(data, accepted, tmp_path):
    said = lessened(yaml12.load((FOLDER / "cifar10.yaml").read_bytes()))
    file = tmp_path / "cifar10.yaml"
    file.write_text(json.dumps(said))
    asked = ["run", str(file), "--engine", "inline", "--data", str(data), "--store", str(tmp_path / "store")]
    result = CliRunner().invoke(main, asked, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    results = list((tmp_path / "store/evaluations").glob("*/*/result.json"))
    rows = [row for path in results for row in json.loads(path.read_text())["rows"]]
    assert {path.parts[-3] for path in results} == set(said["evaluations"])
    scored = {row["model"].partition("@")[0] for row in rows}
    assert {"standard", "robust", "from_det", "from_robust_features", "from_rand.probe", "from_rand.bottom"} <= scored
    assert all(0 <= row["accuracy"] <= 1 and row["n"] in (20, 60) for row in rows)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_it_can_be_submitted_and_the_cluster_reads_what_was_asked(file, tmp_path):
    """What is sent, without a cluster: the job's environment, and the command, whose input is the experiment."""
    experiment = spec.read(file)
    request = Request(experiment, Store("s3://bucket/store"), only=("clean",))
    sent = runtime_env(request, tmp_path)
    own = any(is_own(getattr(recipe, "arch", None)) for recipe in spec.recipes(experiment).values())
    assert ("working_dir" in sent) == own and len(sent["py_modules"]) == 2
    command, _, stdin = request.entrypoint().partition(" <<'EXPERIMENT'\n")
    assert stdin.endswith("\nEXPERIMENT")
    assert spec.parse(json.loads(stdin.removesuffix("\nEXPERIMENT"))) == experiment
    words = shlex.split(command)
    assert words[-6:] == ["--store", "s3://bucket/store", "--address", "auto", "--only", "clean"]


@pytest.mark.parametrize("seeds", ["", "seeds: [0, 1, 2]"], ids=["one seed", "three seeds"])
@pytest.mark.parametrize("arch", ["cifar_resnet50", "cifar_resnet18", "resnet9"])
def test_with_any_network_that_its_header_offers_the_papers_models_differ(arch, seeds, write):
    text = (FOLDER / "paper-cifar10.yaml").read_text().replace("cifar_resnet50", arch)
    versions = [node.version for node in build(spec.read(write(text + seeds))) if node.group == "models"]
    assert len(set(versions)) == len(versions)


@pytest.mark.parametrize("file", [file for file in CONFIGS if "paper" in file.stem], ids=lambda file: file.stem)
def test_every_relabelled_set_of_the_paper_has_its_leakage_controls(file):
    asked = yaml.safe_load(file.read_text())
    controlled = {part["leakage"] for part in asked["evaluations"].values() if "leakage" in part}
    assert controlled == {"rand", "other", "det"}
