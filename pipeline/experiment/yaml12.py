"""Reads YAML as plain values of YAML 1.2: mappings, lists, text, numbers, true, false and null.

PyYAML parses the syntax; this module constructs the values from its events. PyYAML's own constructor implements YAML
1.1 (`on` is true, 1e-3 is text, 010 is 8, 12:30 is 750), raises arbitrary exceptions on 2020-13-45 or 0b_, and expands
aliases without limit. ruamel.yaml, which implements 1.2, has the last two faults as well; and Ray depends on PyYAML.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any
from urllib.parse import unquote

import yaml

from stages.errors import BadInput, short, shown
from stages.limits import NESTING, TEXT, VALUES, WHOLE
from stages.recipes import refuse_secrets

MERGE = "<<"

LONGEST_REASON = 200
"""Most characters of a PyYAML message that an error repeats."""

DIGITS = 64
"""Most characters of a number: Python is slow on thousands of digits, and then refuses them."""

WORDS = {word: value for value, words in {
    None: ("", "~", "null", "Null", "NULL"),
    True: ("true", "True", "TRUE"),
    False: ("false", "False", "FALSE"),
}.items() for word in words}  # fmt: skip
NUMBERS: dict[re.Pattern[str], Callable[[str], float]] = {
    re.compile(r"[-+]?[0-9]+"): int,
    re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+"): lambda text: int(text, 0),
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"): float,
    re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"): lambda text: float(text.replace(".", "")),
}
"""The core schema (YAML 1.2.2, section 10.3.2)."""


def load(content: bytes) -> Any:
    """The one document of a YAML file, in UTF-8 or with the byte-order mark of UTF-16.

    Raises:
        BadInput: it is not YAML, contains more than plain values, or exceeds the limits. The message continues a
            sentence that begins with the file's name, and has line and column.
    """
    try:
        return _Document(content).value
    except yaml.reader.ReaderError as error:
        reason = "is not UTF-8 text" if error.encoding != "unicode" else f"holds the character U+{error.character:04X}"
        raise BadInput(f"{reason} (position {error.position + 1})") from error
    except yaml.MarkedYAMLError as error:
        reason = ", ".join(filter(None, (error.context, error.problem))).replace("\n", " ")
        raise _wrong(short(reason, LONGEST_REASON), error.problem_mark, "is not YAML") from error
    except BadInput:
        raise
    except (ValueError, OverflowError) as error:  # from int() and chr() in PyYAML
        raise BadInput("is not YAML: it has an invalid \\U escape or % directive") from error


def _wrong(what: str, mark: Any, so: str = "cannot be read") -> BadInput:
    place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    return BadInput(f"{so}{place}: {what}")


class _Document:
    """Values constructed from events. Each alias becomes a copy, so that no value is shared, or contains itself.

    Attributes:
        value: the value of the document; None if there is none.
    """

    def __init__(self, content: bytes) -> None:
        self.anchors = dict[str, tuple[Any, int]]()  # the value of each, and how many values it contains
        self.count, self.value = 0, None
        self.events: Iterator[yaml.Event] = yaml.parse(content, Loader=yaml.SafeLoader)
        for number, start in enumerate(e for e in self.events if isinstance(e, yaml.DocumentStartEvent)):
            if number:
                raise _wrong("it holds a second document: an experiment is one, without `---`", start.start_mark)
            self.value = self._value(next(self.events), 0)

    def _value(self, event: Any, depth: int) -> Any:
        """The value that begins with an event."""
        if isinstance(event, yaml.AliasEvent):
            return self._copy(event)
        before = self.count
        self._count(1, event)
        if event.tag is not None:
            raise _wrong(f"the tag {shown(event.tag)} has no meaning here, leave it out", event.start_mark)
        if depth > NESTING:
            raise _wrong(f"lists and mappings are nested more than {NESTING} deep", event.start_mark)
        match event:
            case yaml.ScalarEvent():
                value = _scalar(event)
            case yaml.SequenceStartEvent():
                value = [self._value(each, depth + 1) for each in self._until(yaml.SequenceEndEvent)]
            case _:
                value = self._mapping(depth + 1)
        if event.anchor is not None:
            self.anchors[event.anchor] = value, self.count - before
        return value

    def _until(self, end: type[yaml.Event]) -> Iterator[yaml.Event]:
        while not isinstance(event := next(self.events), end):
            yield event

    def _mapping(self, depth: int) -> dict[Any, Any]:
        own, merged = dict[Any, Any](), list[dict[Any, Any]]()
        for event in self._until(yaml.MappingEndEvent):
            mark = event.start_mark
            key = self._value(event, depth)
            if isinstance(key, bool) or not isinstance(key, str | int):
                raise _wrong("a key must be text, put it in quotes", mark)
            if key in own or (key == MERGE and merged):
                hint = ": merge a list, `<<: [*a, *b]`" if key == MERGE else ""
                raise _wrong(f"key {shown(key)} is given twice{hint}", mark)
            value = self._value(next(self.events), depth)
            if key == MERGE:
                merged = value if isinstance(value, list) and value else [value]
                if not all(isinstance(each, dict) for each in merged):
                    raise _wrong("`<<` merges a mapping or a list of mappings", mark)
            else:
                own[key] = value
        return {key: value for each in reversed(merged) for key, value in each.items()} | own

    def _copy(self, event: yaml.AliasEvent) -> Any:
        if event.anchor not in self.anchors:
            raise _wrong(f"*{short(str(event.anchor))} stands for nothing that ends before it", event.start_mark)
        value, size = self.anchors[event.anchor]
        self._count(size, event)
        return deepcopy(value)

    def _count(self, more: int, event: yaml.Event) -> None:
        self.count += more
        if self.count > VALUES:
            raise _wrong(f"it holds more than {VALUES:,} values, aliases written out", event.start_mark)


def _scalar(event: yaml.ScalarEvent) -> Any:
    text: str = event.value
    if not event.implicit[0]:  # in quotes
        return text
    if text in WORDS:
        return WORDS[text]
    for pattern, number in NUMBERS.items():
        if pattern.fullmatch(text):
            if len(text) > DIGITS:
                raise _wrong(f"the number {short(text)} has more than {DIGITS} digits", event.start_mark)
            return number(text)
    return text


def refuse_odd(value: Any, *way: Any) -> None:
    """Refuse values that no key accepts, in an experiment from a file or from a record.

    Args:
        value: a value of the experiment.
        way: the keys that lead to it.

    Raises:
        BadInput: a text is too long or has control characters or credentials, a number is too large, or the nesting is
            too deep; the message names the place.
    """
    if wrong := _odd(value) or (len(way) > NESTING and f"is nested more than {NESTING} deep") or None:
        raise BadInput(f"{'.'.join(short(str(key)) for key in way) or 'experiment'}: {wrong}")
    if isinstance(value, dict):
        for key, inner in value.items():
            refuse_odd(key, *way)
            refuse_odd(inner, *way, key)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            refuse_odd(inner, *way, number)


def _odd(value: Any) -> str | None:
    """The reason to refuse a value by itself, if any."""
    if isinstance(value, int) and abs(value) >= WHOLE:
        return "is a number of more than 63 bits"
    if not isinstance(value, str):
        return None
    if len(value) > TEXT:
        return f"must have at most {TEXT:,} characters, got {len(value):,}"
    if not value.isprintable() and any(unicodedata.category(letter) in ("Cc", "Cs") for letter in value):
        return f"must not hold control characters, got {shown(value)}"
    try:
        if "//" in unquote(value):  # under any key, since an error repeats the value
            refuse_secrets(value)
    except ValueError as error:
        return str(error)
    return None
