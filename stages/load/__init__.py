"""Where clean images come from: list a source, spread it over shards, read one shard of it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stages.errors import BadData, BadInput
from stages.images import decode
from stages.limits import SHARDS
from stages.load.arrays import list_digits, list_torchvision
from stages.load.files import Files, place_of
from stages.load.folder import RESTRICTED_IMAGENET, list_folder
from stages.load.listing import Images, Item, Listing
from stages.load.synthetic import list_synthetic, synthetic
from stages.load.webdataset import list_webdataset
from stages.recipes import Digits, ImageFolder, Load, Synthetic, Torchvision, WebDataset
from stages.seeds import generator
from stages.shard import Failure, Shard

__all__ = ["RESTRICTED_IMAGENET", "Images", "Item", "Listing", "list_source", "read", "spread"]


def list_source(load: Load, data: Path, fetch: bool = True) -> Listing:
    """List a source.

    Args:
        load: which source, and how.
        data: the folder that relative paths start from.
        fetch: whether a torchvision dataset that is not there may be downloaded, if the recipe allows it too.

    Raises:
        BadInput: the source is missing, empty or damaged, or the class map does not fit.
    """
    match load:
        case Digits():
            listing = list_digits(load)
        case Torchvision():
            listing = list_torchvision(load, data, fetch)
        case ImageFolder():
            listing = list_folder(load, data)
        case WebDataset():
            listing = list_webdataset(load, data)
        case Synthetic():
            listing = list_synthetic(load)
    for split, items in listing.items.items():
        if not items:
            raise BadInput(f"the source is empty: split {split} of {load.source} has no images")
        if load.limit is not None and load.limit < len(items):
            kept = generator(load.seed, f"limit/{split}").permutation(len(items))[: load.limit]
            listing.items[split] = items[np.sort(kept)]
    return listing


def spread(listing: Listing, load: Load) -> dict[str, Images]:
    """Spread a source over shards with a seeded permutation, so that each is a fair sample of its split.

    Returns:
        Shard name → its images.

    Raises:
        BadInput: there would be too many.
    """
    if (count := sum(-(-len(items) // load.shard_size) for items in listing.items.values())) > SHARDS:
        raise BadInput(f"shard_size {load.shard_size} makes {count:,} shards, at most {SHARDS:,} are made: raise it")
    shards = {}
    for split, items in listing.items.items():
        order = generator(load.seed, f"order/{split}").permutation(len(items))
        for number, first in enumerate(range(0, len(order), load.shard_size)):
            shards[f"{split}-{number:06d}"] = items[order[first : first + load.shard_size]]
    return shards


def read(load: Load, name: str, items: Sequence[Item], channels: int, suffix: str | None) -> Shard:
    """Fetch and decode, or make, the images of one shard.

    An image that cannot be decoded is left out and becomes a Failure; the rest goes on.

    Args:
        load: the source.
        name: the shard's name.
        items: its images.
        channels: 1 or 3.
        suffix: kind of the files, if they are to be kept as they are.

    Raises:
        BadData: more than ``load.max_undecodable`` of the images failed.
        ConnectionError: an object store was away for about a minute; that is no fault of the images.
    """
    resize, crop = getattr(load, "resize", None), getattr(load, "crop", None)
    kept, pixels, files, failures = [], [], [], []
    with Files([item.ref for item in items]) as opened:
        for item in items:
            try:
                if isinstance(load, Synthetic):
                    pixels.append(synthetic(load, item))
                elif isinstance(item.ref, np.ndarray):
                    pixels.append(item.ref)
                else:
                    file = opened.fetch(item.ref)
                    pixels.append(decode(file, channels, resize, crop))
                    files.append(file)
                kept.append(item)
            except ConnectionError:
                raise
            except (BadData, OSError) as error:
                failures.append(Failure(item.index, item.label, f"{place_of(item.ref)}: {error}"))
    if len(failures) > load.max_undecodable * len(items):
        raise BadData(
            f"{len(failures)} of {len(items)} images failed, more than max_undecodable "
            f"{load.max_undecodable:g} allows; the first: {failures[0].error}"
        )
    if not kept:
        raise BadData(f"none of {len(items)} images decodes; the first: {failures[0].error}")
    uniform = len({image.shape for image in pixels}) == 1
    if suffix is None and not uniform:
        raise BadData("images of differing sizes and kinds: add resize and crop")
    labels = np.array([item.label for item in kept], dtype=np.int64)
    return Shard(
        name=name,
        index=np.array([item.index for item in kept], dtype=np.int64),
        label=labels,
        source_label=labels.copy(),
        pixels=np.stack(pixels) if uniform else None,
        files=files if suffix is not None else None,
        suffix=suffix or "png",
        failures=failures,
    )
