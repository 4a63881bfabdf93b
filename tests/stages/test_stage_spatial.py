"""Rotations and shifts by whole pixels, and the search over them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.recipes import Spatial
from stages.spatial import candidates, search, transform

SHAPE = (4, 3, 10, 10)
FEW = Spatial(grid=[3, 3, 3])


def images(seed=0, shape=SHAPE):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def moved(x, degrees=0.0, down=0.0, right=0.0):
    return transform(x, *(torch.full((len(x),), float(value)) for value in (degrees, down, right)))


@pytest.mark.parametrize("shape", [SHAPE, (2, 1, 7, 12), (1, 3, 224, 224)])
def test_no_rotation_and_no_shift_give_the_image_itself(shape):
    x = images(shape=shape)
    assert torch.equal(moved(x), x)


@pytest.mark.parametrize("side", [9, 10])
@pytest.mark.parametrize("quarters", [-1, 1, 2, 3])
def test_a_square_image_is_turned_counter_clockwise(side, quarters):
    x = images(shape=(2, 3, side, side))
    torch.testing.assert_close(moved(x, degrees=90 * quarters), x.rot90(quarters, (2, 3)), rtol=0, atol=1e-6)


def test_a_shift_by_whole_pixels_is_a_slice_and_black_comes_in():
    x = images(shape=(2, 3, 10, 20))
    lower = moved(x, down=0.2)  # 2 of 10 pixels
    torch.testing.assert_close(lower[:, :, 2:], x[:, :, :-2], rtol=0, atol=1e-6)
    assert lower[:, :, :2].abs().max() < 1e-6
    left = moved(x, right=-0.15)  # 3 of 20 pixels
    torch.testing.assert_close(left[..., :-3], x[..., 3:], rtol=0, atol=1e-6)
    assert left[..., -3:].abs().max() < 1e-6


def test_the_image_is_turned_first_and_shifted_then():
    x = images()
    torch.testing.assert_close(moved(x, 90, 0.1, 0.2), moved(x.rot90(1, (2, 3)), 0, 0.1, 0.2), rtol=0, atol=1e-6)


def test_half_a_pixel_is_the_mean_of_two():
    x = images()
    torch.testing.assert_close(moved(x, right=0.05)[..., 1:], (x[..., 1:] + x[..., :-1]) / 2, rtol=0, atol=1e-6)


@given(st.integers(0, 1000), st.floats(-180, 180), st.floats(-0.5, 0.5), st.floats(-0.5, 0.5))
def test_pixels_stay_in_the_box_and_images_do_not_depend_on_each_other(seed, degrees, down, right):
    x = images(seed)
    both = moved(x, degrees, down, right)
    assert both.min() >= 0
    assert both.max() <= 1
    assert torch.equal(moved(x[1:2], degrees, down, right), both[1:2])


# --------------------------------------------------------------------------------------- candidates


def test_the_default_grid_is_that_of_the_paper():
    tried = candidates(Spatial(), np.array([3, 8]))
    assert tried.shape == (2, 5 * 5 * 31, 3)
    assert len(np.unique(tried[0], axis=0)) == 775
    np.testing.assert_allclose(np.unique(tried[0, :, 0]), np.linspace(-30, 30, 31))
    for shift in (1, 2):
        np.testing.assert_allclose(np.unique(tried[0, :, shift]), np.linspace(-0.1, 0.1, 5))
    assert (tried == 0).all(-1).any(-1).all()  # the untouched image, exactly


def test_the_sides_of_the_grid_are_shifts_down_shifts_right_and_rotations():
    tried = candidates(Spatial(grid=[2, 1, 4]), np.arange(1))[0]
    assert [len(np.unique(tried[:, column])) for column in range(3)] == [4, 2, 1]  # degrees, down, right
    assert (tried[:, 2] == 0).all()  # a single point is the middle


def test_random_candidates_are_drawn_per_image_and_fill_the_space():
    recipe = Spatial(search="random", tries=200, rotation=20, translation=0.3, seed=5)
    tried = candidates(recipe, np.array([7, 3]))
    assert tried.shape == (2, 200, 3)
    np.testing.assert_array_equal(candidates(recipe, np.array([3]))[0], tried[1])
    reach = np.array([20, 0.3, 0.3])
    assert (np.abs(tried) <= reach).all()
    assert (tried.max((0, 1)) > 0.9 * reach).all()
    assert (tried.min((0, 1)) < -0.9 * reach).all()
    assert not np.array_equal(candidates(recipe.model_copy(update={"seed": 6}), np.array([7, 3])), tried)


# ------------------------------------------------------------------------------------------- search


@pytest.mark.parametrize("recipe", [FEW, Spatial(search="random", tries=9)])
def test_a_search_finds_for_each_image_the_least_of_all_losses_and_adds_them_up(recipe):
    x, index = images(), np.array([5, 2, 9, 4])
    weight = torch.randn(SHAPE[1:], generator=torch.Generator().manual_seed(1))

    def loss(z):
        return (z * weight).flatten(1).sum(1)

    found = search(recipe, x, index, loss)
    tried = torch.from_numpy(candidates(recipe, index).copy())
    every = torch.stack([loss(transform(x, *tried[:, t].unbind(1))) for t in range(tried.shape[1])])
    least, which = every.min(0)
    assert torch.equal(found.loss, least)
    torch.testing.assert_close(found.total, every.sum(0))
    assert torch.equal(found.transformation, tried[torch.arange(4), which])
    assert torch.equal(found.image, transform(x, *found.transformation.unbind(1)))
    assert len(set(which.tolist())) > 1  # the images do not all want the same


def test_a_search_of_a_grid_finds_the_turn_that_undoes_a_turn():
    x = images(shape=(1, 1, 9, 9))
    found = search(
        Spatial(rotation=90, grid=[1, 1, 3]), x.rot90(1, (2, 3)), np.arange(1), lambda z: ((z - x) ** 2).sum((1, 2, 3))
    )
    assert found.transformation.tolist() == [[-90, 0, 0]]
