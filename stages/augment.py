"""Data augmentation of a training batch, drawn from the batch's own generator and computed on the batch's device."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.device import on
from stages.errors import BadInput
from stages.recipes import Augmentation, Spatial
from stages.spatial import transform


def augment(x_NCHW: Tensor, how: Augmentation, draw: torch.Generator, flips_N: np.ndarray | None = None) -> Tensor:
    """Flip each image left–right with probability one half, and augment it as `how` specifies.

    - `crop-flip`: a random crop of the image padded with zeros by an eighth of its width (4 pixels for 32, as He et al.
      2016 for CIFAR-10).
    - `shift-flip`: the same with half the padding, by reflection (2 pixels for 32, as Jordan 2024).
    - `spatial`: instead of a flip, a random rotation and shift from the default search space of the spatial attack
      (Engstrom et al. 2019).
    - `resized-crop`: a random crop of random size, resized to the image's; `imagenet` adds colour jitter and lighting
      noise. See `resized_crop`, `jittered`, `lit`.

    Args:
        x_NCHW: float.
        how: the kind of augmentation.
        draw: random generator.
        flips_N: whether to flip each image; drawn if None.

    Raises:
        BadInput: colour jitter of grey images.
    """
    if how == "none":
        return x_NCHW
    if how in ("resized-crop", "imagenet"):
        x = augment(resized_crop(x_NCHW, boxes(x_NCHW, draw)), "flip", draw, flips_N)
        return x if how == "resized-crop" else lit(jittered(x, draw), draw)
    if how == "spatial":
        space = Spatial()
        reach = torch.tensor([space.rotation, space.translation, space.translation])
        return transform(x_NCHW, *(reach[:, None] * (2 * torch.rand(3, len(x_NCHW), generator=draw) - 1)))
    flips = torch.rand(len(x_NCHW), generator=draw) < 0.5 if flips_N is None else torch.from_numpy(flips_N)
    x = torch.where(on(flips, x_NCHW.device).view(-1, 1, 1, 1), x_NCHW.flip(3), x_NCHW)
    if how == "flip":
        return x
    if how == "shift-flip":
        return _shifted(x, max(1, x.shape[3] // 16), "reflect", draw)
    return _shifted(x, max(1, x.shape[3] // 8), "constant", draw)


def _shifted(x_NCHW: Tensor, pad: int, edges: str, draw: torch.Generator) -> Tensor:
    """Shift each image by up to `pad` pixels each way; `F.pad` fills in the border, in mode `edges`."""
    x, (count, _, height, width) = x_NCHW, x_NCHW.shape
    padded = F.pad(x, (pad, pad, pad, pad), mode=edges)
    down, right = on(torch.randint(0, 2 * pad + 1, (2, count), generator=draw), x.device)
    rows = (down[:, None] + torch.arange(height, device=x.device))[:, None, :, None]
    columns = (right[:, None] + torch.arange(width, device=x.device))[:, None, None, :]
    images = torch.arange(count, device=x.device)[:, None, None, None]
    channels = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
    return padded[images, channels, rows, columns]


OFFSETS = ((0, 0), (1, -0.5), (-0.5, 1), (-1, 0.5))
"""Shifts of the views, down and right, in the largest shift of `shift-flip`."""

VIEWS = 2 * len(OFFSETS)
"""Number of views: each shift, and its mirror image."""


def view(x_NCHW: Tensor, number: int) -> Tensor:
    """One of the fixed views of an image over which an attack averages its gradient.

    View 0 is the image, 1 its mirror image; the others are both of them shifted by up to a sixteenth of the width
    (2 pixels for 32), with the edge repeated. Nothing is drawn, so the backward pass is deterministic and a step can be
    captured as a CUDA graph.

    Args:
        x_NCHW: float.
        number: below `VIEWS`.
    """
    shift, mirrored = divmod(number, 2)
    most = max(1, x_NCHW.shape[3] // 16)
    down, right = (round(most * share) for share in OFFSETS[shift])
    x = x_NCHW.flip(3) if mirrored else x_NCHW
    return _with_edge(_with_edge(x, 2, down), 3, right)


def _with_edge(x: Tensor, axis: int, by: int) -> Tensor:
    """Shift along an axis; the row or column at the edge fills what becomes free."""
    if by == 0:
        return x
    size = x.shape[axis]
    kept = x.narrow(axis, max(-by, 0), size - abs(by))
    edge = x.narrow(axis, 0 if by > 0 else size - 1, 1)
    filling = [edge] * abs(by)
    return torch.cat([*filling, kept] if by > 0 else [kept, *filling], axis)


SCALE, RATIO, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10
"""Defaults of torchvision's `RandomResizedCrop`: a crop's fraction of the area, its width over its height, and the
number of draws before it falls back to a central crop."""


def boxes(x_NCHW: Tensor, draw: torch.Generator) -> Tensor:
    """Draw a crop of each image as `RandomResizedCrop` does: top, left, height and width in pixels, 4 × N."""
    count, _, height, width = x_NCHW.shape
    share, log_ratio, at, along = torch.rand(4, TRIES, count, generator=draw, dtype=torch.float64)
    area = height * width * (SCALE[0] + (SCALE[1] - SCALE[0]) * share)
    low, high = (math.log(each) for each in RATIO)
    ratio = (low + (high - low) * log_ratio).exp()
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.to(torch.int8).argmax(0, keepdim=True)  # the first draw that fits
    top, left = ((at * (height - h + 1)).floor(), (along * (width - w + 1)).floor())
    found = torch.stack([each.gather(0, first)[0] for each in (top, left, h, w)])
    # Without a fit: the largest central crop whose ratio is allowed.
    whole_w, whole_h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    middle = torch.tensor([(height - whole_h) // 2, (width - whole_w) // 2, whole_h, whole_w], dtype=torch.float64)
    return torch.where(fits.any(0), found, middle[:, None])


def resized_crop(x_NCHW: Tensor, boxes_4N: Tensor) -> Tensor:
    """Resize crops bilinearly to the size of the images, as torchvision's `resized_crop` does.

    Args:
        x_NCHW: float.
        boxes_4N: top, left, height and width of each crop, in whole pixels.
    """
    height, width = x_NCHW.shape[2:]
    top, left, h, w = on(boxes_4N.to(x_NCHW.dtype), x_NCHW.device).unsqueeze(2)

    def places(begin: Tensor, size: Tensor, count: int) -> Tensor:
        """Source coordinates of a row's or column's pixels, clamped to the crop."""
        inside = (torch.arange(count, device=x_NCHW.device) + 0.5) * (size / count) - 0.5
        return begin + torch.minimum(inside.clamp_min(0), size - 1)

    rows, columns = places(top, h, height), places(left, w, width)
    scaled = 2 * rows / max(height - 1, 1) - 1, 2 * columns / max(width - 1, 1) - 1
    grid = torch.stack([scaled[1][:, None, :].expand(-1, height, -1), scaled[0][:, :, None].expand(-1, -1, width)], -1)
    return F.grid_sample(x_NCHW, grid, mode="bilinear", padding_mode="border", align_corners=True)


JITTER = 0.1
"""Maximum change of brightness, contrast and saturation: that of the paper's networks (`robustness`)."""

GREY = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in grey, as in torchvision."""


def jittered(x_NCHW: Tensor, draw: torch.Generator, most: float = JITTER) -> Tensor:
    """Change brightness, contrast and saturation at random: torchvision's `ColorJitter` without hue.

    The order is drawn once per batch, the factors per image.
    """
    order = torch.randperm(3, generator=draw).tolist()
    return recoloured(x_NCHW, 1 + most * (2 * torch.rand(3, len(x_NCHW), generator=draw) - 1), order)


def recoloured(x_NCHW: Tensor, factors_3N: Tensor, order: list[int]) -> Tensor:
    """Scale brightness (0), contrast (1) and saturation (2) in the given order, clipping to [0, 1] after each.

    Raises:
        BadInput: the images are grey.
    """
    if x_NCHW.shape[1] != 3:
        raise BadInput(f"augment imagenet changes colours, and the images have {x_NCHW.shape[1]} channel: take another")
    shares = torch.tensor(GREY, dtype=x_NCHW.dtype).view(1, 3, 1, 1)
    factors, shares = on(factors_3N.to(x_NCHW.dtype), x_NCHW.device), on(shares, x_NCHW.device)
    x = x_NCHW
    for kind in order:
        grey = (x * shares).sum(1, keepdim=True)
        other = (torch.zeros_like(grey), grey.mean((1, 2, 3), keepdim=True), grey)[kind]
        factor = factors[kind].view(-1, 1, 1, 1)
        x = (factor * x + (1 - factor) * other).clamp(0, 1)
    return x


LIGHT = 0.05
"""Standard deviation of lighting noise, in units of ImageNet's own: that of `robustness`, half of AlexNet's."""

VALUES = (0.2175, 0.0188, 0.0045)
VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
"""Principal components of ImageNet's pixel colours (Krizhevsky et al. 2012), one per column."""


def lit(x_NCHW: Tensor, draw: torch.Generator) -> Tensor:
    """Add lighting noise to each image along the principal components of ImageNet's colours; clip to [0, 1]."""
    amounts = LIGHT * torch.randn(len(x_NCHW), 3, generator=draw) * torch.tensor(VALUES)
    light = on(amounts @ torch.tensor(VECTORS).T, x_NCHW.device).to(x_NCHW.dtype)
    return (x_NCHW + light[:, :, None, None]).clamp(0, 1)
