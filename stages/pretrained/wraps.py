"""Find a network's weights in a checkpoint, whatever wraps them.

Checkpoints keep the weights under `state_dict` or `model`, prefix each name with `module.` or `_orig_mod.`, and add an
optimizer or an average of the weights. The search flattens the file into names such as
``state_dict.module.conv1.weight``, and looks for a prefix behind which every name of the network occurs.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from stages import nets
from stages.errors import BadData
from stages.pretrained.formats import Stored
from stages.pretrained.pickled import Thing
from stages.recipes import Pretrained

BATCHES = "num_batches_tracked"
"""Last part of the name of batch norm's counter, new in PyTorch 0.4.1; a trained network does not use it."""

COUNTERS = {BATCHES, "total_ops", "total_params", "n_averaged"}
"""Last parts of names that do not affect predictions: batch norm's and averaging's counters, thop's operations."""

HEADS = ("aux1.", "aux2.", "AuxLogits.")
"""Name prefixes of the auxiliary heads that the networks of `nets.WITHOUT_HEADS` have only in training."""

DENSE = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)")
"""Names in torchvision's DenseNet weights, saved in 2017: ``norm.1.weight`` is ``norm1.weight`` today."""

NORMALISER = re.compile(r"(?P<place>(?:.*\.)?(?!running_)(?:[a-z]+_)?)(?:(?P<mean>mean|mu)|(?P<std>std|sigma))")
"""Names of the mean and the standard deviation of a normalisation layer: ``normalizer.new_mean``."""

DEPTH, LONGEST = 32, 256
"""Maximum depth of nested dicts, and maximum length of a tensor's name in characters."""

NUMPY = "numpy"
FLOATS = {"float64", "float32", "float16", "bfloat16"}


@dataclass(frozen=True, eq=False)
class Entry:
    """A tensor of a file.

    Attributes:
        name: the path to it: all keys, joined by dots.
        holder: id of the dict that contains it.
        stored: the tensor.
    """

    name: str
    holder: int
    stored: Stored


def entries_of(held: Any) -> list[Entry]:
    """All named tensors of a file, those of outer dicts first."""
    found, seen = dict[str, Entry](), set[int]()
    level: list[tuple[str, int, Any]] = [("", 0, held)]
    for _ in range(DEPTH):
        inner = []
        for beginning, holder, holding in level:
            if id(holding) in seen:
                continue
            seen.add(id(holding))
            whole = isinstance(holding, Thing) and isinstance(holding.state, dict) and "_modules" in holding.state
            holder = holder if whole and holder else id(holding)  # a pickled module contains its submodules' tensors
            for key, value in _items(holding):
                if len(name := f"{beginning}{key}") > LONGEST:
                    continue
                if "denselayer" in name and (old := DENSE.fullmatch(name)):
                    name = f"{old[1]}{old[2]}"
                if (stored := _stored(value)) is None:
                    if isinstance(value, dict | list | tuple | Thing):
                        inner.append((f"{name}.", holder if whole else 0, value))
                elif isinstance(holding, list | tuple):
                    continue  # numbered, not named
                elif found.setdefault(name, entry := Entry(name, holder, stored)) is not entry:
                    raise BadData(f"holds two tensors called {name}")
        level = inner
    return list(found.values())


def _stored(value: Any) -> Stored | None:
    if isinstance(value, Thing) and value.path.endswith("._reconstruct") and isinstance(value.state, tuple):
        odd = "a NumPy array: convert it with torch.from_numpy"
        return Stored((), NUMPY, lambda: torch.empty(0), odd)
    return value if isinstance(value, Stored) else None


def _items(holding: Any) -> Iterator[tuple[Any, Any]]:
    match holding:
        case dict():
            yield from holding.items()
        case list() | tuple():
            yield from enumerate(holding)
        case Thing(
            state={"_parameters": dict() as own, "_buffers": dict() as buffers, "_modules": dict() as parts} as state
        ):
            passing = state.get("_non_persistent_buffers_set") or []
            yield from own.items()
            yield from ((name, value) for name, value in buffers.items() if name not in passing)
            yield from parts.items()
        case Thing():
            yield from holding.items.items()


@dataclass(frozen=True)
class Normaliser:
    """A mean and a standard deviation of images, one number per channel each, recognised by their names."""

    mean: Entry
    std: Entry

    def __str__(self) -> str:
        return f"{self.mean.name} and {self.std.name}"


@dataclass(frozen=True)
class Found:
    """The weights of a network in a file.

    Attributes:
        weights: name in the network → tensor.
        normalisers: the normalisations found beside the weights.
    """

    weights: Mapping[str, Entry]
    normalisers: Sequence[Normaliser]


def find(entries: Sequence[Entry], own: Mapping[str, Tensor], recipe: Pretrained) -> Found:
    """Find the prefix behind which all names of a network occur.

    Args:
        entries: all tensors of the file.
        own: name → tensor, of a new network of the arch.
        recipe: names the arch, and the key if there is a choice.

    Raises:
        BadData: no prefix fits, several fit with different weights, or tensors that belong to no layer lie beside them.
    """
    behind = _behind(entries, set(own))
    needed = [name for name in own if last_of(name) != BATCHES]
    fits = {start: weights for start, weights in behind.items() if all(name in weights for name in needed)}
    if not fits:
        raise BadData(_misfit(entries, behind, own, recipe.arch))
    chosen = fits if recipe.key is None else _below(fits, recipe.key)
    if not chosen:
        raise BadData(f"has no weights that fit arch {recipe.arch} at `key: {recipe.key}`, but at {_keys(fits)}")
    start, *others = sorted(chosen, key=len)
    weights = chosen[start]
    if any(not _same(weights, chosen[other]) for other in others):
        raise BadData(
            f"has several weights that fit arch {recipe.arch}: choose by `key: {_key(start)}` or {_keys(others)}"
        )
    beside = _beside(entries, weights, fits.values())
    normalisers = _normalisers(beside, recipe.shape[0])
    known = {entry for normaliser in normalisers for entry in (normaliser.mean, normaliser.std)}
    _refuse_others([entry for entry in beside if entry not in known], start, len(own), recipe)
    return Found(weights, normalisers)


def _behind(entries: Sequence[Entry], names: set[str]) -> dict[str, dict[str, Entry]]:
    """Prefix → the entries whose names, without it, are the network's."""
    found: dict[str, dict[str, Entry]] = {}
    lengths = {name.count(".") + 1 for name in names}
    for entry in entries:
        for length in lengths:
            parts = entry.name.rsplit(".", length)
            start, ending = (f"{parts[0]}.", parts[1:]) if len(parts) > length else ("", parts)
            if (name := ".".join(ending)) in names:
                found.setdefault(start, {})[name] = entry
    return found


def last_of(name: str) -> str:
    return name.rpartition(".")[2]


def _key(start: str) -> str:
    """A prefix as the recipe's `key`."""
    return start.removesuffix(".") or "''"


def _keys(starts: Iterable[str]) -> str:
    return ", ".join(f"`key: {_key(start)}`" for start in starts)


def _below(fits: Mapping[str, dict[str, Entry]], key: str) -> Mapping[str, dict[str, Entry]]:
    """The candidates at a key; if there are none, those anywhere below it."""
    start = f"{key}." if key else ""
    return {start: fits[start]} if start in fits else {one: fits[one] for one in fits if one.startswith(start)}


def _same(some: Mapping[str, Entry], others: Mapping[str, Entry]) -> bool:
    """Whether weights in two places are equal."""
    pairs = [(one.stored, others[name].stored) for name, one in some.items() if name in others]
    return all(
        one is other
        or (one.place is not None and one.place == other.place)
        or (
            not (one.odd or other.odd)
            and (one.shape, one.dtype) == (other.shape, other.dtype)
            and one.read().equal(other.read())
        )
        for one, other in pairs
    )


def _misfit(
    entries: Sequence[Entry], behind: Mapping[str, Mapping[str, Entry]], own: Mapping[str, Tensor], arch: str
) -> str:
    """How the file and the network differ, for the prefix with most matching names."""
    if not entries:
        return "holds no state dict: no tensor in it has a name"
    nearest = max(behind.values(), key=len, default={})
    missing = [name for name in own if name not in nearest and last_of(name) != BATCHES]
    if nearest:
        return differs(arch, missing[0], None, own[missing[0]].shape, len(missing), len(own))
    some = ", ".join(entry.name for entry in entries[:3])
    return f"does not fit arch {arch}: it has {some} and so on, the arch {', '.join(list(own)[:3])} and so on"


def differs(
    arch: str, name: str, there: Sequence[int] | None, here: Sequence[int] | None, count: int, total: int
) -> str:
    said = ["nothing" if shape is None else f"{tuple(shape)}" for shape in (there, here)]
    channels, hint = [tuple(shape or ())[1:2] for shape in (there, here)], ""
    if sorted(channels) == [(1,), (3,)]:
        hint = f": it takes images of {channels[0][0]} channel{'s' * (channels[0] > (1,))}, the first number of `shape`"
    return (
        f"does not fit arch {arch}: {name} is {said[0]} in the checkpoint and {said[1]} in the arch "
        f"({count} of {total} entries differ){hint}"
    )


def _beside(entries: Sequence[Entry], weights: Mapping[str, Entry], fits: Iterable[Mapping[str, Entry]]) -> list[Entry]:
    """Tensors beside the network's, in the same dict, that belong to no network of this arch but may affect it."""
    holders = {entry.holder for entry in weights.values()}
    known = {entry for found in fits for entry in found.values()}
    return [
        entry
        for entry in entries
        if entry.holder in holders
        and entry not in known
        and entry.stored.dtype != NUMPY
        and last_of(entry.name) not in COUNTERS
    ]


def _normalisers(beside: Sequence[Entry], channels: int) -> list[Normaliser]:
    """Pairs of a mean and a standard deviation in the same place, one number per channel each."""
    places: dict[str, dict[str, Entry]] = {}
    for entry in beside:
        matched = NORMALISER.fullmatch(entry.name)
        if matched and prod(entry.stored.shape) == channels and entry.stored.dtype in FLOATS:
            places.setdefault(matched["place"], {})["mean" if matched["mean"] else "std"] = entry
    return [Normaliser(**both) for both in places.values() if len(both) == 2]


def _refuse_others(others: Sequence[Entry], start: str, total: int, recipe: Pretrained) -> None:
    """Refuse other tensors beside a network, except auxiliary heads, and except where a key leaves them out.

    Raises:
        BadData: there are others.
    """
    heads = tuple(f"{start}{head}" for head in HEADS) if recipe.arch in nets.WITHOUT_HEADS else ()
    strange = [entry for entry in others if not entry.name.startswith(heads)]
    within = [entry for entry in strange if entry.name.startswith(start)]
    if within:
        name, shape = within[0].name.removeprefix(start), within[0].stored.shape
        raise BadData(differs(recipe.arch, name, shape, None, len(within), total))
    if strange and recipe.key is None:
        some = ", ".join(entry.name for entry in strange[:3]) + (", …" if len(strange) > 3 else "")
        raise BadData(
            f"has entries that belong to no layer of arch {recipe.arch} ({some}): to leave them out, add "
            f"`key: {_key(start)}`"
        )
