"""Results and manifests as text tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.results import dataset_manifest
from pipeline.report.scores import (
    FEATURES,
    NOISE,
    SUCCESS_RATE,
    Columns,
    Result,
    Row,
    attack_columns,
    attacked,
    ball,
    by_seed,
    feature_shares,
    percent,
    result_columns,
    results,
    shown,
    transfers,
    without_seed,
)
from pipeline.store import Store
from pipeline.terminal import size, visible


def result_text(rows: Sequence[Row]) -> str:
    """The rows as tables: accuracies, then attacks, transfer and features if there are any."""
    scores = results(rows)
    features = [row for row in rows if row["kind"] == "usefulness"]
    parts = [
        ("", result_table(scores)),
        (f"average case ({NOISE}, or all rotations and shifts tried) and worst case", attack_table(scores)),
        *((transfer.title, table(*transfer.table())) for transfer in transfers(scores)),
        ("features, one class against the rest", feature_table(features)),
    ]
    return "\n\n".join(f"{title}\n{text}" if title else text for title, text in parts if text)


def result_table(scores: Sequence[Result]) -> str:
    """Accuracy of every model, over its seeds."""
    return _of_columns(result_columns(scores))


def attack_table(scores: Sequence[Result]) -> str:
    """Average beside worst case of every attack on every model."""
    return _of_columns(attack_columns(attacked(scores)))


def feature_table(rows: Sequence[Row]) -> str:
    """Shares of the feature–class pairs that are useful and robust, useful and not robust, and useless."""
    lines = []
    for same in by_seed(rows):
        row, shares = same[0], feature_shares(same)
        pairs = f"{row['features']} × {len(row['classes'])}"
        lines.append([without_seed(row["model"]), pairs, ball(row), *(shown(shares[kind]) for kind in FEATURES)])
    return table(["model", "features × classes", "ball", *FEATURES.values()], lines)


def _of_columns(columns: Columns) -> str:
    return table(list(columns), list(zip(*columns.values(), strict=True)))


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
