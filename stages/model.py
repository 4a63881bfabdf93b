"""A classifier of images in [0, 1]: a network with its normalisation inside, on disk and in memory."""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from stages import nets
from stages.design import Design
from stages.device import device, numbers, sent
from stages.errors import BadData, BadInput
from stages.pools import steady
from stages.recipes import Precision

LOW: dict[Precision, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""What the network computes in, at the precisions below float32."""

LEAST = 2.0**-100
"""Stands for a gradient of zero where one is divided by its size."""


class Classifier(nn.Module):
    """Images in [0, 1], N × C × H × W, to logits, N × classes, in float32."""

    mean: Tensor
    std: Tensor
    outputs: Tensor | None

    def __init__(self, design: Design, here: Path, precision: Precision = "float32") -> None:
        super().__init__()
        self.design = design
        self.precision = precision
        self.views: dict[Any, Any] = {}  # of the same weights, prepared for a search; and searches
        channels = len(design.mean)
        self.network = nets.build(design.arch, design.network_classes, channels, here)
        self.repeat = 3 if channels == 1 and _first_conv_channels(self.network) == 3 else 1
        self.register_buffer("mean", torch.tensor(design.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(design.std).view(1, -1, 1, 1), persistent=False)
        outputs = None if design.outputs is None else torch.tensor(design.outputs)
        self.register_buffer("outputs", outputs, persistent=False)

    def using(self, precision: Precision) -> "Classifier":
        """This classifier, the same weights, at another precision."""
        if precision == self.precision:
            return self
        other = copy(self)
        other.precision = precision
        return other

    def through(self, network: nn.Module) -> "Classifier":
        """This classifier with another network in its place."""
        other = copy(self)
        other.views = {}
        other._modules = {**self._modules, "network": network}  # a copy shares its modules with the original
        return other

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x = (x_NCHW - self.mean) / self.std
        if self.repeat > 1:
            x = x.repeat(1, self.repeat, 1, 1)
        x = x.contiguous(memory_format=torch.channels_last)
        low = LOW.get(self.precision)
        with numbers(self.precision), torch.autocast(x.device.type, low, enabled=low is not None):
            logits: Tensor = self.network(x)
        if self.outputs is not None:
            logits = logits[:, self.outputs]  # not `index_select`, whose deterministic backward pass waits on a GPU
        logits = logits.float()
        if low is torch.float16 and logits.requires_grad and x.requires_grad:
            _scale_gradients(x, logits)
        return logits


def _scale_gradients(x_NCHW: Tensor, logits_NC: Tensor) -> None:
    """Have each image's gradient run back through the network as large as its logits' is brought to 1.

    Float16 ends at 6e-8, and a confident image's gradient is less. Powers of two, undone at the image, change no bit.
    """
    scale: list[Tensor] = []

    def up(grad: Tensor) -> Tensor:
        scale[:] = [torch.exp2(-grad.abs().amax(1).clamp_min(LEAST).log2().floor())]
        return grad * scale[0].view(-1, 1)

    def down(grad: Tensor) -> Tensor:
        return grad / scale[0].view(-1, 1, 1, 1) if scale else grad

    logits_NC.register_hook(up)  # type: ignore[no-untyped-call]
    x_NCHW.register_hook(down)  # type: ignore[no-untyped-call]


def _first_conv_channels(network: nn.Module) -> int | None:
    return next((m.in_channels for m in network.modules() if isinstance(m, nn.Conv2d)), None)


def on_device(model: "Classifier") -> "Classifier":
    """The model on `device`, its weights laid out channels last, which convolutions like best.

    On a GPU its pooling is `steady`; on a processor PyTorch's own is, and is what versions were made with.
    """
    if device().type == "cuda":
        steady(model.network)
    moved: Classifier = model.to(device()).to(memory_format=torch.channels_last)
    return moved


def to_unit(pixels_NHWC: np.ndarray, where: torch.device | None = None) -> Tensor:
    """uint8, N × H × W × C, to float32 in [0, 1], N × C × H × W, each level exactly k / 255."""
    return unit(sent(pixels_NHWC, where))


def unit(pixels_NHWC: Tensor) -> Tensor:
    """The same of pixels that are there already."""
    return pixels_NHWC.permute(0, 3, 1, 2).float() / 255


def to_pixels(x_NCHW: Tensor) -> np.ndarray:
    """The way back: [0, 1] to the nearest of 256 levels, uint8, N × H × W × C."""
    levels = (x_NCHW.double() * 255).round().clamp(0, 255).to(torch.uint8)
    return np.asarray(levels.permute(0, 2, 3, 1).contiguous().cpu())


def batches(size: int, *columns: np.ndarray) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Batches of one fixed shape: how many rows count, and the columns.

    The last batch is padded with its own first row: another batch shape gives other bits.
    """
    for first in range(0, len(columns[0]), size):
        parts = [column[first : first + size] for column in columns]
        count = len(parts[0])
        yield count, [np.concatenate([part, np.repeat(part[:1], size - count, axis=0)]) for part in parts]


def in_batches(compute: Callable[..., np.ndarray], size: int, *columns: np.ndarray) -> np.ndarray:
    """Apply a function to `batches` and join what it returns."""
    made = [compute(*padded)[:count] for count, padded in batches(size, *columns)]
    return np.concatenate(made) if made else columns[0]


def save(network: nn.Module) -> bytes:
    """The weights of a network as safetensors."""
    state, seen = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}, set[int]()
    for name, value in state.items():
        if (place := value.untyped_storage().data_ptr()) in seen:  # layers that share their weights
            state[name] = value.clone()
        seen.add(place)
    return safetensors.torch.save(state)


def load(design: Design, weights: bytes, here: Path, precision: Precision = "float32") -> Classifier:
    """A classifier ready for use: in evaluation mode, its weights without gradient, on `device`.

    Raises:
        BadData: the bytes are not safetensors.
        BadInput: the weights do not fit the arch.
    """
    model = Classifier(design, here, precision)
    try:
        state = safetensors.torch.load(weights)
    except safetensors.SafetensorError as error:
        raise BadData(f"weights of {design.arch} are not safetensors: {error}") from error
    _fit(model.network, state, design.arch)
    return on_device(model).eval().requires_grad_(False)


def _fit(network: nn.Module, state: dict[str, Tensor], arch: str) -> None:
    own = network.state_dict()
    wrong = sorted(set(own) ^ set(state)) or [n for n in own if own[n].shape != state[n].shape]
    if wrong:
        name = wrong[0]
        sides = [f"{tuple(side[name].shape)}" if name in side else "nothing" for side in (state, own)]
        raise BadInput(
            f"the checkpoint does not fit arch {arch}: {name} is {sides[0]} in the checkpoint and "
            f"{sides[1]} in the arch ({len(wrong)} of {len(own)} entries differ)"
        )
    network.load_state_dict(state)


def channel_statistics(sums: Sequence[float], squares: Sequence[float], count: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel in [0, 1], from sums of uint8 values and of their squares."""
    means = [s / count for s in sums]
    deviations = [max(q / count - m * m, 1.0) ** 0.5 for q, m in zip(squares, means, strict=True)]
    return [m / 255 for m in means], [d / 255 for d in deviations]
