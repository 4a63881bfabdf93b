"""Projected gradient descent against optima known in closed form, and rounding to the 8-bit grid."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.pgd import direction, pgd, project, round_in_ball

SHAPE = (3, 2, 4, 5)
EPS = 0.3
NORMS = ["l2", "linf"]


def gaussian(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(w_NCHW):
    """The loss w·x, whose gradient is w everywhere."""
    return lambda x: (x * w_NCHW).flatten(1).sum(1)


def unit(w_NCHW, norm):
    """The direction of steepest ascent, by its definition: w / ‖w‖₂, or sign w."""
    return w_NCHW.sign() if norm == "linf" else w_NCHW / (w_NCHW**2).sum((1, 2, 3), keepdim=True).sqrt()


def bowl(weight_CHW, goal_CHW):
    """A curved loss, so that the path matters; samples are independent."""
    return lambda x: (weight_CHW * (x - goal_CHW) ** 2).flatten(1).sum(1)


# ------------------------------------------------------------------------------------------- the loop


@pytest.mark.parametrize("norm", NORMS)
def test_a_linear_loss_is_minimised_at_the_edge_of_the_ball(norm):
    x, w = torch.full(SHAPE, 0.5), gaussian(1)
    found = pgd(linear(w), x, norm=norm, eps=EPS, step_size=EPS / 4, steps=6)
    # The centre is 0.5 and the radius 0.3, so the box does not touch the ball.
    torch.testing.assert_close(found, x - EPS * unit(w, norm), rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_each_step_has_the_length_asked_for(norm):
    x, w = torch.full(SHAPE, 0.5), gaussian(2)
    found = pgd(linear(w), x, norm=norm, eps=EPS, step_size=0.02, steps=3)
    torch.testing.assert_close(found, x - 0.06 * unit(w, norm), rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_the_box_is_clipped_to_after_the_ball_is_projected_to(norm):
    # One step that overshoots the ball: projection gives x − ε u, and only then the box cuts. Clipping
    # before projecting (the other family) gives other pixels.
    x, w = torch.full(SHAPE, 0.02), gaussian(3)
    found = pgd(linear(w), x, norm=norm, eps=EPS, step_size=2 * EPS, steps=1)
    torch.testing.assert_close(found, (x - EPS * unit(w, norm)).clamp(0, 1), rtol=0, atol=1e-6)
    assert (found == 0).any()


@pytest.mark.parametrize("norm", NORMS)
def test_a_corner_of_the_box_inside_the_ball_is_reached(norm):
    x, w = torch.full(SHAPE, 0.95), -gaussian(4).abs() - 0.1
    found = pgd(linear(w), x, norm=norm, eps=1.0, step_size=0.5, steps=8)
    assert torch.equal(found, torch.ones(SHAPE))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("tiny", [1e-10, 1e-25, 1e-35])
def test_a_saturated_sample_moves_as_any_other(norm, tiny):
    x, w = torch.full(SHAPE, 0.5), gaussian(5)
    scale = torch.tensor([1.0, tiny, 1.0]).view(3, 1, 1, 1)  # only the second sample is saturated
    found = pgd(linear(w * scale), x, norm=norm, eps=EPS, step_size=EPS / 2, steps=3)
    torch.testing.assert_close(found, x - EPS * unit(w, norm), rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_a_gradient_of_zero_leaves_the_sample_where_it_is(norm):
    x, w = gaussian(6).sigmoid(), gaussian(7)
    w[1] = 0
    found = pgd(linear(w), x, norm=norm, eps=EPS, step_size=EPS, steps=3)
    assert torch.equal(found[1], x[1])
    assert not torch.equal(found[0], x[0])


@pytest.mark.parametrize("norm", NORMS)
def test_without_a_radius_only_the_box_bounds_the_path(norm):
    x, w = torch.full(SHAPE, 0.5), gaussian(8)
    found = pgd(linear(w), x, norm=norm, eps=None, step_size=0.04, steps=10)
    torch.testing.assert_close(found, (x - 0.4 * unit(w, norm)).clamp(0, 1), rtol=0, atol=2e-6)
    w = w.sign() * (w.abs() + 1)  # no pixel so flat that it takes long to its side of the box
    far = pgd(linear(w), x, norm=norm, eps=None, step_size=1.0, steps=60)
    assert torch.equal(far, (w < 0).float())


@pytest.mark.parametrize("norm", NORMS)
def test_a_start_is_where_the_path_begins_and_x_stays_the_centre(norm):
    x, w = torch.full(SHAPE, 0.5), gaussian(9)
    start = x + 0.1 * unit(gaussian(10), norm)
    assert torch.equal(pgd(linear(w), x, norm=norm, eps=EPS, step_size=0.1, steps=0, start=start), start)
    one = pgd(linear(w), x, norm=norm, eps=EPS, step_size=0.05, steps=1, start=start)
    torch.testing.assert_close(one, start - 0.05 * unit(w, norm), rtol=0, atol=1e-6)
    far = pgd(linear(w), x, norm=norm, eps=EPS, step_size=0.5, steps=20, start=start)
    torch.testing.assert_close(far, x - EPS * unit(w, norm), rtol=0, atol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_neither_x_nor_the_start_is_written_to(norm):
    x, start = torch.full(SHAPE, 0.5), torch.full(SHAPE, 0.4)
    pgd(linear(gaussian(11)), x, norm=norm, eps=EPS, step_size=0.1, steps=2, start=start)
    assert torch.equal(x, torch.full(SHAPE, 0.5))
    assert torch.equal(start, torch.full(SHAPE, 0.4))


@pytest.mark.parametrize("norm", NORMS)
def test_a_sample_does_not_depend_on_its_neighbours_in_the_batch(norm):
    loss = bowl(gaussian(12)[0].abs(), gaussian(13)[0])
    x = gaussian(14).sigmoid()
    other = x.clone()
    other[1:] = 1 - other[1:]
    one, two = (pgd(loss, batch, norm=norm, eps=EPS, step_size=0.05, steps=7) for batch in (x, other))
    assert torch.equal(one[0], two[0])


@pytest.mark.parametrize("norm", NORMS)
def test_a_summed_loss_gives_the_path_of_a_loss_per_sample(norm):
    loss = bowl(gaussian(15)[0].abs(), gaussian(16)[0])
    x = gaussian(17).sigmoid()
    each, summed = (
        pgd(how, x, norm=norm, eps=EPS, step_size=0.05, steps=5) for how in (loss, lambda batch: loss(batch).sum())
    )
    assert torch.equal(each, summed)


def test_the_last_iterate_is_given_not_the_best_one():
    # One pixel, minimum at 0.5: a step of 0.3 from 0.5 + 0.1 jumps back and forth over it and ends farther away.
    x = torch.full((1, 1, 1, 1), 0.6)
    found = pgd(lambda z: ((z - 0.5) ** 2).flatten(1).sum(1), x, norm="l2", eps=None, step_size=0.3, steps=1)
    assert found.item() == pytest.approx(0.3, abs=1e-6)


@given(st.integers(0, 10_000), st.sampled_from(NORMS), st.floats(0.01, 3), st.floats(0.01, 3), st.integers(1, 6))
def test_no_path_leaves_the_ball_or_the_box(seed, norm, eps, step_size, steps):
    x = gaussian(seed).sigmoid()
    found = pgd(
        bowl(gaussian(seed + 1)[0], gaussian(seed + 2)[0]), x, norm=norm, eps=eps, step_size=step_size, steps=steps
    )
    order = math.inf if norm == "linf" else 2
    assert (found - x).flatten(1).norm(order, dim=1).max() <= eps + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1


# ---------------------------------------------------------------------------- direction and projection


@given(st.integers(0, 10_000), st.floats(-35, 30))
def test_a_direction_has_length_one_whatever_the_scale_of_the_gradient(seed, power):
    length = direction(gaussian(seed) * 10.0**power, "l2").double().flatten(1).norm(dim=1)
    torch.testing.assert_close(length, torch.ones_like(length), rtol=0, atol=1e-6)


def test_a_half_precision_gradient_gives_a_float32_direction():
    length = direction(gaussian(1).bfloat16(), "l2")
    assert length.dtype == torch.float32
    torch.testing.assert_close(length.flatten(1).norm(dim=1), torch.ones(3), rtol=0, atol=1e-6)


@given(st.integers(0, 10_000), st.sampled_from(NORMS), st.floats(0.01, 10))
def test_projection_leaves_the_inside_alone_and_puts_the_rest_on_the_surface(seed, norm, eps):
    delta = gaussian(seed)
    order = math.inf if norm == "linf" else 2
    length = delta.flatten(1).norm(order, dim=1)
    after = project(delta, norm, eps)
    expected = length.clamp_max(eps)
    torch.testing.assert_close(after.flatten(1).norm(order, dim=1), expected, rtol=1e-5, atol=1e-7)
    inside = length < eps
    assert torch.equal(after[inside], delta[inside])


def test_projecting_nothing_gives_nothing():
    assert torch.equal(project(torch.zeros(SHAPE), "l2", 1.0), torch.zeros(SHAPE))


# ------------------------------------------------------------------------------------------ the 8-bit grid


@st.composite
def perturbed(draw, norm):
    """An 8-bit image, an image within eps of it (or a float32 rounding beyond), and eps."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = (draw(st.integers(1, 3)), draw(st.sampled_from([1, 3])), draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    eps = draw(st.floats(0.004, 0.2) | st.floats(0.2, 3.0))
    clean = rng.integers(0, 256, shape, dtype=np.uint8)
    delta = rng.standard_normal(shape) * (rng.random(shape) < draw(st.sampled_from([0.1, 1.0])))
    if norm == "linf":
        delta = np.where(rng.random(shape) < 0.5, np.sign(delta), delta / 4)  # half of the pixels at the edge
    flat = np.abs(delta).max((1, 2, 3)) if norm == "linf" else np.sqrt((delta**2).sum((1, 2, 3)))
    reach = draw(st.sampled_from([0.5, 0.99, 1.0, 1 + 1e-6]))
    delta *= (eps * reach / np.maximum(flat, 1e-9))[:, None, None, None]
    x = np.clip(clean / 255 + delta, 0, 1).astype(np.float32)
    return torch.from_numpy(x), torch.from_numpy(clean), eps


def levels(saved, clean):
    return (saved.to(torch.int64) - clean.to(torch.int64)).flatten(1)


def plainly(x, clean):
    """Whole levels from the clean image; a value halfway between two, as 0.5 is, goes to the even one of these."""
    return (x.double() * 255 - clean).flatten(1).round().to(torch.int64)


@given(perturbed("l2"))
def test_a_saved_image_is_inside_the_l2_ball_counted_in_whole_levels(case):
    x, clean, eps = case
    saved = round_in_ball(x, clean, "l2", eps)
    assert saved.dtype == torch.uint8
    assert saved.shape == clean.shape
    assert ((levels(saved, clean) ** 2).sum(1) <= (255 * eps) ** 2 + 1e-6).all()


@given(perturbed("linf"))
def test_a_saved_image_is_inside_the_linf_ball_counted_in_whole_levels(case):
    x, clean, eps = case
    saved = round_in_ball(x, clean, "linf", eps)
    assert saved.dtype == torch.uint8
    assert levels(saved, clean).abs().max() <= 255 * eps + 1e-6


@given(perturbed("l2"))
def test_plain_rounding_stands_where_it_is_inside_the_l2_ball(case):
    x, clean, eps = case
    plain, found = plainly(x, clean), levels(round_in_ball(x, clean, "l2", eps), clean)
    inside = (plain**2).sum(1) <= (255 * eps) ** 2
    assert torch.equal(found[inside], plain[inside])


@given(perturbed("linf"))
def test_in_linf_each_pixel_is_plainly_rounded_or_at_the_last_level_inside(case):
    x, clean, eps = case
    limit = math.floor(255 * eps + 1e-6)
    assert torch.equal(levels(round_in_ball(x, clean, "linf", eps), clean), plainly(x, clean).clamp(-limit, limit))


@given(perturbed("l2"))
def test_no_more_pixels_are_pulled_in_than_it_takes(case):
    x, clean, eps = case
    plain, found = plainly(x, clean), levels(round_in_ball(x, clean, "l2", eps), clean)
    pulled = plain != found
    # Pulled in means one level nearer to the clean image. (Two rounds need an x that is outside by more than
    # rounding, which none here is.)
    assert torch.equal(plain.abs() - found.abs(), pulled.to(torch.int64))
    # A pixel at level m saves m² − (m − 1)² = 2m − 1. Were one pixel fewer enough, then leaving out the one
    # that saves most would still be inside, or the order is not a prefix; so this holds in every row that moved.
    most = torch.where(pulled, 2 * plain.abs() - 1, 0).amax(1)
    rows = pulled.any(1)
    assert ((found**2).sum(1) + most > (255 * eps) ** 2)[rows].all()


@given(perturbed("l2"))
def test_the_pixels_that_rounding_moved_outward_the_most_are_pulled_in(case):
    x, clean, eps = case
    plain, found = plainly(x, clean), levels(round_in_ball(x, clean, "l2", eps), clean)
    outward = plain.abs() - ((x.double() * 255).flatten(1) - clean.flatten(1)).abs()
    pulled, stayed = plain != found, (plain == found) & (plain != 0)
    least = torch.where(pulled, outward, torch.inf).amin(1)
    most = torch.where(stayed, outward, -torch.inf).amax(1)
    assert (least >= most)[pulled.any(1)].all()


@given(perturbed("l2"))
def test_nearly_all_of_the_radius_is_kept(case):
    x, clean, eps = case
    found = levels(round_in_ball(x, clean, "l2", eps), clean).double().norm(dim=1)
    asked = ((x.double() * 255).flatten(1) - clean.flatten(1)).norm(dim=1).clamp_max(255 * eps)
    # Rounding moves each of D pixels by at most half a level, so the norm by at most √D / 2 levels. Pulling in
    # stops within 2m − 1 ≤ 2 · 255 ε squared levels of the radius, which is a norm of at most one level.
    assert (found >= asked - math.sqrt(clean[0].numel()) / 2 - 1 - 1e-4).all()


def test_a_cifar_image_at_eps_one_half_is_saved_within_one_half_and_loses_less_than_a_thousandth():
    # SCIENCE.md: plain rounding turns L2 .500 into .501, truncation into .513.
    rng = np.random.default_rng(0)
    clean = torch.from_numpy(rng.integers(64, 192, (8, 3, 32, 32), dtype=np.uint8))
    delta = gaussian(20, (8, 3, 32, 32))
    x = clean / 255 + 0.5 * delta / delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    plain = plainly(x, clean).double().norm(dim=1) / 255
    found = levels(round_in_ball(x, clean, "l2", 0.5), clean).double().norm(dim=1) / 255
    assert (plain > 0.5).all()
    assert (found <= 0.5).all()
    # The last pixel pulled in saves at most 2m − 1 squared levels, m ≤ 13: 25 / (2 · 127.5) of a level in the norm.
    assert (found > 0.5 - 25 / (2 * 127.5) / 255 - 1e-5).all()


def test_levels_that_float_arithmetic_would_lose_are_kept():
    # 8 / 255 · 255 is 8 only up to rounding: the eighth level is allowed.
    for k in range(1, 33):
        clean = torch.full((1, 1, 2, 2), 100, dtype=torch.uint8)
        x = clean.double() / 255 + k / 255
        assert (round_in_ball(x, clean, "linf", k / 255) == 100 + k).all()


def test_the_grid_never_leaves_eight_bits():
    clean = torch.tensor([[[[0, 255]]]], dtype=torch.uint8)
    x = torch.tensor([[[[-0.3, 1.3]]]])
    for norm in NORMS:
        assert torch.equal(round_in_ball(x, clean, norm, 2.0), clean)
