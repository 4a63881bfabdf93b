"""Walk a tar member by member without trusting its headers.

Python's `tarfile` takes a damaged header for the end of the tar, allocates whatever length a header states, and seeks
backwards if a size is negative. Here each header is checked before use, no size may exceed the file, and a tar without
its closing zeros counts as cut.

The formats are POSIX's (ustar, pax) and GNU's: https://www.gnu.org/software/tar/manual/html_node/Standard.html.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import SEEK_END
from typing import BinaryIO

from stages.errors import BadData
from stages.sniff import sniffed

BLOCK = 512

FILE, LINK, FOLDER, DEVICE, OTHER = "files", "links", "folders", "devices", "members of a kind of their own"

KINDS = {
    **dict.fromkeys((b"0", b"\0", b"7"), FILE),
    **dict.fromkeys((b"1", b"2"), LINK),
    **dict.fromkeys((b"3", b"4", b"6"), DEVICE),
    b"5": FOLDER,
}
"""Type of a member → its name; other types are vendor extensions."""

LONG_NAME, PAX, GLOBAL = b"L", (b"x", b"X"), b"g"
BEFORE = (LONG_NAME, b"K", *PAX, GLOBAL)
"""Types of extended headers, which precede a member and describe it."""

SPARSE = b"GNU.sparse"
"""Prefix of pax keys that describe sparse files."""

LARGEST_BEFORE = 2**20
"""Most bytes of an extended header: a name has at most 4,096, a file attribute 65,536."""

MOST_ZEROS = 64 * 2**20
"""Most bytes of zeros outside members: a tar ends with 1,024, and writers pad to a record of at most 1 MiB."""


LONGEST = 100
"""Most characters of a name in a message."""


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a tar.

    Attributes:
        name: its name; bytes that are not UTF-8 are escaped as ``\\xff``.
        kind: `FILE`, or another kind as a plural noun.
        offset, size: position and length of its content in bytes.
    """

    name: str
    kind: str
    offset: int
    size: int


def shortened(name: str) -> str:
    """A name for a message; of a long one, only its end."""
    return name if len(name) <= LONGEST else f"…{name[-LONGEST:]}"


def walk(file: BinaryIO) -> Iterator[Member]:
    """The members of a tar in order, and of tars concatenated to it (``cat``).

    The file is read forwards, header by header. The caller may read a member's content before taking the next.

    Raises:
        BadData: it is no tar, or is cut or damaged; the message continues the tar's name: "is cut: …".
    """
    end, at, zeros = file.seek(0, SEEK_END), 0, 0
    said = dict[bytes, bytes]()
    while at < end:
        file.seek(at)
        block = file.read(min(BLOCK, end - at))
        if at + len(block) >= BLOCK and not said and not any(block):
            at, zeros = at + BLOCK, zeros + BLOCK
            if zeros > MOST_ZEROS:
                raise BadData(f"is damaged: more than {MOST_ZEROS:,} bytes of zeros lie before byte {at:,}")
            continue
        kind, size, name = _header(block, at)
        at, zeros = at + BLOCK, 0
        if kind in BEFORE:
            if size > LARGEST_BEFORE:
                raise BadData(f"is damaged: the name at byte {at:,} has {size:,} bytes, at most {LARGEST_BEFORE:,}")
            said |= _said(kind, file.read(size), at)
        else:
            member = _member(kind, size, name, said, at)
            size, said = member.size, {}
            if size > end - at:
                raise BadData(f"is cut inside {shortened(member.name)}, of whose {size:,} bytes {end - at:,} are there")
            yield member
        at += size + -size % BLOCK
    if not end:
        raise BadData("is empty (0 bytes)")
    if not zeros:
        raise BadData(f"is cut: it ends after {end:,} bytes, without the zeros that end a tar")


def _header(block: bytes, at: int) -> tuple[bytes, int, bytes]:
    """Type, size and name from a header whose checksum is right."""
    size = _number(block[124:136])
    if len(block) < BLOCK or size is None or _number(block[148:156]) not in _checksums(block):
        if at == 0:
            raise BadData(f"is {sniffed(block) or 'no tar'}")
        if len(block) < BLOCK:
            raise BadData(f"is cut: it ends inside a member's header, at byte {at + len(block):,}")
        raise BadData(f"is damaged: at byte {at:,}, a member's header was expected")
    kind, name = block[156:157], _text(block[:100])
    if block[257:263] == b"ustar\0" and (folder := _text(block[345:500])):
        name = folder + b"/" + name
    return kind, size, name


def _checksums(block: bytes) -> tuple[int, int]:
    """The sum of a header's bytes, the checksum field counted as spaces: unsigned, and signed as in some old tars."""
    counted = block[:148] + b" " * 8 + block[156:]
    total = sum(counted)
    return total, total - 256 * sum(byte > 127 for byte in counted) if not counted.isascii() else total


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _number(field: bytes) -> int | None:
    """A number in octal digits, or in GNU's base 256 if it takes more than eleven; None if it is neither."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = _text(field).strip(b" ")
    return int(digits or b"0", 8) if re.fullmatch(rb"[0-7]*", digits) else None


def _said(kind: bytes, content: bytes, at: int) -> dict[bytes, bytes]:
    """The facts used from an extended header: the next member's path, its size, and whether it is sparse."""
    if kind == LONG_NAME:
        return {b"path": _text(content)}
    records = _records(content, at) if kind in (*PAX, GLOBAL) else {}
    said = {key: value for key, value in records.items() if key in (b"path", b"size") and value}
    if kind == GLOBAL and said:
        raise BadData(f"is damaged: before byte {at:,}, a header sets one path or size for all members")
    return said | ({SPARSE: b"yes"} if any(key.startswith(SPARSE) for key in records) else {})


def _records(content: bytes, at: int) -> dict[bytes, bytes]:
    """Records of a pax header: "LENGTH KEY=VALUE" and a line feed, LENGTH being the bytes of the whole record."""
    records, first = dict[bytes, bytes](), 0
    while content[first : first + 1] not in (b"", b"\0"):
        digits, space, _ = content[first : first + 8].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        record = content[first + len(digits) + 1 : first + length]
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise BadData(f"is damaged: the extended header of the member at byte {at:,} cannot be read")
        records[key] = value[:-1]
        first += length
    return records


def _member(kind: bytes, size: int, name: bytes, said: dict[bytes, bytes], at: int) -> Member:
    path = said.get(b"path", name)
    decoded = path.decode("utf-8", "backslashreplace")
    shown = shortened(decoded)
    if kind == b"S" or SPARSE in said:
        raise BadData(f"has a sparse member, {shown}: write the tar without --sparse")
    if b"size" in said:
        if not (said[b"size"].isdigit() and len(said[b"size"]) < 20):
            raise BadData(f"is damaged: {shown} has no size that is a number")
        size = int(said[b"size"])
    if kind == b"\0" and path.endswith(b"/"):  # pre-POSIX tars have no type for folders
        kind = b"5"
    what = KINDS.get(kind, OTHER)
    return Member(decoded, what, at, size if what in (FILE, OTHER) else 0)
