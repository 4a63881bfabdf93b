"""Train a classifier by SGD on one split, epoch by epoch; resuming after any epoch gives the same bytes."""

import hashlib
import json
import math
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
from stages.prefetch import cores, prefetch, processes
from stages.recipes import Adversary, Train
from stages.refused import explained
from stages.seeds import coins, generator, torch_seed
from stages.shard import Shard
from stages.targeted_pgd import untargeted
from stages.tensors import in_batches, to_unit, unit
from stages.whiten import first_convolution, whiten

SHUFFLE_SHARDS = 4
"""Shards shuffled together when a split streams; as many are prefetched, or one per process of the pool if more."""

DECODERS = 16
"""Most decoding processes per GPU; each decodes about 300 photographs of 224 pixels per second."""

Batches = Iterator[tuple[Tensor, Tensor, np.ndarray]]
"""Pixels, uint8, N × H × W × C, and labels, both on the model's device; and the images' indices in the source."""


@dataclass(frozen=True)
class Examples:
    """A split to train on, shard by shard.

    Attributes:
        names: names of its shards.
        counts: shard name → number of samples.
        read: shard name → the shard; with a GPU it must be picklable, since other processes call it.
        bytes: size of all decoded pixels.
        digest: digest of the contents; a checkpoint with another digest is ignored.
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
    """The processes of a data-parallel training, and this process's rank.

    With more than one process, ``torch.distributed`` must be initialised in each.

    Attributes:
        rank: this process's number, from 0.
        world: number of processes.
    """

    rank: int = 0
    world: int = 1

    def part(self, count: int, rank: int) -> int:
        """First position of a rank's part of `count` items."""
        return rank * count // self.world

    def of_batch(self, batch_size: int) -> int:
        """This process's number of images per batch; if the batch does not divide, some processes have one more."""
        return self.part(batch_size, self.rank + 1) - self.part(batch_size, self.rank)

    def position(self, epoch: int) -> int:
        """Position of this process's random numbers in an epoch; the epoch itself if there is one process."""
        return epoch * self.world + self.rank

    def total(self, value: Tensor) -> float:
        """Sum of a number over all processes."""
        if self.world > 1:
            dist.all_reduce(value)
        return value.item()

    def told(self, value: bytes | None) -> bytes | None:
        """Broadcast the first process's value to all."""
        said = [value]
        if self.world > 1:
            dist.broadcast_object_list(said)
        return said[0]

    def joined(self, model: Classifier) -> nn.Module:
        """The model, with gradients averaged over all processes in each step."""
        return DistributedDataParallel(model) if self.world > 1 else model


ALONE = Group()


def share(counts: Sequence[int], batch_size: int, group: Group) -> list[tuple[int, slice]]:
    """A process's samples: a consecutive range, so that it shares few shards with other processes.

    Each sample belongs to one process, and each process has enough samples for its part of every full batch. The
    samples of the incomplete last batch are spread over all processes, so that no process always drops the same ones.

    Args:
        counts: samples of each shard, in the order of the epoch.
        batch_size: samples per step, over all processes.
        group: this process and the number of processes.

    Returns:
        Positions in ``counts``, each with a slice of that shard's samples.
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
    """The state of a training, which its checkpoints keep.

    Attributes:
        model: the model that the optimizer updates.
        optimizer: SGD, with its momentum buffers.
        average: moving average of the weights, which becomes the model; None without `ema`.
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
    """Train; after each epoch, yield a checkpoint and the metrics of all epochs so far.

    All random numbers come from (seed, epoch). So a training resumed from a checkpoint ends with the same bytes as an
    uninterrupted one, given the same kind of device, libraries and number of processes. Any number of processes can
    resume from a checkpoint.

    Several processes share each batch of ``batch_size`` images and step with the mean gradient of the whole batch.
    Batch norm is not synchronised: each process normalises by its own part, and the model keeps the first process's
    running statistics.

    Args:
        recipe: the recipe.
        design: the network to train.
        examples: the training split.
        here: folder of the user's own modules.
        checkpoint: checkpoint of an earlier call; ignored if it is damaged or made from other examples. The first
            process's counts for all.
        group: the processes that train together.
        start: for a linear probe, the weights of the probed model, as safetensors.
        watch: images scored after every epoch for the learning curve: pixels, uint8, N × H × W × C, and labels. They
            do not affect the training.

    Yields:
        The checkpoint (see `weights_of`) and, per epoch, the metrics over all processes: number, learning rate, mean
        loss, accuracy on the training labels (in adversarial training, of the attacked images), images per second; the
        ``test_accuracy`` if there are images to watch; the kind of ``device`` and its ``settings``; the number of
        ``workers`` if the recipe sets several. Only the first process yields.

    Raises:
        BadInput: fewer examples than one batch, or a linear probe of a network without a linear layer.
        BadData: the loss is no longer finite.
    """
    if len(examples) < recipe.batch_size:
        raise BadInput(f"batch_size {recipe.batch_size} is more than the {len(examples)} examples to train on")
    tune_malloc()
    fits = examples.bytes <= recipe.memory_budget * 2**20 * group.world
    with computing(recipe), processes(0 if fits else spare(device())) as pool:
        # A probe has a random stream of its own: else its new layer would equal the probed model's initial one.
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
    """Build the network and check the layers that the recipe needs, before any work is done.

    Raises:
        BadInput: no convolution can whiten, or no batch norm has a bias for `norm_bias_lr`.
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
    """Parameter groups of the optimizer; `share` is the multiple of the learning rate.

    Raises:
        BadInput: `norm_bias_lr` is set, but no batch norm has a bias to learn.
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
    """A trained model, frozen except for its last linear layer, which is taken from the fresh model."""
    model = load(fresh.design, weights, here, fresh.precision)
    name, last = head(model)
    last.load_state_dict(fresh.network.get_submodule(name).state_dict())
    last.requires_grad_(True)
    return model


def _score(model: Classifier, pixels_NHWC: np.ndarray, label_N: np.ndarray, batch_size: int) -> float:
    """Accuracy. Logits that are not finite count as wrong and do not end the training."""
    plain = model.eval().using("float32")

    @torch.no_grad()
    def right(pixels: np.ndarray, label: np.ndarray) -> np.ndarray:
        logits = np.asarray(plain(to_unit(pixels, plain.mean.device)).cpu())
        return np.asarray((logits.argmax(1) == label) & np.isfinite(logits).all(1))

    return float(in_batches(right, batch_size, pixels_NHWC, label_N).mean())


def _epoch(
    recipe: Train, learner: Learner, joined: nn.Module, batches: Batches, epoch: int, count: int, group: Group
) -> dict[str, Any]:
    """Train for one epoch; returns its metrics.

    Raises:
        BadData: the mean loss is not finite.
    """
    model, optimizer = learner.model, learner.optimizer
    started, where = time.perf_counter(), next(model.parameters()).device
    steps = count // recipe.batch_size
    torch.manual_seed(torch_seed(recipe.seed, "dropout", group.position(epoch)))
    draw = torch.Generator().manual_seed(torch_seed(recipe.seed, "augment", group.position(epoch)))
    loss_sum, right = torch.zeros((), device=where), torch.zeros((), device=where)
    # The same number of steps on every process: one with an extra step would wait for the others forever.
    for step, (pixels, labels, places) in zip(range(steps), batches, strict=False):
        flips = coins(recipe.seed, "flips", places) ^ bool(epoch % 2) if recipe.alternating_flip else None
        x, y = augment(unit(pixels), recipe.augment, draw, flips), labels
        for parameters in optimizer.param_groups:
            parameters["lr"] = parameters["share"] * learning_rate(recipe, epoch + step / steps, recipe.epochs)
        if recipe.adversarial is not None:
            x = _worst(model.eval(), x, y, recipe.adversarial)
        joined.train(recipe.probe is None)  # a probed model is frozen, batch norm's statistics included
        logits = joined(x)
        loss = F.cross_entropy(logits, y, label_smoothing=recipe.label_smoothing)
        # Weighted so that the mean over processes is the mean over the batch, also if their parts differ in size.
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
    images = steps * recipe.batch_size
    accuracy = group.total(right) / images
    return _metrics(recipe, epoch, loss_mean, accuracy, images / (time.perf_counter() - started), group)


def _metrics(recipe: Train, epoch: int, loss: float, accuracy: float, rate: float, group: Group) -> dict[str, Any]:
    workers = {"workers": group.world} if recipe.workers > 1 else {}
    return {
        "epoch": epoch + 1,
        "lr": learning_rate(recipe, epoch + 1, recipe.epochs),
        "loss": loss,
        "accuracy": accuracy,
        "images_per_second": round(rate, 1),
        "device": kind(),
        "settings": [settings_text()],
        **workers,
    }


def _worst(model: Classifier, x_NCHW: Tensor, label_N: Tensor, ball: Adversary) -> Tensor:
    """Adversarial examples of a batch (Madry et al. 2018): untargeted PGD from the images themselves, last iterate.

    The caller puts the model into evaluation mode, as the `robustness` library does. The model is not wrapped in
    `DistributedDataParallel`, since only gradients of the images are needed.
    """
    away = untargeted(folded(model) if ball.fold else model, label_N)
    return pgd(away, x_NCHW, norm=ball.norm, eps=ball.eps, step_size=ball.step, steps=ball.steps)


def learning_rate(recipe: Train, epoch: float, epochs: int) -> float:
    """Learning rate at a time in epochs, which may be fractional.

    `one-cycle` follows Smith and Topin (2018) with cosines, as torch's ``OneCycleLR``: from lr / 25 to lr, then to
    lr / 25e4.
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
    """Batches from a process's whole share in memory, as 8-bit pixels; on the device if it has room (see `room`)."""
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
    """Most bytes of a split to hold on a device: a quarter of a GPU's free memory, so that there is room to train."""
    return torch.cuda.mem_get_info(where)[0] / 4 if where.type == "cuda" else math.inf


def spare(where: torch.device) -> int:
    """Number of decoding processes for a device; 0 if threads of this process decode.

    A CPU trains more slowly than threads decode. A GPU gets its share of the cores, less one for the training loop.
    """
    if where.type != "cuda":
        return 0
    free = cores() // torch.cuda.device_count() - 1
    return min(free, DECODERS) if free > 1 else 0


def _streamed(
    recipe: Train, examples: Examples, group: Group, where: torch.device, pool: Executor | None
) -> Callable[[int], Batches]:
    """Batches from shards in random order, a few shuffled together while the pool or threads prefetch the next few.

    Samples that do not fill a batch join the next few shards.
    """
    size = group.of_batch(recipe.batch_size)

    def batches(epoch: int) -> Batches:
        # All processes draw the same order of shards, and each gets other shards in each epoch.
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
"""Pixels, labels and indices in the source, of some images."""


def _read(
    examples: Examples, names: Sequence[str], mine: Sequence[tuple[int, slice]], pool: Executor | None = None
) -> Iterator[Columns]:
    """A process's share of some shards, in order, prefetched by the pool or by threads."""
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
    """Digest of a checkpoint: its tensors, their names, types and offsets, and its metadata."""
    size = int.from_bytes(content[:8], "little")
    header = {name: place for name, place in json.loads(content[8 : 8 + size]).items() if name != "__metadata__"}
    named = json.dumps([header, about], sort_keys=True).encode()
    return hashlib.sha256(named + content[8 + size :]).hexdigest()


def _about(checkpoint: bytes) -> dict[str, Any]:
    size = int.from_bytes(checkpoint[:8], "little")
    about: dict[str, Any] = json.loads(json.loads(checkpoint[8 : 8 + size])["__metadata__"]["about"])
    return about


def came_from(checkpoint: bytes | None, origin: str) -> TypeGuard[bytes]:
    """Whether this is an intact checkpoint of a training on the examples with this digest."""
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
    """The metrics of a checkpoint's epochs."""
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
    """The model's weights in a checkpoint, as safetensors: the average if there is one."""
    tensors = safetensors.torch.load(checkpoint)
    return safetensors.torch.save(_part(tensors, "average.") or _part(tensors, "network."))


@cache
def refuse_misfit(design: Design, here: Path) -> None:
    """Build and try the network before any work is done; the result is cached per design.

    Raises:
        BadInput: the arch cannot be built, or does not fit the images or the classes.
    """
    model = Classifier(design, here)
    nets.probe(model, design.shape, design.classes, design.arch)
