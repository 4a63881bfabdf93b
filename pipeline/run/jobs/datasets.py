"""How datasets are made."""

import io
import re
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.experiment.graph import Node
from pipeline.run import artifacts
from pipeline.run.artifacts import Made
from pipeline.run.jobs.base import Place, ShardJob, Unit, devices, open_model, read_shard
from pipeline.store import canonical, digest
from stages import load
from stages.errors import BadData
from stages.images import histogram
from stages.load import Item, Listing, printable
from stages.select import kept, select
from stages.shard import Shard, pack, rows, unpack

REASONS = 10
"""Reasons why something was left out that a manifest has at most, each with its number."""

ROWS = 2**18
"""Rows of a row group of ``samples.parquet``, about: fewer make the file larger and slower to read."""


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
            | {"devices": devices(marks.values())},
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
