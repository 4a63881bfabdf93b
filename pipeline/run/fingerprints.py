"""Fingerprints of the user's own files that a node is made from: images, shards, checkpoints, source code.

A version identifies a recipe, which names such files but not their content. So a node records the files beside its
manifest, and a node whose files have changed is made again. A file is compared by its size and the time of its last
change; by its content if no more than times differ, or on request; source code, which is small and which git gives new
times, always by its content.
"""

import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.store import digest
from stages import imports

RECORD = "sources.arrow"
"""File of a node that records the files it was made from."""

DIGITS = 16
"""Hexadecimal digits of a sha256 that tell whether a file has changed."""

SCHEMA = pa.schema(
    [
        ("role", pa.string()),  # source, weights, or the arch whose source code it is
        ("file", pa.string()),
        ("bytes", pa.int64()),
        ("modified", pa.int64()),  # nanoseconds since 1970; null if only its content counts
        ("content", pa.string()),  # first `DIGITS` digits of its sha256; null if it is not known
    ]
)


@dataclass(frozen=True)
class Change:
    """A file that is not what it was.

    Attributes:
        role: its role.
        file: its name.
        what: changed, added or removed.
        before, now: sizes in bytes, or None.
    """

    role: str
    file: str
    what: str
    before: int | None
    now: int | None


def rows(
    role: str,
    files: Sequence[str],
    sizes: Iterable[int],
    modified: Sequence[int] | None = None,
    contents: Sequence[str | None] | None = None,
) -> pa.Table:
    """The files of a role."""
    count, empty = len(files), [None] * len(files)
    columns = [[role] * count, files, sizes, empty if modified is None else modified, contents or empty]
    return pa.table([pa.array(column, kind) for column, kind in zip(columns, SCHEMA.types, strict=True)], SCHEMA)


UNREAD = "-" * DIGITS
"""In the place of the digest of a file that could not be read."""


def join(contents: Iterable[str | None]) -> str:
    """The digests of several files as one string, which a million of them keep small."""
    return "".join((content or UNREAD)[:DIGITS] for content in contents)


def split(joined: str) -> list[str]:
    """The digests of several files."""
    return [joined[first : first + DIGITS] for first in range(0, len(joined), DIGITS)]


def content_of(path: Path) -> str:
    """Digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]


def code(archs: Iterable[str], here: Path) -> pa.Table:
    """The source files of some networks of the user."""
    found = [SCHEMA.empty_table()]
    for arch in sorted(set(archs)):
        files = imports.sources(arch, here)
        sizes, contents = [path.stat().st_size for path in files.values()], [*map(content_of, files.values())]
        found.append(rows(arch, list(files), sizes, contents=contents))
    return pa.concat_tables(found)


def digests(files: pa.Table) -> dict[str, str]:
    """Role → digest over its files: names, sizes and times, or contents where only these count."""
    found = {}
    for role in pc.unique(files["role"]).to_pylist():
        own = files.filter(pc.equal(files["role"], role))
        marks = pc.coalesce(pc.cast(own["modified"], pa.string()), own["content"], pa.scalar(""))
        lines = pc.binary_join_element_wise(own["file"], pc.cast(own["bytes"], pa.string()), marks, "\t")
        found[role] = digest("\n".join(sorted(lines.to_pylist())).encode())
    return found


def pack(files: pa.Table) -> bytes:
    """The record of some files."""
    out = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(out, SCHEMA, options=options) as writer:
        writer.write_table(files)
    return out.getvalue()


def unpack(content: bytes) -> pa.Table:
    """The files of a record.

    Raises:
        ValueError: it is none.
    """
    files = pa.ipc.open_file(io.BytesIO(content)).read_all()
    files.validate(full=True)
    if not files.schema.equals(SCHEMA):
        raise ValueError("not a record of files")
    return files


def changes(before: pa.Table, now: pa.Table, by_content: bool = False) -> list[Change]:
    """The files that differ, sorted by role and name.

    Args:
        before: files as they were recorded.
        now: files as they are; roles that are missing in either are not compared.
        by_content: compare contents where both are known, not times.
    """
    roles = pc.unique(before["role"])
    now = now.filter(pc.is_in(now["role"], roles))
    before = before.filter(pc.is_in(before["role"], pc.unique(now["role"])))
    both = before.join(now, ["role", "file"], join_type="full outer", right_suffix=" now")
    same = pc.and_(pc.equal(both["bytes"], both["bytes now"]), _same(both, by_content))
    different = both.filter(pc.invert(pc.fill_null(same, False)))
    found = [_change(row) for row in different.to_pylist()]
    return sorted(found, key=lambda change: (change.role, change.file))


def _same(both: pa.Table, by_content: bool) -> pa.ChunkedArray:
    times = pc.equal(both["modified"], both["modified now"])
    contents = pc.equal(both["content"], both["content now"])
    return pc.coalesce(contents, times) if by_content else pc.coalesce(times, contents)


def _change(row: Mapping[str, Any]) -> Change:
    before, now = row["bytes"], row["bytes now"]
    what = "added" if before is None else "removed" if now is None else "changed"
    return Change(row["role"], row["file"], what, before, now)
