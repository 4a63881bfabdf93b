"""A classifier on disk and in memory."""

from dataclasses import replace

import pytest
import torch
from support import holds

from stages.errors import BadData, BadInput
from stages.model import Classifier, Design, load, save

SMALL = Design("small_cnn", 10, (1, 8, 8), (0.3,), (0.4,))


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
    assert holds(network.state_dict(), weights)
    assert save(load(SMALL, weights, tmp_path).network) == weights


def test_layers_that_share_their_weights_are_saved(make_module, tmp_path):
    name = make_module("""
        from torch import nn
        def make(classes):
            layer = nn.Linear(64, 64)
            return nn.Sequential(nn.Flatten(), layer, nn.ReLU(), layer, nn.Linear(64, classes))
    """)
    design = Design(f"{name}:make", 4, (1, 8, 8), (0.0,), (1.0,))
    network = Classifier(design, tmp_path).network
    assert holds(network.state_dict(), save(network))
    assert save(load(design, save(network), tmp_path).network) == save(network)


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
