"""A store is data: damage is found and repaired, and foreign content is never obeyed."""

import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TINY, reseal

from pipeline.cli import main
from pipeline.run import artifacts, runs
from pipeline.store import Store

DERIVED = ("events.jsonl", "report.html", "index.html", "README.md", "croissant.json", "samples.webp")
"""Files that no command relies on: they are written for people and other programs, and can be made again."""


def invoke(*args: Any) -> Any:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def make(file: Path, store: Path) -> Any:
    return invoke("run", file, "--store", store, "--engine", "inline")


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trust")
    (folder / "experiment.yaml").write_text(yaml.safe_dump(TINY))
    assert make(folder / "experiment.yaml", folder / "store").exit_code == 0
    return folder / "store"


@pytest.fixture
def finished(made_once: Path, write: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """File and store of a finished run, which a test may damage."""
    monkeypatch.chdir(tmp_path)
    return write(tiny), shutil.copytree(made_once, tmp_path / "store")


def promised(store: Path) -> dict[str, bytes]:
    """Every file whose bytes are guaranteed → its content."""
    kept = ("*.tar", "*.parquet", "recipe.json", "*.safetensors", "result.json")
    found = (path for pattern in kept for path in store.glob(f"*/*/*/**/{pattern}"))
    return {str(path.relative_to(store)): path.read_bytes() for path in found}


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    digits = [i for i, byte in enumerate(content) if chr(byte).isdigit()] if path.suffix == ".json" else []
    content[digits[len(digits) // 2] if digits else len(content) // 2] ^= 1
    path.write_bytes(content)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def deleted(path: Path) -> None:
    path.unlink()


def swapped(path: Path) -> None:
    """With another file of its kind: the same file of another node, or of another shard."""
    store = path.parents[4] if path.parent.name == "commits" else path.parents[3]
    others = [p for p in sorted(store.glob(f"*/*/*/**/*{path.suffix}")) if p.read_bytes() != path.read_bytes()]
    same = [p for p in others if p.name == path.name] or [p for p in others if p.parent.name == path.parent.name]
    other = (same or others)[0]
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def made_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").write_text("somebody's")


def made_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = [flipped, truncated, deleted, swapped, emptied, made_a_folder, made_a_pipe]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_to_any_file_is_named_and_the_next_run_gives_the_undisturbed_bytes(damage, finished, made_once):
    file, store = finished
    before = promised(store)
    everything = sorted(path.relative_to(store) for path in store.rglob("*") if path.is_file())
    assert len(everything) > 60
    for name in everything:
        if name.name not in DERIVED:
            damage(store / name)
            assert named(store, name) or (damage is deleted and name.name == "run.json"), name
            restored(store, made_once)
    for documents in (True, False):
        for path in [p for p in sorted(store.rglob("*")) if p.is_file() and (p.suffix == ".json") == documents][::2]:
            damage(path)
        invoke("verify", "--store", store)
        result = make(file, store)
        assert result.exit_code == 0, result.output
        assert promised(store) == before
        assert invoke("verify", "--store", store).exit_code == 0


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flipped, deleted])
def test_damage_to_one_file_alone_is_mended_by_the_next_run(damage, finished, made_once):
    file, store = finished
    before = promised(store)
    for name in sorted(path.relative_to(made_once) for path in made_once.rglob("*") if path.is_file())[::3]:
        damage(store / name)
        invoke("verify", "--store", store)
        assert make(file, store).exit_code == 0, name
        assert promised(store) == before, name
        shutil.rmtree(store)
        shutil.copytree(made_once, store)


def restored(store: Path, whole: Path) -> None:
    """Restore every file of the store."""
    for path in whole.rglob("*"):
        if path.is_file():
            mine = store / path.relative_to(whole)
            if mine.is_dir():
                shutil.rmtree(mine)
            elif not mine.is_file():
                mine.unlink(missing_ok=True)
            if not mine.exists() or mine.read_bytes() != path.read_bytes():
                shutil.copyfile(path, mine)


def named(store: Path, name: Path) -> list[artifacts.Damage]:
    """The damage that `verify` reports in a file's folder."""
    group, *rest = name.parts
    if group == "runs":
        return runs.verify(Store(str(store)), rest[0])
    return artifacts.verify(Store(str(store)), "/".join(name.parts[:3]))


@pytest.mark.parametrize("name", ["result.json", "manifest.json", "commits/test-000000.json", "run.json"])
def test_one_changed_digit_of_a_document_never_reaches_a_table(name, finished, made_once):
    file, store = finished
    table = invoke("show", "--store", store, "--json").stdout
    path = next(store.glob(f"*/*/{name}" if name == "run.json" else f"evaluations/*/*/{name}"))
    flipped(path)
    shown = invoke("show", "--store", store)
    assert (shown.exit_code in (0, 1, 2) and "Error:" in shown.stderr) or name.startswith(("commits", "manifest"))
    result = make(file, store)
    assert result.exit_code == 0
    rows = json.loads(invoke("show", "--store", store, "--json").stdout)["rows"]
    assert rows == json.loads(table)["rows"]


def test_a_changed_mean_is_not_trained_with(finished):
    # 0.3 → 0.7 in a dataset's manifest once changed every model behind it, and nobody noticed.
    file, store = finished
    before = promised(store)
    path = next(store.glob("datasets/clean/*/manifest.json"))
    manifest = json.loads(path.read_text())
    manifest["mean"]["train"] = [value + 0.4 for value in manifest["mean"]["train"]]
    path.write_text(json.dumps(manifest))
    shutil.rmtree(store / "models")
    assert make(file, store).exit_code == 0
    assert promised(store) == before


def test_a_checkpoint_with_another_history_is_not_gone_on_from(finished, monkeypatch):
    from stages import train

    file, store = finished
    before = promised(store)
    shutil.rmtree(next(store.glob("models/standard/*")))
    kept = {}
    put = Store.put

    def keep(self: Store, path: str, content: bytes) -> None:
        if path.endswith("checkpoint.safetensors") and not kept:
            kept[path] = content
        put(self, path, content)

    monkeypatch.setattr(Store, "put", keep)
    assert make(file, store).exit_code == 0
    ((path, content),) = kept.items()
    assert train.came_from(content, json.loads(json.dumps(train._about(content)["on"])))
    at = content.index(b"loss") + len(b"loss") + 6
    content = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    (store / path).parent.joinpath("manifest.json").unlink()
    (store / path).write_bytes(content)
    assert make(file, store).exit_code == 0
    metrics = [json.loads(line) for line in (store / path).parent.joinpath("metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in metrics] == [1, 2]
    assert promised(store) == before


# ------------------------------------------------------------------------------- somebody else's store


def commands(file: Path, store: Path, image: Path) -> Iterator[list[Any]]:
    """Every command that opens a store."""
    for name in ("standard", "from_other"):
        yield ["attack", image, "--model", name, "--to", "3", "--steps", "1", "--store", store]
    yield ["plan", file, "--store", store]
    yield ["show", "--store", store]
    yield ["show", "standard", "--store", store]
    yield ["status", "--store", store]
    yield ["report", "--store", store]
    yield ["verify", "--store", store, "--keep"]
    yield ["verify", "--store", store]
    yield ["resume", "--store", store, "--engine", "inline"]
    yield ["run", file, "--store", store, "--engine", "inline"]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    from PIL import Image

    Image.new("L", (8, 8), 99).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def clear(result: Any) -> bool:
    """Whether a message is one sentence without an exception's name."""
    assert result.exit_code in (0, 1, 2), (result.output, result.exception)
    assert not isinstance(result.exception, Exception), result.exception
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    assert len(lines) <= 1
    for word in ("Traceback", "KeyError", "TypeError", "ValueError", "AttributeError", "IndexError", "RuntimeError"):
        assert word not in result.output + result.stderr, result.output + result.stderr
    return True


ARCHS = {
    "a command": lambda canary: {"arch": "os:system", "of": f"touch {canary}"},
    "code of the store": lambda canary: {"arch": "canary:touch"},
    "code by its path": lambda canary: {"arch": "./store/canary.py:touch", "mean": ["x"]},
}


@pytest.mark.parametrize("what", ARCHS)
def test_code_that_a_store_names_does_not_run(what, finished, image, tmp_path):
    file, store = finished
    canary = tmp_path / "PWNED"
    for folder in (tmp_path, store):
        (folder / "canary.py").write_text(
            f"open({str(canary)!r}, 'w')\ndef touch(classes, channels=1): open({str(canary)!r}, 'w')\n"
        )
    for path in store.glob("models/*/*/manifest.json"):
        reseal(store, path, lambda value: value["design"].update(ARCHS[what](canary)))
    for args in commands(file, store, image):
        clear(invoke(*args))
        assert not canary.exists(), args


def test_a_record_names_neither_code_nor_a_folder_to_import_from(finished, image, tmp_path):
    file, store = finished
    canary, evil = tmp_path / "PWNED", tmp_path.parent / f"{tmp_path.name}-evil"
    evil.mkdir()
    (evil / "mynets.py").write_text(f"open({str(canary)!r}, 'w')\ndef net(classes, channels): ...\n")
    (path,) = store.glob("runs/*/run.json")

    def hostile(arch: str, here: Path) -> Any:
        def change(value: dict[str, Any]) -> None:
            value["here"] = str(here)
            value["experiment"]["models"]["standard"]["train"]["arch"] = arch

        return change

    (tmp_path / "os.py").write_text(f"open({str(canary)!r}, 'w')\n")
    cases = [
        ("mynets:net", evil),
        ("evil/../../evil/mynets.py:net", evil),
        ("os:system", tmp_path),
        ("json:tool", evil),
    ]
    for arch, here in [*cases, ("../evil/mynets.py:net", tmp_path), ("pipeline.store:Store", tmp_path)]:
        reseal(store, path, hostile(arch, here))
        result = invoke("resume", path.parent.name, "--store", store, "--engine", "inline")
        assert result.exit_code == 2, arch
        assert arch in result.stderr and "--modules" in result.stderr
        assert not canary.exists()
    for args in commands(file, store, image):
        clear(invoke(*args))
    assert not canary.exists()


def test_a_run_with_own_code_goes_on_in_its_folder_or_where_that_is_named(tiny, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets_of_a_run.py").write_text(
        "from torch import nn\n"
        "def net(classes, channels):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, classes))\n"
    )
    tiny["models"]["standard"]["train"]["arch"] = "nets_of_a_run:net"
    assert make(write(tiny), tmp_path / "s").exit_code == 0
    resume = ["resume", "--store", tmp_path / "s", "--engine", "inline"]
    assert invoke(*resume).exit_code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert invoke(*resume).exit_code == 2
    result = invoke(*resume, "--modules", tmp_path)
    assert result.exit_code == 0 and result.stderr.count("there already") == 6


def test_own_code_is_attacked_where_the_user_names_it(tiny, write, image, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets_to_attack.py").write_text(
        "from torch import nn\n"
        "def net(classes, channels):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, classes))\n"
    )
    tiny["models"] = {"standard": {"train": {**tiny["models"]["standard"]["train"], "arch": "nets_to_attack:net"}}}
    tiny["datasets"] = {"clean": tiny["datasets"]["clean"]}
    del tiny["evaluations"]
    assert make(write(tiny), tmp_path / "s").exit_code == 0
    attack = ["attack", image, "--model", "standard", "--to", "3", "--steps", "2", "--store", "s"]
    refused = invoke(*attack)
    assert refused.exit_code == 2 and "--arch nets_to_attack:net" in refused.stderr
    other = invoke(*attack, "--arch", "nets_to_attack:other")
    assert other.exit_code == 2 and "nets_to_attack:net" in other.stderr
    assert invoke(*attack, "--arch", "nets_to_attack:net").exit_code == 0


def climb(value: dict[str, Any]) -> None:
    value["shards"] = {"../../../../victim/settings": 64}


def climb_by_file(value: dict[str, Any]) -> None:
    value["files"].append({"name": "../../../../victim/settings.json", "bytes": 1, "sha256": "0" * 64})


def climb_by_name(value: dict[str, Any]) -> None:
    value["name"], value["version"] = "../../..", "victim"


@pytest.mark.parametrize("change", [climb, climb_by_file, climb_by_name])
def test_no_name_in_a_manifest_leads_out_of_the_store(change, finished, image, tmp_path):
    file, store = finished
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "settings.json").write_text("mine")
    (victim / "manifest.json").write_text("mine")
    for path in store.glob("*/*/*/manifest.json"):
        reseal(store, path, change)
    for args in commands(file, store, image):
        clear(invoke(*args))
    assert {path.name: path.read_text() for path in victim.iterdir()} == {
        "settings.json": "mine",
        "manifest.json": "mine",
    }


def test_a_record_of_another_name_is_not_followed(finished, tmp_path):
    _, store = finished
    (path,) = store.glob("runs/*/run.json")
    before = set(tmp_path.iterdir())
    for name in ("../../escaped", "/escaped", "..", "a/b", "x\x00y", ""):
        reseal(store, path, lambda value, name=name: value.update(run=name))
        for command in ("show", "status", "report", "verify"):
            clear(invoke(command, *(["--keep"] if command == "verify" else []), "--store", store))
    assert set(tmp_path.iterdir()) == before


def test_symbolic_links_of_a_store_are_not_written_through(finished, tmp_path):
    file, store = finished
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "old").write_text("mine")
    (victim / "manifest.json").write_text("mine")
    os.utime(victim / "old", (0, 0))
    shutil.rmtree(store / ".partial")
    (store / ".partial").symlink_to(victim)
    result = make(file, store)
    assert result.exit_code in (1, 2) and "symbolic link" in result.output + result.stderr
    (store / ".partial").unlink()
    version = next(store.glob("datasets/control/*"))
    shutil.rmtree(version)
    version.symlink_to(victim)
    result = make(file, store)
    assert result.exit_code == 1 and "symbolic link" in result.stderr
    assert sorted(path.name for path in victim.iterdir()) == ["manifest.json", "old"]


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "..", "../../x", "os:system", "datasets/clean", "x" * 300, "\x1b[31m", "train-000000"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@given(data=st.data())
@settings(max_examples=25)
def test_garbage_in_any_document_is_one_sentence(data, made_once, tmp_path_factory):
    folder = tmp_path_factory.mktemp("garbage")
    store = shutil.copytree(made_once, folder / "store")
    path = data.draw(st.sampled_from(sorted(p for p in store.rglob("*.json") if p.name not in DERIVED)))

    def garbage(value: Any) -> Any:
        """The document with one value, at any depth, replaced by another."""
        keys = sorted(value) if isinstance(value, dict) else list(range(len(value)))
        key = data.draw(st.sampled_from(keys)) if keys else None
        if key is None:
            return value
        inner = value[key]
        if isinstance(inner, dict | list) and inner and data.draw(st.booleans()):
            garbage(inner)
        elif isinstance(value, dict) and data.draw(st.integers(0, 5)) == 0:
            del value[key]
        else:
            value[key] = data.draw(VALUES)
        return value

    reseal(store, path, garbage)
    for command in ("show", "status", "report", "verify"):
        clear(invoke(command, "--store", store))
    shutil.rmtree(folder)


# ------------------------------------------------------------------------------------- faults of a store


@contextmanager
def as_nobody(folder: Path) -> Iterator[None]:
    """Run as a user who owns nothing but may read the test's folder, since root can read everything."""
    if os.geteuid() != 0:
        yield
        return
    for above in (folder, *itertools.takewhile(lambda one: one != Path(tempfile.gettempdir()), folder.parents)):
        above.chmod(0o755)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_verify_reads_on_after_what_it_cannot_read_and_names_all(finished, tmp_path):
    file, store = finished
    closed = [next(store.glob("datasets/clean/*/train-000000.tar")), next(store.glob("models/*/*/manifest.json"))]
    for path in closed:
        path.chmod(0)
    flipped(next(store.glob("datasets/other/*/train-000002.tar")))
    with as_nobody(tmp_path):
        result = invoke("verify", "--store", store)
    assert result.exit_code == 1
    for name in ("train-000000.tar cannot be read", "manifest.json cannot be read", "train-000002.tar has other bytes"):
        assert name in result.stdout
    assert "could not be discarded" in result.stderr
    assert clear(result)
    assert "evaluations/accuracy" in result.stdout, "the rest is read"
    for path in closed:
        path.chmod(0o644)
    assert invoke("verify", "--store", store).exit_code == 1
    assert make(file, store).exit_code == 0
    assert invoke("verify", "--store", store).exit_code == 0


def test_a_file_that_may_not_be_read_is_one_sentence_in_a_run(finished, tmp_path):
    file, store = finished
    next(store.glob("datasets/clean/*/manifest.json")).chmod(0)
    with as_nobody(tmp_path):
        result = invoke("plan", file, "--store", store)
    assert result.exit_code == 2 and "not permitted" in result.stderr and clear(result)


@pytest.mark.parametrize("place", ["datasets/clean", "datasets", "models/standard"])
def test_a_file_in_a_folders_place_is_set_aside(place, finished):
    file, store = finished
    before = promised(store)
    shutil.rmtree(store / place)
    (store / place).write_text("somebody's")
    invoke("verify", "--store", store)
    assert make(file, store).exit_code == 0
    assert promised(store) == before
    assert [path.read_text() for path in (store / ".aside").iterdir()] == ["somebody's"]


def test_runs_without_a_readable_record_are_passed_over(finished):
    _, store = finished
    contents = [None, b"", b"{", b"[]", b"\xff\xfe", b'{"run": 1}', b"[" * 100_000, b'{"run": ' + b"9" * 5000 + b"}"]
    runs_of_today = [
        f"{time.strftime('%Y%m%d', time.gmtime())}-235959-x-{number:04}" for number in range(len(contents))
    ]
    for name, content in zip(runs_of_today, contents, strict=True):
        (store / "runs" / name).mkdir()
        if content is not None:
            (store / "runs" / name / "run.json").write_bytes(content)
    for command in ("status", "show", "report"):
        result = invoke(command, "--store", store)
        assert result.exit_code == 0 and clear(result)
        assert result.stderr.count("skipped run") == len(contents)
    assert "from_other" in invoke("show", "--store", store).stdout
    for name in runs_of_today:
        named = invoke("status", name, "--store", store)
        assert named.exit_code == 1 and "record" in named.stderr and clear(named)
    assert invoke("resume", "--store", store, "--engine", "inline").exit_code == 0
    assert invoke("verify", "--store", store).exit_code == 1
    assert invoke("verify", "--store", store).exit_code == 0, "what cannot be read is set aside"


def test_a_record_that_a_wrong_clock_dated_is_not_the_latest_for_ever(finished):
    _, store = finished
    (run,) = (store / "runs").iterdir()
    future = run.with_name(f"20990101-000000-{run.name[16:]}")
    shutil.copytree(run, future)
    record = Store(str(store)).find_json(f"runs/{run.name}/run.json")
    assert record is not None
    Store(str(store)).put_json(
        f"runs/{future.name}/run.json",
        record | {"run": future.name, "updated": 4e9, "started": "2099-01-01T00:00:00+00:00", "state": "running"},
    )
    assert run.name in invoke("status", "--store", store).stdout
    named = invoke("status", future.name, "--store", store)
    assert "lost" in named.stdout


def test_show_gives_the_latest_run_that_has_a_table(finished):
    file, store = finished
    (run,) = Store(str(store)).folders("runs")
    time.sleep(1.1)
    assert invoke("run", file, "--store", store, "--engine", "inline", "--only", "clean").exit_code == 0
    shown = invoke("show", "--store", store)
    assert run in shown.stdout and "from_other" in shown.stdout
    assert run not in invoke("status", "--store", store).stdout, "the latest of all"


def test_a_manifest_that_was_deleted_is_named_and_made_again(finished):
    file, store = finished
    before = promised(store)
    for path in store.glob("*/*/*/manifest.json"):
        path.unlink()
    result = invoke("verify", "--store", store)
    assert result.exit_code == 1
    assert result.stdout.count("manifest.json is missing") == 6
    assert make(file, store).exit_code == 0
    assert promised(store) == before


def test_what_is_no_node_is_passed_over(finished):
    file, store = finished
    for folder in ("datasets/clean/tmp", "datasets/.hidden/0123456789abcdef", "models/a b/0123456789abcdef", "junk"):
        (store / folder).mkdir(parents=True)
        (store / folder / "manifest.json").write_text("{}")
    (store / "datasets/clean/.DS_Store").write_text("x")
    assert invoke("verify", "--store", store).exit_code == 0
    assert invoke("show", "clean", "--store", store).exit_code == 0
    assert make(file, store).exit_code == 0
