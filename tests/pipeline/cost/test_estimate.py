"""The estimate of a plan: counts are exact, sums are as documented, and nothing is written to the store."""

import json
import math
import tarfile
from dataclasses import replace

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from support import TINY

from pipeline.cli import main
from pipeline.cost import estimate, trial
from pipeline.cost.estimate import Cost, Estimate, Measured, Site, cost_of, makespan, parts_of
from pipeline.cost.trial import Device, Measurement, Rate, Trials
from pipeline.experiment import spec
from pipeline.experiment.graph import build
from pipeline.run.jobs import Context
from pipeline.run.preflight import preflight
from pipeline.store import Store
from stages.errors import TooLarge

RATE = Rate(fixed=0.5, step=1.0, read=0.001, commit=0.002, stored=100, tried=32)


def plan(*args, code=0):
    result = CliRunner().invoke(main, ["plan", *map(str, args)])
    assert result.exit_code == code, f"{result.output}\n{result.stderr}\n{result.exception!r}"
    return result


@pytest.fixture(scope="module")
def priced(tmp_path_factory):
    """The estimates of the small experiment for this machine and for two devices, its source already loaded.

    Returns the plan's JSON document, and its stderr.
    """
    folder, patch = tmp_path_factory.mktemp("priced"), pytest.MonkeyPatch()
    file, store = folder / "experiment.yaml", folder / "store"
    top = {"select": {"images": "other", "keep": "top", "share": 0.3}}
    file.write_text(yaml.safe_dump(TINY | {"datasets": TINY["datasets"] | {"top": top}}))
    made = CliRunner().invoke(main, ["run", str(file), "--store", str(store), "--engine", "inline", "--only", "clean"])
    assert made.exit_code == 0, made.stderr
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    patch.setattr(trial, "SECONDS", 0.01)
    patch.setattr(estimate, "SIZES", ())
    said = plan(file, "--store", store, "--cost", "--gpus", 2, "--workers", 1, "--json")
    patch.undo()
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before, "something was written"
    return json.loads(said.stdout), said.stderr


def test_a_plan_counts_images_steps_and_shards_exactly(priced):
    counted = {node["node"]: node["cost"] for node in priced[0]["nodes"]}
    assert counted.pop("datasets/clean") is None, "what is there costs nothing"
    found = {name: (said["images"], said["batch_steps"], said["shards"]) for name, said in counted.items()}
    assert found == {
        "datasets/other": (192, 3 * 2 * 3, 3),  # three shards of two batches, three steps each
        "datasets/control": (192, 0, 3),
        "datasets/top": (3 * 19, 0, 3),
        "models/standard": (2 * 192, 2 * 6, 0),
        "models/from_other": (2 * 192, 2 * 6, 0),
        "evaluations/accuracy": (192, 0, 3),
    }


def test_a_plan_measures_every_node_and_tells_what_it_tries(priced):
    document, stderr = priced
    for node in document["nodes"]:
        if said := node["cost"]:
            assert said["measured"]
            assert said["device_seconds"] > 0 and said["wall_seconds"] > 0
            assert said["wall_seconds_on_gpus"] <= said["wall_seconds"], "two devices are never slower than one"
    sizes = {node["node"]: node["cost"] and node["cost"]["stored_bytes"] for node in document["nodes"]}
    assert sizes["datasets/other"] > 192 * 3 * 512, "a tar has at least three members of a header each"
    assert sizes["models/standard"] == sizes["models/from_other"] > 300_000, "95 thousand parameters, four bytes each"
    assert stderr.count("trying: train small_cnn") == 1, "what is equally fast is tried once"


def test_a_plan_names_the_fastest_batch_of_an_attack_alone(priced):
    chosen = {node["node"]: node["cost"] and node["cost"].get("batch_size") for node in priced[0]["nodes"]}
    batch = chosen.pop("datasets/other")
    assert batch["recipe"] == 32 and batch["fastest"] in (32, 64) and batch["times_as_fast"] >= 1
    assert not any(chosen.values())


def test_a_plan_adds_up(priced):
    total, nodes = priced[0]["cost"], [node["cost"] for node in priced[0]["nodes"] if node["cost"]]
    assert total["devices"] == 1 and total["gpus"] == 2
    assert total["stored_bytes"] == sum(said["stored_bytes"] for said in nodes)
    assert total["device_seconds"] == pytest.approx(sum(said["device_seconds"] for said in nodes), abs=0.01)
    assert total["wall_seconds"]["at_most"] == pytest.approx(sum(said["wall_seconds"] for said in nodes), abs=0.01)
    assert total["wall_seconds"]["at_least"] <= total["wall_seconds"]["at_most"]


def test_options_of_the_cost_are_refused_without_it(tiny, write, tmp_path):
    said = plan(write(tiny), "--store", tmp_path / "s", "--gpus", 2, code=2)
    assert said.stderr == "Error: --gpus and --workers need --cost: add it, or leave them out\n"


# ------------------------------------------------------------------------------------- counts, unmeasured


def looked_at(experiment, folder):
    """The facts of every node that are known before it is made."""
    place = Context(Store(str(folder / "store")), folder, folder)
    statuses = preflight(build(spec.parse(experiment)), place, fetch=False)
    return {status.node.id: status for status in statuses}


def costs(experiment, folder):
    """The costs of all nodes if all parts are equally fast."""
    known = looked_at(experiment, folder)
    stored, found = {}, {}
    for status in known.values():
        left = status.facts.get("shards", {})
        parts = parts_of(status, known, left)
        rates = {work.part.key: RATE for work in parts}
        found[status.node.id] = cost_of(status.job, left, parts, Measured(rates, gpu=False, stored=stored))
    return found


def test_an_attack_takes_its_padded_batches_times_its_steps(tiny, tmp_path):
    attack = tiny["datasets"]["other"]["attack"]
    attack |= {"batch_size": 50, "steps": 7}
    found = costs(tiny, tmp_path)["datasets/other"]
    assert found.work == (2 * (0.5 + 7 * 1.0),) * 3, "64 images are two batches of 50"
    assert found.read == (64 * 0.001,) * 3 and found.commit == (64 * 0.002,) * 3
    assert found.stored == 192 * 100


class Proportional:
    """A machine on which each image takes the same time at any batch size, and each batch a fixed time.

    Args:
        memory: images of the largest batch that fits.
        fixed: seconds per batch.
    """

    def __init__(self, memory=10_000, fixed=0.0):
        self.batches, self.memory, self.fixed = [], memory, fixed

    def rate(self, part):
        self.batches.append(part.batch)
        return replace(RATE, fixed=self.fixed, step=0.001 * part.batch, tried=min(part.batch, self.memory))

    def holds(self, rate):
        return self.memory


@pytest.mark.parametrize(
    ("batch_size", "fastest", "gain"), [(50, 32, 100 / 64), (36, 32, 72 / 64), (33, 33, 1.0), (32, 32, 1.0)]
)
def test_a_batch_that_leaves_no_rest_of_a_shard_is_tried_and_named_if_it_pays(
    tiny, tmp_path, batch_size, fastest, gain
):
    tiny["datasets"]["other"]["attack"] |= {"batch_size": batch_size}
    machine, known = Proportional(), looked_at(tiny, tmp_path)
    status = known["datasets/other"]
    left = status.facts["shards"]
    found = estimate.fastest(parts_of(status, known, left), list(left.values()), machine)
    assert 32 in machine.batches, "shards of 64"
    assert (found.recipe, found.fastest) == (batch_size, fastest) and found.gain == pytest.approx(gain)


@pytest.mark.parametrize(
    ("batch_size", "memory", "fastest", "says"),
    [
        (8, 10_000, 64, "add `batch_size: 64`, 1.95 times as fast as 8."),
        (8, 20, 16, "add `batch_size: 16`, 1.38 times as fast as 8; the memory holds 20 images."),
        (60, 20, 20, "batch_size 60 does not fit; the memory holds 20 images: 20 is the fastest tried."),
        (64, 64, 64, "is the fastest tried."),
    ],
)
def test_the_batch_is_as_large_as_pays_and_as_the_memory_holds(tiny, tmp_path, batch_size, memory, fastest, says):
    tiny["datasets"]["other"]["attack"] |= {"batch_size": batch_size}
    machine, known = Proportional(memory, fixed=0.03), looked_at(tiny, tmp_path)
    status = known["datasets/other"]
    left = status.facts["shards"]
    found = estimate.fastest(parts_of(status, known, left), list(left.values()), machine)
    assert found.fastest == fastest and found.holds == min(memory, 64)
    estimated = Estimate("a GPU", Site(1, 1, 0.0), {}, {"datasets/other": found}, {})
    assert estimate.as_text(estimated, None).rstrip().endswith(says)


def test_what_all_nodes_take_together_stands_first():
    minute = Cost(64, 8, 1, stored=2_000_000, read=(0.0,), work=(60.0,), commit=(0.0,))
    estimated = Estimate("a GPU", Site(1, 1, 0.0), {"a": minute, "b": minute}, {}, {"a": [], "b": []})
    assert estimate.as_text(estimated, gpus=2).splitlines()[:3] == [
        "In all: 0:02:00 on 1 device, and 4 MB in the store.",
        "In all: 60.0 s – 0:02:00 on 2 devices, and 4 MB in the store.",
        "",
    ]


class Small(Trials):
    """A GPU with a thousand bytes; a batch takes 100 plus 20 per image, and is refused if it does not fit."""

    def __init__(self):
        self.device, self.processes, self.seen = Device("a small GPU", 1, 1000, gpu=True), 1, []

    def _time(self, part, batch, steps, weigh=False):
        self.seen.append((batch, steps))
        if 100 + 20 * batch > 1000:
            raise TooLarge(f"batch_size {batch} is more than the GPU has memory for: lower it")
        return Measurement(0.1, 0.1, 0.2, 0.01 + 0.001 * batch * steps, 0.1, 1000, 100 + 20 * batch)


def test_what_a_gpu_holds_is_estimated_from_two_batches_and_a_batch_that_does_not_fit_is_halved(tiny, tmp_path):
    known, gpu = looked_at(tiny, tmp_path), Small()
    status = known["datasets/other"]
    (work,) = parts_of(status, known, status.facts["shards"])
    rate = gpu._rate(work.part.of_batch(100))
    assert (rate.base, rate.held, rate.tried) == (pytest.approx(100), pytest.approx(20), 25)
    assert gpu.holds(rate) == 40  # nine tenths, less what any batch takes
    assert gpu.seen[0] == (8, 3)  # of three steps the last is a CUDA graph, whose memory counts too
    assert [batch for batch, _ in gpu.seen[1:4]] == [100, 50, 25]
    assert gpu._rate(work.part.of_batch(16)).tried == 16


def test_a_training_whose_batch_a_gpu_does_not_hold_is_refused(tiny, tmp_path):
    known = looked_at(tiny, tmp_path)
    fit = parts_of(known["models/standard"], known, {})[0].part
    with pytest.raises(TooLarge, match="batch_size 100 is more"):
        Small()._rate(fit.of_batch(100))


def test_an_evaluation_takes_every_model_under_every_attack(tiny, tmp_path):
    threat = {"eps": 0.5, "steps": 5, "batch_size": 64}
    attacks = [{**threat, "restarts": 3}, {**threat, "surrogate": "standard"}]
    tiny["evaluations"]["accuracy"] |= {"batch_size": 64, "attacks": attacks, "spatial": [{"grid": [1, 3, 5]}]}
    found = costs(tiny, tmp_path)["evaluations/accuracy"]
    clean, own, transfer, shown, spatial = 2, 2 * 3, 1, 2 * 2, 2
    assert found.steps == 3 * (own * 5 + transfer * 5 + spatial * 15)
    assert sum(found.work) == pytest.approx(0.5 * 3 * (clean + own + transfer + shown + spatial) + found.steps)


def test_a_universal_perturbation_is_found_by_each_worker(tiny, tmp_path):
    tiny["datasets"]["other"]["attack"] |= {"method": "universal", "fit_shards": 2}
    found = costs(tiny, tmp_path)["datasets/other"]
    assert found.once == pytest.approx(4 * (0.5 + 3 * 1.0)), "two shards of two batches"
    assert found.steps == 4 * 3


def test_features_are_searched_for_both_ways(tiny, tmp_path):
    recipe = {"models": ["standard"], "on": "clean", "steps": 4, "limit": 6, "batch_size": 64}
    tiny["evaluations"]["features"] = {"usefulness": recipe}
    found = costs(tiny, tmp_path)["evaluations/features"]
    assert found.images == 192 + 192
    assert found.steps == 3 * math.ceil(2 * 128 * 2 / 64) * 4, "two images of each of three shards, 128 features"


def test_a_selection_has_as_many_images_as_it_will_have(tiny, tmp_path):
    tiny["datasets"]["top"] = {"select": {"images": "other", "keep": "top", "share": 0.3}}
    found = costs(tiny, tmp_path)["datasets/top"]
    assert found.images == 3 * 19
    assert found.stored == 3 * 19 * 100


def test_adversarial_training_pays_for_its_steps(tiny, tmp_path):
    tiny["models"]["standard"]["train"]["adversarial"] = {"eps": 0.5, "steps": 3}
    found = costs(tiny, tmp_path)
    assert found["models/standard"].steps == 4 * found["models/from_other"].steps


@pytest.mark.parametrize("change", [{"steps": 4}, {"splits": ["train", "test"]}])
def test_more_steps_and_more_images_cost_more(tiny, tmp_path, change):
    site, less = Site(2, 2, 3.0), costs(tiny, tmp_path)["datasets/other"]
    tiny["datasets"]["other"]["attack"] |= change
    more = costs(tiny, tmp_path)["datasets/other"]
    assert more.wall(site) > less.wall(site)
    assert more.device_seconds(site) > less.device_seconds(site)


def test_what_may_differ_in_size_has_no_price(tmp_path):
    from PIL import Image

    for number in (0, 1):
        folder = tmp_path / f"photos/train/{number}"
        folder.mkdir(parents=True)
        Image.new("RGB", (8 + number, 8)).save(folder / "a.png")
    load = {"source": "image-folder", "root": "photos", "splits": {"train": "train"}}
    experiment = {
        "name": "photos",
        "datasets": {
            "photos": {"load": load},
            "control": {"attack": {"images": "photos", "method": "none"}, "relabel": "other"},
        },
    }
    with pytest.raises(estimate.BadInput, match="not known before they are loaded: first make it, with --only photos"):
        costs(experiment, tmp_path)


@pytest.mark.parametrize("source", ["folder", "shards"])
def test_a_load_of_files_has_a_price_where_a_trial_takes_a_part_of_a_shard(source, tmp_path, monkeypatch):
    from PIL import Image

    names = [f"train/{number % 2}/{number}.png" for number in range(2 * trial.SAMPLE)]
    for name in names:
        (file := tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (len(name),) * 3).save(file)
    load = {"source": "image-folder", "root": "photos", "splits": {"train": "train"}, "crop": 8}
    if source == "shards":
        with tarfile.open(tmp_path / "photos.tar", "w") as tar:
            for number, name in enumerate(names):
                (label := tmp_path / "label.cls").write_text(str(number % 2))
                tar.add(tmp_path / "photos" / name, f"{number}.png")
                tar.add(label, f"{number}.cls")
        load = {"source": "webdataset", "shards": {"train": "photos.tar"}, "classes": ["0", "1"], "crop": 8}
    control = {"attack": {"images": "photos", "method": "none"}, "relabel": "other"}
    experiment = {"name": "photos", "datasets": {"photos": {"load": load}, "control": control}}
    (file := tmp_path / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    monkeypatch.setattr(trial, "SECONDS", 0.01)
    said = plan(file, "--store", tmp_path / "s", "--data", tmp_path, "--cost", "--workers", 1, "--json")
    costs = {node["node"]: node["cost"] for node in json.loads(said.stdout)["nodes"]}
    assert costs["datasets/photos"]["images"] == 2 * trial.SAMPLE


# ---------------------------------------------------------------------------------------- sums of seconds


def test_shards_are_never_divided():
    assert makespan([2.0] * 5, 2) == 6.0
    assert makespan([2.0] * 5, 8) == 2.0


def test_reading_and_committing_are_free_where_there_are_processors_for_them():
    attack = Cost(10, 10, 5, 0, read=(1.0,) * 5, work=(4.0,) * 5, commit=(1.0,) * 5)
    assert attack.wall(Site(devices=1, processors=8, start=3.0)) == 3.0 + 5 * 4.0 + 2.0
    assert attack.wall(Site(devices=1, processors=1, start=3.0)) == 3.0 + 5 * 6.0


def test_fewer_devices_than_workers_have_larger_parts_of_a_training():
    train = Cost(10, 10, 0, 0, read=(1.0,), work=(8.0,), commit=(1.0,), workers=4)
    assert train.wall(Site(4, 4, 0.0)) == 10.0
    assert train.wall(Site(2, 2, 0.0)) == 18.0
    assert train.device_seconds(Site(4, 4, 0.0)) == 40.0


SECONDS = st.floats(0.01, 100)


@given(st.lists(st.tuples(SECONDS, SECONDS, SECONDS), min_size=1, max_size=20), st.integers(1, 8), st.booleans())
def test_a_device_more_is_never_slower(shards, devices, heavy):
    read, work, commit = zip(*shards, strict=True)
    node = Cost(1, 1, len(shards), 0, read, work, commit, heavy=heavy)
    here = Site(2, 4, 1.0)
    assert node.wall(here.of(devices + 1)) <= node.wall(here.of(devices)) + 1e-9


def test_a_chain_of_nodes_cannot_be_shortened():
    node = Cost(1, 1, 1, 0, (0.0,), (5.0,), (0.0,))
    inputs = {"a": [], "b": ["a"], "c": []}
    estimated = Estimate("a processor", Site(4, 4, 0.0), dict.fromkeys(inputs, node), {}, inputs)
    assert estimated.wall(estimated.site) == (10.0, 15.0)
    assert estimated.wall(estimated.site.of(1)) == (15.0, 15.0)
