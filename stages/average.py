"""A moving average of a network's weights over training steps, saved as the model in their place."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from stages.model import Classifier


class Average:
    """An exponential moving average of weights and of batch norm's statistics (Polyak averaging).

    The decay after t steps is min(`decay`, (1 + t) / (10 + t)), as in TensorFlow: a constant decay would retain the
    random initial weights through a short training.
    """

    def __init__(self, model: Classifier, decay: float) -> None:
        self.model, self.decay = copy.deepcopy(model).requires_grad_(False), decay

    @torch.no_grad()
    def take(self, model: Classifier, steps: int) -> None:
        """Update the average with a model after `steps` steps."""
        decay = min(self.decay, (1 + steps) / (10 + steps))
        for mine, new in self._pairs(model):
            if mine.is_floating_point():
                mine.lerp_(new, 1 - decay)
            else:  # batch norm's counter
                mine.copy_(new)

    def _pairs(self, model: Classifier) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.model.network.state_dict().values(), model.network.state_dict().values(), strict=True)
