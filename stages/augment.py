"""Random views of a training batch, drawn on the batch's own generator."""

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.recipes import Augmentation, Spatial
from stages.spatial import transform


def augment(x_NCHW: Tensor, how: Augmentation, draw: torch.Generator) -> Tensor:
    """Flip left–right with probability one half; for `crop-flip` also shift by up to an eighth of the width.

    The shift is a crop at a random place from the image padded with zeros (4 pixels for 32, as He et
    al. 2016 do for CIFAR-10). `spatial` instead rotates and shifts, anywhere in the space that the spatial attack
    searches by default (Engstrom et al. 2019).
    """
    if how == "none":
        return x_NCHW
    if how == "spatial":
        space = Spatial()
        reach = torch.tensor([space.rotation, space.translation, space.translation])
        return transform(x_NCHW, *(reach[:, None] * (2 * torch.rand(3, len(x_NCHW), generator=draw) - 1)))
    count, _, height, width = x_NCHW.shape
    flips = torch.rand(count, generator=draw) < 0.5
    x = torch.where(flips.view(-1, 1, 1, 1).to(x_NCHW.device), x_NCHW.flip(3), x_NCHW)
    if how == "flip":
        return x
    pad = max(1, width // 8)
    padded = F.pad(x, (pad, pad, pad, pad))
    down, right = torch.randint(0, 2 * pad + 1, (2, count), generator=draw).to(x.device)
    rows = (down[:, None] + torch.arange(height, device=x.device))[:, None, :, None]
    columns = (right[:, None] + torch.arange(width, device=x.device))[:, None, None, :]
    images = torch.arange(count, device=x.device)[:, None, None, None]
    channels = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
    return padded[images, channels, rows, columns]
