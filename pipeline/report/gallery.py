"""Images for a person to check: the original, the change, and the saved image, with both labels."""

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
from pipeline.report.results import RunResults
from pipeline.store import ABSENT, Store
from stages.errors import BadData
from stages.images import decode
from stages.shard import Sample, samples

CARDS = 10
"""Samples shown of a dataset."""

HEAD = 8_000_000
"""Bytes read from the beginning of a shard to show its first samples, however large it is."""

SIDE = 160
"""Longer side to which larger images are reduced, in pixels."""


@dataclass(frozen=True)
class Card:
    """One sample: three images as data URLs, the true class, the saved label, and the measurements of the attack."""

    original: str
    change: str
    saved: str
    truth: str
    label: str
    measured: str


@dataclass(frozen=True)
class Gallery:
    """Samples of a dataset, a description of how their changes are shown, and the bytes of all images."""

    title: str
    text: str
    cards: list[Card]
    size: int


def gallery(run: RunResults, dataset: Node) -> Gallery | None:
    """The first sample of each class in the first shard; None if the originals are missing or damaged."""
    manifest, parent = run.manifests[dataset.id], dataset.inputs["images"].id
    if parent not in run.manifests or not manifest["shards"]:
        return None
    shard = min(manifest["shards"])
    clean, saved = (
        head(run.store, run.folder(node), shard, len(run.manifests[node]["classes"])) for node in (parent, dataset.id)
    )
    keys = one_per_class([(key, sample.facts.source_label) for key, sample in saved.items() if key in clean])
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
    measured = {fact for key in keys for fact in saved[key].facts.attack}
    return Gallery(dataset.name, _text(dataset, shard, scale, measured), cards, size)


def head(store: Store, folder: str, shard: str, classes: int) -> dict[int, Sample]:
    """Index → sample, for the samples that lie whole in the first bytes of a shard of a dataset's folder."""
    there: dict[int, Sample] = {}
    with suppress(BadData, *ABSENT):  # the rest is cut off, or damaged
        tar = store.read(f"{folder}/{shard}.tar", first=HEAD)
        for sample in samples(shard, tar, classes):
            there[sample.facts.index] = sample
    return there


def one_per_class(samples: list[tuple[int, int]]) -> list[int]:
    """Keys of `CARDS` samples: the first of each class, then others, in the order of classes."""
    first = list({truth: (key, truth) for key, truth in reversed(samples)}.values())
    rest = [sample for sample in samples if sample not in first]
    return [key for key, _ in sorted([*first, *rest][:CARDS], key=lambda sample: sample[1])]


def _pixels(sample: Sample, channels: int) -> np.ndarray:
    """Pixels in [0, 1], H × W × C."""
    return decode(sample.file, channels).astype(np.float32) / 255


def _magnification(largest: float) -> int:
    """The factor, rounded to one digit, that magnifies the largest change at most to the full range."""
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
        measured=_measured(sample.facts.attack),
    )


ANSWER, DISTANCE = {"success", "confidence"}, {"distance"}
"""Facts that an attack on a model, and an inversion of its features, measure of a sample."""


def _measured(attack: Mapping[str, Any]) -> str:
    if set(attack) >= ANSWER:
        return f"{'reached' if attack['success'] else 'not reached'}, {100 * attack['confidence']:.0f} %"
    return f"distance {attack['distance']:.2g}" if set(attack) >= DISTANCE else ""


def url(pixels: np.ndarray) -> str:
    """Pixels in [0, 1], H × W × C, as a data URL: small images unchanged, large ones reduced."""
    levels = np.round(255 * pixels).astype(np.uint8)
    image = Image.fromarray(levels[:, :, 0] if levels.shape[2] == 1 else levels)
    kind = "png" if max(image.size) <= SIDE // 2 else "webp"
    image.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    image.save(out, kind, quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"


def _text(dataset: Node, shard: str, scale: int, measured: set[str]) -> str:
    times = f"magnified {scale} times" if scale > 1 else "not magnified"
    model = dataset.inputs["model"].name if "model" in dataset.inputs else "the model"
    if measured >= DISTANCE:
        labels = f"A small distance means that {model} represents both alike; the label is the true one"
    elif measured >= ANSWER:
        labels = f"Below: whether {model} classifies the saved image as its label, and the confidence in that label"
    else:
        labels = "The label is assigned by the rule, not by the image"
    return (
        f"From top to bottom: the original; the change, {times}, grey where there is none; the saved image with its "
        f"label. {labels}. These are the first samples of each class in {shard}, not chosen by hand."
    )
