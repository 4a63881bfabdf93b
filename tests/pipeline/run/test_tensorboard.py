"""`--tensorboard` writes what `metrics.jsonl` has, as event files."""

import json
import struct
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from support import TINY
from tensorboardX.proto.event_pb2 import Event

from pipeline.cli import main


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """Name and step → value, over the event files of a folder (TFRecords: length, its crc, event, its crc)."""
    found = {}
    for file in sorted(folder.glob("events.out.tfevents.*")):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            content = content[16 + length :]
    return found


def test_the_events_of_a_training_are_its_metrics_and_shards_have_a_rate(write, tmp_path):
    file, board = write(TINY), tmp_path / "board"
    asked = ["run", str(file), "--engine", "inline", "--store", str(tmp_path / "store"), "--only", "standard"]
    done = CliRunner().invoke(main, [*asked, "--tensorboard", str(board)])
    assert done.exit_code == 0, done.output
    (metrics,) = (tmp_path / "store/models/standard").glob("*/metrics.jsonl")
    (folder,) = (board / "models/standard").iterdir()
    assert folder.name == metrics.parent.name
    found, lines = scalars(folder), [json.loads(line) for line in metrics.read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        for name in ("loss", "accuracy", "test_accuracy", "lr"):
            assert found[name, line["epoch"]] == pytest.approx(line[name], rel=1e-6)
    (shards,) = (board / "datasets/clean").iterdir()
    assert {name for name, _ in scalars(shards)} == {"images_per_second"} and min(scalars(shards).values()) > 0


def test_where_it_cannot_be_written_nothing_is_begun(write, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    asked = ["run", str(write(TINY)), "--engine", "inline", "--store", str(tmp_path / "store"), "--tensorboard"]
    for folder, sentence in (("s3://bucket/x", "got a URL"), (tmp_path / "file/x", "cannot be made: Not a directory")):
        done = CliRunner().invoke(main, [*asked, str(folder)])
        assert done.exit_code == 2 and sentence in done.output
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    done = CliRunner().invoke(main, [*asked, str(tmp_path / "board")])
    assert done.exit_code == 2 and "pip install 'notbugs[tensorboard]'" in done.output
    assert not (tmp_path / "store").exists()
