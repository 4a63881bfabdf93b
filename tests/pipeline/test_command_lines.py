"""Odd command lines: each ends soon, with exit code 0, 1 or 2 and one sentence about the fault."""

import random
import time

import click
import pytest
import yaml
from click.testing import CliRunner
from PIL import Image
from support import TINY

from pipeline.cli import main
from pipeline.terminal import visible

WORDS = ["other", "ran", "datasets/other", "models/", "/", "..", ".", "*", "a b", "-", "--", "%s", "{0}", "~",
         "~nosuch", "x" * 300, "é", "\u202e", "\x1b[31m", "\udcff", "a\nb", "a\0b", "", " ", "0", "-1", "nan", "None",
         "[/x]", "other@seed=0", "runs", ".partial", "s3://", "file:", "a=b", "PATH", "SECRET=1"]  # fmt: skip

NUMBERS = ["0", "1", "-1", "2", "1.5", "nan", "inf", "1e400", "-inf", "1e-320", "0x10", "1_0", "٣", "", "x", "9" * 30]

STORES = ["s", "./s/", "s/../s", "none", "s/datasets", "tiny.yaml", "dir", "/dev/null", "/proc", "~nosuch", "s3://",
          "s3:/x", "foo://x", "://", "s3://a b/c", "s3://k:s@b/x", "hdfs://x/y", "s3://[::1", "file://host/x", "é",
          "\udcff", "x" * 300, "-", "--", "", "s\n", "a\0b"]  # fmt: skip

FILES = ["tiny.yaml", "empty.yaml", "null.yaml", "bin.yaml", "none.yaml", "dir", "-", "i.png", "/dev/null", "x" * 300,
         "\udcff.yaml", "tiny.yaml/", "", "https://x/y.yaml"]  # fmt: skip

OUTS = ["o.png", "none/o.png", "dir", ".", "/", "/dev/full", "/proc/x", "x" * 300, "\udcff.png", "a\nb.png", ""]

ADDRESSES = ["http://127.0.0.1:9", "http://", "127.0.0.1:9", "", "x", "http://[::1", "http://a b", "ftp://x", "//",
             "http://127.0.0.1:99999", "http://u:p@127.0.0.1:9", "http://127.0.0.1:-1", "http://%zz:9"]  # fmt: skip

SOURCES = [".", "dir", "cifar10", "none", "i.png", "s/datasets", "tiny.yaml", "x.parquet", "*.parquet", "/dev/null",
           "https://127.0.0.1:9/x.parquet", "https://u:p@h/x", "s3://", "..", "~nosuch"]  # fmt: skip

POOLS = {"store": STORES, "data": STORES, "file": FILES, "image": FILES, "out": OUTS, "address": ADDRESSES,
         "dest": STORES, "source": SOURCES, "images": SOURCES, "tensorboard": OUTS}  # fmt: skip


class Odd:
    """Random command lines, most of them nearly right."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def line(self) -> list[str]:
        name, command = self.draw.choice(sorted(main.commands.items()))
        line = [name]
        for parameter in command.params:
            line += self.part(parameter, name)
        if self.draw.random() < 0.05:
            line.insert(self.draw.randrange(len(line) + 1), self.draw.choice([*WORDS, "--debugg", "-h", "--json=1"]))
        return line

    def part(self, parameter: click.Parameter, command: str) -> list[str]:
        if isinstance(parameter, click.Argument):
            return [self.value(parameter)] if self.draw.random() < 0.85 else []
        flag = self.draw.choice([*parameter.opts, *parameter.secondary_opts])
        if parameter.name == "engine":
            return [flag, "inline"]
        if parameter.name in ("cost", "follow", "help"):  # takes its time
            return []
        if parameter.name == "address" and command not in ("run", "resume"):
            return [flag, self.value(parameter)]  # never another's cluster
        if self.draw.random() > (0.9 if parameter.required or parameter.name == "store" else 0.2):
            return []
        if parameter.is_flag:
            return [flag]
        value = self.value(parameter)
        return [flag, value] if self.draw.random() < 0.85 else [f"{flag}={value}"]

    def value(self, parameter: click.Parameter) -> str:
        if parameter.name in POOLS:
            pool = POOLS[parameter.name]
            return pool[0] if self.draw.random() < 0.5 else self.draw.choice(pool)
        if isinstance(parameter.type, click.types.IntRange | click.types.FloatRange):
            return self.draw.choice(NUMBERS)
        if isinstance(parameter.type, click.Choice):
            return self.draw.choice([*parameter.type.choices, "x", ""])
        return self.draw.choice(WORDS)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a finished store, and files of all kinds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    assert CliRunner().invoke(main, ["run", "tiny.yaml", "--store", "s", "--engine", "inline"]).exit_code == 0
    Image.new("L", (8, 8), 100).save("i.png")
    (tmp_path / "dir").mkdir()
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "null.yaml").write_text("null")
    (tmp_path / "bin.yaml").write_bytes(bytes(range(256)))
    return tmp_path


@pytest.mark.parametrize(("seed", "count"), [(1, 150), pytest.param(2, 1000, marks=[pytest.mark.slow])])
def test_an_odd_command_line_ends_soon_and_in_one_sentence(seed, count, folder):
    odd = Odd(seed)
    for _ in range(count):
        line, began = odd.line(), time.monotonic()
        result = CliRunner().invoke(main, line, input="name: x")
        said = result.stderr
        assert time.monotonic() - began < 60, line
        assert result.exit_code in (0, 1, 2) and isinstance(result.exception, SystemExit | None), (line, result)
        assert "unexpected:" not in said and "Traceback" not in said, (line, said)
        assert said == "\n".join(map(visible, said.split("\n"))), (line, said)
        if result.exit_code == 2:
            assert said.startswith("Error: ") and said.count("\n") == 1, (line, said)
    assert not [path for path in folder.iterdir() if path.name.startswith(("s3:", "~", "file:"))], (
        "no folder by accident"
    )
