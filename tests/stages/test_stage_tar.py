"""Tars, walked member by member."""

import io
import os
import subprocess
import tarfile
import time

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.errors import BadData
from stages.tar import FILE, LARGEST_BEFORE, MOST_ZEROS, Member, walk

FORMATS = {"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT, "ustar": tarfile.USTAR_FORMAT}


def written(named, form=tarfile.PAX_FORMAT, **facts):
    """A tar of some files by Python's writer."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, content in named:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for key, value in facts.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def walked(tar):
    """Name and content of every file."""
    return [(m.name, tar[m.offset : m.offset + m.size]) for m in walk(io.BytesIO(tar)) if m.kind == FILE]


NAMED = [("a.png", b"x" * 700), ("a.cls", b"3"), ("b.png", b""), ("b.cls", b"4")]
TAR = written(NAMED)


# ------------------------------------------------------------------------------------------- what others write

# Without slashes at the ends, which Python's own reader takes off.
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=200).filter(
    lambda name: not name.startswith("/") and not name.endswith("/")
)


@given(st.sampled_from(["pax", "gnu"]), st.lists(st.tuples(names, st.binary(max_size=1100)), min_size=1, max_size=5))
def test_what_pythons_tarfile_writes_is_read_as_it_reads_it(form, named):
    tar = written(named, FORMATS[form], mtime=1.5)
    assert walked(tar) == named
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        assert [(m.name, m.offset_data, m.size) for m in opened] == [
            (m.name, m.offset, m.size) for m in walk(io.BytesIO(tar))
        ]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("length", [99, 100, 101, 155, 200, 5000])
def test_names_of_any_length_are_read_whole(form, length):
    name = "/".join(["d" * 50] * (length // 51)) + "/" + "n" * (length % 51) + ".png"
    if form == "ustar" and length > 200:
        return  # it has no room for more
    assert walked(written([(name, b"1"), ("short", b"2")], FORMATS[form])) == [(name, b"1"), ("short", b"2")]


@pytest.mark.parametrize("options", [[], ["--format=v7"], ["--format=oldgnu"], ["--format=posix"], ["-b", "2048"]])
def test_what_gnu_tar_writes_is_read_links_and_folders_by_their_kind(options, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"x" * 700)
    (tmp_path / "in" / "b.png").symlink_to("a.png")
    os.link(tmp_path / "in" / "a.png", tmp_path / "in" / "c.png")
    os.mkfifo(tmp_path / "in" / "d.png")
    line = ["tar", *options, "--sort=name", "-cf", "a.tar", "in"]
    subprocess.run(line, cwd=tmp_path, check=options != ["--format=v7"], capture_output=True)
    found = [(m.name, m.kind, m.size) for m in walk(io.BytesIO((tmp_path / "a.tar").read_bytes()))]
    expected = [
        ("in/", "folders", 0),
        ("in/a.png", FILE, 700),
        ("in/b.png", "links", 0),
        ("in/c.png", "links", 0),
        ("in/d.png", "devices", 0),
    ]
    assert found == [one for one in expected if options != ["--format=v7"] or one[1] != "devices"]


@pytest.mark.parametrize("options", ["--format=gnu", "--format=posix", "--format=posix --sparse-version=0.0"])
def test_a_sparse_file_of_gnu_tar_is_refused(options, tmp_path):
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(2**33)
    subprocess.run(["tar", *options.split(), "--sparse", "-cf", "a.tar", "a.png"], cwd=tmp_path, check=True)
    with pytest.raises(BadData, match=r"has a sparse member, .*a\.png: write the tar without --sparse"):
        list(walk(io.BytesIO((tmp_path / "a.tar").read_bytes())))


def test_attributes_that_a_mac_writes_before_a_file_are_passed_over():
    said = {"LIBARCHIVE.xattr.com.apple.provenance": "AQIA\nx=", "SCHILY.xattr.user.x": "y" * 70_000, "comment": ""}
    assert walked(written(NAMED, pax_headers=said)) == NAMED


def test_names_that_are_not_utf_8_are_read_with_their_bytes_spelt_out():
    for form in ("pax", "gnu"):
        tar = written([("caf\udce9.png", b"1")], FORMATS[form])
        assert walked(tar) == [("caf\\xe9.png", b"1")]


def test_tars_that_were_joined_are_read_to_the_last(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.tar").write_bytes(written([(f"{number}.png", b"x")]))
    assert walked(b"".join((tmp_path / f"{n}.tar").read_bytes() for n in (0, 1))) == [("0.png", b"x"), ("1.png", b"x")]
    subprocess.run(["tar", "-Af", "0.tar", "1.tar"], cwd=tmp_path, check=True)
    assert walked((tmp_path / "0.tar").read_bytes()) == [("0.png", b"x"), ("1.png", b"x")]


def test_webdatasets_writer_ends_its_tars(tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "%d.tar"), maxcount=2, verbose=0, encoder=False) as writer:
        for number in range(3):
            writer.write({"__key__": str(number), "png": b"x", "cls": b"1"})
    files = [walked((tmp_path / f"{n}.tar").read_bytes()) for n in (0, 1)]
    assert [[name for name, _ in found] for found in files] == [
        ["0.cls", "0.png", "1.cls", "1.png"],
        ["2.cls", "2.png"],
    ]


def test_an_empty_tar_has_no_member():
    assert list(walk(io.BytesIO(written([])))) == []


def test_sizes_beyond_eight_gib_are_read_by_both_their_spellings():
    class Endless(io.BytesIO):
        """A file with a member too large for a test: only its headers exist."""

        def seek(self, offset, whence=0):
            self.far = offset if whence == 0 else 0
            return 2**40 if whence == 2 else super().seek(min(offset, len(self.getvalue())))

        def read(self, size=-1):
            return bytes(512) if self.far > 2**33 else super().read(size)

    for form in ("pax", "gnu"):
        member = tarfile.TarInfo("a.bin")
        member.size = 2**33 + 5
        file = Endless(member.tobuf(FORMATS[form]))
        first = next(walk(file))
        assert (first.name, first.size) == ("a.bin", 2**33 + 5)


# ------------------------------------------------------------------------------------------------- damage


def header(tar, at, **fields):
    """A tar with a changed header, under a valid checksum."""
    places = {"size": (124, 12), "kind": (156, 1), "magic": (257, 8)}
    block = bytearray(tar[at : at + 512])
    for key, value in fields.items():
        first, length = places[key]
        block[first : first + length] = value.ljust(length, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return tar[:at] + bytes(block) + tar[at + 512 :]


def before(kind, content):
    """An extended header, which precedes a member."""
    member = tarfile.TarInfo("more")
    member.size, member.type = len(content), kind
    return member.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)


def record(key, value):
    text = f" {key}={value}\n"
    length = next(n for n in range(len(text), len(text) + 9) if len(f"{n}{text}") == n)
    return f"{length}{text}".encode()


SECOND = len(written(NAMED[:1]).rstrip(b"\0")) // 512 * 512 + 512
"""Where the header of the second file stands."""

DAMAGED = {
    "no byte": (b"", "is empty (0 bytes)"),
    "words": (b"no tar", "is no tar"),
    "a page": (b"<!DOCTYPE html><html>" + b" " * 900, "is an HTML page in place of the file"),
    "a pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
        "is a Git LFS pointer",
    ),
    "a server's refusal": (b'<?xml version="1.0"?>\n<Error/>', "is an XML document in place of the file"),
    "gzip": (b"\x1f\x8b\x08" + bytes(900), "is compressed with gzip: unpack it first (gunzip)"),
    "bzip2": (b"BZh9" + bytes(900), "is compressed with bzip2"),
    "xz": (b"\xfd7zXZ\0" + bytes(900), "is compressed with xz"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(900), "is compressed with zstd"),
    "zip": (b"PK\x03\x04" + bytes(900), "is a zip archive"),
    "a size beyond the end": (header(TAR, 0, size=b"77777777777"), "is cut inside a.png, of whose 8,589,934,591 bytes"),
    "a size in words": (header(TAR, 0, size=b"many"), "is no tar"),
    "a negative size": (
        header(TAR, SECOND, size=b"\xff" * 12),
        f"is damaged: at byte {SECOND:,}, a member",
    ),
    "a size of 2^95": (header(TAR, 0, size=b"\x80" + b"\xff" * 11), "is cut inside a.png, of whose"),
    "sparse by GNU": (header(TAR, 0, kind=b"S"), "has a sparse member, a.png: write the tar without --sparse"),
    "sparse by POSIX": (before(b"x", record("GNU.sparse.major", 1)) + TAR, "has a sparse member, a.png"),
    "a size that is no number": (before(b"x", record("size", "-5")) + TAR, "is damaged: a.png has no size that is"),
    "a size of many digits": (before(b"x", record("size", "9" * 5000)) + TAR, "is damaged: a.png has no size that is"),
    "a name for all": (
        before(b"g", record("path", "a.png")) + TAR,
        "is damaged: before byte 512, a header sets one path or",
    ),
    "records that are none": (before(b"x", b"1" * 600) + TAR, "is damaged: the extended header of the member"),
    "records of no length": (before(b"x", b"0 path=a\n") + TAR, "is damaged: the extended header of the member"),
    "a name of 2 MiB": (
        before(b"L", b"n" * 2 * LARGEST_BEFORE) + TAR,
        "is damaged: the name at byte 512 has",
    ),
    "a name before the end": (TAR[: 4 * 1024] + before(b"L", b"a.png"), "is cut"),
    "a name before the zeros": (before(b"L", b"a.png") + bytes(1024), "is damaged: at byte 1,024, a member's header"),
    "a header with a byte flipped": (
        TAR[:SECOND] + b"A" + TAR[SECOND + 1 :],
        f"is damaged: at byte {SECOND:,}, a m",
    ),
    "half a header": (TAR[: SECOND + 100], f"is cut: it ends inside a member's header, at byte {SECOND + 100:,}"),
    "half a file": (TAR[:800], "is cut inside a.png, of whose 700 bytes 288 are there"),
    "no end": (TAR[:SECOND], f"is cut: it ends after {SECOND:,} bytes, without the zeros that end a tar"),
    "words behind the end": (TAR + b"more", f"is cut: it ends inside a member's header, at byte {len(TAR) + 4:,}"),
    "zeros alone": (bytes(MOST_ZEROS + 1024), "is damaged: more than 67,108,864 bytes of zeros lie before byte"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_what_is_no_whole_tar_is_called_what_it_is(damage):
    tar, said = DAMAGED[damage]
    began = time.monotonic()
    with pytest.raises(BadData) as raised:
        list(walk(io.BytesIO(tar)))
    assert str(raised.value).startswith(said)
    assert time.monotonic() - began < 5


def test_a_zero_block_alone_ends_a_tar_and_what_follows_it_is_read():
    end = len(TAR.rstrip(b"\0")) // 512 * 512 + 512
    assert walked(TAR[:end] + bytes(512)) == NAMED
    assert walked(TAR[:SECOND] + bytes(512) + TAR[SECOND:]) == NAMED


def test_a_kind_that_only_some_program_knows_is_passed_over_with_its_content():
    assert [m.kind for m in walk(io.BytesIO(header(TAR, 0, kind=b"D")))] == ["members of a kind of their own"] + [
        FILE
    ] * 3


@settings(max_examples=400)
@given(st.data())
def test_a_change_anywhere_gives_the_same_files_or_bad_data(data):
    whole = data.draw(st.sampled_from([TAR, written(NAMED, mtime=1.5)]))  # without and with what stands before members
    tar, at = bytearray(whole), data.draw(st.integers(0, len(whole) - 1))
    match data.draw(st.sampled_from(["cut", "flip", "insert", "join", "drop"])):
        case "cut":
            del tar[at:]
        case "flip":
            tar[at] ^= data.draw(st.integers(1, 255))
        case "insert":
            tar[at:at] = data.draw(st.binary(min_size=1, max_size=40) | st.sampled_from([bytes(512), whole[:512]]))
        case "join":
            tar += whole[:at]
        case "drop":
            del tar[at : at + data.draw(st.integers(1, 511))]
    try:
        found = list(walk(io.BytesIO(bytes(tar))))
    except BadData as error:
        assert "\n" not in str(error)
        return
    there = [(m.name, m.size) for m in found if m.kind == FILE]
    known = [(name, len(content)) for name, content in NAMED]
    assert there[: len(known)] == known or set(known) <= set(there)
    assert all(m.offset + m.size <= len(tar) for m in found)


@given(st.binary(max_size=3000))
def test_bytes_that_are_no_tar_are_bad_data(content):
    if content.strip(b"\0"):
        with pytest.raises(BadData):
            list(walk(io.BytesIO(content)))


def test_a_member_says_where_it_is():
    assert next(walk(io.BytesIO(TAR))) == Member("a.png", FILE, 512, 700)
