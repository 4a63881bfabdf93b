"""What goes wrong, in the user's words."""

import difflib
from collections.abc import Iterable


class BadInput(ValueError):
    """The request cannot be met as it stands; the message is one sentence for the person who made it.

    Nothing has been written when this is raised, and trying again will not help.
    """


class BadData(RuntimeError):
    """Data that was read is not what it should be (damaged, undecodable, of the wrong shape)."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about a name that is none of those known: the nearest, if any is near; else nothing."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""
