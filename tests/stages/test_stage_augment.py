"""Random views of a training batch."""

import math

import pytest
import torch
import torch.nn.functional as F

from stages.augment import augment


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


@pytest.mark.parametrize("how", ["flip", "crop-flip", "spatial"])
def test_the_generator_alone_decides(how):
    x = batch()
    assert torch.equal(augment(x, how, draw(1)), augment(x, how, draw(1)))
    assert not torch.equal(augment(x, how, draw(1)), augment(x, how, draw(2)))
