"""Inverting features into images."""

import numpy as np
import pytest
import torch
from torch import nn

from stages.errors import BadData, BadInput
from stages.features import Penultimate
from stages.invert import Inverter, derangement, noise
from stages.model import Classifier, Design
from stages.recipes import Invert
from stages.shard import Shard, pack, rows, unpack
from stages.tensors import to_unit

SIDE = 4


def recipe(**asked):
    return Invert(**{"images": "clean", "model": "standard", "steps": 60, "step_size": 0.05, "batch_size": 8} | asked)


def model_of(*layers, tmp_path, side=SIDE):
    model = Classifier(Design("small_cnn", 2, (1, side, side), (0.0,), (1.0,)), tmp_path)
    model.network = nn.Sequential(nn.Flatten(), *layers)
    return model.eval().requires_grad_(False)


@pytest.fixture
def linear(tmp_path):
    """Three features W x of sixteen pixels."""
    torch.manual_seed(0)
    return model_of(nn.Linear(16, 3, bias=False), nn.Linear(3, 2), tmp_path=tmp_path)


def shard_of(count=11, seed=0, low=100, high=156):
    """Images in the middle of the box, so that clipping does not affect the result."""
    pixels = np.random.default_rng(seed).integers(low, high, (count, SIDE, SIDE, 1), dtype=np.uint8)
    index = np.arange(40, 40 + count)
    return Shard("train-000003", index, index % 2, (index + 1) % 2, pixels)


# -------------------------------------------------------------------------------- what is found


def test_of_a_linear_model_the_nearest_image_with_the_same_features_is_found(linear):
    # The gradient stays in the rows of W: z = s + W⁺ (W x − W s), the nearest point to the start s.
    shard, asked = shard_of(), recipe(steps=400, step_size=0.005)
    x = shard.images().reshape(11, -1) / 255
    begun = x[derangement(asked.seed, shard)]
    weight = linear.network[1].weight.numpy().astype(np.float64)
    nearest = begun + (x - begun) @ weight.T @ np.linalg.pinv(weight).T
    after = Inverter(asked, linear)(shard)
    found = after.images().reshape(11, -1) / 255
    # The last step of fixed length passes by the point, and each pixel is rounded to a level.
    assert (np.linalg.norm(found - nearest, axis=1) < 0.02).all()
    assert np.linalg.norm(begun - nearest, axis=1).mean() > 0.1
    assert (after.attack["distance"] < 0.02).all()


def test_a_feature_that_a_relu_has_killed_is_found_again(tmp_path):
    # The feature is ReLU(mean − 0.5): 0.2 for the bright images, dead at the dark ones, where searches start.
    model = model_of(nn.Linear(16, 1), nn.ReLU(), nn.Linear(1, 2), tmp_path=tmp_path)
    model.network[1].weight.fill_(1 / 16)
    model.network[1].bias.fill_(-0.5)
    pixels = np.full((6, SIDE, SIDE, 1), 178, dtype=np.uint8)
    pixels[3:] = 76
    index = np.arange(6)
    after = Inverter(recipe(), model)(Shard("train-000000", index, index % 2, index % 2, pixels))
    mean = after.images()[:3].mean((1, 2, 3)) / 255
    assert np.allclose(mean, 178 / 255, atol=0.02)
    assert (after.attack["distance"][:3] < 0.02).all()


def test_the_distance_is_that_of_the_saved_image_and_nearer_than_where_it_started(digits, trained, part):
    shard = part(digits["train"], slice(0, 20))
    asked = recipe(steps=20, step_size=0.2)
    after = Inverter(asked, trained)(shard)
    features = Penultimate(trained)
    with torch.no_grad():
        wanted, found = features(to_unit(shard.images())), features(to_unit(after.images()))
        begun = features(to_unit(shard.images()[derangement(asked.seed, shard)]))
    np.testing.assert_allclose(after.attack["distance"], (found - wanted).norm(dim=1), rtol=1e-3, atol=1e-4)
    assert (after.attack["distance"] < 0.7 * (begun - wanted).norm(dim=1).numpy()).all()
    assert after.attack["distance"].dtype == np.float32


def test_labels_stay_and_no_target_is_spoken_of(linear):
    shard = shard_of()
    after = Inverter(recipe(steps=2), linear)(shard)
    assert np.array_equal(after.label, shard.label)
    assert np.array_equal(after.source_label, shard.source_label)
    assert np.array_equal(after.index, shard.index)
    assert set(after.attack) == {"l2", "linf", "distance"}
    levels = (after.images().astype(float) - shard.images()).reshape(11, -1) / 255
    np.testing.assert_allclose(after.attack["l2"], np.linalg.norm(levels, axis=1))
    np.testing.assert_allclose(after.attack["linf"], np.abs(levels).max(1))


def test_the_distance_is_kept_in_the_shard_and_in_its_rows(linear):
    after = Inverter(recipe(steps=2), linear)(shard_of())
    back = unpack(after.name, pack(after), channels=1)
    np.testing.assert_allclose(back.attack["distance"], after.attack["distance"], atol=1e-6)
    np.testing.assert_allclose(rows(after, pack(after))["distance"].to_numpy(), after.attack["distance"])
    assert rows(after, pack(after))["success"].null_count == len(after)


def test_bfloat16_finds_nearly_the_same(linear):
    after = Inverter(recipe(precision="bfloat16", steps=60, step_size=0.02), linear)(shard_of())
    assert (after.attack["distance"] < 0.05).all()


# -------------------------------------------------------------------------------- where it starts


@pytest.mark.parametrize("count", [2, 3, 11, 50])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_image_starts_at_another_of_the_shard_and_each_is_a_start_once(count, seed):
    pixels = np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1)
    index = np.arange(count)
    order = derangement(seed, Shard("train-000000", index, index, index, pixels))
    assert sorted(order) == list(range(count))
    assert (order != index).all()


def test_the_derangement_comes_from_the_seed_and_the_shard():
    def order(seed, first):
        index = np.arange(30)
        shard = Shard("t-000000", index + first, index, index, index.astype(np.uint8).reshape(-1, 1, 1, 1))
        return derangement(seed, shard).tobytes()

    assert order(0, 0) == order(0, 0)
    assert len({order(0, 0), order(1, 0), order(0, 30)}) == 3


def test_noise_is_uniform_and_drawn_for_each_image():
    index = np.arange(40, 240)
    begun = noise(0, index, (SIDE, SIDE, 1))
    assert begun.dtype == np.float32
    assert np.array_equal(noise(0, index[50:60], (SIDE, SIDE, 1)), begun[50:60])
    assert begun.min() >= 0
    assert begun.max() < 1
    assert abs(begun.mean() - 0.5) < 5 / (12 * begun.size) ** 0.5  # five standard deviations
    assert not np.array_equal(noise(1, index, (SIDE, SIDE, 1)), begun)


@pytest.mark.parametrize("start", ["other", "noise"])
def test_a_search_that_cannot_move_gives_its_start_drawn_batch_by_batch(linear, start, monkeypatch):
    held = []

    def seen(seed, index, shape):
        held.append(len(index))
        return noise(seed, index, shape)

    monkeypatch.setattr("stages.invert.noise", seen)
    shard, asked = shard_of(20), recipe(start=start, steps=1, step_size=1e-6, seed=2)
    found = Inverter(asked, linear)(shard).images()
    if start == "other":
        assert np.array_equal(found, shard.images()[derangement(2, shard)])
        assert held == []
    else:
        assert np.array_equal(found, np.round(noise(2, shard.index, (SIDE, SIDE, 1)) * 255))
        assert held == [8, 8, 8]


def test_the_same_shard_gives_the_same_bytes(linear):
    made = [pack(Inverter(recipe(), linear)(shard_of())) for _ in range(2)]
    assert made[0] == made[1]


# -------------------------------------------------------------------------------------- refusals


def test_an_image_alone_has_no_other_to_start_at(linear):
    with pytest.raises(BadData, match="train-000003 has one image, which has no other to start at"):
        Inverter(recipe(), linear)(shard_of(1))
    assert len(Inverter(recipe(start="noise", steps=1), linear)(shard_of(1))) == 1


def test_a_model_without_such_features_is_refused(linear, tmp_path):
    with pytest.raises(BadInput, match="has no linear layer"):
        Inverter(recipe(), model_of(nn.Identity(), tmp_path=tmp_path))
    with pytest.raises(BadInput, match="has no layer 'nowhere'"):
        Inverter(recipe(layer="nowhere"), linear)
