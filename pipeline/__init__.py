"""What exists already, what runs next, and where: experiment file, graph, store, engines, runs, command line."""

import os  # `os` and `sys` alone are Python's own for certain, for they are loaded before the search path counts
import sys

HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
"""The folder that this package lies in."""


def _step_back() -> None:
    """Put the current folder behind what is installed, here and in the processes that this one starts.

    ``python -m`` puts it first, and so does a PYTHONPATH that begins with a colon. A user's ``torch.py`` or ``stages/``
    would then be taken for ours. The folder that this package itself lies in stays where it is.
    """
    try:
        here = os.path.realpath(os.getcwd())  # noqa: PTH109
    except OSError:  # it was deleted: nothing can be imported from it
        return

    def is_here(entry: object) -> bool:
        path = os.path.realpath(str(entry))
        return path == here and path != os.path.realpath(HOME)

    sys.path.sort(key=is_here)
    if "PYTHONPATH" in os.environ:
        entries = os.environ["PYTHONPATH"].split(os.pathsep)
        os.environ["PYTHONPATH"] = os.pathsep.join(entry for entry in entries if not is_here(entry))


def _bind() -> None:
    """Import the `stages` that lies beside this package, and no other of that name."""
    if os.path.isdir(os.path.join(HOME, "stages")):  # noqa: PTH112, PTH118 - in a job, Ray unpacks it elsewhere
        sys.path.insert(0, HOME)
        try:
            __import__("stages")
        finally:
            sys.path.remove(HOME)


_step_back()
_bind()
