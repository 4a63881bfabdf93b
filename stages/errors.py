"""What goes wrong, in the user's words."""

import difflib
import reprlib
from collections.abc import Iterable, Sequence

LONGEST = 60
"""Characters of what was got that a sentence repeats."""


class BadInput(ValueError):
    """The request cannot be met as it stands; the message is one sentence for the person who made it.

    Nothing has been written when this is raised, and trying again will not help.
    """


class TooLarge(BadInput):
    """A batch is more than a GPU has memory for."""


class BadData(RuntimeError):
    """Data that was read is not what it should be (damaged, undecodable, of the wrong shape)."""


def short(text: str, most: int = LONGEST) -> str:
    """A text as a sentence repeats it, whatever its length."""
    return text if len(text) <= most else text[: most - 1] + "…"


def shown(value: object) -> str:
    """A value as a sentence repeats it: as Python writes it, a mapping by that word."""
    return "a mapping" if isinstance(value, dict) else short(_brief.repr(value))


def some(names: Sequence[str], most: int = 10) -> str:
    """The first of some names, as a sentence lists them, with an ellipsis if there are more."""
    return ", ".join(map(short, names[:most])) + (", …" if len(names) > most else "")


_brief = reprlib.Repr()
_brief.maxstring = _brief.maxlong = _brief.maxother = LONGEST
_brief.maxlist = LONGEST // 3


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about a name that is none of those known: the nearest, if any is near; else nothing."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""
