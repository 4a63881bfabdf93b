"""Training: it learns, can be interrupted after any epoch, and uses every example at most once per epoch."""

import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages import train
from stages.errors import BadData, BadInput
from stages.model import Classifier, Design, load, save
from stages.pgd import pgd
from stages.recipes import Adversary, Train
from stages.seeds import torch_seed
from stages.shard import Shard
from stages.targeted_pgd import untargeted
from stages.tensors import to_unit

# A network with dropout: its draws, too, must be the same after an interruption.
DROPS = """
from torch import nn
def make(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(),
                         nn.Linear(32, classes))
"""

# No batch norm and no dropout: what several processes compute is then what one would.
SMOOTH = """
from torch import nn
def make(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, classes))
"""

# A network that remembers the first pixel of every image it was trained on, batch by batch.
RECORDS = """
from torch import nn
SEEN = []
class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.head = nn.Linear(1, classes)
    def forward(self, x):
        if self.training:
            SEEN.append((x[:, 0, 0, 0] * 255).round().int().tolist())
        return self.head(x[:, :, 0, 0])
"""


def recipe(**asked):
    return Train(**{"on": "digits", "arch": "small_cnn", "epochs": 3, "batch_size": 64, "threads": 1} | asked)


def run(asked, design, examples, here=Path(), checkpoint=None):
    """Every checkpoint of a training."""
    return [made for made, _ in train.fit(asked, design, examples, here, checkpoint)]


@pytest.fixture
def some(digits, part, examples_of):
    """300 digits in three shards."""
    names = [f"train-{n:06d}" for n in range(3)]
    shards = [part(digits["train"], slice(100 * n, 100 * n + 100), name) for n, name in enumerate(names)]
    return examples_of(*shards)


def numbered(count, per_shard, examples_of):
    """One-pixel images whose level is their number, so that a network can identify them."""
    assert count <= 256
    shards = []
    for number, first in enumerate(range(0, count, per_shard)):
        index = np.arange(first, min(first + per_shard, count))
        pixels = index.astype(np.uint8).reshape(-1, 1, 1, 1)
        shards.append(Shard(f"train-{number:06d}", index, index % 3, index % 3, pixels))
    return examples_of(*shards)


# --------------------------------------------------------------------------------------- it learns


def test_it_learns_the_digits(digits, design, trained):
    x = torch.from_numpy(digits["test"].images()).permute(0, 3, 1, 2).float() / 255
    right = (trained(x).argmax(1).numpy() == digits["test"].label).mean()
    assert right > 0.9  # chance is 0.1, and these images were never trained on


def test_the_metrics_say_how_each_epoch_went(some, design):
    asked = recipe(lr=0.01, epochs=8)
    *_, (checkpoint, history) = train.fit(asked, design, some, Path())
    assert [epoch["epoch"] for epoch in history] == [*range(1, 9)]
    assert history[-1]["loss"] < history[0]["loss"]
    assert all(0 <= epoch["accuracy"] <= 1 for epoch in history)
    assert [epoch["lr"] for epoch in history] == [train.learning_rate(asked, e, 8) for e in range(1, 9)]
    assert train.history_of(checkpoint) == history


@pytest.mark.parametrize("augment", ["none", "flip", "crop-flip", "spatial"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_way_of_training_gives_weights_that_load(augment, precision, some, design):
    asked = recipe(epochs=1, augment=augment, precision=precision, nesterov=True, label_smoothing=0.1)
    weights = train.weights_of(run(asked, design, some)[-1])
    logits = load(design, weights, Path())(torch.rand(2, 1, 8, 8))
    assert logits.isfinite().all()


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_loss_is_the_smoothed_cross_entropy(smoothing, make_module, tmp_path, part, digits, examples_of):
    # A network that always answers (2, 0, 0), all labels 0, and a rate of nearly nothing. With t = 1 − s + s/3 on
    # class 0 and s/3 on each other, the cross-entropy is ln(e² + 2) − 2 t.
    name = make_module("""
        import torch
        class Net(torch.nn.Module):
            def __init__(self, classes):
                super().__init__()
                self.answer = torch.nn.Parameter(torch.tensor([2.0, 0.0, 0.0]))
            def forward(self, x):
                return self.answer.expand(len(x), -1)
    """)
    zeros = part(digits["train"], digits["train"].label == 0)
    asked = recipe(arch=f"{name}:Net", lr=1e-12, epochs=1, label_smoothing=smoothing, weight_decay=0)
    tiny = Design(asked.arch, 3, (1, 8, 8), (0.0,), (1.0,))
    ((_, history),) = train.fit(asked, tiny, examples_of(zeros), tmp_path)
    by_hand = np.log(np.exp(2) + 2) - 2 * (1 - smoothing + smoothing / 3)
    assert history[0]["loss"] == pytest.approx(by_hand, rel=1e-5)
    assert history[0]["accuracy"] == 1


# ------------------------------------------------------------------------------ adversarial training


# A linear network of two classes with known weights, which keeps every batch that it is shown, and in which mode.
LINEAR = """
import torch
from torch import nn
SEEN = []
class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.head = nn.Linear(64, classes, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.linspace(-1, 1, 128).view(2, 64).sin() * 0.1)
    def forward(self, x):
        SEEN.append((self.training, x.detach().clone()))
        return self.head(x.flatten(1))
"""


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_what_is_trained_on_is_the_worst_case_of_a_linear_model(norm, make_module, tmp_path, examples_of):
    # The loss of class 0 grows along w₁ − w₀: by eps of its unit vector (L2), or of its signs (L∞).
    name = make_module(LINEAR)
    index = np.arange(8)
    grey = Shard("train-000000", index, 0 * index, 0 * index, np.full((8, 8, 8, 1), 128, np.uint8))
    ball = Adversary(norm=norm, eps=0.1, steps=7, fold=False)
    asked = recipe(arch=f"{name}:Net", batch_size=8, epochs=1, lr=1e-9, adversarial=ball)
    run(asked, Design(asked.arch, 2, (1, 8, 8), (0.0,), (1.0,)), examples_of(grey), tmp_path)
    seen = importlib.import_module(name).SEEN
    assert [training for training, _ in seen] == [False] * 7 + [True]
    weight = torch.linspace(-1, 1, 128).view(2, 64).sin() * 0.1
    away = weight[1] - weight[0]
    step = away / away.norm() if norm == "l2" else away.sign()
    torch.testing.assert_close(seen[-1][1].flatten(1), (128 / 255 + 0.1 * step).expand(8, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_adversarial_training_makes_a_more_robust_model(precision, digits, make_module, tmp_path, design, examples_of):
    arch = f"{make_module(SMOOTH)}:make"
    small = Design(arch, 10, design.shape, design.mean, design.std)
    pixels, label = digits["test"].images(), digits["test"].label
    right = {}
    for ball in (None, Adversary(eps=1.0, step_size=0.4, steps=3)):
        asked = recipe(arch=arch, epochs=6, lr=0.1, precision=precision, adversarial=ball)
        model = load(small, train.weights_of(run(asked, small, examples_of(digits["train"]), tmp_path)[-1]), tmp_path)
        away = untargeted(model, torch.from_numpy(label))
        clean = to_unit(pixels)
        attacked = pgd(away, clean, norm="l2", eps=1.0, step_size=0.2, steps=10)
        right[ball is not None] = [(model(x).argmax(1).numpy() == label).mean() for x in (clean, attacked)]
    assert right[True][1] > right[False][1] + 0.1
    assert right[True][0] > 0.8


def test_adversarial_training_resumes_to_the_same_bytes(some, design, make_module, tmp_path):
    arch = f"{make_module(DROPS)}:make"
    asked = recipe(arch=arch, epochs=2, augment="spatial", adversarial=Adversary(eps=0.5, steps=2))
    drops = Design(arch, 10, design.shape, design.mean, design.std)
    whole = run(asked, drops, some, tmp_path)
    resumed = run(asked, drops, some, tmp_path, whole[0])
    assert train.weights_of(resumed[-1]) == train.weights_of(whole[-1])


# -------------------------------------------------------------------------------------- linear probe


def probed(weights, design, examples, checkpoint=None, **asked):
    asked = recipe(**{"arch": None, "probe": "standard", "augment": "crop-flip"} | asked)
    return [made for made, _ in train.fit(asked, design, examples, Path(), checkpoint, start=weights)]


def test_a_linear_probe_changes_the_last_linear_layer_and_nothing_else(some, design, trained_weights):
    made = safetensors.torch.load(train.weights_of(probed(trained_weights, design, some)[-1]))
    given = safetensors.torch.load(trained_weights)
    changed = {name for name in given if not torch.equal(made[name], given[name])}
    assert set(made) == set(given)
    assert changed == {"6.weight", "6.bias"}  # batch norm's statistics are left alone, too


def test_a_linear_probe_starts_anew_and_learns_from_the_features(some, digits, design, trained_weights):
    longer = probed(trained_weights, design, some, epochs=20, lr=0.3, augment="none")
    learned = load(design, train.weights_of(longer[-1]), Path())
    x, label = to_unit(digits["test"].images()), digits["test"].label
    assert (learned(x).argmax(1).numpy() == label).mean() > 0.9
    # The seed of the model itself: that its first weights are not found again is part of what is tested.
    untrained = probed(trained_weights, design, some, epochs=1, lr=1e-12)[-1]
    start = load(design, train.weights_of(untrained), Path())
    assert (start(x).argmax(1).numpy() == label).mean() < 0.5


def test_a_linear_probe_resumes_to_the_same_bytes(some, design, trained_weights):
    whole = probed(trained_weights, design, some)
    resumed = probed(trained_weights, design, some, whole[0])
    assert train.weights_of(resumed[-1]) == train.weights_of(whole[-1])


def test_a_network_without_a_linear_layer_cannot_be_probed(make_module, tmp_path, some):
    name = make_module("""
        from torch import nn
        def make(classes):
            return nn.Sequential(nn.Conv2d(1, classes, 8), nn.Flatten())
    """)
    conv = Design(f"{name}:make", 10, (1, 8, 8), (0.0,), (1.0,))
    weights = save(Classifier(conv, tmp_path).network)
    with pytest.raises(BadInput, match="has no linear layer"):
        next(train.fit(recipe(arch=None, probe="conv"), conv, some, tmp_path, start=weights))


# ------------------------------------------------------------------------------------ learning curve


@pytest.mark.parametrize("kind", ["plain", "adversarial", "probe"])
def test_the_learning_curve_scores_every_epoch_and_changes_no_bit(
    kind, some, digits, make_module, tmp_path, design, trained_weights
):
    # A network with dropout and batch norm, which watching must neither draw from nor teach.
    arch = f"{make_module(DROPS)}:make"
    drops = Design(arch, 10, design.shape, design.mean, design.std)
    extra = {"adversarial": Adversary(eps=0.3, steps=1)} if kind == "adversarial" else {}
    asked, start = recipe(arch=arch, epochs=2, **extra), None
    if kind == "probe":
        asked, drops, start = recipe(arch=None, probe="standard", epochs=2), design, trained_weights
    watch = (digits["test"].images()[:50], digits["test"].label[:50])
    plain = list(train.fit(asked, drops, some, tmp_path, start=start))
    watched = list(train.fit(asked, drops, some, tmp_path, start=start, watch=watch))
    for (one, _), (two, history) in zip(plain, watched, strict=True):
        assert train.weights_of(one) == train.weights_of(two)
        answers = load(drops, train.weights_of(two), tmp_path)(to_unit(watch[0])).argmax(1).numpy()
        assert history[-1]["test_accuracy"] == (answers == watch[1]).mean()
    assert "test_accuracy" not in plain[-1][1][-1]


def test_answers_that_are_no_numbers_are_wrong_and_end_no_training(some, digits, make_module, tmp_path, design):
    name = make_module("""
        from torch import nn
        class Net(nn.Module):
            def __init__(self, classes):
                super().__init__()
                self.head = nn.Linear(64, classes)
            def forward(self, x):
                return self.head(x.flatten(1)) + (0 if self.training else float("nan"))
    """)
    odd = Design(f"{name}:Net", 10, design.shape, design.mean, design.std)
    watch = (digits["test"].images()[:50], digits["test"].label[:50])
    histories = [history for _, history in train.fit(recipe(epochs=2), odd, some, tmp_path, watch=watch)]
    assert [epoch["test_accuracy"] for epoch in histories[-1]] == [0.0, 0.0]


# ----------------------------------------------------------------------------------- the same bits


def test_the_same_seed_gives_the_same_bytes_and_another_gives_others(some, design):
    weights = [train.weights_of(run(recipe(seed=seed, epochs=1), design, some)[-1]) for seed in (0, 0, 1)]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_what_was_drawn_before_does_not_matter(some, design):
    torch.manual_seed(1)
    one = run(recipe(epochs=1), design, some)[-1]
    torch.manual_seed(2)
    torch.rand(7)
    assert train.weights_of(run(recipe(epochs=1), design, some)[-1]) == train.weights_of(one)


def test_dropout_draws_afresh_in_every_epoch(make_module, tmp_path, some, design):
    name = make_module("""
        import torch
        DRAWN = []
        class Net(torch.nn.Module):
            def __init__(self, classes):
                super().__init__()
                self.head = torch.nn.Linear(64, classes)
            def forward(self, x):
                DRAWN.append(torch.rand(1).item())
                return self.head(x.flatten(1))
    """)
    asked = recipe(arch=f"{name}:Net", epochs=3)
    run(asked, Design(asked.arch, 10, design.shape, design.mean, design.std), some, tmp_path)
    drawn = importlib.import_module(name).DRAWN
    assert len(set(drawn)) == len(drawn) == 3 * (300 // 64)


@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("memory_budget", [0, 4096], ids=["streamed", "in memory"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_training_resumed_after_any_epoch_ends_with_the_bytes_of_one_that_was_not_interrupted(
    after, memory_budget, momentum, some, design, make_module, tmp_path
):
    arch = f"{make_module(DROPS)}:make"
    asked = recipe(arch=arch, epochs=4, memory_budget=memory_budget, momentum=momentum, augment="crop-flip")
    drops = Design(arch, 10, design.shape, design.mean, design.std)
    whole = run(asked, drops, some, tmp_path)
    resumed = run(asked, drops, some, tmp_path, whole[after - 1])
    assert len(resumed) == 4 - after
    assert train.weights_of(resumed[-1]) == train.weights_of(whole[-1])
    assert [e["loss"] for e in train.history_of(resumed[-1])] == [e["loss"] for e in train.history_of(whole[-1])]


AIR = {
    "arch": "airnet", "epochs": 3, "batch_size": 10, "lr": 0.7, "nesterov": True, "norm_bias_lr": 64, "ema": 0.9,
    "schedule": "triangular", "whiten": True, "alternating_flip": True, "augment": "shift-flip", "label_smoothing": 0.2,
}  # fmt: skip


@pytest.mark.parametrize("memory_budget", [0, 4096], ids=["streamed", "in memory"])
def test_an_averaged_whitened_network_under_alternating_flips_resumes_to_the_same_bytes(
    memory_budget, examples_of, tmp_path
):
    draw = np.random.default_rng(0)
    shards = []
    for number in range(2):
        index = np.arange(20 * number, 20 * number + 20)
        pixels = draw.integers(0, 256, (20, 16, 16, 3), np.uint8)
        shards.append(Shard(f"train-{number:06d}", index, index % 3, index % 3, pixels))
    colours = Design("airnet", 3, (3, 16, 16), (0.5,) * 3, (0.3,) * 3)
    asked, some = recipe(**AIR, memory_budget=memory_budget), examples_of(*shards)
    whole = run(asked, colours, some)
    for after, checkpoint in enumerate(whole[:-1], 1):
        resumed = run(asked, colours, some, checkpoint=checkpoint)
        assert len(resumed) == 3 - after
        assert train.weights_of(resumed[-1]) == train.weights_of(whole[-1])
        assert [e["loss"] for e in train.history_of(resumed[-1])] == [e["loss"] for e in train.history_of(whole[-1])]
    first = [safetensors.torch.load(train.weights_of(made))["0.weight"] for made in whole]
    assert all(torch.equal(filters, first[0]) for filters in first)  # what is whitened is not learned


def test_a_convolutional_training_with_batch_norm_resumes_to_the_same_bytes(some, design):
    whole = run(recipe(), design, some)
    assert train.weights_of(run(recipe(), design, some, checkpoint=whole[0])[-1]) == train.weights_of(whole[-1])


def test_a_training_that_is_done_has_nothing_more_to_do(some, design):
    done = run(recipe(epochs=1), design, some)[-1]
    assert run(recipe(epochs=1), design, some, checkpoint=done) == []


# ----------------------------------------------------------------------------- what it goes on from


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "header"])
def test_a_damaged_checkpoint_is_not_gone_on_from(damage, some, design):
    whole = run(recipe(epochs=2), design, some)
    damaged = {
        "cut": whole[0][:-100],
        "empty": b"",
        "garbage": b"\x01" * 500,
        "header": whole[0][:8] + b"[" + whole[0][9:],
    }[damage]
    assert not train.came_from(damaged, some.digest)
    again = run(recipe(epochs=2), design, some, checkpoint=damaged)
    assert train.weights_of(again[-1]) == train.weights_of(whole[-1])
    assert len(again) == 2


def test_a_checkpoint_of_other_examples_is_not_gone_on_from(some, design, digits, part, examples_of):
    other = examples_of(part(digits["train"], slice(300, 600)), digest="another origin")
    elsewhere = run(recipe(epochs=1), design, other)[-1]
    assert train.came_from(elsewhere, "another origin")
    assert not train.came_from(elsewhere, some.digest)
    assert len(run(recipe(epochs=2), design, some, checkpoint=elsewhere)) == 2


def test_no_checkpoint_comes_from_nowhere():
    assert not train.came_from(None, "origin")


@given(st.binary(max_size=80) | st.binary(max_size=20).map(lambda rest: len(rest).to_bytes(8, "little") + rest))
def test_bytes_that_are_no_checkpoint_never_come_from_anywhere(content):
    assert train.came_from(content, "origin") is False


@pytest.mark.parametrize(
    "header", [b"1", b"[]", b'"x"', b"null", b'{"__metadata__":3}', b'{"__metadata__":{"about":"4"}}']
)
def test_a_header_of_another_kind_is_no_checkpoint(header):
    assert train.came_from(len(header).to_bytes(8, "little") + header, "origin") is False


def test_weights_are_those_of_the_network_alone(some, design):
    weights = safetensors.torch.load(train.weights_of(run(recipe(epochs=1), design, some)[-1]))
    from stages import nets

    assert set(weights) == set(nets.build("small_cnn", 10, 1, Path()).state_dict())


# ------------------------------------------------------------------------------------ what steps do


# Two parameters of one number each, one a bias of batch norm, whose gradients are constant.
SLOPES = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.norm = nn.BatchNorm1d(1, affine=False)
        self.norm.bias = nn.Parameter(torch.zeros(1))
        self.free = nn.Parameter(torch.zeros(1))
    def forward(self, x):
        slope = self.norm.bias + self.free
        return torch.cat([slope, -slope]).expand(len(x), 2)
"""


def slopes(make_module, tmp_path, digits, part, examples_of, **asked):
    """Both parameters after each epoch of one step, on images of class 0."""
    arch = f"{make_module(SLOPES)}:Net"
    zeros = part(digits["train"], digits["train"].label == 0)
    asked = recipe(arch=arch, batch_size=len(zeros), schedule="constant", momentum=0, **{"weight_decay": 0} | asked)
    small = Design(arch, 2, (1, 8, 8), (0.0,), (1.0,))
    made = [safetensors.torch.load(train.weights_of(c)) for c in run(asked, small, examples_of(zeros), tmp_path)]
    return [each["norm.bias"].item() for each in made], [each["free"].item() for each in made]


def test_biases_of_batch_norm_have_a_rate_of_their_own_and_shrink_like_the_rest(
    make_module, tmp_path, digits, part, examples_of
):
    # The gradient of both is 2 σ(−2 s) · −1 at s = bias + free: −1 at the start. Decay takes lr · decay of each.
    places = (make_module, tmp_path, digits, part, examples_of)
    bias, free = slopes(*places, lr=0.01, epochs=2, norm_bias_lr=8, weight_decay=0.5)
    assert (bias[0], free[0]) == pytest.approx((0.08, 0.01), rel=1e-5)
    pull = 2 / (1 + np.exp(2 * (bias[0] + free[0])))
    assert bias[1] == pytest.approx(bias[0] * (1 - 0.01 * 0.5) + 0.08 * pull, rel=1e-5)
    assert free[1] == pytest.approx(free[0] * (1 - 0.01 * 0.5) + 0.01 * pull, rel=1e-5)


def test_a_rate_of_their_own_for_what_is_not_there_is_refused(some, make_module, tmp_path):
    arch = f"{make_module(SMOOTH)}:make"
    with pytest.raises(BadInput, match="has no batch norm whose biases are learned: leave out norm_bias_lr"):
        run(recipe(arch=arch, norm_bias_lr=64), Design(arch, 10, (1, 8, 8), (0.0,), (1.0,)), some, tmp_path)


def test_the_model_is_the_moving_average_of_the_weights(make_module, tmp_path, digits, part, examples_of):
    places = (make_module, tmp_path, digits, part, examples_of)
    steps, averaged = (slopes(*places, lr=0.05, epochs=4, **more)[1] for more in ({}, {"ema": 0.2}))
    by_hand, mean = [], 0.0  # of steps 0, 1, … it keeps (1 + t) / (10 + t) = 0.1, 0.18, 0.25 …, at most 0.2
    for step, value in enumerate(steps):
        keep = min(0.2, (1 + step) / (10 + step))
        by_hand.append(mean := keep * mean + (1 - keep) * value)
    assert averaged == pytest.approx(by_hand, rel=1e-5)


def test_logits_are_scaled_in_training_and_ever_after(some, digits, design):
    scaled = Design(design.arch, 10, design.shape, design.mean, design.std, logit_scale=0.25)
    weights = train.weights_of(run(recipe(epochs=1, logit_scale=0.25), scaled, some)[-1])
    x = to_unit(digits["test"].images()[:20])
    torch.testing.assert_close(load(scaled, weights, Path())(x), 0.25 * load(design, weights, Path())(x))
    assert weights != train.weights_of(run(recipe(epochs=1), design, some)[-1])


# --------------------------------------------------------------------------------- what it sees


@pytest.mark.parametrize("memory_budget", [0, 4096], ids=["streamed", "in memory"])
def test_every_image_is_flipped_in_every_other_epoch(memory_budget, make_module, tmp_path, examples_of):
    # Images of two pixels, number and 0: where the number is on the right, the image was flipped.
    name = make_module("""
        from torch import nn
        SEEN = []
        class Net(nn.Module):
            def __init__(self, classes):
                super().__init__()
                self.head = nn.Linear(2, classes)
            def forward(self, x):
                if self.training:
                    SEEN.append((x[:, 0, 0] * 255).round().int().tolist())
                return self.head(x[:, 0, 0])
    """)
    shards = []
    for number in range(4):
        index = np.arange(40 * number, 40 * number + 40)
        pixels = np.stack([index + 1, 0 * index], 1).astype(np.uint8).reshape(-1, 1, 2, 1)
        shards.append(Shard(f"train-{number:06d}", index, index % 3, index % 3, pixels))
    arch, small = f"{name}:Net", Design(f"{name}:Net", 3, (1, 1, 2), (0.0,), (1.0,))
    asked = {"arch": arch, "batch_size": 16, "augment": "flip", "memory_budget": memory_budget}
    run(recipe(**asked, alternating_flip=True), small, examples_of(*shards), tmp_path)
    seen = importlib.import_module(name).SEEN
    flipped = [{max(row): row[1] > 0 for step in seen[10 * e : 10 * e + 10] for row in step} for e in range(3)]
    assert [len(epoch) for epoch in flipped] == [160] * 3
    assert all(flipped[0][number] != flipped[1][number] for number in flipped[0])
    assert flipped[0] == flipped[2]
    assert 50 < sum(flipped[0].values()) < 110  # a fair coin: within five standard deviations of a half


@pytest.mark.parametrize("memory_budget", [0, 4096], ids=["streamed", "in memory"])
@pytest.mark.parametrize(("count", "per_shard", "batch"), [(250, 21, 32), (96, 96, 32), (100, 7, 64), (33, 4, 32)])
def test_each_example_is_seen_at_most_once_an_epoch_and_all_but_the_last_partial_batch(
    memory_budget, count, per_shard, batch, make_module, tmp_path, examples_of
):
    name = make_module(RECORDS)
    asked = recipe(arch=f"{name}:Net", batch_size=batch, epochs=2, memory_budget=memory_budget)
    # One shape and no bytes to speak of: what streams is decided by a budget of 0 MiB.
    examples = numbered(count, per_shard, examples_of)
    run(asked, Design(asked.arch, 3, (1, 1, 1), (0.0,), (1.0,)), examples, tmp_path)
    seen = importlib.import_module(name).SEEN
    steps = count // batch
    assert len(seen) == 2 * steps
    epochs = [[number for step in seen[e * steps : (e + 1) * steps] for number in step] for e in range(2)]
    for epoch in epochs:
        assert len(epoch) == steps * batch
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(count))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("memory_budget", [0, 4096], ids=["streamed", "in memory"])
def test_each_image_keeps_its_label(memory_budget, make_module, tmp_path, examples_of):
    # The label is the level of the only pixel, modulo 3: a table of one weight row per level can learn it wholly.
    name = make_module("""
        from torch import nn
        class Net(nn.Module):
            def __init__(self, classes):
                super().__init__()
                self.table = nn.Embedding(256, classes)
            def forward(self, x):
                return self.table((x[:, 0, 0, 0] * 255).round().long())
    """)
    asked = recipe(
        arch=f"{name}:Net", batch_size=10, epochs=30, lr=20, memory_budget=memory_budget, momentum=0, weight_decay=0
    )
    # Four shards of 23 are no whole number of batches: two images wait for the next shards.
    examples = numbered(120, 23, examples_of)
    checkpoint = run(asked, Design(asked.arch, 3, (1, 1, 1), (0.0,), (1.0,)), examples, tmp_path)[-1]
    assert train.history_of(checkpoint)[-1]["accuracy"] == 1


def test_streaming_reads_each_shard_once_an_epoch_and_in_another_order_each_time(design, digits, part):
    # Twelve shards of 50; a read is recorded, and no epoch reads a shard twice.
    shards = {f"train-{n:06d}": part(digits["train"], slice(50 * n, 50 * n + 50), f"train-{n:06d}") for n in range(12)}
    read = []

    def fetch(name):
        read.append(name)
        return shards[name]

    examples = train.Examples(list(shards), dict.fromkeys(shards, 50), fetch, 600 * 64, "origin")
    run(recipe(epochs=2, memory_budget=0), design, examples)
    assert sorted(read[:12]) == sorted(read[12:]) == sorted(shards)
    assert read[:12] != read[12:]


# ------------------------------------------------------------------------------------- learning rates


@pytest.mark.parametrize(("warmup", "steps"), [(0.25, 40), (0.5, 21), (0.1, 200)])
def test_one_cycle_is_that_of_torch(warmup, steps):
    # torch ends the rise at step warmup · steps − 1 and the whole at step steps − 1; ours ends them at the same
    # shares of the epochs. Between these ends both are the same two cosines.
    asked = recipe(lr=0.4, warmup=warmup, epochs=10)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.4, total_steps=steps, pct_start=warmup, cycle_momentum=False
    )
    top, last = warmup * steps - 1, steps - 1
    for step in range(steps):
        share = warmup * step / top if step <= top else warmup + (1 - warmup) * (step - top) / (last - top)
        assert train.learning_rate(asked, 10 * share, 10) == pytest.approx(schedule.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        if step < last:
            schedule.step()


def test_one_cycle_starts_low_peaks_after_the_warmup_and_ends_near_nothing():
    asked = recipe(lr=0.5, warmup=0.2, epochs=10)
    ends = [train.learning_rate(asked, epoch, 10) for epoch in (0, 2, 10)]
    assert ends == pytest.approx([0.5 / 25, 0.5, 0.5 / 25e4])


def test_a_one_cycle_without_warmup_starts_at_its_peak():
    assert train.learning_rate(recipe(lr=0.5, warmup=0), 0, 10) == 0.5


def test_steps_divide_by_ten_at_each_drop():
    asked = recipe(lr=1.0, schedule="steps", milestones=[2, 4], epochs=6)
    rates = [train.learning_rate(asked, epoch, 6) for epoch in (0, 1.99, 2, 3.9, 4, 6)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_cosine_falls_from_the_rate_to_zero_and_constant_stays():
    cosine = recipe(lr=0.2, schedule="cosine")
    assert [train.learning_rate(cosine, e, 10) for e in (0, 5, 10)] == pytest.approx([0.2, 0.1, 0])
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([torch.zeros(1)], lr=0.2), 10)
    assert train.learning_rate(cosine, 0, 10) == torchs.get_last_lr()[0]
    assert {train.learning_rate(recipe(lr=0.2, schedule="constant"), e, 10) for e in (0, 3.3, 10)} == {0.2}


def test_a_triangle_rises_to_its_peak_and_falls_to_nothing_along_straight_lines():
    asked = recipe(lr=0.5, schedule="triangular", warmup=0.2, epochs=10)
    rates = [train.learning_rate(asked, epoch, 10) for epoch in (0, 1, 2, 4, 6, 10)]
    assert rates == pytest.approx([0, 0.25, 0.5, 0.375, 0.25, 0])
    assert train.learning_rate(recipe(lr=0.5, schedule="triangular", warmup=0), 0, 10) == 0.5


@given(
    st.sampled_from(["one-cycle", "triangular", "cosine", "constant"]),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1),
    st.integers(1, 99),
)
def test_no_rate_is_above_the_peak_or_below_zero(schedule, warmup, share, epochs):
    asked = recipe(lr=0.3, schedule=schedule, warmup=warmup)
    assert 0 <= train.learning_rate(asked, share * epochs, epochs) <= 0.3 * (1 + 1e-12)


# ------------------------------------------------------------------------------------------ refusals


def test_a_loss_that_is_no_number_ends_the_training(some, design):
    with pytest.raises(BadData, match=r"the loss is (nan|inf) in epoch 1: lower lr \(it is 1e\+30\)"):
        run(recipe(lr=1e30, schedule="constant"), design, some)


def test_fewer_examples_than_a_batch_are_refused(some, design):
    with pytest.raises(BadInput, match="batch_size 512 is more than the 300 examples"):
        run(recipe(batch_size=512), design, some)


def test_a_network_that_does_not_fit_is_refused_before_training(design, make_module, tmp_path):
    arch = f"{make_module(DROPS)}:make"
    train.refuse_misfit(Design(arch, 10, (1, 8, 8), (0.0,), (1.0,)), tmp_path)
    with pytest.raises(BadInput, match="refuses images of 1×9×9"):
        train.refuse_misfit(Design(arch, 10, (1, 9, 9), (0.0,), (1.0,)), tmp_path)


def test_the_number_of_threads_is_left_as_it_was(some, design):
    before = torch.get_num_threads()
    run(recipe(epochs=1, threads=before + 1), design, some)
    assert torch.get_num_threads() == before


# ----------------------------------------------------------------------------------- several processes


@st.composite
def split_up(draw):
    """Shards of any size, and a batch size that they fill at least once."""
    counts = draw(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda counts: sum(counts) >= 2))
    return counts, draw(st.integers(2, sum(counts)))


@given(split_up(), st.integers(1, 9))
def test_every_sample_belongs_to_one_process_and_each_has_enough_for_as_many_steps(split, world):
    counts, batch = split
    world = min(world, batch // 2) or 1
    groups = [train.Group(rank, world) for rank in range(world)]
    owned = [
        [(position, sample) for position, which in train.share(counts, batch, group) for sample in range(10**6)[which]]
        for group in groups
    ]
    assert [pair for pairs in owned for pair in pairs] == [(p, s) for p, n in enumerate(counts) for s in range(n)]
    assert sum(group.of_batch(batch) for group in groups) == batch
    steps = sum(counts) // batch
    assert all(len(pairs) >= steps * group.of_batch(batch) for group, pairs in zip(groups, owned, strict=True))


@given(split_up())
def test_one_process_alone_has_every_shard_whole(split):
    counts, batch = split
    assert train.share(counts, batch, train.ALONE) == [(p, slice(0, n)) for p, n in enumerate(counts) if n]


# One process of a group: rank, world, folder, meeting place. What it does is left in the folder for the test.
MEMBER = """
import json, pickle, sys
from pathlib import Path
import torch
from stages import train
from stages.model import Classifier
from stages.recipes import Train
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
asked, design, shards, size = pickle.loads((folder / "problem").read_bytes())
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/meeting{sys.argv[4]}", rank=rank, world_size=world
)
read, seen = [], []
made = []
plain = Classifier.__init__
def remembered(self, *args, **kwargs):
    plain(self, *args, **kwargs)
    made.append(self)
    self.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
Classifier.__init__ = remembered
def fetch(name):
    read.append(name)
    return shards[name]
examples = train.Examples(list(shards), {n: len(s) for n, s in shards.items()}, fetch, size, "origin")
before = folder / "checkpoint"
checkpoint = before.read_bytes() if rank == 0 and before.exists() else None
said = list(train.fit(asked, design, examples, folder, checkpoint, train.Group(rank, world)))
state = made[0].state_dict()
(folder / f"rank{rank}").write_bytes(pickle.dumps((said, state, seen, read)))
torch.distributed.destroy_process_group()
"""


@pytest.fixture
def together(tmp_path):
    """Train with several processes; returns each one's metrics, weights, batches, and shards read."""
    meetings = iter(range(100))

    def go(asked, design, shards, world=2, size=0, checkpoint=None):
        (tmp_path / "problem").write_bytes(pickle.dumps((asked, design, shards, size)))
        (tmp_path / "checkpoint").unlink(missing_ok=True)
        if checkpoint is not None:
            (tmp_path / "checkpoint").write_bytes(checkpoint)
        meeting = str(next(meetings))
        members = [
            subprocess.Popen([sys.executable, "-c", MEMBER, str(rank), str(world), str(tmp_path), meeting])
            for rank in range(world)
        ]
        try:
            assert [member.wait(timeout=120) for member in members] == [0] * world
        finally:
            for member in members:
                member.kill()
        return [pickle.loads((tmp_path / f"rank{rank}").read_bytes()) for rank in range(world)]

    return go


@pytest.fixture
def shards(digits, part):
    """300 digits in shards of 70: two processes share the third, and the fifth has only twenty."""
    cuts = [(n, slice(70 * n, min(70 * n + 70, 300))) for n in range(5)]
    return {f"train-{n:06d}": part(digits["train"], cut, f"train-{n:06d}") for n, cut in cuts}


def test_two_processes_take_the_steps_of_one_that_sees_their_batches_joined(
    together, shards, design, make_module, tmp_path
):
    arch, batch = f"{make_module(SMOOTH)}:make", 65  # in parts of 32 and 33
    asked = recipe(arch=arch, batch_size=batch, epochs=2, workers=2, label_smoothing=0.1)
    plain = Design(arch, 10, design.shape, design.mean, design.std)
    (said, weights, seen, read), (silent, same, also_seen, also_read) = together(asked, plain, shards)
    assert silent == []
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert len(seen) == len(also_seen) == 2 * (300 // batch)
    assert {len(x) for x in seen} == {batch // 2}
    assert {len(x) for x in also_seen} == {batch - batch // 2}
    assert read == list(shards)[:3]
    assert also_read == list(shards)[2:]
    assert_each_once(2, seen, also_seen)
    # By hand: plain SGD over the joined batches, each image known again by its pixels.
    labels = {image.tobytes(): label for s in shards.values() for image, label in zip(s.images(), s.label, strict=True)}
    torch.manual_seed(torch_seed(asked.seed, "weights"))
    model = Classifier(plain, tmp_path)
    sgd = torch.optim.SGD(model.parameters(), asked.lr, asked.momentum, weight_decay=asked.weight_decay)
    steps, losses = 300 // batch, []
    for step, parts in enumerate(zip(seen, also_seen, strict=True)):
        x = torch.cat(parts)
        y = torch.tensor([labels[(one * 255).round().byte().permute(1, 2, 0).numpy().tobytes()] for one in x])
        for parameters in sgd.param_groups:
            parameters["lr"] = train.learning_rate(asked, step / steps, asked.epochs)
        loss = torch.nn.functional.cross_entropy(model(x), y, label_smoothing=0.1)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        losses.append(loss.item())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)
    history = said[-1][1]
    assert [e["loss"] for e in history] == pytest.approx([np.mean(losses[:steps]), np.mean(losses[steps:])], rel=1e-5)
    assert [e["workers"] for e in history] == [2, 2]


def assert_each_once(epochs, *parts):
    """In no epoch does any process see an image that one of them has seen."""
    steps = len(parts[0]) // epochs
    for epoch in range(epochs):
        batches = [x for part in parts for x in part[epoch * steps : (epoch + 1) * steps]]
        images = [one.numpy().tobytes() for x in batches for one in x]
        assert len(images) == len(set(images)) > 0


def test_two_processes_that_stream_see_each_example_at_most_once_an_epoch(together, shards, design):
    asked = recipe(arch="small_cnn", epochs=2, batch_size=32, workers=2, memory_budget=1)
    (_, _, seen, read), (_, _, also_seen, also_read) = together(asked, design, shards, size=2**40)
    assert len(seen) == len(also_seen) == 2 * (300 // 32)
    assert {len(x) for x in (*seen, *also_seen)} == {16}
    assert_each_once(2, seen, also_seen)
    # Each reads what it needs, and another part in each epoch.
    assert len(read) < 2 * len(shards) > len(also_read)


@pytest.mark.slow
def test_two_processes_train_adversarially_as_one_does(together, shards, design, make_module, tmp_path, examples_of):
    # A batch of all images, so that both together see in each step what one sees.
    arch = f"{make_module(SMOOTH)}:make"
    plain = Design(arch, 10, design.shape, design.mean, design.std)
    asked = recipe(arch=arch, batch_size=300, epochs=3, adversarial=Adversary(eps=0.5, steps=3))
    (said, weights, *_), (_, same, *_) = together(asked.model_copy(update={"workers": 2}), plain, shards)
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    alone, standard = (
        safetensors.torch.load(train.weights_of(run(one, plain, examples_of(*shards.values()), tmp_path)[-1]))
        for one in (asked, asked.model_copy(update={"adversarial": None}))
    )
    together_made = safetensors.torch.load(train.weights_of(said[-1][0]))
    for name, value in alone.items():
        torch.testing.assert_close(together_made[name], value, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(alone["1.weight"], standard["1.weight"], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_checkpoint_is_gone_on_from_by_any_number_of_processes(together, shards, design, examples_of):
    some = examples_of(*shards.values())
    asked = recipe(epochs=3, workers=2)
    two = together(asked, design, shards)[0][0]
    alone = train.fit(asked, design, some, Path(), two[0][0])
    assert [history[-1]["workers"] for _, history in alone] == [1, 1]
    one = next(train.fit(asked, design, some, Path()))[0]
    said = together(asked, design, shards, checkpoint=one)[0][0]
    assert [epoch["workers"] for epoch in said[-1][1]] == [1, 2, 2]
    assert said[-1][1][0] == train.history_of(one)[0]


# Filters of 2 × 2 that can be whitened on digits, and a batch norm.
PATCHES = """
from torch import nn
def make(classes):
    return nn.Sequential(nn.Conv2d(1, 8, 2), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Linear(392, classes))
"""


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, AIR | {"epochs": 3, "batch_size": 64}], ids=["plain", "all keys"])
def test_two_processes_that_go_on_end_with_the_bytes_of_two_that_were_not_interrupted(
    more, together, shards, design, make_module
):
    arch = f"{make_module(PATCHES)}:make"
    patches = Design(arch, 10, design.shape, design.mean, design.std)
    asked = recipe(**{"epochs": 3, "augment": "crop-flip"} | more | {"arch": arch, "workers": 2})
    (whole, weights, *_), (_, same, *_) = together(asked, patches, shards)
    assert all(torch.equal(weights[name], same[name]) for name in weights if "running" not in name)
    resumed = together(asked, patches, shards, checkpoint=whole[0][0])[0][0]
    assert train.weights_of(resumed[-1][0]) == train.weights_of(whole[-1][0])


def test_a_batch_smaller_than_two_images_for_each_worker_is_refused():
    with pytest.raises(ValueError, match="batch_size 7 is of all 4 workers together: it must be at least 8"):
        recipe(batch_size=7, workers=4)
    recipe(batch_size=8, workers=4)


@pytest.mark.parametrize("augment", ["crop-flip", "resized-crop"])
def test_where_a_split_is_held_changes_not_a_bit(augment, some, design, monkeypatch):
    asked = recipe(epochs=2, augment=augment)
    held = run(asked, design, some)[-1]
    monkeypatch.setattr(train, "room", lambda where: 0)  # a device that has no room for it
    assert train.weights_of(run(asked, design, some)[-1]) == train.weights_of(held)


@pytest.mark.parametrize("how", [True, "reduce-overhead"])
def test_a_training_is_compiled_if_asked_and_its_weights_keep_their_names(how, some, design, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **keys: asked.append(keys))
    plain, compiled = (run(recipe(epochs=1, compile=how), design, some)[-1] for how in (False, how))
    assert asked == [{"dynamic": False, "mode": None if how is True else how}]
    assert train.weights_of(compiled) == train.weights_of(plain)  # what is run here is the network as it is


@pytest.mark.slow  # the compiler
def test_a_compiled_training_learns_what_a_plain_one_does(some, design):
    plain, compiled = (train.history_of(run(recipe(epochs=2, compile=how), design, some)[-1]) for how in (False, True))
    assert [row["loss"] for row in compiled] == pytest.approx([row["loss"] for row in plain], rel=1e-2)


@pytest.mark.parametrize(
    ("kind", "cores", "gpus", "wanted"),
    [("cpu", 64, 0, 0), ("cuda", 2, 1, 0), ("cuda", 4, 1, 3), ("cuda", 64, 1, train.DECODERS), ("cuda", 64, 8, 7)],
)
def test_a_gpu_has_as_many_processes_decode_as_its_share_of_the_cores(kind, cores, gpus, wanted, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert train.spare(torch.device(kind)) == wanted
