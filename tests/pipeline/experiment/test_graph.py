"""Versions name recipes: equal for equal meaning, different for every parameter that changes the result."""

import copy
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray import cloudpickle
from support import TINY

from pipeline.experiment.graph import build
from pipeline.experiment.spec import parse
from stages.errors import BadInput
from stages.limits import DEPTH


def versions(experiment):
    return {node.id: node.version for node in build(parse(experiment))}


def test_defaults_written_out_give_the_same_version(tiny):
    before = versions(tiny)
    tiny["datasets"]["clean"]["load"]["seed"] = 0
    tiny["datasets"]["other"]["attack"]["step_size"] = 1.5 / 5
    tiny["datasets"]["other"]["relabel"] = {"rule": "other", "seed": 0}
    assert versions(tiny) == before


def test_names_and_order_do_not_change_versions(tiny):
    before = versions(tiny)
    tiny["name"] = "renamed"
    tiny["datasets"] = dict(reversed(tiny["datasets"].items()))
    tiny["datasets"]["pictures"] = tiny["datasets"].pop("clean")
    for part in ("other", "control"):
        tiny["datasets"][part]["attack"]["images"] = "pictures"
    tiny["models"]["standard"]["train"]["on"] = "pictures"
    tiny["evaluations"]["accuracy"]["on"] = "pictures"
    after = versions(tiny)
    assert after.pop("datasets/pictures") == before.pop("datasets/clean")
    assert after == before


CHANGES = [
    (("datasets", "clean", "load", "seed"), 1),
    (("datasets", "clean", "load", "shard_size"), 50),
    (("datasets", "other", "attack", "eps"), 1.0),
    (("datasets", "other", "attack", "batch_size"), 16),
    (("datasets", "other", "attack", "precision"), "bfloat16"),
    (("datasets", "other", "relabel"), "next"),
    (("models", "standard", "train", "threads"), 2),
    (("models", "standard", "train", "augment"), "flip"),
    (("evaluations", "accuracy", "split"), "train"),
]


@pytest.mark.parametrize(("path", "value"), CHANGES, ids=lambda x: ".".join(x) if isinstance(x, tuple) else None)
def test_a_changed_parameter_changes_the_node_and_all_that_hang_on_it(path, value, tiny):
    before, part = versions(tiny), tiny
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    after = versions(tiny)
    changed = {node for node in before if before[node] != after[node]}
    hanging = {node.id for node in build(parse(tiny)) if f"{path[0]}/{path[1]}" in ancestors(node)}
    assert changed == hanging


def ancestors(node):
    return {node.id}.union(*(ancestors(parent) for parent in node.inputs.values()))


def test_where_data_lies_is_no_part_of_the_version():
    def cifar(**where):
        return versions({"name": "c", "datasets": {"c": {"load": {"source": "cifar10", **where}}}})

    assert cifar() == cifar(root="elsewhere", download=False)


def test_what_a_control_does_not_use_is_no_part_of_its_version(tiny):
    before = versions(tiny)["datasets/control"]
    tiny["datasets"]["control"]["attack"] |= {"eps": 3.0, "steps": 7, "seed": 5}
    assert versions(tiny)["datasets/control"] == before


@given(order=st.permutations(list(TINY["models"])), datasets=st.permutations(list(TINY["datasets"])))
def test_every_node_comes_after_what_it_is_made_from(order, datasets):
    experiment = copy.deepcopy(TINY)
    experiment["models"] = {name: experiment["models"][name] for name in order}
    experiment["datasets"] = {name: experiment["datasets"][name] for name in datasets}
    seen = set()
    for node in build(parse(experiment)):
        assert {parent.id for parent in node.inputs.values()} <= seen
        seen.add(node.id)


def test_a_circle_is_named(tiny):
    tiny["models"]["standard"]["train"]["on"] = "other"
    with pytest.raises(
        BadInput,
        match=r"datasets/other → models/standard → datasets/other|models/standard → datasets/other → models/standard",
    ):
        build(parse(tiny))


def test_a_generation_is_how_many_models_stand_behind(tiny):
    tiny["datasets"]["again"] = copy.deepcopy(tiny["datasets"]["other"])
    tiny["datasets"]["again"]["attack"]["model"] = "from_other"
    tiny["models"]["from_again"] = {"train": {**tiny["models"]["from_other"]["train"], "on": "again"}}
    found = {node.id: node.generation for node in build(parse(tiny))}
    assert [found[f"models/{name}"] for name in ("standard", "from_other", "from_again")] == [0, 1, 2]
    assert found["datasets/clean"] == 0


def chain(length):
    """A chain of models, each trained on images that were attacked with the one before."""
    asked = {"name": "chain", "datasets": {"d0": TINY["datasets"]["clean"]}, "models": {}}
    for n in range(length):
        asked["models"][f"m{n}"] = {"train": {**TINY["models"]["standard"]["train"], "on": f"d{n}"}}
        attack = {"attack": {**TINY["datasets"]["other"]["attack"], "images": f"d{n}", "model": f"m{n}"}}
        asked["datasets"][f"d{n + 1}"] = attack | {"relabel": "other"}
    return asked


def test_a_long_chain_is_built_at_once_and_travels():
    began = time.process_time()
    last = build(parse(chain(DEPTH // 2 - 1)))[-1]
    assert last.generation == DEPTH // 2 - 1
    assert cloudpickle.loads(cloudpickle.dumps(last)).version == last.version
    assert time.process_time() - began < 5


def test_a_chain_without_end_is_refused():
    with pytest.raises(BadInput, match=f"^datasets.d{DEPTH // 2}: more than {DEPTH} nodes in a chain lead to it"):
        build(parse(chain(1000)))


def test_a_circle_of_many_is_told_in_short():
    asked = chain(1000)
    asked["models"]["m0"]["train"]["on"] = "d999"
    with pytest.raises(BadInput, match=r"the experiment goes in a circle: .* → … → ") as refused:
        build(parse(asked))
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("name", ["../../x", "a/b/c", "/", "models/standard", "..", "", "x" * 4000])
def test_a_name_that_is_no_node_is_refused_whatever_it_holds(tiny, name):
    tiny["models"]["from_other"]["train"]["on"] = name
    with pytest.raises(
        BadInput, match=r"^models.from_other.train.on: names .*, which is not one of the datasets; "
    ) as refused:
        build(parse(tiny))
    assert len(str(refused.value)) < 300
