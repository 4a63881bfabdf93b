"""Read files of a web server, over http or https: whole, or some bytes of them."""

import re
import socket
import ssl
from collections.abc import Mapping
from http.client import HTTPException, HTTPResponse, InvalidURL, responses
from io import SEEK_CUR, SEEK_END, SEEK_SET
from types import MappingProxyType
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

from stages import remote
from stages.errors import BadData

DOWNLOADS = 3
"""Attempts at a download that breaks off in the middle."""

DENIED, GONE, BUSY = {401, 403, 407}, {404, 410}, {408, 425, 429}

PARTIAL = 206
"""Status of an answer that has the bytes that were asked for."""

SCHEMES = ("http", "https")


def download(url: str, out: BinaryIO, most: int) -> None:
    """Download a file over http or https into an open file.

    Args:
        url: its URL.
        out: the open file, written from its start.
        most: maximum size in bytes.

    Raises:
        BadData: the download fails or exceeds `most`; the message starts with a verb.
    """
    for last in [False] * (DOWNLOADS - 1) + [True]:
        try:
            with remote.retry(lambda: _get(url), remote.FIRST_PATIENCE, refuse) as answer:
                out.seek(0)
                out.truncate()
                _receive(answer, out, most)
                return
        except OSError as error:
            if last or not isinstance(error, BrokenOff):
                raise BadData(f"cannot be fetched: {why(error)}") from error


class BrokenOff(OSError):
    """The web server's response ended early."""


class Ranged:
    """A file of a web server, read in parts by range requests (RFC 9110, section 14).

    `read_at` is thread-safe.

    Raises:
        BadData: the server gives no parts of files, or a retry would not help; the message starts with a verb. Any
            method may raise it.
        OSError: a request failed.
    """

    def __init__(self, url: str) -> None:
        self.url, self.at, self.bytes = url, 0, 0
        self.bytes = self._part(0, 1)[1]

    def size(self) -> int:
        return self.bytes

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        self.at = offset + {SEEK_SET: 0, SEEK_CUR: self.at, SEEK_END: self.bytes}[whence]
        return self.at

    def readinto(self, buffer: memoryview) -> int:
        content = self.read_at(len(buffer), self.at)
        buffer[: len(content)] = content
        self.at += len(content)
        return len(content)

    def read_at(self, size: int, offset: int) -> bytes:
        """Bytes at an offset, in one request; fewer at the end of the file."""
        size = min(size, self.bytes - offset)
        if size <= 0:
            return b""
        content, whole = self._part(offset, size)
        if whole != self.bytes:
            raise BadData(f"cannot be read: it had {self.bytes:,} bytes and has {whole:,} now")
        return content

    def _part(self, offset: int, size: int) -> tuple[bytes, int]:
        """Some bytes, and the number of all."""
        with _get(self.url, {"Range": f"bytes={offset}-{offset + size - 1}"}) as answer:
            stated = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("Content-Range") or "")
            if answer.status != PARTIAL or stated is None or int(stated[1]) != offset:
                raise BadData(
                    "cannot be read: the server gives no parts of files; fetch it yourself, and name its path"
                )
            try:
                content: bytes = answer.read(size)
            except HTTPException as error:
                raise BrokenOff("the connection breaks off") from error
        if len(content) != size:
            raise BrokenOff(f"the connection breaks off after {len(content):,} of {size:,} bytes")
        return content, int(stated[3])


def _get(url: str, headers: Mapping[str, str] = MappingProxyType({})) -> HTTPResponse:
    # Escape only spaces and non-ASCII letters; everything else stays as it is.
    plain = {"User-Agent": "notbugs", "Accept-Encoding": "identity"}
    request = Request(quote(url, safe="%/:?#[]@!$&'()*+,;=~"), headers={**plain, **headers})
    try:
        answer: HTTPResponse = urlopen(request, timeout=remote.SILENCE)
    except HTTPError as error:
        error.close()
        raise
    except (InvalidURL, ValueError) as error:
        raise BadData("cannot be fetched: it is not a valid URL") from error
    except HTTPException as error:
        raise OSError("what answers is no web server") from error
    return answer


def _receive(answer: HTTPResponse, out: BinaryIO, most: int) -> None:
    expected = answer.length  # None if the server sends no length
    if expected is not None and expected > most:
        raise BadData(f"has {expected:,} bytes: more than {most:,} are not fetched")
    while True:
        try:
            piece = answer.read(2**20)
        except OSError as error:
            raise BrokenOff(why(error)) from error
        except HTTPException as error:
            raise BrokenOff("the connection breaks off") from error
        if not piece:
            break
        out.write(piece)
        if out.tell() > most:
            raise BadData(f"has more than {most:,} bytes, which are not fetched")
    if expected is not None and out.tell() != expected:
        raise BrokenOff(f"the connection breaks off after {out.tell():,} of {expected:,} bytes")


def refuse(error: Exception) -> None:
    """Raises:
    BadData: a retry would not help.
    """
    reason = error.reason if isinstance(error, URLError) else None
    passing = isinstance(error, HTTPError) and (error.code >= 500 or error.code in BUSY)
    known = isinstance(reason, socket.gaierror) and reason.errno == socket.EAI_NONAME
    if (isinstance(error, HTTPError) and not passing) or known or isinstance(reason, ssl.SSLError):
        raise BadData(f"cannot be fetched: {why(error)}") from error


def why(error: Exception) -> str:
    """The reason of an error, without its wrapping."""
    if isinstance(error, HTTPError):
        status = f"{error.code} {responses.get(error.code, '')}".rstrip()
        if error.code in DENIED:
            return f"the server denies access ({status}): fetch it yourself, and name its path"
        return f"there is no such file ({status})" if error.code in GONE else f"the server answers {status}"
    reason = error.reason if isinstance(error, URLError) else error
    match reason:
        case socket.gaierror():
            return "its host is not known; check the address and the network"
        case ssl.SSLError():
            return "the server cannot prove who it is (its certificate); check the address"
        case TimeoutError():
            return f"the server is silent for {remote.SILENCE:.0f} s"
        case OSError():
            return reason.strerror or str(reason)
    return str(reason)
