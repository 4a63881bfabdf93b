"""Invert a model's features: find another image with the features of each image (Ilyas et al. 2019, appendix C)."""

import numpy as np
import torch
from torch import Tensor

from stages.device import computing, sent
from stages.errors import BadData
from stages.features import Penultimate
from stages.inference import optimized
from stages.model import Classifier
from stages.pgd import Descent, graphs
from stages.recipes import Invert
from stages.refused import explained
from stages.seeds import generator
from stages.shard import Shard
from stages.tensors import distances, in_batches, to_pixels, to_unit


class Inverter:
    """One inversion of any number of shards: z = argmin over [0, 1] of ‖g(z) − g(x)‖₂, g the features of a model.

    Raises:
        BadInput: the model has no such features.
    """

    def __init__(self, recipe: Invert, model: Classifier) -> None:
        self.recipe, self.model, self.where = recipe, model, model.mean.device
        with computing(recipe), explained(recipe, model):
            self.features = Penultimate(optimized(model, recipe, recipe.layer), recipe.layer)
            self.descent = Descent(
                self._loss, norm="l2", eps=None, step_size=recipe.step_size, capture=graphs(recipe, self.where)
            )
            self.plain = Penultimate(model.using("float32"), recipe.layer)

    def __call__(self, shard: Shard) -> Shard:
        """The shard with z in place of x, under the labels of x, with the distance between their features.

        Raises:
            BadData: the shard has a single image, and the search starts at another image.
        """
        clean, size = shard.images(), self.recipe.batch_size
        with computing(self.recipe), explained(self.recipe, self.model):
            others = clean[derangement(self.recipe.seed, shard)] if self.recipe.start == "other" else clean
            found = in_batches(self._search, size, clean, others, shard.index)
            effect = {**distances(clean, found), "distance": in_batches(self._distance, size, clean, found)}
        return shard.changed(found, effect)

    def _search(self, pixels_NHWC: np.ndarray, other_NHWC: np.ndarray, index_N: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            wanted = self.features(to_unit(pixels_NHWC, self.where))
        if self.recipe.start == "other":
            start = to_unit(other_NHWC, self.where)
        else:
            drawn = noise(self.recipe.seed, index_N, pixels_NHWC.shape[1:])
            start = sent(drawn, self.where).permute(0, 3, 1, 2)
        return to_pixels(self.descent(start, wanted, steps=self.recipe.steps))

    def _loss(self, z_NCHW: Tensor, wanted_ND: Tensor) -> Tensor:
        # The squared distance has the same normalised gradient, and is differentiable at zero.
        return (self.features(z_NCHW) - wanted_ND).square().sum(1)

    @torch.no_grad()
    def _distance(self, *pixels_NHWC: np.ndarray) -> np.ndarray:
        wanted, found = (self.plain(to_unit(pixels, self.where)) for pixels in pixels_NHWC)
        return np.asarray(torch.linalg.vector_norm(found - wanted, dim=1).cpu())


def noise(seed: int, index_N: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Images drawn uniformly from [0, 1], each from (seed, index): N × shape, float32."""
    draws = [generator(seed, "noise start", int(i)) for i in index_N]
    return np.stack([draw.random(shape, dtype=np.float32) for draw in draws])


def derangement(seed: int, shard: Shard) -> np.ndarray:
    """For each image of a shard the position of another: a random cycle through the shard (Sattolo 1986), N.

    Drawn from (seed, the shard's smallest index).

    Raises:
        BadData: the shard has one image.
    """
    if len(shard) < 2:
        raise BadData(f"{shard.name} has one image, which has no other to start at: load with a larger shard_size")
    draw = generator(seed, "other start", int(shard.index.min()))
    order = np.arange(len(shard))
    for last in range(len(order) - 1, 0, -1):
        other = draw.integers(last)
        order[last], order[other] = order[other], order[last]
    return order
