"""`python -m benchmarks.gpu`, rehearsed on a CPU, so that it cannot fail on a GPU for a trivial reason."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import SHARES, run
from benchmarks.gpu.sheet import Sheet, printed

ROOT = Path(__file__).parent.parent

ABSENT = ("ray", "webdataset", "aiohttp", "torchattacks", "foolbox", "robustness", "psutil")
"""Packages that the machine may lack."""


def test_what_is_measured_is_on_disk_at_once_and_what_is_cut_off_is_printed_so_far(tmp_path):
    sheet = Sheet("loops", tmp_path, None, True, time.monotonic() + 60)
    add = sheet.table("Rates", "loop", "image·steps/s")
    add("ours", 7123.4)
    sheet.say("0.65 hours")
    sheet.note("resnet50", 7123.4)
    found = json.loads((tmp_path / "loops.json").read_text())
    assert found == {
        "tables": [{"title": "Rates", "head": ["loop", "image·steps/s"], "lines": [["ours", "7.12e+03"]]}],
        "said": ["0.65 hours"],
    }
    text = printed({"step": "loops", **found, "seconds": 12.3, "failed": "was cut off after 12 s"})
    assert text.splitlines()[0] == "Rates"
    assert text.endswith("0.65 hours\nloops: was cut off after 12 s\n")
    assert Sheet("node", tmp_path, None, True, 0).noted("loops", "resnet50") == 7123.4
    assert Sheet("node", tmp_path, None, True, 0).noted("loops", "other") is None


def test_a_step_that_takes_too_long_is_ended_and_keeps_what_it_has(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("benchmarks.gpu.__main__.GRACE", 0.1)
    started = time.monotonic()
    found = run("experiment", 0.5, None, tmp_path, True)
    assert time.monotonic() - started < 30
    assert found["failed"] == "was cut off after 1 s"
    assert found["tables"] == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_rehearsal_goes_through_all_steps_and_every_byte_is_the_same_twice(tmp_path):
    for name in ABSENT:
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name} here', name='{name}')")
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--minutes", "25", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {one["step"]: one for one in json.loads((tmp_path / "gpu.json").read_text())}
    assert list(found) == list(SHARES)
    assert all(one["tables"] and one["failed"] is None for one in found.values())
    (same,) = (table for table in found["correctness"]["tables"] if table["title"] == "The same bytes")
    assert [line[1] for line in same["lines"]] == ["yes"] * 14
    assert [line[0] for line in found["experiment"]["tables"][0]["lines"]] == [
        "source",
        "rand",
        "leakage",
        "other",
        "det",
    ]
