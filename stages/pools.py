"""Adaptive pooling with a deterministic backward pass on GPUs, which PyTorch's own lacks."""

import torch
from torch import Tensor, nn


class Averages(nn.AdaptiveAvgPool2d):
    """`nn.AdaptiveAvgPool2d` as means over blocks, or as a matrix product if the blocks overlap."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        sizes = _sizes(self.output_size, x_NCHW)
        if (blocks := _blocks(x_NCHW, sizes)) is not None:
            return blocks.mean(-1)
        rows, columns = (_means(*pair, x_NCHW) for pair in zip(sizes, x_NCHW.shape[2:], strict=True))
        return rows @ x_NCHW @ columns.T


class Maxima(nn.AdaptiveMaxPool2d):
    """`nn.AdaptiveMaxPool2d` over blocks that do not overlap; the first of equal maxima gets the gradient."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        blocks = _blocks(x_NCHW, _sizes(self.output_size, x_NCHW))
        if blocks is None:
            return super().forward(x_NCHW)  # type: ignore[no-any-return]
        # Not `max`: its backward pass is a scatter, which sorts in its deterministic kernel.
        first = torch.arange(blocks.shape[-1], device=blocks.device) == blocks.detach().argmax(-1, keepdim=True)
        return torch.where(first, blocks, 0).sum(-1)


def steady(network: nn.Module) -> nn.Module:
    """Replace PyTorch's adaptive pooling in a network by these classes where they apply."""
    for name, layer in list(network.named_modules()):
        if type(layer) is nn.AdaptiveAvgPool2d:
            network.set_submodule(name, Averages(layer.output_size))
        elif type(layer) is nn.AdaptiveMaxPool2d and not layer.return_indices:
            network.set_submodule(name, Maxima(layer.output_size))
    return network


def _sizes(asked: int | tuple[int | None, ...] | None, x_NCHW: Tensor) -> tuple[int, int]:
    """Output height and width; None stands for the image's own."""
    height, width = asked if isinstance(asked, tuple) else (asked, asked)
    return height or x_NCHW.shape[2], width or x_NCHW.shape[3]


def _blocks(x_NCHW: Tensor, sizes: tuple[int, int]) -> Tensor | None:
    """Non-overlapping blocks, N × C × height × width × pixels of a block; None if the sizes do not divide."""
    (height, width), (down, right) = x_NCHW.shape[2:], sizes
    if height % down or width % right:
        return None
    apart = x_NCHW.reshape(*x_NCHW.shape[:2], down, height // down, right, width // right)
    return apart.transpose(3, 4).flatten(4)


def _means(count: int, size: int, like: Tensor) -> Tensor:
    """The matrix, count × size, whose row i averages values ⌊i · size / count⌋ to ⌈(i + 1) · size / count⌉ − 1."""
    i = torch.arange(count, device=like.device)[:, None]
    at = torch.arange(size, device=like.device)
    inside = (at >= i * size // count) & (at < -(-(i + 1) * size // count))
    return (inside / inside.sum(1, keepdim=True)).to(like.dtype)
