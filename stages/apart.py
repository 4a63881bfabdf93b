"""Try user code in a separate process, since it may exit, crash or hang; report that as a message."""

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
"""Timeout of a trial in seconds; a large network on a busy machine takes tens."""

BEGIN = """
import pickle, sys
sys.path.insert(0, sys.argv[1])
import stages
sys.path[:] = pickle.load(sys.stdin.buffer)
from stages.apart import _answer
_answer()
"""
"""Entry point of the process, with the same module search path."""

T = TypeVar("T")

_known: dict[bytes, Any] = {}


def forget() -> None:
    """Clear the cache: the user's files may have changed."""
    _known.clear()


def apart(function: Callable[..., T], *args: Any, arch: str) -> T:
    """Call a function in a separate process; results are cached until `forget`.

    Args:
        function: picklable, as are `args` and the result.
        arch: the user code that it runs, for messages.

    Raises:
        BadInput: the process exited or hung; or the function raised it.
        Exception: any other exception of the function.
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
    """Communicates through files: on a pipe, we would wait for any process that the code started."""
    with TemporaryFile() as given, TemporaryFile() as made, TemporaryFile() as said:
        given.write(asked)
        given.seek(0)
        command = [sys.executable, "-P", "-c", BEGIN, str(Path(__file__).parent.parent)]
        process = subprocess.Popen(command, stdin=given, stdout=made, stderr=said, start_new_session=True)
        try:
            code = process.wait(1.5 * PATIENCE)  # it exits earlier by itself, with a traceback
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
    """How the process ended, and where in the user's files, if `faulthandler` reported it."""
    said.seek(0)
    lines = said.read().decode(errors="replace")
    frames = re.findall(r'^  File "(.+)", line (\d+) in', lines, re.MULTILINE)  # the innermost first
    place = next((f", in {placed(file, int(line))}" for file, line in frames if is_theirs(file, arch)), "")
    if code is None or re.search(r"^Timeout \(", lines, re.MULTILINE):
        return f"does not come to an end within {PATIENCE:.0f} s when it is tried{place}"
    how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return f"ends the program {how} when it is tried{place}"


def _answer() -> None:
    """Run in the process: call the function from standard input, write its result to the original standard output."""
    limit = pickle.load(sys.stdin.buffer)
    faulthandler.enable()
    faulthandler.dump_traceback_later(limit, exit=True)
    out = os.dup(1)
    os.dup2(2, 1)  # the code may print
    try:
        function, args = pickle.load(sys.stdin.buffer)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        made = pickle.dumps((function(*args), None))
    except Exception as error:  # noqa: BLE001 - the caller raises it again
        made = _pickled(error)
    with os.fdopen(out, "wb") as answer:
        answer.write(made)
    os._exit(0)  # do not wait for threads of the code


def _pickled(error: Exception) -> bytes:
    try:
        pickle.loads(made := pickle.dumps((None, error)))
        return made
    except Exception:  # noqa: BLE001 - the user's exception class may fail to pickle or unpickle
        return pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}")))
