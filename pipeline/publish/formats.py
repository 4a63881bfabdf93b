"""The formats of `notbugs export`: which files each consists of. None decides where they are written, or when.

A format's images are the files of the shards, byte for byte, except in `Npz`, which holds pixels.
"""

import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.catalog.words import recipe_file
from pipeline.publish import card, pictures
from pipeline.run import artifacts
from pipeline.run.artifacts import Artifact
from pipeline.store import Store
from stages.errors import BadData, BadInput
from stages.limits import MEMORY
from stages.shard import COLUMNS, Sample, key, samples, split_of, unpack

File = tuple[str, bytes]
"""Path at the destination, and content."""

ROW_GROUP = 100
"""Rows of a row group with images: what the Hub's viewer reads at a time."""


class Format(ABC):
    """A dataset as files of another format.

    Args:
        store, made: the dataset.
    """

    workers = 4
    """Units in work at a time; each is held in memory."""

    def __init__(self, store: Store, made: Artifact) -> None:
        self.store, self.made, self.manifest = store, made, made.manifest
        self.classes: list[str] = self.manifest["classes"]

    def units(self) -> list[str]:
        """What is written at a time: the shards, in order."""
        return sorted(self.manifest["shards"])

    @abstractmethod
    def files(self, unit: str) -> Iterator[File]:
        """The files of a unit.

        Raises:
            BadData: its shard is damaged.
        """

    def last(self, written: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[File]:
        """Files about the whole, written at the end.

        Args:
            written: unit → name, bytes and sha256 of its files.
        """
        yield from ()

    def tar(self, shard: str) -> bytes:
        """A shard, checked against its digest."""
        return artifacts.read_file(self.store, self.made, f"{shard}.tar")

    def samples(self, shard: str) -> list[Sample]:
        return list(samples(shard, self.tar(shard), len(self.classes)))

    @cached_property
    def table(self) -> pa.Table:
        """The rows of ``samples.parquet`` of samples, without those of images left out."""
        rows = pq.read_table(io.BytesIO(artifacts.read_file(self.store, self.made, "samples.parquet")))
        return rows.filter(pc.is_null(rows["error"]))

    def by_split(self) -> dict[str, list[str]]:
        """Split → its shards, in order."""
        return {split: self.made.shards(split) for split in self.manifest["counts"]}


class ImageFolder(Format):
    """``<split>/<class>/<key>.png``, as torchvision's ImageFolder reads it.

    That numbers classes by the order of their folders, so folders have a number in front unless their names are in
    order, and a class without images in a split has a folder, too, with a hidden file in it.
    """

    def files(self, unit: str) -> Iterator[File]:
        for sample in self.samples(unit):
            place = f"{split_of(unit)}/{self.folders[sample.label]}"
            yield f"{place}/{key(sample.facts.index)}.{sample.suffix}", sample.file

    def last(self, written: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[File]:
        for split in self.manifest["counts"]:
            there = set(self.table.filter(pc.equal(self.table["split"], split))["label"].to_pylist())
            for label in sorted(set(range(len(self.classes))) - there):
                yield f"{split}/{self.folders[label]}/.empty", b""

    @cached_property
    def folders(self) -> list[str]:
        """Name of each class's folder."""
        plain = [re.sub(r"[^\w .,()+-]", "_", name).strip(" .")[:64] or "_" for name in self.classes]
        if plain == sorted(plain) and len({name.casefold() for name in plain}) == len(plain):
            return plain
        digits = len(str(len(plain) - 1))
        return [f"{i:0{digits}d}_{name}" for i, name in enumerate(plain)]


class Parquet(Format):
    """``data/<split>-00000-of-00003.parquet`` with an image column, and a card: what the Hub's viewer shows."""

    NOT_COLUMNS: ClassVar = ("split", "shard", "label", "error", "offset", "size")

    def files(self, unit: str) -> Iterator[File]:
        found = self.samples(unit)
        rows = self.table.filter(pc.equal(self.table["shard"], unit))
        if rows["key"].to_pylist() != [key(sample.facts.index) for sample in found]:
            raise BadData(f"{self.made.folder}/samples.parquet has other samples than {unit}")
        files = [{"bytes": s.file, "path": f"{key(s.facts.index)}.{s.suffix}"} for s in found]
        image = pa.array(files, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        columns = {"image": image, "label": rows["label"]}
        columns |= {name: rows[name] for name in COLUMNS if name not in self.NOT_COLUMNS and self._measured(name)}
        table = pa.table(columns)
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": self._features(table)}})}
        )
        out = io.BytesIO()
        pq.write_table(table, out, row_group_size=ROW_GROUP, write_page_index=True)
        split = split_of(unit)
        shards = self.made.shards(split)
        yield f"data/{split}-{shards.index(unit):05d}-of-{len(shards):05d}.parquet", out.getvalue()

    def _measured(self, name: str) -> bool:
        return bool(self.table[name].null_count < len(self.table))

    def _features(self, table: pa.Table) -> dict[str, Any]:
        """The columns in the terms of `datasets`."""
        arrow = {"double": "float64", "float": "float32"}
        features: dict[str, Any] = {
            name: {"dtype": arrow.get(str(kind), str(kind)), "_type": "Value"}
            for name, kind in zip(table.column_names, table.schema.types, strict=True)
        }
        features["image"] = {"_type": "Image"}
        for name in {"label", "source_label", "target"} & set(features):
            features[name] = {"names": self.classes, "_type": "ClassLabel"}
        return features

    def last(self, written: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[File]:
        shown = pictures.pictures(self.store, self.made)
        if shown is not None:
            yield pictures.NAME, shown.picture
        about, rows = card.told_of(self.store, self.made)
        recipe = recipe_file(self.store, self.made)
        yield card.NAME, card.render(self.made, recipe, about, shown, rows, card.PARQUET).encode()


class Wids(Format):
    """The shards under unique names, and an index ``<split>.json`` for the random access of `wids`.

    Its cache, shared by all datasets, goes by the name of a shard's file, and ours are all called train-000000.tar.
    """

    def _name(self, shard: str) -> str:
        name = re.sub(r"[^\w.-]", "_", self.manifest["name"])
        return f"{name}-{self.manifest['version']}-{shard}.tar"

    def files(self, unit: str) -> Iterator[File]:
        yield self._name(unit), self.tar(unit)

    def last(self, written: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[File]:
        for split, shards in self.by_split().items():
            listed = [
                {
                    "url": self._name(shard),
                    "nsamples": self.manifest["shards"][shard],
                    "filesize": written[shard][0]["bytes"],
                }
                for shard in shards
            ]
            name = f"{self.manifest['name']}-{self.manifest['version']}-{split}"
            index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": name, "shardlist": listed}
            yield f"{split}.json", json.dumps(index, indent=1).encode()


class Mds(Format):
    """``<split>/shard.00000.mds`` and ``<split>/index.json``: what MosaicML Streaming's MDSWriter writes."""

    IMAGES: ClassVar = {"png": "png", "jpg": "jpeg"}
    """Suffix → encoding; any other file is its bytes."""

    @cached_property
    def columns(self) -> dict[str, tuple[str, int | None]]:
        """Column → its encoding, and its size if all values have one; sorted by name."""
        image = self.IMAGES.get(self.manifest["members"][0], "bytes")
        return {"image": (image, None), "key": ("str", None), "label": ("int", 8), "source_label": ("int", 8)}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The beginning of every shard, and part of the index."""
        return {
            "version": 2,
            "format": "mds",
            "compression": None,
            "hashes": [],
            "size_limit": None,
            "column_names": list(self.columns),
            "column_encodings": [encoding for encoding, _ in self.columns.values()],
            "column_sizes": [size for _, size in self.columns.values()],
        }

    def files(self, unit: str) -> Iterator[File]:
        rows = [self._row(sample) for sample in self.samples(unit)]
        config = json.dumps(self.config, sort_keys=True).encode()
        count = np.uint32(len(rows)).tobytes()
        begin = len(count) + 4 * (len(rows) + 1) + len(config)
        offsets = begin + np.array([0, *map(len, rows)], np.uint64).cumsum()
        if offsets[-1] >= 2**32:
            raise BadInput(f"{unit} has more than 4 GiB, the most of an MDS shard: export --to wids")
        content = b"".join([count, offsets.astype(np.uint32).tobytes(), config, *rows])
        yield f"{split_of(unit)}/{self._basename(unit)}", content

    def _row(self, sample: Sample) -> bytes:
        """The sizes of values without a fixed size, then the values."""
        stem = key(sample.facts.index).encode()
        sizes = np.array([len(sample.file), len(stem)], np.uint32).tobytes()
        numbers = np.array([sample.label, sample.facts.source_label], np.int64).tobytes()
        return sizes + sample.file + stem + numbers

    def _basename(self, shard: str) -> str:
        return f"shard.{self.made.shards(split_of(shard)).index(shard):05d}.mds"

    def last(self, written: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[File]:
        for split, shards in self.by_split().items():
            listed = [
                {
                    **self.config,
                    "samples": self.manifest["shards"][shard],
                    "raw_data": {"basename": self._basename(shard), "bytes": written[shard][0]["bytes"], "hashes": {}},
                    "zip_data": None,
                }
                for shard in shards
            ]
            yield f"{split}/index.json", json.dumps({"version": 2, "shards": listed}, sort_keys=True).encode()


class Npz(Format):
    """``<split>.npz``: images (N × H × W × C, uint8), labels, source_labels, indices, classes."""

    workers = 1

    def units(self) -> list[str]:
        """The splits.

        Raises:
            BadInput: the images differ in size, or take more memory than there should be asked for.
        """
        shape, counts = self.manifest["image_shape"], self.manifest["counts"]
        if shape is None:
            raise BadInput(f"{self.manifest['name']} has images of different sizes, which no array holds: --to parquet")
        if (largest := max(counts.values()) * int(np.prod(shape))) > MEMORY:
            raise BadInput(
                f"a split of {self.manifest['name']} takes {largest / 2**30:.1f} GiB as one array, more than "
                f"{MEMORY / 2**30:g}: --to parquet"
            )
        return sorted(counts)

    def files(self, unit: str) -> Iterator[File]:
        channels, classes = self.manifest["channels"], len(self.classes)
        shards = [unpack(name, self.tar(name), channels, classes) for name in self.made.shards(unit)]
        out = io.BytesIO()
        np.savez(
            out,
            images=np.concatenate([shard.images() for shard in shards]),
            labels=np.concatenate([shard.label for shard in shards]),
            source_labels=np.concatenate([shard.source_label for shard in shards]),
            indices=np.concatenate([shard.index for shard in shards]),
            classes=np.array(self.classes),
        )
        yield f"{unit}.npz", out.getvalue()


FORMATS: dict[str, type[Format]] = {
    "imagefolder": ImageFolder,
    "parquet": Parquet,
    "wids": Wids,
    "mds": Mds,
    "npz": Npz,
}
"""The formats by name."""
