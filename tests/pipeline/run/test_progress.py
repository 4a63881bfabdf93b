"""The progress display of a run: rates, time left, the whole run in one line, and only lines with news."""

import re
import time

import pytest

from pipeline.experiment.graph import build
from pipeline.experiment.spec import parse
from pipeline.run import progress as shown
from pipeline.run.jobs import Context
from pipeline.run.outlook import Outlook
from pipeline.run.pace import Pace
from pipeline.run.preflight import preflight
from pipeline.run.progress import Lines, Live, fitted, measured, rate, seconds_left
from pipeline.run.runs import Progress
from pipeline.store import Store


def running(**facts):
    return Progress("attack", "v", state="running", total=4, **facts)


@pytest.fixture
def statuses(tiny, tmp_path):
    """A small experiment of which nothing is made."""
    return preflight(build(parse(tiny)), Context(Store(str(tmp_path / "s")), tmp_path, tmp_path))


def paced(began, at, images):
    """The pace of a node whose first shards just ended."""
    pace = Pace(began)
    pace.ended(at, images)
    return pace


def test_rate_and_time_left_count_from_the_first_shard_to_the_last_and_not_from_the_queue():
    """A model's first epoch once took all of its time in the queue: nine minutes left, and it took 25 s."""
    now = time.time()
    progress = running(images=300, total_images=1200, started=now - 40, done=1)
    pace = paced(now - 40, now - 10, 300)
    assert rate(progress, pace) == pytest.approx(10)
    assert seconds_left(progress, pace) == pytest.approx(80, abs=1)
    progress.state = "queued"
    assert seconds_left(progress, pace) is None


def test_the_first_epoch_of_a_training_is_not_taken_for_as_slow_as_the_start_of_its_worker():
    """20 epochs that took two seconds each were announced as five minutes."""
    now = time.time()
    progress = running(images=100, total_images=2000, started=now - 20, done=1)
    progress.last = {"epoch": 1, "loss": 0.5, "images_per_second": 50.0}
    pace = paced(now - 20, now, 100)
    assert seconds_left(progress, pace) == pytest.approx(38, abs=1)
    assert measured(progress, pace) == ["loss 0.500", "50 images/s"]


def test_before_the_first_image_nothing_is_claimed():
    assert rate(running(started=time.time())) is None
    assert seconds_left(running(started=time.time()), None) is None and measured(running()) == []


def test_pieces_give_way_by_importance():
    pieces = [(0, "name"), (2, "often"), (1, "left"), (3, "")]
    assert [fitted(pieces, width) for width in (17, 16, 9, 2)] == ["name  often  left", "name  left", "name", "name"]


def test_plain_lines_say_each_turn_and_not_every_shard(capsys):
    with Lines() as lines:
        progress = running(started=time.time(), images=10, total_images=40)
        progress.state = "queued"
        lines("datasets/rand", progress, "started")
        assert capsys.readouterr().err == "", "it waits for a worker"
        progress.started -= 60
        lines("datasets/rand", progress, "waits")
        assert capsys.readouterr().err == "datasets/rand: waits for a worker, 0:01:00 so far\n"
        progress.started, progress.state = time.time(), "running"
        lines("datasets/rand", progress, "began")
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


@pytest.mark.parametrize("share", [0.54, 0.56])
def test_a_poor_source_model_is_named_before_its_attack(share, statuses, capsys):
    """Of ten classes, halfway from chance to all images is 55 %."""
    done = Progress("train", "v", state="done", seconds=2.0, last={"loss": 1.5, "test_accuracy": share})
    for display in (Lines(statuses), Live(statuses)):
        with display:
            display("models/standard", done, "done")
            display("models/from_other", done, "done")
        said = " ".join(capsys.readouterr().err.split())
        warned = (
            f"classifies only {100 * share:.1f} % of the test images, so perturbations from it will carry few features"
        )
        assert said.count(warned) == (share < 0.55), "a learner may be poor"


def frame(display):
    """The lines at the foot of the terminal."""
    with display.console.capture() as captured:
        display.console.print(display._drawn())
    return [line.rstrip() for line in captured.get().splitlines()]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_foot_of_a_terminal_has_the_whole_run_and_the_nodes_at_work(columns, statuses, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    now = time.time()
    clean = Progress("load", "v", state="running", total=6, started=now - 6)
    other = running(started=now - 30, images=10, total_images=40, done=1, last={"loss": 0.5})
    with Live(statuses) as display:
        display("datasets/clean", clean, "started")
        display("datasets/clean", clean, "began")
        clean.state, clean.seconds, clean.images = "done", 6.0, 600
        display("datasets/clean", clean, "done")
        display("datasets/control", Progress("attack", "v", state="cached"), "cached")
        for event in ("started", "began", "committed"):
            display("datasets/other", other, event)
        display("models/standard", Progress("train", "v", state="queued"), "started")
        display("models/from_other", Progress("train", "v", state="failed", why="[/x] a\x1b[2Jb " * 9), "failed")
        whole, *at_work = frame(display)
        assert whole.startswith("2 of 6 nodes done") and len(whole) <= columns
        assert re.search("1 failed .*1 waiting  .*over 0:01:[23][0-9] left$", whole)
        assert ("1 queued" in whole) == (columns > 80), "counted, where there is room"
        (line,) = at_work
        assert line.startswith("datasets/other") and re.search("1/4 shards .*0:01:[23][0-9] left$", line)
        assert ("images/s" in line) == (columns > 80) and len(line) <= columns
    said = capsys.readouterr().err
    assert "done" in next(line for line in said.splitlines() if "datasets/clean" in line)
    assert " ".join(said.split()).count(r"[/x] a\x1b[2Jb") == 9, "a reason is shown whole, and as it is"
    assert "datasets/control" not in said, "what was there is counted"


def test_the_time_left_of_a_run_follows_from_the_nodes_that_ran(statuses):
    outlook = Outlook(statuses)
    ended = {"datasets/clean", "datasets/control", "models/standard"}
    assert outlook.left(ended, (), {}, 1.0) is None, "nothing like the rest ran"
    outlook.ran("models/standard", 8.0)
    left = outlook.left(ended, (), {"datasets/other": 3.0}, 1.0)
    assert left.seconds == pytest.approx(11, rel=0.05) and left.least, "the evaluation is of another kind"
    outlook.ran("evaluations/accuracy", 2.0)
    assert outlook.left(ended, (), {"datasets/other": 3.0}, 9.0) == shown.Left(pytest.approx(13, rel=0.05), False)
    assert outlook.left(ended, ["datasets/other"], {}, 1.0) is None, "what needs a failed node is not made"


def test_a_plain_copy_of_images_says_nothing_of_an_attack(statuses):
    outlook = Outlook(statuses)
    outlook.ran("datasets/control", 5.0)
    assert outlook.expected("datasets/control") == 5.0 and outlook.expected("datasets/other") is None
