"""Sources held in memory: scikit-learn's digits and torchvision's small datasets."""

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from stages.errors import BadInput
from stages.load.listing import Images, Listing
from stages.recipes import Digits, Torchvision
from stages.seeds import generator


def list_digits(load: Digits) -> Listing:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    order = generator(load.seed, "digits/split").permutation(len(pixels))
    test = round(len(pixels) * load.test_share)
    whole = Images.whole(labels, pixels)
    items = {"train": whole[np.sort(order[test:])], "test": whole[np.sort(order[:test])]}
    return Listing(tuple("0123456789"), items, channels=1)


def list_torchvision(load: Torchvision, data: Path, fetch: bool) -> Listing:
    from torchvision import datasets

    make = {
        "cifar10": datasets.CIFAR10,
        "cifar100": datasets.CIFAR100,
        "mnist": datasets.MNIST,
        "fashion-mnist": datasets.FashionMNIST,
    }[load.source]
    root = data / load.root
    items, first, classes = {}, 0, tuple[str, ...]()
    for split in ("train", "test"):
        found = _find_or_download(make, root, split == "train", load, fetch)
        pixels = np.asarray(found.data)
        pixels = pixels[..., None] if pixels.ndim == 3 else pixels
        items[split] = Images.whole(found.targets, pixels, first)
        first, classes = first + len(pixels), tuple(found.classes)
    return Listing(classes, items, channels=pixels.shape[-1])


def _find_or_download(make: Callable[..., Any], root: Path, train: bool, load: Torchvision, fetch: bool) -> Any:
    try:
        return make(root=str(root), train=train, download=False)
    except RuntimeError:
        if not (load.download and fetch):
            how = "`notbugs run` downloads it, or" if load.download else "allow its download, or"
            raise BadInput(f"{load.source} is not in {root}: {how} name its folder with --data") from None
    with TemporaryDirectory() as folder:  # a failed download leaves nothing behind
        try:
            make(root=folder, train=train, download=True)
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise BadInput(
                f"{load.source} is neither in {root} nor can it be downloaded ({reason}): name its folder with --data"
            ) from error
        shutil.copytree(folder, root, dirs_exist_ok=True)
    return make(root=str(root), train=train, download=False)
