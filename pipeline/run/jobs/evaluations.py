"""How evaluations are made."""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pipeline.run import artifacts
from pipeline.run.artifacts import Made
from pipeline.run.jobs.base import ShardJob, Unit, devices, open_model, read_shard
from pipeline.store import canonical, digest
from stages.shard import Shard


class ScoreJob(ShardJob):
    """What some models do on some splits of a dataset: sums per shard, added up at the end."""

    heavy = True

    @abstractmethod
    def summary(self, sums: dict[str, Any]) -> dict[str, Any]:
        """What the sums of one model say."""

    def splits(self) -> list[str]:
        """The splits that are gone through."""
        return [self.node.recipe.split]

    def classes(self) -> list[str]:
        """Names of the classes."""
        return list(self.inputs["on"].manifest["classes"])

    def units(self) -> list[Unit]:
        images = self.inputs["on"]
        models = {role: made.content for role, made in self.inputs.items() if role != "on"}
        return [
            Unit(name, images.manifest["shards"][name], {"on": images.files[f"{name}.tar"]["sha256"], **models})
            for split in self.splits()
            for name in images.shards(split)
        ]

    def read(self, unit: Unit) -> Shard:
        return read_shard(self.place, self.inputs["on"], unit.name)

    def models(self, role: str, opened: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The models of a role, opened, by name; those that are open already are not opened again."""
        there = opened or {}
        found = {
            name.removeprefix(f"{role}."): made for name, made in self.inputs.items() if name.startswith(f"{role}.")
        }
        return {name: there[name] if name in there else open_model(self.place, made) for name, made in found.items()}

    def commit(self, unit: Unit, result: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
        mark = {
            "name": unit.name,
            "samples": unit.samples,
            "inputs": unit.inputs,
            "sums": result,
            "host": artifacts.host(),
        }
        self.place.store.put_json(f"{self.node.folder}/{artifacts.mark_path(unit.name)}", mark | facts)
        return mark | facts

    def finish(self, marks: Mapping[str, dict[str, Any]]) -> Made:
        from stages.evaluate import add

        found = []
        for name in self.node.recipe.models:
            sums = add([marks[shard]["sums"][name] for shard in sorted(marks)])
            found.append(self._facts(name) | self.summary(sums))
        content = self.place.store.put_json(f"{self.node.folder}/result.json", {"rows": found})
        files = {"result.json": (len(content), digest(content)), "recipe.json": self._write_recipe()}
        facts = {"shards": {name: mark["samples"] for name, mark in sorted(marks.items())}}
        facts["devices"] = devices(marks.values())
        return artifacts.publish(self.place.store, self.node, files, digest(canonical(found)), self.inputs, facts)

    def _facts(self, model: str) -> dict[str, Any]:
        """What was scored, and on what: held out are images as they were loaded, of a split that was not trained on."""
        on, split, scored = self.node.inputs["on"], self.node.recipe.split, self.node.inputs[f"models.{model}"]
        return {
            "evaluation": self.node.name,
            "on": on.name,
            "split": split,
            "held_out": on.stage == "load" and not (scored.stage == "train" and scored.recipe.split == split),
            "model": model,
            "trained_on": self.inputs[f"models.{model}"].manifest.get("trained_on"),
        }


class EvaluateJob(ScoreJob):
    """Accuracy, clean and under attack."""

    def open(self) -> Callable[[Shard], dict[str, Any]]:
        from stages.evaluate import score

        recipe, classes = self.node.recipe, self.classes()
        models = self.models("models")
        sources = self.models("sources", models)
        return lambda shard: score(recipe, classes, models, sources, shard)

    def summary(self, sums: dict[str, Any]) -> dict[str, Any]:
        from stages.evaluate import summary

        return summary(self.node.recipe, self.classes(), sums)


class UsefulnessJob(ScoreJob):
    """Usefulness and robust usefulness of features."""

    def splits(self) -> list[str]:
        return list(dict.fromkeys([self.node.recipe.normalise, self.node.recipe.split]))

    def units(self) -> list[Unit]:
        total = self.inputs["on"].manifest["counts"][self.node.recipe.split]
        return [replace(unit, inputs={**unit.inputs, "of": str(total)}) for unit in super().units()]

    def open(self) -> Callable[[Shard], dict[str, Any]]:
        from stages.usefulness import measure

        recipe, classes, models = self.node.recipe, self.classes(), self.models("models")
        total = self.inputs["on"].manifest["counts"][recipe.split]
        return lambda shard: measure(recipe, classes, models, shard, math.ceil(recipe.limit * len(shard) / total))

    def summary(self, sums: dict[str, Any]) -> dict[str, Any]:
        from stages.usefulness import summarise

        return summarise(self.node.recipe, self.classes(), sums)
