"""Predictions under attack: restarts, surrogates, targets, the average case, rotations and shifts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stages.adversarial_eval import in_ball, in_space
from stages.model import Classifier
from stages.noise import noisy, random_start
from stages.pgd import pgd
from stages.recipes import Ball, EvalAttack, Spatial
from stages.relabel import targets
from stages.spatial import candidates, transform
from stages.targeted_pgd import targeted, untargeted
from stages.tensors import to_unit

CLASSES = tuple("0123456789")
BATCH = 20
WEAK = {"eps": 0.9, "steps": 3, "batch_size": BATCH}


@pytest.fixture
def shard(digits, part):
    return part(digits["test"], slice(0, 60), "test-000000")


@pytest.fixture
def other(design):
    """An untrained network."""
    torch.manual_seed(3)
    return Classifier(design, Path()).eval().requires_grad_(False)


def attacked(threat, shard, model, **models):
    return in_ball(EvalAttack(**threat), CLASSES, {"net": model}, models, shard)["net"]


# ------------------------------------------------------------------------------------------ restarts


@given(
    st.sampled_from(["l2", "linf"]),
    st.sampled_from(["pgd", "apgd"]),
    st.sampled_from([None, "random", "other"]),
    st.integers(1, 3),
    st.integers(1, 4),
)
@settings(max_examples=8)
def test_more_restarts_never_leave_a_model_better_off(trained_few, norm, method, rule, restarts, steps):
    model, shard = trained_few
    threat = {"norm": norm, "eps": 0.9 if norm == "l2" else 0.12, "method": method, "target_rule": rule, "steps": steps}
    few, more = (
        attacked({**threat, "batch_size": BATCH, "restarts": count}, shard, model) for count in (restarts, restarts + 1)
    )
    assert not (more.right & ~few.right).any()
    assert not (few.success & ~more.success).any()
    np.testing.assert_array_equal(few.aimed, more.aimed)
    np.testing.assert_array_equal(few.average, more.average)


@pytest.fixture(scope="module")
def trained_few(digits, design, trained_weights, part):
    from stages.model import load

    return load(design, trained_weights, Path()), part(digits["test"], slice(0, 20), "test-000000")


def test_a_restart_finds_what_a_search_from_a_flat_place_cannot(trained, shard):
    images, plain = (to_unit(shard.images()) - trained.mean) / trained.std, trained.network

    class Masked(nn.Module):
        """A model that is constant near the images, so that it has no gradient there."""

        def forward(self, x):
            near = (x - images).abs().amax((1, 2, 3)) < 1e-3
            return torch.where(near[:, None], plain(images).detach() + 0 * x.sum(), plain(x))

    threat = {"eps": 1.5, "steps": 8, "batch_size": 60, "fold": False}
    alone, again = (attacked({**threat, "restarts": count}, shard, trained.through(Masked())) for count in (1, 2))
    assert alone.right.sum() > 0.9 * 60
    assert again.right.sum() < 0.3 * 60


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_random_start_is_uniform_in_the_volume_of_the_ball(norm):
    ball, count, shape = Ball(norm=norm, eps=0.25), 4000, (1, 1, 3)
    start = random_start(torch.full((count, *shape), 0.5), ball, 0, np.arange(count), 1)
    delta = ((start - 0.5) / 0.25).flatten(1)
    length = delta.norm(dim=1) if norm == "l2" else delta.abs().amax(1)
    # In three dimensions the length to the power of 3 is uniform; so are signs and axes.
    quantiles = (length**3).quantile(torch.tensor([0.1, 0.5, 0.9, 1.0]))
    torch.testing.assert_close(quantiles, torch.tensor([0.1, 0.5, 0.9, 1.0]), rtol=0, atol=0.03)
    assert length.max() <= 1 + 1e-6
    assert delta.mean(0).abs().max() < 0.04
    spread = (delta**2).mean(0)
    torch.testing.assert_close(spread, torch.full((3,), 1 / 5 if norm == "l2" else 1 / 3), rtol=0, atol=0.02)


def test_a_random_start_comes_from_seed_index_and_restart_and_stays_in_the_box():
    ball, x = Ball(eps=3.0), torch.rand((3, 2, 4, 4), generator=torch.Generator().manual_seed(0))
    start = random_start(x, ball, 7, np.array([5, 9, 2]), 1)
    assert torch.equal(random_start(x[1:2], ball, 7, np.array([9]), 1), start[1:2])
    assert start.min() >= 0
    assert start.max() <= 1
    for seed, index, restart in ((8, 5, 1), (7, 6, 1), (7, 5, 2)):
        assert not torch.equal(random_start(x[:1], ball, seed, np.array([index]), restart), start[:1])


# -------------------------------------------------------------------------------- targets and surrogates


def by_hand(model, scored, shard, loss):
    """A model's predictions on the final images of one plain attack on another model."""
    x = to_unit(shard.images())
    found = [pgd(loss(model, part), x[part], norm="l2", eps=0.9, step_size=0.18, steps=3) for part in slices()]
    with torch.no_grad():
        return torch.cat([scored(z).argmax(1) for z in found]).numpy()


def slices():
    return [slice(first, first + BATCH) for first in range(0, 60, BATCH)]


def test_toward_a_class_what_counts_is_the_class_reached(trained, shard):
    rule = {"rule": "random", "seed": 4}
    outcome = attacked({**WEAK, "target_rule": rule}, shard, trained)
    target = targets(EvalAttack(target_rule=rule).target_rule, shard.label, shard.index, CLASSES)
    wanted = torch.from_numpy(target)
    answers = by_hand(trained, trained, shard, lambda model, part: targeted(model, wanted[part]))
    np.testing.assert_array_equal(outcome.aimed, target != shard.label)
    np.testing.assert_array_equal(outcome.success, (answers == target) & (target != shard.label))
    np.testing.assert_array_equal(outcome.right, answers == shard.label)
    assert 0 < outcome.success.sum() < outcome.aimed.sum() < 60


def test_an_attack_on_a_surrogate_is_made_once_and_tried_on_every_model(trained, other, shard):
    calls = []

    class Counted(nn.Module):
        def forward(self, x):
            calls.append(len(x))
            return trained.network(x)

    threat, surrogate = EvalAttack(**WEAK, surrogate="theirs", fold=False), trained.through(Counted())
    found = in_ball(threat, CLASSES, {"a": other, "b": trained, "c": other}, {"theirs": surrogate}, shard)
    assert len(calls) == 3 * 3  # three batches of three steps, however many models are scored
    label = torch.from_numpy(shard.label)
    for name, scored in (("a", other), ("b", trained), ("c", other)):
        answers = by_hand(trained, scored, shard, lambda model, part: untargeted(model, label[part]))
        np.testing.assert_array_equal(found[name].right, answers == shard.label)
    own = attacked(WEAK, shard, trained)
    np.testing.assert_array_equal(found["b"].right, own.right)
    assert not own.aimed.any()
    assert not own.success.any()


def test_apgd_counts_the_worse_of_both_losses_and_is_no_weaker_than_pgd(trained, shard):
    plain, free = (attacked({**WEAK, "steps": 8, "method": method}, shard, trained) for method in ("pgd", "apgd"))
    assert free.right.sum() <= plain.right.sum() + 1
    aimed = attacked({**WEAK, "steps": 8, "eps": 1.5, "method": "apgd", "target_rule": "other"}, shard, trained)
    assert aimed.success.sum() > 0.5 * 60


def test_the_average_case_is_noise_of_the_same_norm_and_radius(trained, shard):
    threat = EvalAttack(norm="linf", eps=0.35, steps=1, batch_size=BATCH, seed=3)
    found = in_ball(threat, CLASSES, {"net": trained}, {}, shard)["net"]
    with torch.no_grad():
        answers = trained(noisy(to_unit(shard.images()), threat, 3, shard.index)).argmax(1).numpy()
    np.testing.assert_array_equal(found.average, answers == shard.label)
    assert 0 < found.average.sum() < 60


# -------------------------------------------------------------------------------- rotations and shifts


@pytest.mark.parametrize("space", [Spatial(grid=[1, 3, 3]), Spatial(search="random", tries=4, rotation=60)])
def test_right_under_a_space_is_right_under_each_of_its_candidates(trained, shard, space):
    found = in_space(space, {"net": trained}, shard, BATCH)["net"]
    x, tried = to_unit(shard.images()), torch.from_numpy(candidates(space, shard.index).copy())
    with torch.no_grad():
        each = torch.stack([trained(transform(x, *t.unbind(1))).argmax(1) for t in tried.transpose(0, 1)], 1).numpy()
    right = each == shard.label[:, None]
    np.testing.assert_array_equal(found.right, right.all(1))
    np.testing.assert_array_equal(found.average, right.sum(1))
    assert 0 < found.right.sum() < 60
