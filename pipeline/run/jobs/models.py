"""How models are made."""

import json
import math
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.experiment.graph import Node
from pipeline.run import artifacts, fingerprints
from pipeline.run.artifacts import Artifact
from pipeline.run.jobs.base import Job, computed_on, read_shard, source_of, weights_of
from pipeline.run.jobs.checks import neutral_split, tried
from pipeline.run.jobs.work import Part, Trial, Work, assumed_design, scoring_clean
from pipeline.store import canonical, digest
from stages.design import Design
from stages.errors import BadData, BadInput
from stages.load import GONE, stamp
from stages.pretrained import fetch
from stages.recipes import Pretrained, Recipe
from stages.seeds import torch_seed
from stages.shard import Shard

if TYPE_CHECKING:
    from stages.train import Examples, Group

SHORT: dict[str, Any] = {
    "split": "train",
    "seed": 0,
    "epochs": 2,
    "lr": 1e-6,
    "schedule": "constant",
    "milestones": [],
    "memory_budget": 2**20,
    "eval_images": 0,
    "workers": 1,
}
"""What does not change the speed of a training's step, and two epochs: equal for all, so that equally fast trainings
are measured once."""


FEW_STEPS = 5
"""Steps of an epoch below which the batch size is remarked on."""


class ModelJob(Job):
    """A model: its weights, the design that reads them, and the metrics of its training."""

    counted = "epochs"

    @property
    @abstractmethod
    def epochs(self) -> int:
        """Steps of its progress."""

    @property
    @abstractmethod
    def threads(self) -> int:
        """CPU threads of each process."""

    @property
    @abstractmethod
    def workers(self) -> int:
        """Processes that make it: more than one need `ddp.steps`."""

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether nothing is left to do but to publish it, which needs no worker."""

    @property
    @abstractmethod
    def trained_on(self) -> str | None:
        """Name of the dataset that it learned from; None where that is not known here."""

    @abstractmethod
    def epoch_images(self) -> int:
        """Images of an epoch."""

    @abstractmethod
    def steps(self) -> Iterator[dict[str, Any]]:
        """Make it in this process; yields the metrics of each epoch as it ends, and last the ``manifest``.

        With the metrics comes the number of requests that were sent to the store again meanwhile (``store_retries``).

        Raises:
            BadInput: several processes are needed to make it.
        """

    def recorded(self) -> pa.Table:
        """The user's own files that it was made from, with their contents, for its record."""
        return self.sources

    def _publish(self, design: dict[str, Any], weights: bytes, history: list[dict[str, Any]]) -> Artifact:
        """Write the files and the manifest, again if another run of the same model has put its own between them.

        The metrics hold rates, so two runs write different bytes.
        """
        store, folder = self.context.store, self.node.folder
        metrics = "".join(json.dumps(line) + "\n" for line in history).encode()
        contents = {"weights.safetensors": weights, "metrics.jsonl": metrics}
        facts = {"design": design, "trained_on": self.trained_on} | computed_on(history)
        while True:
            recipe = store.put_json(f"{folder}/recipe.json", self.node.described())
            for name, content in contents.items():
                store.put(f"{folder}/{name}", content)
            files = {
                name: (len(content), digest(content)) for name, content in (contents | {"recipe.json": recipe}).items()
            }
            made = artifacts.publish(store, self.node, files, digest(weights), self.inputs, self.recorded(), facts)
            if all(store.find(f"{folder}/{name}") == content for name, content in contents.items()):
                return made


class TrainJob(ModelJob):
    """A model trained epoch by epoch, with a checkpoint after each."""

    key = "train"
    longest_trial = 4  # its images are written and read first
    ready = False

    @property
    def epochs(self) -> int:
        return int(self.node.recipe.epochs)

    @property
    def threads(self) -> int:
        return int(self.node.recipe.threads)

    @property
    def workers(self) -> int:
        return int(self.node.recipe.workers)

    @property
    def trained_on(self) -> str:
        return self.node.inputs["on"].name

    def epoch_images(self) -> int:
        return int(self.inputs["on"].manifest["counts"][self.node.recipe.split])

    def splits_asked(self) -> list[tuple[str, str]]:
        return [("split", self.node.recipe.split)]

    def predict_facts(self) -> dict[str, Any]:
        """The design, as far as it is known; built and tried on empty images."""
        from stages import features, train

        recipe, count = self.node.recipe, self.epoch_images()
        if count < recipe.batch_size:
            raise BadInput(
                f"batch_size {recipe.batch_size} is more than the {count} images of {recipe.on} {recipe.split}"
            )
        if (design := self._predicted_design()) is None:
            on = self.inputs["on"].manifest
            return {"design": {"classes": len(on["classes"]), "shape": on["image_shape"]}}
        tried(self.node, train.refuse_misfit, design, self.context.here)
        if recipe.whiten or recipe.norm_bias_lr != 1:
            tried(self.node, train.refuse_unfit, recipe, design, self.context.here)
        if recipe.probe:
            tried(self.node, features.refuse_without, design, None, self.context.here)
        return {"design": dict(design.as_json())}

    def remark(self) -> str | None:
        count, batch = self.epoch_images(), self.node.recipe.batch_size
        steps, better = count // batch, 2 ** max(1, int(math.log2(max(1, count // (2 * FEW_STEPS)))))
        if steps >= FEW_STEPS or better >= batch:
            return None
        return (
            f"batch_size {batch} makes {steps} step{'s' * (steps > 1)} an epoch of {count} images, which is little to "
            f"learn from; batch_size {better} makes {count // better}"
        )

    def _predicted_design(self) -> Design | None:
        """Its design, with a placeholder for mean and deviation; None where that is not known yet."""
        on, probed = self.inputs["on"].manifest, self.inputs.get("probe")
        if on["image_shape"] is None or (probed is not None and "arch" not in probed.manifest["design"]):
            return None
        return design_of(
            self.node,
            {**on, **neutral_split(on["channels"], self.node.recipe.split)},
            probed.manifest if probed else None,
        )

    def parts(self, left: Mapping[str, int], source: Mapping[str, Any]) -> list[Work]:
        """Its epochs; and its answers to the test images that are scored after each."""
        recipe, origin = self.node.recipe, source_of(self.node)
        update = SHORT | {"batch_size": recipe.batch_size // recipe.workers}
        short = replace(self.node, recipe=recipe.model_copy(update=update))
        batches = self.epoch_images() // recipe.batch_size
        watched = min(recipe.eval_images, source["counts"].get("test", 0))
        on = self.inputs["on"].manifest
        known = {"classes": len(on["classes"]), "shape": on["image_shape"]}
        design = self._predicted_design() or assumed_design(self.node, known)
        return [
            Work(
                Part(short, self.designs(), origin.id, batches, processes=recipe.workers),
                (recipe.epochs,),
            ),
            scoring_clean(design, origin, [watched] * recipe.epochs, recipe.batch_size),
        ]

    @classmethod
    def trial(cls, recipe: Recipe, batch: int, steps: int) -> Trial:
        return Trial(recipe.model_copy(update={"batch_size": batch}), images=batch * steps, batches=1, outputs=1)

    def steps(self) -> Iterator[dict[str, Any]]:
        if self.workers > 1:
            raise BadInput(
                f"{self.node.id} asks for {self.workers} workers, which takes Ray: leave out --engine inline"
            )
        return self.train()

    @property
    def _checkpoint(self) -> str:
        return f"{self.node.folder}/checkpoint.safetensors"

    def train(self, group: "Group | None" = None) -> Iterator[dict[str, Any]]:
        """This process's part of a training, alone or in a group.

        Only the first of a group reads the checkpoint, writes to the store and yields what `steps` yields.
        """
        from stages import train

        store, recipe, on, group = self.context.store, self._recipe(), self.inputs["on"], group or train.ALONE
        probed, counted = self.inputs.get("probe"), store.retries
        design = design_of(self.node, on.manifest, probed.manifest if probed else None)
        start = weights_of(self.context, probed) if probed else None
        watch = self._watched() if group.rank == 0 else None
        checkpoint = before = store.find(self._checkpoint) if group.rank == 0 else None
        examples = self._examples(on)
        for checkpoint, history in train.fit(recipe, design, examples, self.context.here, before, group, start, watch):
            store.put(self._checkpoint, checkpoint)
            yield history[-1] | {"store_retries": store.retries - counted}
            counted = store.retries
        if group.rank == 0:
            assert checkpoint is not None
            made = self._publish(design.as_json(), train.weights_of(checkpoint), train.history_of(checkpoint))
            store.delete(self._checkpoint)
            yield {"manifest": made.manifest}

    def _recipe(self) -> Any:
        """The recipe, with a new seed if models were used to make the dataset.

        With the same seed, the learner would share the source model's initial weights; the perturbations would transfer
        unusually well and inflate its accuracy.
        """
        recipe, generation = self.node.recipe, self.node.generation
        if generation == 0:
            return recipe
        return recipe.model_copy(update={"seed": torch_seed(recipe.seed, "generation", generation)})

    def _examples(self, on: Artifact) -> "Examples":
        from stages.train import Examples

        names = on.shards(self.node.recipe.split)
        counts = {name: on.manifest["shards"][name] for name in names}
        size = sum(counts.values()) * int(np.prod(on.manifest["image_shape"]))
        origin = digest(canonical({role: made.content for role, made in self.inputs.items()} | self.code))
        return Examples(names, counts, partial(read_shard, self.context, on), size, origin)

    def _watched(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Pixels and labels of some test images of the original source, for the learning curve."""
        count, made = self.node.recipe.eval_images, artifacts.find(self.context.store, source_of(self.node))
        names = made.shards("test") if made and count else []
        if made is None or not names:
            return None
        shards: list[Shard] = []
        while sum(map(len, shards)) < count and len(shards) < len(names):
            shards.append(read_shard(self.context, made, names[len(shards)]))
        pixels, labels = np.concatenate([s.images() for s in shards]), np.concatenate([s.label for s in shards])
        return pixels[:count], labels[:count]


class Imported(NamedTuple):
    """Weights that were made elsewhere, as a network of ours holds them, and the seconds that it took to read them."""

    design: Design
    weights: bytes
    seconds: float


def _import(recipe: Pretrained, data: Path, here: Path) -> Imported:
    from stages.pretrained import checkpoint

    started = time.perf_counter()
    design, weights = checkpoint.import_pretrained(recipe, data, here)
    return Imported(design, weights, time.perf_counter() - started)


class PretrainedJob(ModelJob):
    """A model that was trained elsewhere: its file is read once, before the run begins, and published by it."""

    key = "pretrained"
    counted = "checkpoints"
    epochs = threads = workers = 1
    trained_on = None

    @cached_property
    def imported(self) -> Imported:
        """The file as a model, read in another process where the network is user code.

        Raises:
            BadInput: it cannot be read, or does not fit the network.
        """
        return tried(self.node, _import, self.node.recipe, self.context.data, self.context.here)

    @cached_property
    def sources(self) -> pa.Table:
        return pa.concat_tables([self.own_code, self._weights(self.context.check_files)])

    def _weights(self, read: bool) -> pa.Table:
        """The checkpoint, if it lies on this machine; a digest in the recipe is part of the version instead."""
        recipe = self.node.recipe
        path = fetch.local(recipe.weights, self.context.data) if recipe.sha256 is None else None
        if path is None or (found := stamp(path)) == GONE:
            return fingerprints.SCHEMA.empty_table()
        content = fingerprints.content_of(path) if read else None
        return fingerprints.rows("weights", [recipe.weights], found[:1], found[1:], [content])

    def sources_with_contents(self, files: frozenset[str]) -> pa.Table:
        return pa.concat_tables([self.own_code, self._weights(read=True)])

    def recorded(self) -> pa.Table:
        table = pa.concat_tables([self.own_code, self._weights(read=True)])
        if fingerprints.digests(table) != self.fingerprints:
            raise BadData(f"checkpoint {self.node.recipe.weights} changed while it was read: run again")
        return table

    @property
    def ready(self) -> bool:
        return "imported" in self.__dict__

    def epoch_images(self) -> int:
        return 0

    def predict_facts(self) -> dict[str, Any]:
        from stages.pretrained import checkpoint

        recipe = self.node.recipe
        if not self.fetch and checkpoint.is_remote(recipe):
            classes = len(recipe.outputs) if recipe.outputs else recipe.classes
            return {"design": {"classes": classes, "shape": recipe.shape}}
        return {"design": self.imported.design.as_json()}

    def remark(self) -> str | None:
        if not self.ready:
            return None
        recipe, design = self.node.recipe, self.imported.design
        unset = ["mean"] if recipe.mean is None and not any(design.mean) else []
        unset += ["std"] if recipe.std is None and all(value == 1 for value in design.std) else []
        match unset:
            case ["mean", "std"]:
                return (
                    "neither the recipe nor the checkpoint has mean and std, so the network's inputs are pixels from 0 "
                    "to 1; if it was trained on normalised images, set both"
                )
            case [one]:
                return f"it has no {one} beside its {'std' if one == 'mean' else 'mean'}: set both"
        return None

    def checked(self) -> str:
        weights = self.node.recipe.weights
        if not self.ready:
            return f"{weights} is downloaded by the run, and checked then"
        design = self.imported.design
        size = " × ".join(map(str, design.shape))
        return f"{weights} fits {design.arch}, for {design.classes} classes and images of {size}"

    def parts(self, left: Mapping[str, int], source: Mapping[str, Any]) -> list[Work]:
        return []

    @classmethod
    def trial(cls, recipe: Recipe, batch: int, steps: int) -> Trial:
        raise NotImplementedError("a pretrained model has no parts")

    def steps(self) -> Iterator[dict[str, Any]]:
        design, weights, _ = self.imported
        yield {"epoch": 1}
        yield {"manifest": self._publish(design.as_json(), weights, []).manifest}


def design_of(node: Node, on: Mapping[str, Any], probed: Mapping[str, Any] | None = None) -> Design:
    """The design of a training: the recipe's arch for the images and classes of a dataset, or the probed model's.

    Args:
        node: the training.
        on: the dataset's manifest, or what is predicted of it.
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
    mean, std = (given or on[name][recipe.split] for name, given in (("mean", recipe.mean), ("std", recipe.std)))
    shape, scale = tuple(on["image_shape"]), recipe.logit_scale
    return Design(recipe.arch, len(on["classes"]), shape, tuple(mean), tuple(std), logit_scale=scale)
