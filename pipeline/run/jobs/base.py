"""What every kind of node has in common, and how what is in the store is read again."""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa

from pipeline.experiment.graph import Node
from pipeline.run import artifacts, fingerprints
from pipeline.run.artifacts import Artifact
from pipeline.run.documents import fits
from pipeline.run.jobs.checks import refuse_model
from pipeline.run.jobs.work import Part, Trial, Work, assumed_design
from pipeline.store import Store, digest, unsealed
from stages.design import Design
from stages.errors import BadInput
from stages.load import Item
from stages.recipes import Recipe, is_own
from stages.shard import Shard, split_of, unpack

if TYPE_CHECKING:
    from stages.model import Classifier


@dataclass(frozen=True)
class Context:
    """Where things are.

    Attributes:
        store: the store.
        data: folder of local sources.
        here: folder of the user's own modules.
        check_files: whether the user's files are compared by content, not by the time of their last change.
    """

    store: Store
    data: Path
    here: Path
    check_files: bool = False


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
        return split_of(self.name)


class Job(ABC):
    """How one node is made, and what is known of it before.

    A plan needs no input to exist: what is predicted of one (`predict_facts`) stands in the place of its manifest, and
    `refuse_mismatch`, `predict_facts` and `parts` ask for no more.

    Args:
        node: what is made.
        context: where.
        inputs: role → what it is made from; assigned anew once these are made.
        fetch: whether what lies on another machine may be downloaded.
    """

    key: ClassVar[str | None]
    """Key in the experiment file, below the node's name, that asks for such a node; None where there is none."""

    counted: ClassVar[str]
    """What its progress is counted in."""

    longest_trial: ClassVar[float] = math.inf
    """Most steps of a batch, or batches of an epoch, that are worth measuring."""

    tunes_batch: ClassVar[bool] = False
    """Whether the batch size is only a matter of speed, so that a faster one is worth proposing."""

    def __init__(self, node: Node, context: Context, inputs: Mapping[str, Artifact], fetch: bool = True) -> None:
        self.node, self.context, self.inputs, self.fetch = node, context, dict(inputs), fetch

    # ------------------------------------------------------------------------------ before it is made

    @property
    def file_key(self) -> str:
        """The place in the experiment file that asks for the node."""
        return ".".join(filter(None, (self.node.group, self.node.name, self.key)))

    @property
    def dataset(self) -> Mapping[str, Any] | None:
        """The manifest of the dataset that it takes images from, or what is predicted of it."""
        role = images_role(self.node)
        return self.inputs[role].manifest if role else None

    def splits_asked(self) -> list[tuple[str, str]]:
        """Each split that the recipe names, with the key that names it."""
        return []

    def refuse_mismatch(self) -> None:
        """Hold the recipe against what the node is made from.

        Raises:
            BadInput: a split that does not exist, a map that does not fit, classes or shapes that differ.
        """
        images, parent = self.dataset, images_of(self.node)
        if images is None or parent is None:
            return
        for key, split in self.splits_asked():
            if split not in images["counts"]:
                raise BadInput(
                    f"{self.file_key}.{key}: {parent.name} has no split {split!r}, it has {', '.join(images['counts'])}"
                )
        shape = images["image_shape"]
        if shape and (why := self.node.recipe.misfit(shape, largest_shard(images))):
            raise BadInput(f"{self.file_key}: {why}")
        for role, model in self.node.inputs.items():
            if model.group == "models":
                refuse_model(f"{self.file_key}.{role.partition('.')[0]}", model, self.inputs[role].manifest, images)

    @abstractmethod
    def predict_facts(self) -> dict[str, Any]:
        """What can be known of the node before it is made, in the terms of its manifest.

        Raises:
            BadInput: it cannot be made.
        """

    def remark(self) -> str | None:
        """Advice on a recipe that can be made as it is, but is hardly meant so; asked where its input is known."""
        return None

    def checked(self) -> str | None:
        """What was checked of its own input, where a person would else not know whether it fits."""
        return None

    # ------------------------------------------------------------------------- the user's own files

    @cached_property
    def sources(self) -> pa.Table:
        """The user's own files that it is made from, as `fingerprints` has them; without a source that is gone."""
        return self.own_code

    def sources_with_contents(self, files: frozenset[str]) -> pa.Table:
        """The same, with the contents of some of these files, which are read."""
        return self.sources

    @cached_property
    def own_code(self) -> pa.Table:
        """The source code of the user's networks that it runs: of an attack or evaluation, those of its models."""
        models = [node for node in (self.node, *self.node.inputs.values()) if node.group == "models"]
        return fingerprints.code([node.arch for node in models if node.arch and is_own(node.arch)], self.context.here)

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Role → digest of these files."""
        return fingerprints.digests(self.sources)

    def note_sources(self) -> None:
        """Take the fingerprints of these files, before any of them is read and before the job goes to a worker.

        Raises:
            BadInput: a source that is there cannot be listed.
        """
        _ = self.fingerprints

    @property
    def code(self) -> dict[str, str]:
        """Arch → digest of its source code, for each network of the user that runs."""
        return {role: found for role, found in self.fingerprints.items() if is_own(role)}

    # ------------------------------------------------------------------------------------ its cost

    def designs(self) -> dict[str, Design]:
        """Role → design of each model that it is made from, as far as their speed goes."""
        models = {role: node for role, node in self.node.inputs.items() if node.group == "models"}
        return {role: assumed_design(node, self.inputs[role].manifest["design"]) for role, node in models.items()}

    @abstractmethod
    def parts(self, left: Mapping[str, int], source: Mapping[str, Any]) -> list[Work]:
        """Its work, cut into parts that can be measured.

        Args:
            left: the shards that are to be made, with the images of each.
            source: manifest, or predicted facts, of the load that the images go back to.
        """

    @classmethod
    @abstractmethod
    def trial(cls, recipe: Recipe, batch: int, steps: int) -> Trial:
        """A short run of such a node.

        Args:
            recipe: a part's.
            batch: images of a batch.
            steps: steps of a batch, or batches of an epoch.
        """

    # ---------------------------------------------------------------------------------------------

    def _write_recipe(self) -> tuple[int, str]:
        content = self.context.store.put_json(f"{self.node.folder}/recipe.json", self.node.described())
        return len(content), digest(content)


class ShardJob(Job):
    """A node that is made shard by shard: read → work → commit."""

    counted = "shards"

    @property
    def heavy(self) -> bool:
        """Whether `open` loads models: then a worker keeps it open, and gets a GPU where there is one."""
        return True

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
        """Write the result of the work, then its commit mark, which is returned."""

    @abstractmethod
    def finish(self, marks: Mapping[str, dict[str, Any]]) -> Artifact:
        """Publish the node from the commit marks of all its shards."""

    def stored(self) -> dict[str, int]:
        """Every file of the node that is in the store, with its size in bytes."""
        return self.context.store.files(self.node.folder, recursive=True)

    def committed(self, units: Sequence[Unit], there: Mapping[str, int]) -> dict[str, dict[str, Any]]:
        """The commit marks that hold: made from the same inputs, the shard there with its size.

        Args:
            units: shards whose marks are read.
            there: the node's files, from `stored`.
        """
        paths = {f"{self.node.folder}/{artifacts.mark_path(unit.name)}": unit for unit in units}
        kind, found = artifacts.MARKS[self.node.group], {}
        for path, content in self.context.store.find_all(paths).items():
            unit, mark = paths[path], unsealed(path, content or b"")
            if not mark or not fits(kind, mark) or (mark["name"], mark["inputs"]) != (unit.name, unit.inputs):
                continue
            if self._there(mark, there):
                found[unit.name] = mark
        return found

    def _there(self, mark: Mapping[str, Any], there: Mapping[str, int]) -> bool:
        return True

    def parts(self, left: Mapping[str, int], source: Mapping[str, Any]) -> list[Work]:
        """One part without batches: reading and committing are all that there is."""
        return [Work(Part(self.node, {}, source_of(self.node).id, 0), (0,) * len(left))]

    @classmethod
    def trial(cls, recipe: Recipe, batch: int, steps: int) -> Trial:
        images = max(batch, 2)  # an inversion begins at another image
        short = recipe.model_copy(update=cls.shortened(recipe, batch, max(steps, 1)))
        return Trial(short, images, math.ceil(images / batch), images)

    @classmethod
    def shortened(cls, recipe: Any, batch: int, steps: int) -> dict[str, Any]:
        """The fields that give a recipe batches of so many images and so many steps of each."""
        return {"batch_size": batch} if "batch_size" in type(recipe).model_fields else {}


# ------------------------------------------------------------------------------------- nodes and facts


def images_role(node: Node) -> str | None:
    """The role of the dataset that a node takes images from; None of what is made from none."""
    return next((role for role, parent in node.inputs.items() if parent.group == "datasets"), None)


def images_of(node: Node) -> Node | None:
    """The dataset that a node takes images from; None of what is made from none."""
    role = images_role(node)
    return node.inputs[role] if role else None


def source_of(node: Node) -> Node:
    """The load that a node's images go back to; of a node that is made from none, itself."""
    while (parent := images_of(node)) is not None:
        node = parent
    return node


def largest_shard(dataset: Mapping[str, Any]) -> int:
    """Images of a dataset's largest shard."""
    return int(max(dataset["shards"].values()))


def shards_of(dataset: Mapping[str, Any], splits: Iterable[str]) -> dict[str, int]:
    """The shards of some splits of a dataset, with the images of each."""
    wanted = set(splits)
    return {name: count for name, count in dataset["shards"].items() if split_of(name) in wanted}


def computed_on(parts: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """How many of the shards, or of the epochs, were made on each kind of device, and with which settings there."""
    parts = list(parts)
    devices = Counter(part.get("device", "unknown") for part in parts)
    settings = Counter(setting for part in parts for setting in part.get("settings", ()))
    return {"devices": dict(sorted(devices.items())), "settings": dict(sorted(settings.items()))}


# ------------------------------------------------------------------------------------ from the store


def read_shard(context: Context, made: Artifact, name: str) -> Shard:
    """A shard of a dataset of the store; a damaged one is withdrawn, so that the next run makes it again.

    Raises:
        BadData: it is damaged.
    """
    tar = artifacts.read_file(context.store, made, f"{name}.tar", take_back=True)
    return unpack(name, tar, made.manifest["channels"], len(made.manifest["classes"]))


def open_model(context: Context, made: Artifact) -> "Classifier":
    """A model of the store, ready for use on this process's device.

    Raises:
        BadData: its weights are not those that were published.
    """
    from stages import model

    return model.load(Design.from_json(made.manifest["design"]), weights_of(context, made), context.here)


def weights_of(context: Context, made: Artifact) -> bytes:
    """The weights of a model of the store.

    Raises:
        BadData: they are not those that were published.
    """
    return artifacts.read_file(context.store, made, "weights.safetensors", take_back=True)
