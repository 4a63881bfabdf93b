"""The terminal: control characters, encodings, missing streams and signals never cost a run's output."""

import fcntl
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from click.testing import CliRunner
from PIL import Image
from support import TINY

from pipeline import terminal
from pipeline.cli import main
from pipeline.report import page
from pipeline.run import engines, on_ray, preflight, runs
from pipeline.store import Store
from pipeline.terminal import Unheard, echo, relay, visible
from stages.errors import BadData

COMMAND = [sys.executable, "-m", "pipeline"]

LOADED = {"name": "loaded", "datasets": {"clean": TINY["datasets"]["clean"]}}
"""An experiment of a single dataset, made in a moment."""


def invoke(*args, code=0):
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def shell(line, cwd, **environment):
    """Run a line of shell in which $notbugs is the command; returns exit code, stdout, stderr."""
    command = {"notbugs": " ".join(COMMAND), **environment}
    done = subprocess.run(
        ["bash", "-c", line], cwd=cwd, env=os.environ | command, capture_output=True, timeout=120, check=False
    )
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    """A folder with the small experiment and its finished store, s."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    (folder / "loaded.yaml").write_text(yaml.safe_dump(LOADED))
    invoke("run", folder / "tiny.yaml", "--store", folder / "s", "--engine", "inline")
    return folder


# ------------------------------------------------------------------------------------ what is printed


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2Jgone\x07", r"\x1b[2Jgone\x07"),
        ("\x9b31m", r"\x9b31m"),
        ("a\nb\tc\rd\x7f", r"a\nb\tc\rd\x7f"),
        ("\u202egnp.\u2066x", r"\u202egnp.\u2066x"),
        ("\udcff.png", r"\udcff.png"),
        ("\u2028\ufeff\U000e0041", r"\u2028\ufeff\U000e0041"),
        ("Größe ε 0.5 → 猫 नमस्ते 👩‍🔬 [/x]", "Größe ε 0.5 → 猫 नमस्ते 👩‍🔬 [/x]"),
    ],
)
def test_what_a_terminal_obeys_or_hides_is_shown_and_all_else_stays(text, shown):
    assert visible(text) == shown == visible(shown)


def test_lines_are_printed_as_lines_and_what_another_program_said_without_its_colours(capsys):
    echo("one\ntwo\x1b[1A")
    relay("\x1b[36m(worker)\x1b[0m half\rwhole\r\n")
    assert capsys.readouterr().out == "one\ntwo\\x1b[1A\n(worker) half\nwhole\n"


EVIL = "\x1b]0;owned\x07\x1b[2J\u202e[/x]\n\udcff"


@pytest.mark.parametrize(
    "args",
    [
        ["plan", f"{EVIL}.yaml"],
        ["show", EVIL, "--store", "s"],
        ["status", EVIL, "--store", "s"],
        ["verify", EVIL, "--store", "s"],
        ["plan", "tiny.yaml", "--only", EVIL],
        ["attack", f"{EVIL}.png", "--model", "standard", "--to", "1", "--store", "s"],
        ["attack", "x.png", "--model", EVIL, "--to", "1", "--store", "s"],
        ["jobs", "--address", f"http://{EVIL}:1"],
        ["run", "tiny.yaml", "--engine", EVIL],
        [f"--{EVIL}"],
        [EVIL],
    ],
)
def test_an_error_shows_what_was_given_and_obeys_nothing_in_it(args, made_once, monkeypatch):
    monkeypatch.chdir(made_once)
    said = invoke(*args, code=2).stderr
    assert said == f"{visible(said[:-1])}\n" and said.startswith("Error: "), said
    assert r"\x1b[2J\u202e[/x]\n\udcff" in said or args == ["jobs", "--address", f"http://{EVIL}:1"]


def test_a_reason_is_shown_and_not_obeyed_by_lines_tables_and_pages(tmp_path, monkeypatch):
    """Marks of rich, of HTML and of terminals in what a node failed of, which may be a stranger's file name."""
    evil = "\x1b[2J\u202e[/x] <script>\n\udcff"

    def fail(*args):
        raise BadData(f"{evil[:-2]}\udcff is damaged")

    monkeypatch.setattr(runs.Run, "_make_shards", fail)
    file = tmp_path / "loaded.yaml"
    file.write_text(yaml.safe_dump(LOADED))
    store = tmp_path / "s"
    shown = r"\x1b[2J\u202e[/x] <script>\udcff is damaged"
    made = invoke("run", file, "--store", store, "--engine", "inline", code=1)
    status = invoke("status", "--store", store)
    for said in (made.stderr, status.stdout):
        assert shown in said and said == "\n".join(map(visible, said.split("\n")))
    (written,) = store.glob("runs/*/report.html")
    html = written.read_text()
    assert shown.replace("<", "&lt;").replace(">", "&gt;") in html
    assert html == "\n".join(map(visible, html.split("\n")))
    assert invoke("status", "--json", "--store", store).stdout.isascii()


def test_a_table_stays_in_its_columns_whatever_stands_in_a_cell():
    from pipeline.report.tables import table

    assert table(["a", "b"], [["x\ny\x1b", "1"], ["", "22"]]).splitlines() == [
        "a          b",
        "────────  ──",
        r"x\ny\x1b   1",
        "          22",
    ]


# ------------------------------------------------------------------------------ what is missing of it


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "ascii:strict"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=str,
)
def test_output_does_not_fail_for_the_encoding_of_the_terminal(environment, made_once):
    code, out, err = shell("$notbugs show --store s && $notbugs attack --help", made_once, **environment)
    assert code == 0, err
    assert re.search("^-{10}  -{14}  ", out, re.MULTILINE), "the table's rule, in what signs there are"


def test_a_folder_of_any_name_is_found_whatever_the_locale_is(made_once, tmp_path):
    """pyarrow names files in UTF-8, Python as the locale says: a store must not lie in a folder of another name."""
    here = tmp_path / "Größe"
    here.mkdir()
    line = f"$notbugs run {made_once}/loaded.yaml --engine inline --store Süd >é && $notbugs status --store Süd >>é"
    code, _, err = shell(line, here, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert code == 0 and {path.name for path in here.iterdir()} == {"Süd", "é"}, err


def test_an_experiment_is_read_as_utf_8_whatever_the_terminal_is(made_once):
    line = "printf 'name: \"ε\"' | $notbugs plan -"
    assert "'ε'" in shell(line, made_once, PYTHONIOENCODING="utf-8")[2]
    assert "'eps'" in shell(line, made_once, PYTHONIOENCODING="latin-1")[2]


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("$notbugs status --store s 2>&-", 0, ""),
        ("$notbugs status --store s >&-", 0, ""),
        ("$notbugs status --store s <&-", 0, ""),
        ("$notbugs status --store s <&- >&- 2>&-", 0, ""),
        ("$notbugs plan - <&-", 2, "is empty"),
        ("$notbugs status --store s >/dev/full", 1, "standard output cannot be written: No space left on device"),
        ("$notbugs --help >/dev/full", 1, "standard output cannot be written: No space left on device"),
        ("$notbugs show --json --store s >/dev/full 2>&1", 1, ""),
        ("$notbugs status --store s | true; exit ${PIPESTATUS[0]}", 1, ""),
        ("mkdir x; cd x; rmdir ../x; $notbugs status", 2, "the current folder no longer exists"),
        ("mkdir x; cd x; rmdir ../x; $notbugs --version", 0, ""),
    ],
)
def test_a_stream_or_folder_that_is_missing_makes_a_sentence_or_no_difference(line, code, said, made_once):
    done = shell(line, made_once)
    assert done[0] == code, done
    assert said in done[2] and done[2].count("\n") == bool(said), "one sentence, or none"


@pytest.mark.parametrize("closed", [">&- 2>&-", "2>/dev/full", "2>&1 | true"])
def test_a_run_that_nobody_can_hear_makes_everything_and_its_page(closed, made_once, tmp_path):
    code, *_ = shell(f"$notbugs run loaded.yaml --engine inline --store {tmp_path} {closed}", made_once)
    assert code == 0
    deadline = time.monotonic() + 60
    while not (pages := list(tmp_path.glob("runs/*/report.html"))) and time.monotonic() < deadline:
        time.sleep(0.1)  # the shell waits for the last of a pipe alone
    assert pages and list(tmp_path.glob("datasets/clean/*/manifest.json"))


def test_that_stdout_cannot_be_written_ends_a_command_and_that_stderr_cannot_does_not():

    with Path("/dev/full").open("w") as out, Path("/dev/full").open("w") as err, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        echo("lost", err=True)
        with pytest.raises(Unheard, match="No space left"):
            echo("lost")
        echo("nothing fails from now on")


@pytest.mark.parametrize(
    ("columns", "command", "there", "not_there"),
    [
        (60, "plan tiny.yaml", ["models/from_other", "state", "stage", "version"], "images"),
        (80, "status", ["models/from_other", "done"], "why"),
        (120, "show", ["from_other", "clean accuracy", "95 % interval", "chance"], "in every line"),
    ],
)
def test_what_is_shown_on_a_terminal_is_no_wider(columns, command, there, not_there, made_once):
    code, said = on_a_terminal([*COMMAND, *command.split(), "--store", "s"], made_once, columns=columns)
    table = said.replace("\r", "").partition("\n\n")[2].partition("\nleft out for")[0]
    assert code == 0 and max(map(len, table.splitlines())) <= columns, said
    assert all(text in table for text in there) and not_there not in table


# ------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize("value", ["", "  ", "a\0b"])
@pytest.mark.parametrize(
    "args",
    [
        ["status", "--store"],
        ["run", "x.yaml", "--data"],
        ["run", "x.yaml", "--only"],
        ["run", "x.yaml", "--address"],
        ["report", "--out"],
        ["submit", "x.yaml", "--env"],
        ["attack", "x.png", "--model", "m", "--to"],
        ["plan"],
        ["show"],
        ["verify", "a"],
    ],
    ids=" ".join,
)
def test_an_empty_value_is_refused(args, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused = invoke(*args, value, code=2)
    why = "has a NUL character" if "\0" in value else "is empty; if a variable stands there, is it set?"
    assert why in refused.stderr and refused.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        (
            "--store",
            "s3:/bucket/x",
            "must be a URL (with ://) or a folder (such as ./s3:/bucket/x)",
        ),
        ("--store", "file:here", "must be a URL"),
        ("--store", "~nosuch/x", "must name a known home folder, got '~nosuch/x'"),
        ("--data", "~nosuch/x", "must name a known home folder"),
        ("--store", "caf\udce9", "is not UTF-8 text, got 'caf\\udce9'"),
        ("--gpus", "1000000000", "is not in the range"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_and_makes_no_folder(option, value, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused = invoke("plan", "x.yaml", option, value, code=2)
    assert option in refused.stderr and why in refused.stderr and not list(tmp_path.iterdir())


def test_an_image_may_be_called_by_any_bytes(made_once, tmp_path):
    picture = tmp_path / "caf\udce9.png"
    Image.new("L", (8, 8), 100).save(picture)
    said = invoke("attack", picture, "--model", "standard", "--to", "1", "--store", made_once / "s", "--steps", 1)
    assert r"caf\udce9-as-1.png" in said.stdout and len(list(tmp_path.iterdir())) == 3


def test_no_crowd_is_begun_to_measure_a_price(made_once, tmp_path):
    args = ["plan", made_once / "tiny.yaml", "--store", tmp_path / "s", "--cost", "--workers", 100_000]
    assert "--workers 100000: at most" in invoke(*args, code=2).stderr


def test_a_user_of_whom_the_system_knows_nothing_has_a_home(monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    terminal.find_home()
    assert Path.home().is_dir()


def test_an_empty_variable_of_the_environment_is_one_that_is_not_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NOTBUGS_STORE", "")
    assert f"{tmp_path}/notbugs-store" in invoke("status", code=2).stderr


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "0", "-1", "x"])
@pytest.mark.parametrize("args", [["run", "x.yaml", "--shard-timeout"], ["submit", "x.yaml", "--shard-timeout"],
                                  ["attack", "x.png", "--model", "m", "--to", "1", "--eps"]], ids=" ".join)  # fmt: skip
def test_a_number_is_one_and_in_its_range(args, value):
    refused = invoke(*args, value, code=2)
    assert args[-1] in refused.stderr and refused.stderr.count("\n") == 1


# -------------------------------------------------------------------------------------------- signals


@pytest.fixture
def ctrl_c():
    """Signals as in a terminal's foreground job: background jobs and nohup ignore some of them."""
    before = [(signal.SIGINT, signal.signal(signal.SIGINT, signal.default_int_handler))]
    before.append((signal.SIGHUP, signal.signal(signal.SIGHUP, signal.SIG_DFL)))
    yield
    for number, handler in before:
        signal.signal(number, handler)


def in_the_foreground():
    """The same in a process that is about to start."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def told(number):
    """A function that sends this process a signal, and then takes some time."""

    def tell(*args, **options):
        os.kill(os.getpid(), number)
        time.sleep(100)

    return tell


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize(
    ("where", "name", "engine", "sentence"),
    [
        (preflight, "preflight", "inline", "Nothing was begun; the same command again begins it."),
        (on_ray, "_begin", "ray", "Nothing was begun; the same command again begins it."),
        (runs.Run, "_make_shards", "inline", "Finished work is kept; continue with: notbugs resume --store {store}"),
        (page, "write", "inline", "Finished work is kept; see it with: notbugs report --store {store}"),
    ],
    ids=["preflight", "Ray", "work", "page"],
)
def test_a_run_that_is_told_to_end_says_what_is_kept_and_how_to_go_on(
    where, name, engine, sentence, number, code, tmp_path, monkeypatch, ctrl_c
):
    monkeypatch.setattr(where, name, told(number))
    file = tmp_path / "loaded.yaml"
    file.write_text(yaml.safe_dump(LOADED))
    store = tmp_path / "s"
    began = time.monotonic()
    ended = invoke("run", file, "--store", store, "--engine", engine, code=code)
    assert time.monotonic() - began < 60, "it did not wait"
    assert ended.stderr.splitlines()[-1] == f"Interrupted. {sentence.format(store=store)}"
    if name == "_make_shards":
        record = runs.load_run(Store(str(store)), None)
        assert record["state"] == "interrupted"
        assert {node["state"] for node in record["nodes"].values()} == {"interrupted"}
        assert "interrupted" in invoke("status", "--store", store).stdout
        invoke("report", "--store", store)
        assert "This run was interrupted: 0 of 1 nodes are finished." in next(store.glob("runs/*/*.html")).read_text()


def test_ctrl_c_is_answered_before_what_takes_time(tmp_path, monkeypatch, ctrl_c):
    """A store that is away keeps the record's last write waiting for minutes, and Ray takes seconds to end."""
    monkeypatch.setattr(runs.Run, "_make_shards", told(signal.SIGINT))
    end = runs.Record.end
    monkeypatch.setattr(
        runs.Record, "end", lambda record, state: (echo(f"record {state}", err=True), end(record, state))
    )
    monkeypatch.setattr(engines.Inline, "close", lambda engine: echo("engine closed", err=True))
    file = tmp_path / "loaded.yaml"
    file.write_text(yaml.safe_dump(LOADED))
    said = invoke("run", file, "--store", tmp_path / "s", "--engine", "inline", code=130).stderr.splitlines()
    answer = f"Interrupted. Finished work is kept; continue with: notbugs resume --store {tmp_path}/s"
    assert [line for line in said[said.index(answer) :] if line] == [answer, "record interrupted", "engine closed"]


def test_who_follows_a_job_is_told_that_it_goes_on(monkeypatch, ctrl_c):
    job = SimpleNamespace(id="notbugs-x-1")
    found = SimpleNamespace(address="http://h:1", job=lambda name: job, follow=told(signal.SIGINT))
    monkeypatch.setattr("pipeline.cli.jobs.Cluster", lambda address: found)
    said = invoke("logs", "--follow", code=130).stderr.strip()
    assert said == ("Interrupted. The job continues. Stop it with: notbugs stop notbugs-x-1 --address http://h:1")


@pytest.mark.parametrize("command", [["show"], ["verify"], ["plan", "tiny.yaml"]], ids=" ".join)
def test_every_command_that_is_told_to_end_says_so(command, made_once, monkeypatch, ctrl_c):
    monkeypatch.chdir(made_once)
    monkeypatch.setattr(Store, "__init__", told(signal.SIGTERM))
    assert invoke(*command, "--store", "s", code=143).stderr.strip() == "Interrupted."


TWICE = """
import sys, time
from pipeline import terminal
with terminal.session():
    terminal.if_interrupted("All is kept.")
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("ending", flush=True)
        time.sleep(float(sys.argv[1]))
        print("ended", flush=True)
"""


@pytest.mark.parametrize(
    ("signals", "pause", "code", "said"),
    [
        ([signal.SIGINT, signal.SIGINT], 1.3, 130, "Ended at once. All is kept."),
        ([signal.SIGINT, signal.SIGTERM], 1.3, 143, "Ended at once. All is kept."),
        ([signal.SIGINT, signal.SIGINT], 0.2, 1, "Interrupted: SIGINT"),
        ([signal.SIGHUP, signal.SIGHUP, signal.SIGTERM], 0.4, 1, "Interrupted: SIGHUP"),
    ],
    ids=["twice", "impatient", "one finger", "once more"],
)
def test_a_second_ctrl_c_ends_at_once_and_what_is_sent_twice_counts_once(signals, pause, code, said):
    """A shell that is closed hands the hang-up on that its jobs get anyway; a wrapper hands on Ctrl-C."""
    with subprocess.Popen(
        [sys.executable, "-c", TWICE, "60" if "once" in said else "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=in_the_foreground,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        first, *others = signals
        process.send_signal(first)
        out = process.stdout.readline()  # the pause begins when the first has arrived, however busy the machine is
        for number in others:
            time.sleep(pause)
            process.send_signal(number)
        rest, err = process.communicate(timeout=30)
        out += rest
    assert process.returncode == code and said in err, err
    assert out == ("ending\n" if "once" in said else "ending\nended\n")


IMPORTS = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
from pipeline import terminal
Path("half.py").write_text("import os, signal, time; os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.5); whole = 1")
sys.path.insert(0, "")
with terminal.session():
    try:
        import half
        print(half.whole)
        for _ in range(1000):
            signal.sigtimedwait([], 0.01)
    except terminal.Interrupted as interrupted:
        print(interrupted.code, sys.modules["half"].whole)
"""


def test_a_signal_in_the_midst_of_an_import_is_held_back_until_it_is_whole(tmp_path):
    """Seen when Ctrl-C met the import of torch: an exception in its C++ aborts the process."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.split()[-2:] == ["143", "1"], done


def test_what_was_begun_to_ignore_a_hang_up_goes_on(tmp_path, ctrl_c):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminal.session():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def on_a_terminal(args, cwd, until=b"\0", then=None, columns=60):
    """Run a command on a terminal, and act once a text appears; returns exit code and output."""
    pid, terminal_end = pty.fork()
    if pid == 0:
        os.chdir(cwd)
        in_the_foreground()
        for name in ("COLUMNS", "LINES"):
            os.unsetenv(name)  # readline, which pytest loads, sets them where os.environ does not see it
        os.execvp(args[0], args)
    fcntl.ioctl(terminal_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    said, deadline, done = b"", time.monotonic() + 150, False
    while time.monotonic() < deadline:
        if select.select([terminal_end], [], [], 0.1)[0]:
            try:
                said += os.read(terminal_end, 65536)
            except OSError:  # closed by its last user
                break
        if not done and until in said:
            done = True
            time.sleep(1)
            if then is None:
                break
            os.write(terminal_end, then)
    os.close(terminal_end)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.decode(errors="replace")


@pytest.mark.slow
def test_ctrl_c_ends_the_measuring_of_a_price_without_a_word_of_its_processes(tiny, write, tmp_path):
    args = ["plan", str(write(tiny)), "--store", "s", "--cost"]
    code, said = on_a_terminal([*COMMAND, *args], tmp_path, b"trying: attack", b"\x03")
    assert code == 130 and "Traceback" not in said
    assert said.split()[-1] == "Interrupted."


@pytest.mark.parametrize("engine", ["inline", pytest.param("ray", marks=pytest.mark.slow)])
def test_ctrl_c_on_a_narrow_terminal_leaves_its_sentence_below_the_bars(engine, tiny, write, tmp_path):
    tiny["datasets"]["other"]["attack"] |= {"steps": 3000, "batch_size": 32}
    args = ["run", str(write(tiny)), "--store", "s", "--engine", engine]
    code, said = on_a_terminal([*COMMAND, *args], tmp_path, b"datasets/other", b"\x03")
    assert code == 130
    plain = re.sub(r"\x1b\[[0-9;]*m", "", said)  # colours, which Ray ends once more at its end
    last = re.split(r"\x1b\[[0-9;?]*[A-Za-z]", plain)[-1]  # nothing moves the cursor after it
    assert (
        last.split()
        == f"Interrupted. Finished work is kept; continue with: notbugs resume --store {tmp_path}/s".split()
    )
    assert "Traceback" not in said


def test_a_terminal_that_is_closed_interrupts_the_run(tiny, write, tmp_path):
    tiny["datasets"]["other"]["attack"] |= {"steps": 3000, "batch_size": 32}
    args = ["run", str(write(tiny)), "--store", "s", "--engine", "inline"]
    code, _ = on_a_terminal([*COMMAND, *args], tmp_path, b"datasets/other")
    assert code == 129
    record = runs.load_run(Store(str(tmp_path / "s")), None)
    assert record["state"] == record["nodes"]["datasets/other"]["state"] == "interrupted"
    assert record["nodes"]["models/from_other"]["state"] == "waiting"
    shutil.rmtree(tmp_path / "s")
