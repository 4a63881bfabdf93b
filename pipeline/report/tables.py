"""Results and manifests as text tables, for a terminal of some width or for a file."""

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.results import dataset_manifest
from pipeline.report.scores import (
    FEATURES,
    NOISE,
    SUCCESS,
    SUCCESS_RATE,
    Columns,
    Row,
    attack_columns,
    attacked,
    ball,
    by_seed,
    feature_shares,
    merged,
    percent,
    result_columns,
    results,
    shown,
    transfers,
    without_seed,
)
from pipeline.store import Store
from pipeline.terminal import size, visible

IMPORTANCE = ("learner", "model", "under", "clean accuracy", "accuracy", "worst case", "trained on", "95 % interval",
              SUCCESS, "average case", "chance", "scored on", "gap", "constant prediction")  # fmt: skip
"""Columns of results, the most important first: where a terminal is narrow, the others give way."""

HEADLINE = 4
"""Columns that names are cut for: those of the headline are learner, accuracy, dataset and interval."""

SHORTER = {
    SUCCESS: "success",
    "clean accuracy": "accuracy",
    "95 % interval": "95 %",
    "constant prediction": "constant",
    "average case": "average",
    "worst case": "worst",
    "workers busy": "busy",
    "device-hours": "hours",
}
"""Headings of a narrow terminal."""


def headline(rows: Sequence[Row], width: int, everything: str) -> str:
    """The accuracies alone, each measurement once, and what else there is.

    Args:
        rows: as for `result_text`.
        width: of the terminal.
        everything: the command that shows the rest.
    """
    scores = results(rows)
    columns = {name: cells for name, cells in result_columns(merged(scores)).items() if name != "evaluation"}
    others = {
        "under attack": len(attacked(scores)),
        "transfer": len(transfers(scores)),
        "features": sum(row["kind"] == "usefulness" for row in rows),
    }
    more = ", ".join(name for name, count in others.items() if count)
    lines = [_of_columns(columns, width), f"more, {more}: {everything}" if more else ""]
    return "\n\n".join(filter(None, lines))


def result_text(rows: Sequence[Row], width: int | None = None) -> str:
    """The rows as tables: accuracies, then attacks, transfer and features if there are any.

    Args:
        rows: of ``result.json``.
        width: of the terminal; None for complete tables, however wide.
    """
    scores = results(rows)
    features = [row for row in rows if row["kind"] == "usefulness"]
    parts = [
        ("", _of_columns(result_columns(merged(scores)), width)),
        (
            f"average case ({NOISE}, or all rotations and shifts tried) and worst case",
            _of_columns(attack_columns(attacked(scores)), width),
        ),
        *((transfer.title, fitted(*transfer.table(), width)) for transfer in transfers(scores)),
        ("features, one class against the rest", feature_table(features, width)),
    ]
    return "\n\n".join(f"{_wrapped(title, width)}\n{text}" if title else text for title, text in parts if text)


def feature_table(rows: Sequence[Row], width: int | None = None) -> str:
    """Shares of the feature–class pairs that are useful and robust, useful and not robust, and useless."""
    lines = []
    for same in by_seed(rows):
        row, shares = same[0], feature_shares(same)
        pairs = f"{row['features']} × {len(row['classes'])}"
        lines.append([without_seed(row["model"]), pairs, ball(row), *(shown(shares[kind]) for kind in FEATURES)])
    head = ["model", "features × classes", "ball", *FEATURES.values()]
    return fitted(head, lines, width, ("model", *FEATURES.values()))


def _of_columns(columns: Columns, width: int | None) -> str:
    return fitted(list(columns), list(zip(*columns.values(), strict=True)), width, IMPORTANCE)


def _wrapped(text: str, width: int | None) -> str:
    return textwrap.fill(text, width, break_on_hyphens=False) if width else text


def fitted(
    head: Sequence[str], lines: Sequence[Sequence[str]], width: int | None, importance: Sequence[str] = ()
) -> str:
    """A table that is no wider than the terminal: headings, intervals and names become shorter, then columns give way.

    An empty column is left out. What gave way stands below: the value, where it is the same in every line, else the
    heading.

    Args:
        head, lines: as for `table`.
        width: of the terminal; None for a complete table, however wide.
        importance: headings, the most important first; those that are not among them follow, in their order.
    """
    columns = {name: [visible(line[i]) for line in lines] for i, name in enumerate(head)}
    if width is None or not lines or _width(columns, {}) <= width:
        return table(head, lines)
    columns = {name: list(map(_one_sign, cells)) for name, cells in columns.items() if any(cells)}
    order = [name for name in (*importance, *head) if name in columns]
    needed = order[: min(HEADLINE, len(importance))]
    kept, given_way = _kept(columns, width, order)
    longest = max((len(cell) for cells in columns.values() for cell in cells), default=0)
    for most in range(longest - 1, width // 4, -1):
        if all(name in kept for name in needed):
            break
        cut = {name: [_without_middle(cell, most) for cell in cells] for name, cells in columns.items()}
        if any(len(set(cut[name])) < len(set(columns[name])) for name in columns):
            break  # two names would look alike
        kept, given_way = _kept(cut, width, order)
    shown = table([SHORTER.get(name, name) for name in kept], list(zip(*kept.values(), strict=True)))
    return "\n".join([*(line[:width] for line in shown.splitlines()), *_notes(given_way, head, width)])


def _notes(given_way: Sequence[str], head: Sequence[str], width: int) -> list[str]:
    same = [name for name in given_way if name not in head]
    hidden = [name for name in given_way if name in head]
    notes = [f"in every line: {', '.join(same)}"] if same else []
    notes += [f"left out for lack of width: {', '.join(hidden)}"] if hidden else []
    return [_wrapped(note, width) for note in notes]


def _width(columns: Mapping[str, Sequence[str]], headings: Mapping[str, str]) -> int:
    """Characters of a table's widest line, with other headings for some of its own."""
    return sum(max(map(len, (headings.get(name, name), *cells))) + 2 for name, cells in columns.items()) - 2


def _kept(columns: Mapping[str, list[str]], width: int, order: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The columns that fit, taken in an order of importance, and what is said of the others."""
    names: list[str] = []
    for name in order:
        if not names or _width({one: columns[one] for one in (*names, name)}, SHORTER) <= width:
            names.append(name)
    given_way = [
        f"{name} {cells[0]}" if len(cells) > 1 and len(set(cells)) == 1 else name
        for name, cells in columns.items()
        if name not in names
    ]
    return {name: cells for name, cells in columns.items() if name in names}, given_way


def _one_sign(cell: str) -> str:
    """``97.6 % – 99.7 %`` → ``97.6–99.7``."""
    return re.sub(r"^(\S+) % – (\S+) %$", r"\1–\2", cell)


def _without_middle(cell: str, most: int) -> str:
    """A long name with its beginning and its end, which tells the values of a sweep apart."""
    return cell if len(cell) <= most else f"{cell[: most // 2]}…{cell[len(cell) - (most - most // 2 - 1) :]}"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns of text, numbers right-aligned; one line of output per line, whatever its cells contain."""
    if not lines:
        return ""
    lines = [[visible(cell) for cell in line] for line in lines]
    columns = list(zip(head, *lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(cell[:1].isdigit() or cell in ("–", "") for cell in column[1:]) for column in columns]
    rule = ["─" * width for width in widths]
    aligned = [
        "  ".join(
            cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in (head, rule, *lines)
    ]
    return "\n".join(aligned)


def manifest_lines(manifest: Mapping[str, Any]) -> list[str]:
    """A dataset, model or evaluation in a few lines."""
    lines = [
        f"{manifest['group']}/{manifest['name']}  version {manifest['version']}  made {manifest['made']}",
        f"  content {manifest['content'][:16]}…  {len(manifest['files'])} files, "
        f"{size(sum(file['bytes'] for file in manifest['files']))}",
    ]
    lines += [f"  {role}: {parent['node']} {parent['version']}" for role, parent in manifest["parents"].items()]
    if "counts" in manifest:
        counts = ", ".join(f"{count} {split}" for split, count in manifest["counts"].items())
        shape = "×".join(map(str, manifest["image_shape"] or [])) or "of various sizes"
        lines.append(f"  {counts} images {shape}, {len(manifest['classes'])} classes, {manifest['failures']} left out")
    lines += [f"  {line}" for line in left_out_lines(manifest)]
    for split, share in manifest.get("majority", {}).items():
        lines.append(f"  majority class of {split}: {percent(share)}")
    if "l2_mean" in manifest:
        success = f"{SUCCESS_RATE} {percent(manifest['success_rate'])}, " if "success_rate" in manifest else ""
        lines.append(f"  {success}mean L2 {manifest['l2_mean']:.3f}, largest L∞ {manifest['linf_max']:.3f}")
    if "distance_mean" in manifest:
        lines.append(f"  mean distance of the features {manifest['distance_mean']:.3f}")
    if "design" in manifest:
        design = manifest["design"]
        lines.append(f"  {design['arch']}, {'×'.join(map(str, design['shape']))} → {design['classes']} classes")
    return lines


def left_out_of(store: Store, run: Mapping[str, Any]) -> list[str]:
    """Images of the sources that the datasets loaded by a run leave out: a line for each reason."""
    loaded = [node.partition("/")[2] for node, progress in run["nodes"].items() if progress["stage"] == "load"]
    manifests = {name: dataset_manifest(store, run, name) for name in loaded}
    return [f"datasets/{name}: {line}" for name, dataset in manifests.items() for line in left_out_lines(dataset)]


def left_out_lines(dataset: Mapping[str, Any]) -> list[str]:
    """Images of the source that a dataset, made or planned, leaves out: a line for each reason."""
    lines = [
        f"{one['images']:,} left out: {one['reason']}{'; the first: ' + one['first'] if 'first' in one else ''}"
        for one in dataset.get("left_out", [])
    ]
    if skipped := dataset.get("skipped"):
        lines.append(f"passed over: {', '.join(f'{count:,} {what}' for what, count in skipped.items())}")
    return lines
