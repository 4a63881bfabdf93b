"""The real experiment on CIFAR-10, with the user's command: clean accuracy of learners of relabelled images."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from benchmarks.gpu.sheet import Sheet
from benchmarks.side_by_side import CIFAR10

STEPS, FEWEST, EPS = 100, 12, 0.5
"""Steps if the time allows, and those below which images are left out instead: on CIFAR-10 twelve serve as well."""

RULES = {"rand": "random", "other": "other", "det": "next"}

LEARNED, RATE = 1_200_000, 0.02
"""Minimum images of a learner's training, and its peak learning rate: a ResNet-18 stays at chance for long before it
learns anything, with a peak of 0.1 until the rate has fallen to a fifth of that (docs/results.md)."""

ATTACK_SHARE = 0.25
"""Share of this step's time for the three attacks; it determines their steps and, below `FEWEST`, their images."""

MEASURED = 90_000.0
"""Image·steps per second of an H100, where `loops` was not run before."""


def measure(sheet: Sheet) -> None:
    if not sheet.tiny and not (sheet.data and (sheet.data / CIFAR10).exists()):
        sheet.say("no CIFAR-10 at hand: give its folder with --data")
        return
    rate = sheet.noted("loops", "cifar_resnet18") or MEASURED
    batch = int(sheet.noted("loops", "cifar_resnet18 batch") or 500)
    steps, count = affordable(ATTACK_SHARE * sheet.left * rate / len(RULES))
    file, store = sheet.out / "experiment.yaml", sheet.out / "store"
    if sheet.tiny or not file.exists():  # else continue an earlier call
        file.write_text(yaml.safe_dump(described(sheet.tiny, steps, count, min(batch, 2_500)), sort_keys=False))
    sheet.say("digits, a rehearsal" if sheet.tiny else f"{steps} steps, L2 ε {EPS}; what was asked for is in {file}")
    add = sheet.table(
        "What learners know", "evaluation", "model", "trained on", "accuracy %", "95 %", "seconds so far", "made of"
    )
    started = sheet.left
    data = ["--data", str(sheet.data)] if sheet.data else []
    asked = [sys.executable, "-m", "pipeline", "run", str(file), "--engine", "inline", "--store", str(store), *data]
    # One after the other: four learners side by side have fewer images/s together than one alone (docs/performance.md).
    for name in ("source", "rand", "leakage", "other", "det", *(f"{rule}-1" for rule in RULES)):
        if sheet.left < 5 or (sheet.tiny and name.endswith("-1")) or not made(sheet, asked, name):
            break
        for row in found(store, name):
            add(
                name, row["model"], row["trained_on"] or "", f"{100 * row['accuracy']:.2f}",
                f"{100 * row['low']:.1f} – {100 * row['high']:.1f}", f"{started - sheet.left:.0f}",
                facts(store, row["trained_on"]),
            )  # fmt: skip


def made(sheet: Sheet, asked: list[str], name: str) -> bool:
    """Make an evaluation, by a command that ends with the step at the latest; returns whether it ended well."""
    try:
        code = subprocess.run([*asked, "--only", name], stdout=sys.stderr, timeout=max(0.0, sheet.left)).returncode
    except subprocess.TimeoutExpired:
        sheet.say(f"{name}: no time left")
        return False
    if code:
        sheet.say(f"{name}: ended with exit code {code}")
    return code == 0


def affordable(image_steps: float) -> tuple[int, int]:
    """Steps and images of one dataset for this many image·steps: all images with few steps before few with many."""
    steps = min(STEPS, max(FEWEST, int(image_steps / 50_000)))
    return steps, min(50_000, max(5_000, int(image_steps / steps / 5_000) * 5_000))


def found(store: Path, evaluation: str) -> list[dict[str, Any]]:
    (file,) = store.glob(f"evaluations/{evaluation}/*/result.json")
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    return rows


def facts(store: Path, dataset: str | None) -> str:
    """Facts of a dataset from its manifest."""
    (file,) = list(store.glob(f"datasets/{dataset}/*/manifest.json")) or [None]
    if file is None:
        return ""
    said = json.loads(file.read_text())
    reached = (
        f", {100 * said['success_rate']:.1f} % success, mean L2 {said['l2_mean']:.3f}" if "success_rate" in said else ""
    )
    return f"{said['counts']['train']:,} images{reached}"


def described(tiny: bool, steps: int, count: int, batch: int) -> dict[str, Any]:
    """The experiment: a source, three datasets and the leakage control of one, a learner of each, with two seeds."""
    size, images = max(1, 2_500 // batch) * batch, "part" if tiny or count < 50_000 else "clean"
    clean: dict[str, Any] = {"source": "cifar10", "download": False, "shard_size": size}
    lesson: dict[str, Any] = {
        "arch": "cifar_resnet18", "epochs": 10, "batch_size": 250, "lr": 0.2, "precision": "bfloat16",
        "augment": "crop-flip", "weight_decay": 5e-4, "eval_images": 0,
    }  # fmt: skip
    learner = lesson | {"epochs": max(24, LEARNED // count), "lr": RATE, "augment": "flip"}
    attack: dict[str, Any] = {
        "images": images, "model": "standard", "eps": EPS, "step_size": 0.1, "steps": steps, "precision": "bfloat16",
        "batch_size": batch,
    }  # fmt: skip
    if tiny:
        clean = {"source": "sklearn-digits", "shard_size": 100, "limit": 200}
        small = {"arch": "small_cnn", "epochs": 1, "batch_size": 50, "threads": 1}
        lesson, learner, count = lesson | small | {"augment": "none"}, learner | small, 100
        attack |= {"steps": 2, "batch_size": 50}
    datasets: dict[str, Any] = {"clean": {"load": clean}}
    if images == "part":
        datasets["part"] = {"load": clean | {"limit": count}}
    models: dict[str, Any] = {"standard": {"train": lesson | {"on": "clean"}}}
    evaluations: dict[str, Any] = {"source": {"models": ["standard"], "on": "clean"}}
    for name, rule in RULES.items():
        datasets[f"d-{name}"] = {"attack": attack, "relabel": rule}
    leaks = {"images": images, "model": "standard", "method": "leakage", "eps": EPS, "batch_size": attack["batch_size"]}
    datasets["d-leakage"] = {"attack": leaks, "relabel": "random"}
    for name in (*RULES, "leakage"):
        for seed, end in enumerate(("", "-1")):
            models[f"from-{name}{end}"] = {"train": learner | {"on": f"d-{name}", "seed": seed}}
            evaluations[f"{name}{end}"] = {"models": [f"from-{name}{end}"], "on": "clean"}
    return {"name": "gpu", "datasets": datasets, "models": models, "evaluations": evaluations}
