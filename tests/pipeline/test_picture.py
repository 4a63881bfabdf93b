"""`notbugs attack`: one picture perturbed toward a class."""

import io
import json
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from sklearn.datasets import load_digits
from support import TINY

from pipeline import picture
from pipeline.cli import main
from pipeline.experiment import spec
from pipeline.run.engines import Inline
from pipeline.run.jobs import Context
from pipeline.run.runs import Run
from pipeline.store import Store
from stages.errors import BadInput


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A store with a network trained on digits."""
    folder = tmp_path_factory.mktemp("store")
    train = {**TINY["models"]["standard"]["train"], "epochs": 15}
    known = {**TINY, "models": {**TINY["models"], "standard": {"train": train}}}
    assert Run(spec.parse(known), Context(Store(str(folder)), folder, folder), ("standard",)).go(Inline())
    return folder


@pytest.fixture
def image(tmp_path) -> Path:
    """A handwritten 3."""
    digits = load_digits()
    pixels = digits.images[digits.target == 3][5] * 255 / 16
    file = tmp_path / "three.png"
    Image.fromarray(pixels.astype(np.uint8)).save(file)
    return file


def attack(*args, code=0):
    result = CliRunner().invoke(main, ["attack", *map(str, args)])
    assert result.exit_code == code, f"{result.output}\n{result.stderr}\n{result.exception!r}"
    return result


def test_a_radius_may_be_a_fraction(store, image):
    said = attack(
        image, "--model", "standard", "--to", 8, "--norm", "linf", "--eps", "8/255", "--store", store, "--json"
    )
    assert json.loads(said.stdout)["linf"] == pytest.approx(8 / 255)


def test_a_three_becomes_an_eight_for_the_model_and_stays_a_three_for_a_person(store, image):
    said = json.loads(attack(image, "--model", "standard", "--to", "8", "--eps", 2, "--store", store, "--json").stdout)
    assert next(iter(said["before"])) == "3"
    assert next(iter(said["after"])) == "8"
    assert said["success"] is True and said["l2"] <= 2
    with Image.open(said["image"]) as after, Image.open(image) as before:
        levels = np.sqrt(((np.asarray(after).astype(int) - np.asarray(before).astype(int)) ** 2).sum()) / 255
    assert levels == pytest.approx(said["l2"])
    with Image.open(said["picture"]) as drawn:
        assert drawn.format == "PNG" and drawn.width > 3 * 200


def test_the_text_names_both_answers_and_both_files(store, image):
    shown = attack(image, "--model", "models/standard", "--to", "8", "--store", store, "--steps", 20).stdout
    lines = shown.splitlines()
    assert any(line.startswith("before") and " 3 " in line for line in lines)
    assert any(line.startswith("after") for line in lines)
    assert "20 steps of PGD, L2 ε 0.5" in shown
    assert image.with_name("three-as-8.png").exists() and image.with_name("three-as-8-image.png").exists()


def test_linf_moves_no_pixel_further_than_asked(store, image):
    said = json.loads(
        attack(
            image, "--model", "standard", "--to", 8, "--norm", "linf", "--eps", 0.1, "--store", store, "--json"
        ).stdout
    )
    assert said["linf"] <= 0.1


def test_a_rotation_is_searched_for_in_place_of_a_change_of_pixels(store, image, tmp_path):
    out = tmp_path / "turned.png"
    asked = ("--model", "standard", "--to", "8", "--rotate", "--store", store, "--out", out, "--json")
    said = json.loads(attack(image, *asked).stdout)
    assert re.fullmatch(
        r"rotated by [+-]\d+°, shifted by [+-]\d+ % down and [+-]\d+ % right, the best of 775", said["how"]
    )
    assert said["target"]["after"] >= said["target"]["before"]
    assert out.exists()


def test_a_picture_of_any_size_is_brought_to_the_models(store, tmp_path):
    file = tmp_path / "wide.jpg"
    Image.new("RGB", (60, 40), "white").save(file)
    said = json.loads(attack(file, "--model", "standard", "--to", "1", "--store", store, "--steps", 2, "--json").stdout)
    with Image.open(said["image"]) as moved:
        assert moved.size == (8, 8)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (
            ("--model", "standard", "--to", "airliner"),
            "--to airliner: is not one of the model's 10 classes; they are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9\n",
        ),
        (("--model", "standard", "--to", "1", "--rotate", "--eps", "3"), "--rotate: does not use --eps"),
        (
            ("--model", "standard", "--to", "1", "--rotate", "--norm", "l2", "--steps", "100"),
            "--rotate: does not use --norm and --steps",
        ),
        (("--model", "standard", "--to", "10"), "--to 10: is not one of the model's 10 classes"),
        (("--model", "nobody", "--to", "1"), "--model nobody: neither the store"),
        (("--model", "standard", "--to", "1", "--eps", "0.001"), "eps 0.001 is less than one 8-bit level"),
        (("--model", "standard", "--to", "1", "--eps", "8", "--norm", "linf"), "8-bit levels, write eps: 8/255"),
        (
            ("--model", "standard", "--to", "1", "--eps", "9"),
            "eps 9 is more than 8.0, the diagonal of all images of 1×8",
        ),
        (("--model", "standard", "--to", "1", "--eps", "1e30"), "eps 1e+30 is more than 8.0, the diagonal"),
        (("--model", "standard", "--to", "1", "--eps", "nan"), "nan is not a finite number"),
        (("--model", "standard", "--to", "1", "--steps", "1000000"), "--steps: must be less than or equal to 100000"),
        (
            ("--model", "standard", "--to", "1", "--steps", "1", "--out", "no/where.png"),
            "--out no/where.png: cannot be written: there is no folder no",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(asked, sentence, store, image):
    result = attack(image, *asked, "--store", store, code=2)
    assert sentence in result.stderr and result.stderr.count("\n") == 1


def test_a_file_that_is_no_picture_is_one_sentence(store, tmp_path):
    file = tmp_path / "notes.txt"
    assert "cannot be read" in attack(file, "--model", "standard", "--to", 1, "--store", store, code=2).stderr
    file.write_text("no picture")
    assert "cannot be decoded" in attack(file, "--model", "standard", "--to", 1, "--store", store, code=2).stderr


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda file: file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "not one of PNG, JPEG"),
        (lambda file: Image.new("1", (13_000, 13_000)).save(file), "has more than 89,478,485 pixels: make it smaller"),
        (os.mkfifo, "is no regular file"),
        (Path.mkdir, "cannot be read: Is a directory"),
        (lambda file: file.symlink_to(file), "cannot be read: Too many levels of symbolic links"),
    ],
    ids=["PostScript", "13,000 × 13,000", "a pipe", "a folder", "a circle"],
)
def test_a_picture_of_a_stranger_is_one_sentence(make, sentence, store, tmp_path):
    make(tmp_path / "picture.png")
    asked = ("--model", "standard", "--to", 1, "--store", store)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        stderr = attack(tmp_path / "picture.png", *asked, code=2).stderr
    assert sentence in stderr and stderr.count("\n") == 1
    assert not said


def test_a_photograph_is_moved_as_people_see_it(store, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    flat, upright = np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.uint8)
    flat[:, 0] = upright[0] = 255
    Image.fromarray(flat).save(tmp_path / "phone.png", exif=exif)
    assert np.array_equal(picture.read(tmp_path / "phone.png", (1, 8, 8))[:, :, 0], upright)


def test_a_class_is_found_by_name_in_any_case_or_by_number():
    classes = ["tench", "English springer", "golf ball", "7"]
    assert picture.class_number("english springer", classes) == 1
    assert picture.class_number("0", classes) == 0
    assert picture.class_number("7", classes) == 3, "a name comes before a number"
    with pytest.raises(BadInput, match="did you mean 'golf ball'"):
        picture.class_number("golf", classes)
    with pytest.raises(BadInput, match="did you mean 'tench'"):
        picture.class_number("tensch", classes)


def test_of_many_classes_the_first_are_named():
    with pytest.raises(BadInput, match=r"they are class 0, .*class 9, …$"):
        picture.class_number("zebra", [f"class {i}" for i in range(12)])


@pytest.mark.parametrize("name", ["$5 bill $", "猫", "\x1b[2J", "\udcff", "a\nb", "x" * 400])
def test_a_class_of_any_name_is_drawn(name):
    pixels = np.zeros((8, 8, 1), dtype=np.uint8)
    made = picture.Picture(pixels, pixels + 1, [name, "other"], 0, np.array([[0.2, 0.8], [0.9, 0.1]]), 0.1, 0.1, "how")
    with Image.open(io.BytesIO(picture.draw(made))) as drawn:
        assert drawn.format == "PNG"
