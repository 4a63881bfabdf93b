"""Find, for every image of a shard, another that a model represents alike (Ilyas et al. 2019, appendix C)."""

from dataclasses import replace

import numpy as np
import torch

from stages.attack import distances
from stages.errors import BadData
from stages.features import Penultimate
from stages.model import Classifier, in_batches, threads, to_pixels, to_unit
from stages.pgd import pgd
from stages.recipes import Invert
from stages.seeds import generator
from stages.shard import Shard


class Inverter:
    """One inversion of any number of shards: z = argmin over [0, 1] of ‖g(z) − g(x)‖₂, g the features of a model.

    Raises:
        BadInput: the model has no such features.
    """

    def __init__(self, recipe: Invert, model: Classifier) -> None:
        self.recipe, self.where = recipe, model.mean.device
        self.features = Penultimate(model.using(recipe.precision), recipe.layer)
        self.plain = Penultimate(model.using("float32"), recipe.layer)

    def __call__(self, shard: Shard) -> Shard:
        """The shard with z in the place of x under the labels of x, and how far apart their features are.

        Raises:
            BadData: an image that is alone in its shard has no other to start at.
        """
        clean, size = shard.images(), self.recipe.batch_size
        with threads(1):
            found = in_batches(self._search, size, clean, starts(self.recipe, shard))
            effect = {**distances(clean, found), "distance": in_batches(self._distance, size, clean, found)}
        return replace(shard, pixels=found, files=None, suffix="png", attack=effect, failures=[])

    def _search(self, pixels_NHWC: np.ndarray, start_NHWC: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            wanted = self.features(to_unit(pixels_NHWC, self.where))
        start = torch.from_numpy(start_NHWC).to(self.where).permute(0, 3, 1, 2).contiguous()
        # Squared, the distance has the same normalised gradient, and one that is defined at zero.
        found = pgd(
            lambda z: (self.features(z) - wanted).square().sum(1),
            start,
            norm="l2",
            eps=None,
            step_size=self.recipe.step_size,
            steps=self.recipe.steps,
        )
        return to_pixels(found)

    @torch.no_grad()
    def _distance(self, *pixels_NHWC: np.ndarray) -> np.ndarray:
        wanted, found = (self.plain(to_unit(pixels, self.where)) for pixels in pixels_NHWC)
        return np.asarray(torch.linalg.vector_norm(found - wanted, dim=1).cpu())


def starts(recipe: Invert, shard: Shard) -> np.ndarray:
    """Where the search for each image starts: N × H × W × C, float32, in [0, 1].

    `noise` is drawn per image from (seed, index). `other` is a derangement of the shard, one cycle through all of it
    (Sattolo 1986), drawn from (seed, its smallest index).

    Raises:
        BadData: start `other` in a shard of one image.
    """
    clean = shard.images()
    if recipe.start == "noise":
        draws = [generator(recipe.seed, "noise start", int(i)) for i in shard.index]
        return np.stack([draw.random(clean.shape[1:], dtype=np.float32) for draw in draws])
    if len(shard) < 2:
        raise BadData(f"{shard.name} has one image, which has no other to start at: load with a larger shard_size")
    draw = generator(recipe.seed, "other start", int(shard.index.min()))
    order = np.arange(len(shard))
    for last in range(len(order) - 1, 0, -1):
        other = draw.integers(last)
        order[last], order[other] = order[other], order[last]
    return clean[order].astype(np.float32) / 255
