"""Images in the rows of parquet files."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.errors import BadData, BadInput

LARGEST_GROUP = 2**30
"""Most bytes of the images of one row group, which is read whole."""

AS_ASKED = 1
"""Bytes that are buffered: none, since the reader asks for whole column chunks."""

Opener = Callable[..., BinaryIO]


class Row(NamedTuple):
    """Place of an image: file, column of its bytes (``image.bytes``), row group, row in it."""

    file: str
    column: str
    group: int
    row: int


@contextmanager
def understood() -> Iterator[None]:
    """Turn errors of the parquet reader into `BadData`; the message starts with a verb."""
    try:
        yield
    except (BadData, BadInput):
        raise
    except (pa.ArrowException, ValueError, MemoryError) as error:
        raise BadData(f"is no parquet file that can be read: {str(error).splitlines()[0].rstrip('.')}") from error
    except OSError as error:
        if error.errno is not None or isinstance(error, ConnectionError):
            raise
        raise BadData(f"is damaged: {str(error).splitlines()[0].rstrip('.')}") from error


def refuse_large(metadata: pq.FileMetaData, column: str, group: int) -> None:
    """Raises:
    BadData: a row group holds more than `LARGEST_GROUP` in a column.
    """
    chunks = metadata.row_group(group)
    sizes = (chunks.column(i).total_uncompressed_size for i in range(chunks.num_columns) if _is(chunks, i, column))
    if (size := sum(sizes)) > LARGEST_GROUP:
        raise BadData(
            f"has {size:,} bytes of images in a row group, which is read whole, at most {LARGEST_GROUP:,}: write it "
            "with smaller row groups, of a hundred rows for photographs"
        )


def _is(chunks: pq.RowGroupMetaData, at: int, column: str) -> bool:
    return bool(chunks.column(at).path_in_schema == column)


def by_file(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows grouped by their file."""
    return [list(group) for _, group in groupby(sorted(rows), key=lambda row: row.file)]


def read_rows(rows: list[Row], opener: Opener) -> Mapping[Row, bytes | Exception | None]:
    """The images of some rows of one file: None where there is none, an error where the row group cannot be read.

    The column is read as a dictionary: a small file could repeat one long value a million times.
    """
    with opener(rows[0].file, buffer=AS_ASKED) as file, understood():
        parquet = pq.ParquetFile(file, read_dictionary=[rows[0].column])
        found = dict[Row, bytes | Exception | None]()
        for _, wanted in groupby(rows, key=lambda row: row.group):
            group = list(wanted)
            try:
                found |= zip(group, _values(parquet, group), strict=True)
            except BadData as error:
                found |= dict.fromkeys(group, error)
        return found


def _values(parquet: pq.ParquetFile, rows: list[Row]) -> list[bytes | None]:
    with understood():
        if rows[0].group >= parquet.num_row_groups:
            raise BadData("has fewer rows than when it was listed")
        refuse_large(parquet.metadata, rows[0].column, rows[0].group)
        column = parquet.read_row_group(rows[0].group, columns=[rows[0].column]).column(0).combine_chunks()
        if pa.types.is_struct(column.type):
            column = pc.struct_field(column, "bytes")
        if rows[-1].row >= len(column):
            raise BadData("has fewer rows than when it was listed")
        values: list[bytes | None] = column.take(pa.array([row.row for row in rows])).to_pylist()
        return values
