"""The terminal: output, missing streams, and signals.

Imports only the standard library: the terminal is set up before the rest of the program is imported.
"""

import codecs
import errno
import io
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TextIO

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C; `kill`, `docker stop` and batch systems; a closed terminal or connection."""

IMPATIENCE = 1.0
"""Seconds after which a second signal counts. Before, it may be the same one twice: from the shell and the system,
through a wrapper, or from a nervous finger."""

HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
"""Characters that move the cursor, change colours, or hide or reorder text; and unpaired surrogates."""

PLAIN = str.maketrans(
    {"─": "-", "━": "-", "–": "-", "−": "-", "…": "...", "×": "x", "±": "+-", "→": "->", "∞": "inf", "ε": "eps"}
    | {"│": "|", "├": "|", "└": "`"}
)
"""ASCII for the project's own symbols, for terminals without them."""


LONG = (10.0, 60.0)
"""Seconds between two lines about what takes long: on a terminal, and elsewhere, where lines are for a log."""


class Unheard(Exception):
    """Standard output cannot be written. Not an OSError, which would mean an unavailable store or cluster."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(f"standard output cannot be written: {cause.strerror or cause}")
        self.reader_left = cause.errno == errno.EPIPE


class Interrupted(KeyboardInterrupt):
    """The program received one of `SIGNALS`; `code` is its exit code."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class _State:
    """The state of this process.

    Attributes:
        debug: whether tracebacks are shown.
        advice: printed if the program is interrupted.
        answered: whether it was.
        asked: time of the first signal, or of the program's own end (monotonic seconds).
        ending: whether `Interrupted` was raised, or is no longer needed.
        again: number of postponed signals that are on their way.
    """

    debug = False
    advice = ""
    answered = False
    asked: float | None = None
    ending = False
    again = 0


# ------------------------------------------------------------------------------------------- output


def visible(text: str) -> str:
    """One line of text with control and invisible characters as escapes: ``\\x1b[2J``."""
    return HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def echo(text: object = "", err: bool = False, nl: bool = True) -> None:
    """Print lines to stdout or stderr, with control characters as escapes.

    Raises:
        Unheard: stdout cannot be written. Failure to write stderr is ignored: there is nowhere to report it.
    """
    stream = sys.stderr if err else sys.stdout
    try:
        stream.write("\n".join(map(visible, str(text).split("\n"))) + "\n" * nl)
        stream.flush()
    except OSError as error:
        _mute(stream)
        if not err:
            raise Unheard(error) from error


@contextmanager
def noting_long(what: str | None) -> Iterator[Callable[[str], None]]:
    """Print a line on stderr every few seconds, while something takes long.

    Args:
        what: the work, such as ``checking``; None prints nothing.

    Yields:
        A function that takes the name of each step as it begins.
    """
    step, began, ended = "", time.monotonic(), threading.Event()

    def begin(name: str) -> None:
        nonlocal step
        step = f" {name}"

    def note() -> None:
        while not ended.wait(LONG[not sys.stderr.isatty()]):
            echo(f"{what}{step}, {clock(time.monotonic() - began)} so far", err=True)

    if what is not None:
        threading.Thread(target=note, daemon=True, name="long").start()
    try:
        yield begin
    finally:
        ended.set()


def width() -> int | None:
    """Columns of the terminal that stdout goes to; None where it goes to a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def relay(text: str) -> None:
    """Print the output of a remote program, without its colours and carriage returns."""
    echo(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r\n", "\n").replace("\r", "\n"), nl=False)


def show_tracebacks(shown: bool) -> None:
    """Set whether `debug` prints."""
    _State.debug = shown


def debug(error: BaseException) -> None:
    """Print the traceback of an error if tracebacks are shown."""
    if _State.debug:
        echo("".join(traceback.format_exception(error)), err=True)


def _mute(stream: TextIO) -> None:
    """Discard all further output of a stream, including what is flushed as the program ends."""
    with suppress(OSError), open(os.devnull, "wb") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), stream.fileno())


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Encoding error handler: ASCII for characters that the terminal's encoding lacks."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end].translate(PLAIN)
    return text.encode("ascii", "backslashreplace").decode(), error.end


codecs.register_error("plain", _plain)


def open_streams() -> None:
    """Make stdin, stdout and stderr usable: redirect closed ones to the null device, and encode every character.

    Otherwise a closed stream would be None, and the next opened file would take its descriptor.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))  # noqa: PTH123, SIM115
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and number:
            stream.reconfigure(errors="plain")
        elif isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # part of it was already read
                stream.reconfigure(encoding="utf-8")  # the encoding of experiment files, whatever the terminal's


def name_files_in_utf_8() -> None:
    """Restart the program in UTF-8 mode if the locale encodes file names otherwise: pyarrow always uses UTF-8."""
    if sys.getfilesystemencoding() != "utf-8":
        os.environ["PYTHONUTF8"] = "1"
        os.environ.setdefault("PYTHONIOENCODING", sys.stdout.encoding if sys.stdout else "utf-8")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def find_home() -> None:
    """Set HOME if the system knows no home folder, as for an arbitrary user of a container: Ray needs one."""
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = tempfile.gettempdir()


# ------------------------------------------------------------------------------------------ formats


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: ``1:02:03``."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02}:{whole % 60:02}"


def duration(seconds: float | None) -> str:
    """A time span: ``12.3 s``, or `clock` from 100 seconds on."""
    if seconds is None:
        return "–"
    return f"{seconds:.1f} s" if seconds < 100 else clock(seconds)


def hours(seconds: float) -> str:
    """Hours with four decimals, or with one from ten hours on."""
    return f"{seconds / 3600:,.4f}" if seconds < 36_000 else f"{seconds / 3600:,.1f}"


def size(count: float) -> str:
    """Bytes, in units of 1000: ``1.23 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if count else "–"
        count /= 1000
    return f"{count:,.3g} TB"


# ------------------------------------------------------------------------------------------ signals


def if_interrupted(advice: str) -> None:
    """Set the advice printed on interruption: what is kept, and how to resume."""
    _State.advice = advice


def say_interrupted() -> None:
    """Print, once, that the program was interrupted, and the advice."""
    if _State.answered:
        return
    _State.answered = True
    echo(f"\nInterrupted. {_State.advice}".rstrip(), err=True)


def listen(force: bool = False) -> None:
    """Handle `SIGNALS`: the first raises `Interrupted` in the main thread, a later one ends the process at once.

    A signal that was ignored when the process started, as under nohup or in the background, stays ignored.

    Args:
        force: handle Ctrl-C even then.
    """
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN or (force and number == signal.SIGINT):
                signal.signal(number, _on_signal)


def _on_signal(number: int, frame: FrameType | None) -> None:
    now, again = time.monotonic(), _State.again > 0
    if again:
        _State.again -= 1
    elif _State.asked is None:
        _State.asked = now
    elif now - _State.asked > IMPATIENCE:
        _end_at_once(number)
    if not _State.ending and _importing(frame):
        threading.Timer(0.02, _tell_again, (number,)).start()
    elif not _State.ending:
        _State.ending = True
        raise Interrupted(number)


def _importing(frame: FrameType | None) -> bool:
    """Whether an import is in progress: an exception during one makes torch abort, and other packages fail oddly."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _tell_again(number: int) -> None:
    _State.again += 1
    os.kill(os.getpid(), number)


def _end_at_once(number: int) -> None:
    cursor = "\x1b[?25h" if os.isatty(2) else ""  # progress bars hide it
    text = f"{cursor}\nEnded at once. {visible(_State.advice)}".rstrip()
    with suppress(OSError):  # not through the stream, which may be writing
        os.write(2, f"{text}\n".encode("ascii", "plain"))
    for process in multiprocessing.active_children():  # those started in `alone`
        process.terminate()
    os._exit(128 + number)


@contextmanager
def session() -> Iterator[None]:
    """Run a command with usable streams and an orderly end on signals."""
    _State.advice, _State.answered, _State.asked, _State.ending = "", False, None, False
    before = {number: signal.getsignal(number) for number in SIGNALS}
    open_streams()
    find_home()
    listen()
    try:
        yield
    finally:
        _State.asked, _State.ending = time.monotonic(), True
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler is not None:  # not set by Python
                    signal.signal(number, handler)
