"""Everything that docs/architecture.md explains how to add, added where it says: made, shown and estimated.

The tests patch a source, a stage, a label rule, an attack method, a norm, a column and an image format into the files
that the document names, and into no other. So a run, its table, its page and a plan's estimate may ask a recipe or a
job for its properties, but may not keep lists of their own. Attacks of evaluations are not covered, since pydantic has
compiled their models into each other.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from pydantic import Field

from pipeline.cli import main
from pipeline.cost import estimate
from pipeline.experiment import spec
from pipeline.experiment.graph import REVISIONS, build
from pipeline.report import published
from pipeline.run.jobs import JOBS, Context
from pipeline.run.jobs.datasets import ImagesJob
from pipeline.run.preflight import preflight
from pipeline.store import Store
from stages import attack, images, load, norms, recipes, relabel, shard
from stages.recipes import Attack, Digits, ImageFolder, Recipe, Relabel

# ------------------------------------------------------------------------------------- stages/recipes


class Ramps(Digits):
    """A source."""

    source: Literal["ramps"]  # type: ignore[assignment]


class Inverting(Attack):
    """An attack with one more method and one more norm."""

    method: Literal["pgd", "none", "negative"] = "pgd"  # type: ignore[assignment]
    norm: Literal["l2", "linf", "l1"] = "l2"  # type: ignore[assignment]


class Mirrored(Relabel):
    """One more label rule."""

    rule: Literal["other", "mirror"]  # type: ignore[assignment]


class Flip(Recipe):
    """A stage."""

    images: str
    splits: list[str] = Field(["train"])

    inputs: ClassVar[dict[str, str]] = {"images": "datasets"}


class Dataset(spec.Dataset):
    """A dataset of the experiment file with these keys."""

    load: Annotated[Digits | ImageFolder | Ramps, Field(discriminator="source")] | None = None  # type: ignore[assignment]
    attack: Inverting | None = None
    relabel: Mirrored | None = None
    flip: Flip | None = None


class Experiment(spec.Experiment):
    """An experiment file with these."""

    datasets: dict[spec.Name, Dataset]


# --------------------------------------------------------------------------------------- other stages


def ramps() -> load.Listing:
    """Images that grow brighter to the right, more so for higher classes."""
    labels = np.arange(60) % 10
    pixels = (labels[:, None, None, None] * np.arange(8)[:, None]).repeat(8, axis=1).astype(np.uint8)
    whole = load.Images.whole(labels, pixels)
    return load.Listing(tuple("0123456789"), {"test": whole[:20], "train": whole[20:]}, channels=1)


def flipped(before: shard.Shard) -> shard.Shard:
    """Images flipped left–right."""
    return replace(before, pixels=before.images()[:, :, ::-1].copy(), files=None, suffix="png", failures=[])


class FlipJob(ImagesJob):
    """The job of the stage."""

    key = "flip"

    def splits_asked(self) -> list[tuple[str, str]]:
        return [("splits", split) for split in self.node.recipe.splits]

    def open(self) -> Any:
        return flipped


class Brightness(shard.Facts):
    """The facts of a sample with an additional column."""

    brightness: float = 0.0


class L1(norms.L2):
    """An additional norm; uniform samples are only for evaluations, to which it is not added."""

    def direction(self, grad_NCHW: torch.Tensor) -> torch.Tensor:
        """The steepest step of length 1 changes a single value."""
        flat = grad_NCHW.flatten(1)
        largest = flat.abs().argmax(1, keepdim=True)
        return torch.zeros_like(flat).scatter(1, largest, flat.gather(1, largest).sign()).view_as(grad_NCHW)

    def project(self, delta_NCHW: torch.Tensor, eps: float) -> torch.Tensor:
        """Scale into the ball: the result is in the ball, but not the nearest point."""
        return delta_NCHW * (eps / delta_NCHW.abs().sum((1, 2, 3), keepdim=True).clamp_min(1e-12)).clamp_max(1)

    def pull_in(self, rounded_ND: torch.Tensor, exact_ND: torch.Tensor, radius: float) -> torch.Tensor:
        """Round toward the clean image, so that the result stays in the ball."""
        return exact_ND.trunc().to(torch.int64)


@pytest.fixture
def ppm(tmp_path: Path) -> Path:
    """A folder of images in a format that shards do not keep."""
    for split in ("train", "val"):
        for name in ("dark", "light"):
            folder = tmp_path / "ppm" / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (8, 8), (200 * (name == "light") + i,) * 3).save(folder / f"{i}.ppm")
    return tmp_path / "ppm"


@pytest.fixture
def added(tiny: dict[str, Any], ppm: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The small experiment with one of each addition."""

    def list_source(recipe, data, fetch=True):
        return ramps() if isinstance(recipe, Ramps) else listed(recipe, data, fetch)

    def targets(rule, label, index, classes, logits=None):
        return len(classes) - 1 - label if rule.rule == "mirror" else relabel.targets(rule, label, index, classes)

    def move(attacker, shard, clean, wanted):
        return (np.invert(clean), {}) if attacker.recipe.method == "negative" else moved(attacker, shard, clean, wanted)

    def measure(attacker, clean, saved, wanted):
        return measured(attacker, clean, saved, wanted) | {"brightness": saved.mean((1, 2, 3), dtype=np.float32)}

    listed, moved, measured = load.list_source, attack.Attacker._move, attack.Attacker._measure
    monkeypatch.setattr(spec, "Experiment", Experiment)
    monkeypatch.setitem(recipes.SOURCES, "ramps", Ramps)
    monkeypatch.setitem(recipes.STAGES["datasets"], "flip", Flip)
    monkeypatch.setitem(REVISIONS, "flip", 1)
    monkeypatch.setitem(JOBS, "flip", FlipJob)
    monkeypatch.setattr(load, "list_source", list_source)
    monkeypatch.setattr(attack, "targets", targets)
    monkeypatch.setattr(attack.Attacker, "_move", move)
    monkeypatch.setattr(attack.Attacker, "_measure", measure)
    monkeypatch.setitem(shard.COLUMNS, "brightness", pa.float32())
    monkeypatch.setattr(shard, "Facts", Brightness)
    monkeypatch.setitem(images.KEPT, "ppm", "PPM")
    monkeypatch.setattr(shard, "SUFFIXES", (*shard.SUFFIXES, "ppm"))
    monkeypatch.setitem(norms.NORMS, "l1", L1())
    tiny["datasets"]["other"] = {"attack": {"images": "clean", "method": "negative", "steps": 7}, "relabel": "mirror"}
    tiny["datasets"]["diamond"] = {
        "attack": {"images": "clean", "model": "standard", "norm": "l1", "eps": 12, "step_size": 1, "steps": 12},
        "relabel": "other",
    }
    tiny["datasets"]["flipped"] = {"flip": {"images": "clean"}}
    tiny["datasets"]["ramps"] = {"load": {"source": "ramps"}}
    tiny["datasets"]["folder"] = {"load": {"source": "image-folder", "root": str(ppm)}}
    train = tiny["models"]["from_other"]["train"]
    for name in ("diamond", "flipped"):
        tiny["models"][f"from_{name}"] = {"train": {**train, "on": name}}
        tiny["evaluations"]["accuracy"]["models"].append(f"from_{name}")
    return tiny


@pytest.fixture
def store(added: dict[str, Any], write: Any, tmp_path: Path) -> Iterator[Path]:
    """A store with that experiment, made by the command line."""
    path = tmp_path / "s"
    made = CliRunner().invoke(main, ["run", str(write(added)), "--store", str(path), "--engine", "inline"])
    assert made.exit_code == 0, made.output
    assert "page could not" not in made.stderr and "from_other" in made.stdout
    yield path


def only(paths: Iterator[Path]) -> Path:
    (path,) = paths
    return path


def first_shard(store: Path, name: str) -> dict[int, np.ndarray]:
    """Index → pixels."""
    tar = only(store.glob(f"datasets/{name}/*/train-000000.tar")).read_bytes()
    return {s.facts.index: images.decode(s.file, 1) for s in shard.samples("train-000000", tar)}


def test_what_was_added_is_made_and_has_its_place_on_the_page_beside_no_published_figure(store):
    page = only(store.glob("runs/*/report.html")).read_text()
    assert "from_other" in page and "small_cnn, L1 ε 12, 12 steps of 1" in page
    assert {f"datasets/{name}" in page for name in ("other", "flipped", "diamond", "ramps", "folder")} == {True}
    assert "<summary>flipped</summary>" in page, "a stage that changes images has a gallery"
    clean, diamond, folder = (first_shard(store, name) for name in ("clean", "diamond", "folder"))
    mirrored = first_shard(store, "flipped")
    assert all(np.array_equal(mirrored[i], pixels[:, ::-1]) for i, pixels in clean.items())
    moved = [np.abs(diamond[i].astype(int) - clean[i]).sum() / 255 for i in diamond]
    assert 1 < max(moved) <= 12, "moved, and inside the ball"
    samples = pq.read_table(only(store.glob("datasets/diamond/*/samples.parquet"))).to_pydict()
    brightness = dict(zip(samples["index"], samples["brightness"], strict=True))
    assert all(brightness[i] == pytest.approx(pixels.mean()) for i, pixels in diamond.items())
    assert len(folder) == 8 and next(store.glob("datasets/folder/*/manifest.json")).read_text().count('"ppm"') == 1
    assert CliRunner().invoke(main, ["verify", "--store", str(store)]).exit_code == 0


def test_what_was_added_is_none_of_the_papers_sets(added):
    nodes = {node.name: node for node in build(spec.parse(added))}
    assert published.kind(nodes["from_other"]) is None
    assert published.kind(nodes["standard"]) == "D"
    mixed = replace(nodes["clean"], stage="mix", recipe=nodes["standard"].recipe)
    other = replace(nodes["standard"], inputs={"on": mixed})
    assert published.kind(other) is None, "a stage that the paper does not have is not its training set"
    assert published.kind(nodes["from_flipped"]) is None
    assert not published.beside("D_other", None, published.setting(nodes["from_diamond"])), "nor is a norm"


def test_the_steps_of_what_was_added_are_paid_for(added, tmp_path):
    place = Context(Store(str(tmp_path / "s")), tmp_path, tmp_path)
    known = {status.node.id: status for status in preflight(build(spec.parse(added)), place, fetch=False)}
    left = known["datasets/other"].facts["shards"]
    (work,) = estimate.parts_of(known["datasets/other"], known, left)
    assert work.part.steps == 7
    (idle,) = estimate.parts_of(known["datasets/control"], known, left)
    assert idle.part.steps == 0
