"""Targeted PGD over the images of a shard: which images are in the batch, and for how many steps."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stages.augment import view
from stages.model import Classifier, Design
from stages.recipes import Attack
from stages.targeted_pgd import Places, TargetedPGD, Watched, margins, unnoted

LINEAR = """
import torch
from torch import nn
def make(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
"""


@settings(max_examples=200, deadline=None)
@given(count=st.integers(1, 40), size=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
def test_every_image_has_one_place_at_a_time_until_it_leaves_and_none_comes_back(count, size, seed):
    draw, places, left = np.random.default_rng(seed), Places(count, size), []
    while places.busy.any():
        held = places.image[places.busy]
        assert len(set(held)) == len(held)
        assert not set(held) & set(left)
        assert places.busy.all() or not len(places.waiting)
        places.steps += 1
        done = places.busy & (draw.random(size) < 0.5)
        left += places.image[done].tolist()
        fresh = places.leave(done)
        assert not places.steps[done].any()
        assert places.busy[fresh].all()
    assert sorted(left) == list(range(count))


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 1000))
def test_a_margin_is_above_zero_where_the_target_is_the_answer(classes, count, seed):
    draw = torch.Generator().manual_seed(seed)
    logits, target = torch.randn(count, classes, generator=draw), torch.randint(classes, (count,), generator=draw)
    assert torch.equal(margins(logits, target) > 0, logits.argmax(1) == target)


def test_the_watched_model_knows_the_first_iterate_and_the_last_margin():
    target = torch.tensor([0, 0, 1])
    watched = Watched(lambda x: torch.stack([x.flatten(), 0 * x.flatten()], 1), target, *unnoted(target))
    for value in (-1.0, 2.0, 3.0):
        watched(torch.full((3, 1, 1, 1), value))
    assert watched.reached_N.tolist() == [1, 1, 0]
    assert watched.margin_N.tolist() == [3.0, 3.0, -3.0]


@pytest.fixture
def linear(make_module, tmp_path):
    """Two classes, with a margin that grows by 0.5 per unit along one direction."""
    model = Classifier(Design(f"{make_module(LINEAR)}:make", 2, (1, 8, 8), (0.0,), (1.0,)), tmp_path)
    head = model.network[1]
    away = torch.linspace(-1, 1, 64)
    with torch.no_grad():
        head.weight.copy_(torch.stack([0 * away, 0.5 * away / away.norm()]))
        head.bias.zero_()
    return model.eval().requires_grad_(False)


def grey(levels):
    return np.stack([np.full((8, 8, 1), level, np.uint8) for level in levels])


def test_a_frozen_image_is_moved_as_often_as_its_margin_needs(linear):
    # From grey, k steps of 0.04 make a margin of 0.02 k. The look after 5 steps sees that of the fourth.
    clean, target = grey([128] * 5), np.array([1] * 5)
    recipe = Attack(images="", model="", eps=2, step_size=0.04, steps=40, batch_size=2, stop_at_margin=0.15)
    start = float(linear(torch.full((1, 1, 8, 8), 128 / 255))[0, 1])
    assert abs(start) < 1e-4
    moved, reached = TargetedPGD(recipe, linear)(clean, target, 1 - target)
    length = np.sqrt(((moved.astype(float) - clean) ** 2).sum((1, 2, 3))) / 255
    np.testing.assert_allclose(length, 10 * 0.04, atol=0.01)  # 0.02 · 4 and 0.02 · 9: the second look is enough
    assert set(reached.tolist()) <= {0, 1}


@pytest.mark.parametrize("views", [1, 2, 8])
def test_a_step_on_a_linear_model_is_the_mean_of_its_weights_as_each_view_sees_them(views, linear):
    """From grey, one step of L2 goes along the mean over the views of what each passes back to the image."""
    clean, target = grey([128]), np.array([1])
    recipe = Attack(images="", model="", eps=2, step_size=2, steps=1, views=views)
    moved, _ = TargetedPGD(recipe, linear)(clean, target, 1 - target)
    weight = (linear.network[1].weight[1] - linear.network[1].weight[0]).detach().view(1, 1, 8, 8)
    x = torch.zeros(1, 1, 8, 8, requires_grad=True)
    (mean,) = torch.autograd.grad(sum((view(x, number) * weight).sum() for number in range(views)) / views, x)
    expected = (2 * mean / mean.norm()).view(8, 8, 1).numpy()
    np.testing.assert_allclose((moved[0] - 128.0) / 255, expected, atol=1 / 255)


def test_a_margin_that_none_has_changes_not_a_bit(trained, digits, part):
    shard = part(digits["test"], slice(0, 30))
    clean, target = shard.images(), (shard.label + 1) % 10
    asked = {"images": "", "model": "", "eps": 1.5, "steps": 12, "batch_size": 8}
    plain, never = (
        TargetedPGD(Attack(**asked, **more), trained)(clean, target, shard.label)
        for more in ({}, {"stop_at_margin": 1e9})
    )
    np.testing.assert_array_equal(plain[0], never[0])
    np.testing.assert_array_equal(plain[1], never[1])


def test_frozen_images_make_room_so_that_fewer_are_passed_through_the_network(trained, digits, part):
    shard, shown = part(digits["test"], slice(0, 60)), []

    class Counted(nn.Module):
        def forward(self, x):
            shown.append(len(x))
            return trained.network(x)

    asked = {"images": "", "model": "", "eps": 1.5, "steps": 50, "batch_size": 10}
    answers = {}
    for stop_at_margin in (None, 2.0):
        shown.clear()
        model, target = trained.through(Counted()), (shard.label + 1) % 10
        moved, reached = TargetedPGD(Attack(**asked, stop_at_margin=stop_at_margin), model)(
            shard.images(), target, shard.label
        )
        answers[stop_at_margin] = sum(shown), moved, reached
    assert answers[None][0] == 60 * 50
    assert answers[2.0][0] < 60 * 25
    np.testing.assert_array_equal(answers[None][2], answers[2.0][2])  # on the way to the target they are one search
    far = {
        stop_at_margin: ((moved - shard.images().astype(float)) ** 2).sum()
        for stop_at_margin, (_, moved, _) in answers.items()
    }
    assert far[2.0] < far[None]
