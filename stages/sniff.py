"""Recognise an unexpected file by its first bytes."""

NEEDED = 512
"""Number of leading bytes that are examined."""

STARTS = {
    b"\x1f\x8b": "compressed with gzip: unpack it first (gunzip)",
    b"\x1f\x9d": "compressed: unpack it first (uncompress)",
    b"BZh": "compressed with bzip2: unpack it first (bunzip2)",
    b"\xfd7zXZ\0": "compressed with xz: unpack it first (unxz)",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it first (unzstd)",
    b"\x04\x22\x4d\x18": "compressed with lz4: unpack it first (unlz4)",
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a rar archive",
    b"PAR1": "a Parquet file",
    b"version https://git-lfs": "a Git LFS pointer in place of the file: fetch the file with `git lfs pull`",
    b"<!doctype html": "an HTML page in place of the file: the link leads to a page, perhaps one to log in on",
    b"<html": "an HTML page in place of the file: the link leads to a page, perhaps one to log in on",
    b"<?xml": "an XML document in place of the file: most likely a server's refusal",
}


def sniffed(head: bytes) -> str | None:
    """The kind of a file, and a remedy, from its first bytes; None if unknown.

    Args:
        head: the first `NEEDED` bytes, or all of a shorter file.
    """
    plain = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((what for start, what in STARTS.items() if head.startswith(start) or plain.startswith(start)), None)
