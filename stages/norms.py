"""The norms of perturbations, one class each: steepest step, projection, rounding in the ball, uniform samples.

To add a norm, add its name to `recipes.Norm` and its class to `NORMS`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from stages.recipes import Norm

GUARD = 1e-30  # smaller than any norm that float32 can divide by


class Geometry(Protocol):
    """The geometry of the balls of one norm, around each of N samples."""

    def direction(self, grad_NCHW: Tensor) -> Tensor:
        """The steepest step of norm 1 per sample; a zero gradient stays zero."""

    def project(self, delta_NCHW: Tensor, eps: float) -> Tensor:
        """The nearest perturbation in the ball of radius `eps`."""

    def pull_in(self, rounded_ND: Tensor, exact_ND: Tensor, radius: float) -> Tensor:
        """Move rounded perturbations back into the ball, in as few whole levels as necessary.

        Args:
            rounded_ND: int64, in 8-bit levels.
            exact_ND: float64, the perturbations before rounding.
            radius: in 8-bit levels.
        """

    def uniform(self, draws: Sequence[np.random.Generator], shape: torch.Size) -> Tensor:
        """One sample per generator, uniform in the unit ball: N × `shape`, float32, on the CPU."""


class Linf:
    """The maximum norm."""

    def direction(self, grad_NCHW: Tensor) -> Tensor:
        return grad_NCHW.sign()

    def project(self, delta_NCHW: Tensor, eps: float) -> Tensor:
        return delta_NCHW.clamp(-eps, eps)

    def pull_in(self, rounded_ND: Tensor, exact_ND: Tensor, radius: float) -> Tensor:
        limit = int(radius + 1e-6)
        return rounded_ND.clamp(-limit, limit)

    def uniform(self, draws: Sequence[np.random.Generator], shape: torch.Size) -> Tensor:
        return torch.tensor(np.stack([draw.uniform(-1, 1, shape) for draw in draws]), dtype=torch.float32)


class L2:
    """The Euclidean norm."""

    def direction(self, grad_NCHW: Tensor) -> Tensor:
        # Divided by its largest entry first: the squares of a confident sample's tiny gradient would underflow.
        grad = grad_NCHW.float()
        grad = grad / torch.linalg.vector_norm(grad, torch.inf, (1, 2, 3), keepdim=True).clamp_min(GUARD)
        unit: Tensor = grad / _length(grad).clamp_min(GUARD)
        return unit

    def project(self, delta_NCHW: Tensor, eps: float) -> Tensor:
        scale: Tensor = eps / _length(delta_NCHW).clamp_min(GUARD)
        return delta_NCHW * scale.clamp_max(1.0)

    def pull_in(self, rounded_ND: Tensor, exact_ND: Tensor, radius: float) -> Tensor:
        budget = radius**2 + 1e-6
        while bool(((rounded_ND**2).sum(1) > budget).any()):  # one round in practice, two if float32 overshot
            rounded_ND = _shorten(rounded_ND, exact_ND, budget)
        return rounded_ND

    def uniform(self, draws: Sequence[np.random.Generator], shape: torch.Size) -> Tensor:
        gauss = torch.tensor(np.stack([draw.standard_normal(shape) for draw in draws]), dtype=torch.float32)
        # The volume of a ball grows with its radius to the power of the dimension.
        radius = torch.tensor([draw.uniform() ** (1 / shape.numel()) for draw in draws], dtype=torch.float32)
        return self.direction(gauss) * radius.view(-1, 1, 1, 1)


NORMS: Mapping[Norm, Geometry] = {"l2": L2(), "linf": Linf()}


def _length(x_NCHW: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(x_NCHW, dim=(1, 2, 3), keepdim=True)
    return lengths


def _shorten(rounded_ND: Tensor, exact_ND: Tensor, budget: float) -> Tensor:
    """Take one level off the fewest entries that reduce each row's squared sum to the budget."""
    excess = ((rounded_ND**2).sum(1, keepdim=True) - budget).clamp_min(0)
    size = rounded_ND.shape[1]
    # Distinct integers: how far rounding moved an entry outward; ties go to the first.
    outward = ((rounded_ND.abs() - exact_ND.abs()) * 2**38).round().to(torch.int64)
    rank = outward * size - torch.arange(size, device=rounded_ND.device)
    rank = torch.where(rounded_ND == 0, -(2**62), rank)
    enough = min(size, math.ceil(excess.max().item()))  # each reduces the sum by at least one
    order = rank.topk(enough, dim=1).indices
    saved = (2 * rounded_ND.abs() - 1).clamp_min(0).gather(1, order).cumsum(1)
    before = torch.cat([torch.zeros_like(saved[:, :1]), saved[:, :-1]], dim=1)
    taken = torch.zeros_like(rounded_ND).scatter(1, order, (before < excess).to(torch.int64))
    return rounded_ND - rounded_ND.sign() * taken
