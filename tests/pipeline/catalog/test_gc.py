"""Removal takes what nothing needs, and nothing else: whatever runs beside it, and wherever it is killed."""

import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from catalog_support import as_json, invoke, versions
from support import reseal

from pipeline.catalog import gc, names
from pipeline.run import removals
from pipeline.store import Store
from stages.errors import BadData, BadInput

ROOT = Path(__file__).parents[3]


def folders(store):
    """Every version in a store."""
    return {f"{one['group']}/{one['name']}/{one['version']}" for one in as_json("ls", "--store", store)["nodes"]}


def removable(store, *policy):
    found = as_json("gc", *policy, "--dry-run", "--store", store)
    return {f"{one['group']}/{one['name']}/{one['version']}" for one in found["versions"]}


def olds(store):
    """Folder of the older version of each node that has two: those of the first run alone."""
    nodes = ("datasets/other", "models/from_other", "evaluations/accuracy")
    return {node: f"{node}/{versions(store, node)[1]}" for node in nodes}


# --------------------------------------------------------------------------------------- what may go


def test_only_older_versions_go_with_all_their_files_and_the_records_stay_whole(anywhere):
    old, before = olds(anywhere.store), folders(anywhere.store)
    page = invoke("show", anywhere.runs[0], "--store", anywhere.store).stdout
    listed = as_json("gc", "--keep", 1, "--dry-run", "--store", anywhere.store)
    going = {old["datasets/other"], old["models/from_other"]}
    assert {f"{one['group']}/{one['name']}/{one['version']}" for one in listed["versions"]} == going
    store = Store(anywhere.store)
    assert listed["bytes"] == sum(sum(store.files(folder, recursive=True).values()) for folder in going)
    assert listed["kept"][old["evaluations/accuracy"]] == f"results of run {anywhere.runs[0]}"
    assert not any(one["removed"] for one in listed["versions"]) and folders(anywhere.store) == before
    invoke("gc", "--keep", 1, "--store", anywhere.store, text="n\n")
    assert folders(anywhere.store) == before
    said = invoke("gc", "--keep", 1, "--store", anywhere.store, text="y\n")
    assert "Remove 2 versions, " in said.stderr and "removed 2 versions, " in said.stdout
    assert folders(anywhere.store) == before - going
    assert not any(store.files(folder, recursive=True) for folder in going)
    invoke("verify", "--store", anywhere.store)
    shown = invoke("show", anywhere.runs[0], "--store", anywhere.store).stdout
    assert shown.count("\n") == page.count("\n") and "from_other" in shown
    assert store.files(removals.ROOT) == {}


def test_a_tag_keeps_its_version_and_what_that_was_made_from(twice):
    old = olds(twice.store)
    invoke("tag", "from_other", old["models/from_other"].rpartition("/")[2], "paper", "--store", twice.store)
    assert removable(twice.store, "--keep", 0) == folders(twice.store) - {
        old["models/from_other"],
        old["datasets/other"],
        *(f"{node}/{versions(twice.store, node)[0]}" for node in ("datasets/clean", "models/standard")),
        *(f"evaluations/accuracy/{version}" for version in versions(twice.store, "evaluations/accuracy")),
    }


def test_each_rule_must_let_a_version_go(twice):
    old = set(olds(twice.store).values()) - {olds(twice.store)["evaluations/accuracy"]}
    assert removable(twice.store, "--keep", 1) == removable(twice.store, "--keep", 1, "--older-than", "0h") == old
    assert removable(twice.store, "--keep", 1, "--older-than", "1h") == set()
    assert removable(twice.store, "--unreferenced") == removable(twice.store, "--keep", 1, "--unreferenced") == set()
    shutil.rmtree(twice.store / "runs" / twice.runs[0])
    assert removable(twice.store, "--unreferenced") == set(olds(twice.store).values())
    assert len(removable(twice.store, "--older-than", "0h")) == len(folders(twice.store)) - 1, "all but one result"


def test_what_a_run_under_way_names_stays_and_what_a_dead_one_names_does_not(twice):
    record = twice.store / "runs" / twice.runs[0] / "run.json"
    for state, silent, kept in (("running", 0, True), ("running", 1800, True), ("running", 7200, False)):
        reseal(twice.store, record, lambda run, s=state, t=silent: run | {"state": s, "updated": time.time() - t})
        assert (removable(twice.store, "--keep", 0) & set(olds(twice.store).values()) == set()) is kept, silent


def test_an_unfinished_version_that_stays_keeps_what_its_run_needs(twice):
    old = olds(twice.store)
    (twice.store / old["models/from_other"] / "manifest.json").unlink()
    shutil.rmtree(twice.store / "models/from_other" / versions(twice.store, "models/from_other")[0])
    assert old["datasets/other"] not in removable(twice.store, "--keep", 1)


@pytest.mark.parametrize("damaged", ["run", "tag", "manifest"])
def test_a_damaged_document_protects_what_it_mentions(damaged, twice):
    old = olds(twice.store)
    version = old["datasets/other"].rpartition("/")[2]
    invoke("tag", "other", version, "v1", "--store", twice.store)
    path = {
        "run": f"runs/{twice.runs[0]}/run.json",
        "tag": "tags/datasets/other/v1.json",
        "manifest": f"{old['models/from_other']}/manifest.json",
    }[damaged]
    content = (twice.store / path).read_text()
    if damaged != "tag":
        invoke("tag", "other", "v1", "--remove", "--store", twice.store)
    assert damaged == "tag" or old["datasets/other"] in removable(twice.store, "--keep", 1)
    (twice.store / path).write_text(
        content.replace('"made": "2', '"made": "3').replace('"started": "2', '"started": "3')
    )
    assert old["datasets/other"] not in removable(twice.store, "--keep", 1)


def test_a_symbolic_link_is_not_followed(twice, tmp_path):
    old = twice.store / olds(twice.store)["models/from_other"]
    elsewhere = shutil.move(old, tmp_path / "elsewhere")
    old.symlink_to(elsewhere)
    before = {path.name: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()}
    assert "symbolic link" in invoke("gc", "--keep", 1, "--yes", "--store", twice.store, code=2).stderr
    assert {path.name for path in elsewhere.rglob("*") if path.is_file()} == set(before)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ([], "gc needs to know what to remove: add --keep N, --older-than AGE or --unreferenced"),
        (["--older-than", "3 months"], "is no age; write hours, days or weeks"),
        (["--keep", 1], "there is no terminal to confirm on"),
        (["--keep", 1, "--json"], "there is no terminal to confirm on"),
    ],
)
def test_a_request_that_does_not_say_enough_removes_nothing(args, sentence, twice):
    before = folders(twice.store)
    assert sentence in invoke("gc", *args, "--store", twice.store, code=2).stderr
    assert folders(twice.store) == before


# --------------------------------------------------------------------------------- at the same time


def test_what_was_tagged_after_the_question_stays(twice, monkeypatch):
    old, olds_learner = (olds(twice.store)[node] for node in ("datasets/other", "models/from_other"))
    before, announced = contents_of(twice.store), removals.announced

    def answered(*args):
        invoke("tag", "other", old.rpartition("/")[2], "v1", "--store", twice.store)
        return announced(*args)

    monkeypatch.setattr(removals, "announced", answered)
    said = invoke("gc", "--keep", 1, "--store", twice.store, text="y\n").stdout
    assert "removed 1 version, " in said and "; 1 needed by now, and kept" in said
    assert contents_of(twice.store) == {f: c for f, c in before.items() if f != olds_learner}


def test_a_tag_waits_for_a_removal_and_is_refused_if_that_took_the_version(twice, monkeypatch):
    monkeypatch.setattr(removals, "POLL", 0.05)
    store, old = Store(str(twice.store)), olds(twice.store)["datasets/other"]
    with removals.announced(store, "here", [old]) as notice:
        remove = threading.Timer(0.5, lambda: (store.delete_folder(old), notice.done(old), notice.write()))
        remove.start()
        with pytest.raises(BadInput, match="was removed meanwhile"):
            names.tag(store, "other", old.rpartition("/")[2], "v1")
        remove.join()
    assert store.files("tags", recursive=True) == {}


@pytest.mark.parametrize("ends", ["done", "killed"])
def test_a_run_waits_for_a_removal_of_what_it_names_and_makes_it_again(ends, twice, monkeypatch):
    """Without the wait, the run would take the version for there, and find its files gone."""
    monkeypatch.setattr(removals, "POLL", 0.05)
    monkeypatch.setattr(removals, "SILENCE", 1.5 if ends == "killed" else 60)
    monkeypatch.setattr("pipeline.run.runs.BEAT", 0.1)
    store, old, before = Store(str(twice.store)), olds(twice.store)["datasets/other"], contents_of(twice.store)
    notice = removals.Notice(store, "here", [old])
    notice.write()

    def remove():
        end = time.monotonic() + 60
        while not any(progress["why"] for progress in states()) and time.monotonic() < end:
            time.sleep(0.05)
        waited.extend(states())
        store.delete(f"{old}/manifest.json")
        if ends == "done":
            store.delete_folder(old)
            store.delete(notice.path)

    def states():
        """The node's progress in the record of the run that waits, as far as that is there."""
        new = [path.name for path in (twice.store / "runs").iterdir() if path.name not in twice.runs]
        records = [store.find_json(f"runs/{run}/run.json") for run in new]
        return [record["nodes"]["datasets/other"] for record in records if record]

    waited = []
    remover = threading.Thread(target=remove)
    remover.start()
    invoke("run", twice.folder / "old.yaml", "--store", twice.store, "--engine", "inline")
    remover.join()
    assert (waited[0]["state"], waited[0]["why"][:22]) == ("waiting", "waits for `notbugs gc`")
    assert contents_of(twice.store) == before and store.files(removals.ROOT) == {}
    invoke("verify", "--store", twice.store)


def test_a_removal_that_was_taken_for_dead_stops(twice):
    store, old = Store(str(twice.store)), olds(twice.store)
    going = [old["datasets/other"], old["models/from_other"]]
    removal = gc.collect(store, gc.Policy(keep=1), going)
    next(removal)
    for name in store.files(removals.ROOT):
        store.delete(f"{removals.ROOT}/{name}")
    with pytest.raises(BadData, match="paused for so long"):
        next(removal)
    assert len(folders(twice.store) & set(going)) == 1


def contents_of(store):
    """Folder → content digest of every finished version."""
    return {
        str(path.parent.relative_to(store)): json.loads(path.read_text())["content"]
        for path in store.glob("*/*/*/manifest.json")
    }


# -------------------------------------------------------------------------------------------- kills

KILLED = """
import os, signal, shutil, sys, time
from pipeline import cli
from pipeline.run import removals
from pipeline.store import Store

removals.BEAT, removals.SILENCE = 0.1, 2.0
left = int(sys.argv.pop(1))

def counted(real):
    def work(*args, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.03)
        return real(*args, **options)
    return work

os.unlink, os.rmdir, Store.delete = map(counted, (os.unlink, os.rmdir, Store.delete))
sys.stdin.readline()
cli.main(prog_name="notbugs")
"""


def start_gc(store, dies_at):
    """Make ready a removal that begins at a line of input, and ends itself by SIGKILL at its n-th deletion."""
    line = [sys.executable, "-c", KILLED, str(dies_at), "gc", "--keep", "1", "--yes", "--store", str(store)]
    pipe = subprocess.PIPE
    return subprocess.Popen(line, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def intact(store, needed):
    """Whether every file of these versions has its bytes."""
    invoke("verify", *needed, "--store", store)
    found = contents_of(store)
    assert {folder: found.get(folder) for folder in needed} == needed


def test_a_killed_removal_loses_nothing_that_is_needed_and_the_next_one_goes_on(twice):
    before, going = contents_of(twice.store), removable(twice.store, "--keep", 1)
    needed = {folder: content for folder, content in before.items() if folder not in going}
    killed = start_gc(twice.store, dies_at=9)
    said = killed.communicate("go\n", timeout=120)
    assert killed.returncode == -signal.SIGKILL, said
    assert 0 < len(set(before) - set(contents_of(twice.store))) <= len(going)
    intact(twice.store, needed)
    invoke("gc", "--keep", 1, "--yes", "--store", twice.store)
    assert folders(twice.store) == set(needed)
    intact(twice.store, needed)


@pytest.mark.slow
def test_eight_kills_beside_runs_lose_nothing_that_is_needed(twice, tmp_path, monkeypatch):
    """Beside each removal an experiment is run that needs what is removed."""
    monkeypatch.setattr(removals, "SILENCE", 2.0)
    monkeypatch.setattr(removals, "POLL", 0.05)
    draw, before, old = random.Random(20261126), contents_of(twice.store), olds(twice.store)
    needed = {folder: content for folder, content in before.items() if folder not in old.values()}
    stores = [shutil.copytree(twice.store, tmp_path / f"kill{number}") for number in range(8)]
    ready, deaths, remade = start_gc(stores[0], draw.randrange(1, 15)), 0, 0
    for number, store in enumerate(stores):
        removal = ready
        if number + 1 < len(stores):
            ready = start_gc(stores[number + 1], draw.randrange(1, 15))
        kept = dict(needed)
        if draw.random() < 0.3:
            invoke("tag", "other", old["datasets/other"].rpartition("/")[2], "v1", "--store", store)
            kept[old["datasets/other"]] = before[old["datasets/other"]]
        removal.stdin.write("go\n")
        removal.stdin.flush()
        while removal.poll() is None and not any((store / removals.ROOT).glob("*.json")) and number % 4:
            time.sleep(0.01)  # in three rounds of four, the removal is under way when the run begins
        made = invoke("run", twice.folder / "old.yaml", "--store", store, "--engine", "inline")
        _, why = removal.communicate(timeout=120)
        assert removal.returncode in (0, -signal.SIGKILL) or "paused for so long" in why, why
        intact(store, kept)
        deaths, remade = deaths + (removal.returncode < 0), remade + ("from_other: done" in made.stderr)
    assert deaths >= 4 and remade >= 2, (deaths, remade)
