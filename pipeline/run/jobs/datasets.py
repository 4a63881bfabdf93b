"""How datasets are made."""

import io
import math
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.experiment.graph import Node
from pipeline.run import artifacts, fingerprints
from pipeline.run.artifacts import Artifact
from pipeline.run.jobs.base import (
    ShardJob,
    Unit,
    computed_on,
    largest_shard,
    open_model,
    read_shard,
    shards_of,
    source_of,
)
from pipeline.run.jobs.checks import refuse_rule, try_features
from pipeline.run.jobs.statistics import left_out, most, statistics, totals
from pipeline.run.jobs.work import Part, Work, in_batches, with_tries
from pipeline.store import canonical, digest
from stages import load
from stages.errors import BadData, BadInput
from stages.limits import MEMORY
from stages.load import Images, Item, Listing, printable
from stages.recipes import ImageFolder, Relabel
from stages.select import kept, select
from stages.shard import Shard, pack, rows, unpack

if TYPE_CHECKING:
    from stages.model import Classifier

SPARED = "not_transferring_to."
"""Prefix of the roles of models that an attack must not fool."""

MANY = 1000
"""Images whose files are read together when they are compared by content."""

ROWS = 2**18
"""Approximate rows of a row group of ``samples.parquet``: fewer make the file larger and slower to read."""


class DatasetJob(ShardJob):
    """A dataset: shards in the store, a row per sample, a manifest."""

    copies: ClassVar[bool] = False
    """Whether its images are those that it is made from, byte for byte."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Class names and channels, for the manifest."""

    @property
    def steps(self) -> int:
        """Steps after which it may be recorded that the attack on an image succeeded; 0 where there are none."""
        return 0

    @classmethod
    def has_column(cls, node: Node, column: str) -> bool:
        """Whether the samples of such a dataset have a column that an attack measured."""
        return False

    def commit(self, unit: Unit, result: Shard, facts: dict[str, Any]) -> dict[str, Any]:
        """Pack the shard, read it back, write it, write its rows, and the mark last."""
        store, folder = self.context.store, self.node.folder
        started = time.perf_counter()
        tar = pack(result)
        table = _parquet(rows(result, tar))
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

    def finish(self, marks: Mapping[str, dict[str, Any]]) -> Artifact:
        store, folder = self.context.store, self.node.folder
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
            self.recorded(marks),
            self.facts() | totals(marks, self.steps) | left_out(table) | computed_on(marks.values()),
        )

    def recorded(self, marks: Mapping[str, dict[str, Any]]) -> pa.Table:
        """The user's own files that it was made from, for its record."""
        return self.sources

    def _samples(self, marks: Mapping[str, dict[str, Any]]) -> bytes:
        """The rows of all shards as one file; the shards of one row group are held in memory at a time."""
        out, writer = io.BytesIO(), None
        for names in _together(marks):
            paths = {f"{self.node.folder}/{artifacts.rows_path(name)}": marks[name] for name in names}
            tables = self.context.store.find_all(paths)
            group = pa.concat_tables(self._rows(paths[path], content) for path, content in tables.items())
            writer = writer or pq.ParquetWriter(out, group.schema, compression="zstd")
            writer.write_table(group)
        assert writer is not None
        writer.close()
        return out.getvalue()

    def _rows(self, mark: Mapping[str, Any], content: bytes | None) -> pa.Table:
        """The rows of a shard as they were committed; if they are damaged, its mark is withdrawn."""
        if content is None or digest(content) != mark["rows"]["sha256"]:
            artifacts.withdraw(self.context.store, self.node.folder, {mark["name"]})
            raise BadData(
                f"{artifacts.rows_path(mark['name'])} is damaged and was withdrawn: the next run makes it again"
            )
        return pq.read_table(io.BytesIO(content))


def _together(marks: Mapping[str, dict[str, Any]]) -> list[list[str]]:
    """Shards in order, grouped so that each group has about `ROWS` rows."""
    groups, before = dict[int, list[str]](), 0
    for name in sorted(marks):
        groups.setdefault(before // ROWS, []).append(name)
        before += marks[name]["samples"] + marks[name]["failures"]
    return list(groups.values())


def _parquet(table: pa.Table) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd")
    return out.getvalue()


class LoadJob(DatasetJob):
    """Clean images from a source."""

    key = "load"

    @property
    def heavy(self) -> bool:
        return False

    @cached_property
    def listing(self) -> Listing:
        assert self.tars is not None  # their sizes and times are from before they are read
        return load.list_source(self.node.recipe, self.context.data, self.fetch)

    def __getstate__(self) -> dict[str, Any]:
        """Without the images: a unit carries its own."""
        own = {"listing": replace(self.listing, items={}), "majority": self.majority, "sources": self.own_code}
        return self.__dict__ | own

    @cached_property
    def majority(self) -> dict[str, float]:
        return {split: self.listing.majority(split) for split in self.listing.items}

    @cached_property
    def tars(self) -> dict[str, load.Stamp]:
        """Sizes and times of the source's tars or parquet files; empty if it has none."""
        return load.stamps_of_tars(self.node.recipe, self.context.data)

    @cached_property
    def sources(self) -> pa.Table:
        recipe, data = self.node.recipe, self.context.data
        if isinstance(recipe, ImageFolder) and (data / recipe.root).is_dir():
            names, stamps = load.stamps_of_images(self.listing)
        elif any(stamp != load.GONE for stamp in self.tars.values()):
            names, stamps = load.names_of_tars(recipe, data, self.tars), np.array(list(self.tars.values()))
        else:  # no files; or the source was removed after it was loaded
            return self.own_code
        read = self._contents(self._read_all()) if self.context.check_files else None
        return fingerprints.rows("source", names, stamps[:, 0].tolist(), stamps[:, 1].tolist(), read)

    def sources_with_contents(self, files: frozenset[str]) -> pa.Table:
        names = self.sources["file"].to_pylist()
        named = dict(zip(self.tars or self._indices(), names, strict=True))

        def wanted(item: Item) -> bool:
            return named[item.ref[0] if isinstance(item.ref, tuple) else item.index] in files

        read = self._contents(self._read_all(wanted))
        contents = [content if name in files else None for name, content in zip(names, read, strict=True)]
        return self._with_contents(contents)

    def _with_contents(self, contents: Sequence[str | None]) -> pa.Table:
        at = self.sources.schema.names.index("content")
        return self.sources.set_column(at, "content", pa.array(contents, pa.string()))

    def _indices(self) -> list[int]:
        """Indices of the images in the order of `sources`."""
        return [index for images in self.listing.items.values() for index in images.indices.tolist()]

    def recorded(self, marks: Mapping[str, dict[str, Any]]) -> pa.Table:
        if not self.sources.num_rows:
            return self.sources
        read = ((unit.items, fingerprints.split(marks[unit.name]["contents"])) for unit in self.units())
        return self._with_contents(self._contents(read))

    def _read_all(
        self, wanted: Callable[[Item], bool] = lambda item: True
    ) -> Iterator[tuple[Sequence[Item], list[str]]]:
        """The images of the source that are wanted, with the digests of their files."""
        for images in self.listing.items.values():
            for first in range(0, len(images), MANY):
                if some := [item for item in images[first : first + MANY] if wanted(item)]:
                    yield some, fingerprints.split(fingerprints.join(load.contents(some)))

    def _contents(self, read: Iterable[tuple[Sequence[Item], Sequence[str]]]) -> list[str]:
        """Digest of each file of `sources`: of a tar, the sum of those of the images in it that are taken."""
        one, sums = dict[int, str](), dict.fromkeys(self.tars, 0)
        for items, contents in read:
            for item, content in zip(items, contents, strict=True):
                if isinstance(item.ref, tuple):
                    place = " ".join(map(str, item.ref[1:]))
                    sums[item.ref[0]] += int(digest(f"{place} {content}".encode())[: fingerprints.DIGITS], 16)
                else:
                    one[item.index] = content
        return [f"{total % 2**64:016x}" for total in sums.values()] or [
            one.get(index, fingerprints.UNREAD) for index in self._indices()
        ]

    def facts(self) -> dict[str, Any]:
        return {
            "classes": list(self.listing.classes),
            "channels": self.listing.channels,
            "majority": self.majority,
            **({"skipped": most(self.listing.skipped)} if self.listing.skipped else {}),
        }

    def units(self) -> list[Unit]:
        spread, data = load.assign_to_shards(self.listing, self.node.recipe), self.context.data
        return [
            Unit(name, len(items), {"source": _listed(items, data)} | _stamped(items, self.tars), items)
            for name, items in spread.items()
        ]

    def part(self, unit: Unit, count: int) -> Unit:
        """A unit of the first images of another."""
        items = unit.items[:count]
        return replace(unit, samples=len(items), items=items, inputs={**unit.inputs, **_stamped(items, self.tars)})

    def read(self, unit: Unit) -> Shard:
        shard = load.read(self.node.recipe, unit.name, unit.items, self.listing.channels, self.listing.suffix)
        if (now := _stamped(unit.items)) and now["files"] != unit.inputs["files"]:
            raise BadData("files of the source changed after they were listed: run again")
        return shard

    def commit(self, unit: Unit, result: Shard, facts: dict[str, Any]) -> dict[str, Any]:
        contents = fingerprints.join(result.contents or ())
        return super().commit(unit, result, facts | ({"contents": contents} if contents else {}))

    def predict_facts(self) -> dict[str, Any]:
        spread = load.assign_to_shards(
            self.listing, self.node.recipe
        )  # not `units`: these have a digest of every image
        shards = {name: len(items) for name, items in spread.items()}
        facts = self.facts() | counted(shards) | {"image_shape": self._first_shape(spread)}
        _refuse_heavy(facts)
        return facts

    def _first_shape(self, spread: Mapping[str, Images]) -> list[int] | None:
        """Channels, height and width, from the first image that decodes; None where sizes may differ."""
        if getattr(self.node.recipe, "keeps_sizes", False):
            return None
        name, items = next(iter(spread.items()))
        for at in range(len(items)):
            with suppress(BadData):
                shard = load.read(self.node.recipe, name, items[at : at + 1], self.listing.channels, None)
                return [shard.images().shape[3], *shard.images().shape[1:3]]
        return None


def _refuse_heavy(facts: Mapping[str, Any]) -> None:
    """Refuse shards that no worker could hold, as far as the size of the images is known."""
    if facts["image_shape"] and (size := largest_shard(facts) * math.prod(facts["image_shape"])) > MEMORY:
        raise BadInput(
            f"a shard of {largest_shard(facts)} images of {'×'.join(map(str, facts['image_shape']))} takes "
            f"{size / 2**30:.1f} GiB, at most {MEMORY / 2**30:g} GiB are taken: lower shard_size"
        )


def counted(shards: dict[str, int]) -> dict[str, Any]:
    """Images of each shard and of each split, as a manifest has them."""
    return {"shards": shards, "counts": artifacts.per_split(shards.items())}


def _listed(items: Sequence[Item], data: Path) -> str:
    """Digest of a shard's sources: pixels, names and positions of files, or the indices of generated images."""
    if items[0].ref is None:
        return digest(canonical([[i.index, i.label] for i in items]))
    if isinstance(items[0].ref, np.ndarray):
        return digest(
            b"".join(np.ascontiguousarray(i.ref).tobytes() for i in items)
            + canonical([[i.index, i.label] for i in items])
        )
    return digest(canonical([[i.index, i.label, _named(i.ref, data)] for i in items]))


def _stamped(items: Sequence[Item], tars: Mapping[str, load.Stamp] | None = None) -> dict[str, str]:
    """Digest of the sizes and times of a shard's sources, if they are files."""
    stamps = load.stamps_of(items, tars)
    return {} if stamps is None else {"files": digest(canonical(stamps))}


def _named(ref: Any, data: Path) -> Any:
    """A file's name and position, independent of where the folder of local sources lies."""
    if isinstance(ref, tuple):
        return [*ref[1:], ref[0].rpartition("/")[2]]
    return printable(str(ref).removeprefix(str(data)))


class ImagesJob(DatasetJob):
    """Another dataset's images, changed or chosen, shard for shard."""

    @property
    def heavy(self) -> bool:
        return "model" in self.node.inputs

    def facts(self) -> dict[str, Any]:
        images = self.inputs["images"].manifest
        return {"classes": images["classes"], "channels": images["channels"]}

    def predict_facts(self) -> dict[str, Any]:
        images = self.inputs["images"].manifest
        shards = {name: self.samples(count) for name, count in shards_of(images, self.splits()).items()}
        return {key: images[key] for key in ("classes", "channels", "image_shape")} | counted(shards)

    def splits(self) -> list[str]:
        """The splits whose images are taken."""
        return [split for _, split in self.splits_asked()]

    def units(self) -> list[Unit]:
        images, found = self.inputs["images"], []
        others = {role: made.content for role, made in self.inputs.items() if role != "images"} | self.code
        for split in self.splits():
            for name in images.shards(split):
                sha = images.files[f"{name}.tar"]["sha256"]
                found.append(Unit(name, self.samples(images.manifest["shards"][name]), {"images": sha, **others}))
        return found

    def samples(self, count: int) -> int:
        """Samples that a shard will have, of so many of its input."""
        return count

    def read(self, unit: Unit) -> Shard:
        return read_shard(self.context, self.inputs["images"], unit.name)

    def model(self, role: str) -> "Classifier":
        """A model that the dataset is made with, opened."""
        return open_model(self.context, self.inputs[role])


class SearchJob(ImagesJob):
    """Each image of some splits changed by a search in batches."""

    tunes_batch = True

    neutral: ClassVar[Mapping[str, Any]] = {"splits": ["train"], "seed": 0, "steps": 1}
    """Fields that do not change the speed: equal for all parts, so that equally fast ones are measured once."""

    @property
    def steps(self) -> int:
        return int(self.node.recipe.steps)

    def splits_asked(self) -> list[tuple[str, str]]:
        return [("splits", split) for split in self.node.recipe.splits]

    def batch_steps(self) -> int:
        """Forward and backward passes of a batch."""
        return self.steps

    def parts(self, left: Mapping[str, int], source: Mapping[str, Any]) -> list[Work]:
        part = Part(self._neutral(), self.designs(), source_of(self.node).id, self.batch_steps())
        return [Work(part, in_batches(left.values(), self.node.recipe.batch_size))]

    def _neutral(self) -> Node:
        """The node that stands for all that are equally fast."""
        return replace(self.node, recipe=self.node.recipe.model_copy(update=self.neutral))


class AttackJob(SearchJob):
    """Images perturbed and relabelled."""

    key = "attack"
    neutral: ClassVar[Mapping[str, Any]] = {**SearchJob.neutral, "fit_shards": 1, "stop_at_margin": None}

    @classmethod
    def has_column(cls, node: Node, column: str) -> bool:
        return column == "l2" or "model" in node.inputs

    def refuse_mismatch(self) -> None:
        super().refuse_mismatch()
        for role, spared in self.node.inputs.items():
            if role.startswith(SPARED) and spared.version == (attacked := self.node.inputs["model"]).version:
                raise BadInput(
                    f"{self.file_key}.{SPARED.rstrip('.')}: {spared.name} is the attacked model, {attacked.name}, "
                    "under another name; give it a seed of its own, or leave it out"
                )
        rule, recipe = self.node.relabel, self.node.recipe
        assert rule is not None
        place = f"{self.node.group}.{self.node.name}.relabel"
        refuse_rule(place, rule, self.inputs["images"].manifest["classes"], recipe.model)

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
        spared = [self.model(role) for role in sorted(self.inputs) if role.startswith(SPARED)]
        first = self.units()[: recipe.fit_shards] if recipe.method == "universal" else []
        return Attacker(recipe, rule, self.facts()["classes"], model, spared, [self.read(unit) for unit in first])

    def finish(self, marks: Mapping[str, dict[str, Any]]) -> Artifact:
        from stages.attack import refuse_unmoved

        each = [mark["statistics"] for mark in marks.values()]
        if all("moved" in sums for sums in each):  # else a shard is older than this count
            refuse_unmoved(self.node.recipe, *(sum(sums[name] for sums in each) for name in ("aimed", "moved")))
        return super().finish(marks)

    def batch_steps(self) -> int:
        recipe = self.node.recipe
        if recipe.method == "spatial":
            return int(recipe.spatial.candidates)
        return 0 if "steps" in recipe.unused or recipe.method == "universal" else self.steps

    def parts(self, left: Mapping[str, int], source: Mapping[str, Any]) -> list[Work]:
        recipe, found = self.node.recipe, super().parts(left, source)
        if recipe.method == "universal":  # every worker finds the perturbations anew
            fit = sum(list(left.values())[: recipe.fit_shards])
            once = replace(found[0].part, steps=self.steps, once=True)
            found.append(Work(once, in_batches([fit], recipe.batch_size)))
        return found

    def _neutral(self) -> Node:
        """Of the label rules, only the least likely class takes time."""
        rule = self.node.relabel
        timed = rule is not None and rule.rule == "least_likely"
        return replace(super()._neutral(), relabel=rule if timed else Relabel(rule="next"))

    @classmethod
    def shortened(cls, recipe: Any, batch: int, steps: int) -> dict[str, Any]:
        sized = super().shortened(recipe, batch, steps)
        if recipe.method == "spatial":
            return sized | {"spatial": with_tries(recipe.spatial, steps)}
        # With such steps a few lead as far as the recipe's do, and what is saved is as large as it will be.
        return sized | {"steps": steps, "step_size": recipe.eps}


class InvertJob(SearchJob):
    """Images that a model represents as it represents others."""

    key = "invert"

    def predict_facts(self) -> dict[str, Any]:
        model = self.inputs["model"].manifest["design"]
        try_features(self.node.inputs["model"], model, self.node.recipe.layer, self.context.here)
        return super().predict_facts()

    def open(self) -> Callable[[Shard], Shard]:
        from stages.invert import Inverter

        return Inverter(self.node.recipe, self.model("model"))

    @classmethod
    def shortened(cls, recipe: Any, batch: int, steps: int) -> dict[str, Any]:
        return super().shortened(recipe, batch, steps) | {"steps": steps}


class SelectJob(ImagesJob):
    """Some of the images, as they are."""

    key = "select"
    copies = True

    @classmethod
    def has_column(cls, node: Node, column: str) -> bool:
        from pipeline.run.jobs import JOBS  # the table names this class

        images = node.inputs["images"]
        job = JOBS[images.stage]
        return issubclass(job, DatasetJob) and job.has_column(images, column)

    def refuse_mismatch(self) -> None:
        super().refuse_mismatch()
        if not self.has_column(self.node, self.node.recipe.by):
            raise BadInput(
                f"{self.file_key}: {self.node.recipe.images} has no column {self.node.recipe.by}: select from a "
                "dataset that attacks a model"
            )

    def splits(self) -> list[str]:
        return list(self.inputs["images"].manifest["counts"])

    def samples(self, count: int) -> int:
        return kept(self.node.recipe, count)

    def open(self) -> Callable[[Shard], Shard]:
        return partial(select, self.node.recipe)
