"""A network optimised for a search computes the same function in fewer operations."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stages.errors import BadInput
from stages.features import Penultimate
from stages.inference import folded, optimized
from stages.model import Classifier, Design, on_device
from stages.recipes import Compute


def classifier(arch, here, side=32, channels=3):
    """A network whose batch norms have statistics of their own, as after training."""
    draw = torch.Generator().manual_seed(0)
    model = on_device(Classifier(Design(arch, 10, (channels, side, side), (0.5,) * channels, (0.25,) * channels), here))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=draw)
            module.running_var.uniform_(0.5, 1.5, generator=draw)
    return model.eval().requires_grad_(False)


def norms(model):
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def images(model, count=4):
    return torch.rand(count, *model.design.shape, generator=torch.Generator().manual_seed(1))


def gradient(model, x):
    x = x.clone().requires_grad_(True)
    loss = F.cross_entropy(model(x), torch.arange(len(x)) % 10, reduction="sum")
    return torch.autograd.grad(loss, x)[0].flatten(1)


@pytest.mark.parametrize(
    ("arch", "left"),
    [("small_cnn", 0), ("resnet9", 0), ("cifar_resnet18", 0), ("cifar_densenet121", 62)],
)
def test_a_folded_network_answers_as_before_with_fewer_batch_norms(arch, left, tmp_path):
    model = classifier(arch, tmp_path)
    state, count, x = copy.deepcopy(model.state_dict()), norms(model), images(model)
    made = folded(model)
    assert norms(made) == left < count  # DenseNet has a norm before its convolutions, too, which stays
    torch.testing.assert_close(made(x), model(x), rtol=1e-4, atol=1e-4)
    assert F.cosine_similarity(gradient(made, x), gradient(model, x)).min() > 0.999
    assert norms(model) == count
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_rounding_at_half_precision_is_no_wrong_fold(tmp_path):
    # bfloat16 rounds a convolution's output before its batch norm takes off the mean, and a folded one afterwards.
    model = classifier("small_cnn", tmp_path).using("bfloat16")
    conv, norm = model.network[0][0], model.network[0][1]
    conv.bias, norm.running_mean = nn.Parameter(torch.full((32,), 20.0), requires_grad=False), torch.full((32,), 20.0)
    made = folded(model)
    assert (norms(made), made.precision) == (0, "bfloat16")
    torch.testing.assert_close(made.using("float32")(images(model)), model.using("float32")(images(model)))


TWICE = """
from torch import nn
class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, classes)
    def forward(self, x):
        x = self.conv(x)
        return self.head((USE).relu().mean((2, 3)))
"""


def test_a_convolution_that_feeds_something_else_too_is_refused(make_module, tmp_path):
    model = classifier(f"{make_module(TWICE.replace('USE', 'self.one(x) + x'))}:Net", tmp_path)
    with pytest.raises(BadInput, match=r"answers otherwise without its batch norm.*add `fold: false`"):
        optimized(model, Compute())
    assert optimized(model, Compute(fold=False)).network is model.network


def test_a_network_that_asks_its_batch_norm_something_is_refused(make_module, tmp_path):
    model = classifier(f"{make_module(TWICE.replace('USE', 'self.one(x) * self.one.weight.mean()'))}:Net", tmp_path)
    with pytest.raises(BadInput, match=r"no attribute 'weight'.*add `fold: false`"):
        folded(model)


@pytest.mark.parametrize(
    "changes",
    [
        {"x = self.conv(x)": "a, b = self.conv(x), self.conv(-x)", "USE": "self.one(a) + self.two(b)"},
        {"nn.BatchNorm2d(8), nn": "nn.BatchNorm2d(8, track_running_stats=False), nn", "USE": "self.one(x)"},
    ],
    ids=["a convolution that runs twice", "a norm without statistics"],
)
def test_what_cannot_be_folded_is_left(changes, make_module, tmp_path):
    source = TWICE
    for old, new in changes.items():
        source = source.replace(old, new)
    design = Design(f"{make_module(source)}:Net", 10, (3, 8, 8), (0.5,) * 3, (1.0,) * 3)
    model = Classifier(design, tmp_path).eval()
    assert folded(model) is model


def test_a_layer_whose_output_is_asked_for_stays_as_it_is(tmp_path):
    model = classifier("small_cnn", tmp_path, side=8, channels=1)
    x, layer = images(model), "1.0"  # the second convolution, whose norm is 1.1
    wanted = Penultimate(model, layer)(x)
    torch.testing.assert_close(Penultimate(optimized(model, Compute(), layer), layer)(x), wanted, rtol=1e-4, atol=1e-5)
    assert (Penultimate(optimized(model, Compute()), layer)(x) - wanted).abs().max() > 0.01
    assert norms(optimized(model, Compute(), "1")) == 0  # a block that holds both is the same either way


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_weights_cast_once_give_the_bits_of_weights_cast_in_every_pass(precision, tmp_path):
    model = classifier("resnet9", tmp_path)
    x, made = images(model), optimized(model, Compute(precision=precision, fold=False))
    assert torch.equal(made(x), model.using(precision)(x))
    assert {p.dtype for m in model.modules() for p in m.parameters()} == {torch.float32}


def test_float16_gives_a_confident_image_its_gradient(tmp_path):
    model = classifier("small_cnn", tmp_path, side=8, channels=1)
    # Without maxima: of two nearly equal values, half precision may take the other one.
    model.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).requires_grad_(False)
    x = images(model, 1)
    with torch.no_grad():
        model.network[-1].bias[0] += 25  # the gradient at the logits is e^−25, which float16 does not have
    wanted = gradient(model, x)
    assert 0 < wanted.abs().max() < 1e-8
    half = gradient(optimized(model, Compute(precision="float16")), x)
    assert (half - wanted).norm() < 0.02 * wanted.norm()


def test_a_network_is_prepared_once_for_each_way_to_compute(tmp_path):
    model = classifier("small_cnn", tmp_path, side=8, channels=1)
    assert optimized(model, Compute(batch_size=1)) is optimized(model, Compute(batch_size=2))
    ways = [Compute(), Compute(fold=False), Compute(precision="bfloat16")]
    assert len({id(optimized(model, way)) for way in ways}) == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own affairs
def test_a_compiled_network_answers_as_before(tmp_path):
    model = classifier("small_cnn", tmp_path, side=8, channels=1)
    x, made = images(model), optimized(model, Compute(compile=True))
    torch.testing.assert_close(made(x), model(x), rtol=1e-4, atol=1e-4)
    assert F.cosine_similarity(gradient(made, x), gradient(model, x)).min() > 0.999
    # An inversion hooks into what was compiled.
    features = Penultimate(made)
    torch.testing.assert_close(features(x), Penultimate(model)(x), rtol=1e-4, atol=1e-4)
