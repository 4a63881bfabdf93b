"""The attack loop: image·steps per second by precision and batch size, with and without CUDA graphs and compiler."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.attack import IMAGENET, IMAGENET_STEPS, IMAGENET_WORKERS, Plain, naive_pgd, operations
from benchmarks.gpu.sheet import Sheet, noise, seconds_of, untrained
from stages import pgd
from stages.device import computing, device
from stages.inference import optimized
from stages.pgd import UNCAPTURED
from stages.recipes import Attack
from stages.targeted_pgd import TargetedPGD, targeted
from stages.tensors import to_unit

STEPS = 100
"""Steps of a dataset's attack."""

AS_FAST = 0.97
"""A smaller batch is preferred if it reaches this share of the best rate: everything after it takes less time."""

COMPILER = 45
"""Seconds reserved for the compiler: with less time left it is skipped."""


@dataclass(frozen=True)
class Case:
    """A network, its image size, a radius, batch sizes (likeliest first), and its replacement in a rehearsal."""

    arch: str
    side: int
    classes: int
    eps: float
    batches: tuple[int, ...]
    tiny: tuple[str, int]


CASES = (
    Case("resnet50", 224, 1000, 3.0, (256, 128, 512), ("mobilenet_v3_small", 32)),
    Case("cifar_resnet18", 32, 10, 0.5, (1000, 500, 2000, 250), ("small_cnn", 16)),
)


def recipe_of(eps: float, batch: int, **keys: object) -> Attack:
    return Attack(images="", model="", eps=eps, batch_size=batch, steps=STEPS, **keys)  # type: ignore[arg-type]


def measure(sheet: Sheet) -> None:
    """Measure the most important case first; each gets half of the remaining time, the last all of it."""
    peak = sheet.noted("device", "bfloat16")
    for at, case in enumerate(CASES):
        Loops(sheet, case, sheet.left / (len(CASES) - at), peak).measure()


class Loops:
    """The loops of one network, in a table."""

    def __init__(self, sheet: Sheet, case: Case, seconds: float, peak: float | None) -> None:
        self.sheet, self.case, self.peak = sheet, case, peak
        self.end = time.monotonic() + seconds
        self.arch, self.side = case.tiny if sheet.tiny else (case.arch, case.side)
        self.batches = (8, 4) if sheet.tiny else case.batches
        self.steps = 3 if sheet.tiny else (10 if case.side > 64 else 25)
        self.model = untrained(self.arch, self.side, case.classes)
        self.pixels = noise(max(self.batches), self.side)
        self.target = np.arange(len(self.pixels)) % case.classes
        few = min(8, len(self.pixels))
        self.work = operations(self.model, self.pixels[:few], torch.from_numpy(self.target[:few]).to(device()))
        self.add = sheet.table(
            f"{self.arch}, {self.side} px, {self.work / 1e9:.2f} GFLOP per image·step, L2 ε {case.eps:g}",
            "loop", "batch", "image·steps/s", "of a step alone", "TFLOP/s", "of the peak", "of bare", "first, s",
        )  # fmt: skip
        self.rates: dict[tuple[str, int], float] = {}
        self.mine: dict[tuple[str, int], float] = {}

    def measure(self) -> None:
        """Try batch sizes for the likeliest choice, then the other choices at the best size."""
        for batch in self.batches:
            self.ours("bfloat16, graph", batch, precision="bfloat16")
        best = self.best()
        self.bare("bfloat16, graph", best, precision="bfloat16")
        if self.may_compile:
            self.ours("bfloat16, compiled, graph", best, precision="bfloat16", compile=True)
        for precision in ("float16", "tf32", "float32"):
            self.ours(f"{precision}, graph", best, precision=precision)
        self.ours("bfloat16, kernel by kernel", best, graph=False, precision="bfloat16")
        self.ours("float32, kernel by kernel", best, graph=False, precision="float32")
        self.others(best)
        if self.may_compile:
            self.ours("bfloat16, reduce-overhead", best, precision="bfloat16", compile="reduce-overhead")
        if not self.mine:
            return
        (name, batch), rate = max(self.mine.items(), key=lambda item: item[1])
        if self.side >= 224:
            hours = IMAGENET * IMAGENET_STEPS / (IMAGENET_WORKERS * rate) / 3600
            self.sheet.say(
                f"ImageNet-1k on {IMAGENET_WORKERS} such devices, {name}, batch {batch}: {IMAGENET:,} images × "
                f"{IMAGENET_STEPS} steps ÷ ({IMAGENET_WORKERS} × {rate:,.1f} image·steps/s) ÷ 3600 = {hours:,.2f} hours"
            )
        else:
            self.sheet.say(f"CIFAR-10 × {STEPS} steps, {name}, batch {batch}: {50_000 * STEPS / rate:,.0f} s")

    @property
    def may_compile(self) -> bool:
        """Whether there is time for the compiler."""
        return self.side < 32 or (not self.sheet.tiny and time.monotonic() + COMPILER < self.end)

    def best(self) -> int:
        """The smallest of the batch sizes that are about as fast as the fastest."""
        rates = {batch: self.rates.get(("bfloat16, graph", batch), 0.0) for batch in self.batches}
        return min(batch for batch, rate in rates.items() if rate >= AS_FAST * max(rates.values()))

    def ours(self, name: str, batch: int, *, graph: bool = True, **keys: object) -> None:
        """The loop that makes datasets: `TargetedPGD` with all `STEPS`, including rounding to 8 bits."""
        recipe = recipe_of(self.case.eps, batch, **keys)

        def loop() -> Callable[[int], object]:
            search = TargetedPGD(recipe, optimized(self.model, recipe))
            if not graph:
                search.descent.capture = None

            def run(steps: int) -> object:
                search.recipe = recipe.model_copy(update={"steps": steps})
                return search(self.pixels[:batch], self.target[:batch], self.target[:batch])

            return run

        self.timed(name, batch, recipe, loop)
        if (name, batch) in self.rates:
            self.mine[name, batch] = self.rates[name, batch]
            _, at = best = max(self.mine, key=lambda one: self.mine[one])
            self.sheet.note(self.case.arch, self.mine[best])
            self.sheet.note(f"{self.case.arch} batch", float(at))

    def bare(self, name: str, batch: int, **keys: object) -> None:
        """The ceiling: bare forward and backward passes of the same network, captured as a CUDA graph like ours."""
        recipe = recipe_of(self.case.eps, batch, **keys)

        def loop() -> Callable[[int], object]:
            made, where = optimized(self.model, recipe), device()
            x, target = to_unit(self.pixels[:batch], where), torch.from_numpy(self.target[:batch]).to(where)
            grad = torch.zeros_like(x)

            def step() -> None:
                leaf = x.detach().requires_grad_(True)
                grad.copy_(torch.autograd.grad(targeted(made, target)(leaf).sum(), leaf)[0])

            capture, again = pgd.graphs(recipe, where), list[Callable[[], None]]()

            def run(steps: int) -> object:
                for done in range(steps):
                    if capture and done == UNCAPTURED and not again:
                        again.append(capture(step))
                    (again[0] if again else step)()
                return None

            return run

        self.timed(f"{name}: bare", batch, recipe, loop)

    def others(self, batch: int) -> None:
        """The naive loop and torchattacks' loop, in float32 and with PyTorch's defaults (TF32)."""
        recipe = recipe_of(self.case.eps, batch, precision="tf32", deterministic=False)
        for name, step in (("naive loop", naive_pgd), ("torchattacks' loop", torchattackss)):

            def loop(step: Callable[..., Tensor] = step) -> Callable[[int], object]:
                plain = Plain(self.model).eval()
                x, where = to_unit(self.pixels[:batch], device()).contiguous(), device()
                return partial(step, plain, x, torch.from_numpy(self.target[:batch]).to(where), recipe)

            self.timed(name, batch, recipe, loop)

    def timed(self, name: str, batch: int, recipe: Attack, loop: Callable[[], Callable[[int], object]]) -> None:
        """Add a line: seconds per step and fixed seconds, from the times of some steps and of twice as many."""
        if time.monotonic() > self.end:
            return
        k = self.steps
        try:
            with computing(recipe):
                run = loop()
                first = seconds_of(lambda: run(UNCAPTURED + 1))
                some, twice = (seconds_of(partial(run, steps), 3) for steps in (k, 2 * k))
        except torch.OutOfMemoryError:
            self.add(name, batch, "out of memory", "", "", "", "", "")
            torch.cuda.empty_cache()
            return
        step = (twice - some) / k if twice > some else twice / (2 * k)
        whole = max(some - k * step, 0.0) + STEPS * step
        rate = batch * STEPS / whole
        bare, peak = self.rates.get(("bfloat16, graph: bare", batch)), self.peak
        if ": bare" not in name:
            self.rates[name, batch] = rate
        else:
            self.rates[name, batch] = rate = batch / step
            if ("bfloat16, graph", batch) in self.rates:
                self.sheet.say(f"{self.arch}: our loop over bare forward and backward, batch {batch}: "
                               f"{self.rates['bfloat16, graph', batch] / rate:.3f}")  # fmt: skip
            bare = None
        if not name.startswith("bfloat16"):
            bare = None
        self.add(
            name, batch, f"{rate:,.0f}", f"{batch / step:,.0f}", f"{rate * self.work / 1e12:,.1f}",
            f"{rate * self.work / peak:.3f}" if peak else "–", f"{rate / bare:.3f}" if bare else "–", f"{first:.1f}",
        )  # fmt: skip


def torchattackss(model: nn.Module, clean: Tensor, target: Tensor, ball: Attack, steps: int) -> Tensor:
    """`torchattacks.PGDL2` 3.5.1, targeted and without a random start, line by line."""
    loss, x = nn.CrossEntropyLoss(), clean.clone().detach()
    for _ in range(steps):
        x.requires_grad = True
        cost = -loss(model(x), target)
        grad = torch.autograd.grad(cost, x, retain_graph=False, create_graph=False)[0]
        norms = torch.norm(grad.view(len(x), -1), p=2, dim=1) + 1e-10
        x = x.detach() + ball.step * grad / norms.view(len(x), 1, 1, 1)
        delta = x - clean
        norms = torch.norm(delta.view(len(x), -1), p=2, dim=1)
        delta = delta * torch.min(ball.eps / norms, torch.ones_like(norms)).view(-1, 1, 1, 1)
        x = torch.clamp(clean + delta, min=0, max=1).detach()
    return x
