"""Rotations and translations, and the search for the worst one (Engstrom et al. 2019)."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.recipes import Spatial
from stages.seeds import generator


def transform(x_NCHW: Tensor, degrees_N: Tensor, down_N: Tensor, right_N: Tensor) -> Tensor:
    """Rotate each image about its centre, then shift it; bilinear, padded with black.

    Args:
        x_NCHW: float.
        degrees_N: counter-clockwise.
        down_N, right_N: fractions of the height and of the width; shifts by whole pixels are exact.

    Returns:
        N × C × H × W, of the type of x; bit for bit x without rotation and shift.
    """
    height, width = x_NCHW.shape[2:]
    # In float64: in float32, coordinates in a large image are off by 1e-5.
    angle, down, right = (v.to(x_NCHW.device, torch.float64).view(-1, 1, 1) for v in (degrees_N, down_N, right_N))
    cos, sin = angle.deg2rad().cos(), angle.deg2rad().sin()
    rows = torch.arange(height, device=x_NCHW.device, dtype=torch.float64) - (height - 1) / 2
    columns = torch.arange(width, device=x_NCHW.device, dtype=torch.float64) - (width - 1) / 2
    row, column = rows[:, None] - down * height, columns - right * width  # where each pixel was before the shift
    from_row, from_column = column * sin + row * cos, column * cos - row * sin  # and before the rotation
    grid = torch.stack([2 * from_column / width, 2 * from_row / height], dim=-1)
    moved = F.grid_sample(x_NCHW.double(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return moved.to(x_NCHW.dtype)


def candidates(recipe: Spatial, index: np.ndarray) -> np.ndarray:
    """The transformations to try on each of N images: N × T × 3 (degrees, shift down, shift right).

    A grid is the same for all images, and contains the identity if its sides are odd. Random transformations are drawn
    per image from (seed, index).
    """
    reach = np.array([recipe.rotation, recipe.translation, recipe.translation])
    if recipe.search == "random":
        draws = [generator(recipe.seed, "spatial", int(i)).uniform(-1, 1, (recipe.tries, 3)) for i in index]
        drawn: np.ndarray = np.stack(draws) * reach
        return drawn
    shifts_down, shifts_right, rotations = (_evenly(count) for count in recipe.grid)
    grid = np.stack(np.meshgrid(rotations, shifts_down, shifts_right, indexing="ij"), axis=-1).reshape(-1, 3) * reach
    return np.broadcast_to(grid, (len(index), *grid.shape))


def _evenly(count: int) -> np.ndarray:
    """Evenly spaced from −1 to 1, the middle exactly 0; a single point is 0."""
    return (2 * np.arange(count) - (count - 1)) / max(count - 1, 1)


class Found(NamedTuple):
    """The result of a search on N images.

    Attributes:
        image: the image under its best transformation, N × C × H × W.
        transformation: that transformation: degrees, shift down, shift right: N × 3.
        loss: its loss, the lowest, N.
        total: the sum of the losses over all transformations tried, N.
    """

    image: Tensor
    transformation: Tensor
    loss: Tensor
    total: Tensor


@torch.no_grad()
def search(recipe: Spatial, x_NCHW: Tensor, index: np.ndarray, loss: Callable[[Tensor], Tensor]) -> Found:
    """Try every candidate on every image, and keep the first with the lowest loss.

    Args:
        recipe: the space of transformations, and the search in it.
        x_NCHW: float32, in [0, 1].
        index: N; positions of the images in the source.
        loss: images → a loss per image, N; lower is better.
    """
    tried_TN3 = torch.tensor(candidates(recipe, index), device=x_NCHW.device).transpose(0, 1)
    best = x_NCHW
    chosen = torch.zeros_like(tried_TN3[0])
    least = torch.full((len(x_NCHW),), torch.inf, device=x_NCHW.device)
    total = torch.zeros_like(least)
    for tried_N3 in tried_TN3:
        moved = transform(x_NCHW, *tried_N3.unbind(1))
        losses = loss(moved)
        better = losses < least
        best = torch.where(better.view(-1, 1, 1, 1), moved, best)
        chosen = torch.where(better.view(-1, 1), tried_N3, chosen)
        least = torch.where(better, losses, least)
        total = total + losses
    return Found(best, chosen, least, total)
