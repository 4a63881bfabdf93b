"""How models are made."""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.experiment.graph import Node
from pipeline.run import artifacts
from pipeline.run.artifacts import Made
from pipeline.run.jobs.base import Place, devices, read_shard, weights_of
from pipeline.store import canonical, digest
from stages.design import Design
from stages.errors import BadInput
from stages.seeds import torch_seed
from stages.shard import Shard

if TYPE_CHECKING:
    from stages.train import Group


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
        from stages.pretrained import checkpoint

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
            {"design": design, "trained_on": trained_on, "devices": devices(history)},
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
