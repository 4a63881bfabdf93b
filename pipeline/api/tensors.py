"""Attack and inversion of image tensors, for any network."""

import copy
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from stages.design import Design
from stages.device import computing
from stages.errors import BadInput
from stages.inference import optimized
from stages.invert import Inverter
from stages.model import Classifier, on_device
from stages.recipes import Attack, Compute, Invert
from stages.refused import explained
from stages.shard import Shard, shard_name
from stages.targeted_pgd import TargetedPGD
from stages.tensors import to_pixels, to_unit

R = TypeVar("R", bound=Compute)

BATCH = 128
"""Default batch size, reduced to the number of images."""


def attack(model: nn.Module, images: Tensor, targets: Tensor, **recipe: Any) -> Tensor:
    """Perturb images toward target classes by targeted PGD, as for datasets.

    The images are rounded to 8 bits, perturbed within the ball around the rounded images, and rounded to 8 bits again
    inside the ball.

    Args:
        model: maps images in [0, 1], N × C × H × W, to logits, N × classes. A copy of it is used in evaluation mode.
        images: N × C × H × W, in [0, 1], grey or RGB.
        targets: N, int64.
        recipe: keys of `attack` in an experiment file, such as ``norm``, ``eps``, ``step_size``, ``steps``,
            ``batch_size`` and ``precision``; docs/experiment-file.md lists all of them with their defaults.

    Returns:
        The adversarial images, N × C × H × W, float32, each value a multiple of 1/255; on the device of `images`.

    Raises:
        BadInput: a tensor has the wrong shape, type or range, or the recipe is invalid.
    """
    pixels = _pixels(images)
    asked = _recipe(Attack, images="", model="model", **{"batch_size": min(BATCH, len(pixels)), **recipe})
    if asked.method != "pgd":
        raise BadInput(f"method must be pgd, got {asked.method}")
    made = _classifier(model, pixels)
    if targets.shape != (len(pixels),) or not 0 <= int(targets.min()) <= int(targets.max()) < made.design.classes:
        raise BadInput(f"targets must be {len(pixels)} numbers below {made.design.classes}, one per image")
    wanted = targets.cpu().numpy().astype(np.int64)
    if why := asked.misfit(made.design.shape, max(len(pixels), asked.batch_size)):
        raise BadInput(why)
    with computing(asked), explained(asked, made):
        found, _ = TargetedPGD(asked, optimized(made, asked))(pixels, wanted, wanted)
    return to_unit(found).to(images.device)


def invert(model: nn.Module, images: Tensor, **recipe: Any) -> Tensor:
    """Find, for each image, another with similar features in a network (Ilyas et al. 2019, appendix C).

    Args:
        model, images: as in `attack`.
        recipe: keys of `invert` in an experiment file, such as ``layer``, ``start``, ``steps`` and ``step_size``.

    Returns:
        The images found, N × C × H × W, float32, each value a multiple of 1/255; on the device of `images`.

    Raises:
        BadInput: a tensor has the wrong shape, type or range, the recipe is invalid, or the network lacks the layer.
    """
    pixels = _pixels(images)
    asked = _recipe(Invert, images="", model="model", **{"batch_size": min(BATCH, len(pixels)), **recipe})
    none = np.zeros(len(pixels), np.int64)
    shard = Shard(shard_name("train", 0), np.arange(len(pixels)), none, none, pixels)
    return to_unit(Inverter(asked, _classifier(model, pixels))(shard).images()).to(images.device)


def _pixels(images_NCHW: Tensor) -> np.ndarray:
    shape = tuple(images_NCHW.shape)
    if len(shape) != 4 or shape[1] not in (1, 3) or not len(images_NCHW):
        raise BadInput(f"images must be N × C × H × W with one channel or three, got {shape}")
    low, high = float(images_NCHW.min()), float(images_NCHW.max())
    if not (images_NCHW.is_floating_point() and low >= 0 and high <= 1):
        raise BadInput(f"images must be floats in [0, 1], got {images_NCHW.dtype} from {low:g} to {high:g}")
    return to_pixels(images_NCHW.detach())


def _recipe(kind: type[R], **keys: Any) -> R:
    try:
        return kind(**keys)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise BadInput(f"{place}: {first['msg']}, got {first['input']!r}" if place else first["msg"]) from error


def _classifier(model: nn.Module, pixels_NHWC: np.ndarray) -> Classifier:
    """A copy of a network on images in [0, 1], as a `Classifier`."""
    if isinstance(model, Classifier):
        return model
    height, width, channels = pixels_NHWC.shape[1:]
    network = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    with torch.no_grad():
        logits = network(to_unit(pixels_NHWC[:1]))
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1:
        raise BadInput(f"{type(model).__name__} must give logits, N × classes, for images of N × C × H × W")
    design = Design(
        type(model).__name__, logits.shape[1], (channels, height, width), (0.0,) * channels, (1.0,) * channels
    )
    return on_device(Classifier(design, Path(), network=network))
