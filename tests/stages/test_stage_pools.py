"""Pooling with a deterministic backward pass: the same function and gradient as PyTorch's."""

import copy

import pytest
import torch
from torch import nn

from stages.model import Classifier, Design
from stages.pools import Averages, Maxima, steady

SHAPES = [((7, 7), 1), ((6, 4), 1), ((7, 7), 7), ((14, 14), 7), ((12, 9), (3, 3)), ((8, 6), (4, None)), ((1, 1), 1)]
OVERLAPPING = [((2, 2), 7), ((13, 9), 6), ((10, 7), (3, 4)), ((5, 5), (7, 5))]


def values_and_gradients(pool, theirs, size, memory):
    x = torch.rand(3, 5, *size, generator=torch.Generator().manual_seed(0)).mul(4).round()  # many are equal
    x = x.contiguous(memory_format=memory)
    found = []
    for module in (pool, theirs):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_(True)
        y = module(leaf)
        weight = torch.rand(y.shape, generator=torch.Generator().manual_seed(1))
        found.append((y, torch.autograd.grad((y * weight).sum(), leaf)[0]))
    return found


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("size", "asked"), SHAPES + OVERLAPPING)
def test_averages_are_torchs(size, asked, memory):
    (y, grad), (theirs, their_grad) = values_and_gradients(Averages(asked), nn.AdaptiveAvgPool2d(asked), size, memory)
    torch.testing.assert_close(y, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, their_grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("size", "asked"), SHAPES + OVERLAPPING)
def test_maxima_are_torchs_bit_for_bit_and_so_is_which_of_equal_ones_gets_the_gradient(size, asked, memory):
    (y, grad), (theirs, their_grad) = values_and_gradients(Maxima(asked), nn.AdaptiveMaxPool2d(asked), size, memory)
    assert torch.equal(y, theirs)
    assert torch.equal(grad, their_grad)


@pytest.mark.parametrize(
    ("arch", "side"), [("small_cnn", 8), ("resnet9", 32), ("fast_resnet", 32), ("slim_resnet", 32), ("alexnet", 96)]
)
def test_a_network_with_them_is_the_same_function_under_the_same_names(arch, side, tmp_path):
    model = Classifier(Design(arch, 10, (3, side, side), (0.5,) * 3, (0.25,) * 3), tmp_path).eval()
    other = steady(copy.deepcopy(model.network))
    assert any(isinstance(layer, Averages | Maxima) for layer in other.modules())
    assert other.state_dict().keys() == model.network.state_dict().keys()
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(other(x), model.network(x), rtol=1e-5, atol=1e-6)


def test_pooling_that_also_gives_places_stays_as_it_is():
    assert type(steady(nn.Sequential(nn.AdaptiveMaxPool2d(1, return_indices=True)))[0]) is nn.AdaptiveMaxPool2d
