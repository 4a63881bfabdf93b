"""Sending a job to a worker: only the same code opens it, in the user's folder on that machine."""

import os
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import pipeline
from pipeline.experiment.graph import build
from pipeline.experiment.spec import parse
from pipeline.run import parcel
from pipeline.run.jobs import Context, LoadJob
from pipeline.run.parcel import SENT, pack, search_path, unpack
from pipeline.store import Store
from stages.errors import BadInput


@pytest.fixture
def job(tmp_path):
    """A job that loads synthetic images."""
    source = {"source": "synthetic", "images": {"train": 6}, "classes": 3, "size": 8, "shard_size": 6}
    (node,) = build(parse({"name": "made", "datasets": {"clean": {"load": source}}}))
    return LoadJob(node, Context(Store(str(tmp_path / "s")), tmp_path, tmp_path / "here"), {})


def test_a_job_is_opened_as_it_was_packed_and_once(job):
    packed = pack(job)
    opened = unpack(packed)
    assert opened.node == job.node and opened.context.here == job.context.here
    assert unpack(packed) is opened


@pytest.mark.parametrize(
    ("home", "said"),
    [
        (
            pipeline.HOME,
            rf"^the code in {pipeline.HOME} is not what it was when the run began, .*: begin the run again",
        ),
        (
            "/elsewhere",
            rf"^a worker on .* runs other code, of {pipeline.HOME}, than this command, of /elsewhere: install ",
        ),
    ],
)
def test_a_job_that_other_code_has_sent_is_refused_before_it_is_opened(home, said):
    with pytest.raises(BadInput, match=said):
        unpack(pickle.dumps(("0" * 16, home, b"no job")))


def test_the_digest_of_our_code_is_that_of_every_file_of_it(tmp_path, monkeypatch):
    before = parcel._sources()
    assert before == parcel.CODE
    for package in ("pipeline", "stages"):
        (tmp_path / package / "load").mkdir(parents=True)
        (tmp_path / package / "load/one.py").write_text("1")
        monkeypatch.setattr(sys.modules[package], "__path__", [str(tmp_path / package)])
    seen = {before, parcel._sources()}
    for file, text in (("stages/load/one.py", "2"), ("stages/load/two.py", "1"), ("pipeline/load/one.py", "2")):
        (tmp_path / file).write_text(text)
        seen.add(parcel._sources())
    assert len(seen) == 5
    (tmp_path / "stages/notes.txt").write_text("1")
    assert parcel._sources() in seen, "what is no code says nothing"


def test_a_worker_goes_into_the_folder_that_was_sent_along(job, tmp_path, monkeypatch):
    (tmp_path / SENT).mkdir()
    monkeypatch.chdir(tmp_path)
    assert unpack(pack(job)).context.here == tmp_path / SENT == Path.cwd()
    other = LoadJob(job.node, replace(job.context, data=Path("other")), {})
    assert unpack(pack(other)).context.here == tmp_path / SENT, "the next one too"


@pytest.mark.parametrize("where", ["script", "search path", "installed", "finder"])
def test_workers_are_told_where_our_code_is_only_where_they_would_not_find_it(where, monkeypatch):
    rest = [entry for entry in sys.path if os.path.realpath(entry) != os.path.realpath(pipeline.HOME)]
    given = {"script": [pipeline.HOME, *rest], "search path": [pipeline.HOME, *rest], "finder": rest}
    monkeypatch.setattr(sys, "path", given.get(where, [*rest, pipeline.HOME]))
    monkeypatch.setenv("PYTHONPATH", f"/nowhere:{pipeline.HOME}" if where == "search path" else "")
    assert search_path() == ([os.path.realpath(pipeline.HOME)] if where == "script" else [])
