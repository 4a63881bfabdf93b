"""Read a pickle as data: import nothing that it names, call nothing that it calls.

A pickle is a program. `pickletools` parses its opcodes without running them, and this module interprets them: numbers,
strings, lists and dicts stay as they are; an object becomes the name of its class, its items and its state. So a
checkpoint's tensors are found although the training script left other objects beside them (numpy scalars, arguments,
configurations), which `torch.load(weights_only=True)` refuses.
"""

import pickletools
import sys
import warnings
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from stages.errors import BadData

STEPS = 1_000_000
"""Most opcodes of a pickle. A network with its optimizer has tens of thousands; each takes a few µs and 100 bytes."""

SIZE = 32 * 2**20
"""Most bytes of a pickle; tensors are stored outside it."""

DATA = {
    "_codecs.encode", "_operator.getitem", "copyreg._reconstructor", "functools.partial",
    *(f"builtins.{name}" for name in ("bytearray", "complex", "frozenset", "object", "range", "set", "slice")),
}  # fmt: skip
"""Functions and classes that pickles of plain data call, besides everything in `MODULES`."""

MODULES = {
    *("collections", "datetime", "decimal", "fractions", "pathlib", "pathlib._local", "uuid", "zoneinfo"),
    *(f"numpy{part}" for part in ("", ".random._pickle", ".core.multiarray", ".core.numeric")),
    *(f"numpy._core.{part}" for part in ("multiarray", "numeric")),
    *("torch", "torch._tensor", "torch._utils", "torch.nn.parameter", "torch.serialization", "torch.storage"),
}  # fmt: skip
"""Modules of plain data. A call of anything else may be an attack: harmless here, but such a file is not trusted."""


@dataclass(frozen=True)
class Name:
    """A class or function that the pickle names: ``module.name``."""

    path: str


@dataclass(eq=False)
class Thing:
    """The object that a class or function would have made.

    Attributes:
        path: ``module.name`` of the class or function.
        items: its items, if it is a kind of dict.
        state: its attributes, usually a dict.
    """

    path: str
    items: dict[str | int, Any] = field(default_factory=dict)
    state: Any = None


class Pickle:
    """Reads consecutive pickles.

    Args:
        stream: the pickles.
        known: ``module.name`` of a class or function → the function called in its place.
        stored: maps a persistent id to an object.
    """

    def __init__(self, stream: BytesIO, known: Mapping[str, Callable[..., Any]], stored: Callable[[Any], Any]) -> None:
        self.stream = stream
        self.known = known
        self.stored = stored

    def read(self) -> Any:
        """Read the next pickle: dicts, lists, strings, numbers, `Thing`s, and the results of `known` and `stored`.

        Sets become lists. Dict entries are kept only if their key is a string or an integer.

        Raises:
            BadData: it is damaged or too long, or it calls code.
        """
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # by pickletools, if a name has a backslash
                return self._run()
        except BadData:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise BadData("is damaged: its pickle cannot be read; fetch it again") from error

    def _run(self) -> Any:
        for count, (step, given, _) in enumerate(pickletools.genops(self.stream)):
            if count == STEPS:
                raise BadData(f"has a pickle of more than {STEPS:,} steps: save its state dict alone")
            if step.name == "STOP":
                break
            self._take(step, given)
        return self.stack.pop()

    def _take(self, step: pickletools.OpcodeInfo, given: Any) -> None:
        stack = self.stack
        match step.name:
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[given] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[given])
            case "GLOBAL" | "STACK_GLOBAL" | "INST" | "OBJ" | "NEWOBJ" | "NEWOBJ_EX" | "REDUCE" | "BUILD":
                self._make(step.name, given)
            case "PERSID" | "BINPERSID":
                stack.append(self.stored(given if step.name == "PERSID" else stack.pop()))
            case "PROTO" | "FRAME":
                pass
            case _ if given is not None and not step.name.startswith("EXT"):  # a number or a string
                stack.append(given)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[step.name])
            case "MARK":
                self.below.append(stack)
                self.stack = []
            case "POP":
                stack.pop() if stack else self._since_mark()
            case "POP_MARK":
                self._since_mark()
            case "DUP":
                stack.append(stack[-1])
            case _:
                self._collect(step.name)

    def _since_mark(self) -> list[Any]:
        found, self.stack = self.stack, self.below.pop()
        return found

    def _pop(self, count: int) -> list[Any]:
        found = self.stack[-count:]
        del self.stack[-count:]
        return found

    def _collect(self, step: str) -> None:
        """Build lists, tuples, dicts and sets."""
        match step:
            case "EMPTY_LIST" | "EMPTY_SET":
                self.stack.append([])
            case "EMPTY_TUPLE":
                self.stack.append(())
            case "EMPTY_DICT":
                self.stack.append({})
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.stack.append(tuple(self._pop(int(step[-1]))))
            case "LIST" | "TUPLE" | "FROZENSET" | "DICT":
                found = self._since_mark()
                self.stack.append(as_dict(found) if step == "DICT" else tuple(found) if step == "TUPLE" else found)
            case "APPEND" | "APPENDS" | "ADDITEMS":
                found = self._pop(1) if step == "APPEND" else self._since_mark()
                if isinstance(self.stack[-1], list):
                    self.stack[-1].extend(found)
            case "SETITEM" | "SETITEMS":
                found = self._pop(2) if step == "SETITEM" else self._since_mark()
                holder = self.stack[-1]
                (holder.items if isinstance(holder, Thing) else holder).update(as_dict(found))
            case _:
                raise BadData(f"is damaged: its pickle has a step {step} that no checkpoint has; fetch it again")

    def _make(self, step: str, given: Any) -> None:
        """Resolve names of classes and functions, and build the objects that they would have made."""
        match step:
            case "GLOBAL":
                self.stack.append(_name(*given.split(" ", 1)))
            case "STACK_GLOBAL":
                self.stack.append(_name(*self._pop(2)))
            case "INST":
                self.stack.append(self._called(_name(*given.split(" ", 1)), self._since_mark()))
            case "OBJ":
                which, *arguments = self._since_mark()
                self.stack.append(self._called(which, arguments))
            case "NEWOBJ" | "NEWOBJ_EX":  # an object made without a call; its state usually follows
                which, arguments, *_ = self._pop(2 if step == "NEWOBJ" else 3)
                self.stack.append(self._made(which.path, arguments))
            case "REDUCE":
                which, arguments = self._pop(2)
                self.stack.append(self._called(which, arguments))
            case "BUILD":
                state = self.stack.pop()
                if isinstance(self.stack[-1], Thing):
                    self.stack[-1].state = state

    def _called(self, which: Any, arguments: Any) -> Any:
        if not isinstance(which, Name):
            raise BadData(f"would run code: it calls what another call gives. Nothing of it was run; {INSTEAD}")
        if which.path not in self.known and not _is_data(which.path):
            raise BadData(f"would run code: it calls {which.path}. Nothing of it was run; {INSTEAD}")
        return self._made(which.path, arguments)

    def _made(self, path: str, arguments: Any) -> Any:
        make = self.known.get(path)
        return Thing(path) if make is None else make(*arguments)


INSTEAD = "if you trust who made it, have them save its state dict alone: torch.save(model.state_dict(), …)"


def _is_data(path: str) -> bool:
    """Whether a call makes data. A member of an enumeration is pickled as a call of its class, but some classes of
    Python's own do more than hold data, such as ``subprocess.Popen``."""
    module, _, name = path.rpartition(".")
    return (
        path in DATA
        or module in MODULES
        or (name[:1].isupper() and module.partition(".")[0] not in sys.stdlib_module_names)
    )


def _name(module: str, name: str) -> Name:
    """A class or function by its name. Pickles up to protocol 2 use Python 2's names."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return Name(f"{module}.{name}")


def as_dict(found: Sequence[Any]) -> dict[str | int, Any]:
    """A dict from alternating keys and values."""
    pairs = zip(found[::2], found[1::2], strict=True)
    # Hash no other key: a million nested tuples would crash the process.
    return {key: value for key, value in pairs if isinstance(key, str) or (isinstance(key, int) and abs(key) < 2**63)}
