"""The attack and the inversion on tensors, against closed forms."""

import pytest
import torch
from torch import nn

import notbugs


def linear(classes=2, channels=1, side=8, seed=0):
    network = nn.Sequential(nn.Flatten(), nn.Linear(channels * side * side, classes))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        network[1].weight.copy_(torch.randn(network[1].weight.shape, generator=draw))
    return network


def some(count=3, side=8):
    draw = torch.Generator().manual_seed(1)
    return (torch.rand(count, 1, side, side, generator=draw) * 0.4 + 0.3).mul(255).round() / 255


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.7), ("linf", 8 / 255)])
def test_on_a_linear_model_every_image_moves_along_the_difference_of_the_weights(norm, eps):
    model, images, targets = linear(), some(), torch.tensor([0, 1, 1])
    found = notbugs.attack(model, images, targets, norm=norm, eps=eps, steps=10)
    weight = model[1].weight.detach()
    way = (weight[targets] - weight[1 - targets]).view(-1, 1, 8, 8)
    best = way.sign() * eps if norm == "linf" else eps * way / way.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    moved = found - images
    size = moved.abs().amax() if norm == "linf" else moved.flatten(1).norm(dim=1).amax()
    assert size <= eps + 1e-6
    assert torch.allclose(moved, best, atol=1.01 / 255), "but for rounding to 8 bits"
    assert torch.equal((found * 255).round() / 255, found)


def test_the_network_that_is_given_stays_as_it_was():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    notbugs.attack(model, some(), torch.tensor([0, 1, 2]), eps=0.5, steps=2)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_saved_dataset_is_what_the_function_gives_for_its_images(opened):
    store = opened[0]
    dataset, clean = notbugs.open("other", store=store), notbugs.open("clean", store=store)
    model = notbugs.model("standard", store=store)
    images = torch.stack([clean.torch("train")[i][0] for i in range(32)])
    targets = torch.tensor(dataset.torch("train").targets[:32])
    found = notbugs.attack(model, images, targets, eps=1.5, steps=3, batch_size=32)
    saved = torch.stack([dataset.torch("train")[i][0] for i in range(32)])
    assert torch.equal(found, saved)
    assert model.classes == dataset.classes


def test_an_inversion_brings_the_features_near():
    model, images = linear(3), some(4)
    found = notbugs.invert(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Linear(16, 3)), images, steps=2)
    assert found.shape == images.shape
    found = notbugs.invert(model, images, start="noise", steps=300, step_size=0.05)
    assert (found - images).abs().max() < 0.1, "the features of a network of one layer are the image"


@pytest.mark.parametrize(
    ("images", "targets", "recipe", "sentence"),
    [
        (some()[0], [0], {}, "images must be N × C × H × W"),
        (some() * 255, [0, 1, 1], {}, r"images must be floats in \[0, 1\]"),
        (some(), [0, 1], {}, "targets must be 3 numbers below 2, one per image"),
        (some(), [0, 1, 2], {}, "targets must be 3 numbers below 2, one per image"),
        (some(), [0, 1, 1], {"eps": -1}, "eps: "),
        (some(), [0, 1, 1], {"epsilon": 1}, "epsilon: Extra inputs are not permitted"),
        (some(), [0, 1, 1], {"eps": 0.003}, "less than one 8-bit level"),
        (some(), [0, 1, 1], {"method": "universal"}, "method must be pgd, got universal"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(images, targets, recipe, sentence):
    with pytest.raises(notbugs.BadInput, match=sentence):
        notbugs.attack(linear(), images, torch.tensor(targets), **recipe)
