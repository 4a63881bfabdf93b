"""Files of images, on disk and on object stores; what lies in tars is fetched in as few requests as pay."""

import errno
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import SEEK_SET, BufferedReader, RawIOBase
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote, urlsplit

from stages import remote
from stages.errors import BadData, BadInput
from stages.images import read_file
from stages.load.listing import Span, printable

T = TypeVar("T")

READERS = 16
"""Tars that are listed side by side, and spans of tars that are fetched side by side."""

CHUNK = 8 * 2**20
"""Bytes asked of an object store at once; a listing holds `READERS` times as much."""

STORES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs")
"""Schemes of URLs that are read; pyarrow opens others too, each with faults of its own."""

GAP = 64 * 2**10
"""Bytes between two images that are rather fetched for nothing than asked around: a request takes as long as a few
hundred KiB."""


class Files:
    """Files of images. What lies in tars is fetched ahead, side by side, and each tar of an object store opened once.

    A shard's images are spread over the tars of its source by chance: most take a request of their own. All of a
    shard's files are held until it is read; as a tar, they are held again anyway.
    """

    def __init__(self, refs: Iterable[Any]) -> None:
        place = {ref: i for i, ref in enumerate(refs) if isinstance(ref, tuple)}
        self.pool = ThreadPoolExecutor(READERS)
        # All are opened before any is read: a thread that waits for a tar never keeps it from being opened.
        self.tars = {url: self.pool.submit(_reader, url) for url in dict.fromkeys(url for url, _, _ in place)}
        self.coming = dict[Span, Future[dict[Span, bytes]]]()
        # In the order in which they will be asked for: they are decoded while others come.
        for spans in sorted(_joined(place), key=lambda spans: min(place[span] for span in spans)):
            self.coming |= dict.fromkeys(spans, self.pool.submit(self._fetch, spans))

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
            BadData: of a tar, there is no longer as much as was listed.
            OSError: it cannot be read.
        """
        if isinstance(ref, Path):
            return read_file(ref)
        content = self.coming[ref].result()[ref]
        if len(content) != ref[2]:
            raise BadData("ends inside the image")
        return content


def _joined(spans: Iterable[Span]) -> Iterator[list[Span]]:
    """Spans, in order; together those that one request should fetch."""
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
    return ref[0] if isinstance(ref, tuple) else printable("/".join(ref.parts[-2:]))


def _on_disk(url: str) -> Path | None:
    """A path or URL as a path, if it is a file of this machine."""
    if "://" not in url:
        return Path(url)
    parts = urlsplit(url)
    return Path(unquote(parts.path)) if parts.scheme == "file" and parts.netloc in ("", "localhost") else None


def open_file(url: str, patient: bool = True) -> BinaryIO:
    """A file to be read from its start to its end, on disk passing over what is not wanted."""
    path = _on_disk(url)
    return _open(path) if path else BufferedReader(_Remote(url, patient), CHUNK)


def _open(path: Path) -> BinaryIO:
    """A file on disk; a pipe, whose opening might wait for ever, or a device, which may never end, is none.

    Raises:
        OSError: it cannot be opened.
    """
    if stat.S_ISREG(path.stat().st_mode) or path.is_dir():  # opening a folder says what is wrong
        return path.open("rb")
    raise OSError(errno.EINVAL, "it is no file", str(path))


def _reader(url: str) -> Callable[[int, int], bytes]:
    """What reads a number of bytes at an offset, for several threads at once."""
    path = _on_disk(url)
    if path is None:
        return _Remote(url).read_at

    def read_at(offset: int, size: int) -> bytes:
        with path.open("rb") as file:  # not left open: a shard's images may lie in more tars than may be open
            file.seek(offset)
            return file.read(size)

    return read_at


class _Remote(RawIOBase):
    """A file of an object store as Python knows files; while the store is away, it waits.

    Args:
        url: where it is.
        patient: whether to wait for it when it is opened, too.

    Raises:
        FileNotFoundError: it is not there.
        ConnectionError: it cannot be read, for longer than `remote.PATIENCE`; any method may raise it.
    """

    def __init__(self, url: str, patient: bool = True) -> None:
        super().__init__()
        self.url = url
        self.file = self._retry(self._opened, patient)

    def _opened(self) -> Any:
        if urlsplit(self.url).scheme not in STORES:
            known = ", ".join(f"{scheme}://" for scheme in STORES)
            raise BadInput(f"{self.url} is no URL that is read ({known}): fetch the file, and name its path")
        place, mark, query = self.url.partition("?")
        folder, _, name = place.rpartition("/")
        filesystem, root = remote.connect(f"{folder}/{mark}{query}")
        return filesystem.open_input_file(f"{root}/{unquote(name)}")

    def _retry(self, work: Callable[[], T], patient: bool = True) -> T:
        try:
            return remote.retry(work, remote.PATIENCE if patient else remote.FIRST_PATIENCE, self._refuse)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ConnectionError(f"{self.url} cannot be read: {remote.said(error)}") from error

    def _refuse(self, error: Exception) -> None:
        if sentence := remote.refusal(self.url, error, remote.FILE):
            raise BadInput(sentence) from error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        position: int = self.file.seek(offset, whence)
        return position

    def readinto(self, buffer: Any) -> int:
        """As many bytes as fit, in one request, from where it stands; a try that fails does not move it."""
        count: int = self._retry(lambda: self.file.readinto(buffer))
        return count

    def read_at(self, offset: int, size: int) -> bytes:
        """Bytes at an offset, in one request, less if it ends there; for several threads at once."""
        if offset >= self.file.size():
            return b""
        content: bytes = self._retry(lambda: self.file.read_at(size, offset))
        return content
