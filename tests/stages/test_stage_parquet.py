"""Parquet files, folders of object stores and files of web servers as sources of images."""

import io
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support import tar_of

import stages.load.rows
import stages.remote
from stages.errors import BadData, BadInput
from stages.load import assign_to_shards, list_source, read
from stages.recipes import ImageFolder, Parquet, WebDataset

NAMES = ["ant", "bee", "cow"]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def pixels(number, grey=False):
    return np.random.default_rng(number).integers(0, 256, (8, 10) if grey else (8, 10, 3), dtype=np.uint8)


def png(number, grey=False):
    out = io.BytesIO()
    Image.fromarray(pixels(number, grey)).save(out, format="PNG")
    return out.getvalue()


def table(count=12, first=0, labels=None, grey=False, metadata=None, plain=False, **others):
    """Images that all differ, and labels, as Hugging Face lays them out; with `plain`, as bytes alone."""
    images = [png(first + i, grey) for i in range(count)]
    column = pa.array(images) if plain else pa.array([{"bytes": image, "path": None} for image in images], STRUCT)
    labels = [i % 3 for i in range(count)] if labels is None else labels
    found = pa.table({"image": column, "label": labels, **others})
    return found.replace_schema_metadata(metadata)


def hugging_face(names):
    return {"huggingface": json.dumps({"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}})}


def write(path, content=None, rows=5):
    pq.write_table(table() if content is None else content, path, row_group_size=rows)
    return path


def asked(files="t.parquet", **said):
    return Parquet(source="parquet", files={"train": files}, **said)


def everything(load, data):
    listing = list_source(load, data)
    shards = [
        read(load, name, items, listing.channels, listing.suffix)
        for name, items in assign_to_shards(listing, load).items()
    ]
    found = {
        int(index): (int(label), image if shard.files is None else shard.files[at])
        for shard in shards
        for at, (index, label, image) in enumerate(
            zip(shard.index, shard.label, shard.files or shard.images(), strict=True)
        )
    }
    return listing, found


# ------------------------------------------------------------------------------------------- parquet


def test_a_data_set_that_hugging_face_wrote_keeps_its_images_labels_and_class_names(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    images = [{"bytes": png(i), "path": f"{i}.png"} for i in range(12)]
    made = datasets.Dataset.from_dict({"img": images, "label": [i % 3 for i in range(12)]}, features=features)
    made.to_parquet(tmp_path / "t.parquet", batch_size=5)
    listing, found = everything(asked(shard_size=4), tmp_path)
    assert (listing.classes, listing.suffix, listing.channels) == (tuple(NAMES), "png", 3)
    assert found == {i: (i % 3, png(i)) for i in range(12)}


@pytest.mark.parametrize("plain", [False, True], ids=["struct", "bytes"])
def test_files_of_a_pattern_are_numbered_through_in_the_order_of_their_names(plain, tmp_path):
    for number in range(3):
        write(tmp_path / f"part-{number}.parquet", table(7, 7 * number, plain=plain), rows=3)
    for pattern in ("part-*.parquet", "part-[0-2].parquet", "part-{0..2}.parquet"):
        listing, found = everything(asked(pattern, shard_size=5, crop=8), tmp_path)
        assert listing.classes == ("0", "1", "2")
        assert list(listing.items["train"])[8].ref[2:] == (0, 1)
        for number in range(21):
            assert found[number][0] == number % 7 % 3
            assert np.array_equal(found[number][1], pixels(number)[:, 1:9])


def test_labels_may_be_texts_and_greyscale_is_found(tmp_path):
    write(tmp_path / "t.parquet", table(labels=["cow", "ant"] * 6, grey=True))
    listing, found = everything(asked(), tmp_path)
    assert (listing.classes, listing.channels) == (("ant", "cow"), 1)
    assert [found[i][0] for i in range(4)] == [1, 0, 1, 0]
    given = list_source(asked(classes=["cow", "ant", "bee"]), tmp_path)
    assert given.items["train"].labels[:4].tolist() == [0, 1, 0, 1]


def test_a_row_without_an_image_and_a_damaged_group_are_failures_with_their_places(tmp_path):
    images = pa.array([{"bytes": png(i) if i != 2 else None, "path": "x.png"} for i in range(12)], STRUCT)
    path = write(tmp_path / "t.parquet", table().set_column(0, "image", images), rows=5)
    load = asked(max_undecodable=0.9)
    listing = list_source(load, tmp_path)
    place = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[place : place + 40] = b"\xff" * 40
    path.write_bytes(content)
    ((name, items),) = assign_to_shards(listing, load).items()
    shard = read(load, name, items, listing.channels, listing.suffix)
    why = {failure.index: failure.error for failure in shard.failures}
    assert set(why) == {2, 5, 6, 7, 8, 9}
    assert why[2] == f"{path}: row 2 of row group 0: holds no image"
    assert re.search(r"row 0 of row group 1: is (damaged|no parquet file)", why[5])


@pytest.mark.parametrize(
    ("content", "said", "sentence"),
    [
        (table(labels=[0, 1, -1] * 4), {}, r"row 2 has label -1, expected a whole number from 0 to"),
        (table(labels=[0, 1, 7] * 4), {"classes": 3}, r"row 2 has label 7, expected a whole number from 0 to 2"),
        (table(labels=["a", "b", "c"] * 4), {"classes": ["a", "b"]}, "row 2 has label 'c', expected one of the class"),
        (table(labels=["a", "b", "c"] * 4), {"classes": 3}, "has texts as label: list the class names in `classes`"),
        (table(labels=[0, None, 1] * 4), {}, "has 4 rows without a label"),
        (table(labels=[0.5] * 12), {}, r"has no column of labels .*: it has image \(struct.*, label \(double\)"),
        (table(), {"label": "lable"}, "has no column 'lable', which `label` names: it has image"),
        (table(), {"image": "label"}, "has no images .* in its column 'label', which `image` names"),
        (table(other=[b"x"] * 12), {}, r"has several columns of images .*, image, other: choose one, for example"),
        (table(metadata={"huggingface": "[" * 9}), {}, "has a damaged `huggingface` metadata"),
        (table(metadata=hugging_face(["a", "a", "b"])), {}, "has no usable class names for label in its `huggingface`"),
        (table(metadata=hugging_face(["a", "b"])), {}, "row 2 has label 2, expected a whole number from 0 to 1"),
        (table().slice(0, 0), {}, "the source is empty: split train of parquet has no images"),
        (table().set_column(0, "image", pa.array([b"no image"] * 12)), {}, "12 of 12 images tried fail; the first: "),
    ],
)  # fmt: skip
def test_what_a_table_cannot_give_is_refused_in_one_sentence(content, said, sentence, tmp_path):
    write(tmp_path / "t.parquet", content)
    with pytest.raises(BadInput, match=sentence):
        list_source(asked(**said), tmp_path)


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("no.parquet", "no.parquet cannot be read: No such file"),
        ("no*.parquet", r"no\*.parquet: there is no such file"),
        ("{t.parquet", "has braces that do not close"),
        ("https://far.example/*.parquet", "a web server lists no files; name them with braces"),
        ("text.parquet", "text.parquet is no parquet file that can be read: Parquet magic bytes not found"),
        (".", "cannot be read: Is a directory"),
        ("ftp://far.example/t.parquet", "is no URL that is read"),
    ],
)
def test_a_place_without_a_table_is_one_sentence(pattern, sentence, tmp_path):
    (tmp_path / "text.parquet").write_text("label,image\n" * 9)
    with pytest.raises(BadInput, match=sentence):
        list_source(asked(pattern), tmp_path)


def test_files_that_are_not_of_one_data_set_are_refused(tmp_path):
    write(tmp_path / "1.parquet")
    write(tmp_path / "2.parquet", table(metadata=hugging_face(NAMES)))
    with pytest.raises(BadInput, match=r"2.parquet has other class names than .*1.parquet: the files are not of one"):
        list_source(asked("{1,2}.parquet"), tmp_path)
    assert list_source(asked("{1,2}.parquet", classes=NAMES), tmp_path).classes == tuple(NAMES)


def test_a_row_group_too_large_to_be_read_whole_is_refused_before_it_is_read(tmp_path, monkeypatch):
    write(tmp_path / "t.parquet")
    monkeypatch.setattr(stages.load.rows, "LARGEST_GROUP", 100)
    with pytest.raises(BadInput, match=r"bytes of images in a row group, .*: write it with smaller row groups"):
        list_source(asked(), tmp_path)


def test_one_long_value_repeated_a_million_times_takes_no_memory(tmp_path):
    image = png(1) + bytes(2**20)
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(200_000, dtype=np.int32)), pa.array([image]))
    repeated = pa.table({"image": column, "label": [0] * 200_000})
    pq.write_table(repeated, tmp_path / "t.parquet", store_schema=False, dictionary_pagesize_limit=2**22)
    assert (tmp_path / "t.parquet").stat().st_size < 2**21  # 200 GiB, if every row had its own
    _, found = everything(asked(limit=3, channels=3, crop=8), tmp_path)
    assert len(found) == 3


@settings(max_examples=60)
@given(data=st.data())
def test_a_file_that_was_changed_anywhere_gives_its_images_or_one_sentence(data, tmp_path_factory):
    whole = io.BytesIO()
    pq.write_table(table(4), whole, row_group_size=2)
    content = bytearray(whole.getvalue())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place : place + data.draw(st.integers(1, 8))] = data.draw(st.binary(min_size=0, max_size=8))
    path = tmp_path_factory.mktemp("t") / "t.parquet"
    path.write_bytes(content)
    try:
        _, found = everything(asked(max_undecodable=1, crop=4), path.parent)
        assert set(found) <= set(range(4))
    except (BadInput, BadData) as error:
        assert "\n" not in str(error)


# --------------------------------------------------------------------------------------- web servers


def ranged(files, fails=lambda path, times: False):
    """A web server's answers to range requests; every request that `fails` is answered by 503."""
    asked = []

    def answer(path, headers):
        asked.append(path)
        if fails(path, len(asked)):
            return 503, {}, b""
        if path not in files:
            return 404, {}, b""
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", headers["Range"]).groups())
        part = files[path][first : last + 1]
        return 206, {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(files[path])}"}, part

    answer.asked = asked
    return answer


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(stages.remote, "PAUSE", 0.01)
    monkeypatch.setattr(stages.remote, "FIRST_PATIENCE", 0.3)
    monkeypatch.setattr(stages.remote, "PATIENCE", 0.5)


def test_shards_and_tables_of_a_web_server_are_those_on_disk_although_every_third_request_fails(
    serving, impatient, tmp_path
):
    write(tmp_path / "t.parquet")
    (tmp_path / "t.tar").write_bytes(
        tar_of(*((f"{i}.{end}", body) for i in range(9) for end, body in (("png", png(i)), ("cls", b"%d" % (i % 3)))))
    )
    files = {f"/d/{name}": (tmp_path / name).read_bytes() for name in ("t.parquet", "t.tar")}
    with serving(ranged(files, fails=lambda path, times: times % 3 == 0)) as url:
        for far, here in [
            (asked(f"{url}/d/t.parquet"), asked()),
            (shards(f"{url}/d/t.tar"), shards("t.tar")),
        ]:
            assert everything(far, tmp_path / "elsewhere")[1] == everything(here, tmp_path)[1]


def shards(pattern):
    return WebDataset(source="webdataset", shards={"train": pattern})


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (lambda path, headers: (404, {}, b""), r"t.tar cannot be fetched: there is no such file \(404 Not Found\)"),
        (lambda path, headers: (403, {}, b""), "the server denies access"),
        (lambda path, headers: b"whole", "the server gives no parts of files; fetch it yourself, and name its path"),
        (lambda path, headers: (206, {"Content-Range": "bytes 7-8/9"}, b"x"), "the server gives no parts of files"),
        (lambda path, headers: (206, {"Content-Range": "bytes 0-0/99999999999"}, b"x"), "cannot be read: "),
        (lambda path, headers: (500, {}, b""), "cannot be read: the server answers 500 Internal Server Error"),
    ],
)
def test_what_a_web_server_does_not_give_is_one_sentence(answer, sentence, serving, impatient, tmp_path):
    with serving(answer) as url, pytest.raises(BadInput, match=sentence):
        list_source(shards(f"{url}/t.tar"), tmp_path)


# ------------------------------------------------------------------------------- folders of a store


def test_an_image_folder_of_an_object_store_is_the_one_on_disk_in_one_listing_per_split(s3, s3_url, tmp_path):
    for split in ("train", "val"):
        for number, name in enumerate(NAMES):
            (tmp_path / split / name / "in & out %").mkdir(parents=True)
            for at in range(3):
                inside = tmp_path / split / name / ("in & out %" if at else ".")
                (inside / f"{at} #?.png").write_bytes(png(number * 3 + at))
    (tmp_path / "train/ant/notes.txt").write_text("no image")
    (tmp_path / "train/._x.png").write_text("clutter")
    bucket = s3_url.removeprefix("s3://")
    for file in (path for path in tmp_path.rglob("*") if path.is_file()):
        with s3.filesystem.open_output_stream(f"{bucket}/{file.relative_to(tmp_path)}") as out:
            out.write(file.read_bytes())
    here, far = (ImageFolder(source="image-folder", root=root, max_undecodable=0) for root in (".", s3_url))
    before = s3.requests()
    (listing, found), (same, disk) = everything(far, tmp_path / "elsewhere"), everything(here, tmp_path)
    assert found == disk and len(found) == 18
    assert (listing.classes, listing.suffix, listing.skipped) == (same.classes, same.suffix, same.skipped)
    assert {split: images.labels.tolist() for split, images in listing.items.items()} == {
        split: images.labels.tolist() for split, images in same.items.items()
    }
    assert s3.requests()["LIST"] - before.get("LIST", 0) == 2
    with pytest.raises(BadInput, match=rf"image folder {s3_url}/gone holds no class folders: expected .*/<class>/"):
        list_source(ImageFolder(source="image-folder", root=s3_url, splits={"train": "gone"}), tmp_path)
    write(tmp_path / "t.parquet")
    with s3.filesystem.open_output_stream(f"{bucket}/tables/a b.parquet") as out:
        out.write((tmp_path / "t.parquet").read_bytes())
    assert everything(asked(f"{s3_url}/tables/*.parquet"), tmp_path)[1] == everything(asked(), tmp_path)[1]


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("https://user:word@far.example/x", "a URL with credentials would be stored and shown"),
        ("https://far.example/x?token=1", "a URL with credentials would be stored and shown"),
    ],
)
def test_a_url_with_credentials_is_refused_for_every_source(url, sentence):
    for make in (lambda: asked(url), lambda: ImageFolder(source="image-folder", root=url)):
        with pytest.raises(ValueError, match=sentence):
            make()


def test_a_folder_of_a_web_server_is_refused(tmp_path):
    with pytest.raises(BadInput, match="a web server lists no files"):
        list_source(ImageFolder(source="image-folder", root="https://far.example/x"), tmp_path)
