"""A commented experiment file to begin with: the paper's question, asked of the images at hand."""

import json
import math
import re
import textwrap
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Template

from pipeline.begin.source import Found, Recipe, look, recipe_for
from pipeline.experiment.spec import PLAIN
from stages.errors import BadInput, some
from stages.recipes import Attack

KINDS = ("digits", "images", "cifar10", "imagenet")

TEMPLATE = Path(__file__).with_name("experiment.yaml.jinja")

SCHEMA = "notbugs.schema.json"
"""File with the schema of experiment files, beside one that names it for editors."""

SMALL, MIDDLE, LARGE = 40, 64, 224
"""Sides in pixels: up to the first, images keep their size; larger ones become the second, and ImageNet's the third."""

SHARE = 0.2
"""Share of the images that is kept for the test where a folder has no test split."""

FEW = 10_000
"""Training images below which ε in colour is twice as large, as a network trained on few is harder to move, and the
learners have a checkpoint's network (docs/how-to.md)."""

BATCH = Attack.model_fields["batch_size"].default
"""Images that an attack takes at a time: a shard of whole batches leaves no part of one to be padded."""

NORMALISED: dict[int, Recipe] = {
    1: {"mean": [0.5], "std": [0.5]},
    3: {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
}
"""Channels → means and deviations that trainings often use."""

IMAGENET = 1000
"""Classes of ImageNet."""


@dataclass(frozen=True)
class Start:
    """What differs between the experiments.

    Attributes:
        title: the comment at the top.
        load: how images are read.
        shape: channels, height and width of the images.
        eps, step_size, steps: the attack, in pixel units; a step without a size is a fifth of eps.
        arch: network of the source model.
        source: its training, as YAML without `on` and `arch`.
        learner_arch: network of the learners.
        learner: their training, likewise.
        notes: comment on the networks.
        weights: those of the source model, which then needs no training.
        few: whether there are few training images: learners then have the network of a checkpoint, too.
    """

    title: str
    load: Recipe
    shape: tuple[int, int, int]
    eps: float
    step_size: float | None
    steps: int
    arch: str
    source: str
    learner_arch: str
    learner: str
    notes: str
    weights: str | None = None
    few: bool = False

    @property
    def tested(self) -> bool:
        """Whether there are test images; else scores are of training images."""
        splits = self.load.get("splits") or self.load.get("files") or {"test": ""}
        return "test" in splits or "test_share" in self.load

    def with_network(self, arch: str | None, weights: str | None) -> "Start":
        """The same with another network: of all models, or of the source model alone if it has weights.

        Raises:
            BadInput: there are weights without their network.
        """
        if weights is not None:
            if arch is None:
                raise BadInput("--weights needs --arch, the network that they belong to")
            learner, notes = (arch, ALIKE) if self.few else (self.learner_arch, UNLIKE)
            return replace(self, arch=arch, weights=weights, learner_arch=learner, notes=f"{CHECKPOINT} {notes}")
        return self if arch is None else replace(self, arch=arch, learner_arch=arch, weights=None, notes=OWN)


CHECKPOINT = "The checkpoint; output i is class i."

UNLIKE = "The learners have another network, so that the result does not depend on one."

ALIKE = (
    "The learners have its network: few images seldom teach another what its perturbations contain, though that would "
    "make the stronger test."
)

OWN = "A learner of another network makes the stronger test; docs/experiment-file.md lists the networks."

SLIM = "nesterov: true, schedule: triangular, warmup: 0.23"


def _digits() -> Start:
    return Start(
        title="scikit-learn's handwritten digits: 10 classes, grey, 8 × 8 pixels. Takes about a minute on two cores.",
        load={"source": "sklearn-digits", "shard_size": 360},
        shape=(1, 8, 8),
        eps=1.5,
        step_size=None,
        steps=50,
        arch="small_cnn",
        source="threads: 1, epochs: 20, lr: 0.05",
        learner_arch="small_cnn",
        learner="threads: 1, epochs: 30, lr: 0.02",
        notes="A small network.",
    )


def _cifar10() -> Start:
    return Start(
        title="CIFAR-10: 10 classes, colour, 32 × 32 pixels, downloaded if --data lacks it. ε is the paper's.",
        load={"source": "cifar10"},
        shape=(3, 32, 32),
        eps=0.5,
        step_size=0.15,
        steps=12,
        arch="slim_resnet",
        source=f"{SLIM}, epochs: 10, batch_size: 500, lr: 0.5, augment: shift-flip",
        learner_arch="slim_resnet",
        learner=f"{SLIM}, epochs: 16, batch_size: 125, lr: 0.1, augment: flip",
        notes="The network and rates of configs/cifar10.yaml; learners need a lower rate.",
    )


def _imagenet(root: str) -> Start:
    training = "epochs: 90, batch_size: 256, lr: 0.1, schedule: steps, milestones: [30, 60]"
    return Start(
        title=f"ImageNet in {root}: 1,000 classes at 224 × 224 pixels. For GPUs.",
        load={"source": "image-folder", "root": root, "resize": 256, "crop": LARGE},
        shape=(3, LARGE, LARGE),
        eps=3.0,
        step_size=0.1,
        steps=100,
        arch="resnet50",
        weights="IMAGENET1K_V1",
        source=training,
        learner_arch="resnet50",
        learner=training,
        notes="torchvision's ResNet-50, pretrained; `notbugs plan FILE --cost --gpus 8` estimates the time.",
    )


def _images(found: Found, size: int | None) -> Start:
    least, most = found.sides
    side = size or (least if least <= SMALL else MIDDLE)
    geometry: Recipe = {"crop": side} if found.uniform and least == side else {"resize": side, "crop": side}
    shard = BATCH * max(1, min(8, sum(found.counts.values()) // (8 * BATCH)))
    sized = f"{least}" if least == most else f"{least} to {most}"
    counts = " and ".join(f"{count:,} {split}" for split, count in found.counts.items())
    names = "classes" if len(found.classes) > 1 else "class"
    few = found.counts.get("train", 0) < FEW
    batch = 2 ** max(1, int(math.log2(max(1, min(128, found.counts.get("train", 1) // 8)))))
    arch, channels = "small_cnn" if side <= SMALL else "fast_resnet", 1 if found.grey else 3
    return Start(
        title=f"{len(found.classes):,} {names} ({some(found.classes, 3)}), {counts} images, "
        f"{'grey' if found.grey else 'colour'}, {sized} pixels on the shorter side, resized to {side} × {side} "
        "(--size sets another).",
        load={**found.recipe, **geometry, "channels": channels, "shard_size": shard},
        shape=(channels, side, side),
        eps=round((1.5 * side / 28) if found.grey else ((1.0 if few else 0.5) * side / 32), 2),
        step_size=None,
        steps=30,
        arch=arch,
        source=f"batch_size: {batch}, augment: flip, epochs: 20, lr: 0.05",
        learner_arch=arch,
        learner=f"batch_size: {batch}, augment: flip, epochs: 30, lr: 0.02",
        notes="A network of this project for small images; torchvision's classifiers and your own go here, too.",
        few=few,
    )


def start(kind: str | None, place: str | None, data: Path, size: int | None = None) -> Start:
    """Choose an experiment for a kind of images, or for what lies in a folder.

    Args:
        kind: one of `KINDS`; by default what lies in the folder, and the digits where nothing does.
        place: the images, as for `recipe_for`; by default the folder itself, or the only source in it.
        data: the folder.
        size: side of the images in pixels; by default it is chosen from theirs.

    Raises:
        BadInput: no images are there, or those of this kind have one size.
    """
    begun = _start(kind, place, data, size)
    if size is not None and begun.shape[1:] != (size, size):
        raise BadInput(f"--size: these images are taken at {begun.shape[1]} × {begun.shape[2]} pixels; leave it out")
    return begun


def _start(kind: str | None, place: str | None, data: Path, size: int | None) -> Start:
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
    return _imagenet(place) if whole and kind is None and size is None else _images(found, size)


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
    values = asdict(begun) | {
        "load": _flow(begun.load),
        "doubled": begun.few and begun.shape[0] == 3,
        "split": "test" if begun.tested else "train",
        "standard": _standard(begun),
        "normalised": _standard(begun, NORMALISED[begun.shape[0]]),
        "learner_arch": _flow(begun.learner_arch),
        "notes": textwrap.wrap(begun.notes, 100),
    }
    template = Template(TEMPLATE.read_text(encoding="utf-8"), trim_blocks=True, keep_trailing_newline=True)
    return str(template.render(values, name=name, schema=SCHEMA, where=where))


def _standard(begun: Start, normalised: Recipe | None = None) -> str:
    """The source model, as YAML; a checkpoint with the means and deviations of its training, if given."""
    if begun.weights is None:
        return f"{{train: {{on: clean, arch: {_flow(begun.arch)}, {begun.source}}}}}"
    shape = {} if begun.shape == (3, LARGE, LARGE) else {"shape": begun.shape}
    return _flow({"pretrained": {"arch": begun.arch, "weights": begun.weights, **shape, **(normalised or {})}})


def _flow(value: Any) -> str:
    """A value as YAML in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(inner)}" for key, inner in value.items()) + "}"
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z./][\w./-]*(:[A-Za-z_][\w.]*)?", value)
    return value if plain and not _reserved(value) else json.dumps(value, ensure_ascii=False)


def _reserved(text: str) -> bool:
    return text.lower() in ("true", "false", "null", "~")
