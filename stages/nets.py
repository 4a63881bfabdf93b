"""Networks: small ones of this project, torchvision's (also adapted to 32 pixels), and the user's own."""

import inspect
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from stages import own
from stages.errors import BadInput
from stages.recipes import is_own


class ConvBlock(nn.Sequential):
    """Convolution without bias, max pooling if asked for, batch norm, ReLU."""

    def __init__(self, width_in: int, width_out: int, kernel: int = 3, stride: int = 1, pool: bool = False) -> None:
        super().__init__(
            nn.Conv2d(width_in, width_out, kernel, stride, padding=1, bias=False),
            *([nn.MaxPool2d(2)] if pool else []),
            nn.BatchNorm2d(width_out),
            nn.ReLU(),
        )


class Residual(nn.Module):
    """x + f(x), with f two convolution blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(ConvBlock(width, width), ConvBlock(width, width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


def _head(pool: nn.Module, width: int, classes: int) -> tuple[nn.Module, ...]:
    return pool, nn.Flatten(), nn.Linear(width, classes)


def small_cnn(classes: int, channels: int) -> nn.Module:
    """Three convolutions, 32-64-128, for images of 8 to 28 pixels; 95 thousand parameters."""
    return nn.Sequential(
        ConvBlock(channels, 32),
        ConvBlock(32, 64),
        nn.MaxPool2d(2),
        ConvBlock(64, 128),
        *_head(nn.AdaptiveMaxPool2d(1), 128, classes),
    )


def fast_resnet(classes: int, channels: int) -> nn.Module:
    """Two residual stages, 64-128, for 32 pixels on a CPU; half a million parameters.

    The first convolution has stride 2, since a ResNet spends most of its time at full resolution.
    """
    return nn.Sequential(
        ConvBlock(channels, 64, kernel=4, stride=2),
        Residual(64),
        nn.MaxPool2d(2),
        ConvBlock(64, 128),
        Residual(128),
        *_head(nn.AdaptiveAvgPool2d(1), 128, classes),
    )


def resnet9(classes: int, channels: int) -> nn.Module:
    """The ResNet-9 of the DAWNBench CIFAR-10 entries (D. Page): 64-128-256-512, 32 pixels, 6.6 million parameters."""
    return nn.Sequential(
        ConvBlock(channels, 64),
        ConvBlock(64, 128),
        nn.MaxPool2d(2),
        Residual(128),
        ConvBlock(128, 256),
        nn.MaxPool2d(2),
        ConvBlock(256, 512),
        nn.MaxPool2d(2),
        Residual(512),
        *_head(nn.AdaptiveMaxPool2d(1), 512, classes),
    )


class Scaled(nn.Module):
    """Multiplication by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

    def extra_repr(self) -> str:
        return f"{self.factor:g}"


def slim_resnet(classes: int, channels: int) -> nn.Module:
    """ResNet-9 at half its width and without its last stage: 32-64-128, for 32 pixels; half a million parameters.

    Max pooling comes before batch norm, on a quarter of the pixels. The logits are divided by 5, as in Jordan's
    replication of the 2019 experiment.
    """
    return nn.Sequential(
        ConvBlock(channels, 32),
        ConvBlock(32, 64, pool=True),
        Residual(64),
        ConvBlock(64, 128, pool=True),
        Residual(128),
        *_head(nn.AdaptiveMaxPool2d(1), 128, classes),
        Scaled(1 / 5),
    )


class AirGroup(nn.Sequential):
    """Two 3 × 3 convolutions, the first with max pooling, each with batch norm and GELU.

    The convolutions are initialised to the identity on as many channels as possible, and batch norm's scale stays 1.
    """

    def __init__(self, width_in: int, width_out: int) -> None:
        convs = [nn.Conv2d(width, width_out, 3, padding=1, bias=False) for width in (width_in, width_out)]
        norms = [nn.BatchNorm2d(width_out, eps=1e-12, momentum=0.4) for _ in convs]
        for conv, norm in zip(convs, norms, strict=True):
            nn.init.dirac_(conv.weight[: conv.in_channels])
            norm.weight.requires_grad_(False)
        super().__init__(convs[0], nn.MaxPool2d(2), norms[0], nn.GELU(), convs[1], norms[1], nn.GELU())


def airnet(classes: int, channels: int) -> nn.Module:
    """After airbench94 (Jordan 2024): groups of 64-256-256, for 16 pixels or more; 2.0 million parameters.

    The first layer has eight 2 × 2 filters per colour, so that `whiten` can use both signs of every principal
    direction. The logits are divided by 9.
    """
    filters = 8 * channels
    return nn.Sequential(
        nn.Conv2d(channels, filters, 2),
        nn.GELU(),
        AirGroup(filters, 64),
        AirGroup(64, 256),
        AirGroup(256, 256),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(256, classes, bias=False),
        Scaled(1 / 9),
    )


def _cifar(name: str) -> Callable[[int, int], nn.Module]:
    """A torchvision network for 32 pixels: a 3 × 3 stem with stride 1 in place of ImageNet's (He et al. 2016)."""

    def build_for_cifar(classes: int, channels: int) -> nn.Module:
        from torchvision import models

        net: Any = models.get_model(name, weights=None, num_classes=classes)
        match net:
            case models.ResNet():
                net.conv1 = _stem(channels, net.conv1.out_channels)
                net.maxpool = nn.Identity()
            case models.DenseNet():
                net.features.conv0 = _stem(channels, net.features.conv0.out_channels)
                net.features.pool0 = nn.Identity()
            case models.VGG():
                net.features[0] = nn.Conv2d(channels, net.features[0].out_channels, 3, padding=1)
                net.avgpool, net.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, classes)
        return cast(nn.Module, net)

    build_for_cifar.__doc__ = f"torchvision's {name} with a stem for 32 pixels."
    return build_for_cifar


def _stem(channels: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(channels, width, 3, padding=1, bias=False)


CIFAR = {f"cifar_{name}": _cifar(name) for name in ("resnet18", "resnet50", "vgg16_bn", "densenet121")}

OURS = {
    "small_cnn": small_cnn,
    "fast_resnet": fast_resnet,
    "slim_resnet": slim_resnet,
    "resnet9": resnet9,
    "airnet": airnet,
    **CIFAR,
}


WITHOUT_HEADS = {name: {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception_v3")}
"""Networks that return more than logits in training, and the arguments that prevent it."""


def build(arch: str, classes: int, channels: int, here: Path) -> nn.Module:
    """A new network that maps N × channels × H × W to N × classes logits.

    Args:
        arch: one of OURS, a torchvision classifier, or the user's own (see `own.find`): a callable of the number of
            classes and, if it has such a parameter, the number of channels.
        classes: number of classes.
        channels: 1 or 3. torchvision's networks take 3; `Classifier` repeats a grey channel for them.
        here: folder from which the user's modules are imported.

    Raises:
        BadInput: there is no such network, or it cannot be imported or built.
    """
    if arch in OURS:
        return OURS[arch](classes, channels)
    if is_own(arch):
        return _own(arch, classes, channels, here)
    from torchvision import models

    if arch not in models.list_models(module=models):
        raise BadInput(
            f"arch {arch!r} is not one of {', '.join(OURS)}, not a torchvision classifier, "
            "and not of the form `package.module:name` or `./folder/file.py:name`"
        )
    model: nn.Module = models.get_model(arch, weights=None, num_classes=classes, **WITHOUT_HEADS.get(arch, {}))
    return model


def _own(arch: str, classes: int, channels: int, here: Path) -> nn.Module:
    make: Callable[..., Any] = own.find(arch, here)
    if not callable(make) or isinstance(make, nn.Module):
        kind = type(make).__name__
        raise BadInput(f"arch {arch} is of type {kind}, expected a function or class that makes a torch.nn.Module")
    takes = _parameters(make)
    by_name = {"classes": classes, "num_classes": classes, "channels": channels, "in_channels": channels}
    given = {k: v for k, v in by_name.items() if k in takes}
    with own.guarded(arch, f"cannot be built for {classes} classes", here):
        model = make(**given) if {"classes", "num_classes"} & set(given) else make(classes, **given)
    if not isinstance(model, nn.Module):
        raise BadInput(f"arch {arch} made something of type {type(model).__name__}, expected a torch.nn.Module")
    return model


def _parameters(make: Callable[..., Any]) -> Container[str]:
    try:
        return inspect.signature(make).parameters
    except (TypeError, ValueError):  # some callables written in C have no signature
        return ()


def probe(model: nn.Module, shape: tuple[int, int, int], classes: int, arch: str) -> None:
    """Pass one batch through, so that a network that does not fit its data is refused before work starts.

    Raises:
        BadInput: the network raises an error, or its output is not N × `classes` logits.
    """
    network = getattr(model, "network", model)  # a Classifier assumes that its network returns a tensor
    asked = network.register_forward_hook(lambda _, given, logits: _refuse_no_tensor(logits, arch))
    with own.guarded(arch, f"refuses images of {'×'.join(map(str, shape))}"), torch.no_grad():
        logits = model.eval()(torch.zeros(2, *shape))
    asked.remove()
    if logits.shape != (2, classes):
        raise BadInput(
            f"arch {arch} gives {tuple(logits.shape[1:])} outputs for each image, expected {classes} classes"
        )


def _refuse_no_tensor(logits: Any, arch: str) -> None:
    if not isinstance(logits, Tensor):
        raise BadInput(f"arch {arch} gives something of type {type(logits).__name__}, expected a tensor of logits")
