"""The running mean of a network's weights over the steps of a training, which is the model in their place."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from stages.model import Classifier


class Average:
    """An exponential moving average of weights and of batch norm's statistics (Polyak averaging).

    Early on it forgets faster, else it would be made of the random weights that a short training began with: of `t`
    steps it keeps (1 + t) / (10 + t), up to `decay` (as TensorFlow's).
    """

    def __init__(self, model: Classifier, decay: float) -> None:
        self.model, self.decay = copy.deepcopy(model).requires_grad_(False), decay

    @torch.no_grad()
    def take(self, model: Classifier, steps: int) -> None:
        """Move toward a model that has made so many steps."""
        decay = min(self.decay, (1 + steps) / (10 + steps))
        for mine, new in self._pairs(model):
            if mine.is_floating_point():
                mine.lerp_(new, 1 - decay)
            else:  # how many batches batch norm has seen
                mine.copy_(new)

    def _pairs(self, model: Classifier) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.model.network.state_dict().values(), model.network.state_dict().values(), strict=True)
