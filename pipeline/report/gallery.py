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
from stages.recipes import Attack
from stages.shard import Sample, samples

CARDS = 10
"""Samples shown of a dataset whose attack has no target to reach."""

REACHED, MISSED = 6, 4
"""Samples shown that reached their target, and that did not."""

HEAD = 8_000_000
"""Bytes read from the beginning of a shard to show its first samples, however large it is."""

SIDE = 512
"""Longer side to which larger images are reduced, in pixels."""

SHOWN = 0.99
"""Share of the values whose change is shown without clipping: a few large ones would leave the rest grey."""

SMALL = 80
"""Longest side of images that a card shows pixel by pixel. Larger ones also open at full size."""


@dataclass(frozen=True)
class Card:
    """One sample.

    Attributes:
        original, change, saved: images as data URLs.
        times: how the change is magnified.
        truth, label: the true class and the saved label.
        measured: what the attack measured.
        large: whether the images are larger than a card.
    """

    original: str
    change: str
    saved: str
    times: str
    truth: str
    label: str
    measured: str
    large: bool


@dataclass(frozen=True)
class Group:
    """Samples chosen by one rule, which the title states."""

    title: str
    cards: list[Card]


@dataclass(frozen=True)
class Gallery:
    """Samples of a dataset, a description of how their changes are shown, and the bytes of all images."""

    title: str
    text: str
    groups: list[Group]
    size: int


def gallery(run: RunResults, dataset: Node) -> Gallery | None:
    """Samples of the first shard, chosen by stated rules; None if the originals are missing or damaged."""
    manifest, parent = run.manifests[dataset.id], dataset.inputs["images"].id
    if parent not in run.manifests or not manifest["shards"]:
        return None
    shard = min(manifest["shards"])
    clean, saved = (
        head(run.store, run.folder(node), shard, len(run.manifests[node]["classes"])) for node in (parent, dataset.id)
    )
    chosen = _chosen({key: sample for key, sample in saved.items() if key in clean}, shard, aims(dataset))
    keys = [key for _, some in chosen for key in some]
    channels = manifest["channels"]
    try:
        pairs = {key: (_pixels(clean[key], channels), _pixels(saved[key], channels)) for key in keys}
    except BadData:  # damage is for `verify` to report
        return None
    if not pairs or any(before.shape != after.shape for before, after in pairs.values()):
        return None
    changes = np.concatenate([np.abs(after - before).ravel() for before, after in pairs.values()])
    scale = _magnification(float(np.quantile(changes, SHOWN)))
    groups = [
        Group(title, [_card(saved[key], *pairs[key], scale, manifest["classes"]) for key in some])
        for title, some in chosen
    ]
    cards = [card for group in groups for card in group.cards]
    size = sum(len(card.original) + len(card.change) + len(card.saved) for card in cards)
    measured = {fact for key in keys for fact in saved[key].facts.attack}
    return Gallery(dataset.name, _text(dataset, scale, measured), groups, size)


def aims(dataset: Node) -> bool:
    """Whether the images were moved toward a target: noise and leakage-only controls have one, but do not aim at it."""
    return isinstance(dataset.recipe, Attack) and dataset.recipe.method in ("pgd", "universal", "spatial")


def _chosen(there: Mapping[int, Sample], shard: str, aimed: bool) -> list[tuple[str, list[int]]]:
    """Rule → the samples that it chooses: those that reached their target and those that missed, if they were aimed."""
    classes = {key: sample.facts.source_label for key, sample in there.items()}
    if not aimed or not all(set(sample.facts.attack) >= ANSWER for sample in there.values()):
        keys = one_per_class(list(classes.items()), CARDS)
        return [(f"{len(keys)} images of shard {shard}, every class once before any twice", keys)]
    chosen = []
    for reached, word, most in ((True, "Reached", REACHED), (False, "Missed", MISSED)):
        fitting = [(key, classes[key]) for key, one in there.items() if bool(one.facts.attack["success"]) == reached]
        keys = one_per_class(fitting, most)
        count = f"{len(fitting):,} of the {len(there):,} images read from shard {shard}"
        some = f"; {len(keys)} shown, every class once before any twice" if len(keys) < len(fitting) else ""
        chosen.append((f"{word} the target: {count}{some}", keys))
    return chosen


def head(store: Store, folder: str, shard: str, classes: int, first: int | None = None) -> dict[int, Sample]:
    """Index → sample, for the samples that lie whole in the first bytes, by default `HEAD`, of a dataset's shard."""
    there: dict[int, Sample] = {}
    with suppress(BadData, *ABSENT):  # the rest is cut off, or damaged
        tar = store.read(f"{folder}/{shard}.tar", first=first or HEAD)
        for sample in samples(shard, tar, classes):
            there[sample.facts.index] = sample
    return there


def one_per_class(samples: list[tuple[int, int]], most: int) -> list[int]:
    """Keys of samples: the first of each class, then others, in the order of classes."""
    first = list({truth: (key, truth) for key, truth in reversed(samples)}.values())[::-1]
    rest = [sample for sample in samples if sample not in first]
    return [key for key, _ in sorted([*first, *rest][:most], key=lambda sample: sample[1])]


def _pixels(sample: Sample, channels: int) -> np.ndarray:
    """Pixels in [0, 1], H × W × C."""
    return decode(sample.file, channels).astype(np.float32) / 255


def _magnification(largest: float) -> int:
    """The factor, rounded to one digit, that magnifies a change at most to the full range."""
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
        times=f"× {scale}",
        truth=classes[sample.facts.source_label],
        label=classes[sample.label],
        measured=_measured(sample.facts.attack),
        large=max(before.shape[:2]) > SMALL,
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
    kind = "png" if max(image.size) <= SMALL else "webp"
    image.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    image.save(out, kind, quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"


def _text(dataset: Node, scale: int, measured: set[str]) -> str:
    times = f"magnified {scale} times" if scale > 1 else "not magnified"
    model = dataset.inputs["model"].name if "model" in dataset.inputs else "the model"
    if measured >= DISTANCE:
        labels = f"A small distance means that {model} represents both alike; the label is the true one"
    elif measured >= ANSWER:
        labels = f"Below: whether {model} classifies the saved image as its label, and the confidence in that label"
    else:
        labels = "The rule assigns the label, whatever the image shows"
    return (
        f"From top to bottom: the original; the change, {times}, grey where there is none; the saved image with its "
        f"label. {labels}."
    )
