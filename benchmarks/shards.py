"""Images per second when writing and reading shards: ours, `webdataset` and Ray Data, one process each, same images.

Our writing is the whole commit of a shard: encode, pack, read back and compare every pixel, hash, write, rows and mark.
`webdataset.ShardWriter` and Ray Data's `write_webdataset` (on one CPU) encode and write, without reading back. Reading
goes from a file to decoded pixels; ours checks the digest first.

    python -m benchmarks.shards                          # noise, 32 pixels
    python -m benchmarks.shards --data FOLDER            # FOLDER/cifar-10-batches-py
    python -m benchmarks.shards --side 224 --images 200 --shard-size 100 --data FOLDER    # photographs below FOLDER

The images are clean ones plus noise with the radius of an attack. The last table is the basis for our PNG level
(`stages.images.PNG_LEVEL`).
"""

import io
import logging
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import ray
import webdataset
from PIL import Image

from benchmarks.side_by_side import attacked, images, in_turns, machine, on_shards, over, seconds_of, show, spread
from pipeline.experiment.graph import build
from pipeline.experiment.spec import parse
from pipeline.run.artifacts import Artifact
from pipeline.run.jobs import AttackJob, Context, Unit
from pipeline.store import Store, digest
from stages.device import threads
from stages.images import PNG_LEVEL, decode, encode_png
from stages.shard import Shard, key, unpack

CLASSES = 10

STRATEGIES = {"default": -1, "Huffman only": 2, "runs": 3}
"""zlib's strategies, as values of Pillow's ``compress_type``."""


def shards_of(pixels_NHWC: np.ndarray, size: int) -> list[Shard]:
    """The images as shards, with the columns of an attack."""
    draw = np.random.default_rng(0)

    def shard(number: int, first: int) -> Shard:
        some = pixels_NHWC[first : first + size]
        count, index = len(some), np.arange(first, first + len(some))
        label = index % CLASSES
        effect: dict[str, np.ndarray] = {
            "target": label,
            "success": draw.random(count) > 0.1,
            "success_step": draw.integers(0, 50, count),
            **{name: draw.random(count).astype(np.float32) for name in ("margin", "confidence")},
            **{name: draw.random(count) for name in ("l2", "linf")},
        }
        return Shard(f"train-{number:06d}", index, label, label, some, attack=effect)

    return [shard(number, first) for number, first in enumerate(range(0, len(pixels_NHWC), size))]


# -------------------------------------------------------------------------------------------------- writers


def write_ours(shards: list[Shard], folder: Path) -> None:
    """Write as a dataset node commits its shards."""
    wanted = {
        "clean": {"load": {"source": "webdataset", "shards": {"train": "clean.tar"}}},
        "other": {"attack": {"images": "clean", "method": "none"}, "relabel": "other"},
    }
    node = build(parse({"name": "shards", "datasets": wanted}))[-1]
    classes = [str(name) for name in range(CLASSES)]
    clean = Artifact("datasets/clean", {"classes": classes, "channels": shards[0].images().shape[3]})
    job = AttackJob(node, Context(Store(str(folder)), folder, folder), {"images": clean})
    for shard in shards:
        job.commit(Unit(shard.name, len(shard), {}), shard, {})


def samples(shard: Shard, png: Callable[[np.ndarray], Any]) -> Iterable[dict[str, Any]]:
    """The content of our samples, in webdataset's form."""
    facts = {name: column.tolist() for name, column in shard.attack.items()}
    for i, index in enumerate(shard.index.tolist()):
        rest = {"index": index, "split": shard.split, "source_label": int(shard.source_label[i])}
        rest |= {name: column[i] for name, column in facts.items()}
        yield {"__key__": key(index), "png": png(shard.images()[i]), "cls": int(shard.label[i]), "json": rest}


def write_webdataset(shards: list[Shard], folder: Path, png: Callable[[np.ndarray], Any] = lambda image: image) -> None:
    """Write with webdataset's writer, with its own PNGs unless `png` encodes them."""
    pattern, size = str(folder / "train-%06d.tar"), len(shards[0])
    with webdataset.ShardWriter(pattern, maxcount=size, verbose=0) as writer:
        for shard in shards:
            for sample in samples(shard, png):
                writer.write(sample)


def write_ray(rows: Any, folder: Path) -> None:
    """Write with Ray Data, from blocks already in memory."""
    rows.write_webdataset(str(folder))


# -------------------------------------------------------------------------------------------------- readers


def read_ours(files: list[Path], digests: dict[str, str]) -> int:
    """Read as a node reads its input."""
    count = 0
    for file in files:
        tar = file.read_bytes()
        assert digest(tar) == digests[file.name]
        count += len(unpack(file.stem, tar, 3).images())
    return count


def read_webdataset(files: list[Path]) -> int:
    read = webdataset.WebDataset([str(file) for file in files], shardshuffle=False, empty_check=False)
    return sum(sample["png"].shape[2] == 3 for sample in read.decode("rgb8"))


def read_ray(files: list[Path]) -> int:
    read = ray.data.read_webdataset([str(file) for file in files])
    return sum(row["png"].shape[2] == 3 for row in read.iter_rows())


# --------------------------------------------------------------------------------------------------- tables


def encoded(pixels_HWC: np.ndarray, level: int, strategy: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels_HWC).save(out, format="PNG", compress_level=level, compress_type=strategy)
    return out.getvalue()


def encode_all(pixels_NHWC: np.ndarray, level: int, strategy: int) -> None:
    for one in pixels_NHWC:
        encoded(one, level, strategy)


def decode_all(files: list[bytes]) -> None:
    for file in files:
        decode(file, 3)


def levels(clean: np.ndarray, moved: np.ndarray, rounds: int) -> list[list[str]]:
    """Milliseconds and bytes per image, for every level of zlib, and for its other strategies at level 1."""
    ways = [(level, "default") for level in range(10)] + [(1, name) for name in STRATEGIES if name != "default"]
    lines = []
    for level, strategy in ways:
        line = [f"{level}{' (ours)' * (level == PNG_LEVEL and strategy == 'default')}", strategy]
        for pixels in (clean, moved):
            files = [encoded(one, level, STRATEGIES[strategy]) for one in pixels]
            for work in (partial(encode_all, pixels, level, STRATEGIES[strategy]), partial(decode_all, files)):
                line.append(f"{1e3 * min(seconds_of(work) for _ in range(rounds)) / len(pixels):.3f}")
            line.append(f"{np.mean([len(file) for file in files]):,.0f}")
        lines.append(line)
    return lines


def against(seconds: dict[str, list[float]], count: int, sizes: dict[str, int]) -> list[list[str]]:
    """Rates, and the ratio of the first to each."""
    ours = next(iter(seconds.values()))
    return [
        [
            name,
            spread([count / one for one in taken], 0),
            spread([sizes[name] / 1e6 / one for one in taken]),
            f"{over(taken, ours):.2f}",
        ]
        for name, taken in seconds.items()
    ]


@click.command()
@on_shards
@click.option("--png", default=100, show_default=True, help="Images of which the PNG levels are tried.")
def main(side: int, data: Path | None, count: int, shard_size: int, rounds: int, png: int) -> None:
    """Measure writing, reading and PNG levels on this machine."""
    clean = images(data, count, side)
    moved = attacked(clean, 0.5 if side == 32 else 3.0)
    shards = shards_of(moved, shard_size)
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows = ray.data.from_items([sample for shard in shards for sample in samples(shard, lambda one: one)]).materialize()
    with tempfile.TemporaryDirectory() as name, threads(1):
        folder, fresh = Path(name), iter(range(10**6))
        writers: dict[str, Callable[[Path], None]] = {
            "ours, verified": lambda to: write_ours(shards, to),
            "webdataset.ShardWriter": lambda to: write_webdataset(shards, to),
            "webdataset.ShardWriter, our PNGs": lambda to: write_webdataset(shards, to, encode_png),
            "Ray Data, write_webdataset": lambda to: write_ray(rows, to),
        }
        made: dict[str, Path] = {}

        def write(name: str) -> float:
            made[name] = folder / str(next(fresh))
            made[name].mkdir()
            return seconds_of(lambda: writers[name](made[name]))

        for name in writers:
            write(name)
        writing = in_turns({name: lambda _, name=name: write(name) for name in writers}, rounds)
        sizes = {name: sum(file.stat().st_size for file in at.rglob("*.tar")) for name, at in made.items()}

        files = sorted(made["ours, verified"].rglob("*.tar"))
        digests = {file.name: digest(file.read_bytes()) for file in files}
        readers: dict[str, Callable[[], int]] = {
            "ours": lambda: read_ours(files, digests),
            "webdataset.WebDataset": lambda: read_webdataset(files),
            "Ray Data, read_webdataset": lambda: read_ray(files),
        }
        assert {reader() for reader in readers.values()} == {count}
        reading = in_turns({name: lambda _, name=name: seconds_of(readers[name]) for name in readers}, rounds)
    ray.shutdown()
    click.echo(f"{count} images of {side} × {side} px in {len(shards)} shards, {rounds} rounds, one thread")
    click.echo(machine("webdataset", "ray", "pillow"))
    head = ["images/s", "MB/s", "ours over it"]
    show("Writing", ["", *head], against(writing, count, sizes))
    show("Reading our shards", ["", *head], against(reading, count, dict.fromkeys(reading, sizes["ours, verified"])))
    each = ["encode ms", "decode ms", "bytes"]
    columns = [f"{what}: {column}" for what in ("clean", "attacked") for column in each]
    show("PNG", ["level", "strategy", *columns], levels(clean[:png], moved[:png], rounds))


if __name__ == "__main__":
    main()
