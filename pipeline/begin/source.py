"""The `load` recipe for what lies at a place: an image folder, parquet files, a torchvision set."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from stages import load
from stages.errors import BadInput, hint_here, some
from stages.load.files import list_objects
from stages.load.listing import is_hidden
from stages.recipes import Load, Torchvision

SETS: tuple[str, ...] = get_args(Torchvision.model_fields["source"].annotation)

SPLITS = {"train": ("train", "training"), "test": ("val", "valid", "validation", "test", "testing")}
"""Split → names of its folder, or beginnings of its files; of several, the first counts."""

TABLE = ".parquet"

Recipe = dict[str, Any]
"""The contents of `load` in an experiment file."""


@dataclass(frozen=True)
class Found:
    """What a source holds.

    Attributes:
        recipe: how it is read.
        classes: its class names.
        counts: split → images.
        sides: shortest and longest of the shorter sides of the images tried, in pixels.
        uniform: whether all images tried have one size.
        grey: whether all images tried are grey.
    """

    recipe: Recipe
    classes: tuple[str, ...]
    counts: dict[str, int]
    sides: tuple[int, int]
    uniform: bool
    grey: bool


def recipe_for(source: str, data: Path) -> Recipe:
    """The recipe for a source, by its name or place.

    Args:
        source: a torchvision set, such as ``cifar10``; or the path, relative to `data`, or URL of an image folder, of
            parquet files (also a pattern), or of a folder with parquet files.
        data: folder of relative paths.

    Raises:
        BadInput: no such thing is there.
    """
    if source in SETS:
        return {"source": source}
    if source.partition("?")[0].endswith(TABLE):
        return {"source": "parquet", "files": {"train": source}}
    folders, files = _inside(source, data)
    if tables := sorted({name for name in files if name.endswith(TABLE)}):
        return {"source": "parquet", "files": _tables(source, tables)}
    if not folders:
        raise BadInput(
            f"{source} holds neither folders of images (train/<class>/<image>, or <class>/<image>) nor parquet files, "
            f"and is none of {', '.join(SETS)}"
        )
    found = {split: next((name for name in names if name in folders), None) for split, names in SPLITS.items()}
    splits = {split: name for split, name in found.items() if name is not None} or {"train": "."}
    return {"source": "image-folder", "root": source, "splits": splits}


def _inside(source: str, data: Path) -> tuple[set[str], set[str]]:
    """The names of the folders and files in a folder."""
    if "://" in source:
        paths = [name for name in list_objects(source) if not is_hidden(name)]
        return {name.partition("/")[0] for name in paths if "/" in name}, {name for name in paths if "/" not in name}
    folder = data / source
    if not folder.is_dir():
        raise BadInput(f"{folder} is neither a folder nor one of {', '.join(SETS)}{hint_here(source)}")
    entries = [entry for entry in folder.iterdir() if not is_hidden(entry.name)]
    return {entry.name for entry in entries if entry.is_dir()}, {entry.name for entry in entries if entry.is_file()}


def _tables(source: str, names: Iterable[str]) -> dict[str, str]:
    """Split → pattern of its files, by the beginning of their names; all are `train` if none begins like a split."""
    base = source.rstrip("/")
    found = {
        split: next((start for start in starts if any(name.startswith(start) for name in names)), None)
        for split, starts in SPLITS.items()
    }
    return {split: f"{base}/{start}*{TABLE}" for split, start in found.items() if start} or {
        "train": f"{base}/*{TABLE}"
    }


def look(recipe: Recipe, data: Path) -> Found:
    """List a source, and look at some of its images.

    Raises:
        BadInput: it cannot be read.
    """
    listing = load.list_source(parsed(recipe), data, fetch=False)
    sizes, grey = load.probe(listing)
    shorter = [min(size) for size in sizes]
    counts = {split: len(images) for split, images in sorted(listing.items.items(), reverse=True)}
    uniform = len(set(sizes)) == 1 and len(set(sizes[0])) == 1
    return Found(recipe, listing.classes, counts, (min(shorter), max(shorter)), uniform, grey)


def parsed(recipe: Recipe) -> Any:
    """The recipe as its model.

    Raises:
        BadInput: it is not valid.
    """
    try:
        return TypeAdapter(Load).validate_python(recipe)
    except ValidationError as error:
        raise BadInput(some([each["msg"] for each in error.errors()], 1).removeprefix("Value error, ")) from error
