"""Do shards slow down a training or an evaluation? Images per second, beside loops without shards.

Training: ours, with the split in memory and streamed from shards; a loop over tensors already in memory, with the same
network and batch size; and a loop with `webdataset` and a `DataLoader` over the same shards. Evaluation: ours, shard by
shard, and the forward passes alone. A split in memory is read once, in the first epoch, so its cost is spread over the
epochs. Decoding: the fraction that threads can run in parallel.

    python -m benchmarks.loader                                        # noise, 32 pixels
    python -m benchmarks.loader --data FOLDER                          # FOLDER/cifar-10-batches-py
    python -m benchmarks.loader --arch resnet18 --side 224 --images 256 --shard-size 64 --batch 32 --data FOLDER
"""

import io
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import click
import torch
import torch.nn.functional as F
import webdataset
from PIL import Image
from torch import Tensor

from benchmarks.shards import CLASSES, shards_of
from benchmarks.side_by_side import attacked, images, in_turns, machine, on_shards, over, seconds_of, show, spread
from stages import evaluate, train
from stages.device import device, threads
from stages.model import Classifier, Design, on_device
from stages.prefetch import prefetch
from stages.recipes import Evaluate, Train
from stages.shard import Shard, pack, samples, unpack
from stages.tensors import to_unit

COLUMNS = ["", "images/s", "over tensors in memory"]


def examples_of(files: dict[str, Path], counts: dict[str, int], pixels: int) -> train.Examples:
    """The shards as training examples."""
    return train.Examples(list(files), counts, partial(_read, files), pixels, "")


def _read(files: dict[str, Path], name: str) -> Shard:
    return unpack(name, files[name].read_bytes(), 3)


def ours(recipe: Train, design: Design, examples: train.Examples) -> None:
    """Our training, reading included."""
    for _ in train.fit(recipe, design, examples, Path.cwd()):
        pass


def loop(recipe: Train, design: Design, epoch: Callable[[], Iterator[tuple[Tensor, Tensor]]]) -> None:
    """Plain SGD over an epoch's batches of images in [0, 1] and labels, both on the device."""
    with threads(recipe.threads):
        model = on_device(Classifier(design, Path.cwd(), recipe.precision)).train()
        optimizer = torch.optim.SGD(model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
        for x, y in (batch for _ in range(recipe.epochs) for batch in epoch()):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()


def in_memory(x_NCHW: Tensor, label_N: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of tensors already on the device, in random order."""
    order = torch.randperm(len(x_NCHW), device=x_NCHW.device)
    for first in range(0, len(order) - size + 1, size):
        chosen = order[first : first + size]
        yield x_NCHW[chosen], label_N[chosen]


def webdatasets(files: list[Path], size: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same shards with webdataset and a DataLoader: shuffled, decoded and collated by workers, or here."""
    read = webdataset.WebDataset([str(file) for file in files], shardshuffle=len(files), empty_check=False)
    samples = read.shuffle(1000).decode("torchrgb").to_tuple("png", "cls").batched(size, partial=False)
    for x, y in webdataset.WebLoader(samples, batch_size=None, num_workers=workers):
        yield x.to(device()), torch.as_tensor(y).to(device())


def score_ours(recipe: Evaluate, model: Classifier, examples: train.Examples) -> None:
    """Score every shard while prefetching the next, as workers do."""
    for shard in prefetch(examples.read, examples.names, 1):
        evaluate.score(recipe, [str(k) for k in range(CLASSES)], {"model": model}, {}, shard)


@torch.no_grad()
def forward(model: Classifier, x_NCHW: Tensor, size: int) -> None:
    """The forward passes alone."""
    with threads(1):
        for some in x_NCHW.split(size):
            model(some).argmax(1)


@click.command()
@on_shards
@click.option("--arch", default="fast_resnet", show_default=True, help="As in an experiment file.")
@click.option("--batch", default=128, show_default=True, help="Images per step.")
@click.option("--epochs", default=4, show_default=True, help="Of a training, in every round.")
@click.option("--precision", type=click.Choice(["float32", "bfloat16"]), default="bfloat16", show_default=True)
@click.option("--cores", default=1, show_default=True, help="Threads that train.")
@click.option("--loaders", default=1, show_default=True, help="Worker processes of a DataLoader, beside none.")
def main(
    arch: str,
    side: int,
    data: Path | None,
    count: int,
    shard_size: int,
    batch: int,
    epochs: int,
    precision: str,
    rounds: int,
    cores: int,
    loaders: int,
) -> None:
    """Measure training and evaluation from shards on this machine."""
    shards = shards_of(attacked(images(data, count, side), 0.5 if side == 32 else 3.0), shard_size)
    design = Design(arch, CLASSES, (3, side, side), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    recipe = Train(
        on="shards", arch=arch, epochs=epochs, batch_size=batch, precision=precision, threads=cores, eval_images=0
    )
    streamed = recipe.model_copy(update={"memory_budget": 0})
    x = torch.cat([to_unit(shard.images(), device()) for shard in shards])
    y = torch.cat([torch.from_numpy(shard.label).to(device()) for shard in shards])
    model = on_device(Classifier(design, Path.cwd())).eval().requires_grad_(False)
    scored = Evaluate(models=["model"], on="shards", batch_size=batch)
    with tempfile.TemporaryDirectory() as name:
        files = {shard.name: Path(name) / f"{shard.name}.tar" for shard in shards}
        for shard in shards:
            files[shard.name].write_bytes(pack(shard))
        counts = {shard.name: len(shard) for shard in shards}
        examples, tars = (
            examples_of(files, counts, sum(shard.images().nbytes for shard in shards)),
            list(files.values()),
        )
        training: dict[str, Callable[[], None]] = {
            "tensors in memory": lambda: loop(recipe, design, lambda: in_memory(x, y, batch)),
            "ours, in memory": lambda: ours(recipe, design, examples),
            "ours, streamed": lambda: ours(streamed, design, examples),
            "webdataset": lambda: loop(recipe, design, lambda: webdatasets(tars, batch, 0)),
            f"webdataset, {loaders} workers": lambda: loop(recipe, design, lambda: webdatasets(tars, batch, loaders)),
        }
        scoring: dict[str, Callable[[], None]] = {
            "tensors in memory": lambda: forward(model, x, batch),
            "ours, from shards": lambda: score_ours(scored, model, examples),
        }
        for work in (*training.values(), *scoring.values()):
            work()
        taken = [
            in_turns({name: lambda _, work=work: seconds_of(work) for name, work in each.items()}, rounds)
            for each in (training, scoring)
        ]
    click.echo(f"{arch}, {count} images of {side} × {side} px in {len(shards)} shards, batches of {batch}")
    click.echo(
        f"{precision} in training, float32 in evaluation, {cores} threads and 1, {rounds} rounds, reading included"
    )
    click.echo(machine("torch", "webdataset"))
    show(f"Training, {epochs} epochs of {count // batch} steps", COLUMNS, rates(taken[0], epochs * count))
    show("Evaluation", COLUMNS, rates(taken[1], count))
    show(
        "Decoding",
        ["ms of a core for each", "of it beside Python", "images/s of a process at most"],
        decoding(shards[0]),
    )


def decoding(shard: Shard) -> list[list[str]]:
    """CPU time of decoding a shard, and the part in Pillow's decoders, during which other threads run.

    The rest holds Python's lock, which bounds a process's images per second whatever its number of threads.
    """
    tar = pack(shard)
    whole = spent(lambda: unpack(shard.name, tar, 3))
    opened = [Image.open(io.BytesIO(sample.file)) for sample in samples(shard.name, tar)]
    beside = spent(lambda: [image.load() for image in opened])
    count = len(shard)
    return [[f"{1e3 * whole / count:.3f}", f"{beside / whole:.2f}", f"{count / (whole - beside):,.0f}"]]


def spent(work: Callable[[], object]) -> float:
    """CPU seconds."""
    started = time.thread_time()
    work()
    return time.thread_time() - started


def rates(taken: dict[str, list[float]], count: int) -> list[list[str]]:
    """Images per second, and the ratio to the first."""
    first = next(iter(taken.values()))
    return [
        [name, spread([count / each for each in seconds]), f"{over(first, seconds):.3f}"]
        for name, seconds in taken.items()
    ]


if __name__ == "__main__":
    main()
