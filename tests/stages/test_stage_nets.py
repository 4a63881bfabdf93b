"""Networks: ours, torchvision's, and the user's."""

from pathlib import Path

import pytest
import torch
from torch import nn

from stages.errors import BadInput
from stages.nets import OURS, build, probe

OWN = """
from torch import nn

def by_classes(classes, channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 16, classes))

def by_num_classes(num_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 16, num_classes))

def by_place(c):
    return nn.Sequential(nn.Flatten(), nn.Linear(48, c))

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.head = nn.Linear(48, classes)
    def forward(self, x):
        return self.head(x.flatten(1))

def no_net(classes):
    return "a string"

def picky(classes):
    raise ValueError("needs more than %d classes" % classes)

def too_many(classes, depth):
    return nn.Identity()

number = 3
"""


def parameters(model):
    """How many trainable numbers it has."""
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("arch", OURS)
@pytest.mark.parametrize("channels", [1, 3])
def test_our_networks_give_a_logit_for_each_class(arch, channels, tmp_path):
    model = build(arch, 7, channels, tmp_path).eval()
    assert model(torch.zeros(2, channels, 32, 32)).shape == (2, 7)


def test_small_cnn_has_the_size_its_docstring_states():
    # Convolutions 3·32·9 and so on without bias, two numbers of batch norm per channel, and the head.
    wide = [(1, 32), (32, 64), (64, 128)]
    by_hand = sum(a * b * 9 + 2 * b for a, b in wide) + 128 * 10 + 10
    assert parameters(build("small_cnn", 10, 1, Path())) == by_hand
    assert round(by_hand / 1000) == 94 or round(by_hand / 1000) == 95


def test_a_torchvision_network_is_built_by_its_name(tmp_path):
    model = build("shufflenet_v2_x0_5", 5, 3, tmp_path).eval()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


@pytest.mark.parametrize("arch", ["resnet_9000", "", "fcn_resnet50", "raft_small"])
def test_a_name_that_is_no_classifier_is_refused_with_what_there_is(arch, tmp_path):
    with pytest.raises(
        BadInput, match=r"small_cnn, fast_resnet, resnet9, .*cifar_densenet121, no torchvision classifier"
    ):
        build(arch, 10, 3, tmp_path)


@pytest.mark.parametrize("name", ["by_classes", "by_num_classes", "by_place", "Net"])
def test_a_users_own_network_is_built_by_its_import_path(name, make_module, tmp_path):
    model = build(f"{make_module(OWN)}:{name}", 5, 3, tmp_path)
    assert model(torch.zeros(2, 3, 4, 4)).shape == (2, 5)


@pytest.mark.parametrize("name", ["missing", ""])
def test_a_name_that_the_module_lacks_is_refused(name, make_module, tmp_path):
    with pytest.raises(BadInput, match="cannot be imported"):
        build(f"{make_module(OWN)}:{name}", 5, 3, tmp_path)


@pytest.mark.parametrize("arch", ["no_such_module_anywhere:make", ":make", "no.such.package:make"])
def test_a_module_that_is_not_there_is_refused(arch, tmp_path):
    with pytest.raises(BadInput, match="cannot be imported"):
        build(arch, 5, 3, tmp_path)


def test_a_module_with_a_slip_of_the_pen_is_refused_with_the_place(make_module, tmp_path):
    module = make_module("def make(classes:\n")
    with pytest.raises(BadInput, match=rf"cannot be imported.*{module}\.py"):
        build(f"{module}:make", 5, 3, tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_net", "made a str, expected a torch.nn.Module"),
        ("picky", "cannot be built for 5 classes: needs more than 5 classes"),
        ("too_many", "cannot be built for 5 classes"),
        ("number", "is a int, expected"),
    ],
)
def test_what_makes_no_network_is_refused(name, said, make_module, tmp_path):
    with pytest.raises(BadInput, match=said):
        build(f"{make_module(OWN)}:{name}", 5, 3, tmp_path)


def test_a_network_that_fits_passes_the_probe(tmp_path):
    probe(build("small_cnn", 10, 1, tmp_path), (1, 8, 8), 10, "small_cnn")


def test_a_network_that_refuses_the_images_is_refused_with_their_shape():
    with pytest.raises(BadInput, match="arch mlp refuses images of 3×8×8"):
        probe(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), (3, 8, 8), 10, "mlp")


def test_a_network_with_other_outputs_than_classes_is_refused():
    with pytest.raises(BadInput, match=r"gives \(4,\) outputs for each image, expected 10 classes"):
        probe(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), (1, 8, 8), 10, "mlp")


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3"])
def test_networks_with_auxiliary_heads_give_logits_in_training_too(arch, tmp_path):
    network = build(arch, 3, 3, tmp_path).train()
    assert network(torch.zeros(2, 3, 96, 96)).shape == (2, 3)


def test_whatever_a_users_module_raises_is_one_sentence(tmp_path):
    (tmp_path / "net_that_raises.py").write_text("raise ZeroDivisionError('one\\ntwo')\n")
    with pytest.raises(BadInput, match=r"cannot be imported: one$"):
        build("net_that_raises:net", 3, 3, tmp_path)
