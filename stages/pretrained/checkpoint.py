"""Import pretrained weights: fetch the file, find the weights in it, and load them into the network."""

import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import inf
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import torch
from torch import Tensor, nn

from stages import nets
from stages.design import Design
from stages.errors import BadData, BadInput
from stages.limits import CLASSES
from stages.model import Classifier, save
from stages.pretrained.fetch import fetched, is_elsewhere
from stages.pretrained.formats import Stored, opened
from stages.pretrained.wraps import BATCHES, FLOATS, Entry, Found, Normaliser, differs, entries_of, find, last_of
from stages.recipes import Pretrained

NORMALISE_AGAIN = ("googlenet", "inception_v3")
"""torchvision's networks that convert ImageNet's normalisation to one of 0.5 internally when built with weights:
((x − m) / s) · (s / .5) + (m − .5) / .5 = (x − .5) / .5. Ours are built without weights, so they get the latter."""

CLOSE = 1e-3
"""Tolerance between a given normalisation and one in the file: users write three digits."""

WHOLE = {"bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}


# ------------------------------------------------------------------------------------------------- import


def import_pretrained(recipe: Pretrained, data: Path, here: Path) -> tuple[Design, bytes]:
    """Import pretrained weights.

    Args:
        recipe: arch and weights.
        data: folder of relative paths.
        here: folder of the user's modules.

    Returns:
        The design of the classifier, and its weights as safetensors, in the network's dtypes.

    Raises:
        BadInput: the weights cannot be read or do not match the arch, or the arch cannot be built.
    """
    published = _known(recipe.arch).get(recipe.weights)
    network = nets.build(recipe.arch, recipe.classes or 2, recipe.shape[0], here)  # before the download
    with _about(recipe.weights), _file(recipe, published, data) as path:
        if recipe.sha256 is not None and recipe.sha256 != (digest := _sha256(path)):
            raise BadData(f"has sha256 {digest}, expected {recipe.sha256}")
        with opened(path) as held:
            return _fitted(recipe, entries_of(held), network, published, here)


def is_remote(recipe: Pretrained) -> bool:
    """Whether the weights must be downloaded."""
    return is_elsewhere(recipe.weights) or _known(recipe.arch).get(recipe.weights) is not None


@contextmanager
def _about(weights: str) -> Iterator[None]:
    """Turn `BadData` into a message about a checkpoint."""
    try:
        yield
    except BadData as error:
        raise BadInput(f"checkpoint {weights} {error}") from error


def _fitted(
    recipe: Pretrained, entries: list[Entry], network: nn.Module, published: Any, here: Path
) -> tuple[Design, bytes]:
    shape = (recipe.shape[0], recipe.shape[1], recipe.shape[2])
    found = find(entries, network.state_dict(), recipe)
    classes = recipe.classes or _count_classes(found, network)
    mean, std = _normalisation(recipe, published, found.normalisers)
    design = Design(recipe.arch, classes, shape, tuple(mean), tuple(std))
    if recipe.outputs is not None:
        design = _only(design, recipe.outputs)
    model = Classifier(design, here)
    model.network.load_state_dict(_state(found, model.network.state_dict(), recipe.arch))
    answers = list[Tensor]()
    model.register_forward_hook(lambda _, __, logits: answers.append(logits))
    nets.probe(model, shape, design.classes, recipe.arch)
    if not all(logits.isfinite().all() for logits in answers):
        raise BadData(f"makes arch {recipe.arch} give NaN or infinite logits for a black image")
    return design, save(model.network)


def _only(design: Design, outputs: Sequence[int]) -> Design:
    """The design that keeps some of the network's outputs only."""
    if (last := max(outputs)) >= design.classes:
        raise BadInput(f"outputs names {last}, but the network has {design.classes} classes, 0 to {design.classes - 1}")
    return replace(design, classes=len(outputs), outputs=tuple(outputs), of=design.classes)


# ------------------------------------------------------------------------------------------------ the file


@contextmanager
def _file(recipe: Pretrained, published: Any, data: Path) -> Iterator[Path]:
    if published is not None:
        yield _torchvisions(published)
        return
    if re.fullmatch("[A-Z][A-Z0-9_]*", recipe.weights) and not (data / recipe.weights).exists() and _known(recipe.arch):
        raise BadData(f"is no file; torchvision's weights of {recipe.arch} are {', '.join(_known(recipe.arch))}")
    with fetched(recipe.weights, data) as path:
        yield path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _known(arch: str) -> Mapping[str, Any]:
    """torchvision's weights for an arch, by name."""
    from torchvision import models

    if arch not in models.list_models(module=models):
        return {}
    known: Mapping[str, Any] = models.get_model_weights(arch).__members__
    return known


def _torchvisions(published: Any) -> Path:
    """A torchvision checkpoint in torch's cache, downloaded if missing and verified by the digest in its name."""
    name = PurePosixPath(urlsplit(published.url).path).name
    digest = name.partition(".")[0].rpartition("-")[2]
    kept = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not kept.is_file():
        with fetched(published.url, Path()) as path:
            if not _sha256(path).startswith(digest):
                raise BadData(f"was damaged on its way from {published.url}: its sha256 does not begin with {digest}")
            try:
                kept.parent.mkdir(parents=True, exist_ok=True)
                beside = kept.with_name(f"{name}.{uuid4().hex}.partial")
                shutil.copyfile(path, beside)
                beside.replace(kept)
            except OSError as error:
                raise BadData(f"cannot be kept in {kept.parent} ({error.strerror}): set TORCH_HOME") from error
    elif not _sha256(kept).startswith(digest):
        raise BadData(f"lies damaged in {kept}: delete it there, and it is fetched again")
    return kept


# ------------------------------------------------------------------------------------------- normalisation


def published_normalisation(arch: str, published: Any) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of torchvision's weights, from their preset."""
    if arch in NORMALISE_AGAIN:
        return [0.5] * 3, [0.5] * 3
    preset = published.transforms()
    return list(preset.mean), list(preset.std)


def _normalisation(
    recipe: Pretrained, published: Any, normalisers: Sequence[Normaliser]
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel: the recipe's, else torchvision's, else the file's, else none.

    Raises:
        BadData: they differ from those in the file.
        BadInput: the number of channels is wrong, or they are not for pixels from 0 to 1.
    """
    channels, own = recipe.shape[0], [_of_pixels(normaliser) for normaliser in normalisers]
    mean, std = own[0] if own else ([0.0] * channels, [1.0] * channels)
    if published is not None:
        mean, std = published_normalisation(recipe.arch, published)
    mean, std = (mean if recipe.mean is None else recipe.mean), (std if recipe.std is None else recipe.std)
    if not len(mean) == len(std) == channels:
        raise BadInput(f"mean and std have {len(mean)} and {len(std)} entries, the images {channels} channels")
    if beyond := [value for value in (*mean, *std) if not -2 <= value <= 2]:
        raise BadInput(f"mean and std are of pixels from 0 to 1, got {beyond[0]:g}: divide it by 255")
    for normaliser, found in zip(normalisers, own, strict=True):
        if any(abs(a - b) > CLOSE for a, b in zip((*mean, *std), (*found[0], *found[1]), strict=True)):
            raise BadData(
                f"has in {normaliser} {_short(*found)}, but {_short(mean, std)} are "
                "asked for: leave out `mean` and `std` to take its own"
            )
    return mean, std


def _of_pixels(normaliser: Normaliser) -> tuple[list[float], list[float]]:
    """Mean and standard deviation for pixels from 0 to 1; files may have them for pixels from 0 to 255."""
    mean, std = (_numbers(entry).double().flatten().tolist() for entry in (normaliser.mean, normaliser.std))
    if not all(abs(value) < inf for value in mean) or not all(0 < value < inf for value in std):
        raise BadData(f"has in {normaliser} a mean and std that normalise no image: {mean}, {std}")
    scale = 255 if max(map(abs, (*mean, *std))) > 2 else 1
    return [value / scale for value in mean], [value / scale for value in std]


def _short(*statistics: Sequence[float]) -> str:
    return " and ".join("[" + ", ".join(f"{value:.4g}" for value in values) + "]" for values in statistics)


# ---------------------------------------------------------------------------------------------------- fit


def _count_classes(found: Found, network: nn.Module) -> int:
    """Rows of the last linear layer in the arch's order, since safetensors sorts entries by name."""
    shapes = [found.weights[name].stored.shape for name in network.state_dict() if _is_matrix(name, found)]
    if not shapes:
        raise BadData("has no linear layer to count classes by: add `classes: N`")
    if not 1 <= shapes[-1][0] <= CLASSES:
        raise BadData(f"has a last layer of {shapes[-1][0]:,} classes: at most {CLASSES:,} are told apart")
    return shapes[-1][0]


def _is_matrix(name: str, found: Found) -> bool:
    return name.endswith("weight") and name in found.weights and len(found.weights[name].stored.shape) == 2


def _state(found: Found, own: Mapping[str, Tensor], arch: str) -> dict[str, Tensor]:
    """The weights as a state dict of the arch.

    Args:
        found: the entries of the weights.
        own: state dict of a network of the arch.

    Raises:
        BadData: an entry has another shape or an unsupported dtype.
    """
    held = {name: entry for name, entry in found.weights.items() if name in own and not _is_idle(name, entry.stored)}
    for entry in held.values():
        _refuse_odd(entry)
    if other := [name for name in own if name not in found.weights and last_of(name) != BATCHES]:
        raise BadData(differs(arch, other[0], None, own[other[0]].shape, len(other), len(own)))
    wrong = [name for name, entry in held.items() if not _fits(entry.stored.shape, own[name].shape)]
    if wrong:
        name = next(name for name in own if name in wrong)
        raise BadData(differs(arch, name, held[name].stored.shape, own[name].shape, len(wrong), len(own)))
    return {name: _converted(held[name], value) if name in held else value for name, value in own.items()}


def _is_idle(name: str, stored: Stored) -> bool:
    """Whether an entry is an invalid batch counter, such as one averaged with the weights: it has no effect."""
    return last_of(name) == BATCHES and (bool(stored.odd) or stored.dtype not in WHOLE)


def _fits(shape: Sequence[int], own: Sequence[int]) -> bool:
    """Whether the shapes match; PyTorch before 0.4 had no zero-dimensional tensors."""
    return tuple(shape) == tuple(own) or (tuple(shape), tuple(own)) == ((1,), ())


def _converted(entry: Entry, own: Tensor) -> Tensor:
    """A tensor in the network's dtype; values may change by rounding only."""
    kinds, expected = FLOATS if own.is_floating_point() else WHOLE, str(own.dtype).removeprefix("torch.")
    if entry.stored.dtype not in kinds:
        raise BadData(
            f"has {entry.stored.dtype} numbers in {entry.name}, the arch {expected}: use the weights as they were "
            "trained, not quantised or packed"
        )
    numbers = _numbers(entry).reshape(own.shape)
    converted = numbers.to(own.dtype)
    if not own.is_floating_point() and not converted.to(numbers.dtype).equal(numbers):
        raise BadData(f"has numbers in {entry.name} that {expected} does not hold")
    finite = converted.isfinite()
    if not finite.all() and own.isfinite().all():
        count = int((~finite).sum())
        raise BadData(f"has {count} NaN or infinite values among the {own.numel()} of {entry.name}: it is damaged")
    return converted


def _numbers(entry: Entry) -> Tensor:
    _refuse_odd(entry)
    return entry.stored.read()


def _refuse_odd(entry: Entry) -> None:
    if entry.stored.odd:
        raise BadData(
            f"has a tensor {entry.name} that is {entry.stored.odd}: save the network's weights as dense tensors"
        )
