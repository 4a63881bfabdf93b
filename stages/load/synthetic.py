"""Synthetic images, each generated from the seed and its index."""

import numpy as np
from PIL import Image

from stages.images import pixels_of
from stages.load.listing import Images, Item, Listing
from stages.recipes import Synthetic
from stages.seeds import generator

CELLS = 4
"""Cells per side of a class's coarse pattern."""

PATTERN, NOISE = 128, 96
"""Ranges, in 8-bit levels, of a class's pattern and of an image's noise; their sum is less than 256."""

SHIFT = 8
"""An image is shifted by at most side / SHIFT."""


def list_synthetic(load: Synthetic) -> Listing:
    items, first = dict[str, Images](), 0
    for split, count in load.images.items():
        items[split] = Images.whole(np.arange(first, first + count) % load.classes, first=first)
        first += count
    return Listing(tuple(str(i) for i in range(load.classes)), items, channels=3)


def synthetic(load: Synthetic, item: Item) -> np.ndarray:
    """Generate an image from the seed, its index and its class: size × size × 3, uint8.

    The class's random colours, upsampled to a smooth pattern, with a shift and noise per image. Integer arithmetic, so
    that it is the same on every machine.
    """
    colours = generator(load.seed, "synthetic/class", item.label)
    cells = colours.integers(0, PATTERN, (CELLS, CELLS, 3), dtype=np.uint8)
    smooth = Image.fromarray(cells).resize((load.size, load.size), Image.Resampling.BILINEAR)
    draw, most = generator(load.seed, "synthetic/image", item.index), load.size // SHIFT
    shift = draw.integers(-most, most, 2, endpoint=True)
    noise = draw.integers(0, NOISE, (load.size, load.size, 3), dtype=np.uint8)
    return np.roll(pixels_of(smooth), tuple(shift.tolist()), (0, 1)) + noise
