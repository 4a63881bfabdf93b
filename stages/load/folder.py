"""Image folders in ImageNet's layout: one sub-folder per class."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa

from stages.errors import BadInput, some
from stages.images import KEPT
from stages.load.files import below, list_objects
from stages.load.listing import HIDDEN, SUFFIXES, Images, Listing, Span, is_hidden, printable
from stages.recipes import ClassMap, ImageFolder
from stages.seeds import generator

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


KINDS = {**SUFFIXES, "bmp": "bmp", "pgm": "ppm", "ppm": "ppm", "tif": "tiff", "tiff": "tiff"}
"""Suffixes of image files, the same as in torchvision's ImageFolder → format."""


@dataclass(frozen=True)
class _Paths:
    """Files below a folder, as one column: objects take ten times the memory. As bytes: names may not be UTF-8."""

    root: Path
    names: pa.Array

    @classmethod
    def of(cls, root: Path, names: Iterable[str]) -> "_Paths":
        return cls(root, pa.array([name.encode("utf-8", "surrogateescape") for name in names], pa.large_binary()))

    def __getitem__(self, at: int) -> Path:
        return self.root / self.name(at)

    def name(self, at: int) -> str:
        """``<class>/<image>``."""
        name: bytes = self.names[at].as_py()
        return name.decode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class _Objects:
    """Files below a folder of an object store, as columns; each is a span from its first byte to its last."""

    root: str
    names: pa.Array
    sizes: np.ndarray

    def __getitem__(self, at: int) -> Span:
        return below(self.root, self.names[at].as_py()), 0, int(self.sizes[at])


class _OnDisk:
    """The folder of a split on disk.

    Attributes:
        classes: printable names of the classes.
    """

    def __init__(self, place: Path, skipped: Counter[str]) -> None:
        self.place, self.skipped = place, skipped
        self.folders = _class_folders(place, skipped)
        self.classes = list(self.folders)

    def files(self, name: str) -> list[str]:
        """The images of a class, by their path below the split's folder."""
        folder = self.folders[name]
        return [f"{folder.name}/{file}" for file in _files(folder, self.skipped)]

    def refs(self, paths: Sequence[str]) -> _Paths:
        return _Paths.of(self.place, paths)


class _InStore:
    """The folder of a split in an object store, listed as a whole: one request per 1,000 files."""

    def __init__(self, place: str, skipped: Counter[str]) -> None:
        self.place, self.found = place, dict[str, dict[str, int]]()
        for path, info in list_objects(place).items():
            name, slash, _ = path.partition("/")
            if why := HIDDEN if is_hidden(path) else None if slash else "files in no class's folder":
                skipped[why] += 1
            elif _kind(path) is None:
                skipped[_unread(path.rpartition("/")[2])] += 1
            else:
                self.found.setdefault(name, {})[path] = info.size
        self.classes = list(self.found)
        if not self.found:
            raise BadInput(f"image folder {place} holds no class folders: expected {place.rstrip('/')}/<class>/<image>")

    def files(self, name: str) -> list[str]:
        return sorted(self.found[name], key=lambda path: path.rpartition("/")[::2])

    def refs(self, paths: Sequence[str]) -> _Objects:
        sizes = [self.found[path.partition("/")[0]][path] for path in paths]
        return _Objects(self.place, pa.array(paths, pa.large_string()), np.array(sizes, dtype=np.int64))


def place_in(load: ImageFolder, split: str, data: Path) -> Path | str:
    """Path or URL of a split's folder."""
    sub = load.splits[split] if split in load.splits else load.splits["train"]  # a share of it: `test_share`
    return below(load.root, "" if sub == "." else sub) if "://" in load.root else data / load.root / sub


def list_folder(load: ImageFolder, data: Path) -> Listing:
    try:
        return _list(load, data)
    except ConnectionError as error:
        raise BadInput(str(error)) from error
    except OSError as error:
        raise BadInput(f"image folder {printable(str(error.filename))} cannot be listed: {error.strerror}") from error


def _list(load: ImageFolder, data: Path) -> Listing:
    if "://" not in load.root and not (root := data / load.root).is_dir():
        hint = "" if Path(load.root).is_absolute() else ": `root` is relative to the folder that --data names"
        raise BadInput(f"image folder {root} {_what_lacks(root)}{hint}")
    skipped = Counter[str]()
    places = {split: place_in(load, split, data) for split in load.splits}
    folders = {
        split: _OnDisk(place, skipped) if isinstance(place, Path) else _InStore(place, skipped)
        for split, place in places.items()
    }
    names = sorted({name for folder in folders.values() for name in folder.classes})
    classes, number = _group(load.classes, names)
    items, first, kinds = dict[str, Images](), 0, set[str | None]()
    for split, folder in folders.items():
        if missing := [name for name in names if name not in folder.classes]:
            raise BadInput(f"image folder {folder.place} lacks {some(missing)}, which another split has")
        files = {name: folder.files(name) for name in names if name in number}
        label = np.repeat([number[name] for name in files], [len(inside) for inside in files.values()])
        counts = np.bincount(label, minlength=len(classes)).tolist()
        if without := [name for name, count in zip(classes, counts, strict=True) if any(counts) and not count]:
            raise BadInput(
                f"image folder {folder.place} has no image of {some(without)}: add some, or remove the class"
            )
        paths = [file for inside in files.values() for file in inside]
        whole = Images.whole(label, folder.refs(paths), first)
        for part, images in _parts(load, split, whole, paths).items():
            items[part] = _balanced(images, load, part, len(classes)) if load.balance else images
            if load.keeps_bytes:
                kinds |= {_kind(paths[i]) for i in (items[part].indices - first).tolist()}
        first += len(label)
    kind = kinds.pop() if len(kinds) == 1 else None
    return Listing(classes, items, load.channels or 3, kind if kind in KEPT else None, dict(+skipped))


def _class_folders(folder: Path, skipped: Counter[str]) -> dict[str, Path]:
    """Printable name of each class → its folder."""
    if not folder.is_dir():
        raise BadInput(
            f"image folder {folder} {_what_lacks(folder)}: `splits` names the sub-folder of each split"
            f"{_folders_beside(folder)}"
        )
    inside = {entry.name: _what(entry) for entry in _entries(folder, skipped)}
    skipped["files in no class's folder"] += sum(what != "folder" for what in inside.values())
    found = {printable(name): folder / name for name, what in inside.items() if what == "folder"}
    if not found:
        raise BadInput(f"image folder {folder} holds no class folders: expected {folder}/<class>/<image>")
    return found


def _what_lacks(folder: Path) -> str:
    return "is no folder" if os.path.lexists(folder) else "does not exist"


def _folders_beside(folder: Path) -> str:
    """What the folder of a missing split holds instead, for a hint."""
    parent = folder.parent
    inside = _entries(parent, Counter()) if parent.is_dir() else ()
    beside = [printable(entry.name) for entry in inside if _what(entry) == "folder"]
    return f"; {parent} holds {some(beside)}" if beside else ""


def _entries(folder: Path, skipped: Counter[str]) -> Iterator[os.DirEntry[str]]:
    """Entries of a folder, sorted by name, without hidden ones."""
    with os.scandir(folder) as found:
        for entry in sorted(found, key=lambda entry: entry.name):
            if is_hidden(entry.name):
                skipped[HIDDEN] += 1
            else:
                yield entry


def _what(entry: os.DirEntry[str]) -> str:
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else "neither"
    except OSError:  # a broken link
        return "neither"


def _files(folder: Path, skipped: Counter[str]) -> list[str]:
    """Images below a class's folder, in the order of torchvision's ImageFolder.

    Links are followed, but no folder is visited twice, nor a parent of this one, so that circular links end.
    """
    seen = {_identity(place) for one in (folder.absolute(), folder.resolve()) for place in (one, *one.parents)}
    found, todo = list[str](), [""]
    while todo:
        place = todo.pop()
        for entry in _entries(folder / place, skipped):
            name, what = f"{place}{entry.name}", _what(entry)
            if what == "folder":
                if (one := _identity(entry)) in seen:
                    skipped["links to a folder that is listed already"] += 1
                else:
                    seen.add(one)
                    todo.append(f"{name}/")
            elif what == "neither":
                skipped["links to nothing, pipes and the like"] += 1
            elif _kind(entry.name) is None:
                skipped[_unread(entry.name)] += 1
            else:
                found.append(name)
    return sorted(found, key=lambda name: name.rpartition("/")[::2])


def _identity(place: Path | os.DirEntry[str]) -> tuple[int, int]:
    about = place.stat()
    return about.st_dev, about.st_ino


def _kind(name: str) -> str | None:
    """Format by suffix: png, jpg, webp, …; None if it is no image."""
    _, dot, suffix = name.rpartition(".")
    return KINDS.get(suffix.lower()) if dot else None


def _unread(name: str) -> str:
    """The reason for skipping a file that is no image by its name."""
    _, dot, suffix = name.rpartition(".")
    if not dot:
        return "files without an extension"
    ordinary = suffix.isalnum() and suffix.isascii() and len(suffix) < 6
    return f"{suffix.lower()} files" if ordinary else "files of other kinds"


def _parts(load: ImageFolder, split: str, images: Images, paths: list[str]) -> dict[str, Images]:
    """The images of a folder by split: all in its own, or a share of each class in `test`.

    The order of hashes decides, so that where files are added, hardly any other changes its split.

    Raises:
        BadInput: a class has no image for one of the two.
    """
    if load.test_share is None:
        return {split: images}
    test = np.zeros(len(images), dtype=bool)
    hashes = [hashlib.sha256(os.fsencode(path)).digest() for path in paths]
    for label in np.unique(images.labels):
        inside = sorted(np.flatnonzero(images.labels == label).tolist(), key=hashes.__getitem__)
        share = max(1, round(load.test_share * len(inside)))
        if share >= len(inside):
            name = printable(paths[inside[0]]).partition("/")[0]
            raise BadInput(
                f"test_share {load.test_share:g} leaves no image of {name} to train on: it has {len(inside)}"
            )
        test[inside[:share]] = True
    return {"test": images[np.flatnonzero(test)], split: images[np.flatnonzero(~test)]}


def _balanced(images: Images, load: ImageFolder, split: str, classes: int) -> Images:
    """The same number of images of every class: that of the smallest class, or limit / classes."""
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
