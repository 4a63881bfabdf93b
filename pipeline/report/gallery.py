"""Images that a person can check: the original, what was done to it, and what was saved, with both labels."""

import base64
import io
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pipeline.experiment.graph import Node
from pipeline.report.results import Gathered
from pipeline.store import ABSENT
from stages.errors import BadData
from stages.images import decode
from stages.shard import Sample, samples

SHOWN = 10
"""Samples of a dataset that are shown."""

HEAD = 8_000_000
"""Bytes of a shard that are read to show them: its first samples, however large it is."""

SIDE = 160
"""Larger images are shown at this size, in pixels."""


@dataclass(frozen=True)
class Card:
    """One sample: three images as data URLs, the true class, the label it was saved with, and what was measured."""

    original: str
    change: str
    saved: str
    truth: str
    label: str
    said: str


@dataclass(frozen=True)
class Gallery:
    """Samples of a dataset, how their changes are shown, and how many bytes all of that takes."""

    title: str
    text: str
    cards: list[Card]
    size: int


def gallery(found: Gathered, dataset: Node) -> Gallery | None:
    """The first sample of each class in the first shard; None where the originals are not there, or damaged."""
    manifest, parent = found.manifests[dataset.id], dataset.inputs["images"].id
    if parent not in found.manifests or not manifest["shards"]:
        return None
    shard = min(manifest["shards"])
    clean, saved = (_head(found, node, shard) for node in (parent, dataset.id))
    keys = _one_per_class([(key, sample.facts.source_label) for key, sample in saved.items() if key in clean])
    channels = manifest["channels"]
    try:
        pairs = [(_pixels(clean[key], channels), _pixels(saved[key], channels)) for key in keys]
    except BadData:  # damage is for `verify` to report
        return None
    pairs = [(before, after) for before, after in pairs if before.shape == after.shape]
    if not pairs or len(pairs) < len(keys):
        return None
    scale = _magnification(max(float(np.abs(after - before).max()) for before, after in pairs))
    cards = [
        _card(saved[key], before, after, scale, manifest["classes"])
        for key, (before, after) in zip(keys, pairs, strict=True)
    ]
    size = sum(len(card.original) + len(card.change) + len(card.saved) for card in cards)
    return Gallery(dataset.name, _text(dataset, shard, scale), cards, size)


def _head(found: Gathered, node: str, shard: str) -> dict[int, Sample]:
    """Index → sample, of those that lie whole in the first bytes of a shard."""
    there: dict[int, Sample] = {}
    with suppress(BadData, *ABSENT):  # what is left is cut, or damaged
        tar = found.store.read(f"{found.folder(node)}/{shard}.tar", first=HEAD)
        for sample in samples(shard, tar, len(found.manifests[node]["classes"])):
            there[sample.facts.index] = sample
    return there


def _one_per_class(samples: list[tuple[int, int]]) -> list[int]:
    """The first sample of each class, then the others, in the order of classes: as many as are shown."""
    first = list({truth: (key, truth) for key, truth in reversed(samples)}.values())
    rest = [sample for sample in samples if sample not in first]
    return [key for key, _ in sorted([*first, *rest][:SHOWN], key=lambda sample: sample[1])]


def _pixels(sample: Sample, channels: int) -> np.ndarray:
    """Pixels in [0, 1], H × W × C."""
    return decode(sample.file, channels).astype(np.float32) / 255


def _magnification(largest: float) -> int:
    """How many times a change can be magnified, the largest at most to the full range, rounded to one digit."""
    if largest == 0:
        return 1
    times = max(1.0, 0.5 / largest)
    unit = 10 ** math.floor(math.log10(times))
    return int(times // unit * unit)


def _card(sample: Sample, before: np.ndarray, after: np.ndarray, scale: int, classes: list[str]) -> Card:
    return Card(
        original=url(before),
        change=url(np.clip(0.5 + scale * (after - before), 0, 1)),
        saved=url(after),
        truth=classes[sample.facts.source_label],
        label=classes[sample.label],
        said=_measured(sample.facts.attack),
    )


def _measured(attack: Mapping[str, Any]) -> str:
    if {"success", "confidence"} <= set(attack):
        return f"{'success' if attack['success'] else 'no success'}, {100 * attack['confidence']:.0f} %"
    return f"distance {attack['distance']:.2g}" if "distance" in attack else ""


def url(pixels: np.ndarray) -> str:
    """Pixels in [0, 1], H × W × C, as a data URL: small images as they are, large ones reduced."""
    levels = np.round(255 * pixels).astype(np.uint8)
    image = Image.fromarray(levels[:, :, 0] if levels.shape[2] == 1 else levels)
    kind = "png" if max(image.size) <= SIDE // 2 else "webp"
    image.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    image.save(out, kind, quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"


def _text(dataset: Node, shard: str, scale: int) -> str:
    times = f"magnified {scale} times" if scale > 1 else "not magnified"
    if dataset.stage == "invert":
        labels = f"a small distance says that {dataset.recipe.model} represents both alike; the label is the true one"
    elif dataset.recipe.model is None:
        labels = "the label is that of the rule, whatever the image shows"
    else:
        labels = f"below, whether {dataset.recipe.model} answers the new label, and how sure it is of it"
    return (
        f"From top to bottom: the original; the change, {times}, grey where there is none; the image as it was saved, "
        f"with the label that it was given. {labels[0].upper()}{labels[1:]}. These are the first samples of their "
        f"class in {shard}, not chosen."
    )
