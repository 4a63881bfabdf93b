"""Bytes to pixels and back."""

import io

import numpy as np
from PIL import Image

from stages.errors import BadData

PNG_LEVEL = 1  # Adversarial images hardly compress: level 6 takes three times as long for 2 % fewer bytes.

MODES = {1: "L", 3: "RGB"}


def decode(encoded: bytes, channels: int, resize: int | None = None, crop: int | None = None) -> np.ndarray:
    """Decode one image to uint8, H × W × C.

    Args:
        encoded: a file in any format that Pillow reads.
        channels: 1 (grey) or 3 (RGB); other modes are converted.
        resize: shorter side in pixels after an antialiased bilinear resize, as torchvision's ``Resize``.
        crop: side in pixels of a centre crop after that, as torchvision's ``CenterCrop``.

    Raises:
        BadData: the bytes cannot be decoded, or the image is smaller than the crop.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as opened:
            if opened.mode.startswith(("I", "F")):  # Pillow would clip such values to 255, not scale them
                raise BadData(f"has more than 8 bits per channel (mode {opened.mode}; 16-bit or float images)")
            image = opened.convert(MODES[channels])
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadData(f"cannot be decoded: {str(error).split(' <')[0]}") from error
    if resize is not None and min(image.size) != resize:
        short = min(image.size)  # multiplied before it is divided by: torchvision's rounding
        width, height = (int(resize * side / short) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    if crop is not None:
        width, height = image.size
        if min(width, height) < crop:
            raise BadData(f"is {width} × {height} pixels, smaller than the crop of {crop}")
        left, top = round((width - crop) / 2), round((height - crop) / 2)
        image = image.crop((left, top, left + crop, top + crop))
    return pixels_of(image)


def pixels_of(image: Image.Image) -> np.ndarray:
    """The pixels of a grey or RGB image, uint8, H × W × C."""
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def encode_png(pixels_HWC: np.ndarray) -> bytes:
    """Encode uint8 pixels, H × W × C with one or three channels, without loss."""
    out = io.BytesIO()
    flat = pixels_HWC[:, :, 0] if pixels_HWC.shape[2] == 1 else pixels_HWC
    Image.fromarray(flat).save(out, format="PNG", compress_level=PNG_LEVEL)
    return out.getvalue()


def histogram(pixels_NHWC: np.ndarray) -> np.ndarray:
    """How often each of 256 levels stands in each channel, over some images: C × 256, int64.

    Pillow counts a photograph in a twentieth of the time that numpy takes to add up its squares as integers.
    """
    count, height, width, channels = pixels_NHWC.shape
    tall = pixels_NHWC.reshape(count * height, width, channels)
    image = Image.fromarray(tall[:, :, 0] if channels == 1 else tall)
    return np.array(image.histogram(), dtype=np.int64).reshape(channels, 256)
