"""Evaluate models under attack: the worst of several tries, and the average case beside it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stages.apgd import apgd, losses
from stages.device import computing, sent
from stages.inference import optimized
from stages.model import Classifier
from stages.noise import noisy, random_start
from stages.pgd import Descent, graphs
from stages.recipes import Ball, EvalAttack, Spatial
from stages.refused import explained
from stages.relabel import targets
from stages.shard import Shard
from stages.spatial import search
from stages.targeted_pgd import targeted, untargeted
from stages.tensors import in_batches, to_unit


@dataclass(frozen=True)
class Outcome:
    """The result of one attack on N images, for one model.

    Attributes:
        right: N, bool; correct under every try.
        average: N, int; number of average-case draws that are classified correctly.
        aimed: N, bool; the target is not the true class.
        success: N, bool; aimed, and classified as the target under some try.
    """

    right: np.ndarray
    average: np.ndarray
    aimed: np.ndarray
    success: np.ndarray


def in_ball(
    attack: EvalAttack,
    classes: Sequence[str],
    models: Mapping[str, Classifier],
    surrogates: Mapping[str, Classifier],
    shard: Shard,
) -> dict[str, Outcome]:
    """Attack each model, or a surrogate once for all models, and record the outcome per model.

    The tries are the restarts (for APGD, each with both losses); the average case is one draw of noise of the same norm
    and radius. Adversarial examples are evaluated unrounded: rounding to 8 bits is for saved images, and would weaken
    an attack in a small ball.
    """
    label = shard.label
    target = label if attack.target_rule is None else targets(attack.target_rule, label, shard.index, classes)
    if attack.surrogate is not None:
        answers = _answers(attack, surrogates[attack.surrogate], list(models.values()), shard, target)
    else:
        answers = np.concatenate([_answers(attack, m, [m], shard, target) for m in models.values()], axis=1)
    return {
        name: Outcome(
            right=(tries == label[:, None]).all(1),
            average=(noise == label).astype(np.int64),
            aimed=target != label,
            success=((tries == target[:, None]) & (target != label)[:, None]).any(1),
        )
        for name, noise, tries in zip(models, answers[:, :, 0].T, answers[:, :, 1:].swapaxes(0, 1), strict=True)
    }


def _answers(
    attack: EvalAttack, attacked: Classifier, scored: Sequence[Classifier], shard: Shard, target_N: np.ndarray
) -> np.ndarray:
    """Predictions of each model for each image, N × models × (1 + tries): first under noise, then under each try."""
    plain = [model.using("float32") for model in scored]
    where = attacked.mean.device

    def one(pixels: np.ndarray, label: np.ndarray, target: np.ndarray, index: np.ndarray) -> np.ndarray:
        x = to_unit(pixels, where)
        goals = sent(label, where), sent(target, where)
        views = [noisy(x, attack, attack.seed, index), *_tries(attack, made, x, *goals, index)]
        with torch.no_grad():
            said = [torch.stack([model(view).argmax(1) for model in plain], 1) for view in views]
        return np.asarray(torch.stack(said, 2).cpu())

    with computing(attack), explained(attack, attacked, *scored):
        made = optimized(attacked, attack)
        return in_batches(one, attack.batch_size, shard.images(), shard.label, target_N, shard.index)


def _tries(
    attack: EvalAttack, model: Classifier, x_NCHW: Tensor, label_N: Tensor, target_N: Tensor, index: np.ndarray
) -> Iterator[Tensor]:
    """The last iterate of each run of the attack."""
    aim = None if attack.target_rule is None else target_N
    for restart in range(attack.restarts):
        start = random_start(x_NCHW, attack, attack.seed, index, restart) if restart else x_NCHW
        if attack.method == "pgd":
            yield _pgd(attack, model, x_NCHW, label_N, aim, start)
        else:
            yield from _apgd(attack, model, x_NCHW, label_N, aim, start)


def _pgd(
    attack: EvalAttack, model: Classifier, x_NCHW: Tensor, label_N: Tensor, aim_N: Tensor | None, start: Tensor
) -> Tensor:
    """One run of PGD; its step is set up once per model and ball."""
    goal, wanted = (untargeted, label_N) if aim_N is None else (targeted, aim_N)
    key = ("pgd", goal, attack.norm, attack.eps, attack.step, attack.deterministic)
    if key not in model.views:
        model.views[key] = Descent(
            lambda x, wanted: goal(model, wanted)(x),
            norm=attack.norm,
            eps=attack.eps,
            step_size=attack.step,
            capture=graphs(attack, x_NCHW.device),
        )
    found: Tensor = model.views[key](x_NCHW, wanted, steps=attack.steps, start=start)
    return found


def _apgd(
    ball: Ball, model: Classifier, x_NCHW: Tensor, label_N: Tensor, aim_N: Tensor | None, start: Tensor
) -> Iterator[Tensor]:
    def done(logits: Tensor) -> Tensor:
        answer = logits.argmax(1)
        return answer != label_N if aim_N is None else answer == aim_N

    for loss in losses(label_N, aim_N, model.design.classes):
        yield apgd(model, loss, done, x_NCHW, norm=ball.norm, eps=ball.eps, steps=ball.steps, start=start)


def in_space(space: Spatial, models: Mapping[str, Classifier], shard: Shard, batch_size: int) -> dict[str, Outcome]:
    """Evaluate each model under rotations and translations: every candidate is a try, their mean the average case."""
    return {name: _in_space(space, model.using("float32"), shard, batch_size) for name, model in models.items()}


def _in_space(space: Spatial, model: Classifier, shard: Shard, batch_size: int) -> Outcome:
    where = model.mean.device

    def one(pixels: np.ndarray, label: np.ndarray, index: np.ndarray) -> np.ndarray:
        true = torch.from_numpy(label).to(where)
        found = search(space, to_unit(pixels, where), index, lambda x: (model(x).argmax(1) == true).float())
        return np.asarray(torch.stack([found.loss, found.total], 1).cpu()).astype(np.int64)

    least, total = in_batches(one, batch_size, shard.images(), shard.label, shard.index).T
    nothing = np.zeros(len(shard), bool)
    return Outcome(right=least == 1, average=total, aimed=nothing, success=nothing)
