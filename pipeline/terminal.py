"""The terminal: what is printed on it, what is missing of it, and the signals that it sends.

Loads nothing but the standard library: it is set up before the rest of the program is imported.
"""

import codecs
import errno
import io
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TextIO

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C; what `kill`, `docker stop` and batch systems send; a terminal or connection that was closed."""

IMPATIENCE = 1.0
"""Seconds from which on a second signal is one: before, the same comes twice, from a closed shell and from the system,
through a wrapper, of a trembling finger."""

HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
"""What moves the cursor, changes colours, hides or turns round other text; and halves of characters."""

PLAIN = str.maketrans(
    {"─": "-", "━": "-", "–": "-", "…": "...", "×": "x", "±": "+-", "→": "->", "∞": "inf", "ε": "eps"}
)
"""The project's own signs, for a terminal that has none of them."""


class Unheard(Exception):
    """Standard output cannot be written; not an OSError, which a store or a cluster that is away would be."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(f"standard output cannot be written: {cause.strerror or cause}")
        self.reader_left = cause.errno == errno.EPIPE


class Interrupted(KeyboardInterrupt):
    """The program was told to end, by Ctrl-C or another of `SIGNALS`; `code` is its exit code."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class _State:
    """What is known of this process.

    Attributes:
        debug: whether tracebacks are shown.
        advice: what is said if the program is interrupted.
        asked: when it was told to end, or has ended by itself (monotonic seconds).
        ending: whether `Interrupted` was raised, or need not be any more.
        again: how many signals are on their way that were held back before.
    """

    debug = False
    advice = ""
    asked: float | None = None
    ending = False
    again = 0


# ------------------------------------------------------------------------------------------- output


def visible(text: str) -> str:
    """One line of text, in which what a terminal would obey, or not show, is written as an escape: ``\\x1b[2J``."""
    return HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def echo(text: object = "", err: bool = False, nl: bool = True) -> None:
    """Print lines, so that a terminal obeys nothing in them, to stdout or stderr.

    Raises:
        Unheard: stdout cannot be written. That stderr cannot is no reason to stop: there is nobody to tell.
    """
    stream = sys.stderr if err else sys.stdout
    try:
        stream.write("\n".join(map(visible, str(text).split("\n"))) + "\n" * nl)
        stream.flush()
    except OSError as error:
        _mute(stream)
        if not err:
            raise Unheard(error) from error


def relay(text: str) -> None:
    """Print what a program elsewhere has printed, without its colours and returns of the carriage."""
    echo(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r\n", "\n").replace("\r", "\n"), nl=False)


def show_tracebacks(wanted: bool) -> None:
    """Whether `debug` prints."""
    _State.debug = wanted


def debug(error: BaseException) -> None:
    """Print where an error came from, if that was asked for."""
    if _State.debug:
        echo("".join(traceback.format_exception(error)), err=True)


def _mute(stream: TextIO) -> None:
    """Let what is still to be written, also as the program ends, go nowhere."""
    with suppress(OSError), open(os.devnull, "wb") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), stream.fileno())


def _plain(error: UnicodeError) -> tuple[str, int]:
    """What is written for characters that the terminal's encoding does not have."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end].translate(PLAIN)
    return text.encode("ascii", "backslashreplace").decode(), error.end


codecs.register_error("plain", _plain)


def open_streams() -> None:
    """Make stdin, stdout and stderr fit for use: those that were closed lead nowhere, and no character fails.

    A closed one would be None, and its number that of the next file that is opened.
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
            with suppress(OSError):  # some of it was read
                stream.reconfigure(encoding="utf-8")  # of an experiment file, whatever the terminal's is


def name_files_in_utf_8() -> None:
    """Begin the program again where the locale has file names in another encoding: pyarrow has them in UTF-8 always."""
    if sys.getfilesystemencoding() != "utf-8":
        os.environ["PYTHONUTF8"] = "1"
        os.environ.setdefault("PYTHONIOENCODING", sys.stdout.encoding if sys.stdout else "utf-8")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def find_home() -> None:
    """Give the process a home folder where the system knows of none, as for a container's made-up user: Ray asks."""
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = tempfile.gettempdir()


# ------------------------------------------------------------------------------------------ signals


def if_interrupted(advice: str) -> None:
    """What is kept, and how to go on, if the program is told to end from now on."""
    _State.advice = advice


def say_interrupted() -> None:
    """Say that the program was told to end, and what was to be said then."""
    echo(f"\nInterrupted. {_State.advice}".rstrip(), err=True)


def listen(force: bool = False) -> None:
    """Let the first of `SIGNALS` raise `Interrupted` in the main thread, and another one later end at once.

    A signal that this process was begun to ignore, as with nohup or in the background, stays ignored.

    Args:
        force: listen to Ctrl-C even so.
    """
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN or (force and number == signal.SIGINT):
                signal.signal(number, _told)


def _told(number: int, frame: FrameType | None) -> None:
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
    """Whether something is being imported: an exception in the midst of that makes torch abort, others fail oddly."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _tell_again(number: int) -> None:
    _State.again += 1
    os.kill(os.getpid(), number)


def _end_at_once(number: int) -> None:
    cursor = "\x1b[?25h" if os.isatty(2) else ""  # bars hide it
    text = f"{cursor}\nEnded at once. {visible(_State.advice)}".rstrip()
    with suppress(OSError):  # not by the stream, which may be in the midst of writing
        os.write(2, f"{text}\n".encode("ascii", "plain"))
    for process in multiprocessing.active_children():  # those begun `alone`
        process.terminate()
    os._exit(128 + number)


@contextmanager
def session() -> Iterator[None]:
    """A command's time on the terminal: with streams that can be used, and signals that end it in order."""
    _State.advice, _State.asked, _State.ending = "", None, False
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
