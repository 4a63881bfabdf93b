"""A classifier on disk and in memory, and one that was made elsewhere."""

import hashlib
import io
import math
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn
from torchvision import models

from stages import nets
from stages.errors import BadData, BadInput
from stages.model import (
    Classifier,
    Design,
    bring,
    channel_statistics,
    in_batches,
    is_remote,
    load,
    published_normalisation,
    save,
    to_pixels,
    to_unit,
)
from stages.recipes import Bring

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SMALL = Design("small_cnn", 10, (1, 8, 8), (0.3,), (0.4,))


@pytest.fixture
def network(tmp_path):
    torch.manual_seed(0)
    return nets.build("small_cnn", 10, 1, tmp_path)


def same(state, weights):
    found = safetensors.torch.load(weights)
    return set(found) == set(state) and all(torch.equal(found[name], state[name]) for name in state)


def asked(**said):
    return Bring(**{"arch": "small_cnn", "weights": "w.pt", "shape": [1, 8, 8]} | said)


# ------------------------------------------------------------------------------------ in memory


def test_normalisation_is_inside(network, tmp_path):
    model = load(SMALL, save(network), tmp_path)
    x = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(model(x), network.eval()((x - 0.3) / 0.4))


def test_a_loaded_model_is_in_evaluation_mode_and_its_weights_need_no_gradient(network, tmp_path):
    model = load(SMALL, save(network), tmp_path)
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters())


def test_what_is_saved_is_loaded_to_the_bit(network, tmp_path):
    weights = save(network)
    assert same(network.state_dict(), weights)
    assert save(load(SMALL, weights, tmp_path).network) == weights


@pytest.mark.parametrize("weights", [b"", b"not safetensors", b"\xff" * 64])
def test_bytes_that_are_no_safetensors_are_bad_data(weights, tmp_path):
    with pytest.raises(BadData, match="not safetensors"):
        load(SMALL, weights, tmp_path)


def test_weights_of_another_shape_are_refused_with_the_first_entry_that_differs(network, tmp_path):
    other = Design("small_cnn", 7, (1, 8, 8), (0.0,), (1.0,))
    with pytest.raises(BadInput, match=r"does not fit arch small_cnn: .*\(10.*\) in the checkpoint and \(7"):
        load(other, save(network), tmp_path)


def test_a_design_survives_its_json():
    import json

    some = replace(SMALL, classes=2, outputs=(7, 3), of=10)
    for design in (SMALL, some):
        assert Design.from_json(json.loads(json.dumps(design.as_json()))) == design


def test_a_design_that_answers_with_every_class_is_written_as_it_always_was():
    # As in manifests from before there were outputs to choose: theirs are read, and ours have nothing more.
    assert SMALL.as_json() == {
        "arch": "small_cnn", "classes": 10, "shape": (1, 8, 8), "mean": (0.3,), "std": (0.4,),
    }  # fmt: skip


def test_a_grey_image_goes_into_a_network_of_three_channels_three_times(tmp_path):
    grey = Classifier(Design("shufflenet_v2_x0_5", 4, (1, 32, 32), (0.5,), (0.25,)), tmp_path).eval()
    x = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(grey(x), grey.network(((x - 0.5) / 0.25).expand(-1, 3, -1, -1)))


def test_a_grey_image_is_repeated_for_a_grouped_first_convolution_too(make_module, tmp_path):
    name = make_module("""
        from torch import nn
        def make(classes):
            return nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.Flatten(), nn.Linear(6 * 36, classes))
    """)
    model = Classifier(Design(f"{name}:make", 4, (1, 8, 8), (0.5,), (0.25,)), tmp_path)
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 4)


def test_a_network_of_one_channel_gets_its_grey_images_once(tmp_path):
    assert Classifier(SMALL, tmp_path).repeat == 1


def test_another_precision_has_the_same_weights_and_gives_float32(network, tmp_path):
    model = load(SMALL, save(network), tmp_path)
    half = model.using("bfloat16")
    x = torch.rand(3, 1, 8, 8)
    assert half.precision == "bfloat16"
    assert model.precision == "float32"
    assert half.using("float32").network is model.network
    assert model.using("float32") is model
    assert half(x).dtype == torch.float32
    torch.testing.assert_close(half(x), model(x), rtol=0.1, atol=0.1)
    assert not torch.equal(half(x), model(x))


def test_every_level_is_exactly_k_over_255():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    assert torch.equal(to_unit(pixels).flatten(), torch.arange(256).float() / 255)


def test_pixels_change_their_layout_and_nothing_else():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    back = (to_unit(pixels) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(back, pixels)


# -------------------------------------------------------------------------------------- batches


@given(hnp.arrays(np.int64, st.tuples(st.integers(1, 40), st.integers(1, 3))), st.integers(1, 50))
def test_every_batch_has_one_shape_and_every_row_comes_back_once(rows, size):
    shapes = set()

    def double(x, number):
        shapes.add((x.shape, number.shape))
        return 2 * x + number[:, None]

    number = np.arange(len(rows))
    assert np.array_equal(in_batches(double, size, rows, number), 2 * rows + number[:, None])
    assert shapes == {((size, rows.shape[1]), (size,))}


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))))
def test_pixels_survive_the_way_to_the_unit_interval_and_back(pixels):
    assert np.array_equal(to_pixels(to_unit(pixels)), pixels)


@given(hnp.arrays(np.float32, (2, 3, 4, 5), elements=st.floats(-0.5, 1.5, width=32)))
def test_what_is_saved_is_the_nearest_level(x):
    pixels = to_pixels(torch.from_numpy(x)).transpose(0, 3, 1, 2)
    assert (np.abs(pixels - 255 * x.clip(0, 1).astype(np.float64)) <= 0.5 + 1e-9).all()


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 5), st.integers(2, 6), st.integers(2, 6), st.just(3))))
def test_channel_statistics_are_mean_and_deviation(pixels):
    values = pixels.astype(np.float64)
    sums, squares = values.sum((0, 1, 2)).tolist(), (values**2).sum((0, 1, 2)).tolist()
    mean, std = channel_statistics(sums, squares, pixels[..., 0].size)
    np.testing.assert_allclose(mean, values.mean((0, 1, 2)) / 255, rtol=1e-12)
    # A channel that hardly varies is divided by one level instead of by zero.
    np.testing.assert_allclose(std, np.maximum(values.std((0, 1, 2)), 1) / 255, rtol=1e-9)


# -------------------------------------------------------------------------------- made elsewhere


WRAPS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {"lr": 0.1}},
    "module": lambda state: {f"module.{name}": value for name, value in state.items()},
    "model of module": lambda state: {"model": {f"module.{n}": v for n, v in state.items()}},
    "state_dict of module": lambda state: {"state_dict": {f"module.{n}": v for n, v in state.items()}},
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_state_dict_is_found_in_what_torch_saved(wrap, network, tmp_path):
    torch.save(WRAPS[wrap](network.state_dict()), tmp_path / "w.pt")
    design, weights = bring(asked(), tmp_path, tmp_path)
    assert same(network.state_dict(), weights)
    assert design == Design("small_cnn", 10, (1, 8, 8), (0.0,), (1.0,))


@pytest.mark.parametrize("wrap", ["bare", "module"])
def test_a_state_dict_is_read_from_safetensors(wrap, network, tmp_path):
    safetensors.torch.save_file(WRAPS[wrap](network.state_dict()), tmp_path / "w.safetensors")
    _, weights = bring(asked(weights="w.safetensors"), tmp_path, tmp_path)
    assert same(network.state_dict(), weights)


def test_a_state_dict_is_read_from_a_url(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "w.pt")
    _, weights = bring(asked(weights=(tmp_path / "w.pt").as_uri()), tmp_path / "elsewhere", tmp_path)
    assert same(network.state_dict(), weights)


def test_what_was_brought_is_a_model_like_any_other(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "w.pt")
    design, weights = bring(asked(mean=[0.3], std=[0.4]), tmp_path, tmp_path)
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(load(design, weights, tmp_path)(x), network.eval()((x - 0.3) / 0.4))


def test_a_checkpoint_with_the_digest_that_was_named_is_taken_and_another_is_not(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "w.pt")
    digest = hashlib.sha256((tmp_path / "w.pt").read_bytes()).hexdigest()
    assert bring(asked(sha256=digest), tmp_path, tmp_path)[0].classes == 10
    with pytest.raises(BadInput, match=f"has sha256 {digest}, expected {'0' * 64}"):
        bring(asked(sha256="0" * 64), tmp_path, tmp_path)


def test_of_a_networks_classes_only_those_that_were_asked_for_answer_in_that_order(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "w.pt")
    whole, weights = bring(asked(), tmp_path, tmp_path)
    some, same_weights = bring(asked(outputs=[7, 0, 3]), tmp_path, tmp_path)
    assert same_weights == weights
    assert (some.classes, some.network_classes) == (3, 10)
    x = torch.rand(4, 1, 8, 8)
    model = load(some, weights, tmp_path)
    assert torch.equal(model(x), load(whole, weights, tmp_path)(x)[:, [7, 0, 3]])
    assert save(model.network) == weights


def test_an_output_that_is_no_class_of_the_network_is_refused(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "w.pt")
    with pytest.raises(BadInput, match="outputs names 10, but the network has 10 classes, 0 to 9"):
        bring(asked(outputs=[3, 10]), tmp_path, tmp_path)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that holds files."""
    folder = tmp_path / "site" / "some_weights" / "files"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield folder
    sys.modules.pop("some_weights", None)


def test_weights_are_read_from_inside_a_package(network, package, tmp_path):
    torch.save(network.state_dict(), package / "w.pt")
    recipe = asked(weights="package://some_weights/files/w.pt")
    _, weights = bring(recipe, tmp_path / "elsewhere", tmp_path)
    assert same(network.state_dict(), weights)
    assert not is_remote(recipe)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("some_weights/files/none.pt", "No such file"), ("not_installed_at_all/w.pt", "No module named 'not_installed")],
)
def test_a_package_without_the_weights_is_refused(name, reason, package, tmp_path):
    with pytest.raises(BadInput, match=f"checkpoint package://{name} cannot be read: {reason}"):
        bring(asked(weights=f"package://{name}"), tmp_path, tmp_path)


def test_half_precision_weights_become_float32(network, tmp_path):
    torch.save(network.half().state_dict(), tmp_path / "w.pt")
    _, weights = bring(asked(), tmp_path, tmp_path)
    floats = [v.dtype for v in safetensors.torch.load(weights).values() if v.is_floating_point()]
    assert set(floats) == {torch.float32}


def test_a_torchvision_network_is_brought_from_a_file(tmp_path):
    torch.manual_seed(0)
    own = nets.build("shufflenet_v2_x0_5", 6, 3, tmp_path)
    torch.save(own.state_dict(), tmp_path / "w.pt")
    recipe = asked(arch="shufflenet_v2_x0_5", shape=[3, 64, 64], mean=IMAGENET_MEAN, std=IMAGENET_STD)
    design, weights = bring(recipe, tmp_path, tmp_path)
    assert design.classes == 6
    assert design.mean == tuple(IMAGENET_MEAN)
    assert same(own.state_dict(), weights)


@pytest.mark.parametrize(
    ("arch", "mean", "std"),
    [("resnet18", IMAGENET_MEAN, IMAGENET_STD), ("efficientnet_v2_l", [0.5] * 3, [0.5] * 3),
     ("inception_v3", [0.5] * 3, [0.5] * 3), ("googlenet", [0.5] * 3, [0.5] * 3)],
)  # fmt: skip
def test_torchvisions_weights_expect_the_normalisation_they_were_trained_with(arch, mean, std):
    found = models.get_model_weights(arch).IMAGENET1K_V1
    assert published_normalisation(arch, found) == (mean, std)


def test_a_torchvision_network_brought_by_name_answers_as_torchvisions_own(tmp_path, monkeypatch):
    # Of this one torchvision's own preset is not all: its weights go with a network that normalises once more.
    torch.manual_seed(0)
    own = models.get_model("googlenet", weights=None, num_classes=5, transform_input=True, init_weights=False)
    monkeypatch.setattr(models.GoogLeNet_Weights, "get_state_dict", lambda *_, **__: own.state_dict())
    named = {"arch": "googlenet", "weights": "IMAGENET1K_V1", "shape": [3, 64, 64]}
    design, weights = bring(asked(**named), tmp_path, tmp_path)
    x, (mean, std) = torch.rand(2, 3, 64, 64), (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    expected = own.eval()((x - mean) / std)
    torch.testing.assert_close(load(design, weights, tmp_path)(x), expected, rtol=1e-4, atol=1e-4)
    said, _ = bring(asked(**named, mean=[0.1, 0.2, 0.3]), tmp_path, tmp_path)
    assert (said.mean, said.std) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_classes_are_counted_at_the_last_layer_whatever_it_is_called(kind, make_module, tmp_path):
    # safetensors stores its entries by name: `body` would come before `a_head`, were the order of the file trusted.
    name = make_module("""
        from torch import nn
        class Net(nn.Module):
            def __init__(self, classes):
                super().__init__()
                self.body = nn.Linear(64, 16)
                self.a_head = nn.Linear(16, classes)
            def forward(self, x):
                return self.a_head(self.body(x.flatten(1)).relu())
    """)
    state = nets.build(f"{name}:Net", 3, 1, tmp_path).state_dict()
    if kind == "pt":
        torch.save(state, tmp_path / "w.pt")
    else:
        safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    design, _ = bring(asked(arch=f"{name}:Net", weights=f"w.{kind}"), tmp_path, tmp_path)
    assert design.classes == 3


def test_without_a_linear_layer_the_number_of_classes_is_asked_for(make_module, tmp_path):
    name = make_module("""
        from torch import nn
        def make(classes):
            return nn.Sequential(nn.Conv2d(1, classes, 8), nn.Flatten())
    """)
    torch.save(nets.build(f"{name}:make", 4, 1, tmp_path).state_dict(), tmp_path / "w.pt")
    with pytest.raises(BadInput, match="add `classes: N`"):
        bring(asked(arch=f"{name}:make"), tmp_path, tmp_path)
    assert bring(asked(arch=f"{name}:make", classes=4), tmp_path, tmp_path)[0].classes == 4


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_a_checkpoint_that_does_not_fit_is_refused_with_what_differs(change, network, tmp_path):
    state = dict(network.state_dict())
    first = next(iter(state))
    if change == "missing":
        del state[first]
    elif change == "extra":
        state["surplus.weight"] = torch.zeros(3)
    else:
        state[first] = torch.zeros(2, 2, 2, 2)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(BadInput, match=f"does not fit arch small_cnn: {'surplus' if change == 'extra' else first}"):
        bring(asked(classes=10), tmp_path, tmp_path)


def test_images_that_the_network_refuses_are_refused(make_module, tmp_path):
    name = make_module("""
        from torch import nn
        def make(classes):
            return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    """)
    torch.save(nets.build(f"{name}:make", 4, 1, tmp_path).state_dict(), tmp_path / "w.pt")
    with pytest.raises(BadInput, match="refuses images of 1×9×9"):
        bring(asked(arch=f"{name}:make", shape=[1, 9, 9]), tmp_path, tmp_path)


@pytest.mark.parametrize("said", [{"mean": [0.1, 0.2]}, {"std": [1.0, 1.0, 1.0]}])
def test_statistics_for_other_channels_than_the_images_have_are_refused(said, network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "w.pt")
    with pytest.raises(BadInput, match="the images 1 channels"):
        bring(asked(**said), tmp_path, tmp_path)


class Nasty:
    """What a pickle can do to who opens it."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    torch.save({"state_dict": Nasty(tmp_path / "owned")}, tmp_path / "w.pt")
    with pytest.raises(BadInput, match="no state dict that loads with weights_only"):
        bring(asked(), tmp_path, tmp_path)
    assert not (tmp_path / "owned").exists()


def test_a_whole_pickled_network_is_refused(tmp_path):
    torch.save(nn.Linear(3, 2), tmp_path / "w.pt")
    with pytest.raises(BadInput, match="no state dict that loads with weights_only"):
        bring(asked(), tmp_path, tmp_path)


@pytest.mark.parametrize("held", [[torch.zeros(2)], {"a": 3}, torch.zeros(2)], ids=["list", "number", "tensor"])
def test_a_file_that_holds_no_state_dict_is_refused(held, tmp_path):
    torch.save(held, tmp_path / "w.pt")
    with pytest.raises(BadInput, match="holds no state dict"):
        bring(asked(), tmp_path, tmp_path)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\x00" * 40, b"<html>not found</html>"])
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=f"checkpoint {name} is no state dict") as caught:
        bring(asked(weights=name), tmp_path, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere.pt", "nowhere.safetensors"])
def test_a_checkpoint_that_is_not_there_is_refused(name, tmp_path):
    with pytest.raises(BadInput, match=f"checkpoint {name} cannot be read: No such file"):
        bring(asked(weights=name), tmp_path, tmp_path)


def test_a_state_dict_of_a_truncated_file_is_refused(network, tmp_path):
    out = io.BytesIO()
    torch.save(network.state_dict(), out)
    (tmp_path / "w.pt").write_bytes(out.getvalue()[: math.ceil(0.7 * len(out.getvalue()))])
    with pytest.raises(BadInput, match=r"checkpoint w\.pt"):
        bring(asked(), tmp_path, tmp_path)
