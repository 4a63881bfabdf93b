"""``samples.webp``: a few samples of a dataset in one picture, for its card and for the index."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pipeline.report.gallery import CARDS, head, one_per_class
from pipeline.run import artifacts
from pipeline.run.artifacts import Artifact
from pipeline.store import Store
from stages.errors import BadData
from stages.images import decode
from stages.shard import Sample

NAME = "samples.webp"

CELL, GAP = 64, 4
"""Side of a sample in the picture, and the space around it, in pixels."""

BEGINNING = 4_000_000
"""Bytes read from the beginning of a shard."""


@dataclass(frozen=True)
class Pictures:
    """Samples of a dataset, side by side.

    Attributes:
        picture: a WebP image; below each original, the saved image.
        shard: the shard whose first samples they are.
        rows: what the rows show, from top to bottom.
        labels: true class and label of each column.
        facts: columns of ``samples.parquet`` that each sample's JSON holds besides index, split and source label.
    """

    picture: bytes
    shard: str
    rows: Sequence[str]
    labels: Sequence[tuple[str, str]]
    facts: Sequence[str]


def pictures(store: Store, made: Artifact) -> Pictures | None:
    """The first samples of each class in the first shard; None if they cannot be read.

    The originals are shown where the dataset they came from is in the store, has the same bytes as then, and looks
    different.
    """
    manifest = made.manifest
    shard, classes, channels = min(manifest["shards"]), manifest["classes"], manifest["channels"]
    saved = head(store, made.folder, shard, len(classes), BEGINNING)
    chosen = one_per_class([(index, sample.facts.source_label) for index, sample in saved.items()], CARDS)
    try:
        after = [_cell(saved[index], channels) for index in chosen]
        before = [_cell(found, channels) for found in _originals(store, manifest, shard, chosen)]
    except BadData:  # damage is for `verify` to report
        return None
    if not after:
        return None
    changed = len(before) == len(after) and any(
        not np.array_equal(one, other) for one, other in zip(before, after, strict=True)
    )
    labels = [(classes[saved[i].facts.source_label], classes[saved[i].label]) for i in chosen]
    rows = [before, after] if changed else [after]
    said = ["original", "saved"] if changed else ["saved"]
    return Pictures(_webp(rows), shard, said, labels, list(saved[chosen[0]].facts.attack))


def _originals(store: Store, manifest: Mapping[str, Any], shard: str, chosen: Sequence[int]) -> list[Sample]:
    parent = manifest["parents"].get("images")
    if parent is None:
        return []
    folder = f"{parent['node']}/{parent['version']}"
    there = artifacts.artifact_at(store, folder)
    if there is None or there.content != parent["content"]:
        return []
    found = head(store, there.folder, shard, len(there.manifest["classes"]), BEGINNING)
    return [found[index] for index in chosen if index in found]


def _cell(sample: Sample, channels: int) -> np.ndarray:
    """A sample as `CELL` × `CELL` × 3: small images enlarged by whole pixels, large ones reduced."""
    pixels = decode(sample.file, channels)
    image = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels).convert("RGB")
    if (times := CELL // max(image.size)) > 1:
        image = image.resize((times * image.width, times * image.height), Image.Resampling.NEAREST)
    image.thumbnail((CELL, CELL))
    cell = Image.new("RGB", (CELL, CELL), "white")
    cell.paste(image, ((CELL - image.width) // 2, (CELL - image.height) // 2))
    return np.asarray(cell)


def _webp(rows: Sequence[Sequence[np.ndarray]]) -> bytes:
    step = CELL + GAP
    sheet = Image.new("RGB", (step * len(rows[0]) - GAP, step * len(rows) - GAP), "white")
    for y, row in enumerate(rows):
        for x, cell in enumerate(row):
            sheet.paste(Image.fromarray(cell), (step * x, step * y))
    out = io.BytesIO()
    sheet.save(out, "webp", quality=85)
    return out.getvalue()
