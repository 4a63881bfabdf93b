"""Load clean images: list a source, assign its images to shards, read one shard."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from stages.errors import BadData, BadInput
from stages.images import ENCODED, encode, open_image
from stages.limits import CLASSES, SHARDS
from stages.load.arrays import list_digits, list_torchvision
from stages.load.files import Files, place_of
from stages.load.folder import RESTRICTED_IMAGENET, list_folder, place_in
from stages.load.listing import Images, Item, Listing, few, printable
from stages.load.parquet import list_parquet
from stages.load.stamps import GONE, Stamp, names_of_tars, stamp, stamps_of, stamps_of_images, stamps_of_tars
from stages.load.synthetic import list_synthetic, synthetic
from stages.load.webdataset import list_webdataset
from stages.recipes import Digits, ImageFolder, Load, Parquet, Synthetic, Torchvision, WebDataset
from stages.seeds import generator
from stages.shard import Failure, Pixels, Shard, shard_name

__all__ = [
    "GONE",
    "RESTRICTED_IMAGENET",
    "Images",
    "Item",
    "Listing",
    "Stamp",
    "assign_to_shards",
    "contents",
    "list_source",
    "names_of_tars",
    "printable",
    "probe",
    "read",
    "stamp",
    "stamps_of",
    "stamps_of_images",
    "stamps_of_tars",
]


def list_source(load: Load, data: Path, fetch: bool = True) -> Listing:
    """List a source.

    Args:
        load: the source and its settings.
        data: folder of relative paths.
        fetch: allow the download of a torchvision dataset, if the recipe allows it too.

    Raises:
        BadInput: the source is missing, empty or damaged, or the class map does not match.
    """
    match load:
        case Digits():
            listing = list_digits(load)
        case Torchvision():
            listing = list_torchvision(load, data, fetch)
        case ImageFolder():
            listing = list_folder(load, data)
            _refuse_if_damaged(load, listing, data)
        case Parquet():
            listing = list_parquet(load, data)
            _refuse_if_damaged(load, listing, data)
        case WebDataset():
            listing = list_webdataset(load, data)
        case Synthetic():
            listing = list_synthetic(load)
    if len(listing.classes) > CLASSES:
        raise BadInput(f"the source has {len(listing.classes):,} classes, at most {CLASSES:,} can be told apart")
    for split, items in listing.items.items():
        if not items:
            passed = ", ".join(f"{count} {reason}" for reason, count in listing.skipped.items())
            over = f"; passed over: {passed}" if passed else ""
            raise BadInput(f"the source is empty: split {split} of {load.source} has no images{over}")
        if load.limit is not None and load.limit < len(items):
            kept = generator(load.seed, f"limit/{split}").permutation(len(items))[: load.limit]
            listing.items[split] = items[np.sort(kept)]
    return listing


def _refuse_if_damaged(load: ImageFolder | Parquet, listing: Listing, data: Path) -> None:
    """Decode some images before anything is written, and refuse a source in which most fail."""
    for split, items in listing.items.items():
        tried, failed = few(items), []
        with Files(item.ref for item in tried) as files:
            for item in tried:
                try:
                    _read_one(load, item, files, listing.channels, listing.suffix)
                except ConnectionError as error:
                    raise BadInput(str(error)) from error
                except (BadData, OSError) as error:
                    failed.append(f"{place_of(item.ref)}: {_said(error)}")
        if 2 * len(failed) > len(tried):
            place = (
                f"image folder {place_in(load, split, data)}" if isinstance(load, ImageFolder) else load.files[split]
            )
            raise BadInput(f"{place}: {len(failed)} of {len(tried)} images tried fail; the first: {failed[0]}")


def probe(listing: Listing) -> tuple[list[tuple[int, int]], bool]:
    """Width and height of a few images of each split, and whether all are grey; unreadable ones are passed over.

    Raises:
        BadInput: none can be read, or their server is unavailable.
    """
    sizes, grey = list[tuple[int, int]](), True
    for items in listing.items.values():
        tried = few(items)
        with Files(item.ref for item in tried if not isinstance(item.ref, np.ndarray)) as files:
            for item in tried:
                try:
                    if isinstance(item.ref, np.ndarray):
                        sizes.append((item.ref.shape[1], item.ref.shape[0]))
                        grey = grey and item.ref.shape[2] == 1
                        continue
                    image = open_image(files.fetch(item.ref), 3)
                except ConnectionError as error:
                    raise BadInput(str(error)) from error
                except (BadData, OSError):
                    continue
                sizes.append(image.image.size)
                grey = grey and image.grey
    if not sizes:
        raise BadInput("none of the images tried can be read")
    return sizes, grey


def assign_to_shards(listing: Listing, load: Load) -> dict[str, Images]:
    """Assign images to shards by a seeded permutation, so that each shard is a random sample of its split.

    Returns:
        Shard name → images.

    Raises:
        BadInput: more than `SHARDS` shards.
    """
    if (count := sum(-(-len(items) // load.shard_size) for items in listing.items.values())) > SHARDS:
        raise BadInput(f"shard_size {load.shard_size} makes {count:,} shards, at most {SHARDS:,} are made: raise it")
    shards = {}
    for split, items in listing.items.items():
        order = generator(load.seed, f"order/{split}").permutation(len(items))
        for number, first in enumerate(range(0, len(order), load.shard_size)):
            shards[shard_name(split, number)] = items[order[first : first + load.shard_size]]
    return shards


def read(load: Load, name: str, items: Sequence[Item], channels: int, suffix: str | None) -> Shard:
    """Fetch and decode, or generate, the images of one shard.

    An image that cannot be decoded is left out and recorded as a Failure.

    Args:
        load: the source.
        name: the shard's name.
        items: its images.
        channels: 1 or 3.
        suffix: format of the files if they are kept; else None.

    Raises:
        BadData: more than ``load.max_undecodable`` of the images failed, or they take more than `limits.MEMORY`.
        ConnectionError: an object store stayed unavailable; not counted as a failed image.
    """
    kept, pixels, files, failures = [], Pixels(name), [], []
    with Files([item.ref for item in items]) as opened:
        for item in items:
            try:
                image, file = _read_one(load, item, opened, channels, suffix)
            except ConnectionError:
                raise
            except (BadData, OSError) as error:
                failures.append(Failure(item.index, item.label, f"{place_of(item.ref)}: {_said(error)}"))
                continue
            kept.append(item)
            pixels.add(image)
            files.append(file)
    _refuse_failures(failures, len(items), load.max_undecodable)
    whole = [file for file in files if file is not None]
    contents = [opened.contents.get(item.ref) for item in items] if opened.contents else None
    if not (pixels.uniform or whole):
        raise BadData("images of differing sizes: add crop")
    labels = np.array([item.label for item in kept], dtype=np.int64)
    return Shard(
        name=name,
        index=np.array([item.index for item in kept], dtype=np.int64),
        label=labels,
        source_label=labels.copy(),
        pixels=pixels.array(),
        files=whole or None,
        suffix=suffix or ENCODED,
        failures=failures,
        contents=contents,
    )


def contents(items: Sequence[Item]) -> list[str | None]:
    """sha256 of the file of each image; None for one that cannot be read."""
    with Files([item.ref for item in items]) as opened:
        for item in items:
            with suppress(BadData, OSError):
                opened.fetch(item.ref)
    return [opened.contents.get(item.ref) for item in items]


def _said(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _refuse_failures(failures: Sequence[Failure], count: int, allowed: float) -> None:
    if len(failures) > allowed * count:
        raise BadData(
            f"{len(failures)} of {count} images failed, more than max_undecodable {allowed:g} allows; "
            f"the first: {failures[0].error}"
        )
    if len(failures) == count:
        raise BadData(f"none of {count} images decodes; the first: {failures[0].error}")


def _read_one(
    load: Load, item: Item, opened: Files, channels: int, suffix: str | None
) -> tuple[np.ndarray, bytes | None]:
    """The pixels of an image, and the file to store if images keep their sizes.

    Raises:
        BadData: the image cannot be decoded, or can neither be kept nor re-encoded without loss.
    """
    if isinstance(load, Synthetic):
        return synthetic(load, item), None
    if not isinstance(load, ImageFolder | Parquet | WebDataset):
        return item.ref, None
    file = opened.fetch(item.ref)
    image = open_image(file, channels)
    pixels = image.pixels(load.resize, load.crop)
    if not load.keeps_sizes:
        return pixels, None
    odd = image.why_not_kept(suffix) if suffix else None
    if odd is not None and suffix != ENCODED:
        raise BadData(f"{odd}, and cannot be kept as it is: say `keep_files: false`, and all are stored as png")
    return pixels, encode(pixels) if suffix is None or odd else file
