"""What a run found, as rows and as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.store import Store


def result_rows(store: Store, run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per evaluation and model of a run that are there: what `notbugs show --json` gives.

    Each has ``evaluation``, ``model``, ``trained_on``, ``accuracy``, ``low``, ``high`` (a 95 % interval)
    and ``n``; besides ``target_reached`` of the dataset trained on, ``chance``, ``majority``,
    ``per_class``, ``under_attack`` and, where asked for, ``agreement``.
    """
    nodes, rows = run["nodes"], []
    for node, progress in nodes.items():
        if node.startswith("evaluations/") and progress["state"] in ("done", "cached"):
            result = store.find_json(f"{node}/{progress['version']}/result.json")
            for row in (result or {}).get("rows", []):
                reached = _dataset(store, nodes, row["trained_on"]).get("reached")
                rows.append({**row, "target_reached": reached})
    return rows


def _dataset(store: Store, nodes: Mapping[str, Any], name: str | None) -> Mapping[str, Any]:
    progress = nodes.get(f"datasets/{name}")
    found = progress and store.find_json(f"datasets/{name}/{progress['version']}/manifest.json")
    return found or {}


def result_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a person reads them."""
    head = ["trained on", "target reached", "learner", "clean accuracy", "95 % interval", "chance"]
    several = len({row["evaluation"] for row in rows}) > 1
    if any(row["majority"] > 1.5 * row["chance"] for row in rows):  # unbalanced: chance flatters
        head.append("constant answer")
    extra = list(dict.fromkeys(name for row in rows for name, _ in _extras(row)))
    lines = []
    for row in rows:
        more = dict(_extras(row))
        lines.append(
            ([row["evaluation"]] if several else [])
            + [
                row["trained_on"] or "elsewhere",
                percent(row["target_reached"]),
                row["model"],
                percent(row["accuracy"]),
            ]
            + [f"{percent(row['low'])} – {percent(row['high'])}", percent(row["chance"])]
            + ([percent(row["majority"])] if "constant answer" in head else [])
            + [percent(more.get(name)) for name in extra]
        )
    return table((["evaluation"] if several else []) + head + extra, lines)


def _extras(row: Mapping[str, Any]) -> list[tuple[str, float]]:
    found = [(f"{_norm(a['norm'])} ε {a['eps']:g}, {a['steps']} steps", a["accuracy"]) for a in row["under_attack"]]
    if "agreement" in row:
        found.append((f"agrees with {row['agreement']['rule']}", row["agreement"]["accuracy"]))
    return found


def _norm(norm: str) -> str:
    return {"l2": "L2", "linf": "L∞"}[norm]


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns of text, numbers to the right."""
    if not lines:
        return ""
    columns = list(zip(head, *lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(cell[:1].isdigit() or cell in ("–", "") for cell in column[1:]) for column in columns]
    rule = ["─" * width for width in widths]
    shown = [
        "  ".join(
            cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in (head, rule, *lines)
    ]
    return "\n".join(shown)


def manifest_lines(manifest: Mapping[str, Any]) -> list[str]:
    """A dataset, model or evaluation in a few lines."""
    size = sum(file["bytes"] for file in manifest["files"])
    lines = [
        f"{manifest['group']}/{manifest['name']}  version {manifest['version']}  made {manifest['made']}",
        f"  content {manifest['content'][:16]}…  {len(manifest['files'])} files, {size / 1e6:.1f} MB",
    ]
    for role, parent in manifest["parents"].items():
        lines.append(f"  {role}: {parent['node']} {parent['version']}")
    if "counts" in manifest:
        counts = ", ".join(f"{count} {split}" for split, count in manifest["counts"].items())
        shape = "×".join(map(str, manifest["image_shape"] or [])) or "of differing sizes"
        lines.append(f"  {counts} images {shape}, {len(manifest['classes'])} classes, {manifest['failures']} left out")
    for split, share in manifest.get("majority", {}).items():
        lines.append(f"  majority class of {split}: {percent(share)}")
    if "l2_mean" in manifest:
        reached = f"target reached {percent(manifest['reached'])}, " if "reached" in manifest else ""
        lines.append(f"  {reached}mean L2 {manifest['l2_mean']:.3f}, largest L∞ {manifest['linf_max']:.3f}")
    if "design" in manifest:
        design = manifest["design"]
        lines.append(f"  {design['arch']}, {'×'.join(map(str, design['shape']))} → {design['classes']} classes")
    return lines
