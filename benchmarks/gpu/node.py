"""A whole dataset node beside the bare loop, at 224 pixels; a training from shards beside one from tensors."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import yaml

from benchmarks.gpu.loops import CASES, STEPS, Loops
from benchmarks.gpu.sheet import Sheet, images, untrained
from pipeline.cli import main as notbugs
from stages import train
from stages.model import Design, save
from stages.recipes import Train
from stages.shard import Shard, pack, unpack

LOADED = 50.0
"""Images per second that one core draws and encodes at 224 pixels."""


def measure(sheet: Sheet) -> None:
    dataset(sheet)
    if sheet.left > 3:
        training(sheet)


def dataset(sheet: Sheet) -> None:
    """Load, attack and commit stand-ins for photographs, with the user's command."""
    case = CASES[0]
    loops = Loops(sheet, case, sheet.left, None)
    noted = int(sheet.noted("loops", f"{case.arch} batch") or loops.batches[0])
    batch, steps = (min(noted, 8), 3) if sheet.tiny else (min(noted, 128), STEPS)
    rate = sheet.noted("loops", case.arch) or 5_000.0
    weights = sheet.out / "random.safetensors"
    shards = 2 if sheet.tiny else max(3, min(8, int(0.6 * sheet.left / (batch * (steps / rate + 1 / LOADED)))))
    weights.write_bytes(save(untrained(loops.arch, loops.side, case.classes).network))
    source = {
        "source": "synthetic", "images": {"train": shards * batch}, "classes": case.classes, "size": loops.side,
        "shard_size": batch,
    }  # fmt: skip
    brought = {"arch": loops.arch, "weights": str(weights.resolve()), "shape": [3, loops.side, loops.side]}
    attack = {"images": "clean", "model": "net", "eps": case.eps, "steps": steps, "batch_size": batch}
    attack["precision"] = "bfloat16"
    file, store = sheet.out / "node.yaml", sheet.out / "node-store"
    what = {
        "name": "node",
        "datasets": {"clean": {"load": source}, "moved": {"attack": attack, "relabel": "next"}},
        "models": {"net": {"pretrained": brought}},
    }
    file.write_text(yaml.safe_dump(what))
    shutil.rmtree(store, ignore_errors=True)  # of an earlier call, else the nodes would be cached
    try:
        notbugs.main(["run", str(file), "--engine", "inline", "--store", str(store)])
    except SystemExit as ended:
        if ended.code:
            raise
    (run,) = store.glob("runs/*/run.json")
    seconds = json.loads(run.read_text())["nodes"]["datasets/moved"]["seconds"]
    marks = [json.loads(path.read_text()) for path in store.glob("datasets/moved/*/commits/*.json")]
    name = "bfloat16, graph"
    loops.ours(name, batch, precision="bfloat16")
    loop, node = loops.rates.get((name, batch)), shards * batch * steps / seconds
    add = sheet.table(f"A dataset node, {loops.arch}, {loops.side} px, {steps} steps", "what", "value")
    add("images, shards, batch", f"{shards * batch}, {shards}, {batch}")
    add("seconds of the node", f"{seconds:.1f}")
    for step in ("read", "work", "commit"):
        add(f"of that {step}, of all shards", f"{sum(mark['seconds'][step] for mark in marks):.1f}")
    add("image·steps/s of the node", f"{node:,.0f}")
    add("of the loop", f"{loop:,.0f}" if loop else "–")
    add("node over loop", f"{node / loop:.3f}" if loop else "–")


def training(sheet: Sheet) -> None:
    """Images per second in the second epoch, from a split in memory and from packed shards."""
    arch, count, batch = ("small_cnn", 96, 32) if sheet.tiny else ("cifar_resnet18", 20_000, 500)
    whole, parts = images(sheet, count), 8
    names = [f"train-{k:06d}" for k in range(parts)]
    for k, name in enumerate(names):
        (sheet.out / f"{name}.tar").write_bytes(pack(_part(whole, slice(k, None, parts))))
    read, counts = partial(_read, sheet.out), dict.fromkeys(names, count // parts)
    examples = train.Examples(names, counts, read, whole.images().nbytes, "bench")
    design = Design(arch, 10, (3, 32, 32), (0.5,) * 3, (0.25,) * 3)
    add = sheet.table(f"Training of {arch}, 32 px, bfloat16", "images", "images/s")
    rates = []
    for what, budget in (("held", 4096), ("streamed from shards", 0)):
        lesson = Train(
            on="", arch=arch, epochs=2, batch_size=batch, precision="bfloat16", augment="crop-flip",
            memory_budget=budget, eval_images=0,
        )  # fmt: skip
        *_, (_, history) = train.fit(lesson, design, examples, Path.cwd())
        rates.append(history[-1]["images_per_second"])
        add(what, f"{rates[-1]:,.0f}")
    sheet.say(f"training from shards over tensors: {rates[1] / rates[0]:.3f}")


def _read(folder: Path, name: str) -> Shard:
    return unpack(name, (folder / f"{name}.tar").read_bytes(), 3)


def _part(shard: Shard, chosen: slice) -> Shard:
    columns = (shard.index, shard.label, shard.source_label, shard.images())
    return replace(
        shard, **dict(zip(("index", "label", "source_label", "pixels"), (c[chosen] for c in columns), strict=True))
    )
