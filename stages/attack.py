"""Attack the images of a shard, round them to 8 bits, and measure the saved images."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from stages.device import computing
from stages.errors import BadData, BadInput
from stages.inference import optimized
from stages.model import Classifier, logits_of
from stages.noise import noise
from stages.pgd import pgd, quantize
from stages.recipes import Attack, Relabel
from stages.refused import explained
from stages.relabel import targets
from stages.shard import Shard
from stages.spatial import search
from stages.targeted_pgd import TargetedPGD, margins, targeted
from stages.tensors import batches, distances, in_batches, to_pixels, to_unit


class Attacker:
    """One attack, set up once for any number of shards.

    Args:
        recipe, rule: the attack and the rule for its target classes.
        classes: class names.
        model: source model; None if the method needs none.
        spared: for pgd: models that should keep predicting the true class.
        fit: for universal: shards to fit the perturbations on; done on construction.

    Raises:
        BadInput: the attack or the rule needs a model.
    """

    def __init__(
        self,
        recipe: Attack,
        rule: Relabel,
        classes: Sequence[str],
        model: Classifier | None,
        spared: Sequence[Classifier] = (),
        fit: Sequence[Shard] = (),
    ) -> None:
        if rule.rule == "least_likely" and model is None:
            raise BadInput("relabel least_likely needs the attack to name a model")
        self.recipe, self.rule, self.classes, self.model = recipe, rule, classes, model
        self._models = [one for one in (model, *spared) if one is not None]
        with computing(recipe), explained(recipe, *self._models):
            self.spared = [optimized(other, recipe) for other in spared]
            if recipe.method == "universal":
                self.universal, self.found = self._universal(fit)

    def __call__(self, shard: Shard) -> Shard:
        """The shard with its images perturbed and its labels replaced by the target classes."""
        with computing(self.recipe), explained(self.recipe, *self._models):
            clean = shard.images()
            wanted = self._targets(shard)
            moved, said = self._move(shard, clean, wanted)
            effect = self._measure(clean, moved, wanted) | said
            if "success_step" in effect:  # the saved image counts as the last iterate
                late = (effect["success_step"] < 0) & effect["success"]
                effect["success_step"] = np.where(late, self.recipe.steps, effect["success_step"])
        return shard.changed(moved, effect, label=wanted)

    @cached_property
    def targeted_pgd(self) -> TargetedPGD:
        """The attack of method `pgd`."""
        return TargetedPGD(self.recipe, self.attacked, self.spared)

    @property
    def attacked(self) -> Classifier:
        """The source model, optimised."""
        assert self.model is not None
        return optimized(self.model, self.recipe)

    def _targets(self, shard: Shard) -> np.ndarray:
        logits = self._logits(shard.images()) if self.rule.rule == "least_likely" else None
        return targets(self.rule, shard.source_label, shard.index, self.classes, logits)

    def _move(self, shard: Shard, clean: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The perturbed images, and columns that the attack itself reports."""
        match self.recipe.method:
            case "none":
                return clean, {}
            case "noise":
                return self._noise(clean, shard.index), {}
            case "leakage":
                return self._leakage(shard, clean, wanted), {}
            case "pgd":
                moved, success_step = self.targeted_pgd(clean, wanted, shard.source_label)
                return moved, {"success_step": success_step}
            case "universal":
                self._refuse_not_found(wanted)
                return in_batches(self._shift, self.recipe.batch_size, clean, wanted), {}
            case "spatial":
                return in_batches(self._spatial, self.recipe.batch_size, clean, wanted, shard.index), {}

    def _noise(self, clean: np.ndarray, index: np.ndarray) -> np.ndarray:
        ball = self.recipe
        return in_batches(lambda *batch: noise(batch[0], ball, ball.seed, batch[1]), ball.batch_size, clean, index)

    def _leakage(self, shard: Shard, clean: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Noise unless the target is the true class or the reference's prediction: what the labels alone leak."""
        answer = shard.source_label if self.model is None else self._logits(clean).argmax(1)
        alone = (wanted == shard.source_label) | (wanted == answer)
        moved = self._noise(clean, shard.index)
        return np.where(alone[:, None, None, None], clean, moved)

    def _spatial(self, pixels: np.ndarray, wanted: np.ndarray, index: np.ndarray) -> np.ndarray:
        where = self.attacked.mean.device
        goal = targeted(self.attacked, torch.from_numpy(wanted).to(where))
        return to_pixels(search(self.recipe.spatial, to_unit(pixels, where), index, goal).image)

    def _shift(self, pixels: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        moved = (to_unit(pixels) + self.universal[torch.from_numpy(wanted)]).clamp(0, 1)
        return quantize(moved, pixels, self.recipe.norm, self.recipe.eps)

    def _refuse_not_found(self, wanted: np.ndarray) -> None:
        """Refuse targets without an image in the fitted shards: their perturbation would be zero."""
        missing = [self.classes[k] for k in np.unique(wanted) if k not in self.found]
        if missing:
            raise BadInput(
                f"universal: no image of the first {self.recipe.fit_shards} shards is moved toward "
                f"{', '.join(missing[:5])}{', …' * (len(missing) > 5)}: raise fit_shards"
            )

    def _universal(self, fit: Sequence[Shard]) -> tuple[Tensor, frozenset[int]]:
        """Fit one perturbation per target class on the images of some shards.

        Returns:
            The perturbations, classes × C × H × W, and the target classes that occurred.
        """
        pixels = np.concatenate([shard.images() for shard in fit])
        wanted = np.concatenate([self._targets(shard) for shard in fit])
        where = self.attacked.mean.device

        def gradient(delta: Tensor) -> Tensor:
            total = torch.zeros_like(delta)
            for count, (some, classes) in batches(self.recipe.batch_size, pixels, wanted):
                leaf, target = delta.detach().requires_grad_(True), torch.from_numpy(classes).to(where)
                loss = targeted(self.attacked, target)((to_unit(some, where) + leaf[target]).clamp(0, 1))
                total += torch.autograd.grad(loss[:count].sum(), leaf)[0]
            return total

        ball, start = self.recipe, torch.zeros(len(self.classes), *to_unit(pixels[:1]).shape[1:], device=where)
        # A linear function with the gradient of the summed loss replaces the loss, so that one batch is held at a time.
        found = pgd(
            lambda delta: delta * gradient(delta),
            start,
            norm=ball.norm,
            eps=ball.eps,
            step_size=ball.step,
            steps=ball.steps,
            box=(-1.0, 1.0),
        )
        return found.cpu(), frozenset(wanted.tolist())

    def _measure(self, clean: np.ndarray, moved: np.ndarray, wanted: np.ndarray) -> dict[str, np.ndarray]:
        """Measure the saved images: distances in [0, 1] units, and the source model's predictions in float32."""
        effect = {"target": wanted, **distances(clean, moved)}
        if self.model is None:
            return effect
        logits, target = torch.from_numpy(self._logits(moved)).double(), torch.from_numpy(wanted)
        margin, confidence = margins(logits, target), logits.softmax(1).gather(1, target[:, None])[:, 0]
        effect |= {"margin": margin.float().numpy(), "success": (margin > 0).numpy()}
        effect["confidence"] = confidence.float().numpy()
        return effect

    def _logits(self, pixels: np.ndarray) -> np.ndarray:
        assert self.model is not None
        return logits_of(self.model, pixels, self.recipe.batch_size)


LEAST_MOVED = 0.5
"""Fraction of the images with a wrong target that an attack must have changed."""


def refuse_unmoved(recipe: Attack, aimed: int, moved: int) -> None:
    """Refuse a dataset whose labels changed but most of whose images did not.

    Raises:
        BadData: less than `LEAST_MOVED` of the images with another target changed, although the method perturbs all.
    """
    if recipe.method not in ("none", "leakage") and moved < LEAST_MOVED * aimed:
        raise BadData(
            f"only {moved:,} of the {aimed:,} images to be moved have changed by a level of 8 bits: under new labels, "
            "they would be the control; raise eps, steps or step_size, or see whether the model has gradients"
        )
