"""The search of a targeted attack over the images of a shard, batch by batch, each image for as long as it needs."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.device import sent
from stages.model import Classifier, to_unit
from stages.pgd import Descent, graphs, grid
from stages.recipes import Attack

EVERY = 5
"""Steps between two looks at which images are far enough."""


def targeted(model: Callable[[Tensor], Tensor], target_N: Tensor) -> Callable[[Tensor], Tensor]:
    """Cross-entropy to a target class, per sample: what a targeted attack minimises."""
    return lambda x: F.cross_entropy(model(x), target_N, reduction="none")


def untargeted(model: Callable[[Tensor], Tensor], label_N: Tensor) -> Callable[[Tensor], Tensor]:
    """Minus the cross-entropy to the true class, per sample: what an untargeted attack minimises."""
    return lambda x: -F.cross_entropy(model(x), label_N, reduction="none")


class Toward:
    """The search of a targeted attack, made once for any number of shards.

    Args:
        recipe: the ball, the steps, the batch, and when to freeze.
        model: attacked; prepared for it.
        spared: models that shall go on answering the true class.
    """

    def __init__(self, recipe: Attack, model: Classifier, spared: Sequence[Classifier] = ()) -> None:
        self.recipe, self.model, self.spared = recipe, model, spared
        self.descent = Descent(
            self._loss,
            norm=recipe.norm,
            eps=recipe.eps,
            step_size=recipe.step,
            capture=graphs(recipe, model.mean.device),
        )

    def _loss(self, x: Tensor, target_N: Tensor, label_N: Tensor, *notes: Tensor) -> Tensor:
        watched = Watched(self.model, target_N, *notes)
        losses = [targeted(watched, target_N), *(targeted(other, label_N) for other in self.spared)]
        return torch.stack([loss(x) for loss in losses]).sum(0)

    def __call__(
        self, clean_NHWC: np.ndarray, target_N: np.ndarray, label_N: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Move each image toward its target, inside the ball, and round it to 8 bits.

        The batch has one shape. An image that is done leaves its place to the next one: after `steps` steps, so that
        all of a batch leave together, or, with `freeze`, as soon as a look finds its target far enough ahead.

        Args:
            clean_NHWC: uint8.
            target_N, label_N: where to, and the true class.

        Returns:
            The images, uint8, and the first iterate of each that the model answers as its target: 0 for the image
            itself, −1 where none is; the one after the last step is not looked at.
        """
        recipe, where = self.recipe, self.model.mean.device
        moved, reached_step = np.empty_like(clean_NHWC), np.full(len(clean_NHWC), -1)
        places = Places(len(clean_NHWC), recipe.batch_size)
        x = to_unit(clean_NHWC[places.image], where)
        while places.busy.any():
            image = places.image
            target, label = (sent(each[image], where) for each in (target_N, label_N))
            notes = unnoted(target)
            steps = recipe.steps if recipe.freeze is None else min(EVERY, recipe.steps - int(places.steps.max()))
            x = self.descent(to_unit(clean_NHWC[image], where), target, label, *notes, steps=steps, start=x)
            first, margin, _ = (np.asarray(note.cpu()) for note in notes)
            now = places.busy & (first >= 0) & (reached_step[image] < 0)
            reached_step[image[now]] = places.steps[now] + first[now]
            places.steps += steps
            frozen = margin >= (np.inf if recipe.freeze is None else recipe.freeze)
            done = places.busy & (frozen | (places.steps >= recipe.steps))
            moved[image[done]] = grid(x[torch.from_numpy(done)], clean_NHWC[image[done]], recipe.norm, recipe.eps)
            fresh = places.leave(done)
            x[torch.from_numpy(fresh)] = to_unit(clean_NHWC[places.image[fresh]], where)
        return moved, reached_step


class Places:
    """The places of a batch of one shape, and the images that take them in turn.

    Attributes:
        image: which image each place holds.
        busy: whether it is still searched for; a place that no image is left for goes on with the one it had.
        steps: how often it was moved.
    """

    def __init__(self, count: int, size: int) -> None:
        self.busy = np.arange(size) < count
        self.image = np.where(self.busy, np.arange(size), 0)
        self.steps = np.zeros(size, np.int64)
        self.waiting = range(min(size, count), count)

    def leave(self, done: np.ndarray) -> np.ndarray:
        """Take the images of some places out and put the next ones in; the places that got one."""
        free = np.flatnonzero(done)
        fresh, self.busy[free], self.steps[free] = free[: len(self.waiting)], False, 0
        self.busy[fresh] = True
        self.image[fresh], self.waiting = self.waiting[: len(fresh)], self.waiting[len(fresh) :]
        return fresh


class Watched:
    """A model that notes, as a search passes by, when it answers each image as the target, and by how much.

    It notes in place and on the device, so that no step waits.

    Attributes:
        model: asked.
        target_N: the targets.
        reached_N: the first iterate that it answers so, 0 for the first that it is shown; −1 for none yet.
        margin_N: by how much the target's logit leads all others at the last one that it was shown.
        shown: how many it was shown.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        target_N: Tensor,
        reached_N: Tensor,
        margin_N: Tensor,
        shown: Tensor,
    ) -> None:
        self.model, self.target_N = model, target_N
        self.reached_N, self.margin_N, self.shown = reached_N, margin_N, shown

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        logits: Tensor = self.model(x_NCHW)
        self.margin_N.copy_(margins(logits.detach(), self.target_N))
        first = (self.reached_N < 0) & (self.margin_N > 0)
        self.reached_N.copy_(torch.where(first, self.shown, self.reached_N))
        self.shown.add_(1)
        return logits


def unnoted(target_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a `Watched` model notes in, before it has seen anything."""
    margin = torch.full(target_N.shape, -torch.inf, device=target_N.device)
    return torch.full_like(target_N, -1), margin, torch.zeros_like(target_N[:1])


def entry(values_NC: Tensor, column_N: Tensor) -> Tensor:
    """Each row's value in one column, N, as `gather` gives it.

    The backward pass of `gather` is a scatter, which on a GPU looks at the indices on the host where it has to be
    deterministic: no step with it could be a CUDA graph.
    """
    here = torch.arange(values_NC.shape[1], device=values_NC.device) == column_N[:, None]
    return torch.where(here, values_NC, 0).sum(1)


def margins(logits_NC: Tensor, target_N: Tensor) -> Tensor:
    """By how much the logit of each image's target leads the largest of the others: N."""
    column = target_N[:, None]
    return logits_NC.gather(1, column)[:, 0] - logits_NC.scatter(1, column, -torch.inf).amax(1)
