"""Files that hold no weights, damaged files and hostile files: each is identified, and none runs anything."""

import io
import os
import pickle
import pickletools
import re
import resource
import struct
import subprocess
import sys
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.errors import BadData, BadInput
from stages.pretrained.checkpoint import import_pretrained
from stages.pretrained.formats import Stored, opened
from stages.recipes import Pretrained

STATE = {"0.weight": torch.arange(6.0).reshape(2, 3), "0.bias": torch.zeros(2)}


def saved(held, **form):
    out = io.BytesIO()
    torch.save(held, out, **form)
    return out.getvalue()


FORMS = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}, "protocol 4": {"pickle_protocol": 4}}


def refused(content, folder):
    """The message about a file with this content, as a run prints it."""
    (folder / "w.pt").write_bytes(content)
    with pytest.raises(BadInput) as caught:
        import_pretrained(Pretrained(arch="small_cnn", weights="w.pt", shape=[1, 8, 8]), folder, folder)
    sentence = str(caught.value)
    assert sentence.startswith("checkpoint w.pt ")
    assert "\n" not in sentence and "weights_only" not in sentence
    assert not re.search(r"\wError|Exception", sentence), "no name of an exception"
    return sentence.removeprefix("checkpoint w.pt ")


# --------------------------------------------------------------------------------------- what else there is


def archive(**members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return out.getvalue()


def tape(*names):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        for name in names:
            file.addfile(tarfile.TarInfo(name))
    return out.getvalue()


def array(save, *values):
    out = io.BytesIO()
    save(out, *values)
    return out.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"

SCRIPT = ("m/data.pkl", "m/code/__torch__/net.py", "m/constants.pkl", "m/version")

ELSE = {
    "empty": (b"", "is empty"),
    "zeros": (bytes(40), "is no file of weights that torch.save or safetensors wrote"),
    "noise": (bytes(range(255, 127, -1)), "is no file of weights that torch.save or safetensors wrote"),
    "Git LFS": (LFS, "is a Git LFS pointer in place of the file: fetch the file with `git lfs pull`"),
    "HTML": (b"\n\n<!DOCTYPE html>\n<html><head>", "is an HTML page in place of the file"),
    "HTML without a type": (b"<html>not found</html>", "is an HTML page in place of the file"),
    "HTML with a mark": (b"\xef\xbb\xbf<HTML lang='en'>", "is an HTML page in place of the file"),
    "XML": (b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code>", "is an XML document in place of the file"),
    "JSON": (b'{"error": "Not found"}', "is JSON, not a file of weights"),
    "JSON, longer": (b'{"a": "\xc3\xa9' + b"x" * 4086 + "é".encode() * 9, "is JSON, not a file of weights"),
    "index": (b'{"metadata": {}, "weight_map": {"a": "b"}}', "is the index of weights that lie in several files"),
    "text": ("epoch: 3, größer".encode(), "is a text, not a file of weights"),
    "gzip": (b"\x1f\x8b\x08\0\0\0\0\0", "is compressed with gzip: unpack it first"),
    "bzip2": (b"BZh91AY&SY", "is compressed with bzip2: unpack it first"),
    "xz": (b"\xfd7zXZ\0\0", "is compressed with xz: unpack it first"),
    "zstd": (b"\x28\xb5\x2f\xfd\x24", "is compressed with zstd: unpack it first"),
    "tar": (tape("weights/model.pth"), "is a tar archive: unpack it"),
    "PyTorch before 0.1.10": (tape("storages", "tensors", "pickle"), "was written by PyTorch before 0.1.10"),
    "zip": (
        archive(**{"a.txt": "", "b/model.pth": "", "c": "", "d": ""}),
        "is a zip archive (a.txt, b/model.pth, c, …)",
    ),
    "empty zip": (archive(), "is an empty or damaged zip archive"),
    "npy": (array(np.save, np.ones(3)), "is a NumPy array"),
    "npz": (array(np.savez, np.ones(3)), "holds arrays of numpy"),
    "HDF5": (b"\x89HDF\r\n\x1a\n\0", "is an HDF5 file, as Keras writes them"),
    "Keras": (archive(**{"metadata.json": "", "config.json": "", "model.weights.h5": ""}), "is a model of Keras"),
    "ONNX": (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0", "is an ONNX file, a graph and not a state dict"),
    "TensorFlow Lite": (b"\x1c\0\0\0TFL3", "is a TensorFlow Lite file"),
    "GGUF": (b"GGUF\3\0\0\0", "is a GGUF file"),
    "TorchScript": (
        archive(**dict.fromkeys(SCRIPT, "")),
        "is a TorchScript archive, which is code: save its weights alone: torch.save(model.state",
    ),
    "exported": (archive(**{"m/archive_format": "pt2", "m/version": ""}), "is an exported program, which is code"),
    "big endian": (archive(**{"a/data.pkl": "", "a/byteorder": "big"}), "was saved on a big-endian machine"),
    "pickle": (pickle.dumps(STATE["0.bias"].numpy()), "is a pickle that torch.save did not write"),
}


@pytest.mark.parametrize("kind", ELSE)
def test_what_is_no_file_of_weights_is_called_what_it_is(kind, tmp_path):
    content, sentence = ELSE[kind]
    assert refused(content, tmp_path).startswith(sentence)


@pytest.mark.parametrize("form", [*FORMS, "safetensors"])
def test_a_file_that_is_cut_short_is_refused(form, tmp_path):
    whole = safetensors.torch.save(STATE) if form == "safetensors" else saved(STATE, **FORMS[form])
    for end in range(0, len(whole), 5):
        (tmp_path / "w.pt").write_bytes(whole[:end])
        with pytest.raises(BadData, match=r"^is [^\n]+$"), opened(tmp_path / "w.pt") as found:
            flat(found)


def flat(found):
    return {name: part.read() for name, part in found.items() if isinstance(part, Stored) and not part.odd}


# --------------------------------------------------------------------------------------------------- code

CANARY = "NOTBUGS_CANARY"


class Calls:
    """An object that calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


ATTACKS = {
    "os.mkdir": lambda place: Calls(os.mkdir, place),
    "os.system": lambda place: Calls(os.system, f"mkdir {place}"),
    "exec": lambda place: Calls(exec, f"import os; os.mkdir({place!r})"),
    "eval": lambda place: Calls(eval, f"__import__('os').mkdir({place!r})"),
    "subprocess": lambda place: Calls(subprocess.check_call, ["mkdir", place]),
    "pathlib": lambda place: Calls(Path.mkdir, Path(place)),
    "popen": lambda place: Calls(subprocess.Popen, ["mkdir", place]),
    "what a call gives": lambda place: Calls(partial(os.mkdir, place)),
    "import": lambda place: Calls(__import__, "antigravity"),
    "torch.hub": lambda place: Calls(torch.hub.load, place, "x"),
    "numpy.load": lambda place: Calls(np.testing.assert_equal, 1, 2),
}


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside weights"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_pickle_with_code_is_refused_and_not_run(attack, form, beside, tmp_path):
    place = tmp_path / "owned"
    hostile = ATTACKS[attack](str(place))
    sentence = refused(saved({"state_dict": STATE, "x": hostile} if beside else hostile, **FORMS[form]), tmp_path)
    assert sentence.startswith("would run code: it calls ")
    assert "Nothing of it was run" in sentence and "torch.save(model.state_dict(), …)" in sentence
    assert not place.exists() and "antigravity" not in sys.modules


def test_classes_that_a_pickle_names_are_not_imported(make_module, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    name = make_module("""
        from pathlib import Path
        if not Path(__file__).with_name("made").exists():
            Path(__file__).with_name("ran").write_text("")
        class Config:
            def __new__(cls):
                Path(__file__).with_name("ran").write_text("")
                return super().__new__(cls)
            def __setstate__(self, state):
                Path(__file__).with_name("ran").write_text("")
    """)
    (tmp_path / "made").write_text("")
    config = __import__(name).Config()
    content = saved({"model": STATE, "config": config, "class": type(config)})
    (tmp_path / "ran").unlink()
    (tmp_path / "made").unlink()
    for loaded in (False, True):
        if not loaded:
            del sys.modules[name]
        (tmp_path / "w.pt").write_bytes(content)
        with opened(tmp_path / "w.pt") as found:
            assert found["model"]["0.weight"].read().equal(STATE["0.weight"])
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------- memory and time


def pickled(program):
    """A torch file with this pickle."""
    return archive(**{"a/data.pkl": b"\x80\x02" + program + b".", "a/version": "3", "a/byteorder": "little"})


def claiming(header):
    text = header if isinstance(header, bytes) else str(header).replace("'", '"').encode()
    return struct.pack("<Q", len(text)) + text


def bomb():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", zipfile.ZipFile(io.BytesIO(saved(STATE))).read("archive/data.pkl"))
        with file.open("a/data/0", "w", force_zip64=True) as part:
            for _ in range(256):
                part.write(bytes(2**20))
    return out.getvalue()


def crowd():
    """A zip file whose end claims a table of contents of 40 MB."""
    whole = archive(a="") + bytes(40_000_000)
    at = whole.rindex(b"PK\5\6")
    return whole + whole[at : at + 12] + struct.pack("<LLH", 40_000_000, at + 22, 0)


TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpu"
HOSTILE = {
    "a header of terabytes": (struct.pack("<Q", 2**39) + b'{"a":', "claims a safetensors header of 549,755,813,888"),
    "a header longer than the file": (struct.pack("<Q", 2**20) + b'{"a":', "is cut short or damaged"),
    "a tensor of terabytes": (
        claiming({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}), "is cut short or damaged",
    ),
    "tensors that overlap": (
        claiming({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}) + bytes(4),
        "is cut short or damaged",
    ),
    "a header that is no JSON": (claiming(b"{{{{"), "is cut short or damaged"),
    "a header of many dicts": (claiming(b'{"a":' * 10**6), "is cut short or damaged"),
    "a zip of very many files": (crowd(), "has a table of contents of 40,000,000 bytes"),
    "a zip bomb": (bomb(), "is a torch file that was compressed afterwards"),
    "a place in memory far away": (pickled(b"]r\xff\xff\xff\xff"), "holds no state dict"),
    "a number of a gigabyte": (pickled(b"\x8b\0\0\0\x40abc"), "is damaged"),
    "a text of gigabytes": (pickled(b"X\xff\xff\xff\xffabc"), "is damaged"),
    "bytes of terabytes": (pickled(b"\x8e" + struct.pack("<Q", 2**42) + b"abc"), "is damaged"),
    "a number of many digits": (pickled(b"I" + b"9" * 10**5 + b"\n"), "is damaged"),
    "lists in lists": (pickled(b"]" + b"]a" * 0 + b"(" * 10**5 + b"l" * 10**5), "holds no state dict"),
    "tuples in tuples as a key": (pickled(b"}(" + b")" + b"\x85" * 200_000 + b"Nu"), "holds no state dict"),
    "dicts in dicts": (pickled(b"}X\1\0\0\0a" * 10**5 + b"}" + b"s" * 10**5), "holds no state dict"),
    "a list in itself": (pickled(b"]q\0h\0a"), "holds no state dict"),
    "lists of lists, each twice": (pickled(b"]q\0" + b"](h\0h\0eq\0" * 60), "holds no state dict"),
    "too many steps": (pickled(b"N0" * 600_000 + b"N"), "has a pickle of more than 1,000,000 steps"),
    "bytearray": (pickled(b"cbuiltins\nbytearray\nJ\0\0\0\x7f\x85R"), "holds no state dict"),
    "a storage": (pickled(b"ctorch.storage\nUntypedStorage\nJ\0\0\0\x7f\x85R"), "holds no state dict"),
    "an empty stack": (pickled(b"00"), "is damaged"),
    "a call of a number": (pickled(b"K\1)R"), "would run code"),
    "a class that is a number": (pickled(b"K\1)\x81"), "is damaged"),
    "an extension": (pickled(b"\x82\1"), "is damaged: its pickle has a step EXT1"),
    "storage without bytes": (
        pickled(b"}(X\1\0\0\0a" + TENSOR + b"J\xff\xff\xff\x7ftQK\0J\xff\xff\xff\x7f\x85K\1\x85\x89NtRu"),
        "does not fit arch small_cnn",
    ),
    "a tensor that begins nowhere": (
        pickled(b"}(X\1\0\0\0a" + TENSOR + b"K\1tQ}K\1\x85K\1\x85\x89NtRu"), "is damaged: its pickle cannot be read",
    ),
    "a tensor of another world": (pickled(b"}(X\1\0\0\0a" + TENSOR + b"K\1tQK\0]K\1\x85\x89NtRu"), "does not fit"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_claims_much_takes_little(kind, tmp_path):
    content, sentence = HOSTILE[kind]
    before = resource.getrusage(resource.RUSAGE_SELF)
    assert refused(content, tmp_path).startswith(sentence)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_maxrss - before.ru_maxrss < 500 * 2**10  # KiB
    assert after.ru_utime - before.ru_utime < 15


def test_an_ordered_dict_of_python_2_is_read(tmp_path):
    pairs = b"ccollections\nOrderedDict\n](]" + b"(U\1aK\1e](U\1bK\2e" + b"e\x85R"
    (tmp_path / "w.pt").write_bytes(pickled(pairs))
    with opened(tmp_path / "w.pt") as found:
        assert found == {"a": 1, "b": 2}


def test_what_was_saved_on_another_device_is_read(tmp_path):
    with zipfile.ZipFile(io.BytesIO(saved(STATE))) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    there = parts["archive/data.pkl"].replace(b"X\3\0\0\0cpu", b"X\6\0\0\0cuda:7")
    assert there != parts["archive/data.pkl"]
    (tmp_path / "w.pt").write_bytes(archive(**parts | {"archive/data.pkl": there}))
    with opened(tmp_path / "w.pt") as found:
        assert all(found[name].read().equal(value) for name, value in STATE.items())


def test_a_tensor_outside_of_its_bytes_is_refused_when_it_is_read(tmp_path):
    content = saved(STATE)
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        parts = {name.replace("archive", "a"): file.read(name) for name in file.namelist()}
    for change in ({"a/data/0": b"1234"}, {"a/data/0": None}):
        held = {name: data for name, data in (parts | change).items() if data is not None}
        (tmp_path / "w.pt").write_bytes(archive(**held))
        with opened(tmp_path / "w.pt") as found, pytest.raises(BadData, match="is damaged: it "):
            found["0.weight"].read()


@pytest.mark.parametrize("form", FORMS)
def test_a_changed_byte_is_refused_or_read_as_torch_reads_it(form, tmp_path_factory):
    whole, file = saved(STATE, **FORMS[form]), tmp_path_factory.mktemp("changed") / "w.pt"

    @settings(max_examples=150)
    @given(st.integers(0, len(whole) - 1), st.integers(1, 255))
    def changed(at, by):
        content = bytearray(whole)
        content[at] ^= by
        file.write_bytes(content)
        try:
            with opened(file) as found:
                if isinstance(found, dict):
                    flat(found)
        except BadData as error:
            assert "\n" not in str(error)

    changed()


@given(st.binary(max_size=60))
def test_any_bytes_as_a_pickle_are_refused_or_read(program):
    from stages.pretrained.pickled import Pickle

    try:
        Pickle(io.BytesIO(program), {}, lambda said: said).read()
    except BadData as error:
        assert "\n" not in str(error)


@given(st.lists(st.sampled_from([op.code for op in pickletools.opcodes if op.arg is None]), max_size=30))
def test_any_steps_of_a_pickle_are_refused_or_taken(steps):
    from stages.pretrained.pickled import Pickle

    try:
        Pickle(io.BytesIO("".join(steps).encode("latin-1")), {}, lambda said: said).read()
    except BadData as error:
        assert "\n" not in str(error)
