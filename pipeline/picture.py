"""One picture, perturbed toward a class: before, the change, after, and the model's answers to both."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from pipeline.report.scores import norm_name
from pipeline.run import artifacts
from pipeline.run.jobs import Context, open_model
from pipeline.terminal import visible
from stages.errors import BadData, BadInput, did_you_mean, nearest, some
from stages.images import decode, read_file
from stages.recipes import Attack, Pretrained, is_own

if TYPE_CHECKING:
    from stages.model import Classifier

TOP = 3
"""Most probable classes that are shown."""


@dataclass(frozen=True)
class Picture:
    """A picture before and after an attack.

    Attributes:
        before, after: uint8, H × W × C.
        classes: names.
        target: the class it was perturbed toward.
        confidence: of the model in each class, before and after: 2 × classes.
        l2, linf: norms of the perturbation, in pixel units of [0, 1].
        how: the attack, in a few words.
    """

    before: np.ndarray
    after: np.ndarray
    classes: Sequence[str]
    target: int
    confidence: np.ndarray
    l2: float
    linf: float
    how: str

    def top(self, which: int) -> list[tuple[str, float]]:
        """The most probable classes before (0) or after (1), with the confidence in each."""
        order = np.argsort(-self.confidence[which], kind="stable")[:TOP]
        return [(self.classes[i], float(self.confidence[which][i])) for i in order]

    def as_json(self) -> dict[str, Any]:
        """Everything except the pixels."""
        confidence = dict(zip(("before", "after"), self.confidence[:, self.target].tolist(), strict=True))
        target = {"name": self.classes[self.target], "number": self.target, **confidence}
        top = {when: dict(self.top(i)) for i, when in enumerate(("before", "after"))}
        success = bool(self.confidence[1].argmax() == self.target)
        return {"target": target, "success": success, **top, "l2": self.l2, "linf": self.linf, "how": self.how}


def find_model(place: Context, name: str, arch: str | None = None) -> tuple["Classifier", list[str]]:
    """A model by name, ready for use, and the names of its classes.

    Args:
        place: the store that is searched first, and the folder of the user's modules.
        name: a model of the store (`standard`, `models/standard` or `models/standard/<version>`), or a torchvision
            classifier, whose default weights are then fetched.
        arch: the network of a model of the store, if it is the user's own code.

    Raises:
        BadInput: there is no such model.
    """
    from torchvision import models

    from stages import model
    from stages.pretrained import checkpoint

    name = name.removeprefix("models/")
    if found := artifacts.by_name(place.store, name, ("models",)):
        manifest = found[-1].manifest
        _refuse_code(name, str(manifest["design"]["arch"]), arch)
        return open_model(place, found[-1]), _class_names(place, manifest)
    if name not in models.list_models(module=models):
        known = place.store.folders("models")
        store = f"the store {place.store.url} (it has {', '.join(known) or 'none'})"
        near = did_you_mean(name, [*known, *models.list_models(module=models)])
        raise BadInput(f"--model {name}: neither {store} nor torchvision has such a model{near}")
    weights = models.get_model_weights(name).DEFAULT
    try:
        design, content = checkpoint.import_pretrained(
            Pretrained(arch=name, weights=weights.name), place.data, place.here
        )
    except BadInput as error:
        raise BadInput(f"--model {name}: {error}") from error
    return model.load(design, content, place.here), list(weights.meta["categories"])


def _refuse_code(name: str, asked: str, given: str | None) -> None:
    """Refuse to run code that only a store names: the user has to name it.

    Raises:
        BadInput: the model's network is the user's code, and the user named none, or other code.
    """
    if given not in (asked, None):
        raise BadInput(f"--arch {given}: the network of {name} is {asked}")
    if given is None and is_own(asked):
        raise BadInput(
            f"--model {name}: its network is custom code, {asked}, which is not run only because a store names it; if "
            f"you trust it, add --arch {asked}"
        )


def _class_names(place: Context, manifest: dict[str, Any]) -> list[str]:
    """The class names of its training set; ImageNet's for a network of a thousand classes; else numbers."""
    from torchvision.models._meta import _IMAGENET_CATEGORIES as IMAGENET

    on, design = manifest["parents"].get("on"), manifest["design"]
    dataset = on and artifacts.manifest_at(place.store, f"{on['node']}/{on['version']}")
    if dataset:
        return list(dataset["classes"])
    if design["classes"] == len(IMAGENET):
        return list(IMAGENET)
    outputs = design.get("outputs") or range(design["classes"])
    return [IMAGENET[i] if design.get("outputs") and max(outputs) < len(IMAGENET) else str(i) for i in outputs]


def class_number(name: str, classes: Sequence[str]) -> int:
    """A class by its name or number.

    Raises:
        BadInput: there is no such class; the message suggests the nearest names.
    """
    lower = [c.lower() for c in classes]
    if name.lower() in lower:
        return lower.index(name.lower())
    if name.isdecimal() and int(name) < len(classes):
        return int(name)
    part = [c for c in classes if name.lower() in c.lower()]
    near = part or [classes[lower.index(c)] for c in nearest(name.lower(), lower, 3)]
    hint = f"did you mean {' or '.join(map(repr, near[:3]))}?" if near else f"they are {some(classes)}"
    raise BadInput(f"--to {name}: is not one of the model's {len(classes)} classes; {hint}")


def read(path: Path, shape: Sequence[int]) -> np.ndarray:
    """A picture in the size that a model takes: its shorter side resized, then the centre cropped; uint8, H × W × C.

    Raises:
        BadInput: it cannot be read.
    """
    channels, height, width = shape
    try:
        pixels = decode(read_file(path), channels, resize=max(height, width), crop=max(height, width))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from error
    except BadData as error:
        raise BadInput(f"{path}: {error}") from error
    down, right = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[down : down + height, right : right + width]


def radius(shape: Sequence[int]) -> float:
    """A default L2 radius in pixel units of [0, 1]: the paper's 0.5 at 32 pixels, scaled with the side."""
    return 0.5 * max(1.0, max(shape[1:]) / 32)


def move(
    pixels: np.ndarray, model: "Classifier", classes: Sequence[str], target: int, recipe: dict[str, Any]
) -> Picture:
    """Perturb a picture toward a class, by the same attack that makes datasets.

    Args:
        pixels: uint8, H × W × C.
        model: the attacked model.
        classes: names of its classes.
        target: the class.
        recipe: keys of `Attack`; method pgd or spatial.

    Raises:
        BadInput: the recipe is invalid.
    """
    import torch

    from stages.device import computing
    from stages.model import logits_of
    from stages.refused import explained
    from stages.tensors import distances

    try:
        asked = Attack(images="", model="", batch_size=1, **recipe)
    except ValidationError as error:
        first = error.errors()[0]
        place = f"--{first['loc'][0]}: must be " if first["loc"] else ""
        raise BadInput(place + re.sub(r"^(Value error, |\w+ should be )", "", first["msg"])) from error
    if why := asked.misfit(model.design.shape, 1):
        raise BadInput(why)
    with computing(asked), explained(asked, model):
        after, how = (_turn if asked.method == "spatial" else _push)(pixels, model, target, asked)
        logits = torch.from_numpy(logits_of(model, np.stack([pixels, after]), 1)).double()
    moved = {name: float(value[0]) for name, value in distances(pixels[None], after[None]).items()}
    return Picture(pixels, after, classes, target, logits.softmax(1).numpy(), how=how, **moved)


def _push(pixels: np.ndarray, model: "Classifier", target: int, asked: Attack) -> tuple[np.ndarray, str]:
    """The picture after PGD, and the attack in words."""
    from stages.inference import optimized
    from stages.targeted_pgd import TargetedPGD

    goal = np.array([target])
    after, _ = TargetedPGD(asked, optimized(model, asked))(pixels[None], goal, goal)
    return after[0], f"{asked.steps} steps of PGD, {norm_name(asked.norm)} ε {asked.eps:g}"


def _turn(pixels: np.ndarray, model: "Classifier", target: int, asked: Attack) -> tuple[np.ndarray, str]:
    """The picture under the rotation and shift that bring it nearest to the class, and these in words."""
    import torch

    from stages.spatial import search
    from stages.targeted_pgd import targeted
    from stages.tensors import to_pixels, to_unit

    space, where = asked.spatial, model.mean.device
    zero = np.zeros(1, dtype=np.int64)
    goal = targeted(model, torch.tensor([target], device=where))
    worst = search(space, to_unit(pixels[None], where), zero, goal)
    degrees, down, right = worst.transformation[0].tolist()
    how = f"rotated by {degrees:+.0f}°, shifted by {100 * down:+.0f} % down and {100 * right:+.0f} % right"
    return to_pixels(worst.image)[0], f"{how}, the best of {space.candidates}"


def draw(picture: Picture) -> bytes:
    """Before, change and after, as a PNG. The change is magnified until its largest value spans the range."""
    from pipeline.report import charts  # imported here: it takes a second to load

    change = picture.after.astype(np.float64) - picture.before.astype(np.float64)
    times = 127.5 / max(1.0, float(np.abs(change).max()))
    shown = np.clip(127.5 + change * times, 0, 255).astype(np.uint8)
    toward = f"toward {visible(picture.classes[picture.target])}"
    captions = [
        ("before", _lines(picture.top(0))),
        (
            f"change × {times:.0f}" if times >= 1.5 else "change",
            f"{toward}\nL2 {picture.l2:.2f}, L∞ {picture.linf:.3f}",
        ),
        ("after", _lines(picture.top(1))),
    ]
    with charts.plain_text({}):
        return _drawn(picture, shown, captions)


def _drawn(picture: Picture, shown: np.ndarray, captions: Sequence[tuple[str, str]]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    for axes, image, (title, caption) in zip(
        figure.subplots(1, 3), (picture.before, shown, picture.after), captions, strict=True
    ):
        axes.imshow(image if image.shape[2] == 3 else image[:, :, 0], cmap="gray", vmin=0, vmax=255)
        axes.set_title(title)
        axes.set_xlabel(caption, fontsize=11)
        axes.set_xticks([])
        axes.set_yticks([])
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def _lines(top: Sequence[tuple[str, float]]) -> str:
    return "\n".join(f"{visible(name)}  {100 * share:.1f} %" for name, share in top)
