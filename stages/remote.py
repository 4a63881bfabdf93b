"""Object stores: how they are reached, asking again while they are away, and what their refusals mean."""

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
"""Seconds that an object store may be away, once it has answered, before what is asked of it fails."""

FIRST_PATIENCE = 5.0
"""The same before it has answered at all: then something is mistyped, more likely than not."""

CONNECT_TIMEOUT, SILENCE = 10.0, 30.0
"""Seconds until S3 has to take a connection, and to say something. By default 1 and 3: too few for a busy server."""

PAUSE, LONGEST_PAUSE = 0.5, 15.0
"""Seconds before the first repetition, and at most; each pause is twice the one before, less up to half by chance."""

T = TypeVar("T")


def retry(
    work: Callable[[], T],
    patience: float,
    refuse: Callable[[Exception], None],
    again: Callable[[], None] = lambda: None,
) -> T:
    """Do some work; if the store is away, again and again, at longer and longer intervals.

    Args:
        work: what is to be done.
        patience: seconds after which it is not begun again.
        refuse: told of each error; raises where it will not pass.
        again: called before each repetition.

    Raises:
        FileNotFoundError, NotADirectoryError: at once.
        OSError: the last error, when patience is at an end.
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
    """The filesystem and root of a URL, once per process: connections and credentials are kept.

    Args:
        url: a folder's path, or a URL.
        in_parts: for S3, whether an upload begins when a file is opened. That costs two requests more, but a stream
            that begins later, and then cannot, leaves an empty file in place of what was there.
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
    """S3 as `fs.FileSystem.from_uri` makes it, but with errors reported at once: `Store` tries again, and counts."""
    endpoint = asked.get("endpoint_override") or _endpoint()
    return fs.S3FileSystem(
        endpoint_override=endpoint,
        scheme=asked.get("scheme"),
        # Amazon says where a bucket is; elsewhere AWS_REGION has the word.
        region=asked.get("region") or (None if endpoint else fs.resolve_s3_region(bucket)),
        allow_delayed_open=not in_parts,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),
        connect_timeout=CONNECT_TIMEOUT,
        request_timeout=SILENCE,
    )


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


# What object stores say, by name, in small letters: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
# and https://cloud.google.com/apis/design/errors. What is not here and no 3xx or 4xx may pass.

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
"""Called the request's fault, but what went wrong on the way, or a server that restarted, causes them too."""

AGAIN_STATUS = {"408", "409", "425", "429"}

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


STORE = {
    "subject": "the store {url}",
    "correct": "create it or correct --store",
    "rights": "list, read, write and delete",
}
FILE = {"subject": "{url} cannot be read", "correct": "correct the URL", "rights": "read"}
"""What a sentence about a store says, and one about a file that is read."""


def refusal(url: str, error: Exception, about: Mapping[str, str] = STORE) -> str | None:
    """Why asking again would not help, as a sentence about a `STORE` or a `FILE`; None where it might."""
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
    """The part of an error that is not pyarrow's wrapping; without keys, should a server repeat one."""
    text = re.split(r"operation: |curlCode: \d+, |last message of |Message: ", str(error).splitlines()[0])[-1]
    text = re.split(r"; Details|\. | \(Request ID| error_info", text)[0].rstrip(".")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        text = text.replace(os.environ.get(name) or "\0", f"${name}")
    return text


def host(url: str) -> str:
    """Where S3 is, if not at Amazon: without user and password, which some put there."""
    place = re.sub(r"^\w+://", "", _endpoint() or "").rpartition("@")[2]
    return f" at {place} (AWS_ENDPOINT_URL)" if place and url.startswith("s3://") else ""


def _keys(url: str) -> str:
    if url.startswith("s3://") and "AWS_ACCESS_KEY_ID" not in os.environ:
        return "AWS_ACCESS_KEY_ID is not set, so the configuration file or this machine's role"
    return "the keys in use"
