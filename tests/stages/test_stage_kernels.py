"""Forward and backward passes consist of operations that a GPU computes deterministically and without the host.

The forbidden operations come from `torch.use_deterministic_algorithms` and PyTorch's sources. The tests list the
operations called on a CPU, with the pooling that a GPU uses.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stages import nets, train, usefulness
from stages.apgd import apgd, losses
from stages.attack import Attacker
from stages.evaluate import score
from stages.invert import Inverter
from stages.model import Classifier, Design
from stages.pgd import Descent
from stages.pools import steady
from stages.recipes import Attack, EvalAttack, Evaluate, Invert, Relabel, Train, Usefulness
from stages.shard import Shard

CLASSES = [str(k) for k in range(10)]

RAISE = {
    "_adaptive_avg_pool2d_backward", "adaptive_max_pool2d_backward", "avg_pool3d_backward", "grid_sampler_2d_backward",
    "upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward", "nll_loss2d_forward",
    "_upsample_bilinear2d_aa_backward", "reflection_pad1d_backward", "reflection_pad2d_backward", "max_unpool2d",
    "_ctc_loss_backward", "put_", "histc", "kthvalue", "median", "scatter_reduce", "max_pool3d_with_indices_backward",
}  # fmt: skip
"""Have no deterministic kernel."""

WAIT = {"scatter_add", "scatter_add_", "index_add", "index_add_", "index_put", "index_put_", "index_copy", "bincount"}
"""Have one that looks at the indices on the host first, as has the `scatter` of a tensor."""

HOST = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select"}
"""Wait for the device always."""


class Called(TorchDispatchMode):
    """Records the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.names.add("scatter_add" if name == "scatter" and isinstance(args[3], torch.Tensor) else name)
        return function(*args, **kwargs or {})


def model(arch, side=32):
    torch.manual_seed(0)
    made = Classifier(Design(arch, 10, (3, side, side), (0.5,) * 3, (0.25,) * 3), Path())
    steady(made.network)
    return made.eval().requires_grad_(False)


def noise(count, side=32):
    draw = np.random.default_rng(0)
    label, pixels = draw.integers(0, 10, count), draw.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return Shard("train-000000", np.arange(count), label, label.copy(), pixels)


def attack(net, shard):
    Attacker(Attack(images="", model="", eps=1, steps=2, batch_size=4), Relabel(rule="next"), CLASSES, net)(shard)


def inversion(net, shard):
    Inverter(Invert(images="", model="", steps=2, batch_size=4), net)(shard)


def attacks(net, shard):
    asked = [EvalAttack(target_rule=aim, eps=1, steps=2, batch_size=4) for aim in (None, Relabel(rule="next"))]
    score(Evaluate(models=["m"], on="", batch_size=4, attacks=asked), CLASSES, {"m": net}, {}, shard)


def use(net, shard):
    recipe = Usefulness(models=["m"], on="", normalise="train", split="train", eps=0.5, steps=2, batch_size=256)
    usefulness.measure(recipe, CLASSES, {"m": net}, shard, 1)


def called_in_steps(monkeypatch, work, net, shard):
    """The operations of all steps of a search."""
    called, step = Called(), Descent._step

    def watched(*args):
        with called:
            return step(*args)

    monkeypatch.setattr(Descent, "_step", watched)
    work(net, shard)
    return called.names


@pytest.mark.parametrize("work", [attack, inversion, attacks, use], ids=lambda work: work.__name__)
def test_a_step_is_deterministic_on_a_gpu_and_can_be_one_graph(work, monkeypatch):
    names = called_in_steps(monkeypatch, work, model("small_cnn", 8), noise(4, 8))
    assert "convolution_backward" in names
    assert not names & (RAISE | WAIT | HOST)


@pytest.mark.parametrize("targeted", [False, True])
def test_apgd_is_deterministic_on_a_gpu_and_waits_for_nothing(targeted):
    label = torch.arange(4)
    x, called, net = torch.rand(4, 3, 32, 32), Called(), model("small_cnn")
    for loss in losses(label, label + 1 if targeted else None, 10):
        with called:
            apgd(net, loss, lambda logits: logits.argmax(1) != label, x, norm="l2", eps=0.5, steps=3)
    assert {"convolution_backward", "topk"} <= called.names
    assert not called.names & (RAISE | WAIT | HOST)


def test_a_training_is_deterministic_on_a_gpu_whatever_is_augmented(monkeypatch, tmp_path):
    shard, called, ball = noise(8), Called(), {"eps": 0.5, "steps": 1}
    monkeypatch.setattr(train, "on_device", lambda made: (steady(made.network), made)[1])
    examples = train.Examples([shard.name], {shard.name: 8}, lambda _: shard, shard.images().nbytes, "")
    for augment in ("none", "flip", "crop-flip", "spatial", "resized-crop", "imagenet"):
        asked = Train(
            on="", arch="small_cnn", epochs=1, batch_size=4, augment=augment, threads=1, adversarial=ball,
            label_smoothing=0.1,
        )  # fmt: skip
        with called:
            list(train.fit(asked, model("small_cnn").design, examples, tmp_path))
    assert {"convolution_backward", "native_batch_norm_backward", "grid_sampler_2d"} <= called.names
    assert not called.names & RAISE


@pytest.mark.parametrize("arch", [*nets.OURS, "resnet18", "alexnet", "googlenet", "mobilenet_v3_small"])
def test_networks_have_a_deterministic_pass_backward_that_waits_for_nothing(arch):
    net, called = model(arch, 32 if arch in nets.OURS else 64), Called()
    x = torch.rand(1, *net.design.shape, requires_grad=True)
    with called:
        torch.autograd.grad(net(x).sum(), x)
    assert "convolution_backward" in called.names
    assert not called.names & (RAISE | WAIT | HOST)


def test_what_is_looked_for_is_found():
    x, called = torch.rand(2, 3, 8, 8, requires_grad=True), Called()
    with called:
        pooled = torch.nn.functional.adaptive_avg_pool2d(x, 3).flatten(1)
        picked = pooled.gather(1, torch.ones(2, 1, dtype=torch.int64)) + pooled.index_select(1, torch.ones(2).long())
        assert float(torch.autograd.grad((picked + pooled.topk(1).values).sum(), x)[0].sum()) > 0
    assert called.names & RAISE == {"_adaptive_avg_pool2d_backward"}
    assert called.names & WAIT == {"scatter_add", "index_add"}
    assert called.names & HOST == {"_local_scalar_dense"}
