"""Select a fraction of a shard's images, ranked by an attack's effect on them."""

import math
from dataclasses import replace

import numpy as np

from stages.errors import BadInput
from stages.recipes import Select
from stages.shard import Shard


def kept(recipe: Select, count: int) -> int:
    """Number of a shard's images to keep: at least one, and not all of several.

    The top `share` and the bottom 1 − `share` partition the shard; half an image rounds to the top.
    """
    share = recipe.share if recipe.keep == "top" else 1 - recipe.share
    half_up = math.floor(round(share * count, 9) + 0.5)  # 1 − 0.42 is not quite 0.58
    top = min(max(half_up, 1), count - 1)
    return max(1, top if recipe.keep == "top" else count - top)


def select(recipe: Select, shard: Shard) -> Shard:
    """The images with the largest or smallest values, in their original order.

    Of equal values the first in the source ranks higher, so that top and bottom never overlap.

    Raises:
        BadInput: the shard has no such column.
    """
    values = shard.attack.get(recipe.by)
    if values is None:
        there = ", ".join(shard.attack) or "none at all"
        raise BadInput(f"select by {recipe.by}: {recipe.images} has no such column (of an attack it has: {there})")
    count = kept(recipe, len(shard))
    falling = np.lexsort((shard.index, -values.astype(np.float64)))
    chosen = np.sort(falling[:count] if recipe.keep == "top" else falling[-count:])
    return replace(
        shard,
        index=shard.index[chosen],
        label=shard.label[chosen],
        source_label=shard.source_label[chosen],
        pixels=None if shard.pixels is None else shard.pixels[chosen],
        files=None if shard.files is None else [shard.files[i] for i in chosen],
        attack={name: column[chosen] for name, column in shard.attack.items()},
        failures=[],
    )
