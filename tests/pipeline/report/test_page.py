"""A run's page: its content; it needs no other file; and browsers of any width can show it."""

import base64
import csv
import io
import json
import re
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from pipeline.experiment.graph import Node, build
from pipeline.experiment.spec import parse, read
from pipeline.report import gallery, page, per_class, sections, verdict
from pipeline.report.results import RunResults
from pipeline.run import artifacts
from pipeline.run.runs import Progress
from pipeline.store import Store, digest
from stages.design import Design
from stages.evaluate import wilson
from stages.shard import Shard, pack, unpack

# ------------------------------------------------------------------------------------ a made-up run

CLASSES = ["<b>zero</b>", *(f"class {i}" for i in range(1, 10))]

ATTACK = {"images": "clean", "model": "standard", "eps": 1.5, "steps": 10}
LEARNER = {"arch": "small_cnn", "epochs": 4}


def learner(on: str, **more: Any) -> dict[str, Any]:
    return {"train": {**LEARNER, "on": on, **more}}


SWEPT = [f"@steps={steps},seed={seed}" for steps in (1, 10, 100) for seed in (0, 1)]

CONTROLS = ["leakage", "robust-source", "top", "bottom"]

EXPERIMENT: dict[str, Any] = {
    "name": "whole",
    "datasets": {
        "clean": {"load": {"source": "cifar10"}},
        "rand": {"attack": ATTACK, "relabel": "random"},
        "other": {"attack": ATTACK, "relabel": "other"},
        "control": {"attack": {"images": "clean", "method": "none"}, "relabel": "other"},
        "rand.leakage": {"attack": {**ATTACK, "method": "leakage"}, "relabel": "random"},
        "rand.robust-source": {"attack": {**ATTACK, "model": "robust"}, "relabel": "random"},
        "rand.top": {"select": {"images": "rand", "keep": "top", "share": 0.4}},
        "rand.bottom": {"select": {"images": "rand", "keep": "bottom", "share": 0.6}},
        "d_r": {"invert": {"images": "clean", "model": "robust"}},
        "d_nr": {"invert": {"images": "clean", "model": "standard"}},
        **{f"swept{at}": {"attack": {**ATTACK, "seed": i}, "relabel": "next"} for i, at in enumerate(SWEPT)},
    },
    "models": {
        "standard": learner("clean"),
        "robust": learner("clean", adversarial={"eps": 0.5, "steps": 7}),
        **{f"from_{name}": learner(name) for name in ("rand", "other", "control", "d_r", "d_nr")},
        **{f"from_rand.{control}": learner(f"rand.{control}") for control in CONTROLS},
        "from_rand.probe": {"train": {"on": "rand", "probe": "robust"}},
        **{f"from_swept{at}": learner(f"swept{at}", seed=i) for i, at in enumerate(SWEPT)},
        "bigger": learner("clean", arch="resnet18"),
        "bigger_from_rand": learner("rand", arch="resnet18"),
    },
    "evaluations": {
        "accuracy": {"models": ["standard", "robust", "bigger"], "on": "clean"},
        "learners": {
            "models": [
                *(f"from_{name}" for name in ("other", "rand", "control", "d_r", "d_nr")),
                *(f"from_rand.{control}" for control in ("probe", *CONTROLS)),
                "bigger_from_rand",
                *(f"from_swept{at}" for at in SWEPT),
            ],
            "on": "clean",
        },
        "features": {"usefulness": {"models": ["standard"], "on": "clean"}},
    },
}


def under_attack(accuracy: float) -> list[dict[str, Any]]:
    ball = {"norm": "l2", "steps": 7, "step_size": 0.1, "restarts": 1, "surrogate": None, "target_rule": None}
    worst = {"low": 0.0, "high": 1.0, "n": 400, "average": accuracy, "fooled": 0.4}
    space = {"rotation": 30.0, "translation": 0.1, "search": "grid", "tries": 775}
    return [
        {"attack": "pgd", "accuracy": accuracy / 2, **worst, **ball, "eps": 0.25, "step_size": 0.05},
        {"attack": "pgd", "accuracy": accuracy / 5, **worst, **ball, "eps": 0.5},
        {"attack": "pgd", "accuracy": accuracy / 3, **worst, **ball, "eps": 0.5, "surrogate": "standard"},
        {"attack": "pgd", "accuracy": 0.1, **worst, **ball, "eps": 0.5, "target_rule": "next", "success_rate": 0.7},
        {"attack": "spatial", "accuracy": accuracy / 4, **worst, **space},
    ]


def scored(model: Node, accuracy: float) -> dict[str, Any]:
    rate = {"accuracy": accuracy, "low": max(0.0, accuracy - 0.02), "high": min(1.0, accuracy + 0.02), "n": 400}
    on = model.inputs["on"].name if "on" in model.inputs else "pretrained"
    base = {"kind": "accuracy", "model": model.name, "trained_on": on, "chance": 0.1, "majority": 0.12}
    right = round(40 * accuracy)
    return {
        **base,
        "per_class": {name: {"accuracy": accuracy, "n": 40} for name in CLASSES},
        "confusion": [[right if k == j else (40 - right) * (k == (j + 1) % 10) for k in range(10)] for j in range(10)],
        **rate,
        "under_attack": under_attack(accuracy),
        "agreement": {**rate, "rule": "next", "accuracy": 0.25},
    }


def useful(model: Node) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    points = [[f, k, rho := 0.6 * draw.random(), rho - 0.6 * draw.random()] for f in range(200) for k in range(10)]
    counts = {"robust": 500, "non_robust": 1300, "useless": 200}
    facts = {
        "norm": "l2",
        "eps": 0.5,
        "steps": 10,
        "features": 200,
        "useful": 0.1,
        "classes": CLASSES,
        "n": 200,
        "attacked": 60,
    }
    facts |= {"useful_from": [0.06] * 10, "features_by_best_class": {"robust": 50, "non_robust": 130, "useless": 20}}
    return {
        "kind": "usefulness",
        "model": model.name,
        "trained_on": "clean",
        **facts,
        "counts": counts,
        "points": points,
    }


ACCURACY = {
    "from_other": 0.9,
    "from_control": 0.05,
    "from_rand.leakage": 0.7,
    "from_rand.bottom": 0.03,
    "from_swept@steps=10,seed=0": 0.5,
    "from_swept@steps=10,seed=1": 0.7,
}


def rows(node: Node, accuracy: Mapping[str, float]) -> list[dict[str, Any]]:
    models = [parent for role, parent in node.inputs.items() if role.startswith("models.")]
    made = [useful(m) if node.stage == "usefulness" else scored(m, accuracy.get(m.name, 0.8)) for m in models]
    on, split = node.inputs["on"], node.recipe.split
    held_out = on.stage == "load" and split != "train"
    return [{"evaluation": node.name, "on": on.name, "split": split, "held_out": held_out, **row} for row in made]


def shard_of(node: Node) -> bytes:
    """Twenty images; the attack made every fifth pixel slightly brighter."""
    draw = np.random.default_rng(1)
    pixels = draw.integers(0, 200, (20, 32, 32, 3), dtype=np.uint8)
    truth = np.arange(20) % 10
    if node.stage == "load":
        return pack(Shard("train-000000", np.arange(20), truth, truth, pixels))
    pixels[:, ::5] += 10
    facts = {"target": truth, "success": np.arange(20) % 2 == 0, "confidence": np.full(20, 0.875), "l2": truth / 10}
    if node.stage == "invert":
        facts = {"l2": truth / 10, "distance": np.full(20, 0.25)}
    return pack(Shard("train-000000", np.arange(20), (truth + 1) % 10, truth, pixels, attack=facts))


def samples_of(node: Node) -> bytes:
    """The table of the samples of `shard_of`: half of the targets were reached, all others were left out."""
    truth = [i % 10 for i in range(20)]
    columns = {"source_label": truth, "target": [(y + 1) % 10 for y in truth], "success": [i % 2 == 0 for i in truth]}
    out = io.BytesIO()
    pq.write_table(pa.table({name: [*values, None] for name, values in columns.items()}), out)
    return out.getvalue()


def manifest(node: Node, files: dict[str, bytes]) -> dict[str, Any]:
    shas = {name: digest(content) for name, content in files.items()}
    base: dict[str, Any] = {
        "format": artifacts.FORMAT,
        "group": node.group,
        "name": node.name,
        "version": node.version,
        "content": shas.get("weights.safetensors", "0" * 64),
        "parents": {},
        "environment": {},
        "devices": {},
        "made": "2026-01-01T00:00:00+00:00",
        "files": [{"name": name, "bytes": len(content), "sha256": shas[name]} for name, content in files.items()],
    }
    if node.group == "datasets":
        tars = {name: sha for name, sha in shas.items() if name.endswith(".tar")}
        shards = {name.removesuffix(".tar"): 20 for name in tars}
        base |= {"classes": CLASSES, "channels": 3, "shards": shards, "image_shape": [3, 32, 32], "failures": 0}
        base |= {"content": artifacts.content_digest(tars), "members": ["png", "cls", "json"]}
        base |= {"counts": artifacts.per_split(shards.items())}
    if node.group == "models":
        design = Design(str(node.arch), 10, (3, 32, 32), (0.5,) * 3, (0.5,) * 3)
        base |= {"design": design.as_json(), "trained_on": "clean"}
    if node.group == "evaluations":
        base |= {"shards": {"test-000000": 20}}
    if node.stage == "attack" and node.recipe.method == "pgd":
        base |= {"success_rate": 0.98, "success_by_step": [0.1 + 0.088 * step for step in range(9)] + [0.804] * 2}
    return base


def epochs() -> bytes:
    lines = [{"epoch": e, "accuracy": e / 4, "test_accuracy": e / 5, "images_per_second": 1234} for e in range(1, 5)]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def leave(store: Store, node: Node, accuracy: Mapping[str, float] = ACCURACY) -> None:
    """Write the files that a run would write for a node."""
    files: dict[str, bytes] = {}
    if node.stage in ("load", "attack", "invert"):
        files["train-000000.tar"] = shard_of(node)
    if node.stage == "attack":
        files["samples.parquet"] = samples_of(node)
    if node.stage == "train":
        files |= {"metrics.jsonl": epochs(), "weights.safetensors": b"weights"}
    for name, content in files.items():
        store.put(f"{node.folder}/{name}", content)
    if node.group == "evaluations":
        files["result.json"] = store.put_json(f"{node.folder}/result.json", {"rows": rows(node, accuracy)})
    store.put_json(f"{node.folder}/manifest.json", manifest(node, files))


def record(nodes: list[Node], experiment: dict[str, Any] = EXPERIMENT) -> dict[str, Any]:
    done = {n.id: Progress(n.stage, n.version, "done", images=2000, started=0.0, seconds=130.0) for n in nodes}
    return {
        "run": "20260101-000000-whole-0000",
        "experiment": parse(experiment).model_dump(mode="json", exclude_defaults=True),
        "state": "done",
        "started": "2026-01-01T00:00:00+00:00",
        "ended": "2026-01-01T01:30:00+00:00",
        "environment": {"notbugs": "0.1.0", "python": "3.11"},
        "nodes": {name: asdict(progress) for name, progress in done.items()},
    }


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store in which every node of EXPERIMENT is finished."""
    made = Store(str(tmp_path_factory.mktemp("store")))
    for node in build(parse(EXPERIMENT)):
        leave(made, node)
    return made


@pytest.fixture(scope="module")
def run() -> dict[str, Any]:
    """The record of a run that made everything except one model, which was cached."""
    made = record(build(parse(EXPERIMENT)))
    made["nodes"]["models/standard"] |= {"state": "cached", "seconds": None, "images": 0}
    return made


@pytest.fixture(scope="module")
def whole(store: Store, run: dict[str, Any]) -> str:
    """The page of a run with content for every section."""
    return store.read(page.write(store, run).path).decode()


def small(*names: str) -> dict[str, Any]:
    """EXPERIMENT with one evaluation, of these models."""
    return {**EXPERIMENT, "evaluations": {"accuracy": {"models": list(names), "on": "clean"}}}


def render(path: Path, experiment: dict[str, Any], accuracy: Mapping[str, float] = ACCURACY, **about: Any) -> str:
    """The page of a run of an experiment whose evaluations are finished."""
    store, nodes = Store(str(path)), build(parse(experiment))
    for node in nodes:
        if node.group == "evaluations":
            leave(store, node, accuracy)
    return page.render(store, record(nodes, experiment) | about)


def lines_of(html: str) -> list[list[str]]:
    """The cells of each line of the page's tables."""
    plain = html.replace("\u00a0", " ").replace("<wbr>", "")
    return [re.findall(r"<td[^>]*>([^<]*)</td>", line) for line in re.split("<tr[^>]*>", plain)]


class Seen(HTMLParser):
    """The parts of the page that a reader sees: tags, text, headings, titles below them, captions."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.headings: list[str] = []
        self.titles: list[str] = []
        self.captions: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "figcaption":
            self.captions.append("")

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.tags and self.tags[-1][0] == "h2" and data.strip():
            self.headings.append(data)
        if self.tags and self.tags[-1][0] == "h3" and data.strip():
            self.titles.append(data)
        if self.tags and self.tags[-1][0] == "figcaption":
            self.captions[-1] += data.strip()

    @property
    def text(self) -> str:
        return "".join(self.words).replace("\u00a0", " ")


# ----------------------------------------------------------------------------------------- what it says


def test_a_run_that_made_nothing_has_no_time(tmp_path):
    nodes = build(parse(small("from_rand")))
    made = {node.id: asdict(Progress(node.stage, node.version, "cached")) for node in nodes}
    text = Seen(render(tmp_path, small("from_rand"), nodes=made)).text
    assert f"{len(nodes)} nodes, of which this run made none." in text


def test_a_page_has_a_section_for_everything_that_the_run_left(whole):
    assert Seen(whole).headings == [
        "Results",
        "Look for yourself",
        "Class by class",
        "Leakage",
        "Sweeps",
        "Attack success rate",
        "Learning curves",
        "Robustness",
        "Transfer",
        "Features",
        "How it was made",
        "Environment",
    ]


def test_sections_without_data_are_left_out(tmp_path):
    seen = Seen(render(tmp_path, small("standard")))
    assert seen.headings == ["Results", "Robustness", "Transfer", "How it was made", "Environment"]


def test_the_verdict_names_the_strictest_learner_its_interval_and_chance(whole):
    text = Seen(whole).text
    assert "each under a wrong label, from_other classifies 90.0 % of the untouched test images correctly" in text
    assert (
        "(88.0 % – 92.0 %), where chance is 10.0 %: without the attack, from_control reaches 5.0 %; how much of the "
        "90.0 % is leakage is unknown without a leakage-only control."
    ) in text
    assert "The same labels on untouched images give 5.0 %: the labels alone do not explain the result." in text


def test_a_learner_at_chance_learned_nothing_and_labels_that_do_as_much_are_said_to(tmp_path):
    models = small("from_other", "from_control")
    nothing = Seen(render(tmp_path, models, {"from_other": 0.11, "from_control": 0.08})).text
    assert (
        "no better than chance; without the attack, from_control reaches 8.0 %, so there is no sign that it learned "
        "anything that generalises"
    ) in nothing
    assert "The same labels on untouched images" not in nothing, "there is no result to explain"
    constant = Seen(render(tmp_path, models, {"from_other": 0.13, "from_control": 0.12})).text
    assert "no better than a constant prediction (12.0 %); without the attack" in constant
    assert "from_control reaches 12.0 %, so there is no sign" in constant
    both = Seen(render(tmp_path, models, {"from_other": 0.11, "from_control": 0.01})).text
    assert "no better than chance. The perturbations raise it from the 1.0 % of from_control, which has" in both
    assert "an accuracy no higher than chance does not show that it recognises any class" in both
    text = Seen(render(tmp_path, models, {"from_other": 0.5, "from_control": 0.49})).text
    assert "the labels alone may explain the result" in text
    assert "without the attack, from_control reaches 49.0 %, so leakage alone may explain it" in text


def test_of_robust_versions_alone_the_verdict_compares_them_and_each_bar_has_a_name_of_its_own(tmp_path):
    """The verdict was about the standard model, and a model scored on two sets of images had two bars of one name."""
    versions = ["standard", "from_d_r", "from_d_nr"]
    experiment = {
        **EXPERIMENT,
        "datasets": EXPERIMENT["datasets"] | {"few": {"load": {"source": "cifar10", "limit": 2000}}},
        "evaluations": {"a": {"models": versions, "on": "few"}, "b": {"models": versions[1:], "on": "clean"}},
    }
    accuracy = {"standard": 0.9, "from_d_r": 0.8, "from_d_nr": 0.6}
    text = Seen(html := render(tmp_path, experiment, accuracy)).text
    assert (
        "Trained on robust features, from_d_r classifies 80.0 % of the test images correctly, 16.0 % under L2 ε 0.5, "
        "7 steps; on non-robust features, from_d_nr classifies 60.0 %, 12.0 % under L2 ε 0.5, 7 steps; on the images "
        "themselves, standard classifies 90.0 %, 18.0 %"
    ) in text
    assert text.count("Trained on robust features") == 1, "not once more as a remark"
    assert "3 models scored on 400 held-out images" in text
    for name in ("standard", "from_d_r, few/test", "from_d_r, clean/test", "from_d_nr, clean/test"):
        assert f">{name}</text>" in html, "a bar"


def test_features_are_claimed_only_where_leakage_alone_does_less(tmp_path):
    models = small("from_rand", "from_rand.leakage", "from_control")
    claim = "the perturbations contain features that generalise, worth"
    said = {
        accuracy: Seen(render(tmp_path, models, {"from_rand": 0.8, "from_rand.leakage": accuracy})).text
        for accuracy in (0.7, 0.77, 0.85)
    }
    assert claim in said[0.7] and claim not in said[0.77]
    assert f"{claim} 10.0 points beyond the 70.0 % of leakage alone." in said[0.7]
    assert "Leakage alone gives 85.0 %, 5.0 points more." in said[0.85]
    assert "without the attack, from_rand.leakage reaches 77.0 %, so leakage alone may explain it" in said[0.77]
    assert claim not in Seen(render(tmp_path, small("from_rand"))).text


def learned(
    path: Path, monkeypatch: pytest.MonkeyPatch, fits: Sequence[float], accuracy: Mapping[str, float]
) -> tuple[Store, dict[str, Any]]:
    """The store and the record of a run of these models; from_other fits such shares of its labels, epoch by epoch."""
    lines = "".join(json.dumps({"epoch": number, "accuracy": fit}) + "\n" for number, fit in enumerate(fits, 1))
    monkeypatch.setattr(sys.modules[__name__], "epochs", lines.encode)
    store, nodes = Store(str(path)), build(parse(small(*accuracy)))
    for node in nodes:
        if node.group == "evaluations" or node.name == "from_other":
            leave(store, node, accuracy)
    return store, record(nodes, small(*accuracy))


@pytest.mark.parametrize(
    ("fit", "said"), [(0.54, "fits only 54.0 % of its own training labels"), (0.56, "no better than chance")]
)
def test_a_learner_that_does_not_fit_its_own_labels_gives_no_conclusion(tmp_path, monkeypatch, fit, said):
    store, run = learned(tmp_path, monkeypatch, (0.9, fit), {"from_other": 0.11})
    found = verdict.verdict(RunResults(store, run).held_out)
    assert found is not None and said in found and ("inconclusive" in found) == (fit < 0.55)
    html = page.render(store, run)
    plain = re.sub(r"<(pre|script|style)\b.*?</\1>", "", html, flags=re.DOTALL)
    assert "`" not in plain and ("raise its <code>epochs</code>" in plain) == (fit < 0.55)


@pytest.mark.parametrize(("before", "learning"), [(0.502, True), (0.68, False)])
def test_a_learner_whose_training_ended_while_it_still_learned_gives_no_conclusion(
    before, learning, tmp_path, monkeypatch
):
    """A ResNet-18 went from 50.2 to 70.6 % of its labels in its last epoch, and was said to have learned nothing."""
    text = Seen(page.render(*learned(tmp_path, monkeypatch, (before, 0.706), {"from_other": 0.06}))).text
    assert ("it was still learning its own training labels when its training ended (50.2 %" in text) == learning
    assert ("70.6 % after the last), so the result is inconclusive" in text) == learning
    assert ("no sign that it learned anything" in text) != learning


@pytest.mark.parametrize("accuracy", [0.5, 0.8])
def test_of_a_poor_source_model_and_its_unfitted_learner_the_source_is_to_be_mended_first(
    accuracy, tmp_path, monkeypatch
):
    store, run = learned(tmp_path, monkeypatch, (0.3, 0.4), {"standard": accuracy, "from_other": 0.11})
    said = " ".join(remark.text for remark in verdict.remarks(RunResults(store, run).held_out))
    assert ("Train it longer" in said) == (accuracy == 0.5)
    assert ("raise its `epochs`" in said) == (accuracy == 0.8)


def test_a_poor_source_model_is_named_before_the_learner_is_blamed(tmp_path):
    """A checkpoint without its normalisation: the page advised more epochs for the learner, and named no source."""
    models = small("standard", "from_other")
    said = {
        accuracy: Seen(render(tmp_path / str(accuracy), models, {"standard": accuracy, "from_other": 0.1})).text
        for accuracy in (0.11, 0.5, 0.8)
    }
    claim = "The source model, standard, classifies"
    assert f"{claim} 11.0 % correctly, no better than chance, so" in said[0.11]
    assert (
        f"{claim} 50.0 % correctly, so its perturbations carry only the few features that it has learned" in said[0.5]
    )
    assert claim not in said[0.8]
    assert "has learned. Train it longer." in said[0.5]
    loaded = {"pretrained": {"arch": "resnet18", "weights": "w.pt", "shape": [3, 32, 32]}}
    models["models"] = models["models"] | {"standard": loaded}
    text = Seen(render(tmp_path / "loaded", models, {"standard": 0.5, "from_other": 0.1})).text
    assert "has learned. If it was better before, check mean, std and outputs." in text


@pytest.mark.parametrize(
    ("success", "accuracy", "said"),
    [
        (0.85, 0.11, "Double its `eps` for a start, or raise its `steps`."),
        (0.85, 0.5, None),
        (0.95, 0.11, "What is left to try: the source model's network for from_other, `arch: resnet18`; `views: 4`"),
        (0.95, 0.5, None),
    ],
)
def test_a_learner_at_chance_is_told_what_to_try_next(success, accuracy, said, tmp_path, monkeypatch):
    """Three runs on a newcomer's photographs were no better than chance, and nothing said what to do."""
    experiment = small("standard", "from_other")
    experiment["models"] = experiment["models"] | {"standard": learner("clean", arch="resnet18")}
    store, nodes, facts = Store(str(tmp_path)), build(parse(experiment)), manifest
    rate = {"success_rate": success}
    monkeypatch.setattr(sys.modules[__name__], "manifest", lambda node, files: facts(node, files) | rate)
    for node in nodes:
        leave(store, node, {"standard": 0.9, "from_other": accuracy})
    advised = verdict.advice(RunResults(store, record(nodes, experiment)).held_out)
    assert advised is None if said is None else said in str(advised)


@pytest.mark.parametrize(("accuracy", "said"), [(0.15, True), (0.2, False), (0.11, False)])
def test_an_interval_that_begins_close_to_chance_asks_for_seeds(accuracy, said, tmp_path):
    """Of two runs on a newcomer's photographs one was a little above chance and one was not."""
    text = Seen(render(tmp_path, small("from_other"), {"from_other": accuracy})).text
    assert ("That of from_other begins close to" in text) == said


@pytest.mark.parametrize(
    ("accuracy", "said"),
    [
        (0.5, "the source model, standard, classifies 90.0 %; from_other recovers 50 % of its accuracy above chance."),
        (0.95, "the source model, standard, classifies 90.0 %."),
        (0.1, None),
    ],
)
def test_a_learner_is_held_against_its_source_model(accuracy, said, tmp_path):
    """Newcomers asked whether 38 % is good. Chance is 10 %."""
    text = Seen(render(tmp_path, small("standard", "from_other"), {"standard": 0.9, "from_other": accuracy})).text
    assert ("For scale:" in text) == (said is not None) and (said is None or f"For scale: {said}" in text)


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ((0.06, 0.94, 0.06), True),
        ((0.37, 0.86, 0.35), False),
        ((0.0, 0.0, 0.0), False),
        ((0.5, None, 0.1), True),
    ],
)
def test_a_learner_that_is_right_about_one_class_alone_is_told_of(shares, said, tmp_path, monkeypatch):
    """A newcomer's learner answered one class for nearly every photograph, and the page said that all was in order."""
    classes = {
        name: {"accuracy": share, "n": 50 * (share is not None)} for name, share in zip("abc", shares, strict=True)
    }
    given = rows
    monkeypatch.setattr(
        sys.modules[__name__], "rows", lambda *asked: [row | {"per_class": classes} for row in given(*asked)]
    )
    experiment, store = small("from_other"), Store(str(tmp_path))
    for node in (nodes := build(parse(experiment))):
        leave(store, node, {"from_other": 0.35})
    scores = RunResults(store, record(nodes, experiment)).held_out
    for text in (str(verdict.advice(scores)), " ".join(remark.text for remark in verdict.remarks(scores))):
        assert ("Most correct answers of from_other are of one class" in text) == said
    if shares[0] == 0.06:
        assert "it classifies 94.0 % of `b` correctly and 6.0 % of the others" in text


def test_what_robust_features_explain_is_said(tmp_path):
    shares = {"from_rand": 0.6, "from_rand.robust-source": 0.4, "from_rand.probe": 0.3}
    text = Seen(render(tmp_path, small(*shares), shares)).text
    assert "The same attack on a robust source model, which moves robust features, gives 40.0 %." in text
    assert "A linear layer on a robust model's features, trained on the same images, gives 30.0 %." in text


@pytest.mark.parametrize(
    ("learner", "accuracy", "said"),
    [("from_other", 0.05, True), ("from_other", 0.09, False), ("from_rand", 0.05, False)],
)
def test_below_chance_is_explained_where_no_label_is_right(learner, accuracy, said, tmp_path):
    text = Seen(render(tmp_path, small(learner), {learner: accuracy})).text
    sentence = "as no label of other is right, from_other learned which class an image is not, but not which it is."
    assert (sentence in text) == said, "0.09 has 0.1 in its interval; one label in ten of rand is right"


def test_an_attack_that_seldom_reached_its_target_is_said(store, run, monkeypatch):
    scores, claim = RunResults(store, run).held_out, "The attack reached its target for only 98.0 % of the images"
    assert not [remark for remark in verdict.remarks(scores) if claim in remark.text]
    monkeypatch.setattr(verdict, "LOW_SUCCESS", 0.99)
    assert [remark for remark in verdict.remarks(scores) if claim in remark.text]


def test_what_is_missing_is_named_with_what_to_add_and_what_is_added_makes_it(tmp_path):
    experiment = {**small("from_other"), "models": {k: EXPERIMENT["models"][k] for k in ("standard", "from_other")}}
    experiment["datasets"] = {name: EXPERIMENT["datasets"][name] for name in ("clean", "other")}
    html = render(tmp_path, experiment)
    text = Seen(html).text
    assert "The test set has only 400 images: a difference of less than about 2.8 points" in text
    control, seeds = (yaml.safe_load(part) for part in re.findall("<pre[^>]*>([^<]*)</pre><button", html)[:2])
    assert seeds == {"seeds": [0, 1, 2]}
    evaluations = experiment["evaluations"] | control
    made = {node.id for node in build(parse({**experiment, **seeds, "evaluations": evaluations}))}
    assert {"models/from_other.leakage@seed=0", "models/from_other.leakage@seed=2"} <= made
    with_control = Seen(render(tmp_path, small("from_rand", "from_rand.leakage"), {"from_rand.leakage": 0.05})).text
    assert "leakage alone gives 5.0 %, below chance" in with_control
    assert "No control shows" not in with_control


@pytest.mark.parametrize("accuracy", [0.1, 0.5, 0.9, 1.0])
def test_the_difference_that_may_be_chance_is_that_of_two_models_of_this_accuracy(store, run, accuracy):
    """It was that of two models of 90 %, whatever the accuracy."""
    n, (score,) = 400, [s for s in RunResults(store, run).held_out if s.model == "from_other"]
    low, high = wilson(round(accuracy * n), n)
    scored = replace(score, rows=[{**score.rows[0], "accuracy": accuracy, "low": low, "high": high, "n": n}])
    (points,) = re.findall(r"less than about ([\d.]+) points", " ".join(r.text for r in verdict.remarks([scored])))
    one, other = np.random.default_rng(0).binomial(n, accuracy, (2, 50_000)) / n
    measured = 100 * float(np.quantile(np.abs(one - other), 0.95))
    assert float(points) == pytest.approx(measured, rel=0.1) if accuracy < 1 else 0 < float(points) < 2


def test_terms_are_explained_where_they_stand(whole):
    text = Seen(whole).text
    assert "Adversarial image: an image altered pixel by pixel" in re.sub(r"\s+", " ", text)
    assert "Features that generalise:" not in text  # the verdict does not use the term


def csv_of(html: str, name: str) -> list[dict[str, str]]:
    """The rows of a CSV file in the page."""
    (url,) = re.findall(f'download="{re.escape(name)}.csv" href="data:text/csv;charset=utf-8;base64,([^"]*)"', html)
    return list(csv.DictReader(io.StringIO(base64.b64decode(url).decode())))


def test_the_first_picture_has_the_learners_first_and_chance_and_controls_as_lines(whole):
    rows = csv_of(whole, "accuracy")
    names = [row["name"] for row in rows]
    assert names[:2] == ["from_other", "from_rand"] and names[-2:] == ["chance", "control: from_control"]
    assert rows[0] | {"clean accuracy": "0.9", "low": "0.88"} == rows[0]
    assert "from_control" not in names and not any("@" in name for name in names)
    assert whole.index("<svg") < whole.index('class="verdict"') < whole.index("Ilyas")


def test_the_first_picture_of_a_sweep_has_its_learners_and_not_those_of_another(tmp_path):
    """It once had the source model alone."""
    swept = {f"swept@eps={eps}": learner("rand") for eps in (0.5, 1.0)}
    others = {f"others@steps={steps}": learner("rand", epochs=7) for steps in (1, 2)}
    experiment = small("standard", *swept, *others)
    experiment["models"] = {**EXPERIMENT["models"], **swept, **others}
    names = [row["name"] for row in csv_of(render(tmp_path, experiment), "accuracy")]
    assert names == [*others, "standard", "chance"], "the last is the verdict's"


def test_every_learner_of_relabelled_images_is_blue_however_they_were_perturbed(tmp_path):
    """Universal perturbations left a grey bar under a caption that called it blue."""
    experiment = small("standard", "from_other")
    blue = {}
    for method in ("pgd", "universal"):
        other = {"attack": {**ATTACK, "method": method}, "relabel": "other"}
        experiment["datasets"] = {**EXPERIMENT["datasets"], "other": other}
        html = render(tmp_path / method, experiment)
        picture = html[html.index("<svg") : html.index("</svg>")]
        blue[method] = picture.count("fill: var(--c0)")
    assert blue["universal"] == blue["pgd"] > 0


def test_a_published_figure_is_a_mark_only_on_the_same_data_network_and_setting(tmp_path):
    experiment = small("from_rand")
    alike = {"attack": {**ATTACK, "eps": 0.5, "steps": 100}, "relabel": "random"}
    experiment["datasets"] = {**EXPERIMENT["datasets"], "rand": alike}
    experiment["models"] = {**EXPERIMENT["models"], "from_rand": learner("rand", arch="resnet50")}
    marks = [row for row in csv_of(render(tmp_path, experiment), "accuracy") if "published" in row["name"]]
    assert [(row["name"], row["clean accuracy"]) for row in marks] == [("from_rand, published", "0.633")]
    for change in ({"models": EXPERIMENT["models"]}, {"datasets": EXPERIMENT["datasets"]}):
        assert "from_rand, published" not in str(csv_of(render(tmp_path, {**experiment, **change}), "accuracy"))


def test_classes_confusions_and_targets_have_their_shares_as_a_matrix_or_for_many_classes_as_a_list(
    store, run, whole, monkeypatch
):
    shares = csv_of(whole, "per-class")[0]
    assert shares | {"from_other": "0.9", "from_d_r": "0.8"} == shares and "from_control" in shares, (
        "a control is shown beside its learner"
    )
    confused, targets = csv_of(whole, "confusion-from_other")[3], csv_of(whole, "targets-other")
    assert (confused["class 3"], confused["class 4"], confused["class 5"]) == ("0.9", "0.1", "0.0")
    assert (targets[2]["class 3"], targets[3]["class 4"], targets[3]["class 5"]) == ("1.0", "0.0", "")
    assert '<td style="--share: 0.90">90</td>' in whole
    monkeypatch.setattr(per_class, "CLASSES", 5)
    listed = per_class.per_class(RunResults(store, run))
    assert listed is not None and not listed.matrices
    titles = {table.title: table.lines for table in listed.tables}
    assert ["class 3", "class 4", "4", "10.0 %"] in titles["Confusions of from_other: the 10 most frequent pairs"]
    assert any(line[:2] == ["class 3", "90.0 %"] for lines in titles.values() for line in lines)


def test_the_experiment_stands_as_it_was_written_beside_the_one_with_all_defaults(tmp_path):
    experiment = small("standard")
    html = render(tmp_path, experiment, written="name: whole  # <as I wrote it>\n")
    written, defaults = re.findall("<pre[^>]*>([^<]*)</pre><button", html)[-2:]
    assert written == "name: whole  # &lt;as I wrote it&gt;\n"
    whole = yaml.safe_load(unescape(defaults))
    assert whole["models"]["standard"]["train"]["batch_size"] == 128 and build(parse(whole)) == build(parse(experiment))


def test_every_figure_has_its_numbers_and_the_command_that_draws_it_again(whole):
    figures = re.findall("<figure>(.*?)</figure>", whole, re.DOTALL)
    assert len(figures) > 8
    for figure in figures:
        assert figure.count("<figcaption>") == 1 and figure.count('.csv" href="data:text/csv') == 1
        assert "notbugs report 20260101-000000-whole-0000" in figure
    steps = [row for row in csv_of(whole, "attack-success") if row["line"] == "rand"]
    assert float(steps[5]["attack success rate"]) == pytest.approx(0.54)


def test_without_learners_the_verdict_is_the_best_model(tmp_path):
    text = Seen(render(tmp_path, small("standard", "robust"), {"robust": 0.7})).text
    assert "classifies 80.0 % of the test images correctly, where chance is 10.0 %, and a constant prediction" in text
    assert "Is that the accuracy you know it for?" not in text


def test_a_checkpoint_that_is_scored_alone_is_to_be_as_accurate_as_it_is_known_to_be(tmp_path):
    """Without its normalisation a newcomer's had 47 % in place of 72 %, well above chance: nothing looked wrong."""
    models = small("standard")
    loaded = {"pretrained": {"arch": "resnet18", "weights": "w.pt", "shape": [3, 32, 32]}}
    models["models"] = models["models"] | {"standard": loaded}
    text = Seen(render(tmp_path, models, {"standard": 0.47})).text
    assert "Is that the accuracy you know it for? If not, check mean, std and the order of its classes." in text


def test_published_figures_stand_beside_what_a_model_is_whatever_it_is_called(tmp_path):
    experiment = small("zebra")
    experiment["models"] = {**EXPERIMENT["models"], "zebra": EXPERIMENT["models"]["from_rand"]}
    assert "63.3 % ResNet-50, L2 ε 0.5, 100 steps of 0.1, Ilyas et al. 2019" in Seen(render(tmp_path, experiment)).text
    experiment["datasets"] = {**EXPERIMENT["datasets"], "clean": {"load": {"source": "sklearn-digits"}}}
    text = Seen(render(tmp_path, experiment)).text
    assert (
        "63.3 % CIFAR-10, ResNet-50, L2 ε 0.5, 100 steps of 0.1, Ilyas et al. 2019" in text
        and "a guide, not a comparison" in text
    )


def test_answers_under_another_rule_have_published_figures_beside_them(tmp_path):
    experiment = small("zebra", "standard")
    experiment["datasets"] = {**EXPERIMENT["datasets"], "det": {"attack": ATTACK, "relabel": "next"}}
    experiment["models"] = {**EXPERIMENT["models"], "zebra": learner("det")}
    html = render(tmp_path, experiment).replace("\u00a0", " ")
    assert "agrees with next" in html
    assert "16.2 % ResNet-50, L2 ε 0.5, 100 steps of 0.1, Ilyas et al. 2019" in html


def test_a_figure_of_the_same_settings_has_none_beside_it_and_ours_are_said(tmp_path):
    experiment = small("from_rand")
    alike = {"attack": {**ATTACK, "eps": 0.5, "steps": 100}, "relabel": "random"}
    experiment["datasets"] = {**EXPERIMENT["datasets"], "rand": alike}
    html = render(tmp_path, experiment).replace("\u00a0", " ")
    assert (
        "63.3 % ResNet-50, Ilyas et al. 2019" in html
        and ">small_cnn, L2 ε 0.5, 100 steps of 0.1, 4 epochs</td>" in html
    )


def test_a_set_of_another_norm_has_no_published_figures(tmp_path):
    experiment = small("from_rand")
    other = {"attack": {**ATTACK, "norm": "linf", "eps": 0.03}, "relabel": "random"}
    experiment["datasets"] = {**EXPERIMENT["datasets"], "rand": other}
    html = render(tmp_path, experiment).replace("\u00a0", " ")
    assert ">small_cnn, L∞ ε 0.03, 10 steps of 0.006, 4 epochs</td>" in html and "63.3 %" not in html


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        ({}, "15.3 % ResNet-50, Engstrom et al. 2019"),
        ({"rotation": 5.0}, None),
        ({"translation": 0.0}, None),
        ({"tries": 9}, None),
        ({"search": "random", "tries": 10}, "39.9 % ImageNet, ResNet-18, Engstrom et al. 2019"),
        ({"search": "random", "tries": 100}, None),
    ],
)
def test_a_spatial_figure_stands_beside_its_own_space_only(tmp_path, monkeypatch, attack, said):
    made = {**under_attack(0.8)[-1], **attack}
    monkeypatch.setattr(sys.modules[__name__], "under_attack", lambda accuracy: [made])
    (line,) = [line for line in lines_of(render(tmp_path, small("standard"))) if any("±" in cell for cell in line)]
    assert line[5] == (said or "–")


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        ({"steps": 7}, "70.90 % ResNet-50, Ilyas et al. 2019"),
        ({"steps": 20, "restarts": 5}, "70.90 % ResNet-50, under 7 steps, Ilyas et al. 2019"),
        ({"attack": "apgd"}, "–"),
        ({"norm": "linf"}, "–"),
        ({"eps": 0.75}, "–"),
    ],
)
def test_a_robust_accuracy_is_published_of_the_same_attack_whose_steps_are_said_where_they_differ(
    tmp_path, monkeypatch, attack, said
):
    made = {**under_attack(0.8)[1], **attack}
    monkeypatch.setattr(sys.modules[__name__], "under_attack", lambda accuracy: [made])
    (line,) = [line for line in lines_of(render(tmp_path, small("robust"))) if any(" steps" in c for c in line[1:2])]
    assert line[5] == said


def test_what_is_scored_on_other_than_held_out_images_is_named_and_judged_by_nowhere(tmp_path):
    experiment = small("from_other")
    memorised = {"models": ["from_other", "from_rand", "from_rand.leakage"], "on": "other", "split": "train"}
    experiment["evaluations"] = {"memorised": memorised, **experiment["evaluations"]}
    html = render(tmp_path, experiment, {"from_rand": 1.0})
    text = Seen(html).text
    assert (
        "from_other classifies 80.0 % of the untouched test images correctly" in text
        and "from_rand classifies" not in text
    )
    assert "Leakage" not in Seen(html).headings
    assert (
        "1 model scored on 400 held-out images with their true labels" in text
        and "3 lines are of modified images" in text
    )
    lines = [line for line in lines_of(html) if "other/train" in line]
    assert {line[0] for line in lines} == {"from_other", "from_rand", "from_rand.leakage"}
    assert not any("Ilyas" in cell or "Jordan" in cell for line in lines for cell in line)
    assert "clean accuracy</th>" not in html


def test_a_split_that_was_trained_on_is_no_test(tmp_path):
    experiment = small("standard")
    experiment["evaluations"]["accuracy"]["split"] = "train"
    text = Seen(render(tmp_path, experiment)).text
    assert "images correctly" not in text and "clean/train" in text


def test_a_split_of_another_name_is_named(tmp_path):
    experiment = small("from_other")
    experiment["evaluations"]["accuracy"]["split"] = "val"
    assert "of the untouched val images correctly" in Seen(render(tmp_path, experiment)).text


def test_answers_under_a_rule_are_told_whichever_evaluation_asked_for_them(tmp_path, monkeypatch):
    experiment = small("zebra")
    experiment["datasets"] = {**EXPERIMENT["datasets"], "det": {"attack": ATTACK, "relabel": "next"}}
    experiment["models"] = {**EXPERIMENT["models"], "zebra": learner("det")}
    for rule in ("next", "other"):
        experiment["evaluations"][rule] = {"models": ["zebra"], "on": "clean", "agreement": rule}
    as_it_was = rows

    def asked(node: Node, accuracy: Mapping[str, float]) -> list[dict[str, Any]]:
        made = as_it_was(node, accuracy)
        for row in made:
            rule = node.recipe.agreement
            row |= {"agreement": {**row["agreement"], "rule": rule.rule, "accuracy": 0.25}} if rule else {}
            if rule is None:
                del row["agreement"]
        return made

    monkeypatch.setattr(sys.modules[__name__], "rows", asked)
    html = render(tmp_path, experiment)
    told, folded = [line for line in lines_of(html[: html.index("Robustness</h2>")]) if line[:1] == ["zebra"]]
    assert told.count("25.0 %") == 2 and any("16.2 %" in cell for cell in folded)


def test_rows_that_differ_in_the_seed_alone_are_one_with_mean_and_deviation(whole):
    text = Seen(whole).text
    assert "60.0 ± 14.1 %" in text and "2 seeds" in text
    assert "from_swept: 80.0 ± 0.0 % at steps 1, 80.0 ± 0.0 % at 100, highest 80.0 ± 0.0 % at 1" in text


def test_average_and_worst_case_stand_in_one_row_with_what_was_published(whole):
    (line,) = [line for line in lines_of(whole) if line[:1] == ["robust"] and any("L2 ε 0.25" in cell for cell in line)]
    assert line[2:4] == ["80.0 %", "40.0 %"]
    assert "82.48 % ResNet-50, Ilyas et al. 2019" in line[5]


def test_models_are_compared_under_the_largest_radius_whatever_was_evaluated_first(tmp_path, monkeypatch):
    experiment = small("standard", "from_d_r")
    experiment["evaluations"] = {"a-rotation": {"models": ["standard"], "on": "clean"}, **experiment["evaluations"]}
    ball, space, made = under_attack(0.8)[1], under_attack(0.8)[-1], rows
    monkeypatch.setattr(
        sys.modules[__name__],
        "rows",
        lambda node, accuracy: [
            row | {"under_attack": [space if node.name == "a-rotation" else ball]} for row in made(node, accuracy)
        ],
    )
    text = Seen(render(tmp_path, experiment)).text
    assert (
        "from_d_r classifies 80.0 % of the test images correctly, 16.0 % under L2 ε 0.5, 7 steps; on the images "
        "themselves, standard classifies 80.0 %, 16.0 % under L2 ε 0.5, 7 steps."
    ) in text
    assert "80.0 % on average (noise of length ε, clipped to [0, 1]) and 16.0 % under L2 ε 0.5" in text


def test_a_curve_shows_the_worse_of_two_attacks_of_the_same_radius(tmp_path, monkeypatch):
    twice = [{**under_attack(0.8)[0], "accuracy": accuracy} for accuracy in (0.3, 0.1, 0.2)]
    monkeypatch.setattr(sys.modules[__name__], "under_attack", lambda accuracy: twice)
    assert "At the largest radius, 0.25: standard 10.0 %." in Seen(render(tmp_path, small("standard"))).text


SEEDED: dict[str, Any] = {
    "name": "seeded",
    "seeds": [0, 1],
    "datasets": {"clean": {"load": {"source": "cifar10"}}, "rand": {"attack": ATTACK, "relabel": "random"}},
    "models": {
        "standard": learner("clean"),
        "bigger": learner("clean", arch="resnet18"),
        "from_rand": learner("rand"),
        "bigger_from_rand": learner("rand", arch="resnet18"),
    },
    "evaluations": {
        "learners": {"models": ["from_rand", "bigger_from_rand"], "on": "clean"},
        "transfer": {
            "models": ["standard", "bigger"],
            "on": "clean",
            "attacks": [{"eps": 0.5, "surrogate": ["standard", "bigger"]}],
        },
    },
}

FOOLED = {("standard", "standard"): 0.8, ("standard", "bigger"): 0.3, ("bigger", "bigger"): 0.9}


def carried_over(node: Node, model: Node) -> list[dict[str, Any]]:
    """Transfer attacks with success rate FOOLED, 10 points more with seed 1, and none on a model of another seed."""
    base = {**under_attack(0.5)[2], "target_rule": None}
    found = []
    for threat in node.recipe.attacks:
        (source, _, seed), (name, _, own) = threat.surrogate.partition("@"), model.name.partition("@")
        fooled = FOOLED.get((source, name), 0.1) + 0.1 * (seed == "seed=1")
        found.append({**base, "surrogate": threat.surrogate, "fooled": fooled if seed == own else 0.0})
    return found


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_learning_curves_and_bars_say_which_seeds_they_are_of(seeds, tmp_path):
    """Curves of seed 0 stood unlabelled below a mean of three, and a checkpoint's interval was called a deviation."""
    experiment = {**SEEDED, "seeds": seeds, "evaluations": {"learners": SEEDED["evaluations"]["learners"]}}
    store, nodes = Store(str(tmp_path)), build(parse(experiment))
    for node in nodes:
        leave(store, node, {})
    text = Seen(page.render(store, record(nodes, experiment))).text
    assert ("epoch by epoch. The first seed's." in text) == (len(seeds) > 1)
    assert ("is one standard deviation over the seeds to each side." in text) == (len(seeds) > 1)
    assert ("is the 95 % interval." in text) == (len(seeds) == 1)


def carried(path: Path, experiment: dict[str, Any]) -> str:
    """The page of a run with transfer attacks."""
    store, nodes = Store(str(path)), build(parse(experiment))
    for node in nodes:
        if node.group == "evaluations":
            models = [parent for role, parent in node.inputs.items() if role.startswith("models.")]
            made = [
                row | {"under_attack": carried_over(node, m)} for row, m in zip(rows(node, {}), models, strict=True)
            ]
            store.put_json(f"{node.folder}/result.json", {"rows": made})
    return page.render(store, record(nodes, experiment)).replace("\u00a0", " ")


def test_transfer_is_told_over_seeds_each_model_under_attacks_on_its_own(tmp_path):
    html = carried(tmp_path, SEEDED)
    assert ["bigger", "35.0 ± 7.1 %", "95.0 ± 7.1 %"] in lines_of(html)
    assert "transfer least to resnet18, 35.0 %" in html and "most to small_cnn, 85.0 %" in html


def test_figure_3_is_of_held_out_images(tmp_path):
    seen = {}
    for split in ("test", "train"):
        learners = {**SEEDED["evaluations"]["learners"], "split": split}
        seen[split] = carried(tmp_path, {**SEEDED, "evaluations": {**SEEDED["evaluations"], "learners": learners}})
    assert "transfer least to" in seen["test"] and "transfer least to" not in seen["train"]


def test_features_are_useful_from_the_threshold_of_their_class_on_and_robust_above_zero(tmp_path, monkeypatch):
    drawn: list[Any] = []
    monkeypatch.setattr(sections.charts, "scatter", lambda *args, **more: drawn.append((args, more)) or "<svg></svg>")
    row = useful(next(node for node in build(parse(EXPERIMENT)) if node.name == "standard"))
    row["useful_from"] = [0.06, 0.01, None, *[0.03] * 7]
    row["points"] = [[0, 0, 0.05, 0.01], [0, 1, 0.05, 0.01], [1, 0, 0.3, 0.0], [1, 1, 0.012, -0.06]]
    monkeypatch.setattr(sys.modules[__name__], "useful", lambda model: row)
    render(tmp_path, {**EXPERIMENT, "evaluations": {"features": EXPERIMENT["evaluations"]["features"]}})
    (((_, _, groups, *_), more),) = drawn
    assert groups == {
        "useful and robust": [(0.05, 0.01)],
        "useful, not robust": [(0.3, 0.0), (0.012, -0.06)],
        "useless": [(0.05, 0.01)],
    }
    assert more == {"vertical": [0.01, 0.06], "horizontal": [0.0]}


def test_the_leakage_panel_says_how_much_leakage_alone_gives(whole):
    assert "Leakage alone gives 70.0 %, 10.0 points less." in Seen(whole).text


def test_a_target_rate_is_told_from_before_the_first_step_to_the_last(whole):
    assert "rand: 10.0 % before the first step, half by step 5, 80.4 % by step 10." in Seen(whole).text


def test_a_model_that_scored_the_same_in_two_evaluations_stands_once_in_the_results(tmp_path):
    experiment = small("standard")
    experiment["evaluations"]["again"] = experiment["evaluations"]["accuracy"]
    html = render(tmp_path, experiment)
    assert html[: html.index("Published figures, networks")].count(">standard</td>") == 1


def test_a_failed_run_says_so_first_and_why(tmp_path):
    experiment = small("from_other")
    nodes = record(build(parse(experiment)), experiment)["nodes"]
    nodes["datasets/rand"] |= {"state": "failed", "why": "3 of 4 shards failed: <disk> full"}
    nodes["models/from_rand"] |= {"state": "waiting", "why": "needs datasets/rand"}
    text = Seen(render(tmp_path, experiment, state="failed", nodes=nodes)).text
    assert f"This run failed: {len(nodes) - 2} of {len(nodes)} nodes are finished" in text
    assert text.index("This run failed") < text.index("datasets/rand failed: 3 of 4 shards failed: <disk> full")
    assert text.index("models/from_rand waiting: needs datasets/rand") < text.index("Trained only on")


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"state": "running", "ended": None}, "This run is not finished: "),
        ({"state": "interrupted"}, "This run was interrupted: "),
        ({"state": "lost", "why": "no sign of life for 90 s"}, "was lost, no sign of life for 90 s: "),
    ],
)
def test_a_run_that_is_not_done_says_how_it_stands(tmp_path, about, said):
    assert said in Seen(render(tmp_path, small("standard"), **about)).text


def test_a_run_that_made_nothing_has_a_page(tmp_path, run):
    nodes = {name: {**progress, "state": "waiting", "seconds": None} for name, progress in run["nodes"].items()}
    seen = Seen(page.render(Store(str(tmp_path)), run | {"state": "failed", "nodes": nodes}))
    assert "Finished: nothing. There is no accuracy yet" in seen.text
    assert seen.headings == ["How it was made", "Environment"]


def test_what_was_there_already_has_its_date_and_a_training_its_speed(whole):
    assert "there, made 2026-01-01 00:00" in Seen(whole).text and ">1,234</td>" in whole


def test_a_graph_is_drawn_up_to_a_size_and_said_to_be_left_out_beyond(tmp_path):
    experiment = small("standard")
    nodes = len(build(parse(experiment)))
    experiment["datasets"] = dict(EXPERIMENT["datasets"])
    assert "is not drawn" not in Seen(render(tmp_path, experiment)).text
    experiment["datasets"] |= {f"more{i}": {"load": {"source": "cifar10"}} for i in range(sections.BOXES)}
    html = render(tmp_path, experiment)
    boxes = len({name.partition("@")[0] for name in (node.id for node in build(parse(experiment)))})
    assert nodes < sections.BOXES < boxes and '<svg class="graph"' not in html
    assert f"The graph is not drawn: it has {boxes} boxes, and only {sections.BOXES} are readable." in Seen(html).text


def test_a_graph_of_the_preset_of_the_paper_is_drawn():
    preset = read(Path(__file__).parents[3] / "configs" / "paper-cifar10.yaml")
    assert len(build(preset)) <= sections.BOXES


def test_axes_of_lengths_in_pixels_have_their_unit(tmp_path):
    experiment = small(*(f"swept@eps={eps}" for eps in (0.5, 1.0)))
    experiment["models"] = {**EXPERIMENT["models"], **{f"swept@eps={eps}": learner("rand") for eps in (0.5, 1.0)}}
    html = render(tmp_path, experiment)
    assert "eps, pixel units of [0, 1]" in html and "L2 radius, pixel units of [0, 1]" in html
    assert "noise of length ε, clipped to [0, 1]" in html and "same size" not in html


def test_a_large_run_makes_no_large_page(tmp_path):
    places = [f"@steps={steps},eps={eps}" for steps in range(1, 21) for eps in range(1, 16)]
    experiment = small("standard", *(f"from_swept{at}" for at in places))
    experiment["datasets"] = {"clean": EXPERIMENT["datasets"]["clean"]}
    experiment["datasets"] |= {f"swept{at}": {"attack": ATTACK, "relabel": "next"} for at in places}
    experiment["models"] = {"standard": EXPERIMENT["models"]["standard"]}
    experiment["models"] |= {f"from_swept{at}": learner(f"swept{at}") for at in places}
    html = render(tmp_path, experiment)
    assert len(html) < 3_000_000
    assert "101 more rows" in html


# --------------------------------------------------------------------------------------- it stands alone


def test_nothing_is_fetched_from_elsewhere_and_no_script_runs_but_the_projects_own(whole):
    tags = Seen(whole).tags
    links = [attrs[key] for _, attrs in tags for key in ("src", "href") if key in attrs]
    assert links and all(str(link).startswith(("data:", "#")) for link in links)
    assert not {"iframe", "object"} & {tag for tag, _ in tags}
    assert not any(key.startswith("on") for _, attrs in tags for key in attrs)
    assert re.findall("<script[^>]*>(.*?)</script>", whole, re.DOTALL) == [page.SCRIPT.read_text()]


def test_what_a_user_named_is_text(whole):
    assert "<b>zero</b>" not in whole and "&lt;b&gt;zero&lt;/b&gt;" in whole


def test_every_chart_says_in_words_what_it_shows_and_every_image_has_a_text(whole):
    seen = Seen(whole)
    charts = [attrs["aria-label"] for tag, attrs in seen.tags if tag == "svg" and attrs["class"] == "chart"]
    assert len(charts) > 8 and len(set(charts)) == len(charts)
    said = {*seen.captions, *(f"{model}. {text}" for model in seen.titles for text in seen.captions)}
    assert len([text for text in charts if text in said]) == len(charts) - 1  # the first has its numbers, too
    assert seen.captions[0] and charts[0].startswith(seen.captions[0])
    assert all(attrs.get("alt") for tag, attrs in seen.tags if tag == "img")


def test_ids_are_unique_in_the_page(whole):
    ids = [attrs["id"] for _, attrs in Seen(whole).tags if "id" in attrs]
    assert len(ids) == len(set(ids))


# ------------------------------------------------------------------------------------------------ images


def shown(url: str) -> np.ndarray:
    """The pixels of a data URL."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


@pytest.fixture
def found(store: Store, run: dict[str, Any]) -> RunResults:
    return RunResults(store, run)


def test_the_first_images_are_those_that_the_learner_of_the_verdict_was_trained_on(found):
    made = sections.pictures(found)
    top = verdict.headline(found.held_out)
    assert made is not None and top is not None and len(made.galleries) > 1
    assert made.galleries[0].title == top.trained_on == "other"


def test_a_gallery_shows_the_original_the_magnified_change_and_the_saved_image(found):
    made = gallery.gallery(found, found.nodes["datasets/other"])
    assert made is not None
    reached, missed = made.groups
    assert len(reached.cards) == gallery.REACHED and len(missed.cards) == gallery.MISSED
    counted = "Reached the target: 10 of the 20 images read from shard train-000000"
    assert reached.title == f"{counted}; 6 shown, every class once before any twice"
    assert {card.truth for card in reached.cards} == {CLASSES[i] for i in (0, 2, 4, 6, 8)}
    card = missed.cards[1]
    before, after = (unpack("train-000000", shard_of(found.nodes[f"datasets/{n}"]), 3) for n in ("clean", "other"))
    assert np.array_equal(shown(card.original), before.images()[3])
    assert np.array_equal(shown(card.saved), after.images()[3])
    change = after.images()[3].astype(int) - before.images()[3]
    assert "magnified 10 times" in made.text
    assert np.abs(shown(card.change) - (127.5 + 10 * change)).max() <= 0.5001
    assert (card.truth, card.label, card.measured) == ("class 3", "class 4", "not reached, 88 %")
    assert card.times == "× 10" and not card.large


def test_of_a_large_shard_only_the_beginning_is_read(found, monkeypatch):
    monkeypatch.setattr(gallery, "HEAD", 20_000)
    made = gallery.gallery(found, found.nodes["datasets/other"])
    assert made is not None and 0 < sum(len(group.cards) for group in made.groups) < 10


def test_large_images_are_shown_smaller():
    draw = np.random.default_rng(0)
    assert max(shown(gallery.url(draw.random((600, 448, 3)))).shape) == gallery.SIDE
    assert shown(gallery.url(draw.random((224, 224, 3)))).shape == (224, 224, 3)
    assert shown(gallery.url(draw.random((8, 8, 1)))).shape == (8, 8)


# ------------------------------------------------------------------------------------------ in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def brightness(colour: str) -> float:
    """Brightness of a colour such as rgb(21, 24, 28), from 0 to 255."""
    return statistics.mean(float(part) for part in re.findall(r"[\d.]+", colour)[:3])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 820, 1440])
def test_the_page_can_be_read_in_a_browser_of_any_width_by_day_and_by_night(browser, whole, tmp_path, width, scheme):
    file = tmp_path / "report.html"
    file.write_text(whole)
    said: list[str] = []
    asked: list[str] = []
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    tab = context.new_page()
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(file.as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    ink, paper, chart = tab.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor,"
        " getComputedStyle(document.querySelector('svg.chart text')).fill]"
    )
    assert ink == chart
    assert (brightness(ink) < brightness(paper)) == (scheme == "light")
    assert abs(brightness(ink) - brightness(paper)) > 150
    table = tab.locator("section .stacks").first
    assert table.evaluate("one => one.scrollWidth <= one.clientWidth")
    context.close()


def test_the_page_passes_axe_by_day_and_by_night(browser, whole, tmp_path):
    (tmp_path / "report.html").write_text(whole)
    for scheme, rules in (("light", {}), ("dark", {"runOnly": ["color-contrast"]})):
        tab = browser.new_page(color_scheme=scheme)
        tab.goto((tmp_path / "report.html").as_uri())
        tab.evaluate("document.querySelectorAll('tbody tr:nth-child(n+4)').forEach(line => line.remove())")
        inside = {"exclude": [["svg.chart > *"]]}  # thousands of shapes; the chart as an image is checked
        found = Axe().run(tab, inside, {"resultTypes": ["violations"], **rules}).response["violations"]
        assert [(one["id"], one["nodes"][0]["html"]) for one in found] == []
        tab.close()


def test_buttons_copy_and_show_photographs_at_full_size_without_network(browser, store, run, tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "SMALL", 16)
    nodes = {name: run["nodes"][name] for name in ("datasets/clean", "models/standard", "datasets/other")}
    (tmp_path / "report.html").write_text(page.render(store, run | {"nodes": nodes}))
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    tab = context.new_page()
    tab.goto((tmp_path / "report.html").as_uri())
    tab.locator("button.copy").first.click()
    tab.get_by_text("Copied").wait_for()
    assert tab.evaluate("navigator.clipboard.readText()") == "notbugs report 20260101-000000-whole-0000"
    tab.locator("button.full").first.press("Enter")
    assert tab.locator("dialog img").count() == 3 and tab.locator("dialog img").first.is_visible()
    tab.keyboard.press("Escape")
    assert not tab.locator("dialog img").first.is_visible()
    context.close()
