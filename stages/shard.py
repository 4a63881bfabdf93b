"""One shard: images of one split with their labels and measurements, in memory and as a tar.

The tar is a standard WebDataset shard: for each sample ``{index:08d}.png`` (or the original file, if kept), ``.cls``
(the label to train on) and ``.json`` (the rest). Equal shards have equal bytes: members have a fixed order, mtime 0,
uid 0.
"""

import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stages.errors import BadData
from stages.images import ENCODED, KEPT, decode, encode
from stages.limits import CLASSES, MEMORY
from stages.tar import FILE, shortened, walk

SUFFIXES = tuple(KEPT)
"""Image formats in a shard."""

COLUMNS: dict[str, pa.DataType] = {
    "key": pa.string(),
    "index": pa.int64(),
    "split": pa.string(),
    "shard": pa.string(),
    "label": pa.int64(),
    "source_label": pa.int64(),
    "target": pa.int64(),
    "success": pa.bool_(),
    "success_step": pa.int64(),
    "margin": pa.float32(),
    "confidence": pa.float32(),
    "l2": pa.float64(),
    "linf": pa.float64(),
    "distance": pa.float32(),
    "error": pa.string(),
    "offset": pa.int64(),
    "size": pa.int64(),
}
"""Columns of ``samples.parquet``, in order; documented in `docs/data-format.md`."""


def shard_name(split: str, number: int) -> str:
    """``train`` and 3 → ``train-000003``."""
    return f"{split}-{number:06d}"


def split_of(name: str) -> str:
    """``train-000003`` → ``train``."""
    return name.rpartition("-")[0]


@dataclass(frozen=True)
class Failure:
    """An image that was left out, and why."""

    index: int
    source_label: int | None
    error: str


class Pixels:
    """Collects the images of a shard, and holds them as long as all have one shape.

    Args:
        name: the shard's name.

    Attributes:
        uniform: whether all images so far have one shape.
    """

    def __init__(self, name: str) -> None:
        self.name, self.uniform, self.size = name, True, 0
        self.held: list[np.ndarray] = []

    def add(self, image: np.ndarray) -> None:
        """Add an image, H × W × C, uint8.

        Raises:
            BadData: the images take more than `MEMORY`.
        """
        self.uniform = self.uniform and (not self.held or image.shape == self.held[0].shape)
        if not self.uniform:
            self.held.clear()
            return
        self.held.append(image)
        self.size += image.nbytes
        if self.size > MEMORY:
            raise BadData(
                f"{self.name} holds images of more than {MEMORY / 2**30:g} GiB: lower shard_size, or add resize"
            )

    def array(self) -> np.ndarray | None:
        """The images, N × H × W × C; None if their shapes differ, or there are none."""
        return np.stack(self.held) if self.held else None


@dataclass(frozen=True)
class Shard:
    """N images of one split.

    Attributes:
        name: ``<split>-<six digits>``.
        index: N, int64; position in the source, which is unique over its splits.
        label: N, int64; the label to train on.
        source_label: N, int64; the source's label.
        pixels: N × H × W × C, uint8; None if the images differ in size.
        files: the original files, N of them; None if the pixels are to be encoded.
        suffix: format of the files: png, jpg or webp.
        attack: N each; an attack's columns of ``samples.parquet``.
        failures: images that were left out.
        contents: sha256 of the file that each image of the source was read from, also of those left out; None for a
            file that could not be read, or if there were none.
    """

    name: str
    index: np.ndarray
    label: np.ndarray
    source_label: np.ndarray
    pixels: np.ndarray | None
    files: list[bytes] | None = None
    suffix: str = ENCODED
    attack: dict[str, np.ndarray] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    contents: Sequence[str | None] | None = None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def split(self) -> str:
        return split_of(self.name)

    def changed(
        self, pixels_NHWC: np.ndarray, attack: dict[str, np.ndarray], label: np.ndarray | None = None
    ) -> "Shard":
        """This shard with other pixels, and other labels where given; its files and failures are left behind.

        Args:
            pixels_NHWC: uint8.
            attack: columns of what was done to each image, N each.
            label: N, int64.
        """
        return replace(
            self,
            label=self.label if label is None else label,
            pixels=pixels_NHWC,
            files=None,
            suffix=ENCODED,
            attack=attack,
            failures=[],
        )

    def images(self) -> np.ndarray:
        """The pixels, N × H × W × C.

        Raises:
            BadData: this shard holds files of differing sizes.
        """
        if self.pixels is None:
            raise BadData(f"{self.name} holds images of differing sizes: load them with resize and crop")
        return self.pixels


def rows(shard: Shard, tar: bytes) -> pa.Table:
    """The rows of ``samples.parquet`` for this shard, packed as a tar: one per sample and per failure, by COLUMNS."""
    done, lost = len(shard), shard.failures
    places = list(_places(tar, done))
    values: dict[str, list[Any]] = {
        "index": [*shard.index.tolist(), *(f.index for f in lost)],
        "label": [*shard.label.tolist(), *(None for _ in lost)],
        "source_label": [*shard.source_label.tolist(), *(f.source_label for f in lost)],
        "error": [*(None for _ in range(done)), *(f.error for f in lost)],
        "offset": [*(offset for offset, _ in places), *(None for _ in lost)],
        "size": [*(size for _, size in places), *(None for _ in lost)],
    }
    values["key"] = [key(i) for i in values["index"]]
    values["split"] = [shard.split] * (done + len(lost))
    values["shard"] = [shard.name] * (done + len(lost))
    for name in COLUMNS:
        if name not in values:
            column = shard.attack.get(name)
            values[name] = [
                *(column.tolist() if column is not None else [None] * done),
                *(None for _ in lost),
            ]
    return pa.table({name: pa.array(values[name], kind) for name, kind in COLUMNS.items()})


def _places(tar: bytes, count: int) -> Iterator[tuple[int, int]]:
    """Offset and size of each sample's image, the first of its three members, in a tar that `pack` wrote."""
    at = 0
    for _ in range(count):
        sizes = []
        for _member in range(3):
            sizes.append((at + tarfile.BLOCKSIZE, int(tar[at + 124 : at + 135], 8)))
            at = sum(sizes[-1]) + -sizes[-1][1] % tarfile.BLOCKSIZE
        yield sizes[0]


def key(index: int) -> str:
    """The name of a sample in its shard."""
    return f"{index:08d}"


def pack(shard: Shard) -> bytes:
    """The shard as a tar."""
    encoded = shard.files if shard.files is not None else [encode(image) for image in shard.images()]
    facts = {name: column.tolist() for name, column in shard.attack.items()}
    parts: list[bytes] = []
    for i, (index, label) in enumerate(zip(shard.index.tolist(), shard.label.tolist(), strict=True)):
        rest = {"index": index, "split": shard.split, "source_label": int(shard.source_label[i])}
        rest |= {name: _short(column[i]) for name, column in facts.items()}
        for suffix, content in (
            (shard.suffix, encoded[i]),
            ("cls", str(label).encode()),
            ("json", json.dumps(rest, separators=(",", ":")).encode()),
        ):
            parts += _member(f"{key(index)}.{suffix}", content)
    body = b"".join(parts)
    end = 2 * tarfile.BLOCKSIZE
    return body + bytes(end + -(len(body) + end) % tarfile.RECORDSIZE)


def _member(name: str, content: bytes) -> tuple[bytes, bytes, bytes]:
    """A member of a tar: header, content, and zeros up to a whole block.

    The bytes of ``TarFile.addfile`` in a fifth of its time, which took half of `pack` for small images.
    """
    header = bytearray(HEADER)
    header[: len(name)] = name.encode()
    header[124:135] = b"%011o" % len(content)
    header[148:155] = b"%06o\0" % sum(header)
    return bytes(header), content, bytes(-len(content) % tarfile.BLOCKSIZE)


def _header() -> bytes:
    """The header of a file without name and size. Its checksum field holds spaces, as tar requires while summing."""
    member = tarfile.TarInfo()
    member.mode = 0o644
    header = member.tobuf(tarfile.USTAR_FORMAT)
    return header[:124] + bytes(12) + header[136:148] + b" " * 8 + header[156:]


HEADER = _header()


def _short(value: Any) -> Any:
    return round(value, 7) if isinstance(value, float) else value


class Facts(BaseModel):
    """The json of a sample; columns of an attack are optional."""

    model_config = ConfigDict(strict=True, frozen=True)

    index: int = Field(ge=0, lt=2**63)
    split: str
    source_label: int = Field(ge=0)
    target: int = Field(0, ge=0)
    success: bool = False
    success_step: int = Field(-1, ge=-1, le=10**6)
    margin: float = 0.0
    confidence: float = 0.0
    l2: float = 0.0
    linf: float = 0.0
    distance: float = 0.0

    @property
    def attack(self) -> dict[str, Any]:
        """The attack's columns of ``samples.parquet`` that are present, in order."""
        said = self.model_fields_set - {"index", "split", "source_label"}
        return {column: getattr(self, column) for column in COLUMNS if column in said}


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample: the image file, its suffix, the label, and the rest."""

    file: bytes
    suffix: str
    label: int
    facts: Facts


def samples(name: str, tar: bytes, classes: int = CLASSES) -> Iterator[Sample]:
    """The samples of a shard, validated against the format of `pack`: a store may be damaged or untrusted.

    Args:
        name: the shard's.
        tar: its bytes, or the first of them.
        classes: number of classes; labels are smaller.

    Raises:
        BadData: the tar or a sample does not have the format of `pack`; the message names shard and sample.
    """
    try:
        for sample, content in members(tar):
            yield _sample(shortened(sample), content, split_of(name), classes)
    except BadData as error:
        raise BadData(f"{name} {error}") from error


def _sample(sample: str, content: dict[str, bytes], split: str, classes: int) -> Sample:
    suffix = next(iter(content))
    if list(content) != [suffix, "cls", "json"] or suffix not in SUFFIXES:
        raise BadData(f"holds sample {sample} with members {', '.join(content)}, expected an image, cls and json")
    try:
        facts = Facts.model_validate_json(content["json"])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "".join(f" of {part}" for part in first["loc"])
        raise BadData(f"holds sample {sample} with a damaged json{place}: {first['msg']}") from error
    label = int(content["cls"]) if re.fullmatch(rb"[0-9]{1,9}", content["cls"]) else classes
    if max(label, facts.source_label, facts.target) >= classes:
        raise BadData(f"holds sample {sample} with a label that is not a number below {classes}")
    if (key(facts.index), facts.split) != (sample, split):
        raise BadData(f"holds sample {sample}, which its json calls {key(facts.index)} of {facts.split}")
    return Sample(content[suffix], suffix, label, facts)


def members(tar: bytes) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a tar in order: key, and content by suffix.

    Raises:
        BadData: the tar is invalid, truncated or damaged, or has a duplicate member or one that is no file.
    """
    for sample, group in groupby(walk(io.BytesIO(tar)), key=lambda member: member.name.partition(".")[0]):
        content = dict[str, bytes]()
        for member in group:
            suffix = member.name.partition(".")[2]
            if member.kind != FILE or suffix in content:
                raise BadData(f"holds {shortened(member.name)} twice, or not as a file")
            content[suffix] = tar[member.offset : member.offset + member.size]
        yield sample, content


def unpack(name: str, tar: bytes, channels: int, classes: int = CLASSES) -> Shard:
    """Read a shard written by `pack`, and decode its pixels.

    Args:
        name, tar, classes: as in `samples`.
        channels: 1 or 3.

    Raises:
        BadData: as in `samples`; or an image is damaged; or samples have different columns.
    """
    found, pixels = list(samples(name, tar, classes)), Pixels(name)
    for sample in found:
        try:
            image = decode(sample.file, channels)
        except BadData as error:
            raise BadData(f"{name} holds sample {key(sample.facts.index)}, whose image {error}") from error
        pixels.add(image)
    facts = [sample.facts for sample in found]
    if len({(sample.suffix, *sample.facts.attack) for sample in found}) != 1:
        raise BadData(f"{name} holds {'samples with other members or facts than the first' if found else 'no sample'}")
    if len({each.index for each in facts}) < len(facts):
        raise BadData(f"{name} holds two samples of one index")
    return Shard(
        name=name,
        index=np.array([each.index for each in facts], dtype=np.int64),
        label=np.array([sample.label for sample in found], dtype=np.int64),
        source_label=np.array([each.source_label for each in facts], dtype=np.int64),
        pixels=pixels.array(),
        files=[sample.file for sample in found],
        suffix=found[0].suffix,
        attack={column: np.array([getattr(each, column) for each in facts]) for column in facts[0].attack},
    )
