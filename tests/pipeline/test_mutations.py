"""Mutated experiment files, as a user might mistype them: each is planned, or refused in one sentence."""

import copy
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import TINY, Peak

from pipeline.cli import main
from pipeline.experiment import yaml12

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))

KINDS: dict[str, Any] = {
    "name": "kinds",
    "datasets": {
        "clean": {"load": {"source": "sklearn-digits", "shard_size": 64, "limit": 192}},
        "made": {"load": {"source": "synthetic", "images": {"train": 40, "test": 20}, "classes": 3, "size": 16}},
        "tars": {"load": {"source": "webdataset", "shards": {"train": "a-{0..3}.tar"}, "classes": ["a", "b"]}},
        "folder": {"load": {"source": "image-folder", "root": "x", "classes": {"a": ["0-3"], "b": [4]}, "crop": 8}},
        "rand": {"attack": {"images": "made", "model": "m", "norm": "linf", "eps": "8/255"}, "relabel": "random"},
        "all": {
            "attack": {"images": "made", "model": "m", "method": "universal", "fit_shards": 2},
            "relabel": {"rule": "map", "map": {0: 1, 1: 2, 2: 0}},
        },
        "turned": {
            "attack": {"images": "made", "model": "m", "method": "spatial", "spatial": {"grid": [1, 3, 5]}},
            "relabel": ["next", "other"],
        },
        "robust": {"invert": {"images": "made", "model": "m", "steps": 3, "start": "noise"}},
        "top": {"select": {"images": "rand", "keep": "top", "share": 0.5}},
    },
    "models": {
        "m": {"train": {"on": "made", "arch": "small_cnn", "batch_size": 8, "adversarial": {"eps": 1, "steps": 2}}},
        "learner": {"train": {"on": "rand", "arch": "small_cnn", "batch_size": 8, "lr": [0.1, 0.2]}},
        "probe": {"train": {"on": "rand", "probe": "m", "batch_size": 8, "schedule": "steps", "milestones": [3, 6]}},
        "brought": {
            "pretrained": {"arch": "resnet18", "weights": "w.pt", "shape": [3, 16, 16], "mean": [0.5, 0.5, 0.5]}
        },
    },
    "evaluations": {
        "accuracy": {
            "models": ["m", "learner"],
            "on": "made",
            "attacks": [{"eps": [0.5, 1], "surrogate": ["m"], "steps": 2}, {"method": "apgd", "target_rule": "next"}],
            "spatial": [{"search": "random", "tries": 2}],
            "agreement": "next",
        },
        "use": {"usefulness": {"models": ["m"], "on": "made", "eps": 0, "limit": 5}},
        "leakage": {"leakage": "rand", "learner": "learner", "robust": "m", "probe": {"epochs": 2}},
    },
    "seeds": [0, 1],
}
"""Every key that has another kind of value. No tars, folder and weights are there: what is planned leaves them out."""

HERE = ("tars", "folder", "brought")
THERE = {k: {n: e for n, e in v.items() if n not in HERE} if isinstance(v, dict) else v for k, v in KINDS.items()}

BASES = [*(yaml.safe_dump(e, sort_keys=False) for e in (TINY, THERE, KINDS)), *(c.read_text() for c in CONFIGS)]

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 10**6, 10**9, 10**18, 2**63, 10**30, -(10**30), 0.5, 1e-4, 1e-30, 1e30, 1e308,
    -0.0, float("nan"), float("inf"), "", " ", "abc", "../../x", "/", ".", "a/b", "a\nb", "\x1b[31m", "\x00", "x" * 300,
    "x" * 5000, "é", "clean", "m", "standard", "random", "map", "none", "leakage", "linf", "small_cnn", "8/255", "1/0",
    "no:such", "s3://key:secret@b/x", "https://h/x?token=a", "{0..999999999}", "{a,b}" * 40, "{", "[/x]", "@", "a@b=1",
    "2020-13-45", "<<", [], [[]], [1, 1], [0, 1], ["m", "m"], ["clean"], [None], [True], list(range(300)), [[[[]]]],
    {}, {"a": 1}, {"a": {"a": {}}}, {1: 2}, {"rule": "map"}, {"seeds": [0]}, {"eps": [1, 2]}, {"source": "synthetic"},
]  # fmt: skip
"""What stands where something else should."""

TEXTS = [
    "\t", "  ", "\n", ":", "- ", "? ", "{", "}", "[", "]", ",", "'", '"', "#", "|", ">", "%", "\n---\n", "\n...\n",
    "&a ", "*a", "*train", "<<: *train", "<<: 5", "<<: [*a, *a]", "&a [*a]", "%YAML 2.0\n---\n", "!x ", "!!int foo",
    "!!map [1]", "!!timestamp foo", "!!python/name:os.system ", "\x00", "\x07", "\x85", "\ufeff", "\ud800",
    "\U0001f600", '"\\UFFFFFFFF"', "2020-13-45", "0b_", "0x", "1_0", "12:30", "9" * 5000, "1e999", ".inf", ".nan",
    "[" * 100, "- " * 100, "{a: " * 100, "seeds: abc", "seeds: 5", "seeds: [0, 0]", "on: ../../x", "\nname: x",
    "x: &x [a, a]\ny: [*x, *x]\n",
    "".join(f"\nk{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 9) if i else 'x'}]" for i in range(9)),
]  # fmt: skip
"""What slips into a text."""


def places(found: Any) -> list[tuple[Any, Any]]:
    """Every container of an experiment, with each of its keys or indices."""
    inner = list(found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ())
    return [(found, key) for key, _ in inner] + [place for _, value in inner for place in places(value)]


def of_value(text: str, how: str, where: int, what: int) -> str:
    """The text of an experiment with one value changed; the text itself if it is no longer an experiment."""
    try:
        found = yaml12.load(text.encode())
    except ValueError:
        return text
    if not (every := places(found)):
        return text
    (inside, key), (other, another) = every[where % len(every)], every[what % len(every)]
    match how:
        case "replace":
            inside[key] = copy.deepcopy(VALUES[what % len(VALUES)])
        case "delete":
            del inside[key]
        case "add" if isinstance(inside, dict):
            inside[str(VALUES[what % len(VALUES)])] = copy.deepcopy(inside[key])
        case "wrap":
            inside[key] = [inside[key], copy.deepcopy(VALUES[what % len(VALUES)])]
        case "copy":
            inside[key] = copy.deepcopy(other[another])
    try:
        return yaml.safe_dump(found, sort_keys=False, allow_unicode=True)
    except yaml.YAMLError:
        return text


def of_text(text: str, how: str, where: int, what: int) -> str:
    """A text with one part changed."""
    lines, slip, at = text.split("\n"), TEXTS[what % len(TEXTS)], where % (len(text) + 1)
    words = list(re.finditer(r"[\w./-]+", text))
    match how:
        case "insert":
            return text[:at] + slip + text[at:]
        case "word" if words:
            word = words[where % len(words)]
            return text[: word.start()] + slip + text[word.end() :]
        case "cut":
            return text[:at]
        case "drop":
            del lines[where % len(lines)]
        case "twice":
            lines.insert(what % len(lines), lines[where % len(lines)])
        case "shift":
            lines[where % len(lines)] = " " * (what % 5) + lines[where % len(lines)]
    return "\n".join(lines)


CHANGES = {
    **dict.fromkeys(("replace", "delete", "add", "wrap", "copy"), of_value),
    **dict.fromkeys(("insert", "word", "cut", "drop", "twice", "shift"), of_text),
}
ENCODINGS = (*["utf-8"] * 20, "utf-8-sig", "utf-16", "utf-16-le", "latin-1", "crlf")
# Most should get past YAML, and some to the networks and images.
HOW = [*["replace"] * 6, *["copy"] * 2, *sorted(CHANGES)]

MUTATIONS = st.tuples(
    st.sampled_from([*BASES[:2] * 8, *BASES[2:]]),
    st.lists(st.tuples(st.sampled_from(HOW), st.integers(0, 9999), st.integers(0, 9999)), min_size=1, max_size=3),
    st.sampled_from(ENCODINGS),
)


def mutated(base: str, changes: list[tuple[str, int, int]], encoding: str) -> bytes:
    for how, where, what in changes:
        base = CHANGES[how](base, how, where, what)
    if encoding == "crlf":
        base, encoding = base.replace("\n", "\r\n"), "utf-8"
    return base.encode(encoding, "replace" if encoding == "latin-1" else "surrogatepass")


def is_planned_or_refused_in_a_sentence(content: bytes, file: Path) -> None:
    file.write_bytes(content)
    asked = ["plan", str(file), "--store", str(file.parent / "none"), "--data", str(file.parent / "empty")]
    began = time.process_time()  # other jobs share the machine
    with Peak() as peak:
        result = CliRunner().invoke(main, asked)
    took = time.process_time() - began
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (0, 2), result.stderr
    if result.exit_code == 2:
        (line,) = result.stderr.splitlines()
        assert line.startswith("Error: ") and len(line) < 1000, line
        said = line.removeprefix("Error: ")
        assert not re.search(r"\b\w+(Error|Exception|Warning)\b|Traceback|pydantic|[\x00-\x1f\x7f]", said), line
        assert "secret" not in said and "token=" not in said, line
    assert not (file.parent / "none").exists()
    assert took < 5, f"{took:.1f} s"
    assert peak.bytes < 2 * 2**30


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("mutations") / "x.yaml"
    file.write_text(yaml.safe_dump(THERE))
    assert CliRunner().invoke(main, ["plan", str(file), "--store", str(file.parent / "none")]).exit_code == 0  # imports
    return file


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(MUTATIONS)
def test_a_mutated_experiment_is_planned_or_refused_in_a_sentence(file, mutation):
    is_planned_or_refused_in_a_sentence(mutated(*mutation), file)


@pytest.mark.slow
@settings(max_examples=1000, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(MUTATIONS)
def test_a_thousand_mutated_experiments_are_planned_or_refused_in_a_sentence(file, mutation):
    is_planned_or_refused_in_a_sentence(mutated(*mutation), file)


@pytest.mark.parametrize("base", [yaml.safe_dump(TINY), yaml.safe_dump(THERE)], ids=["tiny", "kinds"])
def test_without_a_mutation_they_are_planned(base, file):
    file.write_text(base)
    result = CliRunner().invoke(main, ["plan", str(file), "--store", str(file.parent / "none")])
    assert result.exit_code == 0, result.stderr
