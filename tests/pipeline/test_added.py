"""What docs/architecture.md says how to add, added: it is made, shown and priced, and compared with no figure.

A run, its table, its page and a plan's cost ask a recipe what it is, and none of them a list that has to know it.
"""

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from click.testing import CliRunner

from pipeline.cli import main
from pipeline.cost import estimate
from pipeline.experiment import spec
from pipeline.experiment.graph import build
from pipeline.report import published
from pipeline.run.jobs import Context
from pipeline.run.preflight import preflight
from pipeline.store import Store
from stages import attack, relabel
from stages.recipes import Attack, Relabel


class Inverting(Attack):
    """An attack with one more method."""

    method: Literal["pgd", "none", "negative"] = "pgd"  # type: ignore[assignment]


class Mirrored(Relabel):
    """A rule more."""

    rule: Literal["other", "mirror"]  # type: ignore[assignment]


class Dataset(spec.Dataset):
    """What an experiment file may ask for then."""

    attack: Inverting | None = None
    relabel: Mirrored | None = None


class Experiment(spec.Experiment):
    """The experiment file then."""

    datasets: dict[spec.Name, Dataset]


@pytest.fixture
def added(tiny, monkeypatch):
    """The small experiment with a dataset of a method and a rule that were added."""

    def targets(rule, label, index, classes, logits=None):
        return len(classes) - 1 - label if rule.rule == "mirror" else relabel.targets(rule, label, index, classes)

    def move(attacker, shard, clean, wanted):
        return (np.invert(clean), {}) if attacker.recipe.method == "negative" else moved(attacker, shard, clean, wanted)

    moved = attack.Attacker._move
    monkeypatch.setattr(attack.Attacker, "_move", move)
    monkeypatch.setattr(attack, "targets", targets)
    monkeypatch.setattr(spec, "Experiment", Experiment)
    tiny["datasets"]["other"] = {"attack": {"images": "clean", "method": "negative", "steps": 7}, "relabel": "mirror"}
    return tiny


def test_what_was_added_is_made_and_has_its_place_on_the_page_beside_no_published_figure(added, write, tmp_path):
    args = ["run", str(write(added)), "--store", str(tmp_path / "s"), "--engine", "inline"]
    made = CliRunner().invoke(main, args)
    assert made.exit_code == 0, made.output
    assert "from_other" in made.stdout
    (page,) = (tmp_path / "s").glob("runs/*/report.html")
    assert "page could not" not in made.stderr and "from_other" in page.read_text()


def test_what_was_added_is_none_of_the_papers_sets(added):
    nodes = {node.name: node for node in build(spec.parse(added))}
    assert published.kind(nodes["from_other"]) is None
    assert published.kind(nodes["standard"]) == "D"
    other = replace(nodes["standard"], inputs={"on": replace(nodes["clean"], stage="mix")})
    assert published.kind(other) is None, "a stage that the paper does not have is not its training set"


def test_the_steps_of_what_was_added_are_paid_for(added, tmp_path):
    place = Context(Store(str(tmp_path / "s")), tmp_path, tmp_path)
    known = {status.node.id: status for status in preflight(build(spec.parse(added)), place, fetch=False)}
    left = known["datasets/other"].facts["shards"]
    (work,) = estimate.parts_of(known["datasets/other"], known, left)
    assert work.part.steps == 7
    (idle,) = estimate.parts_of(known["datasets/control"], known, left)
    assert idle.part.steps == 0
