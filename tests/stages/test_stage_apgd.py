"""APGD against known optima, the paper's own definitions, and torchattacks."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.apgd import apgd, checkpoints, dlr, dlr_toward, losses
from stages.pgd import pgd
from stages.targeted_pgd import untargeted
from stages.tensors import to_unit

SHAPE = (3, 2, 4, 5)
EPS = 0.3
NORMS = ["l2", "linf"]


def gaussian(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flat(x):
    """A model whose logits are the pixels."""
    return x.flatten(1)


def never(logits):
    return torch.zeros(len(logits), dtype=torch.bool)


def unit(w_NCHW, norm):
    return w_NCHW.sign() if norm == "linf" else w_NCHW / (w_NCHW**2).sum((1, 2, 3), keepdim=True).sqrt()


@pytest.mark.parametrize("norm", NORMS)
def test_a_linear_loss_is_maximised_at_the_edge_of_the_ball(norm):
    x, w = torch.full(SHAPE, 0.5), gaussian(1)
    found = apgd(flat, lambda z: (z * w.flatten(1)).sum(1), never, x, norm=norm, eps=EPS, steps=10)
    torch.testing.assert_close(found, x + EPS * unit(w, norm), rtol=0, atol=1e-5)


def test_from_the_second_step_on_a_quarter_of_the_last_step_is_carried_on():
    x, slopes, seen = torch.full(SHAPE, 0.5), [gaussian(seed) for seed in (5, 6, 7)], []

    def watched(z):
        seen.append(z.detach())
        return flat(z)

    def loss(z):
        return (z * slopes[min(len(seen), 3) - 1].flatten(1)).sum(1)

    apgd(watched, loss, never, x, norm="l2", eps=EPS, steps=10)  # the first checkpoint is after the third step
    first = x + EPS * unit(slopes[0], "l2")

    def inside(z):
        return x + (z - x) * (EPS / (z - x).flatten(1).norm(dim=1)).clamp_max(1).view(-1, 1, 1, 1)

    towards = inside(first + 2 * EPS * unit(slopes[1], "l2"))
    second = inside(first + 0.75 * (towards - first) + 0.25 * (first - x))  # algorithm 1
    for found, expected in zip(seen, [x, first, second], strict=False):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_an_optimum_inside_the_ball_is_closed_in_on_because_the_step_shrinks(norm):
    x = torch.full(SHAPE, 0.5)
    goal = x + 0.4 * EPS * unit(gaussian(2), norm)
    weight = gaussian(3).abs() + 0.3  # curvature that differs from pixel to pixel

    def loss(z):
        return -(weight * (z.view(SHAPE) - goal) ** 2).flatten(1).sum(1)

    def far(z):
        return (z - goal).flatten(1).norm(dim=1).max()

    fixed = pgd(lambda z: -loss(z), x, norm=norm, eps=EPS, step_size=2 * EPS, steps=200)
    found = apgd(flat, loss, never, x, norm=norm, eps=EPS, steps=200)
    assert far(found) < 0.03 * far(x)
    assert far(fixed) > 0.5 * far(x)  # the same steps without shrinking go nowhere


@given(st.integers(0, 1000), st.sampled_from(NORMS), st.integers(1, 30))
@settings(max_examples=20)
def test_what_is_found_is_in_the_ball_and_the_box_and_no_worse_than_the_start(seed, norm, steps):
    x, goal = gaussian(seed).sigmoid(), gaussian(seed + 1).sigmoid()
    start = (x + EPS * 0.3 * unit(gaussian(seed + 2), norm)).clamp(0, 1)

    def loss(z):
        return torch.sin(3 * (z - goal.flatten(1))).sum(1)

    found = apgd(flat, loss, never, x, norm=norm, eps=EPS, steps=steps, start=start)
    assert found.min() >= 0
    assert found.max() <= 1
    order = 2 if norm == "l2" else torch.inf
    assert torch.linalg.vector_norm(found - x, order, dim=(1, 2, 3)).max() < EPS + 1e-5
    assert (loss(flat(found)) >= loss(flat(start))).all()
    beside = torch.cat([start[:1], x[1:]])  # other neighbours in the batch
    assert torch.equal(apgd(flat, loss, never, x, norm=norm, eps=EPS, steps=steps, start=beside)[0], found[0])


def test_an_iterate_that_is_looked_for_is_given_even_where_another_has_a_higher_loss():
    x = torch.full((2, 1, 1, 1), 0.5)

    def loss(z):
        return -(((z - 0.5) ** 2).sum(1))  # highest at x itself

    def moved(z):
        return (z[:, 0] - 0.5).abs() > 0.05

    start = torch.tensor([0.7, 0.5]).view(2, 1, 1, 1)
    found = apgd(flat, loss, moved, x, norm="linf", eps=0.3, steps=8, start=start)
    assert moved(flat(found)).tolist() == [True, False]
    assert found[1] == 0.5  # never looked for: the point of highest loss


def test_the_checkpoints_are_those_of_the_paper():
    assert sorted(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert sorted(checkpoints(10)) == [3, 5, 6, 7, 8, 9, 10]


# -------------------------------------------------------------------------------------------- losses

LOGITS = torch.tensor([[3.0, 1.0, 0.5, -1.0, 2.0], [3.0, 1.0, 0.5, -1.0, 2.0]])


def test_the_dlr_loss_is_equation_6():
    # Sorted: 3, 2, 1, .5, −1. Right (class 0): −(3 − 2) / (3 − 1). Wrong (class 3): −(−1 − 3) / (3 − 1).
    assert dlr(LOGITS, torch.tensor([0, 3])).tolist() == [-0.5, 2.0]


def test_the_targeted_dlr_loss_is_equation_7():
    # Of class 0 toward 4: −(3 − 2) / (3 − (1 + .5) / 2); toward itself 0.
    assert dlr_toward(LOGITS, torch.tensor([0, 0]), torch.tensor([4, 0])).tolist() == pytest.approx([-1 / 2.25, 0])


def test_dlr_does_not_change_with_the_scale_of_the_logits_and_equal_logits_give_zero():
    label, target = torch.tensor([1, 2]), torch.tensor([2, 0])
    for scale in (1e-3, 50.0):
        torch.testing.assert_close(dlr(scale * LOGITS, label), dlr(LOGITS, label))
        torch.testing.assert_close(dlr_toward(scale * LOGITS, label, target), dlr_toward(LOGITS, label, target))
    assert dlr(torch.zeros(2, 5), label).tolist() == [0, 0]
    assert dlr_toward(torch.zeros(2, 5), label, target).tolist() == [0, 0]


@pytest.mark.parametrize(("classes", "untargeted", "targeted"), [(2, 1, 1), (3, 2, 1), (4, 2, 2)])
def test_cross_entropy_alone_is_raised_where_there_are_too_few_classes_for_dlr(classes, untargeted, targeted):
    label, target = torch.tensor([0, 1]), torch.tensor([1, 0])
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [2.0, 3.0, 1.0, 0.0]])[:, :classes]
    less = logits - 0.1 * torch.nn.functional.one_hot(label, classes)  # less of the true class
    for aim, count in ((None, untargeted), (target, targeted)):
        raised = losses(label, aim, classes)
        assert len(raised) == count
        assert all((loss(less) > loss(logits)).all() for loss in raised)


# --------------------------------------------------------------------------------------- torchattacks


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.8), ("linf", 0.15)])
def test_robust_accuracy_is_that_of_torchattacks_and_no_higher_than_under_pgd(
    norm, eps, trained, digits, record_property
):
    torchattacks = pytest.importorskip(
        "torchattacks", reason="torchattacks is a tool of developers, see pyproject.toml"
    )
    count, steps = 200, 10
    x, label = to_unit(digits["test"].images()[:count]), torch.from_numpy(digits["test"].label[:count])

    def right(z):
        with torch.no_grad():
            return float((trained(z).argmax(1) == label).float().mean())

    found = {}
    for name, loss in zip(("ce", "dlr"), losses(label, None, 10), strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torchattacks warns of is its own affair
            peer = torchattacks.APGD(trained, {"l2": "L2", "linf": "Linf"}[norm], eps, steps, loss=name)(x, label)
        found[name] = right(apgd(trained, loss, lambda z: z.argmax(1) != label, x, norm=norm, eps=eps, steps=steps))
        record_property(name, [found[name], right(peer)])
        print(f"{norm} {eps} {name}: {found[name]:.3f}, torchattacks {right(peer):.3f}")
        assert found[name] <= right(peer) + 0.02
        assert found[name] >= right(peer) - 0.05  # a far lower one would have left the ball
    plain = right(pgd(untargeted(trained, label), x, norm=norm, eps=eps, step_size=eps / 5, steps=steps))
    assert found["ce"] <= plain + 0.015
    assert 0.05 < plain < 0.5  # where attacks differ at all
