"""Image files on disk and in object stores. Reads from tars are merged where that is faster."""

import errno
import hashlib
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import SEEK_SET, BufferedReader, RawIOBase
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote, unquote, urlsplit

from pyarrow import fs

from stages import remote, web
from stages.errors import BadData, BadInput
from stages.images import read_file
from stages.load.listing import Span, printable
from stages.load.rows import Row, by_file, read_rows

T = TypeVar("T")

READERS = 16
"""Tars that are listed concurrently, and spans of tars that are fetched concurrently."""

CHUNK = 8 * 2**20
"""Bytes per request to an object store; a listing holds `READERS` times as much."""

STORES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs")
"""Supported object stores; pyarrow opens others too, each with faults of its own."""

GAP = 64 * 2**10
"""Merge reads whose gap is at most this many bytes: a second request costs more than the wasted bytes, as much as a few
hundred KiB."""


class Files:
    """Image files. Images in tars are prefetched concurrently; each tar in an object store is opened once.

    `contents` holds the sha256 of each file that was fetched.

    A shard's images are randomly distributed over the source's tars, so most need a request of their own. All files of
    a shard stay in memory until it is read; the packed shard takes as much again.
    """

    def __init__(self, refs: Iterable[Any]) -> None:
        refs = list(refs)
        rows = [ref for ref in refs if isinstance(ref, Row)]
        place = {ref: i for i, ref in enumerate(refs) if isinstance(ref, tuple) and not isinstance(ref, Row)}
        self.pool, self.contents = ThreadPoolExecutor(READERS), dict[Any, str]()
        # All tars are opened before any is read, so that no thread waits for a tar that cannot be opened.
        self.tars = {url: self.pool.submit(_reader, url) for url in dict.fromkeys(url for url, _, _ in place)}
        self.coming = dict[Any, Future[Mapping[Any, bytes | Exception | None]]]()
        # In the order of use: images are decoded while others are fetched.
        for spans in sorted(_joined(place), key=lambda spans: min(place[span] for span in spans)):
            self.coming |= dict.fromkeys(spans, self.pool.submit(self._fetch, spans))
        for group in by_file(rows):
            self.coming |= dict.fromkeys(group, self.pool.submit(read_rows, group, open_file))

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *_: Any) -> None:
        self.pool.shutdown(cancel_futures=True)

    def _fetch(self, spans: Sequence[Span]) -> dict[Span, bytes]:
        (url, first, _), (_, last, size) = spans[0], spans[-1]
        content = self.tars[url].result()(first, last + size - first)
        return {span: content[span[1] - first : span[1] - first + span[2]] for span in spans}

    def fetch(self, ref: Any) -> bytes:
        """The bytes of a file.

        Raises:
            BadData: the tar is shorter than when it was listed, or the row has no image.
            OSError: the file cannot be read.
        """
        content = read_file(ref) if isinstance(ref, Path) else self.coming[ref].result()[ref]
        if content is None:
            raise BadData("holds no image")
        if isinstance(content, Exception):
            raise content
        if isinstance(ref, tuple) and not isinstance(ref, Row) and len(content) != ref[2]:
            raise BadData("ends inside the image")
        self.contents[ref] = hashlib.sha256(content).hexdigest()
        return content


def _joined(spans: Iterable[Span]) -> Iterator[list[Span]]:
    """Sorted spans, grouped by the request that fetches them."""
    together = list[Span]()
    for url, offset, size in sorted(spans):
        if together:
            (one, first, _), (_, last, length) = together[0], together[-1]
            if url != one or offset - (last + length) > GAP or offset + size - first > CHUNK:
                yield together
                together = []
        together.append((url, offset, size))
    if together:
        yield together


def place_of(ref: Any) -> str:
    if isinstance(ref, Row):
        return f"{ref.file}: row {ref.row} of row group {ref.group}"
    return ref[0] if isinstance(ref, tuple) else printable("/".join(ref.parts[-2:]))


def local_path(url: str) -> Path | None:
    """The path of a local file, from a path or URL; None for a remote file."""
    if "://" not in url:
        return Path(url)
    parts = urlsplit(url)
    return Path(unquote(parts.path)) if parts.scheme == "file" and parts.netloc in ("", "localhost") else None


def open_file(url: str, patient: bool = True, buffer: int | None = None) -> BinaryIO:
    """Open a file, by default for sequential reading.

    Args:
        url: path or URL.
        patient: as for `_Remote`.
        buffer: least bytes of a request, `CHUNK` by default.
    """
    path = local_path(url)
    return _open(path) if path else BufferedReader(_Remote(url, patient), buffer or CHUNK)


def _open(path: Path) -> BinaryIO:
    """Open a regular file; refuse a pipe, whose opening might block, and a device, which may never end.

    Raises:
        OSError: the file cannot be opened.
    """
    if stat.S_ISREG(path.stat().st_mode) or path.is_dir():  # opening a folder raises the right error
        return path.open("rb")
    raise OSError(errno.EINVAL, "it is no file", str(path))


def _reader(url: str) -> Callable[[int, int], bytes]:
    """A thread-safe function that reads a number of bytes at an offset."""
    path = local_path(url)
    if path is None:
        return _Remote(url).read_at

    def read_at(offset: int, size: int) -> bytes:
        with path.open("rb") as file:  # not kept open: a shard's images may lie in more tars than file descriptors
            file.seek(offset)
            return file.read(size)

    return read_at


def _connect(url: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of an object store, one for all files of a bucket, and the path in it that a URL names.

    Raises:
        BadInput: the URL has another scheme.
    """
    parts = urlsplit(url)
    if parts.scheme not in STORES:
        known = ", ".join(f"{scheme}://" for scheme in (*STORES, *web.SCHEMES))
        raise BadInput(f"{url} is no URL that is read ({known}): fetch the file, and name its path")
    query = f"?{parts.query}" if parts.query else ""
    filesystem, root = remote.connect(f"{parts.scheme}://{parts.netloc}/{query}")
    return filesystem, f"{root.rstrip('/')}/{unquote(parts.path).lstrip('/')}"


def _patiently(url: str, work: Callable[[], T], patient: bool = True) -> T:
    """Retry a request about a URL while its server is unavailable.

    Raises:
        FileNotFoundError: nothing is there.
        BadInput: a retry would not help.
        ConnectionError: every retry failed.
    """

    said = web.why if urlsplit(url).scheme in web.SCHEMES else remote.said

    def refuse(error: Exception) -> None:
        if sentence := remote.refusal(url, error, remote.FILE):
            raise BadInput(sentence) from error
        if said is web.why:
            web.refuse(error)

    try:
        return remote.retry(work, remote.PATIENCE if patient else remote.FIRST_PATIENCE, refuse)
    except FileNotFoundError:
        raise
    except BadData as error:
        raise BadInput(f"{url} {error}") from error
    except OSError as error:
        raise ConnectionError(f"{url} cannot be read: {said(error)}") from error


def list_objects(url: str, recursive: bool = True) -> dict[str, fs.FileInfo]:
    """The files in a folder of an object store, by their path in it; one request per 1,000 files.

    Raises:
        BadInput: the store refuses.
        ConnectionError: the store is unavailable.
    """

    if urlsplit(url).scheme in web.SCHEMES:
        raise BadInput(f"{url}: a web server lists no files; name them with braces, as train-{{00000..00003}}.parquet")

    def listing() -> tuple[str, list[fs.FileInfo]]:
        filesystem, folder = _connect(url)
        folder = folder.rstrip("/")
        return folder, filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True, recursive=recursive))

    try:
        folder, found = _patiently(url, listing, patient=False)
    except BadInput:
        raise
    except ValueError as error:
        raise BadInput(f"{url} is no place that can be read: {str(error).splitlines()[0]}") from error
    return {info.path[len(folder) + 1 :]: info for info in found if info.type == fs.FileType.File}


def below(url: str, path: str) -> str:
    """The URL of a file, or of a folder, by its path below a folder's URL."""
    place, mark, query = url.partition("?")
    return f"{place.rstrip('/')}/{quote(path)}{mark}{query}"


class _Remote(RawIOBase):
    """A file in an object store as a Python file, with retries while the store is unavailable.

    Args:
        url: the file's URL.
        patient: retry the opening for `remote.PATIENCE`, not only for `remote.FIRST_PATIENCE`.

    Raises:
        FileNotFoundError: the file does not exist.
        ConnectionError: every retry failed; any method may raise it.
    """

    def __init__(self, url: str, patient: bool = True) -> None:
        super().__init__()
        self.url = url
        self.file = self._retry(self._opened, patient)

    def _opened(self) -> Any:
        if urlsplit(self.url).scheme in web.SCHEMES:
            return web.Ranged(self.url)
        filesystem, path = _connect(self.url)
        return filesystem.open_input_file(path)

    def _retry(self, work: Callable[[], T], patient: bool = True) -> T:
        return _patiently(self.url, work, patient)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        position: int = self.file.seek(offset, whence)
        return position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer from the current position, in one request; a failed attempt does not move the position."""
        count: int = self._retry(lambda: self.file.readinto(buffer))
        return count

    def read_at(self, offset: int, size: int) -> bytes:
        """Bytes at an offset, in one request; fewer at the end of the file. Thread-safe."""
        if offset >= self.file.size():
            return b""
        content: bytes = self._retry(lambda: self.file.read_at(size, offset))
        return content
