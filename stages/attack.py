"""Move the images of a shard toward their target classes, round them to 8 bits, and measure what came of it."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.errors import BadData, BadInput
from stages.model import Classifier, in_batches, threads, to_unit
from stages.pgd import direction, pgd, project, to_grid
from stages.recipes import Attack, Perturbation, Relabel
from stages.relabel import targets
from stages.seeds import torch_seed
from stages.shard import Shard


def targeted(model: Callable[[Tensor], Tensor], target_N: Tensor) -> Callable[[Tensor], Tensor]:
    """Cross-entropy to a target class, per sample: what a targeted attack minimises."""
    return lambda x: F.cross_entropy(model(x), target_N, reduction="none")


def untargeted(model: Callable[[Tensor], Tensor], label_N: Tensor) -> Callable[[Tensor], Tensor]:
    """Minus the cross-entropy to the true class, per sample: what an untargeted attack minimises."""
    return lambda x: -F.cross_entropy(model(x), label_N, reduction="none")


def perturb(
    pixels_NHWC: np.ndarray,
    ball: Perturbation,
    loss: Callable[[Tensor], Tensor],
    where: torch.device | None = None,
) -> np.ndarray:
    """Minimise a loss inside a ball round some 8-bit images; the result is 8-bit and inside the ball.

    Args:
        pixels_NHWC: uint8; one batch.
        ball: norm, radius, steps and step size.
        loss: images in [0, 1], N × C × H × W → a loss per sample.
        where: the device that the loss computes on.

    Returns:
        uint8, N × H × W × C.
    """
    return _saved(_descend(pixels_NHWC, ball, loss, where), pixels_NHWC, ball)


def _descend(
    pixels_NHWC: np.ndarray, ball: Perturbation, loss: Callable[[Tensor], Tensor], where: torch.device | None
) -> Tensor:
    clean = to_unit(pixels_NHWC, where)
    return pgd(loss, clean, norm=ball.norm, eps=ball.eps, step_size=ball.step, steps=ball.steps)


def noise(pixels_NHWC: np.ndarray, ball: Perturbation, seed: int, index: np.ndarray) -> np.ndarray:
    """A random perturbation on the surface of the ball, drawn per image from (seed, index): an attack's control."""
    clean = to_unit(pixels_NHWC)
    draws = [torch.Generator().manual_seed(torch_seed(seed, "noise", int(i))) for i in index]
    gauss = torch.stack([torch.randn(clean.shape[1:], generator=draw) for draw in draws])
    moved = clean + project(direction(gauss, ball.norm) * ball.eps, ball.norm, ball.eps)
    return _saved(moved.clamp(0, 1), pixels_NHWC, ball)


def _saved(moved_NCHW: Tensor, pixels_NHWC: np.ndarray, ball: Perturbation) -> np.ndarray:
    clean = torch.from_numpy(np.ascontiguousarray(pixels_NHWC)).permute(0, 3, 1, 2)
    saved = to_grid(moved_NCHW.cpu(), clean, ball.norm, ball.eps)
    return saved.permute(0, 2, 3, 1).contiguous().numpy()


class Attacker:
    """One attack on any number of shards: the model is loaded once, the shards come one by one."""

    def __init__(self, recipe: Attack, rule: Relabel, classes: Sequence[str], model: Classifier | None) -> None:
        if rule.rule == "least_likely" and model is None:
            raise BadInput("relabel least_likely needs the attack to name a model")
        self.recipe, self.rule, self.classes, self.model = recipe, rule, classes, model

    def __call__(self, shard: Shard) -> Shard:
        """The shard with its images perturbed and its labels replaced by the targets."""
        with threads(1):
            clean = shard.images()
            wanted = self._targets(shard, clean)
            moved = self._move(shard, clean, wanted)
            effect = self._measure(clean, moved, wanted)
        return replace(shard, label=wanted, pixels=moved, files=None, suffix="png", attack=effect, failures=[])

    def _targets(self, shard: Shard, clean: np.ndarray) -> np.ndarray:
        logits = self._logits(clean) if self.rule.rule == "least_likely" else None
        return targets(self.rule, shard.source_label, shard.index, self.classes, logits)

    def _move(self, shard: Shard, clean: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        match self.recipe.method:
            case "none":
                return clean
            case "noise":
                return noise(clean, self.recipe, self.recipe.seed, shard.index)
            case "pgd":
                assert self.model is not None
                return attack_batches(self.model, self.recipe, targeted, clean, wanted)

    def _measure(self, clean: np.ndarray, moved: np.ndarray, wanted: np.ndarray) -> dict[str, np.ndarray]:
        """What the saved images are: distances in [0, 1] units, and what the model says of them in float32."""
        levels = (moved.astype(np.int64) - clean.astype(np.int64)).reshape(len(clean), -1)
        effect = {
            "target": wanted,
            "l2": np.sqrt((levels**2).sum(1)) / 255,
            "linf": np.abs(levels).max(1, initial=0) / 255,
        }
        if self.model is None:
            return effect
        logits = self._logits(moved).astype(np.float64)
        rows = np.arange(len(wanted))
        toward = logits[rows, wanted]
        shifted = np.exp(logits - logits.max(1, keepdims=True))
        others = logits.copy()
        others[rows, wanted] = -np.inf
        effect["margin"] = (toward - others.max(1)).astype(np.float32)
        effect["reached"] = effect["margin"] > 0
        effect["confidence"] = (shifted[rows, wanted] / shifted.sum(1)).astype(np.float32)
        return effect

    def _logits(self, pixels: np.ndarray) -> np.ndarray:
        assert self.model is not None
        return logits_of(self.model, pixels, self.recipe.batch_size)


def attack_batches(
    model: Classifier,
    ball: Perturbation,
    goal: Callable[[Callable[[Tensor], Tensor], Tensor], Callable[[Tensor], Tensor]],
    pixels_NHWC: np.ndarray,
    class_N: np.ndarray,
) -> np.ndarray:
    """Attack any number of images in batches of one fixed shape.

    Args:
        model: the model attacked.
        ball: radius, steps, precision and batch size.
        goal: `targeted` or `untargeted`.
        pixels_NHWC: uint8.
        class_N: the target classes, or the true ones.

    Returns:
        uint8, N × H × W × C.
    """
    attacked = model.using(ball.precision)
    where = attacked.mean.device

    def one(pixels: np.ndarray, classes: np.ndarray) -> np.ndarray:
        return perturb(pixels, ball, goal(attacked, torch.from_numpy(classes).to(where)), where)

    return in_batches(one, ball.batch_size, pixels_NHWC, class_N)


def logits_under_attack(
    model: Classifier, ball: Perturbation, pixels_NHWC: np.ndarray, label_N: np.ndarray
) -> np.ndarray:
    """What a model says, in float32, of images attacked away from their classes: N × classes.

    The last iterate is scored as it is: rounding to 8 bits is for what is saved, and would take most of a
    small ball's strength from the attack.
    """
    attacked, plain = model.using(ball.precision), model.using("float32")
    where = attacked.mean.device

    def one(pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
        moved = _descend(pixels, ball, untargeted(attacked, torch.from_numpy(labels).to(where)), where)
        with torch.no_grad():
            return np.asarray(plain(moved).cpu())

    return in_batches(one, ball.batch_size, pixels_NHWC, label_N)


def logits_of(model: Classifier, pixels_NHWC: np.ndarray, batch_size: int) -> np.ndarray:
    """What a model says of some images, in float32: N × classes.

    Raises:
        BadData: an answer is not a number.
    """
    plain = model.using("float32")

    def answer(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(plain(to_unit(x, plain.mean.device)).cpu())

    logits = in_batches(answer, batch_size, pixels_NHWC)
    if not np.isfinite(logits).all():
        raise BadData(f"the model ({model.design.arch}) answers some images with NaN or infinity")
    return logits
