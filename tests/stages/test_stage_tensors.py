"""Pixels and tensors: 8-bit images to [0, 1] and back, batches of one shape, channel statistics."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stages.tensors import channel_statistics, in_batches, to_pixels, to_unit


def test_every_level_is_exactly_k_over_255():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    assert torch.equal(to_unit(pixels).flatten(), torch.arange(256).float() / 255)


def test_pixels_change_their_layout_and_nothing_else():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    back = (to_unit(pixels) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(back, pixels)


# -------------------------------------------------------------------------------------- batches


@given(hnp.arrays(np.int64, st.tuples(st.integers(1, 40), st.integers(1, 3))), st.integers(1, 50))
def test_every_batch_has_one_shape_and_every_row_comes_back_once(rows, size):
    shapes = set()

    def double(x, number):
        shapes.add((x.shape, number.shape))
        return 2 * x + number[:, None]

    number = np.arange(len(rows))
    assert np.array_equal(in_batches(double, size, rows, number), 2 * rows + number[:, None])
    assert shapes == {((size, rows.shape[1]), (size,))}


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))))
def test_pixels_survive_the_way_to_the_unit_interval_and_back(pixels):
    assert np.array_equal(to_pixels(to_unit(pixels)), pixels)


@given(hnp.arrays(np.float32, (2, 3, 4, 5), elements=st.floats(-0.5, 1.5, width=32)))
def test_what_is_saved_is_the_nearest_level(x):
    pixels = to_pixels(torch.from_numpy(x)).transpose(0, 3, 1, 2)
    assert (np.abs(pixels - 255 * x.clip(0, 1).astype(np.float64)) <= 0.5 + 1e-9).all()


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 5), st.integers(2, 6), st.integers(2, 6), st.just(3))))
def test_channel_statistics_are_mean_and_deviation(pixels):
    values = pixels.astype(np.float64)
    sums, squares = values.sum((0, 1, 2)).tolist(), (values**2).sum((0, 1, 2)).tolist()
    mean, std = channel_statistics(sums, squares, pixels[..., 0].size)
    np.testing.assert_allclose(mean, values.mean((0, 1, 2)) / 255, rtol=1e-12)
    # A channel that hardly varies is divided by one level instead of by zero.
    np.testing.assert_allclose(std, np.maximum(values.std((0, 1, 2)), 1) / 255, rtol=1e-9)
