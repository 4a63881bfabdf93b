"""How evaluations are made."""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pipeline.experiment.graph import Node
from pipeline.run import artifacts
from pipeline.run.artifacts import Artifact
from pipeline.run.jobs.base import ShardJob, Unit, computed_on, open_model, read_shard, shards_of, source_of
from pipeline.run.jobs.checks import refuse_rule, try_features
from pipeline.run.jobs.work import Part, Work, in_batches, scoring, scoring_clean, with_tries
from pipeline.store import canonical, digest
from stages.errors import BadInput
from stages.limits import CONFUSED
from stages.recipes import EvalAttack, Invert, Usefulness
from stages.shard import Shard


class ScoreJob(ShardJob):
    """Scores of some models on some splits of a dataset: sums per shard, added up at the end."""

    @abstractmethod
    def summary(self, sums: dict[str, Any]) -> dict[str, Any]:
        """The result of one model, from its sums."""

    def splits_asked(self) -> list[tuple[str, str]]:
        return [("split", self.node.recipe.split)]

    def splits(self) -> list[str]:
        """The splits whose shards are scored, each once."""
        return list(dict.fromkeys(split for _, split in self.splits_asked()))

    def predict_facts(self) -> dict[str, Any]:
        return {"shards": shards_of(self.inputs["on"].manifest, self.splits())}

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
        return read_shard(self.context, self.inputs["on"], unit.name)

    def models(self, role: str, opened: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The models of a role, opened, by name; those that are open already are not opened again."""
        there = opened or {}
        found = {
            name.removeprefix(f"{role}."): made for name, made in self.inputs.items() if name.startswith(f"{role}.")
        }
        return {name: there[name] if name in there else open_model(self.context, made) for name, made in found.items()}

    def commit(self, unit: Unit, result: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
        mark = {
            "name": unit.name,
            "samples": unit.samples,
            "inputs": unit.inputs,
            "sums": result,
            "host": artifacts.host(),
        }
        self.context.store.put_json(f"{self.node.folder}/{artifacts.mark_path(unit.name)}", mark | facts)
        return mark | facts

    def finish(self, marks: Mapping[str, dict[str, Any]]) -> Artifact:
        from stages.evaluate import add

        found = []
        for name in self.node.recipe.models:
            sums = add([marks[shard]["sums"][name] for shard in sorted(marks)])
            found.append(self._facts(name) | self.summary(sums))
        content = self.context.store.put_json(f"{self.node.folder}/result.json", {"rows": found})
        files = {"result.json": (len(content), digest(content)), "recipe.json": self._write_recipe()}
        shards = {name: mark["samples"] for name, mark in sorted(marks.items())}
        facts = {"shards": shards} | computed_on(marks.values())
        return artifacts.publish(self.context.store, self.node, files, digest(canonical(found)), self.inputs, facts)

    def _facts(self, model: str) -> dict[str, Any]:
        """What was scored, and on what. Held out are images as they were loaded, of a split that was not trained on."""
        on, split, scored = self.node.inputs["on"], self.node.recipe.split, self.node.inputs[f"models.{model}"]
        return {
            "evaluation": self.node.name,
            "on": on.name,
            "split": split,
            "held_out": not on.inputs and not (scored.inputs and scored.recipe.split == split),
            "model": model,
            "trained_on": self.inputs[f"models.{model}"].manifest.get("trained_on"),
        }


class EvaluateJob(ScoreJob):
    """Accuracy, clean and under attack."""

    key = None  # the entry itself

    def refuse_mismatch(self) -> None:
        super().refuse_mismatch()
        recipe = self.node.recipe
        rules = {"agreement": recipe.agreement} | {
            f"attacks.{i}.target_rule": attack.target_rule for i, attack in enumerate(recipe.attacks)
        }
        for key, rule in rules.items():
            if rule is not None:
                refuse_rule(f"{self.file_key}.{key}", rule, self.classes(), None)
        if recipe.confusion and len(self.classes()) > CONFUSED:
            raise BadInput(
                f"{self.file_key}.confusion: is counted for at most {CONFUSED} classes, the dataset has "
                f"{len(self.classes()):,}; leave it out"
            )

    def open(self) -> Callable[[Shard], dict[str, Any]]:
        from stages.evaluate import score

        recipe, classes = self.node.recipe, self.classes()
        models = self.models("models")
        surrogates = self.models("surrogates", models)
        return lambda shard: score(recipe, classes, models, surrogates, shard)

    def summary(self, sums: dict[str, Any]) -> dict[str, Any]:
        from stages.evaluate import summary

        return summary(self.node.recipe, self.classes(), sums)

    def parts(self, left: Mapping[str, int], source: Mapping[str, Any]) -> list[Work]:
        recipe, origin, sizes, designs = self.node.recipe, source_of(self.node), left.values(), self.designs()
        models = [designs[f"models.{name}"] for name in recipe.models]
        found = [scoring_clean(model, origin, sizes, recipe.batch_size) for model in models]
        for attack in recipe.attacks:
            batches = in_batches(sizes, attack.batch_size, attack.restarts)
            for searched in models if attack.surrogate is None else [designs[f"surrogates.{attack.surrogate}"]]:
                part = scoring(searched, origin, attack.batch_size, attack.steps, attacks=[_neutral(attack)])
                found.append(Work(part, batches))
            if attack.surrogate is not None:  # the result, and noise, are evaluated by all models
                shown = in_batches(sizes, attack.batch_size, 1 + attack.restarts)
                found += [Work(scoring(model, origin, attack.batch_size), shown) for model in models]
        for space in recipe.spatial:
            parts = [scoring(model, origin, recipe.batch_size, space.candidates, spatial=[space]) for model in models]
            found += [Work(part, in_batches(sizes, recipe.batch_size)) for part in parts]
        return found

    @classmethod
    def shortened(cls, recipe: Any, batch: int, steps: int) -> dict[str, Any]:
        attacks = [attack.model_copy(update={"steps": steps, "batch_size": batch}) for attack in recipe.attacks]
        spaces = [with_tries(space, steps) for space in recipe.spatial]
        return super().shortened(recipe, batch, steps) | {"attacks": attacks, "spatial": spaces}


def _neutral(attack: EvalAttack) -> EvalAttack:
    """An attack that stands for all that are equally fast: radius, seed and surrogate do not matter."""
    return attack.model_copy(
        update={"eps": 0.5, "step_size": 0.1, "steps": 1, "restarts": 1, "surrogate": None, "seed": 0}
    )


class UsefulnessJob(ScoreJob):
    """Usefulness and robust usefulness of features."""

    key = "usefulness"

    def splits_asked(self) -> list[tuple[str, str]]:
        return [(key, getattr(self.node.recipe, key)) for key in ("split", "normalise")]

    def splits(self) -> list[str]:
        return super().splits()[::-1]  # the split that normalises comes first

    def predict_facts(self) -> dict[str, Any]:
        for name in self.node.recipe.models:
            role = f"models.{name}"
            design = self.inputs[role].manifest["design"]
            try_features(self.node.inputs[role], design, self.node.recipe.layer, self.context.here)
        return super().predict_facts()

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

    def parts(self, left: Mapping[str, int], source: Mapping[str, Any]) -> list[Work]:
        """Features of all images; for some also a search per feature and direction, as fast as an inversion's."""
        from stages.features import Penultimate
        from stages.model import Classifier

        recipe, origin, found = self.node.recipe, source_of(self.node), list[Work]()
        total = self.inputs["on"].manifest["counts"][recipe.split]
        searched = shards_of({"shards": left}, [recipe.split])
        for design in self.designs().values():
            width = Penultimate(Classifier(design, self.context.here).eval(), recipe.layer).width
            searches = [
                2 * width * math.ceil(recipe.limit * count / total) if name in searched else 0
                for name, count in left.items()
            ]
            found.append(scoring_clean(design, origin, left.values(), recipe.batch_size))
            part = Part(_search(self.node, origin), {"model": design}, origin.id, recipe.steps)
            found.append(Work(part, in_batches(searches, recipe.batch_size)))
        return found


def _search(node: Node, source: Node) -> Node:
    """An inversion that is as fast as the search for a feature."""
    shared = Invert.model_fields.keys() & Usefulness.model_fields.keys() - {"step_size", "steps"}
    asked = Invert(images="x", model="m", steps=1, **{name: getattr(node.recipe, name) for name in shared})
    return Node("datasets", "trial", "invert", asked, None, {"images": source}, "")
