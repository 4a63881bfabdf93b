"""Code of the user's is tried in a process of its own: it may exit, crash or hang, and a sentence says so."""

import faulthandler
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, TypeVar

from stages.errors import BadInput
from stages.own import is_theirs, placed

PATIENCE = 120.0
"""Seconds that a trial may take: a large network on a busy machine takes tens."""

BEGIN = """
import pickle, sys
sys.path.insert(0, sys.argv[1])
import stages
sys.path[:] = pickle.load(sys.stdin.buffer)
from stages.apart import _answer
_answer()
"""
"""The other process runs the same code: our own, and what else is where this one would find it."""

T = TypeVar("T")

_known: dict[bytes, Any] = {}


def forget() -> None:
    """Call anew what was called before: the user's files may have changed."""
    _known.clear()


def apart(function: Callable[..., T], *args: Any, arch: str) -> T:
    """What a function gives, called in a process of its own; for the same call the same, until `forget`.

    Args:
        function: a module's own function, which pickles; so do `args` and what it gives.
        arch: the user's code that it runs, for the sentence.

    Raises:
        BadInput: the process ended or hung; or the function raised it.
        Exception: whatever else the function raised.
    """
    call = pickle.dumps((function, args))
    if call not in _known:
        _known[call] = _call(pickle.dumps(sys.path) + pickle.dumps(PATIENCE) + call, arch)
    made: T = _known[call]
    return made


@contextmanager
def aside() -> Iterator[None]:
    """Processes started meanwhile never receive Ctrl-C, and the program must end them.

    Nor do they search the current folder for modules, as processes of `multiprocessing` otherwise do.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}), os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        del os.environ["PYTHONSAFEPATH"]
        if before[1] is not None:
            os.environ["PYTHONSAFEPATH"] = before[1]
        signal.pthread_sigmask(signal.SIG_SETMASK, before[0])


def _call(asked: bytes, arch: str) -> Any:
    """Files stand between the processes: on a pipe, one would wait for whatever else the code has started."""
    with TemporaryFile() as given, TemporaryFile() as made, TemporaryFile() as said:
        given.write(asked)
        given.seek(0)
        command = [sys.executable, "-P", "-c", BEGIN, str(Path(__file__).parent.parent)]
        process = subprocess.Popen(command, stdin=given, stdout=made, stderr=said, start_new_session=True)
        try:
            code = process.wait(1.5 * PATIENCE)  # it ends itself before, and says where it hangs
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        made.seek(0)
        content = made.read()
        if not content:
            raise BadInput(f"arch {arch} {_death(code, said, arch)}")
    value, error = pickle.loads(content)
    if error is not None:
        raise error
    return value


def _death(code: int | None, said: IO[bytes], arch: str) -> str:
    """How the process ended, and where in the user's files it was, as far as `faulthandler` has said so."""
    said.seek(0)
    lines = said.read().decode(errors="replace")
    frames = re.findall(r'^  File "(.+)", line (\d+) in', lines, re.MULTILINE)  # the innermost first
    place = next((f", in {placed(file, int(line))}" for file, line in frames if is_theirs(file, arch)), "")
    if code is None or re.search(r"^Timeout \(", lines, re.MULTILINE):
        return f"does not come to an end within {PATIENCE:.0f} s when it is tried{place}"
    how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return f"ends the program {how} when it is tried{place}"


def _answer() -> None:
    """The other process: call what standard input says; what comes of it goes to what was standard output."""
    limit = pickle.load(sys.stdin.buffer)
    faulthandler.enable()
    faulthandler.dump_traceback_later(limit, exit=True)
    out = os.dup(1)
    os.dup2(2, 1)  # what the code prints is no answer
    try:
        function, args = pickle.load(sys.stdin.buffer)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        made = pickle.dumps((function(*args), None))
    except Exception as error:  # noqa: BLE001 - raised again by whoever asked
        made = _pickled(error)
    with os.fdopen(out, "wb") as answer:
        answer.write(made)
    os._exit(0)  # threads that the code has left behind do not keep it


def _pickled(error: Exception) -> bytes:
    try:
        pickle.loads(made := pickle.dumps((None, error)))
        return made
    except Exception:  # noqa: BLE001 - whatever an exception of another's class stumbles on
        return pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}")))
