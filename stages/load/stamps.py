"""Sizes and times of the files that a source consists of: a changed file is noticed without being read."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from stages.errors import BadInput
from stages.load.files import READERS, list_objects, local_path
from stages.load.listing import Item, Listing, printable
from stages.load.patterns import expand, matches
from stages.recipes import Load, Parquet, WebDataset

MANY = 4096
"""Files whose sizes and times one thread asks for."""

Stamp = tuple[int, int]
"""A file's size in bytes, and the time of its last change in nanoseconds since 1970."""

GONE: Stamp = (-1, -1)
"""Stamp of a file that is not there, or cannot be asked for."""


def stamps_of_images(listing: Listing) -> tuple[list[str], np.ndarray]:
    """The files of an image folder that are taken.

    Returns:
        Names, ``<split>/<class>/<image>``, which moving the folder does not change; and stamps, N × 2, int64.
    """
    names, found = list[str](), list[np.ndarray]()
    for split, images in listing.items.items():
        parts = [images[first : first + MANY] for first in range(0, len(images), MANY)]
        with ThreadPoolExecutor(READERS) as pool:
            found += pool.map(lambda part: np.array(_local([item.ref for item in part]), dtype=np.int64), parts)
        places = (images.indices - images.first).tolist()
        names += [f"{split}/{printable(images.refs.name(place))}" for place in places]
    return names, np.concatenate(found)


def stamps_of_tars(load: Load, data: Path) -> dict[str, Stamp]:
    """Path or URL → stamp of each tar or parquet file; `GONE` where it is missing, or its object store does not answer.

    A folder of an object store is listed once. Empty for a source of another kind.
    """
    found, listed = dict[str, Stamp](), dict[str, Mapping[str, Stamp]]()
    for url in (url for urls in _holders(load, data).values() for url in urls):
        if (path := local_path(url)) is not None:
            found[url] = _local([path])[0]
            continue
        place, mark, query = url.partition("?")
        folder, _, name = place.rpartition("/")
        if folder not in listed:
            listed[folder] = _listed(f"{folder}/{mark}{query}")
        found[url] = listed[folder].get(unquote(name), GONE)
    return found


def names_of_tars(load: Load, data: Path, stamps: Iterable[str]) -> list[str]:
    """A name for each file of `stamps_of_tars` that moving their common folder does not change."""
    names = dict[str, str]()
    for split, urls in _holders(load, data).items():
        places = {url: [part for part in url.split("/") if part] for url in urls}
        levels = list(zip(*(place[:-1] for place in places.values()), strict=False))
        common = next((depth for depth, parts in enumerate(levels) if len(set(parts)) > 1), len(levels))
        names = {url: "/".join([split, *place[common:]]) for url, place in places.items()} | names
    return [names[url] for url in stamps]


def _holders(load: Load, data: Path) -> dict[str, list[str]]:
    """Split → the files that hold its images, many in each; none where the pattern matches none."""
    if isinstance(load, WebDataset):
        return {split: expand(pattern, data) for split, pattern in load.shards.items()}
    if not isinstance(load, Parquet):
        return {}
    try:
        return {split: matches(pattern, data) for split, pattern in load.files.items()}
    except (BadInput, OSError):  # reading the source reports it, where that is needed
        return {}


def stamps_of(items: Sequence[Item], tars: Mapping[str, Stamp] | None = None) -> list[Stamp] | None:
    """Stamps of the files that some images lie in; None if they are no files, or files on other machines.

    Args:
        items: the images.
        tars: known stamps of tars and parquet files; without them, those on this machine's disks are asked for theirs.
    """
    refs = [item.ref for item in items]
    if isinstance(refs[0], Path):
        return _local(refs)
    if not isinstance(refs[0], tuple):
        return None
    urls = sorted({url for url, *_ in refs})
    if tars is not None:
        return [tars[url] for url in urls] if all(url in tars for url in urls) else None
    paths = [path for url in urls if (path := local_path(url)) is not None]
    return _local(paths) if len(paths) == len(urls) else None


def _local(paths: Iterable[Path]) -> list[Stamp]:
    return [stamp(path) for path in paths]


def stamp(path: Path) -> Stamp:
    """The stamp of a file on disk."""
    try:
        about = path.stat()
    except OSError:
        return GONE
    return about.st_size, about.st_mtime_ns


def _listed(folder: str) -> dict[str, Stamp]:
    """Name → stamp of each object directly in a folder of an object store; empty if that does not answer."""
    try:
        found = list_objects(folder, recursive=False)
    except (BadInput, OSError):  # reading the source reports it, where that is needed
        return {}
    return {name: (info.size, info.mtime_ns) for name, info in found.items()}
