"""How each kind of node is made, step by step; where the steps run is for `engines` to say.

A dataset or an evaluation is a `ShardJob`: shard by shard, read → work → commit. A model is a
`ModelJob`: epoch by epoch. Jobs are small and travel to workers; what is heavy they open there.
"""

import io
import json
import math
import re
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import artifacts
from pipeline.artifacts import Made
from pipeline.documents import fits
from pipeline.graph import Node
from pipeline.store import Store, canonical, digest, unsealed
from stages import load
from stages.design import Design
from stages.errors import BadData, BadInput
from stages.images import histogram
from stages.load import Item, Listing, printable
from stages.seeds import torch_seed
from stages.select import kept, select
from stages.shard import Shard, pack, rows, unpack

if TYPE_CHECKING:
    from stages.train import Group

REASONS = 10
"""Reasons why something was left out that a manifest has at most, each with its number."""

ROWS = 2**18
"""Rows of a row group of ``samples.parquet``, about: fewer make the file larger and slower to read."""


@dataclass(frozen=True)
class Place:
    """Where things are: the store, the folder of local sources, the folder of the user's own modules."""

    store: Store
    data: Path
    here: Path


@dataclass(frozen=True)
class Unit:
    """One shard to make.

    Attributes:
        name: the shard.
        samples: how many it will hold, failures included.
        inputs: role → content digest of what it is made from.
        items: where the images lie, for a load.
    """

    name: str
    samples: int
    inputs: dict[str, str]
    items: Sequence[Item] = field(default=(), repr=False)

    @property
    def split(self) -> str:
        """The split that it is a shard of."""
        return self.name.rpartition("-")[0]


class ShardJob(ABC):
    """A node that is made shard by shard."""

    heavy = False
    """Whether `open` loads models: then a worker keeps it open, and gets a GPU where there is one."""

    def __init__(self, node: Node, place: Place, inputs: Mapping[str, Made]) -> None:
        self.node, self.place, self.inputs = node, place, dict(inputs)

    @abstractmethod
    def units(self) -> list[Unit]:
        """Every shard of the node."""

    @abstractmethod
    def read(self, unit: Unit) -> Shard:
        """Fetch and decode what a shard is made from."""

    def open(self) -> Callable[[Shard], Any]:
        """The work on a shard, with all that it needs loaded."""
        return lambda shard: shard

    @abstractmethod
    def commit(self, unit: Unit, result: Any, facts: dict[str, Any]) -> dict[str, Any]:
        """Write what the work gave, then its commit mark; the mark."""

    @abstractmethod
    def finish(self, marks: Mapping[str, dict[str, Any]]) -> Made:
        """Publish the node from the commit marks of all its shards."""

    def stored(self) -> dict[str, int]:
        """Every file of the node that is in the store, with its size in bytes."""
        return self.place.store.files(self.node.folder, recursive=True)

    def committed(self, units: Sequence[Unit], there: Mapping[str, int]) -> dict[str, dict[str, Any]]:
        """The commit marks that hold: made from the same inputs, the shard there with its size.

        Args:
            units: shards whose marks are read.
            there: the node's files, from `stored`.
        """
        paths = {f"{self.node.folder}/{artifacts.mark_path(unit.name)}": unit for unit in units}
        kind, found = artifacts.MARKS[self.node.group], {}
        for path, content in self.place.store.find_all(paths).items():
            unit, mark = paths[path], unsealed(path, content or b"")
            if not mark or not fits(kind, mark) or (mark["name"], mark["inputs"]) != (unit.name, unit.inputs):
                continue
            if self._there(mark, there):
                found[unit.name] = mark
        return found

    def _there(self, mark: Mapping[str, Any], there: Mapping[str, int]) -> bool:
        return True

    def _write_recipe(self) -> tuple[int, str]:
        content = self.place.store.put_json(f"{self.node.folder}/recipe.json", self.node.described())
        return len(content), digest(content)


class DatasetJob(ShardJob):
    """A dataset: shards in the store, a row per sample, a manifest."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Class names and channels, for the manifest."""

    def commit(self, unit: Unit, result: Shard, facts: dict[str, Any]) -> dict[str, Any]:
        """Pack the shard, read it back, write it, write its rows, and the mark last."""
        store, folder = self.place.store, self.node.folder
        started = time.perf_counter()
        tar, table = pack(result), _parquet(rows(result))
        back = unpack(unit.name, tar, self.facts()["channels"], len(self.facts()["classes"]))
        if not (np.array_equal(back.index, result.index) and np.array_equal(back.label, result.label)):
            raise BadData(f"{unit.name} reads back with other samples than were packed")
        if result.pixels is not None and not np.array_equal(back.images(), result.pixels):
            raise BadData(f"{unit.name} reads back with other pixels than were packed")
        mark = {
            "name": unit.name,
            "samples": len(result),
            "failures": len(result.failures),
            "bytes": len(tar),
            "sha256": digest(tar),
            "rows": {"bytes": len(table), "sha256": digest(table)},
            "inputs": unit.inputs,
            "statistics": statistics(result),
            "suffix": result.suffix,
            "host": artifacts.host(),
            **facts,
        }
        store.put(f"{folder}/{unit.name}.tar", tar)
        store.put(f"{folder}/{artifacts.rows_path(unit.name)}", table)
        mark["seconds"] = {**facts.get("seconds", {}), "commit": round(time.perf_counter() - started, 3)}
        store.put_json(f"{folder}/{artifacts.mark_path(unit.name)}", mark)
        return mark

    def _there(self, mark: Mapping[str, Any], there: Mapping[str, int]) -> bool:
        name = mark["name"]
        return (there.get(f"{name}.tar"), there.get(artifacts.rows_path(name))) == (
            mark["bytes"],
            mark["rows"]["bytes"],
        )

    def finish(self, marks: Mapping[str, dict[str, Any]]) -> Made:
        store, folder = self.place.store, self.node.folder
        order, table = sorted(marks), self._samples(marks)
        store.put(f"{folder}/samples.parquet", table)
        shas = {f"{name}.tar": marks[name]["sha256"] for name in order}
        files = {f"{name}.tar": (marks[name]["bytes"], marks[name]["sha256"]) for name in order}
        files |= {"samples.parquet": (len(table), digest(table)), "recipe.json": self._write_recipe()}
        return artifacts.publish(
            store,
            self.node,
            files,
            artifacts.content_digest(shas),
            self.inputs,
            self.facts()
            | _totals(marks, getattr(self.node.recipe, "steps", 0))
            | left_out(table)
            | computed_on(marks.values()),
        )

    def _samples(self, marks: Mapping[str, dict[str, Any]]) -> bytes:
        """The rows of all shards as one file, of which a row group's shards are held at a time."""
        out, writer = io.BytesIO(), None
        for names in _together(marks):
            paths = {f"{self.node.folder}/{artifacts.rows_path(name)}": marks[name] for name in names}
            tables = self.place.store.find_all(paths)
            group = pa.concat_tables(self._rows(paths[path], content) for path, content in tables.items())
            writer = writer or pq.ParquetWriter(out, group.schema, compression="zstd")
            writer.write_table(group)
        assert writer is not None
        writer.close()
        return out.getvalue()

    def _rows(self, mark: Mapping[str, Any], content: bytes | None) -> pa.Table:
        """The rows of a shard, as they were committed; else its mark is taken back, so that the next run makes it."""
        if content is None or digest(content) != mark["rows"]["sha256"]:
            artifacts.withdraw(self.place.store, self.node.folder, {mark["name"]})
            raise BadData(
                f"{artifacts.rows_path(mark['name'])} is damaged and was withdrawn: the next run makes it again"
            )
        return pq.read_table(io.BytesIO(content))


def _together(marks: Mapping[str, dict[str, Any]]) -> list[list[str]]:
    """Shards in order, so many together as have about `ROWS` rows."""
    groups, before = dict[int, list[str]](), 0
    for name in sorted(marks):
        groups.setdefault(before // ROWS, []).append(name)
        before += marks[name]["samples"] + marks[name]["failures"]
    return list(groups.values())


def _parquet(table: pa.Table) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd")
    return out.getvalue()


def computed_on(parts: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """How many of the shards, or of the epochs, were made on each kind of device, and with which settings there."""
    parts = list(parts)
    devices = Counter(part.get("device", "unknown") for part in parts)
    settings = Counter(said for part in parts for said in part.get("settings", ()))
    return {"devices": dict(sorted(devices.items())), "settings": dict(sorted(settings.items()))}


def statistics(shard: Shard) -> dict[str, Any]:
    """Sums over a shard that add up over a dataset: exact integers for pixels, counts for the attack."""
    said: dict[str, Any] = {}
    if shard.pixels is not None:
        said["shape"] = [shard.pixels.shape[3], *shard.pixels.shape[1:3]]
        said["pixels"] = int(np.prod(shard.pixels.shape[:3]))
        levels, counts = np.arange(256), histogram(shard.pixels)
        said["sums"], said["squares"] = (counts @ levels).tolist(), (counts @ levels**2).tolist()
    if "reached" in shard.attack:
        said["reached"] = int(shard.attack["reached"].sum())
    if "reached_step" in shard.attack:
        steps = shard.attack["reached_step"]
        said["reached_at"] = np.bincount(steps[steps >= 0]).tolist()
    if "distance" in shard.attack:
        said["distance"] = float(shard.attack["distance"].astype(np.float64).sum())
    if "l2" in shard.attack:
        said["l2"], said["linf"] = float(shard.attack["l2"].sum()), float(shard.attack["linf"].max(initial=0))
        # At their target from the start are those whose target is the true class, or was the model's answer at once.
        aimed = (shard.label != shard.source_label) & (shard.attack.get("reached_step", np.array(-1)) != 0)
        said["aimed"], said["moved"] = int(aimed.sum()), int((aimed & (shard.attack["l2"] > 0)).sum())
    return said


def _totals(marks: Mapping[str, dict[str, Any]], steps: int) -> dict[str, Any]:
    counts = artifacts.per_split((name, mark["samples"]) for name, mark in marks.items())
    each = [mark["statistics"] for mark in marks.values()]
    shapes = {tuple(s["shape"]) if "shape" in s else None for s in each}
    said: dict[str, Any] = {
        "counts": counts,
        "failures": sum(mark["failures"] for mark in marks.values()),
        "shards": {name: mark["samples"] for name, mark in sorted(marks.items())},
        "image_shape": list(shape) if len(shapes) == 1 and (shape := next(iter(shapes))) else None,
        "members": [next(iter(marks.values()))["suffix"], "cls", "json"],
    }
    if said["image_shape"]:
        from stages.model import channel_statistics

        sums, squares = (np.sum([s[key] for s in each], axis=0).tolist() for key in ("sums", "squares"))
        said["mean"], said["std"] = channel_statistics(sums, squares, sum(s["pixels"] for s in each))
    total = sum(counts.values())
    if all("reached" in s for s in each):
        said["reached"] = sum(s["reached"] for s in each) / total
    if all("reached_at" in s for s in each):
        length = max(steps + 1, *(len(s["reached_at"]) for s in each))
        at = np.sum([np.pad(s["reached_at"], (0, length - len(s["reached_at"]))) for s in each], axis=0)
        said["reached_by_step"] = [round(share, 6) for share in (at.cumsum() / total).tolist()]
    if all("distance" in s for s in each):
        said["distance_mean"] = sum(s["distance"] for s in each) / total
    if all("l2" in s for s in each):
        said["l2_mean"], said["linf_max"] = sum(s["l2"] for s in each) / total, max(s["linf"] for s in each)
    return said


class LoadJob(DatasetJob):
    """Clean images from a source."""

    def __init__(self, node: Node, place: Place, inputs: Mapping[str, Made], fetch: bool = True) -> None:
        super().__init__(node, place, inputs)
        self.fetch = fetch

    @cached_property
    def listing(self) -> Listing:
        return load.list_source(self.node.recipe, self.place.data, self.fetch)

    def __getstate__(self) -> dict[str, Any]:
        """Without the images: a unit carries its own."""
        return self.__dict__ | {"listing": replace(self.listing, items={}), "majority": self.majority}

    @cached_property
    def majority(self) -> dict[str, float]:
        return {split: self.listing.majority(split) for split in self.listing.items}

    def facts(self) -> dict[str, Any]:
        return {
            "classes": list(self.listing.classes),
            "channels": self.listing.channels,
            "majority": self.majority,
            **({"skipped": _most(self.listing.skipped)} if self.listing.skipped else {}),
        }

    def units(self) -> list[Unit]:
        spread, data = load.spread(self.listing, self.node.recipe), self.place.data
        return [Unit(name, len(items), {"source": _listed(items, data)}, items) for name, items in spread.items()]

    def read(self, unit: Unit) -> Shard:
        return load.read(self.node.recipe, unit.name, unit.items, self.listing.channels, self.listing.suffix)


def _most(counts: Mapping[str, int]) -> dict[str, int]:
    """The largest of some counts, and the others as one."""
    order = sorted(counts.items(), key=lambda one: (-one[1], one[0]))
    return dict(order[:REASONS]) | ({"others": sum(n for _, n in order[REASONS:])} if order[REASONS:] else {})


def left_out(table: bytes) -> dict[str, Any]:
    """Why images were left out, if any were, the commonest reason first: ``samples.parquet`` in a few lines.

    Reasons that differ in their numbers alone count as one. The first image of each stands for all.
    """
    said = pq.read_table(io.BytesIO(table), columns=["error"])["error"].drop_null().to_pylist()
    first, count = dict[str, dict[str, Any]](), Counter[str]()
    for place, _, reason in (one.partition(": ") for one in said):
        kind = re.sub(r"[\d.,]+", "", reason)
        first.setdefault(kind, {"reason": reason, "first": place})
        count[kind] += 1
    listed = [{**first[kind], "images": images} for kind, images in count.most_common(REASONS)]
    if rest := len(said) - sum(count[kind] for kind, _ in count.most_common(REASONS)):
        listed.append({"reason": "other reasons", "images": rest})
    return {"left_out": listed} if listed else {}


def _listed(items: Sequence[Item], data: Path) -> str:
    """Digest of what a shard is loaded from: pixels in memory, or names and places of files; or which are made."""
    if items[0].ref is None:
        return digest(canonical([[i.index, i.label] for i in items]))
    if isinstance(items[0].ref, np.ndarray):
        return digest(
            b"".join(np.ascontiguousarray(i.ref).tobytes() for i in items)
            + canonical([[i.index, i.label] for i in items])
        )
    return digest(canonical([[i.index, i.label, _named(i.ref, data)] for i in items]))


def _named(ref: Any, data: Path) -> Any:
    """A file's name and place, wherever the folder of local sources lies."""
    if isinstance(ref, tuple):
        return [*ref[1:], ref[0].rpartition("/")[2]]
    return printable(str(ref).removeprefix(str(data)))


def read_shard(place: Place, made: Made, name: str) -> Shard:
    """A shard of a dataset of the store; a damaged one is withdrawn, so that the next run makes it again.

    Raises:
        BadData: it is damaged.
    """
    tar = artifacts.read_file(place.store, made, f"{name}.tar", take_back=True)
    return unpack(name, tar, made.manifest["channels"], len(made.manifest["classes"]))


def open_model(place: Place, made: Made) -> Any:
    """A model of the store, ready for use on this process's device.

    Raises:
        BadData: its weights are not those that were published.
    """
    from stages import model

    return model.load(Design.from_json(made.manifest["design"]), weights_of(place, made), place.here)


def weights_of(place: Place, made: Made) -> bytes:
    """The weights of a model of the store.

    Raises:
        BadData: they are not those that were published.
    """
    return artifacts.read_file(place.store, made, "weights.safetensors", take_back=True)


class ImagesJob(DatasetJob):
    """Another dataset's images, changed or chosen, shard for shard."""

    @property
    def heavy(self) -> bool:  # type: ignore[override]
        return "model" in self.inputs

    def facts(self) -> dict[str, Any]:
        images = self.inputs["images"].manifest
        return {"classes": images["classes"], "channels": images["channels"]}

    def units(self) -> list[Unit]:
        images, found = self.inputs["images"], []
        others = {role: made.content for role, made in self.inputs.items() if role != "images"}
        for split in getattr(self.node.recipe, "splits", images.manifest["counts"]):
            for name in images.shards(split):
                sha = images.files[f"{name}.tar"]["sha256"]
                found.append(Unit(name, self.samples(images.manifest["shards"][name]), {"images": sha, **others}))
        return found

    def samples(self, count: int) -> int:
        """How many of a shard's samples there will be."""
        return count

    def read(self, unit: Unit) -> Shard:
        return read_shard(self.place, self.inputs["images"], unit.name)

    def model(self, role: str) -> Any:
        """A model that this is made with."""
        return open_model(self.place, self.inputs[role])


class AttackJob(ImagesJob):
    """Images perturbed and relabelled."""

    def units(self) -> list[Unit]:
        units = super().units()
        if self.node.recipe.method == "universal":  # the perturbations come from the first shards, whichever is made
            fit = digest(canonical([unit.inputs["images"] for unit in units[: self.node.recipe.fit_shards]]))
            units = [replace(unit, inputs={**unit.inputs, "fit": fit}) for unit in units]
        return units

    def open(self) -> Callable[[Shard], Shard]:
        from stages.attack import Attacker

        recipe, rule = self.node.recipe, self.node.relabel
        assert rule is not None
        model = self.model("model") if "model" in self.inputs else None
        # In the order of the roles, whichever the file has: the sum of their losses depends on it.
        spared = [self.model(role) for role in sorted(self.inputs) if role.startswith("not_transferring_to.")]
        first = self.units()[: recipe.fit_shards] if recipe.method == "universal" else []
        return Attacker(recipe, rule, self.facts()["classes"], model, spared, [self.read(unit) for unit in first])

    def finish(self, marks: Mapping[str, dict[str, Any]]) -> Made:
        from stages.attack import refuse_unmoved

        each = [mark["statistics"] for mark in marks.values()]
        if all("moved" in said for said in each):  # else a shard is older than this count
            refuse_unmoved(self.node.recipe, *(sum(said[name] for said in each) for name in ("aimed", "moved")))
        return super().finish(marks)


class InvertJob(ImagesJob):
    """Images that a model represents as it does others."""

    def open(self) -> Callable[[Shard], Shard]:
        from stages.invert import Inverter

        return Inverter(self.node.recipe, self.model("model"))


class SelectJob(ImagesJob):
    """Some of the images, as they are."""

    def samples(self, count: int) -> int:
        return kept(self.node.recipe, count)

    def open(self) -> Callable[[Shard], Shard]:
        return partial(select, self.node.recipe)


class ScoreJob(ShardJob):
    """What some models do on some splits of a dataset: sums per shard, added up at the end."""

    heavy = True

    @abstractmethod
    def summary(self, sums: dict[str, Any]) -> dict[str, Any]:
        """What the sums of one model say."""

    def splits(self) -> list[str]:
        """The splits that are gone through."""
        return [self.node.recipe.split]

    def classes(self) -> list[str]:
        """Names of the classes."""
        return list(self.inputs["on"].manifest["classes"])

    def units(self) -> list[Unit]:
        images = self.inputs["on"]
        models = {role: made.content for role, made in self.inputs.items() if role != "on"}
        return [
            Unit(name, images.manifest["shards"][name], {"on": images.files[f"{name}.tar"]["sha256"], **models})
            for split in self.splits()
            for name in images.shards(split)
        ]

    def read(self, unit: Unit) -> Shard:
        return read_shard(self.place, self.inputs["on"], unit.name)

    def models(self, role: str, opened: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The models of a role, opened, by name; those that are open already are not opened again."""
        there = opened or {}
        found = {
            name.removeprefix(f"{role}."): made for name, made in self.inputs.items() if name.startswith(f"{role}.")
        }
        return {name: there[name] if name in there else open_model(self.place, made) for name, made in found.items()}

    def commit(self, unit: Unit, result: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
        mark = {
            "name": unit.name,
            "samples": unit.samples,
            "inputs": unit.inputs,
            "sums": result,
            "host": artifacts.host(),
        }
        self.place.store.put_json(f"{self.node.folder}/{artifacts.mark_path(unit.name)}", mark | facts)
        return mark | facts

    def finish(self, marks: Mapping[str, dict[str, Any]]) -> Made:
        from stages.evaluate import add

        found = []
        for name in self.node.recipe.models:
            sums = add([marks[shard]["sums"][name] for shard in sorted(marks)])
            found.append(self._facts(name) | self.summary(sums))
        content = self.place.store.put_json(f"{self.node.folder}/result.json", {"rows": found})
        files = {"result.json": (len(content), digest(content)), "recipe.json": self._write_recipe()}
        shards = {name: mark["samples"] for name, mark in sorted(marks.items())}
        facts = {"shards": shards} | computed_on(marks.values())
        return artifacts.publish(self.place.store, self.node, files, digest(canonical(found)), self.inputs, facts)

    def _facts(self, model: str) -> dict[str, Any]:
        """What was scored, and on what: held out are images as they were loaded, of a split that was not trained on."""
        on, split, scored = self.node.inputs["on"], self.node.recipe.split, self.node.inputs[f"models.{model}"]
        return {
            "evaluation": self.node.name,
            "on": on.name,
            "split": split,
            "held_out": on.stage == "load" and not (scored.stage == "train" and scored.recipe.split == split),
            "model": model,
            "trained_on": self.inputs[f"models.{model}"].manifest.get("trained_on"),
        }


class EvaluateJob(ScoreJob):
    """Accuracy, clean and under attack."""

    def open(self) -> Callable[[Shard], dict[str, Any]]:
        from stages.evaluate import score

        recipe, classes = self.node.recipe, self.classes()
        models = self.models("models")
        sources = self.models("sources", models)
        return lambda shard: score(recipe, classes, models, sources, shard)

    def summary(self, sums: dict[str, Any]) -> dict[str, Any]:
        from stages.evaluate import summary

        return summary(self.node.recipe, self.classes(), sums)


class UsefulnessJob(ScoreJob):
    """Usefulness and robust usefulness of features."""

    def splits(self) -> list[str]:
        return list(dict.fromkeys([self.node.recipe.normalise, self.node.recipe.split]))

    def units(self) -> list[Unit]:
        total = self.inputs["on"].manifest["counts"][self.node.recipe.split]
        return [replace(unit, inputs={**unit.inputs, "of": str(total)}) for unit in super().units()]

    def open(self) -> Callable[[Shard], dict[str, Any]]:
        from stages.usefulness import measure

        recipe, classes, models = self.node.recipe, self.classes(), self.models("models")
        total = self.inputs["on"].manifest["counts"][recipe.split]
        return lambda shard: measure(recipe, classes, models, shard, math.ceil(recipe.limit * len(shard) / total))

    def summary(self, sums: dict[str, Any]) -> dict[str, Any]:
        from stages.usefulness import summarise

        return summarise(self.node.recipe, self.classes(), sums)


class ModelJob:
    """A model: trained epoch by epoch with a checkpoint after each, or brought from elsewhere."""

    def __init__(self, node: Node, place: Place, inputs: Mapping[str, Made]) -> None:
        self.node, self.place, self.inputs = node, place, dict(inputs)

    @property
    def _checkpoint(self) -> str:
        return f"{self.node.folder}/checkpoint.safetensors"

    @property
    def epochs(self) -> int:
        return self.node.recipe.epochs if self.node.stage == "train" else 1

    @property
    def threads(self) -> int:
        return self.node.recipe.threads if self.node.stage == "train" else 1

    @property
    def workers(self) -> int:
        """Processes that make it: more than one need `ddp.steps`."""
        return self.node.recipe.workers if self.node.stage == "train" else 1

    def images(self) -> int:
        """Images of an epoch."""
        if self.node.stage != "train":
            return 0
        return int(self.inputs["on"].manifest["counts"][self.node.recipe.split])

    def steps(self) -> Iterator[dict[str, Any]]:
        """Make it in this process; the metrics of each epoch as it ends, and last the ``manifest``.

        With the metrics, how often the store had to be asked again meanwhile (``store_retries``).

        Raises:
            BadInput: it is to be made by several processes.
        """
        if self.workers > 1:
            raise BadInput(
                f"{self.node.id} asks for {self.workers} workers, which takes Ray: leave out --engine inline"
            )
        if self.node.stage == "bring":
            yield from self._bring()
        else:
            yield from self.train()

    def _bring(self) -> Iterator[dict[str, Any]]:
        from stages import checkpoint

        design, weights = checkpoint.bring(self.node.recipe, self.place.data, self.place.here)
        yield {"epoch": 1}
        yield {"manifest": self._publish(design.as_json(), weights, []).manifest}

    def train(self, group: "Group | None" = None) -> Iterator[dict[str, Any]]:
        """This process's part of a training, alone or in a group.

        Only the first of a group reads the checkpoint, writes to the store and says anything: what `steps` says.
        """
        from stages import train

        store, recipe, on, group = self.place.store, self._recipe(), self.inputs["on"], group or train.ALONE
        probed, counted = self.inputs.get("probe"), store.retries
        design = design_of(self.node, on.manifest, probed.manifest if probed else None)
        start = weights_of(self.place, probed) if probed else None
        watch = self._watched() if group.rank == 0 else None
        checkpoint = before = store.find(self._checkpoint) if group.rank == 0 else None
        examples = self._examples(on)
        for checkpoint, history in train.fit(recipe, design, examples, self.place.here, before, group, start, watch):
            store.put(self._checkpoint, checkpoint)
            yield history[-1] | {"store_retries": store.retries - counted}
            counted = store.retries
        if group.rank == 0:
            assert checkpoint is not None
            made = self._publish(design.as_json(), train.weights_of(checkpoint), train.history_of(checkpoint))
            store.delete(self._checkpoint)
            yield {"manifest": made.manifest}

    def _recipe(self) -> Any:
        """The recipe, its seed drawn anew where models stand behind the dataset.

        Of their seed, a learner would begin with the very weights that the attacked model began with, and what moves
        the one would move the other: it would learn more from the set than any other network does.
        """
        recipe, generation = self.node.recipe, self.node.generation
        if generation == 0:
            return recipe
        return recipe.model_copy(update={"seed": torch_seed(recipe.seed, "generation", generation)})

    def _examples(self, on: Made) -> Any:
        from stages.train import Examples

        names = on.shards(self.node.recipe.split)
        counts = {name: on.manifest["shards"][name] for name in names}
        size = sum(counts.values()) * int(np.prod(on.manifest["image_shape"]))
        origin = digest(canonical({role: made.content for role, made in self.inputs.items()}))
        return Examples(names, counts, partial(read_shard, self.place, on), size, origin)

    def _watched(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Some test images of the source that the dataset goes back to, for the learning curve: pixels and labels."""
        source, count = self.node.inputs["on"], self.node.recipe.watch
        while "images" in source.inputs:
            source = source.inputs["images"]
        made = artifacts.find(self.place.store, source)
        names = made.shards("test") if made and count else []
        if made is None or not names:
            return None
        shards: list[Shard] = []
        while sum(map(len, shards)) < count and len(shards) < len(names):
            shards.append(read_shard(self.place, made, names[len(shards)]))
        pixels, labels = np.concatenate([s.images() for s in shards]), np.concatenate([s.label for s in shards])
        return pixels[:count], labels[:count]

    def _publish(self, design: dict[str, Any], weights: bytes, history: list[dict[str, Any]]) -> Made:
        store, folder = self.place.store, self.node.folder
        metrics = "".join(json.dumps(line) + "\n" for line in history).encode()
        recipe = store.put_json(f"{folder}/recipe.json", self.node.described())
        contents = {"weights.safetensors": weights, "metrics.jsonl": metrics}
        for name, content in contents.items():
            store.put(f"{folder}/{name}", content)
        files = {
            name: (len(content), digest(content)) for name, content in (contents | {"recipe.json": recipe}).items()
        }
        trained_on = self.node.inputs["on"].name if "on" in self.node.inputs else None
        return artifacts.publish(
            store,
            self.node,
            files,
            digest(weights),
            self.inputs,
            {"design": design, "trained_on": trained_on} | computed_on(history),
        )


def design_of(node: Node, on: Mapping[str, Any], probed: Mapping[str, Any] | None = None) -> Any:
    """What a training builds: the recipe's arch, for the images and classes of a dataset; or the model that it probes.

    Args:
        node: the training.
        on: the dataset's manifest, or what is foreseen of it.
        probed: the same of the model that is probed, if any.

    Raises:
        BadInput: the images differ in size, or mean and std do not fit their channels.
    """
    if probed is not None:
        return Design.from_json(probed["design"])
    recipe, channels = node.recipe, on["channels"]
    if on["image_shape"] is None:
        raise BadInput(f"the images of {recipe.on} differ in size; load them with resize and crop")
    for name, given in (("mean", recipe.mean), ("std", recipe.std)):
        if given is not None and len(given) != channels:
            raise BadInput(f"{name} has {len(given)} entries, the images have {channels} channels")
    mean, std = recipe.mean or on["mean"], recipe.std or on["std"]
    return Design(recipe.arch, len(on["classes"]), tuple(on["image_shape"]), tuple(mean), tuple(std))


JOBS: dict[str, type[ShardJob] | type[ModelJob]] = {
    "load": LoadJob,
    "attack": AttackJob,
    "invert": InvertJob,
    "select": SelectJob,
    "train": ModelJob,
    "bring": ModelJob,
    "evaluate": EvaluateJob,
    "usefulness": UsefulnessJob,
}
"""Stage → how it is made."""
