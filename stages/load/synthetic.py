"""Images that are made, each from its seed and index."""

import numpy as np
from PIL import Image

from stages.images import pixels_of
from stages.load.listing import Images, Item, Listing
from stages.recipes import Synthetic
from stages.seeds import generator

CELLS = 4
"""Cells along each side of the coarse pattern that a class is known by."""

PATTERN, NOISE = 128, 96
"""8-bit levels that the pattern of a class goes through, and the noise of an image; together less than 256."""

SHIFT = 8
"""An image is shifted by at most its side over this."""


def list_synthetic(load: Synthetic) -> Listing:
    items, first = dict[str, Images](), 0
    for split, count in load.images.items():
        items[split] = Images.whole(np.arange(first, first + count) % load.classes, first=first)
        first += count
    return Listing(tuple(str(i) for i in range(load.classes)), items, channels=3)


def synthetic(load: Synthetic, item: Item) -> np.ndarray:
    """An image from its seed, its index and its class alone: size × size × 3, uint8.

    A few random colours that are its class's, enlarged to a smooth pattern, shifted and under noise that is its own.
    In whole numbers, which are the same on every machine.
    """
    colours = generator(load.seed, "synthetic/class", item.label)
    cells = colours.integers(0, PATTERN, (CELLS, CELLS, 3), dtype=np.uint8)
    smooth = Image.fromarray(cells).resize((load.size, load.size), Image.Resampling.BILINEAR)
    draw, most = generator(load.seed, "synthetic/image", item.index), load.size // SHIFT
    shift = draw.integers(-most, most, 2, endpoint=True)
    noise = draw.integers(0, NOISE, (load.size, load.size, 3), dtype=np.uint8)
    return np.roll(pixels_of(smooth), tuple(shift.tolist()), (0, 1)) + noise
