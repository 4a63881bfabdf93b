"""A search's step captured and replayed: the same bytes as step by step, without synchronising with the host."""

import contextlib
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stages import adversarial_eval, invert, pgd, targeted_pgd, usefulness
from stages.adversarial_eval import in_ball
from stages.attack import Attacker
from stages.invert import Inverter
from stages.pgd import UNCAPTURED, Descent, captured, graphs
from stages.recipes import Attack, Compute, EvalAttack, Invert, Relabel, Usefulness
from stages.targeted_pgd import TargetedPGD, unnoted
from stages.usefulness import measure

CLASSES = [str(k) for k in range(10)]
BALL = {"eps": 0.9, "steps": 7, "batch_size": 16}


@pytest.fixture
def replayed(monkeypatch):
    """In place of CUDA graphs: capturing runs nothing, and a replay runs the same code on the same tensors.

    Yields the numbers of captures and of replays.
    """
    counts = {"captured": 0, "repeated": 0}

    def capture(step):
        counts["captured"] += 1

        def again():
            counts["repeated"] += 1
            step()

        return again

    for module in (targeted_pgd, invert, adversarial_eval, usefulness):
        monkeypatch.setattr(module, "graphs", lambda recipe, where: capture)
    return counts


def plain_attack(model, shard, **keys):
    return Attacker(Attack(images="", model="", **BALL | keys), Relabel(rule="next"), CLASSES, model)


def attack(model, shard, **keys):
    attacker = plain_attack(model, shard, **keys)
    made = [attacker(shard), attacker(shard)]  # the second by what was captured for the first
    return [value for one in made for value in (one.pixels, *one.attack.values())]


def inversion(model, shard):
    made = Inverter(Invert(images="", model="", steps=7, batch_size=16, step_size=0.2), model)(shard)
    return [made.pixels, *made.attack.values()]


def threats(model, shard):
    found = []
    for rule in (None, Relabel(rule="next")):
        asked = EvalAttack(restarts=2, target_rule=rule, **BALL)
        outcome = in_ball(asked, CLASSES, {"m": model}, {}, shard)["m"]
        found += [outcome.right, outcome.average, outcome.aimed, outcome.success]
    return found


def use(model, shard):
    asked = Usefulness(models=["m"], on="", normalise="train", split="train", eps=0.5, steps=4, batch_size=64)
    (sums,) = measure(asked, CLASSES, {"m": model}, shard, 2).values()
    return [np.array(sorted(sums[key].items()), dtype=object) for key in ("fall", "rise")]


@pytest.mark.parametrize(
    "work",
    [
        attack,
        lambda m, s: attack(m, s, stop_at_margin=0.5),
        lambda m, s: attack(m, s, norm="linf", views=4),
        inversion,
        threats,
        use,
    ],
    ids=["attack", "stop_at_margin", "linf over views", "inversion", "threats", "usefulness"],
)
def test_what_is_captured_once_and_repeated_gives_the_bytes_of_step_by_step(
    work, trained, digits, part, monkeypatch, replayed
):
    some = part(digits["train"], slice(40))
    mine = work(trained, some)
    assert 0 < replayed["captured"] < replayed["repeated"]
    before = dict(replayed)
    for module in (targeted_pgd, invert, adversarial_eval, usefulness):
        monkeypatch.setattr(module, "graphs", graphs)
    trained.views.clear()
    plain = work(trained, some)
    assert replayed == before  # on a processor nothing is captured
    for one, other in zip(mine, plain, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_whole_attack_is_captured_once(trained, digits, part, replayed):
    some = part(digits["train"], slice(40))  # three batches, the last of them not full
    attacker = plain_attack(trained, some)
    attacker(some)
    attacker(some)
    assert replayed == {"captured": 1, "repeated": 6 * BALL["steps"] - UNCAPTURED}


def test_another_shape_is_captured_anew(replayed):
    descent = Descent(
        lambda x: x.flatten(1).sum(1), norm="l2", eps=1, step_size=0.1, capture=targeted_pgd.graphs(None, None)
    )
    for shape in ((2, 1, 4, 4), (2, 1, 4, 4), (3, 1, 4, 4)):
        x = torch.rand(shape)
        once = pgd.pgd(lambda x: x.flatten(1).sum(1), x, norm="l2", eps=1, step_size=0.1, steps=5)
        assert torch.equal(descent(x, steps=5), once)
    assert replayed["captured"] == 2


class Waits(TorchDispatchMode):
    """Counts operations that make the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select"):
            self.found.append(name)
        return function(*args, **kwargs or {})


def test_the_counter_itself_sees_who_waits():
    with Waits() as waits:
        bool(torch.ones(1) > 0)
        torch.ones(2).nonzero()
        torch.ones(2).to(torch.bfloat16)
    assert waits.found == ["_local_scalar_dense", "nonzero"]


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_nobody_waits_inside_the_steps(norm, precision, trained, digits, part, monkeypatch):
    some, waits = part(digits["train"], slice(16)), Waits()
    step = Descent._step

    def watched(*args):
        with waits:
            return step(*args)

    monkeypatch.setattr(Descent, "_step", watched)
    attack(trained, some, norm=norm, precision=precision)
    inversion(trained, some)
    threats(trained, some)
    assert waits.found == []


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_step_copies_nothing_to_or_from_the_host(norm, trained, monkeypatch):
    # Tensors of the device "meta" have no values: whatever asks for one, or copies them elsewhere, raises.
    monkeypatch.setattr(torch, "autocast", lambda *args, **keys: contextlib.nullcontext())  # knows no such device
    model = trained.to("meta")
    with pytest.raises(NotImplementedError):
        torch.ones(1, device="meta").cpu()
    x, target = torch.zeros(4, 1, 8, 8, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")
    search = TargetedPGD(Attack(images="", model="", **BALL | {"norm": norm}), model, [model])
    assert search.descent(x, target, target, *unnoted(target), steps=2).shape == x.shape
    inverter = Inverter(Invert(images="", model="", fold=False), model)
    assert inverter.descent(x, inverter.features(x), steps=2).shape == x.shape
    asked = EvalAttack(**BALL | {"norm": norm, "steps": 2})
    for aim in (None, target):
        assert adversarial_eval._pgd(asked, model, x, target, aim, x).shape == x.shape


def test_a_step_that_cannot_be_captured_is_run_as_it_is_and_says_so(monkeypatch):
    @contextlib.contextmanager
    def graph(*args, **keys):
        yield
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(pgd, "_keeper", mock.Mock())
    ran = []
    with pytest.warns(UserWarning, match=r"kernel by kernel: operation not permitted when stream is capturing$"):
        repeat = captured(lambda: ran.append(1))
    repeat()
    assert ran == [1, 1]


def test_graphs_are_for_gpus_and_not_where_the_compiler_makes_its_own():
    gpu, processor = torch.device("cuda"), torch.device("cpu")
    assert graphs(Compute(), processor) is None
    assert graphs(Compute(), gpu) is captured
    assert graphs(Compute(compile=True), gpu) is captured
    assert graphs(Compute(compile="reduce-overhead"), gpu) is None


def test_the_search_is_made_once_for_all_shards(trained, digits, part):
    attacker = plain_attack(trained, None)
    assert isinstance(attacker.targeted_pgd, TargetedPGD)
    assert attacker.targeted_pgd is attacker.targeted_pgd
