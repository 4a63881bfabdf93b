"""Where clean images come from: list a source, spread it over shards, read one shard of it."""

import os
import shutil
import tarfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import SEEK_SET, BufferedReader, BytesIO, RawIOBase
from itertools import groupby, takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
from PIL import Image

from stages import remote
from stages.errors import BadData, BadInput
from stages.images import decode, pixels_of
from stages.recipes import ClassMap, Digits, ImageFolder, Load, Synthetic, Torchvision, WebDataset
from stages.seeds import generator
from stages.shard import Failure, Shard

READERS = 16
"""Tars that are listed side by side, and spans of tars that are fetched side by side."""

CHUNK = 8 * 2**20
"""Bytes asked of an object store at once; a listing holds `READERS` times as much."""

GAP = 64 * 2**10
"""Bytes between two images that are rather fetched for nothing than asked around: a request takes as long as a few
hundred KiB."""

T = TypeVar("T")
Span = tuple[str, int, int]
"""A tar, an offset in it, and a number of bytes."""

SUFFIXES = {"png": "png", "jpg": "jpg", "jpeg": "jpg", "webp": "webp"}

RESTRICTED_IMAGENET: ClassMap = {
    # Ilyas et al. 2019, appendix A.1; ILSVRC class ids, inclusive.
    "dog": ["151-268"],
    "cat": ["281-285"],
    "frog": ["30-32"],
    "turtle": ["33-37"],
    "bird": ["80-100"],
    "primate": ["365-382"],
    "fish": ["389-397"],
    "crab": ["118-121"],
    "insect": ["300-319"],
}


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a source: where it is in the order, where it lies, what it shows."""

    index: int
    ref: Any
    """Pixels (H × W × C, uint8), a path, a `Span` of a tar; None for an image that is made from its index."""
    label: int


@dataclass(frozen=True, eq=False)
class Images(Sequence[Item]):
    """Images of one split, in columns: a million items as objects would take hundreds of MiB.

    A slice, or an array of positions, chooses some of them; an integer gives an `Item`. To another process they
    travel as a tuple of items, each with its own reference alone.

    Attributes:
        indices, labels: N each, what `Item` says, int64.
        refs: of all images of the split, those left out included, in the order of the source; None for images that
            are made.
        first: index of the image that the first reference is of.
    """

    indices: np.ndarray
    labels: np.ndarray
    refs: Any = None
    first: int = 0

    @classmethod
    def whole(cls, label: Sequence[int] | np.ndarray, refs: Any = None, first: int = 0) -> "Images":
        """A whole split, whose images have the indices from ``first`` on."""
        labels = np.asarray(label, dtype=np.int64)
        return cls(np.arange(first, first + len(labels)), labels, refs, first)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, at: Any) -> Any:
        index, label = self.indices[at], self.labels[at]
        if isinstance(at, slice | np.ndarray):
            return replace(self, indices=index, labels=label)
        return self._item(int(index), int(label))

    def __iter__(self) -> Iterator[Item]:
        return map(self._item, self.indices.tolist(), self.labels.tolist())

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (tuple(self),)

    def _item(self, index: int, label: int) -> Item:
        return Item(index, None if self.refs is None else self.refs[index - self.first], label)


@dataclass(frozen=True)
class Listing:
    """All that is known of a source without decoding an image."""

    classes: tuple[str, ...]
    items: dict[str, Images]
    """Split → its images in the order of the source."""
    channels: int
    suffix: str | None = None
    """What the files are, where all are of one kind that can be kept."""

    def majority(self, split: str) -> float:
        """Share of the most frequent class: what a constant answer scores."""
        labels = self.items[split].labels
        return int(np.bincount(labels).max()) / len(labels)


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
            listing = _list_digits(load)
        case Torchvision():
            listing = _list_torchvision(load, data, fetch)
        case ImageFolder():
            listing = _list_folder(load, data)
        case WebDataset():
            listing = _list_webdataset(load, data)
        case Synthetic():
            listing = _list_synthetic(load)
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
    """
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
    with _Files([item.ref for item in items]) as opened:
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
                failures.append(Failure(item.index, item.label, f"{_place(item.ref)}: {error}"))
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


# -------------------------------------------------------------------------------- arrays in memory


def _list_digits(load: Digits) -> Listing:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    order = generator(load.seed, "digits/split").permutation(len(pixels))
    test = round(len(pixels) * load.test_share)
    whole = Images.whole(labels, pixels)
    items = {"train": whole[np.sort(order[test:])], "test": whole[np.sort(order[:test])]}
    return Listing(tuple("0123456789"), items, channels=1)


def _list_torchvision(load: Torchvision, data: Path, fetch: bool) -> Listing:
    from torchvision import datasets

    make = {
        "cifar10": datasets.CIFAR10,
        "cifar100": datasets.CIFAR100,
        "mnist": datasets.MNIST,
        "fashion-mnist": datasets.FashionMNIST,
    }[load.source]
    root = data / load.root
    items, first, classes = {}, 0, tuple[str, ...]()
    for split in ("train", "test"):
        found = _find_or_download(make, root, split == "train", load, fetch)
        pixels = np.asarray(found.data)
        pixels = pixels[..., None] if pixels.ndim == 3 else pixels
        items[split] = Images.whole(found.targets, pixels, first)
        first, classes = first + len(pixels), tuple(found.classes)
    return Listing(classes, items, channels=pixels.shape[-1])


def _find_or_download(make: Callable[..., Any], root: Path, train: bool, load: Torchvision, fetch: bool) -> Any:
    try:
        return make(root=str(root), train=train, download=False)
    except RuntimeError:
        if not (load.download and fetch):
            how = "`notbugs run` downloads it, or" if load.download else "allow its download, or"
            raise BadInput(f"{load.source} is not in {root}: {how} name its folder with --data") from None
    with TemporaryDirectory() as folder:  # a download that fails leaves nothing behind
        try:
            make(root=folder, train=train, download=True)
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise BadInput(
                f"{load.source} is neither in {root} nor can it be downloaded ({reason}): name its folder with --data"
            ) from error
        shutil.copytree(folder, root, dirs_exist_ok=True)
    return make(root=str(root), train=train, download=False)


# ------------------------------------------------------------------------------ images that are made

CELLS = 4
"""Cells along each side of the coarse pattern that a class is known by."""

PATTERN, NOISE = 128, 96
"""8-bit levels that the pattern of a class goes through, and the noise of an image; together less than 256."""

SHIFT = 8
"""An image is shifted by at most its side over this."""


def _list_synthetic(load: Synthetic) -> Listing:
    items, first = dict[str, Images](), 0
    for split, count in load.images.items():
        items[split] = Images.whole(np.arange(first, first + count) % load.classes, first=first)
        first += count
    return Listing(tuple(str(i) for i in range(load.classes)), items, channels=3)


def synthetic(load: Synthetic, item: Item) -> np.ndarray:
    """An image from its seed, its index and its class alone: size × size × 3, uint8.

    A few random colours that are its class's, enlarged to a smooth pattern, shifted and under noise that is its own.
    In whole numbers, which are the same on every machine.
    """
    colours = generator(load.seed, "synthetic/class", item.label)
    cells = colours.integers(0, PATTERN, (CELLS, CELLS, 3), dtype=np.uint8)
    smooth = Image.fromarray(cells).resize((load.size, load.size), Image.Resampling.BILINEAR)
    draw, most = generator(load.seed, "synthetic/image", item.index), load.size // SHIFT
    shift = draw.integers(-most, most, 2, endpoint=True)
    noise = draw.integers(0, NOISE, (load.size, load.size, 3), dtype=np.uint8)
    return np.roll(pixels_of(smooth), tuple(shift.tolist()), (0, 1)) + noise


# ------------------------------------------------------------------------------------ image folders


@dataclass(frozen=True)
class _Paths:
    """Files below a folder, as one column of text: objects take ten times as much."""

    root: Path
    names: pa.StringArray

    def __getitem__(self, at: int) -> Path:
        return self.root / str(self.names[at])


def _list_folder(load: ImageFolder, data: Path) -> Listing:
    root = data / load.root
    if not root.is_dir():
        raise BadInput(f"image folder {root} does not exist")
    folders = {split: _class_folders(root / sub) for split, sub in load.splits.items()}
    names = sorted({name for found in folders.values() for name in found})
    for split, found in folders.items():
        if missing := [name for name in names if name not in found]:
            raise BadInput(
                f"image folder {root / load.splits[split]} lacks {', '.join(missing[:5])}, which another split has"
            )
    classes, number = _group(load.classes, names)
    items, first, kinds = dict[str, Images](), 0, set[str | None]()
    for split, found in folders.items():
        files = {name: _image_names(found[name]) for name in names if name in number}
        label = np.repeat([number[name] for name in files], [len(inside) for inside in files.values()])
        paths = pa.array([f"{name}/{file}" for name, inside in files.items() for file in inside], pa.string())
        images = Images.whole(label, _Paths(root / load.splits[split], paths), first)
        _refuse_if_damaged(images, root / load.splits[split])
        if load.balance:
            images = _balanced(images, load, split, len(classes))
        kinds |= {_kind(name) for name in paths.take(images.indices - first).to_pylist()}
        items[split], first = images, first + len(label)
    return Listing(classes, items, channels=3, suffix=kinds.pop() if len(kinds) == 1 and load.keeps_bytes else None)


def _class_folders(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise BadInput(f"image folder {folder} does not exist: `splits` names the sub-folder of each split")
    found = {path.name: path for path in folder.iterdir() if path.is_dir()}
    if not found:
        raise BadInput(f"image folder {folder} holds no class folders: expected {folder}/<class>/<image>")
    return found


def _image_names(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if _kind(name))  # noqa: PTH208 - names, not a million paths


def _kind(name: str) -> str | None:
    """png, jpg or webp; None for what is no image."""
    return SUFFIXES.get(os.path.splitext(name)[1][1:].lower())  # noqa: PTH122


def _refuse_if_damaged(items: Sequence[Item], folder: Path) -> None:
    """Try some images before anything is written; a folder in which most of them fail is not worth starting on."""
    tried = [items[i] for i in generator(0, "probe").permutation(len(items))[:16]]
    failed = []
    for item in tried:
        try:
            decode(item.ref.read_bytes(), 3)
        except (BadData, OSError) as error:
            failed.append(f"{item.ref} {error}")
    if 2 * len(failed) > len(tried):
        raise BadInput(
            f"image folder {folder} is damaged: {len(failed)} of {len(tried)} images tried fail, {failed[0]}"
        )


def _balanced(images: Images, load: ImageFolder, split: str, classes: int) -> Images:
    """Equally many images of every class: as many as the smallest has, or as the limit leaves to each."""
    label = images.labels.tolist()
    smallest = min(Counter(label).values(), default=0)
    if load.limit is not None:
        smallest = min(smallest, load.limit // classes)
    taken, kept = Counter[int](), []
    for i in generator(load.seed, f"balance/{split}").permutation(len(images)).tolist():
        if taken[label[i]] < smallest:
            taken[label[i]] += 1
            kept.append(i)
    return cast("Images", images[np.array(sorted(kept), dtype=np.int64)])


def _group(wanted: str | ClassMap | None, names: list[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    """New class names, and the new number of each folder that is kept."""
    if wanted is None:
        return tuple(names), {name: i for i, name in enumerate(names)}
    mapping = RESTRICTED_IMAGENET if isinstance(wanted, str) else wanted
    number: dict[str, int] = {}
    for label, (group, members) in enumerate(mapping.items()):
        if not members:
            raise BadInput(f"classes.{group}: names no class of the folder")
        for name in (n for member in members for n in _members(member, names, group)):
            if number.get(name, label) != label:
                raise BadInput(f"classes.{group}: {name} is in two groups")
            number[name] = label
    return tuple(mapping), number


def _members(member: int | str, names: list[str], group: str) -> Iterator[str]:
    if member in names:
        yield str(member)
        return
    first, _, last = str(member).partition("-")
    if not (first.isdecimal() and (last or first).isdecimal()) or int(first) > int(last or first):
        raise BadInput(f"classes.{group}: {member!r} is neither a folder, a class id nor a range of ids")
    for i in range(int(first), int(last or first) + 1):
        if i >= len(names):
            raise BadInput(f"classes.{group}: there is no class {i}, the folder has {len(names)} classes")
        yield names[i]


# --------------------------------------------------------------------------------------- webdataset


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


def _list_webdataset(load: WebDataset, data: Path) -> Listing:
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
        channels=_channels(items),
        suffix=kinds.pop() if len(kinds) == 1 and load.keeps_bytes else None,
    )


def _index(urls: Sequence[str]) -> Iterator[tuple[Span, int, str]]:
    """Where each image of some tars lies, its label and its kind; several tars at a time, in the order given."""
    for url in urls[:1]:
        with _blaming(url), _open(url, patient=False):  # who mistyped should hear of it now
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
    with _open(url) as file, tarfile.open(fileobj=file, mode="r:") as tar:
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


def _channels(items: dict[str, Images]) -> int:
    """1 if the first image is grey, else 3: shards hold images of one kind."""
    ref = next((item.ref for chosen in items.values() for item in chosen), None)
    if ref is None:
        return 3
    with _blaming(ref[0]), _Files([ref]) as opened:
        content = opened.fetch(ref)
    try:
        with Image.open(BytesIO(content)) as image:
            return 1 if image.mode in ("L", "1", "I;16") else 3
    except OSError:  # not an image: `read` says so, with its place
        return 3


class _Files:
    """Files of images. What lies in tars is fetched ahead, side by side, and each tar of an object store opened once.

    A shard's images are spread over the tars of its source by chance: most take a request of their own. All of a
    shard's files are held until it is read; as a tar, they are held again anyway.
    """

    def __init__(self, refs: Iterable[Any]) -> None:
        place = {ref: i for i, ref in enumerate(refs) if isinstance(ref, tuple)}
        self.pool = ThreadPoolExecutor(READERS)
        # All are opened before any is read: a thread that waits for a tar never keeps it from being opened.
        self.tars = {url: self.pool.submit(_reader, url) for url in dict.fromkeys(url for url, _, _ in place)}
        self.coming = dict[Span, Future[dict[Span, bytes]]]()
        # In the order in which they will be asked for: they are decoded while others come.
        for spans in sorted(_joined(place), key=lambda spans: min(place[span] for span in spans)):
            self.coming |= dict.fromkeys(spans, self.pool.submit(self._fetch, spans))

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *_: Any) -> None:
        self.pool.shutdown(cancel_futures=True)

    def _fetch(self, spans: Sequence[Span]) -> dict[Span, bytes]:
        (url, first, _), (_, last, size) = spans[0], spans[-1]
        content = self.tars[url].result()(first, last + size - first)
        return {span: content[span[1] - first : span[1] - first + span[2]] for span in spans}

    def fetch(self, ref: Any) -> bytes:
        if isinstance(ref, Path):
            return ref.read_bytes()
        content = self.coming[ref].result()[ref]
        if len(content) != ref[2]:
            raise BadData(f"{ref[0]} ends inside the image")
        return content


def _joined(spans: Iterable[Span]) -> Iterator[list[Span]]:
    """Spans, in order; together those that one request should fetch."""
    together = list[Span]()
    for url, offset, size in sorted(spans):
        if together:
            (one, first, _), (_, last, length) = together[0], together[-1]
            if url != one or offset - (last + length) > GAP or offset + size - first > CHUNK:
                yield together
                together = []
        together.append((url, offset, size))
    if together:
        yield together


def _place(ref: Any) -> str:
    return ref[0] if isinstance(ref, tuple) else str(ref.name)


# ------------------------------------------------------------------------- files, here and far away


def _on_disk(url: str) -> Path | None:
    """A path or URL as a path, if it is a file of this machine."""
    if "://" not in url:
        return Path(url)
    parts = urlsplit(url)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


def _open(url: str, patient: bool = True) -> BinaryIO:
    """A file to be read from its start to its end, on disk passing over what is not wanted."""
    path = _on_disk(url)
    return path.open("rb") if path else BufferedReader(_Remote(url, patient), CHUNK)


def _reader(url: str) -> Callable[[int, int], bytes]:
    """What reads a number of bytes at an offset, for several threads at once."""
    path = _on_disk(url)
    if path is None:
        return _Remote(url).read_at

    def read_at(offset: int, size: int) -> bytes:
        with path.open("rb") as file:  # not left open: a shard's images may lie in more tars than may be open
            file.seek(offset)
            return file.read(size)

    return read_at


class _Remote(RawIOBase):
    """A file of an object store as Python knows files; while the store is away, it waits.

    Args:
        url: where it is.
        patient: whether to wait for it when it is opened, too.

    Raises:
        FileNotFoundError: it is not there.
        ConnectionError: it cannot be read, for longer than `remote.PATIENCE`; any method may raise it.
    """

    def __init__(self, url: str, patient: bool = True) -> None:
        super().__init__()
        self.url = url
        self.file = self._persist(self._opened, patient)

    def _opened(self) -> Any:
        place, mark, query = self.url.partition("?")
        folder, _, name = place.rpartition("/")
        filesystem, root = remote.connect(f"{folder}/{mark}{query}")
        return filesystem.open_input_file(f"{root}/{unquote(name)}")

    def _persist(self, work: Callable[[], T], patient: bool = True) -> T:
        try:
            return remote.persist(work, remote.PATIENCE if patient else remote.FIRST_PATIENCE, self._refuse)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ConnectionError(f"{self.url} cannot be read: {remote.said(error)}") from error

    def _refuse(self, error: Exception) -> None:
        if sentence := remote.refusal(self.url, error):
            raise BadInput(sentence) from error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        position: int = self.file.seek(offset, whence)
        return position

    def readinto(self, buffer: Any) -> int:
        """As many bytes as fit, in one request, from where it stands; a try that fails does not move it."""
        count: int = self._persist(lambda: self.file.readinto(buffer))
        return count

    def read_at(self, offset: int, size: int) -> bytes:
        """Bytes at an offset, in one request, less if it ends there; for several threads at once."""
        if offset >= self.file.size():
            return b""
        content: bytes = self._persist(lambda: self.file.read_at(size, offset))
        return content
