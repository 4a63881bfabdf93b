"""PyTorch datasets over a dataset of a store: map-style, and as a stream."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils import data

from pipeline.api.dataset import Dataset
from stages.errors import BadInput
from stages.prefetch import prefetch
from stages.seeds import generator
from stages.shard import Sample, samples

AHEAD = 2
"""Shards to prefetch."""


class Examples(data.Dataset[tuple[Any, int]]):
    """A map-style dataset of one split: pairs of image and label. Made by `Dataset.torch`.

    Attributes:
        classes: class names.
        targets: the labels, N.
    """

    def __init__(self, dataset: Dataset, split: str, transform: Callable[[Any], Any] | None) -> None:
        self.dataset, self.transform = dataset, transform
        self.classes = dataset.classes
        self._positions = dataset.positions(split)
        self.targets: list[int] = dataset.labels[self._positions].tolist()

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return _item(self.dataset, self.dataset.file(int(self._positions[i])), self.transform), self.targets[i]


class Stream(data.IterableDataset[tuple[Any, int]]):
    """An iterable dataset of one split, shard by shard: pairs of image and label. Made by `Dataset.stream`.

    `state_dict` and `load_state_dict` resume an epoch in the middle; torchdata's `StatefulDataLoader` calls them in
    each worker. The numbers of workers and ranks must stay the same.

    Attributes:
        epoch: epoch of the next iteration; each finished iteration increments it. A loader's workers have copies of
            this dataset, which end with them, so call `set_epoch` before each epoch, as for `DistributedSampler`.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        transform: Callable[[Any], Any] | None,
        shuffle: bool,
        seed: int,
        rank: int | None,
        world: int | None,
    ) -> None:
        if (rank is None) != (world is None) or not 0 <= (rank or 0) < (world or 1):
            raise BadInput(f"rank and world go together, rank from 0 to world - 1, got rank {rank} and world {world}")
        self.dataset, self.split, self.transform, self.shuffle, self.seed = dataset, split, transform, shuffle, seed
        self.rank, self.world = (rank, world or 1) if rank is not None else _distributed()
        self.shards = dataset.shards(split)
        self.epoch, self._given, self._begin = 0, 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration, from its start."""
        self.epoch, self._begin = epoch, 0

    def __len__(self) -> int:
        """Number of this rank's samples per epoch."""
        return _share(sum(self.shards.values()), self.rank, self.world)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        self._given, self._begin = self._begin, 0
        for sample in self._from(self._given):
            self._given += 1
            yield _item(self.dataset, sample.file, self.transform), sample.label
        self.epoch, self._given = self.epoch + 1, 0

    def _from(self, given: int) -> Iterator[Sample]:
        """The samples of this worker of this rank, after the first `given`."""
        parts = [(name, at[max(0, given - before) :]) for name, before, at in self._parts() if given < before + len(at)]
        names = [name for name, _ in parts]
        for (name, at), content in zip(parts, prefetch(self.dataset.shard, names, AHEAD), strict=True):
            found = list(samples(name, content, len(self.dataset.classes)))
            yield from (found[i] for i in at)

    def _parts(self) -> list[tuple[str, int, np.ndarray]]:
        """This worker's shards: name, number of this worker's samples before it, positions of its samples in order."""
        worker = data.get_worker_info()
        workers = worker.num_workers if worker else 1
        place, places = self.rank * workers + (worker.id if worker else 0), self.world * workers
        total = sum(self.shards.values())
        first, last = total * place // places, total * (place + 1) // places
        names, found, begin = sorted(self.shards), list[tuple[str, int, np.ndarray]](), 0
        if self.shuffle:
            names = [names[i] for i in generator(self.seed, "stream", self.epoch).permutation(len(names))]
        for name in names:
            count = self.shards[name]
            low, high = max(first - begin, 0), min(last - begin, count)
            if low < high:
                found.append((name, begin + low - first, self._order(name, count)[low:high]))
            begin += count
        return found

    def _order(self, name: str, count: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(count)
        return generator(self.seed, f"stream {name}", self.epoch).permutation(count)

    def state_dict(self) -> dict[str, Any]:
        """The position in the current epoch."""
        return {"version": self.dataset.version, "epoch": self.epoch, "given": self._given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state at the next iteration.

        Raises:
            BadInput: the state belongs to a stream over another dataset.
        """
        if state["version"] != self.dataset.version:
            raise BadInput(f"this state is of version {state['version']}, the stream of {self.dataset.version}")
        self.epoch, self._begin = state["epoch"], state["given"]


def _item(dataset: Dataset, file: bytes, transform: Callable[[Any], Any] | None) -> Any:
    """Decode and transform an image file.

    Raises:
        BadData: it is damaged.
    """
    image = dataset.decoded(file)
    if transform is not None:
        return transform(image.image)
    return torch.tensor(image.pixels()).permute(2, 0, 1).float() / 255


def _share(total: int, place: int, places: int) -> int:
    return total * (place + 1) // places - total * place // places


def _distributed() -> tuple[int, int]:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
