"""Pixels and tensors: 8-bit images to [0, 1] and back, batches of one shape, distances, channel statistics."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from stages.device import sent


def to_unit(pixels_NHWC: np.ndarray, where: torch.device | None = None) -> Tensor:
    """uint8, N × H × W × C, to float32 in [0, 1], N × C × H × W, each level exactly k / 255."""
    return unit(sent(pixels_NHWC, where))


def unit(pixels_NHWC: Tensor) -> Tensor:
    """The same for a tensor that is on its device already."""
    return pixels_NHWC.permute(0, 3, 1, 2).float() / 255


def to_pixels(x_NCHW: Tensor) -> np.ndarray:
    """The inverse of `to_unit`: round [0, 1] to the nearest of 256 levels, uint8, N × H × W × C."""
    levels = (x_NCHW.double() * 255).round().clamp(0, 255).to(torch.uint8)
    return np.asarray(levels.permute(0, 2, 3, 1).contiguous().cpu())


def batches(size: int, *columns: np.ndarray) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Batches of one fixed shape: the number of valid rows, and the columns.

    The last batch is padded with its own first row, because another batch shape gives other bits.
    """
    for first in range(0, len(columns[0]), size):
        parts = [column[first : first + size] for column in columns]
        count = len(parts[0])
        yield count, [np.concatenate([part, np.repeat(part[:1], size - count, axis=0)]) for part in parts]


def in_batches(compute: Callable[..., np.ndarray], size: int, *columns: np.ndarray) -> np.ndarray:
    """Apply a function to `batches` and concatenate the results."""
    made = [compute(*padded)[:count] for count, padded in batches(size, *columns)]
    return np.concatenate(made) if made else columns[0]


def distances(clean_NHWC: np.ndarray, moved_NHWC: np.ndarray) -> dict[str, np.ndarray]:
    """L2 and L∞ distances between 8-bit images, in units of [0, 1]: N each."""
    # Image by image: a shard of photographs in int64 takes gigabytes.
    levels = (moved - clean.astype(np.int64) for clean, moved in zip(clean_NHWC, moved_NHWC, strict=True))
    sizes_N2 = np.array([((each**2).sum(), np.abs(each).max(initial=0)) for each in levels]).reshape(-1, 2)
    return {"l2": np.sqrt(sizes_N2[:, 0]) / 255, "linf": sizes_N2[:, 1] / 255}


def channel_statistics(sums: Sequence[float], squares: Sequence[float], count: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel in [0, 1], from sums of uint8 values and of their squares."""
    means = [s / count for s in sums]
    deviations = [max(q / count - m * m, 1.0) ** 0.5 for q, m in zip(squares, means, strict=True)]
    return [m / 255 for m in means], [d / 255 for d in deviations]
