"""`notbugs init` writes an experiment for the images at hand that can be planned as it is."""

import importlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from pipeline.begin.source import look, recipe_for
from pipeline.cli import main
from pipeline.experiment import spec
from pipeline.experiment.graph import build
from pipeline.run.jobs import Context
from pipeline.run.preflight import preflight
from pipeline.store import Store


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def picture(number, size=(30, 28), grey=False):
    shape = (size[1], size[0]) if grey else (size[1], size[0], 3)
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8))


def photos(root, splits=("train", "val"), each=6, **how):
    for split in splits:
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            for number in range(each):
                picture(number, **how).save(root / split / name / f"{number}.png")


def init(*args):
    return CliRunner().invoke(main, ["init", *map(str, args)])


def planned(file, here):
    """The nodes of the file, checked as by `notbugs plan`."""
    return preflight(build(spec.read(file)), Context(Store(str(here / "store")), here / "data", here), fetch=False)


def test_without_images_it_is_the_digits_experiment_and_an_existing_file_is_left_alone(here):
    done = init()
    assert done.exit_code == 0 and "scikit-learn's handwritten digits" in done.output
    assert planned(Path("experiment.yaml"), here)[0].node.id == "datasets/clean"
    text = Path("experiment.yaml").read_text()
    assert text.splitlines()[0] == "# yaml-language-server: $schema=notbugs.schema.json"
    assert Path("notbugs.schema.json").exists()
    again = init("cifar10")
    assert again.exit_code == 2 and "exists already and was not overwritten" in again.output
    assert Path("experiment.yaml").read_text() == text


@pytest.mark.parametrize("root", ["data", "data/photos"])
def test_a_folder_is_looked_at_for_classes_sizes_and_colours(root, here):
    photos(here / root, size=(90, 70))
    assert "2 classes (ant, bee), 12 train and 12 test images, colour, 70 pixels on" in init().output
    (clean,) = [s for s in planned(Path("experiment.yaml"), here) if s.node.name == "clean"]
    assert clean.facts["image_shape"] == [3, 64, 64] and clean.facts["counts"] == {"test": 12, "train": 12}


def test_small_grey_images_of_parquet_keep_their_size(here):
    (here / "data").mkdir()
    for split in ("train", "validation"):
        path = here / f"data/{split}.png"
        picture(1, (28, 28), grey=True).save(path)
        pq.write_table(
            pa.table({"image": [path.read_bytes()] * 40, "label": [0, 1] * 20}), here / f"data/{split}-0.parquet"
        )
        path.unlink()
    assert "2 classes (0, 1), 40 train and 40 test images, grey, 28 pixels" in init("--out", "mine.yaml").output
    (clean,) = [s for s in planned(Path("mine.yaml"), here) if s.node.name == "clean"]
    assert clean.facts["image_shape"] == [1, 28, 28]


def test_few_images_make_shards_of_whole_batches_of_the_attack(here):
    photos(here / "data", each=150, size=(4, 4))
    init("--size", 8)
    clean, other = (s for s in planned(Path("experiment.yaml"), here) if s.node.name in ("clean", "other"))
    sizes = [size for name, size in clean.facts["shards"].items() if name.startswith("train")]
    assert sum(sizes) == 300 and {size % other.node.recipe.batch_size for size in sizes[:-1]} == {0}


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("kind", ["cifar10", "imagenet"])
def test_the_large_sets_have_an_experiment_each_whether_they_are_there_or_not(kind, there, here):
    if there:
        photos(here / "data/imagenet", each=1)
    assert init(kind).exit_code == 0
    assert {node.id for node in build(spec.read(Path("experiment.yaml")))} >= {"models/standard", "datasets/control"}


def test_a_folder_without_a_test_split_gets_one_and_tables_without_one_a_warning(here):
    photos(here / "data/photos", splits=("train",))
    assert "2 classes (ant, bee), 10 train and 2 test images" in init("--images", "photos").stdout
    text = Path("experiment.yaml").read_text()
    assert "plan FILE --data data " in text and "the folder that --data names" in text
    assert "test_share: 0.2" in text and "scores of training images" not in text
    clean, *rest = planned(Path("experiment.yaml"), here)
    assert clean.facts["counts"] == {"test": 2, "train": 10}
    assert not any(status.remark for status in rest), "its own batch size is no reason for one"

    table = pa.table({"image": [next((here / "data").rglob("*.png")).read_bytes()] * 8, "label": [0, 1] * 4})
    pq.write_table(table, here / "data/all.parquet")
    warned = init("--images", "all.parquet", "--out", "tables.yaml")
    assert "Warning: there is no test split" in warned.stderr
    assert "these are scores of training images" in Path("tables.yaml").read_text()


NETS = """
from torch import nn
def net(classes, channels):
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))
"""


@pytest.mark.parametrize("given", ["arch", "weights"])
def test_a_network_or_a_checkpoint_of_ones_own_takes_its_place_in_the_file(given, here, monkeypatch):
    photos(here / "data/photos", size=(90, 70))
    Path("nets_of_init.py").write_text(NETS)
    monkeypatch.syspath_prepend(str(here))
    net = importlib.import_module("nets_of_init").net(2, 3)
    torch.save(net.state_dict(), here / "data/net.pt")
    weights = ("--weights", "net.pt") if given == "weights" else ()
    done = init("--images", "photos", "--size", 24, "--arch", "nets_of_init:net", *weights, "--out", "mine.yaml")
    assert "Next: notbugs plan mine.yaml --data data" in done.output and "Warning" not in done.output, done.output
    assert "Network nets_of_init:net, learners nets_of_init:net; attack in L2 at ε 0.75, 30 steps" in done.output
    experiment = spec.read(Path("mine.yaml"))
    assert experiment.name == "mine" and "eps: 0.75" in Path("mine.yaml").read_text()
    nodes = {status.node.name: status for status in planned(Path("mine.yaml"), here)}
    assert nodes["clean"].facts["image_shape"] == [3, 24, 24]
    assert nodes["standard"].node.stage == ("pretrained" if weights else "train")
    learner = nodes["from_other"].node.recipe
    assert learner.arch == "nets_of_init:net"
    if weights:
        standard = nodes["standard"].node.recipe
        assert (standard.arch, standard.weights, standard.shape) == ("nets_of_init:net", "net.pt", [3, 24, 24])
        needed = {parent.name for parent in nodes["source"].node.inputs.values()}
        assert needed == {"standard", "clean"}, "it is scored before the attack"
        text = Path("mine.yaml").read_text()
        (line,) = [line for line in text.splitlines() if line.startswith("  standard: ")]
        (other,) = [line for line in text.splitlines() if line.startswith("  # standard: ")]
        Path("mine.yaml").write_text(text.replace(f"{line}\n", "").replace(other, other.replace("# ", "")))
        nodes = {status.node.name: status.node for status in planned(Path("mine.yaml"), here)}
        assert nodes["standard"].recipe.mean == [0.485, 0.456, 0.406], "the line to uncomment is ready"


def test_few_images_get_twice_the_radius(here, monkeypatch):
    photos(here / "data/photos", size=(90, 70))
    assert "attack in L2 at ε 1," in init("--images", "photos", "--size", 32, "--out", "few.yaml").output
    planned = CliRunner().invoke(main, ["plan", "few.yaml", "--data", "data", "--store", "s"]).stdout
    assert "12 train + 12 test" in planned, "those of training come first, as once it is made"
    assert "and doubled, as they are few" in Path("few.yaml").read_text()
    monkeypatch.setattr("pipeline.begin.experiment.FEW", 1)
    assert "attack in L2 at ε 0.5," in init("--images", "photos", "--size", 32, "--out", "many.yaml").output
    assert "doubled" not in Path("many.yaml").read_text()
    of = ("--arch", "resnet18", "--weights", "net.pt", "--out", "theirs.yaml")
    assert "Network resnet18, learners small_cnn;" in init("--images", "photos", "--size", 32, *of).output


@pytest.mark.parametrize("kind", ["digits", "cifar10", "imagenet"])
def test_a_checkpoint_may_classify_the_known_sets_too(kind, here):
    done = init(kind, "--arch", "resnet18", "--weights", "net.pt")
    assert done.exit_code == 0
    assert "Warning: there is no file net.pt in data: put it there before the run" in done.output
    (standard,) = [node for node in build(spec.read(Path("experiment.yaml"))) if node.name == "standard"]
    shape = {"digits": [1, 8, 8], "cifar10": [3, 32, 32], "imagenet": [3, 224, 224]}[kind]
    assert (standard.recipe.arch, standard.recipe.weights, standard.recipe.shape) == ("resnet18", "net.pt", shape)


@pytest.mark.parametrize(
    ("make", "args", "sentence"),
    [
        (lambda data: None, ("--weights", "net.pt"), "--weights needs --arch, the network that they belong to"),
        (lambda data: None, ("cifar10", "--size", "30"), "--size: these images are taken at 32 × 32 pixels"),
        (lambda data: (photos(data / "a"), photos(data / "b")), (), "several sources, a, b: name one with --images"),
        (lambda data: data.mkdir(), ("images",), "holds no images; expected train/<class>/<image>, or parquet files"),
        (lambda data: photos(data / "a"), ("--images", "gone"), "gone is neither a folder nor one of cifar10"),
        (lambda data: photos(Path("b")), ("--images", "b"), "; it is in the current folder: add `--data .`"),
        (lambda data: photos(data / "a"), ("--out", "no/where.yaml"), "no/where.yaml cannot be written"),
    ],
)
def test_what_cannot_be_begun_is_one_sentence(make, args, sentence, here):
    make(here / "data")
    done = init(*args)
    assert done.exit_code == 2 and sentence in done.output
    assert not Path("experiment.yaml").exists()


def test_a_set_of_torchvision_and_a_folder_of_classes_are_sources_too(here):
    assert recipe_for("mnist", here) == {"source": "mnist"}
    photos(here, splits=("animals",))
    found = look(recipe_for("animals", here), here)
    assert (found.counts, found.uniform, found.sides) == ({"train": 12}, False, (28, 28))
