"""List parquet files with images and labels, as Hugging Face's datasets have them."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.errors import BadData, BadInput, shown, some
from stages.images import KEPT, open_image
from stages.limits import CLASSES, IMAGES, TEXT
from stages.load.files import READERS, Files, open_file
from stages.load.listing import Images, Listing, few
from stages.load.patterns import matches
from stages.load.rows import AS_ASKED, Row, refuse_large, understood
from stages.load.webdataset import blaming, find_channels
from stages.recipes import Parquet

HUGGING_FACE = b"huggingface"
"""Key of the metadata in which `datasets` keeps the features: {"info": {"features": {column: …}}}."""

LARGEST_METADATA = 2**24
"""Most bytes of it."""


@dataclass(frozen=True)
class _Table:
    """What is known of one file.

    Attributes:
        url: the file.
        column: the column of the images' bytes: `image`, or `image.bytes`.
        label: the column of the labels.
        labels: the labels, integers or a dictionary of texts.
        groups: rows of each row group.
        names: class names in its metadata, if there are any.
    """

    url: str
    column: str
    label: str
    labels: pa.ChunkedArray
    groups: list[int]
    names: list[str] | None

    @property
    def textual(self) -> bool:
        return bool(pa.types.is_dictionary(self.labels.type))


class _Rows:
    """Rows of parquet files, as columns: first row, file and number of each row group."""

    def __init__(self, tables: Sequence[_Table]) -> None:
        groups = [(at, group, rows) for at, table in enumerate(tables) for group, rows in enumerate(table.groups)]
        self.files, self.column = [table.url for table in tables], tables[0].column
        self.places = np.array([place[:2] for place in groups], dtype=np.int64).reshape(-1, 2)
        self.ends = np.cumsum([rows for _, _, rows in groups], dtype=np.int64)

    def __getitem__(self, at: int) -> Row:
        number = int(np.searchsorted(self.ends, at, side="right"))
        file, group = self.places[number].tolist()
        first = int(self.ends[number - 1]) if number else 0
        return Row(self.files[file], self.column, group, at - first)


def list_parquet(load: Parquet, data: Path) -> Listing:
    found = {split: _tables(matches_or_refuse(pattern, data), load) for split, pattern in load.files.items()}
    everything = [table for tables in found.values() for table in tables]
    _refuse_unlike(everything)
    names = _names(everything, load)
    numbered = {split: [_numbers(table, names, load) for table in tables] for split, tables in found.items()}
    if names is None:
        largest = max((int(part.max()) for parts in numbered.values() for part in parts if len(part)), default=0)
        names = [str(i) for i in range(load.classes if isinstance(load.classes, int) else largest + 1)]
    items, first = dict[str, Images](), 0
    for split, parts in numbered.items():
        label = np.concatenate(parts)
        items[split], first = Images.whole(label, _Rows(found[split]), first), first + len(label)
    return Listing(tuple(names), items, find_channels(items, load.channels), _kind(items) if load.keeps_bytes else None)


def matches_or_refuse(pattern: str, data: Path) -> list[str]:
    """The files of a pattern.

    Raises:
        BadInput: there are none, or the store is unavailable.
    """
    with blaming(pattern):
        return matches(pattern, data)


def _tables(urls: Sequence[str], load: Parquet) -> list[_Table]:
    with blaming(urls[0]), open_file(urls[0], patient=False):  # fail fast, so that a mistyped URL is reported at once
        pass
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda url: _table(url, load), urls))


def _table(url: str, load: Parquet) -> _Table:
    """Read the footer and the labels of a file."""
    try:
        with blaming(url), open_file(url, buffer=AS_ASKED) as file, understood():
            parquet = pq.ParquetFile(file)
            schema, metadata = parquet.schema_arrow, parquet.metadata
            if metadata.num_rows > IMAGES:
                raise BadData(f"has {metadata.num_rows:,} rows, at most {IMAGES:,}: split it")
            features = _features(schema)
            column, label = _image_column(schema, load.image), _label_column(schema, features, load.label)
            groups = range(metadata.num_row_groups)
            for group in groups:
                refuse_large(metadata, column, group)
            names = None if load.classes is not None else _class_names(features.get(label), label)
            labels = _labels(pq.ParquetFile(file, metadata=metadata, read_dictionary=[label]), label)
    except BadData as error:
        raise BadInput(f"{url} {error}") from error
    return _Table(url, column, label, labels, [metadata.row_group(group).num_rows for group in groups], names)


def _image_column(schema: pa.Schema, wanted: str | None) -> str:
    """Path of the column of the images' bytes."""
    paths = {field.name: f"{field.name}.bytes" if _has_bytes(field.type) else field.name for field in schema}
    pictures = [field.name for field in schema if _has_bytes(field.type) or _is_binary(field.type)]
    return paths[_chosen("image", wanted, pictures, schema, "images (binary, or a struct with `bytes`)")]


def _has_bytes(kind: pa.DataType) -> bool:
    at = kind.get_field_index("bytes") if pa.types.is_struct(kind) else -1
    return at >= 0 and _is_binary(kind.field(at).type)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _label_column(schema: pa.Schema, features: dict[str, Any], wanted: str | None) -> str:
    able = [field.name for field in schema if _is_label(field.type)]
    declared = [name for name in able if (features.get(name) or {}).get("_type") == "ClassLabel"]
    likely = ["label"] if "label" in able else declared or able
    return _chosen("label", wanted, able if wanted else likely, schema, "labels (integers or text)")


def _is_label(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or _is_text(kind))


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _chosen(key: str, wanted: str | None, able: list[str], schema: pa.Schema, what: str) -> str:
    """The column that the recipe names, or else the only one that may be meant."""
    if (wanted is None and len(able) == 1) or wanted in able:
        return wanted or able[0]
    there = some([f"{name} ({shown(str(kind))[1:-1]})" for name, kind in zip(schema.names, schema.types, strict=True)])
    if wanted is not None:
        lacks = f"has no column {wanted!r}" if wanted not in schema.names else f"has no {what} in its column {wanted!r}"
        raise BadData(f"{lacks}, which `{key}` names: it has {there}")
    if able:
        raise BadData(f"has several columns of {what}, {some(able)}: choose one, for example `{key}: {able[0]}`")
    raise BadData(f"has no column of {what}: it has {there}")


def _features(schema: pa.Schema) -> dict[str, Any]:
    """Hugging Face's description of the columns; empty if the file has none."""
    said = (schema.metadata or {}).get(HUGGING_FACE, b"{}")
    try:
        if len(said) > LARGEST_METADATA:
            raise ValueError(f"it has {len(said):,} bytes")
        features = (json.loads(said).get("info") or {}).get("features") or {}
        if not all(isinstance(feature, dict | list) for feature in features.values()):
            raise ValueError("a feature is no mapping")
    except (ValueError, AttributeError, RecursionError) as error:
        raise BadData("has a damaged `huggingface` metadata: write the file anew, without it") from error
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)}


def _class_names(feature: Any, label: str) -> list[str] | None:
    """The class names of a ClassLabel.

    Raises:
        BadData: they are none.
    """
    names = (feature or {}).get("names")
    if names is None:
        return None
    texts = isinstance(names, list) and all(isinstance(name, str) and 0 < len(name) <= TEXT for name in names)
    if not texts or not names or len(set(names)) < len(names) or len(names) > CLASSES:
        raise BadData(f"has no usable class names for {label} in its `huggingface` metadata: name them with `classes`")
    return list(names)


def _labels(parquet: pq.ParquetFile, label: str) -> pa.ChunkedArray:
    labels = parquet.read(columns=[label]).column(0)
    if labels.null_count:
        raise BadData(f"has {labels.null_count:,} rows without a {label}")
    if not pa.types.is_dictionary(labels.type):
        return labels.cast(pa.int64())
    labels = labels.unify_dictionaries()
    texts = labels.chunk(0).dictionary if labels.num_chunks else pa.array([], pa.string())
    if len(texts) > CLASSES or (pc.max(pc.binary_length(texts)).as_py() or 0) > TEXT:
        raise BadData(f"has {len(texts):,} different texts as {label}, at most {CLASSES:,} of {TEXT:,} bytes")
    return labels


def _refuse_unlike(tables: Sequence[_Table]) -> None:
    """Refuse files whose columns or class names differ."""
    for other in tables[1:]:
        for what in ("column", "label", "textual", "names"):
            if getattr(other, what) != getattr(tables[0], what):
                said = {"column": "images", "label": "labels", "textual": "kind of label", "names": "class names"}[what]
                raise BadInput(f"{other.url} has other {said} than {tables[0].url}: the files are not of one dataset")


def _names(tables: Sequence[_Table], load: Parquet) -> list[str] | None:
    """The class names; None for labels that are numbers without names."""
    if isinstance(load.classes, list):
        return load.classes
    if tables[0].names is not None:
        return tables[0].names
    if not tables[0].textual:
        return None
    if isinstance(load.classes, int):
        raise BadInput(f"{tables[0].url} has texts as {tables[0].label}: list the class names in `classes`")
    return sorted({text for table in tables for text in _texts(table)})


def _texts(table: _Table) -> list[str]:
    if not table.labels.num_chunks:
        return []
    with blaming(table.url):
        texts: list[str] = table.labels.chunk(0).dictionary.to_pylist()
        return texts


def _numbers(table: _Table, names: list[str] | None, load: Parquet) -> np.ndarray:
    """The labels of a file as class numbers."""
    count = len(names) if names is not None else load.classes if isinstance(load.classes, int) else CLASSES
    if table.textual:
        number = {name: at for at, name in enumerate(names or ())}
        texts = _texts(table)
        lookup = np.array([number.get(text, -1) for text in texts], dtype=np.int64)
        found = lookup[_indices(table.labels)]
    else:
        found = table.labels.to_numpy()
    if len(wrong := np.flatnonzero((found < 0) | (found >= count))):
        row = int(wrong[0])
        expected = "one of the class names" if table.textual else f"a whole number from 0 to {count - 1}"
        raise BadInput(
            f"{table.url}: row {row} has {table.label} {shown(table.labels[row].as_py())}, expected {expected}"
        )
    return np.asarray(found, dtype=np.int64)


def _indices(labels: pa.ChunkedArray) -> np.ndarray:
    parts = [chunk.indices.to_numpy(zero_copy_only=False) for chunk in labels.chunks]
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts]).astype(np.int64)


def _kind(items: dict[str, Images]) -> str | None:
    """The format in which files are kept: that of some images of each split, if they have the same one."""
    formats = set[str]()
    for images in items.values():
        tried = few(images)
        with Files(item.ref for item in tried) as files:
            for item in tried:
                try:
                    formats.add(open_image(files.fetch(item.ref), 3).format)
                except (BadData, OSError):  # `read` reports it with its place
                    continue
    kinds = {suffix for suffix, name in KEPT.items() if name in formats}
    return kinds.pop() if len(kinds) == len(formats) == 1 else None
