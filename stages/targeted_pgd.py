"""Targeted PGD over the images of a shard, in batches, with early stopping per image."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.augment import view
from stages.device import sent
from stages.model import Classifier
from stages.pgd import Descent, graphs, quantize
from stages.recipes import Attack
from stages.tensors import to_unit

EVERY = 5
"""Steps between two checks of the margins."""


def targeted(model: Callable[[Tensor], Tensor], target_N: Tensor) -> Callable[[Tensor], Tensor]:
    """The loss of a targeted attack: cross-entropy to the target class, per sample."""
    return lambda x: F.cross_entropy(model(x), target_N, reduction="none")


def untargeted(model: Callable[[Tensor], Tensor], label_N: Tensor) -> Callable[[Tensor], Tensor]:
    """The loss of an untargeted attack: negative cross-entropy to the true class, per sample."""
    return lambda x: -F.cross_entropy(model(x), label_N, reduction="none")


class TargetedPGD:
    """Targeted PGD, set up once for any number of shards.

    Args:
        recipe: ball, steps, batch size and early stopping.
        model: source model, optimised.
        spared: models that should keep predicting the true class.
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
        toward = [targeted(watched, target_N)(x)]  # the image itself, whose first success counts
        toward += [targeted(self.model, target_N)(view(x, number)) for number in range(1, self.recipe.views)]
        away = [targeted(other, label_N)(x) for other in self.spared]
        return torch.stack([torch.stack(toward).mean(0), *away]).sum(0)

    def __call__(
        self, clean_NHWC: np.ndarray, target_N: np.ndarray, label_N: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Perturb each image toward its target within the ball, and round it to 8 bits.

        All batches have one shape. A finished image gives its slot to the next image: after `steps` steps, so that a
        whole batch finishes together, or, with `stop_at_margin`, as soon as a check finds its margin large enough.

        Args:
            clean_NHWC: uint8.
            target_N, label_N: target class and true class.

        Returns:
            The images, uint8, and the first iterate of each that the model classifies as its target: 0 for the clean
            image, −1 for none. The iterate after the last step is not checked.
        """
        recipe, where = self.recipe, self.model.mean.device
        x_adv, success_step = np.empty_like(clean_NHWC), np.full(len(clean_NHWC), -1)
        places = Places(len(clean_NHWC), recipe.batch_size)
        x = to_unit(clean_NHWC[places.image], where)
        while places.busy.any():
            image = places.image
            target, label = (sent(each[image], where) for each in (target_N, label_N))
            notes = unnoted(target)
            steps = (
                recipe.steps if recipe.stop_at_margin is None else min(EVERY, recipe.steps - int(places.steps.max()))
            )
            x = self.descent(to_unit(clean_NHWC[image], where), target, label, *notes, steps=steps, start=x)
            first, margin, _ = (np.asarray(note.cpu()) for note in notes)
            now = places.busy & (first >= 0) & (success_step[image] < 0)
            success_step[image[now]] = places.steps[now] + first[now]
            places.steps += steps
            stopped = margin >= (np.inf if recipe.stop_at_margin is None else recipe.stop_at_margin)
            done = places.busy & (stopped | (places.steps >= recipe.steps))
            x_adv[image[done]] = quantize(x[torch.from_numpy(done)], clean_NHWC[image[done]], recipe.norm, recipe.eps)
            fresh = places.leave(done)
            x[torch.from_numpy(fresh)] = to_unit(clean_NHWC[places.image[fresh]], where)
        return x_adv, success_step


class Places:
    """The slots of a batch of fixed shape, and the images that occupy them in turn.

    Attributes:
        image: index of the image in each slot.
        busy: whether the slot's image is still in progress; with no image left, a slot repeats its last one.
        steps: steps taken so far.
    """

    def __init__(self, count: int, size: int) -> None:
        self.busy = np.arange(size) < count
        self.image = np.where(self.busy, np.arange(size), 0)
        self.steps = np.zeros(size, np.int64)
        self.waiting = range(min(size, count), count)

    def leave(self, done: np.ndarray) -> np.ndarray:
        """Free the slots of finished images and fill them with the next ones; return the refilled slots."""
        free = np.flatnonzero(done)
        fresh, self.busy[free], self.steps[free] = free[: len(self.waiting)], False, 0
        self.busy[fresh] = True
        self.image[fresh], self.waiting = self.waiting[: len(fresh)], self.waiting[len(fresh) :]
        return fresh


class Watched:
    """A model that records the first success and the current margin of each image during an attack.

    It writes in place on the device, so that no step waits for the host.

    Attributes:
        model: the source model.
        target_N: target classes.
        reached_N: first iterate classified as the target, counted from 0; −1 for none yet.
        margin_N: lead of the target's logit over all others at the latest iterate.
        shown: number of iterates so far.
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
    """Initial state of a `Watched` model: reached_N, margin_N, shown."""
    margin = torch.full(target_N.shape, -torch.inf, device=target_N.device)
    return torch.full_like(target_N, -1), margin, torch.zeros_like(target_N[:1])


def entry(values_NC: Tensor, column_N: Tensor) -> Tensor:
    """Each row's value in one column, N, as from `gather`.

    The backward pass of `gather` is a scatter. On a GPU its deterministic kernel reads the indices on the host, so a
    step with it could not be a CUDA graph.
    """
    here = torch.arange(values_NC.shape[1], device=values_NC.device) == column_N[:, None]
    return torch.where(here, values_NC, 0).sum(1)


def margins(logits_NC: Tensor, target_N: Tensor) -> Tensor:
    """Margin: the target's logit minus the largest other logit, N."""
    column = target_N[:, None]
    return logits_NC.gather(1, column)[:, 0] - logits_NC.scatter(1, column, -torch.inf).amax(1)
