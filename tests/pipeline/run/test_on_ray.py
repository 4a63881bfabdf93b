"""The engine on Ray when workers die or hang and nodes come and go. A network causes the trouble."""

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import ray
import yaml
from local_cluster import LocalCluster
from support import command, contents

from pipeline.run import on_ray
from pipeline.run.engines import ATTEMPTS, IN_FLIGHT, Stopped
from pipeline.run.jobs import Unit
from stages.errors import BadData, BadInput
from stages.shard import unpack

pytestmark = pytest.mark.timeout(900)

NETWORK = """
import os, time
from pathlib import Path

import numpy as np
import torch
from torch import nn

HERE = Path(os.environ.get("TROUBLE", "/nowhere"))

def among(x, name):
    '''Whether an image of the file is in the batch.'''
    if not (HERE / name).exists():
        return False
    image = torch.from_numpy(np.load(HERE / name))
    return bool(((x - image).abs() < 1e-4).flatten(1).all(1).any())

def node():
    import ray
    return ray.get_runtime_context().get_node_id() if ray.is_initialized() else "none"

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))

    def forward(self, x):
        if x.requires_grad and not self.training:  # attacked
            if among(x, "deadly.npy"):
                os.kill(os.getpid(), 9)
            if among(x, "sleepy.npy"):
                time.sleep(1000)
            if among(x, "sleepy-once.npy") and not (HERE / "slept").exists():
                (HERE / "slept").touch()
                time.sleep(1000)
            if (HERE / "held").exists():
                (HERE / f"pid-{os.getpid()}").touch()
                (HERE / f"node-{node()}").touch()
            while (HERE / "held").exists():
                time.sleep(0.05)
        return self.layers(x)

net = Net
"""


def experiment(shard_size=64, limit=192):
    """A dataset attacked through the network above, without normalisation: it sees pixels in [0, 1]."""
    train = {"on": "clean", "arch": "trouble:net", "epochs": 1, "batch_size": 32, "threads": 1}
    attack = {"images": "clean", "model": "mine", "eps": 1.5, "steps": 3, "batch_size": min(32, shard_size)}
    return {
        "name": "trouble",
        "datasets": {
            "clean": {"load": {"source": "sklearn-digits", "shard_size": shard_size, "limit": limit}},
            "other": {"attack": attack, "relabel": "other"},
        },
        "models": {"mine": {"train": train | {"mean": [0], "std": [1]}}},
    }


def until(holds, process=None, seconds=240):
    """Wait for a condition; returns its value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := holds():
            return found
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The user's folder with the network, and with the files by which tests cause trouble in workers."""
    (tmp_path / "trouble.py").write_text(NETWORK)
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(experiment(), sort_keys=False))
    monkeypatch.setenv("TROUBLE", str(tmp_path))
    return tmp_path


@pytest.fixture
def undisturbed(folder, notbugs):
    """Content digests of the same experiment, made inline."""

    def undisturbed():
        done = notbugs("run", "experiment.yaml", "--store", "undisturbed", "--engine", "inline")
        assert done.returncode == 0, done.stderr
        return contents(folder / "undisturbed")

    return undisturbed


def image_of(store, shard):
    """The first image of a clean shard, as the network sees it."""
    tar = next(store.glob(f"datasets/clean/*/{shard}.tar"))
    pixels = unpack(shard, tar.read_bytes(), 1).images()[0]
    return (pixels.astype(np.float32) / 255).transpose(2, 0, 1)


def events(store, event):
    """Events of one kind, from all runs of a store."""
    lines = [line for path in sorted(store.glob("runs/*/events.jsonl")) for line in path.read_text().splitlines()]
    return [found for found in map(json.loads, lines) if found["event"] == event]


def other(store):
    """Committed shards of the attacked dataset."""
    return {path.stem for path in store.glob("datasets/other/*/commits/*.json")}


# ------------------------------------------------------------------------------------- workers of one machine


@pytest.mark.slow
def test_a_shard_over_which_two_workers_die_is_set_aside_and_the_others_are_made(folder, undisturbed, notbugs):
    expected = undisturbed()
    np.save(folder / "deadly.npy", image_of(folder / "undisturbed", "train-000001"))
    run = notbugs("run", "experiment.yaml", "--store", "s", "--workers", 2)
    assert run.returncode == 1
    assert "datasets/other: failed, 1 of 3 shards failed, train-000001: 2 workers died over it, the last one:" in (
        run.stderr
    )
    assert "Traceback" not in run.stderr
    assert other(folder / "s") == {"train-000000", "train-000002"}
    made = {path: path.stat().st_mtime_ns for path in (folder / "s").glob("datasets/other/*/*.tar")}

    (folder / "deadly.npy").unlink()
    assert notbugs("resume", "--store", "s", "--workers", 2).returncode == 0
    assert contents(folder / "s") == expected
    assert {path: path.stat().st_mtime_ns for path in made} == made, "those that were made stay"


@pytest.mark.slow
def test_a_worker_killed_from_outside_is_replaced_and_nothing_is_lost(folder, undisturbed):
    (folder / "held").touch()
    run = subprocess.Popen(
        [command(), "run", "experiment.yaml", "--store", "s", "--workers", "2"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    first = until(lambda: (found := set(folder.glob("pid-*"))) and len(found) == 2 and found, run)
    os.kill(int(min(first).name.removeprefix("pid-")), signal.SIGKILL)
    until(lambda: set(folder.glob("pid-*")) - first, run)
    (folder / "held").unlink()
    said, _ = run.communicate(timeout=300)
    assert run.returncode == 0, said
    assert contents(folder / "s") == undisturbed()
    retried = [event["unit"] for event in events(folder / "s", "retried")]
    assert 1 <= len(retried) == len(set(retried)) <= IN_FLIGHT
    made = [event["name"] for event in events(folder / "s", "committed") if event["node"] == "datasets/other"]
    assert sorted(made) == ["train-000000", "train-000001", "train-000002"], "each once"


@pytest.mark.slow
def test_a_shard_that_hangs_is_ended_and_tried_again_and_one_that_always_hangs_is_set_aside(
    folder, undisturbed, notbugs
):
    expected = undisturbed()
    np.save(folder / "sleepy-once.npy", image_of(folder / "undisturbed", "train-000000"))
    np.save(folder / "sleepy.npy", image_of(folder / "undisturbed", "train-000002"))
    run = notbugs("run", "experiment.yaml", "--store", "s", "--workers", 2, "--shard-timeout", 20)
    assert run.returncode == 1
    why = "1 of 3 shards failed, train-000002: 2 workers died over it, the last one: took longer than 20 s"
    assert f"datasets/other: failed, {why}" in run.stderr
    assert other(folder / "s") == {"train-000000", "train-000001"}
    reasons = [event["reason"] for event in events(folder / "s", "retried") if event["unit"] == "train-000000"]
    assert "took longer than 20 s" in reasons
    (folder / "sleepy.npy").unlink()
    assert notbugs("resume", "--store", "s", "--workers", 2).returncode == 0
    assert contents(folder / "s") == expected


DYING = """
import os, sys
from pathlib import Path

class Death:
    def find_spec(self, name, path=None, target=None):
        if name == "pipeline.run.on_ray" and (Path(os.environ["TROUBLE"]) / "dying").exists():
            os._exit(1)

if any("default_worker" in part for part in sys.orig_argv):
    sys.meta_path.insert(0, Death())
"""
"""A machine on which no worker gets as far as loading its first shard."""


@pytest.mark.slow
def test_where_workers_die_as_they_start_the_run_says_so_and_ends(folder, notbugs, monkeypatch):
    (folder / "site").mkdir()
    (folder / "site/sitecustomize.py").write_text(DYING)
    monkeypatch.setenv("PYTHONPATH", str(folder / "site"))
    assert notbugs("run", "experiment.yaml", "--store", "s", "--only", "mine").returncode == 0
    (folder / "dying").touch()
    run = notbugs("run", "experiment.yaml", "--store", "s")
    assert run.returncode == 1
    assert "datasets/other: failed, workers die as they start: " in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (
            ray.exceptions.ActorUnschedulableError(
                "Could not create the actor because worker startup repeatedly failed."
            ),
            "no worker started in 3 attempts .*startup repeatedly failed.*run again with --workers 1 or --engine",
        ),
        (ray.exceptions.RayActorError(), "workers die as they start: "),
    ],
)
def test_a_start_of_which_ray_despairs_is_tried_again_and_ends_with_what_to_do(error, why):
    """On a machine that was only busy, the first such error ended the last node of a run."""
    engine = MagicMock(workers=1, gpu=False, ray=MagicMock(exceptions=ray.exceptions))
    engine.nodes.return_value, engine.wait.side_effect = [on_ray.Machine("here", 2, 0)], lambda refs, timeout: refs[:1]
    engine.not_started = partial(on_ray.OnRay.not_started, engine)
    engine.ray.get.side_effect = error
    job = SimpleNamespace(heavy=True)
    with pytest.raises(BadData, match=why):
        on_ray.ShardScheduler(engine, job, [Unit("train-000000", 1, {})], lambda *_: None).go()
    assert engine.ray.get.call_count == ATTEMPTS


# -------------------------------------------------------------------------------------- nodes of a cluster


@pytest.mark.slow
def test_every_node_gets_shards_also_one_that_comes_and_one_that_goes_costs_only_what_it_had(
    folder, undisturbed, notbugs
):
    """All at once: the shards wait until each of three nodes has one, then a fourth; which is then killed."""
    small = experiment(shard_size=8)
    (folder / "experiment.yaml").write_text(yaml.safe_dump(small, sort_keys=False))
    (folder / "held").touch()

    def nodes():
        return {path.name for path in folder.glob("node-*")}

    with LocalCluster(nodes=3) as cluster:
        asked = ["experiment.yaml", "--store", folder / "s", "--env", "TROUBLE"]
        begun = cluster.notbugs("submit", *asked, cwd=folder)
        assert begun.returncode == 0, begun.stderr
        until(lambda: len(nodes()) == 3)
        cluster.add_node()
        until(lambda: len(nodes()) == 4)
        cluster.kill_node()
        (folder / "held").unlink()
        done = cluster.notbugs("logs", "--follow", cwd=folder)
        assert done.returncode == 0, done.stdout
    assert contents(folder / "s") == undisturbed()
    assert notbugs("verify", "--store", "s").returncode == 0
    made = [event["name"] for event in events(folder / "s", "committed") if event["node"] == "datasets/other"]
    assert len(made) == len(set(made)) == 24, "nothing was made twice"
    retried = [event["unit"] for event in events(folder / "s", "retried")]
    assert 1 <= len(retried) == len(set(retried)) <= IN_FLIGHT


def test_ray_that_cannot_begin_is_said_with_what_to_change(tiny, write, tmp_path, notbugs, monkeypatch):
    args = ("run", write(tiny), "--store", "s")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 90)))
    (tmp_path / ("x" * 90)).mkdir()
    refused = notbugs(*args)
    assert refused.returncode == 1 and f"too long for sockets, {tmp_path}/xxx" in refused.stderr.splitlines()[-1]
    assert "name a shorter one in RAY_TMPDIR" in refused.stderr
    monkeypatch.setenv("RAY_TMPDIR", "/proc/nowhere")
    assert notbugs(*args).stderr.splitlines()[-1].startswith("Error: Ray cannot begin: /proc/nowhere: No such file")


@pytest.mark.parametrize(
    ("error", "address", "said"),
    [
        (
            RuntimeError("Failed to start GCS.  Last 1 lines of error files:\n[x] The specified port is 45454. This"),
            None,
            "Ray cannot begin: port 45454 is taken; end what listens there",
        ),
        (
            Exception("The current node timed out during startup. This could happen because some of the raylet"),
            None,
            "Ray cannot begin: its processes were too slow to start, as on a busy machine; run again; or do without "
            "it: --engine inline gives the same bytes",
        ),
        (
            RuntimeError("Version mismatch:\nRay: 2.1\nRay: 2.60"),
            "h:1",
            "--address h:1: Version mismatch: Ray: 2.1 Ray",
        ),
        (ConnectionError("Could not find any running Ray instance."), "auto", "--address auto: no Ray cluster answers"),
    ],
)
def test_what_ray_says_in_many_lines_becomes_a_sentence(error, address, said, monkeypatch):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(on_ray, "_refuse_silent", lambda address: None)
    monkeypatch.setattr("ray.init", fail)
    with pytest.raises(BadInput if address else OSError, match=re.escape(said)):
        on_ray.OnRay(address=address)
    assert on_ray.GCS_WAIT not in os.environ, "a local cluster of the same process would heed it, too"


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere.invalid:6379", "x", "::", f"{'a' * 70}:1", "h:99999"])
def test_an_address_at_which_nobody_listens_is_refused_at_once(address):
    began = time.monotonic()
    with pytest.raises(
        BadInput, match=f"--address {address}: (no Ray cluster answers there|must be auto or host:6379)"
    ):
        on_ray.OnRay(address=address)
    assert time.monotonic() - began < 30


def test_what_runs_leaves_ray_before_it_ends():
    """A thread that was inside never returned, one time in ten on a busy machine, and the program never ended."""
    engine, inside = on_ray.OnRay(workers=1), threading.Event()
    try:
        endless = engine.ray.remote(lambda: time.sleep(600)).remote()
        waiting = engine.start(lambda: inside.set() or engine.wait([endless]))
        assert inside.wait(60)
    finally:
        engine.close()
    assert waiting.done() and isinstance(waiting.exception(), Stopped)


@pytest.mark.slow
def test_a_port_that_ray_finds_taken_is_named(tiny, write, notbugs, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        monkeypatch.setenv("RAY_GCS_SERVER_PORT", port)
        refused = notbugs("run", write(tiny), "--store", "s")
    assert f"Ray cannot begin: port {port} (of RAY_GCS_SERVER_PORT) is taken" in refused.stderr.splitlines()[-1]
    assert refused.returncode == 1
