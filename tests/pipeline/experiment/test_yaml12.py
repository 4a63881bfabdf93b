"""YAML 1.2 values of a file; anything that is no experiment is refused quickly, in one sentence."""

import json
import math
import os
import threading
import time

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from support import TINY, Peak

from pipeline.cli import main
from pipeline.experiment import spec, yaml12
from stages.errors import BadInput
from stages.limits import FILE, NESTING, TEXT, VALUES

# ------------------------------------------------------------------------------------ what it is read as


@pytest.mark.parametrize(("text", "value"), [
    ("on", "on"), ("yes", "yes"), ("Off", "Off"), ("true", True), ("FALSE", False), ("~", None), ("null", None),
    ("1e-3", 1e-3), ("1.e3", 1e3), (".5e1", 5.0), ("+1e3", 1e3), ("1.", 1.0), ("010", 10), ("0o10", 8), ("0x1F", 31),
    ("-7", -7), ("12:30", "12:30"), ("1_000", "1_000"), ("2020-01-01", "2020-01-01"), ("2020-13-45", "2020-13-45"),
    ("0b_", "0b_"), ("0x", "0x"), ("=", "="), (".inf", math.inf), ("-.INF", -math.inf), ('"1"', "1"),
    ("'true'", "true"), ("8/255", "8/255"), ("", None), ('""', ""), ("\U0001f600", "\U0001f600"),
])  # fmt: skip
def test_a_scalar_is_what_yaml_1_2_says(text, value):
    (found,) = yaml12.load(f"a: {text}".encode()).values()
    assert (type(found), found) == (type(value), value)


def test_not_a_number_is_read_as_such_for_the_key_to_refuse():
    assert math.isnan(yaml12.load(b"a: .nan")["a"])


MERGES = [
    ("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}", {"x": 1, "y": 3}),
    ("a: &a {x: 1, y: 2}\nb: {y: 3, <<: *a}", {"x": 1, "y": 3}),
    ("a: &a {x: 1}\nc: &c {x: 2, z: 0}\nb: {<<: [*a, *c]}", {"x": 1, "z": 0}),
    # The anchor stands deeper than where it is merged, and has merged itself.
    ("a: &a {x: 1}\nd: {e: {f: &f {<<: *a, x: 2, y: 3}}}\nb: {<<: *f, z: 1}", {"x": 2, "y": 3, "z": 1}),
    ("b: {<<: {x: 1}}", {"x": 1}),
]


@pytest.mark.parametrize(("text", "value"), MERGES)
def test_a_merge_takes_keys_that_are_not_beside_it(text, value):
    assert yaml12.load(text.encode())["b"] == value


def test_merged_keys_stand_in_the_order_that_pyyaml_gives_them():
    """The order of a class map numbers the classes: it is part of what was made."""
    for text, _ in MERGES:
        assert list(yaml12.load(text.encode())["b"]) == list(yaml.safe_load(text)["b"])


def test_what_an_alias_stands_for_is_a_copy():
    found = yaml12.load(b"a: &a [{x: 1}]\nb: *a\nc: *a")
    found["b"][0]["x"] = 2
    assert found == {"a": [{"x": 1}], "b": [{"x": 2}], "c": [{"x": 1}]}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_heeded(encoding):
    assert yaml12.load("name: é\r\nx: 1\r\n".encode(encoding)) == {"name": "é", "x": 1}


LETTERS = st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"], exclude_characters="\ufeff\ufffe\uffff")
PLAIN = st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | st.text(LETTERS, max_size=9)


@given(
    st.recursive(PLAIN, lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(LETTERS), each, max_size=3))
)
def test_json_is_read_as_json_is(value):
    assert yaml12.load(json.dumps({"a": value}, ensure_ascii=False).encode()) == {"a": value}


# ---------------------------------------------------------------------------------------- what is refused

BOMB = "\n".join(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 10) if i else 'x'}]" for i in range(12))
MERGE_BOMB = "\n".join(f"k{i}: &k{i} {{a{i}: 1, b{i}: 1{f', <<: *k{i - 1}' if i else ''}}}" for i in range(3000))

REFUSED = {
    "a value that names its type": (
        "a: !!int foo",
        "(line 1, column 4): the tag 'tag:yaml.org,2002:int' has no meaning",
    ),
    "a list said to be a map": ("a: !!map [1]", "the tag 'tag:yaml.org,2002:map' has no meaning"),
    "a time said to be one": ("a: !!timestamp foo", "the tag 'tag:yaml.org,2002:timestamp' has no meaning"),
    "Python": ("a: !!python/object/apply:os.system [touch PWNED]", "has no meaning"),
    "an escape beyond Unicode": ('a: "\\UFFFFFFFF"', "an invalid \\U escape or % directive"),
    "half a surrogate pair": ('name: "\\ud800"', "name: must not hold control characters, got '\\ud800'"),
    "an escape sequence": ('name: "\\e[31m"', "name: must not hold control characters, got '\\x1b[31m'"),
    "an escape sequence in a key": ('"\\e[31m": 1', "must not hold control characters"),
    "a null in a path": ('datasets: {a: {load: {root: "a\\0b"}}}', "datasets.a.load.root: must not hold control"),
    "a number of 5,000 digits": ("a: " + "9" * 5000, "has more than 64 digits"),
    "a hexadecimal number of 5,000 digits": ("a: 0x" + "f" * 5000, "has more than 64 digits"),
    "a number of 64 bits": (f"a: {2**63}", "a: is a number of more than 63 bits"),
    "a version of 5,000 digits": (f"%YAML 1.{'9' * 5000}\n---\na: 1", "an invalid \\U escape or % directive"),
    "lists in lists": ("[" * 1500 + "]" * 1500, f"nested more than {NESTING} deep"),
    "mappings in mappings": ("{a: " * 1500, f"nested more than {NESTING} deep"),
    "lines in lines": ("- " * 1500, f"nested more than {NESTING} deep"),
    "keys in keys": ("? " * 1500, f"nested more than {NESTING} deep"),
    "a list in itself": ("a: &a [*a]", "*a stands for nothing that ends before it"),
    "a mapping merged into itself": ("a: &a {<<: *a}", "*a stands for nothing that ends before it"),
    "an alias of nothing": ("a: *b", "*b stands for nothing that ends before it"),
    "aliases of aliases": (BOMB, f"more than {VALUES:,} values"),
    "merges of merges": (MERGE_BOMB, f"more than {VALUES:,} values"),
    "a merge of a number": ("a: {<<: 5}", "`<<` merges a mapping or a list of mappings"),
    "two merges": ("a: &a {x: 1}\nb: {<<: *a, <<: *a}", "key '<<' is given twice: merge a list"),
    "a key twice": ("a: 1\nb: 2\n'a': 3", "(line 3, column 1): key 'a' is given twice"),
    "a number twice": ("16: 1\n0x10: 2", "key 16 is given twice"),
    "a key that is a list": ("? [a]\n: 1", "a key must be text, put it in quotes"),
    "a key that is true": ("true: 1", "a key must be text, put it in quotes"),
    "a key that is nothing": ("a: {~: 1}", "a key must be text, put it in quotes"),
    "a name that is a number": ("name: x\ndatasets: {1: {}}", "datasets.1: a name must be text, put it in quotes"),
    "two documents": ("name: a\n---\nname: b", "(line 2, column 1): it holds a second document"),
    "a tab": ("a:\n\t- 1", "is not YAML (line 2, column 1)"),
    "a zero byte": ("a: \0", "holds the character U+0000 (position 4)"),
    "nothing": ("", "is empty"),
    "a comment": ("# nothing\n", "is empty"),
    "null": ("null", "is empty"),
    "a list": ("- 1", "an experiment file is a mapping with name, datasets, models and evaluations, got [1]"),
    "a word": ("x", "an experiment file is a mapping with name, datasets, models and evaluations, got 'x'"),
    "a long text": ("name: " + "x" * (TEXT + 1), f"name: must have at most {TEXT:,} characters, got {TEXT + 1:,}"),
    "a long name": ("name: " + "x" * 65, "name: a name holds letters, digits"),
    "a long key": (f"name: x\n{'x' * 1000}: 1", "unknown key, known keys: "),
    "a long value": (f"name: x\ndatasets: {{a: {{load: {{source: mnist, limit: [{'1, ' * 9000}1]}}}}}}", "twice"),
    "too long a file": ("# " + "x" * FILE, f"more than {FILE:,} bytes"),
    "not UTF-8": (b"name: \xff\xfe", "is not UTF-8 text (position 7)"),
    "UTF-16 without its mark": ("name: x".encode("utf-16-le"), "holds the character U+0000"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_experiment_is_refused_at_once_in_one_sentence(what, tmp_path):
    content, sentence = REFUSED[what]
    file = tmp_path / "x.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    began = time.process_time()
    with Peak() as peak:
        result = CliRunner().invoke(main, ["plan", str(file), "--store", str(tmp_path / "s")])
    assert time.process_time() - began < 2
    assert peak.bytes < 2**28
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert sentence in line and len(line) < 500
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(("path", "sentence"), [
    ("/dev/zero", f"has more than {FILE:,} bytes"),
    ("/dev/null", "is empty"),
    (".", "cannot be read: Is a directory"),
    ("", "is empty"),
    ("x" * 300, "cannot be read: File name too long"),
    ("none/x.yaml", "cannot be read: No such file or directory"),
])  # fmt: skip
def test_what_is_no_file_is_refused_at_once(path, sentence):
    result = CliRunner().invoke(main, ["plan", path])
    assert result.exit_code == 2
    assert sentence in result.stderr


def test_a_pipe_that_nobody_writes_to_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadInput, match="is empty"):
        spec.read(tmp_path / "pipe")


def test_a_pipe_that_somebody_writes_to_is_read_to_its_end():
    read_end, write_end = os.pipe()

    def write() -> None:
        time.sleep(0.2)
        os.write(write_end, yaml.safe_dump(TINY).encode())
        os.close(write_end)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert spec.read(f"/dev/fd/{read_end}").name == "tiny"
    finally:
        writer.join()
        os.close(read_end)


@pytest.mark.parametrize(("content", "sentence"), [
    ("", "the experiment on standard input is empty"),
    ("a: *b", "the experiment on standard input cannot be read (line 1, column 4)"),
    (b"\xff", "the experiment on standard input is not UTF-8 text"),
    ("#" * (FILE + 1), f"the experiment on standard input has more than {FILE:,} bytes"),
])  # fmt: skip
def test_standard_input_is_held_to_the_same(content, sentence):
    result = CliRunner().invoke(main, ["plan", "-"], input=content)
    assert result.exit_code == 2
    assert sentence in result.stderr


def test_standard_input_that_is_closed_is_one_sentence(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(BadInput, match="the experiment on standard input cannot be read: it is closed"):
        spec.read("-")


@pytest.mark.parametrize("odd", [
    {"a": "x" * (TEXT + 1)}, {"a": 2**63}, {"a\n": 1}, {"a": ["https://u:p@h/x"]}, {"https://u:p@h/x": 1},
    {"a": "s3://k%253As%2540b/x"},
])  # fmt: skip
def test_what_a_record_says_is_held_to_the_same(odd):
    with pytest.raises(BadInput) as refused:
        spec.parse({"name": "x", "datasets": odd})
    assert "u:p" not in str(refused.value)


def test_a_record_nested_without_end_is_refused():
    deep: list = []
    for _ in range(10_000):
        deep = [deep]
    with pytest.raises(BadInput, match="is nested more than"):
        spec.parse({"name": "x", "datasets": deep})
