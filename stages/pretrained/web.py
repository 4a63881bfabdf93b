"""Download a file from a web server, over http or https."""

import socket
import ssl
from http.client import HTTPException, HTTPResponse, InvalidURL, responses
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

from stages import remote
from stages.errors import BadData

DOWNLOADS = 3
"""Attempts at a download that breaks off in the middle."""

DENIED, GONE, BUSY = {401, 403, 407}, {404, 410}, {408, 425, 429}


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
            with remote.retry(lambda: _get(url), remote.FIRST_PATIENCE, _refuse) as answer:
                out.seek(0)
                out.truncate()
                _receive(answer, out, most)
                return
        except OSError as error:
            if last or not isinstance(error, BrokenOff):
                raise BadData(f"cannot be fetched: {_why(error)}") from error


class BrokenOff(OSError):
    """The web server's response ended early."""


def _get(url: str) -> HTTPResponse:
    # Escape only spaces and non-ASCII letters; everything else stays as it is.
    request = Request(quote(url, safe="%/:?#[]@!$&'()*+,;=~"), headers={"User-Agent": "notbugs"})
    try:
        answer: HTTPResponse = urlopen(request, timeout=remote.SILENCE)
    except HTTPError as error:
        error.close()
        raise
    except (InvalidURL, ValueError) as error:
        raise BadData("cannot be fetched: that is no address") from error
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
            raise BrokenOff(_why(error)) from error
        except HTTPException as error:
            raise BrokenOff("the connection breaks off") from error
        if not piece:
            break
        out.write(piece)
        if out.tell() > most:
            raise BadData(f"has more than {most:,} bytes, which are not fetched")
    if expected is not None and out.tell() != expected:
        raise BrokenOff(f"the connection breaks off after {out.tell():,} of {expected:,} bytes")


def _refuse(error: Exception) -> None:
    """Raises:
    BadData: a retry would not help.
    """
    reason = error.reason if isinstance(error, URLError) else None
    passing = isinstance(error, HTTPError) and (error.code >= 500 or error.code in BUSY)
    known = isinstance(reason, socket.gaierror) and reason.errno == socket.EAI_NONAME
    if (isinstance(error, HTTPError) and not passing) or known or isinstance(reason, ssl.SSLError):
        raise BadData(f"cannot be fetched: {_why(error)}") from error


def _why(error: Exception) -> str:
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
