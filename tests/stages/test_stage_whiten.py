"""The whitened first convolution has uncorrelated outputs, and a network that cannot be whitened is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from stages.errors import BadInput
from stages.model import Classifier, Design, to_unit
from stages.whiten import FLOOR, first_convolution, whiten


def model(arch, channels, here=Path()):
    return Classifier(Design(arch, 10, (channels, 32, 32), (0.5,) * channels, (0.25,) * channels), here).eval()


def smooth(count, channels):
    """Images whose neighbouring pixels are similar, as in photographs."""
    draw = np.random.default_rng(0)
    noise = torch.from_numpy(draw.normal(size=(count, channels, 36, 36)))
    x = torch.nn.functional.avg_pool2d(noise, 5, 1) * 200 + 128
    return x.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("channels", [1, 3])
def test_answers_to_the_training_images_are_uncorrelated_and_of_variance_one(channels):
    made, pixels = model("airnet", channels), smooth(100, channels)
    whiten(made, [pixels[:60], pixels[60:]])
    conv = first_convolution(made)
    with torch.no_grad():
        answers = conv(made.normalised(to_unit(pixels)))
    half = conv.out_channels // 2
    torch.testing.assert_close(answers[:, :half], -answers[:, half:])
    flat = answers[:, :half].movedim(1, 0).flatten(1).double()
    moment = flat @ flat.T / flat.shape[1]
    expected = 1 - FLOOR * conv.weight[:half].double().flatten(1).square().sum(1)  # λ / (λ + floor)
    torch.testing.assert_close(moment, torch.diag(expected), atol=2e-3, rtol=0)
    assert expected.max() > 0.99


def test_where_there_are_fewer_filters_than_directions_they_are_the_largest():
    few, many = model("resnet9", 3), smooth(20, 3)
    with pytest.raises(
        BadInput, match="has 64 filters of 27 numbers; whitening takes an even number of them, at most 54"
    ):
        whiten(few, [many])
    few.network[0][0] = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
    whiten(few, [many])
    conv = first_convolution(few)
    norms = conv.weight[:4].flatten(1).norm(dim=1)
    assert (norms.diff() > 0).all()  # the larger the variance, the smaller the filter


def test_a_network_without_convolution_is_refused(make_module, tmp_path):
    name = make_module("""
        from torch import nn
        def make(classes):
            return nn.Sequential(nn.Flatten(), nn.Linear(3072, classes))
    """)
    with pytest.raises(BadInput, match="has no convolution to whiten with: leave out `whiten`"):
        first_convolution(model(f"{name}:make", 3, tmp_path))
