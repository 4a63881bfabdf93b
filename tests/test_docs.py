"""The documents agree with the code, and with each other."""

import importlib.util
import itertools
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from pipeline.cli import main
from pipeline.experiment import spec
from pipeline.experiment.graph import Node, build
from pipeline.run.preflight import wanted
from stages.shard import COLUMNS

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FOR_USERS = [page for page in PAGES if page.parent.name == "docs" or page.name == "README.md"]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def fences(page: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def spans(page: Path) -> list[str]:
    """Code in a document: lines of fences, and text between backticks."""
    blocks = [
        line.strip() for kind, body in FENCE.findall(page.read_text(encoding="utf-8")) for line in body.splitlines()
    ]
    return [*blocks, *re.findall(r"`([^`\n]+)`", prose(page))]


def anchors(page: Path) -> set[str]:
    """Heading anchors as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in titles}


def by_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_the_experiment_file_page_is_what_the_models_say() -> None:
    made = subprocess.run(
        [sys.executable, "docs/make_experiment_file.py"], cwd=ROOT, capture_output=True, check=True, timeout=120
    )
    written = (ROOT / "docs/experiment-file.md").read_bytes()
    assert made.stdout == written, "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_every_link_between_pages_resolves(page: Path) -> None:
    for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        assert other.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(other), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_every_experiment_shown_is_one(page: Path, tmp_path: Path) -> None:
    for body in fences(page, "yaml"):
        if re.search(r"^name:", body, re.MULTILINE):
            file = tmp_path / "shown.yaml"
            file.write_text(body, encoding="utf-8")
            build(spec.read(file))


def test_every_column_of_samples_parquet_is_explained() -> None:
    text = (ROOT / "docs/data-format.md").read_text(encoding="utf-8")
    table = text.partition("## samples.parquet")[2].partition("\n## ")[0]
    explained = re.findall(r"^\| `(\w+)` \| (\w+) \|", table, re.MULTILINE)
    arrow = {"float": "float32", "double": "float64"}
    assert explained == [(name, arrow.get(str(kind), str(kind))) for name, kind in COLUMNS.items()]


@pytest.mark.parametrize("page", FOR_USERS, ids=by_name)
def test_every_command_and_option_named_exists(page: Path) -> None:
    commands = main.commands
    options = {name: _options(command) for name, command in commands.items()}
    every = set().union(*options.values(), _options(main))
    for span in spans(page):
        if named := re.search(r"(?:^|/|\s)notbugs((?: +-[\w-]+)*) +(\w+)(?=\s|$)(.*)", span):
            before, command, rest = named.groups()
            assert command in commands, f"{page.name}: {span}"
            asked = set(re.findall(r"(?<!\S)--?[a-z][\w-]*", rest.partition("#")[0]))
            assert asked <= options[command] | {"--help"}, f"{page.name}: {span}"
            assert set(before.split()) <= _options(main), f"{page.name}: {span}"
        elif option := re.match(r"--[a-z][\w-]*", span):
            assert option[0] in every, f"{page.name}: {span}"


def test_the_table_of_commands_has_each() -> None:
    table = (ROOT / "docs/commands.md").read_text(encoding="utf-8").partition("\n## ")[0]
    named = [re.findall(r"`(?:notbugs )?(\w+)", line.split("|")[1]) for line in table.splitlines() if line[:3] == "| `"]
    assert {name for line in named for name in line} == set(main.commands)


def _options(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts if name.startswith("-")}


@pytest.mark.parametrize("page", FOR_USERS, ids=by_name)
def test_python_shown_compiles(page: Path) -> None:
    for body in fences(page, "python"):
        compile(body, page.name, "exec")


def test_the_blocks_of_the_readme_lead_from_photographs_to_a_network_and_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied in order into a folder with photographs; in the place of a run, the experiment is read."""
    for split, label in itertools.product(("train", "val"), ("ant", "bee")):
        (tmp_path / "photos" / split / label).mkdir(parents=True)
        Image.new("RGB", (96, 80)).save(tmp_path / "photos" / split / label / "one.png")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    path = text[text.index("## Your own photographs") : text.index("## The shards in your own training")]
    archs = list[str | None]()
    for language, body in FENCE.findall(path):
        if language:
            (name,) = re.findall(r"`([\w.]+)`\n\n```" + language, path)
            Path(name).write_text(body, encoding="utf-8")
        for words in () if language else (shlex.split(line, comments=True) for line in body.splitlines()):
            if words[:2] == ["notbugs", "run"]:
                archs += [node.arch for node in build(spec.read(Path(words[2]))) if node.name == "standard"]
            elif words[:2] == ["notbugs", "init"]:
                assert CliRunner().invoke(main, words[1:]).exit_code == 0
    assert archs == ["fast_resnet", "nets:net", "nets:net", "nets:net"]
    assert runpy.run_path("nets.py")["net"](2, 3)(torch.zeros(2, 3, 64, 64)).shape == (2, 2)


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    lists = re.findall(r"^```{toctree}\n(.*?)^```$", index, re.MULTILINE | re.DOTALL)
    listed = {line for body in lists for line in body.splitlines() if line and not line.startswith(":")}
    assert listed == {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}, "docs/index.md lists every page"


def test_results_without_a_record_have_the_command_and_the_commit_that_made_them() -> None:
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    sections = re.split("^## ", text, flags=re.MULTILINE)[1:]
    for section in sections:
        title = section.partition("\n")[0]
        if "<!-- table:" not in section:
            assert re.search(r"commits? [0-9a-f]{7}\b", section), f"{title}: which commit made it?"
            assert re.search(r"^(git .* && |\(.*\| |)(notbugs run|python -m)|`pytest", section, re.M), f"{title}: how?"
    assert len(sections) > 5


RECORDS = sorted((ROOT / "docs/figures").glob("*.json"))


@pytest.fixture(scope="module")
def figures() -> Any:
    place = importlib.util.spec_from_file_location("make_figures", ROOT / "docs/make_figures.py")
    assert place is not None and place.loader is not None
    place.loader.exec_module(module := importlib.util.module_from_spec(place))
    return module


def test_every_marked_table_is_what_its_record_says(figures: Any) -> None:
    marked: set[str] = set()
    for page in figures.pages():
        text = page.read_text(encoding="utf-8")
        assert figures.rendered(text) == text, f"{page.name}: run `make docs`"
        marked |= {found[1] for found in figures.TABLE.finditer(text)}
        assert text.count("\n<!-- table:") == len(figures.TABLE.findall(text)), f"{page.name} marks what is no table"
    assert marked == {record.stem for record in RECORDS}


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.stem)
def test_a_record_is_of_the_configuration_as_it_is(record: Path) -> None:
    recorded = json.loads(record.read_text(encoding="utf-8"))
    nodes = build(spec.read(ROOT / f"configs/{record.stem}.yaml"))
    part = set(recorded["commits"]) < {node.name for node in nodes if node.group == "evaluations"}
    now = {node.id: node.version for node in wanted(nodes, tuple(recorded["commits"]) if part else ())}
    assert recorded["versions"] == now, f"run `make figures FIGURES={record.stem}`"


def test_of_an_older_record_only_evaluations_that_did_not_change_are_kept(figures: Any) -> None:
    """One other version dropped every evaluation of an experiment from its record."""

    def nodes(steps: int) -> list[Node]:
        clean = {"load": {"source": "sklearn-digits"}}
        attack = {"images": "clean", "model": "net", "eps": 0.5, "steps": steps}
        train = {"on": "clean", "arch": "small_cnn"}
        return build(spec.parse({
            "name": "parts",
            "datasets": {"clean": clean, "other": {"attack": attack, "relabel": "other"}},
            "models": {"net": {"train": train}, "from_other": {"train": train | {"on": "other"}}},
            "evaluations": {
                "source": {"models": ["net"], "on": "clean"},
                "accuracy": {"models": ["from_other"], "on": "clean"},
                "both": {"models": ["net", "from_other"], "on": "clean"},
            },
        }))  # fmt: skip

    def part(evaluation: str, commit: str, steps: int) -> dict[str, Any]:
        versions = {node.id: node.version for node in wanted(nodes(steps), (evaluation,))}
        return {
            "commits": {evaluation: commit},
            "versions": versions,
            "rows": [{"evaluation": evaluation, "made_at": commit}],
        }

    def together(before: dict[str, Any], *more: tuple[str, str, int]) -> dict[str, Any]:
        for evaluation, commit, steps in more:
            before = figures.joined(before, part(evaluation, commit, steps), nodes(steps))
        return before

    first = together(part("source", "a", 5), ("accuracy", "b", 5), ("both", "c", 5))
    assert first["commits"] == {"source": "a", "accuracy": "b", "both": "c"}
    assert first["versions"] == {node.id: node.version for node in nodes(5)}
    again = together(first, ("both", "d", 5))
    assert [row["made_at"] for row in again["rows"]] == ["b", "d", "a"]
    changed = together(first, ("both", "e", 9))
    assert changed["commits"] == {"source": "a", "both": "e"}
    assert changed["versions"].items() < {node.id: node.version for node in nodes(9)}.items()
    assert [row["made_at"] for row in changed["rows"]] == ["e", "a"]
    assert together(part("both", "f", 5), ("both", "g", 9)) == part("both", "g", 9), "nothing is kept, nor added"


def test_the_citation_is_of_this_release() -> None:
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert version and cited and version[1] == cited[1]
