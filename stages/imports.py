"""The source files of the user's network: its module, and the user's modules that it imports.

They are found by reading, not by running: `import` statements at any place of a file, also in functions, name them.
A module whose name is computed is not found.
"""

import ast
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from stages.own import is_file, is_theirs

OURS = ("stages", "pipeline", "notbugs")
"""Packages whose code the revisions of stages stand for."""


def sources(arch: str, here: Path) -> dict[str, Path]:
    """The files that an arch's network is made from.

    An installed package counts as a library: its files are left out, except those of the module that the arch names.

    Args:
        arch: ``package.module:name``, or ``./folder/file.py:name`` with a path relative to `here`.
        here: the user's folder, searched after installed modules.

    Returns:
        Name → path, sorted. A name is relative to the folder that the import of the arch starts from, so that moving
        that folder changes none. Empty if the module does not exist.
    """
    importlib.invalidate_caches()
    where = arch.rpartition(":")[0]
    if is_file(where):
        first = (here / Path(where).expanduser()).resolve()
        top, found = _top(first), [first] if first.is_file() else []
        places = [first.parent, top, here]
    else:
        places, found = [here], list(_modules([where], [here]))
        top = _top(found[0]) if found else here
    files = _reached(found, places)
    return dict(sorted((Path(os.path.relpath(file, top)).as_posix(), file) for file in files))


def _top(file: Path) -> Path:
    """The folder that holds a file, or the outermost package that the file is in."""
    packages = list(_packages(file))
    return packages[-1].parent.parent if packages else file.parent


def _reached(files: Sequence[Path], places: Sequence[Path]) -> list[Path]:
    """Some files, and the files of the user's that they import, directly or not."""
    found, todo = dict.fromkeys(files), list(files)
    while todo:
        file = todo.pop()
        if is_theirs(str(file), ""):
            new = {one for one in (*_packages(file), *_imported(file, places)) if is_theirs(str(one), "")} - set(found)
            found |= dict.fromkeys(new)
            todo += new
    return list(found)


def _packages(file: Path) -> Iterator[Path]:
    """The ``__init__.py`` of the packages that a file is in: importing it runs them."""
    folder = file.parent
    while (init := folder / "__init__.py").is_file() and folder != folder.parent:
        yield init
        folder = folder.parent


def _imported(file: Path, places: Sequence[Path]) -> Iterator[Path]:
    """The files that the import statements of a file name; of one that is no Python, none."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from _modules([alias.name for alias in node.names], places)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            yield from _modules(names, places)
        elif isinstance(node, ast.ImportFrom):
            base = file.parents[node.level - 1] if node.level <= len(file.parents) else file.parent
            inside = node.module.split(".") if node.module else []
            for parts in (inside, *([*inside, alias.name] for alias in node.names)):
                yield from _below(base, parts)


def _modules(names: Sequence[str], places: Sequence[Path]) -> Iterator[Path]:
    """The files of some modules and of the packages they are in, installed ones first."""
    for name in dict.fromkeys(names):
        first, *rest = name.split(".")
        if first in OURS:
            continue
        for origin, folders in _located(first, places):
            if origin is not None:
                yield origin
            for folder in folders:
                yield from _below(folder, rest)


def _located(name: str, places: Sequence[Path]) -> Iterator[tuple[Path | None, list[Path]]]:
    """File and folders of a top-level module, found without importing it."""
    found = (finder.find_spec(name, None) for finder in sys.meta_path if hasattr(finder, "find_spec"))
    spec = next(filter(None, found), None) or PathFinder.find_spec(name, [str(place) for place in places])
    if spec is not None:
        origin = Path(spec.origin) if spec.has_location and spec.origin else None
        yield origin, [Path(folder) for folder in spec.submodule_search_locations or ()]


def _below(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """The files of a module in a folder and of the packages between."""
    for part in parts:
        folder = folder / part
        module, package = folder.with_name(f"{part}.py"), folder / "__init__.py"
        if module.is_file() and not package.is_file():
            yield module
            return
        if package.is_file():
            yield package
