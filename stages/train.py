"""Train a classifier: SGD over one split, epoch by epoch, resumable bit for bit after any of them."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from stages import nets
from stages.augment import augment
from stages.errors import BadData, BadInput
from stages.model import Classifier, Design, on_device, threads, to_unit
from stages.recipes import Train
from stages.seeds import generator, torch_seed
from stages.shard import Shard

SHUFFLE_SHARDS = 4
"""Shards mixed at a time when a split streams."""


@dataclass(frozen=True)
class Examples:
    """A split to train on, shard by shard.

    Attributes:
        names: its shards.
        counts: samples in each.
        read: shard name → the shard.
        bytes: of all its pixels, decoded.
        digest: of its contents; a checkpoint made from others is not gone on from.
    """

    names: list[str]
    counts: dict[str, int]
    read: Callable[[str], Shard]
    bytes: int
    digest: str

    def __len__(self) -> int:
        return sum(self.counts.values())


def fit(
    recipe: Train, design: Design, examples: Examples, here: Path, checkpoint: bytes | None = None
) -> Iterator[tuple[bytes, list[dict[str, Any]]]]:
    """Train; after each epoch give a checkpoint and the metrics of all epochs so far.

    All randomness comes from (seed, epoch), so a training that goes on from a checkpoint ends with the
    bytes of one that was never interrupted, on the same kind of device with the same libraries.

    Args:
        recipe: how to train.
        design: what to train.
        examples: what to train on.
        here: folder of the user's own modules.
        checkpoint: where to go on, as given by an earlier call; one that is damaged or comes from other
            examples is not used.

    Yields:
        The checkpoint (see `weights_of`) and the metrics: per epoch its number, learning rate, mean
        loss, accuracy on the labels trained on, images per second.

    Raises:
        BadInput: fewer examples than one batch.
        BadData: the loss is no longer a number.
    """
    if len(examples) < recipe.batch_size:
        raise BadInput(f"batch_size {recipe.batch_size} is more than the {len(examples)} examples to train on")
    with threads(recipe.threads):
        torch.manual_seed(torch_seed(recipe.seed, "weights"))
        model = on_device(Classifier(design, here, recipe.precision))
        optimizer = torch.optim.SGD(
            model.parameters(),
            recipe.lr,
            recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=recipe.nesterov,
        )
        history = _restore(model, optimizer, checkpoint) if came_from(checkpoint, examples.digest) else []
        batches = _in_memory(recipe, examples) if examples.bytes <= recipe.memory_budget * 2**20 else None
        for epoch in range(len(history), recipe.epochs):
            order = batches(epoch) if batches else _streamed(recipe, examples, epoch)
            history.append(_epoch(recipe, model, optimizer, order, epoch, len(examples)))
            yield _checkpoint(model, optimizer, history, examples.digest), list(history)


def _epoch(
    recipe: Train,
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[np.ndarray, np.ndarray]],
    epoch: int,
    count: int,
) -> dict[str, Any]:
    started, where = time.perf_counter(), model.mean.device
    steps = count // recipe.batch_size
    torch.manual_seed(torch_seed(recipe.seed, "dropout", epoch))
    draw = torch.Generator().manual_seed(torch_seed(recipe.seed, "augment", epoch))
    loss_sum, right = torch.zeros((), device=where), torch.zeros((), device=where)
    model.train()
    for step, (pixels, labels) in enumerate(batches):
        x = augment(to_unit(pixels, where), recipe.augment, draw)
        y = torch.from_numpy(labels).to(where)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, epoch + step / steps, recipe.epochs)
        logits = model(x)
        loss = F.cross_entropy(logits, y, label_smoothing=recipe.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        loss_sum += loss.detach()
        right += (logits.argmax(1) == y).sum()
    loss_mean = loss_sum.item() / steps
    if not math.isfinite(loss_mean):
        raise BadData(f"the loss is {loss_mean} in epoch {epoch + 1}: lower lr (it is {recipe.lr:g})")
    seconds = time.perf_counter() - started
    return {
        "epoch": epoch + 1,
        "lr": learning_rate(recipe, epoch + 1, recipe.epochs),
        "loss": loss_mean,
        "accuracy": right.item() / (steps * recipe.batch_size),
        "images_per_second": round(steps * recipe.batch_size / seconds, 1),
    }


def learning_rate(recipe: Train, epoch: float, epochs: int) -> float:
    """The learning rate at a moment, counted in epochs.

    `one-cycle` is Smith and Topin's (2018) with cosines, as torch's ``OneCycleLR``: from lr / 25 to lr,
    then to lr / 25e4.
    """
    progress = min(1.0, epoch / epochs)
    match recipe.schedule:
        case "constant":
            return recipe.lr
        case "steps":
            return recipe.lr * 0.1 ** sum(epoch >= drop for drop in recipe.drops)
        case "cosine":
            return _cosine(recipe.lr, 0.0, progress)
        case "one-cycle" if progress < recipe.warmup:
            return _cosine(recipe.lr / 25, recipe.lr, progress / recipe.warmup)
        case "one-cycle":
            return _cosine(recipe.lr, recipe.lr / 25e4, (progress - recipe.warmup) / (1 - recipe.warmup))


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def _in_memory(recipe: Train, examples: Examples) -> Callable[[int], Iterator[tuple[np.ndarray, np.ndarray]]]:
    shards = [examples.read(name) for name in examples.names]
    pixels = np.concatenate([shard.images() for shard in shards])
    labels = np.concatenate([shard.label for shard in shards])

    def batches(epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        order = generator(recipe.seed, "order", epoch).permutation(len(labels))
        for first in range(0, len(order) - recipe.batch_size + 1, recipe.batch_size):
            chosen = order[first : first + recipe.batch_size]
            yield pixels[chosen], labels[chosen]

    return batches


def _streamed(recipe: Train, examples: Examples, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Shards in random order, a few of them mixed at a time; what does not fill a batch waits for the next few."""
    draw = generator(recipe.seed, "order", epoch)
    names = [examples.names[i] for i in draw.permutation(len(examples.names))]
    pixels, labels = None, None
    for first in range(0, len(names), SHUFFLE_SHARDS):
        shards = [examples.read(name) for name in names[first : first + SHUFFLE_SHARDS]]
        fresh, fresh_labels = (
            np.concatenate([s.images() for s in shards]),
            np.concatenate([s.label for s in shards]),
        )
        pixels = fresh if pixels is None else np.concatenate([pixels, fresh])
        labels = fresh_labels if labels is None else np.concatenate([labels, fresh_labels])
        order = draw.permutation(len(labels))
        whole = len(order) // recipe.batch_size * recipe.batch_size
        for start in range(0, whole, recipe.batch_size):
            chosen = order[start : start + recipe.batch_size]
            yield pixels[chosen], labels[chosen]
        pixels, labels = pixels[order[whole:]], labels[order[whole:]]


def _checkpoint(
    model: Classifier, optimizer: torch.optim.Optimizer, history: list[dict[str, Any]], origin: str
) -> bytes:
    tensors: dict[str, Tensor] = {f"network.{k}": v for k, v in model.network.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        if state.get("momentum_buffer") is not None:
            tensors[f"momentum.{number}"] = state["momentum_buffer"]
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    about = {"on": origin, "history": history, "sha256": _body_digest(safetensors.torch.save(tensors))}
    return safetensors.torch.save(tensors, metadata={"about": json.dumps(about)})


def _body_digest(content: bytes) -> str:
    """Of the tensors in a safetensors file, without its header."""
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def _about(checkpoint: bytes) -> dict[str, Any]:
    size = int.from_bytes(checkpoint[:8], "little")
    about: dict[str, Any] = json.loads(json.loads(checkpoint[8 : 8 + size])["__metadata__"]["about"])
    return about


def came_from(checkpoint: bytes | None, origin: str) -> TypeGuard[bytes]:
    """Whether this is a whole checkpoint of a training on these examples."""
    try:
        if checkpoint is None or _about(checkpoint)["on"] != origin:
            return False
        if _about(checkpoint)["sha256"] != _body_digest(checkpoint):
            return False
        safetensors.torch.load(checkpoint)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError):
        return False
    return True


def history_of(checkpoint: bytes) -> list[dict[str, Any]]:
    """The metrics of the epochs so far."""
    history: list[dict[str, Any]] = _about(checkpoint)["history"]
    return history


def _restore(model: Classifier, optimizer: torch.optim.Optimizer, checkpoint: bytes) -> list[dict[str, Any]]:
    tensors = safetensors.torch.load(checkpoint)
    model.network.load_state_dict(
        {k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")}
    )
    momentum = {int(k.removeprefix("momentum.")): v for k, v in tensors.items() if k.startswith("momentum.")}
    state = optimizer.state_dict()
    state["state"] = {number: {"momentum_buffer": value} for number, value in momentum.items()}
    optimizer.load_state_dict(state)
    return history_of(checkpoint)


def weights_of(checkpoint: bytes) -> bytes:
    """The network's weights out of a checkpoint, as safetensors."""
    tensors = safetensors.torch.load(checkpoint)
    return safetensors.torch.save(
        {k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")}
    )


def refuse_misfit(recipe: Train, design: Design, here: Path) -> None:
    """Build the network and try it once, before any work is done.

    Raises:
        BadInput: the arch cannot be built, or does not fit the images or the classes.
    """
    model = Classifier(design, here)
    nets.probe(model, design.shape, design.classes, recipe.arch)
