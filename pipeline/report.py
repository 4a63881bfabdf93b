"""What a run found, as rows and as text."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from pipeline.store import Store
from pipeline.sweeps import SEED, name_at, split_name


def result_rows(store: Store, run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per evaluation and model of a run that are there: what `notbugs show --json` gives.

    Each has ``kind``, ``evaluation``, ``model`` and ``trained_on``. Of kind accuracy: ``accuracy``, ``low``, ``high``
    (a 95 % interval) and ``n``; besides ``target_reached`` of the dataset trained on, ``chance``, ``majority``,
    ``per_class``, ``under_attack`` and, where asked for, ``agreement``. Of kind usefulness: ``counts`` and ``points``.
    """
    nodes, rows = run["nodes"], []
    for node, progress in nodes.items():
        if node.startswith("evaluations/") and progress["state"] in ("done", "cached"):
            result = store.find_json(f"{node}/{progress['version']}/result.json")
            for row in (result or {}).get("rows", []):
                reached = _dataset(store, nodes, row["trained_on"]).get("reached")
                rows.append({"kind": "accuracy", **row, "target_reached": reached})
    return rows


def _dataset(store: Store, nodes: Mapping[str, Any], name: str | None) -> Mapping[str, Any]:
    progress = nodes.get(f"datasets/{name}")
    found = progress and store.find_json(f"datasets/{name}/{progress['version']}/manifest.json")
    return found or {}


def over_seeds(rows: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Rows put together that differ in the seed alone, in the order of their first."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        names = (without_seed(row[key] or "") for key in ("evaluation", "model"))
        groups.setdefault((row["kind"], *names), []).append(row)
    return list(groups.values())


def without_seed(name: str) -> str:
    """``rand@eps=0.5,seed=1`` → ``rand@eps=0.5``."""
    base, point = split_name(name)
    return name_at(base, {axis: value for axis, value in point.items() if axis != SEED})


def result_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a person reads them: accuracies; then, where there are any, attacks, transfer, and features."""
    accuracy = [row for row in rows if row["kind"] == "accuracy"]
    features = [row for row in rows if row["kind"] == "usefulness"]
    parts = {
        "": result_table(accuracy),
        "average and worst case": attack_table(accuracy),
        **transfer_tables(accuracy),
        "features, one class against the rest": feature_table(features),
    }
    return "\n\n".join(f"{title}\n{text}" if title else text for title, text in parts.items() if text)


def result_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Clean accuracy; rows that differ in the seed alone are one, with mean and standard deviation."""
    groups = over_seeds(rows)
    head = ["trained on", "target reached", "learner", "clean accuracy", "95 % interval", "chance"]
    several = len({without_seed(row["evaluation"]) for row in rows}) > 1
    if any(row["majority"] > 1.5 * row["chance"] for row in rows):  # unbalanced: chance flatters
        head.append("constant answer")
    rules = list(dict.fromkeys(row["agreement"]["rule"] for row in rows if "agreement" in row))
    lines = []
    for group in groups:
        row = group[0]
        lines.append(
            ([without_seed(row["evaluation"])] if several else [])
            + [
                without_seed(row["trained_on"] or "elsewhere"),
                spread(r["target_reached"] for r in group),
                without_seed(row["model"]),
                spread(r["accuracy"] for r in group),
                f"{percent(row['low'])} – {percent(row['high'])}" if len(group) == 1 else f"{len(group)} seeds",
                percent(row["chance"]),
            ]
            + ([percent(row["majority"])] if "constant answer" in head else [])
            + [spread(_agreement(r, rule) for r in group) for rule in rules]
        )
    return table((["evaluation"] if several else []) + head + [f"agrees with {rule}" for rule in rules], lines)


def _agreement(row: Mapping[str, Any], rule: str) -> float | None:
    found = row.get("agreement", {})
    return float(found["accuracy"]) if found.get("rule") == rule else None


def attack_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Average beside worst case: noise of the same size beside the attack, the mean transformation beside the worst."""
    lines = []
    for group in over_seeds(rows):
        for attacks in zip(*(row["under_attack"] for row in group), strict=True):
            if attacks[0].get("source") is not None:
                continue
            gap = [a["average"] - a["accuracy"] for a in attacks]
            reached = spread(a.get("reached") for a in attacks)
            each = [spread(a[key] for a in attacks) for key in ("average", "accuracy")]
            lines.append([without_seed(group[0]["model"]), attack_name(attacks[0]), *each, spread(gap), reached])
    head = ["model", "under", "average case", "worst case", "gap", "target reached"]
    if all(line[-1] == "–" for line in lines):
        head, lines = head[:-1], [line[:-1] for line in lines]
    return table(head, list(dict.fromkeys(map(tuple, lines))))


def transfer_tables(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """For each transfer attack a matrix: made on the model of the row, scored on the model of the column."""
    cells: dict[str, dict[tuple[str, str], list[float | None]]] = {}
    for row in rows:
        for attack in row["under_attack"]:
            if attack.get("source") is not None:
                title = f"{'fooled' if attack['toward'] is None else 'target reached'} by {attack_name(attack)} made on"
                cell = (without_seed(attack["source"]), without_seed(row["model"]))
                value = attack["fooled" if attack["toward"] is None else "reached"]
                cells.setdefault(title, {}).setdefault(cell, []).append(value)
    return {title: _matrix(found) for title, found in cells.items()}


def _matrix(cells: Mapping[tuple[str, str], list[float | None]]) -> str:
    sources, models = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    return table(["", *models], [[s, *(spread(cells.get((s, m), [])) for m in models)] for s in sources])


def feature_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many pairs of a feature and a class are useful and robust, useful and not robust, useless."""
    kinds = ("robust", "non_robust", "useless")
    lines = []
    for group in over_seeds(rows):
        shares = [spread(r["counts"][kind] / sum(r["counts"].values()) for r in group) for kind in kinds]
        row = group[0]
        ball = f"{NORMS[row['norm']]} ε {row['eps']:g}"
        lines.append([without_seed(row["model"]), f"{row['features']} × {len(row['classes'])}", ball, *shares])
    return table(["model", "features × classes", "ball", "useful, robust", "useful, not robust", "useless"], lines)


def attack_name(attack: Mapping[str, Any]) -> str:
    """An attack in a few words."""
    if attack["attack"] == "spatial":
        how = "grid" if attack["search"] == "grid" else "worst"
        return f"±{attack['rotation']:g}°, ±{100 * attack['translation']:g} %, {how} of {attack['tries']}"
    toward = f", toward {attack['toward']}" if attack["toward"] else ""
    restarts = f" × {attack['restarts']}" if attack["restarts"] > 1 else ""
    method = "" if attack["attack"] == "pgd" else "APGD "
    return f"{method}{NORMS[attack['norm']]} ε {attack['eps']:g}, {attack['steps']} steps{restarts}{toward}"


NORMS = {"l2": "L2", "linf": "L∞"}


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def spread(shares: Iterable[float | None]) -> str:
    """One share, or the mean and the standard deviation of several."""
    found = [share for share in shares if share is not None]
    if len(found) < 2:
        return percent(found[0] if found else None)
    return f"{100 * mean(found):.1f} ± {100 * stdev(found):.1f} %"


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
    if "distance_mean" in manifest:
        lines.append(f"  mean distance of the features {manifest['distance_mean']:.3f}")
    if "design" in manifest:
        design = manifest["design"]
        lines.append(f"  {design['arch']}, {'×'.join(map(str, design['shape']))} → {design['classes']} classes")
    return lines
