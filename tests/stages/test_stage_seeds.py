"""Random numbers that come from (seed, purpose, position)."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stages.seeds import coins, generator, torch_seed

SEEDS = st.integers(0, 2**63 - 1)
POSITIONS = st.integers(0, 2**40)


def draws(*place):
    return generator(*place).integers(0, 2**62, size=4).tolist()


@given(SEEDS, st.text(max_size=20), POSITIONS)
def test_the_same_place_gives_the_same_numbers(seed, purpose, position):
    assert draws(seed, purpose, position) == draws(seed, purpose, position)
    assert torch_seed(seed, purpose, position) == torch_seed(seed, purpose, position)


@given(SEEDS, st.lists(POSITIONS, min_size=2, max_size=6, unique=True))
def test_positions_have_streams_of_their_own(seed, positions):
    assert len({tuple(draws(seed, "target", position)) for position in positions}) == len(positions)


@given(st.lists(SEEDS, min_size=2, max_size=6, unique=True))
def test_seeds_have_streams_of_their_own(seeds):
    assert len({tuple(draws(seed, "target", 3)) for seed in seeds}) == len(seeds)


def test_purposes_have_streams_of_their_own():
    purposes = ["target", "noise", "order", "order/train", "order/test", "augment", "dropout", "weights"]
    assert len({tuple(draws(7, purpose, 5)) for purpose in purposes}) == len(purposes)


@given(SEEDS, st.lists(st.integers(0, 2**40), min_size=1, max_size=20))
def test_a_coin_is_the_same_whoever_else_throws_one(seed, positions):
    together = coins(seed, "flips", np.array(positions))
    assert together.dtype == bool
    assert together.tolist() == [coins(seed, "flips", np.array([position]))[0] for position in positions]


def test_coins_are_fair_and_those_of_neighbours_seeds_and_purposes_tell_nothing_of_each_other():
    positions = np.arange(10_000)
    throws = [coins(seed, purpose, positions) for seed in (0, 1) for purpose in ("flips", "other")]
    pairs = [one == other for at, one in enumerate(throws) for other in throws[:at]]
    for fair in (*throws, throws[0][1:] == throws[0][:-1], *pairs):
        assert abs(fair.mean() - 0.5) < 5 * (0.25 / 10_000) ** 0.5  # five standard deviations


def test_a_numpy_position_is_the_same_as_a_python_one():
    assert draws(3, "target", np.int64(11)) == draws(3, "target", 11)


def test_neighbouring_positions_do_not_share_numbers():
    # Positions are counters of one generator: were they one block apart, a long stream would run into the next.
    first, second = (set(generator(0, "order", p).integers(0, 2**62, size=10_000).tolist()) for p in (0, 1))
    assert not first & second


@given(SEEDS, POSITIONS)
def test_a_torch_seed_fits_torch(seed, position):
    import torch

    assert 0 <= torch_seed(seed, "weights", position) < 2**63
    torch.Generator().manual_seed(torch_seed(seed, "weights", position))
