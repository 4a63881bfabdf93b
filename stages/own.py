"""Import the user's own code, named by an arch, and report its errors.

Installed modules take precedence over the user's folder: a file such as ``random.py`` there shadows nothing. If an
installed module hides the user's, the error says so.
"""

import hashlib
import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

from stages.errors import BadData, BadInput, did_you_mean

LONGEST = 300
"""Most characters of a message that are quoted."""


def find(arch: str, here: Path) -> Any:
    """Import the object that an arch names.

    Args:
        arch: ``package.module:name``, or ``./folder/file.py:name`` with a path relative to `here`.
        here: the user's folder, searched after installed modules.

    Raises:
        BadInput: the module, file or name does not exist, or cannot be imported.
    """
    where, _, name = arch.rpartition(":")
    if not name or not where or not (is_file(where) or all(where.split("."))):
        raise BadInput(f"arch {arch} names no code, expected `package.module:name` or `./folder/file.py:name`")
    _forget_changed(arch, here)
    with guarded(arch, "cannot be imported", here):
        module = _from_file(where, here) if is_file(where) else _by_name(where, here)
        if not hasattr(module, name):
            raise _Refused(f"{where} has no {name!r}{did_you_mean(name, dir(module))}")
        return getattr(module, name)


_read: dict[str, str] = {}
"""File of the user's → digest of its content when this process last imported it."""


def _forget_changed(arch: str, here: Path) -> None:
    """Have modules imported anew if one of their files has changed since: a notebook's process outlives an edit."""
    from stages import imports  # it imports this module

    now = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in imports.sources(arch, here).values()}
    if any(_read.get(file, content) != content for file, content in now.items()):
        for name, module in list(sys.modules.items()):
            if getattr(module, "__file__", None) in now:
                del sys.modules[name]
    _read.update(now)


def is_file(where: str) -> bool:
    """Whether the part of an arch before the colon is the path of a file."""
    return where.endswith(".py") or "/" in where


class _Refused(Exception):
    """The reason part of a message about an arch."""


@contextmanager
def guarded(arch: str, failing: str, here: Path | None = None) -> Iterator[None]:
    """Run user code: turn its exceptions into messages, and redirect its output to standard error.

    Args:
        arch: the name of the code.
        failing: the predicate of the message, such as ``cannot be imported``.
        here: the user's folder.

    Raises:
        BadInput: the code raised an exception or exited.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (BadInput, BadData, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit too
        raise BadInput(f"arch {arch} {failing}: {_said(error, arch, here)}") from error


def _reach(*folders: Path) -> None:
    """Append folders to the module search path, after everything installed."""
    sys.path += [name for name in dict.fromkeys(map(str, folders)) if name not in sys.path]
    importlib.invalidate_caches()  # files may be newer than the cached folder listing


# --------------------------------------------------------------------------------- a module by its name


def _by_name(where: str, here: Path) -> ModuleType:
    _reach(here)
    meant = _file_of(where, here)
    module: ModuleType | None = None
    try:
        module = importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{where}.".startswith(f"{error.name}."):
            raise  # the module exists; one of its own imports does not
        if meant is None:
            raise _Refused(f"there is no module {where}, neither installed nor in the current folder") from error
        module = sys.modules.get(where.partition(".")[0])
    if meant is not None and not _is_read_from(meant, module):
        file = meant.relative_to(here).as_posix()
        raise _Refused(f"{_installed(module)} is installed and comes before {file}: name the file, `./{file}:…`")
    assert module is not None
    return module


def _file_of(where: str, folder: Path) -> Path | None:
    """The file of a module in a folder."""
    path = folder.joinpath(*where.split("."))
    return next((file for file in (path.with_name(f"{path.name}.py"), path / "__init__.py") if file.is_file()), None)


def _is_read_from(file: Path, module: ModuleType | None) -> bool:
    """Whether a module was loaded from this file, or from another with the same content, such as an installed copy."""
    found = Path(getattr(module, "__file__", None) or "")
    return found.is_file() and (found.samefile(file) or found.read_bytes() == file.read_bytes())


def _installed(module: ModuleType | None) -> str:
    return str(getattr(module, "__file__", None) or f"Python's own {getattr(module, '__name__', 'module')}")


# --------------------------------------------------------------------------------- a module by its file


def _from_file(where: str, here: Path) -> ModuleType:
    """Import a file as a module. It may import its neighbours, relatively too, whether or not they form a package."""
    path = (here / Path(where).expanduser()).resolve()
    if path.suffix != ".py":
        raise _Refused(f"{where} is no Python file (.py)")
    if not path.is_file():
        raise _Refused(f"there is no file {where} in the current folder")
    top, packages = path.parent, list[str]()
    while (top / "__init__.py").is_file() and top != top.parent:
        top, packages = top.parent, [top.name, *packages]
    parent = ".".join([_root(top), *packages])
    _reach(path.parent, top, here)
    package = importlib.import_module(parent)
    if path.name == "__init__.py":
        return package
    name = f"{parent}.{path.stem.replace('.', '_')}"
    return sys.modules.get(name) or _execute(name, path)


def _root(folder: Path) -> str:
    """An empty package for a folder, so that its module names clash with no others."""
    name = f"notbugs_own_{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"
    if name not in sys.modules:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(folder)]
    return name


def _execute(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


# --------------------------------------------------------------------------------------- error messages


def _said(error: BaseException, arch: str, here: Path | None) -> str:
    """The place in the user's files, and the error."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_theirs(frame.filename, arch)]
    place = placed(frames[-1].filename, frames[-1].lineno) if frames else ""
    line = frames[-1].line if frames else ""
    match error:
        case _Refused():
            return str(error)
        case SyntaxError(filename=str(file), lineno=int(number)) if Path(file).is_file():
            return f"{placed(file, number)}: {error.msg}"
        case SystemExit(code=code):
            what = "it ends the program" + (f" ({code})" if code is not None else "")
        case KeyError():
            what = f"there is no key {error}"
        case OSError(strerror=str(reason)):
            what = reason + (f": {error.filename}" if error.filename else "")
        case _:
            what = _text(error) or (f"fails at `{line}`" if line else "it fails, and does not say why")
    return f"{f'{place}: ' if place else ''}{what}{_hidden(error, here)}"


def _text(error: BaseException) -> str:
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # noqa: BLE001 - the user's exception class may fail itself
        lines = []
    return lines[0][:LONGEST] if lines else ""


def placed(file: str, line: int | None) -> str:
    """File and line, relative to the working directory if possible."""
    path, current = Path(file), Path.cwd()
    return f"{path.relative_to(current) if path.is_relative_to(current) else path} line {line}"


def is_theirs(file: str, arch: str) -> bool:
    """Whether a file in a traceback is the user's: not ours, Python's or an installed package's."""
    path = Path(file)
    if file.startswith("<") or path.is_relative_to(Path(__file__).parent):
        return False
    if arch.partition(".")[0].partition(":")[0] in path.with_suffix("").parts:
        return True
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return not installed and not path.is_relative_to(sysconfig.get_path("stdlib"))


def _hidden(error: BaseException, here: Path | None) -> str:
    """A hint if the missing name is in a file of the user's that an installed module hides."""
    module = getattr(error, "obj", None)
    name = module.__name__ if isinstance(module, ModuleType) else getattr(error, "name", None)
    if here is None or not isinstance(name, str) or not isinstance(error, ImportError | AttributeError):
        return ""
    meant, installed = _file_of(name, here), sys.modules.get(name.partition(".")[0])
    if meant is None or installed is None or _is_read_from(meant, sys.modules.get(name)):
        return ""
    return (
        f" ({_installed(installed)} is installed and comes before {meant.relative_to(here)}: give that another "
        "name, or import it relatively)"
    )
