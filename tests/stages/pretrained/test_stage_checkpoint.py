"""Models trained elsewhere."""

import argparse
import datetime
import enum
import hashlib
import io
import math
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from pydantic import ValidationError
from support import holds
from torch import nn
from torchvision import models

from stages import nets
from stages.errors import BadInput
from stages.model import Design, load, save
from stages.pretrained.checkpoint import import_pretrained, published_normalisation
from stages.pretrained.formats import opened
from stages.recipes import Pretrained

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def asked(**said):
    return Pretrained(**{"arch": "small_cnn", "weights": "w.pt", "shape": [1, 8, 8]} | said)


# ---------------------------------------------------------------------------------- the ways to save one

Kept = type("Kept", (dict,), {"__module__": __name__})
"""A dict of a class of its own, as configurations often are."""


Kind = enum.Enum("Kind", "A B", module=__name__)


class Plain:
    """An object that a training script leaves in its checkpoint."""

    def __init__(self, **said):
        self.__dict__.update(said)


def starting(start, state):
    return {f"{start}{name}": value for name, value in state.items()}


def training(state):
    """The rest of a training's checkpoint: epoch, numpy scalars, arguments, an optimizer with tensors of its own."""
    weights = [nn.Parameter(value.clone()) for value in state.values() if value.is_floating_point()]
    optimizer = torch.optim.Adam(weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    return {
        "epoch": 3,
        "best": np.float64(0.93),
        "history": np.arange(6.0).reshape(2, 3),
        "objects": np.array(["a", None], dtype=object),
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=0.1, milestones=[1, 2], out=Path("runs/1")),
        "config": Kept(width=3, inner=Kept(depth=4)),
        "script": Plain(lr=0.1, when=datetime.datetime(2020, 1, 2), net=nn.Linear),
        "counts": defaultdict(list, a=[1]),
        "seen": {1, 2},
        "kind": Kind.A,
        "version": torch.__version__,
        "rng": {"cpu": torch.get_rng_state()},
        "versions": (1.5, 2**70, b"bytes", None, True, -3),
    }


WRAPS = {
    "bare": lambda state: state,
    "plain dict": dict,
    **{
        name: lambda state, name=name: {name: state, "epoch": 3}
        for name in ("state_dict", "model", "net", "model_state_dict", "model_state", "params", "weights", "ema", "any")
    },
    "model in state": lambda state: {"state": {"model": state}, "step": 7},
    "state_dict of model": lambda state: {"model": {"state_dict": state}},
    "in a list": lambda state: [3, {"lr": 0.1}, state],
    "in a dict of its own class": lambda state: Kept(model=Kept(state)),
    **{
        start: lambda state, start=start: starting(start, state)
        for start in ("module.", "model.", "net.", "_orig_mod.", "module.model.", "_orig_mod.module.", "a.b.c.d.")
    },
    "model of module": lambda state: {"model": starting("module.", state)},
    "state_dict of module": lambda state: {"state_dict": starting("module.", state), "epoch": 3},
    "compiled": lambda state: {"model": starting("module._orig_mod.", state)},
    "beside a training": lambda state: {"state_dict": state} | training(state),
    "among a training": lambda state: dict(state) | training(state),
    "twice": lambda state: {"state_dict": state, "state_dict_ema": state},
    "twice, copied": lambda state: {"model": state, "ema": {name: value.clone() for name, value in state.items()}},
    "averaged": lambda state: {"model_ema": starting("module.", state) | {"n_averaged": torch.tensor(9)}},
    "counted by thop": lambda state: dict(state) | {f"{i}.total_ops": torch.zeros(1) for i in (0, 1)},
    "parameters": lambda state: {name: nn.Parameter(value, requires_grad=False) for name, value in state.items()},
    "views of one": lambda state: of_one(state),
    "not contiguous": lambda state: {n: v.t().contiguous().t() if v.ndim == 2 else v for n, v in state.items()},
}


def of_one(state):
    flat = torch.cat([value.flatten().double() for value in state.values()])
    parts = flat.split([value.numel() for value in state.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(state.items(), parts, strict=True)}


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_state_dict_is_found_in_what_torch_saved(wrap, network, tmp_path):
    torch.save(WRAPS[wrap](network.state_dict()), tmp_path / "w.pt")
    design, weights = import_pretrained(asked(), tmp_path, tmp_path)
    assert holds(network.state_dict(), weights)
    assert design == Design("small_cnn", 10, (1, 8, 8), (0.0,), (1.0,))


FORMS = {
    "w.pt": {"pickle_protocol": 2},
    "w.pth": {"pickle_protocol": 1},
    "w.safetensors": {"pickle_protocol": 3},
    "w.ckpt": {"pickle_protocol": 4},
    "w": {"pickle_protocol": 5},
    "w.tar": {"pickle_protocol": 2, "_use_new_zipfile_serialization": False},
    "w.bin": {"pickle_protocol": 4, "_use_new_zipfile_serialization": False},
}


@pytest.mark.parametrize("name", FORMS)
def test_a_file_of_torch_is_read_by_what_it_holds_whatever_its_form_and_name(name, network, tmp_path):
    held = {"state_dict": starting("module.", network.state_dict())} | training(network.state_dict())
    torch.save(held, tmp_path / name, **FORMS[name])
    assert holds(network.state_dict(), import_pretrained(asked(weights=name), tmp_path, tmp_path)[1])


@pytest.mark.parametrize(("name", "wrap"), [("w.safetensors", "bare"), ("w.pt", "module."), ("w", "_orig_mod.")])
def test_a_state_dict_is_read_from_safetensors_whatever_its_name(name, wrap, network, tmp_path):
    safetensors.torch.save_file(WRAPS[wrap](network.state_dict()), tmp_path / name)
    assert holds(network.state_dict(), import_pretrained(asked(weights=name), tmp_path, tmp_path)[1])


def test_every_tensor_is_read_as_torch_reads_it(tmp_path):
    torch.manual_seed(0)
    base = torch.randn(5, 7)
    shared = {"base": base, "row": base[2], "column": base[:, 3], "turned": base.t(), "part": base[1:4, ::2]}
    kinds = {f"{kind}": torch.randn(3, 2).to(kind) for kind in (torch.float64, torch.float16, torch.bfloat16)}
    own = nn.Parameter(base.clone())
    own.tag, tagged = "mine", torch.randn(2)
    tagged.tag = "mine"
    others = {
        "own": nn.Parameter(base),
        "own, tagged": own,
        "tagged": tagged,
        "long": torch.arange(5),
        "uint16": torch.arange(3).to(torch.uint16),
        "flags": torch.tensor([True, False]),
        "none": torch.empty(0, 3),
        "one": base[0, 0],
        "wide": torch.ones(1).expand(4, 3),
    }
    held = shared | kinds | others
    for form in (True, False):
        if not form:
            held.pop("uint16")  # which torch writes then, but does not read
        torch.save(held, tmp_path / "w.pt", _use_new_zipfile_serialization=form)
        expected = torch.load(tmp_path / "w.pt", weights_only=True)
        with opened(tmp_path / "w.pt") as found:
            assert found.keys() == expected.keys()
            for name, stored in found.items():
                assert stored.read().dtype == expected[name].dtype
                assert torch.equal(stored.read(), expected[name]), name


def test_a_checkpoint_from_before_batch_norm_counted_is_taken(network, tmp_path):
    state = network.state_dict()
    torch.save({name: value for name, value in state.items() if "num_batches" not in name}, tmp_path / "w.pt")
    assert holds(state, import_pretrained(asked(), tmp_path, tmp_path)[1])
    counted = state | {name: torch.tensor(7) for name in state if "num_batches" in name}
    torch.save(counted, tmp_path / "w.pt")
    assert holds(counted, import_pretrained(asked(), tmp_path, tmp_path)[1])
    averaged = state | {name: torch.tensor(7.5) for name in state if "num_batches" in name}
    torch.save(averaged, tmp_path / "w.pt")
    assert holds(state, import_pretrained(asked(), tmp_path, tmp_path)[1])


def test_a_whole_pickled_network_is_read_without_its_code(make_module, tmp_path):
    name = make_module("""
        import torch
        from functools import partial
        from torch import nn
        class Net(nn.Module):
            def __init__(self, classes):
                super().__init__()
                self.make = partial(nn.ReLU, inplace=True)
                self.body = nn.Sequential(nn.Linear(64, 16, bias=False), self.make())
                self.head = nn.Linear(16, classes)
                self.register_buffer("kept", torch.ones(2))
                self.register_buffer("passing", torch.ones(3), persistent=False)
            def forward(self, x):
                return self.head(self.body(x.flatten(1)))
    """)
    recipe = asked(arch=f"{name}:Net")
    net = nets.build(recipe.arch, 4, 1, tmp_path)
    for held in (net, {"model": nn.DataParallel(net), "epoch": 3}):
        torch.save(held, tmp_path / "w.pt")
        assert holds(net.state_dict(), import_pretrained(recipe, tmp_path, tmp_path)[1])
    torch.save(net, tmp_path / "other.pt")
    del sys.modules[name]
    (tmp_path / f"{name}.py").unlink()
    with pytest.raises(BadInput, match=r"other\.pt does not fit arch small_cnn: it has kept, head\.weight, head\.bias"):
        import_pretrained(asked(weights="other.pt"), tmp_path, tmp_path)


def test_torchvisions_old_names_of_a_densenet_are_read(tmp_path):
    torch.manual_seed(0)
    net = nets.build("densenet121", 3, 3, tmp_path)
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", name): v for name, v in net.state_dict().items()}
    assert any(".norm.1." in name for name in old)
    torch.save(old, tmp_path / "w.pt")
    design, weights = import_pretrained(asked(arch="densenet121", shape=[3, 64, 64]), tmp_path, tmp_path)
    assert design.classes == 3
    assert holds(net.state_dict(), weights)


def test_heads_that_a_network_has_in_training_alone_are_left_out(tmp_path):
    torch.manual_seed(0)
    own = models.get_model("googlenet", weights=None, num_classes=5, init_weights=False)
    torch.save(own.state_dict(), tmp_path / "w.pt")
    _, weights = import_pretrained(asked(arch="googlenet", shape=[3, 64, 64]), tmp_path, tmp_path)
    assert holds({name: value for name, value in own.state_dict().items() if not name.startswith("aux")}, weights)


def test_a_checkpoint_is_brought_from_a_web_server(serving, network, tmp_path):
    saved = io.BytesIO()
    torch.save(network.state_dict(), saved)
    with serving({"/w": saved.getvalue(), "/login": b"<!DOCTYPE html><title>Log in</title>"}.__getitem__) as url:
        digest = hashlib.sha256(saved.getvalue()).hexdigest()
        assert holds(
            network.state_dict(), import_pretrained(asked(weights=f"{url}/w", sha256=digest), tmp_path, tmp_path)[1]
        )
        with pytest.raises(BadInput, match=f"checkpoint {url}/login is an HTML page in place of the file"):
            import_pretrained(asked(weights=f"{url}/login"), tmp_path, tmp_path)


# ---------------------------------------------------------------------------------------- what is asked for


def test_a_key_that_is_not_said_makes_no_other_version():
    assert "key" not in asked().parameters()
    assert asked(key="ema").parameters() == asked().parameters() | {"key": "ema"}


@pytest.mark.parametrize("query", ["download=1", "download=true", "dl=1", "raw=true"])
def test_a_url_that_asks_for_the_file_itself_holds_no_secret(query):
    assert asked(weights=f"https://host/w.pt?{query}").weights.endswith(query)
    with pytest.raises(ValidationError, match="a URL with credentials"):
        asked(weights=f"https://host/w.pt?{query}&token=abc")


def test_a_shape_that_ends_with_its_channels_is_refused():
    with pytest.raises(ValidationError, match="images have 1 or 3 channels, got 224"):
        asked(shape=[224, 224, 3])


# -------------------------------------------------------------------------------- several, and what is beside


def test_of_several_weights_that_fit_the_key_chooses(network, tmp_path):
    state = network.state_dict()
    other = {name: value + 1 for name, value in state.items()}
    held = {"state_dict": starting("module.", state), "state_dict_ema": starting("module.", other)}
    torch.save(held, tmp_path / "w.pt")
    with pytest.raises(
        BadInput, match=r"several .*choose by `key: state_dict\.module` or `key: state_dict_ema\.module`"
    ):
        import_pretrained(asked(), tmp_path, tmp_path)
    for key, expected in (("state_dict", state), ("state_dict_ema", other), ("state_dict_ema.module", other)):
        assert holds(expected, import_pretrained(asked(key=key), tmp_path, tmp_path)[1])
    with pytest.raises(
        BadInput, match=r"no weights that fit arch small_cnn at `key: ema`, but at `key: state_dict\.module`"
    ):
        import_pretrained(asked(key="ema"), tmp_path, tmp_path)
    torch.save(starting("encoder.", state) | starting("encoder.momentum.", other), tmp_path / "w.pt")
    assert holds(state, import_pretrained(asked(key="encoder"), tmp_path, tmp_path)[1])
    assert holds(other, import_pretrained(asked(key="encoder.momentum"), tmp_path, tmp_path)[1])
    torch.save(dict(state) | {"ema": other}, tmp_path / "w.pt")
    with pytest.raises(BadInput, match="choose by `key: ''` or `key: ema`"):
        import_pretrained(asked(), tmp_path, tmp_path)
    assert holds(state, import_pretrained(asked(key=""), tmp_path, tmp_path)[1])


def test_what_is_no_layer_of_the_network_is_left_out_by_a_key_alone(network, tmp_path):
    state = network.state_dict()
    torch.save({"state_dict": starting("model.", state) | {"loss.weight": torch.ones(9)}}, tmp_path / "w.pt")
    with pytest.raises(BadInput, match=r"no layer of .* \(state_dict\.loss\.weight\).* `key: state_dict\.model`"):
        import_pretrained(asked(), tmp_path, tmp_path)
    assert holds(state, import_pretrained(asked(key="state_dict.model"), tmp_path, tmp_path)[1])
    torch.save({"state_dict": starting("model.", state) | {"model.more.weight": torch.ones(9)}}, tmp_path / "w.pt")
    with pytest.raises(BadInput, match=r"does not fit arch small_cnn: more\.weight is \(9,\) in the checkpoint"):
        import_pretrained(asked(key="state_dict.model"), tmp_path, tmp_path)


MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]


def robust(state, mean=MEAN, std=STD):
    """A checkpoint in the format of MadryLab/robustness: the network twice, an attacker, both normalisations."""
    column = {name: torch.tensor(value).view(3, 1, 1) for name, value in (("new_mean", mean), ("new_std", std))}
    model = {
        **starting("module.model.", state),
        **starting("module.normalizer.", column),
        **starting("module.attacker.normalize.", column),
        **starting("module.attacker.model.", state),
    }
    return {"model": model, "epoch": 90, "schedule": {"last_epoch": 89}, "nat_prec1": np.float32(90.1)}


@pytest.fixture
def colour(make_module, tmp_path):
    torch.manual_seed(0)
    return nets.build("small_cnn", 10, 3, tmp_path).state_dict()


RGB = {"shape": [3, 8, 8]}


def test_a_normalisation_that_lies_beside_the_network_is_taken_where_none_is_given(colour, tmp_path):
    torch.save(robust(colour), tmp_path / "w.pt")
    design, weights = import_pretrained(asked(**RGB), tmp_path, tmp_path)
    assert holds(colour, weights)
    np.testing.assert_allclose((design.mean, design.std), (MEAN, STD), rtol=1e-6)
    torch.save(robust(colour, [255 * m for m in MEAN], [255 * s for s in STD]), tmp_path / "w.pt")
    design, _ = import_pretrained(asked(**RGB), tmp_path, tmp_path)
    np.testing.assert_allclose((design.mean, design.std), (MEAN, STD), rtol=1e-6)


def test_a_normalisation_that_lies_beside_the_network_is_held_against_the_given_one(colour, tmp_path):
    torch.save(robust(colour), tmp_path / "w.pt")
    design, _ = import_pretrained(asked(**RGB, mean=[0.491, 0.482, 0.447], std=STD), tmp_path, tmp_path)
    assert design.mean == (0.491, 0.482, 0.447)
    sentence = r"has in model\.module\.normalizer\.new_mean and .*new_std \[0\.4914, .*leave out `mean` and `std`"
    for said in ({"mean": [0.5] * 3}, {"std": [0.2471, 0.2435, 0.2616]}, {"mean": MEAN, "std": [1.0] * 3}):
        with pytest.raises(BadInput, match=sentence):
            import_pretrained(asked(**RGB, **said), tmp_path, tmp_path)
    for mean, std in (([math.nan] * 3, STD), (MEAN, [0.2, 0.0, 0.2]), (MEAN, [math.inf] * 3)):
        torch.save(robust(colour, mean, std), tmp_path / "w.pt")
        with pytest.raises(BadInput, match="normalise no image"):
            import_pretrained(asked(**RGB), tmp_path, tmp_path)


@pytest.mark.parametrize("name", ["mean", "new_std", "stats.mean", "loss_mean"])
def test_half_a_normalisation_is_none(name, colour, tmp_path):
    torch.save(starting("model.", colour) | {name: torch.ones(3)}, tmp_path / "w.pt")
    with pytest.raises(BadInput, match="belong to no layer"):
        import_pretrained(asked(**RGB), tmp_path, tmp_path)


@pytest.mark.parametrize("said", [{"mean": [123.675]}, {"std": [58.4]}, {"std": [255.0]}])
def test_a_normalisation_of_levels_is_refused_with_what_to_do(said, network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "w.pt")
    with pytest.raises(BadInput, match=r"pixels from 0 to 1, got .*: divide it by 255"):
        import_pretrained(asked(**said), tmp_path, tmp_path)


# --------------------------------------------------------------------------------------------- fitted


def test_what_was_brought_is_a_model_like_any_other(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "w.pt")
    design, weights = import_pretrained(asked(mean=[0.3], std=[0.4]), tmp_path, tmp_path)
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(load(design, weights, tmp_path)(x), network.eval()((x - 0.3) / 0.4))


def test_a_checkpoint_with_the_digest_that_was_named_is_taken_and_another_is_not(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "w.pt")
    digest = hashlib.sha256((tmp_path / "w.pt").read_bytes()).hexdigest()
    assert import_pretrained(asked(sha256=digest), tmp_path, tmp_path)[0].classes == 10
    with pytest.raises(BadInput, match=f"has sha256 {digest}, expected {'0' * 64}"):
        import_pretrained(asked(sha256="0" * 64), tmp_path, tmp_path)


def test_of_a_networks_classes_only_those_that_were_asked_for_answer_in_that_order(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "w.pt")
    whole, weights = import_pretrained(asked(), tmp_path, tmp_path)
    some, same_weights = import_pretrained(asked(outputs=[7, 0, 3]), tmp_path, tmp_path)
    assert same_weights == weights
    assert (some.classes, some.network_classes) == (3, 10)
    x = torch.rand(4, 1, 8, 8)
    model = load(some, weights, tmp_path)
    assert torch.equal(model(x), load(whole, weights, tmp_path)(x)[:, [7, 0, 3]])
    assert save(model.network) == weights


def test_an_output_that_is_no_class_of_the_network_is_refused(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "w.pt")
    with pytest.raises(BadInput, match="outputs names 10, but the network has 10 classes, 0 to 9"):
        import_pretrained(asked(outputs=[3, 10]), tmp_path, tmp_path)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_become_the_networks_own(kind, network, tmp_path):
    network.to(kind)
    torch.save(network.state_dict(), tmp_path / "w.pt")
    safetensors.torch.save_file(network.state_dict(), tmp_path / "w.safetensors")
    _, weights = import_pretrained(asked(), tmp_path, tmp_path)
    assert holds(network.float().state_dict(), weights)
    assert import_pretrained(asked(weights="w.safetensors"), tmp_path, tmp_path)[1] == weights


def test_a_torchvision_network_is_brought_from_a_file(tmp_path):
    torch.manual_seed(0)
    own = nets.build("shufflenet_v2_x0_5", 6, 3, tmp_path)
    torch.save(own.state_dict(), tmp_path / "w.pt")
    recipe = asked(arch="shufflenet_v2_x0_5", shape=[3, 64, 64], mean=IMAGENET_MEAN, std=IMAGENET_STD)
    design, weights = import_pretrained(recipe, tmp_path, tmp_path)
    assert design.classes == 6
    assert design.mean == tuple(IMAGENET_MEAN)
    assert holds(own.state_dict(), weights)


@pytest.mark.parametrize(
    ("arch", "mean", "std"),
    [("resnet18", IMAGENET_MEAN, IMAGENET_STD), ("efficientnet_v2_l", [0.5] * 3, [0.5] * 3),
     ("inception_v3", [0.5] * 3, [0.5] * 3), ("googlenet", [0.5] * 3, [0.5] * 3)],
)  # fmt: skip
def test_torchvisions_weights_expect_the_normalisation_they_were_trained_with(arch, mean, std):
    found = models.get_model_weights(arch).IMAGENET1K_V1
    assert published_normalisation(arch, found) == (mean, std)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """torchvision's published GoogLeNet weights, for five classes, in torch's download cache."""
    torch.manual_seed(0)
    own = models.get_model("googlenet", weights=None, num_classes=5, transform_input=True, init_weights=False).eval()
    saved = io.BytesIO()
    torch.save(own.state_dict(), saved)
    digest = hashlib.sha256(saved.getvalue()).hexdigest()[:8]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(models.GoogLeNet_Weights, "url", f"http://127.0.0.1:9/models/googlenet-{digest}.pth")
    kept = tmp_path / f"home/hub/checkpoints/googlenet-{digest}.pth"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(saved.getvalue())
    return own, kept


NAMED = {"arch": "googlenet", "weights": "IMAGENET1K_V1", "shape": [3, 64, 64]}


def test_a_torchvision_network_brought_by_name_answers_as_torchvisions_own(published, tmp_path):
    # Of this one torchvision's own preset is not all: its weights go with a network that normalises once more.
    own, _ = published
    design, weights = import_pretrained(asked(**NAMED), tmp_path, tmp_path)
    x, (mean, std) = torch.rand(2, 3, 64, 64), (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(load(design, weights, tmp_path)(x), own((x - mean) / std), rtol=1e-4, atol=1e-4)
    said, _ = import_pretrained(asked(**NAMED, mean=[0.1, 0.2, 0.3]), tmp_path, tmp_path)
    assert (said.mean, said.std) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))


def test_torchvisions_weights_are_fetched_once_and_held_against_their_digest(published, serving, monkeypatch, tmp_path):
    _, kept = published
    content, asked_for = kept.read_bytes(), []
    with serving(lambda path: asked_for.append(path) or content[: len(content) // len(asked_for)]) as url:
        monkeypatch.setattr(models.GoogLeNet_Weights, "url", f"{url}/models/{kept.name}")
        kept.unlink()
        weights = [import_pretrained(asked(**NAMED), tmp_path, tmp_path)[1] for _ in range(2)]
        assert weights[0] == weights[1] and asked_for == [f"/models/{kept.name}"]
        kept.unlink()
        with pytest.raises(BadInput, match="checkpoint IMAGENET1K_V1 was damaged on its way from http://127"):
            import_pretrained(asked(**NAMED), tmp_path, tmp_path)
    kept.write_bytes(content[:-1])
    with pytest.raises(BadInput, match=f"lies damaged in {kept}: delete it there"):
        import_pretrained(asked(**NAMED), tmp_path, tmp_path)


def test_a_name_that_torchvision_does_not_know_is_refused_with_those_that_it_does(tmp_path):
    with pytest.raises(BadInput, match=r"is no file; torchvision's weights of googlenet are IMAGENET1K_V1"):
        import_pretrained(asked(**NAMED | {"weights": "IMAGENET1K_V9"}), tmp_path, tmp_path)


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
    design, _ = import_pretrained(asked(arch=f"{name}:Net", weights=f"w.{kind}"), tmp_path, tmp_path)
    assert design.classes == 3


def test_without_a_linear_layer_the_number_of_classes_is_asked_for(make_module, tmp_path):
    name = make_module("""
        from torch import nn
        def make(classes):
            return nn.Sequential(nn.Conv2d(1, classes, 8), nn.Flatten())
    """)
    torch.save(nets.build(f"{name}:make", 4, 1, tmp_path).state_dict(), tmp_path / "w.pt")
    with pytest.raises(BadInput, match="add `classes: N`"):
        import_pretrained(asked(arch=f"{name}:make"), tmp_path, tmp_path)
    assert import_pretrained(asked(arch=f"{name}:make", classes=4), tmp_path, tmp_path)[0].classes == 4


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
        import_pretrained(asked(classes=10), tmp_path, tmp_path)


def test_images_that_the_network_refuses_are_refused(make_module, tmp_path):
    name = make_module("""
        from torch import nn
        def make(classes):
            return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    """)
    torch.save(nets.build(f"{name}:make", 4, 1, tmp_path).state_dict(), tmp_path / "w.pt")
    with pytest.raises(BadInput, match="refuses images of 1×9×9"):
        import_pretrained(asked(arch=f"{name}:make", shape=[1, 9, 9]), tmp_path, tmp_path)


@pytest.mark.parametrize("said", [{"mean": [0.1, 0.2]}, {"std": [1.0, 1.0, 1.0]}])
def test_statistics_for_other_channels_than_the_images_have_are_refused(said, network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "w.pt")
    with pytest.raises(BadInput, match="the images 1 channels"):
        import_pretrained(asked(**said), tmp_path, tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_weights_that_are_no_numbers_are_refused(form, value, network, tmp_path):
    state = network.state_dict()
    state["0.0.weight"][0, 0, 0, :2] = value
    torch.save(state, tmp_path / "w.pt")
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(BadInput, match=r"has 2 NaN or infinite values among the 288 of 0\.0\.weight"):
        import_pretrained(asked(weights=f"w.{form}"), tmp_path, tmp_path)


def test_what_overflows_float32_or_makes_the_answer_no_number_is_refused(network, tmp_path):
    state = network.state_dict()
    torch.save(state | {"0.0.weight": state["0.0.weight"].double() * 1e60}, tmp_path / "w.pt")
    with pytest.raises(BadInput, match="NaN or infinite values"):
        import_pretrained(asked(), tmp_path, tmp_path)
    torch.save(state | {"0.1.running_var": -state["0.1.running_var"]}, tmp_path / "w.pt")
    with pytest.raises(BadInput, match="makes arch small_cnn give NaN or infinite logits for a black image"):
        import_pretrained(asked(), tmp_path, tmp_path)


def test_a_constant_of_the_network_that_is_infinite_is_taken(make_module, tmp_path):
    name = make_module("""
        import torch
        from torch import nn
        class Net(nn.Module):
            def __init__(self, classes):
                super().__init__()
                self.head = nn.Linear(64, classes)
                self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
            def forward(self, x):
                return self.head(x.flatten(1))
    """)
    net = nets.build(f"{name}:Net", 3, 1, tmp_path)
    torch.save(net.state_dict(), tmp_path / "w.pt")
    assert holds(net.state_dict(), import_pretrained(asked(arch=f"{name}:Net"), tmp_path, tmp_path)[1])


def quantised(value):
    return torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)


ODD = {
    "int8": (lambda v: v.to(torch.int8), "has int8 numbers in 0.0.weight, the arch float32"),
    "complex": (lambda v: v.to(torch.complex64), "has complex64 numbers in 0.0.weight, the arch float32"),
    "float8": (lambda v: v.to(torch.float8_e4m3fn), "has float8_e4m3fn numbers in 0.0.weight"),
    "bool": (lambda v: v > 0, "has bool numbers in 0.0.weight"),
    "sparse": (lambda v: v.to_sparse(), "has a tensor 0.0.weight that is sparse"),
    "meta": (lambda v: v.to("meta"), "has a tensor 0.0.weight that is on the meta device"),
    "quantised": (quantised, "has a tensor 0.0.weight that is quantised"),
    "conjugate": (lambda v: torch.complex(v, v).conj(), "has a tensor 0.0.weight that is conjugate"),
    "numpy": (lambda v: v.numpy(), "has a tensor 0.0.weight that is a NumPy array: convert it"),
    "expanded": (lambda v: torch.ones(1).expand(2000, 2000), "has a tensor 0.0.weight that is larger than its stored"),
    "a number": (lambda v: 3.5, "does not fit arch small_cnn: 0.0.weight is nothing in the checkpoint"),
}


@pytest.mark.filterwarnings("ignore:.*quantiz.*", "ignore:.*torch.ao.*", "ignore:.*[Ss]parse.*")
@pytest.mark.parametrize("kind", ODD)
def test_what_are_no_dense_floats_is_refused_by_name(kind, network, tmp_path):
    make, sentence = ODD[kind]
    state = network.state_dict()
    torch.save(state | {"0.0.weight": make(state["0.0.weight"])}, tmp_path / "w.pt")
    with pytest.raises(BadInput, match=re.escape(f"checkpoint w.pt {sentence}")):
        import_pretrained(asked(), tmp_path, tmp_path)


@pytest.mark.parametrize(
    "held", [[torch.zeros(2)], {"a": 3}, torch.zeros(2), None], ids=["list", "number", "tensor", "none"]
)
def test_a_file_that_holds_no_state_dict_is_refused(held, tmp_path):
    torch.save(held, tmp_path / "w.pt")
    with pytest.raises(BadInput, match=r"checkpoint w\.pt holds no state dict"):
        import_pretrained(asked(), tmp_path, tmp_path)


def test_a_last_layer_of_more_classes_than_can_be_told_apart_is_refused(network, tmp_path):
    state = network.state_dict()
    wide = {"6.weight": torch.ones(1, 1).expand(10**9, 128), "6.bias": torch.ones(1).expand(10**9)}
    torch.save(state | wide, tmp_path / "w.pt")
    with pytest.raises(BadInput, match="a last layer of 1,000,000,000 classes"):
        import_pretrained(asked(), tmp_path, tmp_path)
