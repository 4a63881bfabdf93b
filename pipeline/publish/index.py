"""``index.html``: the whole store on one self-contained page of less than 2 MB, whatever the size of the store."""

import base64
import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from pipeline.experiment.graph import GROUPS
from pipeline.publish import card, croissant, pictures
from pipeline.report.results import Results
from pipeline.report.scores import percent
from pipeline.run import artifacts, documents, runs, tags
from pipeline.run.artifacts import Artifact
from pipeline.store import Store, at_once
from pipeline.terminal import size, visible
from stages.errors import BadInput

NAME = "index.html"

TEMPLATE = Path(__file__).with_name("index.html")

RUNS = 300
"""Runs that are read; the page lists the newest."""

TEXT = 250_000
"""Bytes of a table's text in the page, at most; there are four tables."""

PICTURE, PICTURES = 40_000, 600_000
"""Bytes of a dataset's picture, and of all pictures in the page, at most."""

BEGINNING = 64_000
"""Bytes of a run's page in which its verdict is looked for."""

SCORES = 4
"""Scores told of an evaluation."""

VERDICT = re.compile(r'<p class="verdict"[^>]*>(.*?)</p>', re.DOTALL)


@dataclass(frozen=True)
class Link:
    """Text, and where it leads: a path relative to the page, or an anchor in it."""

    text: str
    path: str


@dataclass(frozen=True)
class Line:
    """A line of a table: an anchor, and cells of text and links."""

    anchor: str
    cells: Sequence[Sequence[str | Link]]

    @property
    def bytes(self) -> int:
        """Its size in the page, roughly but never less."""
        parts = [part for cell in self.cells for part in cell]
        texts = [text for p in parts for text in ((p.text, p.path) if isinstance(p, Link) else (p,))]
        return sum(len(html.escape(text).encode()) for text in [self.anchor, *texts]) + 80 + 40 * len(parts)


@dataclass(frozen=True)
class Table:
    """The newest lines of a table, as many as fit."""

    title: str
    head: Sequence[str]
    lines: Sequence[Line]
    more: int


@dataclass(frozen=True)
class Shown:
    """A dataset's picture."""

    name: str
    text: str
    anchor: str
    card: str
    url: str


def write(store: Store) -> str:
    """Write the page; returns its path in the store.

    Raises:
        BadInput: there is nothing in the store.
    """
    if not any(store.folders(folder) for folder in (*GROUPS, "runs")):
        raise BadInput(f"there is nothing in {store.url} to list: `notbugs run FILE` makes something")
    store.put(NAME, render(store).encode())
    return NAME


def render(store: Store) -> str:
    """The page as HTML."""
    made, tagged = _newest(store), tags.by_folder(tags.every(store))
    by_group = {group: [one for one in made if one.manifest["group"] == group] for group in GROUPS}
    folders, known = [one.folder for one in by_group["datasets"]], {one.folder for one in made}
    there = dict(zip(folders, at_once(store.files, folders), strict=True))

    def line(one: Artifact) -> Line:
        return _line(store, one, there.get(one.folder, {}), tagged.get(one.folder, []), known)

    tables = [
        _runs(store),
        *(_table(group.capitalize(), HEADS[group], at_once(line, each)) for group, each in by_group.items()),
    ]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["is_link"] = lambda part: isinstance(part, Link)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        store=store.url,
        total=size(sum(one.manifest["bytes"] for one in made)),
        counts={group: len(each) for group, each in by_group.items()},
        tables=[table for table in tables if table.lines],
        pictures=_pictures(store, by_group["datasets"], there),
        notbugs=artifacts.version("notbugs"),
    )
    return "\n".join(map(visible, text.split("\n")))


def _newest(store: Store) -> list[Artifact]:
    """Every finished node, newest first; of its manifest what the page tells, since those of all nodes are large."""

    def read(folder: str) -> Artifact | None:
        manifest = artifacts.manifest_at(store, folder)
        if manifest is None:
            return None
        rest = {key: value for key, value in manifest.items() if key not in ("files", "shards")}
        held = () if "at" in manifest else manifest["files"]  # the files lie in the folder that it points at
        return Artifact(folder, rest | {"bytes": sum(file["bytes"] for file in held)})

    found = at_once(read, artifacts.folders(store))
    return sorted(filter(None, found), key=lambda one: str(one.manifest["made"]), reverse=True)


def _anchor(folder: str) -> str:
    return folder.replace("/", "-")


def _table(title: str, head: Sequence[str], lines: Sequence[Line], unread: int = 0) -> Table:
    shown, left = list[Line](), TEXT
    for line in lines:
        if (left := left - line.bytes) < 0:
            break
        shown.append(line)
    return Table(title, head, shown, len(lines) - len(shown) + unread)


# ----------------------------------------------------------------------------------------------- nodes

HEADS = {
    "datasets": ("dataset", "tags", "made", "samples", "size", "attack success rate", "made from", "read"),
    "models": ("model", "tags", "made", "network", "size", "made from"),
    "evaluations": ("evaluation", "tags", "made", "accuracy", "size", "made from"),
}


def _line(store: Store, one: Artifact, there: Mapping[str, int], tagged: Sequence[str], known: set[str]) -> Line:
    """The line of a node.

    Args:
        store, one: the store, and the node.
        there: files in its folder.
        tagged: its tags.
        known: folders that have a line.
    """
    manifest = one.manifest
    begin: list[list[str | Link]] = [[f"{manifest['name']} {manifest['version'][:8]}…"], [", ".join(sorted(tagged))]]
    about: dict[str, Callable[[], list[list[str | Link]]]] = {
        "datasets": lambda: [[", ".join(f"{split} {count:,}" for split, count in manifest["counts"].items())]],
        "models": lambda: [[manifest["design"]["arch"]]],
        "evaluations": lambda: [[_scores(store, one)]],
    }
    middle = about[manifest["group"]]()
    after: list[list[str | Link]] = [[size(manifest["bytes"])]]
    if manifest["group"] == "datasets":
        after.append([percent(manifest["success_rate"]) if "success_rate" in manifest else "–"])
    after.append(_parents(manifest, known))
    if manifest["group"] == "datasets":
        names = {card.NAME: "card", croissant.NAME: "Croissant"}
        after.append([Link(text, f"{one.folder}/{name}") for name, text in names.items() if name in there])
    return Line(_anchor(one.folder), [*begin, [_moment(manifest["made"])], *middle, *after])


def _moment(made: str) -> str:
    return made[:16].replace("T", " ")


def _parents(manifest: Mapping[str, Any], known: set[str]) -> list[str | Link]:
    cell: list[str | Link] = []
    for parent in manifest["parents"].values():
        folder = f"{parent['node']}/{parent['version']}"
        name = parent["node"].partition("/")[2]
        cell.append(Link(name, f"#{_anchor(folder)}") if folder in known else name)
    return cell or ["–"]


def _scores(store: Store, one: Artifact) -> str:
    """The best accuracies of an evaluation."""
    found = documents.find(store, f"{one.manifest.get('at', one.folder)}/result.json", Results)
    rows = [row for row in found["rows"] if "accuracy" in row] if found else []
    best = sorted(rows, key=lambda row: -row["accuracy"])
    told = [f"{row['model']} {percent(row['accuracy'])}" for row in best[:SCORES]]
    more = [f"{len(best) - SCORES} more"] if len(best) > SCORES else []
    return ", ".join([*told, *more]) or "–"


def _pictures(store: Store, made: Sequence[Artifact], there: Mapping[str, Mapping[str, int]]) -> list[Shown]:
    """The pictures of the newest datasets, as many as fit."""
    chosen, left = list[Artifact](), PICTURES
    for one in made:
        length = there[one.folder].get(pictures.NAME, PICTURE + 1)
        if length <= PICTURE and left > 2 * length:
            chosen.append(one)
            left -= 2 * length  # Base64 takes four bytes for three, and the text around it a few hundred
    read = store.find_all(f"{one.folder}/{pictures.NAME}" for one in chosen)
    shown = []
    for one in chosen:
        content = read[f"{one.folder}/{pictures.NAME}"]
        if content is not None and len(content) <= PICTURE and content[:4] == b"RIFF":
            rate = one.manifest.get("success_rate")
            counts = sum(one.manifest["counts"].values())
            text = f"{counts:,} images" + (f", {percent(rate)} reached" if rate is not None else "")
            url = f"data:image/webp;base64,{base64.b64encode(content).decode()}"
            where = f"{one.folder}/{card.NAME}" if card.NAME in there[one.folder] else ""
            shown.append(Shown(one.manifest["name"], text, _anchor(one.folder), where, url))
    return shown


# ------------------------------------------------------------------------------------------------ runs


def _runs(store: Store) -> Table:
    names = runs.names(store)
    found = [run for run in at_once(lambda name: runs.find(store, name), names[:RUNS]) if run is not None]
    heads = at_once(lambda run: store.find(f"runs/{run['run']}/report.html", BEGINNING), found)
    head = ("run", "state", "started", "nodes", "verdict")
    lines = [_run(run, page) for run, page in zip(found, heads, strict=True)]
    return _table("Runs", head, lines, len(names) - len(found))


def _run(run: Mapping[str, Any], page: bytes | None) -> Line:
    states = [progress["state"] for progress in run["nodes"].values()]
    made = sum(state in ("done", "cached") for state in states)
    said = VERDICT.search(page.decode(errors="replace")) if page else None
    verdict = " ".join(html.unescape(re.sub(r"<[^>]*>", "", said[1])).split()) if said else ""
    name: str | Link = Link(run["run"], f"runs/{run['run']}/report.html") if page else run["run"]
    started = _moment(run["started"])
    return Line(f"run-{run['run']}", [[name], [run["state"]], [started], [f"{made} of {len(states)}"], [verdict]])
