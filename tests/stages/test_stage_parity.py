"""The same attack as torchattacks and foolbox: same model, same 8-bit images, same targets, zero start, last iterate.

torchattacks reduces the loss by its mean and guards the norm with 1e-10, so its steps depend on the batch once a
target is confident; it is compared on targets that are not. foolbox sums, as we do, and is compared on both.
"""

import warnings

import numpy as np
import pytest
import torch

from stages.pgd import pgd
from stages.targeted_pgd import targeted
from stages.tensors import to_unit

COUNT, STEPS = 250, 5
BALLS = {"l2": (1.5, 0.3), "linf": (0.2, 0.05)}  # radius, step


def adversary(name):
    with warnings.catch_warnings():
        # foolbox imports scipy.ndimage.filters, whose deprecation is foolbox's affair.
        warnings.filterwarnings("ignore", "Please import `gaussian_filter`", DeprecationWarning)
        return pytest.importorskip(name, reason=f"{name} is a tool of developers, see pyproject.toml")


@pytest.fixture
def images(digits):
    return to_unit(digits["test"].images()[:COUNT])


@pytest.fixture
def unsaturated(digits):
    """For each image a class other than its own, so that the first gradients are large."""
    label = torch.from_numpy(digits["test"].label[:COUNT])
    return (label + 1 + torch.arange(COUNT) % 9) % 10


def ours(model, x, target, norm):
    eps, step = BALLS[norm]
    return pgd(targeted(model, target), x, norm=norm, eps=eps, step_size=step, steps=STEPS)


def foolboxs(model, x, target, norm):
    foolbox = adversary("foolbox")
    eps, step = BALLS[norm]
    kind = {"l2": "L2ProjectedGradientDescentAttack", "linf": "LinfProjectedGradientDescentAttack"}[norm]
    attack = getattr(foolbox.attacks, kind)(abs_stepsize=step, steps=STEPS, random_start=False)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
    found, _, _ = attack(wrapped, x, foolbox.criteria.TargetedMisclassification(target), epsilons=eps)
    return found


def torchattackss(model, x, target, norm):
    torchattacks = adversary("torchattacks")
    eps, step = BALLS[norm]
    kind = {"l2": torchattacks.PGDL2, "linf": torchattacks.PGD}[norm]
    attack = kind(model, eps=eps, alpha=step, steps=STEPS, random_start=False)
    attack.set_mode_targeted_by_label(quiet=True)
    return attack(x, target)


def hold_parity(found, other, record):
    """The median distance is at most 1e-5; single samples may differ more, if rounding changes a max-pool or a ReLU."""
    distance = (found - other).double().flatten(1).norm(dim=1).numpy()
    median, worst = float(np.median(distance)), float(distance.max())
    record("l2_median", median)
    record("l2_max", worst)
    print(f"parity: median {median:.2e}, max {worst:.2e} over {len(distance)} samples")
    assert median <= 1e-5, f"median {median:.2e}, maximum {worst:.2e} over {len(distance)} samples"


@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("peer", [foolboxs, torchattackss])
def test_pgd_goes_where_its_peers_go(norm, peer, trained, images, unsaturated, record_property):
    found = ours(trained, images, unsaturated, norm)
    moved = (found - images).flatten(1).norm(dim=1)
    assert moved.min() > 0.1  # otherwise parity would say nothing
    hold_parity(found, peer(trained, images, unsaturated, norm), record_property)


@pytest.mark.parametrize("norm", BALLS)
def test_on_targets_that_are_reached_already_pgd_goes_where_foolbox_goes(
    norm, trained, images, digits, record_property
):
    own = torch.from_numpy(digits["test"].label[:COUNT])
    confidence = trained(images).softmax(1).gather(1, own[:, None])
    assert confidence.median() > 0.9
    hold_parity(ours(trained, images, own, norm), foolboxs(trained, images, own, norm), record_property)
