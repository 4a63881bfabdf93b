"""WebDatasets made elsewhere: finding a sample's image and label, and refused samples."""

import io
import os
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from support import tar_of

from pipeline.cli import main
from stages.errors import BadInput
from stages.limits import CLASSES
from stages.load import assign_to_shards, list_source, read
from stages.recipes import Digits, Synthetic, WebDataset


def png(shade):
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(out, "PNG")
    return out.getvalue()


PNG, MASK = png(200), png(9)


def sample(key, label="1", image="png"):
    return [(f"{key}.{image}", PNG), (f"{key}.cls", label.encode() if isinstance(label, str) else label)]


def asked(shards="a.tar", **said):
    return WebDataset(source="webdataset", shards={"train": str(shards)}, **said)


def listed(folder, *named, **said):
    """The listing of a source with one tar."""
    (folder / "a.tar").write_bytes(tar_of(*named))
    return list_source(asked(**said), folder)


def contents(folder, listing):
    """Label and image of every sample."""
    tar = (folder / "a.tar").read_bytes()
    return [(item.label, tar[item.ref[1] : sum(item.ref[1:])]) for item in listing.items["train"]]


# ----------------------------------------------------------------------------------------- which is the image

CHOSEN = {
    "a mask beside it": ([("0.png", PNG), ("0.seg.png", MASK), ("0.cls", b"1")], {}),
    "a mask before it": ([("0.cls", b"1"), ("0.depth.png", MASK), ("0.jpg", PNG)], {}),
    "of two kinds the one that is asked for": (
        [("0.jpg", MASK), ("0.png", PNG), ("0.cls", b"1")],
        {"image": "png"},
    ),
    "the one that is asked for by both its endings": (
        [("0.seg.png", MASK), ("0.rgb.png", PNG), ("0.cls", b"1")],
        {"image": "rgb.png"},
    ),
    "endings in capitals": ([("0.PNG", PNG), ("0.CLS", b"1")], {}),
    "jpeg where jpg is asked for": ([("0.jpeg", PNG), ("0.png", MASK), ("0.cls", b"1")], {"image": "jpg"}),
    "and the other way round": ([("0.rgb.jpg", PNG), ("0.png", MASK), ("0.cls", b"1")], {"image": "rgb.jpeg"}),
    "of both spellings the one that is asked for": (
        [("0.jpeg", MASK), ("0.jpg", PNG), ("0.cls", b"1")],
        {"image": "jpg"},
    ),
    "a key that would go on behind the dot": (
        [("v1.0.png", PNG), ("v1.0.cls", b"1")],
        {"image": "0.png", "label": "0.cls"},
    ),
    "below the current folder": ([("./0.png", PNG), ("0.cls", b"1")], {}),
    "of an absolute path": ([("/data/0.png", PNG), ("/data/0.cls", b"1")], {}),
    "of a path that leads out": ([("../../0.png", PNG), ("../../0.cls", b"1")], {}),
    "of a long path": ([("d/" * 200 + "0.png", PNG), ("d/" * 200 + "0.cls", b"1")], {}),
    "of a name that is not UTF-8": ([("caf\udce9.png", PNG), ("caf\udce9.cls", b"1")], {}),
    "of a folder with a dot": ([("v1.0/0.png", PNG), ("v1.0/0.cls", b"1")], {}),
}


@pytest.mark.parametrize("which", CHOSEN)
def test_the_image_is_the_file_whose_whole_extension_is_an_images_or_the_one_asked_for(which, tmp_path):
    named, said = CHOSEN[which]
    assert contents(tmp_path, listed(tmp_path, *named, **said)) == [(1, PNG)]


LABELS = {
    "digits": ([("0.cls", b"3")], {}),
    "a line's end": ([("0.cls", b" 3\r\n")], {}),
    "zeros before it": ([("0.cls", b"003")], {}),
    "a file of another name": ([("0.cls", b"1"), ("0.index.txt", b"3")], {"label": "index.txt"}),
    "a name of a class": ([("0.cls", b"dog\n")], {"classes": ["ant", "bee", "cow", "dog"]}),
    "a number where there are names": ([("0.cls", b"3")], {"classes": ["ant", "bee", "cow", "dog"]}),
    "a key of the JSON": ([("0.json", b'{"label": 3, "caption": "a dog"}')], {"label": "json.label"}),
    "a nested key": ([("0.json", b'{"meta": {"Label": "3"}}')], {"label": "json.meta.Label"}),
    "a name in the JSON": ([("0.json", b'{"label": "b"}')], {"label": "json.label", "classes": list("cdeb")}),
}


@pytest.mark.parametrize("which", LABELS)
def test_the_label_is_a_number_or_a_name_in_a_file_or_in_the_json(which, tmp_path):
    named, said = LABELS[which]
    assert contents(tmp_path, listed(tmp_path, ("0.png", PNG), *named, **said)) == [(3, PNG)]


# ------------------------------------------------------------------------------------------------ what is refused

NUMBER = "expected a whole number from 0 to 99999"
WRONG_LABELS = {
    b"1.0": f"sample 0 has label '1.0', {NUMBER}",
    b"": f"sample 0 has label '', {NUMBER}",
    b"\xef\xbb\xbf3": f"sample 0 has label '\\ufeff3', {NUMBER}",
    b"dog": f"sample 0 has label 'dog', {NUMBER}, or a name that `classes` lists",
    b"-1": f"sample 0 has label -1, {NUMBER}",
    b"1_0": f"sample 0 has label '1_0', {NUMBER}",
    b"1e3": f"sample 0 has label '1e3', {NUMBER}",
    "٣".encode(): f"sample 0 has label '٣', {NUMBER}",
    b"3\n4": f"sample 0 has label '3\\n4', {NUMBER}",
    b"\x1b[31m3": f"sample 0 has label '\\x1b[31m3', {NUMBER}",
    b"100000": f"sample 0 has label 100000, {NUMBER}",
    b"100000000000": f"sample 0 has label 100000000000, {NUMBER}",
    b"9" * 5000: "sample 0 has label '9999999999999999",
    b" " * 2**20 + b"3": "sample 0 has a cls of more than 1,048,576 bytes",
}


@pytest.mark.parametrize("label", WRONG_LABELS, ids=lambda label: repr(label[:12]))
def test_a_label_that_is_no_class_is_refused_by_shard_and_sample(label, tmp_path):
    with pytest.raises(BadInput) as raised:
        listed(tmp_path, *sample("0", label))
    assert str(raised.value).startswith(f"{tmp_path}/a.tar: {WRONG_LABELS[label]}")


def test_a_name_that_is_none_of_the_classes_is_refused(tmp_path):
    with pytest.raises(BadInput, match="has label 'Dog', expected a whole number from 0 to 1, or a name"):
        listed(tmp_path, *sample("0", "Dog"), classes=["ant", "dog"])


WRONG_JSON = {
    b"": "has a json that cannot be read",
    b"{": "has a json that cannot be read",
    b"[" * 200_000: "has a json that cannot be read",
    b'{"label": ' + b"9" * 5000 + b"}": "has a json that cannot be read",
    b"[]": "has a json without 'label', which `label` names: there is []",
    b'{"a": 1, "b": 2}': "has a json without 'label', which `label` names: there is a, b",
    b'{"label": 1.0}': f"has label 1.0, {NUMBER}",
    b'{"label": true}': f"has label True, {NUMBER}",
    b'{"label": null}': f"has label None, {NUMBER}",
    b'{"label": [1]}': f"has label [1], {NUMBER}",
    b'{"label": 1e5}': f"has label 100000.0, {NUMBER}",
}


@pytest.mark.parametrize("content", WRONG_JSON, ids=lambda content: repr(content[:16]))
def test_a_json_without_a_class_at_the_place_of_the_label_is_refused(content, tmp_path):
    with pytest.raises(BadInput) as raised:
        listed(tmp_path, ("0.png", PNG), ("0.json", content), label="json.label")
    assert str(raised.value).startswith(f"{tmp_path}/a.tar: sample 0 {WRONG_JSON[content]}")


LACKING = "expected an image (png, jpg, webp, jpeg) and cls, one behind the other"
WRONG = {
    "two images": (
        [("0.jpg", PNG), ("0.png", PNG), ("0.cls", b"1")],
        "sample 0 has several images (jpg, png): choose one, for example `image: jpg`",
    ),
    "masks alone": (
        [("0.seg.png", PNG), ("0.rgb.png", PNG), ("0.cls", b"1")],
        f"sample 0 has seg.png, rgb.png, cls, {LACKING}; the key ends at the first dot of a name, "
        "perhaps `image: seg.png` is meant",
    ),
    "keys with dots": (
        [*sample("a.b"), *sample("a.c")],
        f"sample a has b.png, b.cls, c.png, c.cls, {LACKING}; the key ends at the first dot of a name",
    ),
    "many keys with dots": (
        [one for number in range(9) for one in sample(f"a.{number}")],
        "sample a has 0.png, 0.cls, 1.png, 1.cls, 2.png, 2.cls, 3.png, 3.cls, 4.png, 4.cls, …, expected an image (",
    ),
    "a key twice": ([*sample("0"), *sample("0", "2")], "sample 0 has png twice: two files of a name, or two samples"),
    "a file twice": ([*sample("0"), ("0.cls", b"2")], "sample 0 has cls twice"),
    "a file twice, once in capitals": ([("0.PNG", PNG), *sample("0")], "sample 0 has png twice"),
    "a caption twice": ([*sample("0"), ("0.txt", b""), ("0.txt", b"")], "sample 0 has txt twice"),
    "labels behind all images": (
        [("0.png", PNG), ("1.png", PNG), ("0.cls", b"1"), ("1.cls", b"1")],
        f"sample 0 has png, {LACKING}",
    ),
    "a label in the JSON alone": (
        [("0.png", PNG), ("0.json", b"{}")],
        f"sample 0 has png, json, {LACKING}; `label: json.KEY` takes the label from the JSON",
    ),
    "hidden files alone": (
        sample(".0"),
        "the source is empty: split train of webdataset has no images; passed over: 2 hidden files and folders",
    ),
    "no files": ([], "the source is empty: split train of webdataset has no images; passed over: 1 empty tars"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_sample_that_can_be_read_in_two_ways_or_in_none_is_refused(wrong, tmp_path):
    named, said = WRONG[wrong]
    with pytest.raises(BadInput) as raised:
        listed(tmp_path, *named)
    assert str(raised.value).removeprefix(f"{tmp_path}/a.tar: ").startswith(said)


def test_samples_of_one_key_that_others_part_are_kept(tmp_path):
    listing = listed(tmp_path, *sample("0", "1"), *sample("1", "2"), *sample("0", "0"), *sample("x/0", "2"))
    assert [label for label, _ in contents(tmp_path, listing)] == [1, 2, 0, 2]


def test_an_image_that_claims_too_much_is_refused_before_it_is_read(tmp_path):
    tar = tmp_path / "a.tar"
    tar.write_bytes(tar_of(("0.cls", b"1")).rstrip(b"\0") + bytes(511))  # up to the next whole block
    member = tarfile.TarInfo("0.png")
    for size, said in (
        (2**33, r"a.tar is cut inside 0.png"),
        (2**30, "has an image of 1,073,741,824 bytes, at most 536,870,912"),
    ):
        member.size = size
        with tar.open("r+b") as file:
            file.seek(1024)
            file.write(member.tobuf(tarfile.GNU_FORMAT))
            file.truncate(1536 + 2**30 + 1024)  # holes: it takes no room on the disk
        with pytest.raises(BadInput, match=said):
            list_source(asked(), tmp_path)


def test_a_sample_of_more_files_than_any_has_is_refused(tmp_path):
    named = [(f"a.{number}.txt", b"") for number in range(10_001)]
    with pytest.raises(BadInput, match="sample a has more than 10,000 files; the key ends at the first dot"):
        listed(tmp_path, *named)


# -------------------------------------------------------------------------------------------- what is passed over


def test_what_is_no_data_is_passed_over_and_counted(tmp_path):
    listing = listed(
        tmp_path,
        ("._0.png", b"apple"),
        ("0.png", PNG),
        ("__MACOSX/._0.png", b"apple"),
        ("x/.DS_Store", b"apple"),
        ("Thumbs.db", b"windows"),
        (".ipynb_checkpoints/0-checkpoint.png", PNG),
        ("README", b"words"),
        ("0.cls", b"1"),
    )
    assert contents(tmp_path, listing) == [(1, PNG)]
    assert listing.skipped == {"files without an extension": 1, "hidden files and folders": 5}


def test_links_folders_and_devices_are_passed_over_and_counted_over_all_tars(tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    for name, content in sample("0"):
        (made / name).write_bytes(content)
    (made / "latest.png").symlink_to("0.png")
    os.mkfifo(made / "pipe")
    for number in range(2):
        subprocess.run(["tar", "--sort=name", "-cf", f"{number}.tar", "made"], cwd=tmp_path, check=True)
    listing = list_source(asked("{0,1}.tar"), tmp_path)
    assert len(listing.items["train"]) == 2
    assert listing.skipped == {"devices": 2, "folders": 2, "links": 2}


def test_of_a_sample_whose_image_is_a_link_it_is_said_how_to_write_the_tar(tmp_path):
    for name, content in [*sample("0"), *sample("1")]:
        (tmp_path / name).write_bytes(content)
    (tmp_path / "1.png").unlink()
    os.link(tmp_path / "0.png", tmp_path / "1.png")
    subprocess.run(["tar", "-cf", "a.tar", "0.png", "0.cls", "1.png", "1.cls"], cwd=tmp_path, check=True)
    with pytest.raises(BadInput, match=r"sample 1 has cls, .* \(links are passed over: write the tar with --deref"):
        list_source(asked(), tmp_path)
    line = ["tar", "--hard-dereference", "-cf", "a.tar", "0.png", "0.cls", "1.png", "1.cls"]
    subprocess.run(line, cwd=tmp_path, check=True)
    assert len(list_source(asked(), tmp_path).items["train"]) == 2


def test_a_pipe_or_a_device_in_a_tars_place_is_refused_rather_than_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    for shards in ("a.tar", "/dev/zero"):
        with pytest.raises(BadInput, match="cannot be read: it is no file"):
            list_source(asked(shards), tmp_path)


URLS = {
    "ftp://host/{0..3}.tar": "ftp://host/0.tar is no URL that is read (s3://, ",
    "hf://datasets/a/b.tar": "hf://datasets/a/b.tar is no URL that is read",
    "pipe:curl -s https://host/a.tar": "pipe:curl -s https://host/a.tar is no URL that is read",
    "file://host/a.tar": "file://host/a.tar is no URL that is read",
    "s3://": "s3:// is no place that can be read: Not a valid bucket name: ''",
    "a\0.tar": "/a\0.tar is no place that can be read: embedded null byte",
}


@pytest.mark.parametrize("url", URLS)
def test_what_is_no_place_of_tars_is_one_sentence(url, tmp_path):
    with pytest.raises(BadInput) as raised:
        list_source(asked(url), tmp_path)
    assert str(raised.value).removeprefix(str(tmp_path)).startswith(URLS[url])
    assert "\n" not in str(raised.value)


# ------------------------------------------------------------------------------------------------- the recipe


def test_a_number_of_classes_has_a_limit_wherever_it_is_said():
    for classes in (CLASSES + 1, 0, -1, []):
        with pytest.raises(ValidationError, match="classes"):
            asked(classes=classes)
    with pytest.raises(ValidationError, match="less than or equal to 100000"):
        Synthetic(source="synthetic", classes=CLASSES + 1)
    assert asked(classes=CLASSES).classes == CLASSES


def test_a_source_of_more_classes_than_there_may_be_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("stages.load.CLASSES", 9)
    with pytest.raises(BadInput, match="the source has 10 classes, at most 9 can be told apart"):
        list_source(Digits(source="sklearn-digits"), tmp_path)


def test_the_largest_label_makes_as_many_classes_as_there_may_be(tmp_path):
    assert len(listed(tmp_path, *sample("0", str(CLASSES - 1))).classes) == CLASSES


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (
            {"image": ".jpg"},
            "image: must be an extension, without the first dot, such as `jpg` or `rgb.png`, got '.jpg'",
        ),
        ({"image": "a/b.jpg"}, "image: must be an extension"),
        ({"image": "tar"}, "image: 'tar' is no extension of an image, expected one of png, jpg, webp, jpeg"),
        ({"label": ""}, "label: must be an extension"),
        ({"label": "json"}, "label: must say which key of the JSON, for example `json.label`"),
        ({"label": "json..a"}, "label: must be an extension"),
        ({}, f"/a.tar: sample 0 has label 'dog', {NUMBER}, or a name that `classes` lists"),
    ],
    ids=str,
)
def test_on_the_command_line_what_is_refused_is_one_sentence_with_its_place(said, sentence, tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of(*sample("0", "dog")))
    load = {"source": "webdataset", "shards": {"train": "a.tar"}, **said}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"name": "x", "datasets": {"c": {"load": load}}}))
    line = ["plan", str(tmp_path / "x.yaml"), "--data", str(tmp_path), "--store", str(tmp_path / "store")]
    ended = CliRunner().invoke(main, line)
    assert ended.exit_code == 2
    assert ended.stderr.startswith("Error: datasets.c.load") and sentence in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_what_a_plain_source_does_not_need_makes_no_other_version():
    assert asked(image=None, label="cls").parameters() == asked().parameters()
    assert {"image", "label"}.isdisjoint(asked().parameters())
    assert asked(image="jpg", label="json.label").parameters() == asked().parameters() | {
        "image": "jpg",
        "label": "json.label",
    }


# ------------------------------------------------------------------------------------------------ any change

SAMPLES = [one for number in range(3) for one in [*sample(f"{number}", str(number)), (f"{number}.txt", b"a caption")]]
WHOLE = tar_of(*SAMPLES)


@settings(max_examples=300)
@given(st.data())
def test_a_tar_that_was_changed_anywhere_gives_all_samples_or_is_refused(data):
    tar, at = bytearray(WHOLE), data.draw(st.integers(0, len(WHOLE) - 1))
    match how := data.draw(st.sampled_from(["cut", "flip", "insert", "join"])):
        case "cut":
            del tar[at:]
        case "flip":
            tar[at] ^= data.draw(st.integers(1, 255))
        case "insert":
            tar[at:at] = data.draw(st.binary(min_size=1, max_size=600) | st.just(bytes(512)))
        case "join":
            tar += WHOLE[:at]
    load = asked(max_undecodable=1.0)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.tar").write_bytes(tar)
        try:
            listing = list_source(load, Path(folder))
        except BadInput as error:
            assert str(error).startswith((f"{folder}/a.tar", "the source is empty")) and "\n" not in str(error)
            return
        labels = listing.items["train"].labels.tolist()
        assert len(labels) == 3 if how == "flip" else labels in ([0, 1, 2], [0, 1, 2] * 2)
        (name, items), *_ = assign_to_shards(listing, load).items()
        shard = read(load, name, items, 3, None)
        assert len(shard) + len(shard.failures) == len(labels)
