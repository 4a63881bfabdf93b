"""A separate process for code that may exit, hang or crash: whatever happens, the caller can report it and continue."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages import apart, own
from stages.errors import BadData, BadInput


def call(arch, here, *args):
    """Called in the other process: the object that an arch names, with these arguments."""
    return own.find(arch, here)(*args)


MINE = """
import ctypes, os, subprocess, sys, time

def adds(a, b):
    print("told")
    os.system("echo told")
    return a + b

def crashes():
    ctypes.string_at(0)

def hangs():
    spins()

def spins():
    while True: pass

def sleeps():
    time.sleep(1000)

def leaves():
    return subprocess.Popen(["sleep", "1000"]).pid

def reads():
    return sys.stdin.read()

def unpicklable():
    class Odd(Exception):
        pass
    raise Odd("some reason")
"""


@pytest.fixture
def tried(tmp_path, monkeypatch):
    """Call a function of the module above in a separate process."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    return lambda arch, *args: apart.apart(call, arch, tmp_path, *args, arch=arch)


def test_what_it_gives_comes_back_and_what_it_prints_does_not(tried, capfd):
    assert tried("mine:adds", 2, 3) == 5
    assert capfd.readouterr() == ("", "")


DEATHS = {
    "os:_exit": ([3], "ends the program with exit code 3 when it is tried"),
    "os:abort": (
        [],
        f"ends the program by signal SIGABRT when it is tried, in {__file__} line {call.__code__.co_firstlineno + 2}",
    ),
    "mine:crashes": ([], "ends the program by signal SIGSEGV when it is tried, in mine.py line 10"),
    "mine:hangs": ([], "does not come to an end within 2 s when it is tried, in mine.py line 16"),
    "mine:sleeps": ([], "does not come to an end within 2 s when it is tried, in mine.py line 19"),
}


@pytest.mark.parametrize("arch", DEATHS)
def test_however_it_ends_one_sentence_says_so_with_the_place(arch, tried, monkeypatch):
    monkeypatch.setattr(apart, "PATIENCE", 2.0)
    args, sentence = DEATHS[arch]
    with pytest.raises(BadInput) as refused:
        tried(arch, *args)
    assert str(refused.value) == f"arch {arch} {sentence}"


def test_what_it_has_started_does_not_outlive_it_nor_is_it_waited_for(tried):
    started = time.monotonic()
    pid = tried("mine:leaves")
    assert time.monotonic() - started < 60
    with pytest.raises(ProcessLookupError):
        while time.monotonic() - started < 60:
            os.kill(pid, 0)
            time.sleep(0.05)


def test_it_reads_nothing(tried):
    assert tried("mine:reads") == ""


def raises(error):
    raise error


@pytest.mark.parametrize("error", [BadInput("a request"), BadData("a thing"), ZeroDivisionError("one")], ids=repr)
def test_what_it_raises_is_raised_here(error):
    with pytest.raises(type(error), match=f"^{error}$"):
        apart.apart(raises, error, arch="mine:net")


def test_an_exception_that_does_not_travel_is_raised_as_what_it_says(tried):
    with pytest.raises(RuntimeError, match=r"^Odd: some reason$"):
        tried("mine:unpicklable")


def test_one_call_is_made_once(tried, tmp_path, monkeypatch):
    assert tried("mine:adds", 20, 3) == 23
    monkeypatch.setattr(sys, "executable", "/nowhere")
    assert tried("mine:adds", 20, 3) == 23
    with pytest.raises(FileNotFoundError):
        tried("mine:adds", 20, 4)
    apart.forget()
    with pytest.raises(FileNotFoundError):
        tried("mine:adds", 20, 3)


def test_it_runs_the_same_code_as_this_process(tmp_path, monkeypatch):
    """Not that of the folder in which it stands, nor that of its script."""
    for name in ("stages", "pickle", "random"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('taken for another')")
    monkeypatch.chdir(tmp_path)
    assert apart.apart(where, arch="mine:net") == str(Path(apart.__file__))


def where():
    return sys.modules["stages.apart"].__file__


def test_ctrl_c_ends_it(tmp_path):
    (tmp_path / "mine.py").write_text(MINE + "\nfrom pathlib import Path\nPath('pid').write_text(str(os.getpid()))")
    code = (
        "import sys, test_stage_apart as t; from pathlib import Path; from stages.apart import apart\n"
        "apart(t.call, 'mine:sleeps', Path(), arch='mine:sleeps')"
    )
    paths = os.pathsep.join(sys.path)
    asking = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, stderr=subprocess.DEVNULL
    )
    while not (pid := tmp_path / "pid").exists() or not pid.read_text():
        assert asking.poll() is None
        time.sleep(0.05)
    asking.send_signal(signal.SIGINT)
    assert asking.wait(60) == -signal.SIGINT
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
