"""What a person asks first about one version: how it was made, how good it is, where it is, how to open it."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pipeline.catalog import listing, words
from pipeline.catalog.listing import Entry
from pipeline.report import results, tables
from pipeline.report.scores import attack_name, percent
from pipeline.run import artifacts, documents
from pipeline.run.artifacts import Artifact
from pipeline.store import Store, at_once
from stages.errors import BadData

Rows = list[dict[str, Any]]


def described(
    store: Store, entry: Entry, named: Mapping[str, Collection[str]], evaluations: Sequence[Entry] | None = None
) -> dict[str, Any]:
    """A version's manifest, and beside it what is known from elsewhere in the store.

    Args:
        store: the store.
        entry: the version.
        named: run → folders of the versions that it names, the newest run first.
        evaluations: all evaluations of the store, among which those of a model are found.

    Returns:
        The keys of the manifest; ``tags``, ``state``, ``path``; ``runs`` that name it, the newest first; ``recipe``
        (the parameters) and ``made_by`` (the recipe in words), both None if ``recipe.json`` is damaged; of a dataset
        ``open`` (a line of Python); of a model ``training`` (the last line of its metrics) and ``scores`` (rows of
        evaluations); of an evaluation ``rows``. Of what is not finished, only what `Entry.as_json` gives, ``path``,
        ``runs`` and ``there``.
    """
    runs = [run for run, folders in named.items() if entry.folder in folders]
    about = entry.as_json() | {"path": store.at(entry.folder), "runs": runs}
    made = artifacts.artifact_at(store, entry.folder)
    if made is None:
        return about | {"there": entry.steps}
    about |= made.manifest | _recipe(store, made)
    match entry.group:
        case "datasets":
            return about | {"open": opens(store, entry)}
        case "models":
            return about | {"training": training(store, made), "scores": scores(store, entry, evaluations or ())}
    return about | {"rows": rows(store, entry)}


def _recipe(store: Store, made: Artifact) -> dict[str, Any]:
    try:
        file = words.recipe_file(store, made)
    except BadData:
        return {"recipe": None, "made_by": None}
    return {"recipe": file["parameters"], "made_by": words.in_words(made.manifest, file)}


def opens(store: Store, entry: Entry) -> str:
    """The line of Python that opens a dataset."""
    name = entry.node.partition("/")[2]
    asked = f'tag="{entry.tags[0]}"' if entry.tags else f'version="{entry.version}"'
    return f'notbugs.open("{name}", store={json.dumps(store.url, ensure_ascii=False)}, {asked})'


def training(store: Store, made: Artifact) -> dict[str, Any] | None:
    """The metrics of a training's last epoch; None if it had none, or if they are damaged."""
    try:
        lines = artifacts.read_file(store, made, "metrics.jsonl").splitlines()
        last = json.loads(lines[-1]) if lines else None
    except (BadData, ValueError):
        return None
    return last if isinstance(last, dict) else None


def rows(store: Store, evaluation: Entry) -> Rows:
    """The rows of an evaluation, as `notbugs show --json` prints those of a run.

    Raises:
        BadData: the result is damaged.
    """
    found = documents.read(store, f"{evaluation.folder}/result.json", results.Results)["rows"]
    return [{"kind": "accuracy", **row, "attack_success_rate": _success(store, evaluation, row)} for row in found]


def _success(store: Store, evaluation: Entry, row: Mapping[str, Any]) -> float | None:
    """Attack success rate of the dataset that the row's model was trained on."""
    model = evaluation.parents.get(f"models.{row['model']}")
    manifest = artifacts.manifest_at(store, model) if model else None
    on = manifest["parents"].get("on") if manifest else None
    dataset = artifacts.manifest_at(store, f"{on['node']}/{on['version']}") if on else None
    return dataset.get("success_rate") if dataset else None


def scores(store: Store, model: Entry, evaluations: Sequence[Entry]) -> Rows:
    """The rows about a model in all evaluations of this version of it, the newest evaluation first."""
    name = model.node.partition("/")[2]
    of_model = [one for one in evaluations if model.folder in one.parents.values()]
    found = at_once(lambda one: documents.find(store, f"{one.folder}/result.json", results.Results), of_model)
    each = [row for result in found if result for row in result["rows"]]
    return [{"kind": "accuracy", **row} for row in each if row["model"] == name]


# ---------------------------------------------------------------------------------------------- text


def as_text(about: Mapping[str, Any]) -> str:
    """What `described` found, in a few lines."""
    head = f"{about['group']}/{about['name']}  version {about['version']}"
    tagged = f"  tags {', '.join(about['tags'])}" if about["tags"] else ""
    if about["state"] != listing.FINISHED:
        there = f": {about['there']} there so far" if about["there"] else ""
        hint = "`notbugs verify` checks it" if about["state"] == listing.DAMAGED else "the next run goes on with it"
        return "\n".join([f"{head}  {about['state']}{tagged}{there}; {hint}", *_places(about)])
    lines = [f"{head}  made {about['made']}{tagged}"]
    lines += [f"  {about['made_by'] or 'recipe.json is damaged: `notbugs verify` checks it'}"]
    lines += tables.manifest_lines(about)[1:]
    lines += _scores_as_text(about) if about["group"] == "models" else []
    lines += _places(about)
    if about["group"] == "evaluations":
        lines += ["", tables.result_text(about["rows"])]
    return "\n".join(lines)


def _places(about: Mapping[str, Any]) -> list[str]:
    """Which runs name a version, and where it is."""
    lines = [f"  path: {about['path']}"]
    if about["runs"]:
        newest, *before = about["runs"]
        lines.insert(0, f"  in run {newest}{f', and {len(before)} before it' * bool(before)}")
    return [*lines, f"  open: {about['open']}"] if "open" in about else lines


def _scores_as_text(about: Mapping[str, Any]) -> list[str]:
    """Accuracies of a model: in its last epoch, and in evaluations."""
    last, lines = about["training"] or {}, []
    for key, images in (("accuracy", "the labels that it was trained on"), ("test_accuracy", "clean test images")):
        if isinstance(last.get(key), float):
            lines.append(f"  accuracy on {images}, in the last epoch: {percent(last[key])}")
    for row in about["scores"]:
        if row["kind"] == "accuracy":
            found = [f"accuracy {percent(row['accuracy'])} of {row['n']:,}"]
            found += [f"{attack_name(attack)}: {percent(attack['accuracy'])}" for attack in row["under_attack"]]
            lines.append(f"  evaluations/{row['evaluation']}, {row['on']} {row['split']}: {'; '.join(found)}")
    return list(dict.fromkeys(lines))  # several versions of an evaluation may agree
