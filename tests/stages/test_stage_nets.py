"""Networks: ours, torchvision's, and the user's."""

from pathlib import Path

import pytest
import torch
from torch import nn

from stages.errors import BadInput
from stages.model import Classifier, Design
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

def leaves(classes):
    raise SystemExit

number = 3
made = nn.Linear(48, 5)

def tells(classes):
    print("told")
    return by_place(classes)

class Pair(Net):
    def forward(self, x):
        return super().forward(x), 3

class Fussy(Net):
    def forward(self, x):
        return {}["x"]
"""


def parameters(model):
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("arch", OURS)
@pytest.mark.parametrize("channels", [1, 3])
def test_our_networks_give_a_logit_for_each_class(arch, channels, tmp_path):
    model = build(arch, 7, channels, tmp_path).eval()
    assert model(torch.zeros(2, channels, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(("size", "channels"), [(16, 1), (64, 3), (224, 3)])
def test_airnet_takes_other_sizes_than_32_pixels(size, channels, tmp_path):
    model = build("airnet", 7, channels, tmp_path).eval()
    assert model(torch.zeros(1, channels, size, size)).shape == (1, 7)


def test_airnet_has_the_size_its_docstring_states():
    # 2 × 2 filters with biases; groups of two convolutions without, and a bias of batch norm each; the head.
    groups = [(24, 64), (64, 256), (256, 256)]
    learned = 24 * 13 + sum(9 * (a * b + b * b) + 2 * b for a, b in groups) + 2560
    scales = sum(2 * b for _, b in groups)  # batch norm's, which stay 1
    assert parameters(build("airnet", 10, 3, Path())) == learned + scales
    assert round((learned + scales) / 1e6, 1) == 2.0


def test_slim_resnet_has_the_size_its_docstring_states():
    # Convolutions without bias, two numbers of batch norm per channel, and the head.
    wide = [(3, 32), (32, 64), (64, 64), (64, 64), (64, 128), (128, 128), (128, 128)]
    assert parameters(build("slim_resnet", 10, 3, Path())) == sum(9 * a * b + 2 * b for a, b in wide) + 1290 == 464_170


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
        BadInput,
        match=r"small_cnn, fast_resnet, slim_resnet, resnet9, .*cifar_densenet121, not a torchvision classifier",
    ):
        build(arch, 10, 3, tmp_path)


@pytest.mark.parametrize("name", ["by_classes", "by_num_classes", "by_place", "Net"])
def test_a_users_own_network_is_built_by_its_import_path(name, make_module, tmp_path):
    model = build(f"{make_module(OWN)}:{name}", 5, 3, tmp_path)
    assert model(torch.zeros(2, 3, 4, 4)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_net", "made something of type str, expected a torch.nn.Module"),
        ("picky", r"cannot be built for 5 classes: .*mynets_\w+\.py line \d+: needs more than 5 classes"),
        ("too_many", "cannot be built for 5 classes: .*missing 1 required positional argument: 'depth'"),
        ("leaves", r"cannot be built for 5 classes: .*line \d+: it ends the program"),
        ("number", "is of type int, expected a function or class"),
        ("made", "is of type Linear, expected a function or class"),
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


@pytest.mark.parametrize(
    ("arch", "said"),
    [
        ("builtins:int", "made something of type int, expected a torch.nn.Module"),
        ("os:system", "cannot be built for 5 classes: expected str, bytes or os.PathLike object, not int"),
        ("sys:exit", r"cannot be built for 5 classes: it ends the program \(5\)"),
        ("torch:nn", "is of type module, expected a function or class"),
    ],
)
def test_what_is_no_network_at_all_is_refused_without_the_name_of_an_exception(arch, said, tmp_path):
    with pytest.raises(BadInput, match=f"^arch {arch} {said}"):
        build(arch, 5, 3, tmp_path)


def test_what_a_users_network_prints_goes_to_standard_error(make_module, tmp_path, capsys):
    build(f"{make_module(OWN)}:tells", 5, 3, tmp_path)
    assert capsys.readouterr() == ("", "told\n")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Pair", "gives something of type tuple, expected a tensor of logits"),
        ("Fussy", r"refuses images of 3×4×4: .*mynets_\w+\.py line \d+: there is no key 'x'"),
    ],
)
def test_a_users_network_that_does_not_answer_with_logits_is_refused(name, said, make_module, tmp_path):
    arch = f"{make_module(OWN)}:{name}"
    model = Classifier(Design(arch, 5, (3, 4, 4), (0.5,) * 3, (0.5,) * 3), tmp_path)
    with pytest.raises(BadInput, match=said):
        probe(model, (3, 4, 4), 5, arch)
