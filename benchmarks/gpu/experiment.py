"""The real experiment on CIFAR-10, with the user's command: clean accuracy of learners of relabelled images."""

import json
from pathlib import Path
from typing import Any

import yaml

from benchmarks.gpu.sheet import Sheet
from benchmarks.side_by_side import CIFAR10
from pipeline.cli import main as notbugs

STEPS, EPS = 100, 0.5
RULES = {"rand": "random", "other": "other", "det": "next"}

LEARNED = 600_000
"""Minimum images of a learner's training: it stays at chance for long before it learns anything."""

ATTACK_SHARE = 0.45
"""Share of this step's time for the three attacks; it determines the number of attacked images."""


def measure(sheet: Sheet) -> None:
    if not sheet.tiny and not (sheet.data and (sheet.data / CIFAR10).exists()):
        sheet.say("no CIFAR-10 at hand: give its folder with --data")
        return
    rate = sheet.noted("loops", "cifar_resnet18") or 20_000.0
    batch = int(sheet.noted("loops", "cifar_resnet18 batch") or 500)
    count = min(50_000, max(5_000, int(ATTACK_SHARE * sheet.left * rate / (len(RULES) * STEPS) / 5_000) * 5_000))
    file, store = sheet.out / "experiment.yaml", sheet.out / "store"
    if sheet.tiny or not file.exists():  # else continue an earlier call
        file.write_text(yaml.safe_dump(described(sheet.tiny, count, min(batch, 2_500)), sort_keys=False))
    sheet.say("digits, a rehearsal" if sheet.tiny else f"{STEPS} steps, L2 ε {EPS}; what was asked for is in {file}")
    add = sheet.table(
        "What learners know", "evaluation", "model", "trained on", "accuracy %", "95 %", "seconds so far", "made of"
    )
    started = sheet.left
    for name in ("source", "rand", "leakage", "other", "det", "rand-1", "other-1", "det-1"):
        if sheet.left < 5 or (sheet.tiny and name.endswith("-1")):
            break
        data = ["--data", str(sheet.data)] if sheet.data else []
        asked = ["run", str(file), "--engine", "inline", "--store", str(store), "--only", name, *data]
        try:
            notbugs.main(asked)
        except SystemExit as ended:
            if ended.code:
                sheet.say(f"{name}: ended with exit code {ended.code}")
                continue
        for row in found(store, name):
            add(
                name, row["model"], row["trained_on"] or "", f"{100 * row['accuracy']:.2f}",
                f"{100 * row['low']:.1f} – {100 * row['high']:.1f}", f"{started - sheet.left:.0f}",
                facts(store, row["trained_on"]),
            )  # fmt: skip


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


def described(tiny: bool, count: int, batch: int) -> dict[str, Any]:
    """The experiment: a source, three datasets and the leakage control of one, a learner of each, with two seeds."""
    size = max(1, 2_500 // batch) * batch
    clean: dict[str, Any] = {"source": "cifar10", "download": False, "shard_size": size}
    lesson: dict[str, Any] = {
        "arch": "cifar_resnet18", "epochs": 10, "batch_size": 250, "lr": 0.2, "precision": "bfloat16",
        "augment": "crop-flip", "weight_decay": 5e-4, "eval_images": 0,
    }  # fmt: skip
    learner = lesson | {"epochs": max(15, LEARNED // count), "lr": 0.1, "augment": "none"}
    attack: dict[str, Any] = {
        "images": "part", "model": "standard", "eps": EPS, "step_size": 0.1, "steps": STEPS, "precision": "bfloat16",
        "batch_size": batch,
    }  # fmt: skip
    if tiny:
        clean = {"source": "sklearn-digits", "shard_size": 100, "limit": 200}
        small = {"arch": "small_cnn", "epochs": 1, "batch_size": 50, "threads": 1}
        lesson, learner, count = lesson | small | {"augment": "none"}, learner | small, 100
        attack |= {"steps": 2, "batch_size": 50}
    datasets: dict[str, Any] = {"clean": {"load": clean}, "part": {"load": clean | {"limit": count}}}
    models: dict[str, Any] = {"standard": {"train": lesson | {"on": "clean"}}}
    evaluations: dict[str, Any] = {"source": {"models": ["standard"], "on": "clean"}}
    for name, rule in RULES.items():
        datasets[f"d-{name}"] = {"attack": attack, "relabel": rule}
    leaks = {"images": "part", "model": "standard", "method": "leakage", "eps": EPS, "batch_size": attack["batch_size"]}
    datasets["d-leakage"] = {"attack": leaks, "relabel": "random"}
    for name in (*RULES, "leakage"):
        for seed, end in enumerate(("", "-1")):
            models[f"from-{name}{end}"] = {"train": learner | {"on": f"d-{name}", "seed": seed}}
            evaluations[f"{name}{end}"] = {"models": [f"from-{name}{end}"], "on": "clean"}
    return {"name": "gpu", "datasets": datasets, "models": models, "evaluations": evaluations}
