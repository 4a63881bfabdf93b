"""What every kind of node has in common, and how what is in the store is read again."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.experiment.graph import Node
from pipeline.run import artifacts
from pipeline.run.artifacts import Made
from pipeline.run.documents import fits
from pipeline.store import Store, digest, unsealed
from stages.design import Design
from stages.load import Item
from stages.shard import Shard, unpack


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


def devices(parts: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many of the shards, or of the epochs, were made on each kind of device."""
    return dict(sorted(Counter(part.get("device", "unknown") for part in parts).items()))


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
