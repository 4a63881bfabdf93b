"""The pace of a node, where its first shards come late and several workers end theirs at about the same time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.run.pace import Pace


def test_of_one_worker_the_first_shards_are_left_out_once_the_later_ones_show_the_rate():
    """On a GPU, a node's first shard came after 27 s and the others every 13: eight minutes were left of four."""
    pace, told = Pace(0.0), []
    for number in range(1, 9):
        pace.ended(27 + 13.0 * (number - 1), 2500 * number)
        told.append(round(pace.rate))
    assert told == [93, 125, 142, 192, 192, 192, 192, 192]


@given(workers=st.integers(1, 8), late=st.floats(0, 5), rounds=st.integers(2, 12), rest=st.integers(0, 7))
def test_the_rate_is_never_above_the_true_one_nor_below_that_from_the_start(workers, late, rounds, rest):
    """Each worker makes a shard of 10 images a second, after a late beginning."""
    pace, images = Pace(0.0), 0
    ends = [late + turn for turn in range(1, rounds + 1) for _ in range(workers)]
    for at in [*ends, *[late + rounds + 1] * min(rest, workers - 1)]:
        images += 10
        pace.ended(at, images)
        assert images / at <= pace.rate * 1.000001 and pace.rate <= 10 * workers * 1.000001


def test_a_shard_that_takes_no_time_divides_by_nothing():
    pace = Pace(5.0)
    pace.ended(5.0, 10)
    pace.ended(5.0, 20)
    assert pace.rate == pytest.approx(20e9)
