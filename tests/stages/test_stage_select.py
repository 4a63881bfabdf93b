"""Selecting images of a shard by the measurements of an attack."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from stages.errors import BadInput
from stages.recipes import Select
from stages.select import kept, select
from stages.shard import Failure, Shard, pack, unpack


def shard_of(values, column="margin"):
    """A shard of one-pixel images with these measurements."""
    index = np.arange(len(values))[::-1] + 7
    pixels = index.astype(np.uint8).reshape(-1, 1, 1, 1)
    attack = {"target": index % 3, column: np.asarray(values, dtype=np.float32)}
    return Shard("train-000000", index, index % 3, index % 2, pixels, attack=attack)


def asked(keep, share, by="margin"):
    return Select(images="rand", by=by, keep=keep, share=share)


VALUES = st.lists(st.sampled_from([-2.0, -0.5, 0.0, 1.0, 3.5]), min_size=2, max_size=40)
SHARES = st.floats(0, 1, exclude_min=True, exclude_max=True)


@given(VALUES, SHARES)
def test_no_image_left_out_is_better_than_one_kept(values, share):
    shard = shard_of(values)
    for keep, sign in (("top", 1), ("bottom", -1)):
        chosen = select(asked(keep, share), shard)
        out = ~np.isin(shard.index, chosen.index)
        assert len(chosen) == kept(asked(keep, share), len(shard))
        assert abs(len(chosen) - share * len(shard)) <= 1
        if out.any():
            assert (sign * chosen.attack["margin"]).min() >= (sign * shard.attack["margin"][out]).max()


@given(VALUES, SHARES)
def test_what_is_kept_is_as_it_was_and_in_its_old_order(values, share):
    shard = shard_of(values)
    chosen = select(asked("top", share), shard)
    at = np.flatnonzero(np.isin(shard.index, chosen.index))
    assert np.array_equal(chosen.index, shard.index[at])
    assert np.array_equal(chosen.label, shard.label[at])
    assert np.array_equal(chosen.source_label, shard.source_label[at])
    assert np.array_equal(chosen.images(), shard.images()[at])
    assert all(np.array_equal(chosen.attack[name], shard.attack[name][at]) for name in shard.attack)


@pytest.mark.parametrize(
    ("keep", "share", "of"),
    [("top", 0.5, {2: 1, 3: 2, 5: 3}), ("bottom", 0.5, {2: 1, 3: 1, 5: 2}), ("top", 0.9, {1: 1, 2: 1, 5: 4, 15: 14}),
     ("bottom", 0.1, {1: 1, 2: 1, 5: 1, 15: 1}), ("top", 0.42, {25: 11}), ("bottom", 0.58, {25: 14})],
)  # fmt: skip
def test_a_half_goes_to_the_top_and_neither_end_takes_all_or_none(keep, share, of):
    assert {count: kept(asked(keep, share), count) for count in of} == of


@given(st.integers(2, 40), st.one_of(st.integers(1, 99).map(lambda percent: percent / 100), st.just(0.5), SHARES))
def test_top_and_bottom_of_complementary_shares_divide_the_shard_even_where_all_values_are_equal(count, share):
    assume(0 < 1 - share < 1)
    ends = [
        select(asked(keep, part), shard_of([1.0] * count)).index
        for keep, part in (("top", share), ("bottom", 1 - share))
    ]
    assert sorted(np.concatenate(ends)) == sorted(shard_of([1.0] * count).index)


def test_of_equal_values_the_first_in_the_source_are_the_top():
    assert set(select(asked("top", 0.5), shard_of([2.0] * 6)).index) == {7, 8, 9}


@pytest.mark.parametrize("by", ["confidence", "l2"])
def test_other_columns_can_be_chosen_by(by):
    shard = shard_of([0.1, 0.9, 0.5], by)
    assert np.array_equal(select(asked("top", 0.3, by), shard).index, [shard.index[1]])


def test_a_selected_shard_keeps_its_files_byte_for_byte():
    whole = unpack("train-000000", pack(shard_of([3.0, 1.0, 2.0, 4.0])), channels=1)
    chosen = unpack("train-000000", pack(select(asked("bottom", 0.5), whole)), channels=1)
    assert chosen.files == whole.files[1:3]
    assert chosen.attack["margin"].tolist() == [1.0, 2.0]
    assert chosen.attack["target"].tolist() == whole.attack["target"][1:3].tolist()


def test_images_that_were_lost_are_not_lost_again():
    shard = shard_of([1.0, 2.0])
    shard.failures.append(Failure(3, 0, "cut short"))
    assert select(asked("top", 0.5), shard).failures == []


def test_a_column_that_is_not_there_is_refused():
    with pytest.raises(
        BadInput, match=r"select by margin: rand has no such column \(of an attack it has: target, l2\)"
    ):
        select(asked("top", 0.5), shard_of([1.0], "l2"))
