"""A commented experiment file to begin with: the paper's question, asked of the images at hand."""

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Template

from pipeline.begin.source import Found, Recipe, look, recipe_for
from pipeline.experiment.spec import PLAIN
from stages.errors import BadInput, some

KINDS = ("digits", "images", "cifar10", "imagenet")

TEMPLATE = Path(__file__).with_name("experiment.yaml.jinja")

SCHEMA = "notbugs.schema.json"
"""File with the schema of experiment files, beside one that names it for editors."""

SMALL, MIDDLE, LARGE = 40, 64, 224
"""Sides in pixels: up to the first, images keep their size; larger ones become the second, and ImageNet's the third."""

SHARE = 0.2
"""Share of the images that is kept for the test where a folder has no test split."""

IMAGENET = 1000
"""Classes of ImageNet."""


@dataclass(frozen=True)
class Start:
    """What differs between the experiments.

    Attributes:
        title: the comment at the top.
        load: how images are read.
        eps, step_size, steps: the attack, in pixel units; a step without a size is a fifth of eps.
        source: the source model, as YAML.
        learner: the learners' training, as YAML without `on`.
        notes: comment on the networks.
    """

    title: str
    load: Recipe
    eps: float
    step_size: float | None
    steps: int
    source: str
    learner: str
    notes: str

    @property
    def tested(self) -> bool:
        """Whether there are test images; else scores are of training images."""
        splits = self.load.get("splits") or self.load.get("files") or {"test": ""}
        return "test" in splits or "test_share" in self.load


TRAIN = "{{train: {{on: clean, {}}}}}"

SLIM = "arch: slim_resnet, nesterov: true, schedule: triangular, warmup: 0.23"


def _digits() -> Start:
    train = "arch: small_cnn, threads: 1"
    return Start(
        "scikit-learn's handwritten digits: 10 classes, grey, 8 × 8 pixels. Takes about a minute on two cores.",
        {"source": "sklearn-digits", "shard_size": 360},
        1.5, None, 50,
        TRAIN.format(f"{train}, epochs: 20, lr: 0.05"),
        f"{train}, epochs: 30, lr: 0.02",
        "A small network.",
    )  # fmt: skip


def _cifar10() -> Start:
    return Start(
        "CIFAR-10: 10 classes, colour, 32 × 32 pixels, downloaded if --data lacks it. ε is the paper's.",
        {"source": "cifar10"},
        0.5, 0.15, 12,
        TRAIN.format(f"{SLIM}, epochs: 10, batch_size: 500, lr: 0.5, augment: shift-flip"),
        f"{SLIM}, epochs: 16, batch_size: 125, lr: 0.1, augment: flip",
        "The network and rates of configs/cifar10.yaml; learners need a lower rate.",
    )  # fmt: skip


def _imagenet(root: str) -> Start:
    return Start(
        f"ImageNet in {root}: 1,000 classes at 224 × 224 pixels, a pretrained source model. For GPUs.",
        {"source": "image-folder", "root": root, "resize": 256, "crop": LARGE},
        3.0, 0.1, 100,
        "{pretrained: {arch: resnet50, weights: IMAGENET1K_V1}}",
        "arch: resnet50, epochs: 90, batch_size: 256, lr: 0.1, schedule: steps, milestones: [30, 60]",
        "torchvision's ResNet-50; `notbugs plan FILE --cost --gpus 8` estimates the time.",
    )  # fmt: skip


def _images(found: Found) -> Start:
    least, most = found.sides
    side = least if least <= SMALL else MIDDLE
    geometry: Recipe = {"crop": side} if found.uniform and least == side else {"resize": side, "crop": side}
    shard = max(50, min(1000, sum(found.counts.values()) // 8))
    sized = f"{least}" if least == most else f"{least} to {most}"
    counts = " and ".join(f"{count:,} {split}" for split, count in found.counts.items())
    names = "classes" if len(found.classes) > 1 else "class"
    eps = round((1.5 * side / 28) if found.grey else (0.5 * side / 32), 2)
    batch = 2 ** max(1, int(math.log2(max(1, min(128, found.counts.get("train", 1) // 8)))))
    train = f"arch: {'small_cnn' if side <= SMALL else 'fast_resnet'}, batch_size: {batch}, augment: flip"
    return Start(
        f"{len(found.classes):,} {names} ({some(found.classes, 3)}), {counts} images, "
        f"{'grey' if found.grey else 'colour'}, {sized} pixels on the shorter side.",
        {**found.recipe, **geometry, "channels": 1 if found.grey else 3, "shard_size": shard},
        eps, None, 30,
        TRAIN.format(f"{train}, epochs: 20, lr: 0.05"),
        f"{train}, epochs: 30, lr: 0.02",
        "A network of this project for small images; torchvision's classifiers and your own go here, too.",
    )  # fmt: skip


def start(kind: str | None, place: str | None, data: Path) -> Start:
    """Choose an experiment for a kind of images, or for what lies in a folder.

    Args:
        kind: one of `KINDS`; by default what lies in the folder, and the digits where nothing does.
        place: the images, as for `recipe_for`; by default the folder itself, or the only source in it.
        data: the folder.

    Raises:
        BadInput: no images are there.
    """
    if kind == "digits" or (kind is None and place is None and not _anything(data)):
        return _digits()
    if kind == "cifar10" or (kind is None and (data / "cifar-10-batches-py").is_dir()):
        return _cifar10()
    if kind == "imagenet" and not _anything(data):
        return _imagenet(place or "imagenet")
    place = place or _only_source(data)
    if kind == "imagenet":
        return _imagenet(place)
    recipe = recipe_for(place, data)
    folder = recipe["source"] == "image-folder"
    if folder and "test" not in recipe["splits"]:
        recipe["test_share"] = SHARE
    found = look(recipe, data)
    whole = folder and len(found.classes) == IMAGENET
    return _imagenet(place) if whole and kind is None else _images(found)


def _anything(data: Path) -> bool:
    return data.is_dir() and any(True for _ in data.iterdir())


def _only_source(data: Path) -> str:
    """The folder itself if it holds images, or else the one folder in it that does."""
    fitting = list[str]()
    inner = sorted(entry.name for entry in data.iterdir() if entry.is_dir()) if data.is_dir() else []
    for name in (".", *inner):
        try:
            recipe = recipe_for(name, data)
        except BadInput:
            continue
        if name == "." and recipe.get("splits", {}) == {"train": "."} and not _holds_images(data, inner):
            continue
        fitting.append(name)
        if name == ".":
            break
    if len(fitting) != 1:
        what = f"several sources, {some(fitting)}: name one with --images" if fitting else "no images"
        raise BadInput(f"{data} holds {what}; expected train/<class>/<image>, or parquet files")
    return fitting[0]


def _holds_images(data: Path, classes: list[str]) -> bool:
    """Whether folders are classes, with images, rather than sources, with folders of their own."""
    return any(entry.is_file() for name in classes for entry in (data / name).iterdir())


def as_yaml(name: str, begun: Start, where: str = "") -> str:
    """The experiment file.

    Args:
        name: the experiment's.
        begun: what it is about.
        where: further arguments of `plan` and `run`.

    Raises:
        BadInput: the name cannot be an experiment's.
    """
    if not re.fullmatch(PLAIN, name):
        raise BadInput(f"{name!r} cannot name an experiment: use letters, digits, `_`, `.` and `-`")
    values = {**asdict(begun), "load": _flow(begun.load), "split": "test" if begun.tested else "train"}
    template = Template(TEMPLATE.read_text(encoding="utf-8"), trim_blocks=True, keep_trailing_newline=True)
    return str(template.render(values, name=name, schema=SCHEMA, where=where))


def _flow(value: Any) -> str:
    """A value as YAML in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(inner)}" for key, inner in value.items()) + "}"
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z./][\w./-]*", value)
    return value if plain and not _reserved(value) else json.dumps(value, ensure_ascii=False)


def _reserved(text: str) -> bool:
    return text.lower() in ("true", "false", "null", "~")
