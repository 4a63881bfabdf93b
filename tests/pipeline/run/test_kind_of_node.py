"""A kind of node is defined in one place: its recipe, its job, and the lines that register them."""

import ast
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import pytest
from click.testing import CliRunner
from pydantic import Field, model_validator

import pipeline
from pipeline.cli import main
from pipeline.cost.estimate import parts_of
from pipeline.experiment import graph, spec
from pipeline.experiment.graph import build
from pipeline.run import jobs
from pipeline.run.jobs import Context
from pipeline.run.jobs.datasets import ImagesJob
from pipeline.run.preflight import preflight
from pipeline.store import Store
from stages import recipes
from stages.recipes import Recipe

HOME = Path(pipeline.HOME) / "pipeline"
FILES = [*(HOME / "run").rglob("*.py"), *(HOME / "cost").rglob("*.py"), *(HOME / "cli").glob("*.py")]


def asks_for_stage(node):
    """Whether code compares or matches a node's stage."""
    parts = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
    parts += [node.subject] if isinstance(node, ast.Match) else []
    return any(isinstance(part, ast.Attribute) and part.attr == "stage" for part in parts)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_run_and_cost_ask_no_node_what_stage_it_has(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        assert not asks_for_stage(node), f"line {node.lineno}"


def test_the_check_itself_sees_every_form_of_the_question():
    for code in ("node.stage == 'load'", "node.stage in ('load',)", "match node.stage:\n case 'load': pass"):
        assert any(map(asks_for_stage, ast.walk(ast.parse(code))))


class Mirror(Recipe):
    """The added stage: it flips images left–right."""

    images: str
    splits: list[str] = Field(["train"])

    inputs: ClassVar[Mapping[str, str]] = {"images": "datasets"}


class MirrorJob(ImagesJob):
    """The job of the added stage."""

    key = "mirror"

    def splits_asked(self):
        return [("splits", split) for split in self.node.recipe.splits]

    def open(self):
        return lambda shard: replace(shard, pixels=np.ascontiguousarray(shard.images()[:, :, ::-1]), files=None)


class Dataset(spec.Dataset):
    """Its key in the experiment file."""

    mirror: Mirror | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        return self


class Experiment(spec.Experiment):
    """The experiment file with that key."""

    datasets: dict[spec.Name, Dataset]


@pytest.fixture
def mirrored(monkeypatch):
    """An experiment with the added stage."""
    monkeypatch.setattr(spec, "Experiment", Experiment)
    monkeypatch.setitem(recipes.STAGES["datasets"], "mirror", Mirror)
    monkeypatch.setitem(graph.REVISIONS, "mirror", 1)
    monkeypatch.setitem(jobs.JOBS, "mirror", MirrorJob)
    return {
        "name": "mirrored",
        "datasets": {
            "clean": {"load": {"source": "sklearn-digits", "limit": 64, "shard_size": 64}},
            "turned": {"mirror": {"images": "clean"}},
        },
        "models": {"net": {"train": {"on": "turned", "arch": "small_cnn", "epochs": 1, "batch_size": 32}}},
        "evaluations": {"accuracy": {"models": ["net"], "on": "clean"}},
    }


def invoke(*args, code=0):
    result = CliRunner().invoke(main, [*map(str, args)])
    assert result.exit_code == code, f"{result.output}\n{result.stderr}\n{result.exception!r}"
    return result


def test_a_stage_that_is_added_is_checked_made_shown_and_has_a_cost(mirrored, write, tmp_path):
    file, store = write(mirrored), tmp_path / "s"
    known = {s.node.id: s for s in preflight(build(spec.read(file)), Context(Store(str(store)), tmp_path, tmp_path))}
    turned = known["datasets/turned"]
    assert turned.facts["counts"] == {"train": 64}
    (work,) = parts_of(turned, known, turned.facts["shards"])
    assert work.part.source == "datasets/clean" and work.batches == (0,)
    planned = json.loads(invoke("plan", file, "--store", store, "--json").stdout)["nodes"]
    assert [node["stage"] for node in planned] == ["load", "mirror", "train", "evaluate"]
    invoke("run", file, "--store", store, "--engine", "inline")
    (page,) = store.glob("runs/*/report.html")
    assert "datasets/turned" in page.read_text(encoding="utf-8")
    assert "turned" in invoke("show", "turned", "--store", store).stdout


def test_a_split_that_an_added_stage_asks_for_is_checked(mirrored, write, tmp_path):
    mirrored["datasets"]["turned"]["mirror"]["splits"] = ["val"]
    refused = invoke("plan", write(mirrored), "--store", tmp_path / "s", code=2)
    assert "datasets.turned.mirror.splits: clean has no split 'val', it has train, test" in refused.stderr
