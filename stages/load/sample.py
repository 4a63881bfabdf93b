"""One sample of a WebDataset: find its image and read its label."""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from stages.errors import BadData, BadInput, shown, some
from stages.images import FILE_BYTES
from stages.limits import CLASSES
from stages.load.listing import SUFFIXES
from stages.recipes import WebDataset
from stages.tar import Member

LARGEST_LABEL = 2**20
"""Most bytes in a label's file, a few digits or a sample's JSON, which is read whole."""

MOST_FILES = 10_000
"""Most files in one sample."""

KEY_ENDS = "the key ends at the first dot of a name"

WHOLE = re.compile(r"[+-]?[0-9]{1,18}")


def key_of(name: str) -> tuple[str, str]:
    """Key and extension of a file: its path up to the first dot of the file name, and the rest."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


class Reading:
    """Reads the samples of a source by its recipe.

    Attributes:
        holder: extension of the label's file.
        keys: path of the label in a JSON file; empty if the file holds the label alone.
        count: exclusive upper bound on labels.

    Raises:
        BadInput: `image` is no image extension.
    """

    def __init__(self, load: WebDataset) -> None:
        if load.image is not None and load.image.lower().rpartition(".")[2] not in SUFFIXES:
            raise BadInput(f"image: {load.image!r} is no extension of an image, expected one of {', '.join(SUFFIXES)}")
        self.wanted = load.image.lower() if load.image else None
        self.holder, *self.keys = load.label.split(".") if load.label.startswith("json.") else [load.label.lower()]
        names = load.classes if isinstance(load.classes, list) else []
        self.number = {name: i for i, name in enumerate(names)}
        self.count = len(names) or (load.classes if isinstance(load.classes, int) else CLASSES)

    def sample(self, files: Mapping[str, Member], label: bytes | None, hint: str = "") -> tuple[str, int]:
        """Extension of the image, and the label.

        Args:
            files: the sample's files by extension.
            label: the start of the label's file, more than `LARGEST_LABEL` bytes if it is longer; None if missing.
            hint: a possible cause of a missing file.

        Raises:
            BadData: image or label are missing or ambiguous; the message continues the sample's key: "has …".
        """
        images = self._images(files)
        if len(images) > 1:
            raise BadData(f"has several images ({some(images)}): choose one, for example `image: {images[0]}`")
        if not images or label is None:
            near = [one for one in files if one.rpartition(".")[2] in SUFFIXES]
            if near and not images:
                hint = f"; {KEY_ENDS}, perhaps `image: {near[0]}` is meant"
            elif images and "json" in files and not self.keys:
                hint = "; `label: json.KEY` takes the label from the JSON"
            expected = f"expected an image ({self.wanted or ', '.join(SUFFIXES)}) and {self.holder}"
            raise BadData(f"has {some(list(files))}, {expected}, one behind the other{hint}")
        if files[images[0]].size > FILE_BYTES:
            raise BadData(f"has an image of {files[images[0]].size:,} bytes, at most {FILE_BYTES:,}")
        if len(label) > LARGEST_LABEL:
            raise BadData(f"has a {self.holder} of more than {LARGEST_LABEL:,} bytes")
        return images[0], self._label(label)

    def _images(self, extensions: Collection[str]) -> list[str]:
        if self.wanted is None:
            return [one for one in extensions if one in SUFFIXES]
        return [one for one in extensions if one == self.wanted] or [
            one for one in extensions if _plain(one) == _plain(self.wanted)
        ]

    def _label(self, content: bytes) -> int:
        said: Any = self._inside(content) if self.keys else content.decode("utf-8", "backslashreplace").strip()
        if isinstance(said, str):
            said = int(said) if WHOLE.fullmatch(said) else self.number.get(said, said)
        if type(said) is not int or not 0 <= said < self.count:
            names = ", or a name that `classes` lists" if self.number or isinstance(said, str) else ""
            raise BadData(f"has label {shown(said)}, expected a whole number from 0 to {self.count - 1}{names}")
        return said

    def _inside(self, content: bytes) -> Any:
        """The value at `keys` in a JSON document."""
        try:
            found = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise BadData("has a json that cannot be read") from error
        for key in self.keys:
            if not isinstance(found, dict) or key not in found:
                there = some(list(found)) if isinstance(found, dict) else shown(found)
                raise BadData(f"has a json without {key!r}, which `label` names: there is {there}")
            found = found[key]
        return found


def kind_of(extension: str) -> str:
    """Format of an image extension: png, jpg or webp."""
    return SUFFIXES[extension.rpartition(".")[2]]


def _plain(extension: str) -> str:
    return re.sub(r"(^|\.)jpeg$", r"\1jpg", extension)
