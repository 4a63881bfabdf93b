"""Engines give the same bytes, continue after a death, and end when stopped."""

import contextlib
import json
import os
import random
import signal
import subprocess
import time

import psutil
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from support import TINY, command, contents, reseal

from pipeline.cli import main
from pipeline.experiment.spec import parse
from pipeline.run import runs
from pipeline.run.engines import Inline, expected, reason_of
from pipeline.run.jobs import Context
from pipeline.store import Store
from stages.errors import BadData

LONG = {"steps": 60, "batch_size": 32}
"""An attack that takes long enough to be interrupted."""


def start(file, store, *args, cwd, interrupt=signal.SIG_DFL):
    """Start a run; its stderr goes to a file that can be followed.

    SIGINT is set as given, because background jobs of a shell, which tests may be among, ignore it.
    """
    log = (cwd / f"log-{time.monotonic_ns()}").open("w+")
    process = subprocess.Popen(
        [command(), "run", str(file), "--store", str(store), *map(str, args)],
        cwd=cwd,
        stderr=log,
        stdout=log,
        preexec_fn=lambda: signal.signal(signal.SIGINT, interrupt),
    )
    return process, log


def wait_for(log, text, process, seconds=120):
    """Wait until a line with this text has been printed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        log.seek(0)
        said = log.read()
        if text in said:
            return
        assert process.poll() is None, said
        time.sleep(0.02)
    raise AssertionError(f"never said {text!r}:\n{said}")


def gone(processes, seconds=60):
    """Wait until none of these processes exists."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    assert not alive, alive


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Content digests of the small experiment, made inline without a disturbance."""
    folder = tmp_path_factory.mktemp("reference")
    (folder / "tiny.yaml").write_text(json.dumps(TINY))
    subprocess.run(
        [command(), "run", "tiny.yaml", "--store", "s", "--engine", "inline"],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    return contents(folder / "s")


def test_two_runs_at_once_on_one_store_do_no_harm(reference, tiny, write, tmp_path, notbugs):
    file = write(tiny)
    both = [start(file, "s", "--engine", "inline", cwd=tmp_path) for _ in range(2)]
    for process, log in both:
        code = process.wait(timeout=240)
        log.seek(0)
        assert code == 0, log.read()
        log.close()
    assert contents(tmp_path / "s") == reference
    verified = notbugs("verify", "--store", "s")
    assert verified.returncode == 0, verified.stdout


@pytest.mark.parametrize("engine", ["inline", pytest.param("ray", marks=pytest.mark.slow)])
def test_ctrl_c_ends_soon_says_how_to_go_on_and_leaves_nothing_half_made(engine, tiny, write, tmp_path, notbugs):
    tiny["datasets"]["other"]["attack"] |= LONG | {"steps": 2000}
    process, log = start(write(tiny), "s", "--engine", engine, cwd=tmp_path)
    wait_for(log, "datasets/other: started", process)
    children = psutil.Process(process.pid).children(recursive=True)
    time.sleep(1)
    interrupted = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert time.monotonic() - interrupted < 20, "a few seconds, with room for a busy machine"
    gone(children)
    log.seek(0)
    said = log.read()
    log.close()
    assert "notbugs resume" in said and "Traceback" not in said
    assert not list((tmp_path / "s/.partial").glob("*"))
    assert not list((tmp_path / "s").glob("datasets/other/*/manifest.json"))
    assert json.loads(notbugs("status", "--json", "--store", "s").stdout)["state"] == "interrupted"
    assert notbugs("verify", "--store", "s").returncode == 0


def test_a_job_of_a_cluster_that_was_begun_in_the_background_is_interrupted_as_any(tiny, write, tmp_path, monkeypatch):
    monkeypatch.setenv("NOTBUGS_JOB", "tiny-1")
    tiny["datasets"]["other"]["attack"] |= LONG | {"steps": 2000}
    process, log = start(write(tiny), "s", "--engine", "inline", cwd=tmp_path, interrupt=signal.SIG_IGN)
    wait_for(log, "datasets/other: started", process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    log.seek(0)
    assert "continue with: notbugs submit, as before" in log.read()
    log.close()


def test_a_killed_driver_is_seen_as_lost_and_the_next_run_goes_on(reference, tiny, write, tmp_path, notbugs):
    file = write(tiny)
    process, log = start(file, "s", "--engine", "inline", cwd=tmp_path)
    wait_for(log, "models/standard: started", process)
    process.kill()
    process.wait()
    log.close()
    run = next((tmp_path / "s/runs").glob("*/run.json"))
    reseal(tmp_path / "s", run, lambda record: record | {"updated": time.time() - 100})
    assert json.loads(notbugs("status", "--json", "--store", "s").stdout)["state"] == "lost"
    assert notbugs("resume", "--store", "s", "--engine", "inline").returncode == 0
    assert contents(tmp_path / "s") == reference


def test_a_step_that_fails_once_is_tried_again_and_counted(tiny, write, tmp_path, notbugs):
    tiny["models"]["standard"]["train"]["arch"] = "moody:net"
    (tmp_path / "moody.py").write_text(MOODY)
    done = notbugs("run", write(tiny), "--store", "s", "--engine", "inline")
    assert done.returncode == 0, done.stderr
    nodes = json.loads(notbugs("status", "--json", "--store", "s").stdout)["nodes"]
    assert nodes["models/standard"]["retries"] == 1
    events = [json.loads(line) for line in next((tmp_path / "s/runs").glob("*/events.jsonl")).read_text().splitlines()]
    retried = [event for event in events if event["event"] == "retried"]
    assert retried[0]["reason"] == "the disk is in a mood"


MOODY = """
from pathlib import Path
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, classes))

    def forward(self, x):
        flag = Path("was-moody")
        if self.training and not flag.exists():
            flag.touch()
            raise OSError("the disk is in a mood")
        return self.layers(x)

def net(classes, channels):
    return Net(classes, channels)
"""


def test_one_shard_that_fails_does_not_stop_the_others_and_the_next_run_makes_only_it(tiny, write, tmp_path, notbugs):
    tiny["models"]["standard"]["train"]["arch"] = "picky:net"
    (tmp_path / "picky.py").write_text(PICKY)
    (tmp_path / "picky").touch()
    file = write(tiny)
    failed = notbugs("run", file, "--store", "s", "--engine", "inline")
    assert failed.returncode == 1
    assert "1 of 3 shards failed" in failed.stderr
    other = next((tmp_path / "s/datasets/other").iterdir())
    made = {path.name: path.stat().st_mtime_ns for path in other.glob("*.tar")}
    assert len(made) == 2
    states = {k: v["state"] for k, v in json.loads(notbugs("status", "--json", "--store", "s").stdout)["nodes"].items()}
    assert states["datasets/other"] == "failed" and states["models/from_other"] == "waiting"
    assert states["datasets/control"] == "done"
    (tmp_path / "picky").unlink()
    assert notbugs("resume", "--store", "s", "--engine", "inline").returncode == 0
    assert {name: (other / name).stat().st_mtime_ns for name in made} == made
    assert len(list(other.glob("*.tar"))) == 3


PICKY = """
from pathlib import Path
from torch import nn

class Net(nn.Module):
    calls, bad = 0, None

    def __init__(self, classes, channels):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, classes))

    def forward(self, x):
        if not self.training and Path("picky").exists() and x.requires_grad:
            Net.calls += 1
            if Net.calls == 7:  # the second shard: two batches of three steps come before it
                Net.bad = x.detach().clone()
            if Net.bad is not None and x.shape == Net.bad.shape and (x == Net.bad).all():
                raise RuntimeError("not this one")
        return self.layers(x)

def net(classes, channels):
    return Net(classes, channels)
"""


# --------------------------------------------------------------------------------------------- kills

STAGES = ["datasets/clean", "evaluations/accuracy"]
"""The stages that test_chaos.py does not disturb, in the order in which a run comes to them."""


@pytest.mark.slow
def test_kills_of_driver_and_workers_at_random_moments_of_loading_and_evaluating_leave_the_same_bytes(
    tiny, write, tmp_path, notbugs
):
    """kill -9, four times with a fixed seed: driver and worker once in each stage."""
    draw, kills = random.Random(20261123), 0
    tiny["evaluations"]["accuracy"]["attacks"] = [{"eps": 0.5, "steps": 40, "batch_size": 32}]
    file = write(tiny)
    assert notbugs("run", file, "--store", "undisturbed", "--engine", "inline").returncode == 0
    expected = contents(tmp_path / "undisturbed")
    for round_number in range(2):
        store = tmp_path / f"killed-{round_number}"
        process, log = start(file, store, cwd=tmp_path)
        for number, node in enumerate(STAGES):
            wait_for(log, f"{node}: started", process)
            time.sleep(draw.uniform(0, 1.5))
            if (round_number + number) % 2:
                kills += kill_worker(process, draw)
                continue
            kills += kill_driver(process)
            log.close()
            process, log = start(file, store, cwd=tmp_path)
        code = process.wait(timeout=240)
        log.seek(0)
        assert code == 0, log.read()
        log.close()
        assert contents(store) == expected
        assert notbugs("verify", "--store", store).returncode == 0
    assert kills >= 3


def kill_driver(process):
    """Kill (SIGKILL) the run, wait until its busy workers have noticed, and end the remaining processes by id.

    Ray's agents and idle workers outlive a killed driver by a minute and more, without doing any of its work.
    """
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    gone([child for child in children if is_worker(child)])
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    return 1


def kill_worker(process, draw):
    """Kill (SIGKILL) one process that is doing the run's work, if there is one at this moment."""
    for _ in range(200):
        workers = [child for child in psutil.Process(process.pid).children(recursive=True) if is_worker(child)]
        if workers:
            os.kill(draw.choice(workers).pid, signal.SIGKILL)
            return 1
        time.sleep(0.02)
    return 0


def is_worker(process):
    try:
        title = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return title.startswith(("ray::_Worker", "ray::_all", "ray::_read", "ray::_commit", "ray::_steps"))


def test_a_learner_begins_with_other_weights_than_the_model_its_images_were_moved_by(tiny, write, notbugs, tmp_path):
    """Trained so little that what is saved is what it began with."""
    for model in tiny["models"].values():
        model["train"] |= {"epochs": 1, "lr": 1e-12}
    tiny["models"]["twin"] = {"train": {**tiny["models"]["standard"]["train"], "epochs": 2}}
    done = notbugs("run", write(tiny), "--store", "s", "--engine", "inline")
    assert done.returncode == 0, done.stderr
    first = {
        name: load_file(next((tmp_path / "s/models" / name).glob("*/weights.safetensors")))["0.0.weight"]
        for name in ("standard", "twin", "from_other")
    }
    assert (first["twin"] - first["standard"]).abs().max() < 1e-6, "of one seed"
    assert (first["from_other"] - first["standard"]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("error", "said", "plain"),
    [
        (BadData("shard 3 is\ndamaged"), r"shard 3 is\ndamaged", True),
        (FileNotFoundError(2, "No such file or directory", "a\x1b.png"), r"a\x1b.png: No such file or directory", True),
        (OSError(28, "No space left on device"), "No space left on device", True),
        (ConnectionError("the store was away"), "the store was away", True),
        (MemoryError(), "memory ran out", True),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "memory ran out: CUDA out of memory.", True),
        (KeyError("x"), "unexpected: 'x' (KeyError)", False),
        (AssertionError(), "unexpected: AssertionError", False),
    ],
)
def test_a_reason_names_its_kind_only_where_nobody_foresaw_it(error, said, plain):
    assert reason_of(error) == said and expected(error) is plain


def test_debug_shows_where_a_node_failed_of_what_nobody_foresaw(tiny, write, tmp_path, monkeypatch):
    def fail(*args):
        raise KeyError("there")

    monkeypatch.setattr(runs.Run, "_make_shards", fail)
    args = ["run", str(write(tiny)), "--store", str(tmp_path / "s"), "--engine", "inline"]
    usual, debug = (CliRunner().invoke(main, [*more, *args]).stderr for more in ([], ["--debug"]))
    assert "unexpected: 'there' (KeyError)" in usual and "Traceback" not in usual
    assert "Traceback" in debug and 'raise KeyError("there")' in debug


class Busy(Inline):
    """An engine whose worker keeps the work waiting."""

    queues = True

    def shards(self, job, units, report):
        time.sleep(0.5)
        return super().shards(job, units, report)


def test_while_no_worker_takes_up_the_work_a_run_says_so(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "BEAT", 0.05)
    monkeypatch.setattr(runs, "WAITS", 0.2)
    said = []
    context = Context(Store(str(tmp_path / "s")), tmp_path, tmp_path)
    run = runs.Run(parse(tiny), context, ("clean",), lambda node, progress, event: said.append((node, event)))
    assert run.go(Busy())
    waits = ("datasets/clean", "waits")
    began = said.index(("datasets/clean", "began"))
    assert waits in said[:began] and waits not in said[began:]
