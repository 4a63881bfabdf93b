"""Image·steps per second of our attack loop, beside torchattacks, foolbox, robustness and a naive loop.

An image·step is a forward and a backward pass of one image through the attacked network, and a PGD step. All loops
attack the same images toward the same targets with the same number of steps, in turns; each round has other images. The
plain network in float32 measures every result, so that a fast but wrong configuration shows. Each of our configurations
is also compared with its ceiling: bare forward and backward passes of the same optimised network. Our loop includes
rounding to 8 bits inside the ball; the others do not round. They run in a process of their own with the default
allocator; our process keeps freed memory, which would help them too.

    python -m benchmarks.attack --arch cifar_resnet18 --side 32 --data FOLDER     # FOLDER/cifar-10-batches-py
    python -m benchmarks.attack --arch resnet50 --side 224 --data FOLDER          # photographs, at any depth of FOLDER
    python -m benchmarks.attack --brought configs/imagenette.yaml:lite0 --side 224 --data FOLDER
    python -m benchmarks.attack --arch resnet50 --side 224 --choice bfloat16 --rounds 1 --no-peers       # only a rate

With CIFAR-10 the network is first trained briefly; a network from an experiment file has its own weights; otherwise
weights are random. They affect the attack success rate, not the speed.
"""

import copy
import importlib.util
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from unittest import mock

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.side_by_side import cifar10, images, in_turns, machine, over, seconds_of, show, spread
from pipeline.experiment import spec
from stages import model as models
from stages import train
from stages.device import computing, device, threads
from stages.images import encode_png
from stages.inference import optimized
from stages.model import Classifier, Design
from stages.pgd import UNCAPTURED
from stages.pretrained.checkpoint import import_pretrained
from stages.recipes import Attack, Perturbation, Train
from stages.targeted_pgd import TargetedPGD, margins, targeted
from stages.tensors import to_pixels, to_unit

Loop = Callable[[np.ndarray, Tensor, Perturbation], Tensor]
"""(pixels, uint8, N × H × W × C; targets, N; ball and steps) → images in [0, 1], N × C × H × W."""

IMAGENET, IMAGENET_STEPS, IMAGENET_WORKERS = 1_281_167, 100, 8

INSTALL = {
    "torchattacks": "pip install --no-deps torchattacks==3.5.1",
    "foolbox": "pip install foolbox",
    "robustness": "pip install --no-deps robustness==1.2.1 cox==0.1.post3 dill",  # its requirements pin old libraries
}

# ---------------------------------------------------------------------------------------------------- ours


def ours(model: Classifier, ball: Perturbation) -> Loop:
    """The loop that makes datasets, with an optimised network."""
    search = TargetedPGD(Attack(images="", model="", **ball.model_dump()), model)

    def loop(pixels: np.ndarray, target: Tensor, ball: Perturbation) -> Tensor:
        search.recipe = search.recipe.model_copy(update={"steps": ball.steps})
        wanted = target.cpu().numpy()
        return to_unit(search(pixels, wanted, wanted)[0], target.device)

    return loop


def bare(model: Classifier) -> Loop:
    """The ceiling: repeated forward and backward passes of the same images."""

    def loop(pixels: np.ndarray, target: Tensor, ball: Perturbation) -> Tensor:
        x = to_unit(pixels, target.device).requires_grad_(True)
        for _ in range(ball.steps):
            torch.autograd.grad(targeted(model, target)(x).sum(), x)
        return x.detach()

    return loop


SWITCHES = ("fold", "compile")
"""Switches of a recipe besides the precision."""


def recipe_of(choice: str, ball: Perturbation) -> Perturbation:
    """The recipe for a choice: a precision and switches, joined by ``+``."""
    precision, *on = choice.split("+")
    if unknown := set(on) - set(SWITCHES):
        raise click.BadParameter(
            f"{choice!r} turns on {', '.join(unknown)}, expected {' or '.join(SWITCHES) or 'nothing'}"
        )
    return Perturbation(**ball.model_dump() | {"precision": precision} | {name: name in on for name in SWITCHES})


# -------------------------------------------------------------------------------------------------- theirs


def nchw(pixels_NHWC: np.ndarray, target_N: Tensor) -> Tensor:
    """Images in [0, 1] on the targets' device, in PyTorch's default layout."""
    return to_unit(pixels_NHWC, target_N.device).contiguous()


class Plain(nn.Module):
    """The unoptimised network: normalisation, then the layers, in N × C × H × W layout."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.mean, self.std, self.outputs = model.mean, model.std, model.outputs
        self.network = copy.deepcopy(model.network).to(memory_format=torch.contiguous_format)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        logits: Tensor = self.network((x_NCHW - self.mean) / self.std)
        return logits if self.outputs is None else logits[:, self.outputs]


def naive_pgd(model: nn.Module, clean: Tensor, target: Tensor, ball: Perturbation, steps: int) -> Tensor:
    """A naive implementation of Madry et al. 2018."""
    x = clean.clone()
    for _ in range(steps):
        x.requires_grad_(True)
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x), target, reduction="sum"), x)
        grad = grad / grad.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        delta = x.detach() - ball.step * grad - clean
        delta = delta * (ball.eps / delta.flatten(1).norm(dim=1).clamp_min(1e-12)).clamp_max(1).view(-1, 1, 1, 1)
        x = (clean + delta).clamp(0, 1)
    return x


def naive(model: nn.Module) -> Loop:
    """That loop, on pixels."""
    return lambda pixels, target, ball: naive_pgd(model, nchw(pixels, target), target, ball, ball.steps)


def flat(model: Classifier) -> nn.Module:
    """The same network for libraries that call `view` on its gradient: flattening undoes the channels-last layout."""
    return nn.Sequential(nn.Flatten(), nn.Unflatten(1, model.design.shape), model).eval()


def torchattackss(model: Classifier) -> Loop:
    import torchattacks

    viewed = flat(model)

    def loop(pixels: np.ndarray, target: Tensor, ball: Perturbation) -> Tensor:
        attack = torchattacks.PGDL2(viewed, eps=ball.eps, alpha=ball.step, steps=ball.steps, random_start=False)
        attack.set_mode_targeted_by_label(quiet=True)
        found: Tensor = attack(nchw(pixels, target), target)
        return found

    return loop


def foolboxs(model: Classifier) -> Loop:
    with warnings.catch_warnings():
        # foolbox imports scipy.ndimage.filters, whose deprecation is foolbox's affair.
        warnings.filterwarnings("ignore", "Please import `gaussian_filter`", DeprecationWarning)
        import foolbox

    def loop(pixels: np.ndarray, target: Tensor, ball: Perturbation) -> Tensor:
        attack = foolbox.attacks.L2ProjectedGradientDescentAttack(
            abs_stepsize=ball.step, steps=ball.steps, random_start=False
        )
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=target.device)
        toward = foolbox.criteria.TargetedMisclassification(target)
        found: Tensor = attack(wrapped, nchw(pixels, target), toward, epsilons=ball.eps)[0]
        return found

    return loop


def robustnesss(model: Classifier) -> Loop:
    from robustness.attacker import Attacker

    class Whole:
        """The attributes of a dataset that robustness reads; the network normalises by itself."""

        mean, std = torch.zeros(3), torch.ones(3)

    attacker = Attacker(flat(model), Whole)
    # robustness sends images to a GPU even if there is none.
    elsewhere = {} if torch.cuda.is_available() else {"cuda": lambda tensor: tensor}

    def loop(pixels: np.ndarray, target: Tensor, ball: Perturbation) -> Tensor:
        how = {"constraint": "2", "eps": ball.eps, "step_size": ball.step, "iterations": ball.steps}
        with mock.patch.multiple(Tensor, **elsewhere):
            found: Tensor = attacker(
                nchw(pixels, target), target, **how, targeted=True, use_best=False, should_normalize=False
            )
        return found

    return loop


PEERS = {"torchattacks": torchattackss, "foolbox": foolboxs, "robustness": robustnesss}


def others(model: Classifier) -> Iterator[tuple[str, Loop]]:
    """The other libraries' loops, in float32; missing libraries are reported and left out."""
    yield "naive loop, same network", naive(model)
    yield "naive loop, plain network", naive(Plain(model))
    for name, peer in PEERS.items():
        if importlib.util.find_spec(name) is None:
            click.echo(f"{name} is not installed and left out: {INSTALL[name]}")
        else:
            yield name, peer(model)


class Apart:
    """The other libraries' loops, in a separate process."""

    def __init__(self, model: Classifier, cores: int) -> None:
        weights, here = models.save(model.network), Path.cwd()
        self.pool = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), _begin, (model.design, weights, here, cores)
        )
        self.names: list[str] = self.pool.submit(_names).result()

    def loop(self, name: str, *given: object) -> tuple[float, Tensor]:
        """Seconds, and the resulting images."""
        seconds, moved = self.pool.submit(_run, name, *given).result()
        return seconds, torch.from_numpy(moved).to(device())


_loops: dict[str, Loop] = {}


def _begin(design: Design, weights: bytes, here: Path, cores: int) -> None:
    torch.set_num_threads(cores)
    _loops.update(others(models.load(design, weights, here)))


def _names() -> list[str]:
    return list(_loops)


def _run(name: str, pixels: np.ndarray, target: np.ndarray, ball: Perturbation) -> tuple[float, np.ndarray]:
    return _timed(_loops[name], pixels, torch.from_numpy(target).to(device()), ball)


def _timed(loop: Loop, pixels: np.ndarray, target: Tensor, ball: Perturbation) -> tuple[float, np.ndarray]:
    moved: list[Tensor] = []
    seconds = seconds_of(lambda: moved.append(loop(pixels, target, ball)))
    return seconds, moved[0].detach().cpu().numpy()


# ------------------------------------------------------------------------------------- networks and measures


def network(arch: str, brought: str | None, side: int, classes: int, data: Path | None, taught: Train) -> Classifier:
    """The attacked network: from an experiment file, trained briefly on CIFAR-10, or with random weights."""
    here = Path.cwd()
    if brought is not None:
        file, _, name = brought.rpartition(":")
        found = spec.read(Path(file)).models[name].pretrained
        if found is None:
            raise click.UsageError(f"{file} trains {name}, expected a pretrained one")
        return models.load(*import_pretrained(found, data or here, here), here)
    torch.manual_seed(0)
    if data is None or side != 32:
        design = Design(arch, classes, (3, side, side), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        return models.load(design, models.save(Classifier(design, here).network), here)
    shard = cifar10(data, taught.eval_images)
    pixels = shard.images()
    mean, std = (tuple((each / 255).tolist()) for each in (pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))))
    examples = train.Examples([shard.name], {shard.name: len(shard)}, lambda _: shard, pixels.nbytes, "")
    design = Design(arch, 10, (3, side, side), mean, std)
    checkpoint = [checkpoint for checkpoint, _ in train.fit(taught, design, examples, here)][-1]
    return models.load(design, train.weights_of(checkpoint), here)


@torch.no_grad()
def judged(model: Classifier, clean: Tensor, moved: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Measurements of attacked images by the plain network, N each; distances in pixels in [0, 1]."""
    return {"margin": margins(model(moved), target), "l2": (moved - clean).flatten(1).norm(dim=1)}


def operations(model: Classifier, pixels: np.ndarray, target: Tensor) -> float:
    """Floating-point operations of one image·step: two for each multiplication and addition."""
    with FlopCounterMode(display=False) as counter:
        targeted(model, target)(to_unit(pixels, target.device).requires_grad_(True)).sum().backward()
    return counter.get_total_flops() / len(pixels)


def peak(precision: str) -> float:
    """Floating-point operations per second of a large matrix product, the best of five."""
    size = 8192 if torch.cuda.is_available() else 2048
    a = torch.ones(size, size, dtype=getattr(torch, precision), device=device())
    return 2 * size**3 / min(seconds_of(lambda: a @ a) for _ in range(6))


@click.command()
@click.option("--arch", default="cifar_resnet18", show_default=True, help="As in an experiment file.")
@click.option("--brought", metavar="FILE:NAME", help="Instead: a model that an experiment file loads.")
@click.option("--side", default=32, show_default=True, help="Height and width of an image, in pixels.")
@click.option("--classes", default=1000, show_default=True, help="Of a network with random weights.")
@click.option(
    "--data", type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Holds cifar-10-batches-py (32 pixels) or photographs; else noise is attacked.",
)  # fmt: skip
@click.option("--train", "taught", default=2000, show_default=True, help="Images of CIFAR-10 to train on.")
@click.option("--epochs", default=4, show_default=True, help="Of that training.")
@click.option("--batch", default=64, show_default=True, help="Images attacked together, in every round others.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--steps", default=10, show_default=True)
@click.option("--eps", type=float, help="Radius of the L2 ball in [0, 1] units.  [default: 0.5 at 32 px, else 3]")
@click.option(
    "--choice", "choices", multiple=True, default=("float32", "float32+fold", "bfloat16+fold", "bfloat16+fold+compile"),
    show_default=True,
    help=f"Of ours: a precision and what is turned on, joined by +. Any number of them. To turn on: {SWITCHES}",
)  # fmt: skip
@click.option("--peers/--no-peers", default=True, show_default=True, help="Whether others are measured beside.")
@click.option("--cores", default=1, show_default=True, help="Threads; a worker of a run has one.")
def main(
    arch: str,
    brought: str | None,
    side: int,
    classes: int,
    data: Path | None,
    taught: int,
    epochs: int,
    batch: int,
    rounds: int,
    steps: int,
    eps: float | None,
    choices: tuple[str, ...],
    peers: bool,
    cores: int,
) -> None:
    """Measure the attack alone: images in memory, one process at work."""
    ball = Perturbation(eps=eps or (0.5 if side == 32 else 3.0), steps=steps, batch_size=batch)
    recipes = {choice: recipe_of(choice, ball) for choice in choices}
    lesson = Train(
        on="cifar10", arch=arch, epochs=epochs, eval_images=taught, precision="bfloat16", threads=os.cpu_count()
    )
    model = network(arch, brought, side, classes, data, lesson)
    pixels = images(data, rounds * batch, side)
    target = torch.arange(batch, device=device()) % model.design.classes
    ready = {choice: optimized(model, recipe) for choice, recipe in recipes.items()}
    loops = {choice: ours(each, recipes[choice]) for choice, each in ready.items()}
    loops |= {f"{choice}: bare": bare(each) for choice, each in ready.items()}
    apart = Apart(model, cores) if peers else None
    rest = apart.names if apart else []
    names = [*loops, *rest]
    moved: dict[str, list[Tensor]] = {name: [] for name in names}

    def run(name: str, some: np.ndarray, **update: int) -> tuple[float, Tensor]:
        asked = recipes.get(name.removesuffix(": bare"), ball).model_copy(update=update)
        if apart and name in rest:
            return apart.loop(name, some, target.cpu().numpy(), asked)
        with computing(asked), threads(cores):
            seconds, found = _timed(loops[name], some, target, asked)
        return seconds, torch.from_numpy(found).to(device())

    def turn(name: str, number: int) -> float:
        seconds, found = run(name, pixels[number * batch : (number + 1) * batch])
        moved[name].append(found)
        return seconds

    with threads(cores):
        first = {name: run(name, pixels[:batch], steps=1)[0] for name in names}
        for name in loops:  # on a GPU a step is captured after some others
            run(name, pixels[:batch], steps=UNCAPTURED + 1)
        seconds = in_turns({name: lambda number, name=name: turn(name, number) for name in names}, rounds)
        work, rates = (
            operations(model, pixels[:batch], target),
            {r.precision: peak(r.precision) for r in recipes.values()},
        )
    clean = to_unit(pixels, device())
    said = {name: judged(model, clean, torch.cat(each), target.repeat(rounds)) for name, each in moved.items()}
    rate = {name: [batch * steps / each for each in taken] for name, taken in seconds.items()}

    click.echo(f"{model.design.arch}, {side} × {side} px, {work / 1e9:.2f} GFLOP per image·step")
    click.echo(
        f"L2 eps {ball.eps:g}, {steps} steps of {ball.step:g}, {rounds} rounds of {batch} images, {cores} threads"
    )
    click.echo(machine("torch", *(name for name in rest if name in PEERS)))
    show("Loops", *compared(rate, said, first, list(recipes), rest))
    show("Ours under their ceilings", *under_ceiling(rate, recipes, work, rates))
    best = max(recipes, key=lambda choice: median(rate[choice]))
    if side >= 224:
        hours = IMAGENET * IMAGENET_STEPS / (IMAGENET_WORKERS * median(rate[best])) / 3600
        click.echo(
            f"\nImageNet-1k on {IMAGENET_WORKERS} such workers, {best}: {IMAGENET:,} images × {IMAGENET_STEPS} steps ÷ "
            f"({IMAGENET_WORKERS} × {median(rate[best]):.1f} image·steps/s) ÷ 3600 = {hours:,.1f} hours"
        )
    if data is not None:
        for what, some in (("clean", pixels), (f"attacked, {best}", to_pixels(torch.cat(moved[best])))):
            click.echo(f"PNG, {what}: {np.mean([len(encode_png(one)) for one in some]):,.0f} bytes per image")


def compared(
    rate: Mapping[str, list[float]],
    said: Mapping[str, Mapping[str, Tensor]],
    first: Mapping[str, float],
    mine: list[str],
    rest: list[str],
) -> tuple[list[str], list[list[str]]]:
    """Rate and success of every loop, and ratios to the fastest other library and to our plain loop."""
    fastest = max(rest, key=lambda name: median(rate[name]), default=None)
    reached = {name: float((each["margin"] > 0).double().mean()) * 100 for name, each in said.items()}
    lines = [
        [
            name,
            spread(rate[name]),
            f"{over(rate[name], rate[fastest]):.2f}" if fastest else "–",
            f"{first[name]:.2f}",
            f"{reached[name]:.1f}",
            f"{reached[name] - reached['float32']:+.1f}" if "float32" in reached else "–",
            f"{said[name]['margin'].mean():.3f}",
            f"{said[name]['l2'].mean():.4f}",
        ]
        for name in [*mine, *rest]
    ]
    head = ["", "image·steps/s", f"over {fastest or 'others'}", "first step, s", "attack success %", "beside float32"]
    return [*head, "mean margin", "mean L2"], lines


def under_ceiling(
    rate: Mapping[str, list[float]], recipes: Mapping[str, Perturbation], work: float, rates: Mapping[str, float]
) -> tuple[list[str], list[list[str]]]:
    """Our loops beside bare forward and backward passes of the same network, and beside a matrix product."""
    lines = []
    for choice, recipe in recipes.items():
        ceiling, done = rate[f"{choice}: bare"], median(rate[choice]) * work
        lines.append([
            choice, spread(rate[choice]), spread(ceiling), f"{over(rate[choice], ceiling):.3f}", f"{done / 1e12:.3f}",
            f"{done / rates[recipe.precision]:.3f}",
        ])  # fmt: skip
    return ["", "image·steps/s", "bare", "share of bare", "TFLOP/s", "share of a matrix product's"], lines


if __name__ == "__main__":
    main()
