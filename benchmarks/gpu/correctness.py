"""Does the GPU compute the same as the CPU in float32, and the same bytes each time?"""

from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch._inductor.config
from torch import Tensor

from benchmarks.gpu.sheet import Sheet, images, percent
from stages import model as models
from stages import train
from stages.attack import Attacker
from stages.device import device
from stages.evaluate import score
from stages.invert import Inverter
from stages.model import Classifier, Design, logits_of
from stages.pgd import round_in_ball
from stages.recipes import Attack, EvalAttack, Evaluate, Invert, Relabel, Train
from stages.shard import Shard, pack

CLASSES = [str(k) for k in range(10)]
OTHER = Relabel(rule="other")

COMPILERS = 40
"""Seconds reserved for compiling twice: with less time left it is skipped."""


def measure(sheet: Sheet) -> None:
    bench = Bench(sheet)
    bench.teach()
    for part in (bench.twice, bench.attack, bench.rounding, bench.step, bench.inversion, bench.evaluation):
        if sheet.left > 0:
            part()
    if sheet.left > COMPILERS:
        bench.compiled()


class Bench:
    """A briefly trained network, on the device and on the CPU, and a shard to attack.

    The network is small, since the CPU uses one thread, as in a run.
    """

    def __init__(self, sheet: Sheet) -> None:
        self.sheet, self.count, self.steps = sheet, *((24, 3) if sheet.tiny else (32, 10))
        arch = "small_cnn" if sheet.tiny else "cifar_resnet18"
        self.lesson = Train(
            on="", arch=arch, epochs=1 if sheet.tiny else 3, lr=0.1, batch_size=32 if sheet.tiny else 250,
            precision="bfloat16", augment="crop-flip", threads=4,
        )  # fmt: skip
        self.shard = images(sheet, 160 if sheet.tiny else 20_000)
        test = images(sheet, self.count, "test")
        self.test = replace(test, name="train-000000")
        self.design = Design(arch, 10, (3, 32, 32), (0.5,) * 3, (0.25,) * 3)
        self.alike = sheet.table("The GPU beside the processor", "what", "numbers", "median", "largest", "said of both")
        self.same = sheet.table("The same bytes", "what", "same", "digest")

    def examples(self, shard: Shard) -> train.Examples:
        return train.Examples([shard.name], {shard.name: len(shard)}, lambda _: shard, shard.images().nbytes, "bench")

    def fit(self, lesson: Train, shard: Shard, checkpoint: bytes | None = None) -> list[bytes]:
        """Train; returns the checkpoint after each epoch."""
        return [c for c, _ in train.fit(lesson, self.design, self.examples(shard), Path.cwd(), checkpoint)]

    def teach(self) -> None:
        self.weights = train.weights_of(self.fit(self.lesson, self.shard)[-1])
        self.model = models.load(self.design, self.weights, Path.cwd())
        with mock.patch.object(models, "device", lambda: torch.device("cpu")):
            self.there = models.load(self.design, self.weights, Path.cwd())

    def both(self, what: str, work: Callable[[Classifier], tuple[Tensor, str]]) -> None:
        """Add a line that compares some work in float32 on both devices."""
        self.line(what, "float32", work(self.model), work(self.there))

    def line(self, what: str, numbers: str, here: tuple[Tensor, str], there: tuple[Tensor, str]) -> None:
        """Add a line with the distance between both results, per image."""
        apart = (here[0].cpu().double() - there[0].double()).flatten(1).norm(dim=1)
        self.alike(what, numbers, f"{apart.median():.2e}", f"{apart.max():.2e}", f"{here[1]} | {there[1]}")

    def moved(self, model: Classifier, **keys: object) -> tuple[Tensor, str]:
        """The attacked shard, and its attack success rate."""
        recipe = Attack(images="", model="", steps=self.steps, step_size=0.1, batch_size=self.count, **keys)  # type: ignore[arg-type]
        made = Attacker(recipe, OTHER, CLASSES, model)(self.test)
        return _unit(made.images()), f"{percent(made.attack['success'])} % success"

    def attack(self) -> None:
        self.both("logits", lambda model: (torch.from_numpy(logits_of(model, self.test.images(), self.count)), ""))
        there = self.moved(self.there)
        for precision in ("float32", "tf32", "bfloat16", "float16"):
            # Compared with float32 on the CPU, whatever the GPU's precision.
            here = self.moved(self.model, precision=precision)
            self.line(f"attack, {self.steps} steps, saved images, L2", precision, here, there)

    def rounding(self) -> None:
        draw = torch.Generator().manual_seed(0)
        clean = torch.from_numpy(self.test.images()).permute(0, 3, 1, 2)
        noise = torch.randn(clean.shape, generator=draw)
        near = (clean / 255 + 0.5 * noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp(0, 1)
        for norm, eps in (("l2", 0.5), ("linf", 2 / 255)):
            found = [round_in_ball(near.to(where), clean.to(where), norm, eps).cpu() for where in (device(), "cpu")]  # type: ignore[arg-type]
            self.same(f"rounding to 8 bits, {norm}, on the GPU and on the processor", *_equal(*found))

    def step(self) -> None:
        """Compare the weights, relative to their norm, after an epoch of few batches in float32 without randomness."""
        lesson = self.lesson.model_copy(update={"epochs": 1, "precision": "float32", "lr": 0.01, "threads": 8})
        few = _part(self.shard, 4 * lesson.batch_size)
        here = self.fit(lesson, few)[-1]
        with mock.patch.object(models, "device", lambda: torch.device("cpu")):
            there = self.fit(lesson, few)[-1]
        apart = _distances(here, there)
        self.alike(
            "training, 4 steps, relative, each weight tensor",
            "float32",
            f"{np.median(apart):.2e}",
            f"{max(apart):.2e}",
            "",
        )

    def evaluation(self) -> None:
        how = {"eps": 0.25, "steps": self.steps // 2 or 1, "batch_size": self.count}
        threats = [EvalAttack(method=method, **how) for method in ("pgd", "apgd")]  # type: ignore[arg-type]
        asked = Evaluate(models=["m"], on="", batch_size=self.count, attacks=threats)
        for what, model in (("GPU", self.model), ("processor", self.there)):
            sums = score(asked, CLASSES, {"m": model}, {}, self.test)["m"]
            self.sheet.say(f"evaluation on the {what}: right {sums['right']}, under PGD and APGD {sums['right_under']}")

    def inversion(self) -> None:
        recipe = Invert(images="", model="", steps=self.steps, batch_size=self.count, step_size=0.2)

        def invert(model: Classifier) -> tuple[Tensor, str]:
            made = Inverter(recipe, model)(self.test)
            return _unit(made.images()), f"distance {made.attack['distance'].mean():.4f}"

        self.both(f"inversion, {self.steps} steps, saved images, L2", invert)
        self.same("inversion, twice", *_equal(*(invert(self.model)[0] for _ in range(2))))

    def twice(self) -> None:
        """Compare bytes: a shard per precision, with and without CUDA graphs; a training, repeated and resumed."""
        for precision in ("bfloat16", "float32", "tf32", "float16"):
            self.same(f"shard, {precision}, twice", *_digests(*(self.shard_of(precision) for _ in range(2))))
            self.same(f"shard, {precision}, graph and kernel by kernel",
                      *_digests(self.shard_of(precision), self.shard_of(precision, graph=False)))  # fmt: skip
        few = _part(self.shard, 10 * self.lesson.batch_size)
        two = self.lesson.model_copy(update={"epochs": 2})
        whole, again = self.fit(two, few), self.fit(two, few)
        self.same("training, twice", *_digests(*(train.weights_of(each[-1]) for each in (whole, again))))
        went_on = self.fit(two, few, whole[0])
        self.same(
            "training, gone on from a checkpoint", *_digests(*(train.weights_of(e[-1]) for e in (whole, went_on)))
        )

    def compiled(self) -> None:
        """Compile twice without a cache, as two workers would."""
        shards = []
        for _ in range(2):
            self.model.views.clear()
            torch.compiler.reset()
            with torch._inductor.config.patch(force_disable_caches=True):
                shards.append(self.shard_of("bfloat16", compile=True))
        self.same("shard, bfloat16, compiled twice", *_digests(*shards))

    def shard_of(self, precision: str, graph: bool = True, compile: bool = False) -> bytes:
        recipe = Attack(
            images="", model="", steps=self.steps, batch_size=self.count, precision=precision, compile=compile  # type: ignore[arg-type]
        )  # fmt: skip
        attacker = Attacker(recipe, OTHER, CLASSES, self.model)
        if not graph:
            attacker.targeted_pgd.descent.capture = None
        return pack(attacker(self.test))


def _unit(pixels_NHWC: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels_NHWC.astype(np.float64) / 255)


def _part(shard: Shard, count: int) -> Shard:
    columns = (shard.index, shard.label, shard.source_label, shard.images())
    return Shard(shard.name, *(column[:count] for column in columns))


def _equal(one: Tensor, other: Tensor) -> tuple[str, str]:
    return _digests(*(np.ascontiguousarray(each.numpy()).tobytes() for each in (one, other)))


def _digests(*parts: bytes) -> tuple[str, str]:
    found = [sha256(part).hexdigest()[:12] for part in parts]
    return ("yes" if len(set(found)) == 1 else "NO"), found[0]


def _distances(*checkpoints: bytes) -> list[float]:
    """Relative distance of each tensor between two checkpoints."""
    import safetensors.torch

    one, other = (safetensors.torch.load(train.weights_of(each)) for each in checkpoints)
    pairs = [(one[name].double(), other[name].double()) for name in one if one[name].is_floating_point()]
    return [float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in pairs]
