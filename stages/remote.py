"""Object stores: connections, retries while a store is unavailable, and the meaning of their errors."""

import errno
import os
import random
import re
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from pyarrow import fs

PATIENCE = 120.0
"""Seconds to retry a request to a store that has answered before."""

FIRST_PATIENCE = 5.0
"""Seconds to retry the first request: fail fast, since its URL may be mistyped."""

CONNECT_TIMEOUT, SILENCE = 10.0, 30.0
"""Timeouts of S3 in seconds, to connect and to respond. The defaults, 1 and 3, are too short for a busy server."""

PAUSE, LONGEST_PAUSE = 0.5, 15.0
"""Seconds before the first retry, and the longest pause: exponential backoff with jitter of up to half a pause."""

T = TypeVar("T")


def retry(
    work: Callable[[], T],
    patience: float,
    refuse: Callable[[Exception], None],
    again: Callable[[], None] = lambda: None,
) -> T:
    """Call `work`, and retry it with exponential backoff while the store is unavailable.

    Args:
        work: the request.
        patience: seconds after which no retry starts.
        refuse: called with each error; raises if the error is permanent.
        again: called before each retry.

    Raises:
        FileNotFoundError, NotADirectoryError: without a retry.
        OSError: the last error, after `patience` seconds.
    """
    began, pause = time.monotonic(), PAUSE
    while True:
        try:
            return work()
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            refuse(error)
            if time.monotonic() - began + pause > patience:
                raise
        again()
        time.sleep(pause * random.uniform(0.5, 1))
        pause = min(2 * pause, LONGEST_PAUSE)


@cache
def connect(url: str, in_parts: bool = False) -> tuple[fs.FileSystem, str]:
    """The filesystem and root of a URL, cached per process with its connections and credentials.

    Args:
        url: path of a folder, or a URL.
        in_parts: for S3: start a multipart upload when a file is opened. This costs two more requests, but a delayed
            upload that fails to start leaves an empty file in place of the old one.
    """
    parts = urlsplit(url)
    match parts.scheme if "://" in url else None:
        case None:
            return fs.LocalFileSystem(), url
        case "s3":
            root = unquote(f"{parts.netloc}{parts.path}").rstrip("/")
            return _s3(parts.netloc, dict(parse_qsl(parts.query)), in_parts), root
        case "gs" | "gcs":
            url += ("&" if parts.query else "?") + "retry_limit_seconds=6"  # pyarrow's default is 15 minutes
    filesystem, root = fs.FileSystem.from_uri(url)
    return filesystem, root


def _s3(bucket: str, asked: Mapping[str, str], in_parts: bool) -> fs.S3FileSystem:
    """S3 as from `fs.FileSystem.from_uri`, but without pyarrow's retries: `retry` has its own."""
    endpoint = asked.get("endpoint_override") or _endpoint()
    return fs.S3FileSystem(
        endpoint_override=endpoint,
        scheme=asked.get("scheme"),
        # Amazon reports a bucket's region; elsewhere AWS_REGION decides.
        region=asked.get("region") or (None if endpoint else fs.resolve_s3_region(bucket)),
        allow_delayed_open=not in_parts,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),
        connect_timeout=CONNECT_TIMEOUT,
        request_timeout=SILENCE,
    )


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


# Error names of object stores, in lower case: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
# and https://cloud.google.com/apis/design/errors. Other errors are retried unless their status is 3xx or 4xx.

REFUSALS = {
    "there is no bucket {bucket}{host}; {correct}": {"nosuchbucket", "notfound"},
    "it refuses the keys ({name}); check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY": {
        "invalidaccesskeyid",
        "invalidclienttokenid",
        "invalidsecurity",
        "invalidsignature",
        "invalidtoken",
        "incompletesignature",
        "signaturedoesnotmatch",
        "unrecognizedclient",
    },
    "it denies access ({name}); {keys} must be allowed to {rights} there": {
        "accessdenied",
        "accountproblem",
        "allaccessdisabled",
        "missingauthenticationtoken",
        "notsignedup",
        "permissiondenied",
        "unauthenticated",
    },
    "the keys have expired ({name}); renew them and resume": {"expiredtoken", "requestexpired", "tokenrefreshrequired"},
    "it finds this machine's clock wrong ({name}); set it right and resume": {"requesttimetooskewed"},
    "the bucket {bucket} is in another region ({name}); set AWS_REGION": {
        "authorizationheadermalformed",
        "illegallocationconstraintexception",
        "permanentredirect",
    },
    "it is full ({name}); free some space and resume": {"quotaexceeded", "xminiostoragefull"},
}

AGAIN = {"baddigest", "incompletebody", "invaliddigest", "invalidpart", "nosuchupload", "requesttimeout"}
"""Client errors, by name, that transmission errors or a restarting server can also cause; retried."""

AGAIN_STATUS = {"408", "409", "425", "429"}

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


STORE = {
    "subject": "the store {url}",
    "correct": "create it or correct --store",
    "rights": "list, read, write and delete",
}
FILE = {"subject": "{url} cannot be read", "correct": "correct the URL", "rights": "read"}
"""Wording of messages about a store, and about a file that is read."""


def refusal(url: str, error: Exception, about: Mapping[str, str] = STORE) -> str | None:
    """Why a retry would not help, as a message about a `STORE` or a `FILE`; None if it might help."""
    text, subject = str(error), about["subject"].format(url=url)
    if isinstance(error, OSError) and error.errno in FULL:
        return f"the disk of the store {url} is full ({os.strerror(error.errno)}); free some space and resume"
    patterns = (r"ExceptionName: (\w+)", r"(?:AWS Error |Status\()(\w+)", r"Bucket '.*' (not found)")
    named = next(filter(None, (re.search(pattern, text) for pattern in patterns)), None)
    if named is None:
        return None
    name, status = re.sub("[_ ]", "", named[1]).lower(), re.search(r"HTTP status ([34]\d\d)", text)
    for sentence, names in REFUSALS.items():
        if name in names:
            known = {"name": named[1], "bucket": urlsplit(url).netloc, "host": host(url), "keys": _keys(url)}
            return f"{subject}: {sentence.format(**about, **known)}"
    if status is None or status[1] in AGAIN_STATUS or name in AGAIN:
        return None
    return f"{subject}: it refuses a request ({named[1]}, {status[0]}): {said(error)}"


def said(error: Exception) -> str:
    """The server's message without pyarrow's wrapping, with keys masked."""
    text = re.split(r"operation: |curlCode: \d+, |last message of |Message: ", str(error).splitlines()[0])[-1]
    text = re.split(r"; Details|\. | \(Request ID| error_info", text)[0].rstrip(".")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        text = text.replace(os.environ.get(name) or "\0", f"${name}")
    return text


def host(url: str) -> str:
    """The S3 endpoint if it is not Amazon's, without user and password."""
    place = re.sub(r"^\w+://", "", _endpoint() or "").rpartition("@")[2]
    return f" at {place} (AWS_ENDPOINT_URL)" if place and url.startswith("s3://") else ""


def _keys(url: str) -> str:
    if url.startswith("s3://") and "AWS_ACCESS_KEY_ID" not in os.environ:
        return "AWS_ACCESS_KEY_ID is not set, so the configuration file or this machine's role"
    return "the keys in use"
