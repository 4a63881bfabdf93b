"""Open a file of weights: identify its format by content, and locate its tensors before reading any.

For torch and safetensors files, names, types and shapes are read first, and each tensor on demand. Other formats are
refused with a message that names the format and the remedy.
"""

import codecs
import mmap
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO, FileIO
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from stages.errors import BadData
from stages.pretrained.pickled import SIZE, Name, Pickle, as_dict
from stages.sniff import sniffed

HEADER = 32 * 2**20
"""Most bytes of a safetensors header: a hundred thousand tensors."""

MAGIC = (b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", b"119547037146038801333356")
"""First bytes of files by torch before 1.6, at any pickle protocol."""

AGAIN = "it was not saved or fetched whole; fetch it again"
TORCH = "notbugs reads PyTorch's: convert it, and save a state dict with torch.save or safetensors"


REPEATED = 2**20
"""Most elements of a tensor that is larger than its storage (a number repeated by stride 0)."""


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor in a file.

    Attributes:
        shape: its shape.
        dtype: its type as in torch: ``float32``.
        read: reads it.
        odd: the reason why it cannot be read; empty if it can.
        place: equal for two tensors that share their bytes.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]
    odd: str = ""
    place: Any = None


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The contents of a file of weights: dicts, lists and `pickled.Thing`s, with tensors as `Stored`.

    Tensors can be read until the context ends.

    Raises:
        BadData: it has another format or is damaged; the message starts with a verb.
    """
    with path.open("rb") as file:
        head = file.read(4096)
        if not head:
            raise BadData(f"is empty: {AGAIN}")
        if head.startswith(b"PK\x03\x04"):
            yield _zip(path, _mapped(file))
        elif any(magic in head[:64] for magic in MAGIC):
            yield _legacy(_mapped(file))
        elif head[5:9] == b"\0\0\0{":
            with _safetensors(path, head) as found:
                yield found
        else:
            raise BadData(_foreign(head))


def _mapped(file: BinaryIO) -> mmap.mmap:
    """A memory map of the file. It is never closed explicitly: an exception may still refer to a tensor in it."""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


# -------------------------------------------------------------------------------------------- safetensors

SAFETENSORS = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"},
    **{f"{sign}{bits}": f"{kind}{bits}" for sign, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
}


@contextmanager
def _safetensors(path: Path, head: bytes) -> Iterator[dict[str, Stored]]:
    import safetensors

    (length,) = struct.unpack("<Q", head[:8])
    if length > HEADER:
        raise BadData(f"claims a safetensors header of {length:,} bytes, more than {HEADER:,}: {AGAIN}")
    try:
        opening = safetensors.safe_open(path, framework="pt")
    except (safetensors.SafetensorError, UnicodeError) as error:
        raise BadData(f"is cut short or damaged: its safetensors header does not fit its length; {AGAIN}") from error
    with opening as file:
        found = {}
        for name in file.keys():  # noqa: SIM118 - not a dict
            part = file.get_slice(name)
            kind = part.get_dtype()
            dtype = SAFETENSORS.get(kind, kind.lower())
            found[name] = Stored(tuple(part.get_shape()), dtype, partial(file.get_tensor, name))
        yield found


# -------------------------------------------------------------------------------------------------- torch


@dataclass(frozen=True)
class _Storage:
    """A run of numbers of one type in a file; `odd` is the reason if it has no bytes there."""

    key: str
    dtype: str
    count: int
    odd: str


class _Torch:
    """Tensors of a torch.save file: their description in the pickle, and how to read them.

    Args:
        content: the file.
        locate: a storage's key → offsets of its first byte and of its end.
    """

    def __init__(self, content: mmap.mmap, locate: Callable[[str], tuple[int, int]]) -> None:
        self.content = content
        self.locate = locate
        self.types: dict[str, str] = {}

    def pickle(self, stream: BytesIO) -> Pickle:
        return Pickle(stream, self._known(), self._stored)

    def _known(self) -> dict[str, Callable[..., Any]]:
        here = "torch._utils."
        return {
            "builtins.set": lambda items=(): list(items),
            "collections.OrderedDict": _ordered,
            "torch.Size": tuple,
            "torch.nn.parameter.Parameter": lambda data, *_: data,
            "torch._tensor._rebuild_from_type_v2": self._of_type,
            f"{here}_rebuild_parameter": lambda data, *_: data,
            f"{here}_rebuild_parameter_with_state": lambda data, *_: data,
            f"{here}_rebuild_tensor": self._tensor,
            f"{here}_rebuild_tensor_v2": self._tensor,
            f"{here}_rebuild_tensor_v3": lambda *said: self._tensor(*said[:6], *said[7:], dtype=_dtype(said[6])),
            f"{here}_rebuild_qtensor": lambda storage, _, shape, *__: _without(shape, storage.dtype, "quantised"),
            f"{here}_rebuild_sparse_tensor": lambda *_: _without((), "sparse", "sparse"),
            f"{here}_rebuild_device_tensor_from_cpu_tensor": lambda data, *_: data,
            f"{here}_rebuild_device_tensor_from_numpy": lambda _, dtype, *__: _without(
                (), _dtype(dtype), "on an XLA device"
            ),
            f"{here}_rebuild_meta_tensor_no_storage": lambda dtype, shape, *_: _without(shape, _dtype(dtype), META),
            f"{here}_rebuild_wrapper_subclass": lambda which, dtype, *_: _without((), _dtype(dtype), f"a {which.path}"),
        }

    def _of_type(self, make: Name, _: Any, arguments: Sequence[Any], *__: Any) -> Any:
        """A tensor of a subclass or with attributes, as a plain tensor."""
        known = self._known()
        del known["torch._tensor._rebuild_from_type_v2"]  # else it could nest without limit
        return known[make.path](*arguments)

    def _stored(self, said: Any) -> Any:
        """A storage from its persistent id: ``('storage', type, key, device, count)``.

        Before torch 1.6 the tuple ends with a view, which is None, and a network's class is stored with its source:
        ``('module', class, file, source)``.
        """
        if said[0] == "module":
            return said[1]
        _, kind, key, device, count, *view = said
        if not (isinstance(key, str) and isinstance(count, int) and count >= 0) or any(view):
            raise ValueError(said)
        self.types[key] = _dtype(kind)
        return _Storage(key, self.types[key], count, META if device == "meta" else "")

    def _tensor(
        self, storage: Any, offset: Any, shape: Any, stride: Any, *more: Any, dtype: str | None = None
    ) -> Stored:
        """A tensor from torch's arguments. Gradient and hooks do not affect its values; the conjugate bit does."""
        shape, stride, (offset,), dtype = _whole(shape), _whole(stride), _whole([offset]), dtype or storage.dtype
        odd = storage.odd or ("conjugate or negative" if len(more) > 2 and more[2] else "")
        if prod(shape) > max(storage.count, REPEATED):
            odd = "larger than its stored data"
        place = (storage.key, offset, shape, stride, dtype)
        return Stored(shape, dtype, lambda: self._read(storage, dtype, offset, shape, stride), odd, place)

    def _read(
        self, storage: _Storage, dtype: str, offset: int, shape: tuple[int, ...], stride: Sequence[int]
    ) -> Tensor:
        kind = _kind(dtype)
        if not prod(shape):
            return torch.empty(shape, dtype=kind)
        begin, last = self.locate(storage.key)
        end = begin + storage.count * _kind(storage.dtype).itemsize
        try:
            if end > last:
                raise ValueError(f"{end} > {last}")
            numbers = torch.frombuffer(self.content, dtype=kind, count=(end - begin) // kind.itemsize, offset=begin)
            return numbers.as_strided(shape, stride, offset).clone(memory_format=torch.contiguous_format)
        except (ValueError, RuntimeError) as error:
            raise BadData(f"is damaged: it has fewer bytes than its tensors; {AGAIN}") from error


META = "on the meta device"

TYPES = {
    **{"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Bool": "bool"},
    **{"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Untyped": "uint8"},
    **{"ComplexDouble": "complex128", "ComplexFloat": "complex64"},
    **{f"Q{kind}": f"q{kind.lower()}" for kind in ("Int8", "UInt8", "Int32", "UInt4x2", "UInt2x4")},
}
"""Prefix of a storage class → dtype: ``torch.FloatStorage``, ``torch.cuda.FloatStorage``."""


def _dtype(which: Name) -> str:
    """The dtype of ``torch.float32`` or ``torch.FloatStorage``."""
    name = which.path.rpartition(".")[2]
    return TYPES[name.removesuffix("Storage")] if name.endswith("Storage") else name


KINDS = {str(kind).removeprefix("torch."): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)}


def _kind(dtype: str) -> torch.dtype:
    if dtype not in KINDS:
        raise BadData(f"has tensors of type {dtype}, which is unknown here")
    return KINDS[dtype]


def _whole(numbers: Any) -> tuple[int, ...]:
    found = tuple(numbers)
    if len(found) > 64 or not all(isinstance(n, int) and 0 <= n < 2**48 for n in found):
        raise ValueError(numbers)
    return found


def _without(shape: Any, dtype: str, odd: str) -> Stored:
    def read() -> Tensor:
        raise BadData(f"has a tensor that is {odd}")

    return Stored(_whole(shape), dtype, read, odd)


def _ordered(pairs: Sequence[Any] = ()) -> dict[Any, Any]:
    """An OrderedDict as Python 2 pickles it: constructed from its items."""
    return as_dict([part for pair in pairs for part in pair])


class _Bounded(FileIO):
    """A zip file with a limit on single reads: `zipfile` reads the table of contents at once, and parsed it takes seven
    times its size."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > SIZE:
            raise BadData(f"has a table of contents of {size:,} bytes, more than {SIZE:,}")
        return super().read(-1 if size is None else size)


def _zip(path: Path, content: mmap.mmap) -> Any:
    try:
        with _Bounded(path) as file, zipfile.ZipFile(file) as archive:
            parts = {info.filename: info for info in archive.infolist()}
            root = next((name[: -len("data.pkl")] for name in parts if f"/{name}".endswith("/data.pkl")), None)
            if root is None or f"{root}constants.pkl" in parts:
                raise BadData(_zip_of(parts))
            if any(info.compress_type != zipfile.ZIP_STORED for info in parts.values()):
                raise BadData("is a torch file that was compressed afterwards: load it and torch.save it anew")
            if parts[f"{root}data.pkl"].file_size > SIZE:
                raise BadData(f"has a pickle of more than {SIZE:,} bytes: save its state dict alone")
            pickle = archive.read(f"{root}data.pkl")
            if f"{root}byteorder" in parts and parts[f"{root}byteorder"].file_size != len("little"):
                raise BadData("was saved on a big-endian machine: save it anew on another")
    except BadData:
        raise
    except (zipfile.BadZipFile, RuntimeError, ValueError, OSError, EOFError) as error:
        raise BadData(f"is cut short or damaged: its table of contents is not where it should be; {AGAIN}") from error

    def locate(key: str) -> tuple[int, int]:
        info = parts.get(f"{root}data/{key}")
        if info is None:
            raise BadData(f"is damaged: it lacks the part {root}data/{key}; {AGAIN}")
        if info.header_offset + 30 > len(content):
            raise BadData(f"is damaged: it has fewer bytes than its tensors; {AGAIN}")
        # The local header repeats the name and has its own padding.
        name, extra = struct.unpack_from("<HH", content, info.header_offset + 26)
        first = info.header_offset + 30 + name + extra
        return first, min(first + info.file_size, len(content))

    return _Torch(content, locate).pickle(BytesIO(pickle)).read()


def _legacy(content: mmap.mmap) -> Any:
    """Torch before 1.6: five pickles (magic number, version, machine, object, storage keys), then the bytes."""
    stream = BytesIO(content[:SIZE])
    spans: dict[str, tuple[int, int]] = {}
    torch_ = _Torch(content, lambda key: spans.get(key, (0, 0)))
    pickle = torch_.pickle(stream)
    _, _, machine, found, keys = (pickle.read() for _ in range(5))
    if not (isinstance(machine, dict) and machine.get("little_endian", True)):
        raise BadData("was saved on a big-endian machine: save it anew on another")
    at = stream.tell()
    for key in keys if isinstance(keys, list) else ():
        if at + 8 > len(content) or not isinstance(key, str) or key not in torch_.types:
            raise BadData(f"is damaged: it has fewer bytes than its tensors; {AGAIN}")
        (count,) = struct.unpack_from("<Q", content, at)
        spans[key] = at + 8, at + 8 + count * _kind(torch_.types[key]).itemsize
        at = spans[key][1]
    return found


# ------------------------------------------------------------------------------------------- other formats

STARTS = {
    b"PK": "is an empty or damaged zip archive: fetch it again",
    b"\x93NUMPY": f"is a NumPy array: {TORCH}",
    b"\x89HDF\r\n\x1a\n": f"is an HDF5 file, as Keras writes them: {TORCH}",
    b"GGUF": f"is a GGUF file: {TORCH}",
    b"\x80": "is a pickle that torch.save did not write: load it where it was made, and torch.save its state dict",
}
"""First bytes of a file → predicate of the message."""


def _foreign(head: bytes) -> str:
    """The predicate of the message about a file of another format, from its first bytes."""
    for start, said in STARTS.items():
        if head.startswith(start):
            return said
    if (said_of_all := sniffed(head)) is not None:
        return f"is {said_of_all}"
    if head[257:262] == b"ustar":
        if head.startswith((b"storages\0", b"tensors\0", b"pickle\0")):
            return "was written by PyTorch before 0.1.10: load it there, and torch.save its state dict with a later one"
        return "is a tar archive: unpack it, and name the file of weights that was in it"
    if head[4:8] == b"TFL3":
        return f"is a TensorFlow Lite file: {TORCH}"
    if head[:1] == b"\x08" and (b"pytorch" in head[:64] or b"onnx" in head[:128].lower()):
        return f"is an ONNX file, a graph and not a state dict: {TORCH}"
    return _text(head) or "is no file of weights that torch.save or safetensors wrote"


def _text(head: bytes) -> str | None:
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head).strip().lower()  # may end in mid-character
    except UnicodeError:
        return None
    if not text or any(character < " " and character not in "\t\n\r\f" for character in text):
        return None
    if text.startswith("{") and "weight_map" in text:
        return "is the index of weights that lie in several files: join them into one state dict"
    kind = "JSON" if text.startswith(("{", "[")) else "a text"
    return f"is {kind}, not a file of weights: name the file that torch.save or safetensors wrote"


def _zip_of(parts: Sequence[str] | dict[str, Any]) -> str:
    """The predicate of the message about a zip archive that holds no state dict."""
    names = list(parts)
    if any(name.endswith("constants.pkl") for name in names):
        return "is a TorchScript archive, which is code: save its weights alone: torch.save(model.state_dict(), …)"
    if any(name.endswith(("archive_format", "serialized_exported_program.json")) for name in names):
        return "is an exported program, which is code: save its weights alone: torch.save(model.state_dict(), …)"
    if any(name.endswith(".weights.h5") for name in names):
        return f"is a model of Keras: {TORCH}"
    if names and all(name.endswith(".npy") for name in names):
        return f"holds arrays of numpy: {TORCH}"
    some = ", ".join(map(os.fspath, names[:3])) + (", …" if len(names) > 3 else "")
    return f"is a zip archive ({some or 'empty'}): unpack it, and name the file of weights that was in it"
