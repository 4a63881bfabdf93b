"""Initialise the first convolution to whiten: its filters are the principal directions of training image patches."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from stages.errors import BadInput
from stages.model import Classifier
from stages.tensors import to_unit

MEASURED = 2000
"""Images for the estimate: at 32 pixels, two million patches of 12 numbers each."""

CHUNK = 50
"""Images whose patches are in memory at a time."""

FLOOR = 5e-4
"""Added to every variance, so that directions of tiny variance are not amplified (Page 2019, Jordan 2024)."""


def first_convolution(model: Classifier) -> nn.Conv2d:
    """The network's first convolution.

    Raises:
        BadInput: there is none, or its filters cannot be pairs of principal directions.
    """
    found = next((module for module in model.network.modules() if isinstance(module, nn.Conv2d)), None)
    if found is None:
        raise BadInput(f"arch {model.design.arch} has no convolution to whiten with: leave out `whiten`")
    count, most = found.out_channels, 2 * found.weight[0].numel()
    if found.groups > 1 or found.dilation != (1, 1) or count % 2 or count > most:
        raise BadInput(
            f"the first convolution of arch {model.design.arch} has {count} filters of {found.weight[0].numel()} "
            f"numbers; whitening takes an even number of them, at most {most}, without groups or dilation: leave out "
            "`whiten`"
        )
    return found


def whiten(model: Classifier, images: Iterable[np.ndarray]) -> None:
    """Set the first convolution's weights to `filters`, and its bias, if any, to zero.

    Args:
        model: the model; patches are computed on its device.
        images: pixels of training images, uint8, N × H × W × C; about the first `MEASURED` images are used.
    """
    conv = first_convolution(model)
    total, count, seen = torch.zeros((), dtype=torch.float64, device=model.mean.device), 0, 0
    for x in (pixels[at : at + CHUNK] for pixels in images for at in range(0, len(pixels), CHUNK)):
        patches = patches_of(model.normalised(to_unit(x, model.mean.device)), conv)
        total, count, seen = total + patches.T @ patches, count + len(patches), seen + len(x)
        if seen >= MEASURED:
            break
    with torch.no_grad():
        conv.weight.copy_(filters((total / count).cpu(), conv.out_channels).view_as(conv.weight))
        if conv.bias is not None:
            conv.bias.zero_()


def patches_of(x_NCHW: Tensor, conv: nn.Conv2d) -> Tensor:
    """Patches of images under a convolution's kernel, without padding: one per row, float64."""
    (height, width), (down, right) = conv.kernel_size, conv.stride
    patches = x_NCHW.unfold(2, height, down).unfold(3, width, right).movedim(1, 3)
    return patches.reshape(-1, conv.weight[0].numel()).double()


def filters(moment_DD: Tensor, count: int) -> Tensor:
    """Whitening filters: eigenvectors vᵢ / √(λᵢ + `FLOOR`) in the order of decreasing λᵢ, then their negatives.

    On the patches of the moment matrix, the outputs of the first half are uncorrelated and have variance
    λᵢ / (λᵢ + `FLOOR`) (Page 2019). With both signs, a ReLU loses no information (Jordan 2024).

    Args:
        moment_DD: second moments of the patches.
        count: number of filters, even.
    """
    values, vectors = torch.linalg.eigh(moment_DD)
    half = (vectors / (values + FLOOR).sqrt()).T.flip(0)[: count // 2]
    return torch.cat([half, -half])
