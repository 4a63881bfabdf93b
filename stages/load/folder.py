"""A folder in ImageNet's layout: a sub-folder for each class."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa

from stages.errors import BadData, BadInput
from stages.images import decode
from stages.load.listing import SUFFIXES, Images, Item, Listing
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


@dataclass(frozen=True)
class _Paths:
    """Files below a folder, as one column of text: objects take ten times as much."""

    root: Path
    names: pa.StringArray

    def __getitem__(self, at: int) -> Path:
        return self.root / str(self.names[at])


def list_folder(load: ImageFolder, data: Path) -> Listing:
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
