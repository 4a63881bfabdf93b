"""WebDataset shards: where each image lies in its tar, its label and its kind."""

import tarfile
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, takewhile
from pathlib import Path
from threading import Event

import numpy as np
import pyarrow as pa

from stages.errors import BadData, BadInput
from stages.images import open_image
from stages.load.files import Files, open_file
from stages.load.listing import SUFFIXES, Images, Listing, Span, sample
from stages.recipes import WebDataset

READERS = 16
"""Tars that are listed side by side, and spans of tars that are fetched side by side."""


def _expand(pattern: str) -> list[str]:
    from braceexpand import braceexpand

    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise BadInput(f"shards: {pattern} has braces that do not close") from error


@dataclass(frozen=True)
class _Spans:
    """Spans of some tars, as a column of numbers each: which tar, offset, size."""

    tars: list[str]
    places: np.ndarray

    def __getitem__(self, at: int) -> Span:
        tar, offset, size = self.places[at].tolist()
        return self.tars[tar], offset, size


def list_webdataset(load: WebDataset, data: Path) -> Listing:
    found, kinds = dict[str, tuple[list[int], _Spans]](), set[str]()
    for split, pattern in load.shards.items():
        tars, places, label = dict[str, int](), array("q"), list[int]()
        for (tar, *span), one, kind in _index([url if "://" in url else str(data / url) for url in _expand(pattern)]):
            places.extend((tars.setdefault(tar, len(tars)), *span))
            label.append(one)
            kinds.add(kind)
        found[split] = label, _Spans(list(tars), np.array(places, dtype=np.int64).reshape(-1, 3))
    labels = {one for label, _ in found.values() for one in label}
    classes = load.classes if load.classes is not None else max(labels, default=0) + 1
    names = tuple(classes) if isinstance(classes, list) else tuple(str(i) for i in range(classes))
    if labels and not 0 <= min(labels) <= max(labels) < len(names):
        wrong = min(labels) if min(labels) < 0 else max(labels)
        raise BadInput(f"classes: the shards have label {wrong}, but there are only {len(names)} classes")
    items, first = dict[str, Images](), 0
    for split, (label, spans) in found.items():
        items[split], first = Images.whole(label, spans, first), first + len(label)
    return Listing(
        names,
        items,
        channels=_channels(items, load),
        suffix=kinds.pop() if len(kinds) == 1 and load.keeps_bytes else None,
    )


def _index(urls: Sequence[str]) -> Iterator[tuple[Span, int, str]]:
    """Where each image of some tars lies, its label and its kind; several tars at a time, in the order given."""
    for url in urls[:1]:
        with _blaming(url), open_file(url, patient=False):  # who mistyped should hear of it now
            pass
    stopped = Event()

    def index(url: str) -> list[tuple[Span, int, str]]:
        with _blaming(url):
            return list(takewhile(lambda _: not stopped.is_set(), _index_tar(url)))

    with ThreadPoolExecutor(READERS) as pool:
        try:
            for found in pool.map(index, urls):
                yield from found
        finally:
            stopped.set()  # after an error or Ctrl-C, tars of gigabytes are not read to their end


def _index_tar(url: str) -> Iterator[tuple[Span, int, str]]:
    """The same of one tar, from its start to its end without going back.

    Of a file on disk only headers and labels are read. An object store would have to be asked for each of them, five
    times per image; so all of the tar is fetched, in large chunks, and the images are passed over.
    """
    with open_file(url) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for sample, group in groupby((m for m in tar if m.isfile()), key=lambda member: _stem(member.name)):
            parts, label = dict[str, tarfile.TarInfo](), None
            for member in group:
                suffix = member.name.rpartition(".")[2].lower()
                parts[suffix] = member
                if suffix == "cls" and (content := tar.extractfile(member)):
                    label = content.read()
            image = next((suffix for suffix in parts if suffix in SUFFIXES), None)
            if image is None or label is None:
                raise BadInput(f"{url}: sample {sample} has {', '.join(parts)}, expected an image and cls")
            yield (url, parts[image].offset_data, parts[image].size), int(label), SUFFIXES[image]


@contextmanager
def _blaming(url: str) -> Iterator[None]:
    """What goes wrong with a tar, as a sentence about it."""
    try:
        yield
    except BadInput:
        raise
    except ConnectionError as error:
        raise BadInput(str(error)) from error
    except pa.ArrowInvalid as error:
        raise BadInput(f"{url} is no place that can be read: {str(error).splitlines()[0]}") from error
    except (tarfile.TarError, ValueError) as error:
        raise BadInput(f"{url} is not a WebDataset shard: {error}") from error
    except OSError as error:
        raise BadInput(f"{url} cannot be read: {error.strerror or str(error).splitlines()[0]}") from error


def _stem(name: str) -> str:
    """WebDataset's key: the path up to the first dot of the last part."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _channels(items: dict[str, Images], load: WebDataset) -> int:
    """What the recipe says; else 1, if all images that are tried are grey, or 3.

    Where another has colours all the same, `read` refuses it rather than making it grey.
    """
    if load.channels is not None:
        return load.channels
    grey = False
    for item in (item for images in items.values() for item in sample(images)):
        try:
            with _blaming(item.ref[0]), Files([item.ref]) as opened:
                grey = open_image(opened.fetch(item.ref), 1).grey
        except BadData:  # not an image: `read` says so, with its place
            continue
        if not grey:
            break
    return 1 if grey else 3
