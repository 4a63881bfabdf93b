"""What models answer under an attack: the worst of several tries, and the average case beside it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stages.apgd import apgd, losses
from stages.device import computing, sent
from stages.inference import prepared
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
    """What came of one attack on N images, as one model sees it.

    Attributes:
        right: N, bool; answered right under every try.
        average: N, int; how many draws of the average case were answered right.
        aimed: N, bool; there was a target to reach, other than the true class.
        success: N, bool; aimed, and answered as the target under some try.
    """

    right: np.ndarray
    average: np.ndarray
    aimed: np.ndarray
    success: np.ndarray


def in_ball(
    threat: EvalAttack,
    classes: Sequence[str],
    models: Mapping[str, Classifier],
    surrogates: Mapping[str, Classifier],
    shard: Shard,
) -> dict[str, Outcome]:
    """What comes of a threat, for each model; an attack on a surrogate is made once and tried on all of them.

    The tries are the restarts (for APGD, each with either loss); the average case is one draw of noise of the same
    norm and radius. Images are scored as the search left them: rounding to 8 bits is for what is saved, and would take
    most of a small ball's strength from the attack.
    """
    label = shard.label
    target = label if threat.target_rule is None else targets(threat.target_rule, label, shard.index, classes)
    if threat.surrogate is not None:
        answers = _answers(threat, surrogates[threat.surrogate], list(models.values()), shard, target)
    else:
        answers = np.concatenate([_answers(threat, m, [m], shard, target) for m in models.values()], axis=1)
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
    threat: EvalAttack, attacked: Classifier, scored: Sequence[Classifier], shard: Shard, target_N: np.ndarray
) -> np.ndarray:
    """What each model answers of each image, N × models × (1 + tries): first under noise, then under each try."""
    plain = [model.using("float32") for model in scored]
    where = attacked.mean.device

    def one(pixels: np.ndarray, label: np.ndarray, target: np.ndarray, index: np.ndarray) -> np.ndarray:
        x = to_unit(pixels, where)
        goals = sent(label, where), sent(target, where)
        views = [noisy(x, threat, threat.seed, index), *_tries(threat, made, x, *goals, index)]
        with torch.no_grad():
            said = [torch.stack([model(view).argmax(1) for model in plain], 1) for view in views]
        return np.asarray(torch.stack(said, 2).cpu())

    with computing(threat), explained(threat, attacked, *scored):
        made = prepared(attacked, threat)
        return in_batches(one, threat.batch_size, shard.images(), shard.label, target_N, shard.index)


def _tries(
    threat: EvalAttack, model: Classifier, x_NCHW: Tensor, label_N: Tensor, target_N: Tensor, index: np.ndarray
) -> Iterator[Tensor]:
    """What each search of the attack ends with."""
    aim = None if threat.target_rule is None else target_N
    for restart in range(threat.restarts):
        start = random_start(x_NCHW, threat, threat.seed, index, restart) if restart else x_NCHW
        if threat.method == "pgd":
            yield _pgd(threat, model, x_NCHW, label_N, aim, start)
        else:
            yield from _apgd(threat, model, x_NCHW, label_N, aim, start)


def _pgd(
    threat: EvalAttack, model: Classifier, x_NCHW: Tensor, label_N: Tensor, aim_N: Tensor | None, start: Tensor
) -> Tensor:
    """One search; what its steps are is made once for a model and a ball."""
    goal, wanted = (untargeted, label_N) if aim_N is None else (targeted, aim_N)
    key = ("pgd", goal, threat.norm, threat.eps, threat.step, threat.deterministic)
    if key not in model.views:
        model.views[key] = Descent(
            lambda x, wanted: goal(model, wanted)(x),
            norm=threat.norm,
            eps=threat.eps,
            step_size=threat.step,
            capture=graphs(threat, x_NCHW.device),
        )
    found: Tensor = model.views[key](x_NCHW, wanted, steps=threat.steps, start=start)
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
    """What comes of rotations and translations, for each model: every candidate is a try, their mean the average."""
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
