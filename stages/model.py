"""A classifier of images in [0, 1]: a network with its normalisation, in memory and on disk."""

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
from stages.device import device, numbers
from stages.errors import BadData, BadInput
from stages.pools import steady
from stages.recipes import Precision
from stages.tensors import in_batches, to_unit

LOW: dict[Precision, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""Precisions below float32 → dtype of the network's computations."""

LEAST = 2.0**-100
"""Lower bound for a gradient's magnitude, against division by zero."""


class Classifier(nn.Module):
    """Images in [0, 1], N × C × H × W, to logits, N × classes, in float32."""

    mean: Tensor
    std: Tensor
    outputs: Tensor | None

    def __init__(
        self, design: Design, here: Path, precision: Precision = "float32", network: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.design = design
        self.precision = precision
        self.views: dict[Any, Any] = {}  # optimised views of the same weights, and attacks set up on them
        channels = len(design.mean)
        self.network = network or nets.build(design.arch, design.network_classes, channels, here)
        self.repeat = 3 if channels == 1 and _first_conv_channels(self.network) == 3 else 1
        self.register_buffer("mean", torch.tensor(design.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(design.std).view(1, -1, 1, 1), persistent=False)
        outputs = None if design.outputs is None else torch.tensor(design.outputs)
        self.register_buffer("outputs", outputs, persistent=False)

    def using(self, precision: Precision) -> "Classifier":
        """This classifier at another precision, with the same weights."""
        if precision == self.precision:
            return self
        other = copy(self)
        other.precision = precision
        return other

    def through(self, network: nn.Module) -> "Classifier":
        """This classifier with another network."""
        other = copy(self)
        other.views = {}
        other._modules = {**self._modules, "network": network}  # a copy shares its modules with the original
        return other

    def normalised(self, x_NCHW: Tensor) -> Tensor:
        """What the network is given for images in [0, 1]."""
        x = (x_NCHW - self.mean) / self.std
        return x.repeat(1, self.repeat, 1, 1) if self.repeat > 1 else x

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x = self.normalised(x_NCHW).contiguous(memory_format=torch.channels_last)
        low = LOW.get(self.precision)
        with numbers(self.precision), torch.autocast(x.device.type, low, enabled=low is not None):
            logits: Tensor = self.network(x)
        if self.outputs is not None:
            logits = logits[:, self.outputs]  # not `index_select`, whose deterministic backward pass waits on a GPU
        logits = logits.float() if self.design.logit_scale is None else logits.float() * self.design.logit_scale
        if low is torch.float16 and logits.requires_grad and x.requires_grad:
            _scale_gradients(x, logits)
        return logits


def _scale_gradients(x_NCHW: Tensor, logits_NC: Tensor) -> None:
    """Per-image loss scaling for float16: scale each image's logit gradient to about 1, undo it at the input.

    Float16 underflows at 6e-8, and a confident image's gradient is smaller. The scales are powers of two, thus exact.
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
    """The model on `device`, in channels-last memory format, the fastest for convolutions.

    On a GPU, pooling is replaced by `steady` pooling; on a CPU PyTorch's own is deterministic,
    and existing versions were made with it.
    """
    if device().type == "cuda":
        steady(model.network)
    moved: Classifier = model.to(device()).to(memory_format=torch.channels_last)
    return moved


def save(network: nn.Module) -> bytes:
    """The weights of a network as safetensors."""
    state, seen = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}, set[int]()
    for name, value in state.items():
        if (place := value.untyped_storage().data_ptr()) in seen:  # shared weights
            state[name] = value.clone()
        seen.add(place)
    return safetensors.torch.save(state)


def load(design: Design, weights: bytes, here: Path, precision: Precision = "float32") -> Classifier:
    """Build a classifier and load its weights: in evaluation mode, without gradients, on `device`.

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


def logits_of(model: Classifier, pixels_NHWC: np.ndarray, batch_size: int) -> np.ndarray:
    """Logits of a model on images, in float32: N × classes.

    Raises:
        BadData: a logit is NaN or infinite.
    """
    plain = model.using("float32")

    def answer(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(plain(to_unit(x, plain.mean.device)).cpu())

    logits = in_batches(answer, batch_size, pixels_NHWC)
    if not np.isfinite(logits).all():
        raise BadData(f"the model ({model.design.arch}) answers some images with NaN or infinity")
    return logits
