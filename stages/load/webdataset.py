"""List WebDataset shards: each image's position in its tar, label and format."""

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice, takewhile
from pathlib import Path
from threading import Event
from typing import BinaryIO

import numpy as np

from stages.errors import BadData, BadInput
from stages.images import is_grey
from stages.load.files import READERS, Files, open_file
from stages.load.listing import HIDDEN, Images, Listing, Span, is_hidden
from stages.load.sample import KEY_ENDS, LARGEST_LABEL, MOST_FILES, Reading, key_of, kind_of
from stages.recipes import WebDataset
from stages.tar import FILE, LINK, Member, shortened, walk

LOOKED_AT = 256
"""Images fetched together to detect greyscale."""

LINKED = f" ({LINK} are passed over: write the tar with --dereference --hard-dereference)"


def _expand(pattern: str) -> list[str]:
    from braceexpand import braceexpand

    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise BadInput(f"shards: {pattern} has braces that do not close") from error


def tars_of(pattern: str, data: Path) -> list[str]:
    """Paths or URLs of the tars that a pattern stands for."""
    return [url if "://" in url else str(data / url) for url in _expand(pattern)]


@dataclass(frozen=True)
class _Spans:
    """Spans in tars, as columns: tar, offset, size."""

    tars: list[str]
    places: np.ndarray

    def __getitem__(self, at: int) -> Span:
        tar, offset, size = self.places[at].tolist()
        return self.tars[tar], offset, size


def list_webdataset(load: WebDataset, data: Path) -> Listing:
    reading, found, kinds, passed = Reading(load), dict[str, tuple[list[int], _Spans]](), set[str](), Counter[str]()
    for split, pattern in load.shards.items():
        tars, places, label = dict[str, int](), array("q"), list[int]()
        for (tar, *span), one, kind in _index(tars_of(pattern, data), reading, passed):
            places.extend((tars.setdefault(tar, len(tars)), *span))
            label.append(one)
            kinds.add(kind)
        found[split] = label, _Spans(list(tars), np.array(places, dtype=np.int64).reshape(-1, 3))
    classes = load.classes or max(max(label, default=0) for label, _ in found.values()) + 1
    items, first = dict[str, Images](), 0
    for split, (label, spans) in found.items():
        items[split], first = Images.whole(label, spans, first), first + len(label)
    return Listing(
        tuple(classes) if isinstance(classes, list) else tuple(str(i) for i in range(classes)),
        items,
        channels=_channels(items, load),
        suffix=kinds.pop() if len(kinds) == 1 and load.keeps_bytes else None,
        skipped=dict(sorted(passed.items())),
    )


def _index(urls: Sequence[str], reading: Reading, passed: Counter[str]) -> Iterator[tuple[Span, int, str]]:
    """Span, label and format of each image in some tars, read concurrently, in the given order."""
    for url in urls[:1]:
        with _blaming(url), open_file(url, patient=False):  # fail fast, so that a mistyped URL is reported at once
            pass
    stopped = Event()

    def index(url: str) -> tuple[list[tuple[Span, int, str]], Counter[str]]:
        skipped = Counter[str]()
        with _blaming(url), open_file(url) as file:
            return list(takewhile(lambda _: not stopped.is_set(), _index_tar(file, url, reading, skipped))), skipped

    with ThreadPoolExecutor(READERS) as pool:
        try:
            for found, skipped in pool.map(index, urls):
                passed.update(skipped)
                yield from found
        finally:
            stopped.set()  # after an error or Ctrl-C, do not read large tars to their end


def _index_tar(file: BinaryIO, url: str, reading: Reading, skipped: Counter[str]) -> Iterator[tuple[Span, int, str]]:
    """The same for one tar, in one sequential pass; skipped members are counted.

    On disk, only headers and labels are read. In an object store, that would take five requests per image, so the whole
    tar is fetched in large chunks.
    """
    for sample, group in groupby(_data(file, url, skipped), key=lambda member: key_of(member.name)[0]):
        parts, label, place = dict[str, Member](), None, f"{url}: sample {shortened(sample)}"
        for member in group:
            extension = key_of(member.name)[1]
            if extension in parts:
                raise BadInput(f"{place} has {extension} twice: two files of a name, or two samples")
            if len(parts) == MOST_FILES:
                raise BadInput(f"{place} has more than {MOST_FILES:,} files; {KEY_ENDS}")
            parts[extension] = member
            if extension == reading.holder:
                file.seek(member.offset)
                label = file.read(min(member.size, LARGEST_LABEL + 1))
        try:
            image, number = reading.sample(parts, label, LINKED if skipped[LINK] else "")
        except BadData as error:
            raise BadInput(f"{place} {error}") from error
        yield (url, parts[image].offset, parts[image].size), number, kind_of(image)


def _data(file: BinaryIO, url: str, skipped: Counter[str]) -> Iterator[Member]:
    """The members of a tar that belong to samples; others are counted."""
    count = 0
    try:
        for member in walk(file):
            count += 1
            if member.kind != FILE:
                skipped[member.kind] += 1
            elif is_hidden(member.name):
                skipped[HIDDEN] += 1
            elif "." not in member.name.rpartition("/")[2]:
                skipped["files without an extension"] += 1
            else:
                yield member
    except BadData as error:
        raise BadInput(f"{url} {error}") from error
    if not count:
        skipped["empty tars"] += 1


@contextmanager
def _blaming(url: str) -> Iterator[None]:
    """Turn errors into messages about a tar."""
    try:
        yield
    except BadInput:
        raise
    except ConnectionError as error:
        raise BadInput(str(error)) from error
    except OSError as error:
        raise BadInput(f"{url} cannot be read: {error.strerror or str(error).splitlines()[0]}") from error
    except ValueError as error:
        raise BadInput(f"{url} is no place that can be read: {str(error).splitlines()[0]}") from error


def _channels(items: dict[str, Images], load: WebDataset) -> int:
    """The recipe's channels; else 1 if all images are greyscale by their headers, or 3.

    The first colour image ends the search: only in a greyscale source is every image examined.
    """
    if load.channels is not None:
        return load.channels
    some = False
    for refs in _groups(item.ref for images in items.values() for item in images):
        with _blaming(refs[0][0]), Files(refs) as opened:
            for ref in refs:
                try:
                    if not is_grey(opened.fetch(ref)):
                        return 3
                    some = True
                except BadData:  # not an image: `read` reports it with its position
                    continue
    return 1 if some else 3


def _groups(refs: Iterator[Span]) -> Iterator[list[Span]]:
    """The first reference alone, which decides for most sources; then groups, each fetched together."""
    yield from ([ref] for ref in islice(refs, 1))
    while group := list(islice(refs, LOOKED_AT)):
        yield group
