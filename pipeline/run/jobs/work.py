"""A node's work cut into parts that can be measured, so that its cost can be estimated before it is made."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipeline.experiment.graph import Node
from pipeline.store import canonical
from stages.recipes import Evaluate, Recipe, Spatial

if TYPE_CHECKING:
    from stages.design import Design

SAMPLE = 128
"""Images of the source that a trial looks at; where more are needed, they are repeated. Also the batch of work that has
none in its recipe."""

UNKNOWN_CLASSES = 1000
"""Classes of a network whose weights are not on this machine: ImageNet's. The last layer takes next to no time."""


@dataclass(frozen=True)
class Part:
    """Work of one kind, which more steps make longer: the unit of measurement.

    Attributes:
        node: whose job does it; its recipe is reduced to what decides the speed, so that equal work has equal keys.
        models: role → design.
        source: id of the load whose images are taken.
        steps: of a batch, or of an epoch of a training; 0 where there are none.
        once: whether a worker does it once, before its first shard.
        processes: how many do it side by side, if not as many as there are workers.
    """

    node: Node
    models: "Mapping[str, Design]"
    source: str
    steps: int
    once: bool = False
    processes: int | None = None

    @property
    def key(self) -> bytes:
        """Equal for what is equally fast, whatever the number of steps."""
        node, rule = self.node, self.node.relabel
        designs = {role: design.as_json() for role, design in self.models.items()}
        described = [node.stage, node.recipe.parameters(), rule.parameters() if rule else None, self.source, designs]
        return canonical([*described, self.once, self.processes])

    @property
    def batch(self) -> int:
        """Images of a batch."""
        return int(getattr(self.node.recipe, "batch_size", SAMPLE))

    def of_batch(self, batch: int) -> "Part":
        """The same work in batches of another size."""
        return replace(self, node=replace(self.node, recipe=self.node.recipe.model_copy(update={"batch_size": batch})))


@dataclass(frozen=True)
class Work:
    """A part, and its number of batches in each shard, or in all epochs of a training.

    What a worker does once has one entry.
    """

    part: Part
    batches: tuple[int, ...]


@dataclass(frozen=True)
class Trial:
    """A short run of a part that stands for all of it.

    Attributes:
        recipe: the part's, with as many steps and as large batches as are tried.
        images: images that it takes.
        batches: batches that its work is counted as.
        outputs: things of one size that it leaves in the store: images, or one model.
    """

    recipe: Recipe
    images: int
    batches: int
    outputs: int


def in_batches(sizes: Iterable[int], batch: int, times: int = 1) -> tuple[int, ...]:
    """Batches of each shard, repeated so many times; none crosses its shard."""
    return tuple(times * math.ceil(size / batch) for size in sizes)


def with_tries(space: Spatial, count: int) -> Spatial:
    """The same space with so many tries."""
    return space.model_copy(update={"grid": [1, 1, count], "tries": count})


def assumed_design(model: Node, known: Mapping[str, Any]) -> "Design":
    """The design of a model, as far as its speed goes.

    Args:
        model: its node.
        known: the design in its manifest, or what is predicted of it: at least ``classes`` and ``shape``.
    """
    from stages.design import Design

    if "arch" in known:
        return Design.from_json(dict(known))
    channels, height, width = known["shape"]  # its weights are elsewhere
    classes, half = known["classes"] or UNKNOWN_CLASSES, (0.5,) * channels
    return Design(str(model.arch), classes, (channels, height, width), half, half)


def scoring(design: "Design", source: Node, batch: int, steps: int = 0, **attacks: Any) -> Part:
    """One model scored on images as they are, or under an attack."""
    recipe = Evaluate(models=["m"], on="x", split="train", batch_size=batch, **attacks)
    node = Node("evaluations", "trial", "evaluate", recipe, None, {"on": source}, "")
    return Part(node, {"models.m": design}, source.id, steps)


def scoring_clean(design: "Design", source: Node, sizes: Iterable[int], batch: int) -> Work:
    """One model's answers to images as they are."""
    return Work(scoring(design, source, batch), in_batches(sizes, batch))
