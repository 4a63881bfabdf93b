"""The progress display of a run: rates, time left, and only lines with news."""

import time

import pytest

from pipeline.run.progress import Lines, Live, left, measured, rate
from pipeline.run.runs import Progress


def running(**facts):
    return Progress("attack", "v", state="running", total=4, **facts)


def test_rate_and_time_left_follow_from_images_and_seconds():
    progress = running(images=300, total_images=1200, started=time.time() - 30, done=1)
    assert rate(progress) == pytest.approx(10, rel=0.01)
    hours, minutes, seconds = left(progress).removesuffix(" left").split(":")
    assert int(hours) * 3600 + int(minutes) * 60 + int(seconds) == pytest.approx(90, abs=2)


def test_before_the_first_image_nothing_is_claimed():
    assert rate(running(started=time.time())) is None
    assert left(running(started=time.time())) == measured(running()) == ""


def test_plain_lines_say_each_turn_and_not_every_shard(capsys):
    with Lines() as lines:
        progress = running(started=time.time(), images=10, total_images=40)
        lines("datasets/rand", progress, "started")
        for progress.done in range(1, 4):
            lines("datasets/rand", progress, "committed")
        progress.why = "the disk is full"
        lines("datasets/rand", progress, "failed")
        lines("models/theirs", Progress("pretrained", "v", state="running", total=1), "started")
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "datasets/rand: started (attack, 4 shards)",
        "datasets/rand: failed: the disk is full",
        "models/theirs: started (pretrained, 1 checkpoint)",
    ]


def test_bars_stand_for_every_node_and_end_full(capsys):
    with Live() as bars:
        progress = running(started=time.time() - 1, images=10, total_images=40, done=1)
        bars("datasets/rand", progress, "started")
        bars("datasets/rand", progress, "committed")
        progress.state, progress.seconds, progress.done = "done", 2.0, 4
        bars("datasets/rand", progress, "done")
        bars("datasets/clean", Progress("load", "v", state="cached"), "cached")
    said = capsys.readouterr().err
    assert "datasets/rand" in said and "4/4" in said
    assert "datasets/clean" in said and "there already" in said


def test_a_reason_is_shown_by_the_bars_as_it_is(capsys):
    with Live() as bars:
        bars("datasets/rand", Progress("attack", "v", state="failed", why="[/x] [red]a\x1b[2Jb :smile: \\"), "failed")
    assert r"[/x] [red]a\x1b[2Jb :smile: \\"[:-1] in " ".join(capsys.readouterr().err.split())
