"""Make a file given by path or URL available on this machine."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path, PurePosixPath
from stat import S_ISDIR, S_ISREG
from tempfile import TemporaryDirectory
from typing import BinaryIO
from urllib.parse import unquote

from stages import remote, web
from stages.errors import BadData, BadInput, hint_here
from stages.load.files import CHUNK, STORES, open_file

MOST = 16 * 2**30
"""Most bytes of a file."""

SCHEMES = ("file://", "http://", "https://", "s3://", "gs://", "package://PACKAGE/FILE")

PACKAGE = "package://"
"""Scheme of a file inside an installed Python package: ``package://PACKAGE/FILE``."""

WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")


def scheme_of(place: str) -> str:
    """The scheme of a URL (``http``, ``s3``, ``file``, …); empty for a path."""
    return place.partition("://")[0].lower() if "://" in place else ""


def is_elsewhere(place: str) -> bool:
    """Whether a file has to be fetched from another machine."""
    return scheme_of(place) not in ("", "file", "package")


def local(place: str, data: Path) -> Path | None:
    """The path of a file that is not fetched from elsewhere; None if it is, or if its place is none."""
    try:
        return None if is_elsewhere(place) else _here(place, data)
    except BadData:
        return None


@contextmanager
def fetched(place: str, data: Path) -> Iterator[Path]:
    """The local path of a file, given as a path below `data`, ``package://PACKAGE/FILE``, or a URL.

    A file from a URL is deleted when the context ends.

    Raises:
        BadData: it cannot be read; the message starts with a verb.
    """
    if not is_elsewhere(place):
        path = _here(place, data)
        _refuse_unless_file(path, place)
        yield path
        return
    with TemporaryDirectory(prefix="notbugs-") as folder:
        path = Path(folder) / "fetched"
        with path.open("wb") as out:
            _download(place, out)
        yield path


def _here(place: str, data: Path) -> Path:
    match scheme_of(place):
        case "package":
            return _in_package(place[len(PACKAGE) :])
        case "file":
            path = unquote(place[len("file://") :]).removeprefix("localhost")
            if not path.startswith("/"):
                raise BadData("cannot be read: a file:// URL has three slashes before the path, file:///folder/file")
            return Path(path)
    try:
        return data / Path(place).expanduser()
    except RuntimeError as error:
        raise BadData("cannot be read: the home folder behind ~ is unknown here") from error


def _in_package(place: str) -> Path:
    """Find the file without running the package's code, as `importlib.resources` would."""
    package, _, file = place.partition("/")
    top, *folders = package.split(".")
    if not all(part.isidentifier() for part in (top, *folders)) or ".." in PurePosixPath(file).parts:
        raise BadData(f"cannot be read: expected {PACKAGE}PACKAGE/FILE, a file inside of the package")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise BadData(f"cannot be read: the Python package {top} is not installed here; install it")
    found = [Path(folder, *folders) / file.lstrip("/") for folder in spec.submodule_search_locations or ()]
    if not found:
        raise BadData(f"cannot be read: {top} is a module of one file, no package that holds others")
    return next((path for path in found if path.exists()), found[0])


def _refuse_unless_file(path: Path, place: str) -> None:
    """Refuse anything but a regular file before opening it: opening a named pipe blocks until someone writes."""
    try:
        kind = path.stat()
        with path.open("rb") if S_ISREG(kind.st_mode) else nullcontext():
            pass
    except OSError as error:
        where = "" if path == Path(place) else f" ({path})"
        hint = hint_here(place) if isinstance(error, FileNotFoundError) else ""
        raise BadData(f"cannot be read: {error.strerror}{where}{hint}") from error
    except ValueError as error:
        raise BadData("cannot be read: it is not a valid path") from error
    if S_ISDIR(kind.st_mode):
        inside = sorted(file.name for file in path.iterdir() if file.suffix in WEIGHTS)
        raise BadData(f"is a folder: name the file in it{f', such as {inside[0]}' if inside else ''}")
    if not S_ISREG(kind.st_mode):
        raise BadData("is a pipe or a device, not a file: save its content to a file, and name that")
    if kind.st_size > MOST:
        raise BadData(f"has {kind.st_size:,} bytes: more than {MOST:,} are not read")


def _download(place: str, out: BinaryIO) -> None:
    scheme = scheme_of(place)
    if scheme not in ("http", "https", *STORES):
        raise BadData(f"cannot be read: expected a path, or {', '.join(SCHEMES)}")
    try:
        if scheme in STORES:
            _copy(place, out)
        else:
            web.download(place, out, MOST)
    except (BadData, BadInput, ConnectionError) as error:
        raise BadData(str(error).removeprefix(place).strip()) from error
    except FileNotFoundError as error:
        raise BadData("cannot be read: there is no such file") from error
    except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's errors derive from these
        raise BadData(f"cannot be read: {getattr(error, 'strerror', None) or remote.said(error)}") from error


def _copy(place: str, out: BinaryIO) -> None:
    """Copy a file from an object store in large chunks; retry each while the store is unavailable."""
    if not place.partition("?")[0].split("/", 3)[3:] or place.partition("?")[0].endswith("/"):
        raise BadData("cannot be read: it does not name a file, expected for example s3://bucket/folder/file")
    with open_file(place, patient=False) as file:  # fail fast if the URL is mistyped
        while piece := file.read(CHUNK):
            out.write(piece)
            if out.tell() > MOST:
                raise BadData(f"has more than {MOST:,} bytes, which are not read")
