"""Files that a pattern names: braces, and wildcards where a folder can be listed."""

import glob
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import unquote

from stages.errors import BadInput
from stages.load.files import below, list_objects
from stages.load.listing import is_hidden


def expand(pattern: str, data: Path) -> list[str]:
    """The paths, below `data`, and the URLs that braces stand for.

    Raises:
        BadInput: the braces do not close.
    """
    from braceexpand import braceexpand

    try:
        found = list(braceexpand(pattern))
    except ValueError as error:
        raise BadInput(f"{pattern} has braces that do not close") from error
    return [one if "://" in one else str(data / one) for one in found]


def matches(pattern: str, data: Path) -> list[str]:
    """The same with wildcards: ``*`` and ``[0-9]`` stand for letters of one name, on disk and in object stores.

    Raises:
        BadInput: no file matches, or a web server would have to be listed.
        ConnectionError: the store is unavailable.
    """
    found = list[str]()
    for one in expand(pattern, data):
        place = one.partition("?")[0] if "://" in one else one
        some = _matching(one) if "*" in place or "[" in place else [one]
        if not some:
            raise BadInput(f"{one}: there is no such file")
        found += some
    return found


def _matching(pattern: str) -> list[str]:
    if "://" not in pattern:
        return [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern))  # noqa: PTH207 - absolute patterns
    place, mark, query = pattern.partition("?")
    folders = place.split("/")
    first = next(at for at, part in enumerate(folders) if "*" in part or "[" in part)
    folder, wanted = f"{'/'.join(folders[:first])}/{mark}{query}", [unquote(part) for part in folders[first:]]
    names = (name for name in list_objects(folder) if not is_hidden(name))
    return sorted(below(folder, name) for name in names if _fits(name.split("/"), wanted))


def _fits(parts: list[str], wanted: list[str]) -> bool:
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))
