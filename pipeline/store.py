"""The store: files below one root, on any pyarrow filesystem.

Only this module knows whether the root is a local folder or an object store. A file appears whole or not at all;
commit marks and manifests decide which files belong to a dataset (`artifacts`).
"""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeVar

from pyarrow import fs

from stages import remote
from stages.errors import BadData, BadInput
from stages.recipes import refuse_secrets

PARTIAL = ".partial"
"""Folder for files being written, on the same filesystem as their final place."""

ASIDE = ".aside"
"""Folder for obstacles: a folder where a file belongs, a record that cannot be read."""

READERS = 16

ONE_PUT = 10_000_000
"""Bytes up to which pyarrow uploads a file to S3 in one request; a larger file is a multipart upload."""

REREADS = 5
"""Attempts to read a JSON file on an object store that arrives truncated."""

SEAL = "seal"
"""Key of a JSON document whose value is the digest of all other keys."""

LARGEST_JSON = 256 * 2**20
"""Most bytes of a JSON document; the manifest of a hundred thousand shards has 30 million."""

ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""Errors which mean that there is no such file."""

T = TypeVar("T")
R = TypeVar("R")


def at_once(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Do some reading for every item, several at a time."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(work, items))


class Stat(NamedTuple):
    """Size of a file, and when it was last written, in seconds since 1970."""

    bytes: int
    modified: float


def digest(content: bytes) -> str:
    """sha256, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def canonical(value: Any) -> bytes:
    """JSON in a canonical form: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def seal(path: str, value: Mapping[str, Any]) -> str:
    """Digest of a JSON document and its path: it breaks if a bit changes, or if the document is moved."""
    return digest(path.encode() + b"\n" + canonical(value))


def unsealed(path: str, content: bytes) -> dict[str, Any] | None:
    """The document that was written at a path; None if its seal is broken."""
    try:
        value = json.loads(content) if len(content) <= LARGEST_JSON else None
        if not isinstance(value, dict) or value.pop(SEAL, None) != seal(path, value):
            return None
    except (ValueError, RecursionError):
        return None
    return value


class Store:
    """Files by their path below one root: a folder, ``s3://bucket/prefix`` or ``gs://bucket/prefix``.

    As in pyarrow, keys and endpoint of an object store come from the environment, a configuration file or the
    machine's role; only the URL is sent to other processes. Requests are retried while the store is unavailable. Any
    method may raise:

    - `BadInput` if a retry would not help: no such bucket, keys refused, disk full;
    - `ConnectionError` if the store was unavailable for longer than `remote.PATIENCE`.

    Attributes:
        url: the root.
        retries: number of retries by this object in this process.
    """

    def __init__(self, url: str) -> None:
        try:
            refuse_secrets(url)
        except ValueError as error:
            raise BadInput(f"--store: {error}") from error
        self.url = url if "://" in url else os.path.abspath(os.path.expanduser(url))  # noqa: PTH100, PTH111
        self._begin(met=False)

    def _begin(self, met: bool) -> None:
        self.retries, self._counting, self._met = 0, Lock(), met

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.url = state["url"]
        self._begin(met=True)  # the sender reached it: if it is unavailable now, it will be back

    @property
    def local(self) -> bool:
        return "://" not in self.url or self.url.startswith("file://")

    def at(self, path: str) -> str:
        """The path as a user would write it."""
        return f"{self.url.rstrip('/')}/{path}"

    def read(self, path: str, first: int | None = None, offset: int = 0) -> bytes:
        """A whole file, or a part of it: `first` bytes, fewer where it ends, from an offset on.

        Raises:
            FileNotFoundError: there is no such file.
            IsADirectoryError: the path is not a regular file.
        """

        def read(filesystem: fs.FileSystem, root: str) -> bytes:
            place = _below(root, path)
            if self.local and not stat.S_ISREG(Path(place).stat().st_mode):  # reading a pipe would never end
                raise IsADirectoryError(f"{place} is no file")
            # Not an input stream, which requests 256 KiB at a time from S3.
            with filesystem.open_input_file(place) as file:
                left = max(0, file.size() - offset)
                size = left if first is None else min(first, left)
                content: bytes = file.read_at(size, offset)
                if len(content) != size:
                    raise OSError(f"only {len(content)} of {size} bytes arrived")
            return content

        return self._ask(f"reading {path}", read)

    def find(self, path: str, first: int | None = None) -> bytes | None:
        """A whole file, or only its first bytes; None if there is no such file."""
        try:
            return self.read(path, first)
        except ABSENT:
            return None

    def find_json(self, path: str) -> dict[str, Any] | None:
        """A document that `put_json` wrote; None if there is none, or if its seal is broken.

        pyarrow requests a file's size, then that many bytes: if the file is replaced by a longer one in between, it
        arrives truncated. So a document with a broken seal is read again.
        """
        for _ in range(1 if self.local else REREADS):
            content = self.find(path, LARGEST_JSON + 1)
            if content is None:
                return None
            if (value := unsealed(path, content)) is not None:
                return value
        return None

    def find_all(self, paths: Iterable[str]) -> dict[str, bytes | None]:
        """Several files, read concurrently; None for each that is missing."""
        names = list(paths)
        return dict(zip(names, at_once(self.find, names), strict=True))

    def files(self, folder: str, recursive: bool = False) -> dict[str, int]:
        """Paths of the files below a folder, relative to it → bytes; empty if there is no such folder.

        An object store takes one request per 1,000 files.
        """
        return {path: found.bytes for path, found in self.stats(folder, recursive).items()}

    def stats(self, folder: str, recursive: bool = False) -> dict[str, Stat]:
        """As `files`, with the time of each file."""
        base, infos = self._list(folder, recursive)
        found = (info for info in infos if info.type == fs.FileType.File)
        return {info.path.removeprefix(base): Stat(info.size, (info.mtime_ns or 0) / 1e9) for info in found}

    def exists(self, path: str) -> bool:
        """Whether there is a file or a folder at a path."""

        def look(filesystem: fs.FileSystem, root: str) -> bool:
            return bool(filesystem.get_file_info(_below(root, path)).type != fs.FileType.NotFound)

        return self._ask(f"looking for {path}", look)

    def folders(self, folder: str) -> list[str]:
        """Names of the folders directly in a folder, sorted."""
        _, infos = self._list(folder)
        return sorted(info.base_name for info in infos if info.type == fs.FileType.Directory)

    def _list(self, folder: str, recursive: bool = False) -> tuple[str, list[fs.FileInfo]]:
        def listing(filesystem: fs.FileSystem, root: str) -> tuple[str, list[fs.FileInfo]]:
            full = _below(root, folder)
            selector = fs.FileSelector(full, allow_not_found=True, recursive=recursive)
            return full.rstrip("/") + "/", list(filesystem.get_file_info(selector))

        try:
            return self._ask(f"listing {folder}", listing)
        except NotADirectoryError:
            return "", []

    def put(self, path: str, content: bytes) -> None:
        """Write a file atomically: a reader sees all of it, or the previous file.

        Locally, a file in `PARTIAL` is written, its size is checked, and it is renamed. On an object store it is one
        upload, which the store verifies against its length and checksum.

        Raises:
            BadData: the file was not written completely.
        """
        if self.local:
            self._ask(f"writing {path}", lambda filesystem, root: self._put_beside(filesystem, root, path, content))
        else:
            self._ask(f"writing {path}", lambda _, root: _upload(self.url, _below(root, path), content))

    def _put_beside(self, filesystem: fs.FileSystem, root: str, path: str, content: bytes) -> None:
        final, beside = self._cleared(root, path), self._cleared(root, f"{PARTIAL}/{uuid.uuid4().hex}")
        for folder in {os.path.dirname(beside), os.path.dirname(final)}:  # noqa: PTH120
            filesystem.create_dir(folder)
        try:
            with filesystem.open_output_stream(beside, compression=None) as file:
                file.write(content)
            if filesystem.get_file_info(beside).size != len(content):
                raise BadData(f"{self.at(path)} was not written whole: is the disk full?")
            filesystem.move(beside, final)
        except BaseException:
            Path(beside).unlink(missing_ok=True)  # on a full disk, half a shard would take the space of the next
            raise

    def put_and_read_back(self, path: str, content: bytes) -> None:
        """Write a file as `put` does, and read it back.

        Raises:
            BadData: it reads back with other bytes.
        """
        self.put(path, content)
        if self.read(path) != content:
            raise BadData(f"{self.at(path)} reads back with other bytes than were written")

    def put_json(self, path: str, value: Mapping[str, Any]) -> bytes:
        """Write a document as readable JSON with its `seal`; return the bytes."""
        text = re.sub("[\ud800-\udfff]", lambda half: f"\\\\u{ord(half[0]):04x}", json.dumps(value, ensure_ascii=False))
        plain = json.loads(text)
        content = json.dumps({**plain, SEAL: seal(path, plain)}, indent=1, ensure_ascii=False).encode() + b"\n"
        self.put(path, content)
        return content

    def _cleared(self, root: str, path: str) -> str:
        """The local path of a file to be written or removed, cleared of obstacles.

        A folder in place of the file, or a file in place of one of its folders, is moved to `ASIDE`.

        Raises:
            BadInput: a symbolic link leads out of the store.
        """
        final = Path(_below(root, path))
        if not final.parent.resolve().is_relative_to(Path(root).resolve()):
            raise BadInput(f"{final}: a symbolic link leads out of the store {self.url}; nothing is written through it")
        between = list(final.relative_to(root).parents)[-2::-1]
        in_the_way = [folder for name in between if (folder := root / name).exists() and not folder.is_dir()]
        if final.is_dir() and not final.is_symlink():
            in_the_way.append(final)
        for obstacle in in_the_way:
            aside = Path(root, ASIDE, f"{uuid.uuid4().hex}-{obstacle.name}")
            aside.parent.mkdir(exist_ok=True)
            obstacle.rename(aside)
        return str(final)

    def set_aside(self, path: str) -> str:
        """Move a file to `ASIDE` for inspection; return its new path."""
        aside = f"{ASIDE}/{uuid.uuid4().hex}-{path.replace('/', '-')}"
        content = self.find(path)
        if content is not None:
            self.put(aside, content)
        self.delete(path)
        return aside

    def delete(self, path: str) -> None:
        """Remove a file if it exists."""

        def remove(filesystem: fs.FileSystem, root: str) -> None:
            filesystem.delete_file(self._cleared(root, path) if self.local else _below(root, path))

        try:
            self._ask(f"deleting {path}", remove)
        except ABSENT:
            return

    def delete_folder(self, folder: str) -> None:
        """Remove a folder with everything in it, if it exists. A symbolic link in it is removed, not followed.

        Raises:
            BadInput: the folder is a symbolic link, or one leads to it from outside the store.
        """

        def remove(filesystem: fs.FileSystem, root: str) -> None:
            if not self.local:
                filesystem.delete_dir(_below(root, folder))
                return
            place = Path(_below(root, folder))
            if place.is_symlink() or not place.parent.resolve().is_relative_to(Path(root).resolve()):
                raise BadInput(f"{place}: is reached through a symbolic link; remove it by hand")
            shutil.rmtree(place)

        try:
            self._ask(f"deleting {folder}", remove)
        except ABSENT:
            return

    def refuse_unless_writable(self) -> None:
        """Raises:
        BadInput: the store is not writable.
        """
        probe = f".probe-{uuid.uuid4().hex}"
        try:
            self.put(probe, b"")
            self.delete(probe)
        except OSError as error:
            raise BadInput(f"the store {self.url} cannot be written: {remote.said(error)}") from error

    def sweep(self, older_than: float) -> None:
        """Remove partial files of killed writers that are older than a time (seconds since 1970)."""
        if self.local:
            _, root = remote.connect(self.url)
            partial = Path(_below(root, PARTIAL))
            for file in [] if partial.is_symlink() else partial.glob("*"):
                try:
                    if file.is_file() and file.stat().st_mtime < older_than:
                        file.unlink()
                except FileNotFoundError:
                    continue  # its writer, or another sweep, was first

    def tidy(self) -> None:
        """Remove the folder of partial files if it is empty: a place for people should hold nothing else."""
        if self.local:
            with suppress(OSError):  # not empty: another writer is at work
                Path(_below(remote.connect(self.url)[1], PARTIAL)).rmdir()

    # ------------------------------------------------------------------------------------------- retries

    def _ask(self, doing: str, work: Callable[[fs.FileSystem, str], T]) -> T:
        """Do some work on the filesystem and root of the store, with retries."""
        if not self._met:
            self._meet()
        try:
            return self._retry(work, remote.PATIENCE)
        except ABSENT:
            raise
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise BadInput(
                    f"the store {self.url}: {doing} is not permitted ({os.strerror(error.errno)}); check its owner and "
                    "permissions"
                ) from error
            if self.local:
                raise
            raise ConnectionError(
                f"the store {self.url} was unavailable for {remote.PATIENCE:.0f} s, {doing}: {remote.said(error)}; "
                "when it is back, resume"
            ) from error

    def _meet(self) -> None:
        """List the root before the first request, and fail fast, so that a mistyped URL is reported at once.

        A listing, because its refusal states the reason; that of a HEAD request, with which pyarrow begins to read, has
        no body. And without it, a missing bucket lists and reads like an empty one.
        """
        try:
            self._retry(self._greet, remote.FIRST_PATIENCE)
        except BadInput:
            raise
        except (OSError, ValueError) as error:
            self._refuse(error)
            check = "; check the URL and the network" if isinstance(error, OSError) else ""
            raise BadInput(
                f"the store {self.url} cannot be reached{remote.host(self.url)}: {remote.said(error)}{check}"
            ) from error
        self._met = True

    def _greet(self, filesystem: fs.FileSystem, root: str) -> None:
        if self.local:
            return
        if not root:
            raise BadInput(f"--store {self.url}: names no bucket, expected for example {self.url}bucket/folder")
        try:
            filesystem.get_file_info(fs.FileSelector(root))
        except FileNotFoundError as error:
            if "Status(NOT_FOUND" in str(error):  # Google's answer for a missing bucket
                raise

    def _retry(self, work: Callable[[fs.FileSystem, str], T], patience: float) -> T:
        return remote.retry(
            lambda: work(*remote.connect(self.url)), 0 if self.local else patience, self._refuse, self._count
        )

    def _count(self) -> None:
        with self._counting:
            self.retries += 1

    def _refuse(self, error: Exception) -> None:
        """Raises:
        BadInput: a retry would not help.
        """
        sentence = remote.refusal(self.url, error)
        if sentence is None:
            return
        if self._met and "No response body" in str(error):
            self._met = False
            self._meet()
        raise BadInput(sentence) from error


def _upload(url: str, path: str, content: bytes) -> None:
    filesystem, _ = remote.connect(url, in_parts=len(content) > ONE_PUT)
    # Not in a with statement: that closes, and so publishes, a file that an exception left half-written.
    stream = filesystem.open_output_stream(path, compression=None)
    stream.write(content)
    stream.close()


def _below(root: str, path: str) -> str:
    """The full path of a file in the store.

    Raises:
        BadData: the path leads out of the root.
    """
    if path and any(part in ("", ".", "..") for part in path.split("/")):
        raise BadData(f"{path!r} is no path in a store")
    return f"{root.rstrip('/')}/{path}" if path else root
