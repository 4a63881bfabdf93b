"""The inline engine: shards in order, with the next read and the last ones committed during the work on one."""

import threading
from types import SimpleNamespace

import pytest

from pipeline.run import engines
from pipeline.run.engines import ATTEMPTS, Inline
from pipeline.run.jobs import Unit
from stages.errors import BadData


class Job:
    """Counts the steps of shards; `fails` is the number of times that a step of one fails."""

    def __init__(self, heavy, fails=None, wait=False):
        self.heavy, self.fails, self.done = heavy, dict(fails or {}), []
        self.context = SimpleNamespace(store=SimpleNamespace(retries=0))
        self.beside = {"read": threading.Event(), "commit": threading.Event()}
        self.wait = wait

    def step(self, name, unit):
        self.done.append((name, unit))
        self.context.store.retries += name != "work"
        if self.fails.get((name, unit), 0) > 0:
            self.fails[name, unit] -= 1
            raise RuntimeError(f"{name} of {unit}")

    def open(self):
        return self.work

    def read(self, unit):
        self.step("read", unit.name)
        if unit.name == "train-000002":
            self.beside["read"].set()
        return unit.name

    def work(self, name):
        self.step("work", name)
        if self.wait and name == "train-000001":
            assert self.beside["read"].wait(20)  # of the next
            assert self.beside["commit"].wait(20)  # of the last
        return name

    def commit(self, unit, name, facts):
        assert unit.name == name
        self.step("commit", name)
        if name == "train-000000":
            self.beside["commit"].set()
        return {"name": name, **facts}


def run(job, count=4):
    said = []
    units = [Unit(f"train-{k:06d}", 1, {}) for k in range(count)]
    lost = Inline().shards(job, units, lambda event, facts: said.append((event, facts)))
    return said, lost


@pytest.mark.parametrize("heavy", [True, False])
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_every_shard_is_made_once_and_reported_in_order(heavy, count):
    job = Job(heavy)
    said, lost = run(job, count)
    names = [f"train-{k:06d}" for k in range(count)]
    assert lost == []
    assert [(event, facts["name"], facts["attempt"]) for event, facts in said] == [("committed", n, 1) for n in names]
    assert sorted(job.done) == sorted((step, name) for step in ("read", "work", "commit") for name in names)
    assert sum(facts["store_retries"] for _, facts in said) == 2 * count  # each request sent again is counted once


def test_the_next_shard_is_read_and_the_last_committed_while_one_is_worked_on():
    said, lost = run(Job(heavy=True, wait=True))
    assert (len(said), lost) == (4, [])


@pytest.mark.parametrize("heavy", [True, False])
@pytest.mark.parametrize("cores, together", [(1, 1), (3, 1), (6, 4), (64, 8)])
def test_where_there_are_cores_several_shards_are_committed_at_the_same_time(heavy, cores, together, monkeypatch):
    monkeypatch.setattr(engines, "cores", lambda: cores)
    job, all_of_them, at_once, most = Job(heavy), threading.Barrier(together), [], []

    def commit(unit, name, facts):
        at_once.append(unit.name)
        most.append(len(at_once))
        all_of_them.wait(20)
        at_once.remove(unit.name)
        return {"name": name, **facts}

    monkeypatch.setattr(job, "commit", commit)
    said, lost = run(job, 2 * together)
    assert [facts["name"] for _, facts in said] == [f"train-{k:06d}" for k in range(2 * together)]
    assert (max(most), lost) == (together, [])


@pytest.mark.parametrize("heavy", [True, False])
@pytest.mark.parametrize("step", ["read", "work", "commit"])
@pytest.mark.parametrize("times", [1, 2, ATTEMPTS])
def test_a_step_that_fails_is_tried_again_and_does_not_stop_the_others(heavy, step, times):
    said, lost = run(Job(heavy, {(step, "train-000001"): times}))
    made = [facts["name"] for event, facts in said if event == "committed"]
    retried = [(facts["unit"], facts["attempt"]) for event, facts in said if event == "retried"]
    assert retried == [("train-000001", attempt) for attempt in range(1, min(times, ATTEMPTS - 1) + 1)]
    if times < ATTEMPTS:
        assert made == [f"train-{k:06d}" for k in range(4)]
        assert lost == []
    else:
        assert made == ["train-000000", "train-000002", "train-000003"]
        assert [(one.unit, one.reason) for one in lost] == [
            ("train-000001", f"unexpected: {step} of train-000001 (RuntimeError)")
        ]


@pytest.mark.parametrize("heavy", [True, False])
def test_bad_data_is_not_tried_again(heavy, monkeypatch):
    job = Job(heavy)

    def work(name):
        raise BadData(f"{name} is bad")

    monkeypatch.setattr(job, "work", work)
    said, lost = run(job, 2)
    assert said == []
    assert [one.reason for one in lost] == ["train-000000 is bad", "train-000001 is bad"]
