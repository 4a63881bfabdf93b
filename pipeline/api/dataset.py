"""Read a dataset of a store: by sample, as a table, or as a PyTorch dataset."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.launch import STORE
from pipeline.run import artifacts, runs, tags
from pipeline.run.artifacts import Artifact
from pipeline.run.documents import NodeName, fits
from pipeline.store import Store, unsealed
from stages.errors import BadData, BadInput, did_you_mean, some
from stages.images import Decoded, open_image
from stages.shard import SUFFIXES, key

if TYPE_CHECKING:
    from pipeline.api.torch_data import Examples, Stream


@dataclass(frozen=True)
class Sample:
    """One sample.

    Attributes:
        key: stem of its members in the shard.
        index: index in the source; unique over the splits.
        split: its split.
        image: H × W × C, uint8.
        label: the label to train on; in an attacked dataset, the target.
        source_label: the source's label, the true class.
    """

    key: str
    index: int
    split: str
    image: np.ndarray
    label: int
    source_label: int


class Dataset:
    """A dataset of a store, opened by `open`.

    Everything is read on demand. Images are read one by one, by their offsets in the shard.

    Attributes:
        name, version: name and version in the store.
        path: path or URL of its folder, which contains the shards.
        classes: class names; a label is a position in this list.
        splits: split → number of samples.
        image_shape: channels, height, width; None if images differ in size.
        manifest: the whole manifest.
    """

    def __init__(self, store: Store, artifact: Artifact) -> None:
        self.store, self._artifact, self.manifest = store, artifact, artifact.manifest
        self.name: str = self.manifest["name"]
        self.version: str = self.manifest["version"]
        self.path = store.at(artifact.folder)
        self.classes: list[str] = self.manifest["classes"]
        self.splits: dict[str, int] = self.manifest["counts"]
        self.image_shape = tuple(self.manifest["image_shape"]) if self.manifest["image_shape"] else None

    def __repr__(self) -> str:
        counts = ", ".join(f"{split}: {count:,}" for split, count in self.splits.items())
        shape = " × ".join(map(str, self.image_shape)) if self.image_shape else "of different sizes"
        about = f"{counts}; {len(self.classes)} classes; images {shape}"
        return f"<notbugs.Dataset {self.name} {self.version} ({about})>"

    def __len__(self) -> int:
        return sum(self.splits.values())

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Sample:
        """The sample at a position among the rows of `table` without an error.

        Raises:
            IndexError: the position is out of range.
            BadData: the sample is damaged.
        """
        if not -len(self) <= i < len(self):
            raise IndexError(f"{self.name} has {len(self)} samples, got position {i}")
        row = {name: column[i % len(self)] for name, column in self._places.items()}
        index = int(row["index"])
        image = self.decoded(self.file(i % len(self))).pixels()
        return Sample(key(index), index, str(row["split"]), image, int(row["label"]), int(row["source_label"]))

    @cached_property
    def table(self) -> pa.Table:
        """The rows of `samples.parquet`, one per sample and per image left out; see docs/data-format.md.

        Raises:
            BadData: it is damaged.
        """
        return pq.read_table(io.BytesIO(artifacts.read_file(self.store, self._artifact, "samples.parquet")))

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The recipe of the dataset, from `recipe.json`.

        Raises:
            BadData: it is damaged.
        """
        content = artifacts.read_file(self.store, self._artifact, "recipe.json")
        return unsealed(f"{self._artifact.folder}/recipe.json", content) or {}

    @property
    def parents(self) -> dict[str, dict[str, str]]:
        """Role → node, version and content digest of each input."""
        return {role: dict(parent) for role, parent in self.manifest["parents"].items()}

    @property
    def source(self) -> "Dataset":
        """The dataset that its images were loaded as, with their true labels and the test split; or itself.

        Raises:
            BadInput: the store no longer has it.
        """
        if (parent := self.parents.get("images")) is None:
            return self
        return open_dataset(parent["node"].partition("/")[2], self.store.url, parent["version"]).source

    @cached_property
    def _places(self) -> dict[str, np.ndarray]:
        """Columns with each sample's place in its shard and its labels, in the order of `table`."""
        rows = self.table.filter(pa.compute.is_null(self.table["error"]))
        if len(rows) != len(self):
            raise BadData(f"{self.path}/samples.parquet has {len(rows)} samples, the manifest {len(self)}")
        names = ("shard", "split", "index", "label", "source_label", "offset", "size")
        return {name: rows[name].combine_chunks().to_numpy(zero_copy_only=False) for name in names}

    @property
    def labels(self) -> np.ndarray:
        """The labels of all samples, by position; N, int64."""
        return self._places["label"]

    def positions(self, split: str) -> np.ndarray:
        """Positions of a split's samples, in order.

        Raises:
            BadInput: there is no such split.
        """
        self.refuse_split(split)
        return np.flatnonzero(self._places["split"] == split)

    def refuse_split(self, split: str) -> None:
        """Raises:
        BadInput: there is no such split.
        """
        if split not in self.splits:
            made_from = self.parents.get("images", {}).get("node", "").partition("/")[2]
            hint = f"; it was made from {made_from}, which may have it: see `source`" if made_from else ""
            raise BadInput(f"{self.name} has no split {split!r}, it has {', '.join(self.splits)}{hint}")

    def file(self, i: int) -> bytes:
        """The bytes of a sample's image file in the shard: PNG, or the original JPEG or WebP.

        Raises:
            BadData: the bytes at its place are not this sample's image.
        """
        row = self._places
        start, size, stem = int(row["offset"][i]), int(row["size"][i]), key(int(row["index"][i]))
        shard = f"{self._artifact.folder}/{row['shard'][i]}.tar"
        content = self.store.read(shard, first=size + HEADER, offset=start - HEADER)
        header = content[:HEADER].partition(b"\0")[0].decode(errors="replace")
        if header not in {f"{stem}.{suffix}" for suffix in SUFFIXES}:
            raise BadData(f"{self.store.at(shard)} is damaged: sample {stem} is not where samples.parquet has it")
        return content[HEADER:]

    def decoded(self, file: bytes) -> Decoded:
        """The image of a sample's file.

        Raises:
            BadData: it is damaged.
        """
        try:
            return open_image(file, self.manifest["channels"])
        except BadData as error:
            raise BadData(f"an image of {self.path} {error}; `notbugs verify` checks every file") from error

    def shard(self, name: str) -> bytes:
        """The bytes of a shard, checked against its digest.

        Raises:
            BadData: it is damaged.
        """
        return artifacts.read_file(self.store, self._artifact, f"{name}.tar")

    def shards(self, split: str) -> dict[str, int]:
        """Shard name → number of samples, for a split's shards in order."""
        self.refuse_split(split)
        return {name: self.manifest["shards"][name] for name in self._artifact.shards(split)}

    def torch(self, split: str = "train", transform: Callable[[Any], Any] | None = None) -> "Examples":
        """A map-style PyTorch dataset of one split: pairs of image and label.

        Args:
            split: the split.
            transform: called with a PIL image, as in torchvision's datasets; by default the image becomes a float32
                tensor in [0, 1], C × H × W.
        """
        from pipeline.api.torch_data import Examples

        return Examples(self, split, transform)

    def stream(
        self,
        split: str = "train",
        transform: Callable[[Any], Any] | None = None,
        shuffle: bool = True,
        seed: int = 0,
        rank: int | None = None,
        world: int | None = None,
    ) -> "Stream":
        """An iterable PyTorch dataset of one split, read shard by shard.

        Over all ranks and their loaders' workers, each sample occurs once per epoch, and all get the same number of
        samples, give or take one. The order depends only on the seed and the epoch.

        Args:
            split, transform: as in `torch`.
            shuffle: shuffle the shards, and the samples within each; otherwise keep the order of `table`. Each shard is
                a random sample of the dataset, so shuffling across shards is unnecessary.
            seed: seed of the order.
            rank, world: this process's rank and the number of processes; by default those of `torch.distributed`,
                else 0 and 1.
        """
        from pipeline.api.torch_data import Stream

        return Stream(self, split, transform, shuffle, seed, rank, world)


HEADER = 512
"""Bytes of a tar member's header."""


def open_dataset(
    name: str,
    store: str | Path = STORE,
    version: str | None = None,
    tag: str | None = None,
    run: str | None = None,
) -> Dataset:
    """Open a dataset of a store.

    Args:
        name: name of the dataset.
        store: folder, or s3:// or gs:// URL.
        version: sixteen hexadecimal digits, or a prefix; by default the newest version.
        tag: a tag that `notbugs tag` gave to a version.
        run: a run, or an experiment, for its latest run: the version that it made or found.

    Raises:
        BadInput: there is no such dataset, version, tag or run, or more than one of the last three is given.
        BadData: the tag, or the run's record, is damaged.
    """
    place = Store(str(store))
    if not fits(NodeName, name):
        raise BadInput(f"{name!r} is no name of a dataset")
    if sum(each is not None for each in (version, tag, run)) > 1:
        raise BadInput(f"a version of {name} is named by `version`, by `tag` or by `run`, got several: keep one")
    if tag is not None:
        version = _tagged(place, name, tag)
    elif run is not None:
        version = _of_run(place, name, run)
    named = artifacts.by_name(place, name, ("datasets",))
    if found := [one for one in named if one.manifest["version"].startswith(version or "")]:
        return Dataset(place, found[-1])
    if not (known := place.folders("datasets")):
        raise BadInput(f"the store {place.url} has no datasets: name another, or run an experiment first")
    if name in known and not named:
        raise BadInput(f"dataset {name} in {place.url} is not finished, or damaged: run its experiment again")
    what = f"version {version} of dataset {name}" if version and name in known else f"dataset {name}"
    hint = did_you_mean(name, known, f"it has {', '.join(known)}")
    raise BadInput(f"the store {place.url} has no {what}{hint}")


def _of_run(store: Store, name: str, run: str) -> str:
    """The version that a run made or found.

    Raises:
        BadInput: there is no such run, or the dataset is none of its.
        BadData: the run's record is damaged.
    """
    record = runs.load_run(store, run)
    node = record["nodes"].get(f"datasets/{name}")
    if node is None:
        known = [each.partition("/")[2] for each in record["nodes"] if each.startswith("datasets/")]
        hint = did_you_mean(name, known, f"it has {some(known)}")
        raise BadInput(f"run {record['run']} has no dataset {name}{hint}")
    return str(node["version"])


def _tagged(store: Store, name: str, tag: str) -> str:
    """The version that has a tag.

    Raises:
        BadInput: there is no such tag.
    """
    node = f"datasets/{name}"
    if found := tags.find(store, node, tag):
        return str(found["version"])
    known = sorted(each["tag"] for each in tags.every(store, f"{tags.ROOT}/{node}").values() if each)
    hint = did_you_mean(tag, known, f"it has {', '.join(known) or 'none'}")
    raise BadInput(f"dataset {name} in {store.url} has no tag {tag}{hint}")
