"""The cost of deterministic kernels: the attack loop and a training, with and without them."""

from pathlib import Path

from benchmarks.gpu.loops import CASES, Loops
from benchmarks.gpu.sheet import Sheet, images
from stages import train
from stages.model import Design
from stages.recipes import Train


def measure(sheet: Sheet) -> None:
    training(sheet)
    for at, case in enumerate(reversed(CASES)):
        loops = Loops(sheet, case, sheet.left / (len(CASES) - at), sheet.noted("device", "bfloat16"))
        batch = min(int(sheet.noted("loops", f"{case.arch} batch") or loops.batches[0]), len(loops.pixels))
        name = "bfloat16, graph"
        rates = []
        if sheet.left < 3:
            return
        for deterministic in (True, False):
            said = f"{name}, {'deterministic' if deterministic else 'whatever is fastest'}"
            loops.ours(said, batch, precision="bfloat16", deterministic=deterministic)
            rates.append(loops.rates.get((said, batch)))
        if all(rates):
            sheet.say(f"{loops.arch}, {loops.side} px: deterministic over fastest {rates[0] / rates[1]:.3f}")


def training(sheet: Sheet) -> None:
    """Images per second of an in-memory training, in its second epoch."""
    arch, count, batch = ("small_cnn", 96, 32) if sheet.tiny else ("cifar_resnet18", 20_000, 500)
    shard, add = images(sheet, count), sheet.table("Training, 32 px, bfloat16", "network", "kernels", "images/s")
    design = Design(arch, 10, (3, 32, 32), (0.5,) * 3, (0.25,) * 3)
    examples = train.Examples([shard.name], {shard.name: count}, lambda _: shard, shard.images().nbytes, "bench")
    for deterministic in (True, False):
        lesson = Train(
            on="", arch=arch, epochs=2, batch_size=batch, precision="bfloat16", augment="crop-flip",
            deterministic=deterministic, eval_images=0,
        )  # fmt: skip
        *_, (_, history) = train.fit(lesson, design, examples, Path.cwd())
        kernels = "deterministic" if deterministic else "whatever is fastest"
        add(arch, kernels, f"{history[-1]['images_per_second']:,.0f}")
