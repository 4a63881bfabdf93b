"""Experiments as jobs of a real cluster of three nodes: submitted over HTTP with a token, followed, joined, stopped."""

import asyncio
import contextlib
import copy
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import ClassVar
from zipfile import ZipFile

import pytest
import yaml
from local_cluster import LocalCluster, free_port
from s3 import SECRET_KEY
from support import TINY, command, contents

from pipeline.cluster import LARGEST_FILE, LARGEST_FOLDER, Cluster, Job, Request, runtime_env
from pipeline.experiment import spec
from pipeline.run.parcel import staged
from pipeline.store import Store
from stages.errors import BadInput

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def cluster(s3_server):
    with LocalCluster(nodes=3, variables=s3_server.environment) as cluster:
        yield cluster


def save(experiment, folder, name="experiment.yaml"):
    (folder / name).write_text(yaml.safe_dump(experiment, sort_keys=False))
    return name


def until(holds, seconds=180):
    """Wait for a condition; returns its value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := holds():
            return found
        time.sleep(0.2)
    raise AssertionError(f"never: {holds}")


# ------------------------------------------------------------------------------------ a job that succeeds


SMALL = copy.deepcopy(TINY)
SMALL["datasets"]["clean"]["load"]["limit"] = 128  # two shards of each split


@pytest.fixture(scope="module")
def inline(tmp_path_factory):
    """The small experiment made inline: the finished process, and its results."""
    folder = tmp_path_factory.mktemp("inline")
    made = subprocess.run(
        [command(), "run", save(SMALL, folder), "--store", "s", "--engine", "inline"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return made, contents(folder / "s")


@pytest.fixture(scope="module")
def submitted(cluster, s3_server, tmp_path_factory):
    """The small experiment made as a job, in a bucket: the finished `submit --follow`, and the URL of the store."""
    url, folder = "s3://tests/submitted", tmp_path_factory.mktemp("submitted")
    done = cluster.notbugs("submit", save(SMALL, folder), "--store", url, "--follow", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done, url


def job_of(done):
    """The job id that `submit` printed."""
    return done.stdout.splitlines()[0]


def told(lines):
    """The printed start and end of each node, without times, since the order of two parallel nodes is random."""
    found = [re.match(r"[\w/]+: (started \(.*\)|done in)", line) for line in lines.splitlines()]
    return sorted(match[0] for match in found if match)


def table(lines):
    """The result table, and a run's verdict below it; in a job's log, the page's place follows."""
    return lines[lines.index("trained on") :].partition("\npage ")[0].strip()


def test_a_followed_job_says_what_a_run_here_says_and_leaves_the_same_bytes(inline, submitted, s3_server):
    (here, made), (there, url) = inline, submitted
    assert told(there.stdout) == told(here.stderr) and len(told(here.stderr)) == 12
    assert table(there.stdout) == table(here.stdout)
    files = s3_server.contents(url.removeprefix("s3://"))
    manifests = [json.loads(content) for name, content in files.items() if name.endswith("/manifest.json")]
    assert {f"{facts['group']}/{facts['name']}": facts["content"] for facts in manifests} == made
    marks = [json.loads(content) for name, content in files.items() if re.match("datasets/.*/commits/.*json$", name)]
    assert {mark["attempt"] for mark in marks} == {1}


def test_the_id_of_a_job_is_all_that_submit_prints_before_its_log(submitted):
    done, _ = submitted
    assert re.fullmatch(r"notbugs-tiny-[0-9a-f]{8}-1", job_of(done))
    assert done.stderr.startswith("submitted\n") and done.stderr.endswith(f"{job_of(done)}: succeeded\n")


def test_jobs_lists_each_with_its_state_as_a_table_and_as_json(cluster, submitted, tmp_path):
    done, url = submitted
    listed = json.loads(cluster.notbugs("jobs", "--json", cwd=tmp_path).stdout)["jobs"]
    found = next(job for job in listed if job["id"] == job_of(done))
    facts = {"state": "succeeded", "live": False, "code": 0, "experiment": "tiny", "store": url}
    assert {key: found[key] for key in facts} == facts
    assert 0 < found["ended"] - found["started"] < 900
    rows = cluster.notbugs("jobs", cwd=tmp_path).stdout.splitlines()
    assert rows[0].split() == ["job", "state", "experiment", "time", "store"]
    row = next(row.split() for row in rows if row.startswith(job_of(done)))
    assert row[:3] == [job_of(done), "succeeded", "tiny"] and row[4] == url


def test_logs_are_found_by_the_beginning_of_an_id_and_are_what_was_followed(cluster, submitted, tmp_path):
    done, _ = submitted
    whole = cluster.notbugs("logs", job_of(done), cwd=tmp_path)
    assert whole.returncode == 0 and done.stdout == f"{job_of(done)}\n{whole.stdout}"
    assert cluster.notbugs("logs", job_of(done)[:-4], cwd=tmp_path).stdout == whole.stdout
    again = cluster.notbugs("logs", job_of(done), "--follow", cwd=tmp_path)
    assert (again.returncode, again.stdout, again.stderr) == (0, whole.stdout, f"{job_of(done)}: succeeded\n")


def test_a_job_that_is_not_there_is_refused_with_those_that_are(cluster, submitted, tmp_path):
    for verb in ("logs", "stop"):
        refused = cluster.notbugs(verb, "notbugs-other", cwd=tmp_path)
        assert refused.returncode == 2
        assert refused.stderr.startswith(f"Error: there is no job notbugs-other at {cluster.address}; there are ")
        assert job_of(submitted[0]) in refused.stderr and refused.stderr.count("\n") == 1


def test_stopping_a_job_that_has_ended_says_so_and_does_no_harm(cluster, submitted, tmp_path):
    stopped = cluster.notbugs("stop", job_of(submitted[0]), cwd=tmp_path)
    assert (stopped.returncode, stopped.stdout) == (0, f"{job_of(submitted[0])}: already succeeded\n")


def test_no_secret_is_in_the_list_of_jobs_in_a_log_or_in_the_store(cluster, submitted, s3_server, tmp_path):
    done, url = submitted
    token = Path(cluster.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    said = [cluster.notbugs("jobs", "--json", cwd=tmp_path).stdout, done.stdout, done.stderr]
    stored = s3_server.contents(url.removeprefix("s3://"))
    assert len(stored) > 50
    for secret in (SECRET_KEY, token):
        assert not [text for text in said if secret in text]
        assert not [name for name, content in stored.items() if secret.encode() in content]


def test_status_show_plan_and_verify_need_the_store_alone(submitted, s3, tmp_path, notbugs):
    _, url = submitted
    save(SMALL, tmp_path)
    status = notbugs("status", "--store", url)
    assert "done" in status.stdout.splitlines()[0], status.stderr
    assert "accuracy" in notbugs("show", "accuracy", "--store", url).stdout
    assert table(notbugs("show", "--store", url).stdout) == table(submitted[0].stdout).partition("\n\n")[0]
    planned = json.loads(notbugs("plan", "experiment.yaml", "--json", "--store", url).stdout)
    assert [node["there"] for node in planned["nodes"]] == [True] * 6
    assert notbugs("verify", "--store", url).returncode == 0


def test_what_is_in_the_store_already_is_not_made_again_by_a_further_job(cluster, submitted, tmp_path):
    done, url = submitted
    again = cluster.notbugs("submit", save(SMALL, tmp_path), "--store", url, "--follow", cwd=tmp_path)
    assert again.returncode == 0
    assert job_of(again) == job_of(done).removesuffix("-1") + "-2"
    assert again.stdout.count("there already") == 6


# -------------------------------------------------------------------------------- one's own modules


OWN = """
import json, os
from pathlib import Path
from layers import Flatten, Linear, Sequential

if "SAW" in os.environ:
    here = Path(__file__).parent
    Path(os.environ["SAW"]).write_text(json.dumps({
        "files": sorted(str(path.relative_to(here)) for path in here.rglob("*") if path.suffix != ".pyc"),
        "greeting": os.environ["GREETING"],
        "here": str(here),
    }))

def net(classes):
    return Sequential(Flatten(), Linear(64, classes))
"""

OWN_EXPERIMENT = {
    "name": "own",
    "datasets": {
        "clean": {"load": {"source": "sklearn-digits", "shard_size": 64, "limit": 64}},
        "other": {
            "attack": {"images": "clean", "model": "mine", "eps": 1.5, "steps": 2, "batch_size": 32},
            "relabel": "other",
        },
    },
    "models": {
        "mine": {"train": {"on": "clean", "arch": "mynets:net", "epochs": 1, "batch_size": 32}},
        "again": {"train": {"on": "other", "arch": "./mynets.py:net", "epochs": 1, "batch_size": 32}},
    },
}

HIDING = ["numpy.py", "pipeline.py", "pyarrow.py", "random.py", "ray.py", "stages.py", "torch.py"]
"""Files of the user's that bear the names of what is installed."""


def litter(folder):
    """Fill a folder as a user's may be: with a module, and with much that the cluster does not need."""
    (folder / "mynets.py").write_text(OWN)
    (folder / "layers.py").write_text("from torch.nn import Flatten, Linear, Sequential")
    for name in HIDING:
        (folder / name).write_text("raise RuntimeError(f'{__file__} is taken for what is installed')")
    (folder / "notes.txt").write_text("small")
    (folder / "movie.bin").write_bytes(bytes(LARGEST_FILE * 2**20 + 1))
    (folder / "weights.safetensors").write_bytes(b"x")
    for name in (".git", ".venv", "__pycache__", "data", "notbugs-store"):
        (folder / name).mkdir()
        (folder / name / "file").write_text("x")


@pytest.mark.slow
def test_ones_own_modules_go_along_behind_what_is_installed_and_what_is_large_or_no_code_stays(cluster, tmp_path):
    litter(tmp_path)
    done = cluster.notbugs(
        *("submit", save(OWN_EXPERIMENT, tmp_path), "--store", tmp_path / "s", "--follow"),
        *("--env", f"SAW={tmp_path / 'saw'}", "--env", "GREETING"),
        cwd=tmp_path,
        GREETING="good morning",
    )
    assert done.returncode == 0, done.stdout
    saw = json.loads((tmp_path / "saw").read_text())
    assert saw["here"] != str(tmp_path)
    assert saw["files"] == sorted(["experiment.yaml", "layers.py", "mynets.py", "notes.txt", *HIDING])
    assert saw["greeting"] == "good morning"


@pytest.mark.slow
def test_a_run_that_joins_a_cluster_takes_ones_own_modules_along_also_to_a_group_of_workers(cluster, tmp_path):
    litter(tmp_path)
    experiment = copy.deepcopy(OWN_EXPERIMENT)
    experiment["models"]["again"]["train"] |= {"workers": 2, "threads": 1}
    saved = save(experiment, tmp_path)
    done = cluster.notbugs("run", saved, "--store", tmp_path / "s", "--address", "auto", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(contents(tmp_path / "s")) == {"datasets/clean", "datasets/other", "models/again", "models/mine"}


def request(experiment, store="s3://bucket/store", **more):
    return Request(spec.parse(experiment), Store(store), **more)


def test_the_folder_goes_along_only_where_the_experiment_names_modules_of_its_own(tmp_path):
    litter(tmp_path)
    assert "working_dir" not in runtime_env(request(TINY), tmp_path)
    sent = runtime_env(request(OWN_EXPERIMENT), tmp_path)
    assert sent["working_dir"] == str(tmp_path)
    assert "/movie.bin" in sent["excludes"] and "/notes.txt" not in sent["excludes"]


def test_a_store_in_the_folder_does_not_go_along(tmp_path):
    litter(tmp_path)
    (tmp_path / "results").mkdir()
    for number in range(LARGEST_FOLDER // LARGEST_FILE + 1):
        (tmp_path / f"results/{number}.parquet").write_bytes(bytes(LARGEST_FILE * 2**20))
    sent = runtime_env(request(OWN_EXPERIMENT, str(tmp_path / "results")), tmp_path)
    assert "/results" in sent["excludes"]


def test_a_folder_that_is_too_large_to_send_is_refused(cluster, tmp_path):
    (tmp_path / "mynets.py").write_text(OWN)
    for number in range(LARGEST_FOLDER // LARGEST_FILE + 1):
        (tmp_path / f"{number}.bin").write_bytes(bytes(LARGEST_FILE * 2**20))
    refused = cluster.notbugs("submit", save(OWN_EXPERIMENT, tmp_path), "--store", tmp_path / "s", cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert refused.stderr.startswith(
        f"Error: {tmp_path} has more than 64 MiB to send to the cluster: submit from a folder "
    )


def sent_of(folder, experiment=OWN_EXPERIMENT):
    """The files of a folder that Ray would send, as Ray itself computes them."""
    from ray._private.runtime_env.packaging import _zip_files

    with staged(runtime_env(request(experiment), folder)) as environment, TemporaryDirectory() as scratch:
        _zip_files(environment["working_dir"], environment["excludes"], f"{scratch}/sent.zip", include_gitignore=True)
        return sorted(ZipFile(f"{scratch}/sent.zip").namelist())


def test_what_is_sent_lies_where_no_import_statement_finds_it(tmp_path):
    litter(tmp_path)
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets/mine.py").write_text("")
    (tmp_path / ".gitignore").write_text("secret.txt")
    (tmp_path / "secret.txt").write_text("xyzzy")
    (tmp_path / "wide[1] .bin").write_bytes(bytes(LARGEST_FILE * 2**20 + 1))
    expected = [".gitignore", "layers.py", "mynets.py", "nets/mine.py", "notes.txt", *HIDING]
    assert sent_of(tmp_path) == sorted(f"notbugs-here/{name}" for name in expected)


@pytest.mark.timeout(60)
def test_what_has_no_end_is_not_sent_and_what_links_lead_to_is(tmp_path, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "layers.py").write_text("")
    (tmp_path / "mynets.py").write_text("")
    (tmp_path / "shared").symlink_to(elsewhere)
    (tmp_path / "up").symlink_to(tmp_path.parent)
    (elsewhere / "down").symlink_to(tmp_path)
    (tmp_path / "dangling").symlink_to("/nowhere")
    os.mkfifo(tmp_path / "pipe")
    assert sent_of(tmp_path) == ["notbugs-here/mynets.py", "notbugs-here/shared/layers.py"]


@pytest.mark.timeout(60)
def test_a_link_to_a_large_folder_is_counted(tmp_path, tmp_path_factory):
    large = tmp_path_factory.mktemp("large")
    for number in range(LARGEST_FOLDER // LARGEST_FILE + 1):
        (large / f"{number}.bin").write_bytes(bytes(LARGEST_FILE * 2**20))
    (tmp_path / "mynets.py").write_text("")
    (tmp_path / "link").symlink_to(large)
    with pytest.raises(BadInput, match="has more than 64 MiB to send"):
        runtime_env(request(OWN_EXPERIMENT), tmp_path)


@pytest.mark.parametrize("where", ["../mynets.py", "/abs/mynets.py", "./nowhere.py", "data/mynets.py", "large.py"])
def test_a_file_that_would_not_go_along_is_refused(where, tmp_path):
    here = tmp_path / "here"
    (here / "data").mkdir(parents=True)
    for name in ("../mynets.py", "mynets.py", "data/mynets.py"):
        (here / name).write_text("")
    (here / "large.py").write_bytes(bytes(LARGEST_FILE * 2**20 + 1))
    experiment = copy.deepcopy(OWN_EXPERIMENT)
    assert runtime_env(request(experiment), here)["working_dir"] == str(here)
    experiment["models"]["again"]["train"]["arch"] = f"{where}:net"
    with pytest.raises(
        BadInput, match=rf"^models.again: {re.escape(where)} is not among what is sent to the cluster: "
    ):
        runtime_env(request(experiment), here)


def test_packages_asked_for_are_part_of_what_is_sent(tmp_path):
    assert runtime_env(request(TINY, pip=("timm==1.0",)), tmp_path)["pip"] == ["timm==1.0"]
    assert "pip" not in runtime_env(request(TINY), tmp_path)


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MY_PASSWORD", "google_credentials"])
def test_a_variable_that_looks_like_a_secret_is_refused_and_not_shown(name, tmp_path):
    with pytest.raises(BadInput, match=f"--env {name}: secrets are not sent") as refused:
        runtime_env(request(TINY, variables={name: "xyzzy"}), tmp_path)
    assert "xyzzy" not in str(refused.value)


# ------------------------------------------------------------------------- joined, stopped, gone on with

GATED = """
import os, time
from pathlib import Path
from torch import nn

class Gated(nn.Module):
    calls = 0

    def __init__(self, classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))

    def forward(self, x):
        if x.requires_grad and not self.training:
            Gated.calls += 1
            while Gated.calls > 3 and (Path(os.environ["GATE"]) / "shut").exists():
                time.sleep(0.1)
        return self.layers(x)

net = Gated
"""
"""Each worker attacks one shard, of three steps; then, as long as the gate is shut, it waits."""


def gated(folder):
    """An experiment whose attack waits at a gate; the arguments that submit it."""
    (folder / "gated.py").write_text(GATED)
    experiment = {
        "name": "gated",
        "datasets": {
            "clean": {"load": {"source": "sklearn-digits", "shard_size": 16, "limit": 96}},
            "other": {
                "attack": {"images": "clean", "model": "mine", "eps": 1.5, "steps": 3, "batch_size": 16},
                "relabel": "other",
            },
        },
        "models": {
            "mine": {"train": {"on": "clean", "arch": "gated:net", "epochs": 1, "batch_size": 32, "threads": 1}}
        },
    }
    file = save(experiment, folder)
    return [file, "--store", folder / "s", "--only", "other", "--env", f"GATE={folder}"]


def committed(store):
    """Shard → time at which its commit mark was written."""
    return {path.name: path.stat().st_mtime_ns for path in store.glob("datasets/other/*/commits/*.json")}


@pytest.mark.slow
def test_a_job_is_joined_and_stopped_and_another_goes_on_where_it_was(cluster, tmp_path, notbugs, monkeypatch):
    store, asked = tmp_path / "s", gated(tmp_path)
    (tmp_path / "shut").touch()
    first = cluster.notbugs("submit", *asked, cwd=tmp_path)
    assert first.returncode == 0 and first.stderr.startswith("submitted\n"), first.stderr
    until(lambda: committed(store))

    joined = cluster.notbugs("submit", *asked, cwd=tmp_path)
    assert (joined.returncode, joined.stdout) == (0, first.stdout)
    assert joined.stderr.startswith("already running: joined\n")
    assert f"notbugs logs {job_of(first)} --follow" in joined.stderr

    stopped = cluster.notbugs("stop", cwd=tmp_path)
    assert (stopped.returncode, stopped.stdout) == (0, f"{job_of(first)}: stopped\n"), stopped.stderr
    status = notbugs("status", "--json", "--store", store)
    assert json.loads(status.stdout)["state"] == "interrupted"
    assert json.loads(status.stdout)["job"] == job_of(first)
    log = cluster.notbugs("logs", job_of(first), cwd=tmp_path).stdout
    assert log.endswith("Interrupted. Finished work is kept; continue with: notbugs submit, as before\n")
    assert "Traceback" not in log
    kept = committed(store)
    assert 1 <= len(kept) <= 3, "one of each worker"

    (tmp_path / "shut").unlink()
    second = cluster.notbugs("submit", *asked, "--follow", cwd=tmp_path)
    assert second.returncode == 0, second.stdout
    assert job_of(second) == job_of(first).removesuffix("-1") + "-2"
    assert f"datasets/other: started (attack, 6 shards, {len(kept)} there already)" in second.stdout
    now = committed(store)
    assert len(now) == 6 and {name: now[name] for name in kept} == kept
    monkeypatch.setenv("GATE", str(tmp_path))
    alone = notbugs("run", asked[0], "--store", "undisturbed", "--only", "other", "--engine", "inline")
    assert alone.returncode == 0, alone.stderr
    assert contents(store) == contents(tmp_path / "undisturbed")
    assert notbugs("verify", "--store", store).returncode == 0


class Tunnel:
    """A local port forwarded to the cluster, as by ssh, which can break."""

    def __init__(self, address):
        host, _, port = address.removeprefix("http://").partition(":")
        self.to, self.port, self.listening = (host, int(port)), free_port(), None
        self.address, self.ends = f"http://127.0.0.1:{self.port}", []

    def open(self):
        self.listening = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=[self.listening], daemon=True).start()

    def cut(self):
        for end in [self.listening, *self.ends]:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self.ends.clear()

    def _accept(self, listening):
        with contextlib.suppress(OSError):
            while True:
                near, far = listening.accept()[0], socket.create_connection(self.to)
                self.ends += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=[one, other], daemon=True).start()

    def _carry(self, one, other):
        with contextlib.suppress(OSError):
            while content := one.recv(65536):
                other.sendall(content)
            other.shutdown(socket.SHUT_WR)


IMPATIENT = "from pipeline import cli, cluster; cluster.LISTENING = 10.0; cli.main()"
"""The command, which waits for a cluster that does not answer for 10 s, not 60."""


@pytest.mark.slow
def test_a_job_is_followed_across_a_connection_that_breaks_and_nothing_is_said_twice(cluster, tmp_path):
    asked, tunnel, log = gated(tmp_path), Tunnel(cluster.address), tmp_path / "followed"
    (tmp_path / "shut").touch()
    begun = cluster.notbugs("submit", *asked, cwd=tmp_path)
    assert begun.returncode == 0, begun.stderr
    tunnel.open()
    with log.open("w") as out:
        following = subprocess.Popen(
            [sys.executable, "-c", IMPATIENT, "logs", "--follow", "--address", tunnel.address],
            cwd=tmp_path,
            env=cluster.environment,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    until(lambda: "datasets/other: started" in log.read_text() or following.poll() is not None)
    time.sleep(11)  # the job says nothing; that is not the cluster's silence
    tunnel.cut()
    time.sleep(3)
    (tmp_path / "shut").unlink()
    tunnel.open()
    assert following.wait(180) == 0, log.read_text()
    tunnel.cut()
    whole = cluster.notbugs("logs", job_of(begun), cwd=tmp_path)
    assert log.read_text() == f"{whole.stdout}{job_of(begun)}: succeeded\n"


# ----------------------------------------------------------------------------- what fails, and how it ends


@pytest.mark.slow
def test_a_job_ends_as_its_run_ends_1_where_something_failed_2_where_the_request_is_wrong(cluster, tmp_path):
    failing = {
        "name": "failing",
        "datasets": {"clean": {"load": {"source": "sklearn-digits", "shard_size": 64, "limit": 64}}},
        "models": {"wild": {"train": {"on": "clean", "arch": "small_cnn", "epochs": 1, "batch_size": 32, "lr": 1e30}}},
    }
    wrong = {
        "name": "wrong",
        "datasets": {"clean": {"load": {"source": "image-folder", "root": "photos", "resize": 8, "crop": 8}}},
    }
    begun = [
        cluster.notbugs("submit", save(experiment, tmp_path), "--store", tmp_path / "s", *more, cwd=tmp_path)
        for experiment, more in ((failing, []), (wrong, ["--data", "/nowhere"]))
    ]
    ended = [cluster.notbugs("logs", job_of(one), "--follow", cwd=tmp_path) for one in begun]
    assert [one.returncode for one in ended] == [1, 2], ended
    assert "models/wild: failed, the loss is nan in epoch 1: lower lr" in ended[0].stdout
    assert "Error: datasets.clean.load: image folder /nowhere/photos does not exist" in ended[1].stdout
    assert all(one.stderr == f"{job_of(start)}: failed\n" for one, start in zip(ended, begun, strict=True))


@pytest.mark.parametrize(
    ("state", "code", "exit_code"),
    [("succeeded", 0, 0), ("failed", 2, 2), ("failed", -9, 1), ("failed", None, 1), ("stopped", 130, 130)],
)
def test_a_job_whose_process_was_killed_is_one_that_failed(state, code, exit_code):
    assert Job("notbugs-x-1", state, "x", "s", 0.0, 1.0, code, "").exit_code == exit_code


class Asleep:
    """The client of a laptop that goes to sleep with its first connection open: that connection stays silent."""

    connections = 0

    async def tail_job_logs(self, _):
        self.connections += 1
        yield "one\n"
        if self.connections == 1:
            await asyncio.Event().wait()
        yield "two\n"

    def get_job_logs(self, _):
        return "one\ntwo\n"

    def list_jobs(self):
        state = "RUNNING" if self.connections == 1 else "SUCCEEDED"
        about = {"metadata": {"notbugs": "1"}, "start_time": 1000, "end_time": None, "message": ""}
        return [SimpleNamespace(submission_id="notbugs-x-1", status=state, driver_exit_code=0, **about)]


def test_a_connection_that_dies_without_a_word_is_left_for_another(monkeypatch):
    monkeypatch.setattr("pipeline.cluster.LISTENING", 0.3)
    cluster, said = Cluster.__new__(Cluster), []
    cluster.address, cluster.client = "http://far:8265", Asleep()
    assert cluster.follow(cluster.job(None), said.append).state == "succeeded"
    assert "".join(said) == "one\ntwo\n"


class Beginning(BaseHTTPRequestHandler):
    """A job server in a cluster's first seconds: it accepts only the second job submitted to it."""

    jobs: ClassVar[list[dict]] = []
    refused = False

    def do_GET(self):
        jobs = [{"type": "SUBMISSION", "status": "PENDING", "entrypoint": "", **job} for job in self.jobs]
        self.say(
            200, {"/api/version": {"version": "4", "ray_version": "2.60.0"}, "/api/jobs/": jobs}.get(self.path, {})
        )

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.refused:
            type(self).refused = True
            self.say(500, "No available agent to submit job, please try again later.")
            return
        self.jobs.append({"submission_id": asked["submission_id"], "metadata": asked["metadata"]})
        self.say(200, {"job_id": asked["submission_id"], "submission_id": asked["submission_id"]})

    def say(self, code, value):
        content = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Log nothing."""


def test_a_cluster_that_takes_no_jobs_yet_is_asked_again(tiny, write, tmp_path, notbugs):
    with ThreadingHTTPServer(("127.0.0.1", 0), Beginning) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        done = notbugs("submit", write(tiny), "--store", tmp_path / "s", "--address", address)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{Beginning.jobs[0]['submission_id']}\n" and done.stderr.startswith("submitted\n")


# --------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def outside(tmp_path, cluster):
    """The command with an empty home folder and none of the cluster's variables."""

    def outside(*args, **variables):
        ours = {k: v for k, v in cluster.environment.items() if not k.startswith(("RAY_AUTH", "RAY_TMPDIR", "AWS_"))}
        return subprocess.run(
            [command(), *map(str, args)],
            cwd=tmp_path,
            env=ours | {"HOME": str(tmp_path)} | variables,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    return outside


NO_TOKEN = "the cluster requires a token and got none, or a wrong one; put the cluster's into ~/.ray/auth_token"
WRONG = "a-wrong-token-" + "1" * 20


@pytest.mark.parametrize("given", ["none", "variable", "file", "no such file"])
def test_without_the_right_token_one_sentence_says_where_to_put_it(given, cluster, outside, tmp_path):
    if given == "file":
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray/auth_token").write_text(WRONG)
    variables = {
        "variable": {"RAY_AUTH_TOKEN": WRONG},
        "no such file": {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "nowhere")},
    }
    refused = outside("jobs", "--address", cluster.address, **variables.get(given, {}))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"Error: --address {cluster.address}: {NO_TOKEN}")
    assert refused.stderr.count("\n") == 1 and WRONG not in refused.stderr


@pytest.mark.parametrize("verb", ["submit", "logs", "stop"])
def test_every_command_of_a_cluster_refuses_in_the_same_words(verb, cluster, outside, tmp_path):
    more = [save(TINY, tmp_path), "--store", tmp_path / "s"] if verb == "submit" else []
    refused = outside(verb, *more, "--address", cluster.address)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert NO_TOKEN in refused.stderr


def test_the_right_token_is_found_where_ray_puts_it(cluster, outside, tmp_path):
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text(Path(cluster.environment["RAY_AUTH_TOKEN_PATH"]).read_text())
    found = outside("jobs", "--address", cluster.address)
    assert found.returncode == 0, found.stderr


def test_a_token_is_this_clusters_alone(cluster, monkeypatch):
    """A variable that says so to Ray held for the whole process: its next local cluster asked for a token, too."""
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", cluster.environment["RAY_AUTH_TOKEN_PATH"])
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    Cluster(cluster.address).jobs()  # raises without the token
    assert "RAY_AUTH_MODE" not in os.environ


def test_a_token_that_cannot_be_read_is_named(cluster, outside, tmp_path):
    (tmp_path / "token").write_bytes(b"\xff\xfe")
    refused = outside("jobs", "--address", cluster.address, RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert refused.stderr.startswith(f"Error: {tmp_path}/token: holds no token that can be read")


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "127.0.0.1:8265", "auto"])
def test_an_address_that_is_no_job_server_is_refused(address, outside):
    refused = outside("jobs", "--address", address)
    assert refused.returncode == 2
    assert refused.stderr == (
        f"Error: --address {address}: must be the cluster's job server, such as http://localhost:8265\n"
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_where_no_cluster_answers_one_sentence_says_so(host, outside):
    address = f"http://{host}:{free_port()}"
    refused = outside("jobs", "--address", address)
    assert refused.returncode == 2
    assert refused.stderr == f"Error: --address {address}: no Ray cluster answers there; is the tunnel to it open?\n"


UNSENT = {
    "--store s": "--store s: the cluster needs an s3:// or gs:// URL, or a folder that all machines share",
    "--env AWS_SECRET_ACCESS_KEY=xyzzy": "--env AWS_SECRET_ACCESS_KEY: secrets are not sent, for",
    "--env NOT_SET_HERE": "--env NOT_SET_HERE: has no value here; give it one: --env NOT_SET_HERE=…",
    "--only zzz": "--only zzz: the experiment has no such node; it has datasets/clean",
}


def test_what_cannot_be_sent_is_refused_before_a_job_begins(cluster, tmp_path):
    before = cluster.notbugs("jobs", cwd=tmp_path).stdout
    for more, sentence in UNSENT.items():
        asked = [save(TINY, tmp_path), "--store", tmp_path / "s", *more.split()]
        refused = cluster.notbugs("submit", *asked, cwd=tmp_path)
        assert refused.returncode == 2 and refused.stderr.startswith(f"Error: {sentence}"), refused.stderr
        assert refused.stderr.count("\n") == 1 and "xyzzy" not in refused.stderr
    assert cluster.notbugs("jobs", cwd=tmp_path).stdout == before


def test_a_run_on_a_cluster_is_not_begun_from_elsewhere(tiny, write, notbugs):
    refused = notbugs("run", write(tiny), "--address", "ray://127.0.0.1:10001")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "from elsewhere: notbugs submit FILE --address http://…" in refused.stderr
