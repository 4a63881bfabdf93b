"""A training on several workers: it learns, survives the loss of a worker, and dies with its caller."""

import json
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


@pytest.mark.slow
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
def test_two_workers_go_on_where_one_stopped_and_where_one_of_them_is_killed_and_no_epoch_is_made_twice(
    cluster, tmp_path
):
    job, _ = plan(tmp_path, **slow())
    alone = job.train()
    assert [next(alone)["workers"] for _ in range(3)] == [1, 1, 1]
    alone.close()
    before = []
    with pytest.raises(ray.exceptions.RayTaskError, match=r"worker . was lost: its worker process has died"):
        for metrics in begin(job):
            before.append(metrics)
            if metrics["epoch"] == 5:
                processes("RayTrainWorker")[-1].kill()
    kept = train.history_of(checkpoint(job).read_bytes())
    assert kept[3 : 3 + len(before)] == before
    assert [epoch["workers"] for epoch in kept] == [1] * 3 + [2] * (len(kept) - 3)
    *after, last = begin(job)
    assert "manifest" in last
    assert history(job) == kept + after
    assert [epoch["epoch"] for epoch in history(job)] == [*range(1, 13)]


def kill_what_asked():
    """Kill the task that started a group, but not the group."""
    (asking,) = processes("steps")
    asking.kill()


@pytest.mark.slow
def test_a_group_dies_with_the_task_that_asked_for_it(cluster, tmp_path):
    job, _ = plan(tmp_path, **slow(epochs=200))
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        for metrics in begin(job):
            if metrics["epoch"] == 2:
                group = processes("RayTrainWorker") + processes("TrainController")
                kill_what_asked()
    assert len(group) == 3
    _, alive = psutil.wait_procs(group, timeout=30)
    assert not alive
    written = checkpoint(job).stat().st_mtime_ns
    time.sleep(3)
    assert checkpoint(job).stat().st_mtime_ns == written
    # What it had reserved comes free, so that the next attempt can go on. Ray's coordinator forgets a dead group after
    # three minutes; here it is replaced by one that knows of none.
    ray.kill(ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator"))
    reached, after = len(train.history_of(checkpoint(job).read_bytes())), []
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        for metrics in begin(job):
            after.append(metrics["epoch"])
            if metrics["epoch"] == reached + 2:
                kill_what_asked()
    assert after[:2] == [reached + 1, reached + 2]
