"""Results class by class: accuracy and confusions of each learner, and the targets that attacks reached."""

import io
from collections import Counter
from collections.abc import Sequence

from pipeline.experiment.graph import Node
from pipeline.report.gallery import aims
from pipeline.report.overview import learners, told_apart
from pipeline.report.parts import Matrix, Section, Table, command
from pipeline.report.results import RunResults, Score
from pipeline.report.scores import over_seeds, percent
from pipeline.report.verdict import controls_of, headline
from pipeline.run import artifacts
from pipeline.run.artifacts import Artifact
from stages.errors import BadData

CLASSES = 20
"""Classes up to which every pair is shown; of more, the extremes."""

LEARNERS = 8
"""Learners and datasets shown, at most."""

EXTREMES = 10
"""Classes or pairs that are shown from each end of a longer list."""

ROWS = 32_000_000
"""Bytes of a table of samples up to which it is read for the page."""


def per_class(run: RunResults) -> Section | None:
    """Accuracy of each class, confusions of each learner, and the share of targets reached for each pair of classes."""
    scores = [score for score in _in_order(run) if score.on.id in run.manifests and score.rows[0]["per_class"]]
    attacked = [dataset for dataset in run.datasets() if aims(dataset)]
    matrices, tables = _accuracies(run, scores[:LEARNERS])
    confused = [score for score in scores if any("confusion" in row for row in score.rows)][:LEARNERS]
    for score in confused:
        _add(_confusion(run, score), matrices, tables)
    counted = [part for dataset in attacked[:LEARNERS] if (part := _targets(run, dataset)) is not None]
    for part in counted:
        _add(part, matrices, tables)
    if not matrices and not tables:
        return None
    text = "The accuracy of each learner by class, its confusions, and the success of the attacks by class and target."
    if (left := len(scores) - LEARNERS) > 0:
        text += f" {left} more learners are in the tables of `notbugs show --json`."
    if scores and not confused:
        text += " Confusions are counted where an evaluation has `confusion: true`."
    return Section("Class by class", text, tables=tables, matrices=matrices)


def _in_order(run: RunResults) -> list[Score]:
    """The learners, each control of the first behind it."""
    top, everyone = headline(run.held_out), learners(run)
    controls = controls_of(top, run.held_out) if top is not None else []
    return [*everyone[:1], *controls, *everyone[1:]]


def _add(part: Matrix | Table, matrices: list[Matrix], tables: list[Table]) -> None:
    if isinstance(part, Matrix):
        matrices.append(part)
    else:
        tables.append(part)


def _accuracies(run: RunResults, scores: Sequence[Score]) -> tuple[list[Matrix], list[Table]]:
    """A row per class, a column per learner; the classes that the first learner recognises least and most, if many."""
    if not scores:
        return [], []
    classes = list(run.manifests[scores[0].on.id]["classes"])
    alike = [score for score in scores if set(score.rows[0]["per_class"]) == set(classes)]
    shares = {name: [_of_class(score, name) for score in alike] for name in classes}
    title, columns = "Accuracy of each class", told_apart(alike)
    if len(classes) <= CLASSES:
        text = f"Share of the {alike[0].split} images of each class that a learner classifies correctly, in %."
        rows = list(shares.values())
        return [Matrix(title, text, "class \\ learner", classes, columns, rows, "per-class", command(run))], []
    known = sorted((name for name in classes if shares[name][0] is not None), key=lambda name: shares[name][0] or 0.0)
    ends = known if len(known) <= 2 * EXTREMES else [*known[:EXTREMES], *known[-EXTREMES:]]
    title += f": the {EXTREMES} lowest and the {EXTREMES} highest of {columns[0]}"
    return [], [Table(["class", *columns], [[name, *map(percent, shares[name])] for name in ends], title)]


def _of_class(score: Score, name: str) -> float | None:
    share = over_seeds(row["per_class"][name]["accuracy"] for row in score.measured)
    return None if share is None else share.mean


def _confusion(run: RunResults, score: Score) -> Matrix | Table:
    """What a learner takes the images of each class for, all seeds together."""
    classes = list(run.manifests[score.on.id]["classes"])
    counts = Counter[tuple[int, int]]()
    for row in score.rows:
        for true, line in enumerate(row.get("confusion", [])):
            counts.update({(true, predicted): number for predicted, number in enumerate(line)})
    title = f"Confusions of {score.model}"
    text = f"Share of the {score.split} images of a class (row) that it classifies as each class (column), in %."
    totals = [sum(counts[true, other] for other in range(len(classes))) for true in range(len(classes))]
    return _pairs(
        run, title, text, ("true class", "predicted class"), classes, counts, totals, f"confusion-{score.model}"
    )


def _targets(run: RunResults, dataset: Node) -> Matrix | Table | None:
    """For each true class and target, the share of the attacks that reached it; None for a table too large to read."""
    import pyarrow.parquet as pq

    made = Artifact(run.folder(dataset.id), dict(run.manifests[dataset.id]))
    if made.files.get("samples.parquet", {}).get("bytes", ROWS + 1) > ROWS:
        return None
    try:
        content = artifacts.read_file(run.store, made, "samples.parquet")
    except BadData:  # damage is for `verify` to report
        return None
    rows = pq.read_table(io.BytesIO(content), columns=["source_label", "target", "success"]).drop_null().to_pydict()
    pairs = list(zip(rows["source_label"], rows["target"], strict=True))
    tried, reached = Counter(pairs), Counter(p for p, hit in zip(pairs, rows["success"], strict=True) if hit)
    classes = list(made.manifest["classes"])
    title = f"Attack success by target: {dataset.name}, {percent(made.manifest.get('success_rate'))} of all"
    text = (
        "Share of the attacks from a class (row) toward a target (column) that reached it, in %; empty: none was made."
    )
    names = ("true class", "target")
    return _pairs(run, title, text, names, classes, reached, tried, f"targets-{dataset.name}")


def _pairs(
    run: RunResults,
    title: str,
    text: str,
    names: tuple[str, str],
    classes: Sequence[str],
    counts: Counter[tuple[int, int]],
    totals: Sequence[int] | Counter[tuple[int, int]],
    file: str,
) -> Matrix | Table:
    """A matrix over all pairs of classes, or of many classes a table of the pairs with the most images.

    Args:
        run, title, text: as in `Matrix`.
        names: of the rows and the columns.
        classes: their names.
        counts: pair → images counted.
        totals: what they are a share of: of each row's class, or of each pair.
        file: name of the CSV file.
    """

    def share(row: int, column: int) -> float | None:
        total = totals[row, column] if isinstance(totals, Counter) else totals[row]
        return counts[row, column] / total if total else None

    if len(classes) <= CLASSES:
        every = range(len(classes))
        shares = [[share(row, column) for column in every] for row in every]
        return Matrix(title, text, " \\ ".join(names), classes, classes, shares, file, command(run))
    off = Counter({pair: number for pair, number in counts.items() if pair[0] != pair[1]}).most_common(EXTREMES)
    lines = [[classes[row], classes[column], f"{n:,}", percent(share(row, column))] for (row, column), n in off]
    return Table([*names, "images", "share"], lines, f"{title}: the {len(lines)} most frequent pairs")
