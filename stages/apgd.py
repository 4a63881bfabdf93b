"""APGD: projected gradient ascent with an adaptive step size (Croce and Hein 2020, arXiv 2003.01690)."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.pgd import direction, project
from stages.recipes import Norm
from stages.targeted_pgd import entry

MOMENTUM = 0.75  # α in the paper: weight of the new step; the rest is momentum
RISING = 0.75  # ρ in the paper: fraction of steps that must raise the loss to keep the step size
FLOOR = 1e-12  # keeps the DLR loss finite where all logits are equal

Goal = Callable[[Tensor], Tensor]
"""Logits, N × classes → one value per image: a loss to maximise, or whether the attack succeeds."""


def apgd(
    model: Callable[[Tensor], Tensor],
    loss: Goal,
    success: Goal,
    x_NCHW: Tensor,
    *,
    norm: Norm,
    eps: float,
    steps: int,
    start: Tensor | None = None,
) -> Tensor:
    """Maximise a loss within a ball around x and the box [0, 1] (algorithm 1 of the paper).

    The step size starts at twice the radius. At each checkpoint, an image's step size is halved and its search restarts
    from its best point if too few steps raised the loss, or if neither its step size nor its best loss has changed
    since the last checkpoint. Kept in one function, in the order of the paper's algorithm.

    Args:
        model: x → logits; samples must not depend on each other.
        loss: logits → N; maximised.
        success: logits → N, bool; whether the attack succeeds at an iterate.
        x_NCHW: float32, in [0, 1]; the centre of the ball.
        norm, eps: the ball, in pixel units.
        steps: number of steps, of one forward and one backward pass each, plus one pass of each before them.
        start: first iterate. Default: x.

    Returns:
        float32, N × C × H × W: for each image its last successful iterate, else the one with the highest loss.
    """

    def look(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x.detach().requires_grad_(True)
        logits = model(x)
        values = loss(logits)
        (grad,) = torch.autograd.grad(values.sum(), x)
        return values.detach(), grad, success(logits.detach())

    def inside(x: Tensor) -> Tensor:
        return (x_NCHW + project(x - x_NCHW, norm, eps)).clamp(0, 1)

    x = before = best = found = x_NCHW if start is None else start
    value, grad, hit = look(x)
    best_value, best_grad, has = value, grad, hit
    step = torch.full_like(value, 2 * eps)
    ends, last = checkpoints(steps), 0
    risen, halved, best_then = torch.zeros_like(value), torch.zeros_like(hit), value
    for k in range(steps):
        towards = inside(x + _wide(step) * direction(grad, norm))
        share = MOMENTUM if k else 1.0
        x, before = inside(x + share * (towards - x) + (1 - share) * (x - before)), x
        value, grad, hit, old = *look(x), value
        found, has = torch.where(_wide(hit), x, found), has | hit
        risen = risen + (value > old)
        better = value > best_value
        best, best_grad = torch.where(_wide(better), x, best), torch.where(_wide(better), grad, best_grad)
        best_value = torch.where(better, value, best_value)
        if k + 1 in ends:
            stuck = (risen < RISING * (k + 1 - last)) | (~halved & (best_value == best_then))
            step = torch.where(stuck, step / 2, step)
            x, grad = torch.where(_wide(stuck), best, x), torch.where(_wide(stuck), best_grad, grad)
            value = torch.where(stuck, best_value, value)
            last, risen, halved, best_then = k + 1, torch.zeros_like(risen), stuck, best_value
    return torch.where(_wide(has), found, best)


def _wide(per_image_N: Tensor) -> Tensor:
    return per_image_N.view(-1, 1, 1, 1)


def checkpoints(steps: int) -> set[int]:
    """Checkpoints at which the step size may be halved: at 22 % of the steps, then at intervals that shrink to 6 %."""
    before, at, ends = 0, 22, set()
    while at <= 100:
        ends.add(math.ceil(at * steps / 100))
        before, at = at, at + max(at - before - 3, 6)
    return ends


def losses(label_N: Tensor, target_N: Tensor | None, classes: int) -> list[Goal]:
    """The losses of the two runs: cross-entropy and, with enough classes, the difference of logits ratio (DLR).

    Targeted if `target_N` is given.
    """
    if target_N is None:
        known: list[Goal] = [lambda logits: F.cross_entropy(logits, label_N, reduction="none")]
        return known + [lambda logits: dlr(logits, label_N)] * (classes >= 3)
    known = [lambda logits: -F.cross_entropy(logits, target_N, reduction="none")]
    return known + [lambda logits: dlr_toward(logits, label_N, target_N)] * (classes >= 4)


def dlr(logits_NC: Tensor, label_N: Tensor) -> Tensor:
    """Difference of logits ratio, −(z_y − max z_i) / (z_π1 − z_π3), i ≠ y, π in descending order (equation 6): N.

    It is invariant to the scale of the logits, so that a confident network does not flatten it.
    """
    top = _top(logits_NC, 3)
    others = logits_NC.scatter(1, label_N[:, None], -torch.inf).amax(1)
    return (others - entry(logits_NC, label_N)) / (top[0] - top[2] + FLOOR)


def dlr_toward(logits_NC: Tensor, label_N: Tensor, target_N: Tensor) -> Tensor:
    """Targeted difference of logits ratio, −(z_y − z_t) / (z_π1 − (z_π3 + z_π4) / 2) (equation 7): N."""
    top = _top(logits_NC, 4)
    rise = entry(logits_NC, target_N) - entry(logits_NC, label_N)
    return rise / (top[0] - (top[2] + top[3]) / 2 + FLOOR)


def _top(logits_NC: Tensor, count: int) -> list[Tensor]:
    """The largest logits, N each. `topk` only finds their columns: its backward pass is a scatter, like `gather`'s."""
    return [entry(logits_NC, place) for place in logits_NC.detach().topk(count).indices.unbind(1)]
