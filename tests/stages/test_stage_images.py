"""Bytes to pixels and back."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from torchvision import transforms

from stages.errors import BadData
from stages.images import decode, encode_png, histogram

SIDES = st.integers(1, 24)


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def as_bytes(image, kind="PNG"):
    out = io.BytesIO()
    image.save(out, format=kind)
    return out.getvalue()


@given(
    st.tuples(SIDES, SIDES, st.sampled_from([1, 3])).flatmap(lambda shape: hnp.arrays(np.uint8, shape)),
)
def test_png_brings_every_pixel_back(pixels):
    assert np.array_equal(decode(encode_png(pixels), pixels.shape[2]), pixels)


def test_equal_pixels_have_equal_bytes():
    pixels = np.asarray(picture(9, 7))
    assert encode_png(pixels) == encode_png(pixels.copy(order="F"))


@pytest.mark.parametrize(
    ("width", "height", "resize", "crop"),
    [
        (40, 30, 20, 16),
        (30, 40, 20, 15),
        (33, 57, 17, None),
        (20, 27, 20, 13),  # already as wide as asked: no resampling
        (31, 31, None, 12),
        (12, 12, 20, 20),  # enlarged
        (98, 49, 8, 8),  # 98 × (8 / 49) is 15.99… in floating point; torchvision makes it 16
    ],
)
def test_resize_and_crop_give_the_pixels_of_torchvision(width, height, resize, crop):
    image = picture(width, height)
    steps = [transforms.Resize(resize)] if resize else []
    steps += [transforms.CenterCrop(crop)] if crop else []
    wanted = np.asarray(transforms.Compose(steps)(image))
    assert np.array_equal(decode(as_bytes(image), 3, resize, crop), wanted)


@settings(max_examples=40)
@given(st.integers(8, 120), st.integers(8, 120), st.integers(4, 40))
def test_a_resized_image_has_the_size_that_torchvision_gives_it(width, height, resize):
    image = picture(width, height)
    wanted = np.asarray(transforms.Resize(resize)(image)).shape
    assert decode(as_bytes(image), 3, resize).shape == wanted


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_any_eight_bit_mode_becomes_what_is_asked(mode):
    kind = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    encoded = as_bytes(picture(6, 5).convert(mode), kind)
    assert decode(encoded, 3).shape == (5, 6, 3)
    assert decode(encoded, 1).shape == (5, 6, 1)


def test_a_sixteen_bit_image_is_refused_instead_of_being_bleached():
    # Pillow clips 16-bit values to 255 on the way to 8 bits: nearly everything would become white.
    deep = Image.fromarray((np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8))
    with pytest.raises(BadData, match="16"):
        decode(as_bytes(deep), 1)


def test_an_image_smaller_than_the_crop_is_refused():
    with pytest.raises(BadData, match="6 × 5 pixels, smaller than the crop of 8"):
        decode(as_bytes(picture(6, 5)), 3, crop=8)


@pytest.mark.parametrize("encoded", [b"", b"not an image", as_bytes(picture(20, 20))[:200], b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_bad_data(encoded):
    with pytest.raises(BadData, match="cannot be decoded"):
        decode(encoded, 3)


@settings(max_examples=150)
@given(st.sampled_from(["PNG", "JPEG", "WEBP"]), st.integers(0, 10_000), st.integers(1, 255), st.integers(1, 10_000))
def test_a_damaged_file_gives_pixels_or_bad_data_and_nothing_else(kind, place, flip, length):
    whole = bytearray(as_bytes(picture(10, 8), kind))
    whole[place % len(whole)] ^= flip
    try:
        assert decode(bytes(whole[:length]), 3).dtype == np.uint8
    except BadData as error:
        assert "\n" not in str(error)


def test_a_message_does_not_name_an_object_in_memory():
    with pytest.raises(BadData) as caught:
        decode(b"not an image", 3)
    assert "0x" not in str(caught.value)


@given(hnp.arrays(np.uint8, st.tuples(st.integers(0, 3), SIDES, SIDES, st.sampled_from([1, 3]))))
def test_a_histogram_counts_every_level_of_every_channel(pixels):
    channels = pixels.reshape(-1, pixels.shape[3]).T
    assert histogram(pixels).tolist() == [np.bincount(channel, minlength=256).tolist() for channel in channels]
