"""What a run found, as rows and as text."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.report.scores import (
    KINDS,
    NOISE,
    Result,
    Row,
    accuracy_head,
    attacked,
    ball,
    feature_shares,
    over_seeds,
    percent,
    results,
    rules,
    scored_on,
    shown,
    transfers,
    unbalanced,
    without_seed,
)
from pipeline.run import artifacts, documents
from pipeline.run.documents import Amount, Count, Document, NodeName, Share, Word
from pipeline.store import Store
from pipeline.terminal import visible


class _Scored(Document):
    """A share of some images, with its interval."""

    accuracy: Share
    low: Share
    high: Share
    n: Count


class _Agreement(_Scored):
    rule: Word


class _OfClass(Document):
    accuracy: Share | None
    n: Count


class _Attacked(_Scored):
    average: Share
    fooled: Share | None


class _InBall(_Attacked):
    attack: Literal["pgd", "apgd"]
    norm: Literal["l2", "linf"]
    eps: Amount
    steps: Count
    step_size: Amount | None = None
    restarts: Count
    surrogate: NodeName | None
    target_rule: Word | None
    success_rate: Share | None = None


class _Turned(_Attacked):
    attack: Literal["spatial"]
    rotation: Amount
    translation: Amount
    search: Literal["grid", "random"]
    tries: Count


class _Row(Document):
    evaluation: NodeName
    on: NodeName
    split: Word
    held_out: bool
    model: NodeName
    trained_on: NodeName | None


class _Accuracy(_Row, _Scored):
    kind: Literal["accuracy"]
    chance: Share
    majority: Share
    per_class: dict[str, _OfClass]
    under_attack: list[_InBall | _Turned]
    agreement: _Agreement | None = None


class _Usefulness(_Row):
    kind: Literal["usefulness"]
    n: Count
    attacked: Count
    norm: Literal["l2", "linf"]
    eps: Amount
    steps: Count
    useful: Share
    features: Count
    classes: list[str]
    useful_from: list[Share | None]
    counts: dict[Word, Count]
    features_by_best_class: dict[Word, Count]
    points: list[tuple[Count, Count, float, float]]


class Results(Document):
    """``result.json``: a row per model."""

    rows: list[Annotated[_Accuracy | _Usefulness, Field(discriminator="kind")]]


def result_rows(store: Store, run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per evaluation and model of a run that are there: what `notbugs show --json` gives.

    Each has ``kind``, ``evaluation``, the dataset ``on`` and its ``split``, ``held_out`` (whether these are images as
    they were loaded, of a split that the model was not trained on), ``model`` and ``trained_on``. Of kind accuracy:
    ``accuracy``, ``low``, ``high`` (a 95 % interval) and ``n``; ``attack_success_rate`` of the dataset trained on,
    ``chance``, ``majority``, ``per_class``, ``under_attack`` and, where asked for, ``agreement``. Of kind usefulness:
    ``counts`` and ``points``.

    Raises:
        BadData: a result is damaged.
    """
    nodes, rows, success = run["nodes"], [], dict[str | None, float | None]()
    for node, progress in nodes.items():
        if node.startswith("evaluations/") and progress["state"] in ("done", "cached"):
            for row in documents.read(store, f"{node}/{progress['version']}/result.json", Results)["rows"]:
                if (on := row["trained_on"]) not in success:  # many rows of a sweep go back to one dataset
                    success[on] = _dataset(store, nodes, on).get("success_rate")
                rows.append({"kind": "accuracy", **row, "attack_success_rate": success[on]})
    return rows


def _dataset(store: Store, nodes: Mapping[str, Any], name: str | None) -> Mapping[str, Any]:
    progress = nodes.get(f"datasets/{name}")
    return (progress and artifacts.manifest_at(store, f"datasets/{name}/{progress['version']}")) or {}


def result_text(rows: Sequence[Row]) -> str:
    """The rows as a person reads them: accuracies; then, where there are any, attacks, transfer, and features."""
    found = results(rows)
    features = [row for row in rows if row["kind"] == "usefulness"]
    parts = [
        ("", result_table(found)),
        (f"average and worst case; on average: {NOISE}, or all rotations and shifts tried", attack_table(found)),
        *((transfer.title, table(*transfer.table())) for transfer in transfers(found)),
        ("features, one class against the rest", feature_table(features)),
    ]
    return "\n\n".join(f"{title}\n{text}" if title else text for title, text in parts if text)


def result_table(found: Sequence[Result]) -> str:
    """Accuracy of every model on the images as they are, over its seeds."""
    columns: dict[str, list[str]] = {
        "evaluation": [result.evaluation for result in found],
        **scored_on(found),
        "trained on": [result.trained_on for result in found],
        "attack success": [shown(result.attack_success_rate) for result in found],
        "learner": [result.model for result in found],
        accuracy_head(found): [str(result.clean) for result in found],
        "95 % interval": [result.clean.interval for result in found],
        "chance": [percent(result.chance) for result in found],
        "constant answer": [percent(result.constant) for result in found],
    }
    if len(set(columns["evaluation"])) < 2:
        del columns["evaluation"]
    if not unbalanced(found):
        del columns["constant answer"]
    columns |= {f"agrees with {rule}": [shown(result.agreement(rule)) for result in found] for rule in rules(found)}
    return table(list(columns), list(zip(*columns.values(), strict=True)))


def attack_table(found: Sequence[Result]) -> str:
    """Average beside worst case: noise beside the attack, the mean transformation beside the worst."""
    pairs = attacked(found)
    columns = {
        "model": [result.model for result, _ in pairs],
        **scored_on([result for result, _ in pairs]),
        "under": [attack.name for _, attack in pairs],
        "average case": [shown(attack.average) for _, attack in pairs],
        "worst case": [str(attack.worst) for _, attack in pairs],
        "gap": [shown(attack.gap) for _, attack in pairs],
    }
    if any(attack.target_rule for _, attack in pairs):
        columns["attack success"] = [shown(attack.share("success_rate")) for _, attack in pairs]
    return table(list(columns), list(zip(*columns.values(), strict=True)))


def feature_table(rows: Sequence[Row]) -> str:
    """How many pairs of a feature and a class are useful and robust, useful and not robust, useless."""
    lines = []
    for same in over_seeds(rows):
        row, shares = same[0], feature_shares(same)
        pairs = f"{row['features']} × {len(row['classes'])}"
        lines.append([without_seed(row["model"]), pairs, ball(row), *(shown(shares[kind]) for kind in KINDS)])
    return table(["model", "features × classes", "ball", *KINDS.values()], lines)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns of text, numbers to the right; each line is one, whatever stands in its cells."""
    if not lines:
        return ""
    lines = [[visible(cell) for cell in line] for line in lines]
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
    lines += [f"  {line}" for line in left_out_lines(manifest)]
    for split, share in manifest.get("majority", {}).items():
        lines.append(f"  majority class of {split}: {percent(share)}")
    if "l2_mean" in manifest:
        success = f"attack success {percent(manifest['success_rate'])}, " if "success_rate" in manifest else ""
        lines.append(f"  {success}mean L2 {manifest['l2_mean']:.3f}, largest L∞ {manifest['linf_max']:.3f}")
    if "distance_mean" in manifest:
        lines.append(f"  mean distance of the features {manifest['distance_mean']:.3f}")
    if "design" in manifest:
        design = manifest["design"]
        lines.append(f"  {design['arch']}, {'×'.join(map(str, design['shape']))} → {design['classes']} classes")
    return lines


def left_out_of(store: Store, run: Mapping[str, Any]) -> list[str]:
    """What the datasets that a run loaded lack of their sources: a line for each reason."""
    loaded = [node.partition("/")[2] for node, progress in run["nodes"].items() if progress["stage"] == "load"]
    found = {name: _dataset(store, run["nodes"], name) for name in loaded}
    return [f"datasets/{name}: {line}" for name, dataset in found.items() for line in left_out_lines(dataset)]


def left_out_lines(dataset: Mapping[str, Any]) -> list[str]:
    """What a dataset, or what is foreseen of it, lacks of its source: a line for each reason."""
    lines = [
        f"{one['images']:,} left out: {one['reason']}{'; the first: ' + one['first'] if 'first' in one else ''}"
        for one in dataset.get("left_out", [])
    ]
    if skipped := dataset.get("skipped"):
        lines.append(f"passed over: {', '.join(f'{count:,} {what}' for what, count in skipped.items())}")
    return lines
