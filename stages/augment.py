"""Random views of a training batch, drawn on the batch's own generator, and computed where the batch is."""

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
    """Flip left–right with probability one half; for `crop-flip` also shift by up to an eighth of the width.

    The shift is a crop at a random place from the image padded with zeros (4 pixels for 32, as He et al. 2016 do for
    CIFAR-10). `shift-flip` shifts half as far, from the image mirrored at its edges (2 pixels for 32, as Jordan 2024
    does). `spatial` instead rotates and shifts, anywhere in the space that the spatial attack searches by default
    (Engstrom et al. 2019). `resized-crop` is a crop of any size, enlarged to that of the image, and a flip;
    `imagenet` adds colours and lighting: see `resized_crop`, `jittered`, `lit`.

    Args:
        x_NCHW: float.
        how: which of them.
        draw: what is drawn from.
        flips_N: the images to flip, where that is not to be drawn.

    Raises:
        BadInput: colours are asked for of images that have none.
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
    """Each image shifted by up to so many pixels each way, and what comes in from outside as `F.pad` has it."""
    x, (count, _, height, width) = x_NCHW, x_NCHW.shape
    padded = F.pad(x, (pad, pad, pad, pad), mode=edges)
    down, right = on(torch.randint(0, 2 * pad + 1, (2, count), generator=draw), x.device)
    rows = (down[:, None] + torch.arange(height, device=x.device))[:, None, :, None]
    columns = (right[:, None] + torch.arange(width, device=x.device))[:, None, None, :]
    images = torch.arange(count, device=x.device)[:, None, None, None]
    channels = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
    return padded[images, channels, rows, columns]


SCALE, RATIO, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10
"""Of torchvision's `RandomResizedCrop`: a crop's share of the area, its width over its height, and how often one is
drawn until one fits."""


def boxes(x_NCHW: Tensor, draw: torch.Generator) -> Tensor:
    """A crop of each image, drawn as `RandomResizedCrop` does: top, left, height and width in pixels, 4 × N."""
    count, _, height, width = x_NCHW.shape
    share, log_ratio, at, along = torch.rand(4, TRIES, count, generator=draw, dtype=torch.float64)
    area = height * width * (SCALE[0] + (SCALE[1] - SCALE[0]) * share)
    low, high = (math.log(each) for each in RATIO)
    ratio = (low + (high - low) * log_ratio).exp()
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.to(torch.int8).argmax(0, keepdim=True)  # the first try that fits
    top, left = ((at * (height - h + 1)).floor(), (along * (width - w + 1)).floor())
    found = torch.stack([each.gather(0, first)[0] for each in (top, left, h, w)])
    # Where none does: all of the image, or of its middle as much as has a ratio that may be.
    whole_w, whole_h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    middle = torch.tensor([(height - whole_h) // 2, (width - whole_w) // 2, whole_h, whole_w], dtype=torch.float64)
    return torch.where(fits.any(0), found, middle[:, None])


def resized_crop(x_NCHW: Tensor, boxes_4N: Tensor) -> Tensor:
    """Crops enlarged to the size of the images, bilinearly, as torchvision's `resized_crop` does.

    Args:
        x_NCHW: float.
        boxes_4N: top, left, height and width of each crop, in whole pixels.
    """
    height, width = x_NCHW.shape[2:]
    top, left, h, w = on(boxes_4N.to(x_NCHW.dtype), x_NCHW.device).unsqueeze(2)

    def places(begin: Tensor, size: Tensor, count: int) -> Tensor:
        """Where in the image the pixels of a row or column come from: never outside of the crop."""
        inside = (torch.arange(count, device=x_NCHW.device) + 0.5) * (size / count) - 0.5
        return begin + torch.minimum(inside.clamp_min(0), size - 1)

    rows, columns = places(top, h, height), places(left, w, width)
    scaled = 2 * rows / max(height - 1, 1) - 1, 2 * columns / max(width - 1, 1) - 1
    grid = torch.stack([scaled[1][:, None, :].expand(-1, height, -1), scaled[0][:, :, None].expand(-1, -1, width)], -1)
    return F.grid_sample(x_NCHW, grid, mode="bilinear", padding_mode="border", align_corners=True)


JITTER = 0.1
"""The most by which brightness, contrast and saturation change: that of the paper's networks (`robustness`)."""

GREY = (0.2989, 0.587, 0.114)
"""Shares of red, green and blue in a grey, as torchvision has them."""


def jittered(x_NCHW: Tensor, draw: torch.Generator, most: float = JITTER) -> Tensor:
    """Brightness, contrast and saturation of each image changed at random: torchvision's `ColorJitter` without hue.

    Their order is drawn for the batch, their factors for each image.
    """
    order = torch.randperm(3, generator=draw).tolist()
    return recoloured(x_NCHW, 1 + most * (2 * torch.rand(3, len(x_NCHW), generator=draw) - 1), order)


def recoloured(x_NCHW: Tensor, factors_3N: Tensor, order: list[int]) -> Tensor:
    """Brightness (0), contrast (1) and saturation (2) times a factor each, in an order, each clipped to [0, 1].

    Raises:
        BadInput: the images have no colours.
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
"""The deviation of lighting noise, in standard deviations of ImageNet's colours: half of AlexNet's, `robustness`'s."""

VALUES = (0.2175, 0.0188, 0.0045)
VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
"""Principal components of the colours of ImageNet's pixels (Krizhevsky et al. 2012): the columns are directions."""


def lit(x_NCHW: Tensor, draw: torch.Generator) -> Tensor:
    """The light of each image changed along the principal components of ImageNet's colours, clipped to [0, 1]."""
    amounts = LIGHT * torch.randn(len(x_NCHW), 3, generator=draw) * torch.tensor(VALUES)
    light = on(amounts @ torch.tensor(VECTORS).T, x_NCHW.device).to(x_NCHW.dtype)
    return (x_NCHW + light[:, :, None, None]).clamp(0, 1)
