"""Train a classifier: SGD over one split, epoch by epoch, resumable bit for bit after any of them."""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from stages import nets
from stages.augment import augment
from stages.average import Average
from stages.design import Design
from stages.device import computing, device, kind, on, sent, settings_text, tune_malloc
from stages.errors import BadData, BadInput
from stages.features import head
from stages.inference import compiled, folded
from stages.model import Classifier, load, on_device
from stages.pgd import pgd
from stages.prefetch import prefetch, processes
from stages.recipes import Adversary, Train
from stages.refused import explained
from stages.seeds import coins, generator, torch_seed
from stages.shard import Shard
from stages.targeted_pgd import untargeted
from stages.tensors import in_batches, to_unit, unit
from stages.whiten import first_convolution, whiten

SHUFFLE_SHARDS = 4
"""Shards mixed at a time when a split streams; as many are prefetched, or one for each process of the pool."""

DECODERS = 16
"""Most processes that decode for one GPU; each decodes about 300 photographs of 224 pixels per second."""

Batches = Iterator[tuple[Tensor, Tensor, np.ndarray]]
"""Pixels, uint8, N × H × W × C, and labels, where the model is; and the images' places in the source."""


@dataclass(frozen=True)
class Examples:
    """A split to train on, shard by shard.

    Attributes:
        names: its shards.
        counts: samples in each.
        read: shard name → the shard; with a GPU it is pickled, so that other processes can call it.
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


@dataclass(frozen=True)
class Group:
    """The processes that train side by side, and which of them this is.

    Where there is more than one, ``torch.distributed`` must be initialised in each.

    Attributes:
        rank: this process's number, from 0.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    def part(self, count: int, rank: int) -> int:
        """Where a rank's part of so many things begins."""
        return rank * count // self.world

    def of_batch(self, batch_size: int) -> int:
        """Images of a batch that are this process's; where they do not divide, some have one more."""
        return self.part(batch_size, self.rank + 1) - self.part(batch_size, self.rank)

    def position(self, epoch: int) -> int:
        """Where this process draws in an epoch; alone, at the epoch itself."""
        return epoch * self.world + self.rank

    def total(self, value: Tensor) -> float:
        """The sum of a number over all processes."""
        if self.world > 1:
            dist.all_reduce(value)
        return value.item()

    def told(self, value: bytes | None) -> bytes | None:
        """What the first process has, on every process."""
        said = [value]
        if self.world > 1:
            dist.broadcast_object_list(said)
        return said[0]

    def joined(self, model: Classifier) -> nn.Module:
        """The model, its gradients averaged over all processes in every step."""
        return DistributedDataParallel(model) if self.world > 1 else model


ALONE = Group()


def share(counts: Sequence[int], batch_size: int, group: Group) -> list[tuple[int, slice]]:
    """The samples of a process: one run of consecutive ones, so that it reads few shards that others read too.

    Every sample belongs to one process, and each process has enough for its part of every whole batch.
    What is left of the last batch is spread over all, so that none drops always the same.

    Args:
        counts: samples of each shard, in the order of the epoch.
        batch_size: samples of a step, of all processes together.
        group: which process.

    Returns:
        Positions in ``counts``, and which samples of that shard.
    """
    steps, rest = divmod(sum(counts), batch_size)
    first, last = (
        steps * group.part(batch_size, rank) + group.part(rest, rank) for rank in (group.rank, group.rank + 1)
    )
    found, start = [], 0
    for position, count in enumerate(counts):
        mine = slice(max(first - start, 0), min(last - start, count))
        if mine.start < mine.stop:
            found.append((position, mine))
        start += count
    return found


@dataclass(frozen=True)
class Learner:
    """What changes in a training, and what its checkpoints keep.

    Attributes:
        model: whose weights take the steps.
        optimizer: with the momentum of each.
        average: of its weights, where that is to be the model.
    """

    model: Classifier
    optimizer: torch.optim.Optimizer
    average: Average | None


def fit(
    recipe: Train,
    design: Design,
    examples: Examples,
    here: Path,
    checkpoint: bytes | None = None,
    group: Group = ALONE,
    start: bytes | None = None,
    watch: tuple[np.ndarray, np.ndarray] | None = None,
) -> Iterator[tuple[bytes, list[dict[str, Any]]]]:
    """Train; after each epoch give a checkpoint and the metrics of all epochs so far.

    All randomness comes from (seed, epoch), so a training that goes on from a checkpoint ends with the
    bytes of one that was never interrupted, on the same kind of device with the same libraries and as
    many processes. A checkpoint says nothing of how many there were: any number can go on from it.

    Several processes see what one would see in a step, a batch of ``batch_size``, each its part, and take
    the step with the mean gradient of the whole batch. Batch norm is plain: each process normalises by its
    own part, and the first one's running statistics are the model's.

    Args:
        recipe: how to train.
        design: what to train.
        examples: what to train on.
        here: folder of the user's own modules.
        checkpoint: where to go on, as given by an earlier call; one that is damaged or comes from other
            examples is not used. What the first process has counts, for all.
        group: the processes that train together.
        start: for a linear probe, the weights of the model that is probed, as safetensors.
        watch: images that are scored after every epoch, for the learning curve: pixels, uint8, N × H × W × C,
            and labels. They change nothing of the training.

    Yields:
        The checkpoint (see `weights_of`) and the metrics: per epoch its number, learning rate, mean
        loss, accuracy on the labels trained on (of the images as they were trained on: under attack, in
        adversarial training), images per second, all of all processes together; where there is something to
        watch, the ``test_accuracy``; the kind of ``device`` and its ``settings``; and, where the recipe asks for
        several, the number of ``workers``.
        Only the first process yields.

    Raises:
        BadInput: fewer examples than one batch, or a linear probe of a network without a linear layer.
        BadData: the loss is no longer a number.
    """
    if len(examples) < recipe.batch_size:
        raise BadInput(f"batch_size {recipe.batch_size} is more than the {len(examples)} examples to train on")
    tune_malloc()
    fits = examples.bytes <= recipe.memory_budget * 2**20 * group.world
    with computing(recipe), processes(0 if fits else spare(device())) as pool:
        # From another stream for a probe: of the same seed, its new layer would be the one that the model began with.
        torch.manual_seed(torch_seed(recipe.seed, "weights" if start is None else "probe"))
        model = on_device(Classifier(design, here, recipe.precision))
        if start is not None:
            model = _probe(model, start, here)
        checkpoint = group.told(checkpoint)
        if not came_from(checkpoint, examples.digest):
            checkpoint = None
        if recipe.whiten and checkpoint is None:
            whiten(model, (examples.read(name).images() for name in examples.names))
        learner = _learner(recipe, model)
        history = [] if checkpoint is None else _restore(learner, checkpoint)
        where = next(model.parameters()).device
        held = _in_memory(recipe, examples, group, where) if fits else None
        batches = held or _streamed(recipe, examples, group, where, pool)
        joined = group.joined(compiled(model, recipe.compile))
        for epoch in range(len(history), recipe.epochs):
            with explained(recipe, model):
                history.append(_epoch(recipe, learner, joined, batches(epoch), epoch, len(examples), group))
            if group.rank == 0:
                if watch is not None:
                    made = model if learner.average is None else learner.average.model
                    history[-1]["test_accuracy"] = _score(made, *watch, recipe.batch_size)
                yield _checkpoint(learner, history, examples.digest), list(history)


def refuse_unfit(recipe: Train, design: Design, here: Path) -> None:
    """Build the network and see whether it has what the recipe is about, before any work is done.

    Raises:
        BadInput: there is nothing to whiten with, or no bias of batch norm to learn at a rate of its own.
    """
    _learner(recipe, Classifier(design, here))


def _learner(recipe: Train, model: Classifier) -> Learner:
    if recipe.whiten:
        first_convolution(model).weight.requires_grad_(False)
    optimizer = torch.optim.SGD(
        _groups(recipe, model),
        recipe.lr,
        recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
    )
    return Learner(model, optimizer, None if recipe.ema is None else Average(model, recipe.ema))


def _groups(recipe: Train, model: Classifier) -> list[dict[str, Any]]:
    """What is learned, as the optimizer takes it; `share`: how often the learning rate.

    Raises:
        BadInput: the biases of batch norm have a rate of their own, and there are none.
    """
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if recipe.norm_bias_lr == 1:
        return [{"params": learned, "share": 1}]
    norms = {module.bias for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    biases = [parameter for parameter in learned if parameter in norms]
    if not biases:
        raise BadInput(f"arch {model.design.arch} has no batch norm whose biases are learned: leave out norm_bias_lr")
    apart = {"share": recipe.norm_bias_lr, "weight_decay": recipe.weight_decay / recipe.norm_bias_lr}
    return [
        {"params": [parameter for parameter in learned if parameter not in norms], "share": 1},
        {"params": biases, **apart},
    ]


def _probe(fresh: Classifier, weights: bytes, here: Path) -> Classifier:
    """A trained model, frozen, but for its last linear layer, which is the fresh model's."""
    model = load(fresh.design, weights, here, fresh.precision)
    name, last = head(model)
    last.load_state_dict(fresh.network.get_submodule(name).state_dict())
    last.requires_grad_(True)
    return model


def _score(model: Classifier, pixels_NHWC: np.ndarray, label_N: np.ndarray, batch_size: int) -> float:
    """Accuracy; an answer that is no number is a wrong one, and no reason to end a training."""
    plain = model.eval().using("float32")

    @torch.no_grad()
    def right(pixels: np.ndarray, label: np.ndarray) -> np.ndarray:
        logits = np.asarray(plain(to_unit(pixels, plain.mean.device)).cpu())
        return np.asarray((logits.argmax(1) == label) & np.isfinite(logits).all(1))

    return float(in_batches(right, batch_size, pixels_NHWC, label_N).mean())


def _epoch(
    recipe: Train,
    learner: Learner,
    joined: nn.Module,
    batches: Batches,
    epoch: int,
    count: int,
    group: Group,
) -> dict[str, Any]:
    model, optimizer = learner.model, learner.optimizer
    started, where = time.perf_counter(), next(model.parameters()).device
    steps = count // recipe.batch_size
    torch.manual_seed(torch_seed(recipe.seed, "dropout", group.position(epoch)))
    draw = torch.Generator().manual_seed(torch_seed(recipe.seed, "augment", group.position(epoch)))
    loss_sum, right = torch.zeros((), device=where), torch.zeros((), device=where)
    # As many steps on every process: one that took another step would wait for the others for ever.
    for step, (pixels, labels, places) in zip(range(steps), batches, strict=False):
        flips = coins(recipe.seed, "flips", places) ^ bool(epoch % 2) if recipe.alternating_flip else None
        x, y = augment(unit(pixels), recipe.augment, draw, flips), labels
        for parameters in optimizer.param_groups:
            parameters["lr"] = parameters["share"] * learning_rate(recipe, epoch + step / steps, recipe.epochs)
        if recipe.adversarial is not None:
            x = _worst(model.eval(), x, y, recipe.adversarial)
        joined.train(recipe.probe is None)  # what is probed stays as it is, batch norm's statistics too
        logits = joined(x)
        loss = F.cross_entropy(logits, y, label_smoothing=recipe.label_smoothing)
        # The mean over processes of this is the mean over the batch, also where their parts differ.
        loss = loss * (len(y) * group.world / recipe.batch_size)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if learner.average is not None:
            learner.average.take(model, epoch * steps + step)
        loss_sum += loss.detach()
        right += (logits.argmax(1) == y).sum()
    loss_mean = group.total(loss_sum) / group.world / steps
    if not math.isfinite(loss_mean):
        raise BadData(f"the loss is {loss_mean} in epoch {epoch + 1}: lower lr (it is {recipe.lr:g})")
    accuracy = group.total(right) / (steps * recipe.batch_size)
    seconds = time.perf_counter() - started
    workers = {"workers": group.world} if recipe.workers > 1 else {}
    return {
        "epoch": epoch + 1,
        "lr": learning_rate(recipe, epoch + 1, recipe.epochs),
        "loss": loss_mean,
        "accuracy": accuracy,
        "images_per_second": round(steps * recipe.batch_size / seconds, 1),
        "device": kind(),
        "settings": [settings_text()],
        **workers,
    }


def _worst(model: Classifier, x_NCHW: Tensor, label_N: Tensor, ball: Adversary) -> Tensor:
    """A batch moved away from its labels (Madry et al. 2018): PGD from the images themselves, its last iterate.

    As in the `robustness` library the model is in evaluation mode for that. It is the model itself, not what
    averages its gradients over processes: only those of the images are taken.
    """
    away = untargeted(folded(model) if ball.fold else model, label_N)
    return pgd(away, x_NCHW, norm=ball.norm, eps=ball.eps, step_size=ball.step, steps=ball.steps)


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
            return recipe.lr * 0.1 ** sum(epoch >= milestone for milestone in recipe.milestones)
        case "cosine":
            return _cosine(recipe.lr, 0.0, progress)
        case "triangular":
            rising = progress < recipe.warmup
            return recipe.lr * (progress / recipe.warmup if rising else (1 - progress) / (1 - recipe.warmup))
        case "one-cycle" if progress < recipe.warmup:
            return _cosine(recipe.lr / 25, recipe.lr, progress / recipe.warmup)
        case "one-cycle":
            return _cosine(recipe.lr, recipe.lr / 25e4, (progress - recipe.warmup) / (1 - recipe.warmup))


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def _in_memory(recipe: Train, examples: Examples, group: Group, where: torch.device) -> Callable[[int], Batches]:
    """All of a process's share, held on the device, as eight bits, where that has room for it: see `room`."""
    mine = share([examples.counts[name] for name in examples.names], recipe.batch_size, group)
    parts = list(_read(examples, examples.names, mine))
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    (pixels, labels), index = (torch.from_numpy(column) for column in columns[:2]), columns[2]
    size, held = group.of_batch(recipe.batch_size), pixels.nbytes <= room(where)
    if held:
        pixels, labels = pixels.to(where), labels.to(where)

    def batches(epoch: int) -> Batches:
        order = generator(recipe.seed, "order", group.position(epoch)).permutation(len(labels))
        places = sent(order, pixels.device)
        for first in range(0, len(order) - size + 1, size):
            chosen = places[first : first + size]
            yield on(pixels[chosen], where), on(labels[chosen], where), index[order[first : first + size]]

    return batches


def room(where: torch.device) -> float:
    """Bytes of a split that a device may hold: of a GPU a quarter of what is free, so that there is room to train."""
    return torch.cuda.mem_get_info(where)[0] / 4 if where.type == "cuda" else math.inf


def spare(where: torch.device) -> int:
    """Number of processes that decode what streams to a device; with 0, threads of this process decode.

    A processor trains slower than threads decode. For a GPU, it is the GPU's share of the cores less one, which the
    training loop keeps.
    """
    if where.type != "cuda":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    free = cores // torch.cuda.device_count() - 1
    return min(free, DECODERS) if free > 1 else 0


def _streamed(
    recipe: Train, examples: Examples, group: Group, where: torch.device, pool: Executor | None
) -> Callable[[int], Batches]:
    """Shards in random order, a few of them mixed at a time, the next few read meanwhile: by the pool, or by threads.

    What does not fill a batch waits for the next few.
    """
    size = group.of_batch(recipe.batch_size)

    def batches(epoch: int) -> Batches:
        # All processes draw the same order of shards; which of them are a process's changes with it.
        draw = generator(recipe.seed, "order", epoch)
        names = [examples.names[i] for i in draw.permutation(len(examples.names))]
        mine = share([examples.counts[name] for name in names], recipe.batch_size, group)
        parts, left = _read(examples, names, mine, pool), list[Columns]()
        while fresh := list(islice(parts, SHUFFLE_SHARDS)):
            pixels, labels, index = (np.concatenate(column) for column in zip(*left, *fresh, strict=True))
            order = draw.permutation(len(labels))
            whole = len(order) // size * size
            for start in range(0, whole, size):
                chosen = order[start : start + size]
                yield sent(pixels[chosen], where), sent(labels[chosen], where), index[chosen]
            left = [(pixels[order[whole:]], labels[order[whole:]], index[order[whole:]])]

    return batches


Columns = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Pixels, labels and places in the source, of some images."""


def _read(
    examples: Examples, names: Sequence[str], mine: Sequence[tuple[int, slice]], pool: Executor | None = None
) -> Iterator[Columns]:
    """A process's share of some shards, in order, read by the pool or by threads."""
    parts = ((names[position], part) for position, part in mine)
    count = SHUFFLE_SHARDS if pool is None else max(SHUFFLE_SHARDS, spare(device()))
    return prefetch(partial(_columns, examples.read), parts, count, pool)


def _columns(read: Callable[[str], Shard], part: tuple[str, slice]) -> Columns:
    shard = read(part[0])
    return shard.images()[part[1]], shard.label[part[1]], shard.index[part[1]]


def _checkpoint(learner: Learner, history: list[dict[str, Any]], origin: str) -> bytes:
    tensors: dict[str, Tensor] = {f"network.{k}": v for k, v in learner.model.network.state_dict().items()}
    if learner.average is not None:
        tensors |= {f"average.{k}": v for k, v in learner.average.model.network.state_dict().items()}
    for number, state in learner.optimizer.state_dict()["state"].items():
        if state.get("momentum_buffer") is not None:
            tensors[f"momentum.{number}"] = state["momentum_buffer"]
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    about = {"on": origin, "history": json.loads(json.dumps(history))}
    sha256 = _digest(safetensors.torch.save(tensors), about)
    return safetensors.torch.save(tensors, metadata={"about": json.dumps({**about, "sha256": sha256})})


def _digest(content: bytes, about: dict[str, Any]) -> str:
    """Of a checkpoint: its tensors, their names, types and places, and what is said of them."""
    size = int.from_bytes(content[:8], "little")
    header = {name: place for name, place in json.loads(content[8 : 8 + size]).items() if name != "__metadata__"}
    named = json.dumps([header, about], sort_keys=True).encode()
    return hashlib.sha256(named + content[8 + size :]).hexdigest()


def _about(checkpoint: bytes) -> dict[str, Any]:
    size = int.from_bytes(checkpoint[:8], "little")
    about: dict[str, Any] = json.loads(json.loads(checkpoint[8 : 8 + size])["__metadata__"]["about"])
    return about


def came_from(checkpoint: bytes | None, origin: str) -> TypeGuard[bytes]:
    """Whether this is a whole checkpoint of a training on these examples."""
    try:
        if checkpoint is None or (about := _about(checkpoint))["on"] != origin:
            return False
        if about.pop("sha256") != _digest(checkpoint, about):
            return False
        safetensors.torch.load(checkpoint)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    return True


def history_of(checkpoint: bytes) -> list[dict[str, Any]]:
    """The metrics of the epochs so far."""
    history: list[dict[str, Any]] = _about(checkpoint)["history"]
    return history


def _restore(learner: Learner, checkpoint: bytes) -> list[dict[str, Any]]:
    tensors = safetensors.torch.load(checkpoint)
    learner.model.network.load_state_dict(_part(tensors, "network."))
    if learner.average is not None:
        learner.average.model.network.load_state_dict(_part(tensors, "average."))
    state = learner.optimizer.state_dict()
    momentum = _part(tensors, "momentum.")
    state["state"] = {int(number): {"momentum_buffer": value} for number, value in momentum.items()}
    learner.optimizer.load_state_dict(state)
    return history_of(checkpoint)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def weights_of(checkpoint: bytes) -> bytes:
    """The model's weights out of a checkpoint, as safetensors: the average of the network's, where there is one."""
    tensors = safetensors.torch.load(checkpoint)
    return safetensors.torch.save(_part(tensors, "average.") or _part(tensors, "network."))


@cache
def refuse_misfit(design: Design, here: Path) -> None:
    """Build the network and try it once, before any work is done; one design is tried once.

    Raises:
        BadInput: the arch cannot be built, or does not fit the images or the classes.
    """
    model = Classifier(design, here)
    nets.probe(model, design.shape, design.classes, design.arch)
