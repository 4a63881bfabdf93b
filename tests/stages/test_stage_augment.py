"""Data augmentation of a training batch."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import ks_2samp
from torchvision import transforms
from torchvision.transforms import functional

from stages.augment import (
    LIGHT,
    RATIO,
    SCALE,
    VALUES,
    VECTORS,
    VIEWS,
    augment,
    boxes,
    jittered,
    lit,
    recoloured,
    resized_crop,
    view,
)
from stages.errors import BadInput


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(count=64, height=8, width=8):
    return torch.rand(count, 3, height, width, generator=draw(9))


def test_none_gives_the_batch_itself():
    x = batch()
    assert augment(x, "none", draw()) is x


def test_none_draws_nothing():
    generator = draw()
    before = generator.get_state()
    augment(batch(), "none", generator)
    assert torch.equal(before, generator.get_state())


def test_a_flip_gives_each_image_or_its_mirror():
    x = batch()
    y = augment(x, "flip", draw())
    kept = (y == x).flatten(1).all(1)
    mirrored = (y == x.flip(3)).flatten(1).all(1)
    assert bool((kept | mirrored).all())
    assert kept.any()
    assert mirrored.any()


def test_half_of_the_images_are_flipped():
    x = batch(2000, 1, 2)
    flipped = (augment(x, "flip", draw()) != x).flatten(1).any(1).double().mean().item()
    assert abs(flipped - 0.5) < 5 * (0.25 / 2000) ** 0.5  # five standard deviations of a fair coin


@pytest.mark.parametrize("size", [(8, 8), (8, 16), (32, 32)])
def test_a_crop_is_the_image_or_its_mirror_shifted_by_at_most_an_eighth(size):
    height, width = size
    x = batch(40, height, width)
    pad = width // 8
    y = augment(x, "crop-flip", draw())
    assert y.shape == x.shape
    padded = [F.pad(view, (pad,) * 4) for view in (x, x.flip(3))]
    for i in range(len(x)):
        views = [
            view[i, :, down : down + height, right : right + width]
            for view in padded
            for down in range(2 * pad + 1)
            for right in range(2 * pad + 1)
        ]
        assert any(torch.equal(y[i], view) for view in views)


def test_a_shift_is_of_a_sixteenth_at_most_and_mirrors_the_edges():
    x = batch(40, 32, 32)
    y = augment(x, "shift-flip", draw())
    padded = [F.pad(view, (2,) * 4, mode="reflect") for view in (x, x.flip(3))]
    for i in range(len(x)):
        views = [view[i, :, d : d + 32, r : r + 32] for view in padded for d in range(5) for r in range(5)]
        assert any(torch.equal(y[i], view) for view in views)


@pytest.mark.parametrize("how", ["flip", "crop-flip", "shift-flip", "resized-crop", "imagenet"])
def test_flips_that_are_given_are_not_drawn(how):
    x, every = batch(40), np.ones(40, bool)
    one, other = (augment(x, how, draw(), flips) for flips in (every, ~every))
    if how == "flip":
        assert torch.equal(one, x.flip(3)) and torch.equal(other, x)
    assert not torch.equal(one, other)


def test_images_of_one_batch_are_shifted_differently():
    x = batch(1).expand(40, -1, -1, -1)
    views = augment(x, "crop-flip", draw())
    assert len({view.numpy().tobytes() for view in views}) > 9  # more than one direction of flip can give


def test_spatial_views_fill_the_space_that_the_spatial_attack_searches():
    # The centre of mass of one bright spot at the middle of the right edge says how the image was turned and shifted.
    x = torch.zeros(400, 1, 41, 41)
    x[:, :, 20, 30] = 1  # ten pixels to the right of the centre
    y = augment(x, "spatial", draw())[:, 0]
    place = torch.arange(41.0) - 20
    down, right = ((y * axis).sum((1, 2)) / y.sum((1, 2)) for axis in (place[:, None], place))
    reach = 4.1 + 10 * math.sin(math.radians(30))  # a tenth of 41 pixels, and the turn
    assert down.abs().max() <= reach + 0.1
    assert down.min() < -0.75 * reach
    assert down.max() > 0.75 * reach
    assert right.max() <= 10 + 4.1 + 0.1
    assert right.min() < 10 * math.cos(math.radians(30)) - 0.75 * 4.1


@pytest.mark.parametrize("how", ["flip", "crop-flip", "shift-flip", "spatial"])
def test_the_generator_alone_decides(how):
    x = batch()
    assert torch.equal(augment(x, how, draw(1)), augment(x, how, draw(1)))
    assert not torch.equal(augment(x, how, draw(1)), augment(x, how, draw(2)))


SIZES = [(32, 32), (24, 40), (224, 224)]


@pytest.mark.parametrize("size", SIZES)
def test_a_resized_crop_is_torchvisions(size):
    x = batch(16, *size)
    found = boxes(x, draw(3))
    y = resized_crop(x, found)
    for i, (top, left, height, width) in enumerate(found.T.int().tolist()):
        theirs = functional.resized_crop(x[i], top, left, height, width, list(size), antialias=True)
        torch.testing.assert_close(y[i], theirs, rtol=0, atol=2e-4 if max(size) > 100 else 2e-5)


@pytest.mark.parametrize("size", [*SIZES, (8, 64), (64, 8), (1, 1)])
def test_crops_are_drawn_as_torchvision_draws_them(size):
    x = torch.zeros(1500, 1, 1, 1).expand(-1, -1, *size)
    ours = boxes(x, draw(1)).T
    torch.manual_seed(0)
    theirs = torch.tensor([transforms.RandomResizedCrop.get_params(x[0], SCALE, RATIO) for _ in range(len(x))])
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= size[0]).all()
    assert (ours[:, 1] + ours[:, 3] <= size[1]).all()
    for column in range(4):  # Kolmogorov and Smirnov: two samples of one distribution are seldom this far apart
        assert ks_2samp(ours[:, column].numpy(), theirs[:, column].numpy()).pvalue > 1e-4


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_colours_change_as_torchvision_changes_them(order):
    x, factors = batch(8, 6, 5), 1 + 0.4 * (2 * torch.rand(3, 8, generator=draw(2)) - 1)
    theirs = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    y = recoloured(x, factors, list(order))
    for i in range(len(x)):
        image = x[i]
        for kind in order:
            image = theirs[kind](image, float(factors[kind, i]))
        torch.testing.assert_close(y[i], image, rtol=0, atol=1e-5)


def test_colours_are_jittered_in_every_order_by_up_to_a_tenth():
    x = torch.full((4000, 3, 1, 1), 0.5)
    brightness = jittered(x, draw())[:, 0, 0, 0] / 0.5  # of grey, contrast and saturation change nothing
    assert 0.9 <= brightness.min() < 0.902 < 1.098 < brightness.max() <= 1.1001
    seen = {tuple(torch.randperm(3, generator=draw(seed)).tolist()) for seed in range(40)}
    assert len(seen) == 6


def test_lighting_noise_has_the_covariance_of_imagenets_colours():
    x = torch.full((20_000, 3, 2, 2), 0.5)
    noise = lit(x, draw()) - x
    assert (noise == noise[:, :, :1, :1]).all()
    vectors, values = torch.tensor(VECTORS), torch.tensor(VALUES)
    wanted = LIGHT**2 * vectors @ torch.diag(values**2) @ vectors.T
    torch.testing.assert_close(noise[:, :, 0, 0].T.cov(), wanted, rtol=0.05, atol=1e-7)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(3), rtol=0, atol=1e-3)


@pytest.mark.parametrize("how", ["resized-crop", "imagenet"])
def test_new_views_stay_in_the_box_and_come_from_the_generator_alone(how):
    x = batch(40, 32, 32)
    y = augment(x, how, draw(5))
    assert y.shape == x.shape
    assert 0 <= y.min() < y.max() <= 1
    torch.manual_seed(1)
    assert torch.equal(y, augment(x, how, draw(5)))
    assert not torch.equal(y, augment(x, how, draw(6)))


def test_grey_images_have_no_colours_to_change():
    with pytest.raises(BadInput, match="changes colours, and the images have 1 channel"):
        augment(batch()[:, :1], "imagenet", draw())


def test_a_view_is_the_image_mirrored_and_shifted_with_its_edge_repeated():
    x = torch.rand(2, 3, 32, 32)
    shifts = {0: (0, 0), 1: (2, -1), 2: (-1, 2), 3: (-2, 1)}
    for number in range(VIEWS):
        down, right = shifts[number // 2]
        seen = x.flip(3) if number % 2 else x
        padded = np.pad(seen.numpy(), [(0, 0), (0, 0), (2, 2), (2, 2)], mode="edge")
        expected = padded[:, :, 2 - down : 34 - down, 2 - right : 34 - right]
        np.testing.assert_array_equal(view(x, number).numpy(), expected)
