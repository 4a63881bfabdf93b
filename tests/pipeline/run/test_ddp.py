"""A training on several workers: it learns, survives the loss of a worker or a node, and dies with its caller."""

import json
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import psutil
import pytest
import ray
import torch
from ray.train.torch import TorchConfig

from pipeline.experiment.graph import build
from pipeline.experiment.spec import parse
from pipeline.run import ddp
from pipeline.run.engines import Inline, reason_of
from pipeline.run.jobs import Context, EvaluateJob, LoadJob, TrainJob
from pipeline.run.parcel import pack
from pipeline.store import Store
from stages import train
from stages.device import device
from stages.errors import BadInput

# A network of the user's own, slow enough that a test can interfere between two epochs.
SLOW = """
import time
from torch import nn
class Slow(nn.Sequential):
    def forward(self, x):
        time.sleep(0.04)
        return super().forward(x)
def make(classes):
    return Slow(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, classes))
"""


def made(job):
    """A dataset or an evaluation."""
    marks = {}
    assert Inline().shards(job, job.units(), lambda _, mark: marks.update({mark["name"]: mark})) == []
    return job.finish(marks)


def plan(folder, **asked):
    """The digits in the store, a training on them with two workers, and an evaluation of it."""
    (folder / "slownets.py").write_text(SLOW)
    recipe = {"on": "clean", "arch": "small_cnn", "epochs": 6, "threads": 1, "workers": 2} | asked
    nodes = {
        node.id: node
        for node in build(
            parse(
                {
                    "name": "several",
                    "datasets": {"clean": {"load": {"source": "sklearn-digits", "shard_size": 200}}},
                    "models": {"standard": {"train": recipe}},
                    "evaluations": {"test": {"models": ["standard"], "on": "clean"}},
                }
            )
        )
    }
    place = Context(Store(str(folder / "store")), folder, folder)
    clean = made(LoadJob(nodes["datasets/clean"], place, {}))
    return TrainJob(nodes["models/standard"], place, {"on": clean}), nodes["evaluations/test"]


def slow(**asked):
    return {"arch": "slownets:make", "epochs": 12, **asked}


def checkpoint(job):
    return Path(job.context.store.at(f"{job.node.folder}/checkpoint.safetensors"))


def history(job):
    """The lines of metrics.jsonl of a finished model."""
    path = Path(job.context.store.at(f"{job.node.folder}/metrics.jsonl"))
    return [json.loads(line) for line in path.read_text().splitlines()]


def begin(job):
    """Start a training as the engine does; yields its metrics, without those only for the run's record."""
    task = ray.remote(ddp.steps).options(num_returns="streaming", max_retries=0, num_cpus=0)
    for ref in task.remote(pack(job), False):
        said = ray.get(ref)
        said.pop("store_retries", None)
        if said != ddp.BEGAN:
            yield said


def processes(name):
    """Ray's processes of this test with a name in their title."""
    mine = psutil.Process().children(recursive=True)
    return [process for process in mine if any(part.startswith(f"ray::{name}") for part in arguments(process))]


def arguments(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture(scope="module")
def cluster():
    """A cluster with two CPUs, whatever this machine has."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def test_two_workers_make_a_model_that_classifies(cluster, tmp_path):
    job, evaluation = plan(tmp_path)
    home = set(Path.home().glob("ray_results/*"))
    *epochs, last = begin(job)
    assert [epoch["epoch"] for epoch in epochs] == [1, 2, 3, 4, 5, 6]
    assert {epoch["workers"] for epoch in epochs} == {2}
    assert history(job) == epochs
    assert not checkpoint(job).exists()
    clean = job.inputs["on"]
    model = type(clean)(job.node.folder, last["manifest"])
    scored = made(EvaluateJob(evaluation, job.context, {"on": clean, "models.standard": model}))
    (row,) = job.context.store.find_json(f"{scored.folder}/result.json")["rows"]
    assert row["accuracy"] > 0.9  # chance is 0.1
    assert set(Path.home().glob("ray_results/*")) == home


@pytest.mark.slow
def test_a_training_that_cannot_succeed_ends_at_once_with_its_own_sentence(cluster, tmp_path):
    job, _ = plan(tmp_path, lr=1e30, schedule="constant")
    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        list(begin(job))
    assert reason_of(caught.value) == "the loss is nan in epoch 1: lower lr (it is 1e+30)"


@pytest.mark.parametrize(("gpu", "backend"), [(True, "nccl"), (False, "gloo")])
def test_gpus_are_joined_by_nccl_and_processors_by_gloo(gpu, backend, tmp_path, monkeypatch):
    job, _ = plan(tmp_path)
    asked = {}
    monkeypatch.setattr("ray.train.torch.TorchTrainer", lambda loop, **keys: asked.update(keys) or mock.Mock())
    monkeypatch.setattr(ddp, "_resources", lambda job, gpu: {"CPU": 1, "GPU": 1} if gpu else {"CPU": 1})
    ddp._fit(pack(job), gpu, None, str(tmp_path))
    assert asked["torch_config"].backend == backend
    assert asked["scaling_config"].use_gpu is gpu
    assert asked["scaling_config"].num_workers == (1, 2)


def test_each_process_of_a_group_computes_on_the_gpu_that_ray_gave_it(monkeypatch):
    # All of a machine's are visible to all of them, so that NCCL reaches the others; ours is the current one.
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr("ray.train.torch.get_device", lambda: torch.device("cuda", 3))
    with TorchConfig(backend="nccl").train_func_context():
        assert current == [torch.device("cuda", 3)]
        assert device() == torch.device("cuda")  # without a number: the current one


def test_this_process_alone_does_not_pass_for_several(tmp_path):
    job, _ = plan(tmp_path)
    with pytest.raises(BadInput, match="models/standard asks for 2 workers, which takes Ray"):
        list(job.steps())


@pytest.mark.slow
def test_a_worker_killed_is_survived_and_no_epoch_is_made_twice(cluster, tmp_path):
    job, _ = plan(tmp_path, **slow())
    before = []
    with pytest.raises(ray.exceptions.RayTaskError, match=r"worker . was lost: its worker process has died"):
        for metrics in begin(job):
            before.append(metrics)
            if metrics["epoch"] == 3:
                processes("RayTrainWorker")[-1].kill()
    kept = train.history_of(checkpoint(job).read_bytes())
    assert kept[: len(before)] == before
    *after, last = begin(job)
    assert "manifest" in last
    assert [epoch["epoch"] for epoch in after] == [*range(len(kept) + 1, 13)]
    assert history(job) == kept + after


@pytest.mark.slow
def test_a_group_dies_with_the_task_that_asked_for_it(cluster, tmp_path):
    job, _ = plan(tmp_path, **slow(epochs=60))
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        for metrics in begin(job):
            if metrics["epoch"] == 2:
                group = processes("RayTrainWorker") + processes("TrainController")
                (asking,) = processes("steps")
                asking.kill()
    assert len(group) == 3
    _, alive = psutil.wait_procs(group, timeout=30)
    assert not alive
    written = checkpoint(job).stat().st_mtime_ns
    time.sleep(3)
    assert checkpoint(job).stat().st_mtime_ns == written
    # What it had reserved comes free, so that the next attempt can go on.
    reached = len(train.history_of(checkpoint(job).read_bytes()))
    *after, _ = begin(job)
    assert [epoch["epoch"] for epoch in after] == [*range(reached + 1, 61)]


@pytest.mark.slow
def test_one_worker_goes_on_where_two_stopped_and_two_where_one_did(cluster, tmp_path):
    job, _ = plan(tmp_path, **slow(epochs=9))
    alone = job.train()
    assert [next(alone)["workers"] for _ in range(3)] == [1, 1, 1]
    alone.close()
    with pytest.raises(ray.exceptions.RayTaskError):
        for metrics in begin(job):
            if metrics["epoch"] == 5:
                processes("RayTrainWorker")[0].kill()
    reached = len(train.history_of(checkpoint(job).read_bytes()))
    assert [epoch.get("epoch") for epoch in job.train()] == [*range(reached + 1, 10), None]
    assert [epoch["epoch"] for epoch in history(job)] == [*range(1, 10)]
    assert [epoch["workers"] for epoch in history(job)] == [1] * 3 + [2] * (reached - 3) + [1] * (9 - reached)


# Two nodes of one processor each; the second goes without a word.
NODES = """
import sys
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
sys.path.insert(0, sys.argv[1])
import test_ddp
from pipeline.run import ddp
from pipeline.run.parcel import pack
job, _ = test_ddp.plan(Path(sys.argv[2]), **test_ddp.slow(epochs=60))
cluster = Cluster(True, head_node_args={"num_cpus": 1, "include_dashboard": False, "temp_dir": sys.argv[3]})
second = cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
task = ray.remote(ddp.steps)
for attempt in range(3):
    try:
        for ref in task.options(
            num_returns="streaming", max_retries=0, num_cpus=0, scheduling_strategy=here
        ).remote(pack(job), False):
            metrics = ray.get(ref)
            if second is not None and metrics.get("epoch") == 3:
                cluster.remove_node(second, allow_graceful=False)
                second = None
        break
    except ray.exceptions.RayTaskError as error:
        print(error)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_a_node_that_is_lost_leaves_the_rest_to_go_on(tmp_path, tmp_path_factory):
    short = Path(f"/tmp/ddp-{tmp_path_factory.getbasetemp().name}")  # Ray's sockets bear no long paths
    arguments = [str(Path(__file__).parent), str(tmp_path), str(short)]
    done = subprocess.run(
        [sys.executable, "-c", NODES, *arguments], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    job, _ = plan(tmp_path, **slow(epochs=60))
    workers = [epoch["workers"] for epoch in history(job)]
    assert [epoch["epoch"] for epoch in history(job)] == [*range(1, 61)]
    assert workers[:3] == [2, 2, 2]
    assert workers[-1] == 1
