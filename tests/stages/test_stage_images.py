"""Bytes to pixels and back."""

import io
import os
import re
import resource
import struct
import subprocess
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageOps, PngImagePlugin
from torchvision import transforms

from stages.errors import BadData
from stages.images import FORMATS, KEPT, decode, encode_png, histogram, open_image, read_file

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


# ------------------------------------------------------------------------------ files of strangers

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"


def png(width, height, *chunks, depth=8, colour=0):
    """A PNG of zeros, written chunk by chunk, since Pillow does not write some files that it reads."""
    rows, bits = zlib.compressobj(9), depth * {0: 1, 2: 3}[colour]
    data = b"".join(rows.compress(bytes(1 + -(-width * bits // 8))) for _ in range(height)) + rows.flush()
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in parts
    )


AVIF = b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(40)


@pytest.mark.parametrize("encoded", [EPS, AVIF, as_bytes(picture(6, 5), "TGA"), as_bytes(picture(6, 5), "JPEG2000")])
def test_only_the_formats_that_are_named_are_tried(encoded, monkeypatch):
    def run(*args, **kwargs):
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", run)
    with pytest.raises(BadData, match=r"^cannot be decoded: not one of PNG, JPEG, WEBP, GIF, BMP, TIFF, PPM$"):
        decode(encoded, 3)


@pytest.mark.parametrize(
    "encoded",
    [
        pytest.param(lambda: png(10_000, 9_000, depth=1), id="90 million pixels, of which Pillow warns"),
        pytest.param(lambda: png(20_000, 10_000, depth=1), id="200 million, which Pillow refuses"),
        pytest.param(lambda: as_bytes(Image.new("L", (9500, 9500)), "JPEG"), id="a JPEG"),
        pytest.param(
            lambda: b"GIF89a" + b"\xff" * 4 + as_bytes(picture(3, 2), "GIF")[10:], id="a GIF of a small frame"
        ),
    ],
)
def test_an_image_of_too_many_pixels_is_refused_by_its_header_the_hundredth_as_the_first(encoded):
    encoded = encoded()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            with pytest.raises(BadData, match=r"^has more than 89,478,485 pixels: make it smaller$"):
                decode(encoded, 3)
    assert not said


def test_an_image_without_pixels_is_refused():
    for encoded in (b"P6\n0 5\n255\n", png(0, 5), png(5, 0)):
        with pytest.raises(BadData, match=r"^(has no pixels|cannot be decoded: .*)$"):
            decode(encoded, 3)


def test_a_sliver_that_would_be_enlarged_beyond_memory_is_refused():
    sliver = as_bytes(Image.new("L", (16_000, 1)))
    assert decode(sliver, 1).shape == (1, 16_000, 1)
    with pytest.raises(BadData, match="pixels when resized"):
        decode(sliver, 1, resize=256)
    with pytest.raises(BadData, match=r"has more than 16,383 pixels along a side: make it smaller"):
        decode(as_bytes(Image.new("L", (16_384, 1))), 1)


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_what_a_png_carries_beside_its_pixels_is_not_unpacked_without_limit(kind):
    bomb = b"x\0\0" + zlib.compress(bytes(80_000_000), 9)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadData, match="cannot be decoded"):
        decode(png(4, 4, (kind, bomb)), 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # kB


def test_a_compressed_tiff_is_refused_and_another_is_read():
    image = picture(6, 5)
    assert np.array_equal(decode(as_bytes(image, "TIFF"), 3), np.asarray(image))
    out = io.BytesIO()
    image.save(out, "TIFF", compression="tiff_lzw")
    with pytest.raises(BadData, match="is a compressed TIFF: save it as png"):
        decode(out.getvalue(), 3)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_taken(kind):
    first, other = Image.new("RGB", (8, 6), "red"), Image.new("RGB", (8, 6), "blue")
    out = io.BytesIO()
    first.save(out, kind, save_all=True, append_images=[other], **({"lossless": True} if kind == "WEBP" else {}))
    assert np.array_equal(decode(out.getvalue(), 3), np.asarray(first))
    if kind in ("PNG", "WEBP"):
        assert "several frames" in open_image(out.getvalue(), 3).why_not_kept(kind.lower())


def test_transparency_is_dropped_as_torchvision_drops_it():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 6, 4), dtype=np.uint8))
    assert np.array_equal(decode(as_bytes(image), 3), np.asarray(image)[:, :, :3])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"])
def test_every_mode_of_eight_bits_that_a_tiff_may_have_becomes_grey_or_rgb(mode):
    white = Image.new("LAB", (6, 5), (255, 128, 128)) if mode == "LAB" else Image.new("RGB", (6, 5), "white")
    saved = white.convert({"PA": "P", "La": "LA"}.get(mode, mode))
    encoded = as_bytes(saved.convert("PA") if mode == "PA" else saved, "TIFF")
    if mode == "La":  # premultiplied by its alpha, which tag 338 says: Pillow writes no such file
        encoded = encoded.replace(struct.pack("<HHIH", 338, 3, 1, 2), struct.pack("<HHIH", 338, 3, 1, 1))
    with Image.open(io.BytesIO(encoded)) as image:
        assert image.mode == mode
    for channels in (1, 3):
        pixels = decode(encoded, channels)
        assert pixels.shape == (5, 6, channels)
        assert pixels.min() >= 250


# ---- upright


def turned(orientation, kind, size=(9, 6)):
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    picture(*size).save(out, kind, exif=exif, **options)
    return out.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("resize", [None, 4])
def test_an_image_is_as_people_see_it(orientation, kind, resize):
    encoded = turned(orientation, kind)
    with Image.open(io.BytesIO(encoded)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    upright = transforms.Resize(resize)(upright) if resize else upright
    assert np.array_equal(decode(encoded, 3, resize), np.asarray(upright))


@settings(max_examples=100)
@given(st.binary(max_size=60), st.sampled_from(["JPEG", "PNG", "WEBP"]))
def test_damaged_exif_data_turn_nothing_and_hinder_nothing(exif, kind):
    out = io.BytesIO()
    picture(6, 5).save(out, kind, exif=b"Exif\0\0" + exif)
    assert decode(out.getvalue(), 3).shape[2] == 3


# ---- what can be kept


@pytest.mark.parametrize(
    ("encoded", "suffix", "channels", "why"),
    [
        (as_bytes(picture(6, 5)), "png", 3, None),
        (as_bytes(picture(6, 5).convert("L")), "png", 3, None),
        (as_bytes(picture(6, 5).convert("L")), "png", 1, None),
        (as_bytes(picture(6, 5)), "png", 1, "has colours"),
        (as_bytes(picture(6, 5), "JPEG"), "jpg", 3, None),
        (as_bytes(picture(6, 5), "WEBP"), "webp", 3, None),
        (as_bytes(picture(6, 5), "JPEG"), "png", 3, "is a JPEG by its content"),
        (as_bytes(picture(6, 5).convert("CMYK"), "JPEG"), "jpg", 3, "has the colours CMYK"),
        (as_bytes(picture(6, 5).convert("LA")), "png", 3, "has transparency"),
        (as_bytes(Image.new("RGBA", (6, 5)), "WEBP"), "webp", 3, "has transparency"),
        (as_bytes(picture(6, 5).convert("P")), "png", 3, "has a palette"),
        (as_bytes(picture(6, 5).convert("1")), "png", 3, "has one bit per pixel"),
        (png(6, 5, depth=4), "png", 3, "has more or less than 8 bits per channel"),
        (png(6, 5, depth=16, colour=2), "png", 3, "has more or less than 8 bits per channel"),
        (png(6, 5, (b"tRNS", b"\0\0")), "png", 3, "has transparency"),
        (turned(6, "JPEG"), "jpg", 3, "has a turn in its EXIF data"),
        (turned(1, "JPEG"), "jpg", 3, None),
    ],
)
def test_a_file_is_kept_if_it_is_what_the_format_promises(encoded, suffix, channels, why):
    assert open_image(encoded, channels).why_not_kept(suffix) == why


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_bmp_of_8_bits_per_channel_could_be_kept(mode, monkeypatch):
    monkeypatch.setitem(KEPT, "bmp", "BMP")
    out = io.BytesIO()
    Image.new(mode, (6, 5), 7).save(out, "BMP")
    assert open_image(out.getvalue(), len(mode)).why_not_kept("bmp") is None


# ---- whatever there may be


@st.composite
def mangled(draw):
    """A file of one of the formats with bytes changed, removed or inserted; or random bytes."""
    if draw(st.booleans()) and draw(st.booleans()):
        return draw(st.binary(max_size=200))
    kind = draw(st.sampled_from(sorted(FORMATS)))
    mode = draw(st.sampled_from(["1", "L", "P", "RGB", "CMYK" if kind == "JPEG" else "RGBA"]))
    if kind in ("JPEG", "PPM") and mode in ("P", "RGBA"):
        mode = "RGB"
    whole = bytearray(as_bytes(picture(10, 8).convert(mode), kind))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, min(len(whole), draw(st.sampled_from([40, 120, 10_000])))))
        piece = draw(
            st.sampled_from([b"\xff", b"\0", b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"]) | st.binary(max_size=6)
        )
        whole[at : at + draw(st.integers(0, 6))] = piece
    return bytes(whole[: draw(st.integers(0, len(whole)) | st.just(len(whole)))])


@settings(max_examples=600)
@given(mangled(), st.sampled_from([1, 3]), st.sampled_from([None, 4]), st.sampled_from([None, 4]))
def test_any_bytes_give_pixels_of_the_promised_shape_or_bad_data_and_no_warning(encoded, channels, resize, crop):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            pixels = decode(encoded, channels, resize, crop)
        except BadData as error:
            assert re.fullmatch(r"(cannot|has|is) [^\n]{1,250}", str(error))
        else:
            height, width, found = pixels.shape
            assert (pixels.dtype, found) == (np.uint8, channels)
            assert (height, width) == (crop, crop) if crop else min(height, width) >= 1
            assert resize is None or crop or min(height, width) == resize
    assert not said


@pytest.mark.parametrize(
    "kind",
    [struct.error, RuntimeError, EOFError, IndexError, KeyError, TypeError, MemoryError, OverflowError, zlib.error],
)
def test_whatever_a_decoder_raises_is_bad_data_in_words_about_the_file(kind, monkeypatch):
    def load(image):
        raise kind("unpack requires a buffer of 4 bytes")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(BadData, match=r"^cannot be decoded: it is damaged$"):
        decode(as_bytes(picture(6, 5)), 3)


# ---- files on disk


def test_a_pipe_is_not_waited_for_and_a_huge_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(BadData, match="is no regular file"):
        read_file(tmp_path / "pipe.png")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(BadData, match=r"has 1,099,511,627,776 bytes, more than the 536,870,912 of an image"):
        read_file(tmp_path / "huge.png")
    (tmp_path / "a.png").write_bytes(b"bytes")
    assert read_file(tmp_path / "a.png") == b"bytes"
