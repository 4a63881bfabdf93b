"""Loading clean images from every source."""

import hashlib
import io
import os
import pickle
import resource
import shutil
import socket
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from pyarrow import fs
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifier
from torchvision import datasets, transforms

import stages.load.files
import stages.remote
import stages.shard
from stages.errors import BadData, BadInput
from stages.images import decode
from stages.load import (
    RESTRICTED_IMAGENET,
    Images,
    Item,
    Listing,
    assign_to_shards,
    list_source,
    read,
    stamps_of_images,
)
from stages.recipes import Digits, ImageFolder, Synthetic, Torchvision
from stages.recipes import WebDataset as Shards
from stages.shard import Shard, pack, rows, unpack


def picture(seed, size=(10, 8)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def as_bytes(image, kind="PNG"):
    out = io.BytesIO()
    image.save(out, format=kind)
    return out.getvalue()


def folder(root, names=("ant", "bee", "cow"), each=4, suffix="png", splits=("train", "val"), size=(10, 8)):
    """An image folder in ImageNet's layout; all images differ."""
    seed = 0
    for split in splits:
        for name in names:
            (root / split / name).mkdir(parents=True)
            for number in range(each):
                seed += 1
                picture(seed, size).save(root / split / name / f"{number}.{suffix}")
    return root


def asked(root=".", **said):
    return ImageFolder(**{"source": "image-folder", "root": str(root)} | said)


def everything(load, data):
    """All shards of a source, read."""
    listing = list_source(load, data)
    return {
        n: read(load, n, items, listing.channels, listing.suffix)
        for n, items in assign_to_shards(listing, load).items()
    }


# ------------------------------------------------------------------------------------------- digits


def test_the_digits_are_those_of_scikit_learn_in_256_levels(tmp_path):
    shards = everything(Digits(source="sklearn-digits", shard_size=500), tmp_path)
    images, labels = load_digits(return_X_y=True)
    for shard in shards.values():
        levels = np.round(images[shard.index] * 255 / 16)  # 0 to 16 becomes 0 to 255
        assert np.array_equal(shard.images().reshape(-1, 64), levels)
        assert np.array_equal(shard.label, labels[shard.index])
    assert sorted(i for shard in shards.values() for i in shard.index) == list(range(1797))


def test_the_split_of_the_digits_is_the_seeds_alone(tmp_path):
    held = [
        [item.index for item in list_source(Digits(source="sklearn-digits", seed=seed), tmp_path).items["test"]]
        for seed in (0, 0, 1)
    ]
    assert held[0] == held[1]
    assert held[0] != held[2]


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_the_share_held_out_is_the_one_asked_for(share, tmp_path):
    items = list_source(Digits(source="sklearn-digits", test_share=share), tmp_path).items
    assert len(items["test"]) == round(1797 * share)
    assert len(items["train"]) + len(items["test"]) == 1797


def test_the_majority_is_the_share_of_the_commonest_class():
    listing = Listing(("a", "b"), {"test": Images.whole([0, 1, 1, 1])}, 1)
    assert listing.majority("test") == 0.75


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(0, 99), st.data())
def test_images_in_columns_are_the_items_of_a_list(labels, first, data):
    refs = [f"{i}.png" for i in range(len(labels))]
    whole = Images.whole(labels, refs, first)
    items = [Item(first + i, ref, label) for i, (ref, label) in enumerate(zip(refs, labels, strict=True))]
    chosen = data.draw(st.lists(st.integers(0, len(labels) - 1), max_size=30))
    some = whole[np.array(chosen, dtype=np.int64)]
    assert list(whole) == [whole[i] for i in range(len(whole))] == items
    assert list(some) == [items[i] for i in chosen]
    assert list(some[1:3]) == list(some)[1:3]
    assert list(pickle.loads(pickle.dumps(some))) == list(some)


def test_images_travel_with_their_own_pixels_alone(tmp_path):
    digits = list_source(Digits(source="sklearn-digits"), tmp_path).items["train"]
    alone, ten = len(pickle.dumps(digits[:1])), len(pickle.dumps(digits[:10]))
    assert ten < 10 * alone < digits.refs.nbytes / 10


# ----------------------------------------------------------------------------------------- spreading


@given(st.integers(1, 60), st.integers(1, 25), st.integers(0, 99))
def test_spreading_covers_each_image_exactly_once(count, shard_size, seed):
    listing = Listing(("a",), {"train": Images.whole([0] * count)}, 1)
    load = Digits(source="sklearn-digits", shard_size=shard_size, seed=seed)
    shards = assign_to_shards(listing, load)
    assert sorted(item.index for items in shards.values() for item in items) == list(range(count))
    assert list(shards) == [f"train-{n:06d}" for n in range(-(-count // shard_size))]
    assert all(len(items) == shard_size for items in list(shards.values())[:-1])
    assert {name: list(items) for name, items in assign_to_shards(listing, load).items()} == {
        name: list(items) for name, items in shards.items()
    }


def test_another_seed_spreads_otherwise():
    listing = Listing(("a",), {"train": Images.whole([0] * 50)}, 1)

    def order(seed):
        load = Digits(source="sklearn-digits", seed=seed)
        return [item.index for items in assign_to_shards(listing, load).values() for item in items]

    assert order(0) != order(1)


def test_a_limit_keeps_that_many_of_each_split_and_a_larger_one_keeps_them_too(tmp_path):
    def kept(limit, seed=0):
        items = list_source(Digits(source="sklearn-digits", limit=limit, seed=seed), tmp_path).items
        return {split: {item.index for item in chosen} for split, chosen in items.items()}

    few, more = kept(20), kept(400)
    assert {split: len(chosen) for split, chosen in few.items()} == {"train": 20, "test": 20}
    assert {split: len(chosen) for split, chosen in more.items()} == {"train": 400, "test": 359}
    assert all(few[split] <= more[split] for split in few)
    assert few != kept(20, seed=1)


def test_every_shard_is_a_fair_sample_of_the_classes():
    # 1,000 images of each of four classes, sorted as a folder sorts them. A shard of 500 has a hypergeometric
    # count of each class, 125 ± 9; five deviations are never reached by chance.
    listing = Listing(tuple("abcd"), {"train": Images.whole([i // 1000 for i in range(4000)])}, 1)
    deviation = (500 * 0.25 * 0.75 * 3500 / 3999) ** 0.5
    for items in assign_to_shards(listing, Digits(source="sklearn-digits", shard_size=500)).values():
        counts = Counter(item.label for item in items)
        assert all(abs(counts[label] - 125) < 5 * deviation for label in range(4))


# ---------------------------------------------------------------------------------- images that are made


def made(**said):
    return Synthetic(**{"source": "synthetic", "images": {"train": 60, "test": 20}, "classes": 4, "size": 16} | said)


def by_index(shards):
    """Index → label and pixels of every image of some shards."""
    return {
        index: (label, pixels.tobytes())
        for shard in shards.values()
        for index, label, pixels in zip(shard.index.tolist(), shard.label.tolist(), shard.images(), strict=True)
    }


@given(st.integers(1, 80), st.integers(1, 25))
@settings(max_examples=15)
def test_made_images_are_the_same_in_any_part_and_any_shard(limit, shard_size):
    whole = by_index(everything(made(), Path()))
    some = by_index(everything(made(limit=limit, shard_size=shard_size), Path()))
    assert len(some) == min(limit, 60) + min(limit, 20)
    assert some.items() <= whole.items()


def test_made_images_are_the_same_on_every_machine_and_of_another_seed_others():
    first = everything(made(), Path())["train-000000"].images()
    assert first.shape == (60, 16, 16, 3)
    assert (
        hashlib.sha256(first.tobytes()).hexdigest()
        == "84db365cbb8ae12418d8f623a7ee4868b5560a0ebecfa1810b6a71f5af5bc48c"
    )
    assert len({image.tobytes() for image in first}) == 60
    assert not np.array_equal(first, everything(made(seed=1), Path())["train-000000"].images())


@given(st.dictionaries(st.sampled_from(["train", "test", "val"]), st.integers(1, 60), min_size=1), st.integers(1, 12))
def test_made_images_have_equally_many_of_each_class_in_every_split(images, classes):
    listing = list_source(made(images=images, classes=classes), Path())
    assert [item.index for items in listing.items.values() for item in items] == list(range(sum(images.values())))
    for split, count in images.items():
        counts = Counter(item.label for item in listing.items[split])
        assert sum(counts.values()) == count
        assert {counts[label] for label in range(classes)} <= {count // classes, -(-count // classes)}


def test_a_linear_model_learns_the_classes_of_made_images():
    shards = everything(made(images={"train": 400, "test": 200}, classes=10), Path())
    train, test = (shards[f"{split}-000000"] for split in ("train", "test"))
    flat = [shard.images().reshape(len(shard), -1) / 255 for shard in (train, test)]
    learned = RidgeClassifier(alpha=10.0).fit(flat[0], train.label)
    assert learned.score(flat[1], test.label) > 0.5  # chance is 0.1


def test_the_order_of_the_splits_in_the_file_changes_nothing_of_made_images():
    one, other = ({"train": 5, "test": 4}, {"test": 4, "train": 5})
    assert made(images=one).parameters() == made(images=other).parameters()
    assert by_index(everything(made(images=one), Path())) == by_index(everything(made(images=other), Path()))


def test_made_images_of_no_split_or_none_of_a_split_are_refused():
    with pytest.raises(ValueError, match="images"):
        made(images={})
    with pytest.raises(ValueError, match=r"images\.train"):
        made(images={"train": 0})


# ------------------------------------------------------------------------------------- image folders


def test_a_folder_is_listed_in_the_order_of_its_names(tmp_path):
    listing = list_source(asked(), folder(tmp_path))
    assert listing.classes == ("ant", "bee", "cow")
    assert [item.label for item in listing.items["train"]] == [0] * 4 + [1] * 4 + [2] * 4
    assert [item.index for split in ("test", "train") for item in listing.items[split]] == list(range(24))
    assert [item.ref.name for item in listing.items["train"][:4]] == [f"{i}.png" for i in range(4)]


def test_other_files_than_images_are_passed_over(tmp_path):
    folder(tmp_path)
    (tmp_path / "train" / "ant" / "README.txt").write_text("about ants")
    (tmp_path / "train" / "LICENSE").write_text("free")
    picture(99).save(tmp_path / "train" / "ant" / "UPPER.PNG")
    assert len(list_source(asked(), tmp_path).items["train"]) == 13


@pytest.mark.parametrize("size", [(40, 30), (30, 41), (98, 49)])
def test_resized_and_cropped_images_are_those_of_torchvision(size, tmp_path):
    folder(tmp_path, each=2, size=size)
    listing = list_source(asked(resize=20, crop=16), tmp_path)
    shards = everything(asked(resize=20, crop=16), tmp_path)
    by_torchvision = transforms.Compose([transforms.Resize(20), transforms.CenterCrop(16)])
    path = {item.index: item.ref for items in listing.items.values() for item in items}
    for shard in shards.values():
        assert shard.files is None
        for index, pixels in zip(shard.index, shard.images(), strict=True):
            with Image.open(path[index]) as image:
                assert np.array_equal(pixels, np.asarray(by_torchvision(image)))


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "webp", "png"])
def test_files_keep_their_bytes_where_nothing_is_resized(suffix, tmp_path):
    folder(tmp_path, suffix=suffix)
    listing = list_source(asked(), tmp_path)
    path = {item.index: item.ref for items in listing.items.values() for item in items}
    for shard in everything(asked(), tmp_path).values():
        assert shard.suffix == ("jpg" if suffix == "jpeg" else suffix)
        assert shard.files == [path[index].read_bytes() for index in shard.index]
        back = unpack(shard.name, pack(shard), 3)
        assert back.files == shard.files
        assert np.array_equal(back.images(), shard.images())


def assert_promised(shard, listing):
    """Every member of a shard is as docs/data-format.md describes, with the decoded pixels."""
    back = unpack(shard.name, pack(shard), listing.channels)
    assert np.array_equal(back.index, shard.index)
    for file in back.files:
        with Image.open(io.BytesIO(file)) as image:
            assert image.format == {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[shard.suffix]
            assert image.mode in (("L", "RGB") if listing.channels == 3 else ("L",))
            assert getattr(image, "n_frames", 1) == 1
            assert image.getexif().get(0x0112, 1) == 1
    if shard.pixels is not None:
        assert np.array_equal(back.images(), shard.images())


def test_files_of_differing_kinds_and_sizes_are_encoded_again_without_loss(tmp_path):
    folder(tmp_path)
    picture(5, (20, 20)).save(tmp_path / "train" / "ant" / "x.bmp")
    listing, shards = list_source(asked(), tmp_path), everything(asked(), tmp_path)
    assert sum(len(shard) for shard in shards.values()) == 25
    path = {item.index: item.ref for items in listing.items.values() for item in items}
    for shard in shards.values():
        assert_promised(shard, listing)
        for index, file in zip(shard.index, shard.files, strict=True):
            with Image.open(path[index]) as image:
                assert np.array_equal(decode(file, 3), np.asarray(image))


STRANGE = {
    "transparent": lambda image: (image.convert("RGBA"), {}),
    "grey with transparency": lambda image: (image.convert("LA"), {}),
    "palette": lambda image: (image.quantize(16), {}),
    "one bit": lambda image: (image.convert("1"), {}),
    "animated": lambda image: (image, {"save_all": True, "append_images": [image.rotate(180)]}),
    "turned": lambda image: (image, {"exif": turn(6)}),
    "a JPEG by its content": lambda image: (image, {"format": "JPEG"}),
    "CMYK": lambda image: (image.convert("CMYK"), {"format": "JPEG"}),
}


def turn(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("kind", STRANGE)
def test_a_png_that_is_not_as_promised_is_encoded_anew_and_the_others_are_kept(kind, tmp_path):
    folder(tmp_path)
    strange = tmp_path / "train" / "ant" / "strange.png"
    image, options = STRANGE[kind](picture(77, (10, 10)))
    image.save(strange, **{"format": "PNG"} | options)
    listing, shard = list_source(asked(), tmp_path), everything(asked(), tmp_path)["train-000000"]
    assert_promised(shard, listing)
    path = {item.index: item.ref for item in listing.items["train"]}
    for index, file in zip(shard.index, shard.files, strict=True):
        if path[index] == strange:
            with Image.open(strange) as image:
                assert np.array_equal(decode(file, 3), np.asarray(ImageOps.exif_transpose(image).convert("RGB")))
        else:
            assert file == path[index].read_bytes()


@pytest.mark.parametrize("kind", ["CMYK", "turned", "a PNG"])
@pytest.mark.parametrize("keep", [True, False])
def test_a_jpeg_that_is_not_as_promised_is_left_out_or_all_are_stored_as_png(kind, keep, tmp_path):
    folder(tmp_path, suffix="jpg")
    image, options = STRANGE["CMYK" if kind == "a PNG" else kind](picture(77, (20, 30)))
    image, options = (picture(77, (20, 30)), {"format": "PNG"}) if kind == "a PNG" else (image, options)
    image.save(tmp_path / "train" / "ant" / "strange.jpg", **{"format": "JPEG"} | options)
    load = asked(keep_files=keep, max_undecodable=0.1)  # 1 of 13
    listing, shard = list_source(load, tmp_path), everything(load, tmp_path)["train-000000"]
    assert_promised(shard, listing)
    assert shard.suffix == ("jpg" if keep else "png")
    if keep:
        (failure,) = shard.failures
        assert failure.error.startswith("ant/strange.jpg: ")
        assert failure.error.endswith("and cannot be kept as it is: say `keep_files: false`, and all are stored as png")
    else:
        assert len(shard) == 13 and not shard.failures
        assert shard.pixels is None  # of two sizes


def test_a_folder_of_jpegs_none_of_which_can_be_kept_is_refused_when_it_is_listed(tmp_path):
    folder(tmp_path)
    for path in tmp_path.glob("*/*/*.png"):
        picture(1).convert("CMYK").save(path.with_suffix(".jpg"))
        path.unlink()
    with pytest.raises(
        BadInput, match=r"val: 12 of 12 images tried fail; .* has the colours CMYK, .*keep_files: false"
    ):
        list_source(asked(), tmp_path)
    assert list_source(asked(keep_files=False), tmp_path).suffix is None


def test_neither_new_key_changes_the_parameters_of_a_recipe_that_does_not_use_it():
    for load in (asked(), shards_at("a.tar")):
        before = load.parameters()
        assert not {"channels", "keep_files"} & set(before)
        said = type(load).model_validate(load.model_dump() | {"channels": None, "keep_files": True})
        assert said.parameters() == before
        resized = {**load.model_dump(), "resize": 8}
        recipes = [type(load).model_validate(resized | {"keep_files": keep}) for keep in (True, False)]
        assert recipes[0].parameters() == recipes[1].parameters()
    assert asked(keep_files=False).parameters() != asked().parameters() != asked(channels=1).parameters()


@pytest.mark.parametrize("said", [{}, {"resize": 6, "crop": 6}])
def test_a_folder_is_grey_if_the_recipe_says_so(said, tmp_path):
    folder(tmp_path)
    listing, shard = (
        list_source(asked(channels=1, **said), tmp_path),
        everything(asked(channels=1, **said), tmp_path)["train-000000"],
    )
    assert listing.channels == 1 and shard.images().shape[3] == 1
    assert_promised(shard, listing)


def test_images_of_differing_sizes_are_kept_as_files(tmp_path):
    folder(tmp_path)
    picture(5, (20, 20)).save(tmp_path / "train" / "ant" / "large.png")
    shard = everything(asked(), tmp_path)["train-000000"]
    assert shard.pixels is None
    assert len(shard.files) == len(shard) == 13


def test_images_that_a_resize_alone_leaves_of_differing_sizes_are_refused(tmp_path):
    folder(tmp_path)
    picture(5, (20, 10)).save(tmp_path / "train" / "ant" / "wide.png")
    with pytest.raises(BadData, match="images of differing sizes: add crop"):
        everything(asked(resize=8), tmp_path)


def test_a_shard_has_a_limit_of_memory(tmp_path, monkeypatch):
    folder(tmp_path)
    monkeypatch.setattr(stages.shard, "MEMORY", 12 * 240 - 1)  # of 12 images, 10 × 8 × 3 bytes each
    with pytest.raises(BadData, match=r"test-000000 holds images of more than .* GiB: lower shard_size, or add resize"):
        everything(asked(), tmp_path)
    packed = pack(
        Shard("train-000000", np.arange(12), np.zeros(12, int), np.zeros(12, int), np.zeros((12, 10, 8, 3), np.uint8))
    )
    with pytest.raises(BadData, match="lower shard_size"):
        unpack("train-000000", packed, 3)
    assert len(everything(asked(shard_size=6), tmp_path)) == 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_stored_as_people_see_it_resized_or_not(orientation, tmp_path):
    folder(tmp_path, each=1)
    place = tmp_path / "train" / "ant" / "phone.png"
    picture(9, (12, 8)).save(place, exif=turn(orientation))
    with Image.open(place) as image:
        upright = ImageOps.exif_transpose(image)
    for said, wanted in (
        ({}, upright),
        ({"resize": 4, "crop": 4}, transforms.CenterCrop(4)(transforms.Resize(4)(upright))),
    ):
        listing, shard = list_source(asked(**said), tmp_path), everything(asked(**said), tmp_path)["train-000000"]
        assert_promised(shard, listing)
        (index,) = (item.index for item in listing.items["train"] if item.ref == place)
        back = unpack(shard.name, pack(shard), 3)
        assert np.array_equal(decode(back.files[back.index.tolist().index(index)], 3), np.asarray(wanted))


# ---- what lies in folders


def test_a_folder_is_listed_as_torchvision_lists_it(tmp_path):
    folder(tmp_path, each=3)
    ant = tmp_path / "train" / "ant"
    for name in ("x.jpg", "x.jpeg", "x.ppm", "x.bmp", "x.pgm", "x.tif", "x.tiff", "x.webp", "X.PNG"):
        picture(7).convert("L" if name.endswith("pgm") else "RGB").save(ant / name)
    for name in ("b", "a-b", "a/b", "a"):
        (ant / name).mkdir(parents=True, exist_ok=True)
        picture(8).save(ant / name / "deep.png")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    picture(9).save(elsewhere / "far.png")
    (ant / "linked").symlink_to(elsewhere)
    (ant / "linked.png").symlink_to(elsewhere / "far.png")
    (tmp_path / "train" / "emu").symlink_to(elsewhere)
    (tmp_path / "val" / "emu").symlink_to(elsewhere)
    theirs = datasets.ImageFolder(tmp_path / "train")
    listing = list_source(asked(), tmp_path)
    assert [(str(item.ref), item.label) for item in listing.items["train"]] == theirs.samples
    assert list(listing.classes) == theirs.classes
    assert listing.skipped == {}
    assert len(everything(asked(), tmp_path)["train-000000"]) == len(theirs)


def test_what_is_no_image_of_a_class_is_passed_over_and_counted(tmp_path):
    folder(tmp_path)
    train, ant = tmp_path / "train", tmp_path / "train" / "ant"
    before = list_source(asked(), tmp_path)
    for place in (tmp_path / "train", tmp_path / "val", ant):  # what systems leave behind
        for name in (".ipynb_checkpoints", "__MACOSX"):
            (place / name).mkdir()
            picture(1).save(place / name / "a.png")
        for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._0.png"):
            (place / name).write_text("no image")
    assert list_source(asked(), tmp_path).skipped == {"hidden files and folders": 3 * 6}
    for place in (train, ant):
        (place / ".hidden").mkdir()
        (place / ".hidden.png").write_bytes(b"")
    (train / "stray.png").write_bytes(b"")
    for name in ("a.gif", "b.GIF", "c.jfif", "d", "e.txt", "f.averylongsuffix", "g.\x1b[1m"):
        (ant / name).write_bytes(b"")
    os.mkfifo(ant / "pipe.png")
    (ant / "nothing.png").symlink_to("nowhere")
    (ant / "circle.png").symlink_to("circle.png")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(ant / "s.png"))
    listening.close()
    (ant / "up").symlink_to("..")
    (ant / "all").symlink_to("/")
    (ant / "sub").mkdir()
    (ant / "sub" / "again").symlink_to("..")
    listing = list_source(asked(), tmp_path)
    assert listing.skipped == {
        "hidden files and folders": 3 * 6 + 4,
        "files in no class's folder": 1,
        "gif files": 2,
        "jfif files": 1,
        "txt files": 1,
        "files without an extension": 1,
        "files of other kinds": 2,
        "links to nothing, pipes and the like": 4,
        "links to a folder that is listed already": 3,
    }
    assert listing.classes == before.classes
    assert {split: list(items) for split, items in listing.items.items()} == {
        split: list(items) for split, items in before.items.items()
    }


def test_a_file_whose_name_is_not_text_is_read_and_its_name_can_be_stored(tmp_path):
    folder(tmp_path)
    good, bad = (os.fsencode(tmp_path / "train" / "ant") + name for name in (b"/caf\xe9.png", b"/na\xefve.png"))
    picture(7).save(good)
    Path(os.fsdecode(bad)).write_bytes(b"no image")
    load = asked(max_undecodable=0.1)
    shard = everything(load, tmp_path)["train-000000"]
    (failure,) = shard.failures
    assert failure.error.startswith("ant/na\\udcefve.png: cannot be decoded")
    assert len(shard) == 13
    assert rows(shard, pack(shard))["error"].drop_null().to_pylist() == [failure.error]
    for split in ("train", "val"):
        (tmp_path / split / "bee").rename(tmp_path / split / os.fsdecode(b"b\xe9e"))
    assert list_source(load, tmp_path).classes == ("ant", "b\\udce9e", "cow")


def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch):
    folder(tmp_path)
    scandir = os.scandir

    def refuse(place):
        if str(place).endswith("bee"):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(BadInput, match=r"^image folder .*/bee cannot be listed: Permission denied$"):
        list_source(asked(), tmp_path)


def test_a_file_that_may_not_be_read_is_a_failure_with_its_reason(tmp_path, monkeypatch):
    folder(tmp_path)
    read_file = stages.load.files.read_file

    def refuse(path):
        if path.name == "2.png" and path.parts[-3:-1] == ("train", "bee"):
            raise PermissionError(13, "Permission denied", str(path))
        return read_file(path)

    monkeypatch.setattr(stages.load.files, "read_file", refuse)
    (failure,) = everything(asked(max_undecodable=0.1), tmp_path)["train-000000"].failures
    assert failure.error == "bee/2.png: Permission denied"


def test_a_pipe_that_takes_the_place_of_an_image_after_listing_is_a_failure(tmp_path):
    load = asked(max_undecodable=0.1)
    listing = list_source(load, folder(tmp_path))
    ((name, items), *_) = (one for one in assign_to_shards(listing, load).items() if one[0].startswith("train"))
    items[0].ref.unlink()
    os.mkfifo(items[0].ref)
    (failure,) = read(load, name, items, listing.channels, listing.suffix).failures
    assert failure.error.endswith("is no regular file")


@pytest.mark.parametrize("splits", [("train",), ("val",), ("train", "val")])
def test_a_class_without_an_image_is_named(splits, tmp_path):
    folder(tmp_path)
    for split in splits:
        for path in (tmp_path / split / "bee").iterdir():
            path.rename(path.with_suffix(".gif"))
    with pytest.raises(BadInput, match=rf"{splits[-1]} has no image of bee: add some, or remove the class"):
        list_source(asked(), tmp_path)
    grouped = list_source(asked(classes={"x": ["ant", "bee"], "y": ["cow"]}), tmp_path)
    assert grouped.classes == ("x", "y")


# ---- what cannot be decoded


def spoil(root, count, split="train"):
    paths = sorted((root / split).glob("*/*"))[:count]
    for path in paths:
        path.write_bytes(b"no image")
    return paths


def test_an_image_that_cannot_be_decoded_becomes_a_failure_and_the_rest_goes_on(tmp_path):
    folder(tmp_path)
    (path,) = spoil(tmp_path, 1)
    load = asked(max_undecodable=0.1)  # 1 of 12
    shard = everything(load, tmp_path)["train-000000"]
    (failure,) = shard.failures
    assert failure.error.startswith(f"ant/{path.name}: cannot be decoded")
    assert failure.source_label == 0
    assert len(shard) == 11
    assert failure.index not in shard.index


def test_more_failures_than_allowed_are_bad_data_that_names_the_first(tmp_path):
    folder(tmp_path)
    spoil(tmp_path, 2)
    with pytest.raises(BadData, match=r"2 of 12 images failed, more than max_undecodable 0.1 allows; the first: "):
        everything(asked(max_undecodable=0.1), tmp_path)


def test_a_file_that_went_away_after_listing_is_a_failure_too(tmp_path):
    load = asked(max_undecodable=0.1)
    listing = list_source(load, folder(tmp_path))
    ((name, items), *_) = assign_to_shards(listing, load).items()
    items[0].ref.unlink()
    (failure,) = read(load, name, items, listing.channels, listing.suffix).failures
    assert failure.index == items[0].index


def test_a_folder_of_which_most_images_fail_is_refused_at_once(tmp_path):
    folder(tmp_path)
    spoil(tmp_path, 8)
    with pytest.raises(
        BadInput, match=rf"image folder {tmp_path}/train: 8 of 12 images tried fail; the first: .*\.png: cannot"
    ):
        list_source(asked(), tmp_path)


# ---- what is missing


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(BadInput, match="nowhere does not exist: `root` is relative to the folder that --data names"):
        list_source(asked("nowhere"), tmp_path)


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "root").mkdir()
    os.mkfifo(tmp_path / "root" / "val")
    for name, said in (("file", "is no folder"), ("circle", "is no folder"), ("root", "val is no folder: `splits`")):
        with pytest.raises(BadInput, match=f"{name}.*{said}"):
            list_source(asked(name), tmp_path)
    with pytest.raises(BadInput, match="cannot be listed: File name too long"):
        list_source(asked("a" * 300), tmp_path)


def test_the_order_of_the_splits_in_the_file_numbers_no_image_otherwise(tmp_path):
    folder(tmp_path, suffix="jpg")
    pixels = np.zeros((2, 8, 8, 3), np.uint8)
    for at, name in enumerate(("a", "b")):
        part = Shard(f"train-{at:06d}", 2 * at + np.arange(2), np.arange(2), np.arange(2), pixels)
        (tmp_path / f"{name}.tar").write_bytes(pack(part))
    for kind, key, splits in ((ImageFolder, "splits", ("train", "val")), (Shards, "shards", ("a.tar", "b.tar"))):
        said = [
            dict(zip(("test", "train"), splits, strict=True)),
            dict(zip(("train", "test"), splits[::-1], strict=True)),
        ]
        source = {"source": "image-folder", "root": "."} if kind is ImageFolder else {"source": "webdataset"}
        one, other = (kind(**source, **{key: order}) for order in said)
        assert one.parameters() == other.parameters()
        listed = [[list(images) for images in list_source(recipe, tmp_path).items.values()] for recipe in (one, other)]
        assert listed[0] == listed[1]
        assert [item.index for images in listed[0] for item in images] == list(range(sum(map(len, listed[0]))))


def test_a_share_of_the_training_folder_becomes_the_test_split_by_the_names_of_its_files(tmp_path):
    folder(tmp_path, splits=("train",), each=20)
    recipe = asked(splits={"train": "train"}, test_share=0.2)

    def parts():
        listed = list_source(recipe, tmp_path)
        names, stamps = stamps_of_images(listed)
        assert len(names) == len(stamps) == len(set(names))
        return listed, {split: {name for name in names if name.startswith(split)} for split in listed.items}

    listed, before = parts()
    assert {split: np.bincount(images.labels).tolist() for split, images in listed.items.items()} == {
        "test": [4] * len(listed.classes),
        "train": [16] * len(listed.classes),
    }
    indices = np.concatenate([images.indices for images in listed.items.values()])
    assert sorted(indices.tolist()) == list(range(len(indices))), "positions in the folder, each once"
    new = tmp_path / "train" / listed.classes[0]
    shutil.copy(next(new.iterdir()), new / "new.png")
    _, after = parts()
    assert len(before["test"] ^ after["test"]) <= 2, "hardly an image changes its split"
    with pytest.raises(BadInput, match=r"test_share 0.99 leaves no image of \w+ to train on: it has 2[01]"):
        list_source(asked(splits={"train": "train"}, test_share=0.99), tmp_path)
    with pytest.raises(ValueError, match="`splits` must be the folder of train alone"):
        asked(test_share=0.2)


def test_a_split_that_is_not_there_is_refused(tmp_path):
    folder(tmp_path, splits=("train",))
    with pytest.raises(BadInput, match=r"val does not exist: `splits` names .*; .* holds train"):
        list_source(asked(), tmp_path)
    assert list(list_source(asked(splits={"train": "train"}), tmp_path).items) == ["train"]


def test_a_split_without_class_folders_is_refused(tmp_path):
    folder(tmp_path, splits=("train",))
    (tmp_path / "val").mkdir()
    with pytest.raises(BadInput, match="holds no class folders"):
        list_source(asked(), tmp_path)


def test_a_class_that_only_one_split_has_is_refused(tmp_path):
    folder(tmp_path)
    (tmp_path / "train" / "yak").mkdir()
    with pytest.raises(BadInput, match="val lacks yak"):
        list_source(asked(), tmp_path)


def test_a_folder_without_images_is_an_empty_source(tmp_path):
    folder(tmp_path, each=0)
    with pytest.raises(BadInput, match="the source is empty: split test"):
        list_source(asked(), tmp_path)


# ---- class maps


def test_classes_are_grouped_by_name_id_and_range_and_the_rest_is_left_out(tmp_path):
    folder(tmp_path, names=tuple("abcdef"), each=2)
    listing = list_source(asked(classes={"low": ["a", 1], "high": ["3-4"]}), tmp_path)
    assert listing.classes == ("low", "high")
    # a, b are low; d, e high; c and f in no group.
    shown = [(item.ref.parent.name, item.label) for item in listing.items["train"]]
    assert shown == [(name, label) for name, label in [("a", 0), ("b", 0), ("d", 1), ("e", 1)] for _ in range(2)]
    assert [item.index for item in listing.items["train"]] == list(range(8, 16))  # those of the test split come first


def test_a_folder_whose_name_is_a_number_is_found_by_its_name_as_text_and_by_its_place_as_a_number(tmp_path):
    folder(tmp_path, names=("1", "7"), each=1)
    by_name, by_place = (
        [i.ref.parent.name for i in list_source(asked(classes={"x": [member]}), tmp_path).items["train"]]
        for member in ("1", 1)
    )
    assert (by_name, by_place) == (["1"], ["7"])


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ({"x": ["zebra"]}, "classes.x: 'zebra' is neither a folder, a class id nor a range"),
        ({"x": [3]}, "classes.x: there is no class 3, the folder has 3 classes"),
        ({"x": ["1-5"]}, "there is no class 3"),
        ({"x": ["ant"], "y": [0]}, "classes.y: ant is in two groups"),
        ({"x": ["0-1"], "y": ["1-2"]}, "bee is in two groups"),
        ({"x": ["²"]}, "is neither a folder"),
        ({"x": ["1-²"]}, "is neither a folder"),
        ({"x": ["2-1"]}, "is neither a folder"),
        ({"x": [-1]}, "is neither a folder"),
    ],
)
def test_a_class_map_that_does_not_fit_is_refused_at_its_place(classes, said, tmp_path):
    folder(tmp_path, each=1)
    with pytest.raises(BadInput, match=said):
        list_source(asked(classes=classes), tmp_path)


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """A folder of a thousand classes with one image each."""
    root = tmp_path_factory.mktemp("thousand")
    tiny = as_bytes(picture(0, (2, 2)))
    for number in range(1000):
        place = root / "train" / f"n{number:08d}"
        place.mkdir(parents=True)
        (place / "0.png").write_bytes(tiny)
    return root


RANGES = {  # Ilyas et al. 2019, appendix A.1, as SCIENCE.md states it
    "dog": (151, 268), "cat": (281, 285), "frog": (30, 32), "turtle": (33, 37), "bird": (80, 100),
    "primate": (365, 382), "fish": (389, 397), "crab": (118, 121), "insect": (300, 319),
}  # fmt: skip


def test_restricted_imagenet_groups_the_ids_of_the_paper(thousand):
    listing = list_source(asked(classes="restricted-imagenet", splits={"train": "train"}), thousand)
    assert listing.classes == tuple(RANGES)
    found = {(int(item.ref.parent.name[1:]), listing.classes[item.label]) for item in listing.items["train"]}
    assert found == {(i, name) for name, (first, last) in RANGES.items() for i in range(first, last + 1)}
    # 118 of 203 classes are dogs: what a constant prediction scores.
    assert listing.majority("train") == 118 / 203


def test_restricted_imagenet_balanced_keeps_as_many_of_each_as_of_the_rarest(thousand):
    listing = list_source(asked(classes="restricted-imagenet", splits={"train": "train"}, balance=True), thousand)
    assert Counter(item.label for item in listing.items["train"]) == dict.fromkeys(range(9), 3)  # three frogs


def test_restricted_imagenet_on_a_smaller_folder_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"classes.dog: there is no class 151, the folder has 3 classes"):
        list_source(asked(classes="restricted-imagenet"), folder(tmp_path, each=1))
    assert set(RESTRICTED_IMAGENET) == set(RANGES)


def test_a_balanced_folder_has_equally_many_of_each_drawn_with_the_seed(tmp_path):
    folder(tmp_path, each=6)
    for extra in range(9):
        picture(1000 + extra).save(tmp_path / "train" / "ant" / f"x{extra}.png")
    kept = [[i.index for i in list_source(asked(balance=True, seed=s), tmp_path).items["train"]] for s in (0, 0, 1)]
    listing = list_source(asked(balance=True), tmp_path)
    assert Counter(item.label for item in listing.items["train"]) == {0: 6, 1: 6, 2: 6}
    assert kept[0] == kept[1] != kept[2]
    assert kept[0] == sorted(kept[0])


# ---------------------------------------------------------------------------------------- webdataset


def foreign(path, count=6, first=0, suffix="png", key="sample{:04d}"):
    """A shard written by webdataset's own writer."""
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for number in range(first, first + count):
            writer.write(
                {
                    "__key__": key.format(number),
                    suffix: as_bytes(picture(number), {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG"}[suffix]),
                    "cls": str(number % 3).encode(),
                    "txt": b"a caption",
                }
            )
    return path


def shards_at(pattern, **said):
    return Shards(**{"source": "webdataset", "shards": {"train": str(pattern)}} | said)


def test_shards_of_webdatasets_own_writer_are_read(tmp_path):
    foreign(tmp_path / "a.tar")
    shard = everything(shards_at("a.tar"), tmp_path)["train-000000"]
    assert sorted(shard.index) == list(range(6))
    for index, pixels, label in zip(shard.index, shard.images(), shard.label, strict=True):
        assert np.array_equal(pixels, np.asarray(picture(index)))
        assert label == index % 3


@pytest.mark.parametrize("channels", [1, 3])
def test_shards_of_our_own_are_read(channels, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 6, channels), dtype=np.uint8)
    index, label = np.arange(50, 55), np.arange(5) % 2
    (tmp_path / "a.tar").write_bytes(pack(Shard("train-000000", index, label, label, pixels)))
    listing = list_source(shards_at("a.tar"), tmp_path)
    assert listing.channels == channels
    shard = everything(shards_at("a.tar"), tmp_path)["train-000000"]
    assert np.array_equal(shard.images(), pixels[shard.index])  # positions in the source count from 0 again
    assert np.array_equal(shard.label, label[shard.index])


# webdataset leaves the tar to the garbage collector.
@pytest.mark.filterwarnings(r"ignore:Exception ignored in.*a\.tar:pytest.PytestUnraisableExceptionWarning")
def test_what_webdataset_reads_from_a_shard_of_ours_is_what_we_packed(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)
    index, label = np.arange(3), np.array([2, 0, 1])
    (tmp_path / "a.tar").write_bytes(pack(Shard("train-000000", index, label, label, pixels)))
    loaded = list(
        webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False).decode("rgb8").to_tuple("png", "cls")
    )
    for i, (image, cls) in enumerate(loaded):
        assert np.array_equal(image, pixels[i])
        assert cls == label[i]
    assert len(loaded) == 3


def test_braces_name_several_shards_in_order(tmp_path):
    for number in range(3):
        foreign(tmp_path / f"train-{number:06d}.tar", 2, 2 + 2 * number)
    foreign(tmp_path / "val.tar", 2, 0)
    load = shards_at("", shards={"train": "train-{000000..000002}.tar", "test": "val.tar"})
    listing = list_source(load, tmp_path)
    assert [item.index for items in listing.items.values() for item in items] == list(range(8))
    for shard in everything(load, tmp_path).values():
        assert all(
            np.array_equal(pixels, np.asarray(picture(i)))
            for i, pixels in zip(shard.index, shard.images(), strict=True)
        )


def test_a_file_url_is_read(tmp_path):
    foreign(tmp_path / "a.tar")
    shard = everything(shards_at((tmp_path / "a.tar").as_uri()), tmp_path / "elsewhere")["train-000000"]
    assert len(shard) == 6


@pytest.mark.parametrize("suffix", ["jpg", "jpeg"])
def test_original_bytes_are_kept_and_jpeg_becomes_jpg(suffix, tmp_path):
    foreign(tmp_path / "a.tar", suffix=suffix)
    shard = everything(shards_at("a.tar"), tmp_path)["train-000000"]
    assert shard.suffix == "jpg"
    assert shard.files == [as_bytes(picture(i), "JPEG") for i in shard.index]


def test_resized_shards_are_those_of_torchvision(tmp_path):
    foreign(tmp_path / "a.tar")
    by_torchvision = transforms.Compose([transforms.Resize(6), transforms.CenterCrop(5)])
    shard = everything(shards_at("a.tar", resize=6, crop=5), tmp_path)["train-000000"]
    for index, pixels in zip(shard.index, shard.images(), strict=True):
        assert np.array_equal(pixels, np.asarray(by_torchvision(picture(index))))


def test_a_shard_made_with_tar_from_a_folder_is_read_although_it_holds_the_folder_too(tmp_path):
    (tmp_path / "made").mkdir()
    for number in range(2):
        (tmp_path / "made" / f"{number}.png").write_bytes(as_bytes(picture(number)))
        (tmp_path / "made" / f"{number}.cls").write_text(str(number))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "made", "made")
        assert tar.getmembers()[0].isdir()
    shard = everything(shards_at("a.tar"), tmp_path)["train-000000"]
    assert sorted(shard.label) == [0, 1]


def test_keys_in_folders_are_kept_apart(tmp_path):
    foreign(tmp_path / "a.tar", 2, key="x{}/same")
    assert len(list_source(shards_at("a.tar"), tmp_path).items["train"]) == 2


@pytest.mark.parametrize(("said", "names"), [(None, "012"), (5, "01234"), (["a", "b", "c"], "abc")])
def test_classes_are_counted_or_named(said, names, tmp_path):
    foreign(tmp_path / "a.tar")
    assert list_source(shards_at("a.tar", classes=said), tmp_path).classes == tuple(names)


@pytest.mark.parametrize("said", [2, ["a", "b"]])
def test_a_label_beyond_the_classes_is_refused(said, tmp_path):
    foreign(tmp_path / "a.tar")
    with pytest.raises(BadInput, match=r"a.tar: sample sample0002 has label 2, expected a whole number from 0 to 1"):
        list_source(shards_at("a.tar", classes=said), tmp_path)


def mixed(path, grey, count=40):
    """A shard of grey and colour images, as `grey` decides for each number."""
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for number in range(count):
            image = picture(number).convert("L") if grey(number) else picture(number)
            writer.write({"__key__": f"{number:04d}", "png": as_bytes(image), "cls": str(number % 3).encode()})


@pytest.mark.parametrize(
    ("grey", "asked", "channels"),
    [
        (lambda number: True, None, 1),
        (lambda number: False, None, 3),
        (lambda number: number == 0, None, 3),
        (lambda number: number < 20, None, 3),
        (lambda number: number != 37, None, 3),
        (lambda number: True, 3, 3),
        (lambda number: False, 1, 1),
        (lambda number: number > 0, 1, 1),
    ],
    ids=[
        "all grey",
        "none",
        "the first",
        "half",
        "all but one",
        "asked for colour",
        "asked for grey",
        "one with colours",
    ],
)
@pytest.mark.parametrize("size", [{}, {"resize": 6, "crop": 6}])
def test_shards_are_grey_if_the_images_are_or_the_recipe_says_so(grey, asked, channels, size, tmp_path):
    mixed(tmp_path / "a.tar", grey)
    load = shards_at("a.tar", channels=asked, **size)
    listing, shard = list_source(load, tmp_path), everything(load, tmp_path)["train-000000"]
    assert listing.channels == shard.images().shape[3] == channels
    assert len(shard) == 40
    assert_promised(shard, listing)


def write(path, *named):
    with tarfile.open(path, "w") as tar:
        for name, content in named:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


PNG = as_bytes(picture(0))


def test_a_negative_label_is_refused_by_its_value(tmp_path):
    write(tmp_path / "a.tar", ("1.png", PNG), ("1.cls", b"-1"), ("2.png", PNG), ("2.cls", b"1"))
    with pytest.raises(BadInput, match=r"a.tar: sample 1 has label -1, expected a whole number from 0"):
        list_source(shards_at("a.tar"), tmp_path)


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ([("1.png", PNG)], r"sample 1 has png, expected an image \(png, .*\) and cls, one behind the other"),
        ([("1.cls", b"1")], r"sample 1 has cls, expected an image"),
        ([("1.mp4", PNG), ("1.cls", b"1")], "sample 1 has mp4, cls, expected an image"),
        ([("1.png", PNG), ("1.cls", b"one")], "sample 1 has label 'one', expected a whole number"),
        ([], "the source is empty"),
    ],
    ids=["no label", "no image", "other kind", "no number", "empty"],
)
def test_a_shard_without_what_is_needed_is_refused(named, said, tmp_path):
    write(tmp_path / "a.tar", *named)
    with pytest.raises(BadInput, match=said):
        list_source(shards_at("a.tar"), tmp_path)


@pytest.mark.parametrize(("content", "said"), [(b"", "empty"), (b"no tar", "no tar"), (b"x" * 2000, "no tar")])
def test_a_file_that_is_no_tar_is_refused(content, said, tmp_path):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(BadInput, match=rf"a.tar is {said}"):
        list_source(shards_at("a.tar"), tmp_path)


@pytest.mark.parametrize("url", ["b.tar", "file:///nowhere/at/all.tar"])
def test_a_shard_that_is_not_there_is_refused(url, tmp_path):
    with pytest.raises(BadInput, match="cannot be read"):
        list_source(shards_at(url), tmp_path)


@settings(max_examples=80)
@given(st.floats(0, 1))
def test_a_shard_cut_anywhere_is_refused_or_has_fewer_samples(share):
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        whole = foreign(Path(place) / "a.tar", 3).read_bytes()
        (Path(place) / "a.tar").write_bytes(whole[: int(share * len(whole))])
        try:
            assert 1 <= len(list_source(shards_at("a.tar"), Path(place)).items["train"]) <= 3
        except BadInput as error:
            assert "\n" not in str(error)


def test_a_shard_that_shrank_after_listing_gives_failures(tmp_path):
    foreign(tmp_path / "a.tar", 4)
    load = shards_at("a.tar", max_undecodable=0.9)
    listing = list_source(load, tmp_path)
    last = max(item.ref[1] for item in listing.items["train"])
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[: last + 5])
    (name, items), *_ = assign_to_shards(listing, load).items()
    shard = read(load, name, items, listing.channels, listing.suffix)
    (failure,) = shard.failures
    assert failure.error.endswith("ends inside the image")
    assert len(shard) == 3


def test_of_several_damaged_shards_the_first_is_named(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar")
    with pytest.raises(BadInput, match=r"a.tar is no tar"):
        list_source(shards_at("{a,b}.tar"), tmp_path)


def test_a_url_that_is_no_object_store_and_no_web_server_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"ftp://host/a.tar is no URL that is read \(s3://, .*\): fetch"):
        list_source(shards_at("ftp://host/a.tar"), tmp_path)


def test_a_shard_may_come_from_more_tars_than_may_be_open(tmp_path):
    for number in range(80):
        foreign(tmp_path / f"{number:02d}.tar", 1, number)
    load, (soft, hard) = shards_at("{00..79}.tar"), resource.getrlimit(resource.RLIMIT_NOFILE)
    listing = list_source(load, tmp_path)
    ((name, items),) = assign_to_shards(listing, load).items()
    taken = {int(open.name) for open in Path("/dev/fd").iterdir()}
    resource.setrlimit(resource.RLIMIT_NOFILE, (sorted(set(range(2000)) - taken)[40], hard))
    try:
        assert len(read(load, name, items, listing.channels, listing.suffix)) == 80
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ---- far away


class Far:
    """A folder as a filesystem that records its requests, some of which fail.

    Args:
        folder: the folder.
        fails: whether a request fails, given its number and how often the same one was made, both counted from 1.
    """

    def __init__(self, folder, fails=lambda number, times: False):
        self.folder, self.fails, self.asked = folder, fails, []

    def ask(self, *what):
        self.asked.append(what)
        if self.fails(len(self.asked), self.asked.count(what)):
            raise OSError("AWS Error SLOW_DOWN: Please reduce your request rate.")

    def open_input_file(self, path):
        self.ask(path)
        return FarFile(self, path, fs.LocalFileSystem().open_input_file(path))

    def sizes(self):
        """Bytes of each request, except those that open a file."""
        return sorted(what[-1] for what in self.asked if len(what) > 1)


class FarFile:
    def __init__(self, far, path, file):
        self.far, self.path, self.file, self.seek, self.size = far, path, file, file.seek, file.size

    def readinto(self, buffer):
        self.far.ask(self.path, self.file.tell(), len(buffer))
        return self.file.readinto(buffer)

    def read_at(self, size, offset):
        self.far.ask(self.path, offset, size)
        return self.file.read_at(size, offset)


@pytest.fixture
def four(tmp_path):
    """A folder with four tars of twenty images each."""
    for number in range(4):
        foreign(tmp_path / f"{number}.tar", 20, 20 * number, suffix="jpg")
    return tmp_path


@pytest.fixture
def far(four, monkeypatch):
    """The same folder at ``s3://far``."""
    found = Far(four)
    monkeypatch.setattr(stages.remote, "connect", lambda _: (found, str(four)))
    monkeypatch.setattr(stages.remote, "PAUSE", 0.01)
    monkeypatch.setattr(stages.remote, "FIRST_PATIENCE", 0.0)
    monkeypatch.setattr(stages.remote, "PATIENCE", 0.5)
    return found


FAR = shards_at("s3://far/{0..3}.tar", shard_size=40)


def assert_as_on_disk(shards, folder):
    here = everything(shards_at("{0..3}.tar", shard_size=40), folder)
    assert list(shards) == list(here)
    for name, shard in shards.items():
        assert shard.files == here[name].files
        assert np.array_equal(shard.index, here[name].index)
        assert np.array_equal(shard.label, here[name].label)


@pytest.mark.parametrize("chunk", [600, 5000, 8 * 2**20])
@pytest.mark.parametrize("gap", [0, 64 * 2**10])
def test_however_much_is_asked_for_at_once_the_same_comes_of_it(chunk, gap, far, tmp_path, monkeypatch):
    monkeypatch.setattr(stages.load.files, "CHUNK", chunk)
    monkeypatch.setattr(stages.load.files, "GAP", gap)
    shards = everything(FAR, tmp_path / "elsewhere")
    assert max(far.sizes()) <= max(chunk, 1000)  # no image has 1000 bytes
    assert_as_on_disk(shards, tmp_path)


def first_shard(load, listing):
    name, items = next(iter(assign_to_shards(listing, load).items()))
    return items, lambda: read(load, name, items, listing.channels, listing.suffix)


def test_far_tars_are_listed_and_read_in_few_requests(far, tmp_path):
    _, shard = first_shard(FAR, list_source(FAR, tmp_path))
    # Each tar once; besides, the first is tried beforehand, and its first image says whether they are grey.
    assert (len(far.asked), len(far.sizes())) == (11, 5)
    far.asked.clear()
    shard()
    assert (len(far.asked), len(far.sizes())) == (8, 4)


def test_of_far_images_that_lie_apart_nothing_else_is_fetched(far, tmp_path, monkeypatch):
    monkeypatch.setattr(stages.load.files, "GAP", 0)
    _, shard = first_shard(FAR, list_source(FAR, tmp_path))
    far.asked.clear()
    assert sorted(map(len, shard().files)) == far.sizes()


def test_a_store_that_refuses_everything_twice_gives_the_same(far, tmp_path):
    far.fails = lambda number, times: number > 1 and times % 3 != 0  # the first is how one hears of a mistyped URL
    assert_as_on_disk(everything(FAR, tmp_path), tmp_path)


def test_a_store_that_stays_away_is_no_fault_of_the_images(far, tmp_path):
    load = FAR.model_copy(update={"max_undecodable": 1.0})
    _, shard = first_shard(load, list_source(load, tmp_path))
    far.asked.clear()
    far.fails = lambda number, times: number > 6  # four open, two are read
    with pytest.raises(ConnectionError, match=r"s3://far/\d.tar cannot be read: AWS Error SLOW_DOWN"):
        shard()


@pytest.mark.parametrize("answers", [0, 3, 10], ids=["from the start", "while listing", "before the first image"])
def test_a_store_that_is_away_while_a_source_is_listed_is_named(answers, far, tmp_path):
    far.fails = lambda number, times: number > answers
    with pytest.raises(BadInput, match=r"s3://far/0.tar cannot be read: AWS Error SLOW_DOWN"):
        list_source(shards_at("s3://far/{0,0,0,0}.tar"), tmp_path)
    if answers == 0:
        assert len(far.asked) == 1  # who mistyped hears of it at once


def test_a_far_tar_that_went_away_after_listing_gives_failures(far, tmp_path):
    load = FAR.model_copy(update={"max_undecodable": 0.9})
    items, shard = first_shard(load, list_source(load, tmp_path))
    (tmp_path / "2.tar").unlink()
    lost = {item.index for item in items if item.ref[0] == "s3://far/2.tar"}
    assert {failure.index for failure in shard().failures} == lost


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tar: tar[:2000], "is cut"),
        (lambda tar: tar[: tar.index(b"sample0035")], "is cut: it ends after"),
        (lambda tar: b"<html>" + tar, "is an HTML page"),
        (lambda tar: b"", "is empty"),
    ],
    ids=["inside", "between", "a page", "empty"],
)
def test_a_far_tar_that_is_not_whole_is_refused_as_one_on_disk(change, said, far, tmp_path):
    tar = tmp_path / "1.tar"
    tar.write_bytes(change(tar.read_bytes()))
    with pytest.raises(BadInput, match=rf"s3://far/1.tar {said}"):
        list_source(FAR, tmp_path)


def test_shards_on_an_s3_server_are_those_on_disk_and_a_request_is_one(s3, s3_url, four, tmp_path):
    for file in four.glob("*.tar"):
        with s3.filesystem.open_output_stream(f"{s3_url.removeprefix('s3://')}/{file.name}") as out:
            out.write(file.read_bytes())
    before = s3.requests()
    shards = everything(shards_at(f"{s3_url}/{{0..3}}.tar", shard_size=40), tmp_path / "elsewhere")
    assert_as_on_disk(shards, four)
    assert s3.requests() - before == {"HEAD": 6 + 2 * 4, "GET": 5 + 2 * 4}
    with pytest.raises(BadInput, match=r"9.tar cannot be read: Path does not exist"):
        list_source(shards_at(f"{s3_url}/9.tar"), tmp_path)
    with s3.filesystem.open_output_stream(f"{s3_url.removeprefix('s3://')}/9.tar") as out:
        out.write((four / "0.tar").read_bytes()[:5000])
    with pytest.raises(BadInput, match=r"9.tar is cut"):
        list_source(shards_at(f"{s3_url}/9.tar"), tmp_path)


# --------------------------------------------------------------------------------------- torchvision


@pytest.mark.parametrize("source", ["cifar10", "cifar100", "mnist", "fashion-mnist"])
def test_a_torchvision_set_that_is_not_there_is_refused_where_no_download_is_allowed(source, tmp_path):
    with pytest.raises(BadInput, match=rf"{source} is not in {tmp_path}: .*name its folder with --data"):
        list_source(Torchvision(source=source, download=False), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_torchvision_set_is_not_downloaded_where_the_caller_does_not_want_it(tmp_path):
    with pytest.raises(BadInput, match="`notbugs run` downloads it"):
        list_source(Torchvision(source="mnist"), tmp_path, fetch=False)
    assert not list(tmp_path.iterdir())
