"""Decode and encode images."""

import io
import logging
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from stages.errors import BadData

logging.getLogger("PIL").addHandler(logging.NullHandler())  # its warnings about damaged files repeat `BadData`

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are decoded, detected by content, not by name. Pillow has more, some of which start programs."""

PIXELS = 2**28 // 3
"""Most pixels in an image, 89 million: a quarter of a GiB in RGB."""

LONGEST = 2**14 - 1
"""Most pixels per side of an image."""

FILE_BYTES = 2**29
"""Most bytes in an image file: twice the largest image uncompressed."""

PNG_LEVEL = 1  # Adversarial images hardly compress: level 6 takes three times as long for 2 % fewer bytes.

MODES = {1: "L", 3: "RGB"}

ENCODED = "png"
"""Format in which pixels are stored, by `encode`."""

KEPT = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
"""Formats in which original files are kept: suffix in a shard → Pillow's name."""

GREY = ("1", "L", "LA", "La")
"""Pillow's greyscale modes."""

ODD = {"1": "one bit per pixel", "P": "a palette", "PA": "a palette", "LA": "transparency", "RGBA": "transparency"}
"""Pillow's mode → its property that 8-bit grey and RGB lack."""

EIGHT_BITS = {"L": {"L"}, "RGB": {"RGB", "BGR"}}
"""Pillow's mode → layouts of a file's pixels with 8 bits per channel; BMP has them as blue, green, red."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → transposition that sets the image upright. `ImageOps.exif_transpose` also rewrites the EXIF data,
which fails if they are damaged."""


@dataclass(frozen=True)
class Decoded:
    """The first image in a file, turned upright by its EXIF data.

    Attributes:
        image: grey or RGB, 8 bits per channel.
        format: Pillow's name of the file's format.
        mode: Pillow's mode of the file's pixels.
        odd: property of the file that images in a dataset do not have; None if there is none.
    """

    image: Image.Image
    format: str
    mode: str
    odd: str | None

    @property
    def grey(self) -> bool:
        """Whether the file is greyscale."""
        return self.mode in GREY

    def why_not_kept(self, suffix: str) -> str | None:
        """Why the file cannot be kept unchanged in a shard; None if it can.

        Args:
            suffix: of the dataset's images: png, jpg or webp.
        """
        if self.format != KEPT[suffix]:
            return f"is a {self.format} by its content"
        if self.odd is not None:
            return f"has {self.odd}"
        return "has colours" if self.image.mode == "L" and not self.grey else None

    def pixels(self, resize: int | None = None, crop: int | None = None) -> np.ndarray:
        """The pixels, uint8, H × W × C; arguments and errors as in `decode`."""
        image = self.image
        if resize is not None and min(image.size) != resize:
            short = min(image.size)  # multiply before dividing: torchvision's rounding
            width, height = (int(resize * side / short) for side in image.size)
            _refuse_size(width, height, " when resized")
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        if crop is not None:
            width, height = image.size
            if min(width, height) < crop:
                raise BadData(f"is {width} × {height} pixels, smaller than the crop of {crop}")
            left, top = round((width - crop) / 2), round((height - crop) / 2)
            image = image.crop((left, top, left + crop, top + crop))
        return pixels_of(image)


def decode(encoded: bytes, channels: int, resize: int | None = None, crop: int | None = None) -> np.ndarray:
    """Decode one image to uint8, H × W × C.

    Args:
        encoded: a file in one of `FORMATS`.
        channels: 1 (grey) or 3 (RGB); other modes are converted, transparency is dropped.
        resize: shorter side in pixels after an antialiased bilinear resize, as torchvision's ``Resize``.
        crop: side in pixels of a centre crop after that, as torchvision's ``CenterCrop``.

    Raises:
        BadData: the bytes cannot be decoded, the image has more than `PIXELS` pixels, or is smaller than the crop.
    """
    return open_image(encoded, channels).pixels(resize, crop)


def is_grey(encoded: bytes) -> bool:
    """Whether an image is greyscale, by its header.

    Raises:
        BadData: the bytes are no image in one of `FORMATS`.
    """
    with _blaming_the_file():
        return Image.open(io.BytesIO(encoded), formats=FORMATS).mode in GREY


def open_image(encoded: bytes, channels: int) -> Decoded:
    """Decode one image, with the properties of its file.

    Raises:
        BadData: the bytes cannot be decoded, or the image has more than `PIXELS` pixels.
    """
    with _blaming_the_file():
        opened = Image.open(io.BytesIO(encoded), formats=FORMATS)
        _refuse_size(*opened.size)
        if any(
            codec == "libtiff" for codec, *_ in opened.tile
        ):  # libtiff may take gigabytes for a tile of a small image
            raise BadData("is a compressed TIFF: save it as png")
        if opened.mode.startswith(("I", "F")):  # Pillow would clip such values to 255, not scale them
            raise BadData(f"has more than 8 bits per channel (mode {opened.mode}; 16-bit or float images)")
        format, mode, odd = str(opened.format), opened.mode, _odd(opened)
        opened.load()
        if (turn := _turn(opened)) is not None:
            odd = "a turn in its EXIF data"
        upright = opened if turn is None else opened.transpose(turn)
        return Decoded(_converted(upright, MODES[channels]), format, mode, odd)


@contextmanager
def _blaming_the_file() -> Iterator[None]:
    """Turn any exception of Pillow on damaged data into a message about the file, and hide its warnings."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            yield
    except BadData:
        raise
    except UnidentifiedImageError as error:
        raise BadData(f"cannot be decoded: not one of {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise BadData(f"has more than {PIXELS:,} pixels: make it smaller") from error
    except Exception as error:  # decoders raise anything on damaged data
        told = isinstance(error, OSError | ValueError | SyntaxError) and not isinstance(error, UnicodeError)
        said = " ".join(str(error).split())[:200] if told else ""  # other messages are about Python, not about the file
        raise BadData(f"cannot be decoded: {said or 'it is damaged'}") from error


def _refuse_size(width: int, height: int, when: str = "") -> None:
    if width * height > PIXELS:
        raise BadData(f"has more than {PIXELS:,} pixels{when}: make it smaller")
    if max(width, height) > LONGEST:
        raise BadData(f"has more than {LONGEST:,} pixels along a side{when}: make it smaller")
    if width * height < 1:
        raise BadData("has no pixels")


def _odd(opened: ImageFile.ImageFile) -> str | None:
    """A property of the file, by its header, that images in a dataset do not have."""
    if opened.mode not in MODES.values():
        return ODD.get(opened.mode, f"the colours {opened.mode}")
    if "transparency" in opened.info:
        return "transparency"
    if opened.format in KEPT.values() and getattr(opened, "n_frames", 1) > 1:  # a TIFF would go to its last one
        return "several frames"
    eight = EIGHT_BITS[opened.mode]
    raw = {args if isinstance(args, str) else (args or (None,))[0] for *_, args in opened.tile}
    return None if raw <= eight else "more or less than 8 bits per channel"


def _turn(loaded: Image.Image) -> Image.Transpose | None:
    """The transposition that sets an image upright, by its EXIF data; None if they are damaged."""
    try:
        return TURNS.get(loaded.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001 - as for the image itself
        return None


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode in ("La", "LAB"):  # Pillow converts these to one mode alone
        image = image.convert({"La": "LA", "LAB": "RGB"}[image.mode])
    return image if image.mode == mode else image.convert(mode)


def read_file(path: Path) -> bytes:
    """Read an untrusted file, without blocking on a pipe.

    Raises:
        BadData: not a regular file, or more than `FILE_BYTES`.
        OSError: the file cannot be read.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise BadData("is no regular file")
        if about.st_size > FILE_BYTES:
            raise BadData(f"has {about.st_size:,} bytes, more than the {FILE_BYTES:,} of an image")
        return file.read(about.st_size)


def pixels_of(image: Image.Image) -> np.ndarray:
    """The pixels of a grey or RGB image, uint8, H × W × C."""
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def encode_png(pixels_HWC: np.ndarray) -> bytes:
    """Encode uint8 pixels, H × W × C with one or three channels, as PNG."""
    out = io.BytesIO()
    flat = pixels_HWC[:, :, 0] if pixels_HWC.shape[2] == 1 else pixels_HWC
    Image.fromarray(flat).save(out, format="PNG", compress_level=PNG_LEVEL)
    return out.getvalue()


encode = encode_png
"""The encoder of `ENCODED`."""


def histogram(pixels_NHWC: np.ndarray) -> np.ndarray:
    """Histogram of the 256 levels per channel, over all images: C × 256, int64.

    Pillow counts a photograph in a twentieth of the time that numpy takes to sum its squares as integers.
    """
    count, height, width, channels = pixels_NHWC.shape
    tall = pixels_NHWC.reshape(count * height, width, channels)
    image = Image.fromarray(tall[:, :, 0] if channels == 1 else tall)
    return np.array(image.histogram(), dtype=np.int64).reshape(channels, 256)
