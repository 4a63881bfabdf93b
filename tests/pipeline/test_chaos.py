"""A job on a cluster of three nodes, its store in a bucket: everything that can die dies, and the bytes are the same.

The disturbances, and the undisturbed time before each, are drawn with a fixed seed. The network sleeps in its forward
pass, so that there is time for all disturbances even on two CPUs.
"""

import contextlib
import copy
import json
import os
import random
import signal
import time

import psutil
import pytest
import yaml
from local_cluster import LocalCluster
from s3 import ACCESS_KEY, SECRET_KEY
from support import contents

from pipeline.run.engines import IN_FLIGHT
from pipeline.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

NODES = 3

SHARDS, STEPS, EPOCHS = 40, 20, 30

DISTURBANCES = {"trained": ("worker", "node", "driver"), "shard-": ("worker", "node", "store", "driver", "stop")}
"""What disturbs a training, and what an attack, in an order drawn by chance."""

COST = {"worker": IN_FLIGHT, "node": IN_FLIGHT, "store": 0, "driver": NODES * IN_FLIGHT, "stop": NODES * IN_FLIGHT}
"""How many shards each may make begin again."""

NETWORK = """
import hashlib, os, time
from pathlib import Path
from torch import nn

RECORD, PACE = os.environ.get("RECORD"), float(os.environ.get("PACE", 0))

class Slow(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))

    def forward(self, x):
        if RECORD and self.training:
            self.note("trained")
        elif RECORD and x.requires_grad and float((x * 255 - (x * 255).round()).abs().max()) < 1e-4:
            self.note("shard-" + hashlib.sha256(x.detach().numpy().tobytes()).hexdigest())  # no step was taken yet
        if self.training or x.requires_grad:
            time.sleep(PACE)
        return self.layers(x)

    def note(self, name):
        with (Path(RECORD) / name).open("a") as file:
            file.write(".")

net = Slow
"""

EXPERIMENT = {
    "name": "chaos",
    "datasets": {
        "clean": {"load": {"source": "sklearn-digits", "shard_size": 8, "limit": 8 * SHARDS}},
        "other": {
            "attack": {"images": "clean", "model": "standard", "eps": 1.5, "steps": STEPS, "batch_size": 8},
            "relabel": "other",
        },
    },
    "models": {
        name: {
            "train": {"on": on, "arch": "slow:net", "epochs": epochs, "batch_size": 48, "threads": 1}
            | {"mean": [0], "std": [1]}
        }
        for name, on, epochs in (("standard", "clean", EPOCHS), ("from_other", "other", 2))
    },
    "evaluations": {"accuracy": {"models": ["standard", "from_other"], "on": "clean", "split": "test"}},
}


class Chaos:
    """One experiment on one cluster, and its disturbances.

    Args:
        cluster: the cluster.
        server: the S3 server with the store.
        folder: the user's folder.
        url: the store.
    """

    def __init__(self, cluster, server, folder, url):
        self.cluster, self.server, self.folder, self.url = cluster, server, folder, url
        self.record = folder / "record"
        self.record.mkdir()
        self.jobs = []

    def submit(self, *more):
        variables = ["--env", f"RECORD={self.record}", "--env", "PACE=0.2"]
        asked = ["experiment.yaml", "--store", self.url, *variables, *more]
        done = self.cluster.notbugs("submit", *asked, cwd=self.folder, timeout=600)
        assert "submitted\n" in done.stderr, done.stdout + done.stderr
        self.jobs.append(done.stdout.splitlines()[0])
        return done

    def noted(self, what):
        """Bytes of the notes of a kind."""
        return sum(path.stat().st_size for path in self.record.glob(f"{what}*"))

    def under_way(self, what):
        """Wait until the network writes another note."""
        before, deadline = self.noted(what), time.monotonic() + 240
        while self.noted(what) == before:
            assert time.monotonic() < deadline, self.cluster.notbugs("logs", self.jobs[-1], cwd=self.folder).stdout
            time.sleep(0.05)

    def retried(self, node, times):
        """Wait until the record of the run has so many retries of a node."""
        deadline = time.monotonic() + 240
        while self.status()["nodes"][node]["retries"] < times:
            assert time.monotonic() < deadline, self.cluster.notbugs("logs", self.jobs[-1], cwd=self.folder).stdout

    def status(self):
        return json.loads(self.cluster.notbugs("status", "--json", "--store", self.url, cwd=self.folder).stdout)

    def ended(self):
        """Wait until the cluster reports the latest job as ended."""
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            listed = json.loads(self.cluster.notbugs("jobs", "--json", cwd=self.folder).stdout)["jobs"]
            if not next(job for job in listed if job["id"] == self.jobs[-1])["live"]:
                return
        raise AssertionError(f"{self.jobs[-1]} goes on")

    def disturb(self, how, draw):
        match how:
            case "worker":
                self.kill(draw, "ray::_Worker", "ray::_all", "ray::_read", "ray::_commit", "ray::_steps")
            case "node":
                self.cluster.kill_node()
                self.cluster.add_node()
            case "store":
                self.server.kill()
                time.sleep(10)
                self.server.start()
            case "driver":
                self.kill(draw, "python -P -m pipeline run")
                self.ended()
                self.submit()
            case "stop":
                stopped = self.cluster.notbugs("stop", cwd=self.folder)
                assert stopped.stdout == f"{self.jobs[-1]}: stopped\n", stopped.stdout + stopped.stderr
                self.submit()

    def kill(self, draw, *titles):
        """Kill (SIGKILL) one process of the cluster with this title."""
        deadline = time.monotonic() + 60
        while not (found := [process for process in self.cluster.processes() if title(process).startswith(titles)]):
            assert time.monotonic() < deadline, f"no {titles}"
        with contextlib.suppress(ProcessLookupError):
            os.kill(draw.choice(sorted(found, key=lambda process: process.pid)).pid, signal.SIGKILL)

    def finished(self, node):
        """Whether a node is finished in the store."""
        return any(name.endswith("/manifest.json") for name in Store(self.url).files(node, recursive=True))

    def events(self):
        """The events of all runs, as far as they were written."""
        files = self.server.contents(self.url.removeprefix("s3://"))
        lines = [line for name in sorted(files) if name.endswith("events.jsonl") for line in files[name].splitlines()]
        return [json.loads(line) for line in lines]


def title(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "slow.py").write_text(NETWORK)
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(EXPERIMENT, sort_keys=False))
    return tmp_path


def test_workers_nodes_drivers_the_store_and_the_job_go_in_turn_and_the_bytes_are_the_same(
    folder, s3, s3_url, notbugs, monkeypatch
):
    alone = notbugs("run", "experiment.yaml", "--store", "undisturbed", "--engine", "inline")
    assert alone.returncode == 0, alone.stderr
    draw, cost = random.Random(20261123), 0
    with LocalCluster(NODES, s3.environment) as cluster:
        chaos = Chaos(cluster, s3, folder, s3_url)
        chaos.submit()
        chaos.under_way("trained")
        assert not [line for line in map(title, cluster.processes()) if SECRET_KEY in line or ACCESS_KEY in line]
        for what, disturbances in DISTURBANCES.items():
            for how in draw.sample(disturbances, len(disturbances)):
                chaos.under_way(what)
                time.sleep(draw.uniform(0, 2))
                assert what == "trained" or not chaos.finished("datasets/other"), "there was nothing to disturb"
                chaos.disturb(how, draw)
                cost += COST[how] if what == "shard-" else 0
        chaos.ended()
        for _ in range(3):
            if (done := chaos.submit("--follow")).returncode == 0:
                break
        assert done.returncode == 0, done.stdout
        log = "".join(cluster.notbugs("logs", job, cwd=folder).stdout for job in chaos.jobs)
        assert "Traceback" not in log, log
    assert notbugs("verify", "--store", s3_url).returncode == 0
    files = s3.contents(s3_url.removeprefix("s3://"))
    made = [json.loads(content) for name, content in files.items() if name.endswith("/manifest.json")]
    assert {f"{facts['group']}/{facts['name']}": facts["content"] for facts in made} == contents(folder / "undisturbed")

    begun = {path.name: path.stat().st_size for path in chaos.record.glob("shard-*")}
    assert len(begun) == SHARDS
    twice = sum(begun.values()) - SHARDS
    retries = sum(event["event"] == "retried" for event in chaos.events())
    print(f"{len(chaos.jobs)} jobs; of {SHARDS} shards {twice} begun again, {retries} retries on record")
    assert twice <= cost


def test_a_training_on_two_workers_survives_the_death_of_one_and_goes_on_alone_when_its_node_is_lost(
    folder, s3, s3_url, notbugs
):
    experiment = copy.deepcopy(EXPERIMENT)
    del experiment["datasets"]["other"], experiment["models"]["from_other"]
    experiment["models"]["standard"]["train"] |= {"workers": 2, "epochs": 20}
    experiment["evaluations"]["accuracy"]["models"] = ["standard"]
    (folder / "experiment.yaml").write_text(yaml.safe_dump(experiment, sort_keys=False))
    with LocalCluster(2, s3.environment) as cluster:
        chaos = Chaos(cluster, s3, folder, s3_url)
        chaos.submit()
        for attempts in (1, 2):
            chaos.under_way("trained")
            time.sleep(2)
            if attempts == 1:
                chaos.kill(random.Random(20261123), "ray::RayTrainWorker")
            else:
                cluster.kill_node()
            chaos.retried("models/standard", attempts)
        done = cluster.notbugs("logs", "--follow", cwd=folder, timeout=600)
        assert done.returncode == 0, done.stdout
    events = chaos.events()
    epochs = [event for event in events if event["event"] == "epoch"]
    assert [event["epoch"] for event in epochs] == sorted({event["epoch"] for event in epochs}), "none is made twice"
    assert epochs[-1]["epoch"] == 20 and epochs[0]["workers"] == 2 and epochs[-1]["workers"] == 1
    assert notbugs("verify", "--store", s3_url).returncode == 0
