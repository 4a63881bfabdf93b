"""Features of networks: their layer, their values, and the gradient of dead ones."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from stages.errors import BadInput
from stages.features import Penultimate, head
from stages.model import Classifier, Design

WIDTHS = {"resnet18": (512, "fc"), "vgg11": (64, "classifier.6"), "mobilenet_v2": (1280, "classifier.1")}
WIDTHS["densenet121"] = (1024, "classifier")


def classifier(arch, shape=(3, 32, 32), here=Path()):
    torch.manual_seed(0)
    model = Classifier(Design(arch, 10, shape, (0.5,) * shape[0], (0.25,) * shape[0]), here)
    return model.requires_grad_(False)


def images(shape, count=3):
    return torch.rand((count, *shape), generator=torch.Generator().manual_seed(1))


def own(make_module, tmp_path, body):
    """A user's network with one linear layer `a` from 4 pixels to 6, and a head `b`."""
    source = f"""
        import torch
        import torch.nn.functional as F
        from torch import nn

        class Whole(nn.Module):
            def forward(self, x):
                return x.sum(0)

        class Two(nn.Module):
            def forward(self, x):
                return x, x

        class Net(nn.Module):
            def __init__(self, classes):
                super().__init__()
                self.a, self.b = nn.Linear(4, 6), nn.Linear(6, classes)
                self.relu, self.inplace, self.six = nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(inplace=True)
                self.whole, self.two = Whole(), Two()

            def forward(self, x):
                x = x.flatten(1)
                {body}
        """
    return classifier(f"{make_module(source)}:Net", (1, 2, 2), tmp_path).eval()


@pytest.mark.parametrize("arch", WIDTHS)
def test_the_features_of_torchvisions_networks_are_what_their_last_layer_takes(arch, monkeypatch):
    narrow(monkeypatch)
    width, name = WIDTHS[arch]
    model = classifier(arch).eval()
    penultimate, x = Penultimate(model), images((3, 32, 32))
    features = penultimate(x)
    assert features.shape == (3, width)
    assert penultimate.width == width
    found, linear = head(model)
    assert (found, linear) == (name, model.network.get_submodule(name))
    assert torch.equal(linear(features), model(x))  # vgg and mobilenet have dropout between; not in evaluation mode
    x.requires_grad_(True)
    (grad,) = torch.autograd.grad(penultimate(x).sum(), x)
    assert (grad.flatten(1).norm(dim=1) > 0).all()
    half = Penultimate(model.using("bfloat16"))(x.detach())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, features, rtol=0.2, atol=0.05 * float(features.max()))


def narrow(monkeypatch):
    """Replace linear layers of width 4096 by 64: VGG's have 120 million weights to initialise."""

    class Narrow(nn.Linear):
        def __init__(self, width_in, width_out):
            super().__init__(*(64 if width == 4096 else width for width in (width_in, width_out)))

    monkeypatch.setattr(nn, "Linear", Narrow)


def test_a_named_layer_gives_its_output_as_it_is_before_it_is_changed_in_place():
    model = classifier("resnet18").eval()
    x = images((3, 32, 32))
    seen = []
    handle = model.network.layer4[1].bn1.register_forward_hook(lambda *call: seen.append(call[2].clone()))
    model(x)
    handle.remove()
    features = Penultimate(model, "layer4.1.bn1")(x)  # a ReLU in place comes next
    assert torch.equal(features, seen[0].flatten(1))
    assert (features < 0).any()


def test_a_probe_leaves_a_network_in_training_as_it_was():
    model = classifier("small_cnn", (1, 8, 8)).train()
    model.network[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Penultimate(model)
    head(model)
    assert model.training
    assert not model.network[0].training
    assert model.network[1].training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# ------------------------------------------------------------------------------------- dead activations

ENDINGS = {
    "module": "return self.b(self.relu(self.a(x)))",
    "module in place": "return self.b(self.inplace(self.a(x)))",
    "module used twice": "return self.b(self.relu(self.a(self.relu(x))))",
    "result not used": "y = self.a(x); self.inplace(y); return self.b(y)",
    "relu6 in place": "return self.b(self.six(self.a(x)))",
    "function": "return self.b(F.relu(self.a(x)))",
    "function in place": "return self.b(F.relu(self.a(x), inplace=True))",
    "function, underscore": "return self.b(F.relu_(self.a(x)))",
    "torch": "return self.b(torch.relu(self.a(x)))",
    "method": "return self.b(self.a(x).relu())",
    "method in place": "return self.b(self.a(x).relu_())",
    "clamp": "return self.b(self.a(x).clamp(min=0))",
    "clamp in place": "return self.b(torch.clamp_(self.a(x), 0))",
    "clamp at both ends": "return self.b(torch.clamp(self.a(x), 0.0, 6.0))",
    "clamp_min": "return self.b(torch.clamp_min(self.a(x), 0))",
    "clip": "return self.b(self.a(x).clip(0))",
    "threshold": "return self.b(F.threshold(self.a(x), 0.0, 0.0))",
    "a guard of a norm": "y = self.relu(self.a(x)); y.norm(dim=1).clamp_min(1e-6); return self.b(y)",
    "hardtanh": "return self.b(F.hardtanh(self.a(x), 0.0, 1.0))",
    "one after the features": "return F.relu(self.b(F.relu(self.a(x))))",
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_dead_feature_is_zero_and_has_the_gradient_it_would_have_without_its_activation(
    ending, precision, make_module, tmp_path
):
    model = own(make_module, tmp_path, ENDINGS[ending])
    model.network.a.bias[:] = -50.0  # dead, all of them
    x = (0.5 + images((1, 2, 2)) / 2).requires_grad_(True)  # above the mean: a ReLU before `a` is alive
    features = Penultimate(model.using(precision))(x)
    assert torch.equal(features, torch.zeros(3, 6))
    (grad,) = torch.autograd.grad(features[:, 2].sum(), x)
    expected = (model.network.a.weight[2] / 0.25).view(1, 2, 2).expand(3, 1, 2, 2)
    torch.testing.assert_close(grad, expected, rtol=0.01 if precision == "bfloat16" else 1e-6, atol=1e-6)


def test_only_the_last_activation_before_the_features_passes_its_gradient_through(make_module, tmp_path):
    model = own(make_module, tmp_path, "return self.b(self.relu(self.a(self.relu(x - 50.0) + self.relu(x))))")
    x = images((1, 2, 2)).requires_grad_(True)
    (grad,) = torch.autograd.grad(Penultimate(model)(x)[:, 0].sum(), x)
    alive = (((x - 0.5) / 0.25) > 0).float()  # normalised: the first ReLU is dead everywhere, the second where x < 0.5
    torch.testing.assert_close(grad, model.network.a.weight[0].view(1, 2, 2) / 0.25 * alive, rtol=1e-6, atol=1e-6)


def test_live_features_are_what_the_network_computes(make_module, tmp_path):
    model = own(make_module, tmp_path, "return self.b(self.relu(self.a(x)))")
    x = images((1, 2, 2))
    expected = functional.relu(model.network.a((x.flatten(1) - 0.5) / 0.25))
    assert torch.equal(Penultimate(model)(x), expected)
    assert torch.equal(Penultimate(model, "relu")(x), expected)
    assert (expected > 0).any()
    assert not any(module._forward_hooks for module in model.modules())  # nothing is left behind


# ------------------------------------------------------------------------------------------ bad input


def test_a_network_without_a_linear_layer_is_refused_unless_a_layer_is_named():
    model = classifier("squeezenet1_1").eval()
    with pytest.raises(
        BadInput, match=r"^arch squeezenet1_1 has no linear layer: name .*`layer`; a linear probe needs"
    ):
        Penultimate(model)
    with pytest.raises(BadInput, match="no linear layer"):
        head(model)
    assert Penultimate(model, "features")(images((3, 32, 32))).shape == (3, 512)


def test_an_unknown_layer_is_refused_with_names_that_would_do():
    model = classifier("small_cnn", (1, 8, 8)).eval()
    with pytest.raises(BadInput, match=r"^arch small_cnn has no layer 'fc': its last ones are .*6$"):
        Penultimate(model, "fc")


@pytest.mark.parametrize(
    ("body", "layer"),
    [
        ("return self.b(self.a(x))", "relu"),  # does not run
        ("return self.b(self.whole(self.a(x)))", "whole"),  # the sum over the batch
        ("return self.b(self.two(self.a(x))[0])", "two"),  # a pair
    ],
)
def test_a_layer_that_gives_no_row_for_each_image_is_refused(body, layer, make_module, tmp_path):
    model = own(make_module, tmp_path, body)
    with pytest.raises(BadInput, match=f"^layer {layer} of .* gives no tensor with a row for each image"):
        Penultimate(model, layer)
