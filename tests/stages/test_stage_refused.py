"""Errors of a device become a sentence that names the layer or the batch size, and the remedy."""

import pytest
import torch

from stages import train
from stages.attack import Attacker
from stages.errors import BadInput
from stages.evaluate import score
from stages.invert import Inverter
from stages.model import Classifier, Design
from stages.recipes import Attack, Compute, EvalAttack, Evaluate, Invert, Relabel, Train
from stages.refused import explained

UNPOOLS = """
from torch import nn
class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, classes)
        self.down, self.up = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
    def forward(self, x):
        small, indices = self.down(self.conv(x))
        return self.head(self.up(small, indices).mean((2, 3)))
"""
"""`MaxUnpool2d` has no deterministic kernel, on a processor neither."""


@pytest.fixture
def unpooling(make_module, tmp_path):
    model = Classifier(Design(f"{make_module(UNPOOLS)}:Net", 10, (1, 8, 8), (0.5,), (0.5,)), tmp_path)
    return model.eval().requires_grad_(False)


def attack(model, shard, folder, examples_of, **keys):
    recipe = Attack(images="", model="", eps=1, steps=2, batch_size=8, **keys)
    return Attacker(recipe, Relabel(rule="next"), [str(k) for k in range(10)], model)(shard)


def invert(model, shard, folder, examples_of, **keys):
    return Inverter(Invert(images="", model="", steps=2, batch_size=8, **keys), model)(shard)


def evaluate(model, shard, folder, examples_of, **keys):
    recipe = Evaluate(models=["m"], on="", batch_size=8, attacks=[EvalAttack(eps=1, steps=2, **keys)], **keys)
    return score(recipe, [str(k) for k in range(10)], {"m": model}, {}, shard)


def fit(model, shard, folder, examples_of, **keys):
    recipe = Train(on="", arch=model.design.arch, epochs=1, batch_size=8, threads=1, **keys)
    return list(train.fit(recipe, model.design, examples_of(shard), folder))


@pytest.mark.parametrize("stage", [attack, invert, evaluate, fit])
def test_a_layer_without_a_deterministic_kernel_is_named_and_taken_if_asked(
    stage, unpooling, digits, part, examples_of, tmp_path
):
    some = part(digits["train"], slice(16))
    with pytest.raises(BadInput, match=r"^layer up of mynets_\w+:Net has no deterministic kernel .*`deterministic: f"):
        stage(unpooling, some, tmp_path, examples_of)
    assert stage(unpooling, some, tmp_path, examples_of, deterministic=False)


BACKWARD = """
import torch
from torch import nn
class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x
    @staticmethod
    def backward(ctx, grad):
        if torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("twice_backward_cuda does not have a deterministic implementation, but you set …")
        return 2 * grad
class Layer(nn.Module):
    def forward(self, x):
        return Twice.apply(x)
def make(classes):
    return nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Sequential(Layer(), nn.ReLU(inplace=True)), nn.Linear(64, classes))
"""


def test_the_layer_is_found_where_its_backward_pass_is_the_one_without_a_kernel(
    make_module, tmp_path, digits, part, examples_of
):
    model = Classifier(Design(f"{make_module(BACKWARD)}:make", 10, (1, 8, 8), (0.5,), (0.5,)), tmp_path)
    with pytest.raises(BadInput, match=r"^layer 2\.0 of .* \(twice_backward_cuda\)"):
        attack(model.eval().requires_grad_(False), part(digits["train"], slice(8)), tmp_path, examples_of)


def test_a_full_gpu_is_told_from_other_errors_and_the_sentence_names_the_batch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2**29)
    with (
        pytest.raises(BadInput, match=r"^batch_size 77 is more .* \(3.5 of 80.0 GiB were free\): lower it$"),
        explained(Compute(batch_size=77)),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    with pytest.raises(RuntimeError, match=r"^something else$"), explained(Compute()):
        raise RuntimeError("something else")
