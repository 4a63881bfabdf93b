"""A first convolution that whitens: its filters are the principal directions of the patches of the training images."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from stages.errors import BadInput
from stages.model import Classifier
from stages.tensors import to_unit

MEASURED = 2000
"""Images that the directions are measured on: two million patches of 32-pixel images, for 12 numbers a patch."""

CHUNK = 50
"""Images whose patches are held at a time."""

FLOOR = 5e-4
"""Added to every variance: directions in which patches hardly vary are not blown up (Page 2019, Jordan 2024)."""


def first_convolution(model: Classifier) -> nn.Conv2d:
    """The convolution that takes the images.

    Raises:
        BadInput: the network has none, or one whose filters cannot be pairs of principal directions.
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
    """Give the first convolution the filters of `filters`, and a bias of zero where it has one.

    Args:
        model: on the device where its images shall be.
        images: pixels of training images, uint8, N × H × W × C; of these about the first `MEASURED` count.
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
    """The patches of some images that a convolution sees whole, as rows, float64."""
    (height, width), (down, right) = conv.kernel_size, conv.stride
    patches = x_NCHW.unfold(2, height, down).unfold(3, width, right).movedim(1, 3)
    return patches.reshape(-1, conv.weight[0].numel()).double()


def filters(moment_DD: Tensor, count: int) -> Tensor:
    """Half of them eigenvectors vᵢ / √(λᵢ + `FLOOR`), the largest λᵢ first, the others their negatives.

    Their answers to the patches that the moment was measured on are uncorrelated, of variance λᵢ / (λᵢ + `FLOOR`) (Page
    2019; with both signs, so that no rectifier loses what another would see, as in Jordan 2024).
    """
    values, vectors = torch.linalg.eigh(moment_DD)
    half = (vectors / (values + FLOOR).sqrt()).T.flip(0)[: count // 2]
    return torch.cat([half, -half])
