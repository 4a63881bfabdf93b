"""Tars, ours and others': where each member lies, with nothing taken on trust.

Python's `tarfile` takes a damaged header for the end of the tar, reads as much into memory as a header says that it is
long, and goes back where a size is negative. Here a header is checked before it is used, no size reaches beyond the end
of the file, and a tar without its end is cut.

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
"""Type of a member → what it is; each of the other types belongs to some program."""

LONG_NAME, PAX, GLOBAL = b"L", (b"x", b"X"), b"g"
BEFORE = (LONG_NAME, b"K", *PAX, GLOBAL)
"""Types of what stands before a member and says more of it."""

SPARSE = b"GNU.sparse"
"""How keys of pax begin that tell of holes in a file."""

LARGEST_BEFORE = 2**20
"""Bytes of that: a name has at most 4,096, an attribute of a file 65,536."""

MOST_ZEROS = 64 * 2**20
"""Bytes of zeros outside of members: a tar ends with 1,024, and writers fill a record with them, of 1 MiB at most."""


LONGEST = 100
"""Characters of a name that a sentence repeats."""


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a tar.

    Attributes:
        name: what is not UTF-8 in it as ``\\xff``.
        kind: `FILE`, or what it is instead, in the plural.
        offset, size: where its content lies, in bytes.
    """

    name: str
    kind: str
    offset: int
    size: int


def shortened(name: str) -> str:
    """The end of a name, if it is too long for a sentence."""
    return name if len(name) <= LONGEST else f"…{name[-LONGEST:]}"


def walk(file: BinaryIO) -> Iterator[Member]:
    """The members of a tar in order, also of further tars behind it (``cat``).

    The file is read forward, header by header; a member's content may be read before the next is taken.

    Raises:
        BadData: it is no tar, or it is cut or damaged; the message goes on after the tar's name: "is cut: …".
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
                raise BadData(f"is damaged: at byte {at:,} stands a name of {size:,} bytes, at most {LARGEST_BEFORE:,}")
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
    """Type, size and name that a header states, its checksum being right."""
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
    """The sum of a header's bytes, its checksum counted as spaces; and with signs, as some have added them up."""
    counted = block[:148] + b" " * 8 + block[156:]
    total = sum(counted)
    return total, total - 256 * sum(byte > 127 for byte in counted) if not counted.isascii() else total


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _number(field: bytes) -> int | None:
    """Octal digits or, of a size that takes more than eleven, GNU's base 256; None for what is neither."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = _text(field).strip(b" ")
    return int(digits or b"0", 8) if re.fullmatch(rb"[0-7]*", digits) else None


def _said(kind: bytes, content: bytes, at: int) -> dict[bytes, bytes]:
    """What is said of the next member, as far as it matters: its path, its size, and that it is sparse."""
    if kind == LONG_NAME:
        return {b"path": _text(content)}
    records = _records(content, at) if kind in (*PAX, GLOBAL) else {}
    said = {key: value for key, value in records.items() if key in (b"path", b"size") and value}
    if kind == GLOBAL and said:
        raise BadData(f"is damaged: before byte {at:,} stands one path or size for all members")
    return said | ({SPARSE: b"yes"} if any(key.startswith(SPARSE) for key in records) else {})


def _records(content: bytes, at: int) -> dict[bytes, bytes]:
    """Records of pax, "LENGTH KEY=VALUE" and a line's end, of so many bytes with their length."""
    records, first = dict[bytes, bytes](), 0
    while content[first : first + 1] not in (b"", b"\0"):
        digits, space, _ = content[first : first + 8].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        record = content[first + len(digits) + 1 : first + length]
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise BadData(f"is damaged: what stands about a member at byte {at:,} cannot be read")
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
    if kind == b"\0" and path.endswith(b"/"):  # before POSIX, folders had no type
        kind = b"5"
    what = KINDS.get(kind, OTHER)
    return Member(decoded, what, at, size if what in (FILE, OTHER) else 0)
