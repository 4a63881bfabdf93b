"""Errors, and the wording of their messages."""

import difflib
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path

LONGEST = 60
"""Most characters of a value that a message quotes."""


class BadInput(ValueError):
    """The request is invalid; the message is one sentence for the user.

    Nothing has been written, and a retry will not help.
    """


class TooLarge(BadInput):
    """A batch does not fit into a GPU's memory."""


class BadData(RuntimeError):
    """Data is invalid: damaged, undecodable or of the wrong shape."""


def short(text: str, most: int = LONGEST) -> str:
    """A text, truncated for a message."""
    return text if len(text) <= most else text[: most - 1] + "…"


def shown(value: object) -> str:
    """A value for a message: its truncated repr, or "a mapping"."""
    return "a mapping" if isinstance(value, dict) else short(_brief.repr(value))


def some(names: Sequence[str], most: int = 10) -> str:
    """The first few names for a message, with an ellipsis in place of two or more others."""
    few = names if len(names) <= most + 1 else names[:most]
    return ", ".join(map(short, few)) + (", …" if len(few) < len(names) else "")


_brief = reprlib.Repr()
_brief.maxstring = _brief.maxlong = _brief.maxother = LONGEST
_brief.maxlist = LONGEST // 3


def nearest(name: str, known: Iterable[str], most: int = 1) -> list[str]:
    """The known names that a mistyped one resembles, the nearest first; empty if none is near."""
    return difflib.get_close_matches(name, list(known), most, cutoff=0.5)


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """The end of a sentence about an unknown name: the nearest known one, or else a hint of the caller's."""
    near = nearest(name, known)
    hint = f"did you mean {near[0]!r}?" if near else otherwise
    return f"; {hint}" if hint else ""


def hint_here(place: str) -> str:
    """The end of a sentence about a file or folder that --data lacks: a hint if the current folder has it."""
    return "; it is in the current folder: add `--data .`" if Path(place).exists() else ""
