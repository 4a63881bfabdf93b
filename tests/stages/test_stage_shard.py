"""Packing shards to tars, and reading them back."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support import tar_of

from stages.errors import BadData
from stages.images import encode_png
from stages.shard import COLUMNS, Failure, Shard, key, members, pack, rows, unpack


@st.composite
def shards(draw, max_size=5):
    count = draw(st.integers(1, max_size))
    channels = draw(st.sampled_from([1, 3]))
    shape = (count, draw(st.integers(1, 6)), draw(st.integers(1, 6)), channels)
    index = draw(st.lists(st.integers(0, 99_999_999), min_size=count, max_size=count, unique=True))
    label, source = (draw(st.lists(st.integers(0, 999), min_size=count, max_size=count)) for _ in range(2))
    floats = st.lists(st.floats(-100, 100, width=32), min_size=count, max_size=count)
    attack = {
        "target": np.array(label),
        "success": np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count))),
        "margin": np.array(draw(floats), dtype=np.float32),
        "l2": np.array(draw(floats), dtype=np.float64),
    }
    pixels = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 256, shape, dtype=np.uint8)
    return Shard(
        name=f"{draw(st.sampled_from(['train', 'test', 'train_b2']))}-{draw(st.integers(0, 999_999)):06d}",
        index=np.array(index),
        label=np.array(label),
        source_label=np.array(source),
        pixels=pixels,
        attack=attack if draw(st.booleans()) else {},
    )


def small(count=3):
    rng = np.random.default_rng(0)
    index, label = np.arange(10, 10 + count), np.arange(count) % 10
    return Shard("train-000000", index, label, label, rng.integers(0, 256, (count, 4, 4, 1), dtype=np.uint8))


PNG = encode_png(np.zeros((4, 4, 1), np.uint8))


# ------------------------------------------------------------------------------ there and back


@given(shards())
def test_what_is_packed_is_unpacked(shard):
    back = unpack(shard.name, pack(shard), shard.images().shape[3])
    assert back.name == shard.name
    for column in ("index", "label", "source_label"):
        assert np.array_equal(getattr(back, column), getattr(shard, column)), column
    assert np.array_equal(back.images(), shard.images())
    assert set(back.attack) == set(shard.attack)
    for name, column in shard.attack.items():
        np.testing.assert_allclose(back.attack[name], column, rtol=0, atol=1e-7, err_msg=name)  # seven decimals kept


@given(shards())
def test_equal_shards_have_equal_bytes(shard):
    again = Shard(
        shard.name,
        shard.index.copy(),
        shard.label.astype(np.int32),
        shard.source_label.copy(),
        np.asfortranarray(shard.images()),
        attack=dict(shard.attack),
    )
    assert pack(again) == pack(shard)


@given(shards())
def test_packing_what_was_unpacked_gives_the_same_bytes(shard):
    tar = pack(shard)
    assert pack(unpack(shard.name, tar, shard.images().shape[3])) == tar


def test_files_that_are_kept_are_kept_byte_for_byte():
    out = io.BytesIO()
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(out, format="JPEG")
    label = np.array([4])
    shard = Shard("train-000000", np.array([7]), label, label, None, [out.getvalue()], "jpg")
    back = unpack(shard.name, pack(shard), 3)
    assert back.suffix == "jpg"
    assert back.files == [out.getvalue()]
    assert back.images().shape == (1, 4, 4, 3)


def test_files_of_differing_sizes_come_back_as_files_only():
    files = [encode_png(np.zeros((side, side, 1), np.uint8)) for side in (3, 5)]
    label = np.array([0, 1])
    back = unpack("train-000000", pack(Shard("train-000000", label, label, label, None, files)), 1)
    assert back.files == files
    with pytest.raises(BadData, match="differing sizes"):
        back.images()


def test_the_split_is_the_name_without_its_number():
    assert small().split == "train"
    assert len(small()) == 3


# ------------------------------------------------------------------------------- the tar itself


def test_the_tar_holds_image_class_and_facts_of_each_sample_in_order():
    with tarfile.open(fileobj=io.BytesIO(pack(small()))) as tar:
        names = tar.getnames()
        facts = json.load(tar.extractfile("00000011.json"))
        assert tar.extractfile("00000012.cls").read() == b"2"
        with Image.open(tar.extractfile("00000010.png")) as image:
            assert np.array_equal(np.asarray(image), small().images()[0, :, :, 0])
    assert names == [f"000000{i}.{suffix}" for i in (10, 11, 12) for suffix in ("png", "cls", "json")]
    assert facts == {"index": 11, "split": "train", "source_label": 1}


@given(shards())
def test_members_have_no_time_owner_or_host_of_their_own(shard):
    with tarfile.open(fileobj=io.BytesIO(pack(shard))) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert member.mode == 0o644


def test_a_key_is_eight_digits_so_that_names_sort_as_numbers():
    assert [key(7), key(12_345_678)] == ["00000007", "12345678"]


# ----------------------------------------------------------------------------------- damage


@settings(max_examples=150)
@given(shards(max_size=3), st.floats(0, 1))
def test_a_tar_cut_anywhere_is_bad_data_unless_zeros_behind_the_last_sample_are_missing(shard, share):
    tar = pack(shard)
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        last = opened.getmembers()[-1]
    cut, end = int(share * len(tar)), last.offset_data + -(-last.size // 512) * 512
    if cut <= end:
        with pytest.raises(BadData, match=rf"^{shard.name} is "):
            unpack(shard.name, tar[:cut], shard.images().shape[3])
    else:
        assert np.array_equal(unpack(shard.name, tar[:cut], shard.images().shape[3]).images(), shard.images())


def test_a_tar_cut_between_samples_or_inside_one_is_bad_data_by_its_missing_end():
    tar = pack(small())
    for place in ("00000012.png", "00000011.cls", "00000011.json"):
        with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
            at = opened.getmember(place).offset
        with pytest.raises(BadData, match=rf"train-000000 is cut: it ends after {at:,} bytes"):
            unpack("train-000000", tar[:at], 1)
        with pytest.raises(BadData, match=r"train-000000 is cut inside"):
            unpack("train-000000", tar[: at + 512], 1)


PACKED = pack(small(2))


@settings(max_examples=300)
@given(st.sampled_from([i for i, byte in enumerate(PACKED) if byte]), st.integers(1, 255))
def test_a_byte_that_flipped_gives_a_shard_or_bad_data_and_nothing_else(place, flip):
    tar = bytearray(PACKED)
    tar[place] ^= flip
    try:
        assert len(unpack("train-000000", bytes(tar), 1)) <= 2
    except BadData as error:
        assert str(error)


@pytest.mark.parametrize("tar", [b"", b"no tar", b"\0" * 100, b"x" * 2048])
def test_what_is_no_tar_is_bad_data(tar):
    with pytest.raises(BadData, match=r"^is (no tar|empty)"):
        list(members(tar))


def sample(image=PNG, cls=b"3", name="00000001", suffix="png", told=None, **facts):
    """The members of a sample as `pack` writes them, with the given changes."""
    facts = {"index": 1, "split": "train", "source_label": 3} | facts
    return [(f"{name}.{suffix}", image), (f"{name}.cls", cls), (f"{name}.json", told or json.dumps(facts).encode())]


WRONG = {
    "no json": (sample()[:2], "with members png, cls, expected an image, cls and json"),
    "no image": (sample()[1:], "with members cls, json"),
    "two images": ([*sample(), ("00000001.jpg", PNG)], "with members png, cls, json, jpg"),
    "two images, one after the other": ([sample()[0], ("00000001.webp", PNG), *sample()[1:]], "with members png, webp"),
    "another kind of image": (sample(suffix="eps"), "with members eps"),
    "a member twice": ([sample()[0], *sample()], r"holds 00000001\.png twice"),
    "a label in words": (sample(cls=b"three"), "label that is not a number below 10"),
    "a label with a fraction": (sample(cls=b"3.0"), "label that is not a number below 10"),
    "a negative label": (sample(cls=b"-1"), "label that is not a number below 10"),
    "an empty label": (sample(cls=b""), "label that is not a number below 10"),
    "a label in Python": (sample(cls=b"1_0"), "label that is not a number below 10"),
    "a label beyond the classes": (sample(cls=b"10"), "label that is not a number below 10"),
    "a label of many digits": (sample(cls=b"9" * 5000), "label that is not a number below 10"),
    "a true class beyond the classes": (sample(source_label=10), "label that is not a number below 10"),
    "a target beyond the classes": (sample(target=10**9), "label that is not a number below 10"),
    "json that ends": (sample(told=b"{"), "with a damaged json: Invalid JSON"),
    "json of lists in lists": (sample(told=b"[" * 100_000), "with a damaged json: Invalid JSON"),
    "json that is no mapping": (sample(told=b"[]"), "with a damaged json: "),
    "json without an index": (sample(told=b"{}"), "with a damaged json of index: Field required"),
    "an index of another sample": (sample(index=2), "which its json calls 00000002 of train"),
    "an index that is true": (sample(index=True), "damaged json of index"),
    "an index with a fraction": (sample(index=1.0), "damaged json of index"),
    "an index without end": (sample(index=10**400), "damaged json of index"),
    "another split": (sample(split="test"), "which its json calls 00000001 of test"),
    "a key that is no index": (sample(name="a"), "holds sample a, which its json calls 00000001 of train"),
    "a margin in words": (sample(margin="large"), "damaged json of margin"),
    "a number for yes": (sample(success=1), "damaged json of success"),
    "a step that no attack has": (sample(success_step=10**12), "damaged json of success_step"),
    "a negative class": (sample(source_label=-1), "damaged json of source_label"),
    "half an image": (sample(image=PNG[:30]), "holds sample 00000001, whose image cannot be decoded"),
    "no sample": ([], "holds no sample"),
    "the index again": ([*sample(), *sample(name="00000002", index=2), *sample()], "holds two samples of one index"),
    "other facts": ([*sample(), *sample(name="00000002", index=2, l2=1.0)], "other members or facts than the first"),
    "other images": (
        [*sample(), *sample(name="00000002", index=2, suffix="webp")],
        "holds samples with other members or facts than the first",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_shard_that_is_not_as_we_write_it_is_bad_data_by_its_name(wrong):
    named, said = WRONG[wrong]
    with pytest.raises(BadData, match=f"^train-000000 holds .*{said}|^train-000000 {said}"):
        unpack("train-000000", tar_of(*named), 1, classes=10)


def test_a_link_in_a_shard_is_bad_data():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        link = tarfile.TarInfo("00000001.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    with pytest.raises(BadData, match=r"train-000000 holds 00000001\.png twice, or not as a file"):
        unpack("train-000000", out.getvalue(), 1)


def test_members_gives_the_samples_of_any_tar_in_order():
    tar = tar_of(("a.png", b"1"), ("a.cls", b"2"), ("b.png", b"3"))
    assert list(members(tar)) == [("a", {"png": b"1", "cls": b"2"}), ("b", {"png": b"3"})]


# ----------------------------------------------------------------------------------- the rows


@given(shards())
def test_rows_have_the_columns_that_are_promised(shard):
    table = rows(shard, pack(shard))
    assert table.schema == pa.schema(list(COLUMNS.items()))
    assert table["key"].to_pylist() == [key(i) for i in shard.index]
    assert table["label"].to_pylist() == shard.label.tolist()
    assert set(table["split"].to_pylist()) == {shard.split}
    assert set(table["shard"].to_pylist()) == {shard.name}
    assert table["error"].null_count == len(shard)
    for name in ("target", "success", "margin", "l2"):
        if shard.attack:
            assert table[name].to_pylist() == shard.attack[name].tolist()
        else:
            assert table[name].null_count == len(shard)
    assert table["linf"].null_count == len(shard)


def test_a_failure_has_a_row_that_says_why():
    plain = small()
    shard = Shard(
        plain.name,
        plain.index,
        plain.label,
        plain.source_label,
        plain.pixels,
        failures=[Failure(77, 4, "cannot be decoded"), Failure(78, None, "has no label")],
    )
    table = rows(shard, pack(shard)).slice(len(shard)).to_pylist()
    assert [row["index"] for row in table] == [77, 78]
    assert [row["error"] for row in table] == ["cannot be decoded", "has no label"]
    assert [row["source_label"] for row in table] == [4, None]
    assert [row["label"] for row in table] == [None, None]
    assert table[0]["key"] == "00000077"


@pytest.mark.parametrize("count", [1, 7])  # the archive's end fills a record of 20 blocks: of one, and of several
def test_a_shard_is_the_tar_that_pythons_tarfile_writes(count):
    tar, written = pack(small(count)), io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(tar)) as opened,
        tarfile.open(fileobj=written, mode="w", format=tarfile.USTAR_FORMAT) as own,
    ):
        for member in opened:
            again = tarfile.TarInfo(member.name)
            again.size, again.mode = member.size, 0o644
            own.addfile(again, opened.extractfile(member))
    assert written.getvalue() == tar
